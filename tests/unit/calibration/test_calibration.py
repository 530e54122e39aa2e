"""One forward pass, its cache, and where calibration windows come from."""

from __future__ import annotations

import gzip
import json
import random
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cfsp.architecture.views import resolve
from cfsp.calibration import calibrate as calibrate_module
from cfsp.calibration.block_distance import block_distances
from cfsp.calibration.block_pass import block_by_block
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.calibration_set import CalibrationSet, from_text, from_tokens, identity
from cfsp.calibration.self_generated import sample_windows
from cfsp.calibration.statistics import Statistics
from cfsp.calibration.statistics_cache import StatisticsCache
from cfsp.config.sections import SelfCalibration, TextCalibration, TokensCalibration
from cfsp.data import text as text_module
from cfsp.data.limits import Limits
from cfsp.errors import DataError
from cfsp.model.driver import BlockDriver
from cfsp.model.tokenizer import load_tokenizer
from cfsp.system.cache import read_or_compute, saved_seconds
from cfsp.system.package import ROOT
from cfsp.weights.source import _from_folder
from tests.conftest import shared
from tests.helpers.tiny import tiny_model, tokens

LIMITS = Limits(4096, 512)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(_from_folder("bundled", ROOT / "assets" / "books7m", origin="bundled"))


def text_section(path, **keys) -> TextCalibration:
    return TextCalibration(**{"kind": "text", "name": "text", "path": str(path), "n_samples": 4, "seq_len": 16, **keys})


@pytest.mark.parametrize("mode", ["whole", "blocks"])
def test_every_linear_of_the_decoder_sees_each_token_once_and_the_head_none(mode):
    model = tiny_model()
    seen: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].shape[:-1].numel()}))
    ids = tokens(10, 32)
    driver = BlockDriver(resolve(model), 4)
    if mode == "whole":
        calibrate(driver, CalibrationSet(ids, "random", "", 0))
    else:
        block_by_block(driver, ids, None, None)
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert len(linears) == 4 * 7
    assert seen == dict.fromkeys(linears, 320)


def test_statistics_are_what_they_are_defined_to_be():
    model, ids = tiny_model(), tokens(6, 32)
    with torch.no_grad():
        hidden = model.model(ids, output_hidden_states=True).hidden_states
    inputs = {}
    for index, layer in enumerate(model.model.layers):
        for part, linear in (("ffn", layer.mlp.down_proj), ("attention", layer.self_attn.o_proj)):
            linear.register_forward_pre_hook(
                lambda _, args, key=(index, part): inputs.__setitem__(key, args[0].double())
            )
    statistics, _ = calibrate(BlockDriver(resolve(model), 6), CalibrationSet(ids, "random", "", 0))
    for index, block in enumerate(statistics.blocks):
        for part, found in (("ffn", block.ffn), ("attention", block.attention)):
            x = inputs[index, part]
            assert torch.allclose(found.mean, x.mean((0, 1)), atol=1e-6)
            assert torch.allclose(found.mean_square, x.square().mean((0, 1)), rtol=1e-5)
            assert torch.allclose(found.mean_norm, x.norm(dim=1).mean(0) / 32**0.5, rtol=1e-5)
            assert torch.allclose(found.variance, x.flatten(0, 1).var(0, correction=0), rtol=1e-3, atol=1e-7)
        if index < 3:  # transformers applies the final norm to its last hidden state
            x, y = hidden[index].double(), hidden[index + 1].double()
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            expected = [(cosine.arccos() / torch.pi).mean(), (1 - cosine).mean()]
            expected += [(x - y).square().mean(), (x - y).abs().mean()]
            assert list(block.distances.values()) == pytest.approx([float(v) for v in expected], rel=1e-4)


def test_distances_of_degenerate_states_are_finite():
    x = torch.randn(1, 5, 8)
    x[0, 0] = 0
    for y in (x, -x, torch.zeros_like(x), 1e-20 * x):
        assert block_distances(x, y).isfinite().all()
    same = block_distances(x[:, 1:], x[:, 1:])
    assert same.abs().max() < 0.01
    opposite = block_distances(x[:, 1:], -x[:, 1:]) / 4
    assert float(opposite[0, 0]) == pytest.approx(1.0, abs=1e-3)


def test_statistics_do_not_grow_with_the_set():
    model = tiny_model()
    small, _ = calibrate(BlockDriver(resolve(model), 8), CalibrationSet(tokens(8), "random", "", 0))
    twice = CalibrationSet(torch.cat([tokens(8), tokens(8)]), "random", "", 0)
    large, _ = calibrate(BlockDriver(resolve(model), 8), twice)
    for one, other in zip(small.blocks, large.blocks, strict=True):
        assert one.distances == pytest.approx(other.distances, rel=1e-12)
        assert torch.allclose(one.ffn.mean_square, other.ffn.mean_square, rtol=1e-12)


def test_the_cache_answers_only_for_the_same_content(tmp_path, monkeypatch):
    model = tiny_model()
    driver = BlockDriver(resolve(model), 4)
    given = CalibrationSet(tokens(8), "random", "", 0)
    cache = StatisticsCache(tmp_path, "sha256:a")
    first, cached = calibrate(driver, given, cache)
    assert not cached
    others = [
        (driver, given, StatisticsCache(tmp_path, "sha256:b")),
        (driver, CalibrationSet(tokens(8, seed=1), "random", "", 0), cache),
        (BlockDriver(resolve(model), 2), given, cache),
        (BlockDriver(resolve(tiny_model().double()), 4), given, cache),
    ]
    for other in others:
        assert not calibrate(*other)[1]
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_module, "COLLECTOR_VERSION", 99)
        assert not calibrate(driver, given, cache)[1]
    assert len(list((tmp_path / "statistics").glob("*.safetensors"))) == 6
    monkeypatch.setattr(BlockDriver, "run", lambda *_: pytest.fail("a forward pass although the statistics are cached"))
    again, cached = calibrate(driver, given, cache)
    assert cached
    assert [b.distances for b in again.blocks] == [b.distances for b in first.blocks]
    assert torch.equal(again.blocks[0].attention.mean, first.blocks[0].attention.mean)


def test_a_damaged_cache_entry_is_made_again(tmp_path):
    driver, given = BlockDriver(resolve(tiny_model()), 4), CalibrationSet(tokens(4), "random", "", 0)
    cache = StatisticsCache(tmp_path, "sha256:a")
    calibrate(driver, given, cache)
    (path,) = (tmp_path / "statistics").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    _, cached = calibrate(driver, given, cache)
    assert not cached
    assert len(Statistics.load(path).blocks) == 4


def test_random_windows_are_drawn_as_the_authors_do(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("The sea was grey and the harbour lay quiet under the morning fog. " * 40)
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    found = from_text(text_section(path), tokenizer, LIMITS, seed=3)
    chooser = random.Random(3)
    starts = [chooser.randint(0, len(ids) - 16 - 1) for _ in range(4)]
    assert found.input_ids.tolist() == [ids[start : start + 16] for start in starts]
    assert from_text(text_section(path), tokenizer, LIMITS, seed=4).fingerprint != found.fingerprint


def test_sequential_windows_and_bos(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("The sea was grey and the harbour lay quiet under the morning fog. " * 40)
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    plain = from_text(text_section(path, sampling="sequential"), tokenizer, LIMITS, 0).input_ids
    assert plain.flatten().tolist() == ids[:64]
    each = from_text(text_section(path, sampling="sequential", bos="window"), tokenizer, LIMITS, 0).input_ids
    assert each.shape == (4, 16)
    assert (each[:, 0] == tokenizer.bos_token_id).all()
    assert each[:, 1:].flatten().tolist() == ids[:60]


def test_documents_are_joined_as_asked_from_every_format(tmp_path, tokenizer):
    import pyarrow
    from pyarrow import parquet

    rows = [" = Title = \n", "", " First line . \n", " Second line . \n"] * 30
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.json.gz", "wt") as stream:
        stream.write(lines)
    sets = [
        from_text(text_section(tmp_path / name, join=" ", sampling="sequential"), tokenizer, LIMITS, 0).input_ids
        for name in ("a.parquet", "a.jsonl", "a.json.gz")
    ]
    expected = tokenizer(" ".join(rows), add_special_tokens=False)["input_ids"][:64]
    assert all(found.flatten().tolist() == expected for found in sets)
    limited = text_section(tmp_path / "a.jsonl", join=" ", max_documents=90, sampling="sequential")
    assert from_text(limited, tokenizer, LIMITS, 0).input_ids.flatten().tolist() == expected
    later = text_section(tmp_path / "a.jsonl", join=" ", skip_documents=4, max_documents=90, sampling="sequential")
    behind = tokenizer(" ".join(rows[4:94]), add_special_tokens=False)["input_ids"][:64]
    assert from_text(later, tokenizer, LIMITS, 0).input_ids.flatten().tolist() == behind
    beyond = text_section(tmp_path / "a.jsonl", skip_documents=120)
    with pytest.raises(DataError, match=r"skip_documents=120: nothing of .* lies behind so many documents"):
        from_text(beyond, tokenizer, LIMITS, 0)


def test_a_plain_text_copy_of_wikitext_has_the_rows_of_the_parquet(tmp_path, tokenizer):
    """Blank rows are empty in the parquet and lines of white space in the raw text; both must give the same tokens."""
    from pyarrow import parquet

    source = shared("data", "wikitext2_raw", "test.parquet")
    rows = parquet.read_table(source).column("text").to_pylist()
    (tmp_path / "raw.txt").write_text("".join(row or " \n" for row in rows), encoding="utf-8")
    ids = [
        from_text(
            text_section(path, join=" ", txt_rows="wikitext", sampling="sequential", n_samples=900, seq_len=256),
            tokenizer, LIMITS, 0,
        ).input_ids
        for path in (source, tmp_path / "raw.txt")
    ]  # fmt: skip
    assert torch.equal(*ids)


def test_how_a_file_is_read_is_part_of_its_identity(tmp_path):
    """The same bytes read as JSON lines and as plain text are two different sets."""
    lines = json.dumps({"text": "one text"}) + "\n"
    found = []
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(lines)
        found.append(identity(text_section(tmp_path / name)))
    found.append(identity(text_section(tmp_path / "a.txt", txt_rows="lines")))
    assert len({json.dumps(one, sort_keys=True) for one in found}) == 3


def test_wikitext_comes_from_a_parquet_repository_and_is_prepared_as_published(tmp_path, tokenizer, monkeypatch):
    """The hub's file, rows joined by a space; no network here, so the download is stood in for."""
    import pyarrow
    from pyarrow import parquet

    from cfsp.config.compose import compose
    from cfsp.config.parse import parse

    rows = [" = Title = \n", "", " A line about the sea and the hills . \n"] * 400
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "train.parquet")
    asked = []

    def download(repo, file, *, repo_type, revision, **_):
        asked.append((repo, file, repo_type))
        return str(tmp_path / "train.parquet")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    section = parse(compose(["calibration=wikitext2", "calibration.seq_len=64", "calibration.n_samples=8"])).calibration
    found = from_text(section, tokenizer, LIMITS, 0)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet", "dataset")]
    ids = tokenizer(" ".join(rows))["input_ids"]
    chooser = random.Random(0)
    starts = [chooser.randint(0, len(ids) - 64 - 1) for _ in range(8)]
    assert found.input_ids.tolist() == [ids[start : start + 64] for start in starts]


def test_frozen_tokens_are_taken_as_they_are(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4096, (6, 20), dtype=np.int32)
    np.save(tmp_path / "ids.npy", ids)
    section = TokensCalibration(kind="tokens", name="tokens", path=str(tmp_path / "ids.npy"))
    assert from_tokens(section, LIMITS, 0).input_ids.tolist() == ids.tolist()
    part = section.model_copy(update={"n_samples": 2, "seq_len": 5})
    assert from_tokens(part, LIMITS, 0).input_ids.tolist() == ids[:2, :5].tolist()
    before = identity(section)
    np.save(tmp_path / "ids.npy", ids + 1)
    assert identity(section) != before, "another content must not share an identity"


def test_self_generated_windows_follow_the_seed_and_the_model(tokenizer):
    model = tiny_model(vocab_size=4096)
    section = SelfCalibration(kind="self", name="self", n_samples=5, seq_len=12, batch_size=2)
    one, same, other = (sample_windows(model, tokenizer, section, LIMITS, seed) for seed in (0, 0, 1))
    assert one.input_ids.shape == (5, 12)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert (one.input_ids[:, 0] == tokenizer.bos_token_id).all()
    cold = section.model_copy(update={"sampling_temperature": 1e-4})
    greedy = sample_windows(model, tokenizer, cold, LIMITS, 0).input_ids
    with torch.no_grad():
        assert greedy[0, 1:].tolist() == model(greedy[:1]).logits[0, :-1].argmax(-1).tolist()


def test_what_is_read_from_the_cache_says_what_it_cost(tmp_path):
    def slow() -> str:
        time.sleep(0.05)
        return "value"

    def once() -> dict[str, object]:
        entry: dict[str, object] = {}
        with saved_seconds(entry):
            assert read_or_compute(path, Path.read_text, slow, lambda value, file: file.write_text(value))[0] == "value"
        return entry

    path = tmp_path / "kind" / "name.txt"
    assert once() == {"saved_seconds": 0}, "computed here: nothing was saved"
    assert once()["saved_seconds"] >= 0.05  # type: ignore[operator]
    path.with_suffix(".seconds").unlink()
    assert once() == {"saved_seconds": None}, "a value from before costs were kept"


def test_a_text_is_tokenised_once_for_a_model_folder_and_each_tokenizer_is_its_own(monkeypatch):
    source = _from_folder("bundled", ROOT / "assets" / "books7m", origin="bundled")
    first, second = load_tokenizer(source), load_tokenizer(source)
    assert first is not second
    monkeypatch.setattr(text_module, "_tokenised", {})
    ids = text_module.tokenise("The sea was grey.", first, "none")
    monkeypatch.setattr(text_module, "_token_ids", lambda *_: np.array([7]))
    assert text_module.tokenise("The sea was grey.", second, "none") is ids
    assert text_module.tokenise("The sea was blue.", second, "none").tolist() == [7]
    second.content_fingerprint = "sha256:another"
    assert text_module.tokenise("The sea was grey.", second, "none").tolist() == [7]
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_waiting_for_what_another_computes_is_not_counted_twice(tmp_path):
    path = tmp_path / "kind" / "name.txt"
    started = threading.Event()

    def slow() -> str:
        started.set()
        time.sleep(0.5)
        return "value"

    def made() -> str:
        return read_or_compute(path, Path.read_text, slow, lambda value, file: file.write_text(value))[0]

    other = threading.Thread(target=made)
    other.start()
    started.wait()
    entry: dict[str, float] = {}
    with saved_seconds(entry):
        assert made() == "value"
    other.join()
    assert entry["saved_seconds"] < 0.25


def test_bos_auto_follows_the_tokenizer_and_is_the_value_written_out(tmp_path):
    """stories260K's tokenizer adds BOS (id 1) before a text, books7m's adds nothing; identity is that of what it is."""
    from cfsp.model.tokenizer import load_tokenizer
    from cfsp.system.package import ROOT
    from cfsp.weights.source import _from_folder

    path = tmp_path / "text.txt"
    path.write_text("The sea was grey and the harbour lay quiet. " * 40)
    folders = {"window": Path(shared("models", "stories260K")), "none": ROOT / "assets" / "books7m"}
    for settled, folder in folders.items():
        own = load_tokenizer(_from_folder("own", folder, origin="own"))
        auto = text_section(path, bos="auto", sampling="sequential")
        written = text_section(path, bos=settled, sampling="sequential")
        assert identity(auto, own) == identity(written, own)
        sets = [from_text(section, own, Limits(4096, 512), 0) for section in (auto, written)]
        assert sets[0].fingerprint == sets[1].fingerprint
        assert sets[0].describe()["bos"] == settled
        assert (sets[0].input_ids[:, 0] == 1).all().item() is (settled == "window")
