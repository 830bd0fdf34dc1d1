"""What a decode step must read, whatever its operators are: what bench.py and counts.py hold a step against."""
from __future__ import annotations

from collections.abc import Sequence

from model import VLM
from model.layers import SelfAttention
from model.processor import Chat
from model.prompts import Prompts, pack_prompts


def weight_bytes(vlm: VLM) -> int:
    """Of the decoder layers and the head: a step reads them once for all samples."""
    return sum(parameter.nbytes for parameter in vlm.decoder.layers.parameters()) + vlm.head_weight.nbytes


def token_bytes(vlm: VLM) -> int:
    """Of one token's keys and values in all layers of self-attention, in the dtype computed in."""
    numbers = 0
    for module in vlm.decoder.modules():
        if isinstance(module, SelfAttention):
            numbers += len(module.k_proj.weight) + len(module.v_proj.weight)
    return numbers * vlm.dtype.itemsize


def step_bytes(vlm: VLM, prompts: Prompts, samples: int, tokens: int) -> dict[str, int]:
    """Of the step in which each sample has `tokens` of its own. A row's prompts are read once for all its samples."""
    in_prompts = int(prompts.batch.attention_mask.sum())
    count = int((prompts.numbers >= 0).sum()) * samples
    return {
        "weights": weight_bytes(vlm),
        "prompts": in_prompts * token_bytes(vlm),
        "own tokens": count * tokens * token_bytes(vlm),
    }


def decode_bytes(vlm: VLM, chats: Sequence[Chat], samples: int, tokens: int) -> int:
    """Of all decode steps of `generate` where every sample gets `tokens` tokens. The first one comes of the prompt."""
    pictures: dict = {}
    rows = vlm.processor.rows(list(chats), pictures)
    total = 0
    for prompts in pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id):
        for own in range(1, tokens):
            total += sum(step_bytes(vlm, prompts, samples, own).values())
    return total
