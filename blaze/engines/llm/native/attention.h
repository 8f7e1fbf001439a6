// Attention of one row and one head of keys, and keeping that row's key and value before.
//
// Keys lie in blocks of 16 tokens, so that 16 scores are one vector: fp32 as [dim][16], bf16 as
// [dim / 2][16][2], the operand of the bf16 dot product. Values lie as [tokens][dim].

#pragma once

#include "vectors.h"

extern "C" {

// Shared with Python: keep in step with native/kernels.py.
struct BlazeStep {
  int64_t rows;
  int64_t threads;
  int64_t longest;         // keys of the row that has the most
  const int64_t *start;    // [rows], of the row's slot, in tokens
  const int64_t *capacity; // [rows], of the row's slot
  const int64_t *position; // [rows], of the row's token in its sequence
  const int64_t *id;       // [rows], of the row's token; read by step.cpp alone
};

struct BlazeHeads {
  int64_t queries;
  int64_t keys; // heads of keys and values
  int64_t dim;
  int64_t window; // keys that a query sees, itself counted; 0: all
  float scale;
  float eps;           // of the norms
  const float *cos;    // [positions][dim]
  const float *sin;    // [positions][dim]
  const float *q_norm; // [dim] or null
  const float *k_norm;
};

} // extern "C"

namespace {

constexpr int64_t kBlock = 16;   // keys to a block, lanes of a vector
constexpr int64_t kMaxDim = 256; // of a head
constexpr int64_t kTile = 4;     // queries of a group that share a pass over the keys

// --- Keys: writing one, and 16 scores at once ------------------------------------------------------

inline void write_key(float *block, int64_t lane, const float *key, int64_t dim) {
  for (int64_t d = 0; d < dim; d++) block[d * kBlock + lane] = key[d];
}
inline void write_key(BFloat *block, int64_t lane, const float *key, int64_t dim) {
  for (int64_t d = 0; d < dim; d++) store(block + (d / 2) * 2 * kBlock + lane * 2 + (d & 1), key[d]);
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

// One head's query or key: norm (if the model has one), then rotary position, as the models do it.
template <typename T>
void rotated(const T *x, const float *norm, const BlazeHeads &heads, int64_t position, float *out) {
  const int64_t dim = heads.dim, half = dim / 2;
  const float *cosine = heads.cos + position * dim, *sine = heads.sin + position * dim;
  float plain[kMaxDim];
  for (int64_t d = 0; d < dim; d++) plain[d] = to_float(x[d]);
  if (norm) {
    Floats squares = {};
    for (int64_t d = 0; d < dim; d += 16) squares += load16(plain + d) * load16(plain + d);
    const float factor = 1.0f / __builtin_sqrtf(total(squares) / float(dim) + heads.eps);
    for (int64_t d = 0; d < dim; d++) plain[d] *= factor * norm[d];
  }
  for (int64_t d = 0; d < half; d++) {
    out[d] = plain[d] * cosine[d] - plain[d + half] * sine[d];
    out[d + half] = plain[d + half] * cosine[d + half] + plain[d] * sine[d + half];
  }
}

inline void fetch(const void *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
}

// `next`: keys that will be read after these, or null.
template <typename T, int Q>
void attend_tile(const T *keys, const T *values, const T *next, const BlazeHeads &heads, int64_t position,
                 const T *const *q, float *weights, int64_t stride, T *out) {
  const int64_t dim = heads.dim;
  const int64_t first = heads.window && position >= heads.window ? position - heads.window + 1 : 0;
  const int64_t from = first / kBlock, blocks = position / kBlock + 1;
  Floats most[Q];
  for (int i = 0; i < Q; i++) most[i] = splat(-__builtin_inff());
  const Floats lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  auto take = [&](int64_t block, int i, Floats score) {
    score *= heads.scale;
    if (block == blocks - 1) // what lies behind the row's own token is not its to see
      score = lane <= splat(float(position - block * kBlock)) ? score : splat(-__builtin_inff());
    if (block == from && first % kBlock)
      score = lane >= splat(float(first - block * kBlock)) ? score : splat(-__builtin_inff());
    most[i] = score > most[i] ? score : most[i];
    std::memcpy(weights + i * stride + block * kBlock, &score, 64);
  };
  int64_t block = from;
  for (; block + 2 <= blocks; block += 2) {
    fetch(values + block * kBlock * dim, 2 * kBlock * dim * sizeof(T));
    Floats two[Q][2];
    scores<Q, 2>(q, keys + block * kBlock * dim, dim, two);
    for (int i = 0; i < Q; i++) take(block, i, two[i][0]), take(block + 1, i, two[i][1]);
  }
  for (; block < blocks; block++) {
    Floats one[Q][1];
    scores<Q, 1>(q, keys + block * kBlock * dim, dim, one);
    for (int i = 0; i < Q; i++) take(block, i, one[i][0]);
  }
  float share[Q];
  for (int i = 0; i < Q; i++) {
    float top = most[i][0];
    for (int l = 1; l < 16; l++) top = most[i][l] > top ? most[i][l] : top;
    Floats sum = {};
    for (int64_t b = from; b < blocks; b++) {
      float *at = weights + i * stride + b * kBlock;
      const Floats weight = exp16(load16(at) - top);
      sum += weight;
      std::memcpy(at, &weight, 64);
    }
    share[i] = 1.0f / total(sum);
  }
  for (int64_t d = 0; d < dim; d += 64) {
    const int chunks = dim - d >= 64 ? 4 : int((dim - d) / 16);
    Floats sum[Q][4] = {};
    if (chunks == 4) {
      for (int64_t t = first; t <= position; t++) {
        if (next) fetch(next + t * dim, dim * sizeof(T));
        Floats value[4];
        for (int c = 0; c < 4; c++) value[c] = load16(values + t * dim + d + c * 16);
        for (int i = 0; i < Q; i++)
          for (int c = 0; c < 4; c++) sum[i][c] += weights[i * stride + t] * value[c];
      }
    } else {
      for (int64_t t = first; t <= position; t++)
        for (int c = 0; c < chunks; c++)
          for (int i = 0; i < Q; i++) sum[i][c] += weights[i * stride + t] * load16(values + t * dim + d + c * 16);
    }
    for (int i = 0; i < Q; i++)
      for (int c = 0; c < chunks; c++)
        store16(out + i * dim + d + c * 16, sum[i][c] * share[i]);
  }
}

// Where the keys and values of a row's sequence begin, for one head.
inline int64_t slot_of(const BlazeStep &step, const BlazeHeads &heads, int64_t row, int64_t head) {
  return (step.start[row] * heads.keys + head * step.capacity[row]) * heads.dim;
}

template <typename T>
void keep(const BlazeStep &step, const BlazeHeads &heads, int64_t item, const T *qkv, T *keys, T *values) {
  const int64_t row = item / heads.keys, head = item % heads.keys, dim = heads.dim;
  const int64_t position = step.position[row], slot = slot_of(step, heads, row, head);
  float key[kMaxDim];
  const T *from = qkv + (row * (heads.queries + 2 * heads.keys) + heads.queries + head) * dim;
  rotated(from, heads.k_norm, heads, position, key);
  write_key(keys + slot + position / kBlock * kBlock * dim, position % kBlock, key, dim);
  std::memcpy(values + slot + position * dim, from + heads.keys * dim, dim * sizeof(T));
}

inline int64_t scores_stride(const BlazeStep &step) { return (step.longest + 2 * kBlock) / kBlock * kBlock; }

// `weights`: scratch for kTile rows of scores_stride() numbers. `next`: the item after this one.
template <typename T>
void attend(const BlazeStep &step, const BlazeHeads &heads, int64_t item, int64_t next, const T *qkv, const T *keys,
            const T *values, float *weights, T *out) {
  const int64_t row = item / heads.keys, head = item % heads.keys, dim = heads.dim;
  const int64_t group = heads.queries / heads.keys, position = step.position[row];
  const int64_t slot = slot_of(step, heads, row, head), stride = scores_stride(step);
  const T *from = qkv + row * (heads.queries + 2 * heads.keys) * dim;
  const bool more = next < step.rows * heads.keys;
  const T *ahead = more ? keys + slot_of(step, heads, next / heads.keys, next % heads.keys) : nullptr;
  for (int64_t done = 0; done < group;) {
    const int64_t tile = group - done < kTile ? group - done : kTile, first = head * group + done;
    T queries[kTile][kMaxDim];
    const T *q[kTile];
    for (int64_t i = 0; i < tile; i++) {
      float query[kMaxDim];
      rotated(from + (first + i) * dim, heads.q_norm, heads, position, query);
      for (int64_t d = 0; d < dim; d += 16) store16(queries[i] + d, load16(query + d));
      q[i] = queries[i];
    }
    T *to = out + (row * heads.queries + first) * dim;
    switch (tile) {
    case 1: attend_tile<T, 1>(keys + slot, values + slot, ahead, heads, position, q, weights, stride, to); break;
    case 2: attend_tile<T, 2>(keys + slot, values + slot, ahead, heads, position, q, weights, stride, to); break;
    case 3: attend_tile<T, 3>(keys + slot, values + slot, ahead, heads, position, q, weights, stride, to); break;
    default: attend_tile<T, 4>(keys + slot, values + slot, ahead, heads, position, q, weights, stride, to);
    }
    done += tile;
    ahead = nullptr; // once is enough
  }
}

} // namespace
