// Mean cross-entropy over a head that does not train, as under LoRA: the loss and the gradient of hidden, without the
// product that the gradient of the weight would take. Otherwise as linear_cross_entropy.cpp, whose row kernel it uses.
#include "common.h"
#include "matrix_product.h"

#define TAPELM_KERNELS "linear_cross_entropy.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

// Logits held at a time: each of the two products packs the weight once for so many rows.
constexpr int64_t kChunkBytes = 128 << 20, kMinRows = 128;

// out = left right.
void product(const Tensor& left, const Tensor& right, Tensor out) {
  if (!prefer_matrix_product(left.scalar_type())) {
    at::mm_out(out, left, right);
    return;
  }
  with_dtype(left, [&](auto zero) {
    using T = decltype(zero);
    matrix_product<T, T>({left.const_data_ptr<T>(), left.stride(0), left.stride(1)},
                         {right.const_data_ptr<T>(), right.stride(0), right.stride(1)}, left.size(0), right.size(1),
                         left.size(1), nullptr, false, out.mutable_data_ptr<T>(), out.stride(0));
  });
}

std::tuple<Tensor, Tensor> frozen_cross_entropy_forward(const Tensor& hidden_, const Tensor& weight_,
                                                        const Tensor& targets_, int64_t ignore_index, bool need_grad) {
  check_dtype(hidden_, "linear_cross_entropy", "hidden");
  check_same_dtype(weight_, hidden_, "linear_cross_entropy", "weight");
  TORCH_CHECK_VALUE(hidden_.dim() == 2 && weight_.dim() == 2 && hidden_.size(1) == weight_.size(1),
                    "linear_cross_entropy: hidden ", hidden_.sizes(), " does not fit weight ", weight_.sizes());
  TORCH_CHECK_TYPE(targets_.scalar_type() == at::kLong, "linear_cross_entropy: targets must be int64");
  TORCH_CHECK_VALUE(targets_.dim() == 1 && targets_.size(0) == hidden_.size(0),
                    "linear_cross_entropy: targets must have shape (", hidden_.size(0), "), not ", targets_.sizes());
  const Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous(), targets = targets_.contiguous();
  const int64_t N = hidden.size(0), V = weight.size(0);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  int64_t valid = 0;
  for (int64_t i = 0; i < N; ++i) {
    if (target[i] == ignore_index) continue;
    TORCH_CHECK_INDEX(target[i] >= 0 && target[i] < V, "linear_cross_entropy: target ", target[i], " at position ", i,
                      " is outside [0, ", V, ")");
    ++valid;
  }
  // Like PyTorch: the mean over no target at all is NaN, and its gradient is zero rows times NaN.
  const float scale = 1.0f / static_cast<float>(valid);
  Tensor dhidden = need_grad ? empty_like(hidden) : at::empty({0}, hidden.options());
  const int64_t most = std::max(kMinRows, kChunkBytes / std::max<int64_t>(1, V * hidden.element_size()));
  const int64_t rows = std::max<int64_t>(1, chunk_count(N, std::max<int64_t>(1, chunk_count(N, most))));
  const Tensor buffer = empty({std::min(rows, N), V}, hidden.scalar_type());
  const Scratch losses(std::max<int64_t>(N, 1));
  float* const loss = losses.get();
  for (int64_t begin = 0; begin < N; begin += rows) {
    const int64_t end = std::min(N, begin + rows);
    const Tensor logits = buffer.slice(0, 0, end - begin);
    product(hidden.slice(0, begin, end), weight.t(), logits);
    with_dtype(logits, [&](auto zero) {
      using T = decltype(zero);
      T* data = logits.mutable_data_ptr<T>();
      for_chunks(end - begin, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t t = target[begin + i];
          loss[begin + i] = 0.0f;
          if (t == ignore_index)
            std::fill(data + i * V, data + (i + 1) * V, static_cast<T>(0.0f));
          else
            loss[begin + i] = TAPELM_DISPATCH(
                cross_entropy_row(data + i * V, nullptr, V, t, need_grad ? scale : 0.0f));
        }
      });
    });
    if (need_grad) product(logits, weight, dhidden.slice(0, begin, end));
  }
  double total = 0.0;
  for (int64_t i = 0; i < N; ++i) total += loss[i];
  return {at::scalar_tensor(total / static_cast<double>(valid), hidden.options().dtype(at::kFloat)), dhidden};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def(
      "frozen_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool need_grad) -> "
      "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) { m.impl("frozen_cross_entropy_forward", &frozen_cross_entropy_forward); }

}  // namespace tapelm
