"""Where vLLM is installed, and the two ways in which it is run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal, TypeAlias

Setup: TypeAlias = Literal["default", "tuned"]


def venv_from(option: Path | None) -> Path:
    """Ends the program, with what to do, when vLLM is not there."""
    if option is None:
        if "BLAZE_VLLM_VENV" in os.environ:
            option = Path(os.environ["BLAZE_VLLM_VENV"])
        else:
            caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            option = caches / "blaze-rivals" / "vllm"
    if not (option / "bin" / "vllm").exists():
        sys.exit(
            f"vLLM is not installed in {option}.\n"
            "Install it with benchmarks/rivals/install_vllm.sh [DIR], name a folder that has it by\n"
            "--vllm-venv DIR or BLAZE_VLLM_VENV, or compare with the others: --without vllm."
        )
    return option


def environment(venv: Path, setup: Setup, *, kv_gib: int) -> dict[str, str]:
    """``default`` is vLLM as it comes: its thread binding keeps one core back for its other processes, which
    leaves one of two, and its OpenMP is GCC's. ``tuned`` follows its CPU page: all cores, Intel's OpenMP.
    """
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        # Nothing leaves the machine.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOOPBACK_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_CACHE_ROOT": str(venv.with_name("vllm-cache")),
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",  # it compiles with its own ninja
    }
    if setup == "tuned":
        openmp = venv / "lib" / "libiomp5.so"
        if not openmp.exists():
            sys.exit(f"{openmp} is missing: install vLLM with benchmarks/rivals/install_vllm.sh")
        last = (os.cpu_count() or 1) - 1
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{last}" if last else "0", "LD_PRELOAD": str(openmp)}
    return variables
