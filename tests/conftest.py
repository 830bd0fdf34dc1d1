"""Makes the repository importable from its tests, however pytest is called, and names the markers."""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")          # for the programs that tests start
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "helpers")]

from cpu_torchvision import import_torchvision
from pretended_gpu import PretendedGPU

TORCHVISION = import_torchvision() if find_spec("torchvision") else None       # before any test imports transformers
PRETENDED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "true_shapes: one layer at a published model's widths, seconds each")
    config.addinivalue_line("markers", "cuda: a file of what only a GPU runs; without one, on a pretended one")


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """Programs take over Ctrl-C and SIGTERM; afterwards pytest has them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What the tests compute is so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def gpu(request: pytest.FixtureRequest) -> Iterator[PretendedGPU | None]:
    """While the tests of a file marked cuda run, torch has the pretended GPU; None where there is a real one."""
    if request.node.get_closest_marker("cuda") is None or torch.cuda.is_available():
        yield None
        return
    request.config.stash[PRETENDED] = True
    with PretendedGPU() as pretended:
        yield pretended


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(PRETENDED, False):
        terminalreporter.write_line("torch sees no GPU: tests marked cuda ran on the pretended one "
                                    "(tests/helpers/pretended_gpu.py)")
