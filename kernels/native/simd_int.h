/* Dot products of 8-bit and 4-bit weights with 8-bit activations, for 16 output channels at once.
 *
 * Weights are stored with an offset (128 or 8), so that they are unsigned, as the dot-product instructions want them;
 * the offset times the sum of the activations is subtracted again. No sum overflows: without VNNI, 8-bit products are
 * formed as |activation| * (weight with the activation's sign), at most 2 * 127 * 127 in 16 bits, and 4-bit products
 * of a group of 32 are at most 8 * 2 * 15 * 127 = 30,480.
 */
#ifndef SIMD_INT_H
#define SIMD_INT_H

#include "simd.h"

INLINE int32_t four_bytes(const int8_t *from) {
    int32_t value;
    memcpy(&value, from, 4);
    return value;
}

#if defined(__AVX512VNNI__)

typedef __m512i bytes; /* 16 channels x 4 inputs */
typedef __m512i ints;

INLINE bytes load_bytes(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINE ints start_int8(int32_t offset) { return _mm512_set1_epi32(offset); }
INLINE ints start_int4(int32_t offset) { return _mm512_set1_epi32(offset); }
INLINE ints dot_int8(ints total, bytes weights, const int8_t *four) {
    return _mm512_dpbusd_epi32(total, weights, _mm512_set1_epi32(four_bytes(four)));
}
INLINE ints dot_int4(ints total, bytes weights, const int8_t *four) { return dot_int8(total, weights, four); }
INLINE bytes low_half(bytes weights) { return _mm512_and_si512(weights, _mm512_set1_epi8(15)); }
INLINE bytes high_half(bytes weights) {
    return _mm512_and_si512(_mm512_srli_epi16(weights, 4), _mm512_set1_epi8(15));
}
INLINE floats finish_int8(ints total) { return _mm512_cvtepi32_ps(total); }
INLINE floats finish_int4(ints total, int32_t offset) {
    (void)offset;
    return _mm512_cvtepi32_ps(total);
}

#elif defined(__AVX2__)

typedef struct {
    __m256i low, high;
} bytes, ints;

INLINE bytes load_bytes(const uint8_t *from) {
    return (bytes){_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)(from + 32))};
}
INLINE ints start_int8(int32_t offset) {
    (void)offset;
    return (ints){_mm256_setzero_si256(), _mm256_setzero_si256()};
}
INLINE ints start_int4(int32_t offset) { return start_int8(offset); }
INLINE __m256i signed_dot(__m256i total, __m256i weights, __m256i four) {
    __m256i centred = _mm256_xor_si256(weights, _mm256_set1_epi8((char)128));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(four), _mm256_sign_epi8(centred, four));
    return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE ints dot_int8(ints total, bytes weights, const int8_t *four) {
    __m256i value = _mm256_set1_epi32(four_bytes(four));
    return (ints){signed_dot(total.low, weights.low, value), signed_dot(total.high, weights.high, value)};
}
/* total: sums of pairs in 16 bits */
INLINE ints dot_int4(ints total, bytes weights, const int8_t *four) {
    __m256i value = _mm256_set1_epi32(four_bytes(four));
    return (ints){_mm256_add_epi16(total.low, _mm256_maddubs_epi16(weights.low, value)),
                  _mm256_add_epi16(total.high, _mm256_maddubs_epi16(weights.high, value))};
}
INLINE bytes low_half(bytes weights) {
    __m256i mask = _mm256_set1_epi8(15);
    return (bytes){_mm256_and_si256(weights.low, mask), _mm256_and_si256(weights.high, mask)};
}
INLINE bytes high_half(bytes weights) {
    bytes shifted = {_mm256_srli_epi16(weights.low, 4), _mm256_srli_epi16(weights.high, 4)};
    return low_half(shifted);
}
INLINE floats finish_int8(ints total) {
    return (floats){_mm256_cvtepi32_ps(total.low), _mm256_cvtepi32_ps(total.high)};
}
INLINE floats finish_int4(ints total, int32_t offset) {
    __m256i one = _mm256_set1_epi16(1), start = _mm256_set1_epi32(offset);
    return (floats){_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(total.low, one), start)),
                    _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(total.high, one), start))};
}

#else

typedef struct {
    uint8_t byte[4 * LANES];
} bytes;
typedef struct {
    int32_t lane[LANES];
} ints;

INLINE bytes load_bytes(const uint8_t *from) {
    bytes r;
    memcpy(&r, from, sizeof r);
    return r;
}
INLINE ints start_int8(int32_t offset) {
    ints r;
    EACH_LANE r.lane[i] = offset;
    return r;
}
INLINE ints start_int4(int32_t offset) { return start_int8(offset); }
INLINE ints dot_int8(ints total, bytes weights, const int8_t *four) {
    EACH_LANE for (int j = 0; j < 4; j++) total.lane[i] += weights.byte[4 * i + j] * four[j];
    return total;
}
INLINE ints dot_int4(ints total, bytes weights, const int8_t *four) { return dot_int8(total, weights, four); }
INLINE bytes low_half(bytes weights) {
    for (int i = 0; i < 4 * LANES; i++) weights.byte[i] &= 15;
    return weights;
}
INLINE bytes high_half(bytes weights) {
    for (int i = 0; i < 4 * LANES; i++) weights.byte[i] >>= 4;
    return weights;
}
INLINE floats finish_int8(ints total) {
    floats r;
    EACH_LANE r.lane[i] = (float)total.lane[i];
    return r;
}
INLINE floats finish_int4(ints total, int32_t offset) {
    (void)offset;
    return finish_int8(total);
}

#endif
#endif
