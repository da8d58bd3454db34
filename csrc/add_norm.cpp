// r = residual + dropout(x) and the norm of r over its last dimension in one pass: LayerNorm with a bias, RMSNorm
// without one. The dropout mask is that of dropout.cpp: element i of x has index i; the backward computes it again.
#include "autograd.h"
#include "norm.h"

#define TAPELM_KERNELS "add_norm.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "add_norm";

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_forward(const Tensor& x_, const Tensor& residual_,
                                                            const Tensor& weight_, const OptionalTensor& bias_,
                                                            double eps, double p, const OptionalTensor& seed) {
  check_features(x_, kOp);
  check_like(residual_, x_, kOp, "residual");
  check_vector(weight_, x_, kOp, "weight");
  if (bias_) check_vector(*bias_, x_, kOp, "bias");
  const Dropout dropout = make_dropout(kOp, p, seed);
  const Tensor x = x_.contiguous(), residual = residual_.contiguous(), weight = weight_.contiguous();
  const OptionalTensor bias = contiguous(bias_);
  Tensor y = empty_like(x), r = empty_like(x), rstd = empty_statistic(x);
  Tensor mean = bias ? empty_like(rstd) : empty({0}, at::kFloat);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const NormForward<T> a{.x = x.const_data_ptr<T>(),
                           .residual = residual.const_data_ptr<T>(),
                           .weight = weight.const_data_ptr<T>(),
                           .bias = data_or_null<T>(bias),
                           .y = y.mutable_data_ptr<T>(),
                           .r = r.mutable_data_ptr<T>(),
                           .mean = mean.mutable_data_ptr<float>(),
                           .rstd = rstd.mutable_data_ptr<float>(),
                           .C = x.size(-1),
                           .eps = static_cast<float>(eps),
                           .far = is_far(y, x.size(-1)),
                           .cold = are_cold(2 * x.nbytes()),
                           .dropout = dropout};
    for_rows(x, [&](int64_t begin, int64_t end) {
      if (bias)
        TAPELM_DISPATCH(add_norm_rows<true>(a, begin, end));
      else
        TAPELM_DISPATCH(add_norm_rows<false>(a, begin, end));
    });
  });
  return {y, r, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(const Tensor& grad_, const OptionalTensor& grad_r_,
                                                             const Tensor& r_, const Tensor& weight_,
                                                             const OptionalTensor& mean_, const Tensor& rstd_,
                                                             double p, const OptionalTensor& seed) {
  check_features(r_, kOp);
  check_like(grad_, r_, kOp, "grad");
  if (grad_r_) check_like(*grad_r_, r_, kOp, "grad_r");
  check_vector(weight_, r_, kOp, "weight");
  const Dropout dropout = make_dropout(kOp, p, seed);
  const Tensor grad = grad_.contiguous(), r = r_.contiguous(), weight = weight_.contiguous();
  const Tensor rstd = rstd_.contiguous();
  const OptionalTensor grad_r = contiguous(grad_r_), mean = contiguous(mean_);
  const int64_t C = r.size(-1);
  Tensor dresidual = empty_like(r), dweight = empty_like(weight);
  Tensor dx = empty(dropout.active ? r.sizes() : at::IntArrayRef{0}, r.scalar_type());
  Tensor dbias = empty({mean ? C : 0}, r.scalar_type());
  const ColumnSums sums(row_count(r), C, mean ? 2 : 1);
  with_dtype(r, [&](auto zero) {
    using T = decltype(zero);
    const NormBackward<T> a{.grad = grad.const_data_ptr<T>(),
                            .grad_r = data_or_null<T>(grad_r),
                            .x = r.const_data_ptr<T>(),
                            .weight = weight.const_data_ptr<T>(),
                            .mean = data_or_null<float>(mean),
                            .rstd = rstd.const_data_ptr<float>(),
                            .dx = dresidual.mutable_data_ptr<T>(),
                            .dropped = dropout.active ? dx.mutable_data_ptr<T>() : nullptr,
                            .C = C,
                            .far = is_far(dresidual, C) && (!dropout.active || is_far(dx, C)),
                            .cold = are_cold((grad_r ? 3 : 2) * r.nbytes()),
                            .dropout = dropout};
    sums.for_chunks_of_rows([&](int64_t begin, int64_t end, float* partial) {
      if (mean)
        TAPELM_DISPATCH(add_norm_backward_rows<true>(a, begin, end, partial, partial + C));
      else
        TAPELM_DISPATCH(add_norm_backward_rows<false>(a, begin, end, partial, nullptr));
    });
    TAPELM_DISPATCH(sum_partial(sums.partial(), sums.count(), sums.width(), C, dweight.mutable_data_ptr<T>()));
    if (mean)
      TAPELM_DISPATCH(sum_partial(sums.partial() + C, sums.count(), sums.width(), C, dbias.mutable_data_ptr<T>()));
  });
  return {dresidual, dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def(
      "add_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, float dropout_p, "
      "Tensor? seed) -> (Tensor y, Tensor r, Tensor mean, Tensor rstd)");
  m.def(
      "add_norm_backward(Tensor grad, Tensor? grad_r, Tensor r, Tensor weight, Tensor? mean, Tensor rstd, "
      "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("add_norm_forward", &add_norm_forward);
  m.impl("add_norm_backward", &add_norm_backward);
}

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  // Without dropout x has the gradient of residual.
  m.impl("add_norm_forward", derivative("add_norm_backward(grad, grad_r, r, weight, mean if bias, rstd, dropout_p, "
                                        "seed) -> residual, x or residual, weight, bias"));
  m.impl("add_norm_backward", no_derivative());
}

}  // namespace tapelm
