"""How the commands talk: help, what a run would do and does, one line for an error, and a quiet end
when the output or the patience runs out. Real processes, pipes and terminals."""

import io
import json
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import gevent.os
import homes
import pytest
from homes import EmbeddedHome, embedded_home, once, run, snapshot
from jmap_server import FOREVER, JSON, Fault
from ports import free_port
from radicale_server import RadicaleServer
from tools import PROGRAM, command, environment_of, process

import mailroom

COMMANDS = ("run", "setup", "reset")
DRY = ("run", "--once", "--dry-run")
RESET = ("reset", "--apply")


@pytest.fixture
def home() -> Iterator[EmbeddedHome]:
    """An account with three taps in it: a stranger's, an acquaintance's and a change of mind."""
    with embedded_home("fastmail", RadicaleServer) as home:
        home.changes["triage_categories"] = ["Feed", "Jail"]
        assert run(home, "setup", "--apply").status == 0
        for name in ("bob", "eve", "tea"):
            for n in range(2):
                home.deliver(f"{name} <{name}@x.example>", f"{name} {n}")
        homes.add_contact(home, "tea@x.example")
        home.tap("eve 0", "@ToFeed")
        once(home)
        home.tap("bob 0", "@ToFeed")
        home.tap("tea 0", "@ToJail")
        home.tap("eve 0", "@ToJail")
        yield home


def started(home: EmbeddedHome, *arguments: str, **how: Any) -> "subprocess.Popen[bytes]":
    """`python mailroom.py ARGUMENTS`; `how` is subprocess's, its `env` in addition."""
    given = environment_of({"health_port": 0, **home.settings})
    env = {name: text for name, text in given.items() if not name.startswith("PYTHON")}
    env |= how.pop("env", {})
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [*how.pop("before", ()), sys.executable, str(PROGRAM), *arguments]
    return subprocess.Popen(words, env=env, **{**pipes, **how})


def finish(program: "subprocess.Popen[bytes]") -> tuple[int, str, str]:
    """(status, output, errors) of a program that ends by itself."""
    out, err = program.communicate(timeout=20)
    return program.returncode, (out or b"").decode(), (err or b"").decode()


class Terminal:
    """A program on a terminal of its own, which can be read and typed to."""

    def __init__(self, home: EmbeddedHome, *arguments: str) -> None:
        self.shown = ""
        self._end, child = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), child)
        # Its session's terminal, or Ctrl-C would not reach it.
        self.program = started(home, *arguments, before=("setsid", "--ctty"), **streams)
        os.close(child)

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def read(self, goal: str = "") -> str:
        """What is shown until it has the goal, or to the end."""
        with gevent.Timeout(20, AssertionError(f"it shows {self.shown!r}")), suppress(OSError):
            while not goal or goal not in self.shown:
                self.shown += gevent.os.tp_read(self._end, 65536).decode().replace("\r\n", "\n")
        return self.shown

    def status(self) -> int:
        return self.program.wait(20)


# Help #############################################################################################


def test_the_help_shows_every_command_with_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = command("--help")
    assert (ran.status, ran.err, command("-h")) == (0, "", ran)
    examples = ran.out.partition("examples:")[2]
    for name in COMMANDS:
        assert re.search(rf"^    {name} +\w", ran.out, re.MULTILINE)
        assert f"python mailroom.py {name} " in examples
        own = command(name, "--help").out
        for flag in re.findall(rf"mailroom.py {name} .*?(--[\w-]+)", examples):
            assert flag in own
    assert max(map(len, ran.out.splitlines())) <= 80
    statuses = re.findall(r"^  (\d+) +\S", ran.out.partition("exit status:")[2], re.MULTILINE)
    assert statuses == ["0", "1", "2", "3", "130", "141"]
    assert command("--version") == (0, f"Mailroom {mailroom.VERSION}\n", "")
    for wrong in (("nonsense",), ("--frob",), ("setup", "--frob"), ("run", "extra")):
        ran = command(*wrong)
        assert (ran.status, ran.out, "usage: mailroom.py" in ran.err) == (2, "", True)


# What is done, and would be #######################################################################


def test_a_dry_run_writes_nothing_and_tells_what_the_run_then_does(home: EmbeddedHome) -> None:
    home.deliver("=?utf-8?q?=1B=5B2J=0Aevil?= <tea@x.example>", "odd")
    home.tap("odd", "@ToJail")
    home.tap(home.deliver("Both <both@x.example>", "both"), "@ToFeed", "@ToJail")
    before = snapshot(home)
    with homes.fate() as met:
        dry = run(home, *DRY)
        assert met.writes == []
    assert (dry.status, snapshot(home)) == (0, before)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", dry.out)
    lines = dict(re.findall("^sender: (.*?)(; .*)", dry.out, re.MULTILINE))
    ran = run(home, "--once", log_format="json")
    assert (ran.status, ran.out) == (0, "")
    log = [json.loads(line) for line in ran.err.splitlines()]
    facts = {each["sender"]: each for each in log if each["event"] == "sender triaged"}
    assert facts.keys() == {"bob@x.example", "eve@x.example", "tea@x.example"}
    assert lines.keys() == facts.keys()
    for sender, fact in facts.items():
        for key in fact.keys() - {"time", "level", "event", "sender"}:
            assert f"; {key.replace('_', ' ')}: {fact[key]}" in lines[sender]
    assert "evil" in lines["tea@x.example"]
    assert "left: Feed" in lines["eve@x.example"]
    assert run(home, *DRY).out == "There is nothing to do.\n"


def test_a_dry_run_goes_on_and_tells_what_is_news(home: EmbeddedHome, tmp_path: Path) -> None:
    writes, log = len(home.mail.writes), tmp_path / "log"
    more = {"triage_categories": '["Feed", "Jail"]', "log_level": "error"}
    with process(home.mail, log, str(PROGRAM), "run", "--dry-run", **more):
        home.mail.wait_for(lambda: log.read_text().count("\n") == 3, 10)
        home.tap(home.deliver("Ann <ann@x.example>", "ann"), "@ToJail")
        home.mail.wait_for(lambda: "ann@x.example; category: Jail" in log.read_text())
    assert (log.read_text().count("\n"), len(home.mail.writes)) == (4, writes)


def test_what_fails_is_a_line_and_a_status(home: EmbeddedHome) -> None:
    """Another run is advised only where it helps. What the account lacks is in test_triage.py."""
    writes, none, taken = len(home.mail.writes), Fault("other"), socket.create_server(("", 0))
    refuse: JSON = {next(iter(home.mail.account.mails)): {"type": "forbidden"}}
    away, port = f"http://127.0.0.1:{free_port()}", taken.getsockname()[1]
    dav = {"carddav_url": away, "carddav_username": "a", "carddav_password": "pass-word"}
    cases: list[tuple[str, JSON, Fault, int, str]] = [
        ("setup --apply", {"jmap_url": away}, none, 1, "cannot be reached: .*refused"),
        ("setup --apply", dav, none, 1, f"{away}.* cannot be reached"),
        ("setup --apply", {}, Fault("session", status=404), 1, "HTTP 404; check .*_JMAP_URL"),
        ("setup --apply", {}, Fault("session", body=b"<p>"), 1, "malformed.*check .*_JMAP_URL"),
        ("setup --apply", {}, Fault("session", status=401), 2, "HTTP 401.*Manage API tokens"),
        ("setup --apply", {"poll_interval": "soon"}, none, 2, "MAILROOM_POLL_INTERVAL"),
        ("run", {"jmap_token": ""}, none, 2, "MAILROOM_JMAP_TOKEN: not set.*Manage API tokens"),
        ("run", {"jmap_token": "wrong"}, none, 2, "HTTP 401.*Manage API tokens"),
        ("run", {"health_port": port}, none, 2, "MAILROOM_HEALTH_PORT=.*already in use"),
        ("run --once", {"jmap_token": "wrong"}, none, 2, "HTTP 401"),
        ("run --once", {"jmap_url": away}, none, 3, "cannot be reached"),
        ("run --once", {}, Fault(status=503, times=FOREVER), 3, "HTTP 503"),
        ("run --once", {}, Fault("Email/set", refuse=refuse, times=FOREVER), 3, "forbidden"),
    ]
    with taken:
        for words, changes, fault, status, said in cases:
            home.mail.faults = [fault]
            ran = command(*words.split(), **{**home.settings, **changes})
            assert (ran.status, ran.out) == (status, "")
            assert re.search(said, ran.err), ran.err
            if status != 3:  # else it is logged
                assert re.fullmatch("mailroom: .*\n", ran.err)
                assert "Run it again" not in ran.err
                assert len(home.mail.writes) == writes
    home.mail.faults = []
    once(home)
    assert home.mail.count("stream") == 0


def test_a_fault_in_the_program_is_status_1_and_tells_no_secret(
    home: EmbeddedHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyError(home.mail.options.token)

    monkeypatch.setattr("mailroom.Triage.run", die)
    ran = command("run", "--once", **home.settings)
    assert (ran.status, ran.out, "Traceback" in ran.err) == (1, "", True)
    assert home.mail.options.token not in ran.err


# On a terminal ####################################################################################

KEPT = "Nothing has been changed. Next: python mailroom.py reset --apply\n"
ANSWERS = {"yes\n": (0, KEPT), "\x04": (0, KEPT), "\x03": (130, "^C")}
ANSWERS |= {"reset\n": (0, "Mailroom is out of the account.\n")}


@pytest.mark.parametrize("typed", ANSWERS)
def test_a_reset_asks_first(home: EmbeddedHome, typed: str) -> None:
    before = snapshot(home)
    terminal = Terminal(home, *RESET)
    terminal.read('Type "reset" to go on: ')
    terminal.type(typed)
    if typed == "\x03":  # Python does not hear it just before it waits for the line: once more.
        gevent.spawn_later(0.5, terminal.type, typed)
    status, end = ANSWERS[typed]
    assert terminal.read().endswith(end)
    assert terminal.status() == status
    assert (snapshot(home) == before) == (typed != "reset\n")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("arguments", [("setup",), ("--once",), ("reset",)], ids=" ".join)
def test_on_a_terminal_a_wait_is_explained(
    home: EmbeddedHome, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailroom, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr("io.StringIO", Screen)  # as `command` gives it for standard error
    for delay, count in ((0.3, 1), (0, 0)):
        home.mail.faults = [Fault("session", delay=delay)]
        ran = command(*arguments, **home.settings)
        assert (ran.out + ran.err).count("connecting to 127.0.0.1\n") == count


# A quiet end ######################################################################################


@pytest.mark.parametrize("arguments", [("setup",), ("reset",), DRY, ("--help",)], ids=" ".join)
def test_an_output_that_nobody_reads_or_that_is_full(
    home: EmbeddedHome, arguments: tuple[str, ...]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert finish(started(home, *arguments, stdout=writer))[::2] == (141, "")
    os.close(writer)
    with open("/dev/full", "wb") as full:
        status, _, err = finish(started(home, *arguments, stdout=full))
    assert (status, err) == (1, "mailroom: the system says: [Errno 28] No space left on device\n")


def test_when_no_one_reads_on_a_reset_stops_and_the_next_goes_on(home: EmbeddedHome) -> None:
    reader, writer = os.pipe()
    refuse = {"*": {"type": "forbidden"}}  # which is told at the end
    home.mail.faults = [Fault("ContactCard/set", refuse=refuse, after=lambda: os.close(reader))]
    assert finish(started(home, *RESET, "--yes", stdout=writer))[0] == 141
    assert run(home, *RESET, "--yes").status == 0
    assert set(map(frozenset, home.where().values())) == {frozenset({"Screener"})}


@pytest.mark.parametrize("typed", ["\x03", ""])
@pytest.mark.parametrize("arguments", [("setup", "--apply"), (*RESET, "--yes"), ("run", "--once")])
def test_interrupted_it_ends_quietly(home: EmbeddedHome, arguments: Any, typed: str) -> None:
    """Or gets a SIGTERM. A single cycle has then stopped as it was asked to."""
    hang = Fault(times=FOREVER, hang=True)
    home.mail.faults = [hang]
    terminal = Terminal(home, *arguments)
    home.mail.wait_for(lambda: hang.fired, 20)
    terminal.type(typed) if typed else terminal.program.terminate()
    status, end = (0, r"(.*stopped\n)?") if "run" in arguments else (130, "")
    assert terminal.status() == status
    assert re.fullmatch(rf"(\^C)?{end}", terminal.read())


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_it_needs_none_of_its_streams(home: EmbeddedHome, closed: str) -> None:
    """And where no one can be asked it refuses, and changes nothing."""
    before = snapshot(home)
    shell = ("sh", "-c", f'"$@" {closed}', "sh")
    status, out, err = finish(started(home, *RESET, before=shell))
    assert (status, "give --yes" in err, snapshot(home)) == (2, "2>" not in closed, before)
    assert (' the group "Feed"' in out) == (">&-" not in closed.replace("2>&-", ""))


def test_a_letter_that_the_terminal_does_not_know_is_no_fault(home: EmbeddedHome) -> None:
    home.changes["triage_categories"] = ["B\xfcro"]
    status, out, err = finish(started(home, "setup", env={"PYTHONIOENCODING": "ascii"}))
    assert (status, err, ' "B\\xfcro"' in out) == (1, "", True)
