// Tile sizes and the per-thread workspace of regional attention, in floats.
#pragma once
#include "regional_attention.h"

namespace anima {

constexpr int kQueries = 64;  // queries a tile: the lanes of every vector loop (4 AVX-512 registers)
constexpr int kKeys = 128;    // keys a step: the scores of a step are kKeys x kQueries = 32 KiB

namespace {  // one copy a file: see simd.h on instruction sets

struct Workspace {
  int64_t keys, values;      // packed fp32 K and V of one head, [n, D] each
  int64_t query, out, mixed; // transposed tiles [D, kQueries]: q, the running output, the blend's sum
  int64_t scores;            // [kKeys, kQueries]
  int64_t bias;              // [S, kQueries]
  int64_t total;

  explicit Workspace(const RegionalAttention& call) {
    int64_t most = 0;
    for (int64_t p = 0; p < call.plans; ++p) {
      int64_t n = 0;
      for (int64_t s = 0; s < call.segments_per_plan; ++s) {
        const int64_t* segment = call.segments + 3 * (p * call.segments_per_plan + s);
        n += segment[1] - segment[0];
      }
      most = n > most ? n : most;
    }
    const int64_t tile = call.head_dim * kQueries;
    int64_t end = 0;
    const auto take = [&end](int64_t floats) {
      const int64_t begin = end;
      end += (floats + 15) / 16 * 16;
      return begin;
    };
    keys = take(most * call.head_dim);
    values = take(most * call.head_dim);
    query = take(tile);
    out = take(tile);
    mixed = take(call.blend ? tile : 0);
    scores = take(kKeys * kQueries);
    bias = take(call.segments_per_plan * kQueries);
    total = end;
  }
};

}  // namespace

}  // namespace anima
