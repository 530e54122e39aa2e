"""A script for another environment: what transformers alone makes of model folders. ``argv``: requests, a JSON file.

Writes result.pt into the working folder: folder name -> what was found. Nothing is judged here.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path


def main(requests: dict) -> dict:
    import torch
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    warnings.simplefilter("error", DeprecationWarning)
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    ids, short = torch.tensor(requests["ids"]), requests["padding"]
    mask = torch.ones_like(ids)
    mask[1, :short] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = ids.masked_fill(mask == 0, 0)
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}

    def generated(model, tokens, **keys):
        return model.generate(tokens, generation_config=GenerationConfig(**greedy, **keys))

    def loaded(folder):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        lost = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
        return model.eval(), lost

    def tokens(folder, **keys):
        return AutoTokenizer.from_pretrained(folder, **keys)(requests["text"])["input_ids"]

    def plain_tokens(folder):
        """transformers 5 asks about the folder's code first; without an answer it reads the configuration as none."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*rope_scaling.*", FutureWarning)
            return tokens(folder)

    @torch.no_grad()
    def found_in(folder: Path) -> dict:
        model, lost = loaded(folder)
        model.generation_config = GenerationConfig()
        logits = model(ids).logits
        alone = model(ids[1:, short:]).logits
        batch = model(padded, attention_mask=mask, position_ids=positions).logits
        texts = model.generate(padded, attention_mask=mask, generation_config=GenerationConfig(**greedy))
        again = Path("again") / folder.name
        model.save_pretrained(again)
        decoder = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        return {
            "class": f"{type(model).__module__}.{type(model).__name__}",
            "lost": lost,
            "logits": logits,
            "hidden": decoder(ids).last_hidden_state,
            "padded": (batch[1, short:] - alone[0]).abs().max().item(),
            "texts": {
                "cached": generated(model, ids, use_cache=True),
                "whole": generated(model, ids, use_cache=False),
                "padded": texts[1, ids.shape[1] :],
                "alone": generated(model, ids[1:, short:])[0, ids.shape[1] - short :],
            },
            "again": (loaded(again)[0](ids).logits - logits).abs().max().item(),
            "tokens": tokens(folder, trust_remote_code=True),
            "tokens without trust": plain_tokens(folder),
        }

    found = {name: found_in(Path(name)) for name in requests["folders"]}
    return {"version": transformers.__version__, "torch": str(torch.__version__), "folders": found}


if __name__ == "__main__":
    sys.modules["cfsp"] = None  # the folders have to load without it
    import torch

    torch.save(main(json.loads(Path(sys.argv[1]).read_text())), "result.pt")
