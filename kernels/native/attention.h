/* Attention of a step's rows over a KV cache in blocks. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#define KV_BLOCK 16 /* tokens of a block */

enum kv_type { KV_FLOAT32 = 0, KV_BFLOAT16 = 1, KV_FLOAT16 = 2, KV_INT8 = 3 };

/* Keys are [blocks][kv_heads][head_dim][KV_BLOCK], values [blocks][kv_heads][KV_BLOCK][head_dim]; with 8 bits there is a
 * float32 scale for each token and head, [blocks][kv_heads][KV_BLOCK]. All pointers are to one layer. */
struct kv_layer {
    void *keys, *values;
    float *key_scales, *value_scales;
};

/* Rows first[s] .. first[s + 1] - 1 are the last tokens of the `lengths[s]` tokens of a sequence, whose token i lies in
 * block tables[s * max_blocks + i / KV_BLOCK]. Tokens below two_way[s] see each other in both directions. */
struct attention_step {
    int32_t rows, spans, heads, kv_heads, head_dim, kv_type, max_blocks;
    const int32_t *first, *lengths, *two_way, *tables;
};

size_t attention_workspace(const struct attention_step *step);

/* Store the rows' keys and values. k, v: [rows][kv_heads][head_dim] float32 with row strides in elements. */
void store_keys_values(const struct attention_step *step, const struct kv_layer *layer, const float *k, const float *v,
                       int64_t stride);

/* q: [rows][heads][head_dim], out: the same; float32 with row strides. window: 0, or how many tokens a row sees. */
void attention_forward(const struct attention_step *step, const struct kv_layer *layer, const float *q, int64_t q_stride,
                       float *out, int64_t out_stride, float scale, int window, void *workspace);

#endif
