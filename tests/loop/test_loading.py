"""loop/loading.py: the dtype that a program computes in."""
from __future__ import annotations

import pytest
import torch

from loop.loading import activation_dtype

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("name, device, dtype", [
    (None, CPU, torch.float32), ("bfloat16", CPU, torch.bfloat16), (None, GPU, torch.bfloat16),
    ("bfloat16", GPU, torch.bfloat16), ("float32", GPU, torch.float32)], ids=str)
def test_dtypes(name: str | None, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert activation_dtype(name, device) is dtype


def test_a_gpu_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4: bfloat16, also where nobody asked for it, is refused with the way out; float32 is not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for name in (None, "bfloat16"):
        with pytest.raises(ValueError, match=r"bfloat16 needs a GPU .* and cuda:0 has 7\.5: --dtype float32"):
            activation_dtype(name, GPU)
    assert activation_dtype("float32", GPU) is torch.float32
