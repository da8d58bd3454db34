// Mean cross-entropy of hidden weight^T (+ bias) against targets, chunk by chunk of tokens: a chunk's logits become
// its gradient in place and feed both gradient products before the next chunk overwrites them, so that neither the
// logits nor their gradient are ever stored whole (Wijmans et al. 2025, "Cut your losses", in its simplest form).
#include "autograd.h"
#include "common.h"
#include "matrix_product.h"

#define TAPELM_KERNELS "linear_cross_entropy.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

// A chunk is a third of the rows, so that the logits held are a third of all, but not above kChunkBytes. Below
// kMinRows the products lose efficiency. Up to kWholeRows times the width, all rows are one chunk: the float32 sums of
// the weight's gradient over several ones would be as large as what they save, and cost time. So they are where the
// weight does not train and has none.
constexpr int64_t kChunks = 3, kChunkBytes = 128 << 20, kMinRows = 128, kWholeRows = 4;

int64_t chunk_rows(int64_t N, int64_t C, int64_t row_bytes, bool frozen) {
  const int64_t fitting = kChunkBytes / std::max<int64_t>(1, row_bytes);
  const int64_t wanted = frozen || N <= kWholeRows * C ? N : chunk_count(N, kChunks);
  const int64_t most = std::max(kMinRows, std::min(wanted, fitting));
  return std::max<int64_t>(1, chunk_count(N, std::max<int64_t>(1, chunk_count(N, most))));  // chunks of equal size
}

template <typename T, typename Out>
void product_of(const Tensor& left, const Tensor& right, bool add, Tensor out) {
  matrix_product<T, Out>({left.const_data_ptr<T>(), left.stride(0), left.stride(1)},
                         {right.const_data_ptr<T>(), right.stride(0), right.stride(1)}, left.size(0), right.size(1),
                         left.size(1), nullptr, add, out.mutable_data_ptr<Out>(), out.stride(0));
}

// out = left right, or out += left right; out has the dtype of left or is float32.
void product(const Tensor& left, const Tensor& right, bool add, Tensor out) {
  if (prefer_matrix_product(left.scalar_type())) {
    if (left.scalar_type() == at::kFloat)
      product_of<float, float>(left, right, add, out);
    else if (out.scalar_type() == at::kFloat)
      product_of<bf16, float>(left, right, add, out);
    else
      product_of<bf16, bf16>(left, right, add, out);
  } else if (out.scalar_type() != left.scalar_type()) {
    const Tensor result = at::mm(left, right);
    add ? out.add_(result) : out.copy_(result);
  } else if (add) {
    out.addmm_(left, right);
  } else {
    at::mm_out(out, left, right);
  }
}

Tensor converted(const Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype ? x : empty(x.sizes(), dtype).copy_(x);
}

// (loss, dhidden, dweight, dbias); a frozen weight has no gradient, nor has the bias beside it.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden_, const Tensor& weight_, const Tensor& targets_,
                                                   const std::optional<Tensor>& bias_, int64_t ignore_index,
                                                   bool need_grad, bool frozen) {
  check_dtype(hidden_, "linear_cross_entropy", "hidden");
  check_same_dtype(weight_, hidden_, "linear_cross_entropy", "weight");
  TORCH_CHECK_VALUE(hidden_.dim() == 2 && weight_.dim() == 2 && hidden_.size(1) == weight_.size(1),
                    "linear_cross_entropy: hidden ", hidden_.sizes(), " does not fit weight ", weight_.sizes());
  TORCH_CHECK_TYPE(targets_.scalar_type() == at::kLong, "linear_cross_entropy: targets must be int64");
  TORCH_CHECK_VALUE(targets_.dim() == 1 && targets_.size(0) == hidden_.size(0),
                    "linear_cross_entropy: targets must have shape (", hidden_.size(0), "), not ", targets_.sizes());
  const Tensor hidden = hidden_.contiguous(), weight = weight_.contiguous(), targets = targets_.contiguous();
  const int64_t N = hidden.size(0), V = weight.size(0);
  const auto floats = hidden.options().dtype(at::kFloat);
  Tensor bias;
  if (bias_.has_value()) {
    TORCH_CHECK_VALUE(bias_->dim() == 1 && bias_->size(0) == V, "linear_cross_entropy: bias must have shape (", V, ")");
    bias = bias_->to(at::kFloat).contiguous();
  }
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
  const bool need_weight_grad = need_grad && !frozen;
  const int64_t rows = chunk_rows(N, hidden.size(1), V * hidden.element_size(), frozen);
  const auto sum_dtype = rows < N ? at::kFloat : hidden.scalar_type();
  Tensor dweight = need_weight_grad ? empty(weight.sizes(), sum_dtype) : at::empty({0}, floats);
  if (need_weight_grad && N == 0) dweight.zero_();
  Tensor dbias = need_weight_grad && bias.defined() ? at::zeros({V}, floats) : at::empty({0}, hidden.options());
  Tensor buffer = empty({std::min(rows, N), V}, hidden.scalar_type());
  Tensor losses = at::zeros({N}, floats);
  float* loss = losses.mutable_data_ptr<float>();
  const float* bias_data = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  for (int64_t begin = 0; begin < N; begin += rows) {
    const int64_t end = std::min(N, begin + rows);
    const Tensor h = hidden.slice(0, begin, end);
    Tensor logits = buffer.slice(0, 0, end - begin);
    product(h, weight.t(), false, logits);
    with_dtype(logits, [&](auto zero) {
      using T = decltype(zero);
      T* data = logits.mutable_data_ptr<T>();
      at::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          T* row = data + (i - begin) * V;
          if (target[i] == ignore_index)
            std::fill(row, row + V, static_cast<T>(0.0f));
          else
            loss[i] = TAPELM_DISPATCH(cross_entropy_row(row, bias_data, V, target[i], need_grad ? scale : 0.0f));
        }
      });
    });
    if (!need_grad) continue;
    product(logits, weight, false, dhidden.slice(0, begin, end));
    if (!need_weight_grad) continue;
    product(logits.t(), h, begin > 0, dweight);
    if (bias.defined()) dbias.add_(logits.sum(0, false, at::kFloat));
  }
  double total = 0.0;
  for (int64_t i = 0; i < N; ++i) total += loss[i];
  const Tensor mean = at::scalar_tensor(total / static_cast<double>(valid), floats);
  return {mean, dhidden, converted(dweight, hidden.scalar_type()), dbias.to(hidden.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(const Tensor& hidden, const Tensor& weight,
                                                                        const Tensor& targets,
                                                                        const std::optional<Tensor>& bias,
                                                                        int64_t ignore_index, bool need_grad) {
  return forward(hidden, weight, targets, bias, ignore_index, need_grad, false);
}

std::tuple<Tensor, Tensor> frozen_cross_entropy_forward(const Tensor& hidden, const Tensor& weight,
                                                        const Tensor& targets, int64_t ignore_index, bool need_grad) {
  auto [loss, dhidden, dweight, dbias] = forward(hidden, weight, targets, {}, ignore_index, need_grad, true);
  return {loss, dhidden};
}

void check_has_gradients(bool need_grad) {
  TORCH_CHECK(need_grad,
              "linear_cross_entropy: the loss was computed without its gradients, with grad disabled or from "
              "tensors that did not seem to need one; enable grad, and under vmap differentiate within it.");
}

// The gradients left with the loss and only have to be scaled, on every device.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(const Tensor& grad, const Tensor& dhidden,
                                                                 const Tensor& dweight, const Tensor& dbias,
                                                                 bool need_grad) {
  check_has_gradients(need_grad);
  return {dhidden.mul(grad), dweight.mul(grad), dbias.mul(grad)};
}

Tensor frozen_cross_entropy_backward(const Tensor& grad, const Tensor& dhidden, bool need_grad) {
  check_has_gradients(need_grad);
  return dhidden.mul(grad);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def(
      "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, int ignore_index, bool "
      "need_grad) -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad, Tensor dhidden, Tensor dweight, Tensor dbias, bool need_grad) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "frozen_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool need_grad) -> "
      "(Tensor loss, Tensor dhidden)");
  m.def("frozen_cross_entropy_backward(Tensor grad, Tensor dhidden, bool need_grad) -> Tensor");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("linear_cross_entropy_forward", &linear_cross_entropy_forward);
  m.impl("frozen_cross_entropy_forward", &frozen_cross_entropy_forward);
}

TORCH_LIBRARY_IMPL(tapelm, CompositeExplicitAutograd, m) {
  m.impl("linear_cross_entropy_backward", &linear_cross_entropy_backward);
  m.impl("frozen_cross_entropy_backward", &frozen_cross_entropy_backward);
}

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  m.impl("linear_cross_entropy_forward",
         derivative("linear_cross_entropy_backward(grad, dhidden, dweight, dbias, need_grad) -> hidden, weight, bias"));
  m.impl("linear_cross_entropy_backward", no_derivative());
  m.impl("frozen_cross_entropy_forward",
         derivative("frozen_cross_entropy_backward(grad, dhidden, need_grad) -> hidden"));
  m.impl("frozen_cross_entropy_backward", no_derivative());
}

}  // namespace tapelm
