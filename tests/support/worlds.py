"""Accounts to break things in: mail on the embedded server, contacts there or on Radicale, and a
Mailroom beside it that is driven cycle by cycle, in virtual time. What must hold at every moment is
looked at after every single change of the account."""

import gc
import json
import os
import random
import re
import uuid
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from email.utils import parseaddr
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.event
from books import contact_lines, group_lines
from fault_proxy import FaultProxy
from jmap_server import CATEGORIES, JSON, Account, Fault, JMAPServer, Options, Request
from radicale_server import RadicaleServer
from tools import SERVERS, check_account, settings_for

import mailroom

STYLES = (*SERVERS, "radicale")
PHONE = "+1 555 0100"
DATE = re.compile(r"\d{4}-\d\d-\d\d")
MARKS = {"@MailroomError", "@MailroomWarning"}
OWN_LINES = ("UID:", "PRODID:", "X-ADDRESSBOOKSERVER-MEMBER:", "MEMBER:")


class Kept(NamedTuple):
    """A card as it is kept. `rest` is all that is not said by the other parts."""

    uid: str
    is_group: bool
    name: str
    addresses: tuple[str, ...]
    members: tuple[str, ...]
    rest: tuple[str, ...]


class JMAPStore:
    """Contacts in the account of the embedded server."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._known: dict[int, tuple[JSON, Kept]] = {}

    def cards(self) -> list[Kept]:
        """A card that changes is another object than before."""
        cards, known = self.account.cards.values(), self._known
        self._known = {id(c): known.get(id(c)) or (c, self._kept(c)) for c in cards}
        return [kept for _, kept in self._known.values()]

    def _kept(self, card: JSON) -> Kept:
        ours = ("id", "uid", "name", "emails", "members", "addressBookIds")
        return Kept(
            card["uid"],
            card["kind"] == "group",
            card.get("name", {}).get("full", ""),
            tuple(email["address"].lower() for email in card.get("emails", {}).values()),
            tuple(sorted(card.get("members", {}))),
            tuple(sorted(f"{key}: {json.dumps(card[key])}" for key in card.keys() - {*ours})),
        )

    def add(self, address: str, name: str = "", note: str = "") -> str:
        notes: JSON = {"notes": {"n1": {"note": note}}} if note else {}
        return self.account.uid_of(self.account.add_contact(address, name, **notes))

    def add_group(self, name: str, members: Iterable[str] = ()) -> str:
        return self.account.uid_of(self.account.add_group(name, members))

    def edit(self, uid: str, *, phone: str = "", name: str = "") -> None:
        phones: JSON = {"phones": {"p1": {"number": phone}}} if phone else {}
        self.account.change_card(uid, **phones, **({"name": {"full": name}} if name else {}))

    def join(self, group: Kept, *uids: str) -> None:
        members = dict.fromkeys([*group.members, *uids], True)
        self.account.change_card(group.uid, members=members)

    def remove(self, uid: str) -> None:
        self.account.remove_card(uid)


def unfolded(card: bytes) -> list[str]:
    return card.decode().replace("\r\n ", "").split("\r\n")[:-1]


class RadicaleStore:
    """Contacts of a Radicale, as the files that it keeps them in. It holds nothing in memory that
    it does not check against them, so this is both fast and how another client's change looks."""

    def __init__(self, server: RadicaleServer) -> None:
        root = server.home / "collections" / "collection-root"
        self.folder = root / server.username / server.addressbook
        # It looks through all its tokens at each sync: with those of ten thousand worlds, for long.
        tokens = self.folder.glob(".Radicale.cache/sync-token/*")
        for left in (*self.folder.glob("*.vcf"), *tokens):
            left.unlink()
        self._made = 0

    def cards(self) -> list[Kept]:
        return [self._kept(path.read_bytes()) for path in sorted(self.folder.glob("*.vcf"))]

    @staticmethod
    @lru_cache(1000)
    def _kept(card: bytes) -> Kept:
        lines = unfolded(card)
        values: dict[str, list[str]] = defaultdict(list)
        for line in lines:
            name, _, value = line.partition(":")
            values[name.partition(";")[0]].append(value)
        members = values["X-ADDRESSBOOKSERVER-MEMBER"] + values["MEMBER"]
        [uid] = values["UID"]
        return Kept(
            uid,
            "X-ADDRESSBOOKSERVER-KIND" in values,
            values["FN"][0],
            tuple(address.lower() for address in values["EMAIL"]),
            tuple(sorted(member.removeprefix("urn:uuid:") for member in members)),
            tuple(sorted(line for line in lines if not line.startswith(OWN_LINES))),
        )

    def _path(self, uid: str) -> Path:
        paths = self.folder.glob("*.vcf")
        return next(path for path in paths if f"UID:{uid}" in unfolded(path.read_bytes()))

    def _write(self, path: Path, *lines: str) -> None:
        new = path.with_suffix(".new")
        new.write_bytes("\r\n".join([*lines, "END:VCARD", ""]).encode())
        os.replace(new, path)

    def _change(self, uid: str, *more: str, name: str = "") -> None:
        path = self._path(uid)
        lines = unfolded(path.read_bytes())[:-1]
        if name:
            lines = [f"FN:{name}" if line.startswith("FN:") else line for line in lines]
        self._write(path, *lines, *more)

    def _add(self, lines_of: Callable[[str], list[str]]) -> str:
        self._made += 1  # the same uids in each run: what Radicale has indexed stays good
        uid = str(uuid.UUID(int=self._made, version=4))
        self._write(self.folder / f"{uid}.vcf", "BEGIN:VCARD", "VERSION:3.0", *lines_of(uid))
        return uid

    def add(self, address: str, name: str = "", note: str = "") -> str:
        return self._add(lambda uid: contact_lines(uid, [address], name, note or None))

    def add_group(self, name: str, members: Iterable[str] = ()) -> str:
        return self._add(lambda uid: group_lines(uid, name, members))

    def edit(self, uid: str, *, phone: str = "", name: str = "") -> None:
        self._change(uid, *([f"TEL:{phone}"] if phone else []), name=name)

    def join(self, group: Kept, *uids: str) -> None:
        self._change(group.uid, *(f"X-ADDRESSBOOKSERVER-MEMBER:urn:uuid:{uid}" for uid in uids))

    def remove(self, uid: str) -> None:
        self._path(uid).unlink()


Store = JMAPStore | RadicaleStore


class VirtualPause(gevent.event.Event):
    """A shutdown flag that notes how long it is waited for, and does not wait."""

    waited = 0.0

    def wait(self, timeout: Any = None) -> Any:  # (it has an overload for each type of time-out)
        self.waited += timeout or 0
        return False


class Program:
    """A Mailroom in this process, driven a cycle at a time the way the service drives it: with its
    memory between cycles and without its pauses. It can die at any point, and then starts anew."""

    def __init__(self, settings: mailroom.MailroomSettings) -> None:
        self.settings = settings
        self.result = ""
        self.pause = 0.0
        self._start()

    def _start(self) -> None:
        self._service = mailroom.Service(self.settings)
        self._service.shutdown = self._shutdown = VirtualPause()
        self.greenlet: gevent.Greenlet[..., Any] = gevent.Greenlet()

    def cycle(self) -> str:
        """One cycle to its end; how it ended: `success`, `failure`, `status 2` or `killed`. `pause`
        is how many seconds the service would wait until the next."""
        self.begin()
        return self.end()

    def reset(self) -> str:
        """The command `reset --apply --yes`, to its end."""
        self.begin(self._reset)
        return self.end()

    def begin(self, work: Callable[[], None] | None = None) -> None:
        self._shutdown.waited = 0.0
        self.greenlet = gevent.spawn(mailroom.outcome, work or self._cycle)

    def end(self) -> str:
        self.greenlet.join(60)
        assert self.greenlet.ready(), "a cycle without end"
        died = self.greenlet.value
        if died is None:
            return self.result
        if not isinstance(died, gevent.GreenletExit | mailroom.ConfigurationError):
            raise died
        self._start()
        return "killed" if isinstance(died, gevent.GreenletExit) else "status 2"

    def _cycle(self) -> None:
        self.pause = self._service._cycle("startup") + self._shutdown.waited
        self.result = "failure" if self._service.health.consecutive_failures else "success"

    def _reset(self) -> None:
        self.result, self.pause = "failure", float("inf")  # the user tries it again, at any time
        with suppress(mailroom.ServerError):
            if mailroom.reset(self.settings, Namespace(apply=True, yes=True)) == 0:
                self.result = "success"

    def kill(self) -> None:
        """As SIGKILL would, from the servers' side: it is gone without a word."""
        self.greenlet.kill(block=False)

    def time_out(self) -> None:
        """What a socket raises when the time for an answer is up, now and not in a minute; where
        several requests are under way, it is up for all of them."""
        for greenlet in innermost(self.greenlet):
            greenlet.kill(TimeoutError("timed out"), block=False)

    def settle(self, cycles: int = 4) -> None:
        """Cycles until one goes well. There is no endless fight: it takes a few at most."""
        results: list[str] = []
        while "success" not in results:
            assert len(results) < cycles, f"it does not come to rest: {results}"
            results.append(self.cycle())


def innermost(greenlet: "gevent.Greenlet[..., Any]") -> list["gevent.Greenlet[..., Any]"]:
    """Those that do the work of a greenlet: that which it has spawned, or itself."""
    alive = [each for each in gc.get_objects() if isinstance(each, gevent.Greenlet) and each]
    spawned = [each for each in alive if (by := each.spawning_greenlet) and by() is greenlet]
    return [each for one in spawned for each in innermost(one)] or [greenlet]


class Goal(NamedTuple):
    """Where an undisturbed run leads to: `state` is all of the account."""

    state: JSON
    groups: dict[str, set[str]]
    boxes: dict[str, set[str]]


class World(AbstractContextManager["World"]):
    """An account with servers that are told what goes wrong with which request: `meet` is asked for
    a fault at every request, whichever server it is to, with its number."""

    def __init__(self, style: str, radicale: RadicaleServer | None = None, **options: Any) -> None:
        settings: JSON = {}
        on_radicale = style == "radicale"
        made = Options(has_contacts=False) if on_radicale else SERVERS[style]()
        self.mail = JMAPServer.with_mailroom_account(replace(made, push=None, **options))
        self.account = self.mail.account
        self.account.add_mailbox("Mine")
        self.servers: list[JMAPServer] = [self.mail]
        self.store: Store = JMAPStore(self.account)
        if on_radicale and radicale:
            self.store = RadicaleStore(radicale)
            self.servers.append(FaultProxy(radicale.port))
            for name in (*CATEGORIES, "Mailroom"):
                self.store.add_group(name)
            login = {"carddav_username": radicale.username, "carddav_password": radicale.password}
            settings = {"carddav_url": self.servers[-1].origin, **login}
        self.settings = settings_for(self.mail, **settings)
        self.requests: list[tuple[int, Request]] = []
        self.meet: Callable[[int, Request], Fault | None] = lambda *_: None
        self.goal: Goal | None = None
        self._start: Goal | None = None
        self.removed: set[str] = set()
        self.takes_back = False
        self.broken: list[str] = []
        for number, server in enumerate(self.servers):
            server.on_request = lambda _, request, number=number: self._met(number, request)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for server in self.servers:
            server.stop()
        if error is None:
            self.check()

    def _met(self, server: int, request: Request) -> Fault:
        self.requests.append((server, request))
        fault = self.meet(len(self.requests), request) or Fault()
        after = fault.after or (lambda: None)

        def look() -> None:
            self.look()
            after()

        if request.method in ("PUT", "DELETE"):  # changes by JMAP are seen as they are made
            fault.after = look
        return fault

    def deliver(self, sender: str, mails: int = 1, *boxes: str) -> list[str]:
        address = parseaddr(sender)[1].lower()
        start = len(self.account.mails)
        subjects = [f"{address} {start + n}" for n in range(mails)]
        deliver = partial(self.account.deliver, sender, boxes or ["Screener"])
        return [deliver(subject=subject) for subject in subjects]

    def tap(self, sender: str, label: str, mails: int = 2) -> list[str]:
        """Mails arrive in the Screener, and one of them gets a label."""
        ids = self.deliver(sender, mails)
        self.account.label(ids[0], label)
        return ids

    def triaged(self, address: str, category: str, *parents: str) -> list[str]:
        """A sender that Mailroom triaged some time ago; the mails."""
        note = f'{mailroom.CREATED_NOTE} on 2025-01-01 as "{address}"'
        uid = self.store.add(address, address, note)
        for group in (category, *parents, "Mailroom"):
            self.join(group, uid)
        return self.deliver(address, 2, category, *parents)

    def join(self, group: str, *uids: str) -> None:
        self.store.join(self.group(group), *uids)

    def group(self, name: str) -> Kept:
        return next(card for card in self.store.cards() if card.is_group and card.name == name)

    def contact(self, address: str) -> Kept:
        [card] = [card for card in self.store.cards() if address in card.addresses]
        return card

    def remove_mail(self, mail: str) -> None:
        """The user deletes it for good."""
        self.removed.add(mail)
        self.account.remove_mail(mail)

    def groups(self) -> dict[str, set[str]]:
        """The groups that each address is in."""
        cards = self.store.cards()
        found: dict[str, set[str]] = {a: set() for card in cards for a in card.addresses}
        of_uid = {card.uid: card.addresses for card in cards}
        for group in cards:
            for member in group.members:
                for address in of_uid.get(member, ()):
                    found[address].add(group.name)
        return found

    def boxes(self) -> dict[str, set[str]]:
        return {id_: self.account.mailboxes_of(id_) for id_ in self.account.mails}

    def state(self) -> JSON:
        """All of the account, but for what may differ from run to run: uids and dates."""
        addresses = {card.uid: "/".join(card.addresses) for card in self.store.cards()}
        cards = []
        for card in self.store.cards():
            members = tuple(sorted(addresses.get(uid, uid) for uid in card.members))
            rest = tuple(DATE.sub("DATE", line) for line in card.rest)
            cards.append(repr(card._replace(uid="", members=members, rest=rest)))
        subjects = {id_: mail.subject for id_, mail in self.account.mails.items()}
        mails = [[subjects[id_], *sorted(boxes)] for id_, boxes in self.boxes().items()]
        names = sorted(box.name for box in self.account.mailboxes.values())
        return {"mails": sorted(mails), "cards": sorted(cards), "mailboxes": names}

    def check_state(self, wanted: JSON) -> None:
        """That all of the account is so; says what is otherwise."""
        for part, there in self.state().items():
            is_wrong = [each for each in there if each not in wanted[part]]
            is_missing = [each for each in wanted[part] if each not in there]
            assert there == wanted[part], f"{part}: is {is_wrong}, should be {is_missing}"

    def end(self) -> Goal:
        return Goal(self.state(), self.groups(), self.boxes())

    def watch(self, goal: Goal | None = None) -> None:
        """From now on each change is looked at. With the goal of an undisturbed run it is known,
        too, whose groups change, and when a tap is done."""
        self.goal = goal
        self._first = Counter(a for card in self.store.cards() for a in card.addresses)
        boxes = self.boxes()
        self._start = Goal({}, self.groups(), boxes)
        self._tapped = {self._sender(id_) for id_, there in boxes.items() if labels_in(there)}
        self.account.listeners.append(lambda _: self.look())

    def _sender(self, mail: str) -> str:
        return self.account.mails[mail].subject.partition(" ")[0]

    def look(self) -> None:
        if self._start:
            self.broken += self._wrong(self._start)

    def _wrong(self, start: Goal) -> Iterable[str]:
        """What does not hold, and must at every moment, whatever goes wrong."""
        boxes, groups, goal = self.boxes(), self.groups(), self.goal
        lost = start.boxes.keys() - boxes.keys() - self.removed
        if lost or not all(boxes.values()):
            yield f"mails are lost: {lost}"
        contacts = Counter(address for card in self.store.cards() for address in card.addresses)
        for address, count in contacts.items():
            if count > max(1, self._first[address]):
                yield f"{address} has a second contact"
        if not goal:
            return
        for address, old in start.groups.items():
            now, new = groups.get(address, set()), goal.groups.get(address, set())
            routed = (old | new) - {"Mailroom"}
            if not now >= old & new or (routed & old and routed & new and not now & routed):
                yield f"{address} was in {old}, is to be in {new} and is in {now}"
        done = {a for a in self._tapped if groups.get(a, set()) == goal.groups.get(a, set())}
        for id_, there in boxes.items():
            if there - MARKS != goal.boxes[id_] - MARKS:
                done.discard(self._sender(id_))
        waiting = {self._sender(id_) for id_, there in boxes.items() if labels_in(there)}
        if lost := self._tapped - done - waiting:
            yield f"the taps for {lost} are lost"

    def check(self) -> None:
        assert not self.broken, self.broken[:3]
        check_account(self.mail, self.removed, takes_back=self.takes_back)
        assert all(server.crashes == [] for server in self.servers)


def labels_in(boxes: Iterable[str]) -> bool:
    return any(box.startswith("@To") for box in boxes)


def seeded() -> None:
    """The same order of the senders in each run."""
    random.seed(1)
