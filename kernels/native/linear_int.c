/* Tiles of products with 8-bit and 4-bit weights: see linear.h for the layouts. */
#include "linear_tiles.h"
#include "simd_int.h"

/* The scales of 16 outputs for one group; row scales are applied once at the end. */
#define GROUP_SCALE(scales, g, width) load_bf16((scales) + (int64_t)(g) * (width))

INLINE void int8_tile(const struct linear *linear, int block, const struct activations *a, int first, struct results out,
                      const int rows, const int blocks, const int by_row) {
    const int64_t block_bytes = (int64_t)a->inputs * BLOCK_OUTPUTS, groups = a->groups;
    const uint8_t *weights = (const uint8_t *)linear->weights + block * block_bytes;
    const uint16_t *scales = (const uint16_t *)linear->scales + block * groups * BLOCK_OUTPUTS;
    floats total[MAX_TILE_ROWS][MAX_TILE_BLOCKS];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++) total[m][b] = set_all(0);
    for (int g = 0; g < groups; g++) {
        ints part[MAX_TILE_ROWS][MAX_TILE_BLOCKS];
        for (int m = 0; m < rows; m++) {
            int32_t offset = a->offsets[(first + m) * groups + g];
            for (int b = 0; b < blocks; b++) part[m][b] = start_int8(offset);
        }
#pragma GCC unroll 8
        for (int s = 0; s < GROUP / 4; s++) {
            for (int b = 0; b < blocks; b++) {
                const uint8_t *from = weights + b * block_bytes + g * (GROUP * BLOCK_OUTPUTS) + s * 64;
                prefetch(from + PREFETCH_BYTES);
                bytes w = load_bytes(from);
                for (int m = 0; m < rows; m++)
                    part[m][b] = dot_int8(part[m][b], w, a->quantized + (first + m) * a->stride + g * GROUP + s * 4);
            }
        }
        for (int b = 0; b < blocks; b++) {
            floats scale = by_row ? set_all(1) : GROUP_SCALE(scales + b * groups * BLOCK_OUTPUTS, g, BLOCK_OUTPUTS);
            for (int m = 0; m < rows; m++) {
                floats factor = set_all(a->scales[(first + m) * groups + g]);
                if (!by_row) factor = multiply(factor, scale);
                total[m][b] = multiply_add(finish_int8(part[m][b]), factor, total[m][b]);
            }
        }
    }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) {
            floats v = total[m][b];
            if (by_row) v = multiply(v, load_floats((const float *)linear->scales + (block + b) * BLOCK_OUTPUTS));
            put(linear, out, first + m, block + b, v);
        }
}

enum scaling { BY_GROUP, BY_ROW, WITH_MIDDLE };

INLINE void int4_tile(const struct linear *linear, int block, const struct activations *a, int first, struct results out,
                      const int rows, const int blocks, const enum scaling scaling) {
    const int64_t block_bytes = (int64_t)a->inputs * BLOCK_OUTPUTS / 2, groups = a->groups;
    const int width = scaling == WITH_MIDDLE ? 2 * BLOCK_OUTPUTS : BLOCK_OUTPUTS;
    const uint8_t *weights = (const uint8_t *)linear->weights + block * block_bytes;
    const uint16_t *scales = (const uint16_t *)linear->scales + block * groups * width;
    floats total[MAX_TILE_ROWS][MAX_TILE_BLOCKS];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++) total[m][b] = set_all(0);
    for (int g = 0; g < groups; g++) {
        ints part[MAX_TILE_ROWS][MAX_TILE_BLOCKS];
        for (int m = 0; m < rows; m++) {
            int32_t offset = a->offsets[(first + m) * groups + g];
            for (int b = 0; b < blocks; b++) part[m][b] = start_int4(offset);
        }
#pragma GCC unroll 4
        for (int s = 0; s < GROUP / 8; s++) {
            for (int b = 0; b < blocks; b++) {
                const uint8_t *from = weights + b * block_bytes + g * (GROUP * BLOCK_OUTPUTS / 2) + s * 64;
                prefetch(from + PREFETCH_BYTES);
                bytes both = load_bytes(from), low = low_half(both), high = high_half(both);
                for (int m = 0; m < rows; m++) {
                    const int8_t *four = a->quantized + (first + m) * a->stride + g * GROUP + s * 4;
                    part[m][b] = dot_int4(dot_int4(part[m][b], low, four), high, four + GROUP / 2);
                }
            }
        }
        for (int b = 0; b < blocks; b++) {
            const uint16_t *of_group = scales + b * groups * width + (int64_t)g * width;
            floats scale = scaling == BY_ROW ? set_all(1) : load_bf16(of_group);
            floats middle = scaling == WITH_MIDDLE ? load_bf16(of_group + BLOCK_OUTPUTS) : set_all(0);
            for (int m = 0; m < rows; m++) {
                float of_row = a->scales[(first + m) * groups + g];
                int32_t offset = a->offsets[(first + m) * groups + g];
                floats factor = set_all(of_row);
                if (scaling != BY_ROW) factor = multiply(factor, scale);
                total[m][b] = multiply_add(finish_int4(part[m][b], offset), factor, total[m][b]);
                if (scaling == WITH_MIDDLE)
                    total[m][b] = multiply_add(middle, set_all(of_row * (float)offset * -0.125f), total[m][b]);
            }
        }
    }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) {
            floats v = total[m][b];
            if (scaling == BY_ROW) v = multiply(v, load_floats((const float *)linear->scales + (block + b) * BLOCK_OUTPUTS));
            put(linear, out, first + m, block + b, v);
        }
}

void tile_int8(const struct linear *linear, int block, int blocks, const struct activations *a, int first, int rows,
               struct results out) {
#define TILE_INT8(n, width) int8_tile(linear, block, a, first, out, n, width, 0)
#define TILE_INT8_ROW(n, width) int8_tile(linear, block, a, first, out, n, width, 1)
    if (linear->format == FORMAT_INT8) {
        BY_ROWS(rows, TILE_INT8)
    } else {
        BY_ROWS(rows, TILE_INT8_ROW)
    }
}

void tile_int4(const struct linear *linear, int block, int blocks, const struct activations *a, int first, int rows,
               struct results out) {
#define TILE_INT4(n, width) int4_tile(linear, block, a, first, out, n, width, BY_GROUP)
#define TILE_INT4_ROW(n, width) int4_tile(linear, block, a, first, out, n, width, BY_ROW)
#define TILE_INT4_MIDDLE(n, width) int4_tile(linear, block, a, first, out, n, width, WITH_MIDDLE)
    if (linear->format == FORMAT_INT4) {
        BY_ROWS(rows, TILE_INT4)
    } else if (linear->format == FORMAT_INT4_ROW) {
        BY_ROWS(rows, TILE_INT4_ROW)
    } else {
        BY_ROWS(rows, TILE_INT4_MIDDLE)
    }
}
