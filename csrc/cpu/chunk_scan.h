// The chunked engine of both recurrences, for one instruction set.
//
//   S_t = a_t S_{t-1} + k_t d_t^T,   o_t = S_t^T q_t            S [K, V]; a_t = e^{g_t} one number a head
//   SSD           k = B, q = C, g = dt A, d_t = dt_t x_t
//   gated delta   d_t = beta_t (v_t - (a_t S_{t-1})^T k_t)
//
// A chunk is up to kChunk = 64 tokens i of one sequence, with the state S before it and G_i = g_1 + … + g_i:
//
//   within-chunk matrix   M_ij = (q_i·k_j) e^{G_i - G_j}                              j <= i
//   delta's solve         (I + T) d = beta (v - e^G k S),  T_ij = beta_i (k_i·k_j) e^{G_i - G_j},  j < i
//   output                o = e^G (q S) + M d
//   next state            S <- e^{G_m} S + Σ_j k_j (e^{G_m - G_j} d_j)^T
//
// That is 4 K V operations a token and head for q S and the state, 2 K V more for delta's k S, kChunk V for M d (the
// triangle), kChunk V for the solve, and kChunk K for each of q·k and k·k, which all heads of a group share.
//
// A task is one sequence and a few heads of one group: the chunk's q, k and their products are made once for these
// heads, whose states stay in the thread's cache while it walks the chunks. Nothing grows with the length.
// A sequence's first chunk has no state before it: products with S are left out, and with them everything but
// the triangles for a short prompt; the state after the last chunk is formed only if somebody asked for it.
//
// G is summed in double and kept as two floats, high + low: a difference of two large sums of one float each would
// lose a small decay beside large ones (1e-6 beside 100). Masked entries are selected away, not multiplied by 0, and
// chunks end where sequences do, so a NaN stays in its sequence.
#pragma once
#include "chunk_layout.h"
#include "matmul.h"
#include "parallel_for.h"

namespace anima {

namespace ANIMA_ISA {
namespace {

// One chunk's log decays: sums G as two floats, and their differences.
struct Decay {
  float high[kChunk], low[kChunk];
  float grown[kChunk];      // e^{G_i}
  float remaining[kChunk];  // e^{G_m - G_i}

  // Also clears what lies beyond the last token, up to a whole vector.
  void finish(const double* sums, int64_t count) {
    for (int64_t i = 0; i < kChunk; ++i) {
      high[i] = i < count ? float(sums[i]) : 0.0f;
      low[i] = i < count ? float(sums[i] - double(high[i])) : 0.0f;
    }
    for (int64_t i = 0; i < count; i += kWidth) {
      store(grown + i, exponential(load(high + i) + load(low + i)));
      store(remaining + i, exponential(after(count - 1, i)));
    }
  }
  // G_i - G_j for a vector of j
  ANIMA_INLINE Vec after(int64_t i, int64_t j) const {
    return (set1(high[i]) - load(high + j)) + (set1(low[i]) - load(low + j));
  }
};

// rows [count, columns] -> to [columns, kChunk], rows beyond `count` as 0. Row lengths are multiples of kWidth.
static void transpose_chunk(const float* rows, int64_t stride, int64_t count, int64_t columns, float* to) {
  for (int64_t i = 0; i < kChunk; i += kWidth)
    for (int64_t j = 0; j < columns; j += kWidth) {
      Vec block[kWidth];
      for (int r = 0; r < kWidth; ++r) block[r] = i + r < count ? load(rows + (i + r) * stride + j) : set1(0.0f);
      transpose(block);
      for (int r = 0; r < kWidth; ++r) store(to + (j + r) * kChunk + i, block[r]);
    }
}

// One row of any type to fp32 times scale, padded with 0 to `stride` floats.
template <class Io>
static ANIMA_INLINE void pack_row(const typename Io::Type* from, int64_t columns, int64_t stride, Vec scale, float* to) {
  int64_t j = 0;
  for (; j + kWidth <= columns; j += kWidth) store(to + j, Io::load(from + j) * scale);
  if (j < columns) {
    store(to + j, load_part<Io>(from + j, int(columns - j)) * scale);
    j += kWidth;
  }
  for (; j < stride; j += kWidth) store(to + j, set1(0.0f));
}

// to[c, r] = from[r, c] for a [rows, columns] matrix; `to` has padded rows of `to_stride`, cleared past `rows` up to a
// whole vector if they are longer.
static void copy_transposed(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                            int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    const int height = rows - r < kWidth ? int(rows - r) : kWidth;
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int width = columns - c < kWidth ? int(columns - c) : kWidth;
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const float* row = from + (r + i) * from_stride + c;
        block[i] = i >= height ? set1(0.0f) : width == kWidth ? load(row) : load_part<Float>(row, width);
      }
      transpose(block);
      for (int i = 0; i < width; ++i) {
        float* row = to + (c + i) * to_stride + r;
        if (height == kWidth || r + kWidth <= to_stride) store(row, block[i]);
        else store_part<Float>(row, block[i], height);
      }
    }
  }
}

static ANIMA_INLINE float widen(const Tensor& x, int64_t offset) {
  if (x.dtype == DType::kFloat32) return static_cast<const float*>(x.data)[offset];
  const uint16_t half = static_cast<const uint16_t*>(x.data)[offset];
  return x.dtype == DType::kFloat16 ? float_from_f16(half) : float_from_bf16(half);
}

// Where rows of a contiguous result may be streamed: they are whole cache lines.
static ANIMA_INLINE bool whole_lines(const Tensor& x, int64_t columns, int64_t element) {
  return reinterpret_cast<uintptr_t>(x.data) % 64 == 0 && columns * element % 64 == 0;
}

template <class Io>
static ANIMA_INLINE void store_row(typename Io::Type* to, const float* from, int64_t columns, bool streams) {
  int64_t j = 0;
  for (; j + kWidth <= columns; j += kWidth)
    if (streams) Io::stream(to + j, load(from + j));
    else Io::store(to + j, load(from + j));
  if (j < columns) store_part<Io>(to + j, load(from + j), int(columns - j));
}

// A Scan is one recurrence's side of the engine (SsdScan, DeltaScan):
//   kDelta, key_dim, value_dim, sequences, groups, heads_per_group
//   Chunk                 t, count (0: past the end), starts (a new sequence begins: the state is 0), …
//   first_chunk(sequence), next_chunk(chunk), state_needed(chunk)
//   load_keys             q and k of a group, packed
//   load_values           d before the solve, log decays and, for delta, beta of a head
//   store_output          one head's y
//   load_states           false: they are 0;   after_chunk, store_states: states that the caller asked for
template <class Scan>
class ChunkEngine {
 public:
  ChunkEngine(const Scan& scan, const ChunkLayout& layout, float* base)
      : scan_(scan), layout_(layout), q_(base + layout.q), k_(base + layout.k), transposed_(base + layout.transposed),
        qk_(base + layout.qk), kk_(base + layout.kk), m_(base + layout.m), t_(base + layout.t), d_(base + layout.d),
        y_(base + layout.y), states_(base + layout.states) {}

  // Heads [first, first + count) of group `group`, all tokens of sequence `sequence`.
  void run(int64_t sequence, int64_t group, int64_t first, int64_t count) {
    const int64_t state_size = layout_.key_stride * layout_.value_stride;
    bool empty = !scan_.load_states(sequence, first, count, states_, state_size, layout_.value_stride);
    typename Scan::Chunk chunk = scan_.first_chunk(sequence);
    for (; chunk.count > 0; chunk = scan_.next_chunk(chunk)) {
      if (chunk.starts) empty = true;
      scan_.load_keys(chunk, group, q_, k_, layout_.key_stride);
      multiply_keys(chunk.count);
      const bool needed = scan_.state_needed(chunk);
      for (int64_t i = 0; i < count; ++i) head(chunk, first + i, states_ + i * state_size, empty, needed);
      empty = false;
      scan_.after_chunk(chunk, first, count, states_, state_size, layout_.value_stride);
    }
    scan_.store_states(sequence, first, count, empty ? nullptr : states_, state_size, layout_.value_stride);
  }

 private:
  // qk = q k^T and, for delta, kk = k k^T: lower triangles.
  void multiply_keys(int64_t count) {
    transpose_chunk(k_, layout_.key_stride, count, layout_.key_stride, transposed_);
    Product product{q_, layout_.key_stride, 1, transposed_, kChunk, qk_, kChunk, count,
                    (count + kWidth - 1) / kWidth, scan_.key_dim, nullptr, 0};
    multiply<Part::kLowerC>(product);
    if (!Scan::kDelta) return;
    product.a = k_;
    product.c = kk_;
    multiply<Part::kLowerC>(product);
  }

  void head(const typename Scan::Chunk& chunk, int64_t h, float* state, bool empty, bool needed) {
    const int64_t m = chunk.count, ld = layout_.value_stride, vectors = (scan_.value_dim + kWidth - 1) / kWidth;
    Decay decay;
    float beta[kChunk];
    scan_.load_values(chunk, h, d_, ld, decay, beta);
    form_matrices(decay, beta, m);
    if (Scan::kDelta) {
      if (!empty) subtract_state(decay, beta, m, state, vectors);
      solve_unit_lower(t_, kChunk, d_, ld, m, vectors);
    }
    if (!empty)
      multiply<Part::kAll>({q_, layout_.key_stride, 1, state, ld, y_, ld, m, vectors, scan_.key_dim, nullptr, 0});
    multiply<Part::kLowerA>({m_, kChunk, 1, d_, ld, y_, ld, m, vectors, m, empty ? nullptr : decay.grown, 1});
    scan_.store_output(chunk, h, y_, ld);
    if (!needed) return;
    for (int64_t i = 0; i < m; ++i) {
      const Vec factor = set1(decay.remaining[i]);
      for (int64_t j = 0; j < vectors; ++j) store(d_ + i * ld + j * kWidth, load(d_ + i * ld + j * kWidth) * factor);
    }
    multiply<Part::kAll>({k_, 1, layout_.key_stride, d_, ld, state, ld, scan_.key_dim, vectors, m,
                          empty ? nullptr : decay.grown + (m - 1), 0});
  }

  // d <- d - beta e^G (k S)
  void subtract_state(const Decay& decay, const float* beta, int64_t m, const float* state, int64_t vectors) {
    const int64_t ld = layout_.value_stride;
    multiply<Part::kAll>({k_, layout_.key_stride, 1, state, ld, y_, ld, m, vectors, scan_.key_dim, nullptr, 0});
    for (int64_t i = 0; i < m; ++i) {
      const Vec factor = set1(-beta[i] * decay.grown[i]);
      for (int64_t j = 0; j < vectors * kWidth; j += kWidth)
        store(d_ + i * ld + j, fma(factor, load(y_ + i * ld + j), load(d_ + i * ld + j)));
    }
  }

  // M and -T, with zeros as far beyond the diagonal as a register tile may read.
  void form_matrices(const Decay& decay, const float* beta, int64_t m) {
    const Vec lanes = lane_numbers(), zero = set1(0.0f);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < kChunk && j <= i + kTileRows - 1; j += kWidth) {
        const Vec factor = exponential(decay.after(i, j));
        const Vec distance = set1(float(i - j)) - lanes;
        store(m_ + i * kChunk + j, zero_below(factor * load(qk_ + i * kChunk + j), distance, zero));
        if (Scan::kDelta) store(t_ + i * kChunk + j, factor * load(kk_ + i * kChunk + j) * set1(-beta[i]));
      }
    }
  }

  const Scan& scan_;
  const ChunkLayout& layout_;
  float *const q_, *const k_, *const transposed_, *const qk_, *const kk_, *const m_, *const t_, *const d_, *const y_,
      *const states_;
};

template <class Scan>
static void run_chunks(const Scan& scan, const ChunkLayout& layout, float* workspace, int threads) {
  const int64_t groups = scan.groups, tasks = scan.sequences * groups * layout.blocks;
  const int64_t share = (tasks + threads - 1) / threads;
  parallel_for(share * threads, threads, [&](int64_t item, int thread) {
    // Neighbouring items lie far apart: heads of one token share pages, and threads that touch a fresh output's pages
    // first at the same time wait for each other.
    const int64_t task = item % threads * share + item / threads;
    if (task >= tasks) return;
    const int64_t block = task % layout.blocks, row = task / layout.blocks;
    const int64_t group = row % groups, begin = block * layout.block;
    const int64_t left = scan.heads_per_group - begin;
    ChunkEngine<Scan> engine(scan, layout, workspace + thread * layout.total);
    engine.run(row / groups, group, group * scan.heads_per_group + begin, left < layout.block ? left : layout.block);
    end_streams();
  });
}

}  // namespace
}  // namespace ANIMA_ISA
}  // namespace anima
