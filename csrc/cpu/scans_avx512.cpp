#define ANIMA_ISA avx512
#include "causal_conv1d_kernel.h"
#include "gated_delta_step_kernel.h"
#include "scans.h"
#include "ssd_chunk_scan_kernel.h"
#include "ssd_state_update_kernel.h"
