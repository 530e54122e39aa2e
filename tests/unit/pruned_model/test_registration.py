"""``import cfsp`` in a process of its own: threads, pickles, copies of what it puts into the import system."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfsp.checkpoint.save import save_checkpoint
from tests.conftest import ROOT
from tests.helpers.structures import logits, pruned
from tests.helpers.tiny import tokens


def run(program: str, *words: object, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], env=environment, capture_output=True, text=True, cwd=cwd
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_threads_load_pruned_folders_at_the_same_time(tmp_path):
    for family in ("llama", "qwen3"):
        save_checkpoint(pruned(family, "widths"), tmp_path / family)
    program = """
import sys, threading
import cfsp
from transformers import AutoModelForCausalLM
start, wrong = threading.Barrier(8), []
def load(at):
    start.wait()
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1 + at % 2])
    except BaseException as error:
        wrong.append(repr(error))
threads = [threading.Thread(target=load, args=(at,)) for at in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(wrong)
"""
    assert run(program, tmp_path / "llama", tmp_path / "qwen3", cwd=tmp_path) == "[]"


@pytest.mark.parametrize(
    "first", ["", "import transformers.models.auto.configuration_auto", "from transformers import *"]
)
def test_a_pickle_is_read_in_another_process(tmp_path, first):
    model = pruned("llama", "everything")
    (tmp_path / "model").write_bytes(pickle.dumps((model.config, model)))
    ids = tokens(1, 8)
    torch.save((ids, logits(model, ids)), tmp_path / "logits.pt")
    program = f"""
{first.replace("*", "AutoConfig")}
import pickle, torch
import cfsp
config, model = pickle.load(open("model", "rb"))
assert config.per_layer_config and type(model).__name__ == "PrunedLlamaForCausalLM"
ids, wanted = torch.load("logits.pt")
with torch.no_grad():
    assert torch.equal(model(ids).logits, wanted)
from cfsp.pruned_model.family import pruned_family
print(pruned_family("llama").causal_lm_class is type(model))
"""
    assert run(program, cwd=tmp_path) == "True"


def test_what_sees_to_imports_too_is_asked_and_the_loader_can_be_copied(tmp_path):
    program = """
import copy, pickle, sys
import cfsp
class Other:
    seen = []
    def find_spec(self, name, path, target=None):
        self.seen.append(name)
sys.meta_path[1:1] = [Other()]
import transformers.models.auto.configuration_auto as auto
assert auto.__name__ in Other.seen
copied = copy.deepcopy(auto.__spec__.loader)
assert copied.get_source(auto.__name__)
try:
    auto.__spec__.loader.nothing
except AttributeError:
    pass
assert pickle.loads(pickle.dumps(auto.__spec__.loader)).get_filename(auto.__name__)
print("pruned_qwen2" in auto.CONFIG_MAPPING)
"""
    assert run(program, cwd=tmp_path) == "True"


def test_there_is_no_module_of_a_family_that_there_is_not(tmp_path):
    program = """
import cfsp
for name in ("modeling_pruned_nothing", "other"):
    try:
        __import__(f"cfsp_pruned_families.{name}")
    except ModuleNotFoundError as error:
        print(error.name)
"""
    found = run(program, cwd=tmp_path).split()
    assert found == ["cfsp_pruned_families.modeling_pruned_nothing", "cfsp_pruned_families.other"]
