"""Other people at work: at every step of a cycle in turn the user does something on the phone, or a
second Mailroom runs on the same account. No tap is lost, nothing the user did is overwritten, and
all comes to rest.

By default some of the steps are tried, with `--long` all of them, and the points between the calls
of one request too.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gevent
import pytest
from jmap_server import Fault, Request
from radicale_server import RadicaleServer
from test_faults import BOB, EVE, SCENARIOS, made, undisturbed
from tools import COUNTS
from worlds import PHONE, STYLES, Program, World, seeded

ANN = "ann@friends.example"


# ------------------------------------------------------------------------------------- the user


class User:
    """What the user does in the middle of a cycle that moves Bob, who has three mails, from `Feed`
    to `Jail`, and files Eve, who is new, into `Feed`. Ann is a friend.

    Each goes on after the first `yield` when that cycle has ended, and after the second one when
    all has come to rest.
    """

    def __init__(self, world: World) -> None:
        self.world, self.account, self.store = world, world.account, world.store
        self.bobs = [*world.triaged(BOB, "Feed"), *world.deliver(BOB)]
        self.account.label(self.bobs[0], "@ToJail")
        self.eves = world.tap(f"Eve <{EVE}>", "@ToFeed")
        self.ann = self.store.add(ANN, "Ann")

    def both_are_filed(self) -> None:
        marks = {"@MailroomWarning"}
        assert [self.account.mailboxes_of(mail) - marks for mail in self.bobs] == [{"Jail"}] * 3
        assert [self.account.mailboxes_of(mail) for mail in self.eves] == [{"Feed"}] * 2
        assert self.world.groups()[BOB] == {"Jail", "Mailroom"}
        assert self.world.groups()[EVE] == {"Feed", "Mailroom"}

    def edits_a_contact(self) -> Iterator[None]:
        self.store.edit(self.world.contact(BOB).uid, phone=PHONE, name="Bobby")
        yield
        yield
        card = self.world.contact(BOB)
        assert (card.name, PHONE in repr(card)) == ("Bobby", True)
        self.both_are_filed()

    def edits_the_new_contact(self) -> Iterator[None]:
        """As soon as it is there."""
        is_there = EVE in self.world.groups()
        if is_there:
            self.store.edit(self.world.contact(EVE).uid, phone=PHONE, name="Evelyn")
        yield
        yield
        card = self.world.contact(EVE)
        assert (card.name, PHONE in repr(card)) == (
            ("Evelyn", True) if is_there else ("Eve", False)
        )
        assert self.world.groups()[EVE] == {"Feed", "Mailroom"}

    def makes_the_contact(self) -> Iterator[None]:
        """If Mailroom was first, the user sees that there is one. Over CardDAV nothing can keep a
        contact from being the second one that is made between Mailroom's look and its write: there
        the user is not so quick."""
        listings = [request for _, request in self.world.requests if request.method == "REPORT"]
        is_late = EVE in self.world.groups() or len(listings) > 1
        if not is_late:
            self.store.add(EVE, "Evelyn")
        yield
        yield
        assert self.world.contact(EVE).name == ("Eve" if is_late else "Evelyn")
        assert "Feed" in self.world.groups()[EVE]

    def deletes_a_contact(self) -> Iterator[None]:
        """Whether it is made again depends on what was done already; the mails are filed."""
        self.store.remove(self.world.contact(BOB).uid)
        yield
        yield
        assert self.world.groups().get(BOB, {"Jail"}) >= {"Jail"}
        assert [self.account.mailboxes_of(mail) for mail in self.bobs] == [{"Jail"}] * 3

    def deletes_the_new_contact(self) -> Iterator[None]:
        if EVE in self.world.groups():
            self.store.remove(self.world.contact(EVE).uid)
        yield
        yield
        assert self.world.groups().get(EVE, {"Feed"}) >= {"Feed"}
        assert [self.account.mailboxes_of(mail) for mail in self.eves] == [{"Feed"}] * 2

    def adds_a_friend_to_the_group(self) -> Iterator[None]:
        self.world.join("Jail", self.ann)
        self.world.join("Feed", self.ann)
        yield
        yield
        assert self.world.groups()[ANN] == {"Feed", "Jail"}
        self.both_are_filed()

    def renames_a_group_and_back(self) -> Iterator[None]:
        uid = self.world.group("Jail").uid
        self.store.edit(uid, name="Prison")
        yield
        self.store.edit(uid, name="Jail")
        yield
        self.both_are_filed()

    def deletes_the_new_group_and_makes_it_again(self) -> Iterator[None]:
        """Who was in it is not known any more, but by the labels."""
        self.store.remove(self.world.group("Jail").uid)
        yield
        self.store.add_group("Jail")
        yield
        assert [self.account.mailboxes_of(mail) for mail in self.bobs] == [{"Jail"}] * 3

    def deletes_the_old_group_and_makes_it_again(self) -> Iterator[None]:
        self.store.remove(self.world.group("Feed").uid)
        yield
        self.store.add_group("Feed")
        yield
        assert [self.account.mailboxes_of(mail) for mail in self.bobs] == [{"Jail"}] * 3
        assert [self.account.mailboxes_of(mail) for mail in self.eves] == [{"Feed"}] * 2
        assert self.world.groups()[BOB] == {"Jail", "Mailroom"}

    def makes_a_group_of_that_name_too(self) -> Iterator[None]:
        second = self.store.add_group("Jail", [self.ann])
        yield
        self.store.remove(second)
        yield
        assert [self.account.mailboxes_of(mail) for mail in self.bobs] == [{"Jail"}] * 3

    def renames_the_label_and_back(self) -> Iterator[None]:
        self.account.rename_mailbox("@ToJail", "@Away")
        yield
        self.account.rename_mailbox("@Away", "@ToJail")
        yield
        self.both_are_filed()

    def deletes_the_label_and_makes_it_again(self) -> Iterator[None]:
        """The tap is gone with it."""
        self.account.remove_mailbox("@ToJail")
        yield
        self.account.add_mailbox("@ToJail")
        yield
        assert self.world.groups()[BOB] & {"Feed", "Jail"}
        assert [self.account.mailboxes_of(mail) for mail in self.eves] == [{"Feed"}] * 2
        self.account.label(self.bobs[0], "@ToJail")

    def renames_the_destination_and_back(self) -> Iterator[None]:
        self.account.rename_mailbox("Jail", "Prison")
        yield
        self.account.rename_mailbox("Prison", "Jail")
        yield
        self.both_are_filed()

    def deletes_the_destination_and_makes_it_again(self) -> Iterator[None]:
        """And the mails that are in no other mailbox with it."""
        box = self.account.mailbox_id("Jail")
        mails = self.account.mails
        self.world.removed |= {id_ for id_ in mails if mails[id_].mailboxes == {box}}
        self.account.remove_mailbox("Jail")
        yield
        self.account.add_mailbox("Jail")
        yield
        left = [self.account.mailboxes_of(mail) for mail in self.bobs if mail in mails]
        assert all(boxes <= {"Jail", "Feed", "Screener"} for boxes in left)
        assert self.world.groups()[BOB] == {"Jail", "Mailroom"}

    def deletes_the_screener_and_makes_it_again(self) -> Iterator[None]:
        box = self.account.mailbox_id("Screener")
        mails = self.account.mails
        self.world.removed |= {id_ for id_ in mails if mails[id_].mailboxes == {box}}
        self.account.remove_mailbox("Screener")
        yield
        self.account.add_mailbox("Screener")
        yield
        left = [self.account.mailboxes_of(mail) for mail in self.bobs if mail in mails]
        assert left == [{"Jail"}] * len(left)

    def files_a_mail_in_her_own_folder(self) -> Iterator[None]:
        self.account.label(self.bobs[0], "Mine")
        self.account.move(self.bobs[1], "Mine")
        yield
        yield
        tapped, moved, other = (self.account.mailboxes_of(mail) for mail in self.bobs)
        assert (tapped, other) == ({"Jail", "Mine"}, {"Jail"})
        assert "Mine" in moved
        assert "Feed" not in moved

    def deletes_a_mail(self) -> Iterator[None]:
        self.world.remove_mail(self.bobs[0])
        self.world.remove_mail(self.eves[1])
        yield
        yield
        assert self.account.mailboxes_of(self.eves[0]) == {"Feed"}
        assert self.world.groups()[BOB] & {"Feed", "Jail"}

    def taps_one_more(self) -> Iterator[None]:
        self.anns = self.world.tap(f"Ann <{ANN}>", "@ToPerson")
        yield
        yield
        assert [self.account.mailboxes_of(mail) for mail in self.anns] == [{"Person", "Imbox"}] * 2
        assert self.world.groups()[ANN] == {"Person", "Imbox"}
        self.both_are_filed()

    def changes_her_mind(self) -> Iterator[None]:
        self.account.unlabel(self.bobs[0], "@ToJail")
        self.account.label(self.bobs[0], "@ToTruck")
        yield
        yield
        boxes = [self.account.mailboxes_of(mail) for mail in self.bobs]
        assert boxes == [{"Truck", "Paper Trail"}] * 3
        assert self.world.groups()[BOB] == {"Truck", "Paper Trail", "Mailroom"}


ACTIONS = [name for name in vars(User) if name[0] != "_" and name != "both_are_filed"]


class Point(NamedTuple):
    """When it happens: before the nth request is worked, after it, or before a later one of its
    calls."""

    nth: int
    when: str
    call: int = 0

    def fault(self, act: Callable[[], Any]) -> Fault:
        calls = []

        def before_call(*_: object) -> None:
            calls.append(1)
            if len(calls) == self.call + 1:
                act()

        if self.when == "after":
            return Fault(after=act)
        if self.when == "before":
            act()
            return Fault()
        return Fault(before_call=before_call)


def points(requests: list[tuple[int, Request]], style: str, turn: int, long: bool) -> list[Point]:
    """The points of an undisturbed run; if it must not be long some, and others at each turn."""
    found = []
    for nth, (_, request) in enumerate(requests, 1):
        found += [Point(nth, "before"), Point(nth, "after")]
        found += [Point(nth, "between", call) for call in range(1, len(request.calls))]
    few = 1 if style == "radicale" else 3
    every = len(found) // few if not long else len(found) // 50 or 1
    return found[5 * turn % every :: every]


def bobs_world(style: str, radicale: RadicaleServer) -> tuple[World, User]:
    seeded()
    world = World(style, radicale)
    user = User(world)
    world.watch()
    return world, user


@pytest.fixture(scope="module")
def usual(radicale: RadicaleServer) -> Callable[[str], list[tuple[int, Request]]]:
    """The requests of the undisturbed cycle on a kind of server."""
    known: dict[str, list[tuple[int, Request]]] = {}

    def get(style: str) -> list[tuple[int, Request]]:
        if style not in known:
            world, user = bobs_world(style, radicale)
            with world:
                assert Program(world.settings).cycle() == "success"
                user.both_are_filed()
            known[style] = world.requests
        return known[style]

    return get


def meddle(action: str, style: str, radicale: RadicaleServer, point: Point) -> None:
    """One run, in which the user does something at one point."""
    world, user = bobs_world(style, radicale)
    with world:
        program, deed = Program(world.settings), getattr(user, action)()
        done = []

        def act() -> None:
            done.append(next(deed))

        world.meet = lambda nth, _: point.fault(act) if nth == point.nth else None
        program.cycle()
        world.meet = lambda *_: None
        assert done, "the request never came"
        next(deed)
        program.settle()
        assert next(deed, "end") == "end"
        program.settle()
        state = world.state()
        assert program.cycle() == "success"
        world.check_state(state)
        COUNTS["deeds of other people at work"] += 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("action", ACTIONS)
def test_whatever_the_user_does_at_any_step(
    action: str,
    style: str,
    radicale: RadicaleServer,
    usual: Callable[[str], list[tuple[int, Request]]],
    long: bool,
) -> None:
    wrong = []
    for point in points(usual(style), style, ACTIONS.index(action), long):
        try:
            meddle(action, style, radicale, point)
        except AssertionError as error:
            wrong.append(f"{point}: {error}")
    assert not wrong, "\n".join(wrong)


# ----------------------------------------------------------------------------- a second Mailroom

CYCLES = [name for name, scenario in SCENARIOS.items() if scenario.step == Program.cycle]


def interleave(name: str, style: str, radicale: RadicaleServer, point: Point) -> None:
    """One run, in which another Mailroom does a whole cycle in the middle of the first one's."""
    goal = undisturbed(name, style, radicale).goal
    with made(SCENARIOS[name], style, radicale) as world:
        world.watch(goal)
        one, other = Program(world.settings), Program(world.settings)

        def run_other() -> None:
            world.meet = lambda *_: None
            other.cycle()

        world.meet = lambda nth, _: point.fault(run_other) if nth == point.nth else None
        one.cycle()
        end_as_one(world, goal.state, one, other)


def end_as_one(world: World, state: dict[str, Any], *programs: Program) -> None:
    """All come to rest, and the account is as one Mailroom would leave it."""
    for program in programs:
        program.settle()
    world.check_state(state)
    for program in programs:
        writes = len(world.mail.writes)
        assert (program.cycle(), len(world.mail.writes)) == ("success", writes)
    world.check_state(state)
    COUNTS["runs of two Mailrooms at once"] += 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CYCLES)
def test_a_second_mailroom_at_any_step(
    name: str, style: str, radicale: RadicaleServer, long: bool
) -> None:
    wrong = []
    requests = undisturbed(name, style, radicale).requests
    for point in points(requests, style, CYCLES.index(name), long):
        try:
            interleave(name, style, radicale, point)
        except AssertionError as error:
            wrong.append(f"{point}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CYCLES)
def test_two_mailrooms_side_by_side(name: str, style: str, radicale: RadicaleServer) -> None:
    """Their requests come in turns, one ahead of the other by so many."""
    goal = undisturbed(name, style, radicale).goal
    for ahead in range(1 if style == "radicale" else 3):
        with made(SCENARIOS[name], style, radicale) as world:
            world.watch(goal)
            programs = [Program(world.settings) for _ in range(2)]
            world.meet = lambda *_: Fault(after=gevent.sleep)
            programs[0].begin()
            world.mail.wait_for(lambda: len(world.requests) >= ahead)  # noqa: B023
            programs[1].begin()
            for program in programs:
                program.end()
            world.meet = lambda *_: None
            end_as_one(world, goal.state, *programs)
