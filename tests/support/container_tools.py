"""What the tests of the container stand on. `MAKE_BASE=1` has the base image made of Debian's
packages; `PYTHON_IMAGE` names another one. Containers and secrets have names of their own, and are
gone after each test; images stay.
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

import tools
from debian_root import make_root
from jmap_server import JSON, JMAPServer, Options
from ports import free_port

ROOT = tools.PROGRAM.parent
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


def call(*command: object, said: str | None = None) -> "subprocess.CompletedProcess[str]":
    """A finished command, whatever its status; `said` is its standard input."""
    named: Any = {"input": said, "text": True, "timeout": COMMAND_SECONDS}
    return subprocess.run([*map(str, command)], capture_output=True, **named)


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


def make_image(name: str, directory: Path, packages: str, hooks: Iterable[str] = ()) -> str:
    """An image of Debian's packages, those of the release that the public base is made of."""
    archive = directory / "image.tar"
    options = [f"--customize-hook={hook}" for hook in hooks]
    make_root(archive, "essential", packages, *options, temporary=Path("/dev/shm"))  # noqa: S108
    podman("import", "--change", f"ENV PATH={SEARCHED}", archive, name)
    archive.unlink()
    return name


def make_base(directory: Path) -> str:
    """A base image like Python's public one; a newer podman is left unpacked in the directory."""
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


def build(base: str, tag: str, context: Path = ROOT, *options: object) -> str:
    """Build the image as the README has it, but for the base; its name."""
    given = ["--network=host", "--timestamp=0", "--build-arg", f"PYTHON_IMAGE={base}", *options]
    podman("build", "--format=docker", *given, "-f", context / "Containerfile", "-t", tag, context)
    return tag


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


def readme_options() -> tuple[list[str], str]:
    """The options by which the README shuts a container in, and by which it is started again."""
    lines = [line.strip(" `") for line in (ROOT / "README.md").read_text().splitlines()]
    [line] = [line for line in lines if line.startswith("podman run -d")]
    words = shlex.split(line)
    [restart] = [word for word in words if "--restart" in word]
    return words[words.index("--read-only") : words.index("--secret")], restart


def run(*words: object) -> "subprocess.CompletedProcess[str]":
    """A container, shut in like that and without a network, that has ended by itself."""
    return call("podman", "run", "--rm", "--network=none", *readme_options()[0], *words)


def settings_of(server: JMAPServer, **settings: object) -> dict[str, str]:
    """Settings for a container on the host's network, as environment variables."""
    given = {"jmap_url": server.session_url, "health_port": free_port(), "poll_interval": 2}
    return tools.variables_of(given | {"debounce_seconds": 0.05} | settings)


@dataclass
class Container:
    name: str

    @property
    def log(self) -> list[str]:
        done = call("podman", "logs", self.name)
        return (done.stdout + done.stderr).splitlines()

    @property
    def state(self) -> JSON:
        return dict(inspected("container", self.name)["State"])

    def check(self, server: JMAPServer, user: int) -> None:
        """It works, is healthy, is Python run by nobody in particular, and can write nowhere."""
        tap(server)
        assert self.health() == 0
        assert json.loads(podman("exec", self.name, "python", "-c", CONFINEMENT)) == {
            "program": "python",
            "user": user,
            "capabilities": [0, 0, 0],
            "no new privileges": 1,
            "writable": [],
        }

    def health(self) -> int:
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
    """A container, shut in as the README has it, with the server's or another token in a secret."""
    name = unique_name()
    given = [f"-e={name}={value}" for name, value in settings_of(server, **settings).items()]
    given += ["-e=MAILROOM_JMAP_TOKEN_FILE=/token", f"--secret={name},target=/token", *options]
    with podman_secret(name, token or server.options.token), removed(name) as container:
        words = ["run", "-d", f"--name={name}", "--pull=never", network, *readme_options()[0]]
        podman(*words, *given, IMAGE, *arguments)
        yield container


def tap(server: JMAPServer, seconds: float = 30) -> None:
    tools.wait_filed(server, tools.tap(server, "Bob <bob@shop.example>"), seconds)


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
    assert {r.headers.get("authorization") for r in server.requests} == {f"Bearer token-of-{name}"}


@contextmanager
def kube_secret(name: str, token: str) -> Iterator[None]:
    """A Secret as it is in its file, or for a podman before 4.4 as that reads it: undecoded."""
    version = podman("version", "-f", "{{.Client.Version}}").split(".")
    document = (DEPLOY / "mailroom.secret.yaml").read_text().replace("mailroom-alice", name)
    play, said = ["kube", "play", "-"], document.replace("fmu1-...", token)
    if (int(version[0]), int(version[1])) < (4, 4):
        play, said = ["secret", "create", name, "-"], json.dumps({"data": {"token": token}})
    podman(*play, said=said)
    try:
        yield
    finally:
        podman("secret", "rm", name)


def quadlet(workshop: Path) -> Path:
    """The generator of this machine's podman, or else of the newer one that came with the base."""
    for place in (Path("/"), workshop):
        if (generator := place / "usr/libexec/podman/quadlet").exists():
            return generator
    raise AssertionError("no quadlet: have podman 4.4 or newer, or MAKE_BASE=1")


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
        lines = "\n".join(f"{name}={value}" for name, value in settings.items())
        self.sh(f"echo '{token}' > /etc/mailroom/{account}.token; chmod 600 /etc/mailroom/*")
        self.sh(f"echo '{lines}' > /etc/mailroom/{account}.env")

    def shows(self, account: str) -> dict[str, str]:
        lines = self.sh(f"systemctl show mailroom@{account}").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def ready(self) -> bool:
        """Whether all that is started at boot was started, well or not."""
        done = call("podman", "exec", self.name, "systemctl", "is-system-running")
        return done.stdout.strip() in {"running", "degraded"}


@contextmanager
def systemd(image: str) -> Iterator[Systemd]:
    """systemd in a container that may do everything; a unit that has failed waits for seconds."""
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
