// What lies between the matrix multiplications of a Llama-family layer, for CPUs, one function for each.
//
// Every output row is computed from its own inputs alone, in an order that depends on nothing but its own
// position: a row has the same bits whatever shares its step. Sums are in fp32 throughout.

#include "attention.h"
#include "rows.h"

namespace {

constexpr int64_t kSmall = 1 << 14; // work not worth a second thread

template <typename T>
void attend_all(const BlazeStep &step, const BlazeHeads &heads, const T *qkv, T *keys, T *values, T *out) {
  const std::vector<int64_t> groups = groups_of(step);
  const int64_t items = (int64_t(groups.size()) - 1) * heads.keys;
  const int64_t grain = items >= 64 * step.threads ? 4 : 1; // neighbours share keys in the cache
#pragma omp parallel num_threads(step.threads) if (step.threads > 1)
  {
    // A chunk's rows see each other's keys: all are written before any is read.
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step.rows; row++) keep(step, heads, row, qkv, keys, values);
    float *scratch = new float[scores_size(step)];
#pragma omp for schedule(dynamic, grain)
    for (int64_t item = 0; item < items; item++) {
      const int64_t width = heads.queries * heads.dim;
      const int64_t begin = groups[item / heads.keys] * width + item % heads.keys * (width / heads.keys);
      attend(step, groups, heads, item, item + 1, qkv, keys, values, scratch, out + begin, width);
    }
    delete[] scratch;
  }
}

template <typename T>
void rms_norm_all(int64_t rows, int64_t width, int64_t threads, float eps, const T *x, const float *weight, T *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width > kSmall) schedule(static)
  for (int64_t row = 0; row < rows; row++) rms_norm(x + row * width, width, eps, weight, out + row * width);
}

template <typename T> void silu_mul_all(int64_t rows, int64_t width, int64_t threads, const T *x, T *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width > kSmall) schedule(static)
  for (int64_t row = 0; row < rows; row++) silu_mul(x + row * 2 * width, width, out + row * width);
}

} // namespace

extern "C" {

void blaze_attend_bf16(const BlazeStep *step, const BlazeHeads *heads, const void *qkv, void *keys, void *values, void *out) {
  attend_all(*step, *heads, (const BFloat *)qkv, (BFloat *)keys, (BFloat *)values, (BFloat *)out);
}
void blaze_attend_f32(const BlazeStep *step, const BlazeHeads *heads, const void *qkv, void *keys, void *values, void *out) {
  attend_all(*step, *heads, (const float *)qkv, (float *)keys, (float *)values, (float *)out);
}
void blaze_rms_norm_bf16(int64_t rows, int64_t width, int64_t threads, float eps, const void *x, const float *weight, void *out) {
  rms_norm_all(rows, width, threads, eps, (const BFloat *)x, weight, (BFloat *)out);
}
void blaze_rms_norm_f32(int64_t rows, int64_t width, int64_t threads, float eps, const void *x, const float *weight, void *out) {
  rms_norm_all(rows, width, threads, eps, (const float *)x, weight, (float *)out);
}
void blaze_silu_mul_bf16(int64_t rows, int64_t width, int64_t threads, const void *x, void *out) {
  silu_mul_all(rows, width, threads, (const BFloat *)x, (BFloat *)out);
}
void blaze_silu_mul_f32(int64_t rows, int64_t width, int64_t threads, const void *x, void *out) {
  silu_mul_all(rows, width, threads, (const float *)x, (float *)out);
}

} // extern "C"
