"""`blaze up` ends in good order: nothing of it is left, whenever it is told to stop."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import yaml

from deployments.local import free_port
from tests.cluster.blaze_up import BlazeUp, blaze_up
from tests.cluster.served import answers, serve_config, simulator
from tests.cluster.sse import read
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

SHORT, LONG = 80, 600  # tokens: 4 s, and 30


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(serve_config(free_port(), [simulator(replicas=2)])), encoding="utf-8")
    return path


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Two replicas whose answers take 0.05 s a token."""
    model = simulator(replicas=2, inter_token_ms=50, tokens=LONG, slots=16)
    path = tmp_path / "slow_config.yaml"
    path.write_text(yaml.safe_dump(serve_config(free_port(), [model], replicas=2)), encoding="utf-8")
    return path


def _url(config: Path) -> str:
    port = yaml.safe_load(config.read_text(encoding="utf-8"))["http_options"]["port"]
    return f"http://127.0.0.1:{port}"


def _names(run: BlazeUp) -> set[str]:
    names = set()
    for process in run.descendants():
        try:
            names.add(" ".join(process.cmdline()) or process.name())
        except psutil.NoSuchProcess:
            continue
    return names


def _ray_is_starting(run: BlazeUp) -> bool:
    return any("gcs_server" in name for name in _names(run))


def _replicas_are_loading(run: BlazeUp) -> bool:
    return any("ServeReplica" in name for name in _names(run))


def _at_rest(run: BlazeUp) -> bool:
    return "Blaze is ready" in run.output()


@pytest.mark.parametrize("moment", [_ray_is_starting, _replicas_are_loading, _at_rest])
def test_ctrl_c_leaves_no_process_behind(
    tmp_path: Path, config: Path, moment: Callable[[BlazeUp], bool]
) -> None:
    with blaze_up(tmp_path, str(config)) as run:
        eventually(lambda: moment(run), within_s=90, every_s=0.02)
        _interrupt_and_expect_nothing_left(run, tmp_path)


@pytest.mark.models
def test_ctrl_c_while_the_real_models_load_leaves_no_process_behind(tmp_path: Path) -> None:
    with blaze_up(tmp_path, "serve_config.yaml", "--port", str(free_port())) as run:
        # The first heartbeat, and with it the title, comes before the weights: both are loading now.
        eventually(lambda: sum("ServeReplica:blaze:llm" in name for name in _names(run)) == 2, within_s=120)
        assert not _at_rest(run)
        _interrupt_and_expect_nothing_left(run, tmp_path)


@pytest.mark.models
def test_ctrl_c_while_a_model_is_converted_leaves_no_half_of_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with blaze_up(
        tmp_path, "serve_config.yaml", "--port", str(free_port()), environment={"BLAZE_CACHE": str(cache)}
    ) as run:
        eventually(lambda: list(cache.glob("converted/*.lock")), within_s=60)
        run.interrupt()
        assert run.process.wait(timeout=60) == 0, run.output()
        assert run.descendants() == []
        assert [path for path in cache.glob("converted/*") if path.is_dir()] == []


def _interrupt_and_expect_nothing_left(run: BlazeUp, folder: Path) -> None:
    assert run.descendants()  # or there would be nothing to show
    run.interrupt()
    assert run.process.wait(timeout=60) == 0, run.output()
    assert run.descendants() == []
    assert list((folder / "state").glob("**/*.json")) == []


def test_what_runs_when_it_is_told_to_stop_finishes_or_is_told_so(tmp_path: Path, slow: Path) -> None:
    url = _url(slow)
    with blaze_up(tmp_path, str(slow), "--grace", "6") as run, ThreadPoolExecutor(12) as pool:
        run.wait_for("Blaze is ready")
        short = [pool.submit(read, url, number, max_tokens=SHORT) for number in range(4)]
        long = [pool.submit(read, url, number) for number in range(4)]
        whole = pool.submit(_ask, url)
        eventually(lambda: _in_flight(url) == 9)
        run.terminate()
        eventually(lambda: _refusal(url) == "draining", within_s=5.0)
        assert all(future.result().is_whole for future in short)
        for told in (future.result() for future in long):
            assert told.is_ended_by_an_error
            assert told.error_code == "draining"
        response = whole.result()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert response.headers["retry-after"]
        assert run.process.wait(timeout=60) == 0, run.output()
        assert run.descendants() == []
        assert list((tmp_path / "state").glob("**/*.json")) == []


def test_what_one_model_answers_while_another_does_not_load_finishes_too(tmp_path: Path) -> None:
    answering = simulator(replicas=1, inter_token_ms=50, tokens=SHORT)
    never = simulator("never", replicas=2, fail_load=True)
    path = tmp_path / "half_config.yaml"
    path.write_text(yaml.safe_dump(serve_config(free_port(), [answering, never])), encoding="utf-8")
    url = _url(path)
    with blaze_up(tmp_path, str(path)) as run, ThreadPoolExecutor(1) as pool:
        eventually(lambda: answers(f"{url}/health") and _refusal(url) is None, within_s=90)
        told = pool.submit(read, url, 0)
        eventually(lambda: _in_flight(url) == 1)
        run.terminate()
        assert told.result().is_whole
        assert not _at_rest(run)
        assert run.process.wait(timeout=60) == 0, run.output()
        assert run.descendants() == []


def test_told_twice_it_does_not_wait(tmp_path: Path, slow: Path) -> None:
    url = _url(slow)
    with blaze_up(tmp_path, str(slow), "--grace", "3600") as run, ThreadPoolExecutor(2) as pool:
        run.wait_for("Blaze is ready")
        long = [pool.submit(read, url, number) for number in range(2)]
        eventually(lambda: _in_flight(url) == 2)
        assert run.run("down", "--now").returncode == 0
        assert not any(future.result().is_whole for future in long)
        assert run.process.wait(timeout=60) == 0, run.output()
        assert run.descendants() == []


def _in_flight(url: str) -> int:
    status = httpx.get(f"{url}/api/v1/blaze/status", timeout=10).json()
    return sum(replica["in_flight"] for replica in status["replicas"])


def _ask(url: str) -> httpx.Response:
    body = {"model": "sim", "messages": [{"role": "user", "content": "hello"}]}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=90)


def _refusal(url: str) -> str | None:
    body = {"model": "sim", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=10)
    return response.json()["error"]["code"] if response.status_code == 503 else None


def test_it_listens_on_this_machine_only(tmp_path: Path, config: Path) -> None:
    with blaze_up(tmp_path, str(config)) as run:
        run.wait_for("Blaze is ready")
        listening = run.listening()
        assert len(listening) > 5
        # Serve's own servers for calls between replicas know no address: they ask for the cluster's token.
        loopback = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        open_to_all = [port for address, port in listening if address not in loopback]
        assert [_answer_without_token(port) for port in open_to_all] == [
            grpc.StatusCode.UNAUTHENTICATED for _ in open_to_all
        ]
        folders = list(Path(tempfile.gettempdir()).glob(f"blaze-{_record(tmp_path)['cluster_id'][:8]}"))
        assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700]


def _record(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "state").glob("**/*.json")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def _answer_without_token(port: int) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        try:
            call(b"", timeout=10)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    raise AssertionError(f"port {port} answered a stranger")


def test_down_stops_a_cluster_that_is_only_starting(tmp_path: Path, config: Path) -> None:
    with blaze_up(tmp_path, str(config)) as run:
        eventually(lambda: _ray_is_starting(run), within_s=90, every_s=0.02)
        assert "starting" in run.run("down").stdout
        assert run.process.wait(timeout=60) == 0
        assert run.descendants() == []


def test_a_port_in_use_is_one_line_and_exit_code_2(tmp_path: Path, config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with blaze_up(tmp_path, str(config), "--port", str(port)) as run:
            assert run.process.wait(timeout=60) == 2
            assert run.output().count("\n") == 1 and str(port) in run.output()
            assert run.descendants() == []


def test_a_wrong_config_is_refused_before_anything_starts(tmp_path: Path, config: Path) -> None:
    broken = yaml.safe_load(config.read_text(encoding="utf-8"))
    broken["applications"][0]["args"]["models"][0]["simulator"] = {"slots": 0}
    config.write_text(yaml.safe_dump(broken), encoding="utf-8")
    with blaze_up(tmp_path, str(config)) as run:
        assert run.process.wait(timeout=60) == 2
        assert "models[0].simulator.slots" in run.output() and "(got 0)" in run.output()
        assert run.descendants() == []


def test_down_status_and_chat_find_the_running_cluster(tmp_path: Path, config: Path) -> None:
    with blaze_up(tmp_path, str(config)) as run:
        run.wait_for("Blaze is ready")
        url = _url(config)

        status = run.run("status")
        assert status.returncode == 0 and "2/2" in status.stdout
        spoken = run.run("chat", "hello")
        assert spoken.returncode == 0 and len(spoken.stdout.split()) == 16
        wrong = run.run("chat", "--model", "nope", "hello")
        assert wrong.returncode == 2 and "`nope` does not exist" in wrong.stderr

        down = run.run("down")
        assert down.returncode == 0 and url in down.stdout
        assert run.process.wait(timeout=60) == 0
        assert run.descendants() == []
        assert not answers(f"{url}/health")
