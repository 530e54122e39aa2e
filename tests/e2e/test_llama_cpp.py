"""Exported GGUF files in llama.cpp: logits, greedy text and token ids are those of transformers.

    python -m pytest -m slow tests/e2e/test_llama_cpp.py

llama-cpp-python is built from its source distribution first, once, in the folder $CFSP_LLAMA_CPP (about 6 minutes on 2
cores; ~/.cache/cfsp/llama_cpp without it).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cfsp
from cfsp.checkpoint.save import save_checkpoint
from cfsp.export.folder import read_folder
from cfsp.export.gguf import export
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.verify.tools import llama_cpp as tool
from tests.conftest import SENTENCE, shared
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.slow

#: Logits of both sides are float32 sums in another order, of sizes up to 20.
TOLERANCE = 1e-3
GREEDY = 24
TEXTS = {
    "books7m": [
        "The old man walked slowly to the river, and nobody followed him there.",
        "  Chapter 12.\n\n“It’s 1,024 o'clock!” she'd cried — naïve café, 東京, \t\N{GRINNING FACE}  ",
    ],
    "stories260K": [
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
        '  Tom\'s  dog said: "42!"\n\nÉté — 東京 \N{GRINNING FACE}  ',
    ],
}
TEXTS["babyllama-1M"] = TEXTS["stories260K"]
NO_FIRST_ATTENTION = BlockPlan(attention=False)
#: Structure -> arguments of cfsp.prune, or plans of the first blocks.
STRUCTURES = {
    "dense": (),
    "ffn": {"pruner": "cfsp"},
    "ffn_to_1": {"pruner": "cfsp", "round_to": 1},
    "heads": {"pruner": "cfsp", "scope": "decoder", "ratio": 0.1, "overrides": ["pruner.structure=heads"]},
    "heads_ffn": {"pruner": "cfsp", "scope": "decoder", "overrides": ["pruner.structure=heads_ffn"]},
    "biases": {"pruner": "flap", "round_to": 8, "scope": "decoder", "overrides": ["pruner.structure=heads_ffn"]},
    "blocks": {"pruner": "shortgpt", "ratio": 0.3},
    "two_ssp": {"pruner": "two_ssp", "ratio": 0.4},
    "attention": (NO_FIRST_ATTENTION, BlockPlan(), BlockPlan(attention=False)),
    "ffn_missing": (BlockPlan(ffn=False), BlockPlan(), BlockPlan(ffn=False)),
    "last_submodules": (BlockPlan(), BlockPlan(), BlockPlan(attention=False), BlockPlan(ffn=False)),
    "everything": (BlockPlan((0, 5, 9), attention=False), BlockPlan(None, (1, 2), ffn=False), BlockPlan((3,), (0,))),
}


@pytest.fixture(scope="module")
def python() -> Path:
    from cfsp.benchmark.llama_cpp_environment import create_llama_cpp_environment, default_folder

    return create_llama_cpp_environment(default_folder())


@pytest.fixture(autouse=True)
def _few_threads(one_thread):
    pass


def answered(python: Path, tmp_path: Path, file: Path, ids: list[list[int]], texts=(), greedy: int = GREEDY):
    """The tool's reply, and the logits [T, V] of each of ``ids``."""
    import numpy

    request = {"file": str(file), "token_ids": ids, "greedy": greedy, "texts": list(texts), "logits": True}
    request["save"] = str(tmp_path / "logits.npz")
    process = subprocess.run([str(python), tool.__file__, json.dumps(request)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-500:] + process.stderr[-2000:]
    arrays = numpy.load(request["save"])
    reply = json.loads(process.stdout.splitlines()[-1])
    return reply, [torch.from_numpy(arrays[str(n)]) for n in range(len(ids))]


def greedy_ids(model, ids: list[int], n: int) -> list[int]:
    found = list(ids)
    for _ in range(n):
        with torch.no_grad():
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def compare(
    python: Path, tmp_path: Path, model, file: Path, ids: list[list[int]], texts=(), tolerance=TOLERANCE
) -> dict:
    reply, logits = answered(python, tmp_path, file, ids, texts)
    for one, theirs, continued in zip(ids, logits, reply["greedy"], strict=True):
        with torch.no_grad():
            ours = model(torch.tensor([one])).logits[0]
        assert (ours - theirs).abs().max() <= tolerance
        assert continued == greedy_ids(model, one, GREEDY)
    return reply


def pruned(model, structure: str, vocabulary: int):
    given = STRUCTURES[structure]
    if isinstance(given, dict):
        ids = torch.randint(3, vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))
        plan = cfsp.prune(model, ids, **{"round_to": 32, **given})
    else:
        left = len(model.model.layers) - len(given)
        plan = PruningPlan("m", "f", {"name": "hand"}, (*given, *[BlockPlan()] * left), {}, {})
    return cfsp.apply(model, plan) if given else model


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["books7m", "stories260K"])
def test_a_pruned_model_gives_the_same_logits_text_and_token_ids(python, tmp_path, name, structure):
    folder = shared("models", name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = pruned(model, structure, model.config.vocab_size)
    save_checkpoint(model, tmp_path / "model", source=folder)
    found = export(read_folder(tmp_path / "model"), tmp_path / "model.gguf", dtype="f32")
    ids = [tokenizer(text).input_ids for text in TEXTS[name]]
    reply = compare(python, tmp_path, model, found.place, ids, TEXTS[name])
    assert reply["ids"] == ids
    for said, continued in zip(reply["continuations"], reply["greedy"], strict=True):
        # A SentencePiece decoder takes the space off a text's first word.
        expected = tokenizer.decode(continued, clean_up_tokenization_spaces=False)
        assert said.strip() == expected.strip()


@pytest.mark.parametrize("name", TEXTS)
def test_the_tokens_of_a_long_text_are_the_tokenizer_s(python, tmp_path, name):
    folder = shared("models", name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = export(read_folder(folder), tmp_path / "model.gguf").place
    data = shared("data", "text", "books_heldout.txt" if name == "books7m" else "tinystories.txt")
    long = data.read_text(encoding="utf-8")[:100_000]
    texts = [*TEXTS[name], *(long[at : at + 2000] for at in range(0, len(long), 2000))]
    reply, _ = answered(python, tmp_path, file, [[1]], texts, greedy=0)
    assert reply["ids"] == [tokenizer(text).input_ids for text in texts]


_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: llama.cpp's name -> what text is split by, and ignore_merges.
PRE_TOKENIZERS = {
    "gpt-2": (None, False),
    "smollm": ("digits", False),
    "qwen2": (_QWEN2, False),
    "llama-bpe": (_QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?"), True),
    "smaug-bpe": (_QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?"), False),
    "tekken": (_TEKKEN, True),
}


def trained(folder: Path, text: str, expression: str | None, whole_words: bool) -> None:
    """A byte-level BPE tokenizer of 1000 tokens with that pre-tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    steps = {
        None: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }.get(expression) or [
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_splits_text_as_the_pre_tokenizer_does(python, tmp_path, name):
    text = shared("data", "text", "books_heldout.txt").read_text(encoding="utf-8")[:60_000]
    trained(tmp_path, text, *PRE_TOKENIZERS[name])
    save_checkpoint(tiny_model(vocab_size=1000), tmp_path / "model", source=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    found = export(read_folder(tmp_path / "model"), tmp_path / "model.gguf")
    texts = [
        *TEXTS["books7m"],
        "Route 66, 1984: I'VE 12345 cats\t\tand 3.14159 DOGS!!\r\n\r\n  x = y/2;\n",
        text[-8000:],
    ]
    reply, _ = answered(python, tmp_path, found.place, [[1]], texts, greedy=0)
    for one, ids in zip(texts, reply["ids"], strict=True):
        assert ids == tokenizer(one).input_ids, one[:80]


def test_a_space_prefix_of_a_metaspace_is_one_of_sentencepiece(python, tmp_path):
    source = shared("models", "stories260K")
    content = json.loads((source / "tokenizer.json").read_text())
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    save_checkpoint(tiny_model(vocab_size=512), tmp_path / "model", source=tmp_path)
    found = export(read_folder(tmp_path / "model"), tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert any("begins with a space" in note for note in found.notes)
    texts = [text.lstrip() for text in TEXTS["stories260K"]]
    reply, _ = answered(python, tmp_path, found.place, [[1]], texts, greedy=0)
    assert reply["ids"] == [tokenizer(text).input_ids for text in texts]


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
TINY = [
    (family, structure, rope, tied)
    for family in ("llama", "llama_bias", "mistral", "qwen2", "qwen3")
    for structure in ("dense", "ffn_to_1", "heads", "biases", "attention", "ffn_missing", "everything")
    for rope, tied in (("default", True), ("linear", False), ("yarn", True), ("llama3", True))
    # What export refuses.
    if not (family == "qwen3" and (rope == "llama3" or structure == "biases" or (structure != "dense" and not tied)))
]


@pytest.mark.parametrize(("family", "structure", "rope", "tied"), TINY)
def test_every_family_rope_and_tying(python, tmp_path, family, structure, rope, tied):
    source = shared("models", "stories260K")
    settings = {"vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    settings |= {"hidden_size": 64, "tie_word_embeddings": tied, "rope_parameters": dict(ROPES[rope])}
    model = pruned(tiny_model(family, blocks=5, **settings), structure, 512)
    save_checkpoint(model, tmp_path / "model", source=source)
    found = export(read_folder(tmp_path / "model"), tmp_path / "model.gguf", dtype="f32")
    ids = torch.randint(3, 512, (1, 48), generator=torch.Generator().manual_seed(1)).tolist()
    compare(python, tmp_path, model, found.place, ids)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.2), ("f16", 0.02), ("q8_0", 0.2)])
def test_the_other_dtypes_load_and_are_near(python, tmp_path, dtype, tolerance):
    """Not what a test of equality could ask for: llama.cpp rounds activations too."""
    folder = shared("models", "books7m")
    model = pruned(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), "ffn_to_1", 4096)
    save_checkpoint(model, tmp_path / "model", source=folder)
    file = export(read_folder(tmp_path / "model"), tmp_path / "model.gguf", dtype=dtype).place
    ids = AutoTokenizer.from_pretrained(folder)(SENTENCE).input_ids
    _, (theirs,) = answered(python, tmp_path, file, [ids])
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0]
    assert (ours - theirs).abs().max() <= tolerance


#: Quantises FILE to OUT with llama.cpp's own quantiser; TYPE is the name of a file type in its Python binding.
QUANTISE = """
import ctypes, sys, llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(settings)))
"""


@pytest.mark.parametrize(("kind", "largest"), [("Q4_K_M", 0.10), ("Q6_K", 0.02), ("Q8_0", 0.02)])
def test_llama_cpp_quantises_a_pruned_file_whose_widths_are_in_256s(python, tmp_path, kind, largest):
    """The mean NLL moves by what such types cost a dense model of this size, and every FFN matrix is a K-quant."""
    from gguf import GGMLQuantizationType, GGUFReader

    folder = shared("models", "books7m")
    model = pruned(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), "ffn_to_1", 4096)
    save_checkpoint(model, tmp_path / "model", source=folder)
    file = export(read_folder(tmp_path / "model"), tmp_path / "f16.gguf", dtype="f16", multiple=256).place
    words = [str(python), "-c", QUANTISE, str(file), str(tmp_path / "q.gguf"), f"LLAMA_FTYPE_MOSTLY_{kind}"]
    process = subprocess.run(words, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    used = {tensor.tensor_type for tensor in GGUFReader(tmp_path / "q.gguf").tensors if "ffn_" in tensor.name}
    wide = {GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K} if kind == "Q4_K_M" else {GGMLQuantizationType[kind]}
    assert used - {GGMLQuantizationType.F32} == wide
    ids = AutoTokenizer.from_pretrained(folder)(
        shared("data", "text", "books_heldout.txt").read_text()[:4000]
    ).input_ids
    losses = []
    for quantised in (file, tmp_path / "q.gguf"):
        _, (logits,) = answered(python, tmp_path, quantised, [ids[:256]], greedy=0)
        losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:256]))))
    assert abs(losses[1] - losses[0]) < largest


def test_a_file_that_llama_cpp_does_not_take_is_an_error_in_words(python, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no model")
    request = {"file": str(tmp_path / "model.gguf"), "token_ids": [[1]]}
    process = subprocess.run([str(python), tool.__file__, json.dumps(request)], capture_output=True, text=True)
    assert process.returncode == 1
    reply = json.loads(process.stdout.splitlines()[-1])
    assert reply["version"]
    assert "magic" in reply["error"]
