// Low-rank terms of several adapters in one batch, in fp32:
//
//   y[row] = scale * y[row] + shift + (x[row] A^T) B
//
// Rows of one adapter are multiplied together, a tile of up to 16 at a time. x A^T is summed by the tile of the linear
// layers (linear_tiles.h), the product with B is one chain of fma over ascending rank: a row's bits depend on that row
// and its adapter only.

#include <memory>

#include "linear_tiles.h"

namespace {

using namespace hf_paged;

constexpr int64_t kMaxRows = 16;  // of a tile
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 6, kVectors = 4;  // accumulators of the second product, as in head_linear.cpp
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int64_t kColumns = kVectors * kLanes;
constexpr int64_t kUnitColumns = 1024;  // of one unit of work, a multiple of kColumns

struct Entry {
  const float *A, *B;
  int64_t rank;
  const float *scale, *shift;
};

struct Problem {
  const float* x;
  float* y;
  const Entry* table;
  const int32_t* order;
  const int32_t* tiles;
  const int64_t* columns;
  float* h;  // [tiles, parts, kMaxRows, max_rank]
  int64_t x_stride, y_stride, parts, max_rank, K;

  const Entry& entry(int64_t tile, int64_t part) const { return table[tiles[3 * tile] * parts + part]; }
  const int32_t* rows(int64_t tile) const { return order + tiles[3 * tile + 1]; }
  int64_t count(int64_t tile) const { return tiles[3 * tile + 2]; }
  float* hidden(int64_t tile, int64_t part) const { return h + (tile * parts + part) * kMaxRows * max_rank; }
};

// h = x A^T of a tile's rows.
void shrink(const Problem& p, int64_t tile, int64_t part) {
  const Entry& entry = p.entry(tile, part);
  if (!entry.A) return;
  const int32_t* rows = p.rows(tile);
  const int64_t count = p.count(tile), block = block_k(p.K);
  float* h = p.hidden(tile, part);
  for (int64_t m = 0; m < count; m += kTileM) {
    // A tile wants rows at equal distances. Others go by themselves: a row's sum is the same.
    const int64_t some = std::min<int64_t>(kTileM, count - m);
    int64_t together = some;
    for (int64_t i = 2; i < some; ++i)
      if (rows[m + i] - rows[m + i - 1] != rows[m + 1] - rows[m]) together = 1;
    const int64_t distance = together > 1 ? (rows[m + 1] - rows[m]) * p.x_stride : 0;
    for (int64_t first = m; first < m + some; first += together)
      for (int64_t n = 0; n < entry.rank; n += kTileN) {
        const int64_t width = std::min<int64_t>(kTileN, entry.rank - n);
        const TileFunction run = kTiles[(together - 1) * kTileN + width - 1];
        for (int64_t k = 0; k < p.K; k += block)
          run(p.x + rows[first] * p.x_stride + k, distance, entry.A + n * p.K + k, p.K, std::min(block, p.K - k),
              nullptr, k == 0, nullptr, h + first * p.max_rank + n, p.max_rank);
      }
  }
}

// Rows `first` to `first` + MR of a tile, `width` columns from `n`, kColumns unless Tail.
template <int MR, bool Tail>
void expand_block(
    const Problem& p, const Entry& entry, const float* h, const int32_t* rows, float* y, int64_t N, int64_t n,
    int64_t width) {
  const auto load = [&](const float* from, int v) __attribute__((always_inline)) {
    if (!Tail) return Vec::loadu(from + v * kLanes);
    const int64_t count = std::clamp<int64_t>(width - v * kLanes, 0, kLanes);
    return count ? Vec::loadu(from + v * kLanes, count) : Vec(0.f);
  };
  Vec acc[MR][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[m][v] = Vec(0.f);
  const float* b = entry.B + n;
  for (int64_t j = 0; j < entry.rank; ++j, b += N) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b, v);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec value(h[m * p.max_rank + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[m][v] = at::vec::fmadd(value, row[v], acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = y + rows[m] * p.y_stride + n;
      Vec own = load(to, v);
      if (entry.scale) own = own * load(entry.scale + n, v);
      if (entry.shift) own = own + load(entry.shift + n, v);
      const Vec value = own + acc[m][v];
      if (!Tail) value.store(to + v * kLanes);
      else if (width > v * kLanes) value.store(to + v * kLanes, std::min<int64_t>(kLanes, width - v * kLanes));
    }
}

using BlockFunction = void (*)(
    const Problem&, const Entry&, const float*, const int32_t*, float*, int64_t, int64_t, int64_t);
template <bool Tail, int... I>
constexpr auto blocks(std::integer_sequence<int, I...>) {
  return std::array<BlockFunction, sizeof...(I)>{&expand_block<I + 1, Tail>...};
}
constexpr auto kWhole = blocks<false>(std::make_integer_sequence<int, kRows>{});
constexpr auto kTail = blocks<true>(std::make_integer_sequence<int, kRows>{});

// Columns `begin` to `end` of one layer's outputs, for a tile's rows.
void expand(const Problem& p, int64_t tile, int64_t part, int64_t begin, int64_t end) {
  const Entry& entry = p.entry(tile, part);
  if (!entry.rank && !entry.scale && !entry.shift) return;
  const int64_t N = p.columns[part + 1] - p.columns[part], count = p.count(tile);
  const float* h = p.hidden(tile, part);
  float* y = p.y + p.columns[part];
  for (int64_t n = begin; n < std::min(end, N); n += kColumns) {
    const int64_t width = std::min(kColumns, N - n);
    const auto& functions = width == kColumns ? kWhole : kTail;
    for (int64_t m = 0; m < count; m += kRows)
      functions[std::min<int64_t>(kRows, count - m) - 1](
          p, entry, h + m * p.max_rank, p.rows(tile) + m, y, N, n, width);
  }
}

}  // namespace

// table [slots, parts] of Entry; order and tiles as in lora.py; columns [parts + 1]. Where x is null, h [tiles, parts, 16,
// max_rank] holds the first product; else it is null. Strides of rows in elements.
HF_PAGED_EXPORT void hfp_lora_f32(
    const float* x, int64_t x_stride, float* y, int64_t y_stride, const void* table, const int32_t* order,
    const int32_t* tiles, int64_t num_tiles, const int64_t* columns, int64_t parts, float* h, int64_t max_rank,
    int64_t K) {
  const std::unique_ptr<float[]> scratch(x ? new float[num_tiles * parts * kMaxRows * max_rank] : nullptr);
  const Problem p{x, y, static_cast<const Entry*>(table), order, tiles, columns, x ? scratch.get() : h, x_stride,
                  y_stride, parts, max_rank, K};
  const int64_t pairs = num_tiles * parts;
  if (pairs >= at::get_num_threads()) {  // nobody has to wait for anybody's first product
    at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (x) shrink(p, i / parts, i % parts);
        expand(p, i / parts, i % parts, 0, columns[i % parts + 1] - columns[i % parts]);
      }
    });
    return;
  }
  if (x)
    at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) shrink(p, i / parts, i % parts);
    });
  int64_t widest = 0;
  for (int64_t part = 0; part < parts; ++part) widest = std::max(widest, columns[part + 1] - columns[part]);
  const int64_t units = (widest + kUnitColumns - 1) / kUnitColumns;
  at::parallel_for(0, pairs * units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % units * kUnitColumns;
      expand(p, i / units / parts, i / units % parts, first, first + kUnitColumns);
    }
  });
}
