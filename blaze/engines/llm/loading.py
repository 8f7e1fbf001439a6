"""From a config to a model that runs: weights, memory for keys and values, and the runner that fits."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blaze.engine_config import LLMConfig
from blaze.engines.llm.fused import FusedRunner
from blaze.engines.llm.fused_cpu import NativeOperations
from blaze.engines.llm.fused_model import fuse, why_not_fused
from blaze.engines.llm.fused_step import StepRunner
from blaze.engines.llm.fused_step import serves as steps_serve
from blaze.engines.llm.fused_torch import TorchOperations
from blaze.engines.llm.kv_cache import UNIT, KVCache
from blaze.engines.llm.kv_store import KVStore, LayerShape, bytes_per_token
from blaze.engines.llm.linear import OperatorFormat
from blaze.engines.llm.model import LoadedModel, load_model
from blaze.engines.llm.native.build import library
from blaze.engines.llm.native.kernels import Kernels
from blaze.engines.llm.panels import PanelFormat
from blaze.engines.llm.probe import Probe
from blaze.engines.llm.runner import Runner
from blaze.engines.llm.stock import StockRunner, kv_shapes, windows
from blaze.engines.torch_setup import free_bytes
from blaze.errors import ConfigError, ModelSourceError
from blaze.models.sources import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    model: LoadedModel
    runner: Runner
    cache: KVCache


def load(source: ModelSource, options: LLMConfig, threads: int, cache: Path) -> ServedModel:
    """Blocking. Raises :class:`ModelSourceError` for a model that cannot be served, and
    :class:`ConfigError` when the options ask for what the model or the hardware lacks."""
    loaded = load_model(source, options, threads, cache)
    windows(loaded.model.config)
    _check_rotary(loaded)
    shapes = kv_shapes(loaded.model)
    probe = Probe.of(loaded.model, loaded.vocabulary_size, loaded.max_model_len)
    reason = _why_not_fused(loaded.model, options)
    if reason is None:
        runner: Runner = _fused(loaded, shapes, options, cache)
        if probe.agrees(runner, exact=options.quantization == "none"):
            return _served(loaded, runner, options)
        reason = "its logits differ from the stock model's"
        del runner
        loaded = load_model(source, options, threads, cache)  # fusing has consumed the weights
    if options.runner == "fused":
        raise ConfigError(f"llm.runner: this model cannot be fused: {reason}", param="llm")
    if options.quantization != "none":
        raise ConfigError(
            f"llm.quantization: {options.quantization} needs the fused runner, but {reason}", param="llm"
        )
    if options.deterministic:
        raise ConfigError(f"llm.deterministic: needs the fused runner, but {reason}", param="llm")
    logger.info("the stock runner serves this model: %s", reason)
    store = _store(loaded, shapes, options)
    runner = StockRunner(loaded.model, store, compiled=options.compile)
    try:
        agrees = probe.agrees(runner, exact=True)
    except Exception as error:  # whatever its forward raises for our masks, positions or cache
        raise ModelSourceError(
            f"source: this model does not run with keys and values in slots: {error}", param="source"
        ) from error
    if not agrees:
        raise ModelSourceError(
            "source: with keys and values in slots, this model's logits differ from its own", param="source"
        )
    return _served(loaded, runner, options)


def _check_rotary(loaded: LoadedModel) -> None:
    """Raises :class:`ModelSourceError` where the longest sequence of a batch would change the others' angles.

    Longrope (Phi-3) does that beyond its first context length. "dynamic" never gets there: its border is the
    model's whole context.
    """
    config = loaded.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    border = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if rope.get("rope_type") == "longrope" and border is not None and loaded.max_model_len > border:
        raise ModelSourceError(
            f"source: the positions of this model change beyond {border:,} tokens, which is not served: "
            f"set llm.max_model_len to {border} or less",
            param="source",
        )


def _served(loaded: LoadedModel, runner: Runner, options: LLMConfig) -> ServedModel:
    logger.info("%s runner, %d tokens of KV memory", runner.name, runner.store.tokens)
    cache = KVCache(
        runner.store.tokens,
        longest=loaded.max_model_len,
        prefix_caching=options.prefix_caching,
        compact=runner.batches_neighbours,
    )
    return ServedModel(loaded, runner, cache)


def _why_not_fused(model: PreTrainedModel, options: LLMConfig) -> str | None:
    if options.runner == "stock":
        return "llm.runner is stock"
    if options.compile:
        return "llm.compile is for the stock model"
    return why_not_fused(model)


def _fused(
    loaded: LoadedModel, shapes: tuple[LayerShape, ...], options: LLMConfig, cache: Path
) -> FusedRunner | StepRunner:
    int8 = options.quantization == "int8"
    on_cpu = loaded.model.device.type == "cpu"
    if options.deterministic and not (on_cpu and loaded.model.dtype is torch.bfloat16):
        raise ConfigError("llm.deterministic: only in bfloat16 on a CPU, in this version", param="llm")
    if int8 and not on_cpu:
        raise ConfigError("llm.quantization: int8 is for CPUs", param="llm")
    store = _store(loaded, shapes, options)
    built = library(cache) if on_cpu and Kernels.serve(store.dtype, shapes[0].key_dim) else None
    if built is not None and steps_serve(built, loaded.model):
        return StepRunner(fuse(loaded.model, loaded.max_model_len, PanelFormat(int8=int8)), store, built)
    linears = OperatorFormat(int8=int8)
    model = fuse(loaded.model, loaded.max_model_len, linears)
    operations = TorchOperations(model, store) if built is None else NativeOperations(model, store, built)
    return FusedRunner(model, store, operations, two_rows=linears.needs_two_rows())


def _store(loaded: LoadedModel, shapes: tuple[LayerShape, ...], options: LLMConfig) -> KVStore:
    """As many tokens as the memory budget holds."""
    device, dtype = loaded.model.device, loaded.model.dtype
    per_token = bytes_per_token(shapes, dtype)
    budget = options.kv_cache_memory
    if isinstance(budget, float):
        budget = int(budget * free_bytes(device))
    tokens = budget // per_token - 1  # one is the store's own
    needed = UNIT
    while needed < loaded.max_model_len:
        needed *= 2
    if tokens < needed:
        raise ConfigError(
            f"llm.kv_cache_memory: {budget:,} bytes hold {max(tokens, 0):,} tokens of {per_token:,} bytes, "
            f"but a sequence of max_model_len {loaded.max_model_len:,} takes {needed:,}: "
            "raise the memory or lower max_model_len",
            param="llm",
        )
    return KVStore(shapes, tokens // UNIT * UNIT, dtype, device)
