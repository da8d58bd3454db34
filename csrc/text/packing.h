// Whole documents packed into windows of T tokens by best-fit decreasing, in groups so that memory stays bounded.
//
// A document of n tokens gives floor(n / T) full windows and a piece of n mod T tokens; the pieces of a group of
// consecutive documents are placed longest first, each into the window with the least room that it fits in. Nothing
// is lost, repeated or truncated. A plan depends on the document lengths and T alone.
#pragma once

#include <cstdint>
#include <vector>

#include "shards.h"

namespace tapelm::text {

struct Piece {
  uint64_t begin;   // index of its first token in the sequence of all shards
  uint64_t tokens;  // 1 .. T
};

// Window w of a group holds pieces[first[w] .. first[w + 1]), in the order of the corpus.
struct PackedGroup {
  std::vector<Piece> pieces;
  std::vector<uint64_t> first{0};
  uint64_t windows() const { return first.size() - 1; }
};

class Packing {
 public:
  // Reads every document start once (8 bytes per document) and counts windows; keeps 16 bytes per group.
  // Throws std::invalid_argument where the shards hold no documents, or damaged starts.
  Packing(const ShardSet& shards, uint64_t seq_len);

  uint64_t windows() const { return first_window_.back(); }
  uint64_t groups() const { return first_window_.size() - 1; }
  uint64_t group_of(uint64_t window) const;
  uint64_t first_window(uint64_t group) const { return first_window_[group]; }
  PackedGroup plan(uint64_t group) const;

 private:
  const ShardSet& shards_;
  uint64_t seq_len_;
  std::vector<uint64_t> first_document_{0};
  std::vector<uint64_t> first_window_{0};
};

}  // namespace tapelm::text
