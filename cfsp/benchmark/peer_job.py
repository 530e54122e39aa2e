"""Prune half of the FFN neurons of a model with another tool, in a separate process.

``python peer_job.py REQUEST`` prints one line of JSON. It runs in the environment of the other tools, where cfsp is not
installed, and imports nothing of the project. The job ``cfsp`` runs in the environment of the project. REQUEST is JSON
with "job", "model" (a folder), "ids" (a .npy file of shape [n, T]), "batch_size" and "percent".
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Name of a job -> package, criterion of the selection, and whether it uses the calibration tokens.
JOBS = {
    "cfsp": ("cfsp", "activations and weights (pruner=cfsp), a width for each block", True),
    "optipfair": ("optipfair", "weights (MAW: their range in gate and up)", False),
    "optipfair-data": ("optipfair", "weights x activations (MAW with a dataloader)", True),
    "torch-pruning": ("torch-pruning", "weights (GroupMagnitudeImportance, L2)", False),
    "torch-pruning-taylor": ("torch-pruning", "gradients (GroupTaylorImportance)", True),
}


def cfsp_job(model: Any, ids: Any, request: dict[str, Any]) -> Any:
    """Prune with cfsp."""
    import cfsp

    plan = cfsp.prune(model, ids, ratio=request["percent"] / 100, batch_size=request["batch_size"])
    return cfsp.apply(model, plan)


def optipfair_job(model: Any, ids: Any, request: dict[str, Any], *, with_data: bool) -> Any:
    """Prune with optipfair, with or without the calibration tokens."""
    import optipfair

    loader = None
    if with_data:
        from torch.utils.data import DataLoader, TensorDataset

        loader = DataLoader(TensorDataset(ids), batch_size=request["batch_size"])
    return optipfair.prune_model(
        model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=request["percent"],
        dataloader=loader,
        show_progress=False,
    )


def torch_pruning_job(model: Any, ids: Any, request: dict[str, Any], *, gradients: bool) -> Any:
    """Prune with torch-pruning, by gradients or by weights."""
    import torch_pruning

    model.config.use_cache = False
    if gradients:
        for batch in ids.split(request["batch_size"]):
            model(batch, labels=batch).loss.backward()
        importance = torch_pruning.importance.GroupTaylorImportance()
    else:
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    layers = [layer.mlp for layer in model.model.layers]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=ids[:1, :8],  # for the dependency graph, which does not depend on the length
        importance=importance,
        global_pruning=False,
        pruning_ratio=0.0,
        pruning_ratio_dict={
            linear: request["percent"] / 100 for mlp in layers for linear in (mlp.gate_proj, mlp.up_proj)
        },
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    model.zero_grad(set_to_none=True)
    return model


JOB_FUNCTIONS: dict[str, Callable[[Any, Any, dict[str, Any]], Any]] = {
    "cfsp": cfsp_job,
    "optipfair": lambda *given: optipfair_job(*given, with_data=False),
    "optipfair-data": lambda *given: optipfair_job(*given, with_data=True),
    "torch-pruning": lambda *given: torch_pruning_job(*given, gradients=False),
    "torch-pruning-taylor": lambda *given: torch_pruning_job(*given, gradients=True),
}


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the seconds and the peak memory of the pruning without imports and loading; return the reply."""
    import numpy
    import torch
    from transformers import AutoModelForCausalLM

    package, _, uses_tokens = JOBS[request["job"]]
    __import__(package.replace("-", "_"))
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # read the mapped file before the timing starts
    ids = torch.from_numpy(numpy.load(request["ids"]))
    before = _count_parameters(model)
    _reset_peak_memory()
    at_start = _memory_status("VmRSS")
    start = time.perf_counter()
    pruned = JOB_FUNCTIONS[request["job"]](model, ids, request)
    seconds = time.perf_counter() - start
    peak = _memory_status("VmHWM")
    with torch.no_grad():
        finite = bool(torch.isfinite(pruned(ids[:1, :8]).logits).all())
    widths = [layer.mlp.down_proj.in_features for layer in pruned.model.layers]
    return {
        "job": request["job"],
        "package": package,
        "version": importlib.metadata.version(package),
        "seconds": seconds,
        "tokens": ids.numel() if uses_tokens else 0,
        "peak_bytes": peak,
        "beside_bytes": None if peak is None or at_start is None else peak - at_start,
        "parameters": {"before": before, "after": _count_parameters(pruned)},
        "widths": widths,
        "finite": finite,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _count_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory_status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
