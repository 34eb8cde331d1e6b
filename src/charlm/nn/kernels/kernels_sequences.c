/* A layer over a whole sequence, forward and backward, in one call. Included by kernels.c.
 *
 * The rows of a batch do not depend on each other: each thread takes its rows through all time steps and waits for no
 * other. Only with a few rows, fewer than threads, do the threads share the units instead; they then meet at each
 * step. */
enum { RNN, RELU, LSTM, GRU };
/* Rows and units whose recurrent products are computed before their arithmetic, so that these stay in cache. */
#define TILE 48
#define UNITS 64
#define FEW 4 /* rows below which threads share the units of each row */

typedef struct {
    int64_t cell, T, B, H, threads;
    int64_t state_step;  /* B H, or 0 where only the last state is kept */
    const store *x;      /* the input's part of each step, (T, B, G H); with ids a table of it, (V, G H) */
    const int64_t *ids;  /* (T, B), or NULL */
    const store *W_hh;   /* (G H, H) */
    store *packed;       /* room for `packed_size` numbers */
    const real *b_hn;    /* GRU: (H,) */
    store *y;            /* (T + 1, B, H): h, the first one given */
    real *state;         /* LSTM: c; GRU: h, the memory of y where that is `real`; (T + 1, B, H) or (B, H) */
    store *gates;        /* LSTM, GRU: (T, B, 4 H), or NULL to keep none */
    const store *dy;     /* backward: (T, B, H) */
    store *dx, *du;      /* backward: (T, B, G H), gradients of x and of the recurrent product; the GRU's differ */
    real *dh, *dstate;   /* backward: (B, H), of the last step and then of the first one */
} sequence;

INLINE int64_t gates_of(int64_t cell) { return cell == LSTM ? 4 : cell == GRU ? 3 : 1; }

EXPORT int64_t packed_size(int64_t cell, int64_t H, int backward) {
    int64_t G = gates_of(cell);
    return panels_of(H) * (backward ? panel_size(G * H) : G * panel_size(H));
}

/* Wait until all threads have come here as often as this one. A thread that waits for one that is not running gives
 * its processor up after some microseconds. */
typedef struct {
    int count, phase;
} meeting;

static void meet(meeting *m, int threads) {
    int phase = __atomic_load_n(&m->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&m->count, 1, __ATOMIC_ACQ_REL) == threads) {
        m->count = 0;
        __atomic_store_n(&m->phase, phase + 1, __ATOMIC_RELEASE);
    }
    for (int spins = 0; __atomic_load_n(&m->phase, __ATOMIC_ACQUIRE) == phase; spins++) {
        if (spins > 2000) {
            struct timespec moment = {0, 1000};
            nanosleep(&moment, NULL);
        }
#if defined(__x86_64__)
        else if (spins > 20)
            __builtin_ia32_pause();
#endif
    }
}

/* A thread's rows and panels of units. */
typedef struct {
    int64_t first_row, last_row, first_panel, last_panel;
    int together; /* threads that share each row */
    meeting *meeting;
} share;

/* The arithmetic of n units of a row, from unit j on. */
INLINE void units(const int cell, const sequence *s, int64_t n, int64_t j, const store *x, const real *u,
                  int64_t before, int64_t after, store *h, store *gates) {
    const int64_t stride = TILE * UNITS;
    if (cell == LSTM)
        lstm_forward(n, s->H, x, u, stride, s->state + before, s->state + after, h, gates);
    else if (cell == GRU)
        gru_forward(n, s->H, x, s->b_hn + j, u, stride, s->state + before, s->state + after, h, gates);
    else
        rnn_forward(cell == RELU, n, x, u, h);
}

INLINE void forward(const int cell, const sequence *s, share own) {
    const int64_t B = s->B, H = s->H, BH = B * H, GH = gates_of(cell) * H, size = panel_size(H);
    real tile[4 * TILE * UNITS] __attribute__((aligned(64)));
    for (int64_t t = 0; t < s->T; t++) {
        const store *x = s->ids ? s->x : s->x + t * B * GH;
        const int64_t *ids = s->ids ? s->ids + t * B : NULL;
        for (int64_t first = own.first_row; first < own.last_row; first += TILE) {
            const int64_t rows = own.last_row - first < TILE ? own.last_row - first : TILE;
            for (int64_t p = own.first_panel; p < own.last_panel; p += UNITS / NR) {
                const int64_t end = p + UNITS / NR < own.last_panel ? p + UNITS / NR : own.last_panel;
                for (int64_t g = 0; g < gates_of(cell); g++)
                    for (int64_t q = p; q < end; q++)
                        product(rows, H, s->y + t * BH + first * H, H, s->packed + (g * panels_of(H) + q) * size,
                                tile + g * TILE * UNITS + (q - p) * NR, UNITS, NR);
                const int64_t j = p * NR, n = end * NR < H ? end * NR - j : H - j;
                for (int64_t b = first; b < first + rows; b++) {
                    const store *xb = x + (ids ? ids[b] : b) * GH + j;
                    const real *u = tile + (b - first) * UNITS;
                    const int64_t at = b * H + j, before = t * s->state_step + at, after = before + s->state_step;
                    store *h = s->y + (t + 1) * BH + at;
                    store *gates = s->gates ? s->gates + 4 * (t * BH + b * H) + j : NULL;
                    if (n == UNITS)
                        units(cell, s, UNITS, j, xb, u, before, after, h, gates);
                    else
                        units(cell, s, n, j, xb, u, before, after, h, gates);
                }
            }
        }
        if (own.together > 1) meet(own.meeting, own.together);
    }
}

INLINE void backward(const int cell, const sequence *s, share own) {
    const int64_t H = s->H, BH = s->B * H, GH = gates_of(cell) * H, size = panel_size(GH);
    const int64_t rows = own.last_row - own.first_row, j = own.first_panel * NR;
    const int64_t end = own.last_panel * NR < H ? own.last_panel * NR : H, n = end - j;
    for (int64_t t = s->T - 1; t >= 0; t--) {
        for (int64_t b = own.first_row; b < own.last_row; b++) {
            const int64_t at = b * H + j, now = t * BH + at, gate = GH * (t * s->B + b) + j;
            const store *dy = s->dy + now;
            store *dx = s->dx + gate;
            if (cell == RNN || cell == RELU) {
                rnn_backward(cell == RELU, n, s->y + BH + now, dy, s->dh + at, dx);
                continue;
            }
            const store *gates = s->gates + 4 * (t * BH + b * H) + j;
            const real *before = s->state + now;
            if (cell == LSTM)
                lstm_backward(n, H, gates, before, before + BH, dy, s->dh + at, dx, s->dstate + at);
            else
                gru_backward(n, H, gates, before, dy, s->dh + at, s->dstate + at, dx, s->du + gate);
        }
        if (own.together > 1) meet(own.meeting, own.together);
        for (int64_t p = own.first_panel; p < own.last_panel; p++)
            product(rows, GH, s->du + (t * s->B + own.first_row) * GH, GH, s->packed + p * size,
                    s->dh + own.first_row * H + p * NR, H, H - p * NR);
    }
}

/* Pack W_hh and give each thread its share of the work. */
INLINE void run(const int cell, const int backwards, const sequence *s) {
    const int64_t H = s->H, G = gates_of(cell), panels = panels_of(H);
    const int64_t shares = s->B < FEW ? panels : s->B, count = s->threads < shares ? s->threads : shares;
    meeting meeting = {0, 0};
#pragma omp parallel num_threads((int)count) if (count > 1)
    {
        int threads = 1, thread = 0;
#ifdef _OPENMP
        threads = omp_get_num_threads();
        thread = omp_get_thread_num();
#endif
        if (backwards) {
#pragma omp for
            for (int64_t p = 0; p < panels; p++)
                pack_panel(G * H, H, s->W_hh, H, 1, p * NR, s->packed + p * panel_size(G * H));
        } else {
#pragma omp for
            for (int64_t q = 0; q < G * panels; q++)
                pack_panel(H, H, s->W_hh + q / panels * H * H, 1, H, q % panels * NR, s->packed + q * panel_size(H));
        }
        share own = {0, s->B, 0, panels, 1, &meeting};
        if (s->B < threads) {
            own.first_panel = panels * thread / threads;
            own.last_panel = panels * (thread + 1) / threads;
            own.together = threads;
        } else {
            own.first_row = s->B * thread / threads;
            own.last_row = s->B * (thread + 1) / threads;
        }
        if (backwards)
            backward(cell, s, own);
        else
            forward(cell, s, own);
    }
}

EXPORT void sequence_forward(const sequence *s) {
    switch (s->cell) {
        case RNN: run(RNN, 0, s); break;
        case RELU: run(RELU, 0, s); break;
        case LSTM: run(LSTM, 0, s); break;
        case GRU: run(GRU, 0, s); break;
    }
}

EXPORT void sequence_backward(const sequence *s) {
    switch (s->cell) {
        case RNN: run(RNN, 1, s); break;
        case RELU: run(RELU, 1, s); break;
        case LSTM: run(LSTM, 1, s); break;
        case GRU: run(GRU, 1, s); break;
    }
}
