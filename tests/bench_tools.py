"""What the benchmark is made of: figures and their table; Mailroom as a process, with what the
kernel says of it; Mailroom's triage in this process, with each of its requests counted."""

from __future__ import annotations

import json
import math
import os
import ssl
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gevent
import radicale_server
import requests
from gevent.event import Event
from jmap_server import JMAPServer, Options
from ports import free_port
from radicale_server import RadicaleServer
from tools import new_triage, parse_metrics, process, settings_for

import mailroom

PATIENCE = 120.0  # seconds that Mailroom is waited for
MAX_POLL = 86400
BYTES_PER_MB = 2**20


class BenchError(Exception):
    """What ought to have happened did not: there is nothing to measure. One line."""


# ------------------------------------------------------------------------------------------ figures

KINDS = {"count": "Counts", "ratio": "Ratios", "size": "Sizes", "time": "Times"}


@dataclass(frozen=True)
class Figure:
    """A figure and the limit that it is held against: at most so much, in the same unit."""

    kind: str
    section: str
    what: str
    value: float
    limit: float
    unit: str = ""
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.value <= self.limit + 1e-9

    @property
    def verdict(self) -> str:
        """Only what is exact can fail: the rest depends on the machine, and who else is busy."""
        return "pass" if self.holds else "FAIL" if self.kind == "count" else "over"

    def shown(self, number: float) -> str:
        whole = self.kind == "count" and float(number).is_integer()
        return f"{number:,.0f}" if whole else f"{number:,.{decimals(number)}f}"

    @property
    def row(self) -> tuple[str, str, str, str]:
        what = f"{self.section}: {self.what}" + (f" ({self.note})" if self.note else "")
        unit = f" {self.unit}" if self.unit else ""
        return what, self.shown(self.value) + unit, self.shown(self.limit) + unit, self.verdict

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "verdict": self.verdict}


def decimals(number: float) -> int:
    """As many as leave three figures, and no more than two."""
    return max(0, min(2, 2 - math.floor(math.log10(abs(number) or 0.1))))


def table(figures: Sequence[Figure]) -> str:
    """The figures as a table in Markdown: counts, ratios, sizes, times."""
    rows = [("", "measured", "at most", "")]
    for kind, title in KINDS.items():
        chosen = [figure.row for figure in figures if figure.kind == kind]
        rows += [(f"**{title}**", "", "", ""), *chosen] if chosen else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    dashes = [f"{'-' * (width - 1)}{':' if 0 < n < 3 else '-'}" for n, width in enumerate(widths)]
    return "\n".join([first, "| " + " | ".join(dashes) + " |", *lines])


def order_of_growth(points: Mapping[int, float]) -> float:
    """The exponent k of the n^k that fits the points best: the slope where both are logarithms.
    0: it does not grow, 1: in proportion."""
    xs, ys = [math.log(n) for n in points], [math.log(value) for value in points.values()]
    middle = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - middle[0]) * (y - middle[1]) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - middle[0]) ** 2 for x in xs)


# ------------------------------------------------------------------------------------- a process


class Program:
    """`python mailroom.py` beside a server; what it uses is asked of the kernel."""

    def __init__(self, server: JMAPServer, pid: int, health_port: int) -> None:
        self.server, self.pid = server, pid
        self._health = f"http://127.0.0.1:{health_port}"

    def cycles(self, trigger: str = "") -> int:
        """How many cycles there were."""
        page = requests.get(f"{self._health}/metrics", timeout=PATIENCE).text
        samples = parse_metrics(page).items()
        wanted = f'mailroom_cycles_total{{trigger="{trigger}'
        return int(sum(value for name, value in samples if name.startswith(wanted)))

    def wait_until_quiet(self, seconds: float) -> None:
        """Waits until it has asked nothing for so long."""
        requests = self.server.requests
        with gevent.Timeout(PATIENCE, BenchError("Mailroom is never quiet")):
            while not requests or time.monotonic() - requests[-1].time < seconds:
                gevent.sleep(seconds / 4)

    def _status(self, name: str) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024 / BYTES_PER_MB
        raise BenchError(f"the kernel does not tell {name}")

    @property
    def rss(self) -> float:
        """The memory that it occupies, in MB."""
        return self._status("VmRSS")

    @property
    def peak(self) -> float:
        """The most it occupied since `forget_peak`, in MB."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    @property
    def cpu(self) -> float:
        """Seconds of processor time so far, of all its threads."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def program(server: JMAPServer, **environment: object) -> Iterator[Program]:
    """A Mailroom that polls so rarely that it does not count; it listens, if the server has push,
    and is done with its first cycle."""
    port = free_port()
    given = {"health_port": port, "log_level": "info", "poll_interval": MAX_POLL, **environment}
    with tempfile.TemporaryDirectory() as home:
        output = Path(home) / "log"
        with process(server, output, **given) as started:
            run = Program(server, started.pid, port)
            try:
                server.wait_for(lambda: server.streams or server.options.push is None, PATIENCE)
                server.wait_for(lambda: server.count("api") > 2, PATIENCE)
                run.wait_until_quiet(0.1)
                yield run
            except (AssertionError, BenchError, requests.RequestException) as error:
                raise BenchError(f"{error}; Mailroom says: {output.read_text()[-2000:]}") from error


def tap(server: JMAPServer, mails: Iterable[str], label: str = "@ToFeed") -> float:
    """Puts a label on mails as a phone would; the seconds until it is off the last of them."""
    account, filed = server.account, Event()
    box, left = account.mailbox_id(label), set(mails)

    def look(_: Mapping[str, int]) -> None:
        left.difference_update([mail for mail in left if box not in account.mails[mail].mailboxes])
        if not left:
            filed.set()

    for mail in [*left]:
        account.label(mail, label)
    started = time.monotonic()
    account.listeners.append(look)
    try:
        if not filed.wait(PATIENCE):
            raise BenchError(f"not filed after {PATIENCE} seconds")
        return time.monotonic() - started
    finally:
        account.listeners.remove(look)


@contextmanager
def tls_server(options: Options) -> Iterator[JMAPServer]:
    """An account behind TLS, with a certificate that Mailroom is told to trust."""
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "certificate.pem"
        make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        subject = f"-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout {path}.key"
        command = [*make.split(), *subject.split(), "-out", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path, f"{path}.key")
        stack.enter_context(mock.patch.dict(os.environ, REQUESTS_CA_BUNDLE=str(path)))
        yield stack.enter_context(JMAPServer.with_mailroom_account(options, ssl_context=context))


# -------------------------------------------------------------------------------- in this process


class Exchange(NamedTuple):
    """A request that Mailroom made; the bytes of its body and its answer's."""

    url: str
    octets: int


class Work(NamedTuple):
    """What a cycle asked: requests to the mail server and to the CardDAV server, and all bytes."""

    mail: int
    contacts: int
    octets: int


@contextmanager
def tomorrow() -> Iterator[None]:
    """By Mailroom's calendar it is a day later meanwhile."""
    with mock.patch.object(mailroom, "date") as calendar:
        calendar.today = lambda: date.today() + timedelta(days=1)
        yield


@contextmanager
def recorded() -> Iterator[list[Exchange]]:
    """All requests that Mailroom makes in this process meanwhile."""
    exchanges: list[Exchange] = []
    ask = mailroom.HTTPClient.request

    def asked(
        self: mailroom.HTTPClient, method: str, url: str, *rest: Any, **named: Any
    ) -> mailroom.Reply:
        reply = ask(self, method, url, *rest, **named)
        sent = rest[1] if len(rest) > 1 else named.get("body")
        exchanges.append(Exchange(url, len(sent or b"") + len(reply.body)))
        return reply

    with mock.patch.object(mailroom.HTTPClient, "request", asked):
        yield exchanges


class Desk:
    """An account with Mailroom's triage in this process, connected. `add_contact` adds one of the
    user's with an address; `settings`: Mailroom's."""

    def __init__(
        self, server: JMAPServer, add_contact: Callable[[str], object] = str, **settings: Any
    ) -> None:
        self.server, self.account = server, server.account
        self._add_contact = add_contact
        self._settings = settings
        self._senders = 0
        self.restart()

    def restart(self) -> None:
        """Mailroom starts anew, and has had its first cycle."""
        self._triage = new_triage(settings_for(self.server, **self._settings))
        self.cycle()

    def cycle(self) -> Work:
        """One cycle, which is to go well."""
        with recorded() as exchanges:
            if failed := self._triage.run():
                raise BenchError(f"not triaged: {failed}")
        here = [each for each in exchanges if each.url.startswith(self.server.origin)]
        octets = sum(each.octets for each in exchanges)
        return Work(len(here), len(exchanges) - len(here), octets)

    def tap(self, mails: Iterable[str], label: str = "@ToFeed") -> Work:
        """The cycle that follows when the label is put on the mails."""
        tapped = [*mails]
        for mail in tapped:
            self.account.label(mail, label)
        work = self.cycle()
        box = self.account.mailbox_id(label)
        if any(box in self.account.mails[mail].mailboxes for mail in tapped):
            raise BenchError("the label is still on")
        return work

    def new_senders(self, senders: int, mails: int = 1) -> list[str]:
        """One mail of each of so many new senders, who have so many mails in the Screener."""
        first = self._senders
        self._senders += senders
        return [
            deliver(self.server, f"s{number}", mails)[0] for number in range(first, self._senders)
        ]

    def known_sender(self) -> list[str]:
        """A mail of someone whom the user has as a contact."""
        self._add_contact("friend@news.example")
        return deliver(self.server, "friend", 1)


# ------------------------------------------------------------------------------------- an account


def deliver(server: JMAPServer, sender: str, mails: int, box: str = "Screener") -> list[str]:
    """Mails of a sender who is given by a word."""
    author = f"{sender.title()} <{sender}@news.example>"
    return [server.account.deliver(author, [box]) for _ in range(mails)]


def add_contacts(server: JMAPServer, number: int) -> None:
    """Contacts of the user's own, in no group."""
    for n in range(number):
        server.account.add_contact(f"c{n}@friends.example", f"Contact {n}", phones={"p": {"n": n}})


def add_triaged(server: JMAPServer, number: int) -> None:
    """Contacts as Mailroom made them, in two groups."""
    account = server.account
    note = {"n1": {"note": "Created by Mailroom\nTriaged to Feed on 2026-01-01"}}
    made = [
        account.add_contact(f"t{n}@news.example", f"Triaged {n}", "org", notes=note)
        for n in range(number)
    ]
    members = {account.cards[card]["uid"]: True for card in made}
    for group in ("Feed", "Mailroom"):
        account.put_card({**account.cards[account.group_id(group)], "members": members})


def add_mailboxes(server: JMAPServer, number: int) -> None:
    """Folders of the user's own, until there are so many mailboxes."""
    for n in range(len(server.account.mailboxes), number):
        server.account.add_mailbox(f"Folder {n}")


def add_strangers(server: JMAPServer, number: int) -> None:
    """Mails in the Screener, five of each sender."""
    for n in range(number // 5):
        deliver(server, f"stranger{n}", 5)


def quick_radicale() -> RadicaleServer:
    """Radicale that does not wait for the disk, which takes minutes for thousands of cards."""
    config = radicale_server.CONFIG.replace("[storage]", "[storage]\n_filesystem_fsync = False")
    with mock.patch.object(radicale_server, "CONFIG", config):
        return RadicaleServer()


def fill_address_book(radicale: RadicaleServer, number: int) -> list[str]:
    """Contacts of the user's own, put straight into the storage; their uids."""
    place = radicale.home / "collections/collection-root" / radicale.username / radicale.addressbook
    uids = [uuid.uuid4() for _ in range(number)]
    for n, uid in enumerate(uids):
        lines = [
            f"UID:{uid}",
            f"FN:Contact {n}",
            f"N:{n};Contact;;;",
            f"EMAIL:c{n}@friends.example",
        ]
        text = "\r\n".join(["BEGIN:VCARD", "VERSION:3.0", *lines, "END:VCARD", ""])
        (place / f"{uid}.vcf").write_text(text, newline="")
    return [uid.urn for uid in uids]


def start_seconds(server: JMAPServer) -> float:
    """Seconds from starting the program to its first request."""
    server.requests.clear()
    with tempfile.TemporaryDirectory() as home:
        started = time.monotonic()
        with process(server, Path(home) / "log"):
            server.wait_for(lambda: server.requests, PATIENCE)
            return server.requests[0].time - started


def import_seconds() -> float:
    """Seconds that the program's imports take, as Python itself tells them."""
    command = [sys.executable, "-X", "importtime", "-m", "mailroom", "--version"]
    place = Path(mailroom.__file__).parent
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=place).stderr
    lines = [line.partition(":")[2].split("|") for line in told.splitlines()[1:]]
    roots = [(name.strip(), int(total)) for _, total, name in lines if not name.startswith("  ")]
    first = [name for name, _ in roots].index("site") + 1
    return sum(total for _, total in roots[first:]) / 1e6


def machine() -> str:
    """The machine, by what counts."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GB of memory"


def as_json(figures: Iterable[Figure], **about: Any) -> str:
    return json.dumps({**about, "figures": [figure.as_json() for figure in figures]}, indent=1)
