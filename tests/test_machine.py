"""A state machine: a user, two Mailrooms and faults, in any order that hypothesis can think of, on
one account of the embedded server. At every moment nothing is lost; whenever a cycle goes well all
that was tapped before it is done; and in the end all comes to rest."""

from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from jmap_server import CATEGORIES, Fault, Request
from test_faults import KINDS, REFUSED
from tools import COUNTS, SERVERS
from worlds import PHONE, Program, World, labels_in, seeded

# As people's are: plain, in NFC where a search may be asked in NFD, and at a domain with a U-label.
SENDERS = ("ann@a.example", "jos\u00e9@b.example", "eve@m\u00fcller.example")
UIDS = ("AAMkAGY3/+QBw=", "http://x.example/cards/17", "C0FFEE00-0000-4000-8000-000000000000")
LABELS = tuple("@To" + name.replace(" ", "") for name in CATEGORIES)
OTHERS = ("Mine", "Archive", "Trash", "Screener", "Feed")

senders = st.sampled_from(SENDERS)
labels = st.sampled_from(LABELS)
numbers = st.integers(0, 9)
nth_requests = st.integers(1, 9)


class Accidents(RuleBasedStateMachine):
    """`names`: what the user has given another name or taken away for now, to be put back."""

    @initialize(style=st.sampled_from(sorted(SERVERS)), known=st.sets(senders))
    def account(self, style: str, known: set[str]) -> None:
        seeded()
        self.world = World(style)
        self.phone = self.world.account
        self.programs = [Program(self.world.settings) for _ in range(2)]
        self.names: dict[str, str] = {}
        self.edited: set[str] = set()
        self.users_turn = True
        self.homeless: list[str] = []
        for sender, uid in zip(sorted(known), UIDS, strict=False):
            self.phone.add_contact(sender, f"'Doe, Known {sender}'", uid=uid)
        for sender in SENDERS:
            self.world.deliver(sender, 2)
        self.world.watch()
        self.homes = self.at_home()
        self.phone.listeners.append(lambda _: self.look_at_homes())

    def at_home(self) -> set[str]:
        """Who is in a category's group."""
        return {sender for sender, groups in self.world.groups().items() if groups - {"Mailroom"}}

    def look_at_homes(self) -> None:
        """Only the user can take someone out of all groups."""
        now = self.at_home()
        if not self.users_turn:
            self.homeless += self.homes - now
        self.homes = now

    def mail(self, number: int) -> str:
        mails = sorted(self.phone.mails)
        return mails[number % len(mails)]

    def is_there(self, label: str) -> bool:
        return label not in self.names

    # The user

    @rule(sender=senders, box=st.sampled_from(OTHERS))
    def mail_comes(self, sender: str, box: str) -> None:
        self.world.deliver(sender, 1, box)

    @rule(number=numbers, label=labels)
    def taps(self, number: int, label: str) -> None:
        if self.is_there(label) and self.phone.mails:
            self.phone.label(self.mail(number), label)

    @rule(number=numbers, label=labels)
    def takes_a_label_off(self, number: int, label: str) -> None:
        if self.is_there(label) and self.phone.mails:
            mail = self.mail(number)
            if self.phone.mailboxes_of(mail) - {label}:
                self.phone.unlabel(mail, label)

    @rule(number=numbers, box=st.sampled_from(OTHERS))
    def moves(self, number: int, box: str) -> None:
        if self.phone.mails:
            self.phone.move(self.mail(number), box)

    @rule(number=numbers)
    def deletes_a_mail(self, number: int) -> None:
        if self.phone.mails:
            self.world.remove_mail(self.mail(number))

    @rule(sender=senders)
    def edits_or_makes_a_contact(self, sender: str) -> None:
        self.edited.add(sender)
        if sender not in self.world.groups():
            self.world.store.add(sender, "Made by the user")
        self.world.store.edit(self.world.contact(sender).uid, phone=PHONE)

    @rule(sender=senders)
    def deletes_a_contact(self, sender: str) -> None:
        if sender in self.world.groups():
            self.world.store.remove(self.world.contact(sender).uid)
            self.edited.discard(sender)

    @rule(label=labels)
    def renames_a_label(self, label: str) -> None:
        if self.is_there(label):
            self.phone.rename_mailbox(label, "@Away" + label)
            self.names[label] = "@Away" + label

    @rule(name=st.sampled_from(CATEGORIES))
    def renames_a_group(self, name: str) -> None:
        if self.is_there(name):
            self.world.store.edit(self.world.group(name).uid, name="Away " + name)
            self.names[name] = "Away " + name

    @rule(name=st.sampled_from(CATEGORIES))
    def deletes_a_group_and_makes_it_again(self, name: str) -> None:
        if self.is_there(name):
            self.world.store.remove(self.world.group(name).uid)
            self.world.store.add_group(name)

    @precondition(lambda self: self.names)
    @rule()
    def puts_a_name_back(self) -> None:
        name, other = self.names.popitem()
        if name in LABELS:
            self.phone.rename_mailbox(other, name)
        else:
            self.world.store.edit(self.world.group(other).uid, name=name)

    # Mailroom, and what goes wrong

    @rule(which=st.integers(0, 1))
    def a_cycle(self, which: int) -> None:
        self.cycle(self.programs[which])

    @rule(kind=st.sampled_from(sorted(KINDS.keys() - {REFUSED})), nth=nth_requests)
    def a_cycle_with_a_fault(self, kind: str, nth: int) -> None:
        program, start = self.programs[0], len(self.world.requests)

        def meet(number: int, request: Request) -> Fault | None:
            return KINDS[kind](program, request) if number == start + nth else None

        self.world.meet = meet
        self.cycle(program)
        COUNTS["faults of the state machine"] += 1

    @rule(nth=nth_requests, number=numbers, label=labels, box=st.sampled_from(OTHERS))
    def a_cycle_with_the_user_at_work(self, nth: int, number: int, label: str, box: str) -> None:
        start = len(self.world.requests)

        def act() -> None:
            self.users_turn = True
            self.taps(number, label)
            self.moves(number + 1, box)
            self.edits_or_makes_a_contact(SENDERS[number % 3])
            self.users_turn = False

        self.world.meet = lambda n, _: Fault(after=act) if n == start + nth else None
        self.cycle(self.programs[0], disturbed=True)

    @rule(nth=nth_requests)
    def a_cycle_in_the_middle_of_another(self, nth: int) -> None:
        start = len(self.world.requests)

        def run_other() -> None:
            self.world.meet = lambda *_: None
            self.programs[1].cycle()

        self.world.meet = lambda n, _: Fault(after=run_other) if n == start + nth else None
        self.cycle(self.programs[0])

    def cycle(self, program: Program, disturbed: bool = False) -> None:
        """One cycle. If it goes well and the user did nothing meanwhile, all taps are done."""
        asked, self.users_turn = self.asked(), False
        result = program.cycle()
        self.users_turn = True
        self.world.meet = lambda *_: None
        if result == "success" and not disturbed:
            self.check_done(asked)

    def asked(self) -> dict[str, set[str]]:
        """{sender: the triage labels on the sender's mails}"""
        found: dict[str, set[str]] = {}
        for id_, mail in self.phone.mails.items():
            there = {box for box in self.phone.mailboxes_of(id_) if labels_in([box])}
            if there:
                found.setdefault(mail.subject.partition(" ")[0], set()).update(there)
        return found

    def check_done(self, asked: dict[str, set[str]]) -> None:
        by_label = {each.label: each for each in self.world.settings.triage_categories}
        for sender, taps in asked.items():
            boxes = [
                self.phone.mailboxes_of(id_)
                for id_, mail in self.phone.mails.items()
                if mail.subject.startswith(sender + " ")
            ]
            if len(taps) > 1:
                assert any("@MailroomError" in there for there in boxes), "no conflict is shown"
                continue
            category = by_label[min(taps)]
            family = {category.name, category.parent} - {""}
            if family & self.names.keys():
                assert any("@MailroomError" in there for there in boxes), "no wait is shown"
                continue
            assert self.world.groups()[sender] - {"Mailroom"} == family
            for there in boxes:
                assert not labels_in(there), "a label is still on"
                filed = there - {"@MailroomWarning", "@MailroomError", "Inbox", *OTHERS[:3]}
                filed -= {*self.names.values()}
                assert filed in (set(), family), there

    # What has to hold

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "world"):
            return
        assert not self.world.broken, self.world.broken
        assert not self.homeless, "someone is in no group any more"
        for sender in self.edited:
            assert PHONE in repr(self.world.contact(sender)), "what the user wrote is gone"

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        with self.world:
            while self.names:
                self.puts_a_name_back()
            for program in self.programs:
                self.cycle(program)
                program.settle()
            writes = len(self.world.mail.writes)
            for program in self.programs:
                assert program.cycle() == "success"
            assert len(self.world.mail.writes) == writes, "an idle cycle writes"
        COUNTS["examples of the state machine"] += 1


def test_accidents_in_any_order(long: bool) -> None:
    examples: dict[str, Any] = {"max_examples": 50, "stateful_step_count": 30}
    if long:
        examples = {"max_examples": 2000, "stateful_step_count": 60}
    run_state_machine_as_test(
        Accidents,
        settings=hypothesis.settings(
            **examples,
            deadline=None,
            derandomize=not long,
            suppress_health_check=list(hypothesis.HealthCheck),
            print_blob=True,
        ),
    )
