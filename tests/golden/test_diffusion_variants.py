"""Which tasks a loaded pipeline can do, and that its variants are diffusers' own."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from blaze.engines.diffusion.pipelines import LoadedPipeline, Task
from blaze.engines.diffusion.safety import check_safety
from blaze.errors import ConfigError, ModelSourceError
from tests.golden.pipeline_folders import (
    INPUTS,
    digits,
    draw,
    four_channels,
    left_half,
    levels_apart,
    load,
    of_class,
    picture,
    quiet,
    unconditional,
    unet_with,
    with_safety_checker,
)
from tests.golden.tiny_pipelines import tiny_pipeline

pytestmark = pytest.mark.models

CLASSES = {
    Task.TEXT: diffusers.StableDiffusionPipeline,
    Task.IMAGE: diffusers.StableDiffusionImg2ImgPipeline,
    Task.INPAINT: diffusers.StableDiffusionInpaintPipeline,
}


def test_variants_share_every_module_and_no_scheduler(loaded: LoadedPipeline) -> None:
    assert list(loaded.pipelines) == [Task.TEXT, Task.IMAGE, Task.INPAINT]
    for variant in loaded.pipelines.values():
        for name in ("unet", "vae", "text_encoder", "tokenizer"):
            assert getattr(variant, name) is getattr(loaded.pipeline, name)
    assert len({id(variant.scheduler) for variant in loaded.pipelines.values()}) == 3
    assert (loaded.size_factor, loaded.default_side, loaded.denoiser) == (8, 32, "unet")
    assert (loaded.whole_because, loaded.is_conditional) == (None, True)
    assert {"prompt", "eta"} <= loaded.accepts[Task.TEXT]
    assert "strength" in loaded.accepts[Task.IMAGE] - loaded.accepts[Task.TEXT]
    assert "mask_image" in loaded.accepts[Task.INPAINT] - loaded.accepts[Task.IMAGE]


@pytest.mark.parametrize("task", Task)
def test_each_draws_what_diffusers_draws(loaded: LoadedPipeline, four: Path, task: Task) -> None:
    alone = quiet(CLASSES[task].from_pretrained(four, dtype=torch.float32, use_safetensors=True))
    expected = draw(alone, **INPUTS[task])
    assert np.array_equal(draw(loaded.pipelines[task], **INPUTS[task]), expected)
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("name", "tasks", "denoiser", "size_factor"),
    [
        ("sdxl", list(Task), "unet", 8),
        ("sd3", list(Task), "transformer", 4),
        ("flux", list(Task), "transformer", 4),
        ("pixart", [Task.TEXT], "transformer", 32),
    ],
)
def test_other_architectures(
    tmp_path: Path, name: str, tasks: list[Task], denoiser: str, size_factor: int
) -> None:
    loaded = load(tiny_pipeline(name, tmp_path))
    assert list(loaded.pipelines) == tasks
    assert (loaded.denoiser, loaded.whole_because, loaded.is_conditional) == (denoiser, None, True)
    assert loaded.size_factor == size_factor  # of the VAE times the side of a patch, or what the class checks
    for variant in loaded.pipelines.values():
        side, given = 2 * size_factor, {"image": picture(), "mask_image": left_half()}
        given |= {"width": side, "height": side, "strength": 1.0}
        accepted = inspect.signature(variant.__call__).parameters
        image = draw(variant, steps=2, **{key: value for key, value in given.items() if key in accepted})
        assert image.shape == ((side, side, 3) if "width" in accepted else (32, 32, 3))


def test_a_model_that_was_saved_as_image_to_image_draws_from_text_too(tmp_path: Path) -> None:
    loaded = load(of_class("StableDiffusionImg2ImgPipeline", tmp_path))
    assert list(loaded.pipelines) == [Task.IMAGE, Task.TEXT]
    assert type(loaded.pipeline) is diffusers.StableDiffusionImg2ImgPipeline
    assert np.array_equal(draw(loaded.pipelines[Task.TEXT]), draw(digits()))


def test_a_model_for_inpainting_does_nothing_else(tmp_path: Path) -> None:
    loaded = load(of_class("StableDiffusionInpaintPipeline", tmp_path, **four_channels(in_channels=9)))
    assert list(loaded.pipelines) == [Task.INPAINT]
    assert draw(loaded.pipeline, **INPUTS[Task.INPAINT]).shape == (32, 32, 3)


def test_a_transformer_that_sees_masks_does_nothing_else(tmp_path: Path) -> None:
    loaded = load(tiny_pipeline("sd3 for masks", tmp_path))
    assert list(loaded.pipelines) == [Task.INPAINT]
    assert type(loaded.pipeline) is diffusers.StableDiffusion3InpaintPipeline


def test_latents_that_the_inpainting_class_cannot_take_leave_it_out() -> None:
    assert list(load().pipelines) == [Task.TEXT, Task.IMAGE]  # `digits` has eight channels


def test_upscaling_begins_with_an_image(tmp_path: Path) -> None:
    folder = of_class(
        "StableDiffusionUpscalePipeline",
        tmp_path,
        unet=unet_with(in_channels=11, num_class_embeds=350),
        low_res_scheduler=diffusers.DDPMScheduler(),
    )
    loaded = load(folder)
    assert list(loaded.pipelines) == [Task.IMAGE]
    assert loaded.whole_because is None
    assert draw(loaded.pipeline, image=picture(16)).shape == (64, 64, 3)


@pytest.mark.parametrize("scheduler", [diffusers.DDPMScheduler(), diffusers.DDIMScheduler()])
def test_unconditional_pipelines_count_as_text(tmp_path: Path, scheduler: Any) -> None:
    loaded = load(unconditional(tmp_path, scheduler))
    assert list(loaded.pipelines) == [Task.TEXT]
    assert (loaded.is_conditional, loaded.whole_because, loaded.denoiser) == (False, None, "unet")
    assert (loaded.size_factor, loaded.default_side) == (1, 8)
    assert draw(loaded.pipeline, prompt=None).shape == (8, 8, 3)


def test_pipelines_that_change_their_denoiser_run_whole(tmp_path: Path) -> None:
    loaded = load(of_class("StableDiffusionPAGPipeline", tmp_path))
    assert loaded.whole_because == "StableDiffusionPAGPipeline changes its denoiser while it draws"


# --- Refused ------------------------------------------------------------------------------------------


def _controlnet(folder: Path) -> Path:
    controlnet = diffusers.ControlNetModel.from_unet(unet_with(), conditioning_embedding_out_channels=(8, 16))
    return of_class("StableDiffusionControlNetPipeline", folder, controlnet=controlnet)


def _video(folder: Path) -> Path:
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    return of_class("TextToVideoSDPipeline", folder, unet=unet)


def _by_class(folder: Path) -> Path:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=4, in_channels=8, patch_size=2
    )
    return of_class("DiTPipeline", folder, transformer=transformer)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(_controlnet, "control image"), (_video, "makes videos"), (_by_class, "class_labels")],
)
def test_what_no_request_could_be_drawn_with_is_refused(tmp_path: Path, make: Any, reason: str) -> None:
    with pytest.raises(ModelSourceError, match=reason) as caught:
        load(make(tmp_path))
    assert caught.value.param == "source"


# --- Safety checker -----------------------------------------------------------------------------------


def _images() -> list[Any]:
    return [picture(), picture(48)]


def test_a_safety_checker_that_is_asked_for_is_on_and_blackens_nothing(tmp_path: Path) -> None:
    strict = load(with_safety_checker(tmp_path / "strict", threshold=-2.0), safety_checker=True)
    lax = load(with_safety_checker(tmp_path / "lax", threshold=2.0), safety_checker=True)
    assert check_safety(strict, _images()) == (True, True)
    assert check_safety(lax, _images()) == (False, False)
    for variant in strict.pipelines.values():
        assert variant.safety_checker is None
    assert np.array_equal(draw(strict.pipeline), draw(digits()))


def test_its_verdict_is_diffusers_own(tmp_path: Path) -> None:
    folder = with_safety_checker(tmp_path, threshold=-2.0)
    alone = quiet(diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32))
    images = [draw(digits(), seed=seed) for seed in range(6)]
    pil = alone.image_processor.numpy_to_pil(np.stack(images))
    scores = _closeness(alone, pil)
    threshold = (sorted(scores)[2] + sorted(scores)[3]) / 2  # three on either side
    alone.safety_checker.concept_embeds_weights.data.fill_(threshold)
    _, expected = alone.run_safety_checker(np.stack(images), torch.device("cpu"), torch.float32)
    loaded = load(folder, safety_checker=True)
    assert loaded.safety_checker is not None
    loaded.safety_checker.model.concept_embeds_weights.data.fill_(threshold)
    assert check_safety(loaded, pil) == tuple(expected)
    assert sum(expected) == 3


def _closeness(pipeline: Any, images: list[Any]) -> list[float]:
    checker = pipeline.safety_checker
    pixels = pipeline.feature_extractor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
    return list(torch.nn.functional.cosine_similarity(embeds, checker.concept_embeds[:1]).tolist())


def test_a_safety_checker_that_is_not_asked_for_is_not_loaded(tmp_path: Path) -> None:
    loaded = load(with_safety_checker(tmp_path, threshold=-2.0))
    assert loaded.safety_checker is None
    assert loaded.pipeline.safety_checker is None
    assert check_safety(loaded, _images()) == (False, False)
    assert levels_apart(draw(loaded.pipeline), draw(digits())) == 0


def test_a_model_without_a_safety_checker_cannot_be_asked_for_one() -> None:
    with pytest.raises(ConfigError, match=r"diffusion\.safety_checker: this model has none"):
        load(safety_checker=True)


def test_outdated_configs_are_mended_for_the_variant_only(tmp_path: Path) -> None:
    """Diffusers' constructors rewrite the config of the scheduler that they are given."""
    folder = of_class("StableDiffusionPipeline", tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"skip_prk_steps": False}))
    loaded = load(folder)
    assert loaded.pipeline.scheduler.config["skip_prk_steps"] is False
