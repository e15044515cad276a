"""What `nox -s live` works with: the names of all that it makes, the user's phone, an ear on the
event stream, and Mailroom as a process. What they tell goes into a report: it has no secret in it.
"""

import mailroom  # noqa: I001  (its import is the monkey patch)

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import gevent
import requests
import urllib3

JSON = dict[str, Any]
CORE, MAIL, CONTACTS = (f"urn:ietf:params:jmap:{name}" for name in ("core", "mail", "contacts"))
TIMEOUT, QUIET, MAX_PAUSE, COMMAND_SECONDS, STOP_SECONDS = 60, 95, 60, 120, 10
LOUD = ("warning", "error", "critical")
# What is made in the account; whatever is called so is taken out again.
PREFIX = "Mailroom test "
SCREENER, FEED, JAIL = (PREFIX + name for name in ("Screener", "Feed", "Jail"))
TO_FEED, TO_JAIL, UNDO = (PREFIX + name for name in ("@ToFeed", "@ToJail", "@ToScreener"))
ERROR, WARNING, GROUP = (PREFIX + name for name in ("@Error", "@Warning", "made"))
NAMES = {SCREENER, FEED, JAIL, TO_FEED, TO_JAIL, UNDO, ERROR, WARNING, GROUP}
SENDER, ADDRESS = PREFIX + "sender", "sender@mailroom-test.example"
KEYS = ("name", "label", "contact_group", "destination_mailbox")
ROWS = ((FEED, TO_FEED, FEED, FEED), (JAIL, TO_JAIL, JAIL, JAIL))
OWN = {
    "SCREENER_MAILBOX": SCREENER,
    "LABEL_MAILROOM_ERROR": ERROR,
    "LABEL_MAILROOM_WARNING": WARNING,
    "LABEL_UNDO": UNDO,
    "PROVENANCE_GROUP": GROUP,
    "TRIAGE_CATEGORIES": json.dumps([dict(zip(KEYS, row, strict=True)) for row in ROWS]),
    "HEALTH_PORT": "0",
    "LOG_LEVEL": "debug",
    "LOG_FORMAT": "json",
}
# The user's variables that hold for the test, too.
USERS = re.compile("(?!MAILROOM_).*|MAILROOM_((JMAP|CARDDAV)_.*|POLL_INTERVAL|DEBOUNCE_SECONDS)")


class LiveError(Exception):
    """What did not happen, or cannot be done; one line without a secret."""


class JMAP:
    """The user's phone: one call at a time. Raises LiveError for whatever is not as it should."""

    def __init__(self, settings: mailroom.MailroomSettings) -> None:
        self.settings, self.http, url = settings, self.new_http(settings), settings.jmap_url
        is_bare = urlsplit(url).path in ("", "/")
        url = urljoin(url, "/.well-known/jmap") if is_bare else url
        reply = self._ask("the session", "GET", url)
        self.session: JSON = reply.json()
        named = {key: url for key, url in self.session.items() if key.endswith("Url") and url}
        self.urls = {key: urljoin(reply.url, url) for key, url in named.items()}
        hosts = {urlsplit(url)[:2] for url in [reply.url, *self.urls.values()]}
        if len(hosts) > 1 and any(scheme != "https" for scheme, _ in hosts):
            raise LiveError("the session names a URL that is not https")
        offers = CONTACTS in self.session["primaryAccounts"]
        self.has_cards = offers and not settings.carddav_username

    @staticmethod
    def new_http(settings: mailroom.MailroomSettings) -> requests.Session:
        """A session with the credentials."""

        def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
            request.headers["Authorization"] = f"Bearer {settings.jmap_token}"
            return request  # a header of the session would be replaced by what ~/.netrc has

        http, login = requests.Session(), (settings.jmap_username, settings.jmap_token)
        http.auth = login if settings.jmap_username else sign
        http.trust_env = settings.jmap_url.startswith("https:")
        http.verify = os.environ.get("SSL_CERT_FILE") or True
        return http

    def _ask(self, what: str, verb: str, url: str, **named: Any) -> requests.Response:
        try:
            reply = self.http.request(verb, url, timeout=TIMEOUT, **named)
            reply.raise_for_status()
            reply.json()
        except (requests.RequestException, ValueError) as error:
            said = getattr(error, "response", None)
            status = "" if said is None else f" {said.status_code}"
            raise LiveError(f"{what}: {type(error).__name__}{status}") from None
        return reply

    def redact(self, text: str) -> str:
        """The text without what is nobody else's business."""
        settings = self.settings
        private = [settings.jmap_token, settings.carddav_password, self.session.get("username")]
        private += [settings.jmap_username, settings.carddav_username, *self.session["accounts"]]
        for secret in filter(None, private):
            text = text.replace(secret, "[secret]")
        return text

    def call(self, method: str, **arguments: Any) -> JSON:
        """The answer to a call in which no object was refused."""
        urn = CONTACTS if method.startswith("ContactCard") else MAIL
        given = {"accountId": self.session["primaryAccounts"][urn], **arguments}
        body = {"using": [CORE, urn], "methodCalls": [[method, given, "0"]]}
        reply = self._ask(method, "POST", self.urls["apiUrl"], json=body).json()
        name, answer, _ = reply["methodResponses"][0]
        refused = [answer.get(key) or {} for key in ("notCreated", "notUpdated", "notDestroyed")]
        for error in (
            [answer] if name == "error" else [e for all_ in refused for e in all_.values()]
        ):
            raise LiveError(f"{method}: {error.get('type')} {error.get('description') or ''}")
        return dict(answer)

    def put(self, subject: str, mailbox: str) -> str:
        """The id of a new message of the made-up sender (RFC 8620 6.1, RFC 8621 4.8)."""
        mail = EmailMessage(SMTP)  # with CRLF, as Cyrus demands
        mail["From"], mail["Subject"], mail["Date"] = f"{SENDER} <{ADDRESS}>", subject, formatdate()
        mail["Message-ID"] = f"<{uuid.uuid4()}@mailroom-test.example>"
        mail.set_content("A message of Mailroom's own test, to be deleted.\n")
        url = self.urls["uploadUrl"].replace("{accountId}", self.session["primaryAccounts"][MAIL])
        kind = {"Content-Type": "message/rfc822"}
        blob = self._ask("upload", "POST", url, data=bytes(mail), headers=kind).json()["blobId"]
        given = {"blobId": blob, "mailboxIds": {mailbox: True}, "keywords": {"$seen": True}}
        return str(self.call("Email/import", emails={"m": given})["created"]["m"]["id"])

    def boxes(self) -> dict[str, str]:
        """{name: id} of the mailboxes that are called as those made here."""
        found = self.call("Mailbox/get", ids=None, properties=["id", "name"])["list"]
        return {box["name"]: box["id"] for box in found if box["name"] in NAMES}

    def cards(self) -> list[JSON]:
        """The contact with the made-up address, and the groups called as those made here; none
        where contacts are not kept over JMAP."""
        found: list[JSON] = []
        for where in ({"email": ADDRESS}, {"kind": "group"}) if self.has_cards else ():
            ids = self.call("ContactCard/query", filter=where)["ids"]
            found += self.call("ContactCard/get", ids=ids)["list"] if ids else []
        return [card for card in found if name_of(card) in NAMES or ADDRESS in addresses(card)]


def name_of(card: JSON) -> str:
    """The name of a group, empty for a contact."""
    return str((card.get("name") or {}).get("full")) if card.get("kind") == "group" else ""


def addresses(card: JSON) -> list[str]:
    return [each.get("address", "") for each in (card.get("emails") or {}).values()]


class Stream:
    """What comes on the event stream, on a connection beside Mailroom's."""

    def __init__(self, jmap: JMAP) -> None:
        self.http, url = jmap.new_http(jmap.settings), jmap.urls.get("eventSourceUrl", "")
        self.how, self.since, self.ends = "none is offered", 0.0, list[str]()
        self.events: Counter[str] = Counter()
        values = {"types": "Email,Mailbox", "closeafter": "no", "ping": "30"}
        if url and "{" not in url:
            url += ("&" if "?" in url else "?") + "&".join(f"{key}={{{key}}}" for key in values)
        self.url = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], ""), url)

    def run(self) -> None:
        """Connect again and again, ever more slowly."""
        while self.url:
            end, self.since = "closed", 0.0
            try:
                self._follow()
            except (OSError, urllib3.exceptions.HTTPError) as error:
                end = type(error).__name__
            stood = time.monotonic() - self.since if self.since else 0
            self.ends.append(f"{end} after {stood:.1f} s")
            self.since = 0.0
            gevent.sleep(min(2 ** len(self.ends), MAX_PAUSE))

    def _follow(self) -> None:
        """Count what comes on one connection; nothing of the account's goes into the report."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        with self.http.get(self.url, headers=headers, stream=True, timeout=QUIET) as reply:
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
        still = [f"open for {time.monotonic() - self.since:.1f} s"] if self.since else []
        events = ", ".join(f"{number} x {what}" for what, number in self.events.items())
        stood = "; ".join(self.ends + still)
        return {"stream": self.how, "stood": stood or "never", "events": events or "none"}


class Mailroom:
    """`python mailroom.py` with the user's access to the account and the names made here."""

    def __init__(self, program: Path, home: Path) -> None:
        self.program, self.log, self.output = program, home / "log", home / "out"
        self.process: subprocess.Popen[bytes] | None = None
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
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
            self.process.kill()
            self.process.wait()

    def start(self, log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
        """Mailroom with the user's access and with the names made here. In a session of its own: a
        Ctrl-C is for this program alone, which goes on to clean up."""
        given = {name: value for name, value in os.environ.items() if USERS.fullmatch(name)}
        given |= {f"MAILROOM_{name}": value for name, value in OWN.items()}
        command: list[Any] = [sys.executable, self.program, *arguments]
        with log.open("wb") as file:
            return subprocess.Popen(
                command, env=given, stdout=file, stderr=file, start_new_session=True
            )

    def command(self, *arguments: str) -> list[str]:
        """What a command prints. Interrupted, it still goes on to its end: what it makes has to be
        there when it is looked for."""
        self.apart = gevent.spawn(self._command, *arguments)
        status = self.apart.get()
        lines = self.output.read_text(errors="replace").splitlines()
        if status not in (0, int(arguments == ("setup",))):  # 1: something is missing
            raise LiveError(f"{arguments}: status {status}: {'; '.join(lines[-3:])}")
        return lines

    def _command(self, *arguments: str) -> int:
        process = self.start(self.output, *arguments)
        with suppress(subprocess.TimeoutExpired):
            process.wait(COMMAND_SECONDS)
        process.kill()
        return process.wait()

    def present(self) -> list[str]:
        """What there is that is called like what is made here."""
        return [line for line in self.command("setup") if re.search(r"^there |: there is ", line)]

    def lines(self) -> list[JSON]:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        found = text[: text.rfind("\n") + 1].splitlines()
        return [json.loads(line) for line in found if line.startswith("{")]

    def logged(self, event: str) -> list[JSON]:
        return [line for line in self.lines() if line["event"] == event]

    def complaints(self) -> list[str]:
        """What Mailroom has warned of, and what it ended with."""
        return [f"log        {json.dumps(e)}" for e in self.lines() if e["level"] in LOUD][-9:]
