"""The rules for mail to come, as `setup` hands them out: the Sieve script is installed over JMAP,
never in place of one of the user's, and the file for Fastmail is one that can be imported."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sieve
from jmap_server import Fault, JMAPServer, Options
from tools import Ran, command, settings_for

import mailroom
from mailroom import SIEVE_MARKER

APPLY = ("setup", "--apply", "--sieve")


@pytest.fixture
def server() -> Iterator[JMAPServer]:
    with JMAPServer.with_mailroom_account(Options.fastmail(sieve=True)) as server:
        yield server


def run(server: JMAPServer, *arguments: str) -> Ran:
    return command(*arguments, jmap_url=server.session_url, jmap_token=server.options.token)


def test_the_script_is_printed_and_nothing_else(server: JMAPServer) -> None:
    writes = len(server.writes)
    ran = run(server, "setup", "--sieve")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(SIEVE_MARKER)
    sieve.check_script(ran.out, server.options.sieve_extensions)
    assert len(server.writes) == writes
    assert server.account.sieve_scripts == {}


def test_the_script_is_installed_once_and_is_the_one_that_is_printed(server: JMAPServer) -> None:
    ran = run(server, *APPLY)
    assert ran.status == 0
    assert "The Sieve script is installed and active." in ran.out
    [(name, text)] = server.account.sieve_scripts.items()
    assert server.account.active_script == name == "mailroom"
    assert text.replace("\r\n", "\n") == run(server, "setup", "--sieve").out
    writes = len(server.writes)
    assert "The Sieve script is there and active." in run(server, *APPLY).out
    assert len(server.writes) == writes


def test_a_script_of_mailrooms_is_written_anew_in_its_place(server: JMAPServer) -> None:
    server.account.add_sieve_script("mailroom", f"{SIEVE_MARKER}\r\nkeep;\r\n", active=False)
    server.account.add_sieve_script("others", "discard;", active=False)
    assert "installed and active" in run(server, *APPLY).out
    assert server.account.active_script == "mailroom"
    assert server.account.sieve_scripts.keys() == {"mailroom", "others"}
    assert "fromContactCardUid" in server.account.sieve_scripts["mailroom"]
    assert server.account.sieve_scripts["others"] == "discard;"


@pytest.mark.parametrize(("name", "active"), [("mine", True), ("mailroom", False)])
def test_a_script_that_mailroom_has_not_made_stays(
    server: JMAPServer, name: str, active: bool
) -> None:
    server.account.add_sieve_script(name, "keep;", active)
    was_active = server.account.active_script
    ran = run(server, *APPLY)
    assert ran.status == 1
    assert f"the Sieve script {name!r} was not made by Mailroom and stays" in ran.out
    assert server.account.sieve_scripts == {name: "keep;"}
    assert server.account.active_script == was_active


def test_a_script_that_comes_at_the_same_moment_stays(server: JMAPServer) -> None:
    def user(_: object, __: object) -> None:
        if not server.account.sieve_scripts:
            server.account.add_sieve_script("mine", "keep;")

    server.faults.append(Fault("SieveScript/set", before_call=user))
    ran = run(server, *APPLY)
    assert ran.status == 1
    assert "stateMismatch" in ran.out
    assert server.account.sieve_scripts == {"mine": "keep;"}
    assert server.account.active_script == "mine"


def test_a_server_without_jmap_sieve_says_what_to_do_instead() -> None:
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        ran = run(server, *APPLY)
    assert ran.status == 1
    assert ran.out.rstrip().endswith(mailroom.NO_SIEVE)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("SieveScript/set", refuse={"*": {"type": "invalidSieve", "description": "line 3"}}),
        Fault("SieveScript/get", errors={"SieveScript/get": {"type": "serverFail"}}),
        Fault("upload", status=507),
        Fault("SieveScript/get", body=b"rubbish"),
    ],
    ids=["invalid", "get", "upload", "rubbish"],
)
def test_what_goes_wrong_is_told_and_made_up_for(server: JMAPServer, fault: Fault) -> None:
    server.faults.append(fault)
    ran = run(server, *APPLY)
    assert (ran.status, ran.err) == (1, "")
    assert server.account.active_script is None
    assert run(server, *APPLY).status == 0
    assert server.account.active_script == "mailroom"


def test_the_file_for_fastmail_has_the_rules_for_the_mailboxes_that_there_are(
    server: JMAPServer, tmp_path: Path
) -> None:
    account, file = server.account, tmp_path / "rules.json"
    account.remove_mailbox("Jail")
    account.add_mailbox("Away")
    account.add_mailbox("Jail", parent="Away")
    ran = run(server, "setup", "--fastmail-rules", str(file))
    assert ran.status == 0
    assert f"{file}: import it at Fastmail" in ran.out
    rules = json.loads(file.read_text())
    settings = settings_for(server)
    paths = {"Jail": "Away/Jail"}
    assert rules == mailroom.fastmail_rules(settings, rules[0]["created"], paths)
