// libFuzzer target: a damaged shard file is refused with std::invalid_argument or read without harm.
//
// The input is the file; it is read alone and behind a whole shard, in several shapes of batches.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "loader.h"

using namespace tapelm::text;

namespace {

// A file in memory with the path under which it can be opened.
class MemoryFile {
 public:
  MemoryFile(const uint8_t* data, size_t size) : file_(::memfd_create("shard", MFD_CLOEXEC)) {
    if (file_ < 0 || ::write(file_, data, size) != static_cast<ssize_t>(size)) std::abort();
  }
  ~MemoryFile() { ::close(file_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(file_); }

 private:
  int file_;
};

std::vector<uint8_t> whole_shard() {
  const ShardHeader header = make_shard_header(2, 100, 0, 1000, 999);
  const auto* bytes = reinterpret_cast<const uint8_t*>(&header);
  std::vector<uint8_t> file(bytes, bytes + sizeof(header));
  file.resize(file.size() + 200);
  return file;
}

void read(const std::vector<std::string>& paths, LoaderOptions options) {
  try {
    const Loader loader(paths, 999, options);
    LoaderCursor cursor;
    std::vector<int64_t> inputs(options.batch_size * options.seq_len);
    std::vector<int64_t> targets(inputs.size());
    std::vector<int32_t> documents(inputs.size());
    for (const uint64_t step : {uint64_t{0}, uint64_t{1}, loader.steps_per_epoch() - 1, uint64_t{1} << 40}) {
      loader.fill(step, cursor, inputs.data(), targets.data(), documents.data());
    }
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<uint8_t> whole = whole_shard();
  static const MemoryFile first(whole.data(), whole.size());
  const MemoryFile file(data, size);
  for (const uint64_t length : {1, 7, 64}) {
    for (const Order order : {Order::kShuffled, Order::kPacked}) {
      const LoaderOptions options{
          .batch_size = 2, .seq_len = length, .seed = 1, .rank = 0, .world_size = 1, .order = order};
      read({file.path()}, options);
      read({first.path(), file.path(), first.path()}, options);
    }
  }
  return 0;
}
