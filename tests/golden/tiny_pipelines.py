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


def clip_encoder(*, projects: bool = False) -> Any:
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
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=128, d_model=2 * WIDTH, d_ff=32, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0
        )
    )


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
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
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
        text_encoder=clip_encoder(projects=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projects=True),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )


def stable_diffusion_3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
        ),
        vae=vae(shift_factor=0.0609, scaling_factor=1.5305),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_encoder(projects=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projects=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        vae=vae(latent_channels=1, shift_factor=0.1159, scaling_factor=0.3611),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def pixart() -> Any:
    return diffusers.PixArtAlphaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=32,
            patch_size=4,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=2 * WIDTH,
        ),
        vae=vae(halvings=3),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
}
UNCONDITIONAL: dict[str, Callable[[], Any]] = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
}


def tiny_pipeline(name: str, folder: Path) -> Path:
    """The folder of a pipeline by name; the same weights at every call."""
    if name in UNCONDITIONAL:
        return unconditional(folder, UNCONDITIONAL[name]())
    torch.manual_seed(0)
    pipeline = PIPELINES[name]()
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipeline.save_pretrained(folder)
    return folder
