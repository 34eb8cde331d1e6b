/* What `fused` does at every time step and `stepper` for every character, in one pass over memory each: the cells' arithmetic, forward and
 * backward, and a matrix product with a matrix that is packed once and used at all steps.
 *
 * `native` compiles this file with the machine's own instructions, once for each type of number:
 *   -DSTORE=f32   float32 throughout
 *   -DSTORE=f64   float64 throughout
 *   -DSTORE=bf16  products' operands and results in bfloat16, cell state and arithmetic in float32
 *
 * Letters are those of cells.py: B batch, H hidden; row b of a step's input share is x[ids[b]], or x[b] where
 * ids is NULL. All matrices are row-major and contiguous.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define f32 1
#define f64 2
#define bf16 3

#if STORE == f64
typedef double real;
typedef double store;
#else
typedef float real;
#if STORE == f32
typedef float store;
#else
typedef uint16_t store;
#endif
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define ENOUGH 4096 /* numbers below which a second thread costs more than it brings */

#if STORE == bf16
INLINE real load(store value) {
    uint32_t bits = (uint32_t)value << 16;
    real result;
    memcpy(&result, &bits, 4);
    return result;
}
INLINE store keep(real value) { /* round to nearest, ties to even; what is not a number stays so */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (store)(value == value ? rounded : 0x7FC0);
}
#else
INLINE real load(store value) { return value; }
INLINE store keep(real value) { return value; }
#endif

#if STORE == f64
INLINE real sigmoid(real x) { return 1 / (1 + exp(-x)); }
INLINE real tanh_(real x) { return tanh(x); }
#else
/* e^x to float32 rounding: 2^n e^r, |r| <= ln 2 / 2, the polynomial of Cephes' expf (Moshier 1992). It has
 * no branches, so that the compiler turns it into vector instructions. */
INLINE real exp_(real x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    real shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's last bits are the nearest integer */
    real n = shifted - 12582912.0f;
    real r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    real p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23; /* n as the exponent; the shift drops the rest of `shifted` */
    real scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}
INLINE real sigmoid(real x) { return 1 / (1 + exp_(-x)); }
INLINE real tanh_(real x) { return 2 * sigmoid(2 * x) - 1; }
#endif

/* h = tanh(x + u) or max(0, x + u); u, the recurrent product, and h are (B, H) and may be the same. */
EXPORT void rnn_forward(int64_t B, int64_t H, int relu, const store *x, const int64_t *ids, const store *u,
                        store *h) {
#pragma omp parallel for if (B * H > ENOUGH)
    for (int64_t b = 0; b < B; b++) {
        const store *xb = x + (ids ? ids[b] : b) * H, *ub = u + b * H;
        store *hb = h + b * H;
        if (relu) {
#pragma omp simd
            for (int64_t j = 0; j < H; j++) {
                real a = load(xb[j]) + load(ub[j]);
                hb[j] = keep(a < 0 ? 0 : a);
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < H; j++) hb[j] = keep(tanh_(load(xb[j]) + load(ub[j])));
        }
    }
}

/* da = (dy + dh) * (1 - h^2), or where h > 0: (dy + dh). */
EXPORT void rnn_backward(int64_t B, int64_t H, int relu, const store *h, const store *dy, const store *dh,
                         store *da) {
#pragma omp parallel for if (B * H > ENOUGH)
    for (int64_t b = 0; b < B; b++) {
        const store *hb = h + b * H, *yb = dy + b * H, *nb = dh + b * H;
        store *ab = da + b * H;
        if (relu) {
#pragma omp simd
            for (int64_t j = 0; j < H; j++) ab[j] = keep(load(hb[j]) > 0 ? load(yb[j]) + load(nb[j]) : 0);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < H; j++) {
                real hj = load(hb[j]);
                ab[j] = keep((load(yb[j]) + load(nb[j])) * (1 - hj * hj));
            }
        }
    }
}

/* gates (B, 4H) hold the recurrent product and then i, f, g, o; c from c_before; h (B, H). */
EXPORT void lstm_forward(int64_t B, int64_t H, const store *x, const int64_t *ids, store *gates,
                         const real *c_before, real *c, store *h) {
#pragma omp parallel for if (B * H > ENOUGH)
    for (int64_t b = 0; b < B; b++) {
        const store *xb = x + (ids ? ids[b] : b) * 4 * H;
        store *gb = gates + b * 4 * H, *hb = h + b * H;
        const real *pb = c_before + b * H;
        real *cb = c + b * H;
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
            real i = sigmoid(load(xb[j]) + load(gb[j]));
            real f = sigmoid(load(xb[H + j]) + load(gb[H + j]));
            real g = tanh_(load(xb[2 * H + j]) + load(gb[2 * H + j]));
            real o = sigmoid(load(xb[3 * H + j]) + load(gb[3 * H + j]));
            real cj = f * pb[j] + i * g;
            cb[j] = cj;
            hb[j] = keep(o * tanh_(cj));
            gb[j] = keep(i);
            gb[H + j] = keep(f);
            gb[2 * H + j] = keep(g);
            gb[3 * H + j] = keep(o);
        }
    }
}

/* From dy + dh and dc (in: the gradient of c, out: of c_before): da (B, 4H), of the gates' sums. */
EXPORT void lstm_backward(int64_t B, int64_t H, const store *gates, const real *c_before, const real *c,
                          const store *dy, const store *dh, store *da, real *dc) {
#pragma omp parallel for if (B * H > ENOUGH)
    for (int64_t b = 0; b < B; b++) {
        const store *gb = gates + b * 4 * H, *yb = dy + b * H, *nb = dh + b * H;
        const real *pb = c_before + b * H, *cb = c + b * H;
        store *ab = da + b * 4 * H;
        real *db = dc + b * H;
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
            real i = load(gb[j]), f = load(gb[H + j]), g = load(gb[2 * H + j]), o = load(gb[3 * H + j]);
            real tanh_c = tanh_(cb[j]), d = load(yb[j]) + load(nb[j]);
            real dcj = db[j] + d * o * (1 - tanh_c * tanh_c);
            ab[j] = keep(dcj * g * i * (1 - i));
            ab[H + j] = keep(dcj * pb[j] * f * (1 - f));
            ab[2 * H + j] = keep(dcj * i * (1 - g * g));
            ab[3 * H + j] = keep(d * tanh_c * o * (1 - o));
            db[j] = dcj * f;
        }
    }
}

/* gates (B, 3H) hold the recurrent product and then r, z and u_n = W_hn h + b_hn; n (B, H). h (B, H) is the
 * state; h_kept is the same array, or in bfloat16 its rounded copy for the next product. */
EXPORT void gru_forward(int64_t B, int64_t H, const store *x, const int64_t *ids, const real *b_hn,
                        store *gates, const real *h_before, store *n, real *h, store *h_kept) {
#pragma omp parallel for if (B * H > ENOUGH)
    for (int64_t b = 0; b < B; b++) {
        const store *xb = x + (ids ? ids[b] : b) * 3 * H;
        const real *pb = h_before + b * H;
        store *gb = gates + b * 3 * H, *nb = n + b * H;
        real *hb = h + b * H;
#if STORE == bf16
        store *kb = h_kept + b * H;
#endif
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
            real r = sigmoid(load(xb[j]) + load(gb[j]));
            real z = sigmoid(load(xb[H + j]) + load(gb[H + j]));
            real u = load(gb[2 * H + j]) + b_hn[j];
            real nj = tanh_(load(xb[2 * H + j]) + r * u);
            real hj = nj + z * (pb[j] - nj);
            hb[j] = hj;
#if STORE == bf16
            kb[j] = keep(hj);
#endif
            gb[j] = keep(r);
            gb[H + j] = keep(z);
            gb[2 * H + j] = keep(u);
            nb[j] = keep(nj);
        }
    }
}

/* From dy + dh + direct, the gradient of h: dx (B, 3H) of the input's share, du (B, 3H) of the recurrent
 * product, du_n (B, H) its last third again, to keep, and direct, the part of h_before's that is no product. */
EXPORT void gru_backward(int64_t B, int64_t H, const store *gates, const store *n, const real *h_before,
                         const store *dy, const store *dh, real *direct, store *dx, store *du, store *du_n) {
#pragma omp parallel for if (B * H > ENOUGH)
    for (int64_t b = 0; b < B; b++) {
        const store *gb = gates + b * 3 * H, *nb = n + b * H, *yb = dy + b * H, *rb = dh + b * H;
        const real *pb = h_before + b * H;
        store *xb = dx + b * 3 * H, *ub = du + b * 3 * H, *kb = du_n + b * H;
        real *db = direct + b * H;
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
            real r = load(gb[j]), z = load(gb[H + j]), u = load(gb[2 * H + j]), nj = load(nb[j]);
            real d = load(yb[j]) + load(rb[j]) + db[j];
            real dn = d * (1 - z) * (1 - nj * nj);
            real dr = dn * u * r * (1 - r), dz = d * (pb[j] - nj) * z * (1 - z);
            db[j] = d * z;
            xb[j] = ub[j] = keep(dr);
            xb[H + j] = ub[H + j] = keep(dz);
            xb[2 * H + j] = keep(dn);
            ub[2 * H + j] = kb[j] = keep(dn * r);
        }
    }
}

#if STORE != bf16 && defined(__AVX__) /* elsewhere torch's own product is the one to use */
/* C = A W for the W (K, N) that `pack` has laid out: in panels of NR columns, each (K, NR), so that the
 * innermost loop walks memory forward. A block of MR rows of C and one panel's columns stays in registers
 * over all of K (Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication"). */
#if defined(__AVX512F__)
#define BYTES 64
#define MR 12
#else
#define BYTES 32
#define MR 6
#endif
#define LANES (BYTES / (int)sizeof(real))
#define NR (2 * LANES)
#define ROWS (8 * MR) /* rows of C in one thread's piece of work */
typedef real vector __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

EXPORT int64_t packed_size(int64_t K, int64_t N) { return (N + NR - 1) / NR * NR * K; }

/* W[k, n] stands at w[k * row + n * column]. */
EXPORT void pack(int64_t K, int64_t N, const real *w, int64_t row, int64_t column, real *packed) {
    int64_t panels = (N + NR - 1) / NR;
#pragma omp parallel for if (K * N > 16 * ENOUGH)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t k = 0; k < K; k++)
            for (int64_t j = 0; j < NR; j++) {
                int64_t n = p * NR + j;
                packed[(p * K + k) * NR + j] = n < N ? w[k * row + n * column] : 0;
            }
}

INLINE void block(const int rows, int64_t K, const real *a, const real *panel, real *c, int64_t N,
                  int64_t width) {
    vector sum[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vector){0};
    for (int64_t k = 0; k < K; k++) {
        vector left = *(const vector *)(panel + k * NR), right = *(const vector *)(panel + k * NR + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            sum[i][0] += a[i * K + k] * left;
            sum[i][1] += a[i * K + k] * right;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        if (width >= NR) {
            *(vector *)(c + i * N) = sum[i][0];
            *(vector *)(c + i * N + LANES) = sum[i][1];
        } else {
            real last[NR];
            memcpy(last, &sum[i][0], BYTES);
            memcpy(last + LANES, &sum[i][1], BYTES);
            memcpy(c + i * N, last, (size_t)width * sizeof(real));
        }
    }
}

/* a (M, K), c (M, N). */
EXPORT void product(int64_t M, int64_t K, int64_t N, const real *a, const real *packed, real *c) {
    int64_t panels = (N + NR - 1) / NR, pieces = (M + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) if (M * K * N > 16 * ENOUGH)
    for (int64_t task = 0; task < panels * pieces; task++) {
        int64_t p = task / pieces, first = task % pieces * ROWS;
        int64_t end = first + ROWS < M ? first + ROWS : M, width = N - p * NR;
        const real *panel = packed + p * K * NR;
        int64_t m = first;
        for (; m + MR <= end; m += MR) block(MR, K, a + m * K, panel, c + m * N + p * NR, N, width);
        switch (end - m) {
#define REST(rows) \
    case rows: block(rows, K, a + m * K, panel, c + m * N + p * NR, N, width); break;
            REST(1) REST(2) REST(3) REST(4) REST(5)
#if MR > 6
            REST(6) REST(7) REST(8) REST(9) REST(10) REST(11)
#endif
        }
    }
}

/* Writing text: one step of a whole model, for a few rows at a time. What counts then is how fast the weights
 * come from memory, so that they may stand there in fewer bits: as they are, as bfloat16, or as int8 with a
 * scale for each column. They are widened in registers; sums are always `real`.
 *
 * A sum's order depends on neither B nor the threads: a row comes out the same alone and among others. */
enum { PLAIN, HALF, BYTE };
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t loaded __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define STRIP 4 /* panels at a time for a single row, so that enough sums are under way */

/* A (K, N), in panels as `pack` lays them out. In fewer bits, a panel's 2 LANES columns of a k stand in LANES
 * words, so that a word's parts go to different vectors and a shift or a mask brings each into its place:
 * HALF: the columns j and LANES + j; BYTE: those of k and those of k + 1, K being made even with a zero.
 * scale (BYTE: times 2^-24, see `widen`) and bias are (N,) or NULL. */
typedef struct {
    int64_t kind, K, N;
    const void *weights;
    const real *scale, *bias;
} matrix;

typedef struct {
    matrix input, recurrent; /* layer 0 has no input matrix, but the table */
    const real *b_hn;        /* the GRU's; all other biases are in the table or the input matrix */
} layer;

typedef struct {
    int64_t cell, layers, H, V; /* cell: 0 rnn with tanh, 1 with relu, 2 lstm, 3 gru */
    const real *table;          /* (V, G H): layer 0's input share of every character */
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

/* c from its sums, which stand panel by panel and row by row: the columns from n on, scaled, and the bias. */
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
static void multiply(const matrix *w, int64_t M, const real *a, real *c) {
#pragma omp parallel for schedule(static) if (M * w->K * w->N > 16 * ENOUGH)
    for (int64_t first = 0; first < (w->N + NR - 1) / NR; first += STRIP) {
        if (w->kind == PLAIN) strips(PLAIN, w, M, a, first, c);
        if (w->kind == HALF) strips(HALF, w, M, a, first, c);
        if (w->kind == BYTE) strips(BYTE, w, M, a, first, c);
    }
}

/* One character further: ids (B,) and the state h, c (layers, B, H) to logits (B, V) and the state after.
 * work: room for B (2 G + 1) H numbers. Returns 1, having done nothing, for an id that is none. */
EXPORT int step(const model *m, int64_t B, const int64_t *ids, const real *h, const real *c, real *work,
                real *h_after, real *c_after, real *logits) {
    const int64_t H = m->H, BH = B * H, G = m->cell == 2 ? 4 : m->cell == 3 ? 3 : 1;
    real *gates = work, *share = work + G * BH, *n = work + 2 * G * BH;
    for (int64_t b = 0; b < B; b++)
        if (ids[b] < 0 || ids[b] >= m->V) return 1;
    for (int64_t k = 0; k < m->layers; k++, h += BH, c += BH, h_after += BH, c_after += BH) {
        const real *x = k ? share : m->table;
        const int64_t *rows = k ? NULL : ids;
        if (k) multiply(&m->layer[k].input, B, h_after - BH, share);
        multiply(&m->layer[k].recurrent, B, h, gates);
        if (m->cell == 2)
            lstm_forward(B, H, x, rows, gates, c, c_after, h_after);
        else if (m->cell == 3)
            gru_forward(B, H, x, rows, m->layer[k].b_hn, gates, h, n, h_after, h_after);
        else
            rnn_forward(B, H, (int)m->cell, x, rows, gates, h_after);
    }
    multiply(&m->head, B, h_after - BH, logits);
    return 0;
}

/* ids (B,), drawn from the first `kept` of each row of logits (B, V) as chances (B,) in [0, 1) say; where
 * top_p is below 1 the rows are sorted, the largest first. Returns 1 if a number is not finite. */
EXPORT int draw(int64_t B, int64_t V, int64_t kept, double temperature, double top_p, const real *logits,
                const double *chances, double *up_to, int64_t *ids) {
    for (int64_t b = 0; b < B; b++, logits += V) {
        double best = logits[0], check = 0, total = 0;
        for (int64_t j = 0; j < V; j++) {
            check += logits[j] * 0.0; /* 0, or not a number */
            best = logits[j] > best ? logits[j] : best;
        }
        if (check != 0) return 1;
        for (int64_t j = 0; j < kept; j++) up_to[j] = total += exp((logits[j] - best) / temperature);
        int64_t last = kept - 1, j = 0;
        if (top_p < 1)
            for (last = 0; last < kept - 1 && up_to[last] / total < top_p;) last++;
        while (j < last && up_to[j] <= chances[b] * up_to[last]) j++;
        ids[b] = j;
    }
    return 0;
}
#endif
