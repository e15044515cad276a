"""A link that has gone dead without a word (NAT, a laptop that slept): from then on every packet of
the connections that stand is lost, and new ones work. As root, in a network of its own."""

import mailroom  # noqa: F401, I001  (its import is the monkey patch)

import os
import re
import sys
import time

import pytest
from container_tools import do
from jmap_server import JMAPServer, Options
from tools import COUNTS, running

DEBOUNCE, SECONDS = 3, 20


def main() -> None:
    """Print how many seconds it takes from a tap to filed; neither timer nor pings help."""
    with (
        JMAPServer.with_mailroom_account(Options.fastmail()) as server,
        running(server, poll_interval=600, debounce_seconds=DEBOUNCE) as run,
    ):
        server.wait_for(lambda: server.streams)
        run.wait_until_quiet()
        standing = ["ss", "-tnH", "state", "established", "dport", f":{server.port}"]
        ports = re.findall(r":(\d+) +\S+:\d+", do(*standing))
        for port, end in [(port, end) for port in ports for end in ("--sport", "--dport")]:
            do("iptables", "-A", "INPUT", "-p", "tcp", end, port, "-j", "DROP")
        tapped = server.account.deliver("Bob <bob@shop.example>", ["Screener", "@ToFeed"])
        begun = time.monotonic()
        server.wait_for(lambda: server.account.mailboxes_of(tapped) == {"Feed"}, 100)
        print(time.monotonic() - begun)


@pytest.mark.container
def test_it_costs_a_tap_seconds() -> None:
    itself = f"ip link set lo up && exec {sys.executable} -m {__name__}"
    path = f"PYTHONPATH={os.pathsep.join(sys.path)}"
    took = float(do("env", path, "unshare", "-n", "sh", "-c", itself))
    COUNTS["ms from a tap to filed after a dead link"] = int(took * 1000)
    assert DEBOUNCE < took < SECONDS + DEBOUNCE


if __name__ == "__main__":
    main()
