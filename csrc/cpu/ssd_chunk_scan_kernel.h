// Mamba2's state space duality on the chunked engine: k = B, q = C, g = dt A, d = dt x; then y += D x, y *= silu(z).
#pragma once
#include "chunk_scan.h"

namespace anima {
namespace ANIMA_ISA {
namespace {

template <class Io>
struct SsdScan {
  typedef typename Io::Type T;
  static constexpr bool kDelta = false;

  struct Chunk {
    int64_t b, t, count;
    bool starts;
  };

  const SsdChunkScan& call;
  const int64_t key_dim, value_dim, sequences, groups, heads_per_group;
  const bool streams;

  explicit SsdScan(const SsdChunkScan& c)
      : call(c), key_dim(c.state_dim), value_dim(c.head_dim), sequences(c.batch), groups(c.groups),
        heads_per_group(c.heads / c.groups), streams(whole_lines(c.y, c.head_dim, sizeof(T))) {}

  // The first place after t where varlen states are taken, or the end.
  int64_t next_end(int64_t t) const {
    int64_t low = 0, high = call.sequences + 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (call.cu_seqlens[middle] > t) high = middle;
      else low = middle + 1;
    }
    return low <= call.sequences && call.cu_seqlens[low] < call.length ? call.cu_seqlens[low] : call.length;
  }

  bool new_sequence(int64_t b, int64_t t) const {
    const int32_t* index = call.seq_idx;
    return index && index[b * call.length + t] != (t ? index[b * call.length + t - 1] : 0);
  }

  Chunk chunk_at(int64_t b, int64_t t) const {
    if (t >= call.length) return {b, t, 0, false};
    int64_t end = t + kChunk < call.length ? t + kChunk : call.length;
    if (call.cu_seqlens) {
      const int64_t cut = next_end(t);
      end = end < cut ? end : cut;
    }
    for (int64_t next = t + 1; call.seq_idx && next < end; ++next)
      if (new_sequence(b, next)) end = next;
    return {b, t, end - t, new_sequence(b, t)};
  }
  Chunk first_chunk(int64_t b) const { return chunk_at(b, 0); }
  Chunk next_chunk(const Chunk& chunk) const { return chunk_at(chunk.b, chunk.t + chunk.count); }

  bool state_needed(const Chunk& chunk) const {
    const int64_t end = chunk.t + chunk.count;
    if (call.varlen_states.data) return true;
    return end == call.length ? call.final_state.data != nullptr : !new_sequence(chunk.b, end);
  }

  const T* row(const Tensor& x, int64_t b, int64_t t, int64_t h) const {
    return static_cast<const T*>(x.data) + b * x.stride[0] + t * x.stride[1] + h * x.stride[2];
  }

  void load_keys(const Chunk& chunk, int64_t group, float* q, float* k, int64_t ld) const {
    for (int64_t i = 0; i < chunk.count; ++i) {
      pack_row<Io>(row(call.C, chunk.b, chunk.t + i, group), key_dim, ld, set1(1.0f), q + i * ld);
      pack_row<Io>(row(call.B, chunk.b, chunk.t + i, group), key_dim, ld, set1(1.0f), k + i * ld);
    }
  }

  void load_values(const Chunk& chunk, int64_t h, float* d, int64_t ld, Decay& decay, float* dt) const {
    const Tensor& from = call.dt;
    const float bias = call.dt_bias.data ? static_cast<const float*>(call.dt_bias.data)[h * call.dt_bias.stride[0]] : 0.0f;
    for (int64_t i = 0; i < chunk.count; ++i)
      dt[i] = widen(from, chunk.b * from.stride[0] + (chunk.t + i) * from.stride[1] + h * from.stride[2]) + bias;
    for (int64_t i = 0; i < chunk.count; i += kWidth) {
      Vec x = load(dt + i);
      if (call.dt_softplus) x = softplus(x);
      store(dt + i, min(max(x, set1(call.dt_min)), set1(call.dt_max)));
    }
    const double a = static_cast<const float*>(call.A.data)[h * call.A.stride[0]];
    double sums[kChunk], sum = 0.0;
    for (int64_t i = 0; i < chunk.count; ++i) sums[i] = sum += a * double(dt[i]);
    decay.finish(sums, chunk.count);
    for (int64_t i = 0; i < chunk.count; ++i)
      pack_row<Io>(row(call.x, chunk.b, chunk.t + i, h), value_dim, ld, set1(dt[i]), d + i * ld);
  }

  Vec skip(int64_t b, int64_t t, int64_t h, int64_t j, int count) const {
    const Tensor& D = call.D;
    const int64_t at = b * D.stride[0] + t * D.stride[1] + h * D.stride[2];
    if (D.stride[3] == 0) return set1(widen(D, at));
    float lanes[kWidth] = {};
    for (int i = 0; i < count; ++i) lanes[i] = widen(D, at + (j + i) * D.stride[3]);
    return load(lanes);
  }

  void store_output(const Chunk& chunk, int64_t h, float* y, int64_t ld) const {
    for (int64_t i = 0; i < chunk.count; ++i) {
      const int64_t t = chunk.t + i;
      float* from = y + i * ld;
      for (int64_t j = 0; j < value_dim && (call.D.data || call.z.data); j += kWidth) {
        const int count = value_dim - j < kWidth ? int(value_dim - j) : kWidth;
        const auto part = [count, j](const T* p) {
          return count == kWidth ? Io::load(p + j) : load_part<Io>(p + j, count);
        };
        Vec sum = load(from + j);
        if (call.D.data) sum = fma(skip(chunk.b, t, h, j, count), part(row(call.x, chunk.b, t, h)), sum);
        if (call.z.data) sum = sum * silu(part(row(call.z, chunk.b, t, h)));
        store(from + j, sum);
      }
      store_row<Io>(const_cast<T*>(row(call.y, chunk.b, t, h)), from, value_dim, streams);
    }
  }

  // Outside, states are [P, N]; inside [N, P].
  bool load_states(int64_t b, int64_t first, int64_t count, float* states, int64_t size, int64_t ld) const {
    if (!call.initial_state.data) return false;
    const float* from = static_cast<const float*>(call.initial_state.data) + (b * call.heads + first) * key_dim * value_dim;
    for (int64_t i = 0; i < count; ++i)
      copy_transposed(from + i * key_dim * value_dim, key_dim, value_dim, key_dim, states + i * size, ld);
    return true;
  }

  void write_states(const Tensor& to, int64_t sequence, int64_t first, int64_t count, const float* states, int64_t size,
                    int64_t ld) const {
    float* out = static_cast<float*>(to.data) + (sequence * call.heads + first) * key_dim * value_dim;
    for (int64_t i = 0; i < count; ++i, out += key_dim * value_dim) {
      if (states) copy_transposed(states + i * size, ld, key_dim, value_dim, out, key_dim);
      else
        for (int64_t j = 0; j < key_dim * value_dim; ++j) out[j] = 0.0f;
    }
  }

  void after_chunk(const Chunk& chunk, int64_t first, int64_t count, const float* states, int64_t size, int64_t ld) const {
    if (!call.varlen_states.data) return;
    const int64_t end = chunk.t + chunk.count;
    for (int64_t s = 0; s < call.sequences; ++s)
      if (call.cu_seqlens[s + 1] == end && call.cu_seqlens[s] < end)
        write_states(call.varlen_states, s, first, count, states, size, ld);
  }

  void store_states(int64_t b, int64_t first, int64_t count, const float* states, int64_t size, int64_t ld) const {
    if (call.final_state.data) write_states(call.final_state, b, first, count, states, size, ld);
    for (int64_t s = 0; call.varlen_states.data && s < call.sequences; ++s)
      if (call.cu_seqlens[s] >= call.cu_seqlens[s + 1])
        write_states(call.varlen_states, s, first, count, nullptr, size, ld);
  }
};

}  // namespace

void ssd_chunk_scan(const SsdChunkScan& call, float* workspace, int threads) {
  const ChunkLayout layout = layout_of(call, threads);
  switch (call.x.dtype) {
    case DType::kFloat32: return run_chunks(SsdScan<Float>(call), layout, workspace, threads);
    case DType::kFloat16: return run_chunks(SsdScan<Half>(call), layout, workspace, threads);
    case DType::kBFloat16: return run_chunks(SsdScan<BFloat16>(call), layout, workspace, threads);
  }
}

}  // namespace ANIMA_ISA
}  // namespace anima
