#include "interface.h"

#define FUNCTION(name) portable_##name
#include "simd_portable.h"
#include "products.h"

const Kernels portable_kernels = {"portable", portable_product, portable_silu_and_multiply};
