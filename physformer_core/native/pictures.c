/* Averages over areas of pictures of 8 bits. */

#include "vectors.h"

/* Every pixel of the result is the average over a part of the source, row by row and column by column: of `rows` or
 * `columns` pixels from `first_row` or `first_column` on, weighed in 4096ths that add up to 4096 (`down` and `across`
 * have `most_down` and `most_across` for each). All sums are whole numbers, so that the result is the same everywhere.
 * `source` has `stride` bytes a row, `channels` a pixel; `sums` is for as many numbers as a row of the source has. */
void area_average(const uint8_t *source, int64_t stride, int channels, int height, const int32_t *first_row,
                  const int32_t *rows, const int32_t *down, int most_down, int width, const int32_t *first_column,
                  const int32_t *columns, const int32_t *across, int most_across, uint8_t *out, uint32_t *sums) {
    int begin = first_column[0] * channels, end = (first_column[width - 1] + columns[width - 1]) * channels;
    for (int y = 0; y < height; y++) {
        memset(sums + begin, 0, (end - begin) * sizeof(uint32_t));
        for (int tap = 0; tap < rows[y]; tap++) {
            const uint8_t *from = source + (first_row[y] + tap) * stride;
            uint32_t weight = down[y * most_down + tap];
            for (int i = begin; i < end; i++) sums[i] += weight * from[i];
        }
        for (int x = 0; x < width; x++) {
            const uint32_t *from = sums + first_column[x] * channels;
            const int32_t *weights = across + x * most_across;
            for (int channel = 0; channel < channels; channel++, from++) {
                uint32_t sum = 1u << 23; /* a half: 255 * 2^24 and that are less than 2^32 */
                for (int tap = 0; tap < columns[x]; tap++) sum += weights[tap] * from[tap * channels];
                *out++ = sum >> 24;
            }
        }
    }
}
