"""Answers to wrong values and words: one line each, key and value named, no words of the libraries below."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
from omegaconf import OmegaConf

from cfsp.config.components import shown
from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.errors import LONGEST, ConfigError, one_line
from tests.conftest import mentions
from tests.helpers.wrong_values import GROUPS, WRONG, check_lines, covering_compositions, keys_of


def _problems(values: Mapping[str, Any]) -> list[str]:
    try:
        parse(values)
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.fixture(scope="module")
def compositions() -> list[dict[str, Any]]:
    found: Any = [OmegaConf.to_container(compose(words), resolve=False) for words in covering_compositions()]
    for values in found:
        values["paths"]["output_dir"] = "out"
        for node in (values["importance"], values):
            node["seed"] = 0 if "seed" in node else node.pop("seed", None)
            if node["seed"] is None:
                del node["seed"]
    return list(found)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: shown(value)[:20])
def test_every_key_of_every_group_with_a_wrong_value(compositions, wrong):
    seen: set[tuple[str, ...]] = set()
    refused = 0
    for values in compositions:
        before = set(_problems(values))
        targets = str([values[group].get("_target_", values[group].get("kind")) for group in values if group in GROUPS])
        for key in keys_of(values):
            if (targets if key[0] == "evaluation" else str(values[key[0]])[:60], *key) in seen:
                continue
            seen.add((targets if key[0] == "evaluation" else str(values[key[0]])[:60], *key))
            changed = deepcopy(values)
            node = changed
            for part in key[:-1]:
                node = node[part]
            node[key[-1]] = wrong
            lines = [line for line in _problems(changed) if line not in before]
            if not lines:
                continue
            refused += 1
            check_lines(lines)
            name = ".".join(key)
            assert any(part in line for line in lines for part in (name, key[-1], ".".join(key[:-1]) or name)), (
                name,
                lines,
            )
    assert refused or wrong in ("x" * 5000, "a\nb", "\x1b[31m")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "evaluation.perplexity.windows=4",
            "evaluation.perplexity.windows=4: expected [first, end], e.g. [0,24]",
        ),
        ("calibration.n_samples=a", "calibration.n_samples=a: expected a whole number from 1, e.g. "),
        ("seed=true", "seed=true: expected a whole number from 0 and below 4294967296, e.g. seed=0"),
        ("sparsity.scope=fnn", "sparsity.scope=fnn: expected ffn, decoder or model; did you mean ffn?"),
        ("model.name=5", "model.name=5: expected text; write it in quotes, \"model.name='5'\""),
        ("save.dtype=[a]", "save.dtype=[a]: expected float32, bfloat16, float16 or null"),
        ("calibration.hub=5", "calibration.hub=5: expected a group of keys: repo, file, revision or null"),
        ("calibration.n_samples=10000000", "calibration.n_samples=10000000: with calibration.seq_len=256 these are "),
    ],
)
def test_messages_describe_the_expected_values(word, line):
    with pytest.raises(ConfigError) as found:
        parse(compose([word]))
    assert found.value.problems[0].startswith(line)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["importance=[a,b]"], ["importance=[a,b]", "one option", "-m importance=A,B"]),
        (["importance=[cfsp,wanda]"], ["one option", "-m importance=A,B"]),
        (["importance=null"], ["importance=null", "options: activation_norm"]),
        (["importance="], ["importance=''", "options: "]),
        (["calibration=[1]"], ["calibration=[1]", "one option"]),
        (["save=null"], ["save=null", "model, format, dtype"]),
        (["plugins=null"], ["plugins=null", "allow"]),
        (["plugins=[a]"], ["plugins=[a]", "plugins.KEY=VALUE"]),
        (["model=null"], ["model=null", "options: "]),
        (["evaluation=null"], ["evaluation=null", "did you mean none?"]),
        (["recovery=null"], ["recovery=null", "did you mean none?"]),
        (["logger=null"], ["logger=null", "did you mean none?"]),
        (["sparsity=null"], ["sparsity=null", "options: default"]),
        (["evaluation.zero_shot=[1]"], ["evaluation.zero_shot=[1]", "tasks"]),
        (["pruner=none", "save.format=gguf"], ["save.format=gguf", "pruner=none", "cfsp export"]),
        (["~nobody/x"], ["nobody/x", "no such key"]),
        (["~sparsity.ratio"], ["sparsity.ratio is not set", "sparsity.ratio=0.5"]),
        (["~model"], ["model is not set", "model=bundled"]),
        (["~recovery/data"], ["~recovery/data", "delete"]),
        (["model.path=~/x"], ["needs quotes", "\"model.path='~/x'\""]),
        (["model.path=a#b"], ["\"model.path='a#b'\""]),
        (["model.path=a(b"], ["\"model.path='a(b'\""]),
        (["model.path=a'b"], ['"model.path=\\"a\'b\\""']),
        (["model.path=Müller"], ["\"model.path='Müller'\""]),
        (["+foo=1"], ["foo=1", "unknown key", "cfsp --cfg job"]),
        (["++x.y=2"], ["x.y=2", "unknown key"]),
        ([""], ["empty word"]),
        (["seed=\x1b[31m"], ["control character"]),
        (["="], ["=: ", "key=value"]),
        (["seed=" + "[" * 100_000], ["characters"]),
        (["seed=" + "[" * 5_000], ["nested deeper"]),
        (["seed=" + "9" * 5_000], ["digits"]),
        (["seed=1e999"], ["seed=inf", "whole number"]),
        (["seed=" + "9" * 300], ["seed=", "too large"]),
        (["calibration.path=???"], ["calibration.path=???", "has no value"]),
        (["calibration.path=${x}"], ["calibration.path", "${...}"]),
        (["nobody=1"], ["nobody", "no such key"]),
        (["plugins.allow={a:1}"], ["plugins.allow={a:1}: a list is expected", "plugins.allow=[A,B]"]),
        (["evaluation.perplexity.datasets={a:1}"], ["evaluation.perplexity.datasets={a:1}", "a list is expected"]),
        (["save={a:1}"], ["save={a:1}: a group of keys is expected: model, format, dtype", "save.KEY=VALUE"]),
        (["seed.x=1"], ["seed.x=1: seed is 0 and has no keys", "seed=VALUE"]),
        (["calibration.hub.repo=x"], ["calibration.hub is null and has no keys", "calibration.hub={repo:VALUE}"]),
        (["hydra.run=3"], ["hydra.run=3: a value of another kind", "cfsp --cfg hydra"]),
        (["hydra.sweep={a:1}"], ["hydra.sweep: there is no such key, or it takes no such value"]),
        (["hydra/launcher=nobody"], ["hydra/launcher=nobody", "basic"]),
        (["--experimental-rerun", "x"], ["--experimental-rerun"]),
        (["-m", "sparsity.ratio=range(a)"], ["range(FIRST,END,STEP)"]),
        (["-m", "sparsity.ratio=range(0.2,0.4,0)"], ["holds no value"]),
        (["-m", "seed=range(1,100000000000)"], ["99,999,999,999 runs", "10,000"]),
        (["-m", "sparsity.ratio=choice()"], ["choice(a,b)"]),
        (["-m", "sparsity.ratio=interval(0,1)"], ["a,b,c"]),
        (["-m", "sparsity.ratio=glob(*)"], ["groups"]),
        (["-m", "pruner=glob(x*)"], ["no option matches", "wanda_sp"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value else "",
)
def test_a_wrong_override_is_answered_in_one_line(refused, given, parts):
    lines = refused(*given)
    check_lines(lines)
    mentions(lines, *parts)


def test_a_long_answer_keeps_its_beginning_and_its_end():
    line = one_line("key=value: " + "x" * 5000 + "; the way out")
    assert line.startswith("key=value: x")
    assert line.endswith("; the way out")
    assert len(line) == LONGEST
    assert one_line("a\n\tb\x1b[0m") == "a b\\x1b[0m"
