// Byte-level byte-pair encoding: encode and decode. Pure C++, no Python. Training is in bpe_trainer.h.
//
// The result of encoding a word is that of repeatedly merging the adjacent pair of lowest rank (leftmost first), as
// Hugging Face `tokenizers` defines it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "flat_map.h"
#include "pretokenize.h"

namespace tapelm::text {

struct Merge {
  uint32_t left;
  uint32_t right;
  uint32_t merged;
};

struct BpeModel {
  std::vector<std::string> tokens;  // bytes of every id
  std::vector<Merge> merges;        // in rank order
  std::vector<uint32_t> specials;   // ids found by their text, never produced by merging
  Pretokenizer pretokenizer = Pretokenizer::kGpt2;
  bool ignore_merges = false;  // a word that is a token as a whole is that token, whatever the merges say
};

// Ids of several texts one after another: text i is ids[offsets[i] .. offsets[i + 1]).
struct EncodedBatch {
  std::vector<uint32_t> ids;
  std::vector<uint64_t> offsets;
};

// One thread's working memory: the word cache and the buffers of the merge loop.
struct EncoderState;

class Bpe {
 public:
  // Throws std::invalid_argument when ids are out of range, a byte has no token, or a merge is not the
  // concatenation of its parents.
  explicit Bpe(BpeModel model);
  ~Bpe();

  // Ids of `text`. With allow_special, the text of a special token becomes its id; without, it throws
  // std::invalid_argument. Safe to call from several threads.
  std::vector<uint32_t> encode(std::string_view text, bool allow_special) const;

  // The same for many texts on `threads` threads (0: one per core).
  EncodedBatch encode_batch(std::span<const std::string_view> texts, bool allow_special, unsigned threads) const;

  // Concatenated bytes of `ids`; throws std::invalid_argument on an id outside the vocabulary.
  std::string decode(std::span<const uint32_t> ids) const;

  size_t vocab_size() const { return model_.tokens.size(); }

 private:
  struct Ranked {
    uint32_t rank;
    uint32_t merged;
  };

  void encode_text(std::string_view text, bool allow_special, EncoderState& state, std::vector<uint32_t>& out) const;
  void encode_plain(std::string_view text, EncoderState& state, std::vector<uint32_t>& out) const;
  void encode_word(std::string_view word, EncoderState& state, std::vector<uint32_t>& out) const;
  void merge_short(EncoderState& state, std::vector<uint32_t>& out) const;
  void merge_long(EncoderState& state, std::vector<uint32_t>& out) const;
  uint32_t rank_of(uint32_t left, uint32_t right) const;
  size_t find_special(std::string_view text, size_t from, uint32_t& id) const;
  std::unique_ptr<EncoderState> borrow() const;
  void give_back(std::unique_ptr<EncoderState> state) const;

  BpeModel model_;
  uint32_t byte_ids_[256];
  FlatMap<uint32_t> ranks_;                              // (left, right) -> rank = index into model_.merges
  std::unordered_map<std::string_view, uint32_t> whole_;  // filled only with ignore_merges
  std::vector<uint32_t> specials_;                       // longest text first
  bool special_first_byte_[256] = {};
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<EncoderState>> idle_;
};

}  // namespace tapelm::text
