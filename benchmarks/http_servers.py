"""The servers of :mod:`benchmarks.llm_http`, as processes."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from benchmarks.contestants import Contestant
from benchmarks.llm_engine import KV_GIB
from benchmarks.rivals import vllm_cpu
from benchmarks.smollm2 import SOURCE, folder
from deployments.local import free_port

BLAZE, VLLM = "Blaze", ("vLLM default", "vLLM tuned")
MODEL = "smollm2-135m"
START_S = 300.0


@dataclass(frozen=True)
class Server:
    process: Contestant
    url: str  # of its chat endpoint
    ready: str  # answers 200 once it serves


def blaze_server(scratch: Path, *, prefix_caching: bool) -> Server:
    port = free_port()
    model = {
        "name": MODEL,
        "engine": "llm",
        "source": SOURCE,
        "replicas": 1,
        "resources": {"num_cpus": 1},
        "llm": {
            "dtype": "bfloat16",
            "device": "cpu",
            "threads": os.cpu_count() or 1,
            "kv_cache_memory": KV_GIB * 2**30,
            "prefix_caching": prefix_caching,
        },
    }
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "blaze",
                "route_prefix": "/",
                "import_path": "deployments.app:build_app",
                "args": {"models": [model]},
            }
        ],
    }
    path = scratch / "blaze.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "blaze.cli", "up", str(path)]
    environment = {"XDG_STATE_HOME": str(scratch / "state"), "COLUMNS": "200"}
    url = f"http://127.0.0.1:{port}"
    process = Contestant(BLAZE, command, scratch / "blaze.log", environment, logs_output=True)
    return Server(process, f"{url}/v1/chat/completions", f"{url}/ready")


def vllm_server(
    name: str, venv: Path, setup: vllm_cpu.Setup, scratch: Path, *, prefix_caching: bool
) -> Server:
    port = free_port()
    command = [str(venv / "bin" / "vllm"), "serve", str(folder()), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", MODEL, "--dtype", "bfloat16"]
    if not prefix_caching:
        command.append("--no-enable-prefix-caching")
    environment = vllm_cpu.environment(venv, setup, kv_gib=KV_GIB)
    url = f"http://127.0.0.1:{port}"
    process = Contestant(name, command, scratch / f"vllm-{setup}.log", environment, logs_output=True)
    return Server(process, f"{url}/v1/chat/completions", f"{url}/health")


def wait_until_ready(server: Server) -> None:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up:
        if server.process.process.poll() is not None:
            break
        try:
            if httpx.get(server.ready, timeout=2.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"{server.process.name} did not come up:\n{server.process.last_words()}")


def vllm_version(venv: Path) -> str:
    return (
        next((venv / "lib").glob("python*/site-packages/vllm-*.dist-info"))
        .name.split("-")[1]
        .removesuffix(".dist")
    )
