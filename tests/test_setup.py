"""Setup: what an account has and lacks is told and made, on each kind of server; and the rules for
messages to come send each where triage would have put it."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import homes
import pytest
from homes import EmbeddedHome, add_contact, embedded_home, once, run, snapshot
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jmap_server import JSON, Fault
from ports import free_port
from radicale_server import RadicaleServer
from tools import command

import mailroom

APPLY = ("setup", "--apply")
RULES = ("setup", "--fastmail-rules")
DONE = "There is nothing to do. Next: python mailroom.py\n"
AGAIN = "Run it again: it does what is left"
GROUPS = ["Billboard", "Feed", "Imbox", "Jail", "Mailroom", "Paper Trail", "Person", "Truck"]
BOXES = {
    *("Screener", *GROUPS, "@ToImbox", "@ToFeed", "@ToPaperTrail", "@ToJail", "@ToPerson"),
    *("@ToBillboard", "@ToTruck", "@ToScreener", "@MailroomError", "@MailroomWarning"),
} - {"Mailroom"}
WITHOUT = {"Inbox", "Archive", "Drafts", "Sent", "Junk", "Trash", "Mine"}
on_jmap = pytest.mark.parametrize("home", ["fastmail"], indirect=True)
two_stores = pytest.mark.parametrize("home", ["cyrus", "radicale"], indirect=True)


@pytest.fixture
def one_home() -> Iterator[EmbeddedHome]:
    with embedded_home("fastmail", RadicaleServer) as home:
        yield home


def groups(home: EmbeddedHome) -> list[str]:
    return sorted(card.name for card in home.book.seen().values() if card.kind == "group")


def rows(out: str, state: str) -> list[str]:
    """The names of what is in this state, by what is printed."""
    return re.findall(rf'^{state} +[a-z ]+ "(.*?)"', out, re.MULTILINE)


def check_complete(home: EmbeddedHome) -> None:
    """All that Mailroom needs is there, and once."""
    assert sorted(box.name for box in home.account.mailboxes.values()) == sorted(BOXES | WITHOUT)
    assert all(home.boxes().values()), "not subscribed"
    assert groups(home) == GROUPS
    ran = run(home, *APPLY)
    assert (ran.status, ran.out.endswith(DONE), rows(ran.out, "missing")) == (0, True, [])
    once(home)


def test_what_lacks_is_told_first_and_nothing_is_changed(home: EmbeddedHome) -> None:
    home.account.add_mailbox("Feed")
    before = snapshot(home)
    with homes.fate() as met:
        ran = run(home, "setup")
        assert met.writes == []
    assert (ran.status, ran.err, snapshot(home)) == (1, "", before)
    assert sorted(rows(ran.out, "missing")) == sorted([*BOXES - {"Feed"}, *GROUPS])
    assert rows(ran.out, "there") == ["Feed"]
    first, *_, last_but_one, last = ran.out.splitlines()
    assert first == f"{home.mail.session_url}; push: yes"
    assert last_but_one.startswith('there    mailbox "Feed"')
    assert last.endswith("Next: python mailroom.py setup --apply")


def test_what_is_missing_is_made_in_a_request_for_each_kind(home: EmbeddedHome) -> None:
    with homes.fate() as met:
        ran = run(home, *APPLY)
        written = [request for request in met.writes if request.method == "POST"]
    assert (ran.status, ran.err) == (0, "")
    assert sorted(rows(ran.out, "made")) == sorted([*BOXES, *GROUPS])
    assert ran.out.endswith("\nAll is there. Next: python mailroom.py\n")
    assert len(written) == 1 + ("carddav_url" not in home.settings)
    check_complete(home)


@two_stores
def test_only_what_is_missing_is_made(home: EmbeddedHome) -> None:
    for name in ("Feed", "@ToScreener", "Screener"):
        home.account.add_mailbox(name)
    home.book.add_group("Feed")
    add_contact(home, "tea@x.example")
    home.mail.options.limits |= {"maxObjectsInSet": 3, "maxCallsInRequest": 4}
    before = snapshot(home)
    out = run(home, *APPLY).out
    assert len(rows(out, "made")) == len(BOXES) + len(GROUPS) - 4
    assert all(len(call["create"]) <= 3 for call in home.mail.calls("Mailbox/set"))
    check_complete(home)
    assert {key: snapshot(home)[key] for key in before} == before


@on_jmap
def test_names_that_are_shared_nested_or_nearly_there(home: EmbeddedHome) -> None:
    """One thing for a name that several have, where its path says, and no twin of a near one."""
    home.changes |= {"warnings_enabled": False, "screener_mailbox": "Inbox/Screener"}
    home.changes["triage_categories"] = [
        {"name": "A", "destination_mailbox": "Both", "contact_group": "Both"},
        {"name": "B", "destination_mailbox": "Both", "contact_group": "Both", "parent": "A"},
        {"name": "Büro; 日本, \\n", "label": "@Ü", "destination_mailbox": "Trash"},
        {"name": "Lost", "destination_mailbox": "Nowhere/Lost"},
    ]
    home.account.add_mailbox("@toA")
    home.book.add_group("lost")
    ran = run(home, *APPLY)
    assert ran.status == 1
    assert 'missing  label "@ToA": there is "@toA", rename it\n' in ran.out
    assert 'missing  contact group "Lost": there is "lost", rename it\n' in ran.out
    assert 'refused  mailbox "Nowhere/Lost": there is no mailbox "Nowhere"' in ran.out
    assert "undo and reset take messages of Büro; 日本, \\n out of the trash" in ran.out
    assert ran.out.endswith("Not all of it could be made. Next: python mailroom.py setup --apply\n")
    assert groups(home) == ["Both", "Büro; 日本, \\n", "Mailroom", "lost"]
    by_name = {box.name: box for box in home.account.mailboxes.values()}
    assert by_name["Screener"].parent_id == by_name["Inbox"].id
    made = {"Both", "Screener", "@Ü", "@ToB", "@ToLost", "@ToScreener", "@MailroomError"}
    assert by_name.keys() == WITHOUT | made | {"@toA"}


# When it fails ####################################################################################


def test_what_cannot_be_reached_or_does_not_do_is_one_line(one_home: EmbeddedHome) -> None:
    """And another run is advised only where it helps. Other accounts that do not do are in
    test_triage.py."""
    away = f"http://127.0.0.1:{free_port()}"
    dav = {"carddav_url": away, "carddav_username": "a", "carddav_password": "pass-word"}
    cases: list[tuple[JSON, Fault, int, str]] = [
        ({"jmap_url": away}, Fault("other"), 1, "cannot be reached: .*refused"),
        (dav, Fault("other"), 1, f"{away}.* cannot be reached"),
        ({}, Fault("session", status=404), 1, "HTTP 404; check MAILROOM_JMAP_URL"),
        ({}, Fault("session", body=b"<html>"), 1, "malformed reply.*check MAILROOM_JMAP_URL"),
        ({}, Fault("session", status=401), 2, "HTTP 401.*Manage API tokens"),
        ({"poll_interval": "soon"}, Fault("other"), 2, "MAILROOM_POLL_INTERVAL"),
    ]
    for changes, fault, status, said in cases:
        one_home.mail.faults = [fault]
        ran = command(*APPLY, **{**one_home.settings, **changes})
        assert (ran.status, ran.out, one_home.mail.writes) == (status, "", [])
        assert re.fullmatch(f"mailroom: .*{said}.*\n", ran.err), ran.err
        assert AGAIN not in ran.err


def test_a_thing_that_is_refused_is_told_and_the_rest_is_made(one_home: EmbeddedHome) -> None:
    reason = f"not for {one_home.mail.options.token}"
    refuse = {"m3": {"type": "forbidden", "description": reason}}
    one_home.mail.faults = [Fault("Mailbox/set", refuse=refuse)]
    ran = run(one_home, *APPLY)
    assert (ran.status, ran.err) == (1, "")
    [name] = rows(ran.out, "refused")
    assert f' "{name}": forbidden not for [secret]\n' in ran.out
    assert one_home.boxes().keys() == BOXES - {name} | WITHOUT
    assert rows(run(one_home, *APPLY).out, "made") == [name]
    check_complete(one_home)


FAULTS: dict[str, JSON] = {"503": {"status": 503}, "reply lost": {"drop": True, "work": True}}


@pytest.mark.parametrize("fault", [*FAULTS, "unknownMethod"])
@pytest.mark.parametrize("method", ["Mailbox/set", "ContactCard/set"])
def test_what_was_made_before_it_failed_is_told(
    method: str, fault: str, one_home: EmbeddedHome
) -> None:
    """And another run does the rest."""
    how = FAULTS.get(fault, {"errors": {method: {"type": fault}}})
    one_home.mail.faults = [Fault(method, **how)]
    ran = run(one_home, *APPLY)
    assert (ran.status, AGAIN in ran.err) == ((1, True) if fault in FAULTS else (2, False))
    assert len(ran.err.splitlines()) == 1
    assert len(rows(ran.out, "made")) == (0 if method == "Mailbox/set" else len(BOXES))
    assert run(one_home, *APPLY).status == 0
    check_complete(one_home)


@two_stores
@pytest.mark.parametrize("what", ["killed after", "reply lost"])
def test_stopped_at_each_write_it_is_finished_by_the_next(home: EmbeddedHome, what: str) -> None:
    empty = home.save()
    for nth in range(1, 5):
        for box in [box.id for box in home.account.mailboxes.values() if not box.role]:
            home.account.remove_mailbox(box)
        home.account.add_mailbox("Mine")
        home.restore(empty)
        homes.met(lambda: run(home, *APPLY), what, nth, homes.is_write)
        assert run(home, *APPLY).status == 0
        check_complete(home)


# The rules file ###################################################################################


def test_no_file_is_overwritten(one_home: EmbeddedHome, tmp_path: Path) -> None:
    """And a mailbox is named by its path."""
    file = tmp_path / "rules.json"
    one_home.account.add_mailbox("Away")
    one_home.account.add_mailbox("Jail", parent="Away")
    assert run(one_home, *APPLY).status == 0
    ran = run(one_home, *RULES, str(file))
    assert (ran.status, f"{file}: import it" in ran.out) == (0, True)
    before = file.read_text()
    assert json.loads(before)[3]["fileIn"] == "Away/Jail"
    for bad, said in ((str(file), "File exists"), ("/nowhere/rules", "No such file")):
        ran = run(one_home, *RULES, bad)
        assert (ran.status, f"--fastmail-rules {bad!r}: {said}" in ran.err) == (2, True)
    assert file.read_text() == before
    assert run(one_home, *APPLY, *RULES[1:], "-").status == 2


def test_the_rules_are_as_in_an_export(one_home: EmbeddedHome) -> None:
    """The keys of a rule in a published export of Fastmail's, in the order of the alphabet."""
    exported = (
        "combinator conditions created discard fileIn markFlagged markRead markSpam name "
        "previousFileInName redirectTo search showNotification skipInbox snoozeUntil stop updated"
    )
    ran = run(one_home, *RULES, "-")
    assert (ran.status, ran.err) == (0, "")
    rules = json.loads(ran.out)
    for rule in rules:
        assert " ".join(sorted(rule)) == exported
        assert (rule["combinator"], rule["conditions"], rule["stop"]) == ("all", None, False)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", rule["created"])
    names = ["Imbox", "Feed", "Paper Trail", "Jail", "Person", "Billboard", "Truck"]
    shown = [(rule["search"], rule["fileIn"], rule["skipInbox"]) for rule in rules]
    assert shown[:-1] == [(f'fromin:"{name}"', name, name != "Imbox") for name in names]
    assert shown[-1] == ("NOT fromin:contacts", "Screener", True)
    one_home.changes["triage_categories"] = [{"name": "Feed", "mark_read": True}, "Jail"]
    rules = json.loads(run(one_home, *RULES, "-").out)
    assert [rule["markRead"] for rule in rules] == [True, False, False]


def matches(search: str, groups: Collection[str], is_contact: bool) -> bool:
    """Fastmail's search, as far as the rules use it: terms that all have to hold."""
    term = re.compile(r'(NOT )?fromin:("(?:[^"\\]|\\.)*"|\w+)( |$)')
    position, holds = 0, True
    while position < len(search):
        found = term.match(search, position)
        assert found, search
        group = re.sub(r"\\(.)", r"\1", found[2][1:-1])
        holds &= (group in groups if found[2][0] == '"' else is_contact) != bool(found[1])
        position = found.end()
    return holds


def by_rules(rules: list[JSON], groups: Collection[str], is_contact: bool = True) -> set[str]:
    """Where Fastmail puts a message: all rules that match apply, until one says stop."""
    found = [rule for rule in rules if matches(rule["search"], groups, is_contact)]
    assert not any(rule["stop"] for rule in rules)
    boxes = {rule["fileIn"] for rule in found} - {None}
    return boxes | (set() if any(rule["skipInbox"] for rule in found) else {"Inbox"})


@st.composite
def trees(draw: Any) -> list[JSON]:
    """Any set of categories that the settings accept, in any order; some share a group."""
    entries: list[JSON] = []
    for number in range(draw(st.integers(1, 6))):
        name = draw(st.text(st.sampled_from("ab\"\\.é{}$:;#'"), max_size=4)) + str(number)
        entry: JSON = {"name": name, "add_to_inbox": draw(st.booleans())}
        if entries and draw(st.integers(0, 3)):
            entry["parent"] = draw(st.sampled_from(entries))["name"]
        if entries and not draw(st.integers(0, 3)):
            entry["destination_mailbox"] = entries[0]["name"]
        if "parent" in entry and not draw(st.integers(0, 3)):
            entry["contact_group"] = entries[0]["name"]
        entries.append(entry)
    entries = list(draw(st.permutations(entries)))
    try:
        mailroom.MailroomSettings(jmap_token="x", triage_categories=entries)
    except mailroom.ConfigurationError:
        assume(False)
    return entries


@settings(max_examples=25, deadline=None, suppress_health_check=[*HealthCheck])
@given(trees() | st.just(None))
def test_messages_to_come_go_where_triage_puts_them(entries: Any) -> None:
    """Of senders in a group that several categories have nobody can tell which is meant: their
    messages get the places of all."""
    with embedded_home("fastmail", RadicaleServer) as home:
        home.changes |= {"triage_categories": entries} if entries else {}
        categories = mailroom.MailroomSettings(**home.settings).triage_categories
        assert run(home, *APPLY).status == 0
        for n, category in enumerate(categories):
            home.tap(home.deliver(f"s{n}@x.example", f"{n}"), category.label)
        once(home)
        rules = json.loads(run(home, *RULES, "-").out)
        for n, category in enumerate(categories):
            placed = by_rules(rules, home.account.groups_of(f"s{n}@x.example"))
            triaged = home.where()[f"{n}"]
            assert placed >= triaged, category
            names = [each.contact_group for each in categories]
            assert placed == triaged or len({*names}) < len(names), category
        assert by_rules(rules, (), is_contact=False) == {"Screener"}
        assert by_rules(rules, ()) == {"Inbox"}
