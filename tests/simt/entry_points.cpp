// The entry points of csrc/cuda/scans.h with C names, for simt.py. `call` points to a struct of csrc/common/scans.h.
#include "cuda/scans.h"

#include <cstddef>

#define SIMT_STRUCT(type) \
  extern "C" size_t simt_sizeof_##type() { return sizeof(anima::type); }
#define SIMT_OP(op, type) \
  extern "C" const char* simt_##op(const anima::type* call, void*) { return anima::cuda::op(*call, nullptr); }
#define SIMT_OP_WITH_WORKSPACE(op, type)                                             \
  extern "C" const char* simt_##op(const anima::type* call, void* workspace) {       \
    return anima::cuda::op(*call, workspace, nullptr);                               \
  }                                                                                  \
  extern "C" int64_t simt_##op##_workspace(const anima::type* call) { return anima::cuda::op##_workspace(*call); }

SIMT_STRUCT(SsdChunkScan)
SIMT_STRUCT(SsdStateUpdate)
SIMT_STRUCT(GatedDeltaRule)
SIMT_STRUCT(CausalConv1d)
SIMT_STRUCT(CausalConv1dUpdate)

SIMT_OP_WITH_WORKSPACE(ssd_chunk_scan, SsdChunkScan)
SIMT_OP_WITH_WORKSPACE(ssd_state_update, SsdStateUpdate)
SIMT_OP_WITH_WORKSPACE(gated_delta_rule, GatedDeltaRule)
SIMT_OP_WITH_WORKSPACE(gated_delta_step, GatedDeltaRule)
SIMT_OP_WITH_WORKSPACE(causal_conv1d, CausalConv1d)
SIMT_OP_WITH_WORKSPACE(causal_conv1d_update, CausalConv1dUpdate)
