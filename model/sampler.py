"""Batched sampling: one prefill of what prompts share, samples that read its keys and values.

A token is drawn by inverting the cumulative distribution at a uniform number. The numbers of a sample depend on the
seed, the prompt's tokens and pictures, and the sample's number among equal prompts: not on batch, order, or ranks.

Letters: G rows of up to m prompts that begin alike (prompts.py), T tokens of a row, n samples a prompt, N = m n samples
a row, R = G N samples, t tokens sampled so far, H hidden size, V vocabulary.
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

from .attention import LayerCache
from .batch import Row
from .images import Picture
from .onednn import onednn_products
from .processor import Chat
from .prompts import Prompts, pack_prompts
from .vlm import VLM

CHECK_EVERY = 16                                        # tokens between checks for finished samples on a GPU
CDF_SPAN = 128                                          # columns that inverse_cdf sums up at once
NUCLEUS_CANDIDATES = 1024                               # likeliest tokens that a CPU seeks a nucleus among first


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
    top_p: float                                                    # 1: no nucleus
    top_k: int                                                      # 0: the whole vocabulary

    def __post_init__(self) -> None:
        allowed = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature == 0 or 1e-6 <= self.temperature < float("inf"),
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
        }
        for name, in_range in allowed.items():
            if not in_range:
                raise ValueError(f"{name} is out of range: {getattr(self, name)}")


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
    with weights_in_compute_dtype(vlm), onednn_products(vlm, steps):
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
                prompts = prompts.to(vlm.device)
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


@contextmanager
def weights_in_compute_dtype(vlm: VLM) -> Iterator[None]:
    """Inside, the language model's weights are held in the dtype computed in, so that not every token casts them anew.

    Training holds them in fp32 under bf16 activations, since a bf16 weight cannot take its small steps. The tower is
    left alone. However the block is left, the weights are as before.
    """
    in_tower = {id(parameter) for parameter in vlm.tower.parameters()}
    dtype = vlm.dtype
    data_before = {}
    for parameter in vlm.parameters():
        if parameter.dtype != dtype and id(parameter) not in in_tower:
            data_before[parameter] = parameter.data

    try:
        for parameter in data_before:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in data_before.items():
            parameter.data = data


# ---- the loop over tokens

@dataclass
class Live:
    """The samples that are still being drawn. R falls as samples end."""
    rows: Tensor                # (R,) the row of the result that a sample's tokens go to
    done: Tensor                # (R,) bool: it has ended, and only fills a place
    position: Tensor            # (R,) of its first token
    uniforms: Tensor | None     # (R, max_new_tokens) what its tokens are drawn with; None: greedy

    def keep(self, index: Tensor) -> None:
        """Go on with these samples, (R',)."""
        self.rows = self.rows[index]
        self.done = self.done[index]
        self.position = self.position[index]
        if self.uniforms is not None:
            self.uniforms = self.uniforms[index]


def sample_batch(vlm: VLM, prompts: Prompts, n: int, sampling: Sampling, uniforms: Tensor | None) -> Tensor:
    """Token ids (R, up to max_new_tokens), padded with -1 after each sample's stop token.

    uniforms: (prompts, n, max_new_tokens), None: greedy. Samples that are finished are dropped as the batch goes on.
    NonFiniteLogits where logits are NaN or infinite: looked at after the first token, and again at the end.
    """
    device = vlm.device
    prompts = prompts.to(device)
    cache = vlm.new_cache(prompts, n)
    hidden = prefill(vlm, prompts, cache).repeat_interleave(n, 0)                             # (R, H)
    live = first_samples(prompts, n, uniforms)
    groups = len(prompts.numbers)                                                             # G

    banned = banned_tokens(vlm)
    stops = torch.tensor(sorted(vlm.stop_ids), device=device)
    result = torch.full((len(live.rows), sampling.max_new_tokens), -1, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)        # whether all logits that were drawn from were

    for t in range(sampling.max_new_tokens):
        logits = vlm.logits(hidden).float()                                                   # (R, V)
        largest = logits.amax(-1)                       # (R,); NaN where one of a row is
        finite = finite & (largest.isfinite() | live.done).all()
        if t == 0:
            vlm.check_finite(finite)
        logits.index_fill_(1, banned, -torch.inf)
        if live.uniforms is None:
            tokens = logits.argmax(-1)                                                        # (R,)
        else:
            scaled = logits.div_(sampling.temperature)
            tokens = draw_tokens(scaled, sampling.top_p, sampling.top_k, live.uniforms[:, t])
        result[live.rows, t] = tokens.masked_fill(live.done, -1)
        live.done = live.done | torch.isin(tokens, stops)

        if t + 1 == sampling.max_new_tokens:
            break
        # To read `done` is to wait until a GPU has finished all that was queued, so there it is read now and then only.
        if device.type == "cpu" or t % CHECK_EVERY == CHECK_EVERY - 1:
            if bool(live.done.all()):
                break
            kept_groups, kept_samples = unfinished(live.done, groups)
            # Dropping samples copies what the cache holds of the others: worth it once a quarter of them can go.
            if 4 * len(kept_samples) <= 3 * len(live.rows):
                for layer in cache:
                    layer.keep(kept_groups, kept_samples)
                live.keep(kept_samples)
                tokens = tokens[kept_samples]
                groups = len(kept_groups)
        hidden = vlm.step(tokens, live.position + t, cache)
    vlm.check_finite(finite)
    return result[:, :t + 1]


def prefill(vlm: VLM, prompts: Prompts, cache: list[LayerCache]) -> Tensor:
    """Run the prompts once, filling `cache`: the states that predict their first sampled tokens, (G m, H)."""
    features = vlm.image_features(prompts.batch)
    hidden = vlm.hidden(prompts.batch, features, cache)                                       # (G, T, H)
    rows = torch.arange(len(hidden), device=hidden.device)
    last = hidden[rows[:, None], prompts.last]                                                # (G, m, H)
    return last.flatten(0, 1)


def first_samples(prompts: Prompts, n: int, uniforms: Tensor | None) -> Live:
    """All R samples, `n` of each prompt. Those of a prompt that is none (number -1) are done from the start."""
    numbers = prompts.numbers.flatten()                                                       # (G m,)
    position = prompts.position.flatten() + 1
    if uniforms is not None:
        uniforms = uniforms.to(numbers.device)[numbers].flatten(0, 1)                         # (R, max_new_tokens)

    numbers = numbers.repeat_interleave(n)                                                    # (R,)
    return Live(
        rows=torch.arange(len(numbers), device=numbers.device),
        done=numbers < 0,
        position=position.repeat_interleave(n),
        uniforms=uniforms,
    )


def unfinished(done: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """What is left to draw: the rows of prompts with unfinished samples, (G',), and which samples to keep, (R',).

    Rows must stay alike, so each keeps as many samples as the one with the most unfinished, its own unfinished ones
    first. done: (R,), R = groups * N.
    """
    left = ~done.view(groups, -1)                                                             # (G, N)
    N = left.shape[1]
    most = int(left.sum(1).max())
    kept_groups = left.any(1).nonzero()[:, 0]                                                 # (G',)

    left = left[kept_groups].byte()                                                           # (G', N)
    order = left.argsort(dim=1, descending=True, stable=True)
    first_sample = kept_groups[:, None] * N                                                   # (G', 1)
    kept_samples = first_sample + order[:, :most]                                             # (G', most)
    return kept_groups, kept_samples.flatten()


# ---- one draw

def draw_tokens(logits: Tensor, top_p: float, top_k: int, uniforms: Tensor) -> Tensor:
    """One token a row from softmax(logits), restricted to the top_k likeliest and, of these, to the nucleus: the
    smallest set that holds top_p of their probability.

    logits: (R, V) fp32; uniforms: (R,) in [0, 1), double; top_k 0 and top_p 1 restrict nothing -> (R,).
    """
    probabilities = logits.softmax(-1)                                                        # (R, V)
    if top_k == 0 and top_p == 1:
        return inverse_cdf(probabilities, uniforms)

    if top_k > 0:
        largest, tokens = probabilities.topk(min(top_k, logits.shape[-1]))                    # (R, k), largest first
        largest = largest.double()
        total = largest.cumsum(-1)[:, -1:]                                                    # (R, 1)
    else:
        total = probabilities.sum(-1, keepdim=True, dtype=torch.float64)
        largest, tokens = likeliest_tokens(probabilities, top_p * total)

    mass_before = largest.cumsum(-1) - largest
    nucleus = largest.masked_fill(mass_before >= top_p * total, 0)
    drawn = inverse_cdf(nucleus, uniforms)                                                    # (R,) a place in `tokens`
    return tokens.gather(1, drawn[:, None])[:, 0]


def likeliest_tokens(probabilities: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of (R, V), enough to hold `mass` (R, 1) in every row: their probabilities in double,
    largest first, and their ids, (R, k) each.

    On a CPU, where sorting the whole vocabulary would be slow, a few are tried first.
    """
    vocabulary = probabilities.shape[-1]
    k = vocabulary
    if probabilities.device.type == "cpu":
        k = min(NUCLEUS_CANDIDATES, vocabulary)

    while True:
        largest, tokens = probabilities.topk(k)
        largest = largest.double()
        if k == vocabulary:
            return largest, tokens
        held = largest.cumsum(-1)[:, -1:]                                                     # (R, 1)
        if bool((held >= mass).all()):
            return largest, tokens
        k = min(8 * k, vocabulary)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """A draw by inverse-CDF sampling: the first column at which a row's running sum exceeds its share `uniforms` of
    the row's total. That column has weight.

    weights: (R, V) not negative; uniforms: (R,) in [0, 1), double -> (R,). A running sum in double over the whole
    vocabulary costs as much as a decoder layer. So it runs over sums of CDF_SPAN columns first, and then inside one
    of these spans.
    """
    columns = weights.shape[1]
    missing = -columns % CDF_SPAN
    if missing > 0:
        weights = F.pad(weights, (0, missing))
    spans = weights.unflatten(1, (-1, CDF_SPAN))                                              # (R, spans, CDF_SPAN)

    span_cdf = spans.sum(-1).double().cumsum(-1)                                              # (R, spans)
    span, rest = locate_share(span_cdf, uniforms)                                             # (R, 1), (R,)

    chosen = spans.take_along_dim(span[..., None], 1)[:, 0]                                   # (R, CDF_SPAN)
    inside_cdf = chosen.double().cumsum(-1)
    column, _ = locate_share(inside_cdf, rest)                                                # (R, 1)
    # NaN in a row would give a column of the padding; what comes of such a row is refused once the batch is through.
    return (span * CDF_SPAN + column)[:, 0].clamp(max=columns - 1)


def locate_share(cdf: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Where running sums (R, C) first exceed their `shares` (R,) of the total: the column (R, 1), and the share of that
    column's own weight at which they do, (R,)."""
    total = cdf[:, -1]
    below_total = total * (1 - 1e-15)                   # rounding must not ask for more than there is
    wanted = (shares * total).minimum(below_total)[:, None]                                   # (R, 1)

    column = torch.searchsorted(cdf, wanted, right=True)                                      # (R, 1)
    column = column.clamp(max=cdf.shape[1] - 1)         # NaN is sorted behind everything

    before = F.pad(cdf, (1, 0)).gather(1, column)
    own_weight = cdf.gather(1, column) - before
    own_share = (wanted - before) / own_weight
    return column, own_share[:, 0]


def draw_uniforms(rows: Sequence[Row], n: int, steps: int, seed: int, seen: Counter[str]) -> Tensor:
    """Uniform numbers in double, (prompts, n, steps): each sample's come from a generator of its own.

    The generator's key is a hash of the seed, the prompt and the sample's number; `seen` counts the samples of equal
    prompts, and is updated.
    """
    uniforms = []
    for row in rows:
        content = np.array(row.ids).tobytes() + "".join(row.picture_keys).encode()
        prompt = hashlib.sha256(content).hexdigest()
        for _ in range(n):
            name = f"{seed} {prompt} {seen[prompt]}"
            seen[prompt] += 1
            digest = hashlib.sha256(name.encode()).digest()
            key = int.from_bytes(digest[:16], "little")
            generator = np.random.Generator(np.random.Philox(key=key))
            uniforms.append(generator.random(steps))
    return torch.from_numpy(np.stack(uniforms)).view(len(rows), n, steps)


# ---- token ids

def banned_tokens(vlm: VLM) -> Tensor:
    """Ids that are never sampled: placeholders of pictures, and rows of the head beyond the tokenizer's vocabulary."""
    processor = vlm.processor
    head_rows = len(vlm.head_weight)
    placeholders = [token for token in processor.never_sampled if token < head_rows]
    unknown = range(processor.vocabulary, head_rows)
    # The list may be empty, so the dtype is given: Llama-3.2-Vision's head has rows for what may be sampled only.
    return torch.tensor([*placeholders, *unknown], dtype=torch.long, device=vlm.device)


def finish(vlm: VLM, row: list[int]) -> Completion:
    """Cut the padding off a sampled row and decode it."""
    ids = [token for token in row if token >= 0]
    text = vlm.processor.decode(ids)
    reason = "stop" if ids[-1] in vlm.stop_ids else "length"
    return Completion(tuple(ids), text, reason)
