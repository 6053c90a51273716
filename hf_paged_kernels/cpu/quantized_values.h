// Quantized weights as ../quantized.py lays them out, and their values as floats: scale * (q - zero), rounded once.
#pragma once

#include "common.h"

#include <algorithm>

namespace hf_paged {

constexpr int kStep = 16;  // LANES of quantized.py: values that lie side by side
constexpr int kParts = kStep / kLanes;

enum Kind : int64_t { kInt2 = 0, kInt3 = 1, kInt4 = 2, kInt8 = 3, kFp8 = 4 };

// A weight [N, K], or one for each expert; `_Weight` of quantized.py fills it in. Strides in elements.
struct Quantized {
  const void* data;
  const void* scales;
  const int16_t* zeros;  // null: `zero` everywhere
  int64_t kind, scale_dtype;
  int64_t N, K;
  int64_t block_rows, block_columns;  // that share a scale; columns are a multiple of kStep, or all
  int64_t data_row, data_expert;
  int64_t scales_block, scales_expert;  // strides between blocks of columns, and between experts
  int64_t zeros_block, zeros_expert;
  double zero;
};

typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Ints load_ints(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }
inline Vec to_vec(const Floats& floats) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return Vec(floats);
#else
  return Vec::loadu(&floats);
#endif
}

// Values of BITS bits, FIELDS of them in a word.
template <int BITS, int FIELDS>
struct Packed {
  using Data = int32_t;
  static constexpr int kFields = FIELDS;

  // A row's values in one block of columns.
  struct Block {
#if defined(CPU_CAPABILITY_AVX512)
    // The values themselves, to be looked up by the low 4 bits of a word: so a field needs no masking, for the table of
    // fewer bits repeats itself.
    __m512 table;
    Block(float scale, float zero) {
      const __m512i q = _mm512_and_si512(
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((1 << BITS) - 1));
      table = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    }
    Vec values(const Ints& words) const { return _mm512_permutexvar_ps(__m512i(words), table); }
#else
    Floats scale, zero;
    Block(float scale, float zero) : scale(Floats{} + scale), zero(Floats{} + zero) {}
    Vec values(const Ints& words) const {
      return to_vec((__builtin_convertvector(words & ((1 << BITS) - 1), Floats) - zero) * scale);
    }
#endif
  };

  // Values k to end of a row, all of one block of columns, and up to a multiple of kStep beyond; k is one.
  static void decode(const int32_t* row, int64_t k, int64_t end, float scale, float zero, float* out) {
    const Block block(scale, zero);
    while (k < end) {
      const int64_t field = k / kStep % FIELDS;
      const int64_t count = std::min<int64_t>(FIELDS - field, (end - k + kStep - 1) / kStep);
      const int32_t* words = row + k / (kStep * FIELDS) * kStep;
      for (int part = 0; part < kParts; ++part) {
        Ints w = load_ints(words + part * kLanes) >> int(BITS * field);
        for (int64_t i = 0; i < count; ++i, w >>= BITS) block.values(w).store(out + i * kStep + part * kLanes);
      }
      k += count * kStep;
      out += count * kStep;
    }
  }
};

// Values of 8 bits; VALUES::load gives those of kLanes bytes as floats.
template <class VALUES>
struct Bytes {
  using Data = int8_t;

  static void decode(const int8_t* row, int64_t k, int64_t end, float scale, float zero, float* out) {
    const Vec s(scale), z(zero);
    for (; k + kLanes <= end; k += kLanes, out += kLanes) ((VALUES::load(row + k) - z) * s).store(out);
    if (k < end) {
      int8_t rest[kLanes] = {};
      std::memcpy(rest, row + k, end - k);
      ((VALUES::load(rest) - z) * s).store(out);
    }
  }
};

struct Int8Values {
  static Vec load(const int8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(CPU_CAPABILITY_AVX2)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = p[i];
    return Vec::loadu(values);
#endif
  }
};

// e4m3: as the upper half of an fp16, which is 2^8 too small; but the bits of its NaN are those of another number.
struct Fp8Values {
  static Vec load(const int8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
    const __m512 value = _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(int16_t(0xBFFF))));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(
        _mm256_and_si256(half, _mm256_set1_epi16(0x3F80)), _mm256_set1_epi16(0x3F80));
    return _mm512_mask_blend_ps(nan, _mm512_mul_ps(value, _mm512_set1_ps(256.f)), _mm512_set1_ps(NAN));
#elif defined(CPU_CAPABILITY_AVX2)
    const __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
    const __m256 value = _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16(int16_t(0xBFFF))));
    const __m256 nan = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(
        _mm_cmpeq_epi16(_mm_and_si128(half, _mm_set1_epi16(0x3F80)), _mm_set1_epi16(0x3F80))));
    return _mm256_or_ps(_mm256_mul_ps(value, _mm256_set1_ps(256.f)), nan);
#else
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int sign = p[i] & 0x80, bits = p[i] & 0x7F, mantissa = bits & 7, exponent = bits >> 3;
      const uint32_t single = bits == 0x7F ? 0x7FC00000u : uint32_t(bits + (120 << 3)) << 20;
      float value = mantissa * 0x1p-9f;
      if (exponent) std::memcpy(&value, &single, 4);
      values[i] = sign ? -value : value;
    }
    return Vec::loadu(values);
#endif
  }
};

// f(values of this kind)
template <class F>
void with_kind(int64_t kind, const F& f) {
  switch (kind) {
    case kInt2: return f(Packed<2, 16>{});
    case kInt3: return f(Packed<3, 10>{});
    case kInt4: return f(Packed<4, 8>{});
    case kInt8: return f(Bytes<Int8Values>{});
    case kFp8: return f(Bytes<Fp8Values>{});
  }
}

// out[i] = p[i] as floats, `count` at most kStep; whole vectors are written.
template <class T>
inline void load_few(const T* p, int64_t count, float* out) {
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 mask = (1u << count) - 1;
  __m512 values;
  if constexpr (std::is_same_v<T, float>) {
    values = _mm512_maskz_loadu_ps(mask, p);
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, p);
    if constexpr (std::is_same_v<T, c10::Half>)
      values = _mm512_cvtph_ps(bits);
    else if constexpr (std::is_same_v<T, c10::BFloat16>)
      values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    else
      values = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(bits));
  }
  _mm512_storeu_ps(out, values);
#else
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(p[i]);
#endif
}

// The scales or zeros of `count` rows from n, at p in one block of columns.
template <class T>
inline void load_rows(const T* p, int64_t n, int64_t count, int64_t block_rows, float* out) {
  if (block_rows == 1) return load_few(p + n, count, out);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(p[(n + i) / block_rows]);
}

}  // namespace hf_paged
