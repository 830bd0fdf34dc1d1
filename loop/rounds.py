"""What a run's log says about the pairs of a round."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import score as exact_match
from gate import proportion
from replay import Pair
from tasks import Item


def pair_directions(pairs: Sequence[Pair], items: Sequence[Item]) -> dict[str, Any]:
    """How many pairs are mixed (exactly one side right), how many of these point the right way, and their share q.

    Pairs of items without an answer are left out. This reads labels, so it is for the log alone: nothing that trains
    may depend on it.
    """
    answered = {item.id: item for item in items if item.answer is not None}
    mixed = 0
    right_way = 0                                       # mixed pairs whose chosen side is the right one
    for pair in pairs:
        if pair.item_id not in answered:
            continue
        item = answered[pair.item_id]
        chosen_right = exact_match(item, pair.chosen_text).correct
        rejected_right = exact_match(item, pair.rejected_text).correct
        if chosen_right != rejected_right:
            mixed += 1
            if chosen_right:
                right_way += 1
    return {"mixed": mixed, "right_way": right_way, "direction": proportion(right_way, mixed)}
