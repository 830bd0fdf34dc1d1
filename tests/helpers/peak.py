"""The largest number of bytes that tensors held at one moment, on a CPU."""
from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Inside, every storage that an operator returns is counted for as long as it lives; `first` are there before.

    Sizes are asked for anew at every operator, since FSDP empties storages and fills them again.
    """

    def __init__(self, first: Iterable[Tensor]):
        super().__init__()
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.bytes = 0
        for tensor in first:
            self.alive.add(storage_of(tensor))

    def __torch_dispatch__(self, function: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.alive.add(storage_of(leaf))
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in self.alive))
        return result


def storage_of(tensor: Tensor) -> Any:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()
