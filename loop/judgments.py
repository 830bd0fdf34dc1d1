"""A judge's judgments of pairs: how they are asked for, and which of them are trained on.

    judgments    what the judge says of a pair, in its own words, with each response shown first once
    filter       a pair's judgments are kept if both agree with it: naming the same place twice is no preference
    balance      as many examples with the better response first as second, so that the place teaches nothing

After "Self-Improving VLM Judges Without Human Annotations" (arXiv 2512.05145).
"""
from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loop.synthetic_pairs import SyntheticPair
from model import Completion
from model.processor import Chat
from verifier import comparison_chat, parse_preference


@dataclass(frozen=True)
class Judgment:
    """A judge's words on a pair in one order."""
    item_id: str
    first: str                              # the responses in the order they were shown
    second: str
    side: int                               # the place of the better response, 1 or 2
    verdict: int | None                     # the place that the judge prefers, None where it cannot be read
    token_ids: tuple[int, ...]              # of `text`, as sampled: they are what is trained on
    text: str
    truncated: bool = False

    @property
    def agrees(self) -> bool:
        """Whether the judge prefers the better response and was not cut off."""
        return self.verdict == self.side and not self.truncated


BothOrders = tuple[Judgment, Judgment]      # of one pair: the better response shown first, and second


def judge_pairs(answer: Callable[[list[Chat]], Sequence[Completion]], chats: list[Chat],
                pairs: Sequence[SyntheticPair]) -> list[BothOrders]:
    """The judge's words on each pair in both orders.

    `answer(chats)` returns one completion a chat; `chats` holds the question of each pair.
    """
    prompts = []
    for chat, pair in zip(chats, pairs, strict=True):
        prompts.append(comparison_chat(chat, pair.better, pair.worse))
        prompts.append(comparison_chat(chat, pair.worse, pair.better))

    completions = answer(prompts)
    judged = []
    for pair, better_first, worse_first in zip(pairs, completions[::2], completions[1::2], strict=True):
        judged.append((read_judgment(pair, 1, better_first), read_judgment(pair, 2, worse_first)))
    return judged


def read_judgment(pair: SyntheticPair, side: int, completion: Completion) -> Judgment:
    """What the judge said of `pair` when its better response was shown in place `side`."""
    first, second = pair.better, pair.worse
    if side == 2:
        first, second = second, first
    return Judgment(
        item_id=pair.item_id,
        first=first,
        second=second,
        side=side,
        verdict=parse_preference(completion.text),
        token_ids=tuple(completion.token_ids),
        text=completion.text,
        truncated=completion.finish_reason == "length",
    )


def kept_judgments(judged: Iterable[BothOrders], both_orders: bool = True) -> list[Judgment]:
    """The judgments that agree with their pair: both or none of a pair, or, without `both_orders`, each by itself."""
    kept = []
    for first, second in judged:
        if both_orders and not (first.agrees and second.agrees):
            continue
        kept += [judgment for judgment in (first, second) if judgment.agrees]
    return kept


def balanced(judgments: Sequence[Judgment], seed: int, most: int = sys.maxsize) -> list[Judgment]:
    """As many judgments with the better response first as second, at most `most` together, in their order.

    Of the side that has more some are drawn.
    """
    numbers: dict[int, list[int]] = {1: [], 2: []}      # the better response's place -> numbers of judgments
    for number, judgment in enumerate(judgments):
        numbers[judgment.side].append(number)
    count = min(len(numbers[1]), len(numbers[2]), most // 2)

    rng = random.Random(seed)
    drawn = rng.sample(numbers[1], count)
    drawn += rng.sample(numbers[2], count)
    return [judgments[number] for number in sorted(drawn)]


def shuffled_batches(examples: Sequence[Judgment], epochs: int, size: int, seed: int) -> list[list[Judgment]]:
    """Batches of `size` over `epochs` passes, each in another order; the same again for the same seed."""
    rng = random.Random(seed)
    order: list[Judgment] = []
    for _ in range(epochs):
        order += rng.sample(examples, len(examples))

    batches = []
    for start in range(0, len(order), size):
        batches.append(order[start:start + size])
    return batches
