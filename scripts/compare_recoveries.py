"""Every recovery of the same pruned model, at equal training tokens; records and tables go to results/.

    python scripts/compare_recoveries.py

The bundled model, half of its FFN neurons removed by CFSP; trained on the bundled calibration prose, and on text that
the dense model wrote itself; 25 steps of 16 windows of 256 tokens for all. Each recovery gets the learning rate that is
best for it: from the same three on, the search goes on by factors of about three while the best is at an end, with a
seed and windows of the evaluation text of its own. Then seeds 0, 1 and 2 are measured on the other windows; the
adapters also at one learning rate, the one that is best for plain lora. What a record in results/ has is not run again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsp.compose import compose
from cfsp.config import parse
from cfsp.pipeline import run
from cfsp.record.run_record import RunRecord
from cfsp.tables.methods import Figure, line, only
from cfsp.tables.recoveries import label, recovery_table

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    "bundled": "the bundled calibration prose (the evaluation text is by the same hand, so this also adapts to it)",
    "self": "256 windows of 256 tokens sampled from the dense model: no data at all",
}
RECOVERIES = (("lora",), ("lora_matched",), ("ig_lora",), ("full",), ("lora", "recovery.objective=distill"))
ADAPTERS = RECOVERIES[:3]
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS, TUNING_SEED = (0, 1, 2), 100
WINDOWS, TUNING_WINDOWS = "[16,49]", "[0,16]"
FIGURE = Figure("perplexity", "bundled", "perplexity")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/compare_recoveries"), help="runs and caches")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="records/ and tables/ are made there")
    given = parser.parse_args()
    logging.getLogger("cfsp").setLevel(logging.WARNING)
    records = given.results / "records" / "recoveries"
    for data in DATA:
        best = {recovery: _tune(given.work, records / data / "tuning", data, recovery) for recovery in RECOVERIES}
        for seed in SEEDS:
            _run(given.work, records / data, data, ("none",), None, seed)
            for recovery in RECOVERIES:
                _run(given.work, records / data, data, recovery, best[recovery], seed)
            for recovery in ADAPTERS:
                if best[recovery] != best["lora",]:
                    _run(given.work, records / data / "one_rate", data, recovery, best["lora",], seed)
    table = given.results / "tables" / "recoveries.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(page(records), encoding="utf-8")
    print(table.read_text(encoding="utf-8"))
    return 0


def _tune(work: Path, folder: Path, data: str, recovery: tuple[str, ...]) -> float:
    """The learning rate with the lowest perplexity on the tuning windows; its neighbours were tried too."""
    found: dict[float, float] = {}
    wanted = [1e-4, 3e-4, 1e-3]
    while wanted:
        for rate in wanted:
            record = _run(work, folder, data, recovery, rate, TUNING_SEED)
            found[rate] = FIGURE.of(record, "recovered") or float("inf")
        best = min(found, key=found.__getitem__)
        at = RATES.index(best)
        wanted = [rate for rate in RATES[max(at - 1, 0) : at + 2] if rate not in found]
    return best


def _run(work: Path, folder: Path, data: str, recovery: tuple[str, ...], rate: float | None, seed: int) -> RunRecord:
    """The record in ``folder`` of this recovery, learning rate and seed; it is run where there is none."""
    for record in read(folder):
        if (label(record), _rate(record), record.identity["seed"]) == (" ".join(recovery), rate, seed):
            return record
    words = [f"recovery={recovery[0]}", *recovery[1:]]
    if rate is not None:
        words += [f"recovery/data={data}", f"recovery.learning_rate={rate}", "recovery.max_steps=25"]
        words += ["recovery.batch_size=16", "recovery.cutoff=256"]
    given = [
        "model=bundled", "calibration=bundled", "pruner=cfsp", "sparsity.ratio=0.5", *words, f"seed={seed}",
        "evaluation=perplexity", "evaluation.perplexity.datasets=[bundled]", "evaluation.perplexity.seq_len=256",
        f"evaluation.perplexity.windows={TUNING_WINDOWS if seed == TUNING_SEED else WINDOWS}",
        "logger=none", "save.model=false", f"paths.output_dir={work / 'runs'}", f"paths.cache_dir={work / 'cache'}",
        f"paths.records_dir={work / 'records'}",
    ]  # fmt: skip
    print(f"{' '.join(words)} seed={seed}", file=sys.stderr)
    record, _ = run(parse(compose(given)), multirun=True)
    record.write(folder / f"{record.run_id}.json")
    return record


def _rate(record: RunRecord) -> float | None:
    return record.identity["recovery"].get("learning_rate")


def page(folder: Path) -> str:
    """The tables of all data with what they show and the command that makes them."""
    names = ["none", *(" ".join(recovery) for recovery in RECOVERIES)]
    parts = [
        "# Recovery of the bundled model, half of its FFN neurons removed by CFSP\n\n"
        "Every recovery at equal training tokens, each with its own best learning rate (below). Perplexity on windows "
        "16 to 48 (256 tokens each) of the bundled evaluation text; mean ± standard deviation over seeds 0, 1, 2 "
        "(calibration windows, adapters' initial values, order of the data, sampled text). `gap closed`: of the gap in "
        "log-perplexity between pruned and dense. Made by `python scripts/compare_recoveries.py` from the records in "
        "`results/records/recoveries`.\n"
    ]
    for data, what in DATA.items():
        records, tuning = read(folder / data), read(folder / data / "tuning")
        tokens = next(record.recovery["tokens"] for record in records if record.recovery)
        parts.append(f"\n## `recovery/data={data}`\n\n{what[0].upper()}{what[1:]}. {tokens:,} tokens.\n\n")
        parts.append(recovery_table(records, FIGURE, names))
        rate = only({_rate(record) for record in records if label(record) == "lora"}, "learning rate of lora")
        alike = [r for r in [*records, *read(folder / data / "one_rate")] if _rate(r) in (None, rate)]
        alike = [record for record in alike if label(record) in ("none", *names[1:4])]
        parts.append(
            f"\nThe adapters at one learning rate, that of plain `lora`:\n\n{recovery_table(alike, FIGURE, names[:4])}"
        )
        parts.append("\nLearning rates tried, with the perplexity on windows 0 to 15 at another seed (100):\n\n")
        parts.append(tuning_table(tuning, names[1:]))
    return "".join(parts)


def read(folder: Path) -> list[RunRecord]:
    """The records of a folder, in the order of their names."""
    return [record for path in sorted(folder.glob("*.json")) if (record := RunRecord.read(path)) is not None]


def tuning_table(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Rows: recoveries; columns: learning rates; the chosen one in bold, nothing where it was not tried."""
    values: dict[str, dict[Any, float]] = {}
    for record in records:
        value = FIGURE.of(record, "recovered")
        assert value is not None
        values.setdefault(label(record), {})[_rate(record)] = value
    rates = sorted({rate for tried in values.values() for rate in tried})
    lines = [line(["recovery", *(f"{rate:g}" for rate in rates)]), line(["---", *["--:"] * len(rates)])]
    for name in names:
        tried = values[name]
        best = min(tried, key=tried.__getitem__)
        cells = [f"{tried[rate]:.2f}" if rate in tried else "" for rate in rates]
        lines.append(line([f"`{name}`", *(f"**{c}**" if r == best else c for r, c in zip(rates, cells, strict=True))]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
