"""Counter of the bytes of live tensors, at the level of PyTorch's operations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Context that counts the bytes of all live tensors except the ``known`` ones.

    Attributes:
        peak: largest number of bytes that were alive at one time.

    Example:
        >>> with LiveTensors(model.parameters()) as live:
        ...     model(ids)
        >>> live.peak  # largest number of bytes at one time
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known_addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._bytes = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # Tensors on meta and fake tensors state a size but hold no memory.
            if isinstance(leaf, Tensor) and leaf.untyped_storage().device.type != "meta":
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or storage.data_ptr() in self._known_addresses:
            return

        def discount(_: object) -> None:
            del self._alive[key]
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, discount)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
