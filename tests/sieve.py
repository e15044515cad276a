"""Sieve (RFC 5228) for tests: its grammar, what a server checks of a script before it takes it, and
an interpreter of the commands that Mailroom's scripts have.

    check_script(text, EXTENSIONS)                      # raises SieveError
    deliver(text, Sender(groups={"uid-of-feed"}))       # {"Feed"}
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# What Cyrus 3.6 offers, as far as the tests need it.
EXTENSIONS = ("fileinto", "copy", "mailboxid", "extlists", "variables", "vnd.cyrus.jmapquery")
# What has to be required, by the extension it comes from; the rest is in RFC 5228 itself.
EXTENSION_OF = {
    "fileinto": "fileinto",
    ":copy": "copy",
    ":mailboxid": "mailboxid",
    ":list": "extlists",
    "jmapquery": "vnd.cyrus.jmapquery",
}
COMMANDS = {"require", "if", "elsif", "else", "stop", "keep", "discard", "redirect", "fileinto"}
TESTS = {"address", "allof", "anyof", "exists", "false", "header", "not", "size", "true"}
TESTS |= {"jmapquery"}

TOKEN = re.compile(
    r"(?P<space>\s+|#[^\n]*|/\*.*?\*/)"
    r"|text:[ \t]*(?:\#[^\n]*)?\r?\n(?P<lines>.*?)(?<=\n)\.\r?\n"
    r'|"(?P<string>(?:[^"\\]|\\.)*)"'
    r"|(?P<word>:?[A-Za-z_]\w*)|(?P<number>\d+[KMGkmg]?)|(?P<mark>[][(){},;])",
    re.DOTALL,
)


class SieveError(Exception):
    """A script that a server does not take."""


class Word(str):
    """An identifier, a tag or a mark, as opposed to a string."""

    __slots__ = ()


@dataclass
class Node:
    """A command or a test: its name, its arguments, its tests and its block."""

    name: str
    arguments: list[Any] = field(default_factory=list)
    tests: list["Node"] = field(default_factory=list)
    block: list["Node"] | None = None

    def all(self) -> Iterator["Node"]:
        yield self
        for child in [*self.tests, *(self.block or ())]:
            yield from child.all()


def tokens(text: str) -> Iterator[str]:
    position = 0
    while position < len(text):
        found = TOKEN.match(text, position)
        if not found:
            raise SieveError(f"line {text.count(chr(10), 0, position) + 1}: no Sieve")
        position = found.end()
        if found["string"] is not None:
            yield re.sub(r"\\(.)", r"\1", found["string"], flags=re.DOTALL)
        elif found["lines"] is not None:
            yield re.sub(r"(?m)^\.\.", ".", found["lines"])
        elif not found["space"]:
            yield Word(found[0])


class Parser:
    """RFC 5228 section 8.2."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = [*tokens(text), Word("")]

    @property
    def next(self) -> str:
        return self.tokens[0]

    def is_next(self, *marks: str) -> bool:
        return isinstance(self.next, Word) and self.next in marks

    def take(self, *marks: str) -> str:
        if marks and not self.is_next(*marks):
            raise SieveError(f"{self.next!r} in place of {marks}")
        return self.tokens.pop(0)

    def commands(self, end: str) -> list[Node]:
        found = []
        while not self.is_next(end):
            node = self.node()
            if self.is_next("{"):
                self.take()
                node.block = self.commands("}")
                self.take("}")
            else:
                self.take(";")
            found.append(node)
        return found

    def node(self) -> Node:
        """An identifier with its arguments, then a test or a list of tests."""
        name = self.take()
        if not isinstance(name, Word) or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise SieveError(f"{name!r} is no command or test")
        node = Node(name.lower())
        while not isinstance(self.next, Word) or re.match(r"[:\d\[]", self.next):
            node.arguments.append(self.strings() if self.is_next("[") else self.take())
        if self.is_next("("):
            node.tests = [*self.listed("(", ")", self.node)]
        elif isinstance(self.next, Word) and re.match("[A-Za-z_]", self.next):
            node.tests = [self.node()]
        return node

    def strings(self) -> list[str]:
        return [*self.listed("[", "]", self.take)]

    def listed(self, start: str, end: str, item: Any) -> Iterator[Any]:
        self.take(start)
        yield item()
        while self.take(",", end) != end:
            yield item()


def parse(text: str) -> list[Node]:
    """The commands of a script. Raises SieveError."""
    return Parser(text).commands("")


def check_script(text: str, offered: Collection[str]) -> None:
    """Raises SieveError unless a server with these extensions takes the script: it is Sieve, what
    it requires is offered and comes first, and what it uses is required and known."""
    script = parse(text)
    required: set[str] = set()
    while script and script[0].name == "require":
        (names,) = script.pop(0).arguments
        required |= {names} if isinstance(names, str) else set(names)
    if missing := required - set(offered):
        raise SieveError(f"not offered: {', '.join(sorted(missing))}")
    for node in (each for command in script for each in command.all()):
        if node.name not in COMMANDS - {"require"} | TESTS:
            raise SieveError(f"unknown: {node.name}")
        tags = [argument for argument in node.arguments if isinstance(argument, Word)]
        for used in (node.name, *tags):
            if used in EXTENSION_OF and EXTENSION_OF[used] not in required:
                raise SieveError(f"{used} without {EXTENSION_OF[used]}")
        if node.name in ("if", "elsif", "not") and len(node.tests) != 1:
            raise SieveError(f"{node.name} with {len(node.tests)} tests")
        if node.name == "jmapquery" and not isinstance(json.loads(node.arguments[0]), dict):
            raise SieveError("jmapquery without a filter")


@dataclass(frozen=True)
class Sender:
    """Who a mail is from: the uids of the groups he is in, and whether he is in any contact."""

    groups: Collection[str] = ()
    is_contact: bool = True


class Delivery:
    """What a script does to one mail (RFC 5228 section 2.10). `as_cyrus`: a mailbox that comes
    again counts only as it comes last, as Cyrus 3.6 has it."""

    def __init__(self, sender: Sender, names: Mapping[str, str], as_cyrus: bool) -> None:
        self.sender, self.names, self.as_cyrus = sender, names, as_cyrus
        self.filed: dict[str, bool] = {}  # {mailbox: whether with :copy}
        self.kept = True

    @property
    def mailboxes(self) -> set[str]:
        kept = all(self.filed.values()) if self.as_cyrus else self.kept
        return {*self.filed, *(["Inbox"] if kept else [])}

    def run(self, commands: list[Node]) -> None:
        taken = True
        for command in commands:
            if command.name == "if" or (command.name == "else" and not taken):
                taken = all(map(self.holds, command.tests))
                if taken:
                    self.run(command.block or [])
            elif command.name == "fileinto":
                self.file(command.arguments)
            else:
                assert command.name in ("require", "else"), command.name

    def file(self, arguments: list[Any]) -> None:
        *tags, mailbox = arguments
        if ":mailboxid" in tags:
            mailbox = self.names.get(tags[tags.index(":mailboxid") + 1], mailbox)
        self.filed[mailbox] = ":copy" in tags
        self.kept &= ":copy" in tags

    def holds(self, test: Node) -> bool:
        if test.name == "jmapquery":
            return self.matches(json.loads(test.arguments[0]))
        if test.name == "address":
            assert test.arguments == [":list", "from", ":addrbook:default"]
            return self.sender.is_contact
        results = [self.holds(each) for each in test.tests]
        return {"allof": all(results), "anyof": any(results), "not": not results[0]}[test.name]

    def matches(self, where: dict[str, Any]) -> bool:
        """A filter of Email/query (RFC 8621 section 4.4.1), with what Cyrus has of its own."""
        if "operator" in where:
            results = [self.matches(each) for each in where["conditions"]]
            answers = {"AND": all(results), "OR": any(results), "NOT": not any(results)}
            return answers[where["operator"]]
        ((name, value),) = where.items()
        if name == "fromAnyContact":
            return self.sender.is_contact
        assert name in ("fromContactCardUid", "fromContactGroupId"), name
        return value in self.sender.groups


def deliver(
    text: str, sender: Sender, names: Mapping[str, str] | None = None, *, as_cyrus: bool = False
) -> set[str]:
    """The mailboxes a mail gets into. `names`: {mailbox id: its name}."""
    delivery = Delivery(sender, names or {}, as_cyrus)
    delivery.run(parse(text))
    return delivery.mailboxes
