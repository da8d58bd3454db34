// gelu(x + bias) over the last dimension, tanh form, forward and backward.
#include "autograd.h"
#include "common.h"

#define TAPELM_KERNELS "bias_gelu.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

void check(const Tensor& x, const Tensor& bias) {
  check_dtype(x, "bias_gelu", "x");
  check_same_dtype(bias, x, "bias_gelu", "bias");
  TORCH_CHECK_VALUE(x.dim() >= 1 && bias.dim() == 1 && bias.size(0) == x.size(-1),
                    "bias_gelu: bias must have shape (", x.dim() ? x.size(-1) : 0, "), not ", bias.sizes());
}

Tensor bias_gelu_forward(const Tensor& x_, const Tensor& bias_) {
  check(x_, bias_);
  const Tensor x = x_.contiguous(), bias = bias_.contiguous();
  const int64_t C = x.size(-1), rows = C ? x.numel() / C : 0;
  Tensor y = empty_like(x);
  const bool far = is_far(y, C);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    for_chunks(rows, rows_per_task(C), [&](int64_t begin, int64_t end) {
      TAPELM_DISPATCH(bias_gelu_rows(x.const_data_ptr<T>(), bias.const_data_ptr<T>(), y.mutable_data_ptr<T>(), C, begin,
                                     end, far));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad_, const Tensor& x_, const Tensor& bias_) {
  check(x_, bias_);
  check_same_dtype(grad_, x_, "bias_gelu", "grad");
  TORCH_CHECK_VALUE(grad_.sizes() == x_.sizes(), "bias_gelu: grad must have the shape of x");
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), bias = bias_.contiguous();
  const int64_t C = x.size(-1), rows = C ? x.numel() / C : 0;
  Tensor dx = empty_like(x), dbias = empty_like(bias);
  const bool far = is_far(dx, C);
  const ColumnSums sums(rows, C, 1);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    sums.for_chunks_of_rows([&](int64_t begin, int64_t end, float* partial) {
      TAPELM_DISPATCH(bias_gelu_backward_rows(grad.const_data_ptr<T>(), x.const_data_ptr<T>(),
                                              bias.const_data_ptr<T>(), dx.mutable_data_ptr<T>(), partial, C, begin,
                                              end, far));
    });
    TAPELM_DISPATCH(sum_partial(sums.partial(), sums.count(), C, C, dbias.mutable_data_ptr<T>()));
  });
  return {dx, dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("bias_gelu_forward(Tensor x, Tensor bias) -> Tensor y");
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("bias_gelu_forward", &bias_gelu_forward);
  m.impl("bias_gelu_backward", &bias_gelu_backward);
}

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  m.impl("bias_gelu_forward", derivative("bias_gelu_backward(grad, x, bias) -> x, bias"));
  m.impl("bias_gelu_backward", no_derivative());
}

}  // namespace tapelm
