#include "interface.h"

#if defined(_MSC_VER)
#define INLINE __forceinline
#else
#define INLINE inline __attribute__((always_inline))
#endif
#define FUNCTION(name) portable_##name
#include "simd_portable.h"
#include "products.h"

const Kernels portable_kernels = {"portable", portable_product, portable_silu_and_multiply, portable_add_weighted};
