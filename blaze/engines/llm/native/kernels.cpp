// What lies between the matrix multiplications of a Llama-family layer, for CPUs.
//
// Every output row is computed from its own inputs alone, in an order that depends on nothing but its own
// position: a row has the same bits whatever shares its step. Sums are in fp32 throughout.
//
// Keys lie in blocks of 16 tokens, so that 16 scores are one vector: fp32 as [dim][16], bf16 as
// [dim / 2][16][2], the operand of the bf16 dot product. Values lie as [tokens][dim].

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 16;      // keys to a block, lanes of a vector
constexpr int64_t kMaxDim = 256;    // of a head
constexpr int64_t kTile = 4;        // queries of a group that share a pass over the keys
constexpr int64_t kSmall = 1 << 14; // work not worth a second thread

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

template <int Q, int B> void scores(const float *const *q, const BFloat *keys, int64_t dim, Floats (*out)[B]) {
#ifdef BF16_DOT
  // The queries were rounded to bf16; two of them are one 32-bit lane.
  __m512 sum[Q][B];
  for (int i = 0; i < Q; i++)
    for (int b = 0; b < B; b++) sum[i][b] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += 2)
    for (int b = 0; b < B; b++) {
      const __m512i k = _mm512_loadu_si512(keys + (b * dim + d) * kBlock);
      for (int i = 0; i < Q; i++) {
        uint32_t low, high;
        std::memcpy(&low, q[i] + d, 4);
        std::memcpy(&high, q[i] + d + 1, 4);
        const __m512i pair = _mm512_set1_epi32(int32_t((low >> 16) | (high & 0xffff0000u)));
        sum[i][b] = _mm512_dpbf16_ps(sum[i][b], (__m512bh)pair, (__m512bh)k);
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
      for (int i = 0; i < Q; i++) sum[i][b] += q[i][d] * even + q[i][d + 1] * odd;
    }
  std::memcpy(out, sum, sizeof(sum));
#endif
}

} // namespace

extern "C" {

// Shared with Python: keep in step with native/kernels.py.
struct BlazeStep {
  int64_t rows;
  int64_t threads;
  int64_t longest;         // keys of the row that has the most
  const int64_t *start;    // [rows], of the row's slot, in tokens
  const int64_t *capacity; // [rows], of the row's slot
  const int64_t *position; // [rows], of the row's token in its sequence
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

template <typename T> void round_to(float *x, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    T rounded;
    store(&rounded, x[i]);
    x[i] = to_float(rounded);
  }
}

template <typename T, int Q>
void attend_tile(const T *keys, const T *values, const BlazeHeads &heads, int64_t position,
                 const float *const *q, float *weights, int64_t stride, T *out) {
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
        for (int l = 0; l < 16; l++) store(out + i * dim + d + c * 16 + l, sum[i][c][l] * share[i]);
  }
}

template <typename T>
void attend(const BlazeStep &step, const BlazeHeads &heads, const T *qkv, T *keys, T *values, T *out) {
  const int64_t dim = heads.dim, group = heads.queries / heads.keys;
  const int64_t width = (heads.queries + 2 * heads.keys) * dim;
  const int64_t stride = (step.longest + 2 * kBlock) / kBlock * kBlock;
  const int64_t heads_of_all = step.rows * heads.keys;
  const int64_t grain = heads_of_all >= 64 * step.threads ? 4 : 1; // neighbours share keys in the cache
#pragma omp parallel num_threads(step.threads) if (step.threads > 1)
  {
    // A chunk's rows see each other's keys: all are written before any is read.
#pragma omp for schedule(static)
    for (int64_t item = 0; item < heads_of_all; item++) {
      const int64_t row = item / heads.keys, head = item % heads.keys, position = step.position[row];
      const int64_t slot = (step.start[row] * heads.keys + head * step.capacity[row]) * dim;
      float key[kMaxDim];
      const T *from = qkv + row * width + (heads.queries + head) * dim;
      rotated(from, heads.k_norm, heads, position, key);
      write_key(keys + slot + position / kBlock * kBlock * dim, position % kBlock, key, dim);
      std::memcpy(values + slot + position * dim, from + heads.keys * dim, dim * sizeof(T));
    }
    float *weights = new float[kTile * stride];
#pragma omp for schedule(dynamic, grain)
    for (int64_t item = 0; item < heads_of_all; item++) {
      const int64_t row = item / heads.keys, head = item % heads.keys, position = step.position[row];
      const int64_t slot = (step.start[row] * heads.keys + head * step.capacity[row]) * dim;
      for (int64_t done = 0; done < group;) {
        const int64_t tile = group - done < kTile ? group - done : kTile;
        float queries[kTile][kMaxDim];
        const float *q[kTile];
        for (int64_t i = 0; i < tile; i++) {
          rotated(qkv + row * width + (head * group + done + i) * dim, heads.q_norm, heads, position, queries[i]);
          round_to<T>(queries[i], dim);
          q[i] = queries[i];
        }
        T *to = out + (row * heads.queries + head * group + done) * dim;
        switch (tile) {
        case 1: attend_tile<T, 1>(keys + slot, values + slot, heads, position, q, weights, stride, to); break;
        case 2: attend_tile<T, 2>(keys + slot, values + slot, heads, position, q, weights, stride, to); break;
        case 3: attend_tile<T, 3>(keys + slot, values + slot, heads, position, q, weights, stride, to); break;
        default: attend_tile<T, 4>(keys + slot, values + slot, heads, position, q, weights, stride, to);
        }
        done += tile;
      }
    }
    delete[] weights;
  }
}

template <typename T>
void rms_norm(int64_t rows, int64_t width, int64_t threads, float eps, const T *x, const float *weight, T *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width > kSmall) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T *from = x + row * width;
    T *to = out + row * width;
    Floats squares = {};
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      const Floats some = load16(from + i);
      squares += some * some;
    }
    float sum = total(squares);
    for (; i < width; i++) sum += to_float(from[i]) * to_float(from[i]);
    const float factor = 1.0f / __builtin_sqrtf(sum / float(width) + eps);
    for (i = 0; i < width; i++) store(to + i, to_float(from[i]) * factor * weight[i]);
  }
}

// [rows][gate: width, up: width] -> silu(gate) * up
template <typename T> void silu_mul(int64_t rows, int64_t width, int64_t threads, const T *x, T *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width > kSmall) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T *gate = x + row * 2 * width, *up = gate + width;
    T *to = out + row * width;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      const Floats g = load16(gate + i);
      const Floats size = g < 0.0f ? g : -g;
      const Floats e = exp16(size); // e^-|g|, so that nothing overflows
      const Floats s = (g < 0.0f ? e : splat(1.0f)) / (1.0f + e);
      const Floats y = g * s * load16(up + i);
      for (int l = 0; l < 16; l++) store(to + i + l, y[l]);
    }
    for (; i < width; i++) {
      const float g = to_float(gate[i]);
      const float e = __builtin_expf(g < 0 ? g : -g);
      store(to + i, g * ((g < 0 ? e : 1.0f) / (1.0f + e)) * to_float(up[i]));
    }
  }
}

} // namespace

extern "C" {

void blaze_attend_bf16(const BlazeStep *step, const BlazeHeads *heads, const void *qkv, void *keys, void *values, void *out) {
  attend(*step, *heads, (const BFloat *)qkv, (BFloat *)keys, (BFloat *)values, (BFloat *)out);
}
void blaze_attend_f32(const BlazeStep *step, const BlazeHeads *heads, const void *qkv, void *keys, void *values, void *out) {
  attend(*step, *heads, (const float *)qkv, (float *)keys, (float *)values, (float *)out);
}
void blaze_rms_norm_bf16(int64_t rows, int64_t width, int64_t threads, float eps, const void *x, const float *weight, void *out) {
  rms_norm(rows, width, threads, eps, (const BFloat *)x, weight, (BFloat *)out);
}
void blaze_rms_norm_f32(int64_t rows, int64_t width, int64_t threads, float eps, const void *x, const float *weight, void *out) {
  rms_norm(rows, width, threads, eps, (const float *)x, weight, (float *)out);
}
void blaze_silu_mul_bf16(int64_t rows, int64_t width, int64_t threads, const void *x, void *out) {
  silu_mul(rows, width, threads, (const BFloat *)x, (BFloat *)out);
}
void blaze_silu_mul_f32(int64_t rows, int64_t width, int64_t threads, const void *x, void *out) {
  silu_mul(rows, width, threads, (const float *)x, (float *)out);
}

} // extern "C"
