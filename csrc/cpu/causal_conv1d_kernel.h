// Depthwise causal convolution: out[b, c, t] = act(bias[c] + Σ_j weight[c, j] x[b, c, t - (W-1) + j]).
//
// Two ways through memory. Where channels are neighbours (unit stride of C), lanes are channels and a task walks tokens
// of a strip of channels. Otherwise lanes are tokens of one channel; with strides of neither kind, one at a time.
// A tap that would reach a token of another sequence finds 0, one that would reach before token 0 an initial state or 0.
#pragma once
#include "chunk_scan.h"

namespace anima {
namespace ANIMA_ISA {
namespace {

constexpr int64_t kMostTaps = 16;
constexpr int64_t kTokens = 256;  // tokens a task

// The taps j of token t that find something, as bits: x of the same sequence, or an initial state. 0: the token is
// padding (a negative number), and its result 0.
static uint32_t live_taps(const CausalConv1d& call, int64_t b, int64_t t) {
  const int64_t width = call.width;
  const uint32_t all = (1u << width) - 1;
  if (!call.seq_idx) return call.initial_states.data || t >= width - 1 ? all : all & ~((1u << (width - 1 - t)) - 1);
  const int32_t* index = call.seq_idx + b * call.length;
  uint32_t live = 0;
  for (int64_t j = 0; j < width && index[t] >= 0; ++j) {
    const int64_t from = t - (width - 1) + j;
    live |= uint32_t(from >= 0 && index[from] == index[t]) << j;
  }
  return live;
}

template <class Io>
struct Conv {
  typedef typename Io::Type T;
  const CausalConv1d& call;

  // x[b, c, t]; t < 0: the initial states.
  const T* at(int64_t b, int64_t c, int64_t t) const {
    const Tensor& x = t < 0 ? call.initial_states : call.x;
    return static_cast<const T*>(x.data) + b * x.stride[0] + c * x.stride[1] +
           (t < 0 ? t + call.width - 1 : t) * x.stride[2];
  }
  T* out_at(int64_t b, int64_t c, int64_t t) const {
    return static_cast<T*>(call.out.data) + b * call.out.stride[0] + c * call.out.stride[1] + t * call.out.stride[2];
  }
  float weight(int64_t c, int64_t j) const {
    return widen(call.weight, c * call.weight.stride[0] + j * call.weight.stride[1]);
  }
  float bias(int64_t c) const { return call.bias.data ? widen(call.bias, c * call.bias.stride[0]) : 0.0f; }
  Vec activate(Vec sum) const { return call.silu ? silu(sum) : sum; }

  // Lanes are channels c0 …, `count` of them, with the strip's weights in registers.
  void channels(int64_t b, int64_t c0, int count, int64_t begin, int64_t end) const {
    const int64_t width = call.width;
    Vec taps[kMostTaps], offset;
    float lanes[kWidth] = {};
    for (int64_t j = 0; j < width; ++j) {
      for (int i = 0; i < count; ++i) lanes[i] = weight(c0 + i, j);
      taps[j] = load(lanes);
    }
    for (int i = 0; i < count; ++i) lanes[i] = bias(c0 + i);
    offset = load(lanes);
    const bool unit_initial = !call.initial_states.data || call.initial_states.stride[1] == 1;
    for (int64_t t = begin; t < end; ++t) {
      const uint32_t live = live_taps(call, b, t);
      Vec sum = offset;
      for (int64_t j = 0; j < width; ++j) {
        if (!(live >> j & 1)) continue;
        const int64_t from = t - (width - 1) + j;
        Vec x;
        if (from < 0 && !unit_initial) {
          for (int i = 0; i < count; ++i) lanes[i] = Io::widen(*at(b, c0 + i, from));
          x = load(lanes);
        } else {
          const T* p = at(b, c0, from);
          x = count == kWidth ? Io::load(p) : load_part<Io>(p, count);
        }
        sum = fma(taps[j], x, sum);
      }
      const Vec result = live ? activate(sum) : set1(0.0f);
      if (count == kWidth) Io::store(out_at(b, c0, t), result);
      else store_part<Io>(out_at(b, c0, t), result, count);
    }
  }

  // Lanes are tokens of channel c, where every tap of all of them lies in x at unit stride; else one by one.
  void tokens(int64_t b, int64_t c, int64_t begin, int64_t end) const {
    const int64_t width = call.width;
    const bool unit = call.x.stride[2] == 1 && call.out.stride[2] == 1 && !call.seq_idx;
    float taps[kMostTaps];
    for (int64_t j = 0; j < width; ++j) taps[j] = weight(c, j);
    const float offset = bias(c);
    for (int64_t t = begin; t < end;) {
      if (unit && t >= width - 1 && t + kWidth <= end) {
        Vec sum = set1(offset);
        for (int64_t j = 0; j < width; ++j) sum = fma(set1(taps[j]), Io::load(at(b, c, t - (width - 1) + j)), sum);
        Io::store(out_at(b, c, t), activate(sum));
        t += kWidth;
        continue;
      }
      const uint32_t live = live_taps(call, b, t);
      float sum = offset;
      for (int64_t j = 0; j < width; ++j)
        if (live >> j & 1) sum += taps[j] * Io::widen(*at(b, c, t - (width - 1) + j));
      store_part<Io>(out_at(b, c, t), live ? activate(set1(sum)) : set1(0.0f), 1);
      ++t;
    }
  }

  // The last W - 1 of (initial states or 0, x).
  void final_states(int64_t b, int64_t c) const {
    const Tensor& to = call.final_states;
    for (int64_t j = 0; j < call.width - 1; ++j) {
      const int64_t t = call.length - (call.width - 1) + j;
      static_cast<T*>(to.data)[b * to.stride[0] + c * to.stride[1] + j * to.stride[2]] =
          t >= 0 || call.initial_states.data ? *at(b, c, t) : T(0);
    }
  }
};

template <class Io>
static void conv_typed(const CausalConv1d& call, int threads) {
  const Conv<Io> conv{call};
  const bool by_channels = call.x.stride[1] == 1 && call.out.stride[1] == 1 && call.channels > 1;
  const int64_t strip = by_channels ? kWidth : 1;
  // A task: some strips that lie side by side, so that whole cache lines and pages are used, and kTokens tokens.
  const int64_t strips_per_task = by_channels ? 512 / kWidth : 8;
  const int64_t strips = (call.channels + strip - 1) / strip;
  const int64_t columns = (strips + strips_per_task - 1) / strips_per_task;
  const int64_t rows = (call.length + kTokens - 1) / kTokens;
  parallel_for(call.batch * rows * columns, threads, [&](int64_t item, int) {
    const int64_t b = item / (rows * columns), begin = item / columns % rows * kTokens;
    const int64_t end = begin + kTokens < call.length ? begin + kTokens : call.length;
    const int64_t first = item % columns * strips_per_task;
    for (int64_t s = first; s < first + strips_per_task && s < strips; ++s) {
      const int64_t left = call.channels - s * strip;
      if (by_channels) conv.channels(b, s * strip, left < kWidth ? int(left) : kWidth, begin, end);
      else conv.tokens(b, s, begin, end);
    }
  });
  if (call.final_states.data)
    for (int64_t b = 0; b < call.batch; ++b)
      for (int64_t c = 0; c < call.channels; ++c) conv.final_states(b, c);
}

// The decoding step of the models: W = 4, one token, a contiguous state of kSize = 3 or 4 tokens. With these strides the
// compiler turns the loops over channels into vector loads and shuffles.
template <class Io, int kSize>
static void update_one_token(const CausalConv1dUpdate& call, int64_t b, int64_t slot, int64_t first, int64_t end) {
  typedef typename Io::Type T;
  const T* const x = static_cast<const T*>(call.x.data) + b * call.x.stride[0];
  const T* const weight = static_cast<const T*>(call.weight.data);
  T* const out = static_cast<T*>(call.out.data) + b * call.out.stride[0];
  T* const state = static_cast<T*>(call.conv_state.data) + slot * call.conv_state.stride[0];
  for (int64_t c0 = first; c0 < end; c0 += kWidth) {
    const T* const taps = weight + 4 * c0;
    T* const past = state + kSize * c0;
    float sums[kWidth], bias[kWidth];
    for (int i = 0; i < kWidth; ++i)
      sums[i] = Io::widen(taps[4 * i]) * Io::widen(past[kSize * i + kSize - 3]) +
                Io::widen(taps[4 * i + 1]) * Io::widen(past[kSize * i + kSize - 2]) +
                Io::widen(taps[4 * i + 2]) * Io::widen(past[kSize * i + kSize - 1]) +
                Io::widen(taps[4 * i + 3]) * Io::widen(x[c0 + i]);
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j + 1 < kSize; ++j) past[kSize * i + j] = past[kSize * i + j + 1];
      past[kSize * i + kSize - 1] = x[c0 + i];
    }
    Vec sum = load(sums);
    if (call.bias.data) {
      for (int i = 0; i < kWidth; ++i) bias[i] = widen(call.bias, (c0 + i) * call.bias.stride[0]);
      sum = sum + load(bias);
    }
    Io::store(out + c0, call.silu ? silu(sum) : sum);
  }
}

// How many of the channels [first, end) update_one_token has served.
template <class Io>
static int64_t serve_one_token(const CausalConv1dUpdate& call, int64_t b, int64_t slot, int64_t first, int64_t end) {
  const int64_t size = call.state_length, served = (end - first) / kWidth * kWidth;
  const auto contiguous = [](const Tensor& x, int64_t axis, int64_t inner) {
    return x.stride[axis] == inner && (inner == 1 || x.stride[axis + 1] == 1);
  };
  const bool fits = call.width == 4 && call.length == 1 && !call.cache_seqlens && slot >= 0 && slot < call.slots &&
                    (size == 3 || size == 4) && call.weight.dtype == call.x.dtype && contiguous(call.weight, 0, 4) &&
                    contiguous(call.conv_state, 1, size) && contiguous(call.x, 1, 1) && contiguous(call.out, 1, 1);
  if (!fits) return 0;
  (size == 3 ? update_one_token<Io, 3> : update_one_token<Io, 4>)(call, b, slot, first, first + served);
  return served;
}

// Channels [first, end) of row b, as many at a time as a vector has lanes.
template <class Io>
static void update_channels(const CausalConv1dUpdate& call, int64_t b, int64_t first, int64_t end) {
  typedef typename Io::Type T;
  const int64_t slot = call.state_indices ? call.state_indices[b] : b, width = call.width, size = call.state_length;
  const bool served = slot >= 0 && slot < call.slots;
  first += serve_one_token<Io>(call, b, slot, first, end);
  const int64_t step = call.conv_state.stride[2], x_step = call.x.stride[2], out_step = call.out.stride[2];
  // Token t, counted from the first of x, has place (start + t) mod size.
  const int64_t start = call.cache_seqlens ? call.cache_seqlens[b] : size;
  const auto place = [=](int64_t t) { return ((start + t) % size + size) % size * step; };
  int64_t past[kMostTaps];  // where the W - 1 tokens before x are
  for (int64_t j = 0; j < width - 1; ++j) past[j] = place(j - (width - 1));

  for (int64_t c0 = first; c0 < end; c0 += kWidth) {
    const int count = end - c0 < kWidth ? int(end - c0) : kWidth;
    const auto row = [=](const Tensor& x, int64_t at) {
      return static_cast<T*>(x.data) + at * x.stride[0] + c0 * x.stride[1];
    };
    const T* const x = row(call.x, b);
    T* const out = row(call.out, b);
    T* const state = row(call.conv_state, served ? slot : 0);
    const int64_t x_channel = call.x.stride[1], out_channel = call.out.stride[1], channel = call.conv_state.stride[1];
    float lanes[kWidth] = {}, taps[kMostTaps][kWidth] = {};
    for (int i = 0; i < count; ++i) {
      for (int64_t j = 0; j < width; ++j)
        taps[j][i] = widen(call.weight, (c0 + i) * call.weight.stride[0] + j * call.weight.stride[1]);
      lanes[i] = call.bias.data ? widen(call.bias, (c0 + i) * call.bias.stride[0]) : 0.0f;
    }
    const Vec offset = load(lanes);
    for (int64_t t = 0; t < call.length; ++t) {
      Vec sum = offset;
      for (int64_t j = 0; served && j < width; ++j) {
        const int64_t from = t - (width - 1) + j;
        for (int i = 0; i < count; ++i)
          lanes[i] = Io::widen(from < 0 ? state[i * channel + past[from + width - 1]] : x[i * x_channel + from * x_step]);
        sum = fma(load(taps[j]), load(lanes), sum);
      }
      if (call.silu) sum = silu(sum);
      store(lanes, served ? sum : set1(0.0f));
      for (int i = 0; i < count; ++i) out[i * out_channel + t * out_step] = Io::narrow(lanes[i]);
    }
    for (int i = 0; served && i < count; ++i) {
      T* const to = state + i * channel;
      const T* const from = x + i * x_channel;
      if (call.cache_seqlens) {
        for (int64_t t = 0; t < call.length; ++t) to[place(t)] = from[t * x_step];
      } else {
        for (int64_t j = 0; j < size; ++j) {
          const int64_t source = j + call.length;  // of (state, x)
          to[j * step] = source < size ? to[source * step] : from[(source - size) * x_step];
        }
      }
    }
  }
}

}  // namespace

void causal_conv1d(const CausalConv1d& call, int threads) {
  switch (call.x.dtype) {
    case DType::kFloat32: return conv_typed<Float>(call, threads);
    case DType::kFloat16: return conv_typed<Half>(call, threads);
    case DType::kBFloat16: return conv_typed<BFloat16>(call, threads);
  }
}

void causal_conv1d_update(const CausalConv1dUpdate& call, int threads) {
  const int64_t strip = 1024, strips = (call.channels + strip - 1) / strip;
  parallel_for(call.batch * strips, threads, [&](int64_t item, int) {
    const int64_t b = item / strips, first = item % strips * strip;
    const int64_t end = first + strip < call.channels ? first + strip : call.channels;
    switch (call.x.dtype) {
      case DType::kFloat32: return update_channels<Float>(call, b, first, end);
      case DType::kFloat16: return update_channels<Half>(call, b, first, end);
      case DType::kBFloat16: return update_channels<BFloat16>(call, b, first, end);
    }
  });
}

}  // namespace ANIMA_ISA
}  // namespace anima
