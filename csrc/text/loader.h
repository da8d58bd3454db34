// Training batches out of token shards, in an order that is computed and never stored.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "packing.h"
#include "shards.h"

namespace tapelm::text {

// A bijection of [0, size) chosen by (seed, epoch): a Feistel network over the next power of four, applied again
// while its value falls outside ("cycle walking", Black and Rogaway 2002). Constant time and memory.
class Permutation {
 public:
  Permutation(uint64_t size, uint64_t seed, uint64_t epoch);
  uint64_t operator()(uint64_t index) const;

  // Puts the image of every index in its place, all at a time: each is a long chain of multiplications.
  void map(std::span<uint64_t> indices) const;

 private:
  static constexpr int kRounds = 6;
  uint64_t pass(uint64_t index) const;

  uint64_t size_;
  uint32_t half_bits_;
  uint64_t keys_[kRounds];
};

enum class Order : int { kShuffled = 0, kSequential = 1, kPacked = 2 };

struct LoaderOptions {
  uint64_t batch_size;  // B, windows per batch and rank
  uint64_t seq_len;     // T, tokens per window
  uint64_t seed;
  uint64_t rank;
  uint64_t world_size;
  Order order;
};

inline constexpr uint64_t kNoGroup = ~0ull;

// What one reader of a Loader remembers between its steps, to save repeating it.
struct LoaderCursor {
  uint64_t epoch = ~0ull;
  std::vector<uint64_t> epoch_starts;  // packed: first position in the epoch of its k-th group, then the total
  uint64_t group = kNoGroup;
  PackedGroup plan;                    // of `group`
  std::vector<uint8_t> row;            // T + 1 stored tokens
  uint64_t asked_step = ~0ull;         // the step whose windows the memory was asked for ahead
  std::vector<uint64_t> asked;         // these windows
};

// Window w is tokens [wT, wT + T) with targets one token later, or with Order::kPacked the pieces of documents that
// packing.h puts together. Step s of the run takes, for rank r, positions (s mod steps) * B * world + r * B ... of
// the epoch's order; the windows that fill no whole step are left out of the epoch. Shuffled: a permutation of the
// windows. Packed: a permutation of the groups, and one of the windows of each group, so that a plan serves many
// steps.
class Loader {
 public:
  // Throws std::invalid_argument when the shards hold no window, or too few for one step of all ranks.
  Loader(const std::vector<std::string>& paths, uint32_t end_of_text, LoaderOptions options);

  uint64_t tokens() const { return shards_.tokens(); }
  uint64_t windows() const { return windows_; }
  uint64_t steps_per_epoch() const { return windows_ / (options_.batch_size * options_.world_size); }
  const LoaderOptions& options() const { return options_; }
  const ShardSet& shards() const { return shards_; }

  // Index of every window of step `step` (B values).
  std::vector<uint64_t> window_indices(uint64_t step, LoaderCursor& cursor) const;

  // Fills (B, T) inputs, targets and document ids. Ids count the documents of a window from 0, and an end-of-text
  // token belongs to the document that it ends. Packed: the target of a document's last token is -100; padding is
  // end_of_text with target -100 and an id of its own. Reentrant: one cursor per thread.
  void fill(uint64_t step, LoaderCursor& cursor, int64_t* inputs, int64_t* targets, int32_t* document_ids) const;

  // What fill() reads, as stored: (B, T + 1) tokens, rows padded with end_of_text, and the inputs of each row (B).
  void fill_rows(uint64_t step, LoaderCursor& cursor, uint8_t* rows, uint32_t* lengths) const;

 private:
  void enter_epoch(uint64_t epoch, LoaderCursor& cursor) const;
  std::vector<uint64_t> asked_windows(uint64_t step, LoaderCursor& cursor) const;
  void ask(uint64_t index, const LoaderCursor& cursor) const;
  uint32_t copy_window(uint64_t index, LoaderCursor& cursor, uint8_t* row) const;

  ShardSet shards_;
  uint32_t end_of_text_;
  LoaderOptions options_;
  std::optional<Packing> packing_;
  uint64_t windows_ = 0;
};

}  // namespace tapelm::text
