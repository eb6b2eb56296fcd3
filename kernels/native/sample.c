/* Rows of logits -> one token each, by temperature, top_k, top_p, min_p and a uniform number, without sorting a row.
 *
 * Tokens are counted into bins by their log-weight; a query sorts the members of one bin only. top_k comes first, top_p
 * is a share of what top_k left, min_p is relative to the most likely token; equal weights are ordered by token id. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numeric.h"
#include "parallel.h"

#define BINS 2048
#define BINS_PER_NAT 64

struct settings { /* of a row, float64 each */
    double temperature, top_p, min_p, top_k, uniform;
};

struct sampling {
    const float *logits; /* [rows, vocabulary], rows `stride` apart */
    int64_t stride;
    int vocabulary;
    const struct settings *settings;
    float *weights;   /* [rows, vocabulary] */
    uint16_t *bins;   /* [rows, vocabulary] */
    int32_t *members; /* [rows, vocabulary] */
    int32_t *chosen;  /* [rows] */
};

struct ranked {
    int vocabulary;
    const float *weights;
    const uint16_t *bins;
    int32_t *members; /* of the bin that was sorted last */
    int bin, num_members;
    int64_t counts[BINS]; /* of tokens up to and with the bin */
    double masses[BINS];
};

static void sift(int32_t *members, const float *weights, int root, int end) {
    for (;;) {
        int child = 2 * root + 1, last = root;
        for (int i = child; i < child + 2 && i < end; i++) {
            float a = weights[members[last]], b = weights[members[i]];
            if (b < a || (b == a && members[i] > members[last])) last = i; /* the heap's top is the least likely */
        }
        if (last == root) return;
        int32_t swapped = members[root];
        members[root] = members[last];
        members[last] = swapped;
        root = last;
    }
}

/* The members of a bin, the most likely first. */
static void sort_bin(struct ranked *r, int bin) {
    if (r->bin == bin) return;
    int count = 0;
    for (int i = 0; i < r->vocabulary; i++)
        if (r->bins[i] == bin) r->members[count++] = i;
    for (int i = count / 2 - 1; i >= 0; i--) sift(r->members, r->weights, i, count);
    for (int end = count - 1; end > 0; end--) {
        int32_t least = r->members[0];
        r->members[0] = r->members[end];
        r->members[end] = least;
        sift(r->members, r->weights, 0, end);
    }
    r->bin = bin;
    r->num_members = count;
}

static int64_t count_before(const struct ranked *r, int bin) { return bin ? r->counts[bin - 1] : 0; }
static double mass_before(const struct ranked *r, int bin) { return bin ? r->masses[bin - 1] : 0.0; }

/* The first bin whose count or mass reaches a number, the last one at most. */
static int bin_of_count(const struct ranked *r, int64_t count) {
    int low = 0, high = BINS - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (r->counts[middle] >= count) high = middle;
        else low = middle + 1;
    }
    return low;
}

static int bin_of_mass(const struct ranked *r, double mass, int is_strict) {
    int low = 0, high = BINS - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (is_strict ? r->masses[middle] > mass : r->masses[middle] >= mass) high = middle;
        else low = middle + 1;
    }
    return low;
}

static double mass_of(struct ranked *r, int64_t count) {
    if (count >= r->vocabulary) return r->masses[BINS - 1];
    int bin = bin_of_count(r, count);
    sort_bin(r, bin);
    double mass = mass_before(r, bin);
    for (int64_t i = 0; i < count - count_before(r, bin) && i < r->num_members; i++) mass += r->weights[r->members[i]];
    return mass;
}

/* How many of the most likely tokens it takes to reach this mass. */
static int64_t count_up_to(struct ranked *r, double mass) {
    int bin = bin_of_mass(r, mass, 0);
    sort_bin(r, bin);
    double before = mass_before(r, bin);
    int64_t count = count_before(r, bin);
    for (int i = 0; i < r->num_members && before < mass; i++, count++) before += r->weights[r->members[i]];
    return count < 1 ? 1 : count;
}

/* The token at which the running mass passes `mass`, among the `count` most likely. */
static int32_t token_at(struct ranked *r, double mass, int64_t count) {
    int by_mass = bin_of_mass(r, mass, 1), by_count = bin_of_count(r, count);
    int bin = by_mass < by_count ? by_mass : by_count;
    sort_bin(r, bin);
    int64_t last = count - count_before(r, bin) - 1;
    if (last > r->num_members - 1) last = r->num_members - 1;
    double total = mass_before(r, bin);
    int64_t at = 0;
    while (at < last && total + r->weights[r->members[at]] <= mass) total += r->weights[r->members[at++]];
    return r->members[at < 0 ? 0 : at];
}

static void sample_row(void *context, int row) {
    const struct sampling *s = context;
    const struct settings *set = s->settings + row;
    const float *logits = s->logits + row * s->stride;
    int size = s->vocabulary;
    float *weights = s->weights + (int64_t)row * size;
    uint16_t *bins = s->bins + (int64_t)row * size;
    struct ranked r = {.vocabulary = size, .weights = weights, .bins = bins, .bin = -1};
    r.members = s->members + (int64_t)row * size;
    float largest = logits[0], temperature = (float)set->temperature;
    for (int i = 1; i < size; i++) largest = logits[i] > largest ? logits[i] : largest;
    for (int i = 0; i < size; i++) weights[i] = (logits[i] - largest) / temperature;
    for (int i = 0; i < size; i++) {
        float place = weights[i] * -BINS_PER_NAT;
        bins[i] = (uint16_t)(int32_t)(place < BINS - 1 ? place : BINS - 1); /* NaN too: that row's token is not used */
    }
    for (int i = 0; i < size; i++) weights[i] = exp_float(weights[i]);
    int64_t above = 0;
    for (int i = 0; i < size; i++) {
        r.counts[bins[i]]++;
        r.masses[bins[i]] += weights[i];
        above += weights[i] >= set->min_p;
    }
    for (int bin = 1; bin < BINS; bin++) {
        r.counts[bin] += r.counts[bin - 1];
        r.masses[bin] += r.masses[bin - 1];
    }
    int64_t top_k = (int64_t)set->top_k, kept = top_k < above ? top_k : above;
    if (kept < 1) kept = 1;
    if (set->top_p < 1.0) {
        int64_t most = count_up_to(&r, set->top_p * mass_of(&r, top_k));
        kept = kept < most ? kept : most;
    }
    s->chosen[row] = token_at(&r, set->uniform * mass_of(&r, kept), kept);
}

/* Bytes of the workspace of `sample_rows`. */
size_t sampling_workspace(int rows, int vocabulary) { return (size_t)rows * vocabulary * (4 + 4 + 2); }

void sample_rows(const float *logits, int64_t stride, int rows, int vocabulary, const double *settings, void *workspace,
                 int32_t *chosen) {
    size_t cells = (size_t)rows * vocabulary;
    struct sampling s = {logits, stride, vocabulary, (const struct settings *)settings, workspace};
    s.members = (int32_t *)(s.weights + cells);
    s.bins = (uint16_t *)(s.members + cells);
    s.chosen = chosen;
    parallel_for(rows, sample_row, &s);
}
