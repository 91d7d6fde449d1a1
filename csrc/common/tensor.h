// What the Python side passes for a tensor: an address, an element type and strides.
#pragma once
#include <cstdint>

namespace anima {

enum class DType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Of up to four dimensions; `data` is null where an optional tensor was not given. Strides are in elements and may be
// 0 (expanded); fields that say "unit last stride" are read in vectors.
struct Tensor {
  void* data;
  DType dtype;
  int64_t stride[4];
};

}  // namespace anima
