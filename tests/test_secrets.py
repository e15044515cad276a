"""Secrets and strangers: who is sent the credentials, that nothing which Mailroom ever writes has
them in it, what the health port does for whoever comes, and that no sender writes the log."""

import json
import re
import socket
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import gevent
import pytest
import requests
from jmap_server import FOREVER, Fault, JMAPServer, Options
from ports import free_port
from test_contacts import ADDRESS_BOOK, FOUND, MULTISTATUS
from test_hell import Peer, at_once, refusal, stopped, tap, wait_filed
from test_push import open_files
from test_vcards import HOSTILE
from tools import Running, check_account, command, process, running

import mailroom
from mailroom import CardDAVContacts, JMAPClient, MailroomError, MailroomSettings, credentials

TOKEN, PASSWORD = """fmu1-se"cr'\\et/+&=9""", """p\\a'ss" wörd%+/&<:@"""
USER, DAV_USER = "alice@home.example", "älice"


@pytest.fixture(autouse=True)
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are hundredths; and the signals of the test run stay its own."""
    monkeypatch.setattr(gevent, "signal_handler", lambda *_: None)
    for name in ("CONNECT_GRACE", "FIRST_DELAY", "MAX_DELAY"):
        monkeypatch.setattr(mailroom, name, 0.02)


# ------------------------------------------------------------------------ nothing has them in it


def forms_of(secret: str, *users: str) -> set[str]:
    """The ways in which programs write a secret."""
    plain = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], secret}
    plain |= {repr(secret)[1:-1], secret.encode().decode("latin-1")}
    plain |= {quote(secret), quote(secret, ""), quote_plus(secret)}
    basic = {b64encode(f"{user}:{secret}".encode()).decode() for user in users}
    return plain | basic


FORMS = forms_of(TOKEN, USER, "") | forms_of(PASSWORD, DAV_USER)


def leaks(*texts: str) -> list[str]:
    """The secrets in these texts, in whatever form; those of JSON are looked at as text too."""
    return [f"{form} in {text[-300:]}" for text in texts for form in FORMS if form in text]


def problem(said: str) -> bytes:
    return json.dumps({"type": "about:blank", "detail": said}).encode()


def in_session(**wrong: Any) -> Fault:
    return Fault("session", edit=lambda session: {**session, **wrong})


def jmap_echoes(said: str) -> Iterator[Fault]:
    """Ways in which a JMAP server sends something back."""
    headers = {"Content-Type": said.encode().decode("latin-1")}
    for when in ("session", "api", "stream"):
        yield Fault(when, status=500, body=problem(said))
        yield Fault(when, status=302, headers={"Location": f"https://evil.example/?{quote(said)}"})
        yield Fault(when, status=302, headers={"Location": f"//{quote(said, '')}:x/"})
        yield Fault(when, headers=headers, body=problem(said))
        yield Fault(when, body=json.dumps([said]).encode(), headers={"Content-Type": "a/b"})
    accounts = {capability: [said] for capability in (mailroom.MAIL, mailroom.CONTACTS)}
    yield in_session(primaryAccounts=accounts)
    yield in_session(apiUrl=f"http://{said}/")
    yield in_session(apiUrl=[said])
    yield Fault(edit=lambda reply: {**reply, "methodResponses": [[said, {said: said}, said]]})
    for method in ("Email/query", "Email/get", "Mailbox/get", "ContactCard/get"):
        yield Fault(errors={method: {"type": said, "description": said}})
    yield Fault(refuse={"*": {"type": said, "properties": [said], "description": said}})


@pytest.mark.parametrize(("username", "log_format"), [(USER, "json"), ("", "text")])
def test_no_echo_of_a_jmap_server_is_written(username: str, log_format: str, long: bool) -> None:
    said: list[str] = []
    settings = {"jmap_token": TOKEN, "jmap_username": username, "log_format": log_format}
    for form in sorted(forms_of(TOKEN, username))[:: 1 if long else 2]:
        for fault in jmap_echoes(form):
            with JMAPServer.with_mailroom_account(Options(token=TOKEN, username=USER)) as server:
                tap(server, "bob@shop.example")
                server.faults.append(fault)
                with running(server, poll_interval=0.05, **settings) as run:
                    server.wait_for(lambda: fault.fired)  # noqa: B023  (at once)
                    seen = run.cycles
                    server.wait_for(lambda: run.cycles > seen or run.greenlet.ready())  # noqa: B023
                    said += [run.output.getvalue(), *(run.page(f"/{name}")[1] for name in PAGES)]
    assert not leaks(*said)


PAGES = ("healthz", "metrics", "else")


def dav_echoes(said: str) -> list[bytes]:
    """Ways in which a CardDAV server sends something back."""
    href = MULTISTATUS.replace("/book/", quote(said)).format(ADDRESS_BOOK)
    text = said.replace("&", "&amp;").replace("<", "&lt;")
    found = MULTISTATUS.format(FOUND.format(f"<D:{quote(said, '')}>{text}</D:x>"))
    return [
        b"HTTP/1.1 500 " + said.encode() + b"\r\n\r\n" + problem(said),
        b"HTTP/1.1 401 No\r\n\r\n" + problem(said),
        b"HTTP/1.1 403 No\r\nWWW-Authenticate: " + said.encode() + b"\r\n\r\n" + problem(said),
        refusal(302, Location=f"https://evil.example/?{quote(said)}"),
        refusal(302, Location=f"https://{quote(said, '')}:x/"),
        *(b"HTTP/1.1 207 OK\r\n\r\n" + body.encode() for body in (said, href, found)),
    ]


def test_no_echo_of_a_carddav_server_is_written() -> None:
    said: list[str] = []
    settings = {"carddav_username": DAV_USER, "carddav_password": PASSWORD, "jmap_token": TOKEN}
    options = Options(token=TOKEN, push=None)
    with JMAPServer.with_mailroom_account(options) as server, Peer(at_once()) as peer:
        for form in sorted(forms_of(PASSWORD, DAV_USER)):
            for echo in dav_echoes(form):
                peer.talk = at_once(echo)
                with running(server, poll_interval=60, carddav_url=peer.url, **settings) as run:
                    server.wait_for(lambda: run.cycles or run.greenlet.ready())
                    said += [run.output.getvalue(), *(run.page(f"/{name}")[1] for name in PAGES)]
        assert all(said)
    assert b"Authorization: Basic " in peer.heads[0]
    assert not leaks(*said)


def test_nothing_that_the_program_leaves_behind_has_a_secret_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log at debug, its pages, its line in the process list, the account, and its files."""
    home, output, port = tmp_path / "home", tmp_path / "log", free_port()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    with JMAPServer.with_mailroom_account(Options(token=TOKEN, username=USER)) as server:
        given = {"jmap_username": USER, "carddav_password": PASSWORD, "health_port": port}
        with process(server, output, poll_interval=1, **given) as program:
            wait_filed(server, tap(server, "Bob <bob@shop.example>"), 20)
            echoes = [fault for fault in jmap_echoes(TOKEN) if fault.when != "session"]
            for nth, fault in enumerate(echoes, 1):
                fault.nth = nth
            server.faults += echoes
            late = tap(server, "Eve <eve@evil.example>")
            wait_filed(server, late, 60)
            server.wait_for(lambda: any(fault.fired for fault in echoes))
            with requests.Session() as session:
                session.trust_env = False
                url = f"http://127.0.0.1:{port}"
                pages = [session.get(f"{url}/{name}", timeout=5).text for name in PAGES]
            command = Path(f"/proc/{program.pid}/cmdline").read_text()
            assert stopped(program)
        account = repr([server.account.mails, server.account.mailboxes, server.account.cards])
        check_account(server)
    assert not leaks(output.read_text("utf-8"), *pages, command, account)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("where", [0, 9_960, 19_960])
def test_no_half_of_a_secret_is_left_where_a_text_is_cut(where: int) -> None:
    """A server's text is cut to save memory before it is known what is a secret in it."""
    token = "fmu1-" + "secret" * 9
    said = "x" * where + token
    with JMAPServer(Options(token=token)) as server:
        server.faults.append(Fault("session", times=FOREVER, status=500, body=problem(said)))
        ran = command("setup", jmap_url=server.session_url, jmap_token=token)
    assert ran.status == 1
    assert "secret" not in ran.err.replace("[secret]", "")
    health = mailroom.Health(MailroomSettings(jmap_token=token))
    health.stream.last_error = f"{said}"[:10_000]
    assert "secret" not in health.page()[2].replace("[secret]", "")


@pytest.mark.parametrize("proxy", ["127.0.0.1:99999", "#x@127.0.0.1:9", "/x@127.0.0.1:9"])
def test_a_proxy_that_cannot_be_read_is_not_shown(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = "" if "@" in proxy else "@"
    monkeypatch.setenv("HTTPS_PROXY", f"http://bob:hunter2{at}{proxy}")
    with pytest.raises(MailroomError, match="that of the proxy") as caught:
        JMAPClient(TOKEN, "https://mail.example/jmap").connect()
    assert "hunter2" not in str(caught.value)


def test_a_secret_is_blotted_out_longest_first() -> None:
    """One that begins like another leaves nothing of itself."""
    settings = MailroomSettings(
        jmap_token="hush", carddav_username="a", carddav_password="hush-hush-more"
    )
    assert settings.redact("a hush-hush-more b") == "a [secret] b"


# ----------------------------------------------------------------------------- who is sent them


def test_only_the_urls_that_the_session_names_are_sent_the_token() -> None:
    """The session may be at one place, what does the work at another; a third hears nothing."""
    with ExitStack() as stack:
        front = stack.enter_context(JMAPServer.with_mailroom_account())
        back = stack.enter_context(JMAPServer(account=front.account))
        third = stack.enter_context(JMAPServer(account=front.account))
        urls = back.session() | {key: third.session()[key] for key in ("downloadUrl", "uploadUrl")}
        moved = Fault("session", times=FOREVER, edit=lambda session: {**urls, "state": "1"})
        front.faults.append(moved)
        with running(front):
            front.wait_for(lambda: back.streams)
            wait_filed(front, tap(front, "bob@shop.example"))
        assert {request.kind for request in front.requests} == {"session"}
        assert {request.kind for request in back.requests} == {"api", "stream"}
        assert not third.requests


MOVES = [301, 302, 303, 307, 308]


@pytest.mark.parametrize("status", MOVES)
@pytest.mark.parametrize("when", ["session", "api", "stream"])
def test_no_redirect_takes_the_token_to_another_host(when: str, status: int) -> None:
    with JMAPServer.with_mailroom_account() as server, JMAPServer() as other:
        with running(server, poll_interval=0.05):
            server.wait_for(lambda: server.streams)
            location = f"{other.origin}/jmap/session?{when}"
            move = Fault(when, times=2, status=status, headers={"Location": location})
            server.faults += [move, Fault("api", status=400)]  # which makes it ask for the session
            server.streams.drop()
            server.wait_for(lambda: move.fired == 2)
            wait_filed(server, tap(server, "bob@shop.example"))
        assert not other.requests


@pytest.mark.parametrize("status", MOVES)
@pytest.mark.parametrize("method", ["PROPFIND", "REPORT", "GET", "PUT"])
def test_no_redirect_takes_the_password_to_another_host(method: str, status: int) -> None:
    book = MULTISTATUS.replace("/book/", "/events").format(ADDRESS_BOOK).encode()
    with Peer(at_once(b"HTTP/1.1 207 OK\r\n\r\n" + book)) as peer, JMAPServer() as other:
        store = CardDAVContacts(peer.url, credentials(PASSWORD, DAV_USER), bool)
        if method != "PROPFIND":
            store.prepare()
        peer.talk = at_once(refusal(status, Location=f"{other.origin}/events"))
        card = mailroom.Card("urn:uuid:1", peer.url)
        asks: dict[str, Callable[[], object]] = {
            "PROPFIND": store.prepare,
            "REPORT": lambda: store.cards([], [], []),
            "GET": lambda: store.apply([mailroom.CardChange("1", card, note=("x",))]),
            "PUT": lambda: store.apply(
                [mailroom.CardChange(mailroom.contact_uid("b@x.example"), address="b@x.example")]
            ),
        }
        with suppress(MailroomError):
            asks[method]()
        assert any(head.startswith(method.encode()) for head in peer.heads)
        assert not other.requests


def test_a_proxy_for_https_learns_the_host_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Peer(at_once(refusal(502))) as peer:
        proxy = peer.url.replace("//", "//eve:evil@")
        for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(MailroomError):
            JMAPClient(TOKEN, "mail.example").connect()
        store = CardDAVContacts("https://d.example", credentials(PASSWORD, "alice"), bool)
        with pytest.raises(MailroomError):
            store.prepare()
        hosts = [head.split()[1] for head in peer.heads]
        assert set(hosts) == {b"mail.example:443", b"d.example:443"}
        assert all(head.startswith(b"CONNECT ") for head in peer.heads)
        authorized = re.findall(rb"(?i)\n([a-z-]*authorization: .*)\r", b"".join(peer.heads))
        assert {line.split()[-1] for line in authorized} == {b"ZXZlOmV2aWw="}


def test_no_netrc_and_no_proxy_changes_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login eve password evil\ndefault login eve password evil\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://eve:evil@127.0.0.1:1")
    basic = b64encode(f"{DAV_USER}:{PASSWORD}".encode())
    with Peer(at_once(refusal(503))) as peer:
        store = CardDAVContacts(peer.url, credentials(PASSWORD, DAV_USER), bool)
        with pytest.raises(MailroomError):
            store.prepare()
        [head] = peer.heads
    assert re.findall(rb"(?i)\n[a-z-]*authorization: (.*)\r", head) == [b"Basic " + basic]
    assert head.startswith(b"PROPFIND /events HTTP/1.1")


# ------------------------------------------------------------------------------- the health port


def say(run: Running, data: bytes, seconds: float = 5) -> bytes:
    """What the health port answers to these bytes, which are all that the client sends."""
    address = ("127.0.0.1", run.settings.health_port)
    with socket.create_connection(address, seconds) as client:
        answer = b""
        with suppress(OSError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while piece := client.recv(65536):
                answer += piece
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split()[1])


@pytest.fixture
def healthy(capfd: pytest.CaptureFixture[str]) -> Iterator[Running]:
    """A service whose pages are asked for; it says nothing to anyone of who does."""
    with (
        JMAPServer.with_mailroom_account(Options(push=None)) as server,
        running(server, health_port=free_port(), log_level="info") as run,
    ):
        run.wait_for_cycles(1)
        said = run.output.getvalue()
        yield run
        assert status_of(say(run, b"GET /healthz HTTP/1.0\r\n\r\n")) == 200
        assert run.output.getvalue() == said
    assert capfd.readouterr() == ("", "")


METHODS = ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "get", "X"]
PLACES = ["/", "/healthz/", "/healthz/..", "//healthz", "/metrics/x", "/HEALTHZ", "*", "/.env"]


def test_the_port_answers_get_of_its_two_paths_and_nothing_else(healthy: Running) -> None:
    for path in ("/healthz", "/metrics", "/healthz?x=1"):
        answer = say(healthy, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert status_of(answer) == 200
    asked = [f"{method} {path}" for method in METHODS for path in ("/healthz", "/metrics")]
    asked += [f"GET {place}" for place in PLACES] + ["GET http://evil.example/x"]
    for line in asked:
        answer = say(healthy, f"{line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert status_of(answer) == 404, line
        assert answer.endswith((b"not found\n", b"\r\n\r\n"))


RUBBISH = {
    "nothing": b"",
    "line ends": b"\r\n" * 1000,
    "NULs": b"\0" * 1000,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
    "no version": b"GET /healthz\r\n\r\n",
    "an unknown version": b"GET /healthz HTTP/9.9\r\n\r\n",
    "an endless line": b"GET /" + b"x" * 100_000,
    "an endless header": b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100_000,
    "endless headers": b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
    "a header that is none": b"GET /healthz HTTP/1.1\r\nX\xff\0\r\n\r\n",
    "a length that is none": b"GET /healthz HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    "less than nothing": b"GET /healthz HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "more than comes": b"POST /healthz HTTP/1.1\r\nContent-Length: 999999999\r\n\r\nx",
    "bad chunks": b"POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    "bad UTF-8": b"GET /\xff%ff%00 HTTP/1.1\r\n\r\n",
    "noise": bytes(range(256)) * 100,
}


@pytest.mark.parametrize("name", RUBBISH)
def test_the_port_survives_rubbish_and_tells_nothing(healthy: Running, name: str) -> None:
    answer = say(healthy, RUBBISH[name])
    assert not re.search(rb"(?i)traceback|\.py|gevent|python", answer)
    assert len(answer) < 2000


def test_the_connection_is_closed_and_it_is_said(healthy: Running) -> None:
    """A client that keeps connections would otherwise meet one that is closed."""
    url = f"http://127.0.0.1:{healthy.settings.health_port}/healthz"
    with requests.Session() as session:
        session.trust_env = False
        for _ in range(50):
            assert session.get(url, timeout=5).headers["Connection"] == "close"


WHOLE = b"GET /healthz HTTP/1.1\r\n\r\n"
SLOW = [b"", b"G", b"GET /healthz HTTP/1.1\r\nX: ", WHOLE]
SLOW += [b"POST /healthz HTTP/1.1\r\nContent-Length: 999\r\n\r\nx"]


@pytest.mark.parametrize("half", SLOW)
def test_slow_clients_hold_neither_greenlets_nor_files(
    healthy: Running, monkeypatch: pytest.MonkeyPatch, half: bytes
) -> None:
    """However many there are; and who comes after them is answered."""
    monkeypatch.setattr(mailroom, "HEALTH_SECONDS", 0.3)
    before, address = open_files(), ("127.0.0.1", healthy.settings.health_port)
    with ExitStack() as stack:
        for _ in range(60):
            client = stack.enter_context(socket.create_connection(address, 5))
            client.sendall(half)
            gevent.sleep(0)
        gevent.sleep(0.05)
        assert open_files() <= before + 60 + mailroom.HEALTH_CLIENTS
        assert status_of(say(healthy, b"GET /healthz HTTP/1.0\r\n\r\n")) == 200
        healthy.server.wait_for(lambda: open_files() <= before + 60)


# --------------------------------------------------------------------- strangers and what they say


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_name_of_a_sender_forges_a_line(log_format: str) -> None:
    """Nor one of a label, a group or a contact, and none commands a terminal."""
    names = [*HOSTILE.values(), "\x1b]0;x\x07\x1b[2J\x9b31m", "\u202eforged"]
    with JMAPServer.with_mailroom_account(Options(push=None)) as server:
        server.account.add_contact("known@x.example", "\x1b[2J\n12:00:00 error forged")
        for n, name in enumerate(names):
            encoded = b64encode(name.encode()).decode()
            tap(server, f"=?utf-8?b?{encoded}?= <s{n}@x.example>")
            tap(server, f"=?utf-8?b?{encoded}?= <{name}@x.example>".replace("\n", ""))
        tap(server, "Known <known@x.example>")
        both = server.account.deliver("Two <two@x.example>", ["Screener"])
        server.account.label(both, "@ToFeed", "@ToJail")
        with running(server, poll_interval=0.1, log_format=log_format) as run:
            run.wait_for_cycles(1)
            written = run.output.getvalue()
        assert written.count("sender triaged") > len(names)
    assert_honest(written, log_format)


def assert_honest(written: str, log_format: str) -> None:
    """Each line is one of Mailroom's, and is plain."""
    assert written.isascii()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f]", written)
    for line in written.splitlines():
        if log_format == "json":
            assert {"time", "level", "event"} <= json.loads(line).keys()
        else:
            assert re.match(r"\d\d:\d\d:\d\d (debug|info|warning|error) +[a-z]", line), line


TRICKS = ["\x1b[2J\r\n12:00:00 error forged", "\x9b31m\x85\u2028x", "\u202e\x07\x08\x7f"]


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_server_forges_a_line(log_format: str) -> None:
    written = ""
    for trick in TRICKS:
        for fault in jmap_echoes(trick.encode("latin-1", "ignore").decode("latin-1")):
            if fault.headers and not fault.body:
                continue  # it is HTTP itself that such a header would break
            fault.headers = {"Content-Type": trick.encode("latin-1", "ignore").decode("latin-1")}
            fault.headers = {k: re.sub("[\r\n]", "", v) for k, v in fault.headers.items()}
            with JMAPServer.with_mailroom_account() as server:
                tap(server, "bob@shop.example")
                server.faults.append(fault)
                with running(server, poll_interval=0.05, log_format=log_format) as run:
                    server.wait_for(lambda: fault.fired)  # noqa: B023  (at once)
                    server.wait_for(lambda: run.cycles or run.greenlet.ready())
                    written += run.output.getvalue()
    assert_honest(written, log_format)


@pytest.mark.parametrize("fault", [ValueError, ConnectionError])
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_traceback_commands_no_terminal(
    monkeypatch: pytest.MonkeyPatch, log_format: str, fault: type[Exception]
) -> None:
    def boom(_: object) -> None:
        raise fault("\x1b[2J\x9b31m\rforged")

    monkeypatch.setattr(mailroom.Triage, "run", boom)
    server = JMAPServer.with_mailroom_account()
    with server, running(server, log_format=log_format) as run:
        assert run.status() == 1
    assert f"{fault.__name__}: " in run.output.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", run.output.getvalue())


@pytest.mark.parametrize("half", [half for half in SLOW if half != WHOLE])
def test_a_client_that_is_not_done_is_no_obstacle_to_the_end(half: bytes) -> None:
    port = free_port()
    with (
        JMAPServer.with_mailroom_account(Options(push=None)) as server,
        running(server, health_port=port) as run,
    ):
        run.wait_for_cycles(1)
        before = open_files()
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(half)
            server.wait_for(lambda: open_files() >= before + 2)
            assert run.stop() == 0
