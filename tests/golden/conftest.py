from __future__ import annotations

from pathlib import Path

import pytest

from blaze.engines.diffusion.pipelines import LoadedPipeline
from tests.golden.pipeline_folders import four_channels, load, of_class
from tests.golden.tiny_pipelines import NAMES, tiny_pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of all small pipelines, by name."""
    return {name: tiny_pipeline(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a StableDiffusionPipeline with four channels of latents."""
    return of_class("StableDiffusionPipeline", tmp_path_factory.mktemp("sd"), **four_channels())


@pytest.fixture(scope="module")
def loaded(four: Path) -> LoadedPipeline:
    """Of that folder."""
    return load(four)
