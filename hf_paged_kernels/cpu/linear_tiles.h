// The tile of the fp32 linear layers: what sums a row of x times a row of the weight, in one order wherever it is used.
//
// Both operands are contiguous along k, so the tile is vectorised along k: MR rows of x times NR rows of the
// weight, MR * NR vector accumulators in registers, and one horizontal sum of each at the end. Every output is summed
// in the same order in every tile shape: lane l takes k = l, l + W, l + 2W, ... of one block of k, the lanes are added
// as a fixed tree, the blocks in order, then the bias. So a row's bits depend on that row and the weight only.
#pragma once

#include "common.h"

#include <algorithm>
#include <array>
#include <utility>

namespace hf_paged {

// Tile sizes: the accumulators, MR vectors of x and one of the weight fill the register file (32 or 16 registers).
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileM = 4, kTileN = 6;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileM = 3, kTileN = 4;
#else
constexpr int kTileM = 2, kTileN = 2;
#endif

// Longest block of k: NR weight rows and MR rows of x of this length stay in a 32 KiB L1.
constexpr int64_t kBlockK = 768;
// Bytes of x kept in L2 while the weight streams past.
constexpr int64_t kBlockXBytes = 384 * 1024;

// Length of the blocks of k, the last of which may be shorter.
inline int64_t block_k(int64_t K) {
  const int64_t blocks = std::max<int64_t>(1, (K + kBlockK - 1) / kBlockK);
  return ((K + blocks - 1) / blocks + kLanes - 1) / kLanes * kLanes;
}

// Rows of x that are multiplied while the weight streams past once.
inline int64_t block_m(int64_t M, int64_t K) {
  const int64_t rows = std::max<int64_t>(kTileM, kBlockXBytes / (std::max<int64_t>(K, 1) * 4) / kTileM * kTileM);
  const int64_t blocks = (M + rows - 1) / rows;
  return ((M + blocks - 1) / blocks + kTileM - 1) / kTileM * kTileM;
}

#if defined(CPU_CAPABILITY_AVX512)
// Of four vectors, one whose every 128-bit lane holds the four sums of that lane: (0 + 2) + (1 + 3).
inline __m512 quad_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, a, b), _mm512_shuffle_ps(a, b, 0x4E));
  const __m512 cd = _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, c, d), _mm512_shuffle_ps(c, d, 0x4E));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xDD));
}
// Lanes (0 + 2, 1 + 3) of a, then of b.
inline __m512 fold_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, a, b), _mm512_shuffle_f32x4(a, b, 0x4E));
}
#endif

// sums[i] = the sum of the lanes of acc[i], each by the same tree.
template <int COUNT>
inline void horizontal_sums(const Vec* acc, float* sums) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 zero = _mm512_setzero_ps();
  __m512 quads[8];
#pragma GCC unroll 8
  for (int g = 0; g < (COUNT + 7) / 8 * 2; ++g) {
    const auto at = [&](int i) __attribute__((always_inline)) { return i < COUNT ? __m512(acc[i]) : zero; };
    quads[g] = 4 * g < COUNT ? quad_sums(at(4 * g), at(4 * g + 1), at(4 * g + 2), at(4 * g + 3)) : zero;
  }
#pragma GCC unroll 4
  for (int g = 0; g < (COUNT + 7) / 8; ++g) {
    const __m512 v = fold_lanes(quads[2 * g], quads[2 * g + 1]);
    const __m512 total = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    _mm256_storeu_ps(sums + 8 * g, _mm512_castps512_ps256(_mm512_shuffle_f32x4(total, total, 0x88)));
  }
#elif defined(CPU_CAPABILITY_AVX2)
#pragma GCC unroll 8
  for (int g = 0; g < (COUNT + 3) / 4; ++g) {
    const __m256 zero = _mm256_setzero_ps();
    const auto at = [&](int i) __attribute__((always_inline)) { return i < COUNT ? __m256(acc[i]) : zero; };
    const __m256 t = _mm256_hadd_ps(
        _mm256_hadd_ps(at(4 * g), at(4 * g + 1)), _mm256_hadd_ps(at(4 * g + 2), at(4 * g + 3)));
    _mm_storeu_ps(sums + 4 * g, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
  }
#else
  for (int i = 0; i < COUNT; ++i) {
    alignas(64) float lanes[kLanes];
    acc[i].store(lanes);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    sums[i] = lanes[0];
  }
#endif
}

// Where the accumulator of row m and column n stands: columns in groups of 4, 2 and 1, each group for all rows. So no
// group of sums straddles what one instruction stored, and a row is written in few instructions.
template <int MR, int NR>
constexpr int position(int m, int n) {
  constexpr int kFours = NR / 4 * 4, kTwos = NR / 2 * 2;
  return n < kFours ? n / 4 * 4 * MR + m * 4 + n % 4
      : n < kTwos   ? kFours * MR + m * 2 + n % 2
                    : kTwos * MR + m;
}

// out[i] = (out[i] unless this is the first block of k) + sums[i] + (bias[i] if given)
template <int COUNT>
inline void finish(const float* sums, bool first, const float* bias, float* out) {
  typedef float Floats __attribute__((vector_size(COUNT * 4), aligned(4), may_alias));
  Floats value = *reinterpret_cast<const Floats*>(sums);
  if (!first) value += *reinterpret_cast<const Floats*>(out);
  if (bias) value += *reinterpret_cast<const Floats*>(bias);
  *reinterpret_cast<Floats*>(out) = value;
}

// One tile over one block of k. `prefetch` is where PREFETCH of the weight rows that come next begin: a tile fetches
// them while it computes, so that a small M, bound by memory, never waits for them.
template <int MR, int NR, int PREFETCH>
inline void tile(
    const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t length, const float* prefetch,
    bool first, const float* bias, float* out, int64_t out_stride) {
  Vec acc[MR * NR];
#pragma GCC unroll 32
  for (int i = 0; i < MR * NR; ++i) acc[i] = Vec(0.f);
  int64_t k = 0;
  for (; k + kLanes <= length; k += kLanes) {
    Vec a[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) a[m] = Vec::loadu(x + m * x_stride + k);
#pragma GCC unroll 8
    for (int n = 0; n < PREFETCH; ++n) __builtin_prefetch(prefetch + n * w_stride + k, 0, 2);
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      const Vec b = Vec::loadu(w + n * w_stride + k);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[position<MR, NR>(m, n)] = at::vec::fmadd(a[m], b, acc[position<MR, NR>(m, n)]);
    }
  }
  if (k < length) {
    Vec a[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) a[m] = Vec::loadu(x + m * x_stride + k, length - k);
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      const Vec b = Vec::loadu(w + n * w_stride + k, length - k);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[position<MR, NR>(m, n)] = at::vec::fmadd(a[m], b, acc[position<MR, NR>(m, n)]);
    }
  }
  alignas(64) float sums[(MR * NR + 7) / 8 * 8];
  horizontal_sums<MR * NR>(acc, sums);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const auto columns = [&]<int COUNT>(std::integral_constant<int, COUNT>, int n) __attribute__((always_inline)) {
      finish<COUNT>(sums + position<MR, NR>(m, n), first, bias ? bias + n : nullptr, out + m * out_stride + n);
    };
    if constexpr (NR >= 4) columns(std::integral_constant<int, 4>{}, 0);
    if constexpr (NR % 4 >= 2) columns(std::integral_constant<int, 2>{}, NR / 4 * 4);
    if constexpr (NR % 2 == 1) columns(std::integral_constant<int, 1>{}, NR - 1);
  }
}

using TileFunction = void (*)(
    const float*, int64_t, const float*, int64_t, int64_t, const float*, bool, const float*, float*, int64_t);

// kTiles[(MR - 1) * kTileN + NR - 1]
template <int... I>
constexpr auto all_tiles(std::integer_sequence<int, I...>) {
  return std::array<TileFunction, sizeof...(I)>{&tile<I / kTileN + 1, I % kTileN + 1, 0>...};
}
constexpr auto kTiles = all_tiles(std::make_integer_sequence<int, kTileM * kTileN>{});

}  // namespace hf_paged
