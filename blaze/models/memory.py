"""How much memory a model will take, told from its files before anything is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from blaze.config import ModelConfig
from blaze.errors import ModelSourceError
from blaze.models.sources import FolderSource, GGUFSource, ModelSource, parse_source
from blaze.types import EngineKind

# What a process takes before its weights, measured: Python, Ray, torch and transformers or diffusers.
PROCESS_BYTES = {
    EngineKind.LLM: 700 * 2**20,
    EngineKind.DIFFUSION: 700 * 2**20,
    EngineKind.SIMULATOR: 150 * 2**20,
}
_BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}


def replica_bytes(model: ModelConfig) -> int:
    """An estimate for one replica: process, weights, keys and values. Unknown weights count as nothing."""
    options = model.llm_options if model.engine is EngineKind.LLM else model.diffusion_options
    source = None if model.source is None else parse_source(model.source, revision=model.revision)
    # Keys and values: a fraction is of what is free by then, so it always fits.
    budget = model.llm_options.kv_cache_memory if model.engine is EngineKind.LLM else 0
    kv_bytes = budget if isinstance(budget, int) else 0
    # "auto" may turn out as either: the larger one is the honest estimate.
    width = _BYTES_PER_VALUE.get(options.dtype, 4)
    weights = 0 if source is None else parameters(source) * width
    return PROCESS_BYTES[model.engine] + weights + kv_bytes


def parameters(source: ModelSource) -> int:
    """How many values the weights have. 0 for a hub source, whose files are not here."""
    if isinstance(source, GGUFSource):
        return _gguf_values(source.path)
    if isinstance(source, FolderSource):
        files = list(source.path.glob("**/*.safetensors"))
        whole = [file for file in files if ".fp16." not in file.name]  # a second copy, not loaded
        return sum(_safetensors_values(file) for file in whole or files)
    return 0


def _safetensors_values(file: Path) -> int:
    """From the header alone: 8 bytes of length, then JSON with every tensor's shape."""
    size = file.stat().st_size
    with file.open("rb") as data:
        start = data.read(8)
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (size,)
        if length > size - 8:  # a pointer left by Git LFS, say
            raise ModelSourceError(f"source: {file} is not a safetensors file", param="source")
        header = json.loads(data.read(length))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            values = 1
            for side in tensor["shape"]:
                values *= side
            total += values
    return total


def _gguf_values(file: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(str(file)).tensors)
