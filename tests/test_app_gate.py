"""What a visitor may post to the web demo: bounded in size, number and time, and whole before it is let in."""

import asyncio
import re

import pytest

from cdm_diffusers.app import gate
from cdm_diffusers.app.config import Limits
from cdm_diffusers.app.gate import CALL, MOST_BYTES, Calls, Gate, Quota, visitor_of


LIMITS = Limits(max_upload_megabytes=1, max_uploads=3, max_uploaded_megabytes=2)


def form(*contents: bytes) -> bytes:
    parts = [
        b'--line\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + content + b"\r\n"
        for content in contents
    ]
    return b"".join(parts) + b"--line--\r\n"


class Page:
    """What is behind the gate, and a clock."""

    def __init__(self, limits: Limits = LIMITS):
        self.bodies, self.headers, self.time = [], [], 0.0
        self.gate = Gate(self, Quota(limits, lambda: self.time), Calls(limits.max_calls))

    async def __call__(self, scope, receive, send):
        body = b""
        self.headers.append(scope["headers"])
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                self.bodies.append(body)
                await send({"type": "http.response.start", "status": 200, "headers": []})
                return await send({"type": "http.response.body", "body": b"thanks"})

    def post(
        self,
        body: bytes,
        path="/gradio_api/upload",
        visitor="1.2.3.4",
        method="POST",
        size=None,
        cut=False,
        kind="multipart/form-data; boundary=line",
        other_kind=None,
    ):
        """(status, text) of the answer; None where there is none."""
        size = len(body) if size is None else size
        headers = [(b"content-type", value.encode()) for value in (kind, other_kind) if value is not None]
        headers += [(CALL.encode(), b"1")]
        headers += [(b"content-length", str(size).encode())] if size >= 0 else []
        chunks = [body[start : start + 1000] for start in range(0, len(body), 1000)]
        messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        messages[-1]["more_body"] = cut
        messages.append({"type": "http.disconnect"})
        sent = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": headers, "client": (visitor, 1)}
        asyncio.run(self.gate(scope, receive, send))
        return (sent[0]["status"], sent[1]["body"].decode()) if sent else None


def test_an_upload_is_let_in_as_it_is():
    page, body = Page(), form(bytes(range(256)) * 40)
    assert page.post(body) == (200, "thanks") and page.bodies == [body]


def test_uploads_of_a_visitor_are_bounded_in_number_and_come_back():
    page = Page()
    for minute in (0, 4, 5):
        page.time = 60 * minute
        assert page.post(form(b"x"))[0] == 200
    page.time = 60 * 7.5
    said = (
        "This page takes 3 pictures and 2 megabytes from a visitor in 10 minutes, and this would be more: "
        "try again in 3 minutes."
    )
    assert page.post(form(b"x")) == (429, said) and len(page.bodies) == 3
    assert page.post(form(b"x"), visitor="1.2.3.5")[0] == 200
    page.time = 60 * 10 + 1
    assert page.post(form(b"x"))[0] == 200
    assert page.post(form(b"x"))[0] == 429
    page.time = 60 * 30
    assert page.post(form(b"x"))[0] == 200 and len(page.gate.quota.uploads) == 1


def test_uploads_of_a_visitor_are_bounded_in_bytes():
    page = Page()
    large = form(bytes(2**20))
    assert page.post(large)[0] == 200
    assert page.post(large)[0] == 429  # 2 megabytes and what is around them
    assert page.post(form(bytes(2**19)))[0] == 200


@pytest.mark.parametrize(
    ("body", "options", "said"),
    [
        (form(bytes(2**20 + 2**17)), {}, f"at most {2**20 + 2**16} bytes"),
        (form(b"x"), {"size": -1}, "must declare its size"),
        (b"x" * (MOST_BYTES + 1), {"path": "/gradio_api/queue/join"}, f"at most {MOST_BYTES} bytes"),
        (form(b"x", b"y"), {}, "A request must hold one picture: upload them one by one."),
        (form(b"x", b"y"), {"kind": "multipart/form-data; xboundary=z; boundary=line"}, "must hold one picture"),
        (form(b"x", b"y"), {"kind": "multipart/form-data; Boundary=line"}, "must hold one picture"),
        (form(b"x", b"y"), {"kind": 'multipart/form-data; boundary="line"'}, "must hold one picture"),
        (form(b"x", b"y"), {"kind": "multipart/form-data; boundary=z; boundary=line"}, "must hold one picture"),
        (form(b"x", b"y"), {"kind": "multipart/form-data; boundary=line; boundary*=utf-8''z"}, "hold one picture"),
        (form(b"x"), {"kind": "multipart/form-data"}, "must hold one picture"),
        (form(b"x", b"y"), {"other_kind": "multipart/form-data; boundary=z"}, "must hold one picture"),
        (form(), {}, "must hold one picture"),
    ],
)
def test_what_is_too_much_at_once_is_refused(body, options, said):
    page = Page()
    status, text = page.post(body, **options)
    assert status == 413 and said in text and page.bodies == []


def test_an_upload_that_breaks_off_is_not_let_in_but_counted():
    page = Page()
    for _ in range(3):
        assert page.post(form(bytes(5000)), cut=True) is None
    assert page.bodies == [] and page.post(form(b"x"))[0] == 429


def test_other_requests_are_let_in():
    page = Page(Limits(max_uploads=1))
    for _ in range(3):
        assert page.post(b"{}", path="/gradio_api/queue/join")[0] == 200
        assert page.post(b" ", method="GET", size=-1)[0] == 200


def test_a_visitor_of_ipv6_is_a_network():
    assert visitor_of("2001:db8:1:2:3:4:5:6") == visitor_of("2001:db8:1:2::9") != visitor_of("2001:db8:1:3::9")
    assert visitor_of("unknown") == visitor_of("_hidden")
    assert visitor_of("10.0.0.1") == "10.0.0.1" and re.match("::ffff", visitor_of("::ffff:10.0.0.1"))


def test_calls_in_the_queue_are_numbered_by_nobody_else():
    page = Page()
    for path in ("queue/join", "call/show", "call/v2/show", "run/show", "upload"):
        page.post(form(b"x"), path=f"/gradio_api/{path}")
    numbers = [[value for name, value in headers if name == CALL.encode()] for headers in page.headers]
    assert numbers == [[b"1"], [b"2"], [b"3"], [], []]


def test_only_a_visitors_newest_calls_count(monkeypatch):
    calls = Calls(2)
    own = [calls.add("a") for _ in range(4)]
    other = calls.add("b")
    assert [calls.counts(number) for number in (*own, other)] == [False, False, True, True, True]
    monkeypatch.setattr(gate, "MOST_CALLERS", 1)
    assert calls.counts(calls.add("c")) and not calls.counts(own[-1])
