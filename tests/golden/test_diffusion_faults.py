"""What goes wrong between latents and pixels harms neither the shared modules nor the truth of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from blaze.engines.diffusion import pipelines
from blaze.reports import DiffusionStatus
from blaze.types import Event, Failed, Finished, ImageReady, ImageRequest
from tests.golden.diffusion import engine_of, events_of, loaded_by
from tests.golden.pipeline_folders import DIGITS, load, picture, with_safety_checker
from tests.golden.tiny_pipelines import tiny_pipeline

pytestmark = pytest.mark.models


def request(**fields: Any) -> ImageRequest:
    return ImageRequest("r", "m", "a seven", seed=3, num_inference_steps=3, timeout_s=120, **fields)


def picture_of(events: list[Event]) -> bytes:
    assert isinstance(events[-1], Finished), events
    return next(event.data for event in events if isinstance(event, ImageReady))


class Decoding:
    """Every call of a VAE's ``decode``, whichever copy's: its dtype and its rows. ``spoil``: what becomes of
    the pixels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[torch.dtype, int]] = []
        self.spoil: Any = lambda _dtype, _pixels: None
        decode = AutoencoderKL.decode

        def watched(vae: AutoencoderKL, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((vae.dtype, len(z)))
            result = decode(vae, z, *args, **kwargs)
            self.spoil(vae.dtype, result[0])
            return result

        monkeypatch.setattr(AutoencoderKL, "decode", watched)


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Decoding:
    return Decoding(monkeypatch)


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated")
async def test_a_vae_that_its_pipeline_upcasts_is_put_back_when_decoding_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoding: Decoding
) -> None:
    # Refused on CPUs for its speed; diffusers upcasts from no other type.
    monkeypatch.setattr(pipelines, "choose_dtype", lambda *_given: torch.float16)

    def fail(_dtype: torch.dtype, _pixels: torch.Tensor) -> None:
        raise RuntimeError("no such layer")

    async with engine_of(tiny_pipeline("sdxl", tmp_path)) as engine:
        vae = loaded_by(engine).pipeline.vae
        before = picture_of(await events_of(engine, request()))
        decoding.spoil = fail
        events = await events_of(engine, request())
        assert isinstance(events[-1], Failed)
        assert {parameter.dtype for parameter in vae.parameters()} == {torch.float16}
        decoding.spoil = lambda _dtype, _pixels: None
        assert picture_of(await events_of(engine, request())) == before
    assert decoding.calls == [(torch.float32, 1)] * 3, "upcast it was"


def _overflow_in_16_bits(dtype: torch.dtype, pixels: torch.Tensor) -> None:
    if dtype is not torch.float32:
        pixels[1] = float("inf")


def _overflow_anyway(_dtype: torch.dtype, pixels: torch.Tensor) -> None:
    pixels[-1, 0, 0, 0] = float("inf")  # clamped, it would be a colour


async def test_one_image_that_overflows_in_16_bits_is_decoded_once_more_in_fp32(decoding: Decoding) -> None:
    async with engine_of(DIGITS, dtype="bfloat16") as engine:
        good = await events_of(engine, request(n=3))
        decoding.calls.clear()
        decoding.spoil = _overflow_in_16_bits
        events = await events_of(engine, request(n=3))
        assert loaded_by(engine).pipeline.vae.dtype is torch.bfloat16
        status = await engine.get_health_status()
    assert isinstance(events[-1], Finished)
    assert [event for event in events if isinstance(event, ImageReady) and event.index != 1] == [
        event for event in good if isinstance(event, ImageReady) and event.index != 1
    ]
    assert len([event for event in events if isinstance(event, ImageReady)]) == 3
    assert decoding.calls == [(torch.bfloat16, 3), (torch.float32, 1)]
    assert status.diffusion == DiffusionStatus(decoded_again=1, non_finite=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
async def test_an_image_that_is_no_numbers_in_fp32_either_is_an_error_and_not_decoded_a_third_time(
    dtype: torch.dtype, decoding: Decoding
) -> None:
    async with engine_of(DIGITS, dtype=str(dtype).removeprefix("torch.")) as engine:
        decoding.spoil = _overflow_anyway
        events = await events_of(engine, request())
        status = await engine.get_health_status()
    assert status.diffusion == DiffusionStatus(int(dtype is torch.bfloat16), non_finite=1)
    assert isinstance(events[-1], Failed)
    assert (events[-1].error.http_status, events[-1].error.code) == (500, "non_finite_output")
    assert not any(isinstance(event, ImageReady) for event in events)
    assert decoding.calls == [(dtype, 1), *[(torch.float32, 1)] * (dtype is not torch.float32)]


async def test_latents_that_are_no_numbers_are_an_error_and_not_decoded_again(
    monkeypatch: pytest.MonkeyPatch, decoding: Decoding
) -> None:
    async with engine_of(DIGITS, dtype="bfloat16") as engine:
        unet = loaded_by(engine).pipeline.unet
        forward = unet.forward

        def broken(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(sample * float("nan"), *args, **kwargs)

        monkeypatch.setattr(unet, "forward", broken)
        events = await events_of(engine, request())
    assert isinstance(events[-1], Failed)
    assert events[-1].error.code == "non_finite_output"
    assert decoding.calls == [(torch.bfloat16, 1)]


# --- Safety checker -----------------------------------------------------------------------------------


def test_the_safety_checker_is_brought_to_the_device_and_dtype_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_safety_checker(tmp_path, threshold=-2.0)
    monkeypatch.setattr(pipelines, "choose_device", lambda _name: torch.device("meta"))
    loaded = load(folder, safety_checker=True, dtype="bfloat16")
    assert loaded.safety_checker is not None
    weights = (*loaded.pipeline.unet.parameters(), *loaded.safety_checker.model.parameters())
    assert {(weight.device.type, weight.dtype) for weight in weights} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(("threshold", "code"), [(-2.0, "content_policy_violation"), (2.0, None)])
async def test_the_safety_checker_of_a_16_bit_model_looks_at_pictures(
    threshold: float, code: str | None, tmp_path: Path
) -> None:
    folder = with_safety_checker(tmp_path, threshold=threshold)
    async with engine_of(folder, safety_checker=True, dtype="bfloat16") as engine:
        last = (await events_of(engine, request()))[-1]
    assert (last.error.code if isinstance(last, Failed) else None) == code


def test_pictures_go_to_where_the_safety_checker_is(tmp_path: Path) -> None:
    checker = load(with_safety_checker(tmp_path, threshold=2.0), safety_checker=True).safety_checker
    assert checker is not None
    given: list[torch.Tensor] = []

    def look(images: list[Any], clip_input: torch.Tensor) -> tuple[list[Any], list[bool]]:
        given.append(clip_input)
        return images, [False] * len(images)

    checker.model.to("meta", torch.bfloat16).forward = look
    assert checker.flags([picture()]) == (False,)
    assert (given[0].device.type, given[0].dtype) == ("meta", torch.bfloat16)
