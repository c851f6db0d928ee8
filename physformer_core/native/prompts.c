/* Prompts without their padding: token by token in rows, of which `starts` [batch + 1] says where each prompt's begin. */

#include "vectors.h"

static inline void add_scaled(float *to, float by, const float *from, int dim) {
    int i = 0;
    for (; i + LANES <= dim; i += LANES) store(to + i, load(to + i) + by * load(from + i));
    for (; i < dim; i++) to[i] += by * from[i];
}

/* Every token of a prompt reads all of them. qkv [rows, 3, heads, dim]; `norm` [rows, heads] gets the logarithm of each
 * softmax's denominator, which the way back needs. */
void text_attention(const float *qkv, const int32_t *starts, float *out, float *norm, int64_t batch, int heads, int dim,
                    float scale, int threads) {
    int64_t step = 3 * (int64_t)heads * dim;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * heads; task++) {
        int head = (int)(task % heads), first = starts[task / heads], last = starts[task / heads + 1];
        const float *query = qkv + head * dim, *key = query + heads * dim, *value = key + heads * dim;
        float logits[last > first ? last - first : 1];
        for (int i = first; i < last; i++) {
            float *to = out + ((int64_t)i * heads + head) * dim, most = -INFINITY, sum = 0;
            for (int j = first; j < last; j++) {
                float logit = scale * dot_of(query + i * step, key + j * step, dim);
                logits[j - first] = logit;
                most = logit > most || logit != logit ? logit : most; /* what is not a number is passed on */
            }
            memset(to, 0, dim * sizeof(float));
            for (int j = first; j < last; j++) {
                float weight = expf(logits[j - first] - most);
                sum += weight;
                add_scaled(to, weight, value + j * step, dim);
            }
            for (int d = 0; d < dim; d++) to[d] /= sum;
            norm[(int64_t)i * heads + head] = most + logf(sum);
        }
    }
}

/* See attention.c for the formulae. `grad_qkv` is zero at first. */
void text_attention_back(const float *grad, const float *qkv, const int32_t *starts, const float *out, const float *norm,
                         float *grad_qkv, int64_t batch, int heads, int dim, float scale, int threads) {
    int64_t step = 3 * (int64_t)heads * dim;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * heads; task++) {
        int head = (int)(task % heads), first = starts[task / heads], last = starts[task / heads + 1];
        const float *query = qkv + head * dim, *key = query + heads * dim, *value = key + heads * dim;
        float *to_query = grad_qkv + head * dim, *to_key = to_query + heads * dim, *to_value = to_key + heads * dim;
        for (int i = first; i < last; i++) {
            int64_t row = (int64_t)i * heads + head;
            const float *g = grad + row * dim;
            float along = dot_of(g, out + row * dim, dim);
            for (int j = first; j < last; j++) {
                float weight = expf(scale * dot_of(query + i * step, key + j * step, dim) - norm[row]);
                float into = scale * weight * (dot_of(g, value + j * step, dim) - along);
                add_scaled(to_query + i * step, into, key + j * step, dim);
                add_scaled(to_key + j * step, into, query + i * step, dim);
                add_scaled(to_value + j * step, weight, g, dim);
            }
        }
    }
}

/* Keys [batch, heads, longest, turning + still + geometry] that pictures read: zero in the `turning` dimensions, normed
 * content [rows, heads, still] times `gain`, and in the third pair of the geometry the head's altitude, or that of
 * padding. */
void text_keys(const float *content, const float *gain, const float *altitude, const int32_t *starts, float *keys,
               int64_t batch, int heads, int longest, int turning, int still, int geometry, float epsilon, float hidden,
               int threads) {
    int dim = turning + still + geometry;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * heads; task++) {
        int head = (int)(task % heads), first = starts[task / heads], count = starts[task / heads + 1] - first;
        float *to = keys + task * longest * dim;
        memset(to, 0, (int64_t)longest * dim * sizeof(float));
        for (int t = 0; t < longest; t++, to += dim) {
            to[turning + still + 4] = to[turning + still + 5] = t < count ? altitude[head] : hidden;
            if (t >= count) continue;
            const float *from = content + ((int64_t)(first + t) * heads + head) * still;
            float inverse = inverse_rms(from, still, epsilon);
            for (int i = 0; i < still; i++) to[turning + i] = from[i] * inverse * gain[i];
        }
    }
}

/* part_gain [batch, still] and part_altitude [batch, heads] are each prompt's own. */
void text_keys_back(const float *grad, const float *content, const float *gain, const int32_t *starts,
                    float *grad_content, float *part_gain, float *part_altitude, int64_t batch, int heads, int longest,
                    int turning, int still, int geometry, float epsilon, int threads) {
    int dim = turning + still + geometry;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t prompt = 0; prompt < batch; prompt++) {
        int first = starts[prompt], count = starts[prompt + 1] - first;
        float *of_gain = part_gain + prompt * still, back[still];
        memset(of_gain, 0, still * sizeof(float));
        for (int head = 0; head < heads; head++) {
            const float *g = grad + (prompt * heads + head) * longest * dim + turning;
            float of_altitude = 0;
            for (int t = 0; t < count; t++, g += dim) {
                const float *from = content + ((int64_t)(first + t) * heads + head) * still;
                float *to = grad_content + ((int64_t)(first + t) * heads + head) * still;
                float inverse = inverse_rms(from, still, epsilon);
                for (int i = 0; i < still; i++) {
                    of_gain[i] += g[i] * from[i] * inverse;
                    back[i] = g[i] * gain[i];
                }
                float along = dot_of(back, from, still) * inverse * inverse / still;
                for (int i = 0; i < still; i++) to[i] = inverse * (back[i] - along * from[i]);
                of_altitude += g[still + 4] + g[still + 5];
            }
            part_altitude[prompt * heads + head] = of_altitude;
        }
    }
}

/* Rows [rows, heads, dim] to where pictures read them, [batch, heads, longest, dim], zero where there is padding; or back,
 * if `back`. */
void text_values(float *rows, const int32_t *starts, float *values, int64_t batch, int heads, int longest, int dim,
                 int back, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * heads; task++) {
        int head = (int)(task % heads), first = starts[task / heads], count = starts[task / heads + 1] - first;
        float *value = values + task * longest * dim;
        for (int t = 0; t < count; t++, value += dim) {
            float *row = rows + ((int64_t)(first + t) * heads + head) * dim;
            memcpy(back ? row : value, back ? value : row, dim * sizeof(float));
        }
        if (!back) memset(value, 0, (int64_t)(longest - count) * dim * sizeof(float));
    }
}
