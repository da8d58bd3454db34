// Linear layer y = x weight^T + bias and its gradients, on our own matrix product, row by row of the weight for a few
// rows x or, for some more and where prefer_matrix_product says so, on ATen's (MKL for float32, oneDNN for bfloat16).
#include "autograd.h"
#include "common.h"
#include "matrix_product.h"

#define TAPELM_KERNELS "linear.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

void check(const Tensor& x, const Tensor& weight) {
  check_dtype(x, "linear", "x");
  check_same_dtype(weight, x, "linear", "weight");
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(-1), "linear: x ", x.sizes(),
                    " does not fit weight ", weight.sizes());
}

bool ours(const Tensor& x) {
  return prefer_matrix_product(x.scalar_type()) && x.numel() > 0 && x.numel() / x.size(-1) >= kPackRows;
}

bool few(const Tensor& x, const Tensor& weight) {
  return prefer_matrix_product(x.scalar_type()) && x.numel() > 0 && weight.is_contiguous() &&
         are_few_rows(x.numel() / x.size(-1), x.size(-1), x.scalar_type());
}

template <typename T>
void few_rows_forward(const Tensor& rows, const Tensor& weight, const Tensor& bias, T* y) {
  const int64_t M = rows.size(0), N = weight.size(0), K = rows.size(1);
  const Tensor x = rows.to(at::kFloat).contiguous();
  const float* const from = x.const_data_ptr<float>();
  const T* const w = weight.const_data_ptr<T>();
  const T* const b = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  at::parallel_for(0, N, chunk_count(kFewGrain, K), [&](int64_t begin, int64_t end) {
    TAPELM_DISPATCH(few_rows(from, M, K, w, b, begin, end, y, N));
  });
}

Tensor linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x, weight);
  if (bias.has_value()) {
    check_same_dtype(*bias, x, "linear", "bias");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), "linear: bias must have shape (",
                      weight.size(0), ")");
  }
  const bool by_rows = few(x, weight);
  if (!by_rows && !ours(x)) return at::linear(x, weight, bias);
  const Tensor rows = as_rows(x);
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor y = empty(shape, x.scalar_type());
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    if (by_rows) return few_rows_forward<T>(rows, weight, b, y.mutable_data_ptr<T>());
    matrix_product(matrix_of<T>(rows), matrix_of<T>(weight).transposed(), rows.size(0), weight.size(0), rows.size(1),
                   b.defined() ? b.const_data_ptr<T>() : nullptr, false, y.mutable_data_ptr<T>(), weight.size(0));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                   bool has_bias) {
  check(x, weight);
  check_same_dtype(grad, x, "linear", "grad");
  const int64_t N = weight.size(0), K = weight.size(1);
  TORCH_CHECK_VALUE(grad.dim() == x.dim() && grad.size(-1) == N, "linear: grad ", grad.sizes(), " does not fit weight ",
                    weight.sizes());
  const Tensor g = as_rows(grad), rows = as_rows(x);
  if (!ours(x))
    return {at::mm(g, weight).reshape(x.sizes()), at::mm(g.t(), rows),
            has_bias ? g.sum(0) : at::empty({0}, x.options())};
  Tensor dx = empty_like(x), dweight = empty_like(weight), dbias = empty({has_bias ? N : 0}, at::kFloat);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    matrix_product<T, T>(matrix_of<T>(g), matrix_of<T>(weight), g.size(0), K, N, nullptr, false,
                         dx.mutable_data_ptr<T>(), K);
    // The bias's gradient is the row sums of the left operand of the weight's.
    matrix_product<T, T>(matrix_of<T>(g).transposed(), matrix_of<T>(rows), N, K, g.size(0), nullptr, false,
                         dweight.mutable_data_ptr<T>(), K, has_bias ? dbias.mutable_data_ptr<float>() : nullptr);
  });
  return {dx, dweight, dbias.to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_backward(Tensor grad, Tensor x, Tensor weight, bool has_bias) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("linear_forward", &linear_forward);
  m.impl("linear_backward", &linear_backward);
}

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  m.impl("linear_forward", derivative("linear_backward(grad, x, weight, has bias) -> x, weight, bias"));
  m.impl("linear_backward", no_derivative());
}

}  // namespace tapelm
