"""A served model as the programs open it: eval.py's model, train.py's verifier. (gate.py's: survey_served.py.)"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from eval import Config
from loop.answer_log import AnswerLog
from loop.endpoint import is_served
from loop.run import Run
from loop.served import ServedModel
from model.processor import Chat
from tasks import Item
from tasks.output import Output

SERVED = "served"               # folder of a run: what a served verifier answered
PROMPTS_A_SLOT = 4              # of a served model: so many prompts are written down together, for each in flight
LOCAL_FLAGS = ("device", "dtype", "min_pixels", "max_pixels", "max_prompt_tokens", "skip_long")


Greedy = Callable[[list[Chat]], Sequence[Any]]          # chats -> a list of one answer for each


def open_answerer(cfg: Config, items: Sequence[Item], out: Output) -> tuple[Sequence[Item], Greedy, int]:
    """For eval.py: the items that the model is asked about, what answers their chats greedily, how many at a time.

    ValueError where the model is not there, or where a flag means nothing for it.
    """
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
    return items, greedy_or_stop, served.concurrency * PROMPTS_A_SLOT


def open_verifier(run: Run) -> tuple[ServedModel, str]:
    """For train.py: its verifier, and the identity by which a resumed run knows it again: the model's name.

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
    log = AnswerLog(*sorted((run.folder / SERVED).glob("rank-*.jsonl")))
    return {"failed_requests": log.count_failed()}
