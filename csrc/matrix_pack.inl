// Packing of the operands of a matrix product for one instruction set. A packed operand is a run of panels, each
// [depth][MR] (left) or [depth][NR] (right), of 4-byte units: floats, or with the bfloat16 dot product of avx512bf16
// pairs of bfloat16 that follow each other in depth, the first in the low half. What is missing is zero.

template <typename T>
struct Packed {
  using Unit = float;
  static constexpr int64_t kDepth = 1;  // elements of depth in a unit
};
#if defined(TAPELM_AVX512BF16)
template <>
struct Packed<c10::BFloat16> {
  using Unit = uint32_t;
  static constexpr int64_t kDepth = 2;
};
#endif
template <typename T>
using Unit = typename Packed<T>::Unit;

template <typename T>
constexpr int64_t units(int64_t depth) { return (depth + Packed<T>::kDepth - 1) / Packed<T>::kDepth; }

typedef float v4 __attribute__((vector_size(16)));
typedef float v2 __attribute__((vector_size(8)));
typedef float v4_any __attribute__((vector_size(16), aligned(4), may_alias));
typedef float v2_any __attribute__((vector_size(8), aligned(4), may_alias));
typedef uint16_t h4 __attribute__((vector_size(8)));
typedef uint16_t h4_any __attribute__((vector_size(8), aligned(2), may_alias));
typedef uint32_t u4 __attribute__((vector_size(16)));
typedef uint32_t u4_any __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(W * 4), aligned(4), may_alias));

TAPELM_INLINE v4 load4(const float* p) { return *reinterpret_cast<const v4_any*>(p); }
TAPELM_INLINE v4 load4(const c10::BFloat16* p) {
  const h4 bits = *reinterpret_cast<const h4_any*>(p);
  return (v4)(__builtin_convertvector(bits, u4) << 16);
}
TAPELM_INLINE void store4(float* p, v4 x) { *reinterpret_cast<v4_any*>(p) = x; }
TAPELM_INLINE void store2(float* p, v2 x) { *reinterpret_cast<v2_any*>(p) = x; }

// The unit at depth index u of a line of `depth` elements, `step` apart.
template <typename T>
TAPELM_INLINE Unit<T> unit_at(const T* line, int64_t step, int64_t u, int64_t depth) {
  if constexpr (Packed<T>::kDepth == 1) {
    return static_cast<float>(line[u * step]);
  } else {
    const uint32_t low = line[2 * u * step].x, high = 2 * u + 1 < depth ? line[(2 * u + 1) * step].x : 0;
    return low | high << 16;
  }
}

// Four (or with PAIR two) rows of `in`, four elements of each, as columns: out[k * ROWS + r].
template <int ROWS, bool PAIR, typename T>
TAPELM_INLINE void transpose(const T* in, int64_t stride, float* out) {
  const v4 a = load4(in), b = load4(in + stride);
  const v4 ab01 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab23 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  if constexpr (PAIR) {
    store2(out, __builtin_shufflevector(ab01, ab01, 0, 1));
    store2(out + ROWS, __builtin_shufflevector(ab01, ab01, 2, 3));
    store2(out + 2 * ROWS, __builtin_shufflevector(ab23, ab23, 0, 1));
    store2(out + 3 * ROWS, __builtin_shufflevector(ab23, ab23, 2, 3));
  } else {
    const v4 c = load4(in + 2 * stride), d = load4(in + 3 * stride);
    const v4 cd01 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd23 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store4(out, __builtin_shufflevector(ab01, cd01, 0, 1, 4, 5));
    store4(out + ROWS, __builtin_shufflevector(ab01, cd01, 2, 3, 6, 7));
    store4(out + 2 * ROWS, __builtin_shufflevector(ab23, cd23, 0, 1, 4, 5));
    store4(out + 3 * ROWS, __builtin_shufflevector(ab23, cd23, 2, 3, 6, 7));
  }
}

// ROWS rows of `in`, `depth` contiguous elements each, interleaved: out[k * ROWS + r]. Sixteen elements at a time, so
// that few lines are in use at once: rows a power of two apart fall into the same cache set.
template <int ROWS, typename T>
void interleave(const T* in, int64_t stride, int64_t depth, float* out) {
  static_assert(ROWS % 2 == 0);
  const int64_t whole = depth / 16 * 16;
  for (int64_t k = 0; k < whole; k += 16) {
    for (int64_t r = 0; r < ROWS / 4 * 4; r += 4)
      for (int64_t q = k; q < k + 16; q += 4) transpose<ROWS, false>(in + r * stride + q, stride, out + q * ROWS + r);
    if constexpr (ROWS % 4 != 0)
      for (int64_t q = k; q < k + 16; q += 4)
        transpose<ROWS, true>(in + (ROWS - 2) * stride + q, stride, out + q * ROWS + ROWS - 2);
  }
  for (int64_t k = whole; k < depth; ++k)
    for (int64_t r = 0; r < ROWS; ++r) out[k * ROWS + r] = static_cast<float>(in[r * stride + k]);
}

// Lines that run along the depth: ROWS of them, `stride` apart, to out[u * ROWS + r].
template <int ROWS, typename T>
void pack_along(const T* in, int64_t stride, int64_t depth, Unit<T>* out) {
  if constexpr (Packed<T>::kDepth == 1) {
    interleave<ROWS>(in, stride, depth, out);
  } else if (stride % 2 == 0 && reinterpret_cast<uintptr_t>(in) % 4 == 0) {
    // A pair is moved as if it were a float, by shuffles that do not look at it.
    interleave<ROWS>(reinterpret_cast<const float*>(in), stride / 2, depth / 2, reinterpret_cast<float*>(out));
    if (depth % 2)
      for (int64_t r = 0; r < ROWS; ++r) out[depth / 2 * ROWS + r] = unit_at(in + r * stride, 1, depth / 2, depth);
  } else {
    for (int64_t u = 0; u < units<T>(depth); ++u)
      for (int64_t r = 0; r < ROWS; ++r) out[u * ROWS + r] = unit_at(in + r * stride, 1, u, depth);
  }
}

// N neighbouring lines that lie across the depth: out[0 .. N) of depth index u; N is a multiple of 4.
template <int N, typename T>
TAPELM_INLINE void pack_across(const T* in, int64_t step, int64_t u, int64_t depth, Unit<T>* out) {
  if constexpr (Packed<T>::kDepth == 1) {
    const T* from = in + u * step;
    for (int i = 0; i < N; ++i) out[i] = static_cast<float>(from[i]);
  } else {
    const T* low = in + 2 * u * step;
    const T* high = 2 * u + 1 < depth ? low + step : nullptr;
    int i = 0;
    for (; i + W <= N; i += W) {
      const vu l = __builtin_convertvector(*reinterpret_cast<const vh_any*>(low + i), vu);
      const vu h = high ? __builtin_convertvector(*reinterpret_cast<const vh_any*>(high + i), vu) : vu{};
      *reinterpret_cast<vu_any*>(out + i) = l | h << 16;
    }
    for (; i < N; i += 4) {
      const u4 l = __builtin_convertvector(*reinterpret_cast<const h4_any*>(low + i), u4);
      const u4 h = high ? __builtin_convertvector(*reinterpret_cast<const h4_any*>(high + i), u4) : u4{};
      *reinterpret_cast<u4_any*>(out + i) = l | h << 16;
    }
  }
}

// right(k, n) for k in [k0, k0 + depth), one panel of NR columns from n0, of which those before `columns` exist.
template <typename T>
void pack_right(Matrix<T> right, int64_t k0, int64_t depth, int64_t n0, int64_t columns, float* packed) {
  Unit<T>* out = reinterpret_cast<Unit<T>*>(packed);
  const int64_t n = std::min<int64_t>(NR, columns - n0);
  const T* in = right.data + k0 * right.row + n0 * right.column;
  if (right.column == 1 && n == NR) {
    for (int64_t u = 0; u < units<T>(depth); ++u) pack_across<NR>(in, right.row, u, depth, out + u * NR);
  } else if (right.row == 1 && n == NR) {
    pack_along<NR>(in, right.column, depth, out);
  } else {
    for (int64_t u = 0; u < units<T>(depth); ++u)
      for (int64_t j = 0; j < NR; ++j)
        out[u * NR + j] = j < n ? unit_at(in + j * right.column, right.row, u, depth) : Unit<T>{};
  }
}

// left(m, k) for a block of rows: panels of MR rows, `units_apart`, each out[u][MR]. The loop order follows memory: along k for a
// row-major operand, along the rows for a transposed one, whose next lines are asked for early because a stride of
// whole pages is beyond the hardware's own prefetching.
template <typename T>
void pack_left(Matrix<T> left, int64_t m0, int64_t rows, int64_t k0, int64_t depth, int64_t units_apart,
               Unit<T>* out) {
  const T* in = left.data + m0 * left.row + k0 * left.column;
  const int64_t whole = rows / MR * MR, n = units<T>(depth);
  if (whole < rows) {
    Unit<T>* to = out + whole * units_apart;
    for (int64_t u = 0; u < n; ++u)
      for (int64_t r = 0; r < MR; ++r)
        to[u * MR + r] = whole + r < rows ? unit_at(in + (whole + r) * left.row, left.column, u, depth) : Unit<T>{};
  }
  if (left.row == 1) {
    constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T), kStep = Packed<T>::kDepth;
    for (int64_t u = 0; u < n; ++u) {
      for (int64_t k = kStep * u + kAhead; k < std::min(depth, kStep * (u + 1) + kAhead); ++k)
        for (int64_t i = 0; i < whole; i += kLine) __builtin_prefetch(in + k * left.column + i);
      for (int64_t i = 0; i < whole; i += MR) pack_across<MR>(in + i, left.column, u, depth, out + i * units_apart + u * MR);
    }
  } else if (left.column == 1) {
    for (int64_t i = 0; i < whole; i += MR) pack_along<MR>(in + i * left.row, left.row, depth, out + i * units_apart);
  } else {
    for (int64_t i = 0; i < whole; ++i)
      for (int64_t u = 0; u < n; ++u)
        out[i / MR * MR * units_apart + u * MR + i % MR] = unit_at(in + i * left.row, left.column, u, depth);
  }
}
