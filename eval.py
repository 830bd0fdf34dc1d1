"""Evaluate: load a task, ask the model, score by exact match, report.

    python eval.py --model Qwen/Qwen3-VL-8B-Instruct --task mmmu --data MMMU/      ask, score, report
    python eval.py --responses responses.jsonl --task mmmu --data MMMU/            score answers from elsewhere
    python eval.py --export mmmu.jsonl --task mmmu --data MMMU/                    the task as neutral JSON lines

    accuracy = right answers / all items, with Wilson's 95 % interval; nothing extracted is wrong and stays in
    macro    = the unweighted mean over groups, its interval from the groups' own (in quadrature)

Judges (vl_rewardbench, mm_rewardbench, pairs in a JSON lines file) see every pair in both orders. --out is a folder,
or a file X.json for the report with the others beside it: responses.jsonl, written as the model answers and reread
after an interruption; answers.jsonl, what was asked, answered, extracted and judged; report.json.
Scoring answers from elsewhere needs neither torch nor a model.
"""
from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import TASKS, Item, Verdict, task_module
from tasks.flags import check_ranges, flag, parse_flags
from tasks.jsonl import Response, export_items, key_of, prompt_text, read_responses, write_whole
from tasks.rewardbench import Comparison

Z = 1.959963984540054                                                # the normal's 97.5 % point


@dataclass(frozen=True)
class Config:
    task: str = flag("", "which task", choices=tuple(TASKS))
    model: str | None = flag(None, "the model to ask: a folder or a Hugging Face id")
    responses: str | None = flag(None, "score this file instead: one {id, response, swapped?, finish_reason?} a line")
    export: str | None = flag(None, "write the items here as JSON lines, pictures beside it, and ask nothing")
    data: str | None = flag(None, "folder with the benchmark's files; for --task jsonl the file itself")
    split: str | None = flag(None, "which split (default: the one the benchmark is reported on)")
    limit: int | None = flag(None, "only the first N items (pairs, for a judge)", low=1)
    out: str | None = flag(None, "folder for the results, or X.json for the report "
                                 "(default with --model: runs/eval/..., with --responses: none)")
    max_new_tokens: int = flag(1024, "longest response; what is cut off counts in the truncation rate", low=1)
    batch_size: int = flag(8, "prompts at a time", low=1)
    device: str | None = flag(None, "cpu or cuda (default: cuda where there is one)")
    dtype: str | None = flag(None, "default: bfloat16 on cuda, float32 on cpu", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        if not self.task:
            raise ValueError(f"--task is missing; one of {', '.join(TASKS)}")
        if sum(map(bool, (self.model, self.responses, self.export))) != 1:
            raise ValueError("give exactly one of --model, --responses and --export")
        if self.export and self.out:
            raise ValueError("--export names its own file: leave out --out")
        check_ranges(self)


@dataclass(frozen=True)
class Answer:
    """A scored response. `answer` is what was extracted, None when nothing was; `tokens` None when not known."""
    id: str
    response: str
    answer: str | None
    correct: bool
    finish_reason: str | None
    tokens: int | None


def load_task(name: str, directory: str | Path | None = None, split: str | None = None,
              limit: int | None = None) -> list[Item]:
    """A task's items in file order, one a row; ids are unique. Raises ValueError on anything it cannot read.

    `directory` is the folder of the benchmark's files, for "jsonl" the file; tasks that are drawn need none.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    items = task_module(name).load(name, directory, split, limit)
    if not items:
        raise ValueError(f"no items of {name} in {directory}")
    twice, times = Counter(item.id for item in items).most_common(1)[0]
    if times > 1:
        raise ValueError(f"item id {twice!r} occurs {times} times in {directory}; ids must be unique")
    return items


def make_item(task: str, row: dict, **options: Any) -> Item:
    """One row, as the Hugging Face data set holds it, as an item; judges take `swapped=True`."""
    return task_module(task).make_item({**row, "task": task}, **options)


def score(item: Item, response: str) -> Verdict:
    """The task's own deterministic verdict; ValueError where the item's answer is not known."""
    return task_module(item.task).score(item, response)


def both_orders(items: Sequence[Item]) -> list[Item]:
    """Every pair as it stands and swapped, next to each other; other items as they are."""
    return [each for item in items for each in ((item, item.swap()) if isinstance(item, Comparison) else (item,))]


def score_answers(items: Sequence[Item], completions: Sequence[Response]) -> list[Answer]:
    """Score one completion an item; a completion has `.text`, `.token_ids` and `.finish_reason`."""
    answers = []
    for item, completion in zip(items, completions, strict=True):
        verdict, ids = score(item, completion.text), completion.token_ids
        answers.append(Answer(item.id, completion.text, verdict.answer, verdict.correct, completion.finish_reason,
                              None if ids is None else len(ids)))
    return answers


# ---- figures

def wilson(successes: float, n: int) -> dict[str, float | int | None]:
    """A proportion with Wilson's 95 % interval; all None for n = 0."""
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    p, z2 = successes / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return {"value": p, "low": min(p, max(0.0, middle - half)), "high": max(p, min(1.0, middle + half)), "n": n}


def macro(figures: Sequence[dict]) -> dict[str, float | int | None]:
    """The unweighted mean of proportions, its interval from theirs: independent errors add in quadrature."""
    k = len(figures)
    value = sum(f["value"] for f in figures) / k
    below = math.sqrt(sum((f["value"] - f["low"]) ** 2 for f in figures)) / k
    above = math.sqrt(sum((f["high"] - f["value"]) ** 2 for f in figures)) / k
    return {"value": value, "low": value - below, "high": value + above, "n": sum(f["n"] for f in figures)}


def report(items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures of a run over a task's items (at least one), each {"value", "low", "high", "n"}.

    "accuracy" is over all items; "groups" breaks it down by every key of Item.group; "macro" is the unweighted mean
    over the groups the task's module names as MACRO, "official" the one of the two that the benchmark publishes.
    For pairs in both orders see `judge_report`, whose measures come on top.
    """
    if not items or [i.id for i in items] != [a.id for a in answers]:
        raise ValueError(f"{len(items)} items and {len(answers)} answers do not belong together")
    judged = judge_report(items, answers) if isinstance(items[0], Comparison) else {}
    n, known = len(answers), [a for a in answers if a.finish_reason is not None]
    tokens = [a.tokens for a in answers if a.tokens is not None]
    figures: dict[str, Any] = {
        "task": items[0].task,
        "accuracy": wilson(sum(a.correct for a in answers), n),
        "parse_rate": wilson(sum(a.answer is not None for a in answers), n),
        "truncation_rate": wilson(sum(a.finish_reason == "length" for a in known), len(known)),
        "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
        **judged,
        "groups": grouped(items, answers)}
    module = task_module(items[0].task)
    shares = figures["groups"].get(getattr(module, "MACRO", {}).get(items[0].task, ""))
    if shares:
        figures["macro"] = macro(list(shares.values()))
    figures["official"] = figures.get(getattr(module, "OFFICIAL", "accuracy"), figures["accuracy"])
    return figures


def grouped(items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, dict[str, dict]]:
    """Accuracy by every key and value of Item.group; an item with several values counts for each of them.

    A pair's two orders are not independent: `n` counts pairs, and a pair is worth the mean of its two verdicts.
    """
    tally: dict[str, dict[str, list[bool]]] = {}
    for item, answer in zip(items, answers):
        for key, values in item.group.items():
            for value in (values,) if isinstance(values, str) else values:
                tally.setdefault(key, {}).setdefault(value, []).append(answer.correct)
    orders = 2 if isinstance(items[0], Comparison) else 1
    return {key: {value: wilson(sum(right) / orders, len(right) // orders) for value, right in sorted(groups.items())}
            for key, groups in tally.items()}


def judge_report(items: Sequence[Comparison], answers: Sequence[Answer]) -> dict[str, Any]:
    """A judge's figures over pairs seen in both orders (as `both_orders` gives them).

    accuracy                the mean over both orders; a constant judge gets exactly 0.5
    both_orders_accuracy    share of pairs judged right in both orders
    consistency             share of pairs whose two verdicts name the same response; unparsed is inconsistent
    first_position_rate     share of the parsed verdicts that name the response shown first
    unparsed_rate           share of all verdicts in which no preference was found (they count as wrong)
    """
    one, other = list(zip(items[::2], answers[::2])), list(zip(items[1::2], answers[1::2]))
    if len(one) != len(other) or any(a.id != b.id or a.swapped == b.swapped for (a, _), (b, _) in zip(one, other)):
        raise ValueError("a judge is reported over pairs in both orders, one after the other: see both_orders")
    pairs, parsed = len(one), [a.answer for a in answers if a.answer is not None]
    return {
        "accuracy": wilson(sum(a.correct for a in answers) / 2, pairs),
        "both_orders_accuracy": wilson(sum(a.correct and b.correct for (_, a), (_, b) in zip(one, other)), pairs),
        "consistency": wilson(sum({a.answer, b.answer} == {"1", "2"} for (_, a), (_, b) in zip(one, other)), pairs),
        "first_position_rate": wilson(parsed.count("1"), len(parsed)),
        "unparsed_rate": wilson(len(answers) - len(parsed), len(answers)),
    }


def table(figures: dict[str, Any]) -> str:
    """The report for people: one line a figure, groups indented below their key."""
    def line(name: str, f: dict) -> str:
        if f["value"] is None:
            return f"{name:<44}     -"
        return f"{name:<44} {100 * f['value']:5.1f}   [{100 * f['low']:5.1f}, {100 * f['high']:5.1f}]   n = {f['n']}"
    lines = [f"{figures['task']:<44}     %      95 % interval"]
    lines += [line(name, f) for name, f in figures.items() if isinstance(f, dict) and "value" in f]
    if figures["mean_tokens"] is not None:
        lines.append(f"{'mean_tokens':<44} {figures['mean_tokens']:5.1f}")
    for key, groups in figures["groups"].items():
        lines += [f"by {key}", *(line("  " + name, f) for name, f in groups.items())]
    return "\n".join(lines)


# ---- asking, and what is on disk

class Output:
    """The files of a run: in the folder `out`, or beside the report where `out` is X.json."""

    def __init__(self, out: str | Path):
        out = Path(out)
        folder, stem = (out.parent, out.stem + ".") if out.suffix == ".json" else (out, "")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file; give a folder, or X.json")
        self.report = out if stem else folder / "report.json"
        self.responses, self.answers = folder / f"{stem}responses.jsonl", folder / f"{stem}answers.jsonl"
        self.config = folder / f"{stem}config.json"


def spare_inputs(cfg: Config, *written: Path) -> None:
    """ValueError where a file to be written is a folder, or one that is read: --data's, --responses', --model's."""
    inputs = {"data": cfg.data, "responses": cfg.responses, "model": cfg.model and Path(cfg.model, "config.json")}
    for path in written:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and a file is to be written there; give another name")
        for place in (path, path.with_name(path.name + ".tmp")):            # see write_whole
            for name, read in inputs.items():
                if read and Path(read).exists() and place.exists() and place.samefile(read):
                    raise ValueError(f"{place} is the file of --{name}, which would be replaced; "
                                     f"give another --{'export' if cfg.export else 'out'}")


def answers_from_elsewhere(path: str, items: Sequence[Item], others: bool) -> list[Response]:
    """One response an item, in the items' order; a missing one is an error, not a wrong answer."""
    found = read_responses(path, items, others)
    missing = [item for item in items if key_of(item) not in found]
    if missing:
        name, swapped = key_of(missing[0])
        raise ValueError(f"{path} has no response for {len(missing)} of {len(items)} questions, first {name!r}"
                         + ' with "swapped": true' * swapped + '; give "" as the response to count it as wrong')
    return [found[key_of(item)] for item in items]


def settings(cfg: Config) -> dict[str, Any]:
    """What the answers on disk depend on: another model, task or length must not be mixed in."""
    return {"model": cfg.model, "files": fingerprint(cfg.model), "task": cfg.task, "data": cfg.data,
            "data_files": fingerprint(cfg.data), "split": cfg.split, "max_new_tokens": cfg.max_new_tokens,
            "dtype": cfg.dtype}


def fingerprint(path: str | None) -> str | None:
    """Names, sizes and times of a file, or of the files in a folder; None for what is not on this disk."""
    if path is None or not Path(path).exists():
        return None
    files = sorted(p for p in (Path(path), *Path(path).rglob("*")) if p.is_file())
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def open_output(cfg: Config) -> Output:
    """The run's files, less a half-written line; ValueError where they hold inputs or answers of other settings."""
    now = settings(cfg)
    name = hashlib.sha256(json.dumps(now).encode()).hexdigest()[:8]
    out = Output(cfg.out or Path("runs", "eval", f"{cfg.task}-{Path(cfg.model).name}-{name}"))
    spare_inputs(cfg, out.report, out.answers, out.responses, out.config)
    if out.responses.exists():
        before = json.loads(out.config.read_text()) if out.config.exists() else {}
        for field in now:
            if before.get(field) != now[field]:
                raise ValueError(f"{out.responses} holds answers of another run: {field} was {before.get(field)!r}, "
                                 f"is {now[field]!r}; give another --out")
        whole = out.responses.read_bytes()
        out.responses.write_bytes(whole[:whole.rfind(b"\n") + 1])
    write_whole(out.config, json.dumps(now, indent=1))
    return out


def ask(items: Sequence[Item], generate: Callable[[list[list[dict]]], Sequence], path: Path,
        batch_size: int) -> list[Response]:
    """Ask for what `path` does not hold yet, writing every batch down as it comes; one response an item."""
    from tqdm import tqdm
    found = read_responses(path, items, others=True) if path.exists() else {}
    todo = [item for item in items if key_of(item) not in found]
    with tqdm(total=len(items), initial=len(items) - len(todo), unit="item") as bar, path.open("a") as file:
        for start in range(0, len(todo), batch_size):
            batch = todo[start:start + batch_size]
            for item, completion in zip(batch, generate([item.chat() for item in batch]), strict=True):
                found[key_of(item)] = completion
                row = {"id": item.id, **({"swapped": item.swapped} if isinstance(item, Comparison) else {}),
                       "response": completion.text, "finish_reason": completion.finish_reason,
                       "tokens": len(completion.token_ids)}
                file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update(len(batch))
    return [found[key_of(item)] for item in items]


def ask_model(cfg: Config, items: Sequence[Item], path: Path) -> list[Response]:
    """Load the model and ask it, greedily."""
    import torch

    from model import generate, load_vlm
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, cfg.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    vlm = load_vlm(cfg.model, device=device, dtype=dtype)

    def greedy(chats: list[list[dict]]) -> list:
        outs = generate(vlm, chats, n=1, max_new_tokens=cfg.max_new_tokens, temperature=0.0, seed=0)
        return [completions[0] for completions in outs]
    return ask(items, greedy, path, cfg.batch_size)


def write_results(out: Output, items: Sequence[Item], answers: Sequence[Answer], figures: dict) -> None:
    """answers.jsonl for people to read, then report.json."""
    rows = [{"id": item.id, **({"swapped": item.swapped} if isinstance(item, Comparison) else {}),
             "prompt": prompt_text(item), "response": a.response, "extracted": a.answer, "answer": item.answer,
             "correct": a.correct, "finish_reason": a.finish_reason, "tokens": a.tokens}
            for item, a in zip(items, answers)]
    write_whole(out.answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_whole(out.report, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def evaluate(cfg: Config) -> int:
    out = Output(cfg.out) if cfg.out and cfg.responses else None
    spare_inputs(cfg, *([Path(cfg.export)] if cfg.export else [out.report, out.answers] if out else []))
    items = load_task(cfg.task, cfg.data, cfg.split, cfg.limit)
    if cfg.export:
        print(f"{export_items(items, Path(cfg.export))} items written to {cfg.export}")
        return 0
    hidden = [item.id for item in items if item.answer is None]
    if hidden:
        raise ValueError(f"{len(hidden)} of {len(items)} answers are not known (first: {hidden[0]!r}): "
                         "such items can be trained on, not scored; choose another --split")
    items = both_orders(items)
    if cfg.responses:
        completions = answers_from_elsewhere(cfg.responses, items, others=cfg.limit is not None)
    else:
        out = open_output(cfg)
        completions = ask_model(cfg, items, out.responses)
    answers = score_answers(items, completions)
    figures = report(items, answers)
    print(table(figures))
    if out:
        write_results(out, items, answers, figures)
        print(f"\n{out.report}  {out.answers}")
    return 0


def main(argv: list[str] | None = None) -> int:
    cfg = parse_flags(Config, __doc__, argv)
    try:
        return evaluate(cfg)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))             # unwinds: what was answered is on disk
    sys.exit(main())
