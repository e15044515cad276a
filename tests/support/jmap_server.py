"""An embedded JMAP server: a real HTTP server on loopback with one mail account behind it. It keeps
the rules of RFC 8620 (core), 8621 (mail), 9610 and 9553 (contacts) in the manner of Fastmail, Cyrus
or Stalwart (`Options.fastmail()` ...), and misbehaves exactly when it is told to (`Fault`)."""

from __future__ import annotations

import base64
import email
import http.client
import itertools
import json
import math
import socket
import ssl
import struct
import time
import traceback
import urllib.parse
import uuid
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.utils import getaddresses
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, ClassVar, Literal, NamedTuple

import gevent
import gevent.monkey
from gevent.pool import Pool
from gevent.queue import Empty, Queue
from gevent.server import StreamServer

assert gevent.monkey.is_module_patched("socket"), "patch with gevent.monkey before importing this"

JSON = dict[str, Any]
Ids = AbstractSet[str]
Body = bytes | Iterable[bytes]

CORE = "urn:ietf:params:jmap:core"
MAIL = "urn:ietf:params:jmap:mail"
SUBMISSION = "urn:ietf:params:jmap:submission"
CONTACTS = "urn:ietf:params:jmap:contacts"

SESSION_PATH, API_PATH, EVENT_PATH = "/jmap/session", "/jmap/api/", "/jmap/event/"
UPLOAD_PATH = "/jmap/upload/"
PATHS = {SESSION_PATH: "session", API_PATH: "api", EVENT_PATH: "stream", UPLOAD_PATH: "upload"}
LIMITS = {
    "maxSizeRequest": 10_000_000,
    "maxConcurrentRequests": 10,
    "maxCallsInRequest": 50,
    "maxObjectsInGet": 4096,
    "maxObjectsInSet": 4096,
}
CATEGORIES = ("Imbox", "Feed", "Paper Trail", "Jail", "Person", "Billboard", "Truck")
ADDRESS = "alice@home.example"
UTC_DATE = "%Y-%m-%dT%H:%M:%SZ"
FOREVER = 10**9
BYSTANDER = "urn:uuid:5eb7c4f2-8f2d-4c1e-9d7e-0b6f0a3c1d55"  # who is in a group that is in use


class JMAPError(Exception):
    def __init__(self, type: str, description: str = "", **more: Any) -> None:
        super().__init__(type, description)
        told = {"description": description} if description else {}
        self.body: JSON = {"type": type, **told, **more}


class ProblemError(JMAPError):
    """The whole request is refused (RFC 8620 section 3.6.1)."""

    def __init__(self, type: str, **more: Any) -> None:
        super().__init__(f"urn:ietf:params:jmap:error:{type}", status=400, **more)


class MethodError(JMAPError):
    """One call of a request fails (RFC 8620 section 3.6.2)."""


class SetError(JMAPError):
    """One object of a set call fails (RFC 8620 section 5.3)."""


@dataclass
class Options:
    """How the server behaves; every field may be changed while it runs. By default it does
    everything as the RFCs suggest."""

    token: str = "secret-token"
    username: str = ADDRESS
    relative_urls: bool = False
    has_mail: bool = True
    has_contacts: bool = True
    has_submission: bool = True
    identities: list[JSON] = field(default_factory=lambda: [{"email": ADDRESS}])
    read_only: bool = False
    limits: dict[str, int] = field(default_factory=dict)  # what differs from LIMITS
    max_query_limit: int | None = None  # a query's limit is lowered to this, and told so
    max_filter_terms: int = FOREVER  # an Email/query of more finds a third, no error (Cyrus)
    mailbox_query: Literal["works", "refuse"] = "works"  # "refuse": only by role (Apache James)
    sparse_replies: bool = False  # a query tells no position, and null as the total
    last_mailbox: Literal["refuse", "lose"] = "refuse"  # "lose": told updated, but gone (Cyrus)
    from_search: Literal["index", "empty", "error"] = "index"  # "empty", "error": without an index
    index_until: float = math.inf  # mails that arrived after this Account.modseq are not found
    id_is_uid: bool = False  # a contact's id is its uid (Cyrus); set it before the account is made
    groups_in_use: bool = False  # each group has a member; set it before the account is made
    latency: float = 0  # seconds every request spends on the network
    history: int = FOREVER  # how many requests and writes are kept
    push: int | None = 200  # status of the event source; None: the session does not name one
    event_template: bool = True  # as in RFC 8620; else bare (Fastmail)
    connect_event: bool = False  # a stream begins with the present state (Fastmail)
    closes_streams_after: float | None = None  # seconds after its connect event (Fastmail: 1.2)
    stream_life: float | None = None  # the same without such an event (Cyrus: 300)
    coalesce: bool = True  # changes in quick succession are one event; else one a changed object
    chunked: bool = True  # else only the end of the connection ends a stream (Cyrus)
    pings: bool = True
    ping_pace: float | None = None  # real seconds between pings, for tests that cannot wait

    @classmethod
    def fastmail(cls, **changes: Any) -> Options:
        return replace(cls(event_template=False, connect_event=True, pings=False), **changes)

    @classmethod
    def cyrus(cls, **changes: Any) -> Options:
        """Cyrus 3.13 without a search index."""
        cyrus = cls(relative_urls=True, id_is_uid=True, from_search="empty")
        cyrus.last_mailbox, cyrus.max_filter_terms = "lose", 300
        cyrus.chunked, cyrus.stream_life = False, 300
        return replace(cyrus, **changes)

    @classmethod
    def stalwart(cls, **changes: Any) -> Options:
        """It does as the RFCs suggest."""
        return cls(**changes)


@dataclass
class Fault:
    """What goes wrong with the `nth` matching request since the fault was added, `times` in a row.

    `when` is "session", "api", "stream", "upload", a method name (any call of the request) or a
    predicate. Without `status`, `body`, `hang` and `drop` the request is worked as usual; with them
    it is not, unless `work` says so.
    """

    when: str | Callable[[Request], bool] = "api"
    nth: int = 1
    times: int = 1
    work: bool = False
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Body | None = None  # an endless iterable is sent until the client has enough
    hang: bool = False  # never replies
    drop: bool = False  # the connection ends with a reset
    delay: float = 0  # seconds between the work and the reply
    truncate: int | None = None  # the connection ends after so many bytes of the body
    errors: dict[str, JSON] = field(default_factory=dict)  # by method or call id; it is not worked
    refuse: dict[str, JSON] = field(default_factory=dict)  # SetErrors, by id of the object, or "*"
    before_call: Callable[[str, JSON], object] | None = None  # gets the method and its arguments
    after: Callable[[], object] | None = None  # runs after the work and before the reply
    edit: Callable[[Any], Any] | None = None  # makes of the JSON of a reply what is sent instead
    matched: int = field(default=0, init=False)
    fired: int = field(default=0, init=False)

    def due(self, request: Request) -> bool:
        if not (self.when(request) if callable(self.when) else request.matches(self.when)):
            return False
        self.matched += 1
        due = self.nth <= self.matched < self.nth + self.times
        self.fired += due
        return due


@dataclass(slots=True)
class Mailbox:
    id: str
    name: str
    parent_id: str | None = None
    role: str | None = None
    is_subscribed: bool = True
    mails: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Mail:
    id: str
    sender: str | None  # the raw From header, if there is one
    senders: list[JSON] | None  # as EmailAddress objects
    subject: str
    received_at: str
    verdicts: list[str]  # the headers Authentication-Results
    modseq: int  # the account's when the mail arrived
    mailboxes: frozenset[str] = frozenset()
    keywords: frozenset[str] = frozenset()

    @property
    def author(self) -> tuple[str, str]:
        """The header From, and what a text search sees of it: names and addresses, decoded."""
        seen = " ".join(f"{one['name'] or ''} {one['email']}" for one in self.senders or ())
        return (self.sender or "").lower(), seen.lower()


def decoded(text: str) -> str:
    """Header text with its encoded words decoded (RFC 2047); left alone where they are broken."""
    try:
        return str(make_header(decode_header(text)))
    except (HeaderParseError, LookupError, ValueError):
        return text


@lru_cache(maxsize=65536)
def addresses(header: str | None) -> tuple[tuple[str, str], ...]:
    """The (name, address) pairs of a raw header, as far as the standard library finds any."""
    found = getaddresses([header or ""])
    return tuple((decoded(name), address) for name, address in found if address)


def headers_of(sender: str | list[JSON] | None) -> tuple[str | None, list[JSON] | None]:
    """A From header, if there is one, raw and as EmailAddress objects (RFC 8621 section 4.1.2.3);
    in one that is made of such objects nothing is quoted."""
    if isinstance(sender, list):
        pairs = ((one["name"], one["email"]) for one in sender)
        return ", ".join(f"{name} <{mail}>" if name else mail for name, mail in pairs), sender
    found = [{"name": name or None, "email": mail} for name, mail in addresses(sender)]
    return sender, None if sender is None else found


def card_addresses(card: JSON) -> set[str]:
    """The addresses of a card in lower case, as far as an odd one has any."""
    entries = [one for one in (card.get("emails") or {}).values() if isinstance(one, dict)]
    return {one["address"].lower() for one in entries if isinstance(one.get("address"), str)}


def full_name(card: JSON) -> str:
    return str((card.get("name") or {}).get("full"))


@dataclass
class History:
    """The objects of one type: which are gone, and when the last change was."""

    gone: set[str] = field(default_factory=set)
    modseq: int = 0


class Account:
    """One user's mailboxes, mails and contacts; its methods are the user's phone. Whatever takes a
    mailbox takes its name or id. Every change bumps the states and is published to the listeners
    (the event streams), whether it came from here or over HTTP."""

    def __init__(self, *, id_is_uid: bool = False) -> None:
        self.id, self.address = "u1", ADDRESS
        self.id_is_uid = id_is_uid
        self.modseq = 0
        self.histories: defaultdict[str, History] = defaultdict(History)
        self.mailboxes: dict[str, Mailbox] = {}
        self.mails: dict[str, Mail] = {}
        self.books: dict[str, JSON] = {}
        self.cards: dict[str, JSON] = {}
        self.blobs: dict[str, bytes] = {}
        # A search costs what there are of distinct senders.
        self.by_sender: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self.listeners: list[Callable[[dict[str, int]], None]] = []
        self._serial = itertools.count(1)
        self.add_book("Personal")

    @classmethod
    def for_mailroom(cls, names: Iterable[str] = CATEGORIES, *, id_is_uid: bool = False) -> Account:
        """Roles, Screener, error and warning labels; label, mailbox and group of each category."""
        account = cls(id_is_uid=id_is_uid)
        for role in ("Inbox", "Archive", "Drafts", "Sent", "Junk", "Trash"):
            account.add_mailbox(role, role=role.lower())
        labels = [("@To" + name.replace(" ", ""), name) for name in names]
        for name in ("Screener", "@MailroomError", "@MailroomWarning", *itertools.chain(*labels)):
            account.add_mailbox(name)
        for name in (*names, "Mailroom"):
            account.add_group(name)
        return account

    def mailbox_id(self, name: str) -> str:
        """The mailbox of this id or name; of namesakes the oldest."""
        if name in self.mailboxes:
            return name
        return next(box.id for box in self.mailboxes.values() if box.name == name)

    def add_mailbox(self, name: str, parent: str | None = None, role: str | None = None) -> str:
        box = Mailbox(f"P{next(self._serial)}", name, parent and self.mailbox_id(parent), role)
        self.mailboxes[box.id] = box
        self._publish(("Mailbox", box.id))
        return box.id

    def rename_mailbox(self, name: str, new_name: str) -> None:
        box = self.mailboxes[self.mailbox_id(name)]
        box.name = new_name
        self._publish(("Mailbox", box.id))

    def remove_mailbox(self, name: str) -> None:
        """The mails that are in no other mailbox go with it."""
        box = self.mailboxes[self.mailbox_id(name)]
        for mail_id in sorted(box.mails):
            self.unlabel(mail_id, box.id)
        del self.mailboxes[box.id]
        self._publish(("Mailbox", box.id), gone=box.id)

    def deliver(
        self,
        sender: str | list[JSON] | None,
        mailboxes: Iterable[str] = ("Inbox",),
        *,
        subject: str = "Hello",
        received_at: str | None = None,
        keywords: Iterable[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """A new mail; mails arrive a minute apart by default. `sender` is the raw From header, or
        what a server makes of one: EmailAddress objects."""
        serial = next(self._serial)
        minute = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=serial)
        raw, senders = headers_of(sender)
        received_at = received_at or minute.strftime(UTC_DATE)
        verdicts = [*filter(None, [(headers or {}).get("Authentication-Results")])]
        id_, modseq = f"M{serial}", self.modseq + 1
        self.mails[id_] = Mail(id_, raw, senders, subject, received_at, verdicts, modseq)
        self.by_sender[self.mails[id_].author].add(id_)
        self.file(id_, map(self.mailbox_id, mailboxes), keywords)
        return id_

    def label(self, mail_id: str, *mailboxes: str) -> None:
        self.file(mail_id, self.mails[mail_id].mailboxes | set(map(self.mailbox_id, mailboxes)))

    def unlabel(self, mail_id: str, *mailboxes: str) -> None:
        self.file(mail_id, self.mails[mail_id].mailboxes - set(map(self.mailbox_id, mailboxes)))

    def move(self, mail_id: str, *mailboxes: str) -> None:
        self.file(mail_id, map(self.mailbox_id, mailboxes))

    def mark(self, mail_id: str, *keywords: str) -> None:
        self.file(mail_id, self.mails[mail_id].mailboxes, keywords)

    def file(
        self, mail_id: str, mailboxes: Iterable[str], keywords: Iterable[str] | None = None
    ) -> None:
        """The one place where a mail changes; in no mailbox it is gone. No change: no new state."""
        mail = self.mails[mail_id]
        old_boxes, old_words = mail.mailboxes, mail.keywords
        mail.mailboxes = frozenset(mailboxes)
        mail.keywords = old_words if keywords is None else frozenset(keywords)
        is_seen = "$seen" in old_words ^ mail.keywords
        counted = old_boxes | mail.mailboxes if is_seen else old_boxes ^ mail.mailboxes
        for box_id in old_boxes ^ mail.mailboxes:
            self.mailboxes[box_id].mails ^= {mail_id}
        if not mail.mailboxes:
            del self.mails[mail_id]
            self.by_sender[mail.author].discard(mail_id)
        if (old_boxes, old_words) != (mail.mailboxes, mail.keywords):
            boxes = (("Mailbox", box_id) for box_id in counted)
            self._publish(("Email", mail_id), *boxes, gone="" if mail.mailboxes else mail_id)

    def mails_by(self, *words: str, is_raw: bool = False) -> set[str]:
        """The mails with all of these in their header From, raw or as a text search sees it."""
        authors = ((ids, raw if is_raw else seen) for (raw, seen), ids in self.by_sender.items())
        lower = [word.lower() for word in words]
        return set().union(*(ids for ids, text in authors if all(word in text for word in lower)))

    def remove_mail(self, mail_id: str) -> None:
        self.file(mail_id, ())

    def mailboxes_of(self, mail_id: str) -> set[str]:
        return {self.mailboxes[box_id].name for box_id in self.mails[mail_id].mailboxes}

    def mails_in(self, mailbox: str) -> set[str]:
        return set(self.mailboxes[self.mailbox_id(mailbox)].mails)

    def add_book(self, name: str, *, is_default: bool = False, may_write: bool = True) -> str:
        """The first one is the default, until another is."""
        book_id = f"A{next(self._serial)}"
        for other in self.books.values() if is_default else ():
            other["isDefault"] = False
        rights = {"mayRead": True, "mayWrite": may_write}
        book = {"id": book_id, "name": name, "isDefault": is_default or not self.books}
        self.books[book_id] = {**book, "myRights": rights}
        self._publish(("AddressBook", book_id))
        return book_id

    def put_in_book(self, card_id: str, book_id: str) -> None:
        self.change_card(card_id, addressBookIds={book_id: True})

    def new_card(self, properties: Mapping[str, Any]) -> str:
        """A card of these properties, with the ids it lacks and in the default book."""
        serial = next(self._serial)
        uid = properties.get("uid") or f"urn:uuid:{uuid.UUID(int=serial, version=4)}"
        book_id = next(key for key, book in self.books.items() if book["isDefault"])
        card: JSON = {"@type": "Card", "version": "1.0", "addressBookIds": {book_id: True}}
        card |= {**properties, "uid": uid, "id": uid if self.id_is_uid else f"C{serial}"}
        self.put_card(card)
        return str(card["id"])

    def add_contact(
        self, address: str, name: str = "", kind: str = "individual", **properties: Any
    ) -> str:
        named = {"name": {"full": name}} if name else {}
        emails = {"e1": {"address": address}} if address else {}
        return self.new_card({"kind": kind, **named, "emails": emails, **properties})

    def add_group(self, name: str, members: Iterable[str] = ()) -> str:
        """`members` are ids of contacts, or uids."""
        uids = [self.cards[key]["uid"] if key in self.cards else key for key in members]
        named = {"kind": "group", "name": {"full": name}}
        return self.new_card({**named, "members": dict.fromkeys(uids, True)})

    @property
    def groups(self) -> list[str]:
        return [key for key, card in self.cards.items() if card.get("kind") == "group"]

    @property
    def by_uid(self) -> dict[str, str]:
        return {card["uid"]: key for key, card in self.cards.items() if card.get("uid")}

    def uid_of(self, card_id: str) -> str:
        return str(self.cards[card_id]["uid"])

    def group_id(self, name: str) -> str:
        return next(key for key in self.groups if full_name(self.cards[key]) == name)

    def join_group(self, name: str, contact_id: str) -> None:
        group = self.group_id(name)
        members = {**self.cards[group].get("members", {}), self.cards[contact_id]["uid"]: True}
        self.change_card(group, members=members)

    def change_card(self, card: str, **properties: Any) -> None:
        """Of this id or uid."""
        card_id = self.by_uid.get(card, card)
        self.put_card({**self.cards[card_id], **properties})

    def put_card(self, card: JSON) -> None:
        """The one place where a card is made or changed."""
        self.cards[card["id"]] = card
        self._publish(("ContactCard", card["id"]))

    def remove_card(self, card: str) -> None:
        """Of this id or uid; its uid stays in the groups it was in."""
        card_id = self.by_uid.get(card, card)
        del self.cards[card_id]
        self._publish(("ContactCard", card_id), gone=card_id)

    def contacts_of(self, address: str) -> list[JSON]:
        return [card for card in self.cards.values() if address.lower() in card_addresses(card)]

    def groups_of(self, address: str) -> set[str]:
        uids = {card.get("uid") for card in self.contacts_of(address)}
        groups = (self.cards[key] for key in self.groups)
        return {full_name(one) for one in groups if uids & (one.get("members") or {}).keys()}

    def state(self, kind: str) -> str:
        return f"J{self.histories[kind].modseq}"

    def _publish(self, *changed: tuple[str, str], gone: str = "") -> None:
        news: dict[str, int] = {}
        for kind, object_id in changed:
            self.modseq += 1
            history = self.histories[kind]
            history.modseq = news[kind] = self.modseq
            history.gone |= {object_id} & {gone}
        for listener in self.listeners:
            listener(news)


def select(where: JSON | None, among: Ids, condition: Callable[[str, Any, Ids], Ids]) -> Ids:
    """The ids a filter leaves (RFC 8620 section 5.5); `condition` narrows by one property."""
    where = where or {}
    if "operator" not in where:
        for name, value in where.items():
            among = condition(name, value, among)
        return among
    operator, parts = where["operator"], where["conditions"]
    if operator == "AND":
        for part in parts:
            among = select(part, among, condition)
        return among
    if operator != "OR":
        raise MethodError("invalidArguments", "filter/operator")
    return set().union(*(select(part, among, condition) for part in parts))


def count_terms(where: JSON | None) -> int:
    """The terms of a filter once it is an OR of ANDs, which is what Cyrus makes of it."""
    if not where or "operator" not in where:
        return 1
    counts = [count_terms(part) for part in where["conditions"]]
    return math.prod(counts) if where["operator"] == "AND" else sum(counts)


def pointer_parts(path: str) -> list[str]:
    """The parts of a JSON pointer (RFC 6901) without its leading slash."""
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")]


def apply_patch(item: JSON, patch: JSON) -> JSON:
    """A patched copy (RFC 8620 section 5.3), of maps that are no deeper than one level: a parent
    must exist, and no path may be inside of another."""
    patched = {key: {**old} if isinstance(old, dict) else old for key, old in item.items()}
    for path, value in patch.items():
        top, *rest = pointer_parts(path)
        if rest and (top in patch or len(rest) > 1 or not isinstance(patched.get(top), dict)):
            raise SetError("invalidPatch", path)
        target, last = (patched[top], rest[0]) if rest else (patched, top)
        if value is None:
            target.pop(last, None)
        else:
            target[last] = value
    return patched


def is_id_set(value: object) -> bool:
    """Whether this is an `Id[Boolean]` of RFC 8620: every value must be true."""
    return isinstance(value, dict) and all(flag is True for flag in value.values())


class Kind:
    """One JMAP data type: what get, query and set have to know of its objects. What can be set has
    `update`, `destroy` and `create`, which returns the properties the client does not know."""

    name: ClassVar[str]
    store: ClassVar[str]  # the attribute of the account that has them
    capability: ClassVar[str]
    verbs: ClassVar[Ids] = frozenset({"get", "query", "set"})
    properties: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    sorts: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    # Filter conditions that look at every object, with the text that is asked for.
    filters: ClassVar[Mapping[str, Callable[[Any, str], object]]] = {}

    def __init__(self, account: Account, options: Options) -> None:
        self.account, self.options = account, options
        self.objects: dict[str, Any] = getattr(account, self.store)

    def render(self, item: Any, properties: list[str] | None) -> JSON:
        wanted = self.properties if properties is None else dict.fromkeys(["id", *properties])
        return {name: self.properties[name](item) for name in wanted}

    def search(self, where: JSON | None, sort: list[JSON]) -> list[str]:
        """All matching ids in order; those alike in order of arrival."""
        found = select(where, self.objects.keys(), self.condition)
        ids = [key for key in self.objects if key in found]
        for comparator in reversed(sort):
            if comparator["property"] not in self.sorts:
                raise MethodError("unsupportedSort", comparator["property"])
            values = {key: self.sorts[comparator["property"]](self.objects[key]) for key in ids}
            ids.sort(key=values.__getitem__, reverse=not comparator.get("isAscending", True))
        return ids

    def condition(self, name: str, value: Any, among: Ids) -> Ids:
        if name not in self.filters:
            raise MethodError("unsupportedFilter", name)
        if not isinstance(value, str):
            raise MethodError("invalidArguments", f"not a string: {value!r}")
        return {key for key in among if self.filters[name](self.objects[key], value)}


class Mailboxes(Kind):
    name, store, capability = "Mailbox", "mailboxes", MAIL
    properties: ClassVar = {
        "id": lambda box: box.id,
        "name": lambda box: box.name,
        "parentId": lambda box: box.parent_id,
        "role": lambda box: box.role,
        "totalEmails": lambda box: len(box.mails),
        "isSubscribed": lambda box: box.is_subscribed,
    }

    def search(self, where: JSON | None, sort: list[JSON]) -> list[str]:
        if self.options.mailbox_query == "refuse" and (where or {}).keys() != {"role"}:
            raise MethodError("invalidArguments", "only a filter by role is supported")
        return super().search(where, sort)

    def create(self, item: JSON) -> JSON:
        """A name is unique among its siblings (RFC 8621 section 2)."""
        name, parent = item.get("name"), item.get("parentId")
        bad = [key for key in item if key not in ("name", "parentId", "isSubscribed")]
        bad += ["parentId"] if parent not in (None, *self.objects) else []
        taken = {(box.name, box.parent_id) for box in self.objects.values()}
        bad += ["name"] if not name or (name, parent) in taken else []
        if bad:
            raise SetError("invalidProperties", properties=bad)
        box = self.objects[self.account.add_mailbox(str(name), parent)]
        box.is_subscribed = item.get("isSubscribed", False)  # as on Cyrus
        return self.render(box, None)

    def destroy(self, object_id: str, args: JSON) -> None:
        if any(other.parent_id == object_id for other in self.objects.values()):
            raise SetError("mailboxHasChild")
        if self.objects[object_id].mails and not args.get("onDestroyRemoveEmails"):
            raise SetError("mailboxHasEmail")
        self.account.remove_mailbox(object_id)


class Emails(Kind):
    name, store, capability = "Email", "mails", MAIL
    verbs = Kind.verbs | {"import"}
    properties: ClassVar = {
        "id": lambda mail: mail.id,
        "blobId": lambda mail: f"B{mail.id}",
        "threadId": lambda mail: f"T{mail.id}",
        "mailboxIds": lambda mail: dict.fromkeys(mail.mailboxes, True),
        "keywords": lambda mail: dict.fromkeys(mail.keywords, True),
        "receivedAt": lambda mail: mail.received_at,
        "from": lambda mail: mail.senders,
        "to": lambda _: [{"name": None, "email": ADDRESS}],
        "subject": lambda mail: decoded(mail.subject),
        "hasAttachment": lambda _: False,
        "header:From": lambda mail: mail.sender and f" {mail.sender}",
        "header:Authentication-Results:asText:all": lambda mail: mail.verdicts,
    }
    sorts: ClassVar = {"receivedAt": lambda mail: mail.received_at}
    filters: ClassVar = {
        "notKeyword": lambda mail, text: text not in mail.keywords,
        "after": lambda mail, text: mail.received_at >= text,
    }

    def search(self, where: JSON | None, sort: list[JSON]) -> list[str]:
        found = super().search(where, sort)
        return found if count_terms(where) <= self.options.max_filter_terms else found[::3]

    def condition(self, name: str, value: Any, among: Ids) -> Ids:
        """RFC 8621 section 4.4.1; `header` is a substring of the raw header and needs no index."""
        if name == "inMailbox":
            if value not in self.account.mailboxes:  # as Cyrus has it
                raise MethodError("invalidArguments", f"no mailbox {value}")
            return among & self.account.mailboxes[value].mails
        if name == "from":
            return self._text_search(value, among)
        if name == "header" and value[0].lower() == "from":
            return among & self.account.mails_by(value[1], is_raw=True)
        return super().condition(name, value, among)

    def _text_search(self, text: str, among: Ids) -> Ids:
        """Words or parts of words, anywhere in names and addresses, as far as the index got."""
        if self.options.from_search == "error":
            raise MethodError("serverFail", "no search index")
        if self.options.from_search == "empty":
            return set()
        found = among & self.account.mails_by(*text.split())
        return {key for key in found if self.objects[key].modseq <= self.options.index_until}

    def create(self, item: JSON) -> JSON:
        """RFC 8621 section 4.8: an import, of a blob with the headers of a message."""
        boxes, blob = item.get("mailboxIds"), self.account.blobs.get(item.get("blobId", ""))
        if not boxes or not is_id_set(boxes) or not boxes.keys() <= self.account.mailboxes.keys():
            raise SetError("invalidProperties", properties=["mailboxIds"])
        if blob is None:
            raise SetError("invalidProperties", properties=["blobId"])
        message = email.message_from_bytes(blob)
        texts = {name: " ".join(str(text).split()) for name, text in message.items()}
        more: JSON = {"subject": texts.get("Subject", ""), "keywords": item.get("keywords") or ()}
        more["received_at"] = item.get("receivedAt") or datetime.now(UTC).strftime(UTC_DATE)
        mail_id = self.account.deliver(texts.get("From"), boxes, headers=texts, **more)
        made = self.render(self.objects[mail_id], ["blobId", "threadId"])
        return {**made, "size": len(blob)}

    def update(self, object_id: str, patch: JSON) -> None:
        """Only `mailboxIds` and `keywords` of a mail may change (RFC 8621 section 4.6)."""
        now = self.render(self.objects[object_id], ["mailboxIds", "keywords"])
        mailboxes, named = self.account.mailboxes, set()
        for path, value in patch.items():
            top, *rest = pointer_parts(path)
            good = (value is True or value is None) if rest else is_id_set(value)
            if top not in ("mailboxIds", "keywords") or len(rest) > 1 or not good:
                raise SetError("invalidProperties", properties=[path])
            if top == "mailboxIds":
                named |= set(rest or value)
        if not named <= mailboxes.keys():
            raise SetError("invalidProperties", properties=["mailboxIds"])
        patched = apply_patch(now, patch)
        if not patched["mailboxIds"] and self.options.last_mailbox == "refuse":
            raise SetError("invalidProperties", "in no mailbox", properties=["mailboxIds"])
        self.account.file(object_id, patched["mailboxIds"], patched["keywords"])

    def destroy(self, object_id: str, args: JSON) -> None:
        self.account.remove_mail(object_id)


class Identities(Kind):
    name, capability = "Identity", SUBMISSION
    verbs = frozenset({"get"})
    properties: ClassVar = {key: itemgetter(key) for key in ("id", "email")}

    def __init__(self, account: Account, options: Options) -> None:
        self.objects = {f"I{n}": {"id": f"I{n}", **one} for n, one in enumerate(options.identities)}


class Books(Kind):
    name, store, capability = "AddressBook", "books", CONTACTS
    verbs = frozenset({"get"})
    properties: ClassVar = {key: itemgetter(key) for key in ("id", "name", "isDefault", "myRights")}


def has_text(key: str, value: object) -> bool:
    """A map of objects, each of which has this text property."""
    items = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(item, dict) and isinstance(item.get(key), str) for item in items)


def is_name(value: object) -> bool:
    """RFC 9553 section 2.2.1: a full name, or components of a kind and a value, or both."""
    if not isinstance(value, dict) or not value.keys() & {"full", "components"}:
        return False
    parts = dict(enumerate(value.get("components", [])))
    has_parts = has_text("kind", parts) and has_text("value", parts)
    return has_parts and isinstance(value.get("full", ""), str)


CARD_REQUIRED = ("@type", "version", "addressBookIds")
CARD_RULES: dict[str, Callable[[Any], bool]] = {
    "@type": "Card".__eq__,
    "version": "1.0".__eq__,
    "uid": lambda value: isinstance(value, str),
    "addressBookIds": lambda value: is_id_set(value) and bool(value),
    "kind": ("individual", "group", "org").__contains__,
    "name": is_name,
    "organizations": partial(has_text, "name"),
    "emails": partial(has_text, "address"),
    "notes": partial(has_text, "note"),
    "members": is_id_set,
}


class Cards(Kind):
    # A card may have properties of other makers, so none is unknown (RFC 9553).
    name, store, capability = "ContactCard", "cards", CONTACTS
    # RFC 9610 section 3.3.1; `email` is a substring, as Cyrus has it.
    filters: ClassVar = {
        "kind": lambda card, text: card.get("kind", "individual") == text,
        "uid": lambda card, text: card.get("uid") == text,
        "email": lambda card, text: any(text.lower() in one for one in card_addresses(card)),
    }

    def render(self, item: JSON, properties: list[str] | None) -> JSON:
        wanted = item if properties is None else ["id", *properties]
        return {key: item[key] for key in wanted if key in item}

    def create(self, item: JSON) -> JSON:
        self._validate(item, {*item, *CARD_REQUIRED})
        if item.get("uid") in self.account.by_uid:
            raise SetError("invalidProperties", properties=["uid"])
        card = self.objects[self.account.new_card(item)]
        return {name: value for name, value in card.items() if name not in item}

    def update(self, object_id: str, patch: JSON) -> None:
        """What was wrong before and is not touched may stay so; a uid stays in any case."""
        card = self.objects[object_id]
        patched = apply_patch(card, patch)
        self._check_rights(card)
        if patched.get("uid") != card.get("uid"):
            raise SetError("invalidProperties", properties=["uid"])
        if patched != card:
            self._validate(patched, {pointer_parts(path)[0] for path in patch})
            self.account.put_card(patched)

    def _validate(self, card: JSON, names: Iterable[str]) -> None:
        """RFC 9553 and 9610: these properties are known, there if they must be, and right."""
        wrong = {name for name in names if name not in CARD_RULES and ":" not in name}
        wrong |= {name for name in names if name in CARD_REQUIRED and name not in card}
        checked = [name for name in names if name in CARD_RULES and name in card]
        wrong |= {name for name in checked if not CARD_RULES[name](card[name])}
        if not wrong and not card["addressBookIds"].keys() <= self.account.books.keys():
            wrong.add("addressBookIds")
        if wrong:
            raise SetError("invalidProperties", properties=sorted(wrong))
        self._check_rights(card)

    def _check_rights(self, card: JSON) -> None:
        books = [self.account.books.get(key) for key in card.get("addressBookIds") or ()]
        if any(book and not book["myRights"]["mayWrite"] for book in books):
            raise SetError("forbidden", "the address book may only be read")

    def destroy(self, object_id: str, args: JSON) -> None:
        self._check_rights(self.objects[object_id])
        self.account.remove_card(object_id)


KINDS: tuple[type[Kind], ...] = (Mailboxes, Emails, Identities, Books, Cards)


class Write(NamedTuple):
    method: str
    args: JSON
    reply: JSON


SET_OUTCOMES = ("created", "updated", "destroyed", "notCreated", "notUpdated", "notDestroyed")
PAGE = ("filter", "sort", "position", "anchor", "anchorOffset", "limit", "calculateTotal")
ARGUMENTS = {
    "get": {"accountId", "ids", "properties"},
    "query": {"accountId", *PAGE},
    "set": {"accountId", "ifInState", "create", "update", "destroy", "onDestroyRemoveEmails"},
    "import": {"accountId", "ifInState", "emails"},
}


class Run:
    """One API request: its calls in order, with result references."""

    def __init__(self, server: JMAPServer, body: Any, fault: Fault) -> None:
        self.server, self.fault = server, fault
        self.account, self.options = server.account, server.options
        self.replies: list[list[Any]] = []
        try:
            self.using = body["using"]
            self.calls = [(str(name), {**args}, tag) for name, args, tag in body["methodCalls"]]
        except (KeyError, TypeError, ValueError):
            raise ProblemError("notRequest") from None
        if unknown := [name for name in self.using if name not in server.capabilities()]:
            raise ProblemError("unknownCapability", detail=f"unknown capability {unknown[0]}")
        if len(self.calls) > server.limit("maxCallsInRequest"):
            raise ProblemError("limit", limit="maxCallsInRequest")

    def answer(self) -> JSON:
        for name, args, tag in self.calls:
            if self.fault.before_call:
                self.fault.before_call(name, args)
            try:
                if error := self.fault.errors.get(tag) or self.fault.errors.get(name):
                    raise MethodError(**error)
                self.replies.append([name, self._call(name, args), tag])
            except MethodError as failure:
                self.replies.append(["error", failure.body, tag])
        return {"methodResponses": self.replies, "sessionState": self.server.session()["state"]}

    def _call(self, name: str, raw_args: JSON) -> JSON:
        args = self._with_results(raw_args)
        if name == "Core/echo":
            return args
        type_name, _, verb = name.partition("/")
        kind = self.server.kinds.get(type_name)
        if kind is None or verb not in kind.verbs or kind.capability not in self.using:
            raise MethodError("unknownMethod")
        if args.get("accountId") != self.account.id:
            raise MethodError("accountNotFound")
        if unknown := args.keys() - ARGUMENTS[verb]:
            raise MethodError("invalidArguments", f"unknown arguments: {unknown}")
        methods = {"get": self._get, "query": self._query, "set": self._set, "import": self._set}
        return {"accountId": self.account.id, **methods[verb](kind, args)}

    def _with_results(self, args: JSON) -> JSON:
        """The arguments with `#name` replaced by what it refers to (RFC 8620 section 3.7)."""
        if any("#" + key in args for key in args):
            raise MethodError("invalidArguments", "an argument and a reference of the same name")
        return {
            key.removeprefix("#"): self._result(value) if key.startswith("#") else value
            for key, value in args.items()
        }

    def _result(self, reference: Any) -> Any:
        try:
            wanted = (reference["name"], reference["resultOf"])
            answer = next(answer for name, answer, tag in self.replies if (name, tag) == wanted)
            return answer[reference["path"].removeprefix("/")]
        except (LookupError, StopIteration) as problem:
            raise MethodError("invalidResultReference", repr(problem)) from None

    def _get(self, kind: Kind, args: JSON) -> JSON:
        objects, properties = kind.objects, args.get("properties")
        if kind.properties and (unknown := {*(properties or ())} - kind.properties.keys()):
            raise MethodError("invalidArguments", f"unknown properties: {unknown}")
        ids = list(objects) if args.get("ids") is None else args["ids"]
        if not isinstance(ids, list) or not all(isinstance(key, str) for key in ids):
            raise MethodError("invalidArguments", "ids must be a list of ids")
        if len(ids) > self.server.limit("maxObjectsInGet"):
            raise MethodError("requestTooLarge")
        ids = list(dict.fromkeys(ids))
        return {
            "state": self.account.state(kind.name),
            "list": [kind.render(objects[key], properties) for key in ids if key in objects],
            "notFound": [key for key in ids if key not in objects],
        }

    def _query(self, kind: Kind, args: JSON) -> JSON:
        """RFC 8620 section 5.5. The whole result is found first, then the page is cut from it."""
        ids = kind.search(args.get("filter"), args.get("sort") or [])
        start = self._start(ids, args)
        limit, cap = args.get("limit"), self.options.max_query_limit
        if not isinstance(limit or 0, int) or (limit or 0) < 0:
            raise MethodError("invalidArguments", "limit")
        lowered = cap is not None and (limit is None or limit > cap)
        page = ids[start:][: cap if lowered else limit]
        reply: JSON = {"queryState": self.account.state(kind.name), "ids": page}
        reply |= {"total": None} if self.options.sparse_replies else {"position": start}
        reply |= {"total": len(ids)} if args.get("calculateTotal") else {}
        return reply | ({"limit": cap} if lowered else {})

    def _start(self, ids: list[str], args: JSON) -> int:
        if (anchor := args.get("anchor")) is not None:
            if anchor not in ids:
                raise MethodError("anchorNotFound")
            return max(0, ids.index(anchor) + int(args.get("anchorOffset") or 0))
        return int(args.get("position") or 0)

    def _set(self, kind: Kind, args: JSON) -> JSON:
        """RFC 8620 section 5.3: every object by itself succeeds or fails; what is empty is null."""
        create, update = args.get("create") or args.get("emails"), args.get("update") or {}
        tasks: list[tuple[str, str, Any]] = [("Created", *each) for each in (create or {}).items()]
        tasks += [("Updated", *each) for each in update.items()]
        tasks += [("Destroyed", key, args) for key in args.get("destroy") or ()]
        old_state = self.account.state(kind.name)
        if self.options.read_only:
            raise MethodError("accountReadOnly")
        if len(tasks) > self.server.limit("maxObjectsInSet"):
            raise MethodError("requestTooLarge")
        if args.get("ifInState") not in (None, old_state):
            raise MethodError("stateMismatch")
        done: dict[str, Any] = {outcome: {} for outcome in SET_OUTCOMES}
        for verb, key, value in tasks:
            try:
                done[verb.lower()] |= self._change(kind, verb, key, value)
            except SetError as failure:
                done[f"not{verb}"][key] = failure.body
        done["destroyed"] = list(done["destroyed"])
        reply: JSON = {"oldState": old_state, "newState": self.account.state(kind.name)}
        reply |= {key: value or None for key, value in done.items()}
        if reply["newState"] != old_state:
            method = f"{kind.name}/{'import' if 'emails' in args else 'set'}"
            self.server.writes.append(Write(method, args, reply))
            del self.server.writes[: -self.options.history]
        return reply

    def _change(self, kind: Any, verb: str, key: str, value: Any) -> JSON:
        if refused := self.fault.refuse.get(key) or self.fault.refuse.get("*"):
            raise SetError(**refused)
        if verb == "Created":
            return {key: kind.create(value)}
        if key not in kind.objects:
            raise SetError("notFound")
        (kind.update if verb == "Updated" else kind.destroy)(key, value)
        return {key: None}


@dataclass
class Request:
    """A request as it came, for the tests to look at; header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = field(repr=False)
    time: float = field(default_factory=time.monotonic)
    status: int | None = None  # what was answered, if anything (yet)
    answered: int = 0  # bytes of the answer's body, where its length is known

    def __post_init__(self) -> None:
        url = urllib.parse.urlsplit(self.target)
        self.path = url.path
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        kinds = (kind for path, kind in PATHS.items() if self.path.startswith(path))
        self.kind = next(kinds, "other")
        self.size = len(self.body)
        self.json: Any = None
        with suppress(ValueError):
            self.json = json.loads(self.body) if self.kind == "api" else None

    @property
    def calls(self) -> list[tuple[str, JSON]]:
        body = self.json if isinstance(self.json, dict) else {}
        return [(call[0], call[1]) for call in body.get("methodCalls", [])]

    @property
    def methods(self) -> list[str]:
        return [name for name, _ in self.calls]

    def matches(self, what: str) -> bool:
        return what == self.kind or what in self.methods


@dataclass
class Reply:
    status: int
    body: Body = b""
    headers: dict[str, str] = field(default_factory=dict)
    takes_over: Callable[[Connection], None] | None = None  # has the connection: a stream

    @property
    def is_whole(self) -> bool:
        """Whether its length is known, so that the connection can go on after it."""
        return isinstance(self.body, bytes) and self.takes_over is None

    @classmethod
    def of_json(cls, value: Any, status: int = 200) -> Reply:
        kind = "application/json" if status < 400 else "application/problem+json"
        return cls(status, json.dumps(value).encode(), {"Content-Type": kind})


class Connection:
    """A client's socket, with as much of HTTP/1.1 as the clients of a JMAP server need."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self._file = sock, sock.makefile("rb")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def read_request(self) -> Request | None:
        """The next request; None when the client has gone."""
        first = self._file.readline().decode("latin-1").rstrip()
        fields = http.client.parse_headers(self._file)
        headers = {name.lower(): value for name, value in fields.items()}
        body = self._file.read(size := int(headers.get("content-length", 0)))
        if not first or len(body) < size:
            return None
        method, target, _version = first.split(" ")
        return Request(method, target, headers, body)

    def send(self, reply: Reply, fault: Fault) -> None:
        """Head and body go out together: apart they are two packets, and slow."""
        body = reply.body if isinstance(reply.body, bytes) else b""
        framing = {"Content-Length": str(len(body))} if reply.is_whole else {"Connection": "close"}
        reason = http.client.responses.get(reply.status, "Unknown")
        fields = "".join(f"{k}: {v}\r\n" for k, v in (framing | reply.headers).items())
        head = f"HTTP/1.1 {reply.status} {reason}\r\n{fields}\r\n".encode("latin-1")
        self.sock.sendall(head + body[: fault.truncate])
        if reply.takes_over:
            reply.takes_over(self)
        elif not isinstance(reply.body, bytes):
            for piece in reply.body:
                self.sock.sendall(piece)

    def wait_for_end(self) -> None:
        with suppress(OSError):
            while self.sock.recv(65536):
                pass

    def close(self) -> None:
        """A socket is closed for good only when its file is."""
        self._file.close()
        self.sock.close()

    def abort(self) -> None:
        """Ends the connection at once, so that the client sees a reset and not a clean end."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


class Stream:
    """One open event source (RFC 8620 section 7.3)."""

    def __init__(self, server: JMAPServer, request: Request) -> None:
        self.server, self.account, self.options = server, server.account, server.options
        types = request.query.get("types", "*")
        self.types = set(server.kinds) if types == "*" else set(server.kinds) & {*types.split(",")}
        self.interval = int(request.query.get("ping", 0))
        self.hung = False
        # News, or bytes as they are to be sent; None ends the stream cleanly.
        self.outbox: Queue[dict[str, int] | bytes | None] = Queue()

    def push(self, news: dict[str, int]) -> None:
        wanted = {key: modseq for key, modseq in news.items() if key in self.types}
        waiting = self.outbox.queue[-1] if self.outbox.qsize() else None
        if isinstance(waiting, dict) and self.options.coalesce:
            waiting |= wanted
        elif wanted:
            self.outbox.put(wanted)

    def run(self, connection: Connection) -> None:
        self.connection = connection
        self.account.listeners.append(self.push)
        self.server.streams.append(self)
        self.server.streams.opened += 1
        # A client that goes ends its stream even when there is nothing to send.
        watcher = gevent.spawn(connection.wait_for_end)
        watcher.link(lambda _: self.outbox.put(None))
        try:
            self._talk()
        finally:
            self.account.listeners.remove(self.push)
            self.server.streams.remove(self)
            watcher.kill(block=False)

    def _talk(self) -> None:
        options, life = self.options, self.options.closes_streams_after
        if options.connect_event or life is not None:
            present = {key: self.account.histories[key].modseq for key in sorted(self.types)}
            self._send(self._event(present))
        end = time.monotonic() + (options.stream_life or FOREVER if life is None else life)
        while (item := self._next(end)) is not None:
            if isinstance(item, bytes) or not self.hung:
                self._send(self._event(item) if isinstance(item, dict) else item)
        if options.chunked:
            self.connection.sock.sendall(b"0\r\n\r\n")

    def _next(self, end: float) -> dict[str, int] | bytes | None:
        """What comes next, no news for a ping; None at the end of the stream."""
        pace = (self.options.pings and (self.options.ping_pace or self.interval)) or FOREVER
        try:
            return self.outbox.get(timeout=max(0, min(pace, end - time.monotonic())))
        except Empty:
            return {} if time.monotonic() < end else None

    def _event(self, news: dict[str, int]) -> bytes:
        if not news:
            return b'event: ping\ndata: {"interval": %d}\n\n' % self.interval
        changed = {self.account.id: {key: f"J{modseq}" for key, modseq in news.items()}}
        told = json.dumps({"@type": "StateChange", "changed": changed})
        return f"event: state\ndata: {told}\n\n".encode()

    def _send(self, data: bytes) -> None:
        framed = b"%x\r\n%s\r\n" % (len(data), data) if self.options.chunked else data
        self.connection.sock.sendall(framed)


class Streams(list[Stream]):
    """The open event streams, and what can befall them all at once."""

    opened = 0  # how many there ever were

    def drop(self) -> None:
        for stream in self:
            stream.connection.abort()
        self.close()

    def close(self) -> None:
        self.send_raw(None)

    def hang(self) -> None:
        """They stay open and send nothing more (but `send_raw`)."""
        for stream in self:
            stream.hung = True

    def send_raw(self, data: bytes | None) -> None:
        for stream in self:
            stream.outbox.put(data)


class JMAPServer(AbstractContextManager["JMAPServer"]):
    """One account behind a socket on loopback; listens from the start until `stop`."""

    def __init__(
        self,
        options: Options | None = None,
        account: Account | None = None,
        *,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.options = options or Options()
        self.account = account or Account(id_is_uid=self.options.id_is_uid)
        self.kinds: JSON = {kind.name: kind(self.account, self.options) for kind in KINDS}
        self.requests: list[Request] = []
        self.writes: list[Write] = []
        self.faults: list[Fault] = []
        # Asked before `faults`, with the number of the request (from 1) and the request.
        self.on_request: Callable[[int, Request], Fault | None] | None = None
        self.crashes: list[Exception] = []  # of this server: a test that meets one has found it
        self.streams = Streams()
        self.port = 0
        self._count = self._busy = 0
        self._ssl_context = ssl_context
        self._clients = Pool()
        self.resume()

    @classmethod
    def with_mailroom_account(
        cls, options: Options | None = None, categories: Iterable[str] = CATEGORIES, **more: Any
    ) -> JMAPServer:
        options = options or Options()
        account = Account.for_mailroom(categories, id_is_uid=options.id_is_uid)
        for group in [*account.groups] if options.groups_in_use else []:
            account.change_card(group, members={BYSTANDER: True})
        return cls(options, account, **more)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def resume(self) -> None:
        """Listens, on the same port as before."""
        self._listener = StreamServer(("127.0.0.1", self.port), self._serve, spawn=self._clients)
        self._listener.start()
        self.port = int(self._listener.server_port or 0)

    def pause(self) -> None:
        """Cuts all connections and refuses new ones until `resume`."""
        self._listener.close()
        for client in set(self._clients) - {gevent.getcurrent()}:
            client.kill(block=False)
        gevent.sleep(0)

    stop = pause

    def restart(self) -> None:
        self.pause()
        self.resume()

    @property
    def origin(self) -> str:
        return f"{'https' if self._ssl_context else 'http'}://127.0.0.1:{self.port}"

    @property
    def session_url(self) -> str:
        return self.origin + SESSION_PATH

    def calls(self, method: str) -> list[JSON]:
        return [args for one in self.requests for name, args in one.calls if name == method]

    def count(self, what: str) -> int:
        return sum(request.matches(what) for request in self.requests)

    def wait_for(self, condition: Callable[[], object], seconds: float = 20) -> None:
        with gevent.Timeout(seconds, AssertionError(f"waited {seconds} s for {condition}")):
            while not condition():
                gevent.sleep(0.002)

    def limit(self, name: str) -> int:
        return self.options.limits.get(name, LIMITS[name])

    def capabilities(self) -> JSON:
        options = self.options
        offered = {MAIL: options.has_mail, SUBMISSION: options.has_submission}
        offered[CONTACTS] = options.has_contacts
        others: JSON = {name: {} for name, is_offered in offered.items() if is_offered}
        return {CORE: LIMITS | options.limits} | others

    def session(self) -> JSON:
        options, capabilities = self.options, self.capabilities()
        account = {
            "name": options.username,
            "isPersonal": True,
            "isReadOnly": options.read_only,
            "accountCapabilities": {name: {} for name in capabilities},
        }
        session = {
            "capabilities": capabilities,
            "accounts": {self.account.id: account},
            "primaryAccounts": dict.fromkeys(capabilities, self.account.id),
            "username": options.username,
            "apiUrl": self._url(API_PATH),
            "downloadUrl": self._url("/jmap/download/{accountId}/{blobId}/{name}?accept={type}"),
            "uploadUrl": self._url(UPLOAD_PATH + "{accountId}/"),
        }
        if options.push is not None:
            template = "?types={types}&closeafter={closeafter}&ping={ping}"
            ending = template if options.event_template else ""
            session["eventSourceUrl"] = self._url(EVENT_PATH + ending)
        return session | {"state": format(zlib.crc32(json.dumps(session).encode()), "x")}

    def _url(self, path: str) -> str:
        return path if self.options.relative_urls else self.origin + path

    def _serve(self, sock: socket.socket, _address: object) -> None:
        with suppress(OSError):
            if self._ssl_context:
                sock = self._ssl_context.wrap_socket(sock, server_side=True)
            with closing(Connection(sock)) as connection:
                while self._exchange(connection):
                    pass

    def _exchange(self, connection: Connection) -> bool:
        """One request and what is to become of it; False when the connection ends."""
        if not (request := connection.read_request()):
            return False
        fault = self._note_request(request)
        gevent.sleep(self.options.latency)
        has_reply = fault.status is not None or fault.body is not None
        works = fault.work or not (fault.hang or fault.drop or has_reply)
        reply = self._work(request, fault) if works else Reply(200)
        if fault.after:
            fault.after()
        gevent.sleep(fault.delay)
        if fault.hang or fault.drop:
            (connection.wait_for_end if fault.hang else connection.abort)()
            return False
        if has_reply:
            reply = Reply(fault.status or 200, fault.body or b"")
        reply.headers |= fault.headers
        request.status = reply.status
        request.answered = len(reply.body) if isinstance(reply.body, bytes) else 0
        connection.send(reply, fault)
        keeps_alive = request.headers.get("connection", "").lower() != "close"
        return reply.is_whole and fault.truncate is None and keeps_alive

    def _note_request(self, request: Request) -> Fault:
        """Records it, and returns the fault it meets: the first of those due, or one of nothing."""
        self._count += 1
        self.requests.append(request)
        del self.requests[: max(0, len(self.requests) - self.options.history)]
        due = [fault for fault in self.faults if fault.due(request)]
        if self.on_request and (fault := self.on_request(self._count, request)):
            return fault
        return due[0] if due else Fault()

    def _work(self, request: Request, fault: Fault) -> Reply:
        self._busy += 1
        try:
            return self._route(request, fault)
        except ProblemError as problem:
            return Reply.of_json(problem.body, 400)
        except Exception as crash:
            traceback.print_exc()
            self.crashes.append(crash)
            return Reply(500, b"the test server crashed")
        finally:
            self._busy -= 1

    def _route(self, request: Request, fault: Fault) -> Reply:
        kind = request.kind
        if not self._is_authorized(request):
            return Reply(401, headers={"WWW-Authenticate": 'Bearer realm="jmap"'})
        is_json = request.headers.get("content-type", "").partition(";")[0] == "application/json"
        if kind == "api" and not is_json:
            return Reply(415)
        if kind == "other":
            return Reply(404)
        if request.method != ("POST" if kind in ("api", "upload") else "GET"):
            return Reply(405)
        if kind in ("stream", "upload"):
            return self._event_source(request) if kind == "stream" else self._upload(request)
        answer = self._api(request, fault) if kind == "api" else self.session()
        return Reply.of_json(fault.edit(answer) if fault.edit else answer)

    def _is_authorized(self, request: Request) -> bool:
        username, token = self.options.username, self.options.token
        basic = base64.b64encode(f"{username}:{token}".encode()).decode()
        return request.headers.get("authorization") in (f"Bearer {token}", f"Basic {basic}")

    def _api(self, request: Request, fault: Fault) -> JSON:
        used = {"maxSizeRequest": request.size, "maxConcurrentRequests": self._busy}
        for name, number in used.items():
            if number > self.limit(name):
                raise ProblemError("limit", limit=name)
        if request.json is None:
            raise ProblemError("notJSON")
        return Run(self, request.json, fault).answer()

    def _upload(self, request: Request) -> Reply:
        blob_id = f"G{len(self.account.blobs)}"
        self.account.blobs[blob_id] = request.body
        told: JSON = {"accountId": self.account.id, "blobId": blob_id, "size": request.size}
        return Reply.of_json(told | {"type": request.headers.get("content-type", "")}, 201)

    def _event_source(self, request: Request) -> Reply:
        if self.options.push != 200:
            return Reply(self.options.push or 404)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        headers |= {"Transfer-Encoding": "chunked"} if self.options.chunked else {}
        return Reply(200, headers=headers, takes_over=Stream(self, request).run)
