"""The rules of triage on plain values: when two addresses, two uids, two names are one, who sent a
message, and what one patch does to it. What a whole account shows of it is in test_real_data.py."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailroom import (
    Email,
    address_key,
    fold_name,
    name_differs,
    parse_email,
    spellings,
    split_name,
    turn_round,
    uid_key,
)

BOB = "bob@shop.example"
UID = "c0ffee00-1111-4222-8333-44445555aaaa"


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (f" {BOB}\r\n", BOB, True),
        ("JOSE\u0301@x.example", "jose\u0301@x.example", False),
        ("info@stra\u00dfe.example", "info@strasse.example", False),
        ("bob+news@x.example", "bob@x.example", False),
        ("a@b\0", "", True),
    ],
)
def test_when_two_addresses_are_one(one: str, other: str, is_same: bool) -> None:
    assert (address_key(one) == address_key(other)) == is_same


@given(st.emails() | st.text() | st.builds("{}@{}.example".format, st.text(), st.text()))
def test_the_key_of_a_key_is_the_key(text: str) -> None:
    """And whatever it is searched by is the same address."""
    key = address_key(text)
    assert address_key(key) == key
    assert not key or key in {address_key(each) for each in spellings(key)}


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (UID, f"urn:uuid:{UID.upper()}", True),
        (f"URN:UUID:{UID}", UID, True),
        ("urn:uuid:AbC", "AbC", True),
        ("mailto:Jane@X.example", "MAILTO:jane@x.example", True),
        ("AAMkAGY3/+QBw=", "AAMkAGY3/+QBw=", True),
    ],
)
def test_when_two_uids_are_one(one: str, other: str, is_same: bool) -> None:
    assert (uid_key(one) == uid_key(other)) == is_same


@pytest.mark.parametrize(
    ("from_", "sender", "name"),
    [
        ([{"email": BOB, "name": None}, {"email": "eve@evil.example"}], BOB, ""),
        ([{"email": None, "name": "X"}, None, {"email": BOB}], BOB, ""),
        ([{"email": BOB, "name": "Bob\r\nBcc: eve\u2028x"}], BOB, "Bob  Bcc: eve x"),
        (None, "", ""),
    ],
)
def test_who_sent_a_message(from_: Any, sender: str, name: str) -> None:
    email = parse_email({"id": "1", "from": from_, "mailboxIds": {"A": True, "B": False}})
    assert email
    assert (email.sender, email.display_name, email.mailboxes) == (sender, name, frozenset("A"))


@pytest.mark.parametrize(
    ("contact", "display_name", "differs"),
    [
        ("Jane Doe", "\u201cJane  Doe\u201d", False),
        ("jane@x.example", "Jane Doe", False),
        ("", "Jane", False),
        ("Acme, Inc.", "Acme, Inc.", False),
        ("King, Jr.", "Jr. King", True),
    ],
)
def test_when_a_name_differs(contact: str, display_name: str, differs: bool) -> None:
    assert name_differs(contact, display_name) == differs


@pytest.mark.parametrize(
    ("display_name", "name", "parts"),
    [
        ("Smith, Bob", "Bob Smith", ("Bob", "Smith")),
        ("Doe, Jane, PhD", "Doe, Jane, PhD", ("Doe, Jane,", "PhD")),
        ("Cher", "Cher", ("Cher", "")),
        ("\u200b \u3000", "", ("", "")),
    ],
)
def test_the_name_of_a_person(display_name: str, name: str, parts: tuple[str, str]) -> None:
    assert turn_round(fold_name(display_name)) == name
    assert split_name(name) == parts


BOXES = st.frozensets(st.sampled_from("ABCDE"))


@given(BOXES.filter(bool), BOXES, BOXES)
def test_a_patch_never_leaves_a_message_nowhere(
    boxes: frozenset[str], add: frozenset[str], remove: frozenset[str]
) -> None:
    email = Email("1", BOB, BOB, "Bob", boxes)
    patch = email.patch(add, remove - add)
    after = email.patched(patch).mailboxes
    assert after == ((boxes | add) - (remove - add) or boxes)
    if patch:
        assert True in patch.values()
        assert after != boxes
    # The server may know better: somebody has moved the message meanwhile.
    assert not patch or Email("1", BOB, BOB, "", frozenset("Z")).patched(patch).mailboxes
