"""Figures of a round's pairs, for the log and summary.json alone: nothing that trains depends on them."""
from __future__ import annotations

from collections.abc import Sequence

from model import Completion
from replay import Pair
from verifier import Score


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
