"""Trains the `digits` model from scratch and writes it as a StableDiffusionPipeline folder.

    python -m training.train_digits --threads 2

First an autoencoder learns to turn 32x32 pictures into 8x8 latents of 8 channels and back. Then a UNet and a
one-layer CLIP text encoder learn together to denoise latents under a prompt. Same seed, thread count and
machine type: same weights.
"""

import argparse
import copy
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.digits_data import (
    MAX_TOKENS,
    Bitmaps,
    Pictures,
    build_tokenizer,
    load_bitmaps,
    sample_pictures,
    sample_prompt,
)

LATENT_SIZE = 8
LATENT_CHANNELS = 8  # with 4, strokes blur and neighbouring colours mix at this training time
TEXT_WIDTH = 64
VAE_BATCH = 32  # many small steps teach the autoencoder more a second than few large ones
BATCH = 128
EMPTY_PROMPT_SHARE = 0.1  # teaches the unconditional half of classifier-free guidance
EMA_DECAY = 0.995
KL_WEIGHT = 1e-3  # enough to keep the latents near a normal distribution, too little to blur the strokes
TRAINING_PICTURES = 32_000
TRAIN_SEED, BANK_SEED = 0, 1


def build_vae() -> AutoencoderKL:
    """Builds the autoencoder: [B, 3, 32, 32] in -1..1 to latents [B, 8, 8, 8]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=LATENT_SIZE * 4,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Builds the denoiser: latents [B, 8, 8, 8] and text [B, 16, 64] to a velocity [B, 8, 8, 8]."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds the text encoder: token ids [B, 16] to text [B, 16, 64]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Builds the sampler; zero SNR at the end lets it start from pure noise and still hit flat colours."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 50) -> LambdaLR:
    """Raises the learning rate for `warmup` steps, then lowers it along a cosine to almost zero."""
    return LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 0.501 + 0.5 * math.cos(math.pi * i / steps)))


def report(stage: str, step: int, steps: int, loss: float, started: float) -> None:
    """Prints one line of progress a hundred steps."""
    if (step + 1) % 100 == 0:
        print(f"{stage} {step + 1}/{steps}  loss {loss:.4f}  {time.monotonic() - started:.0f} s", flush=True)


def train_vae(vae: AutoencoderKL, bitmaps: Bitmaps, steps: int) -> None:
    """Trains the autoencoder on fresh pictures at every step."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = warmup_cosine(optimizer, steps)
    started = time.monotonic()
    for step in range(steps):
        pixels = sample_pictures(bitmaps, VAE_BATCH, seed=step).pixels
        posterior = vae.encode(pixels).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        fidelity = F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels)
        loss = fidelity + KL_WEIGHT * posterior.kl().mean() / (LATENT_CHANNELS * LATENT_SIZE**2)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report("vae", step, steps, fidelity.item(), started)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Pictures) -> Tensor:
    """Encodes pictures to latents [N, 8, 8, 8] of unit deviation, whose scale goes into the VAE's config."""
    latents = torch.cat([vae.encode(chunk).latent_dist.sample() for chunk in pictures.pixels.split(500)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor


def train_denoiser(pipe: StableDiffusionPipeline, latents: Tensor, pictures: Pictures, steps: int) -> None:
    """Trains UNet and text encoder on v-prediction and leaves the moving average of their weights in them."""
    rng = random.Random(TRAIN_SEED)
    learned = nn.ModuleList([pipe.unet, pipe.text_encoder]).train()
    average = copy.deepcopy(learned)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = warmup_cosine(optimizer, steps)
    started = time.monotonic()
    for step in range(steps):
        rows = torch.randint(len(latents), (BATCH,))
        prompts = [
            "" if rng.random() < EMPTY_PROMPT_SHARE else sample_prompt(pictures.labels[row], rng)
            for row in rows.tolist()
        ]
        ids = pipe.tokenizer(
            prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        clean, noise = latents[rows], torch.randn(BATCH, *latents.shape[1:])
        times = torch.randint(pipe.scheduler.config.num_train_timesteps, (BATCH,))
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        velocity = pipe.scheduler.get_velocity(clean, noise, times)
        text = pipe.text_encoder(ids).last_hidden_state
        loss = F.mse_loss(pipe.unet(noisy, times, text).sample, velocity)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))  # forget the random start quickly
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), learned.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        report("denoiser", step, steps, loss.item(), started)
    learned.load_state_dict(average.state_dict())
    learned.eval()


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Writes the pipeline folder, and the vocabulary also in the classic two files of a CLIP tokenizer."""
    pipe.save_pretrained(folder, safe_serialization=True)
    pipe.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))


def main() -> None:
    """Trains and saves the model, then prints how long it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("blaze/assets/digits"), help="folder to write")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--unet-steps", type=int, default=2800)
    args = parser.parse_args()

    started = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(TRAIN_SEED)
    bitmaps = load_bitmaps("model")
    tokenizer = build_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    train_vae(pipe.vae, bitmaps, args.vae_steps)
    pictures = sample_pictures(bitmaps, TRAINING_PICTURES, BANK_SEED)
    latents = encode(pipe.vae, pictures)
    train_denoiser(pipe, latents, pictures, args.unet_steps)
    save(pipe, args.out)
    print(f"done in {time.monotonic() - started:.0f} s wall, {time.process_time():.0f} s CPU: {args.out}")


if __name__ == "__main__":
    main()
