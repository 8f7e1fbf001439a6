"""Images on a real cluster: the shipped model, by the official client, a handle and the command line."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
)
from PIL import Image

from tests.cluster.served import Served, served
from tests.digit_judge import DigitJudge
from tests.golden.pipeline_folders import four_channels, of_class
from tests.image_files import encoded, padded
from tests.waiting import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.models]

DIGITS = {
    "name": "digits",
    "engine": "diffusion",
    "source": "package:blaze/assets/digits",
    "replicas": 1,
    "resources": {"num_cpus": 0.25},
    "diffusion": {"threads": 1, "dtype": "float32"},
}
LARGE = 6 * 2**20  # above what a message of Ray's own carries
FIELDS = {"seed": 3, "num_inference_steps": 12}


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that edits parts of images: with four channels of latents, where `digits` has eight."""
    return of_class("StableDiffusionPipeline", tmp_path_factory.mktemp("painter"), **four_channels())


@pytest.fixture(scope="module")
def app(painter: Path) -> Iterator[Served]:
    with served([DIGITS, DIGITS | {"name": "painter", "source": str(painter)}]) as running:
        yield running


@pytest.fixture
def client(app: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{app.url}/v1", api_key="unused", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def seven(app: Served) -> Image.Image:
    fields = {"model": "digits", "prompt": "a red seven on white", **FIELDS, "num_inference_steps": 20}
    answer = httpx.post(f"{app.url}/v1/images/generations", json=fields, timeout=120)
    return shown(answer.json()["data"][0]["b64_json"])


def shown(b64: str | None) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(b64 or "")))
    image.load()
    return image


def levels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def left_half_open(size: tuple[int, int] = (32, 32)) -> bytes:
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return encoded(mask)


# --- Streams -----------------------------------------------------------------------------------------


def test_previews_stream_through_the_openai_client_and_end_in_the_image(client: openai.OpenAI) -> None:
    whole = client.images.generate(model="digits", prompt="a red seven on white", extra_body=FIELDS)
    stream = client.images.generate(
        model="digits", prompt="a red seven on white", stream=True, partial_images=3, extra_body=FIELDS
    )
    *previews, last = list(stream)
    assert [type(event) for event in previews] == [ImageGenPartialImageEvent] * 3
    assert [event.partial_image_index for event in previews] == [0, 1, 2]  # type: ignore[union-attr]
    assert isinstance(last, ImageGenCompletedEvent)
    assert whole.data is not None
    final = levels(shown(last.b64_json))
    assert np.abs(final - levels(shown(whole.data[0].b64_json))).max() <= 1
    # They come nearer to the image from one to the next.
    far = [float(np.abs(final - levels(shown(event.b64_json))).mean()) for event in previews]
    assert far[0] > far[1] > far[2] > 0
    assert {shown(event.b64_json).size for event in (*previews, last)} == {(32, 32)}


def test_previews_arrive_while_the_image_is_drawn_and_who_leaves_frees_the_replica(
    app: Served, client: openai.OpenAI
) -> None:
    fields = {"seed": 1, "num_inference_steps": 200}
    stream = client.images.generate(
        model="digits", prompt="a two", stream=True, partial_images=3, extra_body=fields
    )
    first = next(iter(stream))
    assert first.type == "image_generation.partial_image"
    assert app.in_flight() == 1, "had anybody on the way held it back, the image would be done"
    stream.close()
    eventually(lambda: app.in_flight() == 0, within_s=10)
    eventually(lambda: app.working() == 0, within_s=10)


def test_steps_are_told_to_whom_asks(app: Served) -> None:
    body = {"model": "digits", "prompt": "a two", "stream": True, "progress": True, **FIELDS, "n": 2}
    response = httpx.post(f"{app.url}/v1/images/generations", json=body, timeout=120)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    steps = [event["step"] for event in events if event["type"] == "blaze.progress"]
    assert steps == list(range(1, 13))
    assert [(e["index"], e["seed"]) for e in events if e["type"] == "image_generation.completed"] == [
        (0, 3),
        (1, 4),
    ]
    assert response.headers["x-blaze-replica"] == app.replicas("digits")[0]["id"]


# --- Edits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(painter: Path, seven: Image.Image) -> Callable[..., np.ndarray[Any, np.dtype[np.int16]]]:
    """What diffusers by itself makes of the left half of this image."""
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionInpaintPipeline.from_pretrained(painter, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))

    def edit(image: Image.Image, prompt: str, **given: Any) -> np.ndarray[Any, np.dtype[np.int16]]:
        generator = torch.Generator("cpu").manual_seed(FIELDS["seed"])
        drawn = pipeline(
            prompt,
            image=image,
            mask_image=mask,
            width=32,
            height=32,
            generator=generator,
            num_inference_steps=FIELDS["num_inference_steps"],
            **given,
        )
        return levels(drawn.images[0])

    return edit


def test_an_edit_with_a_mask_is_what_diffusers_alone_makes_of_it(
    client: openai.OpenAI, seven: Image.Image, alone: Callable[..., Any]
) -> None:
    answer = client.images.edit(
        model="painter",
        image=("seven.png", encoded(seven)),
        mask=left_half_open(),
        prompt="a green zero",
        extra_body={**FIELDS, "strength": 0.75, "guidance_scale": 3},
    )
    assert answer.data is not None and answer.size == "32x32"
    wanted = alone(seven, "a green zero", strength=0.75, guidance_scale=3.0)
    assert np.abs(levels(shown(answer.data[0].b64_json)) - wanted).max() <= 1


def test_a_transparent_part_of_the_image_is_the_mask(
    client: openai.OpenAI, seven: Image.Image, alone: Callable[..., Any]
) -> None:
    image = seven.convert("RGBA")
    image.paste((255, 255, 255, 0), (0, 0, 16, 32))
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    own = client.images.edit(model="painter", image=encoded(image), prompt="a zero", extra_body=FIELDS)
    assert own.data is not None
    assert np.abs(levels(shown(own.data[0].b64_json)) - alone(flat, "a zero")).max() <= 1


def test_a_model_that_edits_no_parts_says_so(client: openai.OpenAI, seven: Image.Image) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(model="digits", image=encoded(seven), mask=left_half_open(), prompt="a zero")
    assert refused.value.param == "mask"


def test_an_image_to_begin_with_is_changed_as_much_as_strength_says(
    client: openai.OpenAI, seven: Image.Image
) -> None:
    url = "data:image/png;base64," + base64.b64encode(encoded(seven)).decode()
    far = []
    for strength in (0.2, 1.0):
        fields = {**FIELDS, "num_inference_steps": 20, "image": url, "strength": strength}
        answer = client.images.generate(model="digits", prompt="a red seven on white", extra_body=fields)
        assert answer.data is not None
        far.append(float(np.abs(levels(shown(answer.data[0].b64_json)) - levels(seven)).mean()))
    assert far[0] < far[1]
    assert DigitJudge().read(seven) == 7


def test_an_edit_streams_too(client: openai.OpenAI, seven: Image.Image) -> None:
    stream = client.images.edit(
        model="painter",
        image=encoded(seven),
        mask=left_half_open(),
        prompt="a zero",
        stream=True,
        partial_images=1,
        extra_body=FIELDS,
    )
    assert [type(event) for event in stream] == [ImageEditPartialImageEvent, ImageEditCompletedEvent]


@pytest.mark.parametrize(
    ("image", "mask", "param"),
    [
        (encoded(Image.new("RGB", (32, 32))), left_half_open((16, 16)), "mask"),
        (encoded(Image.new("RGB", (32, 32))), encoded(Image.new("L", (32, 32))), "mask"),
        (encoded(Image.new("RGB", (32, 32)))[:50], left_half_open(), "image"),
        (b"no picture", left_half_open(), "image"),
        (encoded(Image.new("RGB", (32, 32)), "GIF"), left_half_open(), "image"),
    ],
)
def test_files_that_are_wrong_are_a_400_by_name(
    client: openai.OpenAI, image: bytes, mask: bytes, param: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.edit(model="painter", image=image, mask=mask, prompt="a two", stream=stream)
        assert refused.value.param == param


# --- Large files -------------------------------------------------------------------------------------


def test_a_large_file_passes_over_http(client: openai.OpenAI, seven: Image.Image) -> None:
    def edit(image: bytes, mask: bytes) -> bytes:
        answer = client.images.edit(
            model="painter", image=image, mask=mask, prompt="a two", extra_body=FIELDS
        )
        assert answer.data is not None
        return levels(shown(answer.data[0].b64_json)).tobytes()

    small, mask = encoded(seven), left_half_open()
    assert edit(padded(small, LARGE), padded(mask, LARGE)) == edit(small, mask)


def test_a_file_above_the_limit_of_a_body_is_a_413(client: openai.OpenAI, seven: Image.Image) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.images.edit(model="digits", image=padded(encoded(seven), 17 * 2**20), prompt="a two")
    assert refused.value.status_code == 413


def test_a_large_file_passes_over_a_handle_of_another_process(
    app: Served, seven: Image.Image, tmp_path: Path
) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    small.write_bytes(encoded(seven))
    large.write_bytes(padded(encoded(seven), LARGE))
    program = """
import sys, pathlib, blaze
client = blaze.connect(sys.argv[1])
small, large = (pathlib.Path(name).read_bytes() for name in sys.argv[2:])
options = {"seed": 3, "num_inference_steps": 4, "strength": 0.5}
(one,), (two,) = (client.edit("digits", image, "a seven", **options) for image in (small, large))
stream = client.image_stream("digits", "a two", image=large, partial_images=1, **options)
print(len(large), one.data == two.data, *(type(event).__name__ for event in stream))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, app.cluster.address, str(small), str(large)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    size, same, *kinds = ran.stdout.split()
    assert int(size) >= LARGE
    assert same == "True"
    assert kinds == ["PartialImage", "ImageReady"]


def test_a_large_answer_passes_from_one_replica_to_another(app: Served) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.cluster.large_answers", app.cluster.address, str(LARGE)],
        env=os.environ | {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == str(LARGE)


# --- The command line --------------------------------------------------------------------------------


def test_the_command_line_edits_and_shows_previews(app: Served, seven: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "seven.png").write_bytes(encoded(seven))
    (tmp_path / "mask.png").write_bytes(left_half_open())
    arguments = ["image", "a zero", "-o", "out.webp", "--url", app.url, "--n", "2", "--partial", "1"]
    arguments += [
        "--model",
        "painter",
        "--image",
        "seven.png",
        "--mask",
        "mask.png",
        "--seed",
        "5",
        "--steps",
        "8",
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "blaze.cli", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    written = {path.name: Image.open(path).format for path in tmp_path.glob("out*")}
    assert written == dict.fromkeys(
        ("out-1.webp", "out-2.webp", "out-1-partial-0.webp", "out-2-partial-0.webp"), "WEBP"
    )
    assert "seed 5" in ran.stdout and "seed 6" in ran.stdout
