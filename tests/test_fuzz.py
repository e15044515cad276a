"""Random input: for the rules of triage whole accounts with their histories, for all that is parsed
whatever may come. `--long` tries many more examples."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from ipaddress import ip_address
from itertools import pairwise
from random import Random
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import pytest
import requests
import responses
import urllib3
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jmap_server import Fault
from test_contacts import ADDRESS_BOOK, FOUND, MULTISTATUS
from test_push import parsed
from test_rules import OWN, patched, written
from test_triage import crash, places, replaced
from test_vcards import ANY_TEXT, BOB, CHANGES, EVE, vcard
from tools import COUNTS, Scene

import mailroom
from mailroom import (
    MALFORMED,
    Boxes,
    Card,
    CardChange,
    Category,
    ConfigurationError,
    Mail,
    MailPatch,
    MailroomError,
    MailroomSettings,
    Rules,
    SenderPlan,
    error_patches,
    parse_categories,
    plan_sender,
    sort_queue,
)


def tried(what: str) -> None:
    COUNTS[f"random {what}"] += 1


# ------------------------------------------------------------------------------- the triage rules

FOREIGN = ("Inbox", "Trash", "Sent", "Mine")
SENDERS = ("a@x.example", "b@x.example", "c@x.example", "alice@home.example", "")
NAMES = st.sampled_from(["", "Bob", "Smith, Bob", "Shop"])


@st.composite
def category_sets(draw: st.DrawFn) -> tuple[Category, ...]:
    """Categories with parents at random; some share the group or the mailbox of their parent."""
    entries: list[dict[str, Any]] = []
    for name in "ABCDE"[: draw(st.integers(1, 5))]:
        entry: dict[str, Any] = {"name": name, "add_to_inbox": draw(st.booleans())}
        entry["contact_type"] = draw(st.sampled_from(["company", "person"]))
        if entries and (parent := draw(st.none() | st.sampled_from(entries))):
            entry["parent"] = parent["name"]
            for key in ("contact_group", "destination_mailbox"):
                if draw(st.integers(0, 3)) == 0:
                    entry[key] = parent.get(key, parent["name"])
        entries.append(entry)
    categories, problems = parse_categories(entries)
    assume(not [*problems, *mailroom.category_problems(categories, [])])
    return categories


def boxes_for(categories: Sequence[Category], warnings: bool) -> Boxes:
    return Boxes(
        inbox="Inbox",
        screener="Screener",
        error="@Error",
        warning="@Warning" if warnings else "",
        labels={each.label: each for each in categories},
        destinations={each: each.destination_mailbox for each in categories},
    )


@dataclass
class World:
    """An account in plain values, and a Mailroom that works on it as `Triage.run` does."""

    rules: Rules
    boxes: Boxes
    mails: list[Mail] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    plans: list[SenderPlan] = field(default_factory=list)
    writes: list[tuple[Mail, MailPatch]] = field(default_factory=list)

    def twin(self, turned: bool) -> "World":
        """The same account; `turned`: the server tells of everything in the other order."""
        step = -1 if turned else 1
        return replace(
            self, mails=self.mails[::step], cards=self.cards[::step], plans=[], writes=[]
        )

    def cycle(self) -> None:
        queue = [mail for mail in self.mails if mail.mailboxes & self.boxes.queue]
        decided, unusable = sort_queue(queue, self.boxes, OWN)
        marks = error_patches(queue, decided, unusable, self.boxes)
        self._triage(decided)
        self._patch(marks)

    def _triage(self, decided: Mapping[str, Category]) -> None:
        plans = [self._plan(sender, category) for sender, category in decided.items()]
        first = mailroom.first_of_each_contact(plans)
        for plan in first.values():
            self.cards = written(plan, self.cards) if wants(plan) else self.cards
            self._patch(plan.refile)
            self._patch(plan.finish)
        self.plans += first.values()
        later = {p.sender: p.category for p in plans if p is not first[p.contact.uid]}
        if later:
            self._triage(later)

    def _plan(self, sender: str, category: Category) -> SenderPlan:
        mails = [mail for mail in self.mails if mail.sender == sender]
        return plan_sender(sender, category, mails, self.cards, self.rules, self.boxes)

    def _patch(self, patches: Mapping[str, MailPatch]) -> None:
        by_id = {mail.id: mail for mail in self.mails}
        self.writes += [(by_id[id_], patch) for id_, patch in patches.items() if patch]
        self.mails = patched(self.mails, patches)

    def state(self) -> tuple[dict[str, Mail], dict[str, Card]]:
        return {each.id: each for each in self.mails}, {each.uid: each for each in self.cards}


def wants(plan: SenderPlan) -> bool:
    """Whether a plan asks anything of the contacts."""
    change = plan.contact
    return bool(plan.join or plan.leave or change.name or change.note or not change.card)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """An account after a history: mails come, are tapped and triaged, contacts are made."""
    categories = draw(category_sets())
    rules = Rules(categories, "Mailroom", date(2025, 3, 4))
    world = World(rules, boxes_for(categories, draw(st.booleans())))
    groups = sorted({"Mailroom", "Friends", *(each.contact_group for each in categories)})
    world.cards = [Card(f"g-{name}", name, name, is_group=True) for name in groups]
    labels, managed = sorted(world.boxes.labels), sorted(world.boxes.managed)
    somewhere = st.frozensets(st.sampled_from([*FOREIGN, *managed, "@Error"]), min_size=1)
    for n in range(draw(st.integers(1, 14))):
        match draw(st.sampled_from(["mail", "mail", "tap", "tap", "contact", "cycle"])):
            case "mail":
                sender, name = draw(st.sampled_from(SENDERS)), draw(NAMES)
                received = f"2025-01-{draw(st.integers(10, 20))}"
                world.mails.append(Mail(f"m{n}", sender, name, draw(somewhere), received))
            case "tap" if world.mails:
                at = draw(st.integers(0, len(world.mails) - 1))
                box = frozenset({draw(st.sampled_from(labels))})
                mail = world.mails[at]
                world.mails[at] = replace(mail, mailboxes=mail.mailboxes | box)
            case "contact":
                emails = draw(st.frozensets(st.sampled_from(SENDERS[:3]), min_size=1))
                note = draw(st.sampled_from(["", "mine", mailroom.CREATED_NOTE]))
                notes = {"n1": note} if note else {}
                card = Card(
                    f"c{n}", f"c{n}", draw(NAMES), emails, notes, str(draw(st.integers(1, 3)))
                )
                joined = draw(st.frozensets(st.sampled_from(groups)))
                world.cards = [join(each, card.uid, joined) for each in world.cards] + [card]
            case "cycle":
                world.cycle()
    return world


def join(card: Card, uid: str, groups: Iterable[str]) -> Card:
    there = card.is_group and card.name in groups
    return replace(card, members=card.members | {uid}) if there else card


@given(worlds())
def test_a_cycle_brings_any_account_to_where_it_should_be(world: World) -> None:
    tried("accounts triaged")
    before = {mail.id: mail for mail in world.mails}
    world = world.twin(turned=False)
    world.cycle()
    plans, writes = world.plans, world.writes

    _, unusable = sort_queue(world.mails, world.boxes, OWN)
    for mail in world.mails:
        is_labelled = bool(mail.mailboxes & world.boxes.labels.keys())
        assert is_labelled == (mail.id in unusable) == ("@Error" in mail.mailboxes) or (
            mail.mailboxes == {"@Error"}  # never out of its only mailbox
        )
        kept = before[mail.id].mailboxes & set(FOREIGN)
        assert kept <= mail.mailboxes
        assert (mail.mailboxes & set(FOREIGN)) - kept <= {"Inbox"}
    last = {plan.contact.uid: plan for plan in plans}
    for uid, plan in last.items():
        family = world.rules.family(plan.category)
        joined = {card.name for card in world.cards if uid in card.members}
        managed = {each.contact_group for each in world.rules.categories}
        assert joined & managed == {each.contact_group for each in family}
        assert len([card for card in world.cards if plan.sender in card.emails]) >= 1
        for mail in world.mails:
            if mail.sender == plan.sender and mail.mailboxes & world.boxes.managed:
                there = {world.boxes.destinations[each] for each in family}
                assert mail.mailboxes & world.boxes.managed == there
    assert all(is_minimal(mail, patch) for mail, patch in writes)

    again = world.twin(turned=True)
    again.cycle()
    assert (again.plans, again.writes) == ([], [])
    assert again.state() == world.state()


def is_minimal(mail: Mail, patch: MailPatch) -> bool:
    """Whether a patch changes something, and says nothing more than which mailboxes are to stay."""
    after = mail.patched(patch)
    idle = [
        path
        for path in patch
        if after == mail.patched({key: value for key, value in patch.items() if key != path})
    ]
    return len(idle) < len(patch) and all(patch[path] for path in idle)


@given(worlds())
def test_the_order_of_what_a_server_tells_does_not_matter(world: World) -> None:
    """But where one contact is asked to go two ways at once, by two of its addresses."""
    tried("orders of an account")
    one, other = world.twin(turned=False), world.twin(turned=True)
    one.cycle()
    other.cycle()
    ways: dict[str, set[str]] = {}
    for plan in one.plans:
        ways.setdefault(plan.contact.uid, set()).add(plan.category.name)
    shared = {uid for uid, names in ways.items() if len(names) > 1}
    mails, cards = one.state()
    other_mails, other_cards = other.state()
    assert mails == other_mails
    if not shared and len(one.plans) == len(ways):
        assert cards == other_cards


# ------------------------------------------------------------------------------------- vCards


@st.composite
def cards_of_all_sorts(draw: st.DrawFn) -> str:
    """A vCard as an address book may have it, well-formed but for lines that are none."""
    text = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=20)
    value = text.map(mailroom.vcard_escape)
    kind = st.sampled_from(["KIND:group", "X-ADDRESSBOOKSERVER-KIND:group"])
    name = st.sampled_from(["NOTE", "EMAIL", "FN", "X-ABLabel", "item1.NOTE;LANGUAGE=en", "TEL"])
    line = st.one_of(
        kind,
        st.builds("{}:{}".format, name, value),
        st.sampled_from([f"MEMBER:{EVE}", f"X-ADDRESSBOOKSERVER-MEMBER:{EVE}"]),
        text.filter(lambda each: not re.match(r"(?i)(.*\.)?END\b|\s", each)),
    )
    eol = draw(st.sampled_from(["\r\n", "\n"]))
    lines = draw(st.lists(line, max_size=8))
    folded = [mailroom.vcard_fold(each, eol)[: -len(eol)] for each in lines]
    return vcard("UID:b", *folded, eol=eol)


def read(text: str) -> Card:
    card = mailroom.vcard_card("b.vcf", text, "")
    assert card
    return card


@given(cards_of_all_sorts(), CHANGES)
def test_what_is_written_is_read_again_and_nothing_else_changes(
    text: str, change: CardChange
) -> None:
    tried("vCards edited")
    change = replace(change, remove=change.remove - change.add)
    change = replace(change, note=tuple(" ".join(line.split()) for line in change.note))
    before, after = read(text), read(mailroom.edit_vcard(text, change))
    assert after.members == (before.members | change.add) - change.remove
    note = [line for line in change.note if line and line not in before.note_lines]
    assert sorted(filter(None, after.note_lines)) == sorted(
        [*filter(None, before.note_lines), *note]
    )
    assert (after.uid, after.emails, after.is_group) == (before.uid, before.emails, before.is_group)


@given(cards_of_all_sorts() | ANY_TEXT)
def test_a_vcard_goes_there_and_back_byte_for_byte(text: str) -> None:
    tried("vCards there and back")
    join_, leave = CardChange("g", add=frozenset({BOB})), CardChange("g", remove=frozenset({BOB}))
    try:
        assert mailroom.edit_vcard(text, CardChange("g")) == text
        joined = mailroom.edit_vcard(text, join_)
    except ValueError:
        return
    assert mailroom.edit_vcard(joined, join_) == joined
    if text.endswith("\n") and BOB.casefold()[9:] not in text.casefold():
        assert mailroom.edit_vcard(joined, leave) == text


# ------------------------------------------------------------------------------------ settings

PIECES = ["https://", "http://", "//", "127.0.0.1", "localhost", "[::1]", "evil.example", "@", ":"]
PIECES += [
    "/",
    "\\",
    "#",
    "?",
    "%40",
    "%2f",
    "8080",
    "0",
    ".",
    "[",
    "]",
    "a",
    " ",
    "\t",
    "127.1",
    "ü",
]
URLS = st.builds(
    "{}{}".format,
    st.sampled_from(["http://", "https://", ""]),
    st.lists(st.sampled_from(PIECES), max_size=5).map("".join),
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        key: st.sampled_from(["A", "B", "C", "", "Inbox", "person", True, None, 5, "x\n"])
        for key in [*mailroom.CATEGORY_KEYS, "other"]
    },
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
CATEGORIES = st.lists(ENTRY | st.sampled_from(["A", "B", "Feed"]) | ANY_JSON, max_size=4)
VALUES = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["1e999", "nan", "-1", "0x1", "1_0", "٣", "true", "NO", "/", "~", "\udc80", " 5 "]
    ),
    st.sampled_from(["info", "json", "text", "Screener", "Mailroom", "5", "60", "{", "[]"]),
    URLS,
    CATEGORIES.map(json.dumps),
)
HUSH = "hush-7f3a"


@given(
    st.dictionaries(st.sampled_from([*mailroom.SETTINGS]), VALUES), st.sampled_from([" ", "", "ü"])
)
def test_any_environment_is_settings_or_a_line_for_each_problem(
    given_: dict[str, str], odd: str
) -> None:
    tried("environments")
    variables = {f"MAILROOM_{name.upper()}": value for name, value in given_.items()}
    variables |= {"MAILROOM_JMAP_TOKEN": f"{HUSH}{odd}{HUSH}"}
    with mock.patch.dict(os.environ, variables, clear=True):
        try:
            made: MailroomSettings | None = MailroomSettings()
            problems: tuple[str, ...] = ()
        except ConfigurationError as error:
            made, problems = None, error.problems
    assert bool(problems) == (made is None)
    assert all(line.isprintable() and HUSH not in line for line in problems)
    if not made:
        return
    assert not odd.strip() or odd.isascii()
    assert HUSH not in repr(made)
    assert all(
        mailroom.ancestors(each, made.triage_categories) != [each]
        for each in made.triage_categories
    )
    for name, row in mailroom.SETTINGS.items():
        assert name == "triage_categories" or row.fits(getattr(made, name)), name


@given(st.binary(max_size=40), st.sampled_from(["jmap_token", "carddav_password"]))
def test_any_file_of_a_secret_is_one_or_none(content: bytes, name: str) -> None:
    tried("files of a secret")
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        variables = {"MAILROOM_JMAP_TOKEN": "t", f"MAILROOM_{name.upper()}_FILE": file.name}
        with mock.patch.dict(os.environ, variables, clear=True):
            try:
                secret = getattr(MailroomSettings(), name)
            except ConfigurationError as error:
                problems = error.problems
            else:
                problems = ()
                assert secret == content.decode().strip()
    assert all(file.name in line and line.isprintable() for line in problems)


def connected_to(url: str) -> urllib3.util.Url | None:
    """What requests makes of a URL; None of one that it refuses."""
    with suppress(requests.RequestException):
        return urllib3.util.parse_url(str(requests.Request("GET", url).prepare().url))
    return None


@given(URLS)
def test_a_safe_url_leads_where_it_seems_to(url: str) -> None:
    """Its host is the one that requests would connect to, and over http that is this machine."""
    tried("URLs")
    if not mailroom.is_safe_url(url) or not (place := connected_to(url)):
        return
    assert place.scheme == url.partition(":")[0]
    assert place.auth is None
    host = str(place.host).strip("[]")
    assert place.scheme == "https" or host == "localhost" or ip_address(host).is_loopback


@given(URLS.map(lambda place: f"https://mail.example{place}"), URLS)
def test_a_redirect_that_is_followed_stays_at_home(url: str, location: str) -> None:
    tried("redirects")
    try:
        there = mailroom.same_origin("https://mail.example/x", location)
    except (MailroomError, *MALFORMED):
        return
    if mailroom.is_safe_url(there) and (place := connected_to(there)):
        assert (place.scheme, place.host, place.port) == ("https", "mail.example", None)


SECRETS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=9, max_size=20
)


@given(token=SECRETS, password=SECRETS, around=st.text(max_size=5))
def test_no_form_of_a_secret_gets_through(token: str, password: str, around: str) -> None:
    tried("secrets")
    made = object.__new__(MailroomSettings)
    made.__dict__ |= {"jmap_token": token, "carddav_password": password}
    made.__dict__ |= {"jmap_username": "", "carddav_username": "u"}
    forms = mailroom.written_forms(token, ["u"]) | mailroom.written_forms(password, ["u"])
    for form in forms:
        said = made.redact(f"{around}{form}{around}")
        assert token not in said
        assert password not in said


# ------------------------------------------------------------------------------- the event stream

LINES = ["event: state", "event:ping", "event", "data: 1", "data:", "data", "data: a:b", ": c", ":"]
LINES += [
    "id: 7",
    "id",
    "retry: 5",
    "retry: x",
    "foo: bar",
    "Data: x",
    " data: x",
    "data : x",
    "ü☃",
]
ENDS = st.sampled_from(["\n", "\r", "\r\n", "\n\n", "\r\r", "\r\n\r\n", "\n\r", ""])
NOISE = st.sampled_from(["\0", "\ufeff", "\u2028", "\x85", "\x0b"]).map(str.encode) | st.binary(
    max_size=5
)
LINE = st.builds("{}{}".format, st.sampled_from(LINES), ENDS).map(str.encode)
STREAMS = st.lists(st.one_of(LINE, LINE, LINE, NOISE), min_size=1, max_size=20).map(b"".join)


def by_the_book(stream: bytes) -> list[tuple[str, str]]:
    """The events as section 9.2.6 of the HTML Living Standard has them, but that one without data
    counts too."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    *lines, _cut_off = re.split("\r\n|\r|\n", text)
    events, values = [], list[tuple[str, str]]()
    for line in lines:
        if not line and values:
            kind = [value for name, value in values if name == "event"]
            data = "\n".join(value for name, value in values if name == "data")
            events.append((kind[-1] if kind and kind[-1] else "message", data.strip()))
            values = []
        elif line and not line.startswith(":"):
            name, _, value = line.partition(":")
            values.append((name, value.removeprefix(" ")))
    return [event for event in events if event != ("message", "")]


@given(STREAMS, st.lists(st.integers(0, 60)))
def test_a_stream_says_the_same_however_it_is_cut(stream: bytes, cuts: list[int]) -> None:
    tried("streams cut up")
    ends = [0, *sorted(cuts), len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(ends) if a < b]
    assert b"".join(pieces) == stream
    assert parsed(pieces) == by_the_book(stream)


@given(ANY_TEXT | ANY_JSON.map(json.dumps), st.text(max_size=9))
def test_what_an_event_says_is_never_an_error(data: str, header: str) -> None:
    tried("events and headers")
    assert 90 <= mailroom.quiet_limit(data) <= 1800
    assert 0 <= mailroom.retry_after({"Retry-After": header}) <= mailroom.MAX_RETRY_AFTER
    seen = mailroom.SeenStates()
    seen.reported(data)
    assert seen.has_news("u1") in (True, False)


# ------------------------------------------------------------------------- replies of any shape


def mangled(value: Any, random: Random, wrong: Sequence[Any]) -> Any:
    """A JSON value with other things at some of its places."""
    for by in wrong:
        path = random.choice(list(places(value)))
        value = replaced(value, path, by)
    return value


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nth=st.integers(1, 5),
    # Not one that Hypothesis watches: the server's greenlet uses it.
    random=st.integers(0, 2**32).map(Random),
    wrong=st.lists(ANY_JSON | st.sampled_from([[], {}, None, 7]), min_size=1, max_size=3),
)
def test_a_reply_of_any_shape_is_an_error_of_the_server_and_passes(
    scene: Scene, nth: int, random: Random, wrong: list[Any]
) -> None:
    tried("JMAP replies")
    number = len(scene.account.mails)
    mails = scene.new_sender(f"Sender {number} <s{number}@x.example>", 2)
    scene.tap(mails[0], "@ToFeed")
    scene.server.faults[:] = [Fault(nth=nth, edit=lambda reply: mangled(reply, random, wrong))]
    crashes = list(crash(scene.cycle, f"reply {nth}"))
    scene.server.faults.clear()
    scene.heal()
    assert not crashes
    assert not scene.labelled()
    assert "Feed" in scene.account.mailboxes_of(mails[0])


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Scene() as scene:
        yield scene


SESSION: dict[str, Any] = {
    "capabilities": {mailroom.CORE: {"maxObjectsInGet": 500}, mailroom.MAIL: {}},
    "accounts": {"u1": {"isReadOnly": False}},
    "primaryAccounts": {mailroom.MAIL: "u1", mailroom.CONTACTS: "u1"},
    "username": "alice@home.example",
    "apiUrl": "/api/",
    "eventSourceUrl": "/events/?types={types}",
}


@given(
    st.randoms(use_true_random=False),
    st.lists(ANY_JSON | URLS | st.integers(-1, 1), min_size=1, max_size=3),
)
def test_a_session_of_any_shape_is_a_session_or_an_error(random: Random, wrong: list[Any]) -> None:
    tried("sessions")
    client = mailroom.JMAPClient("token", "mail.example")
    with responses.RequestsMock() as web:
        web.get(client.session_url, body=json.dumps(mangled(SESSION, random, wrong)))
        assert not list(crash(client.connect, "session"))
    assert all(map(mailroom.is_safe_url, client._urls.values()))
    assert min(client.limits.values()) >= 1


# --------------------------------------------------------------------------------------- CardDAV

DATA = "<D:creationdate>2025</D:creationdate><C:address-data>{}</C:address-data>"
RESPONSE = re.search("<D:response>.*</D:response>", MULTISTATUS)
assert RESPONSE
LISTING = MULTISTATUS.replace(
    RESPONSE[0],
    "".join(
        RESPONSE[0].replace("/book/", f"/book/{n}.vcf").format(
            FOUND.format(DATA.format(vcard(f"UID:{n}", f"EMAIL:{n}@x.example", eol="\n")))
        )
        for n in "ab"
    ),
)  # fmt: skip
HOMES = MULTISTATUS.format(
    ADDRESS_BOOK
    + FOUND.format(
        "<D:current-user-principal><D:href>/p/</D:href></D:current-user-principal>"
        "<C:addressbook-home-set><D:href>/h/</D:href></C:addressbook-home-set>"
        '<C:supported-address-data><C:address-data-type version="4.0"/></C:supported-address-data>'
    )
)
DAV_URL = "https://dav.example/book/"


def asked(places_: str, listing: str) -> list[Card]:
    """What a CardDAV server brings that answers so."""
    store = mailroom.CardDAVContacts(DAV_URL, mailroom.credentials("p", "u"), bool)
    anywhere = re.compile(".*")
    with responses.RequestsMock(assert_all_requests_are_fired=False) as web:
        web.add("PROPFIND", anywhere, places_.encode("utf-8", "replace"), status=207)
        web.add("REPORT", anywhere, listing.encode("utf-8", "replace"), status=207)
        store.prepare()
        return store.cards(["a@x.example", "b@x.example"], [], [])


def meddled(listing: str, random: Random) -> str:
    """A multistatus with something left out, doubled, renamed, emptied, or cut off."""
    root = ElementTree.fromstring(listing)  # noqa: S314  (it is ours)
    for _ in range(random.randrange(1, 4)):
        parents = [each for each in root.iter() if len(each)]
        if not parents:
            break
        parent = random.choice(parents)
        child = random.choice(list(parent))
        match random.randrange(5):
            case 0:
                parent.remove(child)
            case 1:
                parent.append(child)
            case 2:
                child.tag = random.choice([each.tag for each in root.iter()])
            case 3:
                child.text = random.choice(
                    [None, "", "http://[", "//evil.example/", "HTTP/1.1 200 OK"]
                )
            case 4:
                child[:] = []
    text = ElementTree.tostring(root, encoding="unicode")
    return text[: random.randrange(len(text))] if random.randrange(9) == 0 else text


@given(st.randoms(use_true_random=False), st.booleans())
def test_a_multistatus_of_any_shape_is_an_answer_or_an_error(random: Random, early: bool) -> None:
    tried("multistatus replies")
    homes = meddled(HOMES, random) if early else HOMES
    listing = LISTING if early else meddled(LISTING, random)
    assert not list(crash(lambda: asked(homes, listing), f"{homes} {listing}"))


def test_whatever_is_left_out_of_a_listing_no_contact_is_overlooked() -> None:
    """A contact that is not seen would be made a second time."""
    assert [card.uid[-1] for card in asked(HOMES, LISTING)] == ["a", "b"]
    paths = [(i, j) for i, j in enumerate(ElementTree.fromstring(LISTING).iter())]  # noqa: S314
    for at, _ in paths[1:]:
        root = ElementTree.fromstring(LISTING)  # noqa: S314  (it is ours)
        gone = list(root.iter())[at]
        [parent] = [each for each in root.iter() if gone in list(each)]
        parent.remove(gone)
        if gone.tag.endswith("}response"):
            continue
        try:
            cards = asked(HOMES, ElementTree.tostring(root, encoding="unicode"))
        except MailroomError:
            continue
        assert [card.uid[-1] for card in cards] == ["a", "b"], gone.tag
        assert all(card.ref for card in cards), gone.tag
