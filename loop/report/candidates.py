"""Candidates as a page shows them: what pairs are made of, with scores and truth, the confidently wrong pairs first."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval import score as exact_match
from loop.report.page import Section
from loop.report.rows import Answered, Room, Row, cut, fill, picture_views, question_of, truth_of
from replay import margin, select_pair
from tasks import Item
from tasks.loading import read_json_object

Items = Mapping[str, Item]
WAY_TONES = {"right way": "good", "wrong way": "bad", "both sides wrong": "bad"}


@dataclass
class Candidates:
    """An item's candidates with their scores, and which two make its pair."""
    item_id: str
    texts: list[str]
    scores: list[float | None]
    where: str                                          # "round 2"
    correct: list[bool | None] = field(default_factory=list)    # by exact match, where it is known
    pair: tuple[int, int] | None = None                 # (chosen, rejected)
    has_texts: bool = True                              # records may hold none: a number stands for each

    @property
    def margin(self) -> float:
        """Of its pair; 0 where it was given without scores, as in replay.Pair."""
        chosen, rejected = (self.scores[index] for index in self.pair)
        return margin(chosen, rejected) if chosen is not None and rejected is not None else 0.0

    @property
    def sides(self) -> tuple[bool | None, bool | None]:
        """Whether the chosen and the rejected side are right."""
        chosen, rejected = self.pair
        return self.correct[chosen], self.correct[rejected]


# ---- reading them

def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none where there is no file. Half a line at its end is left out."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; an empty one where there is no file."""
    return read_json_object(path) if path.is_file() else {}


def read_candidates(folder: Path) -> list[Candidates]:
    """What the run's rounds made pairs of: all candidates of every item. A run that was given its pairs has only their
    two sides."""
    found = []
    for number in range(1, 1 + len(list(folder.glob("pairs/round-*.jsonl")))):
        where = f"round {number}"
        rows = read_rows(folder / "candidates" / f"round-{number}.jsonl")
        for row in rows:
            found.append(Candidates(row["item_id"], row["texts"], row["scores"], where))
        if not rows:
            for row in read_rows(folder / "pairs" / f"round-{number}.jsonl"):
                texts = [row["chosen_text"], row["rejected_text"]]
                scores = [row["chosen_score"], row["rejected_score"]]
                found.append(Candidates(row["item_id"], texts, scores, where, pair=(0, 1)))
    return found


def read_gate_candidates(folder: Path) -> list[Candidates]:
    """What the gate before training measured the verifier on."""
    return candidates_of_records(read_rows(folder / "gate_records.jsonl"), "gate")


def candidates_of_records(records: Sequence[Mapping[str, Any]], where: str) -> list[Candidates]:
    """The candidates of records, as replay.Record has them, item by item."""
    by_item: dict[str, Candidates] = {}
    for record in records:
        each = by_item.setdefault(record["item"], Candidates(record["item"], [], [], where))
        text = record.get("text")
        if text is None:
            each.has_texts = False
            text = str(len(each.texts))                 # as replay.label_pairs has it
        each.texts.append(text)
        each.scores.append(record["score"])
        each.correct.append(record["correct"])
    return list(by_item.values())


def paired(candidates: Sequence[Candidates], items: Items) -> list[Candidates]:
    """Those that give a pair, with it and with what exact match says of the candidates; the confidently wrong ones
    first: the chosen side is wrong, and the margin large."""
    found = []
    for each in candidates:
        outcome = each.pair or select_pair(each.item_id, each.texts, each.scores)
        if isinstance(outcome, str):                    # the reason why there is none
            continue
        each.pair = outcome
        if not each.correct:                            # of the pair's sides now, of the others where they are shown
            sides = correctness([each.texts[index] for index in outcome], items.get(each.item_id))
            each.correct = [None] * len(each.texts)
            for index, correct in zip(outcome, sides, strict=True):
                each.correct[index] = correct
        found.append(each)

    def order(each: Candidates) -> tuple[bool, float, bool]:
        chosen, rejected = each.sides
        return chosen is not False, -each.margin, rejected is not True
    return sorted(found, key=order)


def correctness(texts: Sequence[str], item: Item | None) -> list[bool | None]:
    """Which of an item's candidates are right; None where its answer is not known."""
    if item is None or item.answer is None:
        return [None] * len(texts)
    known: dict[str, bool] = {}                         # candidates repeat
    for text in texts:
        if text not in known:
            known[text] = exact_match(item, text).correct
    return [known[text] for text in texts]


# ---- showing them

def candidates_section(candidates: Sequence[Candidates], items: Items, room: Room, title: str,
                       place: str) -> Section | None:
    """The pairs of these candidates, the confidently wrong ones first."""
    pairs = paired(candidates, items)
    if not pairs:
        return None
    ways = [way(each) for each in pairs]
    counted = []
    for word in dict.fromkeys(ways):
        counted.append(f"{ways.count(word):,} {word}")
    words = (f"{len(candidates):,} items gave {len(pairs):,} pairs: {'; '.join(counted)}. The confidently wrong ones "
             "come first: the chosen side is wrong, and the margin large.")
    rows = fill(room, pairs, lambda each: candidates_row(each, items.get(each.item_id)), place)
    return Section(title, words, [rows])


def way(each: Candidates) -> str:
    """Which way a pair points."""
    chosen, rejected = each.sides
    if chosen is None or rejected is None:
        return "truth not known"
    if chosen:
        return "both sides right" if rejected else "right way"
    return "wrong way" if rejected else "both sides wrong"


def candidates_row(each: Candidates, item: Item | None) -> Row:
    """All candidates of an item, the best-scored first; equal ones are counted."""
    roles = dict(zip(each.pair, ("chosen", "rejected"), strict=True))
    all_correct = each.correct
    if None in all_correct:
        all_correct = correctness(each.texts, item)

    merged: dict[tuple[Any, ...], list[int]] = {}       # what is shown of a candidate -> the candidates that show it
    for index, text in enumerate(each.texts):
        merged.setdefault((text, each.scores[index], all_correct[index]), []).append(index)

    answers = []
    for (text, score, correct), indices in merged.items():
        marked = [roles[index] for index in indices if index in roles]
        shown = cut(text) if each.has_texts else f"(candidate {text}; the records hold no text)"
        answers.append(Answered(shown, correct=correct, score=score, scored=True, role=" ".join(marked),
                                count=len(indices)))
    answers.sort(key=lambda answer: (answer.score is None, -(answer.score or 0.0), answer.role != "chosen"))

    pictures, remark = picture_views(item)
    word = way(each)
    return Row(
        id=each.item_id,
        question=question_of(item),
        note=f"{word}, margin {each.margin:.2f}, {each.where}",
        tone=WAY_TONES.get(word, "plain"),
        answers=answers,
        truth=truth_of(item),
        pictures=pictures,
        remark=remark,
    )
