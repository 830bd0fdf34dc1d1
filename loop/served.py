"""A model behind an OpenAI-compatible server, which is only asked: /v1/chat/completions, several requests at a time.

It stands where a VLM stands that answers and is not trained. It has no weights and no processor: its server prepares
pictures, knows the positions, and counts tokens, if anyone does. Not every server takes every field. What one refuses,
or passes over, is found out by one request and left out of the others:

    n                   one request a sample instead, its seed derived from --seed, the prompt and the sample's number
    response_format     a JSON verdict is asked for by the prompt alone

A request that fails for good is FAILED, which is no verdict and no answer. Once more than --max-failed of the requests
have failed, nothing is sent any more, and `check` ends the run. What was answered is kept (answer_log.py).
"""
from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from loop.answer_log import AnswerLog, digest
from loop.endpoint import Address, BadAnswer, Endpoint, RequestFailed, parse_address
from loop.served_digits import NO_DIGITS, find_digits, needs_second, read_digits
from model import VLM
from model.processor import Chat
from model.sources import EncodedPicture, is_encoded, open_rgb, to_rgb
from tasks.flags import RequestFlags
from tasks.jsonl import MOST_TOKENS, Response
from verifier import REPLIES

T = TypeVar("T")
R = TypeVar("R")
PATH = "/chat/completions"
REFUSED = (400, 422)                                    # a field that a server does not take
FAILED = Response("", None, "failed")                   # in place of an answer that did not come
TOP_LOGPROBS = 20                                       # the most that servers usually give
LEAST_DIGITS = 0.01                                     # probability of a digit where `{"score": 0.` is continued
SCORE_FORMAT = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": {
    "type": "object",
    "properties": {"score": {"type": "number"}},
    "required": ["score"],
    "additionalProperties": False,
}}}


@dataclass(frozen=True)
class Prompt:
    """A chat as it is sent, and its digest, by which its answers are kept."""
    messages: list[dict[str, Any]]
    digest: str


class TooManyFailed(OSError):
    """More requests have failed for good than --max-failed allows."""


class Feature:
    """A field of requests that a server may or may not take; the first request finds out, the others wait for it."""

    def __init__(self) -> None:
        self.is_taken: bool | None = None               # None: not known yet
        self.lock = threading.Lock()

    def attempt(self, with_it: Callable[[], T], without: Callable[[], T]) -> T:
        """What is answered with the field or, where it is refused, without."""
        if self.is_taken is None:
            with self.lock:
                if self.is_taken is None:
                    return self._find_out(with_it, without)
        return with_it() if self.is_taken else without()

    def _find_out(self, with_it: Callable[[], T], without: Callable[[], T]) -> T:
        try:
            answer = with_it()
        except RequestFailed as error:
            if error.status not in REFUSED:
                raise
            answer = without()                          # if this is refused as well, it was not for the field
            self.is_taken = False
            return answer
        if self.is_taken is None:
            self.is_taken = True
        return answer


class ServedModel:
    """A served model that answers chats. `share`: of how many processes that ask it at once this is one.

    ValueError where there is no server, it refuses the key, or the address names no model and it lists not just one.
    """

    def __init__(self, model: str, flags: RequestFlags, log: AnswerLog, share: int = 1):
        address = parse_address(model)
        self.endpoint = Endpoint(address.url, flags.request_timeout)
        self.address = Address(address.url, find_name(self.endpoint, address))
        self.identity = [self.address.url, self.address.name]       # what answers are kept under
        self.concurrency = max(1, flags.concurrency // share)
        self.max_failed = flags.max_failed
        self.log = log
        self.takes_n = Feature()
        self.takes_format = Feature()
        self.takes_logprobs = Feature()

        self.planned = 0                                # prompts, answered or yet to be
        self.failures = 0                               # prompts whose requests failed for good
        self.reason = ""                                # why the last of them did
        self.lock = threading.Lock()                    # of these two, and of `in_flight`
        self.in_flight = 0
        self.seconds = 0.0                              # what verdicts have cost so far: see _cost
        self.tokens: int | None = 0                     # None: not told of all of them

    # ---- what programs ask for

    def generate(self, chats: Sequence[Chat], n: int = 1, max_new_tokens: int = 256, temperature: float = 0.7,
                 top_p: float = 1.0, seed: int = 0) -> list[list[Response]]:
        """What model.generate does: a list (per chat) of lists (n). A chat whose request failed has n times FAILED."""
        how = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        greedy = temperature == 0
        pictures = Pictures()

        def ask(chat: Chat) -> list[Response]:
            prompt = as_prompt(chat, pictures)
            if greedy or n == 1:
                return [self._one(prompt, how, seed)] * n
            return self._samples(prompt, how, seed, n)

        def answer(chat: Chat) -> list[Response]:
            return self._or_failed(lambda: ask(chat), [FAILED] * n)
        return self._map(answer, chats)

    def verdicts(self, chats: Sequence[Chat], kind: str, verdict_tokens: int) -> Sequence[Any]:
        """What the way of scoring `kind`, of verifier.VERDICTS, asks of these chats: digits' probabilities for
        "logits", a greedy Response each for the others. A request that failed is FAILED, or has no digit."""
        how = {"max_tokens": verdict_tokens, "temperature": 0.0, "top_p": 1.0}
        pictures = Pictures()

        def answer(chat: Chat) -> Any:
            prompt = as_prompt(chat, pictures)
            if kind == "logits":
                return self._or_failed(lambda: self._digits(prompt, how), [NO_DIGITS] * len(REPLIES))
            form = SCORE_FORMAT if kind == "json" else None
            return self._or_failed(lambda: self._one(prompt, how, 0, form, is_verdict=True), FAILED)
        return self._map(answer, chats)

    def prepare(self, chats: Sequence[Chat]) -> None:
        """As VLM.prepare; a picture is opened and encoded when a request is made of it."""

    def expect(self, prompts: int) -> None:
        """So many prompts more are going to be asked: --max-failed is a share of all of them."""
        self.planned += prompts

    def check(self) -> None:
        """TooManyFailed where more requests have failed than may."""
        self.check_failures(self.failures)

    def check_failures(self, failures: int) -> None:
        """The same of the failures of all processes together."""
        if failures > self.max_failed * self.planned:
            raise TooManyFailed(
                f"{failures} of {self.planned} requests to {self.address} failed for good, more than --max-failed "
                f"{self.max_failed:g} allows; what was answered is kept and not asked again. The last: {self.reason}")

    # ---- kinds of answers

    def _one(self, prompt: Prompt, how: dict[str, Any], seed: int, response_format: dict[str, Any] | None = None,
             is_verdict: bool = False) -> Response:
        """One answer to one prompt."""
        how = how | {"seed": seed}

        def ask() -> dict[str, Any]:
            if response_format is None:
                return self._post(prompt.messages, how)
            return self.takes_format.attempt(
                lambda: self._post(prompt.messages, how | {"response_format": response_format}),
                lambda: self._post(prompt.messages, how))
        answer = self._kept(prompt, how | {"format": response_format is not None}, ask)
        if is_verdict:
            self._cost(answer)
        return response(answer, 0)

    def _samples(self, prompt: Prompt, how: dict[str, Any], seed: int, n: int) -> list[Response]:
        """n sampled answers to one prompt, in one request or, where a server does not take n, in one each."""
        whole = how | {"n": n, "seed": derived_seed(seed, prompt, 0)}
        single = [how | {"sample": number, "seed": derived_seed(seed, prompt, number)} for number in range(n)]

        def together() -> list[Response] | None:
            found = self._post(prompt.messages, whole, choices=n)
            if len(found["choices"]) == n:
                self.log.add(self._key(prompt, whole), found)
                return [response(found, number) for number in range(n)]
            self.takes_n.is_taken = False               # n was passed over: what came is kept, the rest is asked for
            for number, choice in enumerate(found["choices"]):
                self.log.add(self._key(prompt, single[number]), {**found, "choices": [choice]})
            return None

        def apart() -> list[Response]:
            return [self._sample(prompt, how, one) for one in single]

        known = self.log.get(self._key(prompt, whole))
        if known is not None:
            return [response(known, number) for number in range(n)]
        if self.log.get(self._key(prompt, single[0])) is not None:
            return apart()                              # as it was begun
        found = self.takes_n.attempt(together, apart)
        return apart() if found is None else found

    def _sample(self, prompt: Prompt, how: dict[str, Any], one: dict[str, Any]) -> Response:
        """One of the samples that are asked for one by one; it is kept as `one`."""
        how = how | {"seed": one["seed"]}
        return response(self._kept(prompt, one, lambda: self._post(prompt.messages, how)), 0)

    def _digits(self, prompt: Prompt, how: dict[str, Any]) -> list[list[float]]:
        """The probabilities of the digits before and after the score's point: see served_digits.py."""
        plain = how | {"seed": 0}
        with_logprobs = plain | {"logprobs": True, "top_logprobs": TOP_LOGPROBS}

        def ask() -> dict[str, Any]:
            answer = self.takes_logprobs.attempt(
                lambda: self._post(prompt.messages, with_logprobs, read_logprobs=find_digits),
                lambda: self._post(prompt.messages, plain))
            if answer["digits"] is None:
                raise ValueError(f"{self.address} gives no log-probabilities (top_logprobs): --verdict logits cannot "
                                 "be read from it; take --verdict json")
            first, second = answer["digits"]
            if second is None:
                second = self._second_digits(prompt) if needs_second(first) else NO_DIGITS
            return {**answer, "digits": [first, second]}

        answer = self._kept(prompt, how | {"digits": TOP_LOGPROBS}, ask)
        self._cost(answer)
        digits: list[list[float]] = answer["digits"]
        return digits

    def _second_digits(self, prompt: Prompt) -> list[float]:
        """The probabilities of the digits after `{"score": 0.`, a reply that is begun and the server is to continue."""
        begun = [*prompt.messages, {"role": "assistant", "content": REPLIES[1]}]
        how = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": TOP_LOGPROBS,
               "continue_final_message": True, "add_generation_prompt": False}
        problem = ""
        digits = None
        try:
            digits = self._post(begun, how, read_logprobs=lambda tokens: read_digits(tokens[0]))["digits"]
        except RequestFailed as error:
            if error.status not in REFUSED:
                raise
            problem = f" ({error})"
        if digits is None or sum(digits) < LEAST_DIGITS:
            raise ValueError(f"{self.address} does not continue a reply that was begun{problem}, so the digits after "
                             f"{REPLIES[1]!r} are not known where it replies 1; take --verdict json")
        return digits

    # ---- requests

    def _map(self, function: Callable[[T], R], things: Sequence[T]) -> list[R]:
        """The function of all things, `concurrency` at a time, in order."""
        if not things:
            return []
        with ThreadPoolExecutor(min(self.concurrency, len(things))) as pool:
            return list(pool.map(function, things))

    def _or_failed(self, ask: Callable[[], R], failed: R) -> R:
        """What is answered; `failed` where a request failed for good, or where too many have."""
        if self.endpoint.given_up.is_set():
            return failed
        try:
            return ask()
        except RequestFailed as error:
            with self.lock:
                self.failures += 1
                self.reason = str(error)
                if self.failures > self.max_failed * self.planned:
                    self.endpoint.given_up.set()
            return failed

    def _kept(self, prompt: Prompt, how: dict[str, Any], ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the log holds of this request, or else ask(), which is kept; a failure is noted there."""
        key = self._key(prompt, how)
        answer = self.log.get(key)
        if answer is None:
            try:
                answer = ask()
            except RequestFailed as error:
                self.log.add_failure(key, str(error))
                raise
            self.log.add(key, answer)
        return answer

    def _key(self, prompt: Prompt, how: dict[str, Any]) -> str:
        """What an answer is kept under: all that it depends on, and no secret."""
        return digest([self.identity, prompt.digest, how])

    def _post(self, messages: list[Any], how: dict[str, Any], choices: int = 1,
              read_logprobs: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Ask the server once, whatever tries that takes: see read_answer. RequestFailed if all fail."""
        body = {"model": self.address.name, "messages": messages, **how}
        with self.lock:
            self.in_flight += 1
            beside = self.in_flight
        started = time.perf_counter()
        try:
            answer = self.endpoint.ask(PATH, body, lambda value: read_answer(value, choices, read_logprobs))
        finally:
            with self.lock:
                beside = max(beside, self.in_flight)
                self.in_flight -= 1
        answer["seconds"] = (time.perf_counter() - started) / beside
        return answer

    def _cost(self, answer: dict[str, Any]) -> None:
        """Add up what verdicts cost: tokens, where the server tells; seconds, a request's time over those beside it."""
        with self.lock:
            self.seconds += answer["seconds"]
            known = self.tokens is not None and answer["tokens"] is not None
            self.tokens = self.tokens + answer["tokens"] if known else None


Asked = VLM | ServedModel                               # a model that only answers


# ---- the parts of requests and answers

class Pictures:
    """Pictures as data URLs of PNG, each encoded once: the prompts of an item's candidates share its picture."""

    def __init__(self) -> None:
        self.lock = threading.Lock()                    # the prompts of an item are made at the same time
        self.urls: dict[int, tuple[object, str]] = {}      # by id; held, so that no other picture gets it

    def url(self, image: Image.Image | EncodedPicture) -> str:
        """The pixels that a local model would see, in RGB and without metadata."""
        with self.lock:
            if id(image) not in self.urls:
                rgb = open_rgb(image) if is_encoded(image) else to_rgb(image)
                plain = Image.frombytes("RGB", rgb.size, rgb.tobytes())
                encoded = io.BytesIO()
                plain.save(encoded, "PNG")
                url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
                self.urls[id(image)] = (image, url)
            return self.urls[id(image)][1]


def as_prompt(chat: Chat, pictures: Pictures) -> Prompt:
    """A chat as OpenAI's interface writes it."""
    messages = []
    for message in chat:
        content = message["content"]
        if not isinstance(content, str):
            content = [as_part(part, pictures) for part in content]
        messages.append({"role": message["role"], "content": content})
    return Prompt(messages, digest(messages))


def as_part(part: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    """A text or a picture of a message."""
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": pictures.url(part["image"])}}
    return {"type": "text", "text": part["text"]}


def derived_seed(seed: int, prompt: Prompt, number: int) -> int:
    """The seed of sample `number` to a prompt: 31 bits."""
    return int(digest([seed, prompt.digest, number])[:8], 16) >> 1


def read_answer(value: Any, choices: int, read_logprobs: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """What is kept of a server's answer: up to `choices` of [text, finish_reason]; the tokens of the reply and those of
    prompt and reply together, None where they are not told; read_logprobs of the first choice's, None where it has
    none. BadAnswer where it is no chat completion.
    """
    try:
        kept = [[choice["message"].get("content") or "", choice.get("finish_reason")] for choice in value["choices"]]
        first = value["choices"][0]
        usage = value.get("usage") or {}
        counts = [usage.get("completion_tokens"), usage.get("prompt_tokens")]
        logprobs = (first.get("logprobs") or {}).get("content")
        digits = read_logprobs(logprobs) if read_logprobs and logprobs else None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadAnswer("the answer is no chat completion") from None
    for text, reason in kept:
        if not isinstance(text, str) or not isinstance(reason, (str, type(None))):
            raise BadAnswer("the answer is no chat completion")

    # Half a surrogate pair, of an emoji that was cut off, is no text that a file can hold.
    kept = [[text.encode(errors="replace").decode(), reason] for text, reason in kept]
    are_known = all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts)
    is_one = len(kept) == 1                             # the counts are those of all choices together
    return {
        "choices": kept[:choices],
        "reply_tokens": counts[0] if are_known and is_one else None,
        "tokens": sum(counts) if are_known else None,
        "digits": digits,
    }


def response(answer: dict[str, Any], number: int) -> Response:
    """Choice `number` of an answer that was kept."""
    text, reason = answer["choices"][number]
    count = answer["reply_tokens"]
    return Response(text, None if count is None else range(count), reason)


def find_name(endpoint: Endpoint, address: Address) -> str:
    """The model's name: the address's own, or that of the only model which /v1/models lists.

    ValueError where no server answers or it refuses the key, even if the name is known: this is the first request.
    """
    def read(value: Any) -> list[str]:
        try:
            return [str(model["id"]) for model in value["data"]]
        except (KeyError, TypeError):
            raise BadAnswer("the answer is no list of models") from None
    try:
        names = endpoint.ask("/models", None, read, tries=2)
    except RequestFailed as error:
        answers = error.status is not None and error.status not in (401, 403)
        if address.name and answers:                    # a server need not list its models
            return address.name
        way_out = "; name the model: http://HOST:PORT/v1#NAME" if answers else ""
        raise ValueError(f"cannot ask {address.url}/models: {error}{way_out}") from None
    if address.name:
        return address.name
    if len(names) != 1:
        listed = ", ".join(names[:10])
        raise ValueError(f"{address.url} lists {len(names)} models{': ' if names else ''}{listed:.300}; name one: "
                         f"{address.url}#NAME")
    return names[0]
