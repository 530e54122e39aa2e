"""Trial run of a model with two tokens, which detects unsupported shapes and failing code before a long computation."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cfsp.architecture.views import DecoderView
from cfsp.errors import CfspError, UnsupportedModelError
from cfsp.model.driver import BlockDriver, check_hidden_states, run_block
from cfsp.model.snapshot import without_hooks

#: Folders that hold the Python code of models: transformers itself, and code that it fetched with a model.
_MODEL_CODE = ("/transformers/models/", "/transformers_modules/")


@torch.no_grad()
def try_blocks(view: DecoderView) -> None:
    """Run two tokens through each kind of block of a model in memory, and through the whole model.

    A streamed model is skipped, because all of its blocks would be read for these two tokens. The pruner's probe checks
    it instead.

    Raises:
        UnsupportedModelError: a block takes or gives hidden states that are not [batch, tokens, hidden size].
    """
    if view.weights.is_streamed:
        return
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with without_hooks([*view.model.modules()]):  # hooks must count only the tokens of the run
        entry = BlockDriver(view, 1).entry(ids)
        tried: set[type] = set()
        for block in view.blocks:
            if type(block.module) not in tried:
                tried.add(type(block.module))
                check_hidden_states(view, run_block(block, entry.hidden[0], entry.kwargs[block.index][0]), "gives")
        view.model(ids.to(view.device))


@torch.no_grad()
def try_model(view: DecoderView) -> None:
    """Run two tokens through a whole model in memory, to detect code that fails.

    Its blocks may have any inputs. A streamed model is skipped, as in :func:`try_blocks`.

    Raises:
        UnsupportedModelError: the output of the model holds no logits.
    """
    if view.weights.is_streamed:
        return
    with without_hooks([*view.model.modules()]):
        output = view.model(torch.zeros(1, 2, dtype=torch.int64, device=view.device))
    if not isinstance(getattr(output, "logits", None), torch.Tensor):
        raise UnsupportedModelError(
            f"{type(view.model).__name__}: its forward pass returns no logits, so it is no causal language model; "
            "see the code that its folder brings"
        )


@contextmanager
def translate_model_code_errors(model_type: str, origin: str) -> Iterator[None]:
    """Turn an error inside a model's own code into an error for the user.

    Args:
        model_type: model type in config.json.
        origin: path of the model, for the message.

    Raises:
        UnsupportedModelError: the code of the model failed; the message names the model type and the error.
    """
    try:
        yield
    except (CfspError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if any(part in f.filename for part in _MODEL_CODE)), None)
        if place is None:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnsupportedModelError(
            f"model.path={origin}: the code of model_type={model_type} fails in {place.name} ({type(error).__name__}: "
            f"{reason}); its config.json describes no model that runs, or this version of transformers does not fit it"
        ) from error
