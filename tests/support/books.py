"""Address books for tests: on the embedded JMAP server, on Radicale and on Cyrus, each with the way
of the user's phone to its cards, and a mail account beside it. Uids are without `urn:uuid:`."""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import requests
import vobject  # type: ignore[import-untyped]
from cyrus_server import CyrusServer
from jmap_server import JMAPServer, Options
from radicale_server import RadicaleServer
from real_server import http_session, vcards

CATEGORIES = (
    "Imbox",
    {"name": "Person", "parent": "Imbox", "contact_type": "person"},
    "Feed",
    "Jail",
)
GROUPS = ("Imbox", "Person", "Feed", "Jail", "Mailroom")
PHONE = "+1 555 0100"


def bare_uid(uid: str) -> str:
    return uid.strip().removeprefix("urn:uuid:")


def contact_lines(uid: str, addresses: Iterable[str], name: str, note: str | None) -> list[str]:
    emails = [f"EMAIL;TYPE=INTERNET:{address}" for address in addresses]
    notes = [] if note is None else ["NOTE:" + note.replace("\n", "\\n")]
    return [f"UID:{uid}", f"FN:{name}", f"N:;{name};;;", *emails, *notes]


def group_lines(uid: str, name: str, members: Iterable[str], version_4: bool = False) -> list[str]:
    prefix, urn = ("", "") if version_4 else ("X-ADDRESSBOOKSERVER-", "urn:uuid:")
    joined = [f"{prefix}MEMBER:{urn}{member}" for member in members]
    return [f"UID:{uid}", f"FN:{name}", f"N:{name};;;;", f"{prefix}KIND:group", *joined]


class Seen(NamedTuple):
    """A card as its server shows it to anyone."""

    name: str
    emails: frozenset[str] = frozenset()
    note: str = ""
    kind: str = "person"
    members: frozenset[str] = frozenset()
    phones: frozenset[str] = frozenset()


class JMAPBook:
    """In an account of the embedded server, with the way of the user's phone to it: `add` and
    `add_group` return the uid, and by `meddle` someone else gives a card a telephone number."""

    def __init__(self, options: Options) -> None:
        self.mail = JMAPServer.with_mailroom_account(options, GROUPS[:-1])
        self.account = self.mail.account
        for group in [*self.account.groups]:
            self.account.remove_card(group)
        self.settings: dict[str, Any] = {}

    def add(self, *addresses: str, name: str = "Bob", note: str | None = None) -> str:
        emails = {f"e{n}": {"address": address} for n, address in enumerate(addresses)}
        notes = {} if note is None else {"x": {"note": note}}
        named = {"name": {"full": name}} if name else {}
        card = {"kind": "individual", **named, "emails": emails, "notes": notes}
        return self.account.uid_of(self.account.new_card(card))

    def add_group(self, name: str, *members: str) -> str:
        return self.account.uid_of(self.account.add_group(name, members))

    def meddle(self, uid: str) -> None:
        self.account.change_card(uid, phones={"p1": {"number": PHONE}})

    def remove(self, uid: str) -> None:
        self.account.remove_card(uid)

    def seen(self) -> dict[str, Seen]:
        return {card["uid"]: self._seen(card) for card in self.account.cards.values()}

    def _seen(self, card: Mapping[str, Any]) -> Seen:
        kinds = {"group": "group", "org": "company"}
        return Seen(
            card.get("name", {}).get("full", ""),
            frozenset(email["address"] for email in card.get("emails", {}).values()),
            "\n".join(note["note"] for note in card.get("notes", {}).values()),
            kinds.get(card["kind"], "person"),
            frozenset(card.get("members", {})),
            frozenset(phone["number"] for phone in card.get("phones", {}).values()),
        )


class DAVBook:
    """The same on a CardDAV server. `version_4`: the groups in it are vCards 4.0, else of the Apple
    kind."""

    def __init__(self, origin: str, url: str, login: tuple[str, str], version_4: bool) -> None:
        self.origin, self.url, self.login, self.version_4 = origin, url, login, version_4
        self.mail = JMAPServer.with_mailroom_account(Options(has_contacts=False), GROUPS[:-1])
        names = ("carddav_url", "carddav_username", "carddav_password")
        self.settings = dict(zip(names, (origin, *login), strict=True))
        self.http = http_session(login)

    def ask(self, method: str, url: str, body: str = "", **headers: str) -> requests.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        reply = self.http.request(method, url, data=body.encode(), headers=named, timeout=60)
        reply.raise_for_status()
        return reply

    def put(self, name: str, *lines: str, version: str = "3.0") -> str:
        """A card of these lines; its URL."""
        url = self.url + name
        text = "\r\n".join(["BEGIN:VCARD", f"VERSION:{version}", *lines, "END:VCARD", ""])
        self.ask("PUT", url, text, Content_Type=f"text/vcard; charset=utf-8; version={version}")
        return url

    def get(self, url: str) -> str:
        """A card as it is kept."""
        text = self.ask("GET", url).content.decode()
        if "x-addressbookserver-kind" in text:  # Cyrus shows a vCard 4.0 as 3.0
            text = self.ask("GET", url, Accept="text/vcard; version=4.0").content.decode()
        return text

    def add(self, *addresses: str, name: str = "Bob", note: str | None = None) -> str:
        uid = str(uuid.uuid4())
        self.put(f"{uid}.vcf", *contact_lines(uid, addresses, name, note))
        return uid

    def add_group(self, name: str, *members: str) -> str:
        uid, version = str(uuid.uuid4()), "4.0" if self.version_4 else "3.0"
        lines = group_lines(uid, name, members, self.version_4)
        self.put(f"{uid}.vcf", *lines, version=version)
        return uid

    def url_of(self, uid: str) -> str:
        [url] = [url for url, card in self._parsed() if bare_uid(card.uid.value) == uid]
        return url

    def meddle(self, uid: str) -> None:
        url = self.url_of(uid)
        text = self.get(url).replace("END:VCARD", f"TEL:{PHONE}\r\nEND:VCARD")
        self.ask("PUT", url, text, Content_Type="text/vcard; charset=utf-8")

    def remove(self, uid: str) -> None:
        self.ask("DELETE", self.url_of(uid))

    def _parsed(self) -> Iterator[tuple[str, Any]]:
        """(URL, card) of all that are there; vCards 4.0 may be shown as 3.0."""
        return ((url, vobject.readOne(text)) for url, text in self.texts().items())

    def texts(self) -> dict[str, str]:
        """All cards by their URLs, as a report shows them."""
        return vcards(self.http, self.url, self.login)

    def seen(self) -> dict[str, Seen]:
        cards = [card for _, card in self._parsed()]
        found = {bare_uid(card.uid.value): self._seen(card.contents) for card in cards}
        assert len(found) == len(cards), "a uid comes twice"
        return found

    def _seen(self, contents: Mapping[str, Any]) -> Seen:
        def values(*names: str) -> list[str]:
            return [str(one.value) for name in names for one in contents.get(name, ())]

        groups = values("kind", "x-addressbookserver-kind")
        return Seen(
            "".join(values("fn")),
            frozenset(values("email")),
            "\n".join(values("note")),
            "group" if groups else "company" if "org" in contents else "person",
            frozenset(map(bare_uid, values("member", "x-addressbookserver-member"))),
            frozenset(values("tel")),
        )


Book = JMAPBook | DAVBook


def radicale_book(server: RadicaleServer, version_4: bool = False) -> DAVBook:
    """Its address book, empty again."""
    login = (server.username, server.password)
    server.http.delete(server.addressbook_url).raise_for_status()
    server.make_addressbook(server.addressbook)
    return DAVBook(server.url, server.addressbook_url, login, version_4)


def cyrus_book(server: CyrusServer, version_4: bool = False) -> DAVBook:
    """A new user's address book."""
    user = server.add_user(f"alice{uuid.uuid4().hex}")
    login = (user.username, user.password)
    return DAVBook(f"{server.origin}/", user.addressbook_url, login, version_4)
