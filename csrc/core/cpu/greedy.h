// Greedy suppression of one class: shared by decode_nms and nms.
#pragma once

#include <cstdint>
#include <vector>

#include "../geometry.h"

namespace yolonas::cpu {

// Boxes of one class in descending order, as structure of arrays so that the inner loop vectorises.
template <typename T>
class Suppressor {
   public:
    void clear() {
        for (auto* column : {&x1_, &y1_, &x2_, &y2_, &area_}) column->clear();
    }

    void add(Box<T> box) {
        x1_.push_back(box.x1);
        y1_.push_back(box.y1);
        x2_.push_back(box.x2);
        y2_.push_back(box.y2);
        area_.push_back(area(box));
    }

    // Calls keep(i) for each kept box in order; keep returns false to stop.
    template <typename Keep>
    void run(T iou_threshold, const Keep& keep) {
        const int64_t n = static_cast<int64_t>(x1_.size());
        dead_.assign(n, 0);
        for (int64_t i = 0; i < n; ++i) {
            if (dead_[i]) continue;
            if (!keep(i)) return;
            const Box<T> kept{x1_[i], y1_[i], x2_[i], y2_[i]};
            const T kept_area = area_[i];
            for (int64_t j = i + 1; j < n; ++j)
                dead_[j] |= overlaps(kept, kept_area, Box<T>{x1_[j], y1_[j], x2_[j], y2_[j]}, area_[j], iou_threshold);
        }
    }

   private:
    std::vector<T> x1_, y1_, x2_, y2_, area_;
    std::vector<uint8_t> dead_;
};

}  // namespace yolonas::cpu
