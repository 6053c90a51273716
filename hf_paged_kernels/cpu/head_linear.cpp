// fp32 products with a weight that is contiguous along its outputs:
//
//   out[h, m, n] = sum_k x[h, m, k] * weight[h, k, n] + bias[n]
//
// What linear.cpp is for nn.Linear, this is for weights kept [K, N]: Conv1D, and the heads of latent attention. A tile
// of MR rows and kTileV vectors of outputs stays in registers while k runs, so every output is one chain of fma over
// ascending k, then the bias: its bits depend on its row and its column of the weight only. Head after head, block of
// columns after block of columns, the weight is read once for every kTileM rows.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// Accumulators, kTileV vectors of the weight and one of x fill the register file (32 or 16 registers).
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileM = 6, kTileV = 4;
#else
constexpr int kTileM = 4, kTileV = 2;
#endif
constexpr int64_t kTileN = kTileV * kLanes;
constexpr int64_t kAhead = 16;  // rows of the weight fetched ahead: each lies on a page of its own

struct Problem {
  const float *x, *weight, *bias;
  float* out;
  int64_t heads, M, N, K;
  int64_t x_head, x_row, weight_head, weight_row, out_head, out_row;  // strides
};

// MR rows of x times `columns` columns of the weight, kTileN unless Tail.
template <int MR, bool Tail>
void tile(const Problem& p, const float* x, const float* w, const float* bias, float* out, int64_t columns) {
  Vec acc[MR][kTileV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kTileV; ++v) acc[m][v] = Vec(0.f);
  const auto load = [&](const float* from, int v) __attribute__((always_inline)) {
    if (!Tail) return Vec::loadu(from + v * kLanes);
    const int64_t count = std::clamp<int64_t>(columns - v * kLanes, 0, kLanes);
    return count ? Vec::loadu(from + v * kLanes, count) : Vec(0.f);
  };
  for (int64_t k = 0; k < p.K; ++k, w += p.weight_row) {
    Vec row[kTileV];
#pragma GCC unroll 4
    for (int v = 0; v < kTileV; ++v) {
      row[v] = load(w, v);
      __builtin_prefetch(w + kAhead * p.weight_row + v * kLanes, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec xk(x[m * p.x_row + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileV; ++v) acc[m][v] = at::vec::fmadd(xk, row[v], acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kTileV; ++v) {
      const Vec value = bias ? acc[m][v] + load(bias, v) : acc[m][v];
      float* to = out + m * p.out_row + v * kLanes;
      if (!Tail) value.store(to);
      else if (columns > v * kLanes) value.store(to, std::min(kLanes, columns - v * kLanes));
    }
}

using TileFunction = void (*)(const Problem&, const float*, const float*, const float*, float*, int64_t);

template <bool Tail, int... I>
constexpr auto tiles(std::integer_sequence<int, I...>) {
  return std::array<TileFunction, sizeof...(I)>{&tile<I + 1, Tail>...};
}
constexpr auto kWhole = tiles<false>(std::make_integer_sequence<int, kTileM>{});
constexpr auto kTail = tiles<true>(std::make_integer_sequence<int, kTileM>{});

}  // namespace

// Strides in elements, of heads and rows; the last dimension of each is contiguous. bias [N] or null.
extern "C" __attribute__((visibility("default"))) void hfp_head_linear_f32(
    const float* x, int64_t x_head, int64_t x_row, const float* weight, int64_t weight_head, int64_t weight_row,
    const float* bias, float* out, int64_t out_head, int64_t out_row, int64_t heads, int64_t M, int64_t N, int64_t K) {
  const Problem p{x, weight, bias, out, heads, M, N, K, x_head, x_row, weight_head, weight_row, out_head, out_row};
  const int64_t blocks = (N + kTileN - 1) / kTileN;
  at::parallel_for(0, heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, n = i % blocks * kTileN, columns = std::min(kTileN, N - n);
      const auto& functions = columns == kTileN ? kWhole : kTail;
      for (int64_t m = 0; m < M; m += kTileM) {
        const int64_t rows = std::min<int64_t>(kTileM, M - m);
        functions[rows - 1](p, x + head * x_head + m * x_row, weight + head * weight_head + n,
                            bias ? bias + n : nullptr, out + head * out_head + m * out_row + n, columns);
      }
    }
  });
}
