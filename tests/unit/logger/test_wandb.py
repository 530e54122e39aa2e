"""The W&B mirror of a record, and of tables."""

from __future__ import annotations

import pytest

from cfsp.cli import tables as command
from cfsp.logger.wandb import WandbLogger
from cfsp.record.run_record import RunRecord
from tests.conftest import ROOT
from tests.helpers.offline_wandb import offline_run


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def _runs(folder):
    return [path for path in (folder / "wandb").glob("offline-run-*") if path.is_dir()]


def test_offline_everything_is_written_at_the_end_from_the_record(tmp_path):
    logger = WandbLogger(group="sweep", tags=("a",))
    logger.start("id-1", tmp_path, {"seed": 0})
    logger.log({"recovery/loss": 9.0})
    assert not (tmp_path / "wandb").exists()
    row = {"suite": "perplexity", "task": "text", "metric": "perplexity", "value": 12.5, "n": 3}
    record = RunRecord(
        "id-1", status="success", configuration={"seed": 0}, measurements={"recovered": [row]}, error=None,
        recovery={"history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], "ranks": [3, None, 5]},
        stages=[{"name": "recover", "seconds": 4.0}],
    )  # fmt: skip
    record.write(tmp_path / "record.json")
    for _ in range(2):  # a repeat replaces
        logger.finish(record, tmp_path)
        (folder,) = _runs(tmp_path)
    found = offline_run(folder)
    assert found["run"] == {"run_id": "id-1", "group": "sweep", "job_type": "run"}
    assert found["config"]["seed"] == 0
    expected = {
        "status": "success", "recovered/perplexity/text/perplexity": 12.5, "seconds/recover": 4.0,
        "recovery/rank/block 0": 3, "recovery/rank/block 2": 5,
    }  # fmt: skip
    assert expected.items() <= found["summary"].items()
    assert [row["recovery/loss"] for row in found["history"] if "recovery/loss" in row] == [2.0, 1.5]
    assert found["artifact"] == {"name": "id-1", "type": "run", "files": {"record.json"}}


def test_disabled_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandbLogger()
    logger.start("id-1", tmp_path, {})
    logger.finish(RunRecord("id-1"), tmp_path)
    logger.files("tables", tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_tables_and_figures_are_an_artifact_in_the_sweeps_group(tmp_path, monkeypatch, capsys):
    for name in ("experiments", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    words = ["experiment=block_metric", "results=made", "logger=wandb"]
    assert command.main(words) == 0
    capsys.readouterr()
    (folder,) = _runs(tmp_path / "outputs" / "tables" / "block_metric" / "bundled")
    found = offline_run(folder)
    assert found["run"] == {
        "run_id": "tables-block_metric-bundled", "group": "block_metric-bundled", "job_type": "tables"
    }  # fmt: skip
    place = "block_metric/bundled"
    assert {f"tables/{place}/main.{form}" for form in ("md", "tex", "csv")} <= found["artifact"]["files"]
    assert {f"figures/{place}/blocks.{form}" for form in ("png", "svg")} <= found["artifact"]["files"]
