"""Push on a real Cyrus, 3.12: `python mailroom.py` as a process with contacts over CardDAV, seen
from outside alone. The poll timer is far away, so that whatever gets done was told by the server.

Without Cyrus or mmdebstrap these tests fail, and say what to install."""

import itertools
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from cyrus_server import CyrusServer
from fault_proxy import FaultProxy
from jmap_server import Fault, Request
from ports import free_port
from processes import DEADLINE, Program, program, wait_for
from tools import COUNTS

pytestmark = pytest.mark.cyrus

# Each label with where it leads to.
FILED = {
    "@ToFeed": {"Feed"},
    "@ToJail": {"Jail"},
    "@ToPerson": {"Person", "Imbox"},
    "@ToBillboard": {"Billboard", "Paper Trail"},
}
IN_FEED, IN_JAIL = {"Feed", "Mailroom"}, {"Jail", "Mailroom"}
FAR = 600
BOB, EVE = "bob@shop.example", "eve@other.example"
TAP_SECONDS = 10.0
MILLISECONDS = "ms from a tap to filed over push, at most"
ARRIVAL = "ms from an arrival to filed over push, at most"


class Account:
    """A new user on Cyrus, and the phone's way to the account. Messages go by their subjects."""

    def __init__(self, server: CyrusServer, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.user = server.add_user(f"alice{uuid.uuid4().hex}")
        self.subjects: set[str] = set()
        self.settings: dict[str, object] = {
            "jmap_url": server.origin,
            "jmap_token": self.user.token,
            "carddav_url": server.origin,
            "carddav_username": self.user.username,
            "carddav_password": self.user.password,
            "health_port": free_port(),
            "poll_interval": FAR,
            "debounce_seconds": 0.2,
            "log_format": "json",
        }
        self.command("setup", "--apply")

    def command(self, *arguments: str) -> None:
        """A command that ends, and ends well."""
        output = self.directory / arguments[0]
        with program(output, *arguments, **self.settings) as ended:
            assert ended.process.wait(DEADLINE) == 0, output.read_text()

    def deliver(self, sender: str, *subjects: str, mailbox: str = "Screener") -> None:
        for subject in subjects:
            self.user.deliver(sender, mailbox, subject)
            self.subjects.add(subject)

    def check(self) -> None:
        """No message is gone that was delivered, or is nowhere."""
        assert set(self.where()) == self.subjects, "messages were lost"
        assert all(self.where().values())

    def where(self) -> dict[str, set[str]]:
        return self.user.mails()

    def labelled(self) -> set[str]:
        """The messages under any triage label."""
        return {
            subject
            for subject, boxes in self.where().items()
            if any(box.startswith("@To") for box in boxes)
        }

    def file(self, labels: Mapping[str, str], seconds: float = DEADLINE) -> float:
        """Tap messages and wait until no label is left; how many seconds that took."""
        self.user.patch({subject: {label: True} for subject, label in labels.items()})
        begun = time.monotonic()
        wait_for(lambda: not self.labelled(), self.where, seconds)
        return time.monotonic() - begun


@pytest.fixture(scope="module")
def server() -> Iterator[CyrusServer]:
    with CyrusServer(version="3.12") as server:
        yield server


@pytest.fixture
def account(server: CyrusServer, tmp_path: Path) -> Iterator[Account]:
    account = Account(server, tmp_path)
    yield account
    account.check()


@contextmanager
def running(account: Account, disturbed: bool = False) -> Iterator[Program]:
    """The program at work and told of changes by the stream; at the end it is stopped, and its log
    has nothing to say but what it should."""
    with program(account.directory / "log", **account.settings) as started:
        wait_for(started.is_pushed, started.output.read_text)
        yield started
        assert started.stop() == 0, started.output.read_text()
    assert disturbed or started.logged("", "error") == []
    assert account.user.token not in started.output.read_text()


def test_taps_are_filed_over_push(account: Account) -> None:
    """Each sender in turn, in seconds; the poll timer had no part in it."""
    with running(account) as started:
        for n, (label, boxes) in enumerate(FILED.items()):
            sender = f"bob{n}@shop.example"
            account.deliver(f"Bob <{sender}>", *(f"{n} {part}" for part in "abc"))
            account.deliver(f"Bob <{sender}>", f"{n} read", mailbox="INBOX")
            seconds = account.file({f"{n} a": label})
            assert seconds < TAP_SECONDS
            COUNTS[MILLISECONDS] = max(COUNTS[MILLISECONDS], int(seconds * 1000))
            assert account.user.contacts()[sender] == {*boxes, "Mailroom"}
            filed = {f"{n} {part}": boxes for part in "abc"} | {f"{n} read": {"Inbox"}}
            assert filed.items() <= account.where().items()
        wait_for(lambda: started.health["last_poll_trigger"] == "push")


def test_known_senders_are_filed_over_push_without_a_tap(account: Account) -> None:
    """And with the screener, what arrives in the Inbox; strangers' go to the Screener."""
    account.settings["screen_inbox"] = True
    with running(account):
        account.deliver(f"Bob <{BOB}>", "tapped")
        account.file({"tapped": "@ToFeed"})
        arrivals = [(BOB, "known", "Screener", "Feed"), (BOB, "at once", "INBOX", "Feed")]
        arrivals += [(EVE, "screened", "INBOX", "Screener")]
        for sender, subject, mailbox, there in arrivals:
            account.deliver(f"Somebody <{sender}>", subject, mailbox=mailbox)
            begun = time.monotonic()
            wait_for(lambda: account.where()[subject] == {there}, account.where)  # noqa: B023
            seconds = time.monotonic() - begun
            assert seconds < TAP_SECONDS
            COUNTS[ARRIVAL] = max(COUNTS[ARRIVAL], int(seconds * 1000))


def test_sixty_senders_tapped_at_once_leave_no_message_behind(account: Account) -> None:
    """A mailbox counts against the limit of Cyrus' filters once it has held a message. Half of them
    lie where nothing but a search finds them."""
    for box in account.user.mailbox_ids().keys() - {"Inbox"}:
        account.user.deliver(f"Eve <{EVE}>", box, f"once in {box}")
    ids = [*account.user.mail_ids().values()]
    account.user.jmap([["Email/set", {"destroy": ids}, "0"]])
    labels = list(FILED)
    senders = {f"bob{n}@shop{n}.example": labels[n % len(labels)] for n in range(60)}
    for sender in senders:
        account.deliver(f"Bob <{sender}>", f"{sender} 1")
        account.deliver(f"Bob <{sender}>", f"{sender} 2", mailbox="Truck")
    account.user.wait_until_indexed("bob59@shop59.example", 2)
    with running(account):
        seconds = account.file({f"{sender} 1": label for sender, label in senders.items()}, 90)
    COUNTS["ms for 60 senders over push"] = int(seconds * 1000)
    assert account.where() == {
        f"{sender} {n}": FILED[label] for sender, label in senders.items() for n in (1, 2)
    }
    expected = {sender: {*FILED[label], "Mailroom"} for sender, label in senders.items()}
    assert account.user.contacts() == expected


def test_a_message_that_arrives_while_its_sender_is_triaged_is_filed(account: Account) -> None:
    """It comes just before the first request of a cycle, then in another the second ... but not
    before the one that takes the label off: what comes then came after the tap was carried out. The
    proxy that knows the moment passes no stream on, so here the timer has to do."""

    def meet(_: int, request: Request) -> Fault | None:
        if "/eventsource/" in request.target:
            return Fault(status=204)
        seen.append(request)
        if len(seen) == moment and not finish.search(request.body):
            account.deliver(sender, late)
        return None

    finish = re.compile(rf'mailboxIds/{account.user.mailbox_ids()["@ToFeed"]}": ?null'.encode())
    seen: list[Request] = []
    with FaultProxy(account.server.http_port) as proxy:
        via = {"jmap_url": proxy.origin, "carddav_url": proxy.origin, "poll_interval": 1}
        with program(account.directory / "log", **account.settings | via):
            for moment in itertools.count(1):
                sender, late = f"Bob <bob{moment}@shop.example>", f"{moment} late"
                proxy.on_request = meet
                account.deliver(sender, f"{moment} tapped")
                seen.clear()
                account.file({f"{moment} tapped": "@ToFeed"})
                if late not in account.subjects:
                    break
            everything = dict.fromkeys(account.subjects, FILED["@ToFeed"])
            wait_for(lambda: account.where() == everything, account.where)
    COUNTS["messages that arrived in mid-triage"] = moment - 1
    assert moment > 5


def test_a_stream_that_the_server_ends_is_opened_again(tmp_path: Path) -> None:
    """It does so after 300 seconds, of which this one makes two."""
    with CyrusServer(version="3.12", more="httptimeout: 2s\n") as server:
        account = Account(server, tmp_path)
        with running(account) as started:
            wait_for(lambda: started.is_pushed(2))
            account.deliver(f"Bob <{BOB}>", "tapped", "other")
            account.file({"tapped": "@ToFeed"}, TAP_SECONDS)
            wait_for(lambda: started.health["last_poll_trigger"] == "push")
        assert account.where() == {"tapped": {"Feed"}, "other": {"Feed"}}
        account.check()


def test_after_a_restart_of_the_server_taps_are_filed_over_push(account: Account) -> None:
    account.deliver(f"Bob <{BOB}>", "of bob")
    account.deliver(f"Eve <{EVE}>", "of eve")
    with running(account, disturbed=True) as started:
        account.file({"of bob": "@ToFeed"})
        account.server.stop()
        wait_for(lambda: not started.is_pushed())
        account.server.start()
        wait_for(lambda: started.is_pushed(1))
        account.file({"of eve": "@ToJail"}, TAP_SECONDS)
        wait_for(lambda: started.health["last_poll_trigger"] == "push")
    assert account.where() == {"of bob": {"Feed"}, "of eve": {"Jail"}}
    assert account.user.contacts() == {BOB: IN_FEED, EVE: IN_JAIL}


def test_killed_at_ten_moments_and_started_again_it_gets_there(account: Account) -> None:
    """The moments are spread over the time that an undisturbed run takes."""
    senders: list[str] = []

    def lives(seconds: float) -> float:
        """Six senders are tapped, if none are left, and a program begins and is killed after these
        seconds, or when all is filed; how long it lived."""
        if not account.labelled():
            new = [f"bob{len(senders) + n}@shop.example" for n in range(6)]
            for sender in new:
                account.deliver(f"Bob <{sender}>", f"{sender} 1", f"{sender} 2")
            account.user.patch({f"{sender} 1": {"@ToFeed": True} for sender in new})
            senders.extend(new)
        with program(account.directory / "killed", **account.settings) as victim:
            wait_for(victim.output.read_text)
            begun = time.monotonic()
            while account.labelled() if seconds == FAR else time.monotonic() - begun < seconds:
                time.sleep(0.005)
            return time.monotonic() - begun

    undisturbed = lives(FAR)
    for turn in range(1, 11):
        lives(undisturbed * turn / 11)
        COUNTS["processes killed beside Cyrus 3.12"] += 1
    with running(account):
        wait_for(lambda: not account.labelled(), account.where)
    assert account.where() == dict.fromkeys(account.subjects, FILED["@ToFeed"])
    assert account.user.contacts() == dict.fromkeys(senders, IN_FEED)


def test_undo_and_reset_take_it_all_back(account: Account) -> None:
    account.deliver(f"Bob <{BOB}>", "tapped", "other")
    account.deliver(f"Eve <{EVE}>", "of eve")
    before = {subject: {"Screener"} for subject in account.subjects}
    with running(account):
        account.file({"tapped": "@ToFeed", "of eve": "@ToJail"})
        assert account.where() == {"tapped": {"Feed"}, "other": {"Feed"}, "of eve": {"Jail"}}
        account.file({"other": "@ToScreener"})
        assert account.where() == before | {"of eve": {"Jail"}}
        assert account.user.contacts().keys() == {EVE}
        account.file({"tapped": "@ToPerson"})
    account.command("reset", "--apply", "--yes")
    assert account.where() == before
    assert account.user.vcards() == []
