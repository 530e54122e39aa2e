"""Train a small LLaMA and its tokenizer from any folder of text files.

    python scripts/train_bundled_model.py --data books/ --out models/books7m

The defaults are the recipe of the bundled ``books7m``: a 7.3 M-parameter LLaMA that learns from 25 M tokens,
most of them in short windows (cheap steps), the last tenth in windows of the full context so that every
position is trained. A run is a function of its files, settings and seed: windows are numbered rather than
drawn, so a killed run that is started again with the same command ends in the same weights.

The script is a single file on purpose: it imports nothing of cfsp and can be copied to another machine.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
# Settings that may differ between the two halves of an interrupted run, because they do not decide what is trained.
FREE_TO_CHANGE = {"data", "out", "device", "threads", "checkpoint_every"}

T = TypeVar("T")


class RecipeError(Exception):
    """A mistake of the user. It is shown as one line without a traceback."""


def require(condition: bool, message: str) -> None:
    """Raise a RecipeError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise RecipeError(message)


def option(default: T, text: str) -> T:
    """Declare a field of the recipe with its default and its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Phase:
    """A stretch of training with a window length and a learning-rate schedule of its own.

    Attributes:
        tokens: tokens trained on.
        window: tokens of a window.
        batch: windows of a step.
        learning_rate: peak learning rate.
    """

    tokens: int
    window: int
    batch: int
    learning_rate: float

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.window * self.batch

    @property
    def steps(self) -> int:
        """Number of whole steps."""
        return self.tokens // self.step_tokens


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. The command line is derived from these fields."""

    data: Path = field(metadata={"help": "folder of .txt and .md files, read recursively as UTF-8"})
    out: Path = field(metadata={"help": "folder for the model; a run killed half-way resumes from it"})
    hidden_size: int = option(256, "width of the residual stream")
    intermediate_size: int = option(768, "FFN width")
    layers: int = option(8, "number of blocks")
    heads: int = option(8, "query heads per block")
    kv_heads: int = option(4, "key/value heads per block")
    vocab_size: int = option(4096, "tokenizer entries, the 256 bytes and 3 special tokens included")
    positions: int = option(512, "longest context")
    phase1_tokens: int = option(22_300_000, "tokens trained on in phase 1; 0 skips it")
    phase1_window: int = option(256, "tokens per window in phase 1")
    phase1_batch: int = option(32, "windows per step in phase 1")
    phase1_learning_rate: float = option(2e-3, "peak learning rate of phase 1")
    phase2_tokens: int = option(2_700_000, "tokens trained on in phase 2; 0 skips it")
    phase2_window: int = option(512, "tokens per window in phase 2")
    phase2_batch: int = option(16, "windows per step in phase 2")
    phase2_learning_rate: float = option(4e-4, "peak learning rate of phase 2")
    warmup_fraction: float = option(0.03, "share of each phase's steps spent warming up")
    weight_decay: float = option(0.1, "AdamW weight decay, on matrices only")
    clip_norm: float = option(1.0, "largest gradient norm")
    holdout: int = option(12, "files kept from model and tokenizer training, to measure perplexity on")
    eval_tokens: int = option(16_384, "held-out tokens measured, spread evenly over the held-out text")
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "autocast type; auto is bf16 where it is fast")
    seed: int = option(0, "decides the held-out files, the initial weights and the order of the windows")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes a GPU where there is one")
    threads: int = option(0, "CPU threads of torch; 0 leaves torch's default")
    checkpoint_every: int = option(200, "steps between checkpoints")

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "checkpoint_every"):
            require(getattr(self, name) > 0, f"--{name} must be positive")
        for name in ("holdout", "seed", "threads", "warmup_fraction"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")
        require(self.hidden_size % (2 * self.heads) == 0, "--hidden_size must be an even multiple of --heads")
        require(self.heads % self.kv_heads == 0, "--heads must be a multiple of --kv_heads")
        require(bool(self.phases), "--phase1_tokens and --phase2_tokens are both 0: nothing to train")
        for p in self.phases:
            require(p.batch > 0, "a phase's batch must be positive")
            require(2 <= p.window <= self.positions, "a phase's window must lie between 2 and --positions")
            require(p.steps > 0, f"{p.tokens} tokens do not fill one batch of {p.batch} x {p.window}")

    @property
    def phases(self) -> list[Phase]:
        """Phases that train on any tokens, in order."""
        first = Phase(self.phase1_tokens, self.phase1_window, self.phase1_batch, self.phase1_learning_rate)
        second = Phase(self.phase2_tokens, self.phase2_window, self.phase2_batch, self.phase2_learning_rate)
        return [phase for phase in (first, second) if phase.tokens]


@dataclass(frozen=True)
class Document:
    """A text file.

    Attributes:
        path: its path.
        name: its path within the data folder.
        sha256: hash of its content.
    """

    path: Path
    name: str
    sha256: str

    @property
    def text(self) -> str:
        """Content of the file, read anew each time so that it is not held in memory."""
        return self.path.read_text(encoding="utf-8-sig")


def find_documents(folder: Path) -> list[Document]:
    """Find the text files, sorted by name so that neither the file system nor the machine decides their order."""
    require(folder.is_dir(), f"--data {folder} is not a folder")
    documents = []
    for path in folder.rglob("*"):
        if path.suffix.lower() in {".txt", ".md"} and path.is_file():
            content = path.read_bytes()
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise RecipeError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
            name = path.relative_to(folder).as_posix()
            documents.append(Document(path, name, hashlib.sha256(content).hexdigest()))
    require(bool(documents), f"--data {folder} holds no .txt or .md file")
    return sorted(documents, key=lambda document: document.name)


def split(documents: list[Document], recipe: Recipe) -> tuple[list[Document], list[Document]]:
    """Split into training and held-out documents. Documents stay whole, because a window of a known book is no test."""
    count = len(documents)
    require(count > recipe.holdout, f"--holdout {recipe.holdout} of {count} files leaves none to train on")
    held_out = np.random.default_rng(recipe.seed).permutation(count)[: recipe.holdout]
    train = np.setdiff1d(np.arange(count), held_out)
    return [documents[i] for i in train], [documents[i] for i in np.sort(held_out)]


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE. All 256 bytes are entries, so any text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Nothing is added to a text: perplexity windows and calibration samples are cut from plain token streams.
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (document.text for document in documents)
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(documents))
    return tokenizer


def encode(documents: list[Document], tokenizer: Tokenizer) -> np.ndarray:
    """Encode all documents as one stream; each begins with the start token, as in the bundled model's training."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    start = np.array([tokenizer.token_to_id(START)], dtype)
    parts: list[np.ndarray] = [np.empty(0, dtype)]
    for first in range(0, len(documents), 16):  # in groups: an encoding takes far more memory than its ids
        texts = [document.text for document in documents[first : first + 16]]
        for encoding in tokenizer.encode_batch_fast(texts):
            parts += [start, np.array(encoding.ids, dtype)]
    return np.concatenate(parts)


def windows_of(tokens: np.ndarray, length: int, kind: str) -> np.ndarray:
    """Cut a stream into windows, [count, length]; ``kind`` names the text in the error about too short ones."""
    count = len(tokens) // length
    require(count > 0, f"the {kind} text has {len(tokens)} tokens, too few for one window of {length}")
    return tokens[: count * length].reshape(count, length)


def window_order(count: int, phase: Phase, seed: list[int]) -> np.ndarray:
    """Return window numbers, [steps, batch]. Every window is seen once before any is seen again."""
    needed = phase.steps * phase.batch
    epochs = range(math.ceil(needed / count))
    order = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(count) for epoch in epochs])
    return order[:needed].reshape(phase.steps, phase.batch)


def new_model(recipe: Recipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Build the model with seeded initial weights."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden_size // recipe.heads,
        max_position_embeddings=recipe.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(START),
        eos_token_id=tokenizer.token_to_id(END),
    )
    return LlamaForCausalLM(config)


def use_autocast(precision: str, device: torch.device) -> bool:
    """Return whether to compute in bf16, which is twenty times slower on a processor without instructions for it."""
    if precision != "auto" or device.type == "cuda":
        return precision != "fp32"
    # Older releases of torch that the project supports cannot tell: fp32 is right everywhere.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(present for name, present in capabilities.items() if "bf16" in name)


def loss_on(model: LlamaForCausalLM, windows: np.ndarray, autocast: bool = False) -> torch.Tensor:
    """Return the mean loss on a batch of windows."""
    batch = torch.from_numpy(windows.astype(np.int64)).to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss: torch.Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


def new_optimizer(model: LlamaForCausalLM, phase: Phase, weight_decay: float) -> torch.optim.AdamW:
    """Make the optimizer of a phase. Only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=phase.learning_rate, betas=(0.9, 0.95))


def update(model: LlamaForCausalLM, batch: np.ndarray, optimizer: torch.optim.AdamW, recipe: Recipe) -> float:
    """Take a step; returns the loss before it."""
    loss = loss_on(model, batch, use_autocast(recipe.precision, model.device))
    value = loss.item()
    require(math.isfinite(value), f"the loss became {value}; lower the learning rates")
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return value


def train(model: LlamaForCausalLM, tokens: np.ndarray, recipe: Recipe, checkpoint: Path) -> None:
    """Run the phases, from the checkpoint where there is one.

    Training draws no random number after the initial weights (there is no dropout, and windows are numbered),
    so weights, optimizer, schedule and step number are the whole state.
    """
    phases, saved = recipe.phases, None
    start_phase, start_step = 0, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=model.device, weights_only=True)
        start_phase, start_step = saved["phase"], saved["step"]
        model.load_state_dict(saved["model"])
    model.train()
    sizes = [phase.steps * phase.step_tokens for phase in phases]
    behind = sum(sizes[:start_phase]) + start_step * phases[start_phase].step_tokens
    with tqdm(total=sum(sizes), initial=behind, unit="tok", unit_scale=True, mininterval=1.0) as bar:
        for number, phase in list(enumerate(phases))[start_phase:]:
            optimizer = new_optimizer(model, phase, recipe.weight_decay)
            warmup = math.ceil(recipe.warmup_fraction * phase.steps)
            schedule = cosine_schedule(optimizer, warmup, phase.steps)
            if saved and number == start_phase:
                optimizer.load_state_dict(saved["optimizer"])
                schedule.load_state_dict(saved["schedule"])
            windows = windows_of(tokens, phase.window, "training")
            order = window_order(len(windows), phase, [recipe.seed, number])
            for step in range(start_step if number == start_phase else 0, phase.steps):
                loss = update(model, windows[order[step]], optimizer, recipe)
                schedule.step()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(phase.step_tokens)
                if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == phase.steps:
                    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
                    state = {name: part.state_dict() for name, part in parts.items()}
                    # Renaming is atomic: a kill while writing leaves the previous checkpoint whole.
                    torch.save(state | {"phase": number, "step": step + 1}, checkpoint.with_suffix(".new"))
                    checkpoint.with_suffix(".new").replace(checkpoint)


def held_out_perplexities(model: LlamaForCausalLM, tokens: np.ndarray, recipe: Recipe) -> dict[int, float]:
    """Return the perplexity for each window length."""
    perplexities = {}
    for phase in recipe.phases:
        windows = windows_of(tokens, phase.window, "held-out")
        count = min(len(windows), max(1, recipe.eval_tokens // phase.window))
        chosen = np.linspace(0, len(windows) - 1, count).round().astype(int)
        with torch.inference_mode():
            losses = [loss_on(model, windows[[i]]).item() for i in chosen]
        perplexities[phase.window] = math.exp(sum(losses) / count)
    return perplexities


def claim_output(recipe: Recipe, documents: list[Document]) -> Path:
    """Return the folder of the run's unfinished state, new or left by the same command.

    Before its first checkpoint a run has nothing to lose, so any command may take its place.
    """
    out, state = recipe.out, recipe.out / "training-state"
    inside = out.resolve().is_relative_to(recipe.data.resolve())
    require(not inside, "--out lies inside --data: the result would become part of the text")
    run = {name: value for name, value in asdict(recipe).items() if name not in FREE_TO_CHANGE}
    run["files"] = [[document.name, document.sha256] for document in documents]
    if (state / "checkpoint.pt").exists():
        before = json.loads((state / "run.json").read_text())
        changed = ", ".join(name for name in run if before.get(name) != run[name])
        require(not changed, f"--out {out} holds an unfinished run with other settings: {changed}")
        print(f"resuming the run in {out}")
    else:
        free = not out.exists() or (out.is_dir() and all(path == state for path in out.iterdir()))
        require(free, f"--out {out} is not empty and holds no unfinished run")
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
        (state / "run.json").write_text(json.dumps(run))
    return state


def provenance(recipe: Recipe, documents: list[Document], held_out: list[Document], results: str) -> str:
    """Describe how the model was made, so that it can be made again and compared. No path of this machine is in it."""
    files = "\n".join(f"{d.sha256} {'*' if d in held_out else ' '} {d.name}" for d in documents)
    settings = [f"--{name} {value}" for name, value in asdict(recipe).items() if name not in ("data", "out")]
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "numpy")]
    weights = hashlib.sha256((recipe.out / "model.safetensors").read_bytes()).hexdigest()
    return f"""{recipe.out.resolve().name} - a small LLaMA trained by scripts/train_bundled_model.py.
Data     : folder {recipe.data.resolve().name}, {len(documents)} files, {len(held_out)} of them held out;
           sha256 of the list below {hashlib.sha256(files.encode()).hexdigest()}
Settings : {" ".join(settings)}
Versions : Python {platform.python_version()}, {", ".join(versions)}
{results}
sha256   : model.safetensors {weights}

Files (sha256 and name; * if held out):
{files}
"""


def pick_device(recipe: Recipe) -> torch.device:
    """Return the device, set up so that a repeated run gives the same numbers."""
    require(recipe.device != "cuda" or torch.cuda.is_available(), "--device cuda: no GPU is available")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(best if recipe.device == "auto" else recipe.device)


def run(recipe: Recipe) -> None:
    """Run the recipe: train the tokenizer and the model, save, measure, and write the provenance."""
    device = pick_device(recipe)
    documents = find_documents(recipe.data)
    train_documents, held_out = split(documents, recipe)
    state = claim_output(recipe, documents)

    checkpoint, tokenizer_file = state / "checkpoint.pt", str(state / "tokenizer.json")
    if not checkpoint.exists():
        train_tokenizer(train_documents, recipe.vocab_size).save(tokenizer_file)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    train_tokens, held_out_tokens = encode(train_documents, tokenizer), encode(held_out, tokenizer)
    for phase in recipe.phases:  # what cannot be measured should fail now, not after hours of training
        windows_of(train_tokens, phase.window, "training")
        if held_out:
            windows_of(held_out_tokens, phase.window, "held-out")

    model = new_model(recipe, tokenizer)
    model.to(device)  # type: ignore[arg-type]  # a decorator hides the signature
    train(model, train_tokens, recipe, checkpoint)

    if recipe.precision != "fp32":
        model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.save_pretrained(recipe.out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        model_max_length=recipe.positions,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(recipe.out)

    # The saved model is measured, with its rounding to bf16, in fp32 on every machine.
    model = LlamaForCausalLM.from_pretrained(recipe.out, dtype=torch.float32)
    measured = held_out_perplexities(model, held_out_tokens, recipe) if held_out else {}
    perplexity = ", ".join(f"{value:.2f} ({window}-token windows)" for window, value in measured.items())
    computed = f"in {'bf16' if use_autocast(recipe.precision, device) else 'fp32'} on {device.type}"
    trained_on = sum(phase.steps * phase.step_tokens for phase in recipe.phases)
    results = f"""\
Model    : {model.num_parameters():,} parameters, vocabulary of {model.config.vocab_size:,}
Training : {trained_on:,} tokens, of {len(train_tokens):,} in the files, {computed}
Held-out : perplexity {perplexity or "not measured"}"""
    print(results)
    text = provenance(recipe, documents, held_out, results)
    (recipe.out / "PROVENANCE.txt").write_text(text, encoding="utf-8")
    checkpoint.unlink()  # first: without it, a half-removed state is not taken for a run to resume
    shutil.rmtree(state)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns 0 when the model is saved, 2 for a mistake in the command or its files, 130 when interrupted."""
    parser = HfArgumentParser(
        Recipe,  # type: ignore[arg-type]
        usage="%(prog)s --data DIR --out DIR [settings]",
        description="Train a small LLaMA and its tokenizer from a folder of text files.",
    )
    settings = vars(parser.parse_args(arguments))
    try:
        run(Recipe(**settings))
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
