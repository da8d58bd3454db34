// Batches assembled on a GPU from stored tokens; needs the CUDA runtime, neither PyTorch nor Python.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace tapelm::cuda {

struct StageOptions {
  uint32_t batch_size;   // B
  uint32_t seq_len;      // T
  uint32_t token_bytes;  // 2 or 4
  uint32_t end_of_text;
  bool packed;  // csrc/text/loader.h, Order::kPacked
};

// Device pointers of a batch: (B, T) each.
struct DeviceBatch {
  int64_t* inputs;
  int64_t* targets;
  int32_t* document_ids;
};

// Two pinned buffers and two device buffers in turn: while the GPU works on one batch the host writes the next, whose
// copy runs on a stream of its own. Belongs to the device that is current when it is made, and to one thread.
class Stage {
 public:
  // Throws std::runtime_error with CUDA's message, here and in assemble().
  explicit Stage(StageOptions options);
  ~Stage();
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  // Copies rows (B, T + 1) and lengths (B) from host memory, which may be used again on return, and makes the batch
  // of them in the order of `stream`.
  void assemble(const void* rows, const uint32_t* lengths, DeviceBatch batch, cudaStream_t stream);

 private:
  struct Slot {
    uint8_t* pinned = nullptr;
    uint8_t* device = nullptr;
    cudaEvent_t copied = nullptr;    // the pinned buffer may be written again
    cudaEvent_t consumed = nullptr;  // the device buffer may be written again
  };
  void release();

  StageOptions options_;
  size_t lengths_bytes_;
  size_t rows_bytes_;
  cudaStream_t copies_ = nullptr;
  Slot slots_[2];
  uint64_t batches_ = 0;
};

}  // namespace tapelm::cuda
