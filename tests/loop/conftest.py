"""What tests of a run share: one process, and a run that was started."""
from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from loop.ranks import Ranks
from loop.run import Run
from run_folder import Flags
from runs import few_items


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """One process; the signal handler of before is put back."""
    handler = signal.getsignal(signal.SIGTERM)
    yield Ranks("cpu")
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def few_tasks() -> Iterator[None]:
    """train.py's tasks have few items."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_task", few_items)
        yield


@pytest.fixture
def run(tmp_path: Path, ranks: Ranks) -> Run:
    """A run that was started."""
    found = Run(Flags(str(tmp_path / "run")), ranks)
    found.start(reference="abc")
    return found
