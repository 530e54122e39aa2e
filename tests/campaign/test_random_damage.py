"""Random overrides and random damage of folders, plans, records and texts, on the whole command line in this process.

Whatever is given: the exit code is 0, 1 or 2, there is no traceback, the answer has at most six lines of below 500
characters, and no call is without end. Where a run ends well, its folder computes what its reference says.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import logging
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import cfsp
from cfsp.checkpoint.reference import place_of, read_reference
from cfsp.cli import main as command_line
from cfsp.config.compose import compose
from tests.campaign.damage import ODD_WORDS, damage_file, damage_folder, fresh_copy
from tests.conftest import SENTENCE, save_with_tokenizer
from tests.helpers.tiny import tiny_model
from tests.helpers.wrong_values import keys_of as _keys

#: Seconds after which a call counts as one without end.
ALARM = 60
#: Words of Python or of a library, which are no answer.
FOREIGN = ("Traceback", "nput should be", "alid tuple", "<class", "KeyError", "AttributeError", "IndexError")
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "width": 64, "blocks": 2}

few = settings(
    derandomize=True, max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False
)  # fmt: skip
many = settings(few, max_examples=250)
seeds = st.integers(0, 2**32 - 1)


class _WithoutEndError(BaseException):
    """The alarm rang; no handler of the command line takes it for an error of its own."""


class Home:
    """Sound inputs in a folder, and the command line called on damaged copies of them."""

    def __init__(self, place: Path, run: Callable[[list[str]], tuple[int, str]]) -> None:
        self.place, self._run, self._calls = place, run, 0
        self.model = save_with_tokenizer(
            tiny_model(vocab_size=4096, max_position_embeddings=64, **SIZES), place / "model"
        )
        self.prose = place / "prose.txt"
        self.prose.write_text(SENTENCE * 100)
        compositions = [compose([*words, "paths.output_dir=out"]) for words in ([], ["recovery=lora"])]
        keys = {".".join(key) for c in compositions for key in _keys(OmegaConf.to_container(c, resolve=True))}
        self.keys = sorted(key for key in keys if not key.startswith("paths."))
        self.sound = place / "sound"
        assert self.runs(self.words(self.model, self.sound), keep=True) == 0

    def words(self, model: Path, out: Path | None = None, text: Path | None = None) -> list[str]:
        """Overrides of a run that works where ``model`` and ``text`` are sound."""
        self._calls += 1
        return [
            "model=local", f"model.path={model}", "calibration=text", f"calibration.path={text or self.prose}",
            "calibration.n_samples=4", "calibration.seq_len=32", "sparsity.round_to=8", "evaluation=none",
            "logger=none", f"paths.output_dir={out or self.place / f'out{self._calls}'}",
            f"paths.cache_dir={self.place / 'cache'}", f"paths.records_dir={self.place / 'records'}",
        ]  # fmt: skip

    def answers(self, words: list[str], said: object = None) -> int:
        """Call the command line and judge what it says; returns the exit code."""
        code, err = self._run(words)
        told = f"{words[-6:]} {said} -> {code}\n{err}"
        assert code in (0, 1, 2), told
        assert not any(word in err for word in FOREIGN), told
        answer = [line for line in err.splitlines() if line.startswith("cfsp: ")]
        assert len(answer) <= 6, told
        assert all(len(line) < 500 for line in answer), told
        assert answer or code == 0, told
        return code

    def runs(self, words: list[str], said: object = None, *, keep: bool = False) -> int:
        """As :meth:`answers`, of a run: what it writes computes what its reference says."""
        code = self.answers(words, said)
        out = Path(next(word for word in words if word.startswith("paths.output_dir=")).partition("=")[2])
        if code == 0 and (out / "model").is_dir():
            check_against_reference(out / "model")
        if not keep:
            shutil.rmtree(out, ignore_errors=True)
        return code


def check_against_reference(folder: Path) -> None:
    """A folder that a run wrote loads, and gives the log-probabilities that were computed when it was written."""
    reference = read_reference(place_of(folder))
    model, _ = cfsp.load(folder, dtype="float32", device="cpu")
    ids = torch.from_numpy(reference.token_ids)
    with torch.no_grad():
        logprobs = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    # What is stored with 16 bits was rounded after it was computed.
    tolerance = 1e-4 if reference.stored == "float32" else 0.1
    np.testing.assert_allclose(logprobs.numpy(), reference.logprobs, atol=tolerance)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    capture = pytest.MonkeyPatch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def ring(*_) -> None:
        raise _WithoutEndError

    def run(words: list[str]) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        for handler in [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]:
            logging.getLogger().removeHandler(handler)
        err = io.StringIO()
        capture.setattr("sys.argv", ["cfsp", *words])
        before = signal.signal(signal.SIGALRM, ring)
        signal.alarm(ALARM)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                code = command_line._main(["cfsp", *words])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        return code, err.getvalue()

    yield Home(tmp_path_factory.mktemp("campaign"), run)
    capture.undo()
    torch.set_num_threads(threads)


def random_overrides(home: Home, chance: random.Random) -> None:
    """One to three overrides of any key, with any value."""
    words = home.words(home.model)
    if chance.random() < 0.3:
        words += ["recovery=lora", "recovery.max_steps=1", f"recovery.data.path={home.prose}"]
    for _ in range(chance.choice((1, 1, 2, 3))):
        key = chance.choice(home.keys)
        odd = chance.choice((f"~{key}", key, f"={key}", f"{key}==", f"--{key}", f"{key}=1,2"))
        prefix = chance.choice(("", "", "", "+", "++", "~"))
        words.append(f"{prefix}{key}={chance.choice(ODD_WORDS)}" if chance.random() < 0.93 else odd)
    home.runs(words)


def damaged_folder(home: Home, chance: random.Random) -> None:
    """A model folder, dense or pruned, with one or two damaged or foreign files."""
    folder = fresh_copy(chance.choice((home.model, home.sound / "model")), home.place / "damaged")
    said = [damage_folder(folder, chance) for _ in range(chance.choice((1, 1, 2)))]
    more = chance.choice(([], ["sparsity.ratio=0.25"], ["model.streaming=on"], ["pruner=none"]))
    assert home.runs([*home.words(folder), *more], said) != 1, said


def damaged_plan(home: Home, chance: random.Random) -> None:
    """A pruned folder whose plan, marker or configuration is damaged, pruned again."""
    folder = fresh_copy(home.sound / "model", home.place / "damaged")
    said = damage_folder(folder, chance, ("plan.json", "cfsp_checkpoint.json", "config.json", "cfsp_facts.json"))
    assert home.runs([*home.words(folder), "sparsity.ratio=0.25"], said) != 1, said


def damaged_outcome(home: Home, chance: random.Random) -> None:
    """A finished OUT with a damaged record, plan or model: the same run again."""
    out = fresh_copy(home.sound, home.place / "again")
    said = damage_folder(out, chance)
    if chance.random() < 0.5:
        shutil.rmtree(home.place / "records", ignore_errors=True)
    words = [*home.words(home.model, out), "force=check"]
    if home.answers(words, said) == 0:
        check_against_reference(out / "model")


def damaged_text(home: Home, chance: random.Random) -> None:
    """A calibration text of any form, damaged."""
    ending = chance.choice((".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".csv", ".parquet", ".bz2", ".zst"))
    rows = "\n".join(json.dumps({"text": SENTENCE * 5}) for _ in range(20))
    content = {"json": rows, "csv": "text\n" + f'"{SENTENCE * 3}"\n' * 20}.get(ending[1:5].rstrip("l."), SENTENCE * 60)
    packed = {"gz": gzip.compress, "bz2": bz2.compress}.get(ending.rpartition(".")[2], bytes)(content.encode())
    place = home.place / "texts"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / f"text{ending}").write_bytes(packed)
    said = damage_file(place / f"text{ending}", chance) if chance.random() < 0.9 else "nothing"
    assert home.runs(home.words(home.model, text=place / f"text{ending}"), (ending, said)) != 1, said


def damaged_for_a_command(home: Home, chance: random.Random) -> None:
    """A damaged pruned folder, inspected or exported."""
    folder = fresh_copy(home.sound / "model", home.place / "damaged")
    said = damage_folder(folder, chance)
    if chance.random() < 0.4:
        words = ["inspect", f"path={folder}"]
    else:
        to = home.place / f"export{chance.randrange(10**9)}"
        words = ["export", f"path={folder}", f"format={chance.choice(('hf', 'padded', 'gguf', 'decilm'))}", f"to={to}"]
    if chance.random() < 0.2:
        words.append(f"{chance.choice(('path', 'json', 'dtype', 'multiple', 'x'))}={chance.choice(ODD_WORDS)}")
    home.answers(words, said)


KINDS = [random_overrides, damaged_folder, damaged_plan, damaged_outcome, damaged_text, damaged_for_a_command]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@few
@given(seed=seeds)
def test_random_damage(home, kind, seed):
    kind(home, random.Random(f"{kind.__name__} {seed}"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@many
@given(seed=seeds)
def test_random_damage_at_length(home, kind, seed):
    kind(home, random.Random(f"{kind.__name__} {seed}"))
