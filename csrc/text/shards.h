// Token shards: little-endian files of a 64-byte header, token ids, and the starts of documents.
//
//   0                 ShardHeader (64 bytes)
//   64                tokens x token_bytes
//   next multiple of 8: documents x uint64, index within this shard of every document's first token
//
// A document may begin in one shard and end in a later one: the shards of a directory are one sequence of tokens.
#pragma once

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

  // Copies tokens [begin, begin + count), which must exist, widened to 64 bits.
  void read(uint64_t begin, size_t count, int64_t* out) const;

 private:
  struct Mapping {
    const uint8_t* address = nullptr;
    size_t bytes = 0;
  };
  void map(const std::string& path);
  void unmap();

  std::vector<Mapping> mappings_;
  std::vector<ShardHeader> headers_;
  std::vector<uint64_t> starts_{0};  // index of every shard's first token, then the total
};

}  // namespace tapelm::text
