// Linear layers whose weights and inputs are both int8:
//
//     out[m, n] = (sum over blocks of columns of scale[block, n] * (sum_k q[m, k] * w[n, k])) * x_scale[m] + bias[n]
//
// x is rounded to q = x / x_scale here, row by row. The inner sums are exact integers, so a row's bits depend on that
// row and the weight only.

#include "quantized_values.h"

#include <array>
#include <cmath>
#include <memory>
#include <vector>

namespace {

using namespace hf_paged;

constexpr int kColumns = 4;  // rows of the weight in a tile
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef float Float4 __attribute__((vector_size(16)));

#if defined(__AVX512VNNI__)
constexpr int kWide = 64, kMaxRows = 6;
#elif defined(__AVX2__)
constexpr int kWide = 32, kMaxRows = 2;
#else
constexpr int kWide = 16, kMaxRows = 2;
#endif

// Rows of x as int8, and what belongs to them.
struct Rows {
  int8_t* q;         // [M, stride], zeros from K on
  float* scales;     // [M]
  int32_t* sums;     // [M, blocks of columns], of q
  int64_t stride, blocks;
};

// Sums of products of kWide int8 values.
#if defined(__AVX512VNNI__)
using Sums = __m512i;
inline __m512i load_values(const int8_t* p) { return _mm512_loadu_si512(p); }
// The instruction takes one factor without a sign: w + 128. So 128 times the sum of q is too much in the end.
constexpr int32_t kOffset = 128;
inline __m512i load_weight(const int8_t* p, int64_t count) {
  const __m512i flip = _mm512_set1_epi8(int8_t(0x80));
  if (count >= kWide) return _mm512_xor_si512(_mm512_loadu_si512(p), flip);
  const __mmask64 mask = (uint64_t(1) << count) - 1;
  return _mm512_maskz_mov_epi8(mask, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, p), flip));
}
// In assembly, for of the intrinsic GCC makes copies of `sums`, and has no registers left for them.
inline __m512i add_products(__m512i sums, __m512i w, __m512i q) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(q));
  return sums;
}
inline Int4 four_sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return Int4(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
#elif defined(__AVX2__)
using Sums = __m256i;
constexpr int32_t kOffset = 0;
inline __m256i load_values(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i load_weight(const int8_t* p, int64_t count) {
  if (count >= kWide) return load_values(p);
  alignas(32) int8_t rest[kWide] = {};
  std::memcpy(rest, p, count);
  return load_values(rest);
}
// |w| * (q with the sign of w): sums of two products fit in 16 bits, for q is never -128.
inline __m256i add_products(__m256i sums, __m256i w, __m256i q) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Int4 four_sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return Int4(_mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1)));
}
#else
struct Sums {
  int32_t value = 0;
};
struct Values {
  int8_t values[kWide];
};
constexpr int32_t kOffset = 0;
inline Values load_values(const int8_t* p) {
  Values v;
  std::memcpy(v.values, p, kWide);
  return v;
}
inline Values load_weight(const int8_t* p, int64_t count) {
  Values v{};
  std::memcpy(v.values, p, std::min<int64_t>(count, kWide));
  return v;
}
inline Sums add_products(Sums sums, const Values& w, const Values& q) {
  for (int i = 0; i < kWide; ++i) sums.value += w.values[i] * q.values[i];
  return sums;
}
inline Int4 four_sums(Sums a, Sums b, Sums c, Sums d) { return Int4{a.value, b.value, c.value, d.value}; }
#endif

// A row of x in int8, with the scale max |x| / 127 or `fixed`, beyond whose range it is cut off. If it has a NaN, or an
// infinity that has no fixed scale, its scale is none, so that its results are NaN.
void round_row(const float* x, int64_t K, int64_t block_columns, const float* fixed, const Rows& rows, int64_t m) {
  int8_t* q = rows.q + m * rows.stride;
  Vec largest(0.f);
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) largest = at::vec::maximum(largest, Vec::loadu(x + k).abs());
  if (k < K) largest = at::vec::maximum(largest, load(x + k, K - k).abs());
  const float peak = max_lanes(largest);
  const bool usable = fixed ? !std::isnan(peak) : std::isfinite(peak);
  const float scale = !usable ? NAN : fixed ? *fixed : std::max(peak, 1e-30f) / 127.f;
  rows.scales[m] = scale;
  std::memset(q + k, 0, rows.stride - k);
  if (!usable) {
    std::memset(q, 0, K);
  } else {
    for (k = 0; k < K; k += kLanes) {
      alignas(64) float lanes[kLanes];
      const int64_t count = std::min<int64_t>(kLanes, K - k);
      const Vec value = load(x + k, count) / Vec(scale);
      at::vec::clamp(value, Vec(-127.f), Vec(127.f)).round().store(lanes);
      for (int64_t i = 0; i < count; ++i) q[k + i] = static_cast<int8_t>(lanes[i]);
    }
  }
  for (int64_t b = 0; b < rows.blocks; ++b) {
    int32_t sum = 0;
    for (k = b * block_columns; k < std::min(K, (b + 1) * block_columns); ++k) sum += q[k];
    rows.sums[m * rows.blocks + b] = sum;
  }
}

// What a tile needs of kColumns rows of the weight; `scales` has one for each block of columns.
struct Columns {
  const int8_t* rows[kColumns];  // the last one again where there are fewer
  const Float4* scales;
  Float4 bias;
  int64_t count, fetch;  // fetch: how far ahead memory is asked for values of the weight
};

template <int MR>
void tile(
    const Columns& w, const Rows& x, int64_t m, int64_t K, int64_t block_columns, float* out, int64_t out_row) {
  const int8_t* q = x.q + m * x.stride;
  Float4 totals[MR] = {};
  for (int64_t k = 0, b = 0; k < K; ++b) {
    const int64_t stop = std::min(K, k + block_columns);
    Sums sums[MR * kColumns] = {};
    const auto step = [&](int64_t count) ALWAYS_INLINE {
      decltype(load_values(q)) values[MR];
      unrolled<MR>([&](auto i) ALWAYS_INLINE { values[i] = load_values(q + i * x.stride + k); });
      unrolled<kColumns>([&](auto n) ALWAYS_INLINE {
        const auto weight = load_weight(w.rows[n] + k, count);
        unrolled<MR>([&](auto i) ALWAYS_INLINE {
          sums[i * kColumns + n] = add_products(sums[i * kColumns + n], weight, values[i]);
        });
      });
    };
    for (; k + kWide <= stop; k += kWide) {
      unrolled<kColumns>([&](auto n) ALWAYS_INLINE { __builtin_prefetch(w.rows[n] + w.fetch + k, 0, 2); });
      step(kWide);
    }
    if (k < stop) step(stop - k);
    k = stop;
    unrolled<MR>([&](auto i) ALWAYS_INLINE {
      const Sums* s = sums + i * kColumns;
      const Int4 sum = four_sums(s[0], s[1], s[2], s[3]) - kOffset * x.sums[(m + i) * x.blocks + b];
      totals[i] += __builtin_convertvector(sum, Float4) * w.scales[b];
    });
  }
  for (int i = 0; i < MR; ++i) {
    const Float4 y = totals[i] * x.scales[m + i] + w.bias;
    std::memcpy(out + i * out_row, &y, w.count * sizeof(float));
  }
}

template <int... I>
constexpr auto all_tiles(std::integer_sequence<int, I...>) {
  return std::array{&tile<I + 1>...};
}
constexpr auto kTiles = all_tiles(std::make_integer_sequence<int, kMaxRows>{});

constexpr int64_t kBlockBytes = 256 * 1024;  // of x, kept in L2 while the weight streams past

// Rows m0 to m1 of x times rows n0 to n1 of the weight.
void block(
    const Quantized& w, int64_t expert, const Rows& x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    const float* bias, float* out, int64_t out_row) {
  const int64_t tiles = (m1 - m0 + kMaxRows - 1) / kMaxRows, height = (m1 - m0 + tiles - 1) / tiles;
  std::vector<Float4> scales(x.blocks);
  Columns columns{{}, scales.data(), {}, 0, 4 * kColumns * w.data_row};
  for (int64_t n = n0; n < n1; n += kColumns) {
    columns.count = std::min<int64_t>(kColumns, n1 - n);
    for (int64_t i = 0; i < kColumns; ++i) columns.rows[i] = w.row<int8_t>(expert, std::min(n + i, n1 - 1));
    for (int64_t b = 0; b < x.blocks; ++b) {
      Constants<1> constants;
      constants.load(w, expert, n, columns.count, b * w.block_columns, b * w.block_columns + 1);
      std::memcpy(&scales[b], constants.scales[0], sizeof(Float4));
    }
    if (bias) std::memcpy(&columns.bias, bias + n, columns.count * sizeof(float));
    for (int64_t m = m0; m < m1; m += height) {
      const int64_t rows = std::min(height, m1 - m);
      kTiles[rows - 1](columns, x, m, w.K, w.block_columns, out + m * out_row + n, out_row);
    }
  }
}

template <class T>
using Buffer = std::unique_ptr<T[], decltype(&std::free)>;

template <class T>
Buffer<T> allocate(int64_t count) {
  T* memory = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  return Buffer<T>(memory, &std::free);
}

}  // namespace

// As hf_paged_quantized_linear, of int8 weights without zeros. input_scale is the scale of all rows of x, or null.
HF_PAGED_EXPORT void hf_paged_quantized_linear_int8(
    const Quantized* weight, const float* x, int64_t x_row, const float* bias, float* out, int64_t out_row,
    const int64_t* groups, int64_t num_groups, const float* input_scale) {
  const Quantized& w = *weight;
  const int64_t M = groups[2 * num_groups + 1], stride = (w.K + 63) / 64 * 64;
  const int64_t blocks = (w.K + w.block_columns - 1) / w.block_columns;
  const auto q = allocate<int8_t>(M * stride);
  const auto scales = allocate<float>(M);
  const auto sums = allocate<int32_t>(M * blocks);
  const Rows rows{q.get(), scales.get(), sums.get(), stride, blocks};
  at::parallel_for(0, M, std::max<int64_t>(1, 16384 / w.K), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) round_row(x + m * x_row, w.K, w.block_columns, input_scale, rows, m);
  });
  const int64_t tiles = (w.N + kColumns - 1) / kColumns;
  at::parallel_for(0, num_groups * tiles, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // the tiles of one expert after those of another
      const int64_t group = begin / tiles, stop = std::min(end, (group + 1) * tiles);
      const int64_t expert = groups[2 * group], last = groups[2 * group + 3];
      const int64_t n0 = begin % tiles * kColumns, n1 = std::min(w.N, (stop - group * tiles) * kColumns);
      const int64_t step = std::max<int64_t>(1, kBlockBytes / (kMaxRows * stride)) * kMaxRows;
      for (int64_t m = groups[2 * group + 1]; m < last; m += step)
        block(w, expert, rows, m, std::min(last, m + step), n0, n1, bias ? bias + expert * w.N : nullptr, out, out_row);
      begin = stop;
    }
  });
}
