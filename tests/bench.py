# ruff: noqa: E402  (everything has to be imported after the monkey patch)
"""How much Mailroom asks of the servers, and how small it is: `nox -s bench`. Each figure is held
against a limit: requests, which are the same on every machine, ratios within one run, and sizes.
When one is over, the status is 1. `--quick` does with less of everything.
"""

from gevent import monkey

monkey.patch_all()

import argparse
import gc
import logging
import random
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

from bench_tools import BenchError, Desk, Figure, address_book, deliver, fill_book, program, table
from books import CATEGORIES
from jmap_server import LIMITS, JMAPServer, Options, Request

import mailroom

Figures = Iterator[Figure]
LATENCY = 0.05  # seconds a request to the address book


def jmap_requests(desk: Desk, emails: int) -> Figures:
    """What a cycle asks the mail server. `emails`: how many the sender has who has many."""
    yield Figure("requests: idle", desk.cycle(), 1)
    one = desk.new_senders(1)
    yield Figure("requests: a new message of a stranger", desk.cycle(), 2)
    yield Figure("requests: a tap", desk.tap(one), 5)
    yield Figure("requests: the echo of it", desk.cycle(), 1)
    yield Figure("requests: re-triage", desk.tap(one, "@ToJail"), 6)
    senders = desk.new_senders(25, 4)
    yield Figure("requests: 25 new senders with four messages each", desk.tap(senders), 6)
    yield Figure("requests: re-triage of them", desk.tap(senders, "@ToJail"), 6)
    yield Figure("requests: 50 new senders", desk.tap(desk.new_senders(50)), 9)
    # One request more for each further page that is read and each further portion written.
    chunks = sum(-(-emails // LIMITS[name]) - 1 for name in ("maxObjectsInGet", "maxObjectsInSet"))
    sender = desk.new_senders(1, emails)
    what = f"requests: a sender with {emails:,} messages, {chunks} chunks"
    yield Figure(what, desk.tap(sender), 6 + chunks)


def carddav_requests(latency: float = LATENCY) -> Figures:
    """What 25 new senders ask of the address book, and whether it helps to write side by side."""
    asked, seconds = 0, []
    for at_once in (1, mailroom.WRITES_AT_ONCE):
        paced = mock.patch.object(mailroom, "WRITES_AT_ONCE", at_once)
        with paced, address_book(latency) as (_, proxy, book):
            desk = Desk(book.mail, **book.settings, triage_categories=[*CATEGORIES])
            senders, before = desk.new_senders(25, 4), len(proxy.requests)
            started = time.monotonic()
            desk.tap(senders)
            seconds.append(time.monotonic() - started)
            asked = len(proxy.requests) - before
    yield Figure("requests to the address book (CardDAV): 25 new senders", asked, 30)
    what = f"their time at {latency * 1000:.0f} ms each, to that with one write at a time"
    yield Figure(what, seconds[1] / seconds[0], 0.7)


def idle_memory() -> Figures:
    """What it occupies when it has nothing to do, and what it asks for a tap that push tells of."""
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server, program(server) as run:
        run.wait_for(lambda: server.streams)
        run.wait_until_quiet()
        yield Figure("memory: idle", run.memory("VmRSS"), 50, "MB")
        before = server.count("api")
        run.tap(1)
        what = "requests: a tap over push, until all is quiet"
        yield Figure(what, server.count("api") - before, 6)


def mirror_memory(contacts: int, photo: int = 0) -> Figures:
    """The most that it occupies with an address book on Radicale, which sends whole cards."""
    with address_book() as (radicale, _, book):
        fill_book(radicale, contacts, photo)
        with program(book.mail, **book.settings, triage_categories=[*CATEGORIES]) as run:
            run.wait_for(lambda: book.mail.streams)
            run.tap(4)
            pictures = f" with photos of {photo // 1000} kB each" if photo else ""
            what = f"memory: a tap with {contacts:,} contacts{pictures} (CardDAV)"
            yield Figure(what, run.memory("VmHWM"), 100, "MB")


def many_labels(emails: int, senders: int) -> Figures:
    """Somebody has labelled everything: it goes on and on, but another tap does not wait for it."""
    left: list[int] = []  # under the label, at each request
    left_at_cycles: list[int] = []  # at each that begins a cycle

    def note(_: int, request: Request) -> None:
        left.append(len(box.mails))
        if {"Mailbox/get", "Email/query"} <= {*request.methods}:
            left_at_cycles.append(len(box.mails))

    with JMAPServer.with_mailroom_account(Options.fastmail(history=1000)) as server:
        order = [f"s{n % senders}" for n in range(emails)]
        random.Random(1).shuffle(order)  # noqa: S311  (no secret)
        for sender in order:
            deliver(server, sender, 1, "@ToFeed")
        gc.freeze()  # or this server takes twice as long, for looking through all of that again
        box = server.account.mailboxes[server.account.mailbox_id("@ToFeed")]
        server.on_request = note
        with program(server) as run:
            run.wait_for(lambda: len(box.mails) < 0.9 * emails)
            other, begun = deliver(server, "other", 1), len(left_at_cycles)
            server.account.label(*other, "@ToJail")
            run.wait_for(lambda: not server.account.mails_in("@ToJail"))
            cycles = len(left_at_cycles) - begun
            run.wait_for(lambda: not box.mails)
            run.wait_until_quiet()
            what = f"memory: {emails:,} labelled messages of {senders:,} senders"
            yield Figure(what, run.memory("VmHWM"), 128, "MB")
            failed = len(run.run.logged("^cycle failed$"))
    steps = [before - after for before, after in pairwise(left_at_cycles) if before]
    yield Figure("cycles that filed nothing of that", steps.count(0), 0)
    half = sum(number > left[0] / 2 for number in left)
    what = "requests for the second half of that, to those for the first"
    yield Figure(what, (len(left) - half) / half, 1.5)
    yield Figure("cycles that failed or met their deadline", failed, 0)
    yield Figure("cycles begun until another tap meanwhile is done", cycles, 3)


def measured(quick: bool) -> Figures:
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        yield from jmap_requests(Desk(server), 10_000)
    yield from carddav_requests()
    yield from idle_memory()
    yield from mirror_memory(2_000 if quick else 10_000)
    if not quick:
        yield from mirror_memory(1_000, photo=100_000)
    yield from many_labels(*(20_000, 500) if quick else (200_000, 5_000))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status: 1 when a figure is over its limit."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Measure Mailroom.")
    parser.add_argument("--quick", action="store_true", help="with less of everything")
    quick, started, figures = parser.parse_args(arguments).quick, time.monotonic(), []
    try:
        for figure in measured(quick):
            figures.append(figure)
            print(f"{time.monotonic() - started:4.0f} s  {' | '.join(figure.row)}", file=sys.stderr)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(table(figures))
    over = sum(figure.is_over for figure in figures)
    print(f"\n{len(figures)} figures in {time.monotonic() - started:.0f} seconds, {over} over")
    return int(over > 0)


if __name__ == "__main__":
    logging.disable()
    sys.exit(main())
