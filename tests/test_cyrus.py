"""The main job on a real Cyrus: `python mailroom.py` as a process, mails and labels as a phone
handles them, contacts over CardDAV. The poll timer drives it; for push see test_cyrus_push.py.

Without Cyrus these tests fail, and say what to install."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import homes
import pytest
from books import Seen, cyrus_book
from cyrus_server import CyrusServer, CyrusUser
from fault_proxy import FaultProxy
from processes import Program, program, wait_for

pytestmark = pytest.mark.cyrus

CATEGORIES = ("Imbox", "Feed", "Paper Trail", "Jail", "Person", "Billboard", "Truck")
LABELS = ["@To" + name.replace(" ", "") for name in CATEGORIES]
OTHERS = ("Screener", "@MailroomError", "@MailroomWarning")
TODAY = date.today().isoformat()
BOB = "bob@shop.example"


class Home:
    """A new user on Cyrus with nothing of Mailroom's, and the phone's way to the account."""

    def __init__(self, server: CyrusServer) -> None:
        self.book = cyrus_book(server)
        self.user = CyrusUser(server, self.book.login[0])
        self.user.http.auth = None
        self.user.create_mailbox("Mine")

    @property
    def settings(self) -> Mapping[str, object]:
        """As a user would give them: bare origins, and all else by default."""
        url, token = self.user.server.origin, self.user.token
        return {"jmap_url": url, "jmap_token": token, **self.book.settings}

    def deliver(self, sender: str | None, subject: str, mailbox: str = "Screener") -> str:
        self.user.deliver(sender, mailbox, subject)
        return subject

    def tap(self, subject: str, *labels: str) -> None:
        self.patch(subject, **dict.fromkeys(labels, True))

    def patch(self, subject: str, **boxes: bool | None) -> None:
        """Put a mail into mailboxes (True) and take it out of others (None)."""
        self.user.patch({subject: boxes})

    def where(self) -> dict[str, set[str]]:
        return self.user.mails()

    def boxes(self) -> dict[str, bool]:
        [[_, answer, _]] = self.user.jmap([["Mailbox/get", {"ids": None}, "0"]])
        return {box["name"]: box["isSubscribed"] for box in answer["list"]}


class Account(Home):
    """With all that Mailroom wants there."""

    def __init__(self, server: CyrusServer) -> None:
        super().__init__(server)
        self.groups = {name: self.book.add_group(name) for name in (*CATEGORIES, "Mailroom")}
        wanted = {name: {"name": name} for name in (*OTHERS, *CATEGORIES, *LABELS)}
        wanted |= {role: {"name": role, "role": role.lower()} for role in ("Trash", "Junk")}
        [[_, answer, _]] = self.user.jmap([["Mailbox/set", {"create": wanted}, "0"]])
        assert answer["created"].keys() == wanted.keys(), answer

    @property
    def settings(self) -> Mapping[str, object]:
        pace = {"health_port": 0, "poll_interval": 1, "debounce_seconds": 0}
        return {**super().settings, **pace, "log_level": "debug", "log_format": "json"}

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


# What a server is like: without and with a search index, and with push too.
KINDS: dict[str, dict[str, Any]] = {
    "no index": {},
    "xapian": {"search": True},
    "3.12": {"version": "3.12"},
}
on_each = pytest.mark.parametrize("account", KINDS, indirect=True)


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], CyrusServer]]:
    """A Cyrus of each kind, started when it is first asked for."""
    running: dict[str, CyrusServer] = {}
    with ExitStack() as stack:

        def get(kind: str) -> CyrusServer:
            if kind not in running:
                running[kind] = stack.enter_context(CyrusServer(**KINDS[kind]))
            return running[kind]

        yield get


@pytest.fixture
def account(
    request: pytest.FixtureRequest, servers: Callable[[str], CyrusServer]
) -> Iterator[Account]:
    """Without a search index, Cyrus' default, if not told otherwise. At its end no mail may be
    gone that was delivered."""
    account = Account(servers(getattr(request, "param", "no index")))
    delivered: list[str] = []
    account.user.deliver = watched(account.user.deliver, delivered)  # type: ignore[method-assign]
    yield account
    assert account.where().keys() == set(delivered), "mails were lost"
    assert all(account.where().values())


def noted(name: str) -> str:
    """The note of a contact that Mailroom has made today."""
    return f'Created by Mailroom on {TODAY} as "{name}"'


def watched(deliver: Callable[..., str], delivered: list[str]) -> Callable[..., str]:
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
    no_push = started.logged("no push", "info")
    assert len(no_push) == (account.user.server.version == "3.6")
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


@on_each
def test_one_tap_triages_a_new_sender(account: Account, running: Program) -> None:
    account.deliver("Bob Smith <Bob@shop.example>", "tapped")
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
    seen = Seen("Bob Smith", frozenset({"Bob@shop.example"}), noted("Bob Smith"), "company")
    assert account.contacts() == {"Bob@shop.example": (seen, {"Feed", "Mailroom"})}
    [line] = running.logged("^sender triaged$")
    assert (line["sender"], line["messages_filed"]) == (BOB, 3)


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
    labels = {"one": "@ToFeed", "two": "@ToJail", "of eve": "@ToFeed"}
    account.user.patch({mail: {label: True} for mail, label in labels.items()})
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
    expected = ["UID:bob-1", "FN:Bobby", "N:;Bobby;;;", *rich, "NOTE:Mine"]
    unfolded = account.book.get(url).replace("\r\n ", "").splitlines()
    assert unfolded == ["BEGIN:VCARD", "VERSION:3.0", *expected, "END:VCARD"]
    assert account.where() == {"one": {"Feed", "@MailroomWarning"}}
    assert account.groups_of("Bob@Shop.Example") == {"Feed"}


@on_each
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
        assert seen.note == noted("Bob")


def test_cyrus_may_be_away_at_first_and_later(account: Account, tmp_path: Path) -> None:
    with FaultProxy(account.user.server.http_port) as proxy:
        proxy.pause()
        settings = {**account.settings, "jmap_url": proxy.origin}
        with program(tmp_path / "log", **settings) as running:
            for turn in (1, 2):
                account.deliver(f"Bob <bob{turn}@shop.example>", f"mail {turn}")
                account.tap(f"mail {turn}", "@ToFeed")
                failed = partial(running.logged, "^cycle failed$", "error")
                wait_for(lambda: len(failed()) == turn, running.output.read_text)  # noqa: B023
                assert "refused" in failed()[-1]["cause"]
                proxy.resume()
                settle(account, running)
                assert len(running.logged("^recovered$")) == turn
                proxy.pause()
            assert running.stop() == 0
    assert account.where() == {"mail 1": {"Feed"}, "mail 2": {"Feed"}}


@pytest.mark.parametrize("kind", ["no index", "3.12"])
def test_setup_undo_and_reset(servers: Callable[[str], CyrusServer], kind: str) -> None:
    """From an account without Mailroom to one without it again, compared object by object."""
    homes.story(Home(servers(kind)))
