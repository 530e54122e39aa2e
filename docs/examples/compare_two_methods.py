"""Compare two pruners on your own text: the same budget, the same calibration windows, the same held-out windows.

    python docs/examples/compare_two_methods.py [--text FILE] [--model FOLDER] [--pruners cfsp flap] [--ratio 0.5]

The first 60 % of the text's windows are calibrated on, the rest is evaluated. Without arguments: the bundled model and
the bundled text.
"""

import argparse
import copy
import math
from pathlib import Path

import torch

import cfsp

ASSETS = Path(cfsp.__file__).parent / "assets"


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Perplexity of token windows [n, T]; the first token of each window is not predicted."""
    total = 0.0
    for window in windows.split(8):
        logits = model(window).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=ASSETS / "text" / "calibration.txt")
    parser.add_argument("--model", type=Path, default=ASSETS / "books7m")
    parser.add_argument("--pruners", nargs="+", default=["cfsp", "flap"])
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the FFN neurons to remove")
    options = parser.parse_args()

    model, tokenizer = cfsp.load(options.model)
    text = options.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    calibration, held_out = windows.split([round(0.6 * len(windows)), len(windows) - round(0.6 * len(windows))])
    print(f"{options.text.name}: {len(calibration)} windows of 256 tokens to calibrate on, {len(held_out)} held out")

    print(f"{'dense':24s} perplexity {perplexity(model, held_out):8.2f}")
    for pruner in options.pruners:
        plan = cfsp.prune(model, calibration, pruner=pruner, ratio=options.ratio, scope="ffn")
        pruned = cfsp.apply(copy.deepcopy(model), plan)
        removed = plan.achieved["ffn_ratio"]
        print(f"{pruner:24s} perplexity {perplexity(pruned, held_out):8.2f}   {removed:.1%} of the FFN removed")


if __name__ == "__main__":
    main()
