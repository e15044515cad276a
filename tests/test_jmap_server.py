"""The embedded JMAP server keeps a real server's rules, and breaks them only as it is told. That it
reads and writes mail as a Cyrus does is in test_parity.py."""

import itertools
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
import requests
from jmap_server import CONTACTS, CORE, FOREVER, JSON, MAIL, SUBMISSION, Fault, JMAPServer
from real_server import http_session

USING = [CORE, MAIL, SUBMISSION, CONTACTS]
BOB = "Bob <bob@shop.example>"
SEEN = {"keywords/$seen": True}


class Client:
    """Speaks plain JMAP to the server, and trusts nothing it knows from inside."""

    def __init__(self, server: JMAPServer) -> None:
        self.server, self.account, self.options = server, server.account, server.options
        self.http = http_session()
        self.http.headers["Authorization"] = f"Bearer {server.options.token}"

    def call(self, method: str, timeout: float = 5, **args: Any) -> JSON:
        """The arguments of the reply, or of its error."""
        calls = [[method, {"accountId": "u1", **args}, "0"]]
        body, url = {"using": USING, "methodCalls": calls}, f"{self.server.origin}/jmap/api/"
        reply = self.http.post(url, json=body, timeout=timeout).json()
        return dict(reply["methodResponses"][0][1])

    def set(self, kind: str, **args: Any) -> JSON:
        """The SetErrors of a set call, by the ids of the objects."""
        reply = self.call(f"{kind}/set", **args)
        refused = (reply[key] or {} for key in ("notCreated", "notUpdated", "notDestroyed"))
        return dict(itertools.chain.from_iterable(each.items() for each in refused))

    def query(self, **where: Any) -> list[str]:
        return list(self.call("Email/query", filter=where)["ids"])


@pytest.fixture
def client() -> Iterator[Client]:
    with JMAPServer.with_mailroom_account() as server:
        yield Client(server)
        assert not server.crashes


@pytest.fixture
def mail(client: Client) -> str:
    return client.account.deliver(BOB, ["Screener"])


def test_a_search_finds_what_matches_or_fails_as_told(client: Client, mail: str) -> None:
    eve = client.account.deliver('"bob@shop.example" <eve@evil.example>')
    bob = {"from": "BOB shop"}
    assert client.query(**bob) == client.query(header=["From", "bob"]) == [mail, eve]
    client.options.index_until = client.account.modseq
    late = client.account.deliver(BOB)
    assert client.query(**bob) == [mail, eve]
    client.options.index_until = FOREVER
    client.options.from_search = "empty"
    assert client.query(**bob) == []
    client.options.from_search = "error"
    assert client.call("Email/query", filter=bob)["type"] == "serverFail"
    assert client.query(header=["From", "bob"]) == [mail, eve, late]


def test_cyrus_loses_mails(client: Client, mail: str) -> None:
    """Those in no mailbox, and of a search those beyond so many terms."""
    update = {mail: {f"mailboxIds/{client.account.mailbox_id('Screener')}": None}}
    assert client.set("Email", update=update)[mail]["type"] == "invalidProperties"
    client.options.last_mailbox, client.options.max_filter_terms = "lose", 300
    assert client.call("Email/set", update=update)["updated"] == {mail: None}
    mails = [client.account.deliver(BOB) for _ in range(6)]
    boxes = [{"inMailbox": client.account.mailbox_id("Inbox")}] * 15
    for senders, found in ((20, mails), (21, mails[::3])):
        both = (boxes, [{"header": ["From", "bob"]}] * senders)
        anded = [{"operator": "OR", "conditions": each} for each in both]
        assert client.query(operator="AND", conditions=anded) == found


def test_what_is_too_much_or_there_already_is_refused(client: Client) -> None:
    twice = client.set("Mailbox", create={"k": {"name": "Feed"}})
    assert twice == {"k": {"type": "invalidProperties", "properties": ["name"]}}
    client.options.limits |= {"maxObjectsInGet": 3, "maxObjectsInSet": 3}
    assert client.call("Email/get", ids=[*"abcd"])["type"] == "requestTooLarge"
    assert client.call("Email/set", destroy=[*"abcd"])["type"] == "requestTooLarge"
    client.options.read_only = True
    assert client.call("Email/set")["type"] == "accountReadOnly"


def test_only_good_cards_are_created_and_only_members_changed(client: Client) -> None:
    account = client.account
    account.add_contact("a@x.example", uid="taken")
    good: JSON = {"@type": "Card", "version": "1.0"}
    good["addressBookIds"] = {next(iter(account.books)): True}
    bad: JSON = {"version": "4.0", "kind": "company", "nose": 1, "id": "x", "uid": "taken"}
    bad |= {"addressBookIds": {"A0": True}, "name": {"components": [{"kind": "given"}]}}
    bad |= {"emails": {"e1": {}}, "notes": {"n1": "text"}}
    create = {name: {**good, name: value} for name, value in bad.items()}
    refused = {name: {"type": "invalidProperties", "properties": [name]} for name in bad}
    assert client.set("ContactCard", create=create) == refused
    group = account.add_group("Friends", ["u0"])
    members = {"members/urn:uuid:1": True, "members/u0": None}
    assert client.set("ContactCard", update={group: members}) == {}
    for patch in ({"notes/n1": {"note": "x"}}, {"members/u1": False}, {"uid": "other"}):
        refused = client.set("ContactCard", update={group: patch})
        assert refused[group]["type"] in ("invalidPatch", "invalidProperties")
    assert account.cards[group]["members"] == {"urn:uuid:1": True}
    account.put_in_book(group, account.add_book("Shared", may_write=False))
    good["addressBookIds"] = account.cards[group]["addressBookIds"]
    update = {group: {"members/u1": True}}
    refused = client.set("ContactCard", update=update, create={"k": good}, destroy=[group])
    assert {one["type"] for one in refused.values()} == {"forbidden"}


@pytest.mark.parametrize(
    ("fault", "worked"),
    [
        (Fault(drop=True), False),
        (Fault(drop=True, work=True), True),
        (Fault(hang=True), False),
        (Fault(hang=True, work=True), True),
        (Fault(delay=FOREVER), True),
        (Fault(truncate=20), True),
        (Fault(body=b"<html>Hello", work=True), True),
        (Fault(body=itertools.repeat(b"x" * 65536)), False),
        (Fault(edit=lambda reply: "rubbish"), True),
    ],
)
def test_a_reply_may_never_come_whole(
    client: Client, mail: str, fault: Fault, worked: bool
) -> None:
    client.server.faults.append(fault)
    with pytest.raises((requests.RequestException, TypeError, gevent.Timeout)), gevent.Timeout(0.5):
        client.call("Email/set", update={mail: SEEN}, timeout=0.1)
    assert ("$seen" in client.account.mails[mail].keywords) == worked
    assert client.call("Email/get", ids=[mail])["list"]


def test_one_object_may_be_refused_and_others_may_come_between(client: Client, mail: str) -> None:
    limited, update = {"type": "rateLimit"}, {mail: SEEN}
    label = Fault("Email/set", before_call=lambda *_: client.account.label(mail, "Feed"), nth=2)
    label.after = client.server.pause
    client.server.faults += [Fault("Email/set", refuse={mail: limited}), label]
    assert client.set("Email", update=update) == {mail: limited}
    assert not client.server.writes
    assert client.set("Email", update=update) == {}
    assert [write.args["update"] for write in client.server.writes] == [update]
    assert client.account.mailboxes_of(mail) == {"Screener", "Feed"}
    with pytest.raises(requests.ConnectionError):
        Client(client.server).call("Email/get")
    client.server.resume()
    assert client.call("Email/get")["list"]
