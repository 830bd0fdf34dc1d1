"""Evaluate: load a task, ask the model, score by exact match, report.

    python eval.py --model Qwen/Qwen3-VL-8B-Instruct --task mmmu --data MMMU/      ask, score, report
    python eval.py --responses responses.jsonl --task mmmu --data MMMU/            score answers from elsewhere, a log
    python eval.py --export mmmu.jsonl --task mmmu --data MMMU/                    the task as neutral JSON lines

    accuracy = right answers / all items, with gate.py's 95 % interval; nothing extracted is wrong and stays in
    macro    = the unweighted mean over groups, its interval from the groups' own (in quadrature)

Judges (vl_rewardbench, mm_rewardbench, pairs in a JSON lines file) see every pair in both orders. --out is a folder,
or a file X.json for the report with the others beside it: responses.jsonl, written as the model answers and reread
after an interruption; answers.jsonl, what was asked, answered, extracted and judged; report.json, and report.html to
look at. Scoring answers from elsewhere needs no torch. Exit status: 0 done; 2 what the caller can mend (a flag, or what
it names); 1 anything else.
"""
from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":                      # before what takes its time: Ctrl-C is one line
    from tasks.endings import end_on_signals, exit_with
    end_on_signals("interrupted; the same command continues")

from tasks import TASKS, Item, Verdict, jsonl, task_module
from tasks.endings import EXPECTED, check_can_write, end, say, writing
from tasks.flags import DTYPES, RequestFlags, check_pixel_range, check_ranges, flag, parse_flags
from tasks.jsonl import Response
from tasks.loading import fingerprint, shown
from tasks.log_files import read_log
from tasks.logs import Log, compare, verdict_table
from tasks.output import Output, output_files
from tasks.rewardbench import Comparison, both_orders, check_both_orders

Figure = dict[str, Any]                         # {"value", "low", "high", "n"}: see gate.Figure


@dataclass(frozen=True)
class Config(RequestFlags):
    task: str = flag("", "which task", choices=tuple(TASKS))
    model: str | None = flag(None, "the model to ask: a folder, a Hugging Face id, or http://HOST:PORT/v1#NAME")
    responses: str | None = flag(None, "score this file instead: a log of lmms-eval or VLMEvalKit, or one "
                                "{id, response, swapped?, finish_reason?} a line")
    export: str | None = flag(None, "write the items here as JSON lines, pictures beside it, and ask nothing")
    data: str | None = flag(None, "folder with the benchmark's files; for --task jsonl the file itself")
    split: str | None = flag(None, "which split (default: the one the benchmark is reported on)")
    limit: int | None = flag(None, "only the first N items (pairs, for a judge)", low=1)
    out: str | None = flag(None, "folder for the results, or X.json (default: runs/eval/..., with --responses none)")
    max_new_tokens: int = flag(1024, "longest response; what is cut off counts in the truncation rate", low=1)
    max_prompt_tokens: int | None = flag(None, "longest prompt in tokens (default: what the model has room for)", low=1)
    skip_long: bool = flag(False, "do not ask items with longer prompts: they count as wrong")
    batch_size: int = flag(8, "prompts at a time", low=1)
    device: str | None = flag(None, "cpu or cuda (default: cuda where there is one)")
    dtype: str | None = flag(None, "default: bfloat16 on cuda, float32 on cpu", choices=DTYPES)
    eager: bool = flag(True, "on a GPU: decode as written; --no-eager compiles and captures it (has run on no GPU)")
    min_pixels: int | None = flag(None, "enlarge smaller pictures to this area (default: the model's own)", low=1)
    max_pixels: int | None = flag(None, "shrink larger pictures to this area: less memory", low=1)
    feature_cache_gb: float = flag(4.0, "memory for image features, which several items may need, GB", low=0)

    def __post_init__(self) -> None:
        if not self.task:
            raise ValueError(f"--task is missing; one of {', '.join(TASKS)}")
        sources = [source for source in (self.model, self.responses, self.export) if source]
        if len(sources) != 1:
            raise ValueError("give exactly one of --model, --responses and --export")
        if self.export and self.out:
            raise ValueError("--export names its own file: leave out --out")
        check_ranges(self)
        check_pixel_range(self.min_pixels, self.max_pixels)


@dataclass(frozen=True)
class Answer:
    """A scored response. `answer` is what was extracted, None when nothing was; `tokens` None when not known."""
    id: str
    response: str
    answer: str | None
    correct: bool
    finish_reason: str | None
    tokens: int | None


def main(argv: list[str] | None = None) -> int:
    """Export, or score answers from elsewhere, or ask a model and score what it says; returns the exit status."""
    cfg = parse_flags(Config, __doc__, argv)
    out = None
    try:
        if cfg.export:
            export(cfg)
        elif cfg.responses:
            items, out = score_responses(cfg)
        else:
            items = load_scorable(cfg)
            out = planned_output(cfg)
            # Here and not above: whoever scores answers from elsewhere needs neither torch nor model/.
            from loop.lengths import TOO_LONG, with_unasked
            from loop.memory import enough_memory
            from loop.opening import open_answerer
            with enough_memory(cfg):
                model = open_answerer(cfg, items, out)
                out.reopen()                        # not before: what is wrong with the model leaves nothing on disk
                completions = ask(model.items, model.greedy, out, model.at_once, model.prepare)
            finish(items, with_unasked(items, model.items, completions, TOO_LONG), out)
        if out:
            from loop.report.evaluating import leave_eval_page
            leave_eval_page(out, items)
    except EXPECTED as error:
        return end("eval.py", error)
    return 0


def export(cfg: Config) -> None:
    """Write the task as JSON lines; items without an answer too."""
    path = Path(cfg.export)
    check_outputs(cfg, path)
    items = load_task(cfg.task, cfg.data, cfg.split, cfg.limit)
    say(f"{jsonl.export_items(items, path)} items written to {cfg.export}")


def score_responses(cfg: Config) -> tuple[list[Item], Output | None]:
    """Score the answers in --responses; without --out, the table is all that comes of it. Returns the items, and where
    the results are."""
    out = None
    if cfg.out:
        out = output_files(cfg.out)
        check_outputs(cfg, out.report, out.answers, out.page)
    items = load_scorable(cfg)
    log = read_log(cfg.responses, [item for item in items if not jsonl.is_swapped(item)])
    if log:
        log.check_complete()
        say("\n".join([*log.notes(), ""]))
        finish(log.items, log.judged_responses, out, log)
        return log.items, out
    finish(items, jsonl.answers_from_elsewhere(cfg.responses, items, others=cfg.limit is not None), out)
    return items, out


def finish(items: Sequence[Item], completions: Sequence[Response], out: Output | None, log: Log | None = None) -> None:
    """Score the completions, print the table and, of a log, that of the harness's verdicts; write the results."""
    answers = score_answers(items, completions)
    figures = report(items, answers, one_order=log is not None)
    say(table(figures))
    if log:
        figures["harness"] = compare(log, answers)
        say(f"\n{verdict_table(figures['harness'])}")
    if out:
        write_results(out, items, answers, figures)
        say(f"\n{out.report}  {out.answers}")


# ---- items and their scores

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

    [(most_frequent, count)] = Counter(item.id for item in items).most_common(1)
    if count > 1:
        raise ValueError(f"item id {shown(most_frequent)} occurs {count} times in {directory}; ids must be unique")
    return items


def make_item(task: str, row: dict, **options: Any) -> Item:
    """One row, as the Hugging Face data set holds it, as an item; judges take `swapped=True`."""
    return task_module(task).make_item({**row, "task": task}, **options)


def score(item: Item, response: str) -> Verdict:
    """The task's own deterministic verdict; ValueError where the item's answer is not known."""
    return task_module(item.task).score(item, response)


def load_scorable(cfg: Config) -> list[Item]:
    """The items to be scored, pairs in both orders; ValueError where an answer is hidden."""
    items = load_task(cfg.task, cfg.data, cfg.split, cfg.limit)
    hidden = [item.id for item in items if item.answer is None]
    if hidden:
        raise ValueError(f"{len(hidden)} of {len(items)} answers are not known (first: {shown(hidden[0])}): "
                         "such items can be trained on, not scored; choose another --split")
    return both_orders(items)


def score_answers(items: Sequence[Item], completions: Sequence[Response]) -> list[Answer]:
    """Score one completion an item; a completion has `.text`, `.token_ids` and `.finish_reason`."""
    answers = []
    for item, said in zip(items, completions, strict=True):
        verdict = score(item, said.text)
        tokens = None if said.token_ids is None else len(said.token_ids)
        answers.append(Answer(item.id, said.text, verdict.answer, verdict.correct, said.finish_reason, tokens))
    return answers


# ---- figures

def share(outcomes: Sequence[bool | None], verdicts: int = 1) -> Figure:
    """Share of True among the outcomes that are known (not None), with gate.py's 95 % interval.

    Every `verdicts` outcomes in a row belong to one item. With one each, the interval is the exact one of a proportion.
    A pair's two verdicts depend on each other, so there it is the interval of a ratio over independent pairs.
    """
    # Here and not above: at top level this file imports the standard library, Pillow and tasks/ only.
    from gate import clustered_ratio, proportion
    if verdicts == 1:
        known = [outcome for outcome in outcomes if outcome is not None]
        return proportion(sum(known), len(known))

    counts = []                                             # of each item: (True, known)
    for start in range(0, len(outcomes), verdicts):
        known = [outcome for outcome in outcomes[start:start + verdicts] if outcome is not None]
        counts.append((sum(known), len(known)))
    return clustered_ratio(counts)


def accuracy(correct: Sequence[bool], verdicts: int = 1) -> Figure:
    """Share of right verdicts; `n` counts items, so a pair is worth the mean of its two verdicts."""
    figure = share(correct, verdicts)
    figure["n"] = len(correct) // verdicts
    return figure


def macro(figures: Sequence[Figure]) -> Figure:
    """The unweighted mean of shares, its interval from theirs: independent errors add in quadrature."""
    k = len(figures)
    value = sum(figure["value"] for figure in figures) / k
    below = math.sqrt(sum((figure["value"] - figure["low"]) ** 2 for figure in figures)) / k
    above = math.sqrt(sum((figure["high"] - figure["value"]) ** 2 for figure in figures)) / k
    n = sum(figure["n"] for figure in figures)
    return {"value": value, "low": value - below, "high": value + above, "n": n}


def report(items: Sequence[Item], answers: Sequence[Answer], one_order: bool = False) -> dict[str, Any]:
    """The figures of a run over a task's items (at least one).

    "accuracy" is over all items; "groups" breaks it down by every key of Item.group; "macro" is the unweighted mean
    over the groups the task's module names as MACRO, "official" the one of the two that the benchmark publishes.
    For pairs in both orders see `judge_report`, whose measures come on top; with `one_order` each is there once.
    """
    if not items or [item.id for item in items] != [answer.id for answer in answers]:
        raise ValueError(f"{len(items)} items and {len(answers)} answers do not belong together")
    task = items[0].task
    verdicts = 2 if isinstance(items[0], Comparison) and not one_order else 1       # a pair is judged in both orders
    judged = judge_report(items, answers) if verdicts == 2 else {}

    correct = [answer.correct for answer in answers]
    parsed = [answer.answer is not None for answer in answers]
    cut_off = [None if answer.finish_reason is None else answer.finish_reason == "length" for answer in answers]
    tokens = [answer.tokens for answer in answers if answer.tokens is not None]
    groups = grouped(items, answers, verdicts)

    # What the benchmark publishes: the task's module says over which groups the mean is taken, and whether it counts.
    module = task_module(task)
    averaged = groups.get(getattr(module, "MACRO", {}).get(task, ""))
    means = {"macro": macro(list(averaged.values()))} if averaged else {}
    official = accuracy(correct, verdicts)
    if getattr(module, "OFFICIAL", "accuracy") == "macro" and means:
        official = means["macro"]

    return {
        "task": task,
        "accuracy": accuracy(correct, verdicts),
        "parse_rate": share(parsed, verdicts),
        "truncation_rate": share(cut_off, verdicts),
        "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
        "too_long": sum(answer.finish_reason == "too_long" for answer in answers),
        "failed": sum(answer.finish_reason == "failed" for answer in answers),
        **judged,
        "groups": groups,
        **means,
        "official": official,
    }


def grouped(items: Sequence[Item], answers: Sequence[Answer], verdicts: int) -> dict[str, dict[str, Figure]]:
    """Accuracy by every key and value of Item.group; an item with several values counts for each of them."""
    correct: dict[str, dict[str, list[bool]]] = {}          # key -> value -> right or wrong, in the items' order
    for item, answer in zip(items, answers, strict=True):
        for key, group in item.group.items():
            by_value = correct.setdefault(key, {})
            for value in [group] if isinstance(group, str) else group:
                by_value.setdefault(value, []).append(answer.correct)

    figures: dict[str, dict[str, Figure]] = {}
    for key, by_value in correct.items():
        figures[key] = {value: accuracy(by_value[value], verdicts) for value in sorted(by_value)}
    return figures


def judge_report(items: Sequence[Comparison], answers: Sequence[Answer]) -> dict[str, Figure]:
    """A judge's figures over pairs seen in both orders (as `both_orders` gives them).

    accuracy                the mean over both orders; a constant judge gets exactly 0.5
    both_orders_accuracy    share of pairs judged right in both orders
    consistency             share of pairs whose two verdicts name the same response; unparsed is inconsistent
    first_position_rate     share of the parsed verdicts that name the response shown first
    unparsed_rate           share of all verdicts in which no preference was found (they count as wrong)
    """
    check_both_orders(items)
    both_right = []
    consistent = []
    for one, two in zip(answers[::2], answers[1::2], strict=True):
        both_right.append(one.correct and two.correct)
        # Shown in the other order, the same response has the other number.
        consistent.append({one.answer, two.answer} == {"1", "2"})

    first = [None if answer.answer is None else answer.answer == "1" for answer in answers]
    return {
        "accuracy": accuracy([answer.correct for answer in answers], verdicts=2),
        "both_orders_accuracy": share(both_right),
        "consistency": share(consistent),
        "first_position_rate": share(first, verdicts=2),
        "unparsed_rate": share([answer.answer is None for answer in answers], verdicts=2),
    }


def table(figures: dict[str, Any]) -> str:
    """The report for people: one line a figure, groups indented below their key."""
    lines = [f"{figures['task']:<44}     %      95 % interval"]
    for name, figure in figures.items():
        if isinstance(figure, dict) and "value" in figure:
            lines.append(table_line(name, figure))
    if figures["failed"]:
        lines.append(f"{'failed requests, which count as wrong':<44} {figures['failed']:5}")
    if figures["mean_tokens"] is not None:
        lines.append(f"{'mean_tokens':<44} {figures['mean_tokens']:5.1f}")
    for key, groups in figures["groups"].items():
        lines.append(f"by {key}")
        for value, figure in groups.items():
            lines.append(table_line("  " + value, figure))
    return "\n".join(lines)


def table_line(name: str, figure: Figure) -> str:
    """A figure in percent: "accuracy    54.4   [ 48.6,  60.1]   n = 300"."""
    if figure["value"] is None:
        return f"{name:<44}     -"
    value = 100 * figure["value"]
    low = 100 * figure["low"]
    high = 100 * figure["high"]
    return f"{name:<44} {value:5.1f}   [{low:5.1f}, {high:5.1f}]   n = {figure['n']}"


# ---- the files of a run

def check_outputs(cfg: Config, *written: Path) -> None:
    """ValueError where a file cannot be written, or is one that is read: --data's, --responses', --model's."""
    inputs = {"data": cfg.data, "responses": cfg.responses, "model": cfg.model and Path(cfg.model, "config.json")}
    flag = "--export" if cfg.export else "--out"
    for path in written:
        jsonl.check_replaceable(path, inputs, flag)
        check_can_write(path.parent, flag)


def planned_output(cfg: Config) -> Output:
    """The files of a run that asks a model; `reopen` makes them this process's own.

    ValueError where another process writes them now, where they are inputs, or cannot be written.
    """
    now = settings(cfg)
    name = hashlib.sha256(json.dumps(now).encode()).hexdigest()[:8]
    out = output_files(cfg.out or Path("runs", "eval", f"{cfg.task}-{Path(cfg.model).name[:80]}-{name}"))
    out.settings = now
    check_outputs(cfg, *out.written)
    out.check_unused()
    return out


def settings(cfg: Config) -> dict[str, str | int | None]:
    """What the answers on disk depend on: another model, task or length must not be mixed in.

    What a run itself writes is no part of its data, wherever it writes it.
    """
    own = output_files(cfg.out).written if cfg.out else [Path("runs", "eval")]
    return {
        "model": cfg.model, "files": fingerprint(cfg.model), "task": cfg.task,
        "data": cfg.data, "data_files": fingerprint(cfg.data, own), "split": cfg.split,
        "max_new_tokens": cfg.max_new_tokens, "dtype": cfg.dtype,
        "min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels,
    }


def write_results(out: Output, items: Sequence[Item], answers: Sequence[Answer], figures: dict[str, Any]) -> None:
    """answers.jsonl for people to read, then report.json."""
    lines = []
    for item, answer in zip(items, answers, strict=True):
        row = jsonl.item_keys(item) | {
            "prompt": jsonl.prompt_text(item), "response": answer.response, "extracted": answer.answer,
            "answer": item.answer, "correct": answer.correct, "finish_reason": answer.finish_reason,
            "tokens": answer.tokens,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    jsonl.write_whole(out.answers, "".join(lines))
    jsonl.write_whole(out.report, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


# ---- asking

def ask(items: Sequence[Item], generate: Callable[[list[list[dict]]], Sequence], out: Output,
        batch_size: int, prepare: Callable[[list[list[dict]]], None] | None = None) -> list[Response]:
    """Ask for what the responses' file does not hold yet, writing every batch down as it comes; one response an item.

    `generate(chats)` returns a list of one completion for each chat. `prepare(chats)` is told of a batch while the one
    before it is still to be asked, so that threads can open its pictures meanwhile.
    """
    from tqdm import tqdm

    out.begin()
    path = out.responses
    responses = jsonl.read_responses(path, items, others=True) if path.exists() else {}
    missing = [item for item in items if jsonl.key_of(item) not in responses]
    with tqdm(total=len(items), initial=len(items) - len(missing), unit="item") as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start:start + batch_size]
            following = missing[start + batch_size:start + 2 * batch_size]
            if prepare is not None and following:
                prepare([item.lazy_chat() for item in following])
            completions = generate([item.lazy_chat() for item in batch])
            lines = []
            for item, [completion] in zip(batch, completions, strict=True):
                responses[jsonl.key_of(item)] = completion
                if completion.finish_reason == "failed":            # not an answer: it is asked for again next time
                    continue
                tokens = None if completion.token_ids is None else len(completion.token_ids)
                row = jsonl.item_keys(item) | {
                    "response": completion.text, "finish_reason": completion.finish_reason, "tokens": tokens}
                lines.append(json.dumps(row) + "\n")
            with writing(path), path.open("a") as file:
                file.write("".join(lines))
            bar.update(len(batch))
    return [responses[jsonl.key_of(item)] for item in items]


if __name__ == "__main__":
    exit_with(main)
