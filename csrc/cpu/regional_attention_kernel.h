// Regional attention for one instruction set: flash-style, one pass over the keys, queries in the lanes.
//
//   logit   out_i = Σ_s Σ_j e^(q_i·k_j + b_s(i) - m_i) v_j / l_i,   l_i = Σ_s [Σ_j e^(…) + pads_s e^(b_s(i) - m_i)]
//   blend   out_i = Σ_s w_s(i) · (the same for segment s alone, b = 0)
//
// A tile is kQueries = 64 queries of one head, taken in the plan's order, so that a tile holds queries that may
// attend to the same segments and the other segments are skipped whole. The tile is transposed: lanes are
// queries, so maxima, exponentials, bias and rescaling are all vertical, and both products have one form,
//
//   C[r, lane] += Σ_p A[r, p] · B[p, lane]        scores: r = key, p = d, A = K, B = qᵀ
//                                                 output: r = d, p = key, A = Vᵀ, B = e^scores
//
// computed in register tiles of 6 rows by kColumns vectors with A broadcast. K and V of a head are packed to
// contiguous fp32 once for many tiles: their rows lie H·D floats apart, which maps to few cache sets.
// A segment's bias is one vector a tile, added to the scores; its pads are added to l once.
//
// The running maximum starts at the lowest finite float, so that excluded lanes (b = -inf) give e^-inf = 0 and
// never -inf - -inf.
#pragma once
#include <cmath>

#include "parallel_for.h"
#include "regional_attention_layout.h"
#include "simd.h"

namespace anima {
namespace ANIMA_ISA {
namespace {

constexpr int kRows = 6;
constexpr float kLowest = -3.402823466e38f;
constexpr int kVectors = kQueries / kWidth;
constexpr int kPanel = kColumns * kWidth;

// C[R rows, kPanel lanes] = alpha · C + Σ_p A[r·row + p·step] · B[p, lanes]; alpha null: C is overwritten.
template <int R>
static ANIMA_INLINE void multiply_tile(const float* a, int64_t row, int64_t step, const float* b, int64_t depth,
                                       const float* alpha, float* c) {
  Vec sum[R][kColumns];
  ANIMA_UNROLL
  for (int r = 0; r < R; ++r)
    ANIMA_UNROLL
    for (int j = 0; j < kColumns; ++j)
      sum[r][j] = alpha ? load(c + r * kQueries + j * kWidth) * load(alpha + j * kWidth) : set1(0.0f);
  for (int64_t p = 0; p < depth; ++p) {
    Vec column[kColumns];
    ANIMA_UNROLL
    for (int j = 0; j < kColumns; ++j) column[j] = load(b + p * kQueries + j * kWidth);
    ANIMA_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec value = set1(a[r * row + p * step]);
      ANIMA_UNROLL
      for (int j = 0; j < kColumns; ++j) sum[r][j] = fma(value, column[j], sum[r][j]);
    }
  }
  ANIMA_UNROLL
  for (int r = 0; r < R; ++r)
    ANIMA_UNROLL
    for (int j = 0; j < kColumns; ++j) store(c + r * kQueries + j * kWidth, sum[r][j]);
}

// The same for any number of rows and all kQueries lanes.
static void multiply(const float* a, int64_t row, int64_t step, const float* b, int64_t rows, int64_t depth,
                     const float* alpha, float* c) {
  for (int lane = 0; lane < kQueries; lane += kPanel) {
    const float* scale = alpha ? alpha + lane : nullptr;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
      multiply_tile<kRows>(a + r * row, row, step, b + lane, depth, scale, c + r * kQueries + lane);
    const float* rest = a + r * row;
    float* to = c + r * kQueries + lane;
    switch (rows - r) {
      case 5: multiply_tile<5>(rest, row, step, b + lane, depth, scale, to); break;
      case 4: multiply_tile<4>(rest, row, step, b + lane, depth, scale, to); break;
      case 3: multiply_tile<3>(rest, row, step, b + lane, depth, scale, to); break;
      case 2: multiply_tile<2>(rest, row, step, b + lane, depth, scale, to); break;
      case 1: multiply_tile<1>(rest, row, step, b + lane, depth, scale, to); break;
      default: break;
    }
  }
}

static ANIMA_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

template <class Io>
struct Kernel {
  typedef typename Io::Type T;
  const RegionalAttention& call;
  const Workspace layout;
  float* const keys;
  float* const values;
  float* const query;
  float* const out;
  float* const mixed;
  float* const scores;
  float* const bias;
  // One softmax a lane: running maximum m, denominator l, and the factor that `out` still has to be scaled by.
  float m[kQueries], l[kQueries], pending[kQueries];
  bool empty;  // `out` has no content yet
  const bool streams;  // rows of the result are whole cache lines


  Kernel(const RegionalAttention& c, const Workspace& w, float* base)
      : call(c), layout(w), keys(base + w.keys), values(base + w.values), query(base + w.query), out(base + w.out),
        mixed(base + w.mixed), scores(base + w.scores), bias(base + w.bias), streams(whole_lines(c)) {}

  static bool whole_lines(const RegionalAttention& c) {
    const int64_t line = 64 / int64_t(sizeof(T));
    return reinterpret_cast<uintptr_t>(c.out.data) % 64 == 0 && c.head_dim % line == 0 && c.out.row % line == 0 &&
           c.out.head % line == 0 && c.out.batch % line == 0;
  }

  const T* row_of(const Strided& x, int64_t b, int64_t h, int64_t n) const {
    return static_cast<const T*>(x.data) + b * x.batch + h * x.head + n * x.row;
  }

  void pack_rows(const Strided& x, int64_t b, int64_t h, int64_t start, int64_t end, float* to) const {
    const int64_t dim = call.head_dim;
    for (int64_t n = start; n < end; ++n, to += dim) {
      const T* from = row_of(x, b, h, n);
      int64_t d = 0;
      for (; d + kWidth <= dim; d += kWidth) store(to + d, Io::load(from + d));
      for (; d < dim; ++d) to[d] = Io::widen(from[d]);
    }
  }

  void pack(int64_t b, int64_t kv_head, const int64_t* segments) const {
    int64_t n = 0;
    for (int64_t s = 0; s < call.segments_per_plan; ++s) {
      const int64_t start = segments[3 * s], end = segments[3 * s + 1];
      pack_rows(call.k, b, kv_head, start, end, keys + n * call.head_dim);
      pack_rows(call.v, b, kv_head, start, end, values + n * call.head_dim);
      n += end - start;
    }
  }

  // query[d, lane] = scale · q; lanes past the last query repeat it (and are never stored).
  void load_queries(int64_t b, int64_t h, const int32_t* order, int64_t first, int count) const {
    const Vec scale = set1(call.scale);
    const int64_t dim = call.head_dim;
    for (int lane = 0; lane < kQueries; lane += kWidth) {
      const T* from[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int64_t n = first + (lane + i < count ? lane + i : count - 1);
        from[i] = row_of(call.q, b, h, order ? order[n] : n);
      }
      for (int64_t d = 0; d < dim; d += kWidth) {
        const int width = dim - d < kWidth ? int(dim - d) : kWidth;
        Vec r[kWidth];
        for (int i = 0; i < kWidth; ++i)
          r[i] = (width == kWidth ? Io::load(from[i] + d) : load_part<Io>(from[i] + d, width)) * scale;
        transpose(r);
        for (int i = 0; i < width; ++i) store(query + (d + i) * kQueries + lane, r[i]);
      }
    }
  }

  void prefetch_queries(int64_t b, int64_t h, const int32_t* order, int64_t first) const {
    const int64_t last = first + kQueries < call.queries ? first + kQueries : call.queries;
    for (int64_t n = first; n < last; ++n) {
      const char* row = reinterpret_cast<const char*>(row_of(call.q, b, h, order ? order[n] : n));
      for (int64_t byte = 0; byte < call.head_dim * int64_t(sizeof(T)); byte += 64) prefetch(row + byte);
    }
  }

  // Gather the tile's bias of each segment; true where some query may attend to it.
  bool load_bias(const float* from, const int32_t* order, int64_t first, int count, float* to) const {
    const float excluded = call.blend ? 0.0f : -float_from_bits(0x7f800000u);
    bool live = false;
    for (int lane = 0; lane < kQueries; ++lane) {
      const int64_t n = first + (lane < count ? lane : count - 1);
      to[lane] = from[order ? order[n] : n];
      live |= to[lane] != excluded;
    }
    return live;
  }

  void begin_softmax() {
    for (int lane = 0; lane < kQueries; ++lane) {
      m[lane] = kLowest;
      l[lane] = 0.0f;
      pending[lane] = 1.0f;
    }
    empty = true;
  }

  // Pads: zero keys with zero values, so only the denominator sees them.
  void add_pads(float pads, const float* b) {
    for (int lane = 0; lane < kQueries; lane += kWidth) {
      const Vec before = load(m + lane), score = b ? load(b + lane) : set1(0.0f);
      const Vec after = max(before, score);
      const Vec fade = exp_nonpositive(before - after);
      store(l + lane, fma(set1(pads), exp_nonpositive(score - after), load(l + lane) * fade));
      store(pending + lane, load(pending + lane) * fade);
      store(m + lane, after);
    }
  }

  void add_keys(const float* k, const float* v, int64_t count, const float* b) {
    const int64_t dim = call.head_dim;
    for (int64_t n0 = 0; n0 < count; n0 += kKeys) {
      const int64_t n = count - n0 < kKeys ? count - n0 : kKeys;
      multiply(k + n0 * dim, dim, 1, query, n, dim, nullptr, scores);
      for (int lane = 0; lane < kQueries; lane += kWidth) {
        float* column = scores + lane;
        Vec top = load(column);
        for (int64_t r = 1; r < n; ++r) top = max(top, load(column + r * kQueries));
        const Vec shift = b ? load(b + lane) : set1(0.0f);
        const Vec before = load(m + lane), after = max(before, top + shift);
        Vec sum = set1(0.0f);
        for (int64_t r = 0; r < n; ++r) {
          // In this order: a bias of -1e30 swallows the score, and shift - after would bring it back.
          const Vec p = exp_nonpositive(load(column + r * kQueries) + shift - after);
          sum = sum + p;
          store(column + r * kQueries, p);
        }
        const Vec fade = exp_nonpositive(before - after);
        store(l + lane, fma(load(l + lane), fade, sum));
        store(pending + lane, load(pending + lane) * fade);
        store(m + lane, after);
      }
      multiply(v + n0 * dim, 1, dim, scores, dim, n, empty ? nullptr : pending, out);
      for (int lane = 0; lane < kQueries; ++lane) pending[lane] = 1.0f;
      empty = false;
    }
  }

  // factor[lane] = weight · pending / l; 0 where nothing was attended to.
  void finish_softmax(const float* weight, float* factor) const {
    for (int lane = 0; lane < kQueries; ++lane)
      factor[lane] = l[lane] == 0.0f ? 0.0f : (weight ? weight[lane] : 1.0f) * pending[lane] / l[lane];
  }

  void add_to_mixed(const float* factor, bool first) const {
    for (int64_t d = 0; d < call.head_dim; ++d)
      for (int lane = 0; lane < kQueries; lane += kWidth) {
        const int64_t at = d * kQueries + lane;
        const Vec sum = first ? set1(0.0f) : load(mixed + at);
        store(mixed + at, fma(load(out + at), load(factor + lane), sum));
      }
  }

  void store_queries(int64_t b, int64_t h, const int32_t* order, int64_t first, int count, const float* from,
                     const float* factor) const {
    const int64_t dim = call.head_dim;
    for (int lane = 0; lane < count; lane += kWidth) {
      T* to[kWidth];
      const int rows = count - lane < kWidth ? count - lane : kWidth;
      for (int i = 0; i < rows; ++i) {
        const int64_t n = first + lane + i;
        to[i] = const_cast<T*>(row_of(call.out, b, h, order ? order[n] : n));
      }
      const Vec scale = factor ? load(factor + lane) : set1(1.0f);
      for (int64_t d = 0; d < dim; d += kWidth) {
        const int width = dim - d < kWidth ? int(dim - d) : kWidth;
        Vec r[kWidth];
        for (int i = 0; i < kWidth; ++i)
          r[i] = i < width ? load(from + (d + i) * kQueries + lane) * scale : set1(0.0f);
        transpose(r);
        for (int i = 0; i < rows; ++i)
          if (streams) Io::stream(to[i] + d, r[i]);
          else if (width == kWidth) Io::store(to[i] + d, r[i]);
          else store_part<Io>(to[i] + d, r[i], width);
      }
    }
  }

  // One tile: queries first … first + count of head h, row b, under the plan whose K and V are packed.
  void tile(int64_t b, int64_t h, int64_t plan, int64_t first, int count) {
    const int64_t* segments = call.segments + 3 * plan * call.segments_per_plan;
    const int32_t* order = call.order ? call.order + plan * call.queries : nullptr;
    load_queries(b, h, order, first, count);
    prefetch_queries(b, h, order, first + kQueries);
    float factor[kQueries];
    begin_softmax();
    bool nothing_mixed = true;
    int64_t packed = 0;
    for (int64_t s = 0; s < call.segments_per_plan; ++s) {
      const int64_t n = segments[3 * s + 1] - segments[3 * s], pads = segments[3 * s + 2];
      const int64_t at = packed * call.head_dim;
      packed += n;
      if (n == 0 && (pads == 0 || call.blend)) continue;  // alone, pads give 0
      const float* b_s = nullptr;
      if (call.bias) {
        float* gathered = bias + s * kQueries;
        const float* from = call.bias + (plan * call.segments_per_plan + s) * call.queries;
        if (!load_bias(from, order, first, count, gathered)) continue;
        b_s = gathered;
      }
      const float* shift = call.blend ? nullptr : b_s;
      if (call.blend) begin_softmax();
      if (pads) add_pads(float(pads), shift);
      add_keys(keys + at, values + at, n, shift);
      if (call.blend) {
        finish_softmax(b_s, factor);
        add_to_mixed(factor, nothing_mixed);
        nothing_mixed = false;
      }
    }
    const bool zero = call.blend ? nothing_mixed : empty;
    float* result = call.blend ? mixed : out;
    if (zero)
      for (int64_t i = 0; i < call.head_dim * kQueries; ++i) result[i] = 0.0f;
    if (!call.blend) finish_softmax(nullptr, factor);
    store_queries(b, h, order, first, count, result, call.blend ? nullptr : factor);
    if (call.lse) {
      float* to = call.lse + (b * call.heads + h) * call.queries;
      for (int lane = 0; lane < count; ++lane) {
        const int64_t n = first + lane;
        to[order ? order[n] : n] = m[lane] + logf(l[lane]);  // l = 0: -inf
      }
    }
  }
};

template <class Io>
static void run_typed(const RegionalAttention& call, float* workspace, int threads) {
  const Workspace layout(call);
  const int64_t tiles = (call.queries + kQueries - 1) / kQueries;
  // A head is cut into chunks so that threads stay busy, but of at least 8 tiles, for packing is repeated.
  const int64_t rows = call.batch * call.heads;
  int64_t chunks = (8 * threads + rows - 1) / rows;
  if (chunks > tiles / 8) chunks = tiles / 8;
  if (chunks < 1) chunks = 1;
  const int64_t share = (tiles + chunks - 1) / chunks;
  parallel_for(rows * chunks, threads, [&](int64_t item, int thread) {
    Kernel<Io> kernel(call, layout, workspace + thread * layout.total);
    const int64_t row = item / chunks, b = row / call.heads, h = row % call.heads;
    const int64_t plan = call.plan_index[b];
    kernel.pack(b, h / (call.heads / call.kv_heads), call.segments + 3 * plan * call.segments_per_plan);
    const int64_t begin = item % chunks * share;
    const int64_t end = begin + share < tiles ? begin + share : tiles;
    // Threads start at different tiles: rows of all heads lie side by side, so the first touch of a fresh output is
    // a page fault for every head at once, and threads at the same tile would wait for each other's.
    const int64_t count = end - begin, first_tile = count * thread / threads;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = (begin + (first_tile + i) % count) * kQueries;
      const int64_t left = call.queries - first;
      kernel.tile(b, h, plan, first, left < kQueries ? int(left) : kQueries);
    }
    end_streams();
  });
}

}  // namespace

void run(const RegionalAttention& call, float* workspace, int threads) {
  switch (call.dtype) {
    case DType::kFloat32: return run_typed<Float>(call, workspace, threads);
    case DType::kFloat16: return run_typed<Half>(call, workspace, threads);
    case DType::kBFloat16: return run_typed<BFloat16>(call, workspace, threads);
  }
}

}  // namespace ANIMA_ISA
}  // namespace anima
