"""What a tool makes of a saved model, beside the reference: is it the same model?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cfsp.checkpoint.reference import Reference

#: By how much a log-probability (natural logarithm) may differ, at most and on average, where a tool or the reference
#: computes in something coarser than float32 (:attr:`cfsp.verify.tool.Tool.float32`). The average tells rounding from
#: another model: rounding moves a few by much, a lost bias, another RoPE or a missing layer most of them.
COARSE = {
    # 11 bits of precision in each activation; llama.cpp with the bundled model pruned by half: 0.003.
    "float16": (5e-2, 1e-2),
    # 8 bits: logits of 16 and more come in steps of 0.125, and tools round at different places; measured: 0.03.
    "bfloat16": (0.5, 5e-2),
    # 8 bits in blocks of 32 weights; the activations are rounded likewise; measured: 0.12.
    "q8_0": (0.5, 5e-2),
}
#: The same where the weights of an export alone were rounded, and the tool computes in float32. Measured: a seventh.
ROUNDED = {"float16": (2e-2, 4e-3), "bfloat16": (0.25, 3e-2)}


@dataclass(frozen=True)
class Finding:
    """One row: what ``tool`` made of the model.

    outcome: equal, differs, fails (to load or to compute), "not installed", or "another form" (the tool does not read
    this kind of export). difference: the largest one of a log-probability, mean: their average; tokens: how many greedy
    tokens are equal.
    """

    tool: str
    outcome: str
    version: str = ""
    difference: float | None = None
    mean: float | None = None
    tolerance: float | None = None
    tokens: str = ""
    note: str = ""

    @property
    def tried(self) -> bool:
        return self.outcome in ("equal", "differs", "fails")

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a difference that is not finite is None."""
        return {key: value if value != math.inf else None for key, value in asdict(self).items()}


def tolerance_of(float32: float, *computed: str, rounded: str = "float32") -> tuple[float, float]:
    """(at most, on average): that of the coarsest dtype; what is not known counts as coarsest.

    Args:
        float32: the tool's own.
        computed: what the reference and the tool compute in; of GGUF files also what the weights are in, which decides
            in what llama.cpp computes.
        rounded: what the weights alone were rounded to since the reference.
    """
    coarsest = max(COARSE.values())
    known = {"float32": (float32, float32), "float64": (float32, float32)}
    weights = {**known, **ROUNDED}.get(rounded, coarsest)
    return max(weights, *({**known, **COARSE}.get(dtype, coarsest) for dtype in computed))


def compare(
    tool: str, answer: Mapping[str, Any], reference: Reference, tolerance: float, mean: float = math.inf
) -> Finding:
    """Judge the answer of a tool (:mod:`cfsp.verify.tools`); ``mean``: what may differ on average."""
    version = str(answer.get("version", ""))
    found = _matrix(answer.get("logprobs"), reference.logprobs.shape)
    if found is None:
        wanted = " x ".join(map(str, reference.logprobs.shape))
        return Finding(tool, "fails", version, note=f"its answer does not hold {wanted} log-probabilities")
    distances = np.abs(found - reference.logprobs)
    finite = bool(np.isfinite(found).all())
    difference, average = (float(distances.max()), float(distances.mean())) if finite else (math.inf, math.inf)
    same, tokens, token_note = _tokens(answer.get("greedy") or [], reference, tolerance)
    notes = [] if finite else ["some log-probabilities are not finite"]
    notes += [token_note] if token_note else []
    if difference > tolerance:
        window, at = (int(i) for i in np.unravel_index(int(np.nan_to_num(distances, nan=np.inf).argmax()), found.shape))
        notes.insert(0, f"most at token {at + 1} of window {window}: {found[window, at]:.6g} for "
                        f"{reference.logprobs[window, at]:.6g}")  # fmt: skip
    if difference <= tolerance and average > mean:
        notes.append(f"the mean difference is {average:.3g}, {mean:.3g} are allowed")
    for name, value in (answer.get("checks") or {}).items():
        if not value <= tolerance:
            same = False
            notes.append(f"{name} changes a log-probability by {value:.3g}")
    outcome = "equal" if same and difference <= tolerance and average <= mean else "differs"
    if answer.get("class"):
        notes.append(str(answer["class"]))
    return Finding(tool, outcome, version, difference, average, tolerance, tokens, "; ".join(notes))


def _matrix(rows: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        found = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return found if found.shape == shape else None


def _tokens(rows: Sequence[Sequence[int]], reference: Reference, tolerance: float) -> tuple[bool, str, str]:
    """(equal, "16 of 16", note). Tokens after one that differs have another past and are not compared."""
    if not rows:
        return True, "", ""
    wanted, margins = reference.greedy, reference.margins
    equal, notes, same = 0, [], True
    for window, row in enumerate(rows):
        differing = [at for at, token in enumerate(wanted[window]) if at >= len(row) or row[at] != token]
        equal += differing[0] if differing else wanted.shape[1]
        if not differing:
            continue
        at, margin = differing[0], margins[window, differing[0]]
        if at < len(row) and margin <= 2 * tolerance:
            notes.append(f"greedy token {at} of window {window} is a tie (margin {margin:.2g})")
        else:
            same = False
            notes.append(f"greedy token {at} of window {window} differs")
    if len(rows) != len(wanted):
        same = False
        notes.append(f"{len(rows)} greedy texts for {len(wanted)} windows")
    return same, f"{equal} of {wanted.size}", "; ".join(notes)
