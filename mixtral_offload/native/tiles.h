/* Plain weights, and many tokens: tiles of dequantized weights in the processor's cache. See products.h. */

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
