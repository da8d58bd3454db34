// Dropout with a counter-based generator: the mask is a function of (seed, element), never stored, and the same on
// every device. The backward is the same operation on the gradient.
#include "autograd.h"
#include "common.h"

#define TAPELM_KERNELS "dropout.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

Tensor dropout(const Tensor& x_, double p, const Tensor& seed) {
  check_dtype(x_, "dropout", "x");
  TORCH_CHECK_VALUE(p >= 0.0 && p < 1.0, "dropout: p must be in [0, 1), not ", p);
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong && seed.numel() == 1, "dropout: seed must be one int64");
  const Tensor x = x_.contiguous();
  Tensor y = empty_like(x);
  const int64_t n = x.numel();
  const bool far = is_far(y, kTaskElements);
  const uint64_t key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const uint32_t threshold = dropout_threshold(p);
  const float scale = dropout_scale(p);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    for_chunks(n, kTaskElements, [&](int64_t begin, int64_t end) {
      TAPELM_DISPATCH(
          dropout_range(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), key, threshold, scale, begin, end, far));
    });
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) { m.def("dropout(Tensor x, float p, Tensor seed) -> Tensor y"); }

TORCH_LIBRARY_IMPL(tapelm, CPU, m) { m.impl("dropout", &dropout); }

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) { m.impl("dropout", derivative("dropout(grad, p, seed) -> x")); }

}  // namespace tapelm
