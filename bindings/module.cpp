// anima_fast._C: the C++ kernels over raw pointers and strides. It does not know torch; the Python side checks
// shapes and types, allocates outputs and workspaces, and passes addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cpu/isa.h"
#include "../csrc/cpu/regional_attention.h"
#include "scans.h"

namespace py = pybind11;

namespace {

using Strides = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address; strides of batch, head, row

anima::Strided strided(const Strides& x) {
  return {reinterpret_cast<const void*>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const anima::Isa isa : {anima::Isa::kPortable, anima::Isa::kAvx2, anima::Isa::kAvx512})
    if (isa <= anima::best_isa()) names.push_back(anima::isa_name(isa));
  return names;
}

// The numbers of a call that are not pointers to tensors; kept alive while it runs.
struct Call {
  std::vector<int64_t> segments, plan_index;
  anima::RegionalAttention args{};

  Call(std::vector<int64_t> sizes, int dtype, std::vector<int64_t> segments_, std::vector<int64_t> plan_index_,
       int64_t segments_per_plan, double scale, bool blend)
      : segments(std::move(segments_)), plan_index(std::move(plan_index_)) {
    args.batch = sizes.at(0);
    args.heads = sizes.at(1);
    args.kv_heads = sizes.at(2);
    args.queries = sizes.at(3);
    args.head_dim = sizes.at(4);
    args.dtype = static_cast<anima::DType>(dtype);
    args.segments = segments.data();
    args.plan_index = plan_index.data();
    args.segments_per_plan = segments_per_plan;
    args.plans = int64_t(segments.size()) / (3 * segments_per_plan);
    args.scale = float(scale);
    args.blend = blend;
  }
};

}  // namespace

anima::Isa isa_from(const std::string& name) {
  for (const anima::Isa isa : {anima::Isa::kPortable, anima::Isa::kAvx2, anima::Isa::kAvx512})
    if (name == anima::isa_name(isa) && isa <= anima::best_isa()) return isa;
  if (name.empty()) return anima::best_isa();
  throw std::invalid_argument("isa: got '" + name + "'; allowed: this machine's, up to '" +
                              anima::isa_name(anima::best_isa()) + "'");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of anima_fast, over raw pointers";

  m.def("capabilities", [] {
    py::dict result;
    result["isa"] = anima::isa_name(anima::best_isa());
    result["isas"] = isas();
#if defined(_OPENMP)
    result["openmp"] = true;
#else
    result["openmp"] = false;
#endif
    return result;
  });

  bind_scans(m);

  py::class_<Call>(m, "RegionalAttention", "One regional_attention call: csrc/cpu/regional_attention.h")
      .def(py::init<std::vector<int64_t>, int, std::vector<int64_t>, std::vector<int64_t>, int64_t, double, bool>(),
           py::arg("sizes"), py::arg("dtype"), py::arg("segments"), py::arg("plan_index"), py::arg("segments_per_plan"),
           py::arg("scale"), py::arg("blend"))
      .def("workspace", [](const Call& call, int threads) { return anima::regional_attention_workspace(call.args, threads); },
           py::arg("threads"), "Bytes of 64-byte aligned workspace for so many threads.")
      .def("run",
           [](Call& call, Strides q, Strides k, Strides v, Strides out, uintptr_t lse, uintptr_t bias, uintptr_t order,
              uintptr_t workspace, int threads, const std::string& isa) {
             const anima::Isa chosen = isa_from(isa);
             anima::RegionalAttention args = call.args;
             args.q = strided(q);
             args.k = strided(k);
             args.v = strided(v);
             args.out = strided(out);
             args.lse = reinterpret_cast<float*>(lse);
             args.bias = reinterpret_cast<const float*>(bias);
             args.order = reinterpret_cast<const int32_t*>(order);
             py::gil_scoped_release release;
             anima::regional_attention(args, reinterpret_cast<void*>(workspace), threads, chosen);
           },
           py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("bias"), py::arg("order"),
           py::arg("workspace"), py::arg("threads"), py::arg("isa") = "");
}
