"""Triage against the embedded server, cycle by cycle: what becomes of senders, messages and
contacts, with what order and cost on the wire, and that whatever comes in between loses nothing.

`Scene` checks at the end of every scenario that nothing is lost, doubled or overwritten, and that
one more cycle is a single request that writes nothing.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial
from itertools import chain, combinations, count, product
from typing import Any

import pytest
from jmap_server import FOREVER, JSON, Fault, JMAPServer, Options, Request, count_terms
from tools import SERVERS, Scene, new_triage, settings_for

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
    ("labels", "groups"),
    [
        (["@ToFeed"], {"Feed"}),
        (["@ToImbox"], {"Imbox"}),
        (["@ToBillboard"], {"Billboard", "Paper Trail"}),
        (["@ToPerson"], {"Person", "Imbox"}),
        (["@ToBillboard", "@ToTruck"], {"Truck", "Paper Trail"}),
        (["@ToBillboard", "@ToPaperTrail"], {"Paper Trail"}),
        (["@ToImbox", "@ToPerson"], {"Person", "Imbox"}),
        (["@ToImbox", "@ToFeed"], {"Feed"}),
        (["@ToFeed", "@ToImbox"], {"Imbox"}),
    ],
)
def test_a_sender_is_triaged_and_triaged_again(
    options: Make, labels: list[str], groups: set[str]
) -> None:
    """Messages come into the Inbox from the Screener alone, and stay there."""
    with Scene(options()) as scene:
        other = scene.new_sender(FROM_EVE, 2)
        mails = scene.new_sender(FROM_BOB, 2)
        for label in labels:
            scene.tap(mails[0], label)
            assert scene.cycle() == {}
        inbox = {"Inbox"} if labels[0] == "@ToImbox" else set()
        assert scene.boxes(mails) == [groups | inbox] * 2
        assert scene.boxes(other) == [{"Screener"}] * 2
        assert scene.account.groups_of(BOB) == groups | {"Mailroom"}
        assert scene.notes(BOB) == [f'Created by Mailroom on {date.today()} as "Bob Smith"']


PLACES = ("Screener", "Feed", "Jail", "@ToJail", "Inbox", "Mine", "Trash")


def test_each_message_of_a_sender_is_filed_wherever_it_lies() -> None:
    """What is neither labelled nor in a mailbox of Mailroom's stays."""
    with Scene() as scene:
        expected = {}
        for boxes in chain.from_iterable(combinations(PLACES, n) for n in range(1, 8)):
            own, users = {*PLACES[:4]}.intersection(boxes), {*PLACES[4:]}.intersection(boxes)
            mail = scene.account.deliver(FROM_BOB, boxes)
            expected[mail] = users | {"Jail"} if own else users
        assert scene.cycle() == {}
        assert {mail: scene.account.mailboxes_of(mail) for mail in expected} == expected


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
@pytest.mark.parametrize("is_taken", [True, False])
def test_a_uid_that_another_contact_has_taken_or_that_is_left_over(
    options: Make, is_taken: bool
) -> None:
    """The user gave the contact that Mailroom once made another address, or deleted it: the next
    one of the first address has another uid, or the same, which leaves the groups."""
    with Scene(options()) as scene:
        triaged(scene, "@ToJail")
        card = scene.the_contact(BOB)
        if is_taken:
            scene.account.put_card({**card, "emails": {"e1": {"address": "rob@new.example"}}})
        else:
            scene.account.remove_card(card["id"])
        triaged(scene)
        assert (scene.the_contact(BOB)["uid"] != card["uid"]) == is_taken
        assert scene.account.groups_of(BOB) == {"Feed", "Mailroom"}
        old = {"Jail", "Mailroom"} if is_taken else set()
        assert scene.account.groups_of("rob@new.example") == old


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


def test_a_forged_message_that_moves_a_sender_warns() -> None:
    """A tap goes by the From address, which anyone can write."""
    with Scene() as scene:
        verdict = {"Authentication-Results": "mx.home.example; dmarc=fail"}
        mail = scene.account.deliver(FROM_BOB, ["Screener"], headers=verdict)
        for name, warning in (("Feed", set[str]()), ("Jail", {WARNING})):
            scene.tap(mail, f"@To{name}")
            scene.cycle()
            assert scene.boxes([mail]) == [{name} | warning]


# What cannot be done


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why messages were marked, as the log says."""
    marked = [each for each in caplog.records if "marked as an error" in each.getMessage()]
    return [each.fields["reason"] for each in marked]  # type: ignore[attr-defined]


@every_server
def test_a_conflict_and_its_resolution(options: Make, caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, be it that the server refuses the label at first."""
    with Scene(options()) as scene:
        bobs = tapped(scene) + tapped(scene, "@ToJail")
        refuse = {bobs[0]: {"type": "forbidden"}, bobs[2]: {"type": "forbidden"}}
        scene.server.faults = [Fault("Email/set", refuse=refuse)]
        scene.cycle()
        assert reasons(caplog) == []
        assert scene.boxes(triaged(scene, sender=FROM_EVE)) == [{"Feed"}] * 2
        error = {"Screener", ERROR}
        assert scene.boxes(bobs[::2]) == [error | {"@ToFeed"}, error | {"@ToJail"}]
        assert scene.boxes(bobs[1::2]) == [{"Screener"}] * 2
        assert scene.account.contacts_of(BOB) == []
        scene.check_idle()
        assert reasons(caplog) == [f"several labels for {BOB}"] * 2
        scene.account.unlabel(bobs[0], "@ToFeed")
        scene.cycle()
        assert scene.boxes(bobs) == [{"Jail"}] * 4


NO_SENDERS: list[Any] = [None, "", "undisclosed", "MAILER-DAEMON@", "Alice <Alice@HOME.example>"]
ODD = ("@", "@x.example", "a b@x.example", "<a@x.example>", "a@b\0", None)
NO_SENDERS += [[{"name": "A", "email": odd}] for odd in ODD]


@pytest.mark.parametrize("sender", NO_SENDERS, ids=str)
def test_senders_that_cannot_be_triaged(sender: Any, caplog: pytest.LogCaptureFixture) -> None:
    with Scene(Options.cyrus()) as scene:
        only = scene.account.deliver(FROM_EVE, [ERROR])  # which is never taken out of it
        mails = [scene.account.deliver(sender, ["Screener"]) for _ in range(2)]
        before = scene.seen()
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes([only, mails[1]]) == [{ERROR}, {"Screener"}]
        assert scene.boxes(mails[:1]) == [{"Screener", "@ToFeed", ERROR}]
        is_own = "Alice" in str(sender)
        assert reasons(caplog) == ["the sender is the user" if is_own else "it has no sender"]
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


# Searches, limits, counts and refusals

# The first that is an address is Bob's.
PAIRS = [("X", None), (None, "Bob"), ("Smith", BOB), ("Eve", EVE)]
FIRST: list[JSON] = [{"name": name, "email": email} for name, email in PAIRS]
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


SMALL = {"limits": {"maxObjectsInGet": 30, "maxObjectsInSet": 2, "maxCallsInRequest": 4}}
LIMITS: list[tuple[int, JSON]] = [
    (60, {"max_filter_terms": 300}),  # beyond which it answers in part
    *((12, {**SMALL, "max_query_limit": most}) for most in (1, 7)),
]


@pytest.mark.parametrize("search", ["index", "empty"])
@pytest.mark.parametrize(("senders", "limits"), LIMITS, ids=str)
def test_the_limits_of_a_server_are_kept_to(senders: int, limits: JSON, search: Any) -> None:
    with Scene(Options(**limits, from_search=search)) as scene:
        scene.most_idle = FOREVER if "limits" in limits else 1  # requests may be too small
        mails = [mail for n in range(senders) for mail in tapped(scene, sender=f"s{n}@x.example")]
        mails += scene.new_sender("s1@x.example", 9)
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * len(mails)
        assert all(scene.account.groups_of(f"s{n}@x.example") for n in range(senders))
        assert all(request.status == 200 for request in scene.server.requests)
        queries = scene.server.calls("Email/query")
        assert max(count_terms(query["filter"]) for query in queries) <= 300


REFUSALS = {
    # what is refused to Bob: in which call
    "the contact": ("ContactCard/set", 1),
    "the group": ("ContactCard/set", 1),
    "the tapped message": ("Email/set", 1),
    "the other message": ("Email/set", 1),
    "that the label comes off": ("Email/set", 2),
}


@every_server
@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_refused_keeps_the_label_on_and_holds_up_no_one_else(
    options: Make, what: str
) -> None:
    """Who cannot join a group stays where it was; others may leave that group."""
    with Scene(options()) as scene:
        bobs, eves = triaged(scene), triaged(scene, "@ToJail", FROM_EVE)
        card, jail = scene.the_contact(BOB), scene.account.group_id("Jail")
        if what == "the contact":  # the next one has the same uid
            scene.account.remove_card(card["id"])
        scene.tap(bobs[0], "@ToJail")
        scene.tap(eves[0], "@ToFeed")
        others = eves + tapped(scene, sender="new@x.example")
        keys = {"the contact": card["uid"], "the group": jail, "the other message": bobs[1]}
        method, nth = REFUSALS[what]
        refuse = {keys.get(what, bobs[0]): {"type": "tooLarge"}}
        scene.server.faults = [Fault(method, nth=nth, refuse=refuse)]
        [(sender, why)] = scene.cycle().items()
        assert (sender, "tooLarge" in why) == (BOB, True)
        assert scene.boxes(others) == [{"Feed"}] * 4
        assert scene.account.groups_of(EVE) == {"Feed", "Mailroom"}
        assert "@ToJail" in scene.account.mailboxes_of(bobs[0])
        if method == "ContactCard/set":
            assert scene.boxes(bobs) == [{"Feed", "@ToJail"}, {"Feed"}]
            assert card["uid"] not in str(scene.account.cards[jail]["members"])
            left = {"Feed", "Mailroom"} if what == "the group" else set()
            assert scene.account.groups_of(BOB) == left
        assert scene.cycle() == {}
        assert scene.boxes(bobs) == [{"Jail"}] * 2
        assert scene.account.groups_of(BOB) == {"Jail", "Mailroom"}


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
            deliver, requests = partial(scene.account.deliver, FROM_BOB, [box]), count(1)

            def arrive(_: int, request: Request) -> None:
                if request.kind == "api" and next(requests) == nth:  # noqa: B023  (at once)
                    mails.append(deliver())  # noqa: B023

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


NEEDS = ["Feed", "the group Feed", "@ToFeed", ERROR, WARNING, "@ToScreener", "the group Mailroom"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", NEEDS)
def test_what_is_missing_stops_only_what_it_is_for(
    name: str, restart: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Taps that need it wait until it is there."""
    caplog.set_level("INFO", "mailroom")
    with Scene(takes_back=True) as scene:
        assert scene.is_complete()
        scene.account.add_contact(BOB, "Bobby")
        scene.lose(name)
        bobs, zoes = tapped(scene, "@ToJail"), tapped(scene, "@ToJail", "z@x.example")
        eves = tapped(scene, "@ToTruck", FROM_EVE)
        scene.tap(eves[0], "@ToImbox")
        anns = tapped(scene, "@ToFeed", "ann@x.example") if name != "@ToFeed" else []
        waits = name in ("Feed", "the group Feed")
        conflict = {"Screener", "@ToTruck", "@ToImbox", ERROR}
        for _ in range(2):
            if restart:
                scene.restart()
            scene.heal()
            assert scene.boxes(bobs + zoes) == [{"Jail", WARNING} - {name}, *[{"Jail"}] * 3]
            assert scene.boxes(eves) == [conflict - {name}, {"Screener"}]
            assert scene.account.groups_of("z@x.example") == {"Jail", "Mailroom"} - {name[10:]}
            waiting = [{"Screener", "@ToFeed", ERROR}, {"Screener"}]
            assert scene.boxes(anns) == (waiting if waits else [{"Feed"}] * len(anns))
            assert len(scene.account.contacts_of("ann@x.example")) == (anns != [] and not waits)
        told = f'"{name.removeprefix("the group ")}": see `setup`'
        assert sum(text.endswith(told) for text in caplog.messages) == 1 + restart
        scene.most_idle = 1 + waits
        scene.check_idle()
        assert not scene.is_complete()
        scene.make(name)
        if name.startswith("@To"):
            scene.tap(zoes[1], name)
        assert scene.cycle() == {}
        scene.most_idle = 1
        filed = {"@ToFeed": "Feed", "@ToScreener": "Screener"}.get(name, "Jail")
        assert scene.boxes(zoes + anns) == [{filed}] * 2 + [{"Feed"}] * len(anns)
        assert scene.boxes(eves) == [conflict, {"Screener"}]
        assert scene.account.groups_of("ann@x.example") >= ({"Feed"} if anns else set())


@pytest.mark.parametrize(
    ("gone", "changes", "said"),
    [
        ("Screener", {}, 'mailbox "Screener".*setup --apply'),
        ("@To", {}, 'label "@ToFeed".*setup --apply'),
        ("Inbox", {}, "Inbox"),
        ("-", {"read_only": True}, "read"),
        ("-", {"has_mail": False}, "mail"),
        ("-", {"has_contacts": False}, "contacts"),
    ],
    ids=str,
)
def test_an_account_that_cannot_be_used(gone: str, changes: JSON, said: str) -> None:
    with JMAPServer.with_mailroom_account(Options(**changes)) as server:
        for box in [box for box in server.account.mailboxes.values() if box.name.startswith(gone)]:
            server.account.remove_mailbox(box.id)
        with pytest.raises(ConfigurationError, match=said) as caught:
            new_triage(settings_for(server)).run()
        assert len(caught.value.problems) == 1
        assert server.writes == []


@every_server
def test_of_two_contacts_with_one_address_the_other_stays_in_its_groups(options: Make) -> None:
    with Scene(options()) as scene:
        for name, group in (("ann", "Feed"), ("bob", "Jail")):
            emails = {n: {"address": f"{n}@x.example"} for n in (name, "family")}
            card = scene.account.new_card({"name": {"full": name}, "emails": emails})
            scene.account.join_group(group, card)
        mails = tapped(scene, sender="family@x.example")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * len(mails)
        assert scene.account.groups_of("bob@x.example") == {"Jail"}
        scene.account.remove_card(card)  # at the end no address may have two contacts
