"""What is refused before any weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.files import check_fits, read_index
from blaze.engines.diffusion.pipelines import load_pipeline
from blaze.errors import EnvironmentProblem, ModelSourceError
from blaze.models.sources import FolderSource, GGUFSource, HubSource, package_path

DIGITS = package_path("blaze/assets/digits")
OPTIONS = DiffusionConfig(dtype="float32", device="cpu")
PLENTY = 2**40

# Leaves a mark when it is run.
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Custom: pass\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copied = tmp_path / "model"
    shutil.copytree(DIGITS, copied)
    return copied


def rewrite(folder: Path, **entries: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def load(folder: Path) -> None:
    load_pipeline(FolderSource(folder), OPTIONS, 1, folder / "cache", free=lambda _device: PLENTY)


@pytest.mark.parametrize(
    "entries",
    [
        {"_class_name": ["custom", "Custom"]},
        {"_class_name": "CustomPipeline"},
        {"_class_name": "UNet2DModel"},
        {"_class_name": None},
        {"unet": ["custom", "Custom"]},
        {"unet": ["os", "system"]},
        {"text_encoder": [["custom"], "Custom"]},
    ],
)
def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(
    folder: Path, entries: dict[str, object]
) -> None:
    for place in (folder, folder / "unet"):
        (place / "custom.py").write_text(CODE)
        (place / "pipeline.py").write_text(CODE)
    rewrite(folder, **entries)
    with pytest.raises(ModelSourceError, match="never run") as caught:
        load(folder)
    assert caught.value.param == "source"
    assert not list(folder.glob("**/ran"))


def test_a_component_cannot_bring_code_under_a_librarys_name(folder: Path) -> None:
    (folder / "unet" / "diffusers.py").write_text(CODE)
    with pytest.raises(ModelSourceError):
        load(folder)
    assert not list(folder.glob("**/ran"))


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"'])
def test_an_index_that_cannot_be_read_is_refused(folder: Path, content: str) -> None:
    (folder / "model_index.json").write_text(content)
    with pytest.raises(ModelSourceError):
        read_index(folder)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="model_index"):
        load(tmp_path)


def test_a_gguf_file_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="GGUF"):
        load_pipeline(GGUFSource(tmp_path / "m.gguf"), OPTIONS, 1, tmp_path)


def test_weights_that_are_pickles_are_not_loaded(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelSourceError, match="cannot be loaded"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 7, 1000, 100_000])
def test_weights_that_are_cut_off_are_refused_by_name(folder: Path, keep: int) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelSourceError) as caught:
        load(folder)
    assert caught.value.param == "source"


# --- Size ---------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_refused_before_they_are_read(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    weights.write_bytes(weights.read_bytes()[: 8 + header])  # told by the header, and there is nothing else
    with pytest.raises(
        EnvironmentProblem, match=r"take \d MiB in float32 \(unet: \d MiB\), and 1 MiB are free"
    ):
        load_pipeline(FolderSource(folder), OPTIONS, 1, folder, free=lambda _device: 2**20)


def test_the_border_is_the_sum_of_the_weights() -> None:
    total = sum(file.stat().st_size for file in DIGITS.glob("**/*.safetensors"))
    headers = sum(
        8 + int.from_bytes(file.read_bytes()[:8], "little") for file in DIGITS.glob("**/*.safetensors")
    )
    check_fits(DIGITS, OPTIONS, "float32", total - headers)
    with pytest.raises(EnvironmentProblem):
        check_fits(DIGITS, OPTIONS, "float32", total - headers - 1)
    check_fits(DIGITS, OPTIONS, "bfloat16", (total - headers) // 2)


def test_what_makes_weights_smaller_counts() -> None:
    needed = 4_000_000  # of digits in float32: 4.6 MB, most of them the UNet's
    with pytest.raises(EnvironmentProblem):
        check_fits(DIGITS, OPTIONS, "float32", needed)
    check_fits(DIGITS, DiffusionConfig(layerwise_casting="bfloat16"), "float32", needed)
    check_fits(
        DIGITS, DiffusionConfig.model_validate({"quantization": {"backend": "quanto"}}), "float32", needed
    )


# --- The hub ------------------------------------------------------------------------------------------


def test_a_hub_model_is_downloaded_without_code_and_without_pickles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    loaded = load_pipeline(HubSource("org/model", "v2"), OPTIONS, 1, folder)
    assert asked == {
        "name": "org/model",
        "revision": "v2",
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    assert type(loaded.pipeline).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize("error", [OSError("offline"), ValueError("no such revision")])
def test_a_hub_model_that_cannot_be_had_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_name: str, **_options: object) -> str:
        raise error

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(ModelSourceError, match="'org/model' cannot be loaded: "):
        load_pipeline(HubSource("org/model"), OPTIONS, 1, Path("/nowhere"))
