"""Attention in its forms: plain, in rows that branch (with a mask, or packed), inside segments, and from a key-value
cache.

Letters: B rows, T tokens of a row, S tokens attended to, nh query heads, nk key-value heads, g = nh / nk, hd head
width. In a tree: P columns of the longest prefix, m suffixes of the row with the most, E columns of the longest suffix.
While sampling: G rows of prompts of P tokens, N samples a row, R = G N samples, t tokens sampled so far.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_PRECISION = (torch.float16, torch.bfloat16)        # the dtypes that CUDA's flash attention takes


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads * hd) -> (B, heads, T, hd)."""
    x = x.unflatten(-1, (-1, head_dim))                                         # (B, T, heads, hd)
    return x.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(hd) + mask) v; key-value head j serves the query heads j g .. (j + 1) g - 1.

    q: (B, nh, T, hd); k, v: (B, nk, S, hd); mask: (B, 1, T, S) bool, True where allowed -> (B, nh, T, hd).
    """
    shares_heads = False
    if q.shape[1] != k.shape[1]:
        shares_heads = True                             # not `a != b`, which is no plain bool under torch.compile
    if shares_heads and mask is not None and q.is_cuda:
        # CUDA's fused kernel that takes a mask does not share k and v between query heads: repeat them.
        g = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(g, 1)                                           # (B, nh, S, hd)
        v = v.repeat_interleave(g, 1)
        shares_heads = False
    return F.scaled_dot_product_attention(
        q, k, v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=shares_heads,
    )


@dataclass(frozen=True)
class Tree:
    """Attention in rows that branch: [prefix | suffix 1 | .. | suffix m], each suffix blind to the other suffixes.

    The row "a b c | d e | f g h", x where the token on the left attends to the one above:

            a b c d e f g h
        a   x                       prefix, P = 3
        b   x x
        c   x x x
        d   x x x x                 suffix 1
        e   x x x x x
        f   x x x . . x             suffix 2, E = 3: d and e stand before it and are not seen
        g   x x x . . x x
        h   x x x . . x x x

    What is not seen is not computed either. The prefix is one causal sequence without a mask, and each suffix is a
    sequence of its own behind a copy of the prefix's keys and values, filled up (_) to P and E:

        a b c       a b c d e _       a b c f g h
    """
    prefix: int                                                                 # P
    sizes: Tensor                   # (B, 1 + m) tokens of each segment, on the CPU
    columns: Tensor                 # (B, m E) the column of each suffix token, suffix by suffix; any one where none is
    places: Tensor                  # (B, T) where in [P | E of suffix 1 | .. | E of suffix m] each column is computed
    allowed: Tensor                                                             # (B m, 1, E, P + E) bool

    @staticmethod
    def of(segments: list[list[int]], length: int) -> Tree:
        """The tree of B rows of T = `length` columns, right-padded.

        segments[b] holds a number for each token of row b: 0 in the prefix, then 1 .. m in the suffixes, in this order.
        """
        B = len(segments)
        m = max(max(row) for row in segments)
        sizes = torch.tensor([segment_sizes(row, m) for row in segments])       # (B, 1 + m)
        ends = sizes.cumsum(1)                                                  # (B, 1 + m) the column after a segment
        P = int(sizes[:, 0].max())
        E = int(sizes[:, 1:].max())

        # From the row to the suffixes. A suffix begins where the segment before it ends.
        offset = torch.arange(E)
        columns = ends[:, :-1, None] + offset                                   # (B, m, E)
        real = offset < sizes[:, 1:, None]                                      # (B, m, E) False where filled up

        # And back. A column of the prefix is computed in its own place; padding may read any place that exists.
        places = torch.arange(length).clamp(max=P - 1).repeat(B, 1)             # (B, T)
        row, suffix, position = real.nonzero(as_tuple=True)                     # of every suffix token
        places[row, columns[real]] = P + suffix * E + position

        # A suffix sees the prefix, except for its filling, and itself causally.
        prefix_real = torch.arange(P) < sizes[:, :1]                            # (B, P)
        sees_prefix = prefix_real[:, None, None].expand(-1, m, E, P)
        sees_itself = torch.ones(E, E, dtype=torch.bool).tril()
        sees_itself = sees_itself.expand(B, m, E, E)
        allowed = torch.cat((sees_prefix, sees_itself), -1)                     # (B, m, E, P + E)

        return Tree(
            prefix=P,
            sizes=sizes,
            columns=columns.clamp(max=length - 1).flatten(1),
            places=places,
            allowed=allowed.flatten(0, 1)[:, None],
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> AnyTree:
        """The same tree on `device`, for queries, keys and values of `dtype`.

        On a GPU it is packed where there is a kernel for that: in half precision.
        """
        if torch.device(device).type == "cuda" and dtype in HALF_PRECISION:
            return PackedTree.of(self.sizes, self.places.shape[1]).to(device)
        return Tree(
            self.prefix,
            self.sizes,                                 # stays: the host reads it
            self.columns.to(device),
            self.places.to(device),
            self.allowed.to(device),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (B, nh, T, hd); k, v: (B, nk, T, hd) -> (B, nh, T, hd)."""
        P = self.prefix
        prefix_q = q[:, :, :P]
        prefix_k = k[:, :, :P]
        prefix_v = v[:, :, :P]
        of_prefix = attend(prefix_q, prefix_k, prefix_v, causal=True)           # (B, nh, P, hd)

        of_suffixes = attend(
            self._suffixes(q),                                                  # (B m, nh, E, hd)
            self._behind_prefix(k),                                             # (B m, nk, P + E, hd)
            self._behind_prefix(v),
            self.allowed,
        )                                                                       # (B m, nh, E, hd)
        of_suffixes = of_suffixes.unflatten(0, (len(q), -1))                    # (B, m, nh, E, hd)
        of_suffixes = of_suffixes.transpose(1, 2).flatten(2, 3)                 # (B, nh, m E, hd)
        computed = torch.cat((of_prefix, of_suffixes), 2)                       # (B, nh, P + m E, hd)
        places = self.places[:, None, :, None].expand_as(q)
        return computed.gather(2, places)                                       # (B, nh, T, hd)

    def _suffixes(self, x: Tensor) -> Tensor:
        """The suffixes as sequences of their own: (B, h, T, hd) -> (B m, h, E, hd)."""
        B, heads, _, hd = x.shape
        m = len(self.allowed) // B
        columns = self.columns[:, None, :, None]                                # (B, 1, m E, 1)
        columns = columns.expand(-1, heads, -1, hd)
        suffixes = x.gather(2, columns)                                         # (B, h, m E, hd)
        suffixes = suffixes.unflatten(2, (m, -1))                               # (B, h, m, E, hd)
        return suffixes.transpose(1, 2).flatten(0, 1)

    def _behind_prefix(self, x: Tensor) -> Tensor:
        """Each suffix behind a copy of its row's prefix: (B, h, T, hd) -> (B m, h, P + E, hd)."""
        m = len(self.allowed) // len(x)
        prefix = x[:, :, :self.prefix]                                          # (B, h, P, hd)
        copies = prefix.repeat_interleave(m, 0)                                 # (B m, h, P, hd)
        suffixes = self._suffixes(x)                                            # (B m, h, E, hd)
        return torch.cat((copies, suffixes), 2)


@dataclass(frozen=True)
class PackedTree:
    """The same attention in one call of a kernel for sequences of any lengths: nothing is filled up, nothing masked.

    The queries of all sequences stand one behind the other, and so do their keys, the prefix's again for each suffix:

        queries     a b c   d e         f g h
        keys        a b c   a b c d e   a b c f g h

    Causal, aligned at the bottom right: a sequence's last query sees all its keys, the one before all but the last. The
    Q queries are all tokens of all rows, each once; of the K keys a prefix's stand there several times.
    """
    queries: Tensor                 # (Q,) the place of each query in a sequence of all B T columns
    keys: Tensor                    # (K,) that of each key
    starts: Tensor                  # (2, sequences + 1) int32 where each begins: the kernel's cu_seqlens of q, and of k
    most_queries: int               # of a sequence: its max_seqlen_q
    most_keys: int                  # its max_seqlen_k

    @staticmethod
    def of(sizes: Tensor, length: int) -> PackedTree:
        """sizes: (B, 1 + m), the tokens of each row's segments, its prefix first; length: T."""
        queries = []
        keys = []
        for b, row_sizes in enumerate(sizes.tolist()):
            start = b * length
            prefix = torch.arange(start, start + row_sizes[0])
            queries.append(prefix)
            keys.append(prefix)
            start += row_sizes[0]
            for size in row_sizes[1:]:
                if size == 0:                           # the row has fewer suffixes than another
                    continue
                suffix = torch.arange(start, start + size)
                queries.append(suffix)
                keys.append(torch.cat((prefix, suffix)))
                start += size

        lengths = torch.tensor([[len(part) for part in parts] for parts in (queries, keys)])
        starts = F.pad(lengths.cumsum(1), (1, 0))                               # (2, sequences + 1)
        most_queries, most_keys = lengths.amax(1).tolist()
        return PackedTree(torch.cat(queries), torch.cat(keys), starts.int(), most_queries, most_keys)

    def to(self, device: torch.device | str) -> PackedTree:
        """The same tree with its tensors on `device`."""
        return PackedTree(
            self.queries.to(device),
            self.keys.to(device),
            self.starts.to(device),
            self.most_queries,
            self.most_keys,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (B, nh, T, hd); k, v: (B, nk, T, hd) -> (B, nh, T, hd), zeros on padding."""
        B, _, _, hd = q.shape
        missing = -hd % 8                               # the kernel takes heads in multiples of 8: zeros change nothing
        packed = []
        for x, places in ((q, self.queries), (k, self.keys), (v, self.keys)):
            x = x.transpose(1, 2).flatten(0, 1)                                 # (B T, heads, hd)
            # index_select, whose backward pass adds up a prefix's gradients in any order; that of x[places] would sort.
            x = x.index_select(0, places)
            packed.append(F.pad(x, (0, missing)) if missing else x)

        query_starts, key_starts = self.starts
        y, *_ = torch.ops.aten._flash_attention_forward(
            *packed,
            query_starts, key_starts, self.most_queries, self.most_keys,
            0.0, True, False,                           # no dropout, causal, nothing for debugging
            scale=hd ** -0.5,
        )                                                                       # (Q, nh, hd)
        filled = q.new_zeros(B * q.shape[2], *y.shape[1:])                      # (B T, nh, hd)
        filled = filled.index_copy(0, self.queries, y)[..., :hd]
        return filled.unflatten(0, (B, -1)).transpose(1, 2)                     # (B, nh, T, hd)


AnyTree: TypeAlias = Tree | PackedTree


def segment_sizes(segments: list[int], m: int) -> list[int]:
    """The number of a row's tokens in segment 0 .. m."""
    sizes = [0] * (m + 1)
    for segment in segments:
        sizes[segment] += 1
    return sizes


def attend_segments(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Full attention inside each segment of a packed sequence, none across; neighbours of one length share a call.

    q, k, v: (sum of lengths, nh, hd) -> (sum of lengths, nh * hd).
    """
    outs = []
    start = 0
    for length, neighbours in groupby(lengths):
        count = len(list(neighbours))
        stop = start + count * length
        parts = []
        for x in (q, k, v):
            x = x[start:stop].unflatten(0, (count, length))                     # (count, length, nh, hd)
            parts.append(x.transpose(1, 2))                                     # (count, nh, length, hd)
        out = attend(*parts).transpose(1, 2)                                    # (count, length, nh, hd)
        outs.append(out.flatten(2).flatten(0, 1))                               # (count * length, nh * hd)
        start = stop
    return torch.cat(outs)


class LayerCache:
    """One decoder layer's keys and values while sampling.

    Those of the G rows of prompts are held once and read by all N samples of a row; what the R = G N samples add is
    held apart. A row may hold several prompts that begin alike: `bias` (G, N, P), in the dtype computed in, is 0 where
    the sample's own prompt stands and -inf elsewhere.
    """

    def __init__(self, bias: Tensor):
        self.bias = bias
        self.prompt: tuple[Tensor, Tensor] | None = None                        # k, v: (G, nk, P, hd)
        self.sampled: tuple[Tensor, Tensor] | None = None                       # k, v: (R, nk, room >= t, hd)
        self.length = 0                                                         # t

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token's k and v, (R, nk, 1, hd) each; returns all sampled so far, (R, nk, t, hd) each."""
        if self.sampled is None:
            self.sampled = k, v
        sampled_k, sampled_v = self.sampled
        if self.length == sampled_k.shape[2]:
            sampled_k = _with_double_room(sampled_k)
            sampled_v = _with_double_room(sampled_v)
            self.sampled = sampled_k, sampled_v

        t = self.length
        sampled_k[:, :, t] = k[:, :, 0]
        sampled_v[:, :, t] = v[:, :, 0]
        self.length = t + 1
        return sampled_k[:, :, :t + 1], sampled_v[:, :, :t + 1]

    def keep(self, groups: Tensor, samples: Tensor) -> None:
        """Go on with these of the G rows of prompts, (G',), and these of the R samples, (R',), in order.

        Every row keeps the same number of samples.
        """
        bias = self.bias.flatten(0, 1)[samples]                                 # (R', P)
        self.bias = bias.unflatten(0, (len(groups), -1))                        # (G', N', P)
        prompt_k, prompt_v = self.prompt
        self.prompt = prompt_k[groups], prompt_v[groups]
        if self.sampled is not None:
            sampled_k, sampled_v = self.sampled
            self.sampled = sampled_k[samples], sampled_v[samples]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token a sample to its prompt and to the sample's own tokens, this one included.

        q: (R, nh, 1, hd); k, v: (R, nk, 1, hd) -> (R, nh, 1, hd).
        """
        prompt_k, prompt_v = self.prompt
        own_k, own_v = self.append(k, v)                                        # (R, nk, t, hd)
        R, nh, _, hd = q.shape
        G, nk, P, _ = prompt_k.shape
        N = R // G
        g = nh // nk

        # The N samples of a row read its keys in one product, as if they were N g query heads.
        q = q.reshape(R, nk, g, hd) * hd ** -0.5
        to_prompt = _join_samples(q, G) @ prompt_k.mT                           # (G, nk, N g, P)
        to_prompt.unflatten(2, (N, g)).add_(self.bias[:, None, :, None])
        to_own = _join_samples(q @ own_k.mT, G)                                 # (G, nk, N g, t)

        # One softmax over both: a sample's tokens compete with its prompt's.
        scores = torch.cat((to_prompt, to_own), -1)                             # (G, nk, N g, P + t)
        weights = scores.float().softmax(-1).to(q.dtype)
        from_prompt = weights[..., :P] @ prompt_v                               # (G, nk, N g, hd)
        from_prompt = _part_samples(from_prompt, N)                             # (R, nk, g, hd)
        own_weights = _part_samples(weights[..., P:], N)                        # (R, nk, g, t)
        y = from_prompt + own_weights @ own_v                                   # (R, nk, g, hd)
        return y.reshape(R, nh, 1, hd)


def _with_double_room(x: Tensor) -> Tensor:
    """(R, nk, room, hd) -> (R, nk, 2 room, hd), the new half uninitialised."""
    new_half = torch.empty_like(x)
    return torch.cat((x, new_half), 2)


def _join_samples(x: Tensor, G: int) -> Tensor:
    """The samples of a row beside each other: (G N, nk, g, *) -> (G, nk, N g, *)."""
    x = x.unflatten(0, (G, -1))                                                 # (G, N, nk, g, *)
    x = x.transpose(1, 2)                                                       # (G, nk, N, g, *)
    return x.flatten(2, 3)


def _part_samples(x: Tensor, N: int) -> Tensor:
    """The way back: (G, nk, N g, *) -> (G N, nk, g, *)."""
    x = x.unflatten(2, (N, -1))                                                 # (G, nk, N, g, *)
    x = x.transpose(1, 2)                                                       # (G, N, nk, g, *)
    return x.flatten(0, 1)
