"""Saving the pruned model of a run, its card and its export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cfsp.checkpoint.save import SavedCheckpoint, save_checkpoint
from cfsp.export import card
from cfsp.export.write import Request, exported
from cfsp.pipeline.preflight import Prepared
from cfsp.plan.history import history_of
from cfsp.plan.pruning_plan import COMPENSATION_IN_FOLDER, PruningPlan
from cfsp.pruned_model.family import PRUNED_PREFIX
from cfsp.record.run_record import RunRecord

log = logging.getLogger(__name__)


def export_model(form: str, out: Path) -> dict[str, Any]:
    result = exported(Request(out / "model", form))
    for note in result.notes:
        log.info("%s: %s", form, note)
    return {"place": result.place.name, "form": form, "bytes": result.bytes, "notes": list(result.notes)}


def facts_of_run(prepared: Prepared, plan: PruningPlan, record: RunRecord) -> dict[str, Any]:
    recovered = bool(record.recovery)
    source = prepared.source
    hub = source.fingerprint.removeprefix("hub:").partition("@")[0] if source.fingerprint.startswith("hub:") else None
    return card.facts_of_run(
        base_model=(hub or source.folder.resolve().name).rpartition("/")[2],
        hub_id=hub,
        licence=card.licence_of(source.folder),
        plan=plan,
        calibration=record.calibration or {},
        state="recovered" if recovered else state_of_plan(plan),
        recovery=prepared.config.recovery.instance.name if recovered else None,
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
    files = _plan_in_folder(plan, prepared).files(tensors=COMPENSATION_IN_FOLDER)
    form = "remote_code" if model.config.model_type.startswith(PRUNED_PREFIX) else "plain"
    files |= card.card_files(facts, form, folder.name)
    dtype, source = prepared.stored_dtype, prepared.source.folder
    return save_checkpoint(model, folder, dtype=dtype, source=source, state=state, files=files)


def save_base(prepared: Prepared, model: Any, plan: PruningPlan, out: Path, facts: dict[str, Any]) -> Path | None:
    """The pruned model without what is learnt, which an adapter stands on; None where no model is to be saved."""
    if not prepared.config.save.model:
        return None
    return save_model(prepared, model, plan, out / "pruned", state_of_plan(plan), facts).folder


def state_of_plan(plan: PruningPlan) -> str:
    return "compensated" if plan.tensors else "pruned"


def _plan_in_folder(plan: PruningPlan, prepared: Prepared) -> PruningPlan:
    """The folder's plan starts from the first dense model: pruning a pruned folder composes the two plans."""
    if prepared.source.state == "recovered":  # its weights are not those that the earlier plan gives
        return plan
    earlier = history_of(prepared.source.folder)
    return plan if earlier is None else plan.compose(earlier)
