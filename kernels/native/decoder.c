/* Norm, products, rotary embedding, cache store, attention and SwiGLU of every layer, without Python between them. */
#include "decoder.h"

#include <math.h>

#include "parallel.h"
#include "simd.h"

struct work {
    const struct decoder *decoder;
    const struct attention_step *step;
    const float *weight, *rotations;
    float *hidden, *delta, *normed, *qkv, *gate_up;
};

static int64_t qkv_width(const struct decoder *d) { return (int64_t)(d->heads + 2 * d->kv_heads) * d->head_dim; }
static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* hidden += delta (if any), then its RMSNorm. */
static void add_norm_row(void *context, int row) {
    const struct work *w = context;
    const int size = w->decoder->hidden;
    float *hidden = w->hidden + (int64_t)row * size, *normed = w->normed + (int64_t)row * size;
    const float *delta = w->delta ? w->delta + (int64_t)row * size : NULL;
    float part[LANES] = {0};
    for (int i = 0; i < size; i++) {
        if (delta) hidden[i] += delta[i];
    }
    int i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int j = 0; j < LANES; j++) part[j] += hidden[i + j] * hidden[i + j];
    float total = 0;
    for (; i < size; i++) total += hidden[i] * hidden[i];
    for (int j = 0; j < LANES; j++) total += part[j];
    float scale = 1.0f / sqrtf(total / (float)size + w->decoder->epsilon);
    for (i = 0; i < size; i++) normed[i] = hidden[i] * scale * w->weight[i];
}

static void rotate_row(void *context, int row) {
    const struct work *w = context;
    const struct decoder *d = w->decoder;
    const float *rotation = w->rotations + (int64_t)row * d->rotated;
    float *heads = w->qkv + row * qkv_width(d);
    for (int head = 0; head < d->heads + d->kv_heads; head++) {
        float *channel = heads + (int64_t)head * d->head_dim;
        for (int i = 0; i < d->rotated; i += 2) {
            float real = channel[i], imaginary = channel[i + 1];
            channel[i] = real * rotation[i] - imaginary * rotation[i + 1];
            channel[i + 1] = imaginary * rotation[i] + real * rotation[i + 1];
        }
    }
}

static void swiglu_row(void *context, int row) {
    const struct work *w = context;
    const int inner = w->decoder->inner;
    float *gate = w->gate_up + (int64_t)row * 2 * inner;
    const float *up = gate + inner;
    for (int i = 0; i < inner; i++) gate[i] = gate[i] / (1.0f + exp_float(-gate[i])) * up[i];
}

static void each_row(int rows, task_function function, struct work *work) {
    if (rows >= 8) {
        parallel_for(rows, function, work);
    } else {
        for (int row = 0; row < rows; row++) function(work, row);
    }
}

static size_t linear_space(const struct decoder *d, int rows) {
    size_t most = 0;
    for (int i = 0; i < d->num_layers; i++) { /* a layer may have other formats than the first */
        const struct linear *of_layer[] = {&d->layers[i].qkv, &d->layers[i].out, &d->layers[i].gate_up, &d->layers[i].down};
        for (int j = 0; j < 4; j++) {
            size_t size = linear_workspace(of_layer[j], rows);
            most = size > most ? size : most;
        }
    }
    return most;
}

size_t decoder_workspace(const struct decoder *d, const struct attention_step *step) {
    int64_t attended = (int64_t)d->heads * d->head_dim, wide = largest(qkv_width(d), 2 * (int64_t)d->inner);
    size_t rows = (size_t)step->rows, linear = linear_space(d, step->rows), attention = attention_workspace(step);
    return aligned(rows * (size_t)largest(d->hidden, attended) * 4) + aligned(rows * (size_t)d->hidden * 4) +
           aligned(rows * (size_t)wide * 4) + (linear > attention ? linear : attention);
}

void decoder_forward(const struct decoder *d, const struct attention_step *step, const struct kv_memory *memory,
                     float *hidden, const float *rotations, void *workspace) {
    const int rows = step->rows;
    const int64_t width = qkv_width(d), attended = (int64_t)d->heads * d->head_dim;
    uint8_t *next = workspace;
    float *normed = (float *)next; /* and the attention's output */
    next += aligned((size_t)(rows * largest(d->hidden, attended)) * 4);
    float *delta = (float *)next;
    next += aligned((size_t)rows * (size_t)d->hidden * 4);
    float *wide = (float *)next;
    next += aligned((size_t)(rows * largest(width, 2 * (int64_t)d->inner)) * 4);
    struct work w = {d, step, NULL, rotations, hidden, NULL, normed, wide, wide};
    for (int i = 0; i < d->num_layers; i++) {
        const struct decoder_layer *layer = &d->layers[i];
        struct kv_layer kv = {memory->keys + i * memory->layer_bytes, memory->values + i * memory->layer_bytes, NULL, NULL};
        if (memory->key_scales) {
            kv.key_scales = memory->key_scales + i * memory->scale_layer_floats;
            kv.value_scales = memory->value_scales + i * memory->scale_layer_floats;
        }
        w.weight = layer->input_norm;
        each_row(rows, add_norm_row, &w);
        linear_forward(&layer->qkv, normed, d->hidden, wide, width, rows, next);
        each_row(rows, rotate_row, &w);
        store_keys_values(step, &kv, wide + attended, wide + attended + (int64_t)d->kv_heads * d->head_dim, width);
        attention_forward(step, &kv, wide, width, normed, attended, d->attention_scale, 0, next);
        linear_forward(&layer->out, normed, attended, delta, d->hidden, rows, next);
        w.delta = delta, w.weight = layer->post_norm;
        each_row(rows, add_norm_row, &w);
        linear_forward(&layer->gate_up, normed, d->hidden, wide, 2 * (int64_t)d->inner, rows, next);
        each_row(rows, swiglu_row, &w);
        linear_forward(&layer->down, wide, 2 * (int64_t)d->inner, delta, d->hidden, rows, next);
    }
    w.weight = d->final_norm;
    each_row(rows, add_norm_row, &w);
    memcpy(hidden, normed, (size_t)rows * (size_t)d->hidden * sizeof(float));
}
