// Word ends of ASCII text found 64 bytes at a time with bit masks (one bit per byte).
#pragma once

#include <cstddef>
#include <cstdint>

namespace tapelm::text {

inline constexpr size_t kSplitSlack = 80;  // ends for which there must be room, as a block is written in one go

// Splits as Pretokenizer::kGpt2 does from the word beginning `begin` on, until the text ends, a non-ASCII character
// comes up, or `capacity` (at least kSplitSlack) ends are nearly written; `end` is the end of the text. Writes the
// ends as offsets from `base` and returns how many; words around a non-ASCII character are left to the caller.
using AsciiSplitter = size_t (*)(const uint8_t* begin, const uint8_t* end, const uint8_t* base, uint32_t* ends,
                                 size_t capacity);

// The one for this machine, or nullptr where there is none.
AsciiSplitter gpt2_ascii_splitter();

}  // namespace tapelm::text
