"""Comparison of a tool's answer with the reference of a saved model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cfsp.checkpoint.reference import Reference

#: Allowed differences of a log-probability (natural logarithm), largest and mean, by the dtype in which a tool or the
#: reference computes, if it is coarser than float32 (for which see :attr:`cfsp.verify.tool.Tool.float32`). The mean
#: distinguishes rounding from a different model. Rounding changes a few log-probabilities a lot, whereas a lost bias, a
#: different RoPE or a missing layer changes most of them.
COMPUTE_TOLERANCES = {
    # 11 bits of precision in each activation; measured with llama.cpp and the bundled model pruned by half: 0.003.
    "float16": (5e-2, 1e-2),
    # 8 bits: logits of 16 and more come in steps of 0.125, and tools round at different places; measured: 0.03.
    "bfloat16": (0.5, 5e-2),
    # 8 bits in blocks of 32 weights; the activations are rounded likewise; measured: 0.12.
    "q8_0": (0.5, 5e-2),
}
#: Allowed differences, largest and mean, by the dtype of an export's weights, if only the weights were rounded and the
#: tool computes in float32. The measured differences were a seventh of these.
WEIGHT_TOLERANCES = {"float16": (2e-2, 4e-3), "bfloat16": (0.25, 3e-2)}


@dataclass(frozen=True)
class Finding:
    """Result of one tool, a row of the report.

    Attributes:
        tool: name of the tool.
        outcome: "equal", "differs", "fails" (to load the model or to compute), "not installed", or "another form" (the
            tool does not read this format).
        version: version of the tool.
        difference: largest absolute difference of a log-probability.
        mean: mean absolute difference of the log-probabilities.
        tolerance: largest difference that is allowed.
        tokens: number of equal greedy tokens, e.g. "16 of 16".
        note: remarks for the user.
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
    def was_run(self) -> bool:
        """Return whether the tool was run."""
        return self.outcome in ("equal", "differs", "fails")

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for JSON; an infinite difference becomes None, because JSON has no infinity."""
        return {key: value if value != math.inf else None for key, value in asdict(self).items()}


def select_tolerance(float32: float, *computed: str, rounded: str = "float32") -> tuple[float, float]:
    """Return the allowed differences (largest, mean) for the coarsest dtype involved.

    An unknown dtype counts as the coarsest.

    Args:
        float32: the tool's own tolerance in float32.
        computed: dtypes in which the reference and the tool compute. For GGUF files also the dtype of the weights,
            which decides the dtype in which llama.cpp computes.
        rounded: dtype to which only the weights were rounded after the reference was computed.
    """
    coarsest = max(COMPUTE_TOLERANCES.values())
    tolerances = {"float32": (float32, float32), "float64": (float32, float32)}
    weights = {**tolerances, **WEIGHT_TOLERANCES}.get(rounded, coarsest)
    return max(weights, *({**tolerances, **COMPUTE_TOLERANCES}.get(dtype, coarsest) for dtype in computed))


def compare(
    tool: str, response: Mapping[str, Any], reference: Reference, tolerance: float, mean: float = math.inf
) -> Finding:
    """Compare the answer of a tool with the reference.

    Args:
        tool: name of the tool.
        response: answer of its script (:mod:`cfsp.verify.tools`).
        reference: reference of the model.
        tolerance: largest difference of a log-probability that is allowed.
        mean: largest mean difference that is allowed.

    Returns:
        Finding with outcome "equal" or "differs", or "fails" if the answer does not have the expected shape.
    """
    version = str(response.get("version", ""))
    logprobs = _parse_matrix(response.get("logprobs"), reference.logprobs.shape)
    if logprobs is None:
        expected_shape = " x ".join(map(str, reference.logprobs.shape))
        return Finding(tool, "fails", version, note=f"its answer does not hold {expected_shape} log-probabilities")
    differences = np.abs(logprobs - reference.logprobs)
    finite = bool(np.isfinite(logprobs).all())
    difference, average = (float(differences.max()), float(differences.mean())) if finite else (math.inf, math.inf)
    tokens_equal, tokens, token_note = _compare_tokens(response.get("greedy") or [], reference, tolerance)
    notes = [] if finite else ["some log-probabilities are not finite"]
    notes += [token_note] if token_note else []
    if difference > tolerance:
        window, at = (
            int(i) for i in np.unravel_index(int(np.nan_to_num(differences, nan=np.inf).argmax()), logprobs.shape)
        )
        notes.insert(0, f"most at token {at + 1} of window {window}: {logprobs[window, at]:.6g} for "
                        f"{reference.logprobs[window, at]:.6g}")  # fmt: skip
    if difference <= tolerance and average > mean:
        notes.append(f"the mean difference is {average:.3g}, {mean:.3g} are allowed")
    for name, value in (response.get("checks") or {}).items():
        if not value <= tolerance:
            tokens_equal = False
            notes.append(f"{name} changes a log-probability by {value:.3g}")
    outcome = "equal" if tokens_equal and difference <= tolerance and average <= mean else "differs"
    if response.get("class"):
        notes.append(str(response["class"]))
    return Finding(tool, outcome, version, difference, average, tolerance, tokens, "; ".join(notes))


def _parse_matrix(rows: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the rows as a float64 array; None if they do not have this shape."""
    try:
        matrix = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return matrix if matrix.shape == shape else None


def _compare_tokens(rows: Sequence[Sequence[int]], reference: Reference, tolerance: float) -> tuple[bool, str, str]:
    """Return whether the greedy tokens are equal, a count such as "16 of 16", and a note.

    Tokens after the first differing one follow another context and are not compared.
    """
    if not rows:
        return True, "", ""
    greedy, margins = reference.greedy, reference.margins
    equal, notes, all_equal = 0, [], True
    for window, row in enumerate(rows):
        differing = [at for at, token in enumerate(greedy[window]) if at >= len(row) or row[at] != token]
        equal += differing[0] if differing else greedy.shape[1]
        if not differing:
            continue
        at, margin = differing[0], margins[window, differing[0]]
        if at < len(row) and margin <= 2 * tolerance:
            notes.append(f"greedy token {at} of window {window} is a tie (margin {margin:.2g})")
        else:
            all_equal = False
            notes.append(f"greedy token {at} of window {window} differs")
    if len(rows) != len(greedy):
        all_equal = False
        notes.append(f"{len(rows)} greedy texts for {len(greedy)} windows")
    return all_equal, f"{equal} of {greedy.size}", "; ".join(notes)
