from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from blaze.engines.diffusion.decoding import checked_vae, preview


class FakeVAE(nn.Module):
    """Decodes latents to themselves; what is above ``largest`` overflows in 16 bits."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.config = config
        self.decoded: list[int] = []
        self.generator: object = None
        self.largest = 100.0
        self.overflow = float("nan")
        self.before: Callable[[Tensor], None] = lambda _z: None

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> Any:
        self.before(z)
        self.decoded.append(len(z))
        self.generator = generator
        pixels = z * self.weight
        if self.dtype is not torch.float32:
            pixels = pixels.masked_fill(pixels.abs() > self.largest, self.overflow)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


def latents(*values: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()


def rows(pixels: Tensor) -> list[float]:
    return [float(row.flatten()[0]) for row in pixels]


@pytest.mark.parametrize("overflow", [float("nan"), float("inf")])
@pytest.mark.parametrize("return_dict", [True, False])
def test_case_41_rows_that_overflow_are_decoded_again_in_fp32(overflow: float, return_dict: bool) -> None:
    vae = FakeVAE()
    vae.overflow = overflow
    result = checked_vae(vae).decode(latents(1, 200, 3), return_dict=return_dict)
    assert rows(result.sample if return_dict else result[0]) == [1, 200, 3]
    assert vae.dtype is torch.bfloat16, "the shared weights stay as they are"
    assert vae.decoded == [3], "a copy of it decodes the one again"


def test_rows_that_are_no_numbers_in_fp32_either_are_nan() -> None:
    vae = FakeVAE(torch.float32)
    z = latents(1, float("inf"), 3, dtype=torch.float32)
    z[1, 0, 0, 0] = 0.5  # one good pixel does not make it an image
    pixels = checked_vae(vae).decode(z, return_dict=False)[0]
    assert pixels[1].isnan().all()
    assert (rows(pixels)[0], rows(pixels)[2]) == (1, 3)
    assert vae.decoded == [3]


def test_good_pixels_are_decoded_once() -> None:
    vae = FakeVAE()
    checked_vae(vae).decode(latents(1, 2))
    assert vae.decoded == [2]


def test_images_are_decoded_one_by_one_when_memory_runs_out() -> None:
    def one_fits(z: Tensor) -> None:
        if len(z) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    vae = FakeVAE()
    vae.before = one_fits
    pixels = checked_vae(vae).decode(latents(1, 2, 3), return_dict=False, generator=None)[0]
    assert rows(pixels) == [1, 2, 3]


def test_other_errors_are_those_of_the_vae() -> None:
    def fail(_z: Tensor) -> None:
        raise ValueError("no such layer")

    vae = FakeVAE()
    vae.before = fail
    with pytest.raises(ValueError, match="layer"):
        checked_vae(vae).decode(latents(1))


@pytest.mark.parametrize("return_dict", [True, False])
def test_latents_that_nobody_waits_for_are_not_decoded(return_dict: bool) -> None:
    vae, again = FakeVAE(), []
    checked = checked_vae(vae, lambda _total: [0, 2], again.append)
    generators = [object(), object(), object()]
    result = checked.decode(latents(1, 200, 3), return_dict=return_dict, generator=generators)
    assert rows(result.sample if return_dict else result[0]) == [1, 0, 3]
    assert vae.decoded == [2]
    assert vae.generator == [generators[0], generators[2]]
    assert sum(again) == 0, "and what they would have become is nothing to mend"


def test_it_is_told_how_many_were_decoded_again() -> None:
    again: list[int] = []
    checked_vae(FakeVAE(), on_decoded_again=again.append).decode(latents(1, 200, 300))
    assert sum(again) == 2


# --- Previews ------------------------------------------------------------------------------------------


class Shell:
    vae_scale_factor = 1

    def __init__(self, vae: FakeVAE | None) -> None:
        if vae is not None:
            self.vae = vae


class PackingShell(Shell):
    @staticmethod
    def _unpack_latents(latents: Tensor, height: int, width: int, _factor: int) -> Tensor:
        return latents.view(len(latents), 3, height, width)


@pytest.mark.parametrize(
    ("config", "value"),
    [
        ({}, 0.25),
        ({"scaling_factor": 0.5}, 0.5),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, 0.75),
        ({"scaling_factor": 0.5, "latents_mean": [0.25] * 3, "latents_std": [1.5] * 3}, 1.0),
        ({"scaling_factor": 0.5, "latents_mean": None, "latents_std": None}, 0.5),
    ],
)
def test_previews_are_decoded_in_the_vaes_own_scale(config: dict[str, Any], value: float) -> None:
    pixels = preview(Shell(FakeVAE(**config)), latents(0.25, dtype=torch.float32), (2, 2))
    assert pixels is not None
    assert pixels.shape == (1, 3, 2, 2)
    assert rows(pixels) == [value / 2 + 0.5]


def test_packed_latents_are_unpacked_and_others_have_no_preview() -> None:
    packed = torch.full((1, 3, 8), 0.5)
    pixels = preview(PackingShell(FakeVAE()), packed, (4, 2))
    assert pixels is not None
    assert pixels.shape == (1, 3, 2, 4)
    assert preview(Shell(FakeVAE()), packed, (4, 2)) is None


def test_without_a_vae_the_latents_are_the_pixels() -> None:
    pixels = preview(Shell(None), latents(-1, 1, 3, dtype=torch.float32), (2, 2))
    assert pixels is not None
    assert rows(pixels) == [0, 1, 1]
