"""Setup, the dry run and the single cycle: what an account has and lacks is told and made, what a
cycle would do is told and not done, and it is what the cycle then does."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import homes
import pytest
from homes import EmbeddedHome, add_contact, embedded_home, once, run, snapshot
from jmap_server import FOREVER, JSON, Fault, Write
from ports import free_port
from radicale_server import RadicaleServer
from tools import Ran, command, settings_for

import mailroom
from mailroom import contact_uid

APPLY = ("setup", "--apply")
NOTHING = "There is nothing to do."
BOXES = {
    *("Screener", "Imbox", "Feed", "Paper Trail", "Jail", "Person", "Billboard", "Truck"),
    *("@ToImbox", "@ToFeed", "@ToPaperTrail", "@ToJail", "@ToPerson", "@ToBillboard", "@ToTruck"),
    *("@ToScreener", "@MailroomError", "@MailroomWarning"),
}
GROUPS = {*("Imbox", "Feed", "Paper Trail", "Jail", "Person", "Billboard", "Truck"), "Mailroom"}
WITHOUT = {"Inbox", "Archive", "Drafts", "Sent", "Junk", "Trash", "Mine"}


on_jmap = pytest.mark.parametrize("home", ["fastmail"], indirect=True)
two_stores = pytest.mark.parametrize("home", ["cyrus", "radicale"], indirect=True)


def groups(home: EmbeddedHome) -> list[str]:
    return sorted(card.name for card in home.book.seen().values() if card.kind == "group")


def check_complete(home: EmbeddedHome) -> None:
    """All that Mailroom needs is there, and once."""
    names = [box.name for box in home.account.mailboxes.values()]
    assert sorted(names) == sorted(BOXES | WITHOUT)
    assert all(home.boxes().values()), "not subscribed"
    assert groups(home) == sorted(GROUPS)
    assert NOTHING in run(home, *APPLY).out
    once(home)


def items(out: str) -> dict[tuple[str, str], str]:
    """{(kind, name): state} of what `--json` prints."""
    return {(each["kind"], each["name"]): each["state"] for each in json.loads(out)["items"]}


# ------------------------------------------------------------------------------- the main job


def test_the_plan_names_all_and_changes_nothing(home: EmbeddedHome) -> None:
    before = snapshot(home)
    with homes.fate() as met:
        ran = run(home, "setup")
        assert met.writes == []
    assert (ran.status, ran.err, snapshot(home)) == (0, "", before)
    lines = ran.out.splitlines()
    missing = [line for line in lines if line.startswith("missing")]
    assert len(missing) == len(BOXES) + len(GROUPS)
    for name in BOXES | GROUPS:
        assert any(re.search(rf"  {re.escape(name)}  ", line) for line in missing), name
    assert f"{len(missing)} things to make. Nothing has been changed" in lines[-1]


def test_what_is_missing_is_made_in_a_request_for_each_kind(home: EmbeddedHome) -> None:
    start = len(home.mail.requests)
    with homes.fate() as met:
        ran = run(home, *APPLY)
        written = [request for request in met.writes if request.method == "POST"]
    assert (ran.status, ran.err) == (0, "")
    assert len(re.findall("^made +", ran.out, re.MULTILINE)) == len(BOXES) + len(GROUPS)
    is_jmap = "carddav_url" not in home.settings
    assert len(written) == 1 + is_jmap
    assert len(home.mail.calls("Mailbox/set")) == 1
    assert len(home.mail.calls("ContactCard/set")) == is_jmap
    assert len(home.mail.requests) - start <= 5
    check_complete(home)


@two_stores
def test_only_what_is_missing_is_made(home: EmbeddedHome) -> None:
    for name in ("Feed", "@ToScreener", "Screener"):
        home.account.add_mailbox(name)
    feed = home.book.add_group("Feed")
    uid = add_contact(home, "tea@x.example")
    before = snapshot(home)
    ran = run(home, *APPLY, "--json")
    made = Counter(items(ran.out).values())
    assert made == {"there": 4, "made": len(BOXES) + len(GROUPS) - 4}
    check_complete(home)
    after = snapshot(home)
    assert {key: after[key] for key in before} == before
    assert {feed, uid} < homes.of_kind(after, "card").keys()


@on_jmap
def test_without_warnings_their_label_is_not_needed(home: EmbeddedHome) -> None:
    home.changes["warnings_enabled"] = False
    assert run(home, *APPLY).status == 0
    assert home.boxes().keys() == BOXES - {"@MailroomWarning"} | WITHOUT


@on_jmap
def test_a_name_that_several_things_share_is_made_once(home: EmbeddedHome) -> None:
    home.changes["triage_categories"] = [
        {"name": "A", "destination_mailbox": "Both", "contact_group": "Both"},
        {"name": "B", "destination_mailbox": "Both", "contact_group": "Both", "parent": "A"},
        {"name": "Büro; 日本, \\n", "label": "@Ü"},
    ]
    ran = run(home, *APPLY)
    assert ran.status == 0, ran
    assert NOTHING in run(home, *APPLY).out
    assert groups(home) == ["Both", "Büro; 日本, \\n", "Mailroom"]
    once(home)


@on_jmap
def test_it_keeps_to_the_limits(home: EmbeddedHome) -> None:
    home.mail.options.limits |= {"maxObjectsInSet": 3, "maxCallsInRequest": 4}
    assert run(home, *APPLY).status == 0
    check_complete(home)
    assert all(len(call["create"]) <= 3 for call in home.mail.calls("Mailbox/set"))


# ----------------------------------------------------------------------------- what is told


@two_stores
def test_json_has_the_whole_plan(home: EmbeddedHome) -> None:
    plan = json.loads(run(home, "setup", "--json").out)
    assert plan.keys() == {"account", "items", "rules", "told"}
    assert plan["rules"]["in the group Jail"] == "Jail, skip the Inbox"
    assert {each["state"] for each in plan["items"]} == {"missing"}
    assert {each["name"] for each in plan["items"] if each["kind"] == "contact group"} == GROUPS
    assert {each["name"] for each in plan["items"] if each["kind"] != "contact group"} == BOXES
    assert all(each["purpose"] for each in plan["items"])
    assert set(items(run(home, *APPLY, "--json").out).values()) == {"made"}
    ran = run(home, "setup", "--json")
    assert set(items(ran.out).values()) == {"there"}
    assert json.loads(ran.out)["told"] == [NOTHING]


def test_the_session_is_told_in_words(home: EmbeddedHome) -> None:
    home.mail.options.limits |= {"maxObjectsInGet": 1234, "maxObjectsInSet": 77}
    facts = json.loads(run(home, "setup", "--json").out)["account"]
    assert home.mail.session_url in facts["account"]
    assert home.mail.options.username in facts["account"]
    assert facts["push"] == "yes"
    is_jmap = "carddav_url" not in home.settings
    assert facts["contacts"].startswith("over JMAP" if is_jmap else "over CardDAV, http://")
    assert "1,234 objects a get, 77 a set" in facts["limits"]
    assert facts["token"] == "may write mail" + is_jmap * " and contacts"
    home.mail.options.push = None
    home.mail.options.sieve = True
    facts = json.loads(run(home, "setup", "--json").out)["account"]
    assert (facts["push"], facts["Sieve"]) == ("no: polling", "over JMAP")


def test_the_rules_for_mail_to_come_are_told(home: EmbeddedHome) -> None:
    out = run(home, "setup").out
    for name in GROUPS - {"Mailroom"}:
        inbox = "keep it in the Inbox" if name == "Imbox" else "skip the Inbox"
        assert re.search(rf"^  in the group {name} +{name}, {inbox}$", out, re.MULTILINE), name
    assert re.search(r"^  in no contact +Screener, skip the Inbox$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"read_only": True}, ["the token may only read mail", "the token may not write contacts"]),
        ({"has_contacts": False}, ["the token gives no access to contacts"]),
        (
            {"read_only": True, "has_contacts": False},
            ["the token may only read mail", "the token gives no access to contacts"],
        ),
    ],
    ids=["read-only", "no contacts", "both"],
)
@pytest.mark.parametrize("arguments", [("setup",), APPLY])
def test_an_account_that_mailroom_cannot_work_on(
    arguments: tuple[str, ...], change: JSON, said: list[str]
) -> None:
    with embedded_home("fastmail", RadicaleServer) as home:
        before = snapshot(home)
        for name, value in change.items():
            setattr(home.mail.options, name, value)
        ran = run(home, *arguments)
        assert (ran.status, snapshot(home), home.mail.writes) == (2, before, [])
        *problems, verdict = ran.out.splitlines()[-len(said) - 1 :]
        assert [line.partition(":")[0] for line in problems] == said
        assert verdict == "Mailroom cannot work like that. Nothing has been changed."
        plan = json.loads(run(home, *arguments, "--json").out)
        assert [line.partition(":")[0] for line in plan["told"]] == [*said, verdict]


@pytest.mark.parametrize("change", [{"read_only": True}, {"has_contacts": False}], ids=str)
def test_no_script_is_printed_for_such_an_account(change: JSON) -> None:
    """It would test for groups that are not there."""
    with embedded_home("fastmail", RadicaleServer) as home:
        vars(home.mail.options).update(change)
        ran = run(home, "setup", "--sieve")
        assert (ran.status, ran.out) == (2, "")
        assert all(line.startswith("mailroom: the token ") for line in ran.err.splitlines())


@pytest.mark.parametrize("more", [("--json",), ("--fastmail-rules", "rules.json")], ids=str)
def test_the_script_is_printed_alone(more: tuple[str, ...]) -> None:
    ran = command("setup", "--sieve", *more, jmap_token="x")
    assert (ran.status, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert "--sieve" in ran.err


def test_what_it_cannot_even_look_at_is_one_line() -> None:
    away = f"http://127.0.0.1:{free_port()}"
    login = {"carddav_username": "a", "carddav_password": "b"}
    with embedded_home("fastmail", RadicaleServer) as home:
        for changes, status, said in [
            ({"jmap_token": "another"}, 2, "401"),
            ({"jmap_url": away}, 1, "cannot be reached"),
            ({"carddav_url": away, **login}, 1, f"MAILROOM_CARDDAV_URL={away}: "),
        ]:
            ran = command(*APPLY, **{**home.settings, **changes})
            assert (ran.status, ran.out) == (status, ""), changes
            [line] = ran.err.splitlines()
            assert said in line
            assert line.endswith("Run it again: it does what is left") == (status == 1)
            assert home.mail.writes == []


def test_settings_that_are_wrong_are_a_line_each() -> None:
    ran = command("setup", jmap_token="", poll_interval="soon")
    assert (ran.status, ran.out) == (2, "")
    assert [line.split()[1].rstrip(":") for line in ran.err.splitlines()] == [
        "MAILROOM_JMAP_TOKEN",
        "MAILROOM_POLL_INTERVAL='soon'",
    ]


# ------------------------------------------------------------------------------- when it fails


def test_a_mailbox_that_is_refused_is_told_and_the_rest_is_made() -> None:
    with embedded_home("fastmail", RadicaleServer) as home:
        refuse = {"m3": {"type": "forbidden", "description": "not this one"}}
        home.mail.faults = [Fault("Mailbox/set", refuse=refuse)]
        ran = run(home, *APPLY, "--json")
        assert ran.status == 1
        plan = json.loads(ran.out)
        [refused] = [each for each in plan["items"] if each["state"] == "refused"]
        assert (refused["kind"], refused["purpose"]) == ("mailbox", "forbidden not this one")
        assert plan["told"][0].startswith("1 thing could not be made.")
        assert home.boxes().keys() == BOXES - {refused["name"]} | WITHOUT
        assert groups(home) == sorted(GROUPS)
        ran = run(home, *APPLY)
        assert ran.status == 0
        assert "1 thing made" in ran.out
        check_complete(home)


FAULTS: dict[str, Callable[[str], Fault]] = {
    "each is refused": lambda method: Fault(method, refuse={"*": {"type": "overQuota"}}),
    "the method fails": lambda method: Fault(method, errors={method: {"type": "serverFail"}}),
    "the state differs": lambda method: Fault(method, errors={method: {"type": "stateMismatch"}}),
    "HTTP 503": lambda method: Fault(method, status=503),
    "the request is lost": lambda method: Fault(method, drop=True),
    "the reply is lost": lambda method: Fault(method, drop=True, work=True),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("method", ["Mailbox/set", "ContactCard/set"])
def test_one_kind_that_fails_does_not_keep_the_other_from_being_made(
    method: str, fault: Callable[[str], Fault]
) -> None:
    with embedded_home("fastmail", RadicaleServer) as home:
        home.mail.faults = [fault(method)]
        ran = run(home, *APPLY, "--json")
        assert ran.status == 1
        states: dict[str, set[str]] = defaultdict(set)
        for (kind, _), state in items(ran.out).items():
            states["ContactCard/set" if kind == "contact group" else "Mailbox/set"].add(state)
        other = next(each for each in ("Mailbox/set", "ContactCard/set") if each != method)
        assert states == {method: {"refused"}, other: {"made"}}
        if method == "Mailbox/set":
            assert groups(home) == sorted(GROUPS)
        else:
            assert home.boxes().keys() == BOXES | WITHOUT
        ran = run(home, *APPLY)
        assert ran.status == 0, ran
        check_complete(home)


@pytest.mark.parametrize("arguments", [APPLY, (*APPLY, "--json")], ids=["text", "json"])
def test_a_reason_is_told_in_full_but_for_secrets(arguments: tuple[str, ...]) -> None:
    with embedded_home("fastmail", RadicaleServer) as home:
        reason = f"the token {home.mail.options.token} may do much, " * 3 + "but not this"
        refuse = {"*": {"type": "forbidden", "description": reason}}
        home.mail.faults = [Fault("Mailbox/set", refuse=refuse)]
        ran = run(home, *arguments)
        assert ran.status == 1
        assert ran.out.count(reason.replace(home.mail.options.token, "[secret]")) == len(BOXES)


@on_jmap
def test_what_was_made_is_told_where_the_rules_cannot_be_written(home: EmbeddedHome) -> None:
    ran = run(home, *APPLY, "--fastmail-rules", "/nowhere/rules.json")
    assert (ran.status, ran.err) == (1, "")
    assert len(re.findall("^made +", ran.out, re.MULTILINE)) == len(BOXES) + len(GROUPS)
    assert ran.out.endswith("--fastmail-rules '/nowhere/rules.json': No such file or directory\n")


@on_jmap
def test_of_two_groups_with_one_name_the_rules_ask_the_one_that_is_joined(
    home: EmbeddedHome,
) -> None:
    run(home, *APPLY)
    uids = {home.book.add_group("Feed") for _ in range(8)}
    home.deliver("Bob <bob@x.example>", "one")
    home.tap("one", "@ToFeed")
    once(home)
    joined = {uid for uid, card in home.book.seen().items() if card.name == "Feed" and card.members}
    script = run(home, "setup", "--sieve").out
    assert len(uids) == 8
    assert {uid for uid in home.book.seen() if uid in script and uid in uids} == joined & uids
    assert len(joined) == 1
    assert joined.pop() in script


@on_jmap
def test_no_rule_is_left_out_where_categories_share_a_group(home: EmbeddedHome) -> None:
    kid = {"name": "Kid", "parent": "Feed", "contact_group": "Feed", "destination_mailbox": "Own"}
    home.changes["triage_categories"] = ["Feed", kid]
    plan = json.loads(run(home, "setup", "--json").out)
    assert plan["rules"]["in the group Feed"] == "Feed, skip the Inbox; Own, skip the Inbox"


@pytest.mark.parametrize("what", ["lost", "reply lost", "refused"])
@pytest.mark.parametrize("home", ["radicale"], indirect=True)
def test_a_contacts_server_in_trouble_is_told_for_each_group(home: EmbeddedHome, what: str) -> None:
    with homes.fate() as met:
        met.befall = lambda request: what if request.method == "PUT" else ""
        ran = run(home, *APPLY, "--json")
    assert ran.status == 1
    states = items(ran.out)
    assert {states["contact group", name] for name in GROUPS} == {"refused"}
    assert {state for (kind, _), state in states.items() if kind != "contact group"} == {"made"}
    assert run(home, *APPLY).status == 0
    check_complete(home)


@two_stores
@pytest.mark.parametrize("what", ["killed after", "lost", "reply lost"])
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


def both_setups(home: EmbeddedHome, nth: int) -> tuple[Ran, Ran]:
    """One setup, and another that runs from its start to its end where the first is about to write
    for the nth time."""
    second: list[Ran] = []

    def other(request: Any) -> str:
        if homes.is_write(request) and len(met.writes) == nth:
            met.befall = lambda _: ""
            second.append(run(home, *APPLY))
        return ""

    with homes.fate() as met:
        met.befall = other
        first = run(home, *APPLY)
    return first, second[0]


@two_stores
def test_two_setups_at_the_same_time_make_nothing_twice(home: EmbeddedHome) -> None:
    for nth in (1, 2):
        for box in [box.id for box in home.account.mailboxes.values() if not box.role]:
            home.account.remove_mailbox(box)
        home.account.add_mailbox("Mine")
        for uid in home.book.seen():
            home.book.remove(uid)
        first, second = both_setups(home, nth)
        assert second.status == 0
        assert first.status == 1
        assert "could not be made" in first.out
        check_complete(home)


# ------------------------------------------------------------------------------- the dry run


def desk(home: EmbeddedHome) -> dict[str, str]:
    """An account with something of everything to do: {sender: the label}."""
    add_contact(home, "tea@x.example")
    add_contact(home, "plain@x.example")
    assert run(home, *APPLY).status == 0
    before = {"again": "@ToFeed", "back": "@ToPerson", "kept": "@ToImbox", "same": "@ToFeed"}
    for name, label in before.items():
        for nth in range(2):
            home.deliver(f"{name.title()} <{name}@x.example>", f"{name}@x.example {nth}")
        home.tap(f"{name}@x.example 0", label)
    once(home)
    home.book.meddle(contact_uid("kept@x.example"))
    now = {
        "again": "@ToTruck",
        "back": "@ToScreener",
        "kept": "@ToScreener",
        "same": "@ToFeed",
        "new": "@ToImbox",
        "jane doe": "@ToPerson",
        "tea": "@ToJail",
        "plain": "@ToFeed",
        "nobody": "@ToScreener",
    }
    now = {f"{name.split()[0]}@x.example": label for name, label in now.items()}
    for address, label in now.items():
        if f"{address} 0" not in home.where():
            for nth in range(3):
                name = "Other" if address.startswith("plain") else address.partition("@")[0]
                home.deliver(f"{name.title()} <{address}>", f"{address} {nth}")
        home.tap(f"{address} 1", label)
    return now


def unusable(home: EmbeddedHome) -> None:
    """Mails whose labels ask for what cannot be done, and one for which that is over."""
    home.deliver("Both <both@x.example>", "in conflict")
    home.tap("in conflict", "@ToFeed", "@ToJail")
    home.deliver(None, "of nobody")
    home.tap("of nobody", "@ToFeed")
    home.deliver("Was <was@x.example>", "was wrong")
    home.tap("was wrong", "@MailroomError")


def blocks(out: str) -> dict[str, list[str]]:
    """{sender or mail: the lines that tell what becomes of it}."""
    found = [block.split("\n  ") for block in re.split(r"\n(?! |\Z)", out.strip("\n"))]
    assert len({head for head, *_ in found}) == len(found)
    return {head: lines for head, *lines in found}


def test_a_dry_run_writes_nothing_at_all(home: EmbeddedHome) -> None:
    desk(home)
    unusable(home)
    before, writes = snapshot(home), len(home.mail.writes)
    with homes.fate() as met:
        ran = run(home, "run", "--once", "--dry-run")
        assert met.writes == []
        assert {request.method for request in met.sent} <= {"GET", "POST", "PROPFIND", "REPORT"}
    assert (ran.status, snapshot(home), len(home.mail.writes)) == (0, before, writes)
    assert len(blocks(ran.out)) == 9 + 3


def quoted(names: set[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names))


class Did:
    """What a run has done for each sender, as the dry run would say it, from the requests that
    the server worked, and the account as it was before and is after."""

    def __init__(self, home: EmbeddedHome, before: homes.Cards, writes: list[Write]) -> None:
        self.home, self.writes = home, writes
        self.cards = before, home.book.seen()
        self.names = {box.id: box.name for box in home.account.mailboxes.values()}

    def lines(self, address: str, label: str) -> set[str]:
        return {self.contact(address), *self.groups(address), *self.mails(address, label)}

    def uids(self, address: str) -> list[str]:
        """The contact's uid before and after; empty where there is none."""
        return [
            next((uid for uid, card in cards.items() if address in card.emails), "")
            for cards in self.cards
        ]

    def contact(self, address: str) -> str:
        before, after = self.uids(address)
        if not before and not after:
            return "there is no contact with this address"
        if not after:
            return f'delete the contact "{self.cards[0][before].name}"'
        if not before:
            card = self.cards[1][after]
            return f'make the contact "{card.name}" ({card.kind})'
        old, new = (cards[before].note.splitlines() for cards in self.cards)
        added = "".join(f', add "{line}" to its note' for line in new if line not in old)
        less = ", without Mailroom's lines in its note" if set(old) - set(new) else ""
        known = "" if less else ", which has this address"
        return f'keep the contact "{self.cards[0][before].name}"{known}{added}{less}'

    def groups(self, address: str) -> Iterator[str]:
        before, after = (
            {card.name for card in cards.values() if uid in card.members}
            for uid, cards in zip(self.uids(address), self.cards, strict=True)
        )
        if after - before:
            yield f"put the contact into {quoted(after - before)}"
        if before - after:
            yield f"take the contact out of {quoted(before - after)}"

    def mails(self, address: str, label: str) -> Iterator[str]:
        ids = {
            id_
            for id_, mail in self.home.account.mails.items()
            if f"<{address}>" in str(mail.sender)
        }
        off = 0
        ways: Counter[str] = Counter()
        for write in self.writes:
            for id_ in ids & (write.args.get("update") or {}).keys():
                patch = {
                    self.names[path.removeprefix("mailboxIds/")]: stays
                    for path, stays in write.args["update"][id_].items()
                }
                into = quoted({name for name, stays in patch.items() if stays})
                out = {name for name, stays in patch.items() if not stays}
                if label in out:
                    off += 1
                    continue
                ways[f"into {into}" + (f", out of {quoted(out)}" if out else "")] += 1
        for way, number in ways.items():
            yield f"file {number} mail{'s' * (number > 1)} {way}"
        yield f"take {label} off {off} mail{'s' * (off > 1)}"


def sorted_names(line: str) -> str:
    """A line with the names that it lists in order, and without its reason."""
    if line.startswith(("make", "delete")):
        return line.partition(": ")[0]
    return re.sub(
        r'"[^"]*"(?:, "[^"]*")+', lambda listed: quoted({*re.findall('"([^"]*)"', listed[0])}), line
    )


def test_a_dry_run_tells_what_the_run_then_does(home: EmbeddedHome) -> None:
    labels = desk(home)
    before, start = home.book.seen(), len(home.mail.writes)
    told = blocks(run(home, "run", "--once", "--dry-run").out)
    once(home)
    did = Did(home, before, home.mail.writes[start:])
    assert told.keys() == {f"{address} has the label {label}" for address, label in labels.items()}
    for address, label in labels.items():
        lines = {sorted_names(line) for line in told[f"{address} has the label {label}"]}
        warned = "warn that the mail gives another name than the contact"
        assert (warned in lines) == address.startswith("plain")
        assert lines - {warned} == did.lines(address, label), address
    assert run(home, "run", "--once", "--dry-run").out == f"{NOTHING}\n"


@on_jmap
def test_a_dry_run_says_from_how_many_mails_each_label_comes_off(home: EmbeddedHome) -> None:
    """After a conflict that the user has resolved."""
    assert run(home, *APPLY).status == 0
    home.tap(home.deliver("Bob <bob@x.example>", "one"), "@ToFeed", "@MailroomError")
    home.tap(home.deliver("Bob <bob@x.example>", "two"), "@MailroomError")
    lines = run(home, "run", "--once", "--dry-run").out.splitlines()
    assert sorted(line.strip() for line in lines if line.startswith("  take")) == [
        "take @MailroomError off 2 mails",
        "take @ToFeed off 1 mail",
    ]


@on_jmap
def test_a_dry_run_says_which_mails_get_and_lose_the_error_label(home: EmbeddedHome) -> None:
    assert run(home, *APPLY).status == 0
    unusable(home)
    told = set(run(home, "run", "--once", "--dry-run").out.splitlines())
    ids = {mail.subject: id_ for id_, mail in home.account.mails.items()}
    label = "@MailroomError"
    assert told == {
        f"mail {ids['in conflict']} gets {label}: several labels for both@x.example",
        f"mail {ids['of nobody']} gets {label}: it has no sender",
        f"mail {ids['was wrong']} loses {label}: nothing is wrong any more",
    }
    once(home)
    assert {subject for subject, boxes in home.where().items() if label in boxes} == {
        "in conflict",
        "of nobody",
    }


@on_jmap
def test_a_dry_run_goes_on_and_tells_what_is_news(
    home: EmbeddedHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gevent, "signal_handler", lambda *_: None)
    assert run(home, *APPLY).status == 0
    start, said = len(home.mail.writes), list[str]()
    service = mailroom.Service(settings_for(home.mail), dry_run=said.append)
    serving = gevent.spawn(service.run)
    home.mail.wait_for(lambda: said)
    assert said == [NOTHING]
    home.deliver("Bob <bob@x.example>", "one")
    home.tap("one", "@ToFeed")
    home.mail.wait_for(lambda: len(said) == 2)
    cycles = service.health.counts.total()
    home.deliver("Eve <eve@x.example>", "two")
    home.mail.wait_for(lambda: service.health.counts.total() > cycles)
    home.tap("two", "@ToJail")
    home.mail.wait_for(lambda: len(said) == 3)
    assert [text.split()[0] for text in said[1:]] == ["bob@x.example", "eve@x.example"]
    service.shutdown.set()
    assert serving.get(timeout=5) == 0
    assert len(home.mail.writes) == start


@on_jmap
def test_text_that_a_mail_brings_commands_no_terminal(home: EmbeddedHome) -> None:
    assert run(home, *APPLY).status == 0
    home.deliver("=?utf-8?q?=1B=5B2J=0Aevil?= <bob@x.example>", "one")
    home.tap("one", "@ToFeed")
    out = run(home, "run", "--once", "--dry-run").out
    assert "evil" in out
    assert "\x1b" not in out
    assert not any(line.startswith("evil") for line in out.splitlines())


# ------------------------------------------------------------------------------- a single cycle


def test_one_cycle_and_the_end(home: EmbeddedHome) -> None:
    assert run(home, *APPLY).status == 0
    home.deliver("Bob <bob@x.example>", "one")
    home.tap("one", "@ToFeed")
    ran = run(home, "run", "--once", health_port=free_port(), log_format="json")
    assert (ran.status, ran.out) == (0, "")
    assert home.where() == {"one": {"Feed"}}
    assert home.mail.count("stream") == 0
    assert [json.loads(line)["event"] for line in ran.err.splitlines()] == [
        "account ready",
        "sender triaged",
    ]


@on_jmap
def test_one_cycle_in_which_a_sender_fails_ends_with_status_3(home: EmbeddedHome) -> None:
    assert run(home, *APPLY).status == 0
    for name in ("bob", "eve"):
        home.tap(home.deliver(f"{name} <{name}@x.example>", name), "@ToFeed")
    id_ = next(id_ for id_, mail in home.account.mails.items() if mail.subject == "bob")
    refuse = {id_: {"type": "forbidden"}}
    home.mail.faults = [Fault("Email/set", times=FOREVER, refuse=refuse)]
    ran = run(home, "run", "--once")
    assert (ran.status, ran.out) == (3, "")
    assert "forbidden" in ran.err
    assert home.where() == {"bob": {"Screener", "@ToFeed"}, "eve": {"Feed"}}
    home.mail.faults.clear()
    once(home)
    assert home.where() == {"bob": {"Feed"}, "eve": {"Feed"}}


@pytest.mark.parametrize("arguments", [("--once",), ("--once", "--dry-run")])
def test_one_cycle_that_cannot_be_finished(arguments: tuple[str, ...]) -> None:
    with embedded_home("fastmail", RadicaleServer) as home:
        ran = command("run", *arguments, **home.settings)
        assert ran.status == 2
        assert "no mailbox 'Screener': `setup --apply` makes it" in ran.err
        assert run(home, *APPLY).status == 0
        home.mail.faults = [Fault(status=503, times=FOREVER)]
        ran = command("run", *arguments, **home.settings)
        assert (ran.status, ran.out) == (3, "")
        assert "503" in ran.err
        away = {**home.settings, "jmap_url": f"http://127.0.0.1:{free_port()}"}
        ran = command("run", *arguments, **away)
        assert ran.status == 3
        assert "cannot be reached" in ran.err
        ran = command("run", *arguments, **{**home.settings, "jmap_token": "another"})
        assert ran.status == 2
