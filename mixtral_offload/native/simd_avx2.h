/* AVX2 with FMA and F16C: 32 bytes in a vector. */
#include <immintrin.h>
#include <string.h>

#define BYTES 32
typedef __m256i vh; /* 16 int16 or 32 int8 */
typedef __m256i vi; /* 8 int32 */
typedef __m256 vf;  /* 8 fp32 */

static INLINE vh load_words(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static INLINE void store_words(void *p, vh v) { _mm256_storeu_si256((__m256i *)p, v); }
static INLINE vh bits_and(vh a, vh b) { return _mm256_and_si256(a, b); }
static INLINE vh bits_or(vh a, vh b) { return _mm256_or_si256(a, b); }
static INLINE vh mask16(int mask) { return _mm256_set1_epi16((short)mask); }
static INLINE vh mask8(int mask) { return _mm256_set1_epi8((char)mask); }
#define shift_right16(v, n) _mm256_srli_epi16(v, n)
#define shift_left16(v, n) _mm256_slli_epi16(v, n)
#define shift_right32(v, n) _mm256_srli_epi32(v, n)
#define shift_left32(v, n) _mm256_slli_epi32(v, n)
/* the low halves of 32 bits from a, the high ones from b */
static INLINE vh low_high(vh a, vh b) { return _mm256_blend_epi16(a, b, 0xaa); }

static INLINE vi zero_int(void) { return _mm256_setzero_si256(); }
static INLINE vi dot16(vi sum, vh a, vh t) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, t)); }
/* unsigned bytes times signed ones; the sum is in int16 until widen() */
static INLINE vi dot8(vi sum, vh q, vh t) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(q, t)); }
static INLINE vi widen(vi sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#define DOT8_LIMIT 32767 /* of the sum that dot8 may reach */

static INLINE vf zero_float(void) { return _mm256_setzero_ps(); }
static INLINE vf set_float(float x) { return _mm256_set1_ps(x); }
static INLINE vf load_float(const float *p) { return _mm256_loadu_ps(p); }
static INLINE void store_float(float *p, vf v) { _mm256_storeu_ps(p, v); }
static INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
static INLINE vf subtract(vf a, vf b) { return _mm256_sub_ps(a, b); }
static INLINE vf multiply(vf a, vf b) { return _mm256_mul_ps(a, b); }
static INLINE vf divide(vf a, vf b) { return _mm256_div_ps(a, b); }
static INLINE vf multiply_add(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static INLINE vf maximum(vf a, vf b) { return _mm256_max_ps(a, b); }
static INLINE vf minimum(vf a, vf b) { return _mm256_min_ps(a, b); }
static INLINE vf absolute(vf a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
static INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
static INLINE vi to_int(vf a) { return _mm256_cvtps_epi32(a); } /* to nearest, ties to even */
static INLINE vi add_int(vi a, vi b) { return _mm256_add_epi32(a, b); }
static INLINE vf as_float(vi a) { return _mm256_castsi256_ps(a); }
static INLINE vi set_int(int x) { return _mm256_set1_epi32(x); }
static INLINE vf float_of_bytes(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
/* (8 bytes, or words, >> shift) & mask as floats */
static INLINE vi int_of_bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static INLINE vi int_shift_right(vi v, int n) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(n)); }
static INLINE vf float_of_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static INLINE vf float_of_bfloat(const uint16_t *p) {
    return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static INLINE float sum_float(vf v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
/* 32 ints in their order -> int16, those of even columns and those of odd ones */
static INLINE void even_odd(const vi q[4], vh *even, vh *odd) {
#define EVEN(v) _mm256_srai_epi32(_mm256_slli_epi32(v, 16), 16)
    const vi order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* of pairs, after packing by halves twice */
    vh a = _mm256_packs_epi32(q[0], q[1]), b = _mm256_packs_epi32(q[2], q[3]);
    *even = _mm256_permutevar8x32_epi32(_mm256_packs_epi32(EVEN(a), EVEN(b)), order);
    *odd = _mm256_permutevar8x32_epi32(_mm256_packs_epi32(_mm256_srai_epi32(a, 16), _mm256_srai_epi32(b, 16)), order);
#undef EVEN
}
/* 16 ints: the first 8 columns in the low halves of 32 bits, the other 8 in the high ones */
static INLINE vh halves(vi a, vi b) { return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa); }
/* 32 ints in their order -> int8 */
static INLINE vh pack8(const vi q[4]) {
    vh v = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
static INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
/* the largest absolute values, compared as integers: a value that is not a number is the largest of all */
static INLINE vi max_bits(vi a, vf x) { return _mm256_max_epi32(a, _mm256_castps_si256(absolute(x))); }
static INLINE float largest_of_bits(vi a) {
    __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(b));
}
static INLINE vi as_int(vf a) { return _mm256_castps_si256(a); }
static INLINE vi int_and(vi a, vi b) { return _mm256_and_si256(a, b); }
#define int_shift_left(v, n) _mm256_slli_epi32(v, n)
/* any unsigned bytes times signed ones, the sum in int32 */
static INLINE vi dot8_wide(vi sum, vh q, vh t) {
    vi even = _mm256_madd_epi16(bits_and(q, mask16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(t, 8), 8));
    return add_int(add_int(sum, even), _mm256_madd_epi16(shift_right16(q, 8), _mm256_srai_epi16(t, 8)));
}
/* tokens of one step of a tile: 4 rows times this many sums, and as many activations, in 16 registers */
#define TILE_WIDTH 3
