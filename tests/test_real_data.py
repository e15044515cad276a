"""What people's mail looks like: addresses and names as they come, the user's own addresses,
servers that answer a part of what they could. And that the module stays as small as it says."""

import ast
import io
import json
import time
import tokenize
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from jmap_server import Fault, JMAPServer, Options
from tools import PROGRAM, SERVERS, Scene, command, running

import mailroom

U_LABEL, A_LABEL = "bob@m\u00fcller.example", "bob@xn--mller-kva.example"
NFC, NFD = "jos\u00e9@x.example", unicodedata.normalize("NFD", "jos\u00e9@x.example")
Make = Callable[[], Options]
STYLES = pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)


# C, D: addresses


SAME = [(U_LABEL, A_LABEL), (NFC, NFD), (NFD, NFC), ("Bob@X.example", "bob@x.EXAMPLE")]


@STYLES
@pytest.mark.parametrize(("one", "other"), [*SAME, (A_LABEL, U_LABEL)])
def test_two_addresses_are_one(options: Make, one: str, other: str) -> None:
    """In messages, in the search for them, and in contacts, where it stays as it is written."""
    with Scene(options()) as scene:
        tapped = scene.account.deliver([{"name": "Bob", "email": one}], ["Screener", "@ToFeed"])
        second = scene.account.deliver([{"name": "Bob", "email": other}], ["Jail"])
        contact = scene.account.add_contact(other, "Bob")
        assert scene.cycle() == {}
        assert scene.boxes([tapped, second]) == [{"Feed"}] * 2
        people = [card for card in scene.account.cards.values() if card.get("emails")]
        assert [card["id"] for card in people if card["name"].get("full") == "Bob"] == [contact]
        [email] = scene.account.cards[contact]["emails"].values()
        assert email["address"] == other


OTHERS = {
    "info@ban\u212a.example": "info@bank.example",
    "a@x.example\u00a0": "a@x.example",
    "a@x.example\u3000": "a@x.example",
    "stra\u00dfe@fa\u00df.example": "stra\u00dfe@fass.example",
}


@pytest.mark.parametrize(("one", "other"), OTHERS.items())
def test_two_addresses_are_not_one(one: str, other: str) -> None:
    with Scene() as scene:
        other_mail = scene.account.deliver([{"name": None, "email": other}], ["Screener"])
        scene.account.deliver([{"name": None, "email": one}], ["Screener", "@ToFeed"])
        scene.most_idle = 3
        assert scene.cycle() == {}
        assert scene.account.mailboxes_of(other_mail) == {"Screener"}
        assert f'"{other}"' not in json.dumps(scene.seen()[1], ensure_ascii=False)


# A: whose addresses are the user's own


@pytest.mark.parametrize(
    ("identities", "sender", "is_own"),
    [
        (["*@home.example"], "shop-4711@home.example", True),
        (["*@home.example"], "shop@away.example", False),
        ([f"me@{U_LABEL[4:]}"], f"me@{A_LABEL[4:]}", True),
        ([""], "shop@away.example", False),
        ([None], "shop@away.example", False),
    ],
)
def test_identities(identities: list[Any], sender: str, is_own: bool) -> None:
    with Scene(Options(identities=[{"email": each} for each in identities])) as scene:
        mail = scene.account.deliver(sender, ["Screener", "@ToFeed"])
        assert scene.cycle() == {}
        waiting = {"Screener", "@ToFeed", "@MailroomError"}
        assert scene.account.mailboxes_of(mail) == (waiting if is_own else {"Feed"})


# H: names


@pytest.mark.parametrize(
    ("contact", "said", "warns"),
    [
        ("Jane Doe", "'Jane Doe'", False),
        ("Jane Doe", '"Jane  Doe"', False),
        ("Jane Doe", "Doe, Jane", False),
        ("Jos\u00e9", unicodedata.normalize("NFD", "Jos\u00e9"), False),
        ("Jane Doe", "jane@x.example", False),
        ("Jane Doe", "JANE DOE", False),
        ("Jane Doe", "John Doe", True),
        ("Inc. Acme", "Acme, Inc.", True),
    ],
)
def test_a_name_that_differs_warns(contact: str, said: str, warns: bool) -> None:
    with Scene() as scene:
        scene.account.add_contact("jane@x.example", contact)
        mail = scene.account.deliver(
            [{"name": said, "email": "jane@x.example"}], ["Screener", "@ToFeed"]
        )
        assert scene.cycle() == {}
        expected = {"Feed", "@MailroomWarning"} if warns else {"Feed"}
        assert scene.account.mailboxes_of(mail) == expected


@pytest.mark.parametrize(
    ("said", "label", "name"),
    [
        ("'Weekly Bytes'", "@ToFeed", "Weekly Bytes"),
        ("Doe, Jane", "@ToPerson", "Jane Doe"),
        ("King, Jr.", "@ToPerson", "King, Jr."),
        ("npm, Inc.", "@ToFeed", "npm, Inc."),
        ("npm, Inc.", "@ToPerson", "npm, Inc."),
        ("M\u00fcller, GmbH", "@ToPerson", "M\u00fcller, GmbH"),
        ("\u200b\u00a0\u2060", "@ToFeed", "a@x.example"),
        ("x" * 300, "@ToFeed", "x" * 200),
        ("a\r\nEND:VCARD", "@ToFeed", "a END:VCARD"),
    ],
)
def test_the_name_of_a_new_contact(said: str, label: str, name: str) -> None:
    with Scene() as scene:
        scene.account.deliver([{"name": said, "email": "a@x.example"}], ["Screener", label])
        assert scene.cycle() == {}
        assert scene.the_contact("a@x.example")["name"]["full"] == name


# J: servers that answer a part


@pytest.mark.parametrize("change", [{"mailbox_query": "refuse"}, {"sparse_replies": True}])
def test_a_server_that_says_less(change: dict[str, Any]) -> None:
    with Scene(Options(**change)) as scene:
        scene.most_idle = 2
        mails = scene.new_sender("a@x.example", 3)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 3


@pytest.mark.parametrize("method", ["Email/query", "Mailbox/get", "ContactCard/query"])
def test_what_has_no_way_round_ends_it_with_a_line_that_names_the_method(method: str) -> None:
    with JMAPServer.with_mailroom_account() as server:
        server.faults = [Fault(times=99, errors={method: {"type": "unsupportedFilter"}})]
        ran = command("run", "--once", jmap_url=server.session_url, jmap_token="secret-token")
        assert ran.status == 2
        assert method in ran.err.splitlines()[-1]
        assert "Traceback" not in ran.err


# Fastmail's streams, and the module itself


def test_a_stream_that_ends_at_once_costs_few_connections() -> None:
    """Within what would be half a minute: a connect event, and then it is closed. Time is scaled to
    a thirtieth."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FIRST_DELAY", "MAX_DELAY", "PROVEN_SECONDS"):
            patch.setattr(mailroom, name, getattr(mailroom, name) / 30)
        server = JMAPServer.with_mailroom_account(Options(closes_streams_after=0.04))
        with server, running(server, poll_interval=60) as run:
            run.wait_for_cycles(2)
            start = time.monotonic()
            mail = server.account.deliver("a@x.example", ["Screener", "@ToFeed"])
            server.wait_for(lambda: server.account.mailboxes_of(mail) == {"Feed"}, 3)
            server.wait_for(lambda: time.monotonic() - start > 0.85, 3)
            assert 2 <= sum(request.kind == "stream" for request in server.requests) <= 6


def test_the_module_is_as_small_as_it_says() -> None:
    source = PROGRAM.read_text()
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    assert lengths[-1] <= 45
    assert lengths[len(lengths) // 2] <= 9
    assert lengths[len(lengths) * 9 // 10] <= 25
    assert sum(isinstance(node, ast.FunctionDef) for node in tree.body) <= 90
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [
        node.body[0] for node in nodes if isinstance(node, documented) and ast.get_docstring(node)
    ]
    prose = {line for doc in docs for line in range(doc.lineno, (doc.end_lineno or 0) + 1)}
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spans = [(t.start[0], t.end[0]) for t in tokens if t.type not in {*skipped, tokenize.ENDMARKER}]
    code = {line for start, end in spans for line in range(start, end + 1)} - prose
    # DESIGN's measure is 2,700 and 1,900; until it is met the module may only shrink.
    assert len(source.splitlines()) <= 2962
    assert len(code) <= 2106
