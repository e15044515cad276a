"""vCards as plain values: a new one says what it is to say whatever a sender is called, another
program reads it so too, and an edit of a group keeps all other lines byte for byte."""

import re

import pytest
import vobject  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from mailroom import (
    Card,
    CardChange,
    edit_members,
    fold_name,
    new_vcard,
    own_uid,
    parse_email,
    vcard_card,
)

BOB, EVE = "5f6b2c1e-0000-4000-8000-00000000000b", "http://x.example/cards/17"
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
NAMES = st.sampled_from([*HOSTILE.values()]) | st.text(st.characters(exclude_categories=["Cs"]))
EOLS = st.sampled_from(["\r\n", "\n"])


def vcard(*lines: str, eol: str = "\r\n", version: str = "3.0") -> str:
    """A vCard of these lines; a fold is a line that begins with white space."""
    return "".join(
        f"{line}{eol}" for line in ["BEGIN:VCARD", f"VERSION:{version}", *lines, "END:VCARD"]
    )


def read(*lines: str) -> Card:
    return vcard_card("b.vcf", vcard("UID:b", "FN:B", *lines), "")


def new_contact(display_name: str, kind: str) -> CardChange:
    """What is made for a message with this display name."""
    sender = [{"name": display_name, "email": "Bob@Shop.example"}]
    email = parse_email({"id": "M1", "from": sender, "mailboxIds": {"P1": True}})
    assert email
    name = fold_name(email.display_name).strip() or email.address
    note = f'Created by Mailroom on 2026-11-27 as "{name}"'
    uid = own_uid(f"mailto:{email.sender}")
    return CardChange(uid=uid, kind=kind, name=name, address=email.address, note=note)


@given(NAMES, st.sampled_from(["company", "person"]))
def test_a_display_name_forges_nothing(display_name: str, kind: str) -> None:
    """And the card is known for one that nobody has touched, by us and after another's hand."""
    made = new_contact(display_name, kind)
    text = new_vcard(made)
    assert set(re.findall("[\x00-\x1f\x7f\u2028]", text)) == {"\r", "\n"}
    assert max(len(line.encode()) for line in text.split("\r\n")) <= 75
    names = [line.partition(":")[0].partition(";")[0] for line in re.split("\r\n(?! )", text)]
    company = ["ORG", "X-ABSHOWAS"] if kind == "company" else []
    head = ["BEGIN", "VERSION", "PRODID", "UID", "FN", "N"]
    assert names == [*head, *company, "EMAIL", "NOTE", "END", ""]
    [card] = vobject.readComponents(text)
    assert (card.email.value, card.fn.value) == ("Bob@Shop.example", made.name)
    assert (card.note.value, card.uid.value) == (made.note, made.uid)
    if kind == "company":
        assert card.org.value == [made.name]
    else:
        assert f"{card.n.value.given} {card.n.value.family}".strip() == made.name
    ours = vcard_card("b.vcf", text, "")
    assert (ours.uid, ours.emails) == (made.uid, frozenset(["bob@shop.example"]))
    assert ours.is_untouched
    assert not ours.problem
    for line in ("TEL:1", "EMAIL:b@x.example", "NOTE:mine", "ORG:Zed, Z"):
        assert not vcard_card("b.vcf", text.replace("END:", f"{line}\r\nEND:"), "").is_untouched
    assert not vcard_card("b.vcf", text.replace("\r\nFN:", "\r\nFN:Dr. "), "").is_untouched


def test_a_person_and_a_company() -> None:
    person, company = new_contact("Bob Smith", "person"), new_contact("Bob's Shop", "company")
    head = ["PRODID:-//Mailroom//1.0//EN", f"UID:{person.uid}"]
    mail = "EMAIL;TYPE=INTERNET:Bob@Shop.example"
    names = ["FN:Bob Smith", "N:Smith;Bob;;;"]
    assert new_vcard(person) == vcard(*head, *names, mail, f"NOTE:{person.note}")
    firm = ["FN:Bob's Shop", "N:;;;;", "ORG:Bob's Shop", "X-ABSHOWAS:COMPANY"]
    assert new_vcard(company) == vcard(*head, *firm, mail, f"NOTE:{company.note}")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["item1.EMAIL;TYPE=WORK:A@x.example", "email:b@x.example"],
            {"a@x.example", "b@x.example"},
        ),
        (["EMAIL;PREF=1:mailto:A@X.example "], {"a@x.example"}),
        (["EMAIL:a@x.ex\r\n ample"], {"a@x.example"}),
        (['EMAIL;X="a;b:c":a@x.example'], {"a@x.example"}),
        (["EMAIL;ENCODING=QUOTED-PRINTABLE:a=40x.example"], {"a@x.example"}),
        (["EMAIL:a@müller.example"], {"a@xn--mller-kva.example"}),
        (["EMAIL:a@x.example\u00a0", "EMAIL:a@x.example\u3000", "EMAIL:a"], set()),
        (["NOTE:EMAIL:a@x.example", "X-EMAIL:a@x.example", "rubbish"], set()),
    ],
)
def test_the_addresses_of_a_card(lines: list[str], expected: set[str]) -> None:
    assert read(*lines).emails == expected


LINE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=90)
OTHER = LINE.filter(lambda each: not re.match(r"(?i)\s|.*(END|MEMBER|KIND|QUOTED)", each))


@given(
    lines=st.lists(OTHER | st.sampled_from(["NOTE:a", " folded", "TEL:1", ""]), max_size=8),
    members=st.sets(st.sampled_from([BOB, EVE, "urn:uuid:x", "mailto:a@x.example", "AAM/+Q="])),
    change=st.tuples(*[st.sampled_from([BOB, EVE, "urn:uuid:x", "a,b"])] * 2),
    is_apple=st.booleans(),
    eol=EOLS,
)
def test_an_edit_of_a_group_keeps_all_other_lines(
    lines: list[str], members: set[str], change: tuple[str, str], is_apple: bool, eol: str
) -> None:
    add, remove = change
    kind = "X-ADDRESSBOOKSERVER-KIND:group" if is_apple else "KIND:group"
    prefix = "X-ADDRESSBOOKSERVER-MEMBER" if is_apple else "MEMBER"
    there = [f"item1.{prefix}:{member}" for member in sorted(members)]
    text = vcard("UID:g", "FN:G", kind, "NOTE:n", *lines, *there, eol=eol)
    before = vcard_card("g.vcf", text, "")
    assert before.is_group
    gone = frozenset(before.members_among([remove.removeprefix("urn:uuid:")]))
    edited = edit_members(text, CardChange(before, add=frozenset([add]), remove=gone))
    new = f"urn:uuid:{add.removeprefix('urn:uuid:')}" if is_apple else add
    kept = [line for line in there if line.partition(":")[2] not in gone]
    expected = vcard("UID:g", "FN:G", kind, "NOTE:n", *lines, *kept, f"{prefix}:{new}", eol="\n")
    assert edited.replace("\r\n", "\n") == expected
    assert {*vcard_card("g.vcf", edited, "").members} == {*before.members} - gone | {new}
    assert edit_members(text, CardChange(before)) == text


@given(LINE | st.text())
def test_whatever_there_is_is_read(text: str) -> None:
    for each in (text, vcard(text), vcard("UID:b", "FN:B", f"EMAIL:{text}")):
        card = vcard_card("b.vcf", each, "")
        assert card.problem or card.uid
        assert not card.is_untouched
