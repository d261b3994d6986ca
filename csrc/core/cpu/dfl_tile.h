// Softmax of many distributions at once, one in each lane of loops that vectorise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../dfl.h"

namespace yolonas::cpu {

// Fewer would be unrolled before they are vectorised. With 17 bins, the logits of as many anchors, their gradients and
// a tile fit into a first cache of 32 KB.
constexpr int kLanes = 32;

// Replaces the logits [bins, kLanes] by exp(x - largest) and writes what Softmax holds of each lane [kLanes]. The
// operations and their order are dfl_softmax's, so the bits are too.
void softmax_lanes(float* values, int64_t bins, float* largest, float* total, float* weighted);
void softmax_lanes(double* values, int64_t bins, double* largest, double* total, double* weighted);

inline bool contiguous(const int64_t* offsets, int lanes) {
    int64_t differs = 0;
    for (int l = 0; l < lanes; ++l) differs |= offsets[l] - offsets[0] - l;
    return differs == 0;
}

// Up to kLanes distributions, transposed to [bins, kLanes]; what unused lanes hold does not matter. In memory those of
// lane l lie at data + offsets[l], `step` elements apart.
template <typename R>
class Tile {
   public:
    explicit Tile(int64_t bins) : bins_(bins), values_(static_cast<size_t>(bins) * kLanes) {}

    template <typename T>
    void load(const T* data, const int64_t* offsets, int lanes, int64_t step) {
        R* values = values_.data();
        if (contiguous(offsets, lanes)) {
            for (int64_t b = 0; b < bins_; ++b)
                for (int l = 0; l < lanes; ++l) values[b * kLanes + l] = to_real(data[offsets[0] + b * step + l]);
        } else {
            for (int l = 0; l < lanes; ++l)
                for (int64_t b = 0; b < bins_; ++b) values[b * kLanes + l] = to_real(data[offsets[l] + b * step]);
        }
    }

    void softmax() { softmax_lanes(values_.data(), bins_, largest, total, weighted); }

    // Replaces each value by function(value, bin, lane).
    template <typename Function>
    void transform(const Function& function) {
        R* values = values_.data();
        for (int64_t b = 0; b < bins_; ++b)
            for (int l = 0; l < kLanes; ++l) values[b * kLanes + l] = function(values[b * kLanes + l], b, l);
    }

    template <typename T>
    void store(T* data, const int64_t* offsets, int lanes, int64_t step) const {
        const R* values = values_.data();
        if (contiguous(offsets, lanes)) {
            for (int64_t b = 0; b < bins_; ++b)
                for (int l = 0; l < lanes; ++l) data[offsets[0] + b * step + l] = from_real<T>(values[b * kLanes + l]);
        } else {
            for (int l = 0; l < lanes; ++l)
                for (int64_t b = 0; b < bins_; ++b) data[offsets[l] + b * step] = from_real<T>(values[b * kLanes + l]);
        }
    }

    R& value(int64_t bin, int lane) { return values_[static_cast<size_t>(bin * kLanes + lane)]; }

    R largest[kLanes], total[kLanes], weighted[kLanes];  // of softmax()

   private:
    int64_t bins_;
    std::vector<R> values_;
};

}  // namespace yolonas::cpu
