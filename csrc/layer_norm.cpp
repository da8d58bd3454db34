// Layer normalisation over the last dimension (Ba et al. 2016), forward and backward.
#include "autograd.h"
#include "norm.h"

#define TAPELM_KERNELS "layer_norm.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

constexpr const char* kOp = "layer_norm";

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                                                      double eps) {
  check_features(x_, kOp);
  check_vector(weight_, x_, kOp, "weight");
  check_vector(bias_, x_, kOp, "bias");
  const Tensor x = x_.contiguous(), weight = weight_.contiguous(), bias = bias_.contiguous();
  Tensor y = empty_like(x), mean = empty_statistic(x), rstd = empty_statistic(x);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const NormForward<T> a{.x = x.const_data_ptr<T>(),
                           .weight = weight.const_data_ptr<T>(),
                           .bias = bias.const_data_ptr<T>(),
                           .y = y.mutable_data_ptr<T>(),
                           .mean = mean.mutable_data_ptr<float>(),
                           .rstd = rstd.mutable_data_ptr<float>(),
                           .C = x.size(-1),
                           .eps = static_cast<float>(eps),
                           .far = is_far(y, x.size(-1)),
                           .cold = are_cold(x.nbytes())};
    for_rows(x, [&](int64_t begin, int64_t end) { TAPELM_DISPATCH(layer_norm_rows(a, begin, end)); });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                                       const Tensor& mean_, const Tensor& rstd_) {
  check_features(x_, kOp);
  check_vector(weight_, x_, kOp, "weight");
  check_like(grad_, x_, kOp, "grad");
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const int64_t C = x.size(-1);
  Tensor dx = empty_like(x), dweight = empty_like(weight), dbias = empty_like(weight);
  const ColumnSums sums(row_count(x), C, 2);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const NormBackward<T> a{.grad = grad.const_data_ptr<T>(),
                            .x = x.const_data_ptr<T>(),
                            .weight = weight.const_data_ptr<T>(),
                            .mean = mean.const_data_ptr<float>(),
                            .rstd = rstd.const_data_ptr<float>(),
                            .dx = dx.mutable_data_ptr<T>(),
                            .C = C,
                            .far = is_far(dx, C),
                            .cold = are_cold(2 * x.nbytes())};
    sums.for_chunks_of_rows([&](int64_t begin, int64_t end, float* partial) {
      TAPELM_DISPATCH(layer_norm_backward_rows(a, begin, end, partial, partial + C));
    });
    TAPELM_DISPATCH(sum_partial(sums.partial(), sums.count(), 2 * C, C, dweight.mutable_data_ptr<T>()));
    TAPELM_DISPATCH(sum_partial(sums.partial() + C, sums.count(), 2 * C, C, dbias.mutable_data_ptr<T>()));
  });
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def(
      "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("layer_norm_forward", &layer_norm_forward);
  m.impl("layer_norm_backward", &layer_norm_backward);
}

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  m.impl("layer_norm_forward", derivative("layer_norm_backward(grad, x, weight, mean, rstd) -> x, weight, bias"));
  m.impl("layer_norm_backward", no_derivative());
}

}  // namespace tapelm
