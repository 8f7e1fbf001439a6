"""The compiled kernels as Python sees them: addresses in, nothing out.

A call costs about two microseconds and lets go of the interpreter lock. Nothing is checked down there:
shapes, types and layouts are the caller's duty (``fused_cpu.py`` and ``fused_step.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from blaze.engines.llm.fused_model import Heads
from blaze.engines.llm.step_rows import StepRows

MAX_HEAD_DIM = 256
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


class StepStruct(Structure):
    """``BlazeStep`` of attention.h."""

    _fields_ = (
        ("rows", c_int64),
        ("threads", c_int64),
        ("longest", c_int64),
        ("start", c_void_p),
        ("capacity", c_void_p),
        ("position", c_void_p),
        ("id", c_void_p),
    )


class HeadsStruct(Structure):
    """``BlazeHeads`` of attention.h."""

    _fields_ = (
        ("queries", c_int64),
        ("keys", c_int64),
        ("dim", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("eps", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    )


class MatrixStruct(Structure):
    """``BlazeMatrix`` of matrix.h."""

    _fields_ = (
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
    )


class LayerStruct(Structure):
    """``BlazeLayer`` of step.cpp."""

    _fields_ = (
        ("heads", HeadsStruct),
        ("input_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", MatrixStruct),
        ("output", MatrixStruct),
        ("gate_up", MatrixStruct),
        ("down", MatrixStruct),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class ModelStruct(Structure):
    """``BlazeModel`` of step.cpp."""

    _fields_ = (
        ("hidden", c_int64),
        ("layers", c_int64),
        ("eps", c_float),
        ("layer", POINTER(LayerStruct)),
        ("final_norm", c_void_p),
        ("head", MatrixStruct),
        ("embedding", c_void_p),
        ("cores", c_void_p),
    )


class ResultStruct(Structure):
    """``BlazeResult`` of step.cpp."""

    _fields_ = (
        ("count", c_int64),
        ("rows", c_void_p),
        ("logits", c_void_p),
        ("largest", c_void_p),
        ("likeliest", c_void_p),
    )


class BuffersStruct(Structure):
    """``BlazeBuffers`` of step.cpp."""

    _fields_ = (
        ("hidden", c_void_p),
        ("normed", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("gated", c_void_p),
        ("last_hidden", c_void_p),
        ("last_qkv", c_void_p),
    )


def step_function(library: Path) -> Callable[..., int] | None:
    """``blaze_step`` of step.cpp: model, step, buffers, result; 0, or 1 for want of memory.

    None where this processor has no instruction for it.
    """
    loaded = ctypes.CDLL(str(library))
    loaded.blaze_runs_steps.restype = c_int64
    if not loaded.blaze_runs_steps():
        return None
    step = loaded.blaze_step
    step.argtypes = tuple(map(POINTER, (ModelStruct, StepStruct, BuffersStruct, ResultStruct)))
    step.restype = c_int64
    return step


def items_overtaken(library: Path) -> int:
    """How often a thread has done what another had begun and not finished, since the library was loaded."""
    function = ctypes.CDLL(str(library)).blaze_items_overtaken
    function.restype = c_int64
    return int(function())


class Kernels:
    """The three kernels for one dtype."""

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        # torch is loaded by now, and with it the OpenMP runtime that both then share.
        loaded = ctypes.CDLL(str(library))
        suffix = _SUFFIX[dtype]
        self.attend = _function(
            loaded, f"blaze_attend_{suffix}", POINTER(StepStruct), POINTER(HeadsStruct), *[c_void_p] * 4
        )
        self.rms_norm = _function(
            loaded, f"blaze_rms_norm_{suffix}", *[c_int64] * 3, c_float, *[c_void_p] * 3
        )
        self.silu_mul = _function(loaded, f"blaze_silu_mul_{suffix}", *[c_int64] * 3, *[c_void_p] * 2)

    @staticmethod
    def serve(dtype: torch.dtype, head_dim: int) -> bool:
        return dtype in _SUFFIX and head_dim % 16 == 0 and head_dim <= MAX_HEAD_DIM


def step_struct(rows: StepRows, threads: int) -> StepStruct:
    """Points into ``rows``, which must outlive it."""
    count, table = rows.table.shape[1], rows.table.data_ptr()
    column = count * 8  # bytes
    return StepStruct(
        rows=count,
        threads=threads,
        longest=rows.longest,
        id=table,
        start=table + column,
        capacity=table + 2 * column,
        position=table + 3 * column,
    )


def heads_struct(
    heads: Heads, cos: int | None, sin: int | None, norms: tuple[int | None, int | None]
) -> HeadsStruct:
    """``cos``, ``sin`` and ``norms`` (of queries and keys) are addresses of float32."""
    q_norm, k_norm = norms
    return HeadsStruct(
        queries=heads.queries,
        keys=heads.keys,
        dim=heads.dim,
        window=heads.window or 0,
        scale=heads.scale,
        eps=heads.eps,
        cos=cos,
        sin=sin,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def pointer(structure: Structure) -> Any:
    """To be kept beside the structure: made once, not per call."""
    return byref(structure)


def _function(loaded: ctypes.CDLL, name: str, *arguments: Any) -> Callable[..., None]:
    function = getattr(loaded, name)
    function.argtypes = arguments
    function.restype = None
    return function  # type: ignore[no-any-return]
