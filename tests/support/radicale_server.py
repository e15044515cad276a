"""A real Radicale for tests: a second CardDAV server, quite unlike Cyrus.

Every instance has its own storage and port. If it cannot start, entering raises
`RadicaleUnavailableError` with the end of its log.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import requests
from ports import free_port
from real_server import STOP_DEADLINE, RealServer, UnavailableError, http_session

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
RadicaleUnavailableError = UnavailableError


class RadicaleServer(RealServer):
    """One running Radicale with one user and one empty address book."""

    password = "wonderland"

    def __init__(self, username: str = "alice", addressbook: str = "contacts") -> None:
        self.username = username
        self.addressbook = addressbook
        self.http = http_session((username, self.password))
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def addressbook_url(self) -> str:
        return f"{self.url}{self.username}/{self.addressbook}/"

    def open(self, stack: contextlib.ExitStack) -> None:
        memory = IN_MEMORY if IN_MEMORY.is_dir() else None
        self.home = Path(tempfile.mkdtemp("", "radicale-", memory))
        stack.callback(shutil.rmtree, self.home, ignore_errors=True)
        stack.callback(self.http.close)
        self.port = free_port()
        (self.home / "users").write_text(f"{self.username}:{self.password}\n")
        (self.home / "config").write_text(CONFIG.format(home=self.home, port=self.port))
        command = [sys.executable, "-u", "-m", "radicale", "--config", f"{self.home}/config"]
        with (self.home / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        stack.callback(self.process.wait, STOP_DEADLINE)
        stack.callback(self.process.kill)
        self.wait_until_up(lambda: self._request("OPTIONS", self.url))
        self.make_addressbook(self.addressbook)

    def make_addressbook(self, name: str) -> str:
        """Create an address book beside the first one; returns its URL."""
        url = f"{self.url}{self.username}/{name}/"
        self._request("MKCOL", url, MAKE_ADDRESS_BOOK.format(name=name))
        return url

    def _request(self, method: str, url: str, body: str = "") -> requests.Response:
        response = self.http.request(method, url, data=body.encode(), timeout=10)
        response.raise_for_status()
        return response
