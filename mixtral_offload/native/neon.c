#include "interface.h"

#if defined(__aarch64__) || defined(_M_ARM64)
#if defined(_MSC_VER)
#define INLINE __forceinline
#else
#define INLINE inline __attribute__((always_inline))
#endif
#define FUNCTION(name) neon_##name
#include "simd_neon.h"
#include "products.h"

const Kernels neon_kernels = {"neon", neon_product, neon_silu_and_multiply, neon_add_weighted};
#endif
