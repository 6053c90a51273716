// Linear layers on quantized weights: out[m, n] = sum_k x[m, k] * scale * (q[n, k] - zero) + bias[n].
//
// A few rows of the weight are turned into floats in L1, one block of k at a time, and multiplied by the tile of the
// dense layer while they lie there. So the result is, bit for bit, what the dense layer gives on the dequantized weight.

#include "linear_tiles.h"
#include "quantized_values.h"

namespace {

using namespace hf_paged;

constexpr int64_t kMaxBlocks = kBlockK / kStep + 2;  // blocks of columns that meet a block of k

struct Problem {
  const float* x;
  const float* bias;
  float* out;
  int64_t M, x_row, out_row;
};

// The scales and zeros of a few rows of the weight in some blocks of columns: [block of columns][row].
struct Constants {
  float scales[kMaxBlocks][kStep], zeros[kMaxBlocks][kStep];

  void load(const Quantized& w, int64_t expert, int64_t n, int64_t rows, int64_t first, int64_t last) {
    switch (w.scale_dtype) {
      case kFloat32: load_scales(static_cast<const float*>(w.scales), w, expert, n, rows, first, last); break;
      case kBFloat16: load_scales(static_cast<const c10::BFloat16*>(w.scales), w, expert, n, rows, first, last); break;
      case kFloat16: load_scales(static_cast<const c10::Half*>(w.scales), w, expert, n, rows, first, last); break;
    }
    for (int64_t b = first; b <= last; ++b) {
      if (w.zeros)
        load_rows(w.zeros + expert * w.zeros_expert + b * w.zeros_block, n, rows, w.block_rows, zeros[b - first]);
      else
        std::fill_n(zeros[b - first], rows, static_cast<float>(w.zero));
    }
  }

 private:
  template <class T>
  void load_scales(
      const T* p, const Quantized& w, int64_t expert, int64_t n, int64_t rows, int64_t first, int64_t last) {
    for (int64_t b = first; b <= last; ++b)
      load_rows(p + expert * w.scales_expert + b * w.scales_block, n, rows, w.block_rows, scales[b - first]);
  }
};

// Columns k to end of `rows` rows from n, as floats; k is a multiple of kStep, out has `stride` >= end - k rounded up to one.
template <class Values>
void decode_rows(
    const Quantized& w, int64_t expert, int64_t n, int64_t rows, int64_t k, int64_t end, float* out, int64_t stride) {
  using Data = typename Values::Data;
  const int64_t first = k / w.block_columns, last = (end - 1) / w.block_columns;
  Constants constants;
  constants.load(w, expert, n, rows, first, last);
  const Data* row = static_cast<const Data*>(w.data) + expert * w.data_expert + n * w.data_row;
  for (int64_t r = 0; r < rows; ++r, row += w.data_row)
    for (int64_t b = first; b <= last; ++b) {
      const int64_t from = std::max(k, b * w.block_columns), to = std::min(end, (b + 1) * w.block_columns);
      Values::decode(row, from, to, constants.scales[b - first][r], constants.zeros[b - first][r],
                     out + r * stride + from - k);
    }
}

// Rows m0 to m1 of x times rows n0 to n1 of the weight.
template <class Values>
void block(const Quantized& w, const Problem& p, int64_t expert, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  constexpr int64_t kStride = kBlockK + kStep;
  alignas(64) float panel[kTileN * kStride];
  const int64_t block_k = hf_paged::block_k(w.K);
  for (int64_t n = n0; n < n1; n += kTileN) {
    const int64_t nr = std::min<int64_t>(kTileN, n1 - n);
    for (int64_t k = 0; k < w.K; k += block_k) {
      const int64_t end = std::min(w.K, k + block_k), start = k / kStep * kStep;
      decode_rows<Values>(w, expert, n, nr, start, end, panel, kStride);
      const float* bias = end == w.K && p.bias ? p.bias + n : nullptr;
      for (int64_t m = m0; m < m1; m += kTileM) {
        const int64_t mr = std::min<int64_t>(kTileM, m1 - m);
        kTiles[(mr - 1) * kTileN + nr - 1](
            p.x + m * p.x_row + k, p.x_row, panel + k - start, kStride, end - k, nullptr, k == 0, bias,
            p.out + m * p.out_row + n, p.out_row);
      }
    }
  }
}

}  // namespace

// x [M, K] is multiplied by the weights of `groups` experts, each by its own rows: expert groups[2 i] by rows groups[2 i + 1]
// to groups[2 i + 3]. bias is null or has N values for each expert. out is [M, N].
HF_PAGED_EXPORT void hf_paged_quantized_linear(
    const Quantized* weight, const float* x, int64_t x_row, const float* bias, float* out, int64_t out_row,
    const int64_t* groups, int64_t num_groups) {
  const Quantized& w = *weight;
  const int64_t tiles_n = (w.N + kTileN - 1) / kTileN;
  with_kind(w.kind, [&]<class Values>(Values) {
    at::parallel_for(0, num_groups * tiles_n, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // the tiles of one expert after those of another
        const int64_t group = begin / tiles_n, stop = std::min(end, (group + 1) * tiles_n);
        const int64_t expert = groups[2 * group], row = groups[2 * group + 1], M = groups[2 * group + 3] - row;
        const Problem p{x + row * x_row, bias ? bias + expert * w.N : nullptr, out + row * out_row, M, x_row, out_row};
        const int64_t block_m = hf_paged::block_m(M, w.K);
        for (int64_t m = 0; m < M; m += block_m)
          block<Values>(w, p, expert, m, std::min(M, m + block_m), begin % tiles_n * kTileN,
                        std::min(w.N, (stop - group * tiles_n) * kTileN));
        begin = stop;
      }
    });
  });
}
