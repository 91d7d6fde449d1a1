#include "isa.h"

#if defined(ANIMA_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace anima {

#if defined(ANIMA_X86) && defined(_MSC_VER)
// CPUID leaves 1 and 7, and XCR0, which says whether the operating system saves the wide registers.
static Isa detect() {
  int one[4], seven[4];
  __cpuid(one, 1);
  __cpuidex(seven, 7, 0);
  if (!(one[2] >> 27 & 1)) return Isa::kPortable;  // OSXSAVE
  const unsigned long long saved = _xgetbv(0);
  const bool avx2 = (saved & 6) == 6 && (one[2] >> 12 & 1) && (one[2] >> 29 & 1) && (seven[1] >> 5 & 1);
  const bool avx512 = (saved & 0xe6) == 0xe6 && (seven[1] >> 16 & 1) && (seven[1] >> 17 & 1) &&
                      (seven[1] >> 30 & 1) && (seven[1] >> 31 & 1);
  return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
}
#elif defined(ANIMA_X86)
static Isa detect() {
  __builtin_cpu_init();
  // F16C, which clang does not let us ask for, came two generations before AVX2.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
}
#else
static Isa detect() { return Isa::kPortable; }
#endif

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable";
}

}  // namespace anima
