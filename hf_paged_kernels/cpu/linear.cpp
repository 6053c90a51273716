// Dense fp32 linear layer reading the live weight: out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n].
//
// Nothing is packed; the weight is streamed once for every block of rows of x. The tile is that of linear_tiles.h.

#include "linear_tiles.h"

namespace {

using namespace hf_paged;

struct Problem {
  const float* x;
  const float* weight;
  const float* bias;
  float* out;
  int64_t M, N, K;
  int64_t x_stride, weight_stride, out_stride;
};

// kFetchingTiles[(MR - 1) * kTileN + PREFETCH - 1], all of kTileN columns
template <int... I>
constexpr auto fetching_tiles(std::integer_sequence<int, I...>) {
  return std::array<TileFunction, sizeof...(I)>{&tile<I / kTileN + 1, kTileN, I % kTileN + 1>...};
}
constexpr auto kFetchingTiles = fetching_tiles(std::make_integer_sequence<int, kTileM * kTileN>{});

// Rows m0 to m1 of x times rows n0 to n1 of the weight.
void block(const Problem& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int64_t block_k = hf_paged::block_k(p.K);
  const int64_t tiles_m = (m1 - m0 + kTileM - 1) / kTileM;
  const int64_t fetch = (kTileN + tiles_m - 1) / tiles_m;  // rows each tile along m fetches
  for (int64_t n = n0; n < n1; n += kTileN) {
    const int64_t nr = std::min<int64_t>(kTileN, n1 - n);
    for (int64_t k = 0; k < p.K; k += block_k) {
      const int64_t length = std::min(block_k, p.K - k);
      const bool last = k + block_k >= p.K;
      const float* w = p.weight + n * p.weight_stride + k;
      const float* bias = last && p.bias ? p.bias + n : nullptr;
      const float* next = last ? w - k + kTileN * p.weight_stride : w + block_k;
      int64_t fetched = nr < kTileN || (last && n + 2 * kTileN > n1) ? kTileN : 0;
      for (int64_t m = m0; m < m1; m += kTileM) {
        const int64_t mr = std::min<int64_t>(kTileM, m1 - m);
        const bool fetches = fetched + fetch <= kTileN;
        const TileFunction run =
            fetches ? kFetchingTiles[(mr - 1) * kTileN + fetch - 1] : kTiles[(mr - 1) * kTileN + nr - 1];
        run(p.x + m * p.x_stride + k, p.x_stride, w, p.weight_stride, length, next + fetched * p.weight_stride, k == 0,
            bias, p.out + m * p.out_stride + n, p.out_stride);
        fetched += fetch;
      }
    }
  }
}

}  // namespace

// For every head: x [M, K], weight [N, K], out [M, N], with strides of heads and rows in elements; bias [N] or null.
HF_PAGED_EXPORT void hfp_linear_f32(
    const float* x, int64_t x_head, int64_t x_row, const float* weight, int64_t weight_head, int64_t weight_row,
    const float* bias, float* out, int64_t out_head, int64_t out_row, int64_t heads, int64_t M, int64_t N, int64_t K) {
  const int64_t block_m = hf_paged::block_m(M, K);
  const int64_t tiles_n = (N + kTileN - 1) / kTileN;
  at::parallel_for(0, heads * tiles_n, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // the tiles of one head after those of another
      const int64_t head = begin / tiles_n, stop = std::min(end, (head + 1) * tiles_n);
      const Problem p{x + head * x_head, weight + head * weight_head, bias, out + head * out_head, M, N, K,
                      x_row, weight_row, out_row};
      for (int64_t m = 0; m < M; m += block_m)
        block(p, m, std::min(M, m + block_m), begin % tiles_n * kTileN, std::min(N, (stop - head * tiles_n) * kTileN));
      begin = stop;
    }
  });
}
