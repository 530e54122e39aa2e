"""Recovery: ranks, the response mask, merging, resumption after a cut-off, distillation, bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

import cfsp
from cfsp.recover.ranks import importance_guided, matched
from tests.conftest import ROOT, mentions

#: peft uses a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TRAINS = ["recovery.max_steps=6", "recovery.batch_size=4", "recovery.micro_batch_size=2", "recovery.cutoff=32",
          "recovery.log_every=1", "save.dtype=float32", "save.model=true"]  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_ranks_keep_their_sum_and_follow_the_importance(seed):
    chooser = random.Random(seed)
    count, rank = chooser.randint(1, 40), chooser.randint(1, 32)
    importance = [chooser.uniform(1e-3, 1) for _ in range(count)]
    ranks = importance_guided(importance, rank)
    assert sum(ranks) == rank * count
    assert min(ranks) >= 1
    order = sorted(range(count), key=importance.__getitem__)
    assert all(ranks[a] <= ranks[b] for a, b in pairwise(order))
    costs = [chooser.randint(100, 5000) for _ in range(count)]
    even = matched(ranks, costs)
    assert max(even) - min(even) <= 1
    wanted = sum(r * c for r, c in zip(ranks, costs, strict=True))
    if wanted >= sum(costs):
        assert abs(wanted - sum(r * c for r, c in zip(even, costs, strict=True))) <= max(costs)


def test_uniform_importance_is_plain_lora_and_profiles_differ():
    assert importance_guided([0.5] * 7, 8) == [8] * 7
    assert importance_guided([0.4, 0.6], 4) != importance_guided([0.6, 0.4], 4)


def test_only_the_response_is_learnt(tmp_path):
    from transformers import AutoTokenizer

    from cfsp.data.recovery import IGNORED, PROMPT, instructions, locate
    from cfsp.recover.settings import RecoveryData, Training

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "cfsp" / "assets" / "books7m")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Name a river {x}.", "input": "", "output": "The Thames, of course."}))
    settings = Training(RecoveryData("instructions", "rows", path=str(file)), max_steps=1)
    (example,) = instructions(locate(settings.data), settings, tokenizer)
    learnt = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    text = tokenizer.decode(learnt, skip_special_tokens=True)
    assert text.strip() == "The Thames, of course."
    assert learnt[-1] == tokenizer.eos_token_id
    prompt = tokenizer.decode(example.input_ids[: -len(learnt)], skip_special_tokens=True)
    assert prompt.strip() == PROMPT.format(instruction="Name a river {x}.").strip()


@pytest.mark.parametrize("recovery", ["lora", "ig_lora", "lora_matched", "full"])
@pytest.mark.parametrize(
    "structure",
    [["pruner=cfsp"], ["pruner=flap_al_am"], ["pruner=two_ssp", "sparsity.round_to=1"], ["pruner=shortgpt"]],
    ids=lambda words: words[0],
)
@pytest.mark.usefixtures("one_thread")
def test_every_structure_trains_merges_and_reloads(run_cfsp, sound_words, tmp_path, recovery, structure, prose_file):
    words = [*sound_words, *structure, f"recovery={recovery}", f"recovery.data.path={prose_file}", *TRAINS]
    code, _, err = run_cfsp(*words, "sparsity.ratio=0.5")
    assert code == 0, err
    out = tmp_path / "out"
    record = json.loads((out / "record.json").read_text())["recovery"]
    assert record["steps"] == 6
    assert len(record["history"]) == 6
    assert json.loads((out / "model" / "cfsp_checkpoint.json").read_text())["state"] == "recovered"
    assert not (out / "training").exists()
    merged, _ = cfsp.load(out / "model")
    if recovery == "full":
        return
    from peft import PeftModel

    base, _ = cfsp.load(out / "pruned")
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=1e-4)
        assert not torch.equal(before, merged(ids).logits)
    if recovery == "ig_lora":
        ranks = [rank for rank in record["ranks"] if rank is not None]
        assert sum(ranks) == 8 * len(ranks)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_training_goes_on_and_ends_the_same(run_cfsp, sound_words, tmp_path, prose_file):
    words = [*sound_words, "recovery=ig_lora", f"recovery.data.path={prose_file}", *TRAINS, "recovery.max_steps=12"]
    words += ["recovery.checkpoint_every=2", "logger=none"]
    code, _, err = run_cfsp(*words, f"paths.output_dir={tmp_path / 'whole'}")
    assert code == 0, err
    killed = [*words, f"paths.output_dir={tmp_path / 'killed'}", f"paths.cache_dir={tmp_path / 'cache'}",
              f"paths.records_dir={tmp_path / 'other'}"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "cfsp.run", *killed], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    training = tmp_path / "killed" / "training"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(training.glob("checkpoint-*/cfsp_complete.json")):
        time.sleep(0.01)
        if process.poll() is not None:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model").exists()
    (training / "checkpoint-999").mkdir()  # cut off while it was written: no marker
    code, _, err = run_cfsp(*killed)
    assert code == 0, err
    assert "going on from" in (tmp_path / "killed" / "run.log").read_text()
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)
    histories = [json.loads((tmp_path / n / "record.json").read_text())["recovery"] for n in ("whole", "killed")]
    assert histories[0]["tokens"] == histories[1]["tokens"]
    assert [r["step"] for r in histories[1]["history"]] == list(range(1, 13))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("teacher", ["memory", "disk"])
@pytest.mark.parametrize("recovery", ["lora", "full"])
def test_distillation_from_either_teacher_lowers_its_loss(
    run_cfsp, sound_words, tmp_path, prose_file, teacher, recovery
):
    words = [*sound_words, f"recovery={recovery}", f"recovery.data.path={prose_file}", *TRAINS,
             "recovery.objective=distill", f"recovery.teacher={teacher}", "recovery.max_steps=20",
             f"recovery.learning_rate={0.01 if recovery == 'lora' else 0.0003}"]  # fmt: skip
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    losses = [r["loss"] for r in json.loads((tmp_path / "out" / "record.json").read_text())["recovery"]["history"]]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_top_k_loss_with_every_token_is_the_full_divergence():
    from cfsp.recover.distill import kl, kl_top_k

    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    scaled = teacher / 2
    top = scaled.topk(10)
    rest = scaled.scatter(1, top.indices, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(kl_top_k(student, top.values, top.indices, rest, 2.0), kl(student, teacher, 2.0))


def test_sampled_text_needs_no_file(run_cfsp, sound_words, tmp_path):
    words = [*sound_words, "recovery=lora", "recovery/data=self", "recovery.data.n_samples=4", *TRAINS]
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "record.json").read_text())["recovery"]["examples"] == 4


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["recovery.rank=0"], ["recovery.rank=0"]),
        (["recovery.targets=[q_prj]"], ["recovery.targets=q_prj", "q_proj"]),
        (["recovery.cutoff=65"], ["recovery.cutoff=65", "64 positions"]),
        (["recovery.epochs=1"], ["recovery.epochs=1", "recovery.max_steps=6"]),
        (["recovery.batch_size=3"], ["recovery.batch_size=3", "recovery.micro_batch_size=2"]),
        (["recovery/data=text"], ["recovery.data.path=null"]),
        (["recovery.optimizer=adamw_8bit"], ["recovery.optimizer=adamw_8bit", "adamw"]),
    ],
)
def test_bad_input_is_refused_in_one_line(refused, sound_words, words, parts):
    mentions(refused(*sound_words, "recovery=ig_lora", *TRAINS, *words), *parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "empty"),
        ('{"prompt": 1}\n', "row 1"),
        ("{broken\n", "line 1 is not JSON"),
        (json.dumps({"prompt": "long " * 200, "response": "x"}), "nothing to learn"),
    ],
)
def test_bad_rows_are_refused_in_one_line(refused, sound_words, tmp_path, content, part):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    words = [*sound_words, "recovery=lora", *TRAINS, "recovery/data=instructions", f"recovery.data.path={file}"]
    mentions(refused(*words), "recovery.data.path", part)


@pytest.mark.usefixtures("one_thread")
def test_a_loss_that_is_not_finite_stops_and_says_where(run_cfsp, sound_words, tmp_path, prose_file, monkeypatch):
    from cfsp.recover import trainer

    monkeypatch.setattr(trainer.functional, "cross_entropy", lambda flat, *_, **__: flat.sum() * float("nan"))
    code, _, err = run_cfsp(*sound_words, "recovery=lora", f"recovery.data.path={prose_file}", *TRAINS)
    assert code == 1
    assert "step 1" in err
