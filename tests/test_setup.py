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
from radicale_server import RadicaleServer

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


def test_what_is_missing_is_told_and_then_made(home: EmbeddedHome) -> None:
    """Only that."""
    home.account.add_mailbox("Feed")
    home.book.add_group("Feed")
    add_contact(home, "tea@x.example")
    before, missing = snapshot(home), sorted(name for name in (*BOXES, *GROUPS) if name != "Feed")
    with homes.fate() as met:
        ran = run(home, "setup")
        assert met.writes == []
    assert (ran.status, ran.err, snapshot(home)) == (1, "", before)
    assert sorted(rows(ran.out, "missing")) == missing
    assert rows(ran.out, "there") == ["Feed", "Feed"]
    first, *lines, last = ran.out.splitlines()
    assert first == f"{home.mail.session_url}; push: yes"
    assert lines == sorted(lines, key=lambda line: line.startswith("there"))
    assert last.endswith("Next: python mailroom.py setup --apply")
    ran = run(home, *APPLY)
    assert (ran.status, ran.err) == (0, "")
    assert sorted(rows(ran.out, "made")) == missing
    assert ran.out.endswith("\nAll is there. Next: python mailroom.py\n")
    check_complete(home)
    assert {key: snapshot(home)[key] for key in before} == before


def test_names_that_are_shared_nested_or_nearly_there(one_home: EmbeddedHome) -> None:
    """One thing for a name that several have, where its path says, and no twin of a near one."""
    one_home.changes |= {"warnings_enabled": False, "screener_mailbox": "Inbox/Screener"}
    one_home.changes["triage_categories"] = [
        {"name": "A", "destination_mailbox": "Both", "contact_group": "Both"},
        {"name": "B", "destination_mailbox": "Both", "contact_group": "Both", "parent": "A"},
        {"name": "Büro; 日本, \\n", "label": "@Ü", "destination_mailbox": "Trash"},
        {"name": "Lost", "destination_mailbox": "Nowhere/Lost"},
    ]
    one_home.account.add_mailbox("@toA")
    one_home.book.add_group("lost")
    ran = run(one_home, *APPLY)
    assert ran.status == 1
    assert 'missing  label "@ToA": there is "@toA", rename it\n' in ran.out
    assert 'missing  contact group "Lost": there is "lost", rename it\n' in ran.out
    assert 'refused  mailbox "Nowhere/Lost": there is no mailbox "Nowhere"' in ran.out
    assert "note: undo and reset take triaged messages out of the trash\n" in ran.out
    assert ran.out.endswith("Not all of it could be made. Next: python mailroom.py setup --apply\n")
    assert groups(one_home) == ["Both", "Büro; 日本, \\n", "Mailroom", "lost"]
    by_name = {box.name: box for box in one_home.account.mailboxes.values()}
    assert by_name["Screener"].parent_id == by_name["Inbox"].id
    made = {"Both", "Screener", "@Ü", "@ToB", "@ToLost", "@ToScreener", "@MailroomError"}
    assert by_name.keys() == WITHOUT | made | {"@toA"}


# When it fails ####################################################################################


def test_a_thing_that_is_refused_is_told_and_the_rest_is_made(one_home: EmbeddedHome) -> None:
    reason = f"not for {one_home.mail.options.token}"
    refuse = {"new": {"type": "forbidden", "description": reason}}
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
    made = [line for line in ran.out.splitlines() if line.startswith("made")]
    assert len(made) == (0 if method == "Mailbox/set" else 3), "those before the first group"
    assert run(one_home, *APPLY).status == 0
    check_complete(one_home)


@two_stores
@pytest.mark.parametrize("nth", range(1, 5))
@pytest.mark.parametrize("what", ["killed after", "reply lost"])
def test_stopped_at_any_write_it_is_finished_by_the_next(
    home: EmbeddedHome, what: str, nth: int
) -> None:
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


TERM = r'(NOT )?fromin:("(?:[^"\\]|\\.)*"|contacts)(?: |$)'


def matches(search: str, groups: Collection[str], is_contact: bool) -> bool:
    """Fastmail's search, as far as the rules use it: terms that all have to hold."""
    assert re.fullmatch(f"(?:{TERM})+", search), search
    for no, name in re.findall(TERM, search):
        group = re.sub(r"\\(.)", r"\1", name[1:-1])
        if (group in groups if name[0] == '"' else is_contact) == bool(no):
            return False
    return True


def by_rules(rules: list[JSON], groups: Collection[str], is_contact: bool = True) -> set[str]:
    """Where Fastmail puts a message: all rules that match apply, until one says stop."""
    found = [rule for rule in rules if matches(rule["search"], groups, is_contact)]
    assert not any(rule["stop"] for rule in rules)
    boxes = {rule["fileIn"] for rule in found} - {None}
    return boxes if any(rule["skipInbox"] for rule in found) else boxes | {"Inbox"}


@st.composite
def trees(draw: Any) -> list[JSON]:
    """Any set of categories that the settings accept, in any order; some share a group."""
    entries: list[JSON] = []
    for number in range(draw(st.integers(1, 6))):
        name = draw(st.text(st.sampled_from("ab\"\\.é{}$:;#'"), max_size=4)) + str(number)
        entry: JSON = {"name": name, "add_to_inbox": draw(st.booleans())}
        if entries and draw(st.integers(0, 3)):
            entry["parent"] = draw(st.sampled_from(entries))["name"]
        for key in ("destination_mailbox", *(["contact_group"] if "parent" in entry else [])):
            if entries and not draw(st.integers(0, 3)):
                entry[key] = entries[0]["name"]
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
