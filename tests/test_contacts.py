"""Address books as people have them: cards of all sorts, several books, other people's books, and
servers that tell things in other ways. On the embedded server, Radicale and Cyrus."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import pytest
import vobject  # type: ignore[import-untyped]
from books import DAVBook, cyrus_book, radicale_book
from cyrus_server import CyrusServer
from fault_proxy import FaultProxy
from homes import EmbeddedHome, contacts, furnished, members, once, put, run, tap_new, uid_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jmap_server import Fault, Reply, Request
from radicale_server import RadicaleServer
from test_undo import on_jmap
from tools import new_triage

from mailroom import MailroomError, MailroomSettings, Triage

JANE = "jane@x.example"
PLAIN = "c0ffee00-0000-4000-8000-00000000000a"


@pytest.fixture
def between(radicale: RadicaleServer) -> Iterator[FaultProxy]:
    proxy = FaultProxy(radicale.port)
    with proxy:
        yield proxy


@pytest.fixture
def dav(radicale: RadicaleServer, between: FaultProxy) -> Iterator[EmbeddedHome]:
    """An account with its contacts on Radicale, behind the proxy."""
    book = radicale_book(radicale)
    book.settings["carddav_url"] = between.origin
    with book.mail:
        home = furnished(book)
        yield home
        assert between.crashes == []
    for other in ("other", "shared"):
        radicale.http.delete(f"{radicale.url}alice/{other}/")


def swap(pattern: str, new: str) -> Callable[[Request, Reply], None]:
    """Has the server show something else."""

    def edit(_: Request, reply: Reply) -> None:
        assert isinstance(reply.body, bytes)
        reply.body = re.sub(pattern.encode(), lambda _: new.encode(), reply.body)

    return edit


def triage_of(home: EmbeddedHome) -> Triage:
    return new_triage(MailroomSettings(**{**home.settings, "health_port": 0}))


def tap_and_run(home: EmbeddedHome, label: str = "@ToFeed", sender: str = f"Jane <{JANE}>") -> str:
    """A new message, which is triaged; its subject."""
    mail = tap_new(home, label, sender)
    once(home)
    return mail


# Cards that cannot be understood


def vcards(*bodies: list[str]) -> str:
    return "".join("\n".join(["BEGIN:VCARD", "VERSION:3.0", *b, "END:VCARD", ""]) for b in bodies)


MAIL = f"EMAIL:{JANE}"
ODD_VCARDS = {
    "no uid": vcards(["FN:Jane", MAIL]),
    "no FN": vcards(["UID:j", MAIL]),
    "an email without an address": vcards(["UID:j", "FN:Jane", MAIL, "EMAIL:"]),
    "no end": vcards(["UID:j", "FN:Jane", MAIL]).replace("END:VCARD\n", ""),
    "two in one": vcards(["UID:o", "FN:Otto", "EMAIL:o@x.example"], ["UID:j", "FN:Jane", MAIL]),
}
EMAILS = {"e": {"address": JANE}}
ODD_CARDS: dict[str, Any] = {
    "no uid": {"uid": None},
    "a part of a name without a kind": {"name": {"components": [{"value": "Jane"}]}},
    "an email without an address": {"emails": {**EMAILS, "f": {"contexts": {"work": True}}}},
    "an email of null": {"emails": {**EMAILS, "f": None}},
    "a note of null": {"notes": {"n": {"note": None}}},
    "notes that are a list": {"notes": ["x"]},
}


def check_odd(home: EmbeddedHome, named: str) -> None:
    """Jane's card is not understood: she fails, with a reason that names the card, and no one else
    does; she gets no second contact. Undo and reset pass over it."""
    before = len(home.book.seen())
    other = tap_new(home, sender="Otto <otto@x.example>")
    mail = tap_new(home)
    ran = run(home, "run", "--once")
    assert (ran.status, named in ran.err) == (3, True), ran
    assert home.where()[other] == {"Feed"}
    assert home.where()[mail] >= {"Screener", "@ToFeed"}
    assert len(home.book.seen()) == before + 1
    home.account.move(home._ids[mail], "Archive")
    home.tap(other, "@ToScreener")
    once(home)
    assert run(home, "reset", "--apply", "--yes").status == 0
    assert len(home.book.seen()) == before - 8


@pytest.mark.parametrize("what", ODD_VCARDS)
def test_a_vcard_that_cannot_be_understood(
    dav: EmbeddedHome, between: FaultProxy, what: str
) -> None:
    url = put(dav, f"UID:{PLAIN}", "FN:Odd", MAIL)
    card = f"(?s)BEGIN:VCARD(?:(?!END:).)*UID:{PLAIN}.*?END:VCARD"
    between.edit_reply = swap(card, ODD_VCARDS[what])
    check_odd(dav, url.rpartition("/")[2] if what == "no FN" else "the card")


@on_jmap
@pytest.mark.parametrize("what", ODD_CARDS)
def test_a_contact_card_that_cannot_be_understood(home: EmbeddedHome, what: str) -> None:
    jmap = furnished(home.book)
    id_ = jmap.account.new_card({"kind": "individual", "name": {"full": "O"}, "emails": EMAILS})

    def edit(answer: Any) -> Any:
        for _, got, _ in answer["methodResponses"]:
            for shown in got.get("list", ()):
                shown |= ODD_CARDS[what] if shown["id"] == id_ else {}
        return answer

    jmap.mail.faults.append(Fault("ContactCard/get", times=99, edit=edit))
    check_odd(jmap, "the card")


# What is written, byte for byte

HOSTILE = {
    # a display name: the name of the contact, if it is another
    "Bob\r\nEMAIL:eve@x.example": "Bob EMAIL:eve@x.example",
    "Bob\r\n EMAIL:eve@x.example": "Bob EMAIL:eve@x.example",
    "Bob\rEMAIL:eve@x.example": "Bob EMAIL:eve@x.example",
    "A\u2028E:e@x\u2029E:e@x\u0085E:e@x\x0b\x0c\x1c\x1dE:e@x": "A E:e@x E:e@x E:e@x E:e@x",
    "Bob\nEND:VCARD\nBEGIN:VCARD\nUID:eve": "Bob END:VCARD BEGIN:VCARD UID:eve",
    "END:VCARD": "",
    "B\\ob; \\n, \\, x": "",
    "Bob;Eve;;;": "",
    "item1.EMAIL:eve@x.example": "",
    'Bob" <b>;X="': "",
    "B\u00f6b \U0001f469\u200d\U0001f469\u200d\U0001f467": "",
    "\U0001f469" * 200: "",
    "Bob Smith": "",
    " \t ": "@",
}


def written(between: FaultProxy) -> list[str]:
    """The bodies of the PUT requests since the proxy's `requests` were cleared."""
    return [request.body.decode() for request in between.requests if request.method == "PUT"]


@pytest.mark.parametrize("label", ["@ToFeed", "@ToPerson"])
def test_a_display_name_forges_nothing(dav: EmbeddedHome, between: FaultProxy, label: str) -> None:
    """And the card is known again for one that nobody has touched."""
    before = dav.book.seen().keys()
    for n, name in enumerate(HOSTILE):
        sender = [{"name": name, "email": f"N{n}@x.example"}]
        dav.account.deliver(sender, ["Screener", label], subject=f"{n}")
    between.requests.clear()
    once(dav)
    firm = ["ORG", "X-ABSHOWAS"] if label == "@ToFeed" else []
    fields = ["BEGIN", "VERSION", "PRODID", "UID", "FN", "N", *firm, "EMAIL", "NOTE", "END", ""]
    texts = [text for text in written(between) if "EMAIL" in text]
    assert len(texts) == len(HOSTILE)
    for text in texts:
        assert {*re.findall("[\x00-\x1f\x7f\u2028]", text)} == {"\r", "\n"}
        assert max(len(line.encode()) for line in text.split("\r\n")) <= 75
        assert [re.split("[:;]", line)[0] for line in re.split("\r\n(?! )", text)] == fields
        [card] = vobject.readComponents(text)
        name, wanted = [*HOSTILE.items()][int(card.email.value[1:].partition("@")[0])]
        wanted = card.email.value.lower() if wanted == "@" else wanted or name
        assert card.fn.value.lower() == wanted.lower()
        assert re.fullmatch(r'Created by Mailroom on [-\d]{10} as ".*"', card.note.value)
        assert card.org.value == [card.fn.value] if firm else not hasattr(card, "org")
        parts = f"{card.n.value.given} {card.n.value.family}".strip()
        assert parts == ("" if firm else card.fn.value)
        assert "\r\nEMAIL;TYPE=INTERNET:N" in text
    for mail in dav.account.mails_in("Feed" if firm else "Person"):
        dav.account.label(mail, "@ToScreener")
    once(dav)
    assert dav.book.seen().keys() == before


@pytest.mark.parametrize("ending", ["\r\n", "\n"])
@pytest.mark.parametrize("kind", ["KIND", "X-ADDRESSBOOKSERVER-KIND"])
def test_an_edit_of_a_group_keeps_all_other_lines(
    dav: EmbeddedHome, between: FaultProxy, kind: str, ending: str
) -> None:
    """However odd they are, and however they end."""
    put(dav, f"UID:{PLAIN}", "FN:Jane", MAIL)
    url = f"{dav.book.url}{uid_of(dav, 'Feed')}.vcf"
    [head] = [line for line in dav.book.get(url).split("\r\n") if line.startswith("UID")]
    member = kind.replace("KIND", "MEMBER")
    odd = ["note:a\\, b;c\\n", 'NOTE;X="a:b":x', " folded", "\tonce more", "item1.TEL:1", "rubbish"]
    odd += ["X;ENCODING=QUOTED-PRINTABLE:=4A=", "=C3=B6", f"item7.{member}:urn:uuid:else", "X:END"]
    lines = ["BEGIN:VCARD", "VERSION:3.0", head, *odd, f"{kind}:group", "FN:Feed", "END:VCARD", ""]
    there = ending.join(lines)
    card = "(?s)BEGIN:VCARD(?:(?!END:).)*FN:Feed.*?END:VCARD[^<]*"
    between.edit_reply = swap(card, there.replace("&", "&amp;").replace("\r", "&#13;"))
    between.faults = [Fault(lambda sent: b"rubbish" in sent.body, status=204)]  # Radicale would not
    between.requests.clear()
    tap_and_run(dav)
    [text] = written(between)
    assert text.count("\r\n") in (0, text.count("\n"))
    kept = [line for line in re.split("\r?\n", text) if PLAIN not in line]
    assert kept == lines
    assert f"{member}:" in text.partition(PLAIN)[0].splitlines()[-1]


# Who is in a group, when two addresses are one, what a name is


def put_feed(home: EmbeddedHome, *lines: str, version: str) -> str:
    """Another card for the group Feed; its URL."""
    home.book.ask("DELETE", f"{home.book.url}{uid_of(home, 'Feed')}.vcf")
    kind = "KIND:group" if version == "4.0" else "X-ADDRESSBOOKSERVER-KIND:group"
    return put(home, "UID:feed", "FN:Feed", "N:Feed;;;;", kind, *lines, version=version)


@pytest.mark.parametrize("version", ["3.0", "4.0"])
@pytest.mark.parametrize(
    "uid", [PLAIN, "http://x.example/cards/17", "AAMkAGY3/+QBw=", "urn:uuid:x"]
)
def test_the_line_of_a_member(dav: EmbeddedHome, uid: str, version: str) -> None:
    """And nothing but lines of members is touched."""
    url = put_feed(dav, "NOTE:a\\, b;c", version=version)
    put(dav, f"UID:{uid}", "FN:Jane", MAIL)
    before = dav.book.get(url).split("\r\n")
    tap_and_run(dav)
    [line] = {*dav.book.get(url).split("\r\n")} - {*before}
    apple = f"X-ADDRESSBOOKSERVER-MEMBER:urn:uuid:{uid.removeprefix('urn:uuid:')}"
    assert line == (f"MEMBER:{uid}" if version == "4.0" else apple)
    tap_and_run(dav, "@ToJail")
    assert dav.book.get(url).split("\r\n") == before


@pytest.mark.parametrize("member", [f"URN:uuid:{PLAIN.upper()}", "MAILTO:Jane@X.example", PLAIN])
@pytest.mark.parametrize("how", ["@ToJail", "@ToScreener", "reset"])
def test_a_group_is_left_by_whatever_line_says_it(dav: EmbeddedHome, member: str, how: str) -> None:
    url = put_feed(dav, "MEMBER:urn:uuid:other", f"MEMBER:{member}", version="4.0")
    put(dav, f"UID:{PLAIN}", "FN:Jane", MAIL)
    if how == "reset":
        assert run(dav, "reset", "--apply", "--yes").status == 0
    else:
        tap_and_run(dav, how)
    left = [line for line in dav.book.get(url).split() if line.startswith("MEMBER")]
    assert left == ([] if how == "reset" else ["MEMBER:urn:uuid:other"])


JANES = [
    # the lines of a contact, the sender, whether that is who the contact is
    (["FN:Jane", "EMAIL:mailto:Jane@X.example"], f"Jane <{JANE}>", True),
    (["FN:Bob", "EMAIL;TYPE=WORK:bob@müller.example"], "Bob <bob@xn--mller-kva.example>", True),
    (["FN:Jane", "item1.EMAIL;PREF=1:other@x.example", f"email:{JANE} "], f"Jane <{JANE}>", True),
    (["FN:Jane", 'EMAIL;X="a;b:c":jane@x.ex', " ample"], f"Jane <{JANE}>", True),
    (["FN:Jane", "EMAIL;ENCODING=QUOTED-PRINTABLE:jane=40x.example"], f"Jane <{JANE}>", True),
    (["FN;CHARSET=UTF-8;ENCODING=QUOTED-PRINTABLE:=4A=\n=C3=B6rg", MAIL], f"Jörg <{JANE}>", True),
    (["FN:Jane", f"NOTE:{MAIL}", f"X-{MAIL}", "EMAIL:jane"], f"Jane <{JANE}>", False),
    (["FN:Jane", f"{MAIL}\u00a0", f"{MAIL}\u3000"], f"Jane <{JANE}>", False),
]


@pytest.mark.parametrize(("lines", "sender", "is_hers"), JANES)
def test_a_contact_is_found_and_named_alike(
    dav: EmbeddedHome, between: FaultProxy, lines: list[str], sender: str, is_hers: bool
) -> None:
    put(dav, f"UID:{PLAIN}", "FN:Odd", "EMAIL:odd@x.example")
    between.edit_reply = swap("FN:Odd", "\n".join(lines))  # Radicale would decode it
    before = len(dav.book.seen())
    mail = tap_and_run(dav, sender=sender)
    [uid] = members(dav, "Feed")
    assert (len(dav.book.seen()) == before, uid == PLAIN) == (is_hers, is_hers)
    assert dav.where()[mail] == {"Feed"}, "the warning label is for another name"


# Several address books


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.vcf")}


@pytest.mark.parametrize("whose", ["somebody else's", "not to be written", "the user's own"])
def test_nothing_is_written_in_another_address_book(
    dav: EmbeddedHome, between: FaultProxy, radicale: RadicaleServer, whose: str
) -> None:
    """Be it another's Feed and contacts. Who is only in a book that does not count gets a contact
    of the user's own; who is in the user's own is found there, even one that Mailroom made."""
    made = tap_and_run(dav)
    [uid] = contacts(dav)
    mine = {url: text for url, text in dav.book.texts().items() if uid in text or "FN:Feed" in text}
    other = DAVBook(radicale.url, radicale.make_addressbook("other"), dav.book.login, False)
    for url, text in mine.items():
        other.ask("PUT", other.url + url.rpartition("/")[2], text, Content_Type="text/vcard")
    dav.book.ask("DELETE", f"{dav.book.url}{uid}.vcf")
    folder = radicale.home / "collections/collection-root/alice/other"
    before = files(folder)

    def edit(_: Request, reply: Reply) -> None:
        assert isinstance(reply.body, bytes)
        end = reply.body.find(b"</response>", at := reply.body.find(b"/alice/other/</href>"))
        part = reply.body[at:end]
        owner = re.sub(rb"(<owner>\s*<href>)/alice/", rb"\1/bob/", part)
        rights = re.sub(rb"<(/?)(all|write|bind|write-content)\b", rb"<\1read", part)
        edited = {"somebody else's": owner, "not to be written": rights}.get(whose, part)
        reply.body = reply.body[:at] + edited + reply.body[end:] if at > 0 else reply.body

    between.edit_reply = edit
    dav.tap(made, "@ToJail")
    once(dav)
    assert members(dav, "Jail") == {uid}
    assert contacts(dav) == ([] if whose == "the user's own" else [uid])
    mail = tap_new(dav)
    for label in ("@ToFeed", "@ToJail", "@ToScreener", "@ToFeed"):
        dav.tap(mail, label)
        once(dav)
    assert run(dav, "reset", "--apply", "--yes").status == 0
    assert files(folder) == before


def test_of_several_address_books_one_has_to_be_named(
    dav: EmbeddedHome, between: FaultProxy, radicale: RadicaleServer
) -> None:
    radicale.make_addressbook("other")
    radicale.make_addressbook("shared")
    once(dav)  # the one of them that is called `contacts`
    url = f"{between.origin}/alice/"
    between.edit_reply = swap("/alice/contacts/</href>", "/alice/mine/</href>")
    ran = run(dav, "run", "--once")
    assert ran.status == 2
    for name in ("mine", "other", "shared"):
        assert f"MAILROOM_CARDDAV_URL={url}{name}/" in ran.err
    dav.book.settings["carddav_url"] = f"{url}other"

    def edit(_: Request, reply: Reply) -> None:  # Nobody may write this one.
        assert isinstance(reply.body, bytes)
        [start, *parts] = reply.body.partition(b"/alice/other/</href>")
        here, end, rest = parts[1].partition(b"</response>")
        here = re.sub(rb"<(/?)(all|write|bind|write-content)\b", rb"<\1read", here)
        reply.body = start + parts[0] + here + end + rest

    between.edit_reply = edit
    ran = run(dav, "run", "--once")
    assert (ran.status, "no address book to write" in ran.err) == (2, True)
    between.edit_reply = lambda *_: None
    assert run(dav, "setup", "--apply").status == 0
    tap_and_run(dav)
    assert contacts(dav) == []
    assert len(files(radicale.home / "collections/collection-root/alice/other")) == 9


@on_jmap
def test_a_book_that_may_not_be_written_does_not_count_over_jmap(home: EmbeddedHome) -> None:
    jmap, account = furnished(home.book), home.account
    book = account.add_book("Read-only", is_default=True, may_write=False)
    feed = jmap.book.seen()[uid_of(jmap, "Feed")]
    account.put_in_book(account.add_group("Feed", []), book)
    account.put_in_book(account.new_card({"kind": "individual", "emails": EMAILS}), book)
    cards = account.cards
    before = {key: {**cards[key]} for key in cards if book in cards[key]["addressBookIds"]}
    tap_and_run(jmap)
    assert (len(before), len(contacts(jmap)), feed.members) == (2, 2, set())
    assert members(jmap, "Feed") < {*contacts(jmap)}
    assert {key: cards[key] for key in before} == before
    for key in before:  # at the end no address may have two contacts
        account.remove_card(key)


# What servers do


def test_the_address_book_is_found_from_anywhere(dav: EmbeddedHome, between: FaultProxy) -> None:
    for path in ("", "/", "/alice/", "/alice/contacts/", "/alice/contacts"):
        dav.book.settings["carddav_url"] = between.origin + path
        once(dav)
    dav.book.settings["carddav_password"] = "wrong"
    assert "MAILROOM_CARDDAV_PASSWORD" in run(dav, "run", "--once").err


@pytest.mark.parametrize("what", ["stale token", "no sync", "truncated", "weak ETags", "spelling"])
def test_the_mirror_is_up_to_date(dav: EmbeddedHome, between: FaultProxy, what: str) -> None:
    """Whatever the user does meanwhile, and however the server tells it."""
    cut: list[bytes] = []

    def edit(request: Request, reply: Reply) -> None:
        assert isinstance(reply.body, bytes)
        is_sync = b"sync-collection" in request.body
        if what == "no sync":
            reply.body = re.sub(rb"<sync-token>.*?</sync-token>", b"", reply.body)
            reply.status = 400 if is_sync else reply.status
        if what == "stale token" and is_sync and b"<D:sync-token>http" in request.body:
            reply.status = 403
        if what == "weak ETags" and request.method == "PUT":
            reply.headers = {name: each for name, each in reply.headers.items() if name != "ETag"}
        if what == "spelling" and b"multiget" in request.body:
            reply.body = reply.body.replace(b".vcf</href>", b"%2Evcf</href>")
        if what == "truncated" and is_sync and not cut:
            cut.append(reply.body)  # nothing at first; all of it comes next
            status = b"<response><href>/alice/contacts/</href><status>HTTP/1.1 507 x</status>"
            reply.body = re.sub(rb"(<sync-token>).*?(</)", rb"\1next\2", reply.body)
            reply.body = re.sub(rb"(?s)<response>.*</resp", status + b"</resp", reply.body)
        elif b"<D:sync-token>next<" in request.body:
            reply.status, reply.body = 207, cut[0]

    between.edit_reply = edit
    triage = triage_of(dav)
    for step in range(3):
        dav.book.add(JANE, name="Jane") if step else None
        mail = tap_new(dav, ["@ToFeed", "@ToJail", "@ToFeed"][step])
        assert triage.run() == {}
        [uid] = contacts(dav)
        assert uid in members(dav, "Jail" if step == 1 else "Feed")
        assert not dav.where()[mail] & {"@ToFeed", "@ToJail"}
        dav.book.remove(uid)


ANY_REPLY = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY_REPLY
@given(st.integers(0, 2**32).map(Random), st.integers(1, 5))
def test_a_multistatus_of_any_shape_is_an_answer_or_an_error(
    dav: EmbeddedHome, between: FaultProxy, random: Random, nth: int
) -> None:
    """With something left out, doubled, renamed, emptied or cut off; and it passes."""
    start = len(between.requests)

    def edit(request: Request, reply: Reply) -> None:
        if len(between.requests) - start == nth and reply.status == 207:
            reply.body = mangled(reply.body, random)

    between.edit_reply = edit
    mail = tap_new(dav, sender=f"S <s{start}@x.example>")
    triage = triage_of(dav)
    told = ""
    try:
        triage.run()
    except MailroomError as error:
        told = str(error)
    assert len(told.splitlines()) <= 1
    between.edit_reply = lambda *_: None
    assert triage_of(dav).run() == {}
    assert dav.where()[mail] == {"Feed"}


def mangled(body: Any, random: Random) -> bytes:
    root = ElementTree.fromstring(body)  # noqa: S314  (from the server we started)
    for _ in range(random.randrange(1, 5)):
        parent = random.choice([each for each in root.iter() if len(each)] or [root])
        child = random.choice([*parent] or [root])
        kind = random.randrange(4)
        if kind == 0 and child in [*parent]:
            parent.remove(child)
        elif kind == 1:
            child.tag = random.choice([each.tag for each in root.iter()])
        elif kind == 2:
            child.text = random.choice(["", "http://[", "//evil.example/", "BEGIN:VCARD"])
        else:
            child.clear()
    text = ElementTree.tostring(root)
    return text[: random.randrange(len(text))] if random.randrange(9) == 0 else text


def test_photos_are_read_in_portions_and_let_go(dav: EmbeddedHome, between: FaultProxy) -> None:
    photo = "PHOTO;ENCODING=b;TYPE=JPEG:" + "A" * 133_000
    for n in range(60):
        dav.book.put(f"p{n}.vcf", f"UID:p{n}", f"FN:P {n}", f"EMAIL:p{n}@x.example")
    between.edit_reply = swap("FN:P", f"{photo}\nFN:P")
    tap_new(dav, sender="P <p59@x.example>")
    between.requests.clear()
    once(dav)
    sizes = [request.answered for request in between.requests if b"multiget" in request.body]
    assert max(sizes) < 8e6
    assert sum(sizes) > 8e6
    assert members(dav, "Feed") == {"p59"}


def test_whom_the_server_refuses_fails_alone_and_is_in_no_group(
    dav: EmbeddedHome, between: FaultProxy
) -> None:
    between.faults.append(Fault(lambda request: request.method == "PUT", status=403))
    mails = [tap_new(dav, sender=f"S {n} <s{n}@x.example>") for n in range(3)]
    assert len(triage_of(dav).run()) == 1
    [there] = [mail for mail in mails if "@ToFeed" in dav.where()[mail]]
    made = {uid for n in range(3) for uid in contacts(dav, f"s{n}@x.example")}
    assert members(dav, "Feed") == made
    once(dav)
    assert dav.where()[there] == {"Feed"}


@pytest.mark.cyrus
def test_a_group_of_version_4_stays_one_on_cyrus(cyrus: CyrusServer) -> None:
    """Cyrus shows it as 3.0, with members that such a card cannot have."""
    book = cyrus_book(cyrus, version_4=True)
    with book.mail:
        uid = book.add_group("Feed", "615b0000-somebody")
        home = furnished(book)
        url = book.url_of(uid)
        before = book.get(url)
        tap_and_run(home)
        [jane] = contacts(home)
        assert {*book.get(url).split()} == {*before.split(), f"MEMBER:{jane}"}
        tap_and_run(home, "@ToJail")
        assert book.get(url) == before
