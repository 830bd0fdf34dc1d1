"""Verifier-guided DPO with both gates: does this verifier understand this task, and did the
student improve? ("When Good Verifiers Go Bad", arXiv 2606.14629)

    python train.py                                 the demo: one task works, one fails silently
    python train.py --task bar --out runs/bar       one run on the tiny models that are shipped
    python train.py --pairs FILE --task bar         DPO on preference pairs that exist
    torchrun --nproc-per-node 8 train.py --task mathvista --data DIR --out DIR \\
        --student Qwen/Qwen3-VL-2B-Instruct --verifier Qwen/Qwen3-VL-8B-Instruct \\
        --lr 1e-6 --max-new-tokens 512 --verdict-tokens 64

A round samples K candidates for each item from the student. The frozen verifier scores them, and
the best- and the worst-scored candidate become a preference pair. DPO updates the student on these
pairs, against the student as it was at the start. Pairs with a large margin are replayed. Before
round 1 the gate tries a few steps on its own pairs and undoes them again (loop/pilot.py).
Labels are read by the gates, the watch split and the log, never by anything that trains.

Exit status: 0 promoted; 3 a gate said no, or --stop-on-regression stopped; 2 what the caller can
mend (a flag, or what it names); 1 anything else, Ctrl-C and SIGTERM included. Every draw is seeded
by (--seed, round, what is drawn), so on a CPU a resumed run repeats the whole one bit for bit.

Letters in shape comments: B pairs.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":                          # Ctrl-C while torch is imported: one line
    from tasks.endings import end_on_signals, exit_with
    end_on_signals("interrupted before the run began")

import torch
from torch import Tensor

from dpo import LOSS_TYPES, METRICS, pair_objective
from eval import load_task
from loop import demo, existing_pairs
from loop.asking import begin_pictures, greedy_answers, verdicts
from loop.disk import check_disk
from loop.endpoint import is_served
from loop.gates import deploy_gate, gate_before
from loop.lengths import answer_uses, fitting, verifier_uses
from loop.opening import failed_requests, open_scorer
from loop.optimise import load_trainable, make_optimiser, optimiser_step
from loop.pair_files import complete_pairs
from loop.pilot import LoopSteps
from loop.probe import probe
from loop.ranks import Interrupted, Ranks, exit_status
from loop.reference import pair_logps, row_tokens, with_reference_logps
from loop.report.training import leave_training_page
from loop.rounds import count_round, pair_directions, round_items, write_candidates, write_round
from loop.run import Run
from loop.served import Asked
from loop.speed import StepClock
from loop.state import State, restore, save
from loop.survey import draw_items
from loop.watch import evaluate_watch, regression_warnings, watch_metrics
from model import VLM, Completion
from model.checkpoint import folder_digest
from replay import Pair, ReplayBuffer, form_pairs
from tasks import Item
from tasks.flags import RequestFlags, flag, parse_flags
from tasks.splits import Splits, split_items
from verifier import VERDICTS, Score

TINY = Path(__file__).parent / "model" / "tiny"


@dataclass(frozen=True)
class Config(existing_pairs.PairFlags, RequestFlags):
    """What a run depends on, with the flags of loop/flags.py, gate_flags.py and existing_pairs.py.

    The defaults suit the tiny models.
    """
    # What
    split: str | None = flag(None, "split that all items are cut from (default: the task's own)")
    student: str = flag(str(TINY / "student"), "folder or hub id of the model that is trained")
    verifier: str = flag(str(TINY / "verifier"),
                         "frozen scorer: a folder, a hub id, or http://HOST:PORT/v1#NAME")
    shard_verifier: bool = flag(False, "share out the verifier over ranks while it is not asked")
    out: str | None = flag(None, "folder of the run (default runs/TASK, for the demo runs/demo)")

    # Sampling and scoring
    rounds: int = flag(3, "rounds of sampling, then training", low=1)
    items_per_round: int = flag(512, "fresh items a round", low=1)
    k: int = flag(8, "candidates sampled for an item", low=2)
    temperature: float = flag(1.0, "sampling temperature of the candidates", low=1e-3, high=1e3)
    top_p: float = flag(0.9, "nucleus of the candidates, 1: all tokens", low=1e-3, high=1)
    max_new_tokens: int = flag(16, "longest answer of the student, in tokens", low=1)
    verdict: str = flag("json", "json: a generated score; logits: the expected score, not decoded; "
                                "pairwise: comparisons won", choices=tuple(VERDICTS))
    sample_batch: int = flag(64, "items sampled, and prompts scored, together", low=1)

    # Pairs and replay
    min_margin: float = flag(0.5, "margin gate (tau): least margin to be replayed", low=0, high=1)
    margin_gates: str = flag("replay", "what tau gates: a round's fresh pairs, the replay, or both",
                             choices=("fresh", "replay", "both"))
    capacity: int = flag(2048, "pairs the replay buffer holds, first in, first out", low=1)
    replay_ratio: float = flag(0.5, "share of a batch from the buffer (rho)", low=0, high=0.99)
    replay: bool = flag(True, "replay high-margin pairs (--no-replay: fresh pairs only)")
    min_pairs: int = flag(8, "a round with fewer fresh pairs is skipped", low=1)

    # DPO
    beta: float = flag(0.1, "strength of the pull to the reference", low=1e-6)
    loss_type: str = flag("sigmoid", "DPO loss", choices=LOSS_TYPES)
    label_smoothing: float = flag(0.0, "assumed share of flipped pairs", low=0, high=0.5)
    length_normalised: bool = flag(False, "divide log-probabilities by the completion's length")
    nll_coefficient: float = flag(0.0, "weight of the chosen side's negative log-likelihood", low=0)

    # Optimisation and evaluation
    lr: float = flag(3e-5, "peak learning rate; 1e-6 suits a published checkpoint", low=0, high=1)
    batch_size: int = flag(32, "pairs a step, over all ranks, replayed ones included", low=1)
    epochs: int = flag(3, "passes over a round's fresh pairs", low=1)
    steps_per_round: int = flag(60, "most steps a round", low=1)
    eval_every: int = flag(10, "steps between evaluations on the watch split", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.force and self.task is None:
            raise ValueError("--force has no meaning without --task")
        if self.pairs and is_served(self.verifier):
            raise ValueError("--verifier has no meaning with --pairs: no verifier is asked")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError(f"--label-smoothing {self.label_smoothing} has no meaning with "
                             "--loss-type ipo")

    @property
    def least_fresh_margin(self) -> float:
        """Pairs of a smaller margin are not trained on in the round that they are made in."""
        return self.min_margin if self.margin_gates in ("fresh", "both") else 0.0

    @property
    def least_replayed_margin(self) -> float:
        """Pairs of a smaller margin do not enter the replay buffer."""
        return self.min_margin if self.margin_gates in ("replay", "both") else 0.0

    @property
    def least_margin(self) -> float:
        """Pairs of a smaller margin are not trained on at all."""
        if not self.replay:
            return self.least_fresh_margin
        return min(self.least_fresh_margin, self.least_replayed_margin)

    @property
    def evaluations(self) -> int:
        """Evaluations on the watch split that are planned: on schedule and at each round's end."""
        steps = self.rounds * self.steps_per_round
        return self.rounds + steps // self.eval_every


def main(cfg: Config, ranks: Ranks) -> int:
    """One run: gate -> [sample -> score -> pair -> replay -> DPO] -> gate. The exit status."""
    run = Run(cfg, ranks)
    if run.has_ended:                               # --resume of a run that is finished
        return run.end_again()
    splits = load_splits(cfg)                       # gate, watch, held_out, train: disjoint
    student, verifier = load_models(run)            # trained, frozen
    optimiser = make_optimiser(student, cfg.lr, cfg.weight_decay)
    replay = ReplayBuffer(cfg.capacity, cfg.least_replayed_margin)
    state = restore(run, student, optimiser, replay)

    # Some items of round 1 are asked about before and after: did training reach even these?
    first_round = round_items(cfg, splits.train, 0)
    reviewed = draw_items(first_round, cfg.trained_on_items, cfg.seed)

    loop = LoopSteps(sample, score, with_reference_logps, train_step)       # for pilot and probes
    if state.pre_gate is None and not cfg.pairs:
        state.pre_gate = gate_before(run, student, verifier, splits, loop)
        if state.pre_gate["verdict"] == "BLOCK" and not cfg.force:
            return finish(run, state, splits, None)                     # exit 3, nothing trained
    if state.frozen_held_out is None:
        state.frozen_held_out = greedy_answers(run, student, splits.held_out, "frozen, held out")
        state.frozen_reviewed = greedy_answers(run, student, reviewed, "frozen, trained on")
        watched = evaluate_watch(run, student, splits.watch)
        state.frozen_watched = [answer.correct for answer in watched]
        run.log({"step": 0, **watch_metrics(watched)})
        save(run, state, student, optimiser, replay)

    if cfg.stops_on_regression and state.warnings:                      # a resumed run had stopped
        return finish(run, state, splits, state.regression)

    while state.round < cfg.rounds:
        if state.fresh is None:
            if state.round > 0 and cfg.probe_items:
                probe(run, student, verifier, splits.gate, state, loop)
                if cfg.stops_on_regression and state.warnings:
                    return finish(run, state, splits, state.regression)
            items = round_items(cfg, splits.train, state.round)
            if cfg.pairs:
                pairs, counts = existing_pairs.take(run, student, items, state.round + 1)
            else:
                candidates = sample(run, student, items, state.round + 1)   # K an item, ids kept
                scores = score(run, verifier, items, candidates)            # [0, 1] or None
                pairs, counts = make_pairs(run, items, candidates, scores, state.round + 1)
            counts |= pair_directions(pairs, items)                     # reads labels, for the log
            state.rounds.append(counts)
            state.fresh = with_reference_logps(run, student, pairs, splits.by_id)
            complete_pairs(run, state.round + 1, state.fresh, items)    # on disk
            replay.add(state.fresh)                                     # where tau lets them
            save(run, state, student, optimiser, replay)

        batches = round_batches(cfg, replay, state)     # none where the round was skipped
        for pairs in batches[state.position:]:
            state.step += 1
            state.position += 1
            clock = StepClock(ranks)
            metrics = train_step(run, student, optimiser, pairs, splits.by_id, state.step)
            state.losses.append(metrics["loss"])
            row = {"step": state.step, "round": state.round + 1, **metrics, "pairs": len(pairs)}
            row |= clock.figures(sum(pair.row_tokens for pair in pairs), pairs=len(pairs))

            last = state.position == len(batches)
            if last or state.step % cfg.eval_every == 0:
                watched = evaluate_watch(run, student, splits.watch)    # what the loss hides
                row |= watch_metrics(watched)
                state.looks += 1
                state.warnings += regression_warnings(run, state, watched, cfg.evaluations)
            run.log(row)

            interrupted = ranks.any(ranks.stop_requested)
            regressed = cfg.stops_on_regression and bool(state.warnings)
            if interrupted or regressed or last or state.step % cfg.save_every == 0:
                save(run, state, student, optimiser, replay)
            if interrupted:
                raise Interrupted
            if regressed:
                return finish(run, state, splits, state.regression)

        state.round += 1
        state.position = 0
        state.fresh = None

    if not cfg.evaluate:
        return existing_pairs.finish(run, state, splits, student)       # no gate, no deploy/
    post_gate = deploy_gate(run, student, verifier, splits, reviewed, state)
    return finish(run, state, splits, post_gate)                        # deploy/ on PROMOTE


# ---- before the loop

def load_splits(cfg: Config) -> Splits:
    """Items of the task, of those that fit, in splits that share neither an id nor a picture."""
    if cfg.pairs:
        return existing_pairs.load_splits(cfg, load_task)
    uses = answer_uses(cfg.student, cfg) + verifier_uses(cfg.verifier, cfg, cfg.verdict)
    items = fitting(load_task(cfg.task, cfg.data, cfg.split), uses, cfg.skip_long)
    train = None
    if cfg.train_split:
        train = fitting(load_task(cfg.task, cfg.data, cfg.train_split), uses, cfg.skip_long)
    return split_items(
        items, cfg.gate_items, cfg.watch_items, cfg.held_out_items, cfg.seed, train)


def load_models(run: Run) -> tuple[VLM, Asked | None]:
    """The student, which is trained, and the frozen verifier, if any. Opens the run's folder."""
    cfg = run.cfg
    device = run.ranks.device
    student = load_trainable(cfg.student, cfg, device)
    verifier, scorer = open_scorer(run, student.dtype)
    check_disk(run, student, deployed_copies=1)
    run.start(dtype=str(student.dtype).removeprefix("torch."),
              reference=folder_digest(student.folder), scorer=scorer)
    return student, verifier


# ---- the loop's steps: sample, score, pair

def sample(run: Run, student: VLM, items: Sequence[Item], number: int) -> list[list[Completion]]:
    """K completions an item, y_1 .. y_K ~ pi(. | x).

    `number` (the round's, counted from 1; 0 for the gate) keeps the draws of rounds apart.
    """
    cfg = run.cfg
    seed = cfg.seed * 1000 + number
    return run.ask(student, items, "sampling",
                   n=cfg.k, temperature=cfg.temperature, top_p=cfg.top_p, seed=seed)


def score(run: Run, verifier: Asked, items: Sequence[Item],
          candidates: Sequence[Sequence[Completion]]) -> list[list[Score]]:
    """The verifier's verdict s_k on every candidate of every item; no item's answer is read."""
    texts = [[completion.text for completion in row] for row in candidates]
    return verdicts(run, verifier, items, texts, run.cfg.verdict)


def make_pairs(run: Run, items: Sequence[Item], candidates: Sequence[Sequence[Completion]],
               scores: Sequence[Sequence[Score]], number: int) -> tuple[list[Pair], dict[str, Any]]:
    """Best- and worst-scored candidate of every item, and the counts of round `number`.

    What was refused is counted by reason. Fewer than --min-pairs pairs are none at all.
    """
    pairs, refused = form_pairs([item.id for item in items], candidates, scores)
    counts = count_round(pairs, refused, candidates, scores, run.cfg.min_margin)
    skipped = len(fresh_pairs(run.cfg, pairs)) < run.cfg.min_pairs

    write_candidates(run, number, items, candidates, scores)
    write_round(run, number, pairs, items, counts, skipped)
    if skipped:
        pairs = []
    return pairs, {"round": number, **counts, "skipped": skipped}


# ---- the loop's steps: replay, DPO

def fresh_pairs(cfg: Config, pairs: Sequence[Pair]) -> list[Pair]:
    """Those of a round's pairs that are trained on in this round: all, unless tau gates them."""
    return [pair for pair in pairs if pair.margin >= cfg.least_fresh_margin]


def round_batches(cfg: Config, replay: ReplayBuffer, state: State) -> list[list[Pair]]:
    """The batches of the current round; a resumed run draws the same ones."""
    ratio = cfg.replay_ratio if cfg.replay else 0.0
    seed = cfg.seed * 1000 + state.round
    fresh = fresh_pairs(cfg, state.fresh)
    return replay.batches(fresh, cfg.batch_size, ratio, cfg.epochs, cfg.steps_per_round, seed)


def train_step(run: Run, student: VLM, optimiser: torch.optim.Optimizer, pairs: Sequence[Pair],
               by_id: dict[str, Item], step: int) -> dict[str, float]:
    """One DPO step, number `step` from 1; its metrics. Raises NonFinite with nothing updated."""
    cfg = run.cfg

    def loss(part: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        return pair_losses(cfg, student, part, by_id)

    # Ranks take every world-th pair, so in this order each has as many long rows as another.
    pairs = sorted(pairs, key=row_tokens)
    planned = cfg.rounds * cfg.steps_per_round
    mine = pairs[run.ranks.rank::run.ranks.world]               # as optimiser_step shares them out
    begin_pictures(student, [by_id[pair.item_id] for pair in mine])     # if features are gone
    return optimiser_step(run, student, optimiser, pairs, row_tokens, loss, METRICS, step, planned)


def pair_losses(cfg: Config, student: VLM, pairs: Sequence[Pair],
                by_id: dict[str, Item]) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses that are trained on, (B,), and every pair's metrics by name, (B,) each."""
    rows, chosen, rejected = pair_logps(student, pairs, by_id)
    if rows.keys != [pair.reference_key for pair in pairs]:
        raise ValueError("a pair's reference log-probabilities belong to another prompt, picture "
                         "or completion")

    stored = [(pair.reference_chosen_logp, pair.reference_rejected_logp) for pair in pairs]
    reference = torch.tensor(stored, device=student.device).unbind(1)           # two of (B,)
    lengths = rows.mask.sum(1).chunk(2)                                         # two of (B,)
    policy = (chosen, rejected)
    return pair_objective(policy, reference, lengths, cfg.beta, cfg.label_smoothing,
                          cfg.loss_type, cfg.length_normalised, cfg.nll_coefficient)


# ---- the end, the command line

def finish(run: Run, state: State, splits: Splits, post_gate: dict[str, Any] | None) -> int:
    """Write summary.json, say the outcome, leave a page to look at; return the exit status."""
    run.write("summary.json", state.summary(run.cfg.task, post_gate) | failed_requests(run))
    if post_gate is None:
        run.say("nothing was trained; --force trains all the same")
    else:
        if "difference" not in post_gate:
            run.say("stopped on regression; --no-stop-on-regression goes on to the end")
        run.say_all(f"gate after training: {post_gate['verdict']}", post_gate["reasons"])
    if run.ranks.first:
        leave_training_page(run.folder, splits)
    return 0 if post_gate and post_gate["verdict"] == "PROMOTE" else 3


def cli() -> int:
    """Parse the flags and run; returns the exit status."""
    cfg = parse_flags(Config, __doc__)

    def work(ranks: Ranks) -> int:
        if cfg.is_demo:
            return demo.run(main, cfg, ranks)
        if cfg.out is None:
            return main(replace(cfg, out=f"runs/{cfg.task or 'pairs'}"), ranks)
        return main(cfg, ranks)

    return exit_status("train.py", work, cfg)


if __name__ == "__main__":
    exit_with(cli)
