"""What people's mail looks like: addresses and names as they come, the user's own addresses,
servers that answer a part of what they could. And that the module stays as small as it says."""

import ast
import io
import tokenize
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jmap_server import FOREVER, Fault, JMAPServer, Options
from test_triage import Make, every_server
from tools import PROGRAM, Scene, command

U_LABEL, A_LABEL = "bob@m\u00fcller.example", "bob@xn--mller-kva.example"
NFC, NFD = "jos\u00e9@x.example", unicodedata.normalize("NFD", "jos\u00e9@x.example")


# Addresses

SAME = [(U_LABEL, A_LABEL), (A_LABEL, U_LABEL), (NFC, NFD), (NFD, NFC)]
SAME += [("Bob@X.example", "bob@x.EXAMPLE"), (" bob@x.example\r\n", "bob@x.example")]
OTHERS = [("info@ban\u212a.example", "info@bank.example"), ("bob+news@x.example", "bob@x.example")]
OTHERS += [("stra\u00dfe@fa\u00df.example", "stra\u00dfe@fass.example")]
OTHERS += [("JOSE\u0301@x.example", "jose\u0301@x.example")]
OTHERS += [(f"bob{odd}", "bob@x.example") for odd in ("@x.example\u00a0", "@x.example\u3000")]


@every_server
@pytest.mark.parametrize(("one", "other"), [*SAME, *OTHERS])
def test_when_two_addresses_are_one(options: Make, one: str, other: str) -> None:
    """In messages, in the search for them, and in contacts, where it stays as it is written."""
    is_same = (one, other) in SAME
    with Scene(options()) as scene:
        scene.account.deliver([{"name": "Bob", "email": one}], ["Screener", "@ToFeed"])
        second = scene.account.deliver([{"name": "Bob", "email": other}], ["Jail"])
        card = scene.account.cards[scene.account.add_contact(other, "Bob")]
        number = len(scene.account.cards)
        assert scene.cycle() == {}
        assert scene.boxes([second]) == [{"Feed"} if is_same else {"Jail"}]
        feed = scene.account.cards[scene.account.group_id("Feed")]
        assert (card["uid"] in str(feed.get("members"))) == is_same
        assert scene.account.cards[card["id"]] == card
        assert len(scene.account.cards) == number or not is_same
        if not is_same:  # the server itself may take them for the same
            scene.account.remove_card(card["id"])
            scene.most_idle = 3


@given(st.emails() | st.text() | st.builds("{}@{}.example".format, st.text(), st.text()))
def test_a_sender_of_any_address_is_triaged_whole_or_marked(text: str) -> None:
    """And has one contact, which is known again."""
    with Scene() as scene:
        sender = [{"name": None, "email": text}]
        mails = [scene.account.deliver(sender, ["Screener"]) for _ in range(2)]
        for n, box in enumerate(("Feed", "Jail")):
            scene.tap(mails[n], f"@To{box}")
            assert scene.cycle() == {}
            if scene.account.mailboxes_of(mails[0]) == {"Screener", "@ToFeed", "@MailroomError"}:
                assert len(scene.account.cards) == len(scene.account.groups)
                return
            assert scene.boxes(mails) == [{box}] * 2
            assert len(scene.account.cards) == len(scene.account.groups) + 1


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


# Names


@pytest.mark.parametrize(
    ("contact", "said", "warns"),
    [
        ("Jane Doe", "'Jane Doe'", False),
        ("Jane Doe", '"Jane  Doe"', False),
        ("Jane Doe", "\u201cJane  Doe\u201d", False),
        ("Jane Doe", "Doe, Jane", False),
        ("Jos\u00e9", unicodedata.normalize("NFD", "Jos\u00e9"), False),
        ("Jane Doe", "jane@x.example", False),
        ("jane@x.example", "Jane Doe", False),
        ("Jane Doe", "JANE DOE", False),
        ("Acme, Inc.", "Acme, Inc.", False),
        ("Jane Doe", "John Doe", True),
        ("Inc. Acme", "Acme, Inc.", True),
        ("King, Jr.", "Jr. King", True),
    ],
)
def test_a_name_that_differs_warns(contact: str, said: str, warns: bool) -> None:
    with Scene() as scene:
        scene.account.add_contact("jane@x.example", contact)
        sender = [{"name": said, "email": "jane@x.example"}]
        mail = scene.account.deliver(sender, ["Screener", "@ToFeed"])
        assert scene.cycle() == {}
        assert scene.boxes([mail]) == [{"Feed", "@MailroomWarning"} if warns else {"Feed"}]


@pytest.mark.parametrize(
    ("said", "label", "name"),  # | is before the surname of a person
    [
        ("'Weekly Bytes'", "@ToFeed", "Weekly Bytes"),
        ("Doe, Jane", "@ToPerson", "Jane |Doe"),
        ("Doe, Jane, PhD", "@ToPerson", "Doe, Jane, |PhD"),
        ("Cher", "@ToPerson", "Cher"),
        ("King, Jr.", "@ToPerson", "King, |Jr."),
        ("npm, Inc.", "@ToFeed", "npm, Inc."),
        ("npm, Inc.", "@ToPerson", "npm, |Inc."),
        ("M\u00fcller, GmbH", "@ToPerson", "M\u00fcller, |GmbH"),
        ("\u200b\u00a0\u2060", "@ToFeed", "a@x.example"),
        ("x" * 300, "@ToFeed", "x" * 200),
        ("a\r\nEND:VCARD\u2028x", "@ToFeed", "a END:VCARD x"),
    ],
)
def test_the_name_of_a_new_contact(said: str, label: str, name: str) -> None:
    with Scene() as scene:
        scene.account.deliver([{"name": said, "email": "a@x.example"}], ["Screener", label])
        assert scene.cycle() == {}
        named = scene.the_contact("a@x.example")["name"]
        assert named["full"] == name.replace("|", "")
        parts = {one["kind"]: one["value"] for one in named.get("components", ())}
        values = map(str.strip, name.split("|") if label == "@ToPerson" else [])
        assert parts == dict(zip(("given", "surname"), values, strict=False))


# Servers that answer a part


@pytest.mark.parametrize("change", [{}, {"mailbox_query": "refuse"}, {"sparse_replies": True}])
def test_a_server_that_says_less_or_what_says_nothing(change: dict[str, Any]) -> None:
    """Such as an author of null, and a mailbox in which a message is not."""
    with Scene(Options(**change), takes_back=True) as scene:

        def edit(reply: Any) -> Any:
            for _, got, _ in reply["methodResponses"]:
                for mail in [each for each in got.get("list", ()) if "from" in each]:
                    mail["from"].insert(0, None)
                    mail["mailboxIds"] |= {scene.account.mailbox_id("Mine"): False}
            return reply

        scene.server.faults.append(Fault("Email/get", times=FOREVER, edit=edit))
        scene.most_idle = 2
        mails = scene.new_sender("a@x.example", 3)
        for label, box in (("@ToFeed", "Feed"), ("@ToScreener", "Screener")):
            scene.tap(mails[0], label)
            assert scene.cycle() == {}
            assert scene.boxes(mails) == [{box}] * 3


@pytest.mark.parametrize("method", ["Email/query", "Mailbox/get", "ContactCard/query"])
def test_what_has_no_way_round_ends_it_with_a_line_that_names_the_method(method: str) -> None:
    with JMAPServer.with_mailroom_account() as server:
        server.faults = [Fault(times=99, errors={method: {"type": "unsupportedFilter"}})]
        ran = command("run", "--once", jmap_url=server.session_url, jmap_token="secret-token")
        assert ran.status == 2
        assert method in ran.err.splitlines()[-1]
        assert "Traceback" not in ran.err


# The module itself


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
    assert len(source.splitlines()) <= 2700
    assert len(code) <= 1900
