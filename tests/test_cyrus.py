"""The main job on a real Cyrus: `python mailroom.py` as a process, mails and labels as a phone
handles them, contacts over CardDAV. Cyrus has no push here, so the poll timer drives it.

Without Cyrus these tests fail, and say what to install."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import ports
import pytest
import tools
from books import Seen, cyrus_book
from cyrus_server import CyrusServer, CyrusUser
from gevent.pool import Pool
from gevent.server import StreamServer

from mailroom import CREATED_NOTE

pytestmark = pytest.mark.cyrus

CATEGORIES = ("Imbox", "Feed", "Paper Trail", "Jail", "Person", "Billboard", "Truck")
LABELS = ["@To" + name.replace(" ", "") for name in CATEGORIES]
OTHERS = ("Screener", "@MailroomError", "@MailroomWarning", "Mine")
DEADLINE, STEP, STOP_SECONDS = 30.0, 0.05, 5.0
TODAY = date.today().isoformat()
BOB = "bob@shop.example"


def wait_for(condition: Callable[[], object], what: Callable[[], object] = str) -> None:
    """Poll until it holds; `what` is shown when it does not."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"still not after {DEADLINE} s: {what()}"
        time.sleep(STEP)


class Account:
    """A user on Cyrus with all that Mailroom wants there, and the phone's way to it."""

    def __init__(self, server: CyrusServer) -> None:
        self.book = cyrus_book(server)
        self.user = CyrusUser(server, self.book.login[0])
        self.user.http.auth = None
        self.groups = {name: self.book.add_group(name) for name in (*CATEGORIES, "Mailroom")}
        wanted = {name: {"name": name} for name in (*OTHERS, *CATEGORIES, *LABELS)}
        wanted |= {role: {"name": role, "role": role.lower()} for role in ("Trash", "Junk")}
        [[_, answer, _]] = self.user.jmap([["Mailbox/set", {"create": wanted}, "0"]])
        assert answer["created"].keys() == wanted.keys(), answer
        self.boxes = self.user.mailbox_ids()

    def deliver(self, sender: str | None, subject: str, mailbox: str = "Screener") -> str:
        self.user.deliver(sender, mailbox, subject)
        return subject

    def ids(self) -> dict[str, str]:
        """The id of every mail by its subject."""
        found = {"resultOf": "0", "name": "Email/query", "path": "/ids"}
        get = {"#ids": found, "properties": ["subject"]}
        calls = [["Email/query", {}, "0"], ["Email/get", get, "1"]]
        return {mail["subject"]: mail["id"] for mail in self.user.jmap(calls)[1][1]["list"]}

    def patch(self, subject: str, **boxes: bool | None) -> None:
        """Put a mail into mailboxes (True) and take it out of others (None)."""
        patch = {f"mailboxIds/{self.boxes[name]}": there for name, there in boxes.items()}
        update = {self.ids()[subject]: patch}
        [[_, answer, _]] = self.user.jmap([["Email/set", {"update": update}, "0"]])
        assert answer["updated"], answer

    def tap(self, subject: str, *labels: str) -> None:
        self.patch(subject, **dict.fromkeys(labels, True))

    def where(self) -> dict[str, set[str]]:
        return self.user.mails()

    def contacts(self) -> dict[str, tuple[Seen, set[str]]]:
        """Each contact by an address, with the groups it is in."""
        seen = self.book.seen()
        return {
            min(card.emails): (
                card,
                {name for name, group in self.groups.items() if uid in seen[group].members},
            )
            for uid, card in seen.items()
            if card.kind != "group"
        }

    def groups_of(self, address: str) -> set[str]:
        return self.contacts()[address][1]

    def states(self) -> list[str]:
        """What changes with every write to the mails or the cards."""
        calls = [["Email/get", {"ids": []}, "0"], ["Mailbox/get", {"ids": []}, "1"]]
        states = [answer["state"] for _, answer, _ in self.user.jmap(calls)]
        return [*states, json.dumps(sorted(map(repr, self.book.seen().items())))]

    @property
    def settings(self) -> dict[str, object]:
        """As a user would give them: bare origins, and all else by default."""
        return {
            "jmap_url": self.user.server.origin,
            "jmap_token": self.user.token,
            **self.book.settings,
            "health_port": 0,
            "poll_interval": 1,
            "debounce_seconds": 0,
            "log_level": "debug",
            "log_format": "json",
        }


class Program:
    """A running `python mailroom.py` and what it logs."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path) -> None:
        self.process, self.output = process, output

    @property
    def log(self) -> list[dict[str, Any]]:
        """What was logged; each record is a whole line."""
        text = self.output.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def logged(self, pattern: str, level: str = "") -> list[dict[str, Any]]:
        lines = (line for line in self.log if level in ("", line["level"]))
        return [line for line in lines if re.search(pattern, line["event"])]

    def wait_for_cycles(self, more: int) -> None:
        """Wait for so many further cycles to end."""
        goal = len(self.logged("^cycle done$")) + more
        wait_for(lambda: len(self.logged("^cycle done$")) >= goal, self.output.read_text)

    def stop(self) -> int:
        """Ask it to; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def program(output: Path, **settings: object) -> Iterator[Program]:
    """The program as a user starts it; it is killed at the end if it has not ended."""
    variables = {f"MAILROOM_{name.upper()}": str(value) for name, value in settings.items()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAILROOM_")}
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(tools.PROGRAM)], env=kept | variables, stdout=file, stderr=file
        )
    try:
        yield Program(process, output)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[bool], CyrusServer]]:
    """A Cyrus without and one with a search index, each started when it is first asked for."""
    running: dict[bool, CyrusServer] = {}
    with ExitStack() as stack:

        def get(search: bool) -> CyrusServer:
            if search not in running:
                running[search] = stack.enter_context(CyrusServer(search=search))
            return running[search]

        yield get


SEARCH = pytest.mark.parametrize(
    "account", [False, True], ids=["no index", "xapian"], indirect=True
)


@pytest.fixture
def account(
    request: pytest.FixtureRequest, servers: Callable[[bool], CyrusServer]
) -> Iterator[Account]:
    """Without a search index, Cyrus' default, if not told otherwise. At its end no mail may be
    gone that was delivered."""
    account = Account(servers(getattr(request, "param", False)))
    delivered: list[str] = []
    account.user.deliver = noted(account.user.deliver, delivered)  # type: ignore[method-assign]
    yield account
    assert set(account.ids()) == set(delivered), "mails were lost"
    assert all(account.where().values())


def noted(deliver: Callable[..., str], delivered: list[str]) -> Callable[..., str]:
    def note(sender: str | None, mailbox: str = "INBOX", subject: str = "Hello") -> str:
        delivered.append(subject)
        return deliver(sender, mailbox, subject)

    return note


@pytest.fixture
def running(account: Account, tmp_path: Path) -> Iterator[Program]:
    """The program at work on the account; at the end it is stopped as systemd or podman would,
    and the log has nothing to say but what it should."""
    with program(tmp_path / "log", **account.settings) as started:
        yield started
        started.wait_for_cycles(1)
        states = account.states()
        started.wait_for_cycles(1)
        assert account.states() == states, "an idle cycle has written"
        assert started.stop() == 0, started.output.read_text()
    no_push = started.logged("push", "info")
    assert [line["event"] for line in no_push] == [
        "event stream: the server has no push (HTTP 204)"
    ]
    assert started.logged("", "error") == []
    assert account.user.token not in started.output.read_text()


def settle(account: Account, running: Program) -> None:
    """Wait until no triage label is left on any mail, and the cycle that saw to it is over."""
    labels = {*LABELS}
    wait_for(
        lambda: not any(boxes & labels for boxes in account.where().values()),
        running.output.read_text,
    )
    running.wait_for_cycles(1)


@SEARCH
def test_one_tap_triages_a_new_sender(account: Account, running: Program) -> None:
    account.deliver("Bob Smith <Bob@Shop.example>", "tapped")
    account.deliver(f'"Bob, the shop" <{BOB}>', "older one")
    account.deliver(f"=?utf-8?q?B=C3=B6b?= <{BOB}>", "encoded")
    account.deliver(f"Bob <{BOB}>", "read long ago", "INBOX")
    account.deliver(f"Bob <{BOB}>", "in my own folder", "Mine")
    account.deliver(f"Bob <{BOB}>", "in the trash", "Trash")
    account.deliver(f"Bob <{BOB}>", "junk", "Junk")
    account.deliver("Bob <bob@shop.example.org>", "longer address")
    account.deliver(f'"{BOB}" <eve@other.example>', "his address as a name")
    account.deliver(None, "without a sender")
    account.tap("tapped", "@ToFeed")
    settle(account, running)
    assert account.where() == {
        "tapped": {"Feed"},
        "older one": {"Feed"},
        "encoded": {"Feed"},
        "read long ago": {"Inbox"},
        "in my own folder": {"Mine"},
        "in the trash": {"Trash"},
        "junk": {"Junk"},
        "longer address": {"Screener"},
        "his address as a name": {"Screener"},
        "without a sender": {"Screener"},
    }
    note = f"{CREATED_NOTE}\nTriaged to Feed on {TODAY}"
    seen = Seen("Bob Smith", frozenset({BOB}), note, "company")
    assert account.contacts() == {BOB: (seen, {"Feed", "Mailroom"})}
    [line] = running.logged("^sender triaged$")
    assert (line["sender"], line["mails_filed"]) == (BOB, 3)


def test_a_mail_that_arrives_is_triaged_like_the_others(account: Account, running: Program) -> None:
    running.wait_for_cycles(1)
    account.deliver(f"Bob <{BOB}>", "first")
    account.tap("first", "@ToPerson")
    settle(account, running)
    account.deliver(f"Bob <{BOB}>", "second")
    account.tap("second", "@ToPerson")
    settle(account, running)
    assert account.where() == {"first": {"Person", "Imbox"}, "second": {"Person", "Imbox"}}
    [(seen, groups)] = account.contacts().values()
    assert groups == {"Person", "Imbox", "Mailroom"}
    assert seen.note.splitlines() == [CREATED_NOTE, f"Triaged to Person on {TODAY}"]


def test_a_sender_is_triaged_again(account: Account, running: Program) -> None:
    for number in range(3):
        account.deliver(f"Bob <{BOB}>", f"mail {number}")
    account.deliver(f"Bob <{BOB}>", "mine", "Mine")
    for label, boxes in [
        ("@ToBillboard", {"Billboard", "Paper Trail"}),
        ("@ToTruck", {"Truck", "Paper Trail"}),
        ("@ToJail", {"Jail"}),
    ]:
        account.tap("mail 1", label)
        settle(account, running)
        mails = dict.fromkeys([f"mail {number}" for number in range(3)], boxes)
        assert account.where() == {**mails, "mine": {"Mine"}}
        assert account.groups_of(BOB) == {*boxes, "Mailroom"}
    assert len(account.contacts()) == 1


def test_a_conflict_is_shown_and_its_resolution_carried_out(
    account: Account, running: Program
) -> None:
    account.deliver(f"Bob <{BOB}>", "one")
    account.deliver(f"Bob <{BOB}>", "two")
    account.deliver("Eve <eve@other.example>", "of eve")
    account.user.jmap([["Email/set", {"update": conflict(account)}, "0"]])
    in_conflict = {
        "one": {"Screener", "@ToFeed", "@MailroomError"},
        "two": {"Screener", "@ToJail", "@MailroomError"},
        "of eve": {"Feed"},
    }
    wait_for(lambda: account.where() == in_conflict, account.where)
    running.wait_for_cycles(2)
    assert account.where() == in_conflict
    assert account.contacts().keys() == {"eve@other.example"}
    account.patch("two", **{"@ToJail": None, "Screener": True})
    settle(account, running)
    assert account.where() == {"one": {"Feed"}, "two": {"Feed"}, "of eve": {"Feed"}}
    assert account.groups_of(BOB) == {"Feed", "Mailroom"}


def conflict(account: Account) -> dict[str, Any]:
    """Both labels at once, so that no cycle sees only one of them."""
    ids = account.ids()
    labels = {"one": "@ToFeed", "two": "@ToJail", "of eve": "@ToFeed"}
    return {ids[mail]: {f"mailboxIds/{account.boxes[box]}": True} for mail, box in labels.items()}


def test_a_mail_that_was_moved_into_its_label_is_not_lost(
    account: Account, running: Program
) -> None:
    """Plain IMAP apps move a mail into a folder: the label is then its only mailbox."""
    account.deliver(f"Bob <{BOB}>", "moved")
    account.deliver(f"Bob <{BOB}>", "stays")
    account.deliver(None, "no sender, moved")
    account.patch("moved", **{"@ToFeed": True, "Screener": None})
    account.patch("no sender, moved", **{"@ToFeed": True, "Screener": None})
    bad = {"@ToFeed", "@MailroomError"}
    filed = {"moved": {"Feed"}, "stays": {"Feed"}, "no sender, moved": bad}
    wait_for(lambda: account.where() == filed, account.where)
    account.patch("no sender, moved", **{"@ToFeed": None, "Mine": True})
    settle(account, running)
    assert account.where()["no sender, moved"] == {"Mine"}


def test_a_contact_the_user_has_keeps_all_its_lines(account: Account, running: Program) -> None:
    rich = ["item1.EMAIL;type=INTERNET:Bob@Shop.Example", "item1.X-ABLabel:Shop", "TEL:1", "X-A:b"]
    url = account.book.put("bob.vcf", "UID:bob-1", "FN:Bobby", "N:;Bobby;;;", *rich, "NOTE:Mine")
    account.deliver(f"Bob <{BOB}>", "one")
    account.tap("one", "@ToFeed")
    settle(account, running)
    note = f"NOTE:Mine\\nTriaged to Feed on {TODAY}"
    expected = ["UID:bob-1", "FN:Bobby", "N:;Bobby;;;", *rich, note]
    unfolded = account.book.get(url).replace("\r\n ", "").splitlines()
    assert unfolded == ["BEGIN:VCARD", "VERSION:3.0", *expected, "END:VCARD"]
    assert account.where() == {"one": {"Feed", "@MailroomWarning"}}
    assert account.groups_of("Bob@Shop.Example") == {"Feed"}


@SEARCH
def test_many_senders_at_once_and_what_was_tapped_while_it_was_down(
    account: Account, tmp_path: Path
) -> None:
    senders = {f"s{n}@shop{n}.example": CATEGORIES[n % 4] for n in range(12)}
    for address in senders:
        for number in range(3):
            account.deliver(f"Shop <{address}>", f"{address} {number}")
        account.tap(f"{address} 0", "@To" + senders[address].replace(" ", ""))
    with program(tmp_path / "log", **account.settings) as running:
        settle(account, running)
        assert running.stop() == 0
    for address, category in senders.items():
        inbox = {"Inbox"} if category == "Imbox" else set()
        for number in range(3):
            assert account.where()[f"{address} {number}"] == {category} | inbox
        assert account.groups_of(address) == {category, "Mailroom"}


def test_it_survives_a_kill_at_any_time(account: Account, tmp_path: Path) -> None:
    """Killed as soon as the first trace of each step is seen, it still gets there, and makes
    nothing twice."""
    for n in range(4):
        account.deliver(f"Bob <bob{n}@shop.example>", f"mail {n}")
        account.tap(f"mail {n}", "@ToFeed")
    traces: list[Callable[[], object]] = [
        account.contacts,
        lambda: any(groups for _, groups in account.contacts().values()),
        lambda: any("Feed" in boxes for boxes in account.where().values()),
        lambda: any({"Feed"} == boxes for boxes in account.where().values()),
    ]
    for trace in traces:
        with program(tmp_path / "killed", **account.settings):
            wait_for(trace)
    with program(tmp_path / "log", **account.settings) as running:
        settle(account, running)
        assert running.stop() == 0
    assert account.where() == {f"mail {n}": {"Feed"} for n in range(4)}
    contacts = account.contacts()
    assert contacts.keys() == {f"bob{n}@shop.example" for n in range(4)}
    for seen, groups in contacts.values():
        assert groups == {"Feed", "Mailroom"}
        assert seen.note.splitlines() == [CREATED_NOTE, f"Triaged to Feed on {TODAY}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"jmap_token": "wrong"}, ["401", "MAILROOM_JMAP_TOKEN"]),
        ({"screener_mailbox": "Nowhere"}, ["mailbox 'Nowhere'"]),
        ({"provenance_group": "Nobody"}, ["contact group 'Nobody'"]),
        ({"carddav_username": ""}, ["MAILROOM_CARDDAV_USERNAME"]),
    ],
    ids=["token", "mailbox", "group", "no contacts"],
)
def test_what_the_user_has_to_mend_ends_it_with_status_2(
    servers: Callable[[bool], CyrusServer], tmp_path: Path, change: dict[str, str], said: list[str]
) -> None:
    account = Account(servers(False))
    with program(tmp_path / "log", **account.settings | change) as running:
        assert running.process.wait(DEADLINE) == 2
    text = running.output.read_text()
    assert [word for word in said if word not in text] == []
    assert "Traceback" not in text
    assert len(running.logged("", "error")) == 1


@contextmanager
def relay(port: int, to: int) -> Iterator[None]:
    """A way to a server that can be closed without the server's knowing."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket, _: object) -> None:
        with socket.create_connection(("127.0.0.1", to)) as server:
            gevent.joinall([gevent.spawn(copy, client, server), gevent.spawn(copy, server, client)])

    clients = Pool()
    listener = StreamServer(("127.0.0.1", port), serve, spawn=clients)
    listener.start()
    try:
        yield
    finally:
        listener.stop(timeout=0)


def test_cyrus_may_be_away_at_first_and_later(account: Account, tmp_path: Path) -> None:
    port = ports.free_port()
    settings = account.settings | {"jmap_url": f"http://127.0.0.1:{port}"}
    with program(tmp_path / "log", **settings) as running:
        for turn in (1, 2):
            account.deliver(f"Bob <bob{turn}@shop.example>", f"mail {turn}")
            account.tap(f"mail {turn}", "@ToFeed")
            failed = partial(running.logged, "^cycle failed$", "error")
            wait_for(lambda: len(failed()) == turn, running.output.read_text)  # noqa: B023
            assert "refused" in failed()[-1]["cause"]
            with relay(port, account.user.server.http_port):
                settle(account, running)
            assert len(running.logged("^recovered$")) == turn
        assert running.stop() == 0
    assert account.where() == {"mail 1": {"Feed"}, "mail 2": {"Feed"}}
