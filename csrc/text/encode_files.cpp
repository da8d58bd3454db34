#include "encode_files.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "jsonl.h"

namespace tapelm::text {
namespace {

template <typename Token>
void store(const EncodedBatch& batch, const std::vector<bool>& ends, bool continued, uint32_t end_of_text,
           TokenBlock& block) {
  const size_t texts = batch.offsets.size() - 1;
  const auto documents = static_cast<size_t>(std::count(ends.begin(), ends.end(), true));
  block.tokens.resize((batch.ids.size() + documents) * sizeof(Token));
  auto* const first = reinterpret_cast<Token*>(block.tokens.data());
  Token* out = first;
  bool begins = !continued;
  for (size_t i = 0; i < texts; ++i) {
    if (begins) block.starts.push_back(static_cast<uint64_t>(out - first));
    out = std::transform(batch.ids.data() + batch.offsets[i], batch.ids.data() + batch.offsets[i + 1], out,
                         [](uint32_t id) { return static_cast<Token>(id); });
    begins = ends[i];
    if (begins) *out++ = static_cast<Token>(end_of_text);
  }
}

TokenBlock encode(const Bpe& bpe, std::span<const std::string_view> texts, const std::vector<bool>& ends,
                  bool continued, TokenFormat format, const Place& place) {
  EncodedBatch batch;
  try {
    batch = bpe.encode_batch(texts, false, 1);
  } catch (const std::invalid_argument& fault) {
    for (size_t i = 0; i < texts.size(); ++i) {
      try {
        bpe.encode(texts[i], false);
      } catch (const std::invalid_argument& at_fault) {
        throw std::invalid_argument(place(i) + ": " + at_fault.what());
      }
    }
    throw;
  }
  TokenBlock block;
  if (format.token_bytes == 2) {
    store<uint16_t>(batch, ends, continued, format.end_of_text, block);
  } else {
    store<uint32_t>(batch, ends, continued, format.end_of_text, block);
  }
  return block;
}

bool is_ascii_space(uint8_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

bool is_ascii_word(uint8_t c) { return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z'); }

// Whether the bytes of a non-ASCII character may be Unicode white space: all of it starts with one of these two bytes.
bool may_be_space(uint8_t first, uint8_t second) {
  return (first == 0xC2 && (second == 0x85 || second == 0xA0)) || (first == 0xE1 && second == 0x9A) ||
         (first == 0xE2 && (second == 0x80 || second == 0x81)) || (first == 0xE3 && second == 0x80);
}

// Every splitting ends a word between an ASCII letter or digit and white space, without looking further. It also ends
// one after a line end that has no white space around it and no slash behind it.
bool splits_at(const uint8_t* text, size_t at) {
  if (is_ascii_word(text[at - 1]) && is_ascii_space(text[at])) return true;
  if (at < 2 || text[at - 1] != '\n' || is_ascii_space(text[at]) || text[at] == '/') return false;
  if (is_ascii_space(text[at - 2])) return false;
  size_t lead = at - 2;
  while (lead > 0 && (text[lead] & 0xC0) == 0x80) --lead;
  return !may_be_space(text[lead], text[lead + 1]) && !may_be_space(text[at], text[at + 1]);
}

}  // namespace

TokenBlock encode_lines(const Bpe& bpe, std::string_view lines, TokenFormat format, const Place& place) {
  std::vector<std::string_view> rows;
  for (size_t from = 0; from < lines.size();) {
    const size_t end = std::min(lines.find('\n', from), lines.size());
    rows.push_back(lines.substr(from, end - from));
    from = end + 1;
  }
  std::vector<std::string_view> texts(rows.size());
  std::vector<std::string> unescaped(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    try {
      texts[i] = text_field(rows[i], unescaped[i]);
    } catch (const std::invalid_argument& fault) {
      throw std::invalid_argument(place(i) + " " + fault.what());
    }
  }
  return encode(bpe, texts, std::vector<bool>(texts.size(), true), false, format, place);
}

TokenBlock encode_pieces(const Bpe& bpe, std::span<const std::string_view> pieces, const std::vector<bool>& ends,
                         bool continued, TokenFormat format, const Place& place) {
  if (ends.size() != pieces.size()) throw std::invalid_argument("ends must have an element for every piece");
  for (size_t i = 0; i < pieces.size(); ++i) {
    const size_t valid = valid_utf8(pieces[i]);
    if (valid != pieces[i].size()) {
      throw std::invalid_argument(place(i) + " is not UTF-8: invalid at byte " + std::to_string(valid));
    }
  }
  return encode(bpe, pieces, ends, continued, format, place);
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
