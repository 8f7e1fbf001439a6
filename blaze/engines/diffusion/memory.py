"""What the config says about memory and speed, done to a pipeline, or refused with the reason."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch

from blaze.engine_config import DiffusionConfig, QuantizationConfig
from blaze.engines.diffusion.denoisers import denoiser_name
from blaze.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

logger = logging.getLogger(__name__)

_PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum.quanto"}
_DISTRIBUTIONS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum-quanto"}


def refused(field: str, reason: str) -> ConfigError:
    return ConfigError(f"diffusion.{field}: {reason}", param="diffusion")


def check_hardware(options: DiffusionConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises :class:`ConfigError` for what this machine cannot do, before anything is loaded."""
    if device.type == "cpu" and options.offload in ("model", "sequential"):
        raise refused("offload", f"{options.offload} moves weights to a GPU, and there is none")
    if options.layerwise_casting is not None:
        storage = _dtype(options.layerwise_casting)
        if storage.itemsize >= dtype.itemsize:
            raise refused("layerwise_casting", f"{options.layerwise_casting} saves nothing with {dtype}")
    if options.quantization is not None:
        _check_quantization(options.quantization, device)
    if options.compile:
        _check_compiler(device)


def _check_quantization(quantization: QuantizationConfig, device: torch.device) -> None:
    backend = quantization.backend
    top, *_ = _PACKAGES[backend].split(".")
    if importlib.util.find_spec(top) is None or importlib.util.find_spec(_PACKAGES[backend]) is None:
        raise refused("quantization", f"{backend} is not installed (pip install {_DISTRIBUTIONS[backend]})")
    if backend == "torchao" and quantization.weights == "int4" and importlib.util.find_spec("mslk") is None:
        raise refused("quantization", "torchao's int4 needs mslk, which is not installed")
    if backend == "bitsandbytes" and device.type == "cpu":
        raise refused("quantization", "bitsandbytes needs a GPU, and there is none")


def _check_compiler(device: torch.device) -> None:
    """By compiling something small: what is missing (a C++ compiler, triton) shows only then."""
    try:
        torch.compile(lambda value: value * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # dynamo and inductor raise kinds of their own
        raise refused("compile", f"torch.compile does not work here: {error}") from error


def quantization_config(options: DiffusionConfig, index: Any) -> PipelineQuantizationConfig | None:
    """For ``from_pretrained``; ``index``: the parsed ``model_index.json``."""
    from diffusers import PipelineQuantizationConfig

    quantization = options.quantization
    if quantization is None:
        return None
    components = quantization.components or tuple(name for name in ("unet", "transformer") if name in index)
    mapping = {}
    for name in components:
        entry = index.get(name)
        if not isinstance(entry, list) or entry[0] is None:
            raise refused("quantization", f"this pipeline has no component {name!r}")
        mapping[name] = _backend_config(quantization, of_transformers=entry[0] == "transformers")
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _backend_config(quantization: QuantizationConfig, *, of_transformers: bool) -> Any:
    import diffusers
    import transformers

    library = transformers if of_transformers else diffusers
    weights = quantization.weights
    if quantization.backend == "bitsandbytes":
        return library.BitsAndBytesConfig(load_in_8bit=weights == "int8", load_in_4bit=weights == "int4")
    if quantization.backend == "quanto":
        if of_transformers:
            return library.QuantoConfig(weights=weights)
        return library.QuantoConfig(weights_dtype=weights)
    from torchao import quantization as torchao

    kinds = {
        "int8": "Int8WeightOnlyConfig",
        "int4": "Int4WeightOnlyConfig",
        "float8": "Float8WeightOnlyConfig",
    }
    return library.TorchAoConfig(getattr(torchao, kinds[weights])())


def apply_options(pipeline: DiffusionPipeline, options: DiffusionConfig, device: torch.device) -> None:
    """Brings the pipeline to the device and does what the options ask for.

    Raises :class:`ConfigError` for options that this kind of pipeline does not have.
    """
    name = denoiser_name(pipeline)
    denoiser = None if name is None else getattr(pipeline, name)
    if options.offload == "none":
        pipeline.to(device)
    if options.channels_last:
        _channels_last(pipeline, denoiser)
    if options.attention_slicing:
        if not hasattr(denoiser, "set_attention_slice"):
            raise refused("attention_slicing", f"{type(denoiser).__name__} has none")
        pipeline.enable_attention_slicing()
    _apply_vae_options(pipeline, options)
    if options.layerwise_casting is not None:
        if denoiser is None:
            raise refused("layerwise_casting", "this pipeline has no UNet and no transformer")
        denoiser.enable_layerwise_casting(
            storage_dtype=_dtype(options.layerwise_casting), compute_dtype=denoiser.dtype
        )
    if options.compile:
        if denoiser is None:
            raise refused("compile", "this pipeline has no UNet and no transformer")
        # Not Module.compile: copies of the module, and whoever calls its forward, would pass it by.
        denoiser.forward = torch.compile(denoiser.forward)
    _offload(pipeline, options, device)


def _channels_last(pipeline: DiffusionPipeline, denoiser: torch.nn.Module | None) -> None:
    from diffusers import UNet2DConditionModel, UNet2DModel

    if not isinstance(denoiser, UNet2DConditionModel | UNet2DModel):
        raise refused("channels_last", "only a UNet computes in images")
    denoiser.to(memory_format=torch.channels_last)
    vae = pipeline.components.get("vae")
    if vae is not None:
        vae.to(memory_format=torch.channels_last)


def _apply_vae_options(pipeline: DiffusionPipeline, options: DiffusionConfig) -> None:
    vae = pipeline.components.get("vae")
    for field, method in (("vae_slicing", "enable_slicing"), ("vae_tiling", "enable_tiling")):
        if getattr(options, field):
            if not hasattr(vae, method):
                what = "this pipeline has no VAE" if vae is None else f"{type(vae).__name__} has none"
                raise refused(field, what)
            try:
                getattr(vae, method)()
            except NotImplementedError as error:
                raise refused(field, str(error)) from error


def _offload(pipeline: DiffusionPipeline, options: DiffusionConfig, device: torch.device) -> None:
    try:
        if options.offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif options.offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        elif options.offload == "group":
            pipeline.enable_group_offload(
                onload_device=device,
                offload_type="leaf_level",
                use_stream=device.type == "cuda",  # loads the next layer while this one computes
            )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise refused("offload", str(error)) from error


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
