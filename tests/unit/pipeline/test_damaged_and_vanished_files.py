"""Damaged, foreign and vanished files: plans, model folders, caches, full disks, killed processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cfsp
from cfsp.errors import CheckpointError, ConfigError, RunError
from cfsp.plan.history import plan_digest
from cfsp.record.out_folder import OutFolder, OutputGoneError, check_apart, log_file
from cfsp.record.run_record import RunRecord
from cfsp.system import atomic, leftovers
from cfsp.system import background_hash as digests
from cfsp.system.cache import read_or_compute
from cfsp.system.storage import storage_problem
from tests.conftest import ROOT, mentions

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(run_cfsp, sound_words, tmp_path, *more: str) -> Path:
    """Run the tiny model's command and return OUT."""
    code, _, err = run_cfsp(*sound_words, "save.model=true", *more)
    assert code == 0, err
    return tmp_path / "out"


def edited(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def vouch(folder: Path) -> None:
    """Make the marker say that the folder's plan.json is its own, as a tampered folder would."""
    edited(
        folder / "cfsp_checkpoint.json",
        lambda marker: marker.update(plan_sha256=plan_digest((folder / "plan.json").read_bytes())),
    )


# Plans


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory) -> Path:
    from tests.helpers.tiny import tiny_model, tokens

    plan = cfsp.prune(tiny_model(blocks=2, width=16), tokens(2, 8), ratio=0.5, round_to=4)
    return plan.save(tmp_path_factory.mktemp("plan") / "plan.json")


def _set(*path, value):
    def change(plan):
        for key in path[:-1]:
            plan = plan[key]
        plan[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("blocks", 0, "ffn_kept", value=[0, 10**30]), "blocks[0].ffn_kept must hold whole numbers"),
        (_set("blocks", 0, "ffn_kept", value=[0, 16]), "blocks[0].ffn_kept names 16, the base model has 16"),
        (_set("blocks", 0, "ffn_kept", value=[0.0, 1.0]), "blocks[0].ffn_kept must hold whole numbers"),
        (_set("blocks", 0, "ffn_kept", value=[False, True]), "blocks[0].ffn_kept must hold whole numbers"),
        (_set("blocks", 0, "ffn_kept", value=[3, 1]), "blocks[0].ffn_kept must be sorted"),
        (_set("blocks", 0, "ffn_kept", value=[]), "blocks[0].ffn_kept must be a non-empty list"),
        (_set("blocks", 0, "ffn_kept", value="all"), "blocks[0].ffn_kept must be a non-empty list"),
        (_set("blocks", 0, "attention", value="gone"), "blocks[0].attention must be true or false"),
        (_set("blocks", 0, "ffn", value=1), "blocks[0].ffn must be true or false"),
        (_set("blocks", 0, "head", value=1), "blocks[0].head is no entry"),
        (_set("blocks", 1, value=7), "blocks[1] must be an object"),
        (_set("blocks", value=[]), "blocks is empty"),
        (_set("parameters", value=None), "parameters must be an object"),
        (_set("parameters", "before", value="many"), "parameters.before must be a whole number"),
        (_set("achieved", "ratio", value=None), "achieved.ratio must be a number"),
        (_set("method", value={"steps": ["buy milk"], "name": "x"}), "method.steps[0] has no name"),
        (_set("notes", value=[]), "notes must be an object"),
        (_set("details", value=[{}] * 3), "details has 3 entries for 2 blocks"),
        (_set("milk", value=1), "'milk' is no entry of a plan"),
        (_set("schema", value=True), "schema True"),
    ],
)
def test_every_value_of_a_plan_is_checked(plan_file, tmp_path, change, named) -> None:
    file = Path(shutil.copy(plan_file, tmp_path))
    edited(file, change)
    with pytest.raises(CheckpointError) as caught:
        cfsp.PruningPlan.load(file)
    assert named in str(caught.value)
    assert str(file) in str(caught.value)


def test_nesting_of_any_depth_is_refused(plan_file, tmp_path) -> None:
    text = plan_file.read_text()
    for depth in (150, 100_000):
        (tmp_path / "plan.json").write_text(
            text.replace('"notes": {}', f'"notes": {{"a": {"[" * depth}{"]" * depth}}}')
        )
        with pytest.raises(CheckpointError, match="nested"):
            cfsp.PruningPlan.load(tmp_path / "plan.json")


def test_a_plan_beyond_the_model_is_refused_by_apply(plan_file) -> None:
    from tests.helpers.tiny import tiny_model

    with pytest.raises(CheckpointError, match=r"block 0: the plan keeps neuron \d+, the model has 4"):
        cfsp.apply(tiny_model(blocks=2, width=4), cfsp.PruningPlan.load(plan_file))


# The history of a folder


@pytest.mark.parametrize("content", ['{"steps": ["buy milk"]}', "{", None], ids=["foreign", "cut", "another's"])
def test_an_unconfirmed_plan_is_no_history(
    run_cfsp, sound_words, model_folder, plan_file, tmp_path, caplog, content
) -> None:
    (model_folder / "plan.json").write_text(content or plan_file.read_text())
    out = pruned(run_cfsp, sound_words, tmp_path)
    assert [r.getMessage() for r in caplog.records if "plan.json: ignored" in r.getMessage()]
    written = json.loads((out / "model" / "plan.json").read_text())
    assert written["method"]["name"] == "cfsp"
    assert (
        written["parameters"]["before"] == json.loads((out / "record.json").read_text())["plan"]["parameters"]["before"]
    )


def test_the_history_of_a_folder_is_checked_before_anything_runs(
    run_cfsp, sound_words, refused, model_folder, plan_file, tmp_path
) -> None:
    out = pruned(run_cfsp, sound_words, tmp_path)
    folder = tmp_path / "first"
    shutil.copytree(out / "model", folder)
    words = [*sound_words, f"model.path={folder}", "sparsity.ratio=0.3", f"paths.output_dir={tmp_path / 'second'}"]
    whole = (folder / "plan.json").read_text()
    marker = (folder / "cfsp_checkpoint.json").read_text()

    def problem() -> str:
        code, _, err = run_cfsp(*words)
        assert code == 2, err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "second" / "record.json").exists()
        return err

    edited(folder / "plan.json", _set("blocks", 0, "attention", value="gone"))
    assert "not the plan that was saved with these weights" in problem()
    vouch(folder)
    assert "blocks[0].attention" in problem()
    edited(folder / "cfsp_checkpoint.json", lambda values: values.pop("plan_sha256"))  # an earlier version's
    assert "blocks[0].attention" in problem()
    (folder / "plan.json").write_text(plan_file.read_text())
    assert "not the plan of these weights" in problem()
    (folder / "plan.json").write_text(whole)
    code, _, err = run_cfsp(*words, "save.model=true")  # without a hash, but it fits
    assert code == 0, err
    composed = json.loads((tmp_path / "second" / "model" / "plan.json").read_text())
    assert [step["name"] for step in composed["method"]["steps"]] == ["cfsp", "cfsp"]
    (folder / "cfsp_checkpoint.json").write_text("[]")
    words[-1] = f"paths.output_dir={tmp_path / 'third'}"
    code, _, err = run_cfsp(*words)
    mentions(err.splitlines(), "cfsp_checkpoint.json", "not a marker")
    (folder / "cfsp_checkpoint.json").write_text(marker)
    edited(folder / "plan.json", _set("base_model", value="another"))
    for command in (["inspect"], ["export", "format=padded", f"to={tmp_path / 'padded'}"]):
        code, _, err = run_cfsp(command[0], f"path={folder}", *command[1:], defaults=False)
        assert code == 2
        mentions(err.splitlines(), "plan.json", "not the plan that was saved")
    assert not (tmp_path / "padded").exists()


# OUT and the model


def test_out_is_apart_from_the_model(tmp_path) -> None:
    model, out = tmp_path / "m", tmp_path / "o"
    model.mkdir()
    (out / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for place in (model, model / "a" / "b", tmp_path / "link", tmp_path / "link" / "x"):
        with pytest.raises(ConfigError, match=r"paths\.output_dir="):
            check_apart(place, model)
    for inner in (out / "model", out / "model" / "x", out / "adapter", out / "model-padded"):
        with pytest.raises(ConfigError, match="would replace"):
            check_apart(out, inner)
    (out / "pruned").symlink_to(model)
    with pytest.raises(ConfigError, match="would replace pruned"):
        check_apart(out, model)
    check_apart(tmp_path, model)
    check_apart(tmp_path / "m2", model)


def test_nothing_is_written_into_the_model(refused, sound_words, model_folder) -> None:
    before = sorted(model_folder.rglob("*"))
    for place in (model_folder, model_folder / "deep" / "out"):
        mentions(refused(*sound_words, f"paths.output_dir={place}"), "paths.output_dir", "model folder")
        assert sorted(model_folder.rglob("*")) == before


def test_links_in_out_are_not_followed(run_cfsp, sound_words, tmp_path) -> None:
    out, target = tmp_path / "out", tmp_path / "target.txt"
    out.mkdir()
    target.write_text("mine")
    for name in ("config.yaml", "run.log", "blocks.png", "record.json.x"):
        (out / name).symlink_to(target)
    pruned(run_cfsp, sound_words, tmp_path)
    assert target.read_text() == "mine"
    assert "paths" in (out / "config.yaml").read_text()
    assert "calibrate" in (out / "run.log").read_text()
    (out / "model").rename(tmp_path / "elsewhere")
    (out / "model").symlink_to(tmp_path / "elsewhere")
    code, _, err = run_cfsp(*sound_words, "save.model=true", "force=true")
    assert code == 2
    mentions(err.splitlines()[-1:], "model: is a symbolic link")
    assert (tmp_path / "elsewhere" / "config.json").is_file()


# Finished means whole


def test_a_damaged_folder_is_not_finished(run_cfsp, sound_words, tmp_path, caplog) -> None:
    out = pruned(run_cfsp, sound_words, tmp_path)
    files = RunRecord.read(out / "record.json").files
    weights = out / "model" / "model.safetensors"
    whole = weights.read_bytes()
    assert files["model/model.safetensors"] == {"bytes": len(whole), "sha256": digests.sha256_of(weights)}
    assert {"plan.json", "model/config.json", "model/tokenizer.json", "model/plan.json"} <= files.keys()

    def again(*more: str) -> list[str]:
        caplog.clear()
        code, _, err = run_cfsp(*sound_words, "save.model=true", *more)
        assert code == 0, err
        assert weights.read_bytes() == whole or (not more and "XX" in repr(weights.read_bytes()[-2:]))
        return [r.getMessage() for r in caplog.records if "not finished" in r.getMessage()]

    assert again() == []
    weights.write_bytes(whole[:1000])
    assert "1,000 bytes" in again()[0]
    (out / "plan.json").unlink()
    assert "plan.json is missing" in again()[0]
    (out / "model" / "cfsp_checkpoint.json").unlink()
    assert "cfsp_checkpoint.json has" in again()[0]
    (out / "model" / "README.md").write_text("my own card")
    assert again() == []
    weights.write_bytes(whole[:-2] + b"XX")
    assert again() == []  # sizes alone
    assert "sha256 differs" in again("force=check")[0]
    assert weights.read_bytes() == whole
    assert again("force=check") == []


def test_old_records_are_checked_by_the_existing_files(run_cfsp, sound_words, tmp_path, caplog) -> None:
    out = pruned(run_cfsp, sound_words, tmp_path)
    edited(out / "record.json", lambda record: record.pop("files"))
    assert run_cfsp(*sound_words, "save.model=true")[0] == 0
    assert not [r for r in caplog.records if "not finished" in r.getMessage()]
    os.truncate(out / "model" / "model.safetensors", 1000)
    assert run_cfsp(*sound_words, "save.model=true")[0] == 0
    assert [r for r in caplog.records if "not finished" in r.getMessage() and "truncated" in r.getMessage()]


def test_a_damaged_export_alone_is_made_again(run_cfsp, sound_words, tmp_path, caplog) -> None:
    out = pruned(run_cfsp, sound_words, tmp_path, "save.format=padded")
    weights = out / "model-padded" / "model.safetensors"
    whole = weights.read_bytes()
    os.truncate(weights, 100)
    caplog.clear()
    assert run_cfsp(*sound_words, "save.model=true", "save.format=padded")[0] == 0
    assert weights.read_bytes() == whole
    assert not [r for r in caplog.records if r.getMessage().startswith("calibrate")]


def test_verify_compares_hashes(run_cfsp, sound_words, tmp_path) -> None:
    from cfsp.cli.verify import find_damage

    out = pruned(run_cfsp, sound_words, tmp_path)
    assert find_damage(out / "model") is None
    weights = out / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert find_damage(out / "model") == "model/model.safetensors has another content than was written (sha256 differs)"
    assert find_damage(Path(shutil.copytree(out / "model", tmp_path / "copy"))) is None


def test_out_that_is_deleted_in_mid_run_is_no_success(run_cfsp, sound_words, tmp_path, monkeypatch) -> None:
    from cfsp.pipeline import stages

    real = stages.apply

    def deleting(*args):
        shutil.rmtree(tmp_path / "out")
        return real(*args)

    monkeypatch.setattr(stages, "apply", deleting)
    code, _, err = run_cfsp(*sound_words, "save.model=true")
    assert code == 1
    mentions([line for line in err.splitlines() if line.startswith("cfsp: ")], "paths.output_dir", "removed")
    record = RunRecord.read(tmp_path / "out" / "record.json")
    assert record is None or record.status == "failed"
    monkeypatch.setattr(stages, "apply", real)
    pruned(run_cfsp, sound_words, tmp_path)


def test_a_folder_that_came_in_the_place_of_out_is_not_out(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    folder = OutFolder(out)
    folder.check()
    with pytest.raises(OutputGoneError, match=r"plan\.json was removed"):
        folder.check(["plan.json"])
    shutil.rmtree(out)
    out.mkdir()
    with pytest.raises(OutputGoneError, match="the folder was removed"):
        folder.check()


# An evaluation that fails


class _Failing:
    side_by_side = False

    def __init__(self, calls: int) -> None:
        self.left = calls

    def check(self, tokenizer, limits):
        return {}

    def measure(self, model, tokenizer):
        self.left -= 1
        if self.left < 0:
            raise TypeError("no item")
        return []


@pytest.mark.parametrize("calls", [0, 1], ids=["dense", "pruned"])
def test_a_failed_evaluation_loses_no_model(run_cfsp, sound_words, prose_file, tmp_path, monkeypatch, calls) -> None:
    from cfsp.evaluation.perplexity import Perplexity

    failing = _Failing(calls)
    monkeypatch.setattr(Perplexity, "measure", lambda self, model, tokenizer: failing.measure(model, tokenizer))
    given = [
        "evaluation=perplexity", "evaluation.perplexity.datasets=[bundled]", "evaluation.perplexity.seq_len=16",
        "evaluation.perplexity.windows=[0,2]",
    ]  # fmt: skip
    code, _, err = run_cfsp(*sound_words, "save.model=true", *given)
    out = tmp_path / "out"
    assert code == 1, err
    mentions(
        [line for line in err.splitlines() if line.startswith("cfsp: ")], "TypeError: no item",
        f"the pruned model is kept in {out / 'model'}",
    )  # fmt: skip
    record = RunRecord.read(out / "record.json")
    assert record.status == "failed"
    assert record.error["type"] == "TypeError"
    assert record.checkpoint["place"] == "model"
    model, _ = cfsp.load(out / "model")
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    monkeypatch.undo()
    code, _, err = run_cfsp(*sound_words, "save.model=true", *given)
    assert code == 0, err
    stages = {stage["name"]: stage["cached"] for stage in RunRecord.read(out / "record.json").stages}
    assert stages["calibrate"]
    assert stages["plan"]


# Writing and full disks


def test_a_file_is_written_whole_or_not_at_all(tmp_path) -> None:
    from safetensors.torch import save_file

    place = tmp_path / "new" / "x.safetensors"
    before = os.umask(0o022)
    try:
        with atomic.replacing(place) as partial:
            save_file({"a": torch.zeros(2)}, partial)
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.stat().st_mode) == 0o644
    content = place.read_bytes()

    def full() -> None:
        with atomic.replacing(place) as partial:
            partial.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        full()
    assert caught.value.filename == str(place)
    assert place.read_bytes() == content
    assert os.listdir(place.parent) == [place.name]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x", "{cache}/progress/x"), "paths.cache_dir={cache}: the disk is full"),
        (OSError(errno.EDQUOT, "x", "{out}/record.json"), "paths.output_dir={out}: the disk quota is used up"),
        (OSError(errno.EROFS, "x", "{records}/r.json"), "paths.records_dir={records}: the file system is read-only"),
        (OSError(errno.EACCES, "x", "{records}/r.json"), "paths.records_dir={records}: permission"),
        (OSError(errno.EIO, "x", "{out}/model/a"), "paths.output_dir={out}: the disk reports"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 164288 vs 164180"),
            "the disk is full",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EISDIR, "x", "{cache}/a"), "paths.cache_dir={cache}: a folder lies where a file is written"),
        (OSError(errno.ENOTDIR, "x", "{records}/a"), "paths.records_dir={records}: a file lies where a folder is"),
        (OSError(errno.EISDIR, "x", "/somewhere/else"), None),
        (OSError(errno.EACCES, "x", "/somewhere/else"), None),
        (OSError(errno.ENOENT, "x", "{out}/a"), None),
        (ValueError("no"), None),
    ],
)
def test_a_full_disk_is_named_with_its_key(tmp_path, error, said) -> None:
    places = {f"paths.{key}": tmp_path / name for key, name in
              (("output_dir", "out"), ("cache_dir", "out/cache"), ("records_dir", "records"))}  # fmt: skip
    named = {"out": tmp_path / "out", "cache": tmp_path / "out" / "cache", "records": tmp_path / "records"}
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(**named)
    try:
        try:
            raise error
        except Exception as cause:
            raise CheckpointError("it cannot be saved") from cause
    except CheckpointError as outer:
        found = storage_problem(outer, places)
    if said is None:
        assert found is None
        return
    assert said.format(**named) in found
    assert "\n" not in found


def test_torch_and_safetensors_on_a_full_disk_are_os_errors(tmp_path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic.naming(tmp_path / "x"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")
    assert caught.value.filename == str(tmp_path / "x")
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left"), atomic.naming(tmp_path / "x"):
            torch.save({"a": torch.zeros(100_000)}, "/dev/full")


@pytest.mark.parametrize("key", ["output_dir", "cache_dir", "records_dir"])
def test_a_run_on_a_full_disk_is_one_line(run_cfsp, sound_words, tmp_path, monkeypatch, key) -> None:
    place = tmp_path / {"output_dir": "out", "cache_dir": "cache", "records_dir": "records"}[key]
    real = atomic.os.replace

    def full(source, target, *args):
        if Path(target).is_relative_to(place) and Path(target).suffix in (".json", ".safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target, *args)

    monkeypatch.setattr(atomic.os, "replace", full)
    code, _, err = run_cfsp(*sound_words)
    assert code == 1
    mentions(
        [line for line in err.splitlines() if line.startswith("cfsp: ")], f"paths.{key}={place}", "the disk is full",
        "bytes free",
    )  # fmt: skip
    assert not [path for path in tmp_path.rglob(".*.json.*") if path.is_file()]


# What killed processes leave


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_next_run_removes_leftovers_of_a_killed_run(run_cfsp, sound_words, tmp_path) -> None:
    out = pruned(run_cfsp, sound_words, tmp_path)
    run_id, dead = RunRecord.read(out / "record.json").run_id, dead_process()
    for folder in (".model.62f7da1b", ".pruned.62f7da1c", ".model-padded.62f7da1d", ".model.62f7da1e.old"):
        shutil.copytree(out / "model", out / folder)
    for name in (f".record.json.{dead}", f".plan.json.{dead}", f".write-test-{dead}", ".model.gguf.62f7da1b"):
        (out / name).write_text("half")
    (out / "model" / f".README.md.{dead}").write_text("half")
    (tmp_path / "records" / f".{run_id}.json.{dead}").write_text("half")
    (out / ".mine.62f7da1b").mkdir()
    alive = out / ".model.00000000"
    alive.mkdir()
    (out / f".record.json.{os.getppid()}").write_text("being written")
    with leftovers.hold_lock(alive):
        assert run_cfsp(*sound_words, "save.model=true")[0] == 0
    hidden = sorted(path.name for path in tmp_path.rglob(".*"))
    assert hidden == sorted([".mine.62f7da1b", ".model.00000000", f".record.json.{os.getppid()}"])


def test_a_folder_that_was_being_replaced_gets_its_name_back(tmp_path) -> None:
    (tmp_path / ".model.62f7da1b.old").mkdir()
    (tmp_path / ".model.62f7da1b.old" / "a").touch()
    leftovers.remove_scratch(tmp_path, ["model"])
    assert (tmp_path / "model" / "a").is_file()


# The cache


def test_a_damaged_cache_entry_is_computed_again(tmp_path, caplog) -> None:
    path = tmp_path / "dense" / "x.json"

    def value(number: int):
        return read_or_compute(
            path, lambda file: json.loads(file.read_text()), lambda: [number],
            lambda content, file: file.write_text(json.dumps(content)),
        )  # fmt: skip

    assert value(1) == ([1], False)
    assert value(2) == ([1], True)
    path.write_text("[3]")  # whole JSON, and not what was written
    assert value(4) == ([4], False)
    assert "computing it again" in caplog.text
    path.write_text("[" * 100_000)
    assert value(5) == ([5], False)
    path.with_suffix(".sha256").unlink()  # of an earlier version
    assert value(6) == ([5], True)


def test_a_cache_deleted_during_a_computation_does_no_harm(tmp_path) -> None:
    path = tmp_path / "cache" / "plan" / "x.json"

    def compute():
        shutil.rmtree(tmp_path / "cache")
        return [1]

    assert read_or_compute(path, lambda file: None, compute, lambda v, file: file.write_text("[1]")) == ([1], False)
    assert path.read_text() == "[1]"


@pytest.mark.parametrize(
    "content", ["{}", "[1]", '[{"suite": "a", "task": "b", "metric": "c", "value": null}]', "[" * 9999]
)
def test_damaged_figures_are_no_figures(tmp_path, content) -> None:
    from cfsp.pipeline.measure import _read_figures

    (tmp_path / "x.json").write_text(content)
    with pytest.raises((ValueError, CheckpointError)):
        _read_figures(tmp_path / "x.json")


def test_a_plan_of_another_model_in_the_progress_of_a_run_is_made_again(
    run_cfsp, sound_words, plan_file, tmp_path, monkeypatch
) -> None:
    from cfsp.pipeline import stages

    real = stages.apply
    monkeypatch.setattr(stages, "apply", lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
    assert run_cfsp(*sound_words)[0] == 1
    monkeypatch.setattr(stages, "apply", real)
    (plan,) = (tmp_path / "cache" / "progress").glob("*/plan.json")
    whole = json.loads(plan.read_text())
    plan.write_text(plan_file.read_text())
    plan.with_suffix(".sha256").unlink()
    code, _, err = run_cfsp(*sound_words)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == whole


# Ctrl-C


def test_an_interrupt_during_imports_is_one_line() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cfsp.run", "evaluation=none"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/cmdline")
    assert maps.exists()
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == b"cfsp: interrupted\n"
    assert process.returncode == 1


def test_a_lack_of_address_space_for_libraries_is_reported_in_one_line() -> None:
    from cfsp.cli.library_errors import library_memory_problem

    error = RuntimeError("Failed to import transformers")
    error.__cause__ = ImportError("libparquet.so.2600: failed to map segment from shared object")
    assert "ulimit -v" in str(library_memory_problem(error))
    assert library_memory_problem(ImportError("No module named x")) is None


def test_a_log_line_that_does_not_fit_on_the_disk_is_dropped(tmp_path, capsys) -> None:
    import logging

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with log_file(tmp_path / "run.log"):
        handler = logging.getLogger().handlers[-1]
        with open("/dev/full", "w", buffering=1) as full:
            handler.stream = full
            logging.getLogger("cfsp").warning("x")
            handler.stream = None
            with pytest.raises(OSError, match="No space"):
                full.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert "Logging error" not in capsys.readouterr().err


def test_run_errors_are_failures() -> None:
    assert RunError("x").exit_code == 1
    assert OutputGoneError("x").exit_code == 1


def test_a_plan_that_was_exchanged_together_with_its_marker_is_no_history(run_cfsp, sound_words, tmp_path) -> None:
    folders = []
    for number, seed in enumerate((0, 1)):
        out = pruned(run_cfsp, [*sound_words, "importance=random", f"seed={seed}"], tmp_path)
        folders.append(tmp_path / f"model{number}")
        shutil.copytree(out / "model", folders[-1])
        shutil.rmtree(out)
    for name in ("plan.json", "cfsp_checkpoint.json"):  # of a run of equal widths, but other neurons
        shutil.copy(folders[1] / name, folders[0] / name)
    words = [*sound_words, f"model.path={folders[0]}", "sparsity.ratio=0.3", f"paths.output_dir={tmp_path / 'second'}"]
    code, _, err = run_cfsp(*words)
    assert code == 2, err
    mentions(err.splitlines(), "plan.json", "not the plan of these weights", "model.safetensors")
    assert not (tmp_path / "second" / "record.json").exists()


@pytest.mark.parametrize("key", ["cache_dir", "records_dir"])
def test_folders_of_the_run_in_the_model_folder_are_refused_before_anything_is_written(
    run_cfsp, sound_words, model_folder, key
) -> None:
    before = sorted(path.name for path in model_folder.iterdir())
    code, _, err = run_cfsp(*sound_words, f"paths.{key}={model_folder / 'sub'}")
    assert code == 2, err
    mentions(err.splitlines(), f"paths.{key}=", "model folder")
    assert sorted(path.name for path in model_folder.iterdir()) == before
