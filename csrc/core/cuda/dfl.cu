// Decoding of the box logits of all anchors: a thread for each side of each box.
#include "../dfl.h"
#include "../ops.h"
#include "launch.cuh"

namespace yolonas::cuda {

namespace {

constexpr int kThreads = 256;

struct Maps {  // by value into the kernels
    Map maps[kMaxLevels];
    float strides[kMaxLevels];
    int64_t anchors;  // of an image
};

Maps to_maps(const Map* maps, const float* strides, int num_levels) {
    Maps result{};
    for (int l = 0; l < num_levels; ++l) {
        result.maps[l] = maps[l];
        result.strides[l] = strides[l];
        result.anchors += maps[l].height * maps[l].width;
    }
    return result;
}

// A side of an anchor's box. Neighbouring threads take neighbouring anchors, or the four sides of one where the
// channels of an anchor lie together, so that a warp's loads do.
struct Side {
    int level, side;
    int64_t image, anchor, row, column;

    __device__ Side(const Maps& all, int64_t index) : level(0) {
        image = index / (4 * all.anchors);
        index -= image * 4 * all.anchors;
        anchor = 0;  // that the level begins with
        int64_t cells = all.maps[0].height * all.maps[0].width;
        while (index >= 4 * cells) {
            index -= 4 * cells;
            anchor += cells;
            ++level;
            cells = all.maps[level].height * all.maps[level].width;
        }
        const Map& map = all.maps[level];
        const bool together = map.stride_channel < map.stride_width;
        side = static_cast<int>(together ? index % 4 : index / cells);
        const int64_t cell = together ? index / 4 : index % cells;
        row = cell / map.width;
        column = cell % map.width;
        anchor += cell;
    }

    __device__ int64_t offset(const Map& map, int64_t bins) const {
        return image * map.stride_batch + side * bins * map.stride_channel + row * map.stride_height +
               column * map.stride_width;
    }
    __device__ int64_t box(int64_t anchors) const { return 4 * (image * anchors + anchor) + side; }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    decode(const __grid_constant__ Maps all, int64_t sides, int64_t bins, Real<T>* boxes) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= sides) return;
    const Side side(all, index);
    const Map& map = all.maps[side.level];
    const auto softmax =
        dfl_softmax(static_cast<const T*>(map.data) + side.offset(map, bins), map.stride_channel, bins);
    boxes[side.box(all.anchors)] = side_to_pixels(side.side, softmax.weighted / softmax.total,
                                                  side.side & 1 ? side.row : side.column, all.strides[side.level]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    decode_backward(const Real<T>* gradient, const __grid_constant__ Maps all, const __grid_constant__ Maps out,
                    int64_t sides, int64_t bins) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= sides) return;
    const Side side(all, index);
    const Map &map = all.maps[side.level], &target_map = out.maps[side.level];
    const T* logits = static_cast<const T*>(map.data) + side.offset(map, bins);
    T* target = static_cast<T*>(const_cast<void*>(target_map.data)) + side.offset(target_map, bins);
    const Real<T> by_pixels = gradient[side.box(all.anchors)];
    if (by_pixels == Real<T>(0)) return;  // as of background anchors: their logits need not be read
    const auto softmax = dfl_softmax(logits, map.stride_channel, bins);
    const Real<T> expectation = softmax.weighted / softmax.total,
                  by_distance = distance_gradient(side.side, by_pixels, all.strides[side.level]),
                  scale = by_distance / softmax.total;
    for (int64_t b = 0; b < bins; ++b) {
        const Real<T> e = exp_nonpositive(to_real(logits[b * map.stride_channel]) - softmax.largest);
        target[b * target_map.stride_channel] = from_real<T>(expectation_gradient(e, scale, b, expectation));
    }
}

}  // namespace

void dfl_decode(const Map* box_logits, const float* strides, int num_levels, ScalarType type, int64_t batch,
                int64_t bins, void* boxes, int device, Stream stream) {
    const Queue queue("dfl_decode", device, stream);
    const Maps all = to_maps(box_logits, strides, num_levels);
    const int64_t sides = 4 * batch * all.anchors;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        queue.launch(decode<T>, ceil_div(sides, kThreads), kThreads, all, sides, bins, static_cast<Real<T>*>(boxes));
    });
}

void dfl_decode_backward(const void* gradient, const Map* box_logits, const float* strides, int num_levels,
                         ScalarType type, int64_t batch, int64_t bins, const Map* logit_gradients, int device,
                         Stream stream) {
    const Queue queue("dfl_decode_backward", device, stream);
    const Maps all = to_maps(box_logits, strides, num_levels), out = to_maps(logit_gradients, strides, num_levels);
    const int64_t sides = 4 * batch * all.anchors;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        queue.launch(decode_backward<T>, ceil_div(sides, kThreads), kThreads, static_cast<const Real<T>*>(gradient),
                     all, out, sides, bins);
    });
}

}  // namespace yolonas::cuda
