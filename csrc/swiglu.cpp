// SwiGLU without its matrix products (Shazeer 2020): silu(gate) * up, forward and backward.
#include "autograd.h"
#include "common.h"

#define TAPELM_KERNELS "swiglu.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

void check_like(const Tensor& t, const Tensor& gate, const char* name) {
  check_same_dtype(t, gate, "swiglu", name);
  TORCH_CHECK_VALUE(t.sizes() == gate.sizes(), "swiglu: ", name, " must have shape ", gate.sizes(), ", not ",
                    t.sizes());
}

Tensor swiglu_forward(const Tensor& gate_, const Tensor& up_) {
  check_dtype(gate_, "swiglu", "gate");
  check_like(up_, gate_, "up");
  const Tensor gate = gate_.contiguous(), up = up_.contiguous();
  Tensor y = empty_like(gate);
  const bool far = is_far(y, kTaskElements);
  with_dtype(gate, [&](auto zero) {
    using T = decltype(zero);
    for_chunks(gate.numel(), kTaskElements, [&](int64_t begin, int64_t end) {
      TAPELM_DISPATCH(swiglu_range(gate.const_data_ptr<T>() + begin, up.const_data_ptr<T>() + begin,
                                   y.mutable_data_ptr<T>() + begin, end - begin, far));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_, const Tensor& gate_, const Tensor& up_) {
  check_dtype(gate_, "swiglu", "gate");
  check_like(up_, gate_, "up");
  check_like(grad_, gate_, "grad");
  const Tensor grad = grad_.contiguous(), gate = gate_.contiguous(), up = up_.contiguous();
  Tensor dgate = empty_like(gate), dup = empty_like(gate);
  const bool far = is_far(dgate, kTaskElements) && is_far(dup, kTaskElements);
  with_dtype(gate, [&](auto zero) {
    using T = decltype(zero);
    for_chunks(gate.numel(), kTaskElements, [&](int64_t begin, int64_t end) {
      TAPELM_DISPATCH(swiglu_backward_range(grad.const_data_ptr<T>() + begin, gate.const_data_ptr<T>() + begin,
                                            up.const_data_ptr<T>() + begin, dgate.mutable_data_ptr<T>() + begin,
                                            dup.mutable_data_ptr<T>() + begin, end - begin, far));
    });
  });
  return {dgate, dup};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("swiglu_forward(Tensor gate, Tensor up) -> Tensor y");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("swiglu_forward", &swiglu_forward);
  m.impl("swiglu_backward", &swiglu_backward);
}

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  m.impl("swiglu_forward", derivative("swiglu_backward(grad, gate, up) -> gate, up"));
  m.impl("swiglu_backward", no_derivative());
}

}  // namespace tapelm
