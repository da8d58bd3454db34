// Batches prepared by a background thread: a bounded queue that always continues from what was asked for last.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace tapelm::text {

struct PrefetchState;

// Memory of one batch, 64-byte aligned. It is used again when the last copy of the pointer is gone.
using BatchMemory = std::shared_ptr<uint8_t>;

class Prefetcher {
 public:
  // Writes the batch of a step. A copy of it is called by the background thread alone, so that it may hold working
  // memory; what it throws is thrown by next().
  using Fill = std::function<void(uint64_t step, uint8_t* batch)>;

  Prefetcher(size_t batch_bytes, Fill fill);
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // Starts the thread, unless this process has it: a forked child has not. One caller at a time.
  void start();

  // The batch of `step`, after start(). A few of the following ones are then prepared; asking for another step drops
  // them, so that the caller's step is the only position there is. May be called again after an exception, and by
  // several threads.
  BatchMemory next(uint64_t step);

 private:
  size_t batch_bytes_;
  Fill fill_;
  std::unique_ptr<PrefetchState> state_;
};

}  // namespace tapelm::text
