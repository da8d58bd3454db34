// Layer normalisation over the last dimension (Ba et al. 2016), forward and backward.
#include "common.h"

#define TAPELM_KERNELS "layer_norm.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

constexpr int64_t kRowsPerChunk = 256;  // at most kMaxChunks partial sums of dweight, dbias
constexpr int64_t kMaxChunks = 64;

void check(const Tensor& x, const Tensor& weight, const Tensor& other, const char* other_name) {
  check_dtype(x, "layer_norm", "x");
  check_same_dtype(weight, x, "layer_norm", "weight");
  TORCH_CHECK_VALUE(x.dim() >= 1, "layer_norm: x needs at least one dimension");
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(-1), "layer_norm: weight must have shape (",
                    x.size(-1), "), not ", weight.sizes());
  TORCH_CHECK_VALUE(other.numel() == 0 || other.size(-1) == x.size(-1), "layer_norm: ", other_name,
                    " does not match x");
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                                                      double eps) {
  check(x_, weight_, bias_, "bias");
  check_same_dtype(bias_, x_, "layer_norm", "bias");
  const Tensor x = x_.contiguous(), weight = weight_.contiguous(), bias = bias_.contiguous();
  const int64_t C = x.size(-1), rows = C ? x.numel() / C : 0;
  Tensor y = empty_like(x);
  Tensor mean = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  Tensor rstd = empty_like(mean);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(C, 1)), [&](int64_t begin, int64_t end) {
      TAPELM_DISPATCH(layer_norm_rows(x.const_data_ptr<T>(), weight.const_data_ptr<T>(), bias.const_data_ptr<T>(),
                                      y.mutable_data_ptr<T>(), mean.mutable_data_ptr<float>(),
                                      rstd.mutable_data_ptr<float>(), C, static_cast<float>(eps), begin, end));
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                                       const Tensor& mean_, const Tensor& rstd_) {
  check(x_, weight_, grad_, "grad");
  check_same_dtype(grad_, x_, "layer_norm", "grad");
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const int64_t C = x.size(-1), rows = C ? x.numel() / C : 0;
  const int64_t chunks = std::min(kMaxChunks, chunk_count(rows, kRowsPerChunk));
  Tensor dx = empty_like(x);
  Tensor partial = at::zeros({2, std::max<int64_t>(chunks, 1), C}, x.options().dtype(at::kFloat));
  float* dweight = partial.mutable_data_ptr<float>();
  float* dbias = dweight + partial.size(1) * C;
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk)
        TAPELM_DISPATCH(layer_norm_backward_rows(
            grad.const_data_ptr<T>(), x.const_data_ptr<T>(), weight.const_data_ptr<T>(), mean.const_data_ptr<float>(),
            rstd.const_data_ptr<float>(), dx.mutable_data_ptr<T>(), dweight + chunk * C, dbias + chunk * C, C,
            rows * chunk / chunks, rows * (chunk + 1) / chunks));
    });
  });
  const Tensor sums = partial.sum(1).to(x.scalar_type());
  return {dx, sums[0].clone(), sums[1].clone()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("layer_norm_forward", &layer_norm_forward);
  m.impl("layer_norm_backward", &layer_norm_backward);
}

}  // namespace tapelm
