"""Weights that cannot be written: the writers of torch and safetensors raise no OSError, and name no file."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tasks.endings import first_line, writing

TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")    # one stands in what torch.save raises


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Around torch.save or save_file: what they raise where the disk is full or fails becomes an OSError that names
    `path`. Any other error is left as it is."""
    try:
        with writing(path):
            yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: the disk is full or fails ({first_line(error)})") from None
    except RuntimeError as error:
        if not any(words in str(error) for words in TORCH_WRITER):
            raise
        raise OSError(f"cannot write {path}: the disk is full or fails ({first_line(error)})") from None
