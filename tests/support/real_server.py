"""What the real servers of the tests have in common: a directory and a process of their own, a log,
and the end, at which nothing of them is left. And the cards of an address book on any of them."""

from __future__ import annotations

import contextlib
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import urljoin

import requests

START_DEADLINE, STOP_DEADLINE, POLL_STEP = 30.0, 10.0, 0.02
LIST_ALL = """<C:addressbook-query xmlns:D="DAV:" xmlns:C="urn:ietf:params:xml:ns:carddav">
<D:prop><C:address-data/></D:prop><C:filter/></C:addressbook-query>"""


class UnavailableError(RuntimeError):
    """A server is not installed, may not be run by this user, or did not come up."""


class RealServer:
    """A server that runs while it is entered."""

    home: Path
    process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        """Start it and wait until it answers."""
        with contextlib.ExitStack() as stack:
            self.open(stack)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def open(self, stack: contextlib.ExitStack) -> None:
        """Start it; on the stack is how all of it goes again."""
        raise NotImplementedError

    def wait_until_up(self, probe: Callable[[], object]) -> None:
        """Poll the handshake until it has been answered once."""
        deadline = time.monotonic() + START_DEADLINE
        while True:
            try:
                probe()
                return
            except Exception as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    log = (self.home / "log").read_text(errors="replace")
                    raise UnavailableError(
                        f"{type(self).__name__} did not come up: {error!r}, master status "
                        f"{self.process.poll()}. The end of its log:\n{log[-4000:]}"
                    ) from None
            time.sleep(POLL_STEP)


def http_session(login: tuple[str, str] | None = None) -> requests.Session:
    """A session that no proxy or netrc of the machine can lead astray."""
    session = requests.Session()
    session.trust_env, session.auth = False, login
    return session


def vcards(http: requests.Session, url: str, login: tuple[str, str]) -> dict[str, str]:
    """Every card of an address book by its URL, as a report shows it."""
    headers = {"Content-Type": "application/xml", "Depth": "1"}
    reply = http.request("REPORT", url, data=LIST_ALL, auth=login, headers=headers, timeout=60)
    reply.raise_for_status()
    responses = ET.fromstring(reply.content).iter("{DAV:}response")  # noqa: S314
    return {
        urljoin(url, response.findtext("{DAV:}href")): response.findtext(".//{*}address-data", "")
        for response in responses
    }
