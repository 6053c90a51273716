// Inner loops of attention_kernel.h: products of a few rows with a split's keys and values, and a row's softmax. Each has
// one order of operations per row, whatever the number of rows (attention_kernel.h says why).
#pragma once

#include "quantized_cache.h"

#include <cmath>
#include <limits>

namespace hf_paged {
namespace {

constexpr int64_t kChunk = 16;                     // keys addressed together; block sizes are multiples of it
constexpr int64_t kSplit = 256;                    // keys of one partial softmax
constexpr int64_t kChunks = kSplit / kChunk;
constexpr int64_t kScoreStride = kSplit + kChunk;  // of a row's scores: no power of two, which would share L1 sets
constexpr int kRows = 6;                           // most rows of a register tile
constexpr int kVecs = kLanes == 8 ? 2 : 4;         // its vectors: 6 x 4 of 32 registers, or 6 x 2 of 16
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// ---- register tiles ----------------------------------------------------------------------------------------------

// scores[r][i] = q[r] . keys[i] for M rows and N vectors of keys, each vector at its own address.
template <int M, int N, class T>
inline void score_tile(const float* q, int64_t q_stride, const T* const* keys, int64_t dim_stride, int64_t dims,
                       float* scores) {
  Vec sum[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = Vec(0.0f);
  const T* k[N];
  for (int n = 0; n < N; ++n) k[n] = keys[n];
  for (int64_t d = 0; d < dims; ++d) {
    Vec key[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      key[n] = load(k[n]);
      k[n] += dim_stride;
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const Vec qd(q[r * q_stride + d]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = fma(qd, key[n], sum[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n].store(scores + r * kScoreStride + n * kLanes);
}

// acc[r][:] += sum over tokens [begin, end) of weights[r][t] * v[t][:], for M rows and N vectors of dims; `count` is
// the number of lanes of the vector when N is 1. chunks[c] holds the tokens from 16 c on; a missing one is skipped.
template <int M, int N, bool Tail, class T>
inline void value_tile(const float* weights, const T* const* chunks, int64_t dim, int64_t dims, int64_t begin,
                       int64_t end, float* acc, int64_t acc_stride, int64_t count) {
  Vec sum[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = load(acc + r * acc_stride + n * kLanes);
  for (int64_t t = begin; t < end;) {
    const int64_t chunk = t / kChunk;
    const int64_t stop = std::min(end, (chunk + 1) * kChunk);
    if (!chunks[chunk]) {
      t = stop;
      continue;
    }
    const T* v = chunks[chunk] + (t % kChunk) * dims + dim;
    for (; t < stop; ++t, v += dims) {
      Vec value[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) value[n] = Tail ? load(v, count) : load(v + n * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        const Vec w(weights[r * kScoreStride + t]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[r][n] = fma(w, value[n], sum[r][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n].store(acc + r * acc_stride + n * kLanes);
}

// All chunks [begin, end) of a split: kVecs vectors at a time while they last, then chunk by chunk.
template <int M, class T>
void score_rows(const float* q, int64_t q_stride, const T* const* chunks, int64_t begin, int64_t end,
                int64_t dim_stride, int64_t dims, float* scores) {
  constexpr int kPerChunk = kChunk / kLanes;                         // vectors of a chunk
  constexpr int kStep = kVecs > kPerChunk ? kVecs / kPerChunk : 1;   // chunks of a register tile
  constexpr int kSmall = kPerChunk < kVecs ? kPerChunk : kVecs;
  const T* keys[kVecs];
  int64_t c = begin;
  for (; c + kStep <= end; c += kStep) {
    bool all = true;
    for (int i = 0; i < kStep; ++i) all &= chunks[c + i] != nullptr;
    if (!all) break;
    for (int n = 0; n < kVecs; ++n) keys[n] = chunks[c + n / kPerChunk] + n % kPerChunk * kLanes;
    score_tile<M, kVecs>(q, q_stride, keys, dim_stride, dims, scores + c * kChunk);
  }
  for (; c < end; ++c) {
    if (!chunks[c]) continue;
    for (int n = 0; n < kSmall; ++n) keys[n] = chunks[c] + n * kLanes;
    score_tile<M, kSmall>(q, q_stride, keys, dim_stride, dims, scores + c * kChunk);
  }
}

template <int M, class T>
void value_rows(const float* weights, const T* const* chunks, int64_t dims, int64_t begin, int64_t end, float* acc,
                int64_t acc_stride) {
  int64_t d = 0;
  for (; d + kVecs * kLanes <= dims; d += kVecs * kLanes)
    value_tile<M, kVecs, false>(weights, chunks, d, dims, begin, end, acc + d, acc_stride, 0);
  for (; d + kLanes <= dims; d += kLanes)
    value_tile<M, 1, false>(weights, chunks, d, dims, begin, end, acc + d, acc_stride, 0);
  if (d < dims) value_tile<M, 1, true>(weights, chunks, d, dims, begin, end, acc + d, acc_stride, dims - d);
}

// ---- softmax -----------------------------------------------------------------------------------------------------

struct Range {
  int64_t begin, end;
};

struct RowRule {  // what turns a dot product into a score
  float scale, softcap, slope;
  int64_t position;  // of the row, relative to the split's first key
};

inline Vec finish_score(Vec s, const RowRule& rule, int64_t first_key) {
  s = s * Vec(rule.scale);
  if (rule.softcap != 0.0f) s = Vec(rule.softcap) * (s / Vec(rule.softcap)).tanh();
  if (rule.slope != 0.0f)
    s = fma(Vec(rule.slope), Vec::arange(static_cast<float>(first_key - rule.position), 1.0f), s);
  return s;
}

// Turns the scores of chunks [chunks.begin, chunks.end) into weights exp(s - m); returns m, and l in *sum. Keys
// outside `visible` and of missing chunks get weight 0. m is -inf if nothing is visible. With scales of keys and values
// the scores are multiplied by the ones first, and the weights by the others in the end.
template <bool Scaled, class T>
float softmax_row(float* scores, const T* const* blocks, Range chunks, Range visible, const RowRule& rule,
                  const float* k_scales, const float* v_scales, float* sum) {
  const int64_t begin = chunks.begin * kChunk, end = chunks.end * kChunk;
  Vec highest(kMinusInf);
  for (int64_t j = begin; j < end; j += kLanes) {
    Vec s;
    if (!blocks[j / kChunk] || j >= visible.end || j + kLanes <= visible.begin) {
      s = Vec(kMinusInf);
    } else {
      s = load(scores + j);
      if constexpr (Scaled) s = s * load(k_scales + j);
      s = finish_score(s, rule, j);
      if (j < visible.begin || j + kLanes > visible.end) {
        alignas(64) float lanes[kLanes];
        s.store(lanes);
        for (int i = 0; i < kLanes; ++i)
          if (j + i < visible.begin || j + i >= visible.end) lanes[i] = kMinusInf;
        s = Vec::loadu(lanes);
      }
    }
    s.store(scores + j);
    highest = at::vec::maximum(highest, s);
  }
  const float m = max_lanes(highest);
  Vec total(0.0f);
  if (m == kMinusInf) {
    for (int64_t j = begin; j < end; j += kLanes) total.store(scores + j);
    *sum = 0.0f;
    return m;
  }
  for (int64_t j = begin; j < end; j += kLanes) {
    const Vec w = exp(load(scores + j) - Vec(m));
    if constexpr (Scaled) (w * load(v_scales + j)).store(scores + j);
    else w.store(scores + j);
    total = total + w;
  }
  *sum = sum_lanes(total);
  return m;
}

}  // namespace
}  // namespace hf_paged
