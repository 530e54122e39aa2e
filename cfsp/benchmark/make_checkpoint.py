"""Write a sharded, randomly initialised LLaMA of any size. Only one tensor at a time is in memory.

    python -m cfsp.benchmark.make_checkpoint path=FOLDER [hidden=2048] [ffn=5632] [blocks=58] [heads=16] [kv_heads=16]
        [vocab=32000] [positions=2048] [dtype=bfloat16] [shard_gb=1] [seed=0]

transformers can load the folder. It has model-0000k-of-0000n.safetensors with their index (or model.safetensors for a
single shard), config.json, generation_config.json and the bundled tokenizer, whose ids are below ``vocab``. The values
are those with which transformers initialises a model: normal with standard deviation 0.02, norms 1. The same seed and
shape give the same values for any number of shards. ``shard_gb`` is in 10^9 bytes. The folder appears only when it is
complete. A folder from an earlier call is kept if its settings are the same, and replaced otherwise. The defaults give
6.2 GB.
"""

from __future__ import annotations

import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import CheckpointError, ConfigError
from cfsp.sweep.experiment import override_values
from cfsp.system.command import command
from cfsp.system.package import ROOT

if TYPE_CHECKING:
    from torch import Tensor

#: File with the settings of a folder. A folder with this file may be replaced.
MARKER = "made_checkpoint.json"
TOKENIZER = ROOT / "assets" / "books7m"
#: dtype -> its name in safetensors, and the bytes of an element.
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
STANDARD_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """Shape of a LLaMA.

    Attributes:
        hidden: hidden size.
        ffn: FFN width.
        blocks: number of blocks.
        heads: query heads of a block.
        kv_heads: key and value heads of a block.
        vocab: size of the vocabulary.
        positions: longest window.
        dtype: dtype of the files.
    """

    hidden: int = 2048
    ffn: int = 5632
    blocks: int = 58
    heads: int = 16
    kv_heads: int = 16
    vocab: int = 32000
    positions: int = 2048
    dtype: str = "bfloat16"

    def config(self) -> Any:
        """Return the configuration for transformers, without settings of attention or cache."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.positions,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            dtype=self.dtype,
        )


def main(overrides: Sequence[str] | None = None) -> int:
    """Write the requested model and return the exit code."""
    return command("make_checkpoint", str(__doc__), overrides, _make)


def make_checkpoint(folder: Path, shape: Shape, *, shard_gb: float = 1.0, seed: int = 0) -> bool:
    """Write the model to ``folder``, which appears only when it is complete.

    Args:
        folder: folder to write.
        shape: shape of the model.
        shard_gb: largest size of a shard, in 10^9 bytes.
        seed: seed of the values.

    Returns:
        False if the folder already had this model, otherwise True.

    Raises:
        ConfigError: the sizes are not compatible.
        CheckpointError: the folder was not written by this function, or it cannot be written.
    """
    _check_shape(shape, shard_gb)
    folder = folder.resolve()
    made_with = {**asdict(shape), "shard_gb": shard_gb, "seed": seed}
    if folder.exists():
        earlier = _read_marker(folder)
        if earlier == made_with:
            return False
        if earlier is None:
            raise CheckpointError(
                f"path={folder}: exists and was not written by make_checkpoint (no {MARKER}); give another folder"
            )
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir(parents=True)
        _write_weights(scratch, shape, shard_gb, seed)
        config = shape.config()
        _write_json(scratch / "config.json", json.loads(config.to_json_string(use_diff=False)))
        _write_json(scratch / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / name, scratch / name)
        _write_json(scratch / MARKER, made_with)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"path={folder}: the model cannot be written there ({error.strerror}); give another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the name of every tensor -> its shape, in the order of the class of transformers."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _initial_values(size: tuple[int, ...], number: int, shape: Shape, seed: int) -> Tensor:
    """Return the initial values of the ``number``-th tensor."""
    import torch

    dtype = getattr(torch, shape.dtype)
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.empty(size).normal_(0, STANDARD_DEVIATION, generator=generator).to(dtype)


def _write_weights(folder: Path, shape: Shape, shard_gb: float, seed: int) -> None:
    import torch

    code, itemsize = DTYPES[shape.dtype]
    everything = tensor_shapes(shape)
    numbers = {name: number for number, name in enumerate(everything)}
    shards = list(_split_into_shards(everything, itemsize, shard_gb * 1e9))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in shard.items():
            start, end = end, end + _count_elements(size) * itemsize
            header[name] = {"dtype": code, "shape": list(size), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # safetensors needs data that begin at a multiple of 8 bytes
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, size in shard.items():
                values = _initial_values(size, numbers[name], shape, seed)
                stream.write(values.flatten().view(torch.uint8).numpy().data)
                del values  # otherwise two tensors are in memory while the next one is drawn
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(_count_elements(size) for size in everything.values())
        metadata = {"total_parameters": total, "total_size": total * itemsize}
        _write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def _split_into_shards(
    tensors: dict[str, tuple[int, ...]], itemsize: int, limit: float
) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, size in tensors.items():
        if shard and held + _count_elements(size) * itemsize > limit:
            yield shard
            shard, held = {}, 0
        shard[name] = size
        held += _count_elements(size) * itemsize
    yield shard


def _count_elements(size: tuple[int, ...]) -> int:
    product = 1
    for n in size:
        product *= n
    return product


def _check_shape(shape: Shape, shard_gb: float) -> None:
    from transformers import PreTrainedTokenizerFast

    if shape.hidden % shape.heads or (shape.hidden // shape.heads) % 2:
        raise ConfigError(
            f"heads={shape.heads}: hidden={shape.hidden} does not divide into so many heads of an even size; give a "
            "divisor of hidden / 2"
        )
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"kv_heads={shape.kv_heads}: give a divisor of heads={shape.heads}")
    if shape.dtype not in DTYPES:
        raise ConfigError(f"dtype={shape.dtype}: there are {', '.join(DTYPES)}")
    needed = len(PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / "tokenizer.json")))
    if shape.vocab < needed:
        raise ConfigError(f"vocab={shape.vocab}: the bundled tokenizer has {needed} tokens; give {needed} or more")
    if not 0 < shard_gb < float("inf"):
        raise ConfigError(f"shard_gb={shard_gb}: give a number above 0, in 10^9 bytes")


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        settings = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _make(overrides: Sequence[str]) -> int:
    values = {key: str(value) for key, value in override_values(overrides).items()}
    integer_keys = [field.name for field in fields(Shape) if field.name != "dtype"] + ["seed"]
    keys = ["path", *integer_keys, "dtype", "shard_gb"]
    unknown = sorted(set(values) - set(keys))
    if unknown:
        raise ConfigError(f"{unknown[0]}={values[unknown[0]]}: there is no such key; there are {', '.join(keys)}")
    if "path" not in values:
        raise ConfigError("path is not set: give path=FOLDER, where the model is to be written")
    path, dtype, shard_gb = Path(values.pop("path")), values.pop("dtype", "bfloat16"), values.pop("shard_gb", "1")
    for key, value in values.items():
        if not value.isdigit() or (key != "seed" and int(value) < 1):
            raise ConfigError(f"{key}={value}: give a whole number from {0 if key == 'seed' else 1}")
    try:
        limit = float(shard_gb)
    except ValueError:
        raise ConfigError(f"shard_gb={shard_gb}: give a number above 0, in 10^9 bytes") from None
    numbers = {key: int(value) for key, value in values.items()}
    seed = numbers.pop("seed", 0)
    shape = Shape(dtype=dtype, **numbers)
    new = make_checkpoint(path, shape, shard_gb=limit, seed=seed)
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    print(f"{path}: {written / 1e9:.2f} GB in {len(list(path.glob('*.safetensors')))} files", end="")
    print("" if new else ", there already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
