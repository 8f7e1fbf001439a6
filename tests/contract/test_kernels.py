"""The compiled kernels do what torch's operators do, and each row alone."""

from __future__ import annotations

from ctypes import byref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from blaze.engines.llm.native.build import library
from blaze.engines.llm.native.kernels import HeadsStruct, Kernels, StepStruct

DTYPES = (torch.bfloat16, torch.float32)
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 1e-5}  # of one number of that type; of a sum
# Here and there a query or key is rounded to its other neighbour, for sums are made in another order.
ATTENTION = {dtype: 4 * rounding for dtype, rounding in ROUNDING.items()}
CAPACITY = 128
EPS = 1e-5


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library.cache_clear()
    found = library(tmp_path_factory.mktemp("kernels"))
    if found is None:
        pytest.skip("there is no C++ compiler here")
    return found


class Attention:
    """One sequence in the second of two slots."""

    def __init__(
        self,
        built: Path,
        dtype: torch.dtype,
        heads: tuple[int, int, int],
        *,
        rows: int = 37,
        window: int = 0,
        norms: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.queries, self.keys, self.dim = heads
        self.dtype, self.window, self.rows = dtype, window, rows
        self.kernels = Kernels(built, dtype)
        self.qkv = torch.randn(rows, (self.queries + 2 * self.keys) * self.dim).to(dtype)
        self.cos, self.sin = torch.randn(2, CAPACITY, self.dim)
        self.norms = torch.rand(2, self.dim) if norms else None
        # What nobody wrote must not matter, so it is no number at all.
        self.stored = torch.full((2, 2 * CAPACITY * self.keys * self.dim), float("nan")).to(dtype)
        self.out = torch.empty(rows, self.queries * self.dim, dtype=dtype)

    def attend(self, first: int, last: int, *, threads: int = 2) -> None:
        positions = torch.arange(first, last)
        slots = torch.full_like(positions, CAPACITY)
        step = StepStruct(
            last - first, threads, last, slots.data_ptr(), slots.data_ptr(), positions.data_ptr()
        )
        norms = (None, None) if self.norms is None else (norm.data_ptr() for norm in self.norms)
        heads = HeadsStruct(
            self.queries,
            self.keys,
            self.dim,
            self.window,
            self.dim**-0.5,
            EPS,
            self.cos.data_ptr(),
            self.sin.data_ptr(),
            *norms,
        )
        self.kernels.attend(
            byref(step),
            byref(heads),
            self.qkv[first:last].data_ptr(),
            self.stored[0].data_ptr(),
            self.stored[1].data_ptr(),
            self.out[first:last].data_ptr(),
        )

    def expected(self) -> torch.Tensor:
        """In float32, from keys and queries that are rounded as they are stored."""
        parts = self.qkv.float().view(self.rows, -1, self.dim)
        rotated = parts[:, : self.queries + self.keys]
        if self.norms is not None:
            q_norm, k_norm = self.norms
            q, k = rotated[:, : self.queries], rotated[:, self.queries :]
            rotated = torch.cat(
                [F.rms_norm(q, (self.dim,), q_norm, EPS), F.rms_norm(k, (self.dim,), k_norm, EPS)], dim=1
            )
        half = self.dim // 2
        turned = torch.cat([-rotated[..., half:], rotated[..., :half]], dim=-1)
        rotated = rotated * self.cos[: self.rows, None] + turned * self.sin[: self.rows, None]
        rotated = rotated.to(self.dtype).float()
        group = self.queries // self.keys
        keys = rotated[:, self.queries :].repeat_interleave(group, 1)
        values = parts[:, self.queries + self.keys :].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", rotated[:, : self.queries], keys) * self.dim**-0.5
        at = torch.arange(self.rows)
        hidden = at[None] > at[:, None]
        if self.window:
            hidden |= at[None] <= at[:, None] - self.window
        shares = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        return torch.einsum("hqk,khd->qhd", shares, values).reshape(self.rows, -1)


HEADS = [(9, 3, 64), (8, 8, 64), (32, 8, 128), (4, 1, 256), (14, 2, 32), (5, 1, 48), (4, 2, 16), (4, 2, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [0, 1, 7, 16, 33])
def test_attention(built: Path, dtype: torch.dtype, heads: tuple[int, int, int], window: int) -> None:
    attention = Attention(built, dtype, heads, window=window)
    attention.attend(0, attention.rows)
    expected = attention.expected()
    difference = (attention.out.float() - expected).abs() / expected.abs().clamp(min=1)
    assert difference.max() <= ATTENTION[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_norms_of_queries_and_keys(built: Path, dtype: torch.dtype) -> None:
    attention = Attention(built, dtype, (4, 2, 32), norms=True)
    attention.attend(0, attention.rows)
    expected = attention.expected()
    assert (attention.out.float() - expected).abs().max() <= ATTENTION[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_company(built: Path, dtype: torch.dtype, threads: int) -> None:
    together = Attention(built, dtype, (9, 3, 64))
    together.attend(0, together.rows)
    apart = Attention(built, dtype, (9, 3, 64))
    for first, last in ((0, 20), (20, 21), (21, 22), (22, apart.rows)):
        apart.attend(first, last, threads=threads)
    assert torch.equal(together.out, apart.out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_visible(built: Path, dtype: torch.dtype) -> None:
    attention = Attention(built, dtype, (4, 2, 32))
    attention.qkv[5] = float("nan")
    attention.attend(0, attention.rows)
    assert attention.out[:5].isfinite().all()
    assert attention.out[5:].isnan().all(), "all that see the key"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 100, 577])
def test_rms_norm(built: Path, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(37, width).to(dtype), torch.rand(width)
    out = torch.empty_like(x)
    Kernels(built, dtype).rms_norm(37, width, 2, EPS, x.data_ptr(), weight.data_ptr(), out.data_ptr())
    expected = F.rms_norm(x.float(), (width,), weight, EPS)
    torch.testing.assert_close(out.float(), expected, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 40, 1536])
def test_silu_mul(built: Path, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(37, 2 * width) * 30).to(dtype)  # far into both ends of the curve
    out = torch.empty(37, width, dtype=dtype)
    Kernels(built, dtype).silu_mul(37, width, 2, x.data_ptr(), out.data_ptr())
    gate, up = x.float().chunk(2, dim=-1)
    torch.testing.assert_close(out.float(), F.silu(gate) * up, rtol=ROUNDING[dtype], atol=1e-6)
