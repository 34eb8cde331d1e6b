/* The parts of a training step that are neither products nor sequences. Included by kernels.c. */

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
