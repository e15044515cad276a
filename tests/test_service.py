"""The running service, in this process and as the program that a user starts: what starts a cycle
and how soon, what is said of it, and how it ends."""

import base64
import itertools
import json
import logging
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import gevent.pywsgi
import pytest
import requests
from jmap_server import FOREVER, JSON, Fault, JMAPServer, Options
from ports import free_port
from tools import SERVERS, Running, check_account, nth_request, parse_metrics, process, running

import mailroom

BOB, EVE = "Bob <bob@shop.example>", "Eve <eve@evil.example>"
STATE_EVENT = b'event: state\ndata: {"changed": {"u1": {"Email": "unheard of"}}}\n\n'
every_server = pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)
Make = Callable[..., Options]


@pytest.fixture(autouse=True)
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are hundredths; and the signals of the test run stay its own."""
    monkeypatch.setattr(gevent, "signal_handler", lambda *_: None)
    monkeypatch.setattr(mailroom, "CONNECT_GRACE", 0.02)
    monkeypatch.setattr(mailroom, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(mailroom, "MAX_DELAY", 0.3)


def account(**options: Any) -> JMAPServer:
    return JMAPServer.with_mailroom_account(Options(**options))


def started(server: JMAPServer, **changes: Any) -> AbstractContextManager[Running]:
    return running(server, **changes)


def settle(run: Running) -> None:
    """The first cycle is over, and the stream, if there is one, stands."""
    run.wait_for_cycles(1)
    if run.server.options.push == 200:
        run.server.wait_for(lambda: run.server.streams)
    run.wait_until_quiet()


def tap(server: JMAPServer, sender: str = BOB, label: str = "@ToFeed") -> str:
    mail = server.account.deliver(sender, ["Screener"])
    server.account.label(mail, label)
    return mail


def wait_filed(server: JMAPServer, mail: str, seconds: float = 5, box: str = "Feed") -> float:
    """Lets the service run until a mail is filed; how long it took."""
    start = monotonic()
    server.wait_for(lambda: server.account.mailboxes_of(mail) == {box}, seconds)
    return monotonic() - start


# ------------------------------------------------------------------------------- taps and cycles


@every_server
def test_one_tap_is_one_cycle(options: Make) -> None:
    """The events of the cycle's own writes start none."""
    with JMAPServer.with_mailroom_account(options()) as server, started(server) as run:
        server.account.deliver(BOB, ["Screener"])
        settle(run)
        for sender in (BOB, EVE, "carol@x.example"):
            mail = server.account.deliver(sender, ["Screener"])
            run.wait_until_quiet()
            arrived = run.cycles
            server.account.label(mail, "@ToFeed")
            wait_filed(server, mail)
            run.wait_until_quiet()
            assert run.cycles == arrived + 1, sender
        assert run.triggers.keys() == {"startup", "push"}
        check_account(server)


@every_server
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", range(1, 7))
def test_a_tap_made_while_a_cycle_runs_is_not_lost(options: Make, when: str, nth: int) -> None:
    with JMAPServer.with_mailroom_account(options()) as server, started(server) as run:
        settle(run)
        late: list[str] = []

        def act(*_: object) -> None:
            if not late:
                late.append(tap(server, EVE, "@ToJail"))

        fault = Fault(before_call=act) if when == "before" else Fault(after=act)
        nth_request(server, nth, lambda: fault)
        first = tap(server)
        wait_filed(server, first)
        run.wait_until_quiet()
        act()  # where the cycle made fewer requests
        wait_filed(server, late[0], box="Jail")
        check_account(server)


@every_server
def test_a_tap_is_filed_at_once_over_push(options: Make) -> None:
    with (
        JMAPServer.with_mailroom_account(options()) as server,
        started(server, debounce_seconds=0.2) as run,
    ):
        settle(run)
        assert wait_filed(server, tap(server)) < 0.2 + 0.5


@pytest.mark.parametrize("push", [204, 503, 404, None])
def test_a_tap_is_filed_within_a_poll_interval_without_push(push: int | None) -> None:
    with account(push=push) as server, started(server, poll_interval=0.3) as run:
        run.wait_for_cycles(1)
        assert wait_filed(server, tap(server)) < 0.3 + 1
        run.wait_for_cycles(1)
        assert run.health["last_poll_trigger"] == "fallback"
        assert run.triggers.keys() == {"startup", "fallback"}


def test_with_push_the_timer_is_a_safety_net() -> None:
    with account() as server, started(server, poll_interval=0.3) as run:
        server.wait_for(lambda: run.health["last_poll_trigger"] == "scheduled")


def test_the_stream_that_is_deaf_is_made_up_for_by_the_timer() -> None:
    with account() as server, started(server, poll_interval=0.4):
        server.wait_for(lambda: server.streams)
        server.streams.hang()
        assert wait_filed(server, tap(server)) < 1.4


def test_a_steady_stream_of_events_does_not_put_the_cycle_off() -> None:
    with account() as server, started(server, debounce_seconds=0.3) as run:
        settle(run)
        before, start = run.cycles, monotonic()
        while run.cycles < before + 2:
            server.streams.send_raw(STATE_EVENT)
            gevent.sleep(0.02)
            assert monotonic() - start < 1.5, "the window slides"
        assert monotonic() - start > 0.55


def test_many_events_in_one_window_are_one_cycle() -> None:
    with account() as server, started(server, debounce_seconds=0.2) as run:
        settle(run)
        before = run.cycles
        for _ in range(50):
            server.streams.send_raw(STATE_EVENT)
        mails = [tap(server, f"s{n}@x.example") for n in range(20)]
        for mail in mails:
            wait_filed(server, mail)
        run.wait_until_quiet()
        assert run.cycles == before + 1


def test_signals_during_a_cycle_are_one_further_cycle() -> None:
    with account() as server, started(server) as run:
        settle(run)
        before = run.cycles
        server.faults.append(
            Fault(after=lambda: server.streams.send_raw(STATE_EVENT * 9), delay=0.2)
        )
        server.streams.send_raw(STATE_EVENT)
        run.wait_for_cycles(2)
        run.wait_until_quiet()
        assert run.cycles == before + 2


def test_a_reconnected_stream_looks_at_what_was_missed() -> None:
    with account() as server, started(server) as run:
        settle(run)
        stream = Fault("stream", nth=1, delay=0.2)
        server.faults.append(stream)
        server.streams.drop()
        server.wait_for(lambda: not server.streams)
        mail = tap(server)  # no one hears of it
        wait_filed(server, mail)


@every_server
def test_nothing_is_asked_while_nothing_happens(options: Make) -> None:
    with JMAPServer.with_mailroom_account(options()) as server, started(server) as run:
        settle(run)
        count = len(server.requests)
        run.wait_until_quiet()
        assert len(server.requests) == count


# ------------------------------------------------------------------------------- failures


def fail(server: JMAPServer, **fault: Any) -> Fault:
    failing = Fault(times=FOREVER, **fault)
    server.faults.append(failing)
    return failing


BAD_REPLIES: dict[str, JSON] = {
    "500": {"status": 500, "body": b"oops"},
    "503": {"status": 503},
    "404": {"status": 404},
    "reset": {"drop": True},
    "html": {"body": b"<html>Sign in\nplease</html>", "headers": {"Content-Type": "text/html"}},
    "truncated": {"truncate": 50},
    "oversized": {"body": itertools.repeat(b"x" * 4096)},
    "rubbish": {"body": b'{"methodResponses": [["Email/get", {]}'},
    "not text": {"body": b"\xff\xfe\x00\x01"},
    "empty": {"body": b""},
    "list": {"body": b"[]"},
    "null": {"body": b"null"},
    "no replies": {"body": b'{"methodResponses": [], "sessionState": "x"}'},
    "deep": {"body": b"[" * 100_000},
    "big number": {"body": b'{"methodResponses": ' + b"9" * 10_000 + b"}"},
    "surrogate": {"body": b'{"methodResponses": "\\ud800"}'},
    "redirect": {"status": 302, "headers": {"Location": "/jmap/api/"}},
    "elsewhere": {"status": 302, "headers": {"Location": "https://evil.example/"}},
    "unauthorized": {"status": 401},
    "forbidden": {"status": 403},
}


@pytest.mark.parametrize("reply", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_bad_reply_is_one_line_and_passes(reply: JSON, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "MAX_REPLY_BYTES", 100_000)
    with account(push=None) as server, started(server, poll_interval=0.1) as run:
        run.wait_for_cycles(1)
        fail(server, **reply)
        mail = tap(server)
        server.wait_for(lambda: run.failures >= 3)
        server.faults.clear()
        wait_filed(server, mail)
        server.wait_for(lambda: run.failures == 0)
        (error,) = run.events("error")  # the same failure is told once
        assert "\n" not in json.dumps(error, ensure_ascii=False)
        assert len(json.dumps(error)) < 1000
        assert "Traceback" not in run.output.getvalue()
        assert [entry for entry in run.events("info") if "recovered" in entry["event"]]
        check_account(server)


def test_back_off_grows_and_is_at_most_the_poll_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "backoff", lambda attempt, *_: 0.05 * 2**attempt)
    with account(push=None) as server, started(server, poll_interval=0.4) as run:
        run.wait_for_cycles(1)
        count = len(server.requests)
        fail(server, status=500)
        server.wait_for(lambda: len(server.requests) >= count + 16, 10)
        times = [request.time for request in server.requests[count:] if request.kind == "api"]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        for gap, expected in zip(gaps, [0.05, 0.1, 0.2, 0.4, 0.4, 0.4, 0.4], strict=False):
            assert expected <= gap < expected + 0.15, gaps


def test_retry_after_is_honoured() -> None:
    with account(push=None) as server, started(server, poll_interval=60) as run:
        server.faults.append(Fault("session", status=503, headers={"Retry-After": "1"}))
        server.wait_for(lambda: len(server.requests) >= 2)
        first, second = server.requests[:2]
        assert 0.95 < second.time - first.time < 2
        run.wait_for_cycles(1)


def test_a_server_that_cannot_be_reached_at_start_is_tried_again() -> None:
    with account() as server:
        server.pause()
        with started(server, poll_interval=0.1) as run:
            server.wait_for(lambda: run.failures >= 2)
            server.resume()
            assert wait_filed(server, tap(server)) < 2
            (error,) = run.events("error")
            assert server.origin in json.dumps(error)


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_a_fault_during_the_first_cycle_passes(nth: int) -> None:
    with account() as server:
        server.on_request = lambda number, _: Fault(status=503) if number == nth else None
        with started(server, poll_interval=0.1):
            wait_filed(server, tap(server))


def test_a_sender_that_fails_is_told_once_with_the_cause() -> None:
    with account(push=None) as server, started(server, poll_interval=0.1) as run:
        run.wait_for_cycles(1)
        good, bad = tap(server, EVE), tap(server)
        fail(server, refuse={bad: {"type": "overQuota", "description": "no room"}})
        wait_filed(server, good)
        run.wait_for_cycles(3)
        server.faults.clear()
        wait_filed(server, bad)
        (error,) = run.events("error")
        assert error["sender"] == "bob@shop.example"
        assert "overQuota" in error["cause"]
        assert "no room" in error["cause"]


def test_a_cycle_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "CYCLE_DEADLINE", 0.5)
    with account(push=None) as server, started(server, poll_interval=0.1) as run:
        run.wait_for_cycles(1)
        server.faults.append(Fault(hang=True))
        server.wait_for(lambda: run.events("error"))
        wait_filed(server, tap(server))


# ------------------------------------------------------------------------------- the end


def test_a_rejected_token_ends_the_program() -> None:
    with account(token="other") as server, started(server, jmap_token="mine") as run:
        assert run.status() == 2
        (error,) = run.events("error")
        assert "API token" in error["event"], "where to make one"
        assert "Traceback" not in run.output.getvalue()


def test_an_account_that_lacks_things_ends_the_program() -> None:
    with account() as server:
        server.account.remove_mailbox("Screener")
        server.account.remove_mailbox("@ToFeed")
        server.account.remove_card(server.account.group_id("Truck"))
        with started(server) as run:
            assert run.status() == 2
            said = [entry["event"] for entry in run.events("error")]
            assert len(said) == 3
            assert all(
                any(name in line for line in said) for name in ("Screener", "@ToFeed", "Truck")
            )


def test_a_label_that_goes_missing_while_running_is_an_error_that_passes() -> None:
    with account(push=None) as server, started(server, poll_interval=0.1) as run:
        run.wait_for_cycles(1)
        server.account.rename_mailbox("@ToFeed", "@Fodder")
        server.wait_for(lambda: run.failures >= 2)
        server.account.rename_mailbox("@Fodder", "@ToFeed")
        wait_filed(server, tap(server))
        (error,) = run.events("error")
        assert "@ToFeed" in json.dumps(error)


def test_a_port_that_is_taken() -> None:
    with account() as server, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started(server, health_port=port) as run:
            assert run.status() == 2
            (error,) = run.log
            assert "MAILROOM_HEALTH_PORT" in error["event"]
            assert str(port) in error["event"]


def boom(error: BaseException) -> Callable[..., Any]:
    def fail_now(*_: Any, **__: Any) -> Any:
        raise error

    return fail_now


@pytest.mark.parametrize(
    "error",
    [KeyError("the cause"), gevent.Timeout(0), gevent.GreenletExit("the cause")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (mailroom.Triage, "run"),
        (mailroom, "sse_listener"),
        (mailroom.EventStream, "run"),
        (mailroom.SeenStates, "reported"),
        (gevent.pywsgi.WSGIServer, "serve_forever"),
    ],
    ids=["cycle", "listener", "stream", "event", "health"],
)
def test_the_death_of_a_greenlet_is_the_end(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, error: BaseException
) -> None:
    with account(connect_event=True) as server:
        monkeypatch.setattr(place, name, boom(error))
        with started(server, health_port=free_port()) as run:
            assert run.status() == 1
            (fault,) = run.events("critical")
            if not isinstance(error, gevent.GreenletExit):  # which is taken for a plain end
                assert type(error).__name__ in fault["traceback"]


def test_a_greenlet_that_just_ends_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with account() as server:
        monkeypatch.setattr(mailroom, "sse_listener", lambda *_, **__: None)
        with started(server) as run:
            assert run.status() == 1
            assert len(run.events("critical")) == 1


def text_of(output: Path) -> str:
    return output.read_text("utf-8")


def wait_for_log(server: JMAPServer, output: Path, text: str) -> None:
    server.wait_for(lambda: text in text_of(output), 10)


def blocked_read(server: JMAPServer, output: Path) -> None:
    wait_for_log(server, output, "event stream: connected")
    server.wait_for(lambda: server.streams)


def debounce(server: JMAPServer, output: Path) -> None:
    blocked_read(server, output)
    server.streams.send_raw(STATE_EVENT)


def failed_cycle(server: JMAPServer, output: Path) -> None:
    wait_for_log(server, output, "cycle failed")


def hanging_request(server: JMAPServer, _: Path) -> None:
    server.wait_for(lambda: server.count("Email/query") >= 1, 10)


def first_request(server: JMAPServer, _: Path) -> None:
    server.wait_for(lambda: server.requests, 10)


def hanging_stream(server: JMAPServer, _: Path) -> None:
    server.wait_for(lambda: server.count("stream") >= 1, 10)


def running_cycle(server: JMAPServer, _: Path) -> None:
    for n in range(200):
        tap(server, f"s{n}@x.example")
    server.options.latency = 0.3
    server.wait_for(lambda: server.count("Email/set") >= 1, 10)


MOMENTS: dict[str, tuple[Callable[[JMAPServer, Path], None], list[Fault], JSON]] = {
    "blocked read": (blocked_read, [], {}),
    "debounce window": (debounce, [], {"debounce_seconds": 600}),
    "back-off": (failed_cycle, [Fault("session", status=503, headers={"Retry-After": "60"})], {}),
    "hanging session": (first_request, [Fault("session", hang=True)], {}),
    "hanging request": (hanging_request, [Fault("Email/query", hang=True)], {}),
    "hanging stream": (hanging_stream, [Fault("stream", hang=True)], {}),
    "endless reply": (
        hanging_request,
        [Fault("Email/query", body=(b"x" for _ in iter(lambda: gevent.sleep(0.01), 1)))],
        {},
    ),
    "running cycle": (running_cycle, [], {}),
}


SIGNALS = [
    pytest.param(moment, number, id=f"{name}-{number.name}")
    for n, (name, moment) in enumerate(MOMENTS.items())
    for number in (signal.SIGTERM, signal.SIGINT)
    # A request that is cut short takes seconds: one signal each is enough.
    if not (name.startswith(("hanging s", "endless")) and (number == signal.SIGINT) == bool(n % 2))
]


@pytest.mark.parametrize(("moment", "number"), SIGNALS)
def test_a_signal_ends_the_program_within_five_seconds(
    tmp_path: Path, moment: tuple[Any, list[Fault], JSON], number: signal.Signals
) -> None:
    reached, faults, settings = moment
    output = tmp_path / "log"
    with account() as server, process(server, output, **settings) as program:
        server.faults += faults
        for fault in faults:
            fault.matched = fault.fired = 0
        reached(server, output)
        start = monotonic()
        program.send_signal(number)
        assert program.wait(timeout=5) == 0
        assert monotonic() - start < 5
        assert "Traceback" not in text_of(output)
        server.wait_for(lambda: not server.streams)
        check_account(server)


def test_a_cycle_that_is_ended_by_a_signal_loses_nothing(tmp_path: Path) -> None:
    with account() as server:
        mails = [tap(server, f"s{n}@x.example") for n in range(120)]
        server.options.latency = 0.1
        with process(server, tmp_path / "first") as program:
            server.wait_for(lambda: server.count("Email/set") >= 1, 10)
            program.terminate()
            assert program.wait(timeout=5) == 0
        assert server.account.mails_in("@ToFeed"), "it was over already"
        with process(server, tmp_path / "second"):
            for mail in mails:
                wait_filed(server, mail, 10)
        check_account(server)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"jmap_token": ""}, "MAILROOM_JMAP_TOKEN"),
        ({"poll_interval": "soon"}, "MAILROOM_POLL_INTERVAL='soon'"),
        ({"jmap_token": "wrong"}, "API token"),
    ],
    ids=["no token", "bad setting", "wrong token"],
)
def test_status_2_as_a_process(tmp_path: Path, settings: JSON, said: str) -> None:
    output = tmp_path / "log"
    with account() as server, process(server, output, **settings) as program:
        assert program.wait(timeout=10) == 2
        (line,) = text_of(output).splitlines()
        assert said in line


# ------------------------------------------------------------------------------- health


def page(run: Running, path: str = "/healthz", method: str = "GET") -> requests.Response:
    url = f"http://127.0.0.1:{run.settings.health_port}{path}"
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, timeout=5)


def test_the_health_page() -> None:
    with account() as server, started(server, health_port=free_port()) as run:
        settle(run)
        wait_filed(server, tap(server))
        run.wait_until_quiet()
        reply = page(run)
        assert reply.status_code == 200
        assert reply.headers["Content-Type"] == "application/json"
        body = reply.json()
        stream = body.pop("eventsource")
        assert body.pop("last_poll_age_seconds") < 5
        assert body == {"status": "ok", "last_poll_trigger": "push", "consecutive_failures": 0}
        assert stream.pop("connected_since").startswith("20")
        assert stream.pop("last_event_at").startswith("20")
        assert stream == {"status": "connected", "reconnect_count": 0, "last_error": None}
        server.streams.drop()
        server.wait_for(lambda: page(run).json()["eventsource"]["reconnect_count"] == 1)


@pytest.mark.parametrize(
    ("path", "method"),
    [("/", "GET"), ("/healthz/", "GET"), ("/health", "GET"), ("/healthz", "POST"), ("//", "GET")],
)
def test_other_paths_are_not_found(path: str, method: str) -> None:
    with account() as server, started(server, health_port=free_port()) as run:
        run.wait_for_cycles(1)
        assert page(run, path, method).status_code == 404


def test_a_stream_that_is_down_is_no_failure_of_health() -> None:
    with account(push=503) as server, started(server, poll_interval=0.2) as run:
        run.wait_for_cycles(3)
        assert run.page()[0] == 200
        stream = run.health["eventsource"]
        assert stream["status"] != "connected"
        assert "503" in stream["last_error"]


def test_health_fails_when_no_cycle_succeeds_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "CYCLE_DEADLINE", 0.5)
    with account(push=None) as server, started(server, poll_interval=0.1) as run:
        run.wait_for_cycles(1)
        fail(server, status=500)
        start = monotonic()
        server.wait_for(lambda: run.page()[0] == 503)
        assert monotonic() - start > 0.4
        assert run.health["status"] != "ok"
        assert run.failures > 0
        server.faults.clear()
        server.wait_for(lambda: run.page()[0] == 200)


def test_before_the_first_cycle_health_counts_from_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mailroom, "CYCLE_DEADLINE", 0.5)
    with account() as server:
        server.pause()
        with started(server, poll_interval=0.1) as run:
            server.wait_for(lambda: run.failures)
            assert run.page()[0] == 200
            assert run.health["last_poll_age_seconds"] is None
            assert run.health["last_poll_trigger"] is None
            server.wait_for(lambda: run.page()[0] == 503)


def test_metrics() -> None:
    settings = {"health_port": free_port(), "poll_interval": 0.3}
    with account() as server, started(server, **settings) as run:
        first = parse_metrics(run.page("/metrics")[1])
        assert first["mailroom_senders_triaged_total"] == 0
        settle(run)
        server.account.deliver(BOB, ["Screener"])
        wait_filed(server, tap(server))
        fail(server, status=500)
        server.wait_for(lambda: run.failures)
        reply = page(run, "/metrics")
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        samples = parse_metrics(reply.text)
        assert samples["mailroom_senders_triaged_total"] == 1
        assert samples["mailroom_mails_filed_total"] == 2
        assert samples["mailroom_eventsource_connected"] == 1
        assert samples["mailroom_consecutive_failures"] >= 1
        assert run.triggers["startup"] == 1


# ------------------------------------------------------------------------------- logs


def test_logs_for_people(tmp_path: Path) -> None:
    output = tmp_path / "log"
    with account() as server, process(server, output, log_format="text") as program:
        wait_filed(server, tap(server), 10)
        wait_for_log(server, output, "sender triaged")
        program.terminate()
        assert program.wait(timeout=5) == 0
        for line in text_of(output).splitlines():
            assert re.match(r"\d\d:\d\d:\d\d (debug|info|warning|error) +\S", line), line


def test_logs_for_programs(tmp_path: Path) -> None:
    output = tmp_path / "log"
    with account() as server, process(server, output) as program:
        wait_filed(server, tap(server), 10)
        wait_for_log(server, output, "sender triaged")
        program.terminate()
        assert program.wait(timeout=5) == 0
        entries = [json.loads(line) for line in text_of(output).splitlines()]
        assert all({"time", "level", "event"} <= entry.keys() for entry in entries)
        (triaged,) = [entry for entry in entries if entry["event"] == "sender triaged"]
        assert triaged["sender"] == "bob@shop.example"


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_the_log_level(level: str) -> None:
    with account() as server, started(server, log_level=level) as run:
        settle(run)
        wait_filed(server, tap(server))
        levels = ["debug", "info", "warning", "error"]
        assert {entry["level"] for entry in run.log} <= set(levels[levels.index(level) :])


def test_a_senders_name_does_not_forge_a_line() -> None:
    with account() as server, started(server, log_format="text") as run:
        settle(run)
        wait_filed(server, tap(server, "=?utf-8?q?Bob=0A12=3A00=3A00_error_forged?= <b@x.example>"))
        run.wait_until_quiet()
        assert not any(line.startswith("12:00:00") for line in run.output.getvalue().splitlines())


TOKENS = {"plain": "secret-token-0123456789", "odd": 'se"cr\\et/token+0123456789=='}


def echoes(token: str, basic: str) -> list[Fault]:
    """Ways in which a server sends back the credentials it was sent."""
    problem = json.dumps({"type": "about:blank", "detail": f"bad header: Bearer {token}"})
    method_error = {"type": "forbidden", "description": f"{token} may not"}
    return [
        Fault("session", status=400, body=problem.encode()),
        Fault("session", status=500, body=json.dumps({"detail": f"Basic {basic}"}).encode()),
        Fault("session", body=json.dumps({"capabilities": token}).encode()),
        Fault("session", body=json.dumps({token: 1}).encode()),
        Fault(status=302, headers={"Location": f"https://evil.example/?{token}"}),
        Fault(status=500, body=problem.encode()),
        Fault(errors={"Email/query": method_error, "Email/get": method_error}),
        Fault(errors={"Email/query": {"type": token}}),
        Fault(refuse={"*": method_error}),
        Fault(refuse={"*": {"type": token, "properties": [token]}}),
        Fault("stream", status=500, body=problem.encode()),
        Fault("stream", headers={"Content-Type": token}, body=b"x"),
        Fault("stream", status=302, headers={"Location": f"/elsewhere?{token}"}),
    ]


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("username", ["", "alice@home.example"], ids=["bearer", "basic"])
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_log_has_a_secret_in_it(token: str, username: str, log_format: str) -> None:
    user = "alice@home.example"
    basic = base64.b64encode(f"{user}:{token}".encode()).decode()
    settings = {"jmap_token": token, "jmap_username": username, "log_format": log_format}
    secrets = [token, json.dumps(token)[1:-1], repr(token)[1:-1], basic]
    leaks = []
    for fault in echoes(token, basic):
        with account(token=token, username=user) as server:
            tap(server)
            server.faults.append(fault)
            with started(server, poll_interval=0.05, **settings) as run:
                server.wait_for(lambda: fault.fired)  # noqa: B023  (at once)
                seen = run.cycles
                server.wait_for(lambda: run.cycles > seen + 1 or run.greenlet.ready())  # noqa: B023
            said = run.output.getvalue()
        assert said
        leaks += [line for line in said.splitlines() if any(secret in line for secret in secrets)]
    assert not leaks, "\n".join(sorted(set(leaks)))


def test_a_secret_that_is_cut_off_is_no_less_a_secret() -> None:
    token = TOKENS["plain"]
    with account(token=token, push=None) as server, started(server, poll_interval=0.02) as run:
        run.wait_for_cycles(1)
        for room in range(150, 310, 9):
            said = "x" * room + token
            problem = json.dumps({"detail": said}).encode()
            method_error = {"Email/get": {"type": said}}
            for fault in (Fault(status=500, body=problem), Fault(errors=method_error)):
                server.faults[:] = [fault]
                run.wait_for_cycles(2)
                assert fault.fired
        assert token[:12] not in run.output.getvalue()


def test_the_health_page_has_no_secret_in_it() -> None:
    token = TOKENS["plain"]
    with account(token=token) as server:
        location = {"Location": f"https://evil.example/?{token}"}
        server.faults.append(Fault("stream", times=FOREVER, status=302, headers=location))
        with started(server, health_port=free_port()) as run:
            server.wait_for(lambda: run.health["eventsource"]["last_error"])
            assert token not in page(run).text + page(run, "/metrics").text


def test_a_traceback_has_no_secret_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with account() as server:
        token = server.options.token
        monkeypatch.setattr(mailroom.Triage, "run", boom(ValueError(f"what of {token}?")))
        with started(server) as run:
            assert run.status() == 1
            assert token not in run.output.getvalue()


def test_the_program_says_nothing_of_its_libraries(tmp_path: Path) -> None:
    """At debug level too the log is Mailroom's own, since libraries log headers, and warn of
    cookies."""
    output = tmp_path / "log"
    with account() as server, process(server, output) as program:
        server.faults.append(Fault(times=FOREVER, headers={"Set-Cookie": "a=1; Max-Age"}))
        wait_filed(server, tap(server), 10)
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=5) == 0
        assert server.options.token not in text_of(output)
        assert "urllib3" not in text_of(output)
        assert "cookie" not in text_of(output)
    assert logging.getLogger("mailroom").name == "mailroom"
    assert isinstance(program, subprocess.Popen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_program_starts_ends_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it imports what it needs: the import of this gevent does not end."""
    (tmp_path / "gevent.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with account() as server, process(server, tmp_path / "log") as program:
        server.wait_for(lambda: "here" in text_of(tmp_path / "log"))
        program.send_signal(number)
        assert program.wait(timeout=5) == 0
        assert text_of(tmp_path / "log") == "here\n"


# ------------------------------------------------------------------- what a review brought to light


@every_server
def test_a_tap_in_the_middle_of_an_own_write_is_news(options: Make) -> None:
    """A server that writes one mail after the other has the tap in the write's own newState."""
    with JMAPServer.with_mailroom_account(options(coalesce=True)) as server, started(server) as run:
        settle(run)
        mails = [server.account.deliver(BOB, ["Screener"]) for _ in range(3)]
        other = server.account.deliver(EVE, ["Screener"])
        run.wait_until_quiet()
        emails = server.kinds["Email"]
        write, tapped = emails.update, list[str]()

        def write_and_tap(object_id: str, patch: JSON) -> None:
            write(object_id, patch)
            if not tapped:
                tapped.append(other)
                server.account.label(other, "@ToJail")

        emails.update = write_and_tap  # type: ignore[method-assign]  # the other user's moment
        server.account.label(mails[0], "@ToFeed")
        wait_filed(server, other, box="Jail")
        check_account(server)


def test_events_do_not_hurry_a_server_in_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "FIRST_DELAY", 0.3)
    with account() as server, started(server, debounce_seconds=0) as run:
        settle(run)
        server.faults += [Fault("api", times=FOREVER, status=500)]
        before = len(server.requests)
        start = monotonic()
        while monotonic() - start < 0.9:
            server.streams.send_raw(STATE_EVENT)
            gevent.sleep(0.01)
        api = [request for request in server.requests[before:] if request.kind != "stream"]
        # Every cycle is a session and what comes after it, and none is sooner than the first delay.
        assert run.failures <= 4, [request.methods for request in api]


def test_an_event_source_that_comes_later_is_listened_to() -> None:
    with account(push=None) as server, started(server, poll_interval=0.1) as run:
        run.wait_for_cycles(1)
        server.options.push = 200
        server.faults += [Fault("api", status=400)]
        server.wait_for(lambda: server.streams)


def test_the_account_is_told_of_when_it_is_news() -> None:
    """However often the session is read again."""
    with account() as server, started(server, poll_interval=0.05) as run:
        run.wait_for_cycles(1)
        before = server.count("session")
        fault = Fault("Email/query", times=6, errors={"Email/query": {"type": "serverFail"}})
        server.faults += [fault]
        server.wait_for(lambda: fault.fired == 6)
        run.wait_for_cycles(1)
        assert server.count("session") > before + 3
        ready = [each for each in run.events("info") if each["event"] == "account ready"]
        assert len(ready) == 1


def test_a_server_that_has_had_enough_is_left_alone() -> None:
    """Without a Retry-After too. Senders are tried one by one only where one may be at fault."""
    with account() as server, started(server, poll_interval=60) as run:
        settle(run)
        busy = Fault("ContactCard/set", times=FOREVER, status=429)
        server.faults += [busy]
        for n in range(20):
            tap(server, f"s{n}@x.example")
        server.wait_for(lambda: run.events("error"))
        assert busy.fired == 1
        server.faults.clear()
        server.wait_for(lambda: not server.account.mails_in("@ToFeed"), 10)


def test_a_long_window_does_not_hold_up_the_timer() -> None:
    with account() as server, started(server, poll_interval=0.3, debounce_seconds=60) as run:
        run.wait_for_cycles(1)
        server.wait_for(lambda: server.streams)
        wait_filed(server, tap(server), 5)


def test_an_event_source_that_moves_is_listened_to() -> None:
    with account() as server:
        old = {"eventSourceUrl": server.origin + "/gone/"}
        server.faults.append(Fault("session", times=FOREVER, edit=lambda new: {**new, **old}))
        with started(server, poll_interval=0.1) as run:
            server.wait_for(lambda: "HTTP 404" in run.output.getvalue())
            server.faults[:] = [Fault("api", status=400)]
            server.wait_for(lambda: server.streams)


def test_a_cycle_has_a_deadline_wherever_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "CYCLE_DEADLINE", 0.3)
    with account() as server, started(server) as run:
        settle(run)
        server.faults += [Fault("ContactCard/set", times=2, hang=True)]
        mail = tap(server)
        server.wait_for(lambda: run.events("error"))
        assert "not done after 0.3 seconds" in run.events("error")[0]["cause"]
        wait_filed(server, mail)
        check_account(server)


@every_server
@pytest.mark.parametrize("call", ["Email/query", "Email/get"])
def test_a_tap_is_news_when_the_look_after_a_write_fails(options: Make, call: str) -> None:
    with JMAPServer.with_mailroom_account(options()) as server, started(server) as run:
        settle(run)
        mail = server.account.deliver(BOB, ["Screener"])
        other = server.account.deliver(EVE, ["Screener"])
        run.wait_until_quiet()
        errors = {call: {"type": "serverUnavailable"}} if call == "Email/query" else {}

        def before(method: str, _: JSON) -> None:
            if method == "Email/get" and not server.account.groups_of("eve@evil.example"):
                server.account.label(other, "@ToJail")

        # The last request of the cycle, which takes the label off.
        fault = Fault("Email/set", nth=2, before_call=before, errors=errors)
        server.faults += [fault]
        server.account.label(mail, "@ToFeed")
        wait_filed(server, other, box="Jail")
        assert fault.fired
        check_account(server)


def test_an_api_that_moves_is_found_again() -> None:
    with account() as server, started(server, poll_interval=0.1) as run:
        run.wait_for_cycles(1)
        before = server.count("session")
        html = {"Content-Type": "text/html"}
        moved = Fault("api", times=FOREVER, body=b"<html>gone</html>", headers=html)
        server.faults += [moved]
        server.wait_for(lambda: server.count("session") > before)
        server.faults.clear()
        wait_filed(server, tap(server))
