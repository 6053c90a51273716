// The work of a call of attention_kernel.h: which rows are attended together, over which splits of their keys, and what of
// it threads take at a time.
//
// A tile is up to kTileRows rows times all query heads of one KV head. Its tokens are consecutive ones of one sequence,
// or those of sequences whose first blocks are the same: their splits in these blocks are read once for all rows of the
// tile, the others once for each sequence. No row's bits depend on which it is (attention_kernel.h says why).
#pragma once

#include "attention_store.h"
#include "attention_tiles.h"

#include <vector>

namespace hf_paged {
namespace {

constexpr int64_t kTileRows = 48;                // rows of a tile of several tokens
constexpr int64_t kMaxPartialFloats = 16 << 20;  // bound on the memory for splits merged at the end

enum Error : int64_t { kOk = 0, kBadLengths = 1, kBadBlock = 2, kBadSlot = 3, kBadShared = 4 };

struct Span {  // tokens of a tile that are consecutive ones of one sequence
  int64_t seq, first_token, num_tokens;  // of the batch
  int64_t position;                      // of first_token in its sequence
  int64_t end;                           // keys up to here are seen by some token
};

struct Tile {
  int64_t head, first_span, num_spans, num_tokens;
  int64_t lowest;                  // key that any row sees
  int64_t shared_end;              // splits before this one are the same keys for all spans
  int64_t split_begin, split_end;  // splits that any row sees
  int64_t partials;                // where its splits' results go; -1: one item runs and merges them all
};

struct Item {
  int64_t tile, split;  // split -1: all of the tile
};

class Plan {
 public:
  explicit Plan(const Args& args)
      : a(args), group(args.num_heads / args.num_kv_heads), tile_tokens(std::max<int64_t>(1, kTileRows / group)),
        max_rows(tile_tokens * group), q_stride((args.k_dim + kLanes - 1) / kLanes * kLanes),
        v_stride((args.v_dim + kLanes - 1) / kLanes * kLanes) {}

  Error make(int64_t num_threads);

  int64_t bad_index = 0;  // the sequence or token that an error is about

 protected:
  int64_t lowest_key(int64_t position) const {  // that a query at `position` sees; never falls with the position
    if (a.chunk) return position - position % a.chunk;
    return a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
  }
  int64_t end_key(int64_t token, int64_t position) const {  // of those that the row sees
    return a.ends ? std::max<int64_t>(position + 1, a.ends[token]) : position + 1;
  }
  int64_t end_of_rows(int64_t token, int64_t position, int64_t count) const {  // of `count` tokens from this one on
    int64_t end = position + count;
    if (a.ends)
      for (int64_t i = 0; i < count; ++i) end = std::max<int64_t>(end, a.ends[token + i]);
    return end;
  }
  int64_t state_floats(int64_t rows) const { return rows * (v_stride + 2); }

  const Args& a;
  const int64_t group, tile_tokens, max_rows, q_stride, v_stride;
  std::vector<Span> spans;
  std::vector<Tile> tiles;
  std::vector<Item> items;
  std::vector<int64_t> split_tiles;
  Scratch partials;
  double work = 0;  // multiply-adds of the call, about

 private:
  Error check();
  Error add_groups(std::vector<bool>& grouped);
  void add_tiles(const int32_t* members, int64_t count, int64_t shared_end);
  void add_items(int64_t num_threads);

  std::vector<Tile> shapes;  // of the tiles of some sequences, for any head
  double total_cost = 0;     // tokens times splits
};

Error Plan::make(int64_t num_threads) {
  work = a.key ? static_cast<double>(a.num_tokens * a.num_kv_heads * (a.k_dim + a.v_dim)) : 0;
  if (const Error error = check()) return error;
  std::vector<bool> grouped(a.num_groups ? a.num_seqs : 0);
  if (const Error error = add_groups(grouped)) return error;
  for (int32_t seq = 0; seq < a.num_seqs; ++seq)
    if (grouped.empty() || !grouped[seq]) add_tiles(&seq, 1, 0);
  add_items(num_threads);
  return kOk;
}

Error Plan::check() {
  if (a.key) {
    const int64_t num_slots = a.num_blocks * a.block_size;
    for (int64_t t = 0; t < a.num_tokens; ++t)
      if (a.slot_mapping[t] >= num_slots) return bad_index = t, kBadSlot;
  }
  for (int64_t seq = 0; seq < a.num_seqs; ++seq) {
    bad_index = seq;
    const int64_t begin = a.cu_seqlens_q[seq], end = a.cu_seqlens_q[seq + 1], length = a.seq_lens[seq];
    if (begin < 0 || end < begin || end > a.num_tokens || length < end - begin ||
        length > a.table_width * a.block_size)
      return kBadLengths;
    if (begin == end) continue;
    const int64_t position = length - (end - begin);
    if (end_of_rows(begin, position, end - begin) > length) return kBadLengths;
    for (int64_t b = lowest_key(position) / a.block_size; b <= (length - 1) / a.block_size; ++b)
      if (a.block_table[seq * a.table_width + b] >= a.num_blocks) return kBadBlock;
  }
  return kOk;
}

// Tiles of the sequences that share whole splits.
Error Plan::add_groups(std::vector<bool>& grouped) {
  for (int64_t g = 0; g < a.num_groups; ++g) {
    const int64_t shared_end = a.prefix_lens[g] / kSplit, count = a.group_starts[g + 1] - a.group_starts[g];
    if (shared_end <= 0 || count < 2) continue;
    const int32_t* members = a.members + a.group_starts[g];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t seq = members[i];
      bad_index = seq;
      if (seq < 0 || seq >= a.num_seqs || grouped[seq]) return kBadShared;
      const int64_t new_tokens = a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq];
      if (a.prefix_lens[g] > a.seq_lens[seq] - new_tokens) return kBadShared;
      grouped[seq] = true;
    }
    add_tiles(members, count, shared_end);
  }
  return kOk;
}

void Plan::add_tiles(const int32_t* members, int64_t count, int64_t shared_end) {
  shapes.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t seq = members[i], end = a.cu_seqlens_q[seq + 1];
    for (int64_t token = a.cu_seqlens_q[seq]; token < end;) {
      if (shapes.empty() || shapes.back().num_tokens == tile_tokens)
        shapes.push_back({0, static_cast<int64_t>(spans.size()), 0, 0, INT64_MAX, shared_end, INT64_MAX, 0, -1});
      Tile& tile = shapes.back();
      Span span{seq, token, std::min(tile_tokens - tile.num_tokens, end - token), a.seq_lens[seq] - (end - token), 0};
      span.end = end_of_rows(token, span.position, span.num_tokens);
      const int64_t lowest = lowest_key(span.position), begin = lowest / kSplit, past = (span.end - 1) / kSplit + 1;
      spans.push_back(span);
      ++tile.num_spans, tile.num_tokens += span.num_tokens;
      tile.lowest = std::min(tile.lowest, lowest);
      tile.split_begin = std::min(tile.split_begin, begin), tile.split_end = std::max(tile.split_end, past);
      total_cost += static_cast<double>(span.num_tokens * (past - begin) * a.num_kv_heads);
      work += static_cast<double>(span.num_tokens * a.num_heads * (a.k_dim + a.v_dim)) * (span.end - lowest);
      token += span.num_tokens;
    }
  }
  for (int64_t head = 0; head < a.num_kv_heads; ++head)
    for (size_t i = shapes.size(); i-- > 0;) {  // the most expensive tile of a sequence first
      tiles.push_back(shapes[i]);
      tiles.back().head = head;
    }
}

void Plan::add_items(int64_t num_threads) {
  int64_t partial_floats = 0;
  for (size_t t = 0; t < tiles.size(); ++t) {
    Tile& tile = tiles[t];
    const int64_t splits = tile.split_end - tile.split_begin;
    const int64_t floats = splits * state_floats(tile.num_tokens * group);
    const bool large = tile.num_tokens * splits * 4 * num_threads > total_cost;
    if (num_threads > 1 && splits > 1 && large && partial_floats + floats <= kMaxPartialFloats) {
      tile.partials = partial_floats;
      partial_floats += floats;
      split_tiles.push_back(t);
      for (int64_t s = tile.split_begin; s < tile.split_end; ++s) items.push_back({static_cast<int64_t>(t), s});
    } else {
      items.push_back({static_cast<int64_t>(t), -1});
    }
  }
  partials.get(partial_floats);
}

}  // namespace
}  // namespace hf_paged
