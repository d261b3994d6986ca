// Decoding of box logits: the expectation of each side's distribution, around the centre of its grid cell.
#include "../dfl.h"

#include "../ops.h"
#include "parallel.h"

namespace yolonas::cpu {

namespace {

template <typename T>
void decode_rows(const Map* box_logits, const float* strides, int num_levels, int64_t batch, int64_t bins, float* boxes,
                 int threads) {
    int64_t rows = 0, anchors = 0;
    for (int l = 0; l < num_levels; ++l) {
        rows += box_logits[l].height;
        anchors += box_logits[l].height * box_logits[l].width;
    }
    parallel_for(batch * rows, threads, [&](int64_t task) {
        const int64_t image = task / rows;
        int64_t row = task % rows, anchor = 0;
        int l = 0;
        for (; row >= box_logits[l].height; ++l) {
            row -= box_logits[l].height;
            anchor += box_logits[l].height * box_logits[l].width;
        }
        const Map& map = box_logits[l];
        anchor += row * map.width;
        for (int64_t column = 0; column < map.width; ++column, ++anchor) {
            const Box<float> box = decode_box<T>(map, strides[l], bins, image, row, column);
            float* target = boxes + 4 * (image * anchors + anchor);
            target[0] = box.x1;
            target[1] = box.y1;
            target[2] = box.x2;
            target[3] = box.y2;
        }
    });
}

}  // namespace

void dfl_decode(const Map* box_logits, const float* strides, int num_levels, ScalarType type, int64_t batch,
                int64_t bins, float* boxes, int threads) {
    switch (type) {
        case ScalarType::Float32:
            return decode_rows<float>(box_logits, strides, num_levels, batch, bins, boxes, threads);
        case ScalarType::Float16:
            return decode_rows<Half>(box_logits, strides, num_levels, batch, bins, boxes, threads);
        case ScalarType::BFloat16:
            return decode_rows<BFloat16>(box_logits, strides, num_levels, batch, bins, boxes, threads);
    }
}

}  // namespace yolonas::cpu
