"""A model whose weights stay on disk: the same plan, weights and figures, and a block at a time in memory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfsp.architecture.views import resolve
from cfsp.architecture.weights import weights_of
from cfsp.calibration import block_pass as passing
from cfsp.checkpoint import save as checkpoint
from cfsp.config.sections import ModelSection
from cfsp.errors import CheckpointError, ConfigError
from cfsp.evaluation.zero_shot import ZeroShot
from cfsp.model.driver import BlockDriver
from cfsp.model.hidden_states import HiddenStates, SpillBuffer
from cfsp.model.load import load_model, load_streamed
from cfsp.model.tokenizer import load_tokenizer
from cfsp.pipeline import base_models
from cfsp.system import digest
from cfsp.weights import shard_writer
from cfsp.weights.source import folder_fingerprint, locate
from tests.conftest import VOCABULARY, mentions, save_with_tokenizer
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four blocks in several files, behind an index."""
    torch.manual_seed(0)
    model = tiny_model(vocab_size=VOCABULARY, max_position_embeddings=64, width=64, blocks=BLOCKS)
    at = save_with_tokenizer(model, tmp_path_factory.mktemp("streamed") / "model")
    for file in at.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(at, max_shard_size="100KB")
    assert (at / "model.safetensors.index.json").is_file()
    return at


@pytest.fixture
def words(folder, prose_file) -> list[str]:
    return [
        "model=local", f"model.path={folder}", "calibration=text", f"calibration.path={prose_file}",
        "calibration.n_samples=6", "calibration.seq_len=32", "calibration.batch_size=2", "sparsity.round_to=8",
        "evaluation=none",
    ]  # fmt: skip


def both(run_cfsp, words, tmp_path, *more: str) -> tuple[Path, Path]:
    """OUT of a run in memory and of one that streams."""
    places = []
    for mode in ("off", "on"):
        place = tmp_path / mode
        code, _, err = run_cfsp(
            *words, *more, f"model.streaming={mode}", f"paths.output_dir={place / 'out'}",
            f"paths.cache_dir={place / 'cache'}",
        )  # fmt: skip
        assert code == 0, err
        places.append(place / "out")
    return places[0], places[1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    "more",
    [
        ("pruner=cfsp",),
        ("pruner=cfsp", "save.dtype=bfloat16"),
        ("pruner=flap",),
        ("pruner=flap_al_am",),
        ("pruner=wanda_sp_sequential",),
        ("pruner=two_ssp", "sparsity.ratio=0.4"),
        ("pruner=block_pruner", "sparsity.ratio=0.3"),
        ("pruner=shortgpt", "sparsity.scope=decoder"),
        ("pruner=sliding_window", "sparsity.scope=decoder"),
        ("pruner=shortgpt", "sparsity.ratio=0.3", "pruner.compensation=linear_map"),
        ("pruner=block_pruner", "sparsity.ratio=0.3", "pruner.compensation=scale"),
        ("pruner=magnitude_sp",),
    ],
    ids=" ".join,
)
def test_a_streamed_run_is_the_run_in_memory(run_cfsp, words, tmp_path, more) -> None:
    memory, streaming = both(run_cfsp, words, tmp_path, *more)
    plans = [json.loads((out / "plan.json").read_text()) for out in (memory, streaming)]
    assert plans[0] == plans[1]
    found = [weights(out / "model") for out in (memory, streaming)]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    records = [json.loads((out / "record.json").read_text()) for out in (memory, streaming)]
    assert records[0]["run_id"] == records[1]["run_id"]


def test_evaluation_of_a_streamed_model(run_cfsp, words, tmp_path, prose_file) -> None:
    text = [
        "evaluation=perplexity", "evaluation.perplexity.datasets=[t]", "evaluation.perplexity.seq_len=16",
        f"evaluation.perplexity.texts.t.path={prose_file}", "evaluation.perplexity.batch_size=4",
    ]  # fmt: skip
    asked = [word for word in words if word != "evaluation=none"]
    found = both(run_cfsp, [*asked, *[f"+{w}" if ".texts.t." in w else w for w in text]], tmp_path)
    rows = [json.loads((out / "record.json").read_text())["measurements"] for out in found]
    for side in ("dense", "pruned"):
        values = [{r["task"]: r["value"] for r in row[side] if r["suite"] == "perplexity"} for row in rows]
        # bit for bit the same forward; the logits are taken from the same hidden states
        assert values[0] == values[1]
        assert values[0]


def test_logits_of_a_streamed_model_are_never_those_of_a_batch(folder, monkeypatch) -> None:
    from cfsp.evaluation.perplexity import negative_log_likelihood
    from cfsp.model.driver import BlockDriver

    source, cpu = locate(ModelSection(name="m", path=str(folder))), torch.device("cpu")
    ids = torch.randint(VOCABULARY, (7, 24), generator=torch.Generator().manual_seed(1))
    shapes, real = [], BlockDriver.logits
    monkeypatch.setattr(
        BlockDriver, "logits", lambda self, ids, hidden: shapes.append(hidden.shape[:2]) or real(self, ids, hidden)
    )
    found = [
        negative_log_likelihood(load(source, dtype=dtype, device=cpu), ids, 4, "")
        for dtype in (torch.float32, torch.bfloat16)
        for load in (load_model, load_streamed)
    ]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert shapes == [(1, 24)] * 2 * 7


def test_logits_and_generation(folder) -> None:
    source = locate(ModelSection(name="m", path=str(folder)))
    cpu = torch.device("cpu")
    memory = load_model(source, dtype=torch.float32, device=cpu)
    disk = load_streamed(source, dtype=torch.float32, device=cpu)
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(memory(ids).logits, disk(ids).logits)
    assert all(parameter.is_meta for parameter in disk.parameters())


def test_each_block_is_read_once_to_calibrate_and_once_to_write(run_cfsp, words, monkeypatch) -> None:
    made = []

    def watched(*args, **keys):
        made.append(load_streamed(*args, **keys))
        return made[-1]

    monkeypatch.setattr(base_models, "load_streamed", watched)
    code, _, err = run_cfsp(*words, "model.streaming=on", "pruner=cfsp")
    assert code == 0, err
    # The probe looks at the first block before.
    assert weights_of(made[0]).reads in ([3] + [2] * (BLOCKS - 1), [3, 3] + [2] * (BLOCKS - 2))


def test_a_killed_calibration_goes_on(run_cfsp, words, tmp_path, monkeypatch) -> None:
    seen = []
    real = passing.collecting

    def dying(blocks):
        seen.append(blocks[0].index)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(blocks)

    monkeypatch.setattr(passing, "collecting", dying)
    monkeypatch.setattr(passing, "_SHARE_OF_TIME", 1e9)
    out = tmp_path / "again"
    given = [*words, "model.streaming=on", f"paths.output_dir={out}", f"paths.cache_dir={tmp_path / 'c'}"]
    code, _, _ = run_cfsp(*given)
    assert code != 0
    assert not (out / "model").exists()
    code, _, err = run_cfsp(*given)
    assert code == 0, err
    assert seen == [0, 1, 2, 2, 3]
    assert not list((tmp_path / "c").rglob("*.progress"))
    whole, _ = both(run_cfsp, words, tmp_path)
    assert json.loads((out / "plan.json").read_text()) == json.loads((whole / "plan.json").read_text())


def test_a_kill_while_writing_leaves_no_folder_and_no_file_is_written_twice(
    run_cfsp, words, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(checkpoint, "STREAMED_SHARD_BYTES", 100_000)
    given = [*words, "model.streaming=on"]
    real, written = shard_writer.write_file, []

    def dying(file, *args):
        if file.name.startswith("model-00003"):
            os._exit(9)
        real(file, *args)

    child = os.fork()
    if not child:
        monkeypatch.setattr(shard_writer, "write_file", dying)
        run_cfsp(*given)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    out = tmp_path / "out"
    assert not (out / "model").exists()

    def watched(file, *args):
        written.append(file.name)
        real(file, *args)

    monkeypatch.setattr(shard_writer, "write_file", watched)
    code, _, err = run_cfsp(*given)
    assert code == 0, err
    assert written
    assert not [name for name in written if name.startswith(("model-00001", "model-00002"))]
    assert [path.name for path in out.iterdir() if path.name.startswith(".model")] == []
    memory, _ = both(run_cfsp, words, tmp_path)
    found = [weights(place / "model") for place in (memory, out)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("importance=taylor", "pruner=one_shot"), ("model.streaming=on", "gradients", "model.streaming=off")),
        (("recovery=lora", "recovery.cutoff=32"), ("model.streaming=on", "recovery=lora", "recovery=none")),
        (("calibration=self", "calibration.seq_len=32"), ("model.streaming=on", "calibration=self")),
    ],
)
def test_what_needs_the_model_in_memory_is_refused(refused, words, more, parts) -> None:
    asked = [word for word in words if not (more[0] == "calibration=self" and word.startswith("calibration"))]
    mentions(refused(*asked, *more, "model.streaming=on"), *parts)


def test_auto_streams_what_does_not_fit(run_cfsp, words, monkeypatch) -> None:
    from cfsp.pipeline import preflight as prepare

    made = []
    monkeypatch.setattr(prepare, "available", lambda device: 100_000)
    monkeypatch.setattr(
        base_models, "load_streamed", lambda *args, **keys: made.append(1) or load_streamed(*args, **keys)
    )
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    assert made


@pytest.mark.parametrize(("gpu", "cpu", "expected"), [(10, 10, False), (1, 10, True), (10, 1, True)])
def test_auto_looks_at_the_memory_that_weights_pass_on_their_way_to_a_gpu(
    words, folder, monkeypatch, gpu, cpu, expected
) -> None:
    from cfsp.config.compose import compose
    from cfsp.config.parse import parse
    from cfsp.model.outline import outline
    from cfsp.pipeline import preflight as prepare

    view = outline(locate(ModelSection(name="m", path=str(folder))))
    weights = view.model_parameters * 4
    monkeypatch.setattr(prepare, "available", lambda device: weights * (cpu if device.type == "cpu" else gpu))

    def streams(*more: str) -> bool:
        return prepare.must_stream(parse(compose([*words, *more])), view, torch.float32, torch.device("cuda"))

    assert streams() is expected
    if expected:
        least = "cuda" if gpu < cpu else "cpu"
        with pytest.raises(ConfigError, match=f"GB are free on {least}"):
            streams("recovery=lora")


def test_the_base_model_that_a_sweep_keeps_is_not_counted_against_its_next_run(words, monkeypatch, tmp_path) -> None:
    from cfsp.config.compose import compose
    from cfsp.config.parse import parse
    from cfsp.pipeline import preflight as prepare
    from cfsp.pipeline.base_models import BaseModels
    from cfsp.pipeline.run import run

    bases = BaseModels(keep=True)
    total = 10_000_000
    monkeypatch.setattr(prepare, "available", lambda device: total - bases.weight_bytes)
    monkeypatch.setattr(base_models, "load_streamed", lambda *args, **keys: pytest.fail("it fits"))
    for ratio in (0.3, 0.5):
        more = [
            f"sparsity.ratio={ratio}",
            "logger=none",
            "save.model=false",
            f"paths.output_dir={tmp_path / str(ratio)}",
        ]
        folders = {"output_dir": str(ratio), "cache_dir": "c", "records_dir": "r"}
        places = [f"paths.{key}={tmp_path / name}" for key, name in folders.items()]
        run(parse(compose([*words, *more, *places])), base_models=bases)
        total = int(bases.weight_bytes / 0.7)  # the weights fit, beside themselves they do not
    assert bases.weight_bytes


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


def _file_of(at: Path, name: str) -> Path:
    return at / json.loads((at / "model.safetensors.index.json").read_text())["weight_map"][name]


def test_a_nan_names_block_and_tensor(run_cfsp, words, damaged) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    file = _file_of(damaged, name)
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    code, _, err = run_cfsp(*words, "model.streaming=on", f"model.path={damaged}")
    assert code != 0
    assert "block 2" in err
    assert name in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_what_belongs_to_no_block_is_looked_at_before_the_pass(refused, words, damaged, name) -> None:
    file = _file_of(damaged, name)
    tensors = {key: found.clone() for key, found in load_file(file).items()}
    tensors[name].view(-1)[-1] = torch.nan  # of an embedding: the row of a token that no text has
    save_file(tensors, file, metadata={"format": "pt"})
    lines = refused(*words, "model.streaming=on", f"model.path={damaged}", loads=True)
    assert f"{name} holds NaN" in lines[-1]
    assert not any("calibrate" in line for line in lines)


def test_a_file_that_is_cut_off_while_it_is_read(damaged) -> None:
    source = locate(ModelSection(name="m", path=str(damaged)))
    model = load_streamed(source, dtype=torch.float32, device=torch.device("cpu"))
    name = "model.layers.3.mlp.down_proj.weight"
    file = _file_of(damaged, name)
    with file.open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(CheckpointError, match=rf"{file.name}.*ends within model\.layers\.\d"):
        model(torch.arange(4)[None])


def test_a_full_disk_is_one_line(run_cfsp, words, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_file", full)
    code, _, err = run_cfsp(*words, "model.streaming=on")
    assert code == 1 or code == 2
    assert "No space left" in err
    assert len(err.strip().splitlines()) == 1
    assert not [path for path in (tmp_path / "out").iterdir() if "model" in path.name]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
def test_a_save_that_is_stopped_keeps_its_finished_files(run_cfsp, words, tmp_path, monkeypatch, stop) -> None:
    monkeypatch.setattr(checkpoint, "STREAMED_SHARD_BYTES", 100_000)
    given = [*words, "model.streaming=on"]
    real, written = shard_writer.write_file, []

    def stopping(file, *args):
        if file.name.startswith("model-00003"):
            file.write_bytes(b"begun")
            raise stop
        real(file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_file", stopping)
        code, _, err = run_cfsp(*given)
    assert code != 0
    out = tmp_path / "out"
    (scratch,) = (path for path in out.iterdir() if path.name.startswith(".model"))
    assert sorted(path.name[:11] for path in scratch.glob("model-*")) == ["model-00001", "model-00002"]
    if isinstance(stop, OSError):
        mentions(err.strip().splitlines(), "No space left", "2 finished weight files", str(scratch))
    # One of them is another than it is to be, though of the same size.
    damaged = next(scratch.glob("model-00002*"))
    damaged.write_bytes(damaged.read_bytes().replace(b'"F32"', b'"I32"', 1))

    def watched(file, *args):
        written.append(file.name[:11])
        real(file, *args)

    monkeypatch.setattr(shard_writer, "write_file", watched)
    code, _, err = run_cfsp(*given)
    assert code == 0, err
    assert written[:2] == ["model-00002", "model-00003"]
    assert not scratch.exists()
    memory, _ = both(run_cfsp, words, tmp_path)
    found = [weights(place / "model") for place in (memory, out)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_disk_that_cannot_hold_the_state_of_the_pass_does_not_end_it(
    run_cfsp, words, tmp_path, monkeypatch, caplog
) -> None:
    tried = []

    def full(file, *_: object) -> None:
        tried.append(file)
        file.write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(passing, "write_file", full)
    monkeypatch.setattr(passing, "_SHARE_OF_TIME", 1e9)
    code, _, err = run_cfsp(*words, "model.streaming=on", f"paths.cache_dir={tmp_path / 'c'}")
    assert code == 0, err
    assert len(tried) == 1
    assert [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()]
    assert not tried[0].parent.exists()
    assert not list((tmp_path / "c").rglob("*.progress"))


@pytest.mark.parametrize("memory", ["0", "0.000004"], ids=["all in the file", "some in the file"])
@pytest.mark.parametrize("pruner", ["cfsp", "wanda_sp_sequential"])
def test_hidden_states_beyond_the_memory_limit_lie_in_a_file(
    run_cfsp, words, tmp_path, monkeypatch, memory, pruner
) -> None:
    used = []
    real = HiddenStates._write
    monkeypatch.setattr(
        HiddenStates, "_write", lambda self, *args: used.append(self.bytes_in_file) or real(self, *args)
    )
    memory_run, streaming = both(run_cfsp, [*words, f"calibration.memory_gb={memory}"], tmp_path, f"pruner={pruner}")
    assert used
    plans = [json.loads((out / "plan.json").read_text()) for out in (memory_run, streaming)]
    assert plans[0] == plans[1]
    records = [json.loads((out / "record.json").read_text()) for out in (memory_run, streaming)]
    assert records[0]["run_id"] == records[1]["run_id"]
    # the limit decides no figure, so it is no part of the identity either
    asked = [*words, f"pruner={pruner}", f"paths.output_dir={tmp_path / 'plain'}"]
    assert run_cfsp(*asked)[0] == 0
    assert json.loads((tmp_path / "plain" / "record.json").read_text())["run_id"] == records[0]["run_id"]
    assert not [path for path in tmp_path.rglob("tmp*") if path.is_file()]


def test_hidden_states_keep_their_values(tmp_path) -> None:
    states = [torch.randn(2, length, 8) for length in (3, 5, 4)]
    held = HiddenStates(states, device=torch.device("cpu"), spill=SpillBuffer(2 * 3 * 8 * 4, tmp_path))
    assert held.bytes_in_file == 2 * 9 * 8 * 4
    assert all(torch.equal(one, other) for one, other in zip(held, states, strict=True))
    held[1] = held[1] + 1
    held[0] = held[0] - 1
    assert torch.equal(held[1], states[1] + 1)
    assert torch.equal(held[0], states[0] - 1)
    assert torch.equal(held[2], states[2])
    assert [held.shape(n)[0] for n in range(3)] == [(2, 3, 8), (2, 5, 8), (2, 4, 8)]
    assert len(held.empty_like()) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_hold_the_hidden_states_is_one_line(run_cfsp, words, monkeypatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    code, _, err = run_cfsp(*words, "model.streaming=on", "calibration.memory_gb=0")
    assert code == 1
    mentions(err.strip().splitlines(), "No space left", "calibration.memory_gb", "paths.cache_dir")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ((), True),
        (("model.streaming=on",), False),
        (("recovery=lora",), False),
        (("calibration=self",), False),
        (("calibration=self", "pruner=none"), True),
        (("importance=taylor", "pruner=one_shot"), False),
    ],
)
def test_out_of_memory_names_streaming_where_it_is_a_way_out(more, named) -> None:
    from cfsp.config.compose import compose
    from cfsp.config.parse import parse
    from cfsp.pipeline.outcome import _out_of_memory_hint

    hint = _out_of_memory_hint(parse(compose(more)), SimpleNamespace(stages=[{"name": "load"}]))
    assert ("model.streaming=on" in hint) is named
    mentions([hint], "out of memory", "calibration.batch_size", "model.dtype=bfloat16")


def test_a_memory_limit_that_is_none(refused, words) -> None:
    mentions(refused(*words, "calibration.memory_gb=-1"), "calibration.memory_gb=-1")
    mentions(refused(*words, "calibration.memory_gb=much"), "calibration.memory_gb=much")


def test_tasks_read_each_block_once(tmp_path) -> None:
    """Scores are those in memory; the batches of all requests go through a block before the next one is read."""
    source = locate(ModelSection(name="books7m", path="pkg://cfsp/assets/books7m"))
    cpu = torch.device("cpu")
    tokenizer = load_tokenizer(source)
    tasks = ZeroShot(["books_cloze", "books_grammar"], include_path="pkg://cfsp/assets/tasks", limit=12, batch_size=5)
    memory = tasks.measure(load_model(source, dtype=torch.float32, device=cpu), tokenizer)
    disk = load_streamed(source, dtype=torch.float32, device=cpu)
    weights_of(disk).spill = SpillBuffer(0, tmp_path)
    assert [vars(row) for row in tasks.measure(disk, tokenizer)] == [vars(row) for row in memory]
    # Requests of one kind are asked together; one read ahead of the end may be dropped.
    assert max(weights_of(disk).reads) <= 2
    assert all(parameter.is_meta for parameter in disk.parameters())


def test_rolling_requests_read_each_block_once(tmp_path, capsys) -> None:
    """The harness takes their windows batch by batch; here they are longer than a batch, and of several requests."""
    from lm_eval.models.huggingface import HFLM

    from cfsp.evaluation.streamed_harness import BlockByBlock

    source = locate(ModelSection(name="books7m", path="pkg://cfsp/assets/books7m"))
    cpu = torch.device("cpu")
    settings = {"tokenizer": load_tokenizer(source), "batch_size": 2, "max_length": 16}
    requests = [SimpleNamespace(args=(text,)) for text in ("It was a dark and stormy night. " * 12, "Call me Ishmael.")]
    memory = HFLM(pretrained=load_model(source, dtype=torch.float32, device=cpu), **settings)
    expected = memory.loglikelihood_rolling(requests, disable_tqdm=True)
    store = weights_of(load_streamed(source, dtype=torch.float32, device=cpu))
    harness = BlockByBlock(store, **settings)
    capsys.readouterr()
    assert harness.loglikelihood_rolling(requests, disable_tqdm=True) == expected
    assert max(store.reads) <= 2, "one read ahead of the end may be dropped"
    assert capsys.readouterr().err == ""


def test_a_model_is_hashed_once_for_all_processes(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(digest, "_LARGE", 0)
    monkeypatch.setattr(digest.time, "time", lambda: 1e12)  # the files are old enough to go by their times
    section = ModelSection(name="m", path=str(folder))
    digest._digest_of.cache_clear()
    first = locate(section, tmp_path / "digests").fingerprint
    assert first == folder_fingerprint(folder)
    real = digest.hashlib.file_digest
    digest._digest_of.cache_clear()  # as in another process
    with monkeypatch.context() as patch:
        patch.setattr(digest.hashlib, "file_digest", lambda *_: pytest.fail("the file was read again"))
        assert locate(section, tmp_path / "digests").fingerprint == first
    # a file that changed is read
    digest._digest_of.cache_clear()
    config = folder / "config.json"
    before = config.read_text()
    read = []
    monkeypatch.setattr(digest.hashlib, "file_digest", lambda *args: read.append(1) or real(*args))
    try:
        config.write_text(before + "\n")
        assert locate(section, tmp_path / "digests").fingerprint != first
    finally:
        config.write_text(before)
        digest._digest_of.cache_clear()
    assert len(read) == 1


def test_a_model_that_accelerate_dispatched_is_pruned_and_evaluated_as_it_is(folder) -> None:
    """device_map puts hooks around each module's forward; here all of them on one device, for want of several."""
    from accelerate import dispatch_model

    import cfsp
    from cfsp.evaluation.perplexity import negative_log_likelihood

    source = locate(ModelSection(name="m", path=str(folder)))
    cpu = torch.device("cpu")
    ids = torch.randint(VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(1))
    found = []
    for dispatched in (False, True):
        model = load_model(source, dtype=torch.float32, device=cpu)
        if dispatched:
            places = {f"model.layers.{n}": "cpu" for n in range(BLOCKS)}
            rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
            model = dispatch_model(model, {**places, **rest}, main_device="cpu", force_hooks=True)
            assert hasattr(model.model.layers[0], "_hf_hook")
        for pruner in ("cfsp", "wanda_sp_sequential", "two_ssp"):
            plan = cfsp.prune(model, ids, pruner, 0.4, round_to=8)
            found.append((dispatched, pruner, plan.to_json()))
        cfsp.apply(model, plan)
        found.append((dispatched, "nll", negative_log_likelihood(model, ids, 2, "")))
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        assert one[1:] == other[1:]


def test_a_streamed_folder_is_the_whole_folder_in_memory(run_cfsp, words, folder, tmp_path) -> None:
    """Generation settings, tokenizer, code, plan and card too; only the reference's greedy part is shorter."""
    settings = {"eos_token_id": [2, 5, 6], "temperature": 0.6, "do_sample": True, "pad_token_id": 3}
    copied = Path(shutil.copytree(folder, tmp_path / "base"))
    (copied / "generation_config.json").write_text(json.dumps(settings))
    memory, streaming = both(run_cfsp, [*words, f"model.path={copied}"], tmp_path)
    found = [{p.relative_to(out): p for p in (out / "model").rglob("*") if p.is_file()} for out in (memory, streaming)]
    names = [{path.relative_to("model") for path in one} for one in found]
    assert names[0] == names[1]
    assert json.loads((streaming / "model" / "generation_config.json").read_text())["eos_token_id"] == [2, 5, 6]
    for name in names[0]:
        if name.suffix != ".safetensors":
            assert (memory / "model" / name).read_bytes() == (streaming / "model" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "value", "more", "parts"),
    [
        ("model.embed_tokens.weight", float("nan"), (), ("model.embed_tokens.weight", "NaN")),
        ("model.embed_tokens.weight", 1e6, ("save.dtype=float16",), ("does not fit into torch.float16",)),
        (
            "model.layers.1.self_attn.q_proj.weight",
            1e6,
            ("save.dtype=float16",),
            ("layers.1.self_attn.q_proj", "float16"),
        ),
    ],
)
def test_damaged_and_unfitting_weights_are_found_wherever_they_are(
    run_cfsp, words, damaged, tmp_path, name, value, more, parts
) -> None:
    file = _file_of(damaged, name)
    tensors = {key: found.clone() for key, found in load_file(file).items()}
    tensors[name][-1, 0] = value  # of an embedding: the row of a token that no text has
    save_file(tensors, file, metadata={"format": "pt"})
    code, _, err = run_cfsp(*words, "model.streaming=on", f"model.path={damaged}", *more, "pruner=magnitude_sp")
    assert code != 0
    mentions(err.strip().splitlines(), *parts)
    assert not (tmp_path / "out" / "model").exists()


def test_all_hidden_states_share_one_limit(tmp_path) -> None:
    room, cpu = SpillBuffer(100, tmp_path), torch.device("cpu")
    first = HiddenStates([torch.zeros(1, 5, 4)], device=cpu, spill=room)
    second = HiddenStates([torch.zeros(1, 5, 4)], device=cpu, spill=room)
    assert (first.bytes_in_file, second.bytes_in_file) == (0, 80)
    del first
    third = HiddenStates([torch.ones(1, 5, 4)], device=cpu, spill=room)
    assert third.bytes_in_file == 0
    second[0] = torch.ones(1, 7, 4)  # of another size than what lies there
    assert second[0].shape == (1, 7, 4)


def test_hidden_states_of_a_resumed_pass_are_held_once(folder, tmp_path) -> None:
    source = locate(ModelSection(name="m", path=str(folder)))
    disk = load_streamed(source, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.randint(VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(1))
    size = 6 * 32 * 32 * 4
    weights_of(disk).spill = SpillBuffer(10 * size, tmp_path)
    driver = BlockDriver(resolve(disk), 2)
    kept = HiddenStates(driver.entry(ids).hidden, device=torch.device("cpu"), spill=weights_of(disk).spill)
    most = 0
    for step in driver.steps(ids, hidden=kept, first=2):
        step.advance()
        most = max(most, weights_of(disk).spill.used)
    assert most == size


@pytest.mark.parametrize("memory", ["1", "0"], ids=["matrices fit", "matrices on disk"])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("pruner.sequential=true",),
        ("importance=obs", "allocator=reconstruction"),
        ("importance=obs", "importance.first_order=true", "importance.swaps=4"),
        ("pruner.ridge=auto",),
    ],
)
def test_least_squares_of_a_streamed_model(run_cfsp, words, tmp_path, memory, more) -> None:
    given = [*words, f"calibration.memory_gb={memory}", "pruner=one_shot", "pruner.compensation=least_squares"]
    memory_run, streaming = both(run_cfsp, given, tmp_path, *more)
    plans = [json.loads((out / "plan.json").read_text()) for out in (memory_run, streaming)]
    assert plans[0] == plans[1]
    assert plans[0]["compensation"]
    found = [weights(out / "model") for out in (memory_run, streaming)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_view_gives_access_to_its_weights_wherever_they_are(folder) -> None:
    source, cpu = locate(ModelSection(name="m", path=str(folder))), torch.device("cpu")
    memory = resolve(load_model(source, dtype=torch.float32, device=cpu))
    disk = resolve(load_streamed(source, dtype=torch.float32, device=cpu))
    assert (memory.weights.is_streamed, disk.weights.is_streamed) == (False, True)
    assert memory.device == disk.device == cpu
    assert memory.weights.sample(memory.blocks[1]) is None, "it is computed when it is asked for"
    held = list(memory.blocks[1].module.parameters())
    with disk.weights.resident(disk.blocks[1]), memory.weights.resident(memory.blocks[1]):
        assert all(map(torch.equal, disk.blocks[1].module.parameters(), held))
    assert all(parameter.is_meta for parameter in disk.blocks[1].module.parameters())
    assert disk.weights.sample(disk.blocks[1])
    assert memory.weights.resident_bytes(memory.blocks) == 4 * memory.model_parameters
    assert disk.weights.resident_bytes(disk.blocks) == 2 * sum(parameter.nbytes for parameter in held)
    assert (memory.weights.round_to(torch.float32), memory.weights.round_to(torch.bfloat16)) == (False, True)
    assert not disk.weights.round_to(torch.bfloat16), "values are rounded when they are read"
    with disk.weights.resident(disk.blocks[0]):
        assert all(map(torch.equal, disk.blocks[0].module.parameters(), memory.blocks[0].module.parameters()))


def test_weights_on_disk_give_the_first_logits_of_a_greedy_continuation_alone(folder) -> None:
    source, cpu = locate(ModelSection(name="m", path=str(folder))), torch.device("cpu")
    model = load_model(source, dtype=torch.float32, device=cpu)
    memory, disk = weights_of(model), weights_of(load_streamed(source, dtype=torch.float32, device=cpu))
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].argmax(-1)

    found = list(memory.greedy(ids, 3, choose, "greedy"))
    assert [logits.shape[1] for logits in found] == [8, 1, 1]
    text = ids
    for logits in found:
        with torch.no_grad():
            expected = model(text, use_cache=False).logits
        torch.testing.assert_close(logits[:, -1], expected[:, -1])
        text = torch.cat([text, choose(expected)[:, None]], dim=1)
    (alone,) = disk.greedy(ids, 3, choose, "greedy")
    torch.testing.assert_close(alone, found[0])
    assert max(disk.reads) <= 2, "once for the pass; the class of the blocks may be tried before"


def test_the_head_of_a_streamed_model_reads_no_embedding(folder) -> None:
    source, cpu = locate(ModelSection(name="m", path=str(folder))), torch.device("cpu")
    ids, hidden = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 32)
    memory = weights_of(load_model(source, dtype=torch.float32, device=cpu)).head_inputs(ids, hidden)
    disk = weights_of(load_streamed(source, dtype=torch.float32, device=cpu)).head_inputs(ids, hidden)
    assert memory == {"input_ids": ids}
    assert disk == {"inputs_embeds": hidden}
