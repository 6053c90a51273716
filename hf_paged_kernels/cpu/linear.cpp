// Dense fp32 linear layer reading the live weight: out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n].
//
// Both operands are contiguous along k, so the tile is vectorised along k: MR rows of x times NR rows of the
// weight, MR * NR vector accumulators in registers, and one horizontal sum of each at the end. Nothing is packed,
// the weight is streamed once for every block of rows of x, and every output is summed in the same order in every
// tile shape: lane l takes k = l, l + W, l + 2W, ... of one block of k, the lanes are added as a fixed tree, the
// blocks in order, then the bias. So a row's bits depend on that row and the weight only.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

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

struct Problem {
  const float* x;
  const float* weight;
  const float* bias;
  float* out;
  int64_t M, N, K;
  int64_t x_stride, weight_stride, out_stride;
};

// sums[i] = the sum of the lanes of acc[i], each by the same tree.
template <int COUNT>
inline void horizontal_sums(const Vec* acc, float* sums) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  constexpr int kGroups = (COUNT + 3) / 4;
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    __m256 quad[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (4 * g + i < COUNT) {
#if defined(CPU_CAPABILITY_AVX512)
        const __m512 v = acc[4 * g + i];
        quad[i] = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
        quad[i] = acc[4 * g + i];
#endif
      } else {
        quad[i] = _mm256_setzero_ps();
      }
    }
    const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(quad[0], quad[1]), _mm256_hadd_ps(quad[2], quad[3]));
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

// One tile over one block of k. `prefetch`, if any, is the same place in the weight rows that come next.
template <int MR, int NR, bool PREFETCH>
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
    for (int n = 0; n < NR; ++n) {
      const Vec b = Vec::loadu(w + n * w_stride + k);
      if constexpr (PREFETCH) __builtin_prefetch(prefetch + n * w_stride + k, 0, 3);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m * NR + n] = at::vec::fmadd(a[m], b, acc[m * NR + n]);
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
      for (int m = 0; m < MR; ++m) acc[m * NR + n] = at::vec::fmadd(a[m], b, acc[m * NR + n]);
    }
  }
  alignas(64) float sums[(MR * NR + 3) / 4 * 4];
  horizontal_sums<MR * NR>(acc, sums);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    float* row = out + m * out_stride;
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      float value = sums[m * NR + n];
      if (!first) value += row[n];
      if (bias) value += bias[n];
      row[n] = value;
    }
  }
}

using TileFunction = void (*)(
    const float*, int64_t, const float*, int64_t, int64_t, const float*, bool, const float*, float*, int64_t);

// kTiles[prefetch][MR - 1][NR - 1]
template <bool PREFETCH, int... I>
constexpr auto tile_row(std::integer_sequence<int, I...>) {
  return std::array<TileFunction, sizeof...(I)>{&tile<I / kTileN + 1, I % kTileN + 1, PREFETCH>...};
}
using AllTiles = std::make_integer_sequence<int, kTileM * kTileN>;
constexpr auto kTiles = tile_row<false>(AllTiles{});
constexpr auto kPrefetchingTiles = tile_row<true>(AllTiles{});

// Rows m0 to m1 of x times rows n0 to n1 of the weight, one block of k after the other.
void block(const Problem& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int64_t num_blocks_k = std::max<int64_t>(1, (p.K + kBlockK - 1) / kBlockK);
  const int64_t block_k = ((p.K + num_blocks_k - 1) / num_blocks_k + kLanes - 1) / kLanes * kLanes;
  for (int64_t n = n0; n < n1; n += kTileN) {
    const int64_t nr = std::min<int64_t>(kTileN, n1 - n);
    const bool more = n + 2 * kTileN <= n1;
    for (int64_t k = 0; k < std::max<int64_t>(p.K, 1); k += block_k) {
      const int64_t length = std::min(block_k, p.K - k);
      const bool last = k + block_k >= p.K;
      const float* w = p.weight + n * p.weight_stride + k;
      const float* bias = last && p.bias ? p.bias + n : nullptr;
      for (int64_t m = m0; m < m1; m += kTileM) {
        const int64_t mr = std::min<int64_t>(kTileM, m1 - m);
        const bool prefetch = more && m == m0;
        const auto& tiles = prefetch ? kPrefetchingTiles : kTiles;
        tiles[(mr - 1) * kTileN + nr - 1](
            p.x + m * p.x_stride + k, p.x_stride, w, p.weight_stride, length,
            w + kTileN * p.weight_stride, k == 0, bias, p.out + m * p.out_stride + n, p.out_stride);
      }
    }
  }
}

}  // namespace

// x [M, K], weight [N, K], out [M, N], each with a row stride in elements; bias [N] or null.
extern "C" __attribute__((visibility("default"))) void hfp_linear_f32(
    const float* x, int64_t x_stride, const float* weight, int64_t weight_stride, const float* bias, float* out,
    int64_t out_stride, int64_t M, int64_t N, int64_t K) {
  const Problem p{x, weight, bias, out, M, N, K, x_stride, weight_stride, out_stride};
  const int64_t rows = std::max<int64_t>(kTileM, kBlockXBytes / (std::max<int64_t>(K, 1) * 4) / kTileM * kTileM);
  const int64_t num_m = (M + rows - 1) / rows;
  const int64_t block_m = ((M + num_m - 1) / num_m + kTileM - 1) / kTileM * kTileM;
  const int64_t tiles_n = (N + kTileN - 1) / kTileN;
  at::parallel_for(0, tiles_n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < M; m += block_m)
      block(p, m, std::min(M, m + block_m), begin * kTileN, std::min(N, end * kTileN));
  });
}
