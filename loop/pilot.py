"""The pilot: what do a few DPO steps on this verifier's pairs do to the student's answers?

The gate's figures are about pairs, and training follows gradients: a verifier whose pairs look well can still teach
what nobody asked for, say a form or a favourite answer. So before round 1 the student takes --pilot-steps steps on the
pairs that the gate has scored already, answers other items of the train split greedily, and is put back bit for bit.
The verdict is BLOCK if accuracy or parse rate fell: exact McNemar, one-sided, paired with the answers before, 5 % each.

The verifier is asked nothing more, unless the gate's items gave fewer than LEAST_PAIRS pairs. Nothing of the run
changes: neither the weights, nor its optimiser, nor any draw of its own.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from time import perf_counter

from eval import Answer
from gate import ALPHA, mcnemar
from loop.asking import greedy_answers
from loop.optimise import make_optimiser
from loop.ranks import Interrupted, NonFinite
from loop.run import Run
from loop.served import Asked
from loop.shard import local
from model import VLM, Completion
from replay import Pair, ReplayBuffer, form_pairs
from tasks import Item
from tasks.splits import Splits, by_id, picture_groups
from verifier import Score

LEAST_PAIRS = 64                                        # with fewer, train items are sampled and scored as well,
MOST_ASKED = 512                                        # up to this many
LEAST_ITEMS = 20                                        # with fewer to answer, nothing is measured
DRAWS = 999                                             # the number that keeps the pilot's samples apart from rounds'


@dataclass(frozen=True)
class LoopSteps:
    """Steps of train.py's loop that the gate before it takes, too; each with the arguments it has there."""
    sample: Callable[..., list[list[Completion]]]
    score: Callable[..., list[list[Score]]]
    with_reference_logps: Callable[..., list[Pair]]
    train_step: Callable[..., dict[str, float]]


@dataclass(frozen=True)
class Scored:
    """Items, the candidates that the student gave to each, and the verifier's scores of these."""
    items: list[Item]
    candidates: list[list[Completion]]
    scores: list[list[Score]]

    def pairs(self, least_margin: float) -> list[Pair]:
        """The pairs that are made of them, of those margins that are trained on."""
        formed, _ = form_pairs([item.id for item in self.items], self.candidates, self.scores)
        return [pair for pair in formed if pair.margin >= least_margin]

    def __add__(self, other: Scored) -> Scored:
        return Scored(self.items + other.items, self.candidates + other.candidates, self.scores + other.scores)


@dataclass(frozen=True)
class Pilot:
    """What the pilot saw; None stands for what was not measured."""
    items: int                                          # that were answered before and after
    pairs: int                                          # that were trained on
    steps: int
    asked: int                                          # items that were sampled and scored for it alone
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    p_accuracy_fell: float | None = None
    parse_rate_before: float | None = None
    parse_rate_after: float | None = None
    p_parse_rate_fell: float | None = None
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Is it not shown that accuracy or parse rate fell?"""
        known = [p for p in (self.p_accuracy_fell, self.p_parse_rate_fell) if p is not None]
        return all(p > ALPHA for p in known)

    @property
    def reason(self) -> str:
        """What was seen, in words."""
        if self.p_accuracy_fell is None:
            return (f"pilot not measured: {self.items} items to answer ({LEAST_ITEMS} needed), {self.pairs} pairs to "
                    "train on")
        seen = (f"after {self.steps} steps on {self.pairs} pairs, accuracy on {self.items} other items went from "
                f"{self.accuracy_before:.3f} to {self.accuracy_after:.3f} (p that it fell {self.p_accuracy_fell:.2g}), "
                f"parse rate from {self.parse_rate_before:.3f} to {self.parse_rate_after:.3f} "
                f"(p {self.p_parse_rate_fell:.2g})")
        return f"pilot: {seen}" if self.holds else f"the pilot got worse: {seen}"


def run_pilot(run: Run, student: VLM, verifier: Asked, splits: Splits, scored: Scored, loop: LoopSteps) -> Pilot:
    """Train for --pilot-steps on the pairs of `scored`, compare greedy answers before and after, put the student back.

    Raises Interrupted after a signal, NonFinite if a loss is; the student is put back then, too.
    """
    cfg = run.cfg
    start = perf_counter()
    answered, others = draw_items(splits.train, cfg.pilot_items, cfg.seed)
    steps = min(cfg.pilot_steps, cfg.rounds * cfg.steps_per_round)      # no more than the run's own
    gate_items = len(scored.items)
    if len(answered) >= LEAST_ITEMS:
        scored = enough_pairs(run, student, verifier, scored, others, loop)

    pairs = scored.pairs(cfg.least_fresh_margin)
    pilot = Pilot(len(answered), len(pairs), steps, asked=len(scored.items) - gate_items)
    if len(answered) < LEAST_ITEMS or len(pairs) < cfg.min_pairs:
        return pilot

    items = by_id(scored.items)
    before = greedy_answers(run, student, answered, "pilot: before")
    pairs = loop.with_reference_logps(run, student, pairs, items)
    with put_back(student):
        take_steps(run, student, pairs, items, steps, loop)
        after = greedy_answers(run, student, answered, "pilot: after")

    seconds = perf_counter() - start
    run.say(f"pilot: {steps} steps, {seconds:.1f} s")
    return compared(pilot, before, after, round(seconds, 1))


def draw_items(train: Sequence[Item], count: int, seed: int) -> tuple[list[Item], list[Item]]:
    """Up to `count` items with an answer, and the items that share no picture with them, in an order of the seed's.

    No two of the first share a picture, so that their answers count as independent.
    """
    groups = picture_groups(train)
    rng = random.Random(f"pilot {seed}")
    answered = []
    others: list[Item] = []
    for group in rng.sample(groups, len(groups)):
        known = [item for item in group if item.answer is not None]
        if known and len(answered) < count:
            answered.append(known[0])
        else:
            others += group
    return answered, others


def enough_pairs(run: Run, student: VLM, verifier: Asked, scored: Scored, others: Sequence[Item],
                 loop: LoopSteps) -> Scored:
    """`scored`, with as many `others` sampled and scored as LEAST_PAIRS pairs take, at most MOST_ASKED."""
    cfg = run.cfg
    others = others[:MOST_ASKED]
    for first in range(0, len(others), LEAST_PAIRS):
        if len(scored.pairs(cfg.least_fresh_margin)) >= LEAST_PAIRS:
            break
        items = list(others[first:first + LEAST_PAIRS])
        candidates = loop.sample(run, student, items, DRAWS)
        scored += Scored(items, candidates, loop.score(run, verifier, items, candidates))
    return scored


def take_steps(run: Run, student: VLM, pairs: Sequence[Pair], items: dict[str, Item], steps: int,
               loop: LoopSteps) -> None:
    """DPO steps as the run's first ones, on these pairs alone, with an optimiser of their own."""
    cfg = run.cfg
    optimiser = make_optimiser(student, cfg.lr, cfg.weight_decay)
    passes = -(-steps * cfg.batch_size // len(pairs))                   # rounded up
    batches = ReplayBuffer(1, 1.0).batches(pairs, cfg.batch_size, 0.0, passes, steps, cfg.seed)
    try:
        for step, batch in enumerate(batches, 1):
            loop.train_step(run, student, optimiser, batch, items, step)
            if run.ranks.any(run.ranks.stop_requested):
                raise Interrupted
    except NonFinite:
        raise NonFinite(f"step {step} of the pilot: the loss or its gradient is NaN or infinite; nothing was trained "
                        "yet (--pilot-steps 0 leaves the pilot out)") from None


@contextmanager
def put_back(vlm: VLM) -> Iterator[None]:
    """Inside, the model may be trained; however the block is left, its trained weights are as before, bit for bit.

    They are kept on the CPU meanwhile, of a shared-out model this rank's parts. What else a model remembers does not
    depend on them: its feature cache is of a frozen tower, and what sampling packs of a trained model is let go when a
    call ends.
    """
    trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    kept = [local(parameter).to("cpu", copy=True) for parameter in trained]
    try:
        yield
    finally:
        for parameter, values in zip(trained, kept, strict=True):
            local(parameter).copy_(values)


def compared(pilot: Pilot, before: Sequence[Answer], after: Sequence[Answer], seconds: float) -> Pilot:
    """The pilot with what the answers before and after it show."""
    right_before = [answer.correct for answer in before]
    right_after = [answer.correct for answer in after]
    read_before = [answer.answer is not None for answer in before]
    read_after = [answer.answer is not None for answer in after]
    return replace(
        pilot,
        accuracy_before=fmean(right_before),
        accuracy_after=fmean(right_after),
        p_accuracy_fell=mcnemar(right_before, right_after, fell=True),
        parse_rate_before=fmean(read_before),
        parse_rate_after=fmean(read_after),
        p_parse_rate_fell=mcnemar(read_before, read_after, fell=True),
        seconds=seconds,
    )
