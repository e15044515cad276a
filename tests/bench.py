# ruff: noqa: E402  (everything has to be imported after the monkey patch)
"""How fast and how small Mailroom is: `nox -s bench`.

Mailroom runs as a process of its own beside the embedded server, which is in this one (what is
only counted, runs here with it). Each figure is held against a limit: counts first, which are the
same on every machine, then ratios within the run, then sizes and times. When a count is beyond its
limit the status is 1; the others are told as `over`, since the machine may be to blame.

`--quick` does with less of everything, `--json FILE` writes the figures too.
"""

from gevent import monkey

monkey.patch_all()

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gevent
from bench_tools import (
    PATIENCE,
    BenchError,
    Desk,
    Figure,
    add_contacts,
    add_mailboxes,
    add_strangers,
    add_triaged,
    as_json,
    deliver,
    fill_address_book,
    import_seconds,
    machine,
    order_of_growth,
    program,
    quick_radicale,
    start_seconds,
    table,
    tap,
    tls_server,
    tomorrow,
)
from books import CATEGORIES, GROUPS, radicale_book
from gevent.event import Event
from jmap_server import LIMITS, JMAPServer, Options
from radicale_server import RadicaleServer

from mailroom import MANY_MEMBERS


class Scale(NamedTuple):
    """How much is measured."""

    polls: int = 60
    taps: int = 200
    taps_per_delay: int = 6
    taps_by_poll: int = 2
    starts: int = 5
    events: int = 10_000
    mails: int = 100_000
    contacts: int = 10_000
    cards: int = 10_000
    mails_of_sender: int = 10_000
    steps: tuple[int, ...] = (64, 16, 4, 1)
    """Which parts of the largest size of an account are looked at."""

    def sizes(self, largest: int) -> list[int]:
        return [largest // step for step in self.steps]


FULL = Scale()
QUICK = Scale(
    polls=5, taps=15, taps_per_delay=2, taps_by_poll=1, starts=3,
    mails=20_000, contacts=2_000, cards=128, steps=(64, 1),
)  # fmt: skip

Figures = Iterator[Figure]
Filler = Callable[[JMAPServer, int], None]


# ------------------------------------------------------------------------------------ requests


def forced_chunks(mails: int) -> int:
    """The further requests that the server's limits force: pages to read, portions to write."""
    pages, portions = -(-mails // LIMITS["maxObjectsInGet"]), -(-mails // LIMITS["maxObjectsInSet"])
    return pages + portions - 2


def requests_of_tap(
    desk: Desk, store: str, what: str, most: int, mails: list[str], label: str = "@ToFeed",
    senders: int = 1, groups: int = 2,
) -> Figures:  # fmt: skip
    """What the cycle after a tap asks. Groups are touched when they are looked at: a new sender
    joins Feed and Mailroom, a triaged one leaves Feed for Jail."""
    work = desk.tap(mails, label)
    yield Figure("count", "requests", f"{store}, {what}", work.mail, most)
    if work.contacts:
        most = 2 * senders + 2 * groups
        yield Figure("count", "requests", f"{store} contacts, {what}", work.contacts, most)


def requests_for_users_contact(desk: Desk, store: str) -> Figures:
    """What is asked for a sender whom the user had as a contact before, at the first tap and when
    Mailroom no longer remembers that."""
    figures, mails = partial(requests_of_tap, desk, store), desk.known_sender()
    yield from figures("a contact of the user's", 6, mails, groups=1)
    yield from figures("re-triage of that contact", 6, mails, "@ToJail")
    desk.restart()
    yield from figures("its re-triage after a start", 6, mails)


def requests_per_cycle(desk: Desk, store: str, mails_of_sender: int) -> Figures:
    """What a cycle asks, by kind of work. `store`: where the contacts are."""
    figures = partial(requests_of_tap, desk, store)
    yield Figure("count", "requests", f"{store}, idle", sum(desk.cycle()[:2]), 1)
    for what, senders, mails, most in (
        ("one new sender", 1, 1, 5),
        ("25 new senders with four mails each", 25, 4, 6),
        ("50 new senders", 50, 1, 9),
        ("a sender with 100 mails", 1, 100, 6),
    ):
        tapped = desk.new_senders(senders, mails)
        yield from figures(what, most, tapped, senders=senders)
    yield from figures("re-triage of those 100", 6, tapped, "@ToJail")
    with tomorrow():
        yield from figures("the same label, the next day", 6, tapped, "@ToJail", groups=1)
    desk.restart()
    yield from figures("re-triage, the first after a start", 6, tapped, "@ToFeed")
    yield from requests_for_users_contact(desk, store)
    most = 6 + forced_chunks(mails_of_sender)
    tapped = desk.new_senders(1, mails_of_sender)
    yield from figures(f"a sender with {mails_of_sender:,} mails", most, tapped)


def all_requests(scale: Scale) -> Figures:
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        yield from requests_per_cycle(jmap_desk(server), "JMAP", scale.mails_of_sender)
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        add_triaged(server, MANY_MEMBERS + 1)
        yield from requests_for_users_contact(jmap_desk(server), "JMAP, large groups")
    with quick_radicale() as radicale, carddav_desk(radicale, 0) as desk:
        yield from requests_per_cycle(desk, "CardDAV", scale.mails_of_sender)


def jmap_desk(server: JMAPServer) -> Desk:
    return Desk(server, lambda address: server.account.add_contact(address, "Friend"))


@contextmanager
def carddav_desk(radicale: RadicaleServer, contacts: int) -> Iterator[Desk]:
    """An account whose contacts are on Radicale, in an address book with so many others."""
    book = radicale_book(radicale)
    for group in GROUPS:
        book.add_group(group)
    fill_address_book(radicale, contacts)
    with book.mail:
        yield Desk(book.mail, book.add, triage_categories=[*CATEGORIES], **book.settings)


# ------------------------------------------------------------------------------- cycles for taps


def cycles_per_tap(server: JMAPServer, cycles: Callable[[], int], taps: int) -> Figure:
    """Taps at random moments, each after the cycle of the one before has read: some while it still
    runs, some after. So each needs a cycle of its own. `cycles`: how many push has triggered."""
    chance = random.Random(1)  # noqa: S311  (no secret)
    server.options.latency = 0.005
    mails = [deliver(server, f"tapped{n}", 1)[0] for n in range(taps)]
    planning = Event()
    server.on_request = lambda _, request: (
        planning.set() if "ContactCard/query" in request.methods else None
    )
    gevent.sleep(1)
    before, meanwhile = cycles(), 0
    for mail in mails:
        planning.clear()
        meanwhile += server.requests[-1].status is None
        server.account.label(mail, "@ToFeed")
        if not planning.wait(PATIENCE):
            raise BenchError("a tap is lost")
        gevent.sleep(chance.uniform(0, 0.15))
    server.wait_for(lambda: not server.account.mails_in("@ToFeed"), PATIENCE)
    gevent.sleep(1)
    server.options.latency = 0
    note = f"{taps} taps, {meanwhile} while a cycle ran"
    return Figure("count", "cycles", "for each tap", (cycles() - before) / taps, 1.0, "", note)


def cycles_per_flood(server: JMAPServer, cycles: Callable[[], int], events: int) -> Figure:
    """Changes that are an event each and all come within one window."""
    [mail] = deliver(server, "busy", 1, box="Archive")
    before = cycles()
    server.options.coalesce = False
    for n in range(events):
        server.account.mark(mail, f"word{n}")
    server.wait_for(lambda: cycles() > before, 60)
    gevent.sleep(1)
    what = f"for {events:,} events in one window"
    return Figure("count", "cycles", what, cycles() - before, 2)


def all_cycles(scale: Scale) -> Figures:
    with (
        JMAPServer.with_mailroom_account(Options.fastmail()) as server,
        program(server, debounce_seconds=0.03) as run,
    ):
        yield cycles_per_tap(server, lambda: run.cycles("push"), scale.taps)


# --------------------------------------------------------------------------------- tap to filed

DELAYS = (0.0, 0.02, 0.05, 0.1)
ROUND_TRIPS, OWN_SECONDS = 7, 0.05
DEBOUNCE = 0.3  # in place of the 3 seconds of the default


def tap_figures(section: str, delay: float, seconds: list[float]) -> Figures:
    """The time of a tap, and what it is in round trips: the median, since others may be busy."""
    middle = statistics.median(seconds)
    what = f"{delay * 1000:.0f} ms of network delay"
    if delay:
        most = ROUND_TRIPS + OWN_SECONDS / delay
        yield Figure("ratio", section, what, middle / delay, most, "round trips")
    most = 1000 * (ROUND_TRIPS * delay + OWN_SECONDS)
    note = f"the slowest {1000 * max(seconds):.0f}"
    yield Figure("time", section, what, 1000 * middle, most, "ms", note)


def taps_over_push(scale: Scale, debounce: float) -> Figures:
    """From the tap until the label is off, beyond the debounce time. An event takes half a round
    trip, a request and its answer a whole one."""
    section = f"tap to filed, debounce {debounce:g} s"
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        mails = deliver_for(server, scale.taps_per_delay * len(DELAYS))
        with program(server, debounce_seconds=debounce) as run:
            tap(server, deliver(server, "first", 1))
            for delay in DELAYS:
                server.options.latency, server.options.push_delay = delay, delay / 2
                seconds = []
                for _ in range(scale.taps_per_delay):
                    # What Mailroom hears of its own writes opens a window too.
                    run.wait_until_quiet(debounce + 2 * delay + 0.1)
                    seconds.append(tap(server, [next(mails)]) - debounce)
                yield from tap_figures(section, delay, seconds)


def taps_without_push(scale: Scale) -> Figures:
    """The same, beyond the poll interval of 1 second: each tap comes right after a poll."""
    with JMAPServer.with_mailroom_account(Options.fastmail(push=None)) as server:
        mails = deliver_for(server, scale.taps_by_poll * len(DELAYS))
        with program(server, poll_interval=1):
            # The end of its cycle is where the next poll counts from, and so on.
            tap(server, deliver(server, "first", 1))
            for delay in DELAYS:
                server.options.latency = delay
                seconds = []
                for _ in range(scale.taps_by_poll):
                    server.wait_for(lambda: server.requests[-1].status, PATIENCE)
                    seconds.append(tap(server, [next(mails)]) - 1)
                yield from tap_figures("tap to filed, push down", delay, seconds)


def deliver_for(server: JMAPServer, taps: int) -> Iterator[str]:
    """A mail of another sender for each tap."""
    return iter([deliver(server, f"tapped{n}", 1)[0] for n in range(taps)])


# --------------------------------------------------------------------- an idle hour; connections


def idle_hour(scale: Scale) -> Figures:
    """As many polls and pings as in an hour, over TLS, a second in place of a minute."""
    options = Options.fastmail(pings=True, ping_pace=0.5)
    note = f"{scale.polls} polls, a second apart"
    with tls_server(options) as server, program(server, poll_interval=1) as run:
        polls, cpu = server.count("api"), run.cpu
        server.wait_for(lambda: server.count("api") >= polls + scale.polls, 3 * scale.polls)
        used = (run.cpu - cpu) * 60 / scale.polls
        what = "over TLS, each one handshake; one for requests, one for the stream"
        yield Figure("count", "connections", what, server.connections, 2, note=note)
        yield Figure("time", "processor time", "an idle hour, over TLS", used, 1, "s", note)


# ------------------------------------------------------------------------------ memory, the start


def memory(scale: Scale) -> Figures:
    """One process through it all: idle, after many events, at work in a large account, idle."""
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        large = f"a sender with {scale.mails_of_sender:,} of {scale.mails:,} mails"
        large += f", {scale.contacts:,} contacts"
        add_contacts(server, scale.contacts)
        add_strangers(server, (scale.mails - scale.mails_of_sender) // 2)
        deliver(server, "archived", (scale.mails - scale.mails_of_sender) // 2, box="Archive")
        mails = deliver(server, "prolific", scale.mails_of_sender)
        with program(server, debounce_seconds=2) as run:
            idle = run.rss
            yield Figure("size", "memory", "idle", idle, 45, "MB")
            yield cycles_per_flood(server, lambda: run.cycles("push"), scale.events)
            what = f"after {scale.events:,} events"
            yield Figure("size", "memory", what, run.rss, 45, "MB")
            run.forget_peak()
            cpu = run.cpu
            tap(server, mails[:1])
            yield Figure("size", "memory", f"at most, triaging {large}", run.peak, 100, "MB")
            run.wait_until_quiet(1)
            yield Figure("size", "memory", "after that, more than idle", run.rss - idle, 10, "MB")
            what = f"triaging a sender with {scale.mails_of_sender:,} mails"
            yield Figure("time", "processor time", what, run.cpu - cpu, 3, "s")


def memory_over_carddav(scale: Scale) -> Figures:
    """The same of a process that knows a large address book, all of it in two groups; and how it
    grows with that."""
    peaks = {}
    with quick_radicale() as radicale:
        for size in sorted({min(scale.sizes(scale.cards)), scale.cards}):
            book = radicale_book(radicale)
            uids = fill_address_book(radicale, size)
            for group in GROUPS:
                book.add_group(group, *(uids if group in ("Feed", "Mailroom") else ()))
            given = {**book.settings, "triage_categories": json.dumps(CATEGORIES)}
            with book.mail, program(book.mail, debounce_seconds=0.05, **given) as run:
                idle, reading = run.rss, run.peak
                run.forget_peak()
                for mail in deliver_for(book.mail, 3):
                    tap(book.mail, [mail])
                peaks[size] = run.peak
                run.wait_until_quiet(1)
                left = run.rss - idle
    large = f"{scale.cards:,} contacts over CardDAV"
    note = f"idle: {idle:.0f} MB"
    yield Figure("size", "memory", f"at most, listing {large}", reading, 100, "MB", note)
    yield Figure("size", "memory", f"at most, triaging, {large}", peaks[scale.cards], 100, "MB")
    yield Figure("size", "memory", f"after that, more than idle, {large}", left, 10, "MB")
    yield order_figure("ratio", "memory", "contacts over CardDAV", peaks, CONSTANT[3])


def start(scale: Scale) -> Figures:
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        seconds = [start_seconds(server) for _ in range(scale.starts)]
    middle = statistics.median(seconds)
    imports = statistics.median(import_seconds() for _ in range(scale.starts))
    yield Figure("time", "start", "from exec to the first request", middle, 0.8, "s")
    yield Figure("time", "start", "imports, as a part of that", imports, 0.5, "s")


def work_per_sender() -> Figures:
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        mails = [deliver(server, f"sender{n}", 4)[0] for n in range(70)]
        with program(server, debounce_seconds=0.05) as run:
            cpu = run.cpu
            tap(server, mails[:50])
            at_once = (run.cpu - cpu) / 50
            cpu = run.cpu
            for mail in mails[50:]:
                tap(server, [mail])
            singly = (run.cpu - cpu) / len(mails[50:])
    yield Figure("time", "processor time", "a sender, of 50 at once", 1000 * at_once, 5, "ms")
    yield Figure("time", "processor time", "a sender, each alone", 1000 * singly, 50, "ms")


# --------------------------------------------------------------------------------- how it grows


class Dimension(NamedTuple):
    """What may be many. `fill` puts so many into an account; `orders`: the most that requests,
    bytes, time and memory may grow with it."""

    name: str
    largest: int
    fill: Callable[[JMAPServer, int], list[str]]
    orders: tuple[float, float, float, float]


def some_senders(server: JMAPServer, number: int) -> list[str]:
    return [deliver(server, f"sender{n}", 4)[0] for n in range(number)]


def mails_of_one(server: JMAPServer, number: int) -> list[str]:
    return deliver(server, "prolific", number)[:1]


def beside(add: Filler) -> Callable[[JMAPServer, int], list[str]]:
    """One new sender with four mails, in an account with much else in it."""

    def fill(server: JMAPServer, number: int) -> list[str]:
        add(server, number)
        return deliver(server, "one", 4)[:1]

    return fill


CONSTANT, LINEAR = (0.02, 0.02, 0.2, 0.1), (1.0, 1.05, 1.2, 0.2)
DIMENSIONS = (
    Dimension("new senders", 512, some_senders, LINEAR),
    Dimension("mails of the sender", 10_000, mails_of_one, LINEAR),
    Dimension("contacts", 10_000, beside(add_contacts), CONSTANT),
    Dimension("members of two groups", 10_000, beside(add_triaged), CONSTANT),
    Dimension("mailboxes", 1_000, beside(add_mailboxes), CONSTANT),
    Dimension("mails in the Screener", 50_000, beside(add_strangers), CONSTANT),
)
KINDS_OF_GROWTH = {"requests": "count", "bytes": "count", "time": "ratio", "memory": "ratio"}


def growth_point(fill: Callable[[JMAPServer, int], list[str]], size: int) -> tuple[float, ...]:
    """(requests, bytes, milliseconds from tap to filed without those that the server itself took,
    MB at most) in an account of this size."""
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        mails = fill(server, size)
        with program(server, debounce_seconds=0.05) as run:
            begun = len(server.requests)
            run.forget_peak()
            seconds = tap(server, mails) - 0.05
            server.wait_for(lambda: server.requests[-1].status, PATIENCE)
            asked = server.requests[begun:]
            octets = sum(request.size + request.answered for request in asked)
            seconds -= sum(request.worked for request in asked)
            return len(asked), octets, 1000 * seconds, run.peak


def growth(scale: Scale) -> Figures:
    for dimension in DIMENSIONS:
        sizes = scale.sizes(dimension.largest)
        points = [growth_point(dimension.fill, size) for size in sizes]
        for n, (name, kind) in enumerate(KINDS_OF_GROWTH.items()):
            values = {size: point[n] for size, point in zip(sizes, points, strict=True)}
            yield order_figure(kind, name, dimension.name, values, dimension.orders[n])


def order_figure(
    kind: str, name: str, dimension: str, values: dict[int, float], most: float
) -> Figure:
    (least, first), *_, (largest, last) = values.items()
    note = f"{first:,.0f} to {last:,.0f}"
    what = f"{least:,} to {largest:,} {dimension}"
    return Figure(kind, f"growth of {name}", what, order_of_growth(values), most, "", note)


def carddav_growth(scale: Scale) -> Figures:
    """What a tap asks over CardDAV, in an address book with many others; it was read before."""
    work = {}
    with quick_radicale() as radicale:
        for size in scale.sizes(scale.cards):
            with carddav_desk(radicale, size) as desk:
                desk.tap(desk.new_senders(1, 4))
                work[size] = desk.tap(desk.new_senders(1, 4))
    asked = {size: float(each.mail + each.contacts) for size, each in work.items()}
    octets = {size: float(each.octets) for size, each in work.items()}
    for name, values in (("requests", asked), ("bytes", octets)):
        yield order_figure("count", name, "contacts over CardDAV", values, 0.02)


# -------------------------------------------------------------------------------------- the command

SECTIONS: dict[str, Callable[[Scale], Figures]] = {
    "requests": all_requests,
    "cycles": all_cycles,
    "tap": lambda scale: taps_over_push(scale, DEBOUNCE),
    "tap at once": lambda scale: taps_over_push(scale, 0),
    "tap without push": taps_without_push,
    "idle": idle_hour,
    "memory": memory,
    "memory over CardDAV": memory_over_carddav,
    "start": start,
    "senders": lambda _: work_per_sender(),
    "growth": growth,
    "growth over CardDAV": carddav_growth,
}


def measured(scale: Scale, only: str) -> Figures:
    """All figures, told about as they are measured."""
    for name, section in SECTIONS.items():
        if only and only != name:
            continue
        started = time.monotonic()
        yield from section(scale)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status: 0, 1 when a count is beyond its limit."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Measure Mailroom.")
    parser.add_argument("--quick", action="store_true", help="with less of everything")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    parser.add_argument("--only", choices=SECTIONS, default="", help="this part alone")
    given = parser.parse_args(arguments)
    scale = QUICK if given.quick else FULL
    started = time.monotonic()
    try:
        figures = list(measured(scale, given.only))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    verdicts = Counter(figure.verdict for figure in figures)
    print(f"{table(figures)}\n\nOn {machine()}, in {seconds:.0f} seconds: ", end="")
    print(", ".join(f"{number} {verdict}" for verdict, number in verdicts.items()))
    if given.json:
        given.json.write_text(as_json(figures, machine=machine(), quick=given.quick))
    return int("FAIL" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
