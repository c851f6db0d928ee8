/* Averages over areas of pictures of 8 bits. */

#include <stdlib.h>

#include "vectors.h"

/* Four numbers: the sums of a pixel of three channels, and one that nobody asks for. */
typedef uint32_t quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint8_t quad_of_bytes __attribute__((vector_size(4)));

/* Weighed sums of so many rows, from `begin` to `end`. */
static inline void add_rows(const uint8_t *from, int64_t stride, const int32_t *weights, int rows, int begin, int end,
                            uint32_t *sums) {
    uint32_t first = weights[0];
    for (int i = begin; i < end; i++) sums[i] = first * from[i];
    for (int row = 1; row < rows; row++) {
        const uint8_t *next = from + row * stride;
        uint32_t weight = weights[row];
        for (int i = begin; i < end; i++) sums[i] += weight * next[i];
    }
}

/* Every pixel of the result is the average over a part of the source, row by row and column by column: of `rows` or
 * `columns` pixels from `first_row` or `first_column` on, weighed in 4096ths that add up to 4096 (`down` and `across`
 * have `most_down` and `most_across` for each). All sums are whole numbers, so that the result is the same everywhere.
 * `source` has `stride` bytes a row and `stored` a pixel, of which the first `channels` (one, or three) are averaged.
 * Returns whether there was memory for the sums of a row. */
int area_average(const uint8_t *source, int64_t stride, int stored, int channels, int height,
                 const int32_t *first_row, const int32_t *rows, const int32_t *down, int most_down, int width,
                 const int32_t *first_column, const int32_t *columns, const int32_t *across, int most_across,
                 uint8_t *out) {
    const uint32_t half = 1u << 23; /* 255 * 2^24 and that are less than 2^32 */
    int begin = first_column[0] * stored, end = (first_column[width - 1] + columns[width - 1]) * stored;
    uint32_t *sums = malloc((end + 1) * sizeof(uint32_t));
    if (sums == NULL) return 0;
    sums[end] = 0; /* beside the last three channels: read, never used */
    for (int y = 0; y < height; y++) {
        add_rows(source + first_row[y] * stride, stride, down + y * most_down, rows[y], begin, end, sums);
        for (int x = 0; x < width; x++) {
            const uint32_t *from = sums + first_column[x] * stored;
            const int32_t *weights = across + x * most_across;
            if (channels == 3) {
                quad sum = {half, half, half, half};
                for (int tap = 0; tap < columns[x]; tap++, from += stored) {
                    sum += *(const quad *)from * (uint32_t)weights[tap];
                }
                quad_of_bytes pixel = __builtin_convertvector(sum >> 24, quad_of_bytes);
                for (int channel = 0; channel < 3; channel++) *out++ = pixel[channel];
            } else {
                uint32_t sum = half;
                for (int tap = 0; tap < columns[x]; tap++) sum += weights[tap] * from[tap * stored];
                *out++ = sum >> 24;
            }
        }
    }
    free(sums);
    return 1;
}
