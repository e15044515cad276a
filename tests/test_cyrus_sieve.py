"""The Sieve script on a real Cyrus: its compiler takes it, and what is delivered over LMTP goes
where triage would have put it.

Without Cyrus these tests fail, and say what to install."""

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from books import DAVBook, cyrus_book
from cyrus_server import SIEVEC, CyrusServer, CyrusUser
from test_routing import ODD, groups_of, settings_of, triaged

from mailroom import OLD_GROUP_FILTER, MailroomSettings, sieve_script

pytestmark = pytest.mark.cyrus

# Every way in which the Inbox can be kept below a category or not, and mailboxes that two share,
# the child before the parent.
TREE: list[Any] = [
    {"name": "Imbox", "add_to_inbox": True},
    {"name": "Person", "parent": "Imbox"},
    {"name": "Sub", "parent": "Imbox", "destination_mailbox": "Imbox"},
    {"name": "Truck", "parent": "Paper Trail", "add_to_inbox": True},
    {"name": "Lorry", "parent": "Truck", "destination_mailbox": "Paper Trail"},
    {
        "name": 'Q"\\é.',
        "parent": "Lorry",
        "destination_mailbox": "Q & é.",  # Cyrus has none with a quote or a backslash
        "add_to_inbox": True,
    },
    "Paper Trail",
]


class Place:
    """A user with the mailboxes and groups of a Mailroom, and mails that come over LMTP."""

    def __init__(self, server: CyrusServer, of: MailroomSettings) -> None:
        self.of = of
        self.book: DAVBook = cyrus_book(server)
        self.user = CyrusUser(server, self.book.login[0])
        self.user.http.auth = None
        names = {of.screener_mailbox, *(each.destination_mailbox for each in of.triage_categories)}
        self.user.create_mailboxes(sorted(names))
        self.members: dict[str, list[str]] = {
            each.contact_group: [] for each in of.triage_categories
        }
        self.groups: dict[str, str] = {}

    def add_contacts(self) -> None:
        """One in the groups of each category, with two addresses, and one in none."""
        for each in self.of.triage_categories:
            uid = self.book.add(self.address(each.name), f"2{self.address(each.name)}")
            for group in groups_of(each, self.of):
                self.members[group].append(uid)
        self.book.add(self.address("friend"))
        groups = self.members.items()
        self.groups = {name: self.book.add_group(name, *uids) for name, uids in groups}

    def address(self, name: str) -> str:
        """A made-up address for a name of any kind."""
        return f"{uuid.uuid5(uuid.NAMESPACE_OID, name).hex}@shop.example"

    def install(self, offered: list[str] | None = None) -> None:
        ids = self.user.mailbox_ids()
        known = self.user.sieve_extensions() if offered is None else offered
        self.user.install_sieve(sieve_script(self.of, self.groups, ids, known, OLD_GROUP_FILTER))

    def arrives(self, sender: str | None) -> set[str]:
        """Where a mail of this sender gets to."""
        subject = uuid.uuid4().hex
        self.user.deliver_lmtp(sender, subject)
        return self.user.mails()[subject]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[bool, CyrusServer]]:
    """A Cyrus with a search index, and one without."""
    with ExitStack() as stack:
        yield {
            search: stack.enter_context(CyrusServer(search=search, sieve=True))
            for search in (True, False)
        }


@pytest.fixture(params=[True, False], ids=["extlists", "no extlists"])
def place(servers: dict[bool, CyrusServer], request: pytest.FixtureRequest) -> Place:
    """With an index; the script uses all that is offered, or takes no more than it must."""
    place = Place(servers[True], settings_of(*TREE))
    place.add_contacts()
    place.install(None if request.param else [])
    return place


def test_mails_go_where_triage_puts_them(place: Place) -> None:
    for category in place.of.triage_categories:
        address = place.address(category.name)
        for sender in (f"Bob <{address}>", f"2{address}"):
            assert place.arrives(sender) == triaged(category, place.of), category.name
    assert place.arrives(f"Friend <{place.address('friend').upper()}>") == {"Inbox"}
    name = place.address("Imbox")
    for stranger in ("Eve <eve@x.example>", f'"{name}" <eve@x.example>', f"{name}.org", None):
        assert place.arrives(stranger) == {"Screener"}


def test_what_is_gone_sends_mails_to_the_inbox(place: Place) -> None:
    """A mailbox or a group that is deleted later loses nothing."""
    [category] = [each for each in place.of.triage_categories if each.name == "Paper Trail"]
    place.user.jmap([["Mailbox/set", {"destroy": [place.user.mailbox_ids()["Paper Trail"]]}, "0"]])
    assert place.arrives(place.address(category.name)) == {"Inbox"}
    place.book.remove(place.groups["Person"])
    assert place.arrives(place.address("Person")) == {"Imbox", "Inbox"}


def test_without_an_index_contacts_stay_in_the_inbox(servers: dict[bool, CyrusServer]) -> None:
    """Cyrus 3.6 then finds no sender in a group but one whose From is nothing but the address."""
    place = Place(servers[False], settings_of("Feed"))
    place.add_contacts()
    place.install()
    assert place.arrives(place.address("Feed")) == {"Feed"}
    assert place.arrives(f"Bob <{place.address('Feed')}>") == {"Inbox"}
    assert place.arrives("Eve <eve@x.example>") == {"Screener"}


def test_an_account_without_contacts_knows_only_strangers(servers: dict[bool, CyrusServer]) -> None:
    place = Place(servers[True], settings_of("Feed"))
    place.install()
    assert place.arrives("Eve <eve@x.example>") == {"Screener"}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("offered", [(), ("fileinto", "copy", "vnd.cyrus.jmapquery", "extlists")])
def test_the_compiler_takes_any_name(tmp_path: Path, name: str, offered: tuple[str, ...]) -> None:
    of = settings_of(name, {"name": f"{name} 2", "parent": name, "add_to_inbox": True})
    groups, ids = {name: name, f"{name} 2": f"urn:uuid:{name}"}, {name: name}
    source = tmp_path / "script"
    source.write_text(sieve_script(of, groups, ids, offered, OLD_GROUP_FILTER))
    done = subprocess.run(
        [SIEVEC, source, tmp_path / "bytecode"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "bytecode").stat().st_size
