"""The script that writes a grouped-query model out as a multi-head one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cfsp.system.package import package_path
from scripts.make_multi_head_model import SOURCE, main


def test_the_written_out_model_is_the_same_function(tmp_path):
    assert main([f"target={tmp_path / 'mha'}"]) == 0
    base = AutoModelForCausalLM.from_pretrained(package_path(SOURCE), dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mha", dtype=torch.float32)
    assert (base.config.num_key_value_heads, model.config.num_key_value_heads) == (4, 8)
    ids = torch.arange(64).reshape(2, 32) * 37 % base.config.vocab_size
    with torch.no_grad():
        # The heads compute the same sums; only the order within a batched product may differ.
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("sorce=x", "make_multi_head_model: sorce=x: there is no such key; there are source and target"),
        ("source=nowhere", "make_multi_head_model: source=nowhere: no model folder"),
        ("target=.", "make_multi_head_model: target=.: exists already"),
    ],
)
def test_bad_input_is_one_line(capsys, word, line):
    assert main([word]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)
