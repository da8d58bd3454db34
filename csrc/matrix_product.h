// out = left * right with float32 accumulation, for the op files that need a matrix product.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace tapelm {

struct Nf4;

// Element (i, j) is data[i * row + j * column]: a transpose is a swap of the strides.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row, column;
  Matrix transposed() const { return {data, column, row}; }
};

template <typename T>
Matrix<T> matrix_of(const at::Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
}

// (..., C) as (rows, C); explicit sizes, since reshape cannot infer one of a tensor without elements.
inline at::Tensor as_rows(const at::Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return t.reshape({rows, t.size(-1)});
}

// A product of small depth, at most kAddendDepth, that is added to another one while its sums are in registers.
template <typename T>
struct Addend {
  Matrix<T> left, right;
  int64_t depth;
};
constexpr int64_t kAddendDepth = 64;

// out (M, N) row-major with leading dimension ld; out = left (M, K) * right (K, N) (+ bias (N) if not null), or
// out += left * right when `add`; with the addend, if not null and K > 0. `row_sums` (M), if not null and without an
// addend, receives the sums of left's rows. Uses the threads of the caller's pool; the same bits for every number of
// them. T and Out are float or BFloat16.
template <typename T, typename Out>
void matrix_product(Matrix<T> left, Matrix<T> right, int64_t M, int64_t N, int64_t K, const T* bias, bool add, Out* out,
                    int64_t ld, float* row_sums = nullptr, const Addend<T>* addend = nullptr);

// out (M, N) = left (M, K) * right (K, N), with the addend, of a right operand in NF4 whose element (k, n) is element
// k * row + n * column of the flattened weight; one of the two is 1. Panels are unpacked where they are packed.
template <typename T>
void nf4_product(Matrix<T> left, const Nf4& right, int64_t row, int64_t column, int64_t M, int64_t N, int64_t K, T* out,
                 int64_t ld, const Addend<T>* addend);

// Whether matrix_product is the faster one on this CPU. Otherwise it is ATen's: MKL for float32 where it uses AVX-512,
// oneDNN for bfloat16 where it has AMX. A forced instruction set is there to be run: then it is ours.
bool prefer_matrix_product(at::ScalarType dtype);

constexpr int64_t kPackRows = 64;  // rows below which packing the operands costs more than the product
constexpr int64_t kFewRows = 4;
constexpr int64_t kFewGrain = 65536;  // elements of the weight per task

// Whether x (M, K) is better multiplied with a weight row by row of it, as the weight is read, than by ATen: up to
// kFewRows rows. In float32, of which ATen reads the weight for every row, not if they are short; in bfloat16 several
// must leave room in L1.
inline bool are_few_rows(int64_t M, int64_t K, at::ScalarType dtype) {
  return M <= kFewRows && (dtype == at::kFloat ? K >= 64 : M == 1 || M * K <= 6144);
}

}  // namespace tapelm
