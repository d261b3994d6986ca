// Greedy suppression of one class of any size.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../geometry.h"
#include "columns.h"
#include "neighbours.h"

namespace yolonas::cpu {

// Boxes of one class in descending order. A kept box is compared with all later ones in one vectorised loop. In a large
// group the first kept boxes, which in a crowd remove most others, are followed by an index of what is left.
template <typename T>
class Suppressor {
   public:
    void clear() { size_ = 0; }

    void add(Box<T> box) {
        if (size_ == static_cast<int64_t>(rank_.size())) {
            rank_.resize(2 * size_ + 64);
            boxes_.resize(2 * size_ + 64);
        }
        rank_[size_] = static_cast<uint32_t>(size_);
        boxes_.set(size_++, box, area(box));
    }

    // Calls keep(i) for each kept box in order; keep returns false to stop. Uses up the group: clear() comes next.
    template <typename Keep>
    void run(T iou_threshold, const Keep& keep) {
        // The index leaves out pairs without an intersection, which matters only where IoU = 0 suppresses.
        bool indexable = iou_threshold >= 0;
        for (int64_t i = 0, kept = 0; i < size_; ++i) {
            if (boxes_.highest_iou[i] > iou_threshold) continue;
            if (kept == kScans && size_ - i >= kLarge) {
                remove_suppressed(i, iou_threshold);
                i = kept = 0;
                if (indexable && size_ >= kLarge) {
                    indexable = neighbours_.build(boxes_, size_);
                    if (indexable) return run_indexed(iou_threshold, keep);
                }
            }
            if (!keep(static_cast<int64_t>(rank_[i]))) return;
            boxes_.compare(boxes_.box(i), boxes_.area[i], i + 1, size_);
            ++kept;
        }
    }

   private:
    static constexpr int64_t kScans = 16, kLarge = 256;  // measured: building an index costs about 16 scans

    void remove_suppressed(int64_t first, T iou_threshold) {
        int64_t left = 0;
        for (int64_t i = first; i < size_; ++i) {
            if (boxes_.highest_iou[i] > iou_threshold) continue;
            rank_[left] = rank_[i];
            boxes_.set(left++, boxes_.box(i), boxes_.area[i]);
        }
        size_ = left;
    }

    template <typename Keep>
    void run_indexed(T iou_threshold, const Keep& keep) {
        for (int64_t i = 0; i < size_; ++i) {
            if (neighbours_.highest_iou(i) > iou_threshold) continue;
            if (!keep(static_cast<int64_t>(rank_[i]))) return;
            neighbours_.compare(i, boxes_.box(i), boxes_.area[i], iou_threshold);
        }
    }

    int64_t size_ = 0;
    std::vector<uint32_t> rank_;  // as added; of the boxes that are left
    Columns<T> boxes_;
    Neighbours<T> neighbours_;
};

}  // namespace yolonas::cpu
