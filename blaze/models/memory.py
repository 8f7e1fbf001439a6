"""How much memory a model will take, told from its files before anything is loaded."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blaze.config import ModelConfig
from blaze.engine_config import DiffusionConfig
from blaze.errors import ModelSourceError
from blaze.models.sources import FolderSource, GGUFSource, ModelSource, parse_source
from blaze.types import EngineKind

# What a process takes before its weights, measured: Python, Ray, torch and transformers or diffusers.
PROCESS_BYTES = {
    EngineKind.LLM: 700 * 2**20,
    EngineKind.DIFFUSION: 700 * 2**20,
    EngineKind.SIMULATOR: 150 * 2**20,
}
_BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_QUANTIZED_BYTES_PER_VALUE = {"int8": 1.0, "float8": 1.0, "int4": 0.5}
# The name of a component's weights when they are no variant of it ("fp16", "non_ema"), whole or a shard.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
_DENOISERS = ("unet", "transformer")


@dataclass(frozen=True, slots=True)
class Weights:
    """What a file stores: values that take the dtype they are loaded in, and bytes that stay as they are."""

    values: int = 0
    fixed_bytes: int = 0  # integers: position ids, say

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.values + other.values, self.fixed_bytes + other.fixed_bytes)


def replica_bytes(model: ModelConfig) -> int:
    """An estimate for one replica: process, weights, keys and values. Unknown weights count as nothing."""
    source = None if model.source is None else parse_source(model.source, revision=model.revision)
    process = PROCESS_BYTES[model.engine]
    if model.engine is EngineKind.DIFFUSION and isinstance(source, FolderSource):
        options = model.diffusion_options
        return process + sum(pipeline_bytes(source.path, options, options.dtype).values())
    # Keys and values: a fraction is of what is free by then, so it always fits.
    budget = model.llm_options.kv_cache_memory if model.engine is EngineKind.LLM else 0
    kv_bytes = budget if isinstance(budget, int) else 0
    weights = 0 if source is None else parameters(source) * _width(model.llm_options.dtype)
    return process + weights + kv_bytes


def pipeline_bytes(folder: Path, options: DiffusionConfig, dtype: str) -> dict[str, int]:
    """Bytes of each component of a diffusers folder once it is loaded in ``dtype`` with these options.

    Exact for what is neither quantized nor cast, since the headers have every tensor's type and extent.
    """
    return {
        name: round(weights.values * _component_width(name, options, dtype)) + weights.fixed_bytes
        for name, weights in component_weights(folder).items()
        if name != "safety_checker" or options.safety_checker
    }


def component_weights(folder: Path) -> dict[str, Weights]:
    """Of the components that ``model_index.json`` names; of the whole folder where there is no such file."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {"": _sum(_loaded_files(folder, "**/*.safetensors"))}
    try:
        entries = json.loads(index.read_text(encoding="utf-8")).items()
    except (ValueError, AttributeError):
        raise ModelSourceError(
            f"source: {index} is not a description of a pipeline", param="source"
        ) from None
    return {
        name: _sum(_loaded_files(folder / name, "*.safetensors"))
        for name, entry in entries
        if isinstance(entry, list) and entry and entry[0] is not None and (folder / name).is_dir()
    }


def parameters(source: ModelSource) -> int:
    """How many values the weights have. 0 for a hub source, whose files are not here."""
    if isinstance(source, GGUFSource):
        return _gguf_values(source.path)
    if isinstance(source, FolderSource):
        return _sum(_loaded_files(source.path, "**/*.safetensors")).values
    return 0


def _width(dtype: str) -> int:
    """Bytes of a value. "auto" may turn out as either: the larger one is the honest estimate."""
    return _BYTES_PER_VALUE.get(dtype, 4)


def _component_width(name: str, options: DiffusionConfig, dtype: str) -> float:
    quantization = options.quantization
    if quantization is not None and name in (quantization.components or _DENOISERS):
        return _QUANTIZED_BYTES_PER_VALUE[quantization.weights]
    if options.layerwise_casting is not None and name in _DENOISERS:
        return _width(options.layerwise_casting)
    return _width(dtype)


def _loaded_files(folder: Path, pattern: str) -> list[Path]:
    """Without second copies in another precision: a variant counts only where there is nothing else."""
    files = list(folder.glob(pattern))
    plain = [file for file in files if _WEIGHTS.fullmatch(file.name)]
    sharded = [file for file in plain if "-of-" in file.name]
    return [
        file
        for file in plain or files
        # Beside the shards of an index, a whole file is the same weights again, and is not read.
        if not any(shard.parent == file.parent for shard in sharded) or file in sharded
    ]


def _sum(files: list[Path]) -> Weights:
    return sum((_safetensors_weights(file) for file in files), start=Weights())


def _safetensors_weights(file: Path) -> Weights:
    """From the header alone: 8 bytes of length, then JSON with every tensor's type and extent."""
    total = Weights()
    for dtype, num_bytes in _tensors(file):
        floating = re.fullmatch(r"B?F(\d+)(_\w+)?", dtype)
        total += Weights(values=num_bytes * 8 // int(floating[1])) if floating else Weights(0, num_bytes)
    return total


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """The type and the bytes of every tensor in the file."""
    size = file.stat().st_size
    with file.open("rb") as data:
        start = data.read(8)
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (size,)
        # A pointer left by Git LFS, say.
        header = b"" if length > size - 8 else data.read(length)
    try:
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                yield str(tensor["dtype"]), int(end) - int(begin)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelSourceError(f"source: {file} is not a safetensors file", param="source") from None


def _gguf_values(file: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(str(file)).tensors)
