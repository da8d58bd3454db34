#include "encode_files.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "jsonl.h"

namespace tapelm::text {
namespace {

// Puts together a TokenBlock, one text at a time, so that what a text needs stays in the cache.
class BlockWriter {
 public:
  BlockWriter(const Bpe& bpe, TokenFormat format, size_t bytes, bool continued)
      : encoder_(bpe), format_(format), begins_(!continued) {
    block_.tokens.reserve(bytes / 3 * format.token_bytes);
  }

  void add(std::string_view text, bool ends) {
    if (begins_) block_.starts.push_back(block_.tokens.size() / format_.token_bytes);
    begins_ = ends;
    ids_.clear();
    encoder_.encode(text, false, ids_);
    if (ends) ids_.push_back(format_.end_of_text);
    format_.token_bytes == 2 ? store<uint16_t>() : store<uint32_t>();
  }

  TokenBlock take() { return std::move(block_); }

 private:
  template <typename Token>
  void store() {
    const size_t before = block_.tokens.size();
    block_.tokens.resize(before + ids_.size() * sizeof(Token));
    auto* const out = reinterpret_cast<Token*>(block_.tokens.data() + before);
    const uint32_t* const ids = ids_.data();
    for (size_t i = 0; i < ids_.size(); ++i) out[i] = static_cast<Token>(ids[i]);
  }

  Bpe::Encoder encoder_;
  const TokenFormat format_;
  bool begins_;
  IdBuffer ids_;
  TokenBlock block_;
};

bool is_ascii_space(uint8_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

bool is_ascii_word(uint8_t c) { return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z'); }

// Whether a non-ASCII character of three bytes, or two and whatever follows, is Unicode white space.
bool is_wide_space(const uint8_t* c) {
  switch (c[0]) {
    case 0xC2: return c[1] == 0x85 || c[1] == 0xA0;
    case 0xE1: return c[1] == 0x9A && c[2] == 0x80;
    case 0xE2:
      if (c[1] == 0x80) return c[2] <= 0x8A || c[2] == 0xA8 || c[2] == 0xA9 || c[2] == 0xAF;
      return c[1] == 0x81 && c[2] == 0x9F;
    case 0xE3: return c[1] == 0x80 && c[2] == 0x80;
    default: return false;
  }
}

// Every splitting ends a word between an ASCII letter or digit and white space, without looking further. It also ends
// one after a line end that has no white space around it and no slash behind it.
bool splits_at(const uint8_t* text, size_t at) {
  if (is_ascii_word(text[at - 1]) && is_ascii_space(text[at])) return true;
  if (at < 2 || text[at - 1] != '\n' || is_ascii_space(text[at]) || text[at] == '/') return false;
  if (is_ascii_space(text[at - 2])) return false;
  size_t lead = at - 2;
  while (lead > 0 && (text[lead] & 0xC0) == 0x80) --lead;
  return !is_wide_space(text + lead) && !is_wide_space(text + at);
}

}  // namespace

TokenBlock encode_lines(const Bpe& bpe, std::string_view lines, TokenFormat format, const Place& place) {
  BlockWriter block(bpe, format, lines.size(), false);
  std::string unescaped;
  for (size_t from = 0, number = 0; from < lines.size(); ++number) {
    const size_t end = std::min(lines.find('\n', from), lines.size());
    std::string_view text;
    try {
      text = text_field(lines.substr(from, end - from), unescaped);
    } catch (const std::invalid_argument& fault) {
      throw std::invalid_argument(place(number) + " " + fault.what());
    }
    try {
      block.add(text, true);
    } catch (const std::invalid_argument& fault) {
      throw std::invalid_argument(place(number) + ": " + fault.what());
    }
    from = end + 1;
  }
  return block.take();
}

TokenBlock encode_pieces(const Bpe& bpe, std::span<const std::string_view> pieces, const std::vector<bool>& ends,
                         bool continued, TokenFormat format, const Place& place) {
  if (ends.size() != pieces.size()) throw std::invalid_argument("ends must have an element for every piece");
  size_t bytes = 0;
  for (const std::string_view piece : pieces) bytes += piece.size();
  BlockWriter block(bpe, format, bytes, continued);
  for (size_t i = 0; i < pieces.size(); ++i) {
    const size_t valid = valid_utf8(pieces[i]);
    if (valid != pieces[i].size()) {
      throw std::invalid_argument(place(i) + " is not UTF-8: invalid at byte " + std::to_string(valid) +
                                  ", convert it first");
    }
    try {
      block.add(pieces[i], ends[i]);
    } catch (const std::invalid_argument& fault) {
      throw std::invalid_argument(place(i) + ": " + fault.what());
    }
  }
  return block.take();
}

size_t safe_cut(std::string_view text, std::span<const std::string> specials) {
  size_t margin = 4;  // what must be known behind the cut: a character, or the rest of a special token
  for (const std::string& special : specials) margin = std::max(margin, special.size());
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  const auto cuts_a_special = [&](size_t at) {
    return std::any_of(specials.begin(), specials.end(), [&](const std::string& special) {
      for (size_t back = 1; back < special.size() && back <= at; ++back) {
        if (text.substr(at - back).starts_with(special)) return true;
      }
      return false;
    });
  };
  for (size_t at = text.size() > margin ? text.size() - margin : 0; at > 0; --at) {
    if (splits_at(bytes, at) && !cuts_a_special(at)) return at;
  }
  return 0;
}

}  // namespace tapelm::text
