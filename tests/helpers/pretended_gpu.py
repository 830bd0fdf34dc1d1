"""A GPU that is not there: tensors that say cuda:0 and hold their numbers on the CPU. Needs the CPU wheel only.

    with PretendedGPU() as gpu:
        vlm = load_vlm(folder, "cuda", torch.bfloat16)          every `is_cuda` branch is taken, with real numbers
        with gpu.watch() as seen:
            generate(vlm, chats)
    seen.waits                  how often the host waited for the GPU: where, and for what
    seen.operators              how often each operator ran (views and allocations launch nothing: not counted)

What it finds on any machine: operands on two devices, waits of the host, errors of dtype, how many operators run, and
whether what the branches for CUDA compute is what those for the CPU do. It cannot say whether a kernel exists, how fast
it is, and how it rounds.

How it works. Autograd, guards and lazy initialisation in C++ must never meet CUDA, so there a tensor's device is the
CPU; only its Python attributes `device` and `is_cuda` say otherwise. Two modes of torch do the rest:

    Operators       sees each operator: checks devices, counts, computes on the tensors held, wraps what comes out
    Functions       sees each function before that: those that C++ would decide by the true device (`to`, `cpu`, ..),
                    and those that are one kernel on CUDA and several operators on a CPU

What CUDA alone has (graphs, streams, flash attention): pretended_cuda.py.
"""
from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from pretended_cuda import FUSED, SUBSTITUTES, attention_kernel, cuda_module, is_capturing

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
OWN_FILES = {"pretended_gpu.py", "pretended_cuda.py", "pretended_shapes.py"}

# What is special about an operator.
SPECIAL = {
    "move": (aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default, aten.lift_fresh_copy.default),
    "index": (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default),
    # The host waits for what these find, or for how much of it there is.
    "read": (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
             aten.masked_select.default, aten.masked_scatter_backward.default, aten.bincount.default,
             aten.unique_consecutive.default, aten._unique2.default, aten.repeat_interleave.Tensor),
    # Like views, they launch nothing.
    "free": (aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
             aten.new_empty_strided.default, aten._unsafe_view.default, aten._reshape_alias.default,
             aten.result_type.Tensor),
}
KINDS = {func: kind for kind, functions in SPECIAL.items() for func in functions}


@dataclass(frozen=True)
class Place:
    """A line of the project."""
    file: str                                           # from the project's root
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


@dataclass(frozen=True)
class Wait:
    """The host waits. "look": until the GPU has computed what is read; "copy": until it has taken what it is given."""
    kind: str
    operator: str
    place: Place

    def __str__(self) -> str:
        return f"{self.kind} at {self.place} by {self.operator}"


@dataclass
class Seen:
    """What was seen inside `watch()`."""
    waits: Counter[Wait] = field(default_factory=Counter)
    operators: Counter[Any] = field(default_factory=Counter)
    places: Counter[Place] = field(default_factory=Counter)             # of the operators
    attention: Counter[str] = field(default_factory=Counter)            # kernels that SDPA would take on CUDA
    costs: Counter[str] = field(default_factory=Counter)                # bytes and FLOPs: pretended_shapes.py

    def looks(self) -> int:
        """How often the host waited for a result."""
        return sum(count for wait, count in self.waits.items() if wait.kind == "look")

    def copies(self) -> int:
        """How often it handed something over."""
        return sum(count for wait, count in self.waits.items() if wait.kind == "copy")


class OnGPU(Tensor):
    """A tensor of the pretended GPU; `held` has its numbers."""
    held: Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        out = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CPU)
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a tensor on the pretended GPU, which is gone")

    def __repr__(self) -> str:
        return f"OnGPU({self.held})"

    def __reduce_ex__(self, protocol: int) -> Any:      # torch.save, to be read with map_location="cpu"
        return self.held.detach().__reduce_ex__(protocol)


class PretendedGPU:
    """Inside the `with` block torch has one GPU."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.inside_functions = 0                       # calls under way of functions that were given tensors of ours
        self.operators = Operators(self)
        self.exit_stack = ExitStack()

    def __enter__(self) -> PretendedGPU:
        enter = self.exit_stack.enter_context
        for owner, name, value in cuda_module(lambda: self.note_wait("look", "synchronize")):
            enter(mock.patch.object(owner, name, value))
        enter(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", group_tensors))
        enter(self.operators)
        functions = Functions(self)
        enter(functions)
        enter(mock.patch.object(checkpoint, "_checkpoint_without_reentrant_generator", functions.checkpointed))
        return self

    def __exit__(self, *error: object) -> None:
        self.exit_stack.close()

    @contextmanager
    def watch(self) -> Iterator[Seen]:
        """What happens inside is noted in what this gives."""
        before = self.seen
        self.seen = Seen()
        try:
            yield self.seen
        finally:
            self.seen = before

    def note_wait(self, kind: str, operator: str) -> None:
        """RuntimeError, as on a GPU, where a graph is being captured."""
        wait = Wait(kind, operator, project_line())
        self.seen.waits[wait] += 1
        if is_capturing():
            raise RuntimeError(f"{wait}: operation not permitted when stream is capturing")

    def note_operator(self, func: Any) -> None:
        self.seen.operators[func] += 1
        self.seen.places[project_line()] += 1


# ---- operators

class Operators(TorchDispatchMode):
    """Every operator of which a tensor is ours, or becomes ours."""

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(tensors_in([*args, *kwargs.values()]))
        ours = [x for x in tensors if isinstance(x, OnGPU)]
        becomes_ours = self.becomes_ours(func, args, kwargs, ours)
        if not ours and not becomes_ours:
            return func(*args, **kwargs)

        # A tensor with no axes may stay on the CPU: it is handed over as a number.
        others = [x for x in tensors if x.dim() > 0 and not isinstance(x, OnGPU)]
        kind = KINDS.get(func)
        if kind == "move":
            self.note_move(func, kwargs, ours, others, becomes_ours)
        elif kind == "index":
            self.note_index(func, args, others)
        elif ours and others:
            raise self.two_devices(func, tensors)
        if kind == "read" and not kwargs.get("output_size"):            # repeat_interleave's: then nothing is counted
            self.gpu.note_wait("look", str(func))
        if kind != "free" and not func.is_view:
            self.gpu.note_operator(func)

        if "device" in kwargs:
            kwargs["device"] = CPU
        out = self.compute(func, convert(args, held), convert(kwargs, held))
        if not becomes_ours:
            return out
        known = {id(x.held): x for x in ours}           # an operator in place gives back the tensor itself
        return convert(out, lambda x: known[id(x)] if id(x) in known else OnGPU(x))

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator, of the tensors held."""
        return SUBSTITUTES.get(func, func)(*args, **kwargs)

    def becomes_ours(self, func: Any, args: Any, kwargs: Any, ours: list[OnGPU]) -> bool:
        """Whether the result stands on the GPU."""
        if func is aten.copy_.default:
            return isinstance(args[0], OnGPU)
        target = kwargs.get("device")
        if target is None:
            return bool(ours)
        # C++ asks for the device that it believes its operands to have, inside a function and in a backward pass.
        if self.gpu.inside_functions or torch._C._current_graph_task_id() >= 0:
            return True
        return torch.device(target).type == "cuda"

    def note_move(self, func: Any, kwargs: Any, ours: list[OnGPU], others: list[Tensor], becomes_ours: bool) -> None:
        """A wait where a move goes from one device to the other, unless it may go on behind the host's back."""
        pinned = [x for x in others if getattr(x, "is_pretended_pinned", False)]
        if kwargs.pop("non_blocking", False) and pinned:
            return
        if ours and not becomes_ours:
            self.gpu.note_wait("look", str(func))
        elif becomes_ours and others:
            self.gpu.note_wait("copy", str(func))

    def note_index(self, func: Any, args: Any, others: list[Tensor]) -> None:
        """A wait where it must be counted how often a mask is true, and where indices come from the CPU."""
        indices = [index for index in args[1] if index is not None]
        if not isinstance(args[0], OnGPU):
            raise self.two_devices(func, [args[0], *indices])
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.gpu.note_wait("look", f"{func} of a mask")
        if others:
            self.gpu.note_wait("copy", f"{func} from the CPU")

    def two_devices(self, func: Any, tensors: Iterable[Tensor]) -> RuntimeError:
        shapes = [f"{'cuda:0' if isinstance(x, OnGPU) else 'cpu'} {tuple(x.shape)}" for x in tensors]
        return RuntimeError(f"{project_line()}: {func} of tensors on two devices, cuda:0 and cpu: {', '.join(shapes)}")


# ---- functions

class Functions(TorchFunctionMode):
    """Every function and method of torch, before it becomes operators."""

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self.gpu = gpu
        self.special: dict[Any, Callable[..., Any]] = {
            Tensor.to: self.to,
            Tensor.cuda: lambda x, *_, **options: self.move(x, GPU, None, options.get("non_blocking", False)),
            Tensor.cpu: lambda x, *_: self.move(x, CPU, None),
            Tensor.data.__set__: self.set_data,
            Tensor.tolist: self.tolist,
            Tensor.numpy: self.numpy,
            Tensor.pin_memory: pinned_copy,
            F.scaled_dot_product_attention: self.attention,
            F.rms_norm: self.rms_norm,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.special:
            return self.special[func](*args, **kwargs)
        device = kwargs.get("device")
        if isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda":
            if func in (torch.tensor, torch.as_tensor, torch.asarray):          # made on the CPU, then handed over
                kwargs["device"] = CPU
                return self.move(func(*args, **kwargs), GPU, None)
            kwargs["device"] = GPU                      # with its number: C++ would ask CUDA for it
            return func(*args, **kwargs)

        given_ours = device is None and any(isinstance(x, OnGPU) for x in tensors_in([*args, *kwargs.values()]))
        self.gpu.inside_functions += given_ours
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.inside_functions -= given_ours

    def checkpointed(self, function: Callable[..., Any], *args: Any,
                     plain: Any = checkpoint._checkpoint_without_reentrant_generator) -> Any:
        """torch.utils.checkpoint's own, whose function also runs in a backward pass, where torch has left this mode."""
        def seen(*inputs: Any, **options: Any) -> Any:
            with self if torch._C._len_torch_function_stack() == 0 else nullcontext():
                return function(*inputs, **options)
        return plain(seen, *args)

    def to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor):
            return self.move(x, other.device, other.dtype, copy=copy)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self.move(x, device, dtype, non_blocking, copy)

    def move(self, x: Tensor, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool = False,
             copy: bool = False) -> Tensor:
        changes_device = device is not None and (device.type == "cuda") != isinstance(x, OnGPU)
        if not changes_device:
            return Tensor.to(x, x.dtype if dtype is None else dtype, copy=copy)
        if device.type == "meta":
            return Tensor.to(x, device, dtype)
        target = GPU if device.type == "cuda" else CPU
        return aten._to_copy(x, dtype=dtype or x.dtype, device=target, non_blocking=non_blocking)

    def set_data(self, x: Tensor, data: Tensor) -> None:
        Tensor.data.__set__(x, data)
        if isinstance(x, OnGPU):
            x.held = data.held.detach()

    def tolist(self, x: Tensor) -> Any:
        if isinstance(x, OnGPU):
            self.gpu.note_wait("look", "tolist")
        return held(x).tolist()

    def numpy(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, OnGPU):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
        return x.numpy(*args, **kwargs)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                  is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        if not isinstance(q, OnGPU):
            return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale,
                                                  enable_gqa=enable_gqa)
        assert dropout_p == 0, "the project's models have no dropout"
        self.gpu.seen.attention[attention_kernel(q, k, attn_mask)] += 1
        return FUSED.attention(q, k, v, attn_mask, is_causal, scale, enable_gqa)

    def rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if not isinstance(x, OnGPU):
            return F.rms_norm(x, shape, weight, eps)
        if weight is None:
            return FUSED.rms_norm(x, list(shape), eps)
        return FUSED.weighted_norm(x, weight, list(shape), eps)


# ---- what both use

def held(x: Tensor) -> Tensor:
    """The tensor that has the numbers."""
    return x.held if isinstance(x, OnGPU) else x


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def convert(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed, in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: convert(entry, change) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        changed = [convert(entry, change) for entry in value]
        return changed if isinstance(value, list) else tuple(changed)
    return value


def pinned_copy(x: Tensor, *_: Any) -> Tensor:
    """Tensor.pin_memory: from there a move need not be waited for."""
    copy = x.clone()
    copy.is_pretended_pinned = True
    return copy


def group_tensors(*args: Any, plain: Any = torch._C._group_tensors_by_device_and_dtype) -> Any:
    """What optimisers group tensors by is their true device: here they get the one they say."""
    found = {}
    for (device, dtype), grouped in plain(*args).items():
        on_gpu = any(isinstance(x, OnGPU) for x in tensors_in(grouped))
        found[GPU if on_gpu else device, dtype] = grouped
    return found


def project_line() -> Place:
    """The innermost line of the project that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = project_file(frame.f_code.co_filename)
        if file:
            return Place(file, frame.f_lineno, frame.f_code.co_qualname)
        frame = frame.f_back
    return Place("outside of the project", 0, "")


def project_file(path: str, known: dict[str, str] = {}) -> str:                 # noqa: B006 it is a memory
    """A file's path from the project's root; "" for one of others, and for this one."""
    if path not in known:
        known[path] = ""
        resolved = Path(path).resolve()
        if resolved.is_relative_to(ROOT) and resolved.name not in OWN_FILES and "site-packages" not in path:
            known[path] = resolved.relative_to(ROOT).as_posix()
    return known[path]
