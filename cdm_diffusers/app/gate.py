"""What a visitor may post to the page: no more, in size and in number of uploads, than its limits."""

import ipaddress
import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from .config import MINUTES, Limits


MOST_BYTES = 2**20  # of a request that is not an upload
MARGIN = 2**16  # bytes of an upload besides its picture
CALL = "x-cdm-call"  # a header with the number of a call
MOST_CALLERS = 10_000  # whose calls are remembered
QUEUED = re.compile(r"/(queue/join|call/(v2/)?[^/]+)/?$")  # where Gradio takes calls that wait

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass
class Quota:
    """Who uploaded what in the last minutes."""

    limits: Limits
    clock: Callable[[], float] = time.monotonic
    uploads: deque[tuple[float, str, int]] = field(default_factory=deque)  # when, who, bytes

    def take(self, visitor: str, size: int) -> None:
        """
        Counts an upload of `size` bytes.

        Raises:
            ValueError: it exceeds the visitor's quota.
        """
        now = self.clock()
        while self.uploads and self.uploads[0][0] <= now - 60 * MINUTES:
            self.uploads.popleft()
        own = [(when, size) for when, who, size in self.uploads if who == visitor]
        most = self.limits.max_uploaded_megabytes
        if len(own) >= self.limits.max_uploads or sum(size for _, size in own) + size > most * 2**20:
            left = MINUTES - (now - own[0][0] if own else 0) / 60
            raise ValueError(
                f"This page takes {self.limits.max_uploads} pictures and {most} megabytes from a visitor in {MINUTES} "
                f"minutes, and this would be more: try again in {math.ceil(left)} minutes."
            )
        self.uploads.append((now, visitor, size))


class Calls:
    """Numbers of calls: of each visitor's only the newest count, so that nobody fills the queue for long."""

    def __init__(self, most: int):
        self.most, self.count = most, 0
        self.newest: OrderedDict[str, deque[int]] = OrderedDict()
        self.valid: set[int] = set()

    def add(self, visitor: str) -> int:
        """The number of a visitor's new call."""
        self.count += 1
        own = self.newest.setdefault(visitor, deque())
        self.newest.move_to_end(visitor)
        own.append(self.count)
        self.valid.add(self.count)
        if len(own) > self.most:
            self.valid.discard(own.popleft())
        if len(self.newest) > MOST_CALLERS:
            self.valid.difference_update(self.newest.popitem(last=False)[1])
        return self.count

    def counts(self, number: int) -> bool:
        """Whether the call is among its visitor's newest."""
        return number in self.valid


class Gate:
    """
    An ASGI application in front of another one. Uploads, one picture each, pass when they have arrived completely, so
    that nothing of those that break off is written to disk. Calls that are to wait in the queue get their number.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], quota: Quota, calls: Calls):
        self.app, self.quota, self.calls = app, quota, calls

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Lets a request in, or answers it with a sentence."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        scope = scope | {"headers": [header for header in scope["headers"] if header[0] != CALL.encode()]}
        headers = dict(scope["headers"])
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        most = self.quota.limits.max_upload_megabytes * 2**20 + MARGIN if is_upload else MOST_BYTES
        size = int(headers.get(b"content-length", -1))
        if not 0 <= size <= most:
            return await _answer(send, 413, f"A request must declare its size, which must be at most {most} bytes.")
        visitor = visitor_of(scope["client"][0])
        if not is_upload:
            if QUEUED.search(scope["path"]):
                scope["headers"].append((CALL.encode(), str(self.calls.add(visitor)).encode()))
            return await self.app(scope, receive, send)
        try:
            self.quota.take(visitor, size)
        except ValueError as error:
            await _body(receive, keep=False)  # a browser reads no answer before it has sent everything
            return await _answer(send, 429, str(error))
        body = await _body(receive)
        if body is None:
            return None
        if _count_files([value for name, value in scope["headers"] if name == b"content-type"], body) != 1:
            return await _answer(send, 413, "A request must hold one picture: upload them one by one.")
        messages = deque([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> dict[str, Any]:
            return messages.popleft() if messages else await receive()

        return await self.app(scope, again, send)


def visitor_of(address: str) -> str:
    """
    The address; for IPv6 its network, since a visitor can choose the last 64 bits. What a proxy sends in place of an
    address is one visitor.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if parsed.version == 4 or parsed.ipv4_mapped:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False))


async def _body(receive: Receive, keep: bool = True) -> bytes | None:
    """All of a request's body; None if the visitor leaves before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        if keep:
            parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _count_files(content_types: list[bytes], body: bytes) -> int:
    """
    Parts of a body of multipart/form-data; none if the type is given twice or in another way than browsers and
    Python's clients write it, which the parser behind the gate might read differently.
    """
    found = re.fullmatch(rb"multipart/form-data; boundary=([\w.'-]+)", b", ".join(content_types))
    return body.count(b"--" + found[1]) - 1 if found else 0


async def _answer(send: Send, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})
