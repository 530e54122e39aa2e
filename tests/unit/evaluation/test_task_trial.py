"""Task folders are code; what an evaluation needs is tried before anything is calibrated; what was cut is counted."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cfsp.data.limits import Limits
from cfsp.errors import CfspError, ConfigError, DataError, RunError
from cfsp.evaluation import harness as harness_module
from cfsp.evaluation.harness import quiet_harness, with_special_tokens
from cfsp.evaluation.task_folder import local_tasks, read_task
from cfsp.evaluation.zero_shot import ZeroShot
from cfsp.model.load import load_model
from cfsp.model.tokenizer import load_tokenizer
from cfsp.system.package import ROOT
from cfsp.weights.source import _from_folder

LIMITS = Limits(4096, 512)
ROWS = [{"q": f"The sea is {n}", "c": [" wide", " deep", " grey"], "g": n % 3} for n in range(6)]


@pytest.fixture(scope="module")
def source():
    return _from_folder("bundled", ROOT / "assets" / "books7m", origin="bundled")


@pytest.fixture(scope="module")
def tokenizer(source):
    return load_tokenizer(source)


@pytest.fixture(scope="module")
def model(source):
    return load_model(source, dtype=torch.float32, device=torch.device("cpu"))


def write_task(folder: Path, name: str = "mine", rows: list | None = None, **keys) -> Path:
    """A multiple-choice task with its data beside it; ``keys`` replace what the YAML says."""
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (ROWS if rows is None else rows)))
    settings = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}",
        "doc_to_target": "{{g}}", "target_delimiter": "", "metadata": {"version": 1.0},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], **keys,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(f"{key}: {_yaml(value)}" for key, value in settings.items() if value is not None))
    return path


def _yaml(value) -> str:
    return value if isinstance(value, str) and value.startswith("!") else json.dumps(value)


def tasks(folder: Path, *names: str, **keys) -> ZeroShot:
    return ZeroShot(list(names or ["mine"]), include_path=str(folder), **keys)


def refused(evaluator: ZeroShot, tokenizer) -> str:
    """The line that the check refuses with."""
    with pytest.raises(DataError) as caught:
        evaluator.check(tokenizer, LIMITS)
    (line,) = caught.value.problems
    assert "\n" not in line
    assert len(line) < 500
    return line


@pytest.mark.parametrize(
    ("rows", "keys", "parts"),
    [
        ([], {}, ["its data set has no items"]),
        ([{**ROWS[0], "c": [" wide", ""]}], {}, ["IndexError"]),
        ([ROWS[0], ROWS[1], {**ROWS[2], "c": [" wide", ""]}], {}, ["item 3", "a choice is empty"]),
        ([{"q": "a", "c": [" b"]}], {}, ["'g' is undefined"]),
        ([{**ROWS[0], "g": 7}], {}, ["IndexError"]),
        ([ROWS[0], {**ROWS[1], "g": 7}], {}, ["item 2", "target '7' is none of its 3 choices"]),
        (None, {"doc_to_text": "{{ q.nothing() }}"}, ["UndefinedError"]),
        (None, {"doc_to_text": "{{ cycler.__init__.__globals__.os.system('true') }}"}, ["SecurityError"]),
        (None, {"metric_list": [{"metric": "no_such"}]}, []),
        (None, {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 600}}, ["600", "512 positions"]),
        (None, {"test_split": "train"}, ["no split 'train'"]),
        (None, {"unsafe_code": True}, ["unsafe_code"]),
    ],
    ids=["no items", "empty choice", "a later one", "field", "target", "a later target", "error", "sandbox", "metric",
         "positions", "split", "unsafe"],
)  # fmt: skip
def test_what_would_end_an_evaluation_ends_the_check(tmp_path, tokenizer, rows, keys, parts):
    write_task(tmp_path, rows=rows, **keys)
    line = refused(tasks(tmp_path), tokenizer)
    for part in ("evaluation.zero_shot.tasks=mine", *parts):
        assert part in line


def test_a_sound_task_is_tried_once_in_a_process(tmp_path, tokenizer, monkeypatch):
    write_task(tmp_path)
    evaluator = tasks(tmp_path)
    first = evaluator.check(tokenizer, LIMITS)
    monkeypatch.setattr(harness_module, "task_manager", None)  # a second trial would call it
    assert evaluator.check(tokenizer, LIMITS) == first


def test_an_error_of_the_evaluation_names_the_task(tmp_path, tokenizer, model):
    (tmp_path / "code.py").write_text("def late(doc, results):\n    raise KeyError('late')\n")
    write_task(tmp_path, process_results="!function code.late")
    evaluator = tasks(tmp_path)
    evaluator.check(tokenizer, LIMITS)
    with pytest.raises(RunError, match=r"evaluation\.zero_shot\.tasks=mine: lm-eval failed \(KeyError: 'late'\)"):
        evaluator.measure(model, tokenizer)


def test_a_tokenizer_without_special_tokens_takes_those_of_the_configuration(tmp_path, source):
    write_task(tmp_path)
    nameless = load_tokenizer(source)
    nameless.bos_token = nameless.eos_token = None
    assert nameless.declared_ids == {"bos": 1, "eos": 2}
    named = with_special_tokens(nameless)
    assert (named.bos_token_id, named.eos_token_id) == (1, 2)
    assert named("The sea.")["input_ids"] == nameless("The sea.")["input_ids"]
    tasks(tmp_path).check(nameless, LIMITS)
    nameless.declared_ids = {}
    assert "names neither BOS nor EOS" in refused(tasks(tmp_path), nameless)
    # One that names EOS alone starts from EOS, as before.
    nameless.declared_ids, nameless.eos_token = {"bos": 1}, "</s>"
    assert with_special_tokens(nameless).bos_token_id is None


# Folders


@pytest.mark.parametrize(
    "function", ["os.system", "sub.system", "../outside.run", "/outside.run", "linked.run", "single", "a..run"]
)
def test_a_function_lies_in_the_folder(tmp_path, tokenizer, function):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "outside.py").write_text("def run(doc):\n    raise SystemExit('it ran')\n")
    (folder / "linked.py").symlink_to(tmp_path / "outside.py")
    write_task(folder, doc_to_text=f"!function {function}")
    assert "its module has to be a .py file in" in refused(tasks(folder), tokenizer)


def test_what_is_included_lies_in_the_folder(tmp_path, tokenizer):
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(tmp_path, "outside")
    for include in ("../outside.yaml", str(tmp_path / "outside.yaml"), "linked_yaml"):
        (folder / "linked_yaml").unlink(missing_ok=True)
        (folder / "linked_yaml").symlink_to(tmp_path / "outside.yaml")
        (folder / "mine.yaml").write_text(f"include: {include}\ntask: mine\n")
        assert "leads outside" in refused(tasks(folder), tokenizer)
    (folder / "mine.yaml").unlink()
    (folder / "mine.yaml").symlink_to(tmp_path / "outside.yaml")
    assert "leads outside" in refused(tasks(folder, "outside"), tokenizer)
    (folder / "mine.yaml").unlink()
    (folder / "mine.yaml").write_text("include: mine.yaml\ntask: mine\n")
    assert "includes itself" in refused(tasks(folder), tokenizer)


def test_yaml_that_never_ends_is_refused(tmp_path):
    bomb = "\n".join(
        [f"a0: &a0 [{','.join('x' * 9)}]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
    )
    for text in (bomb, "task: &a [*a]", "[" * 100_000):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(DataError, match="is not a task YAML"):
            read_task(tmp_path / "mine.yaml", "evaluation.zero_shot")
    (tmp_path / "mine.yaml").unlink()
    os.mkfifo(tmp_path / "mine.yaml")
    with pytest.raises(DataError, match="FIFO"):
        local_tasks(str(tmp_path), "evaluation.zero_shot")


def test_a_folder_of_tasks_needs_the_word(tmp_path):
    from cfsp.config.compose import compose
    from cfsp.config.parse import parse

    words = ["evaluation=tables", f"evaluation.generation.include_path={tmp_path}"]
    with pytest.raises(ConfigError, match=r"evaluation\.generation\.include_path=.*plugins\.allow=\[tasks\]"):
        parse(compose(words))
    parsed = parse(compose([*words, "plugins.allow=[tasks]"]))
    assert [part.instance.key for part in parsed.evaluation.values()] == [
        f"evaluation.{name}" for name in parsed.evaluation
    ]
    assert [part.key for part in parsed.evaluation["generation"].instance.parts().values()] == ["evaluation.generation"]
    (tmp_path / "link").symlink_to(ROOT / "assets" / "tasks")
    parse(compose(["evaluation=quick", f"evaluation.zero_shot.include_path={tmp_path}/link"]))  # cfsp's own


def test_the_harness_is_left_as_it_was(tmp_path, monkeypatch):
    import lm_eval.evaluator
    import lm_eval.tasks._factory
    import lm_eval.utils

    def state() -> list:
        return [lm_eval.utils.env, lm_eval.evaluator.add_env_info, lm_eval.tasks._factory.load_yaml]

    before = state()
    with contextlib.suppress(KeyboardInterrupt), quiet_harness(tmp_path):
        assert not set(map(id, before)) & set(map(id, state()))
        assert lm_eval.utils.apply_template("{{ a | regex_replace('b', 'c') }}\n", {"a": "abc"}) == "acc\n"
        raise KeyboardInterrupt
    assert state() == before


# Figures


def test_requests_that_are_cut_are_counted_by_task(tmp_path, tokenizer, model, monkeypatch):
    """Contexts of 600 tokens on 512 positions; the git and pip of lm-eval's reports are not called."""
    long = [{**row, "q": "sea " * 600} for row in ROWS[:2]]
    write_task(tmp_path, "cut", rows=[*long, *ROWS[2:]])
    write_task(tmp_path, "whole")
    answers = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{c[0]}}"}
    generation = {"generation_kwargs": {"until": ["."], "max_gen_toks": 4}}
    exact = {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    write_task(tmp_path, "told", rows=[*long, *ROWS[2:]], **answers, **generation, **exact)

    def no_process(*arguments, **settings):
        raise AssertionError(arguments)

    monkeypatch.setattr(subprocess, "check_output", no_process)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    rows = tasks(tmp_path, "cut", "whole", "told", batch_size=4).measure(model, tokenizer)
    assert {row.task: row.detail["truncated"] for row in rows} == {"cut": 6, "whole": 0, "told": 2}


def test_streamed_requests_are_counted_alike(tmp_path, tokenizer, source):
    from cfsp.architecture.weights import weights_of
    from cfsp.model.hidden_states import SpillBuffer
    from cfsp.model.load import load_streamed

    write_task(tmp_path, "cut", rows=[{**ROWS[0], "q": "sea " * 600}, ROWS[1]])
    disk = load_streamed(source, dtype=torch.float32, device=torch.device("cpu"))
    weights_of(disk).spill = SpillBuffer(0, tmp_path)
    (row,) = tasks(tmp_path, "cut").measure(disk, tokenizer)
    assert row.detail["truncated"] == 3


def test_a_group_says_what_its_members_were_measured_on(tmp_path, tokenizer, model):
    """A local group with a relative data file each, and a share of the items as lm-eval takes it."""
    write_task(tmp_path, "first", tag="both")
    write_task(tmp_path, "second", rows=ROWS[:3], tag="both")
    (tmp_path / "mine.yaml").write_text(
        "group: mine\ntask: [first, second]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    evaluator = tasks(tmp_path, limit=0.5)
    content = evaluator.check(tokenizer, LIMITS)["local"]["mine"]
    measured = {row.task: row for row in evaluator.measure(model, tokenizer)}
    assert {name: row.n for name, row in measured.items()} == {"first": 3, "second": 2, "mine": 5}
    group = measured["mine"]
    assert (group.split, group.num_fewshot, group.limit) == ("test", 0, 0.5)
    assert {name: member["n"] for name, member in group.detail["members"].items()} == {"first": 3, "second": 2}
    for name, member in group.detail["members"].items():
        assert member["task_hash"] == measured[name].detail["task_hash"] is not None
    assert group.detail["truncated"] == 0
    assert {row.task: row.n for row in tasks(tmp_path, "both").measure(model, tokenizer)} == {"first": 6, "second": 3}
    (tmp_path / "second.jsonl").write_text(json.dumps(ROWS[5]) + "\n")
    assert evaluator.check(tokenizer, LIMITS)["local"]["mine"] != content


def test_a_group_of_groups_is_its_leaves():
    """As lm-eval gives the results of mmlu."""
    sample = {"doc_hash": "1", "prompt_hash": "2", "target_hash": "3"}
    results = {
        "results": {name: {"acc,none": 0.5} for name in ("mmlu", "stem", "a", "b")},
        "group_subtasks": {"mmlu": ["stem", "b"], "stem": ["a"]},
        "n-samples": {"a": {"effective": 3}, "b": {"effective": 4}},
        "n-shot": {"a": 5, "b": 5, "mmlu": 5, "stem": 5},
        "configs": {"a": {"test_split": "test"}, "b": {"test_split": "test"}},
        "versions": {}, "samples": {"a": [sample], "b": [sample, sample]},
    }  # fmt: skip
    rows = {row.task: row for row in ZeroShot(["mmlu"])._measurements(results, 512, Counter(b=2))}
    assert [(rows[name].n, rows[name].num_fewshot) for name in ("mmlu", "stem", "a")] == [(7, 5), (3, 5), (3, 5)]
    assert list(rows["mmlu"].detail["members"]) == ["a", "b"]
    assert rows["mmlu"].detail["truncated"] == 2


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("evaluation.zero_shot.limit", "1.5", "a share of them between 0 and 1"),
        ("evaluation.zero_shot.batch_size", "auto", "give a whole number from 1"),
        ("evaluation.perplexity.windows", "24", "expected [first, end], e.g. [0,24]"),
        ("evaluation.perplexity.windows", "[-1,4]", "expected [first, end], e.g. [0,24]"),
        ("evaluation.perplexity.batch_size", "true", "expected a whole number"),
    ],
)
def test_values_in_the_words_of_the_key(key, value, sentence):
    from cfsp.config.compose import compose
    from cfsp.config.parse import parse

    with pytest.raises(CfspError) as caught:
        parse(compose([f"{key}={value}"]))
    assert caught.value.problems[0].startswith(f"{key}={value}: ")
    assert sentence in caught.value.problems[0]


def test_data_that_is_not_to_be_had_names_the_key(tmp_path, monkeypatch, tokenizer):
    import datasets

    def none(*arguments, **settings):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'nq_open' is a gated dataset on the Hub.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", none)
    write_task(tmp_path, "nq_open")
    evaluator = tasks(tmp_path, "nq_open")
    object.__setattr__(evaluator, "key", "evaluation.generation")
    line = refused(evaluator, tokenizer)
    assert line.startswith("evaluation.generation.tasks=nq_open: the data set is gated")
    assert "accept its licence on its page" in line
    assert "HF_TOKEN" in line


def test_memory_errors_pass_as_they_are(monkeypatch):
    from cfsp.evaluation.task_trial import name_task_in_errors

    with pytest.raises(torch.OutOfMemoryError), name_task_in_errors("evaluation.zero_shot", "mine", checking=False):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_marks_stand_in_the_table_of_a_run():
    from rich.console import Console

    from cfsp.record.run_record import RunRecord
    from cfsp.tables.metrics import note_marks
    from cfsp.tables.summary import summary_table

    rows = [
        {
            "suite": "perplexity", "task": "t", "metric": "perplexity", "value": 9.0, "seq_len": 8,
            "detail": {"lacks_bos": True},
        },
        {"suite": "zero_shot", "task": "z", "metric": "acc", "value": 0.5, "detail": {"truncated": 3}},
        {"suite": "zero_shot", "task": "y", "metric": "acc", "value": 0.5, "detail": {"truncated": 0}},
        {"suite": "zero_shot", "task": "x", "metric": "acc", "value": 0.5},
    ]  # fmt: skip
    assert [note_marks(row) for row in rows] == [("†",), ("‡",), (), ()]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(summary_table(RunRecord("id", measurements={"dense": rows})))
    text = " ".join(captured.get().split())
    assert "9.00†" in text
    assert "0.500‡" in text
    assert "† windows lack the BOS that the tokenizer adds by itself" in text
    assert "‡ requests longer than the model's positions were cut on the left" in text


def test_a_tokenizer_is_asked_what_it_adds():
    from cfsp.config.sections import TextSection
    from cfsp.data.text import added_before, lacks_added_tokens, resolve_bos, window_bos_id

    def fake(before: list[int], after: list[int], bos_id: int | None):
        def ids(text, add_special_tokens=True, **_):
            return {"input_ids": [*before, 7, 8, *after] if add_special_tokens else [7, 8]}

        fake_tokenizer = SimpleNamespace(bos_token_id=bos_id)
        return type("Fake", (), {"__call__": staticmethod(ids), **vars(fake_tokenizer)})()

    section = TextSection(path="x")
    assert section.bos == "auto"
    cases = [  # before, after, BOS -> what auto means, and what then still lacks
        (([1], [], 1), "window", False),
        (([], [], 1), "none", False),
        (([], [2], 1), "none", False),
        (([1], [2], None), "window", False),
        (([5, 1], [], 1), "none", True),
        (([5], [], 1), "none", True),
    ]
    for arguments, expected, lacking in cases:
        one = fake(*arguments)
        assert added_before(one) == arguments[0]
        assert resolve_bos(section, one).bos == expected
        assert lacks_added_tokens(resolve_bos(section, one), one) is lacking
        if expected == "window":
            assert window_bos_id(one, "window", "key") == 1
        assert resolve_bos(section.model_copy(update={"bos": "start"}), one).bos == "start"


@pytest.mark.parametrize("name", ["tasks/x.yaml", "x.yml", "folder/task"])
def test_a_path_in_the_place_of_a_task_is_refused_without_listing_the_harness_tasks(monkeypatch, name):
    monkeypatch.setattr("cfsp.evaluation.harness.harness_tasks", None)  # it takes seconds, so it must not be called
    with pytest.raises(ConfigError, match=r"include_path=FOLDER"):
        ZeroShot(tasks=[name], include_path=None).check_settings()


@pytest.mark.parametrize(("stated", "used"), [(0, 0), (None, 1)])
def test_examples_that_a_task_does_not_take_are_told_and_recorded(tmp_path, tokenizer, model, caplog, stated, used):
    keys = {} if stated is None else {"num_fewshot": stated}
    write_task(tmp_path, f"shots{used}", fewshot_split="test", **keys)
    evaluator = ZeroShot(tasks=[f"shots{used}"], include_path=str(tmp_path), num_fewshot=1, limit=2)
    evaluator.check(tokenizer, LIMITS)
    (first, *_) = evaluator.measure(model, tokenizer)
    assert first.num_fewshot == used
    assert first.detail.get("num_fewshot_not_used") == (None if used else 1)
    assert ("num_fewshot=1: not used for the task shots0" in caplog.text) == (not used)
