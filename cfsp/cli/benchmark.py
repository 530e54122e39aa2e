"""Measure the cost and the speed-up of pruning, with limits that must hold.

    cfsp benchmark [parts=calibration,speed,growth,streaming,compensation,peers] [repeats=5] [device=auto]
        [shapes=small,large] [dtypes=float32,bfloat16] [windows=8,64] [blocks=58] [modes=off,on] [runs=3]
        [work=outputs/benchmark] [results=results]

  calibration   calibration + scoring + planning beside a bare forward pass over the same tokens, stage by stage, and
                the peak memory of each; windows: how many windows of 512 tokens
  speed         prefill and decode of pruned models beside the dense one, against prediction from MACs and bytes
  growth        the exponents with which the cost of calibration grows with windows, blocks and width
  streaming     a sharded checkpoint (6 GB with blocks=58) pruned from its shards and in memory (model.streaming in
                modes, runs times each, every run with the checkpoint out of the page cache): peak resident memory,
                time, equal plans; another number of blocks has a record of its own
  compensation  least squares and second-order selection beside a bare forward pass; their kernels at a large width
  peers         optipfair and torch-pruning on the same job; installs them into a separate environment in work

  cfsp benchmark sweep             twelve runs of a sweep beside a single run
  cfsp benchmark llama_cpp         pruned files beside dense ones in llama.cpp; llama_cpp_environment builds it first
  cfsp benchmark calibration_fit   held-out perplexity against the number of calibration windows
  cfsp benchmark model_file        pruning and perplexity of your own model beside its bare forward passes
These have separate command lines: cfsp benchmark NAME --help.

Randomly initialised LLaMAs (small: hidden 1024, FFN 2816, 8 blocks; large: hidden 2048, FFN 5632, 16 blocks). dtypes
are of a CPU; a GPU runs bfloat16 and, in calibration, the shape of LLaMA-3-8B too. Each part prints its table and
writes benchmarks/PART.json and tables/benchmark_PART.md under results. Exit codes: 0 all limits hold, 1 one is missed
(the last lines say which) or a measurement failed, 2 wrong input.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsp.benchmark.make_checkpoint import DTYPES
from cfsp.benchmark.part import Result, Settings, write_result
from cfsp.benchmark.shapes import SHAPES
from cfsp.config.components import suggest
from cfsp.errors import ConfigError
from cfsp.sweep.experiment import override_values
from cfsp.system.command import command

#: Benchmarks with a separate command line: ``cfsp benchmark NAME --help``.
SEPARATE_BENCHMARKS = ("sweep", "llama_cpp", "llama_cpp_environment", "calibration_fit", "model_file")
PARTS = ("calibration", "speed", "growth", "streaming", "compensation", "peers")
MODES = ("off", "on")
#: Key with a list -> values that the list may have. All keys without a list of values or a number are text.
_CHOICES: dict[str, tuple[str, ...]] = {
    "parts": PARTS, "shapes": tuple(SHAPES), "dtypes": tuple(DTYPES), "modes": MODES,
}  # fmt: skip
_NUMBER_KEYS = ("repeats", "blocks", "runs")
_KEYS = ("parts", "repeats", "device", "shapes", "dtypes", "windows", "blocks", "modes", "runs", "work", "results")


def main(overrides: Sequence[str] | None = None) -> int:
    """Run the requested parts and return the exit code."""
    arguments = sys.argv[1:] if overrides is None else list(overrides)
    if arguments and arguments[0] in SEPARATE_BENCHMARKS:
        return int(importlib.import_module(f"cfsp.benchmark.{arguments[0]}").main(arguments[1:]))
    return command("benchmark", str(__doc__), arguments or [f"parts={','.join(PARTS)}"], _run_parts)


def read_request(overrides: Sequence[str]) -> tuple[tuple[str, ...], Settings]:
    """Check the command line.

    Returns:
        The names of the parts to run, and the settings of all parts.

    Raises:
        ConfigError: a key or value is wrong; the message has all problems.
    """
    problems, settings = [], dict[str, Any]()
    for key, value in override_values(overrides).items():
        values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        if key not in _KEYS:
            problems.append(
                f"{key}={','.join(values)}: there is no such key{suggest(key, _KEYS)}; there are {_KEYS_TEXT}"
            )
        elif key in _CHOICES:
            choices = _CHOICES[key]
            problems += [
                f"{key}={choice}: there is no such choice{suggest(choice, choices)}; there are {', '.join(choices)}"
                for choice in values
                if choice not in choices
            ]
            settings[key] = tuple(dict.fromkeys(values))
        elif key == "windows" or key in _NUMBER_KEYS:
            numbers = [int(number) for number in values if number.isdigit() and int(number) > 0]
            if len(numbers) < len(values) or (key != "windows" and len(numbers) != 1):
                several = "whole numbers" if key == "windows" else "a whole number"
                problems.append(f"{key}={','.join(values)}: give {several} from 1")
            else:
                settings[key] = tuple(numbers) if key == "windows" else numbers[0]
        elif len(values) != 1 or not values[0]:
            problems.append(f"{key}={','.join(values)}: give one value")
        else:
            settings[key] = Path(values[0]) if key in ("work", "results") else values[0]
    if problems:
        raise ConfigError(*problems)
    parts = settings.pop("parts", PARTS)
    return parts, Settings(**settings)


_KEYS_TEXT = ", ".join(_KEYS)


def _run_parts(overrides: Sequence[str]) -> int:
    # Start-up time: loads torch.
    from cfsp.model.device import resolve_device

    parts, settings = read_request(overrides)
    device = resolve_device(settings.device)
    if device.index is not None:  # the timing synchronises the current device
        import torch

        torch.cuda.set_device(device)
    missed: list[str] = []
    for name in parts:
        part = importlib.import_module(f"cfsp.benchmark.{name}")
        result: Result = part.measure(settings)
        text = part.render_table(result)
        write_result(result, text, settings)
        print(f"\n{text}", flush=True)
        missed += [f"{name}: {check}" for check in result.checks if not check.met]
    for check in missed:
        print(f"benchmark: limit missed: {check}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
