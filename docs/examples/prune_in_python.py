"""Prune a model in Python: load, plan, look at the plan, slice, save, load again.

    python docs/examples/prune_in_python.py [--model FOLDER] [--text FILE] [--out FOLDER] [--ratio 0.5] [--windows 48]

Without arguments the bundled model is pruned with the bundled text, in seconds on a CPU.
"""

import argparse
from pathlib import Path

import torch

import cfsp

ASSETS = Path(cfsp.__file__).parent / "assets"


def calibration_windows(tokenizer, text: str, windows: int, length: int) -> torch.Tensor:
    """Cut token windows [windows, length] from a text, evenly spread over it."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, windows).long()
    return torch.stack([ids[start : start + length] for start in starts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ASSETS / "books7m")
    parser.add_argument("--text", type=Path, default=ASSETS / "text" / "calibration.txt")
    parser.add_argument("--out", type=Path, default=Path("outputs/example"))
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the FFN neurons to remove")
    parser.add_argument("--windows", type=int, default=48)
    options = parser.parse_args()

    # 1. Load. The model is an ordinary transformers model.
    model, tokenizer = cfsp.load(options.model)
    input_ids = calibration_windows(tokenizer, options.text.read_text(encoding="utf-8"), options.windows, 256)

    # 2. Plan. One forward pass over the windows; the model is not changed.
    plan = cfsp.prune(model, input_ids, pruner="cfsp", ratio=options.ratio, scope="ffn")
    for index, row in enumerate(plan.details):
        print(f"block {index}: {row['width']:4d} of {row['base_width']} neurons stay, "
              f"angular distance {row['distance']['angular']:.3f}")  # fmt: skip

    # 3. Slice, in place: the matrices are smaller, there are no masks.
    model = cfsp.apply(model, plan)
    print(f"parameters: {plan.parameters['before']:,} -> {plan.parameters['after']:,}")

    # 4. Save. The folder loads in transformers with trust_remote_code=True, and in cfsp.
    model.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    plan.save(options.out / "plan.json")
    again, _ = cfsp.load(options.out / "model")
    with torch.no_grad():
        assert torch.equal(again(input_ids[:1]).logits, model(input_ids[:1]).logits)
    print(f"Written to {options.out}: model, plan.json")


if __name__ == "__main__":
    main()
