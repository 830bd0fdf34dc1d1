"""The three families against live transformers on tiny random checkpoints (skipped where it is not installed), against
golden files that it made, and against themselves: batched = single, cached = uncached, packed = separate."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

from golden.make import COLUMNS, GOLDEN, TOKENS
from model import VLM, generate, load_vlm, save_vlm
from model.layers import RMSNorm
from model.pairs import pack_pairs
from model.processor import collate
from model.prompts import pack_prompts
from model.sampler import banned_tokens
from model.vlm import FeatureCache
from tiny import (
    CONFIGS,
    chat,
    disk_name,
    example_chats,
    follow_meta,
    load_reference,
    picture,
    reference_greedy,
    reference_inputs,
    write_checkpoint,
)

# family, tied head, spelling of config.json, key names, shards, whom Mllama follows
VARIANTS = {
    "qwen3_vl": ("qwen3_vl", True, "published", "published", 1, "meta"),
    "qwen3_vl-untied": ("qwen3_vl", False, "transformers 5", "transformers 5", 3, "meta"),
    "qwen2_5_vl": ("qwen2_5_vl", True, "published", "published", 1, "meta"),
    "qwen2_5_vl-untied": ("qwen2_5_vl", False, "transformers 5", "transformers 5", 3, "meta"),
    "mllama": ("mllama", False, "published", "published", 1, "meta"),
    "mllama-transformers": ("mllama", False, "transformers 5", "transformers 5", 3, "transformers"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a variant, written once."""
    root = tmp_path_factory.mktemp("models")

    def write(name: str) -> Path:
        family, tied, spelling, layout, shards, _ = VARIANTS[name]
        if not (root / name).exists():
            write_checkpoint(root / name, CONFIGS[family](tied, spelling), layout=layout, shards=shards)
        return root / name
    return write


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, folder: Callable[[str], Path]) -> tuple[str, VLM]:
    """A variant's name and its model."""
    return request.param, load_vlm(folder(request.param), mllama_follow=VARIANTS[request.param][-1])


@pytest.fixture(scope="module")
def reference(case: tuple[str, VLM]) -> Any:
    """transformers' model of the same folder."""
    pytest.importorskip("transformers")
    name, vlm = case
    model = load_reference(vlm.folder)
    return follow_meta(model) if name == "mllama" else model


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the largest difference is below `tolerance` of the largest value."""
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@torch.no_grad()
def test_logits_equal_transformers(case: tuple[str, VLM], reference: Any) -> None:
    """Asked for is 1e-4 of the largest logit; at 1e-5 a wrong GELU shows too."""
    name, vlm = case
    more = [chat(picture(16, 16, 5)), chat("x", picture(90, 10, 6), picture(10, 90, 7), "y", picture(44, 60, 8), "z")]
    for messages in example_chats() + more:
        batch = vlm.processor([messages])
        assert close(vlm(batch), reference(**reference_inputs(vlm, batch)).logits), (name, messages)


@torch.no_grad()
def test_padded_batch_equals_transformers(case: tuple[str, VLM], reference: Any) -> None:
    """Rows of different lengths. Mllama: each with one picture, since transformers lets a row see another's padding."""
    name, vlm = case
    chats = example_chats() if "qwen" in name else [
        chat(picture(30, 40), "what is this?"), chat("hm", picture(90, 20, 1), "a longer question about the picture")]
    batch = vlm.processor(chats)
    kept = batch.attention_mask.bool()
    assert close(vlm(batch)[kept], reference(**reference_inputs(vlm, batch)).logits[kept])


def test_greedy_equals_transformers(case: tuple[str, VLM], reference: Any) -> None:
    _, vlm = case
    theirs = [reference_greedy(vlm, reference, c, 8) for c in example_chats()]
    ours = generate(vlm, example_chats(), max_new_tokens=8, temperature=0)
    assert [list(c.token_ids) for [c] in ours] == theirs


@torch.no_grad()
def test_batched_equals_single(case: tuple[str, VLM]) -> None:
    """A text-only row, one picture and several in one batch, and in another order."""
    _, vlm = case
    chats = example_chats()
    for order in ([0, 1, 2, 3], [3, 0, 2, 1, 0]):
        batch = vlm.processor([chats[i] for i in order])
        for row, i in zip(vlm(batch), order):
            alone = vlm(vlm.processor([chats[i]]))[0]
            assert close(row[:len(alone)], alone)


@torch.no_grad()
def test_cached_steps_equal_a_full_pass(case: tuple[str, VLM]) -> None:
    _, vlm = case
    pictures: dict = {}
    rows = vlm.processor.rows(example_chats(), pictures)
    new = [7, 99, 41]
    start = [int(row.positions.max()) + 1 for row in rows]
    full = collate([row.continued(new) for row in rows], pictures, vlm.processor.pad_id)
    expected = vlm(full)
    [prompts] = pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id)
    order = prompts.numbers[:, 0].tolist()
    assert sorted(order) == list(range(len(rows))) and prompts.numbers.shape[1] == 1      # no two begin alike
    cache = vlm.new_cache(prompts, 2)                                                     # two samples a prompt
    vlm.hidden(prompts.batch, vlm.image_features(prompts.batch), cache)
    for t, token in enumerate(new):
        position = torch.tensor([start[b] for b in order]).repeat_interleave(2) + t
        logits = vlm.logits(vlm.step(torch.full((len(position),), token), position, cache))
        for g, b in enumerate(order):
            for sample in (2 * g, 2 * g + 1):
                assert close(logits[sample], expected[b, len(rows[b].ids) + t])


def test_samples_do_not_depend_on_the_batch(case: tuple[str, VLM]) -> None:
    _, vlm = case
    how = {"n": 3, "max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 3}
    together = generate(vlm, example_chats(), **how)
    assert together == [generate(vlm, [c], **how)[0] for c in example_chats()]
    assert together == generate(vlm, example_chats(), batch_size=3, **how)
    assert [row[:1] for row in together] == generate(vlm, example_chats(), **{**how, "n": 1})
    assert len({c.token_ids for row in together for c in row}) > 8
    assert together != generate(vlm, example_chats(), **{**how, "seed": 4})


def test_banned_ids_are_never_sampled(case: tuple[str, VLM], monkeypatch: pytest.MonkeyPatch) -> None:
    _, vlm = case
    banned, plain = torch.zeros(len(vlm.head_weight), dtype=torch.bool), vlm.logits
    banned[banned_tokens(vlm)] = True
    assert banned.sum() >= 4 and not banned[[c for c in vlm.stop_ids]].any()
    monkeypatch.setattr(vlm, "logits", lambda hidden: plain(hidden) + 100.0 * banned, raising=False)
    for temperature in (0, 1):
        for [completion] in generate(vlm, example_chats(), max_new_tokens=6, temperature=temperature):
            assert not banned[list(completion.token_ids)].any()


def test_stop_ids_end_a_sample(case: tuple[str, VLM], monkeypatch: pytest.MonkeyPatch) -> None:
    _, vlm = case
    stop, plain = max(vlm.stop_ids), vlm.logits
    bump = 100.0 * (torch.arange(len(vlm.head_weight)) == stop)
    monkeypatch.setattr(vlm, "logits", lambda hidden: plain(hidden) + bump, raising=False)
    [[completion]] = generate(vlm, [chat("hi")], max_new_tokens=6, temperature=0)
    assert completion.token_ids == (stop,) and completion.finish_reason == "stop" and completion.text == ""


@pytest.mark.parametrize("argument", [{"n": 0}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": -0.1},
                                      {"max_new_tokens": 0}])
def test_sampling_out_of_range(folder: Callable[[str], Path], argument: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        generate(load_vlm(folder("qwen3_vl")), [chat("hi")], **argument)


@torch.no_grad()
def test_packed_pair_equals_separate_rows(case: tuple[str, VLM]) -> None:
    """[prompt | chosen | rejected] gives each completion the states it has alone after its prompt."""
    _, vlm = case
    sides = [([5, 6, 7, 8], [9, 10]), ([11], [12, 13, 14]), ([5], [6]), ([70, 71], [72])]
    triples = [(c, *side) for c, side in zip(example_chats(), sides)]
    packed = pack_pairs(vlm.processor, triples)
    states = packed.predictors(vlm.hidden(packed.batch, vlm.image_features(packed.batch)))
    for which in (0, 1):
        for b, (messages, *both) in enumerate(triples):
            pictures: dict = {}
            [row] = vlm.processor.rows([messages], pictures)
            alone = row.continued(both[which])
            batch = collate([alone], pictures, 0)
            expected = vlm.hidden(batch, vlm.image_features(batch))[0, len(row.ids) - 1:-1]
            found = states[which * len(triples) + b][packed.mask[which * len(triples) + b]]
            assert close(found, expected)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_every_weight_is_trained(folder: Callable[[str], Path], compute_dtype: torch.dtype | None) -> None:
    """Gradients of packed pairs are finite and none is absent, with weights in fp32 and activations in either dtype."""
    for name in ("qwen3_vl", "qwen2_5_vl", "mllama", "mllama-transformers"):
        vlm = load_vlm(folder(name), mllama_follow=VARIANTS[name][-1])
        vlm.compute_dtype = compute_dtype
        packed = pack_pairs(vlm.processor, [(c, [5, 6, 7], [9, 10]) for c in example_chats()])
        hidden = vlm.hidden(packed.batch, vlm.image_features(packed.batch))
        assert hidden.dtype == (compute_dtype or torch.float32)
        picked = vlm.logits(packed.predictors(hidden)).float().log_softmax(-1).gather(2, packed.targets[..., None])
        picked[packed.mask].sum().backward()
        for parameter, p in vlm.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), (name, parameter)


@torch.no_grad()
def test_kept_features_change_nothing(folder: Callable[[str], Path]) -> None:
    for name in ("qwen3_vl", "qwen2_5_vl", "mllama"):
        vlm = load_vlm(folder(name))
        batch = vlm.processor(example_chats())
        expected = vlm(batch)
        vlm.tower.requires_grad_(False)
        vlm.feature_cache = FeatureCache(10 ** 8)
        for _ in range(2):
            assert torch.equal(vlm(batch), expected)
        assert len(vlm.feature_cache.entries) == len(batch.pictures)
        assert not any(p.requires_grad for n, p in vlm.named_parameters() if "vis" in n or "projector" in n)


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
    before = {k: w for path in folder(name).glob("*.safetensors") for k, w in load_file(path).items()}
    after = load_file(tmp_path / "copy/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    again = load_vlm(tmp_path / "copy")
    assert all(torch.equal(p, q) for p, q in zip(vlm.parameters(), again.parameters(), strict=True))
    pytest.importorskip("transformers")
    theirs = load_reference(tmp_path / "copy").state_dict()
    for parameter, weight in vlm.named_parameters():
        assert torch.equal(theirs[parameter], weight)


@pytest.mark.parametrize("name", VARIANTS)
def test_folders_that_transformers_wrote(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Its key names, its spelling of config.json and its shards."""
    pytest.importorskip("transformers")
    vlm = load_vlm(folder(name))
    reference = load_reference(folder(name))
    if VARIANTS[name][0] == "mllama":
        reference.config.vision_config.intermediate_layers_indices = vlm.model["vision_model"].depths
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    for kept in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / kept).write_text((folder(name) / kept).read_text())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load_vlm(tmp_path)
    batch = vlm.processor(example_chats())
    assert torch.equal(again(batch), vlm(batch)) and again.stop_ids == vlm.stop_ids


@pytest.mark.parametrize("family", CONFIGS)
def test_both_layouts_hold_the_same(family: str, tmp_path: Path) -> None:
    old = write_checkpoint(tmp_path / "old", CONFIGS[family](), layout="published")
    new = write_checkpoint(tmp_path / "new", CONFIGS[family](spelling="transformers 5"), layout="transformers 5")
    first, second = load_vlm(old), load_vlm(new)
    for (name, p), (other, q) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)
        assert first.disk_names[name] == disk_name(family, name) and second.disk_names[name] == name
    batch = first.processor(example_chats())
    assert torch.equal(first(batch), second(batch))


def test_config_saved_again_by_transformers_4(tmp_path: Path) -> None:
    first = load_vlm(write_checkpoint(tmp_path / "a", CONFIGS["qwen2_5_vl"]()))
    again = load_vlm(write_checkpoint(tmp_path / "b", CONFIGS["qwen2_5_vl"](spelling="transformers 4")))
    batch = first.processor(example_chats())
    assert torch.equal(first(batch), again(batch))


def test_windows_do_not_divide(folder: Callable[[str], Path]) -> None:
    """Every window is a rectangle of at most 2 x 2 cells of one frame of one picture, and holds all of its patches."""
    tower = load_vlm(folder("qwen2_5_vl")).tower
    grids = [(1, 6, 10), (2, 4, 2), (1, 8, 8), (1, 2, 2)]
    order, lengths = tower.window_order(grids, torch.device("cpu"))
    places = [(g, t, r // 2, c // 2) for g, (frames, h, w) in enumerate(grids) for t in range(frames)
              for R in range(h // 2) for C in range(w // 2) for r in (2 * R, 2 * R + 1) for c in (2 * C, 2 * C + 1)]
    assert sorted(order.tolist()) == list(range(len(places))) and sum(lengths) == len(places)
    assert lengths == sorted(lengths) and set(lengths) == {4, 8, 16}
    expected = {}
    for n, (g, t, r, c) in enumerate(places):
        expected.setdefault((g, t, r // 2, c // 2), []).append(n)
    found = sorted(part.tolist() for part in order.split(lengths))
    assert found == sorted(expected.values())


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "mllama"])
def test_layers_are_compared(name: str, folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The debugger finds no difference; and where one is put in, it names the module."""
    pytest.importorskip("transformers")
    import compare_layers
    assert compare_layers.main([str(folder(name))]) == 0
    assert "modules agree within" in capsys.readouterr().out
    vlm, reference = load_vlm(folder(name), mllama_follow="transformers"), load_reference(folder(name))
    reference.model.language_model.layers[1].mlp.up_proj.weight.data *= 1.01
    differences = compare_layers.compare(vlm, reference, chat(picture(60, 30), "?"))
    assert next(n for n, d in differences.items() if d > 1e-4) == "model.language_model.layers.1.mlp.up_proj"


def test_norm_multiplies_after_rounding() -> None:
    """In bf16 the unit vector is rounded before the weight is applied, and the product once more."""
    norm, x = RMSNorm(64, 1e-6), torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm.weight.data = torch.linspace(0.1, 2, 64)
    unit = (x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()).bfloat16()
    assert torch.equal(norm(x), norm.weight.bfloat16() * unit)
    assert not torch.equal(norm(x), (norm.weight * unit.float()).bfloat16())


def test_errors_count_all_chats(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="chat 3: unknown role 'tool'"):
        generate(load_vlm(folder("qwen3_vl")), [chat("hi")] * 3 + [[{"role": "tool"}]], batch_size=2, max_new_tokens=1)


def test_unknown_way_to_follow(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="google"):
        load_vlm(folder("mllama"), mllama_follow="google")


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "mllama", "mllama-transformers"])
def test_golden(name: str, folder: Callable[[str], Path]) -> None:
    """Logits and greedy continuations that transformers gave for the same folder."""
    vlm = load_vlm(folder(name), mllama_follow=VARIANTS[name][-1])
    path = GOLDEN / f"{name}.safetensors"
    expected = load_file(path)
    with safe_open(path, "pt") as file:
        greedy = json.loads(file.metadata()["greedy"])
    for i, messages in enumerate(example_chats()):
        with torch.no_grad():
            assert close(vlm(vlm.processor([messages]))[0][:, COLUMNS], expected[str(i)])
        [[completion]] = generate(vlm, [messages], max_new_tokens=TOKENS, temperature=0)
        assert list(completion.token_ids) == greedy[i]
