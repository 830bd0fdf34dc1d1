"""Where samples stand while a GPU decodes them, and their attention to it. (What for: decode.py.)

A sample attends to what the prompts of its row share, whose keys all samples of the row read together, and to its own
tokens: what its prompt does not share, then what was sampled. Two prompts that begin alike, one sample of each:

    row of prompts         a b c d e f g          shared: a b c
    sample of the first    d e 1 2 _ _            own: 4 of 6 places
    sample of the second   f g 1 2 _ _

No mask is needed: an entry, a row of prompts or a sample, reads the first so many of its places.

Letters: G rows of up to m prompts, P columns of a row, R samples, E own tokens of the longest prompt; B entries, S
places for keys of each, Q queries of all; nh query heads, nk key-value heads, g = nh / nk, hd head width.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import HALF_PRECISION
from .prompts import Prompts


@dataclass
class Entries:
    """Which queries read which keys: entry i of B has the queries starts[i] .. starts[i + 1], at most `most`, and of S
    places for keys the first used[i]."""
    starts: Tensor              # (B + 1,) int32
    most: int
    places: Tensor              # (B + 1,) int32: where an entry's places for keys begin, if all stand in one row
    used: Tensor                # (B,) int32

    @staticmethod
    def of(counts: Tensor, most: int, used: Tensor, S: int) -> Entries:
        """counts: (B,) queries of each entry; used: (B,) keys of each, of S places."""
        starts = F.pad(counts.cumsum(0), (1, 0))                                # (B + 1,)
        places = torch.arange(len(counts) + 1, device=counts.device) * S        # (B + 1,)
        return Entries(starts.int(), most, places.int(), used.int())


@dataclass
class Places:
    """Where the R samples stand, in order of their rows of prompts: for all layers the same.

    The query heads that share a key-value head are g queries of it. So a sample has g queries, and a row of prompts has
    those of its samples.
    """
    group: int                  # g
    row: Tensor                 # (R,) a sample's row of prompts
    each: Tensor                # (R,) 0, 1, ..
    held: Tensor                # (R,) own tokens: where the next one goes
    columns: int                # P
    room: int                   # own tokens that there are places for
    shared: Entries             # each row's samples, and what its prompts share
    own: Entries                # each sample, and its own tokens with the newest one

    @staticmethod
    def of(row: Tensor, held: Tensor, shared: Tensor, columns: int, room: int, group: int) -> Places:
        """row, held: (R,); shared: (G,) of `columns`; room: for how many own tokens. A GPU is waited for."""
        samples = torch.bincount(row, minlength=len(shared))                    # (G,)
        most = int(samples.max())
        one_each = torch.ones_like(row)
        return Places(
            group=group,
            row=row,
            each=torch.arange(len(row), device=row.device),
            held=held.clone(),
            columns=columns,
            room=room,
            shared=Entries.of(samples * group, most * group, shared, columns),
            own=Entries.of(one_each * group, group, held + 1, room),
        )

    def keep(self, samples: Tensor, room: int) -> Places:
        """Those of these samples, (R',), in order, with that much room. A GPU is waited for."""
        row = self.row[samples]
        held = self.held[samples]
        return Places.of(row, held, self.shared.used, self.columns, room, self.group)

    def advance(self) -> None:
        """Every sample holds one token more."""
        self.held += 1
        self.own.used += 1


def own_columns(prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """What prompts share with the others of their row, and what they do not: the columns that are shared (G,), the
    tokens of each prompt that are not (G m,), and their columns (G m, E), any ones where a prompt has fewer."""
    shared = prompts.visible.all(1).sum(-1)                                     # (G,)
    assert int(shared.min()) > 0, "a chat begins with its template"
    own = prompts.visible.sum(-1) - shared[:, None]                             # (G, m)
    first = prompts.last + 1 - own                                              # (G, m)
    offset = torch.arange(int(own.max()), device=own.device)
    columns = first[..., None] + offset                                         # (G, m, E)
    columns = columns.clamp(max=prompts.visible.shape[-1] - 1)
    return shared, own.flatten(), columns.flatten(0, 1)


# ---- attention

def attend_lse(q: Tensor, k: Tensor, v: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """Attention of the entries' queries to their keys, and the log-sum-exp of each query's scores.

    q: (Q, nk, hd); k, v: (B, S, nk, hd) -> (Q, nk, hd), (Q, nk) fp32.
    """
    head_dim = q.shape[-1]
    has_flash = q.is_cuda and q.dtype in HALF_PRECISION and head_dim % 8 == 0 and head_dim <= 256
    if not has_flash:
        return attend_lse_plainly(q, k, v, entries)
    y, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k.flatten(0, 1), v.flatten(0, 1),
        entries.starts, entries.places, entries.most, k.shape[1],
        0.0, False, False,                              # no dropout, not causal, nothing for debugging
        seqused_k=entries.used,
    )
    return y, lse.mT                                                            # lse: (nk, Q)


def attend_lse_plainly(q: Tensor, k: Tensor, v: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """attend_lse where there is no such kernel: in fp32, and on a CPU. An entry is filled up to `most` queries."""
    Q, S = len(q), k.shape[1]
    offset = torch.arange(entries.most, device=q.device)
    filled = entries.starts[:-1, None] + offset                                 # (B, most) the number of a query
    queries = q[filled.clamp(max=Q - 1)]                                        # (B, most, nk, hd)

    scores = torch.einsum("bqhd,bshd->bhqs", queries, k).float()                # (B, nk, most, S)
    scores = scores * q.shape[-1] ** -0.5
    beyond = torch.arange(S, device=q.device) >= entries.used[:, None]          # (B, S)
    scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)                                                  # (B, nk, most)
    weights = scores.softmax(-1).to(q.dtype)
    y = torch.einsum("bhqs,bshd->bqhd", weights, v)                             # (B, most, nk, hd)

    number = torch.arange(Q, dtype=torch.int32, device=q.device)
    entry = torch.searchsorted(entries.starts, number, right=True) - 1          # (Q,) whose query it is
    place = number - entries.starts[entry]
    return y[entry, place], lse.transpose(1, 2)[entry, place]


def by_key_head(q: Tensor, group: int) -> Tensor:
    """Queries by the key-value head that they read: (R, nh, hd) -> (R g, nk, hd)."""
    q = q.unflatten(1, (-1, group))                                             # (R, nk, g, hd)
    return q.transpose(1, 2).flatten(0, 1)


def by_query_head(y: Tensor, group: int) -> Tensor:
    """The way back: (R g, nk, hd) -> (R, nh hd)."""
    y = y.unflatten(0, (-1, group))                                             # (R, g, nk, hd)
    return y.transpose(1, 2).flatten(1)
