// Shared by the op files: argument checks and the parallel loop.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "memory.h"

namespace tapelm {

using at::Tensor;
using bf16 = c10::BFloat16;

inline void check_dtype(const Tensor& t, const char* op, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, op, ": ", name,
                   " must be float32 or bfloat16 on the CPU, not ", t.scalar_type());
}

inline void check_same_dtype(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": ", name, " is ", t.scalar_type(), " but ",
                   like.scalar_type(), " is needed");
}

// Calls body(T{}) with the element type of a float32 or bfloat16 tensor.
template <typename Body>
void with_dtype(const Tensor& t, Body body) {
  if (t.scalar_type() == at::kFloat)
    body(float{});
  else
    body(bf16{});
}

// Random 16-bit numbers below this are dropped: p in units of 2^-16.
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::min(65535.0, std::nearbyint(p * 65536.0)));
}

// One over the probability that an element stays.
inline float dropout_scale(double p) { return 65536.0f / static_cast<float>(65536 - dropout_threshold(p)); }

// What a kernel needs to know of a dropout that may be off.
struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t threshold;
  float scale;
};

inline Dropout make_dropout(const char* op, double p, const std::optional<Tensor>& seed) {
  TORCH_CHECK_VALUE(p >= 0.0 && p < 1.0, op, ": dropout_p must be in [0, 1), not ", p);
  if (p == 0.0) return {false, 0, 0, 1.0f};
  TORCH_CHECK_TYPE(seed && seed->scalar_type() == at::kLong && seed->numel() == 1, op,
                   ": dropout needs a seed of one int64");
  return {true, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), dropout_threshold(p), dropout_scale(p)};
}

// The data of a tensor that may be absent, as a pointer that may be null.
template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(t->contiguous()) : t;
}

// Work is cut into chunks whose number depends on the size alone, so that sums over chunks are the same for every
// thread count.
inline int64_t chunk_count(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

// Whether streaming stores write a result like t, in pieces of `piece` elements: it is so large that ordinary stores
// would first read each line from memory (read for ownership) and evict data that is needed sooner.
inline bool is_far(const Tensor& t, int64_t piece) {
  constexpr size_t kFar = size_t{8} << 20, kLine = 64;
  return t.nbytes() >= kFar && piece * t.element_size() % kLine == 0 &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kLine == 0;
}

// Whether inputs of so many bytes lie in memory rather than in a cache, so that software prefetching pays.
inline bool are_cold(size_t bytes) { return bytes >= size_t{8} << 20; }

// A store fence: orders this thread's streaming stores before its later stores.
inline void finish_far_results() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// body(begin, end) for chunks of [0, size), scheduled dynamically: on a shared machine one thread is often slower than
// the other.
template <typename Body>
void for_chunks(int64_t size, int64_t chunk, const Body& body) {
  if (size <= chunk) {
    if (size > 0) body(int64_t{0}, size);
    finish_far_results();
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t begin = chunk * next++; begin < size; begin = chunk * next++)
      body(begin, std::min(size, begin + chunk));
    finish_far_results();
  });
}

constexpr int64_t kTaskElements = 32768;  // enough for a thread to be worth waking, few enough to balance two
constexpr int64_t kBlockRows = 4;         // rows that kernels take at a time

// How many rows of C elements make a task: whole blocks of rows.
inline int64_t rows_per_task(int64_t C) {
  return chunk_count(std::max<int64_t>(1, kTaskElements / std::max<int64_t>(C, 1)), kBlockRows) * kBlockRows;
}

// Rows of C elements in chunks that each own `sums` float32 rows of partial column sums.
class ColumnSums {
 public:
  ColumnSums(int64_t rows, int64_t C, int64_t sums)
      : rows_(rows),
        width_(sums * C),
        chunk_(std::max(rows_per_task(C), chunk_count(chunk_count(rows, kMaxChunks), kBlockRows) * kBlockRows)),
        count_(chunk_count(rows, chunk_)),
        partial_(count_ * width_) {}

  // body(begin, end, sums) for each chunk of rows; its sums are zero before.
  template <typename Body>
  void for_chunks_of_rows(const Body& body) const {
    for_chunks(count_, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        float* const sums = partial_.get() + chunk * width_;
        std::fill(sums, sums + width_, 0.0f);
        body(chunk * chunk_, std::min(rows_, (chunk + 1) * chunk_), sums);
      }
    });
  }

  const float* partial() const { return partial_.get(); }
  int64_t count() const { return count_; }
  int64_t width() const { return width_; }

 private:
  static constexpr int64_t kMaxChunks = 32;
  int64_t rows_, width_, chunk_, count_;
  Scratch partial_;
};

}  // namespace tapelm
