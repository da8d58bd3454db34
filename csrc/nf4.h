// A weight quantized to NF4 as the CPU ops see it; made and checked by nf4.cpp.
#pragma once

#include <ATen/core/Tensor.h>

namespace tapelm {

constexpr int64_t kNested = 256;  // scales per block of scales

// Element i of the flattened weight is nibble i of `packed`, the high one of a byte first: an index into the 16 codes,
// to be multiplied with the scale of block i / block.
struct Nf4 {
  const uint8_t* packed = nullptr;
  int64_t block = 0;
  const float* absmax = nullptr;     // (blocks), null when the scales are quantized themselves:
  const uint8_t* absmax8 = nullptr;  // (blocks), indices into map
  const float* nested = nullptr;     // (ceil(blocks / kNested)), scales of the scales
  const float* map = nullptr;        // (256)
  float offset = 0.0f;

  float scale(int64_t b) const {
    if (absmax) return absmax[b];
    // Rounded before the sum: a fused multiply-add would not equal other implementations.
    return __builtin_assoc_barrier(map[absmax8[b]] * nested[b / kNested]) + offset;
  }
};

// state is [absmax] or [absmax, nested, offset, map]; raises unless it holds `numel` elements. The tensors must outlive
// the result.
Nf4 nf4_view(const at::Tensor& packed, at::TensorList state, int64_t block_size, int64_t numel, const char* op);

// Elements [first, first + count) of the flattened weight; T is float or BFloat16. One thread.
template <typename T>
void nf4_dequantize_range(const Nf4& q, int64_t first, int64_t count, T* out);

}  // namespace tapelm
