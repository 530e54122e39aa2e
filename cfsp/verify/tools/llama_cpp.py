"""What llama.cpp computes of a GGUF file. Needs llama_cpp and numpy alone, in whatever environment they are.

``python llama_cpp.py REQUEST`` prints one line of JSON last; both are objects.

The request: "file" (a GGUF), "token_ids" (lists of ids, each a text of its own), and what may be left out: "greedy" (so
many tokens follow each), "logits" (true: whole, and not as log-probabilities), "save" (FILE.npz for them) and "texts"
(to tokenise).
The reply: "version" of llama_cpp, "logprobs" (of the tokens 1..T-1 of each text, [T-1]; with "logits" or "save" of the
whole vocabulary, [T, V]; where saved, the file, whose arrays are 0, 1, ...), "greedy" (the ids after each),
"continuations" (those as text), "ids" (of each of the texts, with the special ones that the file asks for). Where
llama.cpp does not take the file: "version", "error", and exit code 1.

Float32 throughout, the key-value cache too: llama.cpp's own choice, float16, alone moves logits by 5e-3.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

# This file's own folder comes first there, where its name would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

F32 = 0
_ERROR = 4


def prepared() -> tuple[Any, list[str]]:
    """The package, made ready, and the list to which it will write its errors."""
    import llama_cpp
    import llama_cpp.llama_cpp as library

    defaults = library.llama_model_default_params

    def params() -> Any:
        found = defaults()
        # The repacked weights of quantised files crash on some CPUs with AMX; Llama() has no argument for it.
        found.use_extra_bufts = False
        return found

    library.llama_model_default_params = params
    llama_cpp.llama_model_default_params = params
    said: list[str] = []

    @library.llama_log_callback
    def log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        words = text.decode("utf-8", "replace").strip()
        if level == _ERROR and words:
            said.append(words)

    library.llama_log_set(log, ctypes.c_void_p(0))
    prepared.keep = log  # type: ignore[attr-defined]
    return llama_cpp, said


def load(llama_cpp: Any, file: str, positions: int, **settings: Any) -> Any:
    """The model with a float32 cache of ``positions`` tokens."""
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


def logits(model: Any, ids: list[int]) -> Any:
    """[T, V] float32, of a text of its own."""
    model.reset()
    model.eval(ids)
    return model.scores[: len(ids)].copy()


def greedy(model: Any, last: Any, n: int) -> list[int]:
    """The most likely next tokens after what the model has read; ``last``: logits [V] of that."""
    found: list[int] = []
    for _ in range(n):
        found.append(int(last.argmax()))
        model.eval(found[-1:])
        last = model.scores[model.n_tokens - 1]
    return found


def log_probabilities(values: Any) -> Any:
    import numpy

    shifted = values - values.max(-1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted, dtype=numpy.float64).sum(-1, keepdims=True)).astype(numpy.float32)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    import numpy

    llama_cpp, said = prepared()
    reply: dict[str, Any] = {"version": llama_cpp.__version__}
    texts, n = request["token_ids"], int(request.get("greedy", 0))
    longest = max([len(ids) for ids in texts], default=1) + n + 1
    try:
        model = load(llama_cpp, request["file"], longest, logits_all=True)
    except (ValueError, RuntimeError) as error:
        return {**reply, "error": "; ".join(said) or str(error)}
    arrays = []
    reply["greedy"] = []
    for ids in texts:
        values = logits(model, ids)
        array = values if request.get("logits") else log_probabilities(values)
        if not request.get("logits") and "save" not in request:
            array = array[numpy.arange(len(ids) - 1), ids[1:]]
        arrays.append(array)
        reply["greedy"].append(greedy(model, values[-1], n))
    reply["continuations"] = [model.detokenize(ids).decode("utf-8", "replace") for ids in reply["greedy"]]
    reply["ids"] = [model.tokenize(text.encode(), special=True) for text in request.get("texts", ())]
    if "save" in request:
        numpy.savez(request["save"], **{str(at): array for at, array in enumerate(arrays)})
    reply["logprobs"] = request["save"] if "save" in request else [array.tolist() for array in arrays]
    return reply


def main() -> int:
    found = answer(json.loads(sys.argv[1]))
    print(json.dumps(found), flush=True)
    return 1 if "error" in found else 0


if __name__ == "__main__":
    sys.exit(main())
