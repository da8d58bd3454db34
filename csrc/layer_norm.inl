#include "simd_norm.inl"

template <typename T>
void layer_norm_rows(const NormForward<T>& a, int64_t begin, int64_t end) {
  norm_rows<true, false>(a, begin, end);
}

template <typename T>
void layer_norm_backward_rows(const NormBackward<T>& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  norm_backward_rows<true, false>(a, begin, end, dweight, dbias);
}
