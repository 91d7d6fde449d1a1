#define ANIMA_ISA avx2
#include "regional_attention_kernel.h"
