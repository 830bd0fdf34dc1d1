"""The three families against live transformers on tiny random checkpoints (skipped where it is not installed), against
golden files that it made, and against themselves: batched = single, cached = uncached, packed = separate."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

from golden.make import COLUMNS, GOLDEN, TOKENS
from model import VLM, generate, load_vlm, save_vlm
from model.batch import Batch, collate
from model.layers import RMSNorm
from model.mllama import Mllama
from model.pairs import pack_pairs
from model.processor import Chat
from model.prompts import pack_prompts
from model.samples import banned_tokens
from model.vlm import FeatureCache
from tiny import (
    CONFIGS,
    chat,
    disk_name,
    example_chats,
    follow_meta,
    load_like_transformers,
    load_reference,
    picture,
    reference_greedy,
    reference_inputs,
    write_checkpoint,
)


@dataclass(frozen=True)
class Variant:
    """A tiny checkpoint: its family, whether embedding and head are tied, and how its files are written."""
    family: str
    tied: bool
    style: str = "published"                            # of config.json and of the tensors' names
    shards: int = 1
    like_transformers: bool = False                     # Mllama: what its `follow` is set to


VARIANTS = {
    "qwen3_vl": Variant("qwen3_vl", tied=True),
    "qwen3_vl-untied": Variant("qwen3_vl", tied=False, style="transformers 5", shards=3),
    "qwen2_5_vl": Variant("qwen2_5_vl", tied=True),
    "qwen2_5_vl-untied": Variant("qwen2_5_vl", tied=False, style="transformers 5", shards=3),
    "mllama": Variant("mllama", tied=False),
    "mllama-transformers": Variant(
        "mllama", tied=False, style="transformers 5", shards=3, like_transformers=True),
}
FAMILY_VARIANTS = ["qwen3_vl", "qwen2_5_vl", "mllama"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a variant, written once."""
    root = tmp_path_factory.mktemp("models")

    def write(name: str) -> Path:
        variant = VARIANTS[name]
        if not (root / name).exists():
            config = CONFIGS[variant.family](variant.tied, variant.style)
            write_checkpoint(root / name, config, layout=variant.style, shards=variant.shards)
        return root / name

    return write


def load_variant(folder: Callable[[str], Path], name: str) -> VLM:
    """A variant's model, set to follow whom the variant does."""
    if VARIANTS[name].like_transformers:
        return load_like_transformers(folder(name))
    return load_vlm(folder(name))


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, folder: Callable[[str], Path]) -> tuple[str, VLM]:
    """A variant's name and its model."""
    name = request.param
    return name, load_variant(folder, name)


@pytest.fixture(scope="module")
def reference(case: tuple[str, VLM]) -> Any:
    """transformers' model of the same folder."""
    pytest.importorskip("transformers")
    name, vlm = case
    model = load_reference(vlm.folder)
    return follow_meta(model) if name == "mllama" else model


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the largest difference is below `tolerance` of the largest value."""
    if ours.shape != theirs.shape:
        return False
    difference = (ours - theirs).abs().max()
    return bool(difference <= tolerance * theirs.abs().max())


def final_hidden(vlm: VLM, batch: Batch) -> Tensor:
    """Final hidden states (B, T, H)."""
    features = vlm.image_features(batch)
    return vlm.hidden(batch, features)


@torch.no_grad()
def test_logits_equal_transformers(case: tuple[str, VLM], reference: Any) -> None:
    """Asked for is 1e-4 of the largest logit; at 1e-5 a wrong GELU shows too."""
    name, vlm = case
    small = chat(picture(16, 16, 5))
    three_pictures = chat("x", picture(90, 10, 6), picture(10, 90, 7), "y", picture(44, 60, 8), "z")
    for messages in [*example_chats(), small, three_pictures]:
        batch = vlm.processor([messages])
        inputs = reference_inputs(vlm, batch)
        expected = reference(**inputs).logits
        assert close(vlm(batch), expected), (name, messages)


@torch.no_grad()
def test_padded_batch_equals_transformers(case: tuple[str, VLM], reference: Any) -> None:
    """Rows of different lengths. Mllama: each with one picture, since transformers lets a row see another's padding."""
    name, vlm = case
    if "qwen" in name:
        chats = example_chats()
    else:
        chats = [
            chat(picture(30, 40), "what is this?"),
            chat("hm", picture(90, 20, 1), "a longer question about the picture"),
        ]
    batch = vlm.processor(chats)
    real = batch.attention_mask.bool()
    expected = reference(**reference_inputs(vlm, batch)).logits
    assert close(vlm(batch)[real], expected[real])


def test_greedy_equals_transformers(case: tuple[str, VLM], reference: Any) -> None:
    _, vlm = case
    ours = generate(vlm, example_chats(), max_new_tokens=8, temperature=0)
    for messages, [completion] in zip(example_chats(), ours):
        theirs = reference_greedy(vlm, reference, messages, 8)
        assert list(completion.token_ids) == theirs


@torch.no_grad()
def test_batched_equals_single(case: tuple[str, VLM]) -> None:
    """A text-only row, one picture and several in one batch, and in another order."""
    _, vlm = case
    chats = example_chats()
    for order in ([0, 1, 2, 3], [3, 0, 2, 1, 0]):
        batch = vlm.processor([chats[i] for i in order])
        logits = vlm(batch)
        for row, i in zip(logits, order):
            single = vlm.processor([chats[i]])
            alone = vlm(single)[0]
            assert close(row[:len(alone)], alone)


@torch.no_grad()
def test_cached_steps_equal_a_full_pass(case: tuple[str, VLM]) -> None:
    _, vlm = case
    processor = vlm.processor
    pictures: dict = {}
    rows = processor.rows(example_chats(), pictures)
    new_tokens = [7, 99, 41]
    continued = [row.continued(new_tokens) for row in rows]
    expected = vlm(collate(continued, pictures, processor.pad_id))

    [prompts] = pack_prompts(rows, pictures, processor.image_id, processor.pad_id)
    order = prompts.numbers[:, 0].tolist()
    assert sorted(order) == list(range(len(rows)))
    assert prompts.numbers.shape[1] == 1                                                  # no two begin alike
    cache = vlm.new_cache(prompts, 2)                                                     # two samples a prompt
    features = vlm.image_features(prompts.batch)
    vlm.hidden(prompts.batch, features, cache)

    first_positions = [int(rows[b].positions.max()) + 1 for b in order]
    first_positions = torch.tensor(first_positions).repeat_interleave(2)
    for t, token in enumerate(new_tokens):
        tokens = torch.full_like(first_positions, token)
        hidden = vlm.step(tokens, first_positions + t, cache)
        logits = vlm.logits(hidden)
        for g, b in enumerate(order):
            column = len(rows[b].ids) + t
            assert close(logits[2 * g], expected[b, column])
            assert close(logits[2 * g + 1], expected[b, column])


def test_samples_do_not_depend_on_the_batch(case: tuple[str, VLM]) -> None:
    _, vlm = case
    options = {"n": 3, "max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 3}
    together = generate(vlm, example_chats(), **options)
    one_by_one = [generate(vlm, [messages], **options)[0] for messages in example_chats()]
    assert together == one_by_one
    assert together == generate(vlm, example_chats(), batch_size=3, **options)
    assert [samples[:1] for samples in together] == generate(vlm, example_chats(), **{**options, "n": 1})
    assert together != generate(vlm, example_chats(), **{**options, "seed": 4})

    distinct = set()
    for samples in together:
        distinct |= {completion.token_ids for completion in samples}
    assert len(distinct) > 8


def test_banned_ids_are_never_sampled(case: tuple[str, VLM], monkeypatch: pytest.MonkeyPatch) -> None:
    _, vlm = case
    plain = vlm.logits
    banned = torch.zeros(len(vlm.head_weight), dtype=torch.bool)
    banned[banned_tokens(vlm)] = True
    assert banned.sum() >= 4
    assert not banned[list(vlm.stop_ids)].any()
    monkeypatch.setattr(vlm, "logits", lambda hidden: plain(hidden) + 100.0 * banned, raising=False)
    for temperature in (0, 1):
        for [completion] in generate(vlm, example_chats(), max_new_tokens=6, temperature=temperature):
            assert not banned[list(completion.token_ids)].any()


def test_stop_ids_end_a_sample(case: tuple[str, VLM], monkeypatch: pytest.MonkeyPatch) -> None:
    _, vlm = case
    plain = vlm.logits
    stop = max(vlm.stop_ids)
    bonus = torch.zeros(len(vlm.head_weight))
    bonus[stop] = 100.0
    monkeypatch.setattr(vlm, "logits", lambda hidden: plain(hidden) + bonus, raising=False)
    [[completion]] = generate(vlm, [chat("hi")], max_new_tokens=6, temperature=0)
    assert completion.token_ids == (stop,)
    assert completion.finish_reason == "stop"
    assert completion.text == ""


@pytest.mark.parametrize("argument", [{"n": 0}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": -0.1},
                                      {"max_new_tokens": 0}])
def test_sampling_out_of_range(folder: Callable[[str], Path], argument: dict) -> None:
    vlm = load_vlm(folder("qwen3_vl"))
    [name] = argument                                   # the only key
    with pytest.raises(ValueError, match=name):
        generate(vlm, [chat("hi")], **argument)


@torch.no_grad()
def test_packed_pair_equals_separate_rows(case: tuple[str, VLM]) -> None:
    """[prompt | chosen | rejected] gives each completion the states it has alone after its prompt."""
    _, vlm = case
    chosen = [[5, 6, 7, 8], [11], [5], [70, 71]]
    rejected = [[9, 10], [12, 13, 14], [6], [72]]
    chats = example_chats()
    packed = pack_pairs(vlm.processor, list(zip(chats, chosen, rejected)))
    states = packed.predictors(final_hidden(vlm, packed.batch))                    # (2B, C, H)

    completions = chosen + rejected                                                       # stacked as the states are
    assert len(states) == len(completions)
    for side, completion in enumerate(completions):
        expected = states_alone(vlm, chats[side % len(chats)], completion)
        in_row = states[side][packed.mask[side]]
        assert close(in_row, expected)


def states_alone(vlm: VLM, messages: Chat, completion: list[int]) -> Tensor:
    """The hidden states that predict the tokens of `completion`, which follows its prompt in a row of its own."""
    pictures: dict = {}
    [row] = vlm.processor.rows([messages], pictures)
    batch = collate([row.continued(completion)], pictures, 0)
    hidden = final_hidden(vlm, batch)[0]
    prompt_end = len(row.ids) - 1
    return hidden[prompt_end:-1]


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_every_weight_is_trained(folder: Callable[[str], Path], compute_dtype: torch.dtype | None) -> None:
    """Gradients of packed pairs are finite and none is absent, with weights in fp32 and activations in either dtype."""
    for name in (*FAMILY_VARIANTS, "mllama-transformers"):
        vlm = load_variant(folder, name)
        vlm.compute_dtype = compute_dtype
        packed = pack_pairs(vlm.processor, [(messages, [5, 6, 7], [9, 10]) for messages in example_chats()])
        hidden = final_hidden(vlm, packed.batch)
        assert hidden.dtype == (compute_dtype or torch.float32)
        logits = vlm.logits(packed.predictors(hidden))
        logps = logits.float().log_softmax(-1).gather(2, packed.targets[..., None])
        logps[packed.mask].sum().backward()
        for parameter_name, parameter in vlm.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, (name, parameter_name)
            assert gradient.isfinite().all() and gradient.any(), (name, parameter_name)


@torch.no_grad()
def test_kept_features_change_nothing(folder: Callable[[str], Path]) -> None:
    for name in FAMILY_VARIANTS:
        vlm = load_vlm(folder(name))
        batch = vlm.processor(example_chats())
        expected = vlm(batch)
        vlm.tower.requires_grad_(False)
        vlm.feature_cache = FeatureCache(10 ** 8)
        for _ in range(2):
            assert torch.equal(vlm(batch), expected)
        assert len(vlm.feature_cache.entries) == len(batch.pictures)
        for parameter_name, parameter in vlm.named_parameters():
            if "vis" in parameter_name or "projector" in parameter_name:
                assert not parameter.requires_grad


def test_placeholders_that_do_not_match(case: tuple[str, VLM]) -> None:
    _, vlm = case
    batch = vlm.processor(example_chats())
    features = vlm.image_features(batch)
    batch.input_ids[2, 3] = vlm.image_token_id
    with pytest.raises(ValueError, match="chat 2 "):
        vlm.hidden(batch, features)
    with pytest.raises(ValueError, match="pictures"):
        vlm.hidden(batch, features[:-1])


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_as_it_was_loaded(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Bit-equal tensors under the names they had, and transformers opens the folder."""
    vlm = load_vlm(folder(name))
    save_vlm(vlm, tmp_path / "copy")
    before = {}
    for path in folder(name).glob("*.safetensors"):
        before |= load_file(path)
    after = load_file(tmp_path / "copy/model.safetensors")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert torch.equal(tensor, after[tensor_name])

    loaded_copy = load_vlm(tmp_path / "copy")
    for parameter, copied in zip(vlm.parameters(), loaded_copy.parameters(), strict=True):
        assert torch.equal(parameter, copied)

    pytest.importorskip("transformers")
    theirs = load_reference(tmp_path / "copy").state_dict()
    for parameter_name, parameter in vlm.named_parameters():
        assert torch.equal(theirs[parameter_name], parameter)


@pytest.mark.parametrize("name", VARIANTS)
def test_folders_that_transformers_wrote(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Its key names, its spelling of config.json and its shards."""
    pytest.importorskip("transformers")
    vlm = load_vlm(folder(name))
    reference = load_reference(folder(name))
    if VARIANTS[name].family == "mllama":
        reference.config.vision_config.intermediate_layers_indices = vlm.model["vision_model"].depths
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    for file_name in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / file_name).write_text((folder(name) / file_name).read_text())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    theirs = load_vlm(tmp_path)
    batch = vlm.processor(example_chats())
    assert torch.equal(theirs(batch), vlm(batch))
    assert theirs.stop_ids == vlm.stop_ids


@pytest.mark.parametrize("family", CONFIGS)
def test_both_layouts_hold_the_same(family: str, tmp_path: Path) -> None:
    old = load_vlm(write_checkpoint(tmp_path / "old", CONFIGS[family](), layout="published"))
    new_config = CONFIGS[family](spelling="transformers 5")
    new = load_vlm(write_checkpoint(tmp_path / "new", new_config, layout="transformers 5"))
    old_parameters = dict(old.named_parameters())
    new_parameters = dict(new.named_parameters())
    assert list(old_parameters) == list(new_parameters)
    for name, parameter in old_parameters.items():
        assert torch.equal(parameter, new_parameters[name])
        assert old.disk_names[name] == disk_name(family, name)
        assert new.disk_names[name] == name
    batch = old.processor(example_chats())
    assert torch.equal(old(batch), new(batch))


def test_config_saved_again_by_transformers_4(tmp_path: Path) -> None:
    make_config = CONFIGS["qwen2_5_vl"]
    published = load_vlm(write_checkpoint(tmp_path / "a", make_config()))
    saved_again = load_vlm(write_checkpoint(tmp_path / "b", make_config(spelling="transformers 4")))
    batch = published.processor(example_chats())
    assert torch.equal(published(batch), saved_again(batch))


def test_windows_do_not_divide(folder: Callable[[str], Path]) -> None:
    """Every window is a rectangle of at most 2 x 2 cells of one frame of one picture, and holds all of its patches."""
    tower = load_vlm(folder("qwen2_5_vl")).tower
    grids = [(1, 6, 10), (2, 4, 2), (1, 8, 8), (1, 2, 2)]
    order, lengths = tower.window_order(grids, torch.device("cpu"))
    windows = window_of_each_patch(grids)
    assert sorted(order.tolist()) == list(range(len(windows)))
    assert sum(lengths) == len(windows)
    assert lengths == sorted(lengths)
    assert set(lengths) == {4, 8, 16}

    expected: dict[tuple[int, ...], list[int]] = {}
    for patch, window in enumerate(windows):
        expected.setdefault(window, []).append(patch)
    in_windows = [patches.tolist() for patches in order.split(lengths)]
    in_windows.sort()
    assert in_windows == sorted(expected.values())


def window_of_each_patch(grids: list[tuple[int, int, int]]) -> list[tuple[int, ...]]:
    """(picture, frame, row of windows, column of windows) of every patch, in the order in which they are given."""
    windows = []
    for number, (frames, h, w) in enumerate(grids):
        for frame in range(frames):
            for row in range(h // 2):                                       # of cells; a cell is 2 x 2 patches
                for column in range(w // 2):
                    windows += [(number, frame, row // 2, column // 2)] * 4
    return windows


@pytest.mark.parametrize("name", FAMILY_VARIANTS)
def test_layers_are_compared(name: str, folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The debugger finds no difference; and where one is put in, it names the module."""
    pytest.importorskip("transformers")
    import compare_layers
    assert compare_layers.main([str(folder(name))]) == 0
    assert "modules agree within" in capsys.readouterr().out

    vlm = load_like_transformers(folder(name))
    reference = load_reference(folder(name))
    reference.model.language_model.layers[1].mlp.up_proj.weight.data *= 1.01
    differences = compare_layers.compare(vlm, reference, chat(picture(60, 30), "?"))
    differing = [module for module, difference in differences.items() if difference > 1e-4]
    assert differing[0] == "model.language_model.layers.1.mlp.up_proj"


def test_norm_multiplies_after_rounding() -> None:
    """In bf16 the unit vector is rounded before the weight is applied, and the product once more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    norm = RMSNorm(64, 1e-6)
    norm.weight.data = torch.linspace(0.1, 2, 64)
    mean_square = x.float().square().mean(-1, keepdim=True)
    unit = x.float() * (mean_square + 1e-6).rsqrt()
    unit = unit.bfloat16()
    rounded_at_once = (norm.weight * unit.float()).bfloat16()
    assert torch.equal(norm(x), norm.weight.bfloat16() * unit)
    assert not torch.equal(norm(x), rounded_at_once)


def test_errors_count_all_chats(folder: Callable[[str], Path]) -> None:
    vlm = load_vlm(folder("qwen3_vl"))
    chats = [chat("hi"), chat("hi"), chat("hi"), [{"role": "tool"}]]
    with pytest.raises(ValueError, match="chat 3: unknown role 'tool'"):
        generate(vlm, chats, batch_size=2, max_new_tokens=1)


def test_unknown_way_to_follow(folder: Callable[[str], Path]) -> None:
    vlm = load_vlm(folder("mllama"))
    assert isinstance(vlm, Mllama) and vlm.follow == "meta"
    vlm.follow = "google"
    with pytest.raises(ValueError, match="google"):
        vlm(vlm.processor(example_chats()))


@pytest.mark.parametrize("name", [*FAMILY_VARIANTS, "mllama-transformers"])
def test_golden(name: str, folder: Callable[[str], Path]) -> None:
    """Logits and greedy continuations that transformers gave for the same folder."""
    vlm = load_variant(folder, name)
    path = GOLDEN / f"{name}.safetensors"
    expected = load_file(path)
    with safe_open(path, "pt") as file:
        greedy = json.loads(file.metadata()["greedy"])
    for i, messages in enumerate(example_chats()):
        with torch.no_grad():
            logits = vlm(vlm.processor([messages]))[0]
        assert close(logits[:, COLUMNS], expected[str(i)])
        [[completion]] = generate(vlm, [messages], max_new_tokens=TOKENS, temperature=0)
        assert list(completion.token_ids) == greedy[i]
