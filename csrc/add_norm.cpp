// r = residual + dropout(x) and the norm of r over its last dimension in one pass: LayerNorm with a bias, RMSNorm
// without one. The dropout mask is that of dropout.cpp: element i of x has index i; the backward computes it again.
#include "common.h"

namespace tapelm {
struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t threshold;
  float scale;
};
}  // namespace tapelm

#define TAPELM_KERNELS "add_norm.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRowsPerChunk = 256;  // at most kMaxChunks partial sums of dweight, dbias
constexpr int64_t kMaxChunks = 64;

void check_vector(const Tensor& vector, const Tensor& x, const char* name) {
  check_same_dtype(vector, x, "add_norm", name);
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == x.size(-1), "add_norm: ", name, " must have shape (",
                    x.size(-1), "), not ", vector.sizes());
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_same_dtype(t, x, "add_norm", name);
  TORCH_CHECK_VALUE(t.sizes() == x.sizes(), "add_norm: ", name, " must have shape ", x.sizes(), ", not ", t.sizes());
}

Dropout make_dropout(double p, const OptionalTensor& seed) {
  TORCH_CHECK_VALUE(p >= 0.0 && p < 1.0, "add_norm: dropout_p must be in [0, 1), not ", p);
  if (p == 0.0) return {false, 0, 0, 1.0f};
  TORCH_CHECK_TYPE(seed && seed->scalar_type() == at::kLong && seed->numel() == 1,
                   "add_norm: dropout needs a seed of one int64");
  return {true, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), dropout_threshold(p), dropout_scale(p)};
}

// The data of a tensor that may be absent, as a pointer that may be null.
template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_forward(const Tensor& x_, const Tensor& residual_,
                                                            const Tensor& weight_, const OptionalTensor& bias_,
                                                            double eps, double p, const OptionalTensor& seed) {
  check_dtype(x_, "add_norm", "x");
  TORCH_CHECK_VALUE(x_.dim() >= 1, "add_norm: x needs at least one dimension");
  check_like(residual_, x_, "residual");
  check_vector(weight_, x_, "weight");
  if (bias_) check_vector(*bias_, x_, "bias");
  const Dropout dropout = make_dropout(p, seed);
  const Tensor x = x_.contiguous(), residual = residual_.contiguous(), weight = weight_.contiguous();
  const OptionalTensor bias = contiguous(bias_);
  const int64_t C = x.size(-1), rows = C ? x.numel() / C : 0;
  Tensor y = empty_like(x), r = empty_like(x);
  Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  Tensor mean = bias ? empty_like(rstd) : at::empty({0}, rstd.options());
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto kernel, int64_t begin, int64_t end) {
      kernel(x.const_data_ptr<T>(), residual.const_data_ptr<T>(), weight.const_data_ptr<T>(), data_or_null<T>(bias),
             y.mutable_data_ptr<T>(), r.mutable_data_ptr<T>(), mean.mutable_data_ptr<float>(),
             rstd.mutable_data_ptr<float>(), C, static_cast<float>(eps), dropout, begin, end);
    };
    at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(C, 1)), [&](int64_t begin, int64_t end) {
      if (bias)
        run([](const auto&... args) { TAPELM_DISPATCH(add_norm_rows<true>(args...)); }, begin, end);
      else
        run([](const auto&... args) { TAPELM_DISPATCH(add_norm_rows<false>(args...)); }, begin, end);
    });
  });
  return {y, r, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(const Tensor& grad_, const OptionalTensor& grad_r_,
                                                             const Tensor& r_, const Tensor& weight_,
                                                             const OptionalTensor& mean_, const Tensor& rstd_,
                                                             double p, const OptionalTensor& seed) {
  check_dtype(r_, "add_norm", "r");
  TORCH_CHECK_VALUE(r_.dim() >= 1, "add_norm: r needs at least one dimension");
  check_like(grad_, r_, "grad");
  if (grad_r_) check_like(*grad_r_, r_, "grad_r");
  check_vector(weight_, r_, "weight");
  const Dropout dropout = make_dropout(p, seed);
  const Tensor grad = grad_.contiguous(), r = r_.contiguous(), weight = weight_.contiguous();
  const Tensor rstd = rstd_.contiguous();
  const OptionalTensor grad_r = contiguous(grad_r_), mean = contiguous(mean_);
  const int64_t C = r.size(-1), rows = C ? r.numel() / C : 0;
  const int64_t chunks = std::min(kMaxChunks, chunk_count(rows, kRowsPerChunk));
  Tensor dresidual = empty_like(r);
  Tensor dx = dropout.active ? empty_like(r) : at::empty({0}, r.options());
  Tensor partial = at::zeros({mean ? 2 : 1, std::max<int64_t>(chunks, 1), C}, r.options().dtype(at::kFloat));
  float* dweight = partial.mutable_data_ptr<float>();
  float* dbias = mean ? dweight + partial.size(1) * C : nullptr;
  with_dtype(r, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto kernel, int64_t chunk) {
      kernel(grad.const_data_ptr<T>(), data_or_null<T>(grad_r), r.const_data_ptr<T>(), weight.const_data_ptr<T>(),
             data_or_null<float>(mean), rstd.const_data_ptr<float>(), dresidual.mutable_data_ptr<T>(),
             dropout.active ? dx.mutable_data_ptr<T>() : nullptr, dweight + chunk * C,
             mean ? dbias + chunk * C : nullptr, C, dropout, rows * chunk / chunks, rows * (chunk + 1) / chunks);
    };
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        if (mean)
          run([](const auto&... args) { TAPELM_DISPATCH(add_norm_backward_rows<true>(args...)); }, chunk);
        else
          run([](const auto&... args) { TAPELM_DISPATCH(add_norm_backward_rows<false>(args...)); }, chunk);
      }
    });
  });
  const Tensor sums = partial.sum(1).to(r.scalar_type());
  return {dresidual, dx, sums[0].clone(), mean ? sums[1].clone() : at::empty({0}, r.options())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def(
      "add_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, float dropout_p, "
      "Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_norm_backward(Tensor grad, Tensor? grad_r, Tensor r, Tensor weight, Tensor? mean, Tensor rstd, "
      "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("add_norm_forward", &add_norm_forward);
  m.impl("add_norm_backward", &add_norm_backward);
}

}  // namespace tapelm
