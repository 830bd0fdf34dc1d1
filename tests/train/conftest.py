"""What all tests of whole runs share: few items, and one run that nothing interrupts."""
from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from runs import config, few_items, start


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few items, and the signal handler of before."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_task", few_items)
        yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted; every checkpoint is kept. No test changes it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_task", few_items)
        assert start(config(out)) == 3
    return out
