"""The settings: defaults, environment, keywords, files, and what is said of bad ones, which is a
line for each that names the variable, shows no secret, and says what is accepted."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mailroom import ConfigurationError, MailroomSettings

HUSH = "hush"
"""In every secret, good or bad, and so never to be seen."""
TOKEN = f"fmu1-{HUSH}"
DEFAULTS: dict[str, Any] = {
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
    "screen_inbox": False,
    "health_host": "127.0.0.1",
    "health_port": 8080,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No setting but the token, and no terminal."""
    for name in [name for name in os.environ if name.startswith("MAILROOM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    monkeypatch.setenv("MAILROOM_JMAP_TOKEN", TOKEN)
    return monkeypatch


def problems(**keywords: Any) -> list[str]:
    """What is said of bad settings, none of it secret."""
    with pytest.raises(ConfigurationError) as caught:
        MailroomSettings(**keywords)
    assert HUSH not in repr(caught.value)
    assert all("\n" not in line for line in caught.value.problems)
    return list(caught.value.problems)


def test_the_defaults(environment: pytest.MonkeyPatch) -> None:
    settings = MailroomSettings()
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert settings.jmap_token == TOKEN
    found = settings.triage_categories
    rows = [(each.name, each.label, each.contact_group, each.destination_mailbox) for each in found]
    assert rows[1:3] == [
        ("Feed", "@ToFeed", "Feed", "Feed"),
        ("Paper Trail", "@ToPaperTrail", "Paper Trail", "Paper Trail"),
    ]
    assert [each.parent for each in found] == [*[""] * 4, "Imbox", "Paper Trail", "Paper Trail"]
    assert [each.name for each in found if each.add_to_inbox] == ["Imbox"]
    assert [each.name for each in found if each.contact_type == "person"] == ["Person"]
    environment.setattr(sys.stderr, "isatty", lambda: True)
    assert MailroomSettings().log_format == "text"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("poll_interval", "30", 30),
        ("debounce_seconds", "0.5", 0.5),
        ("warnings_enabled", "false", False),
        ("health_port", "0", 0),
        ("jmap_url", " http://127.0.0.1:8080/jmap \n", "http://127.0.0.1:8080/jmap"),
        ("screener_mailbox", "\ufeffWarteraum ", "Warteraum"),
        ("screener_mailbox", "Pru\u0308fung", "Pr\u00fcfung"),
        ("log_level", "", "info"),
        ("label_undo", "  ", "@ToScreener"),
    ],
)
def test_a_variable(name: str, text: str, value: Any, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(f"MAILROOM_{name.upper()}", text)
    assert getattr(MailroomSettings(), name) == value
    assert getattr(MailroomSettings(**{name: DEFAULTS[name]}), name) == DEFAULTS[name]


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="pol_interval"):
        MailroomSettings(pol_interval=5)


@pytest.fixture
def file(environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that the token is to be in."""
    environment.delenv("MAILROOM_JMAP_TOKEN")
    environment.setenv("MAILROOM_JMAP_TOKEN_FILE", str(tmp_path / "token"))
    return tmp_path / "token"


@pytest.mark.parametrize("content", [TOKEN, f"\ufeff {TOKEN}\r\n"])
def test_a_secret_in_a_file(content: str, file: Path) -> None:
    file.write_text(content, encoding="utf-8")
    settings = MailroomSettings()
    assert settings.jmap_token == TOKEN
    assert HUSH not in repr(settings)
    assert HUSH not in settings.redact(f"Authorization: Bearer {TOKEN}")


def make_unreadable(file: Path) -> None:
    """For root too, who is somebody else from now on."""
    file.touch(0)
    os.seteuid(os.geteuid() or 65534)


BAD_FILES: dict[str, tuple[Any, str]] = {
    "missing": (str, "No such file"),
    "a directory": (Path.mkdir, "directory"),
    "empty": (lambda file: file.write_text(" \n"), "empty"),
    "UTF-16": (lambda file: file.write_text(TOKEN, encoding="utf-16"), "'utf-8' codec"),
    "quoted": (lambda file: file.write_text(f'"{TOKEN}"'), "quotes"),
    "another user's": (make_unreadable, "Permission denied"),
}


@pytest.mark.parametrize(("make", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file(make: Any, reason: str, file: Path) -> None:
    user = os.geteuid()
    make(file)
    try:
        [line] = problems()
    finally:
        os.seteuid(user)
    for part in ("MAILROOM_JMAP_TOKEN", str(file), reason):
        assert part in line


UNSHOWN = ("taken", "MAILROOM_CARDDAV_PASSWORD", "line 1 column 9")
BAD: list[tuple[str, Any, str]] = [
    # name, value, what the line says
    ("jmap_token", f"Bearer {TOKEN}", "without `Bearer`"),
    ("jmap_token", f'"{TOKEN}"', "quotes"),
    ("jmap_token", f"{HUSH}\u00fc", "one word"),
    ("jmap_url", "http://mail.example/jmap", "https://"),
    ("jmap_url", f"https://user:{HUSH}@mail.example/", "without a user name"),
    ("jmap_url", "https://mail.example:0/", "https://"),
    ("carddav_url", "ftp://mail.example/", "https://"),
    ("poll_interval", "soon", "seconds"),
    ("poll_interval", "0", "seconds"),
    ("poll_interval", "nan", "seconds"),
    ("debounce_seconds", "-1", "0 to 600"),
    ("log_level", "loud", "debug, info, warning or error"),
    ("log_format", "xml", "json or text"),
    ("warnings_enabled", "maybe", "true or false"),
    ("health_port", "65536", "a port"),
    ("health_port", "tcp://10.43.12.7:8080", "enableServiceLinks: false"),
    ("screener_mailbox", "'Screener'", "quotes"),
    ("screener_mailbox", "a\nb", "one line"),
    ("label_undo", "Inbox", "Inbox"),
    ("label_mailroom_error", "@mailroomwarning", "taken"),
    ("label_mailroom_error", "Feed", "taken"),
    ("carddav_username", "alice", "MAILROOM_CARDDAV_PASSWORD"),
    ("triage_categories", '["Feed",]', "line 1 column 9"),
    ("triage_categories", "{}", "a JSON list"),
]
CATEGORIES: list[tuple[list[Any], str]] = [
    ([], "list of categories"),
    ([""], "a name"),
    ([5], "a name"),
    ([{"label": "@ToFeed"}], "a name"),
    ([{"name": "Feed", "colour": "red"}], "colour"),
    ([{"name": "Feed", "contact_type": "robot"}], "company or person"),
    ([{"name": "Feed", "add_to_inbox": "yes"}], "true or false"),
    (["Feed", "Feed"], "Feed"),
    (["Feed", {"name": "Other", "label": "@tofeed"}], "@tofeed"),
    ([{"name": "Feed", "parent": "Nowhere"}], "no parent Nowhere"),
    ([{"name": "A", "parent": "B"}, {"name": "B", "parent": "A"}], "ancestor"),
    ([{"name": "Feed", "destination_mailbox": "INBOX"}], "add_to_inbox"),
    (["A", {"name": "B", "contact_group": "a"}], "group"),
    ([{"name": "Feed", "contact_group": "Mailroom"}], "Mailroom"),
    ([{"name": "Feed", "label": "@ToScreener"}], "@ToScreener"),
    ([{"name": "Feed", "label": "Jail"}, "Jail"], "Jail"),
]
BAD += [("triage_categories", entries, said) for entries, said in CATEGORIES]


@pytest.mark.parametrize(("name", "value", "said"), BAD)
def test_a_bad_setting(name: str, value: Any, said: str, environment: pytest.MonkeyPatch) -> None:
    """As a keyword and as a variable."""
    by_keyword = problems(**{name: value})
    text = value if isinstance(value, str) else json.dumps(value)
    environment.setenv(f"MAILROOM_{name.upper()}", text)
    for lines in (by_keyword, problems()):
        found = [line for line in lines if "MAILROOM_" in line and said in line]
        assert found
        if isinstance(value, str) and HUSH not in value and said not in UNSHOWN:
            assert any(text in line or repr(text) in line for line in found)


def test_all_that_is_wrong_is_said_at_once() -> None:
    bad = {"jmap_url": "x", "poll_interval": -1, "log_level": "loud", "health_port": 70000}
    assert len(problems(**bad)) == 4


def test_a_mistyped_variable_is_warned_of_with_the_nearest_name(
    environment: pytest.MonkeyPatch,
) -> None:
    assert MailroomSettings().warnings == []
    environment.setenv("MAILROOM_POLL_INTERVALL", "30")
    environment.setenv("MAILROOM_SERVICE_HOST", "10.43.12.7")
    one, other = MailroomSettings().warnings
    assert "MAILROOM_POLL_INTERVALL" in one
    assert one.endswith("MAILROOM_POLL_INTERVAL")
    assert "MAILROOM_SERVICE_HOST" in other
