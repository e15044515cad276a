"""The demo shows what it promises, or notices; and its account can be used by hand."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import gevent
import pytest
from processes import talking
from tools import PROGRAM

DEMO = Path(__file__).with_name("demo.py")
TAPS = ["@ToFeed", "(none)", "@ToPerson", "@ToJail", "@ToFeed off", "@ToTruck", "@ToImbox"]
SABOTEUR = f"""import os, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import mailroom
{{change}}
sys.exit(mailroom.main())"""
# What is done to mailroom, and what the demo has to say of it.
SABOTAGES = {
    "sys.exit(0)": "mailroom has ended with status 0",
    "sys.argv.append('--dry-run')": "for the messages to be filed; missing: Screener -> Feed",
    "os.environ['MAILROOM_TRIAGE_CATEGORIES'] = '[\"Feed\", \"Person\"]'": "Person -> Imbox",
    "os.environ['MAILROOM_PROVENANCE_GROUP'] = 'Nobody'": "has 1 contact in [Feed]",
}
Outcomes = dict[str, tuple[int, str]]


def run_demo(*arguments: object) -> tuple[int, str]:
    """The exit status and the output of the demo."""
    with talking(DEMO, *arguments) as process:
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


def ask(process: subprocess.Popen[str], line: str, pattern: str) -> str:
    """The output after a line was typed, up to the first line that matches."""
    assert process.stdin
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return read_until(process, pattern)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of the demo as it is, and with each saboteur in place of mailroom; they mostly wait."""
    home, runs = tmp_path_factory.mktemp("saboteurs"), {"": gevent.spawn(run_demo)}
    for number, change in enumerate(SABOTAGES):
        program = home / f"{number}.py"
        program.write_text(SABOTEUR.format(change=change))
        runs[change] = gevent.spawn(run_demo, "--program", program, "--patience", 6)
    return {change: run.get() for change, run in runs.items()}


def test_the_demo_plays_all_scenes(outcomes: Outcomes) -> None:
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
def test_the_demo_fails_when_mailroom_does_not_do_its_work(outcomes: Outcomes, change: str) -> None:
    status, output = outcomes[change]
    assert status == 1, output
    complaint, _, _ = output.partition("The log of mailroom:")
    assert SABOTAGES[change] in complaint
    assert "Traceback" not in output


def printed_settings(told: str) -> dict[str, str]:
    exports = [line for line in told.splitlines() if line.startswith("export ")]
    return dict(shlex.split(line)[1].split("=", 1) for line in exports)


def test_the_served_account_works_with_the_printed_settings() -> None:
    with talking(DEMO, "--serve") as demo:
        settings = printed_settings(read_until(demo, "mailroom.py$"))
        for line, told in (
            ("label nobody @ToFeed", "no sender has nobody"),
            ("label slow-crumb @ToNowhere", "unlabel SENDER LABEL"),
            ("label slow-crumb @ToFeed", r"1 message: Screener \+ @ToFeed"),
        ):
            ask(demo, line, told)
        with talking(PROGRAM, **settings) as mailroom:
            read_until(demo, "14 messages: Screener -> Feed")
            assert "14 Feed" in ask(demo, "list slow-crumb", r"\[Feed, Mailroom\]")
            mailroom.terminate()
            assert mailroom.wait() == 0
        demo.terminate()
        assert demo.wait() == 0


def test_a_bare_account_is_set_up_by_setup() -> None:
    with talking(DEMO, "--serve", "--bare") as demo:
        settings = printed_settings(read_until(demo, "mailroom.py$"))
        told = read_until(demo, "@ToScreener")
        for command in ("setup", "run --once --dry-run", "reset"):
            assert f"\n  {command} " in told
        ask(demo, "label slow-crumb @ToFeed", "there is no @ToFeed yet")
        for arguments, status in (([], 1), (["--apply"], 0), ([], 0)):
            with talking(PROGRAM, "setup", *arguments, **settings) as setup:
                output, _ = setup.communicate()
            assert setup.returncode == status, output
            assert ("missing" in output) == (status == 1 or "--apply" in arguments)
        ask(demo, "label slow-crumb @ToFeed", r"1 message: Inbox \+ @ToFeed")


@pytest.mark.parametrize(
    ("arguments", "line", "status"),
    [((), r"^1\. ", 130), (["--serve"], "@ToScreener", 0), ((), r"^1\. ", 141)],
)
def test_it_ends_quietly_when_interrupted_or_when_its_reader_has_seen_enough(
    arguments: Sequence[str], line: str, status: int
) -> None:
    with talking(DEMO, *arguments) as demo:
        read_until(demo, line)
        assert demo.stdout
        if status == 141:
            demo.stdout.close()
        else:
            demo.send_signal(signal.SIGINT)
            assert "Traceback" not in demo.stdout.read()
        assert demo.wait() == status
