// Loops over a row of any length on the vectors of simd_vector.inl; included by the .inl of row-wise ops.

// How many elements of a vector are valid: all W (a type, so that no branch is left) or, at the end of a row, an int.
struct Whole {};

template <typename T>
TAPELM_INLINE vf get(const T* p, Whole, float = 0.0f) { return load(p); }
template <typename T>
TAPELM_INLINE vf get(const T* p, int n, float fill = 0.0f) { return load_part(p, n, fill); }
template <typename T>
TAPELM_INLINE void put(T* p, vf x, Whole) { store(p, x); }
template <typename T>
TAPELM_INLINE void put(T* p, vf x, int n) { store_part(p, x, n); }

// A streaming (non-temporal) store where the CPU has one; p must be aligned to the size of the vector.
TAPELM_INLINE void stream(float* p, vf x) {
#if defined(TAPELM_AVX512)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(TAPELM_AVX2)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}
TAPELM_INLINE void stream(c10::BFloat16* p, vf x) {
#if defined(TAPELM_AVX512)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(x));
#elif defined(TAPELM_AVX2)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(x));
#else
  store(p, x);
#endif
}

// A streaming store if `far` (see is_far), which needs finish_far_results at the end; a type as `far` costs no branch.
template <typename T>
TAPELM_INLINE void put(T* p, vf x, Whole, bool far) {
  if (far)
    stream(p, x);
  else
    store(p, x);
}
template <typename T>
TAPELM_INLINE void put(T* p, vf x, int n, bool) { store_part(p, x, n); }

// N vectors, interleaved: one dependency chain at a time would fill the out-of-order window with waiting instructions.
template <int N>
struct Pack { vf v[N]; };

// How many vectors for data of type T: 8 only with the 32 registers of AVX-512 (tiles of 12 rows) and for bfloat16, as
// float32 loops are bound by memory, and fewer concurrent cache lines are faster there.
template <typename T>
constexpr int kPack = MR == 12 && sizeof(T) == 2 ? 8 : 4;

template <int N, typename F, typename... More>
TAPELM_INLINE Pack<N> each(F f, const Pack<N>& first, const More&... more) {
  Pack<N> result;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) result.v[i] = f(first.v[i], more.v[i]...);
  return result;
}

template <int N>
TAPELM_INLINE Pack<N> operator+(const Pack<N>& a, const Pack<N>& b) {
  return each([](vf x, vf y) { return x + y; }, a, b);
}
template <int N>
TAPELM_INLINE Pack<N> operator-(const Pack<N>& a, const Pack<N>& b) {
  return each([](vf x, vf y) { return x - y; }, a, b);
}
template <int N>
TAPELM_INLINE Pack<N> operator*(const Pack<N>& a, const Pack<N>& b) {
  return each([](vf x, vf y) { return x * y; }, a, b);
}
template <int N>
TAPELM_INLINE Pack<N> operator+(const Pack<N>& a, float b) { return each([=](vf x) { return x + b; }, a); }
template <int N>
TAPELM_INLINE Pack<N> operator*(const Pack<N>& a, float b) { return each([=](vf x) { return x * b; }, a); }

#if defined(TAPELM_AVX512)
template <int N>
TAPELM_INLINE Pack<N> fraction(const Pack<N>& x) { return each([](vf v) { return fraction(v); }, x); }
template <int N>
TAPELM_INLINE Pack<N> times_power(const Pack<N>& x, const Pack<N>& n) {
  return each([](vf v, vf k) { return times_power(v, k); }, x, n);
}
template <int N>
TAPELM_INLINE Pack<N> reciprocal(const Pack<N>& x) { return each([](vf v) { return reciprocal(v); }, x); }
template <int N>
TAPELM_INLINE Pack<N> reciprocal(const Pack<N>& d, const Pack<N>& t) {
  return each([](vf v, vf u) { return reciprocal(v, u); }, d, t);
}
#else
template <typename T, int N>
TAPELM_INLINE Pack<N> logistic(const Pack<N>& t) { return each([](vf v) { return logistic<T>(v); }, t); }
#endif

// As Whole: all of the N vectors.
template <int N>
struct WholePack {};

template <typename T, int N>
TAPELM_INLINE Pack<N> get(const T* p, WholePack<N>) {
  Pack<N> result;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) result.v[i] = load(p + i * W);
  return result;
}

// Two consecutive vectors: with AVX512-BF16 one instruction rounds both to bfloat16, and one store fills a cache line.
struct Two { vf first, second; };

#if defined(TAPELM_AVX512BF16)
TAPELM_INLINE __m512i narrow(const Two& x) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)x.second, (__m512)x.first); }
#endif

template <typename T>
TAPELM_INLINE void put(T* p, const Two& x, Whole, bool far) {
#if defined(TAPELM_AVX512BF16)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (far)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow(x));
    else
      _mm512_storeu_si512(p, narrow(x));
    return;
  }
#endif
  put(p, x.first, Whole{}, far);
  put(p + W, x.second, Whole{}, far);
}

template <typename T>
TAPELM_INLINE Two rounded(const Two& x) {
#if defined(TAPELM_AVX512BF16)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __m512i both = narrow(x);
    return {widen((vh)_mm512_castsi512_si256(both)), widen((vh)_mm512_extracti64x4_epi64(both, 1))};
  }
#endif
  return {rounded<T>(x.first), rounded<T>(x.second)};
}

template <typename T, int N>
TAPELM_INLINE void put(T* p, const Pack<N>& x, WholePack<N>, bool far = false) {
#pragma GCC unroll 4
  for (int i = 0; i < N; i += 2) put(p + i * W, Two{x.v[i], x.v[i + 1]}, Whole{}, far);
}

// Independent sums, which hide the latency of addition.
constexpr int kSums = 4;
TAPELM_INLINE float sum(const vf (&partial)[kSums]) {
  return sum((partial[0] + partial[1]) + (partial[2] + partial[3]));
}

// body(i, n, s) for the vectors at i of a row of C elements; s < UNROLL says which sum is to take it.
template <int UNROLL = kSums, typename Body>
TAPELM_INLINE void for_vectors(int64_t C, Body body) {
  int64_t i = 0;
  for (; i + UNROLL * W <= C; i += UNROLL * W) {
#pragma GCC unroll 4
    for (int s = 0; s < UNROLL; ++s) body(i + s * W, Whole{}, s);
  }
  for (; i + W <= C; i += W) body(i, Whole{}, 0);
  if (i < C) body(i, static_cast<int>(C - i), 0);
}

// body(i, n) for all of a row of C elements of type T: packs, then vectors.
template <typename T, typename Body>
TAPELM_INLINE void for_packs(int64_t C, Body body) {
  constexpr int N = kPack<T>;
  int64_t first = 0;
  for (; first + N * W <= C; first += N * W) body(first, WholePack<N>{});
  for_vectors<2>(C - first, [&](int64_t i, auto n, int) __attribute__((always_inline)) { body(first + i, n); });
}

// take(i, n, v, s) for v = value(i, n, s), the vectors at i of a row of C elements; where there are two they are taken
// as a Two, of s and s + 1.
template <typename Value, typename Take>
TAPELM_INLINE void for_twos(int64_t C, Value value, Take take) {
  const auto two = [&](int64_t i, int s) __attribute__((always_inline)) {
    take(i, Whole{}, Two{value(i, Whole{}, s), value(i + W, Whole{}, s + 1)}, s);
  };
  int64_t i = 0;
  for (; i + kSums * W <= C; i += kSums * W) {
    two(i, 0);
    two(i + 2 * W, 2);
  }
  if (i + 2 * W <= C) {
    two(i, 0);
    i += 2 * W;
  }
  for_vectors<1>(C - i, [&](int64_t at, auto n, int) __attribute__((always_inline)) {
    take(i + at, n, value(i + at, n, 0), 0);
  });
}

// The vectors value(i, n, s) of a row of C results.
template <typename T, typename Value>
TAPELM_INLINE void put_row(T* to, int64_t C, bool far, Value value) {
  for_twos(C, value, [&](int64_t i, auto n, const auto& v, int) __attribute__((always_inline)) {
    put(to + i, v, n, far);
  });
}

// Prefetch distance of loops over long inputs, in elements: one page, because the hardware prefetcher stops at a page's
// end. A prefetch past the end of the tensor is harmless.
template <typename T>
constexpr int64_t kPage = 4096 / sizeof(T);

// Prefetches the cache line of p for a later iteration; s is as in for_vectors, and one prefetch per line is issued.
template <typename T>
TAPELM_INLINE void ask_for(const T* p, int s) {
  constexpr int in_line = std::max<int>(1, 64 / (W * sizeof(T)));
  if (s % in_line == 0) __builtin_prefetch(p);
}

// Prefetches all lines of a later pack.
template <typename T, int N>
TAPELM_INLINE void ask_for_pack(const T* p, WholePack<N>) {
#pragma GCC unroll 8
  for (int i = 0; i < N * W; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}
template <typename T, typename Part>
TAPELM_INLINE void ask_for_pack(const T*, Part) {}

// take(i, n, v, s, kept) as in for_twos, of a row whose element i has index first + i in the random stream of a
// dropout; kept[0] and, of a Two, kept[1] are what it keeps of the vectors, and each is the last argument of its value.
// Eight elements share a counter of Philox.
template <typename Value, typename Take>
TAPELM_INLINE void for_kept_twos(int64_t C, uint64_t seed, uint32_t threshold, int64_t first, Value value, Take take) {
  const auto draw = [&](int64_t i, Kept kept[4]) __attribute__((always_inline)) {
    vu words[2];
    philox(seed, static_cast<uint64_t>(first + i) / 8, words);
    kept_lanes(words[0], threshold, kept);
    kept_lanes(words[1], threshold, kept + 2);
  };
  const auto one = [&](int64_t i, auto n, Kept kept) __attribute__((always_inline)) {
    take(i, n, value(i, n, 0, kept), 0, &kept);
  };
  Kept kept[4];
  int64_t i = 0;
  if (const int before = static_cast<int>(first & 7); before != 0 && C > 0) {
    // The row begins among the eight elements of a counter: those up to the next one.
    draw(0, kept);
    int lane = before;
    do {
      const int n = static_cast<int>(std::min<int64_t>(C - i, std::min(8, W) - lane % W));
      one(i, n, shifted(kept[lane / W], lane % W));
      i += n;
      lane += n;
    } while (W < 8 && lane < 8 && i < C);
  }
  for (; i + kSums * W <= C; i += kSums * W) {
    draw(i, kept);
#pragma GCC unroll 2
    for (int s = 0; s < kSums; s += 2) {
      const Two v{value(i + s * W, Whole{}, s, kept[s]), value(i + (s + 1) * W, Whole{}, s + 1, kept[s + 1])};
      take(i + s * W, Whole{}, v, s, kept + s);
    }
  }
  if (i == C) return;
  draw(i, kept);
  for (int s = 0; s < kSums && i < C; ++s, i += W) {
    if (i + W <= C)
      one(i, Whole{}, kept[s]);
    else
      one(i, static_cast<int>(C - i), kept[s]);
  }
}

// `out` = the sum of `count` rows of partial sums, each C of every `width` floats.
template <typename T>
void sum_partial(const float* partial, int64_t count, int64_t width, int64_t C, T* out) {
  for_vectors<1>(C, [&](int64_t i, auto n, int) __attribute__((always_inline)) {
    vf total = {};
    for (int64_t row = 0; row < count; ++row) total += get(partial + row * width + i, n);
    put(out + i, total, n);
  });
}
