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

/* ---- activations as integers --------------------------------------------------------------------------- */

/* The columns of a block, in memory that may be read to the end of the block. */
static INLINE const uint8_t *whole_block(const uint8_t *from, int64_t n, int item, uint8_t *copy) {
    if (n >= BLOCK) return from;
    memset(copy, 0, (size_t)(BLOCK * item));
    return memcpy(copy, from, (size_t)(n * item));
}

/* Groups whose scales have the same scales, g mod classes: u = (scale of scales * x) for all of them. */
static void FUNCTION(set_class)(const Work *w, int64_t g, const float *x, int64_t tokens) {
    const int64_t meta = g * w->m->k % w->m->n_meta;
    for (int64_t k = 0; k < w->padded; k += LANES) {
        const int is_in = k < w->m->k; /* the rest of the last block has no scales */
        vf scale = is_in ? float_of_half(w->scales + meta + k) : zero_float();
        store_float(w->centre + k, is_in ? float_of_half(w->zeros + meta + k) : zero_float());
        for (int64_t t = 0; t < tokens; t++)
            store_float(w->u + t * w->padded + k, multiply(scale, load_float(x + t * w->padded + k)));
    }
}

/* Four vectors of ints as int16, in the order that the words' values come in. */
static INLINE vh *put_int16(const Work *w, const vi q[4], vh *out) {
    if (w->m->format == TEN_IN_32) {
        out[0] = halves(q[0], q[1]);
        out[1] = halves(q[2], q[3]);
    } else {
        even_odd(q, out, out + 1);
    }
    return out + 2;
}

/*
 * Largest product over the mean of a block from where int16 could lose the smaller ones: an error of 6e-4 of their mean
 * remains below it. The largest may count for nothing, in a column that is zero.
 */
#define WIDE 64

/*
 * t of one block of one token, as integers in the order that the words' values come in; returns their unit.
 * scale: quantized ones, or floats that were made of them (is_float). is_rest: what these integers leave of t is made
 * into integers, of a finer unit. is_wide: set where that counts.
 */
static INLINE float integers(const Work *w, const uint8_t *scale, const float *centre, const float *u, int64_t n,
                             const int is_float, const int fast, const int is_rest, const float *zeros, int *is_wide,
                             vf *zero_sum, vh *out) {
    const float limit = fast ? 127 : 32767;
    float t[BLOCK];
    vi largest = zero_int();
    vf sum = zero_float();
    for (int64_t i = 0; i < n; i += LANES) {
        vf of = is_float ? load_float((const float *)scale + i) : subtract(float_of_bytes(scale + i), load_float(centre + i));
        vf product = multiply(of, load_float(u + i));
        store_float(t + i, product);
        largest = max_bits(largest, product);
        if (!fast) sum = add(sum, absolute(product));
    }
    float most = largest_of_bits(largest);            /* NaN if there is one */
    float unit = most < 1e-30f ? 0 : most / limit;    /* too small for a reciprocal: zero */
    vf per_unit = set_float(most < 1e-30f ? 0 : limit / most);
    if (is_rest) {
        largest = zero_int();
        for (int64_t i = 0; i < n; i += LANES) {
            vf q = to_float(to_int(multiply(load_float(t + i), per_unit)));
            vf rest = multiply_add(q, set_float(-unit), load_float(t + i));
            store_float(t + i, rest);
            largest = max_bits(largest, rest);
        }
        most = largest_of_bits(largest);
        unit = most < 1e-30f ? 0 : most / limit;
        per_unit = set_float(most < 1e-30f ? 0 : limit / most);
    } else if (!fast && most * (float)n > WIDE * sum_float(sum)) {
        *is_wide = 1;
    }
    vf zero = zero_float();
    for (int64_t i = 0; i < n; i += BYTES) {
        vi q[4];
        UNROLL for (int j = 0; j < 4; j++) q[j] = to_int(multiply(load_float(t + i + j * LANES), per_unit));
        if (zeros)
            UNROLL for (int j = 0; j < 4; j++) zero = multiply_add(load_float(zeros + i + j * LANES), to_float(q[j]), zero);
        if (fast) *out++ = pack8(q);
        else out = put_int16(w, q, out);
    }
    if (zeros) *zero_sum = multiply_add(zero, set_float(unit), *zero_sum);
    return unit;
}

/*
 * t, unit and zero of a work for group g, of `tokens` tokens from `first` on. Returns a bit for each of them whose
 * is_rest is to be added: small products beside a large one.
 */
static INLINE unsigned activations(const Work *w, int64_t g, const float *x, int64_t first, const int64_t tokens,
                                   const int fast, const int is_rest) {
    const Matrix *m = w->m;
    float scales[BLOCK + LANES], zeros[BLOCK + LANES];
    vf zero_sum[MAX_TOKENS], one_sum[MAX_TOKENS];
    const int item = fast ? 1 : 2, is_bytes = m->zero_scale && m->format != TEN_IN_32;
    unsigned wide = 0;
    for (int64_t t = 0; t < tokens; t++) zero_sum[t] = one_sum[t] = zero_float();
    for (int64_t block = 0; block < w->blocks; block++) {
        const int64_t k = block * BLOCK, at = g * m->k + k, left = m->k - k < BLOCK ? m->k - k : BLOCK;
        const int64_t n = ROUND_UP(left, BYTES);
        uint8_t some_scales[2 * BLOCK], some_zeros[BLOCK];
        const uint8_t *scale = whole_block(m->scale + at * (w->scales ? 1 : 2), left, w->scales ? 1 : 2, some_scales);
        const uint8_t *zero = is_bytes ? whole_block(m->zero + at, left, 1, some_zeros) : NULL;
        if (!is_bytes) FUNCTION(zeros)(w, g, k, zeros);
        if (!w->scales || tokens > 1) /* once for all tokens */
            for (int64_t i = 0; i < n; i += LANES)
                store_float(scales + i, w->scales ? subtract(float_of_bytes(scale + i), load_float(w->centre + k + i))
                                                  : float_of_half((const uint16_t *)scale + i));
        for (int64_t i = 0; i < n; i += 64) {
            PREFETCH(scale + (i + w->ahead) * (w->scales ? 1 : 2));
            if (is_bytes) PREFETCH(zero + i + w->ahead);
        }
        for (int64_t t = 0; t < tokens; t++) {
            vh *out = (vh *)((uint8_t *)w->t + ((first + t) * w->padded + k) * item);
            const float *u = (w->scales ? w->u : x) + (first + t) * w->padded + k, *some = is_bytes ? NULL : zeros;
            int is_wide = 0;
            float unit = !w->scales || tokens > 1 ? integers(w, (const uint8_t *)scales, NULL, u, n, 1, fast, is_rest, some,
                                                             &is_wide, zero_sum + t, out)
                                                  : integers(w, scale, w->centre + k, u, n, 0, fast, is_rest, some,
                                                             &is_wide, zero_sum + t, out);
            w->unit[(first + t) * w->blocks + block] = unit;
            wide |= (unsigned)is_wide << t;
            if (!is_bytes) continue;
            vi of_zero = zero_int(), of_one = zero_int(); /* zeros that are bytes: with the same integers */
            for (int64_t i = 0; i < n; i += BYTES) {
                vh z = load_words(zero + i);
                if (fast) {
                    of_zero = dot8_wide(of_zero, z, *out);
                    of_one = dot8_wide(of_one, mask8(1), *out++);
                } else {
                    of_zero = dot16(dot16(of_zero, bits_and(z, mask16(0xff)), out[0]), shift_right16(z, 8), out[1]);
                    of_one = dot16(dot16(of_one, mask16(1), out[0]), mask16(1), out[1]);
                    out += 2;
                }
            }
            zero_sum[t] = multiply_add(to_float(of_zero), set_float(unit), zero_sum[t]);
            one_sum[t] = multiply_add(to_float(of_one), set_float(unit), one_sum[t]);
        }
    }
    const float scale = is_bytes ? half_to_float(*m->zero_scale) : 1, zero = is_bytes ? half_to_float(*m->zero_zero) : 0;
    for (int64_t t = 0; t < tokens; t++)
        w->zero[first + t] = scale * (sum_float(zero_sum[t]) - zero * sum_float(one_sum[t]));
    return wide;
}

static void FUNCTION(rest)(const Work *w, int64_t g, const float *x, int64_t token) {
    activations(w, g, x, token, 1, 0, 1);
}

/* ---- products of words --------------------------------------------------------------------------------- */

/* The sums of one vector of each row, added to `of`: see byte_rows. t: of the first token, `next` bytes before the next. */
static INLINE void byte_step(const int bits, const int n_rows, const int n_tokens, const int fast,
                             const uint8_t *const *from, int first_high, const uint8_t *t, int64_t next, vi *of) {
    const int low = bits == 3 ? 2 : bits, values = 8 / low;
    vh high = mask16(0);
    if (bits == 3) high = load_words(from[n_rows]);
    UNROLL for (int row = 0; row < n_rows; row++) {
        const vh word = load_words(from[row]);
        const int b = first_high + row;
        for (int half = 0; half < (fast ? 1 : 2); half++) { /* exact: even columns, then odd ones */
            const vh part = half ? shift_right16(word, 8) : word;
            const vh moved = bits == 3 && !fast ? shift_left16(half ? shift_right16(high, 8) : high, 1 + b) : part;
            UNROLL for (int i = 0; i < values; i++) {
                const int shift = 8 - low * (i + 1);
                vh q;
                if (!fast) { /* in place */
                    q = bits_and(part, mask16(((1 << low) - 1) << shift));
                    if (bits == 3) q = bits_or(q, bits_and(moved, mask16(4 << shift)));
                } else if (bits == 3) { /* the high bit of value i is bit 7 - (2 * i + b) of its word */
                    const int up = 7 - (2 * i + b);
                    const vh bit = up >= 2 ? shift_right16(high, up - 2) : shift_left16(high, 2 - up);
                    q = bits_or(bits_and(shift_right16(word, shift), mask8(3)), bits_and(bit, mask8(4)));
                } else if (bits == 2 && (shift & 2)) { /* two bits up: sums of 16 bits have room for that */
                    q = bits_and(shift_right16(word, shift - 2), mask8(12));
                } else {
                    q = bits_and(shift_right16(word, shift), mask8((1 << low) - 1));
                }
                UNROLL for (int j = 0; j < n_tokens; j++) {
                    const vh x = load_words(t + j * next + half * BYTES);
                    vi *sum = &of[(row * values + i) * n_tokens + j];
                    *sum = fast ? dot8(*sum, q, x) : dot16(*sum, q, x);
                }
            }
        }
    }
}

/*
 * The sums [n_rows, values of a word, n_tokens] of some rows of words of 2, 4 or 8 bits, or of 2 bits with a row of
 * high ones (3 bits): the rows' high bits are then first_high, first_high + 1. The constants bits, n_rows, n_tokens,
 * fast make one loop of each combination. No function is called in its innermost loop: the sums stay in registers.
 */
static INLINE void byte_rows(const Work *w, const int bits, const int n_rows, const int n_tokens, const int fast,
                             const uint8_t *const *words, const uint8_t *const *ahead, int first_high, int64_t token,
                             float *y) {
    const int low = bits == 3 ? 2 : bits, values = 8 / low, n_pointers = n_rows + (bits == 3), item = fast ? 1 : 2;
    const int64_t columns = w->m->k, next = w->padded * item;
    vf sums[4 * 2 * 2];
    UNROLL for (int i = 0; i < n_rows * values * n_tokens; i++) sums[i] = zero_float();
    for (int64_t block = 0; block < w->blocks; block++) {
        const int64_t first = block * BLOCK, left = columns - first < BLOCK ? columns - first : BLOCK;
        const uint8_t *t = (const uint8_t *)w->t + (token * w->padded + first) * item, *from[5];
        vi of[4 * 2 * 2];
        UNROLL for (int i = 0; i < n_rows * values * n_tokens; i++) of[i] = zero_int();
        int64_t k = 0;
        for (; k + 64 <= left; k += 64) { /* a line of the cache */
            UNROLL for (int row = 0; row < n_pointers; row++) PREFETCH(ahead[row] + first + k);
            UNROLL for (int step = 0; step < 64; step += BYTES) {
                UNROLL for (int row = 0; row < n_pointers; row++) from[row] = words[row] + first + k + step;
                byte_step(bits, n_rows, n_tokens, fast, from, first_high, t + (k + step) * item, next, of);
            }
        }
        for (; UNLIKELY(k < left); k += BYTES) {
            uint8_t rest[5][64];
            const int64_t n = left - k < BYTES ? left - k : BYTES;
            UNROLL for (int row = 0; row < n_pointers; row++) from[row] = padded_copy(rest[row], words[row] + first + k, n);
            byte_step(bits, n_rows, n_tokens, fast, from, first_high, t + k * item, next, of);
        }
        UNROLL for (int i = 0; i < n_rows * values; i++)
            UNROLL for (int j = 0; j < n_tokens; j++) {
                vi *sum = &of[i * n_tokens + j];
                vf unit = set_float(w->unit[(token + j) * w->blocks + block]);
                sums[i * n_tokens + j] = multiply_add(to_float(fast ? widen(*sum) : *sum), unit, sums[i * n_tokens + j]);
            }
    }
    UNROLL for (int i = 0; i < n_rows * values; i++) {
        const int shift = 8 - low * (i % values + 1);
        const float power = fast ? (bits == 2 && (shift & 2) ? 0.25f : 1) : 1.0f / (float)(1 << shift);
        UNROLL for (int j = 0; j < n_tokens; j++) y[i * n_tokens + j] = sum_float(sums[i * n_tokens + j]) * power;
    }
}

/* The ten sums of a row of 32-bit words for one token. */
static INLINE void ten_in_32_row(const Work *w, const uint8_t *words, int64_t token, float *y) {
    const int64_t columns = w->m->k;
    vf sums[10];
    UNROLL for (int i = 0; i < 10; i++) sums[i] = zero_float();
    for (int64_t block = 0; block < w->blocks; block++) {
        int64_t k = block * BLOCK, end = columns - k < BLOCK ? columns : k + BLOCK;
        vi of[10];
        UNROLL for (int i = 0; i < 10; i++) of[i] = zero_int();
        for (; k < end; k += BYTES / 2) {
            uint8_t rest[128];
            const uint8_t *from = words + 4 * k;
            if (columns - k < BYTES / 2) {
                memset(rest, 0, sizeof rest);
                memcpy(rest, from, (size_t)(4 * (columns - k)));
                from = rest;
            }
            vh a = load_words(from), b = load_words(from + BYTES);
            vh t = load_words((const uint8_t *)w->t + 2 * (token * w->padded + k));
            vh parts[4];
            parts[0] = low_high(a, shift_left32(b, 16)); /* bits 0 to 14: the last five values */
            parts[2] = low_high(shift_right32(a, 15), shift_left32(b, 1));
            parts[1] = shift_right16(parts[0], 9);
            parts[3] = shift_right16(parts[2], 9);
            UNROLL for (int j = 0; j < 10; j++) {
                const int at = j % 5;
                vh q = bits_and(parts[j / 5 * 2 + (at > 2)], mask16(7 << (3 * (at > 2 ? at - 3 : at))));
                of[9 - j] = dot16(of[9 - j], q, t);
            }
        }
        vf unit = set_float(w->unit[token * w->blocks + block]);
        UNROLL for (int i = 0; i < 10; i++) sums[i] = multiply_add(to_float(of[i]), unit, sums[i]);
    }
    UNROLL for (int j = 0; j < 10; j++) {
        const int at = j % 5;
        y[9 - j] = sum_float(sums[9 - j]) / (float)(1 << (3 * (at > 2 ? at - 3 : at)));
    }
}

typedef struct {
    float *y;
    int64_t stride;
    int64_t g;
    int adds; /* to what is there */
} Target;

static INLINE void put(const Work *w, const Target *to, int64_t row, int64_t token, float sum) {
    if (row >= w->m->group) return;
    float *y = to->y + token * to->stride + row * w->groups + to->g;
    *y = (to->adds ? *y : 0) + (sum - w->zero[token]);
}

/* All rows of group g for n_tokens tokens from `token` on. The last rows are computed twice if n_rows divides no more. */
static INLINE void group_of_bytes(const Work *w, const int bits, const int n_rows, const int n_tokens, const int fast,
                                  int64_t token, const Target *to) {
    const Matrix *m = w->m;
    const int low = bits == 3 ? 2 : bits, values = 8 / low;
    const int64_t row_bytes = w->groups * m->k, n_words = (m->group + values - 1) / values, n_high = m->group / 8;
    const uint8_t *words = m->words + to->g * m->k, *rows[5], *ahead[5];
    float y[4 * 2 * 2];
    for (int64_t p = 0; p < (bits == 3 ? n_high : n_words); p += bits == 3 ? 1 : n_rows)
        for (int first = 0; first < (bits == 3 ? 2 : 1); first += n_rows) {
            int64_t at[4];
            UNROLL for (int row = 0; row < n_rows; row++) {
                at[row] = bits == 3 ? p + (first + row) * n_high : p + row < n_words ? p + row : n_words - 1;
                rows[row] = words + at[row] * row_bytes;
            }
            if (bits == 3) rows[n_rows] = m->high + to->g * m->k + p * row_bytes;
            UNROLL for (int row = 0; row < n_rows + (bits == 3); row++) { /* the next rows, or those of the next group */
                const int is_last = bits == 3 ? p + 1 == n_high : p + n_rows >= n_words;
                const int64_t step = bits == 3 ? 1 : n_rows, back = bits == 3 ? n_high - 1 : n_words - n_rows;
                ahead[row] = rows[row] + (is_last ? w->ahead - back * row_bytes : step * row_bytes);
            }
            byte_rows(w, bits, n_rows, n_tokens, fast, rows, ahead, first, token, y);
            UNROLL for (int row = 0; row < n_rows; row++)
                UNROLL for (int i = 0; i < values; i++)
                    UNROLL for (int j = 0; j < n_tokens; j++)
                        put(w, to, i * n_words + at[row], token + j, y[(row * values + i) * n_tokens + j]);
        }
}

#define LOOPS(bits, exact, alone, in_pair)                                                                             \
    static void FUNCTION(group_##bits)(const Work *w, int64_t t, int64_t tokens, int fast, const Target *to) {        \
        if (fast) {                                                                                                   \
            for (; t + 2 <= tokens; t += 2) group_of_bytes(w, bits, in_pair, 2, 1, t, to);                            \
            if (t < tokens) group_of_bytes(w, bits, alone, 1, 1, t, to);                                              \
        } else {                                                                                                      \
            for (; t + 2 <= tokens; t += 2) group_of_bytes(w, bits, in_pair, 2, 0, t, to);                            \
            if (t < tokens) group_of_bytes(w, bits, exact, 1, 0, t, to);                                              \
        }                                                                                                             \
    }
/* Rows at a time, by measurement: at most 8 sums, because 16 registers hold no more. */
LOOPS(2, 1, 2, 1)
LOOPS(3, 2, 2, 1)
LOOPS(4, 2, 4, 2)
LOOPS(8, 4, 4, 4)

static void FUNCTION(group_ten)(const Work *w, int64_t first, int64_t tokens, const Target *to) {
    const Matrix *m = w->m;
    const int64_t n_words = (m->group + 9) / 10, row_bytes = 4 * w->groups * m->k;
    float y[10];
    for (int64_t p = 0; p < n_words; p++)
        for (int64_t t = first; t < tokens; t++) {
            ten_in_32_row(w, m->words + 4 * to->g * m->k + p * row_bytes, t, y);
            for (int i = 0; i < 10; i++) put(w, to, i * n_words + p, t, y[i]);
        }
}

/* ---- plain weights ------------------------------------------------------------------------------------- */

static INLINE vf some_weights(const uint8_t *from, const int format) {
    if (format == FLOAT16) return float_of_half((const uint16_t *)from);
    if (format == BFLOAT16) return float_of_bfloat((const uint16_t *)from);
    return load_float((const float *)from);
}

static INLINE void plain_rows(const Matrix *m, const int format, const int n_rows, const float *x, int64_t row, float *y) {
    const int item = format == FLOAT32 ? 4 : 2;
    const int64_t k = m->k;
    vf sums[4][2];
    UNROLL for (int i = 0; i < n_rows; i++) sums[i][0] = sums[i][1] = zero_float();
    int64_t at = 0;
    for (; at + 2 * LANES <= k; at += 2 * LANES)
        UNROLL for (int i = 0; i < n_rows; i++) {
            const uint8_t *from = m->words + ((row + i) * k + at) * item;
            sums[i][0] = multiply_add(some_weights(from, format), load_float(x + at), sums[i][0]);
            sums[i][1] = multiply_add(some_weights(from + LANES * item, format), load_float(x + at + LANES), sums[i][1]);
        }
    for (; at < k; at += LANES)
        UNROLL for (int i = 0; i < n_rows; i++) {
            uint8_t rest[64];
            int64_t n = k - at < LANES ? k - at : LANES;
            const void *from = padded_copy(rest, m->words + ((row + i) * k + at) * item, n * item);
            sums[i][0] = multiply_add(some_weights(from, format), load_float(x + at), sums[i][0]);
        }
    UNROLL for (int i = 0; i < n_rows; i++) y[i] = sum_float(add(sums[i][0], sums[i][1]));
}

/* ---- many tokens: tiles of dequantized weights ------------------------------------------------------------ */

/* One block of all values of a row of words: rows [values, BLOCK] of the tile, `step` floats apart. */
static INLINE void dequantize_words(const uint8_t *words, const uint8_t *high, const int bits, const int item, int64_t n,
                                    int high_shift, const float *scales, const float *offsets, float *tile,
                                    int64_t step) {
    const int values = item == 4 ? 10 : bits == 3 ? 4 : 8 / bits, low = bits == 3 && item == 1 ? 2 : bits;
    for (int64_t k = 0; k < n; k += LANES) {
        uint8_t rest[2][64];
        const uint8_t *from = words + item * k, *from_high = bits == 3 && item == 1 ? high + k : NULL;
        if (UNLIKELY(n - k < LANES)) {
            from = padded_copy(rest[0], from, item * (n - k));
            if (bits == 3 && item == 1) from_high = padded_copy(rest[1], from_high, n - k);
        }
        const vi word = item == 4 ? as_int(load_float((const float *)from)) : int_of_bytes(from);
        const vf scale = load_float(scales + k), offset = load_float(offsets + k);
        vi bit = word;
        if (bits == 3 && item == 1) bit = int_of_bytes(from_high);
        UNROLL for (int i = 0; i < values; i++) {
            vi q = int_and(int_shift_right(word, low * (values - 1 - i)), set_int((1 << low) - 1));
            if (bits == 3 && item == 1) {
                vi up = int_and(int_shift_right(bit, high_shift - 2 * i), set_int(1));
                q = add_int(q, int_shift_left(up, 2));
            }
            store_float(tile + i * step + k, multiply_add(to_float(q), scale, offset));
        }
    }
}

/* sums[t][row] += tile[row] . x[t], for n columns in whole vectors */
static INLINE void tile_product(const int n_tokens, const int n_rows, const float *tile, const float *x, int64_t padded,
                                int64_t n, float *sums) {
    vf of[TILE_WIDTH][4];
    UNROLL for (int t = 0; t < n_tokens; t++)
        UNROLL for (int i = 0; i < n_rows; i++) of[t][i] = load_float(sums + (t * TILE_ROWS + i) * LANES);
    for (int64_t k = 0; k < n; k += LANES) {
        vf at[TILE_WIDTH];
        UNROLL for (int t = 0; t < n_tokens; t++) at[t] = load_float(x + t * padded + k);
        UNROLL for (int i = 0; i < n_rows; i++) {
            vf weight = load_float(tile + i * BLOCK + k);
            UNROLL for (int t = 0; t < n_tokens; t++) of[t][i] = multiply_add(weight, at[t], of[t][i]);
        }
    }
    UNROLL for (int t = 0; t < n_tokens; t++)
        UNROLL for (int i = 0; i < n_rows; i++) store_float(sums + (t * TILE_ROWS + i) * LANES, of[t][i]);
}

/* sums += tile . x for all tokens; x [tokens, BLOCK] */
static void FUNCTION(tiles)(const Work *w, const float *x, int64_t tokens, int n_rows, int64_t n) {
    for (int row = 0; row < n_rows; row += 4) {
        const float *tile = w->tile + row * BLOCK;
        float *sums = w->sums + row * LANES;
        int64_t t = 0;
        for (; t + TILE_WIDTH <= tokens; t += TILE_WIDTH)
            tile_product(TILE_WIDTH, 4, tile, x + t * BLOCK, BLOCK, n, sums + t * TILE_ROWS * LANES);
        for (; t < tokens; t++) tile_product(1, 4, tile, x + t * BLOCK, BLOCK, n, sums + t * TILE_ROWS * LANES);
    }
}

/* All rows of group g for up to TILE_TOKENS tokens; x [blocks, tokens, BLOCK]. */
static INLINE void tiled_group(const Work *w, const int bits, const int item, const float *x, int64_t tokens,
                               const Target *to) {
    const Matrix *m = w->m;
    const int values = item == 4 ? 10 : bits == 3 ? 4 : 8 / bits, is_split = bits == 3 && item == 1;
    const int64_t n_words = (m->group + values - 1) / values, row_bytes = item * w->groups * m->k, n_high = m->group / 8;
    const int64_t in_tile = TILE_ROWS / values;
    float scales[BLOCK + LANES], offsets[BLOCK + LANES];
    for (int64_t p = 0; p < n_words; p += in_tile) {
        const int n = (int)(n_words - p < in_tile ? n_words - p : in_tile);
        memset(w->sums, 0, (size_t)tokens * TILE_ROWS * LANES * sizeof(float));
        for (int64_t block = 0; block < w->blocks; block++) {
            const int64_t k = block * BLOCK, left = m->k - k < BLOCK ? m->k - k : BLOCK;
            FUNCTION(scales)(w, to->g, k, scales);
            FUNCTION(zeros)(w, to->g, k, offsets);
            for (int64_t i = 0; i < left; i += LANES)
                store_float(offsets + i, subtract(zero_float(), multiply(load_float(offsets + i), load_float(scales + i))));
            for (int i = 0; i < n; i++) {
                const int64_t word = p + i, at = to->g * m->k + k;
                const uint8_t *high = is_split ? m->high + word % n_high * row_bytes + at : NULL;
                dequantize_words(m->words + word * row_bytes + item * at, high, bits, item, left,
                                 7 - (int)(is_split ? word / n_high : 0), scales, offsets, w->tile + i * BLOCK, n * BLOCK);
            }
            FUNCTION(tiles)(w, x + block * tokens * BLOCK, tokens, n * values, ROUND_UP(left, LANES));
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int i = 0; i < n * values; i++) {
                const int64_t row = i / n * n_words + p + i % n;
                if (row < m->group)
                    to->y[t * to->stride + row * w->groups + to->g] =
                        sum_float(load_float(w->sums + (t * TILE_ROWS + i) * LANES));
            }
    }
}

/* The same for rows of plain weights, first <= row < last. */
static INLINE void plain_tiles(const Work *w, const int format, const float *x, int64_t tokens, float *y, int64_t stride,
                               int64_t first, int64_t last) {
    const Matrix *m = w->m;
    const int item = format == FLOAT32 ? 4 : 2;
    for (int64_t row = first; row < last; row += TILE_ROWS) {
        const int n_rows = (int)(last - row < TILE_ROWS ? last - row : TILE_ROWS);
        memset(w->sums, 0, (size_t)tokens * TILE_ROWS * LANES * sizeof(float));
        memset(w->tile, 0, TILE_ROWS * BLOCK * sizeof(float));
        for (int64_t k = 0; k < m->k; k += BLOCK) {
            const int64_t n = m->k - k < BLOCK ? m->k - k : BLOCK;
            for (int i = 0; i < n_rows; i++)
                for (int64_t j = 0; j < n; j += LANES) {
                    uint8_t rest[64];
                    const uint8_t *from = m->words + ((row + i) * m->k + k + j) * item;
                    if (n - j < LANES) from = padded_copy(rest, from, (n - j) * item);
                    store_float(w->tile + i * BLOCK + j, some_weights(from, format));
                }
            FUNCTION(tiles)(w, x + k * tokens, tokens, n_rows, ROUND_UP(n, LANES));
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int i = 0; i < n_rows; i++)
                y[t * stride + row + i] = sum_float(load_float(w->sums + (t * TILE_ROWS + i) * LANES));
    }
}

/* Some tokens' activations as [blocks, tokens, BLOCK]: rows a power of two apart would share lines of the cache. */
static const float *by_blocks(const Work *w, const float *x, int64_t tokens) {
    for (int64_t block = 0; block < w->blocks; block++)
        for (int64_t t = 0; t < tokens; t++)
            memcpy(w->x + (block * tokens + t) * BLOCK, x + t * w->padded + block * BLOCK, BLOCK * sizeof(float));
    return w->x;
}

static INLINE void plain_product(const Work *w, const int format, const float *x, int64_t tokens, float *y, int64_t stride,
                                 int64_t first, int64_t last) {
    if (tokens > MAX_TOKENS) {
        for (int64_t t = 0; t < tokens; t += TILE_TOKENS) {
            const int64_t n = tokens - t < TILE_TOKENS ? tokens - t : TILE_TOKENS;
            plain_tiles(w, format, by_blocks(w, x + t * w->padded, n), n, y + t * stride, stride, first, last);
        }
        return;
    }
    int64_t row = first;
    for (; row + 4 <= last; row += 4)
        for (int64_t t = 0; t < tokens; t++) plain_rows(w->m, format, 4, x + t * w->padded, row, y + t * stride + row);
    for (; row < last; row++)
        for (int64_t t = 0; t < tokens; t++) plain_rows(w->m, format, 1, x + t * w->padded, row, y + t * stride + row);
}

/* ---- entry ----------------------------------------------------------------------------------------------- */

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
