// One class an op: a call's tensors and sizes (csrc/common/scans.h), made from keyword arguments, with a method for each
// device that runs it and one that says how many bytes of workspace that takes. A tensor is None or (address, element
// type, strides).
#include "scans.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "../csrc/cpu/scans.h"
#if defined(ANIMA_CUDA)
#include "../csrc/cuda/scans.h"
#endif

namespace py = pybind11;

namespace {

using View = std::optional<std::tuple<uintptr_t, int, std::vector<int64_t>>>;

anima::Tensor tensor(const View& view) {
  anima::Tensor x{};
  if (!view) return x;
  x.data = reinterpret_cast<void*>(std::get<0>(*view));
  x.dtype = static_cast<anima::DType>(std::get<1>(*view));
  const std::vector<int64_t>& strides = std::get<2>(*view);
  for (size_t i = 0; i < strides.size() && i < 4; ++i) x.stride[i] = strides[i];
  return x;
}

const int32_t* integers(uintptr_t address) { return reinterpret_cast<const int32_t*>(address); }

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

#if defined(ANIMA_CUDA)
void raise_if(const char* error) {
  if (error) throw std::runtime_error(error);
}
#endif

template <class Call, class Run>
void without_gil(const Call& call, const std::string& isa, const Run& run) {
  const anima::Isa chosen = isa_from(isa);
  py::gil_scoped_release release;
  run(call, chosen);
}

}  // namespace

void bind_scans(py::module_& m) {
  using namespace anima;

  py::class_<SsdChunkScan>(m, "SsdChunkScan")
      .def(py::init([](View x, View dt, View A, View B, View C, View D, View z, View dt_bias, View initial_state, View y,
                       View final_state, View varlen_states, uintptr_t seq_idx, uintptr_t cu_seqlens, int64_t batch,
                       int64_t length, int64_t heads, int64_t head_dim, int64_t groups, int64_t state_dim,
                       int64_t sequences, float dt_min, float dt_max, bool dt_softplus) {
             return SsdChunkScan{tensor(x), tensor(dt), tensor(A), tensor(B), tensor(C), tensor(D), tensor(z),
                                 tensor(dt_bias), tensor(initial_state), tensor(y), tensor(final_state),
                                 integers(seq_idx), integers(cu_seqlens), tensor(varlen_states), batch, length, heads,
                                 head_dim, groups, state_dim, sequences, dt_min, dt_max, dt_softplus};
           }),
           py::kw_only(), py::arg("x"), py::arg("dt"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"), py::arg("z"),
           py::arg("dt_bias"), py::arg("initial_state"), py::arg("y"), py::arg("final_state"), py::arg("varlen_states"),
           py::arg("seq_idx"), py::arg("cu_seqlens"), py::arg("batch"), py::arg("length"), py::arg("heads"),
           py::arg("head_dim"), py::arg("groups"), py::arg("state_dim"), py::arg("sequences"), py::arg("dt_min"),
           py::arg("dt_max"), py::arg("dt_softplus"))
      .def("cpu_workspace", [](const SsdChunkScan& call, int threads) { return ssd_chunk_scan_workspace(call, threads); })
      .def("cpu",
           [](const SsdChunkScan& call, uintptr_t workspace, int threads, const std::string& isa) {
             without_gil(call, isa, [=](const auto& c, Isa i) { ssd_chunk_scan(c, pointer(workspace), threads, i); });
           })
#if defined(ANIMA_CUDA)
      .def("cuda_workspace", [](const SsdChunkScan& call) { return cuda::ssd_chunk_scan_workspace(call); })
      .def("cuda",
           [](const SsdChunkScan& call, uintptr_t workspace, uintptr_t stream) {
             raise_if(cuda::ssd_chunk_scan(call, pointer(workspace), pointer(stream)));
           })
#endif
      ;

  py::class_<SsdStateUpdate>(m, "SsdStateUpdate")
      .def(py::init([](View state, View x, View dt, View A, View B, View C, View D, View z, View dt_bias, View out,
                       uintptr_t state_indices, int64_t slots, int64_t batch, int64_t heads, int64_t head_dim,
                       int64_t groups, int64_t state_dim, bool dt_softplus) {
             return SsdStateUpdate{tensor(state), tensor(x), tensor(dt), tensor(A), tensor(B), tensor(C), tensor(D),
                                   tensor(z), tensor(dt_bias), tensor(out), integers(state_indices), slots, batch,
                                   heads, head_dim, groups, state_dim, dt_softplus};
           }),
           py::kw_only(), py::arg("state"), py::arg("x"), py::arg("dt"), py::arg("A"), py::arg("B"), py::arg("C"),
           py::arg("D"), py::arg("z"), py::arg("dt_bias"), py::arg("out"), py::arg("state_indices"), py::arg("slots"),
           py::arg("batch"), py::arg("heads"), py::arg("head_dim"), py::arg("groups"), py::arg("state_dim"),
           py::arg("dt_softplus"))
      .def("cpu_workspace", [](const SsdStateUpdate&, int) { return 0; })
      .def("cpu",
           [](const SsdStateUpdate& call, uintptr_t, int threads, const std::string& isa) {
             without_gil(call, isa, [=](const auto& c, Isa i) { ssd_state_update(c, threads, i); });
           })
#if defined(ANIMA_CUDA)
      .def("cuda_workspace", [](const SsdStateUpdate& call) { return cuda::ssd_state_update_workspace(call); })
      .def("cuda",
           [](const SsdStateUpdate& call, uintptr_t workspace, uintptr_t stream) {
             raise_if(cuda::ssd_state_update(call, pointer(workspace), pointer(stream)));
           })
#endif
      ;

  py::class_<GatedDeltaRule>(m, "GatedDeltaRule")
      .def(py::init([](View q, View k, View v, View g, View beta, View initial_state, View o, View final_state,
                       uintptr_t cu_seqlens, int64_t batch, int64_t length, int64_t key_heads, int64_t value_heads,
                       int64_t key_dim, int64_t value_dim, int64_t sequences, float scale, bool l2norm) {
             return GatedDeltaRule{tensor(q), tensor(k), tensor(v), tensor(g), tensor(beta), tensor(initial_state),
                                   tensor(o), tensor(final_state), integers(cu_seqlens), batch, length, key_heads,
                                   value_heads, key_dim, value_dim, sequences, scale, l2norm};
           }),
           py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("g"), py::arg("beta"), py::arg("initial_state"),
           py::arg("o"), py::arg("final_state"), py::arg("cu_seqlens"), py::arg("batch"), py::arg("length"),
           py::arg("key_heads"), py::arg("value_heads"), py::arg("key_dim"), py::arg("value_dim"), py::arg("sequences"),
           py::arg("scale"), py::arg("l2norm"))
      .def("cpu_workspace", [](const GatedDeltaRule& call, int threads) { return gated_delta_rule_workspace(call, threads); })
      .def("cpu",
           [](const GatedDeltaRule& call, uintptr_t workspace, int threads, const std::string& isa) {
             without_gil(call, isa, [=](const auto& c, Isa i) { gated_delta_rule(c, pointer(workspace), threads, i); });
           })
      .def("cpu_step_workspace", [](const GatedDeltaRule& call, int threads) { return gated_delta_step_workspace(call, threads); })
      .def("cpu_step",
           [](const GatedDeltaRule& call, uintptr_t workspace, int threads, const std::string& isa) {
             without_gil(call, isa, [=](const auto& c, Isa i) { gated_delta_step(c, pointer(workspace), threads, i); });
           })
#if defined(ANIMA_CUDA)
      .def("cuda_workspace", [](const GatedDeltaRule& call) { return cuda::gated_delta_rule_workspace(call); })
      .def("cuda",
           [](const GatedDeltaRule& call, uintptr_t workspace, uintptr_t stream) {
             raise_if(cuda::gated_delta_rule(call, pointer(workspace), pointer(stream)));
           })
      .def("cuda_step_workspace", [](const GatedDeltaRule& call) { return cuda::gated_delta_step_workspace(call); })
      .def("cuda_step",
           [](const GatedDeltaRule& call, uintptr_t workspace, uintptr_t stream) {
             raise_if(cuda::gated_delta_step(call, pointer(workspace), pointer(stream)));
           })
#endif
      ;

  py::class_<CausalConv1d>(m, "CausalConv1d")
      .def(py::init([](View x, View weight, View bias, View initial_states, View out, View final_states, uintptr_t seq_idx,
                       int64_t batch, int64_t channels, int64_t length, int64_t width, bool silu) {
             return CausalConv1d{tensor(x), tensor(weight), tensor(bias), tensor(initial_states), tensor(out),
                                 tensor(final_states), integers(seq_idx), batch, channels, length, width, silu};
           }),
           py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("initial_states"), py::arg("out"),
           py::arg("final_states"), py::arg("seq_idx"), py::arg("batch"), py::arg("channels"), py::arg("length"),
           py::arg("width"), py::arg("silu"))
      .def("cpu_workspace", [](const CausalConv1d&, int) { return 0; })
      .def("cpu",
           [](const CausalConv1d& call, uintptr_t, int threads, const std::string& isa) {
             without_gil(call, isa, [=](const auto& c, Isa i) { causal_conv1d(c, threads, i); });
           })
#if defined(ANIMA_CUDA)
      .def("cuda_workspace", [](const CausalConv1d& call) { return cuda::causal_conv1d_workspace(call); })
      .def("cuda",
           [](const CausalConv1d& call, uintptr_t workspace, uintptr_t stream) {
             raise_if(cuda::causal_conv1d(call, pointer(workspace), pointer(stream)));
           })
#endif
      ;

  py::class_<CausalConv1dUpdate>(m, "CausalConv1dUpdate")
      .def(py::init([](View x, View conv_state, View weight, View bias, View out, uintptr_t cache_seqlens,
                       uintptr_t state_indices, int64_t slots, int64_t batch, int64_t channels, int64_t length,
                       int64_t width, int64_t state_length, bool silu) {
             return CausalConv1dUpdate{tensor(x), tensor(conv_state), tensor(weight), tensor(bias), tensor(out),
                                       integers(cache_seqlens), integers(state_indices), slots, batch, channels, length,
                                       width, state_length, silu};
           }),
           py::kw_only(), py::arg("x"), py::arg("conv_state"), py::arg("weight"), py::arg("bias"), py::arg("out"),
           py::arg("cache_seqlens"), py::arg("state_indices"), py::arg("slots"), py::arg("batch"), py::arg("channels"),
           py::arg("length"), py::arg("width"), py::arg("state_length"), py::arg("silu"))
      .def("cpu_workspace", [](const CausalConv1dUpdate&, int) { return 0; })
      .def("cpu",
           [](const CausalConv1dUpdate& call, uintptr_t, int threads, const std::string& isa) {
             without_gil(call, isa, [=](const auto& c, Isa i) { causal_conv1d_update(c, threads, i); });
           })
#if defined(ANIMA_CUDA)
      .def("cuda_workspace", [](const CausalConv1dUpdate& call) { return cuda::causal_conv1d_update_workspace(call); })
      .def("cuda",
           [](const CausalConv1dUpdate& call, uintptr_t workspace, uintptr_t stream) {
             raise_if(cuda::causal_conv1d_update(call, pointer(workspace), pointer(stream)));
           })
#endif
      ;
}
