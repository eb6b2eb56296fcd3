/* Rows of keys and values -> the blocks of their sequences, in the cache's number format. */
#include "attention.h"
#include "parallel.h"
#include "simd.h"

struct storing {
    const struct attention_step *step;
    const struct kv_layer *layer;
    const float *k, *v;
    int64_t stride;
};

static void store_number(void *memory, int64_t at, float value, int type) {
    if (type == KV_FLOAT32) ((float *)memory)[at] = value;
    else if (type == KV_BFLOAT16) ((uint16_t *)memory)[at] = float_to_bf16(value);
    else ((uint16_t *)memory)[at] = float_to_fp16(value);
}

/* 8 bits with the vector's own scale, which is NaN if one of its numbers is not finite. */
static float scale_of(const float *from, int dim) {
    float largest = 0, total = 0;
    for (int d = 0; d < dim; d++) {
        float magnitude = __builtin_fabsf(from[d]);
        largest = magnitude > largest ? magnitude : largest;
        total += magnitude - magnitude; /* NaN for infinity and NaN */
    }
    return total != 0 || total != total ? __builtin_nanf("") : largest / 127.0f;
}

static void store_vector(void *memory, float *scales, int64_t block, int slot, const float *from, int dim, int type,
                         int is_key) {
    int64_t base = block * dim * KV_BLOCK;
    if (type == KV_INT8) {
        float scale = scale_of(from, dim), inverse = scale > 0 ? 1.0f / scale : 0.0f;
        scales[block * KV_BLOCK + slot] = scale;
        for (int d = 0; d < dim; d++) {
            int64_t at = is_key ? base + (int64_t)d * KV_BLOCK + slot : base + (int64_t)slot * dim + d;
            ((int8_t *)memory)[at] = (int8_t)__builtin_rintf(scale > 0 ? from[d] * inverse : 0.0f);
        }
        return;
    }
    for (int d = 0; d < dim; d++)
        store_number(memory, is_key ? base + (int64_t)d * KV_BLOCK + slot : base + (int64_t)slot * dim + d, from[d], type);
}

static void store_span(void *context, int span) {
    const struct storing *s = context;
    const struct attention_step *step = s->step;
    const int32_t *table = step->tables + (int64_t)span * step->max_blocks;
    int begin = step->lengths[span] - (step->first[span + 1] - step->first[span]);
    for (int row = step->first[span]; row < step->first[span + 1]; row++) {
        int index = begin + row - step->first[span], slot = index % KV_BLOCK;
        for (int head = 0; head < step->kv_heads; head++) {
            int64_t block = (int64_t)table[index / KV_BLOCK] * step->kv_heads + head;
            int64_t at = row * s->stride + (int64_t)head * step->head_dim;
            store_vector(s->layer->keys, s->layer->key_scales, block, slot, s->k + at, step->head_dim, step->kv_type, 1);
            store_vector(s->layer->values, s->layer->value_scales, block, slot, s->v + at, step->head_dim, step->kv_type,
                         0);
        }
    }
}

void store_keys_values(const struct attention_step *step, const struct kv_layer *layer, const float *k, const float *v,
                       int64_t stride) {
    struct storing s = {step, layer, k, v, stride};
    if (step->spans == 1 || step->rows < 8) {
        for (int span = 0; span < step->spans; span++) store_span(&s, span);
    } else {
        parallel_for(step->spans, store_span, &s);
    }
}
