# ruff: noqa: E402  (mailroom has to be found, and to be imported first)
"""Mailroom tried on a real account: `nox -s live`, with the settings that Mailroom has itself.

It makes mailboxes, labels and contact groups called `Mailroom test ...`, puts two messages of a
made-up sender there, and taps, taps again and undoes as a phone would, while `python mailroom.py`
runs with these names alone. Whatever happens, all of it is taken out again, and nothing else is
touched; should that fail, `nox -s live -- --clean` takes it out. At the end it prints a report to
paste into a bug report: what the server is like and how long a tap took, no names, no secrets. What
was made here is known by its name: one that is there before is a reason not to begin.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path += [str(TESTS.parent), str(TESTS / "support")]

import mailroom  # noqa: I001  (its import is the monkey patch)

import argparse
import platform
import signal
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import gevent

import live_tools as tools
from mailroom import MailroomError
from live_tools import ADDRESS, FEED, GROUP, JAIL, JMAP, JSON, PREFIX, SCREENER, LiveError

UID = str(uuid.uuid5(uuid.NAMESPACE_URL, f"mailto:{ADDRESS}?mailroom=0"))  # that Mailroom sends
STREAM_SECONDS, LOOK = 10, 0.2
PASSES = 6  # over what there is to take out; the last one has to find nothing
PLAN = f"""This makes mailboxes, labels and contact groups called "{PREFIX}..." in your
account, and two messages and a contact of {ADDRESS}. Mailroom runs with
these alone. It takes a few minutes, and all of it is taken out again; Ctrl-C: at once."""
REPORT = "\n----- to paste into a bug report; there is no secret in it -----"


class Live:
    """The test on an account; `facts` are for the report."""

    def __init__(self, jmap: JMAP, options: argparse.Namespace, home: Path) -> None:
        self.jmap, self.patience, self.messages = jmap, options.patience, list[str]()
        self.mailroom = tools.Mailroom(options.program, home)
        core, primary = jmap.client.session_capabilities, jmap.session["primaryAccounts"]
        offers = (urn.removeprefix("urn:ietf:params:jmap:") for urn in sorted(core))
        numbers = {k: v for k, v in core[mailroom.CORE].items() if isinstance(v, int)}
        self.facts = {
            "with": f"{self.mailroom.command('--version')[0]}, Python {platform.python_version()}",
            "offers": f"{', '.join(offers)}; accounts: {len({*primary.values()})}",
            "limits": ", ".join(f"{name} {value}" for name, value in numbers.items()),
            "contacts": "over JMAP" if jmap.has_cards else "over CardDAV",
        }

    def wait(self, what: str, condition: Callable[[], object], seconds: float = 0) -> None:
        deadline = time.monotonic() + (seconds or self.patience)
        while not condition():
            self.mailroom.check()
            if time.monotonic() > deadline:
                raise LiveError(f"waited in vain for {what}")
            gevent.sleep(LOOK)

    def run(self) -> None:
        """The whole story. Raises LiveError where it does not go as it should."""
        say("making what Mailroom needs")
        self.mailroom.command("setup", "--apply")
        boxes = self.jmap.boxes()
        self.messages = [self.jmap.put(f"{PREFIX}{n}", boxes[SCREENER]) for n in (1, 2)]
        self.mailroom.serve()
        self.wait("the first cycle", lambda: self.mailroom.logged("cycle done"))
        for key, value in (("from", ADDRESS), ("header", ["From", ADDRESS])):
            try:
                found = self.jmap.call("Email/query", filter={key: value})["ids"]
                self.facts[f"by {key}"] = f"finds {len(found)} of {len(self.messages)} messages"
            except MailroomError as error:
                self.facts[f"by {key}"] = str(error)
        connected = partial(self.mailroom.logged, "event stream: connected")
        with suppress(MailroomError):  # not every server has it
            self.wait("push", connected, STREAM_SECONDS)
        self.tap("tap", boxes[tools.TO_FEED], boxes[FEED], "created", {FEED, GROUP})
        self.tap("re-triage", boxes[tools.TO_JAIL], boxes[JAIL], "known", {JAIL, GROUP})
        self.tap("undo", boxes[tools.UNDO], boxes[SCREENER], "deleted", set())

    def tap(self, what: str, label: str, box: str, contact: str, groups: set[str]) -> None:
        """Put a label on one message; both have to be filed. `contact`: what is said of it."""
        say(what)
        begun, before = time.monotonic(), len(self.mailroom.logged("cycle done"))
        asked = self.mailroom.requests()
        self.jmap.call("Email/set", update={self.messages[0]: {f"mailboxIds/{label}": True}})
        self.wait(f"the messages to be filed ({what})", lambda: self.places() == [{box: True}] * 2)
        seconds = time.monotonic() - begun
        self.wait("the cycle to end", lambda: len(self.mailroom.logged("cycle done")) > before)
        cycles = self.mailroom.logged("cycle done")[before:]
        triggers = ", ".join(str(cycle["trigger"]) for cycle in cycles)
        done = "sender triaged" if groups else "triage undone"
        told = self.mailroom.logged(done)[-1].get("contact")
        took = f"{seconds:.1f} s; {self.mailroom.requests() - asked} requests"
        self.facts[what] = f"{took}; cycles: {triggers}; contact: {told}"
        if told != contact:
            raise LiveError(f"{what}: the contact is {told}, not {contact}; look for {ADDRESS}")
        if self.jmap.has_cards:
            self.check(groups)

    def check(self, groups: set[str]) -> None:
        """Raises LiveError unless the contact is in these groups, and in none else."""
        cards = self.jmap.cards()
        people = [card for card in cards if not tools.name_of(card)]
        members = {tools.name_of(card): [*(card.get("members") or {})] for card in cards}
        uids = [card["uid"] for card in people]
        if {n: m for n, m in members.items() if n and m} != dict.fromkeys(groups, uids):
            raise LiveError(f"contacts {uids}, but groups {members}")
        for card in people:
            sent = "as sent" if uids == [UID] else f"not as sent: {uids} for {UID}"
            has = ", ".join(sorted(card))
            self.facts["contact"] = f"uid {sent}, members the same; it has {has}"

    def places(self) -> list[JSON]:
        found = self.jmap.call("Email/get", ids=self.messages, properties=["mailboxIds"])["list"]
        return [mail["mailboxIds"] for mail in found]

    def clean(self) -> str:
        """Take out all that was made; what is left, empty if nothing is."""
        say("taking everything out again")
        self.mailroom.stop()
        left = ""
        for n in range(PASSES):
            try:
                if not (left := "; ".join(self.take_out())):
                    return ""
            except (MailroomError, KeyboardInterrupt) as error:
                left = str(error) or left
            gevent.sleep(n * n)
        return left

    def take_out(self) -> list[str]:
        """One pass; what it still found. `reset` would also delete contacts of the user's own
        Mailroom that are in no group, so it is let go on only where it speaks of nothing else."""
        found, boxes = self.mailroom.present(), self.jmap.boxes()
        if SCREENER in boxes:
            lines = self.mailroom.command("reset")
            steps = [line for line in lines if line.startswith(("delete ", "empty "))]
            if all(f'"{PREFIX}' in line for line in steps):
                self.mailroom.command("reset", "--apply", "--yes")
        if cards := [card["id"] for card in self.jmap.cards()]:
            found.append("contacts")
            self.jmap.call("ContactCard/set", destroy=cards)
        if boxes:
            where = {"operator": "OR", "conditions": [{"inMailbox": box} for box in boxes.values()]}
            ids = self.jmap.call("Email/query", filter=where)["ids"]
            mails = self.jmap.call("Email/get", ids=ids, properties=["from"])["list"]
            own = [m["id"] for m in mails if [one["email"] for one in m["from"] or ()] == [ADDRESS]]
            self.jmap.call("Email/set", destroy=own)
            self.jmap.call("Mailbox/set", destroy=[*boxes.values()])
        return found


def say(text: str) -> None:
    print(f"{text} ...", flush=True)


def perform(live: Live, seconds: float) -> int:
    """The test, cleaning up, and the report; the exit status. `seconds`: to listen for."""
    status, result, begun, here = 0, "all as it should be", time.monotonic(), gevent.getcurrent()
    is_interruptible = True

    def stop() -> None:
        if is_interruptible:
            gevent.kill(here, KeyboardInterrupt)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        gevent.signal_handler(number, stop)
    listener = gevent.spawn((stream := tools.Stream(live.jmap)).run)
    try:
        live.run()
    except (MailroomError, KeyboardInterrupt) as error:
        status, result = (1, str(error)) if str(error) else (130, "interrupted")
    finally:
        is_interruptible = False
        left = live.clean()
    if not status:
        is_interruptible = True
        say("listening to the event stream (Ctrl-C: enough)")
        with suppress(KeyboardInterrupt):
            gevent.sleep(max(0, begun + seconds - time.monotonic()))
    listener.kill()
    facts = {"result": result, "left": left or "nothing"} | live.facts | stream.report()
    lines = [f"{key:10} {value}" for key, value in facts.items()]
    print(live.jmap.redact("\n".join([REPORT, *lines, *live.mailroom.complaints()])))
    return status or int(bool(left))


def main() -> int:
    """Run the test; the exit status: 0 well, 1 not, 2 nothing was begun, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Try Mailroom on your account.")
    parser.add_argument("--yes", action="store_true", help="do it without asking")
    parser.add_argument("--clean", action="store_true", help="only take out what was left behind")
    parser.add_argument("--program", default=TESTS.parent / "mailroom.py", help="in its place")
    parser.add_argument("--patience", type=float, default=180, help="seconds to wait for a tap")
    parser.add_argument("--listen", type=float, default=60, help="seconds for the event stream")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        try:
            live = Live(JMAP(mailroom.MailroomSettings()), options, Path(home))
            if options.clean:
                left = live.clean()
                print(left or "There is nothing left.")
                return int(bool(left))
            if there := live.mailroom.present():
                raise LiveError(f"{'; '.join(there)}: from before? --clean takes it out")
            print(PLAN)
            if not options.yes and (not sys.stdin.isatty() or input('Type "yes": ') != "yes"):
                raise LiveError("nothing has been done; --yes does it without asking")
        except (MailroomError, EOFError, KeyboardInterrupt) as error:
            print(f"live: {error}", file=sys.stderr)
            return 2
        return perform(live, options.listen)


if __name__ == "__main__":
    sys.exit(main())
