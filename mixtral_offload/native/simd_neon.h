/* NEON of every 64-bit ARM: 16 bytes in a vector. */
#include <arm_neon.h>
#include <string.h>

#define BYTES 16
typedef int16x8_t vh;
typedef int32x4_t vi;
typedef float32x4_t vf;

static INLINE vh load_words(const void *p) { return vreinterpretq_s16_u8(vld1q_u8((const uint8_t *)p)); }
static INLINE void store_words(void *p, vh v) { vst1q_u8((uint8_t *)p, vreinterpretq_u8_s16(v)); }
static INLINE vh bits_and(vh a, vh b) { return vandq_s16(a, b); }
static INLINE vh bits_or(vh a, vh b) { return vorrq_s16(a, b); }
static INLINE vh mask16(int mask) { return vdupq_n_s16((int16_t)mask); }
static INLINE vh mask8(int mask) { return vreinterpretq_s16_u8(vdupq_n_u8((uint8_t)mask)); }
static INLINE vh shift_right16(vh v, int n) {
    return vreinterpretq_s16_u16(vshlq_u16(vreinterpretq_u16_s16(v), vdupq_n_s16((int16_t)-n)));
}
static INLINE vh shift_left16(vh v, int n) { return vshlq_s16(v, vdupq_n_s16((int16_t)n)); }
#define shift_right32(v, n) vreinterpretq_s16_u32(vshrq_n_u32(vreinterpretq_u32_s16(v), n))
#define shift_left32(v, n) vreinterpretq_s16_u32(vshlq_n_u32(vreinterpretq_u32_s16(v), n))
static INLINE vh low_high(vh a, vh b) {
    return vbslq_s16(vreinterpretq_u16_u32(vdupq_n_u32(0x0000ffff)), a, b);
}

static INLINE vi zero_int(void) { return vdupq_n_s32(0); }
static INLINE vi dot16(vi sum, vh a, vh t) {
    sum = vmlal_s16(sum, vget_low_s16(a), vget_low_s16(t));
    return vmlal_high_s16(sum, a, t);
}
static INLINE vi dot8(vi sum, vh q, vh t) { /* values of q are below 128 */
    int8x16_t a = vreinterpretq_s8_s16(q), b = vreinterpretq_s8_s16(t);
    sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    return vpadalq_s16(sum, vmull_high_s8(a, b));
}
static INLINE vi widen(vi sum) { return sum; }
#define DOT8_LIMIT 0x7fffffff

static INLINE vf zero_float(void) { return vdupq_n_f32(0); }
static INLINE vf set_float(float x) { return vdupq_n_f32(x); }
static INLINE vf load_float(const float *p) { return vld1q_f32(p); }
static INLINE void store_float(float *p, vf v) { vst1q_f32(p, v); }
static INLINE vf add(vf a, vf b) { return vaddq_f32(a, b); }
static INLINE vf subtract(vf a, vf b) { return vsubq_f32(a, b); }
static INLINE vf multiply(vf a, vf b) { return vmulq_f32(a, b); }
static INLINE vf divide(vf a, vf b) { return vdivq_f32(a, b); }
static INLINE vf multiply_add(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static INLINE vf maximum(vf a, vf b) { return vmaxq_f32(a, b); }
static INLINE vf minimum(vf a, vf b) { return vminq_f32(a, b); }
static INLINE vf absolute(vf a) { return vabsq_f32(a); }
static INLINE vf to_float(vi a) { return vcvtq_f32_s32(a); }
static INLINE vi to_int(vf a) { return vcvtnq_s32_f32(a); }
static INLINE vi add_int(vi a, vi b) { return vaddq_s32(a, b); }
static INLINE vf as_float(vi a) { return vreinterpretq_f32_s32(a); }
static INLINE vi set_int(int x) { return vdupq_n_s32(x); }
static INLINE vi int_of_bytes(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
}
static INLINE vf float_of_bytes(const uint8_t *p) { return vcvtq_f32_s32(int_of_bytes(p)); }
static INLINE vi int_shift_right(vi v, int n) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-n)));
}
static INLINE vf float_of_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static INLINE vf float_of_bfloat(const uint16_t *p) { return as_float(vreinterpretq_s32_u32(vshll_n_u16(vld1_u16(p), 16))); }
static INLINE float sum_float(vf v) { return vaddvq_f32(v); }
static INLINE void even_odd(const vi q[4], vh *even, vh *odd) {
    int16x8_t a = vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1])), b = vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3]));
    *even = vuzp1q_s16(a, b);
    *odd = vuzp2q_s16(a, b);
}
static INLINE vh halves(vi a, vi b) {
    return low_high(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(vshlq_n_s32(b, 16)));
}
static INLINE vh pack8(const vi q[4]) {
    int8x8_t a = vmovn_s16(vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1])));
    int8x8_t b = vmovn_s16(vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3])));
    return vreinterpretq_s16_s8(vcombine_s8(a, b));
}
static INLINE float half_to_float(uint16_t h) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}
static INLINE vi max_bits(vi a, vf x) { return vmaxq_s32(a, vreinterpretq_s32_f32(absolute(x))); }
static INLINE float largest_of_bits(vi a) { return vgetq_lane_f32(vreinterpretq_f32_s32(vdupq_n_s32(vmaxvq_s32(a))), 0); }
static INLINE vi as_int(vf a) { return vreinterpretq_s32_f32(a); }
static INLINE vi int_and(vi a, vi b) { return vandq_s32(a, b); }
#define int_shift_left(v, n) vshlq_n_s32(v, n)
static INLINE vi dot8_wide(vi sum, vh q, vh t) {
    uint8x16_t a = vreinterpretq_u8_s16(q);
    int8x16_t b = vreinterpretq_s8_s16(t);
    int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(a))), high = vreinterpretq_s16_u16(vmovl_high_u8(a));
    return dot16(dot16(sum, low, vmovl_s8(vget_low_s8(b))), high, vmovl_high_s8(b));
}
#define TILE_WIDTH 4 /* 32 registers */
