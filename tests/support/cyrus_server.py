"""A real Cyrus IMAP for tests: JMAP mail, CardDAV and IMAP on free loopback ports.

3.6 comes from the machine's own packages; 3.12, with push and an index that finds senders, from
those of a newer Debian in a root file system that is made once per machine. Several can run at
once. One that is missing, or may not be run, is an error, never a test that passes or is skipped.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import hmac
import imaplib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any, Literal

import vobject  # type: ignore[import-untyped]
from debian_root import make_root
from ports import free_ports
from processes import wait_for
from real_server import START_DEADLINE, RealServer, UnavailableError, http_session, vcards

INSTALL = (
    "apt-get install -y --no-install-recommends "
    "cyrus-imapd cyrus-caldav cyrus-admin sasl2-bin libsasl2-modules"
)
SUITES = ("trixie", "trixie-backports")
BACKPORTS = '--aptopt=APT::Default-Release "trixie-backports"'
PACKAGES = "cyrus-imapd,cyrus-caldav"

Version = Literal["3.6", "3.12"]
ROOT = Path("/")
MASTER = Path("usr/sbin/cyrmaster")
HTTPD = Path("usr/lib/cyrus/bin/httpd")
CAPABILITIES = ["urn:ietf:params:jmap:core", "urn:ietf:params:jmap:mail"]

IMAPD_CONF = """\
configdirectory: {home}/conf
defaultpartition: default
partition-default: {home}/mail
proc_path: {home}/run/proc
mboxname_lockpath: {home}/run/lock
idlesocket: {home}/run/idle
notifysocket: {home}/run/notify
servername: localhost
admins: cyrus
virtdomains: userid
defaultdomain: {default_domain}
unixhierarchysep: yes
altnamespace: yes
allowplaintext: yes
sasl_mech_list: PLAIN
sasl_pwcheck_method: alwaystrue
httpmodules: carddav jmap
http_jwt_key_dir: {home}/keys
conversations: 1
conversations_db: twoskip
"""
NO_SEARCH = "search_engine: none\n"
XAPIAN_SEARCH = """\
search_engine: xapian
search_index_headers: yes
defaultsearchtier: t1
t1searchpartition-default: {home}/search
sync_log: yes
sync_log_channels: squatter
"""
# How long a change may go unnoticed by a stream; 60 seconds if nothing is said.
PUSH = "jmap_pushpoll: 1s\n"
CYRUS_CONF = """\
START {{
  recover cmd="ctl_cyrusdb -C {home}/imapd.conf -r"
  idled cmd="idled -C {home}/imapd.conf"
}}
SERVICES {{
  imap cmd="imapd -C {home}/imapd.conf" listen="127.0.0.1:{imap}" prefork=0
  http cmd="httpd -C {home}/imapd.conf" listen="127.0.0.1:{http}" prefork=0
}}
DAEMON {{
{daemons}}}
"""
URN = "urn:uuid:"
INDEXER = '  squatter cmd="squatter -C {home}/imapd.conf -R"\n'
DOMAIN = "mailroom.example"
CyrusUnavailableError = UnavailableError


class CyrusServer(RealServer):
    """One running Cyrus. `search=True` adds a Xapian index that follows new mail; 3.12 always has
    one. It knows a user of its default domain by the bare name, with `full_usernames=True` by the
    whole address. `more` are further lines for its imapd.conf."""

    def __init__(
        self,
        *,
        version: Version = "3.6",
        search: bool = False,
        full_usernames: bool = False,
        more: str = "",
    ) -> None:
        self.default_domain = "default.invalid" if full_usernames else DOMAIN
        self.version, self.more = version, more
        self.search = search or version == "3.12"
        self.imap_port = self.http_port = 0
        self._key = secrets.token_bytes(32)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def open(self, stack: contextlib.ExitStack) -> None:
        """In a directory that Cyrus owns."""
        self._root = _newer_root() if self.version == "3.12" else ROOT
        owner = _require_cyrus(self._root)
        # Not tempfile's directory: it is another one in the other root.
        self.home = Path(tempfile.mkdtemp(prefix="cyrus-", dir=self._root / "tmp"))
        stack.callback(_remove, self.home)
        self._configure(owner)
        stack.callback(self.stop)
        self.start()

    def start(self) -> None:
        """Start it, also again with all that it holds, and wait until it answers."""
        self.process = self._spawn()
        self.wait_until_up(self._probe)

    def stop(self) -> None:
        """Kill the master with all its children: it would leave the detached `idled` behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def add_user(self, name: str) -> CyrusUser:
        """Create the user's inbox (the address book comes with the first CardDAV request)."""
        user = CyrusUser(self, name)
        with self.imap("cyrus") as admin:
            _ok(admin.create(f'"user/{user.address}"'))
        self.stack.callback(user.http.close)
        return user

    @contextlib.contextmanager
    def imap(self, login: str) -> Iterator[imaplib.IMAP4]:
        """An IMAP connection, logged in; `cyrus` is the administrator, any password is right."""
        with imaplib.IMAP4("127.0.0.1", self.imap_port, timeout=START_DEADLINE) as connection:
            connection.login(login, "any")
            yield connection

    def token(self, username: str) -> str:
        """A Bearer token for the user: Cyrus wants `sub` and accepts no other claim."""
        head = json.dumps({"alg": "HS256", "typ": "JWT"}), json.dumps({"sub": username})
        signed = ".".join(_base64url(part.encode()) for part in head)
        return f"{signed}.{_base64url(hmac.digest(self._key, signed.encode(), hashlib.sha256))}"

    def _configure(self, owner: tuple[int, int]) -> None:
        """Write both configuration files and the key into directories that Cyrus owns."""
        for name in ("conf/db", "conf/socket", "mail", "run", "keys", "search"):
            (self.home / name).mkdir(parents=True)
        self.imap_port, self.http_port = free_ports(2)
        home, known = self._inner_home, {"imap": f"{self.imap_port}", "http": f"{self.http_port}"}
        imapd_conf = IMAPD_CONF + (XAPIAN_SEARCH if self.search else NO_SEARCH) + self.more
        imapd_conf += PUSH if self.version == "3.12" else ""
        imapd_conf = imapd_conf.format(home=home, default_domain=self.default_domain)
        (self.home / "imapd.conf").write_text(imapd_conf)
        known["daemons"] = INDEXER.format(home=home) if self.search else ""
        (self.home / "cyrus.conf").write_text(CYRUS_CONF.format(home=home, **known))
        pem = f"-----BEGIN HMAC KEY-----\n{base64.b64encode(self._key).decode()}\n"
        (self.home / "keys" / "hmac.pem").write_text(f"{pem}-----END HMAC KEY-----\n")
        for path in (self.home, *self.home.rglob("*")):
            os.chown(path, *owner)

    @property
    def _inner_home(self) -> Path:
        """The directory as Cyrus sees it from inside its root."""
        return Path("/") / self.home.relative_to(self._root)

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the master in a process group of its own, which is how all of it is found again."""
        home, path = self._inner_home, "/usr/sbin:/usr/bin:/sbin:/bin"
        files = ["-C", f"{home}/imapd.conf", "-M", f"{home}/cyrus.conf", "-p", f"{home}/run/pid"]
        # -L is for the children; what the master says before it obeys -L comes on stderr.
        command = ["chroot", str(self._root), f"/{MASTER}", "-D", *files, "-L", f"{home}/log"]
        given: Any = {"env": {"PATH": path, "CYRUS_VERBOSE": "1"}, "start_new_session": True}
        given |= {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with (self.home / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, **given)

    def _probe(self) -> None:
        with self.imap("cyrus"), http_session() as http:
            http.options(f"{self.origin}/", timeout=5)


class CyrusUser:
    """An account on a running Cyrus, with the helpers a test needs to look at it from outside."""

    password = "any"  # the server takes every password

    def __init__(self, server: CyrusServer, name: str) -> None:
        self.server, self.address = server, f"{name}@{DOMAIN}"
        self.username = name if server.default_domain == DOMAIN else self.address
        self.token = server.token(self.username)
        self.jmap_url = f"{server.origin}/jmap/"
        self.addressbook_url = f"{server.origin}/dav/addressbooks/user/{self.username}/Default/"
        self.http = http_session()
        self.http.headers["Authorization"] = f"Bearer {self.token}"

    def create_mailboxes(self, paths: Iterable[str]) -> None:
        """Create mailboxes in the order given (`Lists/Python` is nested)."""
        for path in paths:
            self.create_mailbox(path)

    def create_mailbox(self, path: str, role: str | None = None) -> None:
        """Create one subscribed mailbox, the parent of which exists."""
        parent, _, name = path.rpartition("/")
        parent_id = self.mailbox_ids()[parent] if parent else None
        wanted = {"name": name, "parentId": parent_id, "role": role, "isSubscribed": True}
        [[_, answer, _]] = self.jmap([["Mailbox/set", {"create": {"new": wanted}}, "0"]])
        if not answer.get("created"):
            raise ValueError(f"Cyrus did not create {path}: {answer}")

    def deliver(self, from_: str | None, mailbox: str = "INBOX", subject: str = "Hello") -> str:
        """Put a mail into a mailbox (an ASCII path); returns its Message-ID."""
        mail = EmailMessage()
        mail["To"], mail["Subject"], mail["Date"] = self.address, subject, formatdate()
        mail["Message-ID"] = identity = make_msgid(domain="mail.example")
        if from_ is not None:
            mail["From"] = from_
        mail.set_content("A mail of the tests.\n")
        with self.server.imap(self.address) as connection:
            _ok(connection.append(f'"{mailbox}"', "", "", mail.as_bytes()))
        return identity

    def jmap(self, calls: list[list[Any]]) -> list[list[Any]]:
        """Send method calls (`accountId` is filled in) and return the method responses."""
        full = [[method, {"accountId": self.username, **args}, tag] for method, args, tag in calls]
        request = {"using": CAPABILITIES, "methodCalls": full}
        response = self.http.post(self.jmap_url, json=request, timeout=30)
        response.raise_for_status()
        return [*response.json()["methodResponses"]]

    def mailbox_ids(self) -> dict[str, str]:
        [[_, answer, _]] = self.jmap([["Mailbox/get", {"ids": None}, "0"]])
        by_id = {mailbox["id"]: mailbox for mailbox in answer["list"]}

        def path(mailbox: dict[str, Any]) -> str:
            parent = by_id.get(mailbox["parentId"])
            return f"{path(parent)}/{mailbox['name']}" if parent else str(mailbox["name"])

        return {path(mailbox): identity for identity, mailbox in by_id.items()}

    def mails(self) -> dict[str, set[str]]:
        """The mailbox paths of every mail, by the mail's subject."""
        paths = {identity: path for path, identity in self.mailbox_ids().items()}
        found = ((mail["subject"], mail["mailboxIds"]) for mail in self._all_mails())
        return {subject: {paths[one] for one in boxes} for subject, boxes in found}

    def _all_mails(self) -> list[dict[str, Any]]:
        found = {"resultOf": "0", "name": "Email/query", "path": "/ids"}
        get = {"#ids": found, "properties": ["subject", "mailboxIds"]}
        return [*self.jmap([["Email/query", {}, "0"], ["Email/get", get, "1"]])[1][1]["list"]]

    def mail_ids(self) -> dict[str, str]:
        return {mail["subject"]: mail["id"] for mail in self._all_mails()}

    def patch(self, patches: Mapping[str, Mapping[str, bool | None]]) -> None:
        """Put each of these mails, by their subjects, into mailboxes (True) or take them out of
        others (None), all at once: no one sees only a part of it."""
        ids, boxes = self.mail_ids(), self.mailbox_ids()
        update = {
            ids[subject]: {f"mailboxIds/{boxes[path]}": there for path, there in patch.items()}
            for subject, patch in patches.items()
        }
        [[_, answer, _]] = self.jmap([["Email/set", {"update": update}, "0"]])
        if (answer.get("updated") or {}).keys() != update.keys():
            raise ValueError(f"Cyrus did not do all of {patches}: {answer}")

    def contacts(self) -> dict[str, set[str]]:
        """The groups of each contact, by its address; ValueError if an address has two."""
        groups, found = {}, {}
        cards = [vobject.readOne(text).contents for text in self.vcards()]
        for card in cards:
            members = card.get("x-addressbookserver-member", ())
            groups[card["fn"][0].value] = {each.value.removeprefix(URN) for each in members}
        for card in (card for card in cards if "email" in card):
            address, uid = card["email"][0].value, card["uid"][0].value.removeprefix(URN)
            if address in found:
                raise ValueError(f"two contacts of {address}")
            found[address] = {name for name, members in groups.items() if uid in members}
        return found

    def vcards(self) -> list[str]:
        return [*vcards(self.http, self.addressbook_url, (self.username, self.password)).values()]

    def wait_until_indexed(self, sender: str, count: int) -> None:
        """Wait until the search index, which lags behind arrivals, knows this many mails."""
        query = ["Email/query", {"filter": {"from": sender}}, "0"]
        wait_for(lambda: len(self.jmap([query])[0][1].get("ids", [])) >= count)


def _require_cyrus(root: Path) -> tuple[int, int]:
    """Return the user and the group that Cyrus runs as; an error says what to do."""
    if not (root / MASTER).exists() or not (root / HTTPD).exists():
        raise CyrusUnavailableError(f"Cyrus IMAP is not installed. As root: {INSTALL}")
    if os.geteuid() != 0:
        raise CyrusUnavailableError("Cyrus changes to its own user and must be started by root")
    for line in (root / "etc/passwd").read_text().splitlines():
        name, _, user, group, *_ = line.split(":")
        if name == "cyrus":
            return int(user), int(group)
    raise CyrusUnavailableError(f"There is no user cyrus. As root: {INSTALL}")


def _newer_root() -> Path:
    """Return the root file system with Cyrus 3.12, which is made if this machine has none yet."""
    if os.geteuid() != 0:
        raise CyrusUnavailableError("Cyrus 3.12 lives in a root of its own: be root")
    # Not in /tmp, which may not allow devices, and where others could put a root of theirs.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mailroom-tests"
    made_of = hashlib.sha256(repr((SUITES, PACKAGES, BACKPORTS)).encode()).hexdigest()
    root, unfinished = cache / f"cyrus-{made_of[:12]}", cache / "unfinished"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the one that makes it
        if not root.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            make_root(unfinished, "minbase", PACKAGES, BACKPORTS, suites=SUITES)
            unfinished.rename(root)
    return root


def _remove(home: Path) -> None:
    """Remove the directory, again if a child wrote into it on its way out."""
    for _ in range(1000):
        shutil.rmtree(home, ignore_errors=True)
        if not home.exists():
            return


def _base64url(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def _ok(answer: tuple[str, list[Any]]) -> None:
    """imaplib returns a refusal instead of raising it."""
    status, lines = answer
    if status != "OK":
        raise imaplib.IMAP4.error(f"{status} {lines!r}")
