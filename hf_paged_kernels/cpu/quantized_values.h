// Quantized weights as ../quantized.py lays them out, and their values as floats: scale * (q - zero), rounded once.
#pragma once

#include "common.h"

#include <algorithm>
#include <type_traits>
#include <utility>

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

  template <class Data>
  const Data* row(int64_t expert, int64_t n) const {
    return static_cast<const Data*>(data) + expert * data_expert + n * data_row;
  }
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

#define ALWAYS_INLINE __attribute__((always_inline))

// f(0), f(1), ... f(COUNT - 1), their arguments constants: so arrays that f indexes become registers.
template <int COUNT, class F>
inline ALWAYS_INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) ALWAYS_INLINE {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, COUNT>{});
}

// v, in a register: a load that several instructions would otherwise repeat.
inline ALWAYS_INLINE Vec once(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 value = v;
  asm("" : "+v"(value));
  return value;
#else
  return v;
#endif
}

// Values of BITS bits, FIELDS of them in a word.
template <int BITS, int FIELDS>
struct Packed {
  using Data = int32_t;

  // A row's values in one block of columns.
  struct Block {
#if defined(CPU_CAPABILITY_AVX512)
    // The values themselves, looked up by the low 4 bits of a word: the table of fewer bits repeats itself, so that
    // fields need not be masked.
    __m512 table;
    void set(float scale, float zero) {
      const __m512i q = _mm512_and_si512(
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((1 << BITS) - 1));
      table = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    }
    Vec values(const Ints& words) const { return _mm512_permutexvar_ps(__m512i(words), table); }
#else
    Floats scale, zero;
    void set(float s, float z) { scale = Floats{} + s, zero = Floats{} + z; }
    Vec values(const Ints& words) const {
      return to_vec((__builtin_convertvector(words & ((1 << BITS) - 1), Floats) - zero) * scale);
    }
#endif
  };

  // Values k to end of NR rows, all of one block of columns: step(k, n -> kLanes values of row n from k) for each k in
  // turn. A last step goes on into what a row is filled up with.
  template <int NR, class Step>
  static inline ALWAYS_INLINE void each(
      const int32_t* row, int64_t stride, int64_t k, int64_t end, const float* scales, const float* zeros,
      const Step& step) {
    Block blocks[NR];
    unrolled<NR>([&](auto n) ALWAYS_INLINE { blocks[n].set(scales[n], zeros[n]); });
    while (k < end) {
      const int64_t word = k / (kStep * FIELDS) * kStep;
      const int64_t stop = std::min<int64_t>(end, (word + kStep) * FIELDS);
      const int32_t* words = row + word;
      int shift = k / kStep % FIELDS * BITS;
      unrolled<NR>([&](auto n) ALWAYS_INLINE { __builtin_prefetch(words + (n + 2 * NR) * stride, 0, 2); });
      if constexpr (kParts == 1) {
        Ints w[NR];
        unrolled<NR>([&](auto n) ALWAYS_INLINE { w[n] = load_ints(words + n * stride) >> shift; });
        for (; k < stop; k += kLanes)
          step(k, [&](auto n) ALWAYS_INLINE {
            const Vec values = blocks[n].values(w[n]);
            w[n] >>= BITS;
            return values;
          });
      } else {
        for (; k < stop; k += kLanes, shift += k % kStep ? 0 : BITS)
          step(k, [&](auto n) ALWAYS_INLINE {
            return blocks[n].values(load_ints(words + k % kStep + n * stride) >> shift);
          });
      }
    }
  }
};

// Values of 8 bits.
template <class TYPE>
struct Bytes {
  using Data = int8_t;

  // As above, but end - k must be a multiple of kLanes.
  template <int NR, class Step>
  static inline ALWAYS_INLINE void each(
      const int8_t* row, int64_t stride, int64_t k, int64_t end, const float* scales, const float* zeros,
      const Step& step) {
    while (k < end) {
      const int64_t stop = std::min(end, k / 64 * 64 + 64);
      unrolled<NR>([&](auto n) ALWAYS_INLINE { __builtin_prefetch(row + (n + 2 * NR) * stride + k, 0, 2); });
      for (; k < stop; k += kLanes)
        step(k, [&](auto n) ALWAYS_INLINE {
          const Vec values = TYPE::load(row + n * stride + k);
          return (TYPE::kHasZeros ? values - Vec(zeros[n]) : values) * Vec(scales[n]);
        });
    }
  }
};

struct Int8Values {
  static constexpr bool kHasZeros = true;

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

// e4m3 / 256: the bits of an fp16. But those of its NaN are another number's: see `has_nan`.
struct Fp8Values {
  static constexpr bool kHasZeros = false;

  static Vec load(const int8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(int16_t(0xBFFF))));
#elif defined(CPU_CAPABILITY_AVX2)
    const __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
    return _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16(int16_t(0xBFFF))));
#else
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int bits = p[i] & 0x7F;
      const uint32_t single = uint32_t(bits + (112 << 3)) << 20;  // e4m3 begins at 2^-7, fp32 at 2^-127
      float value = bits * 0x1p-17f;  // subnormal
      if (bits >> 3) std::memcpy(&value, &single, 4);
      values[i] = p[i] & 0x80 ? -value : value;
    }
    return Vec::loadu(values);
#endif
  }
};

// Whether there is a NaN among e4m3 values. Their row's products are NaN then, whatever the rest of it.
inline bool has_nan(const int8_t* p, int64_t count) {
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i nan = _mm512_set1_epi8(0x7F);
  for (; i < count; i += 64) {
    const __mmask64 mask = count - i < 64 ? (uint64_t(1) << (count - i)) - 1 : ~uint64_t(0);
    const __m512i values = _mm512_maskz_loadu_epi8(mask, p + i);
    if (_mm512_cmpeq_epi8_mask(_mm512_and_si512(values, nan), nan)) return true;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i nan = _mm256_set1_epi8(0x7F);
  for (; i + 32 <= count; i += 32) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(values, nan), nan))) return true;
  }
#endif
  for (; i < count; ++i)
    if ((p[i] & 0x7F) == 0x7F) return true;
  return false;
}

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

// out[i] = p[i] as floats, `count` at most kStep; out has room for kStep.
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

// The scales and zeros of a few rows of a weight, in the blocks of columns that meet one block of k.
template <int64_t BLOCKS>
struct Constants {
  float scales[BLOCKS][kStep], zeros[BLOCKS][kStep];  // [block of columns][row]

  void load(const Quantized& w, int64_t expert, int64_t n, int64_t rows, int64_t k, int64_t end) {
    const int64_t first = k / w.block_columns, count = (end - 1) / w.block_columns - first + 1;
    const int64_t start = expert * w.scales_expert + first * w.scales_block;
    switch (w.scale_dtype) {
      case kFloat32:
        load(static_cast<const float*>(w.scales) + start, w.scales_block, w, n, rows, count, scales);
        break;
      case kBFloat16:
        load(static_cast<const c10::BFloat16*>(w.scales) + start, w.scales_block, w, n, rows, count, scales);
        break;
      case kFloat16:
        load(static_cast<const c10::Half*>(w.scales) + start, w.scales_block, w, n, rows, count, scales);
        break;
    }
    if (w.zeros)
      load(w.zeros + expert * w.zeros_expert + first * w.zeros_block, w.zeros_block, w, n, rows, count, zeros);
    else
      for (int64_t b = 0; b < count; ++b) std::fill_n(zeros[b], kStep, static_cast<float>(w.zero));
    if (w.kind == kFp8)
      for (int64_t r = 0; r < rows; ++r) {
        const float unit = has_nan(w.row<int8_t>(expert, n + r) + k, end - k) ? NAN : 256.f;
        for (int64_t b = 0; b < count; ++b) scales[b][r] *= unit;
      }
  }

 private:
  template <class T>
  static void load(
      const T* p, int64_t stride, const Quantized& w, int64_t n, int64_t rows, int64_t count, float (*out)[kStep]) {
    for (int64_t b = 0; b < count; ++b, p += stride) {
      if (w.block_rows == 1)
        load_few(p + n, rows, out[b]);
      else
        for (int64_t r = 0; r < rows; ++r) out[b][r] = static_cast<float>(p[(n + r) / w.block_rows]);
    }
  }
};

}  // namespace hf_paged
