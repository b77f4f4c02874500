/* What products share: the state of one call, scales and zeros of a group. See products.h. */

#ifdef __GNUC__
#define UNROLL _Pragma("GCC unroll 16")
#define UNLIKELY(condition) __builtin_expect(condition, 0)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define UNROLL
#define UNLIKELY(condition) (condition)
#define PREFETCH(address) ((void)0)
#endif

#define LANES (BYTES / 4)
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))
typedef struct {
    const Matrix *m;
    int64_t groups;               /* G */
    int64_t blocks, padded;       /* of BLOCK columns; columns in whole blocks */
    const uint16_t *scales, *zeros; /* of scales, so that [offset + k] is right for every k */
    int64_t classes;              /* of groups whose scales have the same scales */
    int64_t ahead;                /* from a group to the next in the order of classes, in columns */
    float *u, *centre;            /* of a class: [tokens, padded], and zeros of scales [padded] */
    void *t;                      /* int16 or int8 [tokens, padded] */
    float *unit;                  /* [tokens, blocks]: what 1 stands for in t */
    float *zero;                  /* [tokens]: sum_k zero * t */
    float *x;                     /* [blocks, tokens, BLOCK], of many tokens */
    float *tile, *sums;           /* of dequantized weights [TILE_ROWS, BLOCK]; vectors [TILE_TOKENS, TILE_ROWS] */
} Work;

/* ---- scales and zeros ---------------------------------------------------------------------------------- */

static INLINE const void *padded_copy(void *to, const void *from, int64_t n_bytes) {
    memset(to, 0, 64);
    return memcpy(to, from, (size_t)n_bytes);
}

/* (value - zero) * scale of LANES quantized scales, or LANES fp16 ones */
static INLINE vf some_scales(const Work *w, const uint8_t *scale, int64_t meta) {
    if (!w->scales) return float_of_half((const uint16_t *)scale);
    vf centred = subtract(float_of_bytes(scale), float_of_half(w->zeros + meta));
    return multiply(centred, float_of_half(w->scales + meta));
}

/* scales [BLOCK] of group g from column k on, 0 after the last */
static void FUNCTION(scales)(const Work *w, int64_t g, int64_t k, float *scales) {
    const Matrix *m = w->m;
    int64_t at = g * m->k + k, n = m->k - k < BLOCK ? m->k - k : BLOCK, i = 0;
    int item = w->scales ? 1 : 2;
    int64_t meta = w->scales ? g * m->k % m->n_meta + k : 0;
    const uint8_t *scale = m->scale + at * item;
    for (; i + LANES <= n; i += LANES) store_float(scales + i, some_scales(w, scale + i * item, meta + i));
    if (i < n) {
        uint8_t rest[64];
        store_float(scales + i, some_scales(w, padded_copy(rest, scale + i * item, (n - i) * item), meta + i));
    }
    for (; n < BLOCK; n++) scales[n] = 0;
}

/* zeros [BLOCK] as floats, 0 after the last: 0 times what memory holds may be no number */
static void FUNCTION(zeros)(const Work *w, int64_t g, int64_t k, float *zeros) {
    const Matrix *m = w->m;
    int64_t at = g * m->k + k, n = m->k - k < BLOCK ? m->k - k : BLOCK;
    uint8_t rest[64];
    vf scale = set_float(0), zero = scale;
    if (m->zero_scale) {
        scale = set_float(half_to_float(*m->zero_scale));
        zero = set_float(half_to_float(*m->zero_zero));
    }
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t left = n - i < LANES ? n - i : LANES;
        if (m->zero_scale) {
            const uint8_t *from = m->zero + at + i;
            if (left < LANES) from = padded_copy(rest, from, left);
            store_float(zeros + i, multiply(subtract(float_of_bytes(from), zero), scale));
        } else {
            const uint8_t *from = m->zero + 2 * (at + i);
            if (left < LANES) from = padded_copy(rest, from, 2 * left);
            store_float(zeros + i, float_of_half((const uint16_t *)from));
        }
    }
    for (; n < BLOCK; n++) zeros[n] = 0;
}
