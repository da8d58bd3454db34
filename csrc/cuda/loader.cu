#include "loader.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "assemble.h"

namespace tapelm::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// One block per row. Inputs and targets are shifted reads of the row; document ids are an exclusive prefix sum over
// the end-of-text tokens: a ballot within a warp, a sum over warps, and a carry from one stretch to the next.
// Reads 2 or 4 bytes per token (twice, the second time from cache), writes 20: bound by the writes.
template <typename Token>
__global__ void __launch_bounds__(kWarp * kWarps)
    assemble_rows(const Token* __restrict__ rows, const uint32_t* __restrict__ lengths, uint32_t seq_len,
                  uint32_t end_of_text, bool packed, int64_t* __restrict__ inputs, int64_t* __restrict__ targets,
                  int32_t* __restrict__ document_ids) {
  __shared__ uint32_t counts[kWarps];
  const uint64_t row = blockIdx.x;
  const Row<Token> from{rows + row * (seq_len + 1ull), lengths[row], end_of_text, packed};
  const uint64_t to = row * seq_len;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = threadIdx.x / kWarp;
  uint32_t ended = 0;
  for (uint32_t begin = 0; begin < seq_len; begin += kWarp * kWarps) {
    const uint32_t t = begin + threadIdx.x;
    const uint32_t ballot = __ballot_sync(0xFFFFFFFFu, from.ends_document(t));
    if (lane == 0) counts[warp] = count_bits(ballot);
    __syncthreads();
    if (t < seq_len) {
      inputs[to + t] = from.input(t);
      targets[to + t] = from.target(t);
      document_ids[to + t] = static_cast<int32_t>(ended + ended_before(ballot, lane, counts, warp));
    }
    ended += ended_in_all(counts);
    __syncthreads();
  }
}

}  // namespace

Stage::Stage(StageOptions options)
    : options_(options),
      lengths_bytes_((4ull * options.batch_size + 255) / 256 * 256),
      rows_bytes_((options.seq_len + 1ull) * options.batch_size * options.token_bytes) {
  try {
    check(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking), "making a stream for the loader's copies");
    for (Slot& slot : slots_) {
      const size_t bytes = lengths_bytes_ + rows_bytes_;
      check(cudaHostAlloc(reinterpret_cast<void**>(&slot.pinned), bytes, cudaHostAllocDefault),
            "allocating pinned memory for the loader");
      check(cudaMalloc(reinterpret_cast<void**>(&slot.device), bytes), "allocating device memory for the loader");
      check(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming), "making an event");
      check(cudaEventCreateWithFlags(&slot.consumed, cudaEventDisableTiming), "making an event");
    }
  } catch (...) {
    release();  // the destructor does not run for an object whose constructor threw
    throw;
  }
}

Stage::~Stage() { release(); }

// Errors are not reported: at the end of a process the driver may be gone already.
void Stage::release() {
  if (copies_ != nullptr) cudaStreamSynchronize(copies_);
  for (Slot& slot : slots_) {
    if (slot.consumed != nullptr) {
      cudaEventSynchronize(slot.consumed);
      cudaEventDestroy(slot.consumed);
    }
    if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
    cudaFree(slot.device);
    cudaFreeHost(slot.pinned);
    slot = {};
  }
  if (copies_ != nullptr) cudaStreamDestroy(copies_);
  copies_ = nullptr;
}

void Stage::assemble(const void* rows, const uint32_t* lengths, DeviceBatch batch, cudaStream_t stream) {
  Slot& slot = slots_[batches_++ % 2];
  // An event that was never recorded is complete, so that the first two batches wait for nothing.
  check(cudaEventSynchronize(slot.copied), "waiting for an earlier copy");
  std::memcpy(slot.pinned, lengths, 4ull * options_.batch_size);
  std::memcpy(slot.pinned + lengths_bytes_, rows, rows_bytes_);
  check(cudaStreamWaitEvent(copies_, slot.consumed, 0), "ordering the copy");
  check(cudaMemcpyAsync(slot.device, slot.pinned, lengths_bytes_ + rows_bytes_, cudaMemcpyHostToDevice, copies_),
        "copying a batch to the GPU");
  check(cudaEventRecord(slot.copied, copies_), "recording the copy");
  check(cudaStreamWaitEvent(stream, slot.copied, 0), "waiting for the copy");
  const auto* device_lengths = reinterpret_cast<const uint32_t*>(slot.device);
  const uint8_t* device_rows = slot.device + lengths_bytes_;
  if (options_.token_bytes == 2) {
    assemble_rows<<<options_.batch_size, kWarp * kWarps, 0, stream>>>(
        reinterpret_cast<const uint16_t*>(device_rows), device_lengths, options_.seq_len, options_.end_of_text,
        options_.packed, batch.inputs, batch.targets, batch.document_ids);
  } else {
    assemble_rows<<<options_.batch_size, kWarp * kWarps, 0, stream>>>(
        reinterpret_cast<const uint32_t*>(device_rows), device_lengths, options_.seq_len, options_.end_of_text,
        options_.packed, batch.inputs, batch.targets, batch.document_ids);
  }
  check(cudaGetLastError(), "starting the batch kernel");
  check(cudaEventRecord(slot.consumed, stream), "recording the batch");
}

}  // namespace tapelm::cuda
