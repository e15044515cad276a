"""The vCard line editor: it reads what all sorts of cards say, and changes its own lines only."""

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import date

import pytest
import vobject  # type: ignore[import-untyped]
from hypothesis import example, given
from hypothesis import strategies as st

from mailroom import (
    Card,
    CardChange,
    Category,
    Property,
    Rules,
    canonical_uid,
    edit_vcard,
    new_vcard,
    parse_mail,
    plan_contact,
    vcard_card,
    vcard_fold,
    vcard_is_untouched,
    vcard_lines,
    vcard_property,
    vcard_unfold,
)

BOB = "urn:uuid:5f6b2c1e-0000-4000-8000-00000000000b"
EVE = "urn:uuid:5f6b2c1e-0000-4000-8000-00000000000e"
FEED = Category("Feed", "@ToFeed", "Feed", "Feed")
TRIAGED = "Triaged to Feed on 2025-01-01"
MADE = f"Created by Mailroom\\n{TRIAGED}"
SHOP = {"b@shop.example"}
EOLS = pytest.mark.parametrize("eol", ["\r\n", "\n"], ids=["crlf", "lf"])


def vcard(*lines: str, eol: str = "\r\n", version: str = "3.0") -> str:
    """A vCard of these lines; a fold is a line that begins with white space."""
    return "".join(
        f"{line}{eol}" for line in ["BEGIN:VCARD", f"VERSION:{version}", *lines, "END:VCARD"]
    )


def read(*lines: str, eol: str = "\r\n") -> Card:
    """What a card with a UID and these lines says."""
    card = vcard_card("bob.vcf", vcard("UID:b", *lines, eol=eol), "")
    assert card
    return card


# ------------------------------------------------------------------------------------- reading


@EOLS
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("FN:Bob|", ["FN:Bob|"]),
        ("FN:Bo| b|", ["FN:Bo| b|"]),
        ("FN:Bo|\tb| y|N:;;|", ["FN:Bo|\tb| y|", "N:;;|"]),
        ("FN:Bob||N:;;|", ["FN:Bob|", "|", "N:;;|"]),
        (" FN:Bob|", [" FN:Bob|"]),
        ("FN:Bob|END:VCARD", ["FN:Bob|", "END:VCARD"]),
    ],
    ids=["nothing", "one", "fold", "folds", "blank", "fold-first", "no-last-eol"],
)
def test_content_lines_keep_their_folds_and_line_ends(
    text: str, lines: list[str], eol: str
) -> None:
    assert vcard_lines(text.replace("|", eol)) == [line.replace("|", eol) for line in lines]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("FN:Bob", ("FN", "", "Bob")),
        ("fn:Bob\r\n", ("FN", "", "Bob")),
        ("FN:Bo\r\n b", ("FN", "", "Bob")),
        ("FN:Bo\n\tb\n", ("FN", "", "Bob")),
        ("FN:B\r\n o\r\n  b\r\n", ("FN", "", "Bo b")),
        ("EM\r\n AIL:b@x.example", ("EMAIL", "", "b@x.example")),
        ("item1.EMAIL;type=HOME:b@x.example", ("EMAIL", ";type=HOME", "b@x.example")),
        ("item1.X-ABLabel:_$!<Other>!$_", ("X-ABLABEL", "", "_$!<Other>!$_")),
        ('EMAIL;X-A="a:b;c";TYPE=x:b@x', ("EMAIL", ';X-A="a:b;c";TYPE=x', "b@x")),
        ("EMAIL;TYPE=INTERNET;TYPE=HOME:b@x", ("EMAIL", ";TYPE=INTERNET;TYPE=HOME", "b@x")),
        ("EMAIL;INTERNET:b@x", ("EMAIL", ";INTERNET", "b@x")),
        ("URL:https://b.example:8/", ("URL", "", "https://b.example:8/")),
        ("NOTE:", ("NOTE", "", "")),
        ('NOTE;X="open:b', ("", "", 'NOTE;X="open:b')),
        ("no colon", ("", "", "no colon")),
        ("NOTE BOOK:x", ("", "", "NOTE BOOK:x")),
        ("", ("", "", "")),
    ],
)
def test_a_content_line_is_taken_apart(line: str, expected: tuple[str, str, str]) -> None:
    assert vcard_property(line) == Property(*expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (r"a\, b\; c\\d", r"a, b; c\d"),
        (r"one\ntwo\Nthree", "one\ntwo\nthree"),
        (r"a\\n", r"a\n"),
        (r"a\:b", "a:b"),
        ("ends with \\", "ends with \\"),
        ("a\\\r\n nb", "a\nb"),
        ("caf\r\n é", "café"),
    ],
    ids=["escapes", "newlines", "backslash", "colon", "dangling", "fold-in-escape", "fold-at-utf8"],
)
def test_a_value_is_unescaped_once_unfolded(value: str, text: str) -> None:
    assert vcard_property(f"NOTE:{value}\r\n").text == text


@EOLS
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["FN:Bob"], {"name": "Bob"}),
        (["FN: ", "N:Smith;Bob;;;"], {"name": "Bob Smith"}),
        (["FN: ", "N:Smith;Bob;Q.;Dr.;"], {"name": "Bob Q. Smith"}),
        (["FN: ", "N:Smith"], {"name": "Smith"}),
        (["N:;Bob;;;"], {"name": "Bob"}),
        (["FN:", "N:;;;;"], {"name": ""}),
        (["N:;;;;", r"ORG:Shop\, Inc.;"], {"name": "Shop, Inc."}),
        (["item2.FN:Bob"], {"name": "Bob"}),
        (["EMAIL:b@x", "EMAIL;TYPE=HOME:C@X"], {"emails": {"b@x", "c@x"}}),
        (["item1.EMAIL;type=INTERNET:B@Shop.Example ", "item1.X-ABLabel:Home"], {"emails": SHOP})
        if (ADDR := {"b@shop.example"})
        else None,
        (["email;type=pref:b@shop.example"], {"emails": SHOP}),
        (["EMAIL:b@sho", " p.example"], {"emails": SHOP}),
        (['EMAIL;X-L="not:a@b.example;":b@shop.example'], {"emails": SHOP}),
        (["NOTE:one\\ntwo", "NOTE:three"], {"notes": {"0": "one\ntwo", "1": "three"}}),
        (["NOTE:"], {"notes": {"0": ""}}),
        (["X-KIND:group", "KIND:individual"], {"is_group": False}),
        (["KIND:Group"], {"is_group": True}),
        (["x-addressbookserver-kind:group"], {"is_group": True}),
        (
            ["KIND:group", f"MEMBER:{BOB}", f"MEMBER:{EVE}"],
            {"is_group": True, "members": {BOB, EVE}},
        ),
        (
            ["X-ADDRESSBOOKSERVER-KIND:group", f"x-addressbookserver-member:{BOB}"],
            {"is_group": True, "members": {BOB}},
        ),
        (["PHOTO;ENCODING=b;TYPE=JPEG:/9j/4AAQ", " RU1BSUw6ZXZlQHguZXhhbXBsZQ=="], {}),
        (["X-NOTE:no", "NOTES:no", "X.Y.EMAIL:no@x"], {"notes": {}}),
    ],
)
def test_a_card_says(lines: list[str], expected: dict[str, object], eol: str) -> None:
    unsaid = {"name": "", "emails": set(), "notes": {}, "is_group": False, "members": set()}
    card = read(*lines, eol=eol)
    assert {name: getattr(card, name) for name in unsaid} == unsaid | expected


@pytest.mark.parametrize(
    ("value", "same"),
    [
        (BOB, BOB),
        (BOB.removeprefix("urn:uuid:"), BOB),
        (f" {BOB} ", BOB),
        (BOB.replace("urn:uuid:", "URN:UUID:"), BOB),
        ("urn:UUID:any-name@home", "urn:uuid:any-name@home"),
        ("ABPerson-1", "urn:uuid:ABPerson-1"),
    ],
)
def test_a_uid_is_the_same_in_every_form(value: str, same: str) -> None:
    assert canonical_uid(value) == same


def test_a_card_without_a_uid_is_none() -> None:
    assert vcard_card("bob.vcf", vcard("FN:Bob"), "") is None


# ------------------------------------------------------------------------------------- editing

JOIN = CardChange("g", add=frozenset({BOB}))
LEAVE = CardChange("g", remove=frozenset({BOB}))
NOTE = CardChange("b", note=(TRIAGED,))
NAME = CardChange("b", name="Bob")
CLEAN = CardChange("b", clean=True)
APPLE, V4 = "X-ADDRESSBOOKSERVER-KIND:group", "KIND:group"
A_MEMBER, MEMBER = "X-ADDRESSBOOKSERVER-MEMBER", "MEMBER"
QP_NOTE = ["NOTE;ENCODING=QUOTED-PRINTABLE;CHARSET=UTF-8:caf=C3=A9=0D=0A=", "end"]
QP_21, BASE64_21 = ["NOTE;quoted-printable:caf=E9=0D=0A=", "end"], "NOTE;BASE64:YQ=="

EDITS: dict[str, tuple[CardChange, list[str], list[str]]] = {
    # what is done, to which lines, which become
    "join apple": (JOIN, [APPLE, "FN:G"], [APPLE, "FN:G", f"{A_MEMBER}:{BOB}"]),
    "join v4": (JOIN, [V4, f"MEMBER:{EVE}"], [V4, f"MEMBER:{EVE}", f"MEMBER:{BOB}"]),
    "join two": (
        CardChange("g", add=frozenset({EVE, BOB})),
        [V4],
        [V4, f"MEMBER:{BOB}", f"MEMBER:{EVE}"],
    ),
    "leave apple": (
        LEAVE,
        [APPLE, f"{A_MEMBER}:{BOB}", f"{A_MEMBER}:{EVE}"],
        [APPLE, f"{A_MEMBER}:{EVE}"],
    ),
    "leave v4": (LEAVE, [V4, f"MEMBER:{BOB}", "X-A:1"], [V4, "X-A:1"]),
    "leave, folded": (LEAVE, [V4, f"MEMBER:{BOB[:20]}", f" {BOB[20:]}", "X-A:1"], [V4, "X-A:1"]),
    "leave, twice in it": (LEAVE, [APPLE, f"{A_MEMBER}:{BOB}", f"{A_MEMBER}:{BOB}"], [APPLE]),
    "leave, other forms": (
        LEAVE,
        [
            APPLE,
            f"{A_MEMBER}:{BOB.removeprefix('urn:uuid:')}",
            f"item1.{A_MEMBER.lower()};X=1:{BOB.replace('urn:uuid', 'URN:UUID')}",
        ],
        [APPLE],
    ),
    "leave, both styles at once": (
        LEAVE,
        [APPLE, V4, f"{A_MEMBER}:{BOB}", f"MEMBER:{BOB}"],
        [APPLE, V4],
    ),
    "note, none yet": (NOTE, ["FN:Bob"], ["FN:Bob", f"NOTE:{TRIAGED}"]),
    "note, empty": (NOTE, ["NOTE:", "FN:B"], ["NOTE:", "FN:B", f"NOTE:{TRIAGED}"]),
    "note grows": (NOTE, ["NOTE:Old", "FN:B"], ["NOTE:Old", f" \\n{TRIAGED}", "FN:B"]),
    "note grows, folded": (
        NOTE,
        ["item1.NOTE;LANGUAGE=en:O", "\tl", " d", "FN:B"],
        ["item1.NOTE;LANGUAGE=en:O", "\tl", " d", f" \\n{TRIAGED}", "FN:B"],
    ),
    "note grows, escapes": (NOTE, [r"NOTE:a\, b\\"], [r"NOTE:a\, b\\", f" \\n{TRIAGED}"]),
    "note, the first grows": (
        NOTE,
        ["NOTE:a", "NOTE:b"],
        ["NOTE:a", f" \\n{TRIAGED}", "NOTE:b"],
    ),
    "note, quoted-printable": (NOTE, QP_NOTE, [*QP_NOTE, f"NOTE:{TRIAGED}"]),
    "note, vCard 2.1": (NOTE, QP_21, [*QP_21, f"NOTE:{TRIAGED}"]),
    "note, base64": (NOTE, [BASE64_21], [BASE64_21, f"NOTE:{TRIAGED}"]),
    "note of two lines": (
        replace(NOTE, note=("a,b", "c")),
        ["NOTE:x"],
        ["NOTE:x", r" \na\,b\nc"],
    ),
    "clean, nothing to": (CLEAN, ["NOTE;X=1:a", " b"], ["NOTE;X=1:a", " b"]),
    "clean, nothing left": (CLEAN, [f"NOTE:{MADE}", "FN:B"], ["FN:B"]),
    "clean, folded": (CLEAN, ["i.NOTE;X=1:O", "  ld", f" \\n{TRIAGED}"], ["i.NOTE;X=1:O ld"]),
    "clean, before and behind": (
        CLEAN,
        [rf"NOTE:{MADE}\na\, b\nCreated by Mailroom\Nc\n{TRIAGED}"],
        [r"NOTE:a\, b\Nc"],
    ),
    "clean, a comma": (CLEAN, [r"NOTE:Triaged to A\, B on 2025-01-01", "FN:B"], ["FN:B"]),
    "clean, all notes": (CLEAN, [f"NOTE:{TRIAGED}", f"NOTE:a\\n{TRIAGED}"], ["NOTE:a"]),
    "clean, an empty note": (CLEAN, ["NOTE:", "FN:B"], ["NOTE:", "FN:B"]),
    "clean, quoted-printable": (CLEAN, QP_NOTE, QP_NOTE),
    "clean, other words": (CLEAN, [f"NOTE:{TRIAGED}."], [f"NOTE:{TRIAGED}."]),
    "clean, notes only": (CLEAN, [f"TITLE:{TRIAGED}"], [f"TITLE:{TRIAGED}"]),
    "name, none yet": (NAME, ["N:;;;;"], ["N:;;;;", "FN:Bob"]),
    "name, empty": (NAME, ["FN: ", "N:;;;;"], ["N:;;;;", "FN:Bob"]),
    "name, there": (NAME, ["FN:Robert", "N:;;;;"], ["FN:Robert", "N:;;;;"]),
    "name and note": (
        replace(NOTE, name="Bob"),
        ["EMAIL:b@x"],
        ["EMAIL:b@x", "FN:Bob", f"NOTE:{TRIAGED}"],
    ),
}  # fmt: skip
OTHERS = [
    'item1.EMAIL;type=INTERNET;X-L="a:b;c":b@x.example',
    "item1.X-ABLabel:_$!<Other>!$_",
    "X-UNKNOWN;X-P=\\:odd \\value ",
    "x-lower:e\u0301\U0001f600",
    "PHOTO;ENCODING=b;TYPE=JPEG:/9j/4AAQSkZJRgABAQ",
    "  RU5EOlZDQVJE",
    "\tIA==",
    "not a property",
    "",
]


@EOLS
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_touches_its_own_lines_only(edit: str, eol: str) -> None:
    change, before, after = EDITS[edit]
    card, expected = vcard(*OTHERS, *before, eol=eol), vcard(*OTHERS, *after, eol=eol)
    edited = edit_vcard(card, change)
    assert vcard_lines(edited) == vcard_lines(expected)
    assert edited == expected


UNCHANGED: dict[str, tuple[CardChange, list[str]]] = {
    "nothing to do": (CardChange("b"), ["NOTE:a"]),
    "joined already": (JOIN, [APPLE, f"{A_MEMBER}:{BOB}"]),
    "joined already, v4": (JOIN, [V4, f"member:{BOB}"]),
    "joined already, bare": (JOIN, [V4, f"MEMBER:{BOB.removeprefix('urn:uuid:')}"]),
    "joined already, upper case": (JOIN, [V4, f"MEMBER:{BOB.replace('urn:uuid', 'URN:UUID')}"]),
    "joined already, in the other style": (JOIN, [APPLE, V4, f"MEMBER:{BOB}"]),
    "left already": (LEAVE, [APPLE, f"{A_MEMBER}:{EVE}"]),
    "left already, nobody in it": (LEAVE, [V4]),
    "named already": (NAME, ["FN:Robert"]),
}


@EOLS
@pytest.mark.parametrize("case", UNCHANGED)
def test_what_is_so_already_changes_nothing(case: str, eol: str) -> None:
    change, lines = UNCHANGED[case]
    card = vcard(*OTHERS, *lines, eol=eol)
    assert edit_vcard(card, change) == card


@pytest.mark.parametrize("name", ["add", "remove"])
@pytest.mark.parametrize("kind", [APPLE, V4])
def test_joining_and_leaving_undo_each_other(kind: str, name: str) -> None:
    card = vcard(kind, *OTHERS)
    joined = edit_vcard(card, JOIN)
    assert (edit_vcard(joined, LEAVE), edit_vcard(joined, JOIN)) == (card, joined)


@pytest.mark.parametrize(
    "text", ["", "BEGIN:VCARD\r\n", "<html>\n</html>", "BEGIN:VCARD\rEND:VCARD"]
)
def test_what_has_no_end_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="without an END"):
        edit_vcard(text, NOTE)


def test_added_lines_are_folded_and_the_others_are_not() -> None:
    long = CardChange("b", note=("caf\u00e9 \U0001f600 " * 30,))
    card = vcard("NOTE:" + "x" * 200)
    edited = edit_vcard(card, long)
    assert edited.startswith(card.removesuffix("END:VCARD\r\n"))
    grown = edited.removeprefix(card.removesuffix("END:VCARD\r\n"))
    assert max(len(line.encode()) for line in grown.split("\r\n")) <= 75
    assert read_note(edited) == "x" * 200 + "\n" + long.note[0]


def read_note(text: str) -> str:
    card = vcard_card("", text.replace("VERSION:3.0", "VERSION:3.0\r\nUID:b"), "")
    assert card
    return card.notes["0"]


# --------------------------------------------------------------------------------- a new vCard

HOSTILE = {
    "newline": "Bob\r\nEMAIL:eve@x.example",
    "fold": "Bob\r\n EMAIL:eve@x.example",
    "bare cr": "Bob\rEMAIL:eve@x.example",
    "separators": "Bob\u2028EMAIL:e@x\u2029EMAIL:e@x\u0085EMAIL:e@x\x0b\x0c\x1c\x1dEMAIL:e@x",
    "end": "Bob\nEND:VCARD\nBEGIN:VCARD\nUID:eve",
    "end in one line": "END:VCARD",
    "escapes": "B\\ob; \\n, \\",
    "structured": "Bob;Eve;;;",
    "colon": "item1.EMAIL:eve@x.example",
    "quotes": 'Bob" <b>;X="',
    "emoji": "B\u00f6b \U0001f469\u200d\U0001f469\u200d\U0001f467 " * 20,
    "nul": "Bob\x00\x1b[2J",
    "long": "B" * 500,
    "comma": "Smith, Bob",
    "blank": " \t ",
}


def made_from(display_name: str, contact_type: str) -> CardChange:
    """The change that a mail with this display name leads to."""
    sender = {"name": display_name, "email": "Bob@Shop.example"}
    mail = parse_mail({"id": "M1", "from": [sender], "mailboxIds": {"P1": True}})
    category = replace(FEED, contact_type=contact_type)
    rules = Rules((category,), "Mailroom", date(2025, 1, 1))
    return plan_contact(mail.sender, category, mail.display_name, [], rules)


@pytest.mark.parametrize("contact_type", ["company", "person"])
@pytest.mark.parametrize("display_name", HOSTILE.values(), ids=HOSTILE)
def test_a_display_name_forges_nothing(display_name: str, contact_type: str) -> None:
    change = made_from(display_name, contact_type)
    text = new_vcard(change)
    names = [vcard_property(line).name for line in vcard_lines(text)]
    company = ["ORG", "X-ABSHOWAS"] if contact_type == "company" else []
    head = ["BEGIN", "VERSION", "PRODID", "UID", "FN", "N"]
    assert names == [*head, *company, "EMAIL", "NOTE", "END"]
    assert set(re.findall("[\x00-\x1f\x7f]", text)) == {"\r", "\n"}
    assert max(len(line.encode()) for line in text.split("\r\n")) <= 75

    [card] = vobject.readComponents(text)
    assert [card.email.value, card.fn.value] == ["bob@shop.example", change.name]
    assert card.note.value == f"Created by Mailroom\n{TRIAGED}"
    assert canonical_uid(card.uid.value) == change.uid
    if contact_type == "company":
        assert card.org.value == [change.name]
    else:
        said = f"{card.n.value.given} {card.n.value.family}".strip()
        assert said == change.name


@pytest.mark.parametrize("display_name", HOSTILE.values(), ids=HOSTILE)
def test_a_display_name_that_fills_an_empty_one_forges_nothing(display_name: str) -> None:
    change = CardChange("b", name=made_from(display_name, "person").name)
    card = vcard("UID:b", "N:;;;;")
    edited = edit_vcard(card, change)
    names = [vcard_property(line).name for line in vcard_lines(edited)]
    assert names == ["BEGIN", "VERSION", "UID", "N", "FN", "END"]
    assert vobject.readOne(edited).fn.value == change.name


def test_a_person_and_a_company() -> None:
    person = made_from("Smith, Bob", "person")
    company = made_from("Bob's Shop", "company")
    uid = person.uid.removeprefix("urn:uuid:")
    head = ["PRODID:-//Mailroom//1.0//EN", f"UID:{uid}"]
    tail = ["EMAIL;TYPE=INTERNET:bob@shop.example", f"NOTE:{MADE}"]
    assert new_vcard(person) == vcard(*head, "FN:Bob Smith", "N:Smith;Bob;;;", *tail)
    firm = ["FN:Bob's Shop", "N:;;;;", "ORG:Bob's Shop", "X-ABSHOWAS:COMPANY"]
    assert new_vcard(company) == vcard(*head, *firm, *tail)


# ---------------------------------------------------------------------------------- properties

EDGES = ["\r\n", "\n", "\r", " ", "\t", ":", ";", '"', "\\", ".", "\u2028", "é"]
WORDS = ["BEGIN:VCARD", "END:VCARD", "NOTE", "FN", "UID:b", "MEMBER:", "item1.", "ENCODING=b"]
PIECES = st.sampled_from([*EDGES, *WORDS, A_MEMBER, APPLE, V4, BOB])
ANY_TEXT = st.one_of(st.text(), st.lists(PIECES | st.text(max_size=3)).map("".join))
CHANGES = st.builds(
    CardChange,
    uid=st.just("b"),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=90),
    note=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=90)).map(tuple),
    add=st.frozensets(st.sampled_from([BOB, EVE])),
    remove=st.frozensets(st.sampled_from([BOB, EVE])),
)


@given(ANY_TEXT)
def test_lines_put_together_are_the_text(text: str) -> None:
    assert "".join(vcard_lines(text)) == text


@given(ANY_TEXT, CHANGES)
def test_whatever_is_read_raises_nothing_unnamed(text: str, change: CardChange) -> None:
    card = vcard_card("b.vcf", text, "")
    assert card is None or card.uid.startswith("urn:uuid:")
    assert edit_is_refused(text, change) == ("END" not in names_in(text))


def names_in(text: str) -> set[str]:
    return {vcard_property(line).name for line in vcard_lines(text)}


def edit_is_refused(text: str, change: CardChange) -> bool:
    try:
        edit_vcard(text, change)
    except ValueError:
        return True
    return False


@given(
    st.lists(ANY_TEXT.filter(lambda line: "\n" not in line)),
    CHANGES,
    st.sampled_from(["\r\n", "\n"]),
)
@example(["NOTE:a", " b"], CardChange("b", note=("c",)), "\n")
def test_an_edit_keeps_all_other_lines_byte_for_byte(
    lines: list[str], change: CardChange, eol: str
) -> None:
    lines = [line for line in lines if vcard_property(line).name != "END"]
    text = vcard(*lines, eol=eol)
    kept = [line for line in vcard_lines(text) if not may_go(vcard_property(line), change)]
    rest = edit_vcard(text, change)
    for line in kept:
        at = rest.find(line)
        assert at >= 0
        rest = rest[at + len(line) :]


def may_go(line: Property, change: CardChange) -> bool:
    """Whether a line may be missing after the change."""
    leaves = line.name in (MEMBER, A_MEMBER) and canonical_uid(line.value) in change.remove
    return leaves or (line.name == "FN" and not line.value.strip())


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_a_fold_comes_apart_again(text: str) -> None:
    folded = vcard_fold(f"NOTE:{text}", "\r\n")
    assert max(len(line.encode()) for line in folded.split("\r\n")) <= 75
    assert vcard_property(folded).value == text


WRITERS: list[Callable[[CardChange], str]] = [new_vcard, lambda change: edit_vcard(vcard(), change)]


@pytest.mark.parametrize("write", WRITERS, ids=["new", "edit"])
@given(name=st.text(), note=st.text())
def test_no_text_writes_a_property_of_its_own(
    write: Callable[[CardChange], str], name: str, note: str
) -> None:
    change = replace(made_from(name, "person"), note=(note.replace("\r", ""),))
    allowed = {"BEGIN", "VERSION", "PRODID", "UID", "FN", "N", "EMAIL", "NOTE", "END"}
    try:
        written = write(change)
    except UnicodeEncodeError:  # a lone surrogate is no text that could be sent
        return
    assert names_in(written) <= allowed


# ------------------------------------------------------------------------------- taken back


@given(
    st.lists(ANY_TEXT.filter(lambda line: "\n" not in line)),
    st.lists(st.sampled_from([TRIAGED, "Triaged to Paper Trail on 2025-12-31"]), min_size=1),
    st.sampled_from(["\r\n", "\n"]),
)
@example(["NOTE:a", " b"], [TRIAGED], "\n")
@example(["NOTE;X=1:"], [TRIAGED], "\r\n")
@example(["NOTE:a\\"], [TRIAGED], "\r\n")
def test_a_card_that_grew_is_as_it_was(lines: list[str], added: list[str], eol: str) -> None:
    lines = [line for line in lines if vcard_property(line).name != "END"]
    text = vcard(*lines, eol=eol)
    grown = edit_vcard(text, CardChange("b", note=tuple(added)))
    assert unfolded(edit_vcard(grown, CLEAN)) == unfolded(text)


def unfolded(text: str) -> list[str]:
    return [vcard_unfold(line) for line in vcard_lines(text)]


MADE_CARDS = [
    CardChange(BOB, name=name, kind=kind, address=address, note=("Created by Mailroom", TRIAGED))
    for name in ("Bob Smith", "b@x.example", "B\u00f6b; \U0001f600, Inc.", ("Bob " * 40).strip())
    for kind in ("person", "company")
    for address in ("b@x.example", "o'b+c@x.example")
]


@pytest.mark.parametrize("made", MADE_CARDS, ids=lambda made: f"{made.kind} {made.name[:12]}")
def test_a_card_as_it_was_made_is_untouched_and_no_other(made: CardChange) -> None:
    text = new_vcard(made)
    assert vcard_is_untouched(text)
    # A server may leave out, put in order, fold and note as it likes.
    lines = sorted(unfolded(text)[1:-1])
    served = [line for line in lines if not line.startswith(("PRODID", "X-ABSHOWAS"))]
    assert vcard_is_untouched(vcard(*served[:-1], "REV:20250101T000000Z", "PRODID:other", eol="\n"))
    cleaned = edit_vcard(text, CLEAN)
    assert vcard_is_untouched(cleaned)
    for line in ("TEL:1", "NICKNAME:B", "EMAIL:c@x.example", "X-A:1", "KIND:location", "FN:C"):
        assert not vcard_is_untouched(text.replace("END:", f"{line}\r\nEND:")), line
    assert not vcard_is_untouched(text.replace("EMAIL;TYPE=INTERNET", "EMAIL;TYPE=WORK"))


def test_a_group_as_it_was_made_is_untouched_whoever_is_in_it() -> None:
    text = new_vcard(CardChange(BOB, name="Paper; Trail", kind="group"))
    member = edit_vcard(text, CardChange(BOB, add=frozenset({EVE})))
    assert vcard_is_untouched(text)
    assert vcard_is_untouched(member)
    assert not vcard_is_untouched(member.replace("END:", "TITLE:x\r\nEND:"))


def test_a_card_without_a_uid_is_not_judged() -> None:
    assert not vcard_is_untouched(vcard("FN:Bob"))
