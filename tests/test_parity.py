"""The embedded JMAP server answers as a real Cyrus does: the same account on both, the same
requests to both, and the answers compared, with ids and states normalised. Where the two may
differ, a table says why, and a test that they still do.

Cyrus is 3.6.1 without a search index, and has no JMAP Contacts."""

import imaplib
import json
import time
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
import requests
from cyrus_server import CyrusServer
from jmap_server import CORE, MAIL, SUBMISSION, JMAPServer, Options

pytestmark = pytest.mark.cyrus

JSON = dict[str, Any]
BOXES = {"Screener": None, "Feed": None, "Mine": None, "Nested": "Feed", "Trash": None}
ROLES = {"Trash": "trash"}
MAILS = {
    # subject: mailbox, From, keywords
    "first": ("Screener", "Bob Smith <Bob@Shop.example>", []),
    "second": ("Screener", '"Smith, Eve" <eve@other.example>', ["$seen"]),
    "third": ("Feed", "=?utf-8?q?B=C3=B6b?= <bob@shop.example>", ["$flagged"]),
    "fourth": ("Nested", "bob@shop.example, eve@other.example", []),
    "fifth": ("Mine", None, ["$seen", "$flagged"]),
}
RECEIVED = {name: datetime(2025, 1, n, 12, n, tzinfo=UTC) for n, name in enumerate(MAILS, 1)}
TO = "alice@home.example"
LEFT_OUT = (
    *("description", "detail", "title", "arguments"),  # said for people
    *("filter", "sort", "collapseThreads", "canCalculateChanges"),  # Cyrus repeats the request
)
STATES = ("state", "oldState", "newState", "queryState")


class Account:
    """The account on one of the servers. Names in a request (`{mail:first}`, `{box:Feed}`,
    `{account}`, `{state}`) become ids, and ids in an answer become names."""

    def __init__(self, url: str, token: str, account_id: str) -> None:
        self.url, self.token = url, token
        self.http = requests.Session()
        self.http.trust_env = False
        self.http.headers["Authorization"] = f"Bearer {token}"
        self.ids = {"{account}": account_id}
        self._states: dict[tuple[str, str], str] = {}

    def learn(self) -> None:
        """Ask for the ids of all there is."""
        found = {"resultOf": "0", "name": "Email/query", "path": "/ids"}
        properties = ["subject", "blobId", "threadId"]
        get = {"#ids": found, "properties": properties}
        everything = [["Email/query", {}, "0"], ["Email/get", get, "1"], ["Mailbox/get", {}, "2"]]
        answer = self.post(self.filled({"using": [CORE, MAIL], "methodCalls": everything})).json()
        [_, [_, mails, _], [_, boxes, _]] = answer["methodResponses"]
        for mail in mails["list"]:
            for kind in ("id", "blobId", "threadId"):
                self.ids[f"{{{'mail' if kind == 'id' else kind}:{mail['subject']}}}"] = mail[kind]
        self.ids |= {f"{{box:{box['name']}}}": box["id"] for box in boxes["list"]}
        self.ids["{state}"] = mails["state"]

    def filled(self, body: JSON) -> JSON:
        """The request with ids for names, and the account given in each call."""
        for call in body.get("methodCalls", []):
            if len(call) < 2:
                continue
            call[1] = {"accountId": "{account}", **call[1]}
        text = json.dumps(body)
        for name, identity in self.ids.items():
            text = text.replace(name, identity)
        return dict(json.loads(text))

    def post(self, body: Any, **headers: str) -> requests.Response:
        sent = {"Content-Type": "application/json", **headers}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(self.url, data=data, headers=sent, timeout=30)

    def ask(self, calls: list[Any]) -> Any:
        """The normalised answers to some calls."""
        numbered = [[*call, str(n)][:3] for n, call in enumerate(calls)]
        body = {"using": [CORE, MAIL], "methodCalls": numbered}
        reply = self.post(self.filled(json.loads(json.dumps(body))))
        answers = reply.json()["methodResponses"]
        with_total = "calculateTotal" in json.dumps(calls)
        return [self._answer(name, said, tag, with_total) for name, said, tag in answers]

    def _answer(self, method: str, answer: JSON, tag: str, with_total: bool) -> Any:
        for key in [key for key in STATES if key in answer]:
            kind = method if key == "queryState" else method.partition("/")[0]
            answer[key] = self._state(kind, answer[key])
        if not with_total:  # Cyrus tells it unasked
            answer.pop("total", None)
        named = self.named(answer)
        for key in ("list", "notFound"):
            if isinstance(named.get(key), list):
                named[key].sort(key=json.dumps)
        return [method, named, tag]

    def session(self) -> JSON:
        """The session, normalised."""
        path = "/jmap/" if self.url.endswith("/jmap/") else "/jmap/session"
        reply = self.http.get(urllib.parse.urljoin(self.url, path), timeout=30)
        return dict(self.named(reply.json()))

    def _state(self, kind: str, state: str) -> str:
        """States are numbered as they come, so that equal ones stay equal."""
        number = sum(known == kind for known, _ in self._states)
        return self._states.setdefault((kind, state), f"{kind} state {number}")

    def named(self, value: Any) -> Any:
        """An answer with names for ids, without what is said for people only."""
        names = {identity: name for name, identity in self.ids.items()}
        if isinstance(value, list):
            return [self.named(each) for each in value]
        if not isinstance(value, dict):
            if not isinstance(value, str):
                return value
            path, slash, last = value.rpartition("/")  # as in mailboxIds/ID
            return path + slash + names.get(last, last)
        return {
            names.get(key, key): self.named(each)
            for key, each in value.items()
            if key not in LEFT_OUT
        }


class Pair(NamedTuple):
    """The account on Cyrus and the same on the embedded server."""

    cyrus: Account
    embedded: Account

    def both(self, ask: Callable[[Account], Any]) -> tuple[Any, Any]:
        return ask(self.cyrus), ask(self.embedded)


def cyrus_account(server: CyrusServer) -> Account:
    user = server.add_user(f"alice{time.monotonic_ns()}")
    for name, parent in BOXES.items():
        user.create_mailbox(f"{parent}/{name}" if parent else name, ROLES.get(name))
    with server.imap(user.address) as connection:
        for subject, (box, _, keywords) in MAILS.items():
            path = f"{BOXES[box]}/{box}" if BOXES[box] else box
            flags = " ".join(keyword.replace("$", "\\") for keyword in keywords)
            received = imaplib.Time2Internaldate(RECEIVED[subject])
            connection.append(path, flags, received, mail_of(subject))
    user.http.close()
    account = Account(user.jmap_url, user.token, user.username)
    account.learn()
    return account


def mail_of(subject: str) -> bytes:
    sender = MAILS[subject][1]
    date = RECEIVED[subject].strftime("%a, %d %b %Y %H:%M:%S +0000")
    lines = [*([f"From: {sender}"] if sender else []), f"To: {TO}", f"Subject: {subject}"]
    lines += [f"Date: {date}", f"Message-ID: <{subject}@mail.example>", "", "Hello.", ""]
    return "\r\n".join(lines).encode()


def embedded_account(server: JMAPServer) -> Account:
    server.account.add_mailbox("Inbox", role="inbox")
    for name, parent in BOXES.items():
        server.account.add_mailbox(name, parent, ROLES.get(name))
    for subject, (box, sender, keywords) in MAILS.items():
        received = RECEIVED[subject].strftime("%Y-%m-%dT%H:%M:%SZ")
        server.account.deliver(
            sender, [box], subject=subject, received_at=received, keywords=keywords
        )
    account = Account(f"{server.origin}/jmap/api/", server.options.token, server.account.id)
    account.learn()
    return account


def pair_on(cyrus: CyrusServer) -> Iterator[Pair]:
    with JMAPServer(Options.cyrus(from_search="error", last_mailbox="refuse")) as embedded:
        yield Pair(cyrus_account(cyrus), embedded_account(embedded))
        assert not embedded.crashes


@pytest.fixture
def pair(cyrus: CyrusServer) -> Iterator[Pair]:
    """The account, for a test that changes it."""
    yield from pair_on(cyrus)


@pytest.fixture(scope="module")
def readers(cyrus: CyrusServer) -> Iterator[Pair]:
    """The account, for tests that only look."""
    yield from pair_on(cyrus)


def query(filter_: JSON | None = None, **more: Any) -> list[Any]:
    """An Email/query in a defined order."""
    sort = [{"property": "receivedAt", "isAscending": False}]
    return ["Email/query", {"filter": filter_, "sort": sort, **more}]


def any_of(*conditions: JSON) -> JSON:
    return {"operator": "OR", "conditions": list(conditions)}


def get(*properties: str, **more: Any) -> list[Any]:
    return ["Email/get", {"properties": list(properties), **more}]


def ref(name: str, path: str, result_of: str = "0") -> JSON:
    return {"resultOf": result_of, "name": name, "path": path}


SCREENER, FEED = {"inMailbox": "{box:Screener}"}, {"inMailbox": "{box:Feed}"}
READS: dict[str, list[Any]] = {
    "mailboxes, what Mailroom asks": [
        [
            "Mailbox/get",
            {"ids": None, "properties": ["id", "name", "parentId", "role", "totalEmails"]},
        ]
    ],
    "mailboxes, some unknown": [
        ["Mailbox/get", {"ids": ["{box:Feed}", "nope"], "properties": ["name"]}]
    ],
    "mailboxes, none": [["Mailbox/get", {"ids": []}]],
    "mailboxes, unknown property": [["Mailbox/get", {"properties": ["nope"]}]],
    "query all": [query()],
    "query in a mailbox": [query(SCREENER)],
    "query in any of two": [query(any_of(SCREENER, FEED))],
    "query in one of one": [query(any_of(FEED))],
    "query in an unknown mailbox": [query({"inMailbox": "nope"})],
    "query in known and unknown": [query(any_of(SCREENER, {"inMailbox": "nope"}))],
    "query and": [query({"operator": "AND", "conditions": [any_of(SCREENER, FEED), SCREENER]})],
    "query of nothing": [query({})],
    "query two conditions": [query({**SCREENER, "header": ["From", "bob"]})],
    "query from": [query({"from": "bob@shop.example"})],
    "query header": [query({"header": ["From", "bob@shop.example"]})],
    "query header, other case": [query({"header": ["from", "BOB@SHOP.EXAMPLE"]})],
    "query header, part": [query({"header": ["From", "shop.ex"]})],
    "query header, display name": [query({"header": ["From", "smith"]})],
    "query header in mailboxes": [
        query(
            {
                "operator": "AND",
                "conditions": [any_of(SCREENER, FEED), any_of({"header": ["From", "bob@shop"]})],
            }
        )
    ],
    "query header, none": [query({"header": ["From", "nobody@nowhere.example"]})],
    "query unknown filter": [query({"nope": "x"})],
    "query unknown operator": [query({"operator": "XOR", "conditions": [SCREENER]})],
    "query wrong type": [query({"inMailbox": 5})],
    "query ascending": [query(sort=[{"property": "receivedAt"}])],
    "query unknown sort": [query(sort=[{"property": "nope"}])],
    "page, first": [query(limit=2, calculateTotal=True)],
    "page, second": [query(limit=2, position=2, calculateTotal=True)],
    "page, last": [query(limit=2, position=4, calculateTotal=True)],
    "page, beyond": [query(limit=2, position=9, calculateTotal=True)],
    "page, no limit": [query(position=3)],
    "page, limit 0": [query(limit=0, calculateTotal=True)],
    "page, no total": [query(limit=2)],
    "page, anchor": [query(anchor="{mail:third}", limit=1)],
    "page, anchor and offset": [query(anchor="{mail:third}", anchorOffset=-1, limit=2)],
    "page, anchor unknown": [query(anchor="nope")],
    "mails, what Mailroom asks": [
        query(),
        get("id", "mailboxIds", "from", "receivedAt", **{"#ids": ref("Email/query", "/ids")}),
    ],
    "mails, more": [
        query(),
        get("subject", "keywords", "to", "hasAttachment", **{"#ids": ref("Email/query", "/ids")}),
    ],
    "mails, raw header": [get("header:From", ids=["{mail:first}", "{mail:fifth}"])],
    "mails, some unknown": [get("subject", ids=["{mail:first}", "nope"])],
    "mails, one twice": [get("subject", ids=["{mail:first}", "{mail:first}"])],
    "mails, none": [get(ids=[])],
    "mails, unknown property": [get("nope", ids=["{mail:first}"])],
    "reference, index": [query(), get("subject", **{"#ids": ref("Email/query", "/nope")})],
    "reference, unknown call": [get("subject", **{"#ids": ref("Email/query", "/ids", "9")})],
    "reference, wrong name": [query(), get("subject", **{"#ids": ref("Email/get", "/ids")})],
    "reference to an error": [
        query({"nope": 1}),
        get("subject", **{"#ids": ref("Email/query", "/ids")}),
    ],
    "reference and the same": [
        query(),
        get("subject", **{"#ids": ref("Email/query", "/ids"), "ids": []}),
    ],
    "unknown method": [["Email/nope", {}], query()],
    "unknown argument": [["Email/get", {"ids": [], "nope": 1}]],
    "another account": [["Email/get", {"ids": [], "accountId": "nope"}]],
    "wrong type": [["Email/get", {"ids": "nope"}]],
    "echo": [["Core/echo", {"a": [1, {"b": None}]}]],
    "same tag twice": [[*query(SCREENER), "x"], [*query(FEED), "x"]],
}


def patch(mail: str, **boxes: bool | None) -> JSON:
    return {f"{{mail:{mail}}}": {f"mailboxIds/{{box:{name}}}": to for name, to in boxes.items()}}


def update(*patches: JSON, **more: Any) -> list[Any]:
    """An Email/set of some patches."""
    return ["Email/set", {"update": {key: one[key] for one in patches for key in one}, **more}]


def first(patch: JSON) -> list[Any]:
    return update({"{mail:first}": patch})


LOOK = [
    get("mailboxIds", "keywords", ids=["{mail:first}", "{mail:third}"]),
    query(SCREENER),
    query(FEED),
]
MAILBOX_STATE = ["Mailbox/get", {"ids": []}]
WRITES: dict[str, list[list[Any]]] = {
    # requests, one after the other, each a list of calls
    "file": [[update(patch("first", Feed=True, Screener=None))], LOOK],
    "file again": [[update(patch("first", Feed=True, Screener=None))]] * 2 + [LOOK],
    "label and unlabel": [
        [update(patch("first", Feed=True))],
        [update(patch("first", Feed=True, Screener=True))],
        [update(patch("first", Feed=None, Screener=True))],
        LOOK,
    ],
    "take out of where it is not": [[update(patch("first", Feed=None, Screener=True))], LOOK],
    "two mails, one unknown": [
        [update(patch("first", Feed=True), patch("third", Screener=True), {"nope": {}})],
        LOOK,
    ],
    "an unknown mailbox": [
        [update(patch("first", Feed=True), {"{mail:third}": {"mailboxIds/nope": True}})],
        LOOK,
    ],
    "an unknown mailbox, removed": [
        [first({"mailboxIds/nope": None, "mailboxIds/{box:Feed}": True})],
        LOOK,
    ],
    "false": [[update(patch("first", Feed=False))], LOOK],
    "not a boolean": [[first({"mailboxIds/{box:Feed}": "x"})], LOOK],
    "all mailboxes": [[first({"mailboxIds": {"{box:Feed}": True}})], LOOK],
    "no mailboxes": [[first({"mailboxIds": {}})], LOOK],
    "the only mailbox": [[update(patch("first", Screener=None))]],
    "the last mailbox": [
        [update(patch("first", Feed=True))],
        [update(patch("first", Feed=None, Screener=None))],
        [query()],
    ],
    "the last mailbox, after a move": [
        [update(patch("first", Feed=True, Screener=None))],
        [update(patch("first", Feed=None))],
        [query()],
    ],
    "parent and child": [
        [first({"mailboxIds": {"{box:Feed}": True}, "mailboxIds/{box:Screener}": True})],
        LOOK,
    ],
    "an unknown property": [[first({"nope": 1})], LOOK],
    "a fixed property": [[first({"subject": "other"})], LOOK],
    "an empty patch": [[first({})], LOOK],
    "keywords": [[first({"keywords/$seen": True})], LOOK, [first({"keywords/$seen": None})], LOOK],
    "keywords, all": [[first({"keywords": {"$flagged": True}})], LOOK],
    "nothing at all": [[["Email/set", {}]]],
    "nothing to update": [[["Email/set", {"update": {}}]]],
    "in this state": [[update(patch("first", Feed=True), ifInState="{state}")], LOOK],
    "in another state": [[update(patch("first", Feed=True), ifInState="nope")], LOOK],
    "states around a write": [
        [get(ids=[]), update(patch("first", Feed=True)), get(ids=[])],
        [get(ids=[])],
    ],
    "states of a write of nothing": [
        [get(ids=[]), update(patch("first", Screener=True)), get(ids=[])]
    ],
    "states of mailboxes": [
        [MAILBOX_STATE, update(patch("first", Feed=True)), MAILBOX_STATE],
        [MAILBOX_STATE],
    ],
    "two writes in a request": [
        [update(patch("first", Feed=True)), update(patch("third", Screener=True))],
        LOOK,
    ],
    "an unknown argument": [[["Email/set", {"nope": 1}]]],
}  # fmt: skip

REQUESTS: dict[str, tuple[Any, dict[str, str]]] = {
    # body, headers
    "not json": (b"{", {}),
    "not utf-8": (b'{"using": ["\xff"]}', {}),
    "a list": ([], {}),
    "empty": ({}, {}),
    "no using": ({"methodCalls": []}, {}),
    "no calls": ({"using": [CORE]}, {}),
    "calls that are none": ({"using": [CORE], "methodCalls": [["Core/echo"]]}, {}),
    "unknown capability": ({"using": [CORE, "nope"], "methodCalls": []}, {}),
    "nothing to do": ({"using": [CORE], "methodCalls": []}, {}),
    "51 calls": ({"using": [CORE], "methodCalls": [["Core/echo", {}, "0"]] * 51}, {}),
    "50 calls": ({"using": [CORE], "methodCalls": [["Core/echo", {}, "0"]] * 50}, {}),
    "not using": ({"using": [CORE], "methodCalls": [["Email/get", {"ids": []}, "0"]]}, {}),
    "as text": (b"{}", {"Content-Type": "text/plain"}),
    "wrong token": ({"using": [CORE], "methodCalls": []}, {"Authorization": "Bearer nope"}),
    "no token": ({"using": [CORE], "methodCalls": []}, {"Authorization": ""}),
}

OLD_NAME = "Cyrus 3.6 has the name of a draft: resultReference (RFC 8620 section 3.7 another)"
UNSUPPORTED = (
    "Cyrus calls an unknown filter invalidArguments, RFC 8620 section 5.5 unsupportedFilter"
)
DIFFERS: dict[str, str] = {
    # what Cyrus 3.6.1 has otherwise than the RFC, which the embedded server follows
    "query unknown filter": UNSUPPORTED,
    "page, beyond": "Cyrus tells the position of the end; RFC 8620 section 5.5 says only: no ids",
    "mails, one twice": "Cyrus lists it twice, against RFC 8620 section 5.1",
    "reference, index": OLD_NAME,
    "reference, unknown call": OLD_NAME,
    "reference, wrong name": OLD_NAME,
    "reference to an error": f"{OLD_NAME}; {UNSUPPORTED}",
    "the last mailbox, after a move": "Cyrus says updated and the mail is gone; "
    'Options.last_mailbox="lose" is that, always',
    "parent and child": "Cyrus takes a patch inside of another, against RFC 8620 section 5.3",
    "a fixed property": "Cyrus says updated, and leaves it; RFC 8621 section 4.6 refuses it",
}


def check(name: str, real: Any, ours: Any) -> None:
    """The answers are the same, or they differ and it is known why."""
    if name in DIFFERS:
        assert real != ours, f"they no longer differ: {DIFFERS[name]}"
    else:
        assert ours == real


@pytest.mark.parametrize("name", READS)
def test_reading(readers: Pair, name: str) -> None:
    check(name, *readers.both(lambda account: account.ask(READS[name])))


@pytest.mark.parametrize("name", WRITES)
def test_writing(pair: Pair, name: str) -> None:
    check(name, *pair.both(lambda account: [account.ask(calls) for calls in WRITES[name]]))


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_as_a_whole(readers: Pair, name: str) -> None:
    body, headers = REQUESTS[name]

    def ask(account: Account) -> Any:
        sent = account.filled(json.loads(json.dumps(body))) if isinstance(body, dict) else body
        reply = account.post(sent, **headers)
        is_json = "json" in reply.headers.get("Content-Type", "")
        answer = account.named(reply.json()) if is_json else None
        if answer and "sessionState" in answer:
            answer["sessionState"] = "a state"
        return reply.status_code, answer

    check(name, *readers.both(ask))


def kinds(value: Any) -> Any:
    """A value with its leaves replaced by the names of their types."""
    if isinstance(value, dict):
        return {key: kinds(each) for key, each in value.items()}
    return type(value).__name__


SESSION = (
    # what Mailroom reads of a session: where, of which kind
    ("capabilities", MAIL),
    ("accounts", "{account}", "isReadOnly"),
    ("accounts", "{account}", "isPersonal"),
    ("accounts", "{account}", "accountCapabilities", CORE),
    ("primaryAccounts", MAIL),
    ("primaryAccounts", SUBMISSION),
    *((key,) for key in ("username", "apiUrl", "eventSourceUrl", "downloadUrl", "state")),
)


@pytest.mark.parametrize("path", SESSION, ids="/".join)
def test_the_session_has_the_same_shape(readers: Pair, path: tuple[str, ...]) -> None:
    def ask(account: Account) -> Any:
        value: Any = account.session()
        for part in path:
            value = value[part]
        return kinds(value)

    real, ours = readers.both(ask)
    assert real == ours


def test_the_session_urls_are_relative_and_push_is_a_template(readers: Pair) -> None:
    for session in readers.both(Account.session):
        assert session["apiUrl"].startswith("/")
        assert session["eventSourceUrl"].endswith(
            "?types={types}&closeafter={closeafter}&ping={ping}"
        )
        assert session["primaryAccounts"][MAIL] == "{account}"


def test_limits_that_mailroom_heeds_are_the_same(readers: Pair) -> None:
    names = ("maxCallsInRequest", "maxObjectsInGet", "maxObjectsInSet")
    real, ours = readers.both(lambda account: account.session()["capabilities"][CORE])
    assert [real[name] for name in names] == [ours[name] for name in names]
