"""Triage against the embedded server, cycle by cycle: what becomes of senders, messages and
contacts, with what order and cost on the wire, and that whatever comes in between loses nothing.

`Scene` checks at the end of every scenario that nothing is lost, doubled or overwritten, and that
one more cycle is a single request that writes nothing.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from itertools import product
from typing import Any

import pytest
from jmap_server import FOREVER, JSON, Fault, JMAPServer, Options, Request, count_terms
from tools import SERVERS, Scene, new_triage, running, settings_for, tap

from mailroom import ConfigurationError, MailroomError

BOB, EVE = "bob@shop.example", "eve@evil.example"
FROM_BOB, FROM_EVE = f"Bob Smith <{BOB}>", f"Eve <{EVE}>"
ERROR, WARNING = "@MailroomError", "@MailroomWarning"

every_server = pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)
Make = Callable[..., Options]


def tapped(scene: Scene, label: str = "@ToFeed", sender: str = FROM_BOB) -> list[str]:
    """Two messages of a sender, the first of them tapped."""
    mails = scene.new_sender(sender, 2)
    scene.tap(mails[0], label)
    return mails


def triaged(scene: Scene, label: str = "@ToFeed", sender: str = FROM_BOB) -> list[str]:
    mails = tapped(scene, label, sender)
    assert scene.cycle() == {}
    return mails


# The main job


@every_server
@pytest.mark.parametrize(
    ("label", "boxes", "groups"),
    [
        ("@ToFeed", {"Feed"}, {"Feed"}),
        ("@ToImbox", {"Imbox", "Inbox"}, {"Imbox"}),
        ("@ToBillboard", {"Billboard", "Paper Trail"}, {"Billboard", "Paper Trail"}),
        ("@ToPerson", {"Person", "Imbox"}, {"Person", "Imbox"}),
    ],
)
def test_a_new_sender(options: Make, label: str, boxes: set[str], groups: set[str]) -> None:
    with Scene(options()) as scene:
        other = scene.new_sender(FROM_EVE, 2)
        mine = {box: scene.account.deliver(FROM_BOB, [box]) for box in ("Mine", "Trash", "Inbox")}
        mails = triaged(scene, label)
        assert scene.boxes(mails) == [boxes] * 2
        assert scene.boxes(other) == [{"Screener"}] * 2
        assert scene.boxes(mine.values()) == [{box} for box in mine]
        assert scene.account.groups_of(BOB) == groups | {"Mailroom"}
        assert scene.notes(BOB) == [f'Created by Mailroom on {date.today()} as "Bob Smith"']


# Known contacts, and senders that are triaged again


@every_server
@pytest.mark.parametrize("name", ["Bobby", "", "Smith, Bob"])
@pytest.mark.parametrize("warnings", [True, False])
def test_a_known_contact_joins_the_group_and_stays_as_it_is(
    options: Make, name: str, warnings: bool
) -> None:
    with Scene(options(), warnings_enabled=warnings) as scene:
        for address in (f"a{BOB}", f"{BOB}b"):  # other people
            scene.account.add_contact(address, "X")
        notes = {"first": {"note": "Likes tea.", "created": "2020-01-01T00:00:00Z"}}
        more: JSON = {"notes": notes, "example.com:x": {"y": [1]}}
        friend = scene.account.add_contact("Bob@SHOP.example", name, **more)
        scene.account.add_group("Friends", [friend])
        before = {key: scene.account.cards[key] for key in scene.account.cards}
        mails = tapped(scene) + triaged(scene, sender="BOB SMITH <BOB@shop.EXAMPLE>")
        for key in before.keys() - scene.account.groups:
            assert scene.account.cards[key] == before[key]
        assert scene.account.cards.keys() == before.keys()
        assert scene.account.groups_of(BOB) == {"Friends", "Feed"}
        warning = {WARNING} if warnings and name == "Bobby" else set()
        assert scene.boxes(mails) == [{"Feed"} | warning, {"Feed"}] * 2


@every_server
def test_a_uid_that_another_contact_has_taken(options: Make) -> None:
    """The user gave the contact that Mailroom once made another address."""
    with Scene(options()) as scene:
        triaged(scene)
        card = scene.the_contact(BOB)
        scene.account.put_card({**card, "emails": {"e1": {"address": "rob@new.example"}}})
        triaged(scene, "@ToJail")
        assert scene.the_contact(BOB)["uid"] != card["uid"]
        assert scene.account.groups_of(BOB) == {"Jail", "Mailroom"}
        assert scene.account.groups_of("rob@new.example") == {"Feed", "Mailroom"}


@every_server
def test_a_uid_that_was_left_in_a_group_leaves_it(options: Make) -> None:
    """Of a contact that the user has deleted; the next one of that address has the same uid."""
    with Scene(options()) as scene:
        triaged(scene, "@ToJail")
        scene.account.remove_card(scene.the_contact(BOB)["id"])
        triaged(scene)
        assert scene.account.groups_of(BOB) == {"Feed", "Mailroom"}


@pytest.mark.parametrize("second", ["Feed", "Jail"])
@every_server
def test_two_addresses_of_one_contact(options: Make, second: str) -> None:
    """With one label they are filed; with two it is a conflict, and nothing else happens."""
    with Scene(options()) as scene:
        emails = {"a": {"address": BOB}, "b": {"address": "bob@home.example"}}
        scene.account.new_card({"kind": "individual", "emails": emails})
        cards = scene.seen()[1]
        work = tapped(scene)
        home = triaged(scene, f"@To{second}", "bob@home.example")
        if second == "Jail":
            marked = {"Screener", ERROR}
            assert scene.boxes(work) == [marked | {"@ToFeed"}, {"Screener"}]
            assert scene.boxes(home) == [marked | {"@ToJail"}, {"Screener"}]
            assert scene.seen()[1] == cards
            scene.account.unlabel(home[0], "@ToJail")
            # Now that the contact is in Feed, so are the messages of its other address.
            assert (scene.cycle(), scene.cycle()) == ({}, {})
        assert scene.boxes(work + home) == [{"Feed"}] * 4
        assert scene.account.groups_of(BOB) == {"Feed"}


@every_server
def test_all_joins_come_before_all_leaves_in_set_calls_of_their_own(options: Make) -> None:
    """Within one set call the server may choose the order."""
    with Scene(options()) as scene:
        bobs, eves = triaged(scene), triaged(scene, sender=FROM_EVE)
        scene.account.move(bobs[0], "Mine")
        scene.tap(bobs[1], "@ToJail")
        scene.tap(eves[0], "@ToJail")
        scene.cycle()
        assert scene.boxes(bobs + eves) == [{"Mine"}, *[{"Jail"}] * 3]
        assert scene.account.groups_of(BOB) == {"Jail", "Mailroom"}
        calls = [call for request in scene.last for call in request.calls]
        joins, leaves = [args["update"] for name, args in calls if name == "ContactCard/set"]
        assert [*joins, *leaves] == [scene.account.group_id(name) for name in ("Jail", "Feed")]
        assert "null" not in json.dumps(joins)
        assert "true" not in json.dumps(leaves)


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [
        ("Billboard", "Truck", {"Truck", "Paper Trail"}),
        ("Billboard", "PaperTrail", {"Paper Trail"}),
        ("Imbox", "Person", {"Person", "Imbox"}),
        ("Imbox", "Feed", {"Feed"}),
        ("Feed", "Imbox", {"Imbox"}),
    ],
)
def test_shared_parents_and_the_inbox(first: str, second: str, groups: set[str]) -> None:
    """Messages come into the Inbox from the Screener alone, and stay there."""
    with Scene() as scene:
        mails = triaged(scene, f"@To{first}")
        scene.tap(mails[0], f"@To{second}")
        scene.cycle()
        assert scene.account.groups_of(BOB) == groups | {"Mailroom"}
        assert scene.boxes(mails) == [groups | ({"Inbox"} if first == "Imbox" else set())] * 2


def test_a_forged_message_that_moves_a_sender_warns() -> None:
    """A tap goes by the From address, which anyone can write."""
    with Scene() as scene:
        verdict = {"Authentication-Results": "mx.home.example; dmarc=fail"}
        mail = scene.account.deliver(FROM_BOB, ["Screener"], headers=verdict)
        for name, warning in (("Feed", set[str]()), ("Jail", {WARNING})):
            scene.tap(mail, f"@To{name}")
            scene.cycle()
            assert scene.boxes([mail]) == [{name} | warning]


@every_server
def test_a_join_that_is_refused_leaves_the_sender_where_it_was(options: Make) -> None:
    """And a group that takes no one in may be left."""
    with Scene(options()) as scene:
        bobs, eves = triaged(scene, "@ToJail"), triaged(scene, "@ToFeed", FROM_EVE)
        scene.tap(bobs[0], "@ToFeed")
        scene.tap(eves[0], "@ToJail")
        refuse = {scene.account.group_id("Jail"): {"type": "tooLarge"}}
        scene.server.faults = [Fault("ContactCard/set", refuse=refuse)]
        failed = scene.cycle()
        assert failed.keys() == {EVE}
        assert "tooLarge" in failed[EVE]
        assert scene.boxes(bobs + eves) == [{"Feed"}] * 2 + [{"Feed", "@ToJail"}, {"Feed"}]
        assert scene.account.groups_of(BOB) == scene.account.groups_of(EVE) == {"Feed", "Mailroom"}
        assert scene.cycle() == {}
        assert scene.account.groups_of(EVE) == {"Jail", "Mailroom"}
        assert scene.boxes(eves) == [{"Jail"}] * 2


# What cannot be done


@every_server
def test_a_conflict_and_its_resolution(options: Make) -> None:
    with Scene(options()) as scene:
        bobs = tapped(scene) + tapped(scene, "@ToJail")
        assert scene.boxes(triaged(scene, sender=FROM_EVE)) == [{"Feed"}] * 2
        error = {"Screener", ERROR}
        assert scene.boxes(bobs[::2]) == [error | {"@ToFeed"}, error | {"@ToJail"}]
        assert scene.boxes(bobs[1::2]) == [{"Screener"}] * 2
        assert scene.account.contacts_of(BOB) == []
        scene.check_idle()
        scene.account.unlabel(bobs[0], "@ToFeed")
        scene.cycle()
        assert scene.boxes(bobs) == [{"Jail"}] * 4


NO_SENDERS: list[Any] = [
    None,
    "",
    "undisclosed",
    "MAILER-DAEMON@",
    "@x.example",
    "Alice <Alice@HOME.example>",
]
NO_SENDERS += [
    [{"name": "A", "email": odd}] for odd in ("@", "a b@x.example", "<a@x.example>", None)
]


@pytest.mark.parametrize("sender", NO_SENDERS, ids=str)
def test_senders_that_cannot_be_triaged(sender: Any) -> None:
    with Scene(Options.cyrus()) as scene:
        only = scene.account.deliver(FROM_EVE, [ERROR])  # which is never taken out of it
        mails = [scene.account.deliver(sender, ["Screener"]) for _ in range(2)]
        before = scene.seen()
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes([only, mails[1]]) == [{ERROR}, {"Screener"}]
        assert scene.boxes(mails[:1]) == [{"Screener", "@ToFeed", ERROR}]
        scene.account.unlabel(mails[0], "@ToFeed")
        scene.cycle()
        assert scene.seen() == before


@every_server
@pytest.mark.parametrize("outgoing", ["Sent", "Drafts"])
def test_an_alias_in_what_the_user_sent_is_the_users_own(options: Make, outgoing: str) -> None:
    """A label on a whole conversation just comes off the reply; the shop is triaged. (Without the
    scope for submission no identity is told.)"""
    with Scene(options(has_submission=False)) as scene:
        alias = "Me <alias@home.example>"
        reply, note = (scene.account.deliver(alias, [box]) for box in (outgoing, "Screener"))
        scene.tap(note, "@ToFeed")
        assert scene.cycle() == {}
        own = [{outgoing}, {"Screener", "@ToFeed", ERROR}]
        assert scene.boxes([reply, note]) == own
        scene.tap(reply, "@ToJail")
        shop = triaged(scene, "@ToJail")
        assert scene.boxes([reply, note, *shop]) == [*own, {"Jail"}, {"Jail"}]
        assert scene.account.contacts_of("alias@home.example") == []


def test_the_log_says_once_why_a_message_is_marked() -> None:
    with JMAPServer.with_mailroom_account() as server:
        tap(server, FROM_BOB)
        server.account.label(tap(server, FROM_BOB), "@ToJail")
        server.account.label(server.account.deliver(None, ["Screener"]), "@ToFeed")
        server.faults = [Fault("Email/set", refuse={"*": {"type": "forbidden"}})]
        with running(server, poll_interval=0.05) as run:
            run.wait_for_cycles(3)
            marked = [one for one in run.log if one["event"] == "message marked as an error"]
        reasons = sorted(one["reason"] for one in marked)
        assert reasons == ["it has no sender", *[f"several labels for {BOB}"] * 2]


# Searches, limits, counts and refusals

FIRST: list[JSON] = [
    {"name": None, "email": "Bob"},
    {"name": "Smith", "email": BOB},
]  # an address, of Bob's
LOOSE = [f"X <not{BOB}>", f"X <{BOB}.evil.example>", f'"{BOB}" <{EVE}>', f"E <{EVE}>, B <{BOB}>"]


def emptied(reply: JSON) -> JSON:
    for name, answer, _ in reply["methodResponses"]:
        answer |= {"Email/query": {"ids": [], "total": 0}, "Email/get": {"list": []}}.get(name, {})
    return reply


NO_HEADER_SEARCH = {"errors": {"Email/query": {"type": "unsupportedFilter"}}}
# What the `from` search is like, and what comes of the `header` search.
UNTRUSTED: dict[str, tuple[JSON, JSON]] = {
    "index": ({}, {}),
    "finds nothing": ({"from_search": "empty"}, {}),
    "error": ({"from_search": "error"}, {}),
    "lags": ({"index_until": 0}, {}),
    "neither finds anything": ({"from_search": "empty"}, {"edit": emptied}),
    "both are errors": ({"from_search": "error"}, NO_HEADER_SEARCH),
}


@pytest.mark.parametrize(("search", "header"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_nobody_elses_message_moves_and_all_of_the_senders_do(search: JSON, header: JSON) -> None:
    with Scene(Options(**search)) as scene:
        by_header = Fault(lambda asked: b'"header"' in asked.body, times=FOREVER, **header)
        scene.server.faults.append(by_header)
        mails = scene.new_sender(FROM_BOB, 119)
        mails.insert(0, scene.account.deliver(FIRST, ["Screener"]))
        for mail in mails[::7]:
            scene.account.move(mail, "Paper Trail")
        others = [scene.new_sender(sender)[0] for sender in LOOSE]
        scene.new_sender("crowd@x.example", 120)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 120
        assert scene.boxes(others) == [{"Screener"}] * len(LOOSE)
        assert len(scene.account.mails_in("Screener")) == 120 + len(LOOSE)


@pytest.mark.parametrize("search", ["index", "empty"])
def test_sixty_senders_on_a_server_that_answers_large_filters_in_part(search: Any) -> None:
    with Scene(Options(max_filter_terms=300, from_search=search)) as scene:
        mails = [mail for n in range(60) for mail in tapped(scene, sender=f"s{n}@x.example")]
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 120
        queries = scene.server.calls("Email/query")
        assert max(count_terms(query["filter"]) for query in queries) <= 300


SMALL = {"maxObjectsInGet": 30, "maxObjectsInSet": 2, "maxCallsInRequest": 4}


@pytest.mark.parametrize("search", ["index", "empty"])
@pytest.mark.parametrize("most", [1, 7])
def test_small_limits(most: int, search: Any) -> None:
    with Scene(Options(limits=SMALL, max_query_limit=most, from_search=search)) as scene:
        scene.most_idle = FOREVER  # what fits into one request elsewhere may take several here
        mails = [mail for n in range(12) for mail in tapped(scene, sender=f"s{n}@x.example")]
        mails += scene.new_sender("s1@x.example", 9)
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 33
        assert all(scene.account.groups_of(f"s{n}@x.example") for n in range(12))
        assert all(request.status == 200 for request in scene.server.requests)


@pytest.mark.parametrize(
    ("senders", "mails", "most"), [(0, 0, 1), (1, 1, 5), (25, 4, 6), (50, 1, 9), (1, 2000, 6)]
)
def test_how_many_requests_a_cycle_makes(senders: int, mails: int, most: int) -> None:
    with Scene() as scene:
        for n in range(senders):
            scene.tap(scene.new_sender(f"Sender {n} <s{n}@x.example>", mails)[0], "@ToFeed")
        assert scene.cycle() == {}
        assert len(scene.account.mails_in("Feed")) == senders * mails
        assert len(scene.last) <= most, [request.methods for request in scene.last]


def test_a_contact_that_is_refused_holds_up_no_one_else() -> None:
    with Scene(Options.cyrus()) as scene:
        mails = [tapped(scene, sender=f"s{n}@x.example") for n in range(3)]

        def refuse(_: int, request: Request) -> Fault:
            sets = [args for name, args in request.calls if name == "ContactCard/set"]
            made = [card for args in sets for card in (args.get("create") or {}).items()]
            keys = [key for key, card in made if "s2@x.example" in json.dumps(card)]
            return Fault(refuse={key: {"type": "forbidden"} for key in keys})

        scene.server.on_request = refuse
        [(sender, why)] = scene.cycle().items()
        assert (sender, "forbidden" in why) == ("s2@x.example", True)
        assert scene.boxes(mails[2]) == [{"Screener", "@ToFeed"}, {"Screener"}]
        assert scene.boxes(mails[0] + mails[1]) == [{"Feed"}] * 4
        feed = scene.account.cards[scene.account.group_id("Feed")]
        assert len(feed["members"].keys() - scene.account.by_uid.keys()) == 0, "a member, no card"
        scene.server.on_request = None
        scene.heal()


@pytest.mark.parametrize(("nth", "what"), [(1, 0), (1, 1), (2, 0)])
def test_a_message_that_is_refused_keeps_the_label_on(nth: int, what: int) -> None:
    """The second Email/set takes the label off."""
    with Scene() as scene:
        bobs, eves = tapped(scene), tapped(scene, sender=FROM_EVE)
        refuse = {bobs[what]: {"type": "tooManyMailboxes"}}
        scene.server.faults.append(Fault("Email/set", nth=nth, refuse=refuse))
        assert "tooManyMailboxes" in scene.cycle()[BOB]
        assert scene.boxes(eves) == [{"Feed"}] * 2
        assert "@ToFeed" in scene.account.mailboxes_of(bobs[0])
        assert scene.cycle() == {}
        assert scene.boxes(bobs) == [{"Feed"}] * 2


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 400, "body": b'{"type": "urn:ietf:params:jmap:error:limit"}'},
        {"drop": True},
        {"errors": {"ContactCard/query": {"type": "serverFail", "description": "oops"}}},
        {"errors": {"ContactCard/set": {"type": "invalidArguments"}}},
        {"errors": {"Email/get": {"type": "requestTooLarge"}}},
    ],
    ids=str,
)
def test_a_sender_that_the_server_cannot_bear_holds_up_no_one_else(fault: JSON) -> None:
    with Scene() as scene:
        mails = [mail for n in range(9) for mail in tapped(scene, sender=f"s{n}@x.example")]
        poison = tapped(scene, "@ToJail", "poison@x.example")
        broken = Fault(lambda request: b"poison@" in request.body, times=FOREVER, **fault)
        scene.server.faults = [broken]
        assert scene.cycle().keys() == {"poison@x.example"}
        assert scene.boxes(mails) == [{"Feed"}] * 18
        assert "@ToJail" in scene.account.mailboxes_of(poison[0])
        assert broken.fired <= 2 or not broken.drop, "each silence may take a whole time-out"
        scene.server.faults = []
        assert scene.cycle() == {}
        assert scene.boxes(poison) == [{"Jail"}] * 2


# What comes in between


@every_server
@pytest.mark.parametrize(
    ("label", "box"), [("@ToFeed", "Screener"), ("@ToJail", "Feed"), ("@ToScreener", "Feed")]
)
def test_a_message_that_arrives_before_any_request_is_filed(
    options: Make, label: str, box: str
) -> None:
    """Nobody taps it. `box`: where it arrives, the Screener or where the sender was until now."""
    nth, is_met = 0, True
    while is_met:
        nth += 1
        with Scene(options(), takes_back=True) as scene:
            mails = triaged(scene) if box == "Feed" else scene.new_sender(FROM_BOB, 2)
            scene.tap(mails[0], label)
            if box == "Screener":  # the newest there are looked at, whatever the index says
                scene.server.options.index_until = scene.account.modseq
            goal = len(scene.server.requests) + nth

            def arrive(number: int, _: Request) -> None:
                if number == goal:  # noqa: B023  (at once)
                    mails.append(scene.account.deliver(FROM_BOB, [box]))  # noqa: B023

            scene.server.on_request = arrive
            assert scene.cycle() == {}
            is_met = len(mails) == 3
            scene.server.on_request = None
            assert scene.cycle() == {}
            assert scene.boxes(mails) == [{label[3:]}] * len(mails), f"before request {nth}"
    assert nth > 4


@every_server
@pytest.mark.parametrize(("which", "label"), [(0, "@ToJail"), (1, "@ToJail"), (1, "@ToFeed")])
def test_a_change_of_mind_in_the_middle_of_a_cycle(options: Make, which: int, label: str) -> None:
    """Of the tapped message, or another one is tapped too, which is carried out or a conflict.
    (What else the user may do is in test_people.py.)"""
    for nth, is_after in product(range(1, 6), (False, True)):
        with Scene(options()) as scene:
            mails, left = tapped(scene), [1]

            def act(*_: object) -> None:
                if left.pop() if left else 0:  # noqa: B023  (at once)
                    scene.account.unlabel(mails[0], *["@ToFeed"][which:])  # noqa: B023
                    scene.tap(mails[which], label)  # noqa: B023

            fault = Fault(nth=nth, after=act) if is_after else Fault(nth=nth, before_call=act)
            scene.server.faults = [fault]
            with suppress(MailroomError):
                scene.cycle()
            act()  # the cycle made fewer requests
            scene.heal()
            if which == 0 or not scene.labelled():
                assert scene.boxes(mails) == [{label[3:]}] * 2, (nth, is_after)
                assert scene.account.groups_of(BOB) == {label[3:], "Mailroom"}
            else:
                assert scene.boxes(mails)[1] >= {"@ToJail", ERROR}, (nth, is_after)


# An account that lacks something


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("what", ["the group Feed", "Feed"])
def test_taps_of_an_incomplete_category_wait_and_all_others_go_on(
    what: str, restart: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mailroom")
    with Scene(takes_back=True) as scene:
        scene.lose(what)
        bobs = tapped(scene)
        assert scene.boxes(triaged(scene, "@ToJail", FROM_EVE)) == [{"Jail"}] * 2
        writes = len(scene.server.writes)
        for _ in range(2):
            assert scene.boxes(bobs) == [{"Screener", "@ToFeed", ERROR}, {"Screener"}]
            assert scene.account.contacts_of(BOB) == []
            if restart:
                scene.restart()
            assert scene.cycle() == {}
        assert len(scene.server.writes) == writes
        assert ' "Feed": see `setup' in caplog.messages[-1 if restart else 0]
        assert not scene.is_complete()
        scene.make(what)
        assert scene.cycle() == {}
        assert scene.boxes(bobs) == [{"Feed"}] * 2
        assert scene.account.groups_of(BOB) == {"Feed", "Mailroom"}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["@ToFeed", ERROR, WARNING, "@ToScreener", "the group Mailroom"])
def test_what_is_missing_stops_only_what_it_is_for(name: str, restart: bool) -> None:
    with Scene(takes_back=True) as scene:
        assert scene.is_complete()
        scene.account.add_contact(BOB, "Bobby")
        scene.lose(name)
        bobs, zoes = tapped(scene, "@ToJail"), tapped(scene, "@ToJail", "z@x.example")
        eves = tapped(scene, "@ToTruck", FROM_EVE)
        scene.tap(eves[0], "@ToImbox")
        if restart:
            scene.restart()
        scene.heal()
        conflict = {"Screener", "@ToTruck", "@ToImbox", ERROR}
        assert scene.boxes(bobs + zoes) == [{"Jail", WARNING} - {name}, *[{"Jail"}] * 3]
        assert scene.boxes(eves) == [conflict - {name}, {"Screener"}]
        assert scene.account.groups_of("z@x.example") == {"Jail", "Mailroom"} - {name[10:]}
        scene.check_idle()
        assert not scene.is_complete()
        scene.make(name)
        if name.startswith("@To"):
            scene.tap(zoes[1], name)
        assert scene.cycle() == {}
        filed = {"@ToFeed": "Feed", "@ToScreener": "Screener"}.get(name, "Jail")
        assert scene.boxes(zoes) == [{filed}] * 2
        assert scene.boxes(eves) == [conflict, {"Screener"}]


@pytest.mark.parametrize(
    ("gone", "changes", "said"),
    [
        ("Screener", {}, 'mailbox "Screener".*setup --apply'),
        ("@To", {}, 'label "@ToFeed".*setup --apply'),
        ("Inbox", {}, "Inbox"),
        ("-", {"read_only": True}, "read"),
        ("-", {"has_mail": False}, "mail"),
        ("-", {"has_contacts": False}, "contacts"),
        ("-", {"token": "other"}, "token"),
    ],
    ids=str,
)
def test_an_account_that_cannot_be_used(gone: str, changes: JSON, said: str) -> None:
    with JMAPServer.with_mailroom_account(Options(**changes)) as server:
        for box in [box for box in server.account.mailboxes.values() if box.name.startswith(gone)]:
            server.account.remove_mailbox(box.id)
        triage = new_triage(settings_for(server, jmap_token=Options().token))
        with pytest.raises(ConfigurationError, match=said) as caught:
            triage.run()
        assert len(caught.value.problems) == 1
        assert server.writes == []
