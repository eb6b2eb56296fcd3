/* y = x W^T + b for weights in 16, 8, 6 and 4 bits, in blocks of 16 output channels. */
#ifndef LINEAR_H
#define LINEAR_H

#include <stddef.h>
#include <stdint.h>

struct linear {
    int32_t format;          /* see kernels/layouts.py */
    int32_t outputs, inputs; /* of the layer; the layout pads outputs to 16 */
    int32_t group;           /* inputs that share a scale; 0 where the format has one a row or none */
    const void *weights, *scales; /* in the layout of the format, 64-byte aligned, possibly in a mapped file */
    const float *bias;       /* [outputs padded to 16], or NULL */
};

/* Bytes of workspace that linear_forward needs for `rows` rows. */
size_t linear_workspace(const struct linear *linear, int rows);

/* x: [rows, inputs] float32, y: [rows, outputs] float32; strides in elements. workspace: 64-byte aligned. */
void linear_forward(const struct linear *linear, const float *x, int64_t x_stride, float *y, int64_t y_stride, int rows,
                    void *workspace);

#endif
