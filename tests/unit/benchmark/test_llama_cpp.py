"""The benchmark of llama.cpp without llama.cpp: what it makes, what it asks for, what its table says."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from cfsp.benchmark import llama_cpp, part
from cfsp.benchmark.make_checkpoint import Shape
from cfsp.errors import ConfigError

TINY = Shape(hidden=64, ffn=1024, blocks=4, heads=4, kv_heads=2, vocab=4096, positions=128, dtype="float32")


def test_widths_are_unequal_multiples_of_32_that_keep_half():
    shape = llama_cpp.SHAPE
    found = llama_cpp.block_widths(shape)
    assert len(set(found)) == len(found) == shape.blocks
    assert sum(found) * 2 == shape.ffn * shape.blocks
    assert all(width % 32 == 0 for width in found)
    assert any(width % 64 for width in found)


def test_dense_and_pruned_files_are_timed_and_the_ratios_checked(tmp_path, monkeypatch, one_thread):
    seen = []

    def measured(python, request, files):
        heads = {name: gguf.GGUFReader(file).fields for name, file in files.items()}
        seen.append({name: fields["general.architecture"].contents() for name, fields in heads.items()})
        assert heads["pruned"]["deci.feed_forward_length"].contents() == llama_cpp.block_widths(TINY)
        seconds = {"dense": [3.0, 3.1, 2.9], "pruned": [2.0, 2.0, 2.0]}
        times = {
            name: {key: [{"wall": one, "cpu": one / (1 if key == "prompt" else 2)} for one in values]
                   for key in ("prompt", "generate")}
            for name, values in seconds.items()
        }  # fmt: skip
        return {"version": "0.0", "seconds": times}

    monkeypatch.setattr(llama_cpp, "create_llama_cpp_environment", lambda folder: Path("python"))
    monkeypatch.setattr(llama_cpp, "run_job", measured)
    request = llama_cpp.Request(repeats=3, dtypes=("f32", "q8_0"), work=tmp_path / "w", results=tmp_path / "r")
    found = llama_cpp.measure(request, TINY)
    assert seen == [{"dense": "llama", "pruned": "deci"}] * 2
    assert [row["speed_up"] for row in found.rows] == [1.5] * 4
    assert [check.met for check in found.checks] == [True] * 4
    assert found.rows[0]["tokens_per_second"] == {"dense": 256 / 3, "pruned": 128}
    assert found.notes["parameters"]["dense"] > found.notes["parameters"]["pruned"]
    text = llama_cpp.render_table(found)
    assert "| f32 prompt 256 | 85.3 | 128.0 | **1.50** (1.45 to 1.55) |" in text
    part.write_result(found, text, part.Settings(repeats=3, results=request.results))
    record = json.loads((request.results / "benchmarks" / "llama_cpp.json").read_text())
    assert record["made_by"] == "cfsp benchmark llama_cpp"
    assert record["llama_cpp_python"] == "0.0"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("repeat=3", "did you mean repeats"),
        ("repeats=0", "a whole number from 1"),
        ("dtypes=q4_k", "give f32, f16, bf16, q8_0"),
        ("work=", "give one value"),
    ],
)
def test_a_wrong_word_is_named(word, message):
    with pytest.raises(ConfigError, match=message):
        llama_cpp.read_request([word])
