// out = left * right in float32, for the op files that need a matrix product.
#pragma once

#include <cstdint>

namespace tapelm {

// Element (i, j) is data[i * row + j * column]: a transpose is a swap of the strides.
struct Matrix {
  const float* data;
  int64_t row, column;
  Matrix transposed() const { return {data, column, row}; }
};

// out (M, N) row-major with leading dimension ld; out = left (M, K) * right (K, N) (+ bias (N) if not null), or
// out += left * right when `add`. Uses the threads of the caller's pool; bit-identical for every thread count.
void matrix_product(Matrix left, Matrix right, int64_t M, int64_t N, int64_t K, const float* bias, bool add, float* out,
                    int64_t ld);

// Whether matrix_product is the faster one on this CPU: MKL is tuned for AVX-512 (and not for AMD's AVX2).
bool prefer_matrix_product();

}  // namespace tapelm
