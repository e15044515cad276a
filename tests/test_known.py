"""Messages of senders about whom something has been decided are filed without a tap: what lies in
the Screener always, what arrives in the Inbox with MAILROOM_SCREEN_INBOX; and nobody is fought."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from homes import EmbeddedHome, furnished, once, run, tap_new
from jmap_server import Fault, Options
from tools import SERVERS, Scene, parse_metrics, running

from mailroom import MailroomError

BOB, EVE, ANN = "bob@shop.example", "eve@evil.example", "ann@x.example"
LATER = "2099-01-01T00:00:00Z"
CATEGORIES: list[Any] = [
    {"name": "Imbox", "add_to_inbox": True},
    {"name": "Feed", "mark_read": True},
]
CATEGORIES += ["Paper Trail", {"name": "Billboard", "parent": "Paper Trail"}]
Make = Callable[..., Options]


def know(scene: Scene, address: str = BOB, *groups: str) -> str:
    """The user has a contact, and puts it into groups by hand."""
    contact = scene.account.add_contact(address, "Somebody")
    for group in groups or ("Feed",):
        scene.account.join_group(group, contact)
    return contact


def arrive(scene: Scene, sender: str = BOB, *boxes: str, **more: Any) -> str:
    """A message arrives in the Inbox, or elsewhere, after the start of Mailroom."""
    return scene.account.deliver(sender, boxes or ["Inbox"], received_at=LATER, **more)


def boxes(scene: Scene, mail: str) -> set[str]:
    return scene.account.mailboxes_of(mail)


@pytest.fixture(params=[*SERVERS.values()], ids=[*SERVERS])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with Scene(request.param(), triage_categories=CATEGORIES) as scene:
        scene.server.requests.clear()
        yield scene


@pytest.fixture(params=[*SERVERS.values()], ids=[*SERVERS])
def screener(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """With a screener for the Inbox."""
    with Scene(
        request.param(), takes_back=True, screen_inbox=True, triage_categories=CATEGORIES
    ) as scene:
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


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["Imbox"], {"Imbox", "Inbox"}),
        (["Feed"], {"Feed"}),
        (["Billboard"], {"Billboard", "Paper Trail"}),
        (["Paper Trail", "Billboard"], {"Billboard", "Paper Trail"}),
        (["Paper Trail"], {"Paper Trail"}),
        (["Feed", "Imbox"], {"Screener"}),
        (["Mailroom"], {"Screener"}),
    ],
    ids=str,
)
def test_by_the_groups_of_the_contact(scene: Scene, groups: list[str], expected: set[str]) -> None:
    """In the most special category, without a warning and without a change of the contact."""
    contact = know(scene, BOB, *groups)
    card = scene.account.cards[contact]
    mail, tapped = (
        arrive(scene, f"Another Name <{BOB}>", "Screener"),
        arrive(scene, EVE, "Screener"),
    )
    scene.tap(tapped, "@ToFeed")
    assert scene.cycle() == {}
    assert boxes(scene, mail) == expected
    assert ("$seen" in scene.account.mails[mail].keywords) == (expected == {"Feed"})
    assert scene.account.mails[tapped].keywords == {"$seen"}
    assert scene.account.cards[contact] == card


def test_two_unrelated_categories_are_told_once(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    know(scene, BOB, "Feed", "Imbox")
    arrive(scene, BOB, "Screener")
    with caplog.at_level("INFO", "mailroom"):
        for _ in range(3):
            scene.cycle()
    [record] = [each for each in caplog.records if "several groups" in each.getMessage()]
    assert record.fields == {"sender": BOB, "groups": "Imbox, Feed"}  # type: ignore[attr-defined]


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
    assert [boxes(scene, mail) for mail in mails] == [
        {"Feed"} if n == 7 else {"Screener"} for n in range(90)
    ]


@pytest.mark.parametrize("how", ["known", "tap"])
def test_what_the_user_takes_back_is_not_filed_again(scene: Scene, how: str) -> None:
    mail = arrive(scene, BOB, "Screener")
    if how == "tap":
        scene.tap(mail, "@ToFeed")
    else:
        know(scene)
    scene.cycle()
    assert boxes(scene, mail) == {"Feed"}
    scene.account.move(mail, "Screener")
    know(scene, ANN)  # the contacts have changed, too
    scene.cycle()
    other = arrive(scene, BOB, "Screener")
    scene.cycle()
    assert (boxes(scene, mail), boxes(scene, other)) == ({"Screener"}, {"Feed"})


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
        assert boxes(scene, mail) in ({"Feed"}, {"Feed", "Mine"})


def test_the_users_own_and_what_is_marked_stay(scene: Scene) -> None:
    know(scene, scene.server.options.username)
    know(scene)
    own = arrive(scene, scene.server.options.username, "Screener")
    marked = arrive(scene, BOB, "Screener", "@MailroomWarning")
    scene.cycle()
    assert boxes(scene, own) == {"Screener"}
    assert boxes(scene, marked) == {"Screener", "@MailroomWarning"}


def test_a_group_that_is_missing_and_comes_back(scene: Scene) -> None:
    know(scene, BOB, "Billboard")
    scene.lose("Paper Trail")
    mail = arrive(scene, BOB, "Screener")
    assert scene.cycle() == {}
    assert boxes(scene, mail) == {"Screener"}
    scene.make("Paper Trail")
    scene.cycle()
    scene.cycle()
    assert boxes(scene, mail) == {"Billboard", "Paper Trail"}


def test_ten_minutes_of_arrivals() -> None:
    """500 messages of 300 strangers and 20 known senders, over push, in scaled time."""
    with Scene() as scene, running(scene.server, poll_interval=86400, debounce_seconds=0.05) as run:
        scene.most_idle = 2  # Its own triage has not seen what the service has done.
        account = scene.account
        for n in range(20):
            account.join_group("Feed", account.add_contact(f"k{n}@x.example", "Known"))
        scene.server.wait_for(lambda: scene.server.streams)
        run.wait_until_quiet()
        start, before, senders = len(scene.server.requests), run.cycles, {}
        for n in range(500):
            sender = f"k{n % 20}@x.example" if n % 5 == 0 else f"s{n % 300}@x.example"
            senders[account.deliver(sender, ["Screener"])] = sender
            if n % 5 == 4:
                run.wait_for_cycles(1)
        run.wait_until_quiet()
        for mail, sender in senders.items():
            assert boxes(scene, mail) == ({"Feed"} if sender[0] == "k" else {"Screener"})
        requests = scene.server.requests[start:]
        writes = [request for request in requests if "Email/set" in request.methods]
        assert len(writes) <= 100
        assert len(requests) - len(writes) <= 2 * (run.cycles - before)
        samples = parse_metrics(run.page("/metrics")[1])
        assert samples['mailroom_messages_filed_total{by="known_sender"}'] == 100
        assert len([entry for entry in run.log if entry["event"] == "new messages filed"]) <= 100


# In the Inbox


def test_what_arrives_in_the_inbox(screener: Scene) -> None:
    scene = screener
    for address, group in ((BOB, "Feed"), (ANN, "Imbox")):
        know(scene, address, group)
    scene.account.add_group("Friends", [scene.account.add_contact("pal@x.example", "Pal")])
    before = scene.account.deliver(EVE, ["Inbox"])
    expected = {
        arrive(scene, BOB): {"Feed"},
        arrive(scene, ANN): {"Imbox", "Inbox"},
        arrive(scene, EVE): {"Screener"},
        arrive(scene, "pal@x.example"): {"Inbox"},
        arrive(scene, scene.server.options.username): {"Inbox"},
        arrive(scene, "nobody"): {"Inbox"},
        arrive(scene, EVE, "Inbox", keywords=["$flagged"]): {"Inbox"},
        arrive(scene, EVE, "Inbox", "Mine"): {"Inbox", "Mine"},
        before: {"Inbox"},
    }
    assert scene.cycle() == {}
    assert {mail: boxes(scene, mail) for mail in expected} == expected
    stranger = [*expected][2]
    scene.account.move(stranger, "Inbox")
    know(scene, "other@x.example")
    scene.cycle()
    assert boxes(scene, stranger) == {"Inbox"}


def test_a_stranger_who_is_put_into_a_group(screener: Scene) -> None:
    """After the message has been put into the Screener."""
    mail = arrive(screener, EVE)
    screener.cycle()
    assert boxes(screener, mail) == {"Screener"}
    know(screener, EVE)
    screener.cycle()
    assert boxes(screener, mail) == {"Feed"}


def test_without_the_setting_the_inbox_is_left_alone(scene: Scene) -> None:
    know(scene)
    mails = [arrive(scene, BOB), arrive(scene, EVE)]
    scene.cycle()
    assert [boxes(scene, mail) for mail in mails] == [{"Inbox"}] * 2
