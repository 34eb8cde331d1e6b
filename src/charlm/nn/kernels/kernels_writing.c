/* Writing text: one step of a whole model, for a few rows at a time. Included by kernels.c.
 *
 * The time is that of reading the weights from memory. They are therefore stored as `real`, as bfloat16, or as int8
 * with a scale for each column, and widened in registers; sums are always `real`.
 *
 * The order of a sum depends neither on B nor on the threads: the result of a row does not depend on the others. */
enum { PLAIN, HALF, BYTE };
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
#define STRIP 4 /* panels at a time for a single row, so that enough sums are under way */

/* A (K, N), in panels as `pack` lays them out. In HALF and BYTE, a panel's 2 LANES columns of a k are in LANES
 * words, so that a shift or a mask brings the parts of a word into different vectors:
 * HALF: the columns j and LANES + j; BYTE: those of k and those of k + 1, K being made even with a zero.
 * scale (BYTE: times 2^-24, see `widen`) and bias are (N,) or NULL. */
typedef struct {
    int64_t kind, K, N;
    const void *weights;
    const real *scale, *bias;
} matrix;

typedef struct {
    matrix input, recurrent; /* layer 0 uses the table instead of an input matrix */
    const real *b_hn;        /* the GRU's; all other biases are in the table or the input matrix */
} layer;

typedef struct {
    int64_t cell, layers, H, V;
    const real *table;          /* (V, G H): the input's part of layer 0 for every character */
    const layer *layer;
    matrix head;
} model;

/* W (N, K), row-major, of the kind's numbers, into room for `laid_size` of them. */
EXPORT int64_t laid_size(int64_t K, int64_t N) { return (N + NR - 1) / NR * NR * (K + K % 2); }

EXPORT void lay(int64_t kind, int64_t K, int64_t N, const void *w, void *laid) {
    int64_t panels = (N + NR - 1) / NR, even = K + K % 2;
#pragma omp parallel for if (K * N > 16 * ENOUGH)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t k = 0; k < even; k++)
            for (int64_t j = 0; j < NR; j++) {
                int64_t at = (p * even + k) * NR, n = p * NR + j, from = n * K + k;
                int some = n < N && k < K;
                if (kind == PLAIN) ((real *)laid)[at + j] = some ? ((const real *)w)[from] : 0;
                at += kind == BYTE ? j % LANES * 4 + k % 2 * (2 - NR) : j % LANES * 2;
                at += j / LANES;
                if (kind == HALF) ((uint16_t *)laid)[at] = some ? ((const uint16_t *)w)[from] : 0;
                if (kind == BYTE) ((int8_t *)laid)[at] = some ? ((const int8_t *)w)[from] : 0;
            }
}

/* Two rows k of a panel as four vectors of numbers, the int8 ones times 2^24, which saves a shift for each. */
INLINE void widen(const int kind, const void *weights, int64_t at, vector wide[4]) {
    if (kind == PLAIN) {
        for (int i = 0; i < 4; i++) wide[i] = *(const vector *)((const real *)weights + at + i * LANES);
    } else if (kind == HALF) {
        for (int i = 0; i < 2; i++) {
            words word = *(const loaded *)((const uint16_t *)weights + at + i * NR);
            wide[2 * i] = __builtin_convertvector((floats)(word << 16), vector);
            wide[2 * i + 1] = __builtin_convertvector((floats)(word & 0xFFFF0000), vector);
        }
    } else {
        words word = *(const loaded *)((const int8_t *)weights + at);
        for (int i = 0; i < 4; i++)
            wide[i] = __builtin_convertvector(
                __builtin_convertvector((integers)(word << (24 - 8 * i) & 0xFF000000), floats), vector);
    }
}

/* c from its sums, which are ordered by panel and row: the columns from n on, scaled, and the bias. */
static __attribute__((noinline)) void finish(const matrix *w, int rows, int panels, const real *sum, int64_t n,
                                             real *c) {
    for (int q = 0; q < panels; q++, n += NR)
        for (int i = 0; i < rows; i++, sum += NR)
            for (int64_t j = 0; j < NR && n + j < w->N; j++) {
                real scaled = w->scale ? sum[j] * w->scale[n + j] : sum[j];
                c[i * w->N + n + j] = w->bias ? scaled + w->bias[n + j] : scaled;
            }
}

/* `rows` rows of c, from panel `p`, `panels` of them. */
INLINE void strip(const int kind, const int rows, const int panels, const matrix *w, const real *a, int64_t p,
                  real *c) {
    const int64_t K = w->K, size = (K + K % 2) * NR;
    vector sum[STRIP][2]; /* rows * panels of them */
#pragma GCC unroll 4
    for (int i = 0; i < rows * panels; i++) sum[i][0] = sum[i][1] = (vector){0};
    for (int64_t k = 0; k < K - 1; k += 2)
#pragma GCC unroll 4
        for (int q = 0; q < panels; q++) {
            vector wide[4];
            widen(kind, w->weights, (p + q) * size + k * NR, wide);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) {
                sum[q * rows + i][0] += a[i * K + k] * wide[0];
                sum[q * rows + i][1] += a[i * K + k] * wide[1];
                sum[q * rows + i][0] += a[i * K + k + 1] * wide[2];
                sum[q * rows + i][1] += a[i * K + k + 1] * wide[3];
            }
        }
    if (K % 2)
        for (int q = 0; q < panels; q++) {
            vector wide[4];
            widen(kind, w->weights, (p + q) * size + (K - 1) * NR, wide);
            for (int i = 0; i < rows; i++) {
                sum[q * rows + i][0] += a[i * K + K - 1] * wide[0];
                sum[q * rows + i][1] += a[i * K + K - 1] * wide[1];
            }
        }
    real last[STRIP * NR];
#pragma GCC unroll 4
    for (int i = 0; i < rows * panels; i++) {
        memcpy(last + i * NR, &sum[i][0], BYTES);
        memcpy(last + i * NR + LANES, &sum[i][1], BYTES);
    }
    finish(w, rows, panels, last, p * NR, c);
}

/* All rows of c, in the columns of STRIP panels from panel `first` on. */
INLINE void strips(const int kind, const matrix *w, int64_t M, const real *a, int64_t first, real *c) {
    int64_t K = w->K, N = w->N, panels = (N + NR - 1) / NR;
    int64_t end = first + STRIP < panels ? first + STRIP : panels;
    if (M == 1 && end - first == STRIP) {
        strip(kind, 1, STRIP, w, a, first, c);
        return;
    }
    for (int64_t p = first; p < end; p++) {
        int64_t m = 0;
        for (; m + 4 <= M; m += 4) strip(kind, 4, 1, w, a + m * K, p, c + m * N);
        for (; m < M; m++) strip(kind, 1, 1, w, a + m * K, p, c + m * N);
    }
}

/* c (M, N) = a (M, K) W, scaled, and the bias. */
static void times(const matrix *w, int64_t M, const real *a, real *c) {
#pragma omp parallel for schedule(static) if (M * w->K * w->N > 16 * ENOUGH)
    for (int64_t first = 0; first < (w->N + NR - 1) / NR; first += STRIP) {
        if (w->kind == PLAIN) strips(PLAIN, w, M, a, first, c);
        if (w->kind == HALF) strips(HALF, w, M, a, first, c);
        if (w->kind == BYTE) strips(BYTE, w, M, a, first, c);
    }
}

/* One step: ids (B,) and the state h, c (layers, B, H) to logits (B, V) and the state after.
 * work: room for 2 B G H numbers. Returns 1, and does nothing, for an id out of range. */
EXPORT int step(const model *m, int64_t B, const int64_t *ids, const real *h, const real *c, real *work,
                real *h_after, real *c_after, real *logits) {
    const int64_t H = m->H, BH = B * H, G = gates_of(m->cell);
    real *gates = work, *share = work + G * BH;
    for (int64_t b = 0; b < B; b++)
        if (ids[b] < 0 || ids[b] >= m->V) return 1;
    for (int64_t k = 0; k < m->layers; k++, h += BH, c += BH, h_after += BH, c_after += BH) {
        const real *x = k ? share : m->table;
        const int64_t *rows = k ? NULL : ids;
        if (k) times(&m->layer[k].input, B, h_after - BH, share);
        times(&m->layer[k].recurrent, B, h, gates);
        for (int64_t b = 0; b < B; b++) {
            const real *xb = x + (rows ? rows[b] : b) * G * H, *u = gates + b * G * H;
            real *y = h_after + b * H;
            if (m->cell == LSTM)
                lstm_forward(H, H, xb, u, H, c + b * H, c_after + b * H, y, NULL);
            else if (m->cell == GRU)
                gru_forward(H, H, xb, m->layer[k].b_hn, u, H, h + b * H, y, y, NULL);
            else
                rnn_forward(m->cell == RELU, H, xb, u, y);
        }
    }
    times(&m->head, B, h_after - BH, logits);
    return 0;
}

/* How characters are drawn; 0 turns a filter off. */
typedef struct {
    double temperature; /* above 0 */
    int64_t top_k;
    double top_p, min_p;
} draw_options;

/* Draw ids (B,) from logits (B, V) by uniforms (B,), numbers in [0, 1). With a filter the rows must be sorted in
 * descending order, so that each filter keeps the first characters of a row. work: room for V numbers.
 * Returns 1 if a logit is not finite. */
EXPORT int draw(int64_t B, int64_t V, const draw_options *options, const real *logits, const double *uniforms,
                double *work, int64_t *ids) {
    const double top_p = options->top_p, min_p = options->min_p, temperature = options->temperature;
    const int64_t top_k = options->top_k > 0 && options->top_k < V ? options->top_k : V;
    for (int64_t b = 0; b < B; b++, logits += V) {
        double best = logits[0], check = 0, total = 0, *up_to = work;
        for (int64_t j = 0; j < V; j++) {
            check += logits[j] * 0.0; /* 0, or NaN */
            best = logits[j] > best ? logits[j] : best;
        }
        if (check != 0) return 1;
        for (int64_t j = 0; j < top_k; j++) up_to[j] = total += exp((logits[j] - best) / temperature);
        int64_t last = top_k - 1, j = 0; /* the last character kept */
        if (top_p > 0 && top_p < 1)
            for (last = 0; last < top_k - 1 && up_to[last] / total < top_p;) last++;
        while (last > 0 && exp((logits[last] - best) / temperature) < min_p) last--;
        while (j < last && up_to[j] <= uniforms[b] * up_to[last]) j++;
        ids[b] = j;
    }
    return 0;
}
