"""LoRA adapters: what they draw is what diffusers draws with them, and nothing is left when they are off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.integrations.peft as transformers_peft
from safetensors.torch import save_file

from blaze.engines.diffusion.adapters import activate
from blaze.engines.diffusion.pipelines import LoadedPipeline, Task
from blaze.errors import ModelSourceError
from tests.golden.pipeline_folders import Pixels, digits, draw, load, picture
from tests.golden.tiny_loras import write_lora

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        "ink": write_lora(folder, "ink.safetensors", seed=1),
        "oil": write_lora(folder, "oil.safetensors", seed=2, rank=2, text_encoder=True),
        "words": write_lora(folder, "words.safetensors", seed=3, text_encoder=True, unet=False),
    }


@pytest.fixture(scope="module")
def loaded(files: dict[str, Path]) -> LoadedPipeline:
    return load(loras={name: str(file) for name, file in files.items()})


@pytest.fixture(scope="module")
def base() -> Pixels:
    return draw(digits())


def alone(
    files: dict[str, Path], names: Sequence[str], scales: Sequence[float], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Diffusers by itself with these adapters. Transformers asks for a peft that is not out yet to load the
    text encoder's; what it does with the one that is there is what counts."""
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "0.21.0")
    pipeline = digits()
    for name in names:
        pipeline.load_lora_weights(files[name].parent, weight_name=files[name].name, adapter_name=name)
    pipeline.set_adapters(list(names), list(scales))
    return pipeline


@pytest.mark.parametrize(
    "adapters",
    [
        (("ink", 1.0),),
        (("ink", 0.3),),
        (("ink", -2.0),),
        (("oil", 1.0),),
        (("words", 1.0),),
        (("ink", 0.5), ("oil", 0.8)),
        (("oil", 0.8), ("words", 0.2), ("ink", 0.5)),
    ],
)
def test_an_adapter_draws_what_diffusers_draws_with_it_bit_by_bit(
    loaded: LoadedPipeline,
    files: dict[str, Path],
    base: Pixels,
    adapters: tuple[tuple[str, float], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    activate(loaded, adapters)
    drawn = draw(loaded.pipeline)
    expected = draw(alone(files, *zip(*adapters, strict=True), monkeypatch))
    assert np.array_equal(drawn, expected)
    assert np.abs(drawn - base).max() > 0.05


@pytest.mark.parametrize("off", [(), (("ink", 0.0),), (("oil", 0.0), ("words", 0.0))])
def test_without_adapters_the_picture_is_the_bases_bit_by_bit(
    loaded: LoadedPipeline, base: Pixels, off: tuple[tuple[str, float], ...]
) -> None:
    for before in ((("ink", 1.0),), (("words", 1.0), ("oil", 0.5))):
        activate(loaded, before)
        assert not np.array_equal(draw(loaded.pipeline), base)
        activate(loaded, off)
        assert np.array_equal(draw(loaded.pipeline), base)


def test_they_are_off_after_loading(files: dict[str, Path], base: Pixels) -> None:
    fresh = load(loras={"ink": str(files["ink"])})
    assert np.array_equal(draw(fresh.pipeline), base)


def test_a_zero_among_others_counts_as_not_given(loaded: LoadedPipeline) -> None:
    activate(loaded, (("ink", 1.0), ("oil", 0.0)))
    drawn = draw(loaded.pipeline)
    activate(loaded, (("ink", 1.0),))
    assert np.array_equal(drawn, draw(loaded.pipeline))


def test_switching_to_and_fro_leaves_no_trace(loaded: LoadedPipeline) -> None:
    states = [(("ink", 1.0),), (), (("ink", 0.5), ("words", 1.0)), (("words", 1.0), ("ink", 0.5))]
    first = []
    for state in states:
        activate(loaded, state)
        first.append(draw(loaded.pipeline))
    for index in (2, 0, 3, 1, 1, 0, 2, 3):
        activate(loaded, states[index])
        assert np.array_equal(draw(loaded.pipeline), first[index])


def test_variants_draw_with_them_too(loaded: LoadedPipeline) -> None:
    given = {"image": picture(), "strength": 0.7}
    activate(loaded, ())
    without = draw(loaded.pipelines[Task.IMAGE], **given)
    activate(loaded, (("ink", 1.0),))
    assert np.abs(draw(loaded.pipelines[Task.IMAGE], **given) - without).max() > 0.05


def test_what_is_on_already_is_not_switched_again(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraLayer

    activate(loaded, (("ink", 0.5),))
    for method in ("set_adapter", "set_scale", "enable_adapters"):
        monkeypatch.setattr(LoraLayer, method, lambda *_args, **_options: pytest.fail("switched"))
    activate(loaded, (("ink", 0.5),))
    activate(loaded, (("ink", 0.5), ("oil", 0.0)))
    with pytest.raises(pytest.fail.Exception):
        activate(loaded, (("ink", 0.6),))


def test_weights_need_no_gradients(loaded: LoadedPipeline) -> None:
    activate(loaded, (("ink", 1.0), ("words", 1.0)))
    for module in (loaded.pipeline.unet, loaded.pipeline.text_encoder):
        assert not [
            name for name, weight in module.named_parameters() if weight.requires_grad and "lora" in name
        ]


# --- Sources ------------------------------------------------------------------------------------------


def test_a_folder_with_one_file_or_one_of_the_usual_name_will_do(tmp_path: Path, base: Pixels) -> None:
    write_lora(tmp_path)
    fresh = load(loras={"ink": str(tmp_path)})
    activate(fresh, (("ink", 1.0),))
    drawn = draw(fresh.pipeline)
    assert not np.array_equal(drawn, base)
    (tmp_path / "ink.safetensors").rename(tmp_path / "pytorch_lora_weights.safetensors")
    write_lora(tmp_path, "other.safetensors", seed=7)
    fresh = load(loras={"ink": str(tmp_path)})
    activate(fresh, (("ink", 1.0),))
    assert np.array_equal(draw(fresh.pipeline), drawn)


def _two_files(folder: Path) -> str:
    write_lora(folder, "a.safetensors")
    write_lora(folder, "b.safetensors")
    return str(folder)


def _pickle(folder: Path) -> str:
    torch.save({"unet.x.lora_A.weight": torch.zeros(1)}, folder / "pytorch_lora_weights.bin")
    return str(folder)


def _other_model(folder: Path) -> str:
    weights = {
        "transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8),
        "transformer.blocks.0.attn.to_q.lora_B.weight": torch.zeros(8, 4),
    }
    save_file(weights, folder / "x.safetensors")
    return str(folder)


def _other_shape(folder: Path) -> str:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{path}.lora_A.weight": torch.zeros(4, 99), f"{path}.lora_B.weight": torch.zeros(99, 4)}
    save_file(weights, folder / "x.safetensors")
    return str(folder)


def _no_lora(folder: Path) -> str:
    save_file({"unet.conv_in.weight": torch.zeros(2)}, folder / "x.safetensors")
    return str(folder)


def _cut_off(folder: Path) -> str:
    file = write_lora(folder)
    file.write_bytes(file.read_bytes()[:500])
    return str(file)


@pytest.mark.parametrize(
    "make",
    [
        _two_files,
        _pickle,
        _other_model,
        _other_shape,
        _no_lora,
        _cut_off,
        str,
        lambda folder: str(folder / "missing.safetensors"),
        lambda folder: "package:blaze/nowhere.safetensors",
    ],
)
def test_files_that_are_none_of_this_models_adapters_are_refused_by_name(tmp_path: Path, make: Any) -> None:
    with pytest.raises(ModelSourceError) as caught:
        load(loras={"ink": make(tmp_path)})
    assert caught.value.message.startswith("diffusion.loras.ink: ")
    assert caught.value.param == "diffusion"
