// Boxes as structure of arrays, so that comparing one box with many vectorises. With the vectors that any x86-64 has:
// AVX2 or AVX-512 for this loop would make nms in float32 1.0 to 1.3 times as fast, too little for run-time dispatch.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../geometry.h"

namespace yolonas::cpu {

template <typename T>
struct Columns {
    std::vector<T> x1, y1, x2, y2, area;
    std::vector<T> highest_iou;  // with any box compared so far; a maximum costs less than a flag of the same width

    void resize(int64_t n) {
        for (auto* column : {&x1, &y1, &x2, &y2, &area, &highest_iou}) column->resize(n + kUnroll);
    }

    void set(int64_t i, Box<T> box, T box_area) {
        x1[i] = box.x1;
        y1[i] = box.y1;
        x2[i] = box.x2;
        y2[i] = box.y2;
        area[i] = box_area;
        highest_iou[i] = -std::numeric_limits<T>::infinity();
    }

    Box<T> box(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }

    // Compares `kept` with boxes [begin, end) and up to kUnroll - 1 after them, which therefore must be ones that it
    // may suppress as well, or none.
    void compare(Box<T> kept, T kept_area, int64_t begin, int64_t end) {
        raise(kept, kept_area, &x1[begin], &y1[begin], &x2[begin], &y2[begin], &area[begin], &highest_iou[begin],
              (end - begin + kUnroll - 1) / kUnroll * kUnroll);
    }

   private:
    static constexpr int64_t kUnroll = 8;  // no scalar remainder in runs that are mostly short

    static void raise(Box<T> kept, T kept_area, const T* x1, const T* y1, const T* x2, const T* y2, const T* area,
                      T* __restrict highest_iou, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const T value = iou(kept, kept_area, Box<T>{x1[i], y1[i], x2[i], y2[i]}, area[i]);
            highest_iou[i] = value > highest_iou[i] ? value : highest_iou[i];
        }
    }
};

}  // namespace yolonas::cpu
