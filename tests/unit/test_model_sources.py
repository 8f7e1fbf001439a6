from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from blaze.config import parse_args
from blaze.engines.llm.model import commit_of
from blaze.errors import ConfigError, ModelSourceError
from blaze.models.cache import identity
from blaze.models.contents import contents
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


def test_of_a_branch_it_is_the_commit_that_tells_weights_apart(tmp_path: Path) -> None:
    branch = HubSource("org/model", "main")
    first, second = (identity(branch, tmp_path, commit=commit) for commit in ("c1", "c2"))
    assert first != second
    assert identity(HubSource("org/model"), tmp_path, commit="c1") == first


@pytest.mark.parametrize("revision", [None, "main", "1" * 40])
def test_what_a_revision_stands_for_is_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--model"
    for name, text in (("refs/main", "1" * 40), (f"snapshots/{'1' * 40}/config.json", "{}")):
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text(text)
    assert commit_of(HubSource("org/model", revision)) == "1" * 40
    with pytest.raises(OSError, match="cached files"):
        commit_of(HubSource("org/other", revision))


def test_other_weights_in_the_middle_of_a_file_are_other_weights(tmp_path: Path) -> None:
    file, content = tmp_path / "model.safetensors", bytearray(3 << 20)
    found = []
    for middle in (0, 1, 0):
        content[1_500_000] = middle
        file.write_bytes(content)
        found.append(identity(FolderSource(tmp_path), tmp_path / "cache"))
    assert found[0] == found[2] != found[1]


def test_files_that_were_not_written_are_not_read_again(tmp_path: Path) -> None:
    file, cache = tmp_path / "model.safetensors", tmp_path / "cache"
    file.write_bytes(b"weights")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    digest = contents(file, cache)
    (note,) = (cache / "contents").iterdir()
    assert note.read_text() == digest == hashlib.sha256(b"weights").hexdigest()
    note.write_text("remembered")
    assert contents(file, cache) == "remembered"
    file.write_bytes(b"others!")
    os.utime(file, (1_000_000_001, 1_000_000_001))
    assert contents(file, cache) == hashlib.sha256(b"others!").hexdigest()


def test_without_a_cache_files_are_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    assert contents(file, file) == contents(file, tmp_path / "cache")
