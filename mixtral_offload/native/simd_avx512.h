/* AVX-512 F, BW, VL: 64 bytes in a vector; with VNNI, products and sums are one instruction. */
#include <immintrin.h>
#include <string.h>

#define BYTES 64
typedef __m512i vh;
typedef __m512i vi;
typedef __m512 vf;

static INLINE vh load_words(const void *p) { return _mm512_loadu_si512(p); }
static INLINE void store_words(void *p, vh v) { _mm512_storeu_si512(p, v); }
static INLINE vh bits_and(vh a, vh b) { return _mm512_and_si512(a, b); }
static INLINE vh bits_or(vh a, vh b) { return _mm512_or_si512(a, b); }
static INLINE vh mask16(int mask) { return _mm512_set1_epi16((short)mask); }
static INLINE vh mask8(int mask) { return _mm512_set1_epi8((char)mask); }
#define shift_right16(v, n) _mm512_srli_epi16(v, n)
#define shift_left16(v, n) _mm512_slli_epi16(v, n)
#define shift_right32(v, n) _mm512_srli_epi32(v, n)
#define shift_left32(v, n) _mm512_slli_epi32(v, n)
static INLINE vh low_high(vh a, vh b) { return _mm512_mask_blend_epi16(0xaaaaaaaa, a, b); }

static INLINE vi zero_int(void) { return _mm512_setzero_si512(); }
#ifdef USE_VNNI
static INLINE vi dot16(vi sum, vh a, vh t) { return _mm512_dpwssd_epi32(sum, a, t); }
static INLINE vi dot8(vi sum, vh q, vh t) { return _mm512_dpbusd_epi32(sum, q, t); }
static INLINE vi widen(vi sum) { return sum; }
#define DOT8_LIMIT 0x7fffffff
#else
static INLINE vi dot16(vi sum, vh a, vh t) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, t)); }
static INLINE vi dot8(vi sum, vh q, vh t) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(q, t)); }
static INLINE vi widen(vi sum) { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
#define DOT8_LIMIT 32767
#endif

static INLINE vf zero_float(void) { return _mm512_setzero_ps(); }
static INLINE vf set_float(float x) { return _mm512_set1_ps(x); }
static INLINE vf load_float(const float *p) { return _mm512_loadu_ps(p); }
static INLINE void store_float(float *p, vf v) { _mm512_storeu_ps(p, v); }
static INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
static INLINE vf subtract(vf a, vf b) { return _mm512_sub_ps(a, b); }
static INLINE vf multiply(vf a, vf b) { return _mm512_mul_ps(a, b); }
static INLINE vf divide(vf a, vf b) { return _mm512_div_ps(a, b); }
static INLINE vf multiply_add(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static INLINE vf maximum(vf a, vf b) { return _mm512_max_ps(a, b); }
static INLINE vf minimum(vf a, vf b) { return _mm512_min_ps(a, b); }
static INLINE vf absolute(vf a) { return _mm512_abs_ps(a); }
static INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
static INLINE vi to_int(vf a) { return _mm512_cvtps_epi32(a); }
static INLINE vi add_int(vi a, vi b) { return _mm512_add_epi32(a, b); }
static INLINE vf as_float(vi a) { return _mm512_castsi512_ps(a); }
static INLINE vi set_int(int x) { return _mm512_set1_epi32(x); }
static INLINE vi int_of_bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static INLINE vf float_of_bytes(const uint8_t *p) { return _mm512_cvtepi32_ps(int_of_bytes(p)); }
static INLINE vi int_shift_right(vi v, int n) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(n)); }
static INLINE vf float_of_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static INLINE vf float_of_bfloat(const uint16_t *p) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static INLINE float sum_float(vf v) { return _mm512_reduce_add_ps(v); }
static INLINE void even_odd(const vi q[4], vh *even, vh *odd) {
    const vh even_of = _mm512_setr_epi32(0x00020000, 0x00060004, 0x000a0008, 0x000e000c, 0x00120010, 0x00160014,
                                         0x001a0018, 0x001e001c, 0x00220020, 0x00260024, 0x002a0028, 0x002e002c,
                                         0x00320030, 0x00360034, 0x003a0038, 0x003e003c);
    const vh odd_of = _mm512_add_epi16(even_of, _mm512_set1_epi16(1));
    vh a = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(q[0])), _mm512_cvtepi32_epi16(q[1]), 1);
    vh b = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(q[2])), _mm512_cvtepi32_epi16(q[3]), 1);
    *even = _mm512_permutex2var_epi16(a, even_of, b);
    *odd = _mm512_permutex2var_epi16(a, odd_of, b);
}
static INLINE vh halves(vi a, vi b) { return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)); }
static INLINE vh pack8(const vi q[4]) {
    vh v = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(q[0]));
    v = _mm512_inserti32x4(v, _mm512_cvtepi32_epi8(q[1]), 1);
    v = _mm512_inserti32x4(v, _mm512_cvtepi32_epi8(q[2]), 2);
    return _mm512_inserti32x4(v, _mm512_cvtepi32_epi8(q[3]), 3);
}
static INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
static INLINE vi max_bits(vi a, vf x) { return _mm512_max_epi32(a, _mm512_castps_si512(absolute(x))); }
static INLINE float largest_of_bits(vi a) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(a))));
}
static INLINE vi as_int(vf a) { return _mm512_castps_si512(a); }
static INLINE vi int_and(vi a, vi b) { return _mm512_and_si512(a, b); }
#define int_shift_left(v, n) _mm512_slli_epi32(v, n)
static INLINE vi dot8_wide(vi sum, vh q, vh t) {
    vi even = _mm512_madd_epi16(bits_and(q, mask16(0xff)), _mm512_srai_epi16(_mm512_slli_epi16(t, 8), 8));
    return add_int(add_int(sum, even), _mm512_madd_epi16(shift_right16(q, 8), _mm512_srai_epi16(t, 8)));
}
#define TILE_WIDTH 6 /* 32 registers */
