#include "dfl_tile.h"

#include "dispatch.h"

namespace yolonas::cpu {

namespace {

template <typename R>
inline void softmax(R* __restrict values, int64_t bins, R* __restrict largest, R* __restrict total,
                    R* __restrict weighted) {
    const R infinity = bit_cast<float>(0x7f800000u), nan = bit_cast<float>(0x7fc00000u);
    R valid[kLanes];  // NaN where a logit is NaN or +inf
    for (int l = 0; l < kLanes; ++l) {
        largest[l] = -infinity;
        valid[l] = total[l] = weighted[l] = 0;
    }
    for (int64_t b = 0; b < bins; ++b)
        for (int l = 0; l < kLanes; ++l) {
            const R x = values[b * kLanes + l];
            valid[l] = x < infinity ? valid[l] : nan;
            largest[l] = x > largest[l] ? x : largest[l];
        }
    for (int l = 0; l < kLanes; ++l) largest[l] = largest[l] != -infinity ? largest[l] + valid[l] : nan;
    for (int64_t b = 0; b < bins; ++b) {
        const R bin = static_cast<R>(b);
        for (int l = 0; l < kLanes; ++l) {
            const R e = exp_nonpositive(values[b * kLanes + l] - largest[l]);
            values[b * kLanes + l] = e;
            total[l] += e;
            weighted[l] += e * bin;
        }
    }
}

}  // namespace

YOLONAS_DISPATCH void softmax_lanes(float* values, int64_t bins, float* largest, float* total, float* weighted) {
    softmax(values, bins, largest, total, weighted);
}

void softmax_lanes(double* values, int64_t bins, double* largest, double* total, double* weighted) {
    softmax(values, bins, largest, total, weighted);
}

}  // namespace yolonas::cpu
