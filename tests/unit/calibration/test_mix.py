"""calibration=mix: windows of several sets by share, their order, identity, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from cfsp.calibration.calibration_set import CalibrationSet, from_mix, identity
from cfsp.config.compose import compose
from cfsp.config.parse import parse
from tests.conftest import SENTENCE, mentions


def section(*overrides: str):
    return parse(compose(["pruner=cfsp", "sparsity.ratio=0.5", "calibration=mix", *overrides])).calibration


@pytest.mark.parametrize(
    ("mix", "n_samples", "expected"),
    [
        ("{wikitext2: 0.5, c4: 0.5}", 128, {"wikitext2": 64, "c4": 64}),
        ("{wikitext2: 2, c4: 1, self: 1}", 10, {"wikitext2": 5, "c4": 3, "self": 2}),
        ("{wikitext2: 1, c4: 1, self: 1}", 4, {"wikitext2": 2, "c4": 1, "self": 1}),
        ("{bundled: 3}", 7, {"bundled": 7}),
    ],
)
def test_shares_become_windows(mix, n_samples, expected) -> None:
    mixed = section(f"calibration.mix={mix}", f"calibration.n_samples={n_samples}", "calibration.seq_len=64")
    assert {name: part.n_samples for name, part in mixed.parts.items()} == expected
    assert {part.seq_len for part in mixed.parts.values()} == {64}


def test_every_window_is_there_once_in_an_order_of_the_seed() -> None:
    """No source may fill the first windows, which searches use, or every fourth, which judges refits."""
    mixed = section("calibration.mix={wikitext2: 1, c4: 1}", "calibration.n_samples=64", "calibration.seq_len=8")
    sets = {
        name: CalibrationSet(torch.arange(32 * 8).reshape(32, 8) + 1000 * at, name, "train", 0)
        for at, name in enumerate(("wikitext2", "c4"))
    }
    ids = from_mix(mixed, sets, 0).input_ids
    assert sorted(map(tuple, ids.tolist())) == sorted(
        tuple(row) for part in sets.values() for row in part.input_ids.tolist()
    )
    sources = (ids[:, 0] >= 1000).int()
    for chosen in (sources[:16], sources[3::4]):
        assert 0.2 < float(chosen.float().mean()) < 0.8
    assert torch.equal(ids, from_mix(mixed, sets, 0).input_ids)
    assert not torch.equal(ids, from_mix(mixed, sets, 1).input_ids)
    assert [part["name"] for part in from_mix(mixed, sets, 0).describe()["parts"]] == ["wikitext2", "c4"]


def test_shares_sources_and_content_decide_the_identity(tmp_path) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(SENTENCE * 50)
    other.write_text(SENTENCE * 51)

    def of(mix="{bundled: 1, text: 1}", path=text, *more):
        return identity(section(f"calibration.mix={mix}", f"calibration.sources.text.path={path}", *more))

    same = tmp_path / "same.txt"
    same.write_text(text.read_text())
    assert of() == of(path=same) == of(path=text, mix="{bundled: 1, text: 1}")
    assert of() == of("{bundled: 1, text: 1}", text, "calibration.sources.c4.max_documents=3")  # not used
    for changed in (
        of("{bundled: 2, text: 1}"),
        of(path=other),
        of("{bundled: 1, text: 1}", text, "calibration.sources.text.bos=none"),
    ):
        assert changed != of()


def test_a_run_with_given_and_self_generated_text(run_cfsp, tmp_path, prose_file, model_folder) -> None:
    words = [
        "model=local", f"model.path={model_folder}", "calibration=mix", "calibration.mix={text: 2, self: 1}",
        f"calibration.sources.text.path={prose_file}", "calibration.n_samples=6", "calibration.seq_len=32",
        "sparsity.round_to=8", "evaluation=none", "save.model=false",
    ]  # fmt: skip
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["calibration"]["n_samples"] == 6
    assert [(part["name"], part["n_samples"]) for part in record["calibration"]["parts"]] == [("text", 4), ("self", 2)]
    assert list(record["configuration"]["calibration"]["sources"]) == ["text", "self"]
    assert run_cfsp(*words)[0] == 0  # finished already
    lines = err.splitlines()
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], ("calibration.mix=null", "the share of each source")),
        (["calibration.mix={wikitxt2: 1}"], ("calibration.mix.wikitxt2", "did you mean wikitext2?")),
        (["calibration.mix={text: 1}"], ("calibration.sources.text.path=null", "calibration.sources.text.path=FILE")),
        (["calibration.mix={tokens: 1}"], ("calibration.sources.tokens.path=null",)),
        (["calibration.mix={bundled: 0}"], ("calibration.mix.bundled=0", "above 0")),
        (["calibration.mix=[bundled]"], ("calibration.mix=[bundled]",)),
        (["calibration.mix={bundled: 500, self: 1}"], ("calibration.mix.self=1", "no whole window")),
        (
            ["calibration.mix={bundled: 1, self: 1}", "calibration.seq_len=64", "model.streaming=on"],
            ("model.streaming=on", "samples token by token"),
        ),
        (["calibration.mix={bundled: 1}", "calibration.seq_len=100000"], ("calibration.seq_len",)),
        (
            ["calibration.mix={text: 1}", "calibration.sources.text.path=/nowhere/text.txt"],
            ("calibration.sources.text.path=/nowhere/text.txt",),
        ),
    ],
)
def test_bad_mixtures_are_refused(refused, overrides, parts) -> None:
    mentions(refused("pruner=cfsp", "calibration=mix", "evaluation=none", *overrides), *parts)
