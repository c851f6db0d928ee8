/* Attention of blocks of tokens to their windows and to a text, without copies of windows. */

#include "vectors.h"

#define GEOMETRY 4        /* dimensions beside the content: y, x, squared distance or altitude, constant */
#define GROUP (2 * LANES) /* queries that are worked on together, one to a lane */
#define CHUNK 96          /* keys whose weights and values stay in the first-level cache together */
#define HIDDEN -4096.0f   /* altitudes below belong to padding: half of -FAR in model/geometry.py */

typedef struct {
    int64_t batch;
    int height, width, heads, content, dim, text, block, radius, lead_y, lead_x;
} field;

typedef struct {
    const float *query, *key, *value, *text_key, *text_value, *drift, *sigma;
} inputs;

typedef struct {
    float *query, *key, *value, *text_key, *text_value, *drift, *sigma;
} gradients;

/* Of one head of one block. Logits are kept key by key, a group of queries side by side, so that neither keys nor values
 * need be copied or turned, and a softmax needs no sums over lanes. What begins with grad is for the way back. */
typedef struct {
    float *query;       /* [content + GEOMETRY, GROUP] */
    float *logits;      /* [keys, GROUP] */
    float *read;        /* [GROUP, dim] */
    float *geometry;    /* [keys, GEOMETRY] */
    float *grad;        /* [dim, GROUP], of what was read */
    float *grad_logits; /* [keys, GROUP] */
    float *query_rows;  /* [GROUP, content] */
    float *grad_rows;   /* [GROUP, dim] */
    const float **key;  /* [keys] pointers to `content` numbers each */
    const float **value; /* [keys] pointers to `dim` numbers each */
    float **grad_key;   /* [keys] as above */
    float **grad_value; /* [keys] */
} workspace;

/* The block of queries [top, bottom) x [left, right) and its window [up, down) x [west, east). Coordinates are counted
 * from the block's middle, where their squares are small. */
typedef struct {
    int top, bottom, left, right, up, down, west, east;
    float middle_y, middle_x;
} place;

static place place_of(const field *f, int block_y, int block_x) {
    int y = block_y * f->block - f->lead_y, x = block_x * f->block - f->lead_x;
    float middle = 0.5f * f->block - 0.5f;
    return (place){
        at_least(y, 0), at_most(y + f->block, f->height), at_least(x, 0), at_most(x + f->block, f->width),
        at_least(y - f->radius, 0), at_most(y + f->block + f->radius, f->height),
        at_least(x - f->radius, 0), at_most(x + f->block + f->radius, f->width),
        y + middle, x + middle,
    };
}

/* ---- products of a group: `rows` are pointers to keys' or values' numbers -------------------------------------------- */

/* Of every row with every query of the group, whose numbers stand in `columns` [depth + GEOMETRY, GROUP]; `geometry` may
 * be NULL. `most` becomes at least every query's largest. `next`, if not NULL, is fetched while this goes on. */
static inline void group_dots(const float *const *rows, int depth, const float *geometry, const float *columns,
                              int keys, float *out, vec most[2], const float *const *next, int next_depth) {
    for (int j = 0; j < keys; j += KEYS) {
        vec a[KEYS], b[KEYS];
        const float *row[KEYS], *where[KEYS];
        for (int r = 0; r < KEYS; r++) {
            int at = j + r < keys ? j + r : keys - 1; /* beyond the last it is the last again */
            if (next != NULL) fetch(next[at], next_depth);
            row[r] = rows[at];
            where[r] = geometry == NULL ? NULL : geometry + GEOMETRY * at;
            a[r] = b[r] = all(0);
        }
        for (int d = 0; d < depth; d++) {
            vec one = load(columns + d * GROUP), two = load(columns + d * GROUP + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < KEYS; r++) a[r] += one * row[r][d], b[r] += two * row[r][d];
        }
        for (int d = 0; geometry != NULL && d < GEOMETRY; d++) {
            const float *from = columns + (depth + d) * GROUP;
            vec one = load(from), two = load(from + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < KEYS; r++) a[r] += one * where[r][d], b[r] += two * where[r][d];
        }
        for (int r = 0; r < KEYS && j + r < keys; r++) {
            most[0] = larger(most[0], a[r]), most[1] = larger(most[1], b[r]);
            store(out + (j + r) * GROUP, a[r]);
            store(out + (j + r) * GROUP + LANES, b[r]);
        }
    }
}

/* In a row of `dim` numbers that is no whole number of vectors, the last vector overlaps the one before: 0 in the lanes
 * that both have. */
static inline vec last_lanes(int dim) {
    vec keep = all(1);
    for (int lane = 0; lane < LANES - dim % LANES; lane++) keep[lane] = 0;
    return keep;
}

/* Adds rows [from, to), weighed, to what each of the group's `queries` has read: read [GROUP, dim]. Here lanes are
 * dimensions. */
static inline void group_sums(const float *const *rows, int dim, const float *weights, int from, int to, int queries,
                              float *read) {
    for (int i = 0; i < queries; i += ROWS, weights += ROWS, read += ROWS * dim) {
        int d = 0;
        for (; d + 2 * LANES <= dim; d += 2 * LANES) {
            vec a[ROWS], b[ROWS];
            for (int r = 0; r < ROWS; r++) a[r] = load(read + r * dim + d), b[r] = load(read + r * dim + d + LANES);
            for (int j = from; j < to; j++) {
                vec one = load(rows[j] + d), two = load(rows[j] + d + LANES);
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
        for (; d < dim && dim >= LANES; d += LANES) {
            int whole = d + LANES <= dim, at = whole ? d : dim - LANES;
            vec a[ROWS], keep = whole ? all(1) : last_lanes(dim);
            for (int r = 0; r < ROWS; r++) a[r] = load(read + r * dim + at);
            for (int j = from; j < to; j++) {
                vec one = load(rows[j] + at) * keep;
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) a[r] += one * weights[j * GROUP + r];
            }
            for (int r = 0; r < ROWS; r++) store(read + r * dim + at, a[r]);
        }
        for (; d < dim; d++) {
            for (int r = 0; r < ROWS; r++) {
                for (int j = from; j < to; j++) read[r * dim + d] += rows[j][d] * weights[j * GROUP + r];
            }
        }
    }
}

/* The other way about: adds the rows of the group's `queries` [queries, dim], weighed, to the keys' targets. */
static inline void group_spread(float *const *targets, int dim, const float *weights, int keys, int queries,
                                const float *rows) {
    float nobody[dim];
    memset(nobody, 0, sizeof nobody);
    for (int j = 0; j < keys; j += TARGETS) {
        float *target[TARGETS];
        const float *weight[TARGETS];
        for (int r = 0; r < TARGETS; r++) {
            target[r] = j + r < keys ? targets[j + r] : nobody;
            weight[r] = weights + (j + r < keys ? j + r : j) * GROUP;
        }
        int d = 0;
        for (; d + 2 * LANES <= dim; d += 2 * LANES) {
            vec a[TARGETS], b[TARGETS];
            for (int r = 0; r < TARGETS; r++) a[r] = load(target[r] + d), b[r] = load(target[r] + d + LANES);
            for (int i = 0; i < queries; i++) {
                vec one = load(rows + i * dim + d), two = load(rows + i * dim + d + LANES);
#pragma GCC unroll 16
                for (int r = 0; r < TARGETS; r++) a[r] += one * weight[r][i], b[r] += two * weight[r][i];
            }
            for (int r = 0; r < TARGETS; r++) {
                store(target[r] + d, a[r]);
                store(target[r] + d + LANES, b[r]);
            }
        }
        for (; d < dim && dim >= LANES; d += LANES) {
            int whole = d + LANES <= dim, at = whole ? d : dim - LANES;
            vec a[TARGETS], keep = whole ? all(1) : last_lanes(dim);
            for (int r = 0; r < TARGETS; r++) a[r] = load(target[r] + at);
            for (int i = 0; i < queries; i++) {
                vec one = load(rows + i * dim + at) * keep;
#pragma GCC unroll 16
                for (int r = 0; r < TARGETS; r++) a[r] += one * weight[r][i];
            }
            for (int r = 0; r < TARGETS; r++) store(target[r] + at, a[r]);
        }
        for (; d < dim; d++) {
            for (int r = 0; r < TARGETS; r++) {
                for (int i = 0; i < queries; i++) target[r][d] += rows[i * dim + d] * weight[r][i];
            }
        }
    }
}

/* ---- one head of one block ------------------------------------------------------------------------------------------- */

/* Every head comes anew to the rows of its tokens, too far apart for a processor to foresee. So whoever comes to a row has
 * that of the next head fetched, which lies behind it; behind the last head's it is the next token's, and no harm. */

/* Finds the keys and values of a block's window and of the text, of which `near` are the window's; returns how many. A
 * text's padding is left out: its weights would be 0. */
static int gather_keys(const field *f, const inputs *in, const gradients *back, int64_t picture, int head,
                       const place *p, const workspace *s, int *near) {
    int keys = 0;
    for (int y = p->up; y < p->down; y++) {
        for (int x = p->west; x < p->east; x++, keys++) {
            int64_t token = ((picture * f->height + y) * f->width + x) * f->heads + head;
            float dy = y - p->middle_y, dx = x - p->middle_x, *geometry = s->geometry + GEOMETRY * keys;
            s->key[keys] = in->key + token * f->content;
            s->value[keys] = in->value + token * f->dim;
            geometry[0] = dy, geometry[1] = dx, geometry[2] = -0.5f * (dy * dy + dx * dx), geometry[3] = 1.0f;
            fetch(s->key[keys] + f->content, f->content);
            fetch(s->value[keys] + f->dim, f->dim);
            if (back != NULL) {
                s->grad_key[keys] = back->key + token * f->content;
                s->grad_value[keys] = back->value + token * f->dim;
                fetch(s->grad_key[keys] + f->content, f->content);
                fetch(s->grad_value[keys] + f->dim, f->dim);
            }
        }
    }
    *near = keys;
    for (int t = 0; t < f->text; t++) {
        int64_t told = ((picture * f->heads + head) * f->text + t) * f->dim;
        /* The third pair of a text's geometry begins with the altitude. */
        float *geometry = s->geometry + GEOMETRY * keys, altitude = in->text_key[told + f->content + 4];
        if (altitude < HIDDEN) continue;
        s->key[keys] = in->text_key + told;
        s->value[keys] = in->text_value + told;
        geometry[0] = geometry[1] = geometry[3] = 0.0f, geometry[2] = altitude;
        if (back != NULL) {
            s->grad_key[keys] = back->text_key + told;
            s->grad_value[keys] = back->text_value + told;
        }
        keys++;
    }
    return keys;
}

/* The tokens of a group of queries, from the block's `first` on; lanes beyond the last hold the last again. `dy` and `dx`
 * are where each departs from. Returns how many there are. */
static int gather_queries(const field *f, const inputs *in, int64_t picture, int head, const place *p, int first,
                          const workspace *s, int64_t token[GROUP], float dy[GROUP], float dx[GROUP]) {
    int across = p->right - p->left, queries = at_most(GROUP, (p->bottom - p->top) * across - first);
    const float *drift = in->drift + 2 * head;
    float inverse = 1.0f / (in->sigma[head] * in->sigma[head]);
    int y = p->top + first / across, x = p->left + first % across;
    for (int r = 0; r < GROUP; r++) {
        if (r > 0 && r < queries && ++x == p->right) x = p->left, y++;
        token[r] = ((picture * f->height + y) * f->width + x) * f->heads + head;
        const float *from = in->query + token[r] * f->content;
        float *to = s->query + r;
        fetch(from + f->content, f->content);
        dy[r] = y - p->middle_y + drift[0], dx[r] = x - p->middle_x + drift[1];
        for (int d = 0; d < f->content; d++) to[d * GROUP] = from[d];
        to += f->content * GROUP;
        to[0] = dy[r] * inverse, to[GROUP] = dx[r] * inverse, to[2 * GROUP] = inverse;
        to[3 * GROUP] = -0.5f * (dy[r] * dy[r] + dx[r] * dx[r]) * inverse;
    }
    return queries;
}

static void attend_block(const field *f, const inputs *in, float *out, float *norm, int64_t picture, int head, place p,
                         const workspace *s) {
    int near, keys = gather_keys(f, in, NULL, picture, head, &p, s, &near);
    int count = (p.bottom - p.top) * (p.right - p.left);
    for (int first = 0; first < count; first += GROUP) {
        int64_t token[GROUP];
        float dy[GROUP], dx[GROUP], scale[GROUP], highest[GROUP];
        int queries = gather_queries(f, in, picture, head, &p, first, s, token, dy, dx);
        vec most[2] = {all(-INFINITY), all(-INFINITY)}, sums[2] = {all(0), all(0)};
        group_dots(s->key, f->content, s->geometry, s->query, keys, s->logits, most, s->value, f->dim);
        memset(s->read, 0, GROUP * f->dim * sizeof(float));
        for (int from = 0; from < keys; from += CHUNK) {
            int to = at_most(from + CHUNK, keys);
            for (int j = from; j < to; j++) {
                float *at = s->logits + j * GROUP;
                vec one = exponential(load(at) - most[0]), two = exponential(load(at + LANES) - most[1]);
                sums[0] += one, sums[1] += two;
                store(at, one);
                store(at + LANES, two);
            }
            group_sums(s->value, f->dim, s->logits, from, to, queries, s->read);
        }
        store(scale, 1.0f / sums[0]);
        store(scale + LANES, 1.0f / sums[1]);
        store(highest, most[0]);
        store(highest + LANES, most[1]);
        for (int r = 0; r < queries; r++) {
            float *to = out + token[r] * f->dim;
            for (int d = 0; d < f->dim; d++) to[d] = s->read[r * f->dim + d] * scale[r];
            norm[token[r]] = highest[r] - logf(scale[r]);
        }
    }
}

/* With weights P = exp(S - norm), a gradient G of the output O and D = <G, O>: dS = P (G V' - D), and from there by the
 * products that made S (Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B). */
static void attend_block_back(const field *f, const inputs *in, const float *out, const float *norm, const float *grad,
                              const gradients *back, int64_t picture, int head, place p, const workspace *s) {
    int near, keys = gather_keys(f, in, back, picture, head, &p, s, &near);
    int count = (p.bottom - p.top) * (p.right - p.left);
    float sigma = in->sigma[head], inverse = 1.0f / (sigma * sigma);
    int64_t own = picture * f->heads + head;
    for (int first = 0; first < count; first += GROUP) {
        int64_t token[GROUP];
        float dy[GROUP], dx[GROUP], along[GROUP], level[GROUP], there[GROUP];
        int queries = gather_queries(f, in, picture, head, &p, first, s, token, dy, dx);
        for (int r = 0; r < GROUP; r++) {
            const float *g = grad + token[r] * f->dim, *read = out + token[r] * f->dim;
            fetch(g + f->dim, f->dim);
            fetch(read + f->dim, f->dim);
            memcpy(s->query_rows + r * f->content, in->query + token[r] * f->content, f->content * sizeof(float));
            memcpy(s->grad_rows + r * f->dim, g, f->dim * sizeof(float));
            for (int d = 0; d < f->dim; d++) s->grad[d * GROUP + r] = g[d];
            along[r] = dot_of(g, read, f->dim);
            level[r] = norm[token[r]];
            there[r] = r < queries; /* what stands in a lane again must not count again */
        }
        vec most[2] = {all(0), all(0)};
        group_dots(s->key, f->content, s->geometry, s->query, keys, s->logits, most, NULL, 0);
        group_dots(s->value, f->dim, NULL, s->grad, keys, s->grad_logits, most, NULL, 0);
        vec sums[GEOMETRY][2];
        for (int d = 0; d < GEOMETRY; d++) sums[d][0] = sums[d][1] = all(0);
        for (int j = 0; j < keys; j++) {
            const float *geometry = s->geometry + GEOMETRY * j;
            float *weight = s->logits + j * GROUP, *into = s->grad_logits + j * GROUP, total = 0;
            for (int half = 0; half < 2; half++, weight += LANES, into += LANES) {
                vec w = exponential(load(weight) - load(level + half * LANES)) * load(there + half * LANES);
                vec g = w * (load(into) - load(along + half * LANES));
                store(weight, w);
                store(into, g);
                for (int d = 0; d < GEOMETRY; d++) sums[d][half] += g * geometry[d];
                if (j >= near) total += sum_of(g);
            }
            if (j >= near) s->grad_key[j][f->content + 4] += total * inverse;
        }
        group_spread(s->grad_value, f->dim, s->logits, keys, queries, s->grad_rows);
        group_spread(s->grad_key, f->content, s->grad_logits, keys, queries, s->query_rows);
        memset(s->read, 0, GROUP * f->dim * sizeof(float));
        group_sums(s->key, f->content, s->grad_logits, 0, keys, queries, s->read);
        for (int r = 0; r < queries; r++) {
            memcpy(back->query + token[r] * f->content, s->read + r * f->content, f->content * sizeof(float));
        }
        for (int half = 0; half < 2; half++) {
            vec y = load(dy + half * LANES), x = load(dx + half * LANES);
            vec of_y = sums[0][half] - y * sums[3][half], of_x = sums[1][half] - x * sums[3][half];
            vec of_inverse = y * sums[0][half] + x * sums[1][half] + sums[2][half];
            of_inverse -= 0.5f * (y * y + x * x) * sums[3][half];
            back->drift[2 * own] += sum_of(of_y) * inverse;
            back->drift[2 * own + 1] += sum_of(of_x) * inverse;
            back->sigma[own] -= 2.0f * sum_of(of_inverse) * inverse / sigma;
        }
    }
}

/* ---- the field --------------------------------------------------------------------------------------------------------- */

static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

/* Bytes that each thread needs in `scratch`, which is aligned to 64. */
int64_t window_scratch(int content, int dim, int text, int block, int radius) {
    int64_t across = block + 2 * radius, keys = across * across + text;
    int64_t floats = rounded((content + GEOMETRY) * GROUP) + 2 * rounded(keys * GROUP) + 3 * rounded(GROUP * dim);
    floats += rounded(keys * GEOMETRY) + rounded(GROUP * content);
    return floats * sizeof(float) + (4 * keys * sizeof(void *) + 63) / 64 * 64;
}

static workspace workspace_in(char *memory, const field *f) {
    int64_t across = f->block + 2 * f->radius, keys = across * across + f->text;
    workspace s;
    s.query = (float *)memory;
    s.logits = s.query + rounded((f->content + GEOMETRY) * GROUP);
    s.grad_logits = s.logits + rounded(keys * GROUP);
    s.read = s.grad_logits + rounded(keys * GROUP);
    s.grad = s.read + rounded(GROUP * f->dim);
    s.grad_rows = s.grad + rounded(GROUP * f->dim);
    s.geometry = s.grad_rows + rounded(GROUP * f->dim);
    s.query_rows = s.geometry + rounded(keys * GEOMETRY);
    s.key = (const float **)(s.query_rows + rounded(GROUP * f->content));
    s.value = s.key + keys;
    s.grad_key = (float **)(s.value + keys);
    s.grad_value = s.grad_key + keys;
    return s;
}

/* `norm` gets the logarithm of each softmax's denominator: what the way back needs. */
void window_attention(const float *query, const float *key, const float *value, const float *text_key,
                      const float *text_value, const float *drift, const float *sigma, float *out, float *norm,
                      char *scratch, int64_t batch, int height, int width, int heads, int content, int dim, int text,
                      int block, int radius, int lead_y, int lead_x, int threads) {
    field f = {batch, height, width, heads, content, dim, text, block, radius, lead_y, lead_x};
    inputs in = {query, key, value, text_key, text_value, drift, sigma};
    int blocks_y = (lead_y + height + block - 1) / block, blocks_x = (lead_x + width + block - 1) / block;
    int64_t each = window_scratch(content, dim, text, block, radius);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * blocks_y * blocks_x; task++) {
        workspace s = workspace_in(scratch + each * omp_get_thread_num(), &f);
        int64_t picture = task / (blocks_y * blocks_x);
        int at = (int)(task % (blocks_y * blocks_x));
        /* Heads of a block follow each other: they share the lines of memory that its window is in. */
        for (int head = 0; head < heads; head++) {
            attend_block(&f, &in, out, norm, picture, head, place_of(&f, at / blocks_x, at % blocks_x), &s);
        }
    }
}

/* Gradients are added to `grad_key`, `grad_value` and what follows, which are zero at first. Windows overlap, so that a
 * head of a picture is one thread's. */
void window_attention_back(const float *grad, const float *query, const float *key, const float *value,
                           const float *text_key, const float *text_value, const float *drift, const float *sigma,
                           const float *out, const float *norm, float *grad_query, float *grad_key, float *grad_value,
                           float *grad_text_key, float *grad_text_value, float *grad_drift, float *grad_sigma,
                           char *scratch, int64_t batch, int height, int width, int heads, int content, int dim,
                           int text, int block, int radius, int lead_y, int lead_x, int threads) {
    field f = {batch, height, width, heads, content, dim, text, block, radius, lead_y, lead_x};
    inputs in = {query, key, value, text_key, text_value, drift, sigma};
    gradients back = {grad_query, grad_key, grad_value, grad_text_key, grad_text_value, grad_drift, grad_sigma};
    int blocks_y = (lead_y + height + block - 1) / block, blocks_x = (lead_x + width + block - 1) / block;
    int64_t each = window_scratch(content, dim, text, block, radius);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * heads; task++) {
        workspace s = workspace_in(scratch + each * omp_get_thread_num(), &f);
        for (int at = 0; at < blocks_y * blocks_x; at++) {
            attend_block_back(&f, &in, out, norm, grad, &back, task / heads, (int)(task % heads),
                              place_of(&f, at / blocks_x, at % blocks_x), &s);
        }
    }
}
