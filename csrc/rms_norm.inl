#include "simd_norm.inl"

template <typename T>
void rms_norm_rows(const NormForward<T>& a, int64_t begin, int64_t end) {
  norm_rows<false, false>(a, begin, end);
}

template <typename T>
void rms_norm_backward_rows(const NormBackward<T>& a, int64_t begin, int64_t end, float* dweight) {
  norm_backward_rows<false, false>(a, begin, end, dweight, nullptr);
}
