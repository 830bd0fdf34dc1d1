"""A model whose answers are kept on disk: what was asked once is not asked again, and costs are kept with verdicts.

There is one file for every `batch_size` items. Its name is the digest of all that the answers depend on: the model's
files, the items and their pictures, how it was asked, what computed it. So one more verifier costs its own scoring
alone, and an interrupted survey goes on where it stopped. Several processes may share a cache: a file is whole or
absent, and may be written twice. A file that is damaged, or that holds something else than its name says, is not
believed: what belongs there is asked for again.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from loop.answer_log import digest
from loop.asking import ask_verifier, begin_pictures
from loop.loading import activation_dtype, frozen
from loop.survey_flags import SurveyConfig
from model import generate, load_vlm
from model.checkpoint import folder_digest, resolve_folder
from model.processor import Chat
from model.vlm import VLM, pick_device
from tasks import Item
from tasks.jsonl import Response, write_whole
from verifier import VERDICTS, Score

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
ASKING_CODE = ("model/*.py", "loop/asking.py", "loop/cached_model.py")      # whose edits make models answer anew


@dataclass(frozen=True)
class CostedScore(Score):
    """A verdict with its share of what its batch cost; None where an equal text of the item was asked about before.

    The seconds are those of the verdicts' own prompts and replies in the decoder. What a model does once, however many
    verdicts it gives, is done before the clock starts: its weights are loaded, and the pictures are preprocessed and
    go through its tower. So a verdict costs the same whether the verifier's own answers were asked for in this call or
    read from the cache. Only features that the feature cache cannot hold are computed again on the clock.
    """
    seconds: float | None = None                        # wall time
    tokens: int | None = None                           # of prompts and replies


class CachedModel:
    """A model that is asked only for what the cache does not hold; its weights are loaded at the first such thing."""

    failed_requests = 0                                 # as served_survey.py counts them

    def __init__(self, name: str, cfg: SurveyConfig, cache: Path):
        self.name = name
        self.cfg = cfg
        self.cache = cache
        self.folder = resolve_folder(name)
        self.device = pick_device(cfg.device)
        self.dtype = activation_dtype(cfg.dtype, self.device)
        check_cache(cache)

        machine: str | int = torch.get_num_threads()
        if self.device.type == "cuda":
            machine = torch.cuda.get_device_name(self.device)
        self.key = {                                    # the part of every file's key that is the model's
            "model": folder_digest(self.folder),
            "device": str(self.device),
            "machine": machine,
            "torch": torch.__version__,
            "code": [code_digest(pattern) for pattern in ASKING_CODE],
            "batch_size": cfg.batch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "pixels": [cfg.min_pixels, cfg.max_pixels],
        }

    @cached_property
    def vlm(self) -> VLM:
        """The model itself, loaded when it is first used."""
        return frozen(load_vlm(self.folder, self.device, self.dtype), self.cfg)

    def forget(self) -> None:
        """Let go of the weights."""
        vars(self).pop("vlm", None)

    def greedy(self, items: Sequence[Item]) -> list[Response]:
        """One greedy answer an item."""
        rows = self._completions(items, "answers", {"temperature": 0.0})
        return [answer for [answer] in rows]

    def samples(self, items: Sequence[Item]) -> list[list[Response]]:
        """`k` sampled answers an item."""
        cfg = self.cfg
        sampling = {"n": cfg.k, "temperature": cfg.temperature, "top_p": cfg.top_p, "seed": cfg.seed}
        return self._completions(items, "samples", sampling)

    def judge(self, items: Sequence[Item], texts: Sequence[list[str]]) -> tuple[list[list[CostedScore]], int]:
        """The verdicts on every candidate text of every item, and the model's number of parameters.

        The items' answers are not read.
        """
        how = {
            "verdict": self.cfg.verdict,
            "verdict_tokens": self.cfg.verdict_tokens,
            "wording": code_digest("verifier.py"),
        }
        candidates = list(zip(items, texts, strict=True))
        batches = self._cached(candidates, candidates_key, f"verdicts ({self.cfg.verdict})", how, self._ask_verdicts)

        verdicts: list[list[CostedScore]] = []
        for batch in batches:
            start = len(verdicts)
            verdicts += share_costs(batch, texts[start:start + len(batch["scores"])])
        return verdicts, batches[0]["parameters"]

    def _completions(self, items: Sequence[Item], label: str, sampling: dict[str, Any]) -> list[list[Response]]:
        """What the model says to each item's prompt, as often as `sampling` (arguments of generate) says."""
        sampling = sampling | {"max_new_tokens": self.cfg.max_new_tokens, "batch_size": self.cfg.batch_size}

        def ask(part: Sequence[Item]) -> list[Any]:
            return self._ask_completions(part, sampling)

        def prepare(part: Sequence[Item]) -> None:
            begin_pictures(self.vlm, part)

        responses = []
        for batch in self._cached(items, item_key, label, {"asked": sampling}, ask, prepare):
            for row in batch:
                responses.append([Response(text, range(tokens), reason) for text, tokens, reason in row])
        return responses

    def _ask_completions(self, items: Sequence[Item], sampling: dict[str, Any]) -> list[Any]:
        """Ask for one batch; pictures are opened here. A completion is kept as (text, tokens, finish_reason)."""
        rows = []
        for completions in generate(self.vlm, [item.lazy_chat() for item in items], **sampling):
            rows.append([(c.text, len(c.token_ids), c.finish_reason) for c in completions])
        return rows

    def _ask_verdicts(self, candidates: Sequence[tuple[Item, list[str]]]) -> dict[str, Any]:
        """Ask for one batch: the scores of these items' candidates, and what they cost together."""
        chats = [item.lazy_chat() for item, _ in candidates]

        # Before the clock starts: load the weights, encode the pictures. See CostedScore.
        parameters = sum(p.numel() for p in self.vlm.parameters())
        with torch.no_grad():
            self.vlm.image_features(self.vlm.processor(chats))

        ask = MeteredAsk(self.vlm, self.cfg)
        texts = [item_texts for _, item_texts in candidates]
        rows = []
        for scores in VERDICTS[self.cfg.verdict](ask, chats, texts):
            rows.append([(score.value, score.text, score.truncated) for score in scores])
        return {
            "scores": rows,
            "seconds": ask.seconds,
            "tokens": ask.tokens,
            "asked": sum(len(set(item_texts)) for item_texts in texts),
            "parameters": parameters,
        }

    def _cached(self, things: Sequence[T], thing_key: Callable[[T], Any], label: str, how: dict[str, Any],
                ask: Callable[[Sequence[T]], Any], prepare: Callable[[Sequence[T]], None] | None = None) -> list[Any]:
        """For every batch of `things`: what the cache holds, or else ask(batch), which is kept.

        A file's key is the model's, `how` it is asked, and `thing_key` of everything it is asked about. `prepare` is
        told of the batch that follows one that is asked; verdicts have none, for threads would work on their clock.
        """
        size = self.cfg.batch_size
        values = []
        with tqdm(total=len(things), desc=f"{self.folder.name}: {label}", unit="item") as bar:
            for start in range(0, len(things), size):
                batch = things[start:start + size]
                key = self.key | how | {"asked about": [thing_key(thing) for thing in batch]}
                path = self.cache / f"{digest(key)}.json"
                value = read_answers(path, key)
                if value is None:
                    if prepare is not None:
                        prepare(things[start + size:start + 2 * size])
                    value = write_answers(path, key, ask(batch))
                values.append(value)
                bar.update(len(batch))
        return values


class MeteredAsk:
    """Answers the chats that a way of scoring (of VERDICTS) asks, and adds up the seconds and tokens this takes."""

    def __init__(self, vlm: VLM, cfg: SurveyConfig):
        self.vlm = vlm
        self.cfg = cfg
        self.seconds = 0.0
        self.tokens = 0

    def __call__(self, chats: list[Chat]) -> Sequence[Any]:
        cfg = self.cfg
        started = time.perf_counter()
        replies = ask_verifier(self.vlm, chats, cfg.verdict, cfg.verdict_tokens, cfg.batch_size)
        self.seconds += time.perf_counter() - started

        reply_tokens = 0                                # digits are read, not decoded
        if cfg.verdict != "logits":
            reply_tokens = sum(len(reply.token_ids) for reply in replies)

        # Counted beside the clock. The processor knows these texts and pictures: it only puts them together again.
        prompts = self.vlm.processor.rows(chats, {})
        self.tokens += reply_tokens + sum(len(prompt.ids) for prompt in prompts)
        return replies


def share_costs(batch: dict[str, Any], texts: Sequence[Sequence[str]]) -> list[list[CostedScore]]:
    """The batch's verdicts, each with its share of the batch's cost.

    Equal texts of an item are asked about once: the first carries the share, the others carry none. All shares of the
    seconds are equal. Tokens are shared as evenly as whole numbers allow, so they add up to the batch's.
    """
    seconds = batch["seconds"] / batch["asked"]
    tokens, left_over = divmod(batch["tokens"], batch["asked"])
    rows = []
    shares = 0                                          # that were given
    for scores, item_texts in zip(batch["scores"], texts, strict=True):
        row = []
        for position, (value, text, truncated) in enumerate(scores):
            verdict = CostedScore(value, text, truncated)
            if item_texts[position] not in item_texts[:position]:
                extra = 1 if shares < left_over else 0
                verdict = replace(verdict, seconds=seconds, tokens=tokens + extra)
                shares += 1
            row.append(verdict)
        rows.append(row)
    return rows


# ---- files and their keys

def check_cache(cache: Path) -> None:
    """ValueError where the folder of answers is something else."""
    if cache.exists() and not cache.is_dir():
        raise ValueError(f"the cache {cache} is a file; a folder is needed")


def read_answers(path: Path, key: dict[str, Any]) -> Any | None:
    """The value that the file holds for `key`; None where there is none, or it is not what was written."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):       # not there, or not readable: it is asked for again
        return None
    if not isinstance(content, dict) or content.keys() != {"key", "value", "digest"}:
        return None
    try:
        whole = content["key"] == key and content["digest"] == digest([key, content["value"]])
    except RecursionError:                              # it lies as deep as can just be read
        return None
    return content["value"] if whole else None


def write_answers(path: Path, key: dict[str, Any], value: Any) -> Any:
    """Keep a value for `key`; returns it as it will be read again: lists for tuples."""
    value = json.loads(json.dumps(value))
    content = {"key": key, "value": value, "digest": digest([key, value])}
    write_whole(path, json.dumps(content))
    return value


def item_key(item: Item) -> list[Any]:
    """What a model sees of an item: its prompt, and its pictures by the digests of their bytes, in order."""
    pictures = [picture.digest for picture in item.pictures]
    return [item.id, list(item.prompt), pictures]


def candidates_key(candidates: tuple[Item, list[str]]) -> list[Any]:
    """What a verifier sees of an item and its candidates."""
    item, texts = candidates
    return [item_key(item), texts]


def code_digest(pattern: str) -> str:
    """SHA-256 of the project's files of that name: a model answers anew after the code was edited."""
    contents = []
    for path in sorted(ROOT.glob(pattern)):
        contents.append([path.name, path.read_text(encoding="utf-8")])
    return digest(contents)
