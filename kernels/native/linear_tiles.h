/* What the product kernels share: activations in the workspace, the result of a tile, tiles of a fixed number of rows. */
#ifndef LINEAR_TILES_H
#define LINEAR_TILES_H

#include "linear.h"
#include "simd.h"

/* A tile's rows and output blocks: so many that its sums, the weights and a factor stay in registers, and that an
 * activation is used twice once it is loaded. */
#if defined(__AVX512F__)
#define MAX_TILE_ROWS 6
#define MAX_TILE_BLOCKS 4
#define TILE_BLOCKS(rows) ((rows) <= 3 ? 4 : 2)
#else
#define MAX_TILE_ROWS 4
#define MAX_TILE_BLOCKS 1
#define TILE_BLOCKS(rows) ((void)(rows), 1)
#endif
#define PREFETCH_BYTES 2048
#define AMX_ROWS 32 /* of tile_amx, which computes two blocks */
#define AMX_QUANTIZED_ROWS 512

/* The rows of one product, as a kernel reads them. */
struct activations {
    const float *values;    /* 32- and 16-bit weights: [rows][stride] */
    const uint16_t *bf16;   /* the same in bfloat16, where that is multiplied; else NULL */
    const int8_t *quantized; /* 8- and 4-bit weights: [rows][stride] */
    const float *scales;    /* of the groups: [rows][groups] */
    const int32_t *offsets; /* what the weights' offset adds to a group's sum, negated: [rows][groups] */
    int64_t stride;         /* elements from row to row */
    int groups, inputs;     /* inputs: padded */
};

/* Where a tile's results go. */
struct results {
    float *y;
    int64_t stride;
};

/* Computes `rows` rows from `first` on for `blocks` neighbouring blocks of outputs. */
typedef void (*tile_function)(const struct linear *linear, int block, int blocks, const struct activations *a, int first,
                              int rows, struct results out);

void tile_float32(const struct linear *, int, int, const struct activations *, int, int, struct results);
void tile_bfloat16(const struct linear *, int, int, const struct activations *, int, int, struct results);
void tile_float16(const struct linear *, int, int, const struct activations *, int, int, struct results);
void tile_amx(const struct linear *, int, int, const struct activations *, int, int, struct results); /* of a->bf16 */
void tile_amx_quantized(const struct linear *, int, int, const struct activations *, int, int, struct results);
void tile_int8(const struct linear *, int, int, const struct activations *, int, int, struct results);
void tile_int4(const struct linear *, int, int, const struct activations *, int, int, struct results);

/* Rounds a row to 8 bits with a scale for every group; NaN and infinity make the group's scale NaN.
 * offsets: minus `weight_offset` times the sum of each group. */
void quantize_row(const float *x, int inputs, int weight_offset, int8_t *values, float *scales, int32_t *offsets);

INLINE void put(const struct linear *linear, struct results out, int row, int block, floats v) {
    int first = block * BLOCK_OUTPUTS, left = linear->outputs - first;
    if (linear->bias) v = add(v, load_floats(linear->bias + first));
    float *to = out.y + row * out.stride + first;
    if (left >= BLOCK_OUTPUTS) {
        store_floats(to, v);
    } else {
        float part[BLOCK_OUTPUTS];
        store_floats(part, v);
        memcpy(to, part, (size_t)left * sizeof(float));
    }
}

/* Calls TILE(rows, blocks) with constants, so that sums stay in registers: more blocks for few rows. */
#define ROWS_CASE(n, TILE)                                                                                             \
    case n:                                                                                                            \
        if (blocks == TILE_BLOCKS(n)) {                                                                                \
            TILE(n, TILE_BLOCKS(n));                                                                                   \
        } else {                                                                                                       \
            for (int b = 0; b < blocks; b++, block++) { TILE(n, 1); }                                                  \
        }                                                                                                              \
        break;
#if defined(__AVX512F__)
#define MORE_CASES(TILE) ROWS_CASE(5, TILE) ROWS_CASE(6, TILE)
#else
#define MORE_CASES(TILE)
#endif
#define BY_ROWS(rows, TILE)                                                                                            \
    switch (rows) {                                                                                                    \
        ROWS_CASE(1, TILE) ROWS_CASE(2, TILE) ROWS_CASE(3, TILE) ROWS_CASE(4, TILE) MORE_CASES(TILE)                   \
    }

#endif
