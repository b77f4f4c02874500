#include "interface.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#endif
#define FUNCTION(name) avx2_##name
#include "simd_avx2.h"
#include "products.h"

const Kernels avx2_kernels = {"avx2", avx2_product, avx2_silu_and_multiply};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
