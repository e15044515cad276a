# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = ["environs>=14.2", "gevent>=24.10", "requests>=2.32", "sseclient-py>=1.8"]
# ///
"""Mailroom: one tap of a label triages a whole sender.

Put a triage label (say `@ToFeed`) on one message. Mailroom hears of it over JMAP push, puts the
sender into the contact group `Feed`, files the sender's messages into `Feed` and takes the label
off. Labels are the queue, messages and contact groups the state; nothing is stored here.

    EventSource stream --> sse_listener --> event queue --> debounce --+
                                                                       +--> one triage cycle
    poll timer (fallback, and a safety net while push is up) ----------+

A cycle reads the account as it is, decides with pure functions (`SenderPlan`) and then writes in
an order in which stopping anywhere loses nothing: contacts, messages, and last the label. Whatever
was missed or failed, the next cycle sees.

A section needs only those above it; `grep '^# .* ####'` lists them.

examples:
  python mailroom.py                       serve (the same as `run`)
  python mailroom.py setup                 what the account has and lacks
  python mailroom.py setup --apply         make what it lacks
  python mailroom.py run --once --dry-run  what one look at the account would do
  python mailroom.py reset                 what taking Mailroom out would do

exit status:
  0    done, or stopped as asked
  1    a fault in the program (with traceback), or an incomplete setup or reset
  2    settings, credentials, or an account that lacks something
  3    `run --once`: a sender could not be triaged, or the server not be reached
  130  setup or reset: stopped by Ctrl-C or SIGTERM
  141  whoever read the output has gone

The README lists the settings.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("Mailroom needs Python 3.11 or newer; this is Python " + sys.version.split()[0])

import os
import signal

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
import difflib
import json
import logging
import quopri
import random
import re
import socket
import ssl
import time
import unicodedata
import uuid
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from functools import cache, partial
from ipaddress import ip_address
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from urllib.parse import quote, quote_plus, unquote, urljoin, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import gevent.event
import gevent.pool
import gevent.pywsgi
import gevent.queue
import requests
import urllib3
from environs import FileAwareEnv
from requests.adapters import HTTPAdapter
from requests.auth import HTTPBasicAuth
from sseclient import SSEClient
from urllib3.connection import HTTPConnection

VERSION = "1.0"
JSON = dict[str, Any]
T = TypeVar("T")
LOG = logging.getLogger("mailroom")
# The errors that say that some input is not what it should be; ElementTree raises SyntaxErrors.
MALFORMED = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError
)  # fmt: skip


# Errors ###########################################################################################


class MailroomError(Exception):
    """Something a person can act on; each of `problems` is a line: what was wrong, what to do.
    `answered`: the server is well and turned down this very request, so that another may do better;
    `retry_after`: the seconds for which it wants to be left alone; `is_lasting`: it will be the
    same tomorrow, and ends a program that has not had a cycle yet with status 2."""

    is_lasting = False

    def __init__(self, *problems: str, answered: bool = False, retry_after: float = 0) -> None:
        super().__init__("; ".join(problems))
        self.answered = answered or self.is_lasting
        self.problems, self.retry_after = problems, retry_after


class ConfigurationError(MailroomError):
    """Settings, credentials or the account are not fit for use."""

    is_lasting = True


class CredentialsError(ConfigurationError):
    """The server refuses the token or the password."""


class ServerError(MailroomError):
    """A server could not be reached or did not do what was asked; worth another try."""


# Settings #########################################################################################

PREFIX = "MAILROOM_"
CATEGORIES = "MAILROOM_TRIAGE_CATEGORIES"
SECRETS = ("jmap_token", "carddav_password")
NAMES = ("screener_mailbox", "label_", "provenance_group")  # So these settings begin.
# What stands around a value by accident: blanks, and the byte order mark of an editor.
BLANKS = " \t\r\n\ufeff"
QUOTED = re.compile(r"([\"'`]).*\1", re.DOTALL)
SAFE_URL = "an https:// address (http:// only to this machine itself) without a user name"
UNAMBIGUOUS_URL = re.compile(r"https?://[^\s\\@/?#]+([/?#][!-\[\]-~]*)?")
HOW_TO_SIGN_IN = (
    "an API token, one word without `Bearer` before it (at Fastmail: Settings - Privacy & Security "
    "- Manage API tokens, scopes Email and Contacts), or a file's path in MAILROOM_JMAP_TOKEN_FILE"
)
DEFAULT_CATEGORIES = [{"name": "Imbox", "add_to_inbox": True}, "Feed", "Paper Trail", "Jail"]
DEFAULT_CATEGORIES += [{"name": "Person", "parent": "Imbox", "contact_type": "person"}]
DEFAULT_CATEGORIES += [{"name": name, "parent": "Paper Trail"} for name in ("Billboard", "Truck")]
MAX_SHOWN = 500


def plain_name(text: str) -> str:
    """Return the name of a mailbox, label or group as it is compared: in NFC, no blanks around."""
    return unicodedata.normalize("NFC", text.strip())


def truncate(text: str, most: int) -> str:
    """Return so much of the text that it has at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_safe_url(url: Any) -> bool:
    """Return whether a secret may be sent there: https, or plain http to a loopback address. A URL
    that programs may read in different ways is not safe, nor one with a secret in itself."""
    with suppress(ValueError):
        parts = urlsplit(url if UNAMBIGUOUS_URL.fullmatch(str(url)) else "")
        host = parts.hostname or ""
        is_private = parts.scheme == "https" or host == "localhost" or ip_address(host).is_loopback
        return host != "" and parts.port != 0 and is_private
    return False


class Rule(NamedTuple):
    """What a setting, or a key of a category, has to be."""

    is_valid: Callable[[Any], object]
    expected: str


def one_of(*words: str) -> Rule:
    """Return the rule for one of at least two words."""
    return Rule(words.__contains__, f"{', '.join(words[:-1])} or {words[-1]}")


def between(low: float, high: float, what: str) -> Rule:
    """Return the rule for a number from one to another."""
    return Rule(lambda value: low <= value <= high, f"{what}, {low} to {high}")


TEXT = Rule(lambda value: isinstance(value, str) and value.isprintable(), "one line of text")
NAME = Rule(lambda value: TEXT.is_valid(value) and value.strip(), "a name, on one line")
FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
URL = Rule(is_safe_url, SAFE_URL)
TOKEN = Rule(re.compile("[!-~]+").fullmatch, HOW_TO_SIGN_IN)
PASSWORD = Rule(NAME.is_valid, "the password of the user, on one line, or a file with it")
LIST = Rule(lambda value: isinstance(value, list) and value, "a JSON list of categories")
CATEGORY_KEYS = {"name": NAME, "label": NAME, "contact_group": NAME, "destination_mailbox": NAME}
CATEGORY_KEYS |= {"parent": TEXT, "contact_type": one_of("company", "person")}
CATEGORY_KEYS |= {"add_to_inbox": FLAG, "mark_read": FLAG}
UNKNOWN_KEY = Rule(lambda _: False, f"one of the keys {', '.join(CATEGORY_KEYS)}")


@dataclass(frozen=True)
class Category:
    """One way to triage a sender, in names that the user sees. The undo label's category has no
    name and no group, and its destination is the Screener."""

    name: str
    label: str
    contact_group: str
    destination_mailbox: str
    parent: str = ""
    contact_type: str = "company"
    add_to_inbox: bool = False
    mark_read: bool = False
    undoes: bool = False


def ancestors(category: Category, categories: Iterable[Category]) -> list[Category]:
    """Return the parents of a category, nearest first; a sender belongs to all of them."""
    by_name = {each.name: each for each in categories}
    family = [category]
    while (parent := by_name.get(family[-1].parent)) and parent not in family:
        family.append(parent)
    return family[1:]


class SettingsReader(FileAwareEnv):
    """environs, with keywords before the environment; what is empty counts as not set. `problems`:
    a line for each setting that is bad."""

    def __init__(self, keywords: Mapping[str, Any]) -> None:
        super().__init__(prefix=PREFIX)
        self.problems: list[str] = []
        self._args = {PREFIX + name.upper(): value for name, value in keywords.items()}

    def _get_value(self, env_key: str, default: Any) -> Any:
        self._given: Any = ""  # kept for a complaint
        value = self._args[env_key] if env_key in self._args else super()._get_value(env_key, "")
        self._given = value.strip(BLANKS) if isinstance(value, str) else value
        return default if self._given == "" else self._given

    def read(self, name: str, default: T, rule: Rule) -> T:
        """Return a setting, of the type of its default (a list is JSON), or else the default; where
        a setting is required the rule refuses that."""
        kind = "json" if isinstance(default, list) else type(default).__name__
        try:
            value: Any = getattr(self, kind)(name.upper(), default)
            if not rule.is_valid(value) or QUOTED.fullmatch(str(value)):
                raise ValueError
        except (ValueError, OSError, RecursionError) as error:
            self.problems.append(self._complaint(name, rule, error))
            return default
        return cast("T", plain_name(value) if rule is NAME else value)

    def read_categories(self) -> Iterator[Category]:
        """Yield the categories of a list of names and objects."""
        for entry in self.read("triage_categories", DEFAULT_CATEGORIES, LIST):
            given: JSON = {"name": None, **entry} if isinstance(entry, dict) else {"name": entry}
            rules = {key: CATEGORY_KEYS.get(key, UNKNOWN_KEY) for key in given}
            wrong = {key: rule for key, rule in rules.items() if not rule.is_valid(given[key])}
            for key, rule in wrong.items():
                self.problems.append(f"{CATEGORIES}: {entry!r}: {key}: expected {rule.expected}")
            if not wrong:
                given = {k: plain_name(v) if isinstance(v, str) else v for k, v in given.items()}
                name, label = given["name"], "@To" + "".join(given["name"].split())
                names = {"label": label, "contact_group": name, "destination_mailbox": name}
                yield Category(**{**names, **given})

    def _complaint(self, name: str, rule: Rule, error: BaseException) -> str:
        """Return the variable, its value (never a secret's), the reason, and what is expected."""
        variable, value = PREFIX + name.upper(), str(self._given)
        path = "" if variable in self._args else os.environ.get(f"{variable}_FILE", "")
        # A URL may have a user's name and password in it.
        is_secret = name in SECRETS or (rule is URL and "@" in value)
        shown = f"={self._given!r}" if value and not is_secret else ""
        # A path of another look may be the secret itself, in the wrong variable.
        where = f" (in the file {path!r})" if path.startswith(("/", ".")) else ""
        while error.__cause__:
            error = error.__cause__
        reasons = [
            (QUOTED.fullmatch(value or path), "take off the quotes, which some env files keep"),
            (value[:6] == "tcp://", "Kubernetes sets it; `enableServiceLinks: false` in the pod"),
            (isinstance(error, UnicodeDecodeError | json.JSONDecodeError), str(error)),
            (isinstance(error, OSError), getattr(error, "strerror", "")),
            (not value, "the file is empty" if path else "not set"),
        ]
        reason = next((f"{text}; " for is_so, text in reasons if is_so), "")
        return f"{variable}{truncate(shown, MAX_SHOWN)}{where}: {reason}expected {rule.expected}"


class MailroomSettings:
    """The settings, from the environment (`MAILROOM_` and the name in upper case) or from keywords.
    Raises ConfigurationError with a line for each bad setting, TypeError for one that is none."""

    def __init__(self, **keywords: Any) -> None:
        reader = SettingsReader(keywords)
        read = reader.read
        self.jmap_username = read("jmap_username", "", TEXT)
        self.jmap_token = read("jmap_token", "", PASSWORD if self.jmap_username else TOKEN)
        self.jmap_url = read("jmap_url", "https://api.fastmail.com/jmap/session", URL)
        self.carddav_username = read("carddav_username", "", TEXT)
        password = PASSWORD if self.carddav_username else TEXT
        self.carddav_password = read("carddav_password", "", password)
        self.carddav_url = read("carddav_url", "https://carddav.fastmail.com", URL)
        self.poll_interval = read("poll_interval", 60.0, between(0.01, 86400, "seconds"))
        self.debounce_seconds = read("debounce_seconds", 3.0, between(0, 600, "seconds"))
        self.log_level = read("log_level", "info", one_of("debug", "info", "warning", "error"))
        log_format = "text" if sys.stderr.isatty() else "json"
        self.log_format = read("log_format", log_format, one_of("json", "text"))
        self.screener_mailbox = read("screener_mailbox", "Screener", NAME)
        self.label_mailroom_error = read("label_mailroom_error", "@MailroomError", NAME)
        self.label_mailroom_warning = read("label_mailroom_warning", "@MailroomWarning", NAME)
        self.label_undo = read("label_undo", "@ToScreener", NAME)
        self.warnings_enabled = read("warnings_enabled", True, FLAG)
        self.provenance_group = read("provenance_group", "Mailroom", NAME)
        self.screen_inbox = read("screen_inbox", False, FLAG)
        self.triage_categories = tuple(reader.read_categories())
        self.health_host = read("health_host", "127.0.0.1", TEXT)
        self.health_port = read("health_port", 8080, between(0, 65535, "a port (0: none)"))
        if unknown := keywords.keys() - vars(self).keys():
            raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
        known = [PREFIX + name.upper() + end for name in vars(self) for end in ("", "_FILE")]
        odd = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
        near = (difflib.get_close_matches(name, known, 1, 0)[0] for name in odd)
        # No error, since Kubernetes sets some.
        self.warnings = list(map("{} is not a setting; the nearest is {}".format, odd, near))
        # What the undo label asks for: no group, and the Screener.
        self.undo = Category("", self.label_undo, "", self.screener_mailbox, undoes=True)
        if problems := [*reader.problems, *self._conflicts()]:
            raise ConfigurationError(*problems, *self.warnings)

    def _conflicts(self) -> Iterator[str]:
        """Yield a line for each thing wrong between settings that are good by themselves."""
        categories = self.triage_categories
        names = [('the Inbox, for which there is "add_to_inbox"', "Inbox")]
        names += [(PREFIX + k.upper(), v) for k, v in vars(self).items() if k.startswith(NAMES)]
        names += [(f"{CATEGORIES} (label of {each.name})", each.label) for each in categories]
        owners = {name.casefold(): what for what, name in reversed(names)}
        first = {each.contact_group.casefold(): each for each in reversed(categories)}
        for n, each in enumerate(categories):
            where, line = f"{CATEGORIES}: {each.name}", [each, *ancestors(each, categories)]
            # These may share a name, but not with one of the former.
            names += [(where, each.destination_mailbox), (where, each.contact_group)]
            if parent := line[-1].parent:
                yield f"{where}: there is no parent {parent}, or it is its own ancestor"
            if any(each.name == other.name for other in categories[:n]):
                yield f"{where}: the name comes twice"
            other = first[each.contact_group.casefold()]
            if other not in line and each not in ancestors(other, categories):
                yield f"{where}: it shares the group {each.contact_group} with {other.name}"
        for what, name in dict.fromkeys(names):
            owner = owners.get(name.casefold(), what)
            if owner != what:
                yield f"{what}: the name {name!r} is taken by {owner}"

    def redact(self, text: str, most: int = 0) -> str:
        """Return the text with every secret blotted out, and only then cut to so many characters.
        The longest spelling goes first: it may begin with another, whose rest would stay."""
        forms = {form for name in SECRETS for form in written_forms(getattr(self, name))}
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "[secret]")
        return truncate(text, most) if most else text


def written_forms(secret: str) -> set[str]:
    """Return a secret as texts may have it: plain, in JSON, Python or a URL, in base64 anywhere."""
    octets = secret.encode()
    forms = {secret, octets.decode("latin-1"), repr(secret)[1:-1]}
    forms |= {quote(secret), quote(secret, ""), quote_plus(secret)}
    forms |= {json.dumps(secret, ensure_ascii=is_plain)[1:-1] for is_plain in (True, False)}
    for offset in range(3):
        # Only the characters that the secret alone decides; three octets make four of them.
        padded = bytes(offset) + octets
        whole = b64encode(padded).decode()[(offset * 8 + 5) // 6 : len(padded) * 8 // 6]
        forms |= {whole, whole.replace("+", "-").replace("/", "_")}
    return forms - {""}


# Logs #############################################################################################

# What could end a line of a log or a vCard, or command a terminal.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    return CONTROLS.sub(" ", text)


def now_iso() -> str:
    """Return the time as RFC 3339 has it, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def fields(**values: Any) -> JSON:
    """Return what goes with a log message, as the `extra` of a logging call."""
    return {"fields": values}


class LogFormatter(logging.Formatter):
    """Writes a record as one line, JSON for programs or text for people; no secret gets through."""

    def __init__(self, settings: MailroomSettings) -> None:
        super().__init__()
        self._settings = settings

    def format(self, record: logging.LogRecord) -> str:
        redact, level = self._settings.redact, record.levelname.lower()
        event, values = redact(record.getMessage(), MAX_SHOWN), getattr(record, "fields", {})
        values = {k: redact(v, MAX_SHOWN) if isinstance(v, str) else v for k, v in values.items()}
        trace = redact(self.formatException(record.exc_info)) if record.exc_info else ""
        if self._settings.log_format == "json":
            values |= {"traceback": trace} if trace else {}
            return json.dumps({"time": now_iso(), "level": level, "event": event, **values})
        pairs = (f"{key}={json.dumps(each, ensure_ascii=False)}" for key, each in values.items())
        line = f"{datetime.now():%H:%M:%S} {level:7} {event}  {' '.join(pairs)}".rstrip()
        # A line of a traceback is no line of the log, whoever wrote it.
        return "\n".join(map(one_line, [line, *(f"  {each}" for each in trace.splitlines())]))


# The triage rules: plain values in, plain values out ##############################################

CREATED_NOTE = "Created by Mailroom"
MARK = re.compile(CREATED_NOTE + r' on \d{4}-\d\d-\d\d as "([^\n]*)"')
MAX_NAME = 200
# What stands behind the comma of a name that is not turned round.
SUFFIXES = {"inc", "llc", "ltd", "gmbh", "ag", "co", "corp", "jr", "sr", "md", "phd"}
QUOTES = ('""', "''", "\u201c\u201d", "\u2018\u2019")
UUID = re.compile("[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
IS_THE_USER = "the sender is the user"
Patch = dict[str, bool | None]
# {sender, message or card: why it failed, was refused or has to wait}
Reasons = dict[str, str]
# What the account has to have: ("mailbox", "label" or "contact group", its name)
Need = tuple[str, str]


def address_key(text: str) -> str:
    """Return an address in the form in which two are compared, empty for what is none: in NFC, with
    ASCII letters in lower case and the domain's labels as A-labels (RFC 5890 section 2.3.2.1)."""
    # NFC alone makes a K of the Kelvin sign, and the address another's.
    parts = text.strip(" \t\r\n").split("\u212a")
    text = "\u212a".join(unicodedata.normalize("NFC", part) for part in parts)
    if not (re.fullmatch(r"[^\s<>]+@[^\s<>@]+", text) and text.isprintable()):
        return ""
    lowered = "".join(letter.lower() if letter.isascii() else letter for letter in text)
    local, _, domain = lowered.rpartition("@")
    with suppress(UnicodeError):
        encoded = domain.encode("idna")
        # The codec takes some letters for others, such as the Kelvin sign for a k.
        domain = encoded.decode() if encoded.decode("idna") == domain else domain
    return f"{local}@{domain}"


def spellings(key: str) -> set[str]:
    """Return the ways in which an address may be written, for a search: the domain in A-labels and
    in U-labels, each in NFC and NFD."""
    local, _, domain = key.rpartition("@")
    forms = [key]
    with suppress(UnicodeError):
        forms.append(f"{local}@{domain.encode('ascii').decode('idna')}")
    return {unicodedata.normalize(form, each) for each in forms for form in ("NFC", "NFD")}


def uid_key(uid: str) -> str:
    """Return a uid, or a group's member, as it is compared. A member may be an address."""
    if uid[:7].lower() == "mailto:":
        return f"mailto:{address_key(uid[7:])}"
    bare = uid[9:] if uid[:9].lower() == "urn:uuid:" else uid
    return bare.lower() if UUID.fullmatch(bare) else bare


def fold_name(text: str) -> str:
    """Return a name in NFC, unquoted, white space folded; empty for one that shows nothing."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    while len(text) > 1 and text[0] + text[-1] in QUOTES:
        text = text[1:-1].strip()
    return text if any(unicodedata.category(each)[0] not in "CZM" for each in text) else ""


def turn_round(name: str) -> str:
    """Return `Last, First` as `First Last`; what follows the comma may be a suffix instead."""
    last, comma, first = name.partition(", ")
    suffix = first.partition(" ")[0].replace(".", "").casefold()
    return name if not comma or "," in first or suffix in SUFFIXES else f"{first} {last}"


def split_name(name: str) -> tuple[str, str]:
    """Return (given name, surname) of a person's full name."""
    given, blank, surname = name.rpartition(" ")
    return (given, surname) if blank else (name, "")


def name_differs(contact: str, display_name: str) -> bool:
    """Return whether the user knows the sender under another name than the message gives."""
    one, other = (turn_round(fold_name(name)).casefold() for name in (contact, display_name))
    return bool(one and other) and one != other and not (address_key(one) or address_key(other))


@dataclass(frozen=True, slots=True)
class Email:
    """What triage has to know of a message. `sender`: the key of the first From address, empty
    without one; `address`: as it is written; `mailboxes`: ids; `received`: a UTCDate (RFC 8620
    section 1.4); `is_forged`: the receiving server says that DMARC failed."""

    id: str
    sender: str
    address: str
    display_name: str
    mailboxes: frozenset[str]
    received: str = ""
    is_forged: bool = False

    def patched(self, patch: Patch) -> "Email":
        """Return the message as it is once the patch is applied."""
        changed = {path[11:]: patch[path] for path in patch if path.startswith("mailboxIds/")}
        boxes = dict.fromkeys(self.mailboxes, True) | changed
        return replace(self, mailboxes=frozenset(box for box in boxes if boxes[box]))

    def patch(self, add: Collection[str], remove: Collection[str]) -> Patch:
        """Return the Email/set patch (RFC 8621 section 4.6) that puts the message into and takes it
        out of mailboxes; empty when nothing has to change. One that takes a mailbox away names one
        that stays: a server may otherwise delete a message that has meanwhile left all others."""
        stays = self.mailboxes.union(add) - {"", *remove}
        if not stays or stays == self.mailboxes:
            return {}
        patch: Patch = {f"mailboxIds/{box}": None for box in self.mailboxes - stays}
        return patch | {
            f"mailboxIds/{box}": True for box in stays.intersection(add) or [min(stays)]
        }


@dataclass(frozen=True, slots=True)
class Card:
    """A contact, or a group of contacts, wherever it is kept. `ref`: the store's own handle; `uid`:
    as it is written; `emails`: address keys; `members`: {as it is written: its key} of a group;
    `is_ours`: it lies in the address book that is Mailroom's; `is_untouched`: Mailroom made it and
    nobody has changed it since (of a group: but for the members); `problem`: why it cannot be
    understood, if it cannot."""

    ref: str
    uid: str = ""
    name: str = ""
    emails: frozenset[str] = frozenset()
    is_group: bool = False
    members: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    is_ours: bool = True
    is_untouched: bool = False
    problem: str = ""

    @property
    def group_name(self) -> str:
        """The name of a group in Mailroom's address book, else empty."""
        return self.name if self.is_group and self.is_ours and not self.problem else ""

    @property
    def keys(self) -> set[str]:
        """By what a group may name this contact: its uid, or one of its addresses."""
        return {uid_key(self.uid), *(f"mailto:{address}" for address in self.emails)}


@dataclass(frozen=True)
class CardChange:
    """A write to one card: a contact is made or deleted whole, a group is made or deleted, or its
    members are edited. Without `card` one is made, of the `kind` "company", "person" or "group"."""

    card: Card | None = None
    uid: str = ""
    kind: str = ""
    name: str = ""
    address: str = ""
    note: str = ""
    add: frozenset[str] = frozenset()
    remove: frozenset[str] = frozenset()
    deletes: bool = False

    @property
    def key(self) -> str:
        """By what a store refuses it."""
        return self.card.ref if self.card else self.uid


CardChanges = dict[str, CardChange]


def merge_changes(changes: Iterable[CardChange]) -> CardChanges:
    """Return {key: change}; several changes of a group's members are one."""
    merged: CardChanges = {}
    for each in changes:
        one = merged.get(each.key, each)
        merged[each.key] = replace(one, add=one.add | each.add, remove=one.remove | each.remove)
    return merged


@dataclass(frozen=True)
class Mailbox:
    """A mailbox. `path`: its name behind those above it; `total`: how many messages are in it."""

    id: str
    name: str
    path: str
    role: str
    total: int


class Account:
    """What the account has of what the settings name; ids are empty for what is not there.
    `groups`: those in Mailroom's address book, by name; `labels`: {id: its category}, that of undo
    among them; `destinations`: {category's name: id}; `outgoing`: the mailboxes with the role sent
    or drafts; `own_names`: of the groups that are Mailroom's; `missing`: {need: a near name, or
    empty}; `cards`: the groups, and the contacts that were asked for."""

    def __init__(self, settings: MailroomSettings, boxes: list[Mailbox], cards: list[Card]) -> None:
        self.settings, self.mailboxes, self.cards = settings, boxes, cards
        self.categories = settings.triage_categories
        # Of several with one name the first.
        self._groups = sorted((card for card in cards if card.group_name), key=lambda c: c.uid)
        self.groups = {group.name: group for group in reversed(self._groups)}
        ids = {name: each.id for each in reversed(boxes) for name in (each.name, each.path)}
        self.inbox = next((each.id for each in boxes if each.role == "inbox"), "")
        self.outgoing = {each.id for each in boxes if each.role in ("sent", "drafts")}
        self.screener = ids.get(settings.screener_mailbox, "")
        self.error = ids.get(settings.label_mailroom_error, "")
        self.warning = ids.get(settings.label_mailroom_warning, "")
        asked = (*self.categories, settings.undo)
        self.labels = {ids[each.label]: each for each in asked if each.label in ids}
        filed = {each.name: ids.get(each.destination_mailbox, "") for each in self.categories}
        self.destinations = {name: box for name, box in filed.items() if box}
        self.managed = frozenset({self.screener, *self.destinations.values()})
        self.queue = frozenset({*self.labels, self.error}) - {""}
        self.marks = frozenset({*self.queue, self.warning}) - {""}
        self.own_names = {*(c.contact_group for c in self.categories), settings.provenance_group}
        self.missing: dict[Need, str] = {}
        for kind, name in needs_of(settings):
            names: Iterable[str] = self.groups if kind == "contact group" else ids
            if name not in names:
                near = (each for each in names if each.casefold() == name.casefold())
                self.missing[kind, name] = next(near, "")

    def family(self, category: Category) -> list[Category]:
        """Return the category and its ancestors, nearest first."""
        return [category, *ancestors(category, self.categories)]

    def lacks(self, needs: Iterable[Need]) -> str:
        """Return what is missing of some needs, to be put behind "has no"; empty if nothing is."""
        named = [f'{need[0]} "{need[1]}"' for need in needs if need in self.missing]
        near = [f' (but there is "{name}": rename that)' for name in self.missing.values() if name]
        return truncate(", ".join(named), 200) + "".join(near[:1]) if named else ""

    def check(self) -> None:
        """Raise ConfigurationError, with a line for each reason, where nothing can work."""
        used = [name for name, box in self.destinations.items() if box in self.outgoing]
        lines = [f"{name}: its mailbox is for what you send" for name in used]
        if not self.inbox:
            lines.append("the account has no mailbox with the role of the Inbox")
        labelled = [self.family(each) for each in self.labels.values() if not each.undoes]
        if not self.screener or all(self.lacks(filing_needs(line)) for line in labelled):
            lines.append(f"the account has no {self.lacks(self.missing)}: `setup --apply` makes it")
        if lines:
            raise ConfigurationError(*lines)

    def undo_patch(self, email: Email, labels: Iterable[str]) -> Patch:
        """Return the patch that takes a message out of what triage put it into (the Inbox where a
        category may have done so), and labels off; unless it lies in a mailbox of the user's, it
        goes back to the Screener."""
        destinations = self.managed - {self.screener}
        gone = {*labels, *destinations}
        if email.mailboxes & destinations and any(each.add_to_inbox for each in self.categories):
            gone.add(self.inbox)
        return email.patch([self.screener] if email.mailboxes <= gone | self.marks else [], gone)

    def resolve_labels(self, emails: list[Email], own: Set[str]) -> tuple[dict[str, str], Reasons]:
        """Return what some messages ask for: {sender: its label}, and {sender: why it cannot be
        done}. `own`: the user's addresses, `*@domain` for all of a domain."""
        asked: dict[str, set[str]] = defaultdict(set)
        for email in emails:
            if not email.mailboxes & self.outgoing:
                asked[email.sender] |= email.mailboxes & self.labels.keys()
        wrong = {who: f"several labels for {who}" for who in asked if len(asked[who]) > 1}
        wrong |= {who: IS_THE_USER for who in asked if is_own(who, own)}
        wrong |= {who: "it has no sender" for who in asked if not who}
        return {who: min(asked[who]) for who in asked if asked[who] and who not in wrong}, wrong

    def contacts_of(self, address: str) -> list[Card]:
        """Return the contacts with this address: those in a category's group before others, then
        the oldest."""
        found = [card for card in self.cards if address in card.emails and not card.is_group]
        made = {self.settings.provenance_group}
        held = {c.ref for c in found if {change.name for change in self.leaves([c])} - made}
        return sorted(found, key=lambda c: (c.ref not in held, c.created or "~", c.uid))

    def leaves(self, contacts: Iterable[Card]) -> Iterator[CardChange]:
        """Yield the changes that take contacts out of all groups of Mailroom's."""
        keys = set[str]().union(*(card.keys for card in contacts))
        for group in self._groups:
            members = frozenset(each for each, key in group.members.items() if key in keys)
            if members and group.name in self.own_names:
                yield CardChange(group, name=group.name, remove=members)

    def known_as(self, address: str, emails: Iterable[Email]) -> list[Category]:
        """Return the categories in whose groups the contacts with this address are, a parent's left
        to its child; a stranger's is that of undo, for messages in the Inbox."""
        contacts = self.contacts_of(address)
        groups = {change.name for change in self.leaves(contacts)}
        held = [each for each in self.categories if each.contact_group in groups]
        if not contacts and any(self.inbox in email.mailboxes for email in emails):
            held = [self.settings.undo]
        above = {parent.name for each in held for parent in ancestors(each, self.categories)}
        return [each for each in held if each.name not in above]

    def deletions(self, cards: Iterable[Card]) -> CardChanges:
        """Return the changes that delete untouched cards that are in no group of the user's."""
        foreign = [card for card in self.cards if card.group_name not in self.own_names]
        used = {key for card in foreign for key in card.members.values()}
        made = [card for card in cards if card.is_untouched and card.is_ours]
        return {c.ref: CardChange(c, deletes=True) for c in made if c.keys.isdisjoint(used)}


def is_own(address: str, own: Set[str]) -> bool:
    """Return whether an address is among some, of which `*@domain` is all of a domain."""
    return not own.isdisjoint({address, f"*@{address.rpartition('@')[2]}"})


def filing_needs(categories: Iterable[Category]) -> Iterator[Need]:
    """Yield what categories file with."""
    for each in categories:
        yield from (("mailbox", each.destination_mailbox), ("contact group", each.contact_group))


def needs_of(settings: MailroomSettings) -> list[Need]:
    """Return what the account has to have beside the Inbox."""
    needs = [("mailbox", settings.screener_mailbox)]
    for each in settings.triage_categories:
        needs += [("label", each.label), *filing_needs([each])]
    needs += [("label", settings.label_undo), ("label", settings.label_mailroom_error)]
    needs += [("label", settings.label_mailroom_warning)] if settings.warnings_enabled else []
    return list(dict.fromkeys([*needs, ("contact group", settings.provenance_group)]))


def own_uids(what: str) -> list[str]:
    """Return the uids of cards that Mailroom makes for a URI, `mailto:...` or `group:...`: always
    the same, so that no server makes a card twice. A contact that has been given another address
    keeps its uid, and its old address needs the next one."""
    return [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{what}?mailroom={n}")) for n in range(9)]


def own_uid(what: str, cards: Iterable[Card] = ()) -> str:
    """Return the uid of a new card for a URI: the first that none of the cards has."""
    taken = {uid_key(card.uid) for card in cards}
    return next((uid for uid in own_uids(what) if uid not in taken), str(uuid.uuid4()))


@dataclass(frozen=True)
class SenderPlan:
    """All that a cycle does for one sender. `emails`: the messages that were found; `contact`: the
    one there is, or is to be, without a `ref`; `joins`, `leaves`: the changes of cards before and
    after; `warning`: why tapped messages get the warning label; `error`: why nothing is done, under
    the error label; `failure`: the same without it. Without a `label` nothing was tapped: the
    messages have just arrived, and are filed with what is known already."""

    sender: str
    category: Category
    account: Account
    emails: Sequence[Email]
    label: str
    contact: Card = Card("")
    joins: CardChanges = field(default_factory=dict)
    leaves: CardChanges = field(default_factory=dict)
    warning: str = ""
    error: str = ""
    failure: str = ""

    @property
    def tapped(self) -> list[Email]:
        return [email for email in self.emails if self.label in email.mailboxes]

    @property
    def destinations(self) -> set[str]:
        """The ids of the mailboxes of the category and its ancestors, or of the Screener."""
        boxes, screener = self.account.destinations, self.account.screener
        return {boxes.get(each.name, screener) for each in self.account.family(self.category)}

    def refile(self, email: Email) -> Patch:
        """Return the patch that files a message. One that is neither labelled nor in a managed
        mailbox (in Trash, Junk or a folder of the user's, say) stays where it is."""
        account, has_label = self.account, self.label in email.mailboxes
        if self.label and not (has_label or email.mailboxes & account.managed):
            return {}
        gone = set() if self.label or self.category.add_to_inbox else {account.inbox}
        if self.category.undoes:
            return account.undo_patch(email, {account.warning} | gone)
        add = self.destinations
        if self.category.add_to_inbox and account.screener in email.mailboxes:
            add.add(account.inbox)
        if has_label and self.warning:
            add.add(account.warning)
        patch = email.patch(add, account.managed - add | gone)
        return patch | {"keywords/$seen": True} if patch and self.category.mark_read else patch

    def finish(self, email: Email) -> Patch:
        """Return the patch that takes off a filed message the label that is carried out, and no
        other, which may have been put on meanwhile."""
        return email.patch(self.destinations & email.mailboxes, {self.label, self.account.error})

    def complete(self, today: str) -> "SenderPlan":
        """Return the plan with what to do about contacts and groups."""
        account, undoes = self.account, self.category.undoes
        if lacking := account.lacks(filing_needs(account.family(self.category))):
            return replace(self, error=f"the account has no {lacking}")
        if any(email.mailboxes & account.outgoing for email in self.emails):
            return replace(self, error=IS_THE_USER)
        contacts = account.contacts_of(self.sender)
        if bad := next((card for card in contacts if card.problem), None):
            return replace(self, failure=f'the card "{bad.name or bad.ref}" {bad.problem}')
        # Where there is no contact its uid may have been left behind in groups.
        what = f"mailto:{self.sender}"
        contact = contacts[0] if contacts else Card("", own_uid(what, account.cards))
        held = list(account.leaves(contacts if undoes and contacts else [contact]))
        own_group = account.settings.provenance_group
        names = {each.contact_group for each in account.family(self.category)}
        keeps = set() if undoes else {*names, own_group}
        leaves = {change.key: change for change in held if change.name not in keeps}
        if undoes:
            leaves |= account.deletions(contacts)
            return replace(self, contact=contact, leaves=leaves)
        names |= {own_group} if contact.is_untouched or not contacts else set()
        names = (names & account.groups.keys()) - {change.name for change in held}
        uids = frozenset([contact.uid])
        joins = [CardChange(account.groups[n], name=n, add=uids) for n in sorted(names)]
        joins += [] if contacts else [self._new_contact(contact.uid, today)]
        given = {change.key: change for change in joins}
        plan = replace(self, contact=contact, joins=given, leaves=leaves)
        return replace(plan, warning=plan._reason_to_warn())

    def _new_contact(self, uid: str, today: str) -> CardChange:
        newest = max(self.tapped, key=lambda email: (email.received, email.id))
        name, kind = fold_name(newest.display_name), self.category.contact_type
        name = (turn_round(name) if kind == "person" else name)[:MAX_NAME].strip() or newest.address
        note = f'{CREATED_NOTE} on {today} as "{name}"'
        return CardChange(None, uid, kind, name, newest.address, note)

    def _reason_to_warn(self) -> str:
        for email in self.tapped if self.account.settings.warnings_enabled else []:
            if self.leaves and email.is_forged:
                return "the message failed authentication (DMARC)"
            if name_differs(self.contact.name, email.display_name):
                known = self.contact.name
                return f'the contact is called "{known}", the sender "{email.display_name}"'
        return ""

    def summary(self, filed: int) -> JSON:
        """Return what is done, for the log and for a dry run. `filed`: messages."""
        contact = "created" if self.joins else "none"
        if self.contact.ref:
            contact = "deleted" if self.contact.ref in self.leaves else "known"
        facts: JSON = {"sender": self.sender, "category": self.category.name, "contact": contact}
        facts["joined"] = ", ".join(each.name for each in self.joins.values() if each.add)
        facts["left"] = ", ".join(each.name for each in self.leaves.values() if each.remove)
        facts |= {"messages_filed": filed, "warning": self.warning}
        return {key: value for key, value in facts.items() if value != ""}


def with_conflicts(plans: Sequence[SenderPlan]) -> list[SenderPlan]:
    """Return the plans, with an error for those that ask for one contact in several ways."""
    count = Counter(uid for uid, _ in {(p.contact.uid, p.label) for p in plans if p.contact.uid})
    error = "several labels for the addresses of one contact"
    return [replace(p, error=error) if count[p.contact.uid] > 1 else p for p in plans]


# HTTP: who is sent the credentials, how long and how large a reply may be #########################

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0
MAX_REPLY_SECONDS = 300.0
MAX_BYTES = 8 * 2**20
MAX_DAV_BYTES = 32 * 2**20  # a portion of whole cards, with their photos
MAX_REDIRECTS = 5
MAX_RETRY_AFTER = 600.0
OK, BUSY = (200,), (401, 403, 429, 502, 503, 504)
LIMIT_SECONDS = 60.0  # for a server that speaks of a limit without a time
# A connection that has rested may be dead without a word (a laptop that slept, NAT) and is not used
# again; one in use is given up once nobody has been there for 15 seconds.
MAX_REST_SECONDS = 1.0
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 15_000}
# urllib3 takes the options of every socket, also of one to a proxy, from this list.
HTTPConnection.default_socket_options += [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
for _name in filter(socket.__dict__.get, KEEPALIVE):  # Not every system has all of them.
    _option = (socket.IPPROTO_TCP, getattr(socket, _name), KEEPALIVE[_name])
    HTTPConnection.default_socket_options.append(_option)
BROKEN = (urllib3.exceptions.HTTPError, OSError, ValueError)  # requests' errors are OSErrors
Auth = Callable[[requests.PreparedRequest], requests.PreparedRequest]


class Adapter(HTTPAdapter):
    """Trusts the certificates of the system, or those in SSL_CERT_FILE, beside those of `requests`
    or in REQUESTS_CA_BUNDLE: a private CA takes no one else's place."""

    def init_poolmanager(self, *args: Any, **named: Any) -> None:
        self._trust = {"ssl_context": ssl.create_default_context()}
        super().init_poolmanager(*args, **named | self._trust)

    def proxy_manager_for(self, proxy: str, **named: Any) -> Any:
        return super().proxy_manager_for(proxy, **named | self._trust)


def credentials(token: str, username: str = "") -> Auth:
    """Return what signs a request: HTTP Basic for a user name, else a Bearer token (RFC 6750). A
    header of the session would be replaced by what ~/.netrc has."""

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return HTTPBasicAuth(username.encode(), token.encode()) if username else sign


def as_text(value: Any) -> str:
    """Return the value, which is to be a text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


@contextmanager
def understood(what: str, hint: str = "") -> Iterator[None]:
    """While a reply is decoded: one that is not of the shape it should be is a ServerError."""
    try:
        yield
    except MALFORMED as error:
        why = hint or truncate(f"{type(error).__name__}: {error}", MAX_SHOWN)
        raise ServerError(f"{what} returned a malformed reply: {why}", answered=True) from None


@contextmanager
def unbroken(url: str, trouble: str = ": connection lost") -> Iterator[None]:
    """While there is a connection: one that breaks or cannot be made is a ServerError, a URL that
    is none a ConfigurationError."""
    try:
        yield
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, TypeError):
        # What the error says may hold the proxy's password.
        reason = f"{url}, or the proxy in HTTPS_PROXY, is not a valid URL"
        raise ConfigurationError(reason) from None
    except BROKEN as error:
        raise ServerError(f"{url}{trouble}: {network_reason(error)}") from None


class HTTPClient:
    """Requests that carry the credentials to those they are meant for, and to no one else: over TLS
    that is verified, or to this machine itself. `setting`: the variable that names the server;
    `remedy`: what to do when the credentials are refused; `most`: bytes in a reply."""

    def __init__(self, auth: Auth, setting: str, remedy: str, most: int = MAX_BYTES) -> None:
        self._setting, self._remedy, self._most, self._used = setting, remedy, most, 0.0
        self._session = requests.Session()
        self._session.auth, self._session.stream = auth, True
        self._session.headers["User-Agent"] = f"Mailroom/{VERSION}"
        self._session.mount("https://", Adapter())

    def open(self, method: str, url: str, accept: Iterable[int], **named: Any) -> requests.Response:
        """Return a response with one of the statuses to accept, whose body is not read yet.
        Redirects are followed within the origin. Raises ServerError; ConfigurationError for what
        the credentials are not meant for, or refused by."""
        for _ in range(MAX_REDIRECTS):
            if not is_safe_url(url):
                raise ConfigurationError(f"{url} is not {SAFE_URL}: the credentials stay here")
            # Plain http goes to this machine only, which is nothing for a proxy to see.
            self._session.trust_env = url.startswith("https:")
            with unbroken(url, " cannot be reached"):
                response = self._session.request(method, url, allow_redirects=False, **named)
            if not (response.next and response.next.url):
                if response.status_code in accept:
                    return response
                raise self._refusal(response)
            # A server behind a TLS proxy may say http where it means https.
            target = re.sub("^http:", f"{urlsplit(url).scheme}:", response.next.url)
            if self._session.should_strip_auth(url, target):  # type: ignore[no-untyped-call]
                hint = f"if that is right, put it into {self._setting}"
                raise ConfigurationError(f"{url} redirects to {target}: {hint}")
            url = target
        raise ServerError(f"{url}: too many redirects; check {self._setting}", answered=True)

    def request(
        self, method: str, url: str, headers: JSON, body: bytes = b"", accept: Iterable[int] = OK
    ) -> tuple[requests.Response, bytes]:
        """Return a response and its whole body. Raises as `open` does."""
        if time.monotonic() - self._used > MAX_REST_SECONDS:
            self._session.close()  # It opens anew by itself.
        content, timeout = bytearray(), (CONNECT_TIMEOUT, READ_TIMEOUT)
        late = ServerError(f"{url} timed out after {MAX_REPLY_SECONDS:g} s")
        with gevent.Timeout(MAX_REPLY_SECONDS, late):
            response = self.open(method, url, accept, headers=headers, data=body, timeout=timeout)
            with response, unbroken(response.url):
                for chunk in response.raw.stream(decode_content=True):
                    content += chunk
                    if len(content) > self._most:
                        much = f"{url} sent more than {self._most:,} bytes"
                        raise ServerError(much, answered=True)
        self._used = time.monotonic()
        return response, bytes(content)

    def _refusal(self, response: requests.Response) -> MailroomError:
        """Return what an unwanted reply means. One that speaks of a limit does not refuse the
        credentials, nor does a web page, which some proxy made."""
        status, headers, body, wait = response.status_code, response.headers, b"", 0.0
        with suppress(*BROKEN, *MALFORMED):
            wait = min(urllib3.Retry().get_retry_after(response.raw) or 0.0, MAX_RETRY_AFTER)
        with response, suppress(*BROKEN):
            body = response.raw.read(2**16, decode_content=True)
        said = error_words(headers, body)
        is_limit = status in BUSY and re.search("limit|too many", said, re.IGNORECASE)
        wait = wait or (LIMIT_SECONDS if is_limit else float(status == 429))
        text = f"{response.url} answered HTTP {status}" + (f": {said}" if said else "")
        is_page = "html" in headers.get("Content-Type", "")
        if not wait and (status == 401 or (status == 403 and not is_page)):
            return CredentialsError(f"{text}: the credentials are refused. {self._remedy}")
        hint = f"; check {self._setting}" if status == 404 else ""
        return ServerError(text + hint, answered=status not in BUSY, retry_after=wait)


def at_well_known(url: str, service: str) -> str:
    """Return where a service is asked for: a bare origin at the well-known place (RFC 8615)."""
    return urljoin(url, f"/.well-known/{service}") if urlsplit(url).path in ("", "/") else url


def network_reason(error: BaseException) -> str:
    """Return why a request failed, in one line: what the innermost error says."""
    is_proxy = isinstance(error, requests.exceptions.ProxyError)
    while inner := error.__cause__ or error.__context__:
        error = inner
    text = (getattr(error, "strerror", None) or "").lower() or " ".join(str(error).split())
    if isinstance(error, ssl.SSLCertVerificationError):
        ca = "for a private CA put its certificate's path into SSL_CERT_FILE or REQUESTS_CA_BUNDLE"
        text = f"{error.verify_message}; {ca}"
    elif isinstance(error, socket.gaierror):
        text = "unknown host"
    return f"the proxy (HTTPS_PROXY) failed: {text}" if is_proxy else text


def error_words(headers: Mapping[str, str], body: bytes) -> str:
    """Return what a server says of its error, in a problem (RFC 7807) or in plain text."""
    is_plain = headers.get("Content-Type", "text/plain").startswith("text/plain")
    said = body.decode(errors="replace") if is_plain else ""
    with suppress(*MALFORMED):
        problem = json.loads(body)
        said = problem.get("detail") or problem.get("title") or problem["type"]
    return truncate(" ".join(str(said).split()), 200)


def outcome(run: Callable[[], object]) -> BaseException | None:
    """Run the work of a greenlet; what it raised, if anything. gevent would only print that, and
    nobody else would notice that the greenlet is dead."""
    try:
        run()
    except BaseException as error:
        return error
    return None


def run_until(stop: Any, *tasks: Callable[[], object]) -> None:
    """Run tasks side by side until `stop` is set or one of them has ended, which ends the others.
    Raises what it was ended by."""
    greenlets: list[Any] = [gevent.spawn(outcome, task) for task in tasks]
    try:
        # Python misses a signal that comes just before the loop waits, until the next turn.
        while not (ended := gevent.wait([stop, *greenlets], timeout=1, count=1)):
            pass
    finally:
        # A blocked read ends with its greenlet: closing the response would deadlock.
        gevent.killall(greenlets, timeout=1)
    if not stop.is_set() and (fault := ended[0].value):
        raise fault if isinstance(fault, Exception) else RuntimeError(f"ended by {fault!r}")


# JMAP (RFC 8620) ##################################################################################

CORE = "urn:ietf:params:jmap:core"
MAIL = "urn:ietf:params:jmap:mail"
CONTACTS = "urn:ietf:params:jmap:contacts"
SUBMISSION = "urn:ietf:params:jmap:submission"
CAPABILITIES = {"AddressBook": CONTACTS, "ContactCard": CONTACTS, "Identity": SUBMISSION}
MAX_PAGE, CARDS_IN_PAGE = 4096, 50  # Cards come with all that is in them, be it a photo.
JMAP_REMEDY = f"MAILROOM_JMAP_TOKEN has to be {HOW_TO_SIGN_IN}"
# What a server takes at once (RFC 8620 section 2) if it does not say.
DEFAULT_LIMITS = {"maxCallsInRequest": 16, "maxObjectsInGet": 500, "maxObjectsInSet": 500}
# The method errors that will be the same tomorrow.
LACKING = {"unknownMethod", "unknownCapability", "invalidArguments", "unsupportedFilter"}

Call = tuple[str, JSON]
Answers = tuple[list[JSON], list[list[Any]]]


class MethodError(ServerError):
    """A method-level error (RFC 8620 section 3.6.2), or the SetError `rateLimit` of an object,
    which may say for how many seconds to leave the server alone."""

    def __init__(self, method: str, error: JSON) -> None:
        said = re.search(r"(\d+) ?s(ec|\b)", str(error.get("description")))
        seconds = min(float(said[1]) if said else LIMIT_SECONDS, MAX_RETRY_AFTER)
        wait = seconds if error.get("type") == "rateLimit" else 0.0
        super().__init__(f"{method}: {error_text(error)}", answered=not wait, retry_after=wait)
        self.method, self.is_lasting = method, error.get("type") in LACKING


class Query(NamedTuple):
    """A Foo/query with the Foo/get of what it finds, of all `properties` where none are named.
    `parse` makes a value of each object, or None of one that is not wanted; `most`: so many are
    read, messages by `receivedAt`, the newest first."""

    type: str
    filter: JSON | None
    properties: Sequence[str] | None
    parse: Callable[[JSON], Any]
    most: int = sys.maxsize


def error_text(error: JSON) -> str:
    """Return a method error or SetError in one line: its type, and what else it says."""
    said = [error.get("type", "unknown error"), error.get("properties"), error.get("description")]
    return truncate(" ".join(str(each) for each in said if each), MAX_SHOWN)


def set_errors(done: JSON) -> Reasons:
    """Return {id or creation id: why it was refused} of a Foo/set (RFC 8620 section 5.3); with what
    is no longer there nothing is left to be done. Raises ServerError."""
    with understood("Foo/set"):
        kinds = [done.get(kind) or {} for kind in ("notCreated", "notUpdated", "notDestroyed")]
        errors = {key: error for kind in kinds for key, error in kind.items()}
        for error in errors.values():
            if error.get("type") == "rateLimit":
                raise MethodError("Foo/set", error)
        return {k: error_text(e) for k, e in errors.items() if e.get("type") != "notFound"}


def any_of(conditions: Iterable[JSON]) -> JSON:
    """Return the filter (RFC 8620 section 5.5) that is met where one of the conditions is."""
    return {"operator": "OR", "conditions": list(conditions)}


def in_any(mailboxes: Iterable[str]) -> JSON:
    """Return the filter for the messages in one of the mailboxes, given by id."""
    return any_of({"inMailbox": box} for box in sorted(mailboxes))


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of at most so many."""
    every = list(items)
    return (every[start : start + size] for start in range(0, len(every), size))


class JMAPClient:
    """A JMAP session and the requests that are made in it. `hostname`: a host, or a URL;
    `event_source_url`: where the events are, maybe a template, None without any; `stale`: connect
    again before the next cycle."""

    def __init__(self, token: str, hostname: str = "api.fastmail.com", username: str = "") -> None:
        url = hostname if "://" in hostname else f"https://{hostname}/jmap/session"
        self.session_url = at_well_known(url, "jmap")
        self.event_source_url: str | None = None
        self.limits, self.stale = DEFAULT_LIMITS, True
        self._http = HTTPClient(credentials(token, username), "MAILROOM_JMAP_URL", JMAP_REMEDY)
        self.session_capabilities, self._session, self._accounts = JSON(), JSON(), dict[str, JSON]()

    def connect(self) -> None:
        """Fetch the session (RFC 8620 section 2). Raises ServerError, ConfigurationError."""
        reply, body = self._http.request("GET", self.session_url, {"Accept": "application/json"})
        media_type = reply.headers.get("Content-Type", "nothing").partition(";")[0]
        with understood(reply.url, f"it sends {media_type}; check MAILROOM_JMAP_URL"):
            session = json.loads(body)
            offered = session["capabilities"].get(CORE) or {}
            limits = {key: max(1, int(offered.get(key) or n)) for key, n in DEFAULT_LIMITS.items()}
            known, primary = session.get("accounts") or {}, session["primaryAccounts"].items()
            accounts = {urn: {**known.get(id_, {}), "id": id_} for urn, id_ in primary if id_}
            url = session["apiUrl"] = urljoin(reply.url, session["apiUrl"])
            events = session.get("eventSourceUrl") and urljoin(reply.url, session["eventSourceUrl"])
        if MAIL not in accounts or accounts[MAIL].get("isReadOnly"):
            raise ConfigurationError(f"the token may not read and write mail. {JMAP_REMEDY}")
        if unsafe := [each for each in (url, events) if each and not is_safe_url(each)]:
            raise ConfigurationError(f"the session names {unsafe[0]}, which is not {SAFE_URL}")
        self._session, self._accounts, self.limits, self.stale = session, accounts, limits, False
        self.session_capabilities, self.event_source_url = session["capabilities"], events or None

    @property
    def account_id(self) -> str:
        """The account for mail. Raises RuntimeError before `connect()`."""
        if not self._accounts:
            raise RuntimeError("connect() comes first")
        return str(self._accounts[MAIL]["id"])

    def account(self, capability: str) -> JSON:
        """Return the session's account for a capability, with its id; empty without one."""
        return self._accounts.get(capability, {})

    def own_addresses(self) -> frozenset[str]:
        """Return the keys of the user's own addresses, as far as the session tells. `*@domain`
        stands for all addresses of a domain."""
        own = [self._session.get("username")]
        if self.account(SUBMISSION):
            # The token may lack the scope for it.
            with suppress(MethodError), understood("Identity/get"):
                identities = self.call("Identity/get", {"ids": None})["list"]
                own += [each.get("email") for each in identities]
        return frozenset(address_key(str(each or "")) for each in own) - {""}

    def call(self, method: str, arguments: JSON) -> JSON:
        """Return the answer to a single call. Raises MethodError, ServerError."""
        return self._post([(method, arguments)])[0]

    def _post(self, calls: Sequence[Call]) -> list[JSON]:
        """Make one API request (RFC 8620 section 3.3); an answer for each call, in their order."""
        numbered, using = [], {CORE}
        for n, (method, arguments) in enumerate(calls):
            capability = CAPABILITIES.get(method.partition("/")[0], MAIL)
            using.add(capability)
            given = {"accountId": self.account(capability)["id"], **arguments}
            if "#ids" in given:  # those that the call before it finds
                given["#ids"] = {"resultOf": str(n - 1), "name": calls[n - 1][0], "path": "/ids"}
            numbered.append([method, given, str(n)])
        body = json.dumps({"using": sorted(using), "methodCalls": numbered}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        reply, body = self._http.request("POST", self._session["apiUrl"], headers, body)
        with understood(reply.url):
            decoded = json.loads(body)
            # What the first answer has is what later ones are compared with.
            state = decoded.get("sessionState")
            self.stale |= self._session.setdefault("sessionState", state) != state
            answers = {}
            for name, answer, tag in decoded["methodResponses"]:
                if name == "error":
                    raise MethodError(calls[int(tag)][0], answer)
                answers[tag] = {**answer}
            return [answers[str(n)] for n in range(len(calls))]

    def fetch(self, queries: Sequence[Query], first: Sequence[Call] = ()) -> Answers:
        """Return the answers to the `first` calls, and for each query the values of all that it
        finds: in one request where the limits allow it, and one more for each further page. Raises
        MethodError, ServerError."""
        groups = [[call] for call in first] + [self._page(query, 0, "") for query in queries]
        replies: list[list[JSON]] = []
        # A query and its get stay together: one refers to the result of the other.
        for batch in batched(groups, max(1, self.limits["maxCallsInRequest"] // 2)):
            answers = self._post([call for group in batch for call in group])
            replies += [[answers.pop(0) for _ in group] for group in batch]
        pages = map(self._all, queries, replies[len(first) :])
        return [reply[0] for reply in replies[: len(first)]], list(pages)

    def _all(self, query: Query, page: list[JSON]) -> list[Any]:
        """Return the values of a query's first page and of all further ones."""
        values, seen = list[Any](), 0
        while True:
            with understood(f"{query.type}/query"):
                values += [v for v in map(query.parse, page[-1]["list"]) if v is not None]
                ids = page[0]["ids"] if len(page) > 1 else []
                seen += len(ids)
                if not ids or seen >= min(query.most, page[0].get("total") or query.most):
                    return values
                last = as_text(ids[-1])
            page.clear()  # Thousands of objects as they came take more memory than all else.
            page = self._post(self._page(query, seen, last))

    def _page(self, query: Query, seen: int, last: str) -> list[Call]:
        """Return the calls for the page after an id. By position, a page would leave something out
        when something before it goes away meanwhile."""
        wanted = {"properties": query.properties}
        if query.type == "Mailbox" and self.limits["maxObjectsInGet"] >= 500:
            # Not every server can do Mailbox/query without a filter; these give all at once.
            return [("Mailbox/get", {"ids": None, **wanted})]
        page = CARDS_IN_PAGE if query.type == "ContactCard" else MAX_PAGE
        size = min(self.limits["maxObjectsInGet"], page, query.most - seen)
        asked: JSON = {"filter": query.filter, "limit": size, "calculateTotal": True}
        asked |= {"anchor": last, "anchorOffset": 1} if last else {"position": 0}
        if query.type == "Email":
            asked["sort"] = [{"property": "receivedAt", "isAscending": False}]
        return [(f"{query.type}/query", asked), (f"{query.type}/get", {"#ids": None, **wanted})]


# Contacts: what both stores can do, and how it is done over JMAP (RFC 9610) #######################

# What a card may have in other ways than by a touch: from the server, or from triage.
NOT_TOUCHES = {"id", "uid", "created", "updated", "prodId", "version", "members"}


class ContactStore(Protocol):
    """Where contacts are kept. A cycle asks the questions along with its own, gives the answers to
    `cards`, and applies the changes that it plans."""

    def prepare(self) -> None:
        """Find the address book that is Mailroom's. Raises ConfigurationError, ServerError."""

    def questions(self, addresses: Collection[str] | None) -> tuple[list[Call], list[Query]]:
        """Return what to ask the JMAP server, if it has them, for the groups and for contacts that
        may have one of the addresses, or for all cards."""
        return [], []

    def cards(self, answers: Sequence[JSON], found: Sequence[list[Card]]) -> list[Card]:
        """Return the cards, given the answers; there may be more than was asked for."""

    def has_changed(self, answers: Sequence[JSON]) -> bool:
        """Return whether anyone else has changed cards since, as far as the JMAP server tells."""
        return False

    def apply(self, changes: Mapping[str, CardChange]) -> Reasons:
        """Carry out the changes; {key: why it was refused}. Nothing is done to a card that is not
        as it was read. Who could not be made joins no group. Raises ServerError."""


class JMAPContacts(ContactStore):
    """Contacts in a JMAP account. Mailroom's address book is the default one that may be written;
    those that may not be written do not count."""

    def __init__(self, client: JMAPClient) -> None:
        self._client, self._books, self._state = client, list[str](), ""

    def prepare(self) -> None:
        account = self._client.account(CONTACTS)
        if not account or account.get("isReadOnly"):
            remedy = "make one with the scope Contacts, or set MAILROOM_CARDDAV_USERNAME and"
            why = f"the token may not read and write contacts: {remedy} MAILROOM_CARDDAV_PASSWORD"
            raise ConfigurationError(why)
        answer = self._client.call("AddressBook/get", {"ids": None})
        with understood("AddressBook/get"):
            books = sorted(answer["list"], key=lambda book: not book.get("isDefault"))
            rights = {as_text(book["id"]): book.get("myRights") or {} for book in books}
        self._books = [book for book, may in rights.items() if may.get("mayWrite", True)]
        if not self._books:
            raise ConfigurationError("the account has no address book that may be written")

    def questions(self, addresses: Collection[str] | None) -> tuple[list[Call], list[Query]]:
        wanted = [{"email": form} for each in addresses or () for form in spellings(each)]
        wanted += [{"uid": own_uid(f"mailto:{each}")} for each in addresses or ()]
        some = [{"kind": "group"}, *map(any_of, batched(wanted, MAX_FILTER_TERMS))]
        filters = [None] if addresses is None else some
        parse = partial(jmap_card, books=self._books)
        # The state comes first, so that a later change by someone else is noticed.
        state: Call = ("ContactCard/get", {"ids": []})
        return [state], [Query("ContactCard", each, None, parse) for each in filters]

    def cards(self, answers: Sequence[JSON], found: Sequence[list[Card]]) -> list[Card]:
        self._state = str(answers[0].get("state"))
        return list({card.ref: card for cards in found for card in cards}.values())

    def has_changed(self, answers: Sequence[JSON]) -> bool:
        return self._state != str(answers[0].get("state"))

    def apply(self, changes: Mapping[str, CardChange]) -> Reasons:
        refused = Reasons()
        while changes:
            # New contacts come first, so that no group has a member that nobody is.
            ordered = sorted(changes.values(), key=lambda change: not change.kind)
            for batch in batched(ordered, min(self._client.limits["maxObjectsInSet"], MAX_PAGE)):
                new, there = [c for c in batch if not c.card], [c for c in batch if c.card]
                asked = {
                    "ifInState": self._state,  # or nothing is done (RFC 8620 section 5.3)
                    "create": {each.key: jmap_new_card(each, self._books[0]) for each in new},
                    "update": {c.key: jmap_members_patch(c) for c in there if not c.deletes},
                    "destroy": [each.key for each in there if each.deletes],
                }
                done = self._client.call("ContactCard/set", asked)
                self._state = str(done.get("newState"))
                refused |= set_errors(done)
            back = [replace(c, add=frozenset(), remove=c.add & refused.keys()) for c in ordered]
            changes = {each.key: each for each in back if each.remove and each.key not in refused}
        return refused


def jmap_card(raw: JSON, books: Sequence[str]) -> Card | None:
    """Return a Card from a ContactCard (RFC 9553); what cannot be understood of it is its problem.
    None of one that is in none of the address books, the first of which is Mailroom's."""
    ids = raw.get("addressBookIds") or {books[0]: True}
    inside = {book for book, there in ids.items() if there}
    if inside.isdisjoint(books):
        return None
    # The addresses are found in whatever is there: they tell whom a problem concerns.
    texts = [str(text) for key, text in jmap_facts(raw.get("emails")) if key == "address"]
    card = Card(as_text(raw["id"]), emails=contact_addresses(texts))
    card = replace(card, is_group=raw.get("kind") == "group", is_ours=books[0] in inside)
    try:
        name = raw.get("name") or {}
        parts = [(part["kind"], part["value"]) for part in name.get("components") or []]
        spoken = " ".join(text for kind, text in parts if kind in ("given", "given2", "surname"))
        members = {m: uid_key(m) for m, there in (raw.get("members") or {}).items() if there}
        card = replace(card, name=plain_name(name.get("full") or spoken), members=members)
        card = replace(card, uid=as_text(raw["uid"]), created=as_text(raw.get("created") or ""))
        addresses = [each["address"] for each in (raw.get("emails") or {}).values()]
        if not all(addresses):
            raise ValueError("an address without a value")
        notes = [each["note"] for each in (raw.get("notes") or {}).values()]
        facts = jmap_facts({key: raw[key] for key in raw.keys() - NOT_TOUCHES})
        made = [jmap_facts(jmap_new_card(new, books[0])) for new in made_as(card, addresses, notes)]
        return replace(card, is_untouched=any(facts <= each for each in made))
    except MALFORMED as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        return replace(card, problem=f"cannot be understood: {why}")


def jmap_facts(value: Any, key: str = "") -> set[tuple[str, Any]]:
    """Return {(nearest key, scalar)} of a JSON value, without the types of objects (`@type`), which
    a server may leave out."""
    if not isinstance(value, dict | list):
        return {(key, value)}
    pairs = value.items() if isinstance(value, dict) else [(key, each) for each in value]
    return set().union(*(jmap_facts(each, name) for name, each in pairs if name != "@type"))


def contact_addresses(texts: Iterable[str]) -> frozenset[str]:
    """Return the keys of the addresses in a contact, which may be written as URIs."""
    bare = (re.sub("(?i)^mailto:", "", text.strip(BLANKS)) for text in texts)
    return frozenset(map(address_key, bare)) - {""}


def made_as(card: Card, addresses: Sequence[str], notes: Sequence[str]) -> list[CardChange]:
    """Return how Mailroom would make a card with this name, address and note, of each kind; nothing
    if its uid or note says that it did not."""
    new = CardChange(name=card.name, address="".join(addresses), note="".join(notes))
    mark = MARK.fullmatch(new.note)
    kinds = ["company", "person"] if mark and mark[1] == card.name else []
    what = f"mailto:{min(card.emails, default='')}"
    if card.is_group:
        kinds, what = ["group"], f"group:{card.name}"
    return [replace(new, kind=kind) for kind in kinds if uid_key(card.uid) in own_uids(what)]


def jmap_new_card(change: CardChange, address_book: str) -> JSON:
    """Return the ContactCard of a new contact, a person's with the name in parts, or of a group."""
    name = {"full": change.name}
    card = {"@type": "Card", "version": "1.0", "uid": change.uid, "name": name}
    card["addressBookIds"] = {address_book: True}
    pairs = zip(("given", "surname"), split_name(change.name), strict=True)
    parts = [{"kind": kind, "value": value} for kind, value in pairs if value]
    kinds: dict[str, JSON] = {
        "company": {"kind": "org", "organizations": {"o1": {"name": change.name}}},
        "person": {"kind": "individual", "name": name | {"components": parts, "isOrdered": True}},
        "group": {"kind": "group"},
    }
    who = {"emails": {"e1": {"address": change.address}}, "notes": {"n1": {"note": change.note}}}
    return card | kinds[change.kind] | (who if change.address else {})


def jmap_members_patch(change: CardChange) -> JSON:
    """Return the patch (RFC 8620 section 5.3) of a group's members. All that a path leads through
    has to be there already, so the first member is set with what holds it."""
    if change.add and change.card and not change.card.members:
        return {"members": dict.fromkeys(sorted(change.add), True)}
    stays = dict.fromkeys(sorted(change.remove)) | dict.fromkeys(sorted(change.add), True)
    return {f"members/{u.replace('~', '~0').replace('/', '~1')}": stays[u] for u in stays}


# vCards (RFC 6350, RFC 2426) ######################################################################

# Name (without a group), parameters and value; what is no property is all value.
PROPERTY = re.compile(r'(?s)(?:(?:[\w-]+\.)?([\w-]+)((?:;(?:[^:;"]|"[^"]*")*)*):)?(.*)')
# A content line with its folds and line end (RFC 6350 section 3.2); an encoded one (vCard 2.1) goes
# on where it ends with `=`.
CONTENT_LINE = re.compile(r"(?:.*QUOTED-PRINTABLE(?:.*=\r?\n)*)?.*(?:\n[ \t].*)*\n?")
APPLE_KIND, APPLE_MEMBER = "X-ADDRESSBOOKSERVER-KIND", "X-ADDRESSBOOKSERVER-MEMBER"
MEMBERS = ("MEMBER", APPLE_MEMBER)
# What a vCard may have in other ways than by a touch: from the server, or from triage.
NOT_FACTS = {"", "VERSION", "PRODID", "CREATED", "REV", "UID", *MEMBERS}


def vcard_properties(vcard: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (content line as it stands, name and parameters in upper case, value as text (RFC 6350
    section 3.4))."""
    for line in CONTENT_LINE.findall(vcard):
        name, parameters, text = PROPERTY.findall(re.sub(r"\r?\n[ \t]", "", line))[0]
        if "QUOTED-PRINTABLE" in parameters.upper():
            text = quopri.decodestring(text.encode()).decode(errors="replace")
        text = re.sub(r"(?s)\\(.)", lambda m: "\n" if m[1] in "nN" else m[1], text).strip(BLANKS)
        yield line, name.upper(), parameters.upper(), text


def vcard_card(url: str, text: str, created: str, is_ours: bool) -> Card:
    """Return a Card from a resource; what cannot be understood of it is its problem."""
    values: dict[str, list[str]] = defaultdict(list)
    for _, name, _, value in vcard_properties(text):
        values[name].append(value)
    uid, name = ("".join(values[key][:1]) for key in ("UID", "FN"))
    is_group = "group" in map(str.lower, values["KIND"] + values[APPLE_KIND])
    members = {member: uid_key(member) for key in MEMBERS for member in values[key]}
    emails = contact_addresses(values["EMAIL"])
    card = Card(url, uid, plain_name(name), emails, is_group, members, created, is_ours)
    wrong = [f"it has no {key}" for key in ("UID", "FN", "END") if not values[key]]
    wrong += ["there are several contacts in one resource"] if len(values["BEGIN"]) > 1 else []
    wrong += ["an address without a value"] if "" in values["EMAIL"] else []
    if wrong:
        return replace(card, problem=f"cannot be understood: {wrong[0]}")
    made = map(new_vcard, made_as(card, values["EMAIL"], values["NOTE"]))
    is_untouched = is_ours and any(vcard_facts(text) <= vcard_facts(each) for each in made)
    return replace(card, is_untouched=is_untouched)


def vcard_facts(vcard: str) -> set[tuple[str, ...]]:
    """Return {(property, parameters, value)} of what a person may have put into it."""
    return {each[1:] for each in vcard_properties(vcard) if each[1] not in NOT_FACTS}


def new_vcard(change: CardChange) -> str:
    """Return the vCard 3.0 of a new contact or group, as Apple and Fastmail have them."""
    name, address, note = map(vcard_escape, (change.name, change.address, change.note))
    given, surname = map(vcard_escape, split_name(change.name))
    kinds = {
        "person": [f"N:{surname};{given};;;"],
        "company": ["N:;;;;", f"ORG:{name}", "X-ABSHOWAS:COMPANY"],
        "group": [f"N:{name};;;;", f"{APPLE_KIND}:group"],
    }
    who = [f"EMAIL;TYPE=INTERNET:{address}", f"NOTE:{note}"] if address else []
    lines = ["BEGIN:VCARD", "VERSION:3.0", f"PRODID:-//Mailroom//{VERSION}//EN"]
    lines += [f"UID:{change.uid}", f"FN:{name}", *kinds[change.kind], *who, "END:VCARD"]
    return "".join(map(vcard_fold, lines))


def vcard_escape(text: str) -> str:
    """Return a text as a value (RFC 6350 section 3.4)."""
    return re.sub(r"([\\,;])", r"\\\1", text).replace("\n", "\\n")


def vcard_fold(line: str) -> str:
    """Return a content line in parts of at most 75 octets, of which a character has up to four."""
    width = 74 if line.isascii() else 18
    return "\r\n ".join(re.findall(f".{{1,{width}}}", line)) + "\r\n"


def edit_members(text: str, add: Set[str], remove: Set[str]) -> str:
    """Return a vCard with the lines of members added and taken away, and nothing else touched.
    Apple's have the uid as a URN, those of vCard 4.0 as it is."""
    lines, removed = list(vcard_properties(text)), set(map(uid_key, remove))
    is_apple = any(name == APPLE_KIND for _, name, _, _ in lines)
    pattern = "(?i)^(urn:uuid:)?" if is_apple else "^"
    start = f"{APPLE_MEMBER}:urn:uuid:" if is_apple else "MEMBER:"
    added = "".join(vcard_fold(re.sub(pattern, start, uid)) for uid in sorted(add))
    kept = [each for each in lines if each[1] not in MEMBERS or uid_key(each[3]) not in removed]
    return "".join(added + line if name == "END" else line for line, name, _, _ in kept)


# Contacts over CardDAV (RFC 6352): a mirror, and writes ###########################################

# Whole cards, maybe with photos, in one reply.
CARDS_AT_ONCE = 25
WRITES_AT_ONCE = 4
CARD_ANSWERS = frozenset(range(200, 500)) - {401, 429}
LOGIN = "MAILROOM_CARDDAV_USERNAME, MAILROOM_CARDDAV_PASSWORD (at Fastmail: an app password)"
CARDDAV_REMEDY = f"Look at {LOGIN} and MAILROOM_CARDDAV_URL"
BOOKS = "<D:prop><D:resourcetype/><D:owner/><D:sync-token/><D:current-user-privilege-set/>"
BOOKS += "<D:current-user-principal/><C:addressbook-home-set/></D:prop>"
# Whoever may add members (RFC 3744 section 5.4); not every server says.
WRITE_RIGHTS = {"{DAV:}all", "{DAV:}write", "{DAV:}bind"}
SINCE = "<D:sync-token>{}</D:sync-token><D:sync-level>1</D:sync-level>"
ETAG = "<D:prop><D:getetag/></D:prop>"
CARD_PROPERTIES = "<D:prop><D:creationdate/><D:getetag/><C:address-data/></D:prop>"


def dav_text(element: ElementTree.Element, *path: str) -> str:
    """Return the text of the first element with these names on the way to it; empty without it."""
    return element.findtext(".//" + "/".join(f"{{*}}{name}" for name in path), "").strip()


def dav_responses(answer: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Return {URL: response} of a multistatus. A property that was not found is empty there."""
    return {dav_text(each, "href"): each for each in answer.iterfind("{*}response")}


class CardDAVContacts(ContactStore):
    """Contacts in the address books of a CardDAV account. What the rules need of each card is kept
    in memory, and brought up to date by what has changed. `_tokens`: {address book: the sync token
    of when it was read}, empty before, None for one that has none. `_entries`: {URL: (ETag, card,
    vCard if it is a group)}."""

    def __init__(self, url: str, auth: Auth) -> None:
        self._http = HTTPClient(auth, "MAILROOM_CARDDAV_URL", CARDDAV_REMEDY, MAX_DAV_BYTES)
        self._url, self._home = at_well_known(url, "carddav"), ""
        self._tokens, self._entries = dict[str, str | None](), dict[str, tuple[str, Card, str]]()

    def prepare(self) -> None:
        """The way is from the URL to the principal, to its home, to what is in it (RFC 6764 section
        6). Books that may not be written or are somebody else's do not count."""
        start = self._ask(self._url, "0", "D:propfind", BOOKS)
        principal = dav_text(start, "current-user-principal", "href")
        found = self._ask(principal, "0", "D:propfind", BOOKS) if principal else start
        home = dav_text(found, "addressbook-home-set", "href")
        listed = self._ask(home, "1", "D:propfind", BOOKS) if home else start
        named, books = list[str](), dict[str, str | None]()
        for url, each in (dav_responses(listed) | dav_responses(start)).items():
            if each.find(".//{*}resourcetype/{*}addressbook") is None:
                continue
            book = url.rstrip("/") + "/"
            named += [book] if url in dav_responses(start) else []
            is_own = book in named or dav_text(each, "owner", "href") in ("", principal)
            rights = {right.tag for right in each.iterfind(".//{*}privilege/*")}
            if is_own and (not rights or rights & WRITE_RIGHTS):
                books[book] = "" if dav_text(each, "sync-token") else None
        usual = [url for url in books if re.search("(default|contacts)/$", url.lower())]
        choices = [named] if named else [list(books), usual]
        fit = [choice[0] for choice in choices if len(choice) == 1 and choice[0] in books]
        if not fit:
            several = "there are several address books; for this one MAILROOM_CARDDAV_URL="
            none = f"{self._url}: no address book to write. {CARDDAV_REMEDY}"
            lines = [] if named else [several + url for url in books]
            raise ConfigurationError(*(lines or [none]))
        if (fit[0], books.keys()) != (self._home, self._tokens.keys()):
            self._home, self._tokens, self._entries = fit[0], books, {}

    def _ask(self, url: str, depth: str, root: str, *elements: str) -> ElementTree.Element:
        """Return a multistatus (RFC 4918 section 13, RFC 6578 section 3.2), with whole URLs."""
        spaces = 'xmlns:D="DAV:" xmlns:C="urn:ietf:params:xml:ns:carddav"'
        body = f"<{root} {spaces}>{''.join(elements)}</{root}>".encode()
        headers = {"Content-Type": "application/xml; charset=utf-8", "Depth": depth}
        method = "PROPFIND" if root == "D:propfind" else "REPORT"
        reply, answered = self._http.request(method, url, headers, body, accept=(207,))
        with understood(reply.url):
            # The expat that Python brings refuses entities that grow without bound.
            answer = ElementTree.fromstring(answered)  # noqa: S314
            for href in answer.iterfind(".//{*}href"):
                with suppress(ValueError):  # Most of them are not needed.
                    href.text = href.text and urljoin(reply.url, href.text.strip())
            return answer

    def cards(self, answers: Sequence[JSON], found: Sequence[list[Card]]) -> list[Card]:
        for book, token in self._tokens.items():
            try:
                self._refresh(book, token)
            except MailroomError as error:
                if not (error.answered and token):
                    raise
                self._refresh(book, "")  # A 403 may say that the token is too old (RFC 6578).
        return [card for _, card, _ in self._entries.values()]

    def _refresh(self, book: str, token: str | None) -> None:
        """Bring the mirror up to date, by what has changed since the token (RFC 6578 section 3.2),
        or else by a list of everything. The token is kept only once the cards have been read."""
        # What is gone has no ETag, and is no longer found when it is to be read.
        etags = {} if token else {url: "" for url in self._entries if url.startswith(book)}
        is_cut = True
        while is_cut:
            since = SINCE.format(escape(token or ""))
            query = ("1", "D:propfind") if token is None else ("0", "D:sync-collection", since)
            answer = self._ask(book, *query, ETAG)
            token = dav_text(answer, "sync-token") or None
            etags |= {u: dav_text(each, "getetag") for u, each in dav_responses(answer).items()}
            is_cut = any(" 507" in dav_text(each, "status") for each in answer)
        changed = [url for url in etags if etags[url] != self._entries.get(url, ("",))[0]]
        for urls in batched((url for url in changed if not url.endswith("/")), CARDS_AT_ONCE):
            hrefs = [f"<D:href>{escape(urlsplit(url).path)}</D:href>" for url in urls]
            answer = self._ask(book, "0", "C:addressbook-multiget", CARD_PROPERTIES, *hrefs)
            for url in urls:
                self._entries.pop(url, None)
            asked = {unquote(url): url for url in urls}  # A reply may spell them in another way.
            for url, each in dav_responses(answer).items():
                if text := dav_text(each, "address-data"):
                    # All lines end alike in XML (section 2.11), and with CRLF in a vCard.
                    text = re.sub("\r?\n|$", "\r\n", text)
                    facts = [dav_text(each, name) for name in ("getetag", "creationdate")]
                    self._keep(asked.get(unquote(url), url), text, *facts)
        self._tokens[book] = token

    def _keep(self, url: str, text: str, etag: str, created: str) -> None:
        card = vcard_card(url, text, created, url.startswith(self._home))
        self._entries[url] = etag, card, text if card.is_group and card.is_ours else ""

    def apply(self, changes: Mapping[str, CardChange]) -> Reasons:
        """First come the new cards, then the members of groups, and last what is to go."""
        refused = Reasons()
        for rank in range(3):
            step = [each for each in changes.values() if bool(each.card) + each.deletes == rank]
            pool = gevent.pool.Pool(WRITES_AT_ONCE)
            try:
                errors = pool.map(lambda each: outcome(lambda: self._write(each, refused)), step)
            finally:
                pool.kill()
            for error in filter(None, errors):
                raise error
        return refused

    def _write(self, change: CardChange, refused: Reasons) -> None:
        """Carry out a change, or note why it was refused. Raises ServerError."""
        entry = self._entries.get(change.key)
        url = change.key if change.card else urljoin(self._home, f"{change.uid}.vcf")
        late = ServerError(f"{url} has changed meanwhile", answered=True)
        if change.card and not entry:
            raise late
        etag, _, text = entry or ("", None, new_vcard(change))
        if APPLE_KIND.lower() in text:
            # So Cyrus shows one of version 4.0, with members that are none, unless asked for it.
            text = self._http.request("GET", url, {"Accept": "text/vcard; version=4.0"})[1].decode()
        text = edit_members(text, change.add - refused.keys(), change.remove)
        condition = {"If-Match": etag} if entry else {"If-None-Match": "*"}
        headers = {"Content-Type": "text/vcard; charset=utf-8", **condition}
        method, body = ("DELETE", b"") if change.deletes else ("PUT", text.encode())
        reply, said = self._http.request(method, url, headers, body, accept=CARD_ANSWERS)
        status = reply.status_code
        # Radicale deletes with a 200 that has a multistatus; any other may be some proxy's page.
        if status == 412 or (status == 200 and "xml" not in reply.headers.get("Content-Type", "")):
            raise late
        if status not in (200, 201, 204) and (method, status) != ("DELETE", 404):
            refused[change.key] = f"HTTP {status} {error_words(reply.headers, said)}".strip()
            return
        self._entries.pop(url, None)
        # A server that makes something else of a card tells no strong ETag (RFC 6352 section
        # 6.3.2.3): then it is read again.
        if method == "PUT" and reply.headers.get("ETag", "").startswith('"'):
            self._keep(url, text, reply.headers["ETag"], change.card.created if change.card else "")


# Push: the event stream (RFC 8620 section 7.3) ####################################################

PING_SECONDS = 30.0
QUIET_LIMIT = 3 * PING_SECONDS
FIRST_DELAY, MAX_DELAY = 1.0, 60.0
# A stream that has stood for so long has proved healthy, whatever came on it.
PROVEN_SECONDS = 60.0
ANSWER_TIMEOUT = 30.0
MAX_EVENT_BYTES = 2**16
Action = Callable[[], Any]


class QuietError(MailroomError):
    """Nothing has come for long. That is routine: on to the next connection, at once."""


# How loudly to say that a stream has ended, if it is no warning. The first two no new attempt will
# change soon: the credentials are refused, or there is no push, a plain MailroomError.
LEVEL_OF = {CredentialsError: logging.ERROR, MailroomError: logging.INFO, QuietError: logging.DEBUG}


@dataclass
class StreamStatus:
    """What the health page says of the stream; times are ISO 8601. Only the stream writes it."""

    status: str = "disconnected"
    connected_since: str | None = None
    last_event_at: str | None = None
    reconnect_count: int = 0
    last_error: str | None = None


def expand_event_source_url(url: str) -> str:
    """Return the URL to listen at: the template (RFC 8620 section 7.3) filled in, or where there is
    none the parameters appended."""
    values = {"types": "Email,Mailbox", "closeafter": "no", "ping": f"{PING_SECONDS:.0f}"}
    if "{" not in url:
        url += ("&" if "?" in url else "?") + "types={types}&closeafter={closeafter}&ping={ping}"
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], ""), url)


def backoff(attempt: int, first: float = 0.0) -> float:
    """Return the seconds to wait after failed attempt 0, 1, 2 ...: from `first`, which is never
    less than FIRST_DELAY, doubling to MAX_DELAY."""
    return min(max(first, FIRST_DELAY) * 2.0 ** min(attempt, 16), MAX_DELAY)


def event_blocks(response: requests.Response) -> Iterator[bytes]:
    """Yield the stream's events one by one, as sseclient can digest them: whole, of bounded size,
    in good UTF-8, each with data so that none is dropped, and none that is cut off (HTML Living
    Standard, section 9.2.6). Raises ServerError at its end, QuietError after QUIET_LIMIT."""
    rest = b""
    while len(rest) <= MAX_EVENT_BYTES:
        quiet = QuietError(f"nothing came for {QUIET_LIMIT:g} s")
        with gevent.Timeout(QUIET_LIMIT, quiet), unbroken(response.url):
            # `read1` does not wait for a buffer to fill.
            chunk = response.raw.read1(2**13, decode_content=True)
        if not chunk:
            raise ServerError("the server closed it")
        *blocks, rest = re.split(rb"\r\n\r\n|\n\n|\r\r", rest + chunk)
        for block in blocks:
            yield block.decode("utf-8-sig", "replace").encode() + b"\ndata:\n\n"
        gevent.sleep(0)  # A flood keeps nobody else from working.
    raise ServerError(f"an event has more than {MAX_EVENT_BYTES} bytes")


@contextmanager
def open_stream(http: HTTPClient, where: Action) -> Iterator[Iterator[Any]]:
    """Connect to the event source; its events, which end with an error. Raises ServerError and
    ConfigurationError, MailroomError where there is no push."""
    url, timeout = where(), (CONNECT_TIMEOUT, None)
    if not url:
        raise MailroomError("the server has no push: polling")
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
    with gevent.Timeout(ANSWER_TIMEOUT, ServerError(f"timed out after {ANSWER_TIMEOUT:g} s")):
        url = expand_event_source_url(url)
        response = http.open("GET", url, (200, 204), headers=headers, timeout=timeout)
    with response:
        media_type = response.headers.get("Content-Type", "")
        if response.status_code == 204:
            raise MailroomError("the server has no push (HTTP 204): polling")
        if not media_type.lower().startswith("text/event-stream"):
            raise ServerError(f'the reply is "{media_type}", not an event stream')
        yield SSEClient(event_blocks(response)).events()


def follow(
    connect: Action, on_open: Action, queue: Any, stop: Any, log: Any, status: StreamStatus
) -> None:
    """Open the stream again and again, until `stop` is set; see `sse_listener`."""
    # The connection is news at first, and after each failure that is.
    retry, opened, attempt, is_news, logged = 0.0, 0.0, 0, True, set[str]()
    while not stop.is_set():
        try:
            with connect() as events:
                status.reconnect_count += bool(opened)
                status.status, status.connected_since = "connected", now_iso()
                opened = time.monotonic()
                log.log(logging.INFO if is_news else logging.DEBUG, "event stream: connected")
                is_news = False
                on_open()
                for event in events:
                    if re.fullmatch("[0-9]+", event.retry or ""):
                        retry = float(event.retry) / 1000
                    if event.event in ("state", "ping"):
                        status.last_event_at = now_iso()
                    if event.event == "state":
                        queue.put("state_changed")
        except MailroomError as error:
            text = str(error)
            level = logging.DEBUG if text in logged else LEVEL_OF.get(type(error), logging.WARNING)
            logged.add(text)
            if status.connected_since and time.monotonic() - opened >= PROVEN_SECONDS:
                # It has earned the first delay again, and its end is routine.
                attempt, logged, level = 0, set(), logging.DEBUG
            log.log(level, f"event stream: {text}")
            is_news |= level > logging.DEBUG
            status.status, status.connected_since = "disconnected", None
            if not isinstance(error, QuietError):
                status.last_error = text
                least = MAX_DELAY if type(error) in LEVEL_OF else error.retry_after
                stop.wait(max(least, backoff(attempt, retry)))
                attempt += 1


def sse_listener(
    token: str,
    event_source_url: str,
    event_queue: Any,
    shutdown_event: Any,
    log: Any = None,
    *,
    username: str = "",
    current_url: Action | None = None,
    status: StreamStatus | None = None,
    on_open: Action = lambda: None,
) -> None:
    """Listen to the event source until `shutdown_event` is set, and put "state_changed" on
    `event_queue` for each `state` event. `current_url` tells where the event source is by now, None
    if nowhere; `on_open` is called for each connection made."""
    http = HTTPClient(credentials(token, username), "MAILROOM_JMAP_URL", JMAP_REMEDY)
    connect = partial(open_stream, http, current_url or (lambda: event_source_url))
    rest = event_queue, shutdown_event, log or LOG, status or StreamStatus()
    run_until(shutdown_event, partial(follow, connect, on_open, *rest))


# The account: reading it ##########################################################################

# So long somebody at a terminal waits for the first answer before being told of whom.
SLOW_SECONDS = 2.0
MAILBOXES = Query("Mailbox", None, ("id", "name", "parentId", "role", "totalEmails"), dict)
Addresses = Collection[str] | None


def new_clients(settings: MailroomSettings) -> tuple[JMAPClient, ContactStore]:
    """Return the clients: contacts over CardDAV where a user for it is set, else over JMAP."""
    client = JMAPClient(settings.jmap_token, settings.jmap_url, username=settings.jmap_username)
    if not settings.carddav_username:
        return client, JMAPContacts(client)
    auth = credentials(settings.carddav_password, settings.carddav_username)
    return client, CardDAVContacts(settings.carddav_url, auth)


def parse_mailboxes(found: Iterable[JSON]) -> list[Mailbox]:
    """Return the mailboxes of a Mailbox/get, those at the top first. The Inbox goes by its role.
    Raises ServerError."""
    mailboxes, names = [], dict[str, str]()
    with understood("Mailbox/get"):
        raws = {as_text(raw["id"]): raw for raw in found}
        for id_, raw in raws.items():
            names[id_] = plain_name(as_text(raw["name"])) if raw.get("role") != "inbox" else "Inbox"
        for id_, raw in raws.items():
            line = [id_]
            # A circle of parents is cut open.
            while (above := raws[line[0]].get("parentId")) in raws and above not in line:
                line.insert(0, above)
            path, role = "/".join(names[each] for each in line), raw.get("role") or ""
            mailboxes.append(Mailbox(id_, names[id_], path, role, raw.get("totalEmails") or 0))
    return sorted(mailboxes, key=lambda each: (each.path != each.name, each.path, each.id))


def read_account(
    settings: MailroomSettings, client: JMAPClient, contacts: ContactStore, who: Addresses = ()
) -> Account:
    """Return the account with its groups and the contacts of some addresses, all contacts for None.
    Raises ConfigurationError, ServerError."""
    said = f"connecting to {urlsplit(client.session_url).hostname}"
    hint = gevent.spawn_later(SLOW_SECONDS, print, said, file=sys.stderr)
    if not sys.stderr.isatty():
        hint.kill()
    try:
        client.connect()
    finally:
        hint.kill()
    contacts.prepare()
    calls, queries = contacts.questions(who)
    answers, [mailboxes, *found] = client.fetch([MAILBOXES, *queries], calls)
    return Account(settings, parse_mailboxes(mailboxes), contacts.cards(answers, found))


# The triage cycle #################################################################################

AUTHENTICATION = "header:Authentication-Results:asText:all"
EMAIL_PROPERTIES = ("id", "mailboxIds", "from", "receivedAt", AUTHENTICATION)
SENDERS_AT_ONCE = 50
EMAILS_AT_ONCE = 5000
# Of the Screener, and of what has arrived in the Inbox; and how many are remembered.
NEWEST, MAX_SEEN = 100, 1000
# Cyrus leaves messages out of a larger filter, without an error; senders times mailboxes count.
MAX_FILTER_TERMS = 250
# So often it is looked for messages that came while others were filed.
MAX_LOOKS = 10
CYCLE_DEADLINE = 300.0
# The conditions for a sender: one that an index answers, which may lag, and one that needs none;
# both find others' messages too. At last all that is there is listed.
Condition = Callable[[str], JSON] | None
CONDITIONS: tuple[Condition, ...] = (lambda a: {"from": a}, lambda a: {"header": ["From", a]}, None)


def parse_email(raw: JSON, senders: Collection[str] = ()) -> Email | None:
    """Return an Email from an Email object (RFC 8621 section 4.1), if it is from one of the
    senders, or if there are none. The sender is the first From that is an address; a name has
    nothing in it that could end a line."""
    authors = [each for each in raw.get("from") or [] if each and each.get("email")]
    keys = [(address_key(each["email"]), each) for each in authors]
    sender, author = next((each for each in keys if each[0]), ("", {"email": ""}))
    if senders and sender not in senders:
        return None
    # The receiving server's own comes first; what is below may be the sender's.
    results = str((raw.get(AUTHENTICATION) or [""])[0])
    is_forged = bool(re.search(r"(?i)\bdmarc\s*=\s*fail\b", results))
    name, address = one_line(author.get("name") or "")[:MAX_NAME], author["email"].strip(BLANKS)
    boxes = frozenset(box for box, there in raw["mailboxIds"].items() if there)
    received = as_text(raw.get("receivedAt") or "")
    return Email(as_text(raw["id"]), sender, address, name, boxes, received, is_forged)


def emails_where(filter_: JSON, most: int = sys.maxsize, senders: Collection[str] = ()) -> Query:
    """Return the query for messages, the newest first, of these senders only, if any are given."""
    return Query("Email", filter_, EMAIL_PROPERTIES, lambda raw: parse_email(raw, senders), most)


def searches(account: Account, places: Mapping[str, frozenset[str]], by: Condition) -> list[Query]:
    """Return the queries for messages, given {sender: ids of mailboxes}: for the newest of the
    Screener, which may not be in the index yet, and for all that a condition finds; without one all
    that lies there is listed."""
    queries = [emails_where(in_any([account.screener]), NEWEST, places)] if places else []
    for boxes in set(places.values()):
        who = [sender for sender in places if places[sender] == boxes]
        inside = in_any(boxes)
        forms = [by(form) for each in who for form in spellings(each)] if by else []
        parts = batched(forms, max(1, MAX_FILTER_TERMS // len(boxes)))
        both = [{"operator": "AND", "conditions": [inside, any_of(part)]} for part in parts]
        queries += [emails_where(each, senders=who) for each in both or [inside]]
    return queries


def set_emails(
    client: JMAPClient, patches: Mapping[str, Patch], looks: Sequence[Query] = ()
) -> tuple[Reasons, list[Email]]:
    """Make an Email/set (RFC 8621 section 4.6), in parts if the limits force it. Returns {id: why
    it was refused}, and what is found once all is written. Raises ServerError."""
    changes = [(id_, patch) for id_, patch in patches.items() if patch]
    parts = list(batched(changes, min(client.limits["maxObjectsInSet"], MAX_PAGE)))
    refused, found = Reasons(), list[list[Email]]()
    for part in parts:
        write: Call = ("Email/set", {"update": dict(part)})
        [done], found = client.fetch(looks if part is parts[-1] else [], [write])
        refused |= set_errors(done)
    return refused, [email for part in found for email in part]


@dataclass
class Triage:
    """The triage cycle: reads, plans, carries out. It keeps nothing for the next one but what the
    account is like, so that an idle cycle is a single request. With `say`, called with each plan in
    words, nothing is written. `has_more`: something is left, the next cycle is to come at once."""

    settings: MailroomSettings
    client: JMAPClient
    contacts: ContactStore
    samples: Counter[str]
    say: Callable[[str], object] | None = None
    has_more: bool = False
    _account: Account = field(init=False)
    _own: set[str] = field(default_factory=set)
    _lacking: str = ""
    _start: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
    # {(message, whether in the Screener): whether it is never looked at there again}
    _seen: dict[tuple[str, bool], bool] = field(default_factory=dict)
    # {sender: why its messages are under the error label}
    _errors: Reasons = field(default_factory=dict)

    def run(self) -> Reasons:
        """Run one cycle; {sender: why it failed}. Raises MailroomError if it cannot be finished."""
        half_time = time.monotonic() + CYCLE_DEADLINE / 2
        emails, arrived = self._read()
        self._own |= {each.sender for each in emails if each.mailboxes & self._account.outgoing}
        wanted, self._errors = self._account.resolve_labels(emails, self._own)
        fresh = {arrived[place].sender for place in arrived.keys() - self._seen.keys()}
        fresh = {who for who in fresh if not is_own(who, {"", *self._own, *wanted})}
        # In any order: where a cycle runs out of time it is then not always for the same.
        senders = random.sample(sorted(wanted), len(wanted))
        messages = [email for email in emails if email.sender in wanted]
        messages += [email for email in arrived.values() if email.sender in fresh]
        failed, is_late, attempt = Reasons(), False, partial(self._triage, wanted, messages)
        for batch in batched(senders, SENDERS_AT_ONCE):
            if is_late := time.monotonic() > half_time:
                break
            failed |= self._isolated(attempt, batch, alone=False)
        going = wanted.keys() - self._errors.keys()
        self._mark(emails, going)
        is_cut = is_late or len(emails) >= EMAILS_AT_ONCE
        self.has_more = is_cut and bool(going - failed.keys()) and not self.say
        # Last, so that no arrival holds up a tap.
        failed |= self._isolated(attempt, list(fresh), alone=False) if fresh else {}
        looked = [place for place in arrived if arrived[place].sender in fresh - failed.keys()]
        self._seen |= {place: not place[1] for place in looked if place not in self._seen}
        return failed

    def _connect(self) -> None:
        """Look at the account. Raises ConfigurationError with all that it lacks, ServerError."""
        self._take(read_account(self.settings, self.client, self.contacts))
        logins = (self.settings.jmap_username, self.settings.carddav_username)
        self._own |= self.client.own_addresses() | set(map(address_key, logins)) - {""}

    def _take(self, account: Account) -> None:
        """Go by the account as it is now. Raises ConfigurationError where nothing can work."""
        account.check()
        if (lacking := account.lacks(account.missing)) != self._lacking:
            there = f"no {lacking}: see `setup`" if lacking else "all that it needs"
            LOG.warning(f"the account has {there}")
            self._forget()
        self._lacking, self._account = lacking, account

    def _forget(self) -> None:
        """Look again at what waits in the Screener."""
        self._seen = {key: True for key, is_final in self._seen.items() if is_final}

    def _read(self) -> tuple[list[Email], dict[tuple[str, bool], Email]]:
        """Return the messages under a triage label or the error label, and those without one that
        have arrived: each is looked at once, one that waits in the Screener again when the contacts
        have changed. The mailboxes come along, and when the labels turn out to be others than
        before the messages are read again."""
        if self.client.stale:
            self._connect()
        account = self._account
        queries = [MAILBOXES, emails_where(in_any(account.queue), EMAILS_AT_ONCE)]
        queries.append(emails_where(in_any([account.screener]), NEWEST))
        recent = {"inMailbox": account.inbox, "after": self._start, "notKeyword": "$flagged"}
        queries += [emails_where(recent, NEWEST)] if self.settings.screen_inbox else []
        calls, _ = self.contacts.questions(())
        answers, [mailboxes, emails, *found] = self.client.fetch(queries, calls)
        self._take(Account(self.settings, parse_mailboxes(mailboxes), account.cards))
        if (self._account.queue, self._account.screener) != (account.queue, account.screener):
            return self._read()
        totals = {each.id: each.total for each in self._account.mailboxes}
        self.samples["screener_messages"] = totals.get(account.screener, 0)
        self.samples["error_messages"] = totals.get(account.error, 0)
        if self.contacts.has_changed(answers):
            self._forget()
        arrived = {}
        for email in [email for part in found for email in part]:
            place = email.id, account.screener in email.mailboxes
            is_waiting = place[1] and not email.mailboxes & account.marks
            if (is_waiting or email.mailboxes == {account.inbox}) and not self._seen.get(place):
                arrived[place] = email
        return emails, arrived

    def _isolated(self, attempt: partial[Reasons], senders: list[str], alone: bool) -> Reasons:
        """Do something for some senders; {sender: why it failed}. When that fails and the server is
        well, it is done again one sender at a time, so that the one at fault holds up no one else.
        Raises the error of a server that is in trouble or wants to be left alone."""
        try:
            return attempt(senders)
        except ServerError as error:
            if error.retry_after:
                raise
            if alone:
                return {senders[0]: str(error)}
            if not error.answered:
                self._connect()  # It raises when it is the server that is at fault.
        parts = [self._isolated(attempt, [sender], alone=True) for sender in senders]
        return {sender: why for part in parts for sender, why in part.items()}

    def _triage(self, wanted: dict[str, str], messages: list[Email], senders: list[str]) -> Reasons:
        """Triage some senders, or file what has arrived from them; {sender: why it failed}. A
        search is trusted when it finds the labelled messages that are known; if not, the next one
        is tried, and at last the mailboxes are listed."""
        self._seen = dict(list(self._seen.items())[-MAX_SEEN:])
        account = self._account
        # A label may have gone while the server was out of reach.
        senders = [who for who in senders if wanted.get(who, "") in {"", *account.labels}]
        boxes = account.managed.union(account.labels, account.outgoing)
        places = {who: boxes for who in senders if who in wanted}
        emails = {email.id: email for email in messages if email.sender in senders}
        tapped = {id_ for id_ in emails if emails[id_].mailboxes & account.labels.keys()}
        calls, questions = self.contacts.questions(senders)
        for condition in CONDITIONS:
            looks = searches(account, places, condition)
            try:
                answers, found = self.client.fetch([*looks, *questions], calls)
            except MethodError as error:
                if condition and error.method.startswith("Email/") and not error.retry_after:
                    continue  # The server cannot search like that.
                raise
            missed = tapped - {email.id for part in found[1 : len(looks)] for email in part}
            if not missed:
                break
        cards = self.contacts.cards(answers, found[len(looks) :])
        self._take(Account(self.settings, account.mailboxes, cards))
        # Where all that is there was seen, a label that was not found has come off.
        emails = {id_: emails[id_] for id_ in emails if id_ not in missed}
        emails |= {email.id: email for part in found[: len(looks)] for email in part}
        plans = []
        for who in senders:
            label = wanted.get(who, "")
            own = [email for email in emails.values() if email.sender == who]
            categories = [account.labels[label]] if label else self._account.known_as(who, own)
            if len(categories) > 1:
                names = ", ".join(each.name for each in categories)
                LOG.info("left alone: in several groups", extra=fields(sender=who, groups=names))
            elif categories:
                if not label and categories[0].undoes:  # In the Screener strangers are right.
                    own = [email for email in own if self._account.inbox in email.mailboxes]
                plans.append(SenderPlan(who, categories[0], self._account, own, label))
        return self._carry_out([plan for plan in plans if plan.tapped or not plan.label], condition)

    def _carry_out(self, plans: Iterable[SenderPlan], condition: Condition) -> Reasons:
        """Complete the plans and carry them out, step by step; {sender: why it failed}. A sender
        for whom a step fails is left out of the next ones. Stopping anywhere leaves a sender in too
        many groups, never in none (unless triage is undone), and the label on."""
        complete = with_conflicts([plan.complete(date.today().isoformat()) for plan in plans])
        failed = {plan.sender: plan.failure for plan in complete if plan.failure}
        self._errors |= {plan.sender: plan.error for plan in complete if plan.error}
        self._own |= {plan.sender for plan in complete if plan.error == IS_THE_USER}
        going = [plan for plan in complete if not (plan.error or plan.failure)]
        if self.say:
            for plan in going:
                facts = plan.summary(sum(map(bool, map(plan.refile, plan.emails))))
                self.say("; ".join(f"{key.replace('_', ' ')}: {facts[key]}" for key in facts))
            return failed
        for step in ("joins", "leaves"):
            changes = [change for plan in going for change in getattr(plan, step).values()]
            refused = self.contacts.apply(merge_changes(changes)) if changes else {}
            for plan in going:
                for key in getattr(plan, step).keys() & refused.keys():
                    failed[plan.sender] = f"contact card {key}: {refused[key]}"
            going = [plan for plan in going if plan.sender not in failed]
        wrong, filed = self._file(going, condition)
        self._note_done(going, filed, wrong)
        return failed | wrong

    def _note_done(self, plans: list[SenderPlan], filed: Counter[str], failed: Reasons) -> None:
        """Count and log what has been done: a line for each tap, and one for all that arrived."""
        counts = Counter[str]()
        for plan in plans:
            event = "triage undone" if plan.category.undoes else "sender triaged"
            by_rule = "screened" if plan.category.undoes else "known_sender"
            how = "tap" if plan.label else by_rule
            counts[how] += 0 if plan.sender in failed else filed[plan.sender]
            if plan.label and plan.sender not in failed:
                self.samples[f"senders_{event.split()[1]}_total"] += 1
                level = logging.WARNING if plan.warning else logging.INFO
                LOG.log(level, event, extra=fields(**plan.summary(filed[plan.sender])))
        self.samples.update({FILED.format(how): count for how, count in counts.items()})
        del counts["tap"]
        if counts.total():
            LOG.info("new messages filed", extra=fields(**counts))

    def _file(self, plans: list[SenderPlan], condition: Condition) -> tuple[Reasons, Counter[str]]:
        """File the messages of senders as their plans have it, and when nothing is left to file
        take the labels off. Each request that writes looks for further messages: for what came
        meanwhile, and for what an incomplete search had left out. Returns {sender: why it failed}
        and {sender: how many were filed}. Raises ServerError."""
        emails = {email.id: email for plan in plans for email in plan.emails}
        failed, filed = Reasons(), Counter[str]()
        for _ in range(MAX_LOOKS):
            going = {plan.sender: plan for plan in plans if plan.sender not in failed}
            left = [email for email in emails.values() if email.sender in going]
            patches = {email.id: going[email.sender].refile(email) for email in left}
            filed.update(emails[id_].sender for id_ in patches if patches[id_])
            if not any(patches.values()):
                patches = {email.id: going[email.sender].finish(email) for email in left}
            if not any(patches.values()):
                return failed, filed
            boxes = self._account.managed
            places = {who: boxes - p.destinations for who, p in going.items() if p.label}
            looks = searches(self._account, places, condition)
            refused, found = set_emails(self.client, patches, looks)
            for id_ in [id_ for id_ in patches if patches[id_] and id_ not in refused]:
                is_home = not going[emails[id_].sender].category.undoes
                self._seen |= {(id_, True): is_home, (id_, False): True}
            emails |= {id_: emails[id_].patched(patch) for id_, patch in patches.items()}
            emails |= {email.id: email for email in found}
            failed |= {emails[id_].sender: f"message {id_}: {why}" for id_, why in refused.items()}
        back = [emails[id_].sender for id_ in patches if patches[id_]]
        return failed | dict.fromkeys(back, "its messages keep coming back"), filed

    def _mark(self, emails: Iterable[Email], going: Collection[str]) -> None:
        """Put the error label on tapped messages with an error and take it off others, but for the
        senders that a tap is carried out for; and take the labels off what the user sent."""
        account, patches, marked = self._account, dict[str, Patch](), Reasons()
        for email in emails:
            if email.mailboxes & account.outgoing:
                patches[email.id] = email.patch([], account.queue)
            elif email.sender in self._errors and email.mailboxes & account.labels.keys():
                if patch := email.patch([account.error], []):
                    patches[email.id], marked[email.id] = patch, self._errors[email.sender]
            elif email.sender not in going:
                patches[email.id] = email.patch([], [account.error])
        if self.say:
            for id_, why in marked.items():
                self.say(f"message {id_}: error label; {why}")
            return
        refused, _ = set_emails(self.client, patches)
        for id_ in marked.keys() - refused.keys():
            LOG.warning("message marked as an error", extra=fields(message=id_, reason=marked[id_]))


# Health and metrics ###############################################################################

SAY_AGAIN_SECONDS = 3600.0
CYCLES = 'cycles_total{{trigger="{}",result="{}"}}'
FILED = 'messages_filed_total{{by="{}"}}'
TRIGGERS = ("startup", "push", "scheduled", "fallback")
RESULTS = ("success", "sender_failures", "failure")
METRICS = {
    "build_info": "The version that is running.",
    "consecutive_failures": "Cycles that failed since the last one that did not.",
    "cycles_total": "Cycles, by what triggered them and how they ended.",
    "error_messages": "Messages under the error label.",
    "eventsource_connected": "Whether the event stream is connected.",
    "last_success_timestamp_seconds": "When the last cycle succeeded, in Unix time; 0 before.",
    "messages_filed_total": "Messages that were filed, by a tap or by themselves.",
    "screener_messages": "Messages in the Screener.",
    "sender_failures_total": "Senders that could not be triaged, counted in each cycle.",
    "senders_triaged_total": "Senders that were triaged.",
    "senders_undone_total": "Senders whose triage was undone.",
}


class Health:
    """What the service can say of itself. `samples`: of the metrics, by names without prefix;
    `is_down`: the last cycle failed as a whole; `is_refused`: the credentials were refused, and no
    cycle has succeeded since; `last_success`: the start, until one has, and `last_trigger` is empty
    until then."""

    def __init__(self, settings: MailroomSettings) -> None:
        self.stream = StreamStatus()
        self.is_down = self.is_refused = False
        self.consecutive_failures, self.last_success = 0, time.monotonic()
        self.last_error, self.last_trigger = "", ""
        # All that can come is there from the start.
        names = [CYCLES.format(trigger, result) for trigger in TRIGGERS for result in RESULTS]
        names += map(FILED.format, ("tap", "known_sender", "screened"))
        self.samples = Counter({f'build_info{{version="{VERSION}"}}': 1, **dict.fromkeys(names, 0)})
        self._settings = settings
        self._silent_until: dict[tuple[str, str], float] = {}

    def note(self, trigger: str, failures: Mapping[str, str]) -> None:
        """Note how a cycle has ended, and log what failed: once, and once an hour while it lasts,
        and when it is over. The same cause with another count in it is no news. `failures`:
        {sender: cause}, the sender empty where the whole cycle failed."""
        now, self.is_down = time.monotonic(), "" in failures
        result = "failure" if self.is_down else "sender_failures" if failures else "success"
        self.samples[CYCLES.format(trigger, result)] += 1
        self.samples["sender_failures_total"] += len(failures.keys() - {""})
        self.last_error = self._settings.redact("; ".join(failures.values()), MAX_SHOWN)
        if not self.is_down:
            self.last_success, self.last_trigger, self.is_refused = now, trigger, False
            self.samples["last_success_timestamp_seconds"] = int(time.time())
        for sender, cause in failures.items():
            key = (sender, re.sub(r"https?://\S+|[0-9]+", "0", cause))
            if now >= self._silent_until.get(key, 0.0):
                self._silent_until[key] = now + SAY_AGAIN_SECONDS
                event = "sender not triaged, the label stays" if sender else "cycle failed"
                LOG.error(event, extra=fields(**{"sender": sender} if sender else {}, cause=cause))
        if self.consecutive_failures and not failures:
            LOG.info("recovered", extra=fields(failed_cycles=self.consecutive_failures))
            self._silent_until.clear()
        self.consecutive_failures = self.consecutive_failures + 1 if failures else 0
        LOG.debug("cycle done", extra=fields(trigger=trigger, failures=len(failures)))

    def page(self) -> tuple[str, str, str]:
        """Return (status line, media type, body) for /healthz."""
        age = time.monotonic() - self.last_success
        is_well = age < 2 * self._settings.poll_interval + CYCLE_DEADLINE and not self.is_refused
        body = {
            "status": "ok" if is_well else "failing",
            "last_poll_age_seconds": round(age, 3) if self.last_trigger else None,
            "last_poll_trigger": self.last_trigger or None,
            "last_error": self.last_error or None,
            "consecutive_failures": self.consecutive_failures,
            "eventsource": asdict(self.stream),
        }
        status = "200 OK" if is_well else "503 Service Unavailable"
        return status, "application/json", self._settings.redact(json.dumps(body))

    def metrics(self) -> tuple[str, str, str]:
        """Return (status line, media type, body) for /metrics, in the Prometheus text format."""
        self.samples["consecutive_failures"] = self.consecutive_failures
        self.samples["eventsource_connected"] = int(self.stream.status == "connected")
        lines = []
        for name, meaning in METRICS.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP mailroom_{name} {meaning}", f"# TYPE mailroom_{name} {kind}"]
            of_name = [each for each in self.samples if each.partition("{")[0] == name] or [name]
            lines += [f"mailroom_{each} {self.samples[each]}" for each in of_name]
        return "200 OK", "text/plain; version=0.0.4; charset=utf-8", "\n".join([*lines, ""])

    def __call__(self, environ: JSON, start_response: Callable[..., Any]) -> list[bytes]:
        """The WSGI application (PEP 3333)."""
        method, pages = environ["REQUEST_METHOD"], {"/healthz": self.page, "/metrics": self.metrics}
        page = pages.get(environ["PATH_INFO"]) if method in ("GET", "HEAD") else None
        status, kind, body = page() if page else ("404 Not Found", "text/plain", "not found\n")
        octets = body.encode()
        headers = {"Content-Type": kind, "Content-Length": str(len(octets)), "Connection": "close"}
        start_response(status, [*headers.items()])
        return [] if method == "HEAD" else [octets]


class HealthHandler(gevent.pywsgi.WSGIHandler):
    def _handle_client_error(self, error: Exception) -> Any:
        """Refuse a request. gevent prints a traceback of too many headers, as of no ValueError."""
        return super()._handle_client_error(ValueError(str(error)))  # type: ignore[misc]


# The service ######################################################################################


def drain_queue(queue: Any) -> int:
    """Empty a queue without waiting; how many items were dropped."""
    dropped = 0
    while not queue.empty():
        queue.get_nowait()
        dropped += 1
    return dropped


class Service:
    """The long-lived greenlets: one that runs the cycles, one that listens, one for health. When
    one of them ends, so does the program. With `once` there is but one cycle, and nothing else;
    with `say`, called with each plan in words, no cycle writes."""

    def __init__(self, settings: MailroomSettings, *, once: bool = False, say: Any = None) -> None:
        self.health, self._settings, self._once = Health(settings), settings, once
        self.shutdown, self._is_ready = gevent.event.Event(), gevent.event.Event()
        self._queue: gevent.queue.Queue[str] = gevent.queue.Queue()
        self._triage = Triage(settings, *new_clients(settings), self.health.samples, say)

    def run(self) -> int:
        """Serve until a signal or a fault, or the one cycle is done; the exit status. Raises what
        has ended a greenlet. A cycle that is cut off is the same as one that crashed: the next one
        sees the rest."""
        health = [self._serve_health] if self._settings.health_port else []
        tasks = [self._cycles] if self._once else [*health, self._cycles, self._listen]
        run_until(self.shutdown, *tasks)
        if self.shutdown.is_set():
            LOG.info("stopped")
            return 0
        if not self._once:
            raise RuntimeError("a greenlet has ended")
        return 3 if self.health.consecutive_failures else 0

    def _serve_health(self) -> None:
        host, port = self._settings.health_host, self._settings.health_port
        quiet: JSON = {"log": None, "error_log": None, "handler_class": HealthHandler}
        quiet["spawn"] = 20  # so many clients at a time
        try:
            gevent.pywsgi.WSGIServer((host, port), self.health, **quiet).serve_forever(0)
        except (OSError, ValueError) as error:
            where = f"MAILROOM_HEALTH_HOST={host!r}, MAILROOM_HEALTH_PORT={port} (0: none)"
            raise ConfigurationError(f"{where}: {network_reason(error)}; give others") from None

    def _listen(self) -> None:
        """Listen to the event stream. Once a cycle has succeeded it is known where there is one."""
        self._is_ready.wait()
        more: JSON = {"username": self._settings.jmap_username, "status": self.health.stream}
        more["current_url"] = lambda: self._triage.client.event_source_url
        more["on_open"] = lambda: self._queue.put("connected")
        sse_listener(self._settings.jmap_token, "", self._queue, self.shutdown, LOG, **more)

    def _cycles(self) -> None:
        trigger = "startup"
        while not (delay := self._cycle(trigger)) or not self._once:
            trigger = self._wait(delay)

    def _cycle(self, trigger: str) -> float:
        """Run one cycle; the seconds until the next one is due at the latest. Until one has
        succeeded it raises an error that lasts."""
        health, interval = self.health, self._settings.poll_interval
        soon = min(interval, backoff(health.consecutive_failures))
        late = MailroomError(f"the cycle timed out after {CYCLE_DEADLINE:g} s")
        drain_queue(self._queue)
        try:
            with gevent.Timeout(CYCLE_DEADLINE, late):
                failures = self._triage.run()
        except MailroomError as error:
            if error.is_lasting and not self._is_ready.is_set():
                raise ConfigurationError(*error.problems) from None
            self._triage.client.stale = True  # Nothing of the account is taken for granted.
            health.is_refused |= isinstance(error, CredentialsError)
            health.note(trigger, {"": str(error)})
            return max(interval if health.is_refused else soon, error.retry_after)
        self._is_ready.set()
        health.note(trigger, failures)
        return 0.0 if self._triage.has_more else soon if failures else interval

    def _wait(self, delay: float) -> str:
        """Wait until a cycle is due; what triggers it. The first signal opens a window, and all
        that arrives in it is one cycle. It does not slide, so that no steady stream of events can
        put the cycle off, and ends when the timer does."""
        trigger = ""
        with suppress(gevent.Timeout), gevent.Timeout(delay):
            if self.health.is_down:  # It is not asked at the pace of the events.
                self.shutdown.wait()
            self._queue.get()
            trigger = "push"
            gevent.sleep(self._settings.debounce_seconds)
        return trigger or ("scheduled" if self.health.stream.connected_since else "fallback")


# Setup: what the account has and lacks, making that, and the rules for messages to come ###########


def print_lines(settings: MailroomSettings, *texts: str) -> None:
    """Print lines for a person, without secrets and without commands to the terminal."""
    for text in texts:
        print(one_line(settings.redact(text)), flush=True)


def needs_in_lines(account: Account) -> Iterator[str]:
    """Yield a line for each thing that the account needs, what is missing first."""
    if not account.inbox:
        yield "missing  a mailbox with the role of the Inbox"
    for (kind, name), near in account.missing.items():
        yield f'missing  {kind} "{name}"' + (f': there is "{near}", rename it' if near else "")
    for need in [need for need in needs_of(account.settings) if need not in account.missing]:
        yield f'there    {need[0]} "{need[1]}"'
    for box in account.mailboxes:
        if box.id in account.destinations.values() and box.role in ("trash", "junk", "archive"):
            yield f"note: undo and reset take triaged messages out of the {box.role}"


def make(need: Need, client: JMAPClient, contacts: ContactStore, account: Account) -> str:
    """Make a thing that the account lacks; why it was refused, if it was. Raises MailroomError."""
    kind, path = need
    ids = {each.path: each.id for each in account.mailboxes}
    above, _, name = path.rpartition("/")
    if kind == "contact group":
        uid = own_uid(f"group:{path}", account.cards)
        new = CardChange(uid=uid, kind="group", name=path)
        refused = contacts.apply({new.key: new})
    elif above and above not in ids:
        refused = {"": f'there is no mailbox "{above}"'}
    else:
        box = {"name": name, "parentId": ids.get(above), "isSubscribed": True}
        refused = set_errors(client.call("Mailbox/set", {"create": {"new": box}}))
    return "".join(refused.values())


def fastmail_rules(account: Account) -> list[JSON]:
    """Return the rules for Fastmail's import: one for each category, a second one for a category
    some of whose senders stay in the Inbox, and last that for strangers. All rules that fit a
    message apply, and any of them takes it out of the Inbox, so that it goes where triage puts one
    from the Screener. Where categories share a group nobody can tell their senders apart: the
    messages go to the mailboxes of all, and stay in the Inbox if they do for one of them."""
    # Of several mailboxes with one name the first is meant.
    paths = {each.name: each.path for each in reversed(account.mailboxes)}
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    # As in Fastmail's export. The rules that follow one apply too.
    same: JSON = {"combinator": "all", "created": now, "updated": now}
    same |= dict.fromkeys(("markFlagged", "showNotification", "discard", "markSpam", "stop"), False)
    same |= dict.fromkeys(("conditions", "redirectTo", "snoozeUntil", "previousFileInName"))

    def rule(name: str, search: str, box: str, skip: bool = True, read: bool = False) -> JSON:
        does = {"search": search, "fileIn": paths.get(box, box) or None, "skipInbox": skip}
        return {"name": f"Mailroom: {name}", **does, "markRead": read, **same}

    def fromin(group: str) -> str:
        return f"fromin:{json.dumps(group, ensure_ascii=False)}"

    rules = []
    lines = [account.family(each) for each in account.categories if each.add_to_inbox]
    for each in account.categories:
        group, box = each.contact_group, each.destination_mailbox
        stay = {line[0].contact_group for line in lines if group in {e.contact_group for e in line}}
        rules.append(rule(group, fromin(group), box, not stay, each.mark_read))
        if stay and group not in stay:
            search = " NOT ".join(map(fromin, [group, *sorted(stay)]))
            rules.append(rule(f"{group}, no Inbox", search, ""))
    return [*rules, rule("strangers", "NOT fromin:contacts", account.settings.screener_mailbox)]


def write_rules(account: Account, file: str) -> int:
    """Write the rules into a new file, or to standard output for `-`; the exit status. Raises
    ConfigurationError."""
    rules = json.dumps(fastmail_rules(account), indent=2)
    if file == "-":
        print(rules, flush=True)
        return 0
    try:
        with open(file, "x", encoding="utf-8") as opened:
            print(rules, file=opened)
    except OSError as error:  # It may be there already, and not be ours.
        raise ConfigurationError(f"--fastmail-rules {file!r}: {error.strerror}") from None
    print_lines(account.settings, f"{file}: import it in Settings - Filters & Rules, once.")
    return 0


def setup(settings: MailroomSettings, options: argparse.Namespace) -> int:
    """The command: show what the account has and lacks, and make it with `--apply`; the exit
    status, 1 while something is missing. Raises MailroomError."""
    client, contacts = new_clients(settings)
    account = read_account(settings, client, contacts)
    if options.fastmail_rules:
        return write_rules(account, options.fastmail_rules)
    pushes = "yes" if client.event_source_url else "no, so it is polled"
    print_lines(settings, f"{client.session_url}; push: {pushes}", *needs_in_lines(account))
    left = len(account.missing) + (not account.inbox)
    verdict = "Nothing has been changed" if left else "There is nothing to do"
    if left and options.apply:
        options.begun = True
        for need in [need for need, near in account.missing.items() if not near]:
            why, thing = make(need, client, contacts, account), f'{need[0]} "{need[1]}"'
            print_lines(settings, f"refused  {thing}: {why}" if why else f"made     {thing}")
            left -= not why
        verdict = "Not all of it could be made" if left else "All is there"
    print_lines(settings, f"{verdict}. Next: python mailroom.py{' setup --apply' if left else ''}")
    return 1 if left else 0


# Reset: Mailroom taken back out of the account ####################################################


def plan_reset(account: Account) -> CardChanges:
    """Return the changes of cards that undo all triage: Mailroom's own groups and contacts go (see
    `Account.deletions`), and the user's groups with such names are emptied."""
    groups = [card for card in account.cards if card.group_name in account.own_names]
    emptied = {c.ref: CardChange(c, remove=frozenset(c.members)) for c in groups if c.members}
    contacts = [card for card in account.cards if not card.is_group]
    return emptied | account.deletions([*groups, *contacts])


def take_out(client: JMAPClient, own: Collection[str], account: Account) -> Reasons:
    """Take all messages out of Mailroom's own mailboxes, and its labels off; {message id: why it
    was refused}. Raises ServerError."""
    refused = Reasons()
    while True:
        _, [emails] = client.fetch([emails_where(in_any(own), EMAILS_AT_ONCE)])
        left = [email for email in emails if email.id not in refused]
        patches = {email.id: account.undo_patch(email, account.marks) for email in left}
        if not any(patches.values()):
            return refused
        refused |= set_emails(client, patches)[0]


def is_confirmed() -> bool:
    """Ask the person at the terminal. Raises ConfigurationError when there is none."""
    if not sys.stdin.isatty():
        raise ConfigurationError("there is no terminal to confirm it at: give --yes")
    print('Type "reset" to go on: ', end="", flush=True)
    return sys.stdin.readline().strip() == "reset"


def reset(settings: MailroomSettings, options: argparse.Namespace) -> int:
    """The command: tell what a reset would do, and do it with `--apply` once that is confirmed; the
    exit status. Raises MailroomError."""
    client, contacts = new_clients(settings)
    account = read_account(settings, client, contacts, None)
    if not account.screener:
        raise ConfigurationError(f'there is no mailbox "{settings.screener_mailbox}": make it')
    own = (account.managed | account.marks) - {account.screener}
    changes, steps = plan_reset(account), dict[str, str]()
    for card in [card for card in account.cards if card.ref in changes]:
        verb = "delete" if changes[card.ref].deletes else "empty"
        steps[card.ref] = f'{verb} the {"group" if card.is_group else "contact"} "{card.name}"'
    full = [each for each in account.mailboxes if each.id in own and each.total]
    lines = [*steps.values(), *(f'empty "{box.path}", messages: {box.total:,}' for box in full)]
    safe = "No message and no mailbox is deleted. Take the account's rules out first."
    again = "Next: python mailroom.py reset --apply"
    idle = f"Nothing has been changed. {again}" if lines else "There is nothing to do."
    print_lines(settings, *lines, *([safe] if lines else []))
    if not (lines and options.apply and (options.yes or is_confirmed())):
        print_lines(settings, idle)
        return 0
    options.begun = True
    refused = {steps[key]: why for key, why in contacts.apply(changes).items()}
    refused |= {f"message {id_}": why for id_, why in take_out(client, own, account).items()}
    verdict = f"Not all could be done. {again}" if refused else "Mailroom is out of the account."
    print_lines(settings, *map("refused  {}: {}".format, refused, refused.values()), verdict)
    return 1 if refused else 0


# The command ######################################################################################

SHUTDOWN_SECONDS = 4


def run(settings: MailroomSettings, options: argparse.Namespace) -> int:
    """The command: serve, or do one cycle; the exit status. Raises ConfigurationError."""
    say = cache(partial(print_lines, settings))  # a dry run prints what is news
    service = Service(settings, once=options.once, say=say if options.dry_run else None)

    def stop(*_: object) -> None:
        """Stop in good order. If that does not help, an alarm ends the process: it may be stuck
        outside the hub, in a log that nobody reads."""
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.alarm(SHUTDOWN_SECONDS)
        service.shutdown.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    status = service.run()
    if options.dry_run and options.once and not (status or say.cache_info().currsize):
        print_lines(settings, "There is nothing to do.")
    return status


COMMANDS = {"run": run, "setup": setup, "reset": reset}


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command and its options."""
    layout: JSON = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    layout["epilog"] = __doc__[__doc__.index("examples:") :]
    parser = argparse.ArgumentParser("mailroom.py", description=__doc__.split("\n")[0], **layout)
    parser.add_argument("--version", action="version", version=f"Mailroom {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    flag: JSON = {"action": "store_true"}
    each = commands.add_parser("run", help="serve; this is what is done without a command")
    each.add_argument("--once", help="look at the account once and end, for cron", **flag)
    each.add_argument("--dry-run", help="say what would be done, and write nothing", **flag)
    each = commands.add_parser("setup", help="show what the account lacks and has")
    either = each.add_mutually_exclusive_group()
    either.add_argument("--apply", help="make what it lacks", **flag)
    rules = "write a rules file for Fastmail (-: print it)"
    either.add_argument("--fastmail-rules", metavar="FILE", help=rules)
    each = commands.add_parser("reset", help="show what taking Mailroom out would do")
    each.add_argument("--apply", help="do it, once you have confirmed it", **flag)
    each.add_argument("--yes", help="do it without asking", **flag)
    is_bare = not arguments or arguments[0].startswith(("--o", "--d"))
    return parser.parse_args(["run", *arguments] if is_bare else arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status, or SystemExit where that is argparse's."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started this has closed it
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  (open to the end)
    # Not every terminal knows every letter.
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")
    redact: Callable[[str, int], str] = truncate  # until the secrets are known
    try:
        try:
            options = parse_options(sys.argv[1:] if arguments is None else arguments)
            if options.command != "run":  # The service stops in good order.
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, lambda *_: os._exit(130))
            settings = MailroomSettings()
            redact = settings.redact
            LOG.handlers[:] = [logging.StreamHandler()]
            LOG.handlers[0].setFormatter(LogFormatter(settings))
            LOG.setLevel(settings.log_level.upper())
            for warning in settings.warnings:
                LOG.warning(warning)
            return COMMANDS[options.command](settings, options)
        finally:
            sys.stdout.flush()
    except MailroomError as error:
        again = ". Run it again: it does what is left" if "begun" in options else ""
        for problem in error.problems:
            line = problem if error.is_lasting else problem + again
            print(f"mailroom: {one_line(redact(line, MAX_SHOWN))}", file=sys.stderr)
        return 2 if error.is_lasting else 1
    except OSError as error:  # of standard output
        # Or Python would complain when it closes that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"mailroom: the system says: {error}", file=sys.stderr)
    except Exception:
        LOG.critical("a fault in the program", exc_info=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
