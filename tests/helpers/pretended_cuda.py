"""What CUDA has and a CPU has not, for pretended_gpu.py: graphs, streams, kernels that fuse, flash attention.

A graph's contract, which is emulated: nothing runs while it is captured; a replay runs the same operators on the same
memory with the same Python numbers; the host may not wait while one is captured.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
GIGABYTE = 1 << 30
FLASH_DTYPES = (torch.bfloat16, torch.float16)          # a test may add torch.float32, to compare tokens with a CPU's


# ---- graphs

class Tape(TorchDispatchMode):
    """torch.cuda.CUDAGraph. Tensors may be of any device: bench.py takes it on a GPU, to count what replays compute."""
    capturing: Tape | None = None

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}          # by id: what is written to, and a copy from before
        self.made: list[Tensor] = []                                # what the operators made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(value, Tensor):
                self.before.setdefault(id(value), (value, numbers(value).clone()))
        out = func(*args, **kwargs)
        outs = tensors_of(out)
        self.steps.append((func, args, kwargs, outs))
        if not func.is_view and not func._schema.is_mutable:
            self.made += outs
        return out

    def start(self) -> None:
        assert Tape.capturing is None, "two captures at once"
        Tape.capturing = self
        self.__enter__()

    def stop(self) -> None:
        """Nothing has run: what was written to is as before, what was made holds no numbers yet."""
        self.__exit__(None, None, None)
        Tape.capturing = None
        for tensor, before in reversed(self.before.values()):
            numbers(tensor).copy_(before)
        written = {id(tensor) for tensor, _ in self.before.values()}
        for tensor in self.made:
            if id(tensor) not in written and tensor.is_floating_point():
                numbers(tensor).fill_(torch.nan)

    def replay(self) -> None:
        for func, args, kwargs, outs in self.steps:
            again = tensors_of(func(*args, **kwargs))
            for old, new in zip(outs, again, strict=True):
                if numbers(old).data_ptr() != numbers(new).data_ptr():
                    numbers(old).copy_(numbers(new))

    def reset(self) -> None:
        self.steps.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 0)


class capture:
    """torch.cuda.graph"""

    def __init__(self, graph: Tape, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"):
        self.graph = graph

    def __enter__(self) -> None:
        self.graph.start()

    def __exit__(self, *error: object) -> None:
        self.graph.stop()


def is_capturing() -> bool:
    return Tape.capturing is not None


def numbers(x: Tensor) -> Tensor:
    """The tensor that holds the numbers of one of pretended_gpu.py, or x itself."""
    return getattr(x, "held", x)


def tensors_of(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor)]


@contextmanager
def taped_graphs() -> Iterator[None]:
    """Inside, torch.cuda captures tapes, on a real GPU too: every operator of a replay is dispatched again, and seen by
    torch's counter of FLOPs, which a graph is invisible to."""
    before = torch.cuda.CUDAGraph, torch.cuda.graph
    torch.cuda.CUDAGraph, torch.cuda.graph = Tape, capture
    try:
        yield
    finally:
        torch.cuda.CUDAGraph, torch.cuda.graph = before


# ---- torch.cuda

class Stream:
    """torch.cuda.Stream: here all work is done in order anyway."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def query(self) -> bool:
        return True


class Event(Stream):
    """torch.cuda.Event"""

    def record(self, stream: Any = None) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def not_compiled(function: Any = None, **options: Any) -> Any:
    """torch.compile, also as a decorator with options: the function as it is."""
    if function is None:
        return lambda function: function
    return function


def cuda_module(wait: Callable[[], None]) -> list[tuple[Any, str, Any]]:
    """(owner, name, value) of what one pretended GPU puts in place. `wait` is called where the host waits for it."""
    of_cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": nullcontext,
        "synchronize": lambda device=None: wait(),
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(name="pretended", total_memory=80 * GIGABYTE),
        "is_bf16_supported": lambda *args: True,
        "mem_get_info": lambda device=None: (80 * GIGABYTE, 80 * GIGABYTE),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": is_capturing,
        "CUDAGraph": Tape,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 0),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: Stream(),
    }
    found = [(torch.cuda, name, value) for name, value in of_cuda.items()]
    found.append((torch, "compile", not_compiled))
    found.append((nn.Module, "compile", lambda self, *args, **options: None))
    return found


# ---- kernels

def attention_kernel(q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    """The kernel that scaled_dot_product_attention takes on CUDA (sdp_utils.cpp of torch 2.11)."""
    shares_heads = q.shape[1] != k.shape[1]
    if mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        return "flash"
    if not shares_heads and (mask is None or mask.dim() == 4):
        return "memory-efficient"
    return "math: all scores in memory"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
              gqa: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)


def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
                       scale: float | None, gqa: bool) -> list[Tensor]:
    """The gradients of q, k and v, summed in fp32. Queries are aligned with the last keys where `causal`."""
    g = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(g, 1)                                    # (B, nh, S, hd)
    values = v.float().repeat_interleave(g, 1)
    scale = scale or q.shape[-1] ** -0.5
    scores = q.float() @ keys.mT * scale                                        # (B, nh, T, S)
    if causal:
        T, S = scores.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)

    grad = grad.float()
    grad_values = weights.mT @ grad                                             # (B, nh, S, hd)
    grad_weights = grad @ values.mT                                             # (B, nh, T, S)
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    grad_queries = grad_scores @ keys * scale                                   # (B, nh, T, hd)
    grad_keys = grad_scores.mT @ q.float() * scale                              # (B, nh, S, hd)

    # A key head has the gradients of all query heads that it serves.
    grad_keys = grad_keys.unflatten(1, (-1, g)).sum(2)                          # (B, nk, S, hd)
    grad_values = grad_values.unflatten(1, (-1, g)).sum(2)
    return [grad_queries.to(q.dtype), grad_keys.to(k.dtype), grad_values.to(v.dtype)]


def rms_norm(x: Tensor, shape: list[int], eps: float | None) -> Tensor:
    return F.rms_norm(x, shape, eps=eps)


def rms_norm_backward(grad: Tensor, x: Tensor, shape: list[int], eps: float | None) -> list[Tensor]:
    """Of y = x r, r = 1 / sqrt(mean(x^2) + eps): r (grad - y mean(grad y))."""
    assert len(shape) == 1 and eps is not None, "the norms of the project are over the last axis"
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = x * r
    return [r * (grad - y * (grad * y).mean(-1, keepdim=True))]


def weighted_norm(x: Tensor, weight: Tensor, shape: list[int], eps: float | None) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def weighted_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, shape: list[int],
                           eps: float | None) -> list[Tensor]:
    """Of y w, y as in rms_norm: the gradients of x and of w."""
    [grad_x] = rms_norm_backward(grad * weight, x, shape, eps)
    y = rms_norm(x, shape, eps)
    return [grad_x, (grad * y).flatten(0, -2).sum(0)]


def fused(forward: Callable[..., Tensor], backward: Callable[..., list[Tensor]], arguments: str) -> None:
    """An operator for what is one kernel on CUDA and several operators on a CPU, and one for its backward pass.

    What `backward` gives are the gradients of the first arguments; the others have none.
    """
    name = forward.__name__
    LIBRARY.define(f"{name}({arguments}) -> Tensor")
    LIBRARY.define(f"{name}_backward(Tensor grad, {arguments}) -> Tensor[]")
    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.inputs = inputs

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = getattr(FUSED, f"{name}_backward")(grad, *ctx.inputs)
        return (*found, *[None] * (len(ctx.inputs) - len(found)))
    torch.library.register_autograd(f"pretended::{name}", gradients, setup_context=keep, lib=LIBRARY)


FUSED = torch.ops.pretended
LIBRARY = torch.library.Library("pretended", "DEF")
fused(attention, attention_backward, "Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale, bool gqa")
fused(rms_norm, rms_norm_backward, "Tensor x, int[] shape, float? eps")


def flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, most_queries: int, most_keys: int,
          dropout: float, causal: bool, debug: bool, *, scale: float | None = None, seqused_k: Tensor | None = None,
          **rest: Any) -> tuple[Tensor, ...]:
    """aten._flash_attention_forward of packed sequences, by its contract, summed in fp32.

    q: (queries, heads, hd); k, v: (keys, key heads, hd); sequence b has the queries starts[b] .. starts[b + 1] and the
    keys from key_starts[b] on, `seqused_k`[b] of them where given. Returns what comes out and its log-sum-exps (heads,
    queries).
    """
    assert q.dtype in FLASH_DTYPES, f"flash attention of {q.dtype}"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "a head's numbers must stand side by side"
    assert starts.dtype == key_starts.dtype == torch.int32 and len(starts) == len(key_starts)
    assert dropout == 0 and not any(value is not None for value in rest.values())
    g = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], len(q)), torch.inf)
    unused = (torch.zeros(2, dtype=torch.long), torch.zeros(()), torch.zeros(0))
    if q.is_meta:
        return out, lse.to("meta"), *unused

    for b in range(len(starts) - 1):
        queries = slice(int(starts[b]), int(starts[b + 1]))
        first = int(key_starts[b])
        last = int(key_starts[b + 1]) if seqused_k is None else first + int(seqused_k[b])
        T = queries.stop - queries.start
        S = last - first
        assert T <= most_queries and S <= most_keys, f"{T} queries and {S} keys: more than was said"
        if T == 0:
            continue
        keys = k[first:last].float().repeat_interleave(g, 1)                    # (S, heads, hd)
        values = v[first:last].float().repeat_interleave(g, 1)
        scores = torch.einsum("thd,shd->hts", q[queries].float(), keys) * (scale or q.shape[-1] ** -0.5)
        if causal:                                      # aligned at the bottom right
            future = torch.ones(T, S, dtype=torch.bool).triu(1 + S - T)
            scores = scores.masked_fill(future, -torch.inf)
        lse[:, queries] = scores.logsumexp(-1)
        out[queries] = torch.einsum("hts,shd->thd", scores.softmax(-1), values).to(q.dtype)
    return out, lse, *unused


def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
                   key_starts: Tensor, most_queries: int, most_keys: int, dropout: float, causal: bool,
                   *_: Any, scale: float | None = None, **rest: Any) -> tuple[Tensor, ...]:
    """aten._flash_attention_backward: the gradients of q, k and v. A key may stand in one sequence only."""
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    if q.is_meta:
        return tuple(grads)
    for b in range(len(starts) - 1):
        queries = slice(int(starts[b]), int(starts[b + 1]))
        keys = slice(int(key_starts[b]), int(key_starts[b + 1]))
        # (T, heads, hd) -> (1, heads, T, hd), and back
        alone = [x.transpose(0, 1)[None] for x in (grad[queries], q[queries], k[keys], v[keys])]
        found = attention_backward(*alone, None, causal, scale, True)
        for whole, part, columns in zip(grads, found, (queries, keys, keys)):
            whole[columns] = part[0].transpose(0, 1)
    return tuple(grads)


def product_in(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.mm(a, b, out_dtype=dtype), which a CPU does not have."""
    return a.to(dtype) @ b.to(dtype)


SUBSTITUTES = {
    aten._flash_attention_forward.default: flash,
    aten._flash_attention_backward.default: flash_backward,
    aten.mm.dtype: product_in,
}
fused(weighted_norm, weighted_norm_backward, "Tensor x, Tensor weight, int[] shape, float? eps")
