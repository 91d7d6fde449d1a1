// Mamba2's chunked scan in one kernel; the call is described in ../common/scans.h.
//
// A block owns kSlice of the P rows of one head's state, S [kSlice, N], in shared memory, and walks the tokens in
// chunks of up to 64. With cum_i = Σ_{t<=i} dt_t A inside the chunk and S the state before it:
//   scores  M_ij = (C_i · B_j) exp(cum_i - cum_j) dt_j  for j <= i, else 0
//   y_i     = exp(cum_i) S C_i + Σ_j M_ij x_j + D_i x_i,  · silu(z_i)
//   S       <- exp(cum_last) S + Σ_j exp(cum_last - cum_j) dt_j x_j B_j^T
// N is contracted in blocks of 64, so the tiles of B and C are [64, 64] whatever N is: one configuration needs at most
// 64 KiB of shared memory and serves every architecture. The scores then take the place of B and C. The next tiles
// are loaded into registers while the present ones are multiplied.
//
// A chunk ends early where seq_idx changes, where a state of varlen_states is due and at the end, and rows past its end
// are zeros that were never read: nothing of one sequence, NaN included, meets another. Scores above the diagonal are
// selected away before exp.
//
// Roofline. A call needs, per token and head, P (2 N + chunk / 2) multiply-adds for outputs and state and N chunk / 2
// for the scores, and from DRAM x, y, dt, B and C once, z if given, and the states that are asked for. At B 1, L 1024,
// fp32, by data-sheet rates: RTX 4090 1.008 TB/s, 82.6 TFLOP/s (FFMA); H100 SXM 3.35 TB/s, 494 TFLOP/s of TF32, of
// which three terms leave a third:
//   H    P    N    G  | DRAM    GFLOP | floor on RTX 4090  H100 | beyond it: GFLOP   L2
//   32   128  64   32 | 50 MB    1.5  |           50 us   15 us |             0.4    50 MB
//   80   64   128  1  | 43 MB    3.7  |           45 us   22 us |             0.7   167 MB
//   128  64   128  8  | 76 MB    5.9  |           75 us   36 us |             1.1   260 MB
//   128  64   256  1  | 70 MB   11.3  |          136 us   68 us |             6.4  1072 MB
// Beyond the floor a block computes the scores of its slice anew, and B and C are read by all H / G · P / kSlice
// blocks that share them, mostly from L2. The floor does not know that the chunks of a head are dependent: with about
// as many blocks (B H P / kSlice, one a multiprocessor) as multiprocessors, the latency of 16 chunks, not these
// figures, decides. None of this was measured.
#include "scans.h"
#include "tile.cuh"

namespace anima {
namespace cuda {
namespace {

template <class T, int kSlice>
struct Layout {
  static constexpr int kStrideX = kSlice + Pad<T>::kAcross;
  static constexpr int kTileBytes = kChunk * kTileStride<T> * int(sizeof(T));
  static_assert(2 * kTileBytes >= kChunk * kScoreStride * int(sizeof(float)), "the scores lie over B and C");
  static constexpr int kFixedBytes = int(sizeof(Decays)) + kChunk * int(sizeof(float)) + 2 * kTileBytes +
                                     kChunk * kStrideX * int(sizeof(T));
  static constexpr int kMost = kSlice == 32 ? 128 : 256;  // N
  static constexpr int kStride = kMost + Pad<float>::kAlong;  // of the state: fixed, because addresses cost registers
  static constexpr int kBytes = kFixedBytes + kSlice * kStride * int(sizeof(float));
  static_assert(kBytes <= 64 * 1024, "of sm_75, which has least");
};

// Where the chunk that starts at `start` ends, as its length; 0 at the end of the tokens.
__device__ __forceinline__ int chunk_length(const int32_t* seq_idx, int64_t start, int64_t end) {
  int length = end - start < kChunk ? int(end - start) : kChunk;
  if (seq_idx == nullptr) return length;
#pragma unroll
  for (int first = 0; first < kChunk; first += 32) {
    const int i = first + lane_index();
    const bool changes = i > 0 && i < length && seq_idx[start + i] != seq_idx[start + i - 1];
    const unsigned changed = __ballot_sync(~0u, changes);
    if (changed != 0) return first + __ffs(int(changed)) - 1;
  }
  return length;
}

template <class T, int kSlice>
__global__ void __launch_bounds__(kThreads, 1)
    ssd_chunk_scan_kernel(const SsdChunkScan call, const bool vector_x, const bool vector_b, const bool vector_c) {
  using L = Layout<T, kSlice>;
  ANIMA_SHARED(unsigned char, memory);
  Decays& decays = *reinterpret_cast<Decays*>(memory);
  float* const steps = reinterpret_cast<float*>(memory + sizeof(Decays));  // dt [kChunk]
  T* const tile_c = reinterpret_cast<T*>(steps + kChunk);
  T* const tile_b = tile_c + kChunk * kTileStride<T>;
  float* const scores = reinterpret_cast<float*>(tile_c);
  T* const tile_x = tile_b + kChunk * kTileStride<T>;
  float* const state = reinterpret_cast<float*>(tile_x + kChunk * L::kStrideX);  // [kSlice, N], padded with zeros

  const int slices = int((call.head_dim + kSlice - 1) / kSlice);
  const int p0 = int(blockIdx.x % unsigned(slices)) * kSlice;
  const int row = int(blockIdx.x / unsigned(slices));  // of [batch, heads]
  const int h = row % int(call.heads), b = row / int(call.heads);
  const int g = h / int(call.heads / call.groups);
  const int state_dim = int(call.state_dim), columns_p = int(call.head_dim) - p0;

  const T* const x = static_cast<const T*>(call.x.data) + b * call.x.stride[0] + h * call.x.stride[2] + p0;
  const T* const B = static_cast<const T*>(call.B.data) + b * call.B.stride[0] + g * call.B.stride[2];
  const T* const C = static_cast<const T*>(call.C.data) + b * call.C.stride[0] + g * call.C.stride[2];
  const int32_t* const seq_idx = call.seq_idx == nullptr ? nullptr : call.seq_idx + b * call.length;
  const float log_decay = load_scalar(call.A, h * call.A.stride[0]);
  const float dt_bias = call.dt_bias.data == nullptr ? 0.0f : load_scalar(call.dt_bias, h * call.dt_bias.stride[0]);

  // This warp's rows of the scores and of y, and its columns of each; its rows and columns of the state.
  const int warp = int(threadIdx.x) / 32;
  const int row_y = 16 * (warp % 4), column_m = 32 * (warp / 4), column_y = kSlice / 2 * (warp / 4);
  constexpr int kTilesY = kSlice / 16;
  const int row_s = 16 * (warp % kTilesY), column_s = 8 * kTilesY * (warp / kTilesY);

  const auto copy_state = [&](float* destination, bool zero) {
    for (int i = int(threadIdx.x); i < kSlice * state_dim; i += kThreads) {
      const int p = i / state_dim, n = i % state_dim;
      if (p < columns_p) destination[(p0 + p) * state_dim + n] = zero ? 0.0f : state[p * L::kStride + n];
    }
  };

  const int64_t state_row = row * call.head_dim * state_dim;
  for (int i = int(threadIdx.x); i < kSlice * L::kStride; i += kThreads) {
    const int p = i / L::kStride, n = i % L::kStride;
    const bool given = call.initial_state.data != nullptr && p < columns_p && n < state_dim;
    state[i] = given ? static_cast<const float*>(call.initial_state.data)[state_row + (p0 + p) * state_dim + n] : 0.0f;
  }

  // Sequences whose states are due: those before `sequence` are written.
  const int sequences = call.varlen_states.data == nullptr ? 0 : int(call.sequences);
  int sequence = 0;
  const auto sequences_until = [&](int64_t token) {
    int i = sequence;
    while (i < sequences && call.cu_seqlens[i + 1] <= token) ++i;
    return i;
  };
  const auto write_states_until = [&](int64_t token) {
    for (const int end = sequences_until(token); sequence < end; ++sequence) {
      float* const states = static_cast<float*>(call.varlen_states.data);
      const bool empty = call.cu_seqlens[sequence] == call.cu_seqlens[sequence + 1];
      copy_state(states + (sequence * call.heads + h) * call.head_dim * state_dim, empty);
    }
  };
  write_states_until(0);

  Fetch<T, kSlice> next_x;
  Fetch<T, kBlock> next_b, next_c;
  float next_dt[2] = {0.0f, 0.0f};
  int length = 0;
  bool reset = false;

  const auto fetch_block = [&](int64_t start, int n0) {
    next_b.load(B + start * call.B.stride[1] + n0, call.B.stride[1], length, state_dim - n0, vector_b);
    next_c.load(C + start * call.C.stride[1] + n0, call.C.stride[1], length, state_dim - n0, vector_c);
  };
  // Sets length and reset to those of the chunk at `start`, which need not exist.
  const auto fetch_chunk = [&](int64_t start) {
    const int due = sequences_until(start);
    length = chunk_length(seq_idx, start, due < sequences ? int64_t(call.cu_seqlens[due + 1]) : call.length);
    if (length == 0) return;
    reset = seq_idx != nullptr && seq_idx[start] != (start > 0 ? seq_idx[start - 1] : 0);
    next_x.load(x + start * call.x.stride[1], call.x.stride[1], length, columns_p, vector_x);
    fetch_block(start, 0);
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = 2 * lane_index() + i;
        const int64_t at = b * call.dt.stride[0] + (start + t) * call.dt.stride[1] + h * call.dt.stride[2];
        next_dt[i] = t < length ? load_scalar(call.dt, at) : 0.0f;
      }
    }
  };

  fetch_chunk(0);
  for (int64_t start = 0; length > 0;) {
    const int rows = length;
    float m[1][4][4] = {}, y[1][kTilesY][4] = {};

    for (int n0 = 0; n0 < state_dim; n0 += kBlock) {
      __syncthreads();
      next_b.store(tile_b, kTileStride<T>);
      next_c.store(tile_c, kTileStride<T>);
      if (n0 == 0) {
        next_x.store(tile_x, L::kStrideX);
        if (reset) {
          for (int i = int(threadIdx.x); i < kSlice * L::kStride; i += kThreads) state[i] = 0.0f;
        }
      }
      __syncthreads();

      const float dt_of_lane[2] = {next_dt[0], next_dt[1]};
      if (n0 + kBlock < state_dim) {
        fetch_block(start, n0 + kBlock);
      } else {
        fetch_chunk(start + rows);
      }
      if (n0 == 0 && warp == 0) {
        float dt[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float biased = dt_of_lane[i] + dt_bias;
          dt[i] = clamp(call.dt_softplus ? softplus(biased) : biased, call.dt_min, call.dt_max);
          if (2 * lane_index() + i >= rows) dt[i] = 0.0f;
        }
        decays.set(double(log_decay) * double(dt[0]), double(log_decay) * double(dt[1]));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          steps[2 * lane_index() + i] = dt[i];
          decays.to_end[2 * lane_index() + i] *= dt[i];
        }
      }

      const int depth = state_dim - n0 < kBlock ? (state_dim - n0 + 15) / 16 * 16 : kBlock;
      const Tile<T, true> of_c{tile_c, kTileStride<T>};
      if (column_m <= row_y + 15) {
        multiply<T, 2>(m, of_c, Tile<T, true>{tile_b, kTileStride<T>}, row_y, column_m, depth);
      }
      multiply<T, 2>(y, of_c, Tile<float, true>{state + n0, L::kStride}, row_y, column_y, depth);
      __syncthreads();

      float s[1][kTilesY][4];
      const float decay = decays.from_start[kChunk - 1];
      float* const corner = state + row_s * L::kStride + n0 + column_s;
#pragma unroll
      for (int n = 0; n < kTilesY; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[0][n][e] = decay * corner[accumulator_row(e) * L::kStride + 8 * n + accumulator_column(e)];
        }
      }
      multiply<T, 3>(s, ScaledTile<T>{tile_x, decays.to_end, L::kStrideX}, Tile<T, false>{tile_b, kTileStride<T>},
                     row_s, column_s, kChunk);
#pragma unroll
      for (int n = 0; n < kTilesY; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          corner[accumulator_row(e) * L::kStride + 8 * n + accumulator_column(e)] = s[0][n][e];
        }
      }
    }

    __syncthreads();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row_y + accumulator_row(e), j = column_m + 8 * n + accumulator_column(e);
        scores[i * kScoreStride + j] = j <= i ? m[0][n][e] * decays.between(i, j) * steps[j] : 0.0f;
      }
    }
    float gate[kTilesY][4];  // z, on its way during the last product
#pragma unroll
    for (int n = 0; n < kTilesY; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row_y + accumulator_row(e), p = column_y + 8 * n + accumulator_column(e);
        const bool exists = i < rows && p < columns_p;
        const Tensor &D = call.D, &z = call.z;
        y[0][n][e] *= decays.from_start[i];
        if (exists && D.data != nullptr) {
          const int64_t at = b * D.stride[0] + (start + i) * D.stride[1] + h * D.stride[2] + (p0 + p) * D.stride[3];
          y[0][n][e] = fmaf(load_scalar(D, at), to_float(tile_x[i * L::kStrideX + p]), y[0][n][e]);
        }
        gate[n][e] = 0.0f;
        if (exists && z.data != nullptr) {
          const int64_t at = b * z.stride[0] + (start + i) * z.stride[1] + h * z.stride[2] + p0 + p;
          gate[n][e] = to_float(static_cast<const T*>(z.data)[at]);
        }
      }
    }
    __syncthreads();
    multiply<T, 2>(y, Tile<float, true>{scores, kScoreStride}, Tile<T, false>{tile_x, L::kStrideX}, row_y, column_y,
                   row_y + 16);

    T* const out = static_cast<T*>(call.y.data) + ((b * call.length + start) * call.heads + h) * call.head_dim + p0;
#pragma unroll
    for (int n = 0; n < kTilesY; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row_y + accumulator_row(e), p = column_y + 8 * n + accumulator_column(e);
        if (i >= rows || p >= columns_p) continue;
        float value = y[0][n][e];
        if (call.z.data != nullptr) value *= silu(gate[n][e]);
        out[int64_t(i) * call.heads * call.head_dim + p] = from_float<T>(value);
      }
    }
    start += rows;
    write_states_until(start);
  }

  __syncthreads();
  if (call.final_state.data != nullptr) copy_state(static_cast<float*>(call.final_state.data) + state_row, false);
}

template <class T, int kSlice>
const char* launch_slices(const SsdChunkScan& call, void* stream) {
  const int64_t blocks = call.batch * call.heads * ((call.head_dim + kSlice - 1) / kSlice);
  if (blocks > 0x7fffffff) return "ssd_chunk_scan: batch * heads is too large for one launch";
  return ANIMA_LAUNCH((ssd_chunk_scan_kernel<T, kSlice>), dim3(unsigned(blocks)), dim3(kThreads),
                      (Layout<T, kSlice>::kBytes), stream, call,
                      in_vectors(call.x, {call.batch, call.length, call.heads}),
                      in_vectors(call.B, {call.batch, call.length, call.groups}),
                      in_vectors(call.C, {call.batch, call.length, call.groups}));
}

// Slices of 16 rows where 32 would not fit (N above 128) or would be half empty.
template <class T>
const char* launch_type(const SsdChunkScan& call, void* stream) {
  return call.state_dim > 128 || call.head_dim <= 16 ? launch_slices<T, 16>(call, stream)
                                                     : launch_slices<T, 32>(call, stream);
}

}  // namespace

int64_t ssd_chunk_scan_workspace(const SsdChunkScan&) { return 0; }

const char* ssd_chunk_scan(const SsdChunkScan& call, void*, void* stream) {
  if (call.batch == 0) return nullptr;
  switch (call.x.dtype) {
    case DType::kFloat32: return launch_type<float>(call, stream);
    case DType::kFloat16: return launch_type<__half>(call, stream);
    default: return launch_type<__nv_bfloat16>(call, stream);
  }
}

}  // namespace cuda
}  // namespace anima
