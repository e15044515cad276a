"""The stream from hell: a peer that sends, over a real socket, what no HTTP server would. Whatever
it does, the reconnects keep to their schedule, the timer goes on, taps are filed, memory is bounded
and a signal ends the program."""

import ctypes
import gzip
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, tzinfo
from itertools import count
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from gevent.server import StreamServer
from hypothesis import example, given
from hypothesis import strategies as st
from jmap_server import FOREVER, Fault, JMAPServer, Options
from ports import free_port
from test_push import PING, SCHEDULE, STATE, Listener, Shutdown
from tools import COUNTS, PROGRAM, check_account, memory, process, running

import mailroom

Talk = Callable[[socket.socket], object]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
CHUNKED = HEAD.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
ENDED = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"


class Peer:
    """A server on loopback that lets `talk` have each connection once a request has come; `heads`
    are the requests. With `talk` over the connection is closed."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.heads: list[bytes] = []
        self._open: set[socket.socket] = set()
        self._server = StreamServer(("127.0.0.1", 0), self._serve)

    def __enter__(self) -> "Peer":
        self._server.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/events"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def turn(self, talk: Talk) -> None:
        """From now on it talks so; what it was at is cut off."""
        self.talk = talk
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _serve(self, sock: socket.socket, _address: object) -> None:
        self._open.add(sock)
        with suppress(OSError):
            self.heads.append(sock.recv(65536))
            self.talk(sock)
            sock.shutdown(socket.SHUT_WR)
            until_gone(sock)
        self._open.remove(sock)
        sock.close()


def until_gone(sock: socket.socket) -> None:
    """Waits for the client to go."""
    while sock.recv(65536):
        pass


def reset(sock: socket.socket) -> None:
    """Ends a connection with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# ------------------------------------------------------------------- the schedule, in virtual time


class Clock(Shutdown):
    """A shutdown event under which a wait takes no time but moves the clock that Mailroom reads."""

    def __init__(self, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(most)
        self.now = 1000.0
        monkeypatch.setattr(mailroom, "time", SimpleNamespace(monotonic=lambda: self.now))

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0
        return super().wait(timeout)


EVENT = b'id: 7\nevent: state\ndata: {"changed": {}}\n\n'
WIRES = {
    "plain": HEAD + EVENT,
    "chunked": CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(EVENT), EVENT),
    "in chunks of a byte": CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in EVENT),
    "with a length": HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 99\r\n\r\n") + EVENT,
}


@pytest.mark.parametrize("end", [None, reset], ids=["closed", "reset"])
@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
def test_a_drop_at_every_byte(wire: bytes, end: Talk | None) -> None:
    """Before the event is whole it is a failure like any other; after, a routine end."""
    cuts, served = range(len(wire) + 1), count()

    def talk(sock: socket.socket) -> None:
        sock.sendall(wire[: next(served)])
        if end:
            end(sock)

    with Peer(talk) as peer:
        listener = Listener(peer.url, Shutdown(len(cuts))).join(30)
    # The data of the last chunk ends before its line does.
    whole = wire.rindex(b"\n" if wire is not WIRES["chunked"] else b"\n\r\n0") + 1
    if wire is WIRES["in chunks of a byte"]:
        whole -= 2
    failures = [*SCHEDULE, *[60.0] * len(cuts)][:whole]
    assert listener.signals() == len(cuts) - whole
    assert listener.shutdown.delays == failures + [1.0] * (len(cuts) - whole)
    told_id = [b"\r\nLast-Event-ID: 7\r\n" in head for head in peer.heads]
    assert told_id == [cut > whole for cut in cuts]


def life(reply: bytes, stands: float = 0, wait: float = 0) -> tuple[bytes, float, float]:
    """What a peer sends, the seconds that it then stays, and the least to wait after it."""
    return reply, stands, wait


def refusal(status: int, **headers: object) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} No\r\n{lines}Content-Length: 0\r\n\r\n".encode()


LIVES = [
    life(ENDED),
    life(b""),
    life(HEAD),
    life(HEAD + b": hello\n\n", 59.9),
    life(HEAD + b": hello\n\n", 60),
    life(HEAD, 86400),
    life(HEAD + STATE[:-1], 1),
    life(HEAD + STATE),
    life(HEAD + PING, 5),
    life(HEAD + b"id: 7\n\n"),
    life(HEAD.replace(b"event-stream", b"html") + STATE, 3600),
    life(refusal(204), wait=60),
    life(refusal(401), wait=60),
    life(refusal(403), wait=60),
    life(refusal(429, Retry_After=7), wait=7),
    life(refusal(503, Retry_After=3600), wait=3600),
    life(refusal(503, Retry_After=10**30), wait=3600),
    *(life(HEAD + b"retry: %d\n\n" % n) for n in (0, 1, 999, 1000, 2500, 59_999, 60_001)),
    life(HEAD + b"retry: 0\n" + STATE),
    life(HEAD + b"retry: 999999999999\n" + STATE),
    life(HEAD + b"retry: -1\nretry: 1e3\nretry: 9 s\n" + STATE),
]


def expected(lives: list[tuple[bytes, float, float]]) -> Iterator[float]:
    """The delays as DESIGN.md has them, worked out from what was on the wire."""
    first, failed = 1.0, 0
    for reply, stands, wait in lives:
        is_stream = reply.startswith(HEAD)
        if retry := re.search(rb"\nretry: ([0-9]+)\n", reply):
            first = min(max(int(retry[1]) / 1000, 1), 60)
        if is_stream and (stands >= 60 or STATE in reply or PING in reply):
            failed = 0
        yield max(wait, min(first * 2**failed, 60))
        failed += 1


@given(st.lists(st.sampled_from(LIVES), min_size=1, max_size=12))
@example([LIVES[0]] * 9)
@example([LIVES[0]] * 3 + [LIVES[4]] + [LIVES[0]] * 3)
def test_the_schedule_through_any_lives(lives: list[tuple[bytes, float, float]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock, tried, left = Clock(len(lives), monkeypatch), list[float](), iter(lives)

        def talk(sock: socket.socket) -> None:
            reply, stands, _ = next(left)
            tried.append(clock.now)
            sock.sendall(reply)
            while stands and reply.startswith(HEAD) and listener.status.status != "connected":
                gevent.sleep(0.001)
            clock.now += stands

        with Peer(talk) as peer:
            listener = Listener(peer.url, clock)
            listener.join(30)
    assert clock.delays == list(expected(lives))
    ends = [at + stands for at, (_, stands, _) in zip(tried, lives, strict=True)]
    gaps = [at - end for at, end in zip(tried[1:], ends, strict=False)]
    assert gaps == pytest.approx(clock.delays[:-1])


# ------------------------------------------------------------------- the service goes on through it

Hell = Callable[[socket.socket], object]


def at_once(*pieces: bytes) -> Hell:
    """Sends these bytes and closes."""
    return lambda sock: sock.sendall(b"".join(pieces))


def for_ever(head: bytes, piece: bytes, pause: float = 0.005) -> Hell:
    """Sends the piece again and again, at a pace."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(piece)
            gevent.sleep(pause)

    return talk


def drip(data: bytes, pause: float = 0.01) -> Hell:
    """Sends one byte at a time."""

    def talk(sock: socket.socket) -> None:
        for byte in data:
            sock.sendall(bytes([byte]))
            gevent.sleep(pause)

    return talk


def hang(data: bytes = b"") -> Hell:
    """Sends these bytes and nothing more."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(data)
        until_gone(sock)

    return talk


def vanish(sock: socket.socket) -> None:
    """The stream stands, and then its peer is gone without a word (tcp(7), TCP_REPAIR)."""
    sock.sendall(HEAD + STATE)
    gevent.sleep(0.05)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    sock.close()


def event_and_reset(sock: socket.socket) -> None:
    sock.sendall(HEAD + STATE)
    reset(sock)


def noise(sock: socket.socket) -> None:
    random = Random(7)  # noqa: S311  (noise, not a secret)
    sock.sendall(HEAD)
    while True:
        sock.sendall(random.randbytes(random.randrange(1, 5000)))
        gevent.sleep(0.005)


TCP_REPAIR = 19
HELLS: dict[str, Hell] = {
    "no answer": hang(),
    "half an answer": hang(HEAD[:30]),
    "silence": hang(HEAD),
    "half an event, then silence": hang(HEAD + STATE[:-1]),
    "a chunk that does not end": hang(CHUNKED + b"ffff\r\n:"),
    "an end at once": at_once(),
    "a reset at once": reset,
    "an event and an end": at_once(HEAD, STATE),
    "an event and a reset": event_and_reset,
    "a byte at a time": drip(HEAD + STATE * 3),
    "a head without end": for_ever(HEAD[:-2], b"X-More: yes\r\n"),
    "a line of the head without end": for_ever(HEAD[:-2] + b"X-More: ", b"y" * 1000),
    "please wait, for ever": for_ever(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "trailers without end": for_ever(CHUNKED + b"0\r\n", b"X-More: yes\r\n"),
    "a line without end": for_ever(HEAD, b"x" * 5000),
    "an event without end": for_ever(HEAD, b"data: x\n" * 500),
    "comments without end": for_ever(HEAD, b": x\n" * 500),
    "pings without end": for_ever(HEAD, b'event: ping\ndata: {"interval": 0.001}\n\n', 0.001),
    "states without end": for_ever(HEAD, STATE * 100, 0.001),
    "line ends without end": for_ever(HEAD, b"\r\n\n\r" * 500),
    "NULs": for_ever(HEAD, b"\0" * 500 + b"\n\n"),
    "bad UTF-8": for_ever(HEAD, b"event: state\ndata: \xff\xfe\xc0\x80\xed\xa0\x80\n\n"),
    "a BOM before everything": for_ever(HEAD, b"\xef\xbb\xbf" + STATE),
    "UTF-16": at_once(HEAD, STATE.decode().encode("utf-16")),
    "noise": noise,
    "an id from the future": hang(HEAD + b"id: 99999999999999999999\n" + STATE),
    "retry: 0": at_once(HEAD, b"retry: 0\n\n"),
    "retry: 0 and an event": at_once(HEAD, b"retry: 0\n" + STATE),
    "retry: 999999999999": at_once(HEAD, b"retry: 999999999999\n" + STATE),
    "chunks beyond reason": at_once(CHUNKED, b"f" * 400 + b"\r\n", STATE),
    "less than no chunk": at_once(CHUNKED, b"-5\r\n", STATE),
    "a length of its own": at_once(HEAD[:-2], b"Content-Length: 5\r\n\r\n", STATE * 9),
    "a length that is none": at_once(HEAD[:-2], b"Content-Length: -5\r\n\r\n", STATE),
    "two lengths": at_once(HEAD[:-2], b"Content-Length: 5, 6\r\n\r\n", STATE),
    "gzip that is none": at_once(HEAD[:-2], b"Content-Encoding: gzip\r\n\r\n", STATE),
    "HTML": at_once(HEAD.replace(b"event-stream", b"html"), b"<html>Sign in</html>"),
    "HTTP 204": at_once(refusal(204)),
    "HTTP 401": at_once(refusal(401)),
    "HTTP 429": at_once(refusal(429, Retry_After=999999999)),
    "HTTP 503": at_once(refusal(503, Retry_After=0)),
    "HTTP 999": at_once(b"HTTP/1.1 999 What\r\n\r\n"),
    "a redirect in circles": at_once(refusal(302, Location="/events")),
    "a redirect away": at_once(refusal(307, Location="https://elsewhere.example/")),
    "a redirect into a file": at_once(refusal(302, Location="file:///etc/passwd")),
    "an upgrade": at_once(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n", STATE),
    "TLS": at_once(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500),
    "HTTP/0.9": at_once(STATE),
    "gone without a word": vanish,
}


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([b"-5\r\nabc"], "broke off"),
        ([b"5\r\nabc"], "broke off"),
        ([b"zz\r\nabc"], "broke off"),
        ([b"-1\r\n", *[bytes(2**16)] * 64], "sends more than 1048576 bytes"),
        ([b"ffffffff\r\n", *[bytes(2**16)] * 64], "sends more than 1048576 bytes"),
    ],
    ids=["less than none", "cut short", "no number", "less than none, endless", "endless"],
)
def test_a_reply_in_odd_chunks_is_an_error_of_the_server(
    pieces: list[bytes], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailroom, "MAX_REPLY_BYTES", 2**20)
    head = CHUNKED.replace(b"text/event-stream", b"application/json")
    with Peer(at_once(head, *pieces)) as peer:
        client = mailroom.JMAPClient("token", peer.url)
        with pytest.raises(mailroom.ServerError, match=said):
            client.connect()


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are hundredths; and the signals of the test run stay its own."""
    monkeypatch.setattr(gevent, "signal_handler", lambda *_: None)
    times = {"CONNECT_GRACE": 0.02, "FIRST_DELAY": 0.02, "MAX_DELAY": 0.1, "MAX_RETRY_AFTER": 0.1}
    times |= {"QUIET_LIMIT": 0.3, "ANSWER_TIMEOUT": 0.3, "CONNECT_TIMEOUT": 0.5}
    for name, seconds in times.items():
        monkeypatch.setattr(mailroom, name, seconds)


def listening_to(peer: Peer, what: str = "eventSourceUrl") -> JMAPServer:
    """An account whose event source, or another URL of the session, is the peer."""
    server = JMAPServer.with_mailroom_account()
    edit: dict[str, Any] = {"edit": lambda session: {**session, what: peer.url}}
    server.faults.append(Fault("session", times=FOREVER, **edit))
    return server


def tap(server: JMAPServer, sender: str) -> str:
    mail = server.account.deliver(sender, ["Screener"])
    server.account.label(mail, "@ToFeed")
    return mail


def wait_filed(server: JMAPServer, mail: str, seconds: float = 10) -> None:
    server.wait_for(lambda: server.account.mailboxes_of(mail) == {"Feed"}, seconds)


def may(do: Callable[[], object]) -> bool:
    """Whether the system allows it; as an ordinary user it may not."""
    try:
        do()
    except OSError:
        return False
    return True


def may_repair() -> bool:
    with socket.socket() as sock:
        return may(lambda: sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1))


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("name", HELLS)
def test_the_timer_goes_on_and_taps_are_filed(name: str) -> None:
    if name == "gone without a word" and not may_repair():
        pytest.skip("it takes the rights of root")
    with Peer(HELLS[name]) as peer, listening_to(peer) as server:
        with running(server, poll_interval=0.05, log_level="info") as run:
            server.wait_for(lambda: peer.heads)
            run.wait_for_cycles(3)
            wait_filed(server, tap(server, "bob@x.example"))
            assert run.page()[0] == 200
            assert run.failures == 0
            before = len(peer.heads)
            peer.turn(hang(HEAD + STATE))
            server.wait_for(lambda: len(peer.heads) > before)
            server.wait_for(lambda: run.health["eventsource"]["status"] == "connected")
        assert "Traceback" not in run.output.getvalue()
        assert len(run.events("error")) <= (name == "HTTP 401")
        assert len(run.output.getvalue()) < 100_000
        check_account(server)


# -------------------------------------------------------------------- the program, flooded and hung

ENDLESS: dict[str, tuple[bytes, bytes]] = {
    # the head, and what follows as fast as it is taken: none of it ever is a byte of a body
    "interim replies": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n"),
    "nothing, compressed": (HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b"")),
}
FLOODS: dict[str, tuple[bytes, bytes]] = {
    **ENDLESS,
    "comments": (HEAD, b": " + b"x" * 997 + b"\n"),
    "short comments": (HEAD, b":\n"),
    "line ends": (HEAD, b"\r\n"),
    "pings": (HEAD, b'event: ping\ndata: {"interval": 0}\n\n'),
    "states": (HEAD, STATE),
    "large states": (HEAD, b"event: state\ndata: " + b"x" * 60_000 + b"\n\n"),
    "a line": (HEAD, b"x" * 1000),
    "chunks": (CHUNKED, b"2\r\n:\n\r\n"),
    "a page": (HEAD.replace(b"event-stream", b"html"), b"x" * 1000),
    "an error": (b"HTTP/1.1 500 Oops\r\n\r\n", b"x" * 1000),
}


class Flood:
    """Sends a piece as fast as it is taken; `sent` counts the bytes of all connections."""

    def __init__(self, head: bytes, piece: bytes) -> None:
        self.sent = 0
        self._head, self._pieces = head, piece * (2**20 // len(piece))

    def __call__(self, sock: socket.socket) -> None:
        sock.sendall(self._head)
        left = memoryview(self._pieces)
        while True:
            sent = sock.send(left)
            self.sent += sent
            left = left[sent:] or memoryview(self._pieces)


def stopped(program: "subprocess.Popen[bytes]") -> bool:
    """Whether the signal to stop ends it as it should."""
    program.send_signal(signal.SIGTERM)
    return program.wait(timeout=5) == 0


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_neither_fills_the_memory_nor_stops_the_rest(
    name: str, tmp_path: Path, long: bool
) -> None:
    if name not in ("interim replies", "trailers", "comments", "states", "a line") and not long:
        pytest.skip("it takes --long")
    flood = Flood(*FLOODS[name])
    with Peer(flood) as peer, listening_to(peer) as server:
        with process(server, tmp_path / "log", poll_interval=1, log_level="info") as program:
            server.wait_for(lambda: flood.sent, 20)
            wait_filed(server, tap(server, "bob@x.example"), 20)
            before, end = memory(program), time.monotonic() + (60 if long else 2)
            server.wait_for(lambda: flood.sent > 2**32 or time.monotonic() > end, 90)
            wait_filed(server, tap(server, "eve@x.example"), 20)
            assert memory(program) < before + 20 * 2**20
            assert stopped(program)
        assert (tmp_path / "log").stat().st_size < 100_000
        check_account(server)
    COUNTS["MiB of a flooding stream"] += flood.sent >> 20


HASTY = "import sys, mailroom; mailroom.CYCLE_DEADLINE = 1; sys.exit(mailroom.main())"


def is_healthy(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        return client.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("of", ["JMAP", "CardDAV"])
def test_a_reply_without_end_ends_with_the_cycle(of: str, name: str, tmp_path: Path) -> None:
    """And nothing else waits for it."""
    flood, port, log = Flood(*ENDLESS[name]), free_port(), tmp_path / "log"
    with Peer(flood) as peer, listening_to(peer, "apiUrl" if of == "JMAP" else "none") as server:
        tap(server, "bob@x.example")
        given = {"carddav_url": peer.url, "carddav_password": "x", "health_port": port}
        given["carddav_username"] = "bob" if of == "CardDAV" else ""
        with process(server, log, "-c", HASTY, **given) as program:
            server.wait_for(lambda: "the cycle was not done after 1 seconds" in log.read_text(), 20)
            before = len(peer.heads), flood.sent
            server.wait_for(lambda: (len(peer.heads), flood.sent) > before, 20)
            assert is_healthy(port)
            assert stopped(program)
        check_account(server)


def test_replies_over_tls_are_read_in_the_same_way() -> None:
    assert ssl.SSLSocket.makefile is socket.socket.makefile
    here, there = socket.socketpair()
    with here, there, here.makefile("rb") as file:
        assert type(file.raw) is socket.SocketIO


@pytest.mark.parametrize("name", ENDLESS)
def test_a_command_does_not_wait_for_a_reply_without_end(name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = "import mailroom; mailroom.MAX_REPLY_SECONDS = 1; raise SystemExit(mailroom.main())"
    with Peer(Flood(*ENDLESS[name])) as peer, listening_to(peer, "apiUrl") as server:
        with process(server, log, "-c", command, "setup") as program:
            assert program.wait(timeout=20) == 1
        assert "is not done after 1 seconds. Run it again" in log.read_text()


@pytest.mark.parametrize("name", ENDLESS)
def test_ctrl_c_ends_a_command_that_is_flooded(name: str, tmp_path: Path) -> None:
    flood = Flood(*ENDLESS[name])
    with Peer(flood) as peer, listening_to(peer, "apiUrl") as server:
        with process(server, tmp_path / "log", str(PROGRAM), "setup") as program:
            server.wait_for(lambda: flood.sent > 2**22, 20)
            program.send_signal(signal.SIGINT)
            assert program.wait(timeout=5) == 130
        assert (tmp_path / "log").read_text() == ""


def test_a_flooded_health_port_stops_nothing_else(tmp_path: Path) -> None:
    flood = Flood(b"GET /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")
    port = free_port()
    with JMAPServer.with_mailroom_account() as server:
        with process(server, tmp_path / "log", health_port=port) as program:
            server.wait_for(lambda: server.streams, 20)
            with socket.create_connection(("127.0.0.1", port), 5) as client:
                flooding = gevent.spawn(mailroom.outcome, lambda: flood(client))
                server.wait_for(lambda: flood.sent > 2**22 or flooding.ready(), 20)
                assert is_healthy(port)
                wait_filed(server, tap(server, "bob@x.example"), 20)
                assert stopped(program)
                flooding.kill()
        check_account(server)


def test_no_cookie_is_kept() -> None:
    """They would pile up, and go out with each request."""
    http = mailroom.HTTPClient(mailroom.BearerAuth("x"))
    with Peer(at_once(HEAD[:-2], b"Set-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")) as peer:
        for _ in range(2):
            http.request("GET", peer.url, {})
    assert not any(b"cookie:" in head.lower() for head in peer.heads)


@pytest.mark.usefixtures("scaled")
def test_signals_that_no_cycle_takes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is then left unread, and a full queue is no obstacle to the end."""
    monkeypatch.setattr(mailroom, "MAX_SIGNALS", 5)
    with Peer(Flood(HEAD, STATE)) as peer, listening_to(peer) as server:
        with running(server, debounce_seconds=60, log_level="info") as run:
            server.wait_for(lambda: run.health["eventsource"]["last_event_at"])
            heard = ""
            with gevent.Timeout(10, AssertionError("it takes all that comes")):
                while heard != (heard := run.health["eventsource"]["last_event_at"]):
                    gevent.sleep(0.3)
        check_account(server)


def test_a_program_that_was_suspended_goes_on(tmp_path: Path) -> None:
    """As on a laptop that sleeps: the stream breaks meanwhile, and the clock jumps."""
    with JMAPServer.with_mailroom_account() as server:
        with process(server, tmp_path / "log", poll_interval=3600) as program:
            server.wait_for(lambda: server.streams, 20)
            wait_filed(server, tap(server, "bob@x.example"), 20)
            program.send_signal(signal.SIGSTOP)
            stat = Path(f"/proc/{program.pid}/stat")
            server.wait_for(lambda: ") T " in stat.read_text())
            late = tap(server, "eve@x.example")
            server.streams.drop()
            server.wait_for(lambda: not server.streams)
            program.send_signal(signal.SIGCONT)
            wait_filed(server, late, 20)
            assert stopped(program)
        check_account(server)


@pytest.mark.usefixtures("scaled")
def test_no_clock_on_the_wall_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(7)  # noqa: S311  (a clock gone mad, not a secret)

    class Mad(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Mad":
            return cls(random.randrange(1971, 9998), 1, 1, tzinfo=tz)

    monkeypatch.setattr(mailroom, "datetime", Mad)
    monkeypatch.setattr(time, "time", lambda: random.uniform(0, 2**33))
    with JMAPServer.with_mailroom_account(Options(stream_life=0.1)) as server:
        server.faults.append(Fault("stream", nth=3, status=429, headers={"Retry-After": "0"}))
        with running(server, poll_interval=0.1) as run:
            for n in range(5):
                wait_filed(server, tap(server, f"s{n}@x.example"))
            server.wait_for(lambda: server.streams.opened > 5)
            cycles, end = run.cycles, time.monotonic() + 1
            server.wait_for(lambda: time.monotonic() > end)
            assert 3 <= run.cycles - cycles < 100
            assert run.page()[0] == 200
        check_account(server)


# ----------------------------------------------------------------------- half-open connections

CLONE_NEWNET = 0x40000000


@contextmanager
def own_network() -> Iterator[Callable[[str], object]]:
    """A loopback device of its own for all sockets that are made meanwhile, and how to set it "up"
    or "down": then packets are lost, and no connection learns of it."""
    libc, home = ctypes.CDLL(None), os.open("/proc/self/ns/net", os.O_RDONLY)
    if libc.unshare(CLONE_NEWNET):
        pytest.skip("it takes the rights of root")

    def set_link(to: str) -> None:
        subprocess.run(["ip", "link", "set", "lo", to], check=True)

    try:
        set_link("up")
        yield set_link
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)


@pytest.mark.usefixtures("scaled")
def test_a_network_that_is_pulled_out_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream and the kept connection of the requests are half-open then."""
    monkeypatch.setattr(mailroom.HTTPClient.open, "__defaults__", (None, 0.5))
    with own_network() as set_link, JMAPServer.with_mailroom_account() as server:
        with running(server, poll_interval=0.1, log_level="info") as run:
            server.wait_for(lambda: server.streams)
            wait_filed(server, tap(server, "bob@x.example"))
            set_link("down")
            server.wait_for(lambda: run.failures > 1)
            server.wait_for(lambda: run.health["eventsource"]["status"] != "connected")
            late = tap(server, "eve@x.example")
            set_link("up")
            wait_filed(server, late)
            server.wait_for(lambda: run.health["eventsource"]["status"] == "connected")
        check_account(server)
