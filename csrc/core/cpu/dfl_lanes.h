// DFL decoding of many anchors at once, one in each lane of loops that vectorise; the bits of decode_box.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../geometry.h"
#include "../ops.h"

namespace yolonas::cpu {

constexpr int kLanes = 32;  // fewer would be unrolled before they are vectorised

// Expectation of the bin index under softmax of each lane's logits [bins, kLanes], in bins; NaN where dfl_expectation
// gives NaN.
inline void dfl_expectations(const float* logits, int64_t bins, float* expectations) {
    const float infinity = bit_cast<float>(0x7f800000u);
    float largest[kLanes], total[kLanes], weighted[kLanes];
    uint32_t valid[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        largest[lane] = -infinity;
        valid[lane] = 1;
        total[lane] = weighted[lane] = 0.0f;
    }
    for (int64_t b = 0; b < bins; ++b)
        for (int lane = 0; lane < kLanes; ++lane) {
            const float x = logits[b * kLanes + lane];
            valid[lane] &= x < infinity;
            largest[lane] = x > largest[lane] ? x : largest[lane];
        }
    for (int64_t b = 0; b < bins; ++b) {
        const auto bin = static_cast<float>(b);
        for (int lane = 0; lane < kLanes; ++lane) {
            const float e = exp_nonpositive(logits[b * kLanes + lane] - largest[lane]);
            total[lane] += e;
            weighted[lane] += e * bin;
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        const bool defined = valid[lane] && largest[lane] != -infinity;
        expectations[lane] = defined ? weighted[lane] / total[lane] : bit_cast<float>(0x7fc00000u);
    }
}

// Boxes of `n` anchors of one level, canvas pixels.
template <typename T>
void decode_anchors(const Level& level, int64_t bins, int64_t image, int64_t first_anchor, const uint32_t* anchors,
                    size_t n, Box<float>* boxes) {
    const Map& map = level.box_logits;
    const T* base = static_cast<const T*>(map.data) + image * map.stride_batch;
    std::vector<float> logits(static_cast<size_t>(bins) * kLanes, 0.0f);
    float sides[4][kLanes];
    const T* cells[kLanes];
    for (size_t begin = 0; begin < n; begin += kLanes) {
        const int count = static_cast<int>(std::min(n - begin, size_t{kLanes}));
        for (int lane = 0; lane < count; ++lane) {
            const int64_t cell = anchors[begin + static_cast<size_t>(lane)] - first_anchor;
            cells[lane] = base + cell / map.width * map.stride_height + cell % map.width * map.stride_width;
        }
        for (int side = 0; side < 4; ++side) {
            for (int64_t b = 0; b < bins; ++b)
                for (int lane = 0; lane < count; ++lane)
                    logits[static_cast<size_t>(b * kLanes + lane)] =
                        to_float(cells[lane][(side * bins + b) * map.stride_channel]);
            dfl_expectations(logits.data(), bins, sides[side]);
        }
        for (int lane = 0; lane < count; ++lane) {
            const int64_t cell = anchors[begin + static_cast<size_t>(lane)] - first_anchor;
            boxes[begin + static_cast<size_t>(lane)] =
                distances_to_box(sides[0][lane], sides[1][lane], sides[2][lane], sides[3][lane], cell % map.width,
                                 cell / map.width, level.stride);
        }
    }
}

}  // namespace yolonas::cpu
