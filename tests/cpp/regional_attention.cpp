// Drives csrc/cpu regional attention on random calls, for sanitizers, and compares with the formula in double.
// Every buffer is exactly as large as the call may touch, so that AddressSanitizer sees one element too far.
// Exit code 1 and one line for each call whose error is too large. Argument: number of calls.
#include "../../csrc/cpu/regional_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/common/half.h"

using namespace anima;

namespace {

std::mt19937 generator(0);

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// [B, H, N, D] of one type, rows in [B, N, H, D] order.
struct Values {
  DType dtype;
  int64_t heads, rows, dim;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Values(DType type, int64_t batch, int64_t heads_, int64_t rows_, int64_t dim_, bool random)
      : dtype(type), heads(heads_), rows(rows_), dim(dim_) {
    const size_t size = size_t(batch * heads * rows * dim);
    std::normal_distribution<float> normal;
    if (type == DType::kFloat32) floats.resize(size, NAN);
    else halves.resize(size, 0x7fff);  // NaN in both
    for (size_t i = 0; random && i < size; ++i) {
      const float x = normal(generator);
      if (type == DType::kFloat32) floats[i] = x;
      else halves[i] = type == DType::kFloat16 ? f16_from_float(x) : bf16_from_float(x);
    }
  }
  Strided strided() {
    void* data = dtype == DType::kFloat32 ? static_cast<void*>(floats.data()) : halves.data();
    return {data, rows * heads * dim, dim, heads * dim};
  }
  double at(int64_t b, int64_t h, int64_t n, int64_t d) const {
    const size_t i = size_t(((b * rows + n) * heads + h) * dim + d);
    if (dtype == DType::kFloat32) return floats[i];
    return dtype == DType::kFloat16 ? float_from_f16(halves[i]) : float_from_bf16(halves[i]);
  }
};

// Largest |out - formula|, and the same of lse.
double largest_error(const RegionalAttention& c, const Values& q, const Values& k, const Values& v, const Values& out) {
  double worst = 0;
  std::vector<double> sum(c.head_dim);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t n = 0; n < c.queries; ++n) {
        const int64_t plan = c.plan_index[b], kv = h / (c.heads / c.kv_heads);
        std::vector<double> result(c.head_dim, 0.0);
        double l = 0, m = -INFINITY;
        const auto visit = [&](auto&& each) {
          for (int64_t s = 0; s < c.segments_per_plan; ++s) {
            const int64_t* segment = c.segments + 3 * (plan * c.segments_per_plan + s);
            const double bias = c.bias ? c.bias[(plan * c.segments_per_plan + s) * c.queries + n] : 0.0;
            each(segment, bias);
          }
        };
        const auto score = [&](int64_t j) {
          double x = 0;
          for (int64_t d = 0; d < c.head_dim; ++d) x += q.at(b, h, n, d) * k.at(b, kv, j, d);
          return x * c.scale;
        };
        const auto add = [&](const int64_t* segment, double bias) {
          for (int64_t j = segment[0]; j < segment[1]; ++j) {
            const double p = std::exp(score(j) + bias - m);
            l += p;
            for (int64_t d = 0; d < c.head_dim; ++d) sum[d] += p * v.at(b, kv, j, d);
          }
          if (segment[2]) l += double(segment[2]) * std::exp(bias - m);
        };
        std::fill(sum.begin(), sum.end(), 0.0);
        if (c.blend) {
          visit([&](const int64_t* segment, double weight) {
            std::fill(sum.begin(), sum.end(), 0.0);
            l = m = 0;
            add(segment, 0.0);
            for (int64_t d = 0; d < c.head_dim && l > 0; ++d) result[d] += weight * sum[d] / l;
          });
        } else {
          visit([&](const int64_t* segment, double bias) {
            for (int64_t j = segment[0]; j < segment[1]; ++j) m = std::max(m, score(j) + bias);
            if (segment[2]) m = std::max(m, bias);
          });
          visit(add);
          for (int64_t d = 0; d < c.head_dim; ++d) result[d] = sum[d] / l;
          if (c.lse) worst = std::max(worst, std::abs(c.lse[(b * c.heads + h) * c.queries + n] - (m + std::log(l))));
        }
        for (int64_t d = 0; d < c.head_dim; ++d) {
          const double error = std::abs(out.at(b, h, n, d) - result[d]);
          worst = std::isnan(error) ? INFINITY : std::max(worst, error);
        }
      }
  return worst;
}

bool run_one(int number) {
  RegionalAttention c{};
  c.batch = between(1, 2);
  c.kv_heads = between(1, 2);
  c.heads = c.kv_heads * between(1, 2);
  c.queries = between(1, 150);
  c.head_dim = between(1, 70);
  c.dtype = DType(between(0, 2));
  c.blend = between(0, 1);
  c.plans = between(1, 2);
  c.segments_per_plan = between(1, 4);
  c.scale = 1.0f / std::sqrt(float(c.head_dim));
  std::vector<int64_t> segments, plan_index;
  int64_t keys = 1;
  for (int64_t p = 0; p < c.plans; ++p) {
    int64_t end = 0;
    for (int64_t s = 0; s < c.segments_per_plan; ++s) {
      const int64_t start = end + between(0, 3);
      end = start + (s == 0 ? between(1, 140) : between(0, 40));
      segments.insert(segments.end(), {start, end, between(0, 1) ? between(1, 400) : 0});
    }
    keys = std::max(keys, end);
  }
  for (int64_t b = 0; b < c.batch; ++b) plan_index.push_back(between(0, int(c.plans) - 1));
  std::vector<float> bias;
  std::vector<int32_t> order;
  const bool biased = c.blend || between(0, 3), ordered = between(0, 1);
  if (biased)
    for (int64_t p = 0; p < c.plans; ++p)
      for (int64_t s = 0; s < c.segments_per_plan; ++s)
        for (int64_t n = 0; n < c.queries; ++n)  // segment 0 is never excluded
          bias.push_back(s && (n / 40 + s) % 2 ? (c.blend ? 0.0f : -INFINITY) : (c.blend ? 1.0f : -float(between(0, 9))));
  if (ordered)
    for (int64_t p = 0; p < c.plans; ++p) {
      std::vector<int32_t> permutation(c.queries);
      for (int32_t n = 0; n < c.queries; ++n) permutation[n] = n;
      std::shuffle(permutation.begin(), permutation.end(), generator);
      order.insert(order.end(), permutation.begin(), permutation.end());
    }
  Values q(c.dtype, c.batch, c.heads, c.queries, c.head_dim, true);
  Values k(c.dtype, c.batch, c.kv_heads, keys, c.head_dim, true);
  Values v(c.dtype, c.batch, c.kv_heads, keys, c.head_dim, true);
  Values out(c.dtype, c.batch, c.heads, c.queries, c.head_dim, false);
  std::vector<float> lse(c.blend ? 0 : size_t(c.batch * c.heads * c.queries), NAN);
  c.q = q.strided();
  c.k = k.strided();
  c.v = v.strided();
  c.out = out.strided();
  c.lse = lse.empty() ? nullptr : lse.data();
  c.bias = bias.empty() ? nullptr : bias.data();
  c.order = order.empty() ? nullptr : order.data();
  c.segments = segments.data();
  c.plan_index = plan_index.data();
  const int threads = between(1, 4);
  const Isa isa = Isa(between(0, int(best_isa())));
  std::vector<float> workspace(size_t(regional_attention_workspace(c, threads)) / sizeof(float), NAN);
  regional_attention(c, workspace.data(), threads, isa);
  const double error = largest_error(c, q, k, v, out);
  const double allowed = c.dtype == DType::kFloat32 ? 2e-5 : c.dtype == DType::kFloat16 ? 1e-2 : 6e-2;
  if (error <= allowed) return true;
  std::printf("call %d: error %g > %g; B %d H %d/%d Nq %d D %d dtype %d blend %d threads %d isa %s\n", number, error,
              allowed, int(c.batch), int(c.heads), int(c.kv_heads), int(c.queries), int(c.head_dim), int(c.dtype),
              int(c.blend), threads, isa_name(isa));
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 50;
  bool passed = true;
  for (int i = 0; i < calls; ++i) passed &= run_one(i);
  std::printf("%d calls, best instruction set %s: %s\n", calls, isa_name(best_isa()), passed ? "passed" : "FAILED");
  return passed ? 0 : 1;
}
