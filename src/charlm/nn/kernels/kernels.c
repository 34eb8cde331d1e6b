/* The arithmetic of the cells, products with packed matrices, and, in the files included at the end, the sequences of
 * training and scoring, the rest of a training step, and the steps of writing text.
 *
 * `native` compiles this file for the machine's instructions, once for each type of number:
 *   -DSTORE=f32   float32 throughout
 *   -DSTORE=f64   float64 throughout
 *   -DSTORE=bf16  products' operands and results in bfloat16; sums, cell state and arithmetic in float32
 *
 * Letters are those of cells.py: T time, B batch, H hidden, G gates. All matrices are row-major.
 */
#ifdef _OPENMP
#include <omp.h>
#endif
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

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
#define ENOUGH 4096 /* numbers below which a second thread takes longer to start than it saves */

#if STORE == bf16
INLINE real load(store value) {
    uint32_t bits = (uint32_t)value << 16;
    real result;
    memcpy(&result, &bits, 4);
    return result;
}
INLINE store keep(real value) { /* round to nearest, ties to even; NaN stays NaN */
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
INLINE real exp_(real x) { return exp(x); }
INLINE real tanh_(real x) { return tanh(x); }
#else
/* Returns e^r - 1 and sets scale = 2^n for x = n ln 2 + r, |r| <= ln 2 / 2, by the polynomial of Cephes' expf
 * (Moshier 1992). It has no branches, so that the compiler turns it into vector instructions. */
INLINE real reduced(real x, real *scale) {
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
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23; /* n as the exponent; the shift drops the rest of `shifted` */
    memcpy(scale, &bits, 4);
    return p * r * r + r;
}
INLINE real exp_(real x) {
    real scale, q = reduced(x, &scale);
    return (q + 1) * scale;
}
INLINE real tanh_(real x) { /* m / (m + 2) with m = e^2x - 1, which keeps the relative precision near 0 */
    real scale, q = reduced(2 * x, &scale), m = scale * q + (scale - 1);
    return m / (m + 2);
}
#endif
INLINE real sigmoid(real x) { return 1 / (1 + exp_(-x)); }

/* The cells, for n units of one row of the batch; x: the input's part of the step; u: the recurrent product, in rows
 * of `stride` numbers, one for each gate; gates (G, H), or NULL where no backward pass follows. */

/* h = tanh(x + u) or max(0, x + u). */
INLINE void rnn_forward(int relu, int64_t n, const store *x, const real *u, store *h) {
    if (relu) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            real a = load(x[j]) + u[j];
            h[j] = keep(a < 0 ? 0 : a);
        }
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) h[j] = keep(tanh_(load(x[j]) + u[j]));
    }
}

/* da = (dy + dh) * (1 - h^2), or where h > 0: (dy + dh). */
INLINE void rnn_backward(int relu, int64_t n, const store *h, const store *dy, const real *dh, store *da) {
    if (relu) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) da[j] = keep(load(h[j]) > 0 ? load(dy[j]) + dh[j] : 0);
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            real hj = load(h[j]);
            da[j] = keep((load(dy[j]) + dh[j]) * (1 - hj * hj));
        }
    }
}

/* gates: i, f, g, o. c may be c_before. */
INLINE void lstm_forward(int64_t n, int64_t H, const store *x, const real *u, int64_t stride, const real *c_before,
                         real *c, store *h, store *gates) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        real i = sigmoid(load(x[j]) + u[j]);
        real f = sigmoid(load(x[H + j]) + u[stride + j]);
        real g = tanh_(load(x[2 * H + j]) + u[2 * stride + j]);
        real o = sigmoid(load(x[3 * H + j]) + u[3 * stride + j]);
        real cj = f * c_before[j] + i * g;
        c[j] = cj;
        h[j] = keep(o * tanh_(cj));
        if (gates) {
            gates[j] = keep(i);
            gates[H + j] = keep(f);
            gates[2 * H + j] = keep(g);
            gates[3 * H + j] = keep(o);
        }
    }
}

/* From dy + dh and dc (in: the gradient of c, out: of c_before): da (4, H), of the gates' sums. */
INLINE void lstm_backward(int64_t n, int64_t H, const store *gates, const real *c_before, const real *c,
                          const store *dy, const real *dh, store *da, real *dc) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        real i = load(gates[j]), f = load(gates[H + j]), g = load(gates[2 * H + j]), o = load(gates[3 * H + j]);
        real tanh_c = tanh_(c[j]), d = load(dy[j]) + dh[j];
        real dcj = dc[j] + d * o * (1 - tanh_c * tanh_c);
        da[j] = keep(dcj * g * i * (1 - i));
        da[H + j] = keep(dcj * c_before[j] * f * (1 - f));
        da[2 * H + j] = keep(dcj * i * (1 - g * g));
        da[3 * H + j] = keep(d * tanh_c * o * (1 - o));
        dc[j] = dcj * f;
    }
}

/* gates: r, z, n and u_n = W_hn h + b_hn. h is the state; y the same memory, or in bfloat16 its rounded copy for the
 * next product. */
INLINE void gru_forward(int64_t n, int64_t H, const store *x, const real *b_hn, const real *u, int64_t stride,
                        const real *h_before, real *h, store *y, store *gates) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        real r = sigmoid(load(x[j]) + u[j]);
        real z = sigmoid(load(x[H + j]) + u[stride + j]);
        real u_n = u[2 * stride + j] + b_hn[j];
        real nj = tanh_(load(x[2 * H + j]) + r * u_n);
        real hj = nj + z * (h_before[j] - nj);
        h[j] = hj;
#if STORE == bf16
        y[j] = keep(hj);
#endif
        if (gates) {
            gates[j] = keep(r);
            gates[H + j] = keep(z);
            gates[2 * H + j] = keep(nj);
            gates[3 * H + j] = keep(u_n);
        }
    }
}

/* From dy + dh + direct, the gradient of h: dx (3, H) of the input's part, du (3, H) of the recurrent product, and
 * direct, the part of h_before's gradient that comes through no product. */
INLINE void gru_backward(int64_t n, int64_t H, const store *gates, const real *h_before, const store *dy,
                         const real *dh, real *direct, store *dx, store *du) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        real r = load(gates[j]), z = load(gates[H + j]), nj = load(gates[2 * H + j]), u_n = load(gates[3 * H + j]);
        real d = load(dy[j]) + dh[j] + direct[j];
        real dn = d * (1 - z) * (1 - nj * nj);
        real dr = dn * u_n * r * (1 - r), dz = d * (h_before[j] - nj) * z * (1 - z);
        direct[j] = d * z;
        dx[j] = du[j] = keep(dr);
        dx[H + j] = du[H + j] = keep(dz);
        dx[2 * H + j] = keep(dn);
        du[2 * H + j] = keep(dn * r);
    }
}

/* Products. A matrix W (K, N) is packed in panels of NR columns, each (K, NR), so that the innermost loop walks memory
 * forward; a block of up to MR rows of the result and one panel's columns stays in registers over all of K (Goto & van
 * de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication"). In bfloat16 two rows of a panel lie side by
 * side in words of 32 bits, as the instruction for dot products takes them. The order of a sum does not depend on the
 * number of rows. */
#if defined(__AVX512F__)
#define BYTES 64
#define MR 12
#elif defined(__AVX__)
#define BYTES 32
#define MR 6
#elif defined(__aarch64__)
#define BYTES 16
#define MR 12
#else
#define BYTES 16
#define MR 6
#endif
#define LANES (BYTES / (int)sizeof(real))
#define NR (2 * LANES)
#define PAIR (int)(sizeof(real) / sizeof(store)) /* rows of a panel side by side */
typedef real vector __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t loaded __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE int64_t panels_of(int64_t N) { return (N + NR - 1) / NR; }
INLINE int64_t panel_size(int64_t K) { return (K + PAIR - 1) / PAIR * PAIR * NR; }

/* Numbers of `width` columns, the last ones 0, from W (K, n), where W[k, j] is w[k * row + j * column]. */
INLINE void pack_strided(int64_t K, int64_t width, int64_t n, const store *w, int64_t row, int64_t column, store *packed) {
    if (n < width || K % PAIR) memset(packed, 0, (size_t)((K + PAIR - 1) / PAIR * PAIR * width) * sizeof(store));
    int64_t k = 0;
    for (; k + PAIR <= K; k += PAIR)
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < PAIR; i++) packed[k * width + j * PAIR + i] = w[(k + i) * row + j * column];
    for (int64_t j = 0; k < K && j < n; j++) packed[k * width + j * PAIR] = w[k * row + j * column];
}
static void pack(int64_t K, int64_t width, int64_t n, const store *w, int64_t row, int64_t column, store *packed) {
    if (column == 1)
        pack_strided(K, width, n, w, row, 1, packed);
    else if (row == 1)
        pack_strided(K, width, n, w, 1, column, packed);
    else
        pack_strided(K, width, n, w, row, column, packed);
}

/* One panel: the columns from `first` on of W (K, N). */
INLINE void pack_panel(int64_t K, int64_t N, const store *w, int64_t row, int64_t column, int64_t first, store *panel) {
    pack(K, NR, N - first < NR ? N - first : NR, w + first * column, row, column, panel);
}

#if STORE == bf16
INLINE floats part(words word, int high) { return (floats)(high ? word & 0xFFFF0000 : word << 16); }

/* sum + the products of the pairs in `w` with the pair `a`. */
INLINE vector dot(vector sum, words w, uint32_t a) {
#if defined(__AVX512BF16__)
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)a));
#else
    sum += load((store)a) * part(w, 0);
    return sum + load((store)(a >> 16)) * part(w, 1);
#endif
}

/* sum + the products of a pair of each row, or with 2 bytes of a single number, with two rows of a panel. */
INLINE void add_pairs(const int rows, const int bytes, const store *a, int64_t lda, const store *panel,
                      vector sum[MR][2]) {
    words left = *(const loaded *)panel, right = *(const loaded *)(panel + 2 * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        uint32_t pair = 0;
        memcpy(&pair, a + i * lda, bytes);
        sum[i][0] = dot(sum[i][0], left, pair);
        sum[i][1] = dot(sum[i][1], right, pair);
    }
}
#endif

/* c (rows, width) = a (rows, K) times a panel; lda and ldc are the distances of rows, and `next` that of the numbers
 * (in bfloat16: of half a pair) of a row of a. */
INLINE void block(const int rows, int64_t K, const store *a, int64_t lda, int64_t next, const store *panel, real *c,
                  int64_t ldc, int64_t width) {
    vector sum[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vector){0};
#if STORE == bf16
    for (int64_t k = 0; k + 1 < K; k += 2, panel += 2 * NR) add_pairs(rows, 4, a + k * next, lda, panel, sum);
    if (K % 2) add_pairs(rows, 2, a + (K - 1) * next, lda, panel, sum);
#else
    for (int64_t k = 0; k < K; k++, panel += NR) {
        vector left = *(const vector *)panel, right = *(const vector *)(panel + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            sum[i][0] += a[i * lda + k * next] * left;
            sum[i][1] += a[i * lda + k * next] * right;
        }
    }
#endif
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        if (width >= NR) {
            *(vector *)(c + i * ldc) = sum[i][0];
            *(vector *)(c + i * ldc + LANES) = sum[i][1];
        } else {
            real last[NR];
            memcpy(last, &sum[i][0], BYTES);
            memcpy(last + LANES, &sum[i][1], BYTES);
            memcpy(c + i * ldc, last, (size_t)width * sizeof(real));
        }
    }
}

/* The same for any number of rows, in blocks of nearly equal height. */
static void product(int64_t rows, int64_t K, const store *a, int64_t lda, const store *panel, real *c, int64_t ldc,
                    int64_t width) {
    int64_t blocks = (rows + MR - 1) / MR;
    for (int64_t i = 0; i < blocks; i++) {
        int64_t first = rows * i / blocks, height = rows * (i + 1) / blocks - first;
        switch (height) {
#define HEIGHT(rows) \
    case rows: block(rows, K, a + first * lda, lda, 1, panel, c + first * ldc, ldc, width); break;
            HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4) HEIGHT(5) HEIGHT(6)
#if MR > 6
            HEIGHT(7) HEIGHT(8) HEIGHT(9) HEIGHT(10) HEIGHT(11) HEIGHT(12)
#endif
        }
    }
}

#include "kernels_sequences.c"
#include "kernels_training.c"
#if STORE != bf16
#include "kernels_writing.c"
#endif
