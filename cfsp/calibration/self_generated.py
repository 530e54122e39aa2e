"""Self-generated calibration: windows sampled from the dense model itself, with a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cfsp.calibration.calibration_set import CalibrationSet
from cfsp.config.identity import METHOD_VERSION, digest
from cfsp.config.sections import SelfCalibration
from cfsp.data.limits import Limits
from cfsp.system.cache import read_or_compute
from cfsp.system.progress import progress


@torch.no_grad()
def sample_windows(
    model: nn.Module, tokenizer: Any, section: SelfCalibration, limits: Limits, seed: int
) -> CalibrationSet:
    """Sample ``n_samples`` windows of ``seq_len`` tokens at ``sampling_temperature``, each from BOS on.

    A model without a BOS token starts each window from a random token. Sampling runs on CPU random numbers, so a
    seed gives the same windows whatever the device's generator is.

    Raises:
        DataError: the windows are longer than the model's positions.
    """
    limits.check_length("calibration.seq_len", section.seq_len)
    generator = torch.Generator().manual_seed(seed)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    batches = []
    for begin in progress(range(0, section.n_samples, section.batch_size), "sample calibration text", unit="batch"):
        size = min(section.batch_size, section.n_samples - begin)
        batches.append(_sample(model, _first(tokenizer, limits, size, generator), section, generator, device))
    return CalibrationSet(torch.cat(batches), section.name, "self", seed)


def _first(tokenizer: Any, limits: Limits, size: int, generator: torch.Generator) -> Tensor:
    if tokenizer.bos_token_id is not None:
        return torch.full((size, 1), tokenizer.bos_token_id)
    return torch.randint(limits.vocab_size, (size, 1), generator=generator)


def _sample(
    model: nn.Module, ids: Tensor, section: SelfCalibration, generator: torch.Generator, device: torch.device
) -> Tensor:
    cache, step = None, ids
    for _ in range(section.seq_len - 1):
        output = model(step.to(device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu() / section.sampling_temperature
        step = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, step], dim=1)
    return ids


def load_or_sample_windows(
    model: nn.Module,
    tokenizer: Any,
    section: SelfCalibration,
    limits: Limits,
    seed: int,
    cache: Path,
    fingerprint: str,
) -> CalibrationSet:
    """Sample windows, or read them from ``cache``; the key is the model's ``fingerprint``, dtype, settings and seed."""
    decides = section.model_dump() | {"model": fingerprint, "seed": seed}
    decides |= {"dtype": str(next(model.parameters()).dtype), "version": METHOD_VERSION}
    path = cache / "load_or_sample_windows" / f"{digest(decides)[:32]}.npy"
    calibration, _ = read_or_compute(
        path,
        lambda file: CalibrationSet(torch.from_numpy(np.load(file)), section.name, "self", seed),
        lambda: sample_windows(model, tokenizer, section, limits, seed),
        _write_ids,
    )
    return calibration


def _write_ids(calibration: CalibrationSet, path: Path) -> None:
    with path.open("wb") as stream:  # Given a file name, numpy would append its own suffix.
        np.save(stream, calibration.input_ids.numpy())
