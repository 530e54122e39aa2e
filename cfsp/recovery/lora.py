"""LoRA recovery with PEFT: one rank for all blocks, ranks by coarse importance (IG-LoRA), or even ranks of its size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from cfsp.config.components import component, suggest
from cfsp.config.contracts import Recovery
from cfsp.errors import ConfigError, RunError
from cfsp.recovery.base import Recovered
from cfsp.recovery.ranks import even_ranks, importance_guided_ranks
from cfsp.recovery.settings import Name, Positive, Training
from cfsp.system.atomic import naming

if TYPE_CHECKING:
    import torch

    from cfsp.architecture.views import DecoderView
    from cfsp.data.limits import Limits
    from cfsp.recovery.base import Recovered, RecoveryContext


@component
class Lora(Training, Recovery):
    """Train adapters on linear layers within the blocks, then merge them.

    The update of every block is scaled by ``alpha`` / ``rank``.

    Attributes:
        name: name of the recovery.
        ranks: "plain": ``rank`` in every block. "importance": ranks in proportion to the blocks' coarse importance,
            with mean ``rank``. "matched": even ranks with as many trainable parameters as "importance".
        rank: mean rank.
        alpha: numerator of the updates' scale.
        dropout: dropout of the adapters' inputs.
        targets: names of linear layers within the blocks, or ["all-linear"].
    """

    name: Name = "lora"
    ranks: Literal["plain", "importance", "matched"] = "plain"
    rank: Positive = 8
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: Annotated[
        tuple[str, ...], BeforeValidator(lambda names: (names,) if isinstance(names, str) else names)
    ] = ("all-linear",)
    trains: ClassVar[bool] = True

    def check(self, view: DecoderView, tokenizer: Any, limits: Limits, device: torch.device) -> dict[str, Any]:
        """See :class:`cfsp.config.contracts.Recovery`."""
        # Start-up time: loads numpy.
        from cfsp.recovery.train import check_training

        target_names = _select_target_names(self.targets, _linear_names(view))
        linears = [pair for block in view.blocks for pair in _linears_of(block.module).items()]
        highest = max(min(layer.weight.shape) for name, layer in linears if _is_wanted(name, target_names))
        if self.rank > highest:
            raise ConfigError(
                f"recovery.rank={self.rank}: the largest layer to adapt has rank {highest}; use a smaller one, or "
                "recovery=full"
            )
        return check_training(self, tokenizer, limits, device)

    def recover(self, context: RecoveryContext) -> Recovered:
        """See :class:`cfsp.config.contracts.Recovery`. The adapter is saved and merged."""
        import torch
        from peft import LoraConfig, get_peft_model

        # Start-up time: loads numpy, torch.
        from cfsp.architecture.views import resolve
        from cfsp.recovery.train import train

        view = resolve(context.model)
        blocks = self._choose_blocks(context, view)
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for block in blocks:
            if block.rank != self.rank:
                pattern = re.escape(f"{block.prefix}.") + ".*"
                ranks[pattern] = block.rank
                alphas[pattern] = block.rank * self.alpha / self.rank
        base = context.base()
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=_int_if_whole(self.alpha),  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            bias="none",
            target_modules=[name for block in blocks for name in block.targets],
            rank_pattern=ranks,
            alpha_pattern={pattern: _int_if_whole(alpha) for pattern, alpha in alphas.items()},
        )
        context.model.requires_grad_(False)
        context.model.name_or_path = ""  # type: ignore[assignment]  # otherwise PEFT reads the dense model's folder
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            adapted = get_peft_model(context.model, config)
        training = train(adapted, self, context)
        if base is not None:
            # PEFT writes the first into the adapter's configuration, and the second into its model card.
            adapted.peft_config["default"].base_model_name_or_path = str(base)
            context.model.config._name_or_path = str(base)  # type: ignore[union-attr]
            # Embeddings are not trained, so PEFT need not compare their size with the base model's.
            with naming(context.adapter):
                adapted.save_pretrained(str(context.adapter), save_embedding_layers=False)
            for file in context.adapter.glob("*.safetensors"):  # safetensors makes them readable only by their owner
                file.chmod(context.adapter.stat().st_mode & 0o666)
        model = adapted.merge_and_unload()
        model.requires_grad_(True)
        record = {
            "name": self.name,
            **training,
            "ranks": _ranks_by_base_block(context, blocks),
            "mean_rank": sum(block.rank for block in blocks) / len(blocks),
            "coarse_importance": [float(value) for value in context.importance],
        }
        return Recovered(model, record)

    def _choose_blocks(self, context: RecoveryContext, view: DecoderView) -> list[_AdaptedBlock]:
        """Return the blocks that have a layer to adapt, with their ranks.

        Raises:
            RunError: no block of the pruned model has such a layer.
        """
        target_names = _select_target_names(self.targets, None)
        survivors = [at for at, block in enumerate(context.plan.blocks) if block.attention or block.ffn]
        module_names = {id(module): name for name, module in context.model.named_modules()}
        adapted = []
        for base, block in zip(survivors, view.blocks, strict=True):
            linears = _linears_of(block.module)
            targets = {name: sum(m.weight.shape) for name, m in linears.items() if _is_wanted(name, target_names)}
            if targets:
                prefix = module_names[id(block.module)]
                names = tuple(f"{prefix}.{name}" for name in targets)
                adapted.append((base, prefix, names, sum(targets.values())))
        if not adapted:
            raise RunError("recovery: no block of the pruned model has a layer that recovery.targets names")
        guided = importance_guided_ranks([float(context.importance[base]) for base, *_ in adapted], self.rank)
        ranks = {
            "plain": [self.rank] * len(adapted),
            "importance": guided,
            "matched": even_ranks(guided, [cost for *_, cost in adapted]),
        }[self.ranks]
        return [
            _AdaptedBlock(base, prefix, names, rank)
            for (base, prefix, names, _), rank in zip(adapted, ranks, strict=True)
        ]


@dataclass(frozen=True)
class _AdaptedBlock:
    """Block that gets adapters.

    Attributes:
        base: index of the block in the base model.
        prefix: name of the block's module.
        targets: full names of the linear layers to adapt.
        rank: LoRA rank of these layers.
    """

    base: int
    prefix: str
    targets: tuple[str, ...]
    rank: int


def _linear_names(view: DecoderView) -> set[str]:
    """Return the names of the blocks' linear layers, e.g. "q_proj"."""
    return {name.rpartition(".")[2] for block in view.blocks for name in _linears_of(block.module)}


def _linears_of(block: Any) -> Mapping[str, Any]:
    # Start-up time: loads torch.
    from cfsp.architecture.projection import is_matrix

    return {name: module for name, module in block.named_modules() if is_matrix(module)}


def _select_target_names(targets: Sequence[str], known: set[str] | None) -> set[str] | None:
    """Return the names of the layers to adapt; None: all.

    Args:
        targets: names in the configuration, or "all-linear".
        known: names of the model's linear layers; None: the names are not checked.

    Raises:
        ConfigError: no names are given, or the model has no such layer; names those that it has.
    """
    if not targets:
        raise ConfigError("recovery.targets=[]: nothing to adapt; name layers, or use [all-linear]")
    for name in targets:
        if name != "all-linear" and known is not None and name not in known:
            raise ConfigError(
                f"recovery.targets={name}: the blocks have no such linear layer{suggest(name, known)}; they have "
                f"{', '.join(sorted(known))}"
            )
    return None if "all-linear" in targets else set(targets)


def _is_wanted(name: str, target_names: set[str] | None) -> bool:
    return target_names is None or name.rpartition(".")[2] in target_names


def _ranks_by_base_block(context: RecoveryContext, blocks: Sequence[_AdaptedBlock]) -> list[int | None]:
    """Return the rank of each block of the base model; None where it is not adapted or no longer there."""
    ranks = {block.base: block.rank for block in blocks}
    return [ranks.get(at) for at in range(len(context.plan.blocks))]


def _int_if_whole(value: float) -> int | float:
    return int(value) if value == int(value) else value
