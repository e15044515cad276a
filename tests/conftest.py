"""What every test shares. Importing mailroom first patches the sockets before `responses` comes."""

import mailroom  # noqa: F401, I001  (its import is the monkey patch)

import os
from collections.abc import Iterator

import hypothesis
import pytest
from cyrus_server import CyrusServer
from radicale_server import RadicaleServer
from tools import COUNTS

pytest.register_assert_rewrite("homes")

from homes import STORES, EmbeddedHome, embedded_home  # noqa: E402  (rewritten from here on)

# To load the system's certificates takes longer than a triage; no test leaves this machine.
os.environ["SSL_CERT_FILE"] = os.devnull


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="all faults and many more random examples, in place of a selection",
    )
    parser.addoption(
        "--part",
        default="1/1",
        help="1/2: every other test, beside which 2/2 may run the others; "
        "1,2,3/4: of every four tests the first three",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A part of the tests that are left after `-k` and `-m`."""
    parts, _, of = config.getoption("--part").partition("/")
    wanted = {int(part) - 1 for part in parts.split(",")}
    items[:] = [item for n, item in enumerate(items) if n % int(of) in wanted]


def pytest_configure(config: pytest.Config) -> None:
    """A busy machine makes any example slow at times, so there is no deadline."""
    hypothesis.settings.register_profile("short", deadline=None)
    hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "short")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="module")
def radicale() -> Iterator[RadicaleServer]:
    with RadicaleServer() as server:
        yield server


@pytest.fixture(scope="module")
def cyrus() -> Iterator[CyrusServer]:
    with CyrusServer() as server:
        yield server


@pytest.fixture(params=STORES)
def home(request: pytest.FixtureRequest) -> Iterator[EmbeddedHome]:
    with embedded_home(request.param, lambda: request.getfixturevalue("radicale")) as home:
        yield home


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.write_line("; ".join(f"{name} {n}" for name, n in COUNTS.items()))
