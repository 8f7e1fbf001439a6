from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from blaze.config import parse_args
from blaze.errors import ConfigError, ModelSourceError
from blaze.models.cache import identity
from blaze.models.sources import (
    FolderSource,
    GGUFSource,
    HubSource,
    check_sources,
    package_path,
    parse_source,
)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a model inside; importing it would raise."""
    root = tmp_path / "packed_model"
    root.mkdir()
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "secret.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/model.v1-x_y"])
def test_a_hub_id_is_kept_with_its_revision(name: str) -> None:
    assert parse_source(name, revision="abc") == HubSource(name, "abc")


def test_a_folder_and_a_gguf_file_are_found(model_folder: Path) -> None:
    assert parse_source(str(model_folder)) == FolderSource(model_folder)
    gguf = model_folder / "weights.gguf"
    gguf.write_bytes(b"GGUF")
    assert parse_source(str(gguf)) == GGUFSource(gguf)


def test_home_and_relative_paths_are_paths(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert parse_source("~/model") == FolderSource(model_folder)
    monkeypatch.chdir(model_folder.parent)
    assert parse_source("./model") == FolderSource(Path("model"))


@pytest.mark.parametrize("text", ["", "a b", "org/model/more", "file:///x", "http://x/y", "C:\\x", "a\0b"])
def test_what_is_neither_id_nor_path_is_refused(text: str) -> None:
    with pytest.raises(ModelSourceError) as caught:
        parse_source(text)
    assert caught.value.param == "source"


def test_a_missing_path_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="nowhere"):
        parse_source(str(tmp_path / "nowhere"))


def test_a_file_that_is_not_gguf_is_refused(model_folder: Path) -> None:
    with pytest.raises(ModelSourceError, match="not a GGUF file"):
        parse_source(str(model_folder / "model.safetensors"))


# --- Packages ----------------------------------------------------------------------------------------


def test_a_file_in_a_package_is_found_without_importing_it(package: Path) -> None:
    assert parse_source("package:packed_model/weights.gguf") == GGUFSource(
        (package / "weights.gguf").resolve()
    )
    assert "packed_model" not in sys.modules


@pytest.mark.parametrize("inside", ["../secret.gguf", "a/../../secret.gguf", "/etc/passwd"])
def test_case_46_a_path_out_of_the_package_is_refused(package: Path, inside: str) -> None:
    with pytest.raises(ModelSourceError, match="outside the package"):
        package_path(f"packed_model/{inside}")


def test_case_46_a_link_out_of_the_package_is_refused(package: Path) -> None:
    (package / "link.gguf").symlink_to(package.parent / "secret.gguf")
    with pytest.raises(ModelSourceError, match="outside the package"):
        package_path("packed_model/link.gguf")


@pytest.mark.parametrize("reference", ["no_such_package_here/x", "", "/x", "a.b/x", "not-a-name/x"])
def test_a_package_that_is_not_installed_is_refused(reference: str) -> None:
    with pytest.raises(ModelSourceError, match="not installed"):
        package_path(reference)


# --- Files that are never loaded ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "v1.ckpt", "w.pkl", "w.pickle"])
@pytest.mark.parametrize("inside", [".", "unet"])
def test_case_45_a_folder_of_pickles_is_refused(tmp_path: Path, name: str, inside: str) -> None:
    part = tmp_path / inside
    part.mkdir(exist_ok=True)
    (part / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelSourceError, match=name):
        parse_source(str(tmp_path))


def test_case_45_pickles_beside_safetensors_are_left_alone(model_folder: Path) -> None:
    (model_folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    assert parse_source(str(model_folder)) == FolderSource(model_folder)


def test_case_45_safetensors_of_one_part_do_not_excuse_the_pickle_of_another(model_folder: Path) -> None:
    (model_folder / "vae").mkdir()
    (model_folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelSourceError, match="pickle"):
        parse_source(str(model_folder))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors"])
def test_case_46_an_index_that_points_outside_is_refused(model_folder: Path, name: str) -> None:
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layer": "model.safetensors", "other": name}}))
    with pytest.raises(ModelSourceError, match="points outside"):
        parse_source(str(model_folder))


def test_case_46_an_index_that_names_a_link_to_the_outside_is_refused(model_folder: Path) -> None:
    outside = model_folder.parent / "secret.safetensors"
    outside.write_bytes(b"")
    (model_folder / "shard.safetensors").symlink_to(outside)
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layer": "shard.safetensors"}}))
    with pytest.raises(ModelSourceError, match="points outside"):
        parse_source(str(model_folder))


def test_an_index_inside_the_folder_is_accepted(model_folder: Path) -> None:
    part = model_folder / "unet"
    part.mkdir()
    (part / "one.safetensors").write_bytes(b"")
    (part / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"layer": "one.safetensors"}}))
    assert parse_source(str(model_folder)) == FolderSource(model_folder)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": []}', '"x"'])
def test_an_index_that_is_none_is_refused(model_folder: Path, text: str) -> None:
    (model_folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelSourceError, match="not an index"):
        parse_source(str(model_folder))


def test_all_models_with_wrong_sources_are_named(model_folder: Path) -> None:
    def llm(name: str, source: str) -> dict[str, str]:
        return {"name": name, "engine": "llm", "source": source}

    right = llm("right", str(model_folder))
    config = parse_args({"models": [right, llm("gone", "/nowhere/x"), llm("lost", "package:no_such/y")]})
    with pytest.raises(ConfigError) as caught:
        check_sources(config)
    assert "models[0]" not in caught.value.message
    assert "models[1].source" in caught.value.message
    assert "models[2].source" in caught.value.message
    check_sources(parse_args({"models": [right, {"name": "sim", "engine": "simulator"}]}))


@pytest.mark.parametrize(("engine", "needed"), [("llm", "config.json"), ("diffusion", "model_index.json")])
def test_a_folder_that_cannot_be_a_model_of_the_engine_is_refused(
    tmp_path: Path, engine: str, needed: str
) -> None:
    config = parse_args({"models": [{"name": "m", "engine": engine, "source": str(tmp_path)}]})
    with pytest.raises(ConfigError, match=needed):
        check_sources(config)
    (tmp_path / needed).write_text("{}")
    with pytest.raises(ConfigError, match="no safetensors"):
        check_sources(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    check_sources(config)


def test_weights_are_the_same_wherever_they_lie_and_others_when_they_change(tmp_path: Path) -> None:
    for name, weights in (("one", b"a" * 100), ("copy", b"a" * 100), ("other", b"b" * 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    sources = [FolderSource(tmp_path / name) for name in ("one", "copy", "other")]
    one, copy, other = (identity(source, tmp_path) for source in sources)
    assert one == copy != other
    first, second = (identity(HubSource("org/model", revision), tmp_path) for revision in ("v1", "v2"))
    assert first != second
