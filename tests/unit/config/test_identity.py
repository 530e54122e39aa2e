"""Run identity: content decides, not the place; nothing different shares an id or a cache entry."""

from __future__ import annotations

import importlib
import json
import linecache
import shutil
import sys
from dataclasses import asdict
from typing import Annotated

import numpy as np
import pytest

from cfsp.architecture.views import resolve
from cfsp.calibration.statistics_cache import StatisticsCache
from cfsp.checkpoint.save import save_checkpoint
from cfsp.config.components import build, component
from cfsp.config.compose import compose
from cfsp.config.deciding import Decides, deciding_settings, separate
from cfsp.config.identity import configuration_parts, identity_of, run_id_of
from cfsp.config.parse import parse
from cfsp.model.driver import BlockDriver
from cfsp.model.load import load_model
from cfsp.pipeline.preflight import prepare
from cfsp.system.package import ROOT
from tests.conftest import ROOT as PROJECT
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of the same shape with other weights, and a copy of the first elsewhere; two token files."""
    base = tmp_path_factory.mktemp("models")
    for name, seed in (("one", 0), ("two", 1)):
        save_checkpoint(tiny_model(seed=seed, vocab_size=4096), base / name, source=ROOT / "assets" / "books7m")
    shutil.copytree(base / "one", base / "deep" / "copy")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(base / f"{name}.npy", generator.integers(0, 4096, (4, 16)))
    shutil.copy(base / "a.npy", base / "deep" / "elsewhere.npy")
    return base


def prepared(base, model="one", tokens="a.npy", *words):
    return prepare(
        parse(
            compose(
                [
                    "model=local", f"model.path={base / model}", "calibration=tokens",
                    f"calibration.path={base / tokens}", "evaluation=none", *words,
                ]
            )
        )
    )  # fmt: skip


def test_settings_that_decide_the_result_change_the_id(folders):
    base = prepared(folders)
    others = {
        "another model": prepared(folders, "two"),
        "other tokens": prepared(folders, "one", "b.npy"),
        "another ratio": prepared(folders, "one", "a.npy", "sparsity.ratio=0.4"),
        "another scope": prepared(folders, "one", "a.npy", "sparsity.scope=decoder", "sparsity.ratio=0.2"),
        "another seed": prepared(folders, "one", "a.npy", "seed=1"),
        "another metric": prepared(folders, "one", "a.npy", "importance=wanda"),
        "another temperature": prepared(folders, "one", "a.npy", "allocator.temperature=2"),
        "another saved dtype": prepared(folders, "one", "a.npy", "save.dtype=float16"),
        "another preset": prepared(folders, "one", "a.npy", "pruner=uniform"),
        "another dtype": prepared(folders, "one", "a.npy", "model.dtype=bfloat16"),
        "another batch size": prepared(folders, "one", "a.npy", "calibration.batch_size=2"),
        "dense": prepared(folders, "one", "a.npy", "pruner=none"),
    }
    ids = {name: other.run_id for name, other in others.items()}
    assert base.run_id not in ids.values()
    assert len(set(ids.values())) == len(ids), ids


#: Records of every folder, few enough to parse in seconds.
RECORDS = sorted((PROJECT / "results" / "records").rglob("*.json"))[::25]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name + "-" + path.stem[-12:])
def test_committed_records_keep_their_identity(path):
    """The configuration and the inputs of a committed record still make its run id: nothing is measured again."""
    record = json.loads(path.read_text())
    # Some measured task files of an experiment, which a run would ask to be allowed.
    config, stored = parse({**record["configuration"], "plugins": {"allow": ["tasks"]}}), record["identity"]
    pruning = stored["pruning"] or {}
    identity = identity_of(
        config,
        model=stored["model"],
        dtype=stored["dtype"],
        calibration=pruning.get("calibration"),
        recovery=stored["recovery"],
        stored_dtype=pruning.get("stored", {}).get("dtype", ""),
        evaluation=stored["evaluation"],
    )
    assert run_id_of(config, identity) == record["run_id"]
    assert json.loads(json.dumps(identity)) == stored


def test_location_device_logger_and_paths_do_not_change_the_id(folders):
    base = prepared(folders).run_id
    assert prepared(folders, "deep/copy").run_id == base
    assert prepared(folders, "one", "deep/elsewhere.npy").run_id == base
    for words in (
        ["model.device=cpu"],
        ["logger=none"],
        ["paths.output_dir=x", "paths.cache_dir=y"],
        ["force=true"],
        ["debug=true"],
    ):
        assert prepared(folders, "one", "a.npy", *words).run_id == base, words


def test_different_models_and_tokens_never_share_a_cache_entry(folders, tmp_path):
    paths = set()
    for model in ("one", "two", "deep/copy"):
        for tokens in ("a.npy", "b.npy"):
            job = prepared(folders, model, tokens)
            view = resolve(load_model(job.source, dtype=job.dtype, device=job.device))
            cache = StatisticsCache(tmp_path, job.source.fingerprint)
            paths.add(cache.path("statistics", BlockDriver(view, 8), job.calibration, 1))
    assert len(paths) == 4


def test_evaluators_of_another_class_are_another_run(folders, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    body = (
        "from cfsp.config.components import component\n\n@component\nclass {name}:\n    side_by_side = False\n"
        "    def check(self, tokenizer, limits):\n        return {{}}\n"
        "    def measure(self, model, tokenizer):\n        return []\n"
    )
    (tmp_path / "my_evaluators.py").write_text(body.format(name="A") + "\n\n" + body.format(name="B"))
    ids = {
        prepared(
            folders, "one", "a.npy", "plugins.allow=[my_evaluators]",
            f"+evaluation.own._target_=my_evaluators.{name}",
        ).run_id
        for name in ("A", "B")
    }  # fmt: skip
    assert len(ids) == 2


def test_the_code_of_a_plug_in_is_part_of_the_identity(tmp_path, monkeypatch):
    """cfsp's own classes are covered by the method version; a class elsewhere may change without a word."""
    monkeypatch.syspath_prepend(str(tmp_path))
    identities = []
    for body in ("return activation.rms", "return -activation.rms"):
        (tmp_path / "mine_metric.py").write_text(
            "from cfsp.config.components import component\n\n@component\nclass Mine:\n"
            f"    def score(self, channels, activation):\n        {body}\n"
        )
        importlib.invalidate_caches()
        sys.modules.pop("mine_metric", None)
        linecache.clearcache()
        identities.append(build("importance", {"_target_": "mine_metric.Mine"}, ["mine_metric"]).identity())
    assert identities[0]["class"] == identities[1]["class"]
    assert identities[0] != identities[1]


@component
class Source:
    file: Annotated[str | None, Decides("content")] = None
    rows: int = 1


@component
class Marked:
    """A setting of each meaning."""

    plain: int = 1
    watched: Annotated[bool, Decides("nothing")] = False
    label: Annotated[str, Decides("name")] = "x"
    later: Annotated[float, Decides(before=1.0)] = 1.0
    batch: Annotated[int | str, Decides(alike=(8, "auto"))] = 8
    data: Source | None = None
    entries: Annotated[dict[str, Source], Decides(chosen_by="used")] | None = None
    used: tuple[str, ...] = ()


def _lookup(target):
    return {"Marked": Marked}.get(target), f"named {target}"


def test_settings_are_separated_by_the_marks_of_their_fields():
    settings = asdict(Marked(data=Source("here", 2)))
    parts = separate(Marked, settings)
    assert parts.values == {"plain": 1, "batch": 8, "data": {"rows": 2}, "entries": None, "used": ()}
    assert parts.places == {"data.file": "here"}
    assert separate(Marked, settings | {"later": 2.0, "unknown": 3}).values == parts.values | {
        "later": 2.0,
        "unknown": 3,
    }
    assert separate(None, settings).values == settings
    assert deciding_settings(Marked(later=0.5)) == {
        "plain": 1, "later": 0.5, "batch": 8, "data": None, "entries": None, "used": ()
    }  # fmt: skip


def test_tables_match_by_names_and_treat_alike_values_as_equal():
    group = {"a": {"_target_": "Marked", "label": "y", "batch": 8}, "b": {"_target_": "other.Class", "batch": 8}}
    assert separate(None, group, _lookup).values == {
        "a": {"_target_": "named Marked", "label": "y", "batch": "auto"},
        "b": {"_target_": "named other.Class", "batch": 8},
    }


def test_entries_that_are_not_chosen_decide_nothing():
    @component
    class Chooser:
        used: list[str]
        entries: Annotated[dict[str, Source], Decides(chosen_by="used")]

    settings = {"used": ["b"], "entries": {"a": {"file": "1"}, "b": {"file": "2", "rows": 3}}}
    parts = separate(Chooser, settings)
    assert parts.values == {"entries": {"b": {"rows": 3}}}
    assert parts.places == {"entries.b.file": "2"}


#: A key and another value -> what becomes of it in the key by which tables match: other values, other places, nothing.
CHANGES = {
    "seed=1": "values",
    "evaluate_selection=true": "values",
    "evaluate_selection=false": "nothing",
    "force=true": "nothing",
    "plugins.allow=[json]": "nothing",
    "logger=none": "nothing",
    "paths.cache_dir=x": "nothing",
    "save.model=true": "nothing",
    "save.format=gguf": "nothing",
    "save.dtype=float16": "values",
    "model.device=cpu": "nothing",
    "model.part=language_model": "values",
    "model.path=elsewhere": "places",
    "calibration.path=elsewhere": "places",
    "calibration.memory_gb=1": "nothing",
    "calibration.gram_share=0.5": "values",
    "calibration.batch_size=8": "nothing",
    "calibration.batch_size=4": "values",
    "pruner.newton_steps=9": "nothing",
    "recovery.log_every=3": "nothing",
    "recovery.name=mine": "values",
    "recovery.data.path=elsewhere": "places",
    "evaluation.perplexity.texts.ptb.path=elsewhere": "nothing",
    "evaluation.perplexity.texts.bundled.path=elsewhere": "places",
    "evaluation.perplexity.seq_len=64": "values",
}


@pytest.mark.parametrize("word", CHANGES)
def test_tables_match_a_run_by_its_deciding_keys(word):
    base = configuration_parts(parse(compose(["recovery=lora"])).raw)
    other = configuration_parts(parse(compose(["recovery=lora", word])).raw)
    changed = [name for name in ("values", "places") if getattr(base, name) != getattr(other, name)]
    assert changed == [CHANGES[word]] * (CHANGES[word] != "nothing")


@pytest.mark.parametrize("words", [[], ["calibration.skip_documents=0"]])
def test_runs_from_before_documents_could_be_skipped_keep_their_identity(words) -> None:
    from cfsp.calibration.calibration_set import identity

    assert "skip_documents" not in identity(parse(compose(words)).calibration)
    assert identity(parse(compose(["calibration.skip_documents=1"])).calibration)["skip_documents"] == 1


def test_an_evaluated_text_keeps_its_identity_too() -> None:
    from cfsp.config.sections import TextSection
    from cfsp.data.text import locate_text

    path = "pkg://cfsp/assets/text/evaluation.txt"
    assert "skip_documents" not in locate_text(TextSection(path=path), "text").identity
    assert locate_text(TextSection(path=path, skip_documents=2), "text").identity["skip_documents"] == 2
