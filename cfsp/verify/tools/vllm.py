"""Script for vLLM: ``LLM.generate`` with the log-probabilities of the prompt, in one process and without graphs."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm
    from vllm import LLM, SamplingParams

    windows = request["token_ids"]
    engine = LLM(
        model=request["path"],
        trust_remote_code=request["trust_remote_code"],
        dtype=request["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=len(windows[0]) + request["greedy"],
        max_num_seqs=len(windows),
    )
    greedy = SamplingParams(
        temperature=0.0, max_tokens=request["greedy"], ignore_eos=True, prompt_logprobs=1, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": window} for window in windows], greedy, use_tqdm=False)
    return {
        "version": vllm.__version__,
        "logprobs": [
            [by_token[token].logprob for token, by_token in zip(window[1:], output.prompt_logprobs[1:], strict=True)]
            for window, output in zip(windows, outputs, strict=True)
        ],
        "greedy": [list(output.outputs[0].token_ids) for output in outputs],
        "class": _model_class(engine),
    }


def _model_class(engine: Any) -> str:
    """Return the name of the model class that vLLM chose; empty if this version of vLLM does not report it."""
    try:
        return ", ".join(sorted(set(engine.apply_model(lambda model: type(model).__name__))))
    except Exception:
        return ""


if __name__ == "__main__":
    sys.modules["cfsp"] = None  # type: ignore[assignment]  # the folder has to load without it
    print(json.dumps(main(json.loads(sys.argv[1]))))
