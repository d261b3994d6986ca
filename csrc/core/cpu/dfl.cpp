// Decoding of box logits: the expectation of each side's distribution, around the centre of its grid cell.
#include "../dfl.h"

#include <algorithm>

#include "../ops.h"
#include "dfl_tile.h"
#include "parallel.h"

namespace yolonas::cpu {

namespace {

constexpr int64_t kTaskAnchors = 32 * kLanes;  // some 100 us of work, five times what a thread costs

// Up to kLanes anchors of one level, in the order of the images, rows and columns.
struct Anchors {
    int lanes;
    int64_t offsets[kLanes];   // of the anchor in the map, in elements
    int64_t cells[2][kLanes];  // column, row
    int64_t boxes[kLanes];     // index in the boxes [B * A]

    // From anchor `first` of the map's [B, h, w] on; the level begins at anchor `level_begin` of an image's `all`.
    Anchors(const Map& map, int64_t batch, int64_t first, int64_t level_begin, int64_t all) {
        const int64_t size = map.height * map.width;
        lanes = static_cast<int>(std::min<int64_t>(kLanes, batch * size - first));
        int64_t image = first / size, row = first % size / map.width, column = first % map.width;
        for (int l = 0; l < lanes; ++l) {
            cells[0][l] = column;
            cells[1][l] = row;
            offsets[l] = image * map.stride_batch + row * map.stride_height + column * map.stride_width;
            boxes[l] = image * all + level_begin + row * map.width + column;
            if (++column == map.width) {
                column = 0;
                if (++row == map.height) row = 0, ++image;
            }
        }
    }
};

// Calls body(level, first, level_begin, all, tile) for every kLanes anchors, with the arguments of `Anchors`.
template <typename T, typename Body>
void for_all_anchors(const Map* maps, int num_levels, int64_t batch, int64_t bins, int threads, const Body& body) {
    int64_t all = 0, tasks = 0, level_tasks[kMaxLevels];
    for (int l = 0; l < num_levels; ++l) {
        all += maps[l].height * maps[l].width;
        level_tasks[l] = (batch * maps[l].height * maps[l].width + kTaskAnchors - 1) / kTaskAnchors;
        tasks += level_tasks[l];
    }
    parallel_for(tasks, threads, [&](int64_t task) {
        int level = 0;
        int64_t level_begin = 0;
        for (; task >= level_tasks[level]; ++level) {
            task -= level_tasks[level];
            level_begin += maps[level].height * maps[level].width;
        }
        const int64_t anchors = batch * maps[level].height * maps[level].width;
        const int64_t end = std::min(anchors, (task + 1) * kTaskAnchors);
        Tile<Real<T>> tile(bins);
        for (int64_t first = task * kTaskAnchors; first < end; first += kLanes)
            body(level, first, level_begin, all, tile);
    });
}

template <typename T>
void decode(const Map& map, const Anchors& anchors, float stride, Tile<Real<T>>& tile, int64_t bins, Real<T>* boxes) {
    for (int side = 0; side < 4; ++side) {
        tile.load(static_cast<const T*>(map.data) + side * bins * map.stride_channel, anchors.offsets, anchors.lanes,
                  map.stride_channel);
        tile.softmax();
        for (int l = 0; l < anchors.lanes; ++l)
            boxes[4 * anchors.boxes[l] + side] =
                side_to_pixels(side, tile.weighted[l] / tile.total[l], anchors.cells[side & 1][l], stride);
    }
}

template <typename T>
void decode_backward(const Real<T>* gradient, const Map& map, const Anchors& from, float stride, Tile<Real<T>>& tile,
                     int64_t bins, const Map& out, const Anchors& to) {
    for (int side = 0; side < 4; ++side) {
        int64_t from_offsets[kLanes], to_offsets[kLanes];
        Real<T> scale[kLanes], expectation[kLanes];
        int lanes = 0;
        for (int l = 0; l < from.lanes; ++l) {  // of background anchors it is 0: their logits need not be read
            from_offsets[lanes] = from.offsets[l];
            to_offsets[lanes] = to.offsets[l];
            scale[lanes] = distance_gradient(side, gradient[4 * from.boxes[l] + side], stride);
            lanes += scale[lanes] != 0;
        }
        T* target = static_cast<T*>(const_cast<void*>(out.data)) + side * bins * out.stride_channel;
        if (lanes < from.lanes) store_zeros(target, to.offsets, from.lanes, out.stride_channel, bins);
        if (lanes == 0) continue;
        tile.load(static_cast<const T*>(map.data) + side * bins * map.stride_channel, from_offsets, lanes,
                  map.stride_channel);
        tile.softmax();
        for (int l = 0; l < lanes; ++l) {
            expectation[l] = tile.weighted[l] / tile.total[l];
            scale[l] = scale[l] / tile.total[l];
        }
        tile.transform(
            [&](Real<T> e, int64_t bin, int l) { return expectation_gradient(e, scale[l], bin, expectation[l]); });
        tile.store(target, to_offsets, lanes, out.stride_channel);
    }
}

}  // namespace

void dfl_decode(const Map* box_logits, const float* strides, int num_levels, ScalarType type, int64_t batch,
                int64_t bins, void* boxes, int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_all_anchors<T>(box_logits, num_levels, batch, bins, threads,
                           [&](int level, int64_t first, int64_t level_begin, int64_t all, Tile<Real<T>>& tile) {
                               const Anchors anchors(box_logits[level], batch, first, level_begin, all);
                               decode<T>(box_logits[level], anchors, strides[level], tile, bins,
                                         static_cast<Real<T>*>(boxes));
                           });
    });
}

void dfl_decode_backward(const void* gradient, const Map* box_logits, const float* strides, int num_levels,
                         ScalarType type, int64_t batch, int64_t bins, const Map* logit_gradients, int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_all_anchors<T>(box_logits, num_levels, batch, bins, threads,
                           [&](int level, int64_t first, int64_t level_begin, int64_t all, Tile<Real<T>>& tile) {
                               const Map &from = box_logits[level], &to = logit_gradients[level];
                               decode_backward<T>(static_cast<const Real<T>*>(gradient), from,
                                                  Anchors(from, batch, first, level_begin, all), strides[level], tile,
                                                  bins, to, Anchors(to, batch, first, level_begin, all));
                           });
    });
}

}  // namespace yolonas::cpu
