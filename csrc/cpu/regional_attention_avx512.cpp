#define ANIMA_ISA avx512
#include "regional_attention_kernel.h"
