/* Tiles of products with float32, bfloat16 and float16 weights, in float32 arithmetic.
 *
 * With AVX512_BF16, many rows are multiplied in bfloat16: twice the rate, and the weights have no more digits. Few rows
 * are bound by memory, and keep activations in float32.
 */
#include "linear_tiles.h"

INLINE void float_tile(const struct linear *linear, int block, const struct activations *a, int first, struct results out,
                       const int rows, const int blocks, const int is_half) {
    const int64_t block_size = (int64_t)a->inputs * BLOCK_OUTPUTS;
    const float *whole = (const float *)linear->weights + block * block_size;
    const uint16_t *half = (const uint16_t *)linear->weights + block * block_size;
    floats total[MAX_TILE_ROWS][MAX_TILE_BLOCKS];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++) total[m][b] = set_all(0);
#pragma GCC unroll 4
    for (int k = 0; k < a->inputs; k++) {
        for (int b = 0; b < blocks; b++) {
            const int64_t at = b * block_size + (int64_t)k * BLOCK_OUTPUTS;
            if (is_half) {
                if (k % 2 == 0) prefetch((const char *)(half + at) + PREFETCH_BYTES);
            } else {
                prefetch((const char *)(whole + at) + PREFETCH_BYTES);
            }
            floats w = is_half ? load_fp16(half + at) : load_floats(whole + at);
            for (int m = 0; m < rows; m++)
                total[m][b] = multiply_add(w, set_all(a->values[(first + m) * a->stride + k]), total[m][b]);
        }
    }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) put(linear, out, first + m, block + b, total[m][b]);
}

INLINE void bf16_tile(const struct linear *linear, int block, const struct activations *a, int first, struct results out,
                      const int rows, const int blocks) {
    const int64_t block_size = (int64_t)a->inputs * BLOCK_OUTPUTS;
    const uint16_t *weights = (const uint16_t *)linear->weights + block * block_size;
    floats total[MAX_TILE_ROWS][MAX_TILE_BLOCKS];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++) total[m][b] = set_all(0);
#pragma GCC unroll 2
    for (int k = 0; k < a->inputs; k += 2) {
        for (int b = 0; b < blocks; b++) {
            const uint16_t *from = weights + b * block_size + (int64_t)k * BLOCK_OUTPUTS;
            prefetch((const char *)from + PREFETCH_BYTES);
            floats one = load_first_bf16(from), two = load_second_bf16(from);
            for (int m = 0; m < rows; m++) {
                const float *x = a->values + (first + m) * a->stride + k;
                total[m][b] = multiply_add(one, set_all(x[0]), total[m][b]);
                total[m][b] = multiply_add(two, set_all(x[1]), total[m][b]);
            }
        }
    }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) put(linear, out, first + m, block + b, total[m][b]);
}

#if defined(__AVX512BF16__)
INLINE void dot_bf16_tile(const struct linear *linear, int block, const struct activations *a, int first,
                          struct results out, const int rows, const int blocks) {
    const int64_t block_size = (int64_t)a->inputs * BLOCK_OUTPUTS;
    const uint16_t *weights = (const uint16_t *)linear->weights + block * block_size;
    floats total[MAX_TILE_ROWS][MAX_TILE_BLOCKS];
    for (int m = 0; m < rows; m++)
        for (int b = 0; b < blocks; b++) total[m][b] = set_all(0);
#pragma GCC unroll 4
    for (int k = 0; k < a->inputs; k += 2) {
        for (int b = 0; b < blocks; b++) {
            const uint16_t *from = weights + b * block_size + (int64_t)k * BLOCK_OUTPUTS;
            prefetch((const char *)from + PREFETCH_BYTES);
            __m512bh w = (__m512bh)_mm512_loadu_si512(from);
            for (int m = 0; m < rows; m++) {
                int32_t pair;
                memcpy(&pair, a->bf16 + (first + m) * a->stride + k, 4);
                total[m][b] = _mm512_dpbf16_ps(total[m][b], w, (__m512bh)_mm512_set1_epi32(pair));
            }
        }
    }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) put(linear, out, first + m, block + b, total[m][b]);
}
#endif

void tile_float32(const struct linear *linear, int block, int blocks, const struct activations *a, int first, int rows,
                  struct results out) {
#define TILE_FLOAT32(n, width) float_tile(linear, block, a, first, out, n, width, 0)
    BY_ROWS(rows, TILE_FLOAT32)
}

void tile_float16(const struct linear *linear, int block, int blocks, const struct activations *a, int first, int rows,
                  struct results out) {
#define TILE_FLOAT16(n, width) float_tile(linear, block, a, first, out, n, width, 1)
    BY_ROWS(rows, TILE_FLOAT16)
}

void tile_bfloat16(const struct linear *linear, int block, int blocks, const struct activations *a, int first, int rows,
                   struct results out) {
#define TILE_BFLOAT16(n, width) bf16_tile(linear, block, a, first, out, n, width)
#if defined(__AVX512BF16__)
#define TILE_DOT(n, width) dot_bf16_tile(linear, block, a, first, out, n, width)
    if (a->bf16) {
        BY_ROWS(rows, TILE_DOT)
        return;
    }
#endif
    BY_ROWS(rows, TILE_BFLOAT16)
}
