"""Things in order, as many at a time as are not too large together."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def chunks(things: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """The things in order, as many at a time as have a size of `most` together, but at least one."""
    chunk: list[T] = []
    total = 0
    for thing in things:
        needed = size(thing)
        if chunk and total + needed > most:
            yield chunk
            chunk = []
            total = 0
        chunk.append(thing)
        total += needed
    if chunk:
        yield chunk
