/* What Python calls: the choice of an instruction set, the division of work among torch's threads. */
#include "interface.h"

#include <math.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#include <pthread.h>
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#define NEXT(counter) (_InterlockedExchangeAdd64((counter), 1))
#else
#define NEXT(counter) (__atomic_fetch_add((counter), 1, __ATOMIC_RELAXED))
#endif

/* ---- instruction sets -------------------------------------------------------------------------------------- */

static const Kernels *all_kernels[] = {
#if defined(__x86_64__) || defined(_M_X64)
#if !defined(WITHOUT_AVX512)
    &avx512_vnni_kernels, &avx512_kernels,
#endif
    &avx2_kernels,
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
    &neon_kernels,
#endif
    &portable_kernels,
};

#if defined(_MSC_VER) && defined(_M_X64)
static int has(const char *name) {
    int leaf[4], rest[4];
    unsigned long long enabled;
    __cpuid(leaf, 1);
    if (!(leaf[2] >> 27 & 1)) return 0; /* OSXSAVE */
    enabled = _xgetbv(0);
    __cpuidex(rest, 7, 0);
    if (!strcmp(name, "avx2"))
        return (enabled & 6) == 6 && (rest[1] >> 5 & 1) && (leaf[2] >> 12 & 1) && (leaf[2] >> 29 & 1);
    if ((enabled & 0xe6) != 0xe6 || (rest[1] & 0xc0030000) != 0xc0030000) return 0; /* F, DQ, BW, VL */
    return strcmp(name, "avx512") == 0 || (rest[2] >> 11 & 1);
}
#elif defined(__x86_64__)
static int has(const char *name) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* and F16C, as all that have these */
    if (!strcmp(name, "avx2")) return avx2;
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 && (!strcmp(name, "avx512") || __builtin_cpu_supports("avx512vnni"));
}
#else
static int has(const char *name) {
    (void)name;
    return 1;
}
#endif

/* The kernels of this name, or of the best instruction set for "": NULL if the processor lacks it. */
EXPORT const Kernels *find_kernels(const char *name) {
    for (size_t i = 0; i < sizeof all_kernels / sizeof *all_kernels; i++) {
        const Kernels *of = all_kernels[i];
        if ((!*name || !strcmp(name, of->name)) && (!strcmp(of->name, "portable") || has(of->name))) return of;
    }
    return NULL;
}

EXPORT const char *name_of(const Kernels *of) { return of->name; }

/* What the sources were when this was built; Python compares. */
#ifndef SOURCES
#define SOURCES ""
#endif
EXPORT const char *built_from(void) { return SOURCES; }

/* ---- threads ------------------------------------------------------------------------------------------------- */

typedef void (*Body)(void *);
typedef void (*Parallel)(Body, void *, unsigned, unsigned);

static Parallel torch_pool; /* GOMP_parallel of the library that torch has loaded: its threads, no others */

EXPORT void set_pool(Parallel pool) { torch_pool = pool; }

static int is_child; /* a forked process has no threads of its parent's pool, and would wait for them */
#if !defined(_WIN32)
static void in_child(void) { is_child = 1; }
#if defined(__GNUC__)
__attribute__((constructor)) static void at_load(void) { pthread_atfork(NULL, NULL, in_child); }
#endif

static void *start(void *call) {
    void **parts = call;
    Body body;
    memcpy(&body, parts, sizeof body);
    body(parts[1]);
    return NULL;
}
#endif

/* Call body in up to n threads at once, and return when all have. */
static void in_parallel(Body body, void *data, int64_t n) {
    if (n <= 1 || is_child) {
        body(data);
        return;
    }
    if (torch_pool) {
        torch_pool(body, data, (unsigned)n, 0);
        return;
    }
#if defined(_WIN32)
    body(data);
#else
    pthread_t threads[64];
    void *parts[2];
    int started = 0;
    memcpy(parts, &body, sizeof body);
    parts[1] = data;
    for (; started < n - 1 && started < 64; started++)
        if (pthread_create(threads + started, NULL, start, parts)) break;
    body(data);
    while (started) pthread_join(threads[--started], NULL);
#endif
}

/* ---- work ------------------------------------------------------------------------------------------------------ */

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* What one thread needs, in bytes; FUNCTION(prepare) in products.h divides it. */
static int64_t scratch_bytes(const Matrix *m, int64_t tokens) {
    int64_t padded = up(m->k, BLOCK), few = tokens < MAX_TOKENS ? tokens : MAX_TOKENS;
    int64_t bytes = few * padded * 2 + up(few * (padded / BLOCK) * 4, 64) + 64 + 4 * (few + 1) * padded;
    if (tokens > MAX_TOKENS) bytes += 4 * (TILE_ROWS * BLOCK + TILE_TOKENS * TILE_ROWS * MAX_LANES + TILE_TOKENS * padded);
    return up(bytes + 4 * (m->n_meta + padded), 64) + 64;
}

static int64_t n_groups(const Matrix *m) { return m->format >= FLOAT16 ? m->n : m->n / m->group; }

/* experts of one call */
#define MAX_EXPERTS 64

/* One product of a call: a matrix, its input and its output. */
typedef struct {
    const Matrix *m;
    const float *x;
    float *y;
    int64_t tokens, stride;
} Product;

typedef struct {
    const Kernels *kernels;
    const Product *products;
    int64_t n, n_tasks;
    int64_t first_task[2 * MAX_EXPERTS + 1];
    int64_t next, next_thread;
    uint8_t *scratch;
    int64_t scratch_bytes, n_threads;
    int fast;
} Products;

static void run_products(void *data) {
    Products *all = data;
    int64_t thread = NEXT(&all->next_thread);
    if (thread >= all->n_threads) return;
    for (;;) {
        int64_t task = NEXT(&all->next), i = 0;
        if (task >= all->n_tasks) return;
        while (all->first_task[i + 1] <= task) i++;
        const Product *of = all->products + i;
        int64_t groups = n_groups(of->m), tasks = all->first_task[i + 1] - all->first_task[i];
        int64_t at = task - all->first_task[i];
        all->kernels->product(of->m, of->x, of->tokens, of->y, of->stride, groups * at / tasks,
                              groups * (at + 1) / tasks, all->fast, all->scratch + thread * all->scratch_bytes);
    }
}

/* bytes of words that are worth a task of their own: below, waking a thread costs more */
#define LEAST_TASK 16384

static int64_t weight_of(const Product *of) {
    int64_t bits = of->m->format == TEN_IN_32 || of->m->format == BITS3 ? 3
                   : of->m->format == BFLOAT16                         ? 16
                                                                       : of->m->format;
    return of->m->n * of->m->k * bits / 8 * of->tokens;
}

static void multiply_all(Products *all) {
    int64_t total = 0;
    for (int64_t i = 0; i < all->n; i++) total += weight_of(all->products + i);
    int64_t per_task = total / (8 * all->n_threads);
    if (per_task < LEAST_TASK) per_task = LEAST_TASK;
    all->first_task[0] = 0;
    for (int64_t i = 0; i < all->n; i++) {
        int64_t tasks = weight_of(all->products + i) / per_task, most = n_groups(all->products[i].m);
        if (tasks > most) tasks = most;
        all->first_task[i + 1] = all->first_task[i] + (tasks ? tasks : 1);
    }
    all->n_tasks = all->first_task[all->n];
    all->next = all->next_thread = 0;
    in_parallel(run_products, all, all->n_tasks < all->n_threads ? all->n_tasks : all->n_threads);
}

/* Columns of x are padded with zeros to whole blocks; unchanged if they are whole. */
static const float *padded_rows(const float *x, int64_t rows, int64_t k, float *to) {
    int64_t padded = up(k, BLOCK);
    if (padded == k) return x;
    for (int64_t i = 0; i < rows; i++) {
        memcpy(to + i * padded, x + i * k, (size_t)k * 4);
        memset(to + i * padded + k, 0, (size_t)(padded - k) * 4);
    }
    return to;
}

/*
 * y [tokens, n] = x [tokens, k] @ W.T
 *
 * scratch: threads * scratch_bytes(), then tokens * k rounded up to BLOCK floats.
 */
EXPORT void multiply_matrix(const Kernels *kernels, const Matrix *m, const float *x, int64_t tokens, float *y,
                            int64_t threads, int64_t fast, uint8_t *scratch) {
    int64_t each = scratch_bytes(m, tokens);
    Product one = {m, padded_rows(x, tokens, m->k, (float *)(scratch + threads * each)), y, tokens, m->n};
    Products all = {kernels, &one, 1, 0, {0}, 0, 0, scratch, each, threads, (int)fast};
    multiply_all(&all);
}

/* A gated expert: offsets in place of the pointers of its matrices, into the row that holds it. */
typedef struct {
    Matrix gate, up, down;
} Expert;

static void place(Matrix *m, const Matrix *layout, const uint8_t *row) {
    *m = *layout;
    m->words = row + (intptr_t)layout->words;
    m->high = row + (intptr_t)layout->high;
    m->scale = row + (intptr_t)layout->scale;
    m->zero = row + (intptr_t)layout->zero;
    /* offset 0 is that of the first words, and no other's: there is no such field */
    m->meta_scale = layout->meta_scale ? (const uint16_t *)(row + (intptr_t)layout->meta_scale) : NULL;
    m->meta_zero = layout->meta_zero ? (const uint16_t *)(row + (intptr_t)layout->meta_zero) : NULL;
    m->zero_scale = layout->zero_scale ? (const uint16_t *)(row + (intptr_t)layout->zero_scale) : NULL;
    m->zero_zero = layout->zero_zero ? (const uint16_t *)(row + (intptr_t)layout->zero_zero) : NULL;
}

typedef struct {
    const Kernels *kernels;
    float *gate;
    const float *up;
    int64_t blocks, next, n_tasks; /* of BLOCK elements */
} Gates;

static void run_gates(void *data) {
    Gates *all = data;
    for (int64_t task; (task = NEXT(&all->next)) < all->n_tasks;) {
        int64_t first = all->blocks * task / all->n_tasks * BLOCK, last = all->blocks * (task + 1) / all->n_tasks * BLOCK;
        all->kernels->silu_and_multiply(all->gate + first, all->up + first, last - first);
    }
}

static int64_t largest_scratch(const Expert *of, int64_t tokens) {
    int64_t most = 0;
    const Matrix *all[] = {&of->gate, &of->up, &of->down};
    for (int i = 0; i < 3; i++) {
        int64_t n = scratch_bytes(all[i], tokens);
        most = n > most ? n : most;
    }
    return most;
}

/* Bytes of scratch that run_experts needs. */
EXPORT int64_t experts_scratch(const Expert *of, int64_t rows, int64_t most_tokens, int64_t threads) {
    int64_t inner = up(of->gate.n, BLOCK);
    return threads * largest_scratch(of, most_tokens) + 4 * rows * (2 * inner + up(of->gate.k, BLOCK) + of->gate.k) + 64;
}

EXPORT int64_t matrix_scratch(const Matrix *m, int64_t tokens, int64_t threads) {
    return threads * scratch_bytes(m, tokens) + 4 * tokens * up(m->k, BLOCK) + 64;
}

typedef struct {
    const float *results, *weights;
    float *y;
    int64_t tokens, n, hidden, next, n_tasks;
} Sums;

static void run_sums(void *data) {
    Sums *all = data;
    for (int64_t task; (task = NEXT(&all->next)) < all->n_tasks;)
        for (int64_t t = all->tokens * task / all->n_tasks; t < all->tokens * (task + 1) / all->n_tasks; t++) {
            const float *of = all->results + t * all->n * all->hidden, *weights = all->weights + t * all->n;
            float *restrict y = all->y + t * all->hidden;
            for (int64_t i = 0; i < all->hidden; i++) y[i] = of[i] * weights[0];
            for (int64_t e = 1; e < all->n; e++)
                for (int64_t i = 0; i < all->hidden; i++) y[i] += of[e * all->hidden + i] * weights[e];
        }
}

/* y [tokens, hidden]: sums of results [tokens, n, hidden] times weights [tokens, n], one expert after the other. */
EXPORT void weighted_sums(const float *results, const float *weights, int64_t tokens, int64_t n, int64_t hidden,
                          float *y, int64_t threads) {
    int64_t most = 1 + tokens * n * hidden / 65536;
    if (most > tokens) most = tokens;
    Sums sums = {results, weights, y, tokens, n, hidden, 0, most};
    in_parallel(run_sums, &sums, most < threads ? most : threads);
}

/* y [rows, n] = x / sqrt(mean(x * x) + eps) * (plus + weight), for each row */
EXPORT void rms_norm(const float *x, const float *weight, int64_t rows, int64_t n, float eps, float plus, float *y) {
    for (; rows--; x += n, y += n) {
        float sums[8] = {0}, rest = 0;
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            for (int j = 0; j < 8; j++) sums[j] += x[i + j] * x[i + j];
        for (; i < n; i++) rest += x[i] * x[i];
        float sum = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])) + rest;
        float scale = 1 / sqrtf(sum / (float)n + eps);
        for (i = 0; i < n; i++) y[i] = (plus + weight[i]) * (x[i] * scale);
    }
}

/*
 * y [rows, hidden]: the results of n experts, expert e for the rows first[e] <= row < first[e + 1] of x, or for
 * the single row of x if is_shared. n is at most MAX_EXPERTS. With weights [n], each expert has one row, and y
 * [hidden] is their weighted sum.
 */
EXPORT void run_experts(const Kernels *kernels, const Expert *layout, const uint8_t *const *slots,
                        const int64_t *first, int64_t n, const float *x, int64_t is_shared, const float *weights,
                        float *y, int64_t threads, int64_t fast, uint8_t *scratch) {
    Expert experts[MAX_EXPERTS];
    Product products[2 * MAX_EXPERTS];
    const int64_t rows = first[n], hidden = layout->gate.k, inner = layout->gate.n, padded = up(inner, BLOCK);
    int64_t most = 1;
    for (int64_t e = 0; e < n; e++) most = first[e + 1] - first[e] > most ? first[e + 1] - first[e] : most;
    const int64_t each = largest_scratch(layout, most), padded_in = up(hidden, BLOCK);
    float *gate = (float *)(scratch + threads * each), *by = gate + rows * padded, *copy = by + rows * padded;
    float *results = weights ? copy + rows * padded_in : y;
    x = padded_rows(x, is_shared ? 1 : rows, hidden, copy);
    for (int64_t e = 0; e < n; e++) {
        const float *input = x + (is_shared ? 0 : first[e] * padded_in);
        const int64_t tokens = first[e + 1] - first[e];
        place(&experts[e].gate, &layout->gate, slots[e]);
        place(&experts[e].up, &layout->up, slots[e]);
        place(&experts[e].down, &layout->down, slots[e]);
        products[2 * e] = (Product){&experts[e].gate, input, gate + first[e] * padded, tokens, padded};
        products[2 * e + 1] = (Product){&experts[e].up, input, by + first[e] * padded, tokens, padded};
    }
    Products all = {kernels, products, 2 * n, 0, {0}, 0, 0, scratch, each, threads, (int)fast};
    multiply_all(&all);
    if (padded > inner) /* so that the padding is 0 after the gate */
        for (int64_t row = 0; row < rows; row++) {
            memset(gate + row * padded + inner, 0, (size_t)(padded - inner) * 4);
            memset(by + row * padded + inner, 0, (size_t)(padded - inner) * 4);
        }
    Gates gates = {kernels, gate, by, rows * padded / BLOCK, 0, 1 + rows * padded / 4096};
    in_parallel(run_gates, &gates, gates.n_tasks < threads ? gates.n_tasks : threads);
    for (int64_t e = 0; e < n; e++)
        products[e] = (Product){&experts[e].down, gate + first[e] * padded, results + first[e] * hidden,
                                first[e + 1] - first[e], hidden};
    all.n = n;
    multiply_all(&all);
    if (weights) weighted_sums(results, weights, 1, n, hidden, y, threads);
}
