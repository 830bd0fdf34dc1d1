"""Verifier-guided DPO with both gates: does this verifier understand this task, and did the student improve?

    python train.py                                        the demo: a task that works and one that fails silently
    python train.py --task bar --out runs/bar              one run on the shipped tiny models
    torchrun --nproc-per-node 8 train.py --task mathvista --data DIR --out DIR --lr 1e-6 --max-new-tokens 512 \\
        --verdict-tokens 64 --micro-batch 1 --student Qwen/Qwen3-VL-2B-Instruct --verifier Qwen/Qwen3-VL-8B-Instruct

A round: K candidates an item are sampled from the student; the frozen verifier scores them; the best- and worst-scored
become a pair; DPO updates the student against its frozen self; pairs with a large margin are replayed. Labels are read
by the gates, the watch split and the log, never by what trains.

Exit status: 0 promoted; 3 a gate said no, or --stop-on-regression stopped; 2 usage; 1 anything else, SIGTERM included.
Every draw is seeded by (--seed, round, what is drawn): on a CPU a resumed run repeats an uninterrupted one bit for bit.
"""
from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from dpo import LOSS_TYPES, METRICS, pair_objective, sequence_logps
from eval import load_task, score_answers
from eval import score as exact_match
from gate import decide_before, fell_significantly, gate_after, gather_records, measure, proportion
from loop import demo
from loop.diagnosis import explain_change
from loop.flags import TrainingFlags
from loop.optimise import (
    load_trainable,
    load_training_state,
    make_optimiser,
    optimiser_step,
    reference_model,
    training_state,
)
from loop.ranks import Interrupted, Ranks, exit_status
from loop.rounds import pair_directions
from loop.run import Run, state_fields
from loop.survey import draw_items
from model import VLM, Completion, generate, load_vlm, next_digits, save_vlm
from model.checkpoint import folder_digest
from model.pairs import PairRows, pack_pairs
from model.processor import Chat
from model.vlm import FeatureCache
from replay import Pair, ReplayBuffer, form_pairs, select_pair
from tasks import TASKS, Item
from tasks.flags import flag, parse_flags
from tasks.splits import Splits, split_items
from verifier import REPLIES, VERDICTS, Score

TINY = Path(__file__).parent / "model" / "tiny"
LAST = 10                                               # the loss "at the end" is the mean of this many steps


@dataclass(frozen=True)
class Config(TrainingFlags):
    """Everything a run depends on; --help prints it. The defaults suit the tiny models that are shipped."""
    # What
    task: str | None = flag(None, "task to train on (without it: the demo, bar and red)", choices=tuple(TASKS))
    split: str | None = flag(None, "split of the data that all four splits are cut from (default: the task's own)")
    student: str = flag(str(TINY / "student"), "folder or hub id of the model that is trained")
    verifier: str = flag(str(TINY / "verifier"), "folder or hub id of the frozen model that scores")
    force: bool = flag(False, "train even if the gate says BLOCK")
    # Gates and splits
    gate_items: int = flag(200, "items on which the verifier is measured before training", low=1)
    gate_rule: str = flag("ours", "rule of the gate before training; paper: agreement alone", choices=("ours", "paper"))
    watch_items: int = flag(200, "items of the curve that the loss hides", low=1)
    held_out_items: int = flag(500, "items looked at once, at the end", low=1)
    trained_on_items: int = flag(200, "items of round 1 that are asked about again at the end, 0 for none", low=0)
    min_low: float = flag(-0.02, "promote only if the paired 95 % interval's lower end is above this", low=-1, high=1)
    stop_on_regression: bool = flag(False, "stop (exit 3) once watched accuracy has fallen significantly")
    # Sampling and scoring
    rounds: int = flag(3, "rounds of sampling, then training", low=1)
    items_per_round: int = flag(512, "fresh items a round", low=1)
    k: int = flag(8, "candidates sampled for an item", low=2)
    temperature: float = flag(1.0, "sampling temperature of the candidates", low=1e-3, high=1e3)
    top_p: float = flag(0.9, "nucleus of the candidates, 1 for the whole vocabulary", low=1e-3, high=1)
    max_new_tokens: int = flag(16, "longest answer of the student, in tokens", low=1)
    verdict: str = flag("json", "how the verifier scores: generated JSON; logits: the expected score, nothing decoded",
                        choices=tuple(VERDICTS))
    sample_batch: int = flag(64, "items that are sampled, and prompts that are scored, together", low=1)
    # Pairs and replay
    min_margin: float = flag(0.5, "margin gate (tau): replay only pairs whose scores differ by this", low=0, high=1)
    capacity: int = flag(2048, "pairs the replay buffer holds, first in, first out", low=1)
    replay_ratio: float = flag(0.5, "share of a batch that is drawn from the buffer (rho)", low=0, high=0.99)
    replay: bool = flag(True, "replay high-margin pairs (--no-replay: fresh pairs only)")
    min_pairs: int = flag(8, "a round with fewer fresh pairs is skipped", low=1)
    # DPO
    beta: float = flag(0.1, "strength of the pull to the reference", low=1e-6)
    loss_type: str = flag("sigmoid", "DPO loss", choices=LOSS_TYPES)
    label_smoothing: float = flag(0.0, "assumed share of flipped pairs (sigmoid only)", low=0, high=0.5)
    length_normalised: bool = flag(False, "divide log-probabilities by the completion's length")
    nll_coefficient: float = flag(0.0, "weight of the chosen completion's negative log-likelihood", low=0)
    # Optimisation
    lr: float = flag(3e-5, "peak learning rate; 1e-6 suits a published checkpoint", low=0, high=1)
    batch_size: int = flag(32, "pairs a step, over all ranks, replayed ones included", low=1)
    micro_batch: int = flag(32, "pairs a forward pass on one rank", low=1)
    epochs: int = flag(3, "passes over a round's fresh pairs", low=1)
    steps_per_round: int = flag(60, "most steps a round", low=1)
    # Looking, saving, machine
    eval_every: int = flag(10, "steps between looks at the watch split", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is None and self.force:
            raise ValueError("--force has no meaning without --task")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError(f"--label-smoothing {self.label_smoothing} has no meaning with --loss-type ipo")


@dataclass
class State:
    """Where a run is: with the weights, the optimiser's state and the replay buffer, all that a checkpoint holds."""
    step: int = 0
    round: int = 0                                      # rounds that are finished
    position: int = 0                                   # steps of the current round that are done
    fresh: list[Pair] | None = None                     # the current round's pairs, None until they are made
    pre_gate: dict[str, Any] | None = None
    frozen: list[dict[str, Any]] | None = None          # the frozen student's answers on the held-out split
    trained_on: list[dict[str, Any]] | None = None      # and on items that round 1 trains on
    watched: list[bool] = field(default_factory=list)   # which watched items the frozen student gets right
    losses: list[float] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def main(cfg: Config, ranks: Ranks) -> int:
    """One run: gate -> [sample -> score -> pair -> replay -> DPO] -> gate. Returns the exit status."""
    run = Run(cfg, ranks)
    splits = load_splits(cfg)                                                   # gate, watch, held_out, train: disjoint
    student, verifier = load_models(run)                                        # trained, frozen
    optimiser, replay = make_optimiser(student, cfg.lr, cfg.weight_decay), ReplayBuffer(cfg.capacity, cfg.min_margin)
    state = restore(run, student, optimiser, replay)
    again = draw_items(round_items(cfg, splits.train, 0), cfg.trained_on_items, cfg.seed)   # trained on, then asked
    if state.pre_gate is None:
        state.pre_gate = gate_before(run, student, verifier, splits.gate)
        if state.pre_gate["verdict"] == "BLOCK" and not cfg.force:
            return finish(run, state, None)                                     # exit 3, nothing trained
        state.frozen = answers(run, student, splits.held_out, "frozen student, held out")
        state.trained_on = answers(run, student, again, "frozen student, trained on")
        run.log({"step": 0, **look(run, student, splits.watch, state)})
        save(run, state, student, optimiser, replay)
    while state.round < cfg.rounds:
        if cfg.stop_on_regression and state.warnings:
            return finish(run, state, {"verdict": "REJECT", "reasons": state.warnings})
        if state.fresh is None:
            items = round_items(cfg, splits.train, state.round)
            candidates = sample(run, student, items, state.round + 1)           # K completions an item, ids kept
            texts = [[completion.text for completion in row] for row in candidates]
            scores = score(run, verifier, items, texts)                         # [0, 1] or None
            pairs = make_pairs(run, items, candidates, scores, state)
            state.rounds[-1] |= pair_directions(pairs, items)                   # reads labels, for summary.json alone
            state.fresh = with_reference_logps(run, student, pairs, splits.by_id)
            replay.add(state.fresh)                                             # only margins >= min_margin
            save(run, state, student, optimiser, replay)
        batches = round_batches(cfg, replay, state)
        for pairs in batches[state.position:]:
            row = train_step(run, student, optimiser, pairs, splits.by_id, state)
            last = state.position == len(batches)
            if last or state.step % cfg.eval_every == 0:
                row |= look(run, student, splits.watch, state)                  # the curve that the loss hides
            run.log(row)
            stop, regressed = ranks.any(ranks.stop_requested), cfg.stop_on_regression and bool(state.warnings)
            if stop or regressed or last or state.step % cfg.save_every == 0:
                save(run, state, student, optimiser, replay)
            if stop:
                raise Interrupted
            if regressed:
                break
        else:
            state.round, state.position, state.fresh = state.round + 1, 0, None
    return finish(run, state, deploy_gate(run, student, verifier, splits.held_out, again, state))   # deploy/ on PROMOTE


# ---- before the loop

def load_splits(cfg: Config) -> Splits:
    """Items of the task in four splits that share neither an id nor a picture."""
    items = load_task(cfg.task, cfg.data, cfg.split)
    train = load_task(cfg.task, cfg.data, cfg.train_split) if cfg.train_split else None
    return split_items(items, cfg.gate_items, cfg.watch_items, cfg.held_out_items, cfg.seed, train)


def load_models(run: Run) -> tuple[VLM, VLM]:
    """The student, of which a part is trained, and the frozen verifier."""
    cfg, device = run.cfg, run.ranks.device
    student = load_trainable(cfg.student, cfg, device)
    verifier = load_vlm(cfg.verifier, device, student.dtype).requires_grad_(False)
    verifier.feature_cache = FeatureCache(int(cfg.feature_cache_gb * 1e9))
    run.start(dtype=str(student.dtype).removeprefix("torch."), reference=folder_digest(student.folder),
              scorer=folder_digest(verifier.folder))
    return student, verifier


def gate_before(run: Run, student: VLM, verifier: VLM, items: Sequence[Item]) -> dict[str, Any]:
    """Measure the verifier on the target task; the records are kept, `gate.py --records` reads them again."""
    records = gather_records(
        items, greedy=lambda items: greedy(run, student, items, "gate: student"),
        sample=lambda items: sample(run, student, items, 0), score=lambda *asked: score(run, verifier, *asked),
        own=lambda items: greedy(run, verifier, items, "gate: verifier"), correct=exact_match)
    run.write_lines("gate_records.jsonl", records)
    measures = measure(records, select_pair, run.cfg.min_margin)
    decision = decide_before(measures, run.cfg.gate_rule)
    run.say_all(f"gate before training: {decision.verdict}", decision.reasons)
    return {"verdict": decision.verdict, "reasons": decision.reasons,
            "published_verdict": decide_before(measures, "paper").verdict, **measures}


# ---- the loop's steps

def round_items(cfg: Config, train: Sequence[Item], number: int) -> list[Item]:
    """The items of round `number` (from 0): one pass over the shuffled train split, started anew when it ends."""
    order = random.Random(cfg.seed).sample(range(len(train)), len(train))
    count = min(cfg.items_per_round, len(train))
    return [train[order[(number * count + i) % len(train)]] for i in range(count)]


def sample(run: Run, student: VLM, items: Sequence[Item], number: int) -> list[list[Completion]]:
    """K completions an item. `number` (the round's, 0 for the gate) keeps one round's draws apart from another's."""
    return run.ask(student, items, "sampling", n=run.cfg.k, temperature=run.cfg.temperature, top_p=run.cfg.top_p,
                   seed=run.cfg.seed * 1000 + number)


def greedy(run: Run, vlm: VLM, items: Sequence[Item], label: str) -> list[Completion]:
    """One greedy completion an item."""
    return [completion for [completion] in run.ask(vlm, items, label, temperature=0)]


def score(run: Run, verifier: VLM, items: Sequence[Item], texts: Sequence[list[str]]) -> list[list[Score]]:
    """The verifier's verdict on every candidate text of every item. The items' answers are not read."""
    cfg = run.cfg

    def reply(chats: list[Chat]) -> list[Completion]:
        outs = generate(verifier, chats, max_new_tokens=cfg.verdict_tokens, temperature=0, batch_size=cfg.sample_batch)
        return [completion for [completion] in outs]

    def digits(chats: list[Chat]) -> list[list[list[float]]]:
        return next_digits(verifier, chats, REPLIES, cfg.sample_batch)

    def part(asked: Sequence[tuple[Item, list[str]]]) -> list[list[Score]]:
        ask = digits if cfg.verdict == "logits" else reply
        return VERDICTS[cfg.verdict](ask, [item.chat() for item, _ in asked], [row for _, row in asked])
    return run.ranks.map(part, list(zip(items, texts, strict=True)), run.cfg.sample_batch, "scoring")


def make_pairs(run: Run, items: Sequence[Item], candidates: Sequence[Sequence[Completion]],
               scores: Sequence[Sequence[Score]], state: State) -> list[Pair]:
    """Top and bottom of every item; everything that was refused is counted. Fewer than --min-pairs are none."""
    pairs, refused = form_pairs([item.id for item in items], candidates, scores)
    number, few = len(state.rounds) + 1, len(pairs) < run.cfg.min_pairs
    counts = {"items": len(items), "pairs": len(pairs), **refused,
              "above_margin": sum(p.margin >= run.cfg.min_margin for p in pairs),
              "verdicts_unparsed": sum(v.value is None for verdicts in scores for v in verdicts),
              "candidates_truncated": sum(c.finish_reason == "length" for row in candidates for c in row)}
    state.rounds.append({"round": number, **counts, "skipped": few})
    run.write_lines(f"pairs/round-{number}.jsonl", (asdict(p) | {"margin": p.margin} for p in pairs))
    run.say(f"round {number}: " + ", ".join(f"{what} {n}" for what, n in counts.items()) + ("; skipped" if few else ""))
    return [] if few else pairs


def pair_logps(vlm: VLM, pairs: Sequence[Pair], by_id: dict[str, Item]) -> tuple[PairRows, Tensor, Tensor]:
    """The packed rows and the summed log-probabilities (B,) of the chosen and the rejected side, fp32."""
    rows = pack_pairs(vlm.processor, [(by_id[p.item_id].chat(), p.chosen, p.rejected) for p in pairs]).to(vlm.device)
    hidden = vlm.hidden(rows.batch, vlm.image_features(rows.batch))                        # (B, T, H)
    logps = sequence_logps(rows.predictors(hidden), vlm.head_weight, rows.targets, rows.mask)
    return rows, *logps.chunk(2)


def with_reference_logps(run: Run, student: VLM, pairs: Sequence[Pair], by_id: dict[str, Item]) -> list[Pair]:
    """The pairs with the log-probabilities of the student's frozen self: once, however often a pair is replayed."""
    if not pairs:
        return []

    @torch.no_grad()
    def part(pairs: Sequence[Pair]) -> list[Pair]:
        rows, chosen, rejected = pair_logps(reference, pairs, by_id)
        return [replace(p, reference_chosen_logp=c, reference_rejected_logp=r, reference_key=key, row_tokens=tokens)
                for p, c, r, key, tokens in zip(pairs, chosen.tolist(), rejected.tolist(), rows.keys,
                                                rows.batch.attention_mask.sum(1).tolist())]
    with reference_model(student) as reference:
        return run.ranks.map(part, pairs, run.cfg.micro_batch, "reference")


def round_batches(cfg: Config, replay: ReplayBuffer, state: State) -> list[list[Pair]]:
    """The steps of the current round; the same again after a resume."""
    ratio = cfg.replay_ratio if cfg.replay else 0.0
    return replay.batches(state.fresh, cfg.batch_size, ratio, cfg.epochs, cfg.steps_per_round,
                          seed=cfg.seed * 1000 + state.round)


def train_step(run: Run, student: VLM, optimiser: torch.optim.Optimizer, pairs: Sequence[Pair],
               by_id: dict[str, Item], state: State) -> dict[str, float]:
    """One DPO step over `pairs`; returns its metrics. Raises NonFinite with nothing updated."""
    cfg = run.cfg

    def loss(part: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        rows, *policy = pair_logps(student, part, by_id)
        if rows.keys != [p.reference_key for p in part]:
            raise ValueError("a pair's reference log-probabilities belong to another prompt, picture or completion")
        reference = torch.tensor([(p.reference_chosen_logp, p.reference_rejected_logp) for p in part],
                                 device=student.device).unbind(1)
        losses, metrics = pair_objective(policy, reference, rows.mask.sum(1).chunk(2), cfg.beta, cfg.label_smoothing,
                                         cfg.loss_type, cfg.length_normalised, cfg.nll_coefficient)
        return losses.sum(), metrics.sum(1)
    state.step, state.position = state.step + 1, state.position + 1
    pairs = sorted(pairs, key=lambda p: p.row_tokens)   # rows of like length share a micro-batch: less padding
    row = optimiser_step(run, optimiser, pairs, loss, METRICS, state.step, cfg.rounds * cfg.steps_per_round)
    state.losses.append(row["loss"])
    return {"step": state.step, "round": state.round + 1, **row, "pairs": len(pairs)}


# ---- looking, deciding, saving

def answers(run: Run, vlm: VLM, items: Sequence[Item], label: str) -> list[dict[str, Any]]:
    """Greedy answers, scored by exact match."""
    found = score_answers(items, greedy(run, vlm, items, label))
    return [asdict(answer) | {"choice": item.answer_type == "choice"} for item, answer in zip(items, found)]


def look(run: Run, student: VLM, items: Sequence[Item], state: State) -> dict[str, Any]:
    """Accuracy, parse rate and truncation rate on the watch split, and a warning once the loss hides a regression.

    The test is paired and one-sided; its level is 0.05 over the number of looks that are planned.
    """
    with run.ranks.uninterrupted():                                                   # a step is finished before a stop
        rows = answers(run, student, items, "watching")
    right = [row["correct"] for row in rows]
    state.watched = state.watched or right                                      # the first look is the frozen student's
    planned = run.cfg.rounds + run.cfg.rounds * run.cfg.steps_per_round // run.cfg.eval_every
    fell = bool(state.losses) and mean_loss(state) < state.losses[0]
    if fell and fell_significantly(state.watched, right, 0.05 / planned):
        state.warnings.append(f"step {state.step}: the loss fell from {state.losses[0]:.3f} to {mean_loss(state):.3f} "
                              f"while watched accuracy fell from {mean(state.watched):.3f} to {mean(right):.3f}")
        run.say(f"WARNING {state.warnings[-1]}")
    return {"eval/accuracy": mean(right), "eval/parse_rate": mean(row["answer"] is not None for row in rows),
            "eval/truncation_rate": mean(row["finish_reason"] == "length" for row in rows)}


def mean_loss(state: State) -> float:
    """The loss "at the end": the mean of the last ten steps."""
    return mean(state.losses[-LAST:])


def deploy_gate(run: Run, student: VLM, verifier: VLM, items: Sequence[Item], again: Sequence[Item], state: State
                ) -> dict[str, Any]:
    """Evaluate the student as it would be deployed, saved dtype included, beside its frozen self; deploy on PROMOTE."""
    candidate = run.folder / "candidate"
    if run.ranks.first:
        save_vlm(student, candidate, student.file_dtype)
    run.ranks.barrier()
    deployed = load_vlm(candidate, run.ranks.device, student.dtype)
    trained = answers(run, deployed, items, "trained student, held out")
    decision = gate_after([a["correct"] for a in state.frozen], [a["correct"] for a in trained], state.step > 0,
                          run.cfg.min_low)
    seen = state.trained_on, answers(run, deployed, again, "trained student, trained on")
    scores = score(run, verifier, again, [[row["response"] for row in both] for both in zip(*seen, strict=True)])
    judged = [[row | {"score": row_scores[side].value} for row, row_scores in zip(rows, scores, strict=True)]
              for side, rows in enumerate(seen)]
    sides = {"held_out": (state.frozen, trained), "trained_on": judged}
    for name, both in sides.items():
        rows = zip(*both, strict=True)
        run.write_lines(f"{name}.jsonl", ({"id": old["id"], "frozen": old, "trained": new} for old, new in rows))
    run.deploy_or_discard(candidate, keep=decision.verdict == "PROMOTE")
    why = explain_change(**sides)
    reasons = decision.reasons + why.pop("reasons") * (decision.verdict == "REJECT")
    return {"verdict": decision.verdict, "reasons": reasons, **decision.measures, **why}


def finish(run: Run, state: State, post_gate: dict[str, Any] | None) -> int:
    """Write summary.json, say the outcome, return the exit status."""
    frozen = [a["correct"] for a in state.frozen or ()]
    run.write("summary.json", {
        "task": run.cfg.task, "pre_gate": state.pre_gate, "post_gate": post_gate,
        "baseline_accuracy": proportion(sum(frozen), len(frozen)) if frozen else None,
        "final_accuracy": post_gate.get("final_accuracy") if post_gate else None,
        "loss_first": state.losses[0] if state.losses else None,
        "loss_last": mean_loss(state) if state.losses else None,
        "steps": state.step, "rounds": state.rounds, "warnings": state.warnings})
    if post_gate is None:
        run.say("nothing was trained; --force trains all the same")
        return 3
    run.say_all(f"gate after training: {post_gate['verdict']}", post_gate["reasons"])
    return 0 if post_gate["verdict"] == "PROMOTE" else 3


def save(run: Run, state: State, student: VLM, optimiser: torch.optim.Optimizer, replay: ReplayBuffer) -> None:
    """Checkpoint: the weights that are trained, the optimiser, the state with its pairs, and the replay buffer's."""
    held = state_fields(state) | {"buffer": [vars(p) for p in replay.pairs]}
    run.save(f"step-{state.step:06d}-{len(state.rounds):03d}",
             {"step": state.step, "state": held, **training_state(student, optimiser)})


def restore(run: Run, student: VLM, optimiser: torch.optim.Optimizer, replay: ReplayBuffer) -> State:
    """The newest checkpoint's state, weights and optimiser; a new state where there is none."""
    saved = run.load()
    if saved is None:
        return State()
    load_training_state(student, optimiser, saved)
    replay.pairs.extend(Pair(**p) for p in saved["state"].pop("buffer"))
    state = State(**saved["state"])
    state.fresh = None if state.fresh is None else [Pair(**p) for p in state.fresh]
    run.say(f"resumed at step {state.step}")
    return state


def cli() -> int:
    """Parse the flags and run; returns the exit status."""
    cfg = parse_flags(Config, __doc__)

    def work(ranks: Ranks) -> int:
        if cfg.task is None:
            return demo.run(main, cfg, ranks)
        return main(cfg if cfg.out else replace(cfg, out=f"runs/{cfg.task}"), ranks)
    return exit_status("train.py", work, cfg.device)


if __name__ == "__main__":
    sys.exit(cli())
