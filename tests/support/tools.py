"""What the tests of triage and of the service share: an account with a Mailroom beside it, and the
promises that hold after every scenario, whatever went wrong in it."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gevent
from jmap_server import JSON, Account, JMAPServer, Options, Request

import mailroom

SERVERS: dict[str, Callable[..., Options]] = {
    "fastmail": partial(Options.fastmail, groups_in_use=True),
    "cyrus": Options.cyrus,
    "stalwart": partial(Options.stalwart, groups_in_use=True),
}
PROGRAM = Path(mailroom.__file__)
FOREIGN = ("Inbox", "Archive", "Drafts", "Sent", "Junk", "Trash", "Mine")
COUNTS: Counter[str] = Counter()  # what the tests tried so often, shown at the end of the run


def access_to(server: JMAPServer) -> JSON:
    """The settings with which Mailroom comes to the server's account."""
    return {"jmap_token": server.options.token, "jmap_url": server.session_url}


def settings_for(server: JMAPServer, **changes: Any) -> mailroom.MailroomSettings:
    """Settings for this server, with time scaled down."""
    scaled = {"health_port": 0, "debounce_seconds": 0.02}
    return mailroom.MailroomSettings(**access_to(server) | scaled | changes)


def new_triage(settings: mailroom.MailroomSettings) -> mailroom.Triage:
    return mailroom.Triage(settings, *mailroom.new_clients(settings), Counter())


def check_wire(server: JMAPServer, *, takes_back: bool = False) -> None:
    """All that was asked kept to the rules: only mailboxes that are Mailroom's are left, for one
    that stays; of the cards that there are only the members of groups are changed; no message is
    destroyed or made. `takes_back`: messages may leave the Inbox, and contacts made here may go."""
    made = [*(write.reply.get("created") or {} for write in server.writes)]
    own = {each["id"] for created in made for each in created.values() if "id" in each}
    kept = {*FOREIGN} - ({"Inbox"} if takes_back else set())
    foreign = {box.id for box in server.account.mailboxes.values() if box.name in kept}
    for call in server.calls("Email/set"):
        assert not call.get("destroy")
        assert not call.get("create")
        for patch in call["update"].values():
            assert patch, "an empty patch"
            patch.pop("keywords/$seen", None)
            assert all(re.fullmatch(r"mailboxIds/[^/]+", path) for path in patch)
            taken = {path.partition("/")[2] for path, stays in patch.items() if stays is None}
            added = {path.partition("/")[2] for path, stays in patch.items() if stays is True}
            assert len(taken) + len(added) == len(patch)
            assert added, f"{patch} names no mailbox that stays"
            assert not taken & foreign, f"{patch} takes a message out of a user's mailbox"
    for call in server.calls("ContactCard/set"):
        assert set(call.get("destroy") or ()) <= (own if takes_back else set())
        for patch in (call.get("update") or {}).values():
            assert patch, "an empty patch"
            assert all(re.fullmatch(r"members(/[^/]+)?", path) for path in patch), patch


class Scene:
    """An account and a triage. At the end of the `with` all the promises are checked, and that one
    more cycle is a single request that writes nothing. `takes_back`: there is the undo label."""

    def __init__(
        self, options: Options | None = None, *, takes_back: bool = False, **settings: Any
    ) -> None:
        self.server = JMAPServer.with_mailroom_account(options)
        self.account = self.server.account
        self.account.add_mailbox("Mine")
        self.takes_back = takes_back
        if takes_back:
            self.account.add_mailbox("@ToScreener")
        self._settings = settings_for(self.server, **settings)
        self.restart()
        self.last: list[Request] = []
        self.most_idle = 1

    def __enter__(self) -> "Scene":
        self.cycle()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.server.stop()

    def cycle(self) -> dict[str, str]:
        """{sender: why it failed}. `last` are its requests."""
        start = len(self.server.requests)
        try:
            return self.triage.run()
        except mailroom.MailroomError:
            self.triage.client.stale = True  # As the service does.
            raise
        finally:
            self.last = self.server.requests[start:]

    def heal(self, cycles: int = 4) -> None:
        for _ in range(cycles):
            with suppress(mailroom.MailroomError):
                if not self.cycle():
                    return
        raise AssertionError(f"{cycles} cycles did not heal it")

    def tap(self, mail_id: str, *labels: str) -> None:
        self.account.label(mail_id, *labels)

    def new_sender(self, sender: str, mails: int = 1, box: str = "Screener") -> list[str]:
        return [self.account.deliver(sender, [box], subject=f"mail {n}") for n in range(mails)]

    def lose(self, name: str) -> None:
        """The user deletes a mailbox, a label or `the group NAME`."""
        if name.startswith("the group "):
            self.account.remove_card(self.account.group_id(name[10:]))
        else:
            self.account.remove_mailbox(name)

    def make(self, name: str) -> None:
        if name.startswith("the group "):
            self.account.add_group(name[10:])
        else:
            self.account.add_mailbox(name)

    def restart(self) -> None:
        self.triage = new_triage(self._settings)

    def is_complete(self) -> bool:
        """Whether `setup` finds all that Mailroom needs."""
        return {0: True, 1: False}[command("setup", **access_to(self.server)).status]

    def boxes(self, mails: Iterable[str]) -> list[set[str]]:
        return [self.account.mailboxes_of(mail) for mail in mails]

    def the_contact(self, address: str) -> JSON:
        (card,) = self.account.contacts_of(address)
        return card

    def notes(self, address: str) -> list[str]:
        return [note["note"] for note in self.the_contact(address).get("notes", {}).values()]

    def seen(self) -> tuple[dict[str, set[str]], dict[str, JSON]]:
        """All that there is, to be compared: each message's mailboxes, and the cards."""
        boxes = {mail: self.account.mailboxes_of(mail) for mail in self.account.mails}
        return boxes, cards_of(self.account)

    def labelled(self) -> set[str]:
        labels = [b for b in self.account.mailboxes.values() if b.name.startswith("@To")]
        return {mail for label in labels for mail in label.mails}

    def check(self) -> None:
        self.check_idle()
        check_account(self.server, takes_back=self.takes_back)

    def check_idle(self) -> None:
        """A cycle right after a cycle asks one thing and writes nothing."""
        assert self.cycle() == {}
        methods = [request.methods for request in self.last]
        assert 1 <= len(methods) <= self.most_idle, methods
        assert not any(name.endswith(("/set", "/import")) for names in methods for name in names)


def cards_of(account: Account) -> dict[str, JSON]:
    """The cards by uid, to be compared. Empty properties are as good as none."""
    return {
        card["uid"]: {key: value for key, value in card.items() if value and key != "id"}
        for card in account.cards.values()
    }


def check_account(
    server: JMAPServer, removed: Iterable[str] = (), *, takes_back: bool = False
) -> None:
    """No mail was lost, no contact doubled, nothing of the user's touched, and the test server is
    well. `removed`: the mails that the user deleted; `takes_back`: see `check_wire`."""
    account = server.account
    assert account.histories["Email"].gone <= set(removed), "mails were lost"
    assert all(mail.mailboxes for mail in account.mails.values())
    for card in account.cards.values():
        if mailroom.CREATED_NOTE in json.dumps(card.get("notes", {})):
            for email in card["emails"].values():
                assert len(account.contacts_of(email["address"])) == 1, "a second contact"
    check_wire(server, takes_back=takes_back)
    assert server.crashes == []


SAMPLE = re.compile(
    r'([a-zA-Z_:][\w:]*)(\{(?:\w+="(?:[^"\\]|\\["\\n])*",?)*\})? (-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)'
)


def parse_metrics(text: str) -> dict[str, float]:
    """The samples of a page in the Prometheus text format 0.0.4, which is to be perfect."""
    assert text.endswith("\n")
    declarations, samples, current = set[str](), dict[str, float](), ""
    for line in text.splitlines():
        if declared := re.fullmatch(r"# TYPE (\S+) (counter|gauge)", line):
            current, kind = declared.groups()
            assert current not in declarations, "two TYPE lines, or samples apart"
            assert (kind == "counter") == current.endswith("_total")
            declarations.add(current)
        elif not line.startswith("# HELP "):
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            assert sample[1] == current, f"{line} is not under its TYPE"
            key = sample[1] + (sample[2] or "")
            assert key not in samples, "twice"
            samples[key] = float(sample[3])
    return samples


class Running:
    """A service in this process, with its log."""

    def __init__(self, server: JMAPServer, settings: mailroom.MailroomSettings) -> None:
        self.server, self.settings = server, settings
        self.service = mailroom.Service(settings)
        self.output = io.StringIO()
        self.greenlet: gevent.Greenlet[..., int] = gevent.spawn(self.service.run)

    def page(self, path: str = "/healthz") -> tuple[int, str]:
        """(status, body) of a page of the health server, without the server."""
        statuses: list[str] = []
        asked = {"PATH_INFO": path, "REQUEST_METHOD": "GET"}
        body = self.service.health(asked, lambda status, _: statuses.append(status))
        return int(statuses[0].split()[0]), b"".join(body).decode()

    @property
    def health(self) -> JSON:
        return dict(json.loads(self.page()[1]))

    @property
    def triggers(self) -> Counter[str]:
        """How many cycles there were, by what triggered them; without those that triggered none."""
        counts: Counter[str] = Counter()
        for sample, value in parse_metrics(self.page("/metrics")[1]).items():
            if labels := re.fullmatch(r'mailroom_cycles_total\{.*trigger="(\w+)".*\}', sample):
                counts[labels[1]] += int(value)
        return +counts

    @property
    def cycles(self) -> int:
        return self.triggers.total()

    @property
    def failures(self) -> int:
        return int(self.health["consecutive_failures"])

    @property
    def log(self) -> list[JSON]:
        """What was logged; each record is a line of JSON."""
        return [json.loads(line) for line in self.output.getvalue().splitlines()]

    def events(self, level: str) -> list[JSON]:
        return [entry for entry in self.log if entry["level"] == level]

    def wait_for_cycles(self, more: int, seconds: float = 5) -> None:
        goal = self.cycles + more
        self.server.wait_for(lambda: self.cycles >= goal, seconds)

    def wait_until_quiet(self) -> None:
        """Lets the service run until it has asked nothing for more than a window."""
        count = -1
        with gevent.Timeout(30, AssertionError("it never is quiet")):
            while count != len(self.server.requests):
                count = len(self.server.requests)
                gevent.sleep(self.settings.debounce_seconds + 0.1)

    def stop(self) -> int:
        self.service.shutdown.set()
        return self.status()

    def status(self) -> int:
        """The exit status of a service that ends by itself."""
        return self.greenlet.get(timeout=5)


@contextmanager
def running(server: JMAPServer, **changes: Any) -> Iterator[Running]:
    """A service on this account; it is stopped at the end, and must not have ended before."""
    settings = settings_for(server, **{"log_format": "json", "log_level": "debug", **changes})
    log, before = mailroom.LOG, mailroom.LOG.handlers[:]
    run = Running(server, settings)
    handler = logging.StreamHandler(run.output)
    handler.setFormatter(mailroom.LogFormatter(settings))
    log.handlers[:] = [handler]
    log.setLevel(settings.log_level.upper())
    try:
        yield run
        if not run.greenlet.ready():
            assert run.stop() == 0
    finally:
        run.greenlet.kill()
        log.handlers[:] = before


@contextmanager
def started(
    output: Path, *command: object, **settings: object
) -> Iterator["subprocess.Popen[bytes]"]:
    """A Python command with these settings; its output goes to a file. It is killed at the end."""
    words, given = [sys.executable, *map(str, command)], environment_of(settings)
    with output.open("wb") as file:
        process = subprocess.Popen(words, cwd=PROGRAM.parent, env=given, stdout=file, stderr=file)
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def process(
    server: JMAPServer, output: Path, *command: str, **settings: object
) -> Iterator["subprocess.Popen[bytes]"]:
    """The program as a user starts it, or another Python command, on the server's account."""
    given = {"health_port": 0, "log_level": "debug", "debounce_seconds": 0.05, **settings}
    with started(output, *(command or [PROGRAM]), **access_to(server) | given) as program:
        yield program


def stopped(program: "subprocess.Popen[bytes]", number: int = signal.SIGTERM) -> bool:
    program.send_signal(number)
    return program.wait(timeout=5) == 0


def tap(server: JMAPServer, sender: str, *labels: str) -> str:
    """A message arrives in the Screener, and the user labels it (`@ToFeed`); its id."""
    mail = server.account.deliver(sender, ["Screener"])
    server.account.label(mail, *(labels or ["@ToFeed"]))
    return mail


def wait_filed(server: JMAPServer, mail: str, seconds: float = 10, box: str = "Feed") -> float:
    """Lets everything run until a message is filed; how many seconds it took."""
    start = time.monotonic()
    server.wait_for(lambda: server.account.mailboxes_of(mail) == {box}, seconds)
    return time.monotonic() - start


def memory(program: "subprocess.Popen[bytes]") -> int:
    pages = Path(f"/proc/{program.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Ran(NamedTuple):
    status: int
    out: str
    err: str


def environment_of(settings: Mapping[str, object]) -> dict[str, str]:
    """The environment with these settings and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAILROOM_")}
    return kept | variables_of(settings)


def variables_of(settings: Mapping[str, object]) -> dict[str, str]:
    return {
        f"MAILROOM_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in settings.items()
    }


def command(*arguments: str, **settings: object) -> Ran:
    """`python mailroom.py ARGUMENTS` in this process, with these settings and no others."""
    given = environment_of({"health_port": 0, **settings})
    changed = mock.patch.dict(os.environ, given, clear=True)
    out, err, log = io.StringIO(), io.StringIO(), mailroom.LOG
    before = log.handlers[:], log.propagate, log.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with changed, redirect_stdout(out), redirect_stderr(err):
            status = mailroom.main(arguments)
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    finally:
        log.handlers[:], log.propagate = before[:2]
        log.setLevel(before[2])
        for number, handler in signals.items():
            signal.signal(number, handler)
    return Ran(status, out.getvalue(), err.getvalue())
