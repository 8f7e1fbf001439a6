// Vectors of 16 numbers, in fp32 whatever they are stored as.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define BF16_DOT 1
#endif

namespace {

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

struct BFloat {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

inline void store(float *at, float x) { *at = x; }
inline void store(BFloat *at, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    at->bits = 0x7fc0; // not a number stays one
    return;
  }
  bits += 0x7fff + ((bits >> 16) & 1); // to nearest, ties to even
  at->bits = uint16_t(bits >> 16);
}

inline Floats load16(const float *at) {
  Floats out;
  std::memcpy(&out, at, 64);
  return out;
}
inline Floats load16(const BFloat *at) {
#ifdef __AVX512F__
  const __m256i packed = _mm256_loadu_si256((const __m256i *)at);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16);
#else
  Halves halves;
  std::memcpy(&halves, at, 32);
  return (Floats)(__builtin_convertvector(halves, Ints) << 16);
#endif
}

inline void store16(float *at, Floats x) { std::memcpy(at, &x, 64); }
inline void store16(BFloat *at, Floats x) {
#ifdef BF16_DOT
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)x); // to nearest, ties to even; below 2^-126 nought
  std::memcpy(at, &halves, 32);
#else
  for (int l = 0; l < 16; l++) store(at + l, x[l]);
#endif
}

inline Floats splat(float x) { return x - Floats{}; }

inline float total(Floats x) {
  float lanes[16];
  std::memcpy(lanes, &x, 64);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// e^x for x <= 0, within 2 units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2], coefficients
// of Cephes' expf (S. Moshier). Below -87 it is nought.
inline Floats exp16(Floats x) {
  const Floats magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (x * 1.44269504088896341f + magic) - magic;
  Floats r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Floats out = p * (Floats)power;
  return x < splat(-87.0f) ? Floats{} : out; // so that what is not a number stays that
}

} // namespace
