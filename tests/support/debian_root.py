"""Root file systems of Debian's packages, made by mmdebstrap as root. Which mirror they come from,
and the way there (proxies, certificates), is for apt to say, which reads both formats of sources.
"""

import os
import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

# What apt has to be told again: the way to the mirror, and that one of the past is good enough.
PASSED_ON = re.compile(r"^Acquire::(?:https?|Check-Valid-Until|Check-Date)\b.*;$", re.M)


class BootstrapError(RuntimeError):
    """There is no mmdebstrap, no mirror, or no root file system at the end of it."""


def make_root(
    target: Path,
    variant: str,
    packages: str,
    *options: str,
    suites: Collection[str] = ("trixie",),
    temporary: Path | None = None,
) -> None:
    """Make a directory, or an archive by way of a `temporary` one, of these packages and those that
    they need. The first suite is the one that the rest of the system comes from."""
    # The machine's Debian mirror, and no other source that it may have.
    of = ("Created-By: Packages", "Label: Debian", "Component: main")
    found = _run("apt-get", "indextargets", "--format", "$(REPO_URI)", *of).split()
    if not found:
        raise BootstrapError("apt knows of no Debian mirror. As root: apt-get update")
    _run(
        *("mmdebstrap", f"--variant={variant}", f"--include={packages}"),
        *(f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("man", "doc", "locale")),
        *(f"--aptopt={line}" for line in PASSED_ON.findall(_run("apt-config", "dump"))),
        *(*options, next(iter(suites)), str(target)),
        *(f"deb {found[0]} {suite} main" for suite in suites),
        **({"TMPDIR": str(temporary)} if temporary else {}),
    )


def _run(*command: str, **environment: str) -> str:
    """Return what a command prints that must succeed."""
    given: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, env=os.environ | environment, timeout=600, **given)
    except FileNotFoundError as error:
        missing = f"{error.filename} is missing; it takes a Debian."
        raise BootstrapError(f"{missing} As root: apt-get install mmdebstrap") from None
    if done.returncode:
        status = f"{command[0]} ended with status {done.returncode}"
        raise BootstrapError(f"{status}:\n{done.stderr[-4000:]}")
    return str(done.stdout)
