"""The names other code relies on: importing mailroom, JMAPClient, drain_queue and sse_listener."""

import json
import os
import queue
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.queue
import pytest
import responses
from jmap_server import CORE, MAIL, Fault, JMAPServer, Options

import mailroom
from mailroom import ConfigurationError, JMAPClient, MailroomError, ServerError, drain_queue

TOKEN = Options().token
HOST = "https://mail.example"
MINE: dict[str, Any] = {MAIL: {}}
SESSION = {"capabilities": MINE, "primaryAccounts": {MAIL: "u"}, "apiUrl": "api/"}
FACTS = """
import gc, json, logging, os, signal, socket, threading, {first}
import mailroom, gevent
from gevent.monkey import is_module_patched
is_open = lambda thing: isinstance(thing, socket.socket) and thing.fileno() >= 0
print(json.dumps([
    all(map(is_module_patched, ("socket", "ssl", "select", "threading", "time"))),
    threading.active_count(),
    any(isinstance(thing, gevent.Greenlet) or is_open(thing) for thing in gc.get_objects()),
    signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    [*os.listdir(), *logging.getLogger("mailroom").handlers],
]))
"""


def connected(*given: Any) -> JMAPClient:
    client = JMAPClient(*given)
    client.connect()
    return client


@pytest.mark.parametrize("first", ["sys", "requests", "responses"])
def test_importing_needs_no_token_and_starts_nothing(tmp_path: Path, first: str) -> None:
    """It patches the sockets."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAILROOM_")}
    environment |= {"PYTHONPATH": str(Path(mailroom.__file__).parent), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", FACTS.format(first=first)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert json.loads(ended.stdout) == [True, 1, False, True, []]
    assert ended.stderr == "" or ("MonkeyPatchWarning" in ended.stderr and first != "sys")


PLACES = [
    ("", "https://api.fastmail.com/jmap/session"),
    ("mail.example:8443", "https://mail.example:8443/jmap/session"),
    (f"{HOST}:8443/", f"{HOST}:8443/.well-known/jmap"),
    (f"{HOST}/some/where/?x=1", f"{HOST}/some/where/?x=1"),
]


@pytest.mark.parametrize(("given", "url"), PLACES)
@responses.activate
def test_the_session_of_a_host_an_origin_or_a_url(given: str, url: str) -> None:
    responses.get(url, json=SESSION)
    client = JMAPClient("token", *filter(None, [given]))
    assert (client.event_source_url, client.session_capabilities) == (None, {})
    with pytest.raises(RuntimeError, match="connect"):
        _ = client.account_id
    client.connect()
    assert (client.account_id, client.event_source_url) == ("u", None)
    assert client.session_capabilities == {MAIL: {}}
    assert [call.request.url for call in responses.calls] == [url]
    assert responses.calls[0].request.headers["Authorization"] == "Bearer token"


RELATIVE = {
    "/event/?types={types}": f"{HOST}/event/?types={{types}}",
    "../event/": f"{HOST}/event/",
    "http://127.0.0.1:1/event": "http://127.0.0.1:1/event",
}


@pytest.mark.parametrize("origin", ["", "http://mail.example", HOST + ":443"])
@pytest.mark.parametrize(("named", "resolved"), RELATIVE.items())
@responses.activate
def test_urls_are_relative_to_the_session(named: str, resolved: str, origin: str) -> None:
    """A server behind a TLS proxy may redirect to http, and gets https."""
    headers = {"Location": f"{origin}/jmap/"}
    responses.get(f"{HOST}/.well-known/jmap", status=302, headers=headers)
    for place in (HOST, HOST + ":443"):
        responses.get(f"{place}/jmap/", json={**SESSION, "eventSourceUrl": named})
    found = connected("token", HOST).event_source_url
    assert str(found).replace(":443", "") == resolved
    assert responses.calls[1].request.headers["Authorization"] == "Bearer token"


def failure(url: str, kind: type[MailroomError] = MailroomError) -> str:
    """The one line that connect() fails with; nothing is connected then."""
    client = JMAPClient(TOKEN, url)
    with pytest.raises(kind) as caught:
        client.connect()
    said = str(caught.value)
    assert (said.isprintable(), TOKEN in said, client.event_source_url) == (True, False, None)
    return said


RUBBISH: list[dict[str, Any]] = [
    *({"capabilities": bad} for bad in (None, {CORE: {"maxObjectsInGet": "x"}, MAIL: {}})),
    *({"primaryAccounts": bad} for bad in (None, {}, {MAIL: None})),
    *({"apiUrl": bad} for bad in (5, "https://[", "http://mail.example/x")),
    *({"eventSourceUrl": bad} for bad in (5, "http://mail.example/x", "file:///etc/passwd")),
]
FAULTS: list[dict[str, Any]] = [
    *({"edit": wrong.__ror__} for wrong in RUBBISH),
    {"status": 503, "headers": {"Retry-After": "Wed, 99 Oct 2 07:28 GMT"}},
    {"status": 302, "headers": {"Location": "http://[::1"}},
    {"body": b"<html>", "headers": {"Content-Type": "text/html"}},
    *({"body": b"[" * 50_000}, {"body": b" " * 9_000_000}, {"truncate": 99}, {"status": 401}),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault)[:60])
def test_a_server_that_fails_is_one_clear_error(fault: dict[str, Any]) -> None:
    with JMAPServer() as server:
        server.faults.append(Fault("session", times=99, **fault))
        assert fault.get("edit") or server.origin in failure(server.session_url)
        failure(server.session_url, ConfigurationError if "401" in str(fault) else MailroomError)
        server.faults.clear()
        assert connected(TOKEN, server.session_url).account_id == server.account.id


@pytest.mark.parametrize("url", ["http://x.example/x", "http://127.0.0.1@x.example/", "ftp://x/"])
@responses.activate
def test_no_secret_goes_to_a_plain_url(url: str) -> None:
    assert "https" in failure(url, ConfigurationError)
    shutdown = gevent.event.Event()
    listener = gevent.spawn(mailroom.sse_listener, TOKEN, url, queue.Queue(), shutdown)
    gevent.sleep(0.02)
    shutdown.set()
    listener.get(timeout=2)
    assert not responses.calls


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_tls_is_verified(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "certificate.pem"
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {path}.key -out {path} -subj /CN=x"
    subprocess.run([*make.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, f"{path}.key")
    with JMAPServer(ssl_context=context) as server:
        assert "certificate" in failure(server.session_url, ServerError)
        monkeypatch.setenv(variable, str(path))
        assert connected(TOKEN, server.session_url).account_id == server.account.id


QUEUES = [gevent.queue.Queue, gevent.queue.SimpleQueue, queue.Queue, queue.SimpleQueue]
Make = Callable[[], Any]


@pytest.mark.parametrize("make", QUEUES)
def test_drain_queue_empties_any_queue_and_counts(make: Make) -> None:
    filled = make()
    for n in range(5):
        filled.put(n)  # one of them is 0
    assert (drain_queue(filled), drain_queue(filled)) == (5, 0)


@pytest.mark.parametrize("make_event", [gevent.event.Event, threading.Event])
@pytest.mark.parametrize("make_queue", QUEUES)
def test_sse_listener_in_a_thread_signals_until_told(make_queue: Make, make_event: Make) -> None:
    with JMAPServer() as server:
        server.account.add_mailbox("Inbox", role="inbox")
        url, signals = connected(TOKEN, server.session_url).event_source_url, make_queue()
        given = (TOKEN, url, signals, shutdown := make_event(), mailroom.LOG)
        (thread := threading.Thread(target=mailroom.sse_listener, args=given)).start()
        server.wait_for(lambda: server.streams)
        for _ in range(3):
            server.account.deliver("bob@shop.example")
            assert signals.get(timeout=2) == "state_changed"
        assert signals.empty()
        shutdown.set()
        thread.join(1)
        assert not thread.is_alive()


@responses.activate
def test_sse_listener_by_keywords_and_with_a_mocked_stream() -> None:
    event = b"event: state\ndata: x\n\n"
    body = b": welcome\n\n" + event + b"event: ping\ndata: {}\n\n" + event + event[:-1]
    responses.get(f"{HOST}/event/", body=body, content_type="text/event-stream")
    signals, shutdown = queue.Queue[str](), gevent.event.Event()
    given: dict[str, Any] = {"event_queue": signals, "shutdown_event": shutdown}
    given |= {"token": TOKEN, "event_source_url": f"{HOST}/event/", "log": mailroom.LOG}
    listener = gevent.spawn(mailroom.sse_listener, **given)
    assert [signals.get(timeout=2) for _ in range(2)] == ["state_changed"] * 2
    shutdown.set()
    listener.get(timeout=2)
    assert signals.empty()
    [call] = responses.calls
    assert call.request.url == f"{HOST}/event/?types=Email,Mailbox&closeafter=no&ping=30"
    assert call.request.headers["Authorization"] == f"Bearer {TOKEN}"
