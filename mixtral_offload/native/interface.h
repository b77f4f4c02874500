/* What the instruction sets' sources share: a packed matrix, the functions that each of them provides. */
#ifndef MIXTRAL_OFFLOAD_INTERFACE_H
#define MIXTRAL_OFFLOAD_INTERFACE_H

#include <stddef.h>
#include <stdint.h>

/* How a matrix W [n, k] is stored. Bit widths have their own number. */
enum { BITS2 = 2, BITS3 = 3, BITS4 = 4, BITS8 = 8, TEN_IN_32 = 10, FLOAT16 = 16, BFLOAT16 = 17, FLOAT32 = 32 };

/*
 * A matrix as weights/hqq.py describes it. The group of row r * G + g (G = n / group) has its scale and zero at
 * [g, k]; quantized scales are (scale - meta_zero) * meta_scale, whose own scales repeat after n_meta elements.
 */
typedef struct {
    const uint8_t *words;       /* W_q, or the weights of a 16 or 32 bit matrix */
    const uint8_t *high;        /* W_high (3 bits in two parts), else NULL */
    const uint8_t *scale;       /* uint8 if meta_scale is given, else fp16: [G * k] */
    const uint8_t *zero;        /* uint8 if zero_scale is given, else fp16: [G * k] */
    const uint16_t *meta_scale; /* fp16 [n_meta], or NULL */
    const uint16_t *meta_zero;  /* fp16 [n_meta], or NULL */
    const uint16_t *zero_scale; /* fp16, one, or NULL */
    const uint16_t *zero_zero;  /* fp16, one, or NULL */
    int64_t n, k, group, n_meta;
    int64_t format;
} Matrix;

/* Columns that share one scale of the integer activations. */
#define BLOCK 256
/* Tokens that share the unpacking of a matrix; more go through tiles of dequantized weights. */
#define MAX_TOKENS 8

/* Rows of W in one tile of dequantized weights, tokens that go through it before the next is made. */
#define TILE_ROWS 16
#define TILE_TOKENS 64
/* fp32 values in the longest vector */
#define MAX_LANES 16

#if defined(_MSC_VER)
#define INLINE __forceinline
#else
#define INLINE inline __attribute__((always_inline))
#endif

typedef struct {
    const char *name;
    /*
     * y[t * stride + row] = sum over k of W[row, k] * x[t, k], for the rows of the groups first <= g < last (of a
     * 16 or 32 bit matrix: the rows themselves). Rows of x are as long as whole blocks of columns, with zeros
     * after the last one. fast: int8 activations in place of int16.
     */
    void (*product)(const Matrix *, const float *x, int64_t tokens, float *y, int64_t stride, int64_t first,
                    int64_t last, int fast, void *scratch);
    /* gate[i] = silu(gate[i]) * up[i]; n is a multiple of BLOCK */
    void (*silu_and_multiply)(float *gate, const float *up, int64_t n);
} Kernels;

extern const Kernels portable_kernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels avx2_kernels, avx512_kernels, avx512_vnni_kernels;
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels neon_kernels;
#endif

#endif
