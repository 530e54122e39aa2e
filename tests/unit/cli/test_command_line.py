"""The command line: words that cannot be applied, exit codes, plug-ins, multiruns, folders, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.errors import ConfigError
from cfsp.logger.base import NullLogger
from cfsp.pruner import context
from cfsp.record.run_record import RunRecord
from tests.conftest import ROOT, mentions

pytestmark = pytest.mark.usefixtures("one_thread")


# Words


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["sparsity.ratoi=0.5"], ["sparsity.ratoi: ", "did you mean sparsity.ratio?"]),
        (["ratio=0.5"], ["ratio: ", "did you mean sparsity.ratio?"]),
        (["evaluation.zero_shot.limt=3"], ["did you mean evaluation.zero_shot.limit?"]),
        (["~seedd"], ["seedd", "did you mean seed?"]),
        (["prunr=cfsp"], ["prunr: ", "did you mean pruner?"]),
        (["pruner=cfps"], ["pruner=cfps: ", "did you mean cfsp?", "wanda_sp"]),
        (["model=llama3_8"], ["model=llama3_8: ", "did you mean llama3_8b?"]),
        (["prnue"], ["prnue: ", "did you mean prune?"]),
        (["exprot"], ["exprot: ", "commands: prune"]),
        (["sparsity.ratio"], ["sparsity.ratio: ", "write key=value"]),
        (
            ["prune", "sparsity.ratoi"],
            ["sparsity.ratoi: ", "did you mean sparsity.ratio?", "write key=value"],
        ),
        (["seed=[1"], ["seed=[1: ", "write key=value"]),
        (["=3"], ["=3: ", "write key=value"]),
        (["sparsity.ratio=0.2,0.3"], ["sparsity.ratio=0.2,0.3: ", "add -m"]),
        (["pruner=cfsp,uniform"], ["pruner=cfsp,uniform: ", "add -m"]),
        (["+new.key=1"], ["new.key=1: ", "unknown key"]),
        (["++new.key=1"], ["new.key=1: ", "unknown key"]),
        (["+sparsity.ratoi=1"], ["sparsity.ratoi=1: ", "unknown key", "did you mean ratio?"]),
        (["+importance.variant=one_a"], ["importance.variant=one_a: ", "unknown key"]),
        (["+pruner=wanda_sp"], ["+pruner=wanda_sp: ", "without the +"]),
        (["importance.variant=one_a"], ["importance.variant: ", "importance=cfsp_released"]),
        (["recovery.max_steps=3"], ["recovery.max_steps: ", "recovery=full or recovery=ig_lora"]),
        (["recovery.data.path=x.txt"], ["recovery.data.path: ", "there is with recovery=full"]),
        (["recovery=lora", "recovery.data.pth=x"], ["did you mean recovery.data.path?"]),
        (["recovery=lora", "recovery/data=dolyl"], ["recovery/data=dolyl: ", "did you mean dolly?"]),
        (["importance.variantt=one_a"], ["did you mean importance.variant with importance=cfsp_released?"]),
        (["allocator.metrc=mae"], ["did you mean allocator.metric?"]),
        (["pruner=uniform", "allocator.metric=mae"], ["allocator.metric: ", "allocator=coarse"]),
        (["--fource"], ["--fource: ", "cfsp --help"]),
        (["--cfg"], ["--cfg", "expected one argument"]),
        (["--config-dir", "nowhere"], ["nowhere", "not found"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] or len(value) < 2 else value[0],
)
def test_a_word_that_cannot_be_applied(refused, given, parts):
    defaults = given[0] not in ("prnue", "exprot", "--cfg")
    mentions(refused(*given, defaults=defaults), *parts)


def test_words_that_cannot_be_applied_come_all_together(refused):
    lines = refused("sparsity.ratoi=0.5", "pruner=cfps", "seed=[1", "sparsity.scope=ffn")
    assert sorted(line.partition(":")[0] for line in lines) == ["pruner=cfps", "seed=[1", "sparsity.ratoi"]


def test_a_configuration_folder_of_the_users_own(refused, tmp_path):
    (tmp_path / "mine" / "importance").mkdir(parents=True)
    (tmp_path / "mine" / "importance" / "own.yaml").write_text("_target_: cfsp.importance.wanda.Wanda\n")
    given = ["--config-dir", str(tmp_path / "mine")]
    mentions(refused(*given, "importance=own", "sparsity.ratio=2"), "sparsity.ratio=2")
    mentions(refused(*given, "importance=own", "sparsity.ratoi=2"), "did you mean sparsity.ratio?")
    mentions(refused(*given, "importance=onw"), "importance=onw", "did you mean own?", "magnitude")


# Plug-ins


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> str:
    """A package of the user's own with a metric in it."""
    (tmp_path / "site" / "my_metrics").mkdir(parents=True)
    (tmp_path / "site" / "my_metrics" / "__init__.py").write_text(
        "from cfsp.config.components import component\n\n\n"
        "@component\nclass LastFirst:\n    reverse: bool = False\n\n"
        "    def score(self, channels, activation):\n"
        "        ranks = activation.rms.new_tensor(range(channels.n))\n"
        "        return -ranks if self.reverse else ranks\n\n\n"
        "def function():\n    pass\n"
    )
    (tmp_path / "site" / "my_metrics" / "broken.py").write_text("this is no Python")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return "my_metrics"


def test_a_class_outside_cfsp_needs_permission(refused, plugin):
    lines = refused(f"importance._target_={plugin}.LastFirst")
    mentions(lines, f"importance._target_={plugin}.LastFirst", f"plugins.allow=[{plugin}]")


def test_a_class_outside_cfsp_runs_where_it_is_allowed(run_cfsp, sound_words, plugin, tmp_path):
    allowed = [
        f"plugins.allow=[{plugin}]",
        f"importance._target_={plugin}.LastFirst",
        "+importance.reverse=true",
    ]
    code, _, err = run_cfsp(*sound_words, *allowed, "pruner=uniform")
    assert code == 0, err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["blocks"][0]["ffn_kept"] == list(range(32))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            ["importance._target_=cfsp.importance.cfps.Cfsp"],
            ["no such class", "did you mean cfsp.importance.cfsp.Cfsp?"],
        ),
        (
            ["importance._target_=cfsp.importance.cfsp.Cfps"],
            ["no such class", "did you mean cfsp.importance.cfsp.Cfsp?"],
        ),
        (["importance._target_=cfsp"], ["no such class"]),
        (["importance._target_=cfsp.allocator.uniform.Uniform"], ["no class for importance", "score"]),
        (["importance._target_=cfsp.config.components.build"], ["a class is needed"]),
        (["importance._target_=my_metrics.Nothing", "plugins.allow=[my_metrics]"], ["no such class"]),
        (
            ["importance._target_=my_metrics.broken.A", "plugins.allow=[my_metrics]"],
            ["no such class", "SyntaxError"],
        ),
        (["importance._target_=my_metrics.function", "plugins.allow=[my_metrics]"], ["a class is needed"]),
        (
            [
                "importance._target_=my_metrics.LastFirst",
                "plugins.allow=[my_metrics]",
                "+importance.revers=true",
            ],
            ["importance.revers=true", "did you mean reverse?"],
        ),
        (["evaluation.cost._target_=cfsp.recovery.none.NoRecovery"], ["evaluation.cost"]),
        (["importance._target_=null"], ["importance=", "_target_"]),
    ],
    ids=lambda value: value[0].rpartition("=")[2] if "=" in value[0] else "",
)
@pytest.mark.usefixtures("plugin")
def test_a_target_that_cannot_stand_there(given, parts):
    keys = ["evaluation.cost.prompt_tokens", "evaluation.cost.new_tokens", "evaluation.cost.repeats"]
    given = [*given, *(f"~{key}" for key in keys if given[0].startswith("evaluation.cost"))]
    with pytest.raises(ConfigError) as found:
        parse(compose(given))
    mentions(list(found.value.problems), *parts)


# Folders


@pytest.mark.parametrize("key", ["output_dir", "cache_dir", "records_dir"])
@pytest.mark.parametrize("where", ["file", "below a file", "proc"])
def test_a_folder_that_cannot_be_written(refused, sound_words, tmp_path, key, where):
    (tmp_path / "file").touch()
    folder = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x" / "y", "proc": "/proc/x/y"}[where]
    lines = refused(*sound_words, f"paths.{key}={folder}")
    mentions(lines, f"paths.{key}", "cannot be written", "give another folder")
    assert str(folder).startswith(
        lines[0].partition("paths.")[2].removeprefix(key).lstrip("=: ").split()[0].rstrip(":")
    )


def test_an_output_folder_that_holds_another_run(run_cfsp, refused, sound_words, tmp_path):
    assert run_cfsp(*sound_words)[0] == 0
    before = (tmp_path / "out" / "record.json").read_bytes()
    lines = refused(*sound_words, "sparsity.ratio=0.25")
    mentions(lines, f"paths.output_dir={tmp_path}/out", "holds another run", "give another folder")
    assert (tmp_path / "out" / "record.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}', "text"])
def test_an_output_folder_whose_record_is_none(refused, sound_words, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "record.json").write_text(content)
    mentions(refused(*sound_words), "record.json", "not a run record", "another folder")
    assert (tmp_path / "out" / "record.json").read_text() == content


# A run that fails on its way


@pytest.fixture
def finished(monkeypatch) -> list[bool]:
    """What the logger was told at the end of each run."""
    told: list[bool] = []
    monkeypatch.setattr(NullLogger, "finish", lambda self, record, folder: told.append(record.status == "success"))
    return told


def _failing(monkeypatch, error: BaseException) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(context, "calibrate", fail)


def test_a_logger_that_breaks_at_the_end_costs_no_run(run_cfsp, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(NullLogger, "finish", lambda *_: 1 / 0)
    code, _, err = run_cfsp("evaluation=none", "save.model=false", "calibration.n_samples=4")
    assert code == 0, err
    record = RunRecord.read(tmp_path / "out" / "record.json")
    assert record is not None
    assert record.status == "success"
    assert "NullLogger could not be finished (ZeroDivisionError: division by zero); the run is whole" in caplog.text


def _failure_lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("cfsp: ")]


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (RuntimeError("the cat\nsat on it"), 1, ["RuntimeError", "the cat sat on it", "debug=true"]),
        (RuntimeError(), 1, ["RuntimeError", "debug=true"]),
        (OSError(28, "No space left on device", "somewhere"), 1, ["No space left on device", "somewhere"]),
        (torch.OutOfMemoryError("tried to allocate 7 GiB"), 1, ["out of memory", "batch_size", "bfloat16"]),
        (MemoryError(), 1, ["out of memory", "batch_size"]),
        (SystemExit(0), 1, ["the run ended itself", "SystemExit: 0", "debug=true"]),
        (GeneratorExit(), 1, ["the run ended itself", "GeneratorExit"]),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            ["out of memory", "batch_size"],
        ),
    ],
    ids=lambda value: f"{type(value).__name__} {value}".strip() if isinstance(value, BaseException) else "",
)
def test_a_run_that_fails(run_cfsp, sound_words, tmp_path, monkeypatch, finished, error, code, parts):
    _failing(monkeypatch, error)
    found, _, err = run_cfsp(*sound_words)
    assert found == code
    mentions(_failure_lines(err), *parts)
    assert "Traceback" not in err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"]["type"] == type(error).__name__
    assert record["error"]["message"] == str(error)
    assert finished == [False]
    assert not list((tmp_path / "records").glob("*"))


def test_debug_shows_where_and_keeps_the_exit_code(run_cfsp, sound_words, monkeypatch):
    _failing(monkeypatch, RuntimeError("the cat"))
    code, _, err = run_cfsp(*sound_words, "debug=true")
    assert code == 1
    assert "Traceback" in err
    assert "in fail" in err
    mentions(_failure_lines(err), "the cat")
    code, _, err = run_cfsp("sparsity.ratio=2", "debug=true")
    assert code == 2
    assert "Traceback" in err
    mentions(_failure_lines(err), "sparsity.ratio=2")


def test_an_interrupted_run_leaves_a_record(run_cfsp, sound_words, tmp_path, monkeypatch, finished):
    _failing(monkeypatch, KeyboardInterrupt())
    code, _, err = run_cfsp(*sound_words)
    assert code == 1
    mentions(_failure_lines(err), "interrupted")
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (record["status"], record["error"]["type"]) == ("failed", "KeyboardInterrupt")
    assert finished == [False]


def test_a_run_that_failed_is_run_again(run_cfsp, sound_words, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _failing(patch, RuntimeError("once"))
        assert run_cfsp(*sound_words)[0] == 1
    assert run_cfsp(*sound_words)[0] == 0
    assert json.loads((tmp_path / "out" / "record.json").read_text())["status"] == "success"


# Multirun


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["pruner=cfsp,wnada_sp"], ["pruner=wnada_sp: ", "did you mean wanda_sp?"]),
        (["sparsity.ratio=0.2,0.3", "sparsity.scpe=ffn"], ["sparsity.scpe: ", "did you mean sparsity.scope?"]),
    ],
    ids=["option", "key"],
)
def test_a_multirun_of_words_that_cannot_be_applied_starts_nothing(run_cfsp, given, parts):
    code, _, err = run_cfsp("-m", *given)
    assert code == 2
    mentions(err.splitlines(), *parts)


def test_a_multirun_goes_on_after_a_run_that_is_refused(run_cfsp, sound_words, tmp_path):
    code, _, err = run_cfsp("-m", *sound_words, "sparsity.ratio=1.5,0.25,0.5")
    assert code == 2
    lines = _failure_lines(err)
    assert len(lines) == 2
    assert "[sparsity.ratio=1.5] sparsity.ratio=1.5: " in lines[0]
    assert "1 of 3 runs" in lines[1]
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/record.json")]
    assert sorted(record["configuration"]["sparsity"]["ratio"] for record in records) == [0.25, 0.5]
    assert {path.parent.name for path in (tmp_path / "out").glob("*/record.json")} == {r["run_id"] for r in records}
    assert len(list((tmp_path / "records").glob("*.json"))) == 2


def test_a_multirun_goes_on_after_a_run_that_fails(run_cfsp, sound_words, monkeypatch):
    real, calls = context.calibrate, []

    def second_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the cat")
        return real(*args, **kwargs)

    monkeypatch.setattr(context, "calibrate", second_fails)
    code, _, err = run_cfsp("-m", *sound_words, "sparsity.ratio=0.2,0.25,0.5")
    assert (code, len(calls)) == (1, 3)
    assert "the cat" in _failure_lines(err)[0]


# The real thing


def _process(*given: str, folder: Path, module: bool = True) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "cfsp.run"] if module else [str(Path(sys.executable).with_name("cfsp"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*start, *given], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def _both(*given: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``python -m cfsp.run`` and, where it is installed, the console script: they end alike."""
    by_module = _process(*given, folder=folder)
    if Path(sys.executable).with_name("cfsp").is_file():
        by_script = _process(*given, folder=folder, module=False)
        assert (by_script.returncode, by_script.stderr) == (by_module.returncode, by_module.stderr)
        assert by_script.stdout == by_module.stdout
    return by_module


def test_help(tmp_path):
    ended = _both("--help", folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    for part in (
        "Usage",
        "model=local model.path=",
        "sparsity.ratio",
        "paths.output_dir",
        "Exit codes",
        "wanda_sp",
    ):
        assert part in ended.stdout
    # The list of experiments is the longest line.
    assert max(len(line) for line in ended.stdout.splitlines()) <= 240
    assert not list(tmp_path.iterdir())


def test_the_configuration_is_shown(tmp_path):
    ended = _both("--cfg", "job", "paths.output_dir=out", folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "ratio: 0.5" in ended.stdout
    assert "_target_: cfsp.importance.cfsp.Cfsp" in ended.stdout
    assert not list(tmp_path.iterdir())


def test_version(tmp_path):
    assert _process("--version", folder=tmp_path).stdout.startswith("cfsp ")


def test_a_value_error_ends_with_2_and_one_line(tmp_path):
    ended = _both("sparsity.ratio=2", "paths.output_dir=out", folder=tmp_path)
    assert ended.returncode == 2
    mentions(ended.stderr.splitlines(), "sparsity.ratio=2")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_values_are_checked_before_any_heavy_import(tmp_path):
    program = (
        "import sys; from cfsp.cli import main as run; code = run._main(sys.argv); "
        "print(code, sorted({'torch', 'transformers', 'numpy', 'datasets', 'lm_eval'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program, "sparsity.ratio=2", "paths.output_dir=out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout.strip() == "2 []", ended.stderr


def test_a_multirun_with_one_good_run_ends_with_2(tmp_path, sound_words):
    ended = _process("-m", *sound_words, "sparsity.ratio=0.2,1.5", "logger=none", folder=tmp_path)
    assert ended.returncode == 2
    assert "[sparsity.ratio=1.5] sparsity.ratio=1.5: " in _failure_lines(ended.stderr)[0]
    assert "Traceback" not in ended.stderr
    (record,) = tmp_path.glob("outputs/*/*/*/record.json")
    assert json.loads(record.read_text())["run_id"] == record.parent.name


def test_an_error_of_a_run_is_told_from_one_of_hydras_in_another_process_too(monkeypatch):
    import pickle

    from cfsp.cli import main

    def fails(_):
        raise ValueError("the run failed")

    monkeypatch.setattr(main, "_run", fails)
    with pytest.raises(ValueError, match="the run failed") as failed:
        main._run_and_mark_errors({})
    error = pickle.loads(pickle.dumps(failed.value))  # as it travels from a launcher's process
    assert main._translate_error(error, main._Session()) is error
    assert isinstance(main._translate_error(ValueError("of Hydra"), main._Session()), ConfigError)
