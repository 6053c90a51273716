// What `attention_kernel.h` is called with, and the write of new keys and values to the cache: rounded to its type, or to 8
// bits with a scale of their own,
//
//   scale = max |x| / the type's largest number,  q = x / scale rounded to nearest even,
//
// bit for bit as the reference rounds. A row with a NaN or an infinity gets the scale inf.
#pragma once

#include "quantized_cache.h"

#include <limits>

namespace hf_paged {

// The C interface; `attention.py` packs the same fields in the same order.
struct Args {
  const void *query, *key, *value;
  void *out, *k_cache, *v_cache;
  float *k_scale, *v_scale;  // of a quantized cache
  const int32_t *cu_seqlens_q, *seq_lens, *block_table;
  const int64_t* slot_mapping;
  const int32_t* ends;  // of each row, how many keys it sees, if more than those up to itself; null: none does
  const float *sinks, *alibi_slopes;
  const int32_t *members, *group_starts, *prefix_lens;  // of sequences with the same first blocks; null: none are known
  int64_t num_groups;
  int64_t query_dtype, new_dtype, cache_dtype;
  int64_t num_tokens, num_seqs, table_width, num_blocks, block_size;
  int64_t num_heads, num_kv_heads, k_dim, v_dim;
  int64_t query_stride[2], key_stride[2], value_stride[2];  // of tokens and heads; the last dim is contiguous
  int64_t k_cache_stride[2], v_cache_stride[2];             // of blocks and heads; the rest is contiguous
  int64_t scale_stride[2];                                  // of both scales, of blocks and heads
  int64_t window, chunk;                                    // 0: none; at most one of them is set
  double scale, softcap;                                    // softcap 0: none
};

namespace {

// x [dims] -> q, element d at to[d * stride]; returns the scale.
template <class Cache, class New>
inline float store_quantized(const New* x, int64_t dims, Cache* to, int64_t stride) {
  alignas(64) float lanes[kLanes];
  alignas(64) uint32_t sizes[kLanes] = {};  // bits of |x|, which are ordered as the numbers are, and NaN above them
  for (int64_t d = 0; d < dims; d += kLanes) {
    load(x + d, std::min<int64_t>(kLanes, dims - d)).store(lanes);
    for (int i = 0; i < kLanes; ++i) sizes[i] = std::max(sizes[i], std::bit_cast<uint32_t>(lanes[i]) & 0x7FFFFFFF);
  }
  uint32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, sizes[i]);
  const float peak = std::bit_cast<float>(std::min(largest, 0x7F800000u));
  const float scale = std::max(peak, 1e-30f) / Rounding<Cache>::kLargest;
  for (int64_t d = 0; d < dims; d += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, dims - d);
    (load(x + d, count) / Vec(scale)).store(lanes);
    Cache q[kLanes];
    for (int i = 0; i < kLanes; ++i) q[i] = Rounding<Cache>::round(lanes[i]);
    if (stride == 1)
      std::memcpy(to + d, q, count * sizeof(Cache));
    else
      for (int64_t i = 0; i < count; ++i) to[(d + i) * stride] = q[i];
  }
  return scale;
}

template <class Cache, class New>
void store_tokens(const Args& a, int64_t head, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = a.slot_mapping[token];
    if (slot < 0) continue;
    const int64_t block = slot / a.block_size, offset = slot % a.block_size;
    const New* key = static_cast<const New*>(a.key) + token * a.key_stride[0] + head * a.key_stride[1];
    const New* value = static_cast<const New*>(a.value) + token * a.value_stride[0] + head * a.value_stride[1];
    Cache* k = static_cast<Cache*>(a.k_cache) + block * a.k_cache_stride[0] + head * a.k_cache_stride[1] + offset;
    Cache* v = static_cast<Cache*>(a.v_cache) + block * a.v_cache_stride[0] + head * a.v_cache_stride[1] +
               offset * a.v_dim;
    if constexpr (kIsQuantized<Cache>) {
      const int64_t at = block * a.scale_stride[0] + head * a.scale_stride[1] + offset;
      a.k_scale[at] = store_quantized(key, a.k_dim, k, a.block_size);
      a.v_scale[at] = store_quantized(value, a.v_dim, v, 1);
    } else {
      for (int64_t d = 0; d < a.k_dim; ++d) k[d * a.block_size] = static_cast<Cache>(static_cast<float>(key[d]));
      for (int64_t d = 0; d < a.v_dim; ++d) v[d] = static_cast<Cache>(static_cast<float>(value[d]));
    }
  }
}

template <class Cache>
void store_tokens(const Args& a, int64_t head, int64_t begin, int64_t end) {
  if (a.new_dtype == kFloat32) return store_tokens<Cache, float>(a, head, begin, end);
  if (a.new_dtype == kBFloat16) return store_tokens<Cache, c10::BFloat16>(a, head, begin, end);
  return store_tokens<Cache, c10::Half>(a, head, begin, end);
}

}  // namespace
}  // namespace hf_paged
