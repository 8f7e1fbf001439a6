"""What the config says about memory and speed is done, and the picture is still right; or it is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion import memory
from blaze.engines.diffusion.adapters import activate
from blaze.engines.diffusion.memory import check_hardware
from blaze.errors import ConfigError
from tests.golden.pipeline_folders import DIGITS, Pixels, digits, draw, load, of_class, quiet, unconditional
from tests.golden.tiny_loras import write_lora

pytestmark = pytest.mark.models

ROUNDING = 1e-4  # of the same mathematics in another order
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain() -> Pixels:
    return draw(digits())


def furthest(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one - other).max())


def mean(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one - other).mean())


# --- The same picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"attention_slicing": True},
        {"vae_slicing": True},
        {"channels_last": True},
        {"offload": "group"},
        {"attention_slicing": True, "vae_slicing": True, "channels_last": True, "offload": "group"},
    ],
)
def test_the_picture_is_the_same(plain: Pixels, options: dict[str, Any]) -> None:
    loaded = load(**options)
    assert furthest(draw(loaded.pipeline), plain) < ROUNDING
    assert furthest(draw(loaded.pipeline, seed=4), plain) > 0.1


def test_options_have_really_been_set() -> None:
    loaded = load(attention_slicing=True, vae_slicing=True, vae_tiling=True, channels_last=True)
    unet, vae = loaded.pipeline.unet, loaded.pipeline.vae
    assert {type(each).__name__ for each in unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    assert (vae.use_slicing, vae.use_tiling) == (True, True)
    for module in (unet, vae.decoder):
        assert module.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    untouched = load().pipeline
    assert {type(each).__name__ for each in untouched.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    assert (untouched.vae.use_slicing, untouched.vae.use_tiling) == (False, False)


def test_tiles_are_diffusers_own() -> None:
    alone = digits()
    alone.vae.enable_tiling()
    size = {"width": 64, "height": 64}  # twice what a tile holds
    tiled = draw(alone, **size)
    assert furthest(draw(load(vae_tiling=True).pipeline, **size), tiled) < ROUNDING
    assert furthest(draw(digits(), **size), tiled) > ROUNDING, "tiles show"


def test_group_offload_moves_the_weights_and_says_that_requests_run_whole() -> None:
    loaded = load(offload="group")
    assert loaded.whole_because == "offload group moves the modules while a request is drawn"
    assert diffusers.hooks.HookRegistry.check_if_exists_or_initialize(loaded.pipeline.unet.conv_in).hooks


@pytest.mark.parametrize(
    ("storage", "bound"), [("bfloat16", 0.002), ("float8_e4m3fn", 0.02), ("float8_e5m2", 0.03)]
)
def test_weights_are_stored_in_the_smaller_type_and_computed_with_in_the_larger(
    plain: Pixels, storage: str, bound: float
) -> None:
    loaded = load(layerwise_casting=storage)
    unet = loaded.pipeline.unet
    stored = {each.weight.dtype for each in unet.modules() if isinstance(each, torch.nn.Linear)}
    assert getattr(torch, storage) in stored
    assert unet.dtype is torch.float32
    drawn = draw(loaded.pipeline)
    assert 0 < mean(drawn, plain) < bound
    alone = digits()
    alone.unet.enable_layerwise_casting(storage_dtype=getattr(torch, storage), compute_dtype=torch.float32)
    assert np.array_equal(drawn, draw(alone))


def test_a_compiled_denoiser_draws_the_same(tmp_path: Path) -> None:
    folder = unconditional(tmp_path, diffusers.DDIMScheduler())
    expected = draw(load(folder).pipeline, prompt=None)
    loaded = load(folder, compile=True)
    assert furthest(draw(loaded.pipeline, prompt=None), expected) < ROUNDING
    assert hasattr(loaded.pipeline.unet.forward, "_torchdynamo_orig_callable")


def test_adapters_go_with_casting_and_offloading(tmp_path: Path) -> None:
    lora = write_lora(tmp_path)
    alone = digits()
    alone.load_lora_weights(tmp_path, weight_name=lora.name, adapter_name="ink")
    expected = draw(alone)
    for options, bound in (({"offload": "group"}, ROUNDING), ({"layerwise_casting": "bfloat16"}, 0.02)):
        loaded = load(loras={"ink": str(lora)}, **options)
        activate(loaded, (("ink", 1.0),))
        assert furthest(draw(loaded.pipeline), expected) < bound
        activate(loaded, ())
        assert furthest(draw(loaded.pipeline), draw(digits())) < bound


# --- Quantization -------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [[], ["unet", "text_encoder"]])
@pytest.mark.parametrize(
    ("backend", "weights", "bound"),
    [
        ("torchao", "int8", 0.005),
        ("torchao", "float8", 0.01),
        ("quanto", "int8", 0.005),
        ("quanto", "float8", 0.01),
    ],
)
def test_quantized_weights_draw_nearly_the_same(
    plain: Pixels, backend: str, weights: str, bound: float, components: list[str]
) -> None:
    pytest.importorskip({"torchao": "torchao", "quanto": "optimum.quanto"}[backend])
    loaded = load(quantization={"backend": backend, "weights": weights, "components": components})
    assert 0 < mean(draw(loaded.pipeline), plain) < bound


@pytest.mark.parametrize("backend", ["torchao", "quanto", "bitsandbytes"])
def test_a_library_that_is_missing_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=rf"diffusion\.quantization: {backend} is not installed \(pip"):
        load(quantization={"backend": backend}, device="auto")


def test_bitsandbytes_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(ConfigError, match="bitsandbytes needs a GPU"):
        check_hardware(_options(quantization={"backend": "bitsandbytes"}), CPU, torch.float32)


def test_components_that_are_not_there_cannot_be_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(ConfigError, match="no component 'decoder'"):
        load(quantization={"backend": "quanto", "components": ["decoder"]})


# --- Refused ------------------------------------------------------------------------------------------


def _options(**options: Any) -> DiffusionConfig:
    return DiffusionConfig.model_validate(options)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_to_a_cpu_from_a_cpu_is_refused(offload: str) -> None:
    with pytest.raises(ConfigError, match=rf"diffusion\.offload: {offload} moves weights to a GPU"):
        check_hardware(_options(offload=offload), CPU, torch.float32)


def test_storing_in_a_type_that_is_not_smaller_is_refused() -> None:
    check_hardware(_options(layerwise_casting="bfloat16"), CPU, torch.float32)
    with pytest.raises(ConfigError, match="saves nothing"):
        check_hardware(_options(layerwise_casting="bfloat16"), CPU, torch.bfloat16)


def test_compiling_without_a_compiler_is_refused_with_the_compilers_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_function: Any) -> Any:
        def fail(*_args: Any) -> None:
            raise RuntimeError("no working C++ compiler")

        return fail

    monkeypatch.setattr(memory.torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"diffusion\.compile: .* no working C\+\+ compiler"):
        check_hardware(_options(compile=True), CPU, torch.float32)


@pytest.mark.parametrize("field", ["vae_slicing", "vae_tiling"])
def test_a_pipeline_without_a_vae_cannot_slice_it(tmp_path: Path, field: str) -> None:
    folder = unconditional(tmp_path, diffusers.DDPMScheduler())
    with pytest.raises(ConfigError, match=rf"diffusion\.{field}: this pipeline has no VAE"):
        load(folder, **{field: True})


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"attention_slicing": True}, "UNet2DModel has none"),
        ({"loras": {"a": "org/a"}}, "DDPMPipeline takes no adapters"),
    ],
)
def test_what_a_kind_of_pipeline_lacks_is_refused(
    tmp_path: Path, option: dict[str, Any], reason: str
) -> None:
    folder = unconditional(tmp_path, diffusers.DDPMScheduler())
    (name,) = option
    with pytest.raises(ConfigError, match=rf"diffusion\.{name}: {reason}"):
        load(folder, **option)


def test_a_transformer_has_neither_slices_nor_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16
    )
    parts: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = quiet(diffusers.PixArtAlphaPipeline(**parts, transformer=transformer))
    for field, reason in (("attention_slicing", "has none"), ("channels_last", "only a UNet")):
        with pytest.raises(ConfigError, match=rf"diffusion\.{field}: .*{reason}"):
            memory.apply_options(pipeline, _options(**{field: True}), CPU)


def test_every_option_is_off_by_default(plain: Pixels) -> None:
    loaded = load()
    assert np.array_equal(draw(loaded.pipeline), plain)
    assert (loaded.adapters, loaded.safety_checker, loaded.whole_because) == (None, None, None)


def test_a_second_load_is_not_changed_by_the_first(tmp_path: Path, plain: Pixels) -> None:
    load(attention_slicing=True, channels_last=True, layerwise_casting="float8_e5m2")
    assert np.array_equal(draw(load(of_class("StableDiffusionPipeline", tmp_path)).pipeline), plain)
    assert DIGITS.is_dir()
