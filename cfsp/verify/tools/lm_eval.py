"""Script for lm-evaluation-harness: log-likelihoods of its ``hf`` model, built as in ``lm_eval --model hf``."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    import torch
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    harness = HFLM(
        pretrained=request["path"],
        trust_remote_code=request["trust_remote_code"],
        dtype=request["dtype"],
        device=device,
        batch_size=1,
    )
    windows = request["token_ids"]
    rows = []
    for window in windows:
        # The context grows by one token at a time, so that each token is scored like an answer.
        requests = [(("", ""), window[:at], window[at : at + 1]) for at in range(1, len(window))]
        rows.append([logprob for logprob, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)])
    return {"version": version("lm_eval"), "logprobs": rows, "greedy": []}


if __name__ == "__main__":
    sys.modules["cfsp"] = None  # type: ignore[assignment]  # the folder has to load without it
    print(json.dumps(main(json.loads(sys.argv[1]))))
