// Training batches out of token shards, in an order that is computed and never stored.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shards.h"

namespace tapelm::text {

// A bijection of [0, size) chosen by (seed, epoch): a Feistel network over the next power of four, applied again
// while its value falls outside ("cycle walking", Black and Rogaway 2002). Constant time and memory.
class Permutation {
 public:
  Permutation(uint64_t size, uint64_t seed, uint64_t epoch);
  uint64_t operator()(uint64_t index) const;

 private:
  static constexpr int kRounds = 6;
  uint64_t size_;
  uint32_t half_bits_;
  uint64_t keys_[kRounds];
};

struct LoaderOptions {
  uint64_t batch_size;  // B, windows per batch and rank
  uint64_t seq_len;     // T, tokens per window
  uint64_t seed;
  uint64_t rank;
  uint64_t world_size;
};

// Window w is tokens [wT, wT + T) with targets one token later. Step s of the run takes, for rank r, windows
// permutation[(s mod steps) * B * world + r * B ...]; the windows that fill no whole step are left out of the epoch,
// other ones in each epoch.
class Loader {
 public:
  // Throws std::invalid_argument when the shards hold no window, or too few for one step of all ranks.
  Loader(const std::vector<std::string>& paths, uint32_t end_of_text, LoaderOptions options);

  uint64_t tokens() const { return shards_.tokens(); }
  uint64_t windows() const { return windows_; }
  uint64_t steps_per_epoch() const { return windows_ / (options_.batch_size * options_.world_size); }
  uint64_t batch_tokens() const { return options_.batch_size * options_.seq_len; }
  const ShardSet& shards() const { return shards_; }

  // Index of every window of step `step` (B values).
  std::vector<uint64_t> window_indices(uint64_t step) const;

  // Fills (B, T) inputs, targets and document ids; ids count the documents of a window from 0, and an end-of-text
  // token belongs to the document that it ends.
  void fill(uint64_t step, int64_t* inputs, int64_t* targets, int32_t* document_ids) const;

 private:
  ShardSet shards_;
  uint32_t end_of_text_;
  LoaderOptions options_;
  uint64_t windows_ = 0;
};

}  // namespace tapelm::text
