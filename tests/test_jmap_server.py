"""The embedded JMAP server keeps a real server's rules, and breaks them only as it is told."""

import itertools
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import pytest
import requests
import urllib3
from jmap_server import (
    CONTACTS,
    CORE,
    FOREVER,
    JSON,
    MAIL,
    SIEVE,
    SUBMISSION,
    Account,
    Fault,
    JMAPServer,
    Options,
)

USING = [CORE, MAIL, SUBMISSION, CONTACTS]
CARD: JSON = {"@type": "Card", "version": "1.0"}


class Client:
    """Speaks plain JMAP to the server, and trusts nothing it knows from inside."""

    def __init__(self, server: JMAPServer) -> None:
        self.server = server
        self.http = requests.Session()
        self.http.trust_env = False
        self.http.headers["Authorization"] = f"Bearer {server.options.token}"

    def get(self, path: str, **more: Any) -> requests.Response:
        return self.http.get(self.server.origin + path, timeout=5, **more)

    def post(self, body: Any, **more: Any) -> requests.Response:
        url = self.server.origin + "/jmap/api/"
        return self.http.post(url, json=body, **{"timeout": 5, **more})

    def calls(self, *calls: tuple[str, JSON]) -> list[Any]:
        """The replies to several calls in one request, whose ids are "0", "1" ..."""
        numbered = [
            [name, {"accountId": "u1", **args}, str(number)]
            for number, (name, args) in enumerate(calls)
        ]
        using = [*USING, SIEVE] if self.server.options.sieve else USING
        reply = self.post({"using": using, "methodCalls": numbered})
        assert reply.status_code == 200, reply.text
        return list(reply.json()["methodResponses"])

    def call(self, method: str, **args: Any) -> JSON:
        """The arguments of the reply, or of its error."""
        ((name, result, _),) = self.calls((method, args))
        assert name in (method, "error")
        return dict(result)

    def upload(self, data: bytes) -> requests.Response:
        url = self.server.origin + "/jmap/upload/u1/"
        headers = {"Content-Type": "application/sieve"}
        return self.http.post(url, data=data, headers=headers, timeout=5)

    def set_scripts(self, **args: Any) -> JSON:
        return self.call("SieveScript/set", **args)

    def update(self, object_id: str, patch: JSON, kind: str = "Email") -> JSON:
        """The SetError of one update, or nothing."""
        reply = self.call(f"{kind}/set", update={object_id: patch})
        return dict((reply["notUpdated"] or {}).get(object_id, {}))

    def query(self, **where: Any) -> list[str]:
        return list(self.call("Email/query", filter=where)["ids"])

    def stream(self, query: str = "?types=*&closeafter=no&ping=0", **headers: str) -> "Events":
        accept = {"Accept": "text/event-stream"} | headers
        seen = self.server.streams.opened
        reply = self.get("/jmap/event/" + query, headers=accept, stream=True)
        assert reply.status_code == 200
        self.server.wait_for(lambda: self.server.streams.opened > seen)
        return Events(reply)


class Events:
    """Reads a stream event by event."""

    def __init__(self, reply: requests.Response) -> None:
        self.reply = reply
        self._text = ""

    def next(self) -> str:
        """The next event; empty at the end of the stream."""
        while "\n\n" not in self._text:
            with gevent.Timeout(5):
                data = self.reply.raw.read1(65536)
            if not data:
                return ""
            self._text += data.decode()
        event, _, self._text = self._text.partition("\n\n")
        return event


@pytest.fixture
def server() -> Iterator[JMAPServer]:
    with JMAPServer.with_mailroom_account() as server:
        yield server
        assert not server.crashes


@pytest.fixture
def account(server: JMAPServer) -> Account:
    return server.account


@pytest.fixture
def client(server: JMAPServer) -> Client:
    return Client(server)


@pytest.fixture
def mail(account: Account) -> str:
    return account.deliver("Bob <bob@shop.example>", ["Screener"])


# Session and requests


def test_the_session_names_account_urls_and_limits(server: JMAPServer, client: Client) -> None:
    server.options.limits["maxObjectsInGet"] = 7
    session = client.get("/jmap/session").json()
    assert session["apiUrl"] == server.origin + "/jmap/api/"
    assert session["capabilities"][CORE]["maxObjectsInGet"] == 7
    assert session["primaryAccounts"][MAIL] in session["accounts"]
    assert "{types}" in session["eventSourceUrl"]
    echo = client.post({"using": [CORE], "methodCalls": [["Core/echo", {"a": 1}, "c"]]}).json()
    assert echo == {
        "methodResponses": [["Core/echo", {"a": 1}, "c"]],
        "sessionState": echo["sessionState"],
    }
    assert echo["sessionState"] == session["state"]


@pytest.mark.parametrize(
    ("options", "event_source"),
    [
        (Options.cyrus(), "/jmap/event/?types={types}&closeafter={closeafter}&ping={ping}"),
        (Options.fastmail(relative_urls=True), "/jmap/event/"),
        (Options(push=None), None),
    ],
)
def test_the_event_source_url_is_a_template_bare_or_absent(
    options: Options, event_source: str | None
) -> None:
    with JMAPServer(options) as server:
        assert Client(server).get("/jmap/session").json().get("eventSourceUrl") == event_source


def test_an_account_may_lack_contacts_and_be_read_only(server: JMAPServer, client: Client) -> None:
    server.options.has_contacts, server.options.read_only = False, True
    (account,) = client.get("/jmap/session").json()["accounts"].values()
    assert account["isReadOnly"]
    assert CONTACTS not in account["accountCapabilities"]
    server.options.has_contacts = True
    assert client.call("Email/set", update={}) == {"type": "accountReadOnly"}


def test_the_well_known_url_redirects_to_the_session(client: Client) -> None:
    reply = client.get("/.well-known/jmap")
    assert [one.status_code for one in reply.history] == [302]
    assert reply.json()["username"]


def test_a_bearer_token_or_a_password_opens_the_account(server: JMAPServer) -> None:
    def status(**auth: Any) -> int:
        return requests.get(server.session_url, timeout=5, **auth).status_code

    pair = (server.options.username, server.options.token)
    assert status(auth=pair) == 200
    assert status(auth=("bob", server.options.token)) == 401
    assert status(headers={"Authorization": "Bearer wrong"}) == 401
    assert status() == 401


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"{", {"type": "urn:ietf:params:jmap:error:notJSON"}),
        (b"[]", {"type": "urn:ietf:params:jmap:error:notRequest"}),
        (
            b'{"using": [], "methodCalls": [["a"]]}',
            {"type": "urn:ietf:params:jmap:error:notRequest"},
        ),
        (
            b'{"using": ["urn:x"], "methodCalls": []}',
            {"type": "urn:ietf:params:jmap:error:unknownCapability"},
        ),
        (
            b'{"using": [], "methodCalls": [["a", {}, "0"], ["a", {}, "1"], ["a", {}, "2"]]}',
            {"type": "urn:ietf:params:jmap:error:limit", "limit": "maxCallsInRequest"},
        ),
        (
            b'{"using": [], "methodCalls": []}' + b" " * 300,
            {"type": "urn:ietf:params:jmap:error:limit", "limit": "maxSizeRequest"},
        ),
    ],
)
def test_a_bad_request_is_a_problem(
    server: JMAPServer, client: Client, body: bytes, problem: JSON
) -> None:
    server.options.limits.update(maxCallsInRequest=2, maxSizeRequest=300)
    headers = {"Content-Type": "application/json"}
    url = server.origin + "/jmap/api/"
    reply = client.http.post(url, data=body, headers=headers, timeout=5)
    assert (reply.status_code, reply.headers["Content-Type"]) == (400, "application/problem+json")
    assert problem.items() <= reply.json().items()
    text = client.http.post(url, data=body, headers={"Content-Type": "text/plain"}, timeout=5)
    assert text.status_code == 415


def test_requests_at_the_same_time_are_limited(server: JMAPServer, client: Client) -> None:
    server.options.limits["maxConcurrentRequests"] = 1
    server.faults.append(Fault(before_call=lambda *_: gevent.sleep(0.05)))
    echo = {"using": [CORE], "methodCalls": [["Core/echo", {}, "c"]]}
    first = gevent.spawn(Client(server).post, echo)
    server.wait_for(lambda: server.requests)
    assert client.post(echo).json()["limit"] == "maxConcurrentRequests"
    assert first.get().status_code == 200


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (("Email/fly", {}), "unknownMethod"),
        (("Thing/get", {}), "unknownMethod"),
        (("AddressBook/set", {}), "unknownMethod"),
        (("Email/get", {"accountId": "u2"}), "accountNotFound"),
        (("Email/get", {"ids": "M1"}), "invalidArguments"),
        (("Email/get", {"ids": [], "properties": ["nose"]}), "invalidArguments"),
        (("Email/get", {"ids": [], "nose": 1}), "invalidArguments"),
        (("Email/get", {"ids": ["a", "b", "c", "d"]}), "requestTooLarge"),
        (("Email/set", {"destroy": ["a", "b", "c", "d"]}), "requestTooLarge"),
        (("Email/set", {"ifInState": "J0"}), "stateMismatch"),
        (("Email/set", {"update": {"M1": []}}), "invalidArguments"),
        (("Email/changes", {"sinceState": "J999"}), "cannotCalculateChanges"),
        (("Email/query", {"filter": {"nose": 1}}), "unsupportedFilter"),
        (("Email/query", {"filter": {"from": 1}}), "invalidArguments"),
        (("Email/query", {"sort": [{"property": "nose"}]}), "unsupportedSort"),
        (("Email/query", {"limit": -1}), "invalidArguments"),
        (("Email/query", {"anchor": "M0"}), "anchorNotFound"),
    ],
)
def test_a_bad_call_is_an_error(
    server: JMAPServer, client: Client, mail: str, call: tuple[str, JSON], error: str
) -> None:
    server.options.limits.update(maxObjectsInGet=3, maxObjectsInSet=3)
    args = {"update": {mail: []}} if call[1].get("update") else call[1]
    ((name, result, call_id),) = client.calls((call[0], args))
    assert (name, result["type"], call_id) == ("error", error, "0")


def test_a_method_needs_its_capability(client: Client) -> None:
    body = {"using": [CORE], "methodCalls": [["Email/get", {"accountId": "u1", "ids": []}, "c"]]}
    assert client.post(body).json()["methodResponses"] == [
        ["error", {"type": "unknownMethod"}, "c"]
    ]


# References


def test_results_feed_later_calls(account: Account, client: Client) -> None:
    mails = [account.deliver(f"b{n}@shop.example", ["Screener", "Inbox"]) for n in range(3)]
    replies = client.calls(
        ("Email/query", {"filter": {"inMailbox": account.mailbox_id("Screener")}}),
        ("Email/get", {"#ids": {"resultOf": "0", "name": "Email/query", "path": "/ids"}}),
        (
            "Email/get",
            {
                "#ids": {"resultOf": "1", "name": "Email/get", "path": "/list/*/id"},
                "properties": ["from"],
            },
        ),
        ("Email/get", {"#ids": {"resultOf": "0", "name": "Email/get", "path": "/ids"}}),
        ("Email/get", {"#ids": {"resultOf": "0", "name": "Email/query", "path": "/nose"}}),
        ("Email/get", {"#ids": {}, "ids": []}),
    )
    assert [one["from"][0]["email"] for one in replies[2][1]["list"]] == [
        f"b{n}@shop.example" for n in range(3)
    ]
    assert replies[1][1]["list"][0]["mailboxIds"].keys() == account.mails[mails[0]].mailboxes
    errors = [reply[1]["type"] for reply in replies[3:]]
    assert errors == ["invalidResultReference", "invalidResultReference", "invalidArguments"]


def test_a_creation_id_stands_for_what_was_created(
    account: Account, client: Client, mail: str
) -> None:
    replies = client.calls(
        ("Mailbox/set", {"create": {"a": {"name": "A"}}}),
        ("Mailbox/set", {"create": {"b": {"name": "B", "parentId": "#a"}}}),
        ("Email/set", {"update": {mail: {"mailboxIds/#b": True, "keywords/#b": True}}}),
        ("Mailbox/get", {"ids": ["#b"], "properties": ["parentId"]}),
    )
    made = replies[0][1]["created"]["a"]["id"]
    assert replies[3][1]["list"] == [{"id": replies[1][1]["created"]["b"]["id"], "parentId": made}]
    assert account.mailboxes_of(mail) == {"Screener", "B"}
    assert account.mails[mail].keywords == {"#b"}


# Mail


def test_a_mail_has_the_properties_of_rfc_8621(account: Account, client: Client) -> None:
    mail = account.deliver(
        '"Bob B." <bob@shop.example>', ["Inbox"], subject="=?utf-8?q?Caf=C3=A9?="
    )
    (whole,) = client.call("Email/get", ids=[mail])["list"]
    assert {"blobId", "threadId", "size", "preview", "messageId", "sender", "replyTo"} <= set(whole)
    assert whole["from"] == [{"name": "Bob B.", "email": "bob@shop.example"}]
    assert whole["subject"] == "Café"
    reply = client.call("Email/get", ids=[mail, "M0", mail], properties=["keywords"])
    assert (reply["list"], reply["notFound"]) == ([{"id": mail, "keywords": {}}], ["M0"])
    assert client.call("Email/get", ids=[])["state"] == reply["state"] == account.state("Email")


@pytest.mark.parametrize(
    ("header", "parsed"),
    [
        (None, None),
        ("", []),
        ("bob@shop.example", [(None, "bob@shop.example")]),
        ("=?utf-8?b?QsO2Yg==?= <bob@shop.example>", [("Böb", "bob@shop.example")]),
        ("=?no-such?b?!?= <bob@shop.example>", [("=?no-such?b?!?=", "bob@shop.example")]),
        ("a@x.example, B <b@x.example>", [(None, "a@x.example"), ("B", "b@x.example")]),
    ],
)
def test_a_raw_from_header_is_parsed(
    account: Account, client: Client, header: str | None, parsed: list[tuple[str, str]] | None
) -> None:
    (mail,) = client.call("Email/get", ids=[account.deliver(header)])["list"]
    found = mail["from"] and [(one["name"], one["email"]) for one in mail["from"]]
    assert found == parsed


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ({}, "abcd"),
        ({"from": "bob@shop.example"}, "abc"),
        ({"from": "BOB shop"}, "abc"),
        ({"from": "Böb"}, "d"),
        ({"header": ["From", "bob@shop.example"]}, "abc"),
        ({"header": ["from", "utf-8"]}, "d"),
        ({"subject": "hello"}, "abc"),
        ({"text": "other"}, "d"),
        ({"hasKeyword": "$seen"}, "b"),
        ({"notKeyword": "$seen"}, "acd"),
        ({"before": "2025-01-02T00:00:00Z"}, "a"),
        ({"after": "2025-01-02T00:00:00Z"}, "bcd"),
        ({"from": "bob@shop.example", "hasKeyword": "$seen"}, "b"),
        ({"inMailboxOtherThan": ["Inbox"]}, "cd"),
        ({"operator": "AND", "conditions": [{"from": "bob"}, {"hasKeyword": "$seen"}]}, "b"),
        ({"operator": "OR", "conditions": [{"hasKeyword": "$seen"}, {"subject": "other"}]}, "bd"),
        ({"operator": "NOT", "conditions": [{"hasKeyword": "$seen"}, {"subject": "other"}]}, "ac"),
    ],
)
def test_queries_find_what_matches(
    account: Account, client: Client, where: JSON, found: str
) -> None:
    senders = [
        ("Bob <bob@shop.example>", "Inbox", "Hello", ""),
        ("notbob@shop.example", "Inbox", "Hello", "$seen"),
        ('"bob@shop.example" <eve@evil.example>', "Screener", "Hello", ""),
        ("=?utf-8?b?QsO2Yg==?= <d@d.example>", "Screener", "Other", ""),
    ]
    names = {}
    for day, (sender, box, subject, word) in enumerate(senders, start=1):
        received = f"2025-01-0{day}T00:00:00Z"
        words = {word} - {""}
        mail = account.deliver(sender, [box], subject=subject, received_at=received, keywords=words)
        names[mail] = "abcd"[day - 1]
    if "inMailboxOtherThan" in where:
        where = {"inMailboxOtherThan": [account.mailbox_id("Inbox")]}
    ids = client.call("Email/query", filter=where)["ids"]
    assert "".join(names[key] for key in ids) == found


@pytest.mark.parametrize(
    ("args", "page", "position"),
    [
        ({}, "01234", 0),
        ({"sort": [{"property": "receivedAt", "isAscending": False}]}, "43210", 0),
        ({"sort": [{"property": "from"}]}, "02413", 0),
        (
            {"sort": [{"property": "from"}, {"property": "receivedAt", "isAscending": False}]},
            "42031",
            0,
        ),
        ({"position": 3}, "34", 3),
        ({"position": -2}, "34", 3),
        ({"position": -9, "limit": 1}, "0", 0),
        ({"position": 9}, "", 9),
        ({"limit": 0}, "", 0),
        ({"anchor": 2, "limit": 2}, "23", 2),
        ({"anchor": 2, "anchorOffset": -1}, "1234", 1),
    ],
)
def test_queries_sort_and_page(
    account: Account, client: Client, args: JSON, page: str, position: int
) -> None:
    mails = [account.deliver("ab"[number % 2] + "@x.example") for number in range(5)]
    if "anchor" in args:
        args = args | {"anchor": mails[args["anchor"]]}
    reply = client.call("Email/query", **args)
    assert "".join(str(mails.index(key)) for key in reply["ids"]) == page
    assert (reply["position"], reply["queryState"]) == (position, account.state("Email"))
    assert "total" not in reply
    assert client.call("Email/query", **args, calculateTotal=True)["total"] == 5


def test_the_server_may_lower_the_limit(server: JMAPServer, client: Client) -> None:
    mails = [server.account.deliver("a@x.example") for _ in range(3)]
    server.options.max_query_limit = 2
    for args in ({}, {"limit": 100}):
        reply = client.call("Email/query", **args)
        assert (reply["ids"], reply["limit"]) == (mails[:2], 2)
    assert "limit" not in client.call("Email/query", limit=1)


def test_a_search_may_find_nothing_fail_or_lag(
    server: JMAPServer, client: Client, mail: str
) -> None:
    assert client.query(**{"from": "bob"}) == [mail]
    server.options.index_until = server.account.modseq
    late = server.account.deliver("Bob <bob@shop.example>", ["Screener"])
    assert client.query(**{"from": "bob"}) == [mail]
    server.options.index_until, server.options.index_lag = None, 0.05
    server.wait_for(lambda: client.query(**{"from": "bob"}) == [mail, late])
    server.options.from_search = "empty"
    assert client.query(**{"from": "bob"}) == []
    server.options.from_search = "error"
    assert client.call("Email/query", filter={"from": "bob"})["type"] == "serverFail"
    assert client.query(header=["From", "bob"]) == [mail, late]


@pytest.mark.parametrize(
    ("patch", "boxes", "error"),
    [
        ({"mailboxIds/{Feed}": True}, {"Screener", "Feed"}, None),
        ({"mailboxIds/{Feed}": True, "mailboxIds/{Screener}": None}, {"Feed"}, None),
        ({"mailboxIds/{Feed}": None}, {"Screener"}, None),
        ({"mailboxIds": {"{Inbox}": True}}, {"Inbox"}, None),
        ({}, {"Screener"}, None),
        ({"mailboxIds/{Feed}": False}, {"Screener"}, "invalidProperties"),
        ({"mailboxIds/P0": True}, {"Screener"}, "invalidProperties"),
        ({"mailboxIds": {"P0": True}}, {"Screener"}, "invalidProperties"),
        ({"mailboxIds/{Screener}": None}, {"Screener"}, "invalidProperties"),
        ({"mailboxIds": {"{Feed}": True}, "mailboxIds/{Feed}": None}, {"Screener"}, "invalidPatch"),
        ({"subject": "x"}, {"Screener"}, "invalidProperties"),
        ({"mailboxIds/{Feed}": True, "mailboxIds/{Inbox}": True}, {"Screener"}, "tooManyMailboxes"),
    ],
)
def test_patches_file_a_mail(
    server: JMAPServer, client: Client, mail: str, patch: JSON, boxes: set[str], error: str | None
) -> None:
    account, kinds = server.account, ("Email", "Mailbox")
    server.options.max_mailboxes_per_email = 2
    ids = {name: account.mailbox_id(name) for name in ("Feed", "Inbox", "Screener")}

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {key.format(**ids): real(inner) for key, inner in value.items()}
        return value

    before = [account.state(kind) for kind in kinds]
    assert client.update(mail, real(patch)).get("type") == error
    assert account.mailboxes_of(mail) == boxes
    changed = boxes != {"Screener"}
    after = [account.state(kind) for kind in kinds]
    assert [new != old for new, old in zip(after, before, strict=True)] == [changed, changed]
    assert len(server.writes) == changed


def test_the_last_mailbox_may_be_lost(server: JMAPServer, client: Client, mail: str) -> None:
    server.options.last_mailbox = "lose"
    state = server.account.state("Email")
    patch = {f"mailboxIds/{server.account.mailbox_id('Screener')}": None}
    assert client.call("Email/set", update={mail: patch})["updated"] == {mail: None}
    assert client.call("Email/get", ids=[mail])["notFound"] == [mail]
    assert client.call("Email/changes", sinceState=state)["destroyed"] == [mail]


def test_set_answers_for_every_object_by_itself(
    account: Account, client: Client, mail: str
) -> None:
    old = account.state("Email")
    update = {mail: {"keywords/$seen": True}, "M0": {"keywords/$seen": True}}
    reply = client.call("Email/set", ifInState=old, update=update, destroy=["M0"])
    assert reply["updated"] == {mail: None}
    assert reply["notUpdated"] == {"M0": {"type": "notFound"}}
    assert reply["notDestroyed"] == {"M0": {"type": "notFound"}}
    assert reply["notCreated"] is None
    assert (reply["oldState"], reply["newState"]) == (old, account.state("Email"))
    assert client.call("Email/set", destroy=[mail])["destroyed"] == [mail]
    assert not account.mails


def test_changes_tell_what_came_changed_and_went(account: Account, client: Client) -> None:
    kept, gone = (account.deliver("a@x.example") for _ in range(2))
    since = account.state("Email")
    account.mark(kept, "$seen")
    new, brief = (account.deliver("a@x.example") for _ in range(2))
    account.remove_mail(gone)
    account.remove_mail(brief)
    reply = client.call("Email/changes", sinceState=since)
    found = {key: reply[key] for key in ("created", "updated", "destroyed")}
    assert found == {"created": [new], "updated": [kept], "destroyed": [gone]}
    steps = []
    while since != account.state("Email"):
        reply = client.call("Email/changes", sinceState=since, maxChanges=1)
        steps += reply["created"] + reply["updated"] + reply["destroyed"]
        assert reply["hasMoreChanges"] == (reply["newState"] != account.state("Email"))
        since = reply["newState"]
    assert steps == [kept, new, gone, brief]


# Mailboxes, identities


def test_mailboxes_have_parents_roles_and_counts(
    account: Account, client: Client, mail: str
) -> None:
    nested = account.add_mailbox("Inner", parent="Inbox")
    account.deliver("a@x.example", ["Screener"], keywords=["$seen"])
    boxes = {box["name"]: box for box in client.call("Mailbox/get")["list"]}
    assert boxes["Inner"]["parentId"] == account.mailbox_id("Inbox")
    assert boxes["Inbox"]["role"] == "inbox"
    assert (boxes["Screener"]["totalEmails"], boxes["Screener"]["unreadEmails"]) == (2, 1)
    assert boxes["Screener"]["myRights"]["mayAddItems"]
    assert client.call("Mailbox/query", filter={"role": "inbox"})["ids"] == [boxes["Inbox"]["id"]]
    assert client.call("Mailbox/query", filter={"name": "inner"})["ids"] == [nested]


@pytest.mark.parametrize(
    ("args", "failure"),
    [
        ({"create": {"k": {"name": "New"}}}, None),
        ({"create": {"k": {"name": "Feed"}}}, "invalidProperties"),
        ({"create": {"k": {"name": "New", "parentId": "P0"}}}, "invalidProperties"),
        ({"create": {"k": {"name": "New", "nose": 1}}}, "invalidProperties"),
        ({"update": {"{Feed}": {"name": "Other"}}}, None),
        ({"update": {"{Feed}": {"name": "Jail"}}}, "invalidProperties"),
        ({"destroy": ["{Feed}"]}, None),
        ({"destroy": ["{Inbox}"]}, "mailboxHasChild"),
        ({"destroy": ["{Screener}"]}, "mailboxHasEmail"),
        ({"destroy": ["{Screener}"], "onDestroyRemoveEmails": True}, None),
    ],
)
def test_mailboxes_are_made_renamed_and_removed(
    account: Account, client: Client, mail: str, args: JSON, failure: str | None
) -> None:
    account.add_mailbox("Inner", parent="Inbox")
    ids = {name: account.mailbox_id(name) for name in ("Feed", "Inbox", "Screener")}
    if "update" in args:
        args = {"update": {ids["Feed"]: args["update"]["{Feed}"]}}
    if "destroy" in args:
        args = args | {"destroy": [args["destroy"][0].format(**ids)]}
    state = account.state("Mailbox")
    reply = client.call("Mailbox/set", **args)
    failures = [
        error["type"]
        for key in ("notCreated", "notUpdated", "notDestroyed")
        for error in (reply[key] or {}).values()
    ]
    assert failures == ([failure] if failure else [])
    assert (state == account.state("Mailbox")) == bool(failure)


def test_the_identity_is_the_accounts_address(account: Account, client: Client) -> None:
    (identity,) = client.call("Identity/get")["list"]
    assert identity["email"] == account.address


# Contacts


def card_of(account: Account, **properties: Any) -> JSON:
    return CARD | {"addressBookIds": dict.fromkeys(account.books, True)} | properties


@pytest.mark.parametrize("id_is_uid", [True, False])
def test_a_card_is_created_with_the_ids_it_lacks(id_is_uid: bool) -> None:
    with JMAPServer(Options(id_is_uid=id_is_uid)) as server:
        client = Client(server)
        emails = {"e1": {"address": "Bob@Shop.example"}}
        card = card_of(server.account, name={"full": "Bob"}, emails=emails)
        made = client.call("ContactCard/set", create={"k": card})["created"]["k"]
        assert made.keys() == {"id", "uid"}
        assert (made["id"] == made["uid"]) == id_is_uid
        (stored,) = client.call("ContactCard/get", ids=[made["id"]])["list"]
        assert stored == card | made
        (book,) = client.call("AddressBook/get")["list"]
        assert book["isDefault"]
        assert stored["addressBookIds"] == {book["id"]: True}
        assert server.account.contacts_of("bob@shop.EXAMPLE") == [stored]


@pytest.mark.parametrize(
    ("properties", "bad"),
    [
        ({"@type": None}, ["@type"]),
        ({"version": None}, ["version"]),
        ({"version": "4.0"}, ["version"]),
        ({"addressBookIds": None}, ["addressBookIds"]),
        ({"addressBookIds": {}}, ["addressBookIds"]),
        ({"addressBookIds": {"A0": True}}, ["addressBookIds"]),
        ({"id": "x"}, ["id"]),
        ({"uid": "taken"}, ["uid"]),
        ({"kind": "company"}, ["kind"]),
        ({"name": "Bob"}, ["name"]),
        ({"name": {"components": [{"kind": "given"}]}}, ["name"]),
        ({"emails": {"e 1": {"address": "a@x.example"}}}, ["emails"]),
        ({"emails": {"e1": {}}}, ["emails"]),
        ({"notes": {"n1": "text"}}, ["notes"]),
        ({"members": {"uid": None}}, ["members"]),
        ({"nose": 1}, ["nose"]),
    ],
)
def test_a_bad_card_is_not_created(
    account: Account, client: Client, properties: JSON, bad: list[str]
) -> None:
    account.add_contact("a@x.example", uid="taken")
    state = account.state("ContactCard")
    card = card_of(account, **properties)
    given = {key: value for key, value in card.items() if value is not None}
    reply = client.call("ContactCard/set", create={"k": given})
    assert reply["notCreated"] == {"k": {"type": "invalidProperties", "properties": bad}}
    assert account.state("ContactCard") == state


@pytest.mark.parametrize(
    ("patch", "failure"),
    [
        ({"members/urn:uuid:1": True}, None),
        ({"members/u0": None}, None),
        ({"members/u9": None}, None),
        ({"notes": {"n1": {"note": "x"}}}, None),
        ({"name/full": "New"}, None),
        ({"example.com:nose": 1}, None),
        ({"notes/n1": {"note": "x"}}, "invalidPatch"),
        ({"emails/e1/address": "x"}, "invalidPatch"),
        ({"members/u1": True, "members": {}}, "invalidPatch"),
        ({"members/u1": False}, "invalidProperties"),
        ({"uid": "other"}, "invalidProperties"),
        ({"nose": 1}, "invalidProperties"),
        ({"addressBookIds": None}, "invalidProperties"),
    ],
)
def test_patches_change_a_card(
    account: Account, client: Client, patch: JSON, failure: str | None
) -> None:
    group = account.add_group("Friends", ["u0"])
    state = account.state("ContactCard")
    before = account.cards[group]
    assert client.update(group, patch, "ContactCard").get("type") == failure
    changes = failure is None and patch != {"members/u9": None}
    assert (account.state("ContactCard") != state, account.cards[group] != before) == (
        changes,
        changes,
    )


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ({"email": "shop.example"}, "ab"),
        ({"email": ""}, "abc"),
        ({"name": "böb"}, "a"),
        ({"text": "plumber"}, "b"),
        ({"kind": "group"}, "g"),
        ({"kind": "org"}, "b"),
        ({"kind": "individual"}, "ac"),
        ({"uid": "ub"}, "b"),
        ({"hasMember": "ua"}, "g"),
        ({"operator": "OR", "conditions": [{"uid": "ua"}, {"uid": "u0"}, {"uid": "uc"}]}, "ac"),
        ({"operator": "NOT", "conditions": [{"kind": "group"}]}, "abc"),
    ],
)
def test_queries_find_cards(where: JSON, found: str) -> None:
    with JMAPServer() as server:
        account, client = server.account, Client(server)
        a = account.add_contact("bob@shop.example", "Böb", uid="ua")
        notes = {"n1": {"note": "The plumber"}}
        b = account.add_contact("notbob@Shop.Example", kind="org", uid="ub", notes=notes)
        c = account.add_contact("c@x.example", uid="uc")
        names = {a: "a", b: "b", c: "c", account.add_group("Friends", [a]): "g"}
        ids = client.call("ContactCard/query", filter=where)["ids"]
        assert "".join(names[key] for key in ids) == found
        server.options.not_finds_nothing = True
        ids = client.call("ContactCard/query", filter=where)["ids"]
        assert "".join(names[key] for key in ids) == ("" if "NOT" in where.values() else found)


def test_a_removed_card_stays_in_its_groups(account: Account, client: Client) -> None:
    card = account.add_contact("bob@shop.example", "Bob")
    account.join_group("Feed", card)
    account.join_group("Jail", card)
    account.leave_group("Jail", card)
    assert account.groups_of("BOB@shop.example") == {"Feed"}
    uid = account.cards[card]["uid"]
    assert client.call("ContactCard/set", destroy=[card])["destroyed"] == [card]
    assert account.contacts_of("bob@shop.example") == []
    found = client.call("ContactCard/query", filter={"hasMember": uid})["ids"]
    assert found == [account.group_id("Feed")]


# Sieve scripts and blobs

KEEP, FILE = "keep;\r\n", 'require "fileinto";\r\nfileinto "Feed";\r\n'


@pytest.fixture
def sieve(server: JMAPServer, client: Client) -> Client:
    server.options.sieve = True
    return client


def test_a_blob_comes_back_as_it_went(server: JMAPServer, client: Client) -> None:
    reply = client.upload("é".encode())
    assert reply.status_code == 201
    blob = reply.json()
    assert (blob["accountId"], blob["size"], blob["type"]) == ("u1", 2, "application/sieve")
    template = client.get("/jmap/session").json()["downloadUrl"].removeprefix(server.origin)
    path = template.format(accountId="u1", blobId=blob["blobId"], name="a.txt", type="text/plain")
    assert client.get(path).content.decode() == "é"
    assert client.get(path).headers["Content-Type"] == "text/plain"
    assert client.get(path.replace(blob["blobId"], "G0")).status_code == 404
    assert client.get("/jmap/upload/u1/").status_code == 405
    server.options.limits["maxSizeUpload"] = 1
    assert client.upload(b"no").json()["limit"] == "maxSizeUpload"


def test_sieve_scripts_are_offered_if_told(server: JMAPServer, client: Client) -> None:
    assert SIEVE not in client.get("/jmap/session").json()["capabilities"]
    server.options.sieve, server.options.sieve_extensions = True, ("fileinto", "extlists")
    session = client.get("/jmap/session").json()
    assert session["capabilities"][SIEVE]["implementation"]
    (account,) = session["accounts"].values()
    details = account["accountCapabilities"][SIEVE]
    assert details["sieveExtensions"] == ["fileinto", "extlists"]
    assert details["externalLists"] == ["urn:ietf:params:sieve:addrbook"]
    assert {"maxSizeScriptName", "maxSizeScript", "maxNumberScripts"} < details.keys()
    server.options.sieve = False
    assert client.post({"using": [SIEVE], "methodCalls": []}).status_code == 400


def test_a_script_is_made_and_activated_in_one_call(sieve: Client, account: Account) -> None:
    own = account.add_sieve_script("own", KEEP)
    blob = sieve.upload(FILE.encode()).json()["blobId"]
    create = {"k": {"name": "mailroom", "blobId": blob}}
    done = sieve.set_scripts(create=create, onSuccessActivateScript="#k")
    made = done["created"]["k"]
    assert made["isActive"] is True
    assert done["updated"] == {own: {"isActive": False}}
    assert account.active_script == "mailroom"
    assert account.sieve_scripts == {"own": KEEP, "mailroom": FILE}
    got = sieve.call("SieveScript/get", ids=None)
    assert got["state"] == done["newState"] != done["oldState"]
    assert got["list"][1] == {
        "id": made["id"],
        "name": "mailroom",
        "blobId": blob,
        "isActive": True,
    }


def test_a_script_is_changed_deactivated_and_destroyed(sieve: Client, account: Account) -> None:
    script = account.add_sieve_script("own", KEEP)
    blob = sieve.upload(FILE.encode()).json()["blobId"]
    assert sieve.update(script, {"blobId": blob, "name": "new"}, "SieveScript") == {}
    assert account.sieve_scripts == {"new": FILE}
    done = sieve.set_scripts(destroy=[script])
    assert done["notDestroyed"] == {script: {"type": "sieveIsActive"}}
    done = sieve.set_scripts(onSuccessDeactivateScript=True)
    assert done["updated"] == {script: {"isActive": False}}
    assert account.active_script is None
    assert sieve.set_scripts(destroy=[script])["destroyed"] == [script]
    assert account.sieve_scripts == {}


def test_nothing_is_activated_unless_all_succeeds(sieve: Client, account: Account) -> None:
    own, other = account.add_sieve_script("own", KEEP), account.add_sieve_script("b", KEEP, False)
    done = sieve.set_scripts(destroy=["none"], onSuccessActivateScript=other)
    assert done["notDestroyed"] == {"none": {"type": "notFound"}}
    for unknown in ("none", "#none"):
        done = sieve.set_scripts(onSuccessActivateScript=unknown)
        assert done["newState"] == done["oldState"]
    assert account.active_script == "own"
    assert sieve.set_scripts(onSuccessActivateScript=other)["updated"] == {
        own: {"isActive": False},
        other: {"isActive": True},
    }


@pytest.mark.parametrize(
    ("properties", "error"),
    [
        ({"name": "own"}, {"type": "alreadyExists", "existingId": "own"}),
        ({"blobId": "G0"}, {"type": "blobNotFound", "notFound": ["G0"]}),
        ({"name": ""}, {"type": "invalidProperties", "properties": ["name"]}),
        ({"name": "n" * 513}, {"type": "invalidProperties", "properties": ["name"]}),
        ({"blobId": None}, {"type": "invalidProperties", "properties": ["blobId"]}),
        ({"isActive": True}, {"type": "invalidProperties", "properties": ["isActive"]}),
        ("keep", {"type": "invalidSieve"}),
        ('require "vnd.unknown"; keep;', {"type": "invalidSieve"}),
        ("keep; " * 12_000, {"type": "tooLarge"}),
    ],
)
def test_a_bad_script_is_not_made(
    sieve: Client, account: Account, properties: JSON | str, error: JSON
) -> None:
    own = account.add_sieve_script("own", KEEP)
    text = properties if isinstance(properties, str) else KEEP
    item = {"name": "a", "blobId": account.add_blob(text.encode())}
    item |= {} if isinstance(properties, str) else properties
    failure = sieve.set_scripts(create={"k": item})["notCreated"]["k"]
    if "existingId" in failure:
        failure["existingId"] = "own" if failure["existingId"] == own else ""
    assert failure.items() >= error.items()
    assert account.sieve_scripts == {"own": KEEP}


def test_there_may_be_so_many_scripts(sieve: Client, account: Account) -> None:
    sieve.server.options.sieve_limits["maxNumberScripts"] = 1
    blob = account.add_blob(KEEP.encode())
    made = sieve.set_scripts(create={"k": {"blobId": blob}})["created"]["k"]
    assert made["name"], "a script without a name gets one"
    failure = sieve.set_scripts(create={"k": {"blobId": blob}})["notCreated"]["k"]
    assert failure["type"] == "overQuota"


def test_a_script_can_be_validated(sieve: Client, account: Account) -> None:
    def validated(text: str) -> JSON:
        return sieve.call("SieveScript/validate", blobId=account.add_blob(text.encode()))

    assert validated(KEEP)["error"] is None
    assert validated("keep")["error"]["type"] == "invalidSieve"
    assert sieve.call("SieveScript/validate", blobId="G0")["type"] == "blobNotFound"


def test_scripts_are_found(sieve: Client, account: Account) -> None:
    b, a = account.add_sieve_script("b", KEEP, False), account.add_sieve_script("a", KEEP)
    sort = [{"property": "name"}]
    assert sieve.call("SieveScript/query", sort=sort)["ids"] == [a, b]
    assert sieve.call("SieveScript/query", filter={"isActive": True})["ids"] == [a]
    assert sieve.call("SieveScript/query", filter={"name": "b"})["ids"] == [b]


# The user's phone


def test_direct_changes_are_changes_like_any_other(account: Account, client: Client) -> None:
    mail = account.deliver("bob@shop.example", ["Screener"])
    kinds = ("Email", "Mailbox", "ContactCard")

    def changed(change: Callable[[], object]) -> list[bool]:
        before = [client.call(f"{kind}/get", ids=[])["state"] for kind in kinds]
        change()
        after = [client.call(f"{kind}/get", ids=[])["state"] for kind in kinds]
        return [new != old for old, new in zip(before, after, strict=True)]

    assert changed(lambda: account.label(mail, "@ToFeed")) == [True, True, False]
    assert changed(lambda: account.label(mail, "@ToFeed")) == [False, False, False]
    assert account.mails_in("@ToFeed") == {mail}
    assert changed(lambda: account.unlabel(mail, "@ToFeed")) == [True, True, False]
    assert changed(lambda: account.mark(mail, "$flagged")) == [True, False, False]
    assert changed(lambda: account.move(mail, "Archive", "Feed")) == [True, True, False]
    assert account.mailboxes_of(mail) == {"Archive", "Feed"}
    assert changed(lambda: account.rename_mailbox("Feed", "News")) == [False, True, False]
    assert changed(lambda: account.remove_mailbox("News")) == [True, True, False]
    assert account.mailboxes_of(mail) == {"Archive"}
    assert changed(lambda: account.add_contact("a@x.example")) == [False, False, True]
    assert changed(lambda: account.remove_mail(mail)) == [True, True, False]


# Event streams


def test_an_event_names_the_state_of_the_write_that_caused_it(
    account: Account, client: Client, mail: str
) -> None:
    events = client.stream("?types=Email,Mailbox&closeafter=no&ping=0")
    account.add_contact("a@x.example")
    feed = account.mailbox_id("Feed")
    reply = client.call("Email/set", update={mail: {f"mailboxIds/{feed}": True}})
    event = events.next()
    assert event.startswith("event: state\n")
    assert f'"Email": "{reply["newState"]}"' in event
    assert f'"Mailbox": "{account.state("Mailbox")}"' in event
    assert "ContactCard" not in event
    assert client.call("Email/get", ids=[])["state"] == reply["newState"]


def test_fastmail_greets_and_cyrus_numbers(mail: str) -> None:
    with JMAPServer(Options.fastmail()) as server:
        events = Client(server).stream("")
        assert '"type": "connect"' in events.next()
        server.account.add_mailbox("Inbox")
        server.account.deliver("a@x.example")
        event = events.next()
        assert '"type": "change"' in event
        assert '"Mailbox"' in event
        assert "id:" not in event
    with JMAPServer(Options.cyrus()) as server:
        events = Client(server).stream()
        assert events.reply.headers.get("Transfer-Encoding") is None
        server.account.add_mailbox("Inbox")
        server.account.deliver("a@x.example")
        event = events.next()
        assert event.startswith("id: ")
        assert '"@type": "StateChange"' in event
        assert '"Mailbox"' not in event


@pytest.mark.parametrize(("ahead", "told"), [(-1, ["missed", "new"]), (0, ["new"]), (10, [])])
def test_a_reconnect_hears_what_it_missed_since_its_last_event(ahead: int, told: list[str]) -> None:
    with JMAPServer(Options(event_ids=True)) as server:
        account = server.account
        account.add_mailbox("Inbox")
        account.deliver("a@x.example")
        missed, modseq = account.state("Email"), account.histories["Email"].modseq
        events = Client(server).stream("?types=Email", **{"Last-Event-ID": str(modseq + ahead)})
        heard = [events.next()] if "missed" in told else []
        account.deliver("a@x.example")
        server.streams.close()
        heard += iter(events.next, "")
        states = {"missed": missed, "new": account.state("Email")}
        assert [states[name] in event for name, event in zip(told, heard, strict=True)] == [
            True for _ in told
        ]


@pytest.mark.parametrize(("coalesce", "events"), [(True, 1), (False, 2)])
def test_changes_come_together_or_each_by_itself(
    server: JMAPServer, client: Client, mail: str, coalesce: bool, events: int
) -> None:
    server.options.coalesce = coalesce
    stream = client.stream("?types=Email")
    server.account.label(mail, "Feed")
    server.account.label(mail, "Jail")
    server.streams.close()
    heard = list(iter(stream.next, ""))
    assert len(heard) == events
    assert server.account.state("Email") in heard[-1]


def test_a_stream_may_close_after_one_event(client: Client, account: Account) -> None:
    stream = client.stream("?types=Email&closeafter=state&ping=0")
    account.deliver("a@x.example")
    assert "event: state" in stream.next()
    assert stream.next() == ""


def test_pings_announce_a_clamped_interval() -> None:
    options = Options.stalwart(ping_pace=0.01)
    with JMAPServer(options) as server:
        events = Client(server).stream("?types=*&closeafter=no&ping=5")
        assert events.next() == 'event: ping\ndata: {"interval": 30000}'


@pytest.mark.parametrize("chunked", [True, False])
def test_streams_end_as_told(chunked: bool) -> None:
    with JMAPServer(Options(chunked=chunked)) as server:
        client = Client(server)
        events = client.stream()
        server.streams.send_raw(b": hello\n\n")
        assert events.next() == ": hello"
        server.streams.hang()
        server.account.add_mailbox("Inbox")
        server.streams.send_raw(b": still here\n\n")
        assert events.next() == ": still here"
        server.streams.close()
        assert events.next() == ""
        events = client.stream()
        server.streams.drop()
        with pytest.raises(urllib3.exceptions.ProtocolError, match="reset"):
            events.next()
        assert len(server.streams) == 0
        server.options.stream_life = 0.01
        assert client.stream().next() == ""
        server.options.stream_life = None
        client.stream().reply.close()
        server.wait_for(lambda: not server.streams)


@pytest.mark.parametrize("status", [204, 404, 503])
def test_push_may_be_off(server: JMAPServer, client: Client, status: int) -> None:
    server.options.push = status
    assert client.get("/jmap/event/").status_code == status


def test_a_stream_must_be_asked_for_properly(client: Client) -> None:
    html = {"Accept": "text/html"}
    assert client.get("/jmap/event/", headers=html).status_code == 406
    assert client.get("/jmap/event/?closeafter=never").status_code == 400
    assert client.get("/jmap/event/?ping=often").status_code == 400


# Misbehaviour


def test_faults_strike_the_request_they_are_meant_for(
    server: JMAPServer, client: Client, mail: str
) -> None:
    fault = Fault("Email/get", nth=2, times=2, status=503, headers={"Retry-After": "7"})
    server.faults.append(fault)
    body = {"using": USING, "methodCalls": [["Email/get", {"accountId": "u1", "ids": []}, "c"]]}
    client.call("Mailbox/get", ids=[])
    replies = [client.post(body) for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200, 503, 503, 200]
    assert replies[1].headers["Retry-After"] == "7"
    assert (fault.matched, fault.fired) == (4, 2)
    server.faults.append(Fault(lambda request: request.path.endswith("session"), status=500))
    assert client.get("/jmap/session").status_code == 500
    server.on_request = lambda number, request: Fault(status=418) if number == 8 else None
    assert [client.get("/jmap/session").status_code for _ in range(2)] == [200, 418]


@pytest.mark.parametrize(
    ("fault", "worked"),
    [
        (Fault(drop=True), False),
        (Fault(drop=True, work=True), True),
        (Fault(hang=True), False),
        (Fault(hang=True, work=True), True),
        (Fault(delay=FOREVER), True),
        (Fault(truncate=20), True),
        (Fault(slow=FOREVER), True),
        (Fault(body=b"<html>Hello"), False),
        (Fault(body=b"<html>Hello", work=True), True),
        (Fault(edit=lambda reply: "rubbish"), True),
    ],
)
def test_a_reply_may_never_come_whole(
    server: JMAPServer, client: Client, mail: str, fault: Fault, worked: bool
) -> None:
    server.faults.append(fault)
    args = {"accountId": "u1", "update": {mail: {"keywords/$seen": True}}}
    body = {"using": USING, "methodCalls": [["Email/set", args, "c"]]}
    with pytest.raises((requests.RequestException, TypeError)):
        client.post(body, timeout=0.1).json()["methodResponses"]
    assert ("$seen" in server.account.mails[mail].keywords) == worked
    assert client.call("Email/get", ids=[mail])["list"]


def test_a_reply_may_never_end(server: JMAPServer, client: Client) -> None:
    server.faults.append(Fault("session", body=itertools.repeat(b"x" * 65536)))
    with client.get("/jmap/session", stream=True) as reply:
        assert len(reply.raw.read(1_000_000)) == 1_000_000


def test_one_call_or_one_object_may_be_refused(
    server: JMAPServer, client: Client, mail: str
) -> None:
    over = {"type": "overQuota"}
    server.faults += [
        Fault("Email/set", errors={"Email/set": {"type": "serverFail"}}),
        Fault("Email/set", nth=2, refuse={mail: over}),
        Fault("ContactCard/set", refuse={"*": over}),
    ]
    update = {mail: {"keywords/$seen": True}}
    replies = client.calls(("Email/set", {"update": update}), ("Email/get", {"ids": []}))
    assert [reply[0] for reply in replies] == ["error", "Email/get"]
    assert client.call("Email/set", update=update)["notUpdated"] == {mail: over}
    card = card_of(server.account)
    assert client.call("ContactCard/set", create={"k": card})["notCreated"] == {"k": over}
    assert not server.writes
    assert client.call("Email/set", update=update)["updated"]
    (write,) = server.writes
    assert (write.method, write.args["update"]) == ("Email/set", update)


def test_others_may_change_things_between_calls(
    server: JMAPServer, client: Client, mail: str
) -> None:
    account, order = server.account, []

    def before(method: str, args: JSON) -> None:
        order.append(method)
        if method == "Email/get":
            account.label(mail, "Feed")

    server.faults.append(Fault(before_call=before, after=lambda: order.append("after")))
    calls = client.calls(("Email/query", {}), ("Email/get", {"ids": [mail]}))
    assert order == ["Email/query", "Email/get", "after"]
    assert calls[0][1]["queryState"] != calls[1][1]["state"]
    assert account.mailbox_id("Feed") in calls[1][1]["list"][0]["mailboxIds"]


def test_the_server_goes_away_and_comes_back(server: JMAPServer, client: Client) -> None:
    events = client.stream()
    server.pause()
    with suppress(OSError, requests.exceptions.RequestException, urllib3.exceptions.HTTPError):
        assert events.next() == ""
    with pytest.raises(requests.ConnectionError):
        client.get("/jmap/session")
    server.resume()
    assert client.get("/jmap/session").status_code == 200
    server.faults.append(Fault("session", after=server.pause))
    client.get("/jmap/session")
    with pytest.raises(requests.ConnectionError):
        requests.get(server.session_url, timeout=5)


def test_requests_are_recorded(server: JMAPServer, client: Client) -> None:
    reply = client.post(
        {"using": USING, "methodCalls": [["Email/get", {"accountId": "u1", "ids": []}, "0"]]}
    )
    (request,) = server.requests
    assert request.headers["authorization"] == "Bearer secret-token"
    assert (request.method, request.kind, request.status) == ("POST", "api", 200)
    assert request.calls == [("Email/get", {"accountId": "u1", "ids": []})]
    assert server.calls("Email/get") == [{"accountId": "u1", "ids": []}]
    assert (server.count("api"), server.count("Email/get"), server.count("session")) == (1, 1, 0)
    assert request.answered == len(reply.content)
    assert 0 < request.worked < 5
    server.options.history = 2
    for number in range(3):
        client.get(f"/{number}")
    assert [one.path for one in server.requests] == ["/1", "/2"]


def test_it_speaks_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subject = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*make.split(), *subject.split(), "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with JMAPServer(ssl_context=context) as server:
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(server.session_url, timeout=5)
        client = Client(server)
        client.http.verify = str(certificate)
        assert client.get("/jmap/session").json()["apiUrl"].startswith("https://")
        events = client.stream()
        server.account.add_mailbox("Inbox")
        assert "event: state" in events.next()
        server.streams.drop()
        assert server.connections == 2  # the one refused, and the one kept alive


def test_a_large_account_is_quick(server: JMAPServer, client: Client) -> None:
    started = time.monotonic()
    account = server.account
    for number in range(300):
        account.add_mailbox(f"Box {number}")
        account.add_contact(f"s{number}@x.example", f"Sender {number}")
    for number in range(20_000):
        account.deliver(f"Sender <s{number % 2000}@x.example>", ["Archive"])
    for page in range(5):
        reply = client.call("Email/query", position=page * 100, limit=100)
        assert len(reply["ids"]) == 100
    assert len(client.query(**{"from": "s77@x.example"})) == 10
    assert time.monotonic() - started < 5
