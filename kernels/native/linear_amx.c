/* Rows in bfloat16 and blocks of weights -> products, in AMX's tiles of 16 rows of 64 bytes: 32 rows with 32 outputs in
 * one pass over the inputs.
 *
 * FORMAT_BFLOAT16's blocks are the second operand of TDPBF16PS as they are: 16 pairs of inputs, 16 outputs, 1 KiB.
 * Weights of 8 and 4 bits are brought into that layout once for all rows, some inputs at a time. Scales of whole rows
 * are applied to the results, so that integers stay exact.
 */
#include "linear_tiles.h"

#if defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM of arch_prctl(2) */
#define TILE_DATA 18              /* XFEATURE_XTILEDATA */
#define TILE_ROWS 16
#define PREFETCH_BLOCKS 4 /* of 1 KiB */
#define CHUNK 512         /* inputs that are brought into the layout at a time: 32 KiB */

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Tiles 0 to 3: results [half of the rows][block]; 4 and 5: rows; 6 and 7: weights. */
static void configure(int rows) {
    int high = rows > TILE_ROWS ? rows - TILE_ROWS : 1, low = rows > TILE_ROWS ? TILE_ROWS : rows;
    struct tile_config config = {.palette = 1};
    const uint8_t tile_rows[8] = {(uint8_t)low, (uint8_t)low,  (uint8_t)high, (uint8_t)high,
                                  (uint8_t)low, (uint8_t)high, TILE_ROWS,     TILE_ROWS};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = tile_rows[i];
    _tile_loadconfig(&config);
}

/* One pass over some inputs: 1 or 2 blocks of weights, [pairs of inputs][16 outputs][2], with up to 32 rows. */
struct pass {
    const uint16_t *weights;
    int64_t block_size;
    const uint16_t *rows;
    int64_t stride;
    int num_rows, inputs, has_sums; /* has_sums: add to them; else they begin at 0 */
    float (*sums)[TILE_ROWS * BLOCK_OUTPUTS];
};

INLINE void multiply_tiles(const struct pass *p, const int blocks, const int halves) {
    const uint16_t *low = p->rows, *high = low + TILE_ROWS * p->stride;
    const int row_bytes = (int)(p->stride * 2);
    if (p->has_sums) {
        _tile_loadd(0, p->sums[0], 64);
        if (blocks == 2) _tile_loadd(1, p->sums[1], 64);
        if (halves == 2) _tile_loadd(2, p->sums[2], 64);
        if (blocks == 2 && halves == 2) _tile_loadd(3, p->sums[3], 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < p->inputs; k += 32) {
        const uint16_t *from = p->weights + (int64_t)k * BLOCK_OUTPUTS;
        for (int line = 0; line < 16; line++)
            for (int b = 0; b < blocks; b++)
                prefetch((const char *)(from + b * p->block_size) + PREFETCH_BLOCKS * 1024 + line * 64);
        _tile_loadd(4, low + k, row_bytes);
        _tile_loadd(6, from, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (halves == 2) {
            _tile_loadd(5, high + k, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (blocks == 2) {
            _tile_loadd(7, from + p->block_size, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (halves == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, p->sums[0], 64);
    if (blocks == 2) _tile_stored(1, p->sums[1], 64);
    if (halves == 2) _tile_stored(2, p->sums[2], 64);
    if (blocks == 2 && halves == 2) _tile_stored(3, p->sums[3], 64);
}

static void multiply_pass(const struct pass *p, int blocks) {
    configure(p->num_rows);
    if (p->num_rows > TILE_ROWS) {
        if (blocks == 2) multiply_tiles(p, 2, 2);
        else multiply_tiles(p, 1, 2);
    } else {
        if (blocks == 2) multiply_tiles(p, 2, 1);
        else multiply_tiles(p, 1, 1);
    }
}

/* sums: [halves][2 blocks][16][16] of the rows from `row` on. */
static void put_sums(const struct linear *linear, int block, int blocks, int row, int rows, struct results out,
                     float (*sums)[TILE_ROWS * BLOCK_OUTPUTS]) {
    int by_row = linear->format == FORMAT_INT8_ROW || linear->format == FORMAT_INT4_ROW;
    for (int b = 0; b < blocks; b++) {
        floats scale = by_row ? load_floats((const float *)linear->scales + (block + b) * BLOCK_OUTPUTS) : set_all(1);
        for (int m = 0; m < rows; m++) {
            floats v = load_floats(sums[m / TILE_ROWS * 2 + b] + m % TILE_ROWS * BLOCK_OUTPUTS);
            put(linear, out, row + m, block + b, by_row ? multiply(v, scale) : v);
        }
    }
}

void tile_amx(const struct linear *linear, int block, int blocks, const struct activations *a, int first, int rows,
              struct results out) {
    float sums[4][TILE_ROWS * BLOCK_OUTPUTS] __attribute__((aligned(64)));
    const int64_t size = (int64_t)a->inputs * BLOCK_OUTPUTS;
    const struct pass pass = {.weights = (const uint16_t *)linear->weights + block * size, .block_size = size,
                              .rows = a->bf16 + first * a->stride, .stride = a->stride, .num_rows = rows,
                              .inputs = a->inputs, .sums = sums};
    multiply_pass(&pass, blocks);
    _tile_release();
    put_sums(linear, block, blocks, first, rows, out, sums);
}

/* Two inputs of 16 outputs -> pairs of bfloat16. */
INLINE void store_pairs(uint16_t *to, floats even, floats odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

/* Four bytes of each of 16 outputs -> four inputs in the layout. weight = byte * scale + shift. */
INLINE void store_four(uint16_t *to, __m512i four, floats scale, floats shift) {
    const __m512i byte = _mm512_set1_epi32(255);
    floats v[4];
    for (int j = 0; j < 4; j++) {
        __m512i value = _mm512_and_si512(_mm512_srli_epi32(four, (unsigned)(8 * j)), byte);
        v[j] = multiply_add(_mm512_cvtepi32_ps(value), scale, shift);
    }
    store_pairs(to, v[0], v[1]);
    store_pairs(to + 2 * BLOCK_OUTPUTS, v[2], v[3]);
}

/* The groups from `first` on of one block, in the layout of FORMAT_BFLOAT16. */
static void widen_groups(const struct linear *linear, int block, int groups, int first, int last, uint16_t *to) {
    const int format = linear->format, is_int4 = format >= FORMAT_INT4, width = format == FORMAT_INT4_MIDDLE ? 2 : 1;
    const int by_row = format == FORMAT_INT8_ROW || format == FORMAT_INT4_ROW;
    const int group_bytes = GROUP * BLOCK_OUTPUTS / (is_int4 ? 2 : 1);
    const uint8_t *weights = (const uint8_t *)linear->weights + (int64_t)block * groups * group_bytes;
    const uint16_t *scales = (const uint16_t *)linear->scales + (int64_t)block * groups * width * BLOCK_OUTPUTS;
    for (int g = first; g < last; g++, to += GROUP * BLOCK_OUTPUTS) {
        const uint16_t *of_group = scales + (int64_t)g * width * BLOCK_OUTPUTS;
        const uint8_t *from = weights + (int64_t)g * group_bytes;
        floats scale = by_row ? set_all(1) : load_bf16(of_group);
        floats shift = multiply(scale, set_all(is_int4 ? -8.0f : -128.0f));
        if (width == 2) shift = add(shift, load_bf16(of_group + BLOCK_OUTPUTS));
        for (int s = 0; s < (is_int4 ? GROUP / 8 : GROUP / 4); s++) {
            __m512i bytes = _mm512_loadu_si512(from + s * 64);
            uint16_t *four = to + s * 4 * BLOCK_OUTPUTS;
            if (is_int4) {
                const __m512i low = _mm512_set1_epi8(15);
                store_four(four, _mm512_and_si512(bytes, low), scale, shift);
                bytes = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
                four += GROUP / 2 * BLOCK_OUTPUTS;
            }
            store_four(four, bytes, scale, shift);
        }
    }
}

void tile_amx_quantized(const struct linear *linear, int block, int blocks, const struct activations *a, int first,
                        int rows, struct results out) {
    uint16_t weights[2][CHUNK * BLOCK_OUTPUTS] __attribute__((aligned(64)));
    float sums[AMX_QUANTIZED_ROWS / AMX_ROWS][4][TILE_ROWS * BLOCK_OUTPUTS] __attribute__((aligned(64)));
    for (int k = 0; k < a->inputs; k += CHUNK) {
        int inputs = a->inputs - k < CHUNK ? a->inputs - k : CHUNK;
        for (int b = 0; b < blocks; b++)
            widen_groups(linear, block + b, a->groups, k / GROUP, (k + inputs) / GROUP, weights[b]);
        for (int row = 0; row < rows; row += AMX_ROWS) {
            const struct pass pass = {.weights = weights[0], .block_size = CHUNK * BLOCK_OUTPUTS,
                                      .rows = a->bf16 + (first + row) * a->stride + k, .stride = a->stride,
                                      .num_rows = rows - row < AMX_ROWS ? rows - row : AMX_ROWS,
                                      .inputs = inputs, .has_sums = k > 0, .sums = sums[row / AMX_ROWS]};
            multiply_pass(&pass, blocks);
        }
    }
    _tile_release();
    for (int row = 0; row < rows; row += AMX_ROWS)
        put_sums(linear, block, blocks, first + row, rows - row < AMX_ROWS ? rows - row : AMX_ROWS, out,
                 sums[row / AMX_ROWS]);
}

int enable_instructions(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

#else

int enable_instructions(void) { return 1; }

#endif
