"""loop/memory_table.py: what it works out from shapes is what tensors really take on a CPU, phase by phase."""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from loop.gradients import StepGradients
from loop.memory_table import Config, always_held, asking, copied, phases, read_shapes, table, training
from loop.optimise import load_trainable, make_optimiser, row_logps
from loop.ranks import Ranks
from loop.shard import share_out
from model import generate, load_vlm
from model.pairs import pack_pairs
from model.vlm import VLM, weights_in_compute_dtype
from peak import PeakBytes, storage_of
from published import CONFIGS
from tiny import qwen3_vl_config, write_checkpoint

PROMPT = 260                                            # characters, a token each
ANSWER = 24
CFG = Config(student=["x"], gpus=4, micro_tokens=1, max_new_tokens=ANSWER, sample_batch=4, k=3,
             feature_cache_gb=0.0)
NEAR = 0.25                                             # of what was measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is large enough for its tensors to count, 3.5 million parameters, and deep as models are."""
    config = qwen3_vl_config()
    config["text_config"] |= {"hidden_size": 128, "num_hidden_layers": 12, "head_dim": 32, "intermediate_size": 384,
                              "vocab_size": 4096}
    config["text_config"]["rope_scaling"]["mrope_section"] = [8, 4, 4]
    config["vision_config"]["out_hidden_size"] = 128
    return write_checkpoint(tmp_path_factory.mktemp("memory") / "model", config)


@contextmanager
def four_processes() -> Iterator[None]:
    """As if this were one of four, whose messages arrive at once and say nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def chats(count: int) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": chr(65 + number) * PROMPT}] for number in range(count)]


def student_of(folder: Path, cfg: Config, shard: bool) -> VLM:
    flags = SimpleNamespace(dtype=cfg.dtype, trainable=cfg.trainable, lora_rank=cfg.lora_rank, seed=0, eager=True,
                            min_pixels=None, max_pixels=None, recompute=cfg.recompute, feature_cache_gb=0.0,
                            shard=shard)
    return load_trainable(str(folder), flags, torch.device("cpu"))


def measured_training(student: VLM, cfg: Config, shard: bool) -> int:
    """The peak of the second step: from the first on Adam's moments are there."""
    answers = [tuple(range(first, first + ANSWER)) for first in (65, 97)]
    rows = pack_pairs(student.processor, [(chat, *answers) for chat in chats(cfg.micro_tokens // cfg.row_tokens)])
    optimiser = make_optimiser(student, 1e-4, 0.0)
    trained = optimiser.param_groups[0]["params"]
    alone = Ranks("cpu")

    def step() -> None:
        cast = nullcontext() if shard else weights_in_compute_dtype(student)
        with StepGradients(trained, alone), cast:
            row_logps(student, rows).sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    step()
    moments = [value for state in optimiser.state.values() for value in state.values()]
    with PeakBytes([*student.parameters(), *moments]) as peak:
        step()
    return peak.bytes


def prompt_tokens(student: VLM) -> int:
    return len(student.processor.rows(chats(1), {})[0].ids)


@pytest.mark.parametrize("flags", [
    {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "recompute": True},
    {"dtype": "float32", "trainable": "all"}, {"dtype": "bfloat16", "lora_rank": 4}], ids=str)
@pytest.mark.parametrize("shard", [False, True])
def test_training(folder: Path, flags: dict[str, Any], shard: bool) -> None:
    if shard and "lora_rank" in flags:
        pytest.skip("there is no such run")
    cfg = Config(**{**vars(CFG), **flags})
    with four_processes():
        student = student_of(folder, cfg, shard)
        cfg = Config(**{**vars(cfg), "prompt_tokens": prompt_tokens(student)})
        cfg = Config(**{**vars(cfg), "micro_tokens": 2 * cfg.row_tokens})
        measured = measured_training(student, cfg, shard)
    shapes = read_shapes(str(folder), cfg)
    shared = 4 if shard else 1
    told = always_held(shapes, None, cfg, shared, 1) + training(shapes, cfg, shared)
    print(flags, shard, round(told / 1e6, 2), round(measured / 1e6, 2), round(told / measured, 2))
    assert told == pytest.approx(measured, rel=NEAR)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_asking(folder: Path, dtype: str) -> None:
    """A whole model of another dtype than the weights'; prefill, keys and values, logits."""
    cfg = Config(**{**vars(CFG), "dtype": dtype})
    student = student_of(folder, cfg, shard=False)
    with PeakBytes(student.parameters()) as peak:
        generate(student, chats(cfg.sample_batch), n=cfg.k, max_new_tokens=ANSWER, top_p=0.9)
    shapes = read_shapes(str(folder), cfg)
    told = 4 * shapes.language + shapes.tower * cfg.itemsize + copied(shapes, cfg, 1)
    told += asking(shapes, cfg, prompt_tokens(student), ANSWER, cfg.k)
    print(dtype, round(told / 1e6, 2), round(peak.bytes / 1e6, 2), round(told / peak.bytes, 2))
    assert told == pytest.approx(peak.bytes, rel=NEAR)


def test_a_shared_out_verifier(folder: Path) -> None:
    """A quarter of it stays, and nothing holds the rest."""
    with four_processes():
        verifier = load_vlm(folder).requires_grad_(False)
        share_out(verifier)
        held = sum(storage_of(parameter).nbytes() for parameter in verifier.parameters())
        assert verifier.head_weight.shape == (4096, 128) and len(list(verifier.parameters())) > 100
    shapes = read_shapes(str(folder), Config(**{**vars(CFG), "dtype": "float32"}))
    assert held == pytest.approx(4 * (shapes.language + shapes.tower) / 4, rel=0.02)


# ---- the command

@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders that hold the published models' config.json alone."""
    folders = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("published") / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        folders[name] = str(folder)
    return folders


def test_full_fine_tuning_on_one_node(published: dict[str, str]) -> None:
    """8 x 80 GB: an 8B and an 11B student fit beside an 8B verifier with --shard, and not without."""
    verifier = published["Qwen3-VL-8B"]
    cfg = Config(student=[published["Qwen3-VL-8B"], published["Llama-3.2-11B-Vision"]], verifier=[verifier],
                 recompute=True)
    for name in cfg.student:
        shapes = read_shapes(name, cfg), read_shapes(verifier, cfg)
        whole, shared, both = (max(phases(*shapes, cfg, *over).values()) for over in ((1, 1), (8, 1), (8, 8)))
        assert both < shared < 75e9 < 150e9 < whole

    lines = table(cfg).splitlines()
    assert len(lines) == 2 + 2 * 3 and lines[-1].startswith(f"| {cfg.student[1]} | {verifier} | --shard --shard-ver")
    judges = table(Config(student=cfg.student[:1], gpus=1)).splitlines()
    assert len(judges) == 3 and judges[2].count("| - ") == 3


def test_the_command(published: dict[str, str]) -> None:
    words = [sys.executable, "-m", "loop.memory", "--student", published["Qwen3-VL-2B"], "--gpus", "2"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0 and done.stdout.count("\n") == 4 and "| --shard |" in done.stdout, done.stderr
