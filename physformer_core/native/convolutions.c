/* Convolutions of 3x3 with a margin of zeros, of a field that is modulated and activated first, channels last.
 *
 * By Winograd's F(2x2, 3x3), see Lavin and Gray 2016 (https://arxiv.org/abs/1509.09308): four pixels of a result take 16
 * products of channels instead of 36, and what is done before and after are additions, channel by channel. Height and
 * width are even, channels are multiples of LANES.
 *
 * With few channels there is little work in a product, so that what counts are passes over memory: of a few rows of tiles
 * (2x2 pixels) at a time everything is done while they lie in the caches, forward and backward, and nothing but the field
 * itself is kept for the way back.
 */

#include "vectors.h"

#define PARTS 16 /* of a tile: 4x4 */
#define STRIP 48 /* tiles at most that are worked on at once */
#define IMAGES 2 /* whose gradients of weights are summed by one thread */

#if LANES == 16
#define WIDE 1 /* registers of a row of sums; with TALL rows there are about as many sums as half the registers */
#define TALL 12
#define LOW 8
#else
#define WIDE 2
#define TALL 6
#define LOW 4
#endif

int images_in_a_part(void) { return IMAGES; }

/* c [rows, LANES wide] = a [rows, inner] b [inner, wide LANES], or plus c. */
static inline __attribute__((always_inline)) void block(const float *a, int64_t a_row, int64_t a_step, const float *b,
                                                        int64_t b_step, float *c, int64_t c_row, int inner,
                                                        const int rows, const int wide, const int added) {
    vec sums[TALL][WIDE];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) sums[i][j] = added ? load(c + i * c_row + j * LANES) : all(0);
    }
    for (int k = 0; k < inner; k++) {
        vec right[WIDE];
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) right[j] = load(b + k * b_step + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            vec left = all(a[i * a_row + k * a_step]);
#pragma GCC unroll 2
            for (int j = 0; j < wide; j++) sums[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) store(c + i * c_row + j * LANES, sums[i][j]);
    }
}

/* c [rows, columns] = a b, or plus c, where a's number (row, k) lies at row * a_row + k * a_step. */
static __attribute__((noinline)) void product(const float *a, int64_t a_row, int64_t a_step, const float *b, float *c,
                                              int rows, int inner, int columns, int added) {
    for (int column = 0; column < columns;) {
        const int two = WIDE == 2 && column + 2 * LANES <= columns;
        for (int row = 0; row < rows;) {
            const float *from = a + row * a_row, *by = b + column;
            float *to = c + row * columns + column;
            int left = rows - row;
#define BLOCK(high)                                                                                           \
    do {                                                                                                      \
        if (two) block(from, a_row, a_step, by, columns, to, columns, inner, high, WIDE, added);               \
        else block(from, a_row, a_step, by, columns, to, columns, inner, high, 1, added);                      \
        row += high;                                                                                          \
    } while (0)
            if (left >= TALL && left != TALL + 1 && left != 2 * LOW) BLOCK(TALL);
            else if (left >= LOW) BLOCK(LOW);
            else BLOCK(1);
#undef BLOCK
        }
        column += two ? 2 * LANES : LANES;
    }
}

/* weight [out, in, 3, 3] -> parts [16, in, out]; for the way back [16, out, in], of the taps turned round. */
static void parts_of_weight(const float *weight, float *parts, int in, int out, int back) {
    for (int o = 0; o < out; o++) {
        for (int i = 0; i < in; i++) {
            const float *given = weight + (o * in + i) * 9;
            float w[9], rows[4][3];
            for (int t = 0; t < 9; t++) w[t] = given[back ? 8 - t : t];
            for (int x = 0; x < 3; x++) {
                float outer = 0.5f * (w[x] + w[6 + x]), middle = 0.5f * w[3 + x];
                rows[0][x] = w[x], rows[1][x] = outer + middle, rows[2][x] = outer - middle, rows[3][x] = w[6 + x];
            }
            int64_t place = back ? o * in + i : i * out + o, size = (int64_t)in * out;
            for (int y = 0; y < 4; y++) {
                float outer = 0.5f * (rows[y][0] + rows[y][2]), middle = 0.5f * rows[y][1];
                float *to = parts + 4 * y * size + place;
                to[0] = rows[y][0], to[size] = outer + middle, to[2 * size] = outer - middle, to[3 * size] = rows[y][2];
            }
        }
    }
}

/* parts [16, in, out] of the gradient -> weight [out, in, 3, 3]. */
static void weight_of_parts(const float *parts, float *weight, int in, int out) {
    int64_t size = (int64_t)in * out;
    for (int o = 0; o < out; o++) {
        for (int i = 0; i < in; i++) {
            float rows[3][4], *to = weight + (o * in + i) * 9;
            for (int x = 0; x < 4; x++) {
                const float *p = parts + x * size + i * out + o;
                float one = 0.5f * p[4 * size], other = 0.5f * p[8 * size];
                rows[0][x] = p[0] + one + other, rows[1][x] = one - other, rows[2][x] = one + other + p[12 * size];
            }
            for (int y = 0; y < 3; y++) {
                float one = 0.5f * rows[y][1], other = 0.5f * rows[y][2];
                to[3 * y] = rows[y][0] + one + other, to[3 * y + 1] = one - other;
                to[3 * y + 2] = one + other + rows[y][3];
            }
        }
    }
}

/* How a picture is cut up: `rows` rows of tiles at once where they are short, else a row in strips of `tiles`. */
typedef struct {
    int rows, tiles;
} cut;

static inline cut cut_of(int height, int width) {
    int tiles = width / 2, strips = (tiles + STRIP - 1) / STRIP;
    return (cut){at_most(height / 2, at_least(1, STRIP / tiles)), (tiles + strips - 1) / strips};
}

/* Numbers from one part of tiles to the next: a cache line more than they fill, as multiples of 4 KB would all lie in the
 * same lines of the first cache. */
static inline int64_t apart(int tiles, int channels) { return (int64_t)tiles * channels + 16; }

/* A picture, and what is done to it before it is multiplied: nothing where scale is &nothing, silu where it is NULL, silu
 * of field * (1 + scale) + shift else. */
typedef struct {
    const float *field, *scale, *shift;
    int height, width, channels;
} picture;

static const float nothing;

/* Rows `top` to `bottom` of pixels, columns `left` to `right`, activated, to a block of their own; zeros where they lie
 * outside. */
static void gather(const picture *from, float *to, int top, int bottom, int left, int right) {
    int channels = from->channels, first = at_least(left, 0), last = at_most(right, from->width);
    for (int y = top; y < bottom; y++, to += (right - left) * channels) {
        if (y < 0 || y >= from->height) {
            memset(to, 0, (right - left) * channels * sizeof(float));
            continue;
        }
        int64_t at = ((int64_t)y * from->width + first) * channels, count = (last - first) * channels;
        float *inside = to + (first - left) * channels;
        memset(to, 0, (first - left) * channels * sizeof(float));
        memset(inside + count, 0, (right - last) * channels * sizeof(float));
        if (from->scale == &nothing) {
            memcpy(inside, from->field + at, count * sizeof(float));
            continue;
        }
        for (int c = 0; c < channels; c += LANES) {
            vec by = all(1.0f), plus = all(0);
            if (from->scale) by += load(from->scale + c), plus = load(from->shift + c);
            for (int64_t i = c; i < count; i += channels) {
                vec x = load(from->field + at + i) * by + plus;
                store(inside + i, x / (all(1.0f) + exponential(-x)));
            }
        }
    }
}

/* A column of four pixels, LANES channels: Bᵀ d. */
static inline void column_of_four(const float *at, int64_t line, vec to[4]) {
    vec d0 = load(at), d1 = load(at + line), d2 = load(at + 2 * line), d3 = load(at + 3 * line);
    to[0] = d0 - d2, to[1] = d1 + d2, to[2] = d2 - d1, to[3] = d1 - d3;
}

/* The parts [16, rows * tiles, channels] of so many tiles: Bᵀ d B of the 4x4 pixels around each, from a block of pixels that
 * is one larger all around. */
static void parts_of_pixels(const float *pixels, float *parts, int rows, int tiles, int channels) {
    int64_t line = (int64_t)(2 * tiles + 2) * channels, size = apart(rows * tiles, channels);
    for (int row = 0; row < rows; row++, pixels += 2 * line) {
        for (int c = 0; c < channels; c += LANES) {
            vec a[4], b[4], e[4], d[4];
            const float *at = pixels + c;
            float *to = parts + (int64_t)row * tiles * channels + c;
            column_of_four(at, line, a);
            column_of_four(at + channels, line, b);
            for (int tile = 0; tile < tiles; tile++, to += channels) {
                at += 2 * channels;
                column_of_four(at, line, e);
                column_of_four(at + channels, line, d);
                for (int y = 0; y < 4; y++) {
                    store(to + 4 * y * size, a[y] - e[y]);
                    store(to + (4 * y + 1) * size, b[y] + e[y]);
                    store(to + (4 * y + 2) * size, e[y] - b[y]);
                    store(to + (4 * y + 3) * size, b[y] - d[y]);
                    a[y] = e[y], b[y] = d[y];
                }
            }
        }
    }
}

/* The parts [16, rows * tiles, channels] of gradients of tiles: A dy Aᵀ of their 2x2 pixels, from such a block. */
static void parts_of_gradients(const float *pixels, float *parts, int rows, int tiles, int channels) {
    int64_t line = (int64_t)(2 * tiles + 2) * channels, size = apart(rows * tiles, channels);
    for (int row = 0; row < rows; row++) {
        const float *above = pixels + (2 * row + 1) * line + channels, *below = above + line;
        for (int tile = 0; tile < tiles; tile++, parts += channels, above += 2 * channels, below += 2 * channels) {
            for (int c = 0; c < channels; c += LANES) {
                vec left[4], right[4];
                left[0] = load(above + c), right[0] = load(above + channels + c);
                left[3] = load(below + c), right[3] = load(below + channels + c);
                left[1] = left[0] + left[3], right[1] = right[0] + right[3];
                left[2] = left[0] - left[3], right[2] = right[0] - right[3];
                left[3] = -left[3], right[3] = -right[3];
                for (int y = 0; y < 4; y++) {
                    store(parts + 4 * y * size + c, left[y]);
                    store(parts + (4 * y + 1) * size + c, left[y] + right[y]);
                    store(parts + (4 * y + 2) * size + c, left[y] - right[y]);
                    store(parts + (4 * y + 3) * size + c, -right[y]);
                }
            }
        }
    }
}

/* Aᵀ m A of one tile's parts, LANES channels: its pixels above and below. */
static inline void pixels_of_tile(const float *parts, int64_t size, vec pixels[4]) {
    vec up[4], down[4];
    for (int x = 0; x < 4; x++) {
        vec one = load(parts + (4 + x) * size), other = load(parts + (8 + x) * size);
        up[x] = load(parts + x * size) + one + other;
        down[x] = one - other - load(parts + (12 + x) * size);
    }
    pixels[0] = up[0] + up[1] + up[2], pixels[1] = up[1] - up[2] - up[3];
    pixels[2] = down[0] + down[1] + down[2], pixels[3] = down[1] - down[2] - down[3];
}

/* The sums of all parts, in order, to the first. */
static void add_parts(float *sums, int64_t parts, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t from = 0; from < size; from += 16) {
        int64_t to = from + 16 < size ? from + 16 : size;
        for (int64_t part = 1; part < parts; part++) {
            for (int64_t i = from; i < to; i++) sums[i] += sums[part * size + i];
        }
    }
}

/* out = silu(field * (1 + scale) + shift) * weight + bias + added; scale and shift, and added, may be NULL. */
void activated_convolution(const float *field, const float *scale, const float *shift, const float *weight,
                           const float *bias, const float *added, float *out, int64_t batch, int height, int width,
                           int in, int channels, int threads) {
    cut at = cut_of(height, width);
    int most = at.rows * at.tiles, units = (height / 2 + at.rows - 1) / at.rows;
    float of_weight[PARTS * in * channels];
    parts_of_weight(weight, of_weight, in, channels, 0);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t unit = 0; unit < batch * units; unit++) {
        float pixels[(2 * at.rows + 2) * (2 * at.tiles + 2) * in], given[PARTS * apart(most, in)];
        float made[PARTS * apart(most, channels)];
        int64_t image = unit / units, start = image * height * width;
        picture from = {field + start * in, scale ? scale + image * in : NULL, shift + (scale ? image * in : 0),
                        height, width, in};
        int top = unit % units * at.rows, rows = at_most(at.rows, height / 2 - top);
        for (int left = 0; left < width / 2; left += at.tiles) {
            int tiles = at_most(at.tiles, width / 2 - left), count = rows * tiles;
            gather(&from, pixels, 2 * top - 1, 2 * (top + rows) + 1, 2 * left - 1, 2 * (left + tiles) + 1);
            parts_of_pixels(pixels, given, rows, tiles, in);
            for (int part = 0; part < PARTS; part++) {
                product(given + part * apart(count, in), in, 1, of_weight + part * in * channels,
                        made + part * apart(count, channels), count, in, channels, 0);
            }
            for (int c = 0; c < channels; c += LANES) {
                const float *from_parts = made + c;
                vec plus = load(bias + c);
                for (int row = 0; row < rows; row++) {
                    int64_t to = (start + (int64_t)2 * (top + row) * width + 2 * left) * channels + c;
                    for (int tile = 0; tile < tiles; tile++, from_parts += channels, to += 2 * channels) {
                        vec done[4];
                        pixels_of_tile(from_parts, apart(count, channels), done);
                        for (int i = 0; i < 4; i++) {
                            int64_t place = to + (i / 2 * width + i % 2) * (int64_t)channels;
                            done[i] += plus;
                            if (added) done[i] += load(added + place);
                            store(out + place, done[i]);
                        }
                    }
                }
            }
        }
    }
}

/* The gradients of all of it. Those of weight and bias are summed over IMAGES at a time, in `sums` [parts, 16 * in * channels
 * + channels], and then in order. of_field is summed with added, if that is not NULL. */
void activated_convolution_back(const float *grad, const float *field, const float *scale, const float *shift,
                                const float *weight, const float *added, float *sums, float *of_field, float *of_scale,
                                float *of_shift, float *of_weight, float *of_bias, int64_t batch, int height, int width,
                                int in, int channels, int threads) {
    cut at = cut_of(height, width);
    int most = at.rows * at.tiles;
    int64_t parts = (batch + IMAGES - 1) / IMAGES, size = (int64_t)PARTS * in * channels + channels;
    float weight_back[PARTS * in * channels];
    parts_of_weight(weight, weight_back, in, channels, 1);
#pragma omp parallel for schedule(static, IMAGES) num_threads(threads)
    for (int64_t image = 0; image < batch; image++) {
        int wider = at_least(in, channels);
        float pixels[(2 * at.rows + 2) * (2 * at.tiles + 2) * wider], given[PARTS * apart(most, wider)];
        float made[PARTS * apart(most, wider)], *sum = sums + image / IMAGES * size, *plain = sum + size - channels;
        int64_t start = image * height * width;
        picture from = {field + start * in, scale ? scale + image * in : NULL, shift + (scale ? image * in : 0),
                        height, width, in};
        picture back = {grad + start * channels, &nothing, NULL, height, width, channels};
        if (image % IMAGES == 0) memset(sum, 0, size * sizeof(float));
        if (scale) memset(of_scale + image * in, 0, in * sizeof(float));
        if (scale) memset(of_shift + image * in, 0, in * sizeof(float));
        for (int top = 0; top < height / 2; top += at.rows) {
            int rows = at_most(at.rows, height / 2 - top);
            for (int left = 0; left < width / 2; left += at.tiles) {
                int tiles = at_most(at.tiles, width / 2 - left), count = rows * tiles;
                int edges[4] = {2 * top - 1, 2 * (top + rows) + 1, 2 * left - 1, 2 * (left + tiles) + 1};
                int64_t of_in = apart(count, in), of_out = apart(count, channels);
                gather(&back, pixels, edges[0], edges[1], edges[2], edges[3]);
                parts_of_pixels(pixels, given, rows, tiles, channels);
                for (int part = 0; part < PARTS; part++) {
                    product(given + part * of_out, channels, 1, weight_back + part * in * channels, made + part * of_in,
                            count, channels, in, 0);
                }
                for (int c = 0; c < in; c += LANES) {
                    const float *from_parts = made + c;
                    vec by_scale = all(0), by_shift = all(0), by = all(1.0f), plus = all(0);
                    if (scale) by += load(from.scale + c), plus = load(from.shift + c);
                    for (int row = 0; row < rows; row++) {
                        int64_t to = ((int64_t)2 * (top + row) * width + 2 * left) * in + c;
                        for (int tile = 0; tile < tiles; tile++, from_parts += in, to += 2 * in) {
                            vec done[4];
                            pixels_of_tile(from_parts, of_in, done);
                            for (int i = 0; i < 4; i++) {
                                int64_t place = to + (i / 2 * width + i % 2) * (int64_t)in;
                                vec x = load(from.field + place), y = x * by + plus;
                                vec share = 1.0f / (all(1.0f) + exponential(-y));
                                vec into = done[i] * share * (1.0f + y * (1.0f - share));
                                by_scale += into * x;
                                by_shift += into;
                                into = into * by;
                                if (added) into += load(added + start * in + place);
                                store(of_field + start * in + place, into);
                            }
                        }
                    }
                    if (!scale) continue;
                    float *to_scale = of_scale + image * in + c, *to_shift = of_shift + image * in + c;
                    store(to_scale, load(to_scale) + by_scale);
                    store(to_shift, load(to_shift) + by_shift);
                }
                parts_of_gradients(pixels, made, rows, tiles, channels);
                gather(&from, pixels, edges[0], edges[1], edges[2], edges[3]);
                parts_of_pixels(pixels, given, rows, tiles, in);
                for (int part = 0; part < PARTS; part++) {
                    product(given + part * of_in, 1, in, made + part * of_out, sum + part * in * channels, in, count,
                            channels, 1);
                }
                const float *whole = made + 5 * of_out; /* the sum of a tile's pixels */
                for (int tile = 0; tile < count; tile++) {
                    for (int c = 0; c < channels; c++) plain[c] += whole[tile * channels + c];
                }
            }
        }
    }
    add_parts(sums, parts, size, threads);
    weight_of_parts(sums, of_weight, in, channels);
    memcpy(of_bias, sums + size - channels, channels * sizeof(float));
}

/* Rows of a result of half the size that are worked on at once. */
static inline int rows_of_half(int height, int width) { return at_most(height / 2, at_least(1, STRIP / (width / 2))); }

/* out [height / 2, width / 2] = silu(field) * weight [channels, in, 4, 4] + bias, in steps of 2 pixels with a margin of 1. Four
 * taps of a row lie together in memory, so that it is four products of matrices whose rows overlap. */
void halving_convolution(const float *field, const float *weight, const float *bias, float *out, int64_t batch,
                         int height, int width, int in, int channels, int threads) {
    int most = rows_of_half(height, width), units = (height / 2 + most - 1) / most, tall = height / 2, wide = width / 2;
    int64_t line = (int64_t)(width + 2) * in, tap = (int64_t)4 * in * channels;
    float taps[4 * tap];
    for (int o = 0; o < channels; o++) {
        for (int i = 0; i < in; i++) {
            for (int t = 0; t < 16; t++) taps[t / 4 * tap + (t % 4 * in + i) * channels + o] = weight[(o * in + i) * 16 + t];
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t unit = 0; unit < batch * units; unit++) {
        float pixels[(2 * most + 2) * line];
        int64_t image = unit / units;
        int top = unit % units * most, bottom = at_most(top + most, tall);
        picture from = {field + image * height * width * in, NULL, NULL, height, width, in};
        gather(&from, pixels, 2 * top - 1, 2 * bottom + 1, -1, width + 1);
        for (int y = top; y < bottom; y++) {
            float *to = out + (image * tall + y) * wide * channels;
            for (int x = 0; x < wide; x++) memcpy(to + x * channels, bias, channels * sizeof(float));
            for (int t = 0; t < 4; t++) {
                product(pixels + (2 * (y - top) + t) * line, 2 * in, 1, taps + t * tap, to, wide, 4 * in, channels, 1);
            }
        }
    }
}

/* Its gradients. A pixel is seen by two taps a row and a column, which ones depends on whether it is even or odd: 2x2
 * neighbours of the gradient make one of the four kinds. `sums` [parts, 16 * in * channels + channels] is worked in. */
void halving_convolution_back(const float *grad, const float *field, const float *weight, float *sums, float *of_field,
                              float *of_weight, float *of_bias, int64_t batch, int height, int width, int in,
                              int channels, int threads) {
    int most = rows_of_half(height, width), tall = height / 2, wide = width / 2;
    int64_t line = (int64_t)(width + 2) * in, back_line = (int64_t)(wide + 2) * channels, tap = (int64_t)4 * in * channels;
    int64_t parts = (batch + IMAGES - 1) / IMAGES, size = 4 * tap + channels, kind = (int64_t)2 * channels * in;
    static const int seen[2][2] = {{3, 1}, {2, 0}}; /* taps of an even and an odd pixel, by neighbours */
    float taps[8 * kind];
    for (int k = 0; k < 16; k++) {
        int row = seen[k >> 3][k >> 1 & 1], column = seen[k >> 2 & 1][k & 1];
        for (int o = 0; o < channels; o++) {
            for (int i = 0; i < in; i++) {
                taps[(k >> 1) * kind + ((k & 1) * channels + o) * in + i] = weight[(o * in + i) * 16 + 4 * row + column];
            }
        }
    }
#pragma omp parallel for schedule(static, IMAGES) num_threads(threads)
    for (int64_t image = 0; image < batch; image++) {
        float pixels[(2 * most + 2) * line], back_pixels[(most + 2) * back_line], made[wide * in];
        float *sum = sums + image / IMAGES * size, *plain = sum + 4 * tap, *to = of_field + image * height * width * in;
        picture from = {field + image * height * width * in, NULL, NULL, height, width, in};
        picture back = {grad + image * tall * wide * channels, &nothing, NULL, tall, wide, channels};
        if (image % IMAGES == 0) memset(sum, 0, size * sizeof(float));
        for (int top = 0; top < tall; top += most) {
            int bottom = at_most(top + most, tall);
            gather(&from, pixels, 2 * top - 1, 2 * bottom + 1, -1, width + 1);
            gather(&back, back_pixels, top - 1, bottom + 1, -1, wide + 1);
            for (int y = top; y < bottom; y++) {
                const float *row = back_pixels + (y - top + 1) * back_line;
                for (int t = 0; t < 4; t++) {
                    product(pixels + (2 * (y - top) + t) * line, 1, 2 * in, row + channels, sum + t * tap, 4 * in, wide,
                            channels, 1);
                }
                for (int x = 1; x <= wide; x++) {
                    for (int c = 0; c < channels; c++) plain[c] += row[x * channels + c];
                }
                for (int k = 0; k < 4; k++) {
                    int odd_row = k >> 1, odd_column = k & 1;
                    const float *near = row + (odd_row - 1) * back_line + odd_column * channels;
                    product(near, channels, 1, taps + 2 * k * kind, made, wide, 2 * channels, in, 0);
                    product(near + back_line, channels, 1, taps + (2 * k + 1) * kind, made, wide, 2 * channels, in, 1);
                    int64_t place = ((int64_t)(2 * y + odd_row) * width + odd_column) * in;
                    for (int x = 0; x < wide; x++, place += 2 * in) {
                        for (int c = 0; c < in; c += LANES) {
                            vec value = load(from.field + place + c);
                            vec share = 1.0f / (all(1.0f) + exponential(-value));
                            vec into = load(made + x * in + c) * share * (1.0f + value * (1.0f - share));
                            store(to + place + c, into);
                        }
                    }
                }
            }
        }
    }
    add_parts(sums, parts, size, threads);
    for (int o = 0; o < channels; o++) {
        for (int i = 0; i < in; i++) {
            for (int t = 0; t < 16; t++) {
                of_weight[(o * in + i) * 16 + t] = sums[t / 4 * tap + (t % 4 * in + i) * channels + o];
            }
        }
    }
    memcpy(of_bias, sums + 4 * tap, channels * sizeof(float));
}
