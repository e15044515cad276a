"""The rules of triage, with plain values: which sender goes where, what becomes of each mail, which
contact and groups are meant, and that a plan carried out leaves nothing to plan."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mailroom
from mailroom import (
    CREATED_NOTE,
    STEPS,
    Boxes,
    Card,
    CardChange,
    Category,
    Mail,
    MailPatch,
    Rules,
    SenderPlan,
    Writes,
    as_made,
    came_to_inbox,
    clean_note,
    contact_uid,
    error_patches,
    failures,
    find_contact,
    full_name,
    group_uid,
    mail_patch,
    name_differs,
    names_given,
    parse_categories,
    parse_mail,
    plan_contact,
    plan_groups,
    plan_mails,
    plan_sender,
    reset_patch,
    sort_queue,
    split_name,
    to_join,
    to_refile,
    was_made,
)

TODAY = date(2025, 3, 4)
CATEGORIES, _ = parse_categories(mailroom.DEFAULT_CATEGORIES)
BY_NAME = {category.name: category for category in CATEGORIES}
FEED, IMBOX, PERSON = BY_NAME["Feed"], BY_NAME["Imbox"], BY_NAME["Person"]
RULES = Rules(CATEGORIES, "Mailroom", TODAY)
GROUPS = ("Mailroom", *BY_NAME)
# The mailboxes' ids are their names here.
BOXES = Boxes(
    inbox="Inbox",
    screener="Screener",
    error="@Error",
    warning="@Warning",
    labels={category.label: category for category in CATEGORIES},
    destinations={category: category.name for category in CATEGORIES},
)
OWN = frozenset({"alice@home.example"})
BOB = "bob@shop.example"
TRIAGED = "Triaged to Feed on 2025-03-04"


def mail(id_: str, *boxes: str, sender: str = BOB, name: str = "Bob", received: str = "") -> Mail:
    return Mail(id_, sender, name, frozenset(boxes), received)


def contact(uid: str, address: str = BOB, name: str = "Bob", **more: Any) -> Card:
    return Card(uid, uid, name, frozenset({address}), **more)


def group(name: str, *members: str, uid: str = "") -> Card:
    return Card(uid or f"g-{name}", name, name, is_group=True, members=frozenset(members))


def groups(**members: Collection[str]) -> list[Card]:
    """A group for each category and the provenance group, with these members."""
    return [group(name, *members.get(name.replace(" ", ""), ())) for name in GROUPS]


def names(cards: Collection[Card]) -> list[str]:
    return [card.name for card in cards]


# ------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize(
    ("raw", "sender", "name"),
    [
        ([{"email": "Bob@Shop.EXAMPLE", "name": "Bob"}], BOB, "Bob"),
        ([{"email": " bob@shop.example "}], BOB, ""),
        ([{"email": BOB, "name": None}, {"email": "eve@evil.example"}], BOB, ""),
        ([{"email": "bob+news@shop.example", "name": "B"}], "bob+news@shop.example", "B"),
        ([{"email": '"a b"@shop.example', "name": "B"}], '"a b"@shop.example', "B"),
        ([{"email": "JÖRG@Müller.example", "name": "Jörg"}], "jörg@müller.example", "Jörg"),
        ([{"email": BOB, "name": "Bob\r\nBcc: eve\u2028x"}], BOB, "Bob  Bcc: eve x"),
        ([{"email": "bob@shop.example\nX", "name": "B"}], "", "B"),
        ([{"email": "undisclosed", "name": "B"}], "", "B"),
        ([{"email": None, "name": None}], "", ""),
        ([], "", ""),
        (None, "", ""),
    ],
)
def test_who_sent_a_mail(raw: Any, sender: str, name: str) -> None:
    parsed = parse_mail({"id": "1", "from": raw, "mailboxIds": {"A": True, "B": False}})
    assert (parsed.sender, parsed.display_name) == (sender, name)
    assert parsed.mailboxes == {"A"}


@pytest.mark.parametrize(
    ("mails", "decided", "unusable"),
    [
        pytest.param([], {}, set(), id="nothing"),
        pytest.param([mail("1", "@ToFeed", "Screener")], {BOB: "Feed"}, set(), id="one"),
        pytest.param(
            [mail("1", "@ToFeed"), mail("2", "@ToFeed")], {BOB: "Feed"}, set(), id="twice the same"
        ),
        pytest.param(
            [mail("1", "@ToFeed"), mail("2", "@ToJail"), mail("3", "@Error")],
            {},
            {"1", "2"},
            id="conflict on two mails",
        ),
        pytest.param([mail("1", "@ToFeed", "@ToJail")], {}, {"1"}, id="two labels on one mail"),
        pytest.param(
            [mail("1", "@ToFeed", "@ToJail"), mail("2", "@ToJail", sender="eve@evil.example")],
            {"eve@evil.example": "Jail"},
            {"1"},
            id="a conflict is one sender's",
        ),
        pytest.param([mail("1", "@ToFeed", sender="")], {}, {"1"}, id="no From"),
        pytest.param(
            [mail("1", "@ToFeed", sender=""), mail("2", "@ToJail", sender="")],
            {},
            {"1", "2"},
            id="no From twice",
        ),
        pytest.param(
            [mail("1", "@ToFeed", sender="alice@home.example")], {}, {"1"}, id="own address"
        ),
        pytest.param([mail("1", "@Error", "Screener")], {}, set(), id="only the error label"),
    ],
)
def test_sort_queue(mails: list[Mail], decided: dict[str, str], unusable: set[str]) -> None:
    found, wrong = sort_queue(mails, BOXES, OWN)
    assert {sender: category.name for sender, category in found.items()} == decided
    assert wrong.keys() == unusable


@pytest.mark.parametrize(
    ("boxes", "is_unusable", "after"),
    [
        (("@ToFeed", "Screener"), True, {"@ToFeed", "Screener", "@Error"}),
        (("@ToFeed", "@Error"), True, {"@ToFeed", "@Error"}),
        (("@Error", "Screener"), False, {"Screener"}),
        (("@Error", "Trash", "Mine"), False, {"Trash", "Mine"}),
        (("@Error",), False, {"@Error"}),  # never out of its only mailbox
    ],
)
def test_error_label_comes_and_goes(
    boxes: tuple[str, ...], is_unusable: bool, after: set[str]
) -> None:
    one = mail("1", *boxes)
    patches = error_patches([one], {}, {"1"} if is_unusable else set(), BOXES)
    assert one.patched(patches["1"]).mailboxes == after
    assert bool(patches["1"]) == (after != set(boxes))


def test_error_label_of_decided_senders_is_left_to_their_plans() -> None:
    assert error_patches([mail("1", "@ToFeed", "@Error")], {BOB}, set(), BOXES) == {}


# ------------------------------------------------------------------------------- the mails


@pytest.mark.parametrize(
    ("boxes", "add", "remove", "patch"),
    [
        ("A", "", "", {}),
        ("A", "A", "", {}),
        ("A", "", "B", {}),
        ("A", "B", "", {"B": True}),
        ("AB", "", "A", {"B": True, "A": None}),
        ("A", "B", "A", {"B": True, "A": None}),
        ("AB", "B", "A", {"B": True, "A": None}),
        ("A", "", "A", {}),
        ("ABC", "", "ABC", {}),
    ],
)
def test_mail_patch(boxes: str, add: str, remove: str, patch: Mapping[str, bool | None]) -> None:
    assert mail_patch(mail("1", *boxes), add, remove) == {
        f"mailboxIds/{box}": stays for box, stays in patch.items()
    }


some_boxes = st.sets(st.sampled_from("ABCDE"))


@given(boxes=some_boxes.filter(bool), add=some_boxes, remove=some_boxes)
def test_mail_patch_never_leaves_a_mail_nowhere(
    boxes: set[str], add: set[str], remove: set[str]
) -> None:
    one, remove = mail("1", *boxes), remove - add
    patch = mail_patch(one, add, remove)
    after = one.patched(patch).mailboxes
    assert after == ((boxes | add) - remove or boxes)
    if None in patch.values():
        assert any(patch.get(f"mailboxIds/{box}") is True for box in after)
    assert mail_patch(one.patched(patch), add, remove) == {}


def family(category: Category) -> list[Category]:
    return RULES.family(category)


@pytest.mark.parametrize(
    ("category", "boxes", "refiled", "finished"),
    [
        ("Feed", "@ToFeed Screener", "@ToFeed Feed", "Feed"),
        ("Feed", "Screener", "Feed", "Feed"),
        ("Feed", "@ToFeed", "@ToFeed Feed", "Feed"),
        ("Feed", "@ToFeed Inbox", "@ToFeed Inbox Feed", "Inbox Feed"),
        ("Feed", "@ToFeed Mine", "@ToFeed Mine Feed", "Mine Feed"),
        ("Feed", "@ToFeed @Error Screener", "@ToFeed @Error Feed", "Feed"),
        ("Feed", "Screener @Error", "Feed @Error", "Feed"),
        # Re-triage: out of every other destination, but never out of the Inbox.
        ("Feed", "Jail", "Feed", "Feed"),
        ("Feed", "Imbox Inbox", "Feed Inbox", "Feed Inbox"),
        ("Feed", "Billboard Paper_Trail Mine", "Feed Mine", "Feed Mine"),
        ("Feed", "Feed", "Feed", "Feed"),
        # What is not Mailroom's stays.
        *(("Feed", box, box, box) for box in ("Inbox", "Trash", "Junk", "Drafts", "Sent", "Mine")),
        # Parents add.
        ("Billboard", "@ToBillboard Screener", "@ToBillboard Billboard Paper_Trail", "+ -"),
        ("Billboard", "Feed", "Billboard Paper_Trail", "Billboard Paper_Trail"),
        ("Paper Trail", "Billboard Paper_Trail", "Paper_Trail", "Paper_Trail"),
        # To the Inbox: for the category itself, and from the Screener only.
        ("Imbox", "@ToImbox Screener", "@ToImbox Imbox Inbox", "+ -"),
        ("Imbox", "Screener", "Imbox Inbox", "Imbox Inbox"),
        ("Imbox", "@ToImbox Feed", "@ToImbox Imbox", "Imbox"),
        ("Imbox", "@ToImbox Mine", "@ToImbox Mine Imbox", "Mine Imbox"),
        ("Person", "@ToPerson Screener", "@ToPerson Person Imbox", "+ -"),
        # Another label may have been put on meanwhile: it is not this plan's to take off.
        ("Feed", "@ToFeed @ToJail Screener", "@ToFeed @ToJail Feed", "@ToJail Feed"),
    ],
)
def test_plan_mails(category: str, boxes: str, refiled: str, finished: str) -> None:
    def split(text: str) -> set[str]:
        return {box.replace("_", " ") for box in text.split()}

    one = mail("1", *split(boxes))
    refile, finish = plan_mails([one], family(BY_NAME[category]), BOXES, warn=False)
    between = one.patched(refile["1"])
    after = between.patched(finish["1"])
    label = BY_NAME[category].label
    assert between.mailboxes == split(refiled)
    assert after.mailboxes == (split(refiled) - {label} if finished == "+ -" else split(finished))
    again, last = plan_mails([after], family(BY_NAME[category]), BOXES, warn=False)
    assert (again["1"], last["1"]) == ({}, {})


UNDO = Category("", "@ToScreener", "", "Screener")
UNDO_BOXES = replace(
    BOXES,
    labels={**BOXES.labels, "@ToScreener": UNDO},
    destinations={**BOXES.destinations, UNDO: "Screener"},
)


def boxes_of(text: str) -> set[str]:
    return {box.replace("_", " ") for box in text.split()}


@pytest.mark.parametrize(
    ("boxes", "after"),
    [
        ("@ToScreener Feed", "Screener"),
        ("@ToScreener Feed Mine", "Screener Mine"),
        ("@ToScreener Screener", "Screener"),
        ("@ToScreener", "Screener"),
        ("@ToScreener Inbox", "Screener Inbox"),
        ("Billboard Paper_Trail", "Screener"),
        ("Feed @Error @Warning", "Screener"),
        ("Feed Trash", "Screener Trash"),
        *((box, box) for box in ("Inbox", "Mine", "Trash", "Sent", "Screener", "@ToJail")),
        # Out of the Inbox where the category brings mails there, which an ancestor does not.
        ("Imbox Inbox", "Screener"),
        ("Imbox Inbox Mine", "Screener Mine"),
        ("Feed Inbox", "Screener Inbox"),
        ("Person Imbox Inbox", "Screener Inbox"),
        ("Person Inbox", "Screener Inbox"),
        ("Imbox Feed Inbox", "Screener"),
    ],
)
def test_plan_mails_of_an_undo(boxes: str, after: str) -> None:
    one = mail("1", *boxes_of(boxes))
    refile, finish = plan_mails([one], [UNDO], UNDO_BOXES, warn=False)
    between = one.patched(refile["1"])
    assert ("@ToScreener" in boxes) == ("@ToScreener" in between.mailboxes)
    done = between.patched(finish["1"])
    assert done.mailboxes == boxes_of(after)
    again, last = plan_mails([done], [UNDO], UNDO_BOXES, warn=False)
    assert (again["1"], last["1"]) == ({}, {})


@pytest.mark.parametrize(
    ("boxes", "after"),
    [
        ("Feed", "Screener"),
        ("Billboard Paper_Trail Mine", "Screener Mine"),
        ("Imbox Inbox", "Screener"),
        ("Person Imbox Inbox", "Screener Inbox"),
        ("Feed Inbox @ToJail", "Screener Inbox"),
        ("Inbox @ToJail @Warning @Error", "Inbox"),
        ("@ToJail", "Screener"),
        ("@ToJail @ToScreener @Warning @Error", "Screener"),
        *((box, box) for box in ("Inbox", "Mine", "Trash", "Sent", "Screener")),
    ],
)
def test_reset_patch(boxes: str, after: str) -> None:
    one = mail("1", *boxes_of(boxes))
    done = one.patched(reset_patch(one, UNDO_BOXES))
    assert done.mailboxes == boxes_of(after)
    assert reset_patch(done, UNDO_BOXES) == {}


def test_a_category_put_a_mail_in_the_inbox_though_its_label_is_gone() -> None:
    boxes = replace(UNDO_BOXES, labels={})
    assert came_to_inbox(mail("1", "Imbox", "Inbox"), boxes)
    assert not came_to_inbox(mail("1", "Person", "Imbox", "Inbox"), boxes)


@given(
    st.sets(
        st.sampled_from(["Inbox", "Mine", "Screener", "Feed", "Imbox", *UNDO_BOXES.queue]),
        min_size=1,
    )
)
def test_a_reset_leaves_no_mail_nowhere(boxes: set[str]) -> None:
    one = mail("1", *boxes)
    patch = reset_patch(one, UNDO_BOXES)
    done = one.patched(patch)
    assert done.mailboxes
    assert not patch or any(patch.get(f"mailboxIds/{box}") for box in done.mailboxes)


MADE = f"{CREATED_NOTE}\n{TRIAGED}"


@pytest.mark.parametrize(
    ("note", "cleaned"),
    [
        ("", ""),
        (MADE, ""),
        (f"{MADE}\nTriaged to Paper Trail on 2025-12-31", ""),
        (f"Mine\n{MADE}", "Mine"),
        (f"{MADE}\nMine", "Mine"),
        (f"{MADE}\nMine\n{TRIAGED}\nMore", "Mine\nMore"),
        (f"\n{TRIAGED}", ""),
        (f"{TRIAGED}\n\nMine", "\nMine"),
        (f"Mine\n\n{TRIAGED}", "Mine\n"),
        (f"Mine\r\n{CREATED_NOTE}\r\n{TRIAGED}\r\nMore", "Mine\r\nMore"),
        (f"{CREATED_NOTE}\r\n{TRIAGED}", ""),
        ("Triaged to A on B on 2025-01-01", ""),
        *(
            (line, line)
            for line in (
                "Mine",
                "Mine\n",
                f"{CREATED_NOTE} and me",
                f" {TRIAGED}",
                f"{TRIAGED}.",
                "Triaged to Feed",
                "Triaged to Feed\non 2025-03-04",
                "Triaged to  on 2025-1-1",
            )
        ),
    ],
)
def test_clean_note(note: str, cleaned: str) -> None:
    assert clean_note(note) == cleaned
    assert clean_note(cleaned) == cleaned


@given(st.text(st.sampled_from("ab \n\\.")), st.sampled_from([TRIAGED, MADE]))
def test_a_note_that_grew_is_as_it_was(note: str, added: str) -> None:
    assert clean_note("\n".join(filter(None, [note, added]))) == note


@pytest.mark.parametrize(
    ("change", "is_made"),
    [
        ({}, True),
        ({"name": "Robert"}, False),
        ({"name": BOB}, False),
        ({"notes": {"n": f"{MADE}\nMine"}}, False),
        ({"notes": {"n": MADE, "o": "Mine"}}, False),
        ({"notes": {"n": MADE, "o": ""}}, True),
    ],
)
def test_what_is_as_it_was_made(change: dict[str, Any], is_made: bool) -> None:
    uid = contact_uid(BOB)
    card = replace(contact(uid, notes={"n": MADE}), **change)
    expected = {uid} if is_made else set()
    given = names_given([mail("1", "Feed")])
    assert as_made([card], given, [], {uid}) == expected
    assert as_made([card], given, [], set()) == set()
    assert as_made([card], given, [group("Friends", uid)], {uid}) == set()
    assert as_made([card], {}, [], {uid}) == set()


@pytest.mark.parametrize(
    ("card", "made"),
    [
        (contact(contact_uid(BOB), notes={"n": MADE}), True),
        (contact(contact_uid(BOB, {contact_uid(BOB)}), notes={"n": MADE}), True),
        (contact(contact_uid(BOB), notes={"n": TRIAGED}), False),
        (contact(contact_uid("eve@evil.example"), notes={"n": MADE}), False),
        (contact("c1", notes={"n": MADE}), False),
        (group("Feed", uid=group_uid("Feed")), True),
        (group("Fodder", uid=group_uid("Feed")), False),
        (group("Feed"), False),
    ],
)
def test_was_made(card: Card, made: bool) -> None:
    assert was_made(card) == made


def test_the_warning_goes_on_the_tapped_mails_only() -> None:
    mails = [mail("1", "@ToFeed", "Screener"), mail("2", "Screener")]
    refile, _ = plan_mails(mails, family(FEED), BOXES, warn=True)
    assert mails[0].patched(refile["1"]).mailboxes == {"@ToFeed", "Feed", "@Warning"}
    assert mails[1].patched(refile["2"]).mailboxes == {"Feed"}


def test_a_destination_shared_by_parent_and_child_is_kept() -> None:
    shared, _ = parse_categories(["A", {"name": "B", "parent": "A", "destination_mailbox": "A"}])
    boxes = replace(
        BOXES,
        labels={category.label: category for category in shared},
        destinations=dict.fromkeys(shared, "A"),
    )
    one = mail("1", "@ToB", "Screener")
    refile, finish = plan_mails([one], shared[::-1], boxes, warn=False)
    assert one.patched(refile["1"]).patched(finish["1"]).mailboxes == {"A"}


# ------------------------------------------------------------------------------- the contact


def test_a_new_company() -> None:
    change = plan_contact(BOB, FEED, " Bob's   Shop ", [], RULES)
    assert change == CardChange(
        contact_uid(BOB), address=BOB, name="Bob's Shop", note=(CREATED_NOTE, TRIAGED)
    )


@pytest.mark.parametrize(
    ("display_name", "name", "parts"),
    [
        ("Bob Smith", "Bob Smith", ("Bob", "Smith")),
        ("Smith, Bob", "Bob Smith", ("Bob", "Smith")),
        ("Bob Q. Smith", "Bob Q. Smith", ("Bob Q.", "Smith")),
        ("Bob", "Bob", ("Bob", "")),
        ("Smith, Jones, and Co", "Smith, Jones, and Co", ("Smith, Jones, and", "Co")),
        ("Acme Tools, Inc", "Acme Tools, Inc", ("Acme Tools,", "Inc")),
        ("Jörg Müller", "Jörg Müller", ("Jörg", "Müller")),
        ("", BOB, (BOB, "")),
        ("   ", BOB, (BOB, "")),
    ],
)
def test_a_new_person(display_name: str, name: str, parts: tuple[str, str]) -> None:
    change = plan_contact(BOB, PERSON, display_name, [], RULES)
    assert (change.name, change.kind) == (name, "person")
    assert split_name(change.name) == parts


def test_a_uid_that_is_taken_is_not_used_again() -> None:
    """The user gave the contact that Mailroom once made another address."""
    first = contact(contact_uid(BOB), "robert@shop.example")
    second = contact(contact_uid(BOB, [first.uid]), "rob@shop.example")
    assert plan_contact(BOB, FEED, "Bob", [first], RULES).uid == second.uid
    third = plan_contact(BOB, FEED, "Bob", [first, second], RULES).uid
    assert third not in (first.uid, second.uid)


def test_a_uid_is_always_the_same_for_an_address() -> None:
    assert contact_uid(BOB) == contact_uid(BOB)
    assert contact_uid(BOB) != contact_uid("eve@evil.example")
    assert contact_uid(BOB).startswith("urn:uuid:")


@pytest.mark.parametrize(
    ("name", "notes", "display_name", "filled", "note"),
    [
        ("Bobby", {}, "Bob Smith", "", (TRIAGED,)),
        ("", {}, "Smith, Bob", "Smith, Bob", (TRIAGED,)),
        ("", {}, "", "", (TRIAGED,)),
        ("Bob", {"n": "mine"}, "Bob", "", (TRIAGED,)),
        ("Bob", {"n": f"mine\n{TRIAGED}"}, "Bob", "", ()),
        ("Bob", {"n": "mine", "o": TRIAGED}, "Bob", "", ()),
        ("Bob", {"n": "Triaged to Feed on 2025-03-03"}, "Bob", "", (TRIAGED,)),
        ("Bob", {"n": "Triaged to Jail on 2025-03-04"}, "Bob", "", (TRIAGED,)),
    ],
)
def test_of_a_known_contact_only_what_is_empty_is_filled(
    name: str, notes: dict[str, str], display_name: str, filled: str, note: tuple[str, ...]
) -> None:
    known = contact("c1", name=name, notes=notes)
    change = plan_contact(BOB, FEED, display_name, [known], RULES)
    assert change == CardChange("c1", known, name=filled, note=note)


@pytest.mark.parametrize(
    ("contacts", "members", "found"),
    [
        ([], (), None),
        ([contact("a", "notbob@shop.example")], (), None),
        ([contact("a", "eve@evil.example"), contact("b")], (), "b"),
        ([contact("a", created="2025"), contact("b", created="2024")], (), "b"),
        ([contact("a", created="2025"), contact("b", created="2024")], ("a",), "a"),
        ([contact("a"), contact("b", created="2024")], (), "b"),
        ([contact("b"), contact("a")], (), "a"),
    ],
)
def test_find_contact(contacts: list[Card], members: tuple[str, ...], found: str | None) -> None:
    chosen = find_contact(BOB, contacts, [group("Feed", *members)])
    assert (chosen and chosen.uid) == found


def test_the_users_own_groups_do_not_decide_between_contacts() -> None:
    cards = [contact("a"), contact("b"), group("Friends", "b"), *groups()]
    assert plan_contact(BOB, FEED, "Bob", cards, RULES).uid == "a"
    cards = [contact("a"), contact("b"), *groups(Jail=["b"])]
    assert plan_contact(BOB, FEED, "Bob", cards, RULES).uid == "b"


def test_a_group_is_not_a_contact() -> None:
    shop = replace(group("Feed"), emails=frozenset({BOB}))
    assert plan_contact(BOB, FEED, "Bob", [shop], RULES).card is None


@pytest.mark.parametrize(
    ("wanted", "members", "join", "leave"),
    [
        ({"Feed", "Mailroom"}, {}, ["Feed", "Mailroom"], []),
        ({"Feed"}, {"Feed": ["c"]}, [], []),
        ({"Feed"}, {"Jail": ["c"]}, ["Feed"], ["Jail"]),
        ({"Feed"}, {"Jail": ["d"]}, ["Feed"], []),
        ({"Feed"}, {"Feed": ["c"], "Jail": ["c"]}, [], ["Jail"]),
        # A parent that both share is neither left nor joined.
        (
            {"Truck", "Paper Trail"},
            {"Billboard": ["c"], "PaperTrail": ["c"]},
            ["Truck"],
            ["Billboard"],
        ),
        ({"Paper Trail"}, {"Billboard": ["c"], "PaperTrail": ["c"]}, [], ["Billboard"]),
        ({"Billboard", "Paper Trail"}, {"PaperTrail": ["c"]}, ["Billboard"], []),
        # Provenance is not a category: it is never left.
        ({"Feed"}, {"Mailroom": ["c"]}, ["Feed"], []),
    ],
)
def test_plan_groups(
    wanted: set[str], members: dict[str, list[str]], join: list[str], leave: list[str]
) -> None:
    cards = [*groups(**members), group("Friends", "c")]
    joined, left = plan_groups("c", wanted, cards, RULES)
    assert (names(joined), names(left)) == (join, leave)


def test_of_two_groups_with_one_name_one_is_joined() -> None:
    twins = [group("Feed", uid="g2"), group("Feed", uid="g1")]
    joined, _ = plan_groups("c", {"Feed"}, twins, RULES)
    assert [card.uid for card in joined] == ["g1"]
    member = [group("Feed", "c", uid="g2"), group("Feed", uid="g1")]
    assert plan_groups("c", {"Feed"}, member, RULES) == ((), ())


@pytest.mark.parametrize(
    ("known", "display_name", "differs"),
    [
        ("Bob Smith", "Bob Smith", False),
        ("Bob Smith", "bob  SMITH", False),
        ("Bob Smith", "Smith, Bob", False),
        ("Smith, Bob", "Bob Smith", False),
        ("Bob Smith", "", False),
        ("", "Bob Smith", False),
        ("Bobby", "Bob Smith", True),
        (None, "Bob Smith", False),
    ],
)
def test_name_differs(known: str | None, display_name: str, differs: bool) -> None:
    card = None if known is None else contact("c", name=known)
    assert name_differs(card, display_name) == differs


# ------------------------------------------------------------------------------- whole plans


def test_the_newest_tapped_mail_gives_the_name() -> None:
    mails = [
        mail("1", "@ToFeed", name="New Bob", received="2025-02-01T00:00:00Z"),
        mail("2", "@ToFeed", name="Old Bob", received="2025-01-01T00:00:00Z"),
        mail("3", "Screener", name="Not tapped", received="2025-03-01T00:00:00Z"),
    ]
    assert plan_sender(BOB, FEED, mails, groups(), RULES, BOXES).contact.name == "New Bob"


@pytest.mark.parametrize(
    ("notes", "joined"), [({}, ["Feed"]), ({"n": f"{CREATED_NOTE}\nmine"}, ["Feed", "Mailroom"])]
)
def test_provenance_is_for_whom_mailroom_made(notes: dict[str, str], joined: list[str]) -> None:
    cards = [contact("c", notes=notes), *groups()]
    plan = plan_sender(BOB, FEED, [mail("1", "@ToFeed")], cards, RULES, BOXES)
    assert names(plan.join) == joined


@pytest.mark.parametrize(("warning", "differs"), [("@Warning", True), ("", False)])
def test_no_warning_where_warnings_are_off(warning: str, differs: bool) -> None:
    cards = [contact("c", name="Robert"), *groups()]
    boxes = replace(BOXES, warning=warning)
    plan = plan_sender(BOB, FEED, [mail("1", "@ToFeed", "Screener")], cards, RULES, boxes)
    assert plan.name_differs == differs
    assert ("mailboxIds/@Warning" in plan.refile["1"]) == differs


def test_groups_are_left_and_mails_filed_only_after_all_groups_are_joined() -> None:
    cards = [contact("c"), *groups(Jail=["c"])]
    plan = plan_sender(BOB, FEED, [mail("1", "@ToFeed", "Jail")], cards, RULES, BOXES)
    writes = [step([plan]) for step in STEPS]
    changed = [
        [(change.uid, *change.add, *change.remove) for change in step.cards] for step in writes
    ]
    assert changed == [[("c",), ("g-Feed", "c")], [("g-Jail", "c")], [], []]
    assert [step.mails for step in writes] == [{}, plan.refile, {}, plan.finish]


def test_each_copy_of_a_group_is_left() -> None:
    """In address books of their own cards may have the same uid."""
    copies = [group("Jail", "c"), replace(group("Jail", "c"), ref="another book")]
    cards = [contact("c"), *copies, *groups()]
    plan = plan_sender(BOB, FEED, [mail("1", "@ToFeed")], cards, RULES, BOXES)
    left = [change.card for change in to_refile([plan]).cards if change.remove == {"c"}]
    assert left == copies


@pytest.mark.parametrize(
    ("step", "cards_refused", "mails_refused", "why"),
    [
        (to_join, {}, {}, None),
        (to_join, {"another": "full"}, {"9": "full"}, None),
        (to_join, {"c": "full"}, {}, "contact card c: full"),
        (to_join, {"g-Feed": "full"}, {}, "contact card g-Feed: full"),
        (to_join, {"g-Jail": "full"}, {}, None),
        (to_refile, {"g-Jail": "full"}, {}, "contact card g-Jail: full"),
        (to_refile, {}, {"2": "full"}, "mail 2: full"),
    ],
)
def test_a_sender_has_failed_when_anything_of_its_plan_was_refused(
    step: Callable[[list[SenderPlan]], Writes],
    cards_refused: dict[str, str],
    mails_refused: dict[str, str],
    why: str | None,
) -> None:
    """Another sender, say, may not join the group that this one leaves."""
    cards = [contact("c"), *groups(Jail=["c"])]
    mails = [mail("1", "@ToFeed"), mail("2", "Screener")]
    plan = plan_sender(BOB, FEED, mails, cards, RULES, BOXES)
    failed = failures([plan], step([plan]), cards_refused, mails_refused)
    assert failed == ({BOB: why} if why else {})


def patched(mails: Collection[Mail], patches: Mapping[str, MailPatch]) -> list[Mail]:
    return [one.patched(patches.get(one.id, {})) for one in mails]


def written(plan: SenderPlan, cards: Collection[Card]) -> list[Card]:
    """The cards as they are once a plan's contact and groups are carried out."""
    change = plan.contact
    old = change.card or Card(change.uid, "new", emails=frozenset({change.address}))
    key, text = next(iter(old.notes.items()), ("n1", ""))
    notes = {**old.notes, key: "\n".join(filter(None, [text, *change.note]))}
    new = replace(old, name=old.name or change.name, notes=notes)
    join, leave = ({card.uid for card in changed} for changed in (plan.join, plan.leave))
    return [new] + [
        replace(
            card,
            members=(card.members | ({new.uid} if card.uid in join else frozenset()))
            - ({new.uid} if card.uid in leave else frozenset()),
        )
        for card in cards
        if card.uid != new.uid
    ]


every_box = st.sampled_from(
    ["Inbox", "Screener", "Trash", "Sent", "Mine", "@Error", "@Warning", *BY_NAME]
)
some_mails = st.lists(st.frozensets(every_box, min_size=1), min_size=1, max_size=5)
some_contacts = st.lists(
    st.tuples(
        st.sampled_from(["", "Bob", "Robert"]),
        st.sampled_from(["", "mine", CREATED_NOTE, TRIAGED]),
        st.frozensets(st.sampled_from(GROUPS)),
    ),
    max_size=3,
)


@given(
    category=st.sampled_from(CATEGORIES),
    boxes=some_mails,
    contacts=some_contacts,
    name=st.sampled_from(["", "Bob", "Smith, Bob"]),
)
def test_a_plan_carried_out_leaves_nothing_to_plan(
    category: Category,
    boxes: list[frozenset[str]],
    contacts: list[tuple[str, str, frozenset[str]]],
    name: str,
) -> None:
    mails = [mail(str(n), *each, name=name) for n, each in enumerate(boxes)]
    mails[0] = replace(mails[0], mailboxes=mails[0].mailboxes | {category.label})
    cards: list[Card] = [
        contact(f"c{n}", name=known, notes={"n": note} if note else {}, created=str(9 - n))
        for n, (known, note, _) in enumerate(contacts)
    ]
    cards += [
        group(one, *(f"c{n}" for n, (_, _, member) in enumerate(contacts) if one in member))
        for one in GROUPS
    ]
    plan = plan_sender(BOB, category, mails, cards, RULES, BOXES)
    cards, mails = written(plan, cards), patched(mails, plan.refile)

    again = plan_sender(BOB, category, mails, cards, RULES, BOXES)
    assert again.contact == CardChange(plan.contact.uid, again.contact.card)
    assert (again.join, again.leave) == ((), ())
    assert not any(again.refile.values())
    in_groups = {card.name for card in cards if card.is_group and plan.contact.uid in card.members}
    assert in_groups & BY_NAME.keys() == {each.contact_group for each in family(category)}

    before, mails = mails, patched(mails, plan.finish)
    assert sort_queue(mails, BOXES, OWN) == ({}, {})
    for was, now in zip(before, mails, strict=True):
        assert now.mailboxes
        foreign = {"Inbox", "Trash", "Sent", "Mine", "@Warning"}
        assert now.mailboxes & foreign == was.mailboxes & foreign
    assert not any(error_patches(mails, (), (), BOXES).values())


@pytest.mark.parametrize("text", ["A B", "B, A", " A  B "])
def test_full_name_is_idempotent(text: str) -> None:
    assert full_name(full_name(text)) == full_name(text) == "A B"
