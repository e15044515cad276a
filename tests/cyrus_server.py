"""A real Cyrus IMAP for tests: JMAP mail, CardDAV, IMAP and LMTP on free loopback ports.

    with CyrusServer() as cyrus:
        alice = cyrus.add_user("alice")
        alice.create_mailboxes(["Screener", "@ToFeed", "Lists", "Lists/Python"])
        alice.deliver("Bob <bob@shop.example>", mailbox="Screener", subject="Sale")
        alice.jmap([["Mailbox/get", {"ids": None}, "0"]])

    with CyrusServer(search=True, sieve=True) as cyrus:
        alice = cyrus.add_user("alice")
        alice.install_sieve('keep;')
        alice.deliver_lmtp("Bob <bob@shop.example>")

Every instance is its own: directory, ports, keys and process group, so several can run at once.
Without the packages, or without the right to run them, entering raises `CyrusUnavailableError`:
a missing Cyrus is a clear message, never a test that passes or is skipped.
"""

from __future__ import annotations

import base64
import contextlib
import email.message
import email.utils
import hashlib
import hmac
import imaplib
import json
import os
import pwd
import secrets
import shutil
import signal
import smtplib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
from ports import free_ports

INSTALL = (
    "apt-get install -y --no-install-recommends "
    "cyrus-imapd cyrus-caldav cyrus-admin sasl2-bin libsasl2-modules"
)
MASTER = Path("/usr/sbin/cyrmaster")
HTTPD = Path("/usr/lib/cyrus/bin/httpd")
SIEVEC = Path("/usr/lib/cyrus/bin/sievec")
CAPABILITIES = ["urn:ietf:params:jmap:core", "urn:ietf:params:jmap:mail"]
SIEVE = "https://cyrusimap.org/ns/jmap/sieve"

START_DEADLINE = 30.0
STOP_DEADLINE = 10.0
POLL_STEP = 0.02

IMAPD_CONF = """\
configdirectory: {home}/conf
defaultpartition: default
partition-default: {home}/mail
sievedir: {home}/sieve
proc_path: {home}/run/proc
mboxname_lockpath: {home}/run/lock
idlesocket: {home}/run/idle
lmtpsocket: {home}/run/lmtp
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
# SieveScript/set is no standard in 3.6, which offers no method of that kind unless told.
SIEVE_CONF = "jmap_nonstandard_extensions: yes\n"
NO_SEARCH = "search_engine: none\n"
XAPIAN_SEARCH = """\
search_engine: xapian
search_index_headers: yes
defaultsearchtier: t1
t1searchpartition-default: {home}/search
sync_log: yes
sync_log_channels: squatter
"""
CYRUS_CONF = """\
START {{
  recover cmd="ctl_cyrusdb -C {home}/imapd.conf -r"
  idled cmd="idled -C {home}/imapd.conf"
}}
SERVICES {{
  imap cmd="imapd -C {home}/imapd.conf" listen="127.0.0.1:{imap}" prefork=0
  http cmd="httpd -C {home}/imapd.conf" listen="127.0.0.1:{http}" prefork=0
  lmtp cmd="lmtpd -C {home}/imapd.conf -a" listen="127.0.0.1:{lmtp}" prefork=0
}}
DAEMON {{
{daemons}}}
"""
INDEXER = '  squatter cmd="squatter -C {home}/imapd.conf -R"\n'


class CyrusUnavailableError(RuntimeError):
    """Cyrus is not installed, may not be run by this user, or did not come up."""


class CyrusServer:
    """One running Cyrus.

    `search=True` adds a Xapian index that follows new mail; Sieve's jmapquery finds senders only
    with it. `sieve=True` adds the methods for Sieve scripts. Cyrus knows a user of its default
    domain by the bare name; `full_usernames=True` makes the whole address the user name.
    """

    def __init__(
        self,
        domain: str = "mailroom.example",
        *,
        search: bool = False,
        sieve: bool = False,
        full_usernames: bool = False,
    ) -> None:
        self.domain = domain
        self.default_domain = "default.invalid" if full_usernames else domain
        self.search, self.sieve = search, sieve
        self.imap_port = self.http_port = self.lmtp_port = 0
        self._key = secrets.token_bytes(32)
        self._stack = contextlib.ExitStack()

    @property
    def origin(self) -> str:
        """The HTTP server's root, without a trailing slash."""
        return f"http://127.0.0.1:{self.http_port}"

    def __enter__(self) -> Self:
        """Start it and wait until IMAP, LMTP and HTTP answer."""
        account = _require_cyrus()
        with contextlib.ExitStack() as stack:
            self.home = _owned_directory(account)
            stack.callback(_remove, self.home)
            self._configure(account)
            self._process = self._spawn()
            stack.callback(_kill_group, self._process)
            self._wait_until_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop every process of this instance and remove its directory."""
        self._stack.close()

    def add_user(self, name: str) -> CyrusUser:
        """Create the user's inbox (the address book comes with the first CardDAV request)."""
        user = CyrusUser(self, name)
        with self.imap("cyrus") as admin:
            _ok(admin.create(_quoted(f"user/{user.address}")))
        self._stack.callback(user.http.close)
        return user

    @contextlib.contextmanager
    def imap(self, login: str) -> Iterator[imaplib.IMAP4]:
        """An IMAP connection, logged in; `cyrus` is the administrator, any password is right."""
        with imaplib.IMAP4("127.0.0.1", self.imap_port, timeout=START_DEADLINE) as connection:
            connection.login(login, "any")
            yield connection

    def token(self, username: str) -> str:
        """A Bearer token for the user: Cyrus wants `sub` and accepts no other claim."""
        parts = [_base64url({"alg": "HS256", "typ": "JWT"}), _base64url({"sub": username})]
        signature = hmac.digest(self._key, ".".join(parts).encode(), hashlib.sha256)
        return ".".join([*parts, base64.urlsafe_b64encode(signature).decode().rstrip("=")])

    def log_tail(self, lines: int = 40) -> str:
        """The end of what the processes wrote; Cyrus says the rest to the system's log only."""
        with contextlib.suppress(OSError):
            return "\n".join((self.home / "log").read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _configure(self, account: pwd.struct_passwd) -> None:
        """Write both configuration files and the key into directories that Cyrus owns."""
        for name in ("conf/db", "conf/socket", "mail", "sieve", "run", "keys", "search"):
            (self.home / name).mkdir(parents=True)
        self.imap_port, self.http_port, self.lmtp_port = free_ports(3)
        imapd_conf = IMAPD_CONF + (XAPIAN_SEARCH if self.search else NO_SEARCH)
        imapd_conf += SIEVE_CONF if self.sieve else ""
        cyrus_conf = CYRUS_CONF.format(
            home=self.home,
            imap=self.imap_port,
            http=self.http_port,
            lmtp=self.lmtp_port,
            daemons=INDEXER.format(home=self.home) if self.search else "",
        )
        pem = f"-----BEGIN HMAC KEY-----\n{base64.b64encode(self._key).decode()}\n"
        (self.home / "imapd.conf").write_text(
            imapd_conf.format(home=self.home, default_domain=self.default_domain)
        )
        (self.home / "cyrus.conf").write_text(cyrus_conf)
        (self.home / "keys" / "hmac.pem").write_text(f"{pem}-----END HMAC KEY-----\n")
        for path in self.home.rglob("*"):
            os.chown(path, account.pw_uid, account.pw_gid)

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the master in a process group of its own, which is how all of it is found again."""
        home = str(self.home)
        files = ["-C", f"{home}/imapd.conf", "-M", f"{home}/cyrus.conf", "-p", f"{home}/run/pid"]
        # -L is for the children; what the master says before it obeys -L comes on stderr.
        with (self.home / "log").open("ab") as log:
            return subprocess.Popen(
                [str(MASTER), "-D", *files, "-L", f"{home}/log"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.defpath, "CYRUS_VERBOSE": "1"},
                start_new_session=True,
            )

    def _wait_until_up(self) -> None:
        """Poll the three handshakes until each has answered once."""
        probes: list[Callable[[], object]] = [self._probe_imap, self._probe_lmtp, self._probe_http]
        deadline = time.monotonic() + START_DEADLINE
        last_error: Exception | None = None
        while probes:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise CyrusUnavailableError(
                    f"Cyrus did not come up: {probes[0].__name__}: {last_error!r}, master status "
                    f"{self._process.poll()} (78: a bad configuration; the words are in the "
                    f"system's log). Its output:\n{self.log_tail()}"
                )
            try:
                probes[0]()
                probes.pop(0)
            except (OSError, imaplib.IMAP4.error, smtplib.SMTPException) as error:
                last_error = error
                time.sleep(POLL_STEP)

    def _probe_imap(self) -> None:
        with self.imap("cyrus"):
            pass

    def _probe_lmtp(self) -> None:
        with smtplib.LMTP("127.0.0.1", self.lmtp_port, timeout=5):
            pass

    def _probe_http(self) -> None:
        with _session() as http:
            http.options(f"{self.origin}/", timeout=5)


class CyrusUser:
    """An account on a running Cyrus, with the helpers a test needs to look at it from outside."""

    password = "any"  # the server takes every password

    def __init__(self, server: CyrusServer, name: str) -> None:
        self.server = server
        self.name = name
        self.address = f"{name}@{server.domain}"
        self.username = name if server.domain == server.default_domain else self.address
        self.token = server.token(self.username)
        self.jmap_url = f"{server.origin}/jmap/"
        self.carddav_url = f"{server.origin}/"
        self.addressbook_url = f"{server.origin}/dav/addressbooks/user/{self.username}/Default/"
        self.http = _session()
        self.http.headers["Authorization"] = f"Bearer {self.token}"

    def create_mailboxes(self, paths: Iterable[str]) -> dict[str, str]:
        """Create mailboxes in the order given (`Lists/Python` is nested); returns their ids."""
        return {path: self.create_mailbox(path) for path in paths}

    def create_mailbox(self, path: str, role: str | None = None) -> str:
        """Create one subscribed mailbox, the parent of which exists, and return its id."""
        parent, _, name = path.rpartition("/")
        parent_id = self.mailbox_ids()[parent] if parent else None
        wanted = {"name": name, "parentId": parent_id, "role": role, "isSubscribed": True}
        [[_, answer, _]] = self.jmap([["Mailbox/set", {"create": {"new": wanted}}, "0"]])
        if not answer.get("created"):
            raise ValueError(f"Cyrus did not create {path}: {answer}")
        return str(answer["created"]["new"]["id"])

    def deliver(
        self,
        from_: str | None,
        mailbox: str = "INBOX",
        subject: str = "Hello",
        *,
        headers: dict[str, str] | None = None,
    ) -> str:
        """Put a mail (without a sender, if that is None) into a mailbox; returns its Message-ID."""
        mail = _mail(from_, self.address, subject, headers or {})
        self.append(mail.as_bytes(), mailbox)
        return str(mail["Message-ID"])

    def append(self, mail: bytes, mailbox: str = "INBOX") -> None:
        """Put a mail into a mailbox (an ASCII path) over IMAP, as it is."""
        with self.server.imap(self.address) as connection:
            _ok(connection.append(_quoted(mailbox), "", "", mail))

    def deliver_lmtp(self, from_: str | None, subject: str = "Hello") -> str:
        """Deliver a mail the way it arrives from outside: over LMTP, to where the user's active
        Sieve script sends it, or into the inbox. It is there when this returns."""
        mail = _mail(from_, self.address, subject, {})
        with smtplib.LMTP("127.0.0.1", self.server.lmtp_port, timeout=10) as lmtp:
            lmtp.sendmail(email.utils.parseaddr(from_ or "")[1], [self.address], mail.as_bytes())
        return str(mail["Message-ID"])

    def sieve_extensions(self) -> list[str]:
        """What the server offers of Sieve."""
        account = self.http.get(self.jmap_url, timeout=30).json()["accounts"][self.username]
        return list(account["accountCapabilities"][SIEVE]["sieveExtensions"])

    def install_sieve(self, text: str) -> None:
        """Make this the one script that the user has, over JMAP; ValueError if it is refused."""
        headers = {"Content-Type": "application/sieve"}
        url = f"{self.server.origin}/jmap/upload/{self.username}/"
        blob = self.http.post(url, data=text.encode(), headers=headers, timeout=30).json()
        [[_, there, _]] = self.jmap([["SieveScript/get", {"ids": None}, "0"]])
        create = {"new": {"name": f"at {time.monotonic()}", "blobId": blob["blobId"]}}
        made = {"create": create, "onSuccessActivateScript": "#new"}
        gone = {"destroy": [script["id"] for script in there["list"]]}
        answers = self.jmap([["SieveScript/set", made, "0"], ["SieveScript/set", gone, "1"]])
        if not answers[0][1].get("created"):
            raise ValueError(f"Cyrus did not take the script: {answers[0][1]}")

    def jmap(self, calls: list[list[Any]]) -> list[list[Any]]:
        """Send method calls (`accountId` is filled in) and return the method responses."""
        full = [[method, {"accountId": self.username, **args}, tag] for method, args, tag in calls]
        using = [*CAPABILITIES, SIEVE] if self.server.sieve else CAPABILITIES
        request = {"using": using, "methodCalls": full}
        response = self.http.post(self.jmap_url, json=request, timeout=30)
        response.raise_for_status()
        answers: list[list[Any]] = response.json()["methodResponses"]
        return answers

    def mailbox_ids(self) -> dict[str, str]:
        """The id of every mailbox by its path."""
        [[_, answer, _]] = self.jmap([["Mailbox/get", {"ids": None}, "0"]])
        by_id = {mailbox["id"]: mailbox for mailbox in answer["list"]}

        def path(mailbox: dict[str, Any]) -> str:
            parent = by_id.get(mailbox["parentId"])
            return f"{path(parent)}/{mailbox['name']}" if parent else str(mailbox["name"])

        return {path(mailbox): identity for identity, mailbox in by_id.items()}

    def mails(self) -> dict[str, set[str]]:
        """The mailbox paths of every mail, by the mail's subject."""
        paths = {identity: path for path, identity in self.mailbox_ids().items()}
        found = {"resultOf": "0", "name": "Email/query", "path": "/ids"}
        wanted = ["subject", "mailboxIds"]
        calls = [
            ["Email/query", {}, "0"],
            ["Email/get", {"#ids": found, "properties": wanted}, "1"],
        ]
        mails = self.jmap(calls)[1][1]["list"]
        return {mail["subject"]: {paths[one] for one in mail["mailboxIds"]} for mail in mails}

    def wait_until_indexed(self, sender: str, count: int) -> None:
        """Wait until the search index, which lags behind arrivals, knows this many mails."""
        query = ["Email/query", {"filter": {"from": sender}}, "0"]
        deadline = time.monotonic() + START_DEADLINE
        while len(self.jmap([query])[0][1].get("ids", [])) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The index did not find {count} mails from {sender}")
            time.sleep(POLL_STEP)


def _require_cyrus() -> pwd.struct_passwd:
    """The account Cyrus runs as, or an error that says what to do."""
    if not MASTER.exists() or not HTTPD.exists():
        raise CyrusUnavailableError(f"Cyrus IMAP is not installed. As root: {INSTALL}")
    if os.geteuid() != 0:
        raise CyrusUnavailableError("Cyrus changes to its own user and must be started by root")
    try:
        return pwd.getpwnam("cyrus")
    except KeyError:
        raise CyrusUnavailableError(f"There is no user cyrus. As root: {INSTALL}") from None


def _owned_directory(account: pwd.struct_passwd) -> Path:
    """A temporary directory that Cyrus owns, every parent of which it may enter."""
    home = Path(tempfile.mkdtemp(prefix="cyrus-"))
    os.chown(home, account.pw_uid, account.pw_gid)
    return home


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the master with all its children: it would leave the detached `idled` behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_DEADLINE)


def _remove(home: Path) -> None:
    """Remove the directory, again if a child wrote into it on its way out."""
    deadline = time.monotonic() + STOP_DEADLINE
    while home.exists() and time.monotonic() < deadline:
        shutil.rmtree(home, ignore_errors=True)


def _session() -> requests.Session:
    """A session that no proxy or netrc of the machine can lead astray."""
    session = requests.Session()
    session.trust_env = False
    return session


def _mail(
    from_: str | None, to: str, subject: str, headers: dict[str, str]
) -> email.message.EmailMessage:
    mail = email.message.EmailMessage()
    fields = {"To": to, "Subject": subject, "Date": email.utils.formatdate()}
    sender = {} if from_ is None else {"From": from_}
    unique = {"Message-ID": email.utils.make_msgid(domain="mail.example")}
    for name, value in {**sender, **fields, **unique, **headers}.items():
        mail[name] = value
    mail.set_content("A mail of the tests.\n")
    return mail


def _base64url(value: dict[str, str]) -> str:
    text = json.dumps(value, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def _quoted(name: str) -> str:
    """A mailbox name as an IMAP string; imaplib quotes nothing by itself."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _ok(answer: tuple[str, list[Any]]) -> None:
    """imaplib returns a refusal instead of raising it."""
    status, lines = answer
    if status != "OK":
        raise imaplib.IMAP4.error(f"{status} {lines!r}")
