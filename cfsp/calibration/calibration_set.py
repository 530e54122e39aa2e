"""Calibration sets: windows of token ids with a fingerprint of their content."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfsp.config.deciding import deciding_settings
from cfsp.config.sections import (
    CalibrationSection,
    MixCalibration,
    SelfCalibration,
    TextCalibration,
    TokensCalibration,
)
from cfsp.data.limits import Limits
from cfsp.data.text import cut_windows, locate_text, read_text, resolve_bos, tokenise, window_bos_id, with_bos
from cfsp.data.token_file import open_ids
from cfsp.errors import DataError
from cfsp.system.digest import file_digest
from cfsp.system.number_bounds import LARGEST_TOKENS
from cfsp.system.package import package_path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationSet:
    """Windows of token ids ``input_ids`` [n, T], int64 on CPU, and their source.

    ``bos`` is the setting that was used for windows of a text (never auto); ``parts`` describes the sets of a mixture.
    """

    input_ids: Tensor
    name: str
    split: str
    seed: int
    revision: str | None = None
    bos: str | None = None
    parts: tuple[dict[str, Any], ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shape and the ids."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        digest.update(self.input_ids.contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def describe(self) -> dict[str, Any]:
        """Return the description of this calibration set for the record."""
        n, length = self.input_ids.shape
        return {
            "name": self.name,
            "split": self.split,
            "revision": self.revision,
            "n_samples": n,
            "seq_len": length,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            **({"bos": self.bos} if self.bos is not None else {}),
            **({"parts": list(self.parts)} if self.parts else {}),
        }


def from_ids(input_ids: Tensor, limits: Limits, name: str = "input_ids", seed: int = 0) -> CalibrationSet:
    """Make a calibration set from existing token ids [n, T].

    Raises:
        DataError: the ids are not a non-empty integer matrix, or lie outside the vocabulary, or the windows are too
            long.
    """
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if input_ids.dim() != 2 or input_ids.dtype not in integers or input_ids.numel() == 0:
        raise DataError(
            f"{name}: integer token ids of shape [n, T] are needed, "
            f"found {input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    ids = input_ids.detach().to("cpu", torch.int64)
    limits.check_ids(name, ids.numpy())
    limits.check_length(f"{name} window length", ids.shape[1])
    return CalibrationSet(ids, name, "given", seed)


def from_text(
    section: TextCalibration, tokenizer: Any, limits: Limits, seed: int, key: str = "calibration"
) -> CalibrationSet:
    """Cut windows from a text: at random starts (Python's ``random``, as CFSP's released code does) or in order.

    Raises:
        DataError: the text is missing, unreadable or too short, or the windows are too long for the model.
    """
    limits.check_length("calibration.seq_len", section.seq_len)
    section = resolve_bos(section, tokenizer)
    text = locate_text(section, key)
    bos_id = window_bos_id(tokenizer, section.bos, key)
    ids = tokenise(read_text(text), tokenizer, section.bos)
    length = section.seq_len if bos_id is None else section.seq_len - 1
    needed = length if section.sampling == "random" else length * section.n_samples
    if len(ids) < needed:
        raise DataError(
            f"calibration ({section.name}): the text has {len(ids)} tokens, {needed} are needed for "
            f"calibration.n_samples={section.n_samples} calibration.seq_len={section.seq_len} "
            f"({section.sampling}); use a longer text or smaller values"
        )
    if section.sampling == "sequential":
        windows = cut_windows(ids, section.seq_len, bos_id=bos_id)[: section.n_samples]
    else:
        if len(ids) < length * section.n_samples:
            log.warning(
                "calibration (%s): %d random windows of %d tokens overlap in a text of %d tokens",
                section.name, section.n_samples, section.seq_len, len(ids),
            )  # fmt: skip
        chooser = random.Random(seed)
        if section.n_samples > max(1, len(ids) - length):
            raise DataError(
                f"calibration.n_samples={section.n_samples}: the text of calibration={section.name} has "
                f"{max(1, len(ids) - length):,} windows of {length} tokens; use fewer, or a longer text"
            )
        starts = [chooser.randint(0, max(0, len(ids) - length - 1)) for _ in range(section.n_samples)]
        windows = np.stack([ids[start : start + length] for start in starts])
        windows = windows if bos_id is None else with_bos(windows, bos_id)
    limits.check_ids(f"calibration ({section.name})", windows)
    ids_of_windows = torch.from_numpy(windows.copy())
    return CalibrationSet(ids_of_windows, section.name, section.split, seed, text.revision, section.bos)


def from_tokens(section: TokensCalibration, limits: Limits, seed: int, key: str = "calibration") -> CalibrationSet:
    """Read frozen ids from a .npy file, and cut them to ``n_samples`` and ``seq_len``.

    Raises:
        DataError: the file is missing or empty, its ids are not integers of shape [n, T] within the vocabulary, or too
            few.
    """
    key = f"{key}.path={section.path}"
    ids = open_ids(package_path(str(section.path)), key)
    n, length = section.n_samples or ids.shape[0], section.seq_len or ids.shape[1]
    if ids.shape[0] < n or ids.shape[1] < length:
        raise DataError(
            f"{key}: it holds {ids.shape[0]} x {ids.shape[1]} ids; calibration.n_samples={n} "
            f"calibration.seq_len={length} ask for more"
        )
    limits.check_length("calibration.seq_len", length)
    if n * length > LARGEST_TOKENS:
        raise DataError(
            f"{key}: {n:,} x {length:,} ids are more than the {LARGEST_TOKENS:,} that are taken; use "
            "calibration.n_samples=128"
        )
    chosen = ids[:n, :length]
    limits.check_ids(key, chosen)
    return CalibrationSet(torch.from_numpy(chosen.astype(np.int64, order="C")), section.name, "given", seed)


def from_mix(section: MixCalibration, sets: Mapping[str, CalibrationSet], seed: int) -> CalibrationSet:
    """Mix the windows of several sets, in an order drawn by the seed.

    The order is random, because the first windows decide searches, and every fourth window judges refits: neither may
    hold one source alone.

    Args:
        section: settings of the mixture.
        sets: source -> its windows, ``section.seq_len`` tokens each.
        seed: seed of the order.
    """
    windows = torch.cat([calibration.input_ids for calibration in sets.values()])
    order = list(range(len(windows)))
    random.Random(seed).shuffle(order)
    parts = tuple(calibration.describe() for calibration in sets.values())
    return CalibrationSet(windows[order], section.name, "mixed", seed, parts=parts)


def load_windows(
    section: CalibrationSection,
    tokenizer: Any,
    limits: Limits,
    seed: int,
    sample: Callable[[SelfCalibration], CalibrationSet] | None = None,
    key: str = "calibration",
) -> CalibrationSet | None:
    """Load the calibration set that a section describes.

    Args:
        section: settings of the set.
        tokenizer: the model's tokenizer.
        limits: sizes of the model that windows and ids must fit.
        seed: seed of random windows.
        sample: samples windows from the dense model; None: there is no model yet.
        key: where the settings stand.

    Returns:
        The set; None where windows have to be sampled and ``sample`` is None. Everything else is checked then too.

    Raises:
        DataError: see :func:`from_text` and :func:`from_tokens`.
    """
    if isinstance(section, TextCalibration):
        return from_text(section, tokenizer, limits, seed, key)
    if isinstance(section, TokensCalibration):
        return from_tokens(section, limits, seed, key)
    limits.check_length("calibration.seq_len", section.seq_len)
    if isinstance(section, SelfCalibration):
        return None if sample is None else sample(section)
    sets = {
        name: load_windows(part, tokenizer, limits, seed, sample, f"{key}.sources.{name}")
        for name, part in section.parts.items()
    }
    loaded = {name: calibration for name, calibration in sets.items() if calibration is not None}
    return from_mix(section, loaded, seed) if len(loaded) == len(sets) else None


def identity(section: CalibrationSection, tokenizer: Any = None, key: str = "calibration") -> dict[str, Any]:
    """Return the settings and the content that decide the set, for the run's identity, before it is tokenised.

    Without a ``tokenizer``, ``bos=auto`` stays unsettled. ``key``: where the settings stand.
    """
    if isinstance(section, MixCalibration):
        parts = {name: identity(part, tokenizer, f"{key}.sources.{name}") for name, part in section.parts.items()}
        return {name: value for name, value in deciding_settings(section).items() if name != "sources"} | parts
    if isinstance(section, TextCalibration) and tokenizer is not None:
        section = resolve_bos(section, tokenizer)
    settings = deciding_settings(section)
    if isinstance(section, TextCalibration):
        settings |= locate_text(section, key).identity
    elif isinstance(section, TokensCalibration):
        path = package_path(str(section.path))
        open_ids(path, f"{key}.path={section.path}")
        settings["sha256"] = file_digest(path)
    return settings
