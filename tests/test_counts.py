"""What the benchmark counts stays within its limits, and the benchmark can tell when it does not.
Times are not looked at here: `nox -s bench`."""

import json
from pathlib import Path

import bench
import pytest
from bench import (
    FULL,
    SECTIONS,
    Scale,
    cycles_per_flood,
    cycles_per_tap,
    jmap_desk,
    requests_per_cycle,
)
from bench_tools import (
    Desk,
    Figure,
    Work,
    add_contacts,
    add_mailboxes,
    add_strangers,
    add_triaged,
    order_of_growth,
    quick_radicale,
    table,
)
from jmap_server import JMAPServer, Options
from tools import SERVERS, running

import mailroom

SMALL = FULL._replace(mails_of_sender=4_500, cards=64, steps=(4, 1))


def held(figures: list[Figure]) -> None:
    assert [figure.row for figure in figures if not figure.holds] == []


@pytest.mark.parametrize("manner", SERVERS)
def test_requests_of_a_cycle(manner: str) -> None:
    """On a server without a search index two further searches are made in vain."""
    with JMAPServer.with_mailroom_account(SERVERS[manner]()) as server:
        figures = list(requests_per_cycle(jmap_desk(server), manner, SMALL.mails_of_sender))
    more = 1 if manner == "cyrus" else 0
    assert [figure.row for figure in figures if figure.value > figure.limit + more] == []
    assert len(figures) == 12


def test_requests_of_a_cycle_over_carddav() -> None:
    with quick_radicale() as radicale, bench.carddav_desk(radicale, 0) as desk:
        figures = list(requests_per_cycle(desk, "CardDAV", SMALL.mails_of_sender))
    held(figures)
    assert len(figures) == 23


def test_a_tap_over_carddav_costs_the_same_in_any_address_book() -> None:
    held(list(bench.carddav_growth(SMALL)))


def test_a_tap_is_a_cycle_and_a_flood_of_events_is_one() -> None:
    with (
        JMAPServer.with_mailroom_account(Options.fastmail()) as server,
        running(server, poll_interval=86400, debounce_seconds=0.02, log_level="error") as run,
    ):
        server.wait_for(lambda: server.streams and run.cycles)
        # News of an own write that comes late may count as news: a cycle too many, seldom.
        assert 1 <= cycles_per_tap(server, lambda: run.triggers["push"], 20).value <= 1.1
        run.settings.debounce_seconds = 1
        held([cycles_per_flood(server, lambda: run.triggers["push"], 2_000)])


def test_idle_polls_and_the_stream_keep_their_connections() -> None:
    options = Options.fastmail(pings=True, ping_pace=0.01)
    with (
        JMAPServer.with_mailroom_account(options) as server,
        running(server, poll_interval=0.02) as run,
    ):
        run.wait_for_cycles(20)
        assert (server.connections, server.streams.opened) == (2, 1)


@pytest.mark.parametrize("add", [add_contacts, add_triaged, add_mailboxes, add_strangers])
def test_a_tap_costs_the_same_in_any_account(add: bench.Filler) -> None:
    """Requests and bytes, and those of an idle cycle."""
    small, large = (costs(add, size) for size in (100, 1600))
    for one, other in zip(small, large, strict=True):
        assert one[:2] == other[:2]
        assert other.octets < 1.05 * one.octets


def costs(add: bench.Filler, size: int) -> tuple[Work, Work]:
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        add(server, size)
        desk = Desk(server)
        return desk.tap(desk.new_senders(1, 4)), desk.cycle()


# The benchmark itself


def figures_of(*values: tuple[str, float]) -> list[Figure]:
    return [Figure(kind, "a section", f"{kind} {n}", n, 5) for kind, n in values]


def test_the_order_of_growth_is_found() -> None:
    for order in (0, 0.5, 1, 2):
        points = {n: 7.0 * n**order for n in (10, 40, 160)}
        assert order_of_growth(points) == pytest.approx(order)


def test_the_table_has_counts_first_and_says_what_is_beyond() -> None:
    lines = table(figures_of(("time", 9), ("ratio", 1), ("count", 6), ("count", 5))).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0] for row in rows if row[0].startswith("**")] == [
        "**Counts**",
        "**Ratios**",
        "**Times**",
    ]
    assert [row[3] for row in rows if row[3]] == ["FAIL", "pass", "pass", "over"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(("kind", "status"), [("count", 1), ("time", 0), ("size", 0)])
def test_only_a_count_beyond_its_limit_is_a_failure(
    kind: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures.json"

    def section(_: Scale) -> bench.Figures:
        yield from figures_of((kind, 6), ("count", 5))

    monkeypatch.setattr(bench, "SECTIONS", dict.fromkeys([*SECTIONS][:1], section))
    assert bench.main(["--quick", "--json", str(file)]) == status
    told = json.loads(file.read_text())
    assert [(each["value"], each["limit"]) for each in told["figures"]] == [(6, 5), (5, 5)]


def test_a_request_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each portion were a request of its own."""
    monkeypatch.setattr(mailroom, "SENDERS_AT_ONCE", 5)
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        figures = list(requests_per_cycle(jmap_desk(server), "JMAP", 10))
    assert sum(figure.verdict == "FAIL" for figure in figures) == 2
