/* Online softmax over the blocks of each sequence; tasks are parts of sequences, key heads, and tiles of rows.
 *
 * The query heads that share a key head, and neighbouring rows, are one matrix: keys and values are read once for all.
 */
#include "attention.h"

#include <math.h>

#include "attention_tile.h"
#include "parallel.h"

#define MAX_QUERIES 48   /* query rows of a task: they, the scores and the output stay in the cache */
#define PART_TOKENS 512  /* a sequence is divided into parts of at least so many tokens */
#define PADDED_DIM(dim) (((dim) + 15) / 16 * 16)

static int group_size(const struct attention_step *step) { return step->heads / step->kv_heads; }

static int rows_per_tile(const struct attention_step *step) {
    int rows = MAX_QUERIES / group_size(step);
    return rows < 1 ? 1 : rows;
}

/* One task: rows `first` .. `first + rows` of a span, a key head, and tokens `begin` .. `end` of the sequence. */
struct task {
    int32_t span, head, first, rows, begin, end, part; /* part: its number in the workspace, or -1: no merge */
};

struct merge {
    int32_t span, head, first, rows, part, parts;
};

struct plan {
    int num_tasks, num_merges, num_parts;
    struct task *tasks;
    struct merge *merges;
    float *parts; /* [parts][MAX_QUERIES or more][head_dim + 2]: sum, maximum, output */
};

static int queries_per_task(const struct attention_step *step) { return rows_per_tile(step) * group_size(step); }
static size_t part_floats(const struct attention_step *step) {
    return (size_t)queries_per_task(step) * (size_t)(PADDED_DIM(step->head_dim) + 16);
}

static int parts_of(const struct attention_step *step, int length) {
    int tasks = step->spans * step->kv_heads, most = (length + PART_TOKENS - 1) / PART_TOKENS;
    int wanted = (4 * num_threads() + tasks - 1) / tasks;
    if (wanted > most) wanted = most;
    return wanted < 1 ? 1 : wanted;
}

static void count(const struct attention_step *step, int *tasks, int *merges, int *parts) {
    *tasks = *merges = *parts = 0;
    for (int s = 0; s < step->spans; s++) {
        int rows = step->first[s + 1] - step->first[s], tile = rows_per_tile(step);
        int tiles = (rows + tile - 1) / tile, n = tiles == 1 ? parts_of(step, step->lengths[s]) : 1;
        *tasks += step->kv_heads * tiles * n;
        if (n > 1) {
            *merges += step->kv_heads;
            *parts += step->kv_heads * n;
        }
    }
}


size_t attention_workspace(const struct attention_step *step) {
    int tasks, merges, parts;
    count(step, &tasks, &merges, &parts);
    return aligned((size_t)tasks * sizeof(struct task)) + aligned((size_t)merges * sizeof(struct merge)) +
           aligned((size_t)parts * part_floats(step) * sizeof(float));
}

static struct plan make_plan(const struct attention_step *step, uint8_t *workspace) {
    struct plan plan;
    count(step, &plan.num_tasks, &plan.num_merges, &plan.num_parts);
    plan.tasks = (struct task *)workspace;
    plan.merges = (struct merge *)(workspace + aligned((size_t)plan.num_tasks * sizeof(struct task)));
    plan.parts = (float *)((uint8_t *)plan.merges + aligned((size_t)plan.num_merges * sizeof(struct merge)));
    int t = 0, m = 0, p = 0;
    for (int s = 0; s < step->spans; s++) {
        int first = step->first[s], rows = step->first[s + 1] - first, length = step->lengths[s];
        int tile = rows_per_tile(step), n = rows <= tile ? parts_of(step, length) : 1;
        int share = ((length + n - 1) / n + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK;
        for (int head = 0; head < step->kv_heads; head++) {
            for (int row = 0; row < rows; row += tile) {
                int taken = rows - row < tile ? rows - row : tile;
                if (n > 1) plan.merges[m++] = (struct merge){s, head, first + row, taken, p, n};
                for (int i = 0; i < n; i++) {
                    int begin = i * share, end = (i + 1) * share < length ? (i + 1) * share : length;
                    plan.tasks[t++] = (struct task){s, head, first + row, taken, begin, end, n > 1 ? p++ : -1};
                }
            }
        }
    }
    return plan;
}

struct context {
    const struct attention_step *step;
    const struct kv_layer *layer;
    const float *q;
    float *out;
    int64_t q_stride, out_stride;
    float scale;
    int window;
    struct plan plan;
};

#define SCORE(n, type) score_tile(q, stride, keys, at, scales, head_dim, scores, n, type)
#define VALUE(n, type) value_tile(weights, values, at, head_dim, d, wide, tokens, out, stride, n, type)
#if defined(__AVX512F__)
#define MORE_ROWS(TILE, type)                                                                                          \
    case 5: TILE(5, type); break;                                                                                      \
    case 6: TILE(6, type); break;
#else
#define MORE_ROWS(TILE, type)
#endif
#define FOR_ROWS(TILE, type)                                                                                           \
    switch (rows) {                                                                                                    \
        case 1: TILE(1, type); break;                                                                                  \
        case 2: TILE(2, type); break;                                                                                  \
        case 3: TILE(3, type); break;                                                                                  \
        case 4: TILE(4, type); break;                                                                                  \
        MORE_ROWS(TILE, type)                                                                                          \
    }
#define FOR_TYPES(TILE)                                                                                                \
    switch (type) {                                                                                                    \
        case KV_FLOAT32: FOR_ROWS(TILE, KV_FLOAT32) break;                                                             \
        case KV_BFLOAT16: FOR_ROWS(TILE, KV_BFLOAT16) break;                                                           \
        case KV_FLOAT16: FOR_ROWS(TILE, KV_FLOAT16) break;                                                             \
        default: FOR_ROWS(TILE, KV_INT8) break;                                                                        \
    }

static void score_rows(const float *q, int64_t stride, const void *keys, int64_t at, const float *scales, int head_dim,
                       float *scores, int rows, int type) {
    FOR_TYPES(SCORE)
}

static void value_rows(const float *weights, const void *values, int64_t at, int head_dim, int tokens, float *out,
                       int64_t stride, int rows, int type) {
    for (int d = 0; d < head_dim; d += 2 * LANES) {
        int wide = head_dim - d > LANES; /* lanes past the last channel are never read again */
        FOR_TYPES(VALUE)
    }
}

/* The tokens that a row sees: from *low up to, not including, *high. */
static void visible(const struct context *c, int span, int row, int *low, int *high) {
    const struct attention_step *step = c->step;
    int index = step->lengths[span] - (step->first[span + 1] - row);
    *high = index + 1;
    *low = c->window > 0 && index + 1 > c->window ? index + 1 - c->window : 0;
    if (index < step->two_way[span]) *low = 0, *high = step->two_way[span];
}

/* Scores of a chunk -> weights exp(score - maximum); rescales what was summed with another maximum. */
static void soften(float *scores, int tokens, float *maximum, float *sum, float *out, int head_dim) {
    float largest = *maximum;
    for (int t = 0; t < tokens; t++) largest = scores[t] > largest || scores[t] != scores[t] ? scores[t] : largest;
    if (largest == -INFINITY) { /* nothing of this chunk is visible */
        memset(scores, 0, (size_t)tokens * sizeof(float));
        return;
    }
    float total = 0;
    for (int t = 0; t < tokens; t++) scores[t] = exp_float(scores[t] - largest);
    for (int t = 0; t < tokens; t++) total += scores[t];
    if (largest != *maximum) {
        float factor = *maximum == -INFINITY ? 0.0f : exp_float(*maximum - largest);
        *sum *= factor;
        for (int d = 0; d < head_dim; d++) out[d] *= factor;
        *maximum = largest;
    }
    *sum += total;
}

static void attend(const struct context *c, const struct task *task, float *q, float *out, float *maxima, float *sums) {
    const struct attention_step *step = c->step;
    const int group = group_size(step), dim = step->head_dim, queries = task->rows * group, type = step->kv_type;
    const int64_t padded = PADDED_DIM(dim), head_size = (int64_t)dim * KV_BLOCK;
    const int32_t *table = step->tables + (int64_t)task->span * step->max_blocks;
    int low[MAX_QUERIES], high[MAX_QUERIES], begin = task->end, end = task->begin;
    for (int m = 0; m < queries; m++) {
        int row = task->first + m / group;
        const float *from = c->q + row * c->q_stride + (int64_t)(task->head * group + m % group) * dim;
        for (int d = 0; d < dim; d++) q[m * padded + d] = from[d] * c->scale;
        memset(out + m * padded, 0, (size_t)padded * sizeof(float));
        maxima[m] = -INFINITY, sums[m] = 0;
        visible(c, task->span, row, &low[m], &high[m]);
        if (low[m] < begin) begin = low[m];
        if (high[m] > end) end = high[m];
    }
    begin = begin < task->begin ? task->begin : begin / KV_BLOCK * KV_BLOCK;
    end = end > task->end ? task->end : end;
    float scores[MAX_QUERIES * CHUNK] __attribute__((aligned(64)));
    for (int start = begin; start < end; start += CHUNK) {
        int tokens = end - start < CHUNK ? end - start : CHUNK;
        for (int b = 0; b * KV_BLOCK < tokens; b++) {
            int64_t block = (int64_t)table[start / KV_BLOCK + b] * step->kv_heads + task->head;
            const float *scales = c->layer->key_scales ? c->layer->key_scales + block * KV_BLOCK : NULL;
            for (int m = 0; m < queries; m += MAX_TILE_ROWS) {
                int rows = queries - m < MAX_TILE_ROWS ? queries - m : MAX_TILE_ROWS;
                score_rows(q + m * padded, padded, c->layer->keys, block * head_size, scales, dim,
                           scores + m * CHUNK + b * KV_BLOCK, rows, type);
            }
        }
        for (int m = 0; m < queries; m++) {
            for (int t = 0; t < tokens && start + t < low[m]; t++) scores[m * CHUNK + t] = -INFINITY;
            for (int t = high[m] > start ? high[m] - start : 0; t < tokens; t++) scores[m * CHUNK + t] = -INFINITY;
            soften(scores + m * CHUNK, tokens, &maxima[m], &sums[m], out + m * padded, dim);
        }
        for (int b = 0; b * KV_BLOCK < tokens; b++) {
            int64_t block = (int64_t)table[start / KV_BLOCK + b] * step->kv_heads + task->head;
            int of_block = tokens - b * KV_BLOCK < KV_BLOCK ? tokens - b * KV_BLOCK : KV_BLOCK;
            if (type == KV_INT8)
                for (int m = 0; m < queries; m++)
                    for (int t = 0; t < of_block; t++)
                        scores[m * CHUNK + b * KV_BLOCK + t] *= c->layer->value_scales[block * KV_BLOCK + t];
            for (int m = 0; m < queries; m += MAX_TILE_ROWS) {
                int rows = queries - m < MAX_TILE_ROWS ? queries - m : MAX_TILE_ROWS;
                value_rows(scores + m * CHUNK + b * KV_BLOCK, c->layer->values, block * head_size, dim, of_block,
                           out + m * padded, padded, rows, type);
            }
        }
    }
}

static float *row_of(const struct context *c, int first, int head, int m) {
    int group = group_size(c->step);
    return c->out + (first + m / group) * c->out_stride + (int64_t)(head * group + m % group) * c->step->head_dim;
}

static void run_task(void *context, int number) {
    const struct context *c = context;
    const struct task *task = &c->plan.tasks[number];
    const int dim = c->step->head_dim, queries = task->rows * group_size(c->step);
    const int64_t padded = PADDED_DIM(dim);
    float q[MAX_QUERIES * padded] __attribute__((aligned(64))), own[MAX_QUERIES * padded] __attribute__((aligned(64)));
    float maxima[MAX_QUERIES], sums[MAX_QUERIES];
    if (task->part < 0) {
        attend(c, task, q, own, maxima, sums);
        for (int m = 0; m < queries; m++) {
            float *to = row_of(c, task->first, task->head, m), inverse = 1.0f / sums[m];
            for (int d = 0; d < dim; d++) to[d] = own[m * padded + d] * inverse;
        }
        return;
    }
    float *part = c->plan.parts + (size_t)task->part * part_floats(c->step);
    attend(c, task, q, part, maxima, sums);
    float *numbers = part + (int64_t)queries_per_task(c->step) * padded;
    for (int m = 0; m < queries; m++) numbers[2 * m] = maxima[m], numbers[2 * m + 1] = sums[m];
}

static void run_merge(void *context, int number) {
    const struct context *c = context;
    const struct merge *merge = &c->plan.merges[number];
    const int dim = c->step->head_dim, queries = merge->rows * group_size(c->step);
    const int64_t padded = PADDED_DIM(dim), size = (int64_t)part_floats(c->step);
    const float *parts = c->plan.parts + merge->part * size;
    for (int m = 0; m < queries; m++) {
        float *to = row_of(c, merge->first, merge->head, m), largest = -INFINITY, sum = 0;
        const float *numbers = parts + queries_per_task(c->step) * padded + 2 * m;
        for (int i = 0; i < merge->parts; i++) {
            float maximum = numbers[i * size];
            largest = maximum > largest || maximum != maximum ? maximum : largest;
        }
        for (int d = 0; d < dim; d++) to[d] = 0;
        for (int i = 0; i < merge->parts; i++) {
            if (numbers[i * size] == -INFINITY) continue;
            float factor = exp_float(numbers[i * size] - largest);
            sum += numbers[i * size + 1] * factor;
            const float *from = parts + i * size + m * padded;
            for (int d = 0; d < dim; d++) to[d] += from[d] * factor;
        }
        for (int d = 0; d < dim; d++) to[d] /= sum;
    }
}

void attention_forward(const struct attention_step *step, const struct kv_layer *layer, const float *q, int64_t q_stride,
                       float *out, int64_t out_stride, float scale, int window, void *workspace) {
    struct context c = {step, layer, q, out, q_stride, out_stride, scale, window, make_plan(step, workspace)};
    parallel_for(c.plan.num_tasks, run_task, &c);
    parallel_for(c.plan.num_merges, run_merge, &c);
}
