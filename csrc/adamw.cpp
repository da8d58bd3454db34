// AdamW (Loshchilov & Hutter 2019) over a list of tensors in one parallel pass, and the global gradient norm.
#include "common.h"

namespace tapelm {

struct AdamWStep {
  float grad_scale, beta1, beta2, eps;
  float decay;                    // 1 - lr * weight_decay
  float step_size;                // lr / (1 - beta1^step)
  float inverse_root_correction2; // 1 / sqrt(1 - beta2^step)
};

}  // namespace tapelm

#define TAPELM_KERNELS "adamw.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

constexpr int64_t kChunk = 1 << 16;  // elements per task

// The chunks of all tensors in one list, so that many small tensors and a few large ones load the threads alike.
struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Chunk> chunks_of(at::TensorList tensors) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t i = 0; i < tensors[t].numel(); i += kChunk)
      chunks.push_back({t, i, std::min(tensors[t].numel(), i + kChunk)});
  return chunks;
}

Tensor grad_norm(at::TensorList grads_) {
  std::vector<Tensor> grads;
  for (const Tensor& g : grads_) {
    check_dtype(g, "grad_norm", "grads");
    grads.push_back(g.contiguous());
  }
  const std::vector<Chunk> chunks = chunks_of(grads);
  std::vector<double> partial(chunks.size());
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      const Tensor& g = grads[chunk.tensor];
      with_dtype(g, [&](auto zero) {
        const auto* data = g.const_data_ptr<decltype(zero)>() + chunk.begin;
        partial[c] = TAPELM_DISPATCH(sum_of_squares(data, chunk.end - chunk.begin));
      });
    }
  });
  double total = 0.0;
  for (const double p : partial) total += p;
  return at::scalar_tensor(std::sqrt(total), at::dtype(at::kFloat));
}

void adamw_step_(at::TensorList params, at::TensorList grads_, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                 at::TensorList masters, const Tensor& grad_scale, double lr, double beta1, double beta2, double eps,
                 double weight_decay, int64_t step) {
  const size_t n = params.size();
  TORCH_CHECK_VALUE(grads_.size() == n && exp_avg.size() == n && exp_avg_sq.size() == n &&
                        (masters.empty() || masters.size() == n),
                    "adamw: params, grads, exp_avg, exp_avg_sq (and masters) must have the same length");
  TORCH_CHECK_VALUE(step >= 1, "adamw: step counts from 1");
  std::vector<Tensor> grads;
  for (size_t i = 0; i < n; ++i) {
    const bool half = params[i].scalar_type() == at::kBFloat16;
    check_dtype(params[i], "adamw", "params");
    check_same_dtype(grads_[i], params[i], "adamw", "grads");
    TORCH_CHECK_VALUE(half == !masters.empty(), "adamw: masters are for bfloat16 parameters, and only for them");
    TORCH_CHECK_VALUE(params[i].is_contiguous() && exp_avg[i].is_contiguous() && exp_avg_sq[i].is_contiguous() &&
                          (masters.empty() || masters[i].is_contiguous()),
                      "adamw: parameters and states must be contiguous");
    TORCH_CHECK_VALUE(grads_[i].sizes() == params[i].sizes(), "adamw: grads must have the shapes of params");
    TORCH_CHECK_TYPE(exp_avg[i].scalar_type() == at::kFloat && exp_avg_sq[i].scalar_type() == at::kFloat &&
                         (masters.empty() || masters[i].scalar_type() == at::kFloat),
                     "adamw: states and masters must be float32");
    TORCH_CHECK_VALUE(exp_avg[i].numel() == params[i].numel() && exp_avg_sq[i].numel() == params[i].numel() &&
                          (masters.empty() || masters[i].numel() == params[i].numel()),
                      "adamw: states must have the sizes of params");
    grads.push_back(grads_[i].contiguous());
  }
  const AdamWStep s{
      grad_scale.item<float>(),
      static_cast<float>(beta1),
      static_cast<float>(beta2),
      static_cast<float>(eps),
      static_cast<float>(1.0 - lr * weight_decay),
      static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step)))),
      static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step)))),
  };
  const std::vector<Chunk> chunks = chunks_of(params);
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const auto [t, begin, end] = chunks[c];
      with_dtype(params[t], [&](auto zero) {
        using T = decltype(zero);
        T* param = params[t].mutable_data_ptr<T>() + begin;
        float* master;
        if constexpr (std::is_same_v<T, float>)
          master = param;
        else
          master = masters[t].mutable_data_ptr<float>() + begin;
        TAPELM_DISPATCH(adamw_range(param, grads[t].const_data_ptr<T>() + begin,
                                    exp_avg[t].mutable_data_ptr<float>() + begin,
                                    exp_avg_sq[t].mutable_data_ptr<float>() + begin, master, s, end - begin));
      });
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("grad_norm(Tensor[] grads) -> Tensor");
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] "
      "masters, Tensor grad_scale, float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("grad_norm", &grad_norm);
  m.impl("adamw_step_", &adamw_step_);
}

}  // namespace tapelm
