"""A fault at every step: each scenario runs once undisturbed, and then again and again with one
fault at its first request, its second, its third ... After one more, undisturbed cycle all is as it
would be without the fault, and on the way there nothing was lost for a moment.

By default a part of the matrix runs: every kind of fault in every scenario, at some request, on
some of the servers. With `--long` all of it runs.
"""

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
from jmap_server import JSON, Fault, Request
from radicale_server import RadicaleServer
from tools import COUNTS
from worlds import PHONE, STYLES, Goal, Program, World, seeded

BOB, EVE = "bob@shop.example", "eve@evil.example"


# ------------------------------------------------------------------------------------- scenarios


def new_sender(world: World) -> None:
    world.tap(f"Bob Smith <{BOB}>", "@ToBillboard", mails=4)
    world.deliver(f"Bob Smith <{BOB}>", 1, "Mine")
    world.deliver(f"Eve <{EVE}>", 2)


def known_contact(world: World) -> None:
    friend = world.store.add(BOB, "Bobby", "Likes tea.")
    world.store.add_group("Friends", [friend])
    world.tap(f"Bob Smith <{BOB}>", "@ToImbox")


def known_senders(world: World) -> None:
    """Without a tap, and a stranger among them."""
    world.triaged(BOB, "Billboard", "Paper Trail")
    world.store.add_group("Friends", [world.store.add("ann@friends.example", "Ann")])
    for sender in (f"Bob Smith <{BOB}>", f"Eve <{EVE}>", "ann@friends.example"):
        world.deliver(sender, 3)


def nameless_contact_and_a_person(world: World) -> None:
    world.store.add(BOB)
    world.tap(f"Bob Smith <{BOB}>", "@ToPerson")
    world.tap(f'"Doe, Eve" <{EVE}>', "@ToPerson")


def other_child_of_one_parent(world: World) -> None:
    mails = world.triaged(BOB, "Billboard", "Paper Trail")
    world.account.label(mails[1], "@ToTruck")


def change_places(world: World) -> None:
    """So that each of the groups is joined by one and left by the other."""
    for sender, here, there in ((BOB, "Feed", "Jail"), (EVE, "Jail", "Feed")):
        mails = world.triaged(sender, here)
        world.account.label(mails[1], f"@To{there}")
    world.triaged("ann@friends.example", "Jail")


def conflict(world: World) -> None:
    _, two = world.tap(BOB, "@ToFeed")
    world.account.label(two, "@ToJail")
    world.account.deliver(None, ["Screener", "@ToFeed"], subject="no sender")
    world.tap(EVE, "@ToFeed")


def conflict_resolved(world: World) -> None:
    one, two = world.tap(BOB, "@ToJail")
    world.account.label(one, "@MailroomError")
    world.account.label(two, "@MailroomError")
    world.tap(EVE, "@ToFeed")


def many_senders(world: World) -> None:
    labels = sorted(box.name for box in world.account.mailboxes.values() if "@To" in box.name)
    for n in range(25):
        world.tap(f"Sender {n} <s{n}@x.example>", labels[n % len(labels)])


def many_chunks(world: World) -> None:
    world.triaged("s1@x.example", "Jail")
    for n in range(4):
        world.tap(f"s{n}@x.example", "@ToFeed", mails=4)


def triage_taken_back(world: World) -> None:
    """Of Bob, and of Eve, whose contact the user has edited."""
    by_mailroom(world)
    for sender in (BOB, EVE):
        mail = next(id_ for id_, m in world.account.mails.items() if m.subject.startswith(sender))
        world.account.label(mail, "@ToScreener")


def reset(world: World) -> None:
    by_mailroom(world)
    world.tap("new@x.example", "@ToFeed")


def by_mailroom(world: World) -> None:
    """Two senders that a Mailroom has triaged; then the user edits the contact of one."""
    world.takes_back = True
    world.account.add_mailbox("@ToScreener")
    world.tap(f"Bob Smith <{BOB}>", "@ToFeed")
    world.tap(f"Eve <{EVE}>", "@ToBillboard")
    Program(world.settings).settle()
    world.store.edit(world.contact(EVE).uid, phone=PHONE)


class Scenario(NamedTuple):
    """`prepare` makes the account what it is before; `step` is what is done, and done again after
    the fault, until it returns `success`: a cycle, unless it is something else."""

    prepare: Callable[[World], None]
    options: JSON = {}  # noqa: RUF012  (it is never changed)
    step: Callable[[Program], str] = Program.cycle


SMALL = {"limits": {"maxObjectsInSet": 2, "maxObjectsInGet": 20}, "max_query_limit": 7}
SCENARIOS = {
    scenario.prepare.__name__: scenario
    for scenario in (
        Scenario(new_sender),
        Scenario(known_contact),
        Scenario(known_senders),
        Scenario(nameless_contact_and_a_person),
        Scenario(other_child_of_one_parent),
        Scenario(change_places),
        Scenario(conflict),
        Scenario(conflict_resolved),
        Scenario(triage_taken_back),
        Scenario(reset, step=Program.reset),
        Scenario(many_senders),
        Scenario(many_chunks, SMALL),
    )
}


# ------------------------------------------------------------------------------------- faults

Kind = Callable[[Program, Request], Fault | None]
"""Makes the fault that a request is to meet; None where this kind does not apply."""


def answer(**fault: Any) -> Kind:
    return lambda _, __: Fault(**fault)


def killed(work: bool) -> Kind:
    return lambda program, _: Fault(drop=True, work=work, after=program.kill)


def timed_out(work: bool) -> Kind:
    return lambda program, _: Fault(hang=True, work=work, after=program.time_out)


def method_error(nth: int, **error: str) -> Kind:
    def fault(_: Program, request: Request) -> Fault | None:
        if nth >= len(request.calls):
            return None
        call_id = str(nth)  # as Mailroom numbers them
        return Fault(errors={call_id: error})

    return fault


def refused(which: Callable[[list[str]], list[str]]) -> Kind:
    """One of the objects that the request would write is refused, or some of them."""

    def fault(_: Program, request: Request) -> Fault | None:
        written = [
            key
            for name, call in request.calls
            if name.endswith("/set")
            for key in [*(call.get("create") or {}), *(call.get("update") or {})]
        ]
        refuse = {key: {"type": "forbidden"} for key in which(written)}
        return Fault(refuse=refuse) if refuse else None

    return fault


def state_mismatch(_: Program, request: Request) -> Fault | None:
    sets = [name for name in request.methods if name.endswith("/set")]
    return Fault(errors={name: {"type": "stateMismatch"} for name in sets}) if sets else None


BUSY = {"Retry-After": "7"}
HTML = b"<html><title>Sorry</title></html>"
REFUSED = "connection refused"
KINDS: dict[str, Kind] = {
    REFUSED: answer(),  # the server is away before the request comes, see Disturbed
    "request lost": answer(drop=True),
    "reply lost": answer(drop=True, work=True),
    "reply cut off": answer(truncate=20),
    "time-out": timed_out(work=False),
    "time-out after the work": timed_out(work=True),
    **{f"{status}": answer(status=status) for status in (401, 403, 404, 409, 412, 500, 503)},
    "429": answer(status=429, headers=BUSY),
    "503 with Retry-After": answer(status=503, headers=BUSY),
    "500 after the work": answer(status=500, work=True),
    "rubbish": answer(body=HTML),
    "rubbish after the work": answer(body=HTML, work=True),
    "nothing": answer(body=b""),
    "other JSON": answer(body=b'{"methodResponses": []}', work=True),
    **{f"call {n} fails": method_error(n, type="serverFail") for n in range(8)},
    "first object refused": refused(lambda keys: keys[:1]),
    "last object refused": refused(lambda keys: keys[1:][-1:]),
    "every object refused": refused(lambda keys: keys),
    "stateMismatch": state_mismatch,
    "killed": killed(work=False),
    "killed after the work": killed(work=True),
}


class Disturbed:
    """A run of a scenario in which the nth request meets a fault. `server`: the one that the
    request goes to."""

    def __init__(self, world: World, nth: int, kind: str, server: int) -> None:
        self.world, self.program = world, Program(world.settings)
        self.nth, self.kind, self.server = nth, kind, world.servers[server]
        self.fault: Fault | None = None
        world.meet = self.meet
        if kind == REFUSED and nth == 1:
            self.go_away()

    def meet(self, number: int, request: Request) -> Fault | None:
        if self.kind == REFUSED and number == self.nth - 1:
            return Fault(headers={"Connection": "close"}, after=self.go_away)
        if self.kind == REFUSED or number != self.nth:
            return None
        self.fault = KINDS[self.kind](self.program, request)
        return self.fault

    def go_away(self) -> None:
        self.server.pause()
        self.fault = Fault()

    def come_back(self) -> None:
        self.world.meet = lambda *_: None
        if self.kind == REFUSED:
            self.server.restart()


# ------------------------------------------------------------------------------------- the proof


def made(scenario: Scenario, style: str, radicale: RadicaleServer) -> World:
    seeded()
    world = World(style, radicale, **scenario.options)
    scenario.prepare(world)
    world.requests.clear()
    return world


class Undisturbed(NamedTuple):
    """Where a scenario leads to, by which requests (the server's number, and what it was asked),
    and all places where a fault may happen: (number of the request, kind of fault)."""

    goal: Goal
    requests: list[tuple[int, Request]]
    places: list[tuple[int, str]]


@lru_cache
def undisturbed(name: str, style: str, radicale: RadicaleServer) -> Undisturbed:
    scenario = SCENARIOS[name]
    with made(scenario, style, radicale) as world:
        world.watch()
        program = Program(world.settings)
        assert scenario.step(program) == "success"
        goal, requests = world.end(), world.requests[:]
        places = [
            (nth, kind)
            for nth, (_, request) in enumerate(requests, 1)
            for kind in KINDS
            if KINDS[kind](program, request)
        ]
        assert scenario.step(program) == "success"
        assert world.end() == goal, "a second time changes something"
        return Undisturbed(goal, requests, places)


def survives(name: str, style: str, radicale: RadicaleServer, nth: int, kind: str) -> None:
    """One run with one fault."""
    goal, requests, _ = undisturbed(name, style, radicale)
    scenario = SCENARIOS[name]
    with made(scenario, style, radicale) as world:
        world.watch(goal)
        run = Disturbed(world, nth, kind, requests[nth - 1][0])
        result = scenario.step(run.program)
        assert run.fault, "the request never came"
        COUNTS["faults injected"] += 1
        if "Retry-After" in run.fault.headers and result != "status 2":
            assert len(world.requests) == nth, "it did not wait"
            assert run.program.pause >= 7, "it did not wait for so long"
        run.come_back()
        assert scenario.step(run.program) == "success"
        world.check_state(goal.state)
        writes, asked = len(world.mail.writes), len(world.requests)
        assert scenario.step(run.program) == "success"
        assert len(world.mail.writes) == writes
        assert all(request.method not in ("PUT", "DELETE") for _, request in world.requests[asked:])
    COUNTS["survived"] += 1


def some(places: list[tuple[int, str]], name: str, style: str) -> list[tuple[int, str]]:
    """A place for each kind of fault, for half of the kinds on the first two servers, a quarter on
    the third and less on Radicale, which is slow: each kind comes at least once."""
    chance = random.Random(name)  # noqa: S311  (the same choice in each run)
    turn = list(SCENARIOS).index(name) + STYLES.index(style)
    part, of = {"stalwart": (1, 4), "radicale": (1, 8)}.get(style, (2, 4))
    picked = []
    for number, kind in enumerate(KINDS):
        of_kind = [place for place in places if place[1] == kind]
        if of_kind and (number + turn) % of < part:
            picked.append(chance.choice(of_kind))
    return picked


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("style", STYLES)
def test_a_fault_at_every_step(name: str, style: str, radicale: RadicaleServer, long: bool) -> None:
    run = undisturbed(name, style, radicale)
    places = run.places if long else some(run.places, name, style)
    # A real server takes its time: of a scenario of many requests a part is enough there.
    every = 3 if len(run.requests) > 40 and style == "radicale" and not long else 1
    wrong = []
    for nth, kind in places[::every]:
        try:
            survives(name, style, radicale, nth, kind)
        except AssertionError as error:
            wrong.append(f"{kind} at request {nth}: {error}")
    assert not wrong, "\n".join(wrong)
