"""The default application with its real models, as a user gets it from `blaze up`."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from PIL import Image

from deployments.local import free_port
from tests.cluster.blaze_up import BlazeUp, blaze_up
from tests.digit_judge import DigitJudge, colours
from tests.waiting import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.models]

LLM, DIGITS = "smollm2-135m", "digits"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class App:
    run: BlazeUp
    url: str


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("default")
    config = yaml.safe_load(Path("serve_config.yaml").read_text(encoding="utf-8"))
    config["applications"][0]["args"]["router"]["strategy"] = "round_robin"
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    port = free_port()
    with blaze_up(folder, str(path), "--port", str(port)) as run:
        run.wait_for("Blaze is ready", within_s=240)
        yield App(run, f"http://127.0.0.1:{port}")


@pytest.fixture
def client(app: App) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{app.url}/v1", api_key="unused", max_retries=0, timeout=120) as made:
        yield made


def test_chat_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=LLM, messages=QUESTION, temperature=0)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None and whole.usage.prompt_tokens == 37


def test_chat_streams_the_same_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=LLM, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(model=LLM, messages=QUESTION, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 1


def test_curl_gets_the_answer_too(app: App) -> None:
    body = json.dumps({"model": LLM, "temperature": 0, "messages": QUESTION})
    command = [
        "curl",
        "-sS",
        f"{app.url}/v1/chat/completions",
        "-H",
        "content-type: application/json",
        "-d",
        body,
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Paris" in json.loads(ran.stdout)["choices"][0]["message"]["content"]


def test_completions_continue_a_text_and_stop_where_told(client: openai.OpenAI) -> None:
    prompt = "Here is the English alphabet: A, B, C, D,"
    free = client.completions.create(model=LLM, prompt=prompt, temperature=0, max_tokens=16)
    assert free.choices[0].text.startswith(" E, F, G")
    stopped = client.completions.create(model=LLM, prompt=prompt, temperature=0, max_tokens=16, stop=[", G"])
    assert stopped.choices[0].text == " E, F"
    assert stopped.choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    def text(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=LLM, messages=QUESTION, temperature=1.5, seed=seed, max_tokens=24
        )
        return answer.choices[0].message.content

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_a_prompt_over_the_context_is_a_400_in_both_modes(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "word " * 3000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=LLM, messages=messages, stream=stream)
        assert refused.value.code == "context_length_exceeded"


def test_round_robin_splits_twenty_requests_over_two_language_models(app: App) -> None:
    picks: Counter[str] = Counter()
    for _ in range(20):
        body = {"model": LLM, "messages": QUESTION, "max_tokens": 1}
        picks[
            httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=60).headers["x-blaze-replica"]
        ] += 1
    assert sorted(picks.values()) == [10, 10]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [LLM, DIGITS]


def _draw(client: openai.OpenAI, prompt: str, **options: object) -> Image.Image:
    answer = client.images.generate(model=DIGITS, prompt=prompt, response_format="b64_json", **options)  # type: ignore[call-overload]
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))


def test_an_image_is_a_png_of_what_was_asked(client: openai.OpenAI) -> None:
    image = _draw(client, "a red seven on white", extra_body={"seed": 3, "num_inference_steps": 20})
    assert (image.format, image.size) == ("PNG", (32, 32))
    assert DigitJudge().read(image) == 7
    assert colours(image) == ("red", "white")


def test_the_same_seed_draws_the_same_image_and_n_counts_seeds_up(client: openai.OpenAI) -> None:
    fields = {"seed": 11, "num_inference_steps": 10}
    several = client.images.generate(model=DIGITS, prompt="a blue two on white", n=3, extra_body=fields)
    assert several.data is not None
    assert [image.seed for image in several.data] == [11, 12, 13]  # type: ignore[attr-defined]
    again = client.images.generate(
        model=DIGITS, prompt="a blue two on white", extra_body=fields | {"seed": 12}
    )
    assert again.data is not None

    def pixels(encoded: str | None) -> bytes:
        return Image.open(io.BytesIO(base64.b64decode(encoded or ""))).tobytes()

    apart = zip(pixels(several.data[1].b64_json), pixels(again.data[0].b64_json), strict=True)
    assert max(abs(one - other) for one, other in apart) <= 1


def test_a_judge_reads_at_least_95_of_100_digits_as_asked(client: openai.OpenAI) -> None:
    judge = DigitJudge()

    def right(index: int) -> bool:
        digit = index % 10
        fields = {"seed": index, "num_inference_steps": 14 + 3 * (index % 6), "guidance_scale": 5.0}
        return judge.read(_draw(client, f"a {WORDS[digit]}", extra_body=fields)) == digit

    with ThreadPoolExecutor(8) as pool:  # their steps meet at the denoiser
        assert sum(pool.map(right, range(100))) >= 95


def test_a_replica_that_dies_while_it_draws_costs_the_client_nothing(app: App, client: openai.OpenAI) -> None:
    """The only image replica: the request waits for the next one and begins anew, with the same seed."""

    def digits() -> list[dict[str, Any]]:
        replicas = httpx.get(f"{app.url}/api/v1/blaze/status").json()["replicas"]
        return [replica for replica in replicas if replica["model"] == DIGITS and replica["state"] == "ready"]

    fields = {"seed": 5, "num_inference_steps": 200}
    before = _draw(client, "a red six on white", extra_body=fields)
    (replica,) = eventually(digits)
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(_draw, client, "a red six on white", extra_body=fields)
        eventually(lambda: digits()[0]["running"] == 1, every_s=0.01)
        os.kill(replica["pid"], signal.SIGKILL)
        after = drawing.result(timeout=120)
    assert after.tobytes() == before.tobytes()
    eventually(lambda: digits() and digits()[0]["id"] != replica["id"])


def test_another_process_uses_the_handle(app: App) -> None:
    program = """
import json, blaze
client = blaze.connect()
answer = client.generate("smollm2-135m", "What is the capital of France?", temperature=0.0)
images = client.images("digits", "a seven", seed=1, num_inference_steps=5)
try:
    client.embed("smollm2-135m", "text")
except blaze.errors.UnsupportedOperation as error:
    refused = error.code
print(json.dumps([answer.text, images[0].format, images[0].data[:4].hex(), refused]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=app.run.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    text, image_format, magic, refused = json.loads(ran.stdout.splitlines()[-1])
    assert "Paris" in text
    assert (image_format, magic) == ("png", "89504e47")
    assert refused == "not_implemented"


def test_the_command_line_chats_and_draws(app: App, tmp_path: Path) -> None:
    spoken = app.run.run("chat", "--temperature", "0", "What is the capital of France?")
    assert spoken.returncode == 0 and "Paris" in spoken.stdout
    target = tmp_path / "seven.webp"
    drawn = app.run.run("image", "a red seven on white", "-o", str(target), "--seed", "3", "--steps", "10")
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(target).format == "WEBP"
    assert "2/2" in app.run.run("status").stdout
