"""Model folders that others wrote: the tensors decide, adapters and links are named, nothing is read without end."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cfsp
from cfsp.architecture.views import resolve
from cfsp.checkpoint.save import copy_companions
from cfsp.config.sections import ModelSection
from cfsp.errors import CfspError, CheckpointError, ConfigError, RunError, UnsupportedModelError
from cfsp.evaluation.unchanged import measure_unchanged
from cfsp.model.load import load_model, load_streamed
from cfsp.model.outline import config_corrections, outline
from cfsp.model.tokenizer import load_tokenizer
from cfsp.model.trial import translate_model_code_errors, try_blocks, try_model
from cfsp.weights.source import folder_fingerprint, locate
from tests.conftest import POSITIONS, VOCABULARY, mentions, save_with_tokenizer
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "width": 64, "blocks": 2}


def source_of(folder: Path, **settings):
    return locate(ModelSection(name="m", path=str(folder), **settings))


def change(folder: Path, *, drop=(), **settings) -> None:
    """Set keys of config.json."""
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Two shards and an index in the place of the single file."""
    tensors = weights(folder)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index(folder, {name: file for file, part in parts.items() for name in part})


def index(folder: Path, by_name: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": by_name}))


def message(folder: Path, error: type[CfspError] = CheckpointError) -> str:
    with pytest.raises(error) as found:
        outline(source_of(folder))
    said = str(found.value)
    assert "\n" not in said
    assert len(said) < 500 + len(str(folder))
    return said


@pytest.fixture
def tied_folder(tmp_path) -> Path:
    model = tiny_model(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, tie_word_embeddings=True, **SIZES)
    return save_with_tokenizer(model, tmp_path / "tied")


@pytest.fixture
def own_head(tied_folder) -> Path:
    """A head of its own under tie_word_embeddings=true."""
    tensors = weights(tied_folder)
    embedding = tensors["model.embed_tokens.weight"]
    torch.manual_seed(0)
    store(tied_folder, {**tensors, "lm_head.weight": 1.3 * embedding + 0.01 * torch.randn_like(embedding)})
    return tied_folder


# The tensors decide


def test_a_head_of_its_own_is_kept_in_memory_and_streamed(own_head):
    source = source_of(own_head)
    (note,) = config_corrections(source)
    assert "tie_word_embeddings=true" in note
    assert "lm_head.weight" in note
    model = load_model(source, dtype=torch.float32, device=CPU)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # as lm-eval does
    stored = weights(own_head)
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    ids = tokens(1, 8, vocabulary=VOCABULARY)
    logits = model(ids).logits
    streamed = load_streamed(source, dtype=torch.float32, device=CPU)
    assert streamed.config.tie_word_embeddings is False
    assert torch.equal(streamed(ids).logits, logits)
    assert not torch.allclose(logits, logits * 0 + model.model(ids)[0] @ stored["model.embed_tokens.weight"].T)


def test_a_head_that_equals_the_embedding_stays_tied(tied_folder):
    tensors = weights(tied_folder)
    store(tied_folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    source = source_of(tied_folder)
    assert config_corrections(source) == ()
    model = load_model(source, dtype=torch.float32, device=CPU)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_of_its_own_in_a_family_of_other_names(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "gpt2")
    tensors = weights(tmp_path / "gpt2")
    store(tmp_path / "gpt2", {**tensors, "lm_head.weight": 2 * tensors["transformer.wte.weight"]})
    source = source_of(tmp_path / "gpt2")
    assert len(config_corrections(source)) == 1
    loaded = load_model(source, dtype=torch.float32, device=CPU)
    loaded.tie_weights()
    assert torch.equal(loaded.lm_head.weight, 2 * tensors["transformer.wte.weight"])


def test_one_plan_gives_one_figure_in_memory_streamed_and_saved(own_head, sound_words, run_cfsp, tmp_path, prose_file):
    words = [
        *sound_words, f"model.path={own_head}", "evaluation=perplexity", "evaluation.perplexity.datasets=[text]",
        f"evaluation.perplexity.texts.text.path={prose_file}", "evaluation.perplexity.seq_len=32",
        "evaluation.perplexity.windows=[0,4]", "save.model=true",
    ]  # fmt: skip
    figures = {}
    for streaming in ("off", "on"):
        out = tmp_path / streaming
        code, _, err = run_cfsp(*words, f"model.streaming={streaming}", f"paths.output_dir={out}")
        assert code == 0, err
        record = json.loads((out / "record.json").read_text())
        assert "tie_word_embeddings" in record["model"]["notes"][0]
        figures[streaming] = [row["value"] for side in ("dense", "pruned") for row in record["measurements"][side]]
        assert json.loads((out / "model" / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(weights(out / "model")["lm_head.weight"], weights(own_head)["lm_head.weight"])
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert figures["on"] == pytest.approx(figures["off"], rel=1e-6)


def test_a_model_of_somebody_elses_loading_is_saved_as_it_is(own_head, tmp_path):
    from transformers import AutoModelForCausalLM

    from cfsp.checkpoint.save import save_checkpoint

    model = AutoModelForCausalLM.from_pretrained(own_head)
    assert model.config.tie_word_embeddings is True  # and yet the two are not tied
    saved = save_checkpoint(model, tmp_path / "saved", reference=False).folder
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is False


def test_exports_of_a_head_of_its_own_say_so(own_head, tmp_path):
    from cfsp.export.write import Request, write_export

    for form in ("hf", "padded"):
        write_export(Request(own_head, form, tmp_path / form))
        assert json.loads((tmp_path / form / "config.json").read_text())["tie_word_embeddings"] is False


def test_inspect_says_what_the_tensors_say(own_head):
    from cfsp.cli.inspect import Request, inspect_model

    report = inspect_model(Request(path=str(own_head)))
    assert not report.tied
    assert "LM head is one of its own" in report.numbers.notes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_tensors_where_the_config_has_none(model_folder, dtype):
    store(model_folder, {name: tensor.to(dtype) for name, tensor in weights(model_folder).items()})
    change(model_folder, drop=("dtype", "torch_dtype"))
    assert source_of(model_folder).stored_dtype == str(dtype).removeprefix("torch.")
    change(model_folder, dtype="float32")
    assert source_of(model_folder).stored_dtype == "float32"


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "lm_head.bias", "v_head.summary.weight"])
def test_a_tensor_without_a_place_is_refused(model_folder, name, refused, sound_words):
    store(model_folder, {**weights(model_folder), name: torch.zeros(16)})
    assert f"1 tensor has no place in the architecture that config.json describes, first {name}" in message(
        model_folder
    )
    mentions(refused(*sound_words), "model.path=", name)
    mentions(refused("inspect", f"path={model_folder}", defaults=False), name)


def test_buffers_of_old_checkpoints_may_lie_there(model_folder):
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    store(model_folder, {**weights(model_folder), **old})
    assert outline(source_of(model_folder)).widths == [64, 64]
    load_model(source_of(model_folder), dtype=torch.float32, device=CPU)


def test_masks_of_old_checkpoints_may_lie_there_and_two_names_of_one_weight_may_not(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights(tmp_path).items()}  # as on the hub
    mask = {"h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    store(tmp_path, bare | mask)
    assert len(outline(source_of(tmp_path)).blocks) == 2
    store(tmp_path, bare | {"transformer.wte.weight": bare["wte.weight"] + 1})
    assert "two tensors for the same weight" in message(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_integers_in_the_place_of_weights_are_refused(model_folder, dtype, name, refused, sound_words):
    tensors = weights(model_folder)
    store(model_folder, {**tensors, name: torch.ones(tensors[name].shape, dtype=dtype)})
    mentions(refused(*sound_words), "model.path=", name, "quantised or damaged")


def test_an_evaluator_that_changes_the_model_is_named():
    model = tiny_model()
    assert measure_unchanged("mine", model, lambda: 3) == 3
    before = model.lm_head.weight

    def tie():
        model.lm_head.weight = model.model.embed_tokens.weight

    with pytest.raises(RunError, match=r"^evaluation=mine: the evaluator ties or unties model\.embed_tokens\.weight"):
        measure_unchanged("mine", model, tie)
    model.lm_head.weight = before
    with (
        torch.no_grad(),
        pytest.raises(RunError, match=r"changes the values of model\.layers\.3\.mlp\.up_proj\.weight"),
    ):
        measure_unchanged("mine", model, lambda: model.model.layers[3].mlp.up_proj.weight[0].mul_(2))
    swapped = model.model.embed_tokens.weight
    with torch.no_grad(), pytest.raises(RunError, match="changes the values"):
        measure_unchanged("mine", model, lambda: swapped.copy_(swapped.flip(0)))
    with pytest.raises(RunError, match="changes use_cache in the model's configuration"):
        measure_unchanged("mine", model, lambda: setattr(model.config, "use_cache", False))


# Adapters


@pytest.fixture
def adapter():
    def put(folder: Path) -> None:
        settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        save_file({"base_model.model.a": torch.zeros(1)}, folder / "adapter_model.safetensors")

    return put


def test_the_folder_of_a_model_may_have_any_name(model_folder):
    """The name of a model in a record follows a rule; that of a folder does not."""
    place = model_folder.rename(model_folder.with_name("Räume & models (1)"))
    assert cfsp.load(place)[0].config.vocab_size == VOCABULARY


def test_an_adapter_beside_the_weights_is_refused(model_folder, adapter, refused, sound_words):
    adapter(model_folder)
    parts = ("PEFT adapter", "org/base", "beside the full weights", "merge_and_unload", "move adapter_config.json away")
    mentions(refused(*sound_words), "model.path=", *parts)
    mentions(refused("inspect", f"path={model_folder}", defaults=False), "path=", *parts)
    mentions(refused("export", f"path={model_folder}", "format=hf", defaults=False), *parts)
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        cfsp.load(model_folder)


def test_a_folder_of_an_adapter_alone_is_called_one(tmp_path, adapter, refused, sound_words):
    (tmp_path / "adapter").mkdir()
    adapter(tmp_path / "adapter")
    parts = ("this is a PEFT adapter of the base model org/base", "merge_and_unload")
    mentions(refused(*sound_words, f"model.path={tmp_path / 'adapter'}"), *parts)
    mentions(refused("inspect", f"path={tmp_path / 'adapter'}", defaults=False), *parts)


# Files outside the folder


@pytest.mark.parametrize(
    "name", ["../elsewhere/w.safetensors", "/tmp/w.safetensors", "sub/w.safetensors", "w.bin", "..", ""]
)
def test_names_in_an_index_are_plain(model_folder, name, refused, sound_words):
    tensors = weights(model_folder)
    (model_folder / "model.safetensors").rename(model_folder / "stub.safetensors")
    index(model_folder, dict.fromkeys(tensors, name))
    mentions(refused(*sound_words), "model.safetensors.index.json", "without a path")
    mentions(refused("export", f"path={model_folder}", "format=hf", defaults=False), "without a path")


def test_the_index_decides_which_weights_are_the_model(model_folder):
    shard(model_folder)
    well_formed = folder_fingerprint(model_folder)
    path = model_folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"metadata": {}', '"metadata": {"total_size": 5}'))
    assert folder_fingerprint(model_folder) == well_formed  # the same weights
    by_name = json.loads(path.read_text())["weight_map"]
    shutil.copy(model_folder / "model-00002-of-00002.safetensors", model_folder / "stub.safetensors")
    other = {name: file.replace("model-00002-of-00002", "stub") for name, file in by_name.items()}
    with_stub = folder_fingerprint(model_folder)
    index(model_folder, other)
    assert len({well_formed, with_stub, folder_fingerprint(model_folder)}) == 3


def test_fingerprints_of_whole_folders_are_what_they_were(tmp_path):
    for name, content in (("config.json", b"{}"), ("tokenizer.json", b"[]")):
        (tmp_path / name).write_bytes(content)
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-2.safetensors")
    before = folder_fingerprint(tmp_path)
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    assert folder_fingerprint(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_to_other_places_are_refused(model_folder, tmp_path, name, refused, sound_words):
    (model_folder / name).rename(tmp_path / "elsewhere")
    (model_folder / name).symlink_to(tmp_path / "elsewhere")
    mentions(refused(*sound_words), "model.path=", f"{name} is a link to a place outside of the folder")


def test_licences_behind_links_are_not_copied(model_folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    for name in ("LICENSE", "NOTICE.txt", "chat_template.jinja"):
        (model_folder / name).symlink_to(tmp_path / "secret")
    (model_folder / "USE_POLICY.md").write_text("be kind")
    source_of(model_folder)
    (tmp_path / "copy").mkdir()
    copy_companions(model_folder, tmp_path / "copy")
    names = {file.name for file in (tmp_path / "copy").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "USE_POLICY.md"}


def test_links_of_the_hubs_own_cache_are_followed(model_folder, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (model_folder / "LICENSE").write_text("MIT")
    for number, file in enumerate(sorted(model_folder.iterdir())):
        shutil.move(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert outline(source_of(snapshot)).widths == [64, 64]
    (tmp_path / "copy").mkdir()
    copy_companions(snapshot, tmp_path / "copy")
    assert (tmp_path / "copy" / "LICENSE").read_text() == "MIT"


def test_a_folder_behind_a_link_is_a_folder(model_folder, tmp_path):
    (tmp_path / "link").symlink_to(model_folder)
    assert source_of(tmp_path / "link").fingerprint == source_of(model_folder).fingerprint


def test_weights_are_not_named_by_the_configuration(model_folder, refused, sound_words):
    (model_folder / "sub").mkdir()
    shutil.copy(model_folder / "model.safetensors", model_folder / "sub" / "w.safetensors")
    change(model_folder, transformers_weights="sub/w.safetensors")
    mentions(refused(*sound_words), "transformers_weights", "take the key out")


# Readers are bounded


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE",
     "model.safetensors.index.json", "adapter_config.json", "chat_template.jinja"],
)  # fmt: skip
def test_fifos_are_refused(model_folder, name, refused, sound_words):
    (model_folder / name).unlink(missing_ok=True)
    os.mkfifo(model_folder / name)
    start = time.monotonic()
    mentions(refused(*sound_words), "model.path=", name, "FIFO")
    mentions(refused("inspect", f"path={model_folder}", defaults=False), "path=", name, "FIFO")
    assert time.monotonic() - start < 10


def test_a_device_is_refused(model_folder, refused, sound_words):
    (model_folder / "config.json").unlink()
    (model_folder / "config.json").symlink_to("/dev/zero")
    mentions(refused(*sound_words), "config.json", "link to a place outside")


def test_a_header_of_200_mb_is_refused_unread(model_folder, refused, sound_words):
    with (model_folder / "model.safetensors").open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)  # a sparse file
    mentions(refused(*sound_words), "model.safetensors", "its header has 200,000,000 bytes")


@pytest.mark.parametrize(
    "settings",
    [{"num_hidden_layers": 10_000_000}, {"text_config": {"num_hidden_layers": 10_000_000}},
     {"num_local_experts": 10_000_000}, {"num_hidden_layers": 1e9}, {"num_hidden_layers": 900}],
    ids=["layers", "nested", "experts", "float", "more than tensors"],
)  # fmt: skip
def test_counts_without_end_are_refused(model_folder, settings, refused, sound_words):
    change(model_folder, **settings)
    start = time.monotonic()
    mentions(refused(*sound_words), "model.path=", "config.json")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_attention_heads": 0}, ("it divides by a value that is zero", "num_attention_heads")),
        ({"vocab_size": None}, ("vocab_size is null, and a whole number is expected",)),
        ({"hidden_size": "x"}, ("hidden_size is 'x', and a whole number is expected",)),
        ({"rms_norm_eps": None}, ("rms_norm_eps is null, and a number is expected",)),
        ({"head_dim": 0}, ("it divides by a value that is zero", "head_dim")),
        ({"max_position_embeddings": -1}, ("max_position_embeddings=-1", "a whole number from 1")),
    ],
)
def test_a_value_of_the_configuration_is_named_in_plain_words(model_folder, settings, said, refused, sound_words):
    change(model_folder, **settings)
    (line,) = refused(*sound_words)
    mentions([line], "model.path=", *said)
    assert "does not know this model" not in line


def test_a_pile_of_layers_is_refused_without_weights_too(model_folder, refused):
    (model_folder / "model.safetensors").unlink()
    change(model_folder, num_hidden_layers=10_000_000)
    mentions(refused("inspect", f"path={model_folder}", defaults=False), "num_hidden_layers=10,000,000")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_json_that_is_nested_without_end_is_refused(model_folder, name, refused, sound_words):
    (model_folder / name).write_text(f'{{"a": {DEEP}}}')
    lines = refused(*sound_words)
    mentions(lines, "model.path=")
    assert "nested too deep" in lines[0] or "recursion" in lines[0].lower()


def test_a_nested_index_and_a_nested_header_are_refused(model_folder, refused, sound_words):
    shard(model_folder)
    (model_folder / "model.safetensors.index.json").write_text(f'{{"a": {DEEP}}}')
    mentions(refused(*sound_words), "index.json", "nested too deep")
    header = f'{{"a": {DEEP}}}'.encode()
    (model_folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    mentions(refused(*sound_words), "model.safetensors", "header cannot be read")


def test_byte_order_marks_are_read(model_folder, tmp_path, sound_words, run_cfsp):
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (model_folder / name).write_bytes(b"\xef\xbb\xbf" + (model_folder / name).read_bytes())
    code, _, err = run_cfsp(*sound_words, "save.model=true")
    assert code == 0, err
    _, tokenizer = cfsp.load(tmp_path / "out" / "model")
    assert tokenizer("quiet").input_ids
    assert not (tmp_path / "out" / "model" / "tokenizer_config.json").read_bytes().startswith(b"\xef\xbb\xbf")


def test_code_of_a_tokenizer_is_named(model_folder):
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="tokenizer brings its own Python code.*trust_remote_code=true"):
        load_tokenizer(source_of(model_folder))


# Models whose blocks or code do not fit


def test_blocks_of_four_dimensions_are_refused(tmp_path, sound_words, refused):
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        altup_num_inputs=2, num_kv_shared_layers=2, laurel_rank=4, max_position_embeddings=64,
        activation_sparsity_pattern=[0.0] * 6,
        layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = save_with_tokenizer(Gemma3nForCausalLM(config), tmp_path / "gemma3n")
    for pruner in ("cfsp", "shortgpt"):
        lines = refused(
            *sound_words,
            f"model.path={folder}",
            f"pruner={pruner}",
            f"paths.output_dir={tmp_path / pruner}",
            loads=True,
        )
        mentions(lines, "gemma3n", "4 dimensions")
    with pytest.raises(UnsupportedModelError, match="4 dimensions"):
        try_blocks(resolve(load_model(source_of(folder), dtype=torch.float32, device=CPU)))


def test_errors_out_of_a_models_own_code_are_one_line():
    model = tiny_model()
    with (
        pytest.raises(UnsupportedModelError, match=r"path=there: the code of model_type=llama fails in \w+") as found,
        translate_model_code_errors("llama", "there"),
    ):
        model(torch.zeros(1, 4))  # floats for ids: its embedding fails, within its forward
    assert "\n" not in str(found.value)
    with pytest.raises(ZeroDivisionError), translate_model_code_errors("llama", "there"):
        1 / 0  # noqa: B018


def test_a_model_that_fails_as_an_evaluation_calls_it_is_refused_before_calibration(tmp_path, sound_words, refused):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "bailing_hybrid", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_experts=4,
        moe_intermediate_size=16, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2,
        layer_types=["linear_attention"] * 2, num_shared_experts=1, group_norm_size=1, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = save_with_tokenizer(AutoModelForCausalLM.from_config(config), tmp_path / "hybrid")
    mentions(refused(*sound_words, f"model.path={folder}", loads=True), "model_type=bailing_hybrid", "get_seq_length")
    assert not (tmp_path / "cache" / "statistics").exists()


def test_weights_have_the_name_that_every_tool_looks_for(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"found consolidated\.safetensors, but neither model\.safetensors nor"):
        source_of(model_folder)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "nope"), ("num_attention_heads", 0)])
def test_a_value_that_the_models_code_cannot_use_is_named(refused, sound_words, model_folder, key, value):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {key: value}))
    (line,) = refused(*sound_words)
    assert key in line


def test_a_model_that_is_only_measured_is_tried_before_it_is_measured() -> None:
    model = tiny_model(**SIZES)
    try_model(resolve(model))
    model.forward = lambda *_, **__: None
    with pytest.raises(UnsupportedModelError, match="no logits"):
        try_model(resolve(model))


@pytest.mark.parametrize(("key", "value"), [("model_max_length", -1), ("tokenizer_class", 5)])
def test_a_tokenizer_setting_of_a_wrong_kind_names_the_files(refused, sound_words, model_folder, key, value):
    file = model_folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    mentions(refused(*sound_words), "tokenizer_config.json", "of a kind that transformers does not take there")
