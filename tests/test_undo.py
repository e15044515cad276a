"""Undo: the label `@ToScreener` takes a sender's triage back. What Mailroom made goes, what is the
user's stays, in every store; and stopped anywhere it goes on to the same end.

`Scene` checks at the end of every scenario that nothing is lost and that one more cycle writes
nothing."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import date
from typing import Any

import homes
import pytest
from books import PHONE, JMAPBook
from homes import STORES, EmbeddedHome, add_contact, embedded_home, exact_cards, once, run, snapshot
from jmap_server import FOREVER, JSON, Fault, Options
from radicale_server import RadicaleServer
from tools import SERVERS, Scene, new_triage, nth_request

import mailroom
from mailroom import CREATED_NOTE, MailroomError, MailroomSettings, contact_uid

BOB, EVE = "bob@shop.example", "eve@evil.example"
FROM_BOB, FROM_EVE = f"Bob Smith <{BOB}>", f"Eve <{EVE}>"
TODAY = date.today().isoformat()
UNDO = "@ToScreener"
every_server = pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)
Make = Callable[..., Options]


@pytest.fixture(params=STORES)
def home(request: pytest.FixtureRequest) -> Iterator[EmbeddedHome]:
    with embedded_home(request.param, lambda: request.getfixturevalue("radicale")) as home:
        yield home


def seen(scene: Scene) -> tuple[Any, ...]:
    """What undo is to bring back: each mail's mailboxes, and the cards."""
    mails = {mail: scene.account.mailboxes_of(mail) for mail in scene.account.mails}
    cards = {
        card["uid"]: {key: value for key, value in card.items() if value and key != "id"}
        for card in scene.account.cards.values()
    }
    return mails, cards


def test_from_an_account_without_mailroom_to_one_without_it_again(home: EmbeddedHome) -> None:
    homes.story(home)


# ------------------------------------------------------------------------------- the main job


@every_server
@pytest.mark.parametrize("label", ["@ToFeed", "@ToImbox", "@ToPerson", "@ToTruck"])
def test_what_a_tap_did_is_taken_back(
    options: Make, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not options().groups_in_use:  # Or a group would become large while requests are counted.
        monkeypatch.setattr(mailroom, "MANY_MEMBERS", 500)
    with Scene(options(), takes_back=True) as scene:
        mails = scene.new_sender(FROM_BOB, 4)
        scene.new_sender(FROM_EVE)
        for box in ("Mine", "Trash", "Sent", "Inbox"):
            scene.account.deliver(FROM_BOB, [box])
        before = seen(scene)
        scene.tap(mails[1], label)
        assert scene.cycle() == {}
        tapped = seen(scene)
        scene.tap(mails[2], UNDO)
        assert scene.cycle() == {}
        assert seen(scene) == before
        assert len(scene.last) <= 7 + (scene.server.options.from_search != "index")
        scene.tap(mails[1], label)
        assert scene.cycle() == {}
        assert seen(scene) == tapped


@every_server
def test_many_decisions_are_taken_back_at_once(options: Make) -> None:
    with Scene(options(), takes_back=True) as scene:
        mails = [scene.new_sender(f"Sender {n} <s{n}@x.example>", 2) for n in range(9)]
        before = seen(scene)
        for label in ("@ToFeed", "@ToPerson", "@ToJail"):
            for mail, _ in mails:
                scene.tap(mail, label)
            assert scene.cycle() == {}
        for _, mail in mails:
            scene.tap(mail, UNDO)
        assert scene.cycle() == {}
        assert seen(scene) == before


def test_undo_of_one_and_triage_of_another_in_one_cycle() -> None:
    with Scene(takes_back=True) as scene:
        bobs, eves = scene.new_sender(FROM_BOB, 2), scene.new_sender(FROM_EVE, 2)
        scene.tap(bobs[0], "@ToFeed")
        scene.cycle()
        scene.tap(bobs[1], UNDO)
        scene.tap(eves[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(bobs + eves) == [{"Screener"}] * 2 + [{"Feed"}] * 2
        assert scene.account.contacts_of(BOB) == []
        assert scene.account.groups_of(EVE) == {"Feed", "Mailroom"}


def test_mails_that_the_user_has_put_elsewhere_stay_there() -> None:
    with Scene(takes_back=True) as scene:
        mails = scene.new_sender(FROM_BOB, 4)
        scene.tap(mails[0], "@ToImbox")
        scene.cycle()
        scene.account.move(mails[1], "Trash")
        scene.account.move(mails[2], "Mine", "Inbox")
        scene.account.label(mails[3], "Mine")
        scene.tap(mails[0], UNDO)
        scene.cycle()
        kept = [{"Trash"}, {"Mine", "Inbox"}, {"Mine", "Screener"}]
        assert scene.boxes(mails) == [{"Screener"}, *kept]


def test_an_undo_label_is_taken_off_a_mail_of_someone_unknown() -> None:
    with Scene(takes_back=True) as scene:
        waits, other = scene.new_sender(FROM_BOB, 2)
        only = scene.account.deliver(FROM_EVE, [UNDO])
        mine = scene.account.deliver("zoe@z.example", ["Mine"])
        for mail in (waits, mine):
            scene.tap(mail, UNDO)
        before = exact(scene)
        assert scene.cycle() == {}
        boxes = [{"Screener"}, {"Screener"}, {"Screener"}, {"Mine", "Screener"}]
        assert scene.boxes([waits, other, only, mine]) == boxes
        assert exact(scene) == before


def exact(scene: Scene) -> Any:
    """The cards."""
    return seen(scene)[1]


def test_a_sender_whose_contact_is_gone_leaves_the_groups_it_was_left_in() -> None:
    with Scene(takes_back=True) as scene:
        before = exact(scene)
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToPerson")
        scene.cycle()
        scene.account.remove_card(scene.the_contact(BOB)["id"])
        assert exact(scene) != before, "the server has cleaned the groups itself"
        scene.tap(mails[1], UNDO)
        assert scene.cycle() == {}
        assert exact(scene) == before
        assert scene.boxes(mails) == [{"Screener"}] * 2


@pytest.mark.parametrize("label", ["@ToFeed", "@ToJail"])
@every_server
def test_undo_and_triage_at_once_are_a_conflict(options: Make, label: str) -> None:
    with Scene(options(), takes_back=True) as scene:
        mails = scene.new_sender(FROM_BOB, 3)
        before = seen(scene)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        tapped = exact(scene)
        scene.tap(mails[0], UNDO)
        scene.tap(mails[1], label)
        scene.cycle()
        error = {"Feed", "@MailroomError"}
        assert scene.boxes(mails) == [error | {UNDO}, error | {label}, {"Feed"}]
        assert exact(scene) == tapped
        scene.check_idle()
        scene.account.unlabel(mails[1], label)
        scene.cycle()
        assert seen(scene) == before


@pytest.mark.parametrize("sender", [None, "", "Alice <Alice@HOME.example>"])
def test_senders_that_nothing_can_be_taken_back_for(sender: str | None) -> None:
    with Scene(takes_back=True) as scene:
        mail = scene.account.deliver(sender, ["Screener"])
        scene.tap(mail, UNDO)
        assert scene.cycle() == {}
        assert scene.boxes([mail]) == [{"Screener", UNDO, "@MailroomError"}]
        scene.account.unlabel(mail, UNDO)
        scene.cycle()
        assert scene.boxes([mail]) == [{"Screener"}]


def test_an_account_without_the_undo_label_is_served_until_it_has_one() -> None:
    with Scene() as scene:
        scene.takes_back = True
        mails = scene.new_sender(FROM_BOB, 2)
        before = seen(scene)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 2
        scene.account.add_mailbox(UNDO)
        scene.tap(mails[0], UNDO)
        assert scene.cycle() == {}
        assert seen(scene) == before
        scene.account.remove_mailbox(UNDO)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 2


def test_the_undo_label_may_have_another_name() -> None:
    with Scene(label_undo="@Back") as scene:
        scene.takes_back = True
        scene.account.add_mailbox("@Back")
        mails = scene.new_sender(FROM_BOB, 2)
        before = seen(scene)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        scene.tap(mails[0], "@Back")
        assert scene.cycle() == {}
        assert seen(scene) == before


def test_the_error_and_the_warning_go_with_the_triage() -> None:
    with Scene(takes_back=True) as scene:
        scene.account.add_contact(BOB, "Robert")
        mails = scene.new_sender(FROM_BOB, 2)
        before = seen(scene)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        assert scene.boxes(mails) == [{"Feed", "@MailroomWarning"}, {"Feed"}]
        scene.tap(mails[0], "@MailroomError")
        scene.tap(mails[1], UNDO)
        assert scene.cycle() == {}
        assert seen(scene) == before


def test_undo_is_counted_and_logged_as_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mailroom")
    with Scene(takes_back=True) as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        caplog.clear()
        scene.tap(mails[0], UNDO)
        scene.cycle()
        [record] = [one for one in caplog.records if one.message == "triage taken back"]
        told = record.__dict__["fields"]
        assert (told["sender"], told["mails_filed"], told["contact"]) == (BOB, 2, "deleted")
        assert sorted(told["left"]) == ["Feed", "Mailroom"]
        counts = scene.triage._counts
        assert (counts["senders_triaged_total"], counts["senders_undone_total"]) == (1, 1)


# ------------------------------------------------------------------------- whose contact it is


Touch = tuple[Callable[[JSON], JSON], Callable[[str], str]]
NOTE = f"{CREATED_NOTE}\nTriaged to Feed on {TODAY}"
VCARD_NOTE = NOTE.replace("\n", "\\n")
FIRST, SECOND = NOTE.splitlines()


def noted(text: str) -> Touch:
    """Gives the contact this note."""
    escaped = text.replace(",", "\\,").replace("\n", "\\n")
    return (
        lambda card: {**card, "notes": {"n1": {"note": text}}},
        lambda lines: lines.replace(VCARD_NOTE, escaped),
    )


def with_line(line: str, **properties: Any) -> Touch:
    """Gives the contact a line, and a ContactCard these properties."""
    return (
        lambda card: {**card, **properties},
        lambda lines: lines.replace("END:VCARD", f"{line}\r\nEND:VCARD"),
    )


ADDRESSES = {"e1": {"address": BOB}, "e2": {"address": "bob@home.example"}}
TOUCHES: dict[str, tuple[Touch, str]] = {
    # what the user does to a contact that Mailroom made, and the note that is left of it
    "another name": (
        (
            lambda card: {**card, "name": {"full": "Bobby"}},
            lambda lines: lines.replace("FN:Bob Smith", "FN:Bobby"),
        ),
        "",
    ),
    "a telephone number": (with_line("TEL:1", phones={"p": {"number": "1"}}), ""),
    "a second address": (with_line("EMAIL:bob@home.example", emails=ADDRESSES), ""),
    "a nickname": (with_line("NICKNAME:B", nicknames={"n": {"name": "B"}}), ""),
    "something unheard of": (with_line("X-A;X-P=1:2", **{"example.com:x": {"a": 1}}), ""),
    "another kind": (with_line("KIND:location", kind="location"), ""),
    "a preferred address": (
        (
            lambda card: {**card, "emails": {"e1": {"address": BOB, "pref": 1}}},
            lambda lines: lines.replace("EMAIL;TYPE=INTERNET", "EMAIL;TYPE=INTERNET;TYPE=PREF"),
        ),
        "",
    ),
    "a line after": (noted(f"{NOTE}\nMine, all mine."), "Mine, all mine."),
    "a line before": (noted(f"Mine.\n{NOTE}"), "Mine."),
    "lines between": (noted(f"{FIRST}\nMine.\n\nAll mine.\n{SECOND}"), "Mine.\n\nAll mine."),
    "words in the line": (noted(f"{FIRST}\n{SECOND}, by mistake"), f"{SECOND}, by mistake"),
    "only the date left": (noted(SECOND), ""),
    "nothing left": (noted("Mine."), "Mine."),
}


def touch(book: Any, uid: str, touch: Touch) -> None:
    """The user does something to a contact."""
    on_card, on_vcard = touch
    if isinstance(book, JMAPBook):
        card = book.account.cards[book.account.by_uid[uid]]
        book.account.put_card(on_card(card))
        return
    url = book.url_of(uid)
    lines = book.get(url).replace("\r\n ", "")
    assert on_vcard(lines) != lines
    book.ask("PUT", url, on_vcard(lines), Content_Type="text/vcard; charset=utf-8")


def without_note(card: Any) -> Any:
    if isinstance(card, dict):
        return {key: value for key, value in card.items() if key != "notes"}
    return [line for line in card if not line.startswith("NOTE")]


def take_back(home: EmbeddedHome, way: str) -> None:
    """Undo of Bob's triage, or a reset."""
    if way == "undo":
        home.tap("one", UNDO)
        once(home)
    else:
        ran = run(home, "reset", "--apply", "--yes")
        assert ran.status == 0, ran
    assert home.where() == {"one": {"Screener"}, "two": {"Screener"}}


def with_bob_in_feed(home: EmbeddedHome) -> str:
    """Setup, two mails of Bob's, the first of them tapped; the uid of the contact."""
    home.changes["triage_categories"] = ["Feed"]
    assert run(home, "setup", "--apply").status == 0
    for subject in ("one", "two"):
        home.deliver(FROM_BOB, subject)
    home.tap("one", "@ToFeed")
    once(home)
    [uid] = [uid for uid, card in home.book.seen().items() if BOB in card.emails]
    return str(uid)


ways = pytest.mark.parametrize("way", ["undo", "reset"])
two_stores = pytest.mark.parametrize("home", ["cyrus", "radicale"], indirect=True)


@pytest.mark.parametrize(
    ("home", "way"),
    [("cyrus", "undo"), ("radicale", "undo"), ("cyrus", "reset")],
    indirect=["home"],
)
@pytest.mark.parametrize("name", TOUCHES)
def test_what_the_user_has_touched_is_kept_without_mailrooms_lines(
    home: EmbeddedHome, name: str, way: str
) -> None:
    done, left = TOUCHES[name]
    uid = with_bob_in_feed(home)
    touch(home.book, uid, done)
    before = exact_cards(home.book)[uid]
    take_back(home, way)
    after = home.book.seen()
    assert without_note(exact_cards(home.book)[uid]) == without_note(before)
    assert after[uid].note == left
    assert not any(uid in card.members for card in after.values())


@ways
@two_stores
def test_a_sender_that_writes_under_another_name_now_has_not_touched_it(
    home: EmbeddedHome, way: str
) -> None:
    """The mail that gave the contact its name is in a folder of the user's."""
    uid = with_bob_in_feed(home)
    home.move("one", "Mine")
    home.move("two", "Trash")
    home.deliver(f"Bob from Shop <{BOB}>", "three", "Feed")
    if way == "undo":
        home.tap("three", UNDO)
        once(home)
    else:
        assert run(home, "reset", "--apply", "--yes").status == 0
    assert home.where() == {"one": {"Mine"}, "two": {"Trash"}, "three": {"Screener"}}
    assert uid not in home.book.seen()


@ways
@two_stores
def test_who_is_in_a_group_of_the_users_own_is_kept(home: EmbeddedHome, way: str) -> None:
    uid = with_bob_in_feed(home)
    friends = home.book.add_group("Friends", uid)
    take_back(home, way)
    after = home.book.seen()
    assert after[uid].note == ""
    assert {key for key, card in after.items() if uid in card.members} == {friends}


@ways
def test_who_was_put_into_another_address_book_is_kept(way: str) -> None:
    with embedded_home("fastmail", RadicaleServer) as home:
        uid = with_bob_in_feed(home)
        second = home.account.add_book("Second")
        card = home.account.cards[home.account.by_uid[uid]]
        home.account.put_card({**card, "addressBookIds": {second: True}})
        take_back(home, way)
        kept = home.account.cards[home.account.by_uid[uid]]
        assert kept == {**without_note(card), "addressBookIds": {second: True}}


@ways
@pytest.mark.parametrize("name", ["a-first", "second"])  # before and behind the other book
def test_a_copy_in_another_address_book_is_a_card_of_its_own(
    radicale: RadicaleServer, name: str, way: str
) -> None:
    """It has the same uid, and here a telephone number that the other has not."""
    with embedded_home("radicale", lambda: radicale) as home:
        uid = with_bob_in_feed(home)
        text = home.book.get(home.book.url_of(uid)).replace("END:VCARD", "TEL:1\r\nEND:VCARD")
        second = radicale.make_addressbook(name)
        try:
            home.book.ask("PUT", f"{second}copy.vcf", text, Content_Type="text/vcard")
            take_back(home, way)
            copy = home.book.ask("GET", f"{second}copy.vcf").text
        finally:
            radicale.http.delete(second).raise_for_status()
        assert "TEL:1" in copy
        assert "NOTE" not in copy
        assert not any(uid in card.members for card in home.book.seen().values())


@ways
@two_stores
@pytest.mark.parametrize("address", homes.ADOPTED)
def test_an_adopted_contact_is_as_it_was(home: EmbeddedHome, way: str, address: str) -> None:
    add_contact(home, address)
    home.changes["triage_categories"] = ["Feed"]
    assert run(home, "setup", "--apply").status == 0
    for subject in ("one", "two"):
        home.deliver(f"Other <{address}>", subject)
    before = snapshot(home)
    home.tap("one", "@ToFeed")
    once(home)
    assert snapshot(home) != before
    take_back(home, way)
    after = snapshot(home)
    assert {key: after[key] for key in after if key in before} == {
        key: before[key] for key in before if key in after
    }
    assert before.keys() - after.keys() == (
        set() if way == "undo" else {key for key in before if key[1] in groups_made(before)}
    )


def groups_made(shot: Mapping[tuple[str, str], Any]) -> set[str]:
    """The uids of the groups in a snapshot."""
    cards = homes.of_kind(shot, "card").items()
    return {uid for uid, card in cards if "group" in json.dumps(card)}


@ways
@two_stores
def test_a_contact_that_is_touched_at_the_last_moment_is_kept(home: EmbeddedHome, way: str) -> None:
    uid = with_bob_in_feed(home)
    meddled: list[str] = []

    def meddle(request: Any) -> str:
        text = (request.body or b"").decode()
        goes = request.method == "DELETE" or (f'"destroy": ["{uid}"' in text)
        if goes and uid.removeprefix("urn:uuid:") in f"{request.url}{text}" and not meddled:
            meddled.append(uid)
            home.book.meddle(uid)
        return ""

    with homes.fate() as fate:
        fate.befall = meddle
        if way == "undo":
            home.tap("one", UNDO)
        for _ in range(3):
            run(home, *(["run", "--once"] if way == "undo" else ["reset", "--apply", "--yes"]))
    assert meddled
    after = home.book.seen()[uid]
    assert (after.phones, after.note) == ({PHONE}, "")
    assert not any(uid in card.members for card in home.book.seen().values())
    assert home.where() == {"one": {"Screener"}, "two": {"Screener"}}


def test_of_two_contacts_with_one_address_both_leave() -> None:
    with Scene(takes_back=True) as scene:
        for group in ("Feed", "Jail"):
            scene.account.join_group(group, scene.account.add_contact(BOB, f"Bob of the {group}"))
        [mail] = scene.new_sender(BOB, box="Feed")
        scene.tap(mail, UNDO)
        assert scene.cycle() == {}
        assert scene.account.groups_of(BOB) == set()
        assert len(scene.account.contacts_of(BOB)) == 2


def test_of_two_addresses_the_one_that_is_undone() -> None:
    """The contact is the user's and has both; its groups are those of both."""
    with Scene(takes_back=True) as scene:
        emails = {"a": {"address": BOB}, "b": {"address": "bob@home.example"}}
        scene.account.new_card({"kind": "individual", "name": {"full": "Bob"}, "emails": emails})
        cards = exact(scene)
        work, home = scene.new_sender(FROM_BOB, 2), scene.new_sender("bob@home.example", 2)
        scene.tap(work[0], "@ToFeed")
        scene.tap(home[0], "@ToFeed")
        scene.cycle()
        scene.tap(work[1], UNDO)
        assert scene.cycle() == {}
        assert exact(scene) == cards
        assert scene.boxes(work) == [{"Screener"}] * 2
        assert scene.boxes(home) == [{"Feed"}] * 2


def test_a_contact_that_someone_elses_mails_were_filed_under_is_theirs() -> None:
    """The contact that Mailroom made has got another address: it is not Bob's any more."""
    with Scene(takes_back=True) as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        card = scene.the_contact(BOB)
        scene.account.put_card({**card, "emails": {"e1": {"address": "rob@new.example"}}})
        scene.tap(mails[0], UNDO)
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Screener"}] * 2
        assert scene.account.groups_of("rob@new.example") == {"Feed", "Mailroom"}


# --------------------------------------------------------------------------- stopped anywhere


CATEGORIES = ["Feed", {"name": "Imbox", "add_to_inbox": True}]


def to_undo(home: EmbeddedHome) -> MailroomSettings:
    """Three decisions are to be taken back: of one whose contact goes, one whose contact the user
    has touched, and one whose contact is the user's. The settings."""
    uid = add_contact(home, "tea@x.example")
    home.book.add_group("Friends", uid)
    home.changes["triage_categories"] = CATEGORIES
    assert run(home, "setup", "--apply").status == 0
    settings = MailroomSettings(**home.settings)
    senders = {FROM_BOB: "@ToImbox", FROM_EVE: "@ToFeed", "Tea <tea@x.example>": "@ToImbox"}
    for sender, label in senders.items():
        for nth in range(2):
            home.deliver(sender, homes.mail_of(sender, nth))
        home.tap(homes.mail_of(sender), label)
    assert new_triage(settings).run() == {}
    touch(home.book, contact_uid(EVE), TOUCHES["a telephone number"][0])
    for sender in senders:
        home.tap(homes.mail_of(sender, 1), UNDO)
    return settings


@pytest.mark.parametrize(("home", "what"), homes.STOPS, indirect=["home"])
def test_stopped_at_each_request_it_comes_to_the_same_end(home: EmbeddedHome, what: str) -> None:
    settings = to_undo(home)
    assert homes.stop_at_each(home, lambda: not new_triage(settings).run(), what) >= 8
    assert not any(UNDO in boxes for boxes in home.where().values())
    assert BOB not in {address for card in home.book.seen().values() for address in card.emails}


REFUSALS: dict[str, Callable[[], Fault]] = {
    "each object": lambda: Fault(refuse={"*": {"type": "overQuota"}}),
    "the state": lambda: Fault(errors={"ContactCard/set": {"type": "stateMismatch"}}),
    "the method": lambda: Fault(
        errors={f"{kind}/set": {"type": "serverFail"} for kind in ("Email", "ContactCard")}
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("nth", range(1, 8))
def test_a_set_that_is_refused_is_made_up_for(refusal: str, nth: int) -> None:
    with Scene(Options.cyrus(from_search="index"), takes_back=True) as scene:
        scene.account.new_card({"kind": "individual", "emails": {"e": {"address": EVE}}})
        bobs, eves = scene.new_sender(FROM_BOB, 2), scene.new_sender(FROM_EVE, 2)
        scene.account.put_card(scene.the_contact(EVE) | {"name": {"full": "Eve"}})
        before = seen(scene)
        scene.tap(bobs[0], "@ToPerson")
        scene.tap(eves[0], "@ToImbox")
        scene.cycle()
        for mails in (bobs, eves):
            scene.tap(mails[1], UNDO)
        nth_request(scene.server, nth, REFUSALS[refusal])
        with suppress(MailroomError):
            scene.cycle()
        scene.server.on_request = None
        scene.heal()
        assert seen(scene) == before


def test_a_contact_that_cannot_leave_a_group_does_not_go() -> None:
    """Or its uid would stay behind."""
    with Scene(takes_back=True) as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        before = seen(scene)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        scene.tap(mails[0], UNDO)
        refuse = {scene.account.group_id("Feed"): {"type": "forbidden"}}
        scene.server.faults = [Fault("ContactCard/set", refuse=refuse)]
        assert scene.cycle().keys() == {BOB}
        assert scene.account.groups_of(BOB) == {"Feed"}
        assert scene.boxes(mails) == [{"Screener", UNDO}, {"Screener"}]
        assert scene.cycle() == {}
        assert seen(scene) == before


def test_what_is_refused_for_one_sender_is_done_for_the_others() -> None:
    with Scene(takes_back=True) as scene:
        bobs, eves = scene.new_sender(FROM_BOB, 2), scene.new_sender(FROM_EVE, 2)
        for mails in (bobs, eves):
            scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        for mails in (bobs, eves):
            scene.tap(mails[0], UNDO)
        refuse = {scene.the_contact(BOB)["id"]: {"type": "forbidden"}}
        scene.server.faults.append(Fault("ContactCard/set", times=FOREVER, refuse=refuse))
        failed = scene.cycle()
        assert failed.keys() == {BOB}
        assert "forbidden" in failed[BOB]
        assert scene.boxes(bobs) == [{"Screener", UNDO}, {"Screener"}]
        assert scene.boxes(eves) == [{"Screener"}] * 2
        assert scene.account.contacts_of(EVE) == []
        scene.server.faults.clear()
        assert scene.cycle() == {}
        assert scene.boxes(bobs) == [{"Screener"}] * 2
        assert scene.account.contacts_of(BOB) == []
