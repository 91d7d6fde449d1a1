// Instruction sets a kernel is compiled for, and the best one this machine runs.
#pragma once

namespace anima {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set that is compiled in and that this processor and operating system support.
Isa best_isa();

const char* isa_name(Isa isa);

}  // namespace anima
