// Drives the recurrent ops of csrc/cpu on random calls, for sanitizers, and compares with the formulas of
// csrc/common/scans.h in double. Every buffer is exactly as large as the call may touch, so that AddressSanitizer sees
// one element too far; results start as NaN. Exit code 1 and one line for each call whose error is too large.
// Argument: number of calls.
#include "../../csrc/cpu/scans.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/common/half.h"

using namespace anima;

namespace {

std::mt19937 generator(0);

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
bool chance() { return between(0, 1); }

// What rounding may cost: results, and the step ops' states, may be of 8 bits.
double allowed_for(DType type) { return type == DType::kFloat32 ? 2e-5 : 0.02; }

// Contiguous, of one type; null if not given.
struct Array {
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Array() = default;
  // Values from `low` to `high`; NaN if they are equal.
  Array(DType type, std::vector<int64_t> sizes, float low, float high) : dtype(type), shape(sizes) {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    if (type == DType::kFloat32) floats.resize(count, NAN);
    else halves.resize(count, 0x7fff);
    std::uniform_real_distribution<float> random(low, high);
    for (int64_t i = 0; low < high && i < count; ++i) {
      const float x = random(generator);
      if (type == DType::kFloat32) floats[i] = x;
      else halves[i] = type == DType::kFloat16 ? f16_from_float(x) : bf16_from_float(x);
    }
  }
  bool given() const { return !shape.empty(); }
  Tensor tensor() {
    Tensor x{};
    if (!given()) return x;
    x.dtype = dtype;
    x.data = dtype == DType::kFloat32 ? static_cast<void*>(floats.data()) : halves.data();
    // An array of no elements is given all the same: its address is never read.
    static float nowhere;
    if (!x.data) x.data = &nowhere;
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) x.stride[i] = stride;
    return x;
  }
  double at(std::vector<int64_t> index) const {
    int64_t i = 0;
    for (size_t d = 0; d < shape.size(); ++d) i = i * shape[d] + index[d];
    if (dtype == DType::kFloat32) return floats[i];
    return dtype == DType::kFloat16 ? float_from_f16(halves[i]) : float_from_bf16(halves[i]);
  }
};

double worst, allowed;
void compare(double got, double expected) {
  const double error = std::abs(got - expected) / std::max(1.0, std::abs(expected));
  worst = std::isnan(error) ? INFINITY : std::max(worst, error);
}

std::vector<char> workspace_memory;
void* workspace(int64_t bytes) {
  workspace_memory.assign(size_t(bytes) + 64, char(0xff));  // NaN
  void* p = workspace_memory.data();
  size_t space = workspace_memory.size();
  return std::align(64, size_t(bytes), p, space);
}

int32_t* data(std::vector<int32_t>& x) { return x.empty() ? nullptr : x.data(); }

std::vector<int32_t> random_ends(int64_t length) {
  std::vector<int32_t> ends{0, int32_t(length)};
  for (int i = between(0, 3); i > 0; --i) ends.push_back(between(0, int(length)));
  std::sort(ends.begin(), ends.end());
  return ends;
}

double log1pexp(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
double act(double x, bool silu) { return silu ? x / (1 + std::exp(-x)) : x; }

void ssd(int threads, Isa isa) {
  SsdChunkScan c{};
  const DType type = DType(between(0, 2));
  allowed = allowed_for(type);
  c.batch = between(0, 2), c.length = between(0, 150), c.groups = between(1, 3);
  c.heads = c.groups * between(1, 10), c.head_dim = between(1, 70), c.state_dim = between(1, 40);
  c.dt_min = chance() ? 0.0f : 0.01f, c.dt_max = chance() ? INFINITY : 0.5f, c.dt_softplus = chance();
  const int64_t b_ = c.batch, l = c.length, h_ = c.heads, p_ = c.head_dim, n_ = c.state_dim;
  Array x(type, {b_, l, h_, p_}, -1, 1), dt(DType::kFloat32, {b_, l, h_}, -2, 1), A(DType::kFloat32, {h_}, -4, 0);
  Array B(type, {b_, l, c.groups, n_}, -1, 1), C(type, {b_, l, c.groups, n_}, -1, 1), D, z, bias, initial;
  if (chance()) D = Array(DType::kFloat32, {b_, l, h_, p_}, -1, 1);
  if (chance()) z = Array(type, {b_, l, h_, p_}, -3, 3);
  if (chance()) bias = Array(DType::kFloat32, {h_}, -1, 1);
  if (chance()) initial = Array(DType::kFloat32, {b_, h_, p_, n_}, -1, 1);
  Array y(type, {b_, l, h_, p_}, 0, 0), last(DType::kFloat32, {b_, h_, p_, n_}, 0, 0), varlen;
  std::vector<int32_t> seq_idx, ends;
  if (chance())
    for (int64_t i = 0, id = between(0, 1); i < b_ * l; ++i) seq_idx.push_back(int32_t(id += between(0, 9) == 0));
  if (b_ == 1 && chance()) {
    ends = random_ends(l);
    c.sequences = int64_t(ends.size()) - 1;
    varlen = Array(DType::kFloat32, {c.sequences, h_, p_, n_}, 0, 0);
  }
  c.x = x.tensor(), c.dt = dt.tensor(), c.A = A.tensor(), c.B = B.tensor(), c.C = C.tensor(), c.D = D.tensor();
  c.z = z.tensor(), c.dt_bias = bias.tensor(), c.initial_state = initial.tensor(), c.y = y.tensor();
  if (chance()) c.final_state = last.tensor();
  c.varlen_states = varlen.tensor(), c.seq_idx = data(seq_idx), c.cu_seqlens = data(ends);
  ssd_chunk_scan(c, workspace(ssd_chunk_scan_workspace(c, threads)), threads, isa);

  std::vector<double> S(n_);
  for (int64_t b = 0; b < b_; ++b)
    for (int64_t h = 0; h < h_; ++h)
      for (int64_t p = 0; p < p_; ++p) {
        for (int64_t n = 0; n < n_; ++n) S[n] = initial.given() ? initial.at({b, h, p, n}) : 0;
        for (int64_t t = 0; t < l; ++t) {
          const auto index = [&](int64_t i) { return seq_idx.empty() || i < 0 ? 0 : seq_idx[b * l + i]; };
          if (index(t) != index(t - 1)) std::fill(S.begin(), S.end(), 0);
          double step = dt.at({b, t, h}) + (bias.given() ? bias.at({h}) : 0);
          step = std::min(std::max(c.dt_softplus ? log1pexp(step) : step, double(c.dt_min)), double(c.dt_max));
          const int64_t g = h / (h_ / c.groups);
          double out = D.given() ? D.at({b, t, h, p}) * x.at({b, t, h, p}) : 0;
          for (int64_t n = 0; n < n_; ++n) {
            S[n] = S[n] * std::exp(step * A.at({h})) + step * x.at({b, t, h, p}) * B.at({b, t, g, n});
            out += S[n] * C.at({b, t, g, n});
          }
          compare(y.at({b, t, h, p}), z.given() ? out * act(z.at({b, t, h, p}), true) : out);
          for (int64_t s = 0; s < c.sequences; ++s)
            for (int64_t n = 0; n < n_ && ends[s + 1] == t + 1 && ends[s] < ends[s + 1]; ++n)
              compare(varlen.at({s, h, p, n}), S[n]);
        }
        for (int64_t n = 0; n < n_ && c.final_state.data; ++n) compare(last.at({b, h, p, n}), S[n]);
        for (int64_t s = 0; s < c.sequences; ++s)
          for (int64_t n = 0; n < n_ && ends[s] == ends[s + 1]; ++n) compare(varlen.at({s, h, p, n}), 0);
      }
}

void delta(int threads, Isa isa) {
  GatedDeltaRule c{};
  const DType type = DType(between(0, 2));
  allowed = allowed_for(type);
  c.batch = between(0, 2), c.length = between(0, 150), c.key_heads = between(1, 2);
  c.value_heads = c.key_heads * between(1, 3), c.key_dim = between(1, 40), c.value_dim = between(1, 70);
  c.scale = 0.3f, c.l2norm = true;
  std::vector<int32_t> ends;
  if (c.batch == 1 && chance()) ends = random_ends(c.length);
  c.sequences = ends.empty() ? c.batch : int64_t(ends.size()) - 1;
  const int64_t b_ = c.batch, l = c.length, hk = c.key_heads, hv = c.value_heads, k_ = c.key_dim, v_ = c.value_dim;
  Array q(type, {b_, l, hk, k_}, -1, 1), k(type, {b_, l, hk, k_}, -1, 1), v(type, {b_, l, hv, v_}, -1, 1);
  Array g(DType::kFloat32, {b_, l, hv}, -2, 0), beta(DType::kFloat32, {b_, l, hv}, 0, 1), initial;
  if (chance()) initial = Array(DType::kFloat32, {c.sequences, hv, k_, v_}, -1, 1);
  Array o(type, {b_, l, hv, v_}, 0, 0), last(DType::kFloat32, {c.sequences, hv, k_, v_}, 0, 0);
  c.q = q.tensor(), c.k = k.tensor(), c.v = v.tensor(), c.g = g.tensor(), c.beta = beta.tensor();
  c.initial_state = initial.tensor(), c.o = o.tensor(), c.cu_seqlens = data(ends);
  if (chance()) c.final_state = last.tensor();
  if (chance()) gated_delta_step(c, workspace(gated_delta_step_workspace(c, threads)), threads, isa);
  else gated_delta_rule(c, workspace(gated_delta_rule_workspace(c, threads)), threads, isa);

  std::vector<double> S(k_);
  const auto norm = [&](const Array& x, int64_t b, int64_t t, int64_t h) {
    double sum = 1e-6;
    for (int64_t i = 0; i < k_; ++i) sum += x.at({b, t, h, i}) * x.at({b, t, h, i});
    return 1 / std::sqrt(sum);
  };
  for (int64_t s = 0; s < c.sequences; ++s)
    for (int64_t h = 0; h < hv; ++h)
      for (int64_t j = 0; j < v_; ++j) {
        const int64_t b = ends.empty() ? s : 0, first = ends.empty() ? 0 : ends[s], end = ends.empty() ? l : ends[s + 1];
        for (int64_t i = 0; i < k_; ++i) S[i] = initial.given() ? initial.at({s, h, i, j}) : 0;
        for (int64_t t = first; t < end; ++t) {
          const int64_t key = h / (hv / hk);
          const double nq = norm(q, b, t, key) * c.scale, nk = norm(k, b, t, key), a = std::exp(g.at({b, t, h}));
          double memory = 0, out = 0;
          for (int64_t i = 0; i < k_; ++i) memory += (S[i] *= a) * k.at({b, t, key, i}) * nk;
          const double d = beta.at({b, t, h}) * (v.at({b, t, h, j}) - memory);
          for (int64_t i = 0; i < k_; ++i) out += (S[i] += k.at({b, t, key, i}) * nk * d) * q.at({b, t, key, i}) * nq;
          compare(o.at({b, t, h, j}), out);
        }
        for (int64_t i = 0; i < k_ && c.final_state.data; ++i) compare(last.at({s, h, i, j}), S[i]);
      }
}

void state_update(int threads, Isa isa) {
  SsdStateUpdate c{};
  const DType type = DType(between(0, 2));
  allowed = allowed_for(type);
  c.batch = between(0, 3), c.groups = between(1, 2), c.heads = c.groups * between(1, 3), c.slots = between(1, 4);
  c.head_dim = between(1, 40), c.state_dim = between(1, 40), c.dt_softplus = chance();
  const int64_t b_ = c.batch, h_ = c.heads, p_ = c.head_dim, n_ = c.state_dim;
  Array state(type, {c.slots, h_, p_, n_}, -1, 1), x(type, {b_, h_, p_}, -1, 1), dt(type, {b_, h_, p_}, 0, 1);
  Array A(DType::kFloat32, {h_, p_, n_}, -2, 0), B(type, {b_, c.groups, n_}, -1, 1), C(type, {b_, c.groups, n_}, -1, 1);
  Array out(type, {b_, h_, p_}, 0, 0);
  const Array before = state;
  std::vector<int32_t> slots;
  for (int64_t b = 0; b < b_; ++b) slots.push_back(b < c.slots ? int32_t(b) : -1);
  c.state = state.tensor(), c.x = x.tensor(), c.dt = dt.tensor(), c.A = A.tensor(), c.B = B.tensor(), c.C = C.tensor();
  c.out = out.tensor(), c.state_indices = data(slots);
  ssd_state_update(c, threads, isa);
  for (int64_t b = 0; b < b_; ++b)
    for (int64_t h = 0; h < h_; ++h)
      for (int64_t p = 0; p < p_; ++p) {
        double sum = 0;
        for (int64_t n = 0; n < n_ && slots[b] >= 0; ++n) {
          const double step = c.dt_softplus ? log1pexp(dt.at({b, h, p})) : dt.at({b, h, p});
          const int64_t g = h / (h_ / c.groups);
          const double s = before.at({b, h, p, n}) * std::exp(step * A.at({h, p, n})) + step * x.at({b, h, p}) * B.at({b, g, n});
          compare(state.at({b, h, p, n}), s);
          sum += s * C.at({b, g, n});
        }
        compare(out.at({b, h, p}), sum);
      }
}

void conv(int threads, Isa isa) {
  CausalConv1d c{};
  const DType type = DType(between(0, 2));
  allowed = allowed_for(type);
  c.batch = between(0, 2), c.channels = between(1, 70), c.length = between(0, 300), c.width = between(1, 5), c.silu = chance();
  const bool by_channels = chance();
  const int64_t b_ = c.batch, c_ = c.channels, l = c.length, w_ = c.width;
  // Channels last: the array is [B, T, C] and its strides are swapped.
  const auto sizes = [&] { return by_channels ? std::vector<int64_t>{b_, l, c_} : std::vector<int64_t>{b_, c_, l}; };
  const auto view = [&](Array& a) {
    Tensor x = a.tensor();
    if (by_channels) std::swap(x.stride[1], x.stride[2]);
    return x;
  };
  const auto at = [&](const Array& a, int64_t b, int64_t ch, int64_t t) {
    return by_channels ? a.at({b, t, ch}) : a.at({b, ch, t});
  };
  Array x(type, sizes(), -1, 1), weight(DType::kFloat32, {c_, w_}, -1, 1), bias, initial, out(type, sizes(), 0, 0);
  Array last(type, {b_, c_, w_ - 1}, 0, 0);
  std::vector<int32_t> seq_idx;
  if (chance()) bias = Array(DType::kFloat32, {c_}, -1, 1);
  if (chance()) initial = Array(type, {b_, c_, w_ - 1}, -1, 1);
  else if (chance())
    for (int64_t i = 0, id = 0; i < b_ * l; ++i) seq_idx.push_back(int32_t(id = (id + (between(0, 9) == 0)) % 3));
  c.x = view(x), c.weight = weight.tensor(), c.bias = bias.tensor(), c.initial_states = initial.tensor();
  c.out = view(out), c.seq_idx = data(seq_idx);
  if (chance()) c.final_states = last.tensor();
  causal_conv1d(c, threads, isa);
  const auto input = [&](int64_t b, int64_t ch, int64_t t) {
    if (t >= 0) return at(x, b, ch, t);
    return initial.given() && w_ > 1 ? initial.at({b, ch, t + w_ - 1}) : 0.0;
  };
  for (int64_t b = 0; b < b_; ++b)
    for (int64_t ch = 0; ch < c_; ++ch) {
      for (int64_t t = 0; t < l; ++t) {
        double sum = bias.given() ? bias.at({ch}) : 0;
        for (int64_t j = 0; j < w_; ++j) {
          const int64_t from = t - (w_ - 1) + j;
          const bool same = seq_idx.empty() || (from >= 0 && seq_idx[b * l + from] == seq_idx[b * l + t]);
          if (same) sum += weight.at({ch, j}) * input(b, ch, from);
        }
        compare(at(out, b, ch, t), act(sum, c.silu));
      }
      for (int64_t j = 0; j < w_ - 1 && c.final_states.data; ++j) compare(last.at({b, ch, j}), input(b, ch, l - (w_ - 1) + j));
    }
}

void conv_update(int threads, Isa isa) {
  CausalConv1dUpdate c{};
  c.batch = between(1, 2), c.channels = between(1, 1100), c.length = chance() ? 1 : between(1, 5), c.width = between(1, 4);
  c.state_length = std::max<int64_t>(1, c.width - 1 + between(0, 2)), c.slots = c.batch;
  const int64_t b_ = c.batch, c_ = c.channels, l = c.length, w_ = c.width, s_ = c.state_length;
  const DType type = DType::kFloat32;
  allowed = allowed_for(type);
  Array x(type, {b_, c_, l}, -1, 1), state(type, {b_, c_, s_}, -1, 1), weight(type, {c_, w_}, -1, 1);
  Array out(type, {b_, c_, l}, 0, 0);
  const Array before = state;
  std::vector<int32_t> lengths;
  if (chance()) lengths.assign(size_t(b_), between(0, 20));
  c.x = x.tensor(), c.conv_state = state.tensor(), c.weight = weight.tensor(), c.out = out.tensor();
  c.cache_seqlens = data(lengths);
  causal_conv1d_update(c, threads, isa);
  for (int64_t b = 0; b < b_; ++b)
    for (int64_t ch = 0; ch < c_; ++ch) {
      const int64_t start = lengths.empty() ? s_ : lengths[b];
      const auto past = [&](int64_t position) { return before.at({b, ch, (position % s_ + s_) % s_}); };
      for (int64_t t = 0; t < l; ++t) {
        double sum = 0;
        for (int64_t j = 0; j < w_; ++j) {
          const int64_t from = t - (w_ - 1) + j;
          sum += weight.at({ch, j}) * (from >= 0 ? x.at({b, ch, from}) : past(start + from));
        }
        compare(out.at({b, ch, t}), sum);
      }
      for (int64_t j = 0; j < s_ && lengths.empty(); ++j)
        compare(state.at({b, ch, j}), j + l < s_ ? before.at({b, ch, j + l}) : x.at({b, ch, j + l - s_}));
    }
}

}  // namespace

int main(int count, char** arguments) {
  const int calls = count > 1 ? std::atoi(arguments[1]) : 100;
  int failed = 0;
  for (int i = 0; i < calls; ++i) {
    const Isa isa = Isa(between(0, int(best_isa())));
    const int threads = between(1, 3), op = i % 5;
    worst = 0;
    (op == 0 ? ssd : op == 1 ? delta : op == 2 ? state_update : op == 3 ? conv : conv_update)(threads, isa);
    if (worst > allowed) {
      std::printf("call %d, op %d, isa %s: error %g\n", i, op, isa_name(isa), worst);
      ++failed;
    }
  }
  std::printf(failed ? "%d of %d calls failed\n" : "passed: %d of %d calls\n", failed ? failed : calls, calls);
  return failed ? 1 : 0;
}
