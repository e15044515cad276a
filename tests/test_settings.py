"""The settings: defaults, environment, keywords, secrets in files, and what is said of bad ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import mailroom
from mailroom import ConfigurationError, MailroomSettings

TOKEN, PASSWORD = "fmu1-hush-token", "hush-password"
SECRETS = {"jmap_token": TOKEN, "carddav_password": PASSWORD}
HUSH = "hush"
"""In every secret, good or bad, and so never to be seen."""

DEFAULTS: dict[str, Any] = {
    "jmap_token": TOKEN,
    "jmap_url": "https://api.fastmail.com/jmap/session",
    "jmap_username": "",
    "carddav_username": "",
    "carddav_password": "",
    "carddav_url": "https://carddav.fastmail.com",
    "poll_interval": 60,
    "debounce_seconds": 3,
    "log_level": "info",
    "log_format": "json",
    "screener_mailbox": "Screener",
    "label_mailroom_error": "@MailroomError",
    "label_mailroom_warning": "@MailroomWarning",
    "label_undo": "@ToScreener",
    "warnings_enabled": True,
    "provenance_group": "Mailroom",
    "triage_categories": [
        ("Imbox", "@ToImbox", "Imbox", "Imbox", "", "company", True),
        ("Feed", "@ToFeed", "Feed", "Feed", "", "company", False),
        ("Paper Trail", "@ToPaperTrail", "Paper Trail", "Paper Trail", "", "company", False),
        ("Jail", "@ToJail", "Jail", "Jail", "", "company", False),
        ("Person", "@ToPerson", "Person", "Person", "Imbox", "person", False),
        ("Billboard", "@ToBillboard", "Billboard", "Billboard", "Paper Trail", "company", False),
        ("Truck", "@ToTruck", "Truck", "Truck", "Paper Trail", "company", False),
    ],
    "health_host": "127.0.0.1",
    "health_port": 8080,
}
FIELDS = [
    "name",
    "label",
    "contact_group",
    "destination_mailbox",
    "parent",
    "contact_type",
    "add_to_inbox",
]


def variable(name: str) -> str:
    return f"MAILROOM_{name.upper()}"


def values(settings: MailroomSettings) -> dict[str, Any]:
    """All settings as plain values."""
    plain = {name: value for name, value in vars(settings).items() if not name.startswith("_")}
    return plain | {"triage_categories": category_rows(settings)}


def category_rows(settings: MailroomSettings) -> list[tuple[Any, ...]]:
    rows = [asdict(category) for category in settings.triage_categories]
    return [tuple(row[field] for field in FIELDS) for row in rows]


def categories(*entries: Any, **settings: Any) -> list[tuple[Any, ...]]:
    """What these entries are read as."""
    return category_rows(
        MailroomSettings(jmap_token=TOKEN, triage_categories=list(entries), **settings)
    )


def problems(**settings: Any) -> list[str]:
    """What is said of these settings: each is one line, and no secret is anywhere in the error."""
    with pytest.raises(ConfigurationError) as caught:
        MailroomSettings(**settings)
    told = "".join(traceback.format_exception(caught.value))
    assert HUSH not in told.replace(__file__, "")
    assert HUSH not in repr(caught.value)
    for line in caught.value.problems:
        assert line.isprintable(), line
    return list(caught.value.problems)


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts from an environment without any setting."""
    for name in [name for name in os.environ if name.startswith("MAILROOM_")]:
        monkeypatch.delenv(name)


# Where settings come from


def test_the_defaults_are_those_of_the_table() -> None:
    assert values(MailroomSettings(jmap_token=TOKEN)) == DEFAULTS


def test_the_token_is_the_one_setting_that_is_required() -> None:
    [line] = problems()
    assert "MAILROOM_JMAP_TOKEN" in line
    assert "_FILE" in line


def test_on_a_terminal_the_log_is_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert MailroomSettings(jmap_token=TOKEN).log_format == "text"
    monkeypatch.setenv("MAILROOM_LOG_FORMAT", "json")
    assert MailroomSettings(jmap_token=TOKEN).log_format == "json"


GOOD: list[tuple[str, str, Any]] = [
    ("jmap_token", "fmu1-0123-abc", "fmu1-0123-abc"),
    ("jmap_url", "https://mail.example", "https://mail.example"),
    ("jmap_url", "https://mail.example:8443/jmap", "https://mail.example:8443/jmap"),
    ("jmap_url", "http://127.0.0.1:8080/jmap", "http://127.0.0.1:8080/jmap"),
    ("jmap_url", "http://localhost/jmap", "http://localhost/jmap"),
    ("jmap_url", "http://[::1]:80/jmap", "http://[::1]:80/jmap"),
    ("jmap_username", "alice@mail.example", "alice@mail.example"),
    ("carddav_password", "with a space, ünd more", "with a space, ünd more"),
    ("carddav_url", "https://dav.example/dav", "https://dav.example/dav"),
    ("poll_interval", "1", 1),
    ("poll_interval", "3600", 3600),
    ("debounce_seconds", "0", 0),
    ("debounce_seconds", "0.25", 0.25),
    ("log_level", "debug", "debug"),
    ("log_level", "warning", "warning"),
    ("log_level", "error", "error"),
    ("log_format", "text", "text"),
    ("screener_mailbox", "Front Door", "Front Door"),
    ("label_mailroom_error", "Oops", "Oops"),
    ("label_mailroom_warning", "Hm", "Hm"),
    ("label_undo", "@Back", "@Back"),
    ("warnings_enabled", "false", False),
    ("warnings_enabled", "0", False),
    ("warnings_enabled", "true", True),
    ("provenance_group", "Robots", "Robots"),
    ("triage_categories", '["A B"]', [("A B", "@ToAB", "A B", "A B", "", "company", False)]),
    ("health_host", "0.0.0.0", "0.0.0.0"),  # noqa: S104
    ("health_port", "0", 0),
    ("health_port", "65535", 65535),
]


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_each_variable_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: Any
) -> None:
    monkeypatch.setenv("MAILROOM_JMAP_TOKEN", TOKEN)
    monkeypatch.setenv(variable(name), text)
    assert values(MailroomSettings()) == DEFAULTS | {name: value}


def test_carddav_takes_a_user_and_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAILROOM_CARDDAV_USERNAME", "alice")
    monkeypatch.setenv("MAILROOM_CARDDAV_PASSWORD", PASSWORD)
    settings = MailroomSettings(jmap_token=TOKEN)
    assert (settings.carddav_username, settings.carddav_password) == ("alice", PASSWORD)


def test_a_variable_that_is_empty_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.setenv(variable(name), "")
    assert values(MailroomSettings(jmap_token=TOKEN)) == DEFAULTS


@pytest.mark.parametrize("text", ["7", "nonsense"])
def test_keywords_override_the_environment(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MAILROOM_POLL_INTERVAL", text)
    monkeypatch.setenv("MAILROOM_JMAP_TOKEN", "another")
    settings = MailroomSettings(jmap_token=TOKEN, poll_interval=5, debounce_seconds=0)
    expected = {"poll_interval": 5, "debounce_seconds": 0}
    assert values(settings) == DEFAULTS | expected


def test_the_environment_is_read_when_the_settings_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("First", "Second"):
        monkeypatch.setenv("MAILROOM_SCREENER_MAILBOX", name)
        assert MailroomSettings(jmap_token=TOKEN).screener_mailbox == name


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="jmap_tokn"):
        MailroomSettings(jmap_tokn=TOKEN)


# Secrets


def with_secret(monkeypatch: pytest.MonkeyPatch, name: str, path: Path) -> None:
    """The other secret is fine; this one is to be read from `path`."""
    monkeypatch.setenv("MAILROOM_JMAP_TOKEN", TOKEN)
    monkeypatch.setenv(f"{variable(name)}_FILE", str(path))
    if name == "jmap_token":
        monkeypatch.delenv("MAILROOM_JMAP_TOKEN")


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", " \n\n"])
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_read_from_its_file_without_the_end_of_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, ending: str
) -> None:
    path = tmp_path / "secret"
    path.write_bytes((SECRETS[name] + ending).encode())
    with_secret(monkeypatch, name, path)
    assert getattr(MailroomSettings(), name) == SECRETS[name]


@pytest.mark.parametrize("name", SECRETS)
def test_a_keyword_overrides_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    with_secret(monkeypatch, name, tmp_path / "missing")
    assert getattr(MailroomSettings(**SECRETS), name) == SECRETS[name]


@contextmanager
def not_root() -> Iterator[None]:
    """Root may read every file; nobody may not."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def make_bad_file(directory: Path, kind: str) -> Path:
    """A file that is no good for a secret."""
    path = directory / kind
    if kind == "unreadable":
        path.write_text(TOKEN)
        path.chmod(0)
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "below a file":
        path.write_text("")
        path /= "below"
    elif kind == "too long":
        path = directory / ("x" * 5000)
    elif kind != "missing":
        path.write_bytes(BAD_CONTENTS[kind])
    return path


BAD_CONTENTS = {"binary": b"\xff\xfe\x00hush-token", "two lines": b"hush-token\nhush-password\n"}
BAD_FILES = ["missing", "unreadable", "directory", "loop", "below a file", "too long"]


@pytest.mark.parametrize("kind", [*BAD_FILES, *BAD_CONTENTS])
@pytest.mark.parametrize("name", SECRETS)
def test_a_bad_file_for_a_secret_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, kind: str
) -> None:
    path = make_bad_file(tmp_path, kind)
    with_secret(monkeypatch, name, path)
    with not_root() if kind == "unreadable" else nullcontext():
        [line] = problems()
    assert variable(name) in line
    assert str(path) in line


def test_an_empty_file_is_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("\n")
    with_secret(monkeypatch, "jmap_token", path)
    [line] = problems()
    assert "MAILROOM_JMAP_TOKEN" in line


def test_no_secret_shows_in_the_repr() -> None:
    settings = MailroomSettings(**SECRETS, carddav_username="alice", jmap_username="bob")
    for shown in (repr(settings), str(settings), f"{settings}", repr([settings])):
        assert HUSH not in shown
        assert "poll_interval=60" in shown


# Bad settings

BAD_URLS = [
    "mail.example",
    "https://",
    "https:///jmap",
    "ftp://mail.example",
    "http://mail.example/jmap",
    "http://0.0.0.0/",
    "http://127.0.0.1.mail.example/",
    "http://127.0.0.1@mail.example/",
    "http://mail.example\\@127.0.0.1/",
    "http://localhost.mail.example/",
    "https://[::1",
    "https://mail .example/",
    "https://mail.example/\njmap",
    "https://mail.example:port/",
    "https://mail.example:70000/",
]
NOT_A_NAME = [" ", "two\nlines", "bell\a"]
BAD_TEXTS: dict[str, tuple[list[str], str]] = {
    "jmap_token": (["hush hush", "hüsh-hush", "hush\nhush", "hush\x1b"], "token"),
    "jmap_url": (BAD_URLS, "https://"),
    "jmap_username": (["two\nlines"], "user name"),
    "carddav_username": (["two\nlines"], "user name"),
    "carddav_password": (["hush\nhush"], "password"),
    "carddav_url": (BAD_URLS, "https://"),
    "poll_interval": (
        ["0", "-1", "1.5", "1e3", "86401", "60s", "nan", "soon", "9" * 5000],
        "whole",
    ),
    "debounce_seconds": (["-0.1", "601", "inf", "nan", "3s", "1,5", "1e999"], "seconds"),
    "log_level": (["loud", "10", "trace", " "], "debug, info, warning"),
    "log_format": (["xml", " "], "json or text"),
    "screener_mailbox": (NOT_A_NAME, "mailbox"),
    "label_mailroom_error": (NOT_A_NAME, "mailbox"),
    "label_mailroom_warning": (NOT_A_NAME, "mailbox"),
    "label_undo": (NOT_A_NAME, "mailbox"),
    "warnings_enabled": (["maybe", "2", " "], "true or false"),
    "provenance_group": (NOT_A_NAME, "contact group"),
    "triage_categories": (["Feed", "[", "{}", '"Feed"', "5", "null", "true", "[" * 99_999], "list"),
    "health_host": (NOT_A_NAME, "address"),
    "health_port": (["-1", "65536", "80.5", "http", "0x50"], "port"),
}
BAD_VALUES: dict[str, list[Any]] = {
    "jmap_token": [None, "", 5, b"hush", ["hush"]],
    "jmap_url": [None, "", 5, b"https://mail.example", ["https://mail.example"]],
    "jmap_username": [None, 5, b"alice", []],
    "carddav_username": [None, 5, b"alice", []],
    "carddav_password": [None, 5, b"hush", ["hush"]],
    "carddav_url": [None, "", 5, {}],
    "poll_interval": [None, "60", True, 0, -1, float("nan"), float("inf"), []],
    "debounce_seconds": [None, "3", True, -1, float("nan"), float("inf"), []],
    "log_level": [None, "", 10, ["info"]],
    "log_format": [None, "", 10, ["json"]],
    "screener_mailbox": [None, "", 5, []],
    "label_mailroom_error": [None, "", 5, []],
    "label_mailroom_warning": [None, "", 5, []],
    "label_undo": [None, "", 5, []],
    "warnings_enabled": [None, "", "true", 2, []],
    "provenance_group": [None, "", 5, []],
    "triage_categories": [None, "", "Feed", 5, {}, {"name": "Feed"}],
    "health_host": [None, "", 5, []],
    "health_port": [None, "8080", True, -1, 65536, float("nan"), []],
}
TEXTS = [(name, text) for name, (texts, _) in BAD_TEXTS.items() for text in texts]
VALUES = [(name, value) for name, bad in BAD_VALUES.items() for value in bad]


def short(value: object) -> str:
    return ascii(value)[:40]


def assert_told(line: str, name: str, value: object) -> None:
    """The line names the variable, the value (unless it is a secret) and what is accepted."""
    assert line.startswith(variable(name))
    assert BAD_TEXTS[name][1] in line
    if name not in SECRETS:
        shown = repr(value).strip("'").strip('"')  # a text may be shown as what it was read as
        shown = shown.rpartition("@")[2] if name.endswith("_url") else shown
        assert shown[:100].casefold() in line.casefold()


@pytest.mark.parametrize(("name", "text"), TEXTS, ids=short)
def test_a_bad_variable_is_one_line_that_says_what_is_accepted(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv("MAILROOM_JMAP_TOKEN", TOKEN)
    monkeypatch.setenv(variable(name), text)
    [line] = problems()
    assert_told(line, name, text)


@pytest.mark.parametrize(("name", "value"), VALUES, ids=short)
def test_a_bad_keyword_is_one_line_that_says_what_is_accepted(name: str, value: Any) -> None:
    [line] = problems(**{"jmap_token": TOKEN, name: value})
    assert_told(line, name, value)


def test_bytes_that_are_no_text_are_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAILROOM_SCREENER_MAILBOX", os.fsdecode(b"\xff"))
    [line] = problems(jmap_token=TOKEN)
    assert line.encode()
    assert line.startswith("MAILROOM_SCREENER_MAILBOX")


def set_everything_wrong(environment: Any) -> None:
    for name, (texts, _) in BAD_TEXTS.items():
        environment(variable(name), texts[0])


def test_all_settings_wrong_at_once_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    set_everything_wrong(monkeypatch.setenv)
    told = problems()
    assert len(told) == len(DEFAULTS)
    for name, line in zip(DEFAULTS, told, strict=True):
        assert_told(line, name, BAD_TEXTS[name][0][0])


TOGETHER: dict[str, tuple[dict[str, Any], list[tuple[str, ...]]]] = {
    "a CardDAV user without a password": (
        {"carddav_username": "alice"},
        [("MAILROOM_CARDDAV_PASSWORD", "MAILROOM_CARDDAV_USERNAME")],
    ),
    "one name for the Screener and the errors": (
        {"screener_mailbox": "@MailroomError"},
        [("MAILROOM_SCREENER_MAILBOX", "MAILROOM_LABEL_MAILROOM_ERROR", "@MailroomError")],
    ),
    "one name for errors and warnings": (
        {"label_mailroom_error": "Look", "label_mailroom_warning": "Look"},
        [("MAILROOM_LABEL_MAILROOM_ERROR", "MAILROOM_LABEL_MAILROOM_WARNING", "Look")],
    ),
    "settings that do not go together beside one that is wrong by itself": (
        {
            "poll_interval": "soon",
            "carddav_username": "alice",
            "label_mailroom_error": "Look",
            "label_mailroom_warning": "Look",
            "triage_categories": ["Feed", "Feed"],
        },
        [
            ("MAILROOM_POLL_INTERVAL", "soon"),
            ("MAILROOM_CARDDAV_PASSWORD", "MAILROOM_CARDDAV_USERNAME"),
            ("MAILROOM_LABEL_MAILROOM_ERROR", "Look"),
            ("MAILROOM_TRIAGE_CATEGORIES", "Feed"),
        ],
    ),
    "a category beside a setting that is wrong": (
        {"health_port": -1, "triage_categories": [{"name": "Feed", "parent": "Nowhere"}]},
        [("MAILROOM_HEALTH_PORT", "-1"), ("MAILROOM_TRIAGE_CATEGORIES", "Feed", "Nowhere")],
    ),
}


def assert_each_told(told: list[str], expected: list[tuple[str, ...]]) -> None:
    """For each tuple of words there is a line that has them all."""
    for words in expected:
        assert any(all(word in line for word in words) for line in told), (words, told)


@pytest.mark.parametrize(("settings", "expected"), TOGETHER.values(), ids=TOGETHER)
def test_settings_that_do_not_go_together(
    settings: dict[str, Any], expected: list[tuple[str, ...]]
) -> None:
    assert_each_told(problems(jmap_token=TOKEN, **settings), expected)


# Categories


def test_names_of_a_category_come_from_its_name_unless_given() -> None:
    everything = dict(zip(FIELDS, ("C", "c!", "Group", "Box", "A", "person", True), strict=True))
    assert categories("A", " b  c ", everything, {"name": "Für 2", "label": "Zwei"}) == [
        ("A", "@ToA", "A", "A", "", "company", False),
        (" b  c ", "@Tobc", " b  c ", " b  c ", "", "company", False),
        ("C", "c!", "Group", "Box", "A", "person", True),
        ("Für 2", "Zwei", "Für 2", "Für 2", "", "company", False),
    ]


ALLOWED: dict[str, list[Any]] = {
    "a child before its parent": [{"name": "A", "parent": "B"}, "B"],
    "a child with the group of its parent": [
        "A",
        {"name": "B", "parent": "A", "contact_group": "A"},
    ],
    "a grandchild with that group": [
        "A",
        {"name": "B", "parent": "A"},
        {"name": "C", "parent": "B", "contact_group": "A"},
    ],
    "siblings": ["A", {"name": "B", "parent": "A"}, {"name": "C", "parent": "A"}],
    "an empty parent": [{"name": "A", "parent": ""}],
    "everything false": [{"name": "A", "add_to_inbox": False}],
}


@pytest.mark.parametrize("entries", ALLOWED.values(), ids=ALLOWED)
def test_what_categories_may_be(entries: list[Any]) -> None:
    names = [entry if isinstance(entry, str) else entry["name"] for entry in entries]
    assert [row[0] for row in categories(*entries)] == names


def entry(name: str = "A", **more: Any) -> dict[str, Any]:
    return {"name": name, **more}


RESERVED = ("Screener", "@MailroomError", "@MailroomWarning", "Mailroom")
REJECTED: dict[str, tuple[list[Any], list[tuple[str, ...]]]] = {
    "no category": ([], [("no category",)]),
    "no name": ([{"label": "L"}], [("name",)]),
    "an empty name": ([entry("")], [("name",)]),
    "an empty string": ([""], [("name",)]),
    "a blank name": ([entry("  ")], [("name",)]),
    "names twice": (["A", "B", "A"], [("name", "A", "twice")]),
    "a label twice": ([entry("A", label="L"), entry("B", label="L")], [("label", "L", "twice")]),
    "labels that become equal": (["Paper Trail", "PaperTrail"], [("@ToPaperTrail", "twice")]),
    "an unknown parent": ([entry(parent="Nowhere")], [("A", "parent", "Nowhere")]),
    "its own parent": ([entry(parent="A")], [("A", "ancestor")]),
    "a circle of two": ([entry("A", parent="B"), entry("B", parent="A")], [("ancestor",)]),
    "a circle of three with one beside it": (
        [entry("A", parent="B"), entry("B", parent="C"), entry("C", parent="A"), "D"],
        [("ancestor",)],
    ),
    "the Inbox as destination": (
        [entry(destination_mailbox="Inbox")],
        [("A", "Inbox", "add_to_inbox")],
    ),
    "the Inbox in capitals": ([entry("INBOX")], [("INBOX", "Inbox", "add_to_inbox")]),
    "a group of two strangers": (
        [entry("A", contact_group="G"), entry("B", contact_group="G")],
        [("A", "B", "G")],
    ),
    "a group of an uncle": (
        ["A", "B", entry("C", parent="B", contact_group="A")],
        [("A", "C", "group")],
    ),
}
REJECTED |= {
    f"{key} is {name}": ([entry(**{key: name})], [("A", name)])
    for key in ("label", "contact_group", "destination_mailbox")
    for name in RESERVED
}
REJECTED |= {f"the name {name}": ([name], [(name,)]) for name in ("Screener", "Mailroom")}
REJECTED |= {
    f"the entry {json.dumps(value)}": ([value], [(repr(value),)])
    for value in (None, 5, True, [], ["A"])
}
BAD_KEYS: dict[str, list[Any]] = {
    "name": [None, 5, [], "two\nlines"],
    "label": [None, 5, "", " ", "two\nlines"],
    "contact_group": [None, 5, "", " ", {}],
    "destination_mailbox": [None, 5, "", " ", True],
    "parent": [None, 5, [], False],
    "contact_type": [None, 5, "", "Person", "robot", []],
    "add_to_inbox": [None, 1, "true", []],
    "colour": ["red"],
    "Name": ["A"],
    "addToInbox": [True],
}
REJECTED |= {
    f"{key}: {json.dumps(value)}": ([entry(**{key: value})], [(key, repr(value))])
    for key, bad in BAD_KEYS.items()
    for value in bad
}
EVERYTHING_AT_ONCE: list[Any] = [
    "",
    5,
    entry("A", colour="red", contact_type="robot"),
    entry("B", parent="Nowhere"),
    entry("C", parent="C"),
    "D",
    "D",
    entry("E", destination_mailbox="Inbox"),
    entry("F", contact_group="G"),
    entry("H", contact_group="G"),
    entry("I", label="Screener"),
]
REJECTED["all relations wrong at once"] = (
    EVERYTHING_AT_ONCE[3:],
    [
        ("B", "Nowhere"),
        ("C", "ancestor"),
        ("name", "D", "twice"),
        ("@ToD", "twice"),
        ("E", "Inbox"),
        ("F", "H", "G"),
        ("I", "Screener"),
    ],
)
REJECTED["everything wrong at once"] = (
    EVERYTHING_AT_ONCE,
    [
        ("name", "''"),
        ("5",),
        ("A", "colour", "red"),
        ("A", "contact_type", "robot"),
        *REJECTED["all relations wrong at once"][1],
    ],
)


@pytest.mark.parametrize(("entries", "expected"), REJECTED.values(), ids=REJECTED)
def test_categories_that_are_rejected(entries: list[Any], expected: list[tuple[str, ...]]) -> None:
    told = problems(jmap_token=TOKEN, triage_categories=entries)
    assert_each_told(told, [("MAILROOM_TRIAGE_CATEGORIES", *words) for words in expected])


own_mailboxes = pytest.mark.parametrize(
    "name", ["screener_mailbox", "label_mailroom_error", "label_mailroom_warning", "label_undo"]
)


@own_mailboxes
@pytest.mark.parametrize("key", ["label", "contact_group", "destination_mailbox"])
def test_renamed_mailboxes_are_as_reserved_as_the_usual_ones(name: str, key: str) -> None:
    clash = entry(**{key: "Front Door"})
    told = problems(jmap_token=TOKEN, triage_categories=[clash], **{name: "Front Door"})
    assert_each_told(told, [("MAILROOM_TRIAGE_CATEGORIES", "A", "Front Door")])
    usual = DEFAULTS[name]
    assert categories(entry(**{key: usual}), **{name: "Front Door"})


@own_mailboxes
def test_the_inbox_is_the_users(name: str) -> None:
    """Mails are taken out of what is Mailroom's."""
    assert_each_told(problems(jmap_token=TOKEN, **{name: "inbox"}), [(variable(name), "'inbox'")])


def test_categories_come_from_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAILROOM_TRIAGE_CATEGORIES", json.dumps(["A", entry("B", parent="?")]))
    assert_each_told(
        problems(jmap_token=TOKEN), [("MAILROOM_TRIAGE_CATEGORIES", "B", "parent", "?")]
    )


# The process


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    """`python mailroom.py` with these variables."""
    return subprocess.run(
        [sys.executable, mailroom.__file__],
        env=dict(os.environ) | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


WRONG = {variable(name): texts[0] for name, (texts, _) in BAD_TEXTS.items()}
PROCESSES: dict[str, tuple[dict[str, str], list[str]]] = {
    "nothing is set": ({}, ["MAILROOM_JMAP_TOKEN"]),
    "everything is wrong": (WRONG, list(WRONG)),
    "a file is not there": (
        {"MAILROOM_JMAP_TOKEN_FILE": "/nowhere/token"},
        ["MAILROOM_JMAP_TOKEN"],
    ),
    "a name is no text": (
        {"MAILROOM_JMAP_TOKEN": TOKEN, "MAILROOM_TRIAGE_CATEGORIES": '["\\ud800"]'},
        ["MAILROOM_TRIAGE_CATEGORIES"],
    ),
}


@pytest.mark.parametrize(("environment", "variables"), PROCESSES.values(), ids=PROCESSES)
def test_with_bad_settings_the_program_ends_with_status_2_and_a_line_for_each(
    environment: dict[str, str], variables: list[str]
) -> None:
    ended = run(**environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    lines = ended.stderr.splitlines()
    assert len(lines) == len(variables)
    for line, name in zip(lines, variables, strict=True):
        assert name in line
    assert HUSH not in ended.stderr


@pytest.mark.parametrize("name", ["jmap_url", "carddav_url"])
@pytest.mark.parametrize(
    "login", ["https://alice:hunter2", "https://hunter2", "https://a:hun/ter2", "a:hunter2@ter2"]
)
def test_a_url_with_a_password_in_it_is_refused_and_not_shown(name: str, login: str) -> None:
    told = problems(jmap_token=TOKEN, **{name: f"{login}@mail.example/"})
    assert len(told) == 1
    assert name.upper() in told[0]
    assert "mail.example" in told[0]
    assert "ter2" not in told[0]
