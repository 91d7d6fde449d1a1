// The one matrix product of the recurrent ops: fp32 rows times fp32 rows in cache, in register tiles.
//
//   c[r, :] = alpha[r] · c[r, :] + Σ_p a[r·row + p·step] · b[p, :]        r < rows, p < depth
//
// with `vectors` vectors a row; alpha null: c is overwritten. A is broadcast, so it may be read along either
// dimension; rows of b and c are loaded in vectors and lie ldb and ldc floats apart.
#pragma once
#include "simd.h"

namespace anima {
namespace ANIMA_ISA {
namespace {

struct Product {
  const float* a;
  int64_t row, step;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t rows, vectors, depth;
  const float* alpha;
  int64_t alpha_step;  // 0: one alpha for every row
};

// Which part of a triangular problem is needed. A lower triangle of A holds zeros for up to kTileRows - 1 columns
// beyond the diagonal; of C as many columns beyond it as fill a vector are computed.
enum class Part { kAll, kLowerA, kLowerC };

constexpr int kTileRows = 6;

template <int R, int C>
static ANIMA_INLINE void accumulate(Vec (&sum)[R][C], const float* a, int64_t row, int64_t step, const float* b,
                                    int64_t ldb, int64_t depth) {
  for (int64_t p = 0; p < depth; ++p) {
    Vec column[C];
    ANIMA_UNROLL
    for (int j = 0; j < C; ++j) column[j] = load(b + p * ldb + j * kWidth);
    ANIMA_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec value = set1(a[r * row + p * step]);
      ANIMA_UNROLL
      for (int j = 0; j < C; ++j) sum[r][j] = fma(value, column[j], sum[r][j]);
    }
  }
}

template <int R, int C>
static ANIMA_INLINE void load_tile(Vec (&sum)[R][C], const float* c, int64_t ldc) {
  ANIMA_UNROLL
  for (int r = 0; r < R; ++r)
    ANIMA_UNROLL
    for (int j = 0; j < C; ++j) sum[r][j] = load(c + r * ldc + j * kWidth);
}

template <int R, int C>
static ANIMA_INLINE void store_tile(const Vec (&sum)[R][C], float* c, int64_t ldc) {
  ANIMA_UNROLL
  for (int r = 0; r < R; ++r)
    ANIMA_UNROLL
    for (int j = 0; j < C; ++j) store(c + r * ldc + j * kWidth, sum[r][j]);
}

// Calls tile(rows, vectors, r, j) for tiles that cover rows x vectors, the number of each as an integral type, so that
// the tile's loops have constant bounds. Columns outermost: a panel of b stays in the first cache.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class C, class Tile>
static ANIMA_INLINE void for_rows(int64_t rows, int64_t j, const Tile& tile) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) tile(Count<kTileRows>(), C(), r, j);
  if (rows - r >= 4) tile(Count<4>(), C(), r, j), r += 4;
  if (rows - r >= 2) tile(Count<2>(), C(), r, j), r += 2;
  if (rows - r >= 1) tile(Count<1>(), C(), r, j);
}

template <int kMost = kColumns, class Tile>
static ANIMA_INLINE void for_tiles(int64_t rows, int64_t vectors, const Tile& tile) {
  int64_t j = 0;
  for (; j + kMost <= vectors; j += kMost) for_rows<Count<kMost>>(rows, j, tile);
  if (kMost > 2 && vectors - j >= 2) for_rows<Count<2>>(rows, j, tile), j += 2;
  if (vectors - j >= 1) for_rows<Count<1>>(rows, j, tile);
}

template <Part kPart>
static void multiply(const Product& x) {
  constexpr int kMost = kPart == Part::kLowerC ? 2 : kColumns;  // narrow tiles leave out more of what is not needed
  for_tiles<kMost>(x.rows, x.vectors, [&x](auto rows, auto columns, int64_t r, int64_t j) {
    constexpr int R = decltype(rows)::value, C = decltype(columns)::value;
    if (kPart == Part::kLowerC && j * kWidth >= r + R) return;
    const int64_t depth = kPart == Part::kLowerA && r + R < x.depth ? r + R : x.depth;
    float* const c = x.c + r * x.ldc + j * kWidth;
    Vec sum[R][C];
    if (x.alpha) {
      load_tile(sum, c, x.ldc);
      for (int i = 0; i < R; ++i) {
        const Vec alpha = set1(x.alpha[(r + i) * x.alpha_step]);
        for (int k = 0; k < C; ++k) sum[i][k] = sum[i][k] * alpha;
      }
    } else {
      for (int i = 0; i < R; ++i)
        for (int k = 0; k < C; ++k) sum[i][k] = set1(0.0f);
    }
    accumulate(sum, x.a + r * x.row, x.row, x.step, x.b + j * kWidth, x.ldb, depth);
    store_tile(sum, c, x.ldc);
  });
}

// Solves (I - t) d = c in place of c, for t [rows, rows] strictly lower triangular (entries on and above the diagonal
// are not read), by tiles of rows: a tile subtracts what the rows above contribute, then its own rows in registers.
static void solve_unit_lower(const float* t, int64_t ldt, float* c, int64_t ldc, int64_t rows, int64_t vectors) {
  for_tiles(rows, vectors, [=](auto tile_rows, auto columns, int64_t r, int64_t j) {
    constexpr int R = decltype(tile_rows)::value, C = decltype(columns)::value;
    float* const panel = c + j * kWidth;
    Vec sum[R][C];
    load_tile(sum, panel + r * ldc, ldc);
    accumulate(sum, t + r * ldt, ldt, 1, panel, ldc, r);
    ANIMA_UNROLL
    for (int i = 1; i < R; ++i)
      ANIMA_UNROLL
      for (int k = 0; k < i; ++k) {
        const Vec value = set1(t[(r + i) * ldt + r + k]);
        ANIMA_UNROLL
        for (int v = 0; v < C; ++v) sum[i][v] = fma(value, sum[k][v], sum[i][v]);
      }
    store_tile(sum, panel + r * ldc, ldc);
  });
}

}  // namespace
}  // namespace ANIMA_ISA
}  // namespace anima
