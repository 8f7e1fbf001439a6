"""Device, dtype and thread choices that the engines share."""

from __future__ import annotations

from typing import Literal

import psutil
import torch

from blaze.errors import ConfigError

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def choose_device(name: DeviceName) -> torch.device:
    """Raises :class:`ConfigError` for a device that this machine lacks."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("device: 'cuda' was asked for, but torch sees no GPU here", param="device")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """``auto`` picks bfloat16 only where the hardware computes in it; float16 is refused on a CPU."""
    if name == "auto":
        return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ConfigError("dtype: 'float16' needs a GPU; use bfloat16 or float32 on a CPU", param="dtype")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def set_threads(threads: int) -> None:
    """Ray caps the math threads of a replica at its num_cpus; an engine sets its own number."""
    torch.set_num_threads(threads)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return int(psutil.virtual_memory().available)
