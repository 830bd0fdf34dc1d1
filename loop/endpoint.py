"""An OpenAI-compatible server as a place that JSON is sent to: its address, its key, patience. Standard library only.

    http://HOST:PORT/v1#NAME        the model NAME of the server there; without #NAME the only one that it lists

What a server may mend by itself is tried again: 408, 429, all of 5xx, a connection that is refused or breaks, an answer
that is cut short, no JSON, or not of the form that was asked for. The wait doubles from half a second on; Retry-After
is honoured. All else is a RequestFailed at once. The key, OPENAI_API_KEY, goes to this address alone: no redirect is
followed, and no message, file or log holds it.
"""
from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tasks.endings import one_line

T = TypeVar("T")
KEY = "OPENAI_API_KEY"
TRIES = 6                                               # of one request
FIRST_WAIT = 0.5                                        # seconds before the second try; doubled for each further one
LONGEST_WAIT = 300.0                                    # seconds that a Retry-After may ask for
MOST_BYTES = 2 ** 26                                    # of one answer
PART = 2 ** 16                                          # bytes read at once
SHOWN = 200                                             # characters of a server's own message that are shown
LOOPBACK = ("localhost", "127.0.0.1", "::1")            # no proxy is asked for these
TRY_AGAIN = (408, 429)                                  # besides 5xx


class RequestFailed(OSError):
    """A request that no further try will mend. `status` is the HTTP status, None where there was no answer at all."""

    def __init__(self, reason: str, status: int | None = None):
        super().__init__(reason)
        self.status = status


class BadAnswer(Exception):
    """An answer that is not what was asked for; the next one may be."""


# ---- addresses

@dataclass(frozen=True)
class Address:
    """Where a served model is: the server's URL up to /v1, and the model's name, "" where the server has only one."""
    url: str
    name: str

    def __str__(self) -> str:
        return f"{self.url}#{self.name}" if self.name else self.url


def is_served(model: str | os.PathLike[str] | None) -> bool:
    """Whether a model's name is the address of a server, and not a folder or a hub id."""
    return bool(re.match(r"https?://", str(model), re.IGNORECASE))


def parse_address(text: str) -> Address:
    """The parts of http(s)://HOST:PORT/v1#NAME. ValueError for any other; what may be a secret in it is not shown."""
    place, _, name = text.partition("#")
    try:
        parts = urllib.parse.urlsplit(place)
        host = parts.hostname
        _ = parts.port                                  # ValueError where it is no number
    except ValueError as error:
        raise ValueError(f"the address of a served model cannot be read: {error}") from None
    if parts.username is not None or parts.password is not None or parts.query:
        raise ValueError(f"the address of a served model at {host} holds a user, a password or a query, which would be "
                         f"written down with it: give the key in {KEY}")
    readable = all(c.isprintable() and not c.isspace() for c in text)
    if not host or not parts.path.strip("/") or not readable:
        raise ValueError(f"{text!r:.80} is not of the form http://HOST:PORT/v1#NAME")
    return Address(place.rstrip("/"), name)


# ---- one request

class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other: neither key nor pictures go where nobody sent them."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """A server to which requests are sent from several threads at once. `timeout`: seconds for one try."""

    def __init__(self, url: str, timeout: float):
        self.url = url
        self.timeout = timeout
        self.key = read_key()
        self.given_up = threading.Event()               # nobody waits for answers any more: no further tries
        host = urllib.parse.urlsplit(url).hostname
        proxies = urllib.request.ProxyHandler({} if host in LOOPBACK else None)
        self.opener = urllib.request.build_opener(NoRedirect, proxies)

    def ask(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], T], tries: int = TRIES) -> T:
        """`read` of the JSON that the server answers to `body` (None: a GET request). `read` may raise BadAnswer.

        RequestFailed where it fails for good, or has failed `tries` times.
        """
        data = None if body is None else json.dumps(body).encode()
        for number in range(1, tries + 1):
            status = None
            asked_to_wait = None
            try:
                return read(self._once(path, data))
            except urllib.error.HTTPError as error:
                status = error.code
                reason = told_by(error)
                asked_to_wait = retry_after(error.headers.get("Retry-After"))
                if status not in TRY_AGAIN and status < 500:
                    raise RequestFailed(self._shown(reason), status) from None
            except (OSError, http.client.HTTPException, BadAnswer) as error:
                reason = told_of(error)

            wait = FIRST_WAIT * 2 ** (number - 1) * random.uniform(1, 1.5) if asked_to_wait is None else asked_to_wait
            if number == tries or wait > LONGEST_WAIT or self.given_up.wait(wait):
                raise RequestFailed(self._shown(f"{reason} (try {number})"), status)
        raise ValueError(f"tries must be at least 1, not {tries}")

    def _once(self, path: str, data: bytes | None) -> Any:
        """The JSON that one try brings; an exception of urllib's, of http's, or BadAnswer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        deadline = time.monotonic() + self.timeout
        with self.opener.open(request, timeout=self.timeout) as response:
            content = read_all(response, deadline)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise BadAnswer(f"the answer is no JSON: {content[:40]!r}") from None

    def _shown(self, reason: str) -> str:
        """A reason in one line, without the key, should a server have repeated it."""
        return one_line(reason.replace(self.key, "***") if self.key else reason, SHOWN + 100)


def read_key() -> str:
    """OPENAI_API_KEY, "" where there is none. ValueError, which does not show it, where no header can hold it."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(f"{KEY} holds characters that no key has")
    return key


def read_all(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body of an answer; http.client.IncompleteRead where it is cut short, TimeoutError after the deadline."""
    parts = []
    length = 0
    while part := response.read1(PART):
        parts.append(part)
        length += len(part)
        if length > MOST_BYTES:
            raise BadAnswer(f"the answer has more than {MOST_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long")
    if response.length:                                 # what Content-Length promised and did not come
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


# ---- what went wrong, in words

def told_by(error: urllib.error.HTTPError) -> str:
    """An HTTP status with what the server says of it: of a redirect, where it leads."""
    if 300 <= error.code < 400:
        target = urllib.parse.urlsplit(error.headers.get("Location") or "")
        return f"HTTP {error.code}, a redirect to {target.hostname or target.path}, which is not followed: give the " \
               "address that answers"
    hint = f" (the key is read from {KEY})" if error.code in (401, 403) else ""
    try:
        content = error.read(PART).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        content = ""
    return f"HTTP {error.code}{hint}: {message_in(content) or error.reason}"[:SHOWN]


def message_in(content: str) -> str:
    """The message in an error's body: {"error": {"message": ..}}, {"error": ..}, {"detail": ..}, or the text itself."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content.strip()
    for name in ("error", "detail", "message"):
        while isinstance(value, dict) and name in value:
            value = value[name]
    return value if isinstance(value, str) else json.dumps(value)


def told_of(error: Exception) -> str:
    """What broke, in words."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut short"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:SHOWN]


def retry_after(value: str | None) -> float | None:
    """The seconds that a Retry-After header asks to wait, as a number or as a date; None where it says neither."""
    if not value:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())
