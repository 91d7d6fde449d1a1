// The gated delta rule token by token, for decoding: bound by reading and writing the state once a token.
//
//   d = beta (v - a S^T k),  o = a S^T q + (q·k) d,  S <- a S + k d^T,      a = e^g
//
// o is formed from the state before the token, so that one pass over a panel of columns gives both products and a second
// one, from the cache, writes. The first token reads the caller's initial state and no copy of it.
#pragma once
#include <cmath>

#include "gated_delta_rule_kernel.h"

namespace anima {
namespace ANIMA_ISA {
namespace {

template <class Io>
struct DeltaStep {
  typedef typename Io::Type T;
  const GatedDeltaRule& call;
  const float* q;
  const float* k;

  // kVectors vectors of columns from `column` on, `count` values in the last; from, to: null if 0, if not wanted.
  template <int kVectors>
  ANIMA_INLINE void panel(int64_t column, int count, float a, float qk, float beta, const T* v, const float* from, float* to,
                          T* o) const {
    const int64_t ld = call.value_dim;
    const auto get = [count](const float* p, int j) {
      return j + 1 < kVectors || count == kWidth ? load(p + j * kWidth) : load_part<Float>(p + j * kWidth, count);
    };
    Vec along_k[kVectors], along_q[kVectors];
    for (int j = 0; j < kVectors; ++j) along_k[j] = along_q[j] = set1(0.0f);
    for (int64_t i = 0; from && i < call.key_dim; ++i) {
      const Vec ki = set1(k[i]), qi = set1(q[i]);
      ANIMA_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const Vec s = get(from + i * ld + column, j);
        along_k[j] = fma(s, ki, along_k[j]);
        along_q[j] = fma(s, qi, along_q[j]);
      }
    }
    Vec d[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      const bool whole = j + 1 < kVectors || count == kWidth;
      const T* vj = v + column + j * kWidth;
      T* oj = o + column + j * kWidth;
      d[j] = ((whole ? Io::load(vj) : load_part<Io>(vj, count)) - set1(a) * along_k[j]) * set1(beta);
      const Vec out = fma(set1(a), along_q[j], set1(qk) * d[j]);
      if (whole) Io::store(oj, out);
      else store_part<Io>(oj, out, count);
    }
    for (int64_t i = 0; to && i < call.key_dim; ++i) {
      const Vec ki = set1(k[i]);
      ANIMA_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const Vec grown = from ? get(from + i * ld + column, j) * set1(a) : set1(0.0f);
        const Vec s = fma(ki, d[j], grown);
        float* p = to + i * ld + column + j * kWidth;
        if (j + 1 < kVectors || count == kWidth) store(p, s);
        else store_part<Float>(p, s, count);
      }
    }
  }

  void token(float a, float qk, float beta, const T* v, const float* from, float* to, T* o) const {
    constexpr int kPanelVectors = 4;
    int64_t column = 0;
    for (; column + kPanelVectors * kWidth <= call.value_dim; column += kPanelVectors * kWidth)
      panel<kPanelVectors>(column, kWidth, a, qk, beta, v, from, to, o);
    for (; column < call.value_dim; column += kWidth) {
      const int64_t left = call.value_dim - column;
      panel<1>(column, left < kWidth ? int(left) : kWidth, a, qk, beta, v, from, to, o);
    }
  }
};

template <class Io>
static void step_typed(const GatedDeltaRule& call, float* workspace, int threads) {
  typedef typename Io::Type T;
  const int64_t size = call.key_dim * call.value_dim, floats = step_floats(call);
  parallel_for(call.sequences * call.value_heads, threads, [&](int64_t item, int thread) {
    const int64_t h = item % call.value_heads;
    const Sequence sequence(call, item / call.value_heads);
    float* const q = workspace + thread * floats;
    float* const k = q + kMostDim;
    float* const result = call.final_state.data ? static_cast<float*>(call.final_state.data) + item * size : nullptr;
    float* const state = result ? result : k + kMostDim;
    const float* from = call.initial_state.data ? static_cast<const float*>(call.initial_state.data) + item * size : nullptr;
    const auto row = [&](const Tensor& x, int64_t t, int64_t head) {
      return static_cast<T*>(x.data) + sequence.b * x.stride[0] + t * x.stride[1] + head * x.stride[2];
    };
    const auto number = [&](const Tensor& x, int64_t t) {
      return widen(x, sequence.b * x.stride[0] + t * x.stride[1] + h * x.stride[2]);
    };
    const int64_t key_head = h / (call.value_heads / call.key_heads);
    for (int64_t t = sequence.begin; t < sequence.end; ++t) {
      pack_normalised<Io>(row(call.q, t, key_head), call.key_dim, 0, call.l2norm, call.scale, q);
      pack_normalised<Io>(row(call.k, t, key_head), call.key_dim, 0, call.l2norm, 1.0f, k);
      Vec product = set1(0.0f);
      for (int64_t j = 0; j < call.key_dim; j += kWidth) product = fma(load(q + j), load(k + j), product);
      const DeltaStep<Io> step{call, q, k};
      step.token(expf(number(call.g, t)), sum_lanes(product), number(call.beta, t), row(call.v, t, h), from,
                 t + 1 < sequence.end || result ? state : nullptr, row(call.o, t, h));
      from = state;
    }
    if (result && sequence.begin >= sequence.end)
      for (int64_t i = 0; i < size; ++i) result[i] = from ? from[i] : 0.0f;
  });
}

}  // namespace

void gated_delta_step(const GatedDeltaRule& call, float* workspace, int threads) {
  switch (call.q.dtype) {
    case DType::kFloat32: return step_typed<Float>(call, workspace, threads);
    case DType::kFloat16: return step_typed<Half>(call, workspace, threads);
    case DType::kBFloat16: return step_typed<BFloat16>(call, workspace, threads);
  }
}

}  // namespace ANIMA_ISA
}  // namespace anima
