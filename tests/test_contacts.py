"""Contacts on real servers: what Mailroom makes, finds and changes in an address book, and that it
leaves the rest alone. One set of tests for each store: JMAP, CardDAV on Radicale and on Cyrus."""

import dataclasses
import re
import urllib.parse
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import ports
import pytest
import radicale_server
import requests
import responses
import tools
from books import (
    CATEGORIES,
    GROUPS,
    PHONE,
    V4_TYPE,
    Book,
    DAVBook,
    JMAPBook,
    Seen,
    cyrus_book,
    radicale_book,
)
from cyrus_server import CyrusServer
from homes import Fate, fate, is_write
from jmap_server import Options
from radicale_server import RadicaleServer

import mailroom
from mailroom import (
    CREATED_NOTE,
    Card,
    CardChange,
    CardDAVContacts,
    ConfigurationError,
    MailroomError,
    ServerError,
    canonical_uid,
    contact_uid,
    credentials,
    group_uid,
    vcard_lines,
)

BOB, EVE = "bob@shop.example", "eve@other.example"
TRIAGED = "Triaged to Feed on 2025-01-01"


# ------------------------------------------------------------------------- what is on the wire


@pytest.fixture
def wire() -> Iterator[Fate]:
    with fate() as wire:
        yield wire


def before_write(do: Callable[[], object]) -> Callable[[requests.PreparedRequest], str]:
    """Lets something be done before the first request that writes."""
    waiting = [do]

    def befall(request: requests.PreparedRequest) -> str:
        if is_write(request) and waiting:
            waiting.pop()()
        return ""

    return befall


# ----------------------------------------------------------------------------------- the stores


def on(*names: str) -> list[Any]:
    """Parameters for stores; those on Cyrus are for where it is installed."""
    marks = {"cyrus": [pytest.mark.cyrus]}
    return [pytest.param(name, marks=marks.get(name.split()[0], [])) for name in names]


def book_of(name: str, request: pytest.FixtureRequest) -> Any:
    server, _, style = name.partition(" ")
    if server == "jmap":
        return JMAPBook(Options.cyrus() if style else Options())
    make: Callable[..., DAVBook] = radicale_book if server == "radicale" else cyrus_book
    return make(request.getfixturevalue(server), style == "v4")


DAV = on("radicale", "cyrus")
STORES = on("jmap", "jmap of cyrus", "radicale", "radicale v4", "cyrus", "cyrus v4")


@pytest.fixture(params=STORES)
def book(request: pytest.FixtureRequest) -> Iterator[Book]:
    book = book_of(request.param, request)
    with book.mail:
        yield book
    assert not book.mail.crashes


@pytest.fixture(params=DAV)
def dav(request: pytest.FixtureRequest) -> Iterator[DAVBook]:
    book = book_of(request.param, request)
    with book.mail:
        yield book


# -------------------------------------------------------------------------- one change at a time


def new_contact(address: str, name: str, is_person: bool = False) -> CardChange:
    uid = contact_uid(address)
    note = (CREATED_NOTE, TRIAGED)
    return CardChange(
        uid, address=address, name=name, kind="person" if is_person else "company", note=note
    )


def card_of(cards: Iterable[Card], uid: str) -> Card:
    [card] = [card for card in cards if card.uid == uid]
    return card


def edit(book: Book, uid: str, address: str = BOB, **change: Any) -> dict[str, str]:
    """Read a card and apply a change to it, again when someone else was quicker."""
    for _ in range(3):
        card = card_of(book.read(address), uid)
        try:
            return dict(book.contacts.apply([CardChange(uid, card, **change)]))
        except mailroom.MethodError:
            continue
    raise AssertionError("three attempts were not enough")


@pytest.mark.parametrize("is_person", [True, False], ids=["person", "company"])
@pytest.mark.parametrize("name", ["Bob Smith", "B\u00f6b; Shop, \\n \U0001f600 Inc.", "Bob " * 40])
def test_a_new_contact(book: Book, name: str, is_person: bool) -> None:
    name, uid = name.strip(), contact_uid(BOB)
    assert book.read(BOB) == []
    assert book.contacts.apply([new_contact(BOB, name, is_person)]) == {}
    note, kind = f"{CREATED_NOTE}\n{TRIAGED}", "person" if is_person else "company"
    assert book.seen() == {uid: Seen(name, frozenset({BOB}), note, kind)}
    card = card_of(book.read(BOB), uid)
    assert (card.name, set(card.emails), card.is_group) == (name, {BOB}, False)
    assert card.note_lines == [CREATED_NOTE, TRIAGED]


@pytest.mark.parametrize("asked", ["bob@shop.example", "robert@home.example"])
def test_a_contact_is_found_by_any_of_its_addresses_in_any_case(book: Book, asked: str) -> None:
    uid = book.add("Bob@Shop.EXAMPLE", "robert@home.example", name="Bob")
    card = card_of(book.read(asked), uid)
    assert card.emails == {"bob@shop.example", "robert@home.example"}
    assert (card.name, card.notes) == ("Bob", {})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, TRIAGED),
        ("", TRIAGED),
        ("A good shop.", f"A good shop.\n{TRIAGED}"),
        (
            "One; two,\nthree \\ \U0001f600" * 9,
            "One; two,\nthree \\ \U0001f600" * 9 + f"\n{TRIAGED}",
        ),
    ],
    ids=["none", "empty", "some", "long"],
)
def test_a_note_grows(book: Book, before: str | None, after: str) -> None:
    escaped = before if isinstance(book, JMAPBook) or not before else mailroom.vcard_escape(before)
    uid = book.add(BOB, note=escaped)
    assert edit(book, uid, note=(TRIAGED,)) == {}
    seen = book.seen()[uid]
    assert (seen.note.strip(), seen.name, set(seen.emails)) == (after, "Bob", {BOB})
    assert TRIAGED in card_of(book.read(BOB), uid).note_lines


def test_an_empty_name_is_filled(book: Book) -> None:
    uid = book.add(BOB, name="", note="kept")
    assert card_of(book.read(BOB), uid).name == ""
    assert edit(book, uid, name="Bob; Shop") == {}
    assert book.seen()[uid] == Seen("Bob; Shop", frozenset({BOB}), "kept")


def test_groups_are_joined_and_left(book: Book) -> None:
    bob, eve = book.add(BOB), book.add(EVE, name="Eve")
    feed, jail = book.add_group("Feed"), book.add_group("Jail", eve)

    def members() -> list[Collection[str]]:
        groups = book.read()
        assert all(card_of(groups, uid).is_group for uid in (feed, jail))
        assert [card_of(groups, uid).name for uid in (feed, jail)] == ["Feed", "Jail"]
        seen = book.seen()
        for uid in (feed, jail):
            assert card_of(groups, uid).members == seen[uid].members
        return [seen[uid].members for uid in (feed, jail)]

    assert members() == [set(), {eve}]
    assert edit(book, feed, add=frozenset({bob, eve})) == {}
    assert edit(book, jail, add=frozenset({bob})) == {}
    assert members() == [{bob, eve}, {bob, eve}]
    assert edit(book, feed, remove=frozenset({eve})) == {}
    assert edit(book, feed, remove=frozenset({eve})) == {}
    assert edit(book, jail, add=frozenset({bob})) == {}
    assert members() == [{bob}, {bob, eve}]
    assert edit(book, feed, remove=frozenset({bob})) == {}
    assert members() == [set(), {bob, eve}]


@pytest.mark.parametrize("what", ["contact", "group"])
def test_what_someone_else_edits_in_between_is_not_overwritten(
    book: Book, wire: Fate, what: str
) -> None:
    bob = book.add(BOB, note="old")
    feed = book.add_group("Feed")
    uid = bob if what == "contact" else feed
    change: dict[str, Any] = (
        {"note": (TRIAGED,)} if what == "contact" else {"add": frozenset({bob})}
    )
    wire.befall = before_write(lambda: book.meddle(uid))
    assert edit(book, uid, **change) == {}
    assert len(wire.writes) == 2
    seen = book.seen()[uid]
    assert seen.phones == {PHONE}
    assert (seen.note, set(seen.members)) == (
        (f"old\n{TRIAGED}", set()) if what == "contact" else ("", {bob})
    )


def test_a_contact_is_never_made_twice(book: Book) -> None:
    book.read(BOB)
    assert book.contacts.apply([new_contact(BOB, "Bob")]) == {}
    before = book.seen()
    book.read(BOB)
    refused = book.contacts.apply([new_contact(BOB, "Robert")])
    assert refused.keys() == {contact_uid(BOB)}
    assert book.seen() == before


def test_a_contact_that_someone_else_makes_in_between_is_not_overwritten(
    book: Book, wire: Fate
) -> None:
    twin = book.twin()
    assert book.read(BOB) == []
    wire.befall = before_write(lambda: twin.apply([new_contact(BOB, "Robert")]))
    with suppress(mailroom.MethodError):
        assert book.contacts.apply([new_contact(BOB, "Bob")]).keys() == {contact_uid(BOB)}
    assert [seen.name for seen in book.seen().values()] == ["Robert"]


@pytest.mark.parametrize("what", ["contact", "group"])
def test_a_card_that_is_deleted_in_between_stays_deleted(book: Book, wire: Fate, what: str) -> None:
    bob = book.add(BOB)
    feed = book.add_group("Feed")
    uid = bob if what == "contact" else feed
    change: dict[str, Any] = (
        {"note": (TRIAGED,)} if what == "contact" else {"add": frozenset({bob})}
    )
    card = card_of(book.read(BOB), uid)
    wire.befall = before_write(lambda: book.remove(uid))
    with suppress(mailroom.MethodError):
        assert book.contacts.apply([CardChange(uid, card, **change)]).keys() == {uid}
    assert book.seen().keys() == {bob, feed} - {uid}


# ------------------------------------------------------------------------------- taken back


@pytest.mark.parametrize("kind", ["person", "company", "group"])
def test_what_nobody_has_touched_is_known_and_goes(book: Book, wire: Fate, kind: str) -> None:
    made = replace(new_contact(BOB, "Bob Smith"), kind=kind)
    if kind == "group":
        made = CardChange(group_uid("Feed"), name="Feed", kind=kind)
    eve = book.add(EVE, name="Eve")
    book.read()
    assert book.contacts.apply([made]) == {}
    card = card_of(book.read(BOB), made.uid)
    writes = len(wire.writes)
    assert book.contacts.untouched([card]) == {card.ref}
    assert len(wire.writes) == writes
    assert book.contacts.apply([CardChange(card.uid, card, destroy=True)]) == {}
    assert book.seen().keys() == {eve}


def test_what_is_the_users_or_touched_is_known(book: Book) -> None:
    book.add(BOB, name="Bob", note=f"{CREATED_NOTE}")
    book.read()
    assert book.contacts.apply([new_contact(EVE, "Eve")]) == {}
    book.meddle(contact_uid(EVE))
    cards = [card for card in book.read(BOB, EVE) if not card.is_group]
    touched = [card for card in cards if card.uid == contact_uid(EVE)]
    assert len(cards) == 2
    assert book.contacts.untouched(touched) == set()


def test_what_is_noted_after_it_was_listed_is_touched(book: Book) -> None:
    book.read()
    assert book.contacts.apply([new_contact(BOB, "Bob")]) == {}
    card = card_of(book.read(BOB), contact_uid(BOB))
    book.twin().apply([CardChange(card.uid, card, note=("my uncle",))])
    if card.ref in book.contacts.untouched([card]):  # then it cannot be destroyed any more
        with suppress(mailroom.MethodError):
            gone = CardChange(card.uid, card, destroy=True)
            assert book.contacts.apply([gone]).keys() == {card.uid}
    assert "my uncle" in book.seen()[card.uid].note


def test_what_is_touched_after_it_was_looked_at_does_not_go(book: Book, wire: Fate) -> None:
    book.read()
    assert book.contacts.apply([new_contact(BOB, "Bob")]) == {}
    card = card_of(book.read(BOB), contact_uid(BOB))
    assert book.contacts.untouched([card]) == {card.ref}
    wire.befall = before_write(lambda: book.meddle(card.uid))
    with suppress(mailroom.MethodError):
        assert book.contacts.apply([CardChange(card.uid, card, destroy=True)]).keys() == {card.uid}
    assert book.seen()[card.uid].phones == {PHONE}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"{CREATED_NOTE}\n{TRIAGED}", ""),
        (f"One\\; two\\, three\n{TRIAGED}\nand more", "One; two, three\nand more"),
        (f"{TRIAGED}\n" + "x" * 200, "x" * 200),
        ("Mine", "Mine"),
    ],
    ids=["all", "some", "long", "none"],
)
def test_a_note_is_cleaned(book: Book, wire: Fate, before: str, after: str) -> None:
    uid = book.add(BOB, note=before.replace("\\", "") if isinstance(book, JMAPBook) else before)
    assert edit(book, uid, clean=True) == {}
    assert book.seen()[uid] == Seen("Bob", frozenset({BOB}), after)
    writes = len(wire.writes)
    assert writes == (after != "Mine")
    assert edit(book, uid, clean=True) == {}
    assert len(wire.writes) == writes


# ------------------------------------------------------------------------------- CardDAV itself


@pytest.mark.parametrize("depth", range(-1, 4))
def test_the_address_book_is_found_from_its_server_or_anywhere_on_the_way(
    dav: DAVBook, depth: int
) -> None:
    path = urllib.parse.urlsplit(dav.url).path.strip("/").split("/")
    at = "/".join(path[len(path) - depth + 1 :]) if depth > 1 else ""
    assert depth <= 1 or dav.url.endswith(f"{at}/")
    homes = {-1: dav.origin.rstrip("/"), 0: dav.origin, 1: dav.url, 2: dav.url.rstrip("/")}
    url = homes.get(depth, dav.url.removesuffix(f"{path[-1]}/"))
    contacts = dav.connected(url)
    assert contacts.apply([new_contact(BOB, "Bob")]) == {}
    assert [seen.name for seen in dav.seen().values()] == ["Bob"]


RICH = [
    "item1.EMAIL;type=INTERNET;type=pref:Bob@Shop.Example",
    "item1.X-ABLabel:_$!<Other>!$_",
    "email;type=HOME:robert@home.example",
    "item2.URL;type=pref:https://shop.example/a\\,b?c=d;e",
    'ADR;TYPE=WORK;X-LABEL="a:b;c,d":;;Main St. 1;Town;;12345;',
    "X-SOMETHING-ELSE;X-P=1:as it \\, is",
    "PHOTO;ENCODING=b;TYPE=JPEG:" + "/9j/4AAQSkZJRgAB" * 4,
    " " + "AQAAAQABAAD/2wBD" * 4,
    "NOTE:Das B\u00fcro \U0001f600 hat bis",
    "  18 Uhr\\, montags nie\\noffen",
]


def sent_lines(request: requests.PreparedRequest) -> list[str]:
    body = request.body
    assert isinstance(body, bytes)
    return vcard_lines(body.decode())


def test_what_is_not_ours_goes_back_byte_for_byte(dav: DAVBook, wire: Fate) -> None:
    url = dav.put("rich.vcf", "UID:rich-1", "FN:Bob", "N:;Bob;;;", *RICH)
    kept = dav.get(url)
    assert kept.count("shop.example") >= 1
    uid = canonical_uid("rich-1")
    assert edit(dav, uid, note=(TRIAGED,)) == {}
    [put] = wire.writes
    lines = vcard_lines(kept)
    [note] = [n for n, line in enumerate(lines) if line.startswith("NOTE")]
    lines[note] += f" \\n{TRIAGED}\r\n"
    assert sent_lines(put) == lines
    assert put.headers["If-Match"].strip('"')
    [seen] = dav.seen().values()
    assert seen.note == f"Das B\u00fcro \U0001f600 hat bis 18 Uhr, montags nie\noffen\n{TRIAGED}"


@pytest.mark.parametrize("lines", [[], ["X-EXTRA:1", "CATEGORIES:a\\,b,c"]])
def test_a_group_of_version_4_stays_one_byte_for_byte(
    dav: DAVBook, wire: Fate, lines: list[str]
) -> None:
    bob = dav.add(BOB)
    head = ["UID:urn:uuid:5f6b2c1e-0000-4000-8000-00000000000f", "FN:Feed", "N:Feed;;;;"]
    url = dav.put("feed.vcf", *head, "KIND:group", *lines, version="4.0")
    kept = dav.get(url)
    assert "VERSION:4.0" in kept
    uid = canonical_uid("5f6b2c1e-0000-4000-8000-00000000000f")
    assert edit(dav, uid, add=frozenset({bob})) == {}
    member = f"MEMBER:{bob}\r\nEND:VCARD"
    assert [*map(sent_lines, wire.writes)] == [vcard_lines(kept.replace("END:VCARD", member))]
    assert "VERSION:4.0" in dav.get(url)
    assert dav.seen()[uid].members == {bob}
    assert edit(dav, uid, remove=frozenset({bob})) == {}
    assert sorted(vcard_lines(dav.get(url))) == sorted(vcard_lines(kept))


def test_what_is_so_already_is_not_written(dav: DAVBook, wire: Fate) -> None:
    bob = dav.add(BOB)
    feed = dav.add_group("Feed", bob)
    assert edit(dav, feed, add=frozenset({bob})) == {}
    assert edit(dav, feed, remove=frozenset({canonical_uid("nobody")})) == {}
    assert wire.writes == []


@pytest.mark.parametrize(
    "lines",
    [
        ["EMAIL:bob@shop.example"],
        ["EMAIL;TYPE=WORK:eve@x.example", "EMAIL;TYPE=HOME:bob@shop.example"],
        ["item1.EMAIL;type=INTERNET:bob@shop.example", "item1.X-ABLabel:Shop"],
        ["item7.email:BOB@SHOP.EXAMPLE"],
        ['EMAIL;X-LABEL="a:b;c":bob@shop.example'],
        ["EMAIL:bob@shop", " .example"],
    ],
)
def test_an_address_is_found_however_it_is_written(dav: DAVBook, lines: list[str]) -> None:
    dav.put("b.vcf", "UID:b", "FN:Bob", "N:;Bob;;;", *lines)
    [card] = dav.read(BOB)
    assert BOB in card.emails


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["FN:", "N:;;;;"], ""),
        (["FN:Bob", "N:;;;;"], "Bob"),
        (["FN:", "N:;;;;", "ORG:Bob's Shop;"], "Bob's Shop"),
    ],
)
def test_a_name_is_found_wherever_it_is(dav: DAVBook, lines: list[str], name: str) -> None:
    dav.put("b.vcf", "UID:b", *lines, f"EMAIL:{BOB}")
    assert [card.name for card in dav.read(BOB)] == [name] == [card.name for card in dav.read_all()]


def test_all_address_books_are_read_and_the_first_gets_new_contacts(
    radicale: RadicaleServer,
) -> None:
    book = radicale_book(radicale)
    other = radicale.make_addressbook("a-second-one")
    try:
        other_book = DAVBook(radicale.url, other, book.login, version_4=False)
        eve = other_book.add(EVE, name="Eve")
        contacts = book.connected(radicale.url)
        assert [card.uid for card in contacts.cards([EVE], [], [])] == [eve]
        [card] = contacts.cards([EVE], [], [])
        changes = [CardChange(eve, card, note=(TRIAGED,)), new_contact(BOB, "Bob")]
        assert contacts.apply(changes) == {}
        assert other_book.seen()[eve].note == TRIAGED
        assert {*book.seen(), *other_book.seen()} == {eve, contact_uid(BOB)}
    finally:
        book.ask("DELETE", other)


# ------------------------------------------------------------------------ when it does not work

HTML = "<html><body>Welcome!</body></html>"
EMPTY = '<multistatus xmlns="DAV:"/>'
NOBODY = """<multistatus xmlns="DAV:"><response><href>/</href><propstat><prop>
<current-user-principal><unauthenticated/></current-user-principal></prop>
<status>HTTP/1.1 200 OK</status></propstat></response></multistatus>"""
BOMB = '<!DOCTYPE x [<!ENTITY a "' + "a" * 99 + '">' + "".join(
    f'<!ENTITY {chr(n + 1)} "{f"&{chr(n)};" * 99}">' for n in range(97, 107)
) + "]><multistatus xmlns=\"DAV:\">&k;</multistatus>"  # fmt: skip
URL, USER, PASSWORD = (f"MAILROOM_CARDDAV_{name}" for name in ("URL", "USERNAME", "PASSWORD"))
ANSWERS: dict[str, tuple[dict[str, Any], type[MailroomError], list[str]]] = {
    # what the server answers, which error that is and what it says
    "html": ({"body": HTML}, ServerError, [URL, "HTTP 200"]),
    "html as multistatus": ({"body": HTML, "status": 207}, ConfigurationError, [URL]),
    "broken html": ({"body": "<p>Hi<br>", "status": 207}, ServerError, [URL, "understood"]),
    "not utf-8": ({"body": b"\xff\xfe\xfd", "status": 207}, ServerError, [URL, "understood"]),
    "an entity bomb": ({"body": BOMB, "status": 207}, ServerError, [URL, "understood"]),
    "nothing there": ({"body": EMPTY, "status": 207}, ConfigurationError, [URL, USER]),
    "nobody": ({"body": NOBODY, "status": 207}, ConfigurationError, [URL, USER, PASSWORD]),
    "wrong password": ({"status": 401}, ConfigurationError, [URL, USER, PASSWORD]),
    "forbidden": ({"status": 403}, ConfigurationError, [URL, USER, PASSWORD]),
    "not found": ({"status": 404}, ServerError, [URL, "HTTP 404"]),
    "not allowed": ({"status": 405}, ServerError, [URL, "HTTP 405"]),
    "a fault": ({"status": 500}, ServerError, [URL, "HTTP 500"]),
    "busy": ({"status": 503, "headers": {"Retry-After": "7"}}, ServerError, [URL, "HTTP 503"]),
    "down": ({"body": requests.ConnectionError("refused")}, ServerError, [URL, "refused"]),
    "moved": (
        {"status": 301, "headers": {"Location": "https://elsewhere.example/"}},
        ConfigurationError,
        ["https://elsewhere.example/", "MAILROOM_CARDDAV_URL"],
    ),
    "a circle": (
        {"status": 301, "headers": {"Location": "/dav/"}},
        ServerError,
        [URL, "redirects"],
    ),
}


def trouble(contacts: CardDAVContacts) -> MailroomError:
    with pytest.raises(MailroomError) as caught:
        contacts.prepare()
    return caught.value


@pytest.mark.parametrize("place", ["https://dav.example", "https://dav.example/dav/"])
@pytest.mark.parametrize("case", ANSWERS)
def test_a_server_that_is_none_leads_to_an_error_that_names_the_setting(
    case: str, place: str
) -> None:
    answer, kind, said = ANSWERS[case]
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.add("PROPFIND", re.compile(r"https://dav\.example/.*"), **answer)
        error = trouble(CardDAVContacts(place, credentials("s3cret", "alice"), bool))
    assert (type(error), "s3cret" in str(error), "\n" in str(error)) == (kind, False, False)
    assert [word for word in said if word not in str(error)] == []
    if case == "busy":
        assert getattr(error, "retry_after", 0) == 7


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"password": "wrong"}, ConfigurationError, [USER, PASSWORD, "HTTP 401"]),
        ({"user": "nobody"}, ConfigurationError, [USER, PASSWORD, "HTTP 401"]),
        ({"path": "nowhere/"}, ConfigurationError, [URL, "HTTP 403"]),
        ({"path": "alice/none/"}, ServerError, [URL, "HTTP 404"]),
        ({"path": "alice/contacts/"}, None, []),
    ],
)
def test_radicale_given_the_wrong_settings(
    radicale: RadicaleServer, change: dict[str, str], kind: type[MailroomError], said: list[str]
) -> None:
    given = {"user": radicale.username, "password": radicale.password, "path": "", **change}
    auth = credentials(given["password"], given["user"])
    contacts = CardDAVContacts(radicale.url + given["path"], auth, bool)
    if kind is None:
        return contacts.prepare()
    error = trouble(contacts)
    assert (type(error), [word for word in said if word not in str(error)]) == (kind, [])
    return None


@pytest.mark.cyrus
@pytest.mark.parametrize(
    ("user", "path", "said"),
    [
        ("nobody", "", [URL, "HTTP 500"]),
        ("alice", "nowhere/", [URL, "HTTP 405"]),
        ("alice", "jmap/", [URL, "HTTP 405"]),
        ("alice", "dav/addressbooks/user/{user}/none/", [URL, "HTTP 404"]),
    ],
)
def test_cyrus_given_the_wrong_settings(
    cyrus: CyrusServer, user: str, path: str, said: list[str]
) -> None:
    name = cyrus.add_user(f"alice{uuid.uuid4().hex}").name if user == "alice" else user
    url = f"{cyrus.origin}/{path.format(user=name)}"
    error = trouble(CardDAVContacts(url, credentials("any", name), bool))
    assert (type(error), [word for word in said if word not in str(error)]) == (ServerError, [])


def test_a_server_that_is_down_is_worth_another_try() -> None:
    url = f"http://127.0.0.1:{ports.free_port()}/"
    error = trouble(CardDAVContacts(url, credentials("any", "alice"), bool))
    assert type(error) is ServerError
    assert (URL in str(error), "refused" in str(error)) == (True, True)


@pytest.mark.cyrus
def test_an_address_book_on_cyrus_that_is_read_only_is_none(cyrus: CyrusServer) -> None:
    carol = cyrus.add_user("carol")
    auth = credentials("any", carol.username)
    CardDAVContacts(cyrus.origin, auth, bool).prepare()
    with cyrus.imap("cyrus") as admin:
        box = f'"user/carol/#addressbooks/Default@{cyrus.domain}"'
        assert admin.setacl(box, carol.username, "lr")[0] == "OK"
    error = trouble(CardDAVContacts(cyrus.origin, auth, bool))
    assert type(error) is ConfigurationError
    assert (URL in str(error), "write" in str(error)) == (True, True)


def test_an_address_book_on_radicale_that_is_read_only_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def make_on_disk(server: RadicaleServer, name: str) -> None:
        book = server.home / "collections" / "collection-root" / server.username / name
        book.mkdir(parents=True)
        (book / ".Radicale.props").write_text('{"tag": "VADDRESSBOOK"}')

    rights = tmp_path / "rights"
    rights.write_text("[all]\nuser: .+\ncollection: .*\npermissions: Rr\n")
    config = f"[rights]\ntype = from_file\nfile = {rights}\n"
    monkeypatch.setattr(radicale_server, "CONFIG", radicale_server.CONFIG + config)
    monkeypatch.setattr(RadicaleServer, "make_addressbook", make_on_disk)
    with RadicaleServer() as server:
        auth = credentials(server.password, server.username)
        error = trouble(CardDAVContacts(server.url, auth, bool))
    assert type(error) is ConfigurationError
    assert (URL in str(error), "write" in str(error)) == (True, True)


# ------------------------------------------------------------------------- whole triage cycles


class Desk:
    """A mail account, with its contacts in a book, and a Mailroom at work."""

    def __init__(self, book: Book, groups: Iterable[str] = GROUPS) -> None:
        self.book, self.mail = book, book.mail
        self.groups = {name: book.add_group(name) for name in groups}
        settings = tools.settings_for(self.mail, triage_categories=[*CATEGORIES], **book.settings)
        self.triage = tools.new_triage(settings)

    def tap(self, sender: str, label: str, mails: int = 1) -> list[str]:
        """Mails arrive in the Screener, and one of them gets a label."""
        ids = [self.mail.account.deliver(sender, ["Screener"]) for _ in range(mails)]
        self.mail.account.label(ids[0], label)
        return ids

    def cycle(self) -> dict[str, str]:
        return self.triage.run()

    def heal(self) -> None:
        """Cycles until one goes well."""
        for _ in range(4):
            with suppress(MailroomError):
                if not self.cycle():
                    return
        raise AssertionError("it does not heal")

    def boxes(self, mails: Iterable[str]) -> list[set[str]]:
        return [self.mail.account.mailboxes_of(mail) for mail in mails]

    def contacts(self) -> dict[str, tuple[Seen, set[str]]]:
        """Each contact by its first address, with the groups it is in."""
        seen = self.book.seen()
        names = {uid: name for name, uid in self.groups.items()}
        return {
            min(card.emails): (card, {names[g] for g in names if uid in seen[g].members})
            for uid, card in seen.items()
            if card.kind != "group"
        }


def triaged_to(*groups: str) -> list[str]:
    return [f"Triaged to {group} on {date.today().isoformat()}" for group in groups]


def test_a_new_sender_is_triaged_and_then_nothing_is_left_to_do(book: Book, wire: Fate) -> None:
    desk = Desk(book)
    mails = desk.tap("Bob Smith <Bob@Shop.example>", "@ToPerson", mails=3)
    assert desk.cycle() == {}
    [(seen, groups)] = desk.contacts().values()
    note = "\n".join([CREATED_NOTE, *triaged_to("Person")])
    assert seen == Seen("Bob Smith", frozenset({BOB}), note, "person")
    assert groups == {"Person", "Imbox", "Mailroom"}
    assert desk.boxes(mails) == [{"Person", "Imbox"}] * 3
    start, before = len(wire.sent), book.seen()
    assert desk.cycle() == {}
    assert [is_write(request) for request in wire.sent[start:]] == [False]
    assert book.seen() == before


def test_an_idle_cycle_asks_radicale_nothing(radicale: RadicaleServer) -> None:
    book = radicale_book(radicale)
    with book.mail:
        desk = Desk(book)
        desk.tap(f"Bob <{BOB}>", "@ToFeed")
        assert desk.cycle() == {}
        log = radicale.home / "log"
        asked = log.read_text().count(" request for ")
        assert desk.cycle() == {}
        assert log.read_text().count(" request for ") == asked > 0


def test_a_sender_is_triaged_again(book: Book) -> None:
    desk = Desk(book)
    mails = desk.tap(f"Bob <{BOB}>", "@ToPerson", mails=2)
    for label, groups in [
        ("Person", {"Person", "Imbox"}),
        ("Imbox", {"Imbox"}),
        ("Jail", {"Jail"}),
    ]:
        desk.mail.account.label(mails[1], f"@To{label}")
        assert desk.cycle() == {}
        [(seen, joined)] = desk.contacts().values()
        assert joined == {*groups, "Mailroom"}
        assert seen.note.splitlines()[-1:] == triaged_to(label)
        assert desk.boxes(mails) == [groups] * 2
    assert seen.note.splitlines() == [CREATED_NOTE, *triaged_to("Person", "Imbox", "Jail")]


def test_a_contact_of_the_users_keeps_all_it_has(book: Book) -> None:
    desk = Desk(book)
    uid = book.add("Bob@Shop.EXAMPLE", "bob@home.example", name="Bobby", note="Old friend")
    friends = book.add_group("Friends", uid)
    book.meddle(uid)
    mails = desk.tap(f"Bob Smith <{BOB}>", "@ToFeed") + desk.tap("bob@home.example", "@ToFeed")
    assert desk.cycle() == {}
    seen = book.seen()
    emails = frozenset({"Bob@Shop.EXAMPLE", "bob@home.example"})
    note = "\n".join(["Old friend", *triaged_to("Feed")])
    assert seen[uid] == Seen("Bobby", emails, note, "person", phones=frozenset({PHONE}))
    assert {name for name, group in desk.groups.items() if uid in seen[group].members} == {"Feed"}
    assert (len(desk.contacts()), set(seen[friends].members)) == (1, {uid})
    assert desk.boxes(mails) == [{"Feed", "@MailroomWarning"}, {"Feed"}]


def test_a_contact_whose_address_the_user_changed_is_left_and_another_made(book: Book) -> None:
    desk = Desk(book)
    desk.tap(f"Bob <{BOB}>", "@ToFeed")
    assert desk.cycle() == {}
    uid = contact_uid(BOB)
    change_address(book, uid, "bob@new.example")
    desk.tap(f"Bob <{BOB}>", "@ToJail")
    assert desk.cycle() == {}
    contacts = desk.contacts()
    assert {address: groups for address, (_, groups) in contacts.items()} == {
        "bob@new.example": {"Feed", "Mailroom"},
        BOB: {"Jail", "Mailroom"},
    }
    assert book.seen()[contact_uid(BOB, {uid})].emails == {BOB}


def change_address(book: Book, uid: str, address: str) -> None:
    """Someone else gives a contact another address."""
    if isinstance(book, JMAPBook):
        card = book.account.cards[book.account.by_uid[uid]]
        book.account.put_card({**card, "emails": {"e1": {"address": address}}})
    elif isinstance(book, DAVBook):
        url = book.url_of(uid)
        text = book.get(url).replace(BOB, address)
        book.ask("PUT", url, text, Content_Type="text/vcard; charset=utf-8")


def undisturbed(book: Book) -> tuple[Desk, list[str]]:
    """Bob is in Feed by an earlier decision; now Bob goes to Jail and Eve, who is new, to Feed."""
    desk = Desk(book)
    mails = desk.tap(f"Bob <{BOB}>", "@ToFeed")
    assert desk.cycle() == {}
    desk.mail.account.label(mails[0], "@ToJail")
    return desk, [*mails, *desk.tap(f"Eve <{EVE}>", "@ToFeed", mails=2)]


def check_end(desk: Desk, mails: list[str]) -> None:
    contacts = desk.contacts()
    assert {address: groups for address, (_, groups) in contacts.items()} == {
        BOB: {"Jail", "Mailroom"},
        EVE: {"Feed", "Mailroom"},
    }
    notes = [contacts[address][0].note.splitlines() for address in (BOB, EVE)]
    assert notes == [
        [CREATED_NOTE, *triaged_to("Feed", "Jail")],
        [CREATED_NOTE, *triaged_to("Feed")],
    ]
    assert desk.boxes(mails) == [{"Jail"}, {"Feed"}, {"Feed"}]


@pytest.mark.parametrize("what", ["lost", "reply lost"])
@pytest.mark.parametrize("nth", range(1, 9))
@pytest.mark.parametrize("book", on("jmap", "radicale", "cyrus"), indirect=True)
def test_a_write_that_is_lost_is_made_up_for(book: Book, wire: Fate, nth: int, what: str) -> None:
    desk, mails = undisturbed(book)
    last = len(wire.writes) + nth
    wire.befall = lambda each: what if is_write(each) and len(wire.writes) == last else ""
    desk.heal()
    check_end(desk, mails)
    asked = len(wire.writes)
    assert desk.cycle() == {}
    assert len(wire.writes) == asked


def test_a_contact_that_cannot_be_made_is_in_no_group_and_keeps_its_label(
    dav: DAVBook, wire: Fate
) -> None:
    desk = Desk(dav)
    [mail] = desk.tap(f"Bob <{BOB}>", "@ToFeed")
    twin = f"{uuid.UUID(contact_uid(BOB))}.vcf"
    wire.befall = before_write(lambda: dav.put(twin, "UID:other", "FN:Other", "N:;Other;;;"))
    assert desk.cycle() == {BOB: f"contact card {contact_uid(BOB)}: HTTP 412"}
    assert desk.boxes([mail]) == [{"Screener", "@ToFeed"}]
    assert not any(seen.members for seen in dav.seen().values())
    assert len(wire.writes) == 1


def test_a_missing_group_is_named(book: Book) -> None:
    desk = Desk(book, groups=GROUPS[:-1])
    with pytest.raises(ConfigurationError, match="no contact group 'Mailroom'"):
        desk.cycle()


def test_a_group_that_the_user_deletes_later_is_named_and_nothing_is_done(book: Book) -> None:
    desk = Desk(book)
    assert desk.cycle() == {}
    book.remove(desk.groups.pop("Jail"))
    [mail] = desk.tap(f"Bob <{BOB}>", "@ToFeed")
    with pytest.raises(ConfigurationError, match="no contact group 'Jail'"):
        desk.cycle()
    assert (desk.boxes([mail]), desk.contacts()) == ([{"Screener", "@ToFeed"}], {})


# What a review brought to light: answers that no server here gives

MULTISTATUS = (
    '<D:multistatus xmlns:D="DAV:" xmlns:C="urn:ietf:params:xml:ns:carddav"><D:response>'
    "<D:href>/book/</D:href>{}</D:response></D:multistatus>"
)
FOUND = "<D:propstat><D:prop>{}</D:prop><D:status>HTTP/1.1 200 OK</D:status></D:propstat>"
ADDRESS_BOOK = FOUND.format("<D:resourcetype><D:collection/><C:addressbook/></D:resourcetype>")


@pytest.mark.parametrize(
    "listing",
    [
        "<D:status>HTTP/1.1 507 Insufficient Storage</D:status>",
        FOUND.format("<D:creationdate/>"),
        FOUND.format("<C:address-data/>").replace("200 OK", "404 Not Found"),
    ],
    ids=["cut short", "no data", "data not found"],
)
@responses.activate
def test_a_listing_that_is_not_whole_is_no_listing(listing: str) -> None:
    """A contact that is not seen would be made a second time."""
    url = "https://dav.example/book/"
    responses.add("PROPFIND", url, MULTISTATUS.format(ADDRESS_BOOK), status=207)
    responses.add("REPORT", url, MULTISTATUS.format(listing), status=207)
    store = mailroom.CardDAVContacts(url, mailroom.credentials("p", "u"), bool)
    store.prepare()
    with pytest.raises(mailroom.ServerError, match="cannot be understood"):
        store.cards([], [], [])


# ------------------------------------------------------- what is known of an address book (CardDAV)


def by_uid(cards: Iterable[Card]) -> dict[str, Card]:
    found = {card.uid: card for card in cards}
    assert len(found) == len([*cards])
    return found


def reports(requests_: Iterable[requests.PreparedRequest]) -> list[str]:
    """What was asked of an address book, in a word each."""
    words = ("sync-collection", "addressbook-multiget", "VERSION", "addressbook-query")
    bodies = [str(request.body) for request in requests_ if request.method == "REPORT"]
    return [next(word for word in words if word in body) for body in bodies]


def test_all_cards_are_listed_once_and_then_what_others_have_changed(
    dav: DAVBook, wire: Fate
) -> None:
    bob = dav.add(BOB)
    assert len(dav.read(BOB)) == 1
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: dav.add(EVE, name="Eve"),
        lambda: dav.add_group("Feed", bob),
        lambda: dav.put("bob.vcf", "UID:bob", "FN:B", "N:;B;;;", f"item1.EMAIL:{BOB}"),
        lambda: dav.put("bob.vcf", "UID:bob", "FN:B", "N:;B;;;", f"item1.EMAIL:{EVE}"),
        lambda: dav.remove(bob),
        lambda: dav.put(f"{uuid.UUID(bob)}.vcf", f"UID:{uuid.UUID(bob)}", "FN:C", "N:;C;;;"),
    ]
    for change in changes:
        del wire.sent[:]
        change()
        there = dav.read(BOB)
        asked = reports(wire.sent)
        assert asked[0] == "sync-collection"
        assert "addressbook-query" not in asked
        assert by_uid(there) == by_uid(dav.twin().cards([BOB], [], []))
        wanted = [card for card in dav.read_all() if card.is_group or BOB in card.emails]
        assert by_uid(there) == by_uid(wanted)


@pytest.mark.parametrize("token", ["<D:sync-token>data:,1-1</D:sync-token>", "<D:sync-token/>", ""])
def test_all_cards_are_listed_again_when_the_server_cannot_tell_the_changes(
    dav: DAVBook, token: str
) -> None:
    uids, contacts = {dav.add(BOB)}, dav.contacts
    assert by_uid(dav.read(BOB, EVE)).keys() == uids
    for url, known in contacts._books.items():
        contacts._books[url] = dataclasses.replace(known, token=token)
    uids.add(dav.add(EVE, name="Eve"))
    assert by_uid(dav.read(BOB, EVE)).keys() == uids


def test_of_other_contacts_nothing_is_kept(dav: DAVBook) -> None:
    """Of contacts whose turn is over neither: memory does not grow with the address book, but by a
    few bytes for each."""
    dav.add(EVE, name="Eve")
    bob, feed = dav.add(BOB), dav.add_group("Feed")
    assert by_uid(dav.read(BOB)).keys() == {bob, feed}
    assert len(dav.contacts._vcards) == 2
    dav.read("nobody@x.example")
    assert len(dav.contacts._vcards) == 1


# A batch of senders costs two reads, and then a write for each card


def adding(uid: str) -> dict[str, Any]:
    return {"add": frozenset({uid})}


def removing(uid: str) -> dict[str, Any]:
    return {"remove": frozenset({uid})}


DAV_STYLES = pytest.mark.parametrize(
    "book", on("radicale", "radicale v4", "cyrus", "cyrus v4"), indirect=True
)


def asked(wire: Fate, work: Callable[[], object]) -> list[str | None]:
    """The methods of what a piece of work asks of single cards."""
    start = len(wire.sent)
    work()
    return [request.method for request in wire.sent[start:] if request.method != "REPORT"]


@DAV_STYLES
def test_what_is_read_is_written_without_another_look(book: Book, wire: Fate) -> None:
    bob, eve = book.add(BOB), book.add(EVE, name="Eve")
    feed = book.add_group("Feed")
    assert asked(wire, lambda: edit(book, bob, note=("one",))) == ["PUT"]
    assert asked(wire, lambda: edit(book, feed, **adding(eve))) == ["PUT"]
    assert asked(wire, lambda: edit(book, bob, note=("two",))) == ["PUT"]
    book.contacts.prepare()
    assert asked(wire, lambda: edit(book, feed, **removing(eve), **adding(bob))) == ["PUT"]
    seen = book.seen()
    assert (set(seen[feed].members), seen[bob].note) == ({bob}, "one\ntwo")


@DAV_STYLES
def test_a_group_is_joined_and_then_left_without_another_look(book: Book, wire: Fate) -> None:
    """As where one sender joins it and another one leaves it."""
    bob, eve, feed = book.add(BOB), book.add(EVE, name="Eve"), book.add_group("Feed")
    card = card_of(book.read(), feed)
    for change in (adding(bob), adding(eve), removing(bob)):
        work = CardChange(feed, card, **change)
        assert asked(wire, lambda: book.contacts.apply([work])) == ["PUT"]  # noqa: B023
    assert book.seen()[feed].members == {eve}


@DAV_STYLES
def test_a_known_sender_costs_two_reports_for_each_version(book: Book, wire: Fate) -> None:
    bob, feed = book.add(BOB), book.add_group("Feed")
    for _ in "12":  # the first brings the cards, but the token is one from before
        book.read()
    for note in ("one", "two"):
        start = len(wire.sent)
        cards = book.read(BOB)
        changes = [CardChange(bob, card_of(cards, bob), note=(note,))]
        changes.append(CardChange(feed, card_of(cards, feed), **adding(note)))
        assert book.contacts.apply(changes) == {}
        two = isinstance(book, DAVBook) and book.version_4 and is_cyrus(book) and note == "two"
        reads = ["addressbook-multiget"] * (1 + two)
        assert reports(wire.sent[start:]) == ["sync-collection", *reads]


def is_cyrus(book: Book) -> bool:
    """Whether there may be vCards 4.0, as far as the server says."""
    return any(each.has_version_4 for each in book.contacts._books.values())


@DAV_STYLES
def test_which_cards_are_of_version_4_is_asked_when_others_have_written(
    book: Book, wire: Fate
) -> None:
    def asks() -> bool:
        start = len(wire.sent)
        book.read(BOB)
        return "VERSION" in reports(wire.sent[start:])

    bob, feed = book.add(BOB), book.add_group("Feed")
    for _ in "12":  # the first brings the cards, but the token is one from before
        assert asks() == is_cyrus(book)
    assert not asks()
    assert edit(book, feed, **adding(bob)) == edit(book, bob, note=("one",)) == {}
    assert book.contacts.apply([new_contact("new@x.example", "New")]) == {}
    assert not asks()
    book.meddle(bob)
    assert asks() == is_cyrus(book)
    book.remove(feed)
    assert not asks()
    book.remove(bob)
    assert edit(book, contact_uid("new@x.example"), "new@x.example", note=("two",)) == {}
    book.contacts.prepare()  # now nothing is known, not even of what was written here
    assert asks() == is_cyrus(book)


@DAV_STYLES
def test_a_group_that_someone_else_has_edited_since_is_read_again(book: Book, wire: Fate) -> None:
    bob, eve, feed = book.add(BOB), book.add(EVE, name="Eve"), book.add_group("Feed")
    assert edit(book, feed, **adding(bob)) == {}
    theirs = CardChange(feed, card_of(book.read(), feed), **removing(bob))
    assert book.twin().apply([theirs]) == {}
    assert asked(wire, lambda: edit(book, feed, **adding(eve))) == ["PUT"]
    assert book.seen()[feed].members == {eve}


@DAV_STYLES
def test_a_group_that_someone_else_edits_after_it_was_read_is_not_overwritten(
    book: Book, wire: Fate
) -> None:
    bob, eve = book.add(BOB), book.add(EVE, name="Eve")
    feed = book.add_group("Feed", bob)
    wire.befall = before_write(lambda: book.meddle(feed))
    assert asked(wire, lambda: edit(book, feed, **adding(eve))) == ["PUT", "GET", "PUT"]
    seen = book.seen()[feed]
    assert (set(seen.members), set(seen.phones)) == ({bob, eve}, {PHONE})


@DAV_STYLES
def test_a_group_that_someone_else_deletes_after_it_was_read_is_not_made_again(
    book: Book, wire: Fate
) -> None:
    bob, feed = book.add(BOB), book.add_group("Feed")
    change = CardChange(feed, card_of(book.read(), feed), **adding(bob))
    book.remove(feed)
    assert asked(wire, lambda: book.contacts.apply([change])) == ["PUT", "GET"]
    assert book.contacts.apply([change]) == {feed: "HTTP 404, ETag None"}
    assert book.seen().keys() == {bob}


@DAV_STYLES
def test_what_someone_else_does_first_is_not_done_again(book: Book, wire: Fate) -> None:
    """In the group, and by whoever was quicker."""
    bob, feed = book.add(BOB), book.add_group("Feed")
    change = CardChange(feed, card_of(book.read(), feed), **adding(bob))
    assert book.twin().apply([change]) == {}
    assert asked(wire, lambda: book.contacts.apply([change])) == ["PUT", "GET"]
    assert book.seen()[feed].members == {bob}


@pytest.mark.parametrize("when", ["before the listing", "after the listing", "once it is known"])
@pytest.mark.parametrize("book", on("radicale", "cyrus"), indirect=True)
def test_a_contact_that_becomes_one_of_version_4_stays_one(
    book: Book, wire: Fate, when: str
) -> None:
    """As 3.0 it would have just the same size."""
    assert isinstance(book, DAVBook)
    lines = ["UID:bob", "FN:Bob", f"EMAIL:{BOB}"]
    url = book.put("bob.vcf", *lines, "N:;Bob;;;")
    assert edit(book, canonical_uid("bob"), note=("one",)) == {}

    def turn() -> None:
        book.put("bob.vcf", *lines, version="4.0")

    waiting = [turn]

    def before_multiget(request: requests.PreparedRequest) -> str:
        if waiting and "multiget" in str(request.body):
            waiting.pop()()
        return ""

    if when == "after the listing":
        wire.befall = before_multiget
        book.read(BOB)
    else:
        turn()
    if when == "once it is known":
        book.read(BOB)
    kept = book.ask("GET", url, **V4_TYPE).content.decode()
    assert "VERSION:4.0" in kept
    assert edit(book, canonical_uid("bob"), note=("two",)) == {}
    put = wire.writes[-1]
    assert sent_lines(put) == vcard_lines(kept.replace("END:V", "NOTE:two\r\nEND:V"))


def test_of_contacts_that_were_written_nothing_is_kept(dav: DAVBook) -> None:
    bob = dav.add(BOB)
    assert dav.contacts.apply([new_contact(EVE, "Eve")]) == {}
    for uid, address in ((bob, BOB), (contact_uid(EVE), EVE)):
        assert not dav.contacts._vcards
        assert edit(dav, uid, address, note=("again",)) == {}
    assert not dav.contacts._vcards


@pytest.mark.parametrize("status", [201, 412])
@responses.activate
def test_what_was_refused_was_not_written_here(status: int) -> None:
    """The ETag in a refusal is that of somebody else's card."""
    url = "https://dav.example/book/"
    responses.add("PROPFIND", url, MULTISTATUS.format(ADDRESS_BOOK), status=207)
    responses.add("PUT", re.compile(".*"), status=status, headers={"ETag": '"theirs"'})
    store = CardDAVContacts(url, credentials("p", "u"), bool)
    store.prepare()
    assert bool(store.apply([new_contact(BOB, "Bob")])) == (status == 412)
    assert [*store._written.values()] == (['"theirs"'] if status == 201 else [])


@pytest.mark.parametrize("etag", ["", 'W/"1"'], ids=["none", "weak"])
def test_a_card_that_the_server_made_something_else_of_is_looked_at(
    dav: DAVBook, wire: Fate, etag: str
) -> None:
    """It tells by giving no strong ETag."""
    wire.after_write = lambda response: response.headers.update({"ETag": etag})
    bob, eve, feed = dav.add(BOB), dav.add(EVE, name="Eve"), dav.add_group("Feed")
    card = card_of(dav.read(), feed)
    for who, methods in ((bob, ["PUT"]), (eve, ["GET", "PUT"])):
        change = CardChange(feed, card, **adding(who))
        assert asked(wire, lambda: dav.contacts.apply([change])) == methods  # noqa: B023
    assert dav.seen()[feed].members == {bob, eve}


def test_a_group_is_looked_at_when_a_page_comes_in_place_of_the_reply(
    dav: DAVBook, wire: Fate
) -> None:
    """Whether it was written nobody knows then."""
    bob, feed = dav.add(BOB), dav.add_group("Feed")
    wire.after_write = lambda response: setattr(response, "status_code", 200)
    assert asked(wire, lambda: edit(dav, feed, **adding(bob))) == ["PUT", "GET"]
    assert dav.seen()[feed].members == {bob}


@responses.activate
def test_a_change_without_its_card_is_not_taken_for_a_deletion() -> None:
    """Some servers tell of changes but not what they are: they are asked for all cards."""
    url = "https://dav.example/book/"
    vcard = f"BEGIN:VCARD\nUID:bob\nEMAIL:{BOB}\nEND:VCARD\n"
    token = "<D:sync-token>1</D:sync-token>"
    card = FOUND.format(f"<C:address-data>{vcard}</C:address-data>")
    listing = MULTISTATUS.format(card).replace("/book/", "/book/bob.vcf")
    changed = MULTISTATUS.format(FOUND.format("").replace("200 OK", "404 Not Found"))
    changed = changed.replace("/book/", "/book/bob.vcf").replace("</D:multi", f"{token}</D:multi")
    collection = ADDRESS_BOOK.replace("</D:prop>", f"{token}</D:prop>")
    responses.add("PROPFIND", url, MULTISTATUS.format(collection), status=207)
    for body in (listing, listing, changed, listing, listing):
        responses.add("REPORT", url, body, status=207)
    store = CardDAVContacts(url, credentials("p", "u"), bool)
    store.prepare()
    found = [[card.uid for card in store.cards([BOB], [], [])] for _ in "12"]
    assert found == [["urn:uuid:bob"]] * 2
    read = ["addressbook-query", "addressbook-multiget"]
    sent = (call.request for call in responses.calls)
    assert reports(sent) == [*read, "sync-collection", *read]


@responses.activate
def test_a_card_that_is_listed_and_then_not_told_of_is_an_error() -> None:
    """It would be made a second time. One that the server says is gone is no error."""
    url = "https://dav.example/book/"
    vcard = f"BEGIN:VCARD\nUID:bob\nEMAIL:{BOB}\nEND:VCARD\n"
    card = FOUND.format(f"<C:address-data>{vcard}</C:address-data>")
    listing = MULTISTATUS.format(card).replace("/book/", "/book/bob.vcf")
    other = listing.replace("bob.vcf", "eve.vcf")
    gone = MULTISTATUS.format("<D:status>HTTP/1.1 404 Not Found</D:status>")
    responses.add("PROPFIND", url, MULTISTATUS.format(ADDRESS_BOOK), status=207)
    for body in (listing, other, listing, other, listing, gone.replace("/book/", "/book/bob.vcf")):
        responses.add("REPORT", url, body, status=207)
    store = CardDAVContacts(url, credentials("p", "u"), bool)
    store.prepare()
    with pytest.raises(ServerError, match="cannot be understood"):
        store.cards([BOB], [], [])
    assert store.cards([BOB], [], []) == []


@pytest.mark.parametrize(
    ("size", "end", "kept"),
    [
        ("", "\n", "\r\n"),
        ("{crlf}", "\n", "\r\n"),
        ("{lf}", "\n", None),
        ("{crlf}", "&#13;\n", "\r\n"),
        ("{lf}", "&#13;\n", None),
        ("many", "\n", None),
    ],
)
@responses.activate
def test_a_vcard_that_comes_in_xml_is_written_back_as_it_is(
    size: str, end: str, kept: str | None
) -> None:
    """XML has one line end; where the size tells of others the vCard itself is read."""
    url, lines = (
        "https://dav.example/book/",
        ["BEGIN:VCARD", "UID:bob", f"EMAIL:{BOB}", "END:VCARD"],
    )
    length = sum(map(len, lines))
    size = size.format(lf=length + 4, crlf=length + 8)
    text = "".join(line + end for line in lines)
    data = f'<C:address-data>{text}</C:address-data><D:getetag>"1"</D:getetag>'
    if size:
        data += f"<D:getcontentlength>{size}</D:getcontentlength>"
    listing = MULTISTATUS.format(FOUND.format(data)).replace("/book/", "/book/bob.vcf")
    responses.add("PROPFIND", url, MULTISTATUS.format(ADDRESS_BOOK), status=207)
    responses.add("REPORT", url, listing, status=207)
    on_server = "".join(f"{line}\n" for line in lines)
    responses.add("GET", f"{url}bob.vcf", on_server, headers={"ETag": '"2"'})
    responses.add("PUT", f"{url}bob.vcf", status=204)
    store = CardDAVContacts(url, credentials("p", "u"), bool)
    store.prepare()
    [card] = store.cards([BOB], [], [])
    assert store.apply([CardChange(card.uid, card, note=(TRIAGED,))]) == {}
    put = responses.calls[-1].request
    eol = kept or "\n"
    assert sent_lines(put) == [f"{line}{eol}" for line in [*lines[:3], f"NOTE:{TRIAGED}", lines[3]]]
    assert put.headers["If-Match"] == ('"1"' if kept else '"2"')


@responses.activate
def test_a_card_that_cannot_be_shown_whole_is_read_in_part() -> None:
    """Some other property of it holds what no XML can."""
    url = "https://dav.example/book/"
    vcard = f"BEGIN:VCARD\nUID:bob\nEMAIL:{BOB}\nEND:VCARD\n"
    data = f'<C:address-data>{vcard}</C:address-data><D:getetag>"1"</D:getetag>'
    listing = MULTISTATUS.format(FOUND.format(data)).replace("/book/", "/book/bob.vcf")
    responses.add("PROPFIND", url, MULTISTATUS.format(ADDRESS_BOOK), status=207)
    for body in (listing, listing.replace("BEGIN", "\x0b"), listing, listing):
        responses.add("REPORT", url, body, status=207)
    there = vcard.replace("END", "X-ODD:\x0b\nEND")
    responses.add("GET", f"{url}bob.vcf", there, headers={"ETag": '"1"'})
    responses.add("PUT", f"{url}bob.vcf", status=204)
    store = CardDAVContacts(url, credentials("p", "u"), bool)
    store.prepare()
    [card] = store.cards([BOB], [], [])
    assert store.apply([CardChange(card.uid, card, note=(TRIAGED,))]) == {}
    assert "X-ODD:\x0b\n" in sent_lines(responses.calls[-1].request)


@pytest.mark.parametrize("name", ["D:current-user-principal", "C:addressbook-home-set"])
@responses.activate
def test_an_href_that_is_none_is_an_error_of_the_server(name: str) -> None:
    url = "https://dav.example/book/"
    odd = FOUND.format(f"<{name}><D:href>http://[bad</D:href></{name}>")
    responses.add("PROPFIND", url, MULTISTATUS.format(odd), status=207)
    store = mailroom.CardDAVContacts(url, mailroom.credentials("p", "u"), bool)
    with pytest.raises(mailroom.ServerError, match="cannot be understood"):
        store.prepare()
