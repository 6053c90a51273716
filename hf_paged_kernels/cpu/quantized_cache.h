// The 8-bit types of a quantized cache: int8 and float8 e4m3, rounded to and widened from float32.
#pragma once

#include "common.h"

#include <bit>

namespace hf_paged {

// Dtype codes of the C interface, after those of `Dtype`.
enum CacheDtype : int64_t { kInt8Cache = 3, kE4m3Cache = 4 };

struct E4m3 {
  uint8_t bits;
};

inline Vec load(const int8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = p[i];
  return Vec::loadu(lanes);
#endif
}

// 2^-8 of the numbers: exponent and mantissa lie in fp16 as they do in e4m3, whose bias is 8 less. NaN gives +-1.875.
inline Vec load(const E4m3* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(0xBFFFu)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(0xBFFFu)));
#else
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i)
    lanes[i] = c10::Half((p[i].bits & 0x80) << 8 | (p[i].bits & 0x7F) << 7, c10::Half::from_bits());
  return Vec::loadu(lanes);
#endif
}

// How numbers of at most `kLargest` are rounded to 8 bits, and `kUnit`, the factor between what `load` gives and the number.
template <class T>
struct Rounding;

template <>
struct Rounding<int8_t> {
  static constexpr float kLargest = 127.0f, kUnit = 1.0f;
  // In the sum the unit of the last place is 1, so that its low bits are x rounded. NaN becomes 0.
  static int8_t round(float x) { return x == x ? static_cast<int8_t>(std::bit_cast<uint32_t>(x + 12582912.0f)) : 0; }
};

template <>
struct Rounding<E4m3> {
  static constexpr float kLargest = 448.0f, kUnit = 256.0f;
  static E4m3 round(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), size = bits & 0x7FFFFFFF;
    const uint32_t normal = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3);
    // Below 2^-6 the step is 2^-9: the unit of the last place in this sum.
    const float sum = std::bit_cast<float>(size) + 16384.0f;
    const uint32_t subnormal = std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(16384.0f);
    const uint32_t rounded = size < 121u << 23 ? subnormal : size > 0x7F800000 ? 0x7F : normal;
    return {static_cast<uint8_t>(bits >> 24 & 0x80 | rounded)};
  }
};

template <class T>
constexpr bool kIsQuantized = std::is_same_v<T, int8_t> || std::is_same_v<T, E4m3>;

// The first `count` lanes; nothing past them is read.
template <class T>
  requires kIsQuantized<T>
inline Vec load(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

}  // namespace hf_paged
