"""The container as it will be used: the image and what is in it, a container that is shut in, and
the units and YAML that keep it up. Without podman these tests fail."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import container_tools as tools
import gevent
import pytest
import requests
from container_tools import DEPLOY, IMAGE, ROOT, call, do, podman, settings_of, started
from jmap_server import JSON, JMAPServer
from ports import free_port

import mailroom

pytestmark = pytest.mark.container
MAKE_BASE = bool(os.environ.get("MAKE_BASE"))

# Bytes in all, and on top of the public slim base, which has about 125 MB.
MOST, MOST_ADDED = 150 * 10**6, 20 * 10**6
# Nothing of it may come into the image, nor be sent to the engine to build it.
LITTER = (".env", ".git/config", "tests/test_x.py", "alice.token", "__pycache__/x.pyc", "x.py")
OWN_FILE = re.compile(
    r"app/.*|etc/(passwd|group)"
    r"|.*/\.wh\.pip[^/]*"  # what was taken away of the base
    r"|.*/lib/python3[^/]*/(.*/)?__pycache__/[^/]+\.pyc"
)
UNWANTED = {"tests", "testing", "bin", "include", ".env", ".git", ".cache", "pip", "setuptools"}
LOOK = """
import importlib.metadata, json, shutil
packages = importlib.metadata.distributions(path=["/app"])
left = [name for name in ("pip", "pip3", "gcc", "cc", "make") if shutil.which(name)]
print(json.dumps([[[each.name.lower(), each.version] for each in packages], left]))
import pip
"""
# The page is 503 after two poll intervals and a cycle's five minutes. Here a cycle has three
# seconds; all else is the image's own.
HURRIED = "import mailroom; mailroom.CYCLE_DEADLINE = 3.0; raise SystemExit(mailroom.main([]))"


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a base image is made; it leaves a newer podman's package there."""
    assert shutil.which("podman"), "there is no podman: see the README"
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="session")
def base(workshop: Path) -> str:
    if MAKE_BASE:
        return tools.make_base(workshop)
    [named] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)", (ROOT / "Containerfile").read_text(), re.M)
    return os.environ.get("PYTHON_IMAGE") or str(named)


@pytest.fixture(scope="session", autouse=True)
def image(base: str) -> JSON:
    """The image that all tests use, as the engine describes it."""
    tools.build(base, IMAGE)
    return tools.inspected("image", IMAGE)


@pytest.fixture
def server() -> Iterator[JMAPServer]:
    with JMAPServer.with_mailroom_account() as server:
        yield server
        assert server.crashes == []


def test_the_containerfile_is_clean() -> None:
    assert do("hadolint", ROOT / "Containerfile") == ""


def test_the_image_is_small_and_has_the_program_and_nothing_else(
    image: JSON, base: str, workshop: Path
) -> None:
    layers = len(tools.inspected("image", base)["RootFS"]["Layers"])
    added = tools.contents(IMAGE, workshop, layers)
    assert image["Size"] < MOST
    assert sum(each.size for each in added) < MOST_ADDED
    files = [each for each in added if not each.isdir()]
    own = {"app/mailroom.py", "app/healthcheck.py", "app/start.py"}
    assert own <= {each.name for each in files}
    assert [each.name for each in files if not OWN_FILE.fullmatch(each.name)] == []
    placed = [each for each in added if each.name.startswith("app/")]
    assert [each.name for each in placed if UNWANTED & set(Path(each.name).parts)] == []
    assert {(each.uid, each.gid) for each in placed} == {(0, 0)}
    assert {oct(each.mode & 0o7777) for each in placed} <= {"0o644", "0o755"}


def test_the_image_says_what_it_is(image: JSON, base: str) -> None:
    config = image["Config"]
    told = {"User": "10001:10001", "StopSignal": "SIGTERM", "ExposedPorts": {"8080/tcp": {}}}
    assert told.items() <= config.items()
    assert not config.get("Cmd")
    about = {"title": "Mailroom", "version": mailroom.VERSION, "base.name": base}
    labels = {f"org.opencontainers.image.{name}": value for name, value in about.items()}
    assert labels.items() <= config["Labels"].items()


def test_the_packages_are_those_of_the_lock_and_no_build_tools_are_left() -> None:
    pinned = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    done = tools.run("--entrypoint=python", IMAGE, "-c", LOOK)
    found, left = json.loads(done.stdout)
    assert {"gevent", "requests"} <= {name for name, _ in found}
    assert {(re.sub("[._]", "-", name), version) for name, version in found} <= set(pinned)
    assert left == []
    assert "No module named 'pip'" in done.stderr


def test_two_builds_are_the_same_and_only_the_program_is_sent_to_them(
    image: JSON, base: str, tmp_path: Path
) -> None:
    """From another directory, in which the files have other modes and times, and no cache."""
    tools.littered(tmp_path, LITTER)
    again = tools.build(base, f"{IMAGE}-again", tmp_path, "--no-cache")
    other = tools.inspected("image", again)
    podman("rmi", again)
    assert (other["RootFS"], other["Config"]) == (image["RootFS"], image["Config"])
    (probe := tmp_path / "Containerfile").write_text("FROM scratch\nCOPY . /\n")
    podman("build", "--format=docker", "-f", probe, "-t", again, tmp_path)
    sent = tools.contents(again, tmp_path, 0)
    podman("rmi", again)
    assert {each.name for each in sent if not each.isdir()} == {"mailroom.py", "requirements.txt"}


@pytest.mark.parametrize(
    ("argument", "status", "out", "err"),
    [
        ("--version", 0, f"Mailroom {mailroom.VERSION}\n", ""),
        ("setup", 2, "", "mailroom: MAILROOM_JMAP_TOKEN: not set; expected an API token.*\n"),
    ],
)
def test_arguments_after_the_image_are_the_programs(
    argument: str, status: int, out: str, err: str
) -> None:
    done = tools.run(IMAGE, argument)
    assert (done.returncode, done.stdout) == (status, out)
    assert re.fullmatch(err, done.stderr)


@pytest.mark.parametrize(("user", "number"), [((), 10001), (("--user=54321:0",), 54321)])
def test_a_tap_is_triaged_by_a_container_that_is_shut_in(
    user: tuple[str, ...], number: int, server: JMAPServer
) -> None:
    """As the image's own user, and as one that it has never heard of."""
    with started(server, *user) as container:
        container.check(server, number)
        container.stop()
        events = [json.loads(line)["event"] for line in container.log]
        assert {"event stream: connected", "sender triaged"} <= set(events)
        assert events[-1] == "stopped"
        assert server.options.token not in str(container.log)


def test_a_container_waits_before_it_asks_again(server: JMAPServer) -> None:
    """Its restart policy would start it again at once; to be stopped it does not have to wait."""
    with started(server, token="wrong") as container:
        server.wait_for(lambda: container.log, 30)
        gevent.sleep(3)
        assert (container.state["Running"], len(server.requests)) == (True, 1)
        [line] = container.log
        assert "HTTP 401: the credentials are refused" in line
        container.stop()


def test_a_token_that_is_mended_works_by_itself(server: JMAPServer) -> None:
    options = (tools.readme_options()[1], "-e=RESTART_SECONDS=1")
    with started(server, *options, token="mended") as container:
        server.wait_for(lambda: len(container.log) > 2, 60)
        server.options.token = "mended"
        tools.tap(server, 60)


def test_prometheus_accepts_what_it_scrapes(server: JMAPServer) -> None:
    """The metrics, and the two alerts; HEAD answers as GET, without a body."""
    port = free_port()
    with started(server, health_port=port):
        tools.tap(server)
        page = f"http://127.0.0.1:{port}"
        metrics = requests.get(f"{page}/metrics", timeout=10)
        for path in ("/metrics", "/healthz"):
            get, head = (ask(page + path, timeout=10) for ask in (requests.get, requests.head))
            assert (head.status_code, head.content) == (get.status_code, b"")
            assert head.headers["Content-Type"] == get.headers["Content-Type"]
    checked = call("promtool", "check", "metrics", said=metrics.text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    rules = DEPLOY / "alerts.yml"
    assert "2 rules found" in do("promtool", "check", "rules", rules)
    used = set(re.findall(r"mailroom_\w+", rules.read_text()))
    assert used <= {line.split()[0] for line in metrics.text.splitlines()}
    do("promtool", "test", "rules", DEPLOY / "alerts.test.yml")


def test_the_health_check_follows_the_account(server: JMAPServer) -> None:
    hurried = ("-c", HURRIED)
    with started(server, "--entrypoint=python", arguments=hurried, poll_interval=1) as container:
        server.wait_for(lambda: server.streams and container.health() == 0, 30)
        server.pause()
        server.wait_for(lambda: container.health() == 1, 30)
        assert container.state["Running"]
        server.resume()
        server.wait_for(lambda: container.health() == 0, 30)


@pytest.mark.parametrize(
    "settings", [{"health_port": 0}, {"health_host": "127.0.0.2"}, {"health_host": ""}]
)
def test_the_health_check_looks_where_the_settings_say(settings: JSON, server: JMAPServer) -> None:
    with started(server, **settings) as container:
        server.wait_for(lambda: server.streams, 30)
        assert container.health() == 0


def test_where_no_one_listens_the_check_fails_in_one_line() -> None:
    done = tools.run("--entrypoint=python", IMAGE, "/app/healthcheck.py")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Connection refused" in done.stderr


def test_the_readmes_command_starts_again_after_a_crash(server: JMAPServer) -> None:
    with started(server, tools.readme_options()[1]) as container:
        tools.tap(server)
        first = container.state["Pid"]
        container.strike("KILL")
        server.wait_for(lambda: container.state["Pid"] not in {0, first}, 30)
        tools.tap(server)
        container.stop()


def test_two_accounts_side_by_side(tmp_path: Path) -> None:
    """Each in a network of its own, with the same port in it, over TLS to a server outside."""
    tls = tools.certificate(tmp_path, "10.0.2.2")
    network = "--network=slirp4netns:allow_host_loopback=true"
    trust = (f"-v={tmp_path / 'ca.pem'}:/ca.pem:ro", "-e=REQUESTS_CA_BUNDLE=/ca.pem")
    with tools.two_accounts(ssl_context=tls) as servers, ExitStack() as stack:
        ports = {name: free_port() for name in servers}
        for name, server in servers.items():
            url = server.session_url.replace("127.0.0.1", "10.0.2.2")
            options = (*trust, f"-p=127.0.0.1:{ports[name]}:8080")
            given = started(server, *options, network=network, jmap_url=url, health_port=8080)
            stack.enter_context(given)
        for name, server in servers.items():
            tools.check_own(name, server)
            page = requests.get(f"http://127.0.0.1:{ports[name]}/healthz", timeout=10)
            assert (page.status_code, page.json()["status"]) == (200, "ok")


def test_compose(tmp_path: Path) -> None:
    """The file as it is, with what is the test's own in a second one."""
    shutil.copy(DEPLOY / "compose.yaml", tmp_path)
    project, services = tools.unique_name(), {}
    compose = ("podman-compose", "-p", project, "-f", tmp_path / "compose.yaml")
    with tools.two_accounts() as servers, ExitStack() as stack:
        for name, server in servers.items():
            (tmp_path / f"{name}.token").write_text(f"{server.options.token}\n")
            settings = settings_of(server)
            services[name] = {"image": IMAGE, "network_mode": "host", "environment": settings}
        (tmp_path / "test.yaml").write_text(json.dumps({"services": services}))
        stack.callback(call, *compose, "down")
        do(*compose, "-f", tmp_path / "test.yaml", "up", "-d")
        for name, server in servers.items():
            container = stack.enter_context(tools.removed(f"{project}_{name}_1"))
            tools.check_own(name, server)
            container.check(server, 1000)
            container.stop()


def test_kubernetes(server: JMAPServer, tmp_path: Path) -> None:
    """The YAML is valid for a cluster, and podman plays it as it is but for names. (A service
    called mailroom would have a cluster set MAILROOM_PORT, which is no setting.)"""
    name = tools.unique_name()
    text = (DEPLOY / "mailroom.kube.yaml").read_text().replace("alice", name)
    (played := tmp_path / "kube.yaml").write_text(text.replace("localhost/mailroom:latest", IMAGE))
    assert "      enableServiceLinks: false\n" in text
    map_: JSON = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"mailroom-{name}"}}
    map_["data"] = settings_of(server)
    (settings := tmp_path / "settings.yaml").write_text(json.dumps(map_))  # a part of YAML
    text = (DEPLOY / "mailroom.secret.yaml").read_text().replace("alice", name)
    (secret := tmp_path / "secret.yaml").write_text(text)
    do("kubernetes-validate", "--strict", played, settings, secret)
    with tools.kube_secret(f"mailroom-{name}", server.options.token), ExitStack() as stack:
        stack.callback(call, "podman", "kube", "down", played)
        podman("kube", "play", "--network=host", "--configmap", settings, played)
        listed = ("ps", "-a", "--filter", f"name=mailroom-{name}", "--format", "{{.Names}}")
        [found] = [each for each in podman(*listed).split() if each.endswith("-mailroom")]
        container = stack.enter_context(tools.removed(found))
        container.check(server, 10001)
        described = tools.inspected("container", found)
        assert described["HostConfig"]["Memory"] == 256 * 2**20
        assert described["Config"]["Healthcheck"]["Retries"] == 3
        container.stop()


def test_the_quadlet(server: JMAPServer, workshop: Path, tmp_path: Path) -> None:
    """A newer podman's generator takes the unit; the command that it makes of it is run here."""
    name = tools.unique_name()
    (units := tmp_path / "units").mkdir()
    text = (DEPLOY / "mailroom@.container").read_text()
    (units / "mailroom@.container").write_text(text.replace("localhost/mailroom", IMAGE))
    (units / f"mailroom@{name}.container").symlink_to("mailroom@.container")
    (made := tmp_path / "made").mkdir()
    do("env", f"QUADLET_UNIT_DIRS={units}", tools.quadlet(workshop), "-user", made)
    assert (made / f"default.target.wants/mailroom@{name}.service").is_symlink()
    unit = made / f"mailroom@{name}.service"
    tools.verify(unit)
    (settings := tmp_path / ".config/mailroom" / f"{name}.env").parent.mkdir(parents=True)
    settings.write_text("".join(f"{k}={v}\n" for k, v in settings_of(server).items()))
    with (
        tools.podman_secret(f"mailroom-{name}", server.options.token),
        tools.removed(f"mailroom-{name}") as container,
    ):
        do(*tools.unit_command(unit, name, tmp_path))
        container.check(server, 10001)
        ending = gevent.spawn(podman, "wait", container.name)
        container.strike("STOP")
        server.wait_for(lambda: ending.ready() or not container.health(), 60)
        assert ending.get(timeout=10).strip() == "137"


def test_the_systemd_unit(tmp_path: Path) -> None:
    """As systemd reads it, and as it judges how well it is shut in (0 is best, 10 worst)."""
    python = tmp_path / "mailroom/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    text = (DEPLOY / "mailroom@.service").read_text()
    unit = tmp_path / "mailroom@alice.service"
    unit.write_text(text.replace("/opt/mailroom", str(tmp_path / "mailroom")))
    tools.verify(unit)
    do("systemd-analyze", "security", "--offline=true", "--threshold=20", unit)


@pytest.mark.skipif(not MAKE_BASE, reason="there is no public image with systemd: MAKE_BASE=1")
def test_the_systemd_unit_runs(workshop: Path) -> None:
    """Under a systemd of its own: two accounts, one that crashes, one whose token is withdrawn and
    later good again; nobody starts anything."""
    packages = "systemd,python3,ca-certificates,libstdc++6"
    made = tools.make_image("localhost/mailroom-systemd:made", workshop, packages)
    with tools.systemd(made) as machine, tools.two_accounts() as servers:
        for name, server in servers.items():
            machine.give(name, server.options.token, settings_of(server))
        server.wait_for(machine.ready, 60)
        machine.sh("systemctl daemon-reload; systemctl start mailroom@alice mailroom@bob")
        for name, server in servers.items():
            tools.check_own(name, server)
            status = machine.sh(f"cat /proc/{machine.shows(name)['MainPID']}/status")
            assert re.search(r"CapBnd:\s0+\nCapAmb:\s0+\nNoNewPrivs:\s1\nSeccomp:\s2\n", status)
            assert not re.search(r"Uid:.*\b0\b", status)
        machine.sh(f"kill -KILL {machine.shows('alice')['MainPID']}")
        server.wait_for(lambda: machine.shows("alice")["SubState"] == "auto-restart", 30)
        servers["bob"].options.token = "another"
        machine.sh("systemctl restart mailroom@bob")
        # More often than systemd's own limit allows.
        server.wait_for(lambda: int(machine.shows("bob")["NRestarts"]) > 6, 60)
        server.wait_for(lambda: machine.shows("bob")["ExecMainStatus"] == "2", 30)
        servers["bob"].options.token = "token-of-bob"
        tools.tap(servers["bob"])
        server.wait_for(lambda: machine.shows("alice")["SubState"] == "running", 30)
        tools.tap(servers["alice"])
        machine.sh("systemctl stop mailroom@alice")
        shown = machine.shows("alice")
        assert (shown["Result"], shown["ExecMainStatus"]) == ("success", "0")
