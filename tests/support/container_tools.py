"""What the tests of the container stand on: podman (or docker, if there is no podman), a base image
where no registry can be reached, and the README's own command as the way containers are started.

`MAKE_BASE=1` has the base image made of Debian's packages; `PYTHON_IMAGE` names another one.
Containers and secrets have names of their own, and are gone after each test; images stay.
"""

import io
import itertools
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from debian_root import make_root
from jmap_server import JSON, JMAPServer
from ports import free_port

import mailroom

ROOT = Path(mailroom.__file__).parent
DEPLOY = ROOT / "tests" / "deploy"
ENGINE = "podman" if shutil.which("podman") else "docker"
IMAGE = "localhost/mailroom:test"
SEARCHED = "/opt/venv/bin:/usr/bin:/bin"
COMMAND_SECONDS = 300.0
NUMBERS = itertools.count()


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


def engine(*words: object, said: str | None = None) -> str:
    return do(ENGINE, *words, said=said)


def podman_version() -> tuple[int, ...]:
    version = engine("version", "-f", "{{.Client.Version}}")
    return tuple(int(part) for part in version.split(".")[:2])


def unique_name() -> str:
    """Good for a container, a secret, a pod and an instance of a unit."""
    return f"test{os.getpid()}n{next(NUMBERS)}"


# Images


def make_image(name: str, directory: Path, packages: str, hooks: Iterable[str] = ()) -> str:
    """An image of Debian's packages, those of the release that the public base is made of."""
    archive = directory / "image.tar"
    options = [f"--customize-hook={hook}" for hook in hooks]
    make_root(archive, "essential", packages, *options, temporary=Path("/dev/shm"))  # noqa: S108
    engine("import", "--change", f"ENV PATH={SEARCHED}", archive, name)
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
    native = ["--format=docker", "--timestamp=0"] if ENGINE == "podman" else []
    given = ["--network=host", "--build-arg", f"PYTHON_IMAGE={base}", *options]
    engine("build", *native, *given, "-f", context / "Containerfile", "-t", tag, context)
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
    engine("save", "-o", directory / "image.tar", image)
    found: list[tarfile.TarInfo] = []
    with tarfile.open(directory / "image.tar") as archive:
        manifest = json.load(archive.extractfile("manifest.json") or io.BytesIO())
        for layer in manifest[0]["Layers"][below:]:
            with tarfile.open(fileobj=archive.extractfile(layer)) as files:
                found += files.getmembers()
    (directory / "image.tar").unlink()
    return found


def inspected(kind: str, name: str) -> JSON:
    return dict(json.loads(engine(kind, "inspect", name))[0])


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


# Containers


def settings_of(server: JMAPServer, **settings: object) -> dict[str, str]:
    """Settings for a container on the host's network, as environment variables."""
    given = {"jmap_url": server.session_url, "health_port": free_port(), "poll_interval": 2}
    given |= {"debounce_seconds": 0.05, **settings}
    return {f"MAILROOM_{name.upper()}": str(value) for name, value in given.items()}


def options_of(settings: dict[str, str]) -> list[str]:
    return [word for name, value in settings.items() for word in ("-e", f"{name}={value}")]


@dataclass
class Container:
    """A container that runs, or has run."""

    name: str

    @property
    def log(self) -> list[str]:
        done = call(ENGINE, "logs", self.name)
        return (done.stdout + done.stderr).splitlines()

    @property
    def state(self) -> JSON:
        return dict(inspected("container", self.name)["State"])

    @property
    def runs(self) -> bool:
        return bool(self.state["Running"])

    def run(self, code: str) -> str:
        """What Python code prints that runs in the container."""
        return engine("exec", self.name, "python", "-c", code)

    def health(self) -> int:
        """The status of the health check: 0 is healthy."""
        if ENGINE == "podman":
            return call("podman", "healthcheck", "run", self.name).returncode
        check = inspected("container", self.name)["Config"]["Healthcheck"]["Test"][1:]
        return call("docker", "exec", self.name, *check).returncode

    def strike(self, name: str) -> None:
        """Send the program a signal from outside, which the engine knows nothing of."""
        unshare = [] if os.getuid() == 0 else ["podman", "unshare"]
        do(*unshare, "kill", f"-{name}", self.state["Pid"])

    def stop(self) -> tuple[float, int]:
        """(the seconds it took to stop, the exit status)."""
        begun = time.monotonic()
        engine("stop", self.name)
        return time.monotonic() - begun, int(self.state["ExitCode"])


@contextmanager
def podman_secret(name: str, text: str) -> Iterator[None]:
    engine("secret", "create", name, "-", said=text)
    try:
        yield
    finally:
        engine("secret", "rm", name)


@contextmanager
def secret(token: str, directory: Path) -> Iterator[list[str]]:
    """The options with which a container has this token in /token."""
    name = unique_name()
    if ENGINE == "docker":  # which has secrets in swarms only
        (directory / name).write_text(token)
        yield ["-v", f"{directory / name}:/token:ro"]
        return
    with podman_secret(name, token):
        yield ["--secret", f"{name},target=/token"]


@contextmanager
def removed(name: str) -> Iterator[Container]:
    """A container of this name, which is shown and removed at the end if there is one."""
    container = Container(name)
    try:
        yield container
    finally:
        print(name, *container.log, sep="\n")
        call(ENGINE, "rm", "-f", name)


@contextmanager
def started(
    settings: dict[str, str],
    token: str,
    directory: Path,
    *options: str,
    network: Iterable[str] = ("--network=host",),
    arguments: Iterable[str] = (),
) -> Iterator[Container]:
    """A container, shut in as the README has it."""
    given = [*options, "-e", "MAILROOM_JMAP_TOKEN_FILE=/token", *options_of(settings)]
    with secret(token, directory) as mounted, removed(unique_name()) as container:
        pull = [] if ENGINE == "docker" else ["--pull=never"]
        words = ["run", "-d", "--name", container.name, *pull, *network]
        engine(*words, *hardened(), *mounted, *given, IMAGE, *arguments)
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


def tokens_seen(server: JMAPServer) -> set[str | None]:
    """What the requests showed to be let in."""
    return {request.headers.get("authorization") for request in server.requests}


# Units and YAML


def config_map(name: str, settings: dict[str, str]) -> str:
    """A ConfigMap in YAML, which JSON is a part of."""
    head = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}
    return json.dumps({**head, "data": settings})


@contextmanager
def kube_secret(name: str, token: str) -> Iterator[None]:
    """A Secret as it is in its file, or for a podman before 4.4 as that reads it: undecoded."""
    if podman_version() < (4, 4):
        with podman_secret(name, json.dumps({"data": {"token": token}})):
            yield
        return
    document = (DEPLOY / "mailroom.secret.yaml").read_text().replace("mailroom-alice", name)
    engine("kube", "play", "-", said=document.replace("fmu1-...", token))
    try:
        yield
    finally:
        engine("secret", "rm", name)


def quadlet(workshop: Path) -> Path:
    """The generator of this machine's podman, or else of the newer one that came with the base."""
    places = [Path("/usr/libexec/podman/quadlet"), workshop / "usr/libexec/podman/quadlet"]
    found = [place for place in places if place.exists()]
    assert found, "no quadlet: have podman 4.4 or newer, or MAKE_BASE=1"
    return found[0]


def verify(unit: Path) -> None:
    """systemd has nothing to say about the unit."""
    done = call("systemd-analyze", "verify", "--man=no", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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
        return engine("exec", self.name, "sh", "-c", script)

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
        done = call(ENGINE, "exec", self.name, "systemctl", "is-system-running")
        return done.stdout.strip() in {"running", "degraded"}


@contextmanager
def systemd(image: str) -> Iterator[Systemd]:
    """systemd as the first process of a container that may do everything. A unit that has failed
    waits for seconds in place of minutes."""
    with removed(unique_name()) as container:
        machine = Systemd(container.name)
        unit = DEPLOY / "mailroom@.service"
        engine(
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
