// What the kernels share: the vector type, conversions on load and store, exp.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

#define HF_PAGED_EXPORT extern "C" __attribute__((visibility("default")))

namespace hf_paged {

using Vec = at::vec::Vectorized<float>;
constexpr int kLanes = Vec::size();

// Dtype codes of the C interface.
enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { return at::vec::fmadd(a, b, c); }

inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const c10::BFloat16* p) {
  Vec v;
  at::vec::load_fp32_from_bf16(p, v);
  return v;
}
inline Vec load(const c10::Half* p) {
  Vec v;
  at::vec::load_fp32_from_fp16(p, v);
  return v;
}

// The first `count` lanes; nothing past them is read.
template <class T>
inline Vec load(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  alignas(64) float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = static_cast<float>(p[i]);
  return Vec::loadu(lanes);
}

template <class T>
inline void store(T* p, const Vec& v, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kLanes) {
      v.store(p);
      return;
    }
  }
  alignas(64) float lanes[kLanes];
  v.store(lanes);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(lanes[i]);
}

// p * 2^n, where t = n + 1.5 * 2^23: the low bits of t are n, moved up into the exponent of p.
inline Vec scale_by_power(const Vec& p, const Vec& t) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
#else
  alignas(64) uint32_t pb[kLanes], tb[kLanes];
  p.store(pb);
  t.store(tb);
  for (int i = 0; i < kLanes; ++i) pb[i] += tb[i] << 23;
  return Vec::loadu(pb);
#endif
}

// a where x < limit, else b (also for a NaN in x).
inline Vec select_less(const Vec& x, float limit, const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, Vec(limit), _CMP_LT_OQ), b, a);
#else
  return Vec::blendv(b, a, x < Vec(limit));
#endif
}

// exp(x) for x <= 88, within 1.5 units in the last place; 0 below -86.6; NaN for NaN.
// x = n ln 2 + r, exp(r) = 1 + r + r^2 P(r) with P fitted on |r| <= ln(2)/2 to 3e-9.
inline Vec exp(const Vec& x) {
  const Vec magic(12582912.0f);
  const Vec t = fma(x, Vec(1.44269504f), magic);
  const Vec n = t - magic;
  Vec r = fma(n, Vec(-0.693359375f), x);  // ln 2 in two parts, the first short enough for n times it to be exact
  r = fma(n, Vec(2.12194440e-4f), r);
  Vec p = fma(r, Vec(0.0013814593f), Vec(0.0083687175f));
  p = fma(r, p, Vec(0.041668389f));
  p = fma(r, p, Vec(0.16666521f));
  p = fma(r, p, Vec(0.49999994f));
  p = fma(r * r, p, r) + Vec(1.0f);
  return select_less(x, -86.6f, Vec(0.0f), scale_by_power(p, t));
}

inline float exp(float x) {
  alignas(64) float lanes[kLanes];
  exp(Vec(x)).store(lanes);
  return lanes[0];
}

// Sum and maximum over lanes, in one fixed order.
inline float sum_lanes(const Vec& v) {
  alignas(64) float lanes[kLanes];
  v.store(lanes);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float max_lanes(const Vec& v) {  // a NaN wins
  alignas(64) float lanes[kLanes];
  v.store(lanes);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) {
      const float other = lanes[i + half];
      if (!(lanes[i] >= other) && lanes[i] == lanes[i]) lanes[i] = other;
    }
  return lanes[0];
}

// A per-thread buffer that only grows: its content is whatever the last user left.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* get(int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = (floats + 1023) / 1024 * 1024;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace hf_paged
