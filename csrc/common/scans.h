// The calls of the recurrent ops, the same for csrc/cpu and csrc/cuda. The Python side has checked every shape, type
// and device and has allocated every output; dimensions are named as in the ops' docstrings.
//
// float tensors named "own type" have a DType of their own; all others have the type of x (of q). A data pointer of
// null means "not given". Any size of batch or length may be 0.
#pragma once
#include "tensor.h"

namespace anima {

// Mamba2's recurrence. For each batch row b and head h, with group h / (heads / groups) of B and C:
//   dt_t = clamp(softplus?(dt_t + dt_bias), dt_min, dt_max)
//   S_t  = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        S [P, N], fp32
//   y_t  = S_t C_t + D_t x_t,  then · silu(z_t) if z is given
// S starts from initial_state, or 0. seq_idx: S is set to 0 before every t at which seq_idx[t] != seq_idx[t - 1],
// where seq_idx[-1] counts as 0 (the initial state belongs to sequence 0, as in mamba-ssm).
struct SsdChunkScan {
  Tensor x;              // [B, L, H, P], unit last stride
  Tensor dt;             // [B, L, H], own type
  Tensor A;              // [H], fp32
  Tensor B, C;           // [B, L, G, N], unit last stride
  Tensor D;              // [B, L, H, P] or null, own type; strides of 0 say which of (H,), (H, P), (B, L, H) was given
  Tensor z;              // [B, L, H, P] or null, unit last stride
  Tensor dt_bias;        // [H] or null, fp32
  Tensor initial_state;  // [B, H, P, N] or null, fp32 contiguous
  Tensor y;              // [B, L, H, P], contiguous; written
  Tensor final_state;    // [B, H, P, N] or null, fp32 contiguous; written: S after the last token
  const int32_t* seq_idx;     // [B, L] contiguous, or null
  const int32_t* cu_seqlens;  // [sequences + 1] or null: where varlen_states are taken; batch is 1
  Tensor varlen_states;       // [sequences, H, P, N] or null, fp32 contiguous; written: S after token cu_seqlens[i+1]-1,
                              // 0 for an empty sequence
  int64_t batch, length, heads, head_dim, groups, state_dim, sequences;
  float dt_min, dt_max;
  bool dt_softplus;
};

// One token of the same, for decoding; `state` is updated in place.
//   dt_p = softplus?(dt_p + dt_bias_p);  state_pn = exp(dt_p A_pn) state_pn + dt_p x_p B_n
//   out_p = Σ_n state_pn C_n + D_p x_p,  then · silu(z_p)
struct SsdStateUpdate {
  Tensor state;                  // [slots, H, P, N], own type, any strides
  Tensor x;                      // [B, H, P]
  Tensor dt;                     // [B, H, P], own type
  Tensor A;                      // [H, P, N], fp32; strides of 0 for an A of one number a head
  Tensor B, C;                   // [B, G, N]
  Tensor D;                      // [H, P] or null, own type
  Tensor z;                      // [B, H, P] or null
  Tensor dt_bias;                // [H, P] or null, own type
  Tensor out;                    // [B, H, P], contiguous; written
  const int32_t* state_indices;  // [B] or null: the slot of each row; null: slot b. Rows with a slot outside
                                 // [0, slots) leave every state alone and give 0
  int64_t slots, batch, heads, head_dim, groups, state_dim;
  bool dt_softplus;
};

// The gated delta rule. For each sequence and value head h, with key head h / (value_heads / key_heads):
//   q_t, k_t <- q_t / sqrt(|q_t|^2 + 1e-6), same for k, if l2norm;  q_t <- scale q_t
//   S = exp(g_t) S;  d = beta_t (v_t - S^T k_t);  S = S + k_t d^T;  o_t = S^T q_t        S [K, V], fp32
// Sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1]) of batch row 0, or without cu_seqlens batch row i.
// gated_delta_step takes the same call and goes token by token.
struct GatedDeltaRule {
  Tensor q, k;           // [B, L, Hk, K], unit last stride
  Tensor v;              // [B, L, Hv, V], unit last stride
  Tensor g, beta;        // [B, L, Hv], own types
  Tensor initial_state;  // [sequences, Hv, K, V] or null, fp32 contiguous
  Tensor o;              // [B, L, Hv, V], contiguous; written
  Tensor final_state;    // [sequences, Hv, K, V] or null, fp32 contiguous; written
  const int32_t* cu_seqlens;  // [sequences + 1] or null
  int64_t batch, length, key_heads, value_heads, key_dim, value_dim, sequences;
  float scale;
  bool l2norm;
};

// Depthwise causal convolution over tokens, weight[:, W-1] on the token itself:
//   out[b, c, t] = act(bias[c] + Σ_j weight[c, j] x[b, c, t - (W-1) + j])
// with initial_states before token 0, or 0. seq_idx: tokens with another number than t's count as 0, wherever they lie; a
// negative number (padding) gives 0.
struct CausalConv1d {
  Tensor x;                // [B, C, T]
  Tensor weight;           // [C, W], own type
  Tensor bias;             // [C] or null, own type
  Tensor initial_states;   // [B, C, W-1] or null
  Tensor out;              // [B, C, T], x's dimension order; written
  Tensor final_states;     // [B, C, W-1] or null; written: the last W-1 of (initial_states, x)
  const int32_t* seq_idx;  // [B, T] contiguous, or null
  int64_t batch, channels, length, width;
  bool silu;
};

// Decoding: appends the `length` tokens of x to conv_state and convolves.
//   cache_seqlens null: conv_state holds the last S tokens, oldest first, and is shifted.
//   else it is a ring: token t of row b goes to position (cache_seqlens[b] + t) mod S.
struct CausalConv1dUpdate {
  Tensor x;                     // [B, C, T]
  Tensor conv_state;            // [slots, C, S], S >= W-1; updated
  Tensor weight;                // [C, W], own type
  Tensor bias;                  // [C] or null, own type
  Tensor out;                   // [B, C, T]; written
  const int32_t* cache_seqlens; // [B] or null
  const int32_t* state_indices; // [B] or null; rows with a slot outside [0, slots) give 0
  int64_t slots, batch, channels, length, width, state_length;
  bool silu;
};

}  // namespace anima
