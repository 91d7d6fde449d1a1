// The chunked gated delta rule in one kernel; the call is described in ../common/scans.h.
//
// A block owns kSlice columns of one value head's state, S^T [kSlice, K], in shared memory, and walks the tokens of one
// sequence in chunks of 64. With G_i = g_0 + ... + g_i inside the chunk, S the state before it, and k, q normalised:
//   T_ij = beta_i (k_i · k_j) exp(G_i - G_j)  for j < i, else 0
//   (I + T) d = u,   u_i = beta_i (v_i - exp(G_i) S^T k_i)          unit triangular, solved by substitution
//   o_i  = exp(G_i) S^T q_i + Σ_{j<=i} (q_i · k_j) exp(G_i - G_j) d_j
//   S    <- exp(G_last) S + Σ_j exp(G_last - G_j) k_j d_j^T
// Solving for d with the state's part already in u takes one right-hand side of kSlice columns, not V + K.
//
// K is contracted in blocks of 64 as in ssd_chunk_scan.cu; the solve needs all of them before the state can change, so
// k is read a second time (from L2) for the last line. l2norm is not applied to the tiles: the norms, found from the
// rows as they pass, scale the products. T takes the place of k and the decayed q · k that of q.
//
// The solve: a column of d belongs to 256 / kSlice neighbouring lanes, each of which keeps every (256 / kSlice)-th row
// in registers; 64 dependent steps of a shuffle and a multiply-add, no barrier.
//
// Roofline (rates as in ssd_chunk_scan.cu). A call needs, per token and value head, 3 K V multiply-adds for k S, q S
// and the state, chunk V for the outputs and the solve, and chunk K for the products of rows; from DRAM q, k, v, o, g
// and beta once. At B 1, L 1024, 16 key and 32 value heads, K = V 128 (Qwen3.5-4B), fp32: 50 MB, 4.3 GFLOP; floor on
// RTX 4090 52 us, on H100 26 us. Beyond it: 1.6 GFLOP, the rows' products of the other three slices, and 185 MB from
// L2, q and k once and k again in every block. Not in the floor: 16 dependent chunks, each with the 64 dependent steps
// of its solve. None of this was measured.
#include "scans.h"
#include "tile.cuh"

namespace anima {
namespace cuda {
namespace {

template <class T, int kSlice>
struct Layout {
  static constexpr int kStrideD = kSlice + Pad<float>::kAcross;
  static constexpr int kTileBytes = kChunk * kTileStride<T> * int(sizeof(T));
  static constexpr int kScoreBytes = kChunk * kScoreStride * int(sizeof(float));
  static constexpr int kRegionBytes = kTileBytes > kScoreBytes ? kTileBytes : kScoreBytes;  // a tile, then scores
  static constexpr int kFixedBytes =
      int(sizeof(Decays)) + 3 * kChunk * int(sizeof(float)) + 2 * kRegionBytes + kChunk * kStrideD * int(sizeof(float));
  static constexpr int kMost = kSlice == 32 ? 128 : 256;  // K
  static constexpr int kStride = kMost + Pad<float>::kAlong;  // of the state: fixed, because addresses cost registers
  static constexpr int kBytes = kFixedBytes + kSlice * kStride * int(sizeof(float));
  static_assert(kBytes <= 64 * 1024, "of sm_75, which has least");
};

// norms[row] (+)= the sums of squares of this thread's vectors of a tile; the threads of a row are neighbours.
template <class T>
__device__ __forceinline__ void add_squares(const Fetch<T, kBlock>& tile, float* norms, bool first) {
  using F = Fetch<T, kBlock>;
#pragma unroll
  for (int i = 0; i < F::kShare; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < F::kVector; ++j) sum = fmaf(tile.value(i, j), tile.value(i, j), sum);
#pragma unroll
    for (int step = 1; step < F::kPerRow; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (F::column() == 0) norms[F::row(i)] = first ? sum : norms[F::row(i)] + sum;
  }
}

template <class T, int kSlice>
__global__ void __launch_bounds__(kThreads, 1)
    gated_delta_rule_kernel(const GatedDeltaRule call, const bool vector_q, const bool vector_k, const bool vector_v) {
  using L = Layout<T, kSlice>;
  ANIMA_SHARED(unsigned char, memory);
  Decays& decays = *reinterpret_cast<Decays*>(memory);
  float* const betas = reinterpret_cast<float*>(memory + sizeof(Decays));
  float* const scale_k = betas + kChunk;  // sums of squares, then what to multiply rows with
  float* const scale_q = scale_k + kChunk;
  unsigned char* const region_k = reinterpret_cast<unsigned char*>(scale_q + kChunk);
  unsigned char* const region_q = region_k + L::kRegionBytes;
  T* const tile_k = reinterpret_cast<T*>(region_k);
  T* const tile_q = reinterpret_cast<T*>(region_q);
  float* const matrix = reinterpret_cast<float*>(region_k);  // T
  float* const scores = reinterpret_cast<float*>(region_q);
  float* const deltas = reinterpret_cast<float*>(region_q + L::kRegionBytes);  // v, then u, then d: [kChunk, kSlice]
  float* const state = deltas + kChunk * L::kStrideD;                          // [kSlice, K], padded with zeros

  const int slices = int((call.value_dim + kSlice - 1) / kSlice);
  const int v0 = int(blockIdx.x % unsigned(slices)) * kSlice;
  const int row = int(blockIdx.x / unsigned(slices));  // of [sequences, value_heads]
  const int h = row % int(call.value_heads), sequence = row / int(call.value_heads);
  const int hk = h / int(call.value_heads / call.key_heads);
  const int key_dim = int(call.key_dim), columns_v = int(call.value_dim) - v0;
  const int b = call.cu_seqlens == nullptr ? sequence : 0;
  const int64_t first = call.cu_seqlens == nullptr ? 0 : call.cu_seqlens[sequence];
  const int64_t end = call.cu_seqlens == nullptr ? call.length : call.cu_seqlens[sequence + 1];

  const T* const q = static_cast<const T*>(call.q.data) + b * call.q.stride[0] + hk * call.q.stride[2];
  const T* const k = static_cast<const T*>(call.k.data) + b * call.k.stride[0] + hk * call.k.stride[2];
  const T* const v = static_cast<const T*>(call.v.data) + b * call.v.stride[0] + h * call.v.stride[2] + v0;
  const int64_t g_row = b * call.g.stride[0] + h * call.g.stride[2];
  const int64_t beta_row = b * call.beta.stride[0] + h * call.beta.stride[2];

  // This warp's rows and columns of the products of rows, of [chunk, kSlice] matrices, and of the state.
  const int warp = int(threadIdx.x) / 32;
  const int row_y = 16 * (warp % 4), column_m = 32 * (warp / 4), column_y = kSlice / 2 * (warp / 4);
  constexpr int kTilesY = kSlice / 16;
  const int row_s = 16 * (warp % kTilesY), column_s = 8 * kTilesY * (warp / kTilesY);
  const bool below_diagonal = column_m <= row_y + 15;

  const int64_t state_row = int64_t(row) * key_dim * call.value_dim;
  for (int i = int(threadIdx.x); i < kSlice * L::kStride; i += kThreads) {
    const int c = i % kSlice, n = i / kSlice;
    const bool given = call.initial_state.data != nullptr && c < columns_v && n < key_dim;
    state[c * L::kStride + n] =
        given ? static_cast<const float*>(call.initial_state.data)[state_row + n * call.value_dim + v0 + c] : 0.0f;
  }

  Fetch<T, kBlock> next_q, next_k;
  Fetch<T, kSlice> next_v;
  float next_g[2] = {0.0f, 0.0f}, next_beta[2] = {0.0f, 0.0f};
  int length = 0;

  const auto fetch_k = [&](int64_t start, int n0) {
    next_k.load(k + start * call.k.stride[1] + n0, call.k.stride[1], length, key_dim - n0, vector_k);
  };
  const auto fetch_q = [&](int64_t start, int n0) {
    next_q.load(q + start * call.q.stride[1] + n0, call.q.stride[1], length, key_dim - n0, vector_q);
  };
  const auto fetch_chunk = [&](int64_t start) {  // which need not exist: then length is 0
    length = end - start < kChunk ? (end > start ? int(end - start) : 0) : kChunk;
    if (length == 0) return;
    next_v.load(v + start * call.v.stride[1], call.v.stride[1], length, columns_v, vector_v);
    fetch_q(start, 0);
    fetch_k(start, 0);
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = 2 * lane_index() + i;
        next_g[i] = t < length ? load_scalar(call.g, g_row + (start + t) * call.g.stride[1]) : 0.0f;
        next_beta[i] = t < length ? load_scalar(call.beta, beta_row + (start + t) * call.beta.stride[1]) : 0.0f;
      }
    }
  };

  fetch_chunk(first);
  for (int64_t start = first; length > 0;) {
    const int rows = length;
    float kk[1][4][4] = {}, qk[1][4][4] = {}, ks[1][kTilesY][4] = {}, qs[1][kTilesY][4] = {};

    for (int n0 = 0; n0 < key_dim; n0 += kBlock) {
      __syncthreads();
      next_k.store(tile_k, kTileStride<T>);
      next_q.store(tile_q, kTileStride<T>);
      if (call.l2norm) {
        add_squares(next_k, scale_k, n0 == 0);
        add_squares(next_q, scale_q, n0 == 0);
      }
      if (n0 == 0) {
        using F = Fetch<T, kSlice>;
#pragma unroll
        for (int i = 0; i < F::kShare; ++i) {
#pragma unroll
          for (int j = 0; j < F::kVector; ++j) {
            if (F::has(i)) deltas[F::row(i) * L::kStrideD + F::column() + j] = next_v.value(i, j);
          }
        }
        if (warp == 0) {
          decays.set(double(next_g[0]), double(next_g[1]));
#pragma unroll
          for (int i = 0; i < 2; ++i) betas[2 * lane_index() + i] = next_beta[i];
        }
      }
      __syncthreads();
      if (n0 + kBlock < key_dim) {
        fetch_k(start, n0 + kBlock);
        fetch_q(start, n0 + kBlock);
      } else {
        fetch_k(start, 0);
      }

      const int depth = key_dim - n0 < kBlock ? (key_dim - n0 + 15) / 16 * 16 : kBlock;
      const Tile<T, true> of_k{tile_k, kTileStride<T>}, of_q{tile_q, kTileStride<T>};
      const Tile<float, true> of_state{state + n0, L::kStride};
      if (below_diagonal) {
        multiply<T, 3>(kk, of_k, of_k, row_y, column_m, depth);
        multiply<T, 2>(qk, of_q, of_k, row_y, column_m, depth);
      }
      multiply<T, 3>(ks, of_k, of_state, row_y, column_y, depth);
      multiply<T, 2>(qs, of_q, of_state, row_y, column_y, depth);
    }

    if (threadIdx.x < kChunk) {
      const int i = int(threadIdx.x);
      scale_k[i] = call.l2norm ? 1.0f / sqrtf(scale_k[i] + 1e-6f) : 1.0f;
      scale_q[i] = call.scale * (call.l2norm ? 1.0f / sqrtf(scale_q[i] + 1e-6f) : 1.0f);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row_y + accumulator_row(e), j = column_m + 8 * n + accumulator_column(e);
        const float decay = j <= i ? decays.between(i, j) * scale_k[j] : 0.0f;
        matrix[i * kScoreStride + j] = j < i ? kk[0][n][e] * (decay * scale_k[i] * betas[i]) : 0.0f;
        scores[i * kScoreStride + j] = j <= i ? qk[0][n][e] * (decay * scale_q[i]) : 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < kTilesY; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row_y + accumulator_row(e), c = column_y + 8 * n + accumulator_column(e);
        float& u = deltas[i * L::kStrideD + c];
        u = betas[i] * (u - decays.from_start[i] * scale_k[i] * ks[0][n][e]);
        qs[0][n][e] *= decays.from_start[i] * scale_q[i];
      }
    }
    __syncthreads();

    {
      constexpr int kLanes = kThreads / kSlice, kRows = kChunk / kLanes;
      const int column = int(threadIdx.x) / kLanes, part = int(threadIdx.x) % kLanes;
      float d[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) d[r] = deltas[(r * kLanes + part) * L::kStrideD + column];
#pragma unroll
      for (int from = 0; from < kRows; ++from) {  // the rows of block `from` are final one after the other
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const float known = __shfl_sync(~0u, d[from], j, kLanes);
#pragma unroll
          for (int r = from; r < kRows; ++r) {  // T is 0 on and above the diagonal
            d[r] = fmaf(-matrix[(r * kLanes + part) * kScoreStride + from * kLanes + j], known, d[r]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) deltas[(r * kLanes + part) * L::kStrideD + column] = d[r];
    }
    if (threadIdx.x < kChunk) decays.to_end[threadIdx.x] *= scale_k[threadIdx.x];
    __syncthreads();

    const Tile<float, false> of_d{deltas, L::kStrideD};
    multiply<T, 2>(qs, Tile<float, true>{scores, kScoreStride}, of_d, row_y, column_y, row_y + 16);
    T* const out =
        static_cast<T*>(call.o.data) + ((b * call.length + start) * call.value_heads + h) * call.value_dim + v0;
#pragma unroll
    for (int n = 0; n < kTilesY; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row_y + accumulator_row(e), c = column_y + 8 * n + accumulator_column(e);
        if (i < rows && c < columns_v) {
          out[int64_t(i) * call.value_heads * call.value_dim + c] = from_float<T>(qs[0][n][e]);
        }
      }
    }

    for (int n0 = 0; n0 < key_dim; n0 += kBlock) {
      if (n0 > 0) __syncthreads();
      next_k.store(tile_k, kTileStride<T>);
      __syncthreads();
      if (n0 + kBlock < key_dim) {
        fetch_k(start, n0 + kBlock);
      } else {
        fetch_chunk(start + rows);
      }
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
      multiply<T, 3>(s, ScaledTile<float>{deltas, decays.to_end, L::kStrideD}, Tile<T, false>{tile_k, kTileStride<T>},
                     row_s, column_s, kChunk);
#pragma unroll
      for (int n = 0; n < kTilesY; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          corner[accumulator_row(e) * L::kStride + 8 * n + accumulator_column(e)] = s[0][n][e];
        }
      }
    }
    start += rows;
  }

  __syncthreads();
  if (call.final_state.data == nullptr) return;
  float* const destination = static_cast<float*>(call.final_state.data) + state_row;
  for (int i = int(threadIdx.x); i < kSlice * key_dim; i += kThreads) {
    const int c = i % kSlice, n = i / kSlice;
    if (c < columns_v) destination[n * call.value_dim + v0 + c] = state[c * L::kStride + n];
  }
}

template <class T, int kSlice>
const char* launch_slices(const GatedDeltaRule& call, void* stream) {
  const int64_t blocks = call.sequences * call.value_heads * ((call.value_dim + kSlice - 1) / kSlice);
  if (blocks > 0x7fffffff) return "gated_delta_rule: sequences * heads is too large for one launch";
  return ANIMA_LAUNCH((gated_delta_rule_kernel<T, kSlice>), dim3(unsigned(blocks)), dim3(kThreads),
                      (Layout<T, kSlice>::kBytes), stream, call,
                      in_vectors(call.q, {call.batch, call.length, call.key_heads}),
                      in_vectors(call.k, {call.batch, call.length, call.key_heads}),
                      in_vectors(call.v, {call.batch, call.length, call.value_heads}));
}

// Slices of 16 columns where 32 would not fit (K above 128) or would be half empty.
template <class T>
const char* launch_type(const GatedDeltaRule& call, void* stream) {
  return call.key_dim > 128 || call.value_dim <= 16 ? launch_slices<T, 16>(call, stream)
                                                    : launch_slices<T, 32>(call, stream);
}

}  // namespace

int64_t gated_delta_rule_workspace(const GatedDeltaRule&) { return 0; }

const char* gated_delta_rule(const GatedDeltaRule& call, void*, void* stream) {
  if (call.sequences == 0) return nullptr;
  switch (call.q.dtype) {
    case DType::kFloat32: return launch_type<float>(call, stream);
    case DType::kFloat16: return launch_type<__half>(call, stream);
    default: return launch_type<__nv_bfloat16>(call, stream);
  }
}

}  // namespace cuda
}  // namespace anima
