"""Recovery: ranks, the response mask, merging, resumption after a cut-off, distillation, bad input."""

from __future__ import annotations

import json
import linecache
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

import cfsp
from cfsp.recovery.ranks import even_ranks, importance_guided_ranks
from tests.conftest import POSITIONS, ROOT, SENTENCE, VOCABULARY, mentions, save_with_tokenizer
from tests.helpers.tiny import tiny_model
from tests.helpers.training import TRAINS

#: peft uses a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("seed", range(40))
def test_ranks_keep_their_sum_and_follow_the_importance(seed):
    chooser = random.Random(seed)
    count, rank = chooser.randint(1, 40), chooser.randint(1, 32)
    importance = [chooser.uniform(1e-3, 1) for _ in range(count)]
    ranks = importance_guided_ranks(importance, rank)
    assert sum(ranks) == rank * count
    assert min(ranks) >= 1
    order = sorted(range(count), key=importance.__getitem__)
    assert all(ranks[a] <= ranks[b] for a, b in pairwise(order))
    costs = [chooser.randint(100, 5000) for _ in range(count)]
    even = even_ranks(ranks, costs)
    assert max(even) - min(even) <= 1
    wanted = sum(r * c for r, c in zip(ranks, costs, strict=True))
    if wanted >= sum(costs):
        assert abs(wanted - sum(r * c for r, c in zip(even, costs, strict=True))) <= max(costs)


@pytest.mark.parametrize("seed", range(40))
def test_another_profile_gives_other_ranks(seed):
    """From rank 4 on, where the importance differs by half: the extremes never get the same rank."""
    chooser = random.Random(seed)
    count, rank = chooser.randint(2, 40), chooser.randint(4, 32)
    importance = [chooser.uniform(0.5, 1) for _ in range(count)]
    importance[0], importance[1] = 0.5, max(0.75, *importance)
    ranks = importance_guided_ranks(importance, rank)
    assert ranks[1] > ranks[0]
    swapped = [importance[1], importance[0], *importance[2:]]
    assert importance_guided_ranks(swapped, rank) != ranks


def test_uniform_importance_is_plain_lora_and_profiles_differ():
    assert importance_guided_ranks([0.5] * 7, 8) == [8] * 7
    assert importance_guided_ranks([0.4, 0.6], 4) != importance_guided_ranks([0.6, 0.4], 4)


def test_only_the_response_is_learnt(tmp_path):
    from transformers import AutoTokenizer

    from cfsp.recovery.data import IGNORED, PROMPT, locate_file, read_instructions
    from cfsp.recovery.settings import RecoveryData, Training

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "cfsp" / "assets" / "books7m")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Name a river {x}.", "input": "", "output": "The Thames, of course."}))
    settings = Training(RecoveryData("instructions", "rows", path=str(file)), max_steps=1)
    (example,) = read_instructions(locate_file(settings.data), settings, tokenizer)
    learnt = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    text = tokenizer.decode(learnt, skip_special_tokens=True)
    assert text.strip() == "The Thames, of course."
    assert learnt[-1] == tokenizer.eos_token_id
    prompt = tokenizer.decode(example.input_ids[: -len(learnt)], skip_special_tokens=True)
    assert prompt.strip() == PROMPT.format(instruction="Name a river {x}.").strip()


def learnt(rows, tmp_path, tokenizer) -> list[list[int]]:
    """The learnt ids of each row."""
    from cfsp.recovery.data import IGNORED, locate_file, read_instructions
    from cfsp.recovery.settings import RecoveryData, Training

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = Training(RecoveryData("instructions", "rows", path=str(file)), max_steps=1)
    examples = read_instructions(locate_file(settings.data), settings, tokenizer)
    return [[label for label in example.labels if label != IGNORED] for example in examples]


def test_a_response_that_shares_a_token_with_the_prompts_last_space_is_learnt(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "cfsp" / "assets" / "books7m")
    rows = [
        {"prompt": "Is it so? Answer: ", "response": "Yes"},
        {"prompt": "Is it so?\n", "response": "\nNo"},
        {"prompt": "Left out.", "response": " "},
    ]
    found = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in learnt(rows, tmp_path, tokenizer)]
    assert found == ["Yes", "No"]


def test_a_slow_tokenizer_ends_a_row_once(tmp_path):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    (found,) = learnt([{"prompt": "Q: ", "response": "Yes"}], tmp_path, tokenizer)
    assert tokenizer.decode(found) == "Yes</s>"


ROWS = [
    {"instruction": "Name a river.", "input": "", "output": "The Thames."},
    {"instruction": "Name a city.", "input": "in France", "output": "Paris\u2028, of course."},
]


@pytest.mark.parametrize("form", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_rows_are_read_from_every_form(tmp_path, form):
    import gzip

    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer

    from cfsp.recovery.data import locate_file, read_instructions
    from cfsp.recovery.settings import RecoveryData, Training

    file = tmp_path / f"rows.{form}"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif form == "json":
        file.write_text(json.dumps(ROWS))
    elif form == "jsonl":
        file.write_text(lines)
    else:
        with gzip.open(file, "wt", encoding="utf-8") as stream:
            stream.write(lines)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "cfsp" / "assets" / "books7m")
    settings = Training(RecoveryData("instructions", "rows", path=str(file)), max_steps=1)
    found = [
        tokenizer.decode(example.input_ids)
        for example in read_instructions(locate_file(settings.data), settings, tokenizer)
    ]
    assert len(found) == 2
    assert "### Input" not in found[0]
    assert "### Input:\nin France" in found[1]
    packed = Training(RecoveryData("instructions", "rows", path=str(file)), max_steps=1, packing=True, cutoff=512)
    (one,) = read_instructions(locate_file(packed.data), packed, tokenizer)
    assert tokenizer.decode(one.input_ids) == "".join(found)
    assert len(one.labels) == len(one.input_ids)


@pytest.mark.parametrize("recovery", ["lora", "ig_lora", "lora_matched", "full"])
@pytest.mark.parametrize(
    "structure",
    [
        ["pruner=cfsp"],
        ["pruner=flap_al_am"],
        ["pruner=two_ssp", "sparsity.round_to=1"],
        ["pruner=block_pruner"],
        ["pruner=shortgpt"],
    ],
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
    assert not list((tmp_path / "cache" / "progress").iterdir())
    merged, _ = cfsp.load(out / "model")
    if recovery == "full":
        return
    from peft import PeftModel

    base, _ = cfsp.load(out / "pruned")
    assert f"base_model: {out / 'pruned'}" in (out / "adapter" / "README.md").read_text()
    mode = (out / "adapter" / "adapter_model.safetensors").stat().st_mode
    assert mode & 0o666 == (out / "record.json").stat().st_mode & 0o666
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
@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "llama_bias"])
@pytest.mark.parametrize("pruner", ["flap_al_am", "llm_pruner", "two_ssp"])
def test_every_architecture_trains_merges_and_reloads(
    run_cfsp, sound_words, tmp_path, architecture, pruner, prose_file
):
    """Biases, query and key norms, fewer heads, no attention: the merged folder and the adapter on its base agree."""
    from peft import PeftModel

    model = tiny_model(architecture, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)
    folder = save_with_tokenizer(model, tmp_path / architecture)
    words = [*sound_words, f"model.path={folder}", f"pruner={pruner}", "recovery=ig_lora", "sparsity.ratio=0.4"]
    words += [f"recovery.data.path={prose_file}", *TRAINS, "sparsity.round_to=1", "sparsity.protect=none"]
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    ids = torch.arange(40)[None]
    with torch.no_grad():
        merged, _ = cfsp.load(tmp_path / "out" / "model")
        base, _ = cfsp.load(tmp_path / "out" / "pruned")
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=1e-4)
        assert not torch.equal(before, merged(ids).logits)


@pytest.mark.usefixtures("one_thread")
def test_out_of_memory_names_the_knobs_of_the_training(run_cfsp, sound_words, prose_file, monkeypatch):
    from cfsp.recovery import trainer

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(trainer.functional, "cross_entropy", full)
    code, _, err = run_cfsp(*sound_words, "recovery=lora", f"recovery.data.path={prose_file}", *TRAINS)
    assert code == 1
    assert "recovery.micro_batch_size" in err
    assert "recovery.gradient_checkpointing=true" in err
    assert "calibration" not in err.splitlines()[-1]


#: Runs cfsp and kills it hard: at an optimiser step, or in the middle of the checkpoint of a step.
KILLED = """
import os, signal, sys
from transformers import Trainer
from cfsp.run import main

where, step = sys.argv.pop(1), int(sys.argv.pop(1))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def before(method):
    real = getattr(Trainer, method)
    def call(self, *args, **kwargs):
        if self.state.global_step == step:
            die()
        return real(self, *args, **kwargs)
    setattr(Trainer, method, call)

if where == "step":
    before("training_step")
elif where == "checkpoint":
    before("_save_rng_state")
else:
    from cfsp.pipeline import stages
    real, calls = stages.round_to_stored, []
    stages.round_to_stored = lambda *given: die() if calls else calls.append(real(*given))
main()
"""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(slice(2, None, 2), id="step and merge"),
        pytest.param(slice(None), id="five", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_a_training_goes_on_and_ends_the_same(
    run_cfsp, sound_words, tmp_path, prose_file, moments
):
    words = [*sound_words, "recovery=ig_lora", f"recovery.data.path={prose_file}", *TRAINS, "recovery.max_steps=24"]
    words += ["recovery.checkpoint_every=3", "logger=none"]
    code, _, err = run_cfsp(*words, f"paths.output_dir={tmp_path / 'whole'}")
    assert code == 0, err
    killed = [*words, f"paths.output_dir={tmp_path / 'killed'}", f"paths.cache_dir={tmp_path / 'cache'}",
              f"paths.records_dir={tmp_path / 'other'}"]  # fmt: skip
    run_id = json.loads((tmp_path / "whole" / "record.json").read_text())["run_id"]
    training = tmp_path / "cache" / "progress" / run_id / "training"
    chooser = random.Random(0)
    first, second = sorted(chooser.sample(range(1, 12), 2))
    ends = [("step", first), ("checkpoint", 3 * (second // 3) + 3), ("step", chooser.randrange(16, 21))]
    ends = [*ends, ("checkpoint", 21), ("merged", 0)][moments]
    for where, step in ends:
        process = subprocess.run(
            [sys.executable, "-c", KILLED, where, str(step), *killed], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.returncode == -signal.SIGKILL, (where, step, process.stderr)
        if where == "checkpoint":
            assert (training / f"checkpoint-{step}" / "adapter_model.safetensors").is_file()
        assert not (tmp_path / "killed" / "model").exists()
        assert json.loads((tmp_path / "killed" / "record.json").read_text())["status"] == "failed"
    code, _, err = run_cfsp(*killed)
    assert code == 0, err
    went_on = re.findall(r"going on from checkpoint-(\d+)", (tmp_path / "killed" / "run.log").read_text())
    expected = [step // 3 * 3 if where == "step" else step - 3 for where, step in ends if where != "merged"]
    assert [int(step) for step in went_on] == [step for step in expected if step]
    assert "24 steps were done before" in (tmp_path / "killed" / "run.log").read_text()
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)
    before, after = (json.loads((tmp_path / n / "record.json").read_text())["recovery"] for n in ("whole", "killed"))
    assert before["tokens"] == after["tokens"]
    assert [row["step"] for row in after["history"]] == list(range(1, 25))
    for one, other in zip(before["history"], after["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert not training.exists()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("checkpoint-4", "optimizer.pt"), ("checkpoint-4", "adapter_model.safetensors"),
        ("checkpoint-4", "trainer_state.json"), ("checkpoint-4", "cfsp_complete.json"),
        ("trained", "weights.safetensors"), ("trained", "cfsp_complete.json"), ("teacher", "rest.npy"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_not_gone_on_from(run_cfsp, sound_words, tmp_path, prose_file, monkeypatch, folder, file):
    from cfsp.pipeline import stages

    words = [*sound_words, "recovery=lora", f"recovery.data.path={prose_file}", *TRAINS, "recovery.checkpoint_every=4"]
    words += ["recovery.objective=distill", "recovery.teacher=disk"]
    code, _, err = run_cfsp(*words, f"paths.output_dir={tmp_path / 'whole'}")
    assert code == 0, err
    with monkeypatch.context() as patch:  # killed, as it were, right after the training
        patch.setattr(stages, "draw_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_cfsp(*words)[0] == 1
    (training,) = (tmp_path / "cache" / "progress").glob("*/training")
    if folder == "checkpoint-4":
        shutil.rmtree(training / "trained")
    damaged = training / folder / file
    damaged.write_bytes(b"[]" if file.endswith("complete.json") else damaged.read_bytes()[:-1])
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    log = (tmp_path / "out" / "run.log").read_text()
    assert "steps were done before" not in log or folder == "teacher"
    assert ("going on from checkpoint-4" in log) == (folder == "trained")
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.usefixtures("one_thread")
def test_a_killed_training_goes_on_in_another_folder(run_cfsp, sound_words, tmp_path, prose_file, monkeypatch):
    """The default paths.output_dir is a new one each time."""
    from cfsp.pipeline import stages

    words = [*sound_words, "recovery=lora", f"recovery.data.path={prose_file}", *TRAINS]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "draw_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_cfsp(*words, f"paths.output_dir={tmp_path / 'first'}")[0] == 1
    code, _, err = run_cfsp(*words, f"paths.output_dir={tmp_path / 'second'}")
    assert code == 0, err
    assert "6 steps were done before" in (tmp_path / "second" / "run.log").read_text()
    assert (tmp_path / "second" / "plan.json").is_file()
    assert not list((tmp_path / "cache" / "progress").iterdir())


@pytest.mark.usefixtures("one_thread")
def test_force_begins_again(run_cfsp, sound_words, tmp_path, prose_file, monkeypatch):
    from cfsp.pipeline import stages

    words = [*sound_words, "recovery=lora", f"recovery.data.path={prose_file}", *TRAINS, "recovery.checkpoint_every=4"]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "draw_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_cfsp(*words)[0] == 1
    assert list((tmp_path / "cache" / "progress").glob("*/training/trained"))
    code, _, err = run_cfsp(*words, "force=true")
    assert code == 0, err
    log = (tmp_path / "out" / "run.log").read_text()
    assert "going on from" not in log
    assert "done before" not in log


@pytest.mark.usefixtures("one_thread")
def test_the_run_id_holds_what_decides_the_training_and_nothing_else(
    run_cfsp, sound_words, tmp_path, prose_file, monkeypatch
):
    base = [*sound_words, "recovery=lora", *TRAINS, "recovery.max_steps=1", "recovery.warmup_steps=0"]
    same, other = tmp_path / "same.txt", tmp_path / "same.jsonl"
    for file in (same, other):
        file.write_text("\n".join(json.dumps({"text": f"{at}: {SENTENCE}"}) for at in range(60)))

    def run_id(number, *words):
        out = tmp_path / f"run{number}"
        code, _, err = run_cfsp(*base, *words, f"paths.output_dir={out}")
        assert code == 0, err
        record = json.loads((out / "record.json").read_text())
        return record["run_id"], record["recovery"]["history"][0]["loss"]

    (first, loss), (as_rows, _) = run_id(0, f"recovery.data.path={same}"), run_id(1, f"recovery.data.path={other}")
    assert first != as_rows
    alike = run_id(2, f"recovery.data.path={same}", "recovery.data.name=x", "recovery.log_every=2")
    assert alike == (first, loss)
    assert run_id(3, f"recovery.data.path={same}", "recovery.alpha=8")[0] != first
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_id(5, f"recovery.data.path={same}") == (first, loss)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_steps_are_not_lost_in_16_bits(run_cfsp, sound_words, tmp_path, prose_file, monkeypatch, dtype):
    """Trained in float32, as the same weights are at model.dtype=float32; stored as they were."""
    words = [*sound_words, "recovery=full", f"recovery.data.path={prose_file}", *TRAINS, f"save.dtype={dtype}"]
    words += ["recovery.learning_rate=0.00002"]
    found = {}
    for name in ("float32", dtype):
        code, _, err = run_cfsp(*words, f"model.dtype={name}", f"paths.output_dir={tmp_path / name}")
        assert code == 0, err
        found[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    for name, tensor in found["float32"].items():
        assert found[dtype][name].dtype == tensor.dtype
        torch.testing.assert_close(found[dtype][name].float(), tensor.float(), rtol=0.02, atol=2e-3)


@pytest.mark.usefixtures("one_thread")
def test_the_history_has_every_step_and_survives_a_resumption(run_cfsp, sound_words, tmp_path, prose_file, monkeypatch):
    from transformers import Trainer

    words = [*sound_words, "recovery=lora", f"recovery.data.path={prose_file}", *TRAINS, "recovery.max_steps=12"]
    words += ["recovery.log_every=5", "recovery.checkpoint_every=4"]
    code, _, err = run_cfsp(*words, f"paths.output_dir={tmp_path / 'whole'}")
    assert code == 0, err
    real = Trainer.training_step

    def cut_off(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", cut_off)
        assert run_cfsp(*words)[0] == 1
    code, _, err = run_cfsp(*words, "recovery.checkpoint_every=3")
    assert code == 0, err
    whole, again = (json.loads((tmp_path / n / "record.json").read_text())["recovery"] for n in ("whole", "out"))
    assert [row["step"] for row in whole["history"]] == [5, 10, 12]
    assert whole["history"] == again["history"]


def test_the_dense_teacher_copies_only_what_is_trained():
    from cfsp.recovery.distill import DenseInMemory

    model = tiny_model()
    up = model.model.layers[0].mlp.up_proj.weight
    teacher = DenseInMemory(model, {id(p) for p in model.parameters() if p is not up}).model
    assert teacher.model.layers[0].mlp.up_proj.weight is up
    assert teacher.lm_head.weight is not model.lm_head.weight
    assert not teacher.lm_head.weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_what_only_the_dense_model_has_is_parked_on_the_cpu(monkeypatch):
    from cfsp.model.snapshot import Snapshot

    model, moved = tiny_model(), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    dense = Snapshot(model)
    gone = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(gone[:8].clone())
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self.shape) or cpu(self))
    with dense.parked():
        assert moved == [gone.shape]
    with dense.active():
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.usefixtures("one_thread")
def test_the_split_into_micro_batches_does_not_change_what_is_learnt(run_cfsp, sound_words, tmp_path, prose_file):
    """Rows of different lengths: a mean of means would."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "Say:", "response": SENTENCE[: 5 + 9 * at]}) for at in range(8)))
    words = [*sound_words, "recovery=full", *TRAINS, "recovery/data=instructions", f"recovery.data.path={rows}"]
    weights = []
    for size, extra in ((1, []), (4, []), (4, ["recovery.gradient_checkpointing=true"])):
        out = tmp_path / f"{size}-{len(extra)}"
        given = [*words, *extra, f"recovery.micro_batch_size={size}", f"paths.output_dir={out}"]
        code, _, err = run_cfsp(*given)
        assert code == 0, err
        weights.append(load_file(out / "model" / "model.safetensors"))
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-5)  # Adam's step near a zero gradient


@pytest.mark.usefixtures("one_thread")
def test_bf16_trains_on_a_cpu(run_cfsp, sound_words, tmp_path, prose_file):
    words = [*sound_words, "recovery=lora", f"recovery.data.path={prose_file}", *TRAINS, "recovery.bf16=true"]
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "record.json").read_text())["recovery"]["steps"] == 6


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("bf16", ["true", "false"])
def test_what_full_training_is_evaluated_as_is_what_it_saved(run_cfsp, sound_words, tmp_path, prose_file, bf16):
    """Autocast belongs to the training: the record's figure is that of the folder, in its own process or later."""
    evaluated = [
        "evaluation=perplexity", "evaluation.perplexity.datasets=[text]", "evaluation.perplexity.seq_len=32",
        f"evaluation.perplexity.texts.text.path={prose_file}", "evaluation.perplexity.windows=[0,8]",
    ]  # fmt: skip
    words = [*sound_words, "recovery=full", f"recovery.data.path={prose_file}", *TRAINS, f"recovery.bf16={bf16}"]
    code, _, err = run_cfsp(*words, *evaluated)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    code, _, err = run_cfsp(
        "model=local", f"model.path={tmp_path / 'out' / 'model'}", "pruner=none", *evaluated,
        f"paths.output_dir={tmp_path / 'again'}",
    )  # fmt: skip
    assert code == 0, err
    again = json.loads((tmp_path / "again" / "record.json").read_text())
    assert again["measurements"]["dense"][0]["value"] == record["measurements"]["recovered"][0]["value"]


@pytest.mark.usefixtures("one_thread")
def test_loss_rate_and_ranks_go_to_the_logger_and_the_folder(run_cfsp, sound_words, tmp_path, prose_file, monkeypatch):
    from cfsp.logger.base import NullLogger

    logged, ended = [], []
    monkeypatch.setattr(NullLogger, "log", lambda _, values: logged.append(values))
    monkeypatch.setattr(NullLogger, "finish", lambda _, record, folder: ended.append(record.recovery))
    code, _, err = run_cfsp(*sound_words, "recovery=ig_lora", f"recovery.data.path={prose_file}", *TRAINS)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())["recovery"]
    steps = [values for values in logged if "recovery/loss" in values]
    assert [values["recovery/step"] for values in steps] == list(range(1, 7))
    assert [values["recovery/loss"] for values in steps] == [row["loss"] for row in record["history"]]
    rates = [values["recovery/learning_rate"] for values in steps]
    assert rates == pytest.approx([0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001])  # five steps of warm-up
    assert ended == [record]
    assert (tmp_path / "out" / "recovery.png").read_bytes()[:4] == b"\x89PNG"


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
    from cfsp.recovery.distill import kl, kl_top_k

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
        (["recovery.cutoff=32", "recovery.data.n_samples=0"], ["recovery.data.n_samples=0"]),
        (["recovery.learning_rate=0"], ["recovery.learning_rate=0"]),
        (["recovery.targets=[]"], ["recovery.targets=[]", "all-linear"]),
        (["recovery.targets=[all-linear,q_prj]"], ["recovery.targets=q_prj", "did you mean q_proj"]),
        (["recovery.rank=65"], ["recovery.rank=65", "rank 16", "recovery=full"]),
        (["recovery.warmup_steps=6"], ["recovery.warmup_steps=6", "recovery.max_steps=6"]),
        (["recovery.max_steps=null", "recovery.epochs=0.02"], ["recovery.warmup_steps=5", "about 3 steps"]),
        (["recovery.packing=true"], ["recovery.packing=true", "instructions"]),
        (["recovery.teacher=disk"], ["recovery.teacher=disk", "recovery.objective=distill, and the objective is lm"]),
        (["recovery.distill_temperature=7"], ["recovery.distill_temperature=7", "leave it out"]),
        (["recovery.objective=distill", "recovery.top_k=3"], ["recovery.top_k=3", "recovery.teacher=disk"]),
        (["recovery.response_only=false"], ["recovery.response_only=false", "every token is learnt"]),
        (["recovery/data=self", "recovery.data.path=x.txt"], ["recovery.data.path=x.txt", "sampled from the dense"]),
        (["recovery.name=a/b"], ["recovery.name=a/b"]),
        (["recovery.objective=distil"], ["recovery.objective=distil", "did you mean distill"]),
        (["pruner=none"], ["recovery=ig_lora", "pruner=none", "recovery=none"]),
        (["recovery/data=alpaca"], ["recovery.data.hub.repo=yahma/alpaca-cleaned", "recovery.data.path=FILE"]),
        (["recovery.optimizer=adamw_8bit"], ["recovery.optimizer=adamw_8bit", "adamw"]),
    ],
)
def test_bad_input_is_refused_in_one_line(refused, sound_words, words, parts):
    mentions(refused(*sound_words, "recovery=ig_lora", *TRAINS, *words), *parts)


def test_a_batch_that_the_processes_cannot_share_is_refused(refused, sound_words, prose_file, monkeypatch):
    from cfsp.recovery import train

    monkeypatch.setattr(train.processes, "launched", lambda: train.processes.Launched(0, 4, 0))
    monkeypatch.setattr(train.processes, "connect", lambda: None)
    monkeypatch.setattr("cfsp.model.device.launched", lambda: train.processes.Launched(0, 1, 0))
    words = [*sound_words, "recovery=ig_lora", f"recovery.data.path={prose_file}", *TRAINS]
    mentions(refused(*words), "recovery.batch_size=4", "4 processes", "recovery.micro_batch_size=2", "multiple of 8")


@pytest.mark.usefixtures("one_thread")
def test_a_recovery_of_ones_own_is_part_of_the_run_id(run_cfsp, sound_words, tmp_path, monkeypatch):
    code = """
from cfsp.config.components import component
from cfsp.recovery.base import Recovered

@component
class Scaled:
    name: str = "scaled"
    trains = True
    def check(self, view, tokenizer, limits, device):
        return {}
    def recover(self, context):
        return Recovered(context.model, {"name": self.name, "by": FACTOR})
"""
    module = tmp_path / "mine_recovery.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for factor in (2, 3):
        module.write_text(code.replace("FACTOR", str(factor)))
        sys.modules.pop("mine_recovery", None)
        linecache.clearcache()
        words = [*sound_words, "recovery._target_=mine_recovery.Scaled", "plugins.allow=[mine_recovery]"]
        code_, _, err = run_cfsp(*words, f"paths.output_dir={tmp_path / str(factor)}")
        assert code_ == 0, err
        found.append(json.loads((tmp_path / str(factor) / "record.json").read_text()))
    assert found[0]["run_id"] != found[1]["run_id"]
    assert [record["recovery"]["by"] for record in found] == [2, 3]


def test_hardware_that_is_not_there_is_said():
    from transformers import AutoTokenizer

    from cfsp.data.limits import Limits
    from cfsp.errors import ConfigError
    from cfsp.recovery.settings import RecoveryData, Training
    from cfsp.recovery.train import check_training

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "cfsp" / "assets" / "books7m")
    data = RecoveryData("self", "self", n_samples=4)
    for device, settings, part in (
        ("cuda:1", {}, "CUDA_VISIBLE_DEVICES=1"),
        ("mps", {"bf16": True}, "recovery.bf16=true: not supported on mps"),
        ("cuda", {"optimizer": "adamw_8bit"}, "needs the package bitsandbytes"),
    ):
        with pytest.raises(ConfigError, match=re.escape(part)):
            check_training(Training(data, max_steps=1, **settings), tokenizer, Limits(4096, 256), torch.device(device))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "empty"),
        ('{"prompt": 1}\n', "row 1 has prompt"),
        ("[1]", "row 1 is a list"),
        ('{"prompt": 1, "response": "x"}\n', "row 1: prompt is the number 1; text is needed"),
        ('{"instruction": "a", "output": null}\n', "row 1: output is null; text is needed"),
        ('{"instruction": "a", "input": {"b": 1}, "output": "x"}\n', "row 1: input is"),
        ('{"prompt": "a", "response": "\\ud800"}\n', "row 1: response holds half of a character"),
        ('{"prompt": "a", "response": ""}\n', "all responses are empty"),
        ('{"prompt": ' + "[" * 100_000 + "\n", "line 1 is JSON that is nested too deep"),
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
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    run_cfsp, sound_words, tmp_path, prose_file, monkeypatch
):
    from cfsp.recovery import trainer

    words = [*sound_words, "recovery=lora", f"recovery.data.path={prose_file}", *TRAINS, "recovery.checkpoint_every=2"]
    real, calls = trainer.functional.cross_entropy, []

    def at_step_4(*args, **kwargs):
        calls.append(None)
        return real(*args, **kwargs) * (float("nan") if len(calls) == 8 else 1)  # two micro-batches a step

    with monkeypatch.context() as patch:
        patch.setattr(trainer.functional, "cross_entropy", at_step_4)
        code, _, err = run_cfsp(*words)
    assert code == 1
    (line,) = [line for line in err.splitlines() if "not finite" in line]
    assert "the loss is not finite at step 4; the last good checkpoint is kept in" in line
    assert "recovery.learning_rate" in line
    assert [path.name for path in (tmp_path / "cache" / "progress").glob("*/training/checkpoint-*")] == ["checkpoint-2"]
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    assert "going on from checkpoint-2" in (tmp_path / "out" / "run.log").read_text()


@pytest.mark.usefixtures("one_thread")
def test_weights_that_are_not_finite_are_no_checkpoint(run_cfsp, sound_words, tmp_path, prose_file, monkeypatch):
    from transformers import Trainer

    def spoilt(self, *args, **kwargs):
        with torch.no_grad():
            next(p for p in self.model.parameters() if p.requires_grad)[0] = float("inf")
        return saved(self, *args, **kwargs)

    saved = Trainer._save_checkpoint
    monkeypatch.setattr(Trainer, "_save_checkpoint", spoilt)
    words = [*sound_words, "recovery=full", f"recovery.data.path={prose_file}", *TRAINS, "recovery.checkpoint_every=2"]
    code, _, err = run_cfsp(*words)
    assert code == 1
    assert "a weight is not finite at step 2" in err
    assert not list((tmp_path / "cache" / "progress").glob("*/training/*/cfsp_complete.json"))
    monkeypatch.setattr(Trainer, "_save_checkpoint", saved)
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    assert "going on from" not in (tmp_path / "out" / "run.log").read_text()
