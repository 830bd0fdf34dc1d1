"""The six published models at their true width and vocabulary: opened, compared with transformers, asked, saved.

In bf16, as they are published. A CPU without bf16 arithmetic takes five times as long for it as for fp32: prompts are
short, photographs are made small by `limit_pixels`, and each answer serves several checks. Qwen3-VL-2B is checked in
fp32, too. (Llama's pictures cannot be made small: its tower runs once, in fp32, and its features serve all checks.)
"""
from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from build import PUBLISHED_IDS, photograph
from checkpoints import Checkpoint
from dpo import sequence_logps
from model import VLM, Completion, generate, load_vlm, next_digits, save_vlm
from model.batch import Batch
from model.checkpoint import tensor_files
from model.pairs import CompletionRows, pack_completions, pack_pairs
from model.samples import banned_tokens
from model.vlm import FeatureCache
from tiny import chat, load_like_transformers, load_reference, reference_inputs
from verifier import REPLIES

SMALL = (4096, 40_000)                                  # pixels: a photograph of 640 x 480 is 35 or 40 tokens
TILES = 4                                               # that Llama's tower computes for any picture
LAST = 12                                               # tokens of a prompt whose logits are compared
TOP_K = 50
# Logits have a standard deviation of 3. bf16 keeps eight bits, and two layers, a tower and a head round some ten times,
# each time in another order than the pass that is compared with: a few hundredths of the spread.
LOGIT_ERROR = 0.3                                       # of a single logit in bf16
LOGP_ERROR = 0.15                                       # a token, of a log-probability in bf16
BF16_ERROR = 0.05                                       # root mean square over that of the truth, transformers' own
BF16_RATIO = 1.5                                        # our error in bf16 over transformers'
FP32_ERROR = 1e-4                                       # largest difference over largest logit


def open_model(checkpoint: Checkpoint) -> VLM:
    """The model in bf16, frozen, that makes photographs small where the family can."""
    model = load_vlm(checkpoint.folder, dtype=torch.bfloat16).requires_grad_(False)
    if checkpoint.family != "mllama":
        model.processor.limit_pixels(*SMALL)
    return model


@pytest.fixture(scope="module")
def vlm(checkpoint: Checkpoint, prompt: Prompt) -> VLM:
    """The model, whose tower sees each picture once; Llama's does not see that of `prompt` again."""
    model = open_model(checkpoint)
    model.feature_cache = FeatureCache(10 ** 9)
    if checkpoint.family == "mllama":
        [picture] = prompt.batch.pictures
        tiles = picture.grid[1] * picture.grid[2]
        used = prompt.features.unflatten(0, (TILES, -1))[:tiles]        # the others are for transformers alone
        model.feature_cache.put(picture.key, used.flatten(0, 1).bfloat16())
    return model


def photo_chat(seed: int = 0) -> list[dict]:
    return chat(photograph(640, 480, seed), "How many red shapes are there?")


def text_chat() -> list[dict]:
    return chat("Answer with a whole number.")


# ---- logits

@dataclass(frozen=True)
class Prompt:
    """A chat with a photograph as one batch, and what we make of it."""
    batch: Batch
    inputs: dict[str, Tensor]                           # the same as transformers takes it
    features: Tensor                                    # of the photograph, computed in fp32; Llama's of all tiles
    truth: Tensor                                       # (1, LAST, V) logits computed in fp32
    logits: Tensor                                      # (1, LAST, V) logits computed in bf16


@pytest.fixture(scope="module")
def prompt(checkpoint: Checkpoint) -> Prompt:
    """Computed by a model that is gone when transformers' comes: two large ones at once would take 8 GiB.

    fp32 activations on bf16 weights are the truth about them, without a second copy of the weights. Llama's tower,
    6,432 tokens for any picture, is computed in fp32 alone.
    """
    model = open_model(checkpoint)
    if checkpoint.family == "mllama":
        model.follow = "transformers"
    batch = model.processor([photo_chat()])
    with torch.no_grad():
        model.compute_dtype = torch.float32
        exact = model.encode_images(batch.pictures)
        truth = last_logits(model, batch, exact)
        model.compute_dtype = None
        rounded = [exact[0].bfloat16()] if checkpoint.family == "mllama" else model.encode_images(batch.pictures)
        logits = last_logits(model, batch, rounded)
    return Prompt(batch, reference_inputs(model, batch), exact[0], truth, logits)


def last_logits(vlm: VLM, batch: Batch, features: list[Tensor]) -> Tensor:
    """Logits of the last tokens in fp32, (B, LAST, V), whatever they are computed in."""
    hidden = vlm.hidden(batch, features)
    return vlm.logits(hidden[:, -LAST:]).float()


def relative_error(logits: Tensor, truth: Tensor) -> float:
    """Root mean square difference over the root mean square of the truth."""
    return float((logits - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@torch.no_grad()
def test_logits_in_bf16(checkpoint: Checkpoint, prompt: Prompt) -> None:
    """Our bf16 is at most 1.5 times as far from fp32 as transformers' own, and that is near it."""
    pytest.importorskip("transformers")
    reference = load_reference(checkpoint.folder, torch.bfloat16)
    inputs = prompt.inputs
    if checkpoint.family == "mllama":
        compare_tower(reference, prompt)
        inputs = {name: tensor for name, tensor in inputs.items() if "pixel" not in name and "ratio" not in name}
        inputs["cross_attention_states"] = prompt.features.bfloat16().unflatten(0, (TILES, -1))
    theirs = reference(**inputs, logits_to_keep=LAST).logits.float()

    reference_error = relative_error(theirs, prompt.truth)
    our_error = relative_error(prompt.logits, prompt.truth)
    print(f"{checkpoint.name}: error in bf16 {our_error:.4f}, transformers' {reference_error:.4f}")
    assert 0 < reference_error < BF16_ERROR
    assert 0 < our_error < BF16_RATIO * reference_error


def compare_tower(reference: torch.nn.Module, prompt: Prompt) -> None:
    """Llama's tower and projector in fp32; the reference goes on in bf16."""
    tower = reference.model.vision_model.float()
    projector = reference.model.multi_modal_projector.float()
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    states = tower(**{name: prompt.inputs[name] for name in names}).last_hidden_state
    theirs = projector(states).flatten(0, -2)                                             # (tiles' tokens, H)
    assert (prompt.features - theirs).abs().max() <= FP32_ERROR * theirs.abs().max()
    reference.bfloat16()


@pytest.mark.models("Qwen3-VL-2B")
@torch.no_grad()
def test_everything_in_fp32(checkpoint: Checkpoint) -> None:
    """The smallest model, with photographs as they are: all logits, and answers that do not depend on the batch."""
    pytest.importorskip("transformers")
    model = load_like_transformers(checkpoint.folder, torch.float32)
    chats = [chat(photograph(400, 300), "which?"), chat("and", photograph(256, 200, 1), "what?"), text_chat()]
    batch = model.processor(chats[:1])
    ours = model(batch)
    reference = load_reference(checkpoint.folder, torch.float32)
    theirs = reference(**reference_inputs(model, batch)).logits
    del reference
    assert (ours - theirs).abs().max() <= FP32_ERROR * theirs.abs().max()

    sampling = {"n": 2, "max_new_tokens": 4, "temperature": 0.8, "top_p": 0.9, "top_k": TOP_K, "seed": 3}
    together = generate(model, chats, **sampling)
    [alone] = generate(model, chats[1:2], **sampling)
    assert together[1] == alone
    assert len({completion.token_ids for completions in together for completion in completions}) == 6


# ---- opened and saved

def test_opens(checkpoint: Checkpoint, vlm: VLM) -> None:
    """load_vlm is strict; beyond that: bf16 throughout, all files' tensors taken, control tokens at published ids."""
    assert {parameter.dtype for parameter in vlm.parameters()} == {torch.bfloat16}
    assert set(vlm.disk_names.values()) == set(tensor_files(checkpoint.folder))
    tokenizer = vlm.processor.tokenizer
    for token, number in PUBLISHED_IDS.items():
        assert tokenizer.token_to_id(token) in (number, None)
    last = max(number for token, number in PUBLISHED_IDS.items() if tokenizer.token_to_id(token) is not None)
    assert vlm.processor.vocabulary == last + 1


def test_saves_bit_for_bit(checkpoint: Checkpoint, vlm: VLM) -> None:
    copy = checkpoint.work / "copy"
    save_vlm(vlm, copy)
    checkpoint.look()
    again = load_vlm(copy, dtype=None)
    assert again.file_dtype == torch.bfloat16
    others = dict(again.named_parameters())
    for name, parameter in vlm.named_parameters():
        assert torch.equal(parameter.view(torch.int16), others.pop(name).view(torch.int16)), name
    assert not others
    for path in checkpoint.folder.glob("*.json"):
        if "index" not in path.name:
            assert (copy / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(copy)


# ---- answers, and the pairs that they make

@dataclass(frozen=True)
class Answers:
    """Greedy and sampled answers to the chat with a photograph, and logits of each token that led to them."""
    greedy: Completion
    sampled: list[Completion]
    rows: CompletionRows                                # [prompt | greedy | first sampled] in one row
    in_pair: Tensor                                     # (2, C, H) states that predict the tokens, from that row
    alone: Tensor                                       # (2, C, H) the same, each answer behind a prompt of its own


@pytest.fixture(scope="module")
def answers(vlm: VLM) -> Answers:
    question = photo_chat()
    [[greedy], [other]] = generate(vlm, [question, text_chat()], max_new_tokens=4, temperature=0)
    assert greedy.token_ids != other.token_ids
    [sampled] = generate(vlm, [question], n=2, max_new_tokens=3, temperature=1.0, top_p=0.95, top_k=TOP_K, seed=1)
    with torch.no_grad():
        rows = pack_pairs(vlm.processor, [(question, greedy.token_ids, sampled[0].token_ids)])
        in_pair = rows.predictors(vlm.hidden(rows.batch, vlm.image_features(rows.batch)))
        both = [(question, greedy.token_ids), (question, sampled[0].token_ids)]
        separate = pack_completions(vlm.processor, both)
        alone = separate.predictors(vlm.hidden(separate.batch, vlm.image_features(separate.batch)))
    return Answers(greedy, sampled, rows, in_pair, alone)


@torch.no_grad()
def test_tokens_are_those_of_the_forward_pass(vlm: VLM, answers: Answers) -> None:
    """A greedy token has the largest logit of those allowed, a sampled one is among the likeliest, within bf16's error.
    """
    logits = vlm.logits(answers.alone).float()                                            # (2, C, V)
    logits[..., banned_tokens(vlm)] = -torch.inf
    of_tokens = logits.gather(2, answers.rows.targets[..., None])[..., 0]                 # (2, C)
    largest = logits.topk(TOP_K).values                                                   # (2, C, TOP_K)
    count = answers.rows.mask.sum(1).tolist()
    assert (of_tokens[0] >= largest[0, :, 0] - LOGIT_ERROR)[:count[0]].all()
    assert (of_tokens[1] >= largest[1, :, -1] - LOGIT_ERROR)[:count[1]].all()
    assert len({completion.token_ids for completion in answers.sampled}) == 2


@torch.no_grad()
def test_pair_rows_equal_separate_sequences(vlm: VLM, answers: Answers) -> None:
    rows = answers.rows
    in_pair = sequence_logps(answers.in_pair, vlm.head_weight, rows.targets, rows.mask)
    alone = sequence_logps(answers.alone, vlm.head_weight, rows.targets, rows.mask)
    difference = (in_pair - alone).abs() / rows.mask.sum(1)
    assert (difference <= LOGP_ERROR).all(), difference
    assert in_pair.isfinite().all()


@torch.no_grad()
def test_next_digits(vlm: VLM) -> None:
    """The probabilities of digits are those that a forward pass over the prompt and the reply gives."""
    question = text_chat()
    [of_replies] = next_digits(vlm, [question], REPLIES)
    for reply, of_digits in zip(REPLIES, of_replies, strict=True):
        rows = pack_completions(vlm.processor, [(question, vlm.processor.encode(reply))])
        hidden = vlm.hidden(rows.batch, [])
        logps = vlm.logits(hidden[0, -1]).float().log_softmax(-1)                         # (V,)
        expected = torch.stack([logps[ids].logsumexp(0) for ids in vlm.processor.digits])
        assert ((torch.tensor(of_digits).log() - expected).abs() <= LOGIT_ERROR).all()
