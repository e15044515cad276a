"""The running service, in this process and as the program that a user starts: what starts a cycle
and how soon, what is said of it to logs and monitors, and how it ends."""

import fcntl
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
import requests
import tools
from jmap_server import FOREVER, JSON, Fault, JMAPServer, Options
from ports import free_port
from tools import SERVERS, Running, parse_metrics, process, stopped, tap, wait_filed
from worlds import Program

import mailroom

BOB, EVE = "Bob <bob@shop.example>", "Eve <eve@evil.example>"
STATE_EVENT = b'event: state\ndata: {"changed": {"u1": {"Email": "unheard of"}}}\n\n'


@pytest.fixture(autouse=True)
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has failed is back soon."""
    monkeypatch.setattr(mailroom, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(mailroom, "MAX_DELAY", 0.3)


@contextmanager
def serving(
    options: Options | None = None, cycles: int = 1, **settings: Any
) -> Iterator[tuple[JMAPServer, Running]]:
    """A service on an account, which has to be well at the end. At first so many cycles are over,
    and the stream stands if there is one."""
    with JMAPServer.with_mailroom_account(options) as server:
        with tools.running(server, **settings) as run:
            run.wait_for_cycles(cycles)
            server.wait_for(lambda: not cycles or server.streams or server.options.push != 200)
            yield server, run
        tools.check_account(server)


def fail(server: JMAPServer, when: str = "api", **fault: Any) -> Fault:
    failing = Fault(when, times=FOREVER, **fault)
    server.faults.append(failing)
    return failing


def once(server: JMAPServer, *more: str) -> tools.Ran:
    given = {"jmap_url": server.session_url, "jmap_token": server.options.token}
    return tools.command("run", "--once", *more, **given)


# What starts a cycle ##############################################################################


@pytest.mark.parametrize("name", SERVERS)
def test_a_tap_is_one_cycle_and_one_that_finds_nothing(name: str) -> None:
    """The second is started by the events of the first one's own writes."""
    with serving(SERVERS[name](), debounce_seconds=0.05) as (server, run):
        run.wait_until_quiet()
        for sender in (BOB, EVE):
            before = run.cycles
            assert wait_filed(server, tap(server, sender)) < 0.05 + 0.5
            run.wait_until_quiet()
            assert run.cycles <= before + 2
            looks = ["Email/query", "Email/get"]  # what has a label, and the newest of the Screener
            assert server.requests[-1].methods == ["ContactCard/get", "Mailbox/get", *looks * 2]
        assert run.triggers.keys() == {"startup", "push"}


@pytest.mark.parametrize("push", [204, 503, None])
def test_without_push_the_timer_does_it(push: int | None) -> None:
    with serving(Options(push=push), poll_interval=0.1) as (server, run):
        assert wait_filed(server, tap(server, BOB)) < 0.1 + 1
        run.wait_for_cycles(1)
        assert run.triggers.keys() == {"startup", "fallback"}
        assert run.page()[0] == 200
        assert run.health["eventsource"]["status"] != "connected"
        if push is None:  # A failed cycle is followed by a look at the session, and there is some.
            server.options.push = 200
            server.faults += [Fault("api", status=400)]
            server.wait_for(lambda: server.streams)


def test_with_push_the_timer_is_a_safety_net() -> None:
    with serving(poll_interval=0.2, debounce_seconds=60) as (server, run):
        server.wait_for(lambda: run.health["last_poll_trigger"] == "scheduled")
        assert wait_filed(server, tap(server, BOB)) < 1.2, "a long window holds it up"
        server.streams.hang()
        assert wait_filed(server, tap(server, EVE)) < 1.2


def test_what_comes_in_one_window_or_during_a_cycle_is_one_cycle() -> None:
    with serving(debounce_seconds=0.1) as (server, run):
        run.wait_until_quiet()
        before = run.cycles
        server.streams.send_raw(STATE_EVENT * 50)
        run.wait_until_quiet()
        server.faults += [Fault(after=lambda: server.streams.send_raw(STATE_EVENT * 9), delay=0.1)]
        server.streams.send_raw(STATE_EVENT)
        run.wait_for_cycles(2)
        run.wait_until_quiet()
        assert run.cycles == before + 3
        start = monotonic()
        while run.cycles < before + 6:
            server.streams.send_raw(STATE_EVENT)
            gevent.sleep(0.02)
        assert 0.25 < monotonic() - start < 1.5, "the window slides"


def test_more_than_a_cycle_takes_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what waits for its user is not asked for without end, nor what a dry run leaves there."""
    monkeypatch.setattr(mailroom, "EMAILS_AT_ONCE", 3)
    with serving(Options(push=None)) as (server, _):
        messages = [tap(server, f"s{n}@x.example") for n in range(10)]
        dry = once(server, "--dry-run")
        assert (dry.status, len(dry.out.splitlines())) == (0, 3)
        assert once(server).status == 0
        assert server.account.mails_in("Feed") == set(messages)
        for n in range(5):
            tap(server, f"c{n}@x.example", "@ToFeed", "@ToJail")
        assert once(server).status == 0


# Failures #########################################################################################


@pytest.mark.parametrize("reply", [{"hang": True}, {"status": 404}, {"body": b"<p>Sign\nin</p>"}])
def test_a_failure_is_one_line_and_passes(reply: JSON, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "CYCLE_DEADLINE", 0.3)
    with serving(Options(push=None), poll_interval=0.1) as (server, run):
        fail(server, **reply)
        message = tap(server, BOB)
        server.wait_for(lambda: run.failures >= 2)
        [error] = run.events("error")
        assert len(json.dumps(error)) < 1000
        server.faults.clear()
        wait_filed(server, message)
        server.wait_for(lambda: run.failures == 0)
        run.wait_for_cycles(2)
        assert [each["event"] for each in run.events("info")].count("recovered") == 1
        assert "Traceback" not in run.output.getvalue()


def test_a_failure_is_logged_once_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the numbers in it change, and the causes take turns."""
    clock, ahead = monotonic, [0.0]
    monkeypatch.setattr("mailroom.time.monotonic", lambda: clock() + ahead[0])
    with serving(Options(push=None), poll_interval=0.02) as (server, run):
        server.on_request = lambda n, _: Fault(status=500, body=b"no %d" % n if n % 2 else b"never")
        run.wait_for_cycles(2)
        first = len(run.events("error"))
        for hour in range(1, 4):
            ahead[0] += 3600
            run.wait_for_cycles(6)
            assert len(run.events("error")) == first + 2 * hour


LIMIT: JSON = {"type": "rateLimit", "description": "wait for 90 seconds"}
DOWN: JSON = {"status": 500, "times": FOREVER}
WAIT = {"Retry-After": "120"}
PAUSES: dict[str, tuple[Fault, list[float], JSON]] = {
    # what fails, for how long the server is then left alone, and settings
    "ever longer": (Fault(**DOWN), [1, 2, 4, 8, 16, 32, 60, 60], {}),
    "as often as it polls": (Fault(**DOWN), [1, 2, 3, 3], {"poll_interval": 3}),
    "a refused token": (Fault(status=401, times=FOREVER), [60, 60], {}),
    "Retry-After": (Fault(status=503, headers=WAIT), [120], {}),
    "cut off": (Fault(status=503, headers=WAIT, body=b"x" * 99, truncate=9), [120], {}),
    "far away": (Fault(status=429, headers={"Retry-After": "86400"}), [600], {}),
    "of a method": (Fault(errors={"Email/query": LIMIT}), [90], {}),
    "of one object": (Fault("Email/set", refuse={"*": LIMIT}), [90], {}),
    "a 403": (Fault(status=403, body=b"rate limit exceeded"), [60], {}),
}


@pytest.mark.parametrize(("fault", "pauses", "settings"), PAUSES.values(), ids=PAUSES)
def test_a_server_that_has_had_enough_is_left_alone(
    fault: Fault, pauses: list[float], settings: JSON, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailroom, "FIRST_DELAY", 1)
    monkeypatch.setattr(mailroom, "MAX_DELAY", 60)
    with JMAPServer.with_mailroom_account() as server:
        program = Program(tools.settings_for(server, **settings))
        assert program.cycle() == "success"
        for sender in (BOB, EVE):
            tap(server, sender)
        server.faults.append(fault)
        for pause in pauses:
            assert (program.cycle(), program.pause) == ("failure", pause)
    assert fault.matched == len(pauses), "senders were tried one by one"


def test_events_do_not_hurry_a_server_in_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "FIRST_DELAY", 0.3)
    with serving(debounce_seconds=0) as (server, run):
        run.wait_until_quiet()
        failing, end = fail(server, status=500), monotonic() + 0.5
        while monotonic() < end:
            server.streams.send_raw(STATE_EVENT)
            gevent.sleep(0.01)
        server.faults.clear()
        assert failing.fired <= 2


def test_a_sender_that_fails_holds_up_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "FIRST_DELAY", 60)
    monkeypatch.setattr(mailroom, "MAX_DELAY", 60)
    with serving() as (server, run):
        run.wait_until_quiet()
        bad = tap(server, BOB)
        fail(server, "Email/set", refuse={bad: {"type": "overQuota", "description": "no room"}})
        server.wait_for(lambda: run.failures)
        for n in range(2):  # though by itself it is tried again in a minute only
            assert wait_filed(server, tap(server, f"s{n}@x.example")) < 2
        [error] = run.events("error")
        assert error["sender"] == "bob@shop.example"
        assert re.search("overQuota.*no room", error["cause"])
        server.faults.clear()
        tap(server, EVE)
        wait_filed(server, bad)


# The end ##########################################################################################

GREENLETS = ("mailroom.Triage.run", "mailroom.sse_listener", "gevent.pywsgi.WSGIServer.start")


@pytest.mark.parametrize("error", [KeyError("why"), gevent.GreenletExit("why")], ids=repr)
@pytest.mark.parametrize("place", GREENLETS)
def test_the_death_of_a_greenlet_is_the_end(
    monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
) -> None:
    def die(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(place, die)
    ends = pytest.raises((mailroom.MailroomError, RuntimeError, KeyError))
    with serving(cycles=0, health_port=free_port()) as (_, run), ends:
        run.status()


def log_of(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text("utf-8")


TERM, INT = signal.SIGTERM, signal.SIGINT
ENDLESS = (b"x" for _ in iter(lambda: gevent.sleep(0.01), 1))
MOMENTS: dict[str, tuple[int, str, list[Fault]]] = {
    # The signal, what to wait for in the log or in the requests, and what goes wrong.
    "window": (TERM, "stream: connected", []),
    "back-off": (INT, "cycle failed", [Fault(status=503)]),
    "session": (TERM, "session", [Fault("session", hang=True)]),
    "request": (INT, "api", [Fault(hang=True)]),
    "endless reply": (TERM, "api", [Fault(body=ENDLESS)]),
    "cycle": (INT, "Email/set", [Fault("Email/set", work=True, hang=True)]),
    "stream": (TERM, "stream", [Fault("stream", hang=True)]),
}


@pytest.mark.parametrize(("number", "goal", "faults"), MOMENTS.values(), ids=MOMENTS)
def test_a_signal_ends_the_program_within_five_seconds(
    tmp_path: Path, number: int, goal: str, faults: list[Fault]
) -> None:
    """At whatever moment, and what was begun is done by the next one."""
    with JMAPServer.with_mailroom_account() as server:
        messages = [tap(server, f"s{n}@x.example") for n in range(60)]
        server.faults += faults
        with process(server, tmp_path / "log", debounce_seconds=600) as program:
            server.wait_for(lambda: goal in log_of(tmp_path) or server.count(goal), 10)
            assert stopped(program, number)
        for word in ("Traceback", "urllib3", server.options.token):
            assert word not in log_of(tmp_path), "at debug level the libraries log headers"
        server.faults.clear()
        assert once(server).status == 0
        assert server.account.mails_in("Feed") == set(messages)
        tools.check_account(server)


def test_a_log_that_nobody_reads_does_not_keep_it_alive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    assert mailroom.SHUTDOWN_SECONDS < 5
    scaled = "import mailroom; mailroom.SHUTDOWN_SECONDS = 1; mailroom.main([])"
    with (
        JMAPServer.with_mailroom_account() as server,
        process(server, tmp_path / "log", "-c", scaled) as program,
    ):
        for n in range(60):
            tap(server, f"s{n}@x.example")
        server.wait_for(lambda: server.count("Email/set"), 10)
        gevent.sleep(0.3)  # and now it is stuck
        start = monotonic()
        assert stopped(program)
        assert monotonic() - start > 0.5, "it was not stuck"
    os.close(reader)


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_signal_while_the_program_starts_ends_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it imports what it needs: the import of this gevent does not end."""
    (tmp_path / "gevent.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with JMAPServer.with_mailroom_account() as server, process(server, tmp_path / "log") as program:
        server.wait_for(lambda: "here\n" in log_of(tmp_path))
        assert stopped(program, number)
        assert log_of(tmp_path) == "here\n"


# What monitors and logs are told ##################################################################


def test_the_pages_over_the_wire() -> None:
    with serving(health_port=free_port()) as (server, run):
        run.wait_until_quiet()
        ask = partial(requests.request, timeout=5)
        origin = f"http://127.0.0.1:{run.settings.health_port}"
        for path, kind in (("/healthz", "application/json"), ("/metrics", "text/plain; version=0")):
            whole, head = ask("GET", origin + path), ask("HEAD", origin + path)
            assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
            assert whole.headers["Content-Type"].startswith(kind)
            assert int(head.headers["Content-Length"]) > 200
        for path, method in (("/", "GET"), ("/healthz/", "HEAD"), ("/healthz", "POST")):
            assert ask(method, origin + path).status_code == 404
        body = ask("GET", f"{origin}/healthz").json()
        stream = body.pop("eventsource")
        assert body.pop("last_poll_age_seconds") < 5
        assert body.pop("last_poll_trigger") == "push"
        assert body == {"status": "ok", "consecutive_failures": 0, "last_error": None}
        assert stream.pop("connected_since").startswith("20")
        assert stream.keys() == {"status", "last_event_at", "reconnect_count", "last_error"}
        server.streams.drop()
        server.wait_for(lambda: run.health["eventsource"]["reconnect_count"] == 1)


@pytest.mark.parametrize("status", [401, 500])
def test_health_fails_with_the_credentials_or_when_all_is_old(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(cycles=0, poll_interval=0.1) as (server, run):
        assert (run.page()[0], run.health["last_poll_age_seconds"]) == (200, None)
        run.wait_for_cycles(1)
        fail(server, status=status)
        server.wait_for(lambda: run.failures)
        assert run.page()[0] == (503 if status == 401 else 200)
        monkeypatch.setattr(mailroom, "CYCLE_DEADLINE", 0.3)
        server.wait_for(lambda: run.page()[0] == 503)
        assert run.health["status"] == "failing"
        assert f"HTTP {status}" in run.health["last_error"]
        server.faults.clear()
        server.wait_for(lambda: run.page()[0] == 200)
        assert run.health["last_error"] is None


def test_metrics() -> None:
    with serving(cycles=0, poll_interval=0.3) as (server, run):
        first = parse_metrics(run.page("/metrics")[1])
        run.wait_until_quiet()
        for sender in (EVE, EVE, BOB):
            server.account.deliver(sender, ["Screener"])
        wait_filed(server, tap(server, BOB))
        tap(server, "c@x.example", "@ToFeed", "@ToJail")
        server.wait_for(lambda: server.account.mails_in("@MailroomError"))
        run.wait_for_cycles(2)
        fail(server, status=500)
        server.wait_for(lambda: run.failures)
        text = run.page("/metrics")[1]
        server.faults.clear()
    samples = parse_metrics(text)
    assert samples.keys() == first.keys(), "some are not there before something happens"
    for name in {each.partition("{")[0] for each in samples}:
        assert re.search(rf"^# HELP {name} [A-Z].*\.\n# TYPE {name} ", text, re.MULTILINE)
    expected = {
        'messages_filed_total{by="tap"}': 2,
        "senders_triaged_total": 1,
        "senders_undone_total": 0,
        "screener_messages": 3,
        "error_messages": 1,
        "eventsource_connected": 1,
        f'build_info{{version="{mailroom.VERSION}"}}': 1,
    }
    assert {name: samples[f"mailroom_{name}"] for name in expected} == expected
    assert samples["mailroom_consecutive_failures"] >= 1
    assert samples["mailroom_last_success_timestamp_seconds"] > 1.7e9
