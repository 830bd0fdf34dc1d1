"""train.py --pairs FILE: DPO on preference pairs that exist. Nothing is sampled, and no verifier is asked.

    python train.py --pairs pairs.jsonl --task jsonl --data mine.jsonl --out runs/mine
    python train.py --pairs pairs.jsonl --no-evaluate --out runs/mine

Loss, watching and the gate after training are those of any run. There is no gate before it, since there is no verifier
to measure: pre_gate is null in summary.json. A round takes the next --items-per-round pairs, and starts over at the
file's end. The task's items are watched and held out; those that share an id or a picture with a pair are left out.
With --no-evaluate nothing is measured, so nothing is deployed: the trained student is left in candidate/.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.gate_flags import GateFlags
from loop.lengths import Use, answer_uses, fitting
from loop.loading import processor_alone
from loop.report.training import leave_training_page
from loop.rounds import write_round
from loop.run import Run
from loop.state import State
from model import VLM
from model.checkpoint import files_digest
from model.processor import Processor
from replay import Pair
from tasks import Item
from tasks.endings import is_first_process, say
from tasks.flags import flag
from tasks.preferences import Preference, load_preferences, preference_files
from tasks.splits import Splits, split_items


@dataclass(frozen=True)
class PairFlags(GateFlags):
    """The flags of train.py that are about pairs which exist."""
    pairs: str | None = flag(None, "train on the preference pairs of this file: nothing is sampled or scored")
    evaluate: bool = flag(True, "--no-evaluate, with --pairs: nothing is watched or held out, and nothing deployed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs is None:
            if not self.evaluate:
                raise ValueError("--no-evaluate has no meaning without --pairs")
            return

        if self.evaluate and self.task is None:
            raise ValueError("--pairs needs --task, whose items are watched and held out, or --no-evaluate, which "
                             "deploys nothing")
        if not self.evaluate and self.task is not None:
            raise ValueError(f"--task {self.task} has no meaning with --no-evaluate: nothing is asked")
        if self.force:
            raise ValueError("--force has no meaning with --pairs: there is no gate before them")
        if self.probe_items:
            raise ValueError("--probe-items has no meaning with --pairs: no verifier is asked")
        if self.train_split:
            raise ValueError("--train-split has no meaning with --pairs, which are what is trained on")

    @property
    def is_demo(self) -> bool:
        """Nothing says what to train on."""
        return self.task is None and self.pairs is None


# ---- before the loop

def load_splits(cfg: Any, load_task: Callable[..., Sequence[Item]]) -> Splits:
    """The pairs as what is trained on; of the task the items that are watched and held out, none with --no-evaluate.

    `load_task` is eval.py's. ValueError for a pair that cannot be used, or is too long.
    """
    processor, positions = processor_alone(cfg.student, cfg.min_pixels, cfg.max_pixels)
    pairs = load_preferences(cfg.pairs)
    pairs = fitting(pairs, lambda pair: pair_uses(cfg, processor, positions, pair), cfg.skip_long)
    say_reach(cfg, len(pairs))
    if not cfg.evaluate:
        return Splits(gate=[], watch=[], held_out=[], train=list(pairs))

    items = fitting(load_task(cfg.task, cfg.data, cfg.split), answer_uses(cfg.student, cfg), cfg.skip_long)
    left = without_pairs(items, pairs)
    if len(left) < len(items) and is_first_process():
        say(f"{len(items) - len(left)} of {len(items)} items of {cfg.task} share an id or a picture with the pairs: "
            "they are neither watched nor held out")
    return split_items(left, 0, cfg.watch_items, cfg.held_out_items, cfg.seed, pairs)


def pair_uses(cfg: Any, processor: Processor, positions: int | None, pair: Preference) -> list[Use]:
    """How much room a pair's prompt has: --max-prompt-tokens, and what the model's positions leave beside the longer
    answer. ValueError where both answers are the same tokens."""
    chosen = answer_tokens(processor, pair.chosen)
    rejected = answer_tokens(processor, pair.rejected)
    if chosen == rejected:
        raise ValueError(f"{pair.place}: chosen and rejected are the same tokens, though not the same text")

    uses = []
    if cfg.max_prompt_tokens:
        uses.append(Use(cfg.student, processor, lambda chat: chat, 0, 0, cfg.max_prompt_tokens))
    if positions is not None:
        longer = max(len(chosen), len(rejected))
        uses.append(Use(cfg.student, processor, lambda chat: chat, 1, longer, positions))
    return uses


def answer_tokens(processor: Processor, text: str) -> tuple[int, ...]:
    """An answer's text as the assistant's turn: its tokens, and the one that ends the turn."""
    return (*processor.encode(text), processor.turn_end_id)


def say_reach(cfg: Any, total: int) -> None:
    """Say so where the rounds do not come to all pairs."""
    reached = cfg.rounds * cfg.items_per_round
    if reached < total and is_first_process():
        rounds = -(-total // cfg.items_per_round)                           # rounded up
        say(f"{cfg.rounds} rounds of {cfg.items_per_round} come to {reached} of {total} pairs; --rounds {rounds} comes "
            "to all")


def without_pairs(items: Sequence[Item], pairs: Sequence[Preference]) -> list[Item]:
    """The items that share neither an id nor a picture with a pair.

    A picture that a run has written is named by the digest of the file it came in, which may have been no PNG: the name
    counts as well.
    """
    ids: set[str | None] = set()
    pictures: set[str] = set()
    for pair in pairs:
        ids |= {pair.id, pair.source_id}
        pictures |= pair.picture_hashes
        pictures |= {image.stem for image in pair.images if isinstance(image, Path)}
    return [item for item in items if item.id not in ids and pictures.isdisjoint(item.picture_hashes)]


def digest(path: str) -> str:
    """A hash of the files of pairs: what says which answer is better, where it is no verifier."""
    return files_digest(preference_files(path))


# ---- a round, the end

def take(run: Run, student: VLM, items: Sequence[Preference], number: int) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs of round `number`, counted from 1, and their counts, as train.make_pairs returns those it forms."""
    pairs = [as_pair(student.processor, item) for item in items]
    counts = {
        "items": len(items),
        "pairs": len(pairs),
        "unscored": sum(pair.chosen_score is None for pair in pairs),
        "above_margin": sum(pair.margin >= run.cfg.min_margin for pair in pairs),
    }
    write_round(run, number, pairs, items, counts, skipped=False)
    return pairs, {"round": number, **counts, "skipped": False}


def as_pair(processor: Processor, item: Preference) -> Pair:
    """A row of the file as the loop has its pairs; the texts are tokenised here."""
    chosen_score, rejected_score = item.scores or (None, None)
    return Pair(
        item_id=item.id,
        chosen=answer_tokens(processor, item.chosen),
        rejected=answer_tokens(processor, item.rejected),
        chosen_score=chosen_score,
        rejected_score=rejected_score,
        chosen_text=item.chosen,
        rejected_text=item.rejected,
    )


def finish(run: Run, state: State, splits: Splits, student: VLM) -> int:
    """The end of a run with --no-evaluate: the trained student in candidate/, summary.json, a page; the exit status."""
    candidate = run.save_candidate(student)
    run.write("summary.json", state.summary(run.cfg.task, None))
    run.say(f"nothing was measured (--no-evaluate), so nothing is deployed; the trained student is in {candidate}")
    if run.ranks.first:
        leave_training_page(run.folder, splits)
    return 0
