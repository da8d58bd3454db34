// Matrix product in float32 for one instruction set: the packed, blocked loops of Goto & van de Geijn (2008).
// A block of the right operand (KC x NC) is packed once and shared by the threads; each thread packs its own MC x KC
// block of the left operand and runs over both with register tiles.

constexpr int64_t KC = 512;   // depth: a right panel of KC x NR streams from L2, each float of it used MC times
constexpr int64_t MC = 72;    // rows: a left block of MC x KC stays in L2; a multiple of every MR
constexpr int64_t NC = 1024;  // columns: the right block of KC x NC stays in L3

int64_t linear_right_floats() { return KC * NC; }
int64_t linear_left_floats() { return KC * MC; }
int64_t linear_row_block() { return MC; }
int64_t linear_depth_block() { return KC; }
int64_t linear_column_block() { return NC; }
int64_t linear_panel() { return NR; }

// right(k, n) for k in [k0, k0 + depth), one panel of NR columns from n0: out[k][NR], columns beyond `columns` zero.
void pack_right(Matrix right, int64_t k0, int64_t depth, int64_t n0, int64_t columns, float* out) {
  const int64_t n = std::min<int64_t>(NR, columns - n0);
  const float* in = right.data + k0 * right.row + n0 * right.column;
  if (right.column == 1 && n == NR) {
    for (int64_t k = 0; k < depth; ++k, in += right.row, out += NR) {
      store(out, load(in));
      store(out + W, load(in + W));
    }
    return;
  }
  for (int64_t j = 0; j < NR; ++j)
    for (int64_t k = 0; k < depth; ++k) out[k * NR + j] = j < n ? in[k * right.row + j * right.column] : 0.0f;
}

// left(m, k) for a block of rows: panels of MR rows, each out[k][MR], rows beyond `rows` zero. The loop order follows
// memory: along k for a row-major operand, along the rows for a transposed one.
void pack_left(Matrix left, int64_t m0, int64_t rows, int64_t k0, int64_t depth, float* out) {
  const float* in = left.data + m0 * left.row + k0 * left.column;
  const int64_t whole = rows / MR * MR;
  if (whole < rows) std::fill(out + whole * depth, out + (whole + MR) * depth, 0.0f);
  if (left.row == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* from = in + k * left.column;
      for (int64_t i = 0; i < whole; i += MR)
        for (int64_t r = 0; r < MR; ++r) out[i * depth + k * MR + r] = from[i + r];
      for (int64_t i = whole; i < rows; ++i) out[whole * depth + k * MR + i - whole] = from[i];
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = in + i * left.row;
      float* to = out + i / MR * MR * depth + i % MR;
      for (int64_t k = 0; k < depth; ++k) to[k * MR] = from[k * left.column];
    }
  }
}

// out[rows][columns] of one left block against one packed right block. The first depth block writes (adding `bias`,
// which may be null), later ones add.
void multiply_block(Matrix left, int64_t m0, int64_t rows, int64_t k0, int64_t depth, const float* right,
                    int64_t columns, const float* bias, bool add, float* out, int64_t ld, float* space) {
  pack_left(left, m0, rows, k0, depth, space);
  for (int64_t j = 0; j < columns; j += NR) {
    const int64_t n = std::min<int64_t>(NR, columns - j);
    const float* panel = right + j * depth;
    for (int64_t i = 0; i < rows; i += MR) {
      const int64_t m = std::min<int64_t>(MR, rows - i);
      float* o = out + i * ld + j;
      for (int64_t r = 0; r < m; ++r) __builtin_prefetch(o + r * ld, 1);
      vf c[MR][2];
      tile<MR>(depth, space + i * depth, 1, MR, panel, c);
      if (m == MR && n == NR) {
        const vf b0 = bias ? load(bias + j) : vf{}, b1 = bias ? load(bias + j + W) : vf{};
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r, o += ld) {
          store(o, c[r][0] + (add ? load(o) : b0));
          store(o + W, c[r][1] + (add ? load(o + W) : b1));
        }
      } else {
        float edge[MR][NR];
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          store(edge[r], c[r][0]);
          store(edge[r] + W, c[r][1]);
        }
        for (int64_t r = 0; r < m; ++r)
          for (int64_t q = 0; q < n; ++q) o[r * ld + q] = edge[r][q] + (add ? o[r * ld + q] : bias ? bias[j + q] : 0.0f);
      }
    }
  }
}
