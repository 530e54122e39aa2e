"""Everything that can be refused cheaply: model folder, structure, budget, data, tasks. No weight is loaded here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cfsp.allocate.budget import Budget, Sizes, keep_fraction
from cfsp.config import RunConfig, SelfCalibration, TextCalibration, TokensCalibration
from cfsp.data import calibration as calibration_data
from cfsp.data.calibration import CalibrationSet, Limits
from cfsp.identity import identity_of, run_id_of
from cfsp.models.load import load_tokenizer, outline, resolve_device, resolve_dtype
from cfsp.models.source import ModelSource, locate


@dataclass(frozen=True)
class Prepared:
    """A run that has passed its checks. ``calibration`` is None where it is sampled from the model, or not needed."""

    config: RunConfig
    source: ModelSource
    tokenizer: Any
    limits: Limits
    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    stored_dtype: torch.dtype
    calibration: CalibrationSet | None
    evaluation: dict[str, dict[str, Any]]
    identity: dict[str, Any]
    run_id: str

    @property
    def budget(self) -> Budget:
        return Budget(**self.config.sparsity.model_dump())


def prepare(config: RunConfig) -> Prepared:
    """Find and check every input of a run.

    Raises:
        CfspError: what is wrong, with the key and the way out.
    """
    device = resolve_device(config.model.device)
    source = locate(config.model)
    dtype = resolve_dtype(config.model.dtype, device, source.config)
    trust = config.model.trust_remote_code
    view = outline(source, trust_remote_code=trust)
    sizes = Sizes.of(view)
    prunes = config.pruner.instance.prunes
    if prunes:
        keep_fraction(Budget(**config.sparsity.model_dump()), sizes)
    positions = source.config.get("max_position_embeddings")
    limits = Limits(view.model.get_input_embeddings().weight.shape[0], positions)  # type: ignore[operator]
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    calibration, calibration_identity = None, None
    if prunes:
        calibration_identity = calibration_data.identity(config.calibration)
        calibration = _calibration(config, tokenizer, limits)
    evaluation = {
        name: evaluator.instance.check(tokenizer, limits) for name, evaluator in config.evaluation.items()
    }
    identity = identity_of(
        config,
        model=source.fingerprint,
        dtype=str(dtype).removeprefix("torch."),
        calibration=calibration_identity,
        evaluation=evaluation,
    )
    return Prepared(
        config, source, tokenizer, limits, sizes, device, dtype, _stored_dtype(config, source), calibration,
        evaluation, identity, run_id_of(config, identity),
    )  # fmt: skip


def _calibration(config: RunConfig, tokenizer: Any, limits: Limits) -> CalibrationSet | None:
    section = config.calibration
    if isinstance(section, TextCalibration):
        return calibration_data.from_text(section, tokenizer, limits, config.seed)
    if isinstance(section, TokensCalibration):
        return calibration_data.from_tokens(section, limits, config.seed)
    assert isinstance(section, SelfCalibration)
    limits.check_length("calibration.seq_len", section.seq_len)
    return None


def _stored_dtype(config: RunConfig, source: ModelSource) -> torch.dtype:
    """What a checkpoint is written in: ``save.dtype``, else the base model's."""
    stored = config.save.dtype or source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    return getattr(torch, str(stored).removeprefix("torch."))
