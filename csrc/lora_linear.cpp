// Frozen linear layer with a low-rank update, y = x W^T + scaling (x A^T) B^T, and its gradients; W dense or NF4.
#include "autograd.h"
#include "common.h"
#include "matrix_product.h"
#include "nf4.h"

#define TAPELM_KERNELS "lora_linear.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

constexpr int64_t kPart = int64_t{1} << 22;  // dequantized elements at a time: enough for the products to run at speed
constexpr int64_t kGrain = 32768;            // elements per task

// Whether a product of `left` and the update of low (M, R) are better computed together by ours.
bool ours(const Tensor& left, const Tensor& low) {
  return prefer_matrix_product(left.scalar_type()) && left.size(0) >= kPackRows && low.size(1) <= kAddendDepth;
}

// body(addend) with scaling low high, where low (M, R) and high (R, N), or null where R is none.
template <typename T, typename Body>
void with_update(const Tensor& low, const Tensor& high, double scaling, Body body) {
  const Tensor scaled = scaling == 1.0 ? low : at::mul(low, scaling);
  const Addend<T> addend{matrix_of<T>(scaled), matrix_of<T>(high), low.size(1)};
  body(low.size(1) > 0 ? &addend : nullptr);
}

// out = left right + scaling low high; the rows of out may lie apart.
void multiply(const Tensor& left, const Tensor& right, const Tensor& low, const Tensor& high, double scaling,
              Tensor out) {
  if (!ours(left, low)) {
    at::mm_out(out, left, right);
    out.addmm_(low, high, 1, scaling);
    return;
  }
  with_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    with_update<T>(low, high, scaling, [&](const Addend<T>* update) {
      matrix_product<T, T>(matrix_of<T>(left), matrix_of<T>(right), left.size(0), right.size(1), left.size(1), nullptr,
                           false, out.mutable_data_ptr<T>(), out.stride(0), nullptr, update);
    });
  });
}

// The same of a weight in NF4, whose element (k, n) is k * row + n * column of the flattened one.
void multiply_nf4(const Tensor& left, const Nf4& right, int64_t row, int64_t column, const Tensor& low,
                  const Tensor& high, double scaling, Tensor out) {
  with_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    with_update<T>(low, high, scaling, [&](const Addend<T>* update) {
      nf4_product<T>(matrix_of<T>(left), right, row, column, left.size(0), out.size(1), left.size(1),
                     out.mutable_data_ptr<T>(), out.stride(0), update);
    });
  });
}

// The frozen weight (N, K), whole or part by part.
class Weight {
 public:
  Weight(const Tensor& weight, at::TensorList state, int64_t block_size, int64_t N, int64_t K, at::ScalarType dtype)
      : weight_(weight), N_(N), K_(K), dtype_(dtype), quantized_(weight.scalar_type() == at::kByte) {
    if (quantized_) {
      nf4_ = nf4_view(weight, state, block_size, N * K, "lora_linear");
      return;
    }
    TORCH_CHECK_TYPE(weight.scalar_type() == dtype, "lora_linear: weight is ", weight.scalar_type(), " but ", dtype,
                     " is needed");
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == N && weight.size(1) == K, "lora_linear: weight is ",
                      weight.sizes(), " but a and b need (", N, ", ", K, ")");
  }

  bool quantized() const { return quantized_; }
  Tensor dense() const { return weight_.contiguous(); }
  const Nf4& nf4() const { return nf4_; }

  // body(rows [begin, end), begin, end)
  template <typename Body>
  void for_rows(Body body) const {
    if (!quantized_) return body(weight_, int64_t{0}, N_);
    const int64_t step = std::max<int64_t>(64, kPart / K_);
    const Tensor space = empty({std::min(step, N_) * K_}, dtype_);
    for (int64_t begin = 0; begin < N_; begin += step) {
      const int64_t end = std::min(N_, begin + step), count = (end - begin) * K_;
      with_dtype(space, [&](auto zero) {
        using T = decltype(zero);
        at::parallel_for(0, chunk_count(count, kGrain), 1, [&](int64_t first, int64_t last) {
          const int64_t from = first * kGrain, to = std::min(count, last * kGrain);
          nf4_dequantize_range(nf4_, begin * K_ + from, to - from, space.mutable_data_ptr<T>() + from);
        });
      });
      body(space.narrow(0, 0, count).view({end - begin, K_}), begin, end);
    }
  }

  // body(columns [begin, end), begin, end)
  template <typename Body>
  void for_columns(Body body) const {
    if (!quantized_) return body(weight_, int64_t{0}, K_);
    const int64_t step = std::max<int64_t>(64, kPart / N_ / 64 * 64);
    const Tensor space = empty({N_ * std::min(step, K_)}, dtype_);
    for (int64_t begin = 0; begin < K_; begin += step) {
      const int64_t end = std::min(K_, begin + step), width = end - begin;
      with_dtype(space, [&](auto zero) {
        using T = decltype(zero);
        at::parallel_for(0, N_, chunk_count(kGrain, width), [&](int64_t first, int64_t last) {
          for (int64_t n = first; n < last; ++n)
            nf4_dequantize_range(nf4_, n * K_ + begin, width, space.mutable_data_ptr<T>() + n * width);
        });
      });
      body(space.narrow(0, 0, N_ * width).view({N_, width}), begin, end);
    }
  }

 private:
  const Tensor weight_;
  const int64_t N_, K_;
  const at::ScalarType dtype_;
  const bool quantized_;
  Nf4 nf4_;
};

void check(const Tensor& x, const Tensor& a, const Tensor& b) {
  check_dtype(x, "lora_linear", "x");
  check_same_dtype(a, x, "lora_linear", "a");
  check_same_dtype(b, x, "lora_linear", "b");
  TORCH_CHECK_VALUE(x.dim() >= 1 && a.dim() == 2 && b.dim() == 2 && a.size(1) == x.size(-1) && a.size(0) == b.size(1),
                    "lora_linear: a ", a.sizes(), " and b ", b.sizes(), " do not fit x ", x.sizes());
}

// Fills y with the result of up to kFewRows rows; returns u.
Tensor few_rows_forward(const Tensor& rows, const Weight& weight, const Tensor& a, const Tensor& b, double scaling,
                        Tensor y) {
  const int64_t M = rows.size(0), K = rows.size(1), N = b.size(0), R = b.size(1);
  Tensor u = empty({M, R}, rows.scalar_type());
  const Scratch space(M * K + M * TAPELM_DISPATCH(words_room(K)));
  float* const wide = space.get();
  float* const ordered = wide + M * K;
  with_dtype(rows, [&](auto zero) {
    using T = decltype(zero);
    const T* const from = rows.const_data_ptr<T>();
    for (int64_t i = 0; i < M * K; ++i) wide[i] = static_cast<float>(from[i]);
    if (weight.quantized() && TAPELM_DISPATCH(are_words(weight.nf4(), K)))
      TAPELM_DISPATCH(order_for_words(wide, M, K, ordered));
    T* const low = u.mutable_data_ptr<T>();
    TAPELM_DISPATCH(few_low_rows(wide, M, K, a.const_data_ptr<T>(), R, low));
    at::parallel_for(0, N, chunk_count(kFewGrain, K), [&](int64_t begin, int64_t end) {
      const T* const to_b = b.const_data_ptr<T>();
      T* const out = y.mutable_data_ptr<T>();
      const float factor = static_cast<float>(scaling);
      if (weight.quantized())
        TAPELM_DISPATCH(few_rows(weight.nf4(), wide, ordered, M, K, low, to_b, R, factor, begin, end, out, N));
      else
        TAPELM_DISPATCH(few_rows(weight.dense().template const_data_ptr<T>(), wide, M, K, low, to_b, R, factor, begin,
                                 end, out, N));
    });
  });
  return u;
}

std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x, const Tensor& weight_, at::TensorList state,
                                               int64_t block_size, const Tensor& a, const Tensor& b_, double scaling) {
  check(x, a, b_);
  const Tensor rows = as_rows(x).contiguous(), b = b_.contiguous();
  const int64_t M = rows.size(0), N = b.size(0), K = a.size(1);
  const Weight weight(weight_, state, block_size, N, K, x.scalar_type());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = N;
  Tensor y = empty(shape, x.scalar_type());
  const bool few = weight.quantized() ? M <= kFewRows : are_few_rows(M, K, x.scalar_type());
  if (few && y.numel() != 0 && K > 0) return {y, few_rows_forward(rows, weight, a.contiguous(), b, scaling, y)};
  const Tensor u = at::mm(rows, a.t());
  if (y.numel() == 0) return {y, u};
  const Tensor out = y.view({M, N});
  if (K == 0) {
    out.zero_();
    return {y, u};
  }
  if (weight.quantized() && ours(rows, u)) {
    multiply_nf4(rows, weight.nf4(), 1, K, u, b.t(), scaling, out);
    return {y, u};
  }
  weight.for_rows([&](const Tensor& part, int64_t begin, int64_t end) {
    Tensor to = out.narrow(1, begin, end - begin);
    multiply(rows, part.t(), u, b.narrow(0, begin, end - begin).t(), scaling, to);
  });
  return {y, u};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& u,
                                                        const Tensor& weight_, at::TensorList state,
                                                        int64_t block_size, const Tensor& a, const Tensor& b,
                                                        double scaling) {
  check(x, a, b);
  check_same_dtype(grad, x, "lora_linear", "grad");
  const Tensor g = as_rows(grad).contiguous(), rows = as_rows(x).contiguous();
  const int64_t N = b.size(0), K = a.size(1);
  TORCH_CHECK_VALUE(g.size(0) == rows.size(0) && g.size(1) == N && u.dim() == 2 && u.size(0) == rows.size(0) &&
                        u.size(1) == a.size(0),
                    "lora_linear: grad ", grad.sizes(), " does not fit x ", x.sizes(), " and b ", b.sizes());
  const Weight weight(weight_, state, block_size, N, K, x.scalar_type());
  const Tensor v = at::mm(g, b);
  Tensor dx = empty(x.sizes(), x.scalar_type());
  if (N == 0) dx.zero_();
  if (dx.numel() != 0 && N != 0) {
    const Tensor out = dx.view({rows.size(0), K});
    if (weight.quantized() && ours(g, v))
      multiply_nf4(g, weight.nf4(), K, 1, v, a, scaling, out);
    else
      weight.for_columns([&](const Tensor& part, int64_t begin, int64_t end) {
        Tensor to = out.narrow(1, begin, end - begin);
        multiply(g, part, v, a.narrow(1, begin, end - begin), scaling, to);
      });
  }
  return {dx, at::mm(v.t(), rows).mul_(scaling), at::mm(g.t(), u).mul_(scaling)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tapelm, m) {
  m.def(
      "lora_linear_forward(Tensor x, Tensor weight, Tensor[] state, int block_size, Tensor a, Tensor b, float scaling)"
      " -> (Tensor y, Tensor u)");
  m.def(
      "lora_linear_backward(Tensor grad, Tensor x, Tensor u, Tensor weight, Tensor[] state, int block_size, Tensor a,"
      " Tensor b, float scaling) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tapelm, CPU, m) {
  m.impl("lora_linear_forward", &lora_linear_forward);
  m.impl("lora_linear_backward", &lora_linear_backward);
}

TORCH_LIBRARY_IMPL(tapelm, Autograd, m) {
  m.impl("lora_linear_forward",
         derivative("lora_linear_backward(grad, x, u, weight, state, block_size, a, b, scaling) -> x, a, b"));
  m.impl("lora_linear_backward", no_derivative());
}

}  // namespace tapelm
