"""The rules for mail to come send each mail where triage would have put it: an interpreter of the
Fastmail rules and one of the Sieve script, both against `plan_mails`."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import pytest
import sieve
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from sieve import Sender

import mailroom
from mailroom import Category, ConfigurationError, Mail, MailroomSettings, ancestors

NOW = "2026-11-22T12:00:00Z"
# The keys of a rule in a published export of Fastmail's, in the order of the alphabet.
EXPORTED = re.findall(
    r"\w+",
    "combinator conditions created discard fileIn markFlagged markRead markSpam name "
    "previousFileInName redirectTo search showNotification skipInbox snoozeUntil stop updated",
)
ODD = ['a "quote"', "back\\slash\\", ".", "Größe 信", "${x}", "# no comment", "a;}", "'", "*/"]


def settings_of(*categories: Any, **changes: Any) -> MailroomSettings:
    given = {"triage_categories": list(categories)} if categories else {}
    return MailroomSettings(jmap_token="x", **given, **changes)


def family(category: Category, of: MailroomSettings) -> list[Category]:
    return [category, *ancestors(category, of.triage_categories)]


def groups_of(category: Category, of: MailroomSettings) -> set[str]:
    """The groups that triage puts a sender into."""
    return {each.contact_group for each in family(category, of)}


def triaged(category: Category, of: MailroomSettings) -> set[str]:
    """Where triage puts a mail from the Screener."""
    boxes = mailroom.Boxes(
        inbox="Inbox",
        screener=of.screener_mailbox,
        error=of.label_mailroom_error,
        warning="",
        labels={each.label: each for each in of.triage_categories},
        destinations={each: each.destination_mailbox for each in of.triage_categories},
    )
    mail = Mail("1", "bob@shop.example", "", frozenset({boxes.screener, category.label}))
    refile, finish = mailroom.plan_mails([mail], family(category, of), boxes, False)
    return set(mail.patched(refile["1"]).patched(finish["1"]).mailboxes)


# The interpreter of the rules


def matches(search: str, groups: Collection[str], is_contact: bool) -> bool:
    """Fastmail's search, as far as the rules use it: terms that all have to hold."""
    term = re.compile(r'(NOT )?fromin:("(?:[^"\\]|\\.)*"|\w+)( |$)')
    position, holds = 0, True
    while position < len(search):
        found = term.match(search, position)
        assert found, search
        negated, name, _ = found.groups()
        group = re.sub(r"\\(.)", r"\1", name[1:-1])
        inside = group in groups if name.startswith('"') else is_contact
        holds &= inside != bool(negated)
        position = found.end()
    return holds


def by_rules(rules: list[mailroom.JSON], groups: Collection[str], is_contact: bool) -> set[str]:
    """Where Fastmail puts a mail: all rules that match apply, until one says stop."""
    boxes, skips = set(), False
    for rule in rules:
        if matches(rule["search"], groups, is_contact):
            boxes |= {rule["fileIn"]} - {None}
            skips |= rule["skipInbox"]
            if rule["stop"]:
                break
    return boxes | (set() if skips and boxes else {"Archive"} if skips else {"Inbox"})


# Each is {group: uid}, {mailbox: id} and the extensions that are offered, for a set of names.
FORMS = {
    "what is not known": ((), False),
    "all of Cyrus": (sieve.EXTENSIONS, True),
    "no ids": (("fileinto", "copy", "vnd.cyrus.jmapquery"), True),
}


def by_script(
    of: MailroomSettings, form: str, groups: Collection[str], is_contact: bool, as_cyrus: bool
) -> set[str]:
    offered, has_ids = FORMS[form]
    uids = {each.contact_group: f"urn:uuid:{n}" for n, each in enumerate(of.triage_categories)}
    names = [of.screener_mailbox, *(each.destination_mailbox for each in of.triage_categories)]
    ids = {name: f"P{n}" for n, name in enumerate(dict.fromkeys(names))} if has_ids else {}
    text = mailroom.sieve_script(of, uids, ids, offered)
    sieve.check_script(text, offered or sieve.EXTENSIONS)
    prefix = "urn:uuid:" if as_cyrus else ""
    sender = Sender({prefix + uids[group].removeprefix("urn:uuid:") for group in groups})
    if not is_contact:
        sender = Sender(is_contact=False)
    return sieve.deliver(text, sender, {v: k for k, v in ids.items()}, as_cyrus=as_cyrus)


def everywhere(of: MailroomSettings, groups: Collection[str], is_contact: bool = True) -> set[str]:
    """Where a mail goes, which has to be the same by the rules and by the script in all forms."""
    expected = by_rules(mailroom.fastmail_rules(of, NOW), groups, is_contact)
    for form in FORMS:
        for as_cyrus in (False, True):
            assert by_script(of, form, groups, is_contact, as_cyrus) == expected, form
    return expected


def check(of: MailroomSettings) -> None:
    """Mails of each category's senders go where triage puts them, strangers' to the Screener, and
    other contacts' stay in the Inbox."""
    for category in of.triage_categories:
        assert everywhere(of, groups_of(category, of)) == triaged(category, of), category.name
    assert everywhere(of, (), is_contact=False) == {of.screener_mailbox}
    assert everywhere(of, ()) == {"Inbox"}


# Category trees


@st.composite
def trees(draw: st.DrawFn, shared_groups: bool = False) -> MailroomSettings:
    """Any set of categories that the settings accept, in any order."""
    count = draw(st.integers(1, 6))
    entries: list[dict[str, Any]] = []
    for number in range(count):
        name = draw(st.text(st.sampled_from("ab\"\\ .é{}$:;#'"), max_size=4)) + str(number)
        entry: dict[str, Any] = {"name": name, "add_to_inbox": draw(st.booleans())}
        if entries and draw(st.integers(0, 3)) > 0:
            entry["parent"] = draw(st.sampled_from(entries))["name"]
        if entries and draw(st.integers(0, 3)) == 0:
            entry["destination_mailbox"] = entries[0]["name"]
        if shared_groups and "parent" in entry and draw(st.booleans()):
            entry["contact_group"] = entries[0]["name"]
        entries.append(entry)
    try:
        return settings_of(*draw(st.permutations(entries)))
    except ConfigurationError:
        assume(False)
        raise


THOROUGH = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)


def test_mails_go_where_triage_puts_them() -> None:
    check(settings_of())
    check(settings_of("Only", screener_mailbox="Wartezimmer"))


@THOROUGH
@given(trees())
def test_mails_go_where_triage_puts_them_for_any_categories(of: MailroomSettings) -> None:
    check(of)


# The group of a parent comes again below; then a mailbox that is filed into on all ways.
TWICE: list[Any] = [
    {"name": "A", "add_to_inbox": True},
    {"name": "B", "parent": "A", "destination_mailbox": "A"},
    {"name": "C", "parent": "B", "contact_group": "A", "add_to_inbox": True},
]
ONE_MAILBOX: list[Any] = [
    "A",
    {"name": "B", "parent": "A", "destination_mailbox": "A"},
    {
        "name": "C",
        "parent": "A",
        "contact_group": "A",
        "destination_mailbox": "A",
        "add_to_inbox": True,
    },
]


@THOROUGH
@given(trees(shared_groups=True))
@example(settings_of(*TWICE[::-1]))
@example(settings_of(*ONE_MAILBOX))
def test_with_a_shared_group_no_mail_misses_a_place(of: MailroomSettings) -> None:
    """Nobody can tell such senders apart: the mails get the places of all whose groups are the
    same, and none that none of them has."""
    for category in of.triage_categories:
        groups = groups_of(category, of)
        boxes = everywhere(of, groups)
        assert boxes >= triaged(category, of)
        alike = [each for each in of.triage_categories if each.contact_group in groups]
        assert boxes <= set().union(*(triaged(each, of) for each in alike))


@pytest.mark.parametrize("name", ODD)
def test_names_may_have_anything_that_prints(name: str) -> None:
    check(settings_of(name, {"name": f"{name} 2", "parent": name, "add_to_inbox": True}))


# The rules file


def test_the_rules_file_is_as_an_export() -> None:
    rules = json.loads(json.dumps(mailroom.fastmail_rules(settings_of(), NOW)))
    for rule in rules:
        assert sorted(rule) == EXPORTED
        assert (rule["combinator"], rule["conditions"], rule["stop"]) == ("all", None, False)
        assert rule["created"] == rule["updated"] == NOW
        for key in ("redirectTo", "snoozeUntil", "previousFileInName"):
            assert rule[key] is None
        for key in ("markRead", "markFlagged", "markSpam", "discard", "showNotification"):
            assert rule[key] is False
    shown = [(rule["search"], rule["fileIn"], rule["skipInbox"]) for rule in rules]
    assert shown == [
        ('fromin:"Imbox"', "Imbox", False),
        ('fromin:"Feed"', "Feed", True),
        ('fromin:"Paper Trail"', "Paper Trail", True),
        ('fromin:"Jail"', "Jail", True),
        ('fromin:"Person"', "Person", True),
        ('fromin:"Billboard"', "Billboard", True),
        ('fromin:"Truck"', "Truck", True),
        ("NOT fromin:contacts", "Screener", True),
    ]


def test_a_second_rule_only_where_some_senders_stay_in_the_inbox() -> None:
    of = settings_of("A", {"name": "B", "parent": "A", "add_to_inbox": True}, "C")
    rules = mailroom.fastmail_rules(of, NOW)
    assert [(rule["search"], rule["fileIn"], rule["skipInbox"]) for rule in rules] == [
        ('fromin:"A"', "A", False),
        ('fromin:"A" NOT fromin:"B"', None, True),
        ('fromin:"B"', "B", False),
        ('fromin:"C"', "C", True),
        ("NOT fromin:contacts", "Screener", True),
    ]


def test_nested_mailboxes_go_by_their_paths() -> None:
    paths = {"Feed": "Read/Feed", "Screener": "Inbox/Screener"}
    rules = mailroom.fastmail_rules(settings_of("Feed", "Jail"), NOW, paths)
    assert [rule["fileIn"] for rule in rules] == ["Read/Feed", "Jail", "Inbox/Screener"]


# The script


def script(of: MailroomSettings, offered: Collection[str] = (), **more: Any) -> str:
    groups: Mapping[str, str] = {each.contact_group: each.name for each in of.triage_categories}
    return mailroom.sieve_script(of, groups, {}, offered, **more)


def test_the_script_says_whose_it_is() -> None:
    first, _, second, *_ = script(settings_of()).splitlines()
    assert first == mailroom.SIEVE_MARKER
    assert second.startswith("require [")


def test_the_script_asks_for_groups_as_the_server_knows_them() -> None:
    assert "fromContactCardUid" in script(settings_of())
    old = script(settings_of(), group_filter=mailroom.OLD_GROUP_FILTER)
    assert "fromContactGroupId" in old
    assert "fromContactCardUid" not in old


def test_a_category_without_a_group_is_left_out_of_the_script() -> None:
    of = settings_of("A", {"name": "B", "parent": "A", "add_to_inbox": True})
    text = mailroom.sieve_script(of, {"A": "uid"}, {}, ())
    assert sieve.deliver(text, Sender({"uid"})) == {"A"}
    assert sieve.deliver(mailroom.sieve_script(of, {}, {}, ()), Sender({"uid"})) == {"Inbox"}


def test_a_server_that_does_not_know_contacts_is_no_server_for_the_script() -> None:
    with pytest.raises(ConfigurationError, match=r"vnd\.cyrus\.jmapquery"):
        script(settings_of(), ["fileinto", "copy", "mailboxid", "extlists"])


def test_the_interpreter_knows_sieve() -> None:
    """RFC 5228 and 3894; of what comes twice, Cyrus takes the last."""
    twice = 'require ["fileinto", "copy"]; fileinto "X"; fileinto :copy "X";'
    assert sieve.deliver(twice, Sender()) == {"X"}
    assert sieve.deliver(twice, Sender(), as_cyrus=True) == {"X", "Inbox"}
    lines = 'if jmapquery text: # no\n{"fromAnyContact":\n..true}\n.\n{ keep; }'
    assert sieve.parse(lines)[0].tests[0].arguments == ['{"fromAnyContact":\n.true}\n']
    assert [node.name for node in sieve.parse("/* x */ keep; # y\nstop;")] == ["keep", "stop"]


@pytest.mark.parametrize(
    "text",
    [
        'fileinto "X";',
        'require "nothing";',
        'require "fileinto"; fileinto "X"',
        'require "fileinto"; fileinto :copy "X";',
        'require "fileinto"; if true { fileinto "X"; ',
        'require "fileinto"; explode "X";',
        'keep; require "fileinto";',
        'if "x" { keep; }',
        '"unfinished',
    ],
)
def test_the_interpreter_knows_what_is_no_sieve(text: str) -> None:
    with pytest.raises(sieve.SieveError):
        sieve.check_script(text, sieve.EXTENSIONS)
