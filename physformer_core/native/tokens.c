/* Norms, updates and gates: every token, or every pixel, by itself. */

#include "vectors.h"

/* Sums over tokens are made by parts of so many, which ops.py adds up. */
#define PART 64

int tokens_in_a_part(void) { return PART; }

void norm_modulate(const float *h, const float *scale, const float *shift, float *out, int64_t batch, int64_t tokens,
                   int dim, float epsilon, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < batch * tokens; row++) {
        const float *from = h + row * dim, *gain = scale + row / tokens * dim, *add = shift + row / tokens * dim;
        float *to = out + row * dim, inverse = inverse_rms(from, dim, epsilon);
        for (int i = 0; i < dim; i++) to[i] = from[i] * inverse * (1.0f + gain[i]) + add[i];
    }
}

/* With n = h / rms and a gradient g of n (1 + scale) + shift. */
void norm_modulate_back(const float *grad, const float *h, const float *scale, float *grad_h, float *part_scale,
                        float *part_shift, int64_t batch, int64_t tokens, int dim, float epsilon, int threads) {
    int64_t parts = (tokens + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < batch * parts; part++) {
        const float *gain = scale + part / parts * dim;
        float *of_scale = part_scale + part * dim, *of_shift = part_shift + part * dim, into[dim];
        int64_t first = part % parts * PART, last = first + PART < tokens ? first + PART : tokens;
        memset(of_scale, 0, dim * sizeof(float));
        memset(of_shift, 0, dim * sizeof(float));
        for (int64_t row = part / parts * tokens + first; row < part / parts * tokens + last; row++) {
            const float *g = grad + row * dim, *from = h + row * dim;
            float *to = grad_h + row * dim, inverse = inverse_rms(from, dim, epsilon);
            for (int i = 0; i < dim; i++) {
                into[i] = g[i] * (1.0f + gain[i]);
                of_scale[i] += g[i] * from[i] * inverse;
                of_shift[i] += g[i];
            }
            float along = dot_of(into, from, dim) * inverse * inverse / dim;
            for (int i = 0; i < dim; i++) to[i] = inverse * (into[i] - along * from[i]);
        }
    }
}

void renormalized_update(const float *h, const float *output, const float *gate, float *out, int64_t batch,
                         int64_t tokens, int dim, float tiny, float opposed, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < batch * tokens; row++) {
        const float *from = h + row * dim, *by = output + row * dim, *open = gate + row / tokens * dim;
        float *to = out + row * dim;
        for (int i = 0; i < dim; i++) to[i] = from[i] + open[i] * by[i];
        float square = dot_of(from, from, dim), total = dot_of(to, to, dim);
        if (total <= opposed * square || square < tiny) {
            memcpy(to, from, dim * sizeof(float));
        } else {
            float scale = sqrtf(square / total); /* 1 to the bit where nothing was added */
            for (int i = 0; i < dim; i++) to[i] *= scale;
        }
    }
}

/* See updates.py for the formulae. */
void renormalized_update_back(const float *grad, const float *h, const float *output, const float *gate, float *grad_h,
                              float *grad_output, float *part_gate, int64_t batch, int64_t tokens, int dim, float tiny,
                              float opposed, int threads) {
    int64_t parts = (tokens + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < batch * parts; part++) {
        const float *open = gate + part / parts * dim;
        float *of_gate = part_gate + part * dim, sum[dim];
        int64_t first = part % parts * PART, last = first + PART < tokens ? first + PART : tokens;
        memset(of_gate, 0, dim * sizeof(float));
        for (int64_t row = part / parts * tokens + first; row < part / parts * tokens + last; row++) {
            const float *g = grad + row * dim, *from = h + row * dim, *by = output + row * dim;
            float *to = grad_h + row * dim, *to_output = grad_output + row * dim;
            for (int i = 0; i < dim; i++) sum[i] = from[i] + open[i] * by[i];
            float square = dot_of(from, from, dim), total = dot_of(sum, sum, dim);
            if (total <= opposed * square || square < tiny) {
                memcpy(to, g, dim * sizeof(float));
                memset(to_output, 0, dim * sizeof(float));
                continue;
            }
            float scale = sqrtf(square / total), along = scale * dot_of(g, sum, dim);
            float pull = along / total, radial = along / square;
            for (int i = 0; i < dim; i++) {
                float into = scale * g[i] - pull * sum[i];
                to[i] = into + radial * from[i];
                to_output[i] = open[i] * into;
                of_gate[i] += into * by[i];
            }
        }
    }
}

void norm_rotate(const float *content, const float *gain, const float *cosine, const float *sine, float *out,
                 int64_t batch, int64_t tokens, int heads, int dim, int turning, float epsilon, int threads) {
    int half = turning / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < batch * tokens; row++) {
        const float *c = cosine + row % tokens * half, *s = sine + row % tokens * half;
        for (int head = 0; head < heads; head++) {
            const float *from = content + (row * heads + head) * dim;
            float *x = out + (row * heads + head) * dim, inverse = inverse_rms(from, dim, epsilon);
            for (int i = 0; i < dim; i++) x[i] = from[i] * inverse * gain[i];
            for (int i = 0; i < half; i++) {
                float first = x[i], second = x[half + i];
                x[i] = first * c[i] - second * s[i];
                x[half + i] = second * c[i] + first * s[i];
            }
        }
    }
}

void norm_rotate_back(const float *grad, const float *content, const float *gain, const float *cosine,
                      const float *sine, float *grad_content, float *part_gain, int64_t batch, int64_t tokens,
                      int heads, int dim, int turning, float epsilon, int threads) {
    int half = turning / 2;
    int64_t rows = batch * tokens;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < (rows + PART - 1) / PART; part++) {
        float *of_gain = part_gain + part * dim, back[dim];
        memset(of_gain, 0, dim * sizeof(float));
        for (int64_t row = part * PART; row < (part + 1) * PART && row < rows; row++) {
            const float *c = cosine + row % tokens * half, *s = sine + row % tokens * half;
            for (int head = 0; head < heads; head++) {
                const float *g = grad + (row * heads + head) * dim, *from = content + (row * heads + head) * dim;
                float *to = grad_content + (row * heads + head) * dim, inverse = inverse_rms(from, dim, epsilon);
                for (int i = 0; i < half; i++) {
                    back[i] = g[i] * c[i] + g[half + i] * s[i];
                    back[half + i] = g[half + i] * c[i] - g[i] * s[i];
                }
                for (int i = turning; i < dim; i++) back[i] = g[i];
                for (int i = 0; i < dim; i++) {
                    of_gain[i] += back[i] * from[i] * inverse;
                    back[i] *= gain[i];
                }
                float along = dot_of(back, from, dim) * inverse * inverse / dim;
                for (int i = 0; i < dim; i++) to[i] = inverse * (back[i] - along * from[i]);
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

void gated_linear_back(const float *grad, const float *gate_up, float *grad_gate_up, int64_t rows, int hidden,
                       int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * hidden, *up = gate + hidden, *g = grad + row * hidden;
        float *to_gate = grad_gate_up + row * 2 * hidden, *to_up = to_gate + hidden;
        int i = 0;
        for (; i + LANES <= hidden; i += LANES) {
            vec x = load(gate + i), share = 1.0f / (all(1.0f) + exponential(-x)), into = load(g + i);
            store(to_up + i, into * x * share);
            store(to_gate + i, into * load(up + i) * share * (1.0f + x * (1.0f - share)));
        }
        for (; i < hidden; i++) {
            float x = gate[i], share = 1.0f / (1.0f + expf(-x));
            to_up[i] = g[i] * x * share;
            to_gate[i] = g[i] * up[i] * share * (1.0f + x * (1.0f - share));
        }
    }
}

/* The refiner's fields are larger than the cache, so that passes over memory are what counts. Without modulation a part
 * is one long pixel. */
void modulated_silu(const float *field, const float *scale, const float *shift, float *out, int64_t batch,
                    int64_t pixels, int dim, int threads) {
    int64_t parts = (pixels + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < batch * parts; part++) {
        const float *gain = scale ? scale + part / parts * dim : NULL, *add = scale ? shift + part / parts * dim : NULL;
        int64_t first = part % parts * PART, count = first + PART < pixels ? PART : pixels - first;
        const float *from = field + (part / parts * pixels + first) * dim;
        float *to = out + (part / parts * pixels + first) * dim;
        int width = scale ? dim : (int)count * dim, i = 0;
        if (!scale) count = 1;
        for (; i + LANES <= width; i += LANES) {
            vec by = all(1.0f), plus = all(0);
            if (scale) by += load(gain + i), plus = load(add + i);
            for (int64_t row = 0; row < count; row++) {
                vec x = load(from + row * width + i) * by + plus;
                store(to + row * width + i, x / (all(1.0f) + exponential(-x)));
            }
        }
        for (; i < width; i++) {
            float by = scale ? 1.0f + gain[i] : 1.0f, plus = scale ? add[i] : 0;
            for (int64_t row = 0; row < count; row++) {
                float x = from[row * width + i] * by + plus;
                to[row * width + i] = x / (1.0f + expf(-x));
            }
        }
    }
}

void modulated_silu_back(const float *grad, const float *field, const float *scale, const float *shift,
                         float *grad_field, float *part_scale, float *part_shift, int64_t batch, int64_t pixels,
                         int dim, int threads) {
    int64_t parts = (pixels + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < batch * parts; part++) {
        const float *gain = scale ? scale + part / parts * dim : NULL, *add = scale ? shift + part / parts * dim : NULL;
        int64_t first = part % parts * PART, count = first + PART < pixels ? PART : pixels - first;
        int64_t begin = (part / parts * pixels + first) * dim;
        const float *g = grad + begin, *from = field + begin;
        float *to = grad_field + begin;
        int width = scale ? dim : (int)count * dim, i = 0;
        if (!scale) count = 1;
        for (; i + LANES <= width; i += LANES) {
            vec by = all(1.0f), plus = all(0), of_scale = all(0), of_shift = all(0);
            if (scale) by += load(gain + i), plus = load(add + i);
            for (int64_t row = 0; row < count; row++) {
                vec given = load(from + row * width + i), x = given * by + plus;
                vec share = 1.0f / (all(1.0f) + exponential(-x));
                vec into = load(g + row * width + i) * share * (1.0f + x * (1.0f - share));
                store(to + row * width + i, into * by);
                of_scale += into * given;
                of_shift += into;
            }
            if (scale) store(part_scale + part * dim + i, of_scale), store(part_shift + part * dim + i, of_shift);
        }
        for (; i < width; i++) {
            float by = scale ? 1.0f + gain[i] : 1.0f, plus = scale ? add[i] : 0, of_scale = 0, of_shift = 0;
            for (int64_t row = 0; row < count; row++) {
                float given = from[row * width + i], x = given * by + plus, share = 1.0f / (1.0f + expf(-x));
                float into = g[row * width + i] * share * (1.0f + x * (1.0f - share));
                to[row * width + i] = into * by;
                of_scale += into * given;
                of_shift += into;
            }
            if (scale) part_scale[part * dim + i] = of_scale, part_shift[part * dim + i] = of_shift;
        }
    }
}
