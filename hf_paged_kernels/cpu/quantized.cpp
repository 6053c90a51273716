// Linear layers on quantized weights: out[m, n] = sum_k x[m, k] * scale * (q[n, k] - zero) + bias[n].
//
// Few rows of x are multiplied by values that are floats in registers only. For many rows, a few rows of the weight
// become floats in L1, one block of k at a time, and the tile of the dense layer multiplies them while they lie there.
// Both sum in the dense layer's order, so the result is, bit for bit, what that gives on the dequantized weight.

#include "linear_tiles.h"
#include "quantized_values.h"

namespace {

using namespace hf_paged;

using BlockConstants = Constants<kBlockK / kStep + 2>;

struct Problem {
  const float* x;
  const float* bias;
  float* out;
  int64_t M, x_row, out_row;
};

// Rows of the weight in a tile of MR = 1, 2, ... rows of x: accumulators, words and tables are to fit in registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kColumns[] = {8, 6, 4, 4, 4, 3, 3, 3};
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kColumns[] = {4, 4, 3};
#else
constexpr int kColumns[] = {2, 2};
#endif
constexpr int kMaxRows = std::size(kColumns);

// The sums of a tile's accumulators, at their positions, go to MR rows of out. The dense tile does the same in its own
// body: where it shares this function, GCC makes it a tenth slower.
template <int MR, int NR>
inline __attribute__((always_inline)) void finish_tile(
    const Vec* acc, bool first, const float* bias, float* out, int64_t out_stride) {
  alignas(64) float sums[(MR * NR + 7) / 8 * 8];
  horizontal_sums<MR * NR>(acc, sums);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const auto columns = [&]<int COUNT>(std::integral_constant<int, COUNT>, int n) __attribute__((always_inline)) {
      finish<COUNT>(sums + position<MR, NR>(m, n), first, bias ? bias + n : nullptr, out + m * out_stride + n);
    };
    if constexpr (NR >= 4) columns(std::integral_constant<int, 4>{}, 0);
    if constexpr (NR >= 8) columns(std::integral_constant<int, 4>{}, 4);
    if constexpr (NR % 4 >= 2) columns(std::integral_constant<int, 2>{}, NR / 4 * 4);
    if constexpr (NR % 2 == 1) columns(std::integral_constant<int, 1>{}, NR - 1);
  }
}

// MR rows of x times kColumns[MR - 1] of the weight from n, over columns k to end.
template <class Values, int MR>
void register_tile(
    const Quantized& w, int64_t expert, int64_t n, int64_t k, int64_t end, const float* x, int64_t x_row,
    const float* bias, float* out, int64_t out_row) {
  constexpr int NR = kColumns[MR - 1];
  BlockConstants constants;
  constants.load(w, expert, n, NR, k, end);
  const auto* row = w.row<typename Values::Data>(expert, n);
  Vec acc[MR * NR];
  unrolled<MR * NR>([&](auto i) ALWAYS_INLINE { acc[i] = Vec(0.f); });
  const auto step = [&](int64_t at, const auto& values) ALWAYS_INLINE {
    const auto add = [&](auto m, auto n, const Vec& a, const Vec& v) ALWAYS_INLINE {
      constexpr int i = position<MR, NR>(m, n);
      acc[i] = at::vec::fmadd(a, v, acc[i]);
    };
    if constexpr (MR > NR) {
      Vec v[NR];
      unrolled<NR>([&](auto n) ALWAYS_INLINE { v[n] = values(n); });
      unrolled<MR>([&](auto m) ALWAYS_INLINE {
        const Vec a = once(Vec::loadu(x + m * x_row + at));
        unrolled<NR>([&](auto n) ALWAYS_INLINE { add(m, n, a, v[n]); });
      });
    } else {
      Vec a[MR];
      unrolled<MR>([&](auto m) ALWAYS_INLINE { a[m] = Vec::loadu(x + m * x_row + at); });
      unrolled<NR>([&](auto n) ALWAYS_INLINE {
        const Vec v = values(n);
        unrolled<MR>([&](auto m) ALWAYS_INLINE { add(m, n, a[m], v); });
      });
    }
  };
  const bool first = k == 0;
  for (int64_t block = 0; k < end; ++block) {
    const int64_t stop = std::min(end, (k / w.block_columns + 1) * w.block_columns);
    Values::template each<NR>(row, w.data_row, k, stop, constants.scales[block], constants.zeros[block], step);
    k = stop;
  }
  finish_tile<MR, NR>(acc, first, bias, out, out_row);
}

// register_tile of MR = 1, 2, ...
template <class Values, int... I>
constexpr auto register_tiles(std::integer_sequence<int, I...>) {
  return std::array{&register_tile<Values, I + 1>...};
}
template <class Values>
constexpr auto kRegisterTiles = register_tiles<Values>(std::make_integer_sequence<int, kMaxRows>{});

// All rows of x, at most kMaxRows, times rows n0 to n1 of the weight, at least kColumns of them. K is a multiple of
// kStep.
template <class Values>
void in_registers(const Quantized& w, const Problem& p, int64_t expert, int64_t n0, int64_t n1) {
  const int64_t block_k = hf_paged::block_k(w.K);
  const int64_t nr = kColumns[p.M - 1];
  for (int64_t begin = n0; begin < n1; begin += nr) {
    const int64_t n = std::min(begin, n1 - nr);  // some of the last are computed twice
    for (int64_t k = 0; k < w.K; k += block_k) {
      const int64_t end = std::min(w.K, k + block_k);
      const float* bias = end == w.K && p.bias ? p.bias + n : nullptr;
      kRegisterTiles<Values>[p.M - 1](w, expert, n, k, end, p.x, p.x_row, bias, p.out + n, p.out_row);
    }
  }
}

// Columns k to end of NR rows from n, as floats; out has kLanes more of each.
template <class Values, int NR>
void decode(const Quantized& w, int64_t expert, int64_t n, int64_t k, int64_t end, float* out, int64_t out_row) {
  constexpr bool kBytes = sizeof(typename Values::Data) == 1;
  BlockConstants constants;
  constants.load(w, expert, n, NR, k, end);
  const auto* row = w.row<typename Values::Data>(expert, n);
  const int64_t rest = kBytes ? end % kLanes : 0;
  int64_t block = 0;
  for (int64_t from = k, to; from < end; from = to, ++block) {
    to = std::min(end, (from / w.block_columns + 1) * w.block_columns);
    const int64_t stop = to == end ? end - rest : to;
    Values::template each<NR>(
        row, w.data_row, from, stop, constants.scales[block], constants.zeros[block],
        [&](int64_t at, const auto& values) ALWAYS_INLINE {
          unrolled<NR>([&](auto n) ALWAYS_INLINE { values(n).store(out + n * out_row + at - k); });
        });
  }
  if (kBytes && rest) {  // nothing past a row's end is read
    for (int n = 0; n < NR; ++n) {
      typename Values::Data bytes[kLanes] = {};
      std::memcpy(bytes, row + n * w.data_row + end - rest, rest);
      Values::template each<1>(
          bytes, 0, 0, kLanes, constants.scales[block - 1] + n, constants.zeros[block - 1] + n,
          [&](int64_t, const auto& values) ALWAYS_INLINE {
            values(std::integral_constant<int, 0>{}).store(out + n * out_row + end - rest - k);
          });
    }
  }
}

// Rows m0 to m1 of x times rows n0 to n1 of the weight.
template <class Values>
void through_cache(
    const Quantized& w, const Problem& p, int64_t expert, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  constexpr int64_t kRow = kBlockK + kStep;
  alignas(64) float panel[kTileN * kRow];
  const int64_t block_k = hf_paged::block_k(w.K);
  for (int64_t n = n0; n < n1; n += kTileN) {
    const int64_t nr = std::min<int64_t>(kTileN, n1 - n);
    for (int64_t k = 0; k < w.K; k += block_k) {
      const int64_t end = std::min(w.K, k + block_k);
      if (nr == kTileN)
        decode<Values, kTileN>(w, expert, n, k, end, panel, kRow);
      else
        for (int64_t r = 0; r < nr; ++r) decode<Values, 1>(w, expert, n + r, k, end, panel + r * kRow, kRow);
      const float* bias = end == w.K && p.bias ? p.bias + n : nullptr;
      for (int64_t m = m0; m < m1; m += kTileM) {
        const int64_t mr = std::min<int64_t>(kTileM, m1 - m);
        kTiles[(mr - 1) * kTileN + nr - 1](
            p.x + m * p.x_row + k, p.x_row, panel, kRow, end - k, nullptr, k == 0, bias, p.out + m * p.out_row + n,
            p.out_row);
      }
    }
  }
}

}  // namespace

// x [M, K] is multiplied by the weights of `num_groups` experts, each by its own rows: expert groups[2 i] by rows
// groups[2 i + 1] to groups[2 i + 3]. bias is null or has N values for each expert. out is [M, N].
HF_PAGED_EXPORT void hf_paged_quantized_linear(
    const Quantized* weight, const float* x, int64_t x_row, const float* bias, float* out, int64_t out_row,
    const int64_t* groups, int64_t num_groups) {
  const Quantized& w = *weight;
  constexpr int64_t kUnit = 8;  // rows of the weight that stay with one thread
  const int64_t units = (w.N + kUnit - 1) / kUnit;
  with_kind(w.kind, [&]<class Values>(Values) {
    at::parallel_for(0, num_groups * units, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // the units of one expert after those of another
        const int64_t group = begin / units, stop = std::min(end, (group + 1) * units);
        const int64_t expert = groups[2 * group], row = groups[2 * group + 1], M = groups[2 * group + 3] - row;
        const Problem p{x + row * x_row, bias ? bias + expert * w.N : nullptr, out + row * out_row, M, x_row, out_row};
        const int64_t n0 = begin % units * kUnit, n1 = std::min(w.N, (stop - group * units) * kUnit);
        if (M <= kMaxRows && w.K % kStep == 0 && n1 - n0 >= kColumns[0]) {
          in_registers<Values>(w, p, expert, n0, n1);
        } else {
          const int64_t block_m = hf_paged::block_m(M, w.K);
          for (int64_t m = 0; m < M; m += block_m)
            through_cache<Values>(w, p, expert, m, std::min(M, m + block_m), n0, n1);
        }
        begin = stop;
      }
    });
  });
}
