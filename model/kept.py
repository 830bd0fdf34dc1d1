"""What is kept between calls, within a number of bytes: beyond it the least recently used is dropped."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values by key, together at most `max_bytes`. Used by one thread alone."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0                                  # of all entries
        self.entries: OrderedDict[K, V] = OrderedDict()                 # most recently used last
        self.sizes: dict[K, int] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: K) -> V | None:
        """The value, or None; it counts as used."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def keep(self, key: K, value: V, size: int) -> None:
        """Keep a value of `size` bytes, unless it alone is larger than all that may be kept."""
        self.drop(key)
        if size > self.max_bytes:
            return
        self.entries[key] = value
        self.sizes[key] = size
        self.bytes += size
        while self.bytes > self.max_bytes:
            oldest = next(iter(self.entries))
            self.drop(oldest)

    def drop(self, key: K) -> V | None:
        """Let go of a value; returns it, or None where there is none."""
        self.bytes -= self.sizes.pop(key, 0)
        return self.entries.pop(key, None)
