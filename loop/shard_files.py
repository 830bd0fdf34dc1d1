"""Checkpoints of a run with --shard: every rank writes what it holds, by torch.distributed.checkpoint.

    checkpoints/step-000020-001/state.pt    all but the numbers of tensors, which stand there empty (on the meta device)
    checkpoints/step-000020-001/shards/     the numbers: a file a rank, and .metadata, which says where what stands

So no rank ever holds all of a model's weights and moments. Any number of processes can read it: each takes its own part
of every tensor, whoever has written that. The folder appears whole or not at all, as every checkpoint does.
"""
from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loop.ranks import Ranks
from loop.saving import saving
from loop.shard import empty_part, processes
from model.checkpoint import whole_folder
from tasks.endings import first_line

SHARDS = "shards"
CHECKPOINT = "torch.distributed.checkpoint."
METADATA = {                                            # all that .metadata, a pickle, may be made of
    "torch.Size", "torch.float32", "torch.serialization._get_layout",
    "pathlib.PosixPath", "pathlib._local.PosixPath",    # of Python 3.13
    CHECKPOINT + "metadata.Metadata", CHECKPOINT + "metadata.TensorStorageMetadata",
    CHECKPOINT + "metadata.ChunkStorageMetadata", CHECKPOINT + "metadata.TensorProperties",
    CHECKPOINT + "metadata._MEM_FORMAT_ENCODING", CHECKPOINT + "metadata.MetadataIndex",
    CHECKPOINT + "metadata.StorageMeta", CHECKPOINT + "filesystem._StorageInfo"}


def write_sharded(ranks: Ranks, target: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint's folder, every rank its part. OSError where the disk is full or fails."""
    import torch.distributed.checkpoint as dcp  # here: it takes a second to import

    tensors: dict[str, Tensor] = {}

    def take_out(place: str, tensor: Tensor) -> Tensor:
        tensors[place] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    rest = replace_tensors(state, take_out)
    with ExitStack() as stack:
        folder = None
        if ranks.first:
            stack.enter_context(saving(target))
            folder = stack.enter_context(whole_folder(target))
            torch.save(rest, folder / "state.pt")
        [folder, *_] = ranks.gather(folder)
        with failing_as(OSError, f"cannot write {target}"):
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder / SHARDS), no_dist=ranks.world == 1)


def read_sharded(rest: dict[str, Any], folder: Path, device: torch.device) -> dict[str, Any]:
    """The state of a checkpoint from its state.pt's content: empty tensors become this rank's parts, on `device`.

    ValueError where the folder's shards do not hold them.
    """
    import torch.distributed.checkpoint as dcp

    tensors: dict[str, Tensor] = {}

    def make_room(place: str, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            tensors[place] = empty_part(tensor, device)
        return tensors.get(place, tensor)

    state = replace_tensors(rest, make_room)
    reader = checked_reader(folder / SHARDS)
    with failing_as(ValueError, f"{folder / SHARDS} is damaged"):
        dcp.load(tensors, storage_reader=reader, no_dist=processes() == 1)
    return state


def replace_tensors(value: Any, change: Callable[[str, Tensor], Tensor], place: str = "") -> Any:
    """The same dicts, in each of which `change(place, tensor)` stands for a tensor; a place: /model/NAME."""
    if isinstance(value, Tensor):
        return change(place, value)
    if isinstance(value, dict):
        return {key: replace_tensors(entry, change, f"{place}/{key}") for key, entry in value.items()}
    return value


@contextmanager
def failing_as(kind: type[Exception], beginning: str) -> Iterator[None]:
    """Around a call of torch.distributed.checkpoint: what failed on one rank is an error of that kind on all.

    Its CheckpointException, which is no Exception, holds the errors of the ranks that failed.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():                 # that one process is one process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:
        [(cause, _), *_] = error.failures.values()
        raise kind(f"{beginning}: {first_line(cause):.200}") from None


def checked_reader(folder: Path) -> Any:
    """A reader of shards to which .metadata is data: torch's own would run whatever code that pickle names."""
    from torch.distributed.checkpoint import FileSystemReader, Metadata
    from torch.distributed.checkpoint.metadata import StorageMeta

    class CheckedReader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with open(folder / ".metadata", "rb") as file:
                metadata = MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_meta, StorageMeta):
                raise ValueError(".metadata holds no metadata")
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return CheckedReader(folder)


class MetadataUnpickler(pickle.Unpickler):
    """Reads a pickle that is made of METADATA's classes alone; UnpicklingError for any other."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in METADATA:
            raise pickle.UnpicklingError(f".metadata names {module}.{name}"[:100])
        return super().find_class(module, name)
