"""From latents to pixels: previews on the way, and a second try in fp32 where 16 bits were too few."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blaze.engines.diffusion.merger import is_out_of_memory
from blaze.engines.diffusion.outputs import widen

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline

logger = logging.getLogger(__name__)

_PER_CALL = {"return_dict", "generator"}  # arguments that are not of rows, or lists of one for each


def checked_vae(
    vae: AutoencoderKL,
    wanted: Callable[[int], Sequence[int]] = range,
    on_decoded_again: Callable[[int], None] = lambda _images: None,
) -> AutoencoderKL:
    """A shallow copy of the VAE whose ``decode`` takes more care, with the same weights.

    Rows that come out with NaN or infinity are decoded again in fp32; those that are not finite even then
    are NaN as a whole, for clamping would turn infinity into a colour. When memory runs out, images are
    decoded one by one. ``wanted``: which of so many latents somebody waits for; the others become zeros.
    """

    def careful(z: Tensor, *args: object, **kwargs: object) -> object:
        rows, total = wanted(len(z)), len(z)
        is_narrow = 0 < len(rows) < total and not args and kwargs.keys() <= _PER_CALL
        if is_narrow:
            z = z[list(rows)]
            if isinstance(generators := kwargs.get("generator"), list):
                kwargs["generator"] = [generators[row] for row in rows]
        result = _decode(vae, z, args, kwargs)
        pixels = result[0] if isinstance(result, tuple) else getattr(result, "sample", None)
        if isinstance(pixels, Tensor):
            on_decoded_again(_repair(vae, z, pixels))
        return widen(result, rows, total) if is_narrow else result

    checked = copy.copy(vae)
    checked.decode = careful
    return checked


def _decode(vae: AutoencoderKL, z: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    try:
        return vae.decode(z, *args, **kwargs)
    except Exception as error:
        if not is_out_of_memory(error) or len(z) == 1 or args or kwargs.get("return_dict") is not False:
            raise
    logger.warning("out of memory while %d images were decoded; now one by one", len(z))
    return (torch.cat([vae.decode(z[row : row + 1], return_dict=False)[0] for row in range(len(z))]),)


def _repair(vae: AutoencoderKL, z: Tensor, pixels: Tensor) -> int:
    """In place. How many images were decoded again."""
    bad, again = ~pixels.isfinite().flatten(1).all(1), 0
    if not bad.any():
        return again
    if len(z) == len(pixels) and bool(z[bad].isfinite().all()) and pixels.element_size() < 4:
        again = int(bad.sum())
        logger.warning("%d images are decoded again in fp32", again)
        try:
            twin = copy.deepcopy(vae).float()  # the shared one stays as it is: it belongs to other calls too
            pixels[bad] = twin.decode(z[bad].float(), return_dict=False)[0].to(pixels.dtype)
        except Exception:  # weights that are quantized or elsewhere cannot be copied like that
            logger.warning("they cannot be decoded in fp32", exc_info=True)
        bad = ~pixels.isfinite().flatten(1).all(1)
    pixels[bad] = float("nan")
    return again


def preview(shell: DiffusionPipeline, latents: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Pixels [images, channels, height, width] in 0..1 of latents as the scheduler has them.

    ``size``: (width, height) of the images. None: latents of a kind that is not known here.
    """
    vae = getattr(shell, "vae", None)
    pixels = latents
    if vae is not None:
        if latents.ndim == 3 and hasattr(shell, "_unpack_latents"):
            latents = shell._unpack_latents(latents, size[1], size[0], shell.vae_scale_factor)
        if latents.ndim != 4:
            return None
        pixels = vae.decode(_unscale(latents, vae).to(vae.dtype), return_dict=False)[0]
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        return None
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def _unscale(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """From the denoiser's scale to the VAE's."""
    config = vae.config
    scale = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        center, spread = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, std))
        return latents * spread / scale + center
    return latents / scale + (config.get("shift_factor") or 0.0)
