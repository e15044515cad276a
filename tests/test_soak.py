"""A week in half a minute (with `--long` in some minutes): the program against an account that is
never at rest and a server that often fails. At the end it holds what it held at the start, and each
tap was carried out exactly once."""

import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

import gevent
from jmap_server import JSON, Fault, JMAPServer, Options
from tools import COUNTS, PROGRAM, check_account, memory, process, stopped

import mailroom

# The program with seconds that are hundredths; a signal makes it say how many greenlets it has.
SCALED = f"""
import gc, signal, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import mailroom, gevent

def tell(*_):
    gc.collect()
    alive = [g for g in gc.get_objects() if type(g) is gevent.Greenlet and not g.dead]
    print("greenlets:", len(alive), file=sys.stderr, flush=True)

signal.signal(signal.SIGUSR1, tell)
mailroom.FIRST_DELAY, mailroom.MAX_DELAY = 0.01, 0.1
sys.exit(mailroom.main([]))
"""
SENDERS = [f"s{n}@x.example" for n in range(80)]
STATE = b'event: state\ndata: {"changed": {"u1": {"Email": "%d"}}}\n\n'
PING = b'event: ping\ndata: {"interval": 30}\n\n'
SERVER_FAIL = {name: {"type": "serverFail"} for name in ("Email/query", "ContactCard/set")}
CATEGORIES = mailroom.MailroomSettings(jmap_token="none").triage_categories


class Week:
    """An account in use: taps, events, streams that end, and faults of the server, at random."""

    def __init__(self, server: JMAPServer) -> None:
        self.counts = Counter(taps=0, events=0, reconnects=0, faults=0)
        self.removed: set[str] = set()
        self.untapped: Counter[str] = Counter()
        """How often Mailroom took a triage label off each mail."""
        self._server, self._account = server, server.account
        self._random = Random(7)  # noqa: S311  (a course of events, not a secret)
        self._pending: dict[str, tuple[str, mailroom.Category]] = {}
        self._filed: dict[str, tuple[str, mailroom.Category]] = {}
        emails = server.kinds["Email"]
        self._update = emails.update
        # It is only looked at.
        emails.update = self._watched

    def _watched(self, mail: str, patch: JSON) -> None:
        before = self._account.mailboxes_of(mail)
        self._update(mail, patch)
        gone = before - self._account.mailboxes_of(mail)
        self.untapped[mail] += len(gone & {category.label for category in CATEGORIES})

    def go_on(self, taps: int, seconds: float) -> None:
        """Lets things happen until there were so many taps, or for so long; then all is filed."""
        goal, end = self.counts["taps"] + taps, time.monotonic() + seconds
        happenings = [self.tap] * 12 + [self.events] * 3 + [self.end_streams] * 2 + [self.fail]
        while self.counts["taps"] < goal and time.monotonic() < end:
            self._random.choice(happenings)()
            gevent.sleep(0.005)
            self.settle(40)
        self._server.faults.clear()
        self.settle(0)

    def tap(self) -> None:
        sender = self._random.choice([each for each in SENDERS if each not in self._pending])
        if sender in self._filed:
            mail, _ = self._filed.pop(sender)
            self.removed.add(mail)
            self._account.remove_mail(mail)
        category = self._random.choice(CATEGORIES)
        mail = self._account.deliver(f"Someone <{sender}>", ["Screener"])
        self._account.label(mail, category.label)
        self._pending[sender] = mail, category
        self.counts["taps"] += 1

    def events(self) -> None:
        for n in range(number := self._random.randrange(1, 40)):
            self._server.streams.send_raw(self._random.choice([STATE % n, PING, b": hello\n\n"]))
        self.counts["events"] += number * len(self._server.streams)

    def end_streams(self) -> None:
        streams = self._server.streams
        self.counts["reconnects"] += len(streams)
        self._random.choice([streams.drop, streams.close])()

    def fail(self) -> None:
        ways: list[JSON] = [{"status": 503}, {"drop": True}, {"drop": True, "work": True}]
        ways += [{"status": 500, "work": True}, {"truncate": 40}, {"errors": SERVER_FAIL}]
        when = self._random.choice(["api", "session", "stream", "Email/set", "ContactCard/set"])
        self._server.faults[:] = [Fault(when, **self._random.choice(ways))]
        self.counts["faults"] += 1
        if self._random.randrange(20) == 0:
            self._server.restart()

    def settle(self, most: int) -> None:
        """Lets it run until at most so many taps wait to be carried out."""
        self._server.wait_for(lambda: self._waiting() <= most, 60)

    def _waiting(self) -> int:
        for sender, (mail, category) in list(self._pending.items()):
            if not self._account.mailboxes_of(mail) & {category.label, "Screener"}:
                self._filed[sender] = self._pending.pop(sender)
        return len(self._pending)

    def check(self) -> None:
        """Every tap was carried out once, and each sender is where the last one said."""
        assert self.untapped.total() == self.counts["taps"]
        assert set(self.untapped.values()) <= {0, 1}
        for sender, (mail, category) in self._filed.items():
            family = [each for each in CATEGORIES if each.name in (category.name, category.parent)]
            inbox = {"Inbox"} if category.add_to_inbox else set()
            boxes = {each.destination_mailbox for each in family} | inbox
            assert self._account.mailboxes_of(mail) == boxes
            groups = {each.contact_group for each in family} | {"Mailroom"}
            assert self._account.groups_of(sender) == groups
        check_account(self._server, self.removed)


class Holdings(NamedTuple):
    """What a program holds."""

    greenlets: int
    files: int
    sockets: int


def holdings(program: "subprocess.Popen[bytes]", output: Path, server: JMAPServer) -> Holdings:
    before = output.read_text("utf-8").count("greenlets:")
    program.send_signal(signal.SIGUSR1)
    server.wait_for(lambda: output.read_text("utf-8").count("greenlets:") > before)
    files = Path(f"/proc/{program.pid}/fd")
    links = [str(link.readlink()) for link in files.iterdir()]
    greenlets = re.findall(r"greenlets: (\d+)", output.read_text("utf-8"))[-1]
    return Holdings(int(greenlets), len(links), sum(link.startswith("socket:") for link in links))


def settled(program: "subprocess.Popen[bytes]", output: Path, server: JMAPServer) -> Holdings:
    """What it holds at rest: the least of some looks, since a cycle may be running."""
    looks = []
    for _ in range(8):
        server.wait_for(lambda: len(server.streams) == 1, 20)
        looks.append(holdings(program, output, server))
        gevent.sleep(0.1)
    return min(looks)


def test_a_week(tmp_path: Path, long: bool) -> None:
    output, options = tmp_path / "log", Options(history=1000)
    settings: JSON = {"poll_interval": 1, "debounce_seconds": 0.02, "log_level": "info"}
    with JMAPServer.with_mailroom_account(options) as server:
        with process(server, output, "-c", SCALED, **settings) as program:
            server.wait_for(lambda: server.streams, 20)
            week = Week(server)
            week.go_on(200, 6)
            start, held = memory(program), settled(program, output, server)
            week.go_on(10_000 if long else 10**9, 1200 if long else 12)
            now = settled(program, output, server)
            assert now.greenlets == held.greenlets
            # A connection to the API may stand, or have been closed by the last fault.
            assert now.sockets - held.sockets == now.files - held.files <= 1
            assert memory(program) < start + 10 * 2**20
            grown = memory(program) - start
            assert stopped(program)
        week.check()
    assert "Traceback" not in output.read_text("utf-8")
    for name, number in week.counts.items():
        COUNTS[f"{name} in a week"] += number
    COUNTS["KiB grown in a week"] += grown >> 10
    assert week.counts["taps"] > 200
