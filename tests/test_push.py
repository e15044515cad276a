"""The event stream: what is asked, what counts as news, back-off, dead links, and SeenStates."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.queue
import pytest
from gevent.server import StreamServer
from jmap_server import EVENT_PATH, SESSION_PATH, Fault, JMAPServer, Options
from sseclient import SSEClient

import mailroom
from mailroom import (
    MAX_DELAY,
    MAX_EVENT_CHARACTERS,
    QUIET_LIMIT,
    SeenStates,
    StreamEnd,
    StreamStatus,
    backoff,
    event_blocks,
    expand_event_source_url,
    quiet_limit,
)

TOKEN = Options().token
FOREVER = 10**9
SCHEDULE = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
STATE, PING, COMMENT = b"event: state\ndata: 1\n\n", b"event: ping\ndata: {}\n\n", b": hello\n\n"
QUERY = "types=Email,Mailbox&closeafter=no&ping=30"


# Tools


class Shutdown:
    """A shutdown event under which a back-off is noted and takes no time; after `most` of them it
    is set."""

    def __init__(self, most: int = FOREVER) -> None:
        self.delays: list[float] = []
        self._most = most
        self._event = gevent.event.Event()

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            return self._event.wait()
        self.delays.append(timeout)
        if len(self.delays) >= self._most:
            self.set()
        gevent.sleep(0)
        return self.is_set()


class Asleep(Shutdown):
    """A shutdown event under which a back-off does not end by itself."""

    def wait(self, timeout: float | None = None) -> bool:
        self.delays += [] if timeout is None else [timeout]
        return super().wait()


class Listener:
    """A running sse_listener, with all that can be seen of it."""

    def __init__(self, url: str, shutdown: Any = None, **more: Any) -> None:
        self.shutdown = shutdown or Shutdown()
        self.queue: gevent.queue.Queue[str] = gevent.queue.Queue()
        self.status = StreamStatus()
        self.told: list[tuple[str, str]] = []
        """Level and text of what it logged."""
        log = logging.Logger("listener")
        handler = logging.Handler()
        handler.emit = self._note  # type: ignore[method-assign]
        log.addHandler(handler)
        parameters = {"status": self.status} | more
        self.greenlet = gevent.spawn(
            mailroom.sse_listener, TOKEN, url, self.queue, self.shutdown, log, **parameters
        )

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown.set()
        self.join()

    def _note(self, record: logging.LogRecord) -> None:
        self.told.append((record.levelname, record.getMessage()))

    def join(self, seconds: float = 5) -> Listener:
        """Waits for its end; raises what it died of."""
        with gevent.Timeout(seconds, AssertionError("it does not end")):
            self.greenlet.get()
        return self

    def signals(self) -> int:
        return self.queue.qsize()

    def texts(self, *levels: str) -> list[str]:
        return [text for level, text in self.told if level in levels]

    @property
    def troubles(self) -> list[str]:
        return self.texts("WARNING", "ERROR", "CRITICAL")


def url_of(server: JMAPServer) -> str:
    return server.origin + EVENT_PATH


def sse(body: bytes | Iterable[bytes], **more: Any) -> Fault:
    """A stream with exactly these bytes, which then ends."""
    return Fault("stream", body=body, **{"headers": {"Content-Type": "text/event-stream"}, **more})


def refused(status: int, **headers: str) -> Fault:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault("stream", status=status, headers=headers)


def script(server: JMAPServer, *faults: Fault) -> None:
    """The streams asked for meet these faults one after the other, and the last one again."""
    for number, fault in enumerate(faults):
        fault.nth, fault.matched = number + 1, 0
    faults[-1].times = FOREVER
    server.faults[:] = faults


def listen(server: JMAPServer, most: int, *faults: Fault, **more: Any) -> Listener:
    """A listener that has met these faults until it had backed off `most` times."""
    if faults:
        script(server, *faults)
    return Listener(url_of(server), Shutdown(most), **more).join()


def delays(server: JMAPServer, most: int, *faults: Fault) -> list[float]:
    return list(listen(server, most, *faults).shutdown.delays)


@pytest.fixture
def server() -> Iterator[JMAPServer]:
    with JMAPServer(Options(pings=False)) as server:
        server.account.add_mailbox("Inbox", role="inbox")
        yield server
        assert not server.crashes


# What is asked

URLS = [
    ("https://a.example/e", f"https://a.example/e?{QUERY}"),
    ("https://a.example/e/", f"https://a.example/e/?{QUERY}"),
    ("https://a.example/e?u=1", f"https://a.example/e?u=1&{QUERY}"),
    (
        "https://a.example/e?types={types}&closeafter={closeafter}&ping={ping}",
        f"https://a.example/e?{QUERY}",
    ),
    (
        "https://a.example/{closeafter}/{ping}/e?x=1&t={types}",
        "https://a.example/no/30/e?x=1&t=Email,Mailbox",
    ),
]


@pytest.mark.parametrize(("url", "expanded"), URLS)
def test_the_event_url_is_a_template_or_bare(url: str, expanded: str) -> None:
    assert expand_event_source_url(url) == expanded


@pytest.mark.parametrize("template", [True, False])
def test_what_is_asked_for_on_the_wire(
    server: JMAPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: bool
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login eve password evil\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server.options.event_template = template
    with Listener(server.session()["eventSourceUrl"]):
        server.wait_for(lambda: server.streams)
    [request] = server.requests
    assert request.method == "GET"
    assert request.target == f"{EVENT_PATH}?{QUERY}"
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.headers["accept"] == "text/event-stream"
    assert request.headers["accept-encoding"] == "identity"
    assert "last-event-id" not in request.headers


def test_with_a_user_name_the_token_is_its_password(server: JMAPServer) -> None:
    with Listener(url_of(server), username=server.options.username):
        server.wait_for(lambda: server.streams)
    assert server.requests[0].headers["authorization"].startswith("Basic ")


def ids_sent(server: JMAPServer) -> list[str | None]:
    return [request.headers.get("last-event-id") for request in server.requests]


def test_a_reconnect_says_which_event_was_the_last(server: JMAPServer) -> None:
    server.options.event_ids = True
    with Listener(url_of(server)) as listener:
        for n in range(1, 4):
            server.wait_for(lambda: server.streams)
            server.account.deliver("bob@shop.example")
            server.wait_for(lambda n=n: listener.signals() == n)  # type: ignore[misc]
            server.streams.close()
            server.wait_for(lambda n=n: server.streams.opened > n)  # type: ignore[misc]
    first, *others = ids_sent(server)
    assert first is None
    assert [int(sent or 0) for sent in others] == sorted({int(sent or 0) for sent in others})
    assert int(others[-1] or 0) == server.account.modseq


IDS = [
    (b"id: 7", "7"),
    (b"id:7", "7"),
    (b"id: J84602-x/y", "J84602-x/y"),
    (b"id: 7\nid: 8", "8"),
    (b"id: 7\n\nevent: state\ndata: 1", "7"),
    (b"id: 7\n\nid: 8", "8"),
    (b"id: 7\n\nid\n\nevent: state\ndata: 1", None),
    (b"id: 7\n\nid:\n\nevent: state\ndata: 1", None),
    (b"id: 7\n\nid: 8\x00\n\nevent: state\ndata: 1", "7"),
    (b"id: 7\x00", None),
    (b"ID: 7", None),
]


@pytest.mark.parametrize(("block", "sent"), IDS)
def test_the_last_event_id(server: JMAPServer, block: bytes, sent: str | None) -> None:
    listen(server, 2, sse(b"event: state\ndata: 0\n" + block + b"\n\n"), refused(500))
    assert ids_sent(server) == [None, sent]


ODD_IDS = [b" 7", b"7 ", b"\t7", b"7\t", b"\xff", "ü".encode(), "☃".encode(), b"a\x7f\x1b"]


@pytest.mark.parametrize("odd", [*ODD_IDS, b"x" * 60_000], ids=lambda value: ascii(value)[:40])
def test_an_odd_event_id_does_not_stop_the_listener(server: JMAPServer, odd: bytes) -> None:
    script(server, sse(b"id: " + odd + b"\nevent: state\ndata: 1\n\n"))
    with Listener(url_of(server)) as listener:
        server.wait_for(lambda: listener.signals() >= 3)
    assert set(listener.shutdown.delays) == {1.0}


def test_the_last_event_id_outlasts_failures(server: JMAPServer) -> None:
    listen(server, 4, sse(b"id: 7\n" + STATE), *down(2), sse(PING))
    assert ids_sent(server) == [None, "7", "7", "7"]


def test_an_id_that_the_server_has_nothing_to_say_to_is_forgotten(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server restored from a backup waits for ever for an id from the future."""
    monkeypatch.setattr(mailroom, "QUIET_LIMIT", 0.02)
    silence = gevent.event.Event()
    body = (b"" for _ in iter(silence.wait, None))
    script(server, sse(b"id: 7\n" + STATE), sse(body), refused(500))
    with Listener(url_of(server)):
        server.wait_for(lambda: len(server.requests) >= 3)
    assert ids_sent(server)[:3] == [None, "7", None]


# What counts


def parsed(chunks: Iterable[bytes]) -> list[tuple[str, str]]:
    """Type and data of the events; blocks that only carry an id or a retry are none."""
    events = SSEClient(event_blocks(chunks)).events()
    found = [(event.event, event.data.strip()) for event in events]
    return [event for event in found if event != ("message", "")]


EVENTS: dict[str, tuple[bytes, list[tuple[str, str]]]] = {
    "nothing": (b"", []),
    "one": (STATE, [("state", "1")]),
    "two": (STATE + PING, [("state", "1"), ("ping", "{}")]),
    "no space": (b"event:state\ndata:1\n\n", [("state", "1")]),
    "data first": (b"data: 1\nevent: state\n\n", [("state", "1")]),
    "several lines of data": (b"event: state\ndata: 1\ndata: 2\n\n", [("state", "1\n2")]),
    "a colon in the data": (b'event: state\ndata: {"a": "b:c"}\n\n', [("state", '{"a": "b:c"}')]),
    "empty data": (b"event: state\ndata\n\n", [("state", "")]),
    "unnamed": (b"data: 1\n\n", [("message", "1")]),
    "unknown": (b"event: calendarAlert\ndata: 1\n\n", [("calendarAlert", "1")]),
    "only comments": (COMMENT * 3 + b":\n:\n\n", []),
    "comments between lines": (
        b": x\nevent: state\n: y\ndata: 1\n:\n: z\n\n" + COMMENT + STATE,
        [("state", "1"), ("state", "1")],
    ),
    "unknown fields": (b"event: state\nfoo: bar\nfoo\ndata: 1\nEvent: x\n\n", [("state", "1")]),
    "many blank lines": (b"\n\n\n" + STATE + b"\n\n\n\n" + STATE, [("state", "1")] * 2),
    "only an id": (b"id: 7\n\n" + STATE, [("state", "1")]),
    "only a retry": (b"retry: 5000\n\n" + STATE, [("state", "1")]),
    "id and retry": (b"id: 7\nretry: 5000\n\n", []),
    "a BOM": (b"\xef\xbb\xbf" + STATE, [("state", "1")]),
    "a BOM later": (STATE + b"\xef\xbb\xbf" + STATE, [("state", "1"), ("message", "1")]),
    "bad UTF-8": (b"event: state\ndata: \xff\xc3\n\n" + STATE, [("state", "��"), ("state", "1")]),
    "UTF-8": ("event: state\ndata: ü☃\U0001f4ec\n\n".encode(), [("state", "ü☃\U0001f4ec")]),
    "UTF-8 cut off at the end": (STATE + b"data: \xe2\x98", [("state", "1")]),
    "a NUL": (b"event: state\ndata: \x00\n\n" + STATE, [("state", "\x00"), ("state", "1")]),
    "other line ends are none": (
        "event: state\ndata: a\x0bb\x0cc\x85d\u2028event: ping\n\n".encode(),
        [("state", "a\x0bb\x0cc\x85d\u2028event: ping")],
    ),
    "truncated before the blank line": (STATE + b"event: state\ndata: 2\n", [("state", "1")]),
    "truncated in a line": (STATE + b"event: state\ndata: 2", [("state", "1")]),
    "truncated in the name": (STATE + b"event: sta", [("state", "1")]),
    "mixed line ends": (
        b"event: state\rdata: 1\r\n\revent: ping\ndata: 2\r\n\r\nevent: state\r\rdata: 3\n\r\n",
        [("state", "1"), ("ping", "2"), ("state", ""), ("message", "3")],
    ),
}
ENDINGS = [b"\n", b"\r", b"\r\n"]
TABLE = [(name, ending) for name in EVENTS for ending in ENDINGS]


@pytest.mark.parametrize(("name", "ending"), TABLE, ids=lambda value: str(value))
def test_events_are_the_same_however_they_are_cut_and_lines_end(name: str, ending: bytes) -> None:
    raw, expected = EVENTS[name]
    body = raw if name == "mixed line ends" else raw.replace(b"\n", ending)
    assert parsed([body]) == expected
    assert parsed(body[i : i + 1] for i in range(len(body))) == expected
    for cut in range(len(body) + 1):
        assert parsed([body[:cut], body[cut:]]) == expected, cut


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_event_is_told_as_soon_as_its_blank_line_is_there(ending: bytes) -> None:
    """A CR may be half a line end, but it is the end of an event already."""

    def chunks() -> Iterator[bytes]:
        yield STATE.replace(b"\n", ending)
        pytest.fail("it read on")

    assert next(iter(SSEClient(event_blocks(chunks())).events())).event == "state"


SIGNALS = [
    (STATE, 1),
    (STATE * 3, 3),
    (b"event: state\ndata: rubbish\n\n", 1),
    (b"event: state\ndata: {\n\n", 1),
    (b"event: state\ndata: [[1]]\n\n", 1),
    (b"event: state\ndata: null\n\n", 1),
    (b"event: state\ndata\n\n", 1),
    (b"event: state\ndata: \xff\xfe\n\n", 1),
    (b"event: state\ndata: " + b"[" * 50_000 + b"\n\n", 1),
    (PING, 0),
    (COMMENT, 0),
    (b"data: 1\n\n", 0),
    (b"event: calendarAlert\ndata: {}\n\n", 0),
    (b"event: State\ndata: 1\n\n", 0),
    (b"id: 5\n\n", 0),
    (b"retry: 5000\n\n", 0),
    (b"\n\n\n", 0),
    (STATE[:-1], 0),
    (STATE[:-2], 0),
    (b"", 0),
]


@pytest.mark.parametrize(("body", "signals"), SIGNALS, ids=lambda value: ascii(value)[:40])
def test_only_state_events_signal(server: JMAPServer, body: bytes, signals: int) -> None:
    listener = listen(server, 1, sse(body))
    assert [listener.queue.get_nowait() for _ in range(listener.signals())] == (
        ["state_changed"] * signals
    )


class Order(list[str]):
    """A queue that shows what was put on it, and what happened in between."""

    put = list.append


def test_the_data_of_an_event_is_handed_on_before_it_signals(server: JMAPServer) -> None:
    script(server, sse(b'event: state\ndata: {"a":\ndata: 1}\n\n' + PING + STATE))
    order, shutdown = Order(), Shutdown(1)
    mailroom.sse_listener(TOKEN, url_of(server), order, shutdown, on_state=order.append)
    assert order == ['{"a":\n1}', "state_changed", "1", "state_changed"]


FLOODS: dict[str, bytes] = {
    "a line": b"x" * 1000,
    "a line of data": b"data: " + b"x" * 994,
    "a comment": b":" + b"x" * 999,
    "an event": b"data: " + b"x" * 993 + b"\n",
    "an event of short lines": b"a\n" * 500,
    "wide characters": "ü".encode() * 500,
    "bad UTF-8": b"\xff" * 1000,
}
ONE_PIECE = {"a line of data", "a comment"}


def flood(name: str) -> Iterator[bytes]:
    piece = FLOODS[name]
    yield piece
    yield from itertools.repeat(b"x" * 1000 if name in ONE_PIECE else piece)


@pytest.mark.parametrize("name", FLOODS)
def test_an_endless_event_is_given_up_before_it_fills_the_memory(name: str) -> None:
    taken = itertools.count()
    chunks = (chunk for chunk in flood(name) if next(taken) >= 0)
    with pytest.raises(StreamEnd):
        list(event_blocks(chunks))
    assert next(taken) * 1000 <= 3 * MAX_EVENT_CHARACTERS


@pytest.mark.parametrize("name", FLOODS)
def test_an_endless_event_is_a_failure(server: JMAPServer, name: str) -> None:
    script(server, *(sse(flood(name)) for _ in range(3)))
    listener = listen(server, 3)
    assert (listener.shutdown.delays, listener.signals()) == (SCHEDULE[:3], 0)
    assert listener.troubles


def test_a_stream_may_be_longer_than_an_event(server: JMAPServer) -> None:
    event = b"event: state\ndata: " + b"x" * 1000 + b"\n\n"
    comments = COMMENT * 10_000 + COMMENT.strip() + b": no blank line\n" * 10_000 + b"\n"
    assert listen(server, 1, sse(event * 100 + comments + event)).signals() == 101


@pytest.mark.parametrize("chunked", [True, False])
def test_an_event_arrives_at_once(server: JMAPServer, chunked: bool) -> None:
    server.options.chunked = chunked
    with Listener(url_of(server)) as listener:
        server.wait_for(lambda: server.streams)
        for _ in range(3):
            server.account.deliver("bob@shop.example")
            assert listener.queue.get(timeout=1) == "state_changed"


# Back-off


def test_the_back_off_schedule() -> None:
    assert (mailroom.PROVEN_SECONDS, mailroom.ANSWER_TIMEOUT) == (60, 30)
    assert [backoff(attempt) for attempt in range(9)] == SCHEDULE
    assert backoff(10**6) == 60
    assert [backoff(attempt, 3.0) for attempt in range(6)] == [3, 6, 12, 24, 48, 60]
    assert backoff(0, 1000.0) == 60


HTML = {"Content-Type": "text/html"}
FAILURES: dict[str, Fault] = {
    "a server error": refused(500),
    "not found": refused(404),
    "busy": refused(503),
    "a reset": Fault("stream", drop=True),
    "an end at once": sse(b""),
    "an end at once of a stream without length": sse(iter(())),
    "an end after comments": sse(COMMENT * 5),
    "an end after half an event": sse(STATE[:-1]),
    "an end too early": sse(COMMENT * 100, truncate=50),
    "HTML": sse(STATE, headers=HTML),
    "no type": sse(STATE, headers={}),
    "JSON": sse(STATE, headers={"Content-Type": "application/json"}),
    "almost the type": sse(STATE, headers={"Content-Type": "text/event-streams"}),
    "another type": sse(STATE, headers={"Content-Type": "text/plain; x=text/event-stream"}),
    "a redirect in circles": refused(302, Location=EVENT_PATH),
    "a redirect to nowhere": refused(302, Location="http://[::1"),
    "a redirect without a place": refused(302),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_backs_off_as_the_schedule_says(server: JMAPServer, name: str) -> None:
    listener = listen(server, len(SCHEDULE), FAILURES[name])
    assert listener.shutdown.delays == SCHEDULE
    assert listener.signals() == 0
    assert listener.troubles
    assert all(text.isprintable() and TOKEN not in text for _, text in listener.told)
    assert (listener.status.status, listener.status.connected_since) == ("disconnected", None)
    assert listener.status.last_error


def test_a_server_that_is_not_there_backs_off_too(server: JMAPServer) -> None:
    server.pause()
    listener = listen(server, len(SCHEDULE))
    assert listener.shutdown.delays == SCHEDULE
    assert len(listener.troubles) == 1


OK = b"HTTP/1.1 200 OK\r\n"
NO_HTTP: dict[str, bytes] = {
    "another protocol": b"SSH-2.0-Nonsense\r\n\r\n",
    "no number": b"HTTP/1.1 abc\r\n\r\n",
    "an endless status line": b"HTTP/1.1 200 " + b"x" * 100_000,
    "too many headers": OK + b"X: y\r\n" * 1000 + b"\r\n",
    "no header": OK + b"\xff\x00\r\n\r\n",
    "an odd place": b"HTTP/1.1 302 Moved\r\nLocation: //\xff\xfe[\r\n\r\n",
    "no chunks": OK
    + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nx",
    "half a chunk": OK
    + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n:",
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_a_server_that_does_not_speak_http_backs_off_too(name: str) -> None:
    def talk(sock: socket.socket, _address: object) -> None:
        with suppress(OSError):
            sock.recv(65536)
            sock.sendall(NO_HTTP[name])
            sock.shutdown(socket.SHUT_WR)
            sock.recv(65536)
        sock.close()

    other = StreamServer(("127.0.0.1", 0), talk)
    other.start()
    try:
        listener = Listener(f"http://127.0.0.1:{other.server_port}/", Shutdown(9)).join()
    finally:
        other.stop()
    assert listener.shutdown.delays == SCHEDULE
    assert all(text.isprintable() for _, text in listener.told)


def test_a_time_out_while_connecting_is_a_failure(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailroom, "ANSWER_TIMEOUT", 0.02)
    listener = listen(server, 4, Fault("stream", hang=True))
    assert listener.shutdown.delays == SCHEDULE[:4]
    assert listener.troubles
    assert listener.status.last_error


@pytest.mark.parametrize("kind", ["text/event-stream;charset=utf-8", "Text/Event-Stream ; a=b"])
def test_the_media_type_may_have_capitals_and_parameters(server: JMAPServer, kind: str) -> None:
    assert listen(server, 1, sse(STATE, headers={"Content-Type": kind})).signals() == 1


def down(times: int) -> list[Fault]:
    return [refused(500) for _ in range(times)]


LIVES: list[tuple[list[Fault], list[float]]] = [
    ([*down(3), sse(STATE), *down(3)], [1, 2, 4, 1, 2, 4, 8]),
    ([*down(3), sse(PING), *down(3)], [1, 2, 4, 1, 2, 4, 8]),
    ([*down(2), sse(STATE), sse(STATE), sse(STATE)], [1, 2, 1, 1, 1]),
    ([*down(2), sse(STATE, truncate=len(STATE)), *down(1)], [1, 2, 1, 2]),
    ([*down(3), sse(b""), *down(2)], [1, 2, 4, 8, 16, 32]),
    ([*down(3), sse(COMMENT), *down(2)], [1, 2, 4, 8, 16, 32]),
    ([*down(3), sse(b"id: 5\n\n"), *down(2)], [1, 2, 4, 8, 16, 32]),
    ([*down(3), sse(STATE[:-1]), *down(2)], [1, 2, 4, 8, 16, 32]),
    ([sse(STATE), *down(2), sse(b""), sse(STATE), *down(1)], [1, 2, 4, 8, 1, 2]),
]


@pytest.mark.parametrize(("faults", "expected"), LIVES, ids=range(len(LIVES)))
def test_the_back_off_starts_over_only_after_a_sign_of_life(
    server: JMAPServer, faults: list[Fault], expected: list[float]
) -> None:
    assert delays(server, len(expected), *faults) == expected


@pytest.mark.parametrize(("proven", "after"), [(0.01, 1.0), (60.0, 8.0)])
def test_a_stream_that_stood_for_a_minute_is_a_sign_of_life_too(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch, proven: float, after: float
) -> None:
    monkeypatch.setattr(mailroom, "PROVEN_SECONDS", proven)

    def silence() -> Iterator[bytes]:
        gevent.sleep(0.05)
        yield COMMENT

    assert delays(server, 4, *down(3), sse(silence())) == [1, 2, 4, after]


def test_an_end_after_a_healthy_life_is_routine(server: JMAPServer) -> None:
    listener = listen(server, 5, sse(STATE))
    assert listener.shutdown.delays == [1] * 5
    assert not listener.troubles
    assert len(listener.texts("INFO")) == 1
    assert listener.texts("DEBUG")
    assert (listener.status.reconnect_count, listener.status.last_error) == (4, None)


@pytest.mark.parametrize(
    ("retry", "expected"),
    [
        (b"retry: 3000", [3, 6, 12, 24, 48, 60]),
        (b"retry:3000", [3, 6, 12, 24, 48, 60]),
        (b"retry: 0000003000", [3, 6, 12, 24, 48, 60]),
        (b"retry: 2500\nretry: 3000", [3, 6, 12, 24, 48, 60]),
        (b"retry: 3000\n\nretry: nonsense", [3, 6, 12, 24, 48, 60]),
        (b"retry: 45000", [45, 60, 60, 60, 60, 60]),
        (b"retry: 60000", [60] * 6),
        (b"retry: 3600000", [60] * 6),
        (b"retry: " + b"9" * 30, [60] * 6),
        (b"retry: " + b"9" * 6000, [60] * 6),
        *(
            (b"retry: " + garbage, SCHEDULE[:6])
            for garbage in (b"soon", b"-3000", b"+3000", b"3e3", b"3000.0", b"3000 ", b"0x99", b"")
        ),
        ("retry: ٣٠٠٠".encode(), SCHEDULE[:6]),
        (b"Retry: 3000", SCHEDULE[:6]),
        (b"retry", SCHEDULE[:6]),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_servers_retry_replaces_the_first_delay(
    server: JMAPServer, retry: bytes, expected: list[float]
) -> None:
    assert delays(server, 6, sse(retry + b"\n\n"), *down(1)) == expected
    assert delays(server, 6, sse(retry + b"\n" + STATE), *down(1)) == expected


def test_a_retry_of_0_makes_no_hot_loop(server: JMAPServer) -> None:
    waits = delays(server, 9, sse(b"retry: 0\n\n"))
    assert min(waits) >= 0.1
    assert waits[-1] == MAX_DELAY
    assert min(delays(server, 9, sse(b"retry: 0\n" + STATE))) >= 0.1


# Dead links


def connected_and_nothing_else(listener: Listener) -> bool:
    return len(listener.texts("INFO")) == 1 and not listener.troubles


def test_a_quiet_stream_is_replaced_at_once_and_without_a_word(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailroom, "QUIET_LIMIT", 0.02)
    with Listener(url_of(server)) as listener:
        server.wait_for(lambda: server.streams.opened >= 4)
        assert listener.status.status in ("connected", "connecting")
    assert listener.shutdown.delays == []
    assert connected_and_nothing_else(listener)
    assert len(listener.texts("DEBUG")) >= 3
    assert listener.status.last_error is None
    server.wait_for(lambda: not server.streams)


def test_a_hung_stream_is_replaced_and_the_next_one_hears(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailroom, "QUIET_LIMIT", 0.3)
    with Listener(url_of(server)) as listener:
        server.wait_for(lambda: server.streams)
        server.streams.hang()
        server.account.deliver("bob@shop.example")
        server.wait_for(lambda: server.streams.opened == 2)
        assert listener.signals() == 0
        server.account.deliver("bob@shop.example")
        assert listener.queue.get(timeout=0.2) == "state_changed"


def test_any_byte_is_a_sign_of_life(server: JMAPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "QUIET_LIMIT", 0.1)

    def murmur() -> Iterator[bytes]:
        for byte in b": a comment that takes a long time" * 2 + b"\n\n":
            yield bytes([byte])
            gevent.sleep(0.003)
        yield STATE

    listener = listen(server, 1, sse(murmur()))
    assert listener.signals() == 1
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("data", "seconds"),
    [
        ('{"interval": 30}', 90),
        ('{"interval": 1}', 90),
        ('{"interval": 0}', 90),
        ('{"interval": 60}', 180),
        ('{"interval": 100.5}', 301.5),
        ('{"interval": 300}', 900),
        ('{"interval": 30000}', 90),
        ('{"interval": 300000}', 900),
        ('{"@type": "Ping", "interval": 120, "more": []}', 360),
        ('{"interval": -300}', 90),
        ('{"interval": null}', 90),
        ('{"interval": "soon"}', 90),
        ('{"interval": []}', 90),
        ('{"interval": NaN}', 90),
        ('{"other": 300}', 90),
        ("300", 90),
        ("[300]", 90),
        ("null", 90),
        ("soon", 90),
        ("", 90),
        ("{", 90),
        ("[" * 50_000, 90),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_ping_may_announce_a_longer_silence(data: str, seconds: float) -> None:
    assert QUIET_LIMIT == 90
    assert quiet_limit(data) == seconds


@pytest.mark.parametrize("interval", ["1e9", "1e300", "1e999", "Infinity", "9" * 300, "9" * 400])
def test_a_silence_has_a_bound_whatever_is_announced(interval: str) -> None:
    assert 90 <= quiet_limit(f'{{"interval": {interval}}}') <= 3600


@pytest.mark.parametrize(("interval", "connections"), [("600", 1), ("600000", 1), ("0", 2)])
def test_an_announced_silence_is_waited_for(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch, interval: str, connections: int
) -> None:
    monkeypatch.setattr(mailroom, "QUIET_LIMIT", 0.05)

    def late() -> Iterator[bytes]:
        yield b'event: ping\ndata: {"interval": %s}\n\n' % interval.encode()
        gevent.sleep(0.15)
        yield STATE

    listener = listen(server, 1, sse(late()), sse(STATE))
    assert listener.signals() == 1
    assert len(server.requests) == connections


@pytest.mark.parametrize("data", [b"{", b'{"interval": ' + b"9" * 400 + b"}", b"\xff", b"null"])
def test_a_ping_that_is_rubbish_is_still_a_ping(server: JMAPServer, data: bytes) -> None:
    listener = listen(server, 3, sse(b"event: ping\ndata: " + data + b"\n\n"))
    assert listener.shutdown.delays == [1, 1, 1]
    assert not listener.troubles


# What the server answers


def test_a_server_without_push_is_told_once_and_left_alone(server: JMAPServer) -> None:
    server.options.push = 204
    with Listener(url_of(server)) as listener:
        server.wait_for(lambda: len(listener.shutdown.delays) >= 4)
        server.options.push = 200
        server.wait_for(lambda: server.streams)
        server.account.deliver("bob@shop.example")
        assert listener.queue.get(timeout=1)
    assert set(listener.shutdown.delays) == {60.0}
    assert not listener.troubles
    [told, connected] = listener.texts("INFO")
    assert "no push" in told
    assert "connected" in connected


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_are_an_error_told_once(server: JMAPServer, status: int) -> None:
    listener = listen(server, 4, refused(status))
    assert listener.shutdown.delays == [60.0] * 4
    assert len(listener.texts("ERROR")) == 1
    assert len(listener.troubles) == 1
    assert str(status) in str(listener.status.last_error)


def http_date(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", [7, 7, 7, 8, 16]),
        ("0", SCHEDULE[:5]),
        ("90", [90] * 5),
        ("soon", SCHEDULE[:5]),
        ("-7", SCHEDULE[:5]),
        ("7.5", SCHEDULE[:5]),
        ("", SCHEDULE[:5]),
        ("Wed, 21 Oct 2015 07:28:00 GMT", SCHEDULE[:5]),
        ("Wed, 21 Oct 2015 07:28:00 -0000", SCHEDULE[:5]),
        ("Wed, 99 Oct 2099 99:28:00 GMT", SCHEDULE[:5]),
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", SCHEDULE[:5]),
    ],
)
def test_a_busy_server_is_left_alone_as_long_as_it_says(
    server: JMAPServer, status: int, value: str, expected: list[float]
) -> None:
    listener = listen(server, len(expected), refused(status, Retry_After=value))
    assert listener.shutdown.delays == expected
    assert listener.troubles


def test_a_busy_server_may_name_a_date(server: JMAPServer) -> None:
    first, *_ = delays(server, 2, refused(503, Retry_After=http_date(40)))
    assert 35 < first <= 40


@pytest.mark.parametrize("value", ["9" * 30, "Wed, 21 Oct 9999 07:28:00 GMT", http_date(10**9)])
def test_a_busy_server_is_not_left_alone_for_ever(server: JMAPServer, value: str) -> None:
    assert all(60 <= wait <= 86400 for wait in delays(server, 2, refused(503, Retry_After=value)))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_on_the_same_host_is_followed(server: JMAPServer, status: int) -> None:
    moved = EVENT_PATH + "moved?types=*&closeafter=no&ping=30"
    server.faults.append(refused(status, Location=moved))
    with Listener(url_of(server)) as listener:
        server.wait_for(lambda: server.streams)
        server.account.deliver("bob@shop.example")
        assert listener.queue.get(timeout=1)
    assert [request.target for request in server.requests][1:] == [moved]
    assert server.requests[1].headers["authorization"] == f"Bearer {TOKEN}"
    assert server.requests[1].headers["accept"] == "text/event-stream"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_to_another_host_does_not_carry_the_token(server: JMAPServer, host: str) -> None:
    with JMAPServer() as other:
        place = f"http://{host}:{other.port}{EVENT_PATH}"
        listener = listen(server, 3, refused(302, Location=place))
        assert not [one for one in other.requests if "authorization" in one.headers]
    assert listener.shutdown.delays == SCHEDULE[:3]
    assert listener.troubles


def test_a_session_url_in_place_of_the_stream_is_an_error(server: JMAPServer) -> None:
    listener = Listener(server.origin + SESSION_PATH, Shutdown(2)).join()
    assert "application/json" in listener.troubles[0]


def test_trouble_is_told_once_until_it_changes(server: JMAPServer) -> None:
    listener = listen(server, 7, *down(3), refused(404), refused(404), sse(STATE), refused(404))
    numbers = [text[-3:] for text in listener.troubles]
    assert numbers == ["500", "404", "404"]
    assert len(listener.texts("INFO")) == 1


def test_a_stream_that_never_proves_healthy_is_told_of_once(server: JMAPServer) -> None:
    """Behind a proxy that closes what is idle, say."""
    listener = listen(server, 6, *[sse(b"") for _ in range(6)])
    assert (len(listener.troubles), len(listener.texts("INFO"))) == (1, 2)
    listener = listen(server, 6, sse(b""), sse(b""), sse(STATE), sse(b""), sse(b""), sse(STATE))
    assert (len(listener.troubles), len(listener.texts("INFO"))) == (2, 3)


def test_a_stream_that_stands_is_left_when_the_event_source_has_moved(server: JMAPServer) -> None:
    moved: list[str] = []
    with (
        JMAPServer.with_mailroom_account() as other,
        Listener(url_of(server), moved_to=lambda: moved[-1] if moved else None),
    ):
        server.wait_for(lambda: server.streams)
        moved.append(url_of(other))
        server.streams.send_raw(b": ping\n\n")
        other.wait_for(lambda: other.streams)
        server.wait_for(lambda: not server.streams)


# Connections


def test_every_connection_is_announced(server: JMAPServer) -> None:
    opened: list[str] = []
    listener = listen(
        server, 5, *down(1), sse(STATE), sse(b""), on_open=lambda: opened.append("open")
    )
    assert len(opened) == 4
    assert listener.status.reconnect_count == 3


def test_the_status_tells_of_the_stream(server: JMAPServer) -> None:
    with Listener(url_of(server)) as listener:
        server.wait_for(lambda: listener.status.status == "connected")
        since = datetime.fromisoformat(str(listener.status.connected_since))
        assert abs(datetime.now(UTC) - since) < timedelta(seconds=5)
        assert listener.status.last_event_at is None
        server.account.deliver("bob@shop.example")
        listener.queue.get(timeout=1)
        heard = datetime.fromisoformat(str(listener.status.last_event_at))
        assert since <= heard


def hung(server: JMAPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults.append(Fault("stream", hang=True, times=FOREVER))


def silent(server: JMAPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.streams.hang()


def absent(server: JMAPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "FIRST_DELAY", 60.0)
    server.faults.append(Fault("stream", status=401, times=FOREVER))


@pytest.mark.parametrize("make_event", [gevent.event.Event, threading.Event])
@pytest.mark.parametrize("moment", [hung, silent, absent])
def test_shutdown_ends_it_within_a_second_whatever_it_is_doing(
    server: JMAPServer,
    monkeypatch: pytest.MonkeyPatch,
    moment: Callable[[JMAPServer, pytest.MonkeyPatch], None],
    make_event: Callable[[], Any],
) -> None:
    """While it waits for an answer, for an event, and for the end of a back-off."""
    moment(server, monkeypatch)
    shutdown = make_event()
    listener = Listener(url_of(server), shutdown)
    server.wait_for(lambda: server.streams or listener.told or (moment is hung and server.requests))
    gevent.sleep(0)
    assert not listener.greenlet.ready()
    shutdown.set()
    listener.join(1)
    server.wait_for(lambda: not server.streams)
    assert len(server.requests) == 1


def test_there_is_one_stream_at_a_time(server: JMAPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old connection is closed before the new one is opened."""
    monkeypatch.setattr(mailroom, "QUIET_LIMIT", 0.02)
    open_then: list[int] = []
    before = open_files()
    server.on_request = lambda n, request: open_then.append(open_files())
    with Listener(url_of(server)):
        server.wait_for(lambda: server.streams.opened >= 10)
        server.wait_for(lambda: len(server.streams) == 1)
    # Two ends of the stream, and at most the server's end of the last one.
    assert max(open_then) <= before + 3


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


ENDLESS = itertools.repeat(b"x" * 2**16)
LEAKS: dict[str, Fault] = {
    "HTTP 500": refused(500),
    "HTTP 500 with a body": Fault("stream", status=500, body=b"x" * 100_000),
    "an end": sse(STATE),
    "an endless error page": Fault("stream", status=500, body=ENDLESS),
    "an endless page": sse(ENDLESS, headers=HTML),
    "an endless event": sse(ENDLESS),
    "a redirect": refused(302, Location="http://127.0.0.1:1/"),
    "a reset": Fault("stream", drop=True),
    "no answer": Fault("stream", hang=True),
    "silence": Fault("stream"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_fifty_reconnects_leave_no_socket_open(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(mailroom, "ANSWER_TIMEOUT", 0.01)
    monkeypatch.setattr(mailroom, "QUIET_LIMIT", 0.01)
    script(server, LEAKS[name])
    with Listener(url_of(server)):
        server.wait_for(lambda: len(server.requests) >= 3)
        before = open_files()
        server.wait_for(lambda: len(server.requests) >= 53)
        server.wait_for(lambda: open_files() <= before + 2)


UNREAD = ["HTTP 500 with a body", "an endless error page", "an endless page", "an endless event"]


@pytest.mark.parametrize("name", [*UNREAD, "a reset", "no answer"])
def test_no_reply_stays_open_half_read_during_a_back_off(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(mailroom, "ANSWER_TIMEOUT", 0.1)
    script(server, LEAKS[name])
    before = open_files()
    with Listener(url_of(server), Asleep()) as listener:
        server.wait_for(lambda: listener.shutdown.delays)
        server.wait_for(lambda: open_files() <= before)
        assert len(listener.shutdown.delays) == 1


# Which states are news

Step = tuple[str, *tuple[Any, ...]]


def changed(account: str = "u1", **states: Any) -> str:
    return json.dumps({"@type": "StateChange", "changed": {account: states}})


def reported(**states: Any) -> Step:
    return ("reported", changed(**states))


BEGIN: Step = ("begin",)
CONNECTED: Step = ("connected",)
FORGET: Step = ("forget",)
READ: list[Step] = [BEGIN, ("saw", "Email", "e1"), ("saw", "Mailbox", "m1")]
WROTE: list[Step] = [
    *READ,
    ("saw", "Email", "e2"),
    ("saw", "Mailbox", "m2"),
    ("saw", "Email", "e3"),
]
NO_NEWS: dict[str, list[Step]] = {
    "nothing at all": [],
    "nothing after a cycle": READ,
    "a state that was read": [*READ, reported(Email="e1")],
    "both states that were read": [*READ, reported(Email="e1", Mailbox="m1")],
    "the state of the mailboxes": [*READ, reported(Mailbox="m1")],
    "types that Mailroom did not ask for": [*READ, reported(Email="e1", Thread="t9")],
    "an own write": [*WROTE, reported(Email="e2")],
    "all own writes": [*WROTE, reported(Email="e2"), reported(Email="e3", Mailbox="m2")],
    "an own write told before its reply came": [
        *READ,
        reported(Email="e2"),
        ("saw", "Email", "e2"),
    ],
    "what came before a cycle": [reported(Email="e0"), CONNECTED, *READ],
    "a connect that says the known state": [*READ, CONNECTED, reported(Email="e1", Mailbox="m1")],
    "a connect that says the known state of the mails": [*READ, CONNECTED, reported(Email="e1")],
    "a connect that says an own write": [*WROTE, CONNECTED, reported(Email="e3", Mailbox="m1")],
}
NEWS: dict[str, list[Step]] = {
    "a state before any cycle": [reported(Email="e1")],
    "another state": [*READ, reported(Email="e2")],
    "another state of the mailboxes": [*READ, reported(Email="e1", Mailbox="m2")],
    "the state of another type": [*READ, reported(Email="m1")],
    "only types that Mailroom did not ask for": [*READ, reported(Thread="t1")],
    "no state at all": [*READ, reported()],
    "another account": [*READ, ("reported", changed("u2", Email="e1"))],
    "a state that was not read": [BEGIN, ("saw", "Email", "e1"), reported(Mailbox="m1")],
    "a state of the cycle before": [*READ, BEGIN, ("saw", "Email", "e2"), reported(Email="e1")],
    "everything while a cycle has not read yet": [*READ, BEGIN, reported(Email="e1")],
    "a change by someone else after an own write": [*WROTE, reported(Email="e4")],
    "one of several": [*WROTE, reported(Email="e2"), reported(Email="x"), reported(Email="e3")],
    "anything once the labels turned out otherwise": [*WROTE, FORGET, reported(Email="e2")],
    "what was told before the labels turned out otherwise": [
        *READ,
        reported(Email="e2"),
        ("saw", "Email", "e2"),
        FORGET,
    ],
    "a write that says no states": [*READ, ("saw", "Email", None), reported(Email=None)],
    "a connect that says nothing": [*READ, CONNECTED],
    "a connect that says another state": [*READ, CONNECTED, reported(Email="e2", Mailbox="m1")],
    "a connect that says nothing of the mails": [*READ, CONNECTED, reported(Mailbox="m1")],
    "a connect that says nothing known": [*READ, CONNECTED, reported(Thread="t1")],
    "a connect that says the state of another account": [
        *READ,
        CONNECTED,
        ("reported", changed("u2", Email="e1")),
    ],
    "news before the connection broke": [
        *READ,
        reported(Email="e2"),
        CONNECTED,
        reported(Email="e1"),
    ],
    "a second connect that says nothing": [*READ, CONNECTED, reported(Email="e1"), CONNECTED],
}
RUBBISH = ["", "{", "null", "[]", "5", '"x"', "{}", '{"changed": null}', '{"changed": []}']
RUBBISH += ['{"changed": {"u1": null}}', '{"changed": {"u1": []}}', '{"changed": {"u1": 5}}']
RUBBISH += ["[" * 50_000, changed(Email=None), changed(Email=["e1"]), changed(Email={"a": 1})]


def has_news(steps: Iterable[Step]) -> bool:
    seen = SeenStates()
    for name, *arguments in steps:
        getattr(seen, name)(*arguments)
    answer = seen.has_news("u1")
    assert not seen.has_news("u1"), "it was told once"
    return answer


@pytest.mark.parametrize("steps", NO_NEWS.values(), ids=NO_NEWS)
def test_what_is_no_news(steps: list[Step]) -> None:
    assert not has_news(steps)


@pytest.mark.parametrize("steps", NEWS.values(), ids=NEWS)
def test_what_is_news(steps: list[Step]) -> None:
    assert has_news(steps)


@pytest.mark.parametrize("data", RUBBISH, ids=lambda value: ascii(value)[:40])
def test_rubbish_is_news(data: str) -> None:
    known = reported(Email="e1", Mailbox="m1")
    told: Step = ("reported", data)
    for steps in (
        [told],
        [told, known],
        [known, told],
        [CONNECTED, told],
        [CONNECTED, told, known],
    ):
        assert has_news([*READ, *steps]), steps


def test_every_event_is_asked_about_once() -> None:
    seen = SeenStates()
    for _ in range(2):
        seen.reported(changed(Email="e1"))
        assert seen.has_news("u1")
        assert not seen.has_news("u1")
