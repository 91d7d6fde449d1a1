// How the chunked engine (chunk_scan.h) cuts a call into tasks, and the workspaces of the recurrent ops.
#pragma once
#include "../common/scans.h"

namespace anima {

constexpr int kChunk = 64;      // tokens
constexpr int kMostDim = 256;   // of N, P, K and V

namespace {  // one copy a file: see simd.h on instruction sets

// How a call is cut into tasks, and the floats of one thread's workspace.
struct ChunkLayout {
  static constexpr int64_t kPad = 16;  // the widest vector; rows are padded to it, whatever the machine's is
  int64_t key_stride, value_stride;    // floats a row of q, k and of d, S
  int64_t block, blocks;               // heads a task, tasks a group
  int64_t q, k, transposed, qk, kk, m, t, d, y, states;
  int64_t total;

  // `rows`: sequences · groups. Blocks of up to 8 heads, fewer where their states would leave the second cache or where
  // threads would go without a task.
  ChunkLayout(int64_t rows, int64_t heads_per_group, int64_t key_dim, int64_t value_dim, bool delta, int threads) {
    key_stride = (key_dim + kPad - 1) / kPad * kPad;
    value_stride = (value_dim + kPad - 1) / kPad * kPad;
    block = (1 << 17) / (key_stride * value_stride);
    block = block > 8 ? 8 : block < 1 ? 1 : block;
    block = block > heads_per_group ? heads_per_group : block;
    while (block > 1 && rows * ((heads_per_group + block - 1) / block) < 2 * threads) --block;
    blocks = (heads_per_group + block - 1) / block;
    int64_t end = 0;
    const auto take = [&end](int64_t floats) {
      const int64_t begin = end;
      end += floats;
      return begin;
    };
    q = take(kChunk * key_stride);
    k = take(kChunk * key_stride);
    transposed = take(kChunk * key_stride);
    qk = take(kChunk * kChunk);
    kk = take(delta ? kChunk * kChunk : 0);
    m = take(kChunk * kChunk);
    t = take(delta ? kChunk * kChunk : 0);
    d = take(kChunk * value_stride);
    y = take(kChunk * value_stride);
    states = take(block * key_stride * value_stride);
    total = end;
  }
};

inline ChunkLayout layout_of(const SsdChunkScan& call, int threads) {
  const int64_t rows = call.batch * call.groups;
  return ChunkLayout(rows, call.heads / call.groups, call.state_dim, call.head_dim, false, threads);
}

inline ChunkLayout layout_of(const GatedDeltaRule& call, int threads) {
  const int64_t rows = call.sequences * call.key_heads;
  return ChunkLayout(rows, call.value_heads / call.key_heads, call.key_dim, call.value_dim, true, threads);
}

// Floats of one thread of gated_delta_step: q, k and, where nobody asked for it, the state.
inline int64_t step_floats(const GatedDeltaRule& call) {
  return 2 * kMostDim + (call.key_dim * call.value_dim + 15) / 16 * 16;
}

}  // namespace

}  // namespace anima
