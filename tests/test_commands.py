"""How the commands talk: help, tables, colour and progress for who watches, one line for an error,
and a quiet end when the output or the patience runs out. Real processes, pipes and terminals."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import gevent
import gevent.event
import gevent.os
import homes
import pytest
from homes import EmbeddedHome, embedded_home, once, run
from jmap_server import FOREVER, Fault, JMAPServer
from radicale_server import RadicaleServer
from tools import PROGRAM, command, process, variables_of

import mailroom

SECONDS = 20.0
COMMANDS = ("run", "setup", "reset")
GREEN, YELLOW = "\x1b[32m", "\x1b[33m"


@pytest.fixture
def home() -> Iterator[EmbeddedHome]:
    with embedded_home("fastmail", RadicaleServer) as home:
        yield home


def environment(settings: Mapping[str, object], **more: str) -> dict[str, str]:
    gone = ("MAILROOM_", "NO_COLOR", "COLUMNS", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(gone)}
    return kept | variables_of({"health_port": 0, **settings}) | more


class Program:
    """`python mailroom.py ARGUMENTS` on a terminal of its own, or with its output in pipes."""

    def __init__(self, home: EmbeddedHome, *arguments: str, **more: str) -> None:
        self.started: subprocess.Popen[bytes]
        self.arguments = [sys.executable, str(PROGRAM), *arguments]
        self.environment = environment(home.settings, **more)
        self.shown = ""

    @contextmanager
    def on_terminal(self) -> Iterator["Program"]:
        """It can be read and typed to; it is killed at the end."""
        self.terminal, child = pty.openpty()
        try:
            # Its session's terminal, or Ctrl-C would not reach it.
            self.started = subprocess.Popen(
                ["setsid", "--ctty", *self.arguments],
                stdin=child,
                stdout=child,
                stderr=child,
                env=self.environment,
            )
            os.close(child)
            yield self
        finally:
            self.started.kill()
            self.started.wait()
            os.close(self.terminal)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def interrupt(self, how: Callable[[], object]) -> int:
        """As people do, again if it goes on: Python misses a signal between its last look and the
        system call that then blocks. The status."""
        for _ in range(5):
            how()
            with suppress(subprocess.TimeoutExpired):
                return self.started.wait(SECONDS / 5)
        raise AssertionError("it goes on")

    def read(self, goal: str = "") -> str:
        """What is shown until it has the goal, or to the end."""
        with gevent.Timeout(SECONDS, AssertionError(f"it shows {self.shown!r}")):
            while not goal or goal not in self.shown:
                try:
                    text = gevent.os.tp_read(self.terminal, 65536).decode()
                except OSError:  # the other end is closed
                    text = ""
                if not text:
                    assert not goal, f"it ended and shows {self.shown!r}"
                    break
                self.shown += text.replace("\r\n", "\n")
        return self.shown

    def status(self) -> int:
        return self.started.wait(SECONDS)

    @contextmanager
    def in_pipes(self, output: int = subprocess.PIPE) -> Iterator["Program"]:
        """Without a terminal; its output may go to a file descriptor. It is killed at the end."""
        self.started = subprocess.Popen(
            self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            env=self.environment,
        )
        try:
            yield self
        finally:
            self.started.kill()
            self.started.communicate()

    def outputs(self) -> tuple[str, str]:
        """What it says until its end: (output, errors)."""
        out, err = self.started.communicate(timeout=SECONDS)
        return (out or b"").decode(), err.decode()

    def piped(self) -> tuple[int, str, str]:
        """Its whole run without a terminal: (status, output, errors)."""
        with self.in_pipes():
            said = self.outputs()
        return self.started.returncode, *said


# ------------------------------------------------------------------------------- the help


@pytest.fixture
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("eighty_columns")
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_shows_every_command_with_an_example(flag: str) -> None:
    ran = command(flag)
    assert (ran.status, ran.err) == (0, "")
    examples = ran.out.partition("examples:")[2]
    for name in COMMANDS:
        assert re.search(rf"^    {name} +\w", ran.out, re.MULTILINE), name
        assert f"python mailroom.py {name} " in examples, name
    assert max(map(len, ran.out.splitlines())) <= 80
    statuses = re.findall(r"^  (\d+) +\S", ran.out.partition("exit status:")[2], re.MULTILINE)
    assert statuses[:4] == ["0", "1", "2", "3"]


@pytest.mark.usefixtures("eighty_columns")
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help(name: str) -> None:
    ran = command(name, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"usage: mailroom.py {name} ")
    assert max(map(len, ran.out.splitlines())) <= 80
    for flag in re.findall(r"--[\w-]+", mailroom.EPILOG):
        if re.search(rf"mailroom.py {name} .*{flag}", mailroom.EPILOG):
            assert flag in ran.out


def test_the_version_needs_no_settings() -> None:
    assert command("--version") == (0, f"Mailroom {mailroom.VERSION}\n", "")


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("--frob",), ("setup", "--frob"), ("run", "extra")], ids=str
)
def test_what_is_no_command_is_status_2(arguments: tuple[str, ...]) -> None:
    ran = command(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert "usage: mailroom.py" in ran.err
    assert len(ran.err.splitlines()) <= 3


def test_without_a_command_it_runs(home: EmbeddedHome) -> None:
    assert run(home, "setup", "--apply").status == 0
    home.tap(home.deliver("Bob <bob@x.example>", "one"), "@ToFeed")
    assert run(home, "--once").status == 0
    assert home.where() == {"one": {"Feed"}}


# ------------------------------------------------------------------------------- what is shown


def furnish(home: EmbeddedHome, mails: int = 3) -> None:
    """Mails in Feed, of a sender whose contact Mailroom has made, and one that was touched."""
    home.changes["triage_categories"] = ["Feed"]
    assert run(home, "setup", "--apply").status == 0
    for name in ("bob", "eve"):
        for nth in range(mails):
            home.deliver(f"{name} <{name}@x.example>", f"{name} {nth}")
        home.tap(f"{name} 0", "@ToFeed")
    once(home)
    home.book.meddle(mailroom.contact_uid("eve@x.example"))


def fit(text: str) -> bool:
    return max(map(len, text.splitlines())) <= 80


def test_what_is_shown_fits_80_columns(home: EmbeddedHome) -> None:
    assert fit(run(home, "setup").out)
    furnish(home)
    assert fit(run(home, "setup").out)
    assert fit(run(home, "reset").out)
    home.changes["triage_categories"] = ["A category whose name is quite a lot longer " * 2 + "x"]
    for refuse in ({}, {"*": {"type": "forbidden", "description": "by law " * 50}}):
        home.mail.faults = [Fault("Mailbox/set", refuse=refuse)]
        for arguments in (("setup",), ("setup", "--apply")):
            out = run(home, *arguments).out
            assert fit(out)
            told = [line for line in out.splitlines() if line.startswith(("missing", "refused"))]
            assert all(len(re.split("  +", line)) == 4 for line in told), "no room for the last"
            assert all("forbidden by" in line for line in told if line.startswith("refused"))


def test_numbers_and_lists_are_for_people(home: EmbeddedHome) -> None:
    furnish(home, mails=600)
    out = run(home, "reset").out
    rows = [re.split("  +", line) for line in out.splitlines()[:4]]
    assert [row[0] for row in rows] == ["1 contact", "1 contact", "2 groups", "1,200 mails"]
    starts = {line.index(row[1]) for line, row in zip(out.splitlines(), rows, strict=False)}
    assert len(starts) == 1, "the columns are not aligned"


@pytest.mark.parametrize(("no_color", "has_colour"), [(None, True), ("", True), ("1", False)])
def test_colour_on_a_terminal(home: EmbeddedHome, no_color: str | None, has_colour: bool) -> None:
    home.account.add_mailbox("Screener")
    more = {} if no_color is None else {"NO_COLOR": no_color}
    with Program(home, "setup", **more).on_terminal() as program:
        shown = program.read()
        assert program.status() == 0
    lines = shown.splitlines()
    assert any("missing" in line for line in lines)
    for line in lines:
        colours = re.findall("\x1b[^m]*m", line)
        expected = {"there ": [GREEN], "missin": [YELLOW]}.get(re.sub("\x1b[^m]*m", "", line)[:6])
        assert colours == ([*expected, "\x1b[0m"] if expected and has_colour else []), line


def test_no_colour_and_no_control_elsewhere(home: EmbeddedHome) -> None:
    status, out, err = Program(home, "setup").piped()
    assert (status, err) == (0, "")
    assert "missing" in out
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out)


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "in a pipe"])
def test_progress_is_on_one_line_where_someone_watches(home: EmbeddedHome, watched: bool) -> None:
    furnish(home, mails=40)
    home.mail.options.limits["maxObjectsInSet"] = 20
    arguments = ("reset", "--apply", "--yes")
    if watched:
        with Program(home, *arguments).on_terminal() as program:
            out = program.read()
            status = program.status()
        [line] = [line for line in out.split("\n") if line.endswith("80 of 80 mails")]
        steps = line.split("\r\x1b[K")[1:]
    else:
        status, out, err = Program(home, *arguments).piped()
        assert err == ""
        assert "\r" not in out
        assert "\x1b" not in out
        steps = [line for line in out.splitlines() if line.endswith(" of 80 mails")]
    assert steps == [f"{n} of 80 mails" for n in (20, 40, 60, 80)]
    assert status == 0
    assert out.endswith("Mailroom is out of the account.\n")


def test_json_is_json_on_a_terminal_too(home: EmbeddedHome) -> None:
    with Program(home, "setup", "--json").on_terminal() as program:
        shown = program.read()
        assert program.status() == 0
    assert json.loads(shown)["items"]


# ------------------------------------------------------------------------------- the question


@pytest.mark.parametrize(
    ("typed", "status"),
    [("no\n", 0), ("\n", 0), ("RESET\n", 0), ("yes\n", 0), ("\x04", 0), ("\x03", 130)],
    ids=["no", "nothing", "in capitals", "yes", "Ctrl-D", "Ctrl-C"],
)
def test_any_other_answer_changes_nothing(home: EmbeddedHome, typed: str, status: int) -> None:
    furnish(home)
    before, writes = homes.snapshot(home), len(home.mail.writes)
    with Program(home, "reset", "--apply").on_terminal() as program:
        program.read('Type "reset" to go on: ')
        assert program.interrupt(lambda: program.type(typed)) == status
        shown = program.read()
    assert "Traceback" not in shown
    assert (status == 0) == shown.endswith("Nothing has been changed.\n"), shown
    assert (homes.snapshot(home), len(home.mail.writes)) == (before, writes)


def test_the_word_is_what_does_it(home: EmbeddedHome) -> None:
    furnish(home)
    with Program(home, "reset", "--apply").on_terminal() as program:
        plan = program.read('Type "reset" to go on: ')
        assert "6 mails" in plan
        program.type("reset\n")
        assert program.read().endswith("Mailroom is out of the account.\n")
        assert program.status() == 0
    assert set(map(frozenset, home.where().values())) == {frozenset({"Screener"})}


def test_where_no_one_can_be_asked_it_refuses(home: EmbeddedHome) -> None:
    furnish(home)
    before = homes.snapshot(home)
    status, out, err = Program(home, "reset", "--apply").piped()
    assert (status, err) == (2, "mailroom: there is no terminal to confirm it at: give --yes\n")
    assert "6 mails" in out
    assert homes.snapshot(home) == before
    status, out, _ = Program(home, "reset", "--apply", "--yes").piped()
    assert status == 0
    assert "Type" not in out


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_it_needs_none_of_its_streams(home: EmbeddedHome, closed: str) -> None:
    furnish(home)
    program = Program(home, "reset", "--apply")
    program.arguments = ["sh", "-c", f'"$@" {closed}', "sh", *program.arguments]
    status, _, err = program.piped()
    refused = "mailroom: there is no terminal to confirm it at: give --yes\n"
    assert (status, err) == (2, "" if "2>" in closed else refused)


def test_a_letter_that_the_terminal_does_not_know_is_no_fault(home: EmbeddedHome) -> None:
    home.changes["triage_categories"] = ["B\xfcro"]
    status, out, err = Program(home, "setup", PYTHONIOENCODING="ascii").piped()
    assert (status, err) == (0, "")
    assert "  B\\xfcro  " in out


# ------------------------------------------------------------------------------- a quiet end


@pytest.mark.parametrize(
    "arguments",
    [
        ("setup",),
        ("setup", "--json"),
        ("setup", "--sieve"),
        ("reset",),
        ("run", "--once", "--dry-run"),
        ("run", "--dry-run"),
        ("--help",),
    ],
    ids=" ".join,
)
def test_when_no_one_reads_it_ends_quietly(home: EmbeddedHome, arguments: tuple[str, ...]) -> None:
    furnish(home)
    reader, writer = os.pipe()
    os.close(reader)
    with Program(home, *arguments).in_pipes(writer) as program:
        os.close(writer)
        _, err = program.outputs()
    said = [line for line in err.splitlines() if "account ready" not in line]
    assert (program.status(), said) == (141, [])


@pytest.mark.parametrize(
    "arguments", [("setup",), ("setup", "--sieve"), ("run", "--once", "--dry-run")]
)
def test_a_full_disk_is_told(home: EmbeddedHome, arguments: tuple[str, ...]) -> None:
    furnish(home)
    with (
        open("/dev/full", "wb") as full,
        Program(home, *arguments).in_pipes(full.fileno()) as program,
    ):
        _, err = program.outputs()
    said = [line for line in err.splitlines() if "account ready" not in line]
    assert program.status() == 1
    assert said == ["mailroom: the system says: [Errno 28] No space left on device"]


def test_a_sieve_script_is_utf_8_whatever_the_terminal_knows(home: EmbeddedHome) -> None:
    home.changes["screener_mailbox"] = "Für später"
    program = Program(home, "setup", "--sieve", PYTHONIOENCODING="latin-1")
    with program.in_pipes():
        out, _ = program.outputs()
    assert program.status() == 0
    assert 'fileinto "Für später"' in out


def test_when_no_one_reads_on_a_reset_stops_and_the_next_goes_on(home: EmbeddedHome) -> None:
    furnish(home)
    reader, writer = os.pipe()
    home.mail.faults = [Fault("ContactCard/set", after=lambda: os.close(reader))]
    with Program(home, "reset", "--apply", "--yes").in_pipes(writer) as program:
        os.close(writer)
        assert program.outputs() == ("", "")
    assert program.status() == 141
    assert run(home, "reset", "--apply", "--yes").status == 0
    assert set(map(frozenset, home.where().values())) == {frozenset({"Screener"})}


@pytest.mark.parametrize(
    "arguments", [("setup",), ("setup", "--apply"), ("reset", "--apply", "--yes")], ids=" ".join
)
@pytest.mark.parametrize("watched", [True, False], ids=["Ctrl-C", "SIGINT"])
def test_who_is_interrupted_ends_quietly(
    home: EmbeddedHome, arguments: tuple[str, ...], watched: bool
) -> None:
    furnish(home)
    hang = Fault("api", nth=2 if arguments[0] == "reset" else 1, times=FOREVER, hang=True)
    home.mail.faults = [hang]
    program = Program(home, *arguments)
    if watched:
        with program.on_terminal():
            home.mail.wait_for(lambda: hang.fired, SECONDS)
            assert program.interrupt(lambda: program.type("\x03")) == 130
            shown = program.read().replace("^C", "")
    else:
        with program.in_pipes():
            home.mail.wait_for(lambda: hang.fired, SECONDS)
            assert program.interrupt(lambda: program.started.send_signal(signal.SIGINT)) == 130
            shown = "".join(program.outputs())
    assert shown == ""


def test_one_cycle_that_is_interrupted_has_stopped_as_asked(home: EmbeddedHome) -> None:
    furnish(home)
    go_on = gevent.event.Event()
    wait = Fault("api", after=go_on.wait)
    home.mail.faults = [wait]
    with Program(home, "run", "--once", MAILROOM_LOG_FORMAT="json").in_pipes() as program:
        home.mail.wait_for(lambda: wait.fired, SECONDS)
        program.started.send_signal(signal.SIGINT)
        go_on.set()
        out, err = program.outputs()
    assert (program.status(), out) == (0, "")
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert set(events) <= {"account ready", "stopped"}


# How it is started


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ([], "place/mailroom.py"),
        ([], "pl:ace/mailroom.py"),
        (["-I"], "place/mailroom.py"),
        (["-X", "dev"], "place/mailroom.py"),
        (["--"], "place/mailroom.py"),
        (["-m", "pdb", "-c", "continue"], "place/mailroom.py"),
        ([], "place/renamed.py"),
        ([], "place/link.py"),
    ],
)
def test_it_is_the_given_file_that_runs_wherever_it_is_started(
    options: list[str], path: str, tmp_path: Path
) -> None:
    here, file = tmp_path / "here", tmp_path / path
    for directory in (here, file.parent):
        directory.mkdir()
    for decoy in (here / "json.py", here / "mailroom.py", file.with_name("mailroom.py")):
        decoy.write_text("raise SystemExit('the wrong file')")
    text = PROGRAM.read_text().replace('VERSION = "1.0"', 'VERSION = "its own"')
    if "link" in path:
        file.symlink_to("target.py")
    file.resolve().write_text(text)
    command = [sys.executable, *options, str(file), "--version"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60)
    assert "Mailroom its own" in done.stdout, done.stderr


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["plain", "with an option"])
def test_the_script_runs_as_a_module(options: list[str], tmp_path: Path) -> None:
    """As a script it would take 10 MB more. What else Python is told is not lost for it."""
    with (
        JMAPServer.with_mailroom_account() as server,
        process(server, tmp_path / "log", *options, str(PROGRAM), "run") as started,
    ):
        server.wait_for(lambda: server.requests)
        words = Path(f"/proc/{started.pid}/cmdline").read_bytes().decode().split("\0")
    told = [*options, str(PROGRAM)] if options else ["-P", "-m", "mailroom"]
    assert words[1:-1] == [*told, "run"]
