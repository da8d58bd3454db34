// Linear layer y = x weight^T + bias and its gradients, on our own matrix product, row by row of the weight for a few
// rows x or, for some more and where prefer_matrix_product says so, on ATen's (MKL for float32, oneDNN for bfloat16).
#include "autograd.h"
#include "common.h"
#include "matrix_product.h"

#include <atomic>

namespace tapelm {

// The blocks of a matrix product on one instruction set.
struct ProductShape {
  int64_t tile_rows, rows;        // of a register tile, and of the largest left block
  int64_t panel, columns;         // of a right panel, and of a range of columns when the depth takes several blocks
  int64_t depth, unit;            // elements of depth in a block, and in a packed unit of four bytes
  int64_t space;                  // floats of scratch space for each thread
};

}  // namespace tapelm

#define TAPELM_KERNELS "linear.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

constexpr int64_t kRightUnits = int64_t{1} << 22;  // packed at a time: half of an L3 cache, whatever the depth

// The number of left blocks that M rows are cut into, whole tiles each: as few as load the threads alike.
int64_t block_count(int64_t M, const ProductShape& s) {
  const int64_t tiles = chunk_count(M, s.tile_rows), threads = at::get_num_threads();
  return std::min(tiles, chunk_count(tiles, s.rows / s.tile_rows * threads) * threads);
}

}  // namespace

bool prefer_matrix_product(at::ScalarType dtype) {
  if (isa_is_forced()) return true;
  return dtype == at::kBFloat16 ? !has_amx() : isa() < Isa::avx512 || !mkl_has_avx512();
}

template <typename T, typename Out>
void matrix_product(Matrix<T> left, Matrix<T> right, int64_t M, int64_t N, int64_t K, const T* bias, bool add, Out* out,
                    int64_t ld, float* row_sums, const Addend<T>* addend) {
  if (K == 0 || N == 0) {
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N && !add; ++n) out[m * ld + n] = bias ? static_cast<Out>(bias[n]) : Out(0.0f);
    if (row_sums) std::fill(row_sums, row_sums + M, 0.0f);
    return;
  }
  const ProductShape s = TAPELM_DISPATCH_PRODUCT(product_shape<T>());
  const int64_t more = addend ? chunk_count(addend->depth, s.unit) : 0;
  const int64_t units = chunk_count(K, s.unit) + more, panel = s.panel;
  if (const int64_t most = kRightUnits / std::min(N, s.columns) * s.unit; K > most && row_sums == nullptr) {
    // A very deep product is a sum of less deep ones, whose right operands stay in the cache.
    const Scratch total(M * N);
    for (int64_t k = 0; k < K; k += most)
      matrix_product<T, float>({left.data + k * left.column, left.row, left.column},
                               {right.data + k * right.row, right.row, right.column}, M, N, std::min(most, K - k),
                               nullptr, k > 0, total.get(), N, nullptr, k + most >= K ? addend : nullptr);
    at::parallel_for(0, M, 64, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < N; ++j) {
          Out& o = out[i * ld + j];
          const float sum = total.get()[i * N + j] + (bias ? static_cast<float>(bias[j]) : 0.0f);
          o = static_cast<Out>(add ? sum + static_cast<float>(o) : sum);
        }
    });
    return;
  }
  const int64_t most = std::max(panel, kRightUnits / units / panel * panel);
  const int64_t width = K <= s.depth ? most : std::min(most, s.columns);
  const int64_t tiles = chunk_count(M, s.tile_rows), blocks = block_count(M, s);
  // The blocks that have a tile more come first, so that the threads end together.
  const auto first_row = [&](int64_t block) {
    return std::min(M, (tiles / blocks * block + std::min(block, tiles % blocks)) * s.tile_rows);
  };
  const Scratch packed(units * chunk_count(std::min(N, width), panel) * panel);
  for (int64_t n0 = 0; n0 < N; n0 += width) {
    const int64_t columns = std::min(width, N - n0), panels = chunk_count(columns, panel);
    at::parallel_for(0, panels * chunk_count(K, s.depth), 4, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t k0 = task / panels * s.depth, depth = std::min(s.depth, K - k0), p = task % panels;
        const int64_t own = chunk_count(depth, s.unit), all = own + (k0 + depth == K ? more : 0);
        float* const to = packed.get() + (k0 / s.unit * panels + p * all) * panel;
        TAPELM_DISPATCH_PRODUCT(pack_right(right, k0, depth, n0 + p * panel, N, to));
        if (all > own)
          TAPELM_DISPATCH_PRODUCT(pack_right(addend->right, 0, addend->depth, n0 + p * panel, N, to + own * panel));
      }
    });
    // Blocks are scheduled dynamically: on a shared machine one thread is often slower than the other.
    std::atomic<int64_t> next{0};
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      const Scratch space(s.space);
      for (int64_t block = next++; block < blocks; block = next++) {
        const int64_t m0 = first_row(block), rows = first_row(block + 1) - m0;
        TAPELM_DISPATCH_PRODUCT(multiply_rows(left, m0, rows, K, packed.get(), columns, bias ? bias + n0 : nullptr, add,
                                              out + m0 * ld + n0, ld, row_sums && n0 == 0 ? row_sums + m0 : nullptr,
                                              addend, space.get()));
      }
    });
  }
}

template void matrix_product(Matrix<float>, Matrix<float>, int64_t, int64_t, int64_t, const float*, bool, float*,
                             int64_t, float*, const Addend<float>*);
template void matrix_product(Matrix<bf16>, Matrix<bf16>, int64_t, int64_t, int64_t, const bf16*, bool, bf16*, int64_t,
                             float*, const Addend<bf16>*);
template void matrix_product(Matrix<bf16>, Matrix<bf16>, int64_t, int64_t, int64_t, const bf16*, bool, float*, int64_t,
                             float*, const Addend<bf16>*);

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
