"""The stream from hell: whatever an event source sends, over a real socket, the timer goes on, taps
are filed, memory is bounded and a signal ends the program. So it is when the machine sleeps, its
clock jumps, and the network is pulled out."""

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from pathlib import Path
from random import Random
from typing import Any

import gevent
import pytest
from jmap_server import FOREVER, Fault, JMAPServer, Options
from peer import CHUNKED, HEAD, STATE, Flood, Peer, Talk, at_once, for_ever, hang, refusal, reset
from tools import COUNTS, check_account, memory, process, running, stopped, tap, wait_filed

import mailroom


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are hundredths."""
    times = {"FIRST_DELAY": 0.02, "MAX_DELAY": 0.1, "MAX_RETRY_AFTER": 0.1}
    times |= {"QUIET_LIMIT": 0.3, "ANSWER_TIMEOUT": 0.3, "CONNECT_TIMEOUT": 0.5}
    for name, seconds in times.items():
        monkeypatch.setattr(mailroom, name, seconds)


def listening_to(peer: Peer) -> JMAPServer:
    """An account whose event source is the peer."""
    server = JMAPServer.with_mailroom_account()
    edit: dict[str, Any] = {"edit": lambda session: {**session, "eventSourceUrl": peer.url}}
    server.faults.append(Fault("session", times=FOREVER, **edit))
    return server


# The service goes on through it


def drip(sock: socket.socket) -> None:
    for byte in HEAD + STATE * 3:
        sock.sendall(bytes([byte]))
        gevent.sleep(0.01)


def noise(sock: socket.socket) -> None:
    random = Random(7)  # noqa: S311  (noise, not a secret)
    sock.sendall(HEAD)
    while True:
        sock.sendall(random.randbytes(random.randrange(1, 5000)))
        gevent.sleep(0.005)


HELLS: dict[str, Talk] = {
    "no answer": hang(),
    "half an answer": hang(HEAD[:30]),
    "silence": hang(HEAD),
    "half an event, then silence": hang(HEAD + STATE[:-1]),
    "a chunk that does not end": hang(CHUNKED + b"ffff\r\n:"),
    "an end at once": at_once(),
    "a reset at once": reset(),
    "an event and a reset": reset(HEAD + STATE),
    "a byte at a time": drip,
    "a line without end": for_ever(HEAD, b"x" * 5000),
    "an event without end": for_ever(HEAD, b"data: x\n" * 500),
    "states without end": for_ever(HEAD, STATE * 100, 0.001),
    "line ends without end": for_ever(HEAD, b"\r\n\n\r" * 500),
    "bad UTF-8": for_ever(HEAD, b"event: state\ndata: \xff\xfe\xc0\x80\xed\xa0\x80\n\n"),
    "a BOM before everything": for_ever(HEAD, b"\xef\xbb\xbf" + STATE),
    "noise": noise,
    "retry: 0": at_once(HEAD, b"retry: 0\n" + STATE),
    "retry: 999999999999": at_once(HEAD, b"retry: 999999999999\n" + STATE),
    "chunks beyond reason": at_once(CHUNKED, b"f" * 400 + b"\r\n", STATE),
    "less than no chunk": at_once(CHUNKED, b"-5\r\n", STATE),
    "two lengths": at_once(HEAD[:-2], b"Content-Length: 5, 6\r\n\r\n", STATE),
    "gzip that is none": at_once(HEAD[:-2], b"Content-Encoding: gzip\r\n\r\n", STATE),
    "HTML": at_once(HEAD.replace(b"event-stream", b"html"), b"<html>Sign in</html>"),
    "HTTP 401": at_once(refusal(401)),
    "HTTP 429": at_once(refusal(429, Retry_After=999999999)),
    "a redirect in circles": at_once(refusal(302, Location="/events")),
    "a redirect into a file": at_once(refusal(302, Location="file:///etc/passwd")),
    "TLS": at_once(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500),
}


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("name", HELLS)
def test_the_timer_goes_on_and_taps_are_filed(name: str) -> None:
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


FLOODS = {
    "comments": Flood(HEAD, b": " + b"x" * 997 + b"\n"),
    "states": Flood(HEAD, STATE),
    "line": Flood(HEAD, b"x" * 1000),
    "page": Flood(HEAD.replace(b"event-stream", b"html"), b"x" * 1000),
}


QUICK = "import mailroom; mailroom.FIRST_DELAY = mailroom.MAX_DELAY = 0.05; mailroom.main(['run'])"


def test_a_flood_neither_fills_the_memory_nor_stops_the_rest(tmp_path: Path) -> None:
    more = {"poll_interval": 0.3, "log_level": "info"}
    with Peer(hang(HEAD)) as peer, listening_to(peer) as server:
        with process(server, tmp_path / "log", "-c", QUICK, **more) as program:
            wait_filed(server, tap(server, "bob@x.example"), 20)
            before = memory(program)
            for name, flood in FLOODS.items():
                peer.turn(flood)
                end = time.monotonic() + 1.5
                server.wait_for(lambda: flood.sent > 2**26 or time.monotonic() > end, 90)  # noqa: B023
                wait_filed(server, tap(server, f"{name}@x.example"), 20)
                assert memory(program) < before + 20 * 2**20, name
                assert flood.sent
                COUNTS["MiB of a flooding stream"] += flood.sent >> 20
            assert stopped(program)
        assert (tmp_path / "log").stat().st_size < 100_000
        check_account(server)


# Sleep, clocks and half-open connections


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
        with running(server, poll_interval=0.1) as run:
            for n in range(3):
                wait_filed(server, tap(server, f"s{n}@x.example"))
            server.wait_for(lambda: server.streams.opened > 3)
            cycles, end = run.cycles, time.monotonic() + 0.5
            server.wait_for(lambda: time.monotonic() > end)
            assert 2 <= run.cycles - cycles < 50
            assert run.page()[0] == 200
        check_account(server)


@contextmanager
def own_network() -> Iterator[Callable[[str], object]]:
    """A loopback device of its own for all sockets that are made meanwhile, and how to set it "up"
    or "down": then packets are lost, and no connection learns of it."""
    libc, home = ctypes.CDLL(None), os.open("/proc/self/ns/net", os.O_RDONLY)
    if libc.unshare(0x40000000):  # CLONE_NEWNET
        pytest.skip("it takes the rights of root")

    def set_link(to: str) -> None:
        subprocess.run(["ip", "link", "set", "lo", to], check=True)

    try:
        set_link("up")
        yield set_link
    finally:
        assert libc.setns(home, 0x40000000) == 0
        os.close(home)


@pytest.mark.usefixtures("scaled")
def test_a_network_that_is_pulled_out_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream and the kept connection of the requests are half-open then."""
    monkeypatch.setattr(mailroom, "READ_TIMEOUT", 0.5)
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
