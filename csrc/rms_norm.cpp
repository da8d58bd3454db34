// Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019), forward and backward.
#include "common.h"

#define TAPELM_KERNELS "rms_norm.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

constexpr int64_t kRowsPerChunk = 256;  // at most kMaxChunks partial sums of dweight
constexpr int64_t kMaxChunks = 64;

void check(const Tensor& x, const Tensor& weight) {
  check_dtype(x, "rms_norm", "x");
  check_same_dtype(weight, x, "rms_norm", "weight");
  TORCH_CHECK_VALUE(x.dim() >= 1, "rms_norm: x needs at least one dimension");
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm: weight must have shape (", x.size(-1),
                    "), not ", weight.sizes());
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x_, const Tensor& weight_, double eps) {
  check(x_, weight_);
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const int64_t C = x.size(-1), rows = C ? x.numel() / C : 0;
  Tensor y = empty_like(x);
  Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(C, 1)), [&](int64_t begin, int64_t end) {
      TAPELM_DISPATCH(rms_norm_rows(x.const_data_ptr<T>(), weight.const_data_ptr<T>(), y.mutable_data_ptr<T>(),
                                    rstd.mutable_data_ptr<float>(), C, static_cast<float>(eps), begin, end));
    });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                             const Tensor& rstd_) {
  check(x_, weight_);
  check_same_dtype(grad_, x_, "rms_norm", "grad");
  TORCH_CHECK_VALUE(grad_.sizes() == x_.sizes(), "rms_norm: grad must have the shape of x");
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor rstd = rstd_.contiguous();
  const int64_t C = x.size(-1), rows = C ? x.numel() / C : 0;
  const int64_t chunks = std::min(kMaxChunks, chunk_count(rows, kRowsPerChunk));
  Tensor dx = empty_like(x);
  Tensor partial = at::zeros({std::max<int64_t>(chunks, 1), C}, x.options().dtype(at::kFloat));
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk)
        TAPELM_DISPATCH(rms_norm_backward_rows(
            grad.const_data_ptr<T>(), x.const_data_ptr<T>(), weight.const_data_ptr<T>(), rstd.const_data_ptr<float>(),
            dx.mutable_data_ptr<T>(), partial.mutable_data_ptr<float>() + chunk * C, C, rows * chunk / chunks,
            rows * (chunk + 1) / chunks));
    });
  });
  return {dx, partial.sum(0).to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("rms_norm_forward", &rms_norm_forward);
  m.impl("rms_norm_backward", &rms_norm_backward);
}

}  // namespace tapelm
