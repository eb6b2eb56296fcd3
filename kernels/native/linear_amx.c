/* Products in AMX's tiles, which hold 16 rows of 64 bytes: 32 rows with 32 outputs in one pass over the inputs.
 *
 * FORMAT_BFLOAT16's blocks are the second operand of TDPBF16PS as they are: 16 pairs of inputs, 16 outputs, 1 KiB.
 */
#include "linear_tiles.h"

#if defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM of arch_prctl(2) */
#define TILE_DATA 18              /* XFEATURE_XTILEDATA */
#define TILE_ROWS 16
#define TILE_INPUTS 32
#define PREFETCH_TILES 4

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Tiles 0 to 3: results [half of the rows][block]; 4 and 5: rows; 6 and 7: weights. */
static void configure(int rows) {
    int high = rows > TILE_ROWS ? rows - TILE_ROWS : 1, low = rows > TILE_ROWS ? TILE_ROWS : rows;
    struct tile_config config = {.palette = 1};
    const uint8_t tile_rows[8] = {(uint8_t)low,  (uint8_t)low,  (uint8_t)high, (uint8_t)high,
                                  (uint8_t)low, (uint8_t)high, TILE_ROWS,     TILE_ROWS};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = tile_rows[i];
    _tile_loadconfig(&config);
}

static void put_tile(const struct linear *linear, struct results out, int row, int rows, int block, const float *sums) {
    for (int m = 0; m < rows; m++) put(linear, out, row + m, block, load_floats(sums + m * BLOCK_OUTPUTS));
}

INLINE void multiply_tiles(const struct linear *linear, int block, const struct activations *a, int first, int rows,
                           struct results out, const int blocks, const int halves) {
    const int64_t block_size = (int64_t)a->inputs * BLOCK_OUTPUTS;
    const uint16_t *weights = (const uint16_t *)linear->weights + block * block_size;
    const uint16_t *low = a->bf16 + first * a->stride, *high = low + TILE_ROWS * a->stride;
    const int row_bytes = (int)(a->stride * 2);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < a->inputs; k += TILE_INPUTS) {
        const uint16_t *from = weights + (int64_t)k * BLOCK_OUTPUTS;
        for (int line = 0; line < 16; line++)
            for (int b = 0; b < blocks; b++)
                prefetch((const char *)(from + b * block_size) + PREFETCH_TILES * 1024 + line * 64);
        _tile_loadd(4, low + k, row_bytes);
        _tile_loadd(6, from, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (halves == 2) {
            _tile_loadd(5, high + k, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (blocks == 2) {
            _tile_loadd(7, from + block_size, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (halves == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    float sums[4][TILE_ROWS * BLOCK_OUTPUTS] __attribute__((aligned(64)));
    int of_low = rows > TILE_ROWS ? TILE_ROWS : rows;
    _tile_stored(0, sums[0], 64);
    put_tile(linear, out, first, of_low, block, sums[0]);
    if (blocks == 2) {
        _tile_stored(1, sums[1], 64);
        put_tile(linear, out, first, of_low, block + 1, sums[1]);
    }
    if (halves == 2) {
        _tile_stored(2, sums[2], 64);
        put_tile(linear, out, first + TILE_ROWS, rows - TILE_ROWS, block, sums[2]);
        if (blocks == 2) {
            _tile_stored(3, sums[3], 64);
            put_tile(linear, out, first + TILE_ROWS, rows - TILE_ROWS, block + 1, sums[3]);
        }
    }
}

void tile_amx(const struct linear *linear, int block, int blocks, const struct activations *a, int first, int rows,
              struct results out) {
    configure(rows);
    if (rows > TILE_ROWS) {
        if (blocks == 2) multiply_tiles(linear, block, a, first, rows, out, 2, 2);
        else multiply_tiles(linear, block, a, first, rows, out, 1, 2);
    } else {
        if (blocks == 2) multiply_tiles(linear, block, a, first, rows, out, 2, 1);
        else multiply_tiles(linear, block, a, first, rows, out, 1, 1);
    }
    _tile_release();
}

int enable_instructions(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

#else

int enable_instructions(void) { return 1; }

#endif
