from __future__ import annotations

import base64
import json
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from blaze.api.report import status_object
from blaze.api.service import ModelCard, Readiness
from blaze.cli import app, base_url
from blaze.health.view import ClusterView, ReplicaHealth
from blaze.records import ClusterRecord, remove_record, write_record
from blaze.reports import (
    TTFT_BUCKETS_S,
    BreakerEvent,
    ModelCounters,
    ReplicaCounters,
    ReplicaState,
    RouterReport,
)
from blaze.types import EngineKind
from tests.samples import heartbeat

CONFIG = """
applications:
  - name: blaze
    route_prefix: /
    import_path: deployments.app:build_app
    args:
      models: [{name: sim, engine: simulator, %s}]
"""


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that runs on this machine is seen, or stopped."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def assert_one_line(result: Result, *says: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("blaze: ")
    assert all(word in lines[0] for word in says)


def test_up_with_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert_one_line(run("up", str(tmp_path / "missing.yaml")), "missing.yaml", "No such file")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("replicas: 0", ["models[0].replicas"]),
        ("wieght: 2", ["models[0].wieght"]),
        ("llm: {threads: 2}", ["models[0]", "llm"]),
    ],
)
def test_case_27_up_with_a_wrong_field_names_it(tmp_path: Path, fields: str, says: Sequence[str]) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(CONFIG % fields)
    assert_one_line(run("up", str(path)), *says)


def test_up_with_a_missing_model_names_it(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(CONFIG.replace("simulator", "llm") % "source: /nowhere/at/all")
    assert_one_line(run("up", str(path)), "models[0].source", "/nowhere/at/all")


def test_up_on_a_port_in_use_says_so(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(CONFIG % "replicas: 1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert_one_line(run("up", str(path), "--port", port), port, "--port")


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_up_with_an_impossible_port_is_a_usage_error(port: str) -> None:
    result = run("up", "--port", port)
    assert result.exit_code == 2
    assert "--port" in result.stderr


@pytest.mark.parametrize("name", ["seven.gif", "seven", "seven.png.txt"])
def test_image_to_a_file_of_no_known_format_is_one_line(name: str) -> None:
    assert_one_line(run("image", "a seven", "-o", name), name, ".png")


def test_down_without_a_cluster_does_nothing() -> None:
    result = run("down")
    assert (result.exit_code, result.stdout) == (0, "nothing runs\n")


@pytest.mark.parametrize("args", [["fly"], ["image"], ["chat", "--temperature", "3", "hi"]])
def test_wrong_usage_exits_with_2(args: list[str]) -> None:
    assert run(*args).exit_code == 2


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("up", "down", "status", "chat", "image", "doctor"))


def test_the_base_url_is_the_given_one_then_the_newest_cluster_then_port_8000(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert base_url("http://host:9000/") == "http://host:9000"
    write_record(
        ClusterRecord("c1", 7, 1.0, "127.0.0.1:6379", "http://127.0.0.1:8265", "http://127.0.0.1:8123")
    )
    monkeypatch.setattr("blaze.records.is_running", lambda record: record.pid == 7)
    assert base_url(None) == "http://127.0.0.1:8123"
    assert base_url("http://other") == "http://other"
    remove_record("c1")
    assert base_url(None) == "http://127.0.0.1:8000"


@contextmanager
def management(
    *, status: int = 200, cluster: dict[str, Any] | None = None, clusters: Sequence[dict[str, Any]] = ()
) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """A server that notes what it is asked: path, body, authorization. ``cluster``: its answer to GET, or
    ``clusters``: to one after another."""
    answers = iter(clusters)
    asked: list[tuple[str, str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, "", self.headers.get("authorization", "")))
            self.reply(json.dumps(cluster or next(answers)).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            asked.append((self.path, body, self.headers.get("authorization", "")))
            answer = (
                b'{"done": true}' if status == 200 else b'{"error": {"message": "There is no such thing."}}'
            )
            self.reply(answer)

        def reply(self, answer: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_args: object) -> None:
            """Not on the test's own output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("command", "path", "body"),
    [
        (["route", "m", "adaptive"], "strategy", {"model": "m", "strategy": "adaptive"}),
        (["drain", "a/b c", "--no-wait"], "replicas/a%2Fb%20c/drain", {"draining": True, "timeout_s": None}),
        (["drain", "a", "--undo"], "replicas/a/drain", {"draining": False, "timeout_s": None}),
        (["drain", "--all", "--timeout", "2.5", "--no-wait"], "drain", {"draining": True, "timeout_s": 2.5}),
        (["drain", "--all", "--undo"], "drain", {"draining": False, "timeout_s": None}),
    ],
)
def test_changes_are_sent_to_the_management_api(
    command: list[str], path: str, body: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLAZE_API_KEY", "sk-boss")
    with management() as (url, asked):
        assert run(*command, "--url", url).exit_code == 0
    ((found, sent, key),) = asked
    assert (found, json.loads(sent), key) == (f"/api/v1/blaze/{path}", body, "Bearer sk-boss")


def test_a_change_that_is_refused_is_one_line() -> None:
    with management(status=404) as (url, _asked):
        assert_one_line(run("drain", "nobody", "--url", url), "There is no such thing.")


# --- drain -------------------------------------------------------------------------------------------


def draining_cluster(
    *replicas: tuple[str, str, str, int],
    unheard: Sequence[tuple[str, str, bool, int]] = (),
    complete: bool = True,
    draining: bool = False,
    answers: int = 0,
) -> dict[str, Any]:
    """``replicas``: id, node, state, in flight; ``unheard``: id, node, draining, in flight."""
    names, others = ("id", "node", "state", "in_flight"), ("id", "node", "draining", "in_flight")
    return {
        "replicas": [dict(zip(names, replica, strict=True)) for replica in replicas],
        "unheard": [dict(zip(others, replica, strict=True)) for replica in unheard],
        "complete": complete,
        "models": [{"open": answers}],
        "draining": draining,
    }


def test_drain_ends_when_nothing_is_in_flight_there() -> None:
    steps = [
        draining_cluster(("a", "n", "ready", 3), ("b", "n", "ready", 9)),  # a Router does not know yet
        draining_cluster(complete=False),  # the health actor is away
        draining_cluster(("a", "n", "draining", 0), complete=False),  # it is back, and a Router is missing
        draining_cluster(("b", "n", "ready", 9), unheard=[("a", "n", False, 0)]),
        draining_cluster(("b", "n", "ready", 9), unheard=[("a", "n", True, 5), ("c", "n", False, 1)]),
        draining_cluster(("a", "n", "draining", 1), ("b", "n", "ready", 9)),
        draining_cluster(("a", "n", "draining", 0), ("b", "n", "ready", 9)),
    ]
    with management(clusters=steps) as (url, asked):
        result = run("drain", "a", "--url", url)
    assert result.exit_code == 0
    assert [path.rsplit("/", 1)[1] for path, _, _ in asked] == ["drain"] + ["status"] * 7
    assert result.stdout.splitlines() == ["a: gets no new requests", "a: nothing runs there"]


def test_a_node_is_named_by_its_first_letters_and_drained_with_all_that_is_on_it() -> None:
    nodes = (("a", "abc1", "ready", 1), ("b", "abc2", "ready", 1), ("c", "abc1", "draining", 1))
    steps = [
        draining_cluster(*nodes),
        draining_cluster(*nodes),
        draining_cluster(("a", "abc1", "draining", 0), nodes[1], ("c", "abc1", "suspect", 2)),
        draining_cluster(("a", "abc1", "draining", 0), nodes[1]),
    ]
    with management(clusters=steps) as (url, asked):
        result = run("drain", "--node", "abc1", "--url", url)
    assert result.exit_code == 0
    assert [path.removeprefix("/api/v1/blaze/") for path, _, _ in asked] == [
        "replicas",
        "nodes/abc1/drain",
        *["status"] * 3,
    ]
    with management(clusters=steps) as (url, asked):
        assert_one_line(run("drain", "--node", "abc", "--url", url), "abc", "2 nodes")
        assert len(asked) == 1


def test_drain_all_ends_when_no_answer_is_being_given() -> None:
    steps = [
        draining_cluster(answers=0),
        draining_cluster(draining=True, answers=2),
        draining_cluster(draining=True),
    ]
    with management(clusters=steps) as (url, asked):
        assert run("drain", "--all", "--url", url).exit_code == 0
    assert len(asked) == 4


@pytest.mark.parametrize("args", [[], ["a", "--all"], ["a", "--node", "n"], ["--node", "n", "--all"]])
def test_exactly_one_thing_is_drained(args: list[str]) -> None:
    with management() as (url, asked):
        assert_one_line(run("drain", *args, "--url", url), "--node", "--all")
    assert asked == []


@pytest.mark.parametrize("seconds", ["nan", "-1", "inf"])
def test_no_number_of_seconds_is_one_line(seconds: str) -> None:
    with management() as (url, asked):
        assert_one_line(run("drain", "a", "--timeout", seconds, "--url", url), "timeout_s")
    assert asked == []


# --- status ------------------------------------------------------------------------------------------


def cluster() -> dict[str, Any]:
    """As the API gives it. No two numbers of a replica are alike, so that none can stand for another."""
    draining = ReplicaCounters("sim#a", "sim", 3, 0.5, 120, 7, 415.4, 87.6, draining=True)
    tripped = ReplicaCounters("sim#b", "sim", 0, 2.0, 64, 5, 0.0, None, breaker="open")
    chat = ModelCounters(
        model="sim",
        strategy="adaptive",
        waiting=11,
        outcomes=(("failure", 12), ("success", 172)),
        prompt_tokens=5000,
        completion_tokens=900,
        images=0,
        ttft_buckets=(0,) * len(TTFT_BUCKETS_S),
        ttft_sum_s=4.2,
        events=(BreakerEvent("sim", "sim#b", "closed", "open", "5 failures in a row", 12.5),),
    )
    beats = (
        replace(heartbeat("sim#a", model="sim"), pid=901, memory_bytes=150 << 20),
        replace(heartbeat("sim#b", model="sim", rank=1), pid=902, memory_bytes=140 << 20),
        replace(heartbeat("draw#c", model="draw", state="loading"), pid=903, memory_bytes=2100 << 20),
    )
    states = (ReplicaState.READY, ReplicaState.READY, ReplicaState.STARTING)
    view = ClusterView(
        tuple(ReplicaHealth(beat, state, 0.2) for beat, state in zip(beats, states, strict=True)),
        (RouterReport("r1", (chat,), (draining, tripped)),),
    )
    cards = [ModelCard("sim", EngineKind.SIMULATOR, 0), ModelCard("draw", EngineKind.DIFFUSION, 0)]
    return status_object(cards, view, Readiness(("draw",)))


def tables(printed: str) -> list[list[dict[str, str]]]:
    """Each printed table as its rows, by heading."""
    found: list[list[dict[str, str]]] = []
    headings: list[str] = []
    for line in printed.splitlines():
        cells = [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]
        if line.startswith("┃"):
            headings = cells
            found.append([])
        elif line.startswith("│"):
            found[-1].append(dict(zip(headings, cells, strict=True)))
    return found


def test_status_shows_each_value_under_its_own_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blaze.cli.console", Console(width=200))  # nothing is wrapped
    with management(cluster=cluster()) as (url, asked):
        shown = run("status", "--url", url)
    assert (shown.exit_code, asked) == (0, [("/api/v1/blaze/status", "", "")])
    models, replicas = tables(shown.stdout)
    assert models == [
        {"model": "sim", "engine": "simulator", "strategy": "adaptive", "ready": "2/2", "waiting": "11"},
        {"model": "draw", "engine": "diffusion", "strategy": "", "ready": "0/1", "waiting": "0"},
    ]
    assert replicas == [
        {
            "replica": "sim#a",
            "model": "sim",
            "node": "node-1",
            "pid": "901",
            "state": "draining",
            "breaker": "closed",
            "in flight": "3",
            "weight": "0.5",
            "EWMA": "88 ms",
            "cost": "415",
            "requests": "120",
            "failures": "7",
            "memory": "150 MiB",
        },
        {
            "replica": "sim#b",
            "model": "sim",
            "node": "node-1",
            "pid": "902",
            "state": "ready",
            "breaker": "open",
            "in flight": "0",
            "weight": "2",
            "EWMA": "",
            "cost": "0",
            "requests": "64",
            "failures": "5",
            "memory": "140 MiB",
        },
        {
            "replica": "draw#c",
            "model": "draw",
            "node": "node-1",
            "pid": "903",
            "state": "starting",
            "breaker": "closed",
            "in flight": "0",
            "weight": "",
            "EWMA": "",
            "cost": "0",
            "requests": "0",
            "failures": "0",
            "memory": "2100 MiB",
        },
    ]


def test_status_as_json_is_what_the_api_gives() -> None:
    with management(cluster=cluster()) as (url, _asked):
        shown = run("status", "--json", "--url", url)
    assert json.loads(shown.stdout) == cluster()


# --- Images ------------------------------------------------------------------------------------------

PICTURE = base64.b64encode(b"pixels").decode()


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "b64_json": PICTURE, "size": "32x32", "index": 0} | fields


@contextmanager
def drawing(*events: dict[str, Any], status: int = 200) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server that streams these events, and notes what it is asked: path and body."""
    asked: list[tuple[str, bytes]] = []
    written = "".join(f"event: {e.get('type')}\ndata: {json.dumps(e)}\n\n" for e in events)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(
                b'{"models": [{"name": "llm", "engine": "llm"}, {"name": "d", "engine": "diffusion"}]}', 200
            )

        def do_POST(self) -> None:
            asked.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self._answer(written.encode() if status == 200 else json.dumps(events[0]).encode(), status)

        def _answer(self, body: bytes, status: int) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            """Not on the test's own output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_image_writes_what_was_drawn_and_says_its_seed(tmp_path: Path) -> None:
    target = tmp_path / "seven.jpg"
    events = ({"type": "blaze.progress", "step": 1, "total": 2}, event("image_generation.completed", seed=7))
    with drawing(*events) as (url, asked):
        result = run(
            "image", "a seven", "-o", str(target), "--url", url, "--scheduler", "euler", "--seed", "7"
        )
    assert result.exit_code == 0, result.output
    assert target.read_bytes() == b"pixels"
    assert result.stdout.split() == [str(target), "32x32,", "seed", "7"]
    ((path, body),) = asked
    assert path == "/v1/images/generations"
    assert json.loads(body) == {
        "model": "d",
        "prompt": "a seven",
        "n": 1,
        "seed": 7,
        "scheduler": "euler",
        "output_format": "jpeg",
        "partial_images": 0,
        "progress": True,
        "stream": True,
    }


def test_image_writes_several_images_and_their_previews_to_files_of_their_own(tmp_path: Path) -> None:
    events = [event("image_generation.partial_image", index=i, partial_image_index=0) for i in (0, 1)]
    events += [event("image_generation.completed", index=i, seed=i) for i in (1, 0)]
    with drawing(*events) as (url, asked):
        args = ("--n", "2", "--partial", "1", "--guidance-scale", "3", "--negative-prompt", "blurry")
        result = run("image", "a seven", "-o", str(tmp_path / "a.png"), "--url", url, *args)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        *("a-1-partial-0.png", "a-1.png", "a-2-partial-0.png", "a-2.png"),
    ]
    sent = json.loads(asked[0][1])
    assert (sent["n"], sent["partial_images"], sent["guidance_scale"], sent["negative_prompt"]) == (
        2,
        1,
        3,
        "blurry",
    )


def test_image_edits_a_file_with_a_mask(tmp_path: Path) -> None:
    given, mask, target = tmp_path / "given.png", tmp_path / "mask.png", tmp_path / "out.webp"
    given.write_bytes(b"given-bytes")
    mask.write_bytes(b"mask-bytes")
    with drawing(event("image_edit.completed", seed=1)) as (url, asked):
        args = (
            "--image",
            str(given),
            "--mask",
            str(mask),
            "--strength",
            "0.5",
            "-o",
            str(target),
            "--url",
            url,
        )
        result = run("image", "a seven", *args)
    assert result.exit_code == 0, result.output
    assert target.read_bytes() == b"pixels"
    ((path, body),) = asked
    assert path == "/v1/images/edits"
    assert b"given-bytes" in body and b"mask-bytes" in body
    assert b'name="strength"\r\n\r\n0.5\r\n' in body
    assert b'name="stream"\r\n\r\ntrue\r\n' in body
    assert b'name="seed"' not in body


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--image", "/nowhere/a.png"), "/nowhere/a.png"),
        (("--mask", "/nowhere/a.png"), "--image"),
    ],
)
def test_image_of_a_file_that_there_is_not_is_one_line(
    tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    with drawing() as (url, asked):
        assert_one_line(run("image", "a seven", "-o", str(tmp_path / "a.png"), "--url", url, *args), says)
    assert asked == []


def test_an_error_is_one_line_whether_it_comes_first_or_after_a_preview(tmp_path: Path) -> None:
    error = {"error": {"message": "It broke."}}
    target = str(tmp_path / "a.png")
    with drawing(error, status=400) as (url, _asked):
        assert_one_line(run("image", "a seven", "-o", target, "--url", url), "It broke.")
    with drawing(event("image_generation.partial_image", partial_image_index=0), error) as (url, _asked):
        result = run("image", "a seven", "-o", target, "--url", url, "--partial", "1")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["blaze: It broke."]
    assert not Path(target).exists()
