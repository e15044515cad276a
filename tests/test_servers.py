"""A real server that cannot start says why, and what to do."""

from pathlib import Path

import cyrus_server
import pytest
from cyrus_server import CyrusServer, CyrusUnavailableError
from debian_root import BootstrapError, make_root
from radicale_server import RadicaleServer, RadicaleUnavailableError


def test_a_missing_cyrus_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cyrus_server, "MASTER", tmp_path / "nowhere")
    with pytest.raises(CyrusUnavailableError, match=r"apt-get install .*cyrus-imapd"):
        CyrusServer().__enter__()


@pytest.mark.parametrize(
    ("mirror", "message"),
    [
        ("http://mirror.example/debian", "mmdebstrap is missing.* apt-get install mmdebstrap"),
        ("", "no Debian mirror.* apt-get update"),
    ],
)
def test_a_missing_mmdebstrap_or_mirror_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mirror: str, message: str
) -> None:
    for name in ("apt-get", "apt-config"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {mirror}\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BootstrapError, match=message):
        make_root(tmp_path / "root", "minbase", "cyrus-imapd")


def test_a_radicale_that_does_not_start_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radicale_server.CONFIG", "[nonsense]\nkey = 1\n")
    with pytest.raises(RadicaleUnavailableError, match=r"did not come up[\s\S]*nonsense"):
        RadicaleServer().__enter__()
