// Matrix products on packed operands. One operand is packed once, by all threads for all of them; each thread packs
// pieces of the other one as it needs them. What is shared is the smaller one: it is read again and again, from the L3
// cache, and the other one, a weight from memory as a rule, stays in the L2 cache of the thread that packs it.
#include "matrix_product.h"

#include "common.h"
#include "nf4.h"

namespace tapelm {

// The blocks of a matrix product on one instruction set.
struct ProductShape {
  int64_t tile_rows, rows;  // of a register tile, and of the largest left block
  int64_t panel, columns;   // of a right panel, and of a range of columns when the depth takes several blocks
  int64_t depth, unit;      // elements of depth in a block, and in a packed unit of four bytes
  int64_t units, lane;      // units in a block, the addend's too; floats from the end of a row of sums to the next
};

// What matrix_product is asked for.
template <typename T, typename Out>
struct Product {
  Matrix<T> left, right;
  int64_t M, N, K;
  const T* bias;
  bool add;
  Out* out;
  int64_t ld;
  float* row_sums;
  const Addend<T>* addend;
  const Nf4* nf4 = nullptr;  // of the right operand, which then has no data
};

}  // namespace tapelm

#define TAPELM_KERNELS "matrix_product.inl"
#include "simd_targets.h"

namespace tapelm {
namespace {

constexpr int64_t kSharedUnits = int64_t{1} << 22;  // packed at a time: half of an L3 cache, whatever the depth
constexpr int64_t kSharedRows = 1032;  // of a shared left operand at a time: their sums are in L2, too; whole tiles
constexpr int64_t kOwnPanels = 4;      // of a thread: a block of depth of them is in L2

// body(task, space of so many floats) for all tasks, scheduled as by for_chunks; each thread has one space for its own.
template <typename Body>
void for_tasks(int64_t tasks, int64_t floats, Body body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const Scratch space(floats);
    for (int64_t task = next++; task < tasks; task = next++) body(task, space.get());
  });
}

template <typename T, typename Out>
void share_right(const Product<T, Out>& p, const ProductShape& s, int64_t units) {
  const int64_t most = std::max(s.panel, kSharedUnits / units / s.panel * s.panel);
  const int64_t width = p.K <= s.depth ? most : std::min(most, s.columns);
  // Whole tiles, in as few left blocks as load the threads alike; those that have a tile more come first.
  const int64_t tiles = chunk_count(p.M, s.tile_rows), threads = at::get_num_threads();
  const int64_t blocks = std::min(tiles, chunk_count(tiles, s.rows / s.tile_rows * threads) * threads);
  const auto first_row = [&](int64_t block) {
    return std::min(p.M, (tiles / blocks * block + std::min(block, tiles % blocks)) * s.tile_rows);
  };
  const Scratch packed(units * chunk_count(std::min(p.N, width), s.panel) * s.panel);
  for (int64_t n0 = 0; n0 < p.N; n0 += width) {
    const int64_t columns = std::min(width, p.N - n0), panels = chunk_count(columns, s.panel);
    at::parallel_for(0, panels * chunk_count(p.K, s.depth), 4, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t k0 = task / panels * s.depth, j = task % panels * s.panel;
        TAPELM_DISPATCH_PRODUCT(pack_panel(p, k0, n0, j, panels * s.panel, packed.get()));
      }
    });
    for_tasks(blocks, s.units * s.rows + s.rows * (s.columns + s.lane), [&](int64_t block, float* space) {
      const int64_t m0 = first_row(block), rows = first_row(block + 1) - m0;
      TAPELM_DISPATCH_PRODUCT(multiply_rows(p, m0, rows, n0, columns, packed.get(), space));
    });
  }
}

template <typename T, typename Out>
void share_left(const Product<T, Out>& p, const ProductShape& s, int64_t units) {
  // Every range of rows packs all columns again: as few as can be, of the same size.
  const int64_t all = chunk_count(p.M, s.tile_rows);
  const int64_t most = std::clamp<int64_t>(std::min(kSharedUnits / units, kSharedRows) / s.tile_rows, 1, all);
  const int64_t step = chunk_count(all, chunk_count(all, most)) * s.tile_rows;
  const int64_t threads = at::get_num_threads(), panels = chunk_count(p.N, s.panel);
  const int64_t width = std::clamp<int64_t>(panels / (4 * threads), 1, kOwnPanels) * s.panel;
  const int64_t ranges = chunk_count(p.N, width);
  const int64_t sums = p.K <= s.depth ? 0 : step * (width + s.lane);
  const Scratch packed(units * step);
  for (int64_t first = 0; first < p.M; first += step) {
    const int64_t count = std::min(step, p.M - first), tiles = chunk_count(count, s.tile_rows);
    const auto row = [&](int64_t tile) { return std::min(count, tile * s.tile_rows); };
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      TAPELM_DISPATCH_PRODUCT(pack_rows(p, first, count, row(begin), row(end), packed.get()));
    });
    // Where columns are few for the threads, several pack the same ones, for a part of the rows each.
    const int64_t parts = std::min(tiles, chunk_count(2 * threads, ranges));
    for_tasks(ranges * parts, s.units * width + sums, [&](int64_t task, float* space) {
      const int64_t n0 = task / parts * width, columns = std::min(width, p.N - n0), part = task % parts;
      const int64_t begin = row(tiles * part / parts), end = row(tiles * (part + 1) / parts);
      TAPELM_DISPATCH_PRODUCT(multiply_columns(p, first, count, begin, end, n0, columns, packed.get(), space));
    });
  }
}

template <typename T, typename Out>
void multiply(const Product<T, Out>& p) {
  const ProductShape s = TAPELM_DISPATCH_PRODUCT(product_shape<T>());
  const int64_t units = chunk_count(p.K, s.unit) + (p.addend ? chunk_count(p.addend->depth, s.unit) : 0);
  if (p.M < p.N)
    share_left(p, s, units);
  else
    share_right(p, s, units);
}

// A very deep product is a sum of less deep ones, whose shared operands stay in the cache.
template <typename T, typename Out>
void sum_of_products(const Product<T, Out>& p, int64_t most) {
  const Scratch total(p.M * p.N);
  for (int64_t k = 0; k < p.K; k += most)
    matrix_product<T, float>({p.left.data + k * p.left.column, p.left.row, p.left.column},
                             {p.right.data + k * p.right.row, p.right.row, p.right.column}, p.M, p.N,
                             std::min(most, p.K - k), nullptr, k > 0, total.get(), p.N, nullptr,
                             k + most >= p.K ? p.addend : nullptr);
  at::parallel_for(0, p.M, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = 0; j < p.N; ++j) {
        Out& o = p.out[i * p.ld + j];
        const float sum = total.get()[i * p.N + j] + (p.bias ? static_cast<float>(p.bias[j]) : 0.0f);
        o = static_cast<Out>(p.add ? sum + static_cast<float>(o) : sum);
      }
  });
}

}  // namespace

bool prefer_matrix_product(at::ScalarType dtype) {
  if (isa_is_forced()) return true;
  return dtype == at::kBFloat16 ? !has_amx() : isa() < Isa::avx512 || !mkl_has_avx512();
}

template <typename T, typename Out>
void matrix_product(Matrix<T> left, Matrix<T> right, int64_t M, int64_t N, int64_t K, const T* bias, bool add, Out* out,
                    int64_t ld, float* row_sums, const Addend<T>* addend) {
  if (row_sums) std::fill(row_sums, row_sums + M, 0.0f);
  if (K == 0 || N == 0) {
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N && !add; ++n) out[m * ld + n] = bias ? static_cast<Out>(bias[n]) : Out(0.0f);
    return;
  }
  const Product<T, Out> p{left, right, M, N, K, bias, add, out, ld, row_sums, addend};
  const ProductShape s = TAPELM_DISPATCH_PRODUCT(product_shape<T>());
  const int64_t deepest = kSharedUnits / std::min({M, N, s.columns}) * s.unit;
  if (K > deepest && row_sums == nullptr)
    sum_of_products(p, deepest);
  else
    multiply(p);
}

template <typename T>
void nf4_product(Matrix<T> left, const Nf4& right, int64_t row, int64_t column, int64_t M, int64_t N, int64_t K, T* out,
                 int64_t ld, const Addend<T>* addend) {
  multiply(Product<T, T>{left, {nullptr, row, column}, M, N, K, nullptr, false, out, ld, nullptr, addend, &right});
}

template void nf4_product(Matrix<float>, const Nf4&, int64_t, int64_t, int64_t, int64_t, int64_t, float*, int64_t,
                          const Addend<float>*);
template void nf4_product(Matrix<bf16>, const Nf4&, int64_t, int64_t, int64_t, int64_t, int64_t, bf16*, int64_t,
                          const Addend<bf16>*);
template void matrix_product(Matrix<float>, Matrix<float>, int64_t, int64_t, int64_t, const float*, bool, float*,
                             int64_t, float*, const Addend<float>*);
template void matrix_product(Matrix<bf16>, Matrix<bf16>, int64_t, int64_t, int64_t, const bf16*, bool, bf16*, int64_t,
                             float*, const Addend<bf16>*);
template void matrix_product(Matrix<bf16>, Matrix<bf16>, int64_t, int64_t, int64_t, const bf16*, bool, float*, int64_t,
                             float*, const Addend<bf16>*);

}  // namespace tapelm
