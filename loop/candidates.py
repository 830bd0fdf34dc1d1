"""Candidates from logs, in place of sampling: what a student answered when another harness asked it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tasks import Item
from tasks.jsonl import Response, key_of, read_lines, response_of
from tasks.loading import shown
from tasks.log_files import read_log
from tasks.rewardbench import Comparison

FEWEST = 2                                              # candidates of an item: a pair has two sides


@dataclass
class LoggedCandidates:
    """What logs hold of a task's items, by item id, and how much of it is of no use."""
    paths: Sequence[str]
    by_id: dict[str, Item] = field(default_factory=dict)                # as the student saw them, in the task's order
    samples: dict[str, list[Response]] = field(default_factory=dict)
    absent: int = 0                                     # items of the task that no log holds
    foreign: int = 0                                    # rows that are about no item of the task
    failed: int = 0                                     # rows that hold no answer
    repeated: int = 0                                   # rows that add nothing to another row of their log

    def add(self, item: Item, responses: Sequence[Response], where: str) -> None:
        """Add candidates of an item. ValueError where it is a pair that was shown in the other order before."""
        if key_of(self.by_id.setdefault(item.id, item)) != key_of(item):
            raise ValueError(f"{where}: pair {shown(item.id)} has responses to both orders, and candidates answer one "
                             "prompt")
        self.samples.setdefault(item.id, []).extend(responses)

    @property
    def items(self) -> list[Item]:
        """The items that have enough candidates."""
        return [item for name, item in self.by_id.items() if len(self.samples[name]) >= FEWEST]

    @property
    def texts(self) -> dict[str, list[str]]:
        """The candidates' texts."""
        return {name: [response.text for response in row] for name, row in self.samples.items()}

    def told(self) -> str:
        """What was found, as a sentence."""
        sizes = [len(self.samples[item.id]) for item in self.items]
        an_item = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(max(sizes))
        told = [f"candidates: {an_item} an item, on {len(sizes)} items of {', '.join(self.paths)}; nothing was sampled"]
        counts = {
            "items of the task are not in the logs": self.absent,
            "rows of the logs are about no item of the task": self.foreign,
            "items have one response alone and are left out": len(self.samples) - len(sizes),
            "rows hold no answer and are left out": self.failed,
            "rows repeat responses of another row and count once": self.repeated}
        told += [f"{count} {what}" for what, count in counts.items() if count]
        return "; ".join([*told, "the student's greedy answers are not measured"])


def read_candidates(paths: Sequence[str], items: Sequence[Item]) -> LoggedCandidates:
    """The candidates of a task's items in all of these logs together: those of several runs are put side by side.

    A log is lmms-eval's, VLMEvalKit's, or lines {"id", "response"}, one a candidate. ValueError where one cannot be
    read or is about none of the items, and where no item has two responses.
    """
    found = LoggedCandidates(paths)
    for path in paths:
        log = read_log(path, items)
        if log is None:
            add_lines(found, path, items)
            continue
        found.foreign += len(log.foreign)
        found.repeated += log.repeated
        for item, row in zip(log.items, log.rows, strict=True):
            if row.failed:
                found.failed += 1
            else:
                found.add(item, row.responses, row.where)

    if not found.items:
        raise ValueError(f"{', '.join(paths)}: no item has more than one response, and the gate needs {FEWEST} "
                         "candidates an item: give the logs of several runs, or run lmms-eval with --repeats 8 "
                         "--reasoning_tags none (with its default tags it logs the first response alone)")
    found.absent = sum(item.id not in found.by_id for item in items)
    found.by_id = {item.id: found.by_id[item.id] for item in items if item.id in found.by_id}
    return found


def add_lines(found: LoggedCandidates, path: str, items: Sequence[Item]) -> None:
    """Add the candidates of a file of lines {"id", "response"}."""
    by_id = {item.id: item for item in items}
    is_of_task = False
    for where, row in read_lines(path):
        (name, swapped), response = response_of(row, where)
        item = by_id.get(name)
        if item is None:
            found.foreign += 1
            continue
        if swapped and isinstance(item, Comparison):
            item = item.swap()
        found.add(item, [response], where)
        is_of_task = True
    if not is_of_task:
        raise ValueError(f"no line of {path} is about an item of the task")
