/* Matrices made orthogonal, for Muon: nearly all products on the way are symmetric, so that half of each is enough. */

#include "vectors.h"

/* A product is made in tiles of TALL rows by WIDE columns, whose sums stay in registers; of DEEP terms of each sum at a
 * time the right matrix stays in the second-level cache, and BAND rows of the left one. Only the right one is packed for
 * that: of the left one a tile reads single numbers, as fast where they lie as from a copy. */
#if defined(__AVX512F__)
#define TALL 8
#else
#define TALL 6
#endif
#define WIDE (2 * LANES)
#define DEEP 256
#define BAND (16 * TALL)

typedef struct {
    const float *at;
    int64_t down, across; /* from a row to the next, from a column to the next */
} matrix;

static matrix transposed(matrix m) { return (matrix){m.at, m.across, m.down}; }

static int64_t up_to(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

/* Writes the first `depth` columns of `lines` rows so that WIDE rows lie side by side, column by column; zero beyond the
 * last row. WIDE is known when this is compiled, so that rows are copied in registers. */
static inline void pack(matrix from, int lines, int depth, float *to) {
    for (int line = 0; line < lines; line += WIDE, to += (int64_t)WIDE * depth) {
        const float *at = from.at + line * from.down;
        int there = at_most(WIDE, lines - line);
        if (there == WIDE && from.down == 1) {
            for (int k = 0; k < depth; k++) {
                for (int i = 0; i < WIDE; i++) to[k * WIDE + i] = at[k * from.across + i];
            }
        } else {
            if (there < WIDE) memset(to, 0, (size_t)WIDE * depth * sizeof(float));
            for (int i = 0; i < there; i++) {
                for (int k = 0; k < depth; k++) to[k * WIDE + i] = at[i * from.down + k * from.across];
            }
        }
    }
}

/* Of TALL rows, whose terms lie `across` numbers apart, and packed columns: sums [TALL, WIDE], a row every `step` numbers,
 * added to what is there if `more`. */
static inline void tile(const float *const left[TALL], int64_t across, const float *right, int depth, float *sums,
                        int64_t step, int more) {
    vec a[TALL], b[TALL];
#pragma GCC unroll 16
    for (int r = 0; r < TALL; r++) a[r] = b[r] = all(0);
    for (int64_t k = 0; k < depth; k++, right += WIDE) {
        vec one = load(right), two = load(right + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < TALL; r++) a[r] += one * left[r][k * across], b[r] += two * left[r][k * across];
    }
#pragma GCC unroll 16
    for (int r = 0; r < TALL; r++) {
        float *to = sums + r * step;
        if (more) a[r] += load(to), b[r] += load(to + LANES);
        store(to, a[r]);
        store(to + LANES, b[r]);
    }
}

/* out [rows, columns] = left [rows, depth] right [depth, columns]. If it is known to be symmetric, only tiles that touch
 * what is on or below the diagonal are made. `packed` has room as `packing` says. */
static void multiply(matrix left, matrix right, int rows, int columns, int depth, int symmetric, float *out,
                     float *packed) {
    for (int from = 0; from < depth; from += DEEP) {
        int deep = at_most(DEEP, depth - from);
        matrix deeper = {right.at + from * right.down, right.down, right.across};
        pack(transposed(deeper), columns, deep, packed);
        for (int top = 0; top < rows; top += BAND) {
            for (int x = 0; x < columns; x += WIDE) {
                for (int y = top; y < at_most(top + BAND, rows); y += TALL) {
                    if (symmetric && x >= y + TALL) continue;
                    const float *own[TALL], *others = packed + (int64_t)x * deep;
                    for (int r = 0; r < TALL; r++) { /* beyond the last row it is the last again */
                        own[r] = left.at + at_most(y + r, rows - 1) * left.down + from * left.across;
                    }
                    float *to = out + (int64_t)y * columns + x;
                    if (y + TALL <= rows && x + WIDE <= columns) {
                        tile(own, left.across, others, deep, to, columns, from > 0);
                        continue;
                    }
                    float sums[TALL * WIDE];
                    tile(own, left.across, others, deep, sums, WIDE, 0);
                    for (int r = 0; r < TALL && y + r < rows; r++) {
                        for (int c = 0; c < WIDE && x + c < columns; c++) {
                            float *one = to + r * columns + c;
                            *one = (from > 0 ? *one : 0) + sums[r * WIDE + c];
                        }
                    }
                }
            }
        }
    }
}

static int64_t packing(int columns) { return up_to(columns, WIDE) * DEEP; }

/* Copies what is below the diagonal to above it, by squares that stay in the first-level cache. Columns are read and rows
 * written: the other way about, one line of memory after the other would be written sixteen times. */
static void mirror(float *square, int side) {
    for (int top = 0; top < side; top += WIDE) {
        for (int left = 0; left <= top; left += WIDE) {
            for (int j = left; j < at_most(left + WIDE, side); j++) {
                float *to = square + (int64_t)j * side;
                for (int i = at_least(top, j + 1); i < at_most(top + WIDE, side); i++) to[i] = square[(int64_t)i * side + j];
            }
        }
    }
}

/* out = left right, all [side, side]; left and right are symmetric and commute, so that out is, too. The left one is read
 * along its rows, which lie together. */
static void multiply_symmetric(const float *left, const float *right, int side, float *out, float *packed) {
    multiply((matrix){left, side, 1}, (matrix){right, side, 1}, side, side, side, 1, out, packed);
    mirror(out, side);
}

typedef struct {
    int rows, columns, steps;
    float a, b, c;
} iteration;

/* Newton-Schulz: x becomes P x with the polynomial P = a + b G + c G G of G = x x^T, `steps` times. All those commute, so
 * that G is iterated and x multiplied once by the product of all P. x, at the beginning of `scratch`, is scaled. */
static void orthogonalize_one(float *to, iteration by, float *scratch) {
    int rows = by.rows, columns = by.columns;
    int turned = rows > columns, side = at_most(rows, columns), length = turned ? rows : columns;
    int64_t numbers = (int64_t)rows * columns, square = (int64_t)side * side;
    float *x = scratch, *gram = x + numbers, *factor = gram + square, *product = factor + square;
    float *spare = product + square, *packed = spare + square;
    double sum = 0; /* row by row: of millions of squares a float would lose some */
    for (int row = 0; row < rows; row++) sum += dot_of(x + (int64_t)row * columns, x + (int64_t)row * columns, columns);
    float scale = 1.0f / ((float)sqrt(sum) + 1e-7f);
    for (int64_t i = 0; i < numbers; i++) x[i] *= scale;
    matrix given = {x, columns, 1}, flat = turned ? transposed(given) : given;
    multiply(flat, transposed(flat), side, side, length, 1, gram, packed);
    mirror(gram, side);
    for (int step = 0; step < by.steps; step++) {
        float *p = step == 0 ? product : factor;
        multiply_symmetric(gram, gram, side, p, packed);
        for (int64_t i = 0; i < square; i++) p[i] = by.b * gram[i] + by.c * p[i];
        for (int i = 0; i < side; i++) p[(int64_t)i * side + i] += by.a;
        if (step > 0) {
            multiply_symmetric(p, product, side, spare, packed);
            float *older = product;
            product = spare, spare = older;
        }
        if (step < by.steps - 1) {
            multiply_symmetric(p, gram, side, spare, packed);
            multiply_symmetric(p, spare, side, gram, packed);
        }
    }
    matrix all_of_them = {product, side, 1};
    if (turned) {
        multiply(given, all_of_them, rows, columns, side, 0, to, packed);
    } else {
        multiply(all_of_them, given, rows, columns, side, 0, to, packed);
    }
}

/* Floats that each thread needs in `scratch`: to work in, and for what `muon_step` makes. */
int64_t orthogonalize_scratch(int rows, int columns) {
    int64_t side = at_most(rows, columns), numbers = (int64_t)rows * columns;
    return up_to(numbers + 4 * side * side + packing(columns), 16) + up_to(numbers, 16);
}

/* `count` matrices [rows, columns], each by one thread; at least one step. */
void orthogonalize(const float *from, float *to, float *scratch, int64_t count, int rows, int columns, int steps,
                   float a, float b, float c, int threads) {
    int64_t each = orthogonalize_scratch(rows, columns), numbers = (int64_t)rows * columns;
    iteration by = {rows, columns, steps, a, b, c};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t one = 0; one < count; one++) {
        float *own = scratch + each * omp_get_thread_num();
        memcpy(own, from + one * numbers, numbers * sizeof(float));
        orthogonalize_one(to + one * numbers, by, own);
    }
}

/* A step of Muon for `count` weights [rows, columns] with their gradients and momenta: those come to be `nearer` to
 * the gradients, and the weights, times `keep`, change by `rate` times what is orthogonal of momentum and gradient. */
void muon_step(float *const *weights, const float *const *gradients, float *const *momenta, float *scratch,
               int64_t count, int rows, int columns, int steps, float a, float b, float c, float nearer, float keep,
               float rate, int threads) {
    int64_t each = orthogonalize_scratch(rows, columns), numbers = (int64_t)rows * columns;
    iteration by = {rows, columns, steps, a, b, c};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t one = 0; one < count; one++) {
        float *own = scratch + each * omp_get_thread_num(), *made = own + each - up_to(numbers, 16);
        float *weight = weights[one], *past = momenta[one];
        const float *gradient = gradients[one];
        for (int64_t i = 0; i < numbers; i++) {
            past[i] += nearer * (gradient[i] - past[i]);
            own[i] = past[i] + nearer * (gradient[i] - past[i]);
        }
        orthogonalize_one(made, by, own);
        for (int64_t i = 0; i < numbers; i++) weight[i] = weight[i] * keep + rate * made[i];
    }
}
