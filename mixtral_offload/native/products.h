/*
 * Products of packed matrices, written once over the vectors of a simd_*.h; each instruction set's source
 * includes both. FUNCTION(name) makes names of its own.
 *
 * In HQQ's layout (axis 0) a scale and a zero belong to one g and one k, and to all rows g, g + G, g + 2G, ...
 *
 *     y[r * G + g] = sum_k q[r, g, k] * t[g, k] - sum_k zero[g, k] * t[g, k],    t = scale[g, k] * x[k]
 *
 * so t is computed once for all rows of a group, as int16 (exact) or int8 (fast) with one fp32 scale for BLOCK
 * columns, and the rest is products of small integers. A value is masked where it is in its word: the power of
 * two that this costs is taken back from the finished sum. Every sum of a row has the same order for every
 * number of tokens and threads.
 */
#include "work.h"

#include "activations.h"
#include "words.h"
#include "tiles.h"

/* The scales of scales as [offset + k] needs them: as they are where a row of columns never wraps. */
static void FUNCTION(prepare)(Work *w, const Matrix *m, int64_t tokens, uint8_t *scratch) {
    w->m = m;
    w->groups = m->n / m->group;
    w->blocks = (m->k + BLOCK - 1) / BLOCK;
    w->padded = w->blocks * BLOCK;
    w->scales = m->meta_scale;
    w->zeros = m->meta_zero;
    const int64_t few = tokens < MAX_TOKENS ? tokens : MAX_TOKENS;
    w->t = scratch;
    scratch += few * w->padded * 2;
    w->unit = (float *)scratch;
    scratch += ROUND_UP(few * w->blocks * 4, 64);
    w->zero = (float *)scratch;
    scratch += 64;
    w->u = (float *)scratch;
    w->centre = w->u + few * w->padded;
    scratch += 4 * (few + 1) * w->padded;
    w->classes = 1;
    if (m->meta_scale && tokens <= MAX_TOKENS) {
        int64_t a = m->n_meta, b = m->k; /* classes: n_meta / the greatest common divisor */
        while (b) {
            int64_t rest = a % b;
            a = b;
            b = rest;
        }
        w->classes = m->n_meta / a;
    }
    w->ahead = w->classes * m->k;
    w->tile = (float *)scratch;
    w->sums = w->tile + TILE_ROWS * BLOCK;
    w->x = w->sums + TILE_TOKENS * TILE_ROWS * LANES;
    if (tokens > MAX_TOKENS) scratch = (uint8_t *)(w->x + TILE_TOKENS * w->padded);
    if (m->meta_scale && (m->n_meta % m->k || m->k % LANES)) {
        const int64_t n = m->n_meta + w->padded;
        uint16_t *scales = (uint16_t *)scratch, *zeros = scales + n;
        for (int64_t i = 0; i < n; i++) {
            scales[i] = i < m->n_meta ? m->meta_scale[i] : scales[i - m->n_meta];
            zeros[i] = i < m->n_meta ? m->meta_zero[i] : zeros[i - m->n_meta];
        }
        w->scales = scales;
        w->zeros = zeros;
    }
}

/* The sums of group g for the tokens first <= t < last, from a work's t, unit and zero. */
static void FUNCTION(rows_of_group)(const Work *w, int64_t first, int64_t last, int fast, const Target *to) {
    switch (w->m->format) {
    case BITS2: FUNCTION(group_2)(w, first, last, fast, to); break;
    case BITS3: FUNCTION(group_3)(w, first, last, fast, to); break;
    case BITS4: FUNCTION(group_4)(w, first, last, fast, to); break;
    case BITS8: FUNCTION(group_8)(w, first, last, 0, to); break;
    default: FUNCTION(group_ten)(w, first, last, to);
    }
}

static void FUNCTION(product)(const Matrix *m, const float *x, int64_t tokens, float *y, int64_t stride, int64_t first,
                              int64_t last, int fast, void *scratch) {
    Work w;
    FUNCTION(prepare)(&w, m, tokens, scratch);
    if (m->format == FLOAT16) plain_product(&w, FLOAT16, x, tokens, y, stride, first, last);
    else if (m->format == BFLOAT16) plain_product(&w, BFLOAT16, x, tokens, y, stride, first, last);
    else if (m->format == FLOAT32) plain_product(&w, FLOAT32, x, tokens, y, stride, first, last);
    if (m->format >= FLOAT16) return;
    if (m->format == BITS8 || m->format == TEN_IN_32) fast = 0; /* int8 times 8 bits needs int16 anyway */
    if (tokens > MAX_TOKENS) {
        for (int64_t t = 0; t < tokens; t += TILE_TOKENS) {
            const int64_t n = tokens - t < TILE_TOKENS ? tokens - t : TILE_TOKENS;
            const float *at = by_blocks(&w, x + t * w.padded, n);
            for (int64_t g = first; g < last; g++) {
                Target to = {y + t * stride, stride, g, 0};
                switch (m->format) {
                case BITS2: tiled_group(&w, 2, 1, at, n, &to); break;
                case BITS3: tiled_group(&w, 3, 1, at, n, &to); break;
                case BITS4: tiled_group(&w, 4, 1, at, n, &to); break;
                case BITS8: tiled_group(&w, 8, 1, at, n, &to); break;
                default: tiled_group(&w, 3, 4, at, n, &to);
                }
            }
        }
        return;
    }
    for (int64_t c = first; c < first + w.classes && c < last; c++) {
        if (w.scales) FUNCTION(set_class)(&w, c, x, tokens);
        for (int64_t g = c; g < last; g += w.classes) {
            Target to = {y, stride, g, 0};
            unsigned wide = 0;
            if (fast) tokens == 1 ? activations(&w, g, x, 0, 1, 1, 0) : activations(&w, g, x, 0, tokens, 1, 0);
            else wide = tokens == 1 ? activations(&w, g, x, 0, 1, 0, 0) : activations(&w, g, x, 0, tokens, 0, 0);
            FUNCTION(rows_of_group)(&w, 0, tokens, fast, &to);
            to.adds = 1;
            for (int64_t t = 0; UNLIKELY(wide); t++, wide >>= 1)
                if (wide & 1) {
                    FUNCTION(rest)(&w, g, x, t);
                    FUNCTION(rows_of_group)(&w, t, t + 1, 0, &to);
                }
        }
    }
}

/* e**x for -87 <= x <= 88, relative error below 2e-7; of the nearer end for others */
static INLINE vf exponential(vf x) {
    x = maximum(minimum(x, set_float(88)), set_float(-87));
    vi n = to_int(multiply(x, set_float(1.44269504f)));
    vf of = to_float(n);
    x = multiply_add(of, set_float(-0.693359375f), x);
    x = multiply_add(of, set_float(2.12194440e-4f), x);
    vf y = set_float(1.9875691500e-4f); /* coefficients: Cephes, expf */
    y = multiply_add(y, x, set_float(1.3981999507e-3f));
    y = multiply_add(y, x, set_float(8.3334519073e-3f));
    y = multiply_add(y, x, set_float(4.1665795894e-2f));
    y = multiply_add(y, x, set_float(1.6666665459e-1f));
    y = multiply_add(y, x, set_float(5.0000001201e-1f));
    y = add(multiply_add(y, multiply(x, x), x), set_float(1));
    return multiply(y, as_float(int_shift_left(add_int(n, set_int(127)), 23)));
}

static void FUNCTION(silu_and_multiply)(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        vf x = load_float(gate + i), e = exponential(subtract(set_float(0), x));
        store_float(gate + i, multiply(divide(x, add(set_float(1), e)), load_float(up + i)));
    }
}
