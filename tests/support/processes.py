"""The program as a user starts it, and what can be seen of it from outside."""

import mailroom  # noqa: F401, I001  (its import is the monkey patch)

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gevent
import requests
from tools import PROGRAM, started

DEADLINE, STEP, STOP_SECONDS = 30.0, 0.05, 5.0


def wait_for(
    condition: Callable[[], object], what: Callable[[], object] = str, seconds: float = DEADLINE
) -> None:
    """Poll until it holds; `what` is shown when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not after {seconds} s: {what()}"
        time.sleep(STEP)


class Program:
    """A running `python mailroom.py` and what it logs."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path, health_port: int) -> None:
        self.process, self.output, self.health_port = process, output, health_port

    @property
    def log(self) -> list[dict[str, Any]]:
        """What was logged; each record is a whole line."""
        text = self.output.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def logged(self, pattern: str, level: str = "") -> list[dict[str, Any]]:
        lines = (line for line in self.log if level in ("", line["level"]))
        return [line for line in lines if re.search(pattern, line["event"])]

    def wait_for_cycles(self, more: int) -> None:
        goal = len(self.logged("^cycle done$")) + more
        wait_for(lambda: len(self.logged("^cycle done$")) >= goal, self.output.read_text)

    @property
    def health(self) -> dict[str, Any]:
        """The health page, for which no proxy is asked."""
        url, direct = f"http://127.0.0.1:{self.health_port}/healthz", {"http": ""}
        return dict(requests.get(url, timeout=5, proxies=direct).json())

    def is_pushed(self, reconnects: int = 0) -> bool:
        """Whether there is a stream, and so often a new one."""
        with suppress(requests.ConnectionError):  # there is no page yet
            stream = self.health["eventsource"]
            return bool(stream["connected_since"]) and stream["reconnect_count"] >= reconnects
        return False

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)


@contextmanager
def talking(*command: object, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A Python program with its output and errors in one pipe; gone at the end in any case."""
    words, pipe = [sys.executable, *map(str, command)], subprocess.PIPE
    named: Any = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env={**os.environ, **environment}, **named) as process:
        try:
            with gevent.Timeout(90, AssertionError(f"{command} was not done in time")):
                yield process
        finally:
            process.kill()


@contextmanager
def program(
    output: Path, *arguments: str, path: object = PROGRAM, **settings: object
) -> Iterator[Program]:
    """The program as a user starts it; it is killed at the end if it has not ended."""
    with started(output, path, *arguments, **settings) as process:
        yield Program(process, output, int(str(settings["health_port"])))
