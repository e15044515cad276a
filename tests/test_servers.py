"""The real servers that other tests lean on start, answer, keep apart and leave nothing behind."""

from pathlib import Path

import cyrus_server
import pytest
from cyrus_server import CyrusServer, CyrusUnavailableError, Version
from debian_root import BootstrapError, make_root
from radicale_server import RadicaleServer, RadicaleUnavailableError

CARD = (
    "BEGIN:VCARD\r\nVERSION:3.0\r\nUID:5f6b2c1e-0000-4000-8000-000000000001\r\n"
    "FN:Bob\r\nN:;Bob;;;\r\nEMAIL:bob@shop.example\r\nEND:VCARD\r\n"
)


@pytest.mark.cyrus
@pytest.mark.parametrize("version", ["3.6", "3.12"])
def test_cyrus_keeps_what_it_is_given_and_leaves_nothing(version: Version) -> None:
    with CyrusServer(version=version) as cyrus:
        alice = cyrus.add_user("alice")
        alice.create_mailboxes(["Screener", "Lists", "Lists/Python"])
        alice.deliver("Bob <bob@shop.example>", mailbox="Screener", subject="Sale")
        alice.deliver("carol@shop.example", subject="Invoice")
        alice.deliver(None, mailbox="Lists/Python", subject="No sender")
        url, auth = f"{alice.addressbook_url}bob.vcf", (alice.username, alice.password)
        headers = {"Content-Type": "text/vcard"}
        assert alice.http.put(url, CARD, auth=auth, headers=headers).status_code == 201
        cyrus.stop()
        cyrus.start()
        places = {"Sale": {"Screener"}, "Invoice": {"Inbox"}, "No sender": {"Lists/Python"}}
        assert (alice.mails(), alice.http.get(url, auth=auth).text) == (places, CARD)
        stream = f"{cyrus.origin}/jmap/eventsource/?types=*&closeafter=no&ping=30"
        status = alice.http.get(stream, stream=True).status_code
        assert status == (200 if version == "3.12" else 204)
        home = cyrus.home
    assert not home.exists()


def test_a_missing_cyrus_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cyrus_server, "MASTER", tmp_path / "nowhere")
    with pytest.raises(CyrusUnavailableError, match=r"apt-get install .*cyrus-imapd"):
        CyrusServer().__enter__()


@pytest.mark.parametrize(
    ("mirror", "message"),
    [
        ("http://mirror.example/debian", "mmdebstrap is missing.* apt-get install mmdebstrap"),
        ("", "no Debian mirror.* apt-get update"),
    ],
)
def test_a_missing_mmdebstrap_or_mirror_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mirror: str, message: str
) -> None:
    for name in ("apt-get", "apt-config"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {mirror}\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BootstrapError, match=message):
        make_root(tmp_path / "root", "minbase", "cyrus-imapd")


@pytest.mark.cyrus
def test_a_cyrus_that_does_not_start_fails_at_once_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = cyrus_server.IMAPD_CONF.replace("conversations: 1", "conversations: perhaps")
    monkeypatch.setattr(cyrus_server, "IMAPD_CONF", bad)
    cyrus = CyrusServer()
    with pytest.raises(CyrusUnavailableError, match=r"did not come up.*master status 78"):
        cyrus.__enter__()
    assert not cyrus.home.exists()


def test_two_radicale_keep_cards_apart_and_leave_nothing() -> None:
    with RadicaleServer() as one, RadicaleServer() as other:
        urls = [f"{server.addressbook_url}bob.vcf" for server in (one, other)]
        one.http.put(urls[0], CARD, headers={"Content-Type": "text/vcard"}).raise_for_status()
        assert "EMAIL:bob@shop.example\r\n" in one.http.get(urls[0]).text
        assert other.http.get(urls[1]).status_code == 404
        assert one.http.get(one.url, auth=("alice", "wrong")).status_code == 401
    assert not one.home.exists()


def test_a_radicale_that_does_not_start_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radicale_server.CONFIG", "[nonsense]\nkey = 1\n")
    with pytest.raises(RadicaleUnavailableError, match=r"did not come up[\s\S]*nonsense"):
        RadicaleServer().__enter__()
