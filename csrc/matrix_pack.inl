// Packing of the operands of a matrix product for one instruction set. A packed operand is a run of panels, each
// [depth][MR] (left) or [depth][NR] (right), of units (see simd_units.inl). What is missing is zero.
#include "simd_units.inl"

template <typename T>
constexpr int64_t units(int64_t depth) { return (depth + PAIR<T> - 1) / PAIR<T>; }

typedef uint32_t u2 __attribute__((vector_size(8)));
typedef uint32_t u4 __attribute__((vector_size(16)));
typedef uint32_t u4_any __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint16_t h4_any __attribute__((vector_size(8), aligned(2), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(W * 4), aligned(4), may_alias));

// Four neighbouring bfloat16, each in the low half of a lane.
TAPELM_INLINE u4 load_halves(const c10::BFloat16* p) {
#if defined(TAPELM_AVX2) || defined(TAPELM_AVX512)
  return (u4)_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const h4_any*>(p), u4);
#endif
}

// The unit at depth index u of a line of `depth` elements, `step` apart.
template <typename T>
TAPELM_INLINE Unit<T> unit_at(const T* line, int64_t step, int64_t u, int64_t depth) {
  if constexpr (PAIR<T> == 1) {
    return static_cast<float>(line[u * step]);
  } else {
    const uint32_t low = line[2 * u * step].x, high = 2 * u + 1 < depth ? line[(2 * u + 1) * step].x : 0;
    return low | high << 16;
  }
}

// Words of 32 bits, one float or two bfloat16, of 4 (V = u4) or 2 (V = u2) rows at depth index `word`, to their place
// in out[u * ROWS + row]: as they are if they are units, else as two floats.
template <int ROWS, typename T, typename V>
TAPELM_INLINE void put_words(V words, int64_t word, Unit<T>* out) {
  const auto put = [&](int64_t u, V x) { std::memcpy(out + u * ROWS, &x, sizeof(V)); };
  if constexpr (PAIR<T> * sizeof(T) == 4) {
    put(word, words);
  } else {
    put(2 * word, words << 16);
    put(2 * word + 1, words & 0xffff0000u);
  }
}

// Four words from depth index `word` of four (with TWO of two) rows, `stride` elements apart, as columns.
template <int ROWS, bool TWO, typename T>
TAPELM_INLINE void transpose(const T* in, int64_t stride, int64_t word, Unit<T>* out) {
  const auto row = [&](int r) {
    return *reinterpret_cast<const u4_any*>(in + r * stride + word * static_cast<int64_t>(4 / sizeof(T)));
  };
  const u4 a = row(0), b = row(1);
  const u4 ab01 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab23 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  if constexpr (TWO) {
    put_words<ROWS, T>((u2)__builtin_shufflevector(ab01, ab01, 0, 1), word, out);
    put_words<ROWS, T>((u2)__builtin_shufflevector(ab01, ab01, 2, 3), word + 1, out);
    put_words<ROWS, T>((u2)__builtin_shufflevector(ab23, ab23, 0, 1), word + 2, out);
    put_words<ROWS, T>((u2)__builtin_shufflevector(ab23, ab23, 2, 3), word + 3, out);
  } else {
    const u4 c = row(2), d = row(3);
    const u4 cd01 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd23 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    put_words<ROWS, T>(__builtin_shufflevector(ab01, cd01, 0, 1, 4, 5), word, out);
    put_words<ROWS, T>(__builtin_shufflevector(ab01, cd01, 2, 3, 6, 7), word + 1, out);
    put_words<ROWS, T>(__builtin_shufflevector(ab23, cd23, 0, 1, 4, 5), word + 2, out);
    put_words<ROWS, T>(__builtin_shufflevector(ab23, cd23, 2, 3, 6, 7), word + 3, out);
  }
}

// Lines that run along the depth: ROWS of them, `stride` apart, to out[u * ROWS + r]. Sixteen words at a time, so that
// few cache lines are live at once: rows a power of two apart map to the same set and evict each other. Of so many rows
// the hardware prefetcher follows some; they are prefetched into L2, where they do not.
template <int ROWS, typename T>
void pack_along(const T* in, int64_t stride, int64_t depth, Unit<T>* out) {
  static_assert(ROWS % 2 == 0);
  constexpr int64_t WORD = 4 / sizeof(T), kAhead = 64;  // words
  const int64_t whole = depth / WORD / 16 * 16;
  for (int64_t k = 0; k < whole; k += 16) {
    for (int64_t r = 0; r < ROWS; ++r) __builtin_prefetch(in + r * stride + (k + kAhead) * WORD, 0, 2);
    for (int64_t r = 0; r < ROWS / 4 * 4; r += 4)
      for (int64_t q = k; q < k + 16; q += 4) transpose<ROWS, false>(in + r * stride, stride, q, out + r);
    if constexpr (ROWS % 4 != 0)
      for (int64_t q = k; q < k + 16; q += 4)
        transpose<ROWS, true>(in + (ROWS - 2) * stride, stride, q, out + ROWS - 2);
  }
  for (int64_t u = whole * WORD / PAIR<T>; u < units<T>(depth); ++u)
    for (int64_t r = 0; r < ROWS; ++r) out[u * ROWS + r] = unit_at(in + r * stride, 1, u, depth);
}

// N neighbouring lines that lie across the depth: out[0 .. N) of depth index u.
template <int N, typename T>
TAPELM_INLINE void pack_across(const T* in, int64_t step, int64_t u, int64_t depth, Unit<T>* out) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(out, in + u * step, N * sizeof(float));
  } else {
    const T* low = in + PAIR<T> * u * step;
    const T* high = PAIR<T> == 2 && 2 * u + 1 < depth ? low + step : nullptr;
    constexpr int shift = PAIR<T> == 2 ? 16 : 0;  // a bfloat16 is the upper half of its float, and the lower of a pair
    int i = 0;
    for (; i + W <= N; i += W)
      *reinterpret_cast<vu_any*>(out + i) = (vu)load(low + i) >> shift | (high ? (vu)load(high + i) : vu{});
    for (; i + 4 <= N; i += 4) {
      const u4 unit = load_halves(low + i) << (16 - shift) | (high ? load_halves(high + i) << 16 : u4{});
      std::memcpy(out + i, &unit, sizeof(unit));
    }
    for (; i < N; ++i) out[i] = unit_at(in + i, step, u, depth);
  }
}

// right(k, n) for k in [k0, k0 + depth), one panel of NR columns from n0, of which those before `columns` exist.
template <typename T>
void pack_right(Matrix<T> right, int64_t k0, int64_t depth, int64_t n0, int64_t columns, float* packed) {
  Unit<T>* out = reinterpret_cast<Unit<T>*>(packed);
  const int64_t n = std::min<int64_t>(NR, columns - n0);
  const T* in = right.data + k0 * right.row + n0 * right.column;
  if (right.column == 1 && n == NR) {
    constexpr int64_t kAhead = 16;
    for (int64_t u = 0; u < units<T>(depth); ++u) {
      for (int64_t k = PAIR<T> * u; k < PAIR<T> * (u + 1); ++k) __builtin_prefetch(in + (k + kAhead) * right.row, 0, 2);
      pack_across<NR>(in, right.row, u, depth, out + u * NR);
    }
  } else if (right.row == 1 && n == NR) {
    pack_along<NR>(in, right.column, depth, out);
  } else {
    for (int64_t u = 0; u < units<T>(depth); ++u)
      for (int64_t j = 0; j < NR; ++j)
        out[u * NR + j] = j < n ? unit_at(in + j * right.column, right.row, u, depth) : Unit<T>{};
  }
}

// left(m, k) for a block of rows: panels of MR rows, `units_apart`, each out[u][MR]. Loops follow memory: along
// k for a row-major operand, along the rows for a transposed one, whose next lines are prefetched in software because
// the hardware prefetcher does not follow strides of whole pages.
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
    constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T), kStep = PAIR<T>;
    for (int64_t u = 0; u < n; ++u) {
      for (int64_t k = kStep * u + kAhead; k < std::min(depth, kStep * (u + 1) + kAhead); ++k)
        for (int64_t i = 0; i < whole; i += kLine) __builtin_prefetch(in + k * left.column + i);
      for (int64_t i = 0; i < whole; i += MR)
        pack_across<MR>(in + i, left.column, u, depth, out + i * units_apart + u * MR);
    }
  } else if (left.column == 1) {
    for (int64_t i = 0; i < whole; i += MR) pack_along<MR>(in + i * left.row, left.row, depth, out + i * units_apart);
  } else {
    for (int64_t i = 0; i < whole; ++i)
      for (int64_t u = 0; u < n; ++u)
        out[i / MR * MR * units_apart + u * MR + i % MR] = unit_at(in + i * left.row, left.column, u, depth);
  }
}
