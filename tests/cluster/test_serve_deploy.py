"""`serve deploy` on a Ray cluster that somebody else started, with Serve's stock data plane."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.local import MARKER, free_port, sweep
from tests.cluster.served import answers, serve_config, simulator
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class StartedRay:
    address: str
    dashboard: str
    environment: dict[str, str]

    def serve(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "serve", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def deploy(self, config: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
        path = folder / f"{uuid.uuid4().hex}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return self.serve("deploy", str(path), "-a", self.dashboard)

    def application(self) -> dict[str, Any]:
        shown = self.serve("status", "-a", self.dashboard)
        application: dict[str, Any] = yaml.safe_load(shown.stdout)["applications"]["blaze"]
        return application


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedRay]:
    """`ray start --head`, as an operator would; ended by its marker: `ray stop` would end every Ray."""
    marker = uuid.uuid4().hex
    port, dashboard = free_port(), free_port()
    environment = os.environ | {MARKER: marker, "RAY_AUTH_MODE": "token"}
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        "--num-cpus=4",
    ]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    command += [f"--temp-dir=/tmp/blaze-{marker[:8]}", "--object-store-memory=200000000"]
    # A token of the user's own, as `ray start` leaves it; made here when there is none yet.
    subprocess.run(
        [BIN / "ray", "get-auth-token", "--generate"], env=environment, capture_output=True, check=True
    )
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
        yield StartedRay(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
    finally:
        sweep(marker)
        subprocess.run(["rm", "-rf", f"/tmp/blaze-{marker[:8]}"], check=False)


@pytest.fixture(scope="module")
def deployed(ray_cluster: StartedRay, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The simulator behind the Router; gives its URL."""
    port = free_port()
    sent = ray_cluster.deploy(serve_config(port, [simulator(tokens=4)]), tmp_path_factory.mktemp("config"))
    assert sent.returncode == 0, sent.stderr
    url = f"http://127.0.0.1:{port}"
    eventually(lambda: answers(f"{url}/ready"), within_s=120, every_s=0.25)
    return url


def test_it_answers_over_http(deployed: str) -> None:
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
    response = httpx.post(f"{deployed}/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 4
    assert len(response.headers.get_list("x-request-id")) == 1
    assert "x-blaze-replica" in response.headers


def test_another_process_calls_it_by_handle(deployed: str, ray_cluster: StartedRay) -> None:
    program = """
import json, blaze
client = blaze.connect(ADDRESS)
whole = client.generate("sim", "hi", seed=5)
streamed = "".join(client.stream("sim", "hi", seed=5))
try:
    client.generate("nope", "hi")
except blaze.errors.BlazeError as error:
    refused = error.code
print(json.dumps([whole.text, streamed, refused, client.status()["ready"]]))
""".replace("ADDRESS", repr(ray_cluster.address))
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=ray_cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    whole, streamed, refused, ready = json.loads(ran.stdout.splitlines()[-1])
    assert whole == streamed and len(whole.split()) == 4
    assert refused == "model_not_found"
    assert ready is True


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"engine": "magic"}, "models[0].engine"),
        ({"simulator": {"slots": -1}}, "models[0].simulator.slots"),
        ({"simulator": None, "engine": "llm", "source": "/no/such/folder"}, "models[0].source"),
    ],
)
def test_a_wrong_config_is_refused_by_name_and_the_old_one_serves_on(
    deployed: str, ray_cluster: StartedRay, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    config = serve_config(int(deployed.rpartition(":")[2]), [simulator(tokens=4) | change])
    ray_cluster.deploy(config, tmp_path)

    def refusal() -> str | None:
        application = ray_cluster.application()
        return application["message"] if application["status"] == "DEPLOY_FAILED" else None

    assert named in eventually(refusal, within_s=60, every_s=0.5)
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
    assert httpx.post(f"{deployed}/v1/chat/completions", json=body).status_code == 200


@pytest.mark.models
def test_the_default_config_deploys_as_it_is(deployed: str, ray_cluster: StartedRay, tmp_path: Path) -> None:
    """In place of what runs: one `serve deploy` changes the models behind the same URL."""
    config = yaml.safe_load(Path("serve_config.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = int(deployed.rpartition(":")[2])
    assert ray_cluster.deploy(config, tmp_path).returncode == 0
    body = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    url = f"{deployed}/v1/chat/completions"

    def answer() -> str | None:
        response = httpx.post(url, json=body | {"temperature": 0, "max_tokens": 16}, timeout=60)
        return response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else None

    assert "Paris" in eventually(answer, within_s=180, every_s=0.5)
