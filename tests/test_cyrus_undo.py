"""Setup, undo and reset on a real Cyrus: mails over JMAP, contacts over CardDAV, and the account
compared object by object with what it was before.

Without Cyrus these tests fail, and say what to install."""

from collections.abc import Iterator, Mapping

import homes
import pytest
from books import cyrus_book
from cyrus_server import CyrusServer, CyrusUser

pytestmark = pytest.mark.cyrus


@pytest.fixture(scope="module")
def server() -> Iterator[CyrusServer]:
    with CyrusServer() as server:
        yield server


class CyrusHome:
    """A new user on Cyrus, with nothing of Mailroom's."""

    def __init__(self, server: CyrusServer) -> None:
        self.book = cyrus_book(server)
        self.user = CyrusUser(server, self.book.login[0])
        self.user.http.auth = None
        self.user.create_mailbox("Mine")

    @property
    def settings(self) -> Mapping[str, object]:
        url, token = self.user.server.origin, self.user.token
        return {"jmap_url": url, "jmap_token": token, **self.book.settings}

    def deliver(self, sender: str | None, subject: str, mailbox: str = "Screener") -> str:
        self.user.deliver(sender, mailbox, subject)
        return subject

    def tap(self, subject: str, *labels: str) -> None:
        found = {"resultOf": "0", "name": "Email/query", "path": "/ids"}
        get = {"#ids": found, "properties": ["subject"]}
        mails = self.user.jmap([["Email/query", {}, "0"], ["Email/get", get, "1"]])[1][1]["list"]
        [id_] = [mail["id"] for mail in mails if mail["subject"] == subject]
        boxes = self.user.mailbox_ids()
        patch = {f"mailboxIds/{boxes[label]}": True for label in labels}
        [[_, answer, _]] = self.user.jmap([["Email/set", {"update": {id_: patch}}, "0"]])
        assert answer["updated"], answer

    def where(self) -> dict[str, set[str]]:
        return self.user.mails()

    def boxes(self) -> dict[str, bool]:
        [[_, answer, _]] = self.user.jmap([["Mailbox/get", {"ids": None}, "0"]])
        return {box["name"]: box["isSubscribed"] for box in answer["list"]}


@pytest.fixture
def home(server: CyrusServer) -> CyrusHome:
    return CyrusHome(server)


def test_from_an_account_without_mailroom_to_one_without_it_again(home: CyrusHome) -> None:
    homes.story(home)
