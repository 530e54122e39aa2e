"""Figures against their definitions, and the table that a person reads."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch._subclasses import FakeTensorMode

from cfsp.config.sections import TextSection
from cfsp.data.limits import Limits
from cfsp.errors import DataError
from cfsp.evaluation.base import Side
from cfsp.evaluation.cost import Cost, measure_peak_besides_weights, measure_size
from cfsp.evaluation.live_tensors import LiveTensors
from cfsp.evaluation.perplexity import Perplexity, negative_log_likelihood
from cfsp.model.tokenizer import load_tokenizer
from cfsp.record.run_record import RunRecord
from cfsp.record.stages import Stages
from cfsp.system.package import ROOT
from cfsp.tables.summary import summary_table
from cfsp.weights.source import _from_folder
from tests.conftest import shared
from tests.helpers.tiny import tiny_model, tokens


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(_from_folder("bundled", ROOT / "assets" / "books7m", origin="bundled"))


def test_nll_is_the_sum_over_predicted_tokens():
    model, ids = tiny_model(), tokens(5, 16)
    total, count = negative_log_likelihood(model, ids, 2, "test")
    with torch.no_grad():
        logs = model(ids).logits.double().log_softmax(-1)
    expected = -sum(logs[n, t, ids[n, t + 1]] for n in range(5) for t in range(15))
    assert count == 5 * 15
    assert total == pytest.approx(float(expected), rel=1e-5)


def perplexity(path, **keys) -> Perplexity:
    return Perplexity(datasets=["mine"], texts={"mine": TextSection(path=str(path))}, **{"seq_len": 16, **keys})


def test_perplexity_states_windows_and_tokens(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("The sea was grey and the harbour lay quiet under the morning fog. " * 40)
    model = tiny_model(vocab_size=4096)
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    (whole,) = perplexity(path).measure(model, tokenizer)
    assert whole.n == len(ids) // 16 * 15
    assert whole.detail["windows"] == [0, len(ids) // 16]
    (part,) = perplexity(path, windows=(2, 5)).measure(model, tokenizer)
    assert (part.n, part.detail["windows"]) == (45, [2, 5])
    windows = torch.tensor(ids[32:80]).reshape(3, 16)
    total, count = negative_log_likelihood(model, windows, 8, "")
    assert part.value == pytest.approx(math.exp(total / count))
    with pytest.raises(DataError, match="windows of 16 tokens"):
        perplexity(path, windows=(0, 10_000)).measure(model, tokenizer)


def test_windows_without_the_bos_that_the_tokenizer_adds_are_said(tmp_path, caplog):
    """stories260K's tokenizer adds BOS (id 1): auto puts it before each window; none is noted everywhere."""
    own = load_tokenizer(_from_folder("own", Path(shared("models", "stories260K")), origin="own"))
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little boy who liked to play in the park. " * 20)
    model, limits = tiny_model(vocab_size=512), Limits(512, 512)
    measured, identities = {}, {}
    for bos in ("auto", "window", "start", "none"):
        evaluator = Perplexity(["mine"], {"mine": TextSection(path=str(path), bos=bos)}, seq_len=16, windows=(0, 3))
        caplog.clear()
        identities[bos] = evaluator.check(own, limits)
        noted = [line for line in caplog.messages if "windows lack the BOS" in line]
        (measured[bos],) = evaluator.measure(model, own)
        assert bool(noted) is measured[bos].detail.get("lacks_bos", False) is (bos in ("start", "none"))
    assert identities["auto"] == identities["window"] != identities["none"]
    assert measured["auto"] == measured["window"]
    assert measured["auto"].detail["bos"] == "window"
    ids = own(path.read_text(), add_special_tokens=False)["input_ids"][:45]
    windows = torch.tensor(ids).reshape(3, 15)
    total, count = negative_log_likelihood(model, torch.nn.functional.pad(windows, (1, 0), value=1), 8, "")
    assert measured["auto"].value == pytest.approx(math.exp(total / count))


def test_the_identity_of_an_evaluation_is_its_content(tmp_path, tokenizer):
    limits = Limits(4096, 512)
    for name, text in (("a.txt", "one text " * 30), ("b.txt", "one text " * 30), ("c.txt", "another " * 30)):
        (tmp_path / name).write_text(text)
    one, same, other = (perplexity(tmp_path / name).check(tokenizer, limits) for name in ("a.txt", "b.txt", "c.txt"))
    assert one == same != other


def test_the_content_of_a_local_task_is_all_that_it_reads(tmp_path):
    """The included YAML, the functions and the data of a task: a change in any of them is another task."""
    from cfsp.evaluation.zero_shot import ZeroShot

    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "helper.py").write_text("def process(docs): return docs\n")
    (tmp_path / "_base.yaml").write_text("dataset_path: json\ndataset_kwargs: {data_files: {test: data.jsonl}}\n")
    (tmp_path / "mine.yaml").write_text("include: _base.yaml\ntask: mine\nprocess_docs: !function helper.process\n")
    check = lambda: ZeroShot(["mine"], include_path=str(tmp_path)).check(None, Limits(10, None))  # noqa: E731
    seen = [check()]
    for name in ("data.jsonl", "helper.py", "_base.yaml", "mine.yaml"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        seen.append(check())
    assert len({str(one) for one in seen}) == 5
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(DataError, match=r"data\.jsonl"):
        check()


def test_cost_counts_and_times_both_sides():
    model = tiny_model(tie_word_embeddings=True)
    rows = {(m.task, m.metric): m.value for m in measure_size(model, torch.bfloat16)}
    assert rows["parameters", "count"] == sum(p.numel() for p in model.parameters())
    assert rows["checkpoint", "bytes"] == 2 * rows["parameters", "count"]
    blocks = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96)
    assert rows["linear_macs", "count"] == blocks + 32 * 128
    sides = [Side(name, contextlib.nullcontext, torch.float32) for name in ("dense", "pruned")]
    found = Cost(prompt_tokens=16, new_tokens=4, repeats=3).measure_sides(model, sides)
    for side in ("dense", "pruned"):
        speeds = [m for m in found[side] if m.metric == "tokens_per_second"]
        assert [m.task for m in speeds] == ["prefill", "decode"]
        assert all(m.n == 3 and len(m.detail["seconds"]) == 3 and m.value > 0 for m in speeds)
        (memory,) = [m for m in found[side] if m.metric == "peak_bytes"]
        assert memory.detail["weights"] == 4 * rows["parameters", "count"] + 4 * 8  # and RoPE's inverse frequencies
        assert memory.value > memory.detail["weights"]


def test_memory_counts_tensors_that_are_alive_at_one_time():
    known = torch.zeros(1000)
    with LiveTensors([known]) as live:
        first = known + 1
        second = first * 2
        del first
        view = second.view(10, 100).t()
        third = view + 1
        del second, view
        known.add_(third.reshape(1000))  # reshape of a transposed tensor copies
    assert live.peak == 2 * 4000

    with LiveTensors([known]) as live:
        described = torch.zeros(10**6, device="meta") + 1
        with FakeTensorMode():
            torch.zeros(10**6)
        made = torch.zeros_like(described, device="cpu")[:10].clone()
    assert live.peak == 4 * 10**6 + made.nbytes, "what is only described takes no memory"

    model = tiny_model()
    short, long = (Cost(prompt_tokens=n, new_tokens=4, repeats=1).measure(model, None)[-1].value for n in (16, 64))
    assert long > short


def test_gpus_are_asked_by_their_number(monkeypatch):
    """model.device=cuda:1 is not the current device, and a model may lie on several."""
    peak = {0: 0, 1: 0, 2: 0}
    synchronised = []

    def number(device: torch.device | int) -> int:
        return device if isinstance(device, int) else device.index

    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: len(peak),
        "synchronize": lambda device: synchronised.append(number(device)),
        "reset_peak_memory_stats": lambda device: peak.__setitem__(number(device), 5),
        "memory_allocated": lambda device: 5,
        "max_memory_allocated": lambda device: peak[number(device)],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def on(index: int) -> SimpleNamespace:
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))

    def call() -> None:
        for device in (1, 2):
            peak[device] += 10 * device

    assert measure_peak_besides_weights([on(1), on(1)], on(1), call) == 10
    assert synchronised == [1, 1]
    assert measure_peak_besides_weights([on(1), on(2)], on(1), call) == 30
    stages = Stages()
    with stages("calibrate"):
        call()
    assert stages.entries[0]["peak_gpu_bytes"] == 3 * 5 + 30


def test_the_table_reads_dense_beside_pruned():
    def rows(ppl, acc):
        return [
            {"suite": "zero_shot", "task": "piqa", "metric": "acc", "value": acc, "stderr": 0.01, "n": 100},
            {
                "suite": "perplexity",
                "task": "wikitext2",
                "metric": "perplexity",
                "value": ppl,
                "seq_len": 1024,
            },
            {"suite": "cost", "task": "parameters", "metric": "count", "value": 1e9},
        ]

    plan = {"achieved": {"ratio": 0.5}, "requested": {"scope": "ffn"}}
    record = RunRecord(
        "id", model={"name": "m"}, method={"name": "cfsp"}, plan=plan,
        measurements={"dense": rows(10.0, 0.8), "pruned": rows(15.0, 0.75)},
    )  # fmt: skip
    console = Console(width=120)
    with console.capture() as captured:
        console.print(summary_table(record))
    text = captured.get()
    assert "cfsp, 50.0% of the ffn parameters removed" in text
    lines = [line for line in text.splitlines() if any(word in line for word in ("parameters  ", "wikitext2", "piqa"))]
    assert ["parameters" in lines[0], "wikitext2" in lines[1], "piqa" in lines[2]] == [True] * 3
    assert "x1.50" in lines[1]
    assert "windows of 1024" in lines[1]
    assert "-5.0" in lines[2]
    assert summary_table(RunRecord("id")) is None
