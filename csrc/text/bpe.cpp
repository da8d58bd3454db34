#include "bpe.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace tapelm::text {
namespace {

constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kSeeds = 1u << 16;              // most tokens that an EncoderState knows from the start
constexpr size_t kKeptBuffer = size_t{1} << 20;  // ids; a thread's memory for longer words is not kept

}  // namespace

Bpe::Bpe(BpeModel model) : model_(std::move(model)) {
  const auto& tokens = model_.tokens;
  if (tokens.size() >= kNone) throw std::invalid_argument("the vocabulary has too many tokens");
  std::vector<bool> is_special(tokens.size());
  for (const uint32_t id : model_.specials) {
    if (id >= tokens.size()) throw std::invalid_argument("id " + std::to_string(id) + " is outside the vocabulary");
    const std::string& text = tokens[id];
    if (text.empty()) throw std::invalid_argument("a special token has no text");
    is_special[id] = true;
    if (special_first_bytes_.find(text[0]) == std::string::npos) special_first_bytes_ += text[0];
    for (size_t i = 1; i < text.size(); ++i) {
      if (is_safe_cut(reinterpret_cast<const uint8_t*>(&text[i]))) specials_allow_cuts_ = false;
    }
  }
  specials_ = model_.specials;
  std::stable_sort(specials_.begin(), specials_.end(),
                   [&](uint32_t a, uint32_t b) { return tokens[a].size() > tokens[b].size(); });
  uint32_t byte_ids[256];
  std::fill(std::begin(byte_ids), std::end(byte_ids), kNone);
  for (uint32_t id = 0; id < tokens.size(); ++id) {
    if (is_special[id]) continue;
    if (tokens[id].size() == 1) byte_ids[static_cast<uint8_t>(tokens[id][0])] = id;
    if (model_.ignore_merges) whole_.emplace(tokens[id], id);
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    if (byte_ids[byte] == kNone) {
      throw std::invalid_argument("the vocabulary has no token for byte " + std::to_string(byte));
    }
  }
  check_merges(is_special);
  merger_ = std::make_unique<Merger>(byte_ids, model_.merges);
  seed();
  idle_ = new IdleStates;
  give_back(borrow());  // the first call finds its state in memory that is there
}

void Bpe::check_merges(const std::vector<bool>& is_special) const {
  const auto& tokens = model_.tokens;
  const auto is_joined = [&](const std::string& whole, const std::string& left, const std::string& right) {
    return !left.empty() && !right.empty() && whole.size() == left.size() + right.size() && whole.starts_with(left) &&
           whole.ends_with(right);
  };
  for (size_t rank = 0; rank < model_.merges.size(); ++rank) {
    const Merge& merge = model_.merges[rank];
    for (const uint32_t id : {merge.left, merge.right, merge.merged}) {
      if (id >= tokens.size()) throw std::invalid_argument("id " + std::to_string(id) + " is outside the vocabulary");
    }
    if (is_special[merge.left] || is_special[merge.right] || is_special[merge.merged] ||
        !is_joined(tokens[merge.merged], tokens[merge.left], tokens[merge.right])) {
      throw std::invalid_argument("merge " + std::to_string(rank) + " does not join two tokens into a third");
    }
  }
}

// Most words of a text are tokens. Their ids are found here once, so that a first pass over a text need not.
void Bpe::seed() {
  EncoderState state;
  const size_t count = std::min(model_.tokens.size(), kSeeds);
  for (size_t id = 0; id < count; ++id) {
    const std::string& token = model_.tokens[id];
    if (token.empty() || token.size() > kShortKey) continue;
    uint8_t padded[kKeyOverread] = {};
    std::copy(token.begin(), token.end(), padded);
    const Key key = load_key(padded, token.size());
    const uint64_t hash = hash_key(key);
    if (state.short_words.find(key, hash) != nullptr) continue;
    merge_word(token, state);
    if (state.word.size() <= kShortIds) state.short_words.insert(key, hash, state.word.from(0));
  }
  known_words_ = std::move(state.short_words);
}

void Bpe::merge_word(std::string_view word, EncoderState& state) const {
  state.word.clear();
  const auto whole = model_.ignore_merges ? whole_.find(word) : whole_.end();
  if (whole != whole_.end()) return state.word.push_back(whole->second);
  merger_->encode(word, state.merge, state.word);
}

void Bpe::encode_plain(std::string_view text, EncoderState& state, IdBuffer& out) const {
  constexpr size_t kWords = 2048;
  uint32_t ends[kWords];
  const auto* p = reinterpret_cast<const uint8_t*>(text.data());
  const auto* const text_end = p + text.size();
  while (p < text_end) {
    const size_t count = split_words(model_.pretokenizer, p, text_end, ends, kWords);
    const size_t bytes = ends[count - 1];
    // One store of 16 bytes, of which only the first ids count: hence the room for some more.
    uint32_t* write = out.reserve(bytes + sizeof(ShortWords::Ids) / sizeof(uint32_t));
    out.commit(encode_words({p, text_end, ends, count}, state, write));
    p += bytes;
  }
}

// Position and id of the first special token at or after `from`, the longest where several start there; npos if none.
size_t Bpe::find_special(std::string_view text, size_t from, uint32_t& id) const {
  const bool one_byte = special_first_bytes_.size() == 1;
  while (from < text.size()) {
    from = one_byte ? text.find(special_first_bytes_[0], from) : text.find_first_of(special_first_bytes_, from);
    if (from == std::string_view::npos) break;
    for (const uint32_t special : specials_) {
      if (text.substr(from).starts_with(model_.tokens[special])) {
        id = special;
        return from;
      }
    }
    ++from;
  }
  return std::string_view::npos;
}

// `offset` is the place of `text` in the whole of it, for the message.
void Bpe::encode_text(std::string_view text, size_t offset, bool allow_special, EncoderState& state,
                      IdBuffer& out) const {
  size_t from = 0;
  uint32_t special = 0;
  for (size_t at; (at = find_special(text, from, special)) != std::string_view::npos;) {
    if (!allow_special) {
      throw std::invalid_argument("text contains the special token " + model_.tokens[special] + " at byte " +
                                  std::to_string(offset + at) + ": remove it (to be encoded as one token it " +
                                  "needs allow_special=True, which encode and encode_batch take)");
    }
    encode_plain(text.substr(from, at - from), state, out);
    out.push_back(special);
    from = at + model_.tokens[special].size();
  }
  encode_plain(text.substr(from), state, out);
}

IdleStates& Bpe::idle() const {
  IdleStates* here = idle_;
  if (here->process == ::getpid()) return *here;
  auto fresh = std::make_unique<IdleStates>();  // that of the parent is left alone
  if (idle_.compare_exchange_strong(here, fresh.get())) return *fresh.release();
  return *here;
}

std::unique_ptr<EncoderState> Bpe::borrow() const {
  IdleStates& idle = this->idle();
  {
    const std::lock_guard lock(idle.mutex);
    if (!idle.states.empty()) {
      auto state = std::move(idle.states.back());
      idle.states.pop_back();
      return state;
    }
  }
  auto state = std::make_unique<EncoderState>();
  state->short_words = known_words_;
  return state;
}

void Bpe::give_back(std::unique_ptr<EncoderState> state) const {
  if (state->merge.symbols.capacity() > kKeptBuffer) state->merge = {};
  if (state->word.size() > kKeptBuffer) state->word = {};
  IdleStates& idle = this->idle();
  const std::lock_guard lock(idle.mutex);
  idle.states.push_back(std::move(state));
}

IdBuffer Bpe::encode(std::string_view text, bool allow_special) const {
  IdBuffer ids;
  Encoder(*this).encode(text, allow_special, ids);
  ids.shrink();
  return ids;
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
