"""The names other code relies on: importing mailroom, JMAPClient, drain_queue and sse_listener."""

from __future__ import annotations

import base64
import gzip
import inspect
import itertools
import json
import logging
import os
import queue
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.queue
import pytest
import requests
import responses
from jmap_server import (
    CORE,
    EVENT_PATH,
    MAIL,
    SESSION_PATH,
    WELL_KNOWN_PATH,
    Fault,
    JMAPServer,
    Options,
)

import mailroom
from mailroom import ConfigurationError, JMAPClient, MailroomError, ServerError, drain_queue

TOKEN = Options().token
HOST = "https://mail.example"
FOREVER = 10**9


def session(**changes: Any) -> dict[str, Any]:
    """A session object (RFC 8620 section 2) with as little as a server may say."""
    return {
        "capabilities": {CORE: {}, MAIL: {}},
        "accounts": {"u1": {"name": "alice", "isPersonal": True, "accountCapabilities": {}}},
        "primaryAccounts": {MAIL: "u1"},
        "username": "alice",
        "apiUrl": f"{HOST}/api/",
        "downloadUrl": f"{HOST}/download/",
        "uploadUrl": f"{HOST}/upload/",
        "eventSourceUrl": f"{HOST}/event/",
        "state": "1",
    } | changes


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in session().items() if key not in keys}


@pytest.fixture
def mocked() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


@pytest.fixture
def server() -> Iterator[JMAPServer]:
    with JMAPServer() as server:
        yield server
        assert not server.crashes


def connected(client: JMAPClient) -> JMAPClient:
    client.connect()
    return client


# Importing

ROOT = Path(mailroom.__file__).parent


def fresh(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A fresh Python that runs the code, without any setting and with an empty home."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAILROOM_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


FACTS = """
import gc, json, logging, os, signal, socket, sys, threading
import mailroom
import gevent
from gevent.monkey import is_module_patched
mailroom.MailroomSettings, mailroom.JMAPClient, mailroom.drain_queue, mailroom.sse_listener
is_open = lambda thing: isinstance(thing, socket.socket) and thing.fileno() >= 0
print(json.dumps({
    "patched": all(map(is_module_patched, ("socket", "ssl", "select", "threading", "time"))),
    "threads": threading.active_count(),
    "greenlets": sum(isinstance(thing, gevent.Greenlet) for thing in gc.get_objects()),
    "sockets": sum(map(is_open, gc.get_objects())),
    "SIGTERM": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "log handlers": len(logging.getLogger().handlers + logging.getLogger("mailroom").handlers),
    "files": os.listdir(),
}))
"""
NOTHING_STARTED = {
    "patched": True,
    "threads": 1,
    "greenlets": 0,
    "sockets": 0,
    "SIGTERM": True,
    "log handlers": 0,
    "files": [],
}


def test_importing_needs_no_token_and_prints_nothing(tmp_path: Path) -> None:
    ended = fresh("import mailroom", tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_importing_patches_the_sockets_and_starts_nothing(tmp_path: Path) -> None:
    ended = fresh(FACTS, tmp_path)
    assert ended.stderr == ""
    assert json.loads(ended.stdout) == NOTHING_STARTED


@pytest.mark.parametrize("first", ["responses", "requests", "ssl"])
def test_importing_after_the_sockets_are_in_use_patches_them_and_at_most_warns(
    tmp_path: Path, first: str
) -> None:
    ended = fresh(f"import {first}\n{FACTS}", tmp_path)
    assert json.loads(ended.stdout) == NOTHING_STARTED
    assert ended.stderr == "" or "MonkeyPatchWarning" in ended.stderr
    assert "Traceback" not in ended.stderr


LATE = f"""
import responses
from mailroom import JMAPClient
session = {{"primaryAccounts": {{{MAIL!r}: "u1"}}, "capabilities": {{}}, "apiUrl": "/api"}}
with responses.RequestsMock() as mock:
    mock.get("https://mail.example/jmap/session", json=session)
    client = JMAPClient("token", "mail.example")
    client.connect()
    print(client.account_id)
"""


def test_mocks_work_even_when_they_were_imported_first(tmp_path: Path) -> None:
    assert fresh(LATE, tmp_path).stdout == "u1\n"


# JMAPClient: where the session is

PLACES = [
    ("api.fastmail.com", "https://api.fastmail.com/jmap/session"),
    ("mail.example:8443", "https://mail.example:8443/jmap/session"),
    (HOST, f"{HOST}/.well-known/jmap"),
    (f"{HOST}/", f"{HOST}/.well-known/jmap"),
    (f"{HOST}:8443", f"{HOST}:8443/.well-known/jmap"),
    (f"{HOST}/jmap/session", f"{HOST}/jmap/session"),
    (f"{HOST}/some/where/?x=1", f"{HOST}/some/where/?x=1"),
]


@pytest.mark.parametrize(("hostname", "url"), PLACES)
def test_the_session_of_a_host_an_origin_or_a_url(
    mocked: responses.RequestsMock, hostname: str, url: str
) -> None:
    mocked.get(url, json=session())
    assert connected(JMAPClient("token", hostname)).account_id == "u1"
    [call] = mocked.calls
    assert call.request.url == url
    assert call.request.headers["Authorization"] == "Bearer token"
    assert all(0 < seconds <= 60 for seconds in call.request.req_kwargs["timeout"])  # type: ignore[attr-defined]


def test_the_host_is_fastmails_by_default(mocked: responses.RequestsMock) -> None:
    mocked.get(PLACES[0][1], json=session())
    assert connected(JMAPClient("token")).session_capabilities == {CORE: {}, MAIL: {}}


@pytest.mark.parametrize("kind", ["Options", "fastmail", "cyrus", "stalwart"])
@pytest.mark.parametrize("path", ["", "/", WELL_KNOWN_PATH, SESSION_PATH])
def test_a_real_session_absolute_or_relative_or_behind_a_redirect(kind: str, path: str) -> None:
    options = Options() if kind == "Options" else getattr(Options, kind)()
    with JMAPServer(options) as server:
        client = connected(JMAPClient(TOKEN, server.origin + path))
        assert client.account_id == server.account.id
        assert client.session_capabilities == server.capabilities()
        assert client.event_source_url is not None
        template = "?types={types}&closeafter={closeafter}&ping={ping}"
        ending = template if options.event_template else ""
        assert client.event_source_url == server.origin + EVENT_PATH + ending


def test_before_connect_there_is_no_account_and_no_event_source() -> None:
    client = JMAPClient("token", HOST)
    with pytest.raises(RuntimeError, match="connect"):
        _ = client.account_id
    assert client.event_source_url is None
    assert client.session_capabilities == {}


@pytest.mark.parametrize("nothing", [{}, {"eventSourceUrl": None}, {"eventSourceUrl": ""}])
def test_a_session_without_an_event_source(
    mocked: responses.RequestsMock, nothing: dict[str, Any]
) -> None:
    mocked.get(f"{HOST}/jmap", json=without("eventSourceUrl") | nothing)
    assert connected(JMAPClient("token", f"{HOST}/jmap")).event_source_url is None


RELATIVE = [
    ("/event/?types={types}", f"{HOST}/event/?types={{types}}"),
    ("event/", f"{HOST}/jmap/event/"),
    ("../event/", f"{HOST}/event/"),
    ("?event", f"{HOST}/jmap/?event"),
    ("//push.example/event", "https://push.example/event"),
    ("https://push.example/event", "https://push.example/event"),
]


@pytest.mark.parametrize(("named", "resolved"), RELATIVE)
def test_urls_are_relative_to_where_the_session_came_from(
    mocked: responses.RequestsMock, named: str, resolved: str
) -> None:
    mocked.get(f"{HOST}/.well-known/jmap", status=302, headers={"Location": "/jmap/"})
    mocked.get(f"{HOST}/jmap/", json=session(eventSourceUrl=named, apiUrl="api"))
    assert connected(JMAPClient("token", HOST)).event_source_url == resolved


def test_a_server_behind_a_tls_proxy_may_redirect_to_http_and_gets_https(
    mocked: responses.RequestsMock,
) -> None:
    mocked.get(
        f"{HOST}/.well-known/jmap", status=302, headers={"Location": "http://mail.example/j"}
    )
    mocked.get(f"{HOST}/j", json=session())
    assert connected(JMAPClient("token", HOST)).account_id == "u1"
    assert [call.request.url for call in mocked.calls] == [f"{HOST}/.well-known/jmap", f"{HOST}/j"]


def test_with_a_user_name_the_token_is_its_password(server: JMAPServer) -> None:
    connected(JMAPClient(TOKEN, server.session_url, username=server.options.username))
    pair = base64.b64encode(f"{server.options.username}:{TOKEN}".encode()).decode()
    assert server.requests[0].headers["authorization"] == f"Basic {pair}"


# JMAPClient: what can be wrong


def failure(client: JMAPClient, kind: type[MailroomError]) -> str:
    """The one line that connect() fails with; nothing is connected then."""
    with pytest.raises(MailroomError) as caught:
        client.connect()
    assert type(caught.value) is kind
    line = str(caught.value)
    assert line.isprintable()
    assert TOKEN not in line
    assert client.event_source_url is None
    with pytest.raises(RuntimeError):
        _ = client.account_id
    return line


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_for_the_user_to_mend(server: JMAPServer, status: int) -> None:
    server.faults.append(Fault("session", status=status))
    line = failure(JMAPClient(TOKEN, server.session_url), ConfigurationError)
    assert server.session_url in line
    assert str(status) in line


def test_a_wrong_token_is_refused_and_not_told(server: JMAPServer) -> None:
    line = failure(JMAPClient("wrong-hush", server.session_url), ConfigurationError)
    assert "hush" not in line


HTML = b"<html><body>Welcome to the hotel's network</body></html>"
ENDLESS = itertools.repeat(b"[" * 1000)
FAULTS: dict[str, Fault] = {
    "not found": Fault(status=404),
    "a server error": Fault(status=500, body=b"\xff\x00 oops"),
    "busy": Fault(status=503, headers={"Retry-After": "5"}),
    "busy until a rubbish date": Fault(
        status=503, headers={"Retry-After": "Wed, 21 Oct 99999999999 07:28:00 GMT"}
    ),
    "too many requests": Fault(status=429),
    "a redirect in circles": Fault(status=302, headers={"Location": SESSION_PATH}, times=FOREVER),
    "HTML": Fault(body=HTML, headers={"Content-Type": "text/html"}),
    "nothing": Fault(body=b""),
    "no JSON": Fault(body=b"\xff\xfe{}"),
    "deep JSON": Fault(body=b"[" * 50_000),
    "truncated": Fault(truncate=100),
    "truncated at once": Fault(truncate=0),
    "a reset": Fault(drop=True),
    "oversized": Fault(body=b" " * 60_000),
    "endless": Fault(body=ENDLESS),
    "an endless error": Fault(status=500, body=ENDLESS),
    "a bomb": Fault(body=gzip.compress(b" " * 10**7), headers={"Content-Encoding": "gzip"}),
    "no gzip": Fault(body=b"{}", headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_server_that_fails_is_worth_another_try(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(mailroom, "MAX_REPLY_BYTES", 50_000)
    fault = FAULTS[name]
    fault.when = "session"
    server.faults.append(fault)
    line = failure(JMAPClient(TOKEN, server.session_url), ServerError)
    assert server.origin in line
    server.faults.clear()
    assert connected(JMAPClient(TOKEN, server.session_url)).account_id == server.account.id


def test_a_reply_may_be_as_large_as_the_bound_and_no_larger(
    mocked: responses.RequestsMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps(session())
    mocked.get(f"{HOST}/jmap", body=body)
    monkeypatch.setattr(mailroom, "MAX_REPLY_BYTES", len(body))
    connected(JMAPClient("token", f"{HOST}/jmap"))
    monkeypatch.setattr(mailroom, "MAX_REPLY_BYTES", len(body) - 1)
    failure(JMAPClient("token", f"{HOST}/jmap"), ServerError)


def test_a_server_that_is_not_there(server: JMAPServer) -> None:
    server.pause()
    assert server.origin in failure(JMAPClient(TOKEN, server.session_url), ServerError)


BAD_PARTS: dict[str, list[Any]] = {
    "capabilities": [None, [], 5, "x"],
    "primaryAccounts": [None, [MAIL], 5, "x"],
    "apiUrl": [None, "", 5, [], {}, "https://["],
    "eventSourceUrl": [5, [HOST], {"a": 1}, "https://["],
}
BAD_LIMITS = [0, -1, "many", None, [], float("inf"), float("nan")]
RUBBISH: list[Any] = [
    *([], {}, None, True, 5, "session", [session()]),
    *(without(key) for key in ("capabilities", "primaryAccounts", "apiUrl")),
    *(session(**{key: value}) for key, bad in BAD_PARTS.items() for value in bad),
    *(session(capabilities={CORE: {"maxObjectsInGet": bad}, MAIL: {}}) for bad in BAD_LIMITS),
]


@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda value: json.dumps(value)[:80])
def test_a_session_that_is_rubbish_is_one_clear_error(
    mocked: responses.RequestsMock, rubbish: Any
) -> None:
    mocked.get(f"{HOST}/jmap", body=json.dumps(rubbish))
    client = JMAPClient("token", f"{HOST}/jmap")
    with pytest.raises(MailroomError) as caught:
        client.connect()
    assert str(caught.value).isprintable()
    assert client.event_source_url is None
    assert len(mocked.calls) == 1


@pytest.mark.parametrize("key", ["username", "accounts", "downloadUrl", "uploadUrl", "state"])
def test_a_session_may_lack_what_is_not_needed(mocked: responses.RequestsMock, key: str) -> None:
    mocked.get(f"{HOST}/jmap", json=without(key))
    assert connected(JMAPClient("token", f"{HOST}/jmap")).account_id == "u1"


@pytest.mark.parametrize("accounts", [{}, {MAIL: None}, {CORE: "u1"}])
def test_an_account_without_mail_is_for_the_user_to_mend(
    mocked: responses.RequestsMock, accounts: dict[str, Any]
) -> None:
    mocked.get(f"{HOST}/jmap", json=session(primaryAccounts=accounts))
    assert "mail" in failure(JMAPClient("token", f"{HOST}/jmap"), ConfigurationError)


# Trust

UNSAFE = [
    "http://mail.example/x",
    "http://203.0.113.5/x",
    "http://127.0.0.1.mail.example/x",
    "http://127.0.0.1@mail.example/x",
    "http://mail.example\\@127.0.0.1/x",
    "http://mail.example#@127.0.0.1/x",
    "HTTP://mail.example/x",
    "ftp://mail.example/x",
    "file:///etc/passwd",
]


@pytest.mark.parametrize("url", UNSAFE)
def test_no_secret_goes_to_a_plain_session_url(mocked: responses.RequestsMock, url: str) -> None:
    assert "https" in failure(JMAPClient("token", url), ConfigurationError)
    assert len(mocked.calls) == 0


@pytest.mark.parametrize("url", [*UNSAFE, "//mail.example/x"])
@pytest.mark.parametrize("key", ["apiUrl", "eventSourceUrl"])
def test_a_plain_url_that_the_session_names_is_refused(
    server: JMAPServer, key: str, url: str
) -> None:
    server.faults.append(Fault("session", edit=lambda session: {**session, key: url}))
    line = failure(JMAPClient(TOKEN, server.session_url), ConfigurationError)
    assert "mail.example" in line or url in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x", "http://[::1]/x", "http://localhost/x"])
def test_a_plain_url_may_name_this_machine(mocked: responses.RequestsMock, url: str) -> None:
    mocked.get(f"{HOST}/jmap", json=session(apiUrl=url, eventSourceUrl=url))
    assert connected(JMAPClient("token", f"{HOST}/jmap")).event_source_url == url


ELSEWHERE: list[Callable[[JMAPServer], str]] = [
    lambda other: other.session_url,
    lambda other: f"//127.0.0.1:{other.port}{SESSION_PATH}",
    lambda other: f"http://localhost:{other.port}{SESSION_PATH}",
    lambda other: f"http://127.0.0.2:{other.port}{SESSION_PATH}",
    lambda other: f"http://user:word@127.0.0.1:{other.port}{SESSION_PATH}",
]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ELSEWHERE)
def test_a_redirect_to_another_host_does_not_carry_the_token(
    server: JMAPServer, place: Callable[[JMAPServer], str], status: int
) -> None:
    with JMAPServer() as other:
        redirect = Fault("session", status=status, headers={"Location": place(other)})
        server.faults.append(redirect)
        with suppress(MailroomError):
            JMAPClient(TOKEN, server.session_url).connect()
        assert redirect.fired == 1
        assert not [one for one in other.requests if "authorization" in one.headers]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "location",
    ["https://other.example/jmap", "http://other.example/jmap", "https://mail.example:1/"],
)
def test_a_redirect_away_from_https_does_not_carry_the_token(
    mocked: responses.RequestsMock, location: str
) -> None:
    mocked.get(f"{HOST}/jmap", status=302, headers={"Location": location})
    mocked.get(location, json=session())
    with suppress(MailroomError):
        JMAPClient("token", f"{HOST}/jmap").connect()
    first, *others = [call.request for call in mocked.calls]
    assert "Authorization" in first.headers
    assert not [request for request in others if "Authorization" in request.headers]


@pytest.mark.parametrize("location", ["https://mail.example:443/new", "https://MAIL.example/new"])
def test_the_same_host_in_other_words_is_the_same(
    mocked: responses.RequestsMock, location: str
) -> None:
    mocked.get(f"{HOST}/jmap", status=302, headers={"Location": location})
    mocked.get(location, json=session())
    assert connected(JMAPClient("token", f"{HOST}/jmap")).account_id == "u1"


@pytest.mark.parametrize("location", ["http://[::1", "//\xff\xfe[", "http://127.0.0.1:port/", ""])
def test_a_redirect_to_nowhere_is_one_clear_error(server: JMAPServer, location: str) -> None:
    server.faults.append(
        Fault("session", status=302, headers={"Location": location}, times=FOREVER)
    )
    with pytest.raises(MailroomError) as caught:
        JMAPClient(TOKEN, server.session_url).connect()
    assert str(caught.value).isprintable()


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ~/.netrc that has credentials of its own for every host."""
    path = tmp_path / ".netrc"
    path.write_text("".join(f"machine {host} login eve password evil\n" for host in NETRC_HOSTS))
    path.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(path))


NETRC_HOSTS = ("127.0.0.1", "localhost", "mail.example")


def test_the_netrc_would_change_a_plain_header(netrc: None, server: JMAPServer) -> None:
    plain = requests.Session()
    plain.headers["Authorization"] = f"Bearer {TOKEN}"
    assert plain.get(server.session_url).status_code == 401


def test_a_netrc_cannot_change_the_credentials(
    netrc: None, server: JMAPServer, mocked: responses.RequestsMock
) -> None:
    mocked.get(f"{HOST}/.well-known/jmap", status=302, headers={"Location": "/jmap"})
    mocked.get(f"{HOST}/jmap", json=session())
    mocked.add_passthru(server.origin)
    connected(JMAPClient(TOKEN, HOST))
    connected(JMAPClient(TOKEN, server.origin))
    seen = [call.request.headers["Authorization"] for call in mocked.calls]
    seen += [request.headers["authorization"] for request in server.requests]
    assert set(seen) == {f"Bearer {TOKEN}"}
    assert [request.status for request in server.requests] == [302, 200]


def test_plain_http_to_this_machine_goes_through_no_proxy(
    server: JMAPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert connected(JMAPClient(TOKEN, server.session_url)).account_id == server.account.id


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1, with its key, that no one has signed."""
    path = tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subject = f"-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout {path}.key"
    command = [*make.split(), *subject.split(), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def test_tls_is_verified(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, f"{certificate}.key")
    with JMAPServer(ssl_context=context) as server:
        line = failure(JMAPClient(TOKEN, server.session_url), ServerError)
        assert "certificate" in line
        assert not server.requests
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert connected(JMAPClient(TOKEN, server.session_url)).account_id == server.account.id


# drain_queue

QUEUES: list[Callable[[], Any]] = [
    gevent.queue.Queue,
    gevent.queue.SimpleQueue,
    gevent.queue.JoinableQueue,
    gevent.queue.LifoQueue,
    gevent.queue.PriorityQueue,
    queue.Queue,
    queue.SimpleQueue,
    queue.LifoQueue,
    queue.PriorityQueue,
]


def named(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


@pytest.mark.parametrize("make", QUEUES, ids=named)
@pytest.mark.parametrize("items", [0, 1, 5])
def test_drain_queue_empties_any_queue_and_counts(make: Callable[[], Any], items: int) -> None:
    filled = make()
    for n in range(items):
        filled.put(f"item {n}")
    with gevent.Timeout(5):
        assert drain_queue(filled) == items
        assert filled.empty()
        assert drain_queue(filled) == 0
    filled.put("later")
    assert filled.get(timeout=1) == "later"


def test_drain_queue_counts_falsy_items_too() -> None:
    filled: gevent.queue.Queue[Any] = gevent.queue.Queue()
    for item in (None, "", 0, False):
        filled.put(item)
    assert drain_queue(filled) == 4


# sse_listener

EVENTS = [gevent.event.Event, threading.Event]
LISTENED = [gevent.queue.Queue, gevent.queue.SimpleQueue, queue.Queue, queue.SimpleQueue]


def test_the_parameters_of_sse_listener() -> None:
    parameters = list(inspect.signature(mailroom.sse_listener).parameters.values())
    names = [parameter.name for parameter in parameters]
    assert names[:5] == ["token", "event_source_url", "event_queue", "shutdown_event", "log"]
    assert [one.default for one in parameters[:5]] == [inspect.Parameter.empty] * 4 + [None]
    assert {one.kind for one in parameters[:5]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {one.kind for one in parameters[5:]} <= {inspect.Parameter.KEYWORD_ONLY}
    assert inspect.Parameter.empty not in [one.default for one in parameters[5:]]


class Listening:
    """sse_listener in a thread, as other code runs it."""

    def __init__(
        self,
        url: str,
        make_event: Callable[[], Any] = threading.Event,
        make_queue: Callable[[], Any] = queue.Queue,
        token: str = TOKEN,
        **more: Any,
    ) -> None:
        self.queue, self.shutdown = make_queue(), make_event()
        self._thread = threading.Thread(
            target=mailroom.sse_listener, args=(token, url, self.queue, self.shutdown), kwargs=more
        )

    def __enter__(self) -> Listening:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown.set()
        self._thread.join(1)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("make_event", EVENTS, ids=named)
@pytest.mark.parametrize("make_queue", LISTENED, ids=named)
@pytest.mark.parametrize("kind", ["fastmail", "cyrus", "stalwart"])
def test_sse_listener_in_a_thread_signals_until_the_event_is_set(
    kind: str, make_queue: Callable[[], Any], make_event: Callable[[], Any]
) -> None:
    options = getattr(Options, kind)(connect_event=False)
    with JMAPServer(options) as server:
        server.account.add_mailbox("Inbox", role="inbox")
        url = str(connected(JMAPClient(TOKEN, server.session_url)).event_source_url)
        with Listening(url, make_event, make_queue) as listening:
            server.wait_for(lambda: server.streams)
            for _ in range(3):
                server.account.deliver("bob@shop.example")
                assert listening.queue.get(timeout=2) == "state_changed"
            assert listening.queue.empty()
        server.account.deliver("bob@shop.example")
        assert listening.queue.empty()
        server.wait_for(lambda: not server.streams)


BODY = b"""\
: welcome

event: state
data: {"changed": {"u1": {"Email": "1"}}, "type": "connect"}

event: ping
data: {"interval": 30}

event: state
data: {"changed": {"u1": {"Email": "2"}}, "type": "change"}

event: state
data: nonsense

event: state
data: cut o"""


@pytest.mark.parametrize("make_event", EVENTS, ids=named)
@pytest.mark.parametrize("make_queue", LISTENED, ids=named)
def test_sse_listener_with_a_mocked_stream(
    mocked: responses.RequestsMock, make_queue: Callable[[], Any], make_event: Callable[[], Any]
) -> None:
    mocked.get(f"{HOST}/event/", body=BODY, content_type="text/event-stream")
    with Listening(f"{HOST}/event/", make_event, make_queue, "token") as listening:
        for _ in range(3):
            assert listening.queue.get(timeout=2) == "state_changed"
    assert listening.queue.empty()
    [call] = mocked.calls
    assert call.request.url == f"{HOST}/event/?types=Email,Mailbox&closeafter=no&ping=30"
    assert call.request.headers["Authorization"] == "Bearer token"


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was logged, but by urllib3."""
    return [record for record in caplog.records if not record.name.startswith("urllib3")]


def test_sse_listener_logs_to_the_log_it_is_given(
    server: JMAPServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.options.push = 204
    caplog.set_level(logging.DEBUG)
    for more in ({"log": logging.getLogger("elsewhere")}, {}, {"log": None}):
        with Listening(server.origin + EVENT_PATH, **more):
            server.wait_for(lambda: told(caplog))
        assert {record.name for record in told(caplog)} == {
            "elsewhere" if more.get("log") else "mailroom"
        }
        caplog.clear()


def test_sse_listener_returns_at_once_when_the_event_is_set_already(server: JMAPServer) -> None:
    shutdown = threading.Event()
    shutdown.set()
    with gevent.Timeout(1):
        mailroom.sse_listener(TOKEN, server.origin + EVENT_PATH, queue.Queue(), shutdown)
    assert not server.requests


@pytest.mark.parametrize("url", UNSAFE)
def test_sse_listener_sends_no_token_to_a_plain_url(
    mocked: responses.RequestsMock, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    with Listening(url), gevent.Timeout(5):
        while not told(caplog):
            gevent.sleep(0.001)
    assert len(mocked.calls) == 0
    assert TOKEN not in caplog.text


def test_the_body_of_a_redirect_is_not_read() -> None:
    """It may be endless, and nobody wants it."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 64:
            sent += 1
            yield b"x" * 2**20

    with JMAPServer.with_mailroom_account() as server:
        headers = {"Location": "/jmap/session"}
        server.faults = [Fault("session", status=302, headers=headers, body=endless())]
        JMAPClient(server.options.token, server.session_url).connect()
        assert sent < 32
