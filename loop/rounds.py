"""A round: the items that it takes, and the figures and files of its pairs, on which nothing that trains depends."""
from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

from eval import score as exact_match
from gate import proportion
from loop.pair_files import write_pairs
from loop.run import Run
from model import Completion
from replay import LabelledPair, Pair, count_directions
from tasks import Item
from verifier import Score


class RoundFlags(Protocol):
    """The flags that a round's items depend on."""
    seed: int
    items_per_round: int


def round_items(cfg: RoundFlags, train: Sequence[Item], number: int) -> list[Item]:
    """The items of round `number`, counted from 0.

    Rounds take one slice after another of the shuffled train split, and start over at its end.
    """
    total = len(train)
    shuffled = random.Random(cfg.seed).sample(train, total)
    count = min(cfg.items_per_round, total)
    first = number * count
    return [shuffled[place % total] for place in range(first, first + count)]


def count_round(pairs: Sequence[Pair], refused: dict[str, int], candidates: Sequence[Sequence[Completion]],
                scores: Sequence[Sequence[Score]], min_margin: float) -> dict[str, int]:
    """How many items gave a pair, and why the others gave none; how many pairs reach the margin gate, how many
    verdicts could not be read, how many candidates were cut off."""
    all_scores = [score for row in scores for score in row]
    all_candidates = [completion for row in candidates for completion in row]
    return {
        "items": len(candidates),
        "pairs": len(pairs),
        **refused,
        "above_margin": sum(pair.margin >= min_margin for pair in pairs),
        "verdicts_unparsed": sum(score.value is None for score in all_scores),
        "candidates_truncated": sum(completion.finish_reason == "length" for completion in all_candidates),
    }


def write_candidates(run: Run, number: int, items: Sequence[Item], candidates: Sequence[Sequence[Completion]],
                     scores: Sequence[Sequence[Score]]) -> None:
    """Write all candidates of the round with their scores, one item a line, to candidates/round-NUMBER.jsonl."""
    rows = []
    for item, completions, verdicts in zip(items, candidates, scores, strict=True):
        texts = [completion.text for completion in completions]
        rows.append({"item_id": item.id, "texts": texts, "scores": [verdict.value for verdict in verdicts]})
    run.write_lines(f"candidates/round-{number}.jsonl", rows)


def write_round(run: Run, number: int, pairs: Sequence[Pair], items: Sequence[Item], counts: dict[str, int],
                skipped: bool) -> None:
    """Write the round's pairs to pairs/round-NUMBER.jsonl, and say its counts."""
    write_pairs(run, number, pairs, items)
    listed = ", ".join(f"{what} {count}" for what, count in counts.items())
    ending = "; skipped" if skipped else ""
    run.say(f"round {number}: {listed}{ending}")


def pair_directions(pairs: Sequence[Pair], items: Sequence[Item]) -> dict[str, Any]:
    """How many pairs are mixed (exactly one side right), how many of these point the right way, and their share q.

    Pairs of items without an answer are left out. This reads labels, so it is for the log alone: nothing that trains
    may depend on it.
    """
    counts = count_directions(labelled_pairs(pairs, items), tau=0.0)
    return {
        "mixed": counts.mixed,
        "right_way": counts.right_way,
        "direction": proportion(counts.right_way, counts.mixed),
    }


def labelled_pairs(pairs: Sequence[Pair], items: Sequence[Item]) -> list[LabelledPair]:
    """The pairs of items with an answer, each side with what exact match says of it and whether one was found in it."""
    answered = {item.id: item for item in items if item.answer is not None}
    labelled = []
    for pair in pairs:
        if pair.item_id in answered:
            item = answered[pair.item_id]
            sides = [grade(item, text) for text in (pair.chosen_text, pair.rejected_text)]
            labelled.append(LabelledPair(pair.item_id, pair.margin, *sides))
    return labelled


def grade(item: Item, text: str) -> dict[str, bool]:
    """An answer as replay.Record has it."""
    match = exact_match(item, text)
    return {"correct": match.correct, "candidate_parsed": match.answer is not None}
