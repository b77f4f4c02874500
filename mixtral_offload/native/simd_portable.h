/* Plain C for little-endian processors of any kind: 16 bytes in a vector, which compilers map to what there is. */
#include <math.h>
#include <string.h>

#define BYTES 16
#define EACH(n) for (int i = 0; i < (n); i++)
typedef struct { uint16_t v[8]; } vh;
typedef struct { int32_t v[4]; } vi;
typedef struct { float v[4]; } vf;

static INLINE vh load_words(const void *p) { vh r; memcpy(&r, p, 16); return r; }
static INLINE void store_words(void *p, vh v) { memcpy(p, &v, 16); }
static INLINE vh bits_and(vh a, vh b) { EACH(8) a.v[i] &= b.v[i]; return a; }
static INLINE vh bits_or(vh a, vh b) { EACH(8) a.v[i] |= b.v[i]; return a; }
static INLINE vh mask16(int mask) { vh r; EACH(8) r.v[i] = (uint16_t)mask; return r; }
static INLINE vh mask8(int mask) { vh r; EACH(8) r.v[i] = (uint16_t)(mask | mask << 8); return r; }
static INLINE vh shift_right16(vh a, int n) { EACH(8) a.v[i] = (uint16_t)(a.v[i] >> n); return a; }
static INLINE vh shift_left16(vh a, int n) { EACH(8) a.v[i] = (uint16_t)(a.v[i] << n); return a; }
static INLINE vh shift_right32(vh a, int n) {
    uint32_t w[4];
    memcpy(w, &a, 16);
    EACH(4) w[i] >>= n;
    memcpy(&a, w, 16);
    return a;
}
static INLINE vh shift_left32(vh a, int n) {
    uint32_t w[4];
    memcpy(w, &a, 16);
    EACH(4) w[i] <<= n;
    memcpy(&a, w, 16);
    return a;
}
static INLINE vh low_high(vh a, vh b) { EACH(4) a.v[2 * i + 1] = b.v[2 * i + 1]; return a; }

static INLINE vi zero_int(void) { vi r = {{0}}; return r; }
static INLINE vi dot16(vi sum, vh a, vh t) {
    EACH(4) sum.v[i] += (int16_t)a.v[2 * i] * (int16_t)t.v[2 * i] + (int16_t)a.v[2 * i + 1] * (int16_t)t.v[2 * i + 1];
    return sum;
}
static INLINE vi dot8(vi sum, vh q, vh t) {
    EACH(8) {
        int low = (uint8_t)q.v[i] * (int8_t)t.v[i], high = (uint8_t)(q.v[i] >> 8) * (int8_t)(t.v[i] >> 8);
        sum.v[i / 2] += low + high;
    }
    return sum;
}
static INLINE vi widen(vi sum) { return sum; }
#define DOT8_LIMIT 0x7fffffff

static INLINE vf zero_float(void) { vf r = {{0}}; return r; }
static INLINE vf set_float(float x) { vf r; EACH(4) r.v[i] = x; return r; }
static INLINE vf load_float(const float *p) { vf r; memcpy(&r, p, 16); return r; }
static INLINE void store_float(float *p, vf v) { memcpy(p, &v, 16); }
static INLINE vf add(vf a, vf b) { EACH(4) a.v[i] += b.v[i]; return a; }
static INLINE vf subtract(vf a, vf b) { EACH(4) a.v[i] -= b.v[i]; return a; }
static INLINE vf multiply(vf a, vf b) { EACH(4) a.v[i] *= b.v[i]; return a; }
static INLINE vf divide(vf a, vf b) { EACH(4) a.v[i] /= b.v[i]; return a; }
static INLINE vf multiply_add(vf a, vf b, vf c) { EACH(4) c.v[i] += a.v[i] * b.v[i]; return c; }
/* as the instructions: b where one is not a number */
static INLINE vf maximum(vf a, vf b) { EACH(4) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
static INLINE vf minimum(vf a, vf b) { EACH(4) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
static INLINE vf absolute(vf a) { EACH(4) a.v[i] = fabsf(a.v[i]); return a; }
static INLINE vf to_float(vi a) { vf r; EACH(4) r.v[i] = (float)a.v[i]; return r; }
static INLINE vi to_int(vf a) { vi r; EACH(4) r.v[i] = (int32_t)rintf(a.v[i]); return r; }
static INLINE vi add_int(vi a, vi b) { EACH(4) a.v[i] += b.v[i]; return a; }
static INLINE vf as_float(vi a) { vf r; memcpy(&r, &a, 16); return r; }
static INLINE vi set_int(int x) { vi r; EACH(4) r.v[i] = x; return r; }
static INLINE vi int_of_bytes(const uint8_t *p) { vi r; EACH(4) r.v[i] = p[i]; return r; }
static INLINE vf float_of_bytes(const uint8_t *p) { vf r; EACH(4) r.v[i] = p[i]; return r; }
static INLINE vi int_shift_right(vi a, int n) { EACH(4) a.v[i] = (int32_t)((uint32_t)a.v[i] >> n); return a; }
static INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff), bits;
    float f;
    if (rest < 0x0400) { /* zero or subnormal */
        f = (float)rest * 5.9604644775390625e-8f; /* 2^-24 */
        memcpy(&bits, &f, 4);
    } else {
        bits = (rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000);
    }
    bits |= sign;
    memcpy(&f, &bits, 4);
    return f;
}
static INLINE vf float_of_half(const uint16_t *p) { vf r; EACH(4) r.v[i] = half_to_float(p[i]); return r; }
static INLINE vf float_of_bfloat(const uint16_t *p) {
    vi r;
    EACH(4) r.v[i] = (int32_t)((uint32_t)p[i] << 16);
    return as_float(r);
}
static INLINE float sum_float(vf v) { return (v.v[0] + v.v[2]) + (v.v[1] + v.v[3]); }
static INLINE void even_odd(const vi q[4], vh *even, vh *odd) {
    EACH(8) {
        even->v[i] = (uint16_t)q[i / 2].v[i % 2 * 2];
        odd->v[i] = (uint16_t)q[i / 2].v[i % 2 * 2 + 1];
    }
}
static INLINE vh halves(vi a, vi b) {
    vh r;
    EACH(4) {
        r.v[2 * i] = (uint16_t)a.v[i];
        r.v[2 * i + 1] = (uint16_t)b.v[i];
    }
    return r;
}
static INLINE vh pack8(const vi q[4]) {
    vh r;
    EACH(8) r.v[i] = (uint16_t)((uint8_t)q[i / 2].v[i % 2 * 2] | (uint8_t)q[i / 2].v[i % 2 * 2 + 1] << 8);
    return r;
}
static INLINE vi max_bits(vi a, vf x) {
    vi b;
    x = absolute(x);
    memcpy(&b, &x, 16);
    EACH(4) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
static INLINE float largest_of_bits(vi a) {
    float f;
    EACH(4) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
    memcpy(&f, a.v, 4);
    return f;
}
static INLINE vi as_int(vf a) { vi r; memcpy(&r, &a, 16); return r; }
static INLINE vi int_and(vi a, vi b) { EACH(4) a.v[i] &= b.v[i]; return a; }
static INLINE vi int_shift_left(vi a, int n) { EACH(4) a.v[i] = (int32_t)((uint32_t)a.v[i] << n); return a; }
static INLINE vi dot8_wide(vi sum, vh q, vh t) { return dot8(sum, q, t); }
#define TILE_WIDTH 2
#undef EACH
