"""model/compiled.py: the decoder's layers compile, each kind as one graph, and then compute the same. They are traced
here, on a CPU: what the compiler makes of a graph on a GPU is not seen."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dpo import sequence_logps
from loop.gradients import StepGradients
from loop.ranks import Ranks
from model import VLM, compiled, load_vlm
from model.attention import PackedTree
from model.pairs import PairRows, pack_pairs
from model.vlm import weights_in_compute_dtype
from pretended_cuda import flash
from tiny import CONFIGS, chat, example_chats, picture, write_checkpoint

SIDES = ([5, 6, 7], [9, 8]), ([11], [12, 13, 14, 15]), ([70, 71], [70]), ([5], [6])


def tiny(family: str, folder: Path) -> VLM:
    return load_vlm(write_checkpoint(folder / family, CONFIGS[family]()))


def batches(vlm: VLM) -> list[PairRows]:
    """Of several pairs and of one, then of other numbers and lengths."""
    chats = [*example_chats(), chat(picture(30, 40), "once more")]
    triples = [(c, *sides) for c, sides in zip(chats, SIDES)]
    return [pack_pairs(vlm.processor, part) for part in (triples[:2], triples[1:2], triples[1:], triples[2:3])]


def passes(vlm: VLM, rows: list[PairRows]) -> list[Tensor]:
    """log pi(y|x) of each batch, and the gradients of all of it."""
    parameters = list(vlm.parameters())
    found = []
    with StepGradients(parameters, Ranks("cpu")), weights_in_compute_dtype(vlm):
        for batch in rows:
            hidden = vlm.hidden_states(batch.batch)
            logps = sequence_logps(batch.predictors(hidden), vlm.head_weight, batch.targets, batch.mask)
            (logps * torch.arange(1, 1 + len(logps))).sum().backward()
            found.append(logps.detach())
    found += [parameter.grad for parameter in parameters]
    vlm.zero_grad()
    return found


def traced(monkeypatch: pytest.MonkeyPatch, vlm: VLM, backend: Any) -> None:
    """Compile the layers for this backend; anything that would leave the graph is an error."""
    torch._dynamo.reset()
    counters.clear()
    compiled.compiled.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
        compiled.compile_layers(vlm.decoder.layers)
    compiled.compiled.cache_clear()


def close(a: Tensor, b: Tensor, share: float) -> bool:
    return bool((a - b).abs().max() <= share * b.abs().max().clamp(min=1))


@pytest.mark.parametrize("family", ["qwen3_vl", "mllama"])
def test_layers_are_graphs(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32: log-probabilities and gradients of all sizes of batches are those of the layers as written. Sizes are
    left open: other ones need no other graphs."""
    vlm = tiny(family, tmp_path)
    rows = batches(vlm)
    expected = passes(vlm, rows)
    assert not compiled.are_compiled(vlm.decoder.layers)
    traced(monkeypatch, vlm, "eager")
    passes(vlm, rows[:2])
    graphs = counters["stats"]["unique_graphs"]
    found = passes(vlm, rows)
    assert compiled.are_compiled(vlm.decoder.layers)
    assert all(close(a, b, 1e-5) for a, b in zip(found, expected, strict=True))
    assert 0 < graphs and counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def with_flash_by_its_contract(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """A backend that runs the graph as it is, but for the kernel that a CPU lacks."""
    found = 0
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten._flash_attention_forward:
            node.target = flash
            found += 1
    WITH_FLASH.append(found)
    graph.recompile()
    return graph.forward


WITH_FLASH: list[int] = []                              # kernels in each graph


def test_packed_attention_is_in_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in bf16: attention of the rows by one kernel, whose sizes are left open, too."""
    vlm = tiny("qwen3_vl", tmp_path)
    vlm.compute_dtype = torch.bfloat16
    rows = batches(vlm)
    expected = passes(vlm, rows)
    packed = []
    for batch in rows:
        tree = PackedTree.of(batch.batch.tree.sizes, batch.batch.input_ids.shape[1])
        packed.append(replace(batch, batch=replace(batch.batch, tree=tree)))
    WITH_FLASH.clear()
    traced(monkeypatch, vlm, with_flash_by_its_contract)
    passes(vlm, packed[:2])
    graphs = counters["stats"]["unique_graphs"]
    found = passes(vlm, packed)
    assert 0 < graphs and counters["stats"]["unique_graphs"] == graphs and set(WITH_FLASH) == {1}
    for a, b in zip(found[:len(rows)], expected):
        assert close(a, b, 1e-2)
    large = [b.norm() > 1e-2 for b in expected]
    agree = [nn.functional.cosine_similarity(a.flatten().float(), b.flatten().float(), 0) > 0.98
             for a, b in zip(found, expected)]
    assert all(same for same, counts in zip(agree, large) if counts)


def test_the_time_is_told_once(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "TIMED", set())
    for what in ("training", "decoding", "training"):
        with compiled.timed_once(what):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["training", "decoding"]
    assert lines[0] == "training: the first step took 0 s, compilation included (--eager: none)"
    monkeypatch.setenv("RANK", "1")
    with compiled.timed_once("another"):
        pass
    assert capsys.readouterr().err == ""
