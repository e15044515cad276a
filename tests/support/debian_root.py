"""Root file systems of Debian's packages, made by mmdebstrap as root, from the mirror that this
machine's own packages come from.

Which mirror that is, and the way there (proxies, certificates), is for apt to say: nothing of it is
written here, and apt reads both formats of its sources.
"""

import os
import re
import subprocess
from collections.abc import Collection
from pathlib import Path

# What apt has to be told again: the way to the mirror, and that one of the past is good enough.
PASSED_ON = re.compile(r"^Acquire::(?:https?|Check-Valid-Until|Check-Date)\b.*;$", re.M)
UNREAD = ("man", "doc", "locale")
SECONDS = 600.0


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
    """Make a directory, or an archive by way of a temporary one, of these packages and those that
    they need. The first suite is the one that the rest of the system comes from."""
    mirror = _mirror()
    _run(
        *("mmdebstrap", f"--variant={variant}", f"--include={packages}"),
        *(f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in UNREAD),
        *(f"--aptopt={line}" for line in PASSED_ON.findall(_run("apt-config", "dump"))),
        *(*options, next(iter(suites)), str(target)),
        *(f"deb {mirror} {suite} main" for suite in suites),
        **({"TMPDIR": str(temporary)} if temporary else {}),
    )


def _mirror() -> str:
    """Return the URI of the machine's Debian mirror, and of no other source that it may have."""
    of = ("Created-By: Packages", "Label: Debian", "Component: main")
    found = _run("apt-get", "indextargets", "--format", "$(REPO_URI)", *of).split()
    if not found:
        raise BootstrapError("apt knows of no Debian mirror. As root: apt-get update")
    return found[0]


def _run(*command: str, **environment: str) -> str:
    """Return what a command prints that must succeed."""
    try:
        done = subprocess.run(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise BootstrapError(
            f"{error.filename} is missing; it takes a Debian. As root: apt-get install mmdebstrap"
        ) from None
    if done.returncode:
        raise BootstrapError(
            f"{command[0]} ended with status {done.returncode}:\n{done.stderr[-4000:]}"
        )
    return done.stdout
