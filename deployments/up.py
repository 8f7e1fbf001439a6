"""`blaze up`: check, prepare the models, start a cluster, deploy, and stay until told to stop."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from blaze.config import (
    APP_NAME,
    ROUTER_NAME,
    BlazeConfig,
    ModelConfig,
    blaze_application,
    cache_dir,
    load_serve_config,
    parse_args,
)
from blaze.errors import ConfigError, EnvironmentProblem
from blaze.models.cache import is_converted, local_model
from blaze.models.memory import replica_bytes
from blaze.models.sources import check_sources, parse_source
from blaze.records import ClusterRecord, remove_record, write_record
from blaze.types import EngineKind
from deployments.graceful_stop import let_finish
from deployments.local import ApplicationProgress, LocalCluster
from deployments.signals import Stopped, ignore_signals, stop_on_signals, stopping_on_signals

_POLL_S = 0.25
_PATIENCE = 10  # seconds without an answer from Ray


def up(path: Path, port: int | None, console: Console, *, grace_s: float = 30.0) -> None:
    """Run until SIGINT, SIGTERM or SIGHUP, and then ``grace_s`` longer at the most, for what is being
    answered; a second signal ends that at once. Raises :class:`blaze.errors.BlazeError` when it cannot start.

    Whatever happens, every process that was started is gone when this returns.
    """
    serve_config = load_serve_config(path)
    application = blaze_application(serve_config)
    config = parse_args(application.get("args") or {})
    check_sources(config)
    host, port = _listen(serve_config, port)
    check_port(host, port)
    check_resources(config)
    check_memory(config)
    cluster = LocalCluster(request_timeout_s=config.router.request_timeout_s)
    url = f"http://{host}:{port}{(application.get('route_prefix') or '/').rstrip('/')}"
    with stopping_on_signals(), ExitStack() as undo:
        undo.callback(_stop_cluster, cluster, console)  # before the start: it may be cut off anywhere
        _record(cluster, grace_s, url="")  # so that `blaze down` finds what is only beginning
        prepare_models(config, console)
        with console.status("Starting Ray"):
            cluster.start()
        stop_on_signals()  # again: Ray has put its own handlers in their place
        _record(cluster, grace_s, url=url)
        # Read when Serve is imported, below: this process has no event loop for Serve's router to share.
        os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "1")
        cluster.deploy(serve_config)
        app_name = application.get("name", APP_NAME)
        try:
            wait_until_ready(cluster, app_name, url, console)
            announce(config, url, cluster, console)
            _watch(cluster)
        except Stopped:
            stop_on_signals()  # a second one ends the wait
            if may_be_serving(cluster, app_name):
                _let_finish(cluster, app_name, grace_s, console)


def _record(cluster: LocalCluster, grace_s: float, *, url: str) -> None:
    me = psutil.Process()
    write_record(
        ClusterRecord(
            cluster.cluster_id, me.pid, me.create_time(), cluster.address, cluster.dashboard, url, grace_s
        )
    )


class Progressing(Protocol):
    def progress(self, app_name: str = APP_NAME) -> ApplicationProgress: ...


def may_be_serving(cluster: Progressing, app_name: str) -> bool:
    """A Router is there: one model may be served while another one still loads."""
    try:
        deployments = cluster.progress(app_name).deployments
    except EnvironmentProblem:  # it may the next time
        return True
    return any(found.name == ROUTER_NAME and found.running for found in deployments)


def _let_finish(cluster: LocalCluster, app_name: str, grace_s: float, console: Console) -> None:
    from ray import serve  # noqa: F401  # first: importing it sets the level of its log

    from blaze.client import connect

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with console.status("Stopping") as status:
        try:
            # By handle: whoever started the cluster needs no administrator's key to stop it.
            client = connect(cluster.address, app_name=app_name)
        except EnvironmentProblem:  # it was deleted meanwhile: nothing runs
            return
        done = let_finish(client, grace_s, lambda text: status.update(f"{text} (again: at once)"))
    if not done:
        console.print(f"Not everything was answered within {grace_s:g} s.")


def _watch(cluster: LocalCluster) -> None:
    """Until a signal. Raises :class:`EnvironmentProblem` when the cluster dies by itself."""
    silent = 0
    while silent < _PATIENCE:
        time.sleep(1.0)
        silent = 0 if cluster.is_alive() else silent + 1
    raise EnvironmentProblem("Ray has died; its processes are being stopped")


def _stop_cluster(cluster: LocalCluster, console: Console) -> None:
    ignore_signals()
    with console.status("Stopping"):
        cluster.disconnect()
        ignore_signals()  # again: Ray has put the system's own handler of SIGTERM in their place
        cluster.stop()
    remove_record(cluster.cluster_id)


def _listen(serve_config: dict[str, Any], port: int | None) -> tuple[str, int]:
    """Where HTTP will listen; ``--port`` wins over the file, and the default host is this machine only."""
    options = serve_config.get("http_options") or {}
    if not isinstance(options, dict):
        raise ConfigError(f"http_options: expected a mapping (got {options!r})")
    chosen = port if port is not None else options.get("port", 8000)
    if not isinstance(chosen, int) or not 1 <= chosen <= 65535:
        raise ConfigError(f"http_options.port: expected a port number (got {chosen!r})")
    host = str(options.get("host") or "127.0.0.1")
    serve_config["http_options"] = options | {"host": host, "port": chosen}
    return host, chosen


def check_port(host: str, port: int) -> None:
    """Raises :class:`EnvironmentProblem` when something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot listen on {host}:{port}: {error.strerror}; try --port"
            ) from None


def check_resources(config: BlazeConfig) -> None:
    """Raises :class:`EnvironmentProblem` when the replicas could never all be placed on this machine."""
    cpus = sum(model.resources.num_cpus * _replicas(model) for model in config.models)
    have = os.cpu_count() or 1
    if cpus > have:
        raise EnvironmentProblem(f"the replicas ask for {cpus:g} CPUs, this machine has {have}: see num_cpus")
    gpus = sum(model.resources.num_gpus * _replicas(model) for model in config.models)
    if gpus and gpus > (have := _gpus()):
        raise EnvironmentProblem(f"the replicas ask for {gpus:g} GPUs, this machine has {have}: see num_gpus")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _replicas(model: ModelConfig) -> int:
    return model.autoscaling.min_replicas if model.autoscaling else model.replicas or 1


def check_memory(config: BlazeConfig) -> None:
    """Raises :class:`EnvironmentProblem` when the models on the CPU cannot fit into what is free now."""
    on_cpu = [model for model in config.models if model.resources.num_gpus == 0]
    needed = sum(replica_bytes(model) * _replicas(model) for model in on_cpu)
    free = psutil.virtual_memory().available
    if needed > free:
        raise EnvironmentProblem(
            f"too little memory: the models need about {needed / 2**30:.1f} GiB, "
            f"and {free / 2**30:.1f} GiB are free"
        )


def prepare_models(config: BlazeConfig, console: Console) -> None:
    """Convert what has to be converted, once, with a progress bar, before anything is started."""
    for model in config.models:
        source = None if model.source is None else parse_source(model.source, revision=model.revision)
        if source is None or is_converted(source, cache_dir()):
            continue
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(f"{model.name}: converting, once", total=3)

            def show(what: str, step: int, total: int, task: Any = task, name: str = model.name) -> None:
                bar.update(task, description=f"{name}: {what}", completed=step, total=total)

            local_model(source, cache_dir(), show)


def wait_until_ready(cluster: LocalCluster, app_name: str, url: str, console: Console) -> None:
    """Shows what is loading. Raises :class:`EnvironmentProblem` when Serve gives up, or Ray falls silent."""
    started = heard = time.monotonic()
    with console.status("Deploying") as status:
        while True:
            try:
                progress = cluster.progress(app_name)
                heard = time.monotonic()
            except EnvironmentProblem:  # two busy cores may leave it without an answer now and then
                if time.monotonic() - heard > _PATIENCE:
                    raise
                continue
            if progress.status == "DEPLOY_FAILED":
                raise EnvironmentProblem(f"the deployment failed: {_reason(progress)}")
            if progress.status == "RUNNING" and _answers(f"{url}/ready"):
                return
            waiting = [d for d in progress.deployments if d.running < d.wanted]
            shown = ", ".join(f"{d.name} {d.running}/{d.wanted} {d.message}".strip() for d in waiting)
            status.update(f"Loading {shown or 'the application'} ({time.monotonic() - started:.0f} s)")
            time.sleep(_POLL_S)


def _reason(progress: ApplicationProgress) -> str:
    messages = [d.message for d in progress.deployments if d.message] or [progress.message]
    return " ".join(messages[0].split())[-2000:]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200  # no proxy on the way
    except httpx.HTTPError:
        return False


def announce(config: BlazeConfig, url: str, cluster: LocalCluster, console: Console) -> None:
    names = ", ".join(model.name for model in config.models)
    console.print(f"[bold green]Blaze is ready[/]  {url}  ({names})")
    console.print(_example(config, url), soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"Changes: RAY_AUTH_MODE=token serve deploy FILE -a {cluster.dashboard}. End: Ctrl-C or `blaze down`."
    )


def _example(config: BlazeConfig, url: str) -> str:
    """A curl line that the first model answers."""
    model = config.models[0]
    body: dict[str, Any]
    if model.engine is EngineKind.DIFFUSION:
        path, body = "/v1/images/generations", {"model": model.name, "prompt": "a red seven on white"}
    else:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        path, body = "/v1/chat/completions", {"model": model.name, "messages": question}
    return f"curl {url}{path} -H 'content-type: application/json' -d '{json.dumps(body)}'"
