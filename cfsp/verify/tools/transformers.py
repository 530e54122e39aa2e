"""Script for transformers: ``AutoModelForCausalLM.from_pretrained`` with the folder's own code, and ``generate``."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        request["path"],
        trust_remote_code=request["trust_remote_code"],
        dtype=getattr(torch, request["dtype"]),
        output_loading_info=True,
    )
    model, report = loaded
    wrong = sorted(name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind])
    if wrong:
        raise ValueError(f"{len(wrong)} weights are missing, unexpected or of another shape, first {wrong[0]}")
    model = model.to(device).eval()
    ids = torch.tensor(request["token_ids"], device=device)
    # The folder's own settings are replaced, since they may sample or stop at an end-of-text token.
    greedy = GenerationConfig(do_sample=False, max_new_tokens=request["greedy"], eos_token_id=None, pad_token_id=0)
    model.generation_config = greedy
    with torch.no_grad():
        logprobs = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        text = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    return {
        "version": transformers.__version__,
        "logprobs": logprobs.tolist(),
        "greedy": text[:, ids.shape[1] :].tolist(),
    }


if __name__ == "__main__":
    sys.modules["cfsp"] = None  # type: ignore[assignment]  # the folder has to load without it
    print(json.dumps(main(json.loads(sys.argv[1]))))
