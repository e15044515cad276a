"""Accounts for whole stories: mails and contacts wherever they are kept, the user's hand on them,
the commands, and what there is to compare afterwards, object by object."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from unittest import mock

import requests
from books import Book, JMAPBook, radicale_book
from radicale_server import RadicaleServer
from requests import PreparedRequest, Response, Session
from tools import SERVERS, Ran, cards_of, check_account, command

from mailroom import MailroomError

STORES = (*SERVERS, "radicale")


def exact_cards(book: Any) -> dict[str, Any]:
    """Every card by its uid with all that is in it. Empty properties are as good as none; so are
    the order and the folding of the lines of a vCard."""
    if isinstance(book, JMAPBook):
        return cards_of(book.account)
    cards = {}
    for text in book.texts().values():
        lines = re.sub(r"\r?\n[ \t]", "", text).split("\n")
        [uid] = [line.strip() for line in lines if line.startswith("UID:")]
        cards[uid] = sorted(line.rstrip("\r") for line in lines)
    return cards


def snapshot(home: "Home") -> dict[tuple[str, str], Any]:
    """All that an account has, to be compared: {("mail", subject): its mailboxes, ("box", name):
    whether it is subscribed, ("card", uid): the card}."""
    kinds = (("mail", home.where()), ("box", home.boxes()), ("card", exact_cards(home.book)))
    return {(kind, key): value for kind, all_ in kinds for key, value in all_.items()}


def of_kind(shot: Mapping[tuple[str, str], Any], kind: str) -> dict[str, Any]:
    return {key: value for (each, key), value in shot.items() if each == kind}


class Home(Protocol):
    """An account: the settings for it and no other, what happens to its mails, and where they are;
    whether each mailbox is subscribed. Mails go by their subjects, mailboxes by their names, but
    the Inbox, where a mail is delivered, by its IMAP name."""

    book: Any

    @property
    def settings(self) -> Mapping[str, object]: ...
    def deliver(self, sender: str | None, subject: str, mailbox: str = "Screener") -> str: ...
    def tap(self, subject: str, *labels: str) -> None: ...
    def where(self) -> dict[str, set[str]]: ...
    def boxes(self) -> dict[str, bool]: ...


def run(home: Home, *arguments: str, **changes: object) -> Ran:
    """A command on the account; it ends as it should, and says nothing of its secrets."""
    ran = command(*arguments, **{**home.settings, **changes})
    for said in (ran.out, ran.err):
        assert "Traceback" not in said, said
        assert str(home.settings["jmap_token"]) not in said
    return ran


def once(home: Home) -> None:
    """One cycle, in which all goes well."""
    ran = run(home, "run", "--once")
    assert ran.status == 0, ran


class EmbeddedHome:
    """On the embedded server, with the contacts in a book. There is nothing of Mailroom's yet."""

    def __init__(self, book: Book) -> None:
        self.book: Any = book
        self.mail = book.mail
        self.account = self.mail.account
        self.changes: dict[str, object] = {}  # settings of this account's, beside where it is
        self._ids: dict[str, str] = {}
        for box in [box.id for box in self.account.mailboxes.values() if not box.role]:
            self.account.remove_mailbox(box)
        self.account.add_mailbox("Mine")

    @property
    def settings(self) -> Mapping[str, object]:
        url, token = self.mail.session_url, self.mail.options.token
        return {"jmap_url": url, "jmap_token": token, **self.book.settings, **self.changes}

    def deliver(self, sender: str | None, subject: str, mailbox: str = "Screener") -> str:
        assert subject not in self._ids
        box = "Inbox" if mailbox == "INBOX" else mailbox
        self._ids[subject] = self.account.deliver(sender, [box], subject=subject)
        return subject

    def tap(self, subject: str, *labels: str) -> None:
        self.account.label(self._ids[subject], *labels)

    def move(self, subject: str, *mailboxes: str) -> None:
        self.account.move(self._ids[subject], *mailboxes)

    def where(self) -> dict[str, set[str]]:
        return {subject: self.account.mailboxes_of(id_) for subject, id_ in self._ids.items()}

    def boxes(self) -> dict[str, bool]:
        return {box.name: box.is_subscribed for box in self.account.mailboxes.values()}


@contextmanager
def embedded_home(store: str, radicale: Callable[[], RadicaleServer]) -> Iterator[EmbeddedHome]:
    """An account whose contacts are in a store of this name. The server must be well at the end,
    and no mail lost."""
    book: Book = radicale_book(radicale()) if store == "radicale" else JMAPBook(SERVERS[store]())
    with book.mail as server:
        home = EmbeddedHome(book)
        yield home
        check_account(server, takes_back=True)


JANE = "Jane <jane@x.example>"


def furnished(book: Any) -> EmbeddedHome:
    """An account in which there is all that Mailroom needs."""
    home = EmbeddedHome(book)
    ran = run(home, "setup", "--apply")
    assert ran.status == 0, ran
    return home


def tap_new(home: EmbeddedHome, label: str = "@ToFeed", sender: str = JANE) -> str:
    """A new message, with a label at once; its subject."""
    subject = home.deliver(sender, f"mail {len(home.where())}")
    home.tap(subject, label)
    return subject


def uid_of(home: EmbeddedHome, name: str) -> str:
    return str(next(uid for uid, card in home.book.seen().items() if card.name == name))


def contacts(home: EmbeddedHome, address: str = "jane@x.example") -> list[str]:
    return [uid for uid, card in home.book.seen().items() if address in card.emails]


def members(home: EmbeddedHome, group: str) -> set[str]:
    return set(home.book.seen()[uid_of(home, group)].members)


def put(home: EmbeddedHome, *lines: str, version: str = "3.0") -> str:
    return str(home.book.put(f"{len(home.book.seen())}.vcf", *lines, version=version))


ADOPTED: dict[str, tuple[list[str], dict[str, Any]]] = {
    # sender: what a contact of the user's has beside its name, as lines and as properties
    "tea@x.example": (
        ["NOTE:Likes tea.\\nAnd cake."],
        {"notes": {"k": {"note": "Likes tea.\nAnd cake."}}},
    ),
    "plain@x.example": ([], {}),
    "rich@x.example": (
        ["TEL;TYPE=CELL:1", "X-UNHEARD-OF;X-P=1:a\\, b", "NICKNAME:R"],
        {"phones": {"p": {"number": "1"}}, "example.com:x": {"y": [1, {"z": None}]}},
    ),
}
SENDERS = {
    # sender, as the mails say: the label
    "Bob Smith <bob@shop.example>": "@ToImbox",
    '"Doe, Jane" <jane@home.example>': "@ToPerson",
    "nameless@x.example": "@ToJail",
    "=?utf-8?q?J=C3=B6rg=2C_Inc=3B?= <j@x.example>": "@ToTruck",
    "Tea <tea@x.example>": "@ToFeed",
    "Another name <plain@x.example>": "@ToPaperTrail",
    "Rich <rich@x.example>": "@ToImbox",
}


def add_contact(home: Home, address: str) -> str:
    """A contact of the user's, of those in ADOPTED; its uid."""
    lines, properties = ADOPTED[address]
    name, book = address.partition("@")[0].title(), home.book
    if isinstance(book, JMAPBook):
        emails = {"e": {"address": address, "contexts": {"work": True}}}
        card = {"kind": "individual", "name": {"full": name}, "emails": emails, **properties}
        return book.account.uid_of(book.account.new_card(card))
    uid = f"00000000-0000-4000-8000-{len(address):012d}"
    lines = [f"UID:{uid}", f"FN:{name}", f"N:;{name};;;", *lines]
    book.put(f"{uid}.vcf", *lines, f"item1.EMAIL;TYPE=WORK:{address}", "item1.X-ABLabel:Job")
    return uid


def furnish(home: Home) -> None:
    """What the user has before Mailroom comes."""
    uids = [add_contact(home, address) for address in ADOPTED]
    home.book.add_group("Friends", uids[0])
    home.book.add_group("Jail")
    home.deliver("Tea <tea@x.example>", "read long ago", "INBOX")
    home.deliver("Bob Smith <bob@shop.example>", "my own", "Mine")


def mail_of(sender: str, nth: int = 0) -> str:
    return f"{sender.rpartition('<')[2].removesuffix('>')} {nth}"


def tap_all(home: Home, undo: bool = False) -> None:
    for sender, label in SENDERS.items():
        home.tap(mail_of(sender, 1 if undo else 0), "@ToScreener" if undo else label)
    once(home)
    assert not any(box.startswith("@To") for boxes in home.where().values() for box in boxes)


def story(home: Home) -> None:
    """From an account without Mailroom to one without it again: setup, tap, undo, tap, reset."""
    furnish(home)
    empty = snapshot(home)
    ran = run(home, "setup")
    assert (ran.status, ran.err) == (1, "")
    assert "Nothing has been changed" in ran.out
    assert snapshot(home) == empty
    assert run(home, "setup", "--apply").status == 0
    ready = snapshot(home)
    boxes = of_kind(ready, "box")
    made = boxes.keys() - of_kind(empty, "box").keys()
    assert {"Screener", "Feed", "@ToFeed", "@ToScreener", "@MailroomError"} < made
    assert all(boxes[box] for box in made), "not subscribed"
    assert "There is nothing to do." in run(home, "setup").out
    for sender in SENDERS:
        for nth in range(2):
            home.deliver(sender, mail_of(sender, nth))
    home.deliver("Stranger <s@strange.example>", "of a stranger")
    before = snapshot(home)
    once(home)
    assert snapshot(home) == before
    tap_all(home)
    tapped = snapshot(home)
    assert tapped["mail", mail_of("bob@shop.example", 1)] == {"Imbox", "Inbox"}
    assert tapped["mail", mail_of("jane@home.example", 1)] == {"Person", "Imbox"}
    assert len(of_kind(tapped, "card")) == len(of_kind(before, "card")) + 4
    tap_all(home, undo=True)
    assert snapshot(home) == before
    tap_all(home)
    assert snapshot(home) == tapped
    assert (run(home, "reset").status, snapshot(home)) == (0, tapped)
    ran = run(home, "reset", "--apply", "--yes")
    assert (ran.status, ran.err) == (0, ""), ran
    after = snapshot(home)
    assert of_kind(after, "card") == of_kind(empty, "card")
    for kind in ("mail", "box"):  # the mailboxes that setup made stay
        assert of_kind(after, kind) == of_kind(before, kind)
    assert run(home, "reset").out == "There is nothing to do.\n"


class Killed(BaseException):
    """The program ends here and now."""


class Fate:
    """What befalls Mailroom's requests, on the way to whatever server. `befall` is asked before
    each, and says "killed after", "lost", "reply lost" or nothing."""

    def __init__(self) -> None:
        self.sent: list[PreparedRequest] = []
        self.befall: Callable[[PreparedRequest], str] = lambda _: ""
        self._send = Session.send

    def send(self, session: Session, request: PreparedRequest, **more: Any) -> Response:
        if "Mailroom" not in str(request.headers.get("User-Agent")):
            return self._send(session, request, **more)
        self.sent.append(request)
        fate = self.befall(request)
        if fate != "lost":
            response = self._send(session, request, **more)
        if fate:
            raise Killed if fate == "killed after" else requests.ConnectionError(fate)
        return response

    @property
    def writes(self) -> list[PreparedRequest]:
        return list(filter(is_write, self.sent))


def is_write(request: PreparedRequest) -> bool:
    return request.method in ("PUT", "DELETE") or b'/set"' in (request.body or b"")


@contextmanager
def fate() -> Iterator[Fate]:
    """While it is entered, Mailroom's requests meet their fate."""
    fate = Fate()
    with mock.patch.object(Session, "send", lambda *args, **more: fate.send(*args, **more)):
        yield fate


def met(
    run: Callable[[], object], what: str, nth: int, counts: Callable[[PreparedRequest], bool]
) -> bool:
    """Run, with the nth of the requests that count met with its fate; whether there was one."""
    left = itertools.chain([""] * (nth - 1), [what], itertools.repeat(""))
    with fate() as watched, suppress(Killed, MailroomError):
        watched.befall = lambda request: next(left) if counts(request) else ""
        run()
    return sum(map(counts, watched.sent)) >= nth
