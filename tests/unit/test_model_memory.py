from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from blaze.config import ModelConfig
from blaze.errors import ModelSourceError
from blaze.models.cache import fingerprint, is_converted, local_model
from blaze.models.memory import PROCESS_BYTES, parameters, replica_bytes
from blaze.models.sources import FolderSource, GGUFSource, HubSource
from blaze.types import EngineKind


def write_safetensors(path: Path, **shapes: list[int]) -> None:
    """A header without data: all that may be read."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    header |= {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()
    }
    encoded = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "model.safetensors", weight=[10, 20], bias=[20], scale=[])
    write_safetensors(tmp_path / "vae" / "model.safetensors", weight=[3, 3])
    return tmp_path


def test_values_are_counted_from_the_headers_of_all_parts(folder: Path) -> None:
    assert parameters(FolderSource(folder)) == 200 + 20 + 1 + 9


def test_a_second_copy_in_half_precision_is_not_counted(folder: Path) -> None:
    write_safetensors(folder / "model.fp16.safetensors", weight=[10, 20])
    assert parameters(FolderSource(folder)) == 230


def test_the_only_copy_is_counted_whatever_its_precision(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.fp16.safetensors", weight=[10, 20])
    assert parameters(FolderSource(tmp_path)) == 200


@pytest.mark.parametrize("content", [b"", b"1234", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelSourceError, match="not a safetensors file"):
        parameters(FolderSource(tmp_path))


def test_a_hub_source_counts_as_nothing_before_it_is_here() -> None:
    assert parameters(HubSource("org/model")) == 0


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("auto", 4)])
def test_a_replica_takes_its_process_and_its_weights(folder: Path, dtype: str, width: int) -> None:
    model = ModelConfig.model_validate(
        {"name": "m", "engine": "llm", "source": str(folder), "llm": {"dtype": dtype}}
    )
    assert replica_bytes(model) == PROCESS_BYTES[EngineKind.LLM] + 230 * width


def test_memory_for_keys_and_values_counts_when_it_is_said_in_bytes(folder: Path) -> None:
    def model(budget: float) -> ModelConfig:
        return ModelConfig.model_validate(
            {"name": "m", "engine": "llm", "source": str(folder), "llm": {"kv_cache_memory": budget}}
        )

    assert replica_bytes(model(2**30)) == replica_bytes(model(0.5)) + 2**30


def test_the_dtype_of_a_diffusion_model_is_its_own(folder: Path) -> None:
    model = ModelConfig.model_validate(
        {"name": "m", "engine": "diffusion", "source": str(folder), "diffusion": {"dtype": "bfloat16"}}
    )
    assert replica_bytes(model) == PROCESS_BYTES[EngineKind.DIFFUSION] + 230 * 2


def test_a_simulator_takes_its_process_only() -> None:
    model = ModelConfig(name="m", engine=EngineKind.SIMULATOR)
    assert replica_bytes(model) == PROCESS_BYTES[EngineKind.SIMULATOR]


# --- Where the loaded files lie ----------------------------------------------------------------------


def test_folders_and_hub_ids_are_loaded_from_where_they_are(tmp_path: Path) -> None:
    assert local_model(FolderSource(tmp_path), tmp_path / "cache") == str(tmp_path)
    assert local_model(HubSource("org/model"), tmp_path / "cache") == "org/model"
    assert is_converted(FolderSource(tmp_path), tmp_path / "cache")


def test_a_gguf_file_is_converted_only_when_its_mark_is_there(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    cache = tmp_path / "cache"
    assert not is_converted(GGUFSource(gguf), cache)
    folder = cache / "converted" / f"m-{fingerprint(gguf)}"
    folder.mkdir(parents=True)
    assert not is_converted(GGUFSource(gguf), cache), "a conversion that was cut off does not count"
    (folder / "blaze.converted").write_text("m.gguf")
    assert is_converted(GGUFSource(gguf), cache)
    assert local_model(GGUFSource(gguf), cache) == str(folder)


@pytest.mark.parametrize("at", [0, 1_500_000, 3_000_000])
def test_a_fingerprint_tells_versions_apart_by_size_beginning_and_end(tmp_path: Path, at: int) -> None:
    path = tmp_path / "m.gguf"
    content = bytearray(3_000_001)
    path.write_bytes(content)
    before = fingerprint(path)
    assert fingerprint(path) == before
    content[at] = 1
    path.write_bytes(content)
    assert (fingerprint(path) == before) is (at == 1_500_000)
    path.write_bytes(bytes(3_000_002))
    assert fingerprint(path) != before
