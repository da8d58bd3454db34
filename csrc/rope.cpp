// Rotary position embedding (Su et al. 2021) of queries and keys in the rotate-half layout of Llama.
#include "autograd.h"
#include "common.h"

#define TAPELM_KERNELS "rope.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

constexpr int64_t kPositions = 32;  // positions per task: their cos and sin stay in the cache while the heads go by

void check(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  check_dtype(q, "rope", "q");
  check_same_dtype(k, q, "rope", "k");
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "rope: q and k must be (B, H, T, D)");
  TORCH_CHECK_VALUE(q.size(3) % 2 == 0, "rope: D is ", q.size(3), "; it must be even");
  TORCH_CHECK_VALUE(k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3), "rope: k is ",
                    k.sizes(), "; it must equal q ", q.sizes(), " but for the heads");
  TORCH_CHECK_VALUE(cos.sizes() == sin.sizes(), "rope: cos and sin must have one shape");
  const bool batched = cos.dim() == 3;
  TORCH_CHECK_VALUE((batched ? cos.size(0) == q.size(0) : cos.dim() == 2) && cos.size(-2) == q.size(2) &&
                        cos.size(-1) == q.size(3),
                    "rope: cos must be (T, D) or (B, T, D) for q ", q.sizes(), ", not ", cos.sizes());
}

// Any strides will do as long as the D elements of a head lie side by side.
Tensor with_dense_heads(const Tensor& t) { return t.stride(3) == 1 || t.size(3) <= 1 ? t : t.contiguous(); }

std::tuple<Tensor, Tensor> rope(const Tensor& q_, const Tensor& k_, const Tensor& cos_, const Tensor& sin_,
                                bool inverse) {
  check(q_, k_, cos_, sin_);
  const Tensor in[2] = {with_dense_heads(q_), with_dense_heads(k_)};
  const Tensor out[2] = {empty(q_.sizes(), q_.scalar_type()), empty(k_.sizes(), k_.scalar_type())};
  const Tensor cos = cos_.to(at::kFloat).contiguous(), sin = sin_.to(at::kFloat).contiguous();
  const int64_t B = q_.size(0), T = q_.size(2), D = q_.size(3), blocks = chunk_count(T, kPositions);
  const bool far[2] = {is_far(out[0], D / 2), is_far(out[1], D / 2)};
  with_dtype(q_, [&](auto zero) {
    using E = decltype(zero);
    for_chunks(B * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, t = task % blocks * kPositions, count = std::min(kPositions, T - t);
        const int64_t table = ((cos.dim() == 3 ? b * T : 0) + t) * D;
        for (int which = 0; which < 2; ++which) {
          const Tensor& x = in[which];
          const int64_t H = x.size(1);
          for (int64_t h = 0; h < H; ++h) {
            const E* from = x.const_data_ptr<E>() + b * x.stride(0) + h * x.stride(1) + t * x.stride(2);
            E* to = out[which].mutable_data_ptr<E>() + ((b * H + h) * T + t) * D;
            const float *c = cos.const_data_ptr<float>() + table, *s = sin.const_data_ptr<float>() + table;
            if (inverse)
              TAPELM_DISPATCH(rope_positions<true>(from, x.stride(2), c, s, to, D, count, far[which]));
            else
              TAPELM_DISPATCH(rope_positions<false>(from, x.stride(2), c, s, to, D, count, far[which]));
          }
        }
      }
    });
  });
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor q_out, Tensor k_out)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) { m.impl("rope", &rope); }

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  m.impl("rope", derivative("rope(grad, grad_k_out, cos, sin, not inverse) -> q, k"));
}

}  // namespace tapelm
