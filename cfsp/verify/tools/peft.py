"""Script for PEFT: LoRA on every linear layer of the blocks, three training steps, and merging of the adapter."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    import peft
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, request["dtype"])
    base: Any = AutoModelForCausalLM.from_pretrained(
        request["path"], trust_remote_code=request["trust_remote_code"], dtype=dtype
    )
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base.to(device), settings).eval()
    ids = torch.tensor(request["token_ids"], device=device)

    def logprobs(network: Any) -> Any:
        with torch.no_grad():
            return network(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    untrained = logprobs(model)  # an untrained adapter changes nothing
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    trained = logprobs(model)
    if torch.equal(trained, untrained):
        raise ValueError("three steps of training left the adapter without effect")
    merged = logprobs(model.merge_and_unload())
    return {
        "version": peft.__version__,
        "logprobs": untrained.tolist(),
        "greedy": [],
        "checks": {"merging the trained adapter": float((merged - trained).abs().max())},
    }


if __name__ == "__main__":
    sys.modules["cfsp"] = None  # type: ignore[assignment]  # the folder has to load without it
    print(json.dumps(main(json.loads(sys.argv[1]))))
