"""What a GPU is given to do at true shapes, counted without one: operators, waits of the host, bytes, FLOPs.

    python tests/bench/counts.py [--model Qwen3-VL-2B] [--prompts 8] [--samples 8] [--pairs 4] [--quick]

                    Qwen3-VL with pictures of 1024 x 1024, in bf16:
    features        the vision tower, of all pictures
    prefill         the prompts, their features at hand
    decode step     one token of all samples, its draw included
    micro-batch     pairs forward and backward, weights cast before and features at hand

looks: how often the host waits until the GPU has computed something; copies: until it has taken something. GB: what
all operators read and write. floor: the milliseconds of GB and TFLOP at --bandwidth and --rate, added up; the defaults
are what an H100 reaches. Below the table stands what a decode step must read at least, whatever its operators are.

No number here was measured on a GPU.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "helpers")]

from bench_peers import SIZES, Size, chats, completions, write_settings
from dpo import dpo_loss
from floors import step_bytes
from loop.gradients import StepGradients
from loop.optimise import row_logps, set_trainable
from loop.ranks import Ranks
from model import FAMILIES, VLM
from model.pairs import pack_pairs
from model.prompts import Prompts, pack_prompts
from model.sampler import Sampling, draw_uniforms, sample_batch
from model.settings import read_settings
from model.vlm import FeatureCache, weights_in_compute_dtype
from pretended_gpu import Seen
from pretended_shapes import ShapesOnlyGPU
from published import CONFIGS

MODELS = [name for name in CONFIGS if name.startswith("Qwen3-VL")]
FIRST = 5                                               # tokens that are drawn up to the step that is counted
GIGA = 1e9


def load(gpu: ShapesOnlyGPU, folder: Path, dtype: torch.dtype) -> VLM:
    """A model without numbers, and a processor of the published kind. `folder` has the settings."""
    config = read_settings(folder, "config.json")
    family = FAMILIES[config["model_type"]]
    with torch.device("meta"):
        vlm = family(config)
    gpu.take(vlm, dtype)
    vlm.compute_dtype = torch.bfloat16
    vlm.processor = family.make_processor(folder, config)
    vlm.folder = folder
    vlm.stop_ids = frozenset({151645})
    vlm.requires_grad_(False)
    vlm.feature_cache = FeatureCache(1 << 40)
    vlm.check_finite = lambda finite: None              # there is no number to look at
    return vlm


def watched(gpu: ShapesOnlyGPU, work: Callable[[], object]) -> Seen:
    with gpu.watch() as seen:
        work()
    return seen


def without(longer: Seen, shorter: Seen) -> Seen:
    """What one run has more than another."""
    return Seen(longer.waits - shorter.waits, longer.operators - shorter.operators,
                costs=longer.costs - shorter.costs)


@torch.no_grad()
def sampling(gpu: ShapesOnlyGPU, vlm: VLM, size: Size) -> tuple[dict[str, Seen], Prompts]:
    """The tower, the prefill and one decode step."""
    pictures: dict = {}
    rows = vlm.processor.rows(chats(size, size.prompts), pictures)
    [prompts] = pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id)

    def draw(steps: int) -> None:
        uniforms = draw_uniforms(rows, size.samples, steps, 0, Counter())
        sample_batch(vlm, prompts, size.samples, Sampling(steps, 0.7, 1.0, 0), uniforms)
    tower = watched(gpu, lambda: vlm.image_features(prompts.batch))
    short, long = (watched(gpu, lambda: draw(steps)) for steps in (FIRST - 1, FIRST))
    step = without(long, short)
    prefill = watched(gpu, lambda: draw(1))
    return {"features": tower, "prefill": prefill, "decode step": step}, prompts


def training(gpu: ShapesOnlyGPU, vlm: VLM, size: Size) -> Seen:
    """One micro-batch of a step, forward and backward; its gradients are added to those of one before."""
    set_trainable(vlm, "language")
    triples = []
    for i, chat in enumerate(chats(size, size.batch)):
        chosen, rejected = (vlm.processor.encode(text) for text in completions(size, i, 2))
        triples.append((chat, chosen, rejected))
    reference = torch.zeros(size.batch, device="cuda")

    def micro_batch() -> None:
        rows = pack_pairs(vlm.processor, triples).to(vlm.device, vlm.dtype)
        chosen, rejected = row_logps(vlm, rows).chunk(2)
        losses, _, _ = dpo_loss(chosen, rejected, reference, reference)
        losses.sum().backward()
    trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    with StepGradients(trained, Ranks("cpu")), weights_in_compute_dtype(vlm):
        micro_batch()
        return watched(gpu, micro_batch)


def table(found: dict[str, Seen], bandwidth: float, rate: float) -> str:
    lines = [f"{'':14}{'operators':>10}{'looks':>7}{'copies':>8}{'GB':>10}{'TFLOP':>9}{'floor, ms':>11}"]
    for name, seen in found.items():
        moved = seen.costs["bytes"]
        work = seen.costs["flops"]
        floor = 1e3 * (moved / bandwidth + work / rate)
        lines.append(f"{name:14}{seen.operators.total():>10}{seen.looks():>7}{seen.copies():>8}{moved / GIGA:>10.2f}"
                     f"{work / 1e12:>9.3f}{floor:>11.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-VL-2B", choices=MODELS)
    parser.add_argument("--prompts", type=int, default=8, help="that are sampled from together")
    parser.add_argument("--samples", type=int, default=8, help="a prompt")
    parser.add_argument("--pairs", type=int, default=4, help="a micro-batch")
    parser.add_argument("--tokens", type=int, default=128, help="of a sample so far, for what must be read")
    parser.add_argument("--bandwidth", type=float, default=3.0e12, help="bytes a second")
    parser.add_argument("--rate", type=float, default=7.98e14, help="FLOP a second")
    parser.add_argument("--quick", action="store_true", help="a toy: does everything run?")
    args = parser.parse_args(arguments)
    for name in ("prompts", "samples", "pairs", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")

    size = replace(SIZES["cuda"], config=CONFIGS[args.model])
    if args.quick:
        size = SIZES["quick"]
    size = replace(size, prompts=args.prompts, samples=args.samples, batch=args.pairs)
    with ShapesOnlyGPU() as gpu, tempfile.TemporaryDirectory() as name:
        write_settings(size, Path(name))
        vlm = load(gpu, Path(name), torch.bfloat16)
        found, prompts = sampling(gpu, vlm, size)
        read = step_bytes(vlm, prompts, size.samples, args.tokens)
        found["micro-batch"] = training(gpu, load(gpu, Path(name), torch.float32), size)
    G, T = prompts.batch.input_ids.shape
    name = "a toy" if args.quick else args.model
    print(f"{name}: {G} prompts of {T} tokens, {size.samples} samples each; "
          f"{size.batch} pairs of {size.completion} tokens a side")
    print(table(found, args.bandwidth, args.rate))
    floor = 1e3 * sum(read.values()) / args.bandwidth
    parts = ", ".join(f"{name} {amount / GIGA:.2f}" for name, amount in read.items())
    print(f"a decode step at token {args.tokens} must read, in GB: {parts}; {floor:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
