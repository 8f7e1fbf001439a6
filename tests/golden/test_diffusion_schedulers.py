"""Schedulers by name draw what diffusers draws with them set by hand, or are refused with a reason."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.parameters import check_request
from blaze.engines.diffusion.pipelines import LoadedPipeline, Task
from blaze.engines.diffusion.schedulers import SCHEDULERS, make_scheduler
from blaze.errors import InvalidRequest
from tests.golden.pipeline_folders import (
    INPUTS,
    Pixels,
    digits,
    draw,
    levels_apart,
    load,
    of_class,
    quiet,
    unconditional,
)
from tests.golden.tiny_pipelines import flux_transformer, pixart_transformer, sd3_transformer, vae
from tests.samples import image_request

pytestmark = pytest.mark.models

SHIFTED = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True}


def draw_with(pipeline: Any, scheduler: Any, **given: Any) -> Pixels:
    shell = copy.copy(pipeline)
    shell.scheduler = scheduler
    return draw(shell, **given)


@pytest.mark.parametrize(("name", "kind"), SCHEDULERS.items())
def test_digits_drawn_with_each(name: str, kind: str) -> None:
    alone = digits()
    alone.scheduler = getattr(diffusers, kind).from_config(alone.scheduler.config)
    loaded = load()
    drawn = draw_with(loaded.pipeline, make_scheduler(loaded, Task.TEXT, name), steps=12)
    assert levels_apart(drawn, draw(alone, steps=12)) <= 1


def test_the_names_are_different_schedulers() -> None:
    loaded = load()
    names = [name for name in SCHEDULERS if name != "euler"]  # which is ddim in another notation
    pictures = [
        draw_with(loaded.pipeline, make_scheduler(loaded, Task.TEXT, name), steps=8) for name in names
    ]
    for index, one in enumerate(pictures):
        assert all(levels_apart(one, other) > 1 for other in pictures[:index])


@pytest.mark.parametrize("task", [Task.IMAGE, Task.INPAINT])
@pytest.mark.parametrize(("name", "kind"), SCHEDULERS.items())
def test_variants_take_each_too(loaded: LoadedPipeline, task: Task, name: str, kind: str) -> None:
    pipeline = loaded.pipelines[task]
    by_hand = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
    given = {"steps": 10} | INPUTS[task]
    expected = draw_with(pipeline, by_hand, **given)
    assert levels_apart(draw_with(pipeline, make_scheduler(loaded, task, name), **given), expected) <= 1


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_numbers_of_steps_are_refused_where_diffusers_fails(name: str | None, steps: int) -> None:
    loaded = load()
    request = image_request(scheduler=name, num_inference_steps=steps)
    try:
        draw_with(loaded.pipeline, make_scheduler(loaded, Task.TEXT, name), steps=steps)
    except ValueError:
        with pytest.raises(InvalidRequest) as caught:
            check_request(request, loaded, DiffusionConfig())
        assert caught.value.param == "num_inference_steps"
    else:
        check_request(request, loaded, DiffusionConfig())


# --- Other kinds of models ----------------------------------------------------------------------------


def _embeds(*shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def _sd3(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    given = {
        "prompt_embeds": _embeds(5, 32),
        "negative_prompt_embeds": _embeds(5, 32) / 2,
        "pooled_prompt_embeds": _embeds(32),
        "negative_pooled_prompt_embeds": _embeds(32) / 2,
        "guidance_scale": 3.0,
    }
    return _without_text(diffusers.StableDiffusion3Pipeline, sd3_transformer(), scheduler), given


def _flux(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    given = {"prompt_embeds": _embeds(5, 32), "pooled_prompt_embeds": _embeds(16)}
    return _without_text(diffusers.FluxPipeline, flux_transformer(channels=4), scheduler), given


def _pixart(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    given = {
        "negative_prompt": None,
        "prompt_embeds": _embeds(5, 32),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_embeds": _embeds(5, 32) / 2,
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "use_resolution_binning": False,
    }
    return _without_text(diffusers.PixArtAlphaPipeline, pixart_transformer(), scheduler), given


def _without_text(kind: Any, transformer: Any, scheduler: Any) -> Any:
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    coder = vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    given = {"transformer": transformer.eval(), "scheduler": scheduler, "vae": coder.eval()}
    return quiet(kind(**parts | given))


def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sd3": lambda: _sd3(_flow()),
    "sd3 shifted": lambda: _sd3(_flow(**SHIFTED)),
    "sd3 shifted by size": lambda: _sd3(_flow(**DYNAMIC)),
    "sd3 by heun": lambda: _sd3(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
    "flux": lambda: _flux(_flow()),
    "flux shifted by size": lambda: _flux(_flow(**DYNAMIC)),
    "pixart": lambda: _pixart(diffusers.DPMSolverMultistepScheduler()),
}
# What is taken for each, by task. Whatever else there is must fail in diffusers too, or be no flow matching.
TAKEN: dict[str, dict[Task, set[str]]] = {
    "sd3": {Task.TEXT: {"dpm", "euler", "heun", "unipc"}, Task.IMAGE: {"euler", "heun"}},
    "sd3 shifted": {Task.TEXT: {"dpm", "euler", "heun", "unipc"}, Task.IMAGE: {"euler", "heun"}},
    "sd3 shifted by size": {Task.TEXT: {"dpm", "euler", "unipc"}, Task.IMAGE: {"euler"}},
    "sd3 by heun": {Task.TEXT: {"dpm", "euler", "heun", "unipc"}, Task.IMAGE: {"euler", "heun"}},
    "flux": {Task.TEXT: {"euler", "unipc"}, Task.IMAGE: {"euler"}, Task.INPAINT: {"euler"}},
    "flux shifted by size": {
        Task.TEXT: {"dpm", "euler", "unipc"},
        Task.IMAGE: {"euler"},
        Task.INPAINT: {"euler"},
    },
    "pixart": {Task.TEXT: set(SCHEDULERS)},
}
FLOW = {
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def _by_hand(own: Any, name: str) -> Any:
    if not type(own).__name__.startswith("FlowMatch"):
        return getattr(diffusers, SCHEDULERS[name]).from_config(own.config)
    shift = own.config["shift"]
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    more = {"shift": shift} if name in ("euler", "heun") else flow
    return getattr(diffusers, FLOW[name]).from_config(own.config, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_takes_is_drawn_and_what_it_refuses_fails(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    made, embeds = FAMILIES[family]()
    loaded = _loaded(made, monkeypatch)
    assert set(loaded.pipelines) == set(TAKEN[family])
    for task, pipeline in loaded.pipelines.items():
        accepted = inspect.signature(pipeline.__call__).parameters
        given = {"width": 32, "height": 32, "steps": 6, "prompt": None} | embeds | INPUTS[task]
        given = {name: value for name, value in given.items() if name in accepted or name == "steps"}
        given["prompt"] = None
        for name in SCHEDULERS:
            if name in TAKEN[family][task]:
                drawn = draw_with(pipeline, make_scheduler(loaded, task, name), **given)
                assert (
                    levels_apart(drawn, draw_with(pipeline, _by_hand(pipeline.scheduler, name), **given)) <= 1
                )
                assert np.isfinite(drawn).all()
                continue
            with pytest.raises(InvalidRequest) as caught:
                make_scheduler(loaded, task, name)
            assert caught.value.param == "scheduler"
            assert all(taken in caught.value.message for taken in TAKEN[family][task])
            if name in FLOW:
                with pytest.raises((AttributeError, ValueError, TypeError, AssertionError)):
                    draw_with(pipeline, _by_hand(pipeline.scheduler, name), **given)


def _loaded(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> LoadedPipeline:
    """As it would be loaded from a folder, which takes text encoders."""
    from blaze.engines.diffusion import pipelines

    monkeypatch.setattr(pipelines, "_read", lambda *_args: pipeline)
    return load()


def test_flow_matching_models_keep_their_own_scheduler_with_its_shift(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, _ = _sd3(_flow(shift=3.0))
    loaded = _loaded(made, monkeypatch)
    for name, key in (("euler", "shift"), ("heun", "shift"), ("dpm", "flow_shift"), ("unipc", "flow_shift")):
        assert make_scheduler(loaded, Task.TEXT, name).config[key] == 3.0


@pytest.mark.parametrize(
    ("own", "taken"),
    [
        # DDPM's pipeline does not scale what its UNet sees: euler would run, and draw noise.
        (diffusers.DDPMScheduler(), {"dpm", "ddim", "ddpm"}),
        (diffusers.DDIMScheduler(), {"ddim"}),
    ],
)
def test_unconditional_pipelines_take_what_their_loop_was_written_for(
    tmp_path: Path, own: Any, taken: set[str]
) -> None:
    loaded = load(unconditional(tmp_path, own))
    for name, kind in SCHEDULERS.items():
        if name in taken:
            by_hand = getattr(diffusers, kind).from_config(loaded.pipeline.scheduler.config)
            expected = draw_with(loaded.pipeline, by_hand, prompt=None)
            scheduler = make_scheduler(loaded, Task.TEXT, name)
            assert levels_apart(draw_with(loaded.pipeline, scheduler, prompt=None), expected) <= 1
        else:
            with pytest.raises(InvalidRequest):
                make_scheduler(loaded, Task.TEXT, name)


@pytest.mark.parametrize("own", [diffusers.LCMScheduler(), diffusers.EDMEulerScheduler()])
def test_schedulers_of_a_kind_of_their_own_cannot_be_exchanged(tmp_path: Path, own: Any) -> None:
    loaded = load(of_class("StableDiffusionPipeline", tmp_path, scheduler=own))
    with pytest.raises(InvalidRequest, match="has only its own"):
        make_scheduler(loaded, Task.TEXT, "ddim")
    assert type(make_scheduler(loaded, Task.TEXT, None)) is type(own)
