"""Time GGUF files in llama.cpp beside each other, in a process of its own.

``python llama_cpp_job.py REQUEST`` prints one line of JSON. It runs where llama_cpp is and imports nothing of the
project; REQUEST: {"tool" (the path of cfsp/verify/tools/llama_cpp.py, which imports the package), "files" (name ->
GGUF), "prompt", "generate" (tokens), "repeats", "threads"}. The reply: "version" and, of each file and "prompt" or
"generate", the seconds of each repeat, of the clock and of this process on the CPU. Both begin without a context, as
llama-bench's pp and tg do.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from typing import Any

#: Ids of tokens. Their values do not change the time.
FIRST, STEP, RANGE = 5, 37, 4000


def timed(model: Any, ids: list[int], *, one_by_one: bool) -> dict[str, float]:
    """Return the seconds in which the model reads ``ids``."""
    wall, cpu = time.perf_counter(), time.process_time()
    for part in [[number] for number in ids] if one_by_one else [ids]:
        model.eval(part)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> int:
    """Answer the request of the command line; returns the exit code."""
    request = json.loads(sys.argv[1])
    package, _ = runpy.run_path(request["tool"])["import_llama_cpp"]()
    counts = {"prompt": request["prompt"], "generate": request["generate"]}
    models = {
        name: package.Llama(
            model_path=file,
            n_ctx=max(counts.values()) + 8,
            n_batch=counts["prompt"],
            n_threads=request["threads"],
            n_threads_batch=request["threads"],
            flash_attn=True,  # llama.cpp's default, not that of its Python package
            verbose=False,
        )
        for name, file in request["files"].items()
    }
    ids = [FIRST + STEP * n % RANGE for n in range(max(counts.values()))]
    times: dict[str, dict[str, list[dict[str, float]]]] = {name: {key: [] for key in counts} for name in models}
    # The first round reads the files and does not count. Every other round goes through them in the opposite order.
    for repeat in range(request["repeats"] + 1):
        for name in list(models) if repeat % 2 else reversed(models):
            for key, count in counts.items():
                models[name].reset()
                seconds = timed(models[name], ids[:count], one_by_one=key == "generate")
                times[name][key] += [seconds] if repeat else []
    print(json.dumps({"version": package.__version__, "seconds": times}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
