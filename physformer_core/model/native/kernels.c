/* What a network evaluation does on a processor between its matrix products, each in one pass over memory.
 *
 * Plain C with the vector extensions of GCC and Clang, and OpenMP; compiled on the machine that runs it, see build.py.
 * Shapes and meaning of every function are in ops.py, which checks them; nothing is checked here. All arrays are float,
 * contiguous and in row order. A result does not depend on the number of threads: every sum is made by one of them, in
 * one order.
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

/* Numbers to a register, and how many keys, or rows of weights, are worked on at once: as many as there are registers for
 * two sums of each. */
#if defined(__AVX512F__)
#define LANES 16
#define KEYS 12
#define ROWS 8
#elif defined(__AVX__)
#define LANES 8
#define KEYS 4
#define ROWS 4
#else
#define LANES 4
#define KEYS 12
#define ROWS 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec all(float value) { return value - (vec){0}; } /* minus: x - 0 is x, also where x is -0 */

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec v) { *(vec *)to = v; }

static inline float sum_of(vec v) {
    float sums[LANES];
    store(sums, v);
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    }
    return sums[0];
}

static inline vec larger(vec a, vec b) {
    ints which = a > b;
    return (vec)((which & (ints)a) | (~which & (ints)b));
}

/* e^x to two units in the last place for -87 < x < 88; below 0, above infinity's neighbour. Range reduction by Cody and
 * Waite, polynomial of degree 6 (coefficients of the series of 2^r on [-1/2, 1/2], economised). */
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

/* ---- tokens ------------------------------------------------------------------------------------------------------ */

static inline float square_of(const float *row, int dim) {
    vec sums = all(0);
    int i = 0;
    for (; i + LANES <= dim; i += LANES) sums += load(row + i) * load(row + i);
    float sum = sum_of(sums);
    for (; i < dim; i++) sum += row[i] * row[i];
    return sum;
}

void norm_modulate(const float *h, const float *scale, const float *shift, float *out, int64_t batch, int64_t tokens,
                   int dim, float epsilon, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < batch * tokens; row++) {
        const float *from = h + row * dim, *gain = scale + row / tokens * dim, *add = shift + row / tokens * dim;
        float *to = out + row * dim, inverse = 1.0f / sqrtf(square_of(from, dim) / dim + epsilon);
        for (int i = 0; i < dim; i++) to[i] = from[i] * inverse * (1.0f + gain[i]) + add[i];
    }
}

void renormalized_update(const float *h, const float *output, const float *gate, float *out, int64_t batch,
                         int64_t tokens, int dim, float tiny, float opposed, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < batch * tokens; row++) {
        const float *from = h + row * dim, *by = output + row * dim, *open = gate + row / tokens * dim;
        float *to = out + row * dim;
        for (int i = 0; i < dim; i++) to[i] = from[i] + open[i] * by[i];
        float square = square_of(from, dim), total = square_of(to, dim);
        if (total <= opposed * square || square < tiny) {
            memcpy(to, from, dim * sizeof(float));
        } else {
            float scale = sqrtf(square / total); /* 1 to the bit where nothing was added */
            for (int i = 0; i < dim; i++) to[i] *= scale;
        }
    }
}

void norm_rotate(float *content, const float *gain, const float *cosine, const float *sine, int64_t batch,
                 int64_t tokens, int heads, int dim, int turning, float epsilon, int threads) {
    int half = turning / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < batch * tokens; row++) {
        const float *c = cosine + row % tokens * half, *s = sine + row % tokens * half;
        for (int head = 0; head < heads; head++) {
            float *x = content + (row * heads + head) * dim;
            float inverse = 1.0f / sqrtf(square_of(x, dim) / dim + epsilon);
            for (int i = 0; i < dim; i++) x[i] *= inverse * gain[i];
            for (int i = 0; i < half; i++) {
                float first = x[i], second = x[half + i];
                x[i] = first * c[i] - second * s[i];
                x[half + i] = second * c[i] + first * s[i];
            }
        }
    }
}

void gated_linear(const float *gate_up, float *out, int64_t rows, int hidden, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * hidden, *up = gate + hidden;
        float *to = out + row * hidden;
        int i = 0;
        for (; i + LANES <= hidden; i += LANES) {
            vec g = load(gate + i);
            store(to + i, g / (all(1.0f) + exponential(-g)) * load(up + i));
        }
        for (; i < hidden; i++) to[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

#define GEOMETRY 4 /* dimensions beside the content: y, x, squared distance or altitude, constant */
#define GROUP (2 * LANES) /* queries that are worked on together, one to a lane */
#define CHUNK 96          /* keys whose weights and values stay in the first-level cache together */

typedef struct {
    int64_t batch;
    int height, width, heads, content, dim, text, block, radius, lead_y, lead_x;
} field;

/* Of one head of one block. Logits are kept key by key, a group of queries side by side, so that neither keys nor values
 * need be copied or turned, and a softmax needs no sums over lanes. */
typedef struct {
    float *query;        /* [depth, GROUP] */
    float *logits;       /* [keys, GROUP] */
    float *geometry;     /* [keys, GEOMETRY] */
    float *read;         /* [GROUP, dim] */
    const float **key;   /* [keys] pointers to `content` numbers each */
    const float **value; /* [keys] pointers to `dim` numbers each */
} workspace;

/* The logits of a group, and for each query the largest. */
static void group_logits(const workspace *s, int content, int dim, int keys, vec most[2]) {
    most[0] = most[1] = all(-INFINITY);
    for (int j = 0; j < keys; j += KEYS) {
        vec a[KEYS], b[KEYS];
        const float *key[KEYS], *geometry[KEYS];
        for (int r = 0; r < KEYS; r++) {
            int at = j + r < keys ? j + r : keys - 1; /* beyond the last it is the last again */
            for (int d = 0; d < dim; d += 16) __builtin_prefetch(s->value[at] + d); /* wanted next, and far apart */
            key[r] = s->key[at], geometry[r] = s->geometry + GEOMETRY * at;
            a[r] = b[r] = all(0);
        }
        for (int d = 0; d < content; d++) {
            vec one = load(s->query + d * GROUP), two = load(s->query + d * GROUP + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < KEYS; r++) a[r] += one * key[r][d], b[r] += two * key[r][d];
        }
        for (int d = 0; d < GEOMETRY; d++) {
            const float *from = s->query + (content + d) * GROUP;
            vec one = load(from), two = load(from + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < KEYS; r++) a[r] += one * geometry[r][d], b[r] += two * geometry[r][d];
        }
        for (int r = 0; r < KEYS && j + r < keys; r++) {
            most[0] = larger(most[0], a[r]), most[1] = larger(most[1], b[r]);
            store(s->logits + (j + r) * GROUP, a[r]);
            store(s->logits + (j + r) * GROUP + LANES, b[r]);
        }
    }
}

/* Logits of keys [from, to) become weights that are yet to be divided by their sums. */
static void group_weights(const workspace *s, int from, int to, const vec most[2], vec sums[2]) {
    for (int j = from; j < to; j++) {
        float *at = s->logits + j * GROUP;
        vec one = exponential(load(at) - most[0]), two = exponential(load(at + LANES) - most[1]);
        sums[0] += one, sums[1] += two;
        store(at, one);
        store(at + LANES, two);
    }
}

/* Adds the weighed values of keys [from, to) to `s->read`. Here lanes are dimensions. */
static void group_values(const workspace *s, int dim, int from, int to) {
    for (int i = 0; i < GROUP; i += ROWS) {
        const float *weights = s->logits + i;
        float *read = s->read + i * dim;
        int d = 0;
        for (; d + 2 * LANES <= dim; d += 2 * LANES) {
            vec a[ROWS], b[ROWS];
            for (int r = 0; r < ROWS; r++) a[r] = load(read + r * dim + d), b[r] = load(read + r * dim + d + LANES);
            for (int j = from; j < to; j++) {
                vec one = load(s->value[j] + d), two = load(s->value[j] + d + LANES);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) {
                    a[r] += one * weights[j * GROUP + r], b[r] += two * weights[j * GROUP + r];
                }
            }
            for (int r = 0; r < ROWS; r++) {
                store(read + r * dim + d, a[r]);
                store(read + r * dim + d + LANES, b[r]);
            }
        }
        for (; d < dim; d += LANES) {
            int at = d + LANES <= dim ? d : dim - LANES; /* the last may overlap: what both have, it has once more */
            vec a[ROWS], keep = all(0);
            for (int lane = 0; lane < LANES; lane++) keep[lane] = at + lane < d ? 0.0f : 1.0f;
            for (int r = 0; r < ROWS; r++) a[r] = load(read + r * dim + at);
            for (int j = from; j < to; j++) {
                vec one = load(s->value[j] + at) * keep;
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) a[r] += one * weights[j * GROUP + r];
            }
            for (int r = 0; r < ROWS; r++) store(read + r * dim + at, a[r]);
        }
    }
}

static int at_least(int a, int b) { return a > b ? a : b; }
static int at_most(int a, int b) { return a < b ? a : b; }

/* One head of one block of queries. */
static void attend_block(const field *f, const float *query, const float *key, const float *value,
                         const float *text_key, const float *text_value, const float *drift, float sigma, float *out,
                         int64_t picture, int head, int block_y, int block_x, const workspace *s) {
    int first_y = block_y * f->block - f->lead_y, first_x = block_x * f->block - f->lead_x;
    int top = at_least(first_y, 0), bottom = at_most(first_y + f->block, f->height);
    int left = at_least(first_x, 0), right = at_most(first_x + f->block, f->width);
    int up = at_least(first_y - f->radius, 0), down = at_most(first_y + f->block + f->radius, f->height);
    int west = at_least(first_x - f->radius, 0), east = at_most(first_x + f->block + f->radius, f->width);
    /* Coordinates are counted from the block's middle, where their squares are small. */
    float middle_y = first_y + 0.5f * f->block - 0.5f, middle_x = first_x + 0.5f * f->block - 0.5f;
    float inverse = 1.0f / (sigma * sigma);
    int keys = 0;

    for (int y = up; y < down; y++) {
        for (int x = west; x < east; x++, keys++) {
            int64_t place = ((picture * f->height + y) * f->width + x) * f->heads + head;
            float dy = y - middle_y, dx = x - middle_x, *geometry = s->geometry + GEOMETRY * keys;
            s->key[keys] = key + place * f->content;
            s->value[keys] = value + place * f->dim;
            geometry[0] = dy, geometry[1] = dx, geometry[2] = -0.5f * (dy * dy + dx * dx), geometry[3] = 1.0f;
        }
    }
    for (int t = 0; t < f->text; t++, keys++) {
        int64_t place = ((picture * f->heads + head) * f->text + t) * f->dim;
        float *geometry = s->geometry + GEOMETRY * keys;
        s->key[keys] = text_key + place;
        s->value[keys] = text_value + place;
        /* Behind the content of a prompt's key its geometry is in pairs; the third pair begins with the altitude. */
        geometry[0] = geometry[1] = geometry[3] = 0.0f, geometry[2] = text_key[place + f->content + 4];
    }

    int across = right - left, count = (bottom - top) * across;
    for (int i = 0; i < count; i += GROUP) {
        int queries = at_most(GROUP, count - i);
        float *rows[GROUP], scale[GROUP];
        vec most[2], sums[2] = {{0}, {0}};
        for (int r = 0; r < GROUP; r++) {
            int at = i + at_most(r, queries - 1), y = top + at / across, x = left + at % across;
            int64_t place = ((picture * f->height + y) * f->width + x) * f->heads + head;
            const float *from = query + place * f->content;
            float dy = y - middle_y + drift[0], dx = x - middle_x + drift[1], *to = s->query + r;
            for (int d = 0; d < f->content; d++) to[d * GROUP] = from[d];
            to += f->content * GROUP;
            to[0] = dy * inverse, to[GROUP] = dx * inverse, to[2 * GROUP] = inverse;
            to[3 * GROUP] = -0.5f * (dy * dy + dx * dx) * inverse;
            rows[r] = out + place * f->dim;
        }
        group_logits(s, f->content, f->dim, keys, most);
        memset(s->read, 0, GROUP * f->dim * sizeof(float));
        for (int from = 0; from < keys; from += CHUNK) {
            int to = at_most(from + CHUNK, keys);
            group_weights(s, from, to, most, sums);
            group_values(s, f->dim, from, to);
        }
        store(scale, 1.0f / sums[0]);
        store(scale + LANES, 1.0f / sums[1]);
        for (int r = 0; r < queries; r++) {
            for (int d = 0; d < f->dim; d++) rows[r][d] = s->read[r * f->dim + d] * scale[r];
        }
    }
}

/* Bytes that each thread needs in `scratch`, which is aligned to 64. */
int64_t window_scratch(int content, int dim, int text, int block, int radius) {
    int64_t across = block + 2 * radius, keys = across * across + text;
    int64_t floats = (content + GEOMETRY + dim) * GROUP + keys * (GROUP + GEOMETRY);
    return (floats * sizeof(float) + 2 * keys * sizeof(float *) + 127) / 64 * 64;
}

void window_attention(const float *query, const float *key, const float *value, const float *text_key,
                      const float *text_value, const float *drift, const float *sigma, float *out, char *scratch,
                      int64_t batch, int height, int width, int heads, int content, int dim, int text, int block,
                      int radius, int lead_y, int lead_x, int threads) {
    field f = {batch, height, width, heads, content, dim, text, block, radius, lead_y, lead_x};
    int blocks_y = (lead_y + height + block - 1) / block, blocks_x = (lead_x + width + block - 1) / block;
    int64_t tasks = batch * blocks_y * blocks_x, each = window_scratch(content, dim, text, block, radius);
    int64_t keys = (int64_t)(block + 2 * radius) * (block + 2 * radius) + text;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) {
        char *memory = scratch + each * omp_get_thread_num();
        workspace s = {.query = (float *)memory};
        s.logits = s.query + (content + GEOMETRY) * GROUP;
        s.read = s.logits + keys * GROUP;
        s.key = (const float **)(memory + each - (2 * keys * sizeof(float *) + 63) / 64 * 64);
        s.geometry = s.read + dim * GROUP;
        s.value = s.key + keys;
        int place = (int)(task % (blocks_y * blocks_x));
        /* Heads of a block follow each other: they share the lines of memory that its window is in. */
        for (int head = 0; head < heads; head++) {
            attend_block(&f, query, key, value, text_key, text_value, drift + 2 * head, sigma[head], out,
                         task / (blocks_y * blocks_x), head, place / blocks_x, place % blocks_x, &s);
        }
    }
}
