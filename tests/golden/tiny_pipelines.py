"""Small diffusion pipelines with random weights, one of each architecture, as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.golden.pipeline_folders import unconditional

WIDTH = 16  # of each CLIP text encoder
LENGTH = 24  # tokens of a prompt for CLIP


def clip_tokenizer() -> CLIPTokenizer:
    """One token for each byte, and another one for a byte that ends a word."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=LENGTH
    )


def t5_tokenizer() -> T5Tokenizer:
    """One token for each letter."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(code), -3.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=64)


def clip(suffix: str = "", *, projects: bool = False) -> dict[str, Any]:
    """A text encoder and its tokenizer, by the names that a pipeline has for them."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)
    return {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}


def t5(suffix: str = "") -> dict[str, Any]:
    config = T5Config(
        vocab_size=128, d_model=2 * WIDTH, d_ff=32, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return {f"text_encoder{suffix}": T5EncoderModel(config), f"tokenizer{suffix}": t5_tokenizer()}


def vae(*, latent_channels: int = 4, halvings: int = 1, **config: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * (halvings + 1),
        down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
        up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **config,
    )


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    usual: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**(usual | config))


def sd3_transformer(*, channels: int = 4, out_channels: int | None = None) -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=out_channels or channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )


def flux_transformer(*, channels: int = 1) -> Any:
    """``channels``: of the latents, four of which are one of its own."""
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


def pixart_transformer() -> Any:
    return diffusers.PixArtTransformer2DModel(
        sample_size=32,
        patch_size=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=2 * WIDTH,
    )


def noise_schedule(**config: Any) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **config,
    )


# --- Pipelines -----------------------------------------------------------------------------------------


def stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        unet=unet(),
        vae=vae(),
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **clip(),
    )


def stable_diffusion_xl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            use_linear_projection=True,
        ),
        vae=vae(),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(noise_schedule().config),
        add_watermarker=False,
        **clip(),
        **clip("_2", projects=True),
    )


def stable_diffusion_3(kind: Any = diffusers.StableDiffusion3Pipeline, **transformer: int) -> Any:
    """With as many channels of latents as the models that there are: inpainting counts on them."""
    return kind(
        transformer=sd3_transformer(**({"channels": 16} | transformer)),
        vae=vae(latent_channels=16, shift_factor=0.0609, scaling_factor=1.5305),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **clip(projects=True),
        **clip("_2", projects=True),
        **t5("_3"),
    )


def stable_diffusion_3_for_masks() -> Any:
    """Its denoiser sees the mask and what is masked, too."""
    return stable_diffusion_3(
        diffusers.StableDiffusion3InpaintPipeline, channels=16 + 1 + 16, out_channels=16
    )


def flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=flux_transformer(),
        vae=vae(latent_channels=1, shift_factor=0.1159, scaling_factor=0.3611),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **clip(),
        **t5("_2"),
    )


def pixart() -> Any:
    return diffusers.PixArtAlphaPipeline(
        transformer=pixart_transformer(),
        vae=vae(halvings=3),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        **t5(),
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
}
FOR_MASKS: dict[str, Callable[[], Any]] = {"sd3 for masks": stable_diffusion_3_for_masks}
UNCONDITIONAL: dict[str, Callable[[], Any]] = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
}


NAMES = (*PIPELINES, *FOR_MASKS, *UNCONDITIONAL)


def tiny_pipeline(name: str, folder: Path) -> Path:
    """The folder of a pipeline by name; the same weights at every call."""
    if name in UNCONDITIONAL:
        return unconditional(folder, UNCONDITIONAL[name]())
    torch.manual_seed(0)
    pipeline = (PIPELINES | FOR_MASKS)[name]()
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipeline.save_pretrained(folder)
    return folder
