"""Asking models for the gate: a student's answers once for all verifiers, each verifier's verdicts and what they cost;
and which verifier is good enough for its cost.

What was answered is kept on disk, one file for every `batch_size` items, named by the digest of all that it depends on:
the model's files, the items and their pictures, how it was asked, what computed it. So one more verifier costs its own
scoring alone, and what an interruption cut short goes on where it stopped. A file that is damaged, or holds something
else than its name says, is not read: what belongs there is asked for again.
"""
from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from eval import load_task
from eval import score as exact_match
from gate import ACCEPT, gather_records, paired_difference, proportion
from model import generate, load_vlm, next_digits
from model.checkpoint import folder_digest, resolve_folder
from model.processor import Chat
from model.vlm import VLM, pick_device
from replay import Pair
from tasks import Item
from tasks.jsonl import Response, write_whole
from verifier import REPLIES, VERDICTS, Score

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
NEARLY = 0.05                                           # agreement that a cheaper verifier is shown not to lack


def survey(cfg: Any) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Each verifier's records, and its size and costs, by its name; the student answers once, for all of them.

    `cfg` is gate.py's Config. All models are found before one is asked; one at a time is in memory. A verdict (one for
    each distinct candidate of an item) costs wall time, of which the median over batches of items is told, and tokens,
    of prompt and reply.
    """
    items = draw_items(load_task(cfg.task, cfg.data or None, cfg.split or None), cfg.items, cfg.seed)
    if not items:
        raise ValueError(f"no item of {cfg.task} has an answer to measure against")
    student, *verifiers = [Asked(name, cfg) for name in (cfg.student, *cfg.verifier)]
    greedy, samples = student.greedy(items), student.samples(items)
    student.forget()
    found = {}
    for verifier in verifiers:
        own = verifier.greedy(items)
        scores, costs = verifier.judge(items, [[c.text for c in row] for row in samples])
        verifier.forget()
        records = gather_records(items, greedy=lambda _: greedy, sample=lambda _: samples, score=lambda *_: scores,
                                 own=lambda _: own, correct=exact_match)
        found[verifier.name] = records, costs
    return found


def recommend(reports: dict[str, dict[str, Any]], records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The cheapest verifier that passes and is shown to lack less than 0.05 of the agreement of the best that does.

    Quality is rubric agreement on the target task (`item_agreement`), by which the paper ranks (R2), not by size. All
    verifiers judge the same candidates, so pairing by item cancels what the items are like; whom agreement flatters
    (one that rejects all), the verdict has stopped. What is dearer is compute without a measured return (R3). A report
    gains `cost`, its seconds a verdict over the least, and `difference_from_best`. Returns `recommended` (a name of
    `reports`, None where none passes) and `recommendation`, a sentence.
    """
    agreement = {name: item_agreement(rows) for name, rows in records.items()}
    passed = [name for name, report in reports.items() if report["verdict"] == "PASS"]
    best = max(passed or reports, key=lambda name: fmean(agreement[name]))
    least = min(report["seconds_per_verdict"] for report in reports.values())
    for name, report in reports.items():
        report |= {"cost": report["seconds_per_verdict"] / least,
                   "difference_from_best": paired_difference(agreement[best], agreement[name])}
    near = [name for name in passed if name == best or reports[name]["difference_from_best"]["low"] > -NEARLY]
    pick = min(near, key=lambda name: reports[name]["cost"], default=None)
    return {"recommended": pick, "recommendation": advice(reports, passed, best, pick)}


def item_agreement(records: Iterable[dict[str, Any]]) -> list[float]:
    """Of each item, in order, the share of its candidates on which the verdict agrees with exact match."""
    rows: dict[str, list[bool]] = {}
    for r in records:
        rows.setdefault(r["item"], []).append(r["score"] is not None and (r["score"] >= ACCEPT) == r["correct"])
    return [fmean(row) for row in rows.values()]


def advice(reports: dict[str, dict[str, Any]], passed: Sequence[str], best: str, pick: str | None) -> str:
    """The sentence: which verifier, why, and what compute beyond it buys, as far as that was measured."""
    if pick is None:
        return f"Of {len(reports)} verifiers measured none passes, so none is recommended."
    if len(passed) == 1:
        return (f"{pick} is recommended: of {len(reports)} verifiers measured no other passes, so what more or less "
                "verifier compute would buy was not measured.")
    gap, cost = reports[pick]["difference_from_best"], reports[pick]["cost"]
    low, high = gap["low"], gap["high"]
    near = "it is the best" if pick == best else f"{gap['value']:+.3f} [{low:+.3f}, {high:+.3f}] from the best, {best}"
    why = (f"{pick} is recommended: of {len(passed)} verifiers that pass it is the cheapest whose agreement is shown "
           f"to be less than {NEARLY:g} below that of the best ({near})")
    if all(reports[name]["cost"] <= cost for name in passed):
        return f"{why}; none that passes costs more."
    buys = f"{-gap['value']:.3f} of agreement" if pick != best and high < 0 else "nothing that was measured"
    return f"{why}; beyond it, more verifier compute buys {buys}."


class Asked:
    """A model that is asked what the cache does not hold; its weights are loaded when the first such thing is."""

    def __init__(self, name: str, cfg: Any):
        self.name, self.cfg, self.folder = name, cfg, resolve_folder(name)
        self.device = pick_device(cfg.device or None)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.cache = Path(cfg.cache or Path(cfg.out).parent / "gate_cache")
        self.cache.mkdir(parents=True, exist_ok=True)
        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else torch.get_num_threads()
        self.how = {"model": folder_digest(self.folder), "device": str(self.device), "machine": machine,
                    "torch": torch.__version__, "code": code_digest("model/*.py"), "batch_size": cfg.batch_size}

    @cached_property
    def vlm(self) -> VLM:
        return load_vlm(self.folder, self.device, self.dtype)

    def forget(self) -> None:
        """Let go of the weights."""
        vars(self).pop("vlm", None)

    def greedy(self, items: Sequence[Item]) -> list[Response]:
        """One greedy answer an item."""
        found = self.ask(items, "answers", temperature=0.0)
        return [answer for [answer] in found]

    def samples(self, items: Sequence[Item]) -> list[list[Response]]:
        """`cfg.k` sampled answers an item."""
        cfg = self.cfg
        return self.ask(items, "samples", n=cfg.k, temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed)

    def ask(self, items: Sequence[Item], label: str, **sampling: Any) -> list[list[Response]]:
        """generate(...) over the items' chats, opened batch by batch: a list (per item) of lists."""
        sampling |= {"max_new_tokens": self.cfg.max_new_tokens, "batch_size": self.cfg.batch_size}

        def make(part: Sequence[Item]) -> list[Any]:
            outs = generate(self.vlm, [item.chat() for item in part], **sampling)
            return [[(c.text, len(c.token_ids), c.finish_reason) for c in row] for row in outs]
        parts = self.kept(items, item_key, label, {"asked": sampling}, make)
        rows = [row for part in parts for row in part]
        return [[Response(text, range(tokens), reason) for text, tokens, reason in row] for row in rows]

    def judge(self, items: Sequence[Item], texts: Sequence[list[str]]) -> tuple[list[list[Score]], dict[str, Any]]:
        """The verdicts on every candidate text of every item, and their costs. The items' answers are not read."""
        how = {"verdict": self.cfg.verdict, "verdict_tokens": self.cfg.verdict_tokens,
               "wording": code_digest("verifier.py")}
        parts = self.kept(list(zip(items, texts, strict=True)), lambda asked: [item_key(asked[0]), asked[1]],
                          f"verdicts ({self.cfg.verdict})", how, self.verdicts)
        asked = sum(part["asked"] for part in parts)
        costs = {"parameters": parts[0]["parameters"],
                 "seconds_per_verdict": median(part["seconds"] / part["asked"] for part in parts),
                 "tokens_per_verdict": sum(part["tokens"] for part in parts) / asked}
        return [[Score(*score) for score in row] for part in parts for row in part["scores"]], costs

    def verdicts(self, asked: Sequence[tuple[Item, list[str]]]) -> dict[str, Any]:
        """The scores of some items' candidates, and what they cost; the tokens are counted beside the clock."""
        seconds, tokens, size = 0.0, 0, {"batch_size": self.cfg.batch_size}
        parameters = sum(p.numel() for p in self.vlm.parameters())      # loads it, before the clock starts

        def ask(chats: list[Chat]) -> Sequence[Any]:
            nonlocal seconds, tokens
            started = time.perf_counter()
            if self.cfg.verdict == "logits":
                replies, said = next_digits(self.vlm, chats, REPLIES, **size), 0
            else:
                outs = generate(self.vlm, chats, temperature=0.0, max_new_tokens=self.cfg.verdict_tokens, **size)
                replies = [reply for [reply] in outs]
                said = sum(len(reply.token_ids) for reply in replies)
            seconds += time.perf_counter() - started
            tokens += said + sum(len(row.ids) for row in self.vlm.processor.rows(chats, {}))
            return replies
        scores = VERDICTS[self.cfg.verdict](ask, [item.chat() for item, _ in asked], [texts for _, texts in asked])
        return {"scores": [[(s.value, s.text, s.truncated) for s in row] for row in scores], "seconds": seconds,
                "tokens": tokens, "asked": sum(len(set(texts)) for _, texts in asked), "parameters": parameters}

    def kept(self, asked: Sequence[T], name: Callable[[T], Any], label: str, how: dict[str, Any],
             make: Callable[[Sequence[T]], Any]) -> list[Any]:
        """make(part) of every `batch_size` of what is asked, or what the cache holds under `how` and their names."""
        size, found = self.cfg.batch_size, []
        with tqdm(total=len(asked), desc=f"{self.folder.name}: {label}", unit="item") as bar:
            for part in (asked[i:i + size] for i in range(0, len(asked), size)):
                key = self.how | how | {"asked about": [name(each) for each in part]}
                path = self.cache / f"{digest(key)}.json"
                value = read_kept(path, key)
                if value is None:
                    value = json.loads(json.dumps(make(part)))          # as it is read again: lists for tuples
                    write_whole(path, json.dumps({"key": key, "value": value, "digest": digest([key, value])}))
                found.append(value)
                bar.update(len(part))
        return found


def read_kept(path: Path, key: dict[str, Any]) -> Any | None:
    """The value that `path` holds for `key`; None where there is none, or it is not what was written."""
    try:
        held = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    whole = isinstance(held, dict) and held.keys() == {"key", "value", "digest"} and held["key"] == key
    return held["value"] if whole and held["digest"] == digest([key, held["value"]]) else None


def draw_items(items: Iterable[Item], count: int, seed: int) -> list[Item]:
    """Up to `count` of the items that have an answer, drawn by the seed."""
    known = [item for item in items if item.answer is not None]
    return random.Random(seed).sample(known, min(count, len(known)))


def right_way(pairs: Sequence[Pair], items: Sequence[Item]) -> dict[str, Any]:
    """Of the pairs of items with an answer: how many are mixed (one side right), how many of these point the right
    way, and q, their share. It reads labels, so it is for the log alone: nothing that trains may depend on it.
    """
    known = {item.id: item for item in items if item.answer is not None}
    sides = [[exact_match(known[p.item_id], text).correct for text in (p.chosen_text, p.rejected_text)]
             for p in pairs if p.item_id in known]
    won = [chosen for chosen, rejected in sides if chosen != rejected]
    return {"mixed": len(won), "right_way": sum(won), "direction": proportion(sum(won), len(won))}


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def item_key(item: Item) -> list[Any]:
    """What a model sees of an item: its prompt, and its pictures' bytes in their order, by digest."""
    pictures = (image if isinstance(image, bytes) else image.read_bytes() for image in item.images)
    return [item.id, list(item.prompt), [hashlib.sha256(picture).hexdigest() for picture in pictures]]


def code_digest(pattern: str) -> str:
    """SHA-256 of the project's files of that name: edited code answers anew."""
    files = sorted(ROOT.glob(pattern))
    return digest([[path.name, path.read_text(encoding="utf-8")] for path in files])
