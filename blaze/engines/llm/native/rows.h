// Norm and activation of one row.

#pragma once

#include "vectors.h"

namespace {

template <typename In, typename Out>
void rms_norm(const In *x, int64_t width, float eps, const float *weight, Out *out) {
  Floats squares = {};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    const Floats some = load16(x + i);
    squares += some * some;
  }
  float sum = total(squares);
  for (; i < width; i++) sum += to_float(x[i]) * to_float(x[i]);
  const float factor = 1.0f / __builtin_sqrtf(sum / float(width) + eps);
  for (i = 0; i + 16 <= width; i += 16) store16(out + i, load16(x + i) * factor * load16(weight + i));
  for (; i < width; i++) store(out + i, to_float(x[i]) * factor * weight[i]);
}

// silu(gate) * up
inline Floats silu_mul(Floats gate, Floats up) {
  const Floats size = gate < 0.0f ? gate : -gate;
  const Floats e = exp16(size); // e^-|gate|, so that nothing overflows
  return gate * ((gate < 0.0f ? e : splat(1.0f)) / (1.0f + e)) * up;
}

// [gate: width, up: width] -> [width]
template <typename T> void silu_mul(const T *x, int64_t width, T *out) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) store16(out + i, silu_mul(load16(x + i), load16(x + width + i)));
  for (; i < width; i++) {
    const float g = to_float(x[i]);
    const float e = __builtin_expf(g < 0 ? g : -g);
    store(out + i, g * ((g < 0 ? e : 1.0f) / (1.0f + e)) * to_float(x[width + i]));
  }
}

} // namespace
