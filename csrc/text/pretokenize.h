// Pre-tokenizers: cut UTF-8 text into the "words" that byte-pair merges never cross.
//
// Hand-written equivalents of two published regular expressions (no regex engine):
//   kGpt2   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   kLlama3 (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|
//           \s*[\r\n]+|\s+(?!\S)|\s+                        (also the HF form of OpenAI's cl100k)
//   kGpt2Digits: every number character is a word of its own and kGpt2 cuts what lies between (SmolLM2).
// A byte that is not part of valid UTF-8 counts as one character that is no letter, number or white space.
#pragma once

#include <cstdint>
#include <string_view>

namespace tapelm::text {

enum class Pretokenizer : int { kGpt2 = 0, kLlama3 = 1, kGpt2Digits = 2 };

// Length in bytes (> 0) of the first word of [begin, end); requires begin < end. `end` is the end of the text:
// what follows it does not exist for the look-ahead.
size_t first_word(Pretokenizer kind, const uint8_t* begin, const uint8_t* end);

}  // namespace tapelm::text
