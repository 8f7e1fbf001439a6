"""`deployments/haproxy.sh` makes Serve's HAProxy private, and then becomes HAProxy."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

import deployments.data_plane
from blaze.errors import EnvironmentProblem

WRAPPER = Path(deployments.data_plane.__file__).with_name("haproxy.sh")


def run_wrapper(config: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BLAZE_HAPROXY_BINARY": "/bin/echo"}
    command = [str(WRAPPER), "-db", "-f", str(config), "-sf", "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_it_becomes_haproxy_with_the_same_arguments(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text("global\n", encoding="utf-8")
    assert run_wrapper(config).stdout == f"-db -f {config} -sf 1\n"
    assert list(tmp_path.iterdir()) == [config]


def test_nothing_in_rays_own_template_is_left_open(tmp_path: Path) -> None:
    """Held to the template of the installed Ray: a new one that binds otherwise fails here."""
    rendered = re.sub(r"\{\{ config\.frontend_host \}\}", "127.0.0.1", HAPROXY_CONFIG_TEMPLATE)
    rendered = re.sub(r"\{\{[^}]*_port \}\}", "9101", rendered)
    config = tmp_path / "haproxy.cfg"
    config.write_text(rendered, encoding="utf-8")
    run_wrapper(config)
    mended = config.read_text(encoding="utf-8")
    binds = re.findall(r"^ *bind (\S+)", mended, re.MULTILINE)
    assert len(binds) >= 3
    own = [bind for bind in binds if "grpc" not in bind]  # the gRPC front end takes the HTTP one's host
    assert {bind.rpartition(":")[0] for bind in own if not bind.startswith("{{")} == {"127.0.0.1"}
    assert "mode 600 level admin" in mended and "mode 666" not in mended


def test_without_a_haproxy_it_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLAZE_HAPROXY_BINARY", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EnvironmentProblem, match="HAProxy"):
        deployments.data_plane.haproxy_binary()
