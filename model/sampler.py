"""Batched sampling: one prefill a prompt, n samples that read its keys and values.

A draw is the inverse of the cumulative distribution at a uniform number. The numbers of a sample depend on the seed,
the prompt's tokens and pictures, and the sample's number among equal prompts: not on batch, order, or ranks.

Letters: B prompts, n samples a prompt, R = B n rows, V vocabulary.
"""
from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .processor import Batch, Chat
from .vlm import VLM


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its token ids (the stop token included), its text, and "stop" or "length"."""
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. A value out of range is a ValueError."""
    max_new_tokens: int
    temperature: float                                              # 0: greedy
    top_p: float
    top_k: int
    repetition_penalty: float

    def __post_init__(self) -> None:
        allowed = {"max_new_tokens": self.max_new_tokens >= 1, "temperature": 0 <= self.temperature < float("inf"),
                   "top_p": 0 < self.top_p <= 1, "top_k": self.top_k >= 0,
                   "repetition_penalty": 0 < self.repetition_penalty < float("inf")}
        for name, good in allowed.items():
            if not good:
                raise ValueError(f"{name} is out of range: {getattr(self, name)}")


@torch.no_grad()
def generate(vlm: VLM, chats: list[Chat], n: int = 1, max_new_tokens: int = 256, temperature: float = 0.7,
             top_p: float = 1.0, top_k: int = 0, seed: int = 0, batch_size: int = 64,
             repetition_penalty: float = 1.0) -> list[list[Completion]]:
    """Sample `n` completions for every chat: a list (per chat) of lists (n).

    temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary. A `repetition_penalty` above 1 makes tokens
    of the prompt, and those sampled before, less likely. Placeholders of pictures and ids that the tokenizer does not
    know are never sampled. `batch_size` chats are prefilled together.
    """
    how = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty)
    if n < 1:
        raise ValueError(f"n is out of range: {n}")
    copies, n = (n, 1) if temperature == 0 else (1, n)              # greedy samples are equal: draw one
    seen: Counter[str] = Counter()
    completions: list[list[Completion]] = []
    for start in range(0, len(chats), batch_size):
        batch = vlm.processor(chats[start:start + batch_size], first=start)
        uniforms = draw_uniforms(batch, n, max_new_tokens, seed, seen) if temperature else None
        rows = sample_batch(vlm, batch, n, how, uniforms)
        done = [finish(vlm, row) for row in rows.tolist()]
        completions += [done[i:i + n] * copies for i in range(0, len(done), n)]
    return completions


def sample_batch(vlm: VLM, batch: Batch, n: int, how: Sampling, uniforms: Tensor | None) -> Tensor:
    """Token ids (R, up to max_new_tokens), padded with -1 after each row's stop token."""
    batch = batch.to(vlm.device)
    cache = vlm.new_cache(batch)
    hidden = vlm.hidden(batch, vlm.image_features(batch), cache)                          # (B, T, H)
    lengths = batch.attention_mask.sum(1)
    hidden = hidden[torch.arange(len(lengths), device=vlm.device), lengths - 1].repeat_interleave(n, 0)    # (R, H)
    position = (batch.position_ids.amax((0, 2)) + 1).repeat_interleave(n)                 # (R,)
    banned = banned_tokens(vlm)
    stops = torch.tensor(sorted(vlm.stop_ids), device=vlm.device)
    uniforms = None if uniforms is None else uniforms.to(vlm.device)
    seen = prompt_tokens(vlm, batch).repeat_interleave(n, 0) if how.repetition_penalty != 1 else None
    rows = torch.full((len(hidden), how.max_new_tokens), -1, device=vlm.device)
    done = torch.zeros(len(hidden), dtype=torch.bool, device=vlm.device)
    for t in range(how.max_new_tokens):
        logits = vlm.logits(hidden).float()                                               # (R, V)
        if seen is not None:
            harder = torch.where(logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty)
            logits = torch.where(seen, harder, logits)
        logits = logits.masked_fill(banned, -torch.inf)
        tokens = logits.argmax(-1) if uniforms is None else choose(
            logits / how.temperature, how.top_p, how.top_k, uniforms[:, t])
        rows[:, t] = tokens.masked_fill(done, -1)
        done |= torch.isin(tokens, stops)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if t + 1 == how.max_new_tokens or bool(done.all()):
            return rows[:, :t + 1]
        hidden = vlm.step(tokens, position + t, cache)


def choose(logits: Tensor, top_p: float, top_k: int, uniforms: Tensor) -> Tensor:
    """One token a row from softmax(logits) restricted to the top_k likeliest and, of these, the smallest set that
    holds top_p of the probability. logits: (R, V) fp32, uniforms: (R,) in [0, 1) -> (R,)."""
    order = None
    if top_k or top_p < 1:
        logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))     # sorted, largest first
    probabilities = logits.double().softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    mass = probabilities.cumsum(-1)
    picked = torch.searchsorted(mass, (uniforms * mass[:, -1])[:, None], right=True)      # (R, 1)
    picked = picked.clamp(max=mass.shape[-1] - 1)
    return (picked if order is None else order.gather(1, picked))[:, 0]


def draw_uniforms(batch: Batch, n: int, steps: int, seed: int, seen: Counter[str]) -> Tensor:
    """(R, steps) uniform numbers, each row's from a generator of its own; `seen` counts equal prompts so far."""
    ids, mask, rows = batch.input_ids.numpy(), batch.attention_mask.numpy().astype(bool), []
    for b, placed in enumerate(batch.placed):
        keys = "".join(batch.pictures[i].key for i in placed)
        prompt = hashlib.sha256(ids[b][mask[b]].tobytes() + keys.encode()).hexdigest()
        for _ in range(n):
            name = f"{seed} {prompt} {seen[prompt]}"
            seen[prompt] += 1
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
            rows.append(np.random.Generator(np.random.Philox(key=key)).random(steps))
    return torch.from_numpy(np.stack(rows))


def prompt_tokens(vlm: VLM, batch: Batch) -> Tensor:
    """(B, V) bool: the tokens of each prompt, as far as the head can say them."""
    vocabulary = len(vlm.head_weight)
    known = (batch.attention_mask.bool() & (batch.input_ids < vocabulary)).long()         # (B, T)
    counts = torch.zeros(len(known), vocabulary, dtype=torch.long, device=vlm.device)
    return counts.scatter_add(1, batch.input_ids * known, known) > 0


def banned_tokens(vlm: VLM) -> Tensor:
    """(V,) bool: placeholders of pictures, and rows of the head beyond the tokenizer's vocabulary."""
    vocabulary = len(vlm.head_weight)
    banned = torch.zeros(vocabulary, dtype=torch.bool, device=vlm.device)
    banned[vlm.processor.vocabulary:] = True
    banned[[i for i in vlm.processor.never_sampled if i < vocabulary]] = True
    return banned


def finish(vlm: VLM, row: list[int]) -> Completion:
    """Cut the padding off a sampled row and decode it."""
    ids = tuple(i for i in row if i >= 0)
    stopped = ids[-1] in vlm.stop_ids
    return Completion(ids, vlm.processor.decode(list(ids)), "stop" if stopped else "length")
