"""The training recipe, end to end on a model small enough to learn a toy language in seconds."""

import importlib.util
import json
import math
import random
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_bundled_model.py"
# Two phases of 24 and 8 steps with a checkpoint every 5, so that interruptions can fall in either.
TINY = shlex.split("""
    --hidden-size 32 --intermediate-size 64 --layers 2 --heads 4 --kv-heads 2 --vocab-size 300 --positions 64
    --phase1-window 32 --phase1-batch 16 --phase1-tokens 12288 --phase1-learning-rate 1e-2
    --phase2-window 64 --phase2-batch 8 --phase2-tokens 4096 --phase2-learning-rate 2e-3
    --holdout 1 --checkpoint-every 5 --device cpu --threads 1 --precision fp32
""")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_bundled_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up to resolve type hints
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _torch_settings() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of a fixed form: most of each is predictable, which a model that learns must find out."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("books")
    for number in range(4):
        sentences = []
        for _ in range(150):
            who, what = rng.choice(["king", "captain", "doctor"]), rng.choice(["river", "castle", "garden"])
            sentences.append(f"The old {who} walked slowly to the {what}, and nobody followed him there.")
        path = folder / f"shelf{number % 2}" / f"book{number}{('.txt', '.md')[number % 2]}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(sentences), encoding="utf-8")
    (folder / "cover.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="module")
def trained(script: ModuleType, books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "model"
    assert script.main(["--data", str(books), "--out", str(out), *TINY]) == 0
    return out


def test_the_model_learns(trained: Path, books: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    record = (trained / "PROVENANCE.txt").read_text(encoding="utf-8")
    held_out = [line.split(" * ")[1] for line in record.splitlines() if line[64:].startswith(" * ")]
    assert len(held_out) == 1
    ids = tokenizer((books / held_out[0]).read_text(encoding="utf-8"), return_tensors="pt").input_ids
    windows = ids[0, : ids.shape[1] // 64 * 64].reshape(-1, 64)
    with torch.inference_mode():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert loss < 0.5 * math.log(model.config.vocab_size)
    reported = float(record.split(" (64-token windows)")[0].split()[-1])
    assert reported == pytest.approx(math.exp(loss), rel=0.1)


def test_the_result_is_complete_and_portable(trained: Path, books: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "PROVENANCE.txt"}
    assert "training-state" not in names
    assert json.loads((trained / "config.json").read_text())["tie_word_embeddings"] is True
    record = (trained / "PROVENANCE.txt").read_text(encoding="utf-8")
    assert "4 files, 1 of them held out" in record
    assert "--seed 0" in record
    assert f"torch {torch.__version__}" in record
    assert str(books.parent) not in record


def test_the_tokenizer_is_lossless(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    rng = random.Random(1)
    texts = ["", " ", "\r\n\t  two  spaces ", "naïve – “quoted”", "日本語 🦙👩‍👩‍👧 \u0301\x00", " leading"]
    scalars = [*range(0xD800), *range(0xE000, 0x110000)]
    texts += ["".join(map(chr, rng.choices(scalars, k=50))) for _ in range(20)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("killed_at", [2, 18, 27])  # before a checkpoint, in phase 1, in phase 2
def test_an_interrupted_run_resumes_to_the_same_weights(
    script: ModuleType,
    books: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    command = ["--data", str(books), "--out", str(tmp_path / "model"), *TINY]
    steps = 0
    update = script.update

    def update_until_killed(*arguments: object) -> float:
        nonlocal steps
        steps += 1
        if steps == killed_at:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(script, "update", update_until_killed)
    assert script.main(command) == 130
    done_before = (killed_at - 1) // 5 * 5 if killed_at < 24 else 24
    steps, killed_at = 0, -1
    assert script.main(command) == 0
    assert steps == 32 - done_before
    expected, actual = (
        load_file(trained / "model.safetensors"),
        load_file(tmp_path / "model" / "model.safetensors"),
    )
    assert expected.keys() == actual.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(actual[name], weights, rtol=0, atol=1e-5)


def test_every_window_is_seen_before_any_is_seen_again(script: ModuleType) -> None:
    phase = script.Phase(tokens=8 * 3 * 4, window=4, batch=3, learning_rate=1.0)
    order = script.window_order(10, phase, [0, 0])
    assert order.shape == (8, 3)
    assert sorted(order.ravel()[:10]) == list(range(10))
    assert sorted(order.ravel()[10:20]) == list(range(10))
    np.testing.assert_array_equal(order, script.window_order(10, phase, [0, 0]))


def test_an_empty_folder_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path.parent / "never"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--data", str(tmp_path), "--out", str(out)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: --data {tmp_path} holds no .txt or .md file\n"
    assert not out.exists()


def test_mistakes_are_one_line_and_exit_code_2(
    script: ModuleType, books: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, wrong = tmp_path / "short", tmp_path / "latin"
    for folder in (short, wrong):
        folder.mkdir()
        (folder / "a.txt").write_text("too little text")
    (wrong / "b.txt").write_bytes("café".encode("latin-1"))
    mistakes = [
        (tmp_path / "missing", tmp_path / "out1", [], "is not a folder"),
        (books, trained, [], "is not empty and holds no unfinished run"),
        (books, books / "model", [], "lies inside --data"),
        (books, tmp_path / "out2", ["--holdout", "4"], "leaves none to train on"),
        (books, tmp_path / "out3", ["--heads", "5"], "--hidden_size must be an even multiple"),
        (short, tmp_path / "out4", ["--holdout", "0"], "too few for one window of 32"),
        (wrong, tmp_path / "out5", [], "is not UTF-8"),
    ]
    for data, out, more, expected in mistakes:
        capsys.readouterr()
        assert script.main(["--data", str(data), "--out", str(out), *TINY, *more]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert expected in error[0]


def test_only_the_same_command_resumes_a_run(
    script: ModuleType,
    books: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--data", str(books), "--out", str(tmp_path / "model"), *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(script, "cosine_schedule", interrupted)
        assert script.main([*command, "--seed", "1"]) == 130  # no checkpoint yet: what follows may replace it
    steps = iter(range(7))
    update = script.update
    monkeypatch.setattr(script, "update", lambda *a: interrupted() if next(steps) == 6 else update(*a))
    assert script.main(command) == 130
    assert script.main([*command, "--seed", "1"]) == 2
    assert "unfinished run with other settings: seed" in capsys.readouterr().err


def interrupted(*_: object) -> float:
    raise KeyboardInterrupt
