# /// script
# requires-python = ">=3.11"
# dependencies = ["environs>=14.2", "gevent>=24.10", "requests>=2.32", "sseclient-py>=1.8"]
# ///
"""Mailroom: one tap of a label triages a whole sender.

Put a triage label (say `@ToFeed`) on one mail. Mailroom hears of it over JMAP push, puts the
sender into the contact group `Feed`, files the sender's mails into `Feed` and takes the label off.
The labels are the queue, the mails and contact groups are the state; nothing is stored here.

    EventSource stream --> sse_listener --> event queue --> debounce --+
                                                                       +--> one triage cycle
    poll timer (fallback, and a safety net while push is up) ----------+

A cycle reads the mailbox as it is, decides with pure functions (`plan_sender`) and then writes in
an order in which stopping anywhere loses nothing (`STEPS`): contacts, mails, and last the label.
Whatever was missed or failed, the next cycle sees.

Read this file from top to bottom: settings, logs, the triage rules, HTTP, JMAP, contacts, push, the
account, the cycle, the service, and then what is done beside it: rules for mail to come, setup,
reset. A section needs only those above it. Run it with `python mailroom.py`, or see
`python mailroom.py --help`.
"""

import os
import signal
import sys

# Of a script Python keeps the syntax tree until it ends, 10 MB; of a module it does not. So what is
# started as `python mailroom.py`, and in no more elaborate way, starts itself as that.
if (
    (__name__, sys.argv) == ("__main__", sys.orig_argv[1:])
    and __file__.endswith("/mailroom.py")
    and os.pathsep not in __file__
):
    _places = [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _places))
    _command = [sys.executable, "-P", "-m", "mailroom", *sys.argv[1:]]
    os.execv(sys.executable, _command)  # noqa: S606  (it is this very program)

# Until there is something to stop in good order: Python would print a traceback, and the first
# process of a container would not hear a signal at all.
if __name__ == "__main__":
    for _signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_signal, lambda *_: os._exit(0))

# The sockets are patched before anything imports them: a blocked read is then a greenlet that
# gives way to the others and can be killed.
from gevent import monkey

monkey.patch_all()

import argparse
import codecs
import ctypes
import errno
import io
import ipaddress
import json
import logging
import queue
import random
import re
import socket
import time
import uuid
import warnings
from base64 import b64encode
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from http.cookiejar import DefaultCookiePolicy
from itertools import chain, combinations, count, islice
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, quote, quote_plus, urljoin, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import gevent
import gevent.event
import gevent.pywsgi
import gevent.queue
import requests
import urllib3
from environs import Env, FileAwareEnv
from requests.auth import AuthBase, HTTPBasicAuth
from sseclient import SSEClient

VERSION = "1.0"
JSON = dict[str, Any]
# The errors that say that some input is not what it should be. environs raises ValueErrors,
# ElementTree SyntaxErrors; OSError is a file's.
MALFORMED = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    SyntaxError, OSError,
)  # fmt: skip
LEVELS = ("debug", "info", "warning", "error")
LOG = logging.getLogger("mailroom")
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------


class MailroomError(Exception):
    """Something a person can act on. Its text is one line: what was wrong, and what to do.

    `answered`: it is not that the server is out of reach or in trouble; `retry_after`: the seconds
    the server wants to be left alone.
    """

    answered = True
    retry_after = 0.0


class ConfigurationError(MailroomError):
    """Settings, credentials or the account are not fit for use; before the first cycle has
    succeeded it ends the program with status 2. `problems` holds one line for each thing wrong."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class ServerError(MailroomError):
    """A server could not be reached or did not do what was asked; worth another try. `answered`: it
    was this very request that the server turned down, so that another may do better."""

    def __init__(self, text: str, *, answered: bool = False, retry_after: float = 0) -> None:
        super().__init__(text)
        self.answered = answered
        self.retry_after = retry_after


class ShuttingDown(MailroomError):  # noqa: N818  (a reason to stop, not an error)
    """Raised in place of the next request once the program was asked to stop."""


# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _name(value: Any) -> bool:
    return _text(value) and bool(value.strip())


def _token(value: Any) -> bool:
    return _name(value) and value.isascii() and " " not in value


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, bool) and low <= value <= high


def _one_of(*words: Any) -> Callable[[Any], bool]:
    return lambda value: value in words


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_safe_url(url: Any) -> bool:
    """Whether a secret may be sent there: https, or plain http to a loopback address. A URL that
    programs may read in different ways is not safe, nor one that has a secret in itself."""
    if not isinstance(url, str) or not re.fullmatch(
        r"https?://[^\s\\@/?#]+([/?#][!-\[\]-~]*)?", url
    ):
        return False
    try:
        host, port = urlsplit(url).hostname or "", urlsplit(url).port
        if port == 0 or url.startswith("https:"):
            return port != 0 and bool(host)
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Category:
    """One way to triage a sender. Names are those the user sees; `parent` is a category's name."""

    name: str
    label: str
    contact_group: str
    destination_mailbox: str
    parent: str = ""
    contact_type: str = "company"
    add_to_inbox: bool = False

    @property
    def undoes(self) -> bool:
        """Whether this is what the undo label asks for, which has no name."""
        return not self.name


DEFAULT_CATEGORIES: list[Any] = [
    {"name": "Imbox", "add_to_inbox": True},
    "Feed",
    "Paper Trail",
    "Jail",
    {"name": "Person", "parent": "Imbox", "contact_type": "person"},
    {"name": "Billboard", "parent": "Paper Trail"},
    {"name": "Truck", "parent": "Paper Trail"},
]


# {key: (whether a value is accepted, what is)}
CATEGORY_KEYS = {
    "name": (_name, "a name"),
    "label": (_name, "a name"),
    "contact_group": (_name, "a name"),
    "destination_mailbox": (_name, "a name"),
    "parent": (_text, "the name of a category"),
    "contact_type": (_one_of("company", "person"), "company or person"),
    "add_to_inbox": (_flag, "true or false"),
}
UNKNOWN_KEY = (_one_of(), "one of " + ", ".join(CATEGORY_KEYS))


def parse_category(entry: Any) -> Category:
    """A category from an entry of the list: a name or an object. Raises ConfigurationError."""
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or "name" not in given:
        raise ConfigurationError(f"{entry!r} is neither a name nor an object with a name")
    name, problems = given["name"], []
    for key, value in given.items():
        fits, accepts = CATEGORY_KEYS.get(key, UNKNOWN_KEY)
        if not fits(value):
            problems.append(f"{name!r}: {key}={value!r} is not {accepts}")
    if problems:
        raise ConfigurationError(*problems)
    label = "@To" + "".join(name.split())
    names = {"label": label, "contact_group": name, "destination_mailbox": name}
    return Category(**{**names, **given})


def parse_categories(entries: Collection[Any]) -> tuple[tuple[Category, ...], list[str]]:
    """(the categories of the list, what is wrong with its other entries)."""
    categories: list[Category] = []
    problems = [] if entries else ["there is no category"]
    for entry in entries:
        try:
            categories.append(parse_category(entry))
        except ConfigurationError as error:
            problems += error.problems
    return tuple(categories), problems


def ancestors(category: Category, categories: Iterable[Category]) -> list[Category]:
    """The parents of a category, nearest first; ends where one is unknown or comes again."""
    by_name = {each.name: each for each in categories}
    family = [category]
    while (parent := by_name.get(family[-1].parent)) and parent not in family:
        family.append(parent)
    return family[1:]


def category_problems(categories: Sequence[Category], reserved: Iterable[str]) -> Iterator[str]:
    """All that is wrong with a set of categories, one line each. `reserved`: the names of the
    Screener, the error and warning labels and the provenance group."""
    names, labels = [each.name for each in categories], [each.label for each in categories]
    yield from (f"the name {name} comes twice" for name, n in Counter(names).items() if n > 1)
    yield from (f"the label {name} comes twice" for name, n in Counter(labels).items() if n > 1)
    taken = {name.casefold() for name in reserved}
    destinations = {each.destination_mailbox.casefold() for each in categories}
    for each in categories:
        if each.parent and each.parent not in names:
            yield f"{each.name}: there is no parent {each.parent}"
        elif any(above.parent == each.name for above in [each, *ancestors(each, categories)]):
            yield f"{each.name} is its own ancestor"
        if each.destination_mailbox.casefold() == "inbox":
            yield f'{each.name}: the destination is the Inbox; say "add_to_inbox": true instead'
        for used in sorted({each.label, each.contact_group, each.destination_mailbox}):
            if used.casefold() in taken:
                yield f"{each.name}: {used} is the name of something else of Mailroom's"
        if each.label.casefold() in destinations | {"inbox"}:
            yield f"{each.name}: the label {each.label} is also a destination"
    for one, other in combinations(categories, 2):
        related = one in ancestors(other, categories) or other in ancestors(one, categories)
        same = one.contact_group.casefold() == other.contact_group.casefold()
        if same and one.name != other.name and not related:
            yield f"{one.name} and {other.name} share the group {one.contact_group}"


class Setting(NamedTuple):
    """A row of the settings table: the environs parser, the default (`...`: required), what the
    user is told is accepted, and whether a parsed value is."""

    parser: str
    default: Any
    accepts: str
    fits: Callable[[Any], bool]
    secret: bool = False


def default_log_format() -> str:
    """For people on a terminal, for programs elsewhere."""
    return "text" if sys.stderr.isatty() else "json"


SAFE_URL = "an https:// address (http:// only to this machine itself) without a user name"
MAILBOX = "the name of a mailbox"


def setting(*row: Any) -> Any:
    """A row of the table; the type checker is told of the setting's value in its place."""
    return Setting(*row)


class MailroomSettings:
    """The settings, read from the environment when constructed; keyword arguments override it.

    Each is the variable `MAILROOM_` and its name in upper case; empty counts as not set. Raises
    ConfigurationError with a line for every bad setting, TypeError for a keyword that is none.
    """

    jmap_token: str = setting("str", ..., "an API token", _token, True)
    jmap_url: str = setting("str", "https://api.fastmail.com/jmap/session", SAFE_URL, is_safe_url)
    jmap_username: str = setting("str", "", "a user name", _text)
    carddav_username: str = setting("str", "", "a user name", _text)
    carddav_password: str = setting("str", "", "a password", _text, True)
    carddav_url: str = setting("str", "https://carddav.fastmail.com", SAFE_URL, is_safe_url)
    poll_interval: int = setting("int", 60, "whole seconds, 1 to 86400", _number(0.01, 86400))
    debounce_seconds: float = setting("float", 3.0, "seconds, 0 to 600", _number(0, 600))
    log_level: str = setting("str", "info", f"one of {', '.join(LEVELS)}", _one_of(*LEVELS))
    log_format: str = setting("str", default_log_format, "json or text", _one_of("json", "text"))
    screener_mailbox: str = setting("str", "Screener", MAILBOX, _name)
    label_mailroom_error: str = setting("str", "@MailroomError", MAILBOX, _name)
    label_mailroom_warning: str = setting("str", "@MailroomWarning", MAILBOX, _name)
    label_undo: str = setting("str", "@ToScreener", MAILBOX, _name)
    warnings_enabled: bool = setting("bool", True, "true or false", _flag)
    provenance_group: str = setting("str", "Mailroom", "the name of a contact group", _name)
    triage_categories: tuple[Category, ...] = setting(
        "json", DEFAULT_CATEGORIES, "a JSON list of categories", lambda value: type(value) is list
    )
    health_host: str = setting("str", "127.0.0.1", "an address to listen on", _name)
    health_port: int = setting("int", 8080, "a port, or 0 for none", _number(0, 65535))

    def __init__(self, **overrides: Any) -> None:
        if unknown := overrides.keys() - SETTINGS.keys():
            raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
        problems: list[str] = []
        for name, row in SETTINGS.items():
            try:
                setattr(self, name, read_setting(name, overrides))
            except ConfigurationError as error:
                problems += error.problems
                setattr(self, name, row.default)
        if problems := [*problems, *self._check_together()]:
            raise ConfigurationError(*problems)

    def _check_together(self) -> Iterator[str]:
        if self.carddav_username and not self.carddav_password:
            yield "MAILROOM_CARDDAV_USERNAME is set: give MAILROOM_CARDDAV_PASSWORD too"
        own = ("screener_mailbox", "label_mailroom_error", "label_mailroom_warning", "label_undo")
        reserved = [getattr(self, name) for name in own]
        if len({name.casefold() for name in reserved}) < len(reserved):
            shown = (f"MAILROOM_{name.upper()}={getattr(self, name)!r}" for name in own)
            yield f"{', '.join(shown)}: give each a name of its own"
        for name, value in zip(own, reserved, strict=True):
            if value.casefold() == "inbox":
                yield f"MAILROOM_{name.upper()}={value!r}: give another, the Inbox is yours"
        reserved.append(self.provenance_group)
        self.triage_categories, problems = parse_categories(self.triage_categories)
        for problem in [*problems, *category_problems(self.triage_categories, reserved)]:
            yield f"MAILROOM_TRIAGE_CATEGORIES: {problem}"

    @property
    def undo(self) -> Category:
        """What the undo label asks for: no group, and the Screener."""
        return Category("", self.label_undo, "", self.screener_mailbox)

    def __repr__(self) -> str:
        shown = (f"{n}={getattr(self, n)!r}" for n, row in SETTINGS.items() if not row.secret)
        return f"MailroomSettings({', '.join(shown)})"

    def shown(self, text: str) -> str:
        """A text without secrets, and short enough: in this order, or half a secret would stay."""
        text = self.redact(text)
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."

    def redact(self, text: str) -> str:
        """The text with every secret in it blotted out, in whatever form."""
        forms: set[str] = set()
        for secret in filter(None, (self.jmap_token, self.carddav_password)):
            forms |= written_forms(secret, {self.jmap_username, self.carddav_username})
        # The longest first, or one that another begins with would leave the rest of it.
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "[secret]")
        return text


def written_forms(secret: str, users: Iterable[str]) -> set[str]:
    """A secret as it may come in a text: plain, in a header, as JSON, Python and URLs write it, and
    as the password of HTTP Basic."""
    plain = {secret, secret.encode().decode("latin-1")}
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    escaped |= {repr(secret)[1:-1], quote(secret), quote(secret, ""), quote_plus(secret)}
    return plain | escaped | {b64encode(f"{user}:{secret}".encode()).decode() for user in users}


SETTINGS = {n: row for n, row in vars(MailroomSettings).items() if isinstance(row, Setting)}


def read_setting(name: str, overrides: Mapping[str, Any]) -> Any:
    """One setting's value, from the overrides, the environment or the defaults.

    Raises ConfigurationError that names the variable, its value (never a secret's) and what is
    accepted.
    """
    variable, row = f"MAILROOM_{name.upper()}", SETTINGS[name]
    env = FileAwareEnv(strip_whitespace=True) if row.secret else Env()
    try:
        if name in overrides:
            value = overrides[name]
        elif env.str(variable, ""):
            value = getattr(env, row.parser)(variable)
        else:
            value = row.default() if callable(row.default) else row.default
        if row.fits(value):
            return value
    except MALFORMED:
        value = overrides.get(name, os.environ.get(variable))
    source = os.environ.get(f"{variable}_FILE", "")
    # Without a slash it may be the secret itself, given in the wrong variable.
    shown = (f" (in the file {source!r})" if "/" in source else "") if row.secret else f"={value!r}"
    if row.fits is is_safe_url:  # It may have a user's name and password in it.
        shown = re.sub("^=.*@", "='[secret]@", shown)
    or_file = f", or in {variable}_FILE the path of its file" if row.secret else ""
    raise ConfigurationError(f"{variable}{shown}: give {row.accepts}{or_file}")


# ------------------------------------------------------------------------------------------------
# Logs
# ------------------------------------------------------------------------------------------------

# What could end a line of a log or a vCard, or command a terminal.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# A server's text is kept up to so many characters, to save memory, and shown up to so many.
MAX_SAID = 10_000
MAX_SHOWN = 500


def now_iso() -> str:
    """The time as RFC 3339 has it, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def fields(**values: Any) -> JSON:
    """What goes with a log message, as the `extra` of a logging call."""
    return {"fields": values}


class LogFormatter(logging.Formatter):
    """A record as one line: JSON for programs, or text for people; no secret gets through."""

    def __init__(self, settings: MailroomSettings) -> None:
        super().__init__()
        self._as_json = settings.log_format == "json"
        self._settings = settings

    def format(self, record: logging.LogRecord) -> str:
        values = {"event": record.getMessage(), **getattr(record, "fields", {})}
        values = {
            key: self._settings.shown(value) if isinstance(value, str) else value
            for key, value in values.items()
        }
        level = record.levelname.lower()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        trace = self._settings.redact(trace)
        trace = "\n".join(CONTROLS.sub(" ", line) for line in trace.split("\n"))
        if self._as_json:
            traceback = {"traceback": trace} if trace else {}
            return json.dumps({"time": now_iso(), "level": level, **values, **traceback})
        event = CONTROLS.sub(" ", values.pop("event"))
        told = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        line = f"{datetime.now():%H:%M:%S} {level:7} {event}  {told}".rstrip()
        return "\n".join(filter(None, [line, trace]))


def start_logging(settings: MailroomSettings) -> None:
    """Send the log to stderr, and nothing else: a cookie can make Python's library warn there."""
    warnings.filterwarnings("ignore", module="http.cookiejar")
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(settings))
    LOG.handlers[:] = [handler]
    LOG.propagate = False
    LOG.setLevel(settings.log_level.upper())


# ------------------------------------------------------------------------------------------------
# The triage rules: plain values in, plain values out
# ------------------------------------------------------------------------------------------------

CREATED_NOTE = "Created by Mailroom"
UIDS_IN_LINE = 9
MailPatch = dict[str, bool | None]


@dataclass(frozen=True, slots=True)
class Mail:
    """What triage has to know of a mail. `sender`: the first From address in lower case, empty
    where there is none; `mailboxes`: ids; `received`: a UTCDate (RFC 8620 section 1.4)."""

    id: str
    sender: str
    display_name: str
    mailboxes: frozenset[str]
    received: str = ""

    def patched(self, patch: MailPatch) -> "Mail":
        """The mail as it is once the patch is applied."""
        changed = {path.removeprefix("mailboxIds/"): stays for path, stays in patch.items()}
        added = {box for box, stays in changed.items() if stays}
        return replace(self, mailboxes=(self.mailboxes | added) - (changed.keys() - added))


@dataclass(frozen=True, slots=True)
class Card:
    """A contact, or a group of contacts, wherever it is kept. `ref` is the store's own handle,
    `notes` its texts by the store's own keys, `members` the uids of a group's contacts."""

    uid: str
    ref: str
    name: str = ""
    emails: frozenset[str] = frozenset()
    notes: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    is_group: bool = False
    members: frozenset[str] = frozenset()

    @property
    def note_lines(self) -> list[str]:
        return [line for text in self.notes.values() for line in text.splitlines()]


@dataclass(frozen=True)
class CardChange:
    """What to do with one card. Without `card` one is made, of the `kind` "company", "person" or
    "group"; with an empty kind nothing is done. `name` goes to a card that has none, `note` are
    lines to add, `clean` takes Mailroom's own lines out of the notes, `destroy` the whole card
    away, `add` and `remove` are the uids that join or leave a group."""

    uid: str
    card: Card | None = None
    kind: str = "company"
    address: str = ""
    name: str = ""
    note: tuple[str, ...] = ()
    clean: bool = False
    destroy: bool = False
    add: frozenset[str] = frozenset()
    remove: frozenset[str] = frozenset()

    @property
    def fate(self) -> str:
        """What becomes of the card, in a word."""
        if not self.card:
            return "created" if self.kind else "none"
        return "deleted" if self.destroy else "known"


@dataclass(frozen=True)
class Boxes:
    """The ids of the mailboxes that Mailroom works with. `labels`: {id: its category}, the undo
    label among them where there is one; `destinations`: {category: id}; `warning` is empty when
    warnings are off."""

    inbox: str
    screener: str
    error: str
    warning: str
    labels: Mapping[str, Category]
    destinations: Mapping[Category, str]

    @property
    def managed(self) -> frozenset[str]:
        """What a sender's mails may be taken out of: the Screener and all destinations."""
        return frozenset({self.screener, *self.destinations.values()})

    def label_of(self, category: Category) -> str:
        return next(box for box, each in self.labels.items() if each == category)

    @property
    def queue(self) -> frozenset[str]:
        """Where a cycle looks for work: the triage labels and the error label."""
        return frozenset({*self.labels, self.error})


@dataclass(frozen=True)
class Rules:
    """What triage decides by: the categories, the provenance group, and the date for notes."""

    categories: tuple[Category, ...]
    provenance_group: str
    today: date

    def family(self, category: Category) -> list[Category]:
        """The category and its ancestors: a sender belongs to all of them."""
        return [category, *ancestors(category, self.categories)]

    def is_managed(self, card: Card) -> bool:
        """Whether a card is a category's group."""
        return card.is_group and card.name in {each.contact_group for each in self.categories}

    def is_own(self, card: Card) -> bool:
        """Whether a card is a group of Mailroom's: a category's, or that of provenance."""
        return self.is_managed(card) or (card.is_group and card.name == self.provenance_group)

    def foreign_groups(self, cards: Iterable[Card]) -> list[Card]:
        """The user's own groups."""
        return [card for card in cards if card.is_group and not self.is_own(card)]


@dataclass(frozen=True)
class SenderPlan:
    """All that a cycle does for one sender (see `STEPS`): what becomes of the contact, the groups
    to join and those to leave, the patches that re-file the mails and those that then take the
    labels off, each {mail id: patch}. `leaving` are the uids that leave: the contact's, and when
    triage is taken back those of all that the sender has."""

    sender: str
    category: Category
    contact: CardChange
    join: tuple[Card, ...]
    leave: tuple[Card, ...]
    leaving: frozenset[str]
    refile: Mapping[str, MailPatch]
    finish: Mapping[str, MailPatch]
    name_differs: bool


class Writes(NamedTuple):
    """What a step of carrying out plans writes: changes of cards, and patches by mail id."""

    cards: Sequence[CardChange] = ()
    mails: Mapping[str, MailPatch] = {}


def mail_patch(mail: Mail, add: Iterable[str], remove: Iterable[str]) -> MailPatch:
    """The Email/set patch (RFC 8621 section 4.6) that adds a mail to and removes it from mailboxes;
    empty when nothing has to change.

    A patch that takes a mailbox away always names one that stays: a server may otherwise delete a
    mail that has meanwhile left all others. So a mail is never taken out of its only mailbox.
    """
    added = set(add)
    stays = (mail.mailboxes | added) - set(remove)
    gone = mail.mailboxes - stays
    if not stays or not (gone or added - mail.mailboxes):
        return {}
    named = sorted(added & stays or {min(stays)})
    return {f"mailboxIds/{box}": True for box in named} | {
        f"mailboxIds/{box}": None for box in sorted(gone)
    }


def sort_queue(
    mails: Iterable[Mail], boxes: Boxes, own: Collection[str]
) -> tuple[dict[str, Category], dict[str, str]]:
    """What the labels ask for: {sender: category}, and {mail id: why what it asks for cannot be
    done}. `own`: the user's addresses."""
    labelled = [mail for mail in mails if mail.mailboxes & boxes.labels.keys()]
    asked: dict[str, set[str]] = defaultdict(set)
    for mail in labelled:
        asked[mail.sender] |= mail.mailboxes & boxes.labels.keys()
    wrong = {who: f"several labels for {who}" for who, labels in asked.items() if len(labels) > 1}
    wrong |= dict.fromkeys(asked.keys() & {*own}, "the sender is the user")
    wrong |= {who: "it has no sender" for who in asked if not who}
    decided = {who: boxes.labels[min(asked[who])] for who in asked if who not in wrong}
    return decided, {mail.id: wrong[mail.sender] for mail in labelled if mail.sender in wrong}


def error_patches(
    mails: Iterable[Mail], decided: Collection[str], unusable: Collection[str], boxes: Boxes
) -> dict[str, MailPatch]:
    """{mail id: patch}: the error label for the unusable mails, and no longer for those that have
    ceased to be; the decided senders' own plans see to theirs."""
    return {
        mail.id: mail_patch(mail, [boxes.error], [])
        if mail.id in unusable
        else mail_patch(mail, [], [boxes.error])
        for mail in mails
        if mail.sender not in decided
    }


def own_uids(what: str) -> Iterator[str]:
    """The uids that Mailroom gives to the cards that it makes for a URI, in their order."""
    return (uuid.uuid5(uuid.NAMESPACE_URL, f"{what}?mailroom={n}").urn for n in count())


def contact_uid(address: str, taken: Collection[str] = ()) -> str:
    """The uid of a new contact for an address. It is always the same, so that no server makes the
    contact twice; or the next in line if a card has that one, say since the user gave that contact
    another address."""
    return next(uid for uid in own_uids(f"mailto:{address}") if uid not in taken)


def group_uid(name: str, taken: Collection[str] = ()) -> str:
    """The uid of a new contact group, by the same rule."""
    return next(uid for uid in own_uids(f"group:{name}") if uid not in taken)


def clean_note(text: str, newline: str = r"\r?\n") -> str:
    """A note without Mailroom's lines. `newline`: a pattern for what ends a line."""
    own = rf"(?:{CREATED_NOTE}|Triaged to (?:(?!{newline}).)+? on \d{{4}}-\d\d-\d\d)"
    return re.sub(rf"\A(?:{own}(?:{newline}|\Z))+|{newline}{own}(?={newline}|\Z)", "", text)


def find_contact(address: str, contacts: Iterable[Card], managed: Iterable[Card]) -> Card | None:
    """The contact that has exactly this address: one in a managed group before others, then the
    oldest. Groups do not count."""
    grouped = {uid for group in managed for uid in group.members}
    return min(
        (each for each in contacts if address in each.emails and not each.is_group),
        key=lambda contact: (contact.uid not in grouped, contact.created or "~", contact.uid),
        default=None,
    )


def contact_name(display_name: str, contact_type: str) -> str:
    """The name that a contact gets."""
    return full_name(display_name) if contact_type == "person" else " ".join(display_name.split())


def full_name(display_name: str) -> str:
    """A person's display name as it is said: white space folded, `Last, First` turned round."""
    name = " ".join(display_name.split())
    last, comma, first = name.partition(", ")
    return f"{first} {last}" if comma and not re.search("[ ,]", first + last) else name


def split_name(name: str) -> tuple[str, str]:
    """(given name, surname) of a person's full name."""
    given, _, surname = name.rpartition(" ")
    return (given, surname) if given else (surname, "")


def plan_contact(
    sender: str, category: Category, display_name: str, contacts: Collection[Card], rules: Rules
) -> CardChange:
    """The contact's part in a sender's plan: only what is empty is filled, nothing overwritten.
    `contacts`: those with the address, and whoever has the uid that a new one would get."""
    found = find_contact(sender, contacts, filter(rules.is_managed, contacts))
    triaged = f"Triaged to {category.contact_group} on {rules.today.isoformat()}"
    name = contact_name(display_name, category.contact_type)
    if found:
        name = "" if found.name else name
        note = () if triaged in found.note_lines else (triaged,)
        return CardChange(found.uid, found, name=name, note=note)
    return CardChange(
        contact_uid(sender, {card.uid for card in contacts}),
        kind=category.contact_type,
        address=sender,
        name=name or sender,
        note=(CREATED_NOTE, triaged),
    )


def groups_by_name(cards: Iterable[Card]) -> dict[str, Card]:
    """{name: group}; of several with one name the first by uid."""
    groups = (card for card in cards if card.is_group)
    return {group.name: group for group in sorted(groups, key=lambda card: card.uid, reverse=True)}


def plan_groups(
    uid: str, wanted: Collection[str], groups: Collection[Card], rules: Rules
) -> tuple[tuple[Card, ...], tuple[Card, ...]]:
    """(groups to join, groups to leave) so that a contact is in the wanted groups and in no other
    managed one."""
    now = [group for group in groups if uid in group.members]
    missing = set(wanted) - {group.name for group in now}
    first = groups_by_name(groups)
    leave = (group for group in now if rules.is_managed(group) and group.name not in wanted)
    return tuple(first[name] for name in sorted(missing) if name in first), tuple(leave)


def by_group(pairs: Iterable[tuple[Card, str]]) -> list[tuple[Card, frozenset[str]]]:
    """(group, the uids that it is paired with) for each group. A copy of one, in another address
    book, has the same uid."""
    groups: dict[str, Card] = {}
    uids: dict[str, set[str]] = defaultdict(set)
    for group, uid in pairs:
        groups[group.ref] = group
        uids[group.ref].add(uid)
    return [(group, frozenset(uids[key])) for key, group in groups.items()]


def has_own_uid(card: Card) -> bool:
    """Whether Mailroom made a contact for an address that it has, or a group for its name."""
    made_for = [f"mailto:{address}" for address in card.emails]
    if card.is_group:
        made_for = [f"group:{card.name}"]
    return any(card.uid in islice(own_uids(what), UIDS_IN_LINE) for what in made_for)


def was_made(card: Card) -> bool:
    """Whether Mailroom made a card, and the note of a contact still says so."""
    return has_own_uid(card) and (card.is_group or CREATED_NOTE in card.note_lines)


def ways_to_make(card: Card) -> list[CardChange]:
    """How Mailroom would make a card with this name and address, of each kind."""
    made = CardChange(card.uid, name=card.name, address=min(card.emails, default=""))
    return [replace(made, kind=kind) for kind in ("company", "person", "group")]


def names_given(mails: Iterable[Mail]) -> dict[str, set[str]]:
    """{sender: the names that a contact may have got from the sender's mails}"""
    names: dict[str, set[str]] = defaultdict(set)
    for mail in mails:
        names[mail.sender] |= {
            contact_name(mail.display_name, kind) or mail.sender for kind in ("company", "person")
        }
    return names


def as_made(
    cards: Iterable[Card],
    names: Mapping[str, Collection[str]],
    groups: Iterable[Card],
    untouched: Collection[str],
) -> set[str]:
    """The refs of the contacts that nobody has touched since Mailroom made them: the note has no
    other line, the name is one that the sender's mails give, and no group of the user's has them.
    `groups`: those of the user; `untouched`: the refs of the cards that Mailroom made and in which
    the store has found nothing more. A copy in another address book has the same uid."""
    grouped = {uid for group in groups for uid in group.members}
    return {
        card.ref
        for card in cards
        if card.ref in untouched and card.uid not in grouped
        if not any(map(clean_note, card.notes.values()))
        if any(card.name in names.get(address, ()) for address in card.emails)
    }


def take_back(card: Card, gone: Collection[str]) -> CardChange:
    """What becomes of a contact when triage is taken back: one that Mailroom made and nobody has
    touched goes, any other loses Mailroom's lines in its notes."""
    return CardChange(card.uid, card, destroy=card.ref in gone, clean=card.ref not in gone)


def plan_undo(
    sender: str, cards: Collection[Card], rules: Rules, gone: Collection[str]
) -> CardChange:
    """The contact's part where a sender's triage is taken back. Where there is no contact, its uid
    may have been left behind in groups."""
    found = find_contact(sender, cards, filter(rules.is_managed, cards))
    if not found:
        return CardChange(contact_uid(sender, {card.uid for card in cards}), kind="")
    return take_back(found, gone)


def came_to_inbox(mail: Mail, boxes: Boxes) -> bool:
    """Whether a mail is in the Inbox on account of its category. An ancestor is not its category:
    that is the one below all others whose destination the mail is in."""
    there = [
        category
        for category, box in boxes.destinations.items()
        if not category.undoes and box in mail.mailboxes
    ]
    parents = {category.parent for category in there}
    return any(each.add_to_inbox and each.name not in parents for each in there)


def left_by_triage(mail: Mail, boxes: Boxes) -> set[str]:
    """What a mail is in on account of triage, beside its destinations."""
    return {boxes.warning, *([boxes.inbox] if came_to_inbox(mail, boxes) else [])}


def plan_mails(
    mails: Iterable[Mail], family: Sequence[Category], boxes: Boxes, warn: bool
) -> tuple[dict[str, MailPatch], dict[str, MailPatch]]:
    """(patches that re-file, patches that then take the labels off), each {mail id: patch}. Mails
    that are neither labelled nor in a managed mailbox (in Trash, Junk, Drafts, Sent or a folder of
    the user's, say) stay where they are. Only the label that is carried out comes off: another may
    have been put on meanwhile."""
    category, label = family[0], boxes.label_of(family[0])
    destinations = {boxes.destinations[each] for each in family}
    refile, finish = {}, {}
    for mail in mails:
        tapped = label in mail.mailboxes
        add = set(destinations) if tapped or mail.mailboxes & boxes.managed else set()
        if category.add_to_inbox and boxes.screener in mail.mailboxes:
            add.add(boxes.inbox)
        if tapped and warn:
            add.add(boxes.warning)
        back = left_by_triage(mail, boxes) if category.undoes and add else set()
        refile[mail.id] = mail_patch(mail, add, (boxes.managed | back) - add)
        finish[mail.id] = mail_patch(
            mail.patched(refile[mail.id]), destinations if tapped else (), [label, boxes.error]
        )
    return refile, finish


def name_differs(contact: Card | None, display_name: str) -> bool:
    """Whether the user knows the sender under another name than the mail gives."""
    if not contact or not contact.name or not display_name:
        return False
    return full_name(contact.name).casefold() != full_name(display_name).casefold()


def plan_sender(
    sender: str,
    category: Category,
    mails: Collection[Mail],
    cards: Collection[Card],
    rules: Rules,
    boxes: Boxes,
    gone: Collection[str] = (),
) -> SenderPlan:
    """What to do for a sender, given the sender's mails that were found, the labelled among them,
    and the cards that were: contacts and groups. `gone`: the refs of the contacts that go when
    triage is taken back (see `as_made`)."""
    labelled = [mail for mail in mails if boxes.label_of(category) in mail.mailboxes]
    display_name = max(labelled, key=lambda mail: (mail.received, mail.id)).display_name
    if category.undoes:
        contact = plan_undo(sender, cards, rules, gone)
    else:
        contact = plan_contact(sender, category, display_name, cards, rules)
    family = rules.family(category)
    wanted = {each.contact_group for each in family if each.contact_group}
    lines = contact.card.note_lines if contact.card else contact.note
    if wanted and CREATED_NOTE in lines:
        wanted.add(rules.provenance_group)
    groups = [card for card in cards if card.is_group]
    join, leave = plan_groups(contact.uid, wanted, groups, rules)
    leaving = frozenset({contact.uid})
    if category.undoes:
        leaving |= {card.uid for card in cards if sender in card.emails and not card.is_group}
        leave = tuple(each for each in groups if rules.is_own(each) and each.members & leaving)
    warns = bool(boxes.warning) and not category.undoes
    differs = warns and name_differs(contact.card, display_name)
    refile, finish = plan_mails(mails, family, boxes, differs)
    return SenderPlan(sender, category, contact, join, leave, leaving, refile, finish, differs)


def to_join(plans: Iterable[SenderPlan]) -> Writes:
    """Write the contacts and join the groups."""
    joins = by_group((group, plan.contact.uid) for plan in plans for group in plan.join)
    contacts = [plan.contact for plan in plans if not plan.contact.destroy]
    return Writes([*contacts, *(CardChange(group.uid, group, add=uids) for group, uids in joins)])


def to_refile(plans: Iterable[SenderPlan]) -> Writes:
    """Leave other groups and re-file the mails: neither needs the other."""
    leaves = by_group(
        (group, uid)
        for plan in plans
        for group in plan.leave
        for uid in plan.leaving & group.members
    )
    patches = {id_: patch for plan in plans for id_, patch in plan.refile.items()}
    return Writes([CardChange(group.uid, group, remove=uids) for group, uids in leaves], patches)


def to_destroy(plans: Iterable[SenderPlan]) -> Writes:
    """Delete the contacts that are to go: their uids have left the groups by now."""
    return Writes([plan.contact for plan in plans if plan.contact.destroy])


def to_finish(plans: Iterable[SenderPlan]) -> Writes:
    """Take the labels off."""
    return Writes(mails={id_: patch for plan in plans for id_, patch in plan.finish.items()})


# In this order: stopping anywhere leaves a sender in too many groups, never in none (unless triage
# is taken back), and the label on. A sender for whom a step fails is left out of the next ones.
STEPS = (to_join, to_refile, to_destroy, to_finish)


def failures(
    plans: Iterable[SenderPlan], writes: Writes, cards: Mapping[str, str], mails: Mapping[str, str]
) -> dict[str, str]:
    """{sender: why it failed} in a step, given what that wrote for the plans and why cards (by uid)
    and mails (by id) were refused. A group that takes no one in may still be left by others."""
    failed = {}
    for plan in plans:
        reasons = [
            f"contact card {change.uid}: {cards[change.uid]}"
            for change in writes.cards
            if change.uid in cards
            if plan.contact.uid in {change.uid, *change.add} or plan.leaving & change.remove
        ]
        reasons += [f"mail {id_}: {mails[id_]}" for id_ in plan.refile if id_ in mails]
        if reasons:
            failed[plan.sender] = reasons[0]
    return failed


def first_of_each_contact(plans: Iterable[SenderPlan]) -> dict[str, SenderPlan]:
    """{uid: the plan to carry out first} of contacts with several addresses, whatever the order of
    the plans: the contact may get its name from it."""
    last_first = sorted(plans, key=lambda plan: plan.sender, reverse=True)
    return {plan.contact.uid: plan for plan in last_first}


# ------------------------------------------------------------------------------------------------
# HTTP: who is sent the credentials, how long and how large a reply may be
# ------------------------------------------------------------------------------------------------

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 60.0
MAX_REPLY_SECONDS = 300.0
# Several times what a large address book takes; a hostile reply of it takes seconds to parse.
MAX_REPLY_BYTES = 32 * 2**20
MAX_REDIRECTS = 5
MAX_RETRY_AFTER = 3600.0


read_socket = socket.SocketIO.readinto


def read_fairly(self: socket.SocketIO, buffer: Any) -> int | None:
    """A read of a socket that gives way to the other greenlets. One that need not wait does not by
    itself, and some loops read on for as long as something comes: `http.client` over interim
    replies and chunk trailers, the health server over a body."""
    gevent.sleep(0)
    return read_socket(self, buffer)


# mypy takes a method for no variable: this replaces it, for all sockets.
socket.SocketIO.readinto = read_fairly  # type: ignore[method-assign, assignment]


class BearerAuth(AuthBase):
    """Sends a token (RFC 6750). An auth object, since a header would be replaced by ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def credentials(token: str, username: str = "") -> AuthBase:
    """HTTP Basic where there is a user name, a Bearer token where not."""
    return HTTPBasicAuth(username.encode(), token.encode()) if username else BearerAuth(token)


def as_text(value: Any) -> str:
    """The value, which is to be a text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


@contextmanager
def understood(url: str) -> Iterator[None]:
    """While a reply is decoded: one that is not of the shape it should be is a ServerError."""
    try:
        yield
    except MALFORMED as error:
        said = f"{type(error).__name__} {error}"[:MAX_SAID]
        raise ServerError(f"{url} sends a reply that cannot be understood ({said})") from None


class Reply(NamedTuple):
    """A whole HTTP reply. `url`: where it came from, after redirects."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class HTTPClient:
    """Requests that carry the credentials to those they are meant for, and to no one else: over TLS
    that is verified, as `requests` does, or to this machine itself. `stopping` is asked before each
    request; `remedy` is what to do when they are refused."""

    def __init__(
        self, auth: AuthBase, stopping: Callable[[], bool] = lambda: False, remedy: str = ""
    ) -> None:
        self._auth = auth
        self._stopping = stopping
        self._remedy = remedy
        self._session = requests.Session()
        # It would read a redirect's body, however long, to prepare a request that no one makes.
        self._session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]
        # A server could set more of them with each reply, and they are sent with each request.
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        self._session.headers["User-Agent"] = f"Mailroom/{VERSION}"

    def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        read_timeout: float | None = READ_TIMEOUT,
    ) -> requests.Response:
        """A response whose body is not read yet. Redirects are followed within the origin.

        Raises ServerError when there is none, ConfigurationError for a URL that is not safe, and
        ShuttingDown.
        """
        for _ in range(MAX_REDIRECTS):
            if self._stopping():
                raise ShuttingDown
            if not is_safe_url(url):
                raise ConfigurationError(f"{url} is not {SAFE_URL}: the credentials stay here")
            # Plain http goes to this machine only, which is nothing for a proxy to see.
            self._session.trust_env = url.startswith("https:")
            try:
                response = self._session.request(
                    method,
                    url,
                    headers=headers,
                    data=body,
                    auth=self._auth,
                    timeout=(CONNECT_TIMEOUT, read_timeout),
                    allow_redirects=False,
                    stream=True,
                )
            except (OSError, ValueError) as error:  # requests' errors are OSErrors
                raise ServerError(f"{url} cannot be reached: {network_reason(error)}") from None
            if not response.is_redirect:
                return response
            response.close()
            with understood(url):
                url = same_origin(url, response.headers["Location"])
        raise ServerError(f"{url} redirects without end")

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        accept: Collection[int] = (200,),
    ) -> Reply:
        """A whole reply, with one of the statuses to accept. Raises ConfigurationError when the
        credentials are refused, ServerError, and ShuttingDown."""
        late = ServerError(f"{url} is not done after {MAX_REPLY_SECONDS:g} seconds")
        with (
            gevent.Timeout(MAX_REPLY_SECONDS, late),
            self.open(method, url, headers, body) as response,
        ):
            reply = Reply(
                response.status_code, response.headers, read_bounded(response), response.url
            )
        if reply.status not in accept:
            raise refusal(reply, self._remedy)
        return reply


def refusal(reply: Reply, remedy: str) -> MailroomError:
    """What an unwanted reply means. After too many requests (429) the server is left alone, though
    it may not say for how long."""
    said = f"{reply.url} answers HTTP {reply.status}{problem_detail(reply.body)}"
    if reply.status in (401, 403):
        return ConfigurationError(f"{said}: the credentials are refused. {remedy}".rstrip())
    busy = reply.status in (429, 503)
    wait = retry_after(reply.headers) or float(reply.status == 429)
    return ServerError(said, answered=not busy, retry_after=wait)


def read_bounded(response: requests.Response) -> bytes:
    """The body of a response. Raises ServerError when it is cut off or beyond MAX_REPLY_BYTES."""
    content = bytearray()
    try:
        while chunk := response.raw.read1(2**16, decode_content=True):
            content += chunk
            if len(content) > MAX_REPLY_BYTES:
                raise ServerError(f"{response.url} sends more than {MAX_REPLY_BYTES} bytes")
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ServerError(f"{response.url} broke off: {network_reason(error)}") from None
    return bytes(content)


def origin(url: SplitResult) -> tuple[str, str | None, int]:
    """(scheme, host, port) of a URL (RFC 6454 section 4)."""
    return url.scheme, url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme, 0)


def same_origin(url: str, location: str) -> str:
    """Where a redirect leads. A server behind a TLS proxy may say http where it means https.

    Raises ConfigurationError for another origin: the credentials are not meant for it.
    """
    here, there = urlsplit(url), urlsplit(urljoin(url, location))
    if here.scheme == "https" and there.scheme == "http" and here.hostname == there.hostname:
        there = there._replace(scheme=here.scheme, netloc=here.netloc)
    if origin(here) != origin(there):
        raise ConfigurationError(
            f"{url} redirects to {there.geturl()}: if that is right, put that into "
            "MAILROOM_JMAP_URL or MAILROOM_CARDDAV_URL"
        )
    return there.geturl()


def network_reason(error: BaseException) -> str:
    """Why a request failed, in one line: what the innermost error says."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, urllib3.exceptions.LocationParseError):
        return "its URL, or that of the proxy, cannot be read"  # and may have a password in it
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def problem_detail(body: bytes) -> str:
    """What the server says of its error (RFC 7807), to be put behind a message."""
    try:
        problem = json.loads(body)
        said = problem.get("detail") or problem.get("type") or ""
    except MALFORMED:
        return ""
    return f": {said}"[:MAX_SAID] if said else ""


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds of a Retry-After header (RFC 9110 section 10.2.3); 0 without a sound one."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_RETRY_AFTER)
    try:
        wait = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except MALFORMED:
        return 0.0
    return min(max(wait, 0.0), MAX_RETRY_AFTER)


# ------------------------------------------------------------------------------------------------
# JMAP (RFC 8620)
# ------------------------------------------------------------------------------------------------

CORE = "urn:ietf:params:jmap:core"
MAIL = "urn:ietf:params:jmap:mail"
CONTACTS = "urn:ietf:params:jmap:contacts"
SUBMISSION = "urn:ietf:params:jmap:submission"
SIEVE = "urn:ietf:params:jmap:sieve"
MAX_PAGE = 4096
# What a call takes beside the item in it, and the commas.
CALL_OCTETS = 200
SESSION_URLS = ("apiUrl", "eventSourceUrl", "downloadUrl", "uploadUrl")
NAME_PARTS = ("given", "given2", "surname")
JMAP_REMEDY = (
    "Make a token with the scopes Mail and Contacts (at Fastmail: Settings - Privacy & Security - "
    "Manage API tokens) and put it into MAILROOM_JMAP_TOKEN"
)
# What a server takes at once (RFC 8620 section 2) if it does not say.
DEFAULT_LIMITS = {
    "maxSizeRequest": 10_000_000,
    "maxCallsInRequest": 16,
    "maxObjectsInGet": 500,
    "maxObjectsInSet": 500,
}

Call = tuple[str, JSON]


class MethodError(ServerError):
    """A method-level error (RFC 8620 section 3.6.2)."""

    def __init__(self, method: str, error: JSON) -> None:
        super().__init__(f"{method} is refused: {error_text(error)}", answered=True)


Answer = JSON | MethodError
Found = list[Any] | MethodError


class Query(NamedTuple):
    """A Foo/query with the Foo/get of what it finds. `parse` makes a value of each object, or None
    of one that is not wanted; `newest`: only so many are looked at, by `receivedAt`."""

    type: str
    filter: JSON | None
    properties: Sequence[str]
    parse: Callable[[JSON], Any]
    newest: int = 0


def error_text(error: JSON) -> str:
    """A method error or SetError in one line: its type, and what else it says."""
    said = [error.get("type", "unknown error"), error.get("properties"), error.get("description")]
    return " ".join(str(each) for each in said if each)[:MAX_SAID]


def set_errors(done: JSON) -> dict[str, JSON]:
    """{id or creation id: SetError} of a Foo/set (RFC 8620 section 5.3). Raises ServerError."""
    with understood("Foo/set"):
        kinds = ("notCreated", "notUpdated", "notDestroyed")
        errors = [item for kind in kinds for item in (done.get(kind) or {}).items()]
        return {key: dict(error) for key, error in errors}


def expect(answer: T | MethodError) -> T:
    """What a method or a query brought. Raises the MethodError that it may be."""
    if isinstance(answer, MethodError):
        raise answer
    return answer


def any_of(conditions: Iterable[JSON]) -> JSON:
    """The filter (RFC 8620 section 5.5) that is met where one of the conditions is."""
    return {"operator": "OR", "conditions": list(conditions)}


def in_any(mailboxes: Iterable[str]) -> JSON:
    """The filter for the mails in one of the mailboxes, given by id."""
    return any_of({"inMailbox": box} for box in sorted(mailboxes))


def packed(
    items: Iterable[T], weigh: Callable[[T], int], most: int, most_bytes: int
) -> Iterator[list[T]]:
    """The items in portions that stay within a weight and a size as JSON, as far as they can."""
    portion: list[T] = []
    weight, size = 0, 0
    for item in items:
        octets = len(json.dumps(item)) + CALL_OCTETS
        if portion and (weight + weigh(item) > most or size + octets > most_bytes):
            yield portion
            portion, weight, size = [], 0, 0
        portion.append(item)
        weight, size = weight + weigh(item), size + octets
    if portion:
        yield portion


def session_url(place: str) -> str:
    """The URL of the session object: of a host name, a bare origin (RFC 8620 section 2.2) or as it
    is."""
    if "://" not in place:
        return f"https://{place}/jmap/session"
    return urljoin(place, "/.well-known/jmap") if urlsplit(place).path in ("", "/") else place


def expand(template: str, values: Mapping[str, str]) -> str:
    """A URL from a template (RFC 6570, level 1); a variable without a value is empty."""
    return re.sub(r"\{(\w+)\}", lambda match: quote(values.get(match[1], ""), safe=","), template)


class JMAPClient:
    """A JMAP session and the requests that are made in it. `hostname`: a host, or a URL."""

    def __init__(
        self,
        token: str,
        hostname: str = "api.fastmail.com",
        *,
        username: str = "",
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.session_url = session_url(hostname)
        self.http = HTTPClient(credentials(token, username), stopping, JMAP_REMEDY)
        self.limits = DEFAULT_LIMITS
        self.stale = True
        self._session: JSON = {}
        self._accounts: dict[str, JSON] = {}
        self._urls: dict[str, str] = {}
        self._state_seen = ""

    def connect(self) -> None:
        """Fetch the session (RFC 8620 section 2).

        Raises ConfigurationError for refused credentials, an account without mail or a URL that
        secrets must not go to, and ServerError.
        """
        reply = self.http.request("GET", self.session_url, {"Accept": "application/json"})
        with understood(reply.url):
            session = json.loads(reply.body)
            offered = session["capabilities"].get(CORE) or {}
            limits = {name: int(offered.get(name, n)) for name, n in DEFAULT_LIMITS.items()}
            urls = {
                key: urljoin(reply.url, session[key]) for key in SESSION_URLS if session.get(key)
            }
            accounts = {
                capability: {**(session.get("accounts") or {}).get(id_, {}), "id": as_text(id_)}
                for capability, id_ in session["primaryAccounts"].items()
                if id_
            }
            if MAIL not in accounts:
                raise ConfigurationError(f"the token gives no access to mail. {JMAP_REMEDY}")
            if "apiUrl" not in urls or min(limits.values()) < 1:
                raise ValueError("no apiUrl, or limits below 1")
        if unsafe := [url for url in urls.values() if not is_safe_url(url)]:
            raise ConfigurationError(f"the session names {unsafe[0]}, which is not {SAFE_URL}")
        self._session, self._accounts, self._urls, self.limits = session, accounts, urls, limits
        self.stale = False
        self._state_seen = ""

    @property
    def account_id(self) -> str:
        """The account for mail. Raises RuntimeError before `connect()`."""
        if not self._accounts:
            raise RuntimeError("connect() comes first")
        return str(self._accounts[MAIL]["id"])

    @property
    def session_capabilities(self) -> JSON:
        """What the session offers: {capability URN: its properties}; empty before `connect()`."""
        return dict(self._session.get("capabilities") or {})

    @property
    def event_source_url(self) -> str | None:
        """The session's `eventSourceUrl`, maybe a template; None without one."""
        return self._urls.get("eventSourceUrl")

    def own_addresses(self) -> frozenset[str]:
        """The user's own addresses, as far as the session tells, in lower case."""
        own = {str(self._session.get("username") or "")}
        if self.account(SUBMISSION):
            [[answer]] = self.send([[("Identity/get", {"ids": None})]])
            with understood("Identity/get"):
                identities = [] if isinstance(answer, MethodError) else answer["list"]
                own |= {str(identity.get("email")) for identity in identities}
        return frozenset(address.lower() for address in own)

    def account(self, capability: str) -> JSON:
        """The session's account for a capability, with its id; empty where there is none."""
        return self._accounts.get(capability, {})

    def check_writable(self) -> None:
        """Raises ConfigurationError for a token that may only read mail."""
        if self.account(MAIL).get("isReadOnly"):
            raise ConfigurationError("the token may only read mail: make one that may write it")

    def send(self, groups: Sequence[Sequence[Call]]) -> list[list[Answer]]:
        """The answers to groups of calls, in as few requests as the limits allow. The calls of a
        group stay in one request: a result reference (RFC 8620 section 3.7) is to the call before.
        """
        answers: list[list[Answer]] = []
        calls, octets = self.limits["maxCallsInRequest"], self.limits["maxSizeRequest"]
        for batch in packed(groups, len, calls, octets):
            flat = iter(self._post([call for group in batch for call in group]))
            answers += [[next(flat) for _ in group] for group in batch]
        return answers

    def call(self, method: str, arguments: JSON) -> JSON:
        """The answer to a single call. Raises MethodError, ServerError."""
        [[answer]] = self.send([[(method, arguments)]])
        return expect(answer)

    def upload(self, capability: str, content: bytes, media_type: str) -> str:
        """The id of a new blob (RFC 8620 section 6.1) in the account for a capability."""
        url = expand(self._urls["uploadUrl"], {"accountId": self.account(capability)["id"]})
        headers = {"Content-Type": media_type, "Accept": "application/json"}
        reply = self.http.request("POST", url, headers, content, accept=(200, 201))
        with understood(reply.url):
            return as_text(json.loads(reply.body)["blobId"])

    def download(self, capability: str, blob_id: str, media_type: str) -> bytes:
        """A blob (RFC 8620 section 6.2) of the account for a capability."""
        values = {"blobId": blob_id, "type": media_type, "name": "blob"}
        values["accountId"] = self.account(capability)["id"]
        url = expand(self._urls["downloadUrl"], values)
        return self.http.request("GET", url, {"Accept": "*/*"}).body

    def portions(self, items: Mapping[str, Any]) -> Iterator[JSON]:
        """The items in portions that fit one Foo/set call each."""
        most, octets = self.limits["maxObjectsInSet"], self.limits["maxSizeRequest"] // 2
        return (dict(portion) for portion in packed(items.items(), lambda item: 1, most, octets))

    def _post(self, calls: Sequence[Call]) -> list[Answer]:
        """One API request (RFC 8620 section 3.3); an answer for each call, in their order."""
        numbered = []
        for n, (method, arguments) in enumerate(calls):
            before = {"resultOf": str(n - 1)}
            referring = {key: {**arguments[key], **before} for key in arguments if key[0] == "#"}
            account_id = self.account(capability_of(method))["id"]
            numbered.append([method, {"accountId": account_id, **arguments, **referring}, str(n)])
        using = sorted({CORE, *(capability_of(method) for method, _ in calls)})
        body = json.dumps({"using": using, "methodCalls": numbered}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        reply = self.http.request("POST", self._urls["apiUrl"], headers, body)
        with understood(reply.url):
            decoded = json.loads(reply.body)
            state = str(decoded.get("sessionState", ""))
            self.stale |= self._state_seen not in ("", state)
            self._state_seen = state
            said = {
                call_id: (name, {**answer}) for name, answer, call_id in decoded["methodResponses"]
            }
            answers = [said[str(n)] for n in range(len(calls))]
        return [
            MethodError(method, answer) if name == "error" else answer
            for (method, _), (name, answer) in zip(calls, answers, strict=True)
        ]

    def fetch(
        self, queries: Sequence[Query], first: Sequence[Call] = ()
    ) -> tuple[list[JSON], list[Found]]:
        """The answers to the `first` calls, and for each query the values of all that it finds, or
        its error. All of it goes into one request, and one more for each further page."""
        pages = [self._page(query, "") for query in queries]
        replies = self.send([[call] for call in first] + pages)
        answers = [expect(replies.pop(0)[0]) for _ in first]
        return answers, [self._all_pages(query, [replies.pop(0)]) for query in queries]

    def find(self, query: Query) -> list[Any]:
        """The values of all that a query finds. Raises MethodError, ServerError."""
        _, [found] = self.fetch([query])
        return expect(found)

    def _all_pages(self, query: Query, replies: list[list[Answer]]) -> Found:
        """The values of this page and all further ones. A page that is read is let go: thousands of
        objects as they came take more memory than all else."""
        values: list[Any] = []
        last = ""
        try:
            while True:
                page, next_anchor = read_page(query, replies.pop())
                values += page
                if not next_anchor:
                    return values
                if next_anchor == last:
                    raise ServerError(f"{query.type}/query: the server has no end of pages")
                last = next_anchor
                replies = self.send([self._page(query, last)])
        except MethodError as error:
            return error

    def _page(self, query: Query, after: str) -> list[Call]:
        """The calls for the page after an id. By position, a page would leave something out when
        something before it goes away meanwhile."""
        most = min(self.limits["maxObjectsInGet"], MAX_PAGE)
        start: JSON = {"anchor": after, "anchorOffset": 1} if after else {"position": 0}
        asked = {"filter": query.filter, "limit": min(query.newest or most, most), **start}
        if query.type == "Email":
            asked["sort"] = [{"property": "receivedAt", "isAscending": False}]
        ids = {"name": f"{query.type}/query", "path": "/ids"}
        return [
            (f"{query.type}/query", {"calculateTotal": True, **asked}),
            (f"{query.type}/get", {"#ids": ids, "properties": list(query.properties)}),
        ]


def capability_of(method: str) -> str:
    """The capability that a method belongs to."""
    owners = {
        "AddressBook": CONTACTS,
        "ContactCard": CONTACTS,
        "Identity": SUBMISSION,
        "SieveScript": SIEVE,
    }
    return owners.get(method.partition("/")[0], MAIL)


def read_page(query: Query, reply: Sequence[Answer]) -> tuple[list[Any], str]:
    """(the values on a page, the last id if there are more pages). Raises ServerError. A server
    that does not tell the total is asked until a page is empty."""
    asked, got = map(expect, reply)
    with understood(f"{query.type}/query"):
        values = [value for value in map(query.parse, got["list"]) if value is not None]
        ids = asked["ids"]
        end = asked["position"] + len(ids)
        more = ids and not query.newest and end < asked.get("total", end + 1)
        return values, as_text(ids[-1]) if more else ""


# ------------------------------------------------------------------------------------------------
# Contacts over JMAP (RFC 9610)
# ------------------------------------------------------------------------------------------------

NO_CONTACTS = (
    "the token gives no access to contacts: make one with the contacts scope, "
    "or set MAILROOM_CARDDAV_USERNAME and MAILROOM_CARDDAV_PASSWORD"
)
# What a card may have in other ways than by a touch: from the server, or from triage.
NOT_TOUCHES = {"id", "created", "updated", "prodId", "version", "notes", "members"}
CARD_KINDS = {"company": "org", "person": "individual", "group": "group"}
CARD_KEYS = ("id", "uid", "kind", "name", "organizations", "emails", "notes", "created", "members")
# A group with more members than this is large, some 30 kB.
MANY_MEMBERS = 500
# In place of those members of a large group that were not asked for.
OTHERS = ""


class MemberSearch:
    """Who is in the large groups. JMAP gives all members of a group or none. So where a search
    finds the large groups by their members, only the others are read with theirs, and the search
    tells who is in a large one. When it fails, or does not know what was written here, all are read
    with theirs the next time."""

    def __init__(self, client: JMAPClient) -> None:
        self._client = client
        self._works = False
        self._awaits_answer = False
        self._small: list[str] = []
        # (ref, uid, whether it is in that group), as it was lately written here or read since.
        self._written: deque[tuple[str, str, bool]] = deque(maxlen=1000)

    def learn(self, groups: Sequence[Card]) -> None:
        """See whether a search by a member of each large group finds just the groups it is in."""
        large = [group for group in groups if len(group.members) > MANY_MEMBERS]
        uids = sorted({min(group.members) for group in large})
        answers = self._client.send([[groups_with(uid)] for uid in uids])
        with understood("ContactCard/query"):
            found = [
                not isinstance(answer, MethodError)
                and {*answer["ids"]} == {group.ref for group in groups if uid in group.members}
                for uid, [answer] in zip(uids, answers, strict=True)
            ]
        self._works = bool(found) and all(found)
        self._awaits_answer = False
        members = {group.ref: group.members for group in groups}
        self._written += [(ref, uid, uid in members.get(ref, ())) for ref, uid, _ in self._written]
        small = [group.ref for group in groups if group not in large]
        self._small = small[: self._client.limits["maxObjectsInGet"]]

    def questions(self, uids: Sequence[str]) -> list[Call]:
        """What to ask of these contacts, beside groups without members; nothing where the groups
        are to come with theirs."""
        works, self._works = self._works and not self._awaits_answer, False  # until it has answered
        if not (works and uids):
            return []
        small = {"ids": self._small, "properties": ["id", "members"]}
        return [("ContactCard/get", small), *map(groups_with, uids)]

    def with_members(
        self, cards: Sequence[Card], addresses: Collection[str], answers: Sequence[JSON]
    ) -> list[Card]:
        """The cards, the large groups with those members that are contacts of the addresses, or
        will be, and with something in place of the others."""
        small, *known = answers
        holders = dict(zip(map(contact_uid, addresses), known, strict=True))
        taken = {card.uid for card in cards}
        contacts = [card for card in cards if not card.is_group]
        uids = {card.uid for card in contacts}
        new = set(addresses).difference(*(card.emails for card in contacts))
        more = sorted((uids | {contact_uid(each, taken) for each in new}) - holders.keys())
        replies = self._client.send([[groups_with(uid)] for uid in more])
        holders |= {uid: expect(answer) for uid, [answer] in zip(more, replies, strict=True)}
        with understood("ContactCard/query"):
            members = {
                card.ref: {OTHERS, *(uid for uid in holders if card.ref in holders[uid]["ids"])}
                for card in cards
                if card.is_group
            }
            members |= {raw["id"]: {*members_of(raw)} for raw in small["list"]}
        written = {(ref, uid): there for ref, uid, there in self._written if uid in holders}
        if any((uid in members.get(ref, ())) != there for (ref, uid), there in written.items()):
            raise ServerError("the search for members lags behind", answered=True)
        self._works = True
        return [replace(card, members=frozenset(members.get(card.ref, ()))) for card in cards]

    def await_answer(self) -> None:
        """What is written now is not known until it is noted."""
        self._awaits_answer = True

    def note_written(self, changes: Iterable[CardChange], refused: Collection[str]) -> None:
        """Some changes were carried out. What was refused may be a group that has been emptied
        since: that takes no member by a path."""
        self._awaits_answer = False
        self._works &= not refused
        self._written += [
            (change.card.ref, uid, uid in change.add)
            for change in changes
            if change.card and change.uid not in refused
            for uid in change.add | change.remove
        ]


class JMAPContacts:
    """Contacts in a JMAP account: one of the two stores, which have the same public methods."""

    def __init__(self, client: JMAPClient) -> None:
        self._client = client
        self._address_book = ""
        self._state = ""
        self._search = MemberSearch(client)

    def prepare(self) -> None:
        """Find the default address book. Raises ConfigurationError without one, ServerError."""
        if not self._client.account(CONTACTS):
            raise ConfigurationError(NO_CONTACTS)
        if self._client.account(CONTACTS).get("isReadOnly"):
            raise ConfigurationError("the token may not write contacts: it needs that scope")
        answer = self._client.call("AddressBook/get", {"ids": None})
        with understood("AddressBook/get"):
            books = sorted(answer["list"], key=lambda book: not book.get("isDefault"))
            if not books:
                raise ConfigurationError("the account has no address book")
            self._address_book = str(books[0]["id"])

    def questions(self, addresses: Collection[str] | None) -> tuple[list[Call], list[Query]]:
        """What to ask the JMAP server, along with other things, for the groups and the contacts
        that may be those of the addresses; without addresses for all cards. The state comes first,
        so that a later change by someone else is noticed."""
        uids = [contact_uid(address) for address in addresses or ()]
        filters: list[JSON | None] = [None]
        if addresses is not None:
            wanted = [{"email": address} for address in addresses] + [{"uid": uid} for uid in uids]
            filters = [{"kind": "group"}, *([any_of(wanted)] if addresses else [])]
        members = self._search.questions(uids)
        keys = [key for key in CARD_KEYS if key != "members" or not members]
        calls: list[Call] = [("ContactCard/get", {"ids": []}), *members]
        return calls, [Query("ContactCard", filter_, keys, jmap_card) for filter_ in filters]

    def cards(
        self, addresses: Collection[str] | None, answers: Sequence[JSON], found: Sequence[Found]
    ) -> list[Card]:
        """The cards, given what the questions brought. Raises the MethodError that a query may
        have met: a contact not seen would be doubled."""
        self._state = str(answers[0].get("state"))
        cards = [card for cards in found for card in expect(cards)]
        if addresses and answers[1:]:
            return self._search.with_members(cards, addresses, answers[1:])
        self._search.learn([card for card in cards if card.is_group])
        return cards

    def calls(self, changes: Collection[CardChange]) -> list[Call]:
        """What may be sent along with another request just before the changes are applied: the
        first ContactCard/set. Only its answer tells the state for a second one."""
        self._search.await_answer()
        return [self._set(portion) for portion in islice(self._portions(changes), 1)]

    def apply(
        self, changes: Collection[CardChange], answers: Sequence[JSON] = ()
    ) -> dict[str, str]:
        """Carry out the changes; {uid: why it was refused}. It takes one ContactCard/set for as
        much as the limits allow. `answers`: to the calls that were sent already. Who could not be
        made is taken out of the groups again. Raises ServerError."""
        refused: dict[str, str] = {}
        sent = iter(answers)
        for portion in self._portions(changes):
            done = next(sent, None) or self._client.call(*self._set(portion))
            self._state = str(done.get("newState"))
            errors = set_errors(done)
            for uid, (_, key, _) in portion.items():
                if key in errors:
                    refused[uid] = error_text(errors[key])
        self._search.note_written(changes, refused)
        not_made = {change.uid for change in changes if not change.card} & refused.keys()
        out = [
            CardChange(change.uid, change.card, remove=change.add & not_made)
            for change in changes
            if change.add & not_made
        ]
        return refused | (self.apply(out) if out else {})

    def _portions(self, changes: Iterable[CardChange]) -> Iterator[JSON]:
        """{uid: its entry} of as many changes as fit a ContactCard/set."""
        entries = {change.uid: entry for change in changes if (entry := self._entry(change))[2]}
        return self._client.portions(entries)

    def _set(self, portion: Mapping[str, tuple[str, str, JSON]]) -> Call:
        """The ContactCard/set for some entries. When anyone else has written since the cards were
        read, nothing is done (RFC 8620 section 5.3)."""
        arguments: JSON = {"ifInState": self._state, "create": {}, "update": {}, "destroy": {}}
        for verb, key, value in portion.values():
            arguments[verb][key] = value
        return "ContactCard/set", {**arguments, "destroy": list(arguments["destroy"])}

    def _entry(self, change: CardChange) -> tuple[str, str, JSON]:
        if change.card and change.destroy:
            return "destroy", change.card.ref, {"destroy": True}
        if change.card:
            return "update", change.card.ref, jmap_card_patch(change.card, change)
        card = jmap_new_card(change, self._address_book) if change.kind else {}
        return "create", f"new-{uuid.UUID(change.uid)}", card

    def untouched(self, cards: Collection[Card]) -> frozenset[str]:
        """The refs of those cards that hold nothing but what Mailroom puts into a new one. Whoever
        writes to one of them later makes `apply` fail. Raises ServerError."""
        ids = [card.ref for card in cards]
        most = self._client.limits["maxObjectsInGet"]
        gets = [("ContactCard/get", {"ids": ids[n : n + most]}) for n in range(0, len(ids), most)]
        found: set[str] = set()
        for [answer] in self._client.send([[get] for get in gets]):
            with understood("ContactCard/get"):
                raws = expect(answer)["list"]
                found |= {raw["id"] for raw in raws if jmap_is_untouched(raw, self._address_book)}
        return frozenset(found)


def jmap_card(raw: JSON) -> Card:
    """A Card from a ContactCard (RFC 9553)."""
    name = raw.get("name") or {}
    components = name.get("components") or []
    parts = [part["value"] for part in components if part["kind"] in NAME_PARTS]
    parts = parts or [part["value"] for part in components]
    firms = [firm.get("name") for firm in (raw.get("organizations") or {}).values()]
    emails = (email["address"] for email in (raw.get("emails") or {}).values())
    return Card(
        uid=as_text(raw["uid"]),
        ref=as_text(raw["id"]),
        name=as_text(name.get("full") or " ".join(parts) or next(filter(None, firms), "")),
        emails=frozenset(email.strip().lower() for email in emails),
        notes={key: as_text(note["note"]) for key, note in (raw.get("notes") or {}).items()},
        created=as_text(raw.get("created") or ""),
        is_group=raw.get("kind") == "group",
        members=members_of(raw),
    )


def members_of(raw: JSON) -> frozenset[str]:
    """The uids of a group's members (RFC 9553 section 2.1.6), as far as it comes with them."""
    return frozenset(uid for uid, there in (raw.get("members") or {}).items() if there)


def groups_with(uid: str) -> Call:
    """The search for the groups that have a member (RFC 9610 section 3.3.1)."""
    return "ContactCard/query", {"filter": {"hasMember": uid}}


def jmap_name(change: CardChange) -> JSON:
    """The properties that name a contact: a person's name in parts, or an organization."""
    if change.kind == "group":
        return {"name": {"full": change.name}}
    if change.kind == "company":
        return {"name": {"full": change.name}, "organizations": {"o1": {"name": change.name}}}
    parts = zip(("given", "surname"), split_name(change.name), strict=True)
    components = [{"kind": kind, "value": value} for kind, value in parts if value]
    return {"name": {"full": change.name, "components": components, "isOrdered": True}}


def jmap_new_card(change: CardChange, address_book: str) -> JSON:
    """The ContactCard of a new contact, or of a new group."""
    card = {
        "@type": "Card",
        "version": "1.0",
        "uid": change.uid,
        "kind": CARD_KINDS[change.kind],
        "addressBookIds": {address_book: True},
        **jmap_name(change),
        "emails": {"e1": {"address": change.address}},
        "notes": {"n1": {"note": "\n".join(change.note)}},
    }
    return {key: card[key] for key in card if change.address or key not in ("emails", "notes")}


def scalars(value: Any, key: str = "") -> set[tuple[str, Any]]:
    """{(nearest key, scalar)} of a JSON value, without the types of objects (`@type`), which a
    server may leave out."""
    if isinstance(value, list):
        return {pair for each in value for pair in scalars(each, key)}
    if not isinstance(value, dict):
        return {(key, value)} if key != "@type" else set()
    return {pair for name, each in value.items() for pair in scalars(each, name)}


def jmap_is_untouched(raw: JSON, address_book: str) -> bool:
    """Whether a ContactCard has nothing in it that Mailroom would not make it with. Its notes, and
    whether its name is the mail's, are judged by the rules."""
    there = scalars({key: raw[key] for key in raw.keys() - NOT_TOUCHES})
    made_anew = ways_to_make(jmap_card(raw))
    return any(there <= scalars(jmap_new_card(change, address_book)) for change in made_anew)


def jmap_card_patch(card: Card, change: CardChange) -> JSON:
    """The patch (RFC 8620 section 5.3) for a card that is there. All that a path leads through has
    to be there already, so the first note or member is set with what holds it."""
    patch: JSON = {}
    if change.name:
        patch["name"] = jmap_name(change)["name"]
    if change.note and card.notes:
        key, text = next(iter(card.notes.items()))
        patch[f"notes/{pointer(key)}/note"] = "\n".join(filter(None, [text, *change.note]))
    elif change.note:
        patch["notes"] = {"n1": {"note": "\n".join(change.note)}}
    if change.clean:
        patch |= jmap_clean_notes(card.notes)
    if change.add and not card.members:
        patch["members"] = dict.fromkeys(sorted(change.add), True)
    elif change.add:
        patch |= {f"members/{pointer(uid)}": True for uid in sorted(change.add)}
    return patch | {f"members/{pointer(uid)}": None for uid in sorted(change.remove)}


def jmap_clean_notes(notes: Mapping[str, str]) -> JSON:
    """The patch that takes Mailroom's lines out of the notes, and notes that held nothing else."""
    cleaned = {key: clean_note(text) for key, text in notes.items() if clean_note(text) != text}
    if cleaned.keys() == notes.keys() and not any(cleaned.values()):
        return {"notes": None} if notes else {}
    return {
        f"notes/{pointer(key)}" + ("/note" if text else ""): text or None
        for key, text in cleaned.items()
    }


def pointer(token: str) -> str:
    """A token as it stands in a JSON pointer (RFC 6901 section 3)."""
    return token.replace("~", "~0").replace("/", "~1")


# ------------------------------------------------------------------------------------------------
# vCards (RFC 6350, RFC 2426): read and edited line by line, so that all else stays as it is
# ------------------------------------------------------------------------------------------------

PROPERTY = re.compile(r'(?:[\w-]+\.)?([\w-]+)((?:;(?:[^:;"]|"[^"]*")*)*):(.*)', re.DOTALL)
APPLE_KIND, APPLE_MEMBER = "X-ADDRESSBOOKSERVER-KIND", "X-ADDRESSBOOKSERVER-MEMBER"
MEMBERS = ("MEMBER", APPLE_MEMBER)
# A value that is not the text itself; vCard 2.1 may say so without ENCODING.
ENCODED = re.compile("ENCODING|QUOTED-PRINTABLE|BASE64", re.IGNORECASE)


class Property(NamedTuple):
    """A content line: the name in upper case, without a group; the parameters and value raw."""

    name: str
    parameters: str
    value: str

    @property
    def text(self) -> str:
        """The value of a text property (RFC 6350 section 3.4)."""
        return re.sub(
            r"\\(.)", lambda m: "\n" if m[1] in "nN" else m[1], self.value, flags=re.DOTALL
        )


def vcard_lines(text: str) -> list[str]:
    """The content lines as they stand, folds and line ends included (RFC 6350 section 3.2)."""
    return re.findall(r"[^\n]+(?:\n[ \t][^\n]*)*\n?|\n(?:[ \t][^\n]*\n?)*", text)


def vcard_unfold(line: str) -> str:
    """A content line without folds and line end."""
    return re.sub(r"\r?\n[ \t]", "", line).rstrip("\r\n")


def vcard_property(line: str) -> Property:
    """What a content line says; one that cannot be read has an empty name."""
    unfolded = vcard_unfold(line)
    match = PROPERTY.fullmatch(unfolded)
    return Property(match[1].upper(), match[2], match[3]) if match else Property("", "", unfolded)


def vcard_escape(text: str) -> str:
    """A text as a value (RFC 6350 section 3.4)."""
    return re.sub(r"([\\,;])", r"\\\1", text).replace("\n", "\\n")


def vcard_fold(line: str, eol: str) -> str:
    """A content line, folded so that none is longer than 75 octets."""
    folded, width = "", 0
    for character in line:
        octets = len(character.encode())
        if width + octets > 75:
            folded, width = f"{folded}{eol} ", 1
        folded, width = folded + character, width + octets
    return folded + eol


def canonical_uid(value: str) -> str:
    """A uid as `urn:uuid:...`, which cards may leave out and members have."""
    return "urn:uuid:" + re.sub("^urn:uuid:", "", value.strip(), flags=re.IGNORECASE)


def vcard_card(href: str, text: str, created: str) -> Card | None:
    """A Card from a vCard, or None without a UID: nothing can refer to it."""
    values: dict[str, list[Property]] = defaultdict(list)
    for each in map(vcard_property, vcard_lines(text)):
        values[each.name].append(each)
    if not values["UID"]:
        return None
    parts = [[*each.text.split(";")[1:3], each.text.split(";")[0]] for each in values["N"]]
    parts += [each.text.split(";") for each in values["ORG"]]
    structured = (" ".join(filter(None, map(str.strip, each))) for each in parts)
    names = [*(each.text.strip() for each in values["FN"]), *structured]
    return Card(
        uid=canonical_uid(values["UID"][0].value),
        ref=href,
        name=next(filter(None, names), ""),
        emails=frozenset(each.text.strip().lower() for each in values["EMAIL"]),
        notes={str(n): each.text for n, each in enumerate(values["NOTE"])},
        created=created,
        is_group=any(each.value.lower() == "group" for each in values["KIND"] + values[APPLE_KIND]),
        members=frozenset(
            canonical_uid(each.value) for each in values["MEMBER"] + values[APPLE_MEMBER]
        ),
    )


def new_vcard(change: CardChange) -> str:
    """The vCard 3.0 of a new contact or group; a company's and a group's as Apple and Fastmail have
    it."""
    name = vcard_escape(change.name)
    given, surname = map(vcard_escape, split_name(change.name))
    note = vcard_escape("\n".join(change.note))
    kinds = {
        "person": [f"N:{surname};{given};;;"],
        "company": ["N:;;;;", f"ORG:{name}", "X-ABSHOWAS:COMPANY"],
        "group": [f"N:{name};;;;", f"{APPLE_KIND}:group"],
    }
    lines = [
        "BEGIN:VCARD",
        "VERSION:3.0",
        f"PRODID:-//Mailroom//{VERSION}//EN",
        f"UID:{uuid.UUID(change.uid)}",
        f"FN:{name}",
        *kinds[change.kind],
        *([f"EMAIL;TYPE=INTERNET:{vcard_escape(change.address)}"] if change.address else []),
        *([f"NOTE:{note}"] if note else []),
        "END:VCARD",
    ]
    return "".join(vcard_fold(line, "\r\n") for line in lines)


def edit_vcard(text: str, change: CardChange) -> str:
    """The vCard with the change made, as far as it is not made already: lines are added before its
    end, a note grows by a fold, and a member that leaves goes with its line, as does a note that
    has nothing left. Raises ValueError when the vCard has no end."""
    eol = "\r\n" if "\r\n" in text else "\n"
    lines = [(line, vcard_property(line)) for line in vcard_lines(text)]
    names = {each.name for _, each in lines}
    if "END" not in names:
        raise ValueError("a vCard without an END")
    member = APPLE_MEMBER if APPLE_KIND in names else "MEMBER"
    there = {canonical_uid(each.value) for _, each in lines if each.name in MEMBERS}
    added = [f"{member}:{uid}" for uid in sorted(change.add - there)]
    named = any(each.name == "FN" and each.value.strip() for _, each in lines)
    added += [f"FN:{vcard_escape(change.name)}"] if change.name and not named else []
    told = {line for _, each in lines if each.name == "NOTE" for line in each.text.splitlines()}
    note, edited = vcard_escape("\n".join(line for line in change.note if line not in told)), ""
    for line, each in lines:
        if each.name == "END":
            added += [f"NOTE:{note}"] if note else []
            edited += "".join(vcard_fold(new, eol) for new in added)
        leaves = each.name in MEMBERS and canonical_uid(each.value) in change.remove
        is_note = each.name == "NOTE" and each.value and not ENCODED.search(each.parameters)
        if is_note and change.clean:
            edited += vcard_clean_note(line, eol)
        elif not leaves and not (change.name and each.name == "FN" and not named):
            edited += line
        if note and is_note:
            edited += vcard_fold(f" \\n{note}", eol)
            note = ""
    return edited


def vcard_clean_note(line: str, eol: str) -> str:
    """A NOTE without Mailroom's lines; empty when nothing is left of it."""
    value = vcard_property(line).value
    cleaned = clean_note(value, r"\\[nN]")
    if cleaned == value:
        return line
    return vcard_fold(vcard_unfold(line).removesuffix(value) + cleaned, eol) if cleaned else ""


def vcard_facts(text: str) -> set[tuple[str, str]]:
    """{(property, its value or its parameters)} of what a person may have put into a vCard."""
    facts = set()
    for each in map(vcard_property, vcard_lines(text)):
        if each.name not in ("VERSION", "PRODID", "REV", "UID", "NOTE", *MEMBERS):
            facts |= {(each.name, each.value.strip()), (each.name, each.parameters.upper())}
    return facts


def vcard_is_untouched(text: str) -> bool:
    """Whether a vCard has nothing in it that Mailroom would not make it with. Its notes, and
    whether its name is the mail's, are judged by the rules."""
    there, card = vcard_facts(text), vcard_card("", text, "")
    made_anew = ways_to_make(card) if card else []
    return any(there <= vcard_facts(new_vcard(change)) for change in made_anew)


# ------------------------------------------------------------------------------------------------
# Contacts over CardDAV (RFC 6352)
# ------------------------------------------------------------------------------------------------

DAV, CARD = "{DAV:}", "{urn:ietf:params:xml:ns:carddav}"
DAV_TYPE = "application/xml; charset=utf-8"
# The properties by which a card is known, and those that the rules ask of it.
KNOWN_BY = ("UID", "EMAIL", "KIND", APPLE_KIND)
JUDGED_BY = (*KNOWN_BY, "FN", "N", "ORG", "NOTE", "MEMBER", APPLE_MEMBER)
# The search key of every group.
ANY_GROUP = "group"
CARD_ANSWERS = frozenset(range(200, 500)) - {401, 429}
# What a PUT that has written is answered with. A 200 may be: but so are pages of a proxy.
WRITTEN = (201, 204)
EDIT_ATTEMPTS = 4
CARDDAV_REMEDY = (
    "Look at MAILROOM_CARDDAV_USERNAME, MAILROOM_CARDDAV_PASSWORD (at Fastmail: an app password) "
    "and MAILROOM_CARDDAV_URL"
)
VERSION_4_QUERY = (
    "<D:prop><D:getetag/></D:prop>",
    '<C:filter><C:prop-filter name="VERSION">',
    '<C:text-match collation="i;unicode-casemap" match-type="equals">4.0</C:text-match>',
    "</C:prop-filter></C:filter>",
)
DISCOVERED = (
    "<D:prop><D:resourcetype/><D:current-user-principal/><D:current-user-privilege-set/>"
    "<C:addressbook-home-set/><C:supported-address-data/><D:sync-token/></D:prop>"
)
DAVProperties = dict[str, ElementTree.Element]


@dataclass(frozen=True)
class AddressBook:
    """What is known of an address book while the program runs: the token of its state, if the
    server has any; what its cards are known by, by their URLs, once they were listed (see
    `search_keys`); and which of them are of version 4.0."""

    has_version_4: bool
    token: str
    keys: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    version_4: frozenset[str] = frozenset()


class VCard(NamedTuple):
    """A vCard. `etag`: that of just this text, empty where the server may have it in other bytes,
    so that it must not be written back; `created`: when it was made, as far as the server tells."""

    text: str
    etag: str
    created: str


def search_keys(card: Card) -> tuple[int, ...]:
    """What a card is known by: its addresses, its uid and whether it is a group; as hashes, because
    the texts of thousands of cards take much memory. Of two with one hash both are read."""
    return tuple(map(hash, {*card.emails, card.uid, *([ANY_GROUP] if card.is_group else [])}))


def card_properties(names: Iterable[str] = (), version: str = "") -> str:
    """The properties to ask of cards: of the vCard those with the names, or without names all of
    it, in a version if one is given."""
    data_type = f' content-type="text/vcard" version="{version}"' if version else ""
    parts = "".join(f'<C:prop name="{name}"/>' for name in names)
    return (
        "<D:prop><D:creationdate/><D:getcontentlength/><D:getetag/>"
        f"<C:address-data{data_type}>{parts}</C:address-data></D:prop>"
    )


def dav_body(root: str, *elements: str) -> bytes:
    """A request body in the namespaces of WebDAV (D) and CardDAV (C)."""
    declared = 'xmlns:D="DAV:" xmlns:C="urn:ietf:params:xml:ns:carddav"'
    return f"<{root} {declared}>{''.join(elements)}</{root}>".encode()


def dav_properties(url: str, body: bytes) -> Iterator[tuple[str, DAVProperties]]:
    """(URL, {property: element}) of each response in a multistatus (RFC 4918 section 13): those
    with status 200, and the status of what is gone; last the sync token, as the collection's (RFC
    6578 section 3.2). A response that is read is let go, as thousands take much memory. Raises
    ValueError for a listing that was cut short (RFC 6352 section 8.6.2)."""
    # The expat that Python brings refuses entities that grow without bound.
    elements = ElementTree.iterparse(io.BytesIO(body), ("start", "end"))  # noqa: S314
    _, root = next(elements)
    for event, response in elements:
        if (event, response.tag) != ("end", f"{DAV}response"):
            continue
        if " 507" in response.findtext(f"{DAV}status", ""):
            raise ValueError("the listing is cut short")
        if not (href := href_in(url, response)):
            raise ValueError("a response without href")
        properties: DAVProperties = {}
        if " 404" in response.findtext(f"{DAV}status", ""):
            properties |= {each.tag: each for each in response.findall(f"{DAV}status")}
        for propstat in response.iter(f"{DAV}propstat"):
            if " 200 " in propstat.findtext(f"{DAV}status", "") + " ":
                properties |= {each.tag: each for each in propstat.findall(f"{DAV}prop/*")}
        yield href, properties
        root.remove(response)
    for token in root.findall(f"{DAV}sync-token"):
        yield url, {token.tag: token}


def href_in(url: str, element: ElementTree.Element | None) -> str:
    """The URL in an element, resolved against the one it came from; empty without one."""
    href = "" if element is None else element.findtext(f"{DAV}href", "").strip()
    return urljoin(url, href) if href else ""


class CardDAVContacts:
    """Contacts in the address books of a CardDAV account."""

    def __init__(self, url: str, auth: AuthBase, stopping: Callable[[], bool]) -> None:
        self._http = HTTPClient(auth, stopping, CARDDAV_REMEDY)
        self._url = url
        self._books: dict[str, AddressBook] = {}
        # By URL: the groups, and the contacts that were read to be written; and the ETags of what
        # was written here.
        self._vcards: dict[str, VCard] = {}
        self._written: dict[str, str] = {}

    def prepare(self) -> None:
        """Find the address books that can be written (RFC 6764 section 6): from the URL to the
        principal, to its home, to what is in it."""
        found = self._first_propfind()
        if not any(map(is_address_book, found.values())):
            home = self._follow(found, f"{CARD}addressbook-home-set")
            if not home:
                principal = self._follow(found, f"{DAV}current-user-principal")
                if not principal:
                    raise ConfigurationError(f"{self._url} knows no such user. {CARDDAV_REMEDY}")
                home = self._follow(self._propfind(principal, "0"), f"{CARD}addressbook-home-set")
            found = self._propfind(home, "1")
        self._vcards, self._written = {}, {}
        self._books = {
            url: AddressBook(has_version_4(each), sync_token(each))
            for url, each in sorted(
                found.items(), key=lambda item: "/default" not in item[0].lower()
            )
            if is_address_book(each) and is_writable(each)
        }
        if not self._books:
            raise ConfigurationError(
                f"{self._url} has no address book to write into. {CARDDAV_REMEDY}"
            )

    def _follow(self, found: Mapping[str, DAVProperties], name: str) -> str:
        """The URL that a property of what was found names; empty without one."""
        for url, properties in found.items():
            with understood(url):
                return href_in(url, properties.get(name))
        return ""

    def _first_propfind(self) -> dict[str, DAVProperties]:
        """The start of the search. A bare origin may or may not have a well-known URI."""
        if urlsplit(self._url).path in ("", "/"):
            try:
                return self._propfind(urljoin(self._url, "/.well-known/carddav"), "0")
            except ServerError as error:
                if not error.answered:
                    raise
        return self._propfind(self._url, "0")

    def _propfind(self, url: str, depth: str) -> dict[str, DAVProperties]:
        try:
            with understood(url):
                return dict(self._ask("PROPFIND", url, depth, "D:propfind", DISCOVERED))
        except ServerError as error:
            named = f"MAILROOM_CARDDAV_URL={self._url}: {error}"
            raise ServerError(
                named, answered=error.answered, retry_after=error.retry_after
            ) from None

    def _ask(
        self, method: str, url: str, depth: str, *body: str
    ) -> Iterator[tuple[str, DAVProperties]]:
        """A request that a multistatus answers, and what that says. Raises MALFORMED errors."""
        headers = {"Content-Type": DAV_TYPE, "Depth": depth}
        reply = self._http.request(method, url, headers, dav_body(*body), accept=(207,))
        return dav_properties(reply.url, reply.body)

    def questions(self, addresses: Collection[str] | None) -> tuple[list[Call], list[Query]]:
        """Nothing: the JMAP server does not know."""
        return [], []

    def cards(
        self, addresses: Collection[str] | None, answers: Sequence[JSON], found: Sequence[Found]
    ) -> list[Card]:
        """The groups, the contacts of the addresses, and whoever has a uid that a new one may get;
        without addresses all cards. Servers differ in what their filters miss (Cyrus 3.6: addresses
        in property groups), and a contact missed would be doubled: so all are listed once, and from
        then on what has changed. Where that fails (the token is too old, a property that is none of
        Mailroom's cannot be shown, say) all are listed again, and no more is read than is needed.
        """
        try:
            return self._read(addresses)
        except (ServerError, ConfigurationError) as error:
            if error.retry_after:
                raise
            self.prepare()
            return self._read(addresses, JUDGED_BY)

    def _read(
        self, addresses: Collection[str] | None, properties: Collection[str] = ()
    ) -> list[Card]:
        """The cards, with all or some of their properties."""
        self._books = {url: self._updated(url, book) for url, book in self._books.items()}
        if addresses is None:
            return [card for url in self._books for card in self._all_cards(url)]
        lines = (islice(own_uids(f"mailto:{each}"), UIDS_IN_LINE) for each in addresses)
        asked = {hash(key) for key in (ANY_GROUP, *addresses, *chain(*lines))}
        known, self._vcards = self._vcards, {}
        for url, book in self._books.items():
            hrefs = {href for href, keys in book.keys.items() if not asked.isdisjoint(keys)}
            self._vcards |= {href: known[href] for href in hrefs & known.keys()}
            self._get_all(url, hrefs - book.version_4, properties)
            self._get_all(url, hrefs & book.version_4, properties, "4.0")
        cards = (vcard_card(href, each.text, each.created) for href, each in self._vcards.items())
        return [card for card in cards if card]

    def _all_cards(self, url: str) -> list[Card]:
        """All cards of an address book, by what the rules ask of them."""
        query = ("1", "C:addressbook-query", card_properties(JUDGED_BY), "<C:filter/>")
        with understood(url):
            cards = [dav_card(href, each) for href, each in self._ask("REPORT", url, *query)]
        return [card for card in cards if card]

    def _updated(self, url: str, book: AddressBook) -> AddressBook:
        """The address book as it is now: with what has changed (RFC 6578), or listed as a whole
        where it was not yet or the server cannot tell. Cards that have changed are to be read
        again; those of version 4.0 are found anew if anyone else has changed one."""
        known = book.keys if book.token else {}
        since = (book.token, "<D:sync-level>1</D:sync-level>")
        changes = ("0", "D:sync-collection", *since, card_properties(KNOWN_BY))
        everything = ("1", "C:addressbook-query", card_properties(KNOWN_BY), "<C:filter/>")
        changed: dict[str, tuple[int, ...]] = {}
        token, by_others = book.token, False
        with understood(url):
            for href, each in self._ask("REPORT", url, *(changes if known else everything)):
                token = sync_token(each) or token
                card, written = dav_card(href, each), self._written.pop(href, None)
                changed[href] = search_keys(card) if card else ()
                by_others |= bool(card) and dav_text(each, "getetag") != written
                self._vcards.pop(href, None)
            if book.has_version_4 and by_others:
                query = ("1", "C:addressbook-query", *VERSION_4_QUERY)
                book = replace(book, version_4=frozenset(dict(self._ask("REPORT", url, *query))))
        keys = {href: some for href, some in {**known, **changed}.items() if some}
        return replace(book, token=token, keys=keys)

    def _get_all(
        self, url: str, hrefs: set[str], properties: Collection[str], version: str = ""
    ) -> None:
        """Read those cards of an address book that are not known as they are (RFC 6352 section
        8.7). A server may show a card of version 4.0 as 3.0 unless it is asked for as it is."""
        unread = sorted(hrefs - self._vcards.keys())
        if not unread:
            return
        paths = (urlsplit(href)._replace(scheme="", netloc="").geturl() for href in unread)
        named = (f"<D:href>{escape(path)}</D:href>" for path in paths)
        query = ("0", "C:addressbook-multiget", card_properties(properties, version), *named)
        with understood(url):
            read = {href: dav_vcard(each) for href, each in self._ask("REPORT", url, *query)}
            for href in unread:
                if vcard := read[href]:
                    self._vcards[href] = vcard._replace(etag="") if properties else vcard

    def calls(self, changes: Collection[CardChange]) -> list[Call]:
        """Nothing: the JMAP server has no part in it."""
        return []

    def apply(
        self, changes: Collection[CardChange], answers: Sequence[JSON] = ()
    ) -> dict[str, str]:
        """Carry out the changes, one card after the other; {uid: why it was refused}. Who could
        not be made joins no group. Raises ServerError."""
        refused: dict[str, str] = {}
        for change in changes:
            joining = replace(change, add=change.add - refused.keys())
            try:
                reason = self._carry_out(joining)
            except ValueError as error:
                reason = f"it cannot be read: {error}"
            if reason:
                refused[change.uid] = reason
        return refused

    def untouched(self, cards: Collection[Card]) -> frozenset[str]:
        """The refs of those cards that hold nothing but what Mailroom puts into a new one, and are
        as they were listed: the rules judge that. What they are destroyed by later is the version
        seen here. Raises ServerError."""
        found = set()
        for card in cards:
            with understood(card.ref):
                text, etag = self._as_it_is(card)
            if not etag:  # It would be taken for touched, and never be known as Mailroom's again.
                raise ServerError(f"{card.ref} answers {text}", answered=True)
            if vcard_is_untouched(text) and vcard_card(card.ref, text, card.created) == card:
                self._vcards[card.ref] = VCard(text, etag, card.created)
                found.add(card.ref)
        return frozenset(found)

    def _carry_out(self, change: CardChange) -> str:
        """Why a change was refused. Raises ValueError for a card that cannot be read."""
        if change.card:
            return self._destroy(change.card) if change.destroy else self._edit(change.card, change)
        return self._create(change) if change.kind else ""

    def _destroy(self, card: Card) -> str:
        """Delete a card, if it is as it was seen; why it failed. After a 200, which may be anyone's
        page, it is asked once more: the card has to be gone then."""
        headers = {"If-Match": self._vcards.pop(card.ref).etag}
        status = self._http.request("DELETE", card.ref, headers, accept=CARD_ANSWERS).status
        if status == 200:
            status = self._http.request("DELETE", card.ref, headers, accept=CARD_ANSWERS).status
            return "" if status == 404 else f"HTTP {status}"
        return "" if status == 204 else f"HTTP {status}"

    def _create(self, change: CardChange) -> str:
        """Make a card at a place of its own, where no second one can be made; why it failed."""
        url = urljoin(next(iter(self._books)), f"{uuid.UUID(change.uid)}.vcf")
        status, _ = self._put(url, new_vcard(change), {"If-None-Match": "*"})
        return "" if status in WRITTEN else f"HTTP {status}"

    def _edit(self, card: Card, change: CardChange) -> str:
        """Change a card as it is, again while others change it too; why it failed. After a 200,
        which may be anyone's page, the card is read again: the change has to be in it then. A group
        may have to be changed once more before it is read again."""
        for _ in range(EDIT_ATTEMPTS):
            text, etag = self._as_it_is(card)
            if not etag:
                return text
            edited = edit_vcard(text, change)
            if edited == text:
                return ""
            self._vcards.pop(card.ref, None)
            status, etag = self._put(card.ref, edited, {"If-Match": etag})
            if status in WRITTEN:
                if card.is_group:
                    self._vcards[card.ref] = VCard(edited, etag, card.created)
                return ""
            if status not in (200, 412):
                return f"HTTP {status}"
        return "someone else keeps changing it"

    def _as_it_is(self, card: Card) -> tuple[str, str]:
        """(the vCard, its ETag) as they were last seen, or else as `_get` has them."""
        seen = self._vcards.get(card.ref)
        return (seen.text, seen.etag) if seen and seen.etag else self._get(card)

    def _get(self, card: Card) -> tuple[str, str]:
        """(the vCard, its ETag), or (why there is none, nothing). A server may show a card of
        version 4.0 as 3.0, but what it is sent it keeps: such a card is asked for as it is. Raises
        ValueError for one that is no text."""
        is_version_4 = any(card.ref in book.version_4 for book in self._books.values())
        version = "; version=4.0" if is_version_4 else ""
        headers = {"Accept": f"text/vcard{version}", "Accept-Encoding": "identity"}
        reply = self._http.request("GET", card.ref, headers, accept=CARD_ANSWERS)
        etag = reply.headers.get("ETag", "")
        if reply.status != 200 or not etag:
            return f"HTTP {reply.status}, ETag {etag or None}", ""
        return reply.body.decode(), etag

    def _put(self, url: str, text: str, condition: Mapping[str, str]) -> tuple[int, str]:
        """Write a vCard; (the status of the answer, the ETag). A server that makes something else
        of what it is sent tells no strong ETag (RFC 6352 section 6.3.2.3)."""
        headers = {"Content-Type": "text/vcard; charset=utf-8", **condition}
        reply = self._http.request("PUT", url, headers, text.encode(), accept=CARD_ANSWERS)
        etag = reply.headers.get("ETag", "")
        if reply.status in WRITTEN:
            self._written[url] = etag
        return reply.status, etag if etag.startswith('"') else ""


def is_address_book(properties: DAVProperties) -> bool:
    resource_type = properties.get(f"{DAV}resourcetype")
    return resource_type is not None and resource_type.find(f"{CARD}addressbook") is not None


def is_writable(properties: DAVProperties) -> bool:
    """Whether a collection takes new members, as far as it says (RFC 3744 section 5.4)."""
    privileges = properties.get(f"{DAV}current-user-privilege-set")
    granted = {each.tag for each in privileges.iter()} if privileges is not None else {f"{DAV}all"}
    return not granted.isdisjoint({f"{DAV}{name}" for name in ("all", "write", "bind")})


def has_version_4(properties: DAVProperties) -> bool:
    """Whether an address book may hold vCards of version 4.0 (RFC 6352 section 6.2.2)."""
    types = properties.get(f"{CARD}supported-address-data")
    return types is not None and any(each.get("version") == "4.0" for each in types.iter())


def sync_token(properties: DAVProperties) -> str:
    """The token of a collection's state (RFC 6578 section 4), as XML; empty without one."""
    token = properties.get(f"{DAV}sync-token")
    return "" if token is None or not token.text else ElementTree.tostring(token, "unicode")


def dav_text(properties: DAVProperties, name: str) -> str:
    """The text of a property of WebDAV; empty without it."""
    element = properties.get(f"{DAV}{name}")
    return (element.text or "") if element is not None else ""


def dav_vcard(properties: DAVProperties) -> VCard | None:
    """A vCard from what a REPORT says of it, None of one that is gone or of the collection itself.
    Raises LookupError when nothing is said.

    In XML all lines end alike (XML 1.0 section 2.11); those of a vCard end with CRLF. If the server
    says another size, it has it in other bytes.
    """
    if properties.keys() & {f"{DAV}status", f"{DAV}sync-token"}:
        return None
    text = re.sub("\r?\n", "\r\n", properties[f"{CARD}address-data"].text or "")
    size, etag = dav_text(properties, "getcontentlength"), dav_text(properties, "getetag")
    is_whole = size in ("", str(len(text.encode())))
    return VCard(text, etag if is_whole else "", dav_text(properties, "creationdate"))


def dav_card(url: str, properties: DAVProperties) -> Card | None:
    """A Card from the same."""
    vcard = dav_vcard(properties)
    return vcard_card(url, vcard.text, vcard.created) if vcard else None


# ------------------------------------------------------------------------------------------------
# Push: the event stream (RFC 8620 section 7.3)
# ------------------------------------------------------------------------------------------------

PING_SECONDS = 30.0
QUIET_LIMIT = 3 * PING_SECONDS
MAX_PING_SECONDS = 600.0
FIRST_DELAY = 1.0
MAX_DELAY = 60.0
PROVEN_SECONDS = 60.0
ANSWER_TIMEOUT = 30.0
MAX_EVENT_CHARACTERS = 2**16
MAX_EVENTS_KEPT = 100
CONNECTED = "connected"
SENDABLE_ID = re.compile("[!-~]([ -~]{0,1000}[!-~])?")


class StreamEnd(MailroomError):  # noqa: N818  (streams end: that is no error in itself)
    """Why a stream ended. `level`: how loudly to say so; `at_least`: the seconds to stay away, None
    where the next connection is to be made at once."""

    def __init__(
        self, reason: str, level: int = logging.WARNING, at_least: float | None = 0
    ) -> None:
        super().__init__(reason)
        self.level = level
        self.at_least = at_least


@dataclass
class StreamStatus:
    """What the health page says of the stream; times are ISO 8601. Only the stream writes it."""

    status: str = "disconnected"
    connected_since: str | None = None
    last_event_at: str | None = None
    reconnect_count: int = 0
    last_error: str | None = None

    def ended(self, reason: str, level: int) -> None:
        self.status, self.connected_since = "disconnected", None
        self.last_error = reason if level > logging.DEBUG else self.last_error


def expand_event_source_url(url: str) -> str:
    """The URL to listen at: the template (RFC 8620 section 7.3) filled in, or where there is none
    the parameters appended."""
    values = {"types": "Email,Mailbox", "closeafter": "no", "ping": f"{PING_SECONDS:.0f}"}
    if "{" in url:
        return expand(url, values)
    parameters = "&".join(f"{key}={value}" for key, value in values.items())
    return f"{url}{'&' if '?' in url else '?'}{parameters}"


def backoff(attempt: int, first: float = FIRST_DELAY) -> float:
    """The seconds to wait after failed attempt 0, 1, 2 ...: doubling from `first` to MAX_DELAY."""
    return min(first * 2.0 ** min(attempt, 16), MAX_DELAY)


def first_delay(retry: str) -> float:
    """The first delay in seconds, from a `retry:` field in milliseconds; never a hot loop."""
    return min(max(int(retry[:12]) / 1000, FIRST_DELAY), MAX_DELAY)


def quiet_limit(ping: str) -> float:
    """The seconds after which a silent stream is dead, from the data of a ping event. Some servers
    announce the interval in milliseconds."""
    try:
        interval = float(json.loads(ping)["interval"])
    except MALFORMED:
        return QUIET_LIMIT
    seconds = interval if interval <= MAX_PING_SECONDS else interval / 1000
    return max(QUIET_LIMIT, 3 * min(seconds, MAX_PING_SECONDS))


def event_blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The stream's events one by one, as sseclient can digest them: whole, of bounded size, in
    good UTF-8, without comments, and each with data so that none is dropped.

    Raises StreamEnd for an event that is too long. One that is cut off is not dispatched (HTML
    Living Standard, section 9.2.6).
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    lines: list[str] = []
    rest, after_cr, size = "", False, 0
    for chunk in chunks:
        text = decoder.decode(chunk)
        if not text:
            continue
        unread = text.removeprefix("\n") if after_cr else text
        after_cr = text.endswith("\r")
        *whole, rest = (rest + re.sub("\r\n?", "\n", unread)).split("\n")
        for line in whole:
            if line and not line.startswith(":"):
                lines.append(line)
                size += len(line)
            elif lines and not line:
                yield "\n".join([*lines, "data:", "", ""]).encode()
                lines, size = [], 0
        if len(rest) + size > MAX_EVENT_CHARACTERS:
            raise StreamEnd(f"an event has more than {MAX_EVENT_CHARACTERS} characters")


def check_stream(response: requests.Response) -> None:
    """Raises StreamEnd unless the response is an event stream."""
    status, media_type = response.status_code, response.headers.get("Content-Type", "")
    if status == 204:
        raise StreamEnd("the server has no push (HTTP 204)", logging.INFO, MAX_DELAY)
    if status in (401, 403):
        raise StreamEnd(f"the credentials are refused (HTTP {status})", logging.ERROR, MAX_DELAY)
    if status != 200:
        raise StreamEnd(f"HTTP {status}", at_least=retry_after(response.headers))
    if media_type.partition(";")[0].strip().lower() != "text/event-stream":
        raise StreamEnd(f'the reply is "{media_type}", not an event stream')


class EventStream:
    """One connection after another to an event source, and what outlasts each of them. `url` tells
    where it is by now, `on_open` is called for each connection that is made, `on_state` with the
    data of each `state` event."""

    def __init__(
        self,
        http: HTTPClient,
        url: Callable[[], str],
        status: StreamStatus,
        log: Any,
        on_open: Callable[[], object],
        on_state: Callable[[str], object],
    ) -> None:
        self._http = http
        self._url = url
        self._status = status
        self._log = log
        self._on_open = on_open
        self._on_state = on_state
        self._told: set[str] = set()
        self._opened_at = ""
        self._last_event_id = ""
        self._first_delay = FIRST_DELAY
        self._quiet_limit = QUIET_LIMIT
        self._attempt = 0
        self._opened = 0.0
        self._heard: set[str] = set()
        self._proven = False

    def follow(self, shutdown_event: Any) -> None:
        """Connect again and again."""
        while not shutdown_event.is_set():
            try:
                self.run()
            except MailroomError as error:
                end = error if isinstance(error, StreamEnd) else StreamEnd(str(error))
                self._tell(end.level, str(end))
                self._status.ended(str(end), end.level)
                if end.at_least is not None:
                    delay = backoff(self._attempt, self._first_delay)
                    self._attempt += 1
                    shutdown_event.wait(max(end.at_least, delay))

    def run(self) -> None:
        """One connection, to its end: raises StreamEnd."""
        self._status.status = "connecting"
        reason = "the server closed it"
        with self._connect() as response:
            self._note_open()
            try:
                for event in SSEClient(event_blocks(self._chunks(response))).events():
                    self._take(event)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                reason = f"it broke off: {network_reason(error)}"
            finally:
                self._note_end()
        raise StreamEnd(reason, logging.DEBUG if self._proven else logging.WARNING)

    def _tell(self, level: int, text: str) -> None:
        """Log what happens to the stream, where it is news: once while it does not prove healthy,
        and that it is connected once more after each failure that is news."""
        if level == logging.DEBUG or text in self._told:
            self._log.debug(f"event stream: {text}")
            return
        self._log.log(level, f"event stream: {text}")
        self._told = {text} | (self._told if level == logging.INFO else set())

    def _connect(self) -> requests.Response:
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if self._last_event_id:
            headers["Last-Event-ID"] = self._last_event_id
        with gevent.Timeout(ANSWER_TIMEOUT, StreamEnd(f"no answer in {ANSWER_TIMEOUT:g} seconds")):
            self._opened_at = self._url()
            url = expand_event_source_url(self._opened_at)
            response = self._http.open("GET", url, headers, read_timeout=None)
        try:
            check_stream(response)
        except StreamEnd:
            response.close()
            raise
        return response

    def _chunks(self, response: requests.Response) -> Iterator[bytes]:
        """The bytes as they arrive: `read1` does not wait for a buffer to fill. Some servers send
        no pings, so it is routine that nothing comes for so long that the link may be dead."""
        while True:
            reason = f"nothing came for {self._quiet_limit:g} seconds, connecting again"
            with gevent.Timeout(self._quiet_limit, StreamEnd(reason, logging.DEBUG, None)):
                chunk = response.raw.read1(2**13)
            if not chunk:
                return
            yield chunk
            if self._url() != self._opened_at:
                raise StreamEnd("the event source has moved", logging.DEBUG, None)

    def _take(self, event: Any) -> None:
        if event.event in ("state", "ping"):
            self._heard.add(event.event)
            self._status.last_event_at = now_iso()
        if event.event == "ping":
            self._quiet_limit = quiet_limit(event.data)
        if event.id is not None and "\0" not in event.id:
            self._last_event_id = event.id if SENDABLE_ID.fullmatch(event.id) else ""
        if event.retry and re.fullmatch("[0-9]+", event.retry):
            self._first_delay = first_delay(event.retry)
        if event.event == "state":
            self._on_state(event.data.strip())

    def _note_open(self) -> None:
        self._status.reconnect_count += bool(self._opened)
        self._status.status, self._status.connected_since = "connected", now_iso()
        self._opened, self._heard = time.monotonic(), set()
        self._tell(logging.INFO, CONNECTED)
        self._on_open()

    def _note_end(self) -> None:
        """A stream that proved healthy earns the first delay again. One without a `state` may wait
        for an event id that is not to come (the server was restored from a backup)."""
        self._proven = bool(self._heard) or time.monotonic() - self._opened >= PROVEN_SECONDS
        if self._proven:
            self._attempt, self._told = 0, {CONNECTED}
        if "state" not in self._heard:
            self._last_event_id = ""


def outcome(run: Callable[[], object]) -> BaseException | None:
    """Run the work of a greenlet; what it raised, if anything. gevent would only print that, and
    nobody else would notice that the greenlet is dead."""
    try:
        run()
    except BaseException as error:
        return error
    return None


def sse_listener(
    token: str,
    event_source_url: str,
    event_queue: Any,
    shutdown_event: Any,
    log: Any = None,
    *,
    username: str = "",
    moved_to: Callable[[], str | None] = lambda: None,
    status: StreamStatus | None = None,
    on_open: Callable[[], object] = lambda: None,
    on_state: Callable[[str], object] = lambda data: None,
) -> None:
    """Listen to the event source until `shutdown_event` is set, and put "state_changed" on
    `event_queue` for each `state` event. `moved_to` tells where the event source is by now, if it
    is known; `on_open` is called for each connection made, `on_state` with each state event's data
    before it goes on the queue.
    """

    def signal_state(data: str) -> None:
        on_state(data)
        event_queue.put("state_changed")

    http = HTTPClient(credentials(token, username))
    given = (status or StreamStatus(), log or LOG, on_open, signal_state)
    stream = EventStream(http, lambda: moved_to() or event_source_url, *given)
    # A blocked read is ended by killing its greenlet: closing the response would deadlock.
    stop = gevent.spawn(shutdown_event.wait)
    reader = gevent.spawn(outcome, lambda: stream.follow(shutdown_event))
    either: list[gevent.Greenlet[..., Any]] = [stop, reader]
    try:
        gevent.wait(either, count=1)
    finally:
        gevent.killall(either)
    if isinstance(reader.value, BaseException) and not isinstance(
        reader.value, gevent.GreenletExit
    ):
        raise reader.value


class SeenStates:
    """Which states of the account (RFC 8620 section 1.6.2) are no news: those that a reply told
    before the labels were last looked at, by the cycle's read or along with a write of its own.

    A write's `oldState` would not do: a server may write one mail after the other, and a tap in
    between is in the `newState`.
    """

    def __init__(self) -> None:
        self._known: set[tuple[str, str]] = set()
        self._events: set[str | None] = set()

    def begin(self) -> None:
        """A cycle is about to read: what was reported before is covered by it."""
        self._events.clear()
        self._known.clear()

    def saw(self, type_: str, state: Any) -> None:
        if isinstance(state, str):
            self._known.add((type_, state))

    def forget(self) -> None:
        """The labels are not as the cycle leaves them: every event is news."""
        self._known.clear()

    def connected(self) -> None:
        """Anything may have happened while no one listened, unless the server now says what the
        state is."""
        self._events.add(None)

    def reported(self, data: str) -> None:
        """An event has come. Of too many the rest is simply news, as rubbish is."""
        if '"Email"' in data:
            self._events.discard(None)
        self._events.add(data if len(self._events) < MAX_EVENTS_KEPT else "")

    def has_news(self, account_id: str) -> bool:
        """Whether anything was reported since the last cycle began that it does not account for."""
        events, self._events = self._events, set()
        return any(event is None or self._is_news(event, account_id) for event in events)

    def _is_news(self, data: str, account_id: str) -> bool:
        try:
            states = json.loads(data)["changed"][account_id]
            told = {
                (type_, str(states[type_])) for type_ in ("Email", "Mailbox") if type_ in states
            }
            return not told or not told <= self._known
        except MALFORMED:
            return True


# ------------------------------------------------------------------------------------------------
# The account: who serves it, what it has to have, and what is there
# ------------------------------------------------------------------------------------------------

ContactStore = JMAPContacts | CardDAVContacts


def new_clients(
    settings: MailroomSettings, stopping: Callable[[], bool] = lambda: False
) -> tuple[JMAPClient, ContactStore]:
    """The clients of the account that the settings are for: contacts over CardDAV where they name
    a user for it, else over JMAP."""
    client = JMAPClient(
        settings.jmap_token, settings.jmap_url, username=settings.jmap_username, stopping=stopping
    )
    if not settings.carddav_username:
        return client, JMAPContacts(client)
    auth = credentials(settings.carddav_password, settings.carddav_username)
    return client, CardDAVContacts(settings.carddav_url, auth, stopping)


def parse_mailbox(raw: JSON) -> tuple[int, str, str]:
    """(rank, name, id): the Inbox goes by its role, then come the mailboxes at the top, then the
    nested ones."""
    if raw.get("role") == "inbox":
        return 0, "Inbox", as_text(raw["id"])
    return 2 if raw.get("parentId") else 1, as_text(raw["name"]), as_text(raw["id"])


def ids_by_name(mailboxes: Iterable[tuple[int, str, str]]) -> dict[str, str]:
    """{name: id}; of several with one name the first in rank."""
    return {name: id_ for _, name, id_ in sorted(mailboxes, reverse=True)}


MAILBOXES = Query("Mailbox", None, ("id", "name", "parentId", "role"), parse_mailbox)


class Need(NamedTuple):
    """Something that the account has to have. `kind`: "mailbox", "label" (which is a mailbox too)
    or "contact group"."""

    kind: str
    name: str
    purpose: str
    optional: bool = False


def needed_mailboxes(settings: MailroomSettings) -> list[Need]:
    """The mailboxes that the settings name, beside the Inbox."""
    categories = settings.triage_categories
    destinations = purposes(categories, "destination_mailbox")
    warning = Need("label", settings.label_mailroom_warning, "another name than expected")
    return [
        Need("mailbox", settings.screener_mailbox, "mail of strangers waits here"),
        *(Need("mailbox", name, f"mail of {whose}") for name, whose in destinations.items()),
        *(Need("label", each.label, f"triages a sender to {each.name}") for each in categories),
        Need("label", settings.label_undo, "takes a triage back", optional=True),
        Need("label", settings.label_mailroom_error, "what cannot be done"),
        *([warning] if settings.warnings_enabled else []),
    ]


def needed_groups(settings: MailroomSettings) -> list[Need]:
    """The contact groups that the settings name."""
    groups = purposes(settings.triage_categories, "contact_group")
    return [
        *(Need("contact group", name, f"senders of {whose}") for name, whose in groups.items()),
        Need("contact group", settings.provenance_group, "contacts that Mailroom has made"),
    ]


def purposes(categories: Iterable[Category], attribute: str) -> dict[str, str]:
    """{what an attribute names: the names of the categories that share it}."""
    named: dict[str, list[str]] = defaultdict(list)
    for category in categories:
        named[getattr(category, attribute)].append(category.name)
    return {name: ", ".join(names) for name, names in named.items()}


def lacking(needs: Iterable[Need], there: Collection[str]) -> list[Need]:
    """The needs of which nothing has the name."""
    return [need for need in needs if need.name not in there]


def check_complete(missing: Iterable[Need]) -> None:
    """Raises ConfigurationError with a line for each thing that Mailroom cannot do without."""
    if needs := [need for need in missing if not need.optional]:
        named = sorted(f"{need.kind} {need.name!r}" for need in needs)
        raise ConfigurationError(
            *(f"the account has no {each}: `setup --apply` makes it" for each in named)
        )


def check_inbox(ids: Mapping[str, str]) -> None:
    """Raises ConfigurationError for an account without an Inbox."""
    if "Inbox" not in ids:
        raise ConfigurationError("the account has no mailbox with the role of the Inbox")


def rules_of(settings: MailroomSettings) -> Rules:
    """The rules by which the settings have it done today."""
    return Rules(settings.triage_categories, settings.provenance_group, date.today())


def find_boxes(ids: Mapping[str, str], settings: MailroomSettings) -> Boxes:
    """The mailboxes that the settings name. Raises ConfigurationError where some are missing."""
    check_inbox(ids)
    check_complete(lacking(needed_mailboxes(settings), ids))
    boxes = boxes_there(ids, settings)
    return boxes if settings.warnings_enabled else replace(boxes, warning="")


def boxes_there(ids: Mapping[str, str], settings: MailroomSettings) -> Boxes:
    """Those of the mailboxes that the settings name which the account has."""
    asked = [*settings.triage_categories, settings.undo]
    destinations = {each: ids.get(each.destination_mailbox, "") for each in asked}
    return Boxes(
        inbox=ids.get("Inbox", ""),
        screener=ids.get(settings.screener_mailbox, ""),
        error=ids.get(settings.label_mailroom_error, ""),
        warning=ids.get(settings.label_mailroom_warning, ""),
        labels={ids[each.label]: each for each in asked if each.label in ids},
        destinations={each: box for each, box in destinations.items() if box},
    )


def read_account(
    client: JMAPClient, contacts: ContactStore, addresses: Collection[str] | None = ()
) -> tuple[dict[str, str], list[Card]]:
    """({name: id} of the mailboxes, the contact groups and the contacts of the addresses); None
    for the addresses means all contacts, and the store may bring more than is asked for."""
    calls, questions = contacts.questions(addresses)
    answers, [mailboxes, *found] = client.fetch([MAILBOXES, *questions], calls)
    return ids_by_name(expect(mailboxes)), contacts.cards(addresses, answers, found)


# ------------------------------------------------------------------------------------------------
# The triage cycle
# ------------------------------------------------------------------------------------------------

MAIL_PROPERTIES = ("id", "mailboxIds", "from", "receivedAt")
SENDERS_AT_ONCE = 50
NEWEST_IN_SCREENER = 100
EMAIL_STATE: Call = ("Email/get", {"ids": []})
MAILBOX_STATE: Call = ("Mailbox/get", {"ids": []})


def parse_mail(raw: JSON) -> Mail:
    """A Mail from an Email object (RFC 8621 section 4.1). What cannot be an address is none, and a
    name has nothing in it that could end a line."""
    author = (raw.get("from") or [{}])[0]
    address = (author.get("email") or "").strip().lower()
    return Mail(
        id=as_text(raw["id"]),
        sender=address if "@" in address and address.isprintable() else "",
        display_name=CONTROLS.sub(" ", author.get("name") or ""),
        mailboxes=frozenset(box for box, there in raw["mailboxIds"].items() if there),
        received=as_text(raw.get("receivedAt") or ""),
    )


def by_from(address: str) -> JSON:
    """The search for a sender that an index answers; it finds other mails too, and may lag."""
    return {"from": address}


def by_header(address: str) -> JSON:
    """The search for a sender that needs no index."""
    return {"header": ["From", address]}


def mails_refused(errors: Mapping[str, JSON]) -> dict[str, str]:
    """{mail id: why it was refused}, of the SetErrors of an Email/set. For a mail that is no longer
    there nothing is left to be done."""
    return {id_: error_text(e) for id_, e in errors.items() if e.get("type") != "notFound"}


def names_told(
    client: JMAPClient, contacts: Iterable[Card], mails: Iterable[Mail]
) -> dict[str, set[str]]:
    """{sender: the names that a contact may have got from the sender's mails}. Where those given do
    not tell a contact's name, mails anywhere in the account are asked for, as far as any are found:
    a contact whose name cannot be judged is kept."""
    known = [*mails]
    for condition in (by_from, by_header):
        names = names_given(known)
        asked = sorted(
            address
            for contact in contacts
            if not any(contact.name in names.get(each, ()) for each in contact.emails)
            for address in contact.emails
        )
        for n in range(0, len(asked), SENDERS_AT_ONCE):
            filter_ = any_of(map(condition, asked[n : n + SENDERS_AT_ONCE]))
            query = Query("Email", filter_, MAIL_PROPERTIES, parse_mail, newest=MAX_PAGE)
            _, [found] = client.fetch([query])
            known += [] if isinstance(found, MethodError) else found
    return names_given(known)


class Triage:
    """The triage cycle: reads, plans, carries out. It keeps nothing of one cycle for the next but
    what the account is like (session, mailboxes, own addresses, address books), so that an idle
    cycle is a single request."""

    def __init__(
        self,
        settings: MailroomSettings,
        client: JMAPClient,
        contacts: ContactStore,
        seen: SeenStates,
        counts: Counter[str],
    ) -> None:
        self._settings = settings
        self._client = client
        self._contacts = contacts
        self._seen = seen
        self._counts = counts
        self._ready = False
        self._own: frozenset[str] = frozenset()
        self._boxes: Boxes
        self._mailboxes = MAILBOXES
        self._ids: dict[str, str] = {}
        self._queue: dict[str, Mail] = {}
        self._told: JSON = {}

    def connect(self) -> None:
        """Look at the account. Raises ConfigurationError with all that it lacks, ServerError."""
        self._ready = False
        self._client.connect()
        self._client.check_writable()
        self._contacts.prepare()
        ids, cards = read_account(self._client, self._contacts)
        check_complete(
            lacking(needed_mailboxes(self._settings), ids)
            + lacking(needed_groups(self._settings), groups_by_name(cards))
        )
        self._boxes = find_boxes(ids, self._settings)
        self._mailboxes = self._mailbox_search(ids)
        logins = {self._settings.jmap_username, self._settings.carddav_username}
        self._own = self._client.own_addresses() | {name.lower() for name in logins}
        labels = sorted(category.label for category in self._boxes.labels.values())
        self._ready = True
        facts = fields(account=self._client.account_id, labels=labels)
        level, self._told = logging.DEBUG if facts == self._told else logging.INFO, facts
        LOG.log(level, "account ready", extra=facts)
        if self._settings.label_undo not in labels:
            undo = self._settings.label_undo
            LOG.log(level, f"no label {undo!r}: `setup --apply` makes it, to undo with")

    def _mailbox_search(self, ids: Mapping[str, str]) -> Query:
        """How to ask for the mailboxes: by name, so that a cycle costs the same among thousands. A
        search is trusted only when it finds all that are known to be there."""
        names = ["Inbox", *(need.name for need in needed_mailboxes(self._settings))]
        conditions: list[JSON] = [{"role": "inbox"}, *({"name": name} for name in names)]
        search = MAILBOXES._replace(filter=any_of(conditions))
        _, [hits] = self._client.fetch([search])
        found = {} if isinstance(hits, MethodError) else ids_by_name(hits)
        return search if all(found.get(n) == ids.get(n) for n in names) else MAILBOXES

    def run(self) -> dict[str, str]:
        """One cycle; {sender: why it failed}. Raises MailroomError when it cannot be finished."""
        if self._client.stale or not self._ready:
            self.connect()
        self._seen.begin()
        mails = self._read()
        decided, unusable = sort_queue(mails, self._boxes, self._own)
        failed: dict[str, str] = {}
        # In any order: where a cycle runs into its deadline is then not always the same.
        senders = random.sample(sorted(decided), len(decided))
        for start in range(0, len(senders), SENDERS_AT_ONCE):
            batch = {sender: decided[sender] for sender in senders[start : start + SENDERS_AT_ONCE]}
            failed |= self._triage(batch, mails)
        patches = error_patches(mails, decided, unusable, self._boxes)
        return failed | self._mark_errors(mails, unusable, patches)

    def _mark_errors(
        self, mails: Iterable[Mail], unusable: Mapping[str, str], patches: Mapping[str, MailPatch]
    ) -> dict[str, str]:
        """Put the error label on the unusable mails and take it off others; {sender: why it
        failed}."""
        refused, _ = self._update_mails(patches)
        for mail in mails:
            if mail.id in unusable and patches[mail.id] and mail.id not in refused:
                marked = fields(mail=mail.id, reason=unusable[mail.id])
                LOG.warning("mail marked as an error", extra=marked)
        return {
            mail.sender or f"mail {mail.id}": refused[mail.id]
            for mail in mails
            if mail.id in refused
        }

    def _read(self) -> list[Mail]:
        """The mails under a triage label or the error label. The states come first: what happens
        while the rest is read is news then. The mailboxes come along, and when a label turns out
        to be another than before the mails are read again."""
        while True:
            asked = self._boxes.queue
            (email, mailbox), [mailboxes, found] = self._client.fetch(
                [self._mailboxes, self._labelled()], [EMAIL_STATE, MAILBOX_STATE]
            )
            self._ids = ids_by_name(expect(mailboxes))
            self._boxes = find_boxes(self._ids, self._settings)
            if self._boxes.queue == asked:
                break
        self._seen.saw("Email", email.get("state"))
        self._seen.saw("Mailbox", mailbox.get("state"))
        self._queue = {mail.id: mail for mail in expect(found)}
        return list(self._queue.values())

    def _triage(
        self, senders: Mapping[str, Category], queue: Collection[Mail], tries: int = 2
    ) -> dict[str, str]:
        """Triage a batch of senders; {sender: why it failed}. When a request fails and the server
        is well the batch is split, so that the sender at fault holds up no one else. Raises the
        error of a server that wants to be left alone."""
        try:
            plans = self.plan(senders, queue)
            first = first_of_each_contact(plans)
            failed = self.carry_out(first.values())
        except ServerError as error:
            if error.retry_after:
                raise
            if not error.answered:
                self.connect()  # It raises when it is the server that is at fault.
            names = list(senders)
            if len(names) == 1:
                # Once more: someone else may have written to the contacts at the same time.
                return (
                    self._triage(senders, queue, tries - 1) if tries > 1 else {names[0]: str(error)}
                )
            # One by one after a silence: each further one may cost a whole time-out.
            size = (len(names) + 1) // 2 if error.answered else 1
            failed = {}
            for start in range(0, len(names), size):
                part = {name: senders[name] for name in names[start : start + size]}
                failed |= self._triage(part, queue, tries if error.answered else 1)
            return failed
        # A contact with several addresses may be asked for twice: the second time sees the first.
        later = {
            plan.sender: plan.category for plan in plans if plan is not first[plan.contact.uid]
        }
        return failed | (self._triage(later, queue) if later else {})

    def plan(self, senders: Mapping[str, Category], queue: Collection[Mail]) -> list[SenderPlan]:
        """The plans for some senders: one request, or a few where searches cannot be trusted."""
        calls, questions = self._contacts.questions(senders)
        searches = [self._search(senders, by_from), self._newest_in_screener(senders)]
        answers, found = self._client.fetch([*questions, *searches], calls)
        cards = self._contacts.cards(senders, answers, found[: len(questions)])
        check_complete(lacking(needed_groups(self._settings), groups_by_name(cards)))
        known = [mail for mail in queue if mail.sender in senders]
        mails = self._complete(known, found[len(questions)], expect(found[-1]))
        undone = {sender for sender, category in senders.items() if category.undoes}
        rules = rules_of(self._settings)
        gone = self._as_made(undone, chain(*map(dict.values, mails.values())), cards, rules)
        return [
            plan_sender(sender, category, mails[sender].values(), cards, rules, self._boxes, gone)
            for sender, category in senders.items()
            if any(
                self._boxes.label_of(category) in mail.mailboxes for mail in mails[sender].values()
            )
        ]

    def _as_made(
        self, senders: Collection[str], mails: Iterable[Mail], cards: Collection[Card], rules: Rules
    ) -> set[str]:
        """The refs of the senders' contacts that are as Mailroom made them."""
        made = [card for card in cards if card.emails & {*senders} and was_made(card)]
        if not made:
            return set()
        untouched = self._contacts.untouched(made)
        names = names_told(self._client, [card for card in made if card.ref in untouched], mails)
        return as_made(made, names, rules.foreign_groups(cards), untouched)

    def _search(self, senders: Collection[str], condition: Callable[[str], JSON] | None) -> Query:
        """The query for the senders' mails where they may be re-filed; without a condition all
        mails there are listed. Any search finds others' mails too: addresses are compared here."""
        there = in_any(self._boxes.managed | self._boxes.labels.keys())
        conditions = [there, any_of(map(condition, sorted(senders)))] if condition else [there]
        return Query(
            "Email",
            {"operator": "AND", "conditions": conditions},
            MAIL_PROPERTIES,
            lambda raw: mail if (mail := parse_mail(raw)).sender in senders else None,
        )

    def _newest_in_screener(self, senders: Collection[str]) -> Query:
        """The query for what has just arrived and may not be in the index yet."""
        query = self._search(senders, None)
        return query._replace(filter=in_any([self._boxes.screener]), newest=NEWEST_IN_SCREENER)

    def _complete(
        self, known: Collection[Mail], searched: Found, newest: list[Mail]
    ) -> dict[str, dict[str, Mail]]:
        """All mails of the senders of the known ones: {sender: {id: mail}}. A search is trusted for
        a sender when it finds the labelled mails that are known; if not, the next one is tried, and
        at last the mailboxes are listed."""
        mails: dict[str, dict[str, Mail]] = defaultdict(dict)
        for mail in [*known, *newest]:
            mails[mail.sender][mail.id] = mail
        expected = [mail for mail in known if mail.mailboxes & self._boxes.labels.keys()]
        for condition in (by_header, None):
            hits = [] if isinstance(searched, MethodError) else searched
            for mail in hits:
                mails[mail.sender][mail.id] = mail
            seen = {mail.id for mail in hits}
            doubtful = {mail.sender for mail in expected if mail.id not in seen}
            if not doubtful:
                return mails
            expected = [mail for mail in expected if mail.sender in doubtful]
            _, [searched] = self._client.fetch([self._search(doubtful, condition)])
        for mail in expect(searched):
            mails[mail.sender][mail.id] = mail
        return mails

    def carry_out(self, plans: Collection[SenderPlan]) -> dict[str, str]:
        """Carry out the plans, step by step; {sender: why it failed}."""
        failed: dict[str, str] = {}
        for step in STEPS:
            going = [plan for plan in plans if plan.sender not in failed]
            writes = step(going)
            calls = self._contacts.calls(writes.cards)
            mails_refused, answers = self._update_mails(writes.mails, calls)
            cards_refused = self._contacts.apply(writes.cards, answers)
            failed |= failures(going, writes, cards_refused, mails_refused)
        for plan in plans:
            if plan.sender not in failed:
                self._note_triaged(plan)
        return failed

    def _note_triaged(self, plan: SenderPlan) -> None:
        filed = sum(map(bool, plan.refile.values()))
        undone = plan.category.undoes
        self._counts["senders_undone_total" if undone else "senders_triaged_total"] += 1
        self._counts["mails_filed_total"] += filed
        LOG.info(
            "triage taken back" if undone else "sender triaged",
            extra=fields(
                sender=plan.sender,
                **{} if undone else {"category": plan.category.name},
                mails_filed=filed,
                contact=plan.contact.fate,
                joined=[group.name for group in plan.join],
                left=[group.name for group in plan.leave],
            ),
        )
        if plan.name_differs:
            LOG.warning(
                "the contact has another name than the mail",
                extra=fields(
                    sender=plan.sender, contact=plan.contact.card and plan.contact.card.name
                ),
            )

    def _update_mails(
        self, patches: Mapping[str, MailPatch], along: Sequence[Call] = ()
    ) -> tuple[dict[str, str], list[JSON]]:
        """Email/set in as many requests as the limits force: {mail id: why it was refused}. Each
        request looks at the labels again when it has written: what came in between must not be
        taken for old news. The first, if there is any, takes other calls along, before its own,
        and brings their answers."""
        refused: dict[str, str] = {}
        answers: list[JSON] = []
        look = self._labelled()._replace(properties=("id", "mailboxIds"))
        changes = {id_: patch for id_, patch in patches.items() if patch}
        for portion in self._client.portions(changes):
            write: Call = ("Email/set", {"update": portion})
            (*others, done, mailbox, email), [mailboxes, found] = self._client.fetch(
                [self._mailboxes, look], [*along, write, MAILBOX_STATE, EMAIL_STATE]
            )
            answers, along = answers + others, ()
            now = ids_by_name(expect(mailboxes)), self._labels(expect(found))
            errors = set_errors(done)
            refused |= mails_refused(errors)
            for id_ in portion.keys() & self._queue.keys() - errors.keys():
                self._queue[id_] = self._queue[id_].patched(portion[id_])
            self._seen.saw("Email", done.get("newState"))
            self._seen.saw("Mailbox", mailbox.get("state"))
            self._seen.saw("Email", email.get("state"))
            if now != (self._ids, self._labels(self._queue.values())):
                self._seen.forget()
        return refused, answers

    def _labelled(self) -> Query:
        return Query("Email", in_any(self._boxes.queue), MAIL_PROPERTIES, parse_mail)

    def _labels(self, mails: Iterable[Mail]) -> set[tuple[str, frozenset[str]]]:
        """{(mail id, its labels)} of those that have any."""
        labels = ((mail.id, mail.mailboxes & self._boxes.queue) for mail in mails)
        return {(id_, there) for id_, there in labels if there}


# ------------------------------------------------------------------------------------------------
# The dry run: what a cycle would do, in words
# ------------------------------------------------------------------------------------------------


def number(many: int, noun: str) -> str:
    """`1 mail`, `2,500 mails`."""
    return f"{many:,} {noun}{'' if many == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def explain_contact(change: CardChange) -> str:
    """What becomes of a sender's contact, and why."""
    if not change.card:
        made = f'make the contact "{change.name}" ({change.kind}): none has this address'
        return made if change.kind else "there is no contact with this address"
    name = change.card.name
    if change.destroy:
        return f'delete the contact "{name}": Mailroom made it and nobody has touched it'
    if change.clean:
        return f'keep the contact "{name}", without Mailroom\'s lines in its note'
    filled = [f'give it the name "{change.name}", as it has none'] if change.name else []
    noted = [f'add "{line}" to its note' for line in change.note]
    return ", ".join([f'keep the contact "{name}", which has this address', *filled, *noted])


def explain_patches(patches: Iterable[MailPatch], names: Mapping[str, str]) -> Iterator[str]:
    """Where mails go, a line for those that go the same way. `names`: {mailbox id: name}."""
    ways = Counter(tuple(sorted(patch.items())) for patch in patches if patch)
    for way, mails in ways.items():
        boxes = [
            (names.get(path.removeprefix("mailboxIds/"), "another mailbox"), stays)
            for path, stays in way
        ]
        out = listed(name for name, stays in boxes if not stays)
        into = listed(name for name, stays in boxes if stays)
        yield f"file {number(mails, 'mail')} into {into}" + (f", out of {out}" if out else "")


def explain(plan: SenderPlan, names: Mapping[str, str]) -> str:
    """What a plan does for a sender, and why, in lines. `names`: {mailbox id: name}."""
    lines = [f"{plan.sender} has the label {plan.category.label}", explain_contact(plan.contact)]
    if plan.join:
        lines.append(f"put the contact into {listed(group.name for group in plan.join)}")
    if plan.leave:
        lines.append(f"take the contact out of {listed(group.name for group in plan.leave)}")
    lines += explain_patches(plan.refile.values(), names)
    if plan.name_differs:
        lines.append("warn that the mail gives another name than the contact")
    off = Counter(
        names.get(path.removeprefix("mailboxIds/"), "another label")
        for patch in plan.finish.values()
        for path, stays in patch.items()
        if not stays
    )
    lines += [f"take {label} off {number(mails, 'mail')}" for label, mails in off.items()]
    return "\n  ".join(lines)


class DryRun(Triage):
    """The cycle without its writes: it says what it would do, where that is news."""

    def __init__(self, say: Callable[[str], object], *given: Any) -> None:
        super().__init__(*given)
        self._say = say
        self._found: list[str] = []
        self._said: list[str] = []

    def run(self) -> dict[str, str]:
        """One cycle; {sender: why it failed}. Raises MailroomError when it cannot be finished."""
        self._found = []
        failed = super().run()
        said, self._said = self._said, sorted(self._found) or ["There is nothing to do."]
        for text in self._said:
            if text not in said:
                self._say(text)
        return failed

    def carry_out(self, plans: Collection[SenderPlan]) -> dict[str, str]:
        names = {id_: name for name, id_ in self._ids.items()}
        self._found += [explain(plan, names) for plan in plans]
        return {}

    def _mark_errors(
        self, mails: Iterable[Mail], unusable: Mapping[str, str], patches: Mapping[str, MailPatch]
    ) -> dict[str, str]:
        label = self._settings.label_mailroom_error
        for mail in mails:
            if patches.get(mail.id) and mail.id in unusable:
                self._found.append(f"mail {mail.id} gets {label}: {unusable[mail.id]}")
            elif patches.get(mail.id):
                self._found.append(f"mail {mail.id} loses {label}: nothing is wrong any more")
        return {}


# ------------------------------------------------------------------------------------------------
# Health and metrics
# ------------------------------------------------------------------------------------------------


CYCLE_DEADLINE = 300.0
# So many clients are served at a time, and each for so many seconds.
HEALTH_CLIENTS = 20
HEALTH_SECONDS = 5.0


class HealthHandler(gevent.pywsgi.WSGIHandler):
    """One client of the health port, for one request. One that is too slow is taken for gone, and a
    malformed request is not logged."""

    def handle(self) -> None:
        gone = BrokenPipeError(errno.EPIPE, "too slow")
        with suppress(OSError), gevent.Timeout(HEALTH_SECONDS, gone):
            super().handle()

    def read_request(self, raw_requestline: str) -> Any:
        try:
            return super().read_request(raw_requestline)
        except (OSError, ValueError, HTTPException):
            return None


class Health:
    """What the service can say of itself; the service alone writes it. `counts` holds the samples
    of the counters by their names without the prefix."""

    def __init__(self, settings: MailroomSettings) -> None:
        self.stream = StreamStatus()
        self.counts = Counter(
            senders_triaged_total=0,
            senders_undone_total=0,
            sender_failures_total=0,
            mails_filed_total=0,
        )
        self.consecutive_failures = 0
        self.last_trigger: str | None = None
        self.last_success: float | None = None
        self._started = time.monotonic()
        self._max_age = 2 * settings.poll_interval + CYCLE_DEADLINE
        self._shown = settings.shown

    def note_cycle(self, trigger: str, result: str) -> None:
        """A cycle has ended: a `success`; with `sender_failures`, where the account was read but
        not every sender triaged; or in a `failure`."""
        self.counts[f'cycles_total{{trigger="{trigger}",result="{result}"}}'] += 1
        self.consecutive_failures = 0 if result == "success" else self.consecutive_failures + 1
        if result != "failure":
            self.last_success, self.last_trigger = time.monotonic(), trigger

    def page(self) -> tuple[str, str, str]:
        """(status line, media type, body) for /healthz."""
        now = time.monotonic()
        fresh = now - (self.last_success or self._started) < self._max_age
        age = None if self.last_success is None else round(now - self.last_success, 3)
        error = self.stream.last_error
        body = {
            "status": "ok" if fresh else "failing",
            "last_poll_age_seconds": age,
            "last_poll_trigger": self.last_trigger,
            "consecutive_failures": self.consecutive_failures,
            "eventsource": asdict(self.stream) | {"last_error": error and self._shown(error)},
        }
        status = "200 OK" if fresh else "503 Service Unavailable"
        return status, "application/json", json.dumps(body)

    def metrics(self) -> tuple[str, str, str]:
        """(status line, media type, body) for /metrics, in the Prometheus text format 0.0.4."""
        gauges = {
            "consecutive_failures": self.consecutive_failures,
            "eventsource_connected": int(self.stream.status == "connected"),
            "last_poll_age_seconds": time.monotonic() - (self.last_success or self._started),
        }
        counters = {**self.counts, "eventsource_reconnects_total": self.stream.reconnect_count}
        lines: dict[str, None] = {}
        for kind, samples in (("counter", counters), ("gauge", gauges)):
            for name, value in sorted(samples.items()):
                lines[f"# TYPE mailroom_{name.partition('{')[0]} {kind}"] = None
                lines[f"mailroom_{name} {value:.16g}"] = None
        return "200 OK", "text/plain; version=0.0.4; charset=utf-8", "\n".join([*lines, ""])

    def __call__(self, environ: JSON, start_response: Callable[..., Any]) -> list[bytes]:
        """The WSGI application (PEP 3333)."""
        pages = {"/healthz": self.page, "/metrics": self.metrics}
        page = pages.get(environ["PATH_INFO"]) if environ["REQUEST_METHOD"] == "GET" else None
        missing = ("404 Not Found", "text/plain", "not found\n")
        status, media_type, body = page() if page else missing
        start_response(status, [("Content-Type", media_type), ("Connection", "close")])
        return [body.encode()]


# ------------------------------------------------------------------------------------------------
# The service
# ------------------------------------------------------------------------------------------------

FAULT = "a fault in the program"
# What writing to a standard output raises that is full or that no one reads. Compared by the exact
# class: errors of the network are OSErrors of classes of their own.
OUTPUT_ERRORS = (OSError, BrokenPipeError)
# A cycle has so long to come to an end, and the other greenlets a second: within 5 all is over.
SHUTDOWN_SECONDS = 3.0
CONNECT_GRACE = 1.0
# So many signals may wait for a cycle; then the stream is left unread.
MAX_SIGNALS = 10_000


def drain_queue(queue_: Any) -> int:
    """Empty a queue without waiting; how many items were dropped."""
    dropped = 0
    while True:
        try:
            queue_.get_nowait()
        except queue.Empty:
            return dropped
        dropped += 1


def give_back_memory() -> None:
    """Have the C library give back the memory that is free. glibc keeps it where some in between is
    in use, as after a large cycle."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Service:
    """The long-lived greenlets: one that runs the cycles, one that listens, one for health. When
    one of them ends, so does the program. With `once` there is but one cycle, and nothing else;
    with `dry_run`, called with each plan in words, no cycle writes."""

    def __init__(
        self,
        settings: MailroomSettings,
        *,
        once: bool = False,
        dry_run: Callable[[str], object] | None = None,
    ) -> None:
        self.shutdown = gevent.event.Event()
        self.health = Health(settings)
        self._settings = settings
        self._queue: gevent.queue.Queue[str] = gevent.queue.Queue(MAX_SIGNALS)
        self._seen = SeenStates()
        self._over: gevent.event.AsyncResult[BaseException | None] = gevent.event.AsyncResult()
        self._greenlets: list[gevent.Greenlet[..., Any]] = []
        self._client, contacts = new_clients(settings, self.shutdown.is_set)
        given = (settings, self._client, contacts, self._seen, self.health.counts)
        self._triage = DryRun(dry_run, *given) if dry_run else Triage(*given)
        self._once = once
        self._told: dict[str, str] = {}
        self._listening = False

    def run(self) -> int:
        """Serve until a signal or a fault, or the one cycle is done; the exit status."""
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            gevent.signal_handler(signal_number, self.shutdown.set)
        try:
            if not self._once:
                self._serve_health()
            cycles = self._spawn(self._cycles)
            waited: list[Any] = [self.shutdown, self._over]
            gevent.wait(waited, count=1)
            if self.shutdown.is_set():
                drain_queue(self._queue)  # A full one would not take what wakes the cycles.
                self._queue.put("shutdown")
                cycles.join(SHUTDOWN_SECONDS)
                LOG.info("stopped")
                return 0
            fault = self._over.get()
            if fault and type(fault) in (ConfigurationError, *OUTPUT_ERRORS):
                raise fault
            if self._once and fault is None:
                return 3 if self.health.consecutive_failures else 0
            raise RuntimeError("a greenlet has ended") from fault
        except ConfigurationError as error:
            for problem in error.problems:
                LOG.error(problem)
            return 2
        except Exception as error:
            if type(error) in OUTPUT_ERRORS:
                raise
            LOG.critical(FAULT, exc_info=True)
            return 1
        finally:
            gevent.killall(self._greenlets, timeout=1)

    def _spawn(self, run: Callable[[], object]) -> "gevent.Greenlet[..., Any]":
        greenlet = gevent.spawn(outcome, run)
        greenlet.link(lambda ended: self._over.set(ended.value))
        self._greenlets.append(greenlet)
        return greenlet

    def _serve_health(self) -> None:
        host, port = self._settings.health_host, self._settings.health_port
        if not port:
            return
        server = gevent.pywsgi.WSGIServer(
            (host, port),
            self.health,
            log=None,
            error_log=None,
            spawn=HEALTH_CLIENTS,
            handler_class=HealthHandler,
        )
        try:
            server.start()
        except OSError as error:
            raise ConfigurationError(
                f"MAILROOM_HEALTH_HOST={host!r}, MAILROOM_HEALTH_PORT={port}: give others, or "
                f"port 0 for none ({str(error.strerror or error).partition(':')[0]})"
            ) from None
        self._spawn(lambda: server.serve_forever(stop_timeout=0))

    def _listen(self) -> None:
        """Start to listen, once it is known where."""
        url = self._client.event_source_url
        if self._once:
            return
        if not url and self.health.last_success is None:
            LOG.info("the server has no push: polling")
        if not url or self._listening:
            return
        self._listening = True
        self._spawn(
            lambda: sse_listener(
                self._settings.jmap_token,
                url,
                self._queue,
                self.shutdown,
                LOG,
                username=self._settings.jmap_username,
                moved_to=lambda: self._client.event_source_url,
                status=self.health.stream,
                on_open=self._connected,
                on_state=self._seen.reported,
            )
        )

    def _connected(self) -> None:
        """The server may say at once what the state is; if not, a cycle looks."""
        self._seen.connected()
        gevent.spawn_later(CONNECT_GRACE, self._queue.put, "connected")

    def _cycles(self) -> None:
        trigger = "startup"
        while not self.shutdown.is_set():
            delay = self._cycle(trigger)
            give_back_memory()
            if self._once:
                return
            trigger = self._wait(delay)

    def _wait(self, delay: float) -> str:
        """Wait until a cycle is due; what triggers it. The first signal opens a window, and all
        that arrives in it is one cycle; the window does not slide, so that no steady stream of
        events can put the cycle off, and ends when the timer does. Signals that came while a cycle
        ran open one at once."""
        due = time.monotonic() + delay
        while not self.shutdown.is_set() and (left := due - time.monotonic()) > 0:
            try:
                self._queue.get(timeout=left)
            except queue.Empty:
                break
            self.shutdown.wait(min(self._settings.debounce_seconds, left))
            drain_queue(self._queue)
            if not self.shutdown.is_set() and self._seen.has_news(self._client.account_id):
                return "push"
        return "scheduled" if self.health.stream.status == "connected" else "fallback"

    def _cycle(self, trigger: str) -> float:
        """Run one cycle; the seconds until the next one is due at the latest. Raises
        ConfigurationError as long as none has succeeded."""
        late = MailroomError(f"the cycle was not done after {CYCLE_DEADLINE:g} seconds")
        try:
            with gevent.Timeout(CYCLE_DEADLINE, late):
                failed = self._triage.run()
        except ShuttingDown:
            return 0.0
        except MailroomError as error:
            if isinstance(error, ConfigurationError) and self.health.last_success is None:
                raise
            # Nothing is taken for granted: neither what was read, nor for long the session.
            again = self.health.consecutive_failures > 0
            self._client.stale |= again or error.answered
            self._seen.begin()
            return self._after(trigger, "failure", {"": str(error)}, error.retry_after)
        self._listen()
        return self._after(trigger, "sender_failures" if failed else "success", failed)

    def _after(
        self, trigger: str, result: str, failures: Mapping[str, str], retry_after: float = 0.0
    ) -> float:
        """Note how a cycle ended, say what is news about it, and when the next one is due.
        `failures`: {sender, or nothing for the whole cycle: why}."""
        before = self.health.consecutive_failures
        self.health.note_cycle(trigger, result)
        self.health.counts["sender_failures_total"] += len(failures.keys() - {""})
        # The same cause with another count of bytes or seconds in it is no news.
        causes = {sender: re.sub("[0-9]+", "0", reason) for sender, reason in failures.items()}
        for sender, reason in failures.items():
            if self._told.get(sender) != causes[sender]:
                text = "sender not triaged, the label stays" if sender else "cycle failed"
                LOG.error(text, extra=fields(**{"sender": sender} if sender else {}, cause=reason))
        self._told = causes
        if before and not failures:
            LOG.info("recovered", extra=fields(failed_cycles=before))
        LOG.debug("cycle done", extra=fields(trigger=trigger, result=result))
        interval = self._settings.poll_interval
        if not failures or self._once:
            return interval
        # No event shortens this pause: a server in trouble is not asked at the pace of its events.
        pause = min(interval, max(retry_after, FIRST_DELAY))
        self.shutdown.wait(pause)
        return max(0.0, min(interval, max(retry_after, backoff(before))) - pause)


# ------------------------------------------------------------------------------------------------
# Rules for mail to come
# ------------------------------------------------------------------------------------------------

# By its first line Mailroom knows a Sieve script as its own.
SIEVE_MARKER = "# Made by Mailroom: `setup --apply --sieve` writes this script anew."
SIEVE_NEEDS = ("fileinto", "copy", "vnd.cyrus.jmapquery")
# What asks Cyrus and Fastmail for the senders in a group of contacts, given the group's uid; the
# other name is that of servers from before RFC 9610 (Cyrus 3.6).
OLD_CYRUS_SIEVE = "https://cyrusimap.org/ns/jmap/sieve"
GROUP_FILTER, OLD_GROUP_FILTER = "fromContactCardUid", "fromContactGroupId"


class Route(NamedTuple):
    """Mails from the contacts in a group go to a mailbox, and out of the Inbox but for the
    contacts who are in one of the groups `stay` too."""

    group: str
    mailbox: str
    stay: tuple[str, ...]


def routes(categories: Sequence[Category]) -> list[Route]:
    """A route for each category. All routes that fit a mail apply, and any of them takes it out of
    the Inbox, so that the mail goes where triage puts one from the Screener.

    Where categories share a group nobody can tell their senders apart: the mails go to the
    mailboxes of all of them, and stay in the Inbox if they do for one of them.
    """

    def groups(category: Category) -> list[str]:
        family = [category, *ancestors(category, categories)]
        return [each.contact_group for each in family]

    inboxed = [each for each in categories if each.add_to_inbox]
    found = []
    for each in categories:
        stay = (one.contact_group for one in inboxed if each.contact_group in groups(one))
        route = Route(each.contact_group, each.destination_mailbox, tuple(dict.fromkeys(stay)))
        found.append(route)
    return found


def quoted(text: str) -> str:
    """A string of Sieve (RFC 5228 section 2.4.2) or of a Fastmail search."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def fastmail_rule(name: str, search: str, mailbox: str | None, skip_inbox: bool, now: str) -> JSON:
    """A rule as it is in Fastmail's export; the rules that follow it apply too."""
    return {
        "name": f"Mailroom: {name}",
        "combinator": "all",
        "conditions": None,
        "search": search,
        "markRead": False,
        "markFlagged": False,
        "showNotification": False,
        "redirectTo": None,
        "fileIn": mailbox,
        "skipInbox": skip_inbox,
        "snoozeUntil": None,
        "discard": False,
        "markSpam": False,
        "stop": False,
        "previousFileInName": None,
        "created": now,
        "updated": now,
    }


def fastmail_rules(
    settings: MailroomSettings, now: str, paths: Mapping[str, str] | None = None
) -> list[JSON]:
    """The rules file for Fastmail's import: a rule for each category, a second one for a category
    some of whose senders stay in the Inbox, and last that for strangers. A mail without a sender,
    or from an address of the user's that is in no contact, is a stranger's.

    `now`: a UTCDate; `paths`: {mailbox name: its path}, such as `Inbox/Screener`, of nested ones.
    """
    paths, rules = paths or {}, []
    for route in routes(settings.triage_categories):
        mailbox, members = paths.get(route.mailbox, route.mailbox), f"fromin:{quoted(route.group)}"
        rules.append(fastmail_rule(route.group, members, mailbox, not route.stay, now))
        if route.stay and route.group not in route.stay:
            search = " NOT ".join([members, *(f"fromin:{quoted(group)}" for group in route.stay)])
            rules.append(fastmail_rule(f"{route.group}, no Inbox", search, None, True, now))
    screener = paths.get(settings.screener_mailbox, settings.screener_mailbox)
    strangers = fastmail_rule("strangers", "NOT fromin:contacts", screener, True, now)
    return [*rules, strangers]


def jmapquery(condition: JSON) -> str:
    """A Sieve test by a filter of Email/query."""
    return f"jmapquery {quoted(json.dumps(condition))}"


def any_test(tests: Sequence[str]) -> str:
    """A Sieve test that is true if one of these is."""
    return tests[0] if len(tests) == 1 else "anyof (" + ",\n  ".join(tests) + ")"


def all_test(*tests: str) -> str:
    """A Sieve test that is true if all of these are."""
    return "allof (" + ",\n  ".join(tests) + ")"


def in_group(uid: str, group_filter: str) -> str:
    """The Sieve test whether the sender is in a group. A server may know the group by its uid with
    or without `urn:uuid:`, and takes the other for a group that has no members."""
    uids = dict.fromkeys([uid, uid.removeprefix("urn:uuid:")])
    return any_test([jmapquery({group_filter: each}) for each in uids])


class Filing(NamedTuple):
    """A Sieve command that files the mails for which a test holds."""

    title: str
    test: str
    mailbox: str
    keeps_inbox: bool = False

    def command(self, by_id: Mapping[str, str]) -> str:
        """The command. It goes by the mailbox's id (RFC 9042) if that is given, and by its name for
        when there is no such id any longer."""
        tags = [":copy"] if self.keeps_inbox else []
        tags += [":mailboxid", quoted(by_id[self.mailbox])] if self.mailbox in by_id else []
        action = " ".join(["fileinto", *tags, quoted(self.mailbox)])
        return f"# {self.title}\nif {self.test} {{\n  {action};\n}}"


def route_filings(route: Route, members: Mapping[str, str]) -> list[Filing]:
    """A route in Sieve. `members`: {group: the test whether the sender is in it}."""
    if route.group not in members:
        return []
    test, stay = members[route.group], [members[name] for name in route.stay if name in members]
    if not stay or route.group in route.stay:
        return [Filing(route.group, test, route.mailbox, bool(stay))]
    return [
        Filing(f"{route.group}, and Inbox", all_test(test, any_test(stay)), route.mailbox, True),
        Filing(route.group, all_test(test, f"not {any_test(stay)}"), route.mailbox),
    ]


def strangers_filing(screener: str, has_lists: bool) -> Filing:
    """What files the mails of senders in no contact. It is negated within the filter: if the server
    cannot carry that out, mails stay in the Inbox. Without a search index Cyrus 3.6 misses contacts
    by the filter, and finds those of the first address book by the list (RFC 6134)."""
    test = jmapquery({"operator": "NOT", "conditions": [{"fromAnyContact": True}]})
    if has_lists:
        test = all_test(test, 'not address :list "from" ":addrbook:default"')
    return Filing("Strangers", test, screener)


def sieve_script(
    settings: MailroomSettings,
    groups: Mapping[str, str],
    mailbox_ids: Mapping[str, str],
    offered: Collection[str],
    group_filter: str = GROUP_FILTER,
) -> str:
    """A Sieve script (RFC 5228) that does what the Fastmail rules do. Lines end with LF.

    `groups`: {name: uid}; a category whose group is not there is left out. `mailbox_ids`:
    {name: id}. `offered`: the server's Sieve extensions, or nothing where they are not known.
    Raises ConfigurationError where the server's Sieve cannot do it.
    """
    if missing := set(SIEVE_NEEDS) - set(offered or SIEVE_NEEDS):
        named = ", ".join(sorted(missing))
        raise ConfigurationError(f"the server's Sieve cannot tell groups of contacts: no {named}")
    by_id = mailbox_ids if not offered or "mailboxid" in offered else {}
    extensions = [*SIEVE_NEEDS, *(["mailboxid"] if by_id else [])]
    extensions += {"extlists"} & set(offered)
    members = {name: in_group(uid, group_filter) for name, uid in groups.items()}
    filings: list[Filing] = []
    for route in routes(settings.triage_categories):
        filings += route_filings(route, members)
    filings.append(strangers_filing(settings.screener_mailbox, "extlists" in offered))
    # Cyrus keeps a mail in the Inbox if the last filing into a mailbox does.
    filings.sort(key=lambda filing: not filing.keeps_inbox)
    required = f"require [{', '.join(map(quoted, extensions))}];"
    return "\n\n".join([SIEVE_MARKER, required, *(each.command(by_id) for each in filings)]) + "\n"


# ------------------------------------------------------------------------------------------------
# What a person reads
# ------------------------------------------------------------------------------------------------

WIDTH, MAX_CELL = 80, 32
GREEN, YELLOW, RED = "\x1b[32m", "\x1b[33m", "\x1b[31m"
COLOURS = {"there": GREEN, "made": GREEN, "missing": YELLOW, "refused": RED, "problem": RED}


class Console:
    """Standard output, for a person. There is colour on a terminal only, and never with NO_COLOR
    (no-color.org); no text can command the terminal, and no secret gets through."""

    def __init__(self, settings: MailroomSettings) -> None:
        self._redact = settings.redact
        self._is_watched = sys.stdout.isatty()
        self._has_colour = self._is_watched and not os.environ.get("NO_COLOR")

    def say(self, text: str = "", meaning: str = "") -> None:
        """Print lines of text, in the colour of their meaning."""
        shown = "\n".join(CONTROLS.sub(" ", self._redact(line)) for line in text.split("\n"))
        colour = COLOURS.get(meaning) if self._has_colour else ""
        print(f"{colour}{shown}\x1b[0m" if colour else shown, flush=True)

    def progress(self, done: int, total: int, what: str) -> None:
        """Print how far long work has come: on one line where a person watches."""
        text = f"{done:,} of {total:,} {what}"
        if self._is_watched:
            print(f"\r\x1b[K{text}", end="" if done < total else "\n", flush=True)
        else:
            print(text, flush=True)


def cut(text: str, most: int) -> str:
    """The text, or so much of it that it has at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def table(rows: Iterable[Sequence[str]], indent: str = "") -> list[str]:
    """Rows of cells as lines with aligned columns, none longer than WIDTH. The last cell gets what
    the others leave it."""
    kept = [
        [*(cut(CONTROLS.sub(" ", cell), MAX_CELL) for cell in row), CONTROLS.sub(" ", last)]
        for *row, last in rows
    ]
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
    lines = (indent + "  ".join(map(str.ljust, row, widths)).rstrip() for row in kept)
    return [cut(line, WIDTH) for line in lines]


# ------------------------------------------------------------------------------------------------
# Setup: what the account has, what it lacks, and making that
# ------------------------------------------------------------------------------------------------

SIEVE_NAME = "mailroom"
SIEVE_TYPE = "application/sieve"
NO_SIEVE = (
    "the server offers no JMAP Sieve: put what `setup --sieve` prints in where the server has its "
    "rules"
)
NOT_OURS = (
    "was not made by Mailroom and stays: put what `setup --sieve` prints into it, or deactivate it"
)


def session_facts(client: JMAPClient, settings: MailroomSettings) -> dict[str, str]:
    """What the session offers, in words."""
    account, limits = client.account(MAIL), client.limits
    rights = (account.get("accountCapabilities") or {}).get(MAIL) or {}
    may_write = [
        name
        for name, capability in (("mail", MAIL), ("contacts", CONTACTS))
        if client.account(capability) and not client.account(capability).get("isReadOnly")
    ]
    token = f"may write {' and '.join(may_write) or 'nothing'}"
    if rights.get("mayCreateTopLevelMailbox") is False:
        token += ", but make no mailboxes"
    contacts = "over JMAP"
    if settings.carddav_username:
        contacts = f"over CardDAV, {settings.carddav_url} as {settings.carddav_username}"
    return {
        "account": f"{account.get('name') or account['id']}, {client.session_url}",
        "token": token,
        "contacts": contacts,
        "push": "yes" if client.event_source_url else "no: polling",
        "Sieve": "over JMAP" if client.account(SIEVE) else "not over JMAP",
        "limits": f"{limits['maxObjectsInGet']:,} objects a get, {limits['maxObjectsInSet']:,} "
        f"a set; {limits['maxCallsInRequest']} calls, {limits['maxSizeRequest'] // 1000:,} kB",
    }


def setup_item(need: Need, missing: Collection[Need], tried: Mapping[Need, str]) -> dict[str, str]:
    """What is told of a need, given what the account lacks and what became of the tries. Its state
    is there, missing, made or refused; the purpose of what is refused is the reason."""
    reason = tried.get(need, "")
    state = "missing" if need in missing else "there"
    if need in tried:
        state = "refused" if reason else "made"
    purpose = reason or need.purpose
    return {"state": state, "kind": need.kind, "name": need.name, "purpose": purpose}


# {state: (exit status, what to do next)}, the worst first
VERDICTS = {
    "refused": (1, "could not be made. Mend that and run it again: it makes the rest."),
    "missing": (0, "to make. Nothing has been changed: `setup --apply` makes them."),
    "made": (0, "made. Now put the rules in, and start Mailroom."),
}


def setup_verdict(states: Counter[str], problems: Collection[str]) -> tuple[int, str]:
    """(exit status, what to do next)"""
    if problems:
        return 2, "Mailroom cannot work like that. Nothing has been changed."
    for state, (status, verdict) in VERDICTS.items():
        if states[state]:
            return status, f"{number(states[state], 'thing')} {verdict}"
    return 0, "There is nothing to do."


def rule_rows(settings: MailroomSettings) -> dict[str, str]:
    """{of whom: where to} of the rules that the account has to have."""
    ways: dict[str, list[str]] = defaultdict(list)
    for each in settings.triage_categories:
        inbox = "keep it in the Inbox" if each.add_to_inbox else "skip the Inbox"
        ways[f"in the group {each.contact_group}"].append(f"{each.destination_mailbox}, {inbox}")
    ways["in no contact"].append(f"{settings.screener_mailbox}, skip the Inbox")
    return {whom: "; ".join(where) for whom, where in ways.items()}


def mailbox_paths(raws: Iterable[JSON]) -> dict[str, str]:
    """{id: path} of mailboxes, the names joined by slashes."""
    boxes = {raw["id"]: raw for raw in raws}

    def path(id_: str, below: tuple[str, ...] = ()) -> str:
        above, name = str(boxes[id_].get("parentId")), str(boxes[id_]["name"])
        if above not in boxes or above in below:
            return name
        return f"{path(above, (*below, id_))}/{name}"

    return {id_: path(id_) for id_ in boxes}


class Setup:
    """The looking and the making of a setup. `ids` are the mailboxes' by their names, `cards` the
    contact groups, `problems` a line for each reason why Mailroom cannot work in the account."""

    def __init__(self, settings: MailroomSettings) -> None:
        self._settings = settings
        self._client, self._contacts = new_clients(settings)
        self.boxes, self.groups = needed_mailboxes(settings), needed_groups(settings)
        self.ids: dict[str, str] = {}
        self.cards: list[Card] = []
        self.problems: list[str] = []

    def look(self) -> dict[str, str]:
        """Read the account; what its session offers. Raises ConfigurationError where there is
        nothing to read, ServerError."""
        self._client.connect()
        for check in (self._client.check_writable, self._contacts.prepare, self.read):
            try:
                check()
            except ConfigurationError as error:
                self.problems += error.problems
        return session_facts(self._client, self._settings)

    def read(self) -> None:
        """Read what may be missing; the mailboxes even where there is no access to contacts."""
        if self.problems:
            self.ids = ids_by_name(self._client.find(MAILBOXES))
        else:
            self.ids, self.cards = read_account(self._client, self._contacts)
        check_inbox(self.ids)

    def lacking(self) -> list[Need]:
        """What the account lacks."""
        return lacking(self.boxes, self.ids) + lacking(self.groups, groups_by_name(self.cards))

    def make(self, needs: Iterable[Need]) -> dict[Need, str]:
        """Make what is missing; {need: empty where it was made, or why it was not}."""
        boxes = [need for need in needs if need in self.boxes]
        groups = [need for need in needs if need in self.groups]
        tried: dict[Need, str] = {}
        for some, make in ((boxes, self._make_mailboxes), (groups, self._make_groups)):
            try:
                refused = make([need.name for need in some])
            except ServerError as error:
                refused = dict.fromkeys((need.name for need in some), str(error))
            tried |= {need: refused.get(need.name, "") for need in some}
        return tried

    def _make_mailboxes(self, names: Sequence[str]) -> dict[str, str]:
        """Make mailboxes at the top, which mail apps show; {name: why it was refused}."""
        entries = {f"m{n}": {"name": name, "isSubscribed": True} for n, name in enumerate(names)}
        parts = self._client.portions(entries)
        errors: dict[str, JSON] = {}
        for [answer] in self._client.send([[("Mailbox/set", {"create": part})] for part in parts]):
            errors |= set_errors(expect(answer))
        keys = dict(zip(names, entries, strict=True))
        return {name: error_text(errors[key]) for name, key in keys.items() if key in errors}

    def _make_groups(self, names: Sequence[str]) -> dict[str, str]:
        """Make contact groups; {name: why it was refused}."""
        names_of = {uid: name for name, uid in self._group_uids().items() if name in names}
        changes = [CardChange(uid, kind="group", name=name) for uid, name in names_of.items()]
        return {names_of[uid]: why for uid, why in self._contacts.apply(changes).items()}

    def _group_uids(self) -> dict[str, str]:
        """{name: uid} of the groups that there are, and will be."""
        taken = {card.uid for card in self.cards}
        there = {name: group.uid for name, group in groups_by_name(self.cards).items()}
        return {need.name: group_uid(need.name, taken) for need in self.groups} | there

    def write_fastmail_rules(self, file: str) -> str:
        """Write the rules for Fastmail's import; what to do with them. Raises ConfigurationError,
        ServerError."""
        tree = Query("Mailbox", None, ("id", "name", "parentId"), lambda raw: raw)
        found = self._client.find(tree)
        with understood("Mailbox/get"):
            paths = mailbox_paths(found)
        named = {name: paths.get(id_, name) for name, id_ in self.ids.items()}
        rules = fastmail_rules(self._settings, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", named)
        try:
            with open(file, "w", encoding="utf-8") as opened:
                json.dump(rules, opened, indent=2)
        except OSError as error:
            raise ConfigurationError(f"--fastmail-rules {file!r}: {error.strerror}") from None
        return f"{file}: import it at Fastmail, in Settings - Filters & Rules."

    def sieve_script(self) -> str:
        """The Sieve script for this account. Raises ConfigurationError where the server's Sieve
        cannot do it."""
        details = (self._client.account(SIEVE).get("accountCapabilities") or {}).get(SIEVE) or {}
        offered, there = details.get("sieveExtensions") or (), self._client.session_capabilities
        is_old = OLD_CYRUS_SIEVE in there and CONTACTS not in there
        group_filter = OLD_GROUP_FILTER if is_old else GROUP_FILTER
        return sieve_script(self._settings, self._group_uids(), self.ids, offered, group_filter)

    def install_sieve(self) -> str:
        """Install and activate the script (RFC 9661), unless there is one that Mailroom has not
        written; what was done. Raises ConfigurationError, ServerError."""
        if not self._client.account(SIEVE):
            raise ConfigurationError(NO_SIEVE)
        self.read()
        script = self.sieve_script().replace("\n", "\r\n").encode()
        there, own = self._client.call("SieveScript/get", {"ids": None}), None
        with understood("SieveScript/get"):
            for each in there["list"]:
                if not (each["isActive"] or each["name"] == SIEVE_NAME):
                    continue
                text = self._client.download(SIEVE, each["blobId"], SIEVE_TYPE)
                if not text.startswith(SIEVE_MARKER.encode()):
                    raise ConfigurationError(f"the Sieve script {each['name']!r} {NOT_OURS}")
                if each["isActive"] and text == script:
                    return "The Sieve script is there and active."
                own = each["id"]
            self._write_sieve(script, own, there["state"])
        return "The Sieve script is installed and active."

    def _write_sieve(self, script: bytes, own: str | None, state: str) -> None:
        """Write the script in place of Mailroom's own, given by its id, or as a new one; unless any
        other has changed since that state. Raises ServerError."""
        blob = {"blobId": self._client.upload(SIEVE, script, SIEVE_TYPE)}
        write: JSON = {"create": {"new": {"name": SIEVE_NAME, **blob}}}
        if own:
            write = {"update": {own: blob}}
        arguments = {"ifInState": state, **write, "onSuccessActivateScript": own or "#new"}
        calls: list[Call] = [("SieveScript/set", arguments), ("SieveScript/get", {"ids": None})]
        [[answer, now]] = self._client.send([calls])
        done = expect(answer)
        for error in set_errors(done).values():
            raise ServerError(f"the server does not take the Sieve script: {error_text(error)}")
        id_ = own or done["created"]["new"]["id"]
        if not any(each["isActive"] and each["id"] == id_ for each in expect(now)["list"]):
            raise ServerError("the server has taken the Sieve script, but has not activated it")


def setup(settings: MailroomSettings, options: argparse.Namespace) -> int:
    """The command: look at the account, make with `--apply` what is missing, and tell of it; the
    exit status. Raises MailroomError."""
    prints_script = options.sieve and not options.apply
    if prints_script and (options.json or options.fastmail_rules):
        raise ConfigurationError("--sieve prints the script, and nothing else: give it alone")
    work = Setup(settings)
    facts = work.look()
    if prints_script:
        if work.problems:
            raise ConfigurationError(*work.problems)
        if isinstance(sys.stdout, io.TextIOWrapper):  # RFC 5228 section 2.1
            sys.stdout.reconfigure(encoding="utf-8")
        print(work.sieve_script(), end="")
        return 0
    needs = work.lacking()
    tried = work.make(needs) if options.apply and not work.problems else {}
    tried = {need: settings.shown(reason) for need, reason in tried.items()}
    items = [setup_item(need, needs, tried) for need in (*work.boxes, *work.groups)]
    status, verdict = setup_verdict(Counter(item["state"] for item in items), work.problems)
    told = [*work.problems, verdict]
    try:
        if options.fastmail_rules:
            told.append(work.write_fastmail_rules(options.fastmail_rules))
        if options.sieve and status == 0:
            told.append(work.install_sieve())
    except MailroomError as error:  # What has been made is told all the same.
        status = status or 1
        told.append(str(error))
    console = Console(settings)
    told = [settings.shown(text) for text in told]
    plan = {"account": facts, "items": items, "rules": rule_rows(settings), "told": told}
    if options.json:
        console.say(json.dumps(plan, indent=2))
    else:
        show_setup(console, plan)
    return status


def show_setup(console: Console, plan: JSON) -> None:
    """Print what there is, what the rules have to do, and what is to be done."""
    items = plan["items"]
    console.say("\n".join(table(plan["account"].items())) + "\n")
    for line, item in zip(table([*each.values()] for each in items), items, strict=True):
        console.say(line, item["state"])
    console.say("\nRules for the mail to come, where the sender is")
    console.say("\n".join(table(plan["rules"].items(), indent="  ")) + "\n")
    for item in items:
        if item["state"] == "refused":  # In full: the table may cut it short.
            console.say("{kind} {name}: {purpose}".format(**item), "refused")
    console.say("\n".join(plan["told"]))


# ------------------------------------------------------------------------------------------------
# Reset: Mailroom taken back out of the account
# ------------------------------------------------------------------------------------------------

CARDS_AT_ONCE = 100


@dataclass(frozen=True)
class ResetPlan:
    """All that a reset does, in this order: so that mail to come is routed as before Mailroom, and
    what tells a contact as Mailroom's own is there as long as it is asked for. `kept`: contacts
    that Mailroom made and somebody touched."""

    groups: tuple[CardChange, ...]
    contacts: tuple[CardChange, ...]
    mails: Mapping[str, MailPatch]
    kept: tuple[Card, ...]


def reset_patch(mail: Mail, boxes: Boxes) -> MailPatch:
    """The patch that takes a mail out of all that is Mailroom's; back into the Screener if it was
    in a destination, or would be nowhere."""
    destinations = boxes.managed - {boxes.screener}
    gone = {*destinations, *boxes.labels, boxes.error, *left_by_triage(mail, boxes)}
    goes_back = mail.mailboxes & destinations or mail.mailboxes <= gone
    return mail_patch(mail, [boxes.screener] if goes_back else [], gone)


def plan_reset(
    cards: Collection[Card],
    mails: Collection[Mail],
    names: Mapping[str, Collection[str]],
    rules: Rules,
    boxes: Boxes,
    untouched: Collection[str],
) -> ResetPlan:
    """What a reset does, given all cards, the mails in a mailbox or under a label of Mailroom's and
    the names that the senders have given. `untouched`: see `as_made`."""
    groups = [
        CardChange(
            card.uid, card, remove=card.members, destroy=card.ref in untouched and not card.notes
        )
        for card in cards
        if rules.is_own(card)
    ]
    contacts = [card for card in cards if not card.is_group]
    noted = [
        card for card in contacts if any(clean_note(text) != text for text in card.notes.values())
    ]
    gone = as_made(noted, names, rules.foreign_groups(cards), untouched)
    return ResetPlan(
        groups=tuple(change for change in groups if change.destroy or change.remove),
        contacts=tuple(take_back(card, gone) for card in noted),
        mails={mail.id: patch for mail in mails if (patch := reset_patch(mail, boxes))},
        kept=tuple(
            card
            for card in contacts
            if card.ref not in gone and (CREATED_NOTE in card.note_lines or has_own_uid(card))
        ),
    )


class Reset:
    """The reading and the doing of a reset."""

    def __init__(self, settings: MailroomSettings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._client, self._contacts = new_clients(settings)

    def plan(self) -> ResetPlan:
        """Look at the account. Raises ConfigurationError, ServerError."""
        self._client.connect()
        self._client.check_writable()
        self._contacts.prepare()
        ids, cards = read_account(self._client, self._contacts, None)
        boxes = boxes_there(ids, self._settings)
        check_complete(lacking(needed_mailboxes(self._settings)[:1], ids))  # the Screener
        own = {*boxes.managed, *boxes.labels, boxes.error, boxes.warning} - {boxes.screener, ""}
        query = Query("Email", in_any(own), MAIL_PROPERTIES, parse_mail)
        mails = self._client.find(query) if own else []
        rules = rules_of(self._settings)
        made = [card for card in cards if was_made(card) and (rules.is_own(card) or card.emails)]
        untouched = self._contacts.untouched(made)
        contacts = [card for card in made if card.ref in untouched and not card.is_group]
        names = names_told(self._client, contacts, mails)
        return plan_reset(cards, mails, names, rules, boxes, untouched)

    def carry_out(self, plan: ResetPlan) -> list[str]:
        """Carry out a plan; a line for each thing that was refused. Raises ServerError."""
        refused = self._change_cards(plan.groups, "groups")
        stuck = {uid for each in plan.groups if each.uid in refused for uid in each.remove}
        going = [change for change in plan.contacts if change.uid not in stuck]
        refused |= self._change_cards(going, "contacts")
        refused |= self._file(plan.mails)
        names = {
            each.uid: f'{"group" if each.card.is_group else "contact"} "{each.card.name}"'
            for each in (*plan.groups, *plan.contacts)
            if each.card
        }
        return [
            f"{names.get(what, f'mail {what}')} was left as it is: {why}"
            for what, why in refused.items()
        ]

    def _change_cards(self, changes: Sequence[CardChange], what: str) -> dict[str, str]:
        refused: dict[str, str] = {}
        for n in range(0, len(changes), CARDS_AT_ONCE):
            refused |= self._contacts.apply(changes[n : n + CARDS_AT_ONCE])
            self._console.progress(min(n + CARDS_AT_ONCE, len(changes)), len(changes), what)
        return refused

    def _file(self, patches: Mapping[str, MailPatch]) -> dict[str, str]:
        """Email/set in as many requests as the limits force; {mail id: why it was refused}."""
        refused: dict[str, str] = {}
        done = 0
        for portion in self._client.portions(patches):
            answer = self._client.call("Email/set", {"update": portion})
            refused |= mails_refused(set_errors(answer))
            done += len(portion)
            self._console.progress(done, len(patches), "mails")
        return refused


def reset_rows(plan: ResetPlan) -> list[tuple[str, str]]:
    """(how many, what becomes of them)"""
    gone = sum(change.destroy for change in plan.contacts)
    no_groups = sum(change.destroy for change in plan.groups)
    rows = [
        (number(gone, "contact"), "deleted: Mailroom made them, nobody has touched them"),
        (number(len(plan.contacts) - gone, "contact"), "kept, without Mailroom's notes"),
        (number(no_groups, "group"), "deleted: Mailroom made them"),
        (number(len(plan.groups) - no_groups, "group"), "emptied"),
        (number(len(plan.mails), "mail"), "back to the Screener, or a label taken off"),
    ]
    return [row for row in rows if not row[0].startswith("0 ")]


def reset(settings: MailroomSettings, options: argparse.Namespace) -> int:
    """The command: tell what a reset would do, and do it with `--apply` once that is confirmed; the
    exit status. Raises MailroomError."""
    console = Console(settings)
    work = Reset(settings, console)
    plan = work.plan()
    if not (plan.groups or plan.contacts or plan.mails):
        console.say("There is nothing to do.")
        return 0
    console.say("\n".join(table(reset_rows(plan))))
    for card in plan.kept:
        kept = f'kept: "{card.name}", {", ".join(sorted(card.emails))}'
        console.say(f"{kept}: Mailroom made it and somebody has changed it", "missing")
    console.say("No mail and no mailbox is deleted. The account's rules are yours to take out.")
    if not options.apply:
        console.say("Nothing has been changed: `reset --apply` does it. Stop Mailroom first.")
        return 0
    if not (options.yes or is_confirmed()):
        console.say("Nothing has been changed.")
        return 0
    problems = work.carry_out(plan)
    for problem in problems:
        console.say(settings.shown(problem), "problem")
    console.say("Run it again for the rest." if problems else "Mailroom is out of the account.")
    return 1 if problems else 0


def is_confirmed() -> bool:
    """Ask the person at the terminal. Raises ConfigurationError when there is none."""
    if not sys.stdin.isatty():
        raise ConfigurationError("there is no terminal to confirm it at: give --yes")
    try:
        return input('Type "reset" to go on: ').strip() == "reset"
    except EOFError:
        return False


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

DESCRIPTION = """\
One tap of a label triages a whole sender. Settings are environment variables
(MAILROOM_...), see the README.
"""
EPILOG = """\
examples:
  python mailroom.py                       serve (the same as `run`)
  python mailroom.py setup                 what the account has and lacks
  python mailroom.py setup --apply         make what it lacks
  python mailroom.py setup --fastmail-rules rules.json
  python mailroom.py run --once --dry-run  what one look at the account would do
  python mailroom.py reset                 what taking Mailroom out would do

exit status:
  0    done, or stopped as asked
  1    a fault in the program (with a traceback), setup or reset is not done, or
       no room is left for what is printed
  2    settings, credentials, or an account that lacks something
  3    `run --once`: a sender could not be triaged, or the server not be reached
  130  setup or reset: stopped with Ctrl-C
  141  whoever read the output has gone
"""


def run(settings: MailroomSettings, options: argparse.Namespace) -> int:
    """The command: serve, or do one cycle; the exit status."""
    say = Console(settings).say if options.dry_run else None
    return Service(settings, once=options.once, dry_run=say).run()


COMMANDS = {"run": run, "setup": setup, "reset": reset}


def command_line() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="mailroom.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"Mailroom {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def command(name: str, summary: str, **flags: str) -> argparse.ArgumentParser:
        each = commands.add_parser(name, help=summary, description=summary)
        for flag, meaning in flags.items():
            each.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=meaning)
        return each

    command(
        "run",
        "Serve. This is what is done without a command.",
        once="look at the account once and end, for cron",
        dry_run="say what would be done, and why, and write nothing",
    )
    command(
        "setup",
        "Show what the account has and lacks, and the rules it needs.",
        apply="make what it lacks",
        sieve="print the rules as a Sieve script; with --apply install it",
        json="print it for scripts",
    ).add_argument("--fastmail-rules", metavar="FILE", help="write a rules file for Fastmail")
    command(
        "reset",
        "Show what taking Mailroom out of the account would do.",
        apply="do it, once you have confirmed it",
        yes="do it without asking",
    )
    return parser


def complain(problems: Iterable[str]) -> None:
    for problem in problems:
        print(f"mailroom: {CONTROLS.sub(' ', problem)}", file=sys.stderr)


def perform(arguments: Sequence[str]) -> int:
    """Run the command; the exit status (see EPILOG). Raises OSError, of standard output say."""
    given = list(arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help", "--version")):
        given.insert(0, "run")
    options = command_line().parse_args(given)
    try:
        settings = MailroomSettings()
    except ConfigurationError as error:
        complain(error.problems)
        return 2
    start_logging(settings)
    if options.command != "run":  # The service has its own.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        return COMMANDS[options.command](settings, options)
    except ConfigurationError as error:
        complain(map(settings.shown, error.problems))
        return 2
    except MailroomError as error:
        complain([f"{settings.shown(str(error))}. Run it again: it does what is left"])
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if type(error) in OUTPUT_ERRORS:
            raise
        LOG.critical(FAULT, exc_info=True)
        return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status, or SystemExit where that is argparse's."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started this has closed it
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  (open to the end)
    if isinstance(sys.stdout, io.TextIOWrapper):  # Not every terminal knows every letter.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Or gevent would print it.
    gevent.get_hub().NOT_ERROR = (*gevent.hub.Hub.NOT_ERROR, KeyboardInterrupt)
    try:
        try:
            return perform(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        # Or Python would complain when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        complain([f"the system says: {error}"])
        return 1


if __name__ == "__main__":
    sys.exit(main())
