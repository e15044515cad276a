"""The event stream from the outside: an `sse_listener` and a server. The schedule, what each HTTP
answer means, what counts as an event however it is cut, dead links, what is logged, and the end."""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.queue
import pytest
from jmap_server import EVENT_PATH, FOREVER, Fault, JMAPServer, Options
from peer import CHUNKED, HEAD, STATE, Peer, at_once

import mailroom

TOKEN = Options().token
SCHEDULE = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
PING, COMMENT = b"event: ping\ndata: {}\n\n", b": hello\n\n"
SSE, HTML = {"Content-Type": "text/event-stream"}, {"Content-Type": "text/html"}
QUERY = "types=Email,Mailbox&closeafter=no&ping=30"


class Shutdown(gevent.event.Event):
    """A shutdown event under which a back-off takes no time; after `most` of them it is set."""

    def __init__(self, most: int = FOREVER) -> None:
        super().__init__()
        self.delays: list[float] = []
        self._most = most

    def wait(self, timeout: float | None = None) -> bool:  # type: ignore[override]
        self.delays += [] if timeout is None else [timeout]
        if len(self.delays) >= self._most:
            self.set()
        return bool(super().wait(None if timeout is None else 0))


class Listener:
    """A running sse_listener, with all that can be seen of it."""

    def __init__(self, url: str, shutdown: Any = None, **more: Any) -> None:
        self.shutdown = shutdown or Shutdown()
        self.queue: gevent.queue.Queue[str] = gevent.queue.Queue()
        self.status = mailroom.StreamStatus()
        log, handler = logging.Logger("listener"), BufferingHandler(FOREVER)
        log.addHandler(handler)
        self.records = handler.buffer
        given, named = (TOKEN, url, self.queue, self.shutdown, log), {"status": self.status}
        self.greenlet = gevent.spawn(mailroom.sse_listener, *given, **named | more)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown.set()
        self.join()

    def join(self, seconds: float = 5) -> Listener:
        """Wait for its end; raises what it died of."""
        with gevent.Timeout(seconds, AssertionError("it does not end")):
            self.greenlet.get()
        return self

    def texts(self, *levels: str) -> list[str]:
        return [each.getMessage() for each in self.records if each.levelname in levels]

    @property
    def troubles(self) -> list[str]:
        return self.texts("WARNING", "ERROR", "CRITICAL")


def sse(body: bytes | Iterable[bytes], **more: Any) -> Fault:
    """A stream with exactly these bytes, which then ends."""
    return Fault("stream", body=body, **{"headers": SSE, **more})


def refused(status: int, **headers: str) -> Fault:
    return Fault("stream", status=status, headers=headers)


def slowly(*pieces: bytes) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        gevent.sleep(0.01)


def down(times: int) -> list[Fault]:
    return [refused(500) for _ in range(times)]


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def script(server: JMAPServer, *faults: Fault) -> None:
    """The streams asked for meet these faults one after the other, and the last one again."""
    for number, fault in enumerate(faults):
        fault.nth, fault.matched = number + 1, 0
        fault.times = FOREVER if fault is faults[-1] else 1
    server.faults[:] = faults


def listen(server: JMAPServer, most: int, *faults: Fault, **more: Any) -> Listener:
    """A listener that has met these faults until it had backed off `most` times."""
    script(server, *faults)
    return Listener(server.origin + EVENT_PATH, Shutdown(most), **more).join(20)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JMAPServer]:
    """A server beside which ~/.netrc knows better."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login eve password evil\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(mailroom, "ANSWER_TIMEOUT", 5.0)
    with JMAPServer(Options(pings=False)) as server:
        yield server
        assert not server.crashes


URLS = {"e": "e?" + QUERY, "e?u=1": f"e?u=1&{QUERY}"}
URLS |= {"e?types={types}&closeafter={closeafter}&ping={ping}": "e?" + QUERY}
URLS |= {"{closeafter}/{ping}/e?x=1&t={types}": "no/30/e?x=1&t=Email,Mailbox"}


@pytest.mark.parametrize(("url", "expanded"), URLS.items())
def test_what_is_asked_for_on_the_wire(server: JMAPServer, url: str, expanded: str) -> None:
    script(server, *down(1))
    Listener(server.origin + EVENT_PATH + url, Shutdown(2)).join()
    assert len(server.requests) == 2
    for request in server.requests:
        assert (request.method, request.target) == ("GET", EVENT_PATH + expanded)
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        assert request.headers["accept"] == "text/event-stream"
        assert request.headers["accept-encoding"] == "identity"
        assert "last-event-id" not in request.headers


def test_it_goes_where_the_events_are_by_now(server: JMAPServer) -> None:
    """As the user whose password the token is; and says that it is there."""
    opened: list[int] = []
    more = {"current_url": lambda: server.origin + EVENT_PATH, "on_open": lambda: opened.append(1)}
    with Listener(server.origin + "/gone", username=server.options.username, **more):
        server.wait_for(lambda: server.streams and opened)
    assert server.requests[0].headers["authorization"].startswith("Basic ")


EVENTS: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 0),
    "three": (STATE * 3, 3),
    "more than an event may have": (STATE * 4000, 4000),
    "rubbish as data, and none": (b"event: state\ndata: {[\n\nevent: state\n\n", 2),
    "data first, no space": (b"data:1\ndata:2\nevent:state\n\n", 1),
    "a ping and others": (PING + b"data: 1\n\nevent: calendarAlert\ndata: 1\n\n" + COMMENT, 0),
    "other capitals": (b"event: State\ndata: 1\n\nEvent: state\ndata: 1\n\n", 0),
    "comments": (b": x\nevent: state\n: y\ndata: 1\n:\n\n" + COMMENT + b":\n:\n\n" + STATE, 2),
    "only an id, only a retry": (b"id: 7\n\nretry: 5000\n\n" + STATE, 1),
    "a BOM, blank lines": (b"\xef\xbb\xbf" + STATE + b"\n\n\n\n" + STATE, 2),
    "bad UTF-8 and an odd id": (b"id: \xff\x00\xe2\nevent: state\ndata: \xff\xc3\n\n" + STATE, 2),
    "letters of many bytes": ("event: state\ndata: ü☃\U0001f4ec\u2028\x85\n\n".encode(), 1),
    "cut off": (STATE + b"event: state\ndata: \xe2\n", 1),
}


@pytest.mark.parametrize("name", EVENTS)
def test_only_whole_state_events_signal(server: JMAPServer, name: str) -> None:
    """Each in all three kinds of line ends, in one piece, byte by byte, and cut in every place."""
    raw, expected = EVENTS[name]
    bodies = [raw.replace(b"\n", ending) for ending in (b"\n", b"\r", b"\r\n")]
    pieces = [[body] for body in bodies]
    for body in bodies if len(raw) < 1000 else []:
        pieces.append([bytes([byte]) for byte in body])
        pieces += [[body[:cut], body[cut:]] for cut in range(1, len(body), 3)]
    listener = listen(server, len(pieces), *map(sse, pieces))
    assert listener.queue.qsize() == expected * len(pieces)
    assert set(listener.queue.queue) <= {"state_changed"}


@pytest.mark.parametrize("ending", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("chunked", [True, False])
def test_an_event_arrives_at_once(server: JMAPServer, chunked: bool, ending: bytes) -> None:
    """As soon as its blank line is there, be it only half of a line end."""
    server.options.chunked = chunked
    with Listener(server.origin + EVENT_PATH) as listener:
        server.wait_for(lambda: server.streams)
        for _ in range(3):
            server.streams.send_raw(STATE.replace(b"\n", ending))
            assert listener.queue.get(timeout=1) == "state_changed"


def test_an_encoded_body_is_decoded(server: JMAPServer) -> None:
    """By a server, or a proxy, that does not care about Accept-Encoding."""
    body = sse(gzip.compress(STATE * 2), headers={**SSE, "Content-Encoding": "gzip"})
    assert listen(server, 1, body).queue.qsize() == 2


CONNECT = b'event: state\ndata: {"type": "connect"}\n\n'
OK = HEAD.removesuffix(b"\r\n")
ENDS: dict[str, Fault | bytes] = {
    # what a server does, or the bytes of one that does not speak HTTP
    "a server error": refused(500),
    "a reset": Fault("stream", drop=True),
    "an end at once": sse(b""),
    "an end after an event": sse(STATE),
    "an end after the connect event, as Fastmail does": sse(CONNECT),
    "an end too early": sse(COMMENT * 100, truncate=50),
    "HTML": sse(STATE, headers=HTML),
    "no type": sse(STATE, headers={}),
    "another type": sse(STATE, headers={"Content-Type": "text/plain; x=text/event-stream"}),
    "a redirect in circles": refused(302, Location=EVENT_PATH),
    "a redirect to nowhere": refused(302, Location="http://[::1"),
    "no gzip": sse(STATE, headers={**SSE, "Content-Encoding": "gzip"}),
    "no answer": Fault("stream", hang=True),
    "a line without an end": sse(itertools.repeat(b"x" * 1000)),
    "a block without an end": sse(itertools.repeat(b"data: x\n" * 125)),
    "another protocol": b"SSH-2.0-Nonsense\r\n\r\n",
    "no number": b"HTTP/1.1 abc\r\n\r\n",
    "too many headers": OK + b"X: y\r\n" * 1000 + b"\r\n",
    "two lengths": OK + b"Content-Length: 5, 6\r\n\r\n",
    "an odd place": b"HTTP/1.1 302 Moved\r\nLocation: //\xff\xfe[\r\n\r\n",
    "no chunks": CHUNKED + b"ZZ\r\nx",
    "half a chunk": CHUNKED + b"ff\r\n:",
    "a chunk beyond reason": CHUNKED + b"f" * 400 + b"\r\nx",
    "less than no chunk": CHUNKED + b"-5\r\nx",
    "a redirect into a file": refused(302, Location="file:///etc/passwd"),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_end_backs_off_as_the_schedule_says(server: JMAPServer, name: str) -> None:
    mailroom.ANSWER_TIMEOUT = 0.05 if name == "no answer" else 5.0  # for this test only
    end = ENDS[name]
    if isinstance(end, Fault):
        listener = listen(server, len(SCHEDULE), end)
    else:
        with Peer(at_once(end)) as peer:
            listener = Listener(peer.url, Shutdown(len(SCHEDULE))).join()
    assert listener.shutdown.delays == SCHEDULE
    assert listener.queue.qsize() == (len(SCHEDULE) if "event" in name else 0)
    [trouble] = listener.troubles  # it is news once
    assert listener.texts("WARNING") == [trouble]
    assert ("text/html" in trouble) == (name == "HTML")
    assert "".join(record.getMessage() for record in listener.records).isprintable()
    assert (listener.status.status, listener.status.connected_since) == ("disconnected", None)
    assert listener.status.last_error


def test_trouble_is_logged_once_until_it_changes(server: JMAPServer) -> None:
    """No server at all is trouble, too."""
    listener = listen(server, 6, *down(2), refused(404), *down(1), refused(404), sse(b""))
    assert [re.findall(r"HTTP (\d+)", text) for text in listener.troubles] == [["500"], ["404"], []]
    assert len(listener.texts("INFO")) == 1
    listener = Listener("http://127.0.0.1:1/", Shutdown(len(SCHEDULE))).join()
    assert listener.shutdown.delays == SCHEDULE
    [trouble] = listener.troubles
    assert "connection refused" in trouble


@pytest.mark.parametrize(("proven", "after"), [(0.03, [1, 1, 1]), (60.0, [8, 16, 32])])
def test_the_back_off_starts_over_only_after_a_stream_has_stood(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch, proven: float, after: list[float]
) -> None:
    assert (mailroom.PROVEN_SECONDS, mailroom.QUIET_LIMIT, mailroom.PING_SECONDS) == (60, 90, 30)
    monkeypatch.setattr(mailroom, "PROVEN_SECONDS", proven)
    listener = listen(server, 6, *down(3), *(sse(slowly(*[STATE] * 6)) for _ in range(3)))
    assert listener.shutdown.delays == [1, 2, 4, *after]
    if proven < 1:  # the end of one that has stood is routine
        assert (len(listener.troubles), len(listener.texts("INFO"))) == (1, 1)


LATE, EARLY = "Wed, 21 Oct 2099 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 GMT"
WAITS: list[tuple[list[str], list[float]]] = [
    # what a stream has in it, or a busy server in its Retry-After; and the pauses that follow
    (["retry: 3000", "retry:0000003000", "retry: 3000\n\nretry: nonsense"], [3, 6, 12, 24, 48, 60]),
    (["retry: 45000"], [45, 60, 60, 60, 60, 60]),
    (["retry: 3600000", f"retry: {'9' * 6000}"], [60] * 6),
    ([f"retry: {n}" for n in ("0", "x", "-3000", "+3000", "3e3", "3. ", "٣٠٠٠")], SCHEDULE[:6]),
    (["7"], [7, 7, 7, 8, 16]),
    (["90"], [90] * 5),
    (["9" * 30, LATE], [600] * 5),
    (["", "0", "-7", "7.5", "soon", "Wed, 99 Oct 2099", EARLY], SCHEDULE[:5]),
]


@pytest.mark.parametrize(("texts", "pauses"), WAITS, ids=lambda value: ascii(value[0])[:30])
def test_a_server_says_how_long_it_is_left_alone(
    server: JMAPServer, texts: list[str], pauses: list[float]
) -> None:
    for text in texts:
        ways = [[refused(status, **{"Retry-After": text})] for status in (429, 503)]
        if text.startswith("retry"):
            ways = [[sse(text.encode() + end), *down(1)] for end in (b"\n\n", b"\n" + STATE)]
        for way in ways:
            assert listen(server, len(pauses), *way).shutdown.delays == pauses, text[:30]


@pytest.mark.parametrize(
    ("status", "level", "said"),
    [
        (204, "INFO", r"no push \(HTTP 204\)"),
        *((status, "ERROR", f"HTTP {status}.*refused") for status in (401, 403)),
    ],
)
def test_what_will_not_change_soon_is_said_once_and_left_alone(
    server: JMAPServer, status: int, level: str, said: str
) -> None:
    listener = listen(server, 5, *(refused(status) for _ in range(4)), sse(b""))
    assert listener.shutdown.delays == [60, 60, 60, 60, 16]
    levels = [each.levelname for each in listener.records if each.levelno > logging.DEBUG]
    assert levels == [level, "INFO", "WARNING"]
    assert re.search(said, listener.texts(level)[0])
    assert "connected" in listener.texts("INFO")[-1]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_only_a_redirect_within_the_origin_is_followed(server: JMAPServer, status: int) -> None:
    server.faults.append(refused(status, Location=EVENT_PATH + "moved"))
    with JMAPServer() as other, Listener(server.origin + EVENT_PATH) as listener:
        server.wait_for(lambda: server.streams)
        assert server.requests[1].headers["authorization"] == f"Bearer {TOKEN}"
        for host in ("127.0.0.1", "localhost"):
            script(server, refused(status, Location=f"http://{host}:{other.port}{EVENT_PATH}"))
            server.streams.close()
            server.wait_for(lambda: any("redirects to" in text for text in listener.troubles))
        assert not other.requests


def test_a_quiet_stream_is_replaced_at_once_and_without_a_word(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one at a time: the old connection is closed before the new one is opened, which
    hears what that did not."""
    monkeypatch.setattr(mailroom, "QUIET_LIMIT", 0.05)
    before, open_then = open_files(), [0]
    server.on_request = lambda n, request: open_then.append(open_files())
    with Listener(server.origin + EVENT_PATH) as listener:
        server.wait_for(lambda: listener.status.connected_since)
        since = datetime.fromisoformat(str(listener.status.connected_since))
        assert abs(datetime.now(UTC) - since) < timedelta(seconds=5)
        server.wait_for(lambda: server.streams.opened >= 10)
        monkeypatch.setattr(mailroom, "QUIET_LIMIT", 1)
        opened = server.streams.opened
        server.wait_for(lambda: server.streams.opened > opened and server.streams)
        assert (listener.queue.qsize(), listener.status.last_event_at) == (0, None)
        server.streams.send_raw(STATE)
        assert listener.queue.get(timeout=5) == "state_changed"
        assert datetime.fromisoformat(str(listener.status.last_event_at)) >= since
    assert listener.shutdown.delays == []
    assert len(listener.texts("INFO")) == 1
    assert (listener.troubles, listener.status.last_error) == ([], None)
    assert len(listener.texts("DEBUG")) >= 9
    assert listener.status.reconnect_count >= 9
    # Two ends of the stream, and at most the server's end of the last one.
    assert max(open_then) <= before + 3


def test_any_byte_is_a_sign_of_life(server: JMAPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "QUIET_LIMIT", 0.25)
    assert listen(server, 1, sse(slowly(*[b":"] * 40, b"\n\n", STATE))).queue.qsize() == 1
    assert len(server.requests) == 1


ENDLESS = itertools.repeat(b"x" * 2**16)
HALF_READ = [Fault("stream", status=500, body=ENDLESS), sse(ENDLESS, headers=HTML), sse(ENDLESS)]


@pytest.mark.parametrize("fault", HALF_READ, ids=["error", "page", "event"])
def test_no_reply_stays_open_during_a_back_off(server: JMAPServer, fault: Fault) -> None:
    script(server, fault)
    before = open_files()
    with Listener(server.origin + EVENT_PATH, gevent.event.Event()) as listener:
        server.wait_for(lambda: listener.troubles)
        server.wait_for(lambda: open_files() <= before)
        assert len(server.requests) == 1


@pytest.mark.parametrize("make_event", [gevent.event.Event, threading.Event])
@pytest.mark.parametrize("moment", ["no answer", "no event", "a back-off"])
def test_shutdown_ends_it_within_a_second_whatever_it_is_doing(
    server: JMAPServer, make_event: Callable[[], Any], moment: str
) -> None:
    faults = {"no answer": [Fault("stream", hang=True)], "a back-off": down(1), "no event": []}
    server.faults += faults[moment]
    shutdown = make_event()
    listener = Listener(server.origin + EVENT_PATH, shutdown)
    server.wait_for(lambda: server.requests and (moment != "a back-off" or listener.troubles))
    gevent.sleep(0.05)
    assert not listener.greenlet.ready()
    shutdown.set()
    listener.join(1)
    server.wait_for(lambda: not server.streams)
    assert len(server.requests) == 1


def test_a_fault_in_it_is_raised_where_somebody_notices(server: JMAPServer) -> None:
    script(server, sse(STATE))
    with pytest.raises(AttributeError):
        mailroom.sse_listener(TOKEN, server.origin + EVENT_PATH, "no queue", Shutdown())
