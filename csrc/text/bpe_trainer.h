// Byte-level byte-pair training with the merges of Hugging Face `tokenizers` BpeTrainer, ties included.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bpe.h"

namespace tapelm::text {

class BpeTrainer {
 public:
  explicit BpeTrainer(Pretokenizer pretokenizer) : pretokenizer_(pretokenizer) {}

  // Counts the words of one text.
  void feed(std::string_view text);

  // `byte_ids` are the ids of the 256 bytes and `reserved` the bytes of the special tokens; both count towards
  // `vocab_size`, and the first merge gets id 256 + reserved.size(). Stops early when no pair occurs
  // `min_frequency` times. Throws std::invalid_argument when a merge produces a reserved token.
  std::vector<Merge> train(size_t vocab_size, const std::vector<uint32_t>& byte_ids,
                           const std::vector<std::string>& reserved, uint64_t min_frequency) const;

  size_t words() const { return counts_.size(); }

 private:
  Pretokenizer pretokenizer_;
  std::unordered_map<std::string, int64_t> counts_;
  std::string key_;  // kept between look-ups so that known words allocate nothing
};

}  // namespace tapelm::text
