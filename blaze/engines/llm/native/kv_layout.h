// How keys and values lie in memory, and the two sums over them that attention is made of.
//
// Keys lie in blocks of 16 tokens, so that 16 scores are one vector: fp32 as [dim][16], bf16 as
// [dim / 2][16][2], the operand of the bf16 dot product. Values lie as [tokens][dim] in fp32, and in bf16, for
// the same reason, as [tokens / 2][dim][2].

#pragma once

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 16;   // keys to a block, lanes of a vector
constexpr int64_t kMaxDim = 256; // of a head

// --- Where things lie --------------------------------------------------------------------------------

inline void write_key(float *block, int64_t lane, const float *key, int64_t dim) {
  for (int64_t d = 0; d < dim; d++) block[d * kBlock + lane] = key[d];
}
inline void write_key(BFloat *block, int64_t lane, const float *key, int64_t dim) {
  BFloat rounded[kMaxDim];
  for (int64_t d = 0; d < dim; d += 16) store16(rounded + d, load16(key + d));
  for (int64_t d = 0; d < dim; d += 2) std::memcpy(block + d * kBlock + lane * 2, rounded + d, 4);
}

inline void write_value(float *values, int64_t position, const float *value, int64_t dim) {
  std::memcpy(values + position * dim, value, dim * 4);
}
inline void write_value(BFloat *values, int64_t position, const BFloat *value, int64_t dim) {
  BFloat *to = values + position / 2 * 2 * dim + position % 2;
  for (int64_t d = 0; d < dim; d++) to[2 * d] = value[d];
}

inline void fetch(const void *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
}

// Scores of `Q` queries with `B` neighbouring blocks of keys.
template <int Q, int B> void scores(const float *const *q, const float *keys, int64_t dim, Floats (*out)[B]) {
  Floats sum[Q][B] = {};
  for (int64_t d = 0; d < dim; d++)
    for (int b = 0; b < B; b++) {
      const Floats k = load16(keys + (b * dim + d) * kBlock);
      for (int i = 0; i < Q; i++) sum[i][b] += q[i][d] * k;
    }
  std::memcpy(out, sum, sizeof(sum));
}

template <int Q, int B> void scores(const BFloat *const *q, const BFloat *keys, int64_t dim, Floats (*out)[B]) {
#ifdef BF16_DOT
  // Two numbers of a query are one 32-bit lane.
  __m512 sum[Q][B];
  for (int i = 0; i < Q; i++)
    for (int b = 0; b < B; b++) sum[i][b] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += 2)
    for (int b = 0; b < B; b++) {
      const __m512i k = _mm512_loadu_si512(keys + (b * dim + d) * kBlock);
      for (int i = 0; i < Q; i++) {
        int32_t pair;
        std::memcpy(&pair, q[i] + d, 4);
        sum[i][b] = _mm512_dpbf16_ps(sum[i][b], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)k);
      }
    }
  std::memcpy(out, sum, sizeof(sum));
#else
  Floats sum[Q][B] = {};
  for (int64_t d = 0; d < dim; d += 2)
    for (int b = 0; b < B; b++) {
      Ints pairs;
      std::memcpy(&pairs, keys + (b * dim + d) * kBlock, 64);
      const Floats even = (Floats)(pairs << 16);
      const Floats odd = (Floats)(pairs & int32_t(0xffff0000));
      for (int i = 0; i < Q; i++) sum[i][b] += to_float(q[i][d]) * even + to_float(q[i][d + 1]) * odd;
    }
  std::memcpy(out, sum, sizeof(sum));
#endif
}

// --- Sums of weighed values --------------------------------------------------------------------------

// `C` vectors of 16 numbers of the values of the tokens from `from` to before `to`, weighed for Q queries,
// added to `sum`. `next`, unless null, is fetched meanwhile.
template <int Q, int C>
void weigh(const float *values, int64_t dim, const float *const *weights, int64_t from, int64_t to,
           const float *next, Floats (*sum)[4]) {
  for (int64_t t = from; t < to; t++) {
    if (next) fetch(next + t * dim, dim * 4);
    for (int c = 0; c < C; c++) {
      const Floats value = load16(values + t * dim + c * 16);
      for (int i = 0; i < Q; i++) sum[i][c] += weights[i][t] * value;
    }
  }
}

// Two tokens at once. At an odd border the other token of the pair does not count, whatever lies there.
template <int Q, int C>
void weigh(const BFloat *values, int64_t dim, const BFloat *const *weights, int64_t from, int64_t to,
           const BFloat *next, Floats (*sum)[4]) {
#ifdef BF16_DOT
  __m512 some[Q][C];
  for (int i = 0; i < Q; i++)
    for (int c = 0; c < C; c++) some[i][c] = (__m512)sum[i][c];
  for (int64_t t = from / 2 * 2; t < to; t += 2) {
    const bool whole = t >= from && t + 2 <= to;
    const __m512i seen = _mm512_set1_epi32((t >= from ? 0xffff : 0) | (t + 1 < to ? int32_t(0xffff0000) : 0));
    if (next) fetch(next + t * dim, 2 * dim * 2);
    __m512bh pairs[C];
    for (int c = 0; c < C; c++) {
      __m512i two = _mm512_loadu_si512(values + t * dim + c * 32);
      if (!whole) two = _mm512_and_si512(two, seen);
      pairs[c] = (__m512bh)two;
    }
    for (int i = 0; i < Q; i++) {
      int32_t both;
      std::memcpy(&both, weights[i] + t, 4);
      if (!whole) both &= (t >= from ? 0xffff : 0) | (t + 1 < to ? int32_t(0xffff0000) : 0);
      for (int c = 0; c < C; c++)
        some[i][c] = _mm512_dpbf16_ps(some[i][c], pairs[c], (__m512bh)_mm512_set1_epi32(both));
    }
  }
  for (int i = 0; i < Q; i++)
    for (int c = 0; c < C; c++) sum[i][c] = (Floats)some[i][c];
#else
  for (int64_t t = from; t < to; t++)
    for (int c = 0; c < C; c++) {
      Ints two;
      std::memcpy(&two, values + t / 2 * 2 * dim + c * 32, 64);
      const Floats value = (Floats)(t % 2 ? two & int32_t(0xffff0000) : two << 16);
      for (int i = 0; i < Q; i++) sum[i][c] += to_float(weights[i][t]) * value;
    }
#endif
}

template <int Q, typename T>
void weigh(int vectors, const T *values, int64_t dim, const T *const *weights, int64_t from, int64_t to,
           const T *next, Floats (*sum)[4]) {
  switch (vectors) {
  case 1: return weigh<Q, 1>(values, dim, weights, from, to, next, sum);
  case 2: return weigh<Q, 2>(values, dim, weights, from, to, next, sum);
  case 3: return weigh<Q, 3>(values, dim, weights, from, to, next, sum);
  default: return weigh<Q, 4>(values, dim, weights, from, to, next, sum);
  }
}

constexpr int64_t kStride(float) { return 1; } // numbers of a value that lie side by side
constexpr int64_t kStride(BFloat) { return 2; }

} // namespace
