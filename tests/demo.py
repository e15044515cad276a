# ruff: noqa: E402  (everything has to be imported after the monkey patch)
"""Mailroom at work on a made-up account: `nox -s demo`, or `python tests/demo.py`.

An embedded JMAP server holds the account, `python mailroom.py` works it as a process of its own,
and this program taps labels as a phone would and tells what became of them. It tells nothing that
it has not checked, for every message of the account; when something is not so, the status is 1.

With `--serve` the account stays up for a Mailroom started by hand, and taps are typed; with
`--bare` too it has nothing that Mailroom needs, and `setup` makes that.

How it reads: the account - what ought to happen - screen and process - the scenes - `--serve`.
"""

from gevent import monkey

monkey.patch_all()

import argparse
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import gevent
import gevent.socket
import requests
from gevent.queue import Queue

TESTS = Path(__file__).resolve().parent
MAILROOM = TESTS.parent / "mailroom.py"
sys.path.append(str(TESTS / "support"))

from jmap_server import CATEGORIES, Account, JMAPServer, Options, addresses
from ports import free_port

DEBOUNCE, POLL = 0.5, 3
PAUSE = 1.3  # seconds to read a scene, on a terminal
STOP_SECONDS = 5


class DemoError(Exception):
    """What did not happen, or cannot be done; one line."""


# ----------------------------------------------------------------------------------- the account

OWN_FOLDERS = ("Recipes", "Lisbon", "Taxes")
# Who writes, how many messages are where (`+`: in both), and about what.
SENDERS = """
The Slow Crumb <letter@slow-crumb.example>: Screener 14, Recipes 2, Trash 1
    No. {n}: The dough that waited | No. {n}: Why crusts sing | No. {n}: Rye, slowly
Night Train Notes <post@night-train.example>: Screener 11, Lisbon 1
    Sleeper of the month: {month} | Platform {n} | The last dining car
Ferrous Weekly <editor@ferrous-weekly.example>: Screener 22
    Issue {n}: Lifetimes, gently | Issue {n}: Small binaries | Issue {n}: {month} releases
Chess in the Park <moves@chess-park.example>: Screener 9, Archive 1
    Puzzle {n}: White to move | {month} open: results | Puzzle {n}: A quiet queen
Harbour Film Club <club@harbour-film.example>: Feed 13, Trash 2
    {month} programme | Friday: a film from {n} minutes ago | Members' evening
Tidepool Science <news@tidepool.example>: Feed 18
    {n} things about octopuses | The week in water | Ask us anything, {month}
Bargain Owl <deals@bargain-owl.example>: Feed 27, Trash 3, Recipes 1
    Only today: {n} deals | We miss you! | Your cart is lonely | {month} madness ends at midnight
Fernweh Books <shop@fernweh-books.example>: Screener 9, Archive 1
    New on our shelves in {month} | Your receipt {n} | Staff picks for {month}
Velo Depot <service@velo-depot.example>: Screener 7, Inbox 1
    Your bicycle is ready | Invoice {n} | {month}: winter tyres
Northwind Energy <billing@northwind-energy.example>: Paper Trail 12, Taxes 2
    Your bill for {month} | Meter reading due | Invoice {n}
Brightline Telecom <invoice@brightline.example>: Screener 10, Taxes 1
    Invoice {n} for {month} | Your data is used up | New terms from {month}
Ledgerly Bank <no-reply@ledgerly.example>: Screener 15, Archive 3
    Your statement for {month} is ready | Card payment {n} | A new sign-in
ParcelHop <track@parcelhop.example>: Screener 12, Trash 2
    Parcel {n} is on its way | Parcel {n}: two stops away | Parcel {n} is with your neighbour
Mara Lindqvist <mara.lindqvist@post.example>: Screener 6, Lisbon 2, Inbox 1
    Re: Saturday? | Photos from the lake | That book I told you about | Lisbon: the flat | Call me
Tomas Abara <tomas@abara.example>: Screener 4
    Fwd: concert in {month} | Your ladder | Re: Re: dinner
Yuki Tanabe <yuki@tanabe.example>: Imbox+Person 9
    Sunday | Re: the cat | Train times for {month}
Emil Hartmann <opa.emil@post.example>: Imbox+Person 5
    The apples are ripe | Question about the computer | Thank you for the photos
Okafor Dental <front.desk@okafor-dental.example>: Screener 5, Archive 1
    Your appointment in {month} | Please confirm: {month} | Six months already?
Elm Street School <office@elm-street-school.example>: Screener 13, Inbox 2
    Parents' evening in {month} | Lost property | Class trip: form {n}
Talent Bridge <jo@talent-bridge.example>: Screener 9, Junk 1
    A role for you (ref. {n}) | Quick call? | Following up | Still following up
Crypto Comet <vip@crypto-comet.example>: Screener 12, Junk 6
    You have {n} coins waiting!!! | RE: your wallet | FINAL notice {n}
Alice Home <alice@home.example>: Sent 14, Drafts 2
    Re: Saturday? | Re: Your appointment | Packing list for {month}
"""


def new_account(bare: bool) -> Account:
    """The account, with the messages of SENDERS: always the same ones, dated back from now. A bare
    one has nothing of Mailroom's: what would be in its mailboxes is in the Inbox."""
    account, chance = Account.for_mailroom(), random.Random(1)  # noqa: S311  (no secret)
    for folder in (UNDO, *OWN_FOLDERS):
        account.add_mailbox(folder)
    for sender, where, subjects in re.findall(r"^(\S.*>): (.*)\n +(.*)$", SENDERS, re.MULTILINE):
        counts = (place.rsplit(" ", 1) for place in where.split(", "))
        places = [name.split("+") for name, number in counts for _ in range(int(number))]
        chance.shuffle(places)
        ages = sorted(chance.sample(range(60, 300 * 24 * 60), len(places)), reverse=True)
        for n, (age, names) in enumerate(zip(ages, places, strict=True)):
            date = datetime.now(UTC) - timedelta(minutes=age)
            text = subjects.split(" | ")[n % (subjects.count(" | ") + 1)]
            text = text.format(n=ages[0] % 400 + n, month=f"{date:%B}")
            names = ["Inbox"] if bare and {*names} & MANAGED else names
            account.deliver(sender, names, subject=text, received_at=f"{date:%Y-%m-%dT%H:%M:%SZ}")
        if groups := sorted({name for names in places for name in names} & set(CATEGORIES)):
            add_triaged(account, sender, groups)
    if bare:
        for name in {*LABELS, *MANAGED, ERROR, "@MailroomWarning"}:
            account.remove_mailbox(name)
        for card in [*account.cards]:
            account.remove_card(card)
    return account


def add_triaged(account: Account, sender: str, groups: list[str]) -> None:
    """The contact of a sender whom Mailroom has triaged a month ago."""
    [(name, address)] = addresses(sender)
    date = f"{datetime.now(UTC) - timedelta(days=30):%Y-%m-%d}"
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"mailto:{address}?mailroom=0"))
    notes = {"n1": {"note": f'Created by Mailroom on {date} as "{name}"'}}
    kind = "individual" if "Person" in groups else "org"
    contact = account.add_contact(address, name, kind, uid=uid, notes=notes)
    for group in [*groups, "Mailroom"]:
        account.join_group(group, contact)


def address_of(header: str | None) -> str:
    return next((address for _, address in addresses(header)), "")


def mails_from(account: Account, address: str) -> list[str]:
    """The ids of a sender's messages, the newest first."""
    mails = (mail for mail in account.mails.values() if address_of(mail.sender) == address)
    return [mail.id for mail in sorted(mails, key=lambda mail: mail.received_at, reverse=True)]


def mail_to_tap(account: Account, address: str) -> str:
    """The newest message of a sender that waits in the Screener or is filed already."""
    mails = mails_from(account, address)
    return next((key for key in mails if account.mailboxes_of(key) & MANAGED), mails[0])


# ---------------------------------------------------------------------------- what ought to happen

Snapshot = dict[str, frozenset[str]]  # {message id: the names of its mailboxes}
MANAGED = {"Screener", *CATEGORIES}
ERROR, UNDO = "@MailroomError", "@ToScreener"
# Label: the groups and mailboxes that it stands for, and what it says of a sender.
LABELS = {
    "@ToImbox": ({"Imbox"}, "this sender matters: Imbox, and Inbox for what was screened"),
    "@ToFeed": ({"Feed"}, "good to read, in no hurry: all of it is for the Feed"),
    "@ToPaperTrail": ({"Paper Trail"}, "to be kept rather than read: receipts, bills, orders"),
    "@ToJail": ({"Jail"}, "never again: out of sight, whatever they send"),
    "@ToPerson": ({"Person", "Imbox"}, "someone I know; Person is a part of the Imbox: both"),
    "@ToBillboard": ({"Billboard", "Paper Trail"}, "advertising of those whom I buy from"),
    "@ToTruck": ({"Truck", "Paper Trail"}, "parcels; a part of the Paper Trail: both"),
    UNDO: ({"Screener"}, "not decided after all: as if it had never been triaged"),
}


def snapshot(account: Account) -> Snapshot:
    return {mail_id: frozenset(account.mailboxes_of(mail_id)) for mail_id in account.mails}


def filed(places: frozenset[str], label: str) -> frozenset[str]:
    """Where a tapped sender's message belongs, by where it is. The user's own folders, the Archive,
    Trash and the like are not Mailroom's business."""
    labels = {name for name in places if name.startswith("@")}
    if not places & (MANAGED | labels):
        return places
    also = {"Inbox"} if label == "@ToImbox" and "Screener" in places else set()
    return places - MANAGED - labels | LABELS[label][0] | also


def change(old: frozenset[str], new: frozenset[str]) -> str:
    """What happened to a message: where it went, or where it stays and which labels changed."""
    was, now = (listed(name for name in names if name[0] != "@") for names in (old, new))
    signs = [f"+ {name}" for name in sorted(new - old)] + [f"- {x}" for x in sorted(old - new)]
    return f"{was} -> {now}" if was != now else " ".join([was, *signs])


def changes(account: Account, before: Snapshot, after: Snapshot) -> dict[str, list[str]]:
    """{what happened: subjects of the messages that it happened to, the newest first}."""
    found: dict[str, list[str]] = {}
    changed = (account.mails[key] for key in before.keys() & after if before[key] != after[key])
    for mail in sorted(changed, key=lambda mail: mail.received_at, reverse=True):
        found.setdefault(change(before[mail.id], after[mail.id]), []).append(mail.subject)
    return found


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# --------------------------------------------------------------------------- screen and process


class Screen:
    """Plain text on standard output; on a terminal with colours (unless NO_COLOR) and pauses."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self._has_colours = self.is_terminal and not plain

    def line(self, text: str = "", colour: str = "") -> None:
        codes = {"bold": 1, "dim": 2, "green": 32, "yellow": 33}
        paint = self._has_colours and colour
        print(f"\033[{codes[colour]}m{text}\033[0m" if paint else text, flush=True)

    def fact(self, key: str, text: str, colour: str = "") -> None:
        self.line(f"   {key:9} {text}", colour)

    def moves(self, key: str, moved: Mapping[str, list[str]], most: int = 2) -> None:
        """What happened to how many messages, and some of their subjects."""
        for what, subjects in moved.items():
            self.fact(key, f"{count(len(subjects), 'message')}: {what}", "green")
            more = len(subjects) - most
            for subject in subjects[:most] + [f"... and {more} more"] * (more > 0):
                self.fact("", f"   {subject}", "dim")

    def pause(self) -> None:
        if self.is_terminal:
            gevent.sleep(PAUSE)


def settings(server: JMAPServer) -> dict[str, str]:
    """The settings of a Mailroom that works this account; its health is on a free port."""
    return {
        "MAILROOM_JMAP_TOKEN": server.options.token,
        "MAILROOM_JMAP_URL": server.session_url,
        "MAILROOM_DEBOUNCE_SECONDS": f"{DEBOUNCE}",
        "MAILROOM_POLL_INTERVAL": f"{POLL}",
        "MAILROOM_HEALTH_PORT": f"{free_port()}",
        "MAILROOM_LOG_FORMAT": "text",
    }


class Mailroom:
    """`python mailroom.py` as a process with a log file; and what it says of itself. Whatever it
    does not do raises DemoError."""

    def __init__(self, program: Path, log: IO[bytes], environment: Mapping[str, str]) -> None:
        self._url = f"http://127.0.0.1:{environment['MAILROOM_HEALTH_PORT']}"
        self._http = requests.Session()
        self._http.trust_env = False
        kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
        command = [sys.executable, str(program)]
        self.process = subprocess.Popen(
            command, env={**kept, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def check(self) -> None:
        if (status := self.process.poll()) is not None:
            raise DemoError(f"mailroom has ended with status {status}")

    def _get(self, path: str) -> requests.Response:
        try:
            return self._http.get(self._url + path, timeout=5)
        except requests.RequestException:
            raise DemoError(f"mailroom does not answer at {self._url}{path}") from None

    def health(self) -> dict[str, Any]:
        """What /healthz says."""
        return dict(self._get("/healthz").json())

    def cycles(self) -> int:
        """How many cycles there were, from /metrics."""
        text = self._get("/metrics").text
        numbers = re.findall(r"^mailroom_cycles_total\{.*\} (\S+)$", text, re.MULTILINE)
        return int(sum(map(float, numbers)))

    def stop(self) -> None:
        """Asks it to end."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        if self.process.returncode != 0:
            raise DemoError(f"mailroom was asked to stop; status: {self.process.returncode}")


# ------------------------------------------------------------------------------------ the scenes

SCENES = (
    ("A newsletter you like", "letter@slow-crumb.example", "@ToFeed"),
    ("A friend", "mara.lindqvist@post.example", "@ToPerson"),
    ("Enough of a shop that is in your Feed", "deals@bargain-owl.example", "@ToJail"),
)
CONFLICT = ("shop@fernweh-books.example", "@ToPaperTrail", "@ToFeed")
WITHOUT_PUSH = ("track@parcelhop.example", "@ToTruck")
WITH_PUSH_AGAIN = ("front.desk@okafor-dental.example", "@ToImbox")

INTRODUCTION = """
A made-up account: {mails} messages from {senders} senders, {screened} of them in the
Screener, where messages from unknown senders wait. `python mailroom.py` runs
beside this demo, as a process of its own, and speaks JMAP with the account's
server. The demo taps, as you would on your phone, and looks at what becomes of
it; all the rest is Mailroom's work. (It gathers taps for {debounce} seconds here,
usually for 3.)"""
SUMMARY = "{:23} {:15} {:20} {:>8} {:>7}"
CLOSE = """Checked: all {mails} messages are where they belong, none is lost, no label is
left over. Mailroom took {cycles} cycles and {requests} requests, and stopped with status 0
when asked to. From now on the account's own rules file what these senders
write, by contact group.

With your own account: see README.md.
To tap for yourself on this one: nox -s demo -- --serve"""


class Demo:
    """Plays the scenes. What it tells was seen on the server or said by Mailroom."""

    def __init__(self, server: JMAPServer, mailroom: Mailroom, patience: float) -> None:
        self.server, self.account, self.mailroom = server, server.account, mailroom
        self.patience, self.screen = patience, Screen()
        self.summary = [SUMMARY.format("tap", "sender", "now in", "messages", "seconds")]

    def play(self) -> None:
        """All scenes and the summary. Raises DemoError when something did not happen."""
        self._open()
        for number, (title, address, label) in enumerate(SCENES, 1):
            self._scene(f"{number}. {title}")
            self._tap(address, label)
        self._scene("4. Second thoughts about the newsletter")
        self._tap(SCENES[0][1], UNDO)
        self._scene("5. A slip of the thumb: two labels for one sender")
        self._conflict(*CONFLICT)
        self._scene("6. Push goes away, and comes back")
        self._push_goes_away()
        self.screen.pause()
        self._close()

    def _open(self) -> None:
        mails = self.account.mails.values()
        senders = {address_of(mail.sender) for mail in mails} - {self.account.address}
        numbers = {"mails": len(mails), "senders": len(senders), "debounce": DEBOUNCE}
        screened = len(self.account.mails_in("Screener"))
        self.screen.line("Mailroom: one tap of a label triages a whole sender", "bold")
        self.screen.line(INTRODUCTION.format(screened=screened, **numbers))
        self._wait("mailroom to be connected and to have looked", self._is_ready)

    def _close(self) -> None:
        cycles = self.mailroom.cycles()
        self.mailroom.stop()
        if self.server.crashes:
            raise DemoError(f"the embedded server has crashed: {self.server.crashes}")
        for n, row in enumerate(self.summary):
            self.screen.line(row if n else f"\n{row}", "" if n else "bold")
        numbers = {"mails": len(self.account.mails), "requests": self.server.count("api")}
        self.screen.line("\n" + CLOSE.format(cycles=cycles, **numbers))

    def _scene(self, title: str) -> None:
        self.screen.pause()
        self.screen.line(f"\n{title}", "bold")

    def _wait(self, what: str, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + self.patience
        while not condition():
            self.mailroom.check()
            if time.monotonic() > deadline:
                raise DemoError(f"waited {self.patience:g} seconds for {what}")
            gevent.sleep(0.005)

    def _is_ready(self) -> bool:
        with suppress(DemoError):
            health = self.mailroom.health()
            is_connected = health["eventsource"]["status"] == "connected"
            return is_connected and bool(health["last_poll_trigger"])
        return False

    def _is_idle(self) -> bool:
        """Whether Mailroom waits for events, and the timer will not strike before one can come: no
        echo of its own writes or of the connect is being gathered or looked after."""
        health, now = self.mailroom.health(), datetime.now(UTC)
        times = [health["eventsource"][key] for key in ("last_event_at", "connected_since")]
        if None in times:
            return False
        heard, since = ((now - datetime.fromisoformat(each)).total_seconds() for each in times)
        is_quiet = min(heard, since) > DEBOUNCE + 0.2
        return bool(is_quiet and health["last_poll_age_seconds"] < POLL - 1)

    # A tap

    def _tap(self, address: str, label: str, trigger: str = "push") -> None:
        """Puts the label on one message of the sender, who then has to be triaged."""
        if trigger == "push":
            self._wait("mailroom to be idle", self._is_idle)
        mail = self.account.mails[mail_to_tap(self.account, address)]
        [(name, _)] = addresses(mail.sender)
        self.screen.fact("tap", f'{label} on "{mail.subject}" from {name}', "yellow")
        self._triage(address, label, label, lambda: self.account.label(mail.id, label), trigger)

    def _triage(
        self, address: str, label: str, tap: str, act: Callable[[], None], trigger: str = "push"
    ) -> None:
        """After `act` the sender has to be triaged as the label says: waits, checks and tells."""
        self.screen.fact("means", LABELS[label][1])
        before, groups_before = snapshot(self.account), self.account.groups_of(address)
        mails = mails_from(self.account, address)
        after = before | {key: filed(before[key], label) for key in mails}
        seconds, took = self._act(act, after, trigger)
        self.screen.moves(f"{seconds:.2f} s", changes(self.account, before, after))
        self._tell_contact(address, label, groups_before)
        if stay := Counter(listed(before[key]) for key in mails if before[key] == after[key]):
            self.screen.fact("untouched", listed(f"{n} in {place}" for place, n in stay.items()))
        self.screen.fact("took", took)
        moved = [after[key] for key in mails if before[key] != after[key]]
        self._note(tap, address, listed(frozenset().union(*moved)), len(moved), seconds)

    def _act(self, act: Callable[[], None], after: Snapshot, trigger: str) -> tuple[float, str]:
        """Acts, and waits until every message of the account is as it should be `after` that;
        (the seconds from the act to then, what else it took)."""
        cycles, asked, start = self.mailroom.cycles(), self.server.count("api"), time.monotonic()
        act()
        try:
            self._wait("the messages to be filed", lambda: snapshot(self.account) == after)
        except DemoError as error:
            missing = changes(self.account, snapshot(self.account), after)
            raise DemoError(f"{error}; missing: {listed(missing) or 'messages'}") from None
        seconds = time.monotonic() - start
        self._wait("the cycle to end", lambda: self.mailroom.cycles() > cycles)
        by = self.mailroom.health()["last_poll_trigger"]
        if by != trigger or snapshot(self.account) != after:
            raise DemoError(f"triggered by {by} instead of {trigger}, or changed once more")
        ran, asked = self.mailroom.cycles() - cycles, self.server.count("api") - asked
        return seconds, f"{count(ran, 'cycle')} ({by}), {count(asked, 'request')}"

    def _tell_contact(self, address: str, label: str, before: set[str]) -> None:
        """There has to be one contact, in the groups of the label; none after the triage was taken
        back. `before`: the groups it was in."""
        cards, groups = self.account.contacts_of(address), self.account.groups_of(address)
        if label == UNDO:
            if cards:
                raise DemoError(f"{address} still has a contact")
            self.screen.fact("contact", "deleted: Mailroom made it, nobody has touched it")
            return
        kind = "individual" if label == "@ToPerson" else "org"
        if [card["kind"] for card in cards] != [kind] or groups != LABELS[label][0] | {"Mailroom"}:
            raise DemoError(f"{address} has {count(len(cards), 'contact')} in [{listed(groups)}]")
        name, known = cards[0]["name"]["full"], "known" if before else "new"
        who = {"individual": "person", "org": "company"}[kind]
        self.screen.fact("contact", f"{known}: {name} <{address}>, {who}")
        self.screen.fact("groups", (f"{listed(before)} -> " if before else "") + listed(groups))

    def _note(self, tap: str, address: str, to: str, mails: int, seconds: float) -> None:
        [(name, _)] = addresses(self.account.mails[mails_from(self.account, address)[0]].sender)
        self.summary.append(SUMMARY.format(tap, name, to, mails, f"{seconds:.2f}"))

    # The scenes that are more than a tap

    def _conflict(self, address: str, label: str, slip: str) -> None:
        """Two labels for one sender: both messages are marked, and nothing else happens."""
        self._wait("mailroom to be idle", self._is_idle)
        account, (one, other) = self.account, mails_from(self.account, address)[:2]
        for mail_id, name in ((one, label), (other, slip)):
            self.screen.fact("tap", f'{name} on "{account.mails[mail_id].subject}"', "yellow")
        self.screen.fact("means", "which one? Mailroom does not guess: it marks both")
        before = snapshot(account)
        marked = {one: before[one] | {label, ERROR}, other: before[other] | {slip, ERROR}}

        def tap_both() -> None:
            account.label(one, label)
            account.label(other, slip)

        seconds, took = self._act(tap_both, before | marked, "push")
        if account.contacts_of(address):
            raise DemoError(f"{address} got a contact in spite of the conflict")
        self.screen.fact(
            f"{seconds:.2f} s", f"2 messages: + {ERROR}; all else is as it was", "green"
        )
        self.screen.fact("took", took)
        self._note(f"{label}, {slip}", address, f"+ {ERROR}", 2, seconds)
        self._wait("mailroom to be idle", self._is_idle)
        self.screen.fact("tap", f"{slip} off again", "yellow")
        self._triage(address, label, f"{slip} off", lambda: account.unlabel(other, slip))

    def _push_goes_away(self) -> None:
        """Without the event stream the poll timer finds the tap. It begins just after a poll, so
        that there is time for all this before the next one."""
        self._wait("a poll", lambda: self.mailroom.health()["last_poll_age_seconds"] < DEBOUNCE)
        self._tell_health()
        self.screen.fact("server", "drops the stream and answers HTTP 503 from now on", "yellow")
        self.server.options.push = 503
        self.server.streams.drop()
        self._wait("/healthz to tell of the 503", lambda: "(HTTP 503)" in self._stream())
        self._tell_health()
        self.screen.fact("", f"what is left is the poll timer, here every {POLL} s, usually 60")
        self._tap(*WITHOUT_PUSH, trigger="fallback")
        self.screen.fact("server", "has push again; Mailroom looks after 1, 2, 4 ... s", "yellow")
        self.server.options.push = 200
        self._wait("the stream to be connected again", self._is_ready)
        self._tell_health()
        self._tap(*WITH_PUSH_AGAIN)

    def _stream(self) -> str:
        """What /healthz says."""
        health = self.mailroom.health()
        stream = health["eventsource"]
        error = "" if stream["status"] == "connected" else f" ({stream['last_error']})"
        reconnects = count(stream["reconnect_count"], "reconnect")
        return f"{health['status']}, stream {stream['status']}{error}, {reconnects}"

    def _tell_health(self) -> None:
        self.screen.fact("/healthz", self._stream())


def show(server: JMAPServer, program: Path, patience: float) -> int:
    """The demo; its exit status. When it fails, mailroom's log is shown."""
    with tempfile.TemporaryFile() as log:
        mailroom = Mailroom(program, log, settings(server))
        try:
            Demo(server, mailroom, patience).play()
        except DemoError as error:
            log.seek(0)
            said = log.read().decode(errors="replace") or "(nothing)\n"
            print(f"\nThe demo has failed: {error}.\nThe log of mailroom:\n{said}", file=sys.stderr)
            return 1
        finally:
            mailroom.process.kill()
            mailroom.process.wait()
    return 0


# ----------------------------------------------------------------------------------------- --serve

HELP = """\
  list [SENDER]           who writes, where the messages are, [the groups]
  label SENDER LABEL      put a label on the sender's newest message
  unlabel SENDER LABEL    take it off
SENDER is a part of an address, as in: label slow-crumb @ToFeed
LABEL is @ToImbox, @ToPerson, @ToFeed, @ToPaperTrail, @ToBillboard, @ToTruck or
@ToJail, or @ToScreener, which takes a sender's triage back"""
SERVED = """
A Mailroom started so serves until Ctrl-C. With one of these at the end of the
line it does this instead (--bare: an account on which `setup` has much to do):

  setup                   say what the account has and lacks
  setup --apply           make what it lacks
  run --once --dry-run    say what it would do to the labelled messages
  reset                   say what taking Mailroom out of the account would do

Then tap here, as on your phone (Ctrl-C ends it):
"""


class Phone:
    """The user's phone: carries out what is typed, and tells what becomes of it."""

    def __init__(self, account: Account) -> None:
        self._account, self._screen = account, Screen()
        self._seen, self._modseq = snapshot(account), account.modseq
        self._prompt = "> " if self._screen.is_terminal and os.isatty(0) else ""

    def run(self) -> None:
        """Until the end of what is typed at a terminal; else for ever."""
        typed: Queue[str | None] = Queue()
        gevent.spawn(read_lines, typed)
        while True:
            print(self._prompt, end="", flush=True)
            while typed.empty():
                gevent.sleep(0.2)
                self._tell_changes()
            if (line := typed.get()) is None:
                return self._screen.line()
            try:
                self._obey(line.split())
            except DemoError as error:
                self._screen.line(f"  {error}")

    def _tell_changes(self) -> None:
        """What has changed since the last time, once nothing has changed for a moment."""
        now, modseq, self._modseq = snapshot(self._account), self._modseq, self._account.modseq
        if modseq == self._modseq and now != self._seen:
            print("\r" if self._prompt else "", end="")
            self._screen.moves("", changes(self._account, self._seen, now))
            self._seen = now
            print(self._prompt, end="", flush=True)

    def _obey(self, words: list[str]) -> None:
        match words:
            case []:
                pass
            case ["list"] | ["list", _]:
                self._list(*words[1:])
            case ["label", sender, label] if label in LABELS:
                if label not in {box.name for box in self._account.mailboxes.values()}:
                    raise DemoError(f"there is no {label} yet: `setup --apply` makes it")
                self._account.label(mail_to_tap(self._account, self._sender(sender)), label)
            case ["unlabel", sender, label]:
                for mail_id in mails_from(self._account, self._sender(sender)):
                    if label in self._account.mailboxes_of(mail_id):
                        self._account.unlabel(mail_id, label)
            case _:
                self._screen.line(HELP)

    def _senders(self, part: str) -> list[str]:
        senders = {address_of(mail.sender) for mail in self._account.mails.values()}
        if not (found := sorted(address for address in senders if part.lower() in address)):
            raise DemoError(f"no sender has {part} in the address")
        return found

    def _sender(self, part: str) -> str:
        if len(found := self._senders(part)) > 1:
            raise DemoError(f"which one? {', '.join(found[:5])} ...")
        return found[0]

    def _list(self, part: str = "") -> None:
        for address in self._senders(part):
            mails = mails_from(self._account, address)
            where = Counter("+".join(sorted(self._account.mailboxes_of(key))) for key in mails)
            places = ", ".join(f"{number} {place}" for place, number in where.items())
            groups = listed(self._account.groups_of(address))
            self._screen.line(f"{address:32} {places}{groups and f' [{groups}]'}")


def read_lines(typed: "Queue[str | None]") -> None:
    """Puts what is typed on the queue, line by line; None at a terminal's end."""
    unread = b""
    while sys.stdin:
        gevent.socket.wait_read(0)
        if not (data := os.read(0, 4096)):
            break
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            typed.put(line.decode(errors="replace"))
    if os.isatty(0):
        typed.put(None)


def serve(server: JMAPServer) -> int:
    """Leaves the account up, says how to start Mailroom on it, and takes what is typed."""
    screen, mails = Screen(), count(len(server.account.mails), "message")
    screen.line(f"A made-up account with {mails} is up. In another terminal:\n")
    for name, value in settings(server).items():
        screen.line(f"export {name}={shlex.quote(value)}")
    paths = (os.path.relpath(path) for path in (sys.executable, MAILROOM))
    command = shlex.join(os.path.abspath(path) if path.startswith("..") else path for path in paths)
    screen.line(f"{command}\n{SERVED}\n{HELP}\n")
    Phone(server.account).run()
    return 0


# ------------------------------------------------------------------------------------ the command


def main() -> int:
    """Run the command; the exit status: 1 when something did not happen as it should."""
    parser = argparse.ArgumentParser(description="Mailroom at work on a made-up account.")
    parser.add_argument("--serve", action="store_true", help="leave the account up to tap by hand")
    parser.add_argument("--bare", action="store_true", help="with --serve: nothing is set up")
    parser.add_argument("--program", type=Path, default=MAILROOM, help="in place of mailroom.py")
    parser.add_argument("--patience", type=float, default=15, help="seconds to wait for anything")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, gevent.kill, gevent.getcurrent(), KeyboardInterrupt)
    try:
        account = new_account(options.bare and options.serve)
        with JMAPServer(Options.fastmail(token="demo-token"), account) as server:
            if options.serve:
                return serve(server)
            return show(server, options.program, options.patience)
    except KeyboardInterrupt:
        print(end="\n" if sys.stdout.isatty() else "")
        return 0 if options.serve else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


if __name__ == "__main__":
    sys.exit(main())
