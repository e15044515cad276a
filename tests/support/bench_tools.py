"""What the benchmark is made of: figures, and Mailroom in this process and as one of its own."""

import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import processes
from books import GROUPS, DAVBook, radicale_book
from fault_proxy import FaultProxy
from jmap_server import JSON, JMAPServer
from ports import free_port
from radicale_server import RadicaleServer
from tools import access_to, new_triage, settings_for

PATIENCE = 900.0  # seconds that Mailroom is waited for


class BenchError(Exception):
    """What ought to have happened did not: there is nothing to measure. One line."""


class Figure(NamedTuple):
    """What was measured, and the most that it may be, in the same unit."""

    what: str
    value: float
    limit: float
    unit: str = ""

    @property
    def is_over(self) -> bool:
        return self.value > self.limit

    @property
    def row(self) -> list[str]:
        numbers = (f"{n:,.2f}".removesuffix(".00") for n in (self.value, self.limit))
        return [self.what, *(f"{n} {self.unit}" for n in numbers), "OVER" if self.is_over else ""]


def table(figures: Iterable[Figure]) -> str:
    rows = [["", "measured", "at most", ""], ["---"] * 4, *(figure.row for figure in figures)]
    return "\n".join("| {:84} | {:9} | {:9} | {:4} |".format(*row) for row in rows)


class Desk:
    """An account with Mailroom's triage in this process, connected. `settings`: Mailroom's."""

    def __init__(self, server: JMAPServer, **settings: Any) -> None:
        self.server, self.account = server, server.account
        self._triage = new_triage(settings_for(server, **settings))
        self._senders = 0
        self.cycle()

    def cycle(self) -> int:
        """One cycle, which is to go well; how many requests it made to the mail server."""
        before = len(self.server.requests)
        if failed := self._triage.run():
            raise BenchError(f"not triaged: {failed}")
        return len(self.server.requests) - before

    def tap(self, tapped: Sequence[str], label: str = "@ToFeed") -> int:
        for email in tapped:
            self.account.label(email, label)
        requests = self.cycle()
        if self.account.mails_in(label):
            raise BenchError("the label is still on")
        return requests

    def new_senders(self, number: int, emails: int = 1) -> list[str]:
        """A message of each of so many new senders, who have so many in the Screener."""
        first, self._senders = self._senders, self._senders + number
        names = (f"s{n}" for n in range(first, self._senders))
        return [deliver(self.server, name, emails)[0] for name in names]


def deliver(server: JMAPServer, sender: str, emails: int, *boxes: str) -> list[str]:
    author = f"{sender.title()} <{sender}@news.example>"
    return [server.account.deliver(author, ["Screener", *boxes]) for _ in range(emails)]


class Program:
    """`python mailroom.py` beside a server, as a process."""

    def __init__(self, server: JMAPServer, run: processes.Program) -> None:
        self.server, self.run = server, run

    def memory(self, name: str) -> float:
        """MB: `VmRSS` is what it occupies, `VmHWM` the most that it ever did."""
        status = Path(f"/proc/{self.run.process.pid}/status").read_text().split()
        return int(status[status.index(f"{name}:") + 1]) / 1024

    def tap(self, emails: int) -> None:
        """Put the label on so many messages of a new sender, and wait until all is quiet."""
        for email in deliver(self.server, "one", emails):
            self.server.account.label(email, "@ToFeed")
        self.wait_for(lambda: not self.server.account.mails_in("@ToFeed"))
        self.wait_until_quiet()

    def wait_for(self, condition: Any) -> None:
        with gevent.Timeout(PATIENCE, BenchError(f"not done after {PATIENCE:.0f} seconds")):
            while not condition():
                if self.run.process.poll() is not None:
                    raise BenchError(f"it has ended: {self.run.output.read_text()[-2000:]}")
                gevent.sleep(0.02)

    def wait_until_quiet(self, seconds: float = 1) -> None:
        asked = self.server.requests
        self.wait_for(lambda: asked and time.monotonic() - asked[-1].time > seconds)


@contextmanager
def program(server: JMAPServer, **settings: object) -> Iterator[Program]:
    """A Mailroom that polls so rarely that it does not count."""
    given: JSON = {"poll_interval": 86400, "debounce_seconds": 0.3, "health_port": free_port()}
    given |= {"log_level": "debug", "log_format": "json", **access_to(server), **settings}
    with (
        tempfile.TemporaryDirectory() as home,
        processes.program(Path(home, "log"), **given) as run,
    ):
        yield Program(server, run)


@contextmanager
def address_book(latency: float = 0) -> Iterator[tuple[RadicaleServer, JMAPServer, DAVBook]]:
    """(Radicale, a proxy before it that takes its time, the groups and a mail server)."""
    with RadicaleServer() as radicale, FaultProxy(radicale.port) as proxy:
        proxy.options.latency = latency
        book = radicale_book(radicale)
        for group in GROUPS:
            book.add_group(group)
        book.settings["carddav_url"] = f"{proxy.origin}/"
        with book.mail:
            yield radicale, proxy, book


def fill_book(radicale: RadicaleServer, number: int, photo: int = 0) -> None:
    """Put contacts straight into the storage; `photo`: bytes of base64 in each."""
    place = radicale.home / "collections/collection-root" / radicale.username / radicale.addressbook
    picture = "\r\n ".join(textwrap.wrap("PHOTO;ENCODING=b;TYPE=JPEG:" + "QUJD" * (photo // 4), 74))
    for n in range(number):
        uid = uuid.UUID(int=n, version=4)
        lines = ["BEGIN:VCARD", "VERSION:3.0", f"UID:{uid}", f"FN:Contact {n}"]
        lines += [f"N:{n};Contact;;;", f"EMAIL:c{n}@friends.example", *([picture] if photo else [])]
        text = "\r\n".join([*lines, "END:VCARD", ""])
        (place / f"{uid}.vcf").write_text(text, newline="")
