// Byte-level byte-pair encoding: encode and decode. Pure C++, no Python. Training is in bpe_trainer.h.
//
// The result of encoding a word is that of repeatedly merging the adjacent pair of lowest rank (leftmost first), as
// Hugging Face `tokenizers` defines it.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "id_buffer.h"
#include "merger.h"
#include "pretokenize.h"
#include "word_cache.h"

namespace tapelm::text {

struct BpeModel {
  std::vector<std::string> tokens;  // bytes of every id
  std::vector<Merge> merges;        // in rank order
  std::vector<uint32_t> specials;   // ids found by their text, never produced by merging
  Pretokenizer pretokenizer = Pretokenizer::kGpt2;
  bool ignore_merges = false;  // a word that is a token as a whole is that token, whatever the merges say
};

// Ids of several texts one after another: text i is ids[offsets[i] .. offsets[i + 1]).
struct EncodedBatch {
  IdBuffer ids;
  std::vector<uint64_t> offsets;
};

// One thread's working memory: what it knows of words and the buffers of the merge loop.
struct EncoderState {
  ShortWords short_words;
  LongWords long_words;
  MergeBuffers merge;
  IdBuffer word;  // ids of the word being learnt
};

// The states that no thread uses, of one process: in a forked child the mutex may be locked for ever.
struct IdleStates {
  const pid_t process = ::getpid();
  std::mutex mutex;
  std::vector<std::unique_ptr<EncoderState>> states;
};

class Bpe {
 public:
  // Throws std::invalid_argument when ids are out of range, a byte has no token, or a merge is not the
  // concatenation of its parents.
  explicit Bpe(BpeModel model);
  ~Bpe() { delete idle_.load(); }
  Bpe(const Bpe&) = delete;
  Bpe& operator=(const Bpe&) = delete;

  // Ids of `text`. With allow_special, the text of a special token becomes its id; without, it throws
  // std::invalid_argument. Safe to call from several threads.
  IdBuffer encode(std::string_view text, bool allow_special) const;

  // The same for many texts on `threads` threads (0: one per core); a long text is shared among them.
  EncodedBatch encode_batch(std::span<const std::string_view> texts, bool allow_special, unsigned threads) const;

  // Concatenated bytes of `ids`; throws std::invalid_argument on an id outside the vocabulary.
  std::string decode(std::span<const uint32_t> ids) const;

  size_t vocab_size() const { return model_.tokens.size(); }

  // Encodes text after text with the same working memory, on one thread at a time.
  class Encoder {
   public:
    explicit Encoder(const Bpe& bpe) : bpe_(bpe), state_(bpe.borrow()) {}
    ~Encoder() { bpe_.give_back(std::move(state_)); }
    Encoder(const Encoder&) = delete;
    Encoder& operator=(const Encoder&) = delete;

    // Appends the ids of `text`; throws as Bpe::encode does.
    void encode(std::string_view text, bool allow_special, IdBuffer& out) {
      bpe_.encode_text(text, 0, allow_special, *state_, out);
    }

   private:
    const Bpe& bpe_;
    std::unique_ptr<EncoderState> state_;
  };

 private:
  // Words of a text: word i ends at text + ends[i], where the next one begins.
  struct Words {
    const uint8_t* text;
    const uint8_t* text_end;
    const uint32_t* ends;
    size_t count;
    std::string_view word(uint32_t from, uint32_t to) const {
      return {reinterpret_cast<const char*>(text) + from, to - from};
    }
  };
  struct Piece;
  class Batch;

  void check_merges(const std::vector<bool>& is_special) const;
  void seed();
  void encode_text(std::string_view text, size_t offset, bool allow_special, EncoderState& state, IdBuffer& out) const;
  void encode_plain(std::string_view text, EncoderState& state, IdBuffer& out) const;
  // These write ids and return where they end. There must be room for as many ids as bytes, and for kShortIds more.
  uint32_t* encode_words(const Words& words, EncoderState& state, uint32_t* write) const;
  uint32_t* encode_words_avx2(const Words& words, EncoderState& state, uint32_t* write) const;
  uint32_t* encode_words_anywhere(const Words& words, EncoderState& state, uint32_t* write) const;
  uint32_t* encode_rare_word(std::string_view word, EncoderState& state, uint32_t* write) const;
  void merge_word(std::string_view word, EncoderState& state) const;
  size_t find_special(std::string_view text, size_t from, uint32_t& id) const;
  std::vector<Piece> cut(std::span<const std::string_view> texts, bool divide) const;
  IdleStates& idle() const;
  std::unique_ptr<EncoderState> borrow() const;
  void give_back(std::unique_ptr<EncoderState> state) const;

  BpeModel model_;
  std::unique_ptr<Merger> merger_;
  std::unordered_map<std::string_view, uint32_t> whole_;  // filled only with ignore_merges
  ShortWords known_words_;                                // what every EncoderState begins with
  std::vector<uint32_t> specials_;                        // longest text first
  std::string special_first_bytes_;
  bool specials_allow_cuts_ = true;  // no special token can reach over a safe cut
  mutable std::atomic<IdleStates*> idle_{nullptr};  // owned
};

}  // namespace tapelm::text
