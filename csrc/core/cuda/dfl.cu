// Decoding of the box logits of all anchors.
#include "../ops.h"
#include "decode.cuh"
#include "launch.cuh"

namespace yolonas::cuda {

namespace {

// Blocks [B, anchors / kDecodeAnchors].
template <typename T>
__global__ void __launch_bounds__(4 * kDecodeAnchors)
    decode_all(const __grid_constant__ BoxLevels levels, int64_t bins, int64_t anchors, float* boxes) {
    const int64_t blocks = ceil_div(anchors, kDecodeAnchors), image = blockIdx.x / blocks;
    const int64_t anchor = blockIdx.x % blocks * kDecodeAnchors + threadIdx.x;
    const Box<float> box = decode_anchor<T>(levels, bins, image, anchor < anchors ? anchor : -1);
    if (anchor >= anchors || threadIdx.y > 0) return;
    float* target = boxes + 4 * (image * anchors + anchor);
    target[0] = box.x1;
    target[1] = box.y1;
    target[2] = box.x2;
    target[3] = box.y2;
}

}  // namespace

void dfl_decode(const Map* box_logits, const float* strides, int num_levels, ScalarType type, int64_t batch,
                int64_t bins, float* boxes, int device, Stream stream) {
    const Queue queue("dfl_decode", device, stream);
    BoxLevels levels{};
    int64_t anchors = 0;
    for (levels.count = 0; levels.count < num_levels; ++levels.count) {
        const Map& map = levels.maps[levels.count] = box_logits[levels.count];
        levels.strides[levels.count] = strides[levels.count];
        anchors += map.height * map.width;
    }
    const auto run = [&](auto kernel) {
        queue.launch(kernel, batch * ceil_div(anchors, kDecodeAnchors), dim3(kDecodeAnchors, 4), levels, bins, anchors,
                     boxes);
    };
    switch (type) {
        case ScalarType::Float32:
            return run(decode_all<float>);
        case ScalarType::Float16:
            return run(decode_all<Half>);
        case ScalarType::BFloat16:
            return run(decode_all<BFloat16>);
    }
}

}  // namespace yolonas::cuda
