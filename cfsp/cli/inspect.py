"""``cfsp inspect model=NAME`` or ``path=DIR``: print the structure of a model and how much each pruner could remove."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.config.overrides import plain_values
from cfsp.errors import CfspError, ConfigError
from cfsp.system.command import command

if TYPE_CHECKING:
    from cfsp.inspection.report import Report

USAGE = """\
Print what is recognised in a model: its blocks, their FFN and attention, parameters of each part, and what each pruner
could remove at most. The model is built without memory for its weights, in seconds, whatever its size; what a run tries
on the weights themselves (that a unit which is removed is one which is zero) is not tried here.

  cfsp inspect model=NAME              a model of conf/model, by the numbers in NAME.yaml; where the hub answers, by its
                                       config.json, and where the two differ
  cfsp inspect path=DIR                a model folder (config.json is enough), or the OUT of a run that saved one
  cfsp inspect path=FILE.gguf          a GGUF file, by its header
  cfsp inspect path=ORGANISATION/NAME  a model of the hub, by its config.json, or by the header of its GGUF file

  gguf_file=FILE.gguf      the file, where the folder or the repository has several
  json=true                print it for programs
  trust_remote_code=true   run the Python code that the model brings
  config_dir=FOLDER        pruners of FOLDER/pruner too, as a run finds them with --config-dir FOLDER
  plugins.allow=[PACKAGE]  packages outside cfsp whose classes these pruners may name

Exit codes: 0 printed, 1 failed on the way, 2 wrong input, or a model that is none to prune.
"""

_KEYS = ("model", "path", "gguf_file", "json", "trust_remote_code", "config_dir", "plugins.allow")


@dataclass(frozen=True)
class Request:
    """A checked command line.

    Attributes:
        model: name of a model of conf/model; None if ``path`` is given.
        path: a model folder, OUT of a run, or a model of the hub; None if ``model`` is given.
        gguf_file: name of the GGUF file in ``path``; None if there is at most one.
        json: print the report as JSON.
        trust_remote_code: run the Python code that the model brings.
        config_dir: folder with further pruners.
        allow: packages outside cfsp whose classes these pruners may name.
    """

    model: str | None = None
    path: str | None = None
    gguf_file: str | None = None
    json: bool = False
    trust_remote_code: bool = False
    config_dir: Path | None = None
    allow: tuple[str, ...] = ()


def main(overrides: Sequence[str] | None = None) -> int:
    """Inspect a model and return the exit code."""
    return command("cfsp", USAGE, overrides, lambda arguments: _inspect(read_request(arguments)), verb="inspect")


def read_request(overrides: Sequence[str]) -> Request:
    """Check the command line and return the request.

    Raises:
        ConfigError: a key or value is wrong; the message has all problems.
    """
    values, problems = plain_values(overrides, _KEYS, "inspect")
    flags = {}
    for key in ("json", "trust_remote_code"):
        value = values.get(key, "false").lower()
        flags[key] = value == "true"
        if value not in ("true", "false"):
            problems.append(f"{key}={values[key]}: use true or false")
    if "model" in values and "path" in values:
        problems.append(
            f"model={values['model']} path={values['path']}: two models; give one of them, model=NAME or path=DIR"
        )
    elif "model" not in values and "path" not in values and not problems:
        problems.append("neither model nor path is set: give model=NAME or path=DIR; see cfsp inspect --help")
    if "gguf_file" in values and "path" not in values and not problems:
        problems.append(f"gguf_file={values['gguf_file']}: names a file of path=DIR; give both, or leave it out")
    folder = Path(values["config_dir"]) if "config_dir" in values else None
    if folder is not None and not folder.is_dir():
        problems.append(f"config_dir={folder}: there is no such folder; give the folder that has pruner/NAME.yaml")
    if problems:
        raise ConfigError(*problems)
    allow = tuple(name.strip() for name in values.get("plugins.allow", "").strip("[]").split(",") if name.strip())
    model, path, file = (values.get(key) for key in ("model", "path", "gguf_file"))
    return Request(model, path, file, flags["json"], flags["trust_remote_code"], folder, allow)


def inspect_model(request: Request) -> Report:
    """Inspect the model of the request.

    Raises:
        CfspError: the model does not exist, or it cannot be pruned.
    """
    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.inspection.numbers import open_config_source
    from cfsp.inspection.reach import Plugins
    from cfsp.inspection.report import build_report

    trust = request.trust_remote_code
    try:
        context = open_config_source(request.model, request.path, trust_remote_code=trust, gguf_file=request.gguf_file)
        with _silence_transformers(), context as source:
            return build_report(source, trust_remote_code=trust, plugins=Plugins(request.config_dir, request.allow))
    except CfspError as error:
        raise _rename_keys(error) from error


@contextmanager
def _silence_transformers() -> Iterator[None]:
    """Silence transformers inside the context: its advice on using the model does not apply to an inspection."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _rename_keys(error: CfspError) -> CfspError:
    """Return the error with the keys of this command: ``model.path`` of a run becomes ``path``."""
    problems = [re.sub(r"\bmodel\.(path|trust_remote_code|gguf_file)=", r"\1=", problem) for problem in error.problems]
    return type(error)(*problems) if isinstance(error, ConfigError) else type(error)("; ".join(problems))


def _inspect(request: Request) -> int:
    report = inspect_model(request)
    if request.json:
        content: dict[str, Any] = report.as_dict()
        print(json.dumps(content, indent=2))
    else:
        # Start-up time: loads rich.
        from cfsp.inspection.show import show

        show(report)
    return 0
