/* Scores and weighted values of a few query rows: register tiles of 6 rows (AVX-512) or 4. */
#ifndef ATTENTION_TILE_H
#define ATTENTION_TILE_H

#include "attention.h"
#include "linear_tiles.h"

#define CHUNK_BLOCKS 4 /* blocks of keys whose scores are kept at once */
#define CHUNK (CHUNK_BLOCKS * KV_BLOCK)

INLINE floats load_kv(const void *from, int64_t at, const int type) {
    if (type == KV_FLOAT32) return load_floats((const float *)from + at);
    if (type == KV_BFLOAT16) return load_bf16((const uint16_t *)from + at);
    if (type == KV_FLOAT16) return load_fp16((const uint16_t *)from + at);
    return load_int8((const int8_t *)from + at);
}

/* scores[m][0 .. 15] = q[m] . keys of a block, for `rows` rows. keys: [head_dim][KV_BLOCK], at an offset in elements. */
INLINE void score_tile(const float *q, int64_t stride, const void *keys, int64_t at, const float *scales, int head_dim,
                       float *scores, const int rows, const int type) {
    floats total[MAX_TILE_ROWS];
    for (int m = 0; m < rows; m++) total[m] = set_all(0);
#pragma GCC unroll 4
    for (int d = 0; d < head_dim; d++) {
        floats k = load_kv(keys, at + (int64_t)d * KV_BLOCK, type);
        for (int m = 0; m < rows; m++) total[m] = multiply_add(k, set_all(q[m * stride + d]), total[m]);
    }
    for (int m = 0; m < rows; m++) {
        floats v = type == KV_INT8 ? multiply(total[m], load_floats(scales)) : total[m];
        store_floats(scores + m * CHUNK, v);
    }
}

/* out[m][d .. d + 31] += sum over `tokens` of weights[m][t] * values of a block. values: [KV_BLOCK][head_dim]. */
INLINE void value_tile(const float *weights, const void *values, int64_t at, int head_dim, int d, int wide, int tokens,
                       float *out, int64_t stride, const int rows, const int type) {
    floats one[MAX_TILE_ROWS], two[MAX_TILE_ROWS];
    for (int m = 0; m < rows; m++) {
        one[m] = load_floats(out + m * stride + d);
        two[m] = wide ? load_floats(out + m * stride + d + LANES) : set_all(0);
    }
    for (int t = 0; t < tokens; t++) {
        int64_t from = at + (int64_t)t * head_dim + d;
        floats v = load_kv(values, from, type), w = wide ? load_kv(values, from + LANES, type) : set_all(0);
        for (int m = 0; m < rows; m++) {
            floats p = set_all(weights[m * CHUNK + t]);
            one[m] = multiply_add(v, p, one[m]);
            two[m] = multiply_add(w, p, two[m]);
        }
    }
    for (int m = 0; m < rows; m++) {
        store_floats(out + m * stride + d, one[m]);
        if (wide) store_floats(out + m * stride + d + LANES, two[m]);
    }
}

#endif
