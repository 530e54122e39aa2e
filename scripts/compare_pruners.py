"""Every pruner on the same model, calibration windows and text; records and a table go to results/.

    python scripts/compare_pruners.py                                         the bundled model
    python scripts/compare_pruners.py --model FOLDER --text FILE --name NAME  another one: a local model and a text

Ratios .2, .35 and .5 of the decoder's parameters (sparsity.scope=decoder for all), widths not rounded, calibration
seeds 0, 1 and 2. What is finished is not repeated: the command goes on where it was stopped. Of --text, the first 60 %
of the lines are calibrated on and the rest is evaluated.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfsp.compose import compose
from cfsp.config import parse
from cfsp.errors import CfspError
from cfsp.pipeline import run
from cfsp.record.run_record import RunRecord
from cfsp.tables.methods import Figure, label, method_table

ROOT = Path(__file__).resolve().parent.parent
RATIOS = (0.2, 0.35, 0.5)
SEEDS = (0, 1, 2)
HEADS = "pruner.structure=heads_ffn"
METHODS = (
    ("random",), ("magnitude_sp",), ("uniform",), ("wanda_sp",), ("flap",), ("cfsp",),
    ("magnitude_sp", HEADS), ("wanda_sp_sequential",), ("flap_al_am",), ("llm_pruner",),
    ("two_ssp",), ("shortgpt",), ("sliding_window",), ("block_pruner", "pruner.search_sequences=8"),
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model with what it is calibrated on and evaluated with: ``words`` of the command line."""

    name: str
    words: tuple[str, ...]
    figure: Figure
    note: str
    command: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; without it the bundled model")
    parser.add_argument("--text", type=Path, help="a text that the model of --model knows")
    parser.add_argument("--name", help="how the model of --model is called in results/")
    parser.add_argument("--methods", nargs="+", metavar="PRUNER", help="run these alone; the table shows every record")
    parser.add_argument("--work", type=Path, default=Path("outputs/compare_pruners"), help="runs and caches")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="records/ and tables/ are made there")
    given = parser.parse_args()
    if (given.model is None) != (given.text is None) or (given.model is None) != (given.name is None):
        parser.error("--model, --text and --name belong together")
    logging.getLogger("cfsp").setLevel(logging.WARNING)
    subject = bundled() if given.model is None else local(given.name, given.model, given.text, given.work)
    methods = [method for method in METHODS if given.methods is None or method[0] in given.methods]
    made, failed = run_all(subject, given.work, methods)
    folder = given.results / "records" / "pruners" / subject.name
    for record in made:
        record.write(folder / f"{record.run_id}.json")
    records = in_order(found for path in folder.glob("*.json") if (found := RunRecord.read(path)) is not None)
    if records:
        path = given.results / "tables" / f"pruners-{subject.name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(subject, records), encoding="utf-8")
        print(path.read_text(encoding="utf-8"))
    return 1 if failed else 0


def bundled() -> Subject:
    """The model, calibration windows and evaluation prose that come with cfsp."""
    words = ("model=bundled", "calibration=bundled", "evaluation.perplexity.datasets=[bundled]")
    note = (
        "The bundled model (books7m); calibration: 48 random windows of 256 tokens of the bundled calibration prose; "
    )
    note += "evaluation: the other half."
    command = "python scripts/compare_pruners.py"
    return Subject("books7m", words, Figure("perplexity", "bundled", "perplexity"), note, command)


def local(name: str, model: Path, text: Path, work: Path) -> Subject:
    """A local model and a text, whose lines are split into one part to calibrate on and one to evaluate."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 6 // 10
    parts = {"calibration": lines[:cut], "evaluation": lines[cut:]}
    (work / "texts").mkdir(parents=True, exist_ok=True)
    files = {}
    for part, content in parts.items():
        files[part] = work / "texts" / f"{name}-{part}.txt"
        files[part].write_text("".join(content), encoding="utf-8")
    words = (
        "model=local", f"model.path={model}", f"model.name={name}",
        "calibration=text", f"calibration.path={files['calibration']}", "calibration.n_samples=48",
        "calibration.seq_len=256", "evaluation.perplexity.datasets=[text]",
        "calibration.bos=none", "evaluation.perplexity.texts.text.bos=none",
        f"evaluation.perplexity.texts.text.path={files['evaluation']}", "evaluation.perplexity.windows=[0,80]",
    )  # fmt: skip
    note = (
        f"{name}; calibration: 48 random windows of 256 tokens of the first 60 % of the lines of {text.name}; "
        "evaluation: the first 80 windows of the rest."
    )
    command = f"python scripts/compare_pruners.py --model {model} --text {text} --name {name}"
    return Subject(name, words, Figure("perplexity", "text", "perplexity"), note, command)


def run_all(subject: Subject, work: Path, methods: Sequence[Sequence[str]]) -> tuple[list[RunRecord], bool]:
    """Every method, ratio and seed; a run that fails does not stop the rest."""
    runs = [(method, ratio, seed) for method in methods for ratio in RATIOS for seed in SEEDS]
    records, failed = [], False
    for number, (method, ratio, seed) in enumerate(runs, start=1):
        pruner, *settings = method
        words = [
            *subject.words, f"pruner={pruner}", *settings, f"sparsity.ratio={ratio}", f"seed={seed}",
            "sparsity.scope=decoder", "sparsity.round_to=1",
            "evaluation=perplexity", "evaluation.perplexity.seq_len=256",
            "logger=none", "save.model=false", f"paths.output_dir={work / subject.name}",
            f"paths.cache_dir={work / 'cache'}", f"paths.records_dir={work / 'records'}",
        ]  # fmt: skip
        print(f"[{number}/{len(runs)}] {subject.name} {' '.join(method)} ratio={ratio} seed={seed}", file=sys.stderr)
        try:
            record, out = run(parse(compose(words)), multirun=True)
            records.append(record)
            shutil.rmtree(out / "model", ignore_errors=True)
        except CfspError as error:
            failed = True
            print(f"  failed: {error}", file=sys.stderr)
    return records, failed


def in_order(records: Iterable[RunRecord]) -> list[RunRecord]:
    """As METHODS lists them, then by ratio and seed."""
    names = [" ".join(word for word in method if not word.startswith("pruner.search")) for method in METHODS]

    def place(record: RunRecord) -> tuple[int, float, int]:
        assert record.plan is not None
        return names.index(label(record)), record.plan["requested"]["ratio"], record.identity["seed"]

    return sorted(records, key=place)


def page(subject: Subject, records: list[RunRecord]) -> str:
    """The table with what it shows and the command that makes it."""
    order = list(dict.fromkeys(label(record) for record in records))
    table = method_table(records, subject.figure, order)
    return (
        f"# All pruners, one budget: {subject.name}\n\n"
        f"{subject.note} Perplexity in windows of 256 tokens; mean ± standard deviation over calibration seeds "
        f"{', '.join(map(str, SEEDS))}; `sparsity.round_to=1`; no recovery; `block_pruner` searches on 8 of the "
        "windows. Methods that remove whole blocks or submodules come as near to the ratio as those allow. Made by "
        f"`{subject.command}` from the records in `results/records/pruners/{subject.name}`.\n\n{table}"
    )


if __name__ == "__main__":
    sys.exit(main())
