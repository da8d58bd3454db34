// Loops over a row of any length on the vectors of simd_vector.inl; included by the .inl of row-wise ops.

// How many elements of a vector are meant: all W (a type, so that no test is left) or, at the end of a row, an int.
struct Whole {};

template <typename T>
TAPELM_INLINE vf get(const T* p, Whole, float = 0.0f) { return load(p); }
template <typename T>
TAPELM_INLINE vf get(const T* p, int n, float fill = 0.0f) { return load_part(p, n, fill); }
template <typename T>
TAPELM_INLINE void put(T* p, vf x, Whole) { store(p, x); }
template <typename T>
TAPELM_INLINE void put(T* p, vf x, int n) { store_part(p, x, n); }

// Past the caches, where the CPU can: p is a multiple of the bytes of the vector.
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

// A result, which is_far or not; its loops end with finish_far_results. `far` may be a type, where a test would be felt.
template <typename T>
TAPELM_INLINE void put(T* p, vf x, Whole, bool far) {
  if (far)
    stream(p, x);
  else
    store(p, x);
}
template <typename T>
TAPELM_INLINE void put(T* p, vf x, int n, bool) { store_part(p, x, n); }

// Four vectors that are worked on in turns: the chain of operations of one alone fills the CPU's queue with what waits.
struct Pack { vf v[4]; };

template <typename F, typename... More>
TAPELM_INLINE Pack each(F f, const Pack& first, const More&... more) {
  return {{f(first.v[0], more.v[0]...), f(first.v[1], more.v[1]...), f(first.v[2], more.v[2]...),
           f(first.v[3], more.v[3]...)}};
}

TAPELM_INLINE Pack operator+(const Pack& a, const Pack& b) { return each([](vf x, vf y) { return x + y; }, a, b); }
TAPELM_INLINE Pack operator-(const Pack& a, const Pack& b) { return each([](vf x, vf y) { return x - y; }, a, b); }
TAPELM_INLINE Pack operator*(const Pack& a, const Pack& b) { return each([](vf x, vf y) { return x * y; }, a, b); }
TAPELM_INLINE Pack operator+(const Pack& a, float b) { return each([=](vf x) { return x + b; }, a); }
TAPELM_INLINE Pack operator*(const Pack& a, float b) { return each([=](vf x) { return x * b; }, a); }

#if defined(TAPELM_AVX512)
TAPELM_INLINE Pack remainder(const Pack& x) { return each([](vf v) { return remainder(v); }, x); }
TAPELM_INLINE Pack times_power(const Pack& x, const Pack& k) { return each([](vf v, vf n) { return times_power(v, n); }, x, k); }
TAPELM_INLINE Pack reciprocal(const Pack& x) { return each([](vf v) { return reciprocal(v); }, x); }
#endif

template <typename T>
TAPELM_INLINE Pack sigmoid(const Pack& x) {
#if defined(TAPELM_AVX512)
  if constexpr (std::is_same_v<T, c10::BFloat16>) return quick_sigmoid(x);
#endif
  return each([](vf v) { return sigmoid<T>(v); }, x);
}

template <typename T>
TAPELM_INLINE Pack get_pack(const T* p) {
  return {{load(p), load(p + W), load(p + 2 * W), load(p + 3 * W)}};
}
template <typename T>
TAPELM_INLINE void put_pack(T* p, const Pack& x, bool far) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) put(p + i * W, x.v[i], Whole{}, far);
}

// Independent sums, which hide the latency of addition.
constexpr int kSums = 4;
TAPELM_INLINE float sum(const vf (&partial)[kSums]) { return sum((partial[0] + partial[1]) + (partial[2] + partial[3])); }

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

// body(i, n, s, random) for the vectors of a row whose element i has index first + i in the random stream; s as in
// for_vectors.
template <typename Body>
TAPELM_INLINE void for_random_vectors(int64_t C, uint64_t seed, int64_t first, Body body) {
  vu random[2];
  int64_t i = 0;
  if (const int lane = static_cast<int>(first & 3); lane != 0 && C > 0) {
    // The row begins inside the four words of a counter: up to three elements before the next counter.
    philox(seed, static_cast<uint64_t>(first) / 4, random);
    vu shifted = {};
    for (int j = lane; j < 4; ++j) shifted[j - lane] = random[0][j];
    i = std::min<int64_t>(C, 4 - lane);
    body(int64_t{0}, static_cast<int>(i), 0, shifted);
  }
  for (; i + kSums * W <= C; i += kSums * W) {
    vu next[2];
    philox(seed, static_cast<uint64_t>(first + i) / 4, random);
    philox(seed, static_cast<uint64_t>(first + i + 2 * W) / 4, next);
    body(i, Whole{}, 0, random[0]);
    body(i + W, Whole{}, 1, random[1]);
    body(i + 2 * W, Whole{}, 2, next[0]);
    body(i + 3 * W, Whole{}, 3, next[1]);
  }
  for (; i + 2 * W <= C; i += 2 * W) {
    philox(seed, static_cast<uint64_t>(first + i) / 4, random);
    body(i, Whole{}, 0, random[0]);
    body(i + W, Whole{}, 0, random[1]);
  }
  if (i < C) {
    philox(seed, static_cast<uint64_t>(first + i) / 4, random);
    body(i, static_cast<int>(std::min<int64_t>(W, C - i)), 0, random[0]);
    if (i + W < C) body(i + W, static_cast<int>(C - i - W), 0, random[1]);
  }
}

// A choice, not a product with 0: a dropped inf or NaN is 0.
TAPELM_INLINE vf dropped(vf x, vu random, uint32_t threshold, float scale) {
  return random >= broadcast(threshold) ? x * scale : vf{};
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
