// Jumps, faults and short-lived readers of a Prefetcher under ThreadSanitizer; every batch must be that of its step.
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>

#include "prefetch.h"

using tapelm::text::Prefetcher;

namespace {

// Returns the faults met in 20,000 batches of `bytes`, or -1 after a batch of another step.
int read_batches(size_t bytes, uint32_t seed) {
  Prefetcher prefetcher(bytes, [failures = 0](uint64_t step, uint8_t* batch) mutable {
    if (step % 97 == 96 && ++failures % 2) throw std::runtime_error("a fault that passes");
    std::memcpy(batch, &step, sizeof(step));
  });
  prefetcher.start();
  std::mt19937 random(seed);
  uint64_t step = 0;
  int faults = 0;
  for (int i = 0; i < 20'000; ++i) {
    if (random() % 50 == 0) step = random() % 1000;
    try {
      const auto memory = prefetcher.next(step);
      uint64_t found = 0;
      std::memcpy(&found, memory.get(), sizeof(found));
      if (found != step++) return -1;
    } catch (const std::runtime_error&) {
      ++faults;
    }
  }
  return faults;
}

}  // namespace

int main() {
  for (uint32_t seed = 0; seed < 8; ++seed) {  // a ring of 32 small batches ... of 4 large ones
    const int faults = read_batches(size_t{1} << (12 + seed), seed);
    if (faults <= 0) {
      std::printf("seed %u: %s\n", seed, faults < 0 ? "a batch of another step" : "no fault came through");
      return 1;
    }
  }
  return 0;
}
