"""loop/saved.py: a checkpoint that does not fit the run is one sentence, before anything is put in place."""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch

from loop.optimise import load_training_state, make_optimiser, set_trainable, training_state
from loop.ranks import Ranks
from loop.run import Run, read_state
from loop.saved import check_tokens, check_training_state, rebuild
from loop.state import State, restore, save
from model import VLM, load_vlm
from replay import Pair, ReplayBuffer
from tiny import qwen3_vl_config, write_checkpoint

PAIR = Pair("q1", (5, 6), (7,), 1.0, 0.25, "a", "b", -1.5, -2.5, "key", 9)


class Figures(TypedDict):
    """What a program keeps of an evaluation."""
    right: int


@dataclass
class Kept:
    """A state with a field of every kind that is annotated."""
    step: int
    ratio: float
    label: str | None
    tokens: tuple[int, ...]
    pairs: list[Pair]
    figures: Figures | None
    rest: dict[str, Any]


KEPT = {"step": 1, "ratio": 2, "label": None, "tokens": (1, 2), "pairs": [asdict(PAIR)], "figures": {"right": 1},
        "rest": {"a": [1]}}


def test_a_state_is_rebuilt() -> None:
    assert rebuild(Kept, KEPT, "state") == Kept(1, 2, None, (1, 2), [PAIR], {"right": 1}, {"a": [1]})


@pytest.mark.parametrize("change, told", [
    ({"step": True}, "state.step is True, not int"), ({"step": "1"}, "state.step is '1', not int"),
    ({"ratio": float("nan")}, "state.ratio is nan, not float"), ({"ratio": None}, "state.ratio is None, not float"),
    ({"label": 3}, "state.label is 3, not str"), ({"tokens": [1, 2]}, r"state.tokens is \[1, 2\], not tuple"),
    ({"tokens": (1, 2.5)}, r"state.tokens\[1\] is 2.5, not int"), ({"pairs": {}}, r"state.pairs is {}, not list"),
    ({"pairs": [3]}, r"state.pairs\[0\] is 3, not the fields of a Pair"),
    ({"pairs": [{"item_id": "q1"}]}, r"another version's, which differs in the field state.pairs\[0\].chosen"),
    ({"pairs": [asdict(PAIR) | {"chosen_score": "x"}]}, r"state.pairs\[0\].chosen_score is 'x', not float"),
    ({"figures": {}}, "state.figures is {}, not Figures"), ({"rest": []}, r"state.rest is \[\], not dict"),
    ({"new": 1}, "another version's, which differs in the field state.new"),
])
def test_fields_that_do_not_fit(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rebuild(Kept, KEPT | change, "state")
    for nothing in (None, [1], "x"):
        with pytest.raises(ValueError, match="not the fields of a Kept"):
            rebuild(Kept, nothing, "state")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), qwen3_vl_config())
    model = load_vlm(folder)
    set_trainable(model, "layers:1-1")
    return model


def trained_once(vlm: VLM) -> torch.optim.Optimizer:
    """An optimiser that has taken a step of nothing."""
    optimiser = make_optimiser(vlm, lr=0.0, weight_decay=0.1)
    for parameter in optimiser.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    optimiser.zero_grad()
    return optimiser


def replace_weight(tensor: Callable[[torch.Tensor], Any]) -> Callable[[dict], None]:
    """A change of a checkpoint: another tensor for one weight."""
    def change(saved: dict) -> None:
        name = next(name for name in saved["model"] if name.endswith("1.mlp.up_proj.weight"))
        saved["model"][name] = tensor(saved["model"][name])
    return change


def replace_moment(tensor: Callable[[torch.Tensor], Any]) -> Callable[[dict], None]:
    """A change of a checkpoint: another tensor for the first moment of one weight."""
    def change(saved: dict) -> None:
        state = saved["optimiser"]["state"][0]
        state["exp_avg"] = tensor(state["exp_avg"])
    return change


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with one NaN."""
    poisoned = tensor.clone()
    poisoned.view(-1)[-1] = float("nan")
    return poisoned


CHANGES = {
    "one row": (replace_weight(lambda weight: weight[:1]), r"mlp.up_proj.weight has shape \(1, 48\), and \(80, 48\)"),
    "a number": (replace_weight(lambda weight: torch.ones(())), r"up_proj.weight has shape \(\), and \(80, 48\)"),
    "half": (replace_weight(torch.Tensor.half), "up_proj.weight is torch.float16, and torch.float32 in this run"),
    "NaN": (replace_weight(poison), "up_proj.weight holds NaN or infinity"),
    "no tensor": (replace_weight(lambda weight: 3), "up_proj.weight is 3, not a tensor"),
    "sparse": (replace_weight(torch.Tensor.to_sparse), "up_proj.weight is a nested, sparse or empty"),
    "meta": (replace_moment(lambda moment: moment.to("meta")), "exp_avg is a nested, sparse or empty"),
    "a weight more": (lambda saved: saved["model"].update(a=torch.ones(1)), r"model.a is not trained in this run \(1 "),
    "no weights": (lambda saved: saved["model"].clear(), r"is not there \(11 names differ\)"),
    "no model": (lambda saved: saved.pop("model"), "it holds no model"),
    "no optimiser": (lambda saved: saved.update(optimiser=[]), "it holds no optimiser"),
    "no groups": (lambda saved: saved["optimiser"].clear(), "param_groups is not a list of one group"),
    "fewer": (lambda saved: saved["optimiser"]["param_groups"][0].update(params=[0]), "not over the 11 tensors"),
    "decay": (lambda saved: saved["optimiser"]["param_groups"][0].update(weight_decay=3), "weight_decay is 3, and 0.1"),
    "stranger": (lambda saved: saved["optimiser"]["state"].update(x={}), "optimiser.state holds the tensor 'x' of 11"),
    "SGD": (lambda saved: saved["optimiser"]["state"][0].pop("exp_avg"), r"state\[0\].exp_avg is not there"),
    "moment": (replace_moment(lambda moment: moment[:1]), r"optimiser.state\[0\].exp_avg has shape"),
    "moment NaN": (replace_moment(poison), r"optimiser.state\[0\].exp_avg holds NaN"),
    "state 3": (lambda saved: saved["optimiser"]["state"].update({0: 3}), r"optimiser.state\[0\] is 3"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_and_moments_that_do_not_fit(name: str, vlm: VLM, tmp_path: Path) -> None:
    change, told = CHANGES[name]
    optimiser = trained_once(vlm)
    content = copy.deepcopy({"step": 1, **training_state(vlm, optimiser)})
    change(content)
    path = tmp_path / "state.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"state.pt is not a checkpoint of this run: .*{told}") as raised:
        read_state(path, lambda saved: check_training_state(vlm, optimiser, saved))
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)


def test_weights_and_moments_that_fit(vlm: VLM) -> None:
    """Before the first step there are no moments."""
    for optimiser in (make_optimiser(vlm, lr=0.1, weight_decay=0.1), trained_once(vlm)):
        saved = copy.deepcopy(training_state(vlm, optimiser))
        check_training_state(vlm, optimiser, saved)
        load_training_state(vlm, optimiser, saved)


def test_tokens_beyond_the_model(vlm: VLM) -> None:
    check_tokens(vlm, [(0, 271)], "state")
    for completion in ((272,), (-1, 3), ()):
        with pytest.raises(ValueError, match="state holds a completion of the tokens .*; the model has 272"):
            check_tokens(vlm, [completion], "state")


def test_a_refused_checkpoint_changes_nothing(vlm: VLM, tmp_path: Path) -> None:
    """Neither the model nor the run's folder: the log is cut to the checkpoint's step only after it was believed."""
    @dataclass(frozen=True)
    class Flags:
        out: str
        resume: bool = False
        device: str = "cpu"
        keep: int = 2
        shard: bool = False

    optimiser = trained_once(vlm)
    replay = ReplayBuffer(capacity=4, min_margin=0.0)
    replay.add([PAIR])
    with Ranks("cpu") as ranks:
        run = Run(Flags(str(tmp_path / "run")), ranks)
        run.start()
        save(run, State(step=1, fresh=[PAIR]), vlm, optimiser, replay)
        run.log({"step": 1})
        run.log({"step": 2})
        other = ReplayBuffer(capacity=4, min_margin=0.0)
        assert restore(run, vlm, optimiser, other).fresh == [PAIR] and list(other.pairs) == [PAIR]

        run.log({"step": 2})
        [path] = run.checkpoints.glob("*/state.pt")
        content = torch.load(path)
        content["state"]["buffer"] = [{"item_id": "q1"}]
        torch.save(content, path)
        before = {name: parameter.clone() for name, parameter in vlm.named_parameters()}
        with pytest.raises(ValueError, match="another version's, .* state.buffer.*, the only checkpoint$"):
            restore(run, vlm, optimiser, other)
        assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2
        for name, parameter in vlm.named_parameters():
            assert torch.equal(parameter, before[name])
