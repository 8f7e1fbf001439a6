"""`deployments/haproxy.sh` mends the configuration of Serve's HAProxy, and then becomes HAProxy."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

import deployments.data_plane
from blaze.errors import EnvironmentProblem
from blaze.routing.affinity import LOOPBACK, client_address

WRAPPER = Path(deployments.data_plane.__file__).with_name("haproxy.sh")


def run_wrapper(config: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BLAZE_HAPROXY_BINARY": "/bin/echo"}
    command = [str(WRAPPER), "-db", "-f", str(config), "-sf", "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def mended(folder: Path, text: str, *, times: int = 1) -> str:
    config = folder / "haproxy.cfg"
    config.write_text(text, encoding="utf-8")
    for _ in range(times):
        run_wrapper(config)
    return config.read_text(encoding="utf-8")


def test_it_becomes_haproxy_with_the_same_arguments(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text("global\n", encoding="utf-8")
    assert run_wrapper(config).stdout == f"-db -f {config} -sf 1\n"
    assert list(tmp_path.iterdir()) == [config]


def test_nothing_in_rays_own_template_is_left_open(tmp_path: Path) -> None:
    """Held to the template of the installed Ray: a new one that binds otherwise fails here."""
    rendered = re.sub(r"\{\{ config\.frontend_host \}\}", "127.0.0.1", HAPROXY_CONFIG_TEMPLATE)
    rendered = re.sub(r"\{\{[^}]*_port \}\}", "9101", rendered)
    private = mended(tmp_path, rendered)
    binds = re.findall(r"^ *bind (\S+)", private, re.MULTILINE)
    assert len(binds) >= 3
    own = [bind for bind in binds if "grpc" not in bind]  # the gRPC front end takes the HTTP one's host
    assert {bind.rpartition(":")[0] for bind in own if not bind.startswith("{{")} == {"127.0.0.1"}
    assert "mode 600 level admin" in private and "mode 666" not in private


# --- The client's address ----------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3])
def test_rays_own_template_passes_the_clients_address_on(tmp_path: Path, times: int) -> None:
    """Held to the template of the installed Ray: one that adds it too, or has no such `defaults`, fails."""
    text = mended(tmp_path, HAPROXY_CONFIG_TEMPLATE, times=times)
    added = "    mode http\n    option forwardfor\n"
    assert text.count("option forwardfor") == 1
    assert text.index("\ndefaults\n") < text.index(added) < text.index("\nfrontend ")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("defaults\n  mode http\n", "defaults\n  mode http\n  option forwardfor\n"),
        # An address that the client has written there itself must not stand for its own.
        (
            "defaults\n  mode http\n  option forwardfor if-none\n",
            "defaults\n  mode http\n  option forwardfor\n",
        ),
        ("defaults\n  option forwardfor\n  mode http\n", "defaults\n  mode http\n  option forwardfor\n"),
        # Not HTTP, or of one section alone: left as they are.
        ("defaults\n  mode tcp\n", "defaults\n  mode tcp\n"),
        ("defaults\nlisten x\n  mode http\n", "defaults\nlisten x\n  mode http\n"),
        ("frontend x\n  mode http\n", "frontend x\n  mode http\n"),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_the_clients_address_is_appended_once(tmp_path: Path, before: str, after: str, times: int) -> None:
    assert mended(tmp_path, before, times=times) == after


class Echo(BaseHTTPRequestHandler):
    """Answers with the peer of its socket, and what it was told of whom the request is from."""

    def do_GET(self) -> None:
        said = [self.client_address[0], self.headers.get_all("x-forwarded-for", [])]
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def behind_haproxy(folder: Path) -> Iterator[int]:
    """An echo behind the real HAProxy, which inherits its socket: no port to lose, nothing to wait for."""
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Echo) as echo,
        socket.create_server(("127.0.0.1", 0)) as front,
    ):
        config = folder / "haproxy.cfg"
        config.write_text(
            "global\n  nbthread 1\n"
            "defaults\n  mode http\n  timeout connect 10s\n  timeout client 10s\n  timeout server 10s\n"
            f"frontend front\n  bind fd@{front.fileno()}\n  default_backend back\n"
            f"backend back\n  server echo 127.0.0.1:{echo.server_port}\n",
            encoding="utf-8",
        )
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        haproxy = subprocess.Popen(
            [str(WRAPPER), "-db", "-f", str(config)],
            env=os.environ | {"BLAZE_HAPROXY_BINARY": deployments.data_plane.haproxy_binary()},
            pass_fds=[front.fileno()],
            stderr=subprocess.DEVNULL,
        )
        try:
            yield front.getsockname()[1]
        finally:
            haproxy.kill()
            haproxy.wait()
            echo.shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="needs the bundled HAProxy and 127.0.0.2")
@pytest.mark.parametrize("forged", [[], ["6.6.6.6"], ["6.6.6.6, 127.0.0.1", "unknown"]])
def test_the_real_haproxy_appends_to_what_the_client_says(tmp_path: Path, forged: list[str]) -> None:
    with behind_haproxy(tmp_path) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=20, source_address=("127.0.0.2", 0))
        connection.putrequest("GET", "/")
        for value in forged:
            connection.putheader("X-Forwarded-For", value)
        connection.endheaders()
        peer, forwarded_for = json.loads(connection.getresponse().read())
        connection.close()
    assert (peer, forwarded_for) == ("127.0.0.1", [*forged, "127.0.0.2"])
    assert client_address(peer, forwarded_for, LOOPBACK) == "127.0.0.2"


# --- Where it is -------------------------------------------------------------------------------------


def test_without_a_haproxy_it_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLAZE_HAPROXY_BINARY", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EnvironmentProblem, match="HAProxy"):
        deployments.data_plane.haproxy_binary()
