#include "bpe_trainer.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_set>

namespace tapelm::text {
namespace {

// A pair waiting to be merged in `words`. Its count may be out of date: it is compared with the real one when it
// reaches the top. The highest count is taken first, then the lowest pair of ids.
struct Waiting {
  int64_t count;
  uint64_t pair;
  std::vector<uint32_t> words;
  bool operator<(const Waiting& other) const {  // std heaps keep the greatest on top
    return count != other.count ? count < other.count : pair > other.pair;
  }
};

// The words as runs of symbols that shrink in place.
struct Words {
  std::vector<uint32_t> symbols;
  std::vector<size_t> begin;
  std::vector<uint32_t> length;
  std::vector<int64_t> count;
};

class TrainingMerges {
 public:
  explicit TrainingMerges(Words words) : words_(std::move(words)) {
    for (uint32_t w = 0; w < words_.length.size(); ++w) {
      const uint32_t* s = &words_.symbols[words_.begin[w]];
      for (uint32_t i = 0; i + 1 < words_.length[w]; ++i) add(pair_key(s[i], s[i + 1]), w, 1);
    }
    queue_changed();
  }

  // Takes the most frequent pair; false when none occurs min_frequency times.
  bool pop(Waiting& top, int64_t min_frequency) {
    while (!heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end());
      const int64_t count = pairs_.find(heap_.back().pair)->count;
      if (heap_.back().count == count) {
        top = std::move(heap_.back());
        heap_.pop_back();
        return top.count >= std::max<int64_t>(1, min_frequency);
      }
      heap_.back().count = count;
      std::push_heap(heap_.begin(), heap_.end());
    }
    return false;
  }

  void merge(const Waiting& top, uint32_t merged) {
    const uint32_t left = static_cast<uint32_t>(top.pair >> 32);
    const uint32_t right = static_cast<uint32_t>(top.pair);
    for (const uint32_t w : top.words) merge_word(w, left, right, merged);
    queue_changed();
  }

 private:
  struct Pair {
    int64_t count = 0;
    uint32_t changed = 0;  // 1 + index into changed_, 0 when no word gained the pair since the last queueing
  };

  void add(uint64_t key, uint32_t word, int64_t change) {
    Pair& pair = pairs_.get(key, Pair{});
    pair.count += change * words_.count[word];
    if (change < 0) return;
    if (pair.changed == 0) {
      changed_.push_back({0, key, {}});
      pair.changed = static_cast<uint32_t>(changed_.size());
    }
    // Words come in ascending order, so a repeated one is the last.
    auto& list = changed_[pair.changed - 1].words;
    if (list.empty() || list.back() != word) list.push_back(word);
  }

  // The counts of the neighbouring pairs change; that of the merged pair itself is left as it is, because the
  // reference leaves it too and a later token with the same bytes may meet the pair again.
  void merge_word(uint32_t w, uint32_t left, uint32_t right, uint32_t merged) {
    uint32_t* s = &words_.symbols[words_.begin[w]];
    const uint32_t n = words_.length[w];
    uint32_t written = 0;
    for (uint32_t i = 0; i < n; ++i) {
      if (s[i] != left || i + 1 >= n || s[i + 1] != right) {
        s[written++] = s[i];
        continue;
      }
      if (written > 0) {
        add(pair_key(s[written - 1], left), w, -1);
        add(pair_key(s[written - 1], merged), w, 1);
      }
      if (i + 2 < n) {
        add(pair_key(right, s[i + 2]), w, -1);
        add(pair_key(merged, s[i + 2]), w, 1);
      }
      s[written++] = merged;
      ++i;
    }
    words_.length[w] = written;
  }

  void queue_changed() {
    for (Waiting& waiting : changed_) {
      Pair& pair = pairs_.get(waiting.pair, Pair{});
      pair.changed = 0;
      if (pair.count <= 0) continue;
      waiting.count = pair.count;
      heap_.push_back(std::move(waiting));
      std::push_heap(heap_.begin(), heap_.end());
    }
    changed_.clear();
  }

  Words words_;
  FlatMap<Pair> pairs_;
  std::vector<Waiting> changed_;
  std::vector<Waiting> heap_;
};

}  // namespace

void BpeTrainer::feed(std::string_view text) {
  const auto* p = reinterpret_cast<const uint8_t*>(text.data());
  const auto* end = p + text.size();
  while (p < end) {
    const size_t length = first_word(pretokenizer_, p, end);
    if (length >= UINT32_MAX) throw std::invalid_argument("a word of 4 GiB or more cannot be trained on");
    key_.assign(reinterpret_cast<const char*>(p), length);
    ++counts_[key_];
    p += length;
  }
}

std::vector<Merge> BpeTrainer::train(size_t vocab_size, const std::vector<uint32_t>& byte_ids,
                                     const std::vector<std::string>& reserved, uint64_t min_frequency) const {
  std::unordered_map<std::string, uint32_t> id_of;
  std::vector<std::string> token(256 + reserved.size());
  for (uint32_t byte = 0; byte < 256; ++byte) {
    token.at(byte_ids.at(byte)) = std::string(1, static_cast<char>(byte));
    id_of.emplace(token[byte_ids[byte]], byte_ids[byte]);
  }
  Words words;
  for (const auto& [word, count] : counts_) {
    words.begin.push_back(words.symbols.size());
    words.length.push_back(static_cast<uint32_t>(word.size()));
    words.count.push_back(count);
    for (const char byte : word) words.symbols.push_back(byte_ids[static_cast<uint8_t>(byte)]);
  }
  TrainingMerges merger(std::move(words));
  std::vector<Merge> merges;
  Waiting top;
  while (token.size() < vocab_size && merger.pop(top, static_cast<int64_t>(min_frequency))) {
    const uint32_t left = static_cast<uint32_t>(top.pair >> 32);
    const uint32_t right = static_cast<uint32_t>(top.pair);
    const std::string joined = token[left] + token[right];
    if (std::find(reserved.begin(), reserved.end(), joined) != reserved.end()) {
      throw std::invalid_argument("the training text yields the ordinary token '" + joined +
                                  "', which is also a special token: choose another text for the special token");
    }
    // Two pairs may join to the same bytes: one token, two merges.
    const auto [known, fresh] = id_of.emplace(joined, static_cast<uint32_t>(token.size()));
    if (fresh) token.push_back(joined);
    merges.push_back({left, right, known->second});
    merger.merge(top, known->second);
  }
  // A pair that was met again (through a second merge with the same bytes) has its last rank, as in the reference.
  std::unordered_set<uint64_t> seen;
  std::vector<Merge> unique;
  for (auto merge = merges.rbegin(); merge != merges.rend(); ++merge) {
    if (seen.insert(pair_key(merge->left, merge->right)).second) unique.push_back(*merge);
  }
  std::reverse(unique.begin(), unique.end());
  return unique;
}

}  // namespace tapelm::text
