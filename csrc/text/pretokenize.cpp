#include "pretokenize.h"

#include <array>
#include <stdexcept>

#include "split_ascii.h"
#include "unicode_tables.h"

namespace tapelm::text {
namespace {

constexpr int kWordsBetween = 8;                   // words cut one by one before masks are tried again
constexpr ptrdiff_t kMaxSpan = ptrdiff_t{1} << 31;  // ends must fit into 32 bits

enum Class : uint8_t { kOther = 0, kLetter = 1, kNumber = 2, kSpace = 3 };

// Bits: what a character may be in a run of letters of one case. Letters without case, and marks, may be either.
enum Case : uint8_t { kUpper = 1, kLower = 2 };

struct Character {
  Class kind;
  uint8_t bytes;
  uint8_t cases;
};

constexpr uint8_t look_up(const uint8_t* index, const uint8_t* blocks, uint32_t code_point) {
  const uint32_t block = index[code_point >> 8];
  const uint8_t packed = blocks[block * 64 + ((code_point & 0xFF) >> 2)];
  return (packed >> (2 * (code_point & 3))) & 3;
}

inline Character character(uint32_t code_point, uint8_t bytes) {
  return {static_cast<Class>(look_up(kClassIndex, kClassBlocks, code_point)), bytes,
          look_up(kCaseIndex, kCaseBlocks, code_point)};
}

constexpr std::array<uint8_t, 128> make_ascii(const uint8_t* index, const uint8_t* blocks) {
  std::array<uint8_t, 128> values{};
  for (uint32_t c = 0; c < 128; ++c) values[c] = look_up(index, blocks, c);
  return values;
}

constexpr std::array<uint8_t, 128> kAscii = make_ascii(kClassIndex, kClassBlocks);
constexpr std::array<uint8_t, 128> kAsciiCases = make_ascii(kCaseIndex, kCaseBlocks);

inline bool continues(uint8_t byte) { return (byte & 0xC0) == 0x80; }

// Strict UTF-8: overlong forms, surrogates and values above U+10FFFF are invalid bytes, each one kOther.
Character decode_non_ascii(const uint8_t* p, const uint8_t* end) {
  constexpr Character invalid{kOther, 1, 0};
  const uint8_t lead = p[0];
  const size_t left = static_cast<size_t>(end - p);
  if (lead < 0xC2 || lead > 0xF4) return invalid;
  if (lead < 0xE0) {
    if (left < 2 || !continues(p[1])) return invalid;
    return character((lead & 0x1Fu) << 6 | (p[1] & 0x3Fu), 2);
  }
  if (lead < 0xF0) {
    if (left < 3 || !continues(p[1]) || !continues(p[2])) return invalid;
    const uint32_t c = (lead & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    if (c < 0x800 || (c >= 0xD800 && c < 0xE000)) return invalid;
    return character(c, 3);
  }
  if (left < 4 || !continues(p[1]) || !continues(p[2]) || !continues(p[3])) return invalid;
  const uint32_t c = (lead & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
  if (c < 0x10000 || c > 0x10FFFF) return invalid;
  return character(c, 4);
}

inline Character at(const uint8_t* p, const uint8_t* end) {
  if (*p < 0x80) [[likely]] return {static_cast<Class>(kAscii[*p]), 1, kAsciiCases[*p]};
  return decode_non_ascii(p, end);
}

// First position in [p, end) whose character is not of class `kind`.
template <Class kind>
inline const uint8_t* skip(const uint8_t* p, const uint8_t* end) {
  while (p < end) {
    const Character c = at(p, end);
    if (c.kind != kind) break;
    p += c.bytes;
  }
  return p;
}

inline const uint8_t* skip_class(Class kind, const uint8_t* p, const uint8_t* end) {
  switch (kind) {
    case kLetter: return skip<kLetter>(p, end);
    case kNumber: return skip<kNumber>(p, end);
    case kSpace: return skip<kSpace>(p, end);
    case kOther: break;
  }
  return skip<kOther>(p, end);
}

inline bool is_newline(uint8_t byte) { return byte == '\r' || byte == '\n'; }

// \s+(?!\S)|\s+ : the whole run at the end of the text, else all but its last character, which belongs to the
// next word; a single white-space character stands alone. `p` is at white space. With `digits`, a number ends the
// text.
template <bool digits>
const uint8_t* space_run(const uint8_t* p, const uint8_t* end) {
  const uint8_t* last = p;
  const uint8_t* q = p;
  while (q < end) {
    const Character c = at(q, end);
    if (digits && c.kind == kNumber) return q;
    if (c.kind != kSpace) return last == p ? q : last;
    last = q;
    q += c.bytes;
  }
  return end;
}

// End of 's 't 'm 'd 're 've 'll at the apostrophe p, or nullptr. With `fold`, case is ignored as Unicode has it:
// U+017F (long s, bytes C5 BF) equals s.
inline const uint8_t* contraction(const uint8_t* p, const uint8_t* end, bool fold) {
  if (end - p < 2) return nullptr;
  const uint8_t bit = fold ? 0x20 : 0x00;
  const uint8_t a = p[1] | bit;
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
  if (end - p < 3) return nullptr;
  if (fold && p[1] == 0xC5 && p[2] == 0xBF) return p + 3;
  const uint8_t b = p[2] | bit;
  if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return p + 3;
  return nullptr;
}

template <bool digits>
const uint8_t* gpt2(const uint8_t* p, const uint8_t* end) {
  if (*p == '\'') {
    if (const uint8_t* q = contraction(p, end, false)) return q;
  }
  const Character first = at(p, end);
  if (digits && first.kind == kNumber) return p + first.bytes;
  if (*p == ' ' && p + 1 < end) {
    const Character second = at(p + 1, end);
    if (digits && second.kind == kNumber) return p + 1;
    if (second.kind != kSpace) return skip_class(second.kind, p + 1 + second.bytes, end);
  }
  if (first.kind == kSpace) return space_run<digits>(p, end);
  return skip_class(first.kind, p + first.bytes, end);
}

// With `slashes`, a slash counts as a newline here.
template <bool slashes>
const uint8_t* others_then_newlines(const uint8_t* p, const uint8_t* end) {
  p = skip<kOther>(p, end);
  while (p < end && (is_newline(*p) || (slashes && *p == '/'))) ++p;
  return p;
}

// \p{N}{1,3} : `next` is behind the first of them.
const uint8_t* up_to_three_digits(const uint8_t* next, const uint8_t* end) {
  for (int digits = 1; digits < 3 && next < end; ++digits) {
    const Character c = at(next, end);
    if (c.kind != kNumber) break;
    next += c.bytes;
  }
  return next;
}

// \s*[\r\n]+|\s+(?!\S)|\s+ : up to and with the last newline of the run, where there is one.
const uint8_t* space_run_with_newlines(const uint8_t* p, const uint8_t* end) {
  for (const uint8_t* q = skip<kSpace>(p, end); q > p; --q) {
    if (is_newline(q[-1])) return q;
  }
  return space_run<false>(p, end);
}

const uint8_t* llama3(const uint8_t* p, const uint8_t* end) {
  if (*p == '\'') {
    if (const uint8_t* q = contraction(p, end, true)) return q;
  }
  const Character first = at(p, end);
  const uint8_t* next = p + first.bytes;
  if (first.kind == kLetter) return skip<kLetter>(next, end);
  if (first.kind == kNumber) return up_to_three_digits(next, end);
  const Class second = next < end ? at(next, end).kind : kSpace;
  if (second == kLetter && !is_newline(*p)) return skip<kLetter>(next, end);
  if (first.kind == kOther) return others_then_newlines<false>(next, end);
  if (*p == ' ' && second == kOther) return others_then_newlines<false>(next, end);
  return space_run_with_newlines(p, end);
}

// [upper]*[lower]+ where that matches, else [upper]+ (unless `must_be_lower`), with the contraction behind it; nullptr
// where nothing matches.
// Greedy runs that give back only what they must: without a lower-case letter behind the upper ones, the word ends
// with the last of them that may be lower.
const uint8_t* cased_letters(const uint8_t* p, const uint8_t* end, bool must_be_lower) {
  const uint8_t* q = p;
  const uint8_t* last_either = nullptr;
  while (q < end) {
    const Character c = at(q, end);
    if (!(c.cases & kUpper)) break;
    q += c.bytes;
    if (c.cases & kLower) last_either = q;
  }
  const uint8_t* const upper_end = q;
  while (q < end) {
    const Character c = at(q, end);
    if (!(c.cases & kLower)) break;
    q += c.bytes;
  }
  if (q == p) return nullptr;
  if (q == upper_end) {
    if (last_either == nullptr && must_be_lower) return nullptr;
    if (last_either != nullptr) q = last_either;
  }
  if (q < end && *q == '\'') {
    if (const uint8_t* behind = contraction(q, end, true)) return behind;
  }
  return q;
}

const uint8_t* o200k(const uint8_t* p, const uint8_t* end) {
  const Character first = at(p, end);
  const uint8_t* next = p + first.bytes;
  if (first.kind == kNumber) return up_to_three_digits(next, end);
  // One character that is no letter may lead the letters. A mark may be the only lower one itself, which the pattern
  // prefers to being led by.
  if (first.kind != kLetter && !is_newline(*p)) {
    if (const uint8_t* q = cased_letters(next, end, first.cases != 0)) return q;
  }
  if (first.cases != 0) return cased_letters(p, end, false);
  if (first.kind == kOther) return others_then_newlines<true>(next, end);
  if (*p == ' ' && next < end && at(next, end).kind == kOther) return others_then_newlines<true>(next, end);
  return space_run_with_newlines(p, end);
}

}  // namespace

size_t first_word(Pretokenizer kind, const uint8_t* begin, const uint8_t* end) {
  switch (kind) {
    case Pretokenizer::kLlama3: return static_cast<size_t>(llama3(begin, end) - begin);
    case Pretokenizer::kGpt2Digits: return static_cast<size_t>(gpt2<true>(begin, end) - begin);
    case Pretokenizer::kO200k: return static_cast<size_t>(o200k(begin, end) - begin);
    case Pretokenizer::kGpt2: break;
  }
  return static_cast<size_t>(gpt2<false>(begin, end) - begin);
}

size_t split_words(Pretokenizer kind, const uint8_t* begin, const uint8_t* end, uint32_t* ends, size_t capacity) {
  static_assert(kMinWords >= kSplitSlack + kWordsBetween);
  static const AsciiSplitter ascii = gpt2_ascii_splitter();
  const bool by_masks = kind == Pretokenizer::kGpt2 && ascii != nullptr;
  const uint8_t* p = begin;
  size_t count = 0;
  while (p < end && capacity - count >= kMinWords && p - begin < kMaxSpan) {
    if (by_masks) {
      const size_t found = ascii(p, end, begin, ends + count, capacity - count);
      count += found;
      if (found > 0) p = begin + ends[count - 1];
      if (capacity - count < kMinWords) break;
    }
    for (int i = 0; i < kWordsBetween && p < end && p - begin < kMaxSpan; ++i) {
      const size_t length = first_word(kind, p, end);
      if (length > static_cast<size_t>(UINT32_MAX - kMaxSpan))
        throw std::invalid_argument("text holds a word of 2 GiB or more");
      p += length;
      ends[count++] = static_cast<uint32_t>(p - begin);
    }
  }
  return count;
}

}  // namespace tapelm::text
