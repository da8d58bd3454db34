// Token shards: little-endian files of a 64-byte header, token ids, and the starts of documents.
//
//   0                 ShardHeader (64 bytes)
//   64                tokens x token_bytes
//   next multiple of 8: documents x uint64, index within this shard of every document's first token
//
// A document may begin in one shard and end in a later one: the shards of a directory are one sequence of tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tapelm::text {

struct ShardHeader {
  char magic[8];
  uint32_t version;
  uint32_t token_bytes;  // 2 or 4
  uint64_t tokens;
  uint64_t documents;
  uint32_t vocab_size;
  uint32_t end_of_text;
  uint8_t reserved[24];
};
static_assert(sizeof(ShardHeader) == 64);

// A header for the given counts.
ShardHeader make_shard_header(uint32_t token_bytes, uint64_t tokens, uint64_t documents, uint32_t vocab_size,
                              uint32_t end_of_text);

// Asks the kernel to begin writing what is new in a file to the disk, and does not wait: fsync will have less to wait
// for, and tells what went wrong. Does nothing where the system has no such call.
void start_writing(int descriptor);

// Shard files mapped into memory and read as one sequence.
class ShardSet {
 public:
  // Throws std::invalid_argument naming the file when one cannot be opened or is not a whole shard.
  explicit ShardSet(const std::vector<std::string>& paths);
  ~ShardSet();
  ShardSet(const ShardSet&) = delete;
  ShardSet& operator=(const ShardSet&) = delete;

  uint64_t tokens() const { return starts_.back(); }
  const std::vector<ShardHeader>& headers() const { return headers_; }

  // Bytes per token, the same in all shards.
  uint32_t token_bytes() const { return headers_.empty() ? 2 : headers_.front().token_bytes; }

  // Copies tokens [begin, begin + count), which must exist, as they are stored.
  void copy(uint64_t begin, size_t count, uint8_t* out) const;

  // Where they are stored one behind the other, nullptr where that is in more than one shard.
  const uint8_t* view(uint64_t begin, size_t count) const;

  // Asks for the memory of tokens [begin, begin + count), which must exist, without waiting for it; of the
  // first, if there are many, as the CPU itself reads ahead of a long copy.
  void prefetch(uint64_t begin, size_t count) const;

  uint64_t documents() const { return document_starts_.back(); }

  // Calls visit(begin, tokens) for documents [first, last), in order. Throws std::invalid_argument naming the file
  // where a start is outside its shard or not above the one before.
  template <typename Visit>
  void each_document(uint64_t first, uint64_t last, const Visit& visit) const {
    if (first >= last) return;
    uint64_t begin = 0;
    for (size_t shard = shard_of_document(first); shard < headers_.size() && document_starts_[shard] <= last; ++shard) {
      const uint64_t* const starts = document_starts_in(shard);
      const uint64_t tokens = headers_[shard].tokens;
      const uint64_t to = std::min(last + 1, document_starts_[shard + 1]);
      for (uint64_t i = std::max(first, document_starts_[shard]); i < to; ++i) {
        const uint64_t local = starts[i - document_starts_[shard]];
        const uint64_t start = starts_[shard] + local;
        if (local >= tokens || (i > first && start <= begin)) fail_documents(i);
        if (i > first) visit(begin, start - begin);
        begin = start;
      }
    }
    if (last == documents()) visit(begin, this->tokens() - begin);
  }

  // Gives back the memory that reading the document starts took; they can be read again.
  void release_document_starts() const;

 private:
  struct Mapping {
    const uint8_t* address = nullptr;
    size_t bytes = 0;
  };
  void map(const std::string& path);
  void unmap();
  size_t shard_of_document(uint64_t document) const;
  const uint64_t* document_starts_in(size_t shard) const;
  [[noreturn]] void fail_documents(uint64_t document) const;

  std::vector<std::string> paths_;
  std::vector<Mapping> mappings_;
  std::vector<ShardHeader> headers_;
  std::vector<uint64_t> starts_{0};  // index of every shard's first token, then the total
  std::vector<uint64_t> document_starts_{0};  // index of every shard's first document start, then the total
};

}  // namespace tapelm::text
