"""How fast a run trains and what it takes: the wall-clock columns of metrics.jsonl.

They differ whenever a run is repeated, bit for bit or not, so whoever compares two logs leaves them out:
`without_wall_clock`.
"""
from __future__ import annotations

import resource
import sys
from time import perf_counter
from typing import Any

import torch

from loop.ranks import Ranks

WALL_CLOCK = ("tokens/s", "pairs/s", "judgments/s", "preprocessing_share", "peak_memory_gb")


def without_wall_clock(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without the columns that no repetition gives again."""
    return {name: value for name, value in row.items() if name not in WALL_CLOCK}


class Preprocessing:
    """A stopwatch of this process. It runs inside `with PREPROCESSING:`, where pictures are decoded and cut into
    patches, and texts become tokens."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += perf_counter() - self._started


PREPROCESSING = Preprocessing()


class StepClock:
    """Measures one optimiser step, from here to `figures`; made and read on every rank.

    On a GPU the step's last kernels, AdamW's, may still run when it is read. They then count as the next step's, so a
    mean over steps is right.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.preprocessed = PREPROCESSING.seconds
        self.start = perf_counter()

    def figures(self, tokens: int | None = None, **examples: int) -> dict[str, float]:
        """The columns of a step that took `tokens` tokens and, say, pairs=32, over all ranks.

        preprocessing_share is rank 0's. peak_memory_gb is that of the rank that needed most since it started: what
        torch has taken of the GPU, without one what the process has taken of the machine.
        """
        seconds = perf_counter() - self.start
        row = {}
        if tokens is not None:
            row["tokens/s"] = round(tokens / seconds, 1)
        for name, count in examples.items():
            row[f"{name}/s"] = round(count / seconds, 2)
        row["preprocessing_share"] = round((PREPROCESSING.seconds - self.preprocessed) / seconds, 3)
        row["peak_memory_gb"] = round(max(self.ranks.gather(peak_memory(self.ranks.device))) / 1e9, 3)
        return row


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far, on the GPU where `device` is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024             # Linux counts in KiB
