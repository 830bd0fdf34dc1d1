"""Decoding on a GPU: the work of samples.PlainSamples in few, large operations that wait for nothing.

A decode step reads all weights for a handful of rows, so a GPU is done with each operation before the next one can be
launched. What takes the time is their number, and every look at a result. Hence here:

    static places       What changes from token to token is a tensor that changes in place. So a step can be captured
                        once as a CUDA graph, and replayed by a single launch.
    attention in two    Of each sample to what the prompts of its row share, whose keys are read once for the row, and
                        to its own tokens (places.py). The log-sum-exps of the scores make one softmax of the two:

                            y = w y_shared + (1 - w) y_own,    w = sigmoid(lse_shared - lse_own)

    joint products      q, k and v of a layer come out of one product, and so do gate and up (joint.py).
    compiled layers     torch.compile makes one kernel of small operations that follow each other.

Capture and compilation are left out while `vlm.eager` is set, as it is at first: neither has run on a GPU.

Letters: G rows of up to m prompts, P columns of a row, n samples a prompt, R samples, E own tokens of the longest
prompt; S picture tokens of a row; H hidden size, nh query heads, nk key-value heads, g = nh / nk, hd head width.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import LayerCache
from .compiled import compiled, timed_once
from .draw import Sampling, nucleus_by_threshold
from .joint import product
from .layers import DecoderLayer, RMSNorm, SelfAttention, SwiGLU
from .mllama import CrossCache, CrossLayer
from .mllama_vision import gate
from .places import Entries, Places, attend_lse, by_key_head, by_query_head, own_columns
from .prompts import Prompts
from .samples import Samples, prefill
from .vlm import VLM

FIRST_ROOM = 128                                        # sampled tokens that there is room for at first


# ---- a layer and a token of each sample

@dataclass
class SelfState:
    """What a layer of self-attention reads: keys and values of the prompts, which stay, and each sample's own."""
    prompt_k: Tensor                                                            # (G, P, nk, hd)
    prompt_v: Tensor
    own_k: Tensor                                                               # (R, room, nk, hd)
    own_v: Tensor
    norm: Tensor | None         # (nh + nk, hd) the weights of q's and k's norm; None: they have none

    def keep(self, samples: Tensor, places: Places) -> None:
        """Go on with these of the R samples, (R',), which stand at `places`."""
        self.own_k = with_room(self.own_k[samples], places.room)
        self.own_v = with_room(self.own_v[samples], places.room)


@dataclass
class CrossState:
    """What a layer of cross-attention reads: the pictures' keys and values, first those that a row's samples see."""
    k: Tensor                                                                   # (G, S, nk, hd)
    v: Tensor
    entries: Entries            # each row's samples, and the keys that they see
    blind: Tensor                                                               # (R, 1) bool: nothing is seen
    mlp_blind: Tensor                                                           # (R, 1) bool: and the MLP is silent

    def keep(self, samples: Tensor, places: Places) -> None:
        """Go on with these of the R samples, (R',), which stand at `places`."""
        self.entries = replace(self.entries, starts=places.shared.starts, most=places.shared.most)
        self.blind = self.blind[samples]
        self.mlp_blind = self.mlp_blind[samples]


def self_state(layer: DecoderLayer, cache: LayerCache, columns: Tensor, places: Places) -> SelfState:
    """What a pass over the prompts left in `cache`, and room for each sample's own tokens; columns: (R, E), where these
    stand in its row."""
    k, v = cache.prompt                                                         # (G, nk, P, hd) each
    prompt_k = k.transpose(1, 2).contiguous()                                   # (G, P, nk, hd)
    prompt_v = v.transpose(1, 2).contiguous()
    row = places.row[:, None]                                                   # (R, 1)
    own_k = prompt_k[row, columns]                                              # (R, E, nk, hd)
    own_v = prompt_v[row, columns]

    attention = layer.self_attn
    norm = None
    if isinstance(attention.q_norm, RMSNorm):
        nk = prompt_k.shape[2]
        norms = (
            attention.q_norm.weight.expand(nk * places.group, -1),              # (nh, hd)
            attention.k_norm.weight.expand(nk, -1),                             # (nk, hd)
        )
        norm = torch.cat(norms).to(prompt_k.dtype)
    own_k = with_room(own_k, places.room)
    own_v = with_room(own_v, places.room)
    return SelfState(prompt_k, prompt_v, own_k, own_v, norm)


def cross_state(cache: CrossCache, places: Places) -> CrossState | None:
    """What a pass over the prompts left in `cache`; None without pictures."""
    if cache.inputs is None:
        return None
    seen = cache.inputs.mask[:, 0, 0]                                           # (G, S) by a prompt's last token
    seen_first = (~seen).byte().argsort(dim=1, stable=True)                     # (G, S)
    rows = torch.arange(len(seen), device=seen.device)
    rows = rows[:, None]
    attends = cache.inputs.attends[:, 0]                                        # (G, 1)
    mlp_acts = cache.inputs.mlp_acts[:, 0]                                      # (G, 1)
    S = seen.shape[1]
    return CrossState(
        k=cache.k.transpose(1, 2)[rows, seen_first],
        v=cache.v.transpose(1, 2)[rows, seen_first],
        entries=replace(
            places.shared,
            places=torch.arange(len(seen) + 1, device=seen.device).int() * S,
            used=seen.sum(1).int(),
        ),
        blind=~attends[places.row],
        mlp_blind=~mlp_acts[places.row],
    )


def with_room(x: Tensor, room: int) -> Tensor:
    """Room for that many own tokens, filled up with zeros: (R, S, nk, hd) -> (R, room, nk, hd)."""
    missing = room - x.shape[1]
    if missing == 0:
        return x
    return F.pad(x, (0, 0, 0, 0, 0, missing))


def self_layer(layer: DecoderLayer, x: Tensor, rope: tuple[Tensor, Tensor], held: SelfState, places: Places) -> Tensor:
    """DecoderLayer for one token a sample: (R, H) -> (R, H)."""
    attention = layer.self_attn
    g = places.group
    nk, hd = held.own_k.shape[2:]

    y = normed(layer.input_layernorm, x)
    qkv = product(y, attention.joint, attention.q_proj, attention.k_proj, attention.v_proj)
    heads = qkv.unflatten(1, (-1, hd))                                          # (R, nh + 2 nk, hd)
    qk, v = heads.split((nk * g + nk, nk), 1)
    if held.norm is not None:
        qk = F.rms_norm(qk, (hd,), eps=attention.q_norm.eps) * held.norm
    qk = rotated(qk, *rope)
    q, k = qk.split((nk * g, nk), 1)                                            # (R, nh, hd), (R, nk, hd)

    held.own_k[places.each, places.held] = k
    held.own_v[places.each, places.held] = v
    q = by_key_head(q, g)                                                       # (R g, nk, hd)
    shared, shared_lse = attend_lse(q, held.prompt_k, held.prompt_v, places.shared)
    own, own_lse = attend_lse(q, held.own_k, held.own_v, places.own)
    weight = (shared_lse - own_lse).sigmoid().to(x.dtype)                       # (R g, nk)
    y = torch.lerp(own, shared, weight[..., None])                              # (R g, nk, hd)
    x = x + attention.o_proj(by_query_head(y, g))

    return x + feed_forward(layer.mlp, normed(layer.post_attention_layernorm, x))


def cross_layer(layer: CrossLayer, x: Tensor, held: CrossState, places: Places) -> Tensor:
    """CrossLayer for one token a sample: (R, H) -> (R, H)."""
    attention = layer.cross_attn
    q = attention.q_proj(normed(layer.input_layernorm, x))
    q = attention.q_norm(q.unflatten(1, (-1, attention.head_dim)))              # (R, nh, hd)
    q = by_key_head(q, places.group)                                            # (R g, nk, hd)
    y, _ = attend_lse(q, held.k, held.v, held.entries)
    y = attention.o_proj(by_query_head(y, places.group))
    x = x + gate(layer.cross_attn_attn_gate, y).masked_fill(held.blind, 0)

    y = feed_forward(layer.mlp, normed(layer.post_attention_layernorm, x))
    return x + gate(layer.cross_attn_mlp_gate, y).masked_fill(held.mlp_blind, 0)


def feed_forward(mlp: SwiGLU, x: Tensor) -> Tensor:
    """SwiGLU with a joint product: (R, H) -> (R, H)."""
    gated, up = product(x, mlp.joint, mlp.gate_proj, mlp.up_proj).chunk(2, -1)
    return mlp.down_proj(F.silu(gated) * up)


def normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm in one operation: rounded to the dtype of x once, after the weight."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


def rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """apply_rope with cos and sin for both halves, (R, 1, hd), the first half of sin negative."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), signed_sin)


# ---- the samples

class StaticSamples(Samples):
    """Samples in static places. There are none of a prompt that is none."""
    nucleus = staticmethod(nucleus_by_threshold)

    def __init__(self, vlm: VLM, prompts: Prompts, n: int, sampling: Sampling, uniforms: Tensor | None):
        """Compute the prompts, and draw the first token of each sample."""
        device = vlm.device
        shared, own, columns = own_columns(prompts)     # before they move: on a CPU a look at them waits for nothing
        is_real = (prompts.numbers.flatten() >= 0).repeat_interleave(n)                   # (G m n,)
        rows = is_real.nonzero()[:, 0]                                                    # (R,)
        which = rows // n                                                                 # (R,) of the G m prompts
        row = which // prompts.numbers.shape[1]                                           # (R,) of the G rows
        held = own[which].to(device)                                                      # (R,)
        prompts = prompts.to(device, vlm.dtype)
        super().__init__(vlm, prompts, n, sampling, uniforms, rows.to(device))

        self.filled = columns.shape[1]                  # own tokens of the sample with the most
        self.places = Places.of(
            row.to(device),
            held,
            shared.to(device),
            columns=prompts.visible.shape[-1],
            room=self.filled + min(FIRST_ROOM, sampling.max_new_tokens - 1),
            group=query_group(vlm),
        )
        hidden = self.prefill(prompts, n, columns[which].to(device))                      # (G m, H)
        self.draw(hidden[which.to(device)])
        self.plan()

    def prefill(self, prompts: Prompts, n: int, columns: Tensor) -> Tensor:
        """Run the prompts once, and hold what every layer will read: the last tokens' states, (G m, H).

        columns: (R, E), where a sample's own tokens stand in its row.
        """
        decoder = self.vlm.decoder
        caches = self.vlm.new_cache(prompts, n)
        hidden = prefill(self.vlm, prompts, caches)

        self.states: list[SelfState | CrossState | None] = []
        for layer, filled in zip(decoder.layers, caches, strict=True):
            if isinstance(layer, CrossLayer):
                self.states.append(cross_state(filled, self.places))
            else:
                self.states.append(self_state(layer, filled, columns, self.places))
                filled.prompt = None                    # its copy is held from here on

        frequencies = decoder.frequencies(hidden.device)                                  # (hd / 2,)
        self.frequencies = frequencies.repeat(2)                                          # (hd,)
        ones = torch.ones_like(frequencies)
        self.signs = torch.cat((-ones, ones))                                             # (hd,) see `rotated`
        return hidden

    def plan(self) -> None:
        """How the next steps are run: as they are written, or compiled, and captured from the second one on."""
        self.warm = False                               # whether a step has run since the tensors last moved
        self.replay: Callable[[], None] | None = None   # a captured step
        wrapped = as_it_is if self.vlm.eager else compiled
        self.self_layer = wrapped(self_layer)
        self.cross_layer = wrapped(cross_layer)
        self.nucleus = wrapped(nucleus_by_threshold)

    def advance(self) -> None:
        if self.filled == self.places.room:
            self.go_on(self.places.each, 2 * self.places.room)
        self.filled += 1

        if self.vlm.eager:
            self.step()
        elif not self.warm:
            self.first_step()
        else:
            if self.replay is None:
                self.replay = captured(self.step, self.vlm.device)
            self.replay()

    def first_step(self) -> None:
        """A step that is not captured: what is compiled, chosen or allocated at first use must not be."""
        with timed_once("decoding"):
            self.step()
        self.warm = True

    def step(self) -> None:
        """The newest tokens through the decoder, and the next ones drawn. All that changes changes in place."""
        decoder = self.vlm.decoder
        dtype = self.vlm.dtype
        angles = self.position.float()[:, None, None] * self.frequencies                  # (R, 1, hd)
        rope = angles.cos().to(dtype), (angles.sin() * self.signs).to(dtype)

        x = decoder.embed_tokens(self.tokens).to(dtype)                                   # (R, H)
        for layer, state in zip(decoder.layers, self.states, strict=True):
            if isinstance(state, SelfState):
                x = self.self_layer(layer, x, rope, state, self.places)
            elif state is not None:
                x = self.cross_layer(layer, x, state, self.places)
        hidden = normed(decoder.norm, x)

        self.places.advance()
        self.position += 1
        self.draw(hidden)

    def compact(self) -> bool:
        left = (~self.done).nonzero()[:, 0]                                               # (R',)
        # Dropping samples copies what the layers hold of the others, and a step is captured anew.
        if 0 < 4 * len(left) <= 3 * len(self.rows):
            self.go_on(left, self.places.room)
        return len(left) > 0

    def go_on(self, samples: Tensor, room: int) -> None:
        """Go on with these of the R samples, (R',), in order, and with room for that many own tokens."""
        self.plan()                                     # a captured step would read tensors that are left behind
        self.keep(samples)
        self.places = self.places.keep(samples, room)
        for state in self.states:
            if state is not None:
                state.keep(samples, self.places)


def query_group(vlm: VLM) -> int:
    """How many query heads share a key-value head."""
    attention = next(module for module in vlm.decoder.modules() if isinstance(module, SelfAttention))
    return attention.q_proj.out_features // attention.k_proj.out_features


def as_it_is(function: Callable) -> Callable:
    """The function itself."""
    return function


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step, whose tensors stay in place, as one launch: recorded as a CUDA graph, not run. On a CPU the step."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
