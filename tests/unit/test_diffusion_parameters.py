"""What a request may ask of a pipeline, and how it is told what it may not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.parameters import check_request, seeds
from blaze.engines.diffusion.pipelines import LoadedPipeline, Task
from blaze.engines.diffusion.schedulers import SCHEDULERS, make_scheduler
from blaze.errors import InvalidRequest
from blaze.types import ImageRequest
from tests.samples import image_request

OPTIONS = DiffusionConfig(
    max_batch_size=4, max_steps=1200, max_pixels=64 * 64, loras={"ink": "org/ink", "oil": "org/oil"}
)


class TextToImage:
    """As much of a pipeline as checks look at: its parameters and what it does with its scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.components = {
            "text_encoder": _encoder("clip_text_model", 12),
            "text_encoder_2": _encoder("clip_text_model", 4),
            "text_encoder_3": _encoder("t5", 2),
            "tokenizer": object(),
        }

    def __call__(
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        eta: float = 0.0,
        clip_skip: int | None = None,
    ) -> None:
        scaled = self.scheduler.scale_model_input(prompt, 0)
        self.scheduler.step(scaled)


class ImageToImage(TextToImage):
    def __call__(  # type: ignore[override]
        self,
        prompt: str,
        image: object,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        eta: float = 0.0,
    ) -> None:
        self.scheduler.add_noise(image)
        self.scheduler.step(self.scheduler.scale_model_input(prompt, 0))


class StableDiffusionUpscale(ImageToImage):
    pass


class Unconditional:
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.components: dict[str, object] = {}

    def __call__(
        self, batch_size: int = 1, generator: object = None, num_inference_steps: int = 1000
    ) -> None:
        self.scheduler.step(batch_size, generator=generator)


class Distilled(TextToImage):
    def __call__(  # type: ignore[override]
        self, prompt: str, negative_prompt: str | None = None, true_cfg_scale: float = 1.0
    ) -> None: ...


def _encoder(kind: str, layers: int) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(model_type=kind, num_hidden_layers=layers))


def loaded(*pipelines: Any, **fields: Any) -> LoadedPipeline:
    tasks = [Task.IMAGE if isinstance(each, ImageToImage) else Task.TEXT for each in pipelines]
    names = [frozenset(each.__call__.__annotations__) for each in pipelines]
    given: dict[str, Any] = {
        "pipelines": dict(zip(tasks, pipelines, strict=True)),
        "accepts": dict(zip(tasks, names, strict=True)),
        "size_factor": 8,
        "default_side": 64,
        "denoiser": "unet",
        "whole_because": None,
        "is_conditional": any("prompt" in accepts for accepts in names),
    }
    return LoadedPipeline(**given | fields)


BOTH = loaded(TextToImage(DDIMScheduler()), ImageToImage(DDIMScheduler()))
IMAGE = b"an image"


def refusal(request: ImageRequest, model: LoadedPipeline = BOTH, options: DiffusionConfig = OPTIONS) -> str:
    """The field that is named; the message begins with it too."""
    with pytest.raises(InvalidRequest) as caught:
        check_request(request, model, options)
    assert caught.value.http_status == 400
    assert caught.value.param is not None
    assert caught.value.message.startswith(f"{caught.value.param}: ")
    return caught.value.param


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 4, "num_inference_steps": 1000, "guidance_scale": 0.0, "negative_prompt": "x"},
        {"width": 64, "height": 64},
        {"width": 8, "height": 512},
        {"eta": 1.0},
        {"eta": 0.5, "scheduler": "ddim"},
        {"clip_skip": 3},
        {"adapters": (("ink", 0.5), ("oil", -1.0))},
        {"image": IMAGE, "strength": 0.02},
        {"image": IMAGE, "strength": 1.0, "num_inference_steps": 1},
        {"image": IMAGE, "width": 32, "height": 32},
        {"prompt": "word " * 5000},
    ],
)
def test_what_the_pipeline_can_do_is_let_through(fields: dict[str, Any]) -> None:
    check_request(image_request(**fields), BOTH, OPTIONS)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 5}, "n"),
        ({"num_inference_steps": 1201}, "num_inference_steps"),
        ({"width": 12}, "size"),
        ({"height": 63}, "size"),
        ({"width": 72, "height": 64}, "size"),
        ({"width": 72}, "size"),  # with the default height
        ({"image": IMAGE, "width": 128, "height": 64}, "size"),
        ({"image": IMAGE, "width": 9, "height": 64}, "size"),
        ({"image": IMAGE, "strength": 0.0}, "strength"),
        ({"image": IMAGE, "strength": 0.019}, "strength"),  # of 50 steps
        ({"image": IMAGE, "num_inference_steps": 1}, "strength"),  # 0.8 of one step
        ({"image": IMAGE, "clip_skip": 1}, "clip_skip"),  # this variant has no such parameter
        ({"clip_skip": 4}, "clip_skip"),
        ({"eta": 0.5, "scheduler": "euler"}, "eta"),
        ({"eta": 0.0, "scheduler": "dpm"}, "eta"),
        ({"scheduler": "magic"}, "scheduler"),
        ({"scheduler": "EulerDiscreteScheduler"}, "scheduler"),
        ({"scheduler": ""}, "scheduler"),
        ({"adapters": (("chalk", 1.0),)}, "adapters"),
        ({"adapters": (("ink", 1.0), ("ink", 0.5))}, "adapters"),
        ({"image": IMAGE, "mask": b"a mask"}, "mask"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    assert refusal(image_request(**fields)) == field


def test_a_pipeline_without_the_parameter_refuses_it() -> None:
    unconditional = loaded(Unconditional(DDPMScheduler()))
    few = {"prompt": "", "num_inference_steps": 5}
    check_request(image_request(**few), unconditional, OPTIONS)
    for fields, field in (
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"negative_prompt": ""}, "negative_prompt"),
        ({"eta": 0.0}, "eta"),
        ({"clip_skip": 1}, "clip_skip"),
        ({"width": 64, "height": 64}, "size"),
        ({"image": IMAGE}, "image"),
    ):
        assert refusal(image_request(**few | fields), unconditional) == field


def test_an_unconditional_model_takes_an_empty_prompt_only() -> None:
    unconditional = loaded(Unconditional(DDPMScheduler()))
    assert refusal(image_request("a cat", num_inference_steps=5), unconditional) == "prompt"
    check_request(image_request("", num_inference_steps=5), unconditional, OPTIONS)
    check_request(image_request(""), BOTH, OPTIONS)


def test_the_pipelines_own_number_of_steps_is_bounded_too() -> None:
    unconditional = loaded(Unconditional(DDPMScheduler()))
    few = DiffusionConfig(max_steps=200)
    assert refusal(image_request(""), unconditional, few) == "num_inference_steps"
    check_request(image_request("", num_inference_steps=200), unconditional, few)
    check_request(image_request(""), unconditional, OPTIONS)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [(DDIMScheduler(), 1001), (DDPMScheduler(), 1001), (PNDMScheduler(), 1), (PNDMScheduler(), 3)],
)
def test_numbers_of_steps_that_a_scheduler_cannot_be_set_to_are_refused(scheduler: Any, steps: int) -> None:
    model = loaded(TextToImage(scheduler))
    for _ in range(2):  # the second time from memory
        assert refusal(image_request(num_inference_steps=steps), model) == "num_inference_steps"
    check_request(image_request(num_inference_steps=4), model, OPTIONS)


def test_pndm_by_name_is_refused_where_it_cannot_begin() -> None:
    assert refusal(image_request(scheduler="pndm", num_inference_steps=2)) == "num_inference_steps"
    check_request(image_request(scheduler="pndm", num_inference_steps=8), BOTH, OPTIONS)


def test_a_model_that_needs_an_image_says_so() -> None:
    model = loaded(ImageToImage(DDIMScheduler()))
    assert refusal(image_request(), model) == "image"
    check_request(image_request(image=IMAGE), model, OPTIONS)


def test_upscaling_makes_a_size_of_its_own() -> None:
    model = loaded(StableDiffusionUpscale(DDIMScheduler()))
    check_request(image_request(image=IMAGE), model, OPTIONS)
    assert refusal(image_request(image=IMAGE, width=64, height=64), model) == "size"


def test_a_distilled_model_would_ignore_a_negative_prompt() -> None:
    assert (
        refusal(image_request(negative_prompt="x"), loaded(Distilled(DDIMScheduler()))) == "negative_prompt"
    )


def test_flow_matching_rounds_the_steps_of_a_strength_up() -> None:
    model = loaded(ImageToImage(FlowMatchEulerDiscreteScheduler()))
    check_request(image_request(image=IMAGE, strength=0.01), model, OPTIONS)
    assert refusal(image_request(image=IMAGE, strength=0.0), model) == "strength"


def test_the_area_below_the_default_size_is_checked_without_a_size_too() -> None:
    assert refusal(image_request(), loaded(TextToImage(DDIMScheduler()), default_side=72)) == "size"


def test_seeds_stay_within_63_bits() -> None:
    assert seeds(image_request(seed=2**63 - 1, n=2)) == (2**63 - 1, 0)
    assert seeds(image_request(n=3)) == (0, 1, 2)


# --- Schedulers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_every_call_gets_a_scheduler_of_its_own(name: str | None) -> None:
    first, second = (make_scheduler(BOTH, Task.TEXT, name) for _ in range(2))
    first.set_timesteps(8)
    before = list(first.timesteps)
    second.set_timesteps(4)
    assert first is not second
    assert list(first.timesteps) == before
    assert len(second.timesteps) < len(first.timesteps)
    assert len(BOTH.pipelines[Task.TEXT].scheduler.timesteps) == 1000


@pytest.mark.parametrize(("name", "kind"), SCHEDULERS.items())
def test_a_named_scheduler_is_of_that_kind_and_has_the_models_config(name: str, kind: str) -> None:
    own = DDIMScheduler(beta_start=0.001, beta_end=0.02, prediction_type="v_prediction")
    scheduler = make_scheduler(loaded(TextToImage(own)), Task.TEXT, name)
    assert type(scheduler).__name__ == kind
    for key in ("beta_start", "beta_end", "prediction_type"):
        assert scheduler.config[key] == own.config[key]


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_scheduler(BOTH, Task.TEXT, "magic")
    assert caught.value.param == "scheduler"
    assert all(name in caught.value.message for name in SCHEDULERS)


def test_a_prediction_that_a_scheduler_does_not_know_is_refused() -> None:
    model = loaded(TextToImage(DDPMScheduler(prediction_type="sample")))
    check_request(image_request(), model, OPTIONS)
    check_request(image_request(scheduler="ddim"), model, OPTIONS)
    with pytest.raises(InvalidRequest):
        check_request(image_request(scheduler="euler_a"), model, OPTIONS)
