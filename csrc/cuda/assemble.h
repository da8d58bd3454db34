// One row of a batch out of stored tokens: the index arithmetic shared by the CPU loader and the CUDA kernel.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TAPELM_HOST_DEVICE __host__ __device__
#else
#define TAPELM_HOST_DEVICE
#endif

namespace tapelm::text {

constexpr int64_t kIgnoredTarget = -100;  // ignore_index of PyTorch's losses

// `tokens` has T + 1 entries, of which the first `length` (at most T) are inputs, and the one after a full row is
// read as its last target; the rest is padding.
template <typename Token>
struct Row {
  const Token* tokens;
  uint32_t length;
  uint32_t end_of_text;
  bool packed;  // nothing follows the end of a document: the target there is ignored

  TAPELM_HOST_DEVICE bool ends_document(uint32_t t) const { return t < length && tokens[t] == end_of_text; }
  TAPELM_HOST_DEVICE int64_t input(uint32_t t) const { return t < length ? tokens[t] : end_of_text; }
  TAPELM_HOST_DEVICE int64_t target(uint32_t t) const {
    return t >= length || (packed && tokens[t] == end_of_text) ? kIgnoredTarget
                                                               : static_cast<int64_t>(tokens[t + 1]);
  }
};

}  // namespace tapelm::text
