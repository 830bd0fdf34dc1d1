"""torch.compile, which makes one kernel of small operations that follow each other: for a GPU, and with --no-eager.

A GPU is done with a norm, a rotation or a sum long before the next kernel is there, so the layers of a decoder are
compiled, one variant for each way in which they are called (VARIANTS). It has not run on a GPU yet, so models are eager
at first (VLM.eager).
"""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.fx.experimental._config as shapes
from torch import nn

TIMED: set[str] = set()                                 # what was said to have been compiled, in this process
# A layer is compiled anew for rows that branch, for one row, for prompts, without gradients, ... Beyond this number it
# would run as it is written, without a word.
VARIANTS = 32


@cache
def compiled(function: Callable) -> Callable:
    """The function, compiled when it is first called. One variant serves all sizes but 1, which gets its own."""
    torch._dynamo.config.recompile_limit = VARIANTS
    shapes.use_duck_shape = False                       # sizes that are equal in the first call may differ in the next
    return torch.compile(function, dynamic=True)


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile a decoder's layers, each kind of them once. Their first pass, forward and backward, then takes long."""
    for layer in layers:
        layer.forward = compiled(type(layer).forward).__get__(layer)


def are_compiled(layers: nn.ModuleList) -> bool:
    """Whether compile_layers has been here."""
    return "forward" in vars(layers[0])


@contextmanager
def timed_once(what: str) -> Iterator[None]:
    """Around work that is compiled when it is done for the first time: the first process prints how long that took."""
    start = time.perf_counter()
    yield
    if what not in TIMED and int(os.environ.get("RANK", 0)) == 0:       # RANK: torchrun's
        seconds = time.perf_counter() - start
        print(f"{what}: the first step took {seconds:.0f} s, compilation included (--eager: none)", file=sys.stderr)
    TIMED.add(what)
