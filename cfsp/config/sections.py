"""Typed sections of the configuration: one class for each group of plain keys.

The YAML files of ``conf/`` describe each key in a comment.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from cfsp.config.budget import Protect
from cfsp.config.deciding import Decides
from cfsp.system.names import checked_name

DType = Literal["auto", "float32", "bfloat16", "float16"]
SavedDType = Literal["float32", "bfloat16", "float16"]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Folder = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AfterValidator(checked_name)]


def _device(name: str) -> str:
    # Checks only the form; whether the machine has the device is checked later, when torch is imported.
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu|npu|hpu|mlu)(:\d+)?", name):
        raise ValueError("use auto, cpu, cuda, cuda:N or mps")
    return name


def _protect(value: Any) -> Protect:
    # One message; a union of types would give one for each type.
    if value in ("none", "auto"):
        return value
    numbers = isinstance(value, list | tuple) and len(value) == 2
    if numbers and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value):
        return int(value[0]), int(value[1])
    raise ValueError("blocks that stay whole: use none, auto or [first,last], e.g. sparsity.protect=[4,2]")


def _architecture(values: dict[str, Any] | None) -> dict[str, Any] | None:
    if values is not None and not isinstance(values.get("model_type"), str):
        raise ValueError("keys of a config.json are expected, model_type among them; leave it out, or use null")
    nested = [key for key, value in (values or {}).items() if not isinstance(value, str | int | float | None)]
    if nested:
        raise ValueError(f"{', '.join(nested)}: a number, a word, true, false or null is expected")
    return values


def _batch_size(value: Any) -> int | Literal["auto"]:
    # One message; a union of types would give one for each type.
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("sequences at a time: give auto or a whole number from 1")


def checked_force(value: Any) -> bool | Literal["check"]:
    """Return the value of ``force``.

    Raises:
        ValueError: it is not true, false or check.
    """
    # One message; a union of types would give one for each type.
    if value == "check" and isinstance(value, str):
        return "check"
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError(
            "use true or false (true repeats a finished run), or check (compares the hashes of its files)"
        ) from None


#: Older records hold the former default 8. The batch size changes sums only in their last digits, so tables treat the
#: two values alike.
BatchSize = Annotated[int | Literal["auto"], PlainValidator(_batch_size), Decides(alike=(8, "auto"))]
#: Share of the tokens from which Gram matrices are computed.
GramShare = Annotated[float, Field(gt=0, le=1), Decides(before=1.0)]
Gigabytes = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of a group of keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The model and how it is loaded."""

    name: Name
    path: Annotated[str | None, Decides("content")] = Field(
        description="a folder or a hub id, e.g. model=local model.path=FOLDER"
    )
    revision: Annotated[str | None, Decides("content")] = None
    gguf_file: Annotated[str | None, Decides("content", before=None)] = Field(
        default=None, description="the GGUF file in the folder or repository, where there are several"
    )
    #: It decides no figure, because a quantised checkpoint is refused without it.
    dequantize: Annotated[bool, Decides("nothing")] = False
    dtype: DType = "auto"
    device: Annotated[str, AfterValidator(_device), Decides("nothing")] = "auto"
    trust_remote_code: Annotated[bool, Decides("nothing")] = False
    streaming: Annotated[Literal["auto", "on", "off"], Decides("nothing")] = "auto"
    #: Sizes as in config.json, for ``cfsp inspect`` if neither folder nor hub can be reached; no run reads them.
    architecture: Annotated[dict[str, Any] | None, AfterValidator(_architecture), Decides("nothing")] = None
    part: Annotated[Literal["whole", "language_model"], Decides(before="whole")] = "whole"


class HubFile(Section):
    """File of a dataset repository on the hub (parquet or JSON; never a loading script)."""

    repo: str
    file: str
    revision: str | None = None


class TextSection(Section):
    """Source of a text, and how its documents become one token stream."""

    path: Annotated[str | None, Decides("content")] = Field(
        default=None, description="a local .txt, .jsonl, .csv or .parquet file"
    )
    hub: Annotated[HubFile | None, Decides("content")] = None
    split: str = "train"
    text_field: str = "text"
    txt_rows: Literal["whole", "lines", "wikitext"] = "whole"
    join: str = "\n\n"
    bos: Literal["auto", "none", "start", "window"] = "auto"
    skip_documents: Annotated[int, Decides(before=0)] = Field(default=0, ge=0)
    max_documents: PositiveInt | None = None


class TextCalibration(TextSection):
    """Calibration windows cut from a text."""

    kind: Literal["text"]
    name: Name
    sampling: Literal["random", "sequential"] = "random"
    n_samples: PositiveInt
    seq_len: int = Field(ge=2)
    batch_size: BatchSize = "auto"
    memory_gb: Annotated[Gigabytes | None, Decides("nothing")] = None
    gram_share: GramShare = 1.0


class TokensCalibration(Section):
    """Calibration windows of frozen token ids."""

    kind: Literal["tokens"]
    name: Name
    path: Annotated[str | None, Decides("content")] = Field(description="a .npy file of token ids, shape [n, T]")
    n_samples: PositiveInt | None = None
    seq_len: Annotated[int, Field(ge=2)] | None = None
    batch_size: BatchSize = "auto"
    memory_gb: Annotated[Gigabytes | None, Decides("nothing")] = None
    gram_share: GramShare = 1.0


class SelfCalibration(Section):
    """Calibration windows sampled from the dense model itself."""

    kind: Literal["self"]
    name: Name
    n_samples: PositiveInt
    seq_len: int = Field(ge=2)
    sampling_temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    batch_size: PositiveInt = 8
    gram_share: GramShare = 1.0


class MixCalibration(Section):
    """Calibration windows of several sets."""

    kind: Literal["mix"]
    name: Name
    mix: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        description="the share of each source, e.g. calibration.mix='{wikitext2: 2, c4: 1}'"
    )
    sources: Annotated[dict[str, TextCalibration | TokensCalibration | SelfCalibration], Decides(chosen_by="mix")]
    n_samples: PositiveInt
    seq_len: int = Field(ge=2)
    batch_size: BatchSize = "auto"
    memory_gb: Annotated[Gigabytes | None, Decides("nothing")] = None
    gram_share: GramShare = 1.0

    @property
    def parts(self) -> dict[str, TextCalibration | TokensCalibration | SelfCalibration]:
        """Source -> its settings with the windows that it gives; a source without a window is left out.

        Shares become whole numbers of windows by their largest remainders.
        """
        shares = self.mix or {}
        exact = {name: self.n_samples * share / sum(shares.values()) for name, share in shares.items()}
        counts = {name: int(number) for name, number in exact.items()}
        by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
        for name in by_remainder[: self.n_samples - sum(counts.values())]:
            counts[name] += 1
        settings = {"seq_len": self.seq_len}
        return {
            name: self.sources[name].model_copy(update={**settings, "n_samples": count})
            for name, count in counts.items()
            if count
        }


def samples_the_model(section: CalibrationSection) -> bool:
    """Return whether windows are sampled from the dense model itself."""
    if isinstance(section, MixCalibration):
        return any(isinstance(part, SelfCalibration) for part in section.parts.values())
    return isinstance(section, SelfCalibration)


CalibrationSection = TextCalibration | TokensCalibration | SelfCalibration | MixCalibration
#: calibration.kind -> its section.
CALIBRATION_KINDS: dict[str, type[Section]] = {
    "text": TextCalibration,
    "tokens": TokensCalibration,
    "self": SelfCalibration,
    "mix": MixCalibration,
}


class SparsitySection(Section):
    """The sparsity budget (:class:`cfsp.config.budget.Budget`)."""

    ratio: float = Field(gt=0, lt=1, allow_inf_nan=False, description="the fraction to remove, e.g. sparsity.ratio=0.5")
    scope: Literal["ffn", "decoder", "model"] = "ffn"
    round_to: PositiveInt = Field(default=32, description="kept widths are multiples of it; 1 for no rounding")
    rounding: Literal["exact", "nearest"] = "exact"
    min_width: PositiveInt | None = Field(default=None, description="the smallest width of a block; null: round_to")
    protect: Annotated[Protect, PlainValidator(_protect)] = "none"


class SaveSection(Section):
    """Saving of the pruned model: whether, and in which format and dtype."""

    model: Annotated[bool, Decides("nothing")] = True
    #: An export is derived from the saved model and changes no figure of the run.
    format: Annotated[Literal["hf", "padded", "gguf", "decilm"], Decides("nothing")] = "hf"
    dtype: SavedDType | None = None


class PluginsSection(Section):
    """Code outside cfsp that may run."""

    #: Names of packages; ``tasks`` stands for the task files of evaluation.*.include_path.
    allow: list[str] = Field(default=[], description="e.g. plugins.allow=[my_package]")


class PathsSection(Section):
    """Folders that a run writes."""

    output_dir: Folder
    records_dir: Folder
    cache_dir: Folder
