"""The stream from hell: whatever an event source sends, over a real socket, the timer goes on, taps
are filed, memory is bounded and a signal ends the program. So it is when the machine sleeps, its
clock jumps, and the network is pulled out."""

import ctypes
import os
import re
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
import requests
from jmap_server import FOREVER, Fault, JMAPServer, Options
from peer import CHUNKED, HEAD, STATE, Flood, Peer, Talk, at_once, for_ever, hang, reset
from ports import free_port
from test_service import serving
from tools import COUNTS, check_account, memory, process, stopped, tap, wait_filed

import mailroom


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are hundredths."""
    times = {"FIRST_DELAY": 0.02, "MAX_DELAY": 0.1, "CONNECT_TIMEOUT": 0.5}
    for name, seconds in {**times, "QUIET_LIMIT": 0.3, "ANSWER_TIMEOUT": 0.3}.items():
        monkeypatch.setattr(mailroom, name, seconds)


def listening_to(peer: Peer) -> JMAPServer:
    """An account whose event source is the peer."""
    server = JMAPServer.with_mailroom_account()
    edit: dict[str, Any] = {"edit": lambda session: {**session, "eventSourceUrl": peer.url}}
    server.faults.append(Fault("session", times=FOREVER, **edit))
    return server


# The service goes on through it


def noise(sock: socket.socket) -> None:
    random = Random(7)  # noqa: S311  (noise, not a secret)
    sock.sendall(HEAD)
    while True:
        sock.sendall(random.randbytes(random.randrange(1, 5000)))
        gevent.sleep(0.005)


# At what more there is the stream just ends: see test_push.py.
HELLS: dict[str, Talk] = {
    "half an answer": hang(HEAD[:30]),
    "half an event, then silence": hang(HEAD + STATE[:-1]),
    "a chunk that does not end": hang(CHUNKED + b"ffff\r\n:"),
    "an event and a reset": reset(HEAD + STATE),
    "line ends without end": for_ever(HEAD, b"\r\n\n\r" * 500),
    "noise": noise,
    "TLS": at_once(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500),
    "a flood of comments": Flood(HEAD, b": " + b"x" * 997 + b"\n"),
    "a flood of states": Flood(HEAD, STATE),
    "a flood without a line end": Flood(HEAD, b"x" * 1000),
    "a flood of HTML": Flood(HEAD.replace(b"event-stream", b"html"), b"x" * 1000),
    "silence": hang(HEAD),
}
QUICK = "import mailroom; mailroom.FIRST_DELAY = mailroom.MAX_DELAY = 0.05; mailroom.main(['run'])"


def wait_flooded(server: JMAPServer, flood: Flood) -> None:
    """Until much has come, or as much as a slow machine takes."""
    end = time.monotonic() + 1.5
    server.wait_for(lambda: flood.sent > (2**26 if time.monotonic() < end else 0), 90)
    COUNTS["MiB of a flooding stream"] += flood.sent >> 20


def test_taps_are_filed_whatever_comes_and_the_memory_is_bounded(tmp_path: Path) -> None:
    port, output, more = free_port(), tmp_path / "log", {"poll_interval": 0.3, "log_level": "info"}
    with Peer(hang(HEAD)) as peer, listening_to(peer) as server:
        with process(server, output, "-c", QUICK, health_port=port, **more) as program:
            wait_filed(server, tap(server, "bob@x.example"), 20)
            before = memory(program)
            for name, talk in HELLS.items():
                connections = len(peer.heads)
                peer.turn(talk)
                server.wait_for(lambda: len(peer.heads) > connections, 20)  # noqa: B023
                if isinstance(talk, Flood):
                    wait_flooded(server, talk)
                wait_filed(server, tap(server, f"s{connections}@x.example"), 20)
                assert memory(program) < before + 20 * 2**20, name
            page = requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5)
            assert (page.status_code, page.json()["eventsource"]["status"]) == (200, "connected")
            assert stopped(program)
        log = output.read_text("utf-8")
        assert len(log) < 100_000
        assert not re.search('Traceback|"level": "error"', log)
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
    with serving(Options(stream_life=0.1), poll_interval=0.1) as (server, run):
        for n in range(3):
            wait_filed(server, tap(server, f"s{n}@x.example"))
        server.wait_for(lambda: server.streams.opened > 3)
        cycles, end = run.cycles, time.monotonic() + 0.5
        server.wait_for(lambda: time.monotonic() > end)
        assert 2 <= run.cycles - cycles < 50
        assert run.page()[0] == 200


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
    with own_network() as set_link, serving(poll_interval=0.1) as (server, run):
        wait_filed(server, tap(server, "bob@x.example"))
        set_link("down")
        server.wait_for(lambda: run.failures > 1)
        server.wait_for(lambda: run.health["eventsource"]["status"] != "connected")
        late = tap(server, "eve@x.example")
        set_link("up")
        wait_filed(server, late)
        server.wait_for(lambda: run.health["eventsource"]["status"] == "connected")
