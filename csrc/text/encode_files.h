// What Tokenizer.encode_files does to a block of a file: lines or pieces of text into tokens as shards store them. Each
// call works on one thread; the caller has a block for every core.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bpe.h"

namespace tapelm::text {

// A vector's memory that is written before it is read: growing does not clear it.
template <typename T>
struct UnclearedAllocator : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = UnclearedAllocator<U>;
  };
  template <typename U>
  void construct(U*) noexcept {}
};

// Tokens of documents or parts of them, end-of-text included.
struct TokenBlock {
  std::vector<uint8_t, UnclearedAllocator<uint8_t>> tokens;  // token_bytes each
  std::vector<uint64_t> starts;  // index of every document's first token, where it is in this block
};

struct TokenFormat {
  uint32_t end_of_text;
  uint32_t token_bytes;  // 2 or 4
};

// Where text i of a block comes from, for messages: "news.jsonl, line 7".
using Place = std::function<std::string(size_t)>;

// A document per line of JSON in its field "text". Throws std::invalid_argument that begins with the place of the
// line at fault.
TokenBlock encode_lines(const Bpe& bpe, std::string_view lines, TokenFormat format, const Place& place);

// Pieces of UTF-8 text; ends[i] says that a document ends with piece i, `continued` that the first piece is not the
// beginning of its document. Throws as encode_lines does.
TokenBlock encode_pieces(const Bpe& bpe, std::span<const std::string_view> pieces, const std::vector<bool>& ends,
                         bool continued, TokenFormat format, const Place& place);

// The last position > 0 where `text`, the beginning of a longer text, can be cut so that its two sides encode to what
// they encode to together, whatever the splitting; 0 where none is found. No token of `specials` is cut.
size_t safe_cut(std::string_view text, std::span<const std::string> specials);

}  // namespace tapelm::text
