"""Samples as they are drawn: what has been drawn of each, and the steps that any way of decoding takes.

    gather      the prompts are computed once, and the first token of every sample is drawn
    advance     one more token for every sample
    compact     samples that have ended are dropped

`PlainSamples` decodes with the model's own layers, on any device. decode.py decodes on a GPU.

Letters as in sampler.py: G rows of up to m prompts, n samples a prompt, R samples, H hidden size, V vocabulary.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .attention import LayerCache
from .draw import Nucleus, Sampling, draw
from .prompts import Prompts
from .vlm import VLM


class Samples:
    """R samples, of each as many tokens drawn. R falls as samples end; until then all tensors stay in place."""
    nucleus: Nucleus | None = None                      # how one is found: see draw_tokens

    def __init__(self, vlm: VLM, prompts: Prompts, n: int, sampling: Sampling, uniforms: Tensor | None, rows: Tensor):
        """prompts: on the model's device; uniforms: (prompts, n, max_new_tokens), None: greedy; rows: (R,), the
        samples' numbers among the G m n that may be, each prompt's n beside each other."""
        device = vlm.device
        which = rows // n                                                                 # (R,) of the G m prompts
        numbers = prompts.numbers.flatten()[which]                                        # (R,) -1: it is none

        self.vlm = vlm
        self.sampling = sampling
        self.rows = rows                                # (R,) the row of the result that a sample's tokens go to
        self.done = numbers < 0                         # (R,) bool: it has ended, and only fills a place
        self.position = prompts.position.flatten()[which] + 1                             # (R,) of its next token
        self.tokens = torch.zeros_like(rows)            # (R,) the newest ones
        self.place = torch.zeros(1, dtype=torch.long, device=device)                      # tokens drawn of each
        self.uniforms = None                            # (R, max_new_tokens)
        if uniforms is not None:
            self.uniforms = uniforms.to(device)[numbers, rows % n]

        result = (prompts.numbers.numel() * n, sampling.max_new_tokens)
        self.result = torch.full(result, -1, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)   # whether all logits that were drawn from were
        self.banned = banned_tokens(vlm)
        self.stops = torch.tensor(sorted(vlm.stop_ids), device=device)

    def draw(self, hidden: Tensor) -> None:
        """One token a sample, from the states that predict it, (R, H)."""
        logits = self.vlm.logits(hidden).float()                                          # (R, V)
        logits.index_fill_(1, self.banned, -torch.inf)
        uniforms = None
        if self.uniforms is not None:
            uniforms = self.uniforms.index_select(1, self.place)[:, 0]                    # (R,)
        tokens, finite = draw(logits, self.sampling, uniforms, self.nucleus)

        self.finite &= (finite | self.done).all()
        self.result[self.rows, self.place] = tokens.masked_fill(self.done, -1)
        self.done |= torch.isin(tokens, self.stops)
        self.tokens.copy_(tokens)
        self.place += 1

    def check_finite(self) -> None:
        """NonFiniteLogits if any logits so far were NaN or infinite. On a GPU this waits for all that was queued."""
        self.vlm.check_finite(self.finite)

    def advance(self) -> None:
        """One more token for every sample."""
        raise NotImplementedError

    def compact(self) -> bool:
        """Drop samples that have ended, if enough can go; whether any is left that has not."""
        raise NotImplementedError

    def keep(self, samples: Tensor) -> None:
        """Go on with these of the R samples, (R',)."""
        self.rows = self.rows[samples]
        self.done = self.done[samples]
        self.position = self.position[samples]
        self.tokens = self.tokens[samples]
        if self.uniforms is not None:
            self.uniforms = self.uniforms[samples]


class PlainSamples(Samples):
    """Samples decoded by the model's own layers. Every row of prompts has equally many: R = G N."""

    def __init__(self, vlm: VLM, prompts: Prompts, n: int, sampling: Sampling, uniforms: Tensor | None):
        """Compute the prompts, and draw the first token of each sample."""
        rows = torch.arange(prompts.numbers.numel() * n, device=prompts.numbers.device)
        super().__init__(vlm, prompts, n, sampling, uniforms, rows)
        self.groups = len(prompts.numbers)                                                # G
        self.cache: list[LayerCache] = vlm.new_cache(prompts, n)
        hidden = prefill(vlm, prompts, self.cache)                                        # (G m, H)
        self.draw(hidden.repeat_interleave(n, 0))

    def advance(self) -> None:
        hidden = self.vlm.step(self.tokens, self.position, self.cache)                    # (R, H)
        self.position += 1
        self.draw(hidden)

    def compact(self) -> bool:
        if bool(self.done.all()):
            return False
        kept_groups, kept_samples = unfinished(self.done, self.groups)
        # Dropping samples copies what the cache holds of the others: worth it once a quarter of them can go.
        if 4 * len(kept_samples) <= 3 * len(self.rows):
            for layer in self.cache:
                layer.keep(kept_groups, kept_samples)
            self.keep(kept_samples)
            self.groups = len(kept_groups)
        return True


def prefill(vlm: VLM, prompts: Prompts, cache: list[LayerCache]) -> Tensor:
    """Run the prompts once, filling `cache`: the states that predict their first sampled tokens, (G m, H)."""
    features = vlm.image_features(prompts.batch)
    hidden = vlm.hidden(prompts.batch, features, cache)                                       # (G, T, H)
    rows = torch.arange(len(hidden), device=hidden.device)
    last = hidden[rows[:, None], prompts.last]                                                # (G, m, H)
    return last.flatten(0, 1)


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


def banned_tokens(vlm: VLM) -> Tensor:
    """Ids that are never sampled: placeholders of pictures, and rows of the head beyond the tokenizer's vocabulary."""
    processor = vlm.processor
    head_rows = len(vlm.head_weight)
    placeholders = [token for token in processor.never_sampled if token < head_rows]
    unknown = range(processor.vocabulary, head_rows)
    # The list may be empty, so the dtype is given: Llama-3.2-Vision's head has rows for what may be sampled only.
    return torch.tensor([*placeholders, *unknown], dtype=torch.long, device=vlm.device)
