#include "loader.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

#include "flat_map.h"

namespace tapelm::text {

Permutation::Permutation(uint64_t size, uint64_t seed, uint64_t epoch)
    : size_(size), half_bits_((std::max(2u, static_cast<uint32_t>(std::bit_width(size > 0 ? size - 1 : 0))) + 1) / 2) {
  uint64_t state = mix(seed + 0x9E3779B97F4A7C15ull) ^ mix(epoch + 0xD1B54A32D192ED03ull);
  for (uint64_t& key : keys_) key = mix(state += 0x9E3779B97F4A7C15ull);
}

uint64_t Permutation::operator()(uint64_t index) const {
  const uint64_t mask = (1ull << half_bits_) - 1;
  do {
    uint64_t left = index >> half_bits_;
    uint64_t right = index & mask;
    for (const uint64_t key : keys_) {
      const uint64_t swapped = left ^ (mix(right ^ key) & mask);
      left = right;
      right = swapped;
    }
    index = left << half_bits_ | right;
  } while (index >= size_);
  return index;
}

Loader::Loader(const std::vector<std::string>& paths, uint32_t end_of_text, LoaderOptions options)
    : shards_(paths), end_of_text_(end_of_text), options_(options) {
  const uint64_t tokens = shards_.tokens();
  if (tokens < options.seq_len + 1) {
    throw std::invalid_argument("corpus of " + std::to_string(tokens) + " tokens is smaller than one block of " +
                                std::to_string(options.seq_len + 1) + " (seq_len + 1): add text or lower seq_len");
  }
  windows_ = (tokens - 1) / options.seq_len;
  if (steps_per_epoch() == 0) {
    throw std::invalid_argument("corpus of " + std::to_string(tokens) + " tokens has " + std::to_string(windows_) +
                                " blocks of seq_len " + std::to_string(options.seq_len) +
                                ", fewer than batch_size x world_size = " +
                                std::to_string(options.batch_size * options.world_size) +
                                ": add text or lower batch_size or seq_len");
  }
}

std::vector<uint64_t> Loader::window_indices(uint64_t step) const {
  const Permutation permutation(windows_, options_.seed, step / steps_per_epoch());
  const uint64_t within = step % steps_per_epoch();
  const uint64_t first = (within * options_.world_size + options_.rank) * options_.batch_size;
  std::vector<uint64_t> indices(options_.batch_size);
  for (uint64_t i = 0; i < options_.batch_size; ++i) indices[i] = permutation(first + i);
  return indices;
}

void Loader::fill(uint64_t step, int64_t* inputs, int64_t* targets, int32_t* document_ids) const {
  const size_t width = options_.seq_len;
  std::vector<int64_t> window(width + 1);
  for (const uint64_t index : window_indices(step)) {
    shards_.read(index * width, width + 1, window.data());
    std::copy_n(window.data(), width, inputs);
    std::copy_n(window.data() + 1, width, targets);
    int32_t document = 0;
    for (size_t t = 0; t < width; ++t) {
      document_ids[t] = document;
      document += window[t] == static_cast<int64_t>(end_of_text_);
    }
    inputs += width;
    targets += width;
    document_ids += width;
  }
}

}  // namespace tapelm::text
