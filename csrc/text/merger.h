// The merges of a byte-pair vocabulary, and the loop that carries them out on one word.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "flat_map.h"
#include "id_buffer.h"

namespace tapelm::text {

struct Merge {
  uint32_t left;
  uint32_t right;
  uint32_t merged;
};

// One thread's working memory for words that are too long for the stack.
struct MergeBuffers {
  struct Candidate {
    uint32_t rank;
    uint32_t position;
    bool operator<(const Candidate& other) const {  // std heaps keep the greatest on top
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  std::vector<uint32_t> symbols;   // ids of the word being merged
  std::vector<uint32_t> ranks;     // rank of (symbol i, next symbol), kNoRank where they do not merge
  std::vector<uint32_t> next;      // linked list over positions
  std::vector<uint32_t> previous;
  std::vector<Candidate> heap;
};

class Merger {
 public:
  // `byte_ids` are the ids of the 256 bytes; a pair listed twice has its last rank.
  Merger(const uint32_t (&byte_ids)[256], const std::vector<Merge>& merges);

  // Appends the ids of a word: those left when the adjacent pair of lowest rank, the leftmost first, has been merged
  // until no pair merges. Throws std::invalid_argument on a word of 4 GiB or more.
  void encode(std::string_view word, MergeBuffers& buffers, IdBuffer& out) const;

 private:
  void encode_long(std::string_view word, MergeBuffers& buffers, IdBuffer& out) const;
  uint32_t rank_of(uint32_t left, uint32_t right) const;

  uint32_t byte_ids_[256];
  FlatMap<uint32_t> ranks_;             // (left, right) -> rank
  std::vector<uint32_t> byte_ranks_;    // the same for two bytes: [first byte * 256 + second byte]
  std::vector<uint32_t> merged_;        // id by rank
};

}  // namespace tapelm::text
