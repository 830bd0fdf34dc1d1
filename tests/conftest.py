"""Makes the repository importable from its tests, however pytest is called, and names the markers."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")          # before torch: what the tests compute is too small to share
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "true_shapes: one layer at a published model's widths, seconds each")
    config.addinivalue_line("markers", "cuda: needs a GPU, skipped without one")
