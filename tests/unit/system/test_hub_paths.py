"""Each thing that cfsp fetches from the hub: fetched, found again offline, by revision, through redirects and pages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cfsp.config.sections import ModelSection, TextSection
from cfsp.data.rows import rows
from cfsp.data.text import locate_text, read_text
from cfsp.errors import CfspError
from cfsp.export.folder import read_folder
from cfsp.export.gguf import export
from cfsp.model.load import load_model
from cfsp.system import hub, patient_session
from cfsp.weights.source import ModelSource, locate, with_weights
from tests.conftest import ROOT, mentions, shared
from tests.helpers import hub as local
from tests.helpers import quantised
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.hub

SHARDS, GGUF, SEVERAL, FP8, GATED = "local/shards", "local/one-gguf", "local/ggufs", "local/fp8", "local/gated-gguf"


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """A root with a model of each form, and with a further revision of two of them."""
    served = tmp_path_factory.mktemp("served")
    local.in_shards(served, SHARDS)
    models = served / "models" / "local"
    folder = tmp_path_factory.mktemp("folders")
    quantised.marked(folder / "tiny", tiny_model("llama", blocks=2, vocab_size=4096))  # its config.json is not used
    quantised.fp8(models / "fp8", tiny_model("llama", blocks=2, vocab_size=4096))
    config = json.loads((folder / "tiny" / "config.json").read_text())
    del config["quantization_config"]
    (folder / "tiny" / "config.json").write_text(json.dumps(config))
    for repo in ("one-gguf", "ggufs", "gated-gguf", "one-gguf@v1"):
        (models / repo).mkdir()
    for dtype in ("f32", "q8_0"):
        export(read_folder(folder / "tiny"), models / "ggufs" / f"tiny-{dtype}.gguf", dtype=dtype)
    for repo, dtype in (("one-gguf", "q8_0"), ("gated-gguf", "q8_0"), ("one-gguf@v1", "f32")):
        shutil.copy(models / "ggufs" / f"tiny-{dtype}.gguf", models / repo / "tiny.gguf")
    odd = served / "datasets" / "local" / "texts"
    for folder_of_revision, text in ((odd, "the main branch"), (odd.with_name("texts@v1"), "the branch v1")):
        folder_of_revision.mkdir(parents=True)
        rows_of_text = "".join(json.dumps({"text": f"{text}, row {i}"}) + "\n" for i in range(2000))
        (folder_of_revision / "train.jsonl").write_text(rows_of_text)
    return served


@pytest.fixture(scope="module")
def running(served) -> Iterator[Any]:
    roots = (served, shared("hub", "stand_ins"), shared("hub"))
    with local.module("serve").LocalHub(*roots, gated=[GATED], token="hf_right") as running:
        yield running


@pytest.fixture
def server(running, tmp_path, monkeypatch) -> Iterator[Any]:
    """The server of the module as it is at first, used by this process with a cache of the test's own."""
    monkeypatch.setattr(patient_session, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(patient_session, "_LONGEST_OWN_PAUSE", 0.05)
    monkeypatch.setattr(patient_session, "PATIENCE", 1.0)
    monkeypatch.setattr(hub, "_BRIEF_PATIENCE", 0.05)
    monkeypatch.setattr(hub, "_commits", {})
    patient_session.forget_outage()
    running.requests.clear()
    local.use(running.endpoint, tmp_path / "hf", monkeypatch)
    yield running
    running.fault()
    running.cdn, running.page = False, 1000
    patient_session.forget_outage()


@pytest.fixture
def offline(server, tmp_path, monkeypatch) -> Callable[[], None]:
    """``offline()``: from here on this is another process, later, that may not ask the hub and does not."""

    def call() -> None:
        local.use(server.endpoint, tmp_path / "hf", monkeypatch, offline=True)
        monkeypatch.setattr(hub, "_commits", {})
        server.requests.clear()

    return call


def inject(server: Any, monkeypatch: pytest.MonkeyPatch, fault: str, files: str) -> Callable[[], bool]:
    """Have the server fail in one way; returns what says whether it did.

    Args:
        server: the server.
        monkeypatch: of the test.
        fault: cdn, pages, breaks in a file, breaks in the api, or 503.
        files: pattern of the files that break off.
    """
    if fault == "cdn":
        server.cdn = True
        return lambda: any(path.startswith("/cdn/") for _, path, _ in server.requests)
    if fault == "pages":
        server.page = 2
        return lambda: any("cursor" in path for _, path, _ in server.requests)
    if fault == "breaks in the api":
        broken = local.break_the_api(monkeypatch, 2)
        return lambda: len(broken) == 2
    if fault == "breaks in a file":
        server.fault(fail_after=1000, match=files, times=2)
    else:
        server.fault(status=503, times=4)
    current = server.current
    return lambda: current.times <= 0  # it goes on counting the requests that it lets pass


def model(path: str, cache: Path | None = None, **keys: Any) -> ModelSource:
    return locate(ModelSection(name="local", path=path, **keys), cache)


def refused(path: str, **keys: Any) -> str:
    with pytest.raises(CfspError) as caught:
        model(path, **keys)
    return str(caught.value)


# Models: in shards, GGUF files, quantised

MODELS = [
    pytest.param(SHARDS, {}, id="shards"),
    pytest.param(GGUF, {}, id="one gguf"),
    pytest.param(GGUF, {"revision": "v1"}, id="one gguf, a revision"),
    pytest.param(SEVERAL, {"gguf_file": "tiny-q8_0.gguf"}, id="gguf_file"),
    pytest.param(FP8, {"dequantize": True}, id="quantised"),
]


@pytest.mark.parametrize(("path", "keys"), MODELS)
def test_a_model_is_loaded_and_found_again_offline(server, offline, tmp_path, path, keys):
    online = model(path, tmp_path / "cache", **keys)
    weights = load_model(online, dtype=torch.float32, device=torch.device("cpu")).state_dict()
    offline()
    again = model(path, tmp_path / "other-cache", **keys)
    assert again.fingerprint == online.fingerprint
    assert again.hub_id == path
    loaded = load_model(again, dtype=torch.float32, device=torch.device("cpu")).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert not server.requests


@pytest.mark.parametrize(("path", "keys"), MODELS)
@pytest.mark.parametrize("fault", ["cdn", "breaks in a file", "breaks in the api", "503"])
def test_a_model_through_redirects_and_broken_connections(server, monkeypatch, tmp_path, path, keys, fault):
    happened = inject(server, monkeypatch, fault, r"\.(safetensors|gguf)$")
    source = with_weights(model(path, tmp_path / "cache", **keys))
    assert list(source.folder.glob("*.safetensors"))
    assert happened()


@pytest.mark.parametrize(("path", "keys"), [(SHARDS, {}), (FP8, {"dequantize": True})])
def test_a_list_of_files_in_several_pages(server, monkeypatch, path, keys):
    happened = inject(server, monkeypatch, "pages", "")
    assert model(path, **keys).fingerprint.startswith(f"hub:{path}@")
    assert happened()


def test_another_revision_is_another_model(server):
    main, v1 = model(GGUF), model(GGUF, revision="v1")
    assert (main.gguf.quantisation[:4], v1.gguf.quantisation[:3]) == ("Q8_0", "F32")
    assert main.fingerprint != v1.fingerprint


def test_gguf_files_that_cannot_be_chosen(server):
    mentions([refused(SEVERAL)], f"model.path={SEVERAL}", "tiny-f32.gguf, tiny-q8_0.gguf", "model.gguf_file=NAME")
    message = refused(SEVERAL, gguf_file="tiny-q4.gguf")
    mentions([message], "model.gguf_file=tiny-q4.gguf", "no such file", "tiny-f32.gguf, tiny-q8_0.gguf")
    mentions([refused(GGUF, revision="v9")], f"model.path={GGUF}", "no such revision (v9)")
    mentions([refused(GGUF, gguf_file="tiny.gguf", revision="v9")], f"model.path={GGUF}", "no such revision (v9)")


def test_a_failed_list_of_files_is_not_an_empty_list(server, monkeypatch):
    def failing(*_: Any, **__: Any) -> None:
        raise patient_session.HubFailedError("the hub answered 503, after 5 attempts")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", failing)
    mentions([refused(GGUF)], f"model.path={GGUF}", "answered 503")


def test_a_gated_gguf_file(server, monkeypatch):
    for keys in ({}, {"gguf_file": "tiny.gguf"}):
        mentions([refused(GATED, **keys)], f"model.path={GATED}", "gated", "accept its licence", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert model(GATED).gguf.file == "tiny.gguf"


def test_a_gguf_file_that_is_not_in_the_cache_offline(server, offline):
    model(SEVERAL, gguf_file="tiny-f32.gguf")
    offline()
    message = refused(SEVERAL, gguf_file="tiny-q8_0.gguf")
    mentions([message], f"model.path={SEVERAL}", "only in part in the local cache", "HF_HUB_OFFLINE=0")


def test_a_quantised_repository_names_the_way_out(server):
    mentions([refused(FP8)], f"model.path={FP8}@", "quantised (fp8)", "model.dequantize=true")


# cfsp inspect


def test_inspect_reads_the_header_of_the_gguf_file(server, run_cfsp):
    code, out, err = run_cfsp("inspect", f"path={GGUF}", defaults=False)
    assert (code, err) == (0, "")
    first, second = out.splitlines()[:2]
    assert first.startswith(f"{GGUF}@")
    assert first.endswith("/tiny.gguf")
    assert "GGUF, Q8_0" in second
    code, out, err = run_cfsp("inspect", f"path={SEVERAL}", "gguf_file=tiny-f32.gguf", defaults=False)
    assert (code, err) == (0, "")
    assert "GGUF, F32" in out.splitlines()[1]


def test_inspect_of_gguf_files_that_cannot_be_fetched(server, run_cfsp):
    code, _, err = run_cfsp("inspect", f"path={SEVERAL}", defaults=False)
    assert code == 2
    mentions(err.splitlines(), f"path={SEVERAL}", "tiny-f32.gguf, tiny-q8_0.gguf", " gguf_file=NAME")
    code, _, err = run_cfsp("inspect", f"path={SEVERAL}", "gguf_file=no.gguf", defaults=False)
    assert code == 2
    mentions(err.splitlines(), "gguf_file=no.gguf", "no such file", "tiny-f32.gguf")
    code, _, err = run_cfsp("inspect", f"path={GATED}", defaults=False)
    assert code == 2
    mentions(err.splitlines(), f"path={GATED}", "accept its licence", "HF_TOKEN")


def test_inspect_of_a_quantised_repository(server, run_cfsp):
    code, out, err = run_cfsp("inspect", f"path={FP8}", defaults=False)
    assert (code, err) == (0, "")
    assert "quantised (fp8): a run needs model.dequantize=true" in out
    assert not [path for _, path, _ in server.requests if path.endswith(".safetensors")]


# Texts: calibration sets, perplexity texts, recovery data


def _texts() -> dict[str, dict[str, Any]]:
    """``group/name`` -> the settings of each text in conf that lies on the hub."""
    found = {}
    for group in ("calibration", "recovery/data"):
        for file in (ROOT / "conf" / group).glob("*.yaml"):
            values = yaml.safe_load(file.read_text())
            if values.get("hub"):
                found[f"{group}/{file.stem}"] = values
    perplexity = yaml.safe_load((ROOT / "conf" / "text" / "published.yaml").read_text())
    return found | {f"text/{name}": values for name, values in perplexity.items() if values["hub"]}


TEXTS = _texts()


def test_these_are_the_texts_on_the_hub():
    assert sorted(TEXTS) == [
        "calibration/c4", "calibration/wikitext2", "recovery/data/alpaca", "recovery/data/dolly", "text/c4",
        "text/fineweb_edu", "text/wikitext2",
    ]  # fmt: skip


def text_of(name: str) -> Any:
    known = {key: value for key, value in TEXTS[name].items() if key in TextSection.model_fields}
    return locate_text(TextSection(**known), "key", streamed=True)


def beginning(name: str) -> list[str]:
    """The first rows of a text."""
    path = text_of(name).path
    return [str(row) for _, row in islice(rows(path, str(path)), 5)]


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_read_and_found_again_offline(server, offline, name):
    online, first = text_of(name), beginning(name)
    assert len(first) == 5
    offline()
    assert text_of(name) == online
    assert beginning(name) == first
    assert not server.requests


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name in TEXTS for fault in ("breaks in a file", "breaks in the api")]
    + [(name, "cdn") for name in TEXTS if not name.startswith("recovery/")],  # JSON files are not redirected
)
def test_a_text_through_redirects_and_broken_connections(server, monkeypatch, name, fault):
    happened = inject(server, monkeypatch, fault, "/resolve/")
    assert len(beginning(name)) == 5
    assert happened()


def test_a_text_at_a_revision(server, offline):
    def words(revision: str | None) -> str:
        section = TextSection(hub={"repo": "local/texts", "file": "train.jsonl", "revision": revision})
        return read_text(locate_text(section, "calibration"))[:20]

    assert (words("v1"), words(None)) == ("the branch v1, row 0", "the main branch, row")
    offline()
    assert (words("v1"), words(None)) == ("the branch v1, row 0", "the main branch, row")


def test_a_gated_text(server, monkeypatch):
    section = TextSection(hub={"repo": "local/texts", "file": "train.jsonl", "revision": None})
    monkeypatch.setattr(server, "gated", {"local/texts"})
    with pytest.raises(CfspError) as caught:
        locate_text(section, "calibration")
    mentions([str(caught.value)], "calibration.hub.repo=local/texts", "gated", "HF_TOKEN", "calibration.path=FILE")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert "row 0" in read_text(locate_text(section, "calibration"))


@pytest.mark.parametrize("group", ["calibration=ptb", "calibration=llm_pruner"])
def test_a_text_without_a_copy_on_the_hub_asks_for_a_file(server, run_cfsp, group):
    code, _, err = run_cfsp("model=bundled", group, "evaluation=none")
    assert code == 2
    mentions([line for line in err.splitlines() if line.startswith("cfsp: ")], "calibration.path")
    assert not server.requests
