#include "bench/pairs.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lib/cleanup.h"

#define CONFIDENCE 0.95

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double median_of(double *values, size_t n)
{
    if (n == 0)
        return 0;
    qsort(values, n, sizeof(*values), compare);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

int pairs_add(struct pairs *pairs, double before, double after)
{
    if (!(before > 0))
        return 0;
    if (pairs->n == PAIRS_MAX)
        return -E2BIG;
    if (pairs->n == pairs->capacity) {
        size_t capacity = MAX(2 * pairs->capacity, (size_t)16);
        double *ratios = reallocarray(pairs->ratios, capacity, sizeof(*ratios));
        if (!ratios)
            return -ENOMEM;
        pairs->ratios = ratios;
        pairs->capacity = capacity;
    }
    pairs->ratios[pairs->n++] = after / before;
    return 0;
}

/* How likely fewer than `k` of `n` fair coins fall on one side. */
static double tail(size_t n, size_t k)
{
    double sum = 0;

    for (size_t i = 0; i < k; i++)
        sum += exp(lgamma((double)n + 1) - lgamma((double)i + 1) - lgamma((double)(n - i) + 1) -
                   (double)n * M_LN2);
    return sum;
}

struct pairs_summary pairs_summary(const struct pairs *pairs)
{
    struct pairs_summary summary = {.median = 1, .n = pairs->n};
    size_t n = pairs->n, k = 1;

    if (n == 0)
        return summary;
    summary.median = median_of(pairs->ratios, n);
    while (k < n / 2 && 1 - 2 * tail(n, k + 1) >= CONFIDENCE)
        k++;
    summary.low = pairs->ratios[k - 1];
    summary.high = pairs->ratios[n - k];
    summary.confidence = n == 1 ? 0 : 1 - 2 * tail(n, k);
    return summary;
}

void pairs_done(struct pairs *pairs)
{
    free(pairs->ratios);
    *pairs = (struct pairs){0};
}
