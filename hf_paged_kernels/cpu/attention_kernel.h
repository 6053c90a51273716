// Attention over a paged KV cache: prompt chunks and decodes of a ragged batch in one call.
//
//   s[j] = scale * q.k[j];  s = cap * tanh(s / cap);  s[j] += slope * (j - p);  low(p) <= j <= p, or j < end(row)
//   out  = sum_j exp(s[j]) v[j] / (sum_j exp(s[j]) + exp(sink))
//
// k_cache [block, kv head, dim, block_size], v_cache [block, kv head, block_size, dim]: a vector holds the scores of
// consecutive keys, and later consecutive dims of the output, so neither product needs a horizontal sum.
//
// Keys are taken in splits of kSplit absolute positions. In a split, every row of a tile (attention_plan.h) gets its
// maximum m, its sum l and its weighted values, and the splits are merged in ascending order. Small batches spread a
// tile's splits over threads and merge at the end.
//
// Of a quantized cache the scores are multiplied by the keys' scales, and the weights by the values'. Tiles of many rows
// widen a split's numbers to float32 once, which is exact.
//
// The bits of a row depend on that row and its keys only, because every one of these steps has one order: a score is
// a chain of fma over ascending dims; lane i of l takes keys i, i + lanes, ...; a weighted value is a chain of fma
// over ascending keys; a masked key adds exact zeros; splits start at multiples of kSplit. Tile shapes, threads and
// block ids change none of it.

#pragma once

#include "attention_plan.h"

#include <atomic>

namespace hf_paged {
namespace {

constexpr int64_t kWidenRows = 2 * kRows;  // more rows than these widen a quantized split first
constexpr int64_t kNarrowRows = 4;         // of a register tile that widens as it reads
constexpr double kSmallWork = 1 << 18;     // multiply-adds (some 5 us) not worth waking other threads for

// ---- a tile ------------------------------------------------------------------------------------------------------

struct Rows {  // of a tile, each for all query heads of its head: their places in the batch and in their sequences
  int64_t token[kTileRows], position[kTileRows];
  Rows(const Span* span, int64_t num_spans) {
    for (int64_t i = 0, n = 0; i < num_spans; ++i, ++span)
      for (int64_t t = 0; t < span->num_tokens; ++t, ++n)
        token[n] = span->first_token + t, position[n] = span->position + t;
  }
};

// One split of a sequence as one KV head keeps it, by chunks of 16 keys; null where there are none.
template <class E>
struct Pages {
  const E *k[kChunks] = {}, *v[kChunks] = {};
  int64_t dim_stride = 0;                              // of k
  const float *k_scales = nullptr, *v_scales = nullptr;  // [kSplit] of a quantized cache
};

// What rows have accumulated: values [rows][stride], then m [rows], then l [rows].
struct State {
  float *values, *m, *l;
  State(float* p, int64_t rows, int64_t stride) : values(p), m(p + rows * stride), l(p + rows * stride + rows) {}
};

template <class T>
class Kernel : public Plan {
 public:
  using Plan::Plan;
  void run();

 private:
  void load_queries(const Tile& tile, const Rows& rows, float* q) const;
  int64_t wide_floats() const { return kIsQuantized<T> ? kSplit * (a.k_dim + a.v_dim + 2) : 0; }
  void run_split(const Tile& tile, const Rows& rows, int64_t split, const float* q, float* scores, float* wide,
                 const State& result) const;
  Pages<T> pages_of(int64_t seq, int64_t head, int64_t split, Range keys, float* scales) const;
  Pages<float> widen(const Pages<T>& pages, float* to) const;
  template <class E>
  void attend_split(const Rows& rows, int64_t head, int64_t split, Range tokens, const Pages<E>& pages, const float* q,
                    float* scores, const State& result) const;
  template <int M, class E>
  void run_rows(const Rows& rows, int64_t head, int64_t split, int64_t row, const Pages<E>& pages, const float* q,
                float* scores, const State& result) const;
  void merge(const State& part, const State& total, int64_t rows, bool first) const;
  void finish(const Tile& tile, const Rows& rows, const State& total) const;
  void run_item(const Item& item, float* scratch) const;
  void merge_partials(const Tile& tile, float* scratch) const;
  void store_new(int64_t thread, int64_t num_threads) const;
};

template <class Q>
inline void convert_row(const Q* from, float* to, int64_t dims) {
  for (int64_t d = 0; d < dims; d += kLanes) load(from + d, std::min<int64_t>(kLanes, dims - d)).store(to + d);
}

// q[row] for row = token * group + head of the group, as float32.
template <class T>
void Kernel<T>::load_queries(const Tile& tile, const Rows& rows, float* q) const {
  for (int64_t i = 0; i < tile.num_tokens; ++i)
    for (int64_t g = 0; g < group; ++g, q += q_stride) {
      const int64_t at = rows.token[i] * a.query_stride[0] + (tile.head * group + g) * a.query_stride[1];
      if (a.query_dtype == kFloat32) convert_row(static_cast<const float*>(a.query) + at, q, a.k_dim);
      else if (a.query_dtype == kBFloat16) convert_row(static_cast<const c10::BFloat16*>(a.query) + at, q, a.k_dim);
      else convert_row(static_cast<const c10::Half*>(a.query) + at, q, a.k_dim);
    }
}

// Rows [row, row + M) of a tile against one split.
template <class T>
template <int M, class E>
void Kernel<T>::run_rows(const Rows& rows, int64_t kv_head, int64_t split, int64_t row, const Pages<E>& pages,
                         const float* q, float* scores, const State& result) const {
  const int64_t base = split * kSplit;
  Range keys{kSplit, 0};  // that any of them sees
  for (int64_t t = row / group; t <= (row + M - 1) / group; ++t) {
    keys.begin = std::min(keys.begin, std::max<int64_t>(lowest_key(rows.position[t]) - base, 0));
    keys.end = std::max(keys.end, std::min(end_key(rows.token[t], rows.position[t]) - base, kSplit));
  }
  float* values = result.values + row * v_stride;
  if (keys.begin >= keys.end) {
    for (int r = 0; r < M; ++r) result.m[row + r] = kMinusInf;
    return;
  }
  const Range chunks{keys.begin / kChunk, (keys.end + kChunk - 1) / kChunk};
  score_rows<M>(q + row * q_stride, q_stride, pages.k, chunks.begin, chunks.end, pages.dim_stride, a.k_dim, scores);
  for (int r = 0; r < M; ++r) {
    const int64_t t = (row + r) / group, position = rows.position[t], head = kv_head * group + (row + r) % group;
    const Range visible{lowest_key(position) - base, end_key(rows.token[t], position) - base};
    const RowRule rule{static_cast<float>(a.scale), static_cast<float>(a.softcap),
                       a.alibi_slopes ? a.alibi_slopes[head] : 0.0f, position - base};
    result.m[row + r] = softmax_row<kIsQuantized<T>>(scores + r * kScoreStride, pages.k, chunks, visible, rule,
                                                     pages.k_scales, pages.v_scales, &result.l[row + r]);
  }
  std::memset(values, 0, M * v_stride * sizeof(float));
  value_rows<M>(scores, pages.v, a.v_dim, keys.begin, keys.end, values, v_stride);
}

template <class T>
template <class E>
void Kernel<T>::attend_split(const Rows& rows, int64_t head, int64_t split, Range tokens, const Pages<E>& pages,
                             const float* q, float* scores, const State& result) const {
  const int64_t first = tokens.begin * group, num_rows = tokens.end * group - first;
  const int64_t most = kIsQuantized<E> ? kNarrowRows : kRows, count = (num_rows + most - 1) / most;
  for (int64_t i = 0; i < count; ++i) {  // register tiles of nearly equal height
    const int64_t row = first + num_rows * i / count;
    switch (first + num_rows * (i + 1) / count - row) {
      case 1: run_rows<1>(rows, head, split, row, pages, q, scores, result); break;
      case 2: run_rows<2>(rows, head, split, row, pages, q, scores, result); break;
      case 3: run_rows<3>(rows, head, split, row, pages, q, scores, result); break;
      case 4: run_rows<4>(rows, head, split, row, pages, q, scores, result); break;
      case 5: run_rows<5>(rows, head, split, row, pages, q, scores, result); break;
      default: run_rows<6>(rows, head, split, row, pages, q, scores, result);
    }
  }
}

// What a number was multiplied by; NaN of a row that held a NaN or an infinity, whatever its numbers became.
inline void load_scales(const float* from, float unit, float* to) {
  for (int64_t i = 0; i < kChunk; ++i) to[i] = from[i] * unit + from[i] * 0.0f;
}

// The chunks of a split that hold any of `keys`, which are positions in the sequence.
template <class T>
Pages<T> Kernel<T>::pages_of(int64_t seq, int64_t head, int64_t split, Range keys, float* scales) const {
  Pages<T> pages;
  pages.dim_stride = a.block_size;
  pages.k_scales = scales, pages.v_scales = scales + kSplit;
  const int64_t base = split * kSplit, end = std::min(base + kSplit, keys.end);
  for (int64_t key = std::max(base, keys.begin) / kChunk * kChunk; key < end; key += kChunk) {
    const int64_t block = a.block_table[seq * a.table_width + key / a.block_size];
    if (block < 0) continue;
    const int64_t c = (key - base) / kChunk, offset = key % a.block_size;
    pages.k[c] = static_cast<const T*>(a.k_cache) + block * a.k_cache_stride[0] + head * a.k_cache_stride[1] + offset;
    pages.v[c] = static_cast<const T*>(a.v_cache) + block * a.v_cache_stride[0] + head * a.v_cache_stride[1] +
                 offset * a.v_dim;
    if constexpr (kIsQuantized<T>) {
      const int64_t at = block * a.scale_stride[0] + head * a.scale_stride[1] + offset;
      load_scales(a.k_scale + at, Rounding<T>::kUnit, scales + c * kChunk);
      load_scales(a.v_scale + at, Rounding<T>::kUnit, scales + kSplit + c * kChunk);
    }
  }
  return pages;
}

template <class T>
void Kernel<T>::run_split(const Tile& tile, const Rows& rows, int64_t split, const float* q, float* scores, float* wide,
                          const State& result) const {
  const Span* span = &spans[tile.first_span];
  const bool shared = split < tile.shared_end;
  for (int64_t token = 0; token < tile.num_tokens; ++span) {
    const Range tokens{token, shared ? tile.num_tokens : token + span->num_tokens};
    const Range keys{shared ? tile.lowest : lowest_key(span->position), span->end};
    const Pages<T> pages = pages_of(span->seq, tile.head, split, keys, wide);
    if (kIsQuantized<T> && (tokens.end - tokens.begin) * group > kWidenRows)
      attend_split(rows, tile.head, split, tokens, widen(pages, wide + 2 * kSplit), q, scores, result);
    else
      attend_split(rows, tile.head, split, tokens, pages, q, scores, result);
    token = tokens.end;
  }
}

template <class T>
Pages<float> Kernel<T>::widen(const Pages<T>& pages, float* to) const {
  Pages<float> wide;
  wide.dim_stride = kChunk;
  wide.k_scales = pages.k_scales, wide.v_scales = pages.v_scales;
  for (int64_t c = 0; c < kChunks; ++c) {
    if (!pages.k[c]) continue;
    wide.k[c] = to;
    for (int64_t d = 0; d < a.k_dim; ++d, to += kChunk)
      for (int64_t i = 0; i < kChunk; i += kLanes) load(pages.k[c] + d * pages.dim_stride + i).store(to + i);
    wide.v[c] = to;
    for (int64_t i = 0; i < kChunk * a.v_dim; i += kLanes) load(pages.v[c] + i).store(to + i);
    to += kChunk * a.v_dim;
  }
  return wide;
}

// total <- total and part. Rows that saw nothing in the part stay as they are.
template <class T>
void Kernel<T>::merge(const State& part, const State& total, int64_t rows, bool first) const {
  for (int64_t r = 0; r < rows; ++r) {
    if (first) total.m[r] = kMinusInf;
    if (part.m[r] == kMinusInf) continue;
    float *to = total.values + r * v_stride, *from = part.values + r * v_stride;
    if (total.m[r] == kMinusInf) {
      std::memcpy(to, from, v_stride * sizeof(float));
      total.m[r] = part.m[r], total.l[r] = part.l[r];
      continue;
    }
    const float m = total.m[r] >= part.m[r] ? total.m[r] : part.m[r];
    const float x = exp(total.m[r] - m), y = exp(part.m[r] - m);
    for (int64_t d = 0; d < v_stride; d += kLanes) fma(load(from + d), Vec(y), load(to + d) * Vec(x)).store(to + d);
    total.l[r] = total.l[r] * x + part.l[r] * y;
    total.m[r] = m;
  }
}

template <class T>
void Kernel<T>::finish(const Tile& tile, const Rows& rows, const State& total) const {
  for (int64_t r = 0; r < tile.num_tokens * group; ++r) {
    const int64_t token = rows.token[r / group], head = tile.head * group + r % group;
    float *values = total.values + r * v_stride, l = total.l[r], factor = 1.0f;
    if (total.m[r] == kMinusInf) {  // no visible key at all: 0/0, or 0 if there is a sink
      std::memset(values, 0, v_stride * sizeof(float));
      l = a.sinks ? 1.0f : 0.0f;
    } else if (a.sinks) {
      const float m = total.m[r] >= a.sinks[head] ? total.m[r] : a.sinks[head];
      factor = exp(total.m[r] - m);
      l = l * factor + exp(a.sinks[head] - m);
    }
    const int64_t at = (token * a.num_heads + head) * a.v_dim;
    for (int64_t d = 0; d < a.v_dim; d += kLanes) {
      const Vec result = load(values + d) * Vec(factor) / Vec(l);
      const int64_t count = std::min<int64_t>(kLanes, a.v_dim - d);
      if (a.query_dtype == kFloat32) store(static_cast<float*>(a.out) + at + d, result, count);
      else if (a.query_dtype == kBFloat16) store(static_cast<c10::BFloat16*>(a.out) + at + d, result, count);
      else store(static_cast<c10::Half*>(a.out) + at + d, result, count);
    }
  }
}

template <class T>
void Kernel<T>::run_item(const Item& item, float* scratch) const {
  const Tile& tile = tiles[item.tile];
  const Rows rows(&spans[tile.first_span], tile.num_spans);
  const int64_t num_rows = tile.num_tokens * group;
  float* q = scratch;
  float* scores = q + max_rows * q_stride;
  float* wide = scores + kRows * kScoreStride;
  float* after = wide + wide_floats();
  load_queries(tile, rows, q);
  if (item.split >= 0) {
    float* slot = const_cast<Scratch&>(partials).get(0) + tile.partials +
                  (item.split - tile.split_begin) * state_floats(num_rows);
    return run_split(tile, rows, item.split, q, scores, wide, State(slot, num_rows, v_stride));
  }
  const State part(after, num_rows, v_stride), total(after + state_floats(num_rows), num_rows, v_stride);
  for (int64_t s = tile.split_begin; s < tile.split_end; ++s) {
    run_split(tile, rows, s, q, scores, wide, part);
    merge(part, total, num_rows, s == tile.split_begin);
  }
  finish(tile, rows, total);
}

template <class T>
void Kernel<T>::merge_partials(const Tile& tile, float* scratch) const {
  const int64_t num_rows = tile.num_tokens * group;
  const State total(scratch, num_rows, v_stride);
  float* slot = const_cast<Scratch&>(partials).get(0) + tile.partials;
  for (int64_t s = tile.split_begin; s < tile.split_end; ++s, slot += state_floats(num_rows))
    merge(State(slot, num_rows, v_stride), total, num_rows, s == tile.split_begin);
  finish(tile, Rows(&spans[tile.first_span], tile.num_spans), total);
}

template <class T>
void Kernel<T>::store_new(int64_t thread, int64_t num_threads) const {
  // Whole (head, 16 tokens) units: the tokens of a block share its lines of keys.
  const int64_t per_head = (a.num_tokens + kChunk - 1) / kChunk, units = per_head * a.num_kv_heads;
  for (int64_t u = units * thread / num_threads; u < units * (thread + 1) / num_threads; ++u) {
    const int64_t begin = u % per_head * kChunk;
    store_tokens<T>(a, u / per_head, begin, std::min(begin + kChunk, a.num_tokens));
  }
}

template <class T>
void Kernel<T>::run() {
  const int64_t scratch_floats =
      max_rows * q_stride + kRows * kScoreStride + wide_floats() + 2 * state_floats(max_rows);
  std::atomic<size_t> next_item{0}, next_merge{0};
#pragma omp parallel if (work > kSmallWork && !at::in_parallel_region() && at::get_num_threads() > 1)
  {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
#else
    const int64_t thread = 0, num_threads = 1;
#endif
    thread_local Scratch buffer;
    float* scratch = buffer.get(scratch_floats);
    if (a.key) {
      store_new(thread, num_threads);
#pragma omp barrier
    }
    for (size_t i; (i = next_item.fetch_add(1, std::memory_order_relaxed)) < items.size();) run_item(items[i], scratch);
    if (!split_tiles.empty()) {
#pragma omp barrier
      for (size_t i; (i = next_merge.fetch_add(1, std::memory_order_relaxed)) < split_tiles.size();)
        merge_partials(tiles[split_tiles[i]], scratch);
    }
  }
}

template <class T>
int64_t attend(const Args& args) {
  at::internal::lazy_init_num_threads();
  Kernel<T> kernel(args);
  const Error error = kernel.make(at::in_parallel_region() ? 1 : at::get_num_threads());
  if (error != kOk) return kernel.bad_index * 8 + error;
  kernel.run();
  return kOk;
}

}  // namespace
}  // namespace hf_paged
