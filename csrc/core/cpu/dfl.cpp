// Decoding of box logits: the expectation of each side's distribution, around the centre of its grid cell.
#include "../dfl.h"

#include <algorithm>

#include "../ops.h"
#include "dfl_tile.h"
#include "parallel.h"

namespace yolonas::cpu {

namespace {

constexpr int64_t kTaskAnchors = 32 * kLanes;  // some 100 us of work, five times what a thread costs

// Some anchors of one level, in the order of the images, rows and columns.
struct Anchors {
    int level;
    int64_t first, end;        // of all [B, h, w] of the level
    int64_t level_begin, all;  // of an image: anchors in the levels before, anchors in all levels

    // Calls body(image, row, column, box) for each, box being its index among all [B * A].
    template <typename Body>
    void each(const Map& map, const Body& body) const {
        const int64_t size = map.height * map.width;
        int64_t image = first / size, row = first % size / map.width, column = first % map.width;
        int64_t box = image * all + level_begin + row * map.width + column;
        for (int64_t i = first; i < end; ++i, ++box) {
            body(image, row, column, box);
            if (++column == map.width) {
                column = 0;
                if (++row == map.height) row = 0, ++image, box += all - size;
            }
        }
    }
};

int64_t offset(const Map& map, int64_t image, int64_t row, int64_t column) {
    return image * map.stride_batch + row * map.stride_height + column * map.stride_width;
}

// Calls body(anchors) for up to kTaskAnchors at a time, until it has seen all.
template <typename Body>
void for_all_anchors(const Map* maps, int num_levels, int64_t batch, int threads, const Body& body) {
    int64_t all = 0, tasks = 0, level_tasks[kMaxLevels];
    for (int l = 0; l < num_levels; ++l) {
        all += maps[l].height * maps[l].width;
        level_tasks[l] = (batch * maps[l].height * maps[l].width + kTaskAnchors - 1) / kTaskAnchors;
        tasks += level_tasks[l];
    }
    parallel_for(tasks, threads, [&](int64_t task) {
        Anchors anchors{0, 0, 0, 0, all};
        for (; task >= level_tasks[anchors.level]; ++anchors.level) {
            task -= level_tasks[anchors.level];
            anchors.level_begin += maps[anchors.level].height * maps[anchors.level].width;
        }
        const int64_t count = batch * maps[anchors.level].height * maps[anchors.level].width;
        anchors.first = task * kTaskAnchors;
        anchors.end = std::min(count, anchors.first + kTaskAnchors);
        body(anchors);
    });
}

template <typename T>
void decode(const Map& map, const Anchors& anchors, float stride, int64_t bins, Real<T>* boxes) {
    Tile<Real<T>> tile(bins);
    int lanes = 0;
    int64_t offsets[kLanes], cells[2][kLanes], box_of[kLanes];
    const auto flush = [&] {
        for (int side = 0; side < 4; ++side) {
            tile.load(static_cast<const T*>(map.data) + side * bins * map.stride_channel, offsets, lanes,
                      map.stride_channel);
            tile.softmax();
            for (int l = 0; l < lanes; ++l)
                boxes[4 * box_of[l] + side] =
                    side_to_pixels(side, tile.weighted[l] / tile.total[l], cells[side & 1][l], stride);
        }
        lanes = 0;
    };
    anchors.each(map, [&](int64_t image, int64_t row, int64_t column, int64_t box) {
        offsets[lanes] = offset(map, image, row, column);
        cells[0][lanes] = column;
        cells[1][lanes] = row;
        box_of[lanes] = box;
        if (++lanes == kLanes) flush();
    });
    if (lanes > 0) flush();
}

template <typename T>
void decode_backward(const Real<T>* gradient, const Map& map, const Anchors& anchors, float stride, int64_t bins,
                     const Map& out) {
    Tile<Real<T>> tile(bins);
    int lanes = 0;
    int64_t from[kLanes], to[kLanes];
    Real<T> scale[kLanes], expectation[kLanes];
    const auto flush = [&] {
        tile.load(static_cast<const T*>(map.data), from, lanes, map.stride_channel);
        tile.softmax();
        for (int l = 0; l < lanes; ++l) {
            expectation[l] = tile.weighted[l] / tile.total[l];
            scale[l] = scale[l] / tile.total[l];
        }
        tile.transform(
            [&](Real<T> e, int64_t bin, int l) { return expectation_gradient(e, scale[l], bin, expectation[l]); });
        tile.store(static_cast<T*>(const_cast<void*>(out.data)), to, lanes, out.stride_channel);
        lanes = 0;
    };
    // Background anchors have a gradient of 0: their logits need not be read.
    const auto add = [&](int side, int64_t image, int64_t row, int64_t column, int64_t box) {
        if (gradient[4 * box + side] == 0) return;
        scale[lanes] = distance_gradient(side, gradient[4 * box + side], stride);
        from[lanes] = offset(map, image, row, column) + side * bins * map.stride_channel;
        to[lanes] = offset(out, image, row, column) + side * bins * out.stride_channel;
        if (++lanes == kLanes) flush();
    };
    if (map.stride_channel < map.stride_width) {  // an anchor's channels lie together
        anchors.each(map, [&](int64_t image, int64_t row, int64_t column, int64_t box) {
            for (int side = 0; side < 4; ++side) add(side, image, row, column, box);
        });
    } else {
        for (int side = 0; side < 4; ++side)
            anchors.each(map, [&](int64_t image, int64_t row, int64_t column, int64_t box) {
                add(side, image, row, column, box);
            });
    }
    if (lanes > 0) flush();
}

}  // namespace

void dfl_decode(const Map* box_logits, const float* strides, int num_levels, ScalarType type, int64_t batch,
                int64_t bins, void* boxes, int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_all_anchors(box_logits, num_levels, batch, threads, [&](const Anchors& anchors) {
            decode<T>(box_logits[anchors.level], anchors, strides[anchors.level], bins, static_cast<Real<T>*>(boxes));
        });
    });
}

void dfl_decode_backward(const void* gradient, const Map* box_logits, const float* strides, int num_levels,
                         ScalarType type, int64_t batch, int64_t bins, const Map* logit_gradients, int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_all_anchors(box_logits, num_levels, batch, threads, [&](const Anchors& anchors) {
            decode_backward<T>(static_cast<const Real<T>*>(gradient), box_logits[anchors.level], anchors,
                               strides[anchors.level], bins, logit_gradients[anchors.level]);
        });
    });
}

}  // namespace yolonas::cpu
