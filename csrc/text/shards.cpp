#include "shards.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace tapelm::text {
namespace {

static_assert(std::endian::native == std::endian::little, "shards are little-endian and read in place");

constexpr char kMagic[8] = {'T', 'A', 'P', 'E', 'T', 'O', 'K', '\n'};
constexpr uint32_t kVersion = 1;

// Bytes of a whole shard file, or 0 when the header's counts cannot fit in `available` bytes.
size_t shard_bytes(const ShardHeader& header, size_t available) {
  size_t left = available - sizeof(ShardHeader);
  if (header.tokens > left / header.token_bytes) return 0;
  const size_t tokens_end = (sizeof(ShardHeader) + header.tokens * header.token_bytes + 7) / 8 * 8;
  if (tokens_end > available || header.documents > (available - tokens_end) / 8) return 0;
  return tokens_end + 8 * header.documents;
}

}  // namespace

void start_writing([[maybe_unused]] int descriptor) {
#ifdef SYNC_FILE_RANGE_WRITE
  ::sync_file_range(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE);
#endif
}

ShardHeader make_shard_header(uint32_t token_bytes, uint64_t tokens, uint64_t documents, uint32_t vocab_size,
                              uint32_t end_of_text) {
  ShardHeader header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.token_bytes = token_bytes;
  header.tokens = tokens;
  header.documents = documents;
  header.vocab_size = vocab_size;
  header.end_of_text = end_of_text;
  return header;
}

ShardSet::ShardSet(const std::vector<std::string>& paths) : paths_(paths) {
  try {
    for (const std::string& path : paths) map(path);
  } catch (...) {
    unmap();  // the destructor does not run for an object whose constructor threw
    throw;
  }
}

ShardSet::~ShardSet() { unmap(); }

void ShardSet::unmap() {
  for (const Mapping& mapping : mappings_) ::munmap(const_cast<uint8_t*>(mapping.address), mapping.bytes);
  mappings_.clear();
}

void ShardSet::map(const std::string& path) {
  const auto fail = [&](const std::string& what) { throw std::invalid_argument("shard " + path + " " + what); };
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail(std::string("cannot be opened: ") + std::strerror(errno));
  struct stat status {};
  const bool known = ::fstat(file, &status) == 0;
  const size_t bytes = known ? static_cast<size_t>(status.st_size) : 0;
  void* address = bytes >= sizeof(ShardHeader) ? ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0) : MAP_FAILED;
  const std::string reason = std::strerror(errno);
  ::close(file);
  if (bytes < sizeof(ShardHeader)) fail("is truncated: it has " + std::to_string(bytes) + " bytes, no whole header");
  if (address == MAP_FAILED) fail("cannot be mapped into memory: " + reason);
  mappings_.push_back({static_cast<const uint8_t*>(address), bytes});

  ShardHeader header;
  std::memcpy(&header, address, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) fail("is not a token shard (wrong magic bytes)");
  if (header.version != kVersion) fail("has format version " + std::to_string(header.version) + ", this is 1");
  if (header.token_bytes != 2 && header.token_bytes != 4) fail("has a damaged header (bytes per token)");
  if (shard_bytes(header, bytes) != bytes) {
    fail("is truncated or damaged: its " + std::to_string(bytes) + " bytes do not hold exactly the " +
         std::to_string(header.tokens) + " tokens and " + std::to_string(header.documents) +
         " documents of its header");
  }
  if (!headers_.empty() && header.token_bytes != token_bytes()) {
    fail("has " + std::to_string(header.token_bytes) + " bytes per token, the shards before it have " +
         std::to_string(token_bytes()));
  }
  headers_.push_back(header);
  starts_.push_back(starts_.back() + header.tokens);
  document_starts_.push_back(document_starts_.back() + header.documents);
}

const uint8_t* ShardSet::view(uint64_t begin, size_t count) const {
  const auto shard = static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin()) - 1;
  const uint64_t local = begin - starts_[shard];
  if (headers_[shard].tokens - local < count) return nullptr;
  return mappings_[shard].address + sizeof(ShardHeader) + local * token_bytes();
}

void ShardSet::copy(uint64_t begin, size_t count, uint8_t* out) const {
  const size_t width = token_bytes();
  size_t shard = static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin()) - 1;
  while (count > 0) {
    const uint64_t local = begin - starts_[shard];
    const size_t n = static_cast<size_t>(std::min<uint64_t>(count, headers_[shard].tokens - local));
    std::memcpy(out, mappings_[shard].address + sizeof(ShardHeader) + local * width, n * width);
    out += n * width;
    begin += n;
    count -= n;
    ++shard;
  }
}

void ShardSet::prefetch(uint64_t begin, size_t count) const {
  const auto shard = static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin()) - 1;
  const uint8_t* at = mappings_[shard].address + sizeof(ShardHeader) + (begin - starts_[shard]) * token_bytes();
  const size_t bytes = std::min<size_t>(count * token_bytes(), 640);
  for (size_t offset = 0; offset < bytes + 63; offset += 64) __builtin_prefetch(at + offset);  // past the end: nothing
}

size_t ShardSet::shard_of_document(uint64_t document) const {
  const auto after = std::upper_bound(document_starts_.begin(), document_starts_.end(), document);
  return static_cast<size_t>(after - document_starts_.begin()) - 1;
}

// They end the file, aligned: see shard_bytes.
const uint64_t* ShardSet::document_starts_in(size_t shard) const {
  const Mapping& mapping = mappings_[shard];
  return reinterpret_cast<const uint64_t*>(mapping.address + mapping.bytes - 8 * headers_[shard].documents);
}

void ShardSet::release_document_starts() const {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  for (size_t shard = 0; shard < headers_.size(); ++shard) {
    const auto begin = reinterpret_cast<uintptr_t>(document_starts_in(shard)) / page * page;
    const auto end = reinterpret_cast<uintptr_t>(mappings_[shard].address) + mappings_[shard].bytes;
    ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }
}

void ShardSet::fail_documents(uint64_t document) const {
  throw std::invalid_argument("shard " + paths_[shard_of_document(document)] +
                              " is damaged: the start of document " + std::to_string(document) +
                              " is not between its neighbours");
}

}  // namespace tapelm::text
