"""Random input at the outside: accounts with odd addresses, names, uids and cards, and whatever may
come for all that is parsed. `--long` tries many more examples."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_address
from random import Random
from typing import Any
from unittest import mock

import pytest
import requests
import urllib3
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jmap_server import Fault
from tools import COUNTS, SERVERS, Scene

from mailroom import ConfigurationError, MailroomError, MailroomSettings

JANE = ("jane@x.example", "JANE@X.example", "mailto:Jane@x.example", " jane@x.example")
JOSE = ("jos\u00e9@m\u00fcller.example", "jose\u0301@xn--mller-kva.example")
PEOPLE: list[tuple[str, ...]] = [JANE, JOSE, ("k@bank.example",)]
WHO = ["jane@x.example", "jos\u00e9@xn--mller-kva.example", "k@bank.example"]
NAMES = st.sampled_from(["", "Jane", "Doe, Jane", "'Jane'", "Jose\u0301", "Acme, Inc.", "\u200b"])
UIDS = st.sampled_from(["", "urn:uuid:", "http://x.example/", "AAMk/~+="])
ODD: list[dict[str, Any]] = [
    {"uid": None},
    {"emails": {"f": None}},
    {"emails": {"f": {"address": None}}},
    {"name": {"components": [{"value": "x"}]}},
    {"notes": {"n": {"note": None}}},
]
PERSON = st.integers(0, len(PEOPLE) - 1)
CARD = st.fixed_dictionaries(
    {"who": PERSON, "how": st.integers(0, 9), "name": NAMES, "uid": UIDS},
    optional={"odd": st.sampled_from(ODD), "group": st.sampled_from(["Feed", "Jail", "Friends"])},
)
MAILS = st.lists(st.tuples(PERSON, st.integers(0, 9), NAMES), min_size=1, max_size=4)


def spelt(who: int, how: int) -> str:
    return PEOPLE[who][how % len(PEOPLE[who])]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SERVERS)), st.lists(CARD, max_size=4), MAILS)
@example("fastmail", [{"who": 0, "how": 2, "name": "Jane", "uid": "AAMk/~+="}], [(0, 1, "Jane")])
def test_an_account_with_odd_people(
    style: str, cards: list[dict[str, Any]], mails: list[tuple[int, int, str]]
) -> None:
    """Whoever has a contact gets no second one; who has one that cannot be understood fails, all
    others are filed, and a further cycle has nothing to do (see `Scene`)."""
    COUNTS["random accounts"] += 1
    with Scene(SERVERS[style]()) as scene:
        account, odd = scene.account, {}
        account.add_group("Friends", [])
        for n, each in enumerate(cards):
            emails = {"e": {"address": spelt(each["who"], each["how"])}}
            more = {"uid": f"{each['uid']}card-{n}", "name": {"full": each["name"]}}
            id_ = account.new_card({"kind": "individual", "emails": emails, **more})
            if "odd" in each:
                odd[id_] = {**each["odd"], "emails": {**emails, **each["odd"].get("emails", {})}}
            if "group" in each:
                account.join_group(each["group"], id_)

        def edit(answer: Any) -> Any:
            for _, got, _ in answer["methodResponses"]:
                for shown in got.get("list", ()):
                    shown |= odd.get(shown["id"], {})
            return answer

        scene.server.faults.append(Fault("ContactCard/get", times=10**6, edit=edit))
        wanted = {}
        for who, how, name in mails:
            sender = [{"name": name or None, "email": spelt(who, how).removeprefix("mailto:")}]
            wanted[account.deliver(sender, ["Screener", "@ToFeed"])] = who
        before = len(account.cards)
        failed = scene.cycle()
        for id_, who in wanted.items():
            assert ("Feed" in account.mailboxes_of(id_)) == (WHO[who] not in failed)
        fails = {who for who in wanted.values() if WHO[who] in failed}
        assert fails <= {each["who"] for each in cards if "odd" in each}
        new = {*wanted.values()} - {each["who"] for each in cards} - fails
        assert len(account.cards) - before == len(new)
        for id_ in wanted:
            account.file(id_, [account.mailbox_id("Archive")])


# Settings, URLs, secrets

PIECES = ["https://", "http://", "//", "127.0.0.1", "localhost", "[::1]", "evil.example", "@", ":"]
PIECES += ["/", "\\", "#", "?", "%40", "8080", "0", ".", "[", "]", "a", " ", "\t", "127.1", "ü"]
URLS = st.builds(
    "{}{}".format,
    st.sampled_from(["http://", "https://", ""]),
    st.lists(st.sampled_from(PIECES), max_size=5).map("".join),
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
KEYS = "name label contact_group destination_mailbox parent add_to_inbox contact_type other"
ENTRY = st.dictionaries(
    st.sampled_from(KEYS.split()),
    st.sampled_from(["A", "B", "", "Inbox", "person", True, None, 5, "x\n"]),
)
CATEGORIES = st.lists(ENTRY | st.sampled_from(["A", "Feed"]) | ANY_JSON, max_size=4)
ODDITIES = ["1e999", "nan", "-1", "0x1", "٣", "true", "/", "\udc80", " 5 ", "60", "{", "[]", "json"]
VALUES = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(ODDITIES),
    URLS,
    CATEGORIES.map(json.dumps),
)
HUSH = "hush-7f3a"
SETTINGS = [name for name in vars(MailroomSettings(jmap_token="t")) if name[0] != "_"]


@given(st.dictionaries(st.sampled_from(SETTINGS), VALUES), st.sampled_from([" ", "", "ü"]))
def test_any_environment_is_settings_or_lines(given_: dict[str, str], odd: str) -> None:
    variables = {f"MAILROOM_{name.upper()}": value for name, value in given_.items()}
    variables |= {"MAILROOM_JMAP_TOKEN": f"{HUSH}{odd}{HUSH}"}
    problems: tuple[str, ...] = ("",)
    with mock.patch.dict(os.environ, variables, clear=True):
        try:
            assert HUSH not in repr(MailroomSettings())
        except ConfigurationError as error:
            problems = error.problems
    assert problems
    assert HUSH not in "".join(problems)


@given(URLS)
@example("https://a@evil.example/")
@example("https://a\\@evil.example/")
def test_a_safe_url_leads_where_it_seems_to(url: str) -> None:
    """Its host is the one that requests would connect to, and over http that is this machine."""
    with suppress(requests.RequestException, ValueError, ConfigurationError):
        url = MailroomSettings(jmap_token="t", jmap_url=url).jmap_url
        place = urllib3.util.parse_url(str(requests.Request("GET", url).prepare().url))
        host = str(place.host).strip("[]")
        assert (place.scheme, place.auth) == (url.partition(":")[0], None)
        assert place.scheme == "https" or host == "localhost" or ip_address(host).is_loopback


def mangled(value: Any, random: Random, wrong: Sequence[Any]) -> Any:
    """A JSON value with something else in one of its places."""
    if random.random() < 0.2 or not (isinstance(value, list | dict) and value):
        return random.choice(wrong)
    copy = value.copy()
    at = random.choice([*copy] if isinstance(copy, dict) else range(len(copy)))
    copy[at] = mangled(copy[at], random, wrong)
    return copy


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Scene() as scene:
        yield scene


WRONG = st.lists(ANY_JSON | st.sampled_from([[], {}, None, 7]), min_size=1, max_size=3)
TWICE = 2 * settings.default.max_examples  # type: ignore[union-attr]


@settings(max_examples=TWICE, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5), st.integers(0, 2**32).map(Random), WRONG)
def test_a_reply_of_any_shape_is_an_error_of_the_server_and_passes(
    scene: Scene, nth: int, random: Random, wrong: list[Any]
) -> None:
    number = len(scene.account.mails)
    mails = scene.new_sender(f"Sender {number} <s{number}@x.example>", 2)
    scene.tap(mails[0], "@ToFeed")
    scene.server.faults[:] = [Fault(nth=nth, edit=lambda reply: mangled(reply, random, wrong))]
    told = ""
    try:
        scene.cycle()
    except MailroomError as error:
        told = str(error)
    assert len(told.splitlines()) <= 1
    scene.server.faults.clear()
    scene.heal()
    assert "Feed" in scene.account.mailboxes_of(mails[0])
    assert not scene.labelled()
