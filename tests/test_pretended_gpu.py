"""The pretended GPU itself: it refuses what a GPU refuses, computes what a CPU does, and leaves torch as it was.

What a captured graph does wrong, and no error says, shows as another result than that of the same code run eagerly:
each fault is planted in a loop that draws "tokens" as a sampler does.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretended_cuda import SUBSTITUTES, not_compiled
from pretended_gpu import GPU, OnGPU, PretendedGPU

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
STEPS = 6


@pytest.fixture
def pretended() -> Iterator[PretendedGPU]:
    with PretendedGPU() as gpu:
        yield gpu


# ---- devices and waits

def test_torch_is_as_before() -> None:
    names = ("is_available", "CUDAGraph", "graph", "synchronize", "current_stream")
    before = [getattr(torch.cuda, name) for name in names]
    with PretendedGPU():
        assert torch.cuda.is_available() and torch.compile is not_compiled
        kept = torch.ones(2, device="cuda")
    assert before == [getattr(torch.cuda, name) for name in names] and torch.compile is not not_compiled
    assert type(torch.ones(2) + 1) is Tensor
    with pytest.raises(AssertionError, match="which is gone"):
        kept + 1


def test_devices(pretended: PretendedGPU) -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.device == GPU and x.is_cuda and x[0].is_cuda and x.to("cpu").device.type == "cpu"
    assert (x * 2 + torch.tensor(1.0)).tolist() == [[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]]
    for mixed in (lambda: x + torch.ones(3), lambda: x.add_(torch.ones(3)), lambda: torch.cat((x, torch.ones(1, 3))),
                  lambda: torch.ones(2, 3)[x.long()], lambda: x.index_fill_(1, torch.tensor([0]), 1.0)):
        with pytest.raises(RuntimeError, match=r"^tests/test_pretended_gpu\.py:\d+ .* on two devices, cuda:0 and cpu"):
            mixed()
    with pytest.raises(TypeError, match="convert cuda:0"):
        x.numpy()


@pytest.mark.parametrize(("kind", "work"), [
    ("look", lambda x: x.sum().item()),
    ("look", lambda x: bool((x > 0).all())),
    ("look", lambda x: x.tolist()),
    ("look", lambda x: x.cpu()),
    ("look", lambda x: x[x > 0]),
    ("look", lambda x: (x > 0).nonzero()),
    ("look", lambda x: torch.zeros(3).copy_(x)),
    ("look", lambda x: torch.cuda.synchronize()),
    ("copy", lambda x: torch.ones(3).to("cuda")),
    ("copy", lambda x: torch.tensor([1, 2], device="cuda")),
    ("copy", lambda x: x.copy_(torch.ones(3))),
    ("copy", lambda x: x[torch.tensor([0, 2])]),
    ("copy", lambda x: torch.ones(3).to("cuda", non_blocking=True)),    # from memory that is not pinned
    ("none", lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True)),
    ("none", lambda x: x.masked_fill(x > 1, 0.0).cumsum(0)[1:] * 2),
    ("none", lambda x: torch.zeros(3, device=x.device).index_add(0, x.long().clamp(max=2), x)),
])
def test_where_the_host_waits(pretended: PretendedGPU, kind: str, work: Callable[[Tensor], object]) -> None:
    x = torch.arange(3.0, device="cuda")
    with pretended.watch() as seen:
        work(x)
    assert [wait.kind for wait in seen.waits] == ([] if kind == "none" else [kind])
    assert all(wait.place.file == "tests/test_pretended_gpu.py" and wait.place.line > 1 for wait in seen.waits)


def test_operators_are_counted(pretended: PretendedGPU) -> None:
    """Views and allocations are none; what is one kernel on CUDA is one."""
    x = torch.ones(1, 2, 4, 8, device="cuda", requires_grad=True)
    with pretended.watch() as seen:
        y = x.transpose(1, 2).unflatten(-1, (2, 4))[:, 1:]
        torch.empty_like(y)
        F.rms_norm(x, (8,), eps=1e-6)
        out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert seen.operators.total() == 2 and seen.attention.total() == 1
    with pretended.watch() as seen:
        out.backward(torch.ones_like(out))
    assert sum("attention_backward" in str(operator) for operator in seen.operators) == 1


# ---- what is computed

@pytest.mark.parametrize("form", ["plain", "causal", "mask", "shared heads"])
def test_gradients_of_attention(pretended: PretendedGPU, form: str) -> None:
    """As autograd has them on a CPU."""
    keys = 1 if form == "shared heads" else 2
    shapes = [(2, 2, 5, 4), (2, keys, 5, 4), (2, keys, 5, 4)]
    how = {"is_causal": form == "causal", "enable_gqa": form == "shared heads"}
    if form == "mask":
        how["attn_mask"] = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(1)
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        inputs = [torch.randn(shape).to(device).requires_grad_() for shape in shapes]
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in how.items()}
        out = F.scaled_dot_product_attention(*inputs, **options)
        out.square().sum().backward()
        found.append([x.cpu() for x in (out.detach(), *(x.grad for x in inputs))])
    for ours, exact in zip(*found):
        assert torch.allclose(ours, exact, atol=1e-5)


def test_gradient_of_the_norm(pretended: PretendedGPU) -> None:
    found = []
    for device in ("cpu", "cuda"):
        x = torch.arange(12.0).view(3, 4).to(device).requires_grad_()
        F.rms_norm(x, (4,), eps=1e-6).exp().sum().backward()
        found.append(x.grad.cpu())
    assert torch.allclose(*found, atol=1e-5)


def test_flash_attention_of_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences of one packed row, the second with more keys than queries; gradients as of plain attention."""
    monkeypatch.setattr("pretended_cuda.FLASH_DTYPES", (torch.float32,))
    flash, backward = (SUBSTITUTES[getattr(torch.ops.aten, name).default]
                       for name in ("_flash_attention_forward", "_flash_attention_backward"))
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 2, 8), torch.randn(7, 1, 8), torch.randn(7, 1, 8)
    starts, key_starts = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 5], [0, 3, 7]))
    common = (starts, key_starts, 3, 4, 0.0, True)
    out, lse, *_ = flash(q, k, v, *common, False)
    grads = backward(torch.ones_like(out), q, k, v, out, lse, *common, None, None)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for queries, keys in ((slice(0, 3), slice(0, 3)), (slice(3, 5), slice(3, 7))):
        alone = [x[part].transpose(0, 1)[None] for x, part in zip(leaves, (queries, keys, keys))]
        T, S = alone[0].shape[2], alone[1].shape[2]
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        expected = F.scaled_dot_product_attention(*alone, mask, enable_gqa=True)[0].transpose(0, 1)
        assert torch.allclose(out[queries], expected, atol=1e-5)
        expected.sum().backward()
    assert all(torch.allclose(found, leaf.grad, atol=1e-5) for found, leaf in zip(grads, leaves))


# ---- graphs

def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, as PyTorch's documentation has it. Warming up runs it once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Loop:
    """Draws STEPS tokens: each is a hash of the sum of all before it; a row is done once it has drawn a 3."""

    def __init__(self) -> None:
        self.t = torch.zeros((), dtype=torch.long, device="cuda")
        self.tokens = torch.zeros(4, STEPS, dtype=torch.long, device="cuda")
        self.done = torch.zeros(4, dtype=torch.bool, device="cuda")
        self.rows = torch.arange(4, device="cuda")
        self.number = 0

    def draw(self, drawn: Tensor) -> Tensor:
        """drawn: (4, t) -> (4,)."""
        return ((drawn.sum(1) + 1) * 5 + self.rows + self.t).remainder(7).masked_fill(self.done, -1)

    def good(self) -> None:
        """All in places that stay, and the number of the step is one of them."""
        token = self.draw(self.tokens)
        self.tokens.index_copy_(1, self.t[None], token[:, None])
        self.done |= token == 3
        self.t += 1

    def python_int(self) -> None:
        """The column is a Python number, which a graph keeps as it was."""
        token = self.draw(self.tokens)
        self.tokens[:, self.number] = token
        self.number += 1
        self.done |= token == 3
        self.t += 1

    def not_in_place(self) -> None:
        """`done` is another tensor after each step: a replay reads the old one."""
        token = self.draw(self.tokens)
        self.tokens.index_copy_(1, self.t[None], token[:, None])
        self.done = self.done | (token == 3)
        self.t += 1

    def moving_shape(self) -> None:
        """Only what was drawn so far is read: a graph keeps the shape it met."""
        token = self.draw(self.tokens[:, :self.number])
        self.number += 1
        self.tokens.index_copy_(1, self.t[None], token[:, None])
        self.done |= token == 3
        self.t += 1


def run(kind: str, as_graph: bool) -> list[list[int]]:
    loop = Loop()
    step = getattr(loop, kind)
    if as_graph:
        step = captured(step)
        steps = STEPS - 1                               # one was the warm-up
    else:
        steps = STEPS
    for _ in range(steps):
        step()
    return loop.tokens.tolist()


@pytest.mark.parametrize("kind", ["good", "python_int", "not_in_place", "moving_shape"])
def test_a_captured_loop(pretended: PretendedGPU, kind: str) -> None:
    """Run eagerly all are right; captured, only the one without a fault is."""
    eager = run(kind, as_graph=False)
    assert eager == run("good", as_graph=False) and any(-1 in row for row in eager)
    assert (run(kind, as_graph=True) == eager) == (kind == "good")


def test_nothing_runs_while_a_graph_is_captured(pretended: PretendedGPU) -> None:
    """What is written to is as before, what is made holds no numbers; a replay writes to the same memory."""
    x = torch.ones(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        y = x * 2
    assert x.tolist() == [1.0, 1.0] and y.isnan().all()
    memory = y.held.data_ptr()
    with pretended.watch() as seen:
        graph.replay()
        graph.replay()
    assert (x.tolist(), y.tolist()) == ([3.0, 3.0], [6.0, 6.0]) and y.held.data_ptr() == memory
    assert seen.operators.total() == 4 and isinstance(y, OnGPU)


@pytest.mark.parametrize("work", [
    lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: torch.cuda.synchronize(),
    lambda x: x + torch.tensor([1.0, 2.0], device="cuda"), lambda x: x.cpu()])
def test_the_host_may_not_wait_while_a_graph_is_captured(pretended: PretendedGPU,
                                                         work: Callable[[Tensor], object]) -> None:
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match=r"tests/test_pretended_gpu\.py:\d+.*not permitted when stream is capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            work(x)
    assert (x + 1).tolist() == [2.0, 2.0]               # what comes after is not part of it
