// Decoding of anchors by a block: a thread for each side of each box.
#pragma once

#include "../geometry.h"
#include "../ops.h"
#include "launch.cuh"

namespace yolonas::cuda {

struct BoxLevels {  // by value into the kernels
    Map maps[kMaxLevels];
    float strides[kMaxLevels];
    int count;
};

constexpr int kDecodeAnchors = 64;  // for a block of threads (kDecodeAnchors, 4)

// The box of the anchor of threadIdx.x, to the thread with threadIdx.y == 0; the bits of decode_box. All threads of
// the block call it; those without an anchor give a negative one.
template <typename T>
__device__ Box<float> decode_anchor(const BoxLevels& levels, int64_t bins, int64_t image, int64_t anchor) {
    __shared__ float distances[4][kDecodeAnchors];
    int l = 0;
    while (anchor >= levels.maps[l].height * levels.maps[l].width) {
        anchor -= levels.maps[l].height * levels.maps[l].width;
        ++l;
    }
    const Map& map = levels.maps[l];
    const int64_t row = anchor < 0 ? 0 : anchor / map.width, column = anchor < 0 ? 0 : anchor % map.width;
    if (anchor >= 0) {
        const T* logits = static_cast<const T*>(map.data) + image * map.stride_batch + row * map.stride_height +
                          column * map.stride_width;
        distances[threadIdx.y][threadIdx.x] =
            dfl_expectation(logits + threadIdx.y * bins * map.stride_channel, map.stride_channel, bins);
    }
    __syncthreads();
    if (anchor < 0 || threadIdx.y > 0) return {};
    const auto distance = [&](int side) { return distances[side][threadIdx.x]; };
    return distances_to_box(distance(0), distance(1), distance(2), distance(3), column, row, levels.strides[l]);
}

}  // namespace yolonas::cuda
