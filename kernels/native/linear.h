/* y = x W^T + b for weights in 32, 16, 8 and 4 bits, in blocks of 16 output channels. kernels/layouts.py packs them. */
#ifndef LINEAR_H
#define LINEAR_H

#include <stddef.h>
#include <stdint.h>

#define GROUP 32        /* inputs that share a scale; the layouts pad inputs to a multiple of it with zeros */
#define BLOCK_OUTPUTS 16 /* the layouts pad outputs to a multiple of it */

/* Numbers as in kernels/layouts.py. k: inputs, n: output blocks, o: an output of a block. */
enum linear_format {
    FORMAT_FLOAT32 = 0,      /* [n][k][o] */
    FORMAT_BFLOAT16 = 1,     /* [n][k / 2][o][2] */
    FORMAT_FLOAT16 = 2,      /* [n][k][o] */
    FORMAT_INT8 = 3,         /* [n][k / 4][o][4], each + 128; scales bfloat16 [n][k / 32][o] */
    FORMAT_INT8_ROW = 4,     /* as FORMAT_INT8; scales float32 [n][o] */
    FORMAT_INT4 = 5,         /* [n][k / 32][4][o][4], each + 8: input i in the low half, i + 16 in the high one;
                                scales bfloat16 [n][k / 32][o] */
    FORMAT_INT4_ROW = 6,     /* as FORMAT_INT4; scales float32 [n][o] */
    FORMAT_INT4_MIDDLE = 7,  /* as FORMAT_INT4; scales bfloat16 [n][k / 32][2][o]: scale, then middle:
                                weight = value * scale + middle */
};

struct linear {
    int32_t format, outputs, inputs;
    const void *weights, *scales; /* 64-byte aligned, possibly in a mapped file */
    const float *bias;            /* [outputs padded to 16], or NULL */
};

/* Bytes of workspace that linear_forward needs for `rows` rows; a multiple of 64. */
size_t linear_workspace(const struct linear *linear, int rows);

/* x: [rows, inputs] float32, y: [rows, outputs] float32; strides in elements. workspace: 64-byte aligned.
 * Activations of 8- and 4-bit weights are rounded to 8 bits with a scale for each row and group of 32 inputs. */
void linear_forward(const struct linear *linear, const float *x, int64_t x_stride, float *y, int64_t y_stride, int rows,
                    void *workspace);

/* Asks the system for the registers that this build's instructions need; 0 if it refuses. Call it once in a process. */
int enable_instructions(void);

#endif
