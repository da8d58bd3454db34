// Where the results and the scratch space of the CPU ops live.
//
// The C library gives large blocks back to the system when they are freed, and every training step faults them in
// again, page by page: on two cores that is a tenth of a step. Blocks of a megabyte and more are kept here for the next
// request instead, on huge pages where the system has them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

namespace tapelm {

// The allocator behind the functions below. A request takes a kept block that is at most a quarter larger; kept and used
// blocks together never exceed the most that was in use at once, or 64 MB.
c10::Allocator& memory();

// An uninitialised contiguous CPU tensor.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

// The same with the shape and dtype of `like`.
inline at::Tensor empty_like(const at::Tensor& like) { return empty(like.sizes(), like.scalar_type()); }

// Uninitialised floats that live as long as the object.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : data_(memory().allocate(static_cast<size_t>(floats) * sizeof(float))) {}
  float* get() const { return static_cast<float*>(data_.get()); }

 private:
  c10::DataPtr data_;
};

}  // namespace tapelm
