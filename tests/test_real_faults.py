"""What may go wrong between the program and real servers: killed with SIGKILL at any request,
faults of a proxy on the way, and two programs at once. Contacts on Radicale with the mail on the
embedded server, and all of it on Cyrus (nox -s cyrus)."""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tools
from cyrus_server import CyrusServer
from fault_proxy import FaultProxy
from jmap_server import Fault, Request
from processes import STOP_SECONDS, wait_for
from radicale_server import RadicaleServer
from test_cyrus import Account
from test_faults import BOB, EVE, KINDS
from tools import COUNTS, settings_for
from worlds import Goal, Program, World, labels_in, seeded

from mailroom import CREATED_NOTE

# ------------------------------------------------------------------------------------- Radicale


def made(radicale: RadicaleServer) -> World:
    """Bob moves from Feed to Jail; four others are new."""
    seeded()
    world = World("radicale", radicale)
    mails = world.triaged(BOB, "Feed")
    world.account.label(mails[1], "@ToJail")
    for sender in (EVE, "ann@x.example", "dan@x.example"):
        world.tap(sender, "@ToBillboard")
    return world


def goal_of(radicale: RadicaleServer) -> tuple[Goal, list[Request]]:
    """Where it leads to, and by which requests."""
    with made(radicale) as world:
        assert Program(world.settings).cycle() == "success"
        assert world.groups()[BOB] == {"Jail", "Mailroom"}
        assert world.groups()[EVE] == {"Billboard", "Paper Trail", "Mailroom"}
        return world.end(), [request for _, request in world.requests]


def is_write(request: Request) -> bool:
    return request.method == "PUT" or any(name.endswith("/set") for name in request.methods)


@contextmanager
def process(world: World, output: Path) -> Iterator["subprocess.Popen[bytes]"]:
    names = ("carddav_url", "carddav_username", "carddav_password")
    given = {name: getattr(world.settings, name) for name in names}
    with tools.process(world.mail, output, **given, poll_interval=1) as started:
        yield started


def wait_until_done(world: World, *processes: "subprocess.Popen[bytes]") -> None:
    """Until something was asked and no label is left, and of several each has looked once more;
    then they are to stop."""
    start = len(world.requests)
    world.mail.wait_for(lambda: len(world.requests) > start, 30)
    world.mail.wait_for(lambda: not any(map(labels_in, world.boxes().values())), 30)
    goal = len(world.requests) + 2 * (len(processes) - 1)
    world.mail.wait_for(lambda: len(world.requests) >= goal, 30)
    for each in processes:
        each.terminate()
        assert each.wait(STOP_SECONDS) == 0


def test_sigkill_at_any_request(radicale: RadicaleServer, tmp_path: Path, long: bool) -> None:
    """By default after each that writes."""
    goal, requests = goal_of(radicale)
    for nth, request in enumerate(requests, 1):
        if not (long or is_write(request)):
            continue
        with made(radicale) as world, ExitStack() as stack:
            world.watch(goal)
            victim = stack.enter_context(process(world, tmp_path / "killed"))
            kill = Fault(after=victim.kill, drop=True, work=is_write(request))
            world.meet = lambda n, _: kill if n == nth else None  # noqa: B023
            assert victim.wait(30) < 0
            wait_until_done(world, stack.enter_context(process(world, tmp_path / "log")))
            world.check_state(goal.state)
            COUNTS["real processes killed"] += 1


def test_two_programs_at_once(radicale: RadicaleServer, tmp_path: Path) -> None:
    goal, _ = goal_of(radicale)
    with made(radicale) as world, ExitStack() as stack:
        world.watch(goal)
        outputs = [tmp_path / "one", tmp_path / "other"]
        both = [stack.enter_context(process(world, output)) for output in outputs]
        wait_until_done(world, *both)
        world.check_state(goal.state)
        COUNTS["real pairs of programs"] += 1


# ------------------------------------------------------------------------------------- Cyrus


class Desk:
    """An account on Cyrus, and a proxy before it."""

    def __init__(self, cyrus: CyrusServer) -> None:
        self.account = Account(cyrus)
        self.proxy = FaultProxy(cyrus.http_port)
        self.delivered: set[str] = set()
        urls = {"jmap_url": self.proxy.origin, "carddav_url": self.proxy.origin}
        self.settings = {**self.account.settings, **urls}

    def tap(self, sender: str, label: str, mails: int = 2) -> None:
        """Mails arrive, and the last one gets a label."""
        start = len(self.delivered)
        for n in range(start, start + mails):
            self.delivered.add(self.account.deliver(f"{sender} <{sender}>", f"{sender} {n}"))
        self.account.tap(f"{sender} {start + mails - 1}", label)

    def look(self) -> None:
        """What must hold at every moment."""
        where = self.account.where()
        assert where.keys() == self.delivered, "mails were lost"
        assert all(where.values())
        cards = self.account.book.seen().values()
        addresses = Counter(address for card in cards for address in card.emails)
        assert set(addresses.values()) <= {1}, "a second contact"

    def check_triaged(self, sender: str, category: str) -> None:
        """Filed where the last of its taps wants it, with the contact as it was made."""
        where = {mail: boxes for mail, boxes in self.account.where().items() if sender in mail}
        assert set(map(frozenset, where.values())) == {frozenset({category})}, where
        seen, groups = self.account.contacts()[sender]
        assert groups == {category, "Mailroom"}
        assert re.fullmatch(rf'{CREATED_NOTE} on \S+ as "{sender}"', seen.note)

    def is_done(self) -> bool:
        return not any(map(labels_in, self.account.where().values()))


@pytest.fixture
def desk(cyrus: CyrusServer) -> Iterator[Desk]:
    desk = Desk(cyrus)
    with desk.proxy:
        yield desk
        desk.look()
        assert desk.proxy.crashes == []


@contextmanager
def cyrus_process(desk: Desk, output: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with tools.process(desk.proxy, output, **desk.settings) as started:
        yield started


HTTP_KINDS = [kind for kind, make in KINDS.items() if "object" not in kind and "call" not in kind]
HTTP_KINDS = [kind for kind in HTTP_KINDS if kind not in ("connection refused", "stateMismatch")]


@pytest.mark.cyrus
def test_a_fault_at_any_request_to_cyrus(desk: Desk, long: bool) -> None:
    """A sender is new and may then be triaged again, with a fault each time: at any request, and
    then at any that writes."""
    given = {name: value for name, value in desk.settings.items() if not name.startswith("log")}
    settings = settings_for(desk.proxy, **given)

    def run(
        label: str, sender: str, kind: str, nth: int, counts: Callable[[Request], bool] = bool
    ) -> int:
        """The fault is met by the nth request of those that count. The number of requests until
        all is done."""
        desk.tap(sender, label)
        program, start = Program(settings), len(desk.proxy.requests)

        def meet(_: int, request: Request) -> Fault | None:
            number = sum(map(counts, desk.proxy.requests[start:]))
            return KINDS[kind](program, request) if counts(request) and number == nth else None

        desk.proxy.on_request = meet
        program.cycle()
        desk.proxy.on_request = None
        assert program.cycle() == "success"
        return len(desk.proxy.requests) - start

    most = run("@ToFeed", "first@x.example", "404", 1000)
    for number, kind in enumerate(HTTP_KINDS * (4 if long else 1)):
        sender = f"s{number}@x.example"
        run("@ToFeed", sender, kind, 1 + 5 * number % (most - 1))
        desk.check_triaged(sender, "Feed")
        COUNTS["faults on the way to Cyrus"] += 1
        if long or number % 2:
            run("@ToJail", sender, kind, 1 + number % 5, is_write)
            desk.check_triaged(sender, "Jail")
            COUNTS["faults on the way to Cyrus"] += 1


@pytest.mark.cyrus
def test_sigkill_at_any_request_to_cyrus(desk: Desk, tmp_path: Path, long: bool) -> None:
    """Killed at its second request, started again, killed at its fourth ... until it is done."""
    desk.tap("again@x.example", "@ToFeed")
    with cyrus_process(desk, tmp_path / "log"):
        wait_for(desk.is_done)
    desk.tap("again@x.example", "@ToJail")
    desk.tap("new@x.example", "@ToFeed")
    nth = 0
    while not desk.is_done():
        nth += 1 if long else 2
        with cyrus_process(desk, tmp_path / "killed") as victim:
            start, kill = len(desk.proxy.requests), Fault(after=victim.kill, drop=True, work=True)
            desk.proxy.on_request = lambda _, __: (
                kill if len(desk.proxy.requests) == start + nth else None  # noqa: B023
            )
            wait_for(lambda: victim.poll() is not None or desk.is_done())
        desk.proxy.on_request = None
        desk.look()
        assert desk.account.groups_of("again@x.example") & {"Feed", "Jail"}
        COUNTS["real processes killed"] += 1
    desk.check_triaged("again@x.example", "Jail")
    desk.check_triaged("new@x.example", "Feed")


@pytest.mark.cyrus
def test_two_programs_at_once_on_cyrus(desk: Desk, tmp_path: Path) -> None:
    for n in range(5):
        desk.tap(f"s{n}@x.example", "@ToFeed")
    with ExitStack() as stack:
        outputs = [tmp_path / "one", tmp_path / "other"]
        both = [stack.enter_context(cyrus_process(desk, output)) for output in outputs]
        wait_for(desk.is_done)
        for output in outputs:
            ended = output.read_text().count('"cycle done"')
            wait_for(lambda: output.read_text().count('"cycle done"') > ended)  # noqa: B023
        for each in both:
            each.terminate()
            assert each.wait(STOP_SECONDS) == 0
    for n in range(5):
        desk.check_triaged(f"s{n}@x.example", "Feed")
    COUNTS["real pairs of programs"] += 1
