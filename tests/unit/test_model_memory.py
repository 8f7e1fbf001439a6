from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from blaze.config import DiffusionConfig, ModelConfig
from blaze.errors import ModelSourceError
from blaze.models.cache import fingerprint, is_converted, local_model
from blaze.models.memory import PROCESS_BYTES, parameters, pipeline_bytes, replica_bytes
from blaze.models.sources import FolderSource, GGUFSource, HubSource, package_path
from blaze.types import EngineKind

BITS = {"F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "I64": 64}


def write_safetensors(path: Path, dtype: str = "F32", **shapes: list[int]) -> None:
    """A header without data: all that may be read."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
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


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        b"version https://git-lfs.github.com/spec/v1\n",
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a":{}}',
        struct.pack("<Q", 26) + b'{"a":{"data_offsets":[1]}}',
    ],
)
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


# --- Pipelines ---------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    library = ["diffusers", "X"]
    index = {"_class_name": "X", "unet": library, "vae": library, "scheduler": library, "gone": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"safety_checker": library}))
    write_safetensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "F16", weight=[10, 10])
    write_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", weight=[5, 5])
    write_safetensors(tmp_path / "vae" / "model.safetensors", "I64", position_ids=[7])
    write_safetensors(tmp_path / "safety_checker" / "model.safetensors", weight=[3])
    write_safetensors(tmp_path / "gone" / "model.safetensors", weight=[99])
    write_safetensors(tmp_path / "v1-5-pruned.safetensors", weight=[999])
    (tmp_path / "scheduler").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        ("float32", {}, {"unet": 400, "vae": 100 + 56, "scheduler": 0}),
        ("bfloat16", {}, {"unet": 200, "vae": 50 + 56, "scheduler": 0}),
        (
            "float32",
            {"safety_checker": True},
            {"unet": 400, "vae": 156, "scheduler": 0, "safety_checker": 12},
        ),
        ("float32", {"layerwise_casting": "float8_e4m3fn"}, {"unet": 100, "vae": 156, "scheduler": 0}),
        ("float32", {"quantization": {"backend": "torchao"}}, {"unet": 100, "vae": 156, "scheduler": 0}),
        (
            "bfloat16",
            {"quantization": {"backend": "torchao", "weights": "int4", "components": ["vae"]}},
            {"unet": 200, "vae": 12 + 56, "scheduler": 0},
        ),
    ],
)
def test_a_component_takes_its_values_in_the_dtype_they_will_have(
    pipeline: Path, dtype: str, options: dict[str, object], expected: dict[str, int]
) -> None:
    assert pipeline_bytes(pipeline, DiffusionConfig.model_validate(options), dtype) == expected


def test_variants_and_whole_copies_beside_shards_are_not_loaded_and_not_counted(pipeline: Path) -> None:
    unet = pipeline / "unet"
    write_safetensors(unet / "diffusion_pytorch_model.fp16.safetensors", weight=[10, 10])
    write_safetensors(unet / "diffusion_pytorch_model.non_ema.safetensors", weight=[10, 10])
    for shard in (1, 2):
        write_safetensors(unet / f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors", weight=[50])
    assert pipeline_bytes(pipeline, DiffusionConfig(), "float32")["unet"] == 400


@pytest.mark.parametrize("content", ["[]", "{", '"x"'])
def test_an_index_that_is_no_description_is_refused(pipeline: Path, content: str) -> None:
    (pipeline / "model_index.json").write_text(content)
    with pytest.raises(ModelSourceError, match="not a description"):
        pipeline_bytes(pipeline, DiffusionConfig(), "float32")


def test_the_digits_model_takes_what_its_headers_say() -> None:
    folder = package_path("blaze/assets/digits")
    files = sum(file.stat().st_size for file in folder.glob("**/*.safetensors"))
    assert 0.98 * files < sum(pipeline_bytes(folder, DiffusionConfig(), "float32").values()) < files


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
