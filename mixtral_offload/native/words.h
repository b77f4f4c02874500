/* Products of packed words with the integers of activations.h. See products.h. */

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
