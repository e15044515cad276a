"""The container as it will be used: the image and what is in it, a container that is shut in, and
the units and YAML that keep it up.

Without podman or docker these tests fail, and say what to install."""

import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import container_tools as tools
import gevent
import pytest
import requests
from container_tools import DEPLOY, ENGINE, IMAGE, ROOT, call, do, engine, settings_of, started
from jmap_server import JSON, JMAPServer, Options
from ports import free_port

import mailroom

pytestmark = pytest.mark.container
MAKE_BASE = bool(os.environ.get("MAKE_BASE"))
podman_only = pytest.mark.skipif(ENGINE != "podman", reason="docker has nothing of the kind")

MEGABYTE = 10**6
MOST = 150 * MEGABYTE
# What may come on top of the public slim base, which has about 125 MB.
MOST_ADDED = 20 * MEGABYTE
STOP_SECONDS = 5.0
# Nothing of it may come into the image, nor be sent to the engine to build it.
LITTER = (".env", ".git/config", "tests/test_x.py", "alice.token", "__pycache__/x.pyc", "x.py")
OWN_FILE = re.compile(
    r"app/.*|etc/(passwd|group)"
    r"|.*/\.wh\.pip[^/]*"  # what was taken away of the base
    r"|.*/lib/python3[^/]*/(.*/)?__pycache__/[^/]+\.pyc"
)
UNWANTED = {"tests", "testing", "bin", "include", ".env", ".git", ".cache", "pip", "setuptools"}
# As the image's own user, and as one that it has never heard of.
USERS = {"own": ("", 10001), "arbitrary": ("--user=54321:0", 54321)}
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
# The page is 503 after two poll intervals and a cycle's five minutes. Here a cycle has three
# seconds; all else is the image's own.
HURRIED = "import mailroom; mailroom.CYCLE_DEADLINE = 3.0; raise SystemExit(mailroom.main([]))"


def confinement(user: int) -> JSON:
    """What CONFINEMENT prints when all is as it should be."""
    return {
        "program": "python",
        "user": user,
        "capabilities": [0, 0, 0],
        "no new privileges": 1,
        "writable": [],
    }


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a base image is made; it leaves a newer podman's package there."""
    assert shutil.which(ENGINE), "there is neither podman nor docker: see the README"
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="session")
def base(workshop: Path) -> str:
    """The name of the base image."""
    if MAKE_BASE:
        return tools.make_base(workshop)
    return os.environ.get("PYTHON_IMAGE") or tools.public_base()


@pytest.fixture(scope="session", autouse=True)
def image(base: str) -> JSON:
    """The image that all tests use, as the engine describes it."""
    tools.build(base, IMAGE)
    return tools.inspected("image", IMAGE)


@pytest.fixture(scope="session")
def added(image: JSON, base: str, workshop: Path) -> list[tarfile.TarInfo]:
    """What the image has on top of its base."""
    return tools.contents(IMAGE, workshop, len(tools.inspected("image", base)["RootFS"]["Layers"]))


@pytest.fixture
def server() -> Iterator[JMAPServer]:
    with JMAPServer.with_mailroom_account() as server:
        yield server
        assert server.crashes == []


# The image


def test_the_containerfile_is_clean() -> None:
    assert do("hadolint", ROOT / "Containerfile") == ""


def test_the_image_is_small(image: JSON, added: list[tarfile.TarInfo]) -> None:
    assert image["Size"] < MOST
    assert sum(each.size for each in added) < MOST_ADDED


def test_the_image_has_the_program_and_nothing_else(added: list[tarfile.TarInfo]) -> None:
    files = [each for each in added if not each.isdir()]
    own = {"app/mailroom.py", "app/healthcheck.py", "app/start.py"}
    assert own <= {each.name for each in files}
    assert [each.name for each in files if not OWN_FILE.fullmatch(each.name)] == []
    placed = [each for each in added if each.name.startswith("app/")]
    assert [each.name for each in placed if UNWANTED & set(Path(each.name).parts)] == []
    assert {(each.uid, each.gid) for each in placed} == {(0, 0)}
    assert {oct(each.mode & 0o7777) for each in placed} <= {"0o644", "0o755"}


def test_the_image_says_what_it_is(image: JSON, base: str) -> None:
    config, labels = image["Config"], image["Config"]["Labels"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["python", "/app/start.py"]
    assert not config.get("Cmd")
    assert config["StopSignal"] == "SIGTERM"
    check = image.get("Healthcheck") or config["Healthcheck"]
    assert check["Test"] == ["CMD", "python", "/app/healthcheck.py"]
    assert list(config["ExposedPorts"]) == ["8080/tcp"]
    about = {name.removeprefix("org.opencontainers.image."): labels[name] for name in labels}
    assert about["title"] == "Mailroom"
    assert about["version"] == mailroom.VERSION
    assert about["base.name"] == base


def test_no_build_tools_are_left() -> None:
    look = "import shutil; print([n for n in 'pip pip3 gcc cc make'.split() if shutil.which(n)])"
    python = ("run", "--rm", "--network=none", "--entrypoint=python", IMAGE, "-c")
    assert engine(*python, look) == "[]\n"
    assert "No module named 'pip'" in call(ENGINE, *python, "import pip").stderr


def test_the_packages_are_those_of_the_lock() -> None:
    pinned = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps([[d.name.lower(), d.version] for d in m.distributions(path=['/app'])]))"
    )
    found = engine("run", "--rm", "--network=none", "--entrypoint=python", IMAGE, "-c", code)
    assert {"gevent", "requests"} <= {name for name, _ in json.loads(found)}
    assert {(re.sub("[._]", "-", name), v) for name, v in json.loads(found)} <= set(pinned)


@podman_only
def test_two_builds_are_the_same(image: JSON, base: str, tmp_path: Path) -> None:
    """From another directory, in which the files have other modes and times, and no cache."""
    tools.littered(tmp_path, LITTER)
    again = tools.build(base, f"{IMAGE}-again", tmp_path, "--no-cache")
    other = tools.inspected("image", again)
    engine("rmi", again)
    assert other["RootFS"] == image["RootFS"]
    assert other["Config"] == image["Config"]


@podman_only
def test_nothing_but_the_program_is_sent_to_build_it(tmp_path: Path) -> None:
    tools.littered(tmp_path, LITTER)
    probe = tmp_path / "Containerfile"
    probe.write_text("FROM scratch\nCOPY . /\n")
    engine("build", "--format=docker", "-f", probe, "-t", f"{IMAGE}-context", tmp_path)
    sent = tools.contents(f"{IMAGE}-context", tmp_path, 0)
    engine("rmi", f"{IMAGE}-context")
    assert {each.name for each in sent if not each.isdir()} == {"mailroom.py", "requirements.txt"}


@pytest.mark.parametrize(
    ("argument", "status", "says"),
    [
        ("--help", 0, "exit status:"),
        ("--version", 0, f"Mailroom {mailroom.VERSION}"),
        ("--nonsense", 2, "unrecognized arguments: --nonsense"),
    ],
)
def test_arguments_after_the_image_are_the_programs(argument: str, status: int, says: str) -> None:
    done = call(ENGINE, "run", "--rm", "--network=none", *tools.hardened(), IMAGE, argument)
    assert (done.returncode, says in done.stdout + done.stderr) == (status, True)


# A container


@pytest.mark.parametrize("user", USERS)
def test_a_tap_is_triaged_by_a_container_that_is_shut_in(
    user: str, server: JMAPServer, tmp_path: Path
) -> None:
    option, number = USERS[user]
    settings, token = settings_of(server), server.options.token
    with started(settings, token, tmp_path, *filter(None, [option])) as container:
        tools.tap(server)
        assert container.health() == 0
        assert json.loads(container.run(CONFINEMENT)) == confinement(number)
        seconds, status = container.stop()
        events = [json.loads(line)["event"] for line in container.log]
        assert {"event stream: connected", "sender triaged"} <= set(events)
        assert events[-1] == "stopped"
        assert token not in str(container.log)
        assert (seconds < STOP_SECONDS, status) == (True, 0), seconds


def test_a_wrong_token_is_one_line_and_status_2(server: JMAPServer, tmp_path: Path) -> None:
    with started(settings_of(server), "wrong", tmp_path, arguments=["run"]) as container:
        server.wait_for(lambda: not container.runs, 30)
        assert container.state["ExitCode"] == 2
        [line] = container.log
        assert line.startswith("mailroom: ")
        assert "HTTP 401: the credentials are refused" in line


def test_a_container_waits_before_it_asks_again(server: JMAPServer, tmp_path: Path) -> None:
    """Its restart policy would start it again at once; to be stopped it does not have to wait."""
    with started(settings_of(server), "wrong", tmp_path) as container:
        server.wait_for(lambda: container.log, 30)
        gevent.sleep(3)
        assert (container.runs, len(server.requests)) == (True, 1)
        seconds, status = container.stop()
        assert (seconds < STOP_SECONDS, status) == (True, 0), seconds


def test_a_token_that_is_mended_works_by_itself(server: JMAPServer, tmp_path: Path) -> None:
    [restart] = [word for word in tools.readme_command("podman run -d") if "--restart" in word]
    hurried = ("-e", "RESTART_SECONDS=1")
    with started(settings_of(server), "mended", tmp_path, restart, *hurried) as container:
        server.wait_for(lambda: len(container.log) > 2, 60)
        server.options.token = "mended"
        tools.tap(server, 60)


def test_no_token_is_one_line_and_status_2() -> None:
    command = ("run", "--rm", "--network=none", *tools.hardened(), IMAGE, "setup")
    done = call(ENGINE, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mailroom: MAILROOM_JMAP_TOKEN: not set; expected an API token")
    assert done.stderr.count("\n") == 1


def test_prometheus_accepts_what_it_scrapes(server: JMAPServer, tmp_path: Path) -> None:
    """The metrics, and the two alerts; HEAD answers as GET, without a body."""
    settings = settings_of(server)
    with started(settings, server.options.token, tmp_path):
        tools.tap(server)
        page = f"http://127.0.0.1:{settings['MAILROOM_HEALTH_PORT']}"
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
    (tests := tmp_path / "rules.json").write_text(json.dumps(alert_tests(rules)))
    do("promtool", "test", "rules", tests)


def alert_tests(rules: Path) -> JSON:
    """What promtool is to try: nothing is wrong; the token is refused; a tap waits; nobody answers,
    or there is no Mailroom at all."""
    well = {
        'up{job="mailroom",instance="a"}': "1x120",
        'mailroom_error_messages{job="mailroom",instance="a"}': "0x120",
        'mailroom_consecutive_failures{job="mailroom",instance="a"}': "0x120",
        'mailroom_last_success_timestamp_seconds{job="mailroom",instance="a"}': "0+60x120",
    }
    stale = {name: "0x120" for name in well if "last_success" in name}
    waiting = {name: "1x120" for name in well if "error_messages" in name}
    cases = [
        (well, {}),
        (well | stale, {"MailroomDoesNotWork"}),
        (well | waiting, {"MailroomTapWaits"}),
        ({'up{job="mailroom",instance="a"}': "0x120"}, {"MailroomDoesNotWork"}),
        ({}, {"MailroomDoesNotWork"}),
    ]
    fired = "sum by (alertname) (ALERTS{alertstate='firing'} * 0)"
    return {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": v} for name, v in series.items()],
                "promql_expr_test": [
                    {
                        "expr": fired,
                        "eval_time": "110m",
                        "exp_samples": [
                            {"labels": f'{{alertname="{name}"}}', "value": 0} for name in alerts
                        ],
                    }
                ],
            }
            for series, alerts in cases
        ],
    }


def test_the_health_check_follows_the_account(server: JMAPServer, tmp_path: Path) -> None:
    given = (settings_of(server, poll_interval=1), server.options.token, tmp_path)
    hurried = ("-c", HURRIED)
    with started(*given, "--entrypoint=python", arguments=hurried) as container:
        server.wait_for(lambda: server.streams and container.health() == 0, 30)
        server.pause()
        server.wait_for(lambda: container.health() == 1, 30)
        assert container.runs
        server.resume()
        server.wait_for(lambda: container.health() == 0, 30)


@pytest.mark.parametrize(
    "settings", [{"health_port": 0}, {"health_host": "127.0.0.2"}, {"health_host": ""}]
)
def test_the_health_check_looks_where_the_settings_say(
    settings: JSON, server: JMAPServer, tmp_path: Path
) -> None:
    with started(settings_of(server, **settings), server.options.token, tmp_path) as container:
        server.wait_for(lambda: server.streams, 30)
        assert container.health() == 0


def test_where_no_one_listens_the_check_fails_in_one_line() -> None:
    given = (*tools.hardened(), "--network=none", "--entrypoint=python", IMAGE)
    done = call(ENGINE, "run", "--rm", *given, "/app/healthcheck.py")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Connection refused" in done.stderr


# Staying up


def test_the_readmes_command_starts_again_after_a_crash(server: JMAPServer, tmp_path: Path) -> None:
    restart = [word for word in tools.readme_command("podman run -d") if "--restart" in word]
    assert len(restart) == 1
    with started(settings_of(server), server.options.token, tmp_path, *restart) as container:
        tools.tap(server)
        first = container.state["Pid"]
        container.strike("KILL")
        server.wait_for(lambda: container.state["Pid"] not in {0, first}, 30)
        tools.tap(server)
        assert container.stop()[1] == 0


@podman_only
def test_two_accounts_side_by_side(tmp_path: Path) -> None:
    """Each in a network of its own, with the same port in it, over TLS to a server outside."""
    tls = tools.certificate(tmp_path, "10.0.2.2")
    network = "--network=slirp4netns:allow_host_loopback=true"
    trust = ("-v", f"{tmp_path / 'ca.pem'}:/ca.pem:ro", "-e", "REQUESTS_CA_BUNDLE=/ca.pem")
    with ExitStack() as stack:
        servers, ports = {}, {}
        for name in ("alice", "bob"):
            options = Options(token=f"token-of-{name}", relative_urls=True)
            servers[name] = server = stack.enter_context(
                JMAPServer.with_mailroom_account(options, ssl_context=tls)
            )
            ports[name] = free_port()
            url = server.session_url.replace("127.0.0.1", "10.0.2.2")
            settings = settings_of(server, jmap_url=url, health_port=8080)
            publish = ("-p", f"127.0.0.1:{ports[name]}:8080")
            given = (settings, options.token, tmp_path, *trust, *publish)
            stack.enter_context(started(*given, network=[network]))
        for name, server in servers.items():
            tools.tap(server)
            assert tools.tokens_seen(server) == {f"Bearer token-of-{name}"}
            page = requests.get(f"http://127.0.0.1:{ports[name]}/healthz", timeout=10)
            assert (page.status_code, page.json()["status"]) == (200, "ok")


@podman_only
def test_compose(tmp_path: Path) -> None:
    """The file as it is, with what is the test's own in a second one."""
    (tmp_path / "compose.yaml").write_bytes((DEPLOY / "compose.yaml").read_bytes())
    project = tools.unique_name()
    compose = ("podman-compose", "-p", project, "-f", tmp_path / "compose.yaml")
    with ExitStack() as stack:
        servers, services = {}, {}
        for name in ("alice", "bob"):
            options = Options(token=f"token-of-{name}")
            servers[name] = stack.enter_context(JMAPServer.with_mailroom_account(options))
            (tmp_path / f"{name}.token").write_text(f"{options.token}\n")
            settings = settings_of(servers[name])
            services[name] = {"image": IMAGE, "network_mode": "host", "environment": settings}
        (tmp_path / "test.yaml").write_text(json.dumps({"services": services}))
        stack.callback(call, *compose, "down")
        do(*compose, "-f", tmp_path / "test.yaml", "up", "-d")
        for name, server in servers.items():
            container = stack.enter_context(tools.removed(f"{project}_{name}_1"))
            tools.tap(server)
            assert tools.tokens_seen(server) == {f"Bearer token-of-{name}"}
            assert json.loads(container.run(CONFINEMENT)) == confinement(1000)
            assert container.stop()[1] == 0


@podman_only
def test_kubernetes(server: JMAPServer, tmp_path: Path) -> None:
    """The YAML is valid for a cluster, and podman plays it as it is but for names. (A service
    called mailroom would have a cluster set MAILROOM_PORT, which is no setting.)"""
    name = tools.unique_name()
    text = (DEPLOY / "mailroom.kube.yaml").read_text().replace("alice", name)
    (played := tmp_path / "kube.yaml").write_text(text.replace("localhost/mailroom:latest", IMAGE))
    assert "      enableServiceLinks: false\n" in text
    (settings := tmp_path / "settings.yaml").write_text(
        tools.config_map(f"mailroom-{name}", settings_of(server))
    )
    (secret := tmp_path / "secret.yaml").write_text(
        (DEPLOY / "mailroom.secret.yaml").read_text().replace("alice", name)
    )
    do("kubernetes-validate", "--strict", played, settings, secret)
    with tools.kube_secret(f"mailroom-{name}", server.options.token), ExitStack() as stack:
        stack.callback(call, "podman", "kube", "down", played)
        engine("kube", "play", "--network=host", "--configmap", settings, played)
        listed = ("ps", "-a", "--filter", f"name=mailroom-{name}", "--format", "{{.Names}}")
        [found] = [each for each in engine(*listed).split() if each.endswith("-mailroom")]
        container = stack.enter_context(tools.removed(found))
        tools.tap(server)
        assert container.health() == 0
        assert json.loads(container.run(CONFINEMENT)) == confinement(10001)
        described = tools.inspected("container", found)
        assert described["HostConfig"]["Memory"] == 256 * 2**20
        assert described["Config"]["Healthcheck"]["Retries"] == 3
        assert container.stop()[1] == 0


@podman_only
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
    assert {"Restart=always", "RestartSec=300", "StartLimitIntervalSec=0"} <= lines_of(unit)
    (settings := tmp_path / ".config/mailroom" / f"{name}.env").parent.mkdir(parents=True)
    settings.write_text("".join(f"{k}={v}\n" for k, v in settings_of(server).items()))
    with (
        tools.podman_secret(f"mailroom-{name}", server.options.token),
        tools.removed(f"mailroom-{name}") as container,
    ):
        do(*tools.unit_command(unit, name, tmp_path))
        tools.tap(server)
        assert json.loads(container.run(CONFINEMENT)) == confinement(10001)
        assert container.health() == 0
        ending = gevent.spawn(engine, "wait", container.name)
        container.strike("STOP")
        server.wait_for(lambda: ending.ready() or not container.health(), 60)
        assert ending.get(timeout=10).strip() == "137"


def lines_of(unit: Path) -> set[str]:
    return set(unit.read_text().splitlines())


def test_the_systemd_unit(tmp_path: Path) -> None:
    """As systemd reads it, and as it judges how well it is shut in (0 is best, 10 worst)."""
    python = tmp_path / "mailroom/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    text = (DEPLOY / "mailroom@.service").read_text()
    unit = tmp_path / "mailroom@alice.service"
    unit.write_text(text.replace("/opt/mailroom", str(tmp_path / "mailroom")))
    tools.verify(unit)
    assert {"Restart=always", "RestartSec=300", "StartLimitIntervalSec=0"} <= lines_of(unit)
    do("systemd-analyze", "security", "--offline=true", "--threshold=20", unit)


@podman_only
@pytest.mark.skipif(not MAKE_BASE, reason="there is no public image with systemd: MAKE_BASE=1")
def test_the_systemd_unit_runs(workshop: Path) -> None:
    """Under a systemd of its own: two accounts, one that crashes, one whose token is withdrawn and
    later good again; nobody starts anything."""
    with ExitStack() as stack:
        machine = stack.enter_context(tools.systemd(tools.make_systemd(workshop)))
        servers: dict[str, JMAPServer] = {}
        for name in ("alice", "bob"):
            options = Options(token=f"token-of-{name}")
            servers[name] = server = JMAPServer.with_mailroom_account(options)
            stack.enter_context(server)
            machine.give(name, options.token, settings_of(server))
        server.wait_for(machine.ready, 60)
        machine.sh("systemctl daemon-reload; systemctl start mailroom@alice mailroom@bob")
        for name, server in servers.items():
            tools.tap(server)
            assert tools.tokens_seen(server) == {f"Bearer token-of-{name}"}
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
