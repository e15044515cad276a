"""What every test shares. Importing mailroom first patches the sockets before `responses` comes."""

import mailroom  # noqa: F401, I001  (the import is the monkey patch)

import pytest
from tools import COUNTS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="all faults and many more examples")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether there is time for everything."""
    return bool(request.config.getoption("--long"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.write_line(", ".join(f"{name}: {count}" for name, count in COUNTS.items()))
