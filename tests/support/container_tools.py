"""What the tests of the container stand on: podman, a base image where no registry can be reached,
and the README's own command as the way containers are started.

`MAKE_BASE=1` has the base image made of Debian's packages; `PYTHON_IMAGE` names another one.
Containers and secrets have names of their own, and are gone after each test; images stay.
"""

import io
import itertools
import json
import os
import re
import shlex
import ssl
import subprocess
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from debian_root import make_root
from jmap_server import JSON, JMAPServer, Options
from ports import free_port

import mailroom

ROOT = Path(mailroom.__file__).parent
DEPLOY = ROOT / "tests" / "deploy"
IMAGE = "localhost/mailroom:test"
SEARCHED = "/opt/venv/bin:/usr/bin:/bin"
COMMAND_SECONDS, STOP_SECONDS = 300.0, 5.0
NUMBERS = itertools.count()
CONFINEMENT = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/1/status").read().splitlines())
places = ["/", "/app", "/app/mailroom.py", "/etc", "/etc/passwd", "/usr", "/var", "/home"]
print(json.dumps({
    "program": os.path.basename(os.readlink("/proc/1/exe")).rstrip(".0123456789"),
    "user": os.getuid(),
    "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")],
    "no new privileges": int(status["NoNewPrivs"]),
    "writable": [place for place in places if os.access(place, os.W_OK)],
}))
"""


# Commands


def call(*command: object, said: str | None = None) -> "subprocess.CompletedProcess[str]":
    """A finished command, whatever its status; `said` is its standard input."""
    words = [str(word) for word in command]
    return subprocess.run(
        words, input=said, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )


def do(*command: object, said: str | None = None) -> str:
    """What a command that must succeed prints."""
    done = call(*command, said=said)
    assert not done.returncode, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def podman(*words: object, said: str | None = None) -> str:
    return do("podman", *words, said=said)


def unique_name() -> str:
    """Good for a container, a secret, a pod and an instance of a unit."""
    return f"test{os.getpid()}n{next(NUMBERS)}"


# Images


def make_image(name: str, directory: Path, packages: str, hooks: Iterable[str] = ()) -> str:
    """An image of Debian's packages, those of the release that the public base is made of."""
    archive = directory / "image.tar"
    options = [f"--customize-hook={hook}" for hook in hooks]
    make_root(archive, "essential", packages, *options, temporary=Path("/dev/shm"))  # noqa: S108
    podman("import", "--change", f"ENV PATH={SEARCHED}", archive, name)
    archive.unlink()
    return name


def make_base(directory: Path) -> str:
    """A base image like Python's public one; its name. Podman's package of the same Debian is left
    in the directory, unpacked."""
    where = "/usr/local/share/ca-certificates"
    certificates = [str(path) for path in Path(where).glob("*.crt")]
    hooks = [
        *([f"copy-in {' '.join(certificates)} {where}"] if certificates else []),
        'chroot "$1" update-ca-certificates >&2',
        'chroot "$1" python3 -m venv /opt/venv',
        f'cd {directory} && env APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get download podman',
        f"dpkg-deb -x {directory}/podman_*.deb {directory}",
    ]
    packages = "python3-minimal,python3-venv,passwd,ca-certificates,libstdc++6"
    return make_image("localhost/mailroom-python:made", directory, packages, hooks)


def make_systemd(directory: Path) -> str:
    """An image with systemd, and what Python and its packages need; its name."""
    packages = "systemd,python3,ca-certificates,libstdc++6"
    return make_image("localhost/mailroom-systemd:made", directory, packages)


def build(base: str, tag: str, context: Path = ROOT, *options: object) -> str:
    """Build the image as the README has it, but for the base; its name."""
    given = ["--network=host", "--timestamp=0", "--build-arg", f"PYTHON_IMAGE={base}", *options]
    podman("build", "--format=docker", *given, "-f", context / "Containerfile", "-t", tag, context)
    return tag


def public_base() -> str:
    """The base image that the Containerfile names."""
    [name] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)", (ROOT / "Containerfile").read_text(), re.M)
    return str(name)


def littered(directory: Path, litter: Iterable[str]) -> None:
    """A copy of what the image is made of, with other modes and times, among other files."""
    for name in litter:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("fmu1-secret")
    for name in ("Containerfile", ".containerignore", "mailroom.py", "requirements.txt"):
        (directory / name).write_bytes((ROOT / name).read_bytes())
        (directory / name).chmod(0o600)


def contents(image: str, directory: Path, below: int) -> list[tarfile.TarInfo]:
    """What the image's layers hold, but for the lowest ones."""
    podman("save", "-o", directory / "image.tar", image)
    found: list[tarfile.TarInfo] = []
    with tarfile.open(directory / "image.tar") as archive:
        manifest = json.load(archive.extractfile("manifest.json") or io.BytesIO())
        for layer in manifest[0]["Layers"][below:]:
            with tarfile.open(fileobj=archive.extractfile(layer)) as files:
                found += files.getmembers()
    (directory / "image.tar").unlink()
    return found


def inspected(kind: str, name: str) -> JSON:
    return dict(json.loads(podman(kind, "inspect", name))[0])


# The README


def readme_command(start: str) -> list[str]:
    """The words of the command in the README that begins like this."""
    lines = [line.strip(" `") for line in (ROOT / "README.md").read_text().splitlines()]
    [line] = [line for line in lines if line.startswith(start)]
    return shlex.split(line)


def hardened() -> list[str]:
    """The options by which the README shuts the container in."""
    words = readme_command("podman run -d")
    return words[words.index("--read-only") : words.index("--secret")]


def readme_restart() -> str:
    """The option by which the README has a container started again."""
    [option] = [word for word in readme_command("podman run -d") if "--restart" in word]
    return option


def run(*words: object) -> "subprocess.CompletedProcess[str]":
    """A container, shut in like that and without a network, that has ended by itself."""
    return call("podman", "run", "--rm", "--network=none", *hardened(), *words)


def python(code: str) -> "subprocess.CompletedProcess[str]":
    """What came of Python code in the image."""
    return run("--entrypoint=python", IMAGE, "-c", code)


# Containers


def settings_of(server: JMAPServer, **settings: object) -> dict[str, str]:
    """Settings for a container on the host's network, as environment variables."""
    given = {"jmap_url": server.session_url, "health_port": free_port(), "poll_interval": 2}
    given |= {"debounce_seconds": 0.05, **settings}
    return {f"MAILROOM_{name.upper()}": str(value) for name, value in given.items()}


@dataclass
class Container:
    """A container that runs, or has run."""

    name: str

    @property
    def log(self) -> list[str]:
        done = call("podman", "logs", self.name)
        return (done.stdout + done.stderr).splitlines()

    @property
    def state(self) -> JSON:
        return dict(inspected("container", self.name)["State"])

    @property
    def runs(self) -> bool:
        return bool(self.state["Running"])

    def check_confinement(self, user: int) -> None:
        """The program is Python, nobody in particular, and can write nowhere."""
        assert json.loads(podman("exec", self.name, "python", "-c", CONFINEMENT)) == {
            "program": "python",
            "user": user,
            "capabilities": [0, 0, 0],
            "no new privileges": 1,
            "writable": [],
        }

    def health(self) -> int:
        """The status of the health check: 0 is healthy."""
        return call("podman", "healthcheck", "run", self.name).returncode

    def strike(self, name: str) -> None:
        """Send the program a signal from outside, which the engine knows nothing of."""
        unshare = [] if os.getuid() == 0 else ["podman", "unshare"]
        do(*unshare, "kill", f"-{name}", self.state["Pid"])

    def stop(self) -> None:
        """It stops in time and in order."""
        begun = time.monotonic()
        podman("stop", self.name)
        assert (self.state["ExitCode"], time.monotonic() - begun < STOP_SECONDS) == (0, True)


@contextmanager
def podman_secret(name: str, text: str) -> Iterator[None]:
    podman("secret", "create", name, "-", said=text)
    try:
        yield
    finally:
        podman("secret", "rm", name)


@contextmanager
def removed(name: str) -> Iterator[Container]:
    """A container of this name, which is shown and removed at the end if there is one."""
    container = Container(name)
    try:
        yield container
    finally:
        print(name, *container.log, sep="\n")
        call("podman", "rm", "-f", name)


@contextmanager
def started(
    server: JMAPServer,
    *options: str,
    token: str = "",
    network: str = "--network=host",
    arguments: Iterable[str] = (),
    **settings: object,
) -> Iterator[Container]:
    """A container, shut in as the README has it, with a token in a secret: the server's own, if no
    other is given."""
    name = unique_name()
    given = [f"-e={name}={value}" for name, value in settings_of(server, **settings).items()]
    given += ["-e=MAILROOM_JMAP_TOKEN_FILE=/token", f"--secret={name},target=/token", *options]
    with podman_secret(name, token or server.options.token), removed(name) as container:
        words = ["run", "-d", f"--name={name}", "--pull=never", network, *hardened()]
        podman(*words, *given, IMAGE, *arguments)
        yield container


def tap(server: JMAPServer, seconds: float = 30) -> None:
    """A phone labels a mail in the Screener, and Mailroom does its work."""
    mail = server.account.deliver("Bob <bob@shop.example>", ["Screener"])
    server.account.label(mail, "@ToFeed")
    server.wait_for(lambda: server.account.mailboxes_of(mail) == {"Feed"}, seconds)


def certificate(directory: Path, address: str) -> ssl.SSLContext:
    """What a server at this address needs for TLS; its certificate is in ca.pem."""
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=mail", "-addext", f"subjectAltName=IP:{address}"]
    files = {"-keyout": directory / "key.pem", "-out": directory / "ca.pem"}
    do(*make.split(), *names, *itertools.chain(*files.items()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["-out"], files["-keyout"])
    return context


@contextmanager
def two_accounts(**named: Any) -> Iterator[dict[str, JMAPServer]]:
    """The servers of two people, each with a token."""
    with ExitStack() as stack:
        options = {n: Options(token=f"token-of-{n}", relative_urls=True) for n in ("alice", "bob")}
        yield {
            name: stack.enter_context(JMAPServer.with_mailroom_account(chosen, **named))
            for name, chosen in options.items()
        }


def check_own(name: str, server: JMAPServer) -> None:
    """A tap is carried out, with this person's token and no other."""
    tap(server)
    shown = {request.headers.get("authorization") for request in server.requests}
    assert shown == {f"Bearer token-of-{name}"}


# Units and YAML


@contextmanager
def kube_secret(name: str, token: str) -> Iterator[None]:
    """A Secret as it is in its file, or for a podman before 4.4 as that reads it: undecoded."""
    version = podman("version", "-f", "{{.Client.Version}}")
    if tuple(map(int, version.split(".")[:2])) < (4, 4):
        with podman_secret(name, json.dumps({"data": {"token": token}})):
            yield
        return
    document = (DEPLOY / "mailroom.secret.yaml").read_text().replace("mailroom-alice", name)
    podman("kube", "play", "-", said=document.replace("fmu1-...", token))
    try:
        yield
    finally:
        podman("secret", "rm", name)


def quadlet(workshop: Path) -> Path:
    """The generator of this machine's podman, or else of the newer one that came with the base."""
    places = [Path("/usr/libexec/podman/quadlet"), workshop / "usr/libexec/podman/quadlet"]
    found = [place for place in places if place.exists()]
    assert found, "no quadlet: have podman 4.4 or newer, or MAKE_BASE=1"
    return found[0]


def verify(unit: Path) -> None:
    """systemd has nothing to say about the unit, which neither stays dead nor hammers."""
    done = call("systemd-analyze", "verify", "--man=no", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lines = {"Restart=always", "RestartSec=300", "StartLimitIntervalSec=0"}
    assert lines <= set(unit.read_text().splitlines())


def unit_command(unit: Path, instance: str, home: Path) -> list[str]:
    """The command with which systemd would start a generated unit, for a machine without it."""
    [line] = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.M)
    for specifier, value in {"%i": instance, "%N": unit.stem, "%t": home, "%h": home}.items():
        line = line.replace(specifier, str(value))
    words = [word for word in shlex.split(line) if word != "--cgroups=split"]
    assert "%" not in " ".join(words)
    return [*words[:2], "--network=host", *words[2:]]


@dataclass
class Systemd(Container):
    """A container in which systemd runs, with the program where the plain unit has it."""

    def sh(self, script: str) -> str:
        return podman("exec", self.name, "sh", "-c", script)

    def give(self, account: str, token: str, settings: dict[str, str]) -> None:
        """Write the files of an account."""
        lines = "\n".join(f"{name}={value}" for name, value in settings.items())
        self.sh(f"echo '{token}' > /etc/mailroom/{account}.token; chmod 600 /etc/mailroom/*")
        self.sh(f"echo '{lines}' > /etc/mailroom/{account}.env")

    def shows(self, account: str) -> dict[str, str]:
        """What systemd says of the account's unit."""
        lines = self.sh(f"systemctl show mailroom@{account}").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def ready(self) -> bool:
        """Whether all that is started at boot was started, well or not."""
        done = call("podman", "exec", self.name, "systemctl", "is-system-running")
        return done.stdout.strip() in {"running", "degraded"}


@contextmanager
def systemd(image: str) -> Iterator[Systemd]:
    """systemd as the first process of a container that may do everything. A unit that has failed
    waits for seconds in place of minutes."""
    with removed(unique_name()) as container:
        machine = Systemd(container.name)
        unit = DEPLOY / "mailroom@.service"
        podman(
            *("run", "-d", "--name", machine.name, "--network=host", "--pull=never"),
            *("--privileged", "--systemd=always", "--cgroupns=host", "--stop-timeout=0"),
            # This and the word after systemd: hosts that have control groups of both versions.
            *("-e", "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"),
            *("--mount", f"type=image,source={IMAGE},destination=/image"),
            *("-v", f"{unit}:/etc/systemd/system/{unit.name}:ro"),
            *(image, "/lib/systemd/systemd", "systemd.unified_cgroup_hierarchy=0"),
        )
        machine.sh("mkdir -p /opt/mailroom/.venv/bin /etc/mailroom")
        machine.sh("cp -r /image/app/. /opt/mailroom")
        machine.sh("ln -s /usr/bin/python3 /opt/mailroom/.venv/bin/python")
        machine.sh("mount --make-rshared /")  # as on a real machine; credentials need it
        hurried = f"/run/systemd/system/{unit.name}.d"
        lines = "[Service]\\nRestartSec=2\\n"
        machine.sh(f"mkdir -p {hurried}; printf '{lines}' > {hurried}/test.conf")
        try:
            yield machine
        finally:
            print(machine.sh("journalctl --no-pager --unit='mailroom@*'"))
