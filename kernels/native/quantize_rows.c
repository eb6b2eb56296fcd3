/* float32 rows -> 8-bit values with a scale and an offset for every group of 32. */
#include "linear_tiles.h"

static void quantize_group(const float *x, int8_t *values, float *scale, int32_t *sum) {
    floats low = magnitude(load_floats(x)), high = magnitude(load_floats(x + LANES));
    float largest = largest_of(maximum(low, high)), total = sum_of(add(low, high));
    if (total != total || largest > 3.4028234e38f) { /* NaN or infinity: the product is NaN in this row, and in no other */
        memset(values, 0, GROUP);
        *scale = __builtin_nanf("");
        *sum = 0;
        return;
    }
    float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    int32_t all = 0;
    for (int i = 0; i < GROUP; i++) {
        int32_t value = (int32_t)__builtin_rintf(x[i] * inverse);
        values[i] = (int8_t)value;
        all += value;
    }
    *scale = largest / 127.0f;
    *sum = all;
}

void quantize_row(const float *x, int inputs, int weight_offset, int8_t *values, float *scales, int32_t *offsets) {
    int whole = inputs / GROUP;
    for (int g = 0; g < whole; g++) quantize_group(x + g * GROUP, values + g * GROUP, scales + g, offsets + g);
    if (whole * GROUP < inputs) {
        float rest[GROUP] = {0};
        memcpy(rest, x + whole * GROUP, (size_t)(inputs - whole * GROUP) * sizeof(float));
        quantize_group(rest, values + whole * GROUP, scales + whole, offsets + whole);
        whole++;
    }
    for (int g = 0; g < whole; g++) offsets[g] *= -weight_offset;
}
