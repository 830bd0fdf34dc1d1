"""Batched sampling: one prefill of what prompts share, samples that read its keys and values.

A token is drawn at a uniform number (draw.py). The numbers of a sample depend on the seed, the prompt's tokens and
pictures, and the sample's number among equal prompts: not on batch, order, or ranks.

Letters: G rows of up to m prompts that begin alike (prompts.py), T tokens of a row, n samples a prompt, N = m n samples
a row, R = G N samples, t tokens sampled so far, H hidden size, V vocabulary.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Row
from .decode import StaticSamples
from .draw import Sampling, draw_uniforms
from .images import Picture
from .joint import joint_products
from .onednn import onednn_products
from .processor import Chat
from .prompts import Prompts, pack_prompts
from .samples import PlainSamples, Samples
from .vlm import VLM, weights_in_compute_dtype

CHECK_EVERY = 16                                        # tokens between looks at what a GPU has done


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its token ids (the stop token included), its text, and "stop" or "length"."""
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


# ---- the two entries: completions, and the probabilities of digits

@torch.no_grad()
def generate(vlm: VLM, chats: list[Chat], n: int = 1, max_new_tokens: int = 256, temperature: float = 0.7,
             top_p: float = 1.0, top_k: int = 0, seed: int = 0, batch_size: int = 64) -> list[list[Completion]]:
    """Sample `n` completions for every chat: a list (per chat) of lists (n).

    temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary. Placeholders of pictures and ids that the
    tokenizer does not know are never sampled. `batch_size` chats are prefilled together.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k)
    if n < 1:
        raise ValueError(f"n is out of range: {n}")
    greedy = temperature == 0
    draws = 1 if greedy else n                          # greedy samples are equal: draw one and copy it
    copies = n if greedy else 1

    seen: Counter[str] = Counter()
    completions: list[list[Completion]] = [[] for _ in chats]
    batches = len(range(0, len(chats), batch_size))
    steps = batches * max_new_tokens                    # if no batch ends early
    with weights_in_compute_dtype(vlm), onednn_products(vlm, steps), joint_products(vlm):
        for start, rows, packed in packed_batches(vlm, chats, batch_size):
            uniforms = None if greedy else draw_uniforms(rows, draws, max_new_tokens, seed, seen)
            for prompts in packed:
                tokens = sample_batch(vlm, prompts, draws, sampling, uniforms)                # (R, t)
                samples = tokens.unflatten(0, (-1, draws)).tolist()                           # (G m, draws, t)
                for number, token_rows in prompts.numbered(samples):
                    drawn = [finish(vlm, row) for row in token_rows]
                    completions[start + number] = drawn * copies
    return completions


@torch.no_grad()
def next_digits(vlm: VLM, chats: list[Chat], replies: Sequence[str], batch_size: int = 64) -> list[list[list[float]]]:
    """The probability that the next token begins with the digit 0, .., 9: (chats, replies, 10).

    It is asked after each chat and each of `replies` as the beginning of its reply. The last reply must begin with
    every other, token by token: one pass over it then answers for all; else a ValueError.
    """
    longest, lengths = encode_replies(vlm, replies)
    behind = len(longest) - torch.tensor(lengths, device=vlm.device)        # (replies,) tokens that follow each one
    digits = []                                                             # ids of the tokens that begin with 0, 1, ..
    for ids in vlm.processor.digits:
        digits.append(torch.tensor(ids, dtype=torch.long, device=vlm.device))

    probabilities: list[list[list[float]]] = [[] for _ in chats]
    with weights_in_compute_dtype(vlm), onednn_products(vlm, steps=0):
        for start, _, packed in packed_batches(vlm, chats, batch_size, longest):
            for prompts in packed:
                prompts = prompts.to(vlm.device, vlm.dtype)
                of_prompts = digit_probabilities(vlm, prompts, behind, digits)                # (G m, replies, 10)
                for number, of_replies in prompts.numbered(of_prompts.tolist()):
                    probabilities[start + number] = of_replies
    return probabilities


def encode_replies(vlm: VLM, replies: Sequence[str]) -> tuple[list[int], list[int]]:
    """The tokens of the last reply, and how many of them each reply has. ValueError if one does not begin the last."""
    encoded = [vlm.processor.encode(reply) for reply in replies]
    longest = encoded[-1]
    lengths = []
    for reply, ids in zip(replies, encoded, strict=True):
        length = len(ids)
        if longest[:length] != ids:
            raise ValueError(f"the tokens of {reply!r} do not begin those of {replies[-1]!r}")
        lengths.append(length)
    return longest, lengths


def digit_probabilities(vlm: VLM, prompts: Prompts, behind: Tensor, digits: list[Tensor]) -> Tensor:
    """The probability of each digit after the token that stands `behind` tokens before a prompt's last one.

    behind: (replies,); digits: for each digit the ids of the tokens that begin with it -> (G m, replies, 10).
    """
    features = vlm.image_features(prompts.batch)
    hidden = vlm.hidden(prompts.batch, features)                                              # (G, T, H)

    # The columns of a prompt need not be neighbours. Find the column up to which all but `behind` of them stand.
    count = prompts.visible.cumsum(-1)                                                        # (G, m, T)
    total = count[..., -1:]                                                                   # (G, m, 1)
    columns = torch.searchsorted(count, total - behind)                                       # (G, m, replies)
    rows = torch.arange(len(hidden), device=vlm.device)
    rows = rows[:, None, None]                                                                # (G, 1, 1)
    hidden = hidden[rows, columns].flatten(0, 2)                                              # (G m replies, H)

    tokens = vlm.logits(hidden).float().softmax(-1)                                           # (G m replies, V)
    vlm.check_finite(tokens.isfinite())
    of_digits = [tokens[:, ids].sum(-1) for ids in digits]
    together = torch.stack(of_digits, -1)                                                     # (G m replies, 10)
    return together.unflatten(0, (-1, len(behind)))


def packed_batches(vlm: VLM, chats: list[Chat], batch_size: int,
                   reply: Sequence[int] = ()) -> Iterator[tuple[int, list[Row], list[Prompts]]]:
    """`batch_size` chats at a time: the number of the first one, their rows, and the rows packed.

    Each row ends with `reply`, the first tokens of the answer.
    """
    processor = vlm.processor
    for start in range(0, len(chats), batch_size):
        batch = chats[start:start + batch_size]
        pictures: dict[str, Picture] = {}
        rows = processor.rows(batch, pictures, first=start)
        if reply:
            rows = [row.continued(reply) for row in rows]
        packed = pack_prompts(rows, pictures, processor.image_id, processor.pad_id)
        yield start, rows, packed


# ---- the loop over tokens

def sample_batch(vlm: VLM, prompts: Prompts, n: int, sampling: Sampling, uniforms: Tensor | None,
                 static: bool | None = None) -> Tensor:
    """Token ids (G m n, up to max_new_tokens), padded with -1 after each sample's stop token.

    uniforms: (prompts, n, max_new_tokens), None: greedy; static: decode as on a GPU (None: where there is one).
    NonFiniteLogits where logits are NaN or infinite: looked at after the first token, every CHECK_EVERY, and at the
    end.
    """
    samples = gather(vlm, prompts, n, sampling, uniforms, static)
    samples.check_finite()
    drawn = 1                                           # tokens of each sample
    while drawn < sampling.max_new_tokens:
        # To look at the samples is to wait until a GPU has done all that was queued, so there it is done seldom.
        is_time = drawn % CHECK_EVERY == 0
        if is_time:
            samples.check_finite()
        if is_time or vlm.device.type == "cpu":
            if not samples.compact():
                break
        samples.advance()
        drawn += 1
    samples.check_finite()
    return samples.result[:, :drawn]


def gather(vlm: VLM, prompts: Prompts, n: int, sampling: Sampling, uniforms: Tensor | None,
           static: bool | None) -> Samples:
    """The samples of the prompts, the first token of each drawn; see sample_batch."""
    if static is None:
        static = vlm.device.type == "cuda"
    kind = StaticSamples if static else PlainSamples
    return kind(vlm, prompts, n, sampling, uniforms)


def finish(vlm: VLM, row: list[int]) -> Completion:
    """Cut the padding off a sampled row and decode it."""
    ids = [token for token in row if token >= 0]
    text = vlm.processor.decode(ids)
    reason = "stop" if ids[-1] in vlm.stop_ids else "length"
    return Completion(tuple(ids), text, reason)
