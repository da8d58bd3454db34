// Shared by the op files: argument checks and the parallel loop.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

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

// Random words below this are dropped: round(p * 2^32).
inline uint32_t dropout_threshold(double p) {
  const double scaled = std::nearbyint(p * 4294967296.0);
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

inline float dropout_scale(double p) { return 1.0f / (1.0f - static_cast<float>(p)); }

// Work is cut into chunks whose number depends on the size alone, so that sums over chunks are the same for every
// thread count.
inline int64_t chunk_count(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

}  // namespace tapelm
