/* The steps of training, called by `fused` at every time step: the arithmetic of the cells, forward and backward,
 * each in one pass over memory, and a product with a matrix that is packed once and used at all steps. The steps of
 * writing text, called by `stepper`, are in kernels_writing.c.
 *
 * `native` compiles this file for the machine's instructions, once for each type of number:
 *   -DSTORE=f32   float32 throughout
 *   -DSTORE=f64   float64 throughout
 *   -DSTORE=bf16  products' operands and results in bfloat16, cell state and arithmetic in float32
 *
 * Letters are those of cells.py: B batch, H hidden; row b of the input's part of a step is x[ids[b]], or x[b]
 * where ids is NULL. All matrices are row-major and contiguous.
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
INLINE real sigmoid(real x) { return 1 / (1 + exp(-x)); }
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
INLINE real sigmoid(real x) { /* 1 / (1 + e^-x) */
    real scale, q = reduced(-x, &scale);
    return 1 / (1 + (q + 1) * scale);
}
INLINE real tanh_(real x) { /* m / (m + 2) with m = e^2x - 1, which keeps the relative precision near 0 */
    real scale, q = reduced(2 * x, &scale), m = scale * q + (scale - 1);
    return m / (m + 2);
}
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

/* From dy + dh + direct, the gradient of h: dx (B, 3H) of the input's part, du (B, 3H) of the recurrent
 * product, du_n (B, H) a copy of its last third, and direct, the part of h_before's
 * gradient that comes through no product. */
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

#if STORE != bf16 && defined(__AVX__) /* elsewhere torch's product is used */
/* C = A W for a W (K, N) that `pack` has laid out in panels of NR columns, each (K, NR), so that the
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

/* W[k, n] is w[k * row + n * column]. */
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

#include "kernels_writing.c"
#endif
