"""Batched sampling: one prefill of what prompts share, samples that read its keys and values.

A draw is the inverse of the cumulative distribution at a uniform number. The numbers of a sample depend on the seed,
the prompt's tokens and pictures, and the sample's number among equal prompts: not on batch, order, or ranks.

Letters: G rows of up to m prompts that begin alike (prompts.py), n samples a prompt, N = m n, R = G N samples,
V vocabulary.
"""
from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Row
from .images import Picture
from .layers import Linear
from .processor import Chat
from .prompts import Prompts, pack_prompts
from .vlm import VLM

LOOK = 16                                               # tokens between looks for finished samples on a GPU
SPAN = 128                                              # tokens of the vocabulary that are summed up at once
LARGE = 100_000                                         # entries of a matrix from which on oneDNN is faster
MANY = 64                                               # tokens from which on packing takes less time than it saves
NUCLEUS = 1024                                          # likeliest tokens among which a nucleus is looked for first


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
        allowed = {"max_new_tokens": self.max_new_tokens >= 1,
                   "temperature": self.temperature == 0 or 1e-6 <= self.temperature < float("inf"),
                   "top_p": 0 < self.top_p <= 1, "top_k": self.top_k >= 0,
                   "repetition_penalty": 0 < self.repetition_penalty < float("inf")}
        for name, good in allowed.items():
            if not good:
                raise ValueError(f"{name} is out of range: {getattr(self, name)}")


@contextmanager
def prepared(vlm: VLM, tokens: int) -> Iterator[None]:
    """Inside, the language model's weights are held as they are multiplied fastest, to sample that many tokens.

    Those that are trained in fp32 are held in the dtype computed in. On a CPU large ones in fp32 are left to oneDNN,
    which PyTorch itself asks below fp32 only; for many tokens a copy is packed as oneDNN reads it, which takes few
    rows half the time (measured on an AMD EPYC against MKL). Not for training, nor for what is compared with it.
    """
    tower = {id(p) for p in vlm.tower.parameters()}
    held = {p: p.data for p in vlm.parameters() if p.dtype != vlm.dtype and id(p) not in tower}
    layers = [m for m in vlm.decoder.modules() if isinstance(m, Linear)]
    try:
        for p in held:
            p.data = p.data.to(vlm.dtype)
        for layer in layers:
            layer.packed = pack(layer.weight.data, tokens)
        vlm.packed_head = pack(vlm.head_weight.data, tokens)
        yield
    finally:
        vlm.packed_head = None
        for layer in layers:
            layer.packed = None
        for p, data in held.items():
            p.data = data


def pack(weight: Tensor, tokens: int) -> Tensor | None:
    """A matrix for oneDNN, packed or as it is; None for one that is better left to PyTorch's own choice."""
    large = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LARGE
    if not large or not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight) if tokens >= MANY else weight


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
    completions: list[list[Completion]] = [[] for _ in chats]
    with prepared(vlm, len(chats) * n * max_new_tokens):
        for start, rows, packed in packed_batches(vlm, chats, batch_size):
            uniforms = draw_uniforms(rows, n, max_new_tokens, seed, seen) if temperature else None
            for prompts in packed:
                tokens = sample_batch(vlm, prompts, n, how, uniforms)                         # (G m n, t)
                for number, samples in prompts.numbered(tokens.unflatten(0, (-1, n)).tolist()):
                    completions[start + number] = [finish(vlm, row) for row in samples] * copies
    return completions


def packed_batches(vlm: VLM, chats: list[Chat], batch_size: int,
                   reply: Sequence[int] = ()) -> Iterator[tuple[int, list[Row], list[Prompts]]]:
    """`batch_size` chats at a time, each with what begins its `reply`: the first one's number, their rows, packed."""
    for start in range(0, len(chats), batch_size):
        pictures: dict[str, Picture] = {}
        rows = vlm.processor.rows(chats[start:start + batch_size], pictures, first=start)
        rows = [row.continued(reply) for row in rows] if reply else rows
        yield start, rows, pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id)


def sample_batch(vlm: VLM, prompts: Prompts, n: int, how: Sampling, uniforms: Tensor | None) -> Tensor:
    """Token ids (R, up to max_new_tokens), padded with -1 after each sample's stop token.

    uniforms: (prompts, n, max_new_tokens), None: greedy. Samples that are finished are dropped as the batch goes on.
    """
    device, prompts = vlm.device, prompts.to(vlm.device)
    cache, groups = vlm.new_cache(prompts, n), len(prompts.numbers)
    hidden = vlm.hidden(prompts.batch, vlm.image_features(prompts.batch), cache)          # (G, T, H)
    hidden = hidden[torch.arange(groups, device=device)[:, None], prompts.last]           # (G, m, H)
    numbers, hidden, position = (x.flatten(0, 1).repeat_interleave(n, 0)                  # (R,), (R, H), (R,)
                                 for x in (prompts.numbers, hidden, prompts.position + 1))
    uniforms = None if uniforms is None else uniforms.to(device)[prompts.numbers.flatten()].flatten(0, 1)
    seen = prompt_tokens(vlm, prompts).repeat_interleave(n, 0) if how.repetition_penalty != 1 else None
    banned, stops = banned_tokens(vlm), torch.tensor(sorted(vlm.stop_ids), device=device)
    rows = torch.full((len(numbers), how.max_new_tokens), -1, device=device)
    live, done = torch.arange(len(rows), device=device), numbers < 0
    for t in range(how.max_new_tokens):
        logits = vlm.logits(hidden).float()                                               # (R, V)
        if seen is not None:
            logits = penalise(logits, seen, how.repetition_penalty)
        logits.index_fill_(1, banned, -torch.inf)
        tokens = logits.argmax(-1) if uniforms is None else choose(
            logits.div_(how.temperature), how.top_p, how.top_k, uniforms[:, t])
        rows[live, t] = tokens.masked_fill(done, -1)
        done = done | torch.isin(tokens, stops)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if t + 1 == how.max_new_tokens:
            break
        if device.type == "cpu" or t % LOOK == LOOK - 1:            # on a GPU a look at `done` waits for all that runs
            if bool(done.all()):
                break
            kept, index = remaining(done, groups)
            if 4 * len(index) <= 3 * len(live):
                for layer in cache:
                    layer.keep(kept, index)
                groups, live, done, tokens, position = len(kept), *(x[index] for x in (live, done, tokens, position))
                uniforms, seen = (None if x is None else x[index] for x in (uniforms, seen))
        hidden = vlm.step(tokens, position + t, cache)
    return rows[:, :t + 1]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (R, V) in which those of `seen` tokens, (R, V) bool, are made less likely by `penalty`."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def remaining(done: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The rows of prompts with unfinished samples, (G',), and as many samples of each as the one with the most has:
    (R',), unfinished ones first. done: (R,), R = groups * N."""
    left = ~done.view(groups, -1)                                                         # (G, N)
    kept = left.any(1).nonzero()[:, 0]
    order = left[kept].byte().argsort(dim=1, descending=True, stable=True)[:, :int(left.sum(1).max())]
    return kept, (kept[:, None] * left.shape[1] + order).flatten()


@torch.no_grad()
def next_digits(vlm: VLM, chats: list[Chat], replies: Sequence[str], batch_size: int = 64) -> list[list[list[float]]]:
    """For each chat, and each of `replies` as the beginning of its reply, the probabilities that the next token begins
    with the digits 0 to 9: (chats, replies, 10). The last reply must begin with every other, token by token."""
    encoded = [vlm.processor.encode(reply) for reply in replies]
    longest, found = encoded[-1], [[] for _ in chats]
    for reply, ids in zip(replies, encoded):
        if longest[:len(ids)] != ids:
            raise ValueError(f"the tokens of {reply!r} do not begin those of {replies[-1]!r}")
    digits = [torch.tensor(ids, dtype=torch.long, device=vlm.device) for ids in vlm.processor.digits]
    with prepared(vlm, tokens=0):
        for start, _, packed in packed_batches(vlm, chats, batch_size, longest):
            for prompts in packed:
                prompts = prompts.to(vlm.device)
                hidden = vlm.hidden(prompts.batch, vlm.image_features(prompts.batch))         # (G, T, H)
                back = torch.tensor([len(longest) - len(ids) for ids in encoded], device=vlm.device)
                row, count = torch.arange(len(hidden), device=vlm.device)[:, None, None], prompts.visible.cumsum(-1)
                column = torch.searchsorted(count, count[..., -1:] - back)      # of its last tokens, (G, m, replies)
                likely = vlm.logits(hidden[row, column].flatten(0, 2)).float().softmax(-1)    # (G m replies, V)
                likely = torch.stack([likely[:, ids].sum(-1) for ids in digits], -1)          # (G m replies, 10)
                for number, each in prompts.numbered(likely.unflatten(0, (-1, len(back))).tolist()):
                    found[start + number] = each                                          # (replies, 10)
    return found


def choose(logits: Tensor, top_p: float, top_k: int, uniforms: Tensor) -> Tensor:
    """One token a row from softmax(logits) restricted to the top_k likeliest and, of these, the smallest set that
    holds top_p of the probability. logits: (R, V) fp32, uniforms: (R,) in [0, 1) -> (R,)."""
    size = logits.shape[-1]
    weights = logits.softmax(-1)                                                          # (R, V)
    if not top_k and top_p == 1:
        return invert(weights, uniforms)
    width = min(top_k or (NUCLEUS if logits.device.type == "cpu" else size), size)
    total = None if top_k else weights.sum(-1, keepdim=True, dtype=torch.float64)         # (R, 1)
    while True:
        largest, order = weights.topk(width)                        # sorted, largest first
        largest = largest.double()
        running = largest.cumsum(-1)
        mass = running[:, -1:] if total is None else total
        if width == size or top_k or bool((running[:, -1:] >= top_p * mass).all()):
            break
        width = min(8 * width, size)                                # the nucleus is not in yet: on CPU, where a sort of
    largest = largest.masked_fill(running - largest >= top_p * mass, 0)     # the whole vocabulary would be slow
    return order.gather(1, invert(largest, uniforms)[:, None])[:, 0]


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place at which a row's running sum exceeds its share `uniforms` of the whole; it has weight.

    weights: (R, V) not negative, uniforms: (R,) in [0, 1), double -> (R,). The running sum, in double, is over spans
    first and then inside one of them: one over the whole vocabulary costs as much as a layer.
    """
    missing = -weights.shape[1] % SPAN
    spans = (F.pad(weights, (0, missing)) if missing else weights).unflatten(1, (-1, SPAN))       # (R, spans, SPAN)

    def place(running: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:                  # and the share that is left
        wanted = (shares * running[:, -1]).minimum(running[:, -1] * (1 - 1e-15))
        at = torch.searchsorted(running, wanted[:, None], right=True)                     # (R, 1)
        at = at.clamp(max=running.shape[1] - 1)         # NaN is above all
        before = F.pad(running, (1, 0)).gather(1, at)
        return at, ((wanted[:, None] - before) / (running.gather(1, at) - before))[:, 0]
    span, rest = place(spans.sum(-1).double().cumsum(-1), uniforms)
    inside = spans.take_along_dim(span[..., None], 1)[:, 0].double().cumsum(-1)           # (R, SPAN)
    return (span * SPAN + place(inside, rest)[0])[:, 0]


def draw_uniforms(rows: Sequence[Row], n: int, steps: int, seed: int, seen: Counter[str]) -> Tensor:
    """(prompts, n, steps) uniform numbers, each sample's from a generator of its own; `seen` counts equal prompts."""
    found = []
    for row in rows:
        prompt = hashlib.sha256(np.array(row.ids).tobytes() + "".join(row.picture_keys).encode()).hexdigest()
        for _ in range(n):
            name = f"{seed} {prompt} {seen[prompt]}"
            seen[prompt] += 1
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
            found.append(np.random.Generator(np.random.Philox(key=key)).random(steps))
    return torch.from_numpy(np.stack(found)).view(len(rows), n, steps)


def prompt_tokens(vlm: VLM, prompts: Prompts) -> Tensor:
    """(G m, V) bool: the tokens of each prompt, as far as the head can say them."""
    vocabulary, ids = len(vlm.head_weight), prompts.batch.input_ids[:, None]              # (G, 1, T)
    known = (prompts.visible & (ids < vocabulary)).flatten(0, 1).long()                   # (G m, T)
    counts = torch.zeros(len(known), vocabulary, dtype=torch.long, device=vlm.device)
    return counts.scatter_add(1, ids.expand_as(prompts.visible).flatten(0, 1) * known, known) > 0


def banned_tokens(vlm: VLM) -> Tensor:
    """Ids that are never sampled: placeholders of pictures, and rows of the head beyond the tokenizer's vocabulary."""
    vocabulary = len(vlm.head_weight)
    beyond = range(vlm.processor.vocabulary, vocabulary)
    return torch.tensor([*(i for i in vlm.processor.never_sampled if i < vocabulary), *beyond], device=vlm.device)


def finish(vlm: VLM, row: list[int]) -> Completion:
    """Cut the padding off a sampled row and decode it."""
    ids = tuple(i for i in row if i >= 0)
    stopped = ids[-1] in vlm.stop_ids
    return Completion(ids, vlm.processor.decode(list(ids)), "stop" if stopped else "length")
