"""The demo: it shows what it promises, it notices when that is not so, and its account can be
used by hand."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest

TESTS = Path(__file__).resolve().parent
DEMO, MAILROOM = TESTS / "demo.py", TESTS.parent / "mailroom.py"
DEADLINE = 60.0
TAPS = ["@ToFeed", "(none)", "@ToPerson", "@ToJail", "@ToFeed off", "@ToTruck", "@ToImbox"]
SABOTEUR = f"""
import os, sys
sys.path.insert(0, {str(TESTS.parent)!r})
import mailroom
{{change}}
sys.exit(mailroom.main())
"""
# What is done to mailroom, and what the demo has to say of it.
SABOTAGES = {
    "sys.exit(0)": "mailroom has ended with status 0",
    "sys.argv.append('--dry-run')": "for the messages to be filed; missing: Screener -> Feed",
    "os.environ['MAILROOM_TRIAGE_CATEGORIES'] = '[\"Feed\", \"Person\"]'": "Person -> Imbox",
    "os.environ['MAILROOM_PROVENANCE_GROUP'] = 'Nobody'": "has 1 contact in [Feed]",
}


@contextmanager
def running(*command: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program with its output and errors in one pipe; gone at the end in any case."""
    words, pipe = [sys.executable, *map(str, command)], subprocess.PIPE
    named: Any = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.STDOUT}
    timeout = gevent.Timeout(DEADLINE, AssertionError(f"{command} was not done in time"))
    with subprocess.Popen(words, text=True, env={**os.environ, **environment}, **named) as process:
        try:
            with timeout:
                yield process
        finally:
            process.kill()


def run_demo(*arguments: object) -> tuple[int, str]:
    """The exit status and the output of the demo."""
    with running(DEMO, *arguments) as process:
        output, _ = process.communicate()
    return process.returncode, output


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """The output up to the first line that matches."""
    text = ""
    for line in process.stdout or ():
        text += line
        if re.search(pattern, line):
            return text
    raise AssertionError(f"no {pattern!r} in:\n{text}")


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    process.stdin.write(line + "\n")
    process.stdin.flush()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """The exit status and output of the demo as it is, and of the demo with each saboteur in place
    of mailroom; they run side by side, since they mostly wait."""
    home, runs = tmp_path_factory.mktemp("saboteurs"), {"": gevent.spawn(run_demo)}
    for number, change in enumerate(SABOTAGES):
        program = home / f"{number}.py"
        program.write_text(SABOTEUR.format(change=change))
        runs[change] = gevent.spawn(run_demo, "--program", program, "--patience", 6)
    return {change: run.get() for change, run in runs.items()}


def test_the_demo_plays_all_scenes(outcomes: dict[str, tuple[int, str]]) -> None:
    status, output = outcomes[""]
    assert status == 0, output
    assert re.findall(r"^(\d)\. ", output, re.MULTILINE) == list("1234567")
    _, _, summary = output.partition("\ntap ")
    for tap in TAPS:
        assert f"\n{tap}  " in summary
    for told in ("(push)", "(fallback)", "stream disconnected (HTTP 503)", "Checked: all"):
        assert told in output
    assert "\033" not in output
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize("change", SABOTAGES)
def test_the_demo_fails_when_mailroom_does_not_do_its_work(
    outcomes: dict[str, tuple[int, str]], change: str
) -> None:
    status, output = outcomes[change]
    assert status == 1, output
    complaint, _, _ = output.partition("The log of mailroom:")
    assert SABOTAGES[change] in complaint
    assert "Traceback" not in output


def printed_settings(told: str) -> dict[str, str]:
    exports = [line for line in told.splitlines() if line.startswith("export ")]
    return dict(shlex.split(line)[1].split("=", 1) for line in exports)


def test_the_served_account_works_with_the_printed_settings() -> None:
    with running(DEMO, "--serve") as demo:
        settings = printed_settings(read_until(demo, "mailroom.py$"))
        for line, told in (
            ("label nobody @ToFeed", "no sender has nobody"),
            ("label slow-crumb @ToNowhere", "unlabel SENDER LABEL"),
            ("label slow-crumb @ToFeed", r"1 message: Screener \+ @ToFeed"),
        ):
            say(demo, line)
            read_until(demo, told)
        with running(MAILROOM, **settings) as mailroom:
            read_until(demo, "14 messages: Screener -> Feed")
            say(demo, "list slow-crumb")
            assert "14 Feed" in read_until(demo, r"\[Feed, Mailroom\]")
            mailroom.terminate()
            assert mailroom.wait() == 0
        demo.terminate()
        assert demo.wait() == 0


def test_a_bare_account_is_set_up_by_setup() -> None:
    with running(DEMO, "--serve", "--bare") as demo:
        settings = printed_settings(read_until(demo, "mailroom.py$"))
        told = read_until(demo, "@ToScreener")
        for command in ("setup", "run --once --dry-run", "reset"):
            assert f"\n  {command} " in told
        say(demo, "label slow-crumb @ToFeed")
        read_until(demo, "there is no @ToFeed yet")
        for arguments, status in (([], 1), (["--apply"], 0), ([], 0)):
            with running(MAILROOM, "setup", *arguments, **settings) as setup:
                output, _ = setup.communicate()
            assert setup.returncode == status, output
            assert ("missing" in output) == (status == 1 or "--apply" in arguments)
        say(demo, "label slow-crumb @ToFeed")
        read_until(demo, r"1 message: Inbox \+ @ToFeed")


@pytest.mark.parametrize(
    ("arguments", "line", "status"), [((), r"^1\. ", 130), (["--serve"], "@ToScreener", 0)]
)
def test_interrupted_it_is_quiet_and_leaves_nothing(
    arguments: Sequence[str], line: str, status: int
) -> None:
    with running(DEMO, *arguments) as demo:
        read_until(demo, line)
        demo.send_signal(signal.SIGINT)
        assert demo.stdout
        assert "Traceback" not in demo.stdout.read()
        assert demo.wait() == status


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    with running(DEMO) as demo:
        read_until(demo, r"^1\. ")
        assert demo.stdout
        demo.stdout.close()
        assert demo.wait() == 141
