// The gated delta rule on the chunked engine, with q and k normalised while they are packed.
#pragma once
#include "chunk_scan.h"

namespace anima {
namespace {

// Sequence i of a call: its batch row and tokens. Clamped, so that wrong cu_seqlens read no foreign memory.
struct Sequence {
  int64_t b, begin, end;

  Sequence(const GatedDeltaRule& call, int64_t i) : b(i), begin(0), end(call.length) {
    if (!call.cu_seqlens) return;
    b = 0;
    begin = call.cu_seqlens[i] > 0 ? call.cu_seqlens[i] : 0;
    end = call.cu_seqlens[i + 1] < call.length ? call.cu_seqlens[i + 1] : call.length;
  }
};

}  // namespace

namespace ANIMA_ISA {
namespace {

// x · scale, divided by sqrt(|x|^2 + 1e-6) first if `normalise`, as padded fp32.
template <class Io>
static ANIMA_INLINE void pack_normalised(const typename Io::Type* x, int64_t columns, int64_t stride, bool normalise,
                                         float scale, float* to) {
  pack_row<Io>(x, columns, stride, set1(1.0f), to);
  if (normalise) {
    Vec squares = set1(0.0f);
    for (int64_t j = 0; j < columns; j += kWidth) squares = fma(load(to + j), load(to + j), squares);
    scale /= sqrtf(sum_lanes(squares) + 1e-6f);
  }
  for (int64_t j = 0; j < columns; j += kWidth) store(to + j, load(to + j) * set1(scale));
}

template <class Io>
struct DeltaScan {
  typedef typename Io::Type T;
  static constexpr bool kDelta = true;

  struct Chunk {
    int64_t b, t, count, end;
    bool starts;
  };

  const GatedDeltaRule& call;
  const int64_t key_dim, value_dim, sequences, groups, heads_per_group;
  const bool streams;

  explicit DeltaScan(const GatedDeltaRule& c)
      : call(c), key_dim(c.key_dim), value_dim(c.value_dim), sequences(c.sequences), groups(c.key_heads),
        heads_per_group(c.value_heads / c.key_heads), streams(whole_lines(c.o, c.value_dim, sizeof(T))) {}

  Chunk chunk_at(int64_t b, int64_t t, int64_t end) const {
    const int64_t left = end - t;
    return {b, t, left < 0 ? 0 : left < kChunk ? left : kChunk, end, false};
  }
  Chunk first_chunk(int64_t i) const {
    const Sequence sequence(call, i);
    return chunk_at(sequence.b, sequence.begin, sequence.end);
  }
  Chunk next_chunk(const Chunk& chunk) const { return chunk_at(chunk.b, chunk.t + chunk.count, chunk.end); }
  bool state_needed(const Chunk& chunk) const { return chunk.t + chunk.count < chunk.end || call.final_state.data; }

  const T* row(const Tensor& x, int64_t b, int64_t t, int64_t h) const {
    return static_cast<const T*>(x.data) + b * x.stride[0] + t * x.stride[1] + h * x.stride[2];
  }

  void load_keys(const Chunk& chunk, int64_t group, float* q, float* k, int64_t ld) const {
    for (int64_t i = 0; i < chunk.count; ++i) {
      pack_normalised<Io>(row(call.q, chunk.b, chunk.t + i, group), key_dim, ld, call.l2norm, call.scale, q + i * ld);
      pack_normalised<Io>(row(call.k, chunk.b, chunk.t + i, group), key_dim, ld, call.l2norm, 1.0f, k + i * ld);
    }
  }

  void load_values(const Chunk& chunk, int64_t h, float* d, int64_t ld, Decay& decay, float* beta) const {
    const auto at = [&chunk, h](const Tensor& x, int64_t i) {
      return widen(x, chunk.b * x.stride[0] + (chunk.t + i) * x.stride[1] + h * x.stride[2]);
    };
    double sums[kChunk], sum = 0.0;
    for (int64_t i = 0; i < chunk.count; ++i) {
      sums[i] = sum += double(at(call.g, i));
      beta[i] = at(call.beta, i);
    }
    decay.finish(sums, chunk.count);
    for (int64_t i = 0; i < chunk.count; ++i)
      pack_row<Io>(row(call.v, chunk.b, chunk.t + i, h), value_dim, ld, set1(beta[i]), d + i * ld);
  }

  void store_output(const Chunk& chunk, int64_t h, const float* y, int64_t ld) const {
    for (int64_t i = 0; i < chunk.count; ++i)
      store_row<Io>(const_cast<T*>(row(call.o, chunk.b, chunk.t + i, h)), y + i * ld, value_dim, streams);
  }

  bool load_states(int64_t sequence, int64_t first, int64_t count, float* states, int64_t size, int64_t ld) const {
    if (!call.initial_state.data) return false;
    const float* from = static_cast<const float*>(call.initial_state.data) +
                        (sequence * call.value_heads + first) * key_dim * value_dim;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t r = 0; r < key_dim; ++r, from += value_dim)
        pack_row<Float>(from, value_dim, ld, set1(1.0f), states + i * size + r * ld);
    return true;
  }

  void after_chunk(const Chunk&, int64_t, int64_t, const float*, int64_t, int64_t) const {}

  void store_states(int64_t sequence, int64_t first, int64_t count, const float* states, int64_t size, int64_t ld) const {
    if (!call.final_state.data) return;
    float* to = static_cast<float*>(call.final_state.data) + (sequence * call.value_heads + first) * key_dim * value_dim;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t r = 0; r < key_dim; ++r, to += value_dim) {
        if (states) store_row<Float>(to, states + i * size + r * ld, value_dim, false);
        else
          for (int64_t j = 0; j < value_dim; ++j) to[j] = 0.0f;
      }
  }
};

}  // namespace

void gated_delta_rule(const GatedDeltaRule& call, float* workspace, int threads) {
  const ChunkLayout layout = layout_of(call, threads);
  switch (call.q.dtype) {
    case DType::kFloat32: return run_chunks(DeltaScan<Float>(call), layout, workspace, threads);
    case DType::kFloat16: return run_chunks(DeltaScan<Half>(call), layout, workspace, threads);
    case DType::kBFloat16: return run_chunks(DeltaScan<BFloat16>(call), layout, workspace, threads);
  }
}

}  // namespace ANIMA_ISA
}  // namespace anima
