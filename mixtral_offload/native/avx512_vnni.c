#include "interface.h"

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(WITHOUT_AVX512)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,avx2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,avx2")
#endif
#define FUNCTION(name) avx512_vnni_##name
#define USE_VNNI
#include "simd_avx512.h"
#include "products.h"

const Kernels avx512_vnni_kernels = {"avx512_vnni", avx512_vnni_product, avx512_vnni_silu_and_multiply};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
