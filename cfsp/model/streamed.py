"""Model whose weights stay on disk; a block is in memory only while it runs, and the next one is read meanwhile.

The modules are transformers' own, with parameters on the meta device, which hooks replace by real ones while a module
runs. A plan is applied to each block when it is read, by the same slicing as in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.block_sample import block_sample
from cfsp.architecture.views import BlockView, DecoderView, resolve, view_block
from cfsp.architecture.weights import Weights
from cfsp.errors import CheckpointError, RunError
from cfsp.model.driver import BlockDriver
from cfsp.model.merged_parameters import MergedParameters
from cfsp.model.parameter_names import parameter_places, stored_names
from cfsp.model.snapshot import clone_module
from cfsp.plan.slice_block import slice_block
from cfsp.system.memory import return_freed
from cfsp.weights.shards import Shards

if TYPE_CHECKING:
    from cfsp.model.hidden_states import SpillBuffer
    from cfsp.plan.pruning_plan import BlockPlan


@dataclass(frozen=True)
class _Origin:
    """Origin of a block in the checkpoint.

    Attributes:
        index: index of the block in the checkpoint.
        stored: its modules before pruning, on the meta device.
        decision: decision of the plan, which names the kept units; None: all units are kept.
    """

    index: int
    stored: nn.Module
    decision: BlockPlan | None = None


class StreamedWeights(Weights):
    """Weights of a model that are read from disk when they are needed.

    Attributes:
        model: the model, with parameters on the meta device.
        shards: the checkpoint.
        dtype: dtype that the model computes with.
        rounded_to: narrower dtype of a checkpoint, to which values are rounded after reading; None: no rounding.
        samples: content samples by index in the checkpoint (:func:`cfsp.architecture.block_sample.block_sample`).
        reads: how often each block of the checkpoint was read.
    """

    is_streamed = True

    def __init__(self, model: Any, shards: Shards, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(model)
        self.shards, self.dtype, self._device = shards, dtype, device
        self.rounded_to: torch.dtype | None = None
        self.samples: dict[int, bytes] = {}
        view = resolve(model)
        self._merged = MergedParameters.find(model, shards) if view.mixtures else MergedParameters(model, shards)
        self._names = stored_names(model, shards, self._merged.parts)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="cfsp-read")
        self._read_ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self._users: dict[int, int] = {}  # block -> number of contexts and forward passes that need its parameters
        self._hook_handles: list[Any] = []
        prefixes = {module: name for name, module in model.named_modules()}
        self._prefixes = [f"{prefixes[block.module]}." for block in view.blocks]
        self._dense = tuple(_Origin(block.index, clone_module(block.module)) for block in view.blocks)
        self._origins = self._dense
        self._tensors: Mapping[str, Tensor] = {}
        self.reads = [0] * len(view.blocks)
        self._register_hooks(view)

    def follow(
        self, view: DecoderView, decisions: Sequence[BlockPlan] | None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Apply a plan to every block that is read from now on; without ``decisions``, rounding ends too."""
        self._drop_read_ahead()
        self._tensors = tensors or {}
        if decisions is None:
            self._origins = self._dense
            self.rounded_to = None
        else:
            staying = [origin for origin in self._dense if decisions[origin.index].keeps_block]
            self._origins = tuple(replace(origin, decision=decisions[origin.index]) for origin in staying)
        self._register_hooks(view)

    @property
    def device(self) -> torch.device:
        """Device that the model computes on."""
        return self._device

    def resident_bytes(self, blocks: Sequence[BlockView]) -> int:
        """Return the bytes of two blocks: one runs while the next is read."""
        return 2 * max(sum(weight.nbytes for weight in block.module.parameters()) for block in blocks)

    def sample(self, block: BlockView) -> bytes | None:
        """Return the content sample of a block; None if the block was not read before."""
        return self.samples.get(self._origins[block.index].index)

    @torch.no_grad()
    def logits(self, windows: Tensor, batch_size: int, label: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield token ids and logits like :meth:`Weights.logits`, reading each block once for all windows.

        The hidden states of all windows are held meanwhile. On a CPU, logits are computed for one window at a time:
        those of a batch would be larger than the two blocks in memory, and the result is equal to the bit. A GPU
        chooses its kernels by the number of rows, so the batch is kept there and results equal those in memory.
        """
        driver = BlockDriver(resolve(self.model), batch_size)
        hidden = driver.final_hidden_states(windows, label)
        with self.resident_rest():
            for states, batch in zip(hidden, windows.split(batch_size), strict=True):
                rows = 1 if self.device.type == "cpu" else batch_size
                for part, ids in zip(states.split(rows), batch.split(rows), strict=True):
                    logits = driver.logits(ids, part)
                    yield ids.to(logits.device), logits

    @torch.no_grad()
    def greedy(self, ids: Tensor, steps: int, choose: Callable[[Tensor], Tensor], label: str) -> Iterator[Tensor]:
        """Yield only the first logits of :meth:`Weights.greedy`, reading each block once."""
        driver = BlockDriver(resolve(self.model), len(ids))
        hidden = driver.final_hidden_states(ids, label)
        with self.resident_rest():
            logits = driver.logits(ids, hidden[0])
        yield logits

    def head_inputs(self, ids: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return the hidden states in place of embeddings, so that the embedding is not read."""
        return {"inputs_embeds": hidden}

    def limit_hidden_states(self, buffer: Callable[[], SpillBuffer]) -> None:
        """Limit the memory of hidden states between two blocks; those beyond the limit are written to disk."""
        self.spill = buffer()

    def round_to(self, dtype: torch.dtype) -> bool:
        """Round all values that are read from now on to a narrower dtype."""
        self.rounded_to = dtype if torch.finfo(dtype).bits < torch.finfo(self.dtype).bits else None
        return False

    @contextmanager
    def resident(self, block: BlockView) -> Iterator[None]:
        """Hold the parameters of ``block`` in memory within the context; the next block is read meanwhile.

        Raises:
            CheckpointError: a tensor cannot be read or is not finite; the message names file, block and tensor.
        """
        self._enter(block)
        try:
            yield
        finally:
            self._leave(block)

    @contextmanager
    def resident_rest(self) -> Iterator[None]:
        """Hold the parameters outside of blocks and embedding (final norm, head) in memory within the context."""
        before = []
        try:
            for module, name, parameter in self._rest_parameters():
                before.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(self._read_rest(module, name), requires_grad=False)
            yield
        finally:
            for module, name, parameter in before:
                module._parameters[name] = parameter

    def read_block(self, block: BlockView) -> dict[str, Tensor]:
        """Return the parameters of a block, sliced by the plan, by name within it; start reading the next block."""
        future = self._read_ahead.pop(block.index, None)
        parameters = future.result() if future is not None else self._read_block(block.index)
        if block.index + 1 < len(self._origins) and block.index + 1 not in self._read_ahead:
            self._read_ahead[block.index + 1] = self._reader.submit(self._read_block, block.index + 1)
        return parameters

    def read_outside_blocks(self, name: str) -> Tensor:
        """Return a tensor that belongs to no block, on the CPU, with the values that the model computes with.

        Raises:
            CheckpointError: the tensor cannot be read or is not finite.
            RunError: its values do not fit into the dtype that they are rounded to.
        """
        return self._round(name, self._to_model_dtype(name, self.shards.read(self._names[name])))

    def check_rest(self) -> None:
        """Read the tensors outside of the blocks once, so that damage in the embedding or head is noticed early.

        Raises:
            CheckpointError: a tensor cannot be read or is not finite; the message names it.
        """
        blocks = tuple(self._prefixes)
        for name in sorted({self._names[name] for name in self._names if not name.startswith(blocks)}):
            for part in self.shards.in_parts(name):
                self._to_model_dtype(name, part)

    def _register_hooks(self, view: DecoderView) -> None:
        """Register hooks that read the parameters of a module before it runs and drop them afterwards."""
        for handle in self._hook_handles:
            handle.remove()
        self._hook_handles = []
        self._within = {module for block in view.blocks for module in block.module.modules()}

        for block in view.blocks:

            def enter(_: nn.Module, args: Any, block: BlockView = block) -> None:
                self._enter(block)

            def leave(_: nn.Module, args: Any, output: Any, block: BlockView = block) -> None:
                self._leave(block)

            self._hook_handles.append(block.module.register_forward_pre_hook(enter))
            self._hook_handles.append(block.module.register_forward_hook(leave, always_call=True))
        self._embedding = self.model.get_input_embeddings()
        self._hook_handles.append(self._embedding.register_forward_pre_hook(self._load_embedding_rows))
        self._hook_handles.append(self._embedding.register_forward_hook(self._restore_embedding, always_call=True))
        for module in {module for module, _, _ in self._rest_parameters()}:
            stack = ExitStack()

            def load(module: nn.Module, args: Any, stack: ExitStack = stack) -> None:
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None and parameter.is_meta:
                        real = nn.Parameter(self._read_rest(module, name), requires_grad=False)
                        stack.callback(module._parameters.__setitem__, name, parameter)
                        module._parameters[name] = real

            def drop(module: nn.Module, args: Any, output: Any, stack: ExitStack = stack) -> None:
                stack.pop_all().close()

            self._hook_handles.append(module.register_forward_pre_hook(load))
            self._hook_handles.append(module.register_forward_hook(drop, always_call=True))

    def _rest_parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Return (module, attribute, parameter) of the parameters outside of blocks and embedding."""
        return [
            (module, name, parameter)
            for module in self.model.modules()
            if module not in self._within and module is not self.model.get_input_embeddings()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def _read_rest(self, module: nn.Module, name: str) -> Tensor:
        prefix = next(path for path, other in self.model.named_modules() if other is module)
        full = f"{prefix}.{name}" if prefix else name
        return self._prepare(full, self.shards.read(self._names[full]))

    def _load_embedding_rows(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Read only the rows of the embedding that the tokens use, and renumber the tokens accordingly."""
        ids, positions = args[0].unique(return_inverse=True)
        prefix = next(path for path, other in self.model.named_modules() if other is module)
        rows = self.shards.read_rows(self._names[f"{prefix}.weight"], ids.tolist())
        self._embedding_weight = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(self._prepare(f"{prefix}.weight", rows), requires_grad=False)
        self._padding, module.padding_idx = module.padding_idx, None  # type: ignore[assignment]
        return (positions.to(self.device), *args[1:])

    def _restore_embedding(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters["weight"] = self._embedding_weight
        module.padding_idx = self._padding

    def _enter(self, block: BlockView) -> None:
        index = block.index
        self._users[index] = self._users.get(index, 0) + 1
        if self._users[index] > 1:
            return
        try:
            tensors = self.read_block(block)
        except BaseException:
            del self._users[index]
            raise
        for module, name, path in parameter_places(block.module):
            module._parameters[name] = nn.Parameter(tensors[path], requires_grad=False)

    def _leave(self, block: BlockView) -> None:
        index = block.index
        if not self._users.get(index):
            return
        self._users[index] -= 1
        if self._users[index]:
            return
        del self._users[index]
        for module, name, _ in parameter_places(block.module):
            parameter = module._parameters[name]
            assert parameter is not None
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        if self.device.type == "cpu":
            return_freed()

    def _drop_read_ahead(self) -> None:
        """Drop the blocks that were read ahead."""
        for future in self._read_ahead.values():
            if not future.cancel():
                future.exception()
        self._read_ahead.clear()

    def _read_block(self, index: int) -> dict[str, Tensor]:
        """Read the block ``index`` of the model, slice it by the plan, and return its parameters by name within it."""
        origin = self._origins[index]
        self.reads[origin.index] += 1
        prefix = self._prefixes[origin.index]
        block = view_block(self.model, f"block {origin.index}", origin.index, clone_module(origin.stored))
        places = {prefix + path: (module, name) for module, name, path in parameter_places(block.module)}
        for full, read in self._merged.read(places, self._names):
            tensor = self._to_model_dtype(self._names.get(full, full), read, block=origin.index).to(self.device)
            module, name = places[full]
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        if origin.index not in self.samples:
            self.samples[origin.index] = block_sample(block)
        if origin.decision is not None:
            slice_block(block, origin.decision, self._tensors)
        sliced = {path: getattr(module, name).detach() for module, name, path in parameter_places(block.module)}
        return {path: self._round(prefix + path, tensor) for path, tensor in sliced.items()}

    def _prepare(self, name: str, tensor: Tensor) -> Tensor:
        return self._round(name, self._to_model_dtype(name, tensor)).to(self.device)

    def _to_model_dtype(self, name: str, tensor: Tensor, block: int | None = None) -> Tensor:
        """Convert a floating-point tensor to the dtype of the model; refuse NaN and infinite values."""
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(self.dtype)
        if tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                where = "" if block is None else f"block {block}: "
                raise CheckpointError(
                    f"{self.shards.folder}: {where}{name} holds NaN or infinite values as {self.dtype}; the checkpoint "
                    "is damaged (fetch it again), or its values need model.dtype=float32"
                )
        return tensor

    def _round(self, name: str, tensor: Tensor) -> Tensor:
        if self.rounded_to is None or not tensor.is_floating_point():
            return tensor
        rounded = tensor.to(self.rounded_to).to(tensor.dtype)
        if rounded.numel() and not all(map(torch.isfinite, torch.aminmax(rounded))):
            raise RunError(f"{name} does not fit into {self.rounded_to}; use save.dtype=bfloat16 or float32")
        return rounded
