"""Every command line in README.md, CONTRIBUTING.md and docs/ is composed, or read by the parser of its command."""

from __future__ import annotations

import re
import tomllib

import pytest
from omegaconf import DictConfig, OmegaConf

from cfsp.cli import benchmark
from cfsp.cli.export import read_request as export_request
from cfsp.cli.inspect import read_request as inspect_request
from cfsp.cli.verify import read_request as verify_request
from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.sweep.experiment import experiment_names
from cfsp.sweep.request import read_request as sweep_request
from tests.conftest import ROOT
from tests.helpers.documents import FENCES, PAGES, TEXT, code_spans, command_lines, words_of

#: Commands of other projects, whose words are not ours to check.
_OF_OTHERS = {"vllm", "llama-server", "llama-quantize", "lm_eval", "jupyter", "source", "export", "git", "ruff", "mypy"}
#: Keys of tables and reports that are none of a sweep.
_OF_TABLES = ("results=", "report=", "logger=")
_GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
#: Options that a page defines itself, in a YAML fence: (group, option).
_DEFINED_HERE = {
    tuple(fence.file.removesuffix(".yaml").split("/")[-2:])
    for fence in FENCES
    if fence.file and fence.file.startswith("conf/")
} | {("importance", "peak")}


@pytest.fixture
def demo_folder(tmp_path, monkeypatch):
    """A working folder with what `make demo` leaves and the commands of the pages name."""
    (tmp_path / "outputs" / "demo" / "model").mkdir(parents=True)
    (tmp_path / "outputs" / "demo" / "model" / "config.json").write_text("{}")
    (tmp_path / "outputs" / "demo" / "model.gguf").write_text("")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("demo_folder")
@pytest.mark.parametrize(("page", "line"), command_lines())
def test_a_command_line_is_understood(page, line):
    words = words_of(line)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    check(words)


def check(words: list[str]) -> None:
    program, rest = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program in ("accelerate", "torchrun") or words[:3] == ["python", "-m", "cfsp.run"]:
        check_cfsp(words[words.index("cfsp.run") + 1 :])
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"cfsp\[(\w+)\]", " ".join(rest))) <= set(extras)
    elif program == "python":
        check_script(*rest)
    elif program == "pytest" or words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests"))
    elif program == "cfsp":
        check_cfsp(rest)
    else:
        assert program in _OF_OTHERS, program


def check_script(*words: str) -> None:
    if words[:2] == ("-m", "pytest"):
        check(["pytest", *words[2:]])
        return
    if words[0] == "-m":  # a module that is a script of its own
        words = (f"{words[1].replace('.', '/')}.py", *words[2:])
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            assert word.lstrip("-").replace("-", "_") in source.replace("-", "_"), word
        elif "=" in word:
            assert re.search(rf"\b{word.partition('=')[0]}=", source.split('"""')[1]), word


def check_cfsp(words: list[str]) -> None:
    command, rest = (words[0], words[1:]) if words else ("", [])
    if {"--help", "--version", "--cfg"} & set(words):
        return
    if "--config-dir" in words or "plugins.allow=[mine]" in words:
        return  # run by test_examples.py and test_extending.py
    if command in ("sweep", "tables", "report"):
        assert sweep_request([word for word in rest if not word.startswith(_OF_TABLES)]).cells
    elif command in ("export", "verify", "inspect"):
        {"export": export_request, "verify": verify_request, "inspect": inspect_request}[command](rest)
    elif command == "benchmark":
        assert benchmark.read_request(rest)
    else:
        multirun = "-m" in words
        values = [word for word in words if word not in ("-m", "prune")]
        parse(compose([re.sub(r"=([^\[,]+),.*", r"=\1", word) if multirun else word for word in values]))


def test_the_commands_of_the_makefile_are_understood():
    lines = re.findall(r"^\t.*\$\(BIN\)/(cfsp .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        check(words_of(line.replace("$(DEMO)", "outputs/demo")))


def test_every_option_that_the_pages_name_exists():
    for group, options in re.findall(r"`?(?<![\w./])(\w+)=([\w.]+(?:\|[\w.]+)*)", TEXT):
        if group in _GROUPS:
            for option in options.split("|"):
                known = (ROOT / "conf" / group / f"{option}.yaml").is_file() or (group, option) in _DEFINED_HERE
                assert known or option.isupper() or not option.strip("."), f"{group}={option}"


def test_every_experiment_that_the_pages_name_exists():
    assert set(re.findall(r"experiment=([a-z]\w*)", TEXT)) <= set(experiment_names())


def _keys(values, prefix: str) -> set[str]:
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values)
    if not isinstance(values, dict):
        return {prefix}
    return {prefix}.union(*(_keys(value, f"{prefix}.{key}") for key, value in values.items())) if values else {prefix}


def known_keys() -> set[str]:
    """Every key of every option of every group."""
    keys: set[str] = set()
    root = compose([])
    for name in root:
        keys |= _keys(root[name], str(name))
    for group in _GROUPS:
        for path in (ROOT / "conf" / group).rglob("*.yaml"):
            values = OmegaConf.to_container(OmegaConf.load(path))
            prefix = ""
            if "@package _global_" not in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT / "conf").parent.parts
                prefix = "recovery" if parts[-1] == "recipe" else ".".join(parts)
            for key, value in values.items():
                keys |= _keys(value, f"{prefix}.{key}" if prefix else str(key))
    return keys | _keys(compose(["calibration=mix"]).calibration, "calibration")  # its sources are other options


def test_every_key_that_the_pages_name_exists():
    keys = known_keys()
    roots = {*_GROUPS, "paths", "save", "plugins"} - {"text"}
    missing = set()
    for page in PAGES:
        for span in code_spans(page):
            named = re.match(r"([a-z_]+(?:\.[a-zA-Z_]+)+)(?:=|$)", span)
            if (
                named
                and named.group(1).split(".")[0] in roots
                and not span.endswith((".py", ".yaml", ".md", ".json", ".png"))
            ):
                key = named.group(1).replace(".NAME.", ".text.")
                if key not in keys:
                    missing.add((page, key))
    assert not missing
