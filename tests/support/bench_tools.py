"""What the benchmark is made of: figures and their limits; Mailroom's triage in this process, whose
requests are counted; `python mailroom.py` as a process, of whose memory the kernel tells."""

import json
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gevent
import processes
import radicale_server
from books import CATEGORIES, GROUPS, radicale_book
from fault_proxy import FaultProxy
from jmap_server import JMAPServer
from ports import free_port
from radicale_server import RadicaleServer
from tools import new_triage, settings_for

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
    """The figures as a table in Markdown."""
    rows = [["", "measured", "at most", ""], ["---"] * 4, *(figure.row for figure in figures)]
    return "\n".join("| {:84} | {:9} | {:9} | {:4} |".format(*row) for row in rows)


# In this process


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
        """The cycle after the label was put on the messages."""
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
    """Messages of a sender who is given by a word."""
    author = f"{sender.title()} <{sender}@news.example>"
    return [server.account.deliver(author, ["Screener", *boxes]) for _ in range(emails)]


# As a process


class Program:
    """`python mailroom.py` beside a server."""

    def __init__(self, server: JMAPServer, run: processes.Program) -> None:
        self.server, self.run = server, run

    def memory(self, name: str) -> float:
        """MB: `VmRSS` is what it occupies, `VmHWM` the most that it ever did."""
        status = Path(f"/proc/{self.run.process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return int(lines[name].split()[0]) / 1024

    def tap(self, tapped: Sequence[str], label: str = "@ToFeed") -> None:
        """Put the label on messages as a phone would, and wait until it is off and all is quiet."""
        for email in tapped:
            self.server.account.label(email, label)
        self.wait_for(lambda: not self.server.account.mails_in(label))
        self.wait_until_quiet()

    def wait_for(self, condition: Any) -> None:
        with gevent.Timeout(PATIENCE, BenchError(f"not done after {PATIENCE:.0f} seconds")):
            while not condition():
                if self.run.process.poll() is not None:
                    raise BenchError(f"it has ended: {self.run.output.read_text()[-2000:]}")
                gevent.sleep(0.02)

    def wait_until_quiet(self, seconds: float = 1) -> None:
        """Wait until it has asked nothing for so long."""
        asked = self.server.requests
        self.wait_for(lambda: asked and time.monotonic() - asked[-1].time > seconds)


@contextmanager
def program(server: JMAPServer, **settings: object) -> Iterator[Program]:
    """A Mailroom that polls so rarely that it does not count."""
    given = {"jmap_url": server.session_url, "jmap_token": server.options.token}
    given |= {"poll_interval": "86400", "debounce_seconds": "0.3", "log_level": "debug"}
    given |= {name: v if isinstance(v, str) else json.dumps(v) for name, v in settings.items()}
    with tempfile.TemporaryDirectory() as home:
        log = Path(home) / "log"
        with processes.program(log, health_port=free_port(), log_format="json", **given) as run:
            yield Program(server, run)


# Contacts on a real Radicale


@contextmanager
def address_book(latency: float = 0) -> Iterator[tuple[RadicaleServer, JMAPServer, JMAPServer]]:
    """(Radicale with the groups, a proxy before it that takes its time, a mail server)."""
    # It is not to wait for the disk, which takes minutes for thousands of cards.
    config = radicale_server.CONFIG.replace("[storage]", "[storage]\n_filesystem_fsync = False")
    with mock.patch.object(radicale_server, "CONFIG", config):
        server = RadicaleServer()
    with server as radicale, FaultProxy(radicale.port) as proxy:
        proxy.options.latency = latency
        book = radicale_book(radicale)
        for group in GROUPS:
            book.add_group(group)
        with book.mail:
            yield radicale, proxy, book.mail


def settings_of(radicale: RadicaleServer, origin: str) -> dict[str, Any]:
    """Mailroom's settings for contacts there."""
    login = {"carddav_username": radicale.username, "carddav_password": radicale.password}
    return {"carddav_url": f"{origin}/", "triage_categories": [*CATEGORIES], **login}


def fill_address_book(radicale: RadicaleServer, number: int, photo: int = 0) -> None:
    """Put contacts of the user's own straight into the storage, each with so many bytes of base64
    as its photo."""
    place = radicale.home / "collections/collection-root" / radicale.username / radicale.addressbook
    picture = "\r\n ".join(textwrap.wrap("PHOTO;ENCODING=b;TYPE=JPEG:" + "QUJD" * (photo // 4), 74))
    for n in range(number):
        uid = uuid.UUID(int=n, version=4)
        lines = [f"UID:{uid}", f"FN:Contact {n}", f"N:{n};Contact;;;"]
        lines += [f"EMAIL:c{n}@friends.example", picture][: 2 if photo else 1]
        text = "\r\n".join(["BEGIN:VCARD", "VERSION:3.0", *lines, "END:VCARD", ""])
        (place / f"{uid}.vcf").write_text(text, newline="")
