"""One draw: a token for every sample, from logits and a uniform number.

A token is drawn by inverting the cumulative distribution at the uniform number, so that a draw is a few sums. Where
only a nucleus is drawn from (top_p), what belongs to it is found in one of two ways:

    on a CPU    the likeliest tokens are sorted, 1,024 at first
    on a GPU    a threshold is sought by halving: sorting a whole vocabulary there takes longer than the model

Both keep the same tokens with the same probabilities. They do not lay them out in the same order, so a uniform number
may draw another token on a GPU than on a CPU.

Letters: R samples, V vocabulary, k of the likeliest tokens.
"""
from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Row

CDF_SPAN = 128                                          # columns that inverse_cdf sums up at once
NUCLEUS_CANDIDATES = 1024                               # likeliest tokens that a CPU seeks a nucleus among first
THRESHOLD_BITS = 30                                     # of a float in [0, 1]: those above are 0
Nucleus = Callable[[Tensor, float], Tensor]             # nucleus_by_threshold, compiled or not


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


def draw(logits: Tensor, sampling: Sampling, uniforms: Tensor | None, nucleus: Nucleus | None = None
         ) -> tuple[Tensor, Tensor]:
    """One token a row, and whether the row's logits could be drawn from: not if one is NaN, or the largest infinite.

    logits: (R, V) fp32, which may be overwritten; uniforms: (R,) in [0, 1), double, None: greedy; nucleus: see
    draw_tokens -> (R,), (R,) bool.
    """
    if uniforms is None:
        largest, tokens = logits.max(-1)                # NaN where one of a row is
        return tokens, largest.isfinite()
    scaled = logits.div_(sampling.temperature)
    return draw_tokens(scaled, sampling.top_p, sampling.top_k, uniforms, nucleus)


def draw_tokens(logits: Tensor, top_p: float, top_k: int, uniforms: Tensor, nucleus: Nucleus | None = None
                ) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits), restricted to the top_k likeliest and, of these, to the nucleus: the
    smallest set that holds top_p of their probability.

    logits: (R, V) fp32; uniforms: (R,) in [0, 1), double; top_k 0 and top_p 1 restrict nothing; nucleus: what finds it
    in a whole vocabulary (None: the likeliest are sorted) -> tokens (R,), and (R,) bool, False where the logits'
    softmax is no number.
    """
    probabilities = logits.softmax(-1)                                                        # (R, V)
    if top_k == 0 and (top_p == 1 or nucleus is not None):
        kept = probabilities if top_p == 1 else nucleus(probabilities, top_p)
        drawn, total = inverse_cdf(kept, uniforms)
        return drawn, total.isfinite()

    if top_k > 0:
        largest, tokens = probabilities.topk(min(top_k, logits.shape[-1]))                    # (R, k), largest first
        largest = largest.double()
        total = largest.cumsum(-1)[:, -1:]                                                    # (R, 1)
    else:
        total = probabilities.sum(-1, keepdim=True, dtype=torch.float64)
        largest, tokens = likeliest_tokens(probabilities, top_p * total)

    mass_before = largest.cumsum(-1) - largest
    kept = largest.masked_fill(mass_before >= top_p * total, 0)
    drawn, _ = inverse_cdf(kept, uniforms)                                                    # (R,) a place in `tokens`
    return tokens.gather(1, drawn[:, None])[:, 0], total[:, 0].isfinite()


def likeliest_tokens(probabilities: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of (R, V), enough to hold `mass` (R, 1) in every row: their probabilities in double,
    largest first, and their ids, (R, k) each.

    Sorting the whole vocabulary would be slow, so a few are tried first.
    """
    vocabulary = probabilities.shape[-1]
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


def nucleus_by_threshold(probabilities: Tensor, top_p: float) -> Tensor:
    """The probabilities of the nucleus, 0 for all other tokens: (R, V) -> (R, V). Nothing is sorted or waited for.

    The nucleus is what lies above a threshold, and of the tokens that lie on it as many as are needed, those with the
    lowest ids. The threshold is the largest number above which, itself included, top_p of the mass lies. Floats that
    are not negative have the order of their bits, read as integers, so it is found exactly, bit by bit from the
    highest.
    """
    wanted = top_p * probabilities.sum(-1, keepdim=True, dtype=torch.float64)                 # (R, 1)
    bits = torch.zeros_like(wanted, dtype=torch.int32)                                        # (R, 1) of the threshold
    for bit in reversed(range(THRESHOLD_BITS)):
        higher = bits + (1 << bit)
        mass = mass_without(probabilities, probabilities < higher.view(torch.float32))
        bits = torch.where(mass >= wanted, higher, bits)

    threshold = bits.view(torch.float32)
    on_it = probabilities == threshold                                                        # (R, V)
    above = mass_without(probabilities, probabilities <= threshold)                           # (R, 1)
    needed = ((wanted - above) / threshold).ceil()      # of those on it
    is_spare = on_it & (on_it.cumsum(-1, dtype=torch.int32) > needed)
    return probabilities.masked_fill((probabilities < threshold) | is_spare, 0)


def mass_without(probabilities: Tensor, dropped: Tensor) -> Tensor:
    """The sum of those that are not dropped, in double: (R, V), (R, V) bool -> (R, 1)."""
    return probabilities.masked_fill(dropped, 0).sum(-1, keepdim=True, dtype=torch.float64)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """A draw by inverse-CDF sampling: the first column at which a row's running sum exceeds its share `uniforms` of
    the row's total. That column has weight.

    weights: (R, V) not negative; uniforms: (R,) in [0, 1), double -> the column (R,), and the total (R,). A running
    sum in double over the whole vocabulary costs as much as a decoder layer. So it runs over sums of CDF_SPAN columns
    first, and then inside one of these spans.
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
    drawn = (span * CDF_SPAN + column)[:, 0].clamp(max=columns - 1)
    return drawn, span_cdf[:, -1]


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
