// One row of a batch out of stored tokens, token by token: what the CUDA kernel computes, also compiled for the host
// by the tests, which compare it with the CPU loader.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TAPELM_HOST_DEVICE __host__ __device__
#else
#define TAPELM_HOST_DEVICE
#endif

namespace tapelm::cuda {

constexpr int64_t kIgnoredTarget = -100;  // ignore_index of PyTorch's losses
constexpr uint32_t kWarp = 32;
constexpr uint32_t kWarps = 8;  // per block, which makes one row, kWarp * kWarps tokens at a time

// `tokens` has T + 1 entries, of which the first `length` (at most T) are inputs; the rest is padding, except that
// the entry after a full row is its last target.
template <typename Token>
struct Row {
  const Token* tokens;
  uint32_t length;
  uint32_t end_of_text;
  bool packed;  // nothing follows the end of a document: the target there is ignored

  TAPELM_HOST_DEVICE bool ends_document(uint32_t t) const { return t < length && tokens[t] == end_of_text; }
  TAPELM_HOST_DEVICE int64_t input(uint32_t t) const {
    return t < length ? static_cast<int64_t>(tokens[t]) : static_cast<int64_t>(end_of_text);
  }
  TAPELM_HOST_DEVICE int64_t target(uint32_t t) const {
    if (t >= length || (packed && tokens[t] == end_of_text)) return kIgnoredTarget;
    return static_cast<int64_t>(tokens[t + 1]);
  }
};

TAPELM_HOST_DEVICE inline uint32_t count_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return static_cast<uint32_t>(__popc(bits));
#else
  return static_cast<uint32_t>(__builtin_popcount(bits));
#endif
}

// Documents that end before a lane's token within the current kWarp * kWarps tokens: `ballot` has a bit for every
// lane of its warp whose token ends a document, `counts` the bits of every warp.
TAPELM_HOST_DEVICE inline uint32_t ended_before(uint32_t ballot, uint32_t lane, const uint32_t* counts,
                                                uint32_t warp) {
  uint32_t ended = count_bits(ballot & ((1u << lane) - 1));
  for (uint32_t w = 0; w < warp; ++w) ended += counts[w];
  return ended;
}

// Documents that end in the current kWarp * kWarps tokens.
TAPELM_HOST_DEVICE inline uint32_t ended_in_all(const uint32_t* counts) {
  uint32_t ended = 0;
  for (uint32_t w = 0; w < kWarps; ++w) ended += counts[w];
  return ended;
}

}  // namespace tapelm::cuda
