"""Logs of other harnesses: their rows joined with a task's items, and their verdicts beside exact match.

    lmms_eval.py, vlmevalkit.py     what each harness writes, as rows (LogRow)
    log_files.py                    which of them a file is
    join(...)                       the item that each row is about, by the surest sign that the row holds
    compare(...)                    right or wrong by exact match and by the harness: a 2 x 2 table, and who differs

A row names its item by an id, if the harness kept one. Where it did not, a number stands in for it, and is believed
only if questions or answers of all rows are those of the items at these numbers.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tasks import Item
from tasks.answers import same
from tasks.choices import LETTERS
from tasks.jsonl import Response, prompt_text
from tasks.loading import shown
from tasks.rewardbench import Comparison

RIGHT_OR_WRONG = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass(frozen=True)
class LogRow:
    """What a log says of one question. All but `where` and `responses` may be unknown."""
    where: str                                  # "FILE line 3", for messages
    responses: tuple[Response, ...]             # what the model said, at least one
    names: tuple[str, ...] = ()                 # ids that the harness kept
    index: str = ""                             # a number that may be an id, if the question is the item's
    question: str = ""
    pair: tuple[str, ...] = ()                  # the two responses that a judge was shown, in the data set's order
    position: int | None = None                 # number of the row in the data set
    category: str = ""                          # within which rows are in the data set's order
    target: str = ""                            # the answer
    judged: int = 0                             # which of the responses the harness gave its verdict on
    verdict: bool | None = None                 # was it right?
    reading: str | None = None                  # what the harness took the answer to be
    failed: bool = False                        # the model was asked in vain: the response is empty

    @property
    def name(self) -> str:
        """What messages call the row."""
        return self.names[0] if self.names else self.index or self.where


@dataclass(frozen=True)
class Log:
    """A log joined with a task: `items` are those that it holds, in the task's order and as the harness showed them."""
    path: Path
    harness: str
    items: list[Item]
    rows: list[LogRow]                          # one an item
    missing: list[str]                          # ids of the task's other items
    foreign: list[str]                          # names of rows that are about none of the task's items
    repeated: int                               # rows that add nothing to another row about their item

    @property
    def judged_responses(self) -> list[Response]:
        """Of every item the response that the harness judged."""
        return [row.responses[row.judged] for row in self.rows]

    def check_complete(self) -> None:
        """ValueError where the log lacks an item of the task."""
        if self.missing:
            total = len(self.missing) + len(self.items)
            raise ValueError(f"{self.path} has no response for {len(self.missing)} of {total} items, first "
                             f"{shown(self.missing[0])}; let --limit or --data name what {self.harness} was given")

    def notes(self) -> list[str]:
        """What a reader has to know of the log, a sentence each."""
        notes = [f"{self.harness}'s log holds {len(self.items)} items of the task."]
        most = max(len(row.responses) for row in self.rows)
        if most > 1:
            notes.append(f"It holds up to {most} responses an item; scored is the one that {self.harness} judged "
                         "(gate.py --candidates reads them all).")
        if self.foreign:
            notes.append(f"{len(self.foreign)} of its rows are about no item of the task and are left out, first "
                         f"{shown(self.foreign[0])}.")
        if self.repeated:
            notes.append(f"{self.repeated} rows repeat responses of another row about their item, and count once.")
        failed = sum(row.failed for row in self.rows)
        if failed:
            notes.append(f"{failed} items were asked about in vain, says the log: they count as wrong.")
        if isinstance(self.items[0], Comparison):
            notes.append("Every pair was shown in one order alone, so nothing is known of consistency.")
        return notes


# ---- rows and items

def join(path: Path, harness: str, rows: Sequence[LogRow], items: Sequence[Item]) -> Log:
    """The log of these rows. Of two rows about an item the one with more responses counts, if it holds the other's,
    too: a harness may write a row for every filter.

    ValueError where an item has two rows with different responses, and where no row is about an item.
    """
    if not rows:
        raise ValueError(f"{path} holds no rows")
    found: dict[str, LogRow] = {}
    foreign = []
    for row, item in zip(rows, find_items(path, rows, items), strict=True):
        if item is None:
            foreign.append(row.name)
            continue
        before = found.setdefault(item.id, row)
        fewer, more = sorted((before, row), key=lambda each: len(each.responses))
        if not said(fewer) <= said(more):
            raise ValueError(f"{row.where}: a second row for item {shown(item.id)}, with other responses than "
                             f"{before.where}; give one run's log")
        found[item.id] = more if len(fewer.responses) < len(more.responses) else before
    if not found:
        raise ValueError(f"none of the {len(rows)} rows of {path} is about an item of the task, first "
                         f"{shown(foreign[0])}: is it the log of another task or split?")

    held = [as_shown(item) for item in items if item.id in found]
    missing = [item.id for item in items if item.id not in found]
    return Log(path, harness, held, [found[item.id] for item in held], missing, foreign,
               repeated=len(rows) - len(foreign) - len(held))


def said(row: LogRow) -> set[str]:
    """The texts of a row's responses."""
    return {response.text for response in row.responses}


def as_shown(item: Item) -> Item:
    """The item as a model saw it: both harnesses swap a pair of VL-RewardBench where its texts have an odd length."""
    if not isinstance(item, Comparison) or item.task != "vl_rewardbench":
        return item
    length = sum(len(response) for response in item.responses)
    return item.swap() if length % 2 == 1 else item


def find_items(path: Path, rows: Sequence[LogRow], items: Sequence[Item]) -> list[Item | None]:
    """The item that each row is about, None where it is none of these."""
    by_id = {item.id: item for item in items}
    by_pair: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        if isinstance(item, Comparison):
            by_pair.setdefault(item.responses, []).append(item)

    found: list[Item | None] = []
    for row in rows:
        names = [name for name in row.names if name in by_id]
        if names:
            found.append(by_id[names[0]])
        elif by_pair.get(row.pair):
            found.append(by_pair[row.pair].pop(0))      # of several equal pairs the next
        else:
            found.append(None)
    if any(row.names for row in rows) or found.count(None) < len(rows):
        return found

    indexed = [by_id.get(row.index) for row in rows]
    if indexed.count(None) < len(rows) and are_about(rows, indexed):
        return indexed
    return items_in_order(path, rows, items)


def are_about(rows: Sequence[LogRow], items: Sequence[Item | None]) -> bool:
    """Whether every row has the question and the answer of its item, where it has one."""
    for row, item in zip(rows, items, strict=True):
        if item is None:
            continue
        asks = bool(row.question) and squeezed(row.question) in squeezed(prompt_text(item))
        if not asks or not is_answer(item, row.target):
            return False
    return True


def squeezed(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def items_in_order(path: Path, rows: Sequence[LogRow], items: Sequence[Item]) -> list[Item | None]:
    """The items at the rows' numbers. ValueError where the log's answers are not those of these items."""
    members: dict[str, list[Item]] = {}                 # category -> its items
    places = Counter(row.category for row in rows if row.position is None)
    for category, count in places.items():
        members[category] = [item for item in items if not category or is_in_category(item, category)]
        if len(members[category]) != count:
            raise ValueError(f"{path} holds no ids of the task's items, and {count} rows of category {shown(category)} "
                             f"where the task has {len(members[category])}: their order does not tell which is which")

    found: list[Item | None] = []
    for row in rows:
        item = None
        if row.position is None:
            item = members[row.category].pop(0)
        elif row.position < len(items):
            item = items[row.position]
        if item is not None and not is_answer(item, row.target):
            raise ValueError(f"{path} holds no ids of the task's items, and its order is not theirs: {row.where} has "
                             f"the answer {shown(row.target)}, item {shown(item.id)} has {shown(item.answer)}")
        found.append(item)
    return found


def is_in_category(item: Item, category: str) -> bool:
    """Whether one of the groups that an item is reported in has that name, but for its spelling."""
    return any(isinstance(group, str) and bare(group) == bare(category) for group in item.group.values())


def bare(name: str) -> str:
    """A name's letters and digits."""
    return re.sub(r"[\W_]", "", name).lower()


def is_answer(item: Item, target: str) -> bool:
    """Whether a log's answer is the item's: its text, one of its texts, or the letter of its option."""
    if item.answer is None or isinstance(item, Comparison):
        return False
    answers = [item.answer] if isinstance(item.answer, str) else [*item.answer, str(item.answer)]
    for letter, choice in zip(LETTERS, item.choices or (), strict=False):
        if same(choice, answers[0]):
            answers += [letter, f"({letter})"]
    return any(same(answer, target) for answer in answers)


# ---- verdicts

class Scored(Protocol):
    """A response that exact match has scored: eval.Answer."""

    @property
    def correct(self) -> bool:
        """Was it right?"""

    @property
    def answer(self) -> str | None:
        """What was read, None where nothing was."""


def as_verdict(value: Any) -> bool | None:
    """Right or wrong, as harnesses write it: true, 1, 1.0, "1"; None for anything else."""
    return RIGHT_OR_WRONG.get(str(value).strip().lower())


def compare(log: Log, answers: Sequence[Scored]) -> dict[str, Any]:
    """How often exact match and the harness agree that items are right or wrong, and those on which they do not."""
    counts = {(ours, theirs): 0 for ours in (True, False) for theirs in (True, False, None)}
    differ = []
    for item, row, answer in zip(log.items, log.rows, answers, strict=True):
        counts[answer.correct, row.verdict] += 1
        if row.verdict is not None and row.verdict != answer.correct:
            differ.append({
                "id": item.id, "exact_match": answer.correct, "harness": row.verdict, "extracted": answer.answer,
                "harness_extracted": row.reading, "answer": item.answer})
    return {
        "name": log.harness,
        "both_right": counts[True, True],
        "only_exact_match": counts[True, False],
        "only_harness": counts[False, True],
        "both_wrong": counts[False, False],
        "no_verdict": counts[True, None] + counts[False, None],
        "not_in_task": len(log.foreign),
        "differ": differ,
    }


def verdict_table(compared: dict[str, Any]) -> str:
    """The 2 x 2 table for people, and a line for every item on which the two differ."""
    name = compared["name"]
    differ = compared["differ"]
    judged = sum(compared[key] for key in ("both_right", "only_exact_match", "only_harness", "both_wrong"))
    if judged == 0:
        return f"The log holds no verdict of {name} on these items: there is nothing to compare."

    lines = [
        f"{'':<22} {name + ': right':>20} {'wrong':>8}",
        f"{'exact match: right':<22} {compared['both_right']:>20} {compared['only_exact_match']:>8}",
        f"{'             wrong':<22} {compared['only_harness']:>20} {compared['both_wrong']:>8}"]
    if compared["no_verdict"]:
        lines.append(f"{compared['no_verdict']} items are not in this table: the log holds no verdict on them.")
    lines.append(f"They differ on {len(differ)} of {judged} items{':' if differ else '.'}")
    for entry in differ:
        side = "exact match" if entry["exact_match"] else name
        lines.append(f"  {shown(entry['id'])} is right by {side} alone; the answer is {shown(entry['answer'])}, exact "
                     f"match read {shown(entry['extracted'])}, {name} {shown(entry['harness_extracted'])}")
    return "\n".join(lines)
