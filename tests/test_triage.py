"""Triage against the embedded server, cycle by cycle: what becomes of senders, mails and contacts,
with what order and cost on the wire, and that whatever goes wrong loses nothing and heals.

`Scene` checks at the end of every scenario that nothing is lost, doubled or overwritten, and that
one more cycle is a single request that writes nothing.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from typing import Any

import pytest
from jmap_server import BYSTANDER, FOREVER, JSON, Fault, JMAPServer, Options, Request
from tools import SERVERS, Scene, new_triage, settings_for

import mailroom
from mailroom import CREATED_NOTE, ConfigurationError, MailroomError, ServerError, contact_uid

BOB, EVE = "bob@shop.example", "eve@evil.example"
FROM_BOB, FROM_EVE = f"Bob Smith <{BOB}>", f"Eve <{EVE}>"
TODAY = date.today().isoformat()

every_server = pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)
Make = Callable[..., Options]


def seen_replies(scene: Scene) -> list[Any]:
    """A list that grows by each reply of the API."""
    replies: list[Any] = []

    def see(reply: Any) -> Any:
        replies.append(reply)
        return reply

    scene.server.faults.append(Fault(times=FOREVER, edit=see))
    return replies


def set_calls(scene: Scene) -> list[tuple[str, JSON]]:
    """The set calls of the last cycle, as they went over the wire."""
    return [call for request in scene.last for call in request.calls if call[0].endswith("/set")]


# ------------------------------------------------------------------------------- the main job


@every_server
@pytest.mark.parametrize(
    ("label", "boxes", "groups"),
    [
        ("@ToFeed", {"Feed"}, {"Feed"}),
        ("@ToImbox", {"Imbox", "Inbox"}, {"Imbox"}),
        ("@ToPaperTrail", {"Paper Trail"}, {"Paper Trail"}),
        ("@ToBillboard", {"Billboard", "Paper Trail"}, {"Billboard", "Paper Trail"}),
        ("@ToPerson", {"Person", "Imbox"}, {"Person", "Imbox"}),
    ],
)
def test_a_new_sender(options: Make, label: str, boxes: set[str], groups: set[str]) -> None:
    with Scene(options()) as scene:
        mails = scene.new_sender(FROM_BOB, 4)
        other = scene.new_sender(FROM_EVE, 2)
        mine = {box: scene.account.deliver(FROM_BOB, [box]) for box in ("Mine", "Trash", "Sent")}
        scene.tap(mails[1], label)
        assert scene.cycle() == {}
        without_index = scene.server.options.from_search != "index"
        assert len(scene.last) <= 5 + without_index
        assert scene.boxes(mails) == [boxes] * 4
        assert scene.boxes(other) == [{"Screener"}] * 2
        assert scene.boxes(mine.values()) == [{box} for box in mine]
        assert scene.account.groups_of(BOB) == groups | {"Mailroom"}
        group = next(name for name in groups if label == "@To" + name.replace(" ", ""))
        assert scene.notes(BOB) == [CREATED_NOTE, f"Triaged to {group} on {TODAY}"]


def test_a_new_company_and_a_new_person() -> None:
    with Scene() as scene:
        second = scene.account.add_book("Second")
        for sender, label in [(FROM_BOB, "@ToFeed"), ('"Doe, Jane" <jane@x.example>', "@ToPerson")]:
            scene.tap(scene.new_sender(sender)[0], label)
        scene.cycle()
        company, person = scene.the_contact(BOB), scene.the_contact("jane@x.example")
        assert (company["kind"], company["name"]["full"]) == ("org", "Bob Smith")
        assert [firm["name"] for firm in company["organizations"].values()] == ["Bob Smith"]
        assert (person["kind"], person["name"]["full"]) == ("individual", "Jane Doe")
        parts = {part["kind"]: part["value"] for part in person["name"]["components"]}
        assert parts == {"given": "Jane", "surname": "Doe"}
        assert second not in company["addressBookIds"].keys() | person["addressBookIds"].keys()


@pytest.mark.parametrize(
    ("header", "address", "name"),
    [
        ("Bob <BOB@Shop.Example>", "bob@shop.example", "Bob"),
        ("bob+news@shop.example", "bob+news@shop.example", "bob+news@shop.example"),
        ('"Bob \\"The Shop\\" Smith" <bob@x.example>', "bob@x.example", 'Bob "The Shop" Smith'),
        ("=?utf-8?q?J=C3=B6rg_M=C3=BCller?= <j@x.example>", "j@x.example", "Jörg Müller"),
        ("=?utf-8?b?5pel5pys?= <n@x.example>", "n@x.example", "日本"),
        ("o'neil@x.example", "o'neil@x.example", "o'neil@x.example"),
        ("Two <two@x.example>, Three <three@x.example>", "two@x.example", "Two"),
        ("Very%Odd_ <a_b%c@x.example>", "a_b%c@x.example", "Very%Odd_"),
    ],
)
@every_server
def test_odd_senders(options: Make, header: str, address: str, name: str) -> None:
    with Scene(options()) as scene:
        mails = scene.new_sender(header, 2)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 2
        assert scene.the_contact(address)["name"]["full"] == name
        assert scene.account.groups_of(address) == {"Feed", "Mailroom"}


def test_one_sender_in_different_cases_is_one_sender() -> None:
    with Scene() as scene:
        contact = scene.account.add_contact("Bob@SHOP.example", "Bob Smith")
        mails = scene.new_sender(FROM_BOB, 2) + scene.new_sender("BOB@shop.EXAMPLE", 2)
        scene.tap(mails[0], "@ToFeed")
        scene.tap(mails[2], "@ToFeed")
        scene.cycle()
        assert scene.boxes(mails) == [{"Feed"}] * 4
        assert [card["id"] for card in scene.account.contacts_of(BOB)] == [contact]


@every_server
def test_many_senders_into_all_categories(options: Make) -> None:
    with Scene(options()) as scene:
        labels = [box.name for box in scene.account.mailboxes.values() if "@To" in box.name]
        senders = {f"s{n}@x.example": labels[n % len(labels)] for n in range(21)}
        for sender, label in senders.items():
            scene.tap(scene.new_sender(sender, 2)[0], label)
        assert scene.cycle() == {}
        assert not scene.labelled()
        for sender, label in senders.items():
            groups = {name.replace(" ", "") for name in scene.account.groups_of(sender)}
            assert label.removeprefix("@To") in groups


# ------------------------------------------------------------------------------- known contacts


CARD: JSON = {
    "kind": "individual",
    "name": {"full": "Bobby", "components": [{"kind": "given", "value": "Bobby"}]},
    "emails": {"mine": {"address": "Bob@Shop.example", "contexts": {"work": True}}},
    "organizations": {"o": {"name": "Shop"}},
    "notes": {"first": {"note": "Likes tea.", "created": "2020-01-01T00:00:00Z"}},
    "phones": {"p": {"number": "1"}},
    "example.com:x": {"y": [1]},
}


@every_server
@pytest.mark.parametrize("warnings", [True, False])
def test_of_a_known_contact_nothing_is_overwritten(options: Make, warnings: bool) -> None:
    with Scene(options(), warnings_enabled=warnings) as scene:
        card = scene.account.new_card(CARD)
        scene.account.add_group("Friends", [card])
        before = scene.account.cards[card]
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        note = {**CARD["notes"]["first"], "note": f"Likes tea.\nTriaged to Feed on {TODAY}"}
        assert scene.account.cards[card] == {**before, "notes": {"first": note}}
        assert scene.account.groups_of(BOB) == {"Friends", "Feed"}
        tapped = {"Feed", "@MailroomWarning"} if warnings else {"Feed"}
        assert scene.boxes(mails) == [tapped, {"Feed"}]


@every_server
def test_an_empty_name_is_filled(options: Make) -> None:
    with Scene(options()) as scene:
        card = scene.account.add_contact(BOB)
        mails = scene.new_sender(FROM_BOB)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        assert scene.account.cards[card]["name"]["full"] == "Bob Smith"
        assert scene.account.cards[card]["kind"] == "individual"
        assert scene.boxes(mails) == [{"Feed"}]


@pytest.mark.parametrize("name", ["bob  smith", "Smith, Bob", "BOB SMITH"])
def test_the_same_name_said_otherwise_is_no_warning(name: str) -> None:
    with Scene() as scene:
        scene.account.add_contact(BOB, name)
        mails = scene.new_sender(FROM_BOB)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        assert scene.boxes(mails) == [{"Feed"}]


def test_a_note_of_the_same_day_is_written_once() -> None:
    with Scene() as scene:
        mails = scene.new_sender(FROM_BOB)
        for _ in range(2):
            scene.tap(mails[0], "@ToFeed")
            scene.cycle()
        assert scene.notes(BOB) == [CREATED_NOTE, f"Triaged to Feed on {TODAY}"]


def test_of_several_contacts_the_grouped_one_then_the_oldest_is_taken() -> None:
    with Scene() as scene:
        for address, grouped in [(BOB, False), (EVE, True)]:
            scene.account.add_contact(address, "New", created="2024-01-01T00:00:00Z")
            old = scene.account.add_contact(address, "Old", created="2020-01-01T00:00:00Z")
            new = scene.account.contacts_of(address)[0]["id"]
            expected = new if grouped else old
            if grouped:
                scene.account.join_group("Jail", new)
            scene.tap(scene.new_sender(address)[0], "@ToFeed")
            scene.cycle()
            members = scene.account.cards[scene.account.group_id("Feed")]["members"]
            assert scene.account.cards[expected]["uid"] in members
            assert len(scene.account.contacts_of(address)) == 2


def test_a_contact_with_a_longer_address_is_another_one() -> None:
    with Scene() as scene:
        others = [scene.account.add_contact(f"{x}{BOB}{y}", "X") for x, y in [("a", ""), ("", "b")]]
        scene.tap(scene.new_sender(FROM_BOB)[0], "@ToFeed")
        before = [scene.account.cards[card] for card in others]
        scene.cycle()
        assert scene.the_contact(BOB)["name"]["full"] == "Bob Smith"
        assert [scene.account.cards[card] for card in others] == before


def test_a_uid_that_is_taken_by_another_contact() -> None:
    """The user gave the contact that Mailroom once made another address."""
    with Scene() as scene:
        mails = scene.new_sender(FROM_BOB)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        card = scene.the_contact(BOB)
        scene.account.remove_card(card["id"])
        scene.account.new_card({**card, "emails": {"e1": {"address": "rob@new.example"}}})
        scene.tap(mails[0], "@ToJail")
        assert scene.cycle() == {}
        assert scene.the_contact(BOB)["uid"] != scene.the_contact("rob@new.example")["uid"]
        assert scene.account.groups_of(BOB) == {"Jail", "Mailroom"}
        assert scene.account.groups_of("rob@new.example") == {"Feed", "Mailroom"}


@pytest.mark.parametrize(("first", "second"), [("Feed", "Feed"), ("Feed", "Jail")])
@every_server
def test_a_contact_with_two_addresses_both_tapped(options: Make, first: str, second: str) -> None:
    with Scene(options()) as scene:
        emails = {"a": {"address": BOB}, "b": {"address": "bob@home.example"}}
        card = scene.account.new_card({"kind": "individual", "emails": emails})
        work, home = scene.new_sender(FROM_BOB, 2), scene.new_sender("bob@home.example", 2)
        scene.tap(work[0], f"@To{first}")
        scene.tap(home[0], f"@To{second}")
        assert scene.cycle() == {}
        assert scene.boxes(work) == [{first}] * 2
        assert scene.boxes(home) == [{second}] * 2
        assert len(scene.account.groups_of(BOB)) == 1
        assert scene.account.groups_of(BOB) <= {first, second}
        assert [each["id"] for each in scene.account.contacts_of(BOB)] == [card]


# ------------------------------------------------------------------------------- triaged again


@every_server
def test_triaged_again_a_sender_joins_before_it_leaves(options: Make) -> None:
    with Scene(options()) as scene:
        mails = scene.new_sender(FROM_BOB, 3)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        scene.account.move(mails[2], "Mine")
        scene.tap(mails[1], "@ToJail")
        scene.cycle()
        assert scene.boxes(mails) == [{"Jail"}, {"Jail"}, {"Mine"}]
        assert scene.account.groups_of(BOB) == {"Jail", "Mailroom"}
        account = scene.account
        uid = scene.the_contact(BOB)["uid"]
        feed, jail = account.group_id("Feed"), account.group_id("Jail")
        order = [
            (key, value is True)
            for method, call in set_calls(scene)
            if method == "ContactCard/set"
            for key, patch in (call.get("update") or {}).items()
            for path, value in patch.items()
            if path.startswith("members")
            for value in ([value[uid]] if path == "members" else [value])
        ]
        assert order == [(jail, True), (feed, False)]


def test_all_joins_come_before_all_leaves_in_set_calls_of_their_own() -> None:
    """Within one set call the server may choose the order."""
    with Scene() as scene:
        for sender in (FROM_BOB, FROM_EVE):
            scene.tap(scene.new_sender(sender)[0], "@ToFeed")
        scene.cycle()
        for address in (BOB, EVE):
            mail = next(iter(scene.account.by_sender.containing(address)))
            scene.tap(mail, "@ToJail")
        scene.cycle()
        kinds = []
        for method, call in set_calls(scene):
            if method == "ContactCard/set":
                text = json.dumps([list(patch.values()) for patch in call["update"].values()])
                kinds.append(("true" in text, "null" in text))
        assert kinds == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("first", "second", "groups", "boxes"),
    [
        ("Billboard", "Truck", {"Truck", "Paper Trail"}, {"Truck", "Paper Trail"}),
        ("Billboard", "PaperTrail", {"Paper Trail"}, {"Paper Trail"}),
        ("PaperTrail", "Truck", {"Truck", "Paper Trail"}, {"Truck", "Paper Trail"}),
        ("Truck", "Jail", {"Jail"}, {"Jail"}),
        ("Imbox", "Person", {"Person", "Imbox"}, {"Person", "Imbox", "Inbox"}),
        ("Imbox", "Feed", {"Feed"}, {"Feed", "Inbox"}),
        ("Feed", "Imbox", {"Imbox"}, {"Imbox"}),
    ],
)
def test_shared_parents_and_the_inbox(
    first: str, second: str, groups: set[str], boxes: set[str]
) -> None:
    with Scene() as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        for label in (first, second):
            scene.tap(mails[0], f"@To{label}")
            scene.cycle()
        assert scene.account.groups_of(BOB) == groups | {"Mailroom"}
        assert scene.boxes(mails) == [boxes] * 2


def test_a_join_that_is_refused_leaves_the_sender_where_it_was() -> None:
    with Scene() as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        scene.cycle()
        scene.tap(mails[0], "@ToJail")
        refuse = {scene.account.group_id("Jail"): {"type": "forbidden"}}
        scene.server.faults.append(Fault("ContactCard/set", refuse=refuse))
        assert "forbidden" in scene.cycle()[BOB]
        assert scene.account.groups_of(BOB) == {"Feed", "Mailroom"}
        assert scene.boxes(mails) == [{"Feed", "@ToJail"}, {"Feed"}]
        assert scene.cycle() == {}
        assert scene.account.groups_of(BOB) == {"Jail", "Mailroom"}
        assert scene.boxes(mails) == [{"Jail"}] * 2


@every_server
def test_a_group_that_takes_no_one_in_may_be_left(options: Make) -> None:
    with Scene(options()) as scene:
        bobs, eves = scene.new_sender(FROM_BOB, 2), scene.new_sender(FROM_EVE, 2)
        scene.tap(bobs[0], "@ToFeed")
        scene.cycle()
        scene.tap(bobs[0], "@ToJail")
        scene.tap(eves[0], "@ToFeed")
        refuse = {scene.account.group_id("Feed"): {"type": "tooLarge"}}
        scene.server.faults = [Fault("ContactCard/set", refuse=refuse)]
        assert scene.cycle().keys() == {EVE}
        assert scene.account.groups_of(BOB) == {"Jail", "Mailroom"}
        assert scene.boxes(bobs) == [{"Jail"}] * 2
        assert scene.cycle() == {}
        assert scene.boxes(eves) == [{"Feed"}] * 2


# --------------------------------------------------------------------------- what cannot be done


@every_server
def test_a_conflict_and_its_resolution(options: Make) -> None:
    with Scene(options()) as scene:
        mails = scene.new_sender(FROM_BOB, 3)
        scene.tap(mails[0], "@ToFeed")
        scene.tap(mails[1], "@ToJail")
        other = scene.new_sender(FROM_EVE)
        scene.tap(other[0], "@ToFeed")
        scene.cycle()
        error = {"Screener", "@MailroomError"}
        assert scene.boxes(mails) == [error | {"@ToFeed"}, error | {"@ToJail"}, {"Screener"}]
        assert scene.boxes(other) == [{"Feed"}]
        assert scene.account.contacts_of(BOB) == []
        scene.check_idle()
        scene.account.unlabel(mails[0], "@ToFeed")
        scene.cycle()
        assert scene.boxes(mails) == [{"Jail"}] * 3


def test_two_labels_on_one_mail() -> None:
    with Scene() as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed", "@ToJail")
        scene.cycle()
        assert "@MailroomError" in scene.account.mailboxes_of(mails[0])
        scene.account.unlabel(mails[0], "@ToFeed", "@ToJail")
        scene.cycle()
        assert scene.boxes(mails) == [{"Screener"}] * 2


@pytest.mark.parametrize("sender", [None, "", "Alice <Alice@HOME.example>", "undisclosed"])
@every_server
def test_senders_that_cannot_be_triaged(options: Make, sender: str | None) -> None:
    with Scene(options()) as scene:
        mails = [scene.account.deliver(sender, ["Screener"]) for _ in range(2)]
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Screener", "@ToFeed", "@MailroomError"}, {"Screener"}]
        scene.check_idle()
        scene.account.unlabel(mails[0], "@ToFeed")
        scene.cycle()
        assert scene.boxes(mails) == [{"Screener"}] * 2


def test_an_error_label_alone_is_never_taken_off_as_the_only_mailbox() -> None:
    with Scene(Options.cyrus()) as scene:
        mail = scene.account.deliver(FROM_BOB, ["@MailroomError"])
        scene.cycle()
        assert scene.boxes([mail]) == [{"@MailroomError"}]


# ------------------------------------------------------------------------------- searches


LOOSE = [
    f"Not Bob <not{BOB}>",
    f"Longer <{BOB}.evil.example>",
    f'"{BOB}" <{EVE}>',
    "Bob Smith <bob@shop.example.org>",
    f"Eve <{EVE}>, Bob <{BOB}>",
]


def searches_headers(request: Request) -> bool:
    return b'"header"' in request.body


def emptied(reply: JSON) -> JSON:
    for name, answer, _ in reply["methodResponses"]:
        if name == "Email/query":
            answer |= {"ids": [], "total": 0}
        if name == "Email/get":
            answer["list"] = []
    return reply


NO_HEADER_SEARCH = {"errors": {"Email/query": {"type": "unsupportedFilter"}}}
# What the `from` search is like, and what comes of the `header` search.
UNTRUSTED: dict[str, tuple[JSON, JSON]] = {
    "index": ({}, {}),
    "finds nothing": ({"from_search": "empty"}, {}),
    "error": ({"from_search": "error"}, {}),
    "lags": ({"index_lag": 3600}, {}),
    "neither finds anything": ({"from_search": "empty"}, {"edit": emptied}),
    "both are errors": ({"from_search": "error"}, NO_HEADER_SEARCH),
}


@pytest.mark.parametrize(("search", "header"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_nobody_elses_mail_moves_and_all_of_the_senders_does(search: JSON, header: JSON) -> None:
    with Scene(Options(**search)) as scene:
        scene.server.faults.append(Fault(searches_headers, times=FOREVER, **header))
        mails = scene.new_sender(FROM_BOB, 120)
        for mail in mails[::7]:
            scene.account.move(mail, "Paper Trail")
        others = [scene.new_sender(header)[0] for header in LOOSE]
        scene.new_sender("crowd@x.example", 120)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 120
        assert scene.boxes(others) == [{"Screener"}] * len(LOOSE)
        assert len(scene.account.mails_in("Screener")) == 120 + len(LOOSE)


def test_the_newest_hundred_of_the_screener_are_looked_at_whatever_the_index_says() -> None:
    with Scene() as scene:
        old = scene.new_sender(FROM_BOB, 3)
        scene.server.options.index_until = scene.account.modseq
        new = scene.new_sender(FROM_BOB, 100)
        scene.tap(old[0], "@ToFeed")
        scene.cycle()
        assert scene.boxes(old + new) == [{"Feed"}] * 103


def test_the_cost_of_a_tap_does_not_grow_with_the_account() -> None:
    def bytes_of_a_tap(crowd: int) -> int:
        with Scene() as scene:
            for n in range(crowd):
                scene.account.deliver(f"c{n}@crowd.example", ["Screener" if n % 2 else "Archive"])
            mails = scene.new_sender(FROM_BOB, 3)
            scene.tap(mails[0], "@ToFeed")
            replies = seen_replies(scene)
            scene.cycle()
            return len(json.dumps(replies))

    assert bytes_of_a_tap(1500) < 1.2 * bytes_of_a_tap(300)


# ------------------------------------------------------------------------------- limits and counts


@pytest.mark.parametrize(
    ("limits", "max_query_limit"),
    [
        ({"maxObjectsInGet": 30}, None),
        ({"maxObjectsInSet": 1}, None),
        ({"maxObjectsInSet": 3}, None),
        ({"maxCallsInRequest": 4}, None),
        ({"maxSizeRequest": 6000}, None),
        ({}, 1),
        ({}, 7),
        ({"maxObjectsInGet": 30, "maxObjectsInSet": 2, "maxCallsInRequest": 4}, 5),
        ({"maxConcurrentRequests": 1}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("search", ["index", "empty"])
def test_small_limits(limits: dict[str, int], max_query_limit: int | None, search: Any) -> None:
    options = Options(limits=limits, max_query_limit=max_query_limit, from_search=search)
    with Scene(options) as scene:
        scene.most_idle = FOREVER  # what fits into one request elsewhere may take several here
        senders = [f"sender-{n}@x.example" for n in range(12)]
        mails = [scene.new_sender(sender, 6) for sender in senders]
        for taps in mails:
            scene.tap(taps[2], "@ToFeed")
        assert scene.cycle() == {}
        assert [scene.boxes(each) for each in mails] == [[{"Feed"}] * 6] * 12
        assert all(scene.account.groups_of(sender) for sender in senders)
        most = scene.server.limit("maxSizeRequest")
        assert all(request.size <= most for request in scene.server.requests)
        assert all(request.status == 200 for request in scene.server.requests)


def test_a_sender_of_two_thousand_mails() -> None:
    with Scene() as scene:
        mails = scene.new_sender(FROM_BOB, 2000)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert len(scene.account.mails_in("Feed")) == 2000
        assert len(scene.last) <= 6


def test_two_hundred_taps_of_two_hundred_senders() -> None:
    with Scene() as scene:
        for n in range(200):
            scene.tap(scene.new_sender(f"s{n}@x.example", 3)[1], "@ToFeed")
        assert scene.cycle() == {}
        assert len(scene.account.mails_in("Feed")) == 600
        assert len(scene.last) <= 25


@pytest.mark.parametrize(
    ("senders", "mails", "most"), [(0, 0, 1), (1, 1, 5), (25, 4, 6), (50, 1, 9)]
)
@every_server
def test_how_many_requests_a_cycle_makes(
    options: Make, senders: int, mails: int, most: int
) -> None:
    with Scene(options(from_search="index")) as scene:
        for n in range(senders):
            scene.tap(scene.new_sender(f"Sender {n} <s{n}@x.example>", mails)[0], "@ToFeed")
        assert scene.cycle() == {}
        assert not scene.labelled()
        assert len(scene.last) <= most, [request.methods for request in scene.last]


# ------------------------------------------------------------------------------- refusals


def refuse_card_of(address: str) -> Fault:
    """Refuses whatever is done to the card of this address, new or known."""
    fault = Fault("ContactCard/set", times=FOREVER)

    def look(_: str, arguments: JSON) -> None:
        for key, card in (arguments.get("create") or {}).items():
            if address in json.dumps(card):
                fault.refuse[key] = {"type": "forbidden"}

    fault.before_call = look
    return fault


@every_server
def test_a_contact_that_is_refused_holds_up_no_one_else(options: Make) -> None:
    with Scene(options()) as scene:
        mails = {n: scene.new_sender(f"s{n}@x.example", 2) for n in range(5)}
        for taps in mails.values():
            scene.tap(taps[0], "@ToFeed")
        scene.server.faults.append(refuse_card_of("s2@x.example"))
        failed = scene.cycle()
        assert failed.keys() == {"s2@x.example"}
        assert "forbidden" in failed["s2@x.example"]
        assert scene.boxes(mails[2]) == [{"Screener", "@ToFeed"}, {"Screener"}]
        assert scene.boxes(mails[1] + mails[3]) == [{"Feed"}] * 4
        assert scene.account.groups_of("s2@x.example") == set()
        groups = [scene.account.cards[key].get("members", {}) for key in scene.account.groups]
        uids = {BYSTANDER, *(card["uid"] for card in scene.account.cards.values())}
        assert all(members.keys() <= uids for members in groups), "a member that is no card"
        scene.server.faults.clear()
        assert scene.cycle() == {}
        assert scene.boxes(mails[2]) == [{"Feed"}] * 2


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("what", ["tapped", "other"])
@every_server
def test_a_mail_that_is_refused_keeps_the_label_on(options: Make, nth: int, what: str) -> None:
    with Scene(options()) as scene:
        bobs, eves = scene.new_sender(FROM_BOB, 2), scene.new_sender(FROM_EVE, 2)
        scene.tap(bobs[0], "@ToFeed")
        scene.tap(eves[0], "@ToFeed")
        refuse = {bobs[0 if what == "tapped" else 1]: {"type": "tooManyMailboxes"}}
        scene.server.faults.append(Fault("Email/set", nth=nth, refuse=refuse))
        failed = scene.cycle()
        assert scene.boxes(eves) == [{"Feed"}] * 2
        if (nth, what) != (2, "other"):  # the second set does not touch the other mail
            assert "tooManyMailboxes" in failed[BOB]
            assert "@ToFeed" in scene.account.mailboxes_of(bobs[0])
        assert scene.cycle() == {}
        assert scene.boxes(bobs) == [{"Feed"}] * 2


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 400, "body": b'{"type": "urn:ietf:params:jmap:error:limit"}'},
        {"errors": {"Email/query": {"type": "serverFail"}}},
        {"errors": {"ContactCard/query": {"type": "serverFail", "description": "oops"}}},
        {"errors": {"ContactCard/set": {"type": "invalidArguments"}}},
        {"errors": {"Email/get": {"type": "requestTooLarge"}}},
    ],
    ids=str,
)
def test_a_sender_that_the_server_cannot_bear_holds_up_no_one_else(fault: JSON) -> None:
    with Scene() as scene:
        mails = {n: scene.new_sender(f"s{n}@x.example", 2) for n in range(9)}
        for taps in mails.values():
            scene.tap(taps[0], "@ToFeed")
        poison = scene.new_sender("poison@x.example", 2)
        scene.tap(poison[0], "@ToJail")
        scene.server.on_request = lambda _, request: (
            Fault(**fault) if b"poison@" in request.body else None
        )
        failed = scene.cycle()
        assert failed.keys() == {"poison@x.example"}
        assert [scene.boxes(each) for each in mails.values()] == [[{"Feed"}] * 2] * 9
        assert "@ToJail" in scene.account.mailboxes_of(poison[0])
        scene.server.on_request = None
        assert scene.cycle() == {}
        assert scene.boxes(poison) == [{"Jail"}] * 2


@pytest.mark.parametrize("answer", [None, {}])
def test_empty_and_missing_errors_are_none(answer: Any) -> None:
    def edit(reply: JSON) -> JSON:
        for name, body, _ in reply["methodResponses"]:
            if name.endswith("/set"):
                for key in ("notCreated", "notUpdated", "created", "updated"):
                    body[key] = body.get(key) or answer
        return reply

    with Scene() as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        scene.server.faults.append(Fault(times=FOREVER, edit=edit))
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 2


@every_server
@pytest.mark.parametrize("address", [BOB, EVE, "else@x.example"])
def test_contacts_that_change_between_reading_and_writing(options: Make, address: str) -> None:
    """The user saves a contact at that moment, maybe for the very same sender."""
    with Scene(options()) as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        mine = [""]

        def save(name: str, _: JSON) -> None:
            if name == "ContactCard/set" and not mine[0]:
                mine[0] = scene.account.add_contact(address, "Mine", phones={"p": {"number": "1"}})

        scene.server.faults.append(Fault("ContactCard/set", before_call=save))
        scene.heal()
        assert scene.account.cards[mine[0]]["name"] == {"full": "Mine"}
        assert scene.account.groups_of(BOB) >= {"Feed"}
        assert len(scene.account.contacts_of(BOB)) == 1
        assert [boxes & {"Feed", "Screener"} for boxes in scene.boxes(mails)] == [{"Feed"}] * 2


# ------------------------------------------------------------------------ who is in which group


def test_members_of_small_groups_come_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "MANY_MEMBERS", 1)
    with Scene(Options(groups_in_use=True)) as scene:
        scene.tap(scene.new_sender(FROM_BOB)[0], "@ToFeed")
        assert scene.cycle() == {}
        assert not any(
            "hasMember" in json.dumps(arguments)
            for request in scene.server.requests
            for _, arguments in request.calls
        )


@pytest.mark.parametrize("has_member", ["works", "empty", "error", "everything"])
def test_members_of_groups_are_searched_for_where_that_works(has_member: Any) -> None:
    with Scene(Options(groups_in_use=True, has_member=has_member), connect=False) as scene:
        scene.account.add_contact("else@x.example")
        scene.triage.connect()
        replies = seen_replies(scene)
        for label, group in (("@ToFeed", "Feed"), ("@ToJail", "Jail")):
            scene.tap(scene.new_sender(FROM_BOB)[0], label)
            assert scene.cycle() == {}
            assert scene.account.groups_of(BOB) == {group, "Mailroom"}
        assert (BYSTANDER in json.dumps(replies)) == (has_member != "works")


def test_a_search_for_members_that_lags_behind_is_noticed() -> None:
    """An index may be written after the card (Stalwart)."""
    with Scene(Options(groups_in_use=True, has_member="late")) as scene:
        for label, group in (("@ToFeed", "Feed"), ("@ToJail", "Jail"), ("@ToFeed", "Feed")):
            scene.tap(scene.new_sender(FROM_BOB)[0], label)
            assert scene.cycle() == {}
            assert scene.account.groups_of(BOB) == {group, "Mailroom"}


def with_late_members(scene: Scene) -> list[str]:
    """Mails of a contact of the user's who is in Jail, in an account whose index of members lags
    behind from now on."""
    scene.account.add_contact(BOB, "Bob")
    mails = scene.new_sender(FROM_BOB, 2)
    scene.tap(mails[0], "@ToJail")
    assert scene.cycle() == {}
    scene.server.options.has_member = "late"
    for card in scene.account.cards.values():
        if card["kind"] == "group":
            scene.account.indexed[card["id"]] = [*card["members"]]
    return mails


def test_what_was_written_is_known_though_what_went_along_failed() -> None:
    """The undo leaves the group, and the search would still find Bob in it."""
    with Scene(Options.fastmail(groups_in_use=True), takes_back=True) as scene:
        mails = with_late_members(scene)
        scene.tap(mails[0], "@ToScreener")
        errors = {"Email/set": {"type": "serverUnavailable"}}
        scene.server.faults = [Fault("Email/set", times=2, errors=errors)]
        assert scene.cycle().keys() == {BOB}
        assert scene.account.groups_of(BOB) == set()
        scene.account.unlabel(mails[0], "@ToScreener")
        scene.tap(mails[0], "@ToJail")
        scene.heal()
        assert scene.account.groups_of(BOB) == {"Jail"}


def test_what_was_written_is_known_after_the_members_were_read() -> None:
    with Scene(Options.fastmail(groups_in_use=True), takes_back=True) as scene:
        mails = with_late_members(scene)
        scene.tap(mails[0], "@ToScreener")
        assert scene.cycle() == {}
        scene.tap(scene.new_sender(FROM_EVE)[0], "@ToFeed")
        scene.server.faults = [Fault("ContactCard/set", refuse={"*": {"type": "forbidden"}})]
        assert scene.cycle().keys() == {EVE}
        assert scene.cycle() == {}
        scene.tap(mails[0], "@ToJail")
        scene.heal()
        assert scene.account.groups_of(BOB) == {"Jail"}


def test_what_someone_else_has_written_since_is_learnt_once() -> None:
    with Scene(Options.fastmail(groups_in_use=True)) as scene:
        scene.tap(scene.new_sender(FROM_BOB)[0], "@ToFeed")
        assert scene.cycle() == {}
        feed = scene.account.cards[scene.account.group_id("Feed")]
        scene.account.put_card({**feed, "members": {BYSTANDER: True}})
        replies = seen_replies(scene)
        for read in (True, False):
            replies.clear()
            scene.tap(scene.new_sender(FROM_BOB)[0], "@ToJail")
            assert scene.cycle() == {}
            assert (BYSTANDER in json.dumps(replies)) == read


def test_members_are_read_when_the_search_for_them_fails() -> None:
    options = Options(groups_in_use=True)
    with Scene(options) as scene:
        scene.tap(scene.new_sender(FROM_BOB)[0], "@ToFeed")
        options.has_member = "error"
        assert scene.cycle() == {}
        scene.tap(scene.new_sender(FROM_BOB)[0], "@ToJail")
        assert scene.cycle() == {}
        assert scene.account.groups_of(BOB) == {"Jail", "Mailroom"}


def test_a_group_that_is_emptied_meanwhile_takes_members_again() -> None:
    with Scene(Options(groups_in_use=True)) as scene:
        feed = scene.account.cards[scene.account.group_id("Feed")]
        scene.account.put_card({key: value for key, value in feed.items() if key != "members"})
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        assert "invalidPatch" in scene.cycle()[BOB]
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 2
        assert scene.account.groups_of(BOB) == {"Feed", "Mailroom"}


def test_a_group_made_meanwhile_keeps_its_members() -> None:
    with Scene(Options(groups_in_use=True)) as scene:
        scene.account.remove_card(scene.account.group_id("Feed"))
        scene.account.add_group("Feed", [BYSTANDER])
        scene.tap(scene.new_sender(FROM_BOB)[0], "@ToFeed")
        assert scene.cycle() == {}
        feed = scene.account.cards[scene.account.group_id("Feed")]
        assert feed["members"].keys() == {BYSTANDER, scene.the_contact(BOB)["uid"]}


@every_server
def test_a_uid_that_was_left_in_a_group_leaves_it(options: Make) -> None:
    """Of contacts that the user has deleted; the first of the two uids is another's now. A group
    with the address is no contact."""
    with Scene(options()) as scene:
        scene.account.add_contact("else@x.example", uid=contact_uid(BOB))
        left = contact_uid(BOB, {contact_uid(BOB)})
        jail = scene.account.cards[scene.account.group_id("Jail")]
        members = {**jail.get("members", {}), left: True}
        scene.account.put_card({**jail, "members": members, "emails": {"e1": {"address": BOB}}})
        scene.tap(scene.new_sender(FROM_BOB)[0], "@ToFeed")
        assert scene.cycle() == {}
        scene.account.put_card({**scene.account.cards[jail["id"]], "emails": {}})
        assert scene.the_contact(BOB)["uid"] == left
        assert scene.account.groups_of(BOB) == {"Feed", "Mailroom"}


# --------------------------------------------------------------------------- faults at each step


FAULTS: dict[str, Callable[[], Fault]] = {
    "503": lambda: Fault(status=503),
    "500 after the work": lambda: Fault(status=500, work=True),
    "reply lost": lambda: Fault(work=True, drop=True),
    "request lost": lambda: Fault(drop=True),
    "cut off": lambda: Fault(truncate=40),
    "rubbish": lambda: Fault(body=b"<html>", work=True),
    "every method fails": lambda: Fault(
        errors={
            f"{kind}/{verb}": {"type": "serverUnavailable"}
            for kind in ("Email", "Mailbox", "ContactCard")
            for verb in ("get", "query", "set")
        }
    ),
    "every object is refused": lambda: Fault(refuse={"*": {"type": "overQuota"}}),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("nth", range(1, 7))
def test_a_fault_at_any_request_is_healed(fault: Callable[[], Fault], nth: int) -> None:
    with Scene(Options.cyrus(from_search="index")) as scene:
        again, new = scene.new_sender(FROM_EVE, 2), scene.new_sender(FROM_BOB, 2)
        scene.tap(again[0], "@ToFeed")
        scene.cycle()
        scene.tap(again[1], "@ToJail")
        scene.tap(new[0], "@ToBillboard")
        count = len(scene.server.requests)
        scene.server.on_request = lambda _, __: (
            fault() if len(scene.server.requests) == count + nth else None
        )
        with suppress(ServerError):
            scene.cycle()
        assert scene.account.groups_of(EVE) & {"Feed", "Jail"}, "in no group at all"
        assert scene.account.groups_of(BOB) or scene.boxes(new)[0] >= {"@ToBillboard"}
        scene.heal()
        assert scene.boxes(again) == [{"Jail"}] * 2
        assert scene.boxes(new) == [{"Billboard", "Paper Trail"}] * 2
        assert scene.account.groups_of(EVE) == {"Jail", "Mailroom"}
        assert scene.account.groups_of(BOB) == {"Billboard", "Paper Trail", "Mailroom"}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("nth", range(1, 6))
def test_a_fault_at_any_request_of_the_first_cycle_is_healed(
    fault: Callable[[], Fault], nth: int
) -> None:
    with Scene(connect=False) as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        scene.server.on_request = lambda number, _: fault() if number == nth else None
        with suppress(ServerError):
            scene.cycle()
        scene.heal()
        assert scene.boxes(mails) == [{"Feed"}] * 2


class Phone:
    """What the user does in the middle of a cycle that triages Bob, who has three mails, the first
    of them tapped `@ToFeed`; and what has to be true of it in the end."""

    def __init__(self, scene: Scene, mails: list[str]) -> None:
        self.scene, self.account, self.mails = scene, scene.account, mails

    def delete_tapped(self) -> Iterator[None]:
        self.scene.remove_mail(self.mails[0])
        yield

    def delete_other(self) -> Iterator[None]:
        self.scene.remove_mail(self.mails[1])
        yield
        assert self.scene.boxes(self.mails[:1] + self.mails[2:]) == [{"Feed"}] * 2

    def delete_all(self) -> Iterator[None]:
        for mail in self.mails:
            self.scene.remove_mail(mail)
        yield

    def archive_tapped(self) -> Iterator[None]:
        self.account.move(self.mails[0], "Archive")
        yield
        assert "Archive" in self.account.mailboxes_of(self.mails[0])

    def bin_other(self) -> Iterator[None]:
        self.account.move(self.mails[1], "Trash")
        yield
        assert "Trash" in self.account.mailboxes_of(self.mails[1])

    def file_other(self) -> Iterator[None]:
        self.account.move(self.mails[1], "Mine")
        yield
        assert "Mine" in self.account.mailboxes_of(self.mails[1])

    def change_of_mind(self) -> Iterator[None]:
        self.account.unlabel(self.mails[0], "@ToFeed")
        self.account.label(self.mails[0], "@ToJail")
        yield
        assert self.scene.boxes(self.mails) == [{"Jail"}] * 3
        assert self.account.groups_of(BOB) == {"Jail", "Mailroom"}

    def tap_again(self) -> Iterator[None]:
        """Another mail of Bob's gets another label: carried out, or a conflict that stays."""
        self.account.label(self.mails[1], "@ToJail")
        yield
        if self.scene.labelled():
            assert "@MailroomError" in self.account.mailboxes_of(self.mails[1])
        else:
            assert self.scene.boxes(self.mails) == [{"Jail"}] * 3
            assert self.account.groups_of(BOB) == {"Jail", "Mailroom"}

    def tap_same(self) -> Iterator[None]:
        self.account.label(self.mails[1], "@ToFeed")
        yield
        assert self.scene.boxes(self.mails) == [{"Feed"}] * 3

    def tap_eve(self) -> Iterator[None]:
        self.eve = self.scene.new_sender(FROM_EVE, 2)
        self.account.label(self.eve[1], "@ToJail")
        yield
        assert self.scene.boxes(self.eve) == [{"Jail"}] * 2
        assert self.scene.boxes(self.mails) == [{"Feed"}] * 3

    def save_contact(self) -> Iterator[None]:
        """Made while the mailbox is being read it is the one that is used; if Mailroom was first,
        the user does not make it again."""
        if not self.account.contacts_of(BOB):
            self.account.add_contact(BOB, "Bob Smith", phones={"p": {"number": "1"}})
        yield
        assert self.scene.the_contact(BOB)["name"]["full"] == "Bob Smith"
        assert "Feed" in self.account.groups_of(BOB)

    def rename_group_and_back(self) -> Iterator[None]:
        card = self.account.cards[self.account.group_id("Jail")]
        self.account.put_card({**card, "name": {"full": "Prison"}})
        self.account.put_card(card)
        yield
        assert self.scene.boxes(self.mails) == [{"Feed"}] * 3

    def join_own_group(self) -> Iterator[None]:
        friend = self.account.add_contact("friend@x.example", "Friend")
        self.account.join_group("Feed", friend)
        yield
        assert self.account.groups_of("friend@x.example") == {"Feed"}
        assert "Feed" in self.account.groups_of(BOB)


ACTIONS = [name for name, value in vars(Phone).items() if not name.startswith("_")]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", [Options.fastmail, Options.cyrus], ids=["fastmail", "cyrus"])
def test_what_the_user_does_in_the_middle_of_a_cycle(
    options: Make, when: str, nth: int, action: str
) -> None:
    with Scene(options()) as scene:
        mails = scene.new_sender(FROM_BOB, 3)
        scene.tap(mails[0], "@ToFeed")
        done = getattr(Phone(scene, mails), action)()
        pending = [done]

        def act(*_: object) -> None:
            if pending:
                next(pending.pop())

        count = len(scene.server.requests)
        fault = Fault(before_call=act) if when == "before" else Fault(after=act)
        scene.server.on_request = lambda _, __: (
            fault if len(scene.server.requests) == count + nth else None
        )
        with suppress(ServerError):
            scene.cycle()
        if pending:
            next(pending.pop())  # the cycle made fewer requests
        scene.heal()
        assert next(done, "end") == "end"


def test_a_labelled_mail_that_lost_its_other_mailboxes_is_not_lost() -> None:
    """The server takes a patch that leaves a mail nowhere as a deletion."""
    with Scene(Options.cyrus()) as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        feed = scene.account.mailbox_id("Feed")

        def unfile(name: str, _: JSON) -> None:
            if name == "Email/set" and scene.account.mails_in("Feed"):
                for mail in scene.account.mails_in("Feed"):
                    left = scene.account.mails[mail].mailboxes - {feed}
                    scene.account.file(mail, left or {scene.account.mailbox_id("Mine")})

        scene.server.faults.append(Fault("Email/set", nth=2, before_call=unfile))
        scene.cycle()
        assert all(scene.boxes(mails))


# -------------------------------------------------------------------------- an account that changes


@every_server
def test_a_label_renamed_deleted_and_made_again_while_running(options: Make) -> None:
    with Scene(options()) as scene:
        scene.account.rename_mailbox("@ToFeed", "@Fodder")
        with pytest.raises(ConfigurationError, match="@ToFeed"):
            scene.cycle()
        scene.account.rename_mailbox("@Fodder", "@ToFeed")
        scene.cycle()
        scene.account.remove_mailbox("@ToFeed")
        with pytest.raises(ConfigurationError, match="@ToFeed"):
            scene.cycle()
        scene.account.add_mailbox("@ToFeed")
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        scene.heal()
        assert scene.boxes(mails) == [{"Feed"}] * 2


def test_a_label_made_again_between_two_cycles() -> None:
    with Scene() as scene:
        scene.account.remove_mailbox("@ToFeed")
        scene.account.add_mailbox("@ToFeed")
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 2


@pytest.mark.parametrize("box", ["Feed", "Screener", "@MailroomError", "@MailroomWarning"])
def test_a_mailbox_made_again_between_two_cycles(box: str) -> None:
    with Scene() as scene:
        scene.account.remove_mailbox(box)
        scene.account.add_mailbox(box)
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 2


def test_a_nested_namesake_is_not_the_mailbox_that_is_meant() -> None:
    with Scene(connect=False) as scene:
        for name in ("Feed", "@ToFeed", "Inbox"):
            scene.account.add_mailbox(name, parent="Mine")
        boxes = scene.account.mailboxes
        for name in ("Screener", "Jail"):  # the nested one is the older
            scene.account.rename_mailbox(name, "gone")
            scene.account.add_mailbox(name)
            box = boxes[scene.account.mailbox_id("gone")]
            box.name, box.parent_id = name, scene.account.mailbox_id("Mine")
        top = {box.name: box.id for box in boxes.values() if not box.parent_id}
        mails = [scene.account.deliver(FROM_BOB, [top["Screener"]]) for _ in range(2)]
        scene.tap(mails[0], top["@ToFeed"])
        scene.heal()
        assert scene.account.mails[mails[1]].mailboxes == {top["Feed"]}


def test_a_group_that_goes_missing_while_running_is_named() -> None:
    with Scene() as scene:
        mails = scene.new_sender(FROM_BOB, 2)
        scene.tap(mails[0], "@ToFeed")
        scene.account.remove_card(scene.account.group_id("Feed"))
        with pytest.raises(ConfigurationError, match="Feed"):
            scene.cycle()
        assert scene.boxes(mails) == [{"Screener", "@ToFeed"}, {"Screener"}]
        scene.account.add_group("Feed")
        scene.heal()
        assert scene.boxes(mails) == [{"Feed"}] * 2


def problems_of(server: JMAPServer, **settings: Any) -> str:
    """What the first cycle says is wrong with an account, a line each."""
    with pytest.raises(ConfigurationError) as caught:
        new_triage(settings_for(server, **settings)).run()
    assert server.writes == []
    return "\n".join(caught.value.problems)


def test_all_that_is_missing_is_named_at_once() -> None:
    with JMAPServer.with_mailroom_account() as server:
        account = server.account
        gone = ["Screener", "@ToFeed", "Jail", "@MailroomError", "@MailroomWarning"]
        for name in gone:
            account.remove_mailbox(name)
        account.remove_card(account.group_id("Truck"))
        account.remove_card(account.group_id("Mailroom"))
        said = problems_of(server).splitlines()
        assert len(said) == 7
        for name in (*gone, "Truck", "Mailroom"):
            assert any(repr(name) in line for line in said), name


def finds_nothing(reply: JSON) -> JSON:
    """The reply to a search for names that finds no mailbox."""
    for name, answer, _ in reply["methodResponses"]:
        answer["list" if name == "Mailbox/get" else "ids"] = []
    return reply


@pytest.mark.parametrize(
    "fault",
    [{}, {"errors": {"Mailbox/query": {"type": "unsupportedFilter"}}}, {"edit": finds_nothing}],
    ids=["trusted", "refused", "empty"],
)
def test_mailboxes_are_searched_by_name_where_that_finds_them(fault: JSON) -> None:
    with Scene(connect=False) as scene:
        for n in range(50):
            scene.account.add_mailbox(f"Folder {n}")
        scene.server.faults.append(Fault("Mailbox/query", nth=2, **fault))
        [mail] = scene.new_sender(FROM_BOB)
        scene.tap(mail, "@ToFeed")
        assert scene.cycle() == {}
        assert scene.account.mailboxes_of(mail) == {"Feed"}
        listed = {str(args["filter"]) for args in scene.server.calls("Mailbox/query")[2:]}
        assert len(listed) == 1
        assert ("None" in listed) == bool(fault)


def test_the_warning_label_is_not_missed_where_warnings_are_off() -> None:
    with Scene(connect=False, warnings_enabled=False) as scene:
        scene.account.remove_mailbox("@MailroomWarning")
        assert scene.cycle() == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"read_only": True}, "read"),
        ({"has_mail": False}, "mail"),
        ({"has_contacts": False}, "contacts"),
        ({"token": "other"}, "token"),
    ],
    ids=["read-only", "no mail", "no contacts", "token"],
)
def test_an_account_that_cannot_be_used(changes: JSON, said: str) -> None:
    with JMAPServer.with_mailroom_account(Options(**changes)) as server:
        assert said in problems_of(
            server, jmap_token="mine" if "token" in changes else "secret-token"
        )


def test_an_account_that_becomes_read_only_is_an_error_that_passes() -> None:
    with Scene() as scene:
        mails = scene.new_sender(FROM_BOB)
        scene.tap(mails[0], "@ToFeed")
        scene.server.options.read_only = True
        with suppress(MailroomError):
            scene.cycle()  # the session has to be fetched again to know
        with pytest.raises(MailroomError, match="read"):
            scene.cycle()
        scene.server.options.read_only = False
        scene.heal()
        scene.cycle()  # the session is fetched once more
        assert scene.boxes(mails) == [{"Feed"}]


def test_a_session_that_changes_is_fetched_again() -> None:
    with Scene() as scene:
        scene.server.options.limits["maxObjectsInSet"] = 1
        scene.cycle()
        mails = scene.new_sender(FROM_BOB, 3)
        scene.tap(mails[0], "@ToFeed")
        assert scene.cycle() == {}
        assert scene.boxes(mails) == [{"Feed"}] * 3
        scene.check_idle()


# --------------------------------------------------------------------------- replies of any shape


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each thing in a JSON value; of many children that are alike to the first."""
    yield path
    if isinstance(value, dict):
        ids = any(len(key) < 4 and key[:1] in "PM" for key in value)
        for key in list(value)[: 2 if ids else None]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value) if len(path) < 3 else min(len(value), 1)):
            yield from places(value[index], (*path, index))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


def crash(run: Callable[[], object], where: str) -> Iterator[str]:
    """How it came to an end for which there is no line to tell the user."""
    try:
        run()
    except Exception as error:
        if not isinstance(error, MailroomError) or len(str(error).splitlines()) != 1:
            yield f"{where}: {error!r}"


def edit_of(path: tuple[Any, ...], by: Any) -> Callable[[Any], Any]:
    """Puts something else at this place of a reply, if there is one."""

    def edit(good: Any) -> Any:
        with suppress(LookupError, TypeError, AttributeError):
            return replaced(good, path, by)
        return good

    return edit


def recorded(scene: Scene) -> list[Any]:
    """The replies of a whole cycle that triages a sender."""
    replies = seen_replies(scene)
    scene.tap(scene.new_sender("Recorded <recorded@x.example>", 2)[0], "@ToFeed")
    scene.cycle()
    scene.server.faults.clear()
    return replies


wrong_values = pytest.mark.parametrize(
    "wrong", [None, 7, "x", [], {}, [None], True], ids=json.dumps
)


@wrong_values
def test_replies_of_the_wrong_shape_at_every_level(wrong: Any) -> None:
    """They are errors of the server, or they do not matter; and they pass."""
    with Scene() as scene:
        scene.account.add_contact("known@x.example", "Known")
        tried, crashes = 0, list[str]()
        for nth, reply in enumerate(recorded(scene), 1):
            for path in places(reply):
                scene.tap(scene.new_sender(f"Sender {tried} <s{tried}@x.example>")[0], "@ToFeed")
                tried += 1
                scene.server.faults[:] = [Fault(nth=nth, edit=edit_of(path, wrong))]
                crashes += crash(scene.cycle, f"reply {nth} at {path}")
                scene.server.faults.clear()
                scene.heal()
                assert not scene.labelled(), (nth, path)
        assert tried > 50
        assert not crashes, "\n".join(crashes)


@wrong_values
def test_sessions_of_the_wrong_shape_at_every_level(wrong: Any) -> None:
    with JMAPServer.with_mailroom_account() as server:
        crashes: list[str] = []
        for path in places(server.session()):
            server.faults[:] = [Fault("session", times=FOREVER, edit=edit_of(path, wrong))]
            crashes += crash(new_triage(settings_for(server)).run, f"{path}")
        assert not crashes, "\n".join(crashes)


# ------------------------------------------------------------------- what a review brought to light


def test_a_mail_that_goes_between_two_pages_leaves_none_out() -> None:
    with Scene(Options(limits={"maxObjectsInGet": 20})) as scene:
        scene.most_idle = 3
        mails = scene.new_sender(FROM_BOB, 50)
        scene.tap(mails[0], "@ToFeed")
        newest = max(mails, key=lambda mail: scene.account.mails[mail].received_at)
        pages: list[JSON] = []

        def before(method: str, arguments: JSON) -> None:
            if method == "Email/query" and "from" in json.dumps(arguments["filter"]):
                pages.append(arguments)
                if len(pages) == 2:
                    scene.remove_mail(newest)

        scene.server.faults = [Fault(times=FOREVER, before_call=before)]
        scene.heal()
        assert len(pages) >= 3
        assert scene.boxes(set(mails) - {newest}) == [{"Feed"}] * 49


def test_a_sender_whose_request_never_gets_an_answer_holds_up_no_one() -> None:
    with Scene() as scene:
        mails = [scene.new_sender(f"{name}@x.example")[0] for name in ("a", "m", "z")]
        for mail in mails:
            scene.tap(mail, "@ToFeed")

        def poison(request: Request) -> bool:
            return "m@x.example" in json.dumps(request.calls)

        scene.server.faults = [Fault(poison, times=FOREVER, drop=True)]
        assert scene.cycle().keys() == {"m@x.example"}
        assert scene.boxes(mails) == [{"Feed"}, {"Screener", "@ToFeed"}, {"Feed"}]
        scene.server.faults.clear()
        scene.heal()
        assert scene.boxes(mails) == [{"Feed"}] * 3


def test_contacts_written_by_someone_else_at_the_same_time_are_no_failure() -> None:
    with Scene() as scene:
        (mail,) = scene.new_sender(FROM_BOB)
        scene.tap(mail, "@ToFeed")

        def someone_else(method: str, _: JSON) -> None:
            if method == "ContactCard/set":
                scene.account.add_contact("zoe@z.example", "Zoe")

        scene.server.faults = [Fault("ContactCard/set", before_call=someone_else)]
        assert scene.cycle() == {}
        assert scene.boxes([mail]) == [{"Feed"}]


def test_a_company_with_a_comma_in_its_name_keeps_it() -> None:
    with Scene() as scene:
        mail, person = (scene.new_sender(f'"Acme, Inc" <{name}@x.example>')[0] for name in "ab")
        scene.tap(mail, "@ToFeed")
        scene.tap(person, "@ToPerson")
        scene.heal()
        assert scene.the_contact("a@x.example")["name"]["full"] == "Acme, Inc"
        assert scene.the_contact("b@x.example")["name"]["full"] == "Inc Acme"


@pytest.mark.parametrize("identities", [["x"], [None], 5, {}])
def test_identities_of_the_wrong_shape_are_an_error_of_the_server(identities: Any) -> None:
    def edit(reply: JSON) -> JSON:
        reply["methodResponses"][0][1]["list"] = identities
        return reply

    with JMAPServer.with_mailroom_account(Options(has_submission=True)) as server:
        server.faults = [Fault("Identity/get", edit=edit)]
        triage = new_triage(settings_for(server))
        with suppress(ServerError):
            triage.run()
        assert server.faults[0].fired
        assert triage.run() == {}


def test_the_log_says_why_a_mail_is_marked(caplog: pytest.LogCaptureFixture) -> None:
    with Scene() as scene:
        first, second = scene.new_sender(FROM_BOB, 2)
        scene.tap(first, "@ToFeed")
        scene.tap(second, "@ToJail")
        scene.tap(scene.account.deliver(None, ["Screener"]), "@ToFeed")
        scene.cycle()
        records = [record for record in caplog.records if record.message.startswith("mail marked")]
        reasons = sorted(record.__dict__["fields"]["reason"] for record in records)
        assert reasons == ["it has no sender", *[f"several labels for {BOB}"] * 2]
        caplog.clear()
        scene.cycle()
        assert not caplog.records, "it is told once"


def test_senders_one_by_one_after_a_silence() -> None:
    """Each request that gets no answer may take a whole time-out: so there are only two."""
    with Scene() as scene:
        mails = [scene.new_sender(f"s{n}@x.example")[0] for n in range(8)]
        for mail in mails:
            scene.tap(mail, "@ToFeed")
        dropped = Fault(
            lambda request: "s3@x.example" in json.dumps(request.calls), times=FOREVER, drop=True
        )
        scene.server.faults = [dropped]
        assert scene.cycle().keys() == {"s3@x.example"}
        assert dropped.fired == 2
        scene.server.faults.clear()
        scene.heal()
        assert scene.boxes(mails) == [{"Feed"}] * 8


def test_a_server_that_ignores_the_anchor_is_not_paged_without_end() -> None:
    def first_page_again(reply: JSON) -> JSON:
        for name, answer, _ in reply["methodResponses"]:
            if name == "Mailbox/query":
                answer |= {"ids": first, "position": 0}
        return reply

    with Scene(Options(limits={"maxObjectsInGet": 10})) as scene:
        scene.most_idle = 5
        first = sorted(scene.account.mailboxes)[:10]
        scene.server.faults = [Fault(times=FOREVER, edit=first_page_again)]
        with pytest.raises(ServerError, match="no end of pages"):
            scene.cycle()
        scene.server.faults.clear()
