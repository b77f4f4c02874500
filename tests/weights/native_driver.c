/*
 * Multiplies matrices that it reads from a file, for processors that only an emulator runs:
 *
 *     native_driver KERNELS CASES RESULTS
 *
 * A case: n, k, group, n_meta, format, tokens, fast, and the bytes of each of eight fields as int64; the fields; x.
 */
#include "../../mixtral_offload/native/interface.h"

#include <stdio.h>
#include <stdlib.h>

const Kernels *find_kernels(const char *name);
int64_t matrix_scratch(const Matrix *m, int64_t tokens, int64_t threads);
void multiply_matrix(const Kernels *kernels, const Matrix *m, const float *x, int64_t tokens, float *y, int64_t threads,
                     int64_t fast, uint8_t *scratch);

static void *read_bytes(FILE *from, int64_t n) {
    void *to = malloc(n ? (size_t)n : 1);
    if (fread(to, 1, (size_t)n, from) != (size_t)n) exit(2);
    return to;
}

int main(int argc, char **argv) {
    const Kernels *kernels = argc == 4 ? find_kernels(argv[1]) : NULL;
    FILE *cases = kernels ? fopen(argv[2], "rb") : NULL, *results = cases ? fopen(argv[3], "wb") : NULL;
    int64_t head[15];
    if (!results) return 1;
    while (fread(head, sizeof head, 1, cases) == 1) {
        const void *fields[8];
        for (int i = 0; i < 8; i++) fields[i] = head[7 + i] ? read_bytes(cases, head[7 + i]) : NULL;
        Matrix m = {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], fields[6], fields[7],
                    head[0], head[1], head[2], head[3], head[4]};
        int64_t tokens = head[5], threads = 2;
        float *x = read_bytes(cases, tokens * m.k * 4), *y = malloc((size_t)(tokens * m.n * 4));
        uint8_t *scratch = aligned_alloc(64, (size_t)(matrix_scratch(&m, tokens, threads) + 63) / 64 * 64);
        multiply_matrix(kernels, &m, x, tokens, y, threads, head[6], scratch);
        fwrite(y, 4, (size_t)(tokens * m.n), results);
        for (int i = 0; i < 8; i++) free((void *)fields[i]);
        free(x), free(y), free(scratch);
    }
    return fclose(results) != 0;
}
