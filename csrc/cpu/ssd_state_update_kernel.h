// One token of Mamba2's recurrence, for decoding: bound by reading and writing the state once.
//
//   state[p, :] <- e^{dt_p A_p} state[p, :] + dt_p x_p B,   out_p = state[p, :]·C + D_p x_p, · silu(z_p)
//
// As many rows p as a vector has lanes at a time: their sums over n are turned into one vector of results.
#pragma once
#include "chunk_scan.h"

namespace anima {
namespace ANIMA_ISA {
namespace {

static void pack_any(const Tensor& x, int64_t offset, int64_t stride, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(x, offset + i * stride);
  for (int64_t i = count; i % kWidth; ++i) to[i] = 0.0f;
}

static void pack_vector(const Tensor& x, int64_t offset, int64_t stride, int64_t count, float* to) {
  if (stride != 1) return pack_any(x, offset, stride, count, to);
  const Vec one = set1(1.0f);
  if (x.dtype == DType::kFloat32) pack_row<Float>(static_cast<const float*>(x.data) + offset, count, 0, one, to);
  else if (x.dtype == DType::kFloat16) pack_row<Half>(static_cast<const uint16_t*>(x.data) + offset, count, 0, one, to);
  else pack_row<BFloat16>(static_cast<const uint16_t*>(x.data) + offset, count, 0, one, to);
}

// Values of [.., H, P] at one (b, h): `p0` on, kWidth of them, 0 past the end.
static Vec gather(const Tensor& x, int64_t offset, int64_t stride, int64_t p0, int count) {
  if (stride == 0) return set1(widen(x, offset));
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = i < count ? widen(x, offset + (p0 + i) * stride) : 0.0f;
  return load(lanes);
}

static void store_any(const Tensor& x, int64_t offset, Vec value, int count) {
  if (x.dtype == DType::kFloat32) store_part<Float>(static_cast<float*>(x.data) + offset, value, count);
  else if (x.dtype == DType::kFloat16) store_part<Half>(static_cast<uint16_t*>(x.data) + offset, value, count);
  else store_part<BFloat16>(static_cast<uint16_t*>(x.data) + offset, value, count);
}

template <class Io>
static void update_head(const SsdStateUpdate& call, int64_t b, int64_t h) {
  typedef typename Io::Type T;
  const int64_t slot = call.state_indices ? call.state_indices[b] : b, out_at = (b * call.heads + h) * call.head_dim;
  const bool served = slot >= 0 && slot < call.slots;
  float key[kMostDim], query[kMostDim];
  const int64_t group = h / (call.heads / call.groups);
  const auto at = [b](const Tensor& x, int64_t i) { return b * x.stride[0] + i * x.stride[1]; };
  pack_vector(call.B, at(call.B, group), call.B.stride[2], call.state_dim, key);
  pack_vector(call.C, at(call.C, group), call.C.stride[2], call.state_dim, query);
  const float* const A = static_cast<const float*>(call.A.data) + h * call.A.stride[0];
  const bool one_decay = call.A.stride[1] == 0 && call.A.stride[2] == 0;
  T* const state = static_cast<T*>(call.state.data) + slot * call.state.stride[0] + h * call.state.stride[1];

  for (int64_t p0 = 0; p0 < call.head_dim; p0 += kWidth) {
    const int rows = call.head_dim - p0 < kWidth ? int(call.head_dim - p0) : kWidth;
    if (!served) {
      store_any(call.out, out_at + p0, set1(0.0f), rows);
      continue;
    }
    const auto values = [&](const Tensor& x, int64_t offset, int64_t stride) { return gather(x, offset, stride, p0, rows); };
    const Vec x = values(call.x, at(call.x, h), call.x.stride[2]);
    Vec dt = values(call.dt, at(call.dt, h), call.dt.stride[2]);
    if (call.dt_bias.data) dt = dt + values(call.dt_bias, h * call.dt_bias.stride[0], call.dt_bias.stride[1]);
    if (call.dt_softplus) dt = softplus(dt);
    float steps[kWidth], inputs[kWidth], decays[kWidth];
    store(steps, dt);
    store(inputs, dt * x);
    if (one_decay) store(decays, exponential(dt * set1(A[0])));
    Vec sums[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      sums[i] = set1(0.0f);
      if (i >= rows) continue;
      T* const row = state + (p0 + i) * call.state.stride[2];
      const Vec input = set1(inputs[i]);
      for (int64_t n = 0; n < call.state_dim; n += kWidth) {
        const int count = call.state_dim - n < kWidth ? int(call.state_dim - n) : kWidth;
        Vec decay = set1(decays[one_decay ? i : 0]);
        if (!one_decay) {
          float lanes[kWidth] = {};
          for (int j = 0; j < count; ++j) lanes[j] = A[(p0 + i) * call.A.stride[1] + (n + j) * call.A.stride[2]];
          decay = exponential(set1(steps[i]) * load(lanes));
        }
        const Vec before = count == kWidth ? Io::load(row + n) : load_part<Io>(row + n, count);
        const Vec after = fma(before, decay, input * load(key + n));
        if (count == kWidth) Io::store(row + n, after);
        else store_part<Io>(row + n, after, count);
        sums[i] = fma(after, load(query + n), sums[i]);
      }
    }
    transpose(sums);
    Vec out = sums[0];
    for (int i = 1; i < kWidth; ++i) out = out + sums[i];
    if (call.D.data) out = fma(values(call.D, h * call.D.stride[0], call.D.stride[1]), x, out);
    if (call.z.data) out = out * silu(values(call.z, at(call.z, h), call.z.stride[2]));
    store_any(call.out, out_at + p0, out, rows);
  }
}

}  // namespace

void ssd_state_update(const SsdStateUpdate& call, int threads) {
  parallel_for(call.batch * call.heads, threads, [&](int64_t item, int) {
    const int64_t b = item / call.heads, h = item % call.heads;
    switch (call.state.dtype) {
      case DType::kFloat32: return update_head<Float>(call, b, h);
      case DType::kFloat16: return update_head<Half>(call, b, h);
      case DType::kBFloat16: return update_head<BFloat16>(call, b, h);
    }
  });
}

}  // namespace ANIMA_ISA
}  // namespace anima
