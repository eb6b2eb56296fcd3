/* Sixteen floats at once: one AVX-512 register, two of AVX2, or an array that the compiler vectorises. */
#ifndef SIMD_H
#define SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "numeric.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

/* The next multiple of a cache line, for the parts of a workspace. */
INLINE size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

INLINE void prefetch(const void *address) { __builtin_prefetch(address, 0, 3); }

#if defined(__AVX512F__)

typedef __m512 floats;

INLINE floats set_all(float value) { return _mm512_set1_ps(value); }
INLINE floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store_floats(float *to, floats v) { _mm512_storeu_ps(to, v); }
INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
INLINE floats multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats maximum(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE float sum_of(floats v) { return _mm512_reduce_add_ps(v); }
INLINE float largest_of(floats v) { return _mm512_reduce_max_ps(v); }
INLINE floats magnitude(floats v) { return _mm512_abs_ps(v); }
INLINE floats load_bf16(const uint16_t *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE floats load_fp16(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE floats load_int8(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
/* 16 pairs of bf16: the first of each, the second of each. */
INLINE floats load_first_bf16(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(from), 16));
}
INLINE floats load_second_bf16(const uint16_t *from) {
    __m512i mask = _mm512_set1_epi32((int)0xffff0000);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from), mask));
}

#elif defined(__AVX2__)

typedef struct {
    __m256 low, high;
} floats;

INLINE floats set_all(float value) { return (floats){_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
INLINE floats load_floats(const float *from) { return (floats){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE void store_floats(float *to, floats v) {
    _mm256_storeu_ps(to, v.low);
    _mm256_storeu_ps(to + 8, v.high);
}
INLINE floats add(floats a, floats b) {
    return (floats){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
INLINE floats multiply(floats a, floats b) {
    return (floats){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
INLINE floats multiply_add(floats a, floats b, floats c) {
    return (floats){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE floats maximum(floats a, floats b) {
    return (floats){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
INLINE float sum_of(floats v) {
    __m256 eight = _mm256_add_ps(v.low, v.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE float largest_of(floats v) {
    __m256 eight = _mm256_max_ps(v.low, v.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE floats magnitude(floats v) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (floats){_mm256_andnot_ps(sign, v.low), _mm256_andnot_ps(sign, v.high)};
}
INLINE __m256 widen_bf16(__m128i eight) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}
INLINE floats load_bf16(const uint16_t *from) {
    return (floats){widen_bf16(_mm_loadu_si128((const __m128i *)from)),
                    widen_bf16(_mm_loadu_si128((const __m128i *)(from + 8)))};
}
INLINE floats load_fp16(const uint16_t *from) {
    return (floats){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8)))};
}
INLINE floats load_int8(const int8_t *from) {
    return (floats){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from))),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8))))};
}
INLINE floats load_first_bf16(const uint16_t *from) {
    __m256i low = _mm256_loadu_si256((const __m256i *)from), high = _mm256_loadu_si256((const __m256i *)(from + 16));
    return (floats){_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}
INLINE floats load_second_bf16(const uint16_t *from) {
    __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    __m256i low = _mm256_loadu_si256((const __m256i *)from), high = _mm256_loadu_si256((const __m256i *)(from + 16));
    return (floats){_mm256_castsi256_ps(_mm256_and_si256(low, mask)), _mm256_castsi256_ps(_mm256_and_si256(high, mask))};
}

#else

typedef struct {
    float lane[LANES];
} floats;

#define EACH_LANE for (int i = 0; i < LANES; i++)
INLINE floats set_all(float value) {
    floats r;
    EACH_LANE r.lane[i] = value;
    return r;
}
INLINE floats load_floats(const float *from) {
    floats r;
    memcpy(&r, from, sizeof r);
    return r;
}
INLINE void store_floats(float *to, floats v) { memcpy(to, &v, sizeof v); }
INLINE floats add(floats a, floats b) {
    EACH_LANE a.lane[i] += b.lane[i];
    return a;
}
INLINE floats multiply(floats a, floats b) {
    EACH_LANE a.lane[i] *= b.lane[i];
    return a;
}
INLINE floats multiply_add(floats a, floats b, floats c) {
    EACH_LANE c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}
INLINE floats maximum(floats a, floats b) {
    EACH_LANE a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
INLINE float sum_of(floats v) {
    float total = 0;
    EACH_LANE total += v.lane[i];
    return total;
}
INLINE float largest_of(floats v) {
    float largest = v.lane[0];
    EACH_LANE largest = v.lane[i] > largest ? v.lane[i] : largest;
    return largest;
}
INLINE floats magnitude(floats v) {
    EACH_LANE v.lane[i] = __builtin_fabsf(v.lane[i]);
    return v;
}
INLINE floats load_bf16(const uint16_t *from) {
    floats r;
    EACH_LANE r.lane[i] = bf16_to_float(from[i]);
    return r;
}
INLINE floats load_fp16(const uint16_t *from) {
    floats r;
    EACH_LANE r.lane[i] = fp16_to_float(from[i]);
    return r;
}
INLINE floats load_int8(const int8_t *from) {
    floats r;
    EACH_LANE r.lane[i] = from[i];
    return r;
}
INLINE floats load_first_bf16(const uint16_t *from) {
    floats r;
    EACH_LANE r.lane[i] = bf16_to_float(from[2 * i]);
    return r;
}
INLINE floats load_second_bf16(const uint16_t *from) {
    floats r;
    EACH_LANE r.lane[i] = bf16_to_float(from[2 * i + 1]);
    return r;
}

#endif
#endif
