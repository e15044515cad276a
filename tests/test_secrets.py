"""Secrets and strangers: who is sent the credentials, that nothing which Mailroom ever writes has
them in it, what the health port does for whoever comes, and that no sender writes the log."""

import json
import re
import socket
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from jmap_server import FOREVER, JSON, Fault, JMAPServer, Options
from peer import Peer, at_once, refusal
from ports import free_port
from radicale_server import RadicaleServer
from tools import command, running, tap, wait_filed
from worlds import Program, World

import mailroom

TOKEN, PASSWORD = """fmu1-se"cr'\\et/+&=9""", """p\\a'ss" wörd%+/&<:@"""
USER, DAV_USER = "alice@home.example", "älice"
PAGES = ("healthz", "metrics", "else")


@pytest.fixture(autouse=True)
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "FIRST_DELAY", 0.02)


def forms_of(secret: str, *users: str) -> set[str]:
    """The ways in which programs write a secret, base64 at any offset among them."""
    plain = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], secret}
    plain |= {quote(secret), quote(secret, ""), quote_plus(secret), repr(secret)[1:-1]}
    befores = ["", "x", "xx", *(f"{user}:" for user in users)]
    return plain | {b64encode(f"{before}{secret}".encode()).decode() for before in befores}


def portions(forms: set[str]) -> list[str]:
    """A few forms each: of a longer text the end would be cut off, secret or not."""
    return [" ".join(sorted(forms)[n::6]) for n in range(6)]


def leaks(*texts: str) -> list[str]:
    forms = forms_of(TOKEN, USER, "") | forms_of(PASSWORD, DAV_USER)
    return [f"{form} in {text[-300:]}" for text in texts for form in forms if form in text]


def problem(said: str) -> bytes:
    return json.dumps({"type": "about:blank", "detail": said}).encode()


def jmap_echoes(said: str) -> Iterator[Fault]:
    """Ways in which a JMAP server sends something back."""
    content = {"Content-Type": re.sub("[\r\n]", "", said).encode().decode("latin-1")}
    for when in ("session", "api", "stream"):
        yield Fault(when, status=500, body=problem(said))
        yield Fault(when, status=302, headers={"Location": f"https://evil.example/?{quote(said)}"})
        yield Fault(when, headers=content, body=problem(said))
    yield Fault("session", edit=lambda session: {**session, "apiUrl": f"http://{said}/"})
    yield Fault(edit=lambda reply: {**reply, "methodResponses": [[said, {said: said}, said]]})
    for method in ("Email/query", "Mailbox/get", "ContactCard/get"):
        yield Fault(errors={method: {"type": said, "description": said}})
    yield Fault(refuse={"*": {"type": said, "properties": [said], "description": said}})


def written(server: JMAPServer, fault: Fault | None = None, **settings: Any) -> list[str]:
    """What is logged and shown until a cycle is over after the fault."""
    tap(server, "bob@shop.example")
    server.faults = [fault] if fault else []
    with running(server, poll_interval=0.05, **settings) as run:
        server.wait_for(lambda: not fault or fault.fired)
        seen = run.cycles
        server.wait_for(lambda: run.cycles > seen or run.greenlet.ready())
        return [run.output.getvalue(), *(run.page(f"/{name}")[1] for name in PAGES)]


HOSTILE = ["\r\n12:00:00 error forged", "\x1b]0;x\x07\x1b[2J", "\x9b31m\x85\u2028x", "\u202e\x7f"]


def assert_honest(text: str, log_format: str) -> None:
    """Each line is one of Mailroom's, and nothing in it is for the terminal."""
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", text)
    for line in text.splitlines():
        is_text = re.match(r"\d\d:\d\d:\d\d (debug|info|warning|error) +[a-z]", line)
        assert is_text if log_format == "text" else json.loads(line)["event"], line


@pytest.mark.parametrize(("username", "log_format"), [(USER, "json"), ("", "text")])
def test_no_server_gets_a_secret_written_or_a_line_forged(username: str, log_format: str) -> None:
    settings: JSON = {"jmap_token": TOKEN, "jmap_username": username, "log_format": log_format}
    hostile = "".join(HOSTILE).encode("latin-1", "ignore").decode("latin-1")
    said = [hostile, *portions(forms_of(TOKEN, username))]
    for fault in chain.from_iterable(map(jmap_echoes, said)):
        with JMAPServer.with_mailroom_account(Options(token=TOKEN, username=USER)) as server:
            log, *pages = written(server, fault, **settings)
        assert not leaks(log, *pages)
        assert_honest(log, log_format)


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_sender_and_no_contact_forges_a_line_or_commands_a_terminal(log_format: str) -> None:
    """By a name or an address."""
    with JMAPServer.with_mailroom_account(Options(push=None)) as server:
        server.account.add_contact("bob@shop.example", HOSTILE[0])
        for n, name in enumerate(HOSTILE):
            encoded = b64encode(name.encode()).decode()
            for address in (f"s{n}", name.strip()):
                tap(server, f"=?utf-8?b?{encoded}?= <{address}@x.example>")
        log = written(server, log_format=log_format)[0]
    assert log.count("sender triaged") > len(HOSTILE)
    assert_honest(log, log_format)


def test_no_echo_of_a_carddav_server_is_written() -> None:
    settings = {"carddav_username": DAV_USER, "carddav_password": PASSWORD, "jmap_token": TOKEN}
    server = JMAPServer.with_mailroom_account(Options(token=TOKEN, push=None))
    with server, Peer(at_once()) as peer:
        for said in portions(forms_of(PASSWORD, DAV_USER)):
            dav = f"<D:multistatus xmlns:D='DAV:'><D:{quote(said, '')}>{said}".encode()
            for head, body in (("500 " + said, problem(said)), ("403 No", b""), ("207 OK", dav)):
                echo = f"HTTP/1.1 {head}\r\nWWW-Authenticate: {said}\r\n\r\n".encode()
                peer.talk = at_once(echo, body)
                assert not leaks(*written(server, None, carddav_url=peer.url, **settings))
    assert b"Authorization: Basic " in peer.heads[0]


@pytest.mark.parametrize("where", [0, *range(380, 500, 10), 9_960, 19_960])
def test_no_half_of_a_secret_is_left_where_a_text_is_cut(where: int) -> None:
    """And of two secrets, one of which begins like the other, the longer goes first."""
    token = "fmu1-" + "secret" * 9
    with JMAPServer(Options(token=token)) as server:
        body = problem("x" * where + token)
        server.faults.append(Fault("session", times=FOREVER, status=500, body=body))
        given = {"jmap_url": server.session_url, "jmap_token": token}
        ran = command("setup", **given, carddav_username="a", carddav_password="fmu1-")
    assert (ran.status, "secret" in ran.err.replace("[secret]", "")) == (1, False)


@pytest.mark.parametrize("status", [302, 307])
@pytest.mark.parametrize("when", ["session", "api", "stream"])
def test_no_redirect_takes_the_token_to_another_host(when: str, status: int) -> None:
    """Another port is another host."""
    with JMAPServer.with_mailroom_account() as server, JMAPServer() as other:
        move = Fault(when, times=2, status=status, headers={"Location": f"{other.origin}/x"})
        with running(server, poll_interval=0.05):
            server.wait_for(lambda: server.streams)
            server.faults += [move, Fault("api", status=400)]  # it asks for the session then
            server.streams.drop()
            server.wait_for(lambda: move.fired == 2)
            wait_filed(server, tap(server, "bob@shop.example"))
        assert not [one for one in other.requests if "authorization" in one.headers]


@pytest.mark.parametrize("method", ["PROPFIND", "REPORT", "PUT"])
def test_no_redirect_takes_the_password_away(method: str, radicale: RadicaleServer) -> None:
    with World("radicale", radicale) as world, JMAPServer() as other:
        world.tap("Bob <bob@shop.example>", "@ToFeed")
        move = Fault(lambda request: request.method == method, status=307)
        move.headers = {"Location": f"{other.origin}/"}
        world.servers[-1].faults.append(move)
        Program(world.settings).settle()
        assert move.fired
        assert not [one for one in other.requests if "authorization" in one.headers]


@pytest.mark.parametrize("scheme", ["http", "https", "unreadable"])
def test_no_netrc_and_no_proxy_learns_or_changes_the_credentials(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy is for https alone, and is told the host; a proxy's own password is not shown."""
    (tmp_path / ".netrc").write_text("default login eve password evil\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    with Peer(at_once(refusal(502))) as proxy, Peer(at_once(refusal(503))) as peer:
        url = "http://:99999" if scheme == "unreadable" else proxy.url
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.setenv(name, url.replace("//", "//eve:hunter2@"))
        url = peer.url if scheme == "http" else "https://mail.example/jmap"
        ran = command("setup", jmap_url=url, jmap_token="token")
    assert (ran.status, "hunter2" in ran.err) == (2 if scheme == "unreadable" else 1, False)
    assert (bool(peer.heads), bool(proxy.heads)) == (scheme == "http", scheme == "https")
    found = re.findall(rb"(?i)\n[a-z-]*authorization: (.*)\r", b"".join(peer.heads + proxy.heads))
    sent = {"http": b"Bearer token", "https": b"Basic " + b64encode(b"eve:hunter2")}
    assert set(found) == {sent.get(scheme)} - {None}


RUBBISH = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
    b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
    b"POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
]


def test_the_health_port_says_nothing_to_rubbish(capfd: pytest.CaptureFixture[str]) -> None:
    """And nothing of it to anyone else."""
    server, port = JMAPServer.with_mailroom_account(Options(push=None)), free_port()
    with server, running(server, health_port=port, log_level="info") as run:
        run.wait_for_cycles(1)
        said, answer = run.output.getvalue(), b""
        for rubbish in RUBBISH:
            with socket.create_connection(("127.0.0.1", port), 5) as client, suppress(OSError):
                client.sendall(rubbish)
                client.shutdown(socket.SHUT_WR)
                while piece := client.recv(65536):
                    answer += piece
        assert not re.search(rb"(?i)traceback|\.py|gevent|python", answer)
        assert run.output.getvalue() == said
    assert capfd.readouterr() == ("", "")
