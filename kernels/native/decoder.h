/* All layers of a GLM or Llama decoder in one call. */
#ifndef DECODER_H
#define DECODER_H

#include "attention.h"
#include "linear.h"

struct decoder_layer {
    struct linear qkv, out, gate_up, down;
    const float *input_norm, *post_norm; /* [hidden] */
};

struct decoder {
    const struct decoder_layer *layers;
    const float *final_norm;
    int32_t num_layers, hidden, inner, heads, kv_heads, head_dim, rotated; /* rotated: channels of each head */
    float epsilon, attention_scale;
};

/* The cache of all layers; strides in bytes from layer to layer. */
struct kv_memory {
    uint8_t *keys, *values;
    float *key_scales, *value_scales; /* NULL unless the cache has 8 bits */
    int64_t layer_bytes, scale_layer_floats;
};

size_t decoder_workspace(const struct decoder *decoder, const struct attention_step *step);

/* hidden: [rows, hidden] float32, the embeddings; the normed hidden states of the last layer when it returns.
 * rotations: [rows, rotated] float32, (cos, sin) of each pair of neighbouring channels. */
void decoder_forward(const struct decoder *decoder, const struct attention_step *step, const struct kv_memory *memory,
                     float *hidden, const float *rotations, void *workspace);

#endif
