"""What `nox -s live` works with. What it tells goes into a report: it has no secret in it."""

import mailroom  # noqa: I001  (its import is the monkey patch)

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import gevent
import urllib3

from mailroom import HTTPClient, MailroomError

JSON = dict[str, Any]
QUIET, MAX_PAUSE, COMMAND_SECONDS, STOP_SECONDS = 95, 60, 120, 10
LOUD = ("warning", "error", "critical")
# What is made in the account; whatever is called so is taken out again.
PREFIX = "Mailroom test "
NAMES = [PREFIX + name for name in ("Screener", "Feed", "Jail", "@ToFeed", "@ToJail")]
NAMES += [PREFIX + name for name in ("@ToScreener", "@Error", "@Warning", "made")]
SCREENER, FEED, JAIL, TO_FEED, TO_JAIL, UNDO, ERROR, WARNING, GROUP = NAMES
SENDER, ADDRESS = PREFIX + "sender", "sender@mailroom-test.example"
CATEGORIES = [{"name": FEED, "label": TO_FEED}, {"name": JAIL, "label": TO_JAIL}]
OWN = {
    "MAILROOM_SCREENER_MAILBOX": SCREENER,
    "MAILROOM_LABEL_MAILROOM_ERROR": ERROR,
    "MAILROOM_LABEL_MAILROOM_WARNING": WARNING,
    "MAILROOM_LABEL_UNDO": UNDO,
    "MAILROOM_PROVENANCE_GROUP": GROUP,
    "MAILROOM_TRIAGE_CATEGORIES": json.dumps(CATEGORIES),
    "MAILROOM_HEALTH_PORT": "0",
    "MAILROOM_LOG_LEVEL": "debug",
    "MAILROOM_LOG_FORMAT": "json",
}
# The user's variables that hold for the test, too.
USERS = re.compile("(?!MAILROOM_).*|MAILROOM_((JMAP|CARDDAV)_.*|POLL_INTERVAL|DEBOUNCE_SECONDS)")


class LiveError(MailroomError):
    """What did not happen, or cannot be done; one line without a secret."""


class JMAP:
    """The user's phone. Raises MailroomError for whatever is not as it should."""

    def __init__(self, settings: mailroom.MailroomSettings) -> None:
        self.settings, (self.client, _) = settings, mailroom.new_clients(settings)
        self.client.connect()
        self.http = self.new_http()
        reply, body = self.http.request("GET", self.client.session_url, {})
        self.session: JSON = json.loads(body)
        upload = self.session["uploadUrl"].replace("{accountId}", self.client.account_id)
        self.upload_url = urljoin(reply.url, upload)
        has_contacts = bool(self.client.account(mailroom.CONTACTS))
        self.has_cards = has_contacts and not settings.carddav_username

    def new_http(self) -> HTTPClient:
        auth = mailroom.credentials(self.settings.jmap_token, self.settings.jmap_username)
        return HTTPClient(auth, "MAILROOM_JMAP_URL", mailroom.JMAP_REMEDY)

    def redact(self, text: str) -> str:
        """The text without what is nobody else's business."""
        private: list[Any] = [self.settings.jmap_username, self.settings.carddav_username]
        private += [self.session.get("username"), *self.session["accounts"]]
        text = self.settings.redact(text)
        for secret in filter(None, private):
            text = text.replace(secret, "[secret]")
        return text

    def call(self, method: str, **arguments: Any) -> JSON:
        """The answer to a call in which no object was refused."""
        answer = self.client.call(method, arguments)
        if refused := mailroom.set_errors(answer):
            raise LiveError(f"{method}: {'; '.join(refused.values())}")
        return answer

    def put(self, subject: str, mailbox: str) -> str:
        """The id of a new message of the made-up sender (RFC 8620 6.1, RFC 8621 4.8)."""
        mail = EmailMessage(SMTP)  # with CRLF, as Cyrus demands
        mail["From"], mail["Subject"], mail["Date"] = f"{SENDER} <{ADDRESS}>", subject, formatdate()
        mail["Message-ID"] = make_msgid(domain="mailroom-test.example")
        mail.set_content("A message of Mailroom's own test, to be deleted.\n")
        kind = {"Content-Type": "message/rfc822"}
        accept = (200, 201)
        _, body = self.http.request("POST", self.upload_url, kind, bytes(mail), accept=accept)
        blob = json.loads(body)["blobId"]
        given = {"blobId": blob, "mailboxIds": {mailbox: True}, "keywords": {"$seen": True}}
        return str(self.call("Email/import", emails={"m": given})["created"]["m"]["id"])

    def boxes(self) -> dict[str, str]:
        """{name: id} of the mailboxes that are called as those made here."""
        found = self.call("Mailbox/get", ids=None, properties=["id", "name"])["list"]
        return {box["name"]: box["id"] for box in found if box["name"] in NAMES}

    def cards(self) -> list[JSON]:
        """The made-up contact and the groups made here; none where contacts are not over JMAP."""
        found: list[JSON] = []
        for where in ({"email": ADDRESS}, {"kind": "group"}) if self.has_cards else ():
            ids = self.call("ContactCard/query", filter=where)["ids"]
            found += self.call("ContactCard/get", ids=ids)["list"] if ids else []
        return [card for card in found if name_of(card) in NAMES or ADDRESS in addresses(card)]


def name_of(card: JSON) -> str:
    return str((card.get("name") or {}).get("full")) if card.get("kind") == "group" else ""


def addresses(card: JSON) -> list[str]:
    return [each.get("address", "") for each in (card.get("emails") or {}).values()]


class Stream:
    """What comes on the event stream, on a connection beside Mailroom's."""

    def __init__(self, jmap: JMAP) -> None:
        url = jmap.client.event_source_url
        self.http, self.url = jmap.new_http(), url and mailroom.expand_event_source_url(url)
        self.how, self.since, self.ends = "none is offered", 0.0, list[str]()
        self.events: Counter[str] = Counter()

    def run(self) -> None:
        """Connect again and again, ever more slowly."""
        while self.url:
            end, self.since = "closed", 0.0
            try:
                self._follow(self.url)
            except (MailroomError, OSError, urllib3.exceptions.HTTPError) as error:
                end = type(error).__name__
            stood = time.monotonic() - self.since if self.since else 0
            self.ends.append(f"{end} after {stood:.1f} s")
            self.since = 0.0
            gevent.sleep(min(2 ** len(self.ends), MAX_PAUSE))

    def _follow(self, url: str) -> None:
        """Count what comes on one connection; nothing of the account's goes into the report."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        with self.http.open("GET", url, range(600), headers=headers, timeout=QUIET) as reply:
            shown = ("Content-Type", "Transfer-Encoding", "Content-Encoding")
            said = [reply.headers[name] for name in shown if name in reply.headers]
            self.how = ", ".join([f"HTTP {reply.status_code}", *said])
            reply.raise_for_status()
            self.since, name = time.monotonic(), "message"
            for line in reply.iter_lines(chunk_size=1):
                field, _, value = line.decode(errors="replace").partition(":")
                if field == "data":
                    with suppress(ValueError, AttributeError):
                        data = json.loads(value)
                        kinds = {kind for one in data.get("changed", {}).values() for kind in one}
                        more = [str(data[key]) for key in ("type", "interval") if key in data]
                        name = " ".join([name, *sorted(kinds), *more])
                    self.events[name] += 1
                elif line and field != "event":
                    self.events[f"{field or 'comment'} line"] += 1
                name = value.strip() if field == "event" else "message"

    def report(self) -> dict[str, str]:
        if self.since:
            self.ends.append(f"open for {time.monotonic() - self.since:.1f} s")
        stood = "; ".join(self.ends) or "never"
        events = ", ".join(f"{number} x {what}" for what, number in self.events.items())
        return {"stream": self.how, "stood": stood, "events": events or "none"}


def end(process: "subprocess.Popen[bytes]", seconds: float) -> int:
    """The exit status of a process that has so long to end by itself."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    return process.wait()


# Mailroom as it is, with a line of urllib3's own log for each request.
COUNTED = """import logging, runpy, sys
logging.basicConfig()
logging.getLogger("urllib3").setLevel("DEBUG")
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")"""
REQUEST = re.compile(r"^DEBUG:urllib3\.connectionpool:http", re.MULTILINE)


class Mailroom:
    """`python mailroom.py` with the user's access to the account and the names made here."""

    def __init__(self, program: Path, home: Path) -> None:
        self.program, self.log, self.output = program, home / "log", home / "out"
        self.process: subprocess.Popen[bytes] | None = None
        self.log.touch()
        # No Ctrl-C comes here, so that no process is started that nobody knows of.
        self.apart: gevent.Greenlet[..., Any] = gevent.spawn(bool)

    def serve(self) -> None:
        self.apart = gevent.spawn(self._serve)
        self.apart.get()

    def _serve(self) -> None:
        self.process = self.start(self.log)

    def check(self) -> None:
        """Raises LiveError when it serves no longer."""
        if self.process and (status := self.process.poll()) is not None:
            raise LiveError(f"mailroom has ended with status {status}")

    def stop(self) -> None:
        """Let what was begun come to its end, and end what has none."""
        self.apart.join(COMMAND_SECONDS)
        if self.process:
            self.process.terminate()
            end(self.process, STOP_SECONDS)

    def start(self, log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
        """Mailroom with the user's access and with the names made here. In a session of its own: a
        Ctrl-C is for this program alone, which goes on to clean up."""
        kept = {name: value for name, value in os.environ.items() if USERS.fullmatch(name)}
        given: Any = {"env": kept | OWN, "start_new_session": True}
        counted = [] if arguments else ["-c", COUNTED]
        command: list[Any] = [sys.executable, *counted, self.program, *arguments]
        with log.open("wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, **given)

    def command(self, *arguments: str) -> list[str]:
        """What a command prints. Interrupted, it goes on to its end: what it makes is found."""
        self.apart = gevent.spawn(self._command, *arguments)
        status = self.apart.get()
        lines = self.output.read_text(errors="replace").splitlines()
        if status not in (0, int(arguments == ("setup",))):  # 1: something is missing
            raise LiveError(f"{arguments}: status {status}: {'; '.join(lines[-3:])}")
        return lines

    def _command(self, *arguments: str) -> int:
        return end(self.start(self.output, *arguments), COMMAND_SECONDS)

    def present(self) -> list[str]:
        """What there is that is called like what is made here."""
        return [line for line in self.command("setup") if re.search(r"^there |: there is ", line)]

    def requests(self) -> int:
        return len(REQUEST.findall(self.log.read_text(errors="replace")))

    def lines(self) -> list[JSON]:
        *lines, _ = self.log.read_text(errors="replace").split("\n")
        return [json.loads(line) for line in lines if line.startswith("{")]

    def logged(self, event: str) -> list[JSON]:
        return [line for line in self.lines() if line["event"] == event]

    def complaints(self) -> list[str]:
        """What Mailroom has warned of, and what it ended with."""
        return [f"log        {json.dumps(e)}" for e in self.lines() if e["level"] in LOUD][-9:]
