"""Measure the speed of a pruned model beside the dense one in llama.cpp, for prompt and generation.

    cfsp benchmark llama_cpp [repeats=5] [threads=1] [dtypes=f32,f16,q8_0] [environment=FOLDER]
        [work=outputs/benchmark_llama_cpp] [results=results]

A randomly initialised LLaMA (hidden 1024, FFN 4096, 16 blocks, 16 heads of which 8 KV, vocabulary 8192) and the same
with FFN widths between 1056 and 3040 (multiples of 32, mean 2048) are exported as GGUF. One process times the two files
of each dtype in alternation. environment: folder of the environment with llama-cpp-python, which is built if it is
missing (`cfsp benchmark llama_cpp_environment`). Writes benchmarks/llama_cpp.json and tables/benchmark_llama_cpp.md
under results. Exit codes: 0 all limits hold, 1 a limit is missed or a measurement failed, 2 wrong input.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

from cfsp.benchmark import llama_cpp_job
from cfsp.benchmark.alternation import paired_ratios
from cfsp.benchmark.llama_cpp_environment import create_llama_cpp_environment, default_folder
from cfsp.benchmark.make_checkpoint import Shape, make_checkpoint
from cfsp.benchmark.part import Check, Result, Settings, format_range, markdown_table, write_result
from cfsp.checkpoint.save import save_checkpoint
from cfsp.config.components import suggest
from cfsp.errors import ConfigError, RunError
from cfsp.export.folder import read_folder
from cfsp.export.gguf import GgufDType, export
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.sweep.experiment import override_values
from cfsp.system.command import command
from cfsp.system.package import ROOT
from cfsp.weights.shards import read_header, weight_files

SHAPE = Shape(hidden=1024, ffn=4096, blocks=16, heads=16, kv_heads=8, vocab=8192, dtype="float32")
STEP = 32
PROMPT, GENERATE = 256, 24
#: Smallest speed-up of prompt and of generation.
LIMIT = 1.5
TOOL = ROOT / "verify" / "tools" / "llama_cpp.py"
_KEYS = ("repeats", "threads", "dtypes", "environment", "work", "results")


@dataclass(frozen=True)
class Request:
    """The checked command line.

    Attributes:
        repeats: number of timings of each file.
        threads: number of threads of llama.cpp.
        dtypes: dtypes of the GGUF files.
        environment: folder of the environment with llama-cpp-python.
        work: folder for the models.
        results: folder for the record and the table.
    """

    repeats: int = 5
    threads: int = 1
    dtypes: tuple[str, ...] = ("f32", "f16", "q8_0")
    environment: Path = field(default_factory=default_folder)
    work: Path = Path("outputs/benchmark_llama_cpp")
    results: Path = Path("results")


def main(overrides: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    arguments = sys.argv[1:] if overrides is None else list(overrides)
    return command("benchmark_llama_cpp", str(__doc__), arguments or ["repeats=5"], _benchmark)


def read_request(overrides: Sequence[str]) -> Request:
    """Check the command line and return the request.

    Raises:
        ConfigError: a key or value is wrong; the message has all problems.
    """
    problems, result = [], dict[str, Any]()
    for key, value in override_values(overrides).items():
        values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        if key not in _KEYS:
            problems.append(f"{key}: there is no such key{suggest(key, _KEYS)}; there are {', '.join(_KEYS)}")
        elif key == "dtypes":
            known = [dtype for dtype in get_args(GgufDType) if dtype != "auto"]
            problems += [f"dtypes={name}: give {', '.join(known)}" for name in values if name not in known]
            result[key] = tuple(dict.fromkeys(values))
        elif len(values) != 1 or not values[0]:
            problems.append(f"{key}={','.join(values)}: give one value")
        elif key in ("repeats", "threads"):
            if not values[0].isdigit() or int(values[0]) < 1:
                problems.append(f"{key}={values[0]}: give a whole number from 1")
            else:
                result[key] = int(values[0])
        else:
            result[key] = Path(values[0]).expanduser()
    if problems:
        raise ConfigError(*problems)
    return Request(**result)


def block_widths(shape: Shape) -> list[int]:
    """Return the kept FFN width of each block: multiples of 32 from 1/4 to 3/4 of the FFN, half of it on average."""
    result = []
    for index in range(shape.blocks):
        # In each pair of blocks, the first is below the mean by the same offset as the second is above it. Each pair
        # has another offset.
        offset = STEP * round((index // 2 + 1) / (shape.blocks // 2) * shape.ffn / 4 / STEP - 1)
        result.append(shape.ffn // 2 + (offset if index % 2 else -offset))
    return result


def write_models(work: Path, shape: Shape) -> dict[str, Path]:
    """Write the dense and the pruned model; return their names -> folders."""
    import torch
    from transformers import AutoModelForCausalLM

    import cfsp

    dense, pruned = work / "dense", work / "pruned"
    make_checkpoint(dense, shape)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    blocks = tuple(BlockPlan(tuple(range(width))) for width in block_widths(shape))
    cfsp.apply(model, PruningPlan("dense", "", {"name": "widths"}, blocks, {}, {}))
    save_checkpoint(model, pruned, source=dense)
    return {"dense": dense, "pruned": pruned}


def run_job(python: Path, request: Request, files: dict[str, Path]) -> dict[str, Any]:
    """Time the files in a separate process and return its reply.

    Args:
        python: Python of the environment with llama-cpp-python.
        request: the checked command line.
        files: name -> GGUF file.

    Raises:
        RunError: the process failed; the message has the end of its error output.
    """
    job = {
        "tool": str(TOOL),
        "files": {name: str(file) for name, file in files.items()},
        "prompt": PROMPT,
        "generate": GENERATE,
        "repeats": request.repeats,
        "threads": request.threads,
    }
    command_line = [str(python), llama_cpp_job.__file__, json.dumps(job)]
    process = subprocess.run(command_line, capture_output=True, text=True)
    if process.returncode:
        message = " ".join(process.stderr.split())[-300:] or "nothing on stderr"
        raise RunError(f"llama.cpp ended with exit code {process.returncode}: {message}")
    reply: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return reply


def measure(request: Request, shape: Shape = SHAPE) -> Result:
    """Measure a row for prompt and one for generation, for each dtype."""
    python = create_llama_cpp_environment(request.environment)
    result = Result("llama_cpp", "", program="cfsp benchmark llama_cpp")
    models = write_models(request.work, shape)
    parameters = {name: _count_parameters(folder) for name, folder in models.items()}
    result.notes = {"threads": request.threads, "widths": block_widths(shape), "parameters": parameters}
    for dtype in request.dtypes:
        files = {}
        for name, folder in models.items():
            files[name] = request.work / f"{name}-{dtype}.gguf"
            export(read_folder(folder), files[name], dtype=dtype)  # type: ignore[arg-type]
        reply = run_job(python, request, files)
        result.notes["llama_cpp_python"] = reply["version"]
        for key, count in (("prompt", PROMPT), ("generate", GENERATE)):
            seconds = {name: [timed["cpu"] for timed in reply["seconds"][name][key]] for name in files}
            ratio, ratios = paired_ratios(seconds["dense"], seconds["pruned"])
            row = {
                "dtype": dtype,
                "part": key,
                "tokens": count,
                "seconds": {name: reply["seconds"][name][key] for name in files},
                "tokens_per_second": {name: count / median(values) for name, values in seconds.items()},
                "speed_up": ratio,
                "speed_ups": ratios,
                "bytes": {name: file.stat().st_size for name, file in files.items()},
            }
            result.rows.append(row)
            result.checks.append(Check(f"{dtype} {key}, times dense", ratio, LIMIT, at_least=True))
            print(f"llama_cpp: {dtype} {key}: {ratio:.2f}", flush=True)
        for file in files.values():
            file.unlink()
    return result


def _count_parameters(folder: Path) -> int:
    headers = [read_header(file)[0] for file in weight_files(folder)]
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())


def render_table(result: Result) -> str:
    """Render the table as Markdown."""
    head = [
        "dtype, tokens",
        "dense, tokens/s",
        "pruned, tokens/s",
        "times dense (lowest to highest)",
        "dense, MB",
        "pruned, MB",
    ]
    rows = [
        [
            f"{row['dtype']} {row['part']} {row['tokens']}",
            *(f"{row['tokens_per_second'][name]:.1f}" for name in ("dense", "pruned")),
            f"**{row['speed_up']:.2f}** ({format_range(row['speed_ups'])})",
            *(f"{row['bytes'][name] / 1e6:.0f}" for name in ("dense", "pruned")),
        ]
        for row in result.rows
    ]
    parameters, widths = result.notes["parameters"], result.notes["widths"]
    millions = {name: f"{count / 1e6:.0f} million" for name, count in parameters.items()}
    explained = (
        f"A randomly initialised LLaMA (hidden {SHAPE.hidden}, FFN {SHAPE.ffn}, {SHAPE.blocks} blocks, {SHAPE.heads} "
        f"heads of which {SHAPE.kv_heads} KV, vocabulary {SHAPE.vocab}; {millions['dense']} parameters) and the same "
        f"with half of its FFN neurons ({millions['pruned']}; widths from {min(widths)} to {max(widths)}, multiples of "
        f"{STEP}), exported by cfsp. llama-cpp-python {result.notes['llama_cpp_python']}, threads: "
        f"{result.notes['threads']}, flash attention, no repacked weights (use_extra_bufts=False). Seconds of the "
        "process on the CPU; medians of repeats in alternation; prompt and generation begin without a context, as in "
        "llama-bench. The export fills widths up to multiples of 64 in f16 and bf16."
    )
    return markdown_table("Pruned models in llama.cpp", head, rows, result, explained)


def _benchmark(overrides: Sequence[str]) -> int:
    request = read_request(overrides)
    result = measure(request)
    text = render_table(result)
    write_result(result, text, Settings(repeats=request.repeats, results=request.results))
    shutil.rmtree(request.work, ignore_errors=True)
    print(f"\n{text}", flush=True)
    missed = [str(check) for check in result.checks if not check.met]
    for check in missed:
        print(f"benchmark_llama_cpp: limit missed: {check}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
