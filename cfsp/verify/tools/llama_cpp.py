"""Script for llama.cpp: log-probabilities and greedy tokens of a GGUF file. It needs only llama_cpp and numpy.

``python llama_cpp.py REQUEST`` prints its reply in the last line; both are JSON objects.

Keys of the request:
    file: the GGUF file.
    token_ids: token ids of each text.
    greedy: number of tokens to generate after each text (optional).
    logits: true to return the logits of the whole vocabulary instead of log-probabilities (optional).
    save: FILE.npz to which the arrays are written (optional).
    texts: texts to tokenise (optional).

Keys of the reply:
    version: version of llama_cpp.
    logprobs: log-probabilities of the tokens 1..T-1 of each text, [T-1]. With "logits" or "save" the values of the
        whole vocabulary, [T, V]. With "save" the name of the file, whose arrays are named 0, 1, ...
    greedy: ids after each text.
    continuations: the generated tokens as text.
    ids: ids of each of the "texts", with the special tokens that the file asks for.
    error: reason why llama.cpp rejects the file; the exit code is then 1.

Everything is computed in float32, including the KV cache. llama.cpp's default for the cache, float16, changes logits by
5e-3.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

# This file's own folder comes first on the path, where its name would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

F32 = 0
_ERROR = 4


def import_llama_cpp() -> tuple[Any, list[str]]:
    """Import llama_cpp with safe defaults, and collect its errors.

    Returns:
        The package, and a list to which each error message of llama.cpp is appended.
    """
    import llama_cpp
    import llama_cpp.llama_cpp as library

    defaults = library.llama_model_default_params

    def params() -> Any:
        settings = defaults()
        # The repacked weights of quantised files crash on some CPUs with AMX, and Llama() has no argument for this.
        settings.use_extra_bufts = False
        return settings

    library.llama_model_default_params = params
    llama_cpp.llama_model_default_params = params
    errors: list[str] = []

    @library.llama_log_callback
    def log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        message = text.decode("utf-8", "replace").strip()
        if level == _ERROR and message:
            errors.append(message)

    library.llama_log_set(log, ctypes.c_void_p(0))
    # llama.cpp keeps only a C pointer, so a reference here protects the callback from garbage collection.
    import_llama_cpp.log_callback = log  # type: ignore[attr-defined]
    return llama_cpp, errors


def load_model(llama_cpp: Any, file: str, positions: int, **settings: Any) -> Any:
    """Load the model with a float32 KV cache of ``positions`` tokens."""
    return llama_cpp.Llama(
        model_path=file,
        n_ctx=positions,
        n_batch=positions,
        n_ubatch=positions,
        type_k=F32,
        type_v=F32,
        verbose=False,
        **settings,
    )


def compute_logits(model: Any, ids: list[int]) -> Any:
    """Return the logits of a text, [T, V] in float32. The model's earlier context is dropped."""
    model.reset()
    model.eval(ids)
    return model.scores[: len(ids)].copy()


def generate_greedily(model: Any, last: Any, n: int) -> list[int]:
    """Generate ``n`` tokens greedily after the model's present context.

    Args:
        model: the model.
        last: logits of the last token in the context, [V].
        n: number of tokens.
    """
    tokens: list[int] = []
    for _ in range(n):
        tokens.append(int(last.argmax()))
        model.eval(tokens[-1:])
        last = model.scores[model.n_tokens - 1]
    return tokens


def log_probabilities(values: Any) -> Any:
    """Return the log-softmax of logits over their last dimension, summed in float64."""
    import numpy

    shifted = values - values.max(-1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted, dtype=numpy.float64).sum(-1, keepdims=True)).astype(numpy.float32)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a request."""
    import numpy

    llama_cpp, errors = import_llama_cpp()
    reply: dict[str, Any] = {"version": llama_cpp.__version__}
    texts, n = request["token_ids"], int(request.get("greedy", 0))
    longest = max([len(ids) for ids in texts], default=1) + n + 1
    try:
        model = load_model(llama_cpp, request["file"], longest, logits_all=True)
    except (ValueError, RuntimeError) as error:
        return {**reply, "error": "; ".join(errors) or str(error)}
    arrays = []
    reply["greedy"] = []
    for ids in texts:
        values = compute_logits(model, ids)
        array = values if request.get("logits") else log_probabilities(values)
        if not request.get("logits") and "save" not in request:
            array = array[numpy.arange(len(ids) - 1), ids[1:]]
        arrays.append(array)
        reply["greedy"].append(generate_greedily(model, values[-1], n))
    reply["continuations"] = [model.detokenize(ids).decode("utf-8", "replace") for ids in reply["greedy"]]
    reply["ids"] = [model.tokenize(text.encode(), special=True) for text in request.get("texts", ())]
    if "save" in request:
        numpy.savez(request["save"], **{str(at): array for at, array in enumerate(arrays)})
    reply["logprobs"] = request["save"] if "save" in request else [array.tolist() for array in arrays]
    return reply


def main() -> int:
    """Answer the request in ``argv[1]`` and return the exit code."""
    reply = answer(json.loads(sys.argv[1]))
    print(json.dumps(reply), flush=True)
    return 1 if "error" in reply else 0


if __name__ == "__main__":
    sys.exit(main())
