// The recurrent ops on CUDA devices: entry points, callable from plain C++. The calls are described in
// ../common/scans.h, the algorithms at the head of each op's .cu.
//
// `stream` is a cudaStream_t of the current device. Each function puts its kernels on it and returns null, or why it
// could not; nothing waits, allocates or reads device memory on the host, so calls can be captured in a CUDA graph.
// `workspace` is 16-byte aligned device memory, as many bytes as the op's *_workspace says (none, at present: chunks
// hand their state on inside a block).
#pragma once
#include "../common/scans.h"

namespace anima {
namespace cuda {

int64_t ssd_chunk_scan_workspace(const SsdChunkScan& call);
int64_t ssd_state_update_workspace(const SsdStateUpdate& call);
int64_t gated_delta_rule_workspace(const GatedDeltaRule& call);
int64_t gated_delta_step_workspace(const GatedDeltaRule& call);
int64_t causal_conv1d_workspace(const CausalConv1d& call);
int64_t causal_conv1d_update_workspace(const CausalConv1dUpdate& call);

const char* ssd_chunk_scan(const SsdChunkScan& call, void* workspace, void* stream);
const char* ssd_state_update(const SsdStateUpdate& call, void* workspace, void* stream);
const char* gated_delta_rule(const GatedDeltaRule& call, void* workspace, void* stream);
const char* gated_delta_step(const GatedDeltaRule& call, void* workspace, void* stream);
const char* causal_conv1d(const CausalConv1d& call, void* workspace, void* stream);
const char* causal_conv1d_update(const CausalConv1dUpdate& call, void* workspace, void* stream);

}  // namespace cuda
}  // namespace anima
