"""LoRA adapters of the config: loaded once, switched on and off between calls of the denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError

from blaze.errors import ConfigError, ModelSourceError
from blaze.models.sources import FolderSource, HubSource, package_path, parse_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    from blaze.engines.diffusion.pipelines import LoadedPipeline

Adapters: TypeAlias = tuple[tuple[str, float], ...]  # names and scales

_SAFETENSORS = ".safetensors"
_USUAL_NAME = "pytorch_lora_weights.safetensors"


def activate(loaded: LoadedPipeline, adapters: Adapters) -> None:
    """Switches the shared modules to exactly these adapters; cheap when they are on already.

    Belongs before whatever computes with the modules: text encoders when a call begins, the denoiser in
    every step. A scale of 0 is as good as no adapter.
    """
    if loaded.adapters is not None:
        loaded.adapters.switch(adapters)


class AdapterSwitch:
    """Which adapters are on in the denoiser and the text encoders of one pipeline."""

    def __init__(self, layers: tuple[LoraLayer, ...]) -> None:
        self._layers = layers
        self._active: Adapters | None = None  # None: not known

    def switch(self, adapters: Adapters) -> None:
        wanted = tuple((name, scale) for name, scale in adapters if scale != 0)
        if wanted == self._active:
            return
        names = [name for name, _scale in wanted]
        same_names = self._active is not None and names == [name for name, _scale in self._active]
        self._active = None  # should one of the layers fail
        for layer in self._layers:
            if not same_names:
                layer.enable_adapters(bool(names))
            if names and not same_names:
                layer.set_adapter(names, inference_mode=True)
            for name, scale in wanted:
                layer.set_scale(name, scale)
        self._active = wanted


def load_adapters(pipeline: DiffusionPipeline, loras: Mapping[str, str]) -> AdapterSwitch | None:
    """Loads every adapter and leaves all of them off.

    Raises :class:`ModelSourceError` for files that are missing or do not fit, and :class:`ConfigError` for
    a pipeline that takes no adapters.
    """
    from diffusers.loaders.lora_base import LoraBaseMixin
    from peft.tuners.lora import LoraLayer

    if not loras:
        return None
    if not isinstance(pipeline, LoraBaseMixin):
        raise ConfigError(f"diffusion.loras: {type(pipeline).__name__} takes no adapters", param="diffusion")
    for name, source in loras.items():
        try:
            _load(pipeline, name, source)
        except ModelSourceError as error:
            raise ModelSourceError(f"diffusion.loras.{name}: {error.message}", param="diffusion") from None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelSourceError(
                f"diffusion.loras.{name}: {source!r} cannot be loaded: {error}", param="diffusion"
            ) from error
        if not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
            raise ModelSourceError(
                f"diffusion.loras.{name}: {source!r} has no weights for this model", param="diffusion"
            )
    modules = (module for _name, module in _modules(pipeline))
    layers = tuple(layer for module in modules for layer in module.modules() if isinstance(layer, LoraLayer))
    switch = AdapterSwitch(layers)
    switch.switch(())
    return switch


def _modules(pipeline: DiffusionPipeline) -> Iterator[tuple[str, torch.nn.Module]]:
    """Those that adapters change."""
    for name in pipeline._lora_loadable_modules:
        module = pipeline.components.get(name)
        if isinstance(module, torch.nn.Module):
            yield name, module


def _load(pipeline: DiffusionPipeline, name: str, source: str) -> None:
    found = _find(source)
    with _text_encoders_load_through_peft(pipeline):
        pipeline.load_lora_weights(
            found.where,
            adapter_name=name,
            weight_name=found.file,
            use_safetensors=True,  # without it a pickle would do
            **({"revision": found.revision} if found.revision else {}),
        )


# --- Where the files are ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    where: str  # a folder or a hub id
    file: str | None  # None: the only one there
    revision: str | None = None


def _find(source: str) -> _Found:
    """``package:name/path``, a path, or a hub id; a file ending in .safetensors, or where the only one is."""
    if source.endswith(_SAFETENSORS) and source.startswith(("package:", "/", ".", "~")):
        inside = source.removeprefix("package:")
        path = package_path(inside) if inside != source else Path(source).expanduser()
        if not path.is_file():
            raise ModelSourceError(f"source {source!r}: there is no {path}")
        return _Found(str(path.parent), path.name)
    if source.endswith(_SAFETENSORS):
        repository, _, file = source.rpartition("/")
        return _Found(repository, file)
    parsed = parse_source(source)
    if isinstance(parsed, HubSource):
        return _Found(parsed.repo, None, parsed.revision)
    if not isinstance(parsed, FolderSource):
        raise ModelSourceError(f"source {source!r}: adapters are safetensors files")
    files = sorted(file.name for file in parsed.path.glob(f"*{_SAFETENSORS}"))
    if len(files) == 1 or _USUAL_NAME in files:
        return _Found(str(parsed.path), files[0] if len(files) == 1 else _USUAL_NAME)
    raise ModelSourceError(f"source {source!r}: {len(files)} safetensors files in it; name one")


# --- Text encoders ----------------------------------------------------------------------------------


@contextmanager
def _text_encoders_load_through_peft(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Diffusers hands the text encoders' part to transformers, whose releases ask for versions of peft that
    are not out yet. What transformers then does is two calls of peft."""
    encoders: list[Any] = [part for name, part in _modules(pipeline) if name.startswith("text_encoder")]
    for encoder in encoders:
        encoder.load_adapter = _Inject(encoder)
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.load_adapter


class _Inject:
    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(
        self,
        *,
        adapter_name: str,
        adapter_state_dict: dict[str, torch.Tensor],
        peft_config: LoraConfig,
        **_options: Any,
    ) -> None:
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        inject_adapter_in_model(peft_config, self._module, adapter_name)
        set_peft_model_state_dict(self._module, adapter_state_dict, adapter_name)
