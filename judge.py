"""The judge that improves itself, after "Self-Improving VLM Judges Without Human Annotations" (arXiv 2512.05145).

    python judge.py                                        the demo: a judge that improves itself without labels
    torchrun judge.py --verifier V --task T --data D --iterations 4 --out DIR

    pairs      once, by the judge that the run starts from: of 16 samples a question, one with the majority's answer
               against one with another
    judge      the current judge compares every pair's responses in both orders, in its own words
    filter     a pair's judgments are kept if both agree with it; then as many that prefer the first as the second
    train      cross-entropy of the kept judgments' sampled tokens, given the comparison prompt
    evaluate   greedy judgments, in both orders, of right against wrong answers to held-out questions

Judge, filter, train and evaluate are an iteration; it begins with the judge of the last one. The pairs are made as the
paper makes them, with its sampling, iterations and epochs. Ours, where the paper's choice is not known: all prompts,
one judgment an order, training on both orders' judgments, a loss that is a mean over a judgment's tokens, AdamW begun
anew each iteration, and the stopping rule: stop when held-out accuracy has not risen. The best iteration is deployed.
No answer of a training item is read, except for --pairs correct.

Exit status: 0 deployed; 3 no iteration was better; 2 what the caller can mend (a flag, or what it names); 1 anything
else, Ctrl-C and SIGTERM included. Letters: B judgments.
"""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

if __name__ == "__main__":                              # Ctrl-C while torch is imported: one line
    from tasks.endings import end_on_signals, exit_with
    end_on_signals("interrupted before the run began")

import torch
from torch import Tensor

from loop.alter import alter_chat
from loop.card import write_judge_card
from loop.demo import replaced
from loop.disk import check_disk
from loop.flags import TrainingFlags
from loop.judge_figures import (
    IterationFigures,
    JudgedFigures,
    JudgeFigures,
    judge_figures,
    judged_figures,
    logged_values,
    table,
)
from loop.judge_model import GREEDY, Sampling, alter_responses, ask_judge, comparison, completion_logps
from loop.judge_splits import load_judge_splits
from loop.judgments import BothOrders, Judgment, balanced, judge_pairs, kept_judgments, shuffled_batches
from loop.optimise import load_trainable, load_training_state, make_optimiser, optimiser_step, training_state
from loop.ranks import Interrupted, Ranks, exit_status
from loop.report.judging import leave_judge_page
from loop.run import Run, state_fields
from loop.saved import check_tokens, check_training_state, rebuild
from loop.speed import PREPROCESSING, StepClock
from loop.synthetic_pairs import (
    SyntheticPair,
    altered_pair,
    answer_reader,
    correct_pair,
    is_open_ended,
    majority_pair,
    read_correctness,
)
from model.checkpoint import folder_digest
from model.pairs import row_length
from model.vlm import VLM
from tasks import TASKS, Item
from tasks.flags import flag, parse_flags
from tasks.splits import Splits, by_id

# The paper's parts, most of which live in loop/
__all__ = ["Judgment", "SyntheticPair", "alter_chat", "altered_pair", "balanced", "completion_logps", "correct_pair",
           "judge_pairs", "kept_judgments", "main", "majority_pair"]

TINY = Path(__file__).parent / "model" / "tiny"
DEMO = ("bar", "red")                                   # the tasks of the demo
DEMO_FOLDER = Path("runs/judge-demo")


@dataclass(frozen=True)
class Config(TrainingFlags):
    """Everything a run depends on; --help prints it. The defaults suit the tiny judge that is shipped."""
    # What
    verifier: str = flag(str(TINY / "judge"), "folder or hub id of the judge to start from")
    task: str | None = flag(None, "task whose questions it judges (without it: the demo, bar and red)",
                            choices=tuple(TASKS))
    train_split: str | None = flag(None, "make pairs of this split's questions instead; its answers may be hidden")
    out: str | None = flag(None, "folder of the run (default runs/judge-TASK, for the demo runs/judge-demo)")
    # Pairs
    iterations: int = flag(4, "most iterations of judging, filtering and training", low=1)
    patience: int = flag(1, "stop after this many iterations without a rise of held-out accuracy", low=1)
    items: int = flag(600, "training questions that pairs are made of", low=1)
    held_out_items: int = flag(300, "questions that the judge is measured on", low=1)
    pairs: str = flag("majority", "what a pair's better response is: the majority's, or the right one (reads answers)",
                      choices=("majority", "correct"))
    n: int = flag(16, "samples a question", low=2)
    votes: int = flag(5, "least votes of a majority", low=1)
    temperature: float = flag(0.6, "sampling temperature of answers and judgments", low=1e-3, high=1e3)
    top_k: int = flag(50, "likeliest tokens that are sampled from, 0 for all", low=0)
    top_p: float = flag(0.9, "nucleus that is sampled from, 1 for the whole vocabulary", low=1e-3, high=1)
    verdict_tokens: int = flag(40, "longest judgment, in tokens", low=1)
    # Filter
    order_filter: bool = flag(True, "keep a pair only if both orders agree with it (--no-order-filter: each by itself)")
    balance: bool = flag(True, "train on as many judgments of either side (--no-balance: on all that are kept)")
    most: int = flag(100_000, "judgments trained on an iteration at most, for comparisons at equal volume", low=2)
    # Optimisation
    lr: float = flag(3e-4, "peak learning rate of an iteration; 1e-5 suits a published checkpoint", low=0, high=1)
    epochs: int = flag(5, "passes over the kept judgments", low=1)
    # Saving, machine
    save_every: int = flag(50, "steps between checkpoints", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.votes > self.n:
            raise ValueError(f"--votes {self.votes} can never be reached with --n {self.n}")


@dataclass
class State:
    """Where a run is: with the weights and the optimiser's state, all that a checkpoint holds."""
    step: int = 0
    position: int = 0                                   # steps of the current iteration that are done
    pairs: list[SyntheticPair] = field(default_factory=list)
    held_out_pairs: list[SyntheticPair] = field(default_factory=list)
    examples: list[Judgment] | None = None              # this iteration trains on them, None until pairs are judged
    judged: JudgedFigures | None = None                 # this iteration's figures before its training
    initial: JudgeFigures | None = None                 # the judge it starts from, on the held-out pairs
    iterations: list[IterationFigures] = field(default_factory=list)
    best: int = 0                                       # the deployed iteration, 0: none is better than the start


def main(cfg: Config, ranks: Ranks) -> int:
    """One run: pairs -> [judge -> filter -> train -> evaluate]. Returns the exit status."""
    run = Run(cfg, ranks)
    if run.has_ended:                                   # --resume of a run that is finished
        return run.end_again()
    splits, answers_known = load_splits(cfg)
    vlm = load_judge(run)
    state, optimiser = restore(run, vlm)

    if state.initial is None:
        state.pairs = make_pairs(run, vlm, splits.train, "training", by_truth=cfg.pairs == "correct")
        state.held_out_pairs = make_pairs(run, vlm, splits.held_out, "held-out", by_truth=answers_known)
        check_pairs(run, state, answers_known)
        state.initial = evaluate(run, vlm, state.held_out_pairs, splits.held_out)
        run.log({"step": 0, "iteration": 0, **logged_values(state.initial)})
        save(run, state, vlm, optimiser)

    while not is_finished(cfg, state):
        number = len(state.iterations) + 1

        # Judge and filter, unless the run was resumed within an iteration that has done so.
        if state.examples is None:
            judged = judge_training_pairs(run, vlm, state.pairs, splits.by_id, number)
            state.examples = choose_examples(cfg, judged, number)
            state.judged = judged_figures(number, judged, cfg.order_filter, state.examples)
            optimiser = make_optimiser(vlm, cfg.lr, cfg.weight_decay)
            save(run, state, vlm, optimiser)
        if not state.examples:
            run.say("no judgment agrees with its pair: there is nothing to train on")
            state.iterations.append(untrained_iteration(state))
            break

        # Train. The last step ends the iteration: its judge is evaluated, and deployed if it is the best so far.
        batches = shuffled_batches(state.examples, cfg.epochs, cfg.batch_size, iteration_seed(cfg, number - 1))
        for batch in batches[state.position:]:
            state.step += 1
            state.position += 1
            clock = StepClock(ranks)
            metrics = train_step(run, vlm, optimiser, batch, splits.by_id, state.position, len(batches))
            row = {"step": state.step, "iteration": number, **metrics, "judgments": len(batch)}
            row |= clock.figures(judgments=len(batch))

            ended = state.position == len(batches)
            if ended:
                figures = evaluate(run, vlm, state.held_out_pairs, splits.held_out)
                state = close_iteration(state, figures)
                run.say(table({number: state.iterations[-1]}))
                if state.best == number:
                    deploy(run, vlm, state, splits)
                row |= logged_values(state.iterations[-1])
            run.log(row)

            stop = ranks.any(ranks.stop_requested)
            if stop or ended or state.step % cfg.save_every == 0:
                save(run, state, vlm, optimiser)
            if stop:
                raise Interrupted

    return finish(run, state, splits, answers_known)


def is_finished(cfg: Config, state: State) -> bool:
    """Whether all iterations are done, or the last --patience of them brought no new best."""
    done = len(state.iterations)
    since_best = done - state.best
    return done >= cfg.iterations or since_best >= cfg.patience


# ---- before the loop

def load_splits(cfg: Config) -> tuple[Splits, bool]:
    """Training and held-out questions, and whether the answers of the held-out ones are known."""
    tasks = DEMO
    if cfg.task is not None:
        tasks = (cfg.task,)
    keep_answers = cfg.pairs == "correct"
    return load_judge_splits(cfg, tasks, cfg.verifier, cfg.items, cfg.held_out_items, keep_answers)


def load_judge(run: Run) -> VLM:
    """The judge, of which a part is trained. Makes the run's folder, whose config.json says what was loaded."""
    cfg = run.cfg
    vlm = load_trainable(cfg.verifier, cfg, run.ranks.device)
    check_disk(run, vlm, deployed_copies=2)             # the last best one goes when the new one is whole
    dtype = str(vlm.dtype).removeprefix("torch.")
    run.start(dtype=dtype, judge=folder_digest(vlm.folder))
    return vlm


def sampling(cfg: Config, number: int) -> Sampling:
    """How the answers (`number` 0) and the judgments of iteration `number` are sampled."""
    seed = iteration_seed(cfg, number)
    return {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p, "seed": seed}


def iteration_seed(cfg: Config, number: int) -> int:
    """The seed of what iteration `number` draws, from 1; 0 is for the pairs."""
    return cfg.seed * 1000 + number


# ---- pairs

def make_pairs(run: Run, vlm: VLM, items: Sequence[Item], label: str, by_truth: bool) -> list[SyntheticPair]:
    """A pair of every question that gives one; why the others give none is counted and said.

    With `by_truth` the answers are read, and a right sample is paired with a wrong one. Without it, the majority's
    answer is paired with another answer; where the question is open-ended, a response with its altered self.
    """
    cfg = run.cfg
    samples = run.ask(vlm, items, f"{label} samples", n=cfg.n, **sampling(cfg, 0))

    outcomes: dict[str, SyntheticPair | str] = {}       # item id -> its pair, or the reason for none
    open_ended = []
    for item, completions in zip(items, samples, strict=True):
        texts = [completion.text for completion in completions]
        if by_truth:
            correctness = read_correctness(item, texts)
            outcomes[item.id] = correct_pair(item.id, texts, correctness, cfg.seed)
        elif is_open_ended(item, texts):
            open_ended.append((item, texts[0]))
        else:
            extract = answer_reader(item)
            outcomes[item.id] = majority_pair(item.id, texts, extract, cfg.seed, cfg.votes)
    if open_ended:
        altered = alter_responses(run, vlm, open_ended, sampling(cfg, 0))
        for (item, _), outcome in zip(open_ended, altered, strict=True):
            outcomes[item.id] = outcome

    pairs = []
    reasons: Counter[str] = Counter()
    for item in items:
        outcome = outcomes[item.id]
        if isinstance(outcome, SyntheticPair):
            pairs.append(outcome)
        else:
            reasons[outcome] += 1
    run.write_lines(f"pairs/{label}.jsonl", [asdict(pair) for pair in pairs])
    counts = [f"{label} pairs: {len(pairs)} of {len(items)} questions"]
    counts += [f"{reason} {count}" for reason, count in reasons.items()]
    run.say(", ".join(counts))
    return pairs


def check_pairs(run: Run, state: State, answers_known: bool) -> None:
    """Say so where the held-out pairs are majorities'; ValueError where there are too few pairs to go on."""
    if not answers_known:
        run.say("no held-out answer is known: held-out accuracy is agreement with majorities, not with the truth")
    if not state.pairs or not state.held_out_pairs:
        raise ValueError(f"{len(state.pairs)} training and {len(state.held_out_pairs)} held-out pairs: too few to go "
                         "on; raise --items, --held-out-items or --temperature")


# ---- an iteration: judge, filter, train, evaluate

def judge_training_pairs(run: Run, vlm: VLM, pairs: Sequence[SyntheticPair], items: dict[str, Item],
                         number: int) -> list[BothOrders]:
    """The current judge's judgments, sampled, of every training pair; written to pairs/judged-NUMBER.jsonl."""
    label = f"judging, iteration {number}"
    judged = ask_judge(run, vlm, pairs, items, label, sampling(run.cfg, number))
    judgments = chain.from_iterable(judged)
    rows = [asdict(judgment) for judgment in judgments]
    run.write_lines(f"pairs/judged-{number}.jsonl", rows)
    return judged


def choose_examples(cfg: Config, judged: Sequence[BothOrders], number: int) -> list[Judgment]:
    """The judgments that iteration `number` trains on: those that agree with their pair, balanced, at most --most."""
    kept = kept_judgments(judged, cfg.order_filter)
    seed = iteration_seed(cfg, number)
    if cfg.balance:
        return balanced(kept, seed, cfg.most)

    count = min(cfg.most, len(kept))
    return random.Random(seed).sample(kept, count)


def train_step(run: Run, vlm: VLM, optimiser: torch.optim.Optimizer, batch: Sequence[Judgment],
               items: dict[str, Item], step: int, planned: int) -> dict[str, float]:
    """One step of supervised fine-tuning, the iteration's `step` of `planned`; returns its metrics.

    A judgment's loss is the mean cross-entropy of its tokens, given the comparison prompt. Raises NonFinite with
    nothing updated.
    """
    def tokens(judgment: Judgment) -> int:
        with PREPROCESSING:
            return row_length(vlm.processor, comparison(judgment, items), judgment.token_ids)

    def loss(part: Sequence[Judgment]) -> tuple[Tensor, dict[str, Tensor]]:
        with PREPROCESSING:
            chats = [comparison(judgment, items) for judgment in part]
        completions = [judgment.token_ids for judgment in part]
        logps = completion_logps(vlm, chats, completions)                                  # (B,)

        lengths = [len(token_ids) for token_ids in completions]
        losses = -logps / torch.tensor(lengths, device=logps.device)                       # (B,)
        return losses, {"loss": losses.detach()}

    return optimiser_step(run, vlm, optimiser, batch, tokens, loss, ("loss",), step, planned)


def evaluate(run: Run, vlm: VLM, pairs: Sequence[SyntheticPair], items: Sequence[Item]) -> JudgeFigures:
    """The judge's figures on held-out pairs, decoded greedily, in both orders."""
    with run.ranks.uninterrupted():                     # so that the step before it is logged and saved
        judged = ask_judge(run, vlm, pairs, by_id(items), "held-out pairs", GREEDY)
    return judge_figures(judged)


def close_iteration(state: State, figures: JudgeFigures) -> State:
    """The state after an iteration's last step, whose judge has these figures; the best iteration may be this one."""
    best_figures = state.initial
    if state.best:
        best_figures = state.iterations[state.best - 1]
    best_accuracy = best_figures["heldout_accuracy"]["value"]
    accuracy = figures["heldout_accuracy"]["value"]

    best = state.best
    if accuracy > best_accuracy:
        best = len(state.iterations) + 1
    iteration: IterationFigures = {**state.judged, **figures}
    iterations = [*state.iterations, iteration]
    return replace(state, iterations=iterations, best=best, examples=None, position=0)


def untrained_iteration(state: State) -> IterationFigures:
    """The figures of an iteration that has no examples: its judge is still the one before."""
    latest = state.initial
    if state.iterations:
        latest = state.iterations[-1]
    return {**latest, **state.judged}


def deploy(run: Run, vlm: VLM, state: State, splits: Splits) -> None:
    """Put the judge into deploy/ with its model card, in place of an earlier iteration's."""
    candidate = run.save_candidate(vlm)
    if run.ranks.first:
        write_judge_card(candidate, run.cfg, run.folder, run.ranks.world, splits.all_items, state.initial,
                         state.iterations[-1])
    run.deploy_or_discard(candidate, keep=True)


# ---- the end; checkpoints

def finish(run: Run, state: State, splits: Splits, answers_known: bool) -> int:
    """Write summary.json, print the table, leave a page; returns 0, or 3 where no iteration was better than the first
    judge."""
    run.write("summary.json", {
        "task": run.cfg.task,
        "pairs": run.cfg.pairs,
        "heldout": "answers" if answers_known else "majority",
        "initial": state.initial,
        "iterations": state.iterations,
        "deployed": state.best or None,
        "steps": state.step,
    })
    rows = [state.initial, *state.iterations]
    run.say("\n" + table(dict(enumerate(rows))))

    if state.best:
        run.say(f"deployed: iteration {state.best}, {run.folder / 'deploy'}")
    else:
        run.say("no iteration is better than the judge that it started from: nothing is deployed")
    if run.ranks.first:
        leave_judge_page(run.folder, splits)
    return 0 if state.best else 3


def save(run: Run, state: State, vlm: VLM, optimiser: torch.optim.Optimizer) -> None:
    """Checkpoint: the weights that are trained, the optimiser, and the state with its pairs and judgments."""
    # One step can have several checkpoints: before and after an iteration's judging, and after the iteration.
    phase = 2 * len(state.iterations)
    if state.examples is not None:
        phase += 1
    content = {
        "step": state.step,
        "state": state_fields(state),
        **training_state(vlm, optimiser),
    }
    run.save(f"step-{state.step:06d}-{phase:03d}", content)


def restore(run: Run, vlm: VLM) -> tuple[State, torch.optim.Optimizer]:
    """The newest checkpoint's state and optimiser, its weights put into `vlm`; new ones where there is none."""
    optimiser = make_optimiser(vlm, run.cfg.lr, run.cfg.weight_decay)

    def check(saved: dict) -> None:
        check_training_state(vlm, optimiser, saved)
        examples = rebuild(State, saved.get("state"), "state").examples or []
        check_tokens(vlm, [judgment.token_ids for judgment in examples], "state")

    saved = run.load(check)
    if saved is None:
        return State(), optimiser
    load_training_state(vlm, optimiser, saved)
    state = rebuild(State, saved["state"], "state")
    run.say(f"resumed at step {state.step}")
    return state, optimiser


def cli() -> int:
    """Parse the flags and run; returns the exit status."""
    cfg = parse_flags(Config, __doc__)

    def work(ranks: Ranks) -> int:
        if cfg.out or cfg.task:
            return main(replace(cfg, out=cfg.out or f"runs/judge-{cfg.task}"), ranks)
        with replaced(DEMO_FOLDER, ("",), ranks):
            return main(replace(cfg, out=str(DEMO_FOLDER)), ranks)

    return exit_status("judge.py", work, cfg)


if __name__ == "__main__":
    exit_with(cli)
