"""What the benchmark counts stays within its limits; sizes and times are for `nox -s bench`."""

import bench
import pytest
from bench_tools import BenchError, Desk, Figure
from jmap_server import JMAPServer, Options
from tools import SERVERS, running

import mailroom


@pytest.mark.parametrize("manner", SERVERS)
def test_requests_of_a_cycle(manner: str) -> None:
    """On a server without a search index one more search is made in vain."""
    with JMAPServer.with_mailroom_account(SERVERS[manner]()) as server:
        figures = [*bench.jmap_requests(Desk(server), 4_500)]
    assert len(figures) == 9
    assert [each for each in figures if each.value > each.limit + (manner == "cyrus")] == []


def test_requests_to_an_address_book() -> None:
    [requests, _] = bench.carddav_requests(latency=0)
    assert not requests.is_over


def test_a_tap_costs_the_same_in_any_account() -> None:
    costs = []
    for size in (10, 1000):
        with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
            for n in range(size):
                server.account.add_contact(f"c{n}@friends.example", f"Contact {n}")
                server.account.deliver(f"m{n // 5}@strangers.example", ["Screener"])
                server.account.add_mailbox(f"Folder {n}")
            desk = Desk(server)
            costs.append((desk.tap(desk.new_senders(1, 4)), desk.cycle()))
    assert costs[0] == costs[1] == (5, 1)


def test_a_flood_of_events_is_one_cycle_and_the_stream_is_kept() -> None:
    with (
        JMAPServer.with_mailroom_account(Options.fastmail(pings=True, ping_pace=0.01)) as server,
        running(server, poll_interval=86400, debounce_seconds=1, log_level="error") as run,
    ):
        server.wait_for(lambda: server.streams)
        run.wait_until_quiet()
        server.options.coalesce, before = False, run.triggers["push"]
        email = server.account.deliver("Bob <bob@shop.example>", ["Archive"])
        for n in range(2_000):
            server.account.mark(email, f"word{n}")
        run.wait_until_quiet()
        assert 1 <= run.triggers["push"] - before <= 2
        assert server.streams.opened == 1


@pytest.mark.parametrize(("value", "status"), [(5, 0), (6, 1), (None, 1)])
def test_the_status_tells_whether_a_figure_is_over(
    value: float | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(quick: bool) -> bench.Figures:
        assert quick
        if value is None:
            raise BenchError("not done")
        yield Figure("a figure", value, 5)

    monkeypatch.setattr(bench, "measured", measured)
    assert bench.main(["--quick"]) == status


def test_a_request_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each portion were a request of its own."""
    monkeypatch.setattr(mailroom, "SENDERS_AT_ONCE", 5)
    with JMAPServer.with_mailroom_account(Options.fastmail()) as server:
        assert sum(figure.is_over for figure in bench.jmap_requests(Desk(server), 10)) == 3
