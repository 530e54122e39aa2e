"""Time GGUF files in llama.cpp in alternation, in a separate process.

``python llama_cpp_job.py REQUEST`` prints one line of JSON. It runs in the environment that has llama_cpp and imports
nothing of the project. REQUEST is JSON with "tool" (path of cfsp/verify/tools/llama_cpp.py, which prepares the
package), "files" (name -> GGUF file), "prompt" and "generate" (numbers of tokens), "repeats" and "threads". The reply
has "version" and "seconds": for each file, for "prompt" and "generate", and for each repeat, the wall-clock seconds and
the CPU seconds of this process. Both parts begin without a context, like pp and tg of llama-bench.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from typing import Any

#: Token ids FIRST, FIRST + STEP, ... modulo RANGE. Their values do not change the time.
FIRST, STEP, RANGE = 5, 37, 4000


def time_tokens(model: Any, ids: list[int], *, one_by_one: bool) -> dict[str, float]:
    """Return the wall-clock and CPU seconds in which the model processes ``ids``.

    Args:
        model: the model of llama_cpp.
        ids: token ids.
        one_by_one: process one token at a time, as in generation.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    for part in [[number] for number in ids] if one_by_one else [ids]:
        model.eval(part)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> int:
    """Answer the request on the command line and return the exit code."""
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
    # The first round loads the files and does not count. Every second round uses the opposite order.
    for repeat in range(request["repeats"] + 1):
        for name in list(models) if repeat % 2 else reversed(models):
            for key, count in counts.items():
                models[name].reset()
                seconds = time_tokens(models[name], ids[:count], one_by_one=key == "generate")
                times[name][key] += [seconds] if repeat else []
    print(json.dumps({"version": package.__version__, "seconds": times}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
