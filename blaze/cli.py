"""The command line: thin wrappers around the local cluster, the HTTP API and the doctor."""

from __future__ import annotations

import base64
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from blaze.drains import drain_body, target, wait_until_idle
from blaze.errors import BlazeError, EnvironmentProblem
from blaze.records import is_running, read_records, remove_record
from blaze.remote import MANAGEMENT, base_url, first_model, get_json, post_json, stream_images, stream_text
from blaze.status_tables import status_tables

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Serve language and diffusion models on Ray."
)
console = Console()
stderr = Console(stderr=True)

MOST_GRACE_S = 86_400  # a day
_CLEAN_UP_S = 60.0  # until `blaze up` itself is killed
_ASK_AGAIN_S = 0.5
DEFAULT_CONFIG = Path("serve_config.yaml")
Url = Annotated[
    str | None, typer.Option(help="Base URL; default: the cluster of `blaze up`, then port 8000.")
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can mend is one line and exit code 2, never a traceback."""
    try:
        yield
    except BlazeError as error:
        stderr.print(f"blaze: {error.message}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (httpx.HTTPError, httpx.InvalidURL, json.JSONDecodeError) as error:
        stderr.print(
            f"blaze: no answer from the server: {error}", highlight=False, markup=False, soft_wrap=True
        )
        raise typer.Exit(2) from None


@app.command()
def up(
    file: Annotated[Path, typer.Argument(help="A Serve config that deploys Blaze.")] = DEFAULT_CONFIG,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="HTTP port; wins over the file.")] = None,
    grace: Annotated[
        float,
        typer.Option(min=0, max=MOST_GRACE_S, help="Seconds that answers may take to finish at the end."),
    ] = 30.0,
) -> None:
    """Start a local Ray, deploy FILE, and serve until Ctrl-C; a second one does not wait for answers."""
    with one_line_errors():
        try:
            from deployments.up import up as run
        except ImportError as error:
            raise EnvironmentProblem(f"Ray is not installed: {error}; pip install 'ray[serve]'") from None
        run(file, port, console, grace_s=grace)


@app.command()
def down(
    now: Annotated[bool, typer.Option("--now", help="Answers that are being given are cut off.")] = False,
) -> None:
    """Stop every cluster that `blaze up` runs on this machine, and nothing else.

    Answers that are being given may finish, within the time that was given to `blaze up`.
    """
    from deployments.local import sweep

    records = read_records()
    for record in records:
        if is_running(record):
            with console.status(f"Stopping {record.url}"):
                _end(record.pid, within_s=_CLEAN_UP_S + (0 if now else record.grace_s), insist=now)
        sweep(record.cluster_id)
        remove_record(record.cluster_id)
        console.print(f"stopped {record.url or 'a cluster that was starting'}")
    if not records:
        console.print("nothing runs")


def _end(pid: int, *, within_s: float, insist: bool) -> None:
    """Ask the process to stop and wait; one that its parent has not collected yet is gone as well.

    ``insist``: ask again, which it takes for haste.
    """
    began, asked_again = time.monotonic(), False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        while process.status() != psutil.STATUS_ZOMBIE:
            waited_s = time.monotonic() - began
            if waited_s > within_s:
                process.kill()
            elif insist and not asked_again and waited_s > _ASK_AGAIN_S:
                process.terminate()
                asked_again = True
            time.sleep(0.05)


@app.command()
def status(
    url: Url = None, as_json: Annotated[bool, typer.Option("--json", help="As the API gives it.")] = False
) -> None:
    """Models and replicas of a running cluster."""
    with one_line_errors():
        body = get_json(f"{base_url(url)}{MANAGEMENT}/status")
    if as_json:
        console.print_json(data=body)
        return
    console.print(*status_tables(body))


@app.command()
def chat(
    message: Annotated[
        list[str] | None, typer.Argument(help="One message; without it, a conversation.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Default: the first language model.")] = None,
    url: Url = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
) -> None:
    """Talk to a language model; the answer appears as it is generated."""
    with one_line_errors():
        base = base_url(url)
        request: dict[str, Any] = {
            "model": model or first_model(base, ("llm", "simulator")),
            "temperature": temperature,
            "max_tokens": max_tokens,
            "stream": True,
            "messages": [],
        }
        if message:
            _turn(base, request, " ".join(message))
            return
        while (text := _ask()) is not None:
            _turn(base, request, text)


def _ask() -> str | None:
    try:
        return console.input("[bold]> [/]")
    except (EOFError, KeyboardInterrupt):
        return None


def _turn(base: str, request: dict[str, Any], text: str) -> None:
    """Send the conversation with one more message, print the answer, and add both to it."""
    request["messages"].append({"role": "user", "content": text})
    answer = ""
    for piece in stream_text(f"{base}/v1/chat/completions", request):
        answer += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    request["messages"].append({"role": "assistant", "content": answer})


@app.command()
def image(  # noqa: PLR0913, PLR0917
    prompt: Annotated[str, typer.Argument(help='For example "a red seven on white".')],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the image goes; png, jpeg or webp.")],
    model: Annotated[str | None, typer.Option(help="Default: the first diffusion model.")] = None,
    url: Url = None,
    seed: Annotated[int | None, typer.Option()] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Several go to NAME-1, NAME-2, ...")] = 1,
    negative_prompt: Annotated[str | None, typer.Option(help="What the image should not show.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely the prompt is followed.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="For example euler or dpm.")] = None,
    given: Annotated[Path | None, typer.Option("--image", help="A file to begin with, or to edit.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Transparent where the image is to be edited.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of it is drawn anew: 0 to 1.")] = None,
    partial: Annotated[int, typer.Option(help="Previews, to NAME-partial-0, ...; up to 3.")] = 0,
) -> None:
    """Draw an image, or edit one, and write it to a file."""
    with one_line_errors():
        image_format = _format_of(output)
        if mask is not None and given is None:
            raise EnvironmentProblem("--mask: needs an --image to edit")
        base = base_url(url)
        request = {
            "model": model or first_model(base, ("diffusion",)),
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "n": n,
            "seed": seed,
            "size": size,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "scheduler": scheduler,
            "strength": strength,
            "output_format": image_format,
            "partial_images": partial,
            "progress": True,
        }
        with contextlib.closing(stream_images(base, request, image=given, mask=mask)) as events:
            _write_images(events, output, several=n > 1)


def _format_of(output: Path) -> str:
    suffix = output.suffix.lstrip(".").lower().replace("jpg", "jpeg")
    if suffix not in ("png", "jpeg", "webp"):
        raise EnvironmentProblem(f"{output}: the name must end in .png, .jpeg or .webp")
    if not output.parent.is_dir():
        raise EnvironmentProblem(f"{output}: there is no folder {output.parent}")
    return suffix


def _write_images(events: Iterable[dict[str, Any]], output: Path, *, several: bool) -> None:
    """Each image as it comes, and until then how far they are."""
    with console.status("Waiting") as status:
        for event in events:
            if "step" in event:
                status.update(f"Step {event['step']} of {event['total']}")
                continue
            name = f"{output.stem}-{event['index'] + 1}" if several else output.stem
            if "seed" not in event:
                name += f"-partial-{event['partial_image_index']}"
            target = output.with_stem(name)
            target.write_bytes(base64.b64decode(event["b64_json"]))
            drawn_by = f", seed {event['seed']}" if "seed" in event else ""
            console.print(f"{target}  {event['size']}{drawn_by}", soft_wrap=True, markup=False)


@app.command()
def route(
    model: Annotated[str, typer.Argument(help="Its requests go by the strategy from now on.")],
    strategy: Annotated[str, typer.Argument(help="For example least_connections or adaptive.")],
    url: Url = None,
) -> None:
    """Change a model's balancing strategy while it serves."""
    with one_line_errors():
        post_json(f"{base_url(url)}{MANAGEMENT}/strategy", {"model": model, "strategy": strategy})
        console.print(f"{model}: {strategy}")


@app.command()
def drain(
    replica: Annotated[str | None, typer.Argument(help="Its id, as `blaze status` shows it.")] = None,
    node: Annotated[str | None, typer.Option(help="All replicas of a node, now and later.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Nothing new is begun anywhere.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Requests are sent there again.")] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until what runs there goes on elsewhere; with --all, ends.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Until nothing runs there any more.")] = True,
    url: Url = None,
) -> None:
    """Send a replica, a node or all no new requests; what runs there may finish."""
    with one_line_errors():
        base = base_url(url)
        drained = target(base, replica, node, everything=everything)
        post_json(f"{base}{MANAGEMENT}{drained.path}", drain_body(undo=undo, timeout_s=timeout))
        console.print(f"{drained.name}: {'takes requests' if undo else 'gets no new requests'}")
        if wait and not undo:
            with console.status("Draining") as shown:
                wait_until_idle(base, drained, shown.update)
            console.print(f"{drained.name}: nothing runs there")


@app.command()
def doctor(port: Annotated[int, typer.Option(help="The port that `blaze up` is to use.")] = 8000) -> None:
    """What is wrong with this machine, and the fix. Exit code 1 when something is."""
    from blaze.doctor import examine

    table = Table("check", "", "found", "fix")
    findings = examine(port=port)
    for finding in findings:
        table.add_row(
            finding.name, "[green]ok[/]" if finding.ok else "[red]no[/]", finding.detail, finding.fix
        )
    console.print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
