"""A real Radicale for tests: a second CardDAV server, quite unlike Cyrus.

    with RadicaleServer() as radicale:
        radicale.put("bob.vcf", "BEGIN:VCARD\r\n...")
        radicale.cards()  # {"/alice/contacts/bob.vcf": b"BEGIN:VCARD..."}

Every instance has its own storage and port. If it cannot start, entering raises
`RadicaleUnavailableError` with the end of its log.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

import requests
from ports import free_port

START_DEADLINE = 30.0
STOP_DEADLINE = 10.0
POLL_STEP = 0.02
# Radicale syncs every write to the disk, which nothing here needs.
IN_MEMORY = Path("/dev/shm")  # noqa: S108  (the directories in it are mkdtemp's)

CONFIG = """\
[server]
hosts = 127.0.0.1:{port}
[auth]
type = htpasswd
htpasswd_filename = {home}/users
htpasswd_encryption = plain
delay = 0
[storage]
filesystem_folder = {home}/collections
[logging]
level = info
"""
MAKE_ADDRESS_BOOK = """\
<?xml version="1.0" encoding="utf-8"?>
<mkcol xmlns="DAV:" xmlns:C="urn:ietf:params:xml:ns:carddav"><set><prop>
<resourcetype><collection/><C:addressbook/></resourcetype><displayname>{name}</displayname>
</prop></set></mkcol>
"""


class RadicaleUnavailableError(RuntimeError):
    """Radicale is not installed or did not come up."""


class RadicaleServer:
    """One running Radicale with one user and one empty address book."""

    password = "wonderland"

    def __init__(self, username: str = "alice", addressbook: str = "contacts") -> None:
        self.username = username
        self.addressbook = addressbook
        self.http = requests.Session()
        self.http.trust_env = False
        self.http.auth = (username, self.password)
        self.port = 0
        self._stack = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """Where a CardDAV client starts to look."""
        return f"http://127.0.0.1:{self.port}/"

    @property
    def addressbook_url(self) -> str:
        """The address book itself, with a trailing slash."""
        return f"{self.url}{self.username}/{self.addressbook}/"

    def __enter__(self) -> Self:
        """Start it, wait until it answers and create the address book."""
        with contextlib.ExitStack() as stack:
            self.home = Path(
                tempfile.mkdtemp("", "radicale-", IN_MEMORY if IN_MEMORY.is_dir() else None)
            )
            stack.callback(shutil.rmtree, self.home, ignore_errors=True)
            stack.callback(self.http.close)
            self._process = self._spawn()
            stack.callback(_stop, self._process)
            self._wait_until_up()
            self.make_addressbook(self.addressbook)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it and remove its storage."""
        self._stack.close()

    def make_addressbook(self, name: str) -> str:
        """Create an address book beside the first one; returns its URL."""
        url = f"{self.url}{self.username}/{name}/"
        self._request("MKCOL", url, MAKE_ADDRESS_BOOK.format(name=name).encode())
        return url

    def put(self, name: str, vcard: str | bytes) -> str:
        """Store a card under a name, new or not, and return its URL."""
        url = urljoin(self.addressbook_url, name)
        body = vcard.encode() if isinstance(vcard, str) else vcard
        self._request("PUT", url, body, {"Content-Type": "text/vcard; charset=utf-8"})
        return url

    def delete(self, name: str) -> None:
        """Remove a card by its name or href."""
        self._request("DELETE", urljoin(self.addressbook_url, name))

    def cards(self) -> dict[str, bytes]:
        """Every card by its href, exactly as a GET of it answers."""
        answer = self._request("PROPFIND", self.addressbook_url, headers={"Depth": "1"})
        tree = ET.fromstring(answer.content)  # noqa: S314  (from the server we started)
        hrefs = [node.text or "" for node in tree.iterfind("{DAV:}response/{DAV:}href")]
        return {
            href: self._request("GET", urljoin(self.url, href)).content
            for href in hrefs
            if not href.endswith("/")
        }

    def log_tail(self, lines: int = 40) -> str:
        """The end of the server's log."""
        with contextlib.suppress(OSError):
            return "\n".join((self.home / "log").read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _request(
        self, method: str, url: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> requests.Response:
        response = self.http.request(method, url, data=body, headers=headers, timeout=10)
        response.raise_for_status()
        return response

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.port = free_port()
        (self.home / "users").write_text(f"{self.username}:{self.password}\n")
        (self.home / "config").write_text(CONFIG.format(home=self.home, port=self.port))
        with (self.home / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "radicale", "--config", str(self.home / "config")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_DEADLINE
        while True:
            try:
                self._request("OPTIONS", self.url)
                return
            except requests.RequestException as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RadicaleUnavailableError(
                        f"Radicale did not come up ({error!r}). Its log:\n{self.log_tail()}"
                    ) from error
                time.sleep(POLL_STEP)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(STOP_DEADLINE)
