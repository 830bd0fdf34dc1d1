"""The processes of a run, as torchrun starts them: what they share, how they stop together, how a program ends."""
from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from loop.flags import TrainingFlags
from loop.memory import enough_memory
from model.vlm import pick_device
from tasks.endings import EXPECTED, STOPPING, end, end_on_signals, first_line, is_first_process, say_last

T = TypeVar("T")
R = TypeVar("R")


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM arrived; raised on every rank at the same place."""


class NonFinite(FloatingPointError):
    """The loss or its gradient is NaN or infinite; nothing was updated."""


class LostRank(RuntimeError):
    """The other processes of the run do not answer: one of them ended, most often by an error of its own."""


class Ranks:
    """The processes of a run, as torchrun describes them in the environment; one process without it.

    Methods that need the other processes raise LostRank when one of them is gone.
    """

    def __init__(self, device: str | None = None):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

        if self.world > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            with self._calling_others():
                dist.init_process_group(backend)

        self.stop_requested = False                     # SIGINT or SIGTERM arrived at this rank
        self.is_uninterrupted = False                   # inside `uninterrupted()`

    def stop_after_step(self) -> None:
        """From now on SIGINT or SIGTERM lets the step that is under way be finished and saved. A second one does not.

        Called once there is something to be saved; before, either ends the program at once.
        """
        for number in STOPPING:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        end_on_signals("interrupted twice, ended at once; what was saved before is whole")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _calling_others(self) -> Iterator[None]:
        """Around a call of torch.distributed: its RuntimeError becomes LostRank with one short reason."""
        try:
            yield
        except RuntimeError as error:
            raise lost_rank(self.rank, error) from None

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Inside, `map` goes on to its end even if a signal has arrived."""
        self.is_uninterrupted = True
        try:
            yield
        finally:
            self.is_uninterrupted = False

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    def map(self, function: Callable[[Sequence[T]], list[R]], items: Sequence[T], size: int, label: str,
            prepare: Callable[[Sequence[T]], None] | None = None) -> list[R]:
        """`function` over chunks of `size` items, chunk i on rank i mod world; every rank gets all results, in order.

        The chunks do not depend on the number of ranks, so neither do the results. `prepare` is told of a chunk, and of
        the rank's next one, before the chunk is worked on: what it begins in threads can go on meanwhile. Raises
        Interrupted after a signal, except inside `uninterrupted()`.
        """
        chunks = [items[start:start + size] for start in range(0, len(items), size)]
        mine: dict[int, list[R]] = {}
        with tqdm(total=len(items), desc=label, unit="item", disable=not self.first, leave=False) as bar:
            for number in range(self.rank, len(chunks), self.world):
                if self.stop_requested and not self.is_uninterrupted:
                    break
                if prepare is not None:
                    for upcoming in chunks[number:number + self.world + 1:self.world]:
                        prepare(upcoming)
                mine[number] = function(chunks[number])
                done_meanwhile = chunks[number:number + self.world]     # by all ranks, about
                bar.update(sum(len(chunk) for chunk in done_meanwhile))

        by_chunk: dict[int, list[R]] = {}
        for part in self.gather(mine):
            by_chunk |= part
        if self.any(self.stop_requested) and not self.is_uninterrupted:
            raise Interrupted
        results: list[R] = []
        for number in range(len(chunks)):
            results += by_chunk[number]
        return results

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            with self._calling_others():
                dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one."""
        return any(self.gather(flag))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            with self._calling_others():
                dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to sum a tensor over ranks, in place; what this returns waits until it is done."""
        with self._calling_others():
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with self._calling_others():
                work.wait()
        return wait

    def as_many(self, parts: Sequence[T], spare: T) -> list[tuple[T, float]]:
        """This rank's micro-batches, each with its weight 1, and `spare` with weight 0 until all ranks have as many.

        In a pass over a shared-out model ranks gather each layer together, so none may have fewer passes than another.
        """
        most = max(self.gather(len(parts)))
        weighted = [(part, 1.0) for part in parts]
        return weighted + [(spare, 0.0)] * (most - len(parts))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            with self._calling_others():
                dist.barrier()


def lost_rank(rank: int, error: RuntimeError) -> LostRank:
    """What torch.distributed complains of, with one short reason."""
    message = re.sub(r"^\[\S+\] ", "", first_line(error))       # without the place in torch's sources
    reason = message.split(". ")[0]
    return LostRank(f"rank {rank} cannot reach the other ranks: {reason}")


@contextmanager
def others_answering() -> Iterator[None]:
    """Around a program's work: a passage between ranks that fails inside a pass over a shared-out model is a LostRank.

    FSDP and torch.distributed.checkpoint call the other ranks by themselves. NCCL's errors have a class; gloo's are
    RuntimeErrors that name a file of gloo's. Any other RuntimeError is left as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise lost_rank(int(os.environ.get("RANK", 0)), error) from None


def exit_status(program: str, work: Callable[[Ranks], int], cfg: TrainingFlags) -> int:
    """The exit status of work(ranks). What can go wrong becomes one sentence and its status: see tasks/endings.py."""
    try:
        with enough_memory(cfg), others_answering(), Ranks(cfg.device) as ranks:
            return work(ranks)
    except Interrupted:
        way_on = "--resume continues from the newest checkpoint"
        if cfg.is_demo:
            way_on = "the demo starts over" if cfg.out is None else "the demo starts over in another --out"
        if is_first_process():
            say_last(program, f"interrupted; {way_on}")
        return 1
    except (*EXPECTED, LostRank) as error:
        return end(program, error)
