"""The judge that improves itself, after "Self-Improving VLM Judges Without Human Annotations" (arXiv 2512.05145).

    python judge.py                                        the demo: a judge that improves itself without labels
    torchrun judge.py --verifier V --task T --data D --iterations 4 --out DIR

    pairs      once, by the judge it starts from: 16 samples a question, the majority's answer against another
    judge      each iteration: the last iteration's judge on every pair in both orders, in its own words
    filter     kept are the judgments of pairs on which both orders agree with the pair; as many of either side
    train      cross-entropy of the kept judgments' sampled tokens, the prompt's left out
    evaluate   right against wrong answers to held-out questions, greedily, in both orders

The pairs are made as the paper makes them, with its sampling, iterations and epochs. Ours, where the paper's choice is
not known: all prompts, one judgment an order, training on both orders', a loss that is a mean over a judgment's tokens,
AdamW begun anew each iteration, and the stopping rule: held-out accuracy has not risen. The best iteration is deployed.
No answer of a training item is read, except for --pairs correct.
"""
from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dpo import sequence_logps
from eval import Answer, judge_report, load_task
from eval import score as exact_match
from gate import clustered_ratio
from loop.demo import replaced
from loop.flags import TrainingFlags
from loop.optimise import load_trainable, load_training_state, make_optimiser, optimiser_step, training_state
from loop.ranks import Interrupted, Ranks, exit_status
from loop.run import Run, state_fields
from model import Completion, generate, save_vlm
from model.checkpoint import folder_digest
from model.processor import Chat, Picture, collate
from model.vlm import VLM
from tasks import TASKS, Item
from tasks.flags import flag, parse_flags
from tasks.rewardbench import Comparison
from tasks.splits import Splits, split_items
from verifier import (
    KINDS,
    Judgment,
    SyntheticPair,
    alter_chat,
    altered_pair,
    balanced,
    comparison_chat,
    correct_pair,
    judge_pairs,
    kept_judgments,
    majority_pair,
)

TINY = Path(__file__).parent / "model" / "tiny"
DEMO = ("bar", "red")
PHRASE = 8                                              # words; a text answer that is mostly longer is open-ended
FIGURES = ("order_consistency", "first_position_rate", "heldout_accuracy")
PLACEHOLDERS = {"integer": "0", "float": "0", "list": "[]", "text": "\0"}   # for reading answers out of responses


@dataclass(frozen=True)
class Config(TrainingFlags):
    """Everything a run depends on; --help prints it. The defaults suit the tiny judge that is shipped."""
    # What
    verifier: str = flag(str(TINY / "judge"), "folder or hub id of the judge to start from")
    task: str | None = flag(None, "task whose questions it judges (without it: the demo, bar and red)",
                            choices=tuple(TASKS))
    train_split: str | None = flag(None, "make pairs of this split's questions instead; its answers may be hidden")
    out: str | None = flag(None, "folder of the run (default runs/judge-TASK, for the demo runs/demo/judge)")
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
    batch_size: int = flag(32, "judgments a step, over all ranks", low=1)
    micro_batch: int = flag(32, "judgments a forward pass on one rank", low=1)
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
    held: list[SyntheticPair] = field(default_factory=list)
    kept: list[Judgment] | None = None                  # what this iteration trains on, None until it is judged
    judged: dict[str, Any] = field(default_factory=dict)        # this iteration's figures before its training
    initial: dict[str, Any] | None = None               # the judge it starts from, on the held-out pairs
    iterations: list[dict[str, Any]] = field(default_factory=list)
    best: int = 0                                       # the deployed iteration, 0: none is better than the start


def main(cfg: Config, ranks: Ranks) -> int:
    """One run: pairs -> [judge -> filter -> train -> evaluate]. Returns the exit status."""
    run = Run(cfg, ranks)
    splits, known = load_splits(cfg)
    vlm = prepare(run)
    state, optimiser = restore(run, vlm)
    if state.initial is None:
        state.pairs = make_pairs(run, vlm, splits.train, cfg.pairs == "correct", "training")
        state.held = make_pairs(run, vlm, splits.held_out, known, "held-out")
        if not known:
            run.say("no held-out answer is known: held-out accuracy is agreement with majorities, not with the truth")
        if not state.pairs or not state.held:
            raise ValueError(f"{len(state.pairs)} training and {len(state.held)} held-out pairs: too few to go on; "
                             "raise --items, --held-out-items or --temperature")
        state.initial = evaluate(run, vlm, state.held, splits.held_out)
        run.log({"step": 0, "iteration": 0, **values(state.initial)})
        save(run, state, vlm, optimiser)
    by_id = splits.by_id
    while len(state.iterations) < cfg.iterations and not stalled(cfg, state):
        if state.kept is None:
            judge(run, vlm, state, by_id)
            optimiser = make_optimiser(vlm, cfg.lr, cfg.weight_decay)
            save(run, state, vlm, optimiser)
        batches = iteration_batches(cfg, state)
        for batch in batches[state.position:]:
            row = train_step(run, vlm, optimiser, batch, by_id, state, len(batches))
            last = state.position == len(batches)
            if last:
                row |= close_iteration(run, vlm, state, splits.held_out)
            run.log(row)
            stop = ranks.any(ranks.stop_requested)
            if stop or last or state.step % cfg.save_every == 0:
                save(run, state, vlm, optimiser)
            if stop:
                raise Interrupted
        if not batches:
            run.say("no judgment agrees with its pair: there is nothing to train on")
            state.iterations.append([state.initial, *state.iterations][-1] | state.judged)
            break
    return finish(run, state, known)


# ---- before the loop

def load_splits(cfg: Config) -> tuple[Splits, bool]:
    """Training and held-out items, and whether the held-out ones' answers are known. Training items lose theirs,
    unless --pairs correct asks for them."""
    items = [item for task in ((cfg.task,) if cfg.task else DEMO) for item in load_task(task, cfg.data, cfg.split)]
    train = load_task(cfg.task, cfg.data, cfg.train_split) if cfg.train_split else None
    if any(isinstance(item, Comparison) for item in (*items, *(train or ()))):
        raise ValueError(f"{cfg.task} holds pairs; a judge improves itself on questions, and makes its own pairs")
    known = any(item.answer is not None for item in items)
    if not known:                                       # the splits only ask whether there is an answer
        items = [replace(item, answer="unknown") for item in items]
    splits = split_items(items, 0, 0, cfg.held_out_items, cfg.seed, train)
    chosen = random.Random(cfg.seed).sample(splits.train, min(cfg.items, len(splits.train)))
    if cfg.pairs == "correct":
        chosen = [item for item in chosen if known and item.answer is not None]
        if not chosen:
            raise ValueError("--pairs correct needs training items with answers; there are none")
    else:
        chosen = [replace(item, answer=None) for item in chosen]
    held = splits.held_out if known else [replace(item, answer=None) for item in splits.held_out]
    return replace(splits, train=chosen, held_out=held), known


def prepare(run: Run) -> VLM:
    """The judge, of which a part is trained."""
    vlm = load_trainable(run.cfg.verifier, run.cfg, run.ranks.device)
    run.start(dtype=str(vlm.dtype).removeprefix("torch."), judge=folder_digest(vlm.folder))
    return vlm


# ---- pairs

def reader(item: Item) -> Callable[[str], str | None]:
    """The answer that the task's own scorer finds in a response to `item`, whose own answer is not looked at."""
    blind = replace(item, answer=item.choices[0] if item.answer_type == "choice" else PLACEHOLDERS[item.answer_type])
    return lambda text: exact_match(blind, text).answer


def make_pairs(run: Run, vlm: VLM, items: Sequence[Item], by_truth: bool, label: str) -> list[SyntheticPair]:
    """A pair of every item that gives one: right against wrong, the majority against another, or a response against
    its altered self where the question is open-ended. What gave none is counted by reason, and said."""
    cfg = run.cfg
    how = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p, "seed": cfg.seed * 1000}
    samples = run.ask(vlm, items, f"{label} samples", n=cfg.n, **how)
    found: list[SyntheticPair | str | None] = []
    for item, row in zip(items, samples, strict=True):
        texts = [completion.text for completion in row]
        if by_truth:
            verdicts = [exact_match(item, text) for text in texts]      # the only place that reads an answer
            found.append(correct_pair(item.id, texts, [v.correct if v.answer is not None else None for v in verdicts],
                                      cfg.seed))
        elif is_open(item, texts):
            found.append(None)
        else:
            found.append(majority_pair(item.id, texts, reader(item), cfg.seed, cfg.votes))
    wide = [k for k, pair in enumerate(found) if pair is None]
    if wide:
        for k, pair in zip(wide, alter(run, vlm, [(items[k], samples[k][0].text) for k in wide], how), strict=True):
            found[k] = pair
    pairs, refused = [pair for pair in found if isinstance(pair, SyntheticPair)], Counter(
        reason for reason in found if isinstance(reason, str))
    run.write_lines(f"pairs/{label}.jsonl", map(asdict, pairs))
    run.say(f"{label} pairs: {len(pairs)} of {len(items)} questions"
            + "".join(f", {r} {k}" for r, k in refused.items()))
    return pairs


def is_open(item: Item, texts: Sequence[str]) -> bool:
    """Whether a question is open-ended: its answer is a text, and the responses are mostly longer than a phrase."""
    return item.answer_type == "text" and median(len(text.split()) for text in texts) > PHRASE


def alter(run: Run, vlm: VLM, asked: Sequence[tuple[Item, str]], how: dict[str, Any]) -> list[SyntheticPair | str]:
    """Responses to open-ended questions and what the model makes of them when asked for one error."""
    def part(asked: Sequence[tuple[Item, str]]) -> list[SyntheticPair | str]:
        kinds = [random.Random(f"{run.cfg.seed} {item.id}").choice(sorted(KINDS)) for item, _ in asked]
        chats = [alter_chat(item.chat(), text, kind) for (item, text), kind in zip(asked, kinds)]
        outs = generate(vlm, chats, max_new_tokens=run.cfg.max_new_tokens, batch_size=run.cfg.sample_batch, **how)
        return [altered_pair(item.id, text, altered.text, kind)
                for (item, text), kind, [altered] in zip(asked, kinds, outs)]
    return run.ranks.map(part, asked, run.cfg.sample_batch, "altering")


# ---- an iteration

def ask_judge(run: Run, vlm: VLM, pairs: Sequence[SyntheticPair], by_id: dict[str, Item], label: str,
              **sampling: Any) -> list[tuple[Judgment, Judgment]]:
    """The judgment of every pair in both orders."""
    def answer(chats: list[Chat]) -> list[Completion]:
        outs = generate(vlm, chats, max_new_tokens=run.cfg.verdict_tokens, batch_size=run.cfg.sample_batch, **sampling)
        return [completion for [completion] in outs]

    def part(pairs: Sequence[SyntheticPair]) -> list[tuple[Judgment, Judgment]]:
        return judge_pairs(answer, [by_id[pair.item_id].chat() for pair in pairs], pairs)
    return run.ranks.map(part, pairs, run.cfg.sample_batch, label)


def judge(run: Run, vlm: VLM, state: State, by_id: dict[str, Item]) -> None:
    """The current judge on all training pairs; `state.kept` is what of it will be trained on."""
    cfg, number = run.cfg, len(state.iterations) + 1
    judged = ask_judge(run, vlm, state.pairs, by_id, f"judging, iteration {number}", temperature=cfg.temperature,
                       top_k=cfg.top_k, top_p=cfg.top_p, seed=cfg.seed * 1000 + number)
    kept = kept_judgments(judged, cfg.order_filter)
    state.kept = balanced(kept, cfg.seed * 1000 + number, cfg.most) if cfg.balance else random.Random(
        cfg.seed * 1000 + number).sample(kept, min(cfg.most, len(kept)))
    share = clustered_ratio((len(kept_judgments([pair], cfg.order_filter)), 2) for pair in judged)
    state.judged = {"iteration": number, "pairs": len(judged), "kept_share": share | {"n": len(judged)},
                    "trained_on": len(state.kept)}
    run.write_lines(f"pairs/judged-{number}.jsonl", (asdict(each) for both in judged for each in both))


def iteration_batches(cfg: Config, state: State) -> list[list[Judgment]]:
    """The steps of the current iteration; the same again after a resume."""
    rng = random.Random(cfg.seed * 1000 + len(state.iterations))
    order = [j for _ in range(cfg.epochs) for j in rng.sample(state.kept, len(state.kept))]
    return [order[start:start + cfg.batch_size] for start in range(0, len(order), cfg.batch_size)]


def train_step(run: Run, vlm: VLM, optimiser: torch.optim.Optimizer, batch: Sequence[Judgment],
               by_id: dict[str, Item], state: State, planned: int) -> dict[str, Any]:
    """One step of supervised fine-tuning; returns its metrics. Raises NonFinite with nothing updated."""
    def loss(part: Sequence[Judgment]) -> tuple[Tensor, Tensor]:
        chats = [comparison_chat(by_id[j.item_id].chat(), j.first, j.second) for j in part]
        logps = completion_logps(vlm, chats, [j.token_ids for j in part])
        losses = -logps / torch.tensor([len(j.token_ids) for j in part], device=logps.device)
        return losses.sum(), losses.detach().sum()[None]
    state.step, state.position = state.step + 1, state.position + 1
    row = optimiser_step(run, optimiser, batch, loss, ("loss",), state.position, planned)
    return {"step": state.step, "iteration": state.judged["iteration"], **row, "judgments": len(batch)}


def completion_logps(vlm: VLM, chats: list[Chat], completions: Sequence[Sequence[int]]) -> Tensor:
    """Summed log-probability (B,) of B completions, each given its chat; the prompt's tokens do not count."""
    pictures: dict[str, Picture] = {}
    prompts = vlm.processor.rows(chats, pictures)
    rows = [prompt.continued(ids) for prompt, ids in zip(prompts, completions, strict=True)]
    batch = collate(rows, pictures, vlm.processor.pad_id).to(vlm.device)
    targets = torch.zeros(len(rows), max(map(len, completions)), dtype=torch.long)         # (B, C)
    sources, mask = targets.clone(), targets.bool()
    for b, (prompt, ids) in enumerate(zip(prompts, completions)):
        targets[b, :len(ids)], mask[b, :len(ids)] = torch.tensor(ids), True
        sources[b, :len(ids)] = len(prompt.ids) - 1 + torch.arange(len(ids))
    hidden = vlm.hidden(batch, vlm.image_features(batch))                                  # (B, T, H)
    targets, sources, mask = (x.to(vlm.device) for x in (targets, sources, mask))
    predictors = hidden[torch.arange(len(rows), device=vlm.device)[:, None], sources]      # (B, C, H)
    return sequence_logps(predictors, vlm.head_weight, targets, mask)


def evaluate(run: Run, vlm: VLM, pairs: Sequence[SyntheticPair], items: Sequence[Item]) -> dict[str, Any]:
    """The judge's figures on held-out pairs: greedy, both orders, an unparsed verdict is wrong (eval.judge_report)."""
    with run.ranks.uninterrupted():                                                   # a step is finished before a stop
        judged = ask_judge(run, vlm, pairs, {item.id: item for item in items}, "held-out pairs", temperature=0)
    each = [judgment for both in judged for judgment in both]
    shown = [Comparison(j.item_id, "jsonl", (), swapped=j.side == 2) for j in each]
    said = [Answer(j.item_id, j.text, None if j.verdict is None else str(j.verdict), j.verdict == j.side, None, None)
            for j in each]
    found = judge_report(shown, said)
    return {"order_consistency": found["consistency"], "first_position_rate": found["first_position_rate"],
            "heldout_accuracy": found["accuracy"], "both_orders_accuracy": found["both_orders_accuracy"],
            "unparsed_rate": found["unparsed_rate"]}


def close_iteration(run: Run, vlm: VLM, state: State, items: Sequence[Item]) -> dict[str, Any]:
    """Measure the iteration's judge, deploy it if it is the best so far; returns what metrics.jsonl has of it."""
    found = state.judged | evaluate(run, vlm, state.held, items)
    best = (state.iterations[state.best - 1] if state.best else state.initial)["heldout_accuracy"]["value"]
    state.iterations.append(found)
    run.say("\n".join(table(state).splitlines()[::len(state.iterations) + 1]))
    if found["heldout_accuracy"]["value"] > best:
        state.best, candidate = len(state.iterations), run.folder / "candidate"
        if run.ranks.first:
            save_vlm(vlm, candidate, vlm.file_dtype)
        run.deploy_or_discard(candidate, keep=True)
    state.kept, state.position = None, 0
    return values(found)


def values(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures without their intervals."""
    return {name: figures[name]["value"] for name in ("kept_share", *FIGURES) if name in figures}


def stalled(cfg: Config, state: State) -> bool:
    """Whether the last --patience iterations brought no new best."""
    return len(state.iterations) - state.best >= cfg.patience and bool(state.iterations)


# ---- deciding, saving

def finish(run: Run, state: State, known: bool) -> int:
    """Write summary.json, print the table, return the exit status."""
    run.write("summary.json", {
        "task": run.cfg.task, "pairs": run.cfg.pairs, "heldout": "answers" if known else "majority",
        "initial": state.initial, "iterations": state.iterations, "deployed": state.best or None, "steps": state.step})
    run.say("\n" + table(state))
    if not state.best:
        run.say("no iteration is better than the judge that it started from: nothing is deployed")
        return 3
    run.say(f"deployed: iteration {state.best}, {run.folder / 'deploy'}")
    return 0


def table(state: State) -> str:
    """One row an iteration, 0 the judge it started from."""
    def figure(f: dict[str, Any] | None) -> str:
        return f"{'-':>20}" if not f or f["value"] is None else f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]"
    heads = ("kept share", "order consistency", "first position", "held-out accuracy")
    rows = ["iteration  trained on  " + "  ".join(f"{head:>20}" for head in heads)]
    for number, row in enumerate([state.initial, *state.iterations]):
        figures = (figure(row.get(name)) for name in ("kept_share", *FIGURES))
        rows.append(f"{number:9}  {row.get('trained_on', '-'):>10}  " + "  ".join(figures))
    return "\n".join(rows)


def save(run: Run, state: State, vlm: VLM, optimiser: torch.optim.Optimizer) -> None:
    """Checkpoint: the weights that are trained, the optimiser, and the state with its pairs and judgments."""
    number = 2 * len(state.iterations) + (state.kept is not None)
    run.save(f"step-{state.step:06d}-{number:03d}",
             {"step": state.step, "state": state_fields(state), **training_state(vlm, optimiser)})


def restore(run: Run, vlm: VLM) -> tuple[State, torch.optim.Optimizer]:
    """The newest checkpoint's state and optimiser, its weights put into `vlm`; new ones where there is none."""
    saved, optimiser = run.load(), make_optimiser(vlm, run.cfg.lr, run.cfg.weight_decay)
    if saved is None:
        return State(), optimiser
    load_training_state(vlm, optimiser, saved)
    state = State(**saved["state"])
    state.pairs, state.held = ([SyntheticPair(**p) for p in pairs] for pairs in (state.pairs, state.held))
    state.kept = None if state.kept is None else [Judgment(**j) for j in state.kept]
    run.say(f"resumed at step {state.step}")
    return state, optimiser


def cli() -> int:
    """Parse the flags and run; returns the exit status."""
    cfg = parse_flags(Config, __doc__)

    def work(ranks: Ranks) -> int:
        if cfg.out or cfg.task:
            return main(replace(cfg, out=cfg.out or f"runs/judge-{cfg.task}"), ranks)
        with replaced(Path("runs/demo/judge"), ranks):
            return main(replace(cfg, out="runs/demo/judge"), ranks)
    return exit_status("judge.py", work, cfg.device)


if __name__ == "__main__":
    sys.exit(cli())
