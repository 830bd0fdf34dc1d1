"""A model that is only asked, as the programs open it, in memory or behind a server: eval.py's, train.py's verifier.

(gate.py's are loop/cached_model.py's and loop/served_survey.py's.)
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import model
from eval import Config
from loop import existing_pairs
from loop.answer_log import AnswerLog
from loop.endpoint import is_served
from loop.lengths import answer_uses, fitting
from loop.loading import activation_dtype, frozen
from loop.run import Run
from loop.served import Asked, ServedModel
from loop.shard import share_out
from model.checkpoint import folder_digest
from model.processor import Chat
from model.vlm import pick_device
from tasks import Item
from tasks.output import Output

SERVED = "served"               # folder of a run: what a served verifier answered
PROMPTS_A_SLOT = 4              # of a served model: so many prompts are written down together, for each in flight
LOCAL_FLAGS = ("device", "dtype", "min_pixels", "max_pixels", "max_prompt_tokens", "skip_long")


@dataclass(frozen=True)
class Answerer:
    """What answers eval.py's questions."""
    items: Sequence[Item]                               # that it is asked about
    greedy: Callable[[list[Chat]], Sequence[Any]]       # chats -> a list of one answer for each
    at_once: int                                        # how many chats it is given together
    prepare: Callable[[list[Chat]], None] | None        # see VLM.prepare; None: there is nothing to prepare


def open_answerer(cfg: Config, items: Sequence[Item], out: Output) -> Answerer:
    """For eval.py: its model, from a folder or behind a server.

    ValueError where the model is not there, where an item is too long for it, or where a flag means nothing for it.
    """
    if is_served(cfg.model):
        return open_served(cfg, items, out)
    asked = fitting(items, answer_uses(cfg.model, cfg), cfg.skip_long)
    device = pick_device(cfg.device)
    vlm = frozen(model.load_vlm(cfg.model, device, activation_dtype(cfg.dtype, device)), cfg)
    greedy = partial(model.generate, vlm, n=1, max_new_tokens=cfg.max_new_tokens, temperature=0.0, seed=0)
    return Answerer(asked, greedy, cfg.batch_size, vlm.prepare)


def open_served(cfg: Config, items: Sequence[Item], out: Output) -> Answerer:
    """The same for a model behind a server."""
    for name in LOCAL_FLAGS:
        if getattr(cfg, name):
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for a served model: its server decides that")
    served = ServedModel(cfg.model, cfg, AnswerLog(out.served))
    served.expect(len(items))
    out.settings["model"] = str(served.address)         # with its name, where the server had to be asked for it

    def greedy_or_stop(chats: list[Chat]) -> Sequence[Any]:
        answers = served.generate(chats, max_new_tokens=cfg.max_new_tokens, temperature=0.0)
        served.check()
        return answers
    return Answerer(items, greedy_or_stop, served.concurrency * PROMPTS_A_SLOT, None)


def open_scorer(run: Run, dtype: torch.dtype) -> tuple[Asked | None, str]:
    """For train.py: the frozen verifier, and the identity by which a resumed run knows it again.

    With --pairs there is no verifier, and the pairs' own digest stands in its place.
    """
    cfg = run.cfg
    if cfg.pairs:
        return None, existing_pairs.digest(cfg.pairs)
    if is_served(cfg.verifier):
        return open_verifier(run)
    verifier = frozen(model.load_vlm(cfg.verifier, run.ranks.device, dtype), cfg)
    if cfg.shard_verifier:
        share_out(verifier)
    return verifier, folder_digest(verifier.folder)


def open_verifier(run: Run) -> tuple[ServedModel, str]:
    """The same of a served verifier; its identity is the model's name.

    (That of a model which is loaded is the digest of its files; those of a served one nobody sees.) What the server
    answered is kept in the run's folder, in a file a rank, and each rank reads all of them.
    """
    folder = run.folder / SERVED
    log = AnswerLog(folder / f"rank-{run.ranks.rank}.jsonl", *sorted(folder.glob("rank-*.jsonl")))
    served = ServedModel(run.cfg.verifier, run.cfg, log, share=run.ranks.world)
    served.identity = [served.address.name]             # its server may be elsewhere when the run is resumed
    return served, served.address.name


def failed_requests(run: Run) -> dict[str, int]:
    """For summary.json: how many requests to a served verifier failed for good and were not answered since."""
    if not is_served(run.cfg.verifier):
        return {}
    run.ranks.barrier()                                 # every rank has written what it was answered
    folder = run.folder / SERVED
    log = AnswerLog(folder / "rank-0.jsonl", *sorted(folder.glob("rank-*.jsonl")))
    return {"failed_requests": log.count_failed()}
