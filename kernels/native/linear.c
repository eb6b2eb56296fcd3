/* A product -> its rows prepared in the workspace, its output blocks divided among the threads. */
#include "linear.h"

#include "linear_tiles.h"
#include "parallel.h"

#define TASK_BYTES (96 << 10) /* of weights; a task then lasts some ten microseconds */
#define TASKS_PER_THREAD 8
#define STRIDE_PADDING 16 /* floats: rows 4,096 bytes apart would share a set of the cache */
#define AMX_MIN_ROWS 8 /* fewer are bound by memory */
#if defined(__AMX_BF16__)
#define AMX_MIN_QUANTIZED_ROWS 40 /* below, the integer kernels are as fast */
#else
#define AMX_MIN_QUANTIZED_ROWS (1 << 30)
#endif
#if defined(__AVX512BF16__)
#define FEW_ROWS 4 /* up to so many, activations stay in float32 */
#else
#define FEW_ROWS (1 << 30)
#endif

static int padded(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }
static int is_quantized(const struct linear *linear) { return linear->format >= FORMAT_INT8; }
static int takes_bf16(const struct linear *linear, int rows) {
    if (linear->format == FORMAT_BFLOAT16) return rows > FEW_ROWS;
    return is_quantized(linear) && rows >= AMX_MIN_QUANTIZED_ROWS;
}

size_t linear_workspace(const struct linear *linear, int rows) {
    size_t inputs = (size_t)padded(linear->inputs, GROUP), n = (size_t)rows;
    if (is_quantized(linear) && !takes_bf16(linear, rows))
        return aligned(n * (inputs + 64)) + 2 * aligned(n * (inputs / GROUP) * 4);
    return aligned(n * (inputs + STRIDE_PADDING) * 4);
}

struct preparation {
    const float *x;
    int64_t x_stride;
    int inputs, padded_inputs, groups, weight_offset;
    int64_t stride;
    float *values;
    uint16_t *bf16;
    int8_t *quantized;
    float *scales;
    int32_t *offsets;
};

static void prepare_row(void *context, int row) {
    const struct preparation *p = context;
    const float *x = p->x + row * p->x_stride;
    if (p->quantized) {
        int64_t at = (int64_t)row * p->groups;
        quantize_row(x, p->inputs, p->weight_offset, p->quantized + row * p->stride, p->scales + at, p->offsets + at);
    } else if (p->bf16) {
        uint16_t *to = p->bf16 + row * p->stride;
        for (int k = 0; k < p->inputs; k++) to[k] = float_to_bf16(x[k]);
        memset(to + p->inputs, 0, (size_t)(p->padded_inputs - p->inputs) * 2);
    } else {
        float *to = p->values + row * p->stride;
        memcpy(to, x, (size_t)p->inputs * sizeof(float));
        memset(to + p->inputs, 0, (size_t)(p->padded_inputs - p->inputs) * sizeof(float));
    }
}

static struct activations prepare(const struct linear *linear, const float *x, int64_t x_stride, int rows,
                                  uint8_t *workspace) {
    int inputs = padded(linear->inputs, GROUP), groups = inputs / GROUP;
    struct preparation p = {.x = x, .x_stride = x_stride, .inputs = linear->inputs, .padded_inputs = inputs, .groups = groups};
    struct activations a = {.groups = groups, .inputs = inputs};
    if (takes_bf16(linear, rows)) {
        p.stride = inputs + 2 * STRIDE_PADDING;
        a.bf16 = p.bf16 = (uint16_t *)workspace;
    } else if (is_quantized(linear)) {
        p.stride = inputs + 64;
        p.quantized = (int8_t *)workspace;
        p.scales = (float *)(workspace + aligned((size_t)rows * (size_t)p.stride));
        p.offsets = (int32_t *)((uint8_t *)p.scales + aligned((size_t)rows * (size_t)groups * 4));
        p.weight_offset = linear->format >= FORMAT_INT4 ? 8 : 128;
        a.quantized = p.quantized, a.scales = p.scales, a.offsets = p.offsets;
    } else if (rows == 1 && inputs == linear->inputs) {
        a.values = x;
        return a;
    } else {
        p.stride = inputs + STRIDE_PADDING;
        a.values = p.values = (float *)workspace;
    }
    a.stride = p.stride;
    if (rows >= 4) {
        parallel_for(rows, prepare_row, &p);
    } else {
        for (int row = 0; row < rows; row++) prepare_row(&p, row);
    }
    return a;
}

struct product {
    const struct linear *linear;
    const struct activations *a;
    struct results out;
    tile_function tile;
    int rows, tiles, blocks, unit, units_per_task; /* unit: neighbouring blocks that are computed together */
};

static void compute_task(void *context, int task) {
    const struct product *p = context;
    int first = task * p->units_per_task * p->unit, last = first + p->units_per_task * p->unit;
    if (last > p->blocks) last = p->blocks;
    for (int block = first; block < last; block += p->unit) {
        int blocks = last - block < p->unit ? last - block : p->unit;
        for (int i = 0, row = 0; i < p->tiles; i++) {
            int rows = (p->rows - row + p->tiles - i - 1) / (p->tiles - i);
            p->tile(p->linear, block, blocks, p->a, row, rows, p->out);
            row += rows;
        }
    }
}

void linear_forward(const struct linear *linear, const float *x, int64_t x_stride, float *y, int64_t y_stride, int rows,
                    void *workspace) {
    static const tile_function tiles[] = {tile_float32, tile_bfloat16, tile_float16, tile_int8,
                                          tile_int8,    tile_int4,     tile_int4,    tile_int4};
    static const int bits[] = {32, 16, 16, 8, 8, 4, 4, 4};
    struct activations a = prepare(linear, x, x_stride, rows, workspace);
    struct product p = {.linear = linear, .a = &a, .out = {y, y_stride}, .tile = tiles[linear->format], .rows = rows};
    p.blocks = padded(linear->outputs, BLOCK_OUTPUTS) / BLOCK_OUTPUTS;
    int most_rows = MAX_TILE_ROWS;
#if defined(__AMX_BF16__)
    if (a.bf16 && is_quantized(linear)) p.tile = tile_amx_quantized, most_rows = AMX_QUANTIZED_ROWS;
    else if (a.bf16 && rows >= AMX_MIN_ROWS) p.tile = tile_amx, most_rows = AMX_ROWS;
#endif
    p.tiles = (rows + most_rows - 1) / most_rows;
    p.unit = most_rows > MAX_TILE_ROWS ? 2 : TILE_BLOCKS((rows + p.tiles - 1) / p.tiles);
    int64_t unit_bytes = (int64_t)p.unit * BLOCK_OUTPUTS * a.inputs * bits[linear->format] / 8;
    int units = (p.blocks + p.unit - 1) / p.unit;
    p.units_per_task = 1;
    while (p.units_per_task * unit_bytes < TASK_BYTES &&
           units / (2 * p.units_per_task) >= TASKS_PER_THREAD * num_threads())
        p.units_per_task *= 2;
    parallel_for((units + p.units_per_task - 1) / p.units_per_task, compute_task, &p);
}
