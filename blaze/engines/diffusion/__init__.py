"""The diffusion engine: any diffusers pipeline."""
