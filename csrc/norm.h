// What layer_norm, rms_norm and add_norm share: arguments of the kernels in simd_norm.inl, checks and the loops over
// tasks. Rows have C elements.
#pragma once

#include "common.h"

namespace tapelm {

// CENTRED (LayerNorm) has bias and mean; ADD has residual, r and dropout.
template <typename T>
struct NormForward {
  const T *x, *residual, *weight, *bias;
  T *y, *r;
  float *mean, *rstd;
  int64_t C;
  float eps;
  bool far;   // y: see is_far
  bool cold;  // x and residual: see are_cold
  Dropout dropout;
};

// x is what was normalised; grad_r may be null; dropped is null unless dropout is active.
template <typename T>
struct NormBackward {
  const T *grad, *grad_r, *x, *weight;
  const float *mean, *rstd;
  T *dx, *dropped;
  int64_t C;
  bool far;   // dx and dropped: see is_far
  bool cold;  // grad, x and grad_r: see are_cold
  Dropout dropout;
};

inline void check_features(const Tensor& x, const char* op) {
  check_dtype(x, op, "x");
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x needs at least one dimension");
}

inline void check_vector(const Tensor& vector, const Tensor& x, const char* op, const char* name) {
  check_same_dtype(vector, x, op, name);
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == x.size(-1), op, ": ", name, " must have shape (", x.size(-1),
                    "), not ", vector.sizes());
}

inline void check_like(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  check_same_dtype(t, x, op, name);
  TORCH_CHECK_VALUE(t.sizes() == x.sizes(), op, ": ", name, " must have shape ", x.sizes(), ", not ", t.sizes());
}

inline int64_t row_count(const Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

// One float32 for each row.
inline Tensor empty_statistic(const Tensor& x) { return empty(x.sizes().slice(0, x.dim() - 1), at::kFloat); }

// kernel(begin, end) over all rows.
template <typename Kernel>
void for_rows(const Tensor& x, const Kernel& kernel) {
  for_chunks(row_count(x), rows_per_task(x.size(-1)), kernel);
}

}  // namespace tapelm
