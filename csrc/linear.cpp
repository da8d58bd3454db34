// Linear layer y = x weight^T + bias and its gradients. float32 on AVX2 runs on our own matrix product, products
// of a few rows and everything else on ATen's (MKL for float32, oneDNN for bfloat16).
#include "common.h"
#include "matrix_product.h"

#include <memory>

#define TAPELM_KERNELS "linear.inl"
#include "simd_targets.h"

namespace tapelm {

bool prefer_matrix_product() { return isa() != Isa::avx512; }

void matrix_product(Matrix left, Matrix right, int64_t M, int64_t N, int64_t K, const float* bias, bool add, float* out,
                    int64_t ld) {
  if (K == 0 && !add)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) out[m * ld + n] = bias ? bias[n] : 0.0f;
  const int64_t MC = TAPELM_DISPATCH(linear_row_block()), KC = TAPELM_DISPATCH(linear_depth_block());
  const int64_t NC = TAPELM_DISPATCH(linear_column_block()), NR = TAPELM_DISPATCH(linear_panel());
  const int64_t left_floats = TAPELM_DISPATCH(linear_left_floats());
  const std::unique_ptr<float[]> packed(new float[TAPELM_DISPATCH(linear_right_floats())]);
  for (int64_t n0 = 0; n0 < N; n0 += NC) {
    const int64_t columns = std::min(NC, N - n0);
    for (int64_t k0 = 0; k0 < K; k0 += KC) {
      const int64_t depth = std::min(KC, K - k0);
      at::parallel_for(0, chunk_count(columns, NR), 4, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p)
          TAPELM_DISPATCH(pack_right(right, k0, depth, n0 + p * NR, N, packed.get() + p * NR * depth));
      });
      at::parallel_for(0, chunk_count(M, MC), 1, [&](int64_t first, int64_t last) {
        const std::unique_ptr<float[]> space(new float[left_floats]);
        for (int64_t block = first; block < last; ++block) {
          const int64_t m0 = block * MC, rows = std::min(MC, M - m0);
          TAPELM_DISPATCH(multiply_block(left, m0, rows, k0, depth, packed.get(), columns, bias ? bias + n0 : nullptr,
                                         add || k0 > 0, out + m0 * ld + n0, ld, space.get()));
        }
      });
    }
  }
}

namespace {

void check(const Tensor& x, const Tensor& weight) {
  check_dtype(x, "linear", "x");
  check_same_dtype(weight, x, "linear", "weight");
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(-1), "linear: x ", x.sizes(),
                    " does not fit weight ", weight.sizes());
}

Matrix matrix_of(const Tensor& t) { return {t.const_data_ptr<float>(), t.stride(0), t.stride(1)}; }

// Below this many rows packing the weight costs more than the product: the time is that of reading the weight once.
constexpr int64_t kFewRows = 64;

bool ours(const Tensor& x) {
  return x.scalar_type() == at::kFloat && prefer_matrix_product() &&
         (x.size(-1) == 0 || x.numel() / x.size(-1) >= kFewRows);
}

// (..., C) as (rows, C); explicit sizes, since reshape cannot infer one of a tensor without elements.
Tensor as_rows(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return t.reshape({rows, t.size(-1)});
}

Tensor linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x, weight);
  if (bias.has_value()) {
    check_same_dtype(*bias, x, "linear", "bias");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), "linear: bias must have shape (",
                      weight.size(0), ")");
  }
  if (!ours(x)) return at::linear(x, weight, bias);
  const Tensor rows = as_rows(x);
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor y = at::empty(shape, x.options());
  matrix_product(matrix_of(rows), matrix_of(weight).transposed(), rows.size(0), weight.size(0), rows.size(1),
                 b.defined() ? b.const_data_ptr<float>() : nullptr, false, y.mutable_data_ptr<float>(), weight.size(0));
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
  const Tensor dbias = has_bias ? g.sum(0) : at::empty({0}, x.options());
  if (!ours(x))
    return {at::mm(g, weight).reshape(x.sizes()), at::mm(g.t(), rows), dbias};
  Tensor dx = at::empty(x.sizes(), x.options()), dweight = at::empty(weight.sizes(), weight.options());
  matrix_product(matrix_of(g), matrix_of(weight), g.size(0), K, N, nullptr, false, dx.mutable_data_ptr<float>(), K);
  matrix_product(matrix_of(g).transposed(), matrix_of(rows), N, K, g.size(0), nullptr, false,
                 dweight.mutable_data_ptr<float>(), K);
  return {dx, dweight, dbias};
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

}  // namespace tapelm
