"""loop/shard.py and shard_files.py in one process: what is refused, what is left alone, damaged checkpoints."""
from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import judge
import train
from loop.optimise import load_training_state, make_optimiser, training_state
from loop.pilot import put_back
from loop.ranks import LostRank, Ranks, others_answering
from loop.run import Run
from loop.saved import check_training_state
from loop.shard import gathered, is_sharded, local, share_out, whole
from loop.shard_files import replace_tensors
from model import load_vlm
from model.vlm import VLM
from run_folder import Flags, names, resumed

STUDENT = train.TINY / "student"


@pytest.fixture
def sharded(tmp_path: Path, ranks: Ranks) -> Run:
    """A run with --shard that was started."""
    run = Run(Flags(str(tmp_path / "run"), shard=True), ranks)
    run.start(reference="abc")
    return run


def trained(run: Run) -> tuple[VLM, torch.optim.Optimizer]:
    """A model after a step, saved as step 1."""
    vlm = load_vlm(STUDENT)
    optimiser = make_optimiser(vlm, 1e-3, 0.0)
    sum(parameter.sum() for parameter in vlm.parameters()).backward()
    optimiser.step()
    run.save("step-000001-001", {"step": 1, "state": {"losses": [0.5]}, **training_state(vlm, optimiser)})
    return vlm, optimiser


# ---- flags

@pytest.mark.parametrize("flags", [{"lora_rank": 4}, {"trainable": "layers:0-1"}], ids=str)
def test_what_has_nothing_to_share_out(flags: dict) -> None:
    for config in (train.Config, judge.Config):
        with pytest.raises(ValueError, match="--shard shares out a model that is trained whole .* leave --shard out"):
            config(task="bar", shard=True, **flags)
    assert train.Config(task="bar", shard=True, trainable="all").shard


def test_one_process_has_nothing_to_share() -> None:
    vlm = load_vlm(STUDENT)
    before = list(vlm.parameters())
    with whole(vlm, torch.bfloat16) as model:
        assert model is vlm
    share_out(vlm)
    assert all(a is b for a, b in zip(before, vlm.parameters(), strict=True))
    assert not is_sharded(before[0]) and gathered(before[0]) is before[0] and local(before[0]).equal(before[0])


# ---- ranks

def test_ranks_take_as_many_passes(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.as_many(["a", "b"], "s") == [("a", 1.0), ("b", 1.0)]
    monkeypatch.setattr(ranks, "gather", lambda count: [count, 3])
    assert ranks.as_many(["a"], "s") == [("a", 1.0), ("s", 0.0), ("s", 0.0)]


def test_a_rank_that_is_lost_within_a_pass() -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer. More")
    for error in (gloo, dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited")):
        with pytest.raises(LostRank, match="rank 0 cannot reach the other ranks: (Connection closed by peer|NCCL)"):
            with others_answering():
                raise error
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), torch.OutOfMemoryError("CUDA")):
        with pytest.raises(type(other)), others_answering():
            raise other


def test_the_pilot_puts_parts_back() -> None:
    """Of a model that is shared out each rank keeps, and puts back, its own part."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        values = torch.arange(6.0).view(3, 2)
        module = torch.nn.Linear(2, 3, bias=False)
        module.weight = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(0)], src_data_rank=None))
        with put_back(module):
            local(module.weight).add_(1)
            assert local(module.weight).tolist() == [[5, 6]]
        assert local(module.weight).tolist() == [[4, 5]]
    finally:
        dist.destroy_process_group()


# ---- checkpoints

def test_what_is_saved_comes_back(sharded: Run) -> None:
    vlm, optimiser = trained(sharded)
    folder = sharded.checkpoints / "step-000001-001"
    assert names(folder) == ["shards", "state.pt"] and names(folder / "shards") == [".metadata", "__0_0.distcp"]
    assert (folder / "state.pt").stat().st_size < 0.3 * (folder / "shards" / "__0_0.distcp").stat().st_size

    other = load_vlm(STUDENT)
    other_optimiser = make_optimiser(other, 1e-3, 0.0)
    saved = sharded.load(lambda state: check_training_state(other, other_optimiser, state))
    assert saved["state"] == {"losses": [0.5]}
    load_training_state(other, other_optimiser, saved)
    for a, b in zip(vlm.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    moments = optimiser.state_dict()["state"], other_optimiser.state_dict()["state"]
    for number in moments[0]:
        assert all(torch.equal(moments[0][number][name], moments[1][number][name]) for name in moments[0][number])


def test_a_checkpoint_is_written_once_and_the_oldest_goes(sharded: Run) -> None:
    for step in (1, 2, 3, 3):
        sharded.save(f"step-00000{step}-001", {"step": step, "model": {"w": torch.full((2,), float(step))}})
    assert names(sharded.checkpoints) == ["step-000002-001", "step-000003-001"]
    assert resumed(sharded, shard=True).load()["model"]["w"].tolist() == [3, 3]


def test_damage(sharded: Run, capfd: pytest.CaptureFixture) -> None:
    """Whatever is broken is named in one sentence, and nothing is put in place."""
    trained(sharded)
    folder = sharded.checkpoints / "step-000001-001"
    shutil.copytree(folder, folder.with_name("spare"))

    class Attack:
        def __reduce__(self) -> tuple:
            return os.system, ("echo attacked",)

    def harm(name: str, content: bytes | None) -> str:
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("spare"), folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match="the only checkpoint") as found:
            sharded.load()
        assert len(str(found.value)) < 600 and "\n" not in str(found.value)
        return str(found.value)

    shards = (folder / "shards" / "__0_0.distcp").read_bytes()
    assert "shards is damaged: " in harm("shards/__0_0.distcp", shards[:5000])
    assert "shards is damaged: " in harm("shards/__0_0.distcp", None)
    assert "shards is damaged: " in harm("shards/.metadata", None)
    assert "shards is damaged: " in harm("shards/.metadata", b"no pickle")
    assert "names posix.system" in harm("shards/.metadata", pickle.dumps(Attack()))
    assert "holds no metadata" in harm("shards/.metadata", pickle.dumps(torch.Size([1])))
    assert "state.pt is damaged" in harm("state.pt", b"")
    assert "attacked" not in capfd.readouterr().out


def test_numbers_that_are_none(sharded: Run) -> None:
    vlm = load_vlm(STUDENT)
    optimiser = make_optimiser(vlm, 1e-3, 0.0)
    vlm.head_weight.data[3, 5] = torch.nan
    sharded.save("step-000001-001", {"step": 1, **training_state(vlm, optimiser)})
    with pytest.raises(ValueError, match="embed_tokens.weight holds NaN or infinity, the only checkpoint"):
        sharded.load(lambda state: check_training_state(vlm, optimiser, state))

    shutil.rmtree(sharded.checkpoints / "step-000001-001" / "shards")
    with pytest.raises(ValueError, match=r"is a nested, sparse or empty \(meta\) tensor"):
        sharded.load(lambda state: check_training_state(vlm, optimiser, state))


def test_a_full_disk(sharded: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the writer of shards raises is no Exception; it becomes an OSError, and half a checkpoint is removed."""
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    from torch.distributed.checkpoint import FileSystemWriter
    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(OSError, match="cannot write .*step-000001-001: .*No space left on device"):
        sharded.save("step-000001-001", {"step": 1, "model": {"w": torch.zeros(2)}})
    assert names(sharded.checkpoints) == []


def test_tensors_in_dicts() -> None:
    seen = []
    value = {"a": {3: torch.ones(2)}, "b": [torch.ones(1)], "c": 5}
    changed = replace_tensors(value, lambda place, tensor: seen.append(place) or tensor + 1)
    assert seen == ["/a/3"] and changed["a"][3].tolist() == [2, 2] and changed["b"] is value["b"] and changed["c"] == 5
