// bf16 linear layer whose rows have bits of their own: out[m, n] = bf16(sum_k x[m, k] * weight[n, k] + bias[n]).
//
// The tile is that of linear_tiles.h on twice as many numbers a step: lane l of an accumulator takes k = 2l, 2l + 1 of
// every 2 W (with the instruction for it), or l and W + l (without), of one block of k; blocks are added in order in
// fp32, and what comes out is rounded once. Whatever the number of rows, their place and the threads, a row's bits depend
// on that row and the weight only. torch's own kernel is faster for many rows and does not promise that.

#include "linear_tiles.h"

#if defined(HF_PAGED_AVX512_BF16)
#pragma GCC target("avx512bf16")
#endif

namespace {

using namespace hf_paged;
using BFloat16 = c10::BFloat16;

constexpr int64_t kStep = 2 * kLanes;

#if defined(HF_PAGED_AVX512_BF16)
using Operand = __m512bh;
inline Operand fetch(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Operand fetch(const BFloat16* p, int64_t count) {
  return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((uint64_t(1) << count) - 1), p);
}
inline Vec multiply_add(const Operand& a, const Operand& b, const Vec& sum) { return _mm512_dpbf16_ps(sum, a, b); }
#else
struct Operand {
  Vec low, high;
};
inline Operand fetch(const BFloat16* p) { return {load(p), load(p + kLanes)}; }
inline Operand fetch(const BFloat16* p, int64_t count) {
  return {load(p, std::min<int64_t>(count, kLanes)), count > kLanes ? load(p + kLanes, count - kLanes) : Vec(0.f)};
}
inline Vec multiply_add(const Operand& a, const Operand& b, const Vec& sum) {
  return at::vec::fmadd(a.high, b.high, at::vec::fmadd(a.low, b.low, sum));
}
#endif

struct Problem {
  const BFloat16 *x, *weight, *bias;
  BFloat16* out;
  int64_t M, N, K, x_stride, weight_stride, out_stride;
};

// One tile over one block of k, into (the first block) or onto `sums` [MR][kTileN].
template <int MR, int NR>
void tile(const BFloat16* x, int64_t x_stride, const BFloat16* w, int64_t w_stride, int64_t length, bool first, float* sums) {
  Vec acc[MR * NR];
#pragma GCC unroll 32
  for (int i = 0; i < MR * NR; ++i) acc[i] = Vec(0.f);
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep) {
    Operand a[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) a[m] = fetch(x + m * x_stride + k);
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      const Operand b = fetch(w + n * w_stride + k);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m * NR + n] = multiply_add(a[m], b, acc[m * NR + n]);
    }
  }
  if (k < length) {
    Operand a[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) a[m] = fetch(x + m * x_stride + k, length - k);
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      const Operand b = fetch(w + n * w_stride + k, length - k);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m * NR + n] = multiply_add(a[m], b, acc[m * NR + n]);
    }
  }
  alignas(64) float totals[(MR * NR + 7) / 8 * 8];
  horizontal_sums<MR * NR>(acc, totals);
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n)
      sums[m * kTileN + n] = first ? totals[m * NR + n] : sums[m * kTileN + n] + totals[m * NR + n];
}

using BFloat16Tile = void (*)(const BFloat16*, int64_t, const BFloat16*, int64_t, int64_t, bool, float*);

// kBFloat16Tiles[(MR - 1) * kTileN + NR - 1]
template <int... I>
constexpr auto bfloat16_tiles(std::integer_sequence<int, I...>) {
  return std::array<BFloat16Tile, sizeof...(I)>{&tile<I / kTileN + 1, I % kTileN + 1>...};
}
constexpr auto kBFloat16Tiles = bfloat16_tiles(std::make_integer_sequence<int, kTileM * kTileN>{});

constexpr int64_t kLongestBlock = 2 * kBlockK;  // as many bytes as of float32
constexpr int64_t kMostRows = 512;              // whose sums of kTileN columns wait in L1

int64_t length_of_blocks(int64_t K) {
  const int64_t blocks = std::max<int64_t>(1, (K + kLongestBlock - 1) / kLongestBlock);
  return ((K + blocks - 1) / blocks + kStep - 1) / kStep * kStep;
}

int64_t rows_at_once(int64_t K) {
  const int64_t rows = kBlockXBytes / (std::max<int64_t>(K, 1) * 2) / kTileM * kTileM;
  return std::clamp<int64_t>(rows, kTileM, kMostRows / kTileM * kTileM);
}

// Rows m0 to m1 of x times rows n0 to n1 of the weight.
void block(const Problem& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int64_t block_k = length_of_blocks(p.K);
  alignas(64) float sums[kMostRows * kTileN];
  for (int64_t n = n0; n < n1; n += kTileN) {
    const int64_t nr = std::min<int64_t>(kTileN, n1 - n);
    for (int64_t k = 0; k < p.K; k += block_k)
      for (int64_t m = m0; m < m1; m += kTileM) {
        const int64_t mr = std::min<int64_t>(kTileM, m1 - m);
        kBFloat16Tiles[(mr - 1) * kTileN + nr - 1](
            p.x + m * p.x_stride + k, p.x_stride, p.weight + n * p.weight_stride + k, p.weight_stride,
            std::min(block_k, p.K - k), k == 0, sums + (m - m0) * kTileN);
      }
    for (int64_t m = m0; m < m1; ++m)
      for (int64_t i = 0; i < nr; ++i) {
        const float sum = sums[(m - m0) * kTileN + i];
        p.out[m * p.out_stride + n + i] = BFloat16(p.bias ? sum + static_cast<float>(p.bias[n + i]) : sum);
      }
  }
}

}  // namespace

// x [M, K], weight [N, K], out [M, N], row strides in elements; bias [N] or null.
HF_PAGED_EXPORT void hfp_linear_bf16(
    const BFloat16* x, int64_t x_row, const BFloat16* weight, int64_t weight_row, const BFloat16* bias, BFloat16* out,
    int64_t out_row, int64_t M, int64_t N, int64_t K) {
  const Problem p{x, weight, bias, out, M, N, K, x_row, weight_row, out_row};
  const int64_t rows = rows_at_once(K);
  at::parallel_for(0, (N + kTileN - 1) / kTileN, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < M; m += rows) block(p, m, std::min(M, m + rows), begin * kTileN, std::min(N, end * kTileN));
  });
}
