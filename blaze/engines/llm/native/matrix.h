// Products of activations in bf16 with packed weights, in bf16 or as 8-bit integers; sums in fp32.
//
// Weights lie in blocks of 64 outputs, [blocks][inputs / 2][4 panels][16 outputs][2]: one stream for the
// memory to read ahead, and 16 outputs are one operand of the bf16 dot product. Every output is summed up in
// one accumulator, in the order of its inputs, whatever rows are computed with it: so its bits never change.

#pragma once

#include "vectors.h"

#ifdef BF16_DOT

extern "C" {

// Shared with Python: keep in step with native/kernels.py.
struct BlazeMatrix {
  int64_t outputs;
  int64_t inputs;       // even
  const void *weights;  // BFloat, or int8_t where there are scales
  const float *scales;  // [outputs], up to whole blocks, or null
  const float *bias;    // [outputs], up to whole blocks, or null
};

} // extern "C"

namespace {

constexpr int64_t kPanel = 16;
constexpr int64_t kPanels = 4;
constexpr int64_t kOutputs = kPanel * kPanels; // of a block
constexpr int kRows = 6;                       // at once: 24 accumulators, 4 weights and one activation

inline int64_t blocks_of(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; }

inline __m512bh load_pairs(const BFloat *at) { return (__m512bh)_mm512_loadu_si512(at); }
inline __m512bh load_pairs(const int8_t *at) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at + 1)));
  return _mm512_cvtne2ps_pbh(high, low); // exact: integers of 8 bits are numbers of bf16
}

// `ahead`: memory to fetch meanwhile, a line of it at each pair of inputs, or null.
template <int M, typename W>
void tile(const BFloat *x, int64_t inputs, const W *weights, const char *ahead, Floats (*out)[kPanels]) {
  __m512 sum[M][kPanels];
  for (int m = 0; m < M; m++)
    for (int p = 0; p < kPanels; p++) sum[m][p] = _mm512_setzero_ps();
  for (int64_t k = 0; k < inputs; k += 2) {
    if (ahead) __builtin_prefetch(ahead + k / 2 * 64);
    __m512bh w[kPanels];
    for (int p = 0; p < kPanels; p++) w[p] = load_pairs(weights + k * kOutputs + p * 2 * kPanel);
    for (int m = 0; m < M; m++) {
      int32_t pair;
      std::memcpy(&pair, x + m * inputs + k, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int p = 0; p < kPanels; p++) sum[m][p] = _mm512_dpbf16_ps(sum[m][p], w[p], both);
    }
  }
  std::memcpy(out, sum, sizeof(sum));
}

template <typename W>
void tile(int64_t rows, const BFloat *x, int64_t inputs, const W *weights, const char *ahead, Floats (*out)[kPanels]) {
  switch (rows) {
  case 1: return tile<1>(x, inputs, weights, ahead, out);
  case 2: return tile<2>(x, inputs, weights, ahead, out);
  case 3: return tile<3>(x, inputs, weights, ahead, out);
  case 4: return tile<4>(x, inputs, weights, ahead, out);
  case 5: return tile<5>(x, inputs, weights, ahead, out);
  default: return tile<kRows>(x, inputs, weights, ahead, out);
  }
}

// One block of outputs for `rows` rows of x [rows][inputs]; `take(row, sums)` gets the 64 sums of each.
// `unpacked` is scratch for a block of weights in bf16: what many rows use is converted once. `next`, if it
// is a block, is fetched while the rows after the first few are computed, which need nothing from memory.
template <typename Take>
void multiply(const BlazeMatrix &matrix, int64_t block, int64_t next, const BFloat *x, int64_t rows,
              BFloat *unpacked, const Take &take) {
  const int64_t size = kOutputs * matrix.inputs, tiles = (rows + kRows - 1) / kRows;
  const BFloat *weights = (const BFloat *)matrix.weights + block * size;
  const int8_t *integers = (const int8_t *)matrix.weights + block * size;
  if (matrix.scales && tiles > 1) {
    for (int64_t i = 0; i < size; i += 2 * kPanel) {
      const __m512bh pairs = load_pairs(integers + i);
      std::memcpy(unpacked + i, &pairs, 64);
    }
    weights = unpacked;
  }
  // A quarter of it for each tile: at once would be too much for the processor to remember.
  const bool fetches = !matrix.scales && next >= 0 && next < blocks_of(matrix.outputs);
  const char *following = (const char *)((const BFloat *)matrix.weights + next * size);
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first; // of nearly equal size
    const BFloat *some = x + first * matrix.inputs;
    Floats sums[kRows][kPanels];
    if (matrix.scales && tiles == 1) {
      tile(count, some, matrix.inputs, integers, nullptr, sums);
    } else {
      const bool now = fetches && t > 0 && t <= kPanels;
      tile(count, some, matrix.inputs, weights, now ? following + (t - 1) * size / 2 : nullptr, sums);
    }
    for (int64_t i = 0; i < count; i++) {
      for (int p = 0; p < kPanels; p++) {
        const int64_t at = block * kOutputs + p * kPanel;
        if (matrix.scales) sums[i][p] = sums[i][p] * load16(matrix.scales + at);
        if (matrix.bias) sums[i][p] = sums[i][p] + load16(matrix.bias + at);
      }
      take(first + i, sums[i]);
    }
  }
}

// The first of 16 numbers, as many as there are.
template <typename T> void store_some(T *at, Floats x, int64_t count) {
  if (count >= kPanel) return store16(at, x);
  for (int64_t i = 0; i < count; i++) store(at + i, x[i]);
}

} // namespace

#endif
