"""What bench.py gives to both sides (a checkpoint, pictures, texts, a stopwatch), and the peers' sides of it.

The peers are run as their documentation shows, with their own defaults, apart from what makes the two sides do the
same: no gradient checkpointing, no truncation, the whole vocabulary sampled, the vision tower frozen.
"""
from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from model import FAMILIES
from model.settings import read_settings
from pretended_cuda import taped_graphs
from published import CONFIGS, qwen3_vl
from verifier import rubric_chat

Figures = dict[str, Any]                                # what a side hands back: "seconds", "rate", "memory", ...
STOPS = [151645, 151643]
RATE = 1e-8                                             # learning rate: so small that log-probabilities stay comparable
CONTROL = [f"<|{name}|>" for name in (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
    "vision_end vision_pad image_pad video_pad").split()]
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def narrow(hidden: int, layers: int, heads: int, vision: int, depth: int) -> dict:
    """Qwen3-VL's config.json with a narrower decoder and tower and the published vocabulary, tied."""
    config = qwen3_vl(hidden, layers, heads, hidden * 8 // 3, True, {
        "depth": depth, "hidden_size": vision, "num_heads": vision // 64, "intermediate_size": 4 * vision,
        "deepstack_visual_indexes": [depth // 4, depth // 2, 3 * depth // 4]})
    rope = config["text_config"]["rope_scaling"] | {"mrope_section": [12, 10, 10]}
    config["text_config"] |= {"num_key_value_heads": heads // 3, "head_dim": 64, "rope_scaling": rope}
    return config


@dataclass(frozen=True)
class Size:
    """What is measured: the model, its device and dtype, and how much of everything."""
    config: dict
    device: str = "cpu"
    dtype: torch.dtype = torch.float32                  # of the files, and computed in (dpo_step_bf16 apart)
    picture: int = 448                                  # pixels a side
    question: int = 49                                  # letters; a letter is a token
    completion: int = 64                                # tokens, the stop token and a newline included
    pairs: int = 4
    batch: int = 2                                      # pairs a step
    prompts: int = 4
    samples: int = 8                                    # a prompt
    verdict: int = 12                                   # tokens
    positions: int = 2048                               # whose log-probabilities are computed at once
    pictures: int = 16                                  # that are preprocessed
    host_picture: int = 1024                            # pixels a side of what the host makes a pair's row from
    responses: int = 10_000
    hostile: int = 1_000_000                            # characters
    matmul: int = 4096
    copied: int = 1 << 29                               # bytes
    repeats: int = 3


SIZES = {
    "cpu": Size(narrow(384, 16, 6, 256, 8)),
    "quick": Size(narrow(48, 2, 3, 64, 4), picture=64, question=20, completion=8, pairs=2, samples=2, verdict=4,
                  prompts=2, positions=64, pictures=2, host_picture=64, responses=200, hostile=20_000, matmul=256,
                  copied=1 << 20, repeats=1),
    "cuda": Size(CONFIGS["Qwen3-VL-2B"], "cuda", torch.bfloat16, picture=1024, completion=256, pairs=8, batch=4,
                 prompts=16, matmul=8192, copied=1 << 32),
}


# ---- what both sides are given: a checkpoint, pictures, questions, completions

def write_settings(size: Size, folder: Path) -> None:
    """All of a checkpoint but its weights: one token a byte."""
    settings = {"config": size.config, "generation_config": {"eos_token_id": STOPS, "pad_token_id": 151643},
                "preprocessor_config": {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16,
                                        "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3,
                                        "image_std": [0.5] * 3, "size": {"shortest_edge": min(65536, size.picture ** 2),
                                                                         "longest_edge": 1048576}},
                "tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
                                     "pad_token": "<|endoftext|>", "processor_class": "Qwen3VLProcessor"}}
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<{i}>" for i in range(256, 151643))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_checkpoint(size: Size, folder: Path) -> None:
    """A folder that load_vlm and transformers open: random weights that keep activations near 1."""
    write_settings(size, folder)
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, float("norm" in name and name.endswith("weight")), dtype=size.dtype)
        return (torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5).to(size.dtype)
    with torch.device("meta"):
        model = FAMILIES["qwen3_vl"](read_settings(folder, "config.json"))
    save_file({name: weight(name, p.shape) for name, p in model.named_parameters()}, folder / "model.safetensors",
              metadata={"format": "pt"})


def picture(number: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def letters(number: int, count: int) -> str:
    return bytes(np.random.default_rng(number).integers(97, 123, count, np.uint8)).decode()


def questions(size: Size, count: int) -> list[tuple[Image.Image, str]]:
    return [(picture(i, size.picture, size.picture), letters(i, size.question)) for i in range(count)]


def chats(size: Size, count: int) -> list[list[dict]]:
    return [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
            for image, text in questions(size, count)]


def completions(size: Size, item: int, count: int) -> list[str]:
    return [letters(1000 + 100 * item + k, size.completion - 2) for k in range(count)]


def rubric_chats(size: Size) -> list[list[dict]]:
    return [rubric_chat(chats(size, 1)[0], text) for text in completions(size, 0, size.samples)]


def unresized(size: Size) -> list[Image.Image]:
    """Sides that are no multiples of a merged patch: the pictures must be resized."""
    return [picture(i, size.picture + 9, size.picture * 3 // 4 + 7) for i in range(size.pictures)]


def logprob_inputs(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, H), the head's weight (V, H), both with gradient, and targets (N,)."""
    text, generator = size.config["text_config"], torch.Generator().manual_seed(0)
    hidden = torch.randn(size.positions, text["hidden_size"], generator=generator)
    weight = torch.randn(text["vocab_size"], text["hidden_size"], generator=generator) * text["hidden_size"] ** -0.5
    targets = torch.randint(text["vocab_size"], (size.positions,), generator=generator)
    return *(x.to(size.device, size.dtype).requires_grad_() for x in (hidden, weight)), targets.to(size.device)


def digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


# ---- measuring

@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def linear_flops(x: Sequence[int], weight: Sequence[int], *rest: Any, **options: Any) -> int:
    """Of x W^T by oneDNN, from the two shapes: PyTorch's counter does not know it."""
    return 2 * math.prod(x) * weight[0]


class Meter:
    """One side's stopwatch and memory gauge. Make it after the imports and before the models."""

    def __init__(self, size: Size):
        self.size, self.base = size, 0.0
        self.base = self.growth("VmRSS")

    def growth(self, field: str = "VmHWM") -> float:
        """MB by which memory grew at its peak: the GPU's, or this process's resident memory."""
        if self.size.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6 - self.base
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6 - self.base

    def clock(self) -> float:
        if self.size.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, work: Callable[[], Any], count: float, count_flops: bool = False, **rest: Any) -> Figures:
        """Warm up, then the median time of `work`, which handles `count` things; `result` keeps what it returned.
        "first_memory" is before later calls fragment the heap. Operations come last: their counter holds memory, and
        does not see into a CUDA graph: meanwhile a graph is a tape of operators."""
        work()
        rest["first_memory"], seconds = self.growth(), []
        for _ in range(self.size.repeats):
            start = self.clock()
            self.result = work()
            seconds.append(self.clock() - start)
        figures = self.figures(statistics.median(seconds), count, **rest)
        if count_flops:
            with taped_graphs(), FlopCounterMode(display=False) as counter:
                work()
            figures["flops"] = counter.get_total_flops()
        return figures

    def figures(self, seconds: float, count: float, **rest: Any) -> Figures:
        return {"seconds": seconds, "rate": count / seconds, "memory": self.growth(),
                "dtype": str(self.size.dtype)} | rest


def measure_load(size: Size, folder: Path, build: Callable[[], Any], load: Callable[[], torch.nn.Module]) -> Figures:
    """Each weight is read once: a mapped file costs nothing until then. The growth is that of the first load, after
    `build` on the meta device has imported what it needs. Checked: the weights' number and largest values."""
    @torch.no_grad()
    def work() -> list[float]:
        weights = list(load().parameters())
        return [sum(w.numel() for w in weights), sum(w.max().item() for w in weights)]
    with torch.device("meta"):
        build()
    meter, file = Meter(size), (folder / "model.safetensors").stat().st_size
    check = work()
    return {"of_file": meter.growth() * 1e6 / file} | meter.run(work, 1, bytes=file, check=check)


# ---- the peers' sides

def load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor
    return AutoProcessor.from_pretrained(folder)


def load_model(size: Size, folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval().to(size.device)


def dpo(size: Size, folder: Path, dtype: torch.dtype | None = None) -> Figures:
    """One epoch to warm up, then two a repetition; TRL computes the reference in every step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    processor, dtype = load_processor(folder), dtype or size.dtype
    rows = preference_rows(size)
    meter, ends = Meter(size), []

    class Clock(TrainerCallback):
        def on_epoch_end(self, *args: Any, **options: Any) -> None:
            ends.append(meter.clock())
    model = load_model(size, folder, torch.float32)
    model.model.visual.requires_grad_(False)
    config = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=size.device == "cpu", bf16=dtype == torch.bfloat16, max_length=None,
        gradient_checkpointing=False, per_device_train_batch_size=size.batch, num_train_epochs=1 + 2 * size.repeats,
        learning_rate=RATE, lr_scheduler_type="constant", dataloader_pin_memory=False, report_to="none",
        save_strategy="no", logging_strategy="steps", logging_steps=1, disable_tqdm=True)
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=processor,
                         callbacks=[Clock()])
    trainer.train()
    first = [row for row in trainer.state.log_history if "logps/chosen" in row][:size.pairs // size.batch]
    seconds = statistics.median(b - a for a, b in zip(ends[:-2:2], ends[2::2]))
    return meter.figures(seconds, 2 * size.pairs, dtype=str(dtype), check=[
        statistics.mean(row[f"logps/{side}"] for row in first) for side in ("chosen", "rejected")])


def preference_rows(size: Size) -> list[dict[str, Any]]:
    """A pair a row, as TRL takes them."""
    rows = []
    for i, (image, text) in enumerate(questions(size, size.pairs)):
        chosen, rejected = ([{"role": "assistant", "content": c}] for c in completions(size, i, 2))
        prompt = [{"role": "user", "content": text}]
        rows.append({"images": [image], "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def host(size: Size, folder: Path) -> Figures:
    """What DPOTrainer's loader does for a step of one pair: the data set decodes the picture, the collator the rest."""
    from datasets import Dataset
    from datasets import Image as Encoded
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
    data = Dataset.from_list(preference_rows(replace(size, picture=size.host_picture)))
    collate = DataCollatorForVisionPreference(load_processor(folder))
    assert isinstance(data.features["images"].feature, Encoded)         # kept as PNG, decoded at every reading
    rows = []
    for i in range(size.pairs):
        found = collate([data[i]])
        rows += [ids[mask.bool()].tolist() for ids, mask in zip(found["input_ids"], found["attention_mask"])]
    figures = Meter(size).run(lambda: [collate([data[i]]) for i in range(size.pairs)], size.pairs, check=digest(rows))
    return figures | {"ms": 1000 * figures["seconds"] / size.pairs}


def ask(size: Size, processor: Any, model: Any, asked: list[list[dict]],
        **options: Any) -> tuple[list[str], Tensor, str]:
    """Chats to texts: (texts, new token ids, digest of the prompts' ids)."""
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"}).to(size.device)
    with torch.no_grad():
        out = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1]:]
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    return processor.batch_decode(out, skip_special_tokens=True), out, digest(prompts)


def sampling(size: Size, folder: Path) -> Figures:
    processor, meter = load_processor(folder), Meter(size)
    model, asked = load_model(size, folder, size.dtype), chats(size, size.prompts)

    def work() -> tuple[int, str]:
        torch.manual_seed(0)
        _, out, prompts = ask(size, processor, model, asked, do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
                              num_return_sequences=size.samples, max_new_tokens=size.completion)
        stops = torch.isin(out, torch.tensor(STOPS, device=out.device)).long()
        return int((stops.cumsum(1) - stops == 0).sum()), prompts           # up to the first stop token, that included
    figures = meter.run(work, 1)
    return figures | {"rate": meter.result[0] / figures["seconds"], "check": meter.result[1]}


def scoring(size: Size, folder: Path) -> Figures:
    processor, meter = load_processor(folder), Meter(size)
    model, asked = load_model(size, folder, size.dtype), rubric_chats(size)
    return meter.run(lambda: ask(size, processor, model, asked, do_sample=False, max_new_tokens=size.verdict),
                     size.samples) | {"check": meter.result[2]}


def logprob(size: Size, folder: Path) -> Figures:
    (hidden, weight, targets), meter = logprob_inputs(size), Meter(size)

    def work() -> float:
        hidden.grad = weight.grad = None
        logps = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)          # (N, V)
        total = logps.gather(-1, targets[:, None]).sum()
        total.backward()
        return total.item()
    return meter.run(work, size.positions) | {"check": [meter.result, hidden.grad.norm().item()]}


def preprocessing(size: Size, folder: Path) -> Figures:
    from transformers import Qwen2VLImageProcessorPil
    images, pictures = Qwen2VLImageProcessorPil.from_pretrained(folder), unresized(size)
    first = images(pictures[0], return_tensors="pt")["pixel_values"]
    return Meter(size).run(lambda: [images(p, return_tensors="pt") for p in pictures], len(pictures),
                           check=digest(first.numpy().tobytes()))


def load(size: Size, folder: Path) -> Figures:
    from transformers import AutoConfig, AutoModelForImageTextToText
    config = AutoConfig.from_pretrained(folder)
    return measure_load(size, folder, lambda: AutoModelForImageTextToText.from_config(config),
                        lambda: load_model(size, folder, size.dtype))


SIDES = {"dpo": dpo, "dpo_bf16": partial(dpo, dtype=torch.bfloat16), "sampling": sampling, "scoring": scoring,
         "scoring_logits": scoring, "logprob": logprob, "preprocessing": preprocessing, "host": host, "load": load}
READS = ("transformers", "torchvision", "jinja2")
NEEDS = {"dpo": ("trl", *READS), "dpo_bf16": ("trl", *READS), "sampling": READS, "scoring": READS,
         "scoring_logits": READS, "logprob": (), "preprocessing": READS[:1], "host": ("trl", *READS),
         "load": READS[:1]}


def missing(jobs: list[str]) -> list[str]:
    """The packages that the peers' sides of `jobs` need and that are not installed."""
    needed = dict.fromkeys(name for job in jobs for name in NEEDS.get(job, ()))
    return [name for name in needed if find_spec(name) is None]
