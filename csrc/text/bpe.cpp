#include "bpe.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <thread>

namespace tapelm::text {
namespace {

constexpr uint32_t kNoRank = UINT32_MAX;
constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kShortWord = 32;          // up to here a scan for the lowest rank beats a heap
constexpr size_t kCachedWord = 128;        // longer words are rare and not worth remembering
constexpr size_t kCacheBytes = 64u << 20;  // the cache starts afresh beyond this

uint64_t hash_bytes(std::string_view bytes) {
  uint64_t hash = 0x243F6A8885A308D3ull ^ bytes.size();
  const char* p = bytes.data();
  size_t left = bytes.size();
  for (; left >= 8; p += 8, left -= 8) {
    uint64_t chunk;
    std::memcpy(&chunk, p, 8);
    hash = mix(hash ^ chunk);
  }
  uint64_t tail = 0;
  std::memcpy(&tail, p, left);
  return mix(hash ^ tail);
}

// Ids of words seen before.
class WordCache {
 public:
  const uint32_t* find(std::string_view word, uint64_t hash, size_t& count) const {
    const size_t mask = slots_.size() - 1;
    for (size_t i = hash & mask; slots_[i].id_count != 0; i = (i + 1) & mask) {
      const Slot& slot = slots_[i];
      if (slot.hash == hash && slot.length == word.size() &&
          std::memcmp(bytes_.data() + slot.bytes, word.data(), word.size()) == 0) {
        count = slot.id_count;
        return ids_.data() + slot.ids;
      }
    }
    return nullptr;
  }

  void insert(std::string_view word, uint64_t hash, std::span<const uint32_t> ids) {
    if (bytes_.size() + 4 * ids_.size() + sizeof(Slot) * slots_.size() > kCacheBytes) clear();
    if (2 * (size_ + 1) > slots_.size()) grow();
    place({hash, static_cast<uint32_t>(bytes_.size()), static_cast<uint32_t>(ids_.size()),
           static_cast<uint32_t>(word.size()), static_cast<uint32_t>(ids.size())});
    bytes_.insert(bytes_.end(), word.begin(), word.end());
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    ++size_;
  }

 private:
  struct Slot {
    uint64_t hash = 0;
    uint32_t bytes = 0;  // offset into bytes_
    uint32_t ids = 0;    // offset into ids_
    uint32_t length = 0;
    uint32_t id_count = 0;  // 0: free, as no word has no ids
  };
  static constexpr size_t kFirstSlots = 1u << 12;

  void place(const Slot& slot) {
    const size_t mask = slots_.size() - 1;
    size_t i = slot.hash & mask;
    while (slots_[i].id_count != 0) i = (i + 1) & mask;
    slots_[i] = slot;
  }

  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.id_count != 0) place(slot);
    }
  }

  void clear() {
    slots_.assign(kFirstSlots, Slot{});
    bytes_.clear();
    ids_.clear();
    size_ = 0;
  }

  std::vector<Slot> slots_ = std::vector<Slot>(kFirstSlots);
  std::vector<char> bytes_;
  std::vector<uint32_t> ids_;
  size_t size_ = 0;
};

// A merge that may be carried out; the lowest rank is taken first, then the leftmost.
struct Candidate {
  uint32_t rank;
  uint32_t position;
  bool operator<(const Candidate& other) const {  // std heaps keep the greatest on top
    return rank != other.rank ? rank > other.rank : position > other.position;
  }
};

}  // namespace

struct EncoderState {
  WordCache cache;
  std::vector<uint32_t> symbols;  // ids of the word being merged
  std::vector<uint32_t> ranks;    // rank of (symbol i, next symbol), kNoRank where they do not merge
  std::vector<uint32_t> next;     // linked list over positions, used by merge_long
  std::vector<uint32_t> previous;
  std::vector<Candidate> heap;
};

Bpe::Bpe(BpeModel model) : model_(std::move(model)) {
  const auto& tokens = model_.tokens;
  if (tokens.size() >= kNone) throw std::invalid_argument("the vocabulary has too many tokens");
  const auto check = [&](uint32_t id) {
    if (id >= tokens.size()) throw std::invalid_argument("id " + std::to_string(id) + " is outside the vocabulary");
  };
  std::vector<bool> is_special(tokens.size());
  for (const uint32_t id : model_.specials) {
    check(id);
    if (tokens[id].empty()) throw std::invalid_argument("a special token has no text");
    is_special[id] = true;
    special_first_byte_[static_cast<uint8_t>(tokens[id][0])] = true;
  }
  specials_ = model_.specials;
  std::stable_sort(specials_.begin(), specials_.end(),
                   [&](uint32_t a, uint32_t b) { return tokens[a].size() > tokens[b].size(); });
  std::fill(std::begin(byte_ids_), std::end(byte_ids_), kNone);
  for (uint32_t id = 0; id < tokens.size(); ++id) {
    if (is_special[id]) continue;
    if (tokens[id].size() == 1) byte_ids_[static_cast<uint8_t>(tokens[id][0])] = id;
    if (model_.ignore_merges) whole_.emplace(tokens[id], id);
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    if (byte_ids_[byte] == kNone) {
      throw std::invalid_argument("the vocabulary has no token for byte " + std::to_string(byte));
    }
  }
  for (uint32_t rank = 0; rank < model_.merges.size(); ++rank) {
    const Merge& merge = model_.merges[rank];
    check(merge.left), check(merge.right), check(merge.merged);
    if (is_special[merge.left] || is_special[merge.right] || is_special[merge.merged] ||
        tokens[merge.left].empty() || tokens[merge.right].empty() ||
        tokens[merge.merged] != tokens[merge.left] + tokens[merge.right]) {
      throw std::invalid_argument("merge " + std::to_string(rank) + " does not join two tokens into a third");
    }
    // A pair listed twice has its last rank.
    ranks_.get(pair_key(merge.left, merge.right), rank) = rank;
  }
}

Bpe::~Bpe() = default;

inline uint32_t Bpe::rank_of(uint32_t left, uint32_t right) const {
  const uint32_t* rank = ranks_.find(pair_key(left, right));
  return rank ? *rank : kNoRank;
}

// Quadratic in the (small) number of symbols, with one pass per merge over a few cache lines.
void Bpe::merge_short(EncoderState& state, std::vector<uint32_t>& out) const {
  uint32_t* symbols = state.symbols.data();
  uint32_t* ranks = state.ranks.data();
  size_t n = state.symbols.size();
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = rank_of(symbols[i], symbols[i + 1]);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (ranks[i] < ranks[best]) best = i;
    }
    if (ranks[best] == kNoRank) break;
    symbols[best] = model_.merges[ranks[best]].merged;
    std::copy(symbols + best + 2, symbols + n, symbols + best + 1);
    std::copy(ranks + best + 1, ranks + n - 1, ranks + best);
    --n;
    if (best > 0) ranks[best - 1] = rank_of(symbols[best - 1], symbols[best]);
    if (best + 1 < n) ranks[best] = rank_of(symbols[best], symbols[best + 1]);
  }
  out.insert(out.end(), symbols, symbols + n);
}

// O(n log n): a heap of candidate merges over a doubly linked list. A candidate is stale, and skipped, when the pair
// at its position has another rank by now.
void Bpe::merge_long(EncoderState& state, std::vector<uint32_t>& out) const {
  auto &symbols = state.symbols, &ranks = state.ranks, &next = state.next, &previous = state.previous;
  auto& heap = state.heap;
  const uint32_t n = static_cast<uint32_t>(symbols.size());
  next.resize(n);
  previous.resize(n);
  heap.clear();
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
    const Candidate top = heap.front();
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    if (ranks[top.position] != top.rank) continue;
    const uint32_t eaten = next[top.position];
    symbols[top.position] = model_.merges[top.rank].merged;
    ranks[eaten] = kNoRank;
    next[top.position] = next[eaten];
    if (next[eaten] != kNone) previous[next[eaten]] = top.position;
    update(top.position);
    if (previous[top.position] != kNone) update(previous[top.position]);
  }
  for (uint32_t i = 0; i != kNone; i = next[i]) out.push_back(symbols[i]);
}

void Bpe::encode_word(std::string_view word, EncoderState& state, std::vector<uint32_t>& out) const {
  if (word.size() == 1) {
    out.push_back(byte_ids_[static_cast<uint8_t>(word[0])]);
    return;
  }
  const bool cached = word.size() <= kCachedWord;
  const uint64_t hash = cached ? hash_bytes(word) : 0;
  if (cached) {
    size_t count = 0;
    if (const uint32_t* ids = state.cache.find(word, hash, count)) {
      out.insert(out.end(), ids, ids + count);
      return;
    }
  }
  const size_t first = out.size();
  const auto whole = model_.ignore_merges ? whole_.find(word) : whole_.end();
  if (whole != whole_.end()) {
    out.push_back(whole->second);
  } else {
    if (word.size() >= kNone) throw std::invalid_argument("a word of 4 GiB or more cannot be encoded");
    state.symbols.resize(word.size());
    state.ranks.resize(word.size());
    for (size_t i = 0; i < word.size(); ++i) state.symbols[i] = byte_ids_[static_cast<uint8_t>(word[i])];
    word.size() <= kShortWord ? merge_short(state, out) : merge_long(state, out);
  }
  if (cached) state.cache.insert(word, hash, {out.data() + first, out.size() - first});
}

void Bpe::encode_plain(std::string_view text, EncoderState& state, std::vector<uint32_t>& out) const {
  const auto* p = reinterpret_cast<const uint8_t*>(text.data());
  const auto* end = p + text.size();
  while (p < end) {
    const size_t length = first_word(model_.pretokenizer, p, end);
    encode_word({reinterpret_cast<const char*>(p), length}, state, out);
    p += length;
  }
}

// Position and id of the first special token at or after `from`, the longest where several start there; npos if none.
size_t Bpe::find_special(std::string_view text, size_t from, uint32_t& id) const {
  if (specials_.empty()) return std::string_view::npos;
  for (size_t i = from; i < text.size(); ++i) {
    if (!special_first_byte_[static_cast<uint8_t>(text[i])]) continue;
    for (const uint32_t special : specials_) {
      if (text.substr(i).starts_with(model_.tokens[special])) {
        id = special;
        return i;
      }
    }
  }
  return std::string_view::npos;
}

void Bpe::encode_text(std::string_view text, bool allow_special, EncoderState& state,
                      std::vector<uint32_t>& out) const {
  size_t from = 0;
  uint32_t special = 0;
  for (size_t at; (at = find_special(text, from, special)) != std::string_view::npos;) {
    if (!allow_special) {
      throw std::invalid_argument("text contains the special token " + model_.tokens[special] + " at byte " +
                                  std::to_string(at) + ": pass allow_special=True to encode it as one token, or " +
                                  "remove it");
    }
    encode_plain(text.substr(from, at - from), state, out);
    out.push_back(special);
    from = at + model_.tokens[special].size();
  }
  encode_plain(text.substr(from), state, out);
}

std::unique_ptr<EncoderState> Bpe::borrow() const {
  const std::lock_guard lock(mutex_);
  if (idle_.empty()) return std::make_unique<EncoderState>();
  auto state = std::move(idle_.back());
  idle_.pop_back();
  return state;
}

void Bpe::give_back(std::unique_ptr<EncoderState> state) const {
  const std::lock_guard lock(mutex_);
  idle_.push_back(std::move(state));
}

std::vector<uint32_t> Bpe::encode(std::string_view text, bool allow_special) const {
  std::vector<uint32_t> ids;
  auto state = borrow();
  encode_text(text, allow_special, *state, ids);
  give_back(std::move(state));
  return ids;
}

EncodedBatch Bpe::encode_batch(std::span<const std::string_view> texts, bool allow_special, unsigned threads) const {
  std::vector<std::vector<uint32_t>> parts(texts.size());
  std::vector<std::exception_ptr> faults(texts.size());
  std::atomic<size_t> taken{0};
  const auto work = [&] {
    auto state = borrow();
    for (size_t i; (i = taken.fetch_add(1)) < texts.size();) {
      try {
        encode_text(texts[i], allow_special, *state, parts[i]);
      } catch (const std::exception&) {
        faults[i] = std::current_exception();  // rethrown below, on the calling thread
      }
    }
    give_back(std::move(state));
  };
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  {
    std::vector<std::jthread> pool;
    for (size_t t = 1; t < std::min<size_t>(threads, texts.size()); ++t) pool.emplace_back(work);
    work();
  }
  EncodedBatch batch;
  batch.offsets.reserve(texts.size() + 1);
  batch.offsets.push_back(0);
  for (size_t i = 0; i < texts.size(); ++i) {
    if (faults[i]) std::rethrow_exception(faults[i]);
    batch.offsets.push_back(batch.offsets.back() + parts[i].size());
  }
  batch.ids.reserve(batch.offsets.back());
  for (auto& part : parts) {
    batch.ids.insert(batch.ids.end(), part.begin(), part.end());
    std::vector<uint32_t>().swap(part);
  }
  return batch;
}

std::string Bpe::decode(std::span<const uint32_t> ids) const {
  size_t bytes = 0;
  for (const uint32_t id : ids) {
    if (id >= vocab_size()) {
      throw std::invalid_argument("id " + std::to_string(id) + " is outside the vocabulary of " +
                                  std::to_string(vocab_size()) + " tokens");
    }
    bytes += model_.tokens[id].size();
  }
  std::string text;
  text.reserve(bytes);
  for (const uint32_t id : ids) text += model_.tokens[id];
  return text;
}

}  // namespace tapelm::text
