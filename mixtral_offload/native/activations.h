/* Activations times scales, as small integers. See products.h. */

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
