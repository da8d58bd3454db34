#include "merger.h"

#include <algorithm>
#include <stdexcept>

namespace tapelm::text {
namespace {

constexpr uint32_t kNoRank = UINT32_MAX;
constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kShortWord = 32;  // up to here a scan for the lowest rank beats a heap

}  // namespace

Merger::Merger(const uint32_t (&byte_ids)[256], const std::vector<Merge>& merges) {
  std::copy(std::begin(byte_ids), std::end(byte_ids), byte_ids_);
  ranks_.reserve(merges.size());
  merged_.reserve(merges.size());
  for (const Merge& merge : merges) {
    const auto rank = static_cast<uint32_t>(merged_.size());
    ranks_.get(pair_key(merge.left, merge.right), rank) = rank;
    merged_.push_back(merge.merged);
  }
  byte_ranks_.reserve(1u << 16);
  for (const uint32_t left : byte_ids_) {
    for (const uint32_t right : byte_ids_) byte_ranks_.push_back(rank_of(left, right));
  }
}

inline uint32_t Merger::rank_of(uint32_t left, uint32_t right) const {
  const uint32_t* rank = ranks_.find(pair_key(left, right));
  return rank ? *rank : kNoRank;
}

// Quadratic in the (small) number of symbols, with one pass per merge over a few cache lines.
void Merger::encode(std::string_view word, MergeBuffers& buffers, IdBuffer& out) const {
  if (word.size() > kShortWord) return encode_long(word, buffers, out);
  uint32_t symbols[kShortWord];
  uint32_t ranks[kShortWord];
  size_t n = word.size();
  const auto* bytes = reinterpret_cast<const uint8_t*>(word.data());
  for (size_t i = 0; i < n; ++i) symbols[i] = byte_ids_[bytes[i]];
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = byte_ranks_[bytes[i] << 8 | bytes[i + 1]];
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) best = ranks[i] < ranks[best] ? i : best;
    if (ranks[best] == kNoRank) break;
    symbols[best] = merged_[ranks[best]];
    std::copy(symbols + best + 2, symbols + n, symbols + best + 1);
    std::copy(ranks + best + 1, ranks + n - 1, ranks + best);
    --n;
    if (best > 0) ranks[best - 1] = rank_of(symbols[best - 1], symbols[best]);
    if (best + 1 < n) ranks[best] = rank_of(symbols[best], symbols[best + 1]);
  }
  out.commit(std::copy(symbols, symbols + n, out.reserve(n)));
}

// O(n log n): a heap of candidate merges over a doubly linked list. A candidate is stale, and skipped, when the pair
// at its position has another rank by now.
void Merger::encode_long(std::string_view word, MergeBuffers& buffers, IdBuffer& out) const {
  if (word.size() >= kNone) throw std::invalid_argument("a word of 4 GiB or more cannot be encoded");
  auto& [symbols, ranks, next, previous, heap] = buffers;
  const auto n = static_cast<uint32_t>(word.size());
  symbols.resize(n);
  ranks.resize(n);
  next.resize(n);
  previous.resize(n);
  heap.clear();
  for (uint32_t i = 0; i < n; ++i) symbols[i] = byte_ids_[static_cast<uint8_t>(word[i])];
  for (uint32_t i = 0; i < n; ++i) {
    next[i] = i + 1 < n ? i + 1 : kNone;
    previous[i] = i > 0 ? i - 1 : kNone;
    ranks[i] = i + 1 < n ? rank_of(symbols[i], symbols[i + 1]) : kNoRank;
    if (ranks[i] != kNoRank) heap.push_back({ranks[i], i});
  }
  std::make_heap(heap.begin(), heap.end());
  const auto update = [&](uint32_t position) {
    ranks[position] = next[position] == kNone ? kNoRank : rank_of(symbols[position], symbols[next[position]]);
    if (ranks[position] == kNoRank) return;
    heap.push_back({ranks[position], position});
    std::push_heap(heap.begin(), heap.end());
  };
  while (!heap.empty()) {
    const auto top = heap.front();
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    if (ranks[top.position] != top.rank) continue;
    const uint32_t eaten = next[top.position];
    symbols[top.position] = merged_[top.rank];
    ranks[eaten] = kNoRank;
    next[top.position] = next[eaten];
    if (next[eaten] != kNone) previous[next[eaten]] = top.position;
    update(top.position);
    if (previous[top.position] != kNone) update(previous[top.position]);
  }
  uint32_t* write = out.reserve(n);
  for (uint32_t i = 0; i != kNone; i = next[i]) *write++ = symbols[i];
  out.commit(write);
}

}  // namespace tapelm::text
