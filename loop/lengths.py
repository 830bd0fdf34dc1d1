"""Prompts have a length: items that a model has no room for are found before anything is asked.

A model has as many positions as its config.json says (max_position_embeddings). They hold a prompt and what is written
behind it, so a prompt may take

    max_position_embeddings - the longest answer        or --max-prompt-tokens, where that is given

An item is given to a model in several ways: its question alone, or a verdict's prompt, which holds the question and one
or two candidates. Each is a Use, and an item fits if its prompts in all uses do. (What judge.py asks besides, to put an
error into a response, is shorter than its comparisons.)

No weights are read and no picture is decoded: a picture's tokens follow from its size, which its header tells. Most
prompts are so short that the number of their bytes settles it; the others are tokenized, in linear time.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tqdm import tqdm

from loop.endpoint import is_served
from loop.loading import processor_alone
from model.processor import Chat, Processor
from tasks import Item
from tasks.endings import is_first_process, say
from tasks.jsonl import Response, key_of
from verifier import comparison_chat, rubric_chat

A = TypeVar("A")
Kept = TypeVar("Kept", bound=Item)
SECONDS_WITHOUT_BAR = 2                                 # a progress bar is shown only if it takes longer
TOO_LONG = Response("", None, "too_long")               # in place of an answer that was never asked for


class LengthFlags(Protocol):
    """The flags that lengths depend on."""
    max_prompt_tokens: int | None                       # None or 0: what the model has room for
    max_new_tokens: int
    min_pixels: int | None
    max_pixels: int | None


@dataclass(frozen=True)
class Kind:
    """A kind of prompt that is made of an item's question."""
    frame: Callable[[Chat], Chat]                       # the question -> the prompt, its candidates empty
    candidates: int                                     # how many answers it holds
    reply: str                                          # the flag that says how long the reply to it may be


QUESTION = Kind(lambda chat: chat, 0, "max_new_tokens")
RUBRIC = Kind(lambda chat: rubric_chat(chat, ""), 1, "verdict_tokens")
COMPARISON = Kind(lambda chat: comparison_chat(chat, "", ""), 2, "verdict_tokens")
VERDICT_KINDS = {"json": RUBRIC, "logits": RUBRIC, "pairwise": COMPARISON}      # by the names of verifier.VERDICTS


@dataclass(frozen=True)
class Use:
    """A model is given prompts of a kind."""
    model: str                                          # its name, for messages
    processor: Processor
    frame: Callable[[Chat], Chat]                       # as in Kind
    candidates: int                                     # how many answers such a prompt holds
    longest: int                                        # tokens that one of them may take
    limit: int                                          # tokens that a prompt may have, these included

    def candidate_tokens(self, texts: Sequence[str] | None) -> int:
        """Tokens of a prompt's candidates: of the longest of `texts`, or of the longest that there can be (None)."""
        if texts is None or not self.candidates:
            return self.candidates * self.longest
        return self.candidates * max(len(self.processor.encode(text)) for text in texts)


# ---- the uses of a model

def answer_uses(name: str, cfg: LengthFlags) -> list[Use]:
    """The model answers questions."""
    return model_uses(name, cfg, [QUESTION])


def verifier_uses(name: str, cfg: LengthFlags, verdict: str) -> list[Use]:
    """The model answers questions, and gives verdicts on answers, by the way of scoring `verdict`."""
    return model_uses(name, cfg, [QUESTION, VERDICT_KINDS[verdict]])


def model_uses(name: str, cfg: LengthFlags, kinds: Sequence[Kind]) -> list[Use]:
    """The model is given prompts of these kinds. There is no use where no limit is known, nor of a served model: how
    long a prompt is its server alone can tell.

    ValueError where the reply leaves no position to a prompt.
    """
    if is_served(name):
        return []
    processor, positions = processor_alone(name, cfg.min_pixels, cfg.max_pixels)
    uses = []
    for kind in kinds:
        limit = cfg.max_prompt_tokens
        if not limit and positions is not None:
            reply = getattr(cfg, kind.reply)
            limit = positions - reply
            if limit < 1:
                flag = "--" + kind.reply.replace("_", "-")
                raise ValueError(f"{flag} {reply} leaves no room for a prompt: {name} has {positions} positions")
        if limit:
            uses.append(Use(name, processor, kind.frame, kind.candidates, cfg.max_new_tokens, limit))
    return uses


# ---- items

def fitting(items: Sequence[Kept], uses: Sequence[Use] | Callable[[Kept], Sequence[Use]], skip: bool,
            texts: Mapping[str, Sequence[str]] | None = None) -> list[Kept]:
    """The items that fit. Any other is a ValueError; with `skip` it is left out, and how many are is printed.

    `uses` are those of every item, or a function that says an item's; `texts` are the candidates by item id, where they
    are known. ValueError, too, where none is left.
    """
    silent = not is_first_process()
    kept = []
    faults = []
    for item in tqdm(items, "lengths", unit="item", delay=SECONDS_WITHOUT_BAR, leave=False, disable=silent):
        fault = why_too_long(item, uses(item) if callable(uses) else uses, texts[item.id] if texts else None)
        if fault is None:
            kept.append(item)
        elif skip:
            faults.append(fault)
        else:
            raise ValueError(f"{fault}; --skip-long leaves such items out, --max-prompt-tokens sets another limit")

    if faults and not kept:
        raise ValueError(f"none of {len(items)} items fits: {faults[0]}")
    if faults and not silent:
        say(f"{len(faults)} of {len(items)} items are too long and left out, the first: {faults[0]}")
    return kept


def why_too_long(item: Item, uses: Sequence[Use], texts: Sequence[str] | None = None) -> str | None:
    """In which use the item, with its candidates if known, does not fit, as words; None where it fits in all."""
    chat = item.lazy_chat()
    for use in uses:
        framed = use.frame(chat)
        try:
            candidates = use.candidate_tokens(texts)
            tokens = use.processor.most_tokens(framed) + candidates
            if tokens > use.limit:                      # only a bound: the exact number is needed
                tokens = use.processor.count_tokens(framed) + candidates
        except ValueError as error:                     # no such picture, or text, can be given to the model
            raise ValueError(f"item {item.id!r:.80}: {error}") from None
        if tokens > use.limit:
            what = "prompt with candidates" if use.candidates else "prompt"
            return f"item {item.id!r:.80}: its {what} has {tokens} tokens, the limit is {use.limit} ({use.model})"
    return None


def with_unasked(items: Sequence[Item], asked: Sequence[Item], answers: Sequence[A], unasked: A) -> list[A]:
    """One answer an item: those of the items that were `asked`, and `unasked` for the others."""
    known = {key_of(item): answer for item, answer in zip(asked, answers, strict=True)}
    return [known.get(key_of(item), unasked) for item in items]
