# ruff: noqa: E402  (mailroom has to be found)
"""Mailroom at work on a made-up account: `nox -s demo`, or `python tests/demo.py`.

An embedded JMAP server holds the account, `python mailroom.py` works it as a process of its own,
and this program taps labels as a phone would and tells what became of them. It tells nothing that
it has not checked, for every message of the account; when something is not so, the status is 1.

With `--serve` the account stays up for a Mailroom started by hand, and taps are typed; with
`--bare` too it has nothing that Mailroom needs, and `setup` makes that.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path += [str(TESTS.parent), str(TESTS / "support")]

from processes import Program, program  # noqa: I001  (brings the monkey patch)

import argparse
import os
import random
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import gevent
import requests

from jmap_server import CATEGORIES, Account, JMAPServer, Mail, Options, addresses
from ports import free_port
from tools import PROGRAM, access_to

DEBOUNCE, POLL = 0.5, 3
PAUSE = 1.3  # seconds to read a scene, on a terminal


class DemoError(Exception):
    """What did not happen, or cannot be done; one line."""


# Who writes, how many messages are where (`+`: in both), and about what.
SENDERS = """
The Slow Crumb <letter@slow-crumb.example>: Screener 14, Recipes 2, Trash 1
    No. {n}: The dough that waited | No. {n}: Why crusts sing | No. {n}: Rye, slowly
Night Train Notes <post@night-train.example>: Screener 11, Lisbon 1
    Sleeper of the month: {month} | Platform {n} | The last dining car
Tidepool Science <news@tidepool.example>: Feed 18
    {n} things about octopuses | The week in water | Ask us anything, {month}
Bargain Owl <deals@bargain-owl.example>: Feed 27, Trash 3, Recipes 1
    Only today: {n} deals | We miss you! | Your cart is lonely | {month} madness ends at midnight
Fernweh Books <shop@fernweh-books.example>: Screener 10
    New on our shelves in {month} | Your receipt {n} | Staff picks for {month}
Velo Depot <service@velo-depot.example>: Screener 7, Inbox 1
    Your bicycle is ready | Invoice {n} | {month}: winter tyres
Northwind Energy <billing@northwind-energy.example>: Paper Trail 12, Taxes 2
    Your bill for {month} | Meter reading due | Invoice {n}
Ledgerly Bank <no-reply@ledgerly.example>: Screener 15, Archive 3
    Your statement for {month} is ready | Card payment {n} | A new sign-in
ParcelHop <track@parcelhop.example>: Screener 12, Trash 2
    Parcel {n} is on its way | Parcel {n}: two stops away | Parcel {n} is with your neighbour
Mara Lindqvist <mara.lindqvist@post.example>: Screener 6, Lisbon 2, Inbox 1
    Re: Saturday? | Photos from the lake | That book I told you about | Lisbon: the flat | Call me
Yuki Tanabe <yuki@tanabe.example>: Imbox+Person 9
    Sunday | Re: the cat | Train times for {month}
Okafor Dental <front.desk@okafor-dental.example>: Screener 5, Archive 1
    Your appointment in {month} | Please confirm: {month} | Six months already?
Elm Street School <office@elm-street-school.example>: Screener 13, Inbox 2
    Parents' evening in {month} | Lost property | Class trip: form {n}
Crypto Comet <vip@crypto-comet.example>: Screener 12, Junk 6
    You have {n} coins waiting!!! | RE: your wallet | FINAL notice {n}
Alice Home <alice@home.example>: Sent 14, Drafts 2
    Re: Saturday? | Re: Your appointment | Packing list for {month}
"""


def new_account(bare: bool) -> Account:
    """The account, with the messages of SENDERS: always the same ones, dated back from now. A bare
    one has nothing of Mailroom's: what would be in its mailboxes is in the Inbox."""
    account, chance = Account.for_mailroom(), random.Random(1)  # noqa: S311  (no secret)
    for folder in (UNDO, "Recipes", "Lisbon", "Taxes"):
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


def mails_from(account: Account, address: str) -> list[Mail]:
    mails = (mail for mail in account.mails.values() if address_of(mail.sender) == address)
    return sorted(mails, key=lambda mail: mail.received_at, reverse=True)


def mail_to_tap(account: Account, address: str) -> Mail:
    """The newest message of a sender that waits in the Screener or is filed already."""
    mails = mails_from(account, address)
    return next((mail for mail in mails if account.mailboxes_of(mail.id) & MANAGED), mails[0])


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
    """Where a tapped sender's message belongs; what the user has filed is not Mailroom's matter."""
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


class Screen:
    """Plain text on standard output; on a terminal with colours (unless NO_COLOR) and pauses."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self._is_plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"

    def line(self, text: str = "", colour: str = "") -> None:
        if colour and self.is_terminal and not self._is_plain:
            codes = {"bold": 1, "dim": 2, "green": 32, "yellow": 33}
            text = f"\033[{codes[colour]}m{text}\033[0m"
        print(text, flush=True)

    def fact(self, key: str, text: str, colour: str = "") -> None:
        self.line(f"   {key:9} {text}", colour)

    def moves(self, key: str, moved: Mapping[str, list[str]]) -> None:
        for what, subjects in moved.items():
            self.fact(key, f"{count(len(subjects), 'message')}: {what}", "green")
            more = [f"... and {len(subjects) - 2} more"] if subjects[2:] else []
            for subject in subjects[:2] + more:
                self.fact("", f"   {subject}", "dim")

    def pause(self) -> None:
        if self.is_terminal:
            gevent.sleep(PAUSE)


def settings(server: JMAPServer) -> dict[str, object]:
    """The settings of a Mailroom that works this account; its health is on a free port."""
    pace = {"debounce_seconds": DEBOUNCE, "poll_interval": POLL, "health_port": free_port()}
    return {**access_to(server), **pace, "log_format": "text"}


SLIP = ("shop@fernweh-books.example", "@ToPaperTrail", "@ToFeed")
SCENES = {
    "A newsletter you like": ("letter@slow-crumb.example", "@ToFeed"),
    "Its next issue, without a tap": ("letter@slow-crumb.example",),
    "A friend": ("mara.lindqvist@post.example", "@ToPerson"),
    "Enough of a shop that is in your Feed": ("deals@bargain-owl.example", "@ToJail"),
    "Second thoughts about the newsletter": ("letter@slow-crumb.example", UNDO),
    "A slip of the thumb: two labels for one sender": SLIP,
    "Push goes away, and comes back": (),
}

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

    def __init__(self, server: JMAPServer, mailroom: Program, patience: float) -> None:
        self.server, self.account, self.mailroom = server, server.account, mailroom
        self.patience, self.screen = patience, Screen()
        self.summary = [SUMMARY.format("tap", "sender", "now in", "messages", "seconds")]

    def play(self) -> None:
        """All scenes and the summary. Raises DemoError when something did not happen."""
        scenes: Any = [self._push_goes_away, self._arrives, self._tap, self._conflict]
        self._open()
        for number, (title, tapped) in enumerate(SCENES.items(), 1):
            self.screen.pause()
            self.screen.line(f"\n{number}. {title}", "bold")
            scenes[len(tapped)](*tapped)
        self.screen.pause()
        self._close()

    def _open(self) -> None:
        mails = self.account.mails.values()
        senders = {address_of(mail.sender) for mail in mails} - {self.account.address}
        numbers = {"mails": len(mails), "senders": len(senders), "debounce": DEBOUNCE}
        screened = len(self.account.mails_in("Screener"))
        self.screen.line("Mailroom: one tap of a label triages a whole sender", "bold")
        self.screen.line(INTRODUCTION.format(screened=screened, **numbers))
        self._wait("mailroom to be connected", self.mailroom.is_pushed)

    def _close(self) -> None:
        cycles = len(self._cycles())
        if status := self.mailroom.stop():
            raise DemoError(f"mailroom was asked to stop; status: {status}")
        if self.server.crashes:
            raise DemoError(f"the embedded server has crashed: {self.server.crashes}")
        for n, row in enumerate(self.summary):
            self.screen.line(row if n else f"\n{row}", "" if n else "bold")
        numbers = {"mails": len(self.account.mails), "requests": self.server.count("api")}
        self.screen.line("\n" + CLOSE.format(cycles=cycles, **numbers))

    def _wait(self, what: str, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + self.patience
        while not condition():
            if (status := self.mailroom.process.poll()) is not None:
                raise DemoError(f"mailroom has ended with status {status}")
            if time.monotonic() > deadline:
                raise DemoError(f"waited {self.patience:g} seconds for {what}")
            gevent.sleep(0.005)

    def _cycles(self) -> list[str]:
        """What triggered the cycles that there were, as Mailroom has logged it."""
        return re.findall(r' cycle done .*trigger="(\w+)"', self.mailroom.output.read_text())

    def _is_idle(self) -> bool:
        """Whether Mailroom waits for events, and the timer will not strike before one can come: no
        echo of its own writes or of the connect is being gathered or looked after."""
        quiet = time.monotonic() - self.server.requests[-1].time
        return bool(self._cycles()) and DEBOUNCE + 0.2 < quiet < POLL - 1

    def _tap(self, address: str, label: str) -> None:
        """Puts the label on one message of the sender, who then has to be triaged."""
        mail = mail_to_tap(self.account, address)
        [(name, _)] = addresses(mail.sender)
        self.screen.fact("tap", f'{label} on "{mail.subject}" from {name}', "yellow")
        self._triage(address, label, label, partial(self.account.label, mail.id, label))

    def _triage(self, address: str, label: str, tap: str, act: Callable[[], object]) -> None:
        """After `act` the sender has to be triaged as the label says: waits, checks and tells."""
        self.screen.fact("means", LABELS[label][1])
        before, groups = snapshot(self.account), self.account.groups_of(address)
        of_sender = {mail.id: before[mail.id] for mail in mails_from(self.account, address)}
        after = {key: filed(places, label) for key, places in of_sender.items()}
        self.screen.fact("took", self._act(tap, address, act, before | after))
        self._tell_contact(address, label, groups)
        if stay := Counter(listed(new) for key, new in after.items() if new == before[key]):
            self.screen.fact("untouched", listed(f"{n} in {place}" for place, n in stay.items()))

    def _act(self, tap: str, address: str, act: Callable[[], object], after: Snapshot) -> str:
        """Waits until every message is as it should be `after` that, tells what moved; its cost."""
        trigger = "push" if self.server.options.push == 200 else "fallback"
        if trigger == "push":
            self._wait("mailroom to be idle", self._is_idle)
        before, cycles = snapshot(self.account), len(self._cycles())
        asked, start = self.server.count("api"), time.monotonic()
        act()
        try:
            self._wait("the messages to be filed", lambda: snapshot(self.account) == after)
        except DemoError as error:
            missing = changes(self.account, snapshot(self.account), after)
            raise DemoError(f"{error}; missing: {listed(missing) or 'messages'}") from None
        seconds = f"{time.monotonic() - start:.2f}"
        self._wait("the cycle to end", lambda: len(self._cycles()) > cycles)
        ran = self._cycles()[cycles:]
        if {*ran} != {trigger} or snapshot(self.account) != after:
            raise DemoError(f"triggered by {ran} instead of {trigger}, or changed once more")
        requests = count(self.server.count("api") - asked, "request")
        before = dict.fromkeys(after, frozenset({"Screener"})) | before  # a new one was there
        self.screen.moves(f"{seconds} s", changes(self.account, before, after))
        moved = [after[key] - before[key] for key in after if before[key] != after[key]]
        places = listed(frozenset().union(*moved) - LABELS.keys())
        [(name, _)] = addresses(mails_from(self.account, address)[0].sender)
        self.summary.append(SUMMARY.format(tap, name, places, len(moved), seconds))
        return f"{count(len(ran), 'cycle')} ({trigger}), {requests}"

    def _tell_contact(self, address: str, label: str, before: set[str]) -> None:
        """One contact, in the groups of the label, or none any more. `before`: those it had."""
        cards, groups = self.account.contacts_of(address), self.account.groups_of(address)
        if label == UNDO:
            if cards:
                raise DemoError(f"{address} still has a contact")
            self.screen.fact("contact", "deleted: Mailroom made it, nobody has touched it")
            return
        kind, who = ("individual", "person") if label == "@ToPerson" else ("org", "company")
        if [card["kind"] for card in cards] != [kind] or groups != LABELS[label][0] | {"Mailroom"}:
            raise DemoError(f"{address} has {count(len(cards), 'contact')} in [{listed(groups)}]")
        name, known = cards[0]["name"]["full"], "known" if before else "new"
        self.screen.fact("contact", f"{known}: {name} <{address}>, {who}")
        self.screen.fact("groups", (f"{listed(before)} -> " if before else "") + listed(groups))

    def _arrives(self, address: str) -> None:
        """A new message of a sender who is in the Feed comes to the Screener: it is filed."""
        sender, subject = mails_from(self.account, address)[0].sender, "No. 400: Sourdough at sea"
        after = snapshot(self.account)
        self.screen.fact("arrives", f'"{subject}", in the Screener', "yellow")
        self.screen.fact("means", "its sender is in the group Feed: that has been decided")

        def arrive() -> None:
            now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
            new = self.account.deliver(sender, ["Screener"], subject=subject, received_at=now)
            after[new] = frozenset({"Feed"})

        self._act("(none)", address, arrive, after)

    def _conflict(self, address: str, label: str, slip: str) -> None:
        """Two labels for one sender: both messages are marked, and nothing else happens."""
        account, after = self.account, snapshot(self.account)
        first, second, *_ = mails_from(account, address)
        tapped = ((first, label), (second, slip))
        for mail, name in tapped:
            self.screen.fact("tap", f'{name} on "{mail.subject}"', "yellow")
            after[mail.id] |= {name, ERROR}
        self.screen.fact("means", "which one? Mailroom does not guess: it marks both")

        def tap_both() -> None:
            for mail, name in tapped:
                account.label(mail.id, name)

        self.screen.fact("took", self._act(f"{label}, {slip}", address, tap_both, after))
        if account.contacts_of(address):
            raise DemoError(f"{address} got a contact in spite of the conflict")
        self.screen.fact("tap", f"{slip} off again", "yellow")
        self._triage(address, label, f"{slip} off", partial(account.unlabel, second.id, slip))

    def _push_goes_away(self) -> None:
        """Begins just after a poll, so that there is time for all this before the next one."""
        cycles = len(self._cycles())
        self._wait("a poll", lambda: len(self._cycles()) > cycles)
        self.screen.fact("/healthz", self._stream())
        self.screen.fact("server", "drops the stream and answers HTTP 503 from now on", "yellow")
        self.server.options.push = 503
        self.server.streams.drop()
        self._wait("/healthz to tell of the 503", lambda: "HTTP 503" in self._stream())
        self.screen.fact("/healthz", self._stream())
        self.screen.fact("", f"what is left is the poll timer, here every {POLL} s, usually 60")
        self._tap("track@parcelhop.example", "@ToTruck")
        self.screen.fact("server", "has push again; Mailroom looks after 1, 2, 4 ... s", "yellow")
        self.server.options.push = 200
        self._wait("the stream to be connected again", self.mailroom.is_pushed)
        self.screen.fact("/healthz", self._stream())
        self._tap("front.desk@okafor-dental.example", "@ToImbox")

    def _stream(self) -> str:
        health = self.mailroom.health
        stream = health["eventsource"]
        said = re.sub(r"^http\S+ answered ", "", stream["last_error"] or "")  # 80 columns
        error = "" if stream["status"] == "connected" else f" ({said})"
        reconnects = count(stream["reconnect_count"], "reconnect")
        return f"{health['status']}, stream {stream['status']}{error}, {reconnects}"


def show(server: JMAPServer, path: Path, patience: float) -> int:
    """The demo; its exit status. When it fails, mailroom's log is shown."""
    given = settings(server) | {"log_level": "debug"}
    with (
        tempfile.TemporaryDirectory() as home,
        program(Path(home, "log"), path=path, **given) as mailroom,
    ):
        try:
            Demo(server, mailroom, patience).play()
        except (DemoError, requests.RequestException, subprocess.TimeoutExpired) as error:
            said = mailroom.output.read_text(errors="replace") or "(nothing)\n"
            print(f"\nThe demo has failed: {error}.\nThe log of mailroom:\n{said}", file=sys.stderr)
            return 1
    return 0


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
        listened_to = [0] if sys.stdin else []
        while True:
            print(self._prompt, end="", flush=True)
            while not select.select(listened_to, [], [], 0.2)[0]:
                self._tell_changes()
            if not (typed := os.read(0, 4096)):
                if os.isatty(0):
                    return self._screen.line()
                listened_to = []
            for line in typed.decode(errors="replace").splitlines():
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
                self._account.label(mail_to_tap(self._account, self._sender(sender)).id, label)
            case ["unlabel", sender, label]:
                for mail in mails_from(self._account, self._sender(sender)):
                    if label in self._account.mailboxes_of(mail.id):
                        self._account.unlabel(mail.id, label)
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
            where = Counter("+".join(sorted(self._account.mailboxes_of(m.id))) for m in mails)
            places = ", ".join(f"{number} {place}" for place, number in where.items())
            groups = listed(self._account.groups_of(address))
            self._screen.line(f"{address:32} {places}{groups and f' [{groups}]'}")


def serve(server: JMAPServer) -> int:
    """Leaves the account up, says how to start Mailroom on it, and takes what is typed."""
    screen, mails = Screen(), count(len(server.account.mails), "message")
    screen.line(f"A made-up account with {mails} is up. In another terminal:\n")
    for name, value in settings(server).items():
        screen.line(f"export MAILROOM_{name.upper()}={shlex.quote(str(value))}")
    paths = (os.path.relpath(path) for path in (sys.executable, PROGRAM))
    command = shlex.join(os.path.abspath(path) if path.startswith("..") else path for path in paths)
    screen.line(f"{command}\n{SERVED}\n{HELP}\n")
    Phone(server.account).run()
    return 0


def main() -> int:
    """Run the command; the exit status: 1 when something did not happen as it should."""
    parser = argparse.ArgumentParser(description="Mailroom at work on a made-up account.")
    parser.add_argument("--serve", action="store_true", help="leave the account up to tap by hand")
    parser.add_argument("--bare", action="store_true", help="with --serve: nothing is set up")
    parser.add_argument("--program", type=Path, default=PROGRAM, help="in place of mailroom.py")
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
