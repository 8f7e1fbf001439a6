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
def haproxy(config: Path, text: str) -> Iterator[int]:
    """The real HAProxy, which inherits its socket, ``{front}`` in the text: no port to lose, nothing to wait
    for."""
    with socket.create_server(("127.0.0.1", 0)) as front:
        config.write_text(text.replace("{front}", f"fd@{front.fileno()}"), encoding="utf-8")
        process = subprocess.Popen(
            [str(WRAPPER), "-db", "-f", str(config)],
            env=os.environ | {"BLAZE_HAPROXY_BINARY": deployments.data_plane.haproxy_binary()},
            pass_fds=[front.fileno()],
            stderr=subprocess.DEVNULL,
        )
        try:
            yield front.getsockname()[1]
        finally:
            process.kill()
            process.wait()


DEFAULTS = (
    "global\n  nbthread 1\n"
    "defaults\n  mode http\n  timeout connect 10s\n  timeout client 10s\n  timeout server 10s\n"
)


@contextmanager
def behind_haproxy(folder: Path) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as echo:
        text = (
            f"{DEFAULTS}frontend front\n  bind {{front}}\n  default_backend back\n"
            f"backend back\n  server echo 127.0.0.1:{echo.server_port}\n"
        )
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        with haproxy(folder / "haproxy.cfg", text) as port:
            try:
                yield port
            finally:
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


# --- What clients hear when there is no Router ---------------------------------------------------------


def ask(port: int, path: str) -> tuple[int, str | None, str | None, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, body="{}")
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, response.headers["content-type"], response.headers["retry-after"], body


def lines(text: str, *beginnings: str) -> str:
    """Those of Ray's template that begin so."""
    found = [line for line in text.splitlines() if line.lstrip().startswith(beginnings)]
    assert len(found) >= len(beginnings)
    return "\n".join(found) + "\n"


@contextmanager
def a_closing_port() -> Iterator[int]:
    """Where somebody takes a request, and dies of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def die() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(1000)

        threading.Thread(target=die, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the bundled HAProxy")
def test_without_a_router_the_answers_are_errors_as_routers_write_them(tmp_path: Path) -> None:
    errors = lines(HAPROXY_CONFIG_TEMPLATE, "errorfile").replace("{{ config.error_file_path }}", "/none")
    with socket.create_server(("127.0.0.1", 0)) as unused, a_closing_port() as dying:
        nobody = unused.getsockname()[1]
        unused.close()
        text = (
            f"{DEFAULTS}{errors}  retries 0\n"
            "frontend front\n  bind {front}\n"
            "  use_backend gone if { path /gone }\n  use_backend dying if { path /dying }\n"
            "  default_backend default_backend\n"
            f"backend gone\n  server a 127.0.0.1:{nobody}\n"
            f"backend dying\n  server a 127.0.0.1:{dying}\n"
            "backend default_backend\n  http-request return status 404 content-type text/plain string none\n"
        )
        with haproxy(tmp_path / "haproxy.cfg", text) as port:
            gone, died, elsewhere = (ask(port, path) for path in ("/gone", "/dying", "/elsewhere"))
    assert gone[:3] == (503, "application/json", "1")
    assert json.loads(gone[3])["error"]["code"] == "overloaded"
    assert died[:2] == (502, "application/json")
    assert json.loads(died[3])["error"] == {
        "message": "The Router was lost before it had answered.",
        "type": "server_error",
        "param": None,
        "code": "router_lost",
    }
    assert elsewhere[0] == 404


@pytest.mark.skipif(sys.platform != "linux", reason="needs the bundled HAProxy")
def test_an_haproxy_that_knows_of_no_router_yet_says_so_and_not_404(tmp_path: Path) -> None:
    """Held to Ray's own answer, in the section where its template has it."""
    template = HAPROXY_CONFIG_TEMPLATE
    section = template[template.index("\nbackend default_backend\n") :].split("{%-", 1)[0]
    text = f"{DEFAULTS}frontend front\n  bind {{front}}\n  default_backend default_backend\n{section}"
    with haproxy(tmp_path / "haproxy.cfg", text) as port:
        status, kind, retry_after, body = ask(port, "/v1/chat/completions")
    assert (status, kind, retry_after) == (503, "application/json", "1")
    assert json.loads(body)["error"]["message"] == "No Router can be reached."


# --- Where it is -------------------------------------------------------------------------------------


def test_without_a_haproxy_it_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLAZE_HAPROXY_BINARY", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EnvironmentProblem, match="HAProxy"):
        deployments.data_plane.haproxy_binary()
