// Where the results and the scratch space of the CPU ops live.
//
// The C library gives large blocks back to the system when they are freed, and every training step faults them in
// again, page by page: on two cores that is a tenth of a step. Blocks of a megabyte and more come from segments that
// are kept, on huge pages where the system has them; a request takes the lowest place where it fits, so that what a
// step needs once is about what the segments ever hold.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

namespace tapelm {

// The allocator behind the functions below.
c10::Allocator& memory();

// An uninitialised contiguous CPU tensor.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

// The same with strides.
at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// One with the shape and dtype of `like`.
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
