"""The test on a real account (live.py) works, cleans up whatever happens, and tells no secret."""

import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from books import cyrus_book
from cyrus_server import CyrusServer, CyrusUser
from jmap_server import Account, JMAPServer
from processes import talking
from tools import PROGRAM, SERVERS, access_to, variables_of

LIVE = Path(__file__).with_name("live.py")
FAST: dict[str, Any] = {"debounce_seconds": 0.1, "poll_interval": 5}
WELL = "result     all as it should be\nleft       nothing\n"
# Mailroom, but for serving: then it dies.
DEAD = f"""import runpy, sys
len(sys.argv) > 1 or sys.exit(7)
runpy.run_path({str(PROGRAM)!r}, run_name="__main__")"""


def run(on: Any, *arguments: object, until: str = "-") -> tuple[int, str]:
    """The status and the output of live.py, which is interrupted at a line `until`."""
    settings = access_to(on) if isinstance(on, JMAPServer) else on
    command, output = (LIVE, "--patience", 30, "--listen", 0, *arguments), ""
    with talking(*command, **variables_of(FAST | settings)) as process:
        for line in process.stdout or ():
            output += line
            if line.startswith(until):
                process.send_signal(signal.SIGINT)
        process.wait()
    for secret in ("Traceback", settings["jmap_token"], "alice"):
        assert secret not in output, output
    return process.returncode, output


def state(account: Account) -> tuple[Any, ...]:
    """All that the account has."""
    mails = {key: account.mailboxes_of(key) for key in account.mails}
    return {box.name for box in account.mailboxes.values()}, mails, dict(account.cards)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[JMAPServer]:
    """In use, with a contact of Mailroom's that is in no group; at the end it is as before."""
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, "mailto:eve@x.example?mailroom=0"))
    notes = {"n1": {"note": 'Created by Mailroom on 2026-11-01 as "Eve"'}}
    with JMAPServer.with_mailroom_account(SERVERS[request.param]()) as server:
        server.account.deliver("Bob <bob@shop.example>", ["Screener"])
        server.account.add_contact("eve@x.example", "Eve", "org", uid=uid, notes=notes)
        before = state(server.account)
        yield server
        assert state(server.account) == before
        assert server.crashes == []


STOPS = [("fastmail", until) for until in ("making", "re-triage", "taking")]


@pytest.mark.parametrize(
    ("server", "until"), [*((style, "-") for style in SERVERS), *STOPS], indirect=["server"]
)
def test_it_works_or_is_stopped_and_cleans_up(server: JMAPServer, until: str) -> None:
    status, output = run(server, "--yes", until=until)
    assert status == (0 if until in "-taking" else 130), output
    assert (WELL in output) == (status == 0)
    is_told = re.search(r"^tap +\d\.\d s; [5-7] requests; cycles: push", output, re.M)
    assert status or is_told, output
    assert ("uid as sent, members the same" in output) == (until != "making"), output


@pytest.mark.parametrize("server", ["cyrus"], indirect=True)
def test_it_cleans_up_after_a_mailroom_that_dies_and_asks_first(
    server: JMAPServer, tmp_path: Path
) -> None:
    (tmp_path / "dead.py").write_text(DEAD)
    status, output = run(server, "--yes", "--program", tmp_path / "dead.py")
    assert (status, "mailroom has ended with status 7" in output) == (1, True), output
    assert run(server)[0] == 2
    server.account.add_mailbox("Mailroom test Feed")
    before = state(server.account)
    status, output = run(server, "--yes")
    assert (status, '"Mailroom test Feed"' in output) == (2, True), output
    assert state(server.account) == before
    assert run(server, "--clean")[0] == 0


@pytest.mark.cyrus
@pytest.mark.parametrize("until", ["-", "re-triage"])
def test_it_works_and_cleans_up_on_cyrus(until: str) -> None:
    with CyrusServer(version="3.12") as cyrus:
        book = cyrus_book(cyrus)
        user = CyrusUser(cyrus, book.login[0])
        user.deliver("Bob <bob@shop.example>", "INBOX", "Hello")
        before = user.mails(), user.mailbox_ids().keys(), book.texts()
        given = {"jmap_url": cyrus.origin, "jmap_token": user.token, **book.settings}
        status, output = run(given, "--yes", until=until)
        assert (status, WELL in output) == ((0, True) if until == "-" else (130, False)), output
        assert (user.mails(), user.mailbox_ids().keys(), book.texts()) == before
