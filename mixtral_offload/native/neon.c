#include "interface.h"

#if defined(__aarch64__) || defined(_M_ARM64)
#define FUNCTION(name) neon_##name
#include "simd_neon.h"
#include "products.h"

const Kernels neon_kernels = {"neon", neon_product, neon_silu_and_multiply};
#endif
