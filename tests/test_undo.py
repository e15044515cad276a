"""Undo: the label `@ToScreener` takes a sender's triage back. What Mailroom made goes, what is the
user's stays, in every store. What `reset` has in common with it is tested for both (`ways`); both
stopped anywhere are in test_faults.py.

`Scene` checks at the end of every scenario that nothing is lost and that one more cycle writes
nothing."""

import re
from collections.abc import Mapping
from typing import Any

import homes
import pytest
from books import PHONE, JMAPBook
from homes import EmbeddedHome, add_contact, contacts, exact_cards, once, run
from jmap_server import JSON
from test_triage import BOB, EVE, FROM_BOB, FROM_EVE, triaged
from tools import Scene, running, tap, wait_filed

UNDO = "@ToScreener"
SENDERS = {FROM_BOB: "@ToImbox", FROM_EVE: "@ToFeed", "Tea <tea@x.example>": "@ToImbox"}
CATEGORIES = ["Feed", {"name": "Imbox", "add_to_inbox": True}]
JUST_BOB = {FROM_BOB: "@ToFeed"}
ONE, TWO = (homes.mail_of(FROM_BOB, nth) for nth in (0, 1))
APPLY = ("reset", "--apply", "--yes")
ways = pytest.mark.parametrize("way", ["undo", "reset"])
on_jmap = pytest.mark.parametrize("home", ["fastmail"], indirect=True)
two_stores = pytest.mark.parametrize("home", ["cyrus", "radicale"], indirect=True)


def test_from_an_account_without_mailroom_to_one_without_it_again(home: EmbeddedHome) -> None:
    homes.story(home)


def test_contacts_that_are_gone_elsewhere_or_two_by_now() -> None:
    """The groups are left by whoever has the address, and by a contact that is not there."""
    with Scene(takes_back=True) as scene:
        before = scene.seen()[1]
        mails = triaged(scene, "@ToPerson")
        scene.account.remove_card(scene.the_contact(BOB)["id"])
        scene.tap(mails[1], UNDO)
        assert scene.cycle() == {}
        assert len(scene.last) <= 6
        assert (scene.seen()[1], scene.boxes(mails)) == (before, [{"Screener"}] * 2)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        other = {"e1": {"address": "rob@new.example"}}
        scene.account.put_card({**scene.the_contact(BOB), "emails": other})
        cards = [scene.account.add_contact(BOB, f"Bob {n}") for n in range(2)]
        two = [scene.account.cards[card] for card in cards]
        for card, group in zip(cards, ("Feed", "Jail"), strict=True):
            scene.account.join_group(group, card)
        scene.tap(mails[0], UNDO)
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Screener"}] * 2
        assert scene.account.groups_of(BOB) == set()
        assert [scene.account.cards[card] for card in cards] == two
        assert scene.account.groups_of("rob@new.example") == {"Feed", "Mailroom"}


def test_undo_is_counted_and_logged_as_what_it_is() -> None:
    """And its label may have another name."""
    names: dict[str, Any] = {"label_undo": "@Back"}
    with Scene(takes_back=True, **names) as scene, running(scene.server, **names) as service:
        scene.most_idle = 3  # its own triage has not seen what was done
        scene.account.rename_mailbox(UNDO, "@Back")
        mail = tap(scene.server, FROM_BOB)
        wait_filed(scene.server, mail)
        scene.tap(mail, "@Back")
        scene.server.wait_for(lambda: scene.boxes([mail]) == [{"Screener"}])
        service.wait_until_quiet()
        [record] = [one for one in service.log if one["event"] == "triage undone"]
        assert (record["sender"], record["messages_filed"]) == (BOB, 1)
        assert (record["contact"], record["left"]) == ("deleted", "Feed, Mailroom")
        assert "mailroom_senders_undone_total 1\n" in service.page("/metrics")[1]


# Where messages go, and whose contact it is


def take_back(home: EmbeddedHome, way: str, *subjects: str) -> None:
    """Undo of what was triaged, or a reset."""
    if way == "undo":
        for subject in subjects:
            home.tap(subject, UNDO)
        once(home)
    else:
        assert run(home, *APPLY).status == 0


MOVED: dict[tuple[str, ...], set[str]] = {
    # where a message lies: where it is afterwards
    ("Feed",): {"Screener"},
    ("Feed", "Mine"): {"Mine"},
    ("Feed", "@MailroomError", "@MailroomWarning"): {"Screener"},
    ("Imbox", "Archive"): {"Archive"},
    ("Feed", "Trash"): {"Trash"},
    ("Imbox", "Inbox"): {"Screener"},
    ("Feed", "Inbox", "Mine"): {"Mine"},
    ("Screener", "Mine"): {"Screener", "Mine"},
    ("Inbox",): {"Inbox"},
    ("Trash",): {"Trash"},
}


@ways
@on_jmap
@pytest.mark.parametrize("uses_inbox", [True, False])
def test_where_messages_go(home: EmbeddedHome, way: str, uses_inbox: bool) -> None:
    """Whether they are tapped or not; one in a mailbox of the user's stays there, and only there.
    They leave the Inbox if a category may have put them there."""
    home.changes["triage_categories"] = CATEGORIES if uses_inbox else ["Feed", "Imbox"]
    assert run(home, "setup", "--apply").status == 0
    stays = {("Imbox", "Inbox"): {"Inbox"}, ("Feed", "Inbox", "Mine"): {"Inbox", "Mine"}}
    expected: dict[tuple[str, ...], set[str]] = {(UNDO,): {"Screener"}}
    for boxes, after in (MOVED | ({} if uses_inbox else stays)).items():
        expected |= {boxes: after, (*boxes, UNDO): after}
    for boxes in expected:
        home.move(home.deliver(FROM_BOB, "/".join(boxes)), *boxes)
    take_back(home, way)
    assert home.where() == {"/".join(boxes): after for boxes, after in expected.items()}


BOTH = {"e1": {"address": BOB}, "e2": {"address": "bob@home.example"}}
TOUCHES: dict[str, tuple[JSON, str, str]] = {
    # what the user does to a ContactCard that Mailroom made, and what becomes what in a vCard
    "another name": ({"name": {"full": "Bobby"}}, "FN:Bob.*", "FN:Bobby"),
    "a telephone number": ({"phones": {"p": {"number": "1"}}}, "END:", "TEL:1\r\nEND:"),
    "a second address": ({"emails": BOTH}, "END:", "EMAIL:bob@home.example\r\nEND:"),
    "something unheard of": ({"example.com:x": {"a": 1}}, "END:", "X-A;X-P=1:2\r\nEND:"),
    "a note of her own": ({"notes": {"n1": {"note": "Mine"}}}, "NOTE:.*", "NOTE:Mine"),
    "no note": ({"notes": {}}, "NOTE:.*\r\n", ""),
}


def touch(home: EmbeddedHome, uid: str, name: str) -> None:
    properties, old, new = TOUCHES[name]
    if isinstance(home.book, JMAPBook):
        card = home.account.cards[home.account.by_uid[uid]]
        home.account.put_card({**card, **properties})
        return
    url = home.book.url_of(uid)
    lines, count = re.subn(old, new, home.book.get(url).replace("\r\n ", ""))
    assert count == 1
    home.book.ask("PUT", url, lines, Content_Type="text/vcard; charset=utf-8")


def furnish(home: EmbeddedHome, senders: Mapping[str, str] = SENDERS) -> str:
    """Setup, and senders in groups, with two messages each: Bob, whose contact is to go; Eve, whose
    contact the user has touched; and Tea, whose contact is the user's, among her friends. The uid
    of Bob's contact."""
    home.changes["triage_categories"] = CATEGORIES
    if len(senders) > 1:
        home.book.add_group("Friends", add_contact(home, "tea@x.example"))
    assert run(home, "setup", "--apply").status == 0
    for sender, label in senders.items():
        for nth in range(2):
            home.deliver(sender, homes.mail_of(sender, nth))
        home.tap(homes.mail_of(sender), label)
    once(home)
    if len(senders) > 1:
        home.book.meddle(contacts(home, EVE)[0])
    return contacts(home, BOB)[0]


def groups_of(home: EmbeddedHome, uid: str) -> set[str]:
    return {card.name for card in home.book.seen().values() if uid in card.members}


@ways
@two_stores
@pytest.mark.parametrize("name", TOUCHES)
def test_a_touched_contact_stays_as_it_is_and_leaves_the_groups(
    home: EmbeddedHome, name: str, way: str
) -> None:
    uid = furnish(home, JUST_BOB)
    touch(home, uid, name)
    before = exact_cards(home.book)
    take_back(home, way, ONE)
    key = next(key for key in before if key.removeprefix("UID:") == uid)
    assert exact_cards(home.book)[key] == before[key]
    assert groups_of(home, uid) == set()
    assert home.where() == {ONE: {"Screener"}, TWO: {"Screener"}}


@ways
@two_stores
def test_an_untouched_contact_goes_unless_a_group_of_the_users_has_it(
    home: EmbeddedHome, way: str
) -> None:
    """Whatever name the sender writes under by now."""
    uid = furnish(home, JUST_BOB)
    home.deliver(FROM_EVE, "three")
    home.tap("three", "@ToFeed")
    once(home)
    home.move(ONE, "Mine")
    home.deliver(f"Bob from Shop <{BOB}>", "four", "Feed")
    eve = contacts(home, EVE)[0]
    home.book.add_group("Friends", eve)
    before = home.book.seen()[eve]
    take_back(home, way, "four", "three")
    assert uid not in home.book.seen()
    assert home.book.seen()[eve] == before
    assert groups_of(home, eve) == {"Friends"}
    assert home.where().pop(ONE) == {"Mine"}
    assert [*home.where().values()].count({"Screener"}) == 3


@ways
@two_stores
def test_a_contact_that_is_touched_at_the_last_moment_is_kept(home: EmbeddedHome, way: str) -> None:
    uid = furnish(home, JUST_BOB)
    meddled: list[str] = []

    def meddle(request: Any) -> str:
        text = (request.body or b"").decode()
        goes = request.method == "DELETE" or '"destroy": ["' in text
        if goes and uid in f"{request.url}{text}" and not meddled:
            meddled.append(uid)
            home.book.meddle(uid)
        return ""

    with homes.fate() as fate:
        fate.befall = meddle
        if way == "undo":
            home.tap(ONE, UNDO)
        for _ in range(3):
            run(home, *(("run", "--once") if way == "undo" else APPLY))
    assert meddled
    assert home.book.seen()[uid].phones == {PHONE}
    assert groups_of(home, uid) == set()
    assert home.where() == {ONE: {"Screener"}, TWO: {"Screener"}}
