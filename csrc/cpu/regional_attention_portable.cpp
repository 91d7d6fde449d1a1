#define ANIMA_ISA portable
#include "regional_attention_kernel.h"
