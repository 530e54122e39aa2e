"""LoRA recovery through PEFT: plain ranks, ranks by coarse importance (IG-LoRA), or plain ranks of the same size."""

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
from cfsp.recovery.ranks import importance_guided, matched
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

    ``alpha`` / ``rank`` scales every block's update.

    Attributes:
        name: name of the recovery.
        ranks: plain: ``rank`` everywhere; importance: ranks follow the blocks' coarse importance with mean ``rank``;
            matched: even ranks with the trainable parameters of importance.
        rank: mean rank.
        alpha: strength of the updates.
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

        target_names = _named(self.targets, _linears(view))
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
        blocks = self._adapted(context, view)
        patterns: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for block in blocks:
            if block.rank != self.rank:
                key = re.escape(f"{block.prefix}.") + ".*"
                patterns[key] = block.rank
                alphas[key] = block.rank * self.alpha / self.rank
        base = context.base()
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=_whole(self.alpha),  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            bias="none",
            target_modules=[name for block in blocks for name in block.targets],
            rank_pattern=patterns,
            alpha_pattern={key: _whole(value) for key, value in alphas.items()},
        )
        context.model.requires_grad_(False)
        context.model.name_or_path = ""  # type: ignore[assignment]  # PEFT would look into the dense folder
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            adapted = get_peft_model(context.model, config)
        training = train(adapted, self, context)
        if base is not None:
            # In its configuration, and in the card that PEFT writes.
            adapted.peft_config["default"].base_model_name_or_path = str(base)
            context.model.config._name_or_path = str(base)  # type: ignore[union-attr]
            # Not looking at the base for embeddings of another size: none are trained.
            with naming(context.adapter):
                adapted.save_pretrained(str(context.adapter), save_embedding_layers=False)
            for file in context.adapter.glob("*.safetensors"):  # readable by their owner alone, whatever the umask
                file.chmod(context.adapter.stat().st_mode & 0o666)
        model = adapted.merge_and_unload()
        model.requires_grad_(True)
        record = {
            "name": self.name,
            **training,
            "ranks": _per_base_block(context, blocks),
            "mean_rank": sum(block.rank for block in blocks) / len(blocks),
            "coarse_importance": [float(value) for value in context.importance],
        }
        return Recovered(model, record)

    def _adapted(self, context: RecoveryContext, view: DecoderView) -> list[_Adapted]:
        """Return the blocks that have a layer to adapt, with their ranks."""
        target_names = _named(self.targets, None)
        survivors = [at for at, block in enumerate(context.plan.blocks) if block.attention or block.ffn]
        modules = {id(module): name for name, module in context.model.named_modules()}
        adapted = []
        for base, block in zip(survivors, view.blocks, strict=True):
            linears = _linears_of(block.module)
            targets = {name: sum(m.weight.shape) for name, m in linears.items() if _is_wanted(name, target_names)}
            if targets:
                prefix = modules[id(block.module)]
                names = tuple(f"{prefix}.{name}" for name in targets)
                adapted.append((base, prefix, names, sum(targets.values())))
        if not adapted:
            raise RunError("recovery: no block of the pruned model has a layer that recovery.targets names")
        guided = importance_guided([float(context.importance[base]) for base, *_ in adapted], self.rank)
        chosen = {
            "plain": [self.rank] * len(adapted),
            "importance": guided,
            "matched": matched(guided, [cost for *_, cost in adapted]),
        }[self.ranks]
        return [
            _Adapted(base, prefix, names, rank) for (base, prefix, names, _), rank in zip(adapted, chosen, strict=True)
        ]


@dataclass(frozen=True)
class _Adapted:
    """A block that is adapted: its index in the base model, module name, linears' full names, rank."""

    base: int
    prefix: str
    targets: tuple[str, ...]
    rank: int


def _linears(view: DecoderView) -> set[str]:
    return {name.rpartition(".")[2] for block in view.blocks for name in _linears_of(block.module)}


def _linears_of(block: Any) -> Mapping[str, Any]:
    # Start-up time: loads torch.
    from cfsp.architecture.projection import is_matrix

    return {name: module for name, module in block.named_modules() if is_matrix(module)}


def _named(targets: Sequence[str], known: set[str] | None) -> set[str] | None:
    """Return the names of the layers to adapt; None: all.

    Raises:
        ConfigError: the model has no such layer; names those that it has.
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


def _per_base_block(context: RecoveryContext, blocks: Sequence[_Adapted]) -> list[int | None]:
    ranks = {block.base: block.rank for block in blocks}
    return [ranks.get(at) for at in range(len(context.plan.blocks))]


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value
