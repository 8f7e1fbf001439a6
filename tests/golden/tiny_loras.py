"""Small LoRA adapters for `digits`, as files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.golden.pipeline_folders import digits

_UNET = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ENCODER = ("q_proj", "v_proj", "out_proj", "fc1")


def write_lora(
    folder: Path,
    name: str = "ink.safetensors",
    *,
    seed: int = 0,
    rank: int = 4,
    spread: float = 0.3,
    text_encoder: bool = False,
    unet: bool = True,
) -> Path:
    """Random weights that change a picture a good deal; of the text encoder too, if that is wanted."""
    pipeline, weights = digits(), {}
    generator = torch.Generator().manual_seed(seed)
    for prefix, module, targets in (
        ("unet", pipeline.unet, _UNET if unet else ()),
        ("text_encoder", pipeline.text_encoder, _TEXT_ENCODER if text_encoder else ()),
    ):
        for path, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear) and path.endswith(targets or "?"):
                down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
                up = torch.randn(layer.out_features, rank, generator=generator) * spread
                weights[f"{prefix}.{path}.lora_A.weight"] = down
                weights[f"{prefix}.{path}.lora_B.weight"] = up
    save_file(weights, folder / name)
    return folder / name
