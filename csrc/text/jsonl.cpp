#include "jsonl.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>

namespace tapelm::text {
namespace {

constexpr int kMaxDepth = 500;
constexpr const char* kInvalid = "is not valid JSON";

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

constexpr size_t kBlock = 64;  // bytes looked at in one go
using Sixteen [[gnu::vector_size(16)]] = uint8_t;

Sixteen ends_of_runs(const char* p) {
  Sixteen bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return (bytes == '"') | (bytes == '\\') | (bytes < 0x20);
}

// Where a run of plain characters of a JSON string ends, at a quote, a backslash, a control character or at `end`.
const char* end_of_run(const char* p, const char* end) {
  for (; end - p >= static_cast<ptrdiff_t>(4 * sizeof(Sixteen)); p += 4 * sizeof(Sixteen)) {
    const Sixteen any = ends_of_runs(p) | ends_of_runs(p + 16) | ends_of_runs(p + 32) | ends_of_runs(p + 48);
    uint64_t halves[2];
    std::memcpy(halves, &any, sizeof halves);
    if ((halves[0] | halves[1]) != 0) break;
  }
  for (; end - p >= static_cast<ptrdiff_t>(sizeof(Sixteen)); p += sizeof(Sixteen)) {
    const Sixteen ends = ends_of_runs(p);
    uint64_t halves[2];
    std::memcpy(halves, &ends, sizeof halves);
    if ((halves[0] | halves[1]) == 0) continue;
    const int bits = halves[0] != 0 ? std::countr_zero(halves[0]) : 64 + std::countr_zero(halves[1]);
    return p + bits / 8;  // little-endian, as shards.cpp demands
  }
  while (p < end && *p != '"' && *p != '\\' && static_cast<uint8_t>(*p) >= 0x20) ++p;
  return p;
}

bool is_ascii(const uint8_t* p) {
  uint64_t words[kBlock / 8], any = 0;
  std::memcpy(words, p, kBlock);
  for (const uint64_t word : words) any |= word;
  return (any & 0x8080808080808080ull) == 0;
}

// Bytes of the UTF-8 character at p, 0 where there is none.
size_t character(const uint8_t* p, size_t left) {
  const auto follows = [&](size_t i) { return i < left && (p[i] & 0xC0) == 0x80; };
  if (p[0] < 0x80) return 1;
  if (p[0] < 0xC2 || p[0] > 0xF4 || !follows(1)) return 0;
  if (p[0] < 0xE0) return 2;
  if (!follows(2) || (p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F)) return 0;
  if (p[0] < 0xF0) return 3;
  return follows(3) && !(p[0] == 0xF0 && p[1] < 0x90) && !(p[0] == 0xF4 && p[1] > 0x8F) ? 4 : 0;
}

void append_utf8(uint32_t c, std::string& out) {
  if (c < 0x80) {
    out += static_cast<char>(c);
    return;
  }
  const auto tail = [&](int shift) { out += static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x800) {
    out += static_cast<char>(0xC0 | c >> 6);
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | c >> 12), tail(6);
  } else {
    out += static_cast<char>(0xF0 | c >> 18), tail(12), tail(6);
  }
  tail(0);
}

// A recursive-descent reader that keeps nothing but the strings it is asked for.
class Reader {
 public:
  explicit Reader(std::string_view line) : p_(line.data()), end_(line.data() + line.size()) {}

  // In the line itself, or where it has escapes, in `unescaped`.
  std::string_view text(std::string& unescaped) {
    space();
    std::optional<std::string_view> found;
    bool lone = false;
    if (peek() == '{') {
      object([&](const std::string& name) {
        if (name != "text") return value(1);
        found.reset();
        if (peek() != '"') return value(1);
        std::string_view whole;
        lone = string(&unescaped, &whole);
        found = whole.data() != nullptr ? whole : std::string_view(unescaped);
      });
    } else {
      value(0);
    }
    space();
    if (p_ != end_) fail(kInvalid);
    if (!found) fail("has no \"text\" that is a string");
    if (lone) fail("contains a lone surrogate (half of a UTF-16 pair) in its \"text\", which is no character");
    return *found;
  }

 private:
  char peek() const { return p_ < end_ ? *p_ : '\0'; }
  void space() {
    while (p_ < end_ && (*p_ == ' ' || *p_ == '\n' || *p_ == '\r' || *p_ == '\t')) ++p_;
  }
  bool accept(char c) {
    if (p_ == end_ || *p_ != c) return false;
    ++p_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail(kInvalid);
  }

  template <typename Member>
  void object(const Member& member) {
    expect('{');
    space();
    if (accept('}')) return;
    std::string name;
    do {
      space();
      if (string(&name)) name.clear();  // half of a UTF-16 pair is in no name that is asked for
      space();
      expect(':');
      space();
      member(name);
      space();
    } while (accept(','));
    expect('}');
  }

  void value(int depth) {
    if (depth > kMaxDepth) fail("nests too deeply");
    switch (peek()) {
      case '{': return object([&](const std::string&) { value(depth + 1); });
      case '"': return static_cast<void>(string(nullptr));
      case '[':
        ++p_;
        space();
        if (accept(']')) return;
        do {
          space();
          value(depth + 1);
          space();
        } while (accept(','));
        return expect(']');
      default: break;
    }
    const std::string_view rest(p_, static_cast<size_t>(end_ - p_));
    for (const std::string_view word : {"true", "false", "null", "NaN", "Infinity", "-Infinity"}) {
      if (rest.starts_with(word)) {
        p_ += word.size();
        return;
      }
    }
    number();
  }

  void digits() {
    if (peek() < '0' || peek() > '9') fail(kInvalid);
    while (peek() >= '0' && peek() <= '9') ++p_;
  }

  void number() {
    accept('-');
    if (!accept('0')) digits();
    if (accept('.')) digits();
    if (accept('e') || accept('E')) {
      if (!accept('+')) accept('-');
      digits();
    }
  }

  // Reads a string into `out`, if any; true when it holds half of a UTF-16 pair. One without escapes is left where it
  // is, if `whole` is there to say so.
  bool string(std::string* out, std::string_view* whole = nullptr) {
    if (out != nullptr) out->clear();
    bool lone = false;
    expect('"');
    const char* const begin = p_;
    while (true) {
      const char* from = p_;
      p_ = end_of_run(p_, end_);
      if (from == begin && whole != nullptr && peek() == '"') {
        *whole = {begin, static_cast<size_t>(p_++ - begin)};
        return false;
      }
      if (from == begin && whole != nullptr) out->reserve(static_cast<size_t>(end_ - begin));
      if (out != nullptr) out->append(from, p_);
      if (accept('"')) return lone;
      expect('\\');
      lone |= escape(out);
    }
  }

  bool escape(std::string* out) {
    constexpr std::string_view names = "\"\\/bfnrt";
    constexpr std::string_view meanings = "\"\\/\b\f\n\r\t";
    const size_t at = p_ < end_ ? names.find(*p_) : std::string_view::npos;
    if (at != std::string_view::npos) {
      ++p_;
      if (out != nullptr) out->push_back(meanings[at]);
      return false;
    }
    expect('u');
    uint32_t c = hex();
    const bool high = c >= 0xD800 && c < 0xDC00;
    if (high && end_ - p_ >= 6 && p_[0] == '\\' && p_[1] == 'u') {
      const char* before = p_;
      p_ += 2;
      const uint32_t low = hex();
      if (low >= 0xDC00 && low < 0xE000) {
        c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
      } else {
        p_ = before;
      }
    }
    if (c >= 0xD800 && c < 0xE000) return true;
    if (out != nullptr) append_utf8(c, *out);
    return false;
  }

  uint32_t hex() {
    uint32_t c = 0;
    for (int i = 0; i < 4; ++i, ++p_) {
      const char digit = peek();
      if (digit >= '0' && digit <= '9') {
        c = 16 * c + static_cast<uint32_t>(digit - '0');
      } else if ((digit | 0x20) >= 'a' && (digit | 0x20) <= 'f') {
        c = 16 * c + static_cast<uint32_t>((digit | 0x20) - 'a' + 10);
      } else {
        fail(kInvalid);
      }
    }
    return c;
  }

  const char* p_;
  const char* end_;
};

}  // namespace

size_t valid_utf8(std::string_view text) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  size_t at = 0;
  while (at < text.size()) {
    if (text.size() - at >= kBlock && is_ascii(bytes + at)) {
      at += kBlock;
      continue;
    }
    for (const size_t end = std::min(at + kBlock, text.size()); at < end;) {
      const size_t length = character(bytes + at, text.size() - at);
      if (length == 0) return at;
      at += length;
    }
  }
  return at;
}

std::string_view text_field(std::string_view line, std::string& unescaped) {
  const size_t valid = valid_utf8(line);
  if (valid != line.size()) fail("is not UTF-8 at its byte " + std::to_string(valid));
  if (line.starts_with("\xEF\xBB\xBF")) line.remove_prefix(3);
  if (line.find_first_not_of(" \t\r") == line.npos) fail("is empty: remove it");
  return Reader(line).text(unescaped);
}

}  // namespace tapelm::text
