"""Fetching from the hub: found again offline, patient with outages, and clear about what is wrong."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from cfsp.config.sections import ModelSection, TextSection
from cfsp.data.text import locate_text
from cfsp.errors import CheckpointError, DataError
from cfsp.system import hub, patient_session
from cfsp.system.patient_session import HubFailedError
from cfsp.weights.source import locate
from tests.conftest import mentions, shared
from tests.helpers import hub as local

MODEL = "local/stories260K"
TEXT = {"repo": "Salesforce/wikitext", "file": "wikitext-2-raw-v1/test-00000-of-00001.parquet", "revision": None}


@pytest.fixture
def models(tmp_path) -> Path:
    """A root of model repositories, for tests to add to."""
    return tmp_path / "served"


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache-of-the-hub"


@pytest.fixture
def server(models, cache, monkeypatch):
    """The local hub with a model in three shards, used by this process; its faults pass in milliseconds."""
    local.in_shards(models)
    monkeypatch.setattr(hub, "_commits", {})
    monkeypatch.setattr(patient_session, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(patient_session, "_LONGEST_OWN_PAUSE", 0.05)
    monkeypatch.setattr(patient_session, "PATIENCE", 1.0)
    monkeypatch.setattr(hub, "_BRIEF_PATIENCE", 0.05)
    patient_session.forget_outage()
    gated = ["org/gated", "org/closed"]
    with local.module("serve").LocalHub(models, shared("hub"), gated=gated, token="hf_right") as running:
        local.use(running.endpoint, cache, monkeypatch)
        yield running
    patient_session.forget_outage()


def offline(server: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process, later, without the hub."""
    server.stop()
    local.use(server.endpoint, cache, monkeypatch, offline=True)
    monkeypatch.setattr(hub, "_commits", {})


def model(path: str = MODEL, **keys: Any) -> Any:
    return locate(ModelSection(name="local", path=path, **keys))


def text(**hub_file: Any) -> Any:
    return locate_text(TextSection(hub={**TEXT, **hub_file}), "calibration")  # type: ignore[arg-type]


def renewed(models: Path) -> str:
    """Move the main branch of the model; returns what its README says now."""
    (models / "models" / MODEL / "README.md").write_text("the second commit\n")
    return "the second commit\n"


# RecordedRun again offline


@pytest.mark.parametrize("revision", [None, "main", "v1", "refs/pr/1", "commit"])
def test_a_model_is_found_again_offline(server, models, cache, monkeypatch, revision):
    for name in ("v1", "refs%2Fpr%2F1"):
        shutil.copytree(models / "models" / MODEL, models / "models" / f"{MODEL}@{name}")
        (models / "models" / f"{MODEL}@{name}" / "README.md").write_text(name)
    if revision == "commit":
        revision = server.tree.revision("models", MODEL, "v1").commit
    online = model(revision=revision)
    offline(server, cache, monkeypatch)
    again = model(revision=revision)
    assert again.fingerprint == online.fingerprint
    assert again.folder == online.folder
    assert len(list(again.folder.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_text_is_found_again_offline(server, cache, monkeypatch, revision):
    online = text(revision=revision)
    offline(server, cache, monkeypatch)
    assert text(revision=revision) == online
    with pytest.raises(DataError) as refused:
        text(file="wikitext-2-raw-v1/train-00000-of-00001.parquet")
    mentions([str(refused.value)], "calibration.hub.repo=Salesforce/wikitext", "HF_HUB_OFFLINE=0", "calibration.path=")


def test_a_partial_cache_is_reported_as_partial(server, cache, monkeypatch):
    hub.fetch_snapshot(MODEL, None, allow=["config.json"], ignore=[])
    offline(server, cache, monkeypatch)
    with pytest.raises(CheckpointError) as refused:
        model()
    mentions([str(refused.value)], f"model.path={MODEL}", "only in part in the local cache", "HF_HUB_OFFLINE=0")


def test_a_branch_that_moves_within_a_run_is_not_followed(server, models, cache, monkeypatch):
    first = model()
    renewed(models)
    assert model() == first
    monkeypatch.setattr(hub, "_commits", {})  # the next process
    second = model()
    assert second.fingerprint != first.fingerprint
    assert (second.folder / "README.md").read_text() == "the second commit\n"
    offline(server, cache, monkeypatch)
    assert model() == second


def test_a_branch_that_moves_within_a_download_gives_one_commit(server, models, monkeypatch):
    """Every file is that of the commit that the branch was at first, or the download fails; never of both."""
    commit = server.tree.revision("models", MODEL, "main").commit
    shutil.copytree(models / "models" / MODEL, models / "models" / f"{MODEL}@{commit}")
    asked = server.tree.revision

    def moving(kind: str, repo: str, name: str) -> Any:
        found = asked(kind, repo, name)
        if name == "main" and not (models / "models" / MODEL / "README.md").exists():
            renewed(models)
        return found

    monkeypatch.setattr(server.tree, "revision", moving)
    found = model()
    assert found.folder.name == commit
    assert not (found.folder / "README.md").exists()


def test_links_of_the_cache_stay_within_it(server):
    folder = model().folder
    for path in folder.iterdir():
        assert path.is_symlink()
        assert path.resolve().parent == (folder.parent.parent / "blobs").resolve()


# Outages


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", ["/api/models/local/stories260K$", "/tree/", "/resolve/"])
def test_requests_for_the_api_lists_and_files_are_repeated(server, status, where):
    server.fault(status=status, times=3, match=where)
    model()
    assert [answer for *_, answer in server.requests].count(status) == 3


@pytest.mark.parametrize("where", ["/api/datasets/", "/resolve/"])
def test_requests_for_texts_are_repeated(server, where):
    server.fault(status=503, times=3, match=where)
    assert text().path.stat().st_size > 100_000


def test_a_hub_that_keeps_failing_is_given_up(server):
    server.fault(status=503)
    began = time.monotonic()
    with pytest.raises(CheckpointError) as refused:
        model()
    assert time.monotonic() - began < 5
    mentions([str(refused.value)], f"model.path={MODEL}", "answered 503", "attempts", "try again later", "model=local")
    asked = len(server.requests)
    with pytest.raises(DataError):  # who was given up a moment ago is asked, but not waited for again
        text()
    assert len(server.requests) - asked <= 4


def test_the_cache_is_used_if_the_hub_is_unreachable(server, models, monkeypatch, caplog):
    before = model()
    renewed(models)
    monkeypatch.setattr(hub, "_commits", {})
    server.fault(status=503)
    with caplog.at_level(logging.WARNING, logger="cfsp.system.hub"):
        assert model() == before
    (line,) = [record.getMessage() for record in caplog.records if record.name == "cfsp.system.hub"]
    mentions([line], MODEL, "answered 503", "local cache", before.folder.name[:12])
    server.fault()
    assert model() == before  # this process keeps to what it has begun with


def test_requests_wait_for_a_hub_that_comes_back(server, monkeypatch):
    server.stop()
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            server.start()

    monkeypatch.setattr(patient_session.time, "sleep", sleep)
    monkeypatch.setattr(hub, "_BRIEF_PATIENCE", 0)
    model()
    assert len(pauses) == 4


def test_interrupted_downloads_are_resumed(server):
    server.fault(fail_after=100_000, match="safetensors", times=2)
    assert len(list(model().folder.glob("*.safetensors"))) == 3


def test_messages_of_attempts_go_to_the_log_file(server, tmp_path, capfd, caplog):
    from cfsp.system.library_logs import write_early_records

    caplog.set_level(logging.INFO, "cfsp")  # as the command line does
    server.fault(status=503, times=2, match="/api/models")
    model()
    captured = capfd.readouterr()
    assert "503" not in captured.err + captured.out
    handler = logging.FileHandler(tmp_path / "run.log")
    write_early_records(handler)
    handler.close()
    assert "the hub answered 503 (Service Unavailable); asked again" in (tmp_path / "run.log").read_text()


# The session alone, with a clock of its own


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds slept; the time is their sum."""
    pauses: list[float] = []
    monkeypatch.setattr(patient_session.time, "sleep", pauses.append)
    monkeypatch.setattr(patient_session.time, "monotonic", lambda: 1000.0 + sum(pauses))
    patient_session.forget_outage()
    yield pauses
    patient_session.forget_outage()


def session(monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> Any:
    """A session whose requests are answered in turn, the last answer again and again."""
    from huggingface_hub.utils import httpx

    def answer(request: Any) -> Any:
        status, headers = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(status, type):
            raise status("as if")
        return httpx.Response(status, headers=headers)

    client = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub")
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: client)
    return client


def test_pauses_grow_and_end(monkeypatch, clock):
    client = session(monkeypatch, [(503, {})])
    with patient_session.patient_session(), pytest.raises(HubFailedError, match=r"503 .*\(8 attempts in 39 s\)"):
        client.get("http://hub/api/models/a/b")
    assert clock == [1, 2, 4, 8, 8, 8, 8]
    assert client.get("http://hub/").status_code == 503  # outside, the session is as it was


@pytest.mark.parametrize(
    ("headers", "pause"),
    [({"Retry-After": "7"}, 7), ({"RateLimit": '"api";r=0;t=55'}, 55), ({"RateLimit": '"api";r=3;t=55'}, 1), ({}, 1)],
    ids=["seconds", "rate limit", "rate limit with some left", "not said"],
)
def test_the_pause_that_a_server_requests_is_respected(monkeypatch, clock, headers, pause):
    client = session(monkeypatch, [(429, headers), (200, {})])
    with patient_session.patient_session():
        assert client.get("http://hub/").status_code == 200
    assert clock == [pause]


def test_a_request_is_given_up_if_the_server_requests_too_long_a_pause(monkeypatch, clock):
    client = session(monkeypatch, [(429, {"Retry-After": "3600"})])
    with patient_session.patient_session(), pytest.raises(HubFailedError, match="asks to come back in 3600 s"):
        client.get("http://hub/")
    assert clock == []


@pytest.mark.parametrize("name", ["ConnectError", "ReadError", "ReadTimeout", "RemoteProtocolError"])
def test_broken_connections_are_opened_again(monkeypatch, clock, name):
    from huggingface_hub.utils import httpx

    client = session(monkeypatch, [(getattr(httpx, name), {}), (200, {})])
    with patient_session.patient_session():
        assert client.get("http://hub/").status_code == 200
    assert clock == [1]


def test_requests_without_a_needed_answer_are_not_repeated(monkeypatch, clock):
    client = session(monkeypatch, [(503, {})])
    with patient_session.patient_session():
        assert client.head("http://elsewhere/count").status_code == 503
        with pytest.raises(HubFailedError), client.stream("GET", "http://elsewhere/file"):
            pass
    assert sum(clock) == 39


def test_a_slow_answer_is_given_more_time(monkeypatch, clock):
    from huggingface_hub.utils import httpx

    limits = []

    def answer(request: Any) -> Any:
        limits.append(request.extensions["timeout"]["read"])
        if len(limits) < 3:
            raise httpx.ReadTimeout("as if")
        return httpx.Response(200)

    client = httpx.Client(transport=httpx.MockTransport(answer), timeout=None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub")
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: client)
    with patient_session.patient_session():
        client.get("http://hub/")
    assert limits == [10, 20, 30]


# What is wrong, and the way out


def test_a_gated_model(server, models, monkeypatch):
    local.in_shards(models, "org/gated")
    with pytest.raises(CheckpointError) as refused:
        model("org/gated")
    page = f"{server.endpoint}/org/gated)"
    mentions(
        [str(refused.value)], "model.path=org/gated", "gated", "accept its licence", page, "HF_TOKEN", "auth login"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError) as refused:
        model("org/gated")
    mentions([str(refused.value)], "model.path=org/gated", "accept its licence", "an account that has access")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert len(list(model("org/gated").folder.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("missing_status", [404, 401])
def test_a_repository_that_is_missing(server, missing_status):
    server.missing_status = missing_status
    with pytest.raises(CheckpointError) as refused:
        model("local/stories")
    mentions([str(refused.value)], "model.path=local/stories:", "no such repository", "HF_TOKEN", "model=local")


def test_a_revision_that_is_missing(server):
    with pytest.raises(CheckpointError) as refused:
        model(revision="v9")
    mentions([str(refused.value)], f"model.path={MODEL}", "no such revision (v9)")
    with pytest.raises(DataError) as refused_text:
        text(revision="v9")
    mentions([str(refused_text.value)], "calibration.hub.repo=Salesforce/wikitext", "no such revision (v9)")


def test_a_file_that_is_missing(server):
    with pytest.raises(DataError) as refused:
        text(file="nothing.parquet")
    mentions([str(refused.value)], "Salesforce/wikitext", "no such file (nothing.parquet)", "calibration.path=FILE")


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_not_accepted(server, monkeypatch, status):
    def refused(self: Any, *_: Any, **__: Any) -> None:
        from huggingface_hub.utils import hf_raise_for_status, httpx

        headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
        request = httpx.Request("GET", "https://huggingface.co/api/models/a/b")
        hf_raise_for_status(httpx.Response(status, headers=headers, request=request))

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refused)
    with pytest.raises(CheckpointError) as error:
        model()
    mentions([str(error.value)], f"model.path={MODEL}", "does not accept the token", "HF_TOKEN", "auth login")


def test_a_full_disk_names_the_folder(server, cache, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(cache / "hub" / "blobs"))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CheckpointError) as refused:
        model()
    mentions([str(refused.value)], f"model.path={MODEL}", f"HF_HOME={cache}", "No space left", "make room")


@pytest.mark.parametrize("body", ["<html>please sign in</html>", "{}"], ids=["html", "json"])
def test_an_answer_that_does_not_come_from_a_hub(monkeypatch, tmp_path, body):
    """A captive portal, or an HF_ENDPOINT that is another server's."""
    from huggingface_hub.utils import httpx

    client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text=body)))
    for module in ("huggingface_hub.utils", "huggingface_hub.hf_api", "huggingface_hub.utils._http"):
        monkeypatch.setattr(f"{module}.get_session", lambda: client)
    local.use("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(CheckpointError) as refused:
        model()
    mentions([str(refused.value)], f"model.path={MODEL}", "HF_ENDPOINT=http://127.0.0.1:9", "not a hub's")


@pytest.mark.parametrize("place", ["missing", "file"])
def test_a_cache_folder_that_cannot_be_created(server, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    folder = Path("/proc/nowhere") if place == "missing" else tmp_path / "file"
    local.use(server.endpoint, folder, monkeypatch)
    with pytest.raises(CheckpointError) as refused:
        model()
    mentions([str(refused.value)], f"model.path={MODEL}", f"HF_HOME={folder} cannot be written")


# The other doors


def test_inspect_by_the_name_on_the_hub(server, models, run_cfsp):
    local.in_shards(models, "org/gated")
    code, out, err = run_cfsp("inspect", f"path={MODEL}", defaults=False)
    assert (code, err) == (0, "")
    assert "260,032 parameters" in out
    code, _, err = run_cfsp("inspect", "path=org/gated", defaults=False)
    assert code == 2
    mentions(err.splitlines(), "cfsp: path=org/gated", "accept its licence", "HF_TOKEN", "path=DIR")


def test_load_by_the_name_on_the_hub(server, models):
    import cfsp

    local.in_shards(models, "org/gated")
    loaded, tokenizer = cfsp.load(MODEL, device="cpu")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 260_032
    assert tokenizer("a")["input_ids"]
    with pytest.raises(CheckpointError, match="gated: accept its licence"):
        cfsp.load("org/gated")


# Task data: what ``datasets`` says


@pytest.fixture
def data_sets(server, models, cache, monkeypatch):
    """``load(repo, name)``: a data set of the server, as lm-eval loads the data of a task."""
    import datasets

    values = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": cache / "datasets"}
    for name, value in values.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(
        datasets.config, "HUB_DATASETS_URL", f"{server.endpoint}/datasets/{{repo}}/resolve/{{revision}}/{{path}}"
    )
    odd = models / "datasets" / "org"
    for name in ("gated", "empty", "parts"):
        (odd / name).mkdir(parents=True)
        (odd / name / "README.md").write_text("nothing\n")
    (odd / "parts" / "train.jsonl").write_text('{"text": "a"}\n')

    def load(repo: str, name: str | None = None) -> Any:
        with hub.fetching("evaluation.zero_shot.tasks=task", "local tasks"):
            return datasets.load_dataset(repo, name)

    return load


@pytest.mark.parametrize(
    ("repo", "name", "parts"),
    [
        ("org/gated", None, ["gated", "accept its licence", "/datasets/org/gated)", "HF_TOKEN"]),
        ("org/missing", None, ["doesn't exist on the Hub", "HF_TOKEN"]),
        ("aps/super_glue", "cola", ["no configuration cola", "'boolq', 'copa', 'rte'"]),
        ("org/empty", None, ["none of the data set's files"]),
    ],
    ids=["gated", "missing", "configuration", "no files"],
)
def test_task_data_that_cannot_be_fetched(data_sets, repo, name, parts):
    with pytest.raises(DataError) as refused:
        data_sets(repo, name)
    mentions([str(refused.value)], "evaluation.zero_shot.tasks=task: ", "give local tasks", *parts)


def test_task_data_without_the_split(data_sets):
    with (
        pytest.raises(DataError, match="evaluation.zero_shot.tasks=task: the data set has no split 'validation'"),
        hub.fetching("evaluation.zero_shot.tasks=task", "local tasks"),
    ):
        data_sets("org/parts")["validation"]


@pytest.mark.parametrize("where", ["/api/", "README", "jsonl"])
def test_requests_for_task_data_are_repeated(data_sets, server, where):
    server.fault(status=503, times=3, match=f"datasets/org/parts.*{where}|{where}datasets/org/parts")
    assert len(data_sets("org/parts")["train"]) == 1
    assert [status for *_, status in server.requests].count(503) == 3


def test_task_data_of_a_hub_that_keeps_failing(data_sets, server):
    server.fault(status=503, match="datasets/org/parts")
    with pytest.raises(DataError) as refused:
        data_sets("org/parts")
    mentions([str(refused.value)], "evaluation.zero_shot.tasks=task: the hub answered 503", "try again later")


def test_errors_that_do_not_come_from_fetching_pass_unchanged():
    with pytest.raises(KeyError), hub.fetching("evaluation.zero_shot.tasks=task", "local tasks"):
        raise KeyError("choice")


def test_errors_name_the_key_of_the_evaluator():
    from cfsp.evaluation.base import name_key_in_errors
    from cfsp.evaluation.zero_shot import ZeroShot

    evaluator = ZeroShot(tasks=["nq_open"])
    with (
        pytest.raises(
            DataError, match=r"^evaluation\.generation\.tasks=nq_open: .*evaluation\.generation\.include_path"
        ),
        name_key_in_errors("generation", evaluator),
    ):
        raise DataError("evaluation.zero_shot.tasks=nq_open: gone; give evaluation.zero_shot.include_path=FOLDER")
    with pytest.raises(DataError, match="^evaluation.zero_shot.tasks"), name_key_in_errors("zero_shot", evaluator):
        raise DataError("evaluation.zero_shot.tasks=nq_open: gone")
