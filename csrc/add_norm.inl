#include "simd_norm.inl"

template <bool CENTRED, typename T>
void add_norm_rows(const NormForward<T>& a, int64_t begin, int64_t end) {
  norm_rows<CENTRED, true>(a, begin, end);
}

template <bool CENTRED, typename T>
void add_norm_backward_rows(const NormBackward<T>& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  norm_backward_rows<CENTRED, true>(a, begin, end, dweight, dbias);
}
