"""Reset: Mailroom taken back out of the account. What it tells and asks before, that it deletes no
mail whatever happens, and that stopped anywhere it goes on to the same end."""

import re
from itertools import pairwise
from typing import Any

import homes
import pytest
from books import PHONE
from homes import EmbeddedHome, add_contact, embedded_home, exact_cards, once, run, snapshot
from jmap_server import JSON, Fault
from radicale_server import RadicaleServer

from mailroom import contact_uid

FROM_BOB, FROM_EVE, FROM_TEA = "Bob <bob@x.example>", "Eve <eve@x.example>", "Tea <tea@x.example>"
CATEGORIES = ["Feed", {"name": "Imbox", "add_to_inbox": True}]
APPLY = ("reset", "--apply", "--yes")
DONE = ("Mailroom is out of the account.", "There is nothing to do.")


@pytest.fixture
def home(home: EmbeddedHome) -> EmbeddedHome:
    home.changes["triage_categories"] = CATEGORIES
    return home


on_jmap = pytest.mark.parametrize("home", ["fastmail"], indirect=True)


def furnish(home: EmbeddedHome) -> None:
    """One contact that is to go, one that the user has touched, one that is the user's; each
    with two mails in a destination, and mails under every label."""
    uid = add_contact(home, "tea@x.example")
    home.book.add_group("Friends", uid)
    assert run(home, "setup", "--apply").status == 0
    for sender, label in [(FROM_BOB, "@ToImbox"), (FROM_EVE, "@ToFeed"), (FROM_TEA, "@ToImbox")]:
        for nth in range(2):
            home.deliver(sender, homes.mail_of(sender, nth))
        home.tap(homes.mail_of(sender), label)
    once(home)
    home.book.meddle(contact_uid("eve@x.example"))
    waiting = {
        "waits": ["Screener"],
        "tapped": ["Screener", "@ToFeed"],
        "tapped, moved": ["@ToFeed"],
        "to be undone": ["Feed", "@ToScreener"],
        "in error": ["Screener", "@MailroomError"],
        "in error only": ["@MailroomError"],
        "warned of": ["Mine", "@MailroomWarning"],
        "mine": ["Mine"],
        "in the bin": ["Trash", "Feed"],
        "read": ["Inbox"],
        "read and filed": ["Inbox", "Feed"],
        "in both": ["Imbox", "Feed", "Inbox"],
    }
    for subject, boxes in waiting.items():
        home.deliver("Zoe <zoe@z.example>", subject, boxes[0])
        home.move(subject, *boxes)


AFTER = {
    **{
        homes.mail_of(f"{name}@x.example", n): {"Screener"}
        for name in ("bob", "eve", "tea")
        for n in (0, 1)
    },
    "waits": {"Screener"},
    "tapped": {"Screener"},
    "tapped, moved": {"Screener"},
    "to be undone": {"Screener"},
    "in error": {"Screener"},
    "in error only": {"Screener"},
    "warned of": {"Mine"},
    "mine": {"Mine"},
    "in the bin": {"Trash", "Screener"},
    "read": {"Inbox"},
    "read and filed": {"Inbox", "Screener"},
    "in both": {"Screener"},
}


def test_a_reset_takes_all_that_is_mailrooms_and_nothing_else(home: EmbeddedHome) -> None:
    before = exact_cards(home.book)
    furnish(home)
    full = snapshot(home)
    ran = run(home, "reset")
    assert (ran.status, ran.err) == (0, "")
    assert snapshot(home) == full, "it has changed something"
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in ran.out.splitlines()[:4])
    assert rows == {
        "1 contact": "deleted: Mailroom made them, nobody has touched them",
        "2 contacts": "kept, without Mailroom's notes",
        "3 groups": "deleted: Mailroom made them",
        "15 mails": "back to the Screener, or a label taken off",
    }
    assert 'kept: "Eve", eve@x.example: ' in ran.out
    assert "Nothing has been changed" in ran.out
    ran = run(home, *APPLY)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.endswith(f"{DONE[0]}\n")
    assert home.where() == AFTER
    cards = home.book.seen()
    left = {card.name: (card.note, card.phones) for card in cards.values() if card.kind != "group"}
    assert left == {"Tea": ("Likes tea.\nAnd cake.", set()), "Eve": ("", {PHONE})}
    assert [card.name for card in cards.values() if card.kind == "group"] == ["Friends"]
    assert {uid: exact_cards(home.book)[uid] for uid in before} == before
    assert run(home, *APPLY).out == f"{DONE[1]}\n"


def test_a_reset_of_an_account_without_anything_of_mailrooms(home: EmbeddedHome) -> None:
    add_contact(home, "tea@x.example")
    home.account.add_mailbox("Screener")
    home.deliver(FROM_BOB, "one", "Screener")
    before = snapshot(home)
    assert run(home, *APPLY) == (0, f"{DONE[1]}\n", "")
    assert snapshot(home) == before


@on_jmap
def test_groups_of_the_users_own_are_emptied_and_stay(home: EmbeddedHome) -> None:
    home.book.add_group("Feed")
    assert run(home, "setup", "--apply").status == 0
    home.deliver(FROM_BOB, "one")
    home.tap("one", "@ToFeed")
    once(home)
    out = run(home, *APPLY).out
    assert re.search("^2 groups +deleted", out, re.MULTILINE)
    assert re.search("^1 group +emptied", out, re.MULTILINE)
    [group] = home.book.seen().values()
    assert (group.name, group.members) == ("Feed", set())


@on_jmap
def test_the_name_may_be_in_a_mail_that_is_anywhere(home: EmbeddedHome) -> None:
    """Contacts whose mails the user has all put elsewhere still go."""
    assert run(home, "setup", "--apply").status == 0
    for sender in (FROM_BOB, FROM_EVE):
        home.tap(home.deliver(sender, homes.mail_of(sender)), "@ToFeed")
    once(home)
    home.move(homes.mail_of(FROM_BOB), "Mine")
    home.move(homes.mail_of(FROM_EVE), "Trash")
    assert run(home, *APPLY).status == 0
    assert home.book.seen() == {}
    assert home.where() == {homes.mail_of(FROM_BOB): {"Mine"}, homes.mail_of(FROM_EVE): {"Trash"}}


@on_jmap
def test_a_contact_whose_note_is_gone_is_named(home: EmbeddedHome) -> None:
    assert run(home, "setup", "--apply").status == 0
    home.tap(home.deliver(FROM_BOB, homes.mail_of(FROM_BOB)), "@ToFeed")
    once(home)
    card = home.account.cards[home.account.by_uid[contact_uid("bob@x.example")]]
    home.account.put_card({key: value for key, value in card.items() if key != "notes"})
    assert 'kept: "Bob", bob@x.example: Mailroom made it' in run(home, *APPLY).out
    assert [card.emails for card in home.book.seen().values()] == [{"bob@x.example"}]


# ------------------------------------------------------------------------------- asking first


@on_jmap
def test_without_a_terminal_it_asks_for_yes(home: EmbeddedHome, monkeypatch: Any) -> None:
    furnish(home)
    before = snapshot(home)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    ran = run(home, "reset", "--apply")
    assert (ran.status, snapshot(home)) == (2, before)
    assert ran.err.splitlines() == ["mailroom: there is no terminal to confirm it at: give --yes"]


# ------------------------------------------------------------------------ stopped and refused


@pytest.mark.parametrize(("home", "what"), homes.STOPS, indirect=["home"])
def test_stopped_at_each_request_it_comes_to_the_same_end(home: EmbeddedHome, what: str) -> None:
    furnish(home)

    def reset() -> bool:
        ran = run(home, *APPLY)
        assert (ran.status == 0) == ran.out.rstrip().endswith(DONE)
        return ran.status == 0

    assert homes.stop_at_each(home, reset, what) >= 6
    assert home.where() == AFTER


@on_jmap
def test_groups_go_before_contacts_and_contacts_before_mails(home: EmbeddedHome) -> None:
    """So that mail to come is routed as before Mailroom, and no uid stays behind in a group."""
    furnish(home)
    groups = {home.account.group_id(name) for name in ("Feed", "Imbox", "Mailroom")}
    bob = home.account.contacts_of("bob@x.example")[0]["id"]
    start = len(home.mail.writes)
    run(home, *APPLY)
    writes = home.mail.writes[start:]
    methods = [write.method for write in writes]
    assert methods == ["ContactCard/set", "ContactCard/set", "Email/set"]
    assert [set(write.args["destroy"]) for write in writes[:2]] == [groups, {bob}]


@on_jmap
def test_what_is_refused_is_told_and_the_rest_is_done(home: EmbeddedHome) -> None:
    furnish(home)
    mail = next(id_ for id_ in home.account.mails_in("Feed"))
    eve = home.account.contacts_of("eve@x.example")[0]
    refuse = {mail: {"type": "forbidden"}, eve["id"]: {"type": "overQuota"}}
    home.mail.faults = [
        Fault("Email/set", refuse=refuse),
        Fault(sets_contacts, nth=2, refuse=refuse),
    ]
    ran = run(home, *APPLY)
    assert ran.status == 1
    assert f"mail {mail} was left as it is: forbidden\n" in ran.out
    assert f'contact "{eve["name"]["full"]}" was left as it is: overQuota\n' in ran.out
    assert ran.out.endswith("Run it again for the rest.\n")
    assert len([boxes for boxes in home.where().values() if "Feed" in boxes]) == 1
    assert run(home, *APPLY).status == 0
    assert home.where() == AFTER


def sets_contacts(request: Any) -> bool:
    return "ContactCard/set" in request.methods


@on_jmap
def test_a_group_that_cannot_be_emptied_keeps_its_contacts(home: EmbeddedHome) -> None:
    """A contact that goes would leave its uid in it."""
    furnish(home)
    group = home.account.group_id("Imbox")
    home.mail.faults = [Fault(sets_contacts, refuse={group: {"type": "forbidden"}})]
    assert run(home, *APPLY).status == 1
    assert {card.name for card in home.book.seen().values()} >= {"Bob", "Tea", "Eve", "Imbox"}
    assert run(home, *APPLY).status == 0
    assert home.where() == AFTER
    assert {card.name for card in home.book.seen().values()} == {"Tea", "Eve", "Friends"}


@on_jmap
def test_a_mail_that_is_deleted_meanwhile_is_no_problem(home: EmbeddedHome) -> None:
    assert run(home, "setup", "--apply").status == 0
    for nth in range(3):
        home.deliver(FROM_BOB, f"mail {nth}", "Feed")
    gone = next(iter(home.account.mails_in("Feed")))

    def delete(method: str, _: JSON) -> None:
        if method == "Email/set" and gone in home.account.mails:
            home.account.move(gone, "Trash")
            refused[gone] = {"type": "notFound"}

    refused: dict[str, JSON] = {}
    home.mail.faults = [Fault("Email/set", before_call=delete, refuse=refused)]
    ran = run(home, *APPLY)
    assert (ran.status, ran.err) == (0, "")


@pytest.mark.parametrize("limits", [{}, {"maxObjectsInGet": 500, "maxObjectsInSet": 500}], ids=str)
def test_ten_thousand_mails(limits: dict[str, int]) -> None:
    with embedded_home("fastmail", RadicaleServer) as home:
        home.mail.options.limits |= limits
        home.mail.options.max_query_limit = limits.get("maxObjectsInGet")
        assert run(home, "setup", "--apply").status == 0
        for n in range(10_000):
            home.account.deliver(f"s{n % 50}@x.example", ["Feed"])
        start = len(home.mail.requests)
        ran = run(home, *APPLY)
        assert ran.status == 0
        assert len(home.account.mails_in("Screener")) == 10_000
        assert not home.account.mails_in("Feed")
        most = limits.get("maxObjectsInSet", 4096)
        sizes = [len(call["update"]) for call in home.mail.calls("Email/set")]
        assert max(sizes) <= most
        assert len(sizes) == -(-10_000 // most)
        assert len(home.mail.requests) - start < 15 + 2 * len(sizes)
        told = [
            int(n.replace(",", "")) for n in re.findall("^([0-9,]+) of 10,000 mails", ran.out, re.M)
        ]
        assert len(told) == len(sizes)
        assert told[-1] == 10_000
        assert all(one < other for one, other in pairwise(told))


def test_a_thousand_contacts() -> None:
    with embedded_home("cyrus", RadicaleServer) as home:
        home.mail.options.limits |= {"maxObjectsInGet": 120, "maxObjectsInSet": 70}
        assert run(home, "setup", "--apply").status == 0
        before = snapshot(home)
        for n in range(300):
            home.tap(home.deliver(f"s{n}@x.example", f"mail {n}"), "@ToFeed")
        once(home)
        assert len(home.account.groups) + 300 == len(home.account.cards)
        ran = run(home, *APPLY)
        assert ran.status == 0
        assert home.account.cards == {}
        assert set(map(frozenset, home.where().values())) == {frozenset({"Screener"})}
        assert before.keys() >= snapshot(home).keys() - {("mail", f"mail {n}") for n in range(300)}
        sizes = [
            len(call.get("update") or ()) + len(call.get("destroy") or ())
            for call in home.mail.calls("ContactCard/set")
        ]
        assert max(sizes) <= 70


# ------------------------------------------------------------------ an account that is not fit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"read_only": True}, "read"),
        ({"has_contacts": False}, "contacts"),
        ({"has_mail": False}, "mail"),
        ({"token": "another"}, "401"),
    ],
    ids=["read-only", "no contacts", "no mail", "token"],
)
def test_an_account_that_it_cannot_work_on(change: JSON, said: str) -> None:
    with embedded_home("fastmail", RadicaleServer) as home:
        settings = home.settings
        assert run(home, "setup", "--apply").status == 0
        for name, value in change.items():
            setattr(home.mail.options, name, value)
        writes = len(home.mail.writes)
        ran = run(home, *APPLY, jmap_token=settings["jmap_token"])
        assert (ran.status, ran.out) == (2, "")
        [line] = ran.err.splitlines()
        assert said in line
        assert len(home.mail.writes) == writes


@on_jmap
def test_without_a_screener_it_says_what_makes_one(home: EmbeddedHome) -> None:
    home.account.add_mailbox("Feed")
    home.deliver(FROM_BOB, "one", "Feed")
    ran = run(home, *APPLY)
    assert ran.status == 2
    assert ran.err.splitlines() == [
        "mailroom: the account has no mailbox 'Screener': `setup --apply` makes it"
    ]
    assert home.where() == {"one": {"Feed"}}
