"""Messages of senders about whom something has been decided are filed without a tap: what lies in
the Screener always, what arrives in the Inbox with MAILROOM_SCREEN_INBOX; and nobody is fought."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from homes import EmbeddedHome, furnished, once, run, tap_new
from jmap_server import Fault
from test_triage import Make, every_server
from tools import SERVERS, Scene, parse_metrics, running

from mailroom import MailroomError

BOB, EVE, ANN = "bob@shop.example", "eve@evil.example", "ann@x.example"
LATER = "2099-01-01T00:00:00Z"
CATEGORIES: list[Any] = [{"name": "Imbox", "add_to_inbox": True}]
CATEGORIES += [{"name": "Feed", "mark_read": True}, "Paper Trail"]
CATEGORIES += [{"name": "Billboard", "parent": "Paper Trail"}]


def know(scene: Scene, address: str = BOB, *groups: str) -> str:
    """The user has a contact, and puts it into groups by hand."""
    contact = scene.account.add_contact(address, "Somebody")
    for group in groups or ("Feed",):
        scene.account.join_group(group, contact)
    return contact


def arrive(scene: Scene, sender: str = BOB, *boxes: str, **more: Any) -> str:
    """A message arrives in the Inbox, or elsewhere, after the start of Mailroom."""
    return scene.account.deliver(sender, boxes or ["Inbox"], received_at=LATER, **more)


@pytest.fixture(params=SERVERS.values(), ids=[*SERVERS])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with Scene(request.param(), triage_categories=CATEGORIES) as scene:
        yield scene


# In the Screener


def test_in_every_store(home: EmbeddedHome) -> None:
    """By a tap, or because the user has put the contact into the group."""
    furnished(home.book)
    tap_new(home)
    once(home)
    home.book.add_group("Friends", home.book.add("otto@x.example", name="Otto"))
    later = home.deliver("Jane <jane@x.example>", "later")
    friend = home.deliver("Otto <otto@x.example>", "a friend")
    told = run(home, "run", "--once", "--dry-run").out
    assert "jane@x.example" in told
    assert "otto" not in told
    assert home.where()[later] == {"Screener"}
    once(home)
    assert (home.where()[later], home.where()[friend]) == ({"Feed"}, {"Screener"})


GROUPS: dict[tuple[str, ...], set[str]] = {
    # the groups of a contact: where the messages go
    ("Imbox",): {"Imbox", "Inbox"},
    ("Feed",): {"Feed"},
    ("Billboard",): {"Billboard", "Paper Trail"},
    ("Paper Trail", "Billboard"): {"Billboard", "Paper Trail"},
    ("Paper Trail",): {"Paper Trail"},
    ("Feed", "Imbox"): {"Screener"},
    ("Mailroom",): {"Screener"},
}


def test_what_lies_in_the_screener(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Goes into the most special category, without a warning and without a change of the contact.
    Two unrelated categories are told once; the user's own messages and marked ones stay."""
    caplog.set_level("INFO", "mailroom")
    tapped, expected = arrive(scene, EVE, "Screener"), dict[str, set[str]]()
    scene.tap(tapped, "@ToFeed")
    for n, (groups, filed) in enumerate(GROUPS.items()):
        know(scene, f"s{n}@x.example", *groups)
        expected[arrive(scene, f"Another Name <s{n}@x.example>", "Screener")] = filed
    know(scene, scene.server.options.username)
    expected[arrive(scene, scene.server.options.username, "Screener")] = {"Screener"}
    know(scene)
    for sender in (BOB, EVE):  # without the setting the Inbox is left alone
        expected[arrive(scene, sender)] = {"Inbox"}
    marked = ["Screener", "@MailroomWarning"]
    expected[arrive(scene, BOB, *marked)] = {*marked}
    cards = {**scene.account.cards}
    for _ in range(3):
        assert scene.cycle() == {}
    for mail, filed in {**expected, tapped: {"Feed"}}.items():
        assert scene.account.mailboxes_of(mail) == filed
        assert ("$seen" in scene.account.mails[mail].keywords) == (filed == {"Feed"})
    people = cards.keys() - scene.account.groups
    assert {id_: scene.account.cards[id_] for id_ in people} == {id_: cards[id_] for id_ in people}
    [record] = [each for each in caplog.records if "several groups" in each.getMessage()]
    told = {"sender": "s5@x.example", "groups": "Imbox, Feed"}
    assert record.fields == told  # type: ignore[attr-defined]


def test_what_strangers_cost(scene: Scene) -> None:
    """Two requests however many there are, and then one; until the contacts change."""
    mails = [scene.account.deliver(f"s{n}@x.example", ["Screener"]) for n in range(90)]
    counts = []
    for _ in range(3):
        scene.cycle()
        counts.append(len(scene.last))
    assert counts == [2, 1, 1]
    know(scene, "s7@x.example")
    scene.cycle()
    assert scene.boxes(mails) == [{"Feed"} if n == 7 else {"Screener"} for n in range(90)]


@pytest.mark.parametrize("how", ["known", "tap"])
def test_what_the_user_takes_back_is_not_filed_again(scene: Scene, how: str) -> None:
    mail = arrive(scene, BOB, "Screener")
    if how == "tap":
        scene.tap(mail, "@ToFeed")
    else:
        know(scene)
    scene.cycle()
    assert scene.account.mailboxes_of(mail) == {"Feed"}
    scene.account.move(mail, "Screener")
    know(scene, ANN)  # the contacts have changed, too
    scene.cycle()
    other = arrive(scene, BOB, "Screener")
    scene.cycle()
    assert scene.boxes([mail, other]) == [{"Screener"}, {"Feed"}]


def test_what_the_user_drags_out_while_it_is_filed(scene: Scene) -> None:
    """And what a server refuses, and one that breaks down: what is not filed is looked at again."""
    know(scene)
    mail = ""
    for fault in (
        Fault("ContactCard/query", after=lambda: scene.account.move(mail, "Mine")),  # noqa: B023  (of this round)
        Fault("Email/set", refuse={"*": {"type": "forbidden"}}),
        Fault("ContactCard/query", status=503),
        Fault("Email/set", drop=True),
        Fault("Email/set", drop=True, work=True),
    ):
        mail = arrive(scene, BOB, "Screener")
        scene.server.faults.append(fault)
        with suppress(MailroomError):
            scene.cycle()
        scene.heal()
        assert scene.account.mailboxes_of(mail) in ({"Feed"}, {"Feed", "Mine"})


def test_no_arrival_holds_up_a_tap(scene: Scene) -> None:
    know(scene)
    mails = [arrive(scene, BOB, "Screener"), arrive(scene, EVE, "Screener")]
    scene.tap(mails[1], "@ToFeed")
    scene.server.faults = [Fault("Email/set", refuse={mails[0]: {"type": "rateLimit"}}, times=9)]
    with pytest.raises(MailroomError):
        scene.cycle()
    assert scene.boxes(mails) == [{"Screener"}, {"Feed"}]
    scene.server.faults.clear()
    scene.heal()


def test_a_group_that_is_missing_and_comes_back(scene: Scene) -> None:
    know(scene, BOB, "Billboard")
    scene.lose("Paper Trail")
    scene.lose("@ToPaperTrail")
    mail = arrive(scene, BOB, "Screener")
    scene.heal()  # A query may have named the label that has just gone.
    assert scene.account.mailboxes_of(mail) == {"Screener"}
    scene.make("Paper Trail")
    scene.make("@ToPaperTrail")
    scene.cycle()
    scene.cycle()
    assert scene.account.mailboxes_of(mail) == {"Billboard", "Paper Trail"}


def test_ten_minutes_of_arrivals() -> None:
    """500 messages of 300 strangers and 20 known senders, over push, in scaled time."""
    with Scene() as scene, running(scene.server, poll_interval=86400, debounce_seconds=0.05) as run:
        scene.most_idle = 2  # Its own triage has not seen what the service has done.
        for n in range(20):
            know(scene, f"k{n}@x.example")
        scene.server.wait_for(lambda: scene.server.streams)
        run.wait_until_quiet()
        start, before, senders = len(scene.server.requests), run.cycles, {}
        for n in range(500):
            sender = f"k{n % 20}@x.example" if n % 5 == 0 else f"s{n % 300}@x.example"
            senders[scene.account.deliver(sender, ["Screener"])] = sender
            if n % 5 == 4:
                run.wait_for_cycles(1)
        run.wait_until_quiet()
        filed = [{"Feed"} if sender[0] == "k" else {"Screener"} for sender in senders.values()]
        assert scene.boxes(senders) == filed
        requests = scene.server.requests[start:]
        writes = [request for request in requests if "Email/set" in request.methods]
        assert len(writes) <= 100
        assert len(requests) - len(writes) <= 2 * (run.cycles - before)
        samples = parse_metrics(run.page("/metrics")[1])
        assert samples['mailroom_messages_filed_total{by="known_sender"}'] == 100
        assert len([entry for entry in run.log if entry["event"] == "new messages filed"]) <= 100


# In the Inbox


@every_server
def test_what_arrives_in_the_inbox(options: Make) -> None:
    changes: dict[str, Any] = {"screen_inbox": True, "triage_categories": CATEGORIES}
    with Scene(options(), takes_back=True, **changes) as scene:
        for address, group in ((BOB, "Feed"), (ANN, "Imbox")):
            know(scene, address, group)
        scene.account.add_group("Friends", [scene.account.add_contact("pal@x.example", "Pal")])
        before = scene.account.deliver(EVE, ["Inbox"])
        stranger, later_known = arrive(scene, EVE), arrive(scene, "new@x.example")
        expected = {
            stranger: {"Screener"},
            later_known: {"Screener"},
            arrive(scene, BOB): {"Feed"},
            arrive(scene, ANN): {"Imbox", "Inbox"},
            arrive(scene, "pal@x.example"): {"Inbox"},
            arrive(scene, scene.server.options.username): {"Inbox"},
            arrive(scene, "nobody"): {"Inbox"},
            arrive(scene, EVE, "Inbox", keywords=["$flagged"]): {"Inbox"},
            arrive(scene, EVE, "Inbox", "Mine"): {"Inbox", "Mine"},
            arrive(scene, EVE, "Screener", "Feed"): {"Screener", "Feed"},
            before: {"Inbox"},
        }
        assert scene.cycle() == {}
        assert {mail: scene.account.mailboxes_of(mail) for mail in expected} == expected
        scene.account.move(stranger, "Inbox")
        know(scene, "new@x.example")
        scene.cycle()
        assert scene.boxes([stranger, later_known]) == [{"Inbox"}, {"Feed"}]
