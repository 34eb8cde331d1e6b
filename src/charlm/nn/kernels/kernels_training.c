/* The parts of a training step beside the sequences. Included by kernels.c. */

/* Numbers of a row of a that are multiplied before the next ones, and rows of a that a thread multiplies at once, so that
 * these stay in cache. */
#define DEPTH 512
#define ROWS (4 * MR)

typedef struct {
    int64_t threads, M, N, K;
    int64_t a_row, a_column, b_row, b_column; /* distances in memory; those of a's columns are 1 where `out` is given */
    const store *a, *b;                       /* (M, K), (K, N) */
    const real *bias;                         /* (N,), or NULL */
    store *packed;                            /* room for `panels_size(K, N)` numbers */
    real *sums;                               /* (M, N), or NULL */
    store *out;                               /* the same rounded, or NULL */
} multiplication;

EXPORT int64_t panels_size(int64_t K, int64_t N) { return panels_of(N) * panel_size(K); }

/* Write n numbers of `tile`, with those of `before` and `bias` added, to `sums` or `out`. */
INLINE void add_up(int64_t n, const real *tile, const real *before, const real *bias, real *sums, store *out) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const real sum = tile[j] + (before ? before[j] : 0) + (bias ? bias[j] : 0);
        if (out)
            out[j] = keep(sum);
        else
            sums[j] = sum;
    }
}

/* `rows` rows from `first` on of a b + bias, for K from `k` on. */
static void multiply_rows(const multiplication *p, int64_t first, int64_t rows, int64_t k, int64_t depth) {
    store packed[ROWS * DEPTH] __attribute__((aligned(64)));
    real tile[ROWS * NR] __attribute__((aligned(64)));
    const store *a = p->a + first * p->a_row + k * p->a_column;
    const real *bias = k + depth == p->K ? p->bias : NULL;
    /* Rows whose distance is a power of two would share a few lines of the cache. */
    const int packs = p->a_column != 1 || (!p->out && p->a_row % 512 == 0);
    for (int64_t i = 0; packs && i < rows; i += MR)
        pack(depth, MR, rows - i < MR ? rows - i : MR, a + i * p->a_row, p->a_column, p->a_row, packed + i * DEPTH);
    for (int64_t q = 0; q < panels_of(p->N); q++) {
        const store *panel = p->packed + q * panel_size(p->K) + k * NR;
        if (!packs) product(rows, depth, a, p->a_row, panel, tile, NR, NR);
        for (int64_t i = 0; packs && i < rows; i += MR)
            block(MR, depth, packed + i * DEPTH, PAIR, MR, panel, tile + i * NR, NR, NR);
        const int64_t n = q * NR, width = p->N - n < NR ? p->N - n : NR;
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = (first + i) * p->N + n;
            real *sums = p->out ? NULL : p->sums + at;
            store *out = p->out ? p->out + at : NULL;
            if (width == NR)
                add_up(NR, tile + i * NR, k ? sums : NULL, bias ? bias + n : NULL, sums, out);
            else
                add_up(width, tile + i * NR, k ? sums : NULL, bias ? bias + n : NULL, sums, out);
        }
    }
}

/* a b + bias. The order of a sum does not depend on the number of threads. */
EXPORT void multiply(const multiplication *p) {
    const int64_t blocks = (p->M + MR - 1) / MR, turn = p->threads * ROWS / MR;
    const int64_t groups = (blocks + turn - 1) / turn * p->threads; /* the same number for each thread */
    const int64_t step = p->out ? p->K : DEPTH;
#pragma omp parallel num_threads((int)p->threads) if (p->M * p->N * p->K > 64 * ENOUGH)
    {
#pragma omp for
        for (int64_t q = 0; q < panels_of(p->N); q++)
            pack_panel(p->K, p->N, p->b, p->b_row, p->b_column, q * NR, p->packed + q * panel_size(p->K));
        for (int64_t k = 0; k < p->K; k += step) {
            const int64_t depth = p->K - k < step ? p->K - k : step;
#pragma omp for nowait schedule(static) /* so that a thread adds to its own sums */
            for (int64_t g = 0; g < groups; g++) {
                const int64_t first = blocks * g / groups * MR, end = blocks * (g + 1) / groups * MR;
                multiply_rows(p, first, (end < p->M ? end : p->M) - first, k, depth);
            }
        }
    }
}

/* table (V, N) = the sums of the rows of `a` (M, N) with the same id; the threads share the columns. */
EXPORT void gather(int64_t threads, int64_t M, int64_t N, int64_t V, const int64_t *ids, const store *a, real *table) {
    memset(table, 0, (size_t)(V * N) * sizeof(real));
#pragma omp parallel for num_threads((int)threads) if (M * N > ENOUGH)
    for (int64_t i = 0; i < threads; i++) {
        const int64_t first = N * i / threads, n = N * (i + 1) / threads - first;
        for (int64_t m = 0; m < M; m++) {
            real *sums = table + ids[m] * N + first;
            const store *row = a + m * N + first;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) sums[j] += load(row[j]);
        }
    }
}

/* Mixes the bits of a number: "lowbias32" of the hash functions found by Wellons 2018 ("Prospecting for Hash
 * Functions"). */
INLINE uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

/* out = y / (1 - p), or 0 with probability p. Which numbers are dropped depends on `seed` and their places alone, so
 * that the backward pass needs no mask. */
EXPORT void drop(int64_t threads, int64_t n, double p, uint64_t seed, const store *y, store *out) {
    const uint32_t limit = (uint32_t)(p * 4294967296.0), low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    const real scale = (real)(1 / (1 - p));
#pragma omp parallel for simd num_threads((int)threads) if (parallel : n > 8 * ENOUGH)
    for (int64_t i = 0; i < n; i++) {
        real kept = mixed(mixed((uint32_t)i ^ low) + high) < limit ? 0 : scale;
        out[i] = keep(load(y[i]) * kept);
    }
}

/* The cross-entropy of each row of logits (M, V) and its target, and where `d` is not NULL the gradient of their mean. */
EXPORT void cross_entropy(int64_t threads, int64_t M, int64_t V, const store *logits, const int64_t *targets, real *losses,
                          store *d) {
#pragma omp parallel for num_threads((int)threads) if (M * V > ENOUGH)
    for (int64_t m = 0; m < M; m++) {
        const store *x = logits + m * V;
        real largest = load(x[0]), sum = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < V; j++) largest = load(x[j]) > largest ? load(x[j]) : largest;
        const real target = load(x[targets[m]]) - largest;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < V; j++) sum += exp_(load(x[j]) - largest);
        losses[m] = (real)log(sum) - target;
        if (!d) continue;
        const real scale = 1 / (sum * M);
#pragma omp simd
        for (int64_t j = 0; j < V; j++) d[m * V + j] = keep(exp_(load(x[j]) - largest) * scale);
        d[m * V + targets[m]] = keep(exp_(target) * scale - (real)1 / M);
    }
}

#if STORE != bf16 /* the weights are not rounded */
/* Weights w (n,), their gradient g, Adam's moments m and v of it, and their average or NULL. */
typedef struct {
    int64_t n;
    real *w;
    const real *g;
    real *m, *v, *average;
    double decay; /* the learning rate times the weight decay */
} weights;

#define PARTS 64 /* of the sum over a tensor */

/* The sum of the squares of all gradients. Its order does not depend on the number of threads; `sums` has room for
 * `count * PARTS` numbers. */
EXPORT double squares(int64_t threads, int64_t count, int64_t total, const weights *all, double *sums) {
#pragma omp parallel for num_threads((int)threads) if (total > 8 * ENOUGH) /* of equal parts */
    for (int64_t i = 0; i < count * PARTS; i++) {
        const int64_t n = all[i / PARTS].n, first = n * (i % PARTS) / PARTS, end = n * (i % PARTS + 1) / PARTS;
        const real *g = all[i / PARTS].g;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < end; j++) sum += (double)g[j] * g[j];
        sums[i] = sum;
    }
    double sum = 0;
    for (int64_t i = 0; i < count * PARTS; i++) sum += sums[i];
    return sum;
}

/* A step of AdamW with the gradients times `scale` and then limited to ±limit; the average moves by its share. */
typedef struct {
    double scale, limit, rate, beta1, beta2, eps; /* rate: the learning rate, corrected for m */
    double correction;                            /* of v */
    double share;
} adamw_options;

EXPORT void adamw(int64_t threads, int64_t count, int64_t total, const weights *all, const adamw_options *options) {
    const real scale = (real)options->scale, limit = (real)options->limit, rate = (real)options->rate;
    const real up1 = (real)(1 - options->beta1), up2 = (real)(1 - options->beta2), eps = (real)options->eps;
    const real correction = (real)options->correction, share = (real)options->share;
#pragma omp parallel num_threads((int)threads) if (total > 8 * ENOUGH)
    for (int64_t k = 0; k < count; k++) {
        const int64_t n = all[k].n;
        real *w = all[k].w, *m = all[k].m, *v = all[k].v, *average = all[k].average;
        const real *g = all[k].g, kept = (real)(1 - all[k].decay);
#pragma omp for simd nowait schedule(static)
        for (int64_t i = 0; i < n; i++) {
            real clipped = g[i] * scale;
            clipped = clipped > limit ? limit : clipped < -limit ? -limit : clipped;
            m[i] += up1 * (clipped - m[i]);
            v[i] += up2 * (clipped * clipped - v[i]);
            w[i] = w[i] * kept - rate * m[i] / ((real)sqrt((double)(v[i] * correction)) + eps);
            if (average) average[i] += share * (w[i] - average[i]);
        }
    }
}
#endif
