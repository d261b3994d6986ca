// One anchor's box from its distributions.
#pragma once

#include "geometry.h"
#include "ops.h"

namespace yolonas {

// Canvas pixels; not finite where a logit is NaN or +inf.
template <typename T>
YOLONAS_HD Box<float> decode_box(const Map& box_logits, float stride, int64_t bins, int64_t image, int64_t row,
                                 int64_t column) {
    const T* logits = static_cast<const T*>(box_logits.data) + image * box_logits.stride_batch +
                      row * box_logits.stride_height + column * box_logits.stride_width;
    const int64_t step = box_logits.stride_channel, side = bins * step;
    return distances_to_box(dfl_expectation(logits, step, bins), dfl_expectation(logits + side, step, bins),
                            dfl_expectation(logits + 2 * side, step, bins),
                            dfl_expectation(logits + 3 * side, step, bins), column, row, stride);
}

}  // namespace yolonas
