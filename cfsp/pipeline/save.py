"""Save the pruned model of a run with its model card, and export it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cfsp.checkpoint.save import SavedCheckpoint, save_checkpoint
from cfsp.export import card
from cfsp.export.write import Request, write_export
from cfsp.pipeline.current_run import Run
from cfsp.pipeline.preflight import Prepared
from cfsp.plan.history import read_plan_history
from cfsp.plan.pruning_plan import COMPENSATION_IN_FOLDER, PruningPlan
from cfsp.pruned_model.family import PRUNED_PREFIX

log = logging.getLogger(__name__)


def export_model(format_name: str, out: Path) -> dict[str, Any]:
    """Export OUT/model in a format; return the entry of the record that describes the export."""
    result = write_export(Request(out / "model", format_name))
    for note in result.notes:
        log.info("%s: %s", format_name, note)
    return {"place": result.place.name, "form": format_name, "bytes": result.bytes, "notes": list(result.notes)}


def facts_of_run(run: Run, plan: PruningPlan) -> dict[str, Any]:
    """Return the facts of the model card: base model, method, calibration, state, and the figures known so far."""
    record, source = run.record, run.prepared.source
    recovered = bool(record.recovery)
    return card.facts_of_run(
        base_model=source.public_name,
        hub_id=source.hub_id,
        licence=card.read_licence(source.folder),
        weights=None if source.dequantised is None else source.dequantised.sentence,
        plan=plan,
        calibration=record.calibration or {},
        state="recovered" if recovered else state_of_plan(plan),
        recovery=run.config.recovery.instance.name if recovered else None,
        measurements=record.measurements if "pruned" in record.measurements else None,
        earlier=card.read_facts(source.folder),
    )


def save_model(
    prepared: Prepared,
    model: Any,
    plan: PruningPlan,
    folder: Path,
    state: str,
    facts: dict[str, Any],
) -> SavedCheckpoint:
    """Write the pruned model with its plan and its card.

    Args:
        prepared: the checked inputs of the run.
        model: the pruned model.
        plan: the plan by which the model was pruned.
        folder: folder to write.
        state: "pruned", "compensated" or "recovered".
        facts: facts of the card, from :func:`facts_of_run`.
    """
    files = _plan_in_folder(plan, prepared).files(tensors=COMPENSATION_IN_FOLDER)
    form = "remote_code" if model.config.model_type.startswith(PRUNED_PREFIX) else "plain"
    files |= card.card_files(facts, form, folder.name)
    dtype, source = prepared.stored_dtype, prepared.source.folder
    return save_checkpoint(model, folder, dtype=dtype, source=source, state=state, files=files)


def save_base(run: Run, model: Any, plan: PruningPlan, facts: dict[str, Any]) -> Path | None:
    """Save the pruned model to which an adapter belongs; return its folder, or None if the run saves no model."""
    if not run.config.save.model:
        return None
    return save_model(run.prepared, model, plan, run.out / "pruned", state_of_plan(plan), facts).folder


def state_of_plan(plan: PruningPlan) -> str:
    """Return the state of a model that was pruned by ``plan`` and not trained: compensated or pruned."""
    return "compensated" if plan.tensors else "pruned"


def _plan_in_folder(plan: PruningPlan, prepared: Prepared) -> PruningPlan:
    """Return the plan relative to the original dense model; pruning a pruned folder composes the two plans."""
    if prepared.source.state == "recovered":  # after training the earlier plan no longer gives its weights
        return plan
    earlier = read_plan_history(prepared.source.folder)
    return plan if earlier is None else plan.compose(earlier)
