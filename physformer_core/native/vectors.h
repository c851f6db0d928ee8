/* What a network does on a processor between its matrix products, forward and backward, each in one pass over memory.
 *
 * Plain C with the vector extensions of GCC and Clang, and OpenMP; compiled on the machine that runs it, see build.py.
 * Shapes and meaning of every function are in ops.py, which checks them; nothing is checked here. All arrays are float,
 * contiguous and in row order. A result does not depend on the number of threads: every sum is made by one of them, in
 * one order.
 */

#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

/* Numbers to a register, and how many keys, rows of weights, or targets of weighed rows are worked on at once: as many as
 * there are registers for two sums of each, as far as that pays. */
#if defined(__AVX512F__)
#define LANES 16
#define KEYS 12
#define ROWS 8
#define TARGETS 8
#elif defined(__AVX__)
#define LANES 8
#define KEYS 6
#define ROWS 4
#define TARGETS 6
#else
#define LANES 4
#if defined(__x86_64__)
#define KEYS 4
#define ROWS 4
#define TARGETS 4
#else
#define KEYS 12
#define ROWS 8
#define TARGETS 8
#endif
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec all(float value) { return value - (vec){0}; } /* minus: x - 0 is x, also where x is -0 */

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec v) { *(vec *)to = v; }

/* Has so many numbers brought into the cache while something else is worked on. */
static inline void fetch(const float *from, int numbers) {
    for (int i = 0; i < numbers; i += 16) __builtin_prefetch(from + i);
}

static inline float sum_of(vec v) {
    float sums[LANES];
    store(sums, v);
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    }
    return sums[0];
}

static inline vec larger(vec a, vec b) {
    ints which = b > a; /* false where one is not a number: then it is the first, so that it is passed on */
    return (vec)((which & (ints)b) | (~which & (ints)a));
}

/* e^x to two units in the last place for -87 < x < 88; below 0, above infinity's neighbour. Range reduction by Cody and
 * Waite, the series of e^r to r^7, of which the next term is 1e-8. */
static inline vec exponential(vec x) {
    ints vanishes = x < all(-87.0f);
    x = larger(x, all(-87.0f));
    x = -larger(-x, all(-88.0f));
    vec shift = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vec n = x * all(1.44269504088896341f) + shift;
    ints whole = (ints)n << 23;
    n = n - shift;
    vec r = x - n * all(0.693145751953125f);
    r = r - n * all(1.42860682030941723e-6f);
    vec p = all(1.0f / 5040);
    p = p * r + all(1.0f / 720);
    p = p * r + all(1.0f / 120);
    p = p * r + all(1.0f / 24);
    p = p * r + all(1.0f / 6);
    p = p * r + all(0.5f);
    p = p * r + all(1.0f);
    p = p * r + all(1.0f);
    return (vec)(((ints)p + whole) & ~vanishes);
}

static inline float dot_of(const float *one, const float *other, int dim) {
    vec sums = all(0);
    int i = 0;
    for (; i + LANES <= dim; i += LANES) sums += load(one + i) * load(other + i);
    float sum = sum_of(sums);
    for (; i < dim; i++) sum += one[i] * other[i];
    return sum;
}

static inline float inverse_rms(const float *row, int dim, float epsilon) {
    return 1.0f / sqrtf(dot_of(row, row, dim) / dim + epsilon);
}

static inline int at_least(int a, int b) { return a > b ? a : b; }
static inline int at_most(int a, int b) { return a < b ? a : b; }
