// Pre-tokenizers: cut UTF-8 text into the "words" that byte-pair merges never cross.
//
// Hand-written equivalents of three published regular expressions (no regex engine):
//   kGpt2   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   kLlama3 (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|
//           \s*[\r\n]+|\s+(?!\S)|\s+                        (also the HF form of OpenAI's cl100k)
//   kGpt2Digits: every number character is a word of its own and kGpt2 cuts what lies between (SmolLM2).
//   kO200k  with upper = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], lower = [\p{Ll}\p{Lm}\p{Lo}\p{M}], c = kLlama3's (?i:...)?:
//           [^\r\n\p{L}\p{N}]?[upper]*[lower]+c|[^\r\n\p{L}\p{N}]?[upper]+[lower]*c|\p{N}{1,3}|
//            ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+                  (OpenAI's o200k)
// A byte that is not part of valid UTF-8 counts as one character that is no letter, number or white space.
#pragma once

#include <cstdint>
#include <string_view>

namespace tapelm::text {

enum class Pretokenizer : int { kGpt2 = 0, kLlama3 = 1, kGpt2Digits = 2, kO200k = 3 };

// Length in bytes (> 0) of the first word of [begin, end); requires begin < end. `end` is the end of the text:
// what follows it does not exist for the look-ahead.
size_t first_word(Pretokenizer kind, const uint8_t* begin, const uint8_t* end);

inline constexpr size_t kMinWords = 128;  // least capacity of split_words

// Writes the ends, as offsets from `begin`, of the first words of [begin, end) until the text ends or `capacity` (at
// least kMinWords) are nearly written, and returns how many: at least one when begin < end. Throws
// std::invalid_argument on a word of 2 GiB or more.
size_t split_words(Pretokenizer kind, const uint8_t* begin, const uint8_t* end, uint32_t* ends, size_t capacity);

// Whether a word begins at `p` whatever the text before it is, and the words before it do not depend on what follows:
// a blank after an ASCII letter or digit. Requires that p[-1] exists.
inline bool is_safe_cut(const uint8_t* p) {
  return *p == ' ' && (static_cast<uint8_t>((p[-1] | 0x20) - 'a') < 26 || static_cast<uint8_t>(p[-1] - '0') < 10);
}

}  // namespace tapelm::text
