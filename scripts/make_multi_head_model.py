"""Write a grouped-query model out with keys and values for every query head: the same function, multi-head attention.

python scripts/make_multi_head_model.py [source=FOLDER] [target=outputs/models/bundled_mha]

``experiments/gqa`` compares the two. The source (default: the bundled model) is a LLaMA-like folder: separate q_proj,
k_proj and v_proj, ``num_key_value_heads`` in its configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsp.errors import CheckpointError, ConfigError
from cfsp.sweep.experiment import override_values
from cfsp.system.command import command
from cfsp.system.package import package_path

SOURCE, TARGET = "pkg://cfsp/assets/books7m", "outputs/models/bundled_mha"


def main(words: Sequence[str] | None = None) -> int:
    """Write the model; returns the exit code."""
    given = sys.argv[1:] if words is None else list(words)
    return command("make_multi_head_model", str(__doc__), given or [f"target={TARGET}"], _make)


def written_out(model: Any) -> Any:
    """Repeat each key and value head of ``model`` in place, for every query head that reads it.

    Raises:
        ConfigError: the attention has another structure.
    """
    import torch

    config = model.config
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if not groups or heads % groups:
        raise ConfigError(f"source={config.name_or_path}: its configuration has no num_key_value_heads; give a LLaMA")
    for block in model.model.layers:
        attention = block.self_attn
        for projection in (attention.k_proj, attention.v_proj):
            for name in ("weight", "bias"):
                values = getattr(projection, name)
                if values is not None:
                    rows = values.data.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, dim=0)
                    setattr(projection, name, torch.nn.Parameter(rows.flatten(0, 1)))
            projection.out_features = projection.weight.shape[0]
        attention.num_key_value_groups = 1
    config.num_key_value_heads = heads
    return model


def _make(words: Sequence[str]) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"source": SOURCE, "target": TARGET, **override_values(words)}
    unknown = sorted(set(given) - {"source", "target"})
    if unknown:
        raise ConfigError(f"{unknown[0]}={given[unknown[0]]}: there is no such key; there are source and target")
    source, target = package_path(str(given["source"])), Path(str(given["target"]))
    if not (source / "config.json").is_file():
        raise ConfigError(f"source={source}: no model folder (config.json is not there); give one")
    if target.exists():
        raise CheckpointError(f"target={target}: exists already; remove it or give another folder")
    model = written_out(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    print(f"Written: {target} ({model.config.num_attention_heads} heads with keys and values of their own)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
