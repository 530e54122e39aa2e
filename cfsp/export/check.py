"""What can be refused before a run starts: a base model that the asked format cannot hold, pruned or not."""

from __future__ import annotations

from cfsp.errors import ConfigError
from cfsp.models.source import ModelSource


def check_exportable(source: ModelSource, form: str, compensation: str) -> None:
    """
    Raises:
        CfspError: names save.format and why.
    """
    if form == "hf":
        return
    from cfsp.export import decilm, padded
    from cfsp.export.folder import read_source

    folder = read_source(source)
    if form == "decilm":
        decilm.check(folder)
        if compensation == "bias":
            raise ConfigError(
                "save.format=decilm: pruner.compensation=bias adds biases, for which DeciLM has no place; use "
                "save.format=hf, or pruner.compensation=none"
            )
    elif form == "padded":
        padded.check(folder)
    else:
        from cfsp.export import gguf

        gguf.check(folder, "auto")
