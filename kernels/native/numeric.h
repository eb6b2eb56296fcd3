/* Conversions between number formats, and exp, for scalar code and for loops that the compiler vectorises. */
#ifndef NUMERIC_H
#define NUMERIC_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float bf16_to_float(uint16_t value) { return float_of_bits((uint32_t)value << 16); }

/* Rounds to nearest even; NaN stays NaN. */
static inline uint16_t float_to_bf16(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

/* Denormals included. */
static inline float fp16_to_float(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, exponent = (value >> 10) & 31, fraction = value & 0x3ff;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) {
        float small = (float)fraction * 5.9604644775390625e-8f; /* 2^-24 */
        return sign ? -small : small;
    }
    return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

/* Rounds to nearest even; too large becomes infinity. */
static inline uint16_t float_to_fp16(float value) {
    uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) {
        float scaled = float_of_bits(rest) * 16777216.0f; /* 2^24: an integer below 1024 after rounding */
        return (uint16_t)(sign | (uint32_t)__builtin_rintf(scaled));
    }
    uint32_t rounded = rest + 0xfff + ((rest >> 13) & 1);
    return (uint16_t)(sign | (rounded - 0x38000000) >> 13);
}

/* exp(x) within 2 units of the last place; 0 below -87, infinity above 88.7, NaN for NaN. */
static inline float exp_float(float x) {
    float clamped = x < -87.33654f ? -87.33654f : x > 88.72283f ? 88.72283f : x;
    float n = __builtin_rintf(clamped * 1.44269504f);
    float f = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    float result = p * float_of_bits((uint32_t)((int32_t)n + 127) << 23);
    result = x > 88.72283f ? __builtin_inff() : result;
    result = x < -87.33654f ? 0.0f : result;
    return x != x ? x : result;
}

#endif
