// An index of boxes: rows of equal size by the centre's y, ordered by the centre's x within a row. A box is compared
// with those alone whose centres lie near enough, so n boxes that are spread out cost far fewer than n^2 comparisons.
//
// Left out are only pairs that cannot exceed the threshold t >= 0, so results stay exact:
// - Without an intersection the IoU is 0 or NaN.
// - The IoU is at most that of the intervals along either axis; for intervals of lengths a and b that is at most t
// where
//   their centres are (1 / t - 1) / 2 * a or more apart, whatever b.
// - Centres and lengths are rounded, and so is the IoU itself: all limits are relaxed by kSlop, many times as much.
// - A box of no, negative, infinite or NaN extent or area has no IoU above 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../geometry.h"
#include "columns.h"
#include "radix_sort.h"

namespace yolonas::cpu {

template <typename T>
class Neighbours {
   public:
    // False where boxes are so small that their areas underflow: the limits above hold for relative errors only.
    bool build(const Columns<T>& boxes, int64_t n) {
        slot_.assign(n, kNone);
        items_.resize(n);
        spare_.resize(n);
        int64_t count = 0;
        for (int64_t i = 0; i < n; ++i) {
            const Box<T> box = boxes.box(i);
            const T width = box.x2 - box.x1, height = box.y2 - box.y1, area = boxes.area[i];
            if (!(width > 0 && height > 0 && area > 0 && area <= std::numeric_limits<T>::max())) continue;
            if (width < kSmallest || height < kSmallest || area < kSmallest) return false;
            items_[count++] = {ordered_bits(centre(box.y1, box.y2)), static_cast<uint32_t>(i)};
        }
        radix_sort(items_.data(), spare_.data(), count);

        sorted_.resize(count);
        centre_x_.resize(count);
        rows_.clear();
        const int64_t rows = static_cast<int64_t>(std::sqrt(static_cast<double>(count)) / 10) + 1;  // measured
        for (int64_t r = 0; r < rows; ++r) add_row(boxes, r * count / rows, (r + 1) * count / rows);
        return true;
    }

    T highest_iou(int64_t i) const {
        return slot_[i] == kNone ? -std::numeric_limits<T>::infinity() : sorted_.highest_iou[slot_[i]];
    }

    // Compares box i, which is kept, with every box that it could suppress.
    void compare(int64_t i, Box<T> kept, T kept_area, T iou_threshold) {
        if (slot_[i] == kNone) return;
        const T x = centre(kept.x1, kept.x2), y = centre(kept.y1, kept.y2);
        for (const Row& row : rows_) {
            const T reach_y = reach(kept.y2 - kept.y1, row.tallest, y, iou_threshold);
            if (y + reach_y < row.first_y || y - reach_y > row.last_y) continue;
            const T reach_x = reach(kept.x2 - kept.x1, row.widest, x, iou_threshold);
            const T *begin = &centre_x_[row.begin], *end = begin + (row.end - row.begin);
            const T* first = std::lower_bound(begin, end, x - reach_x);
            const T* last = std::upper_bound(first, end, x + reach_x);
            sorted_.compare(kept, kept_area, row.begin + (first - begin), row.begin + (last - begin));
        }
    }

   private:
    static constexpr uint32_t kNone = ~uint32_t{0};
    static constexpr T kSlop = 64 * std::numeric_limits<T>::epsilon();
    static constexpr T kSmallest = T(1e-30);

    struct Row {
        int64_t begin, end;
        T first_y, last_y;  // of the centres
        T widest, tallest;
    };

    static T centre(T low, T high) { return low + (high - low) / 2; }

    // How far from an interval around `centre` the centre of another one, at most `longest` long, may be.
    static T reach(T length, T longest, T centre, T iou_threshold) {
        T most = (length + longest) / 2;
        if (iou_threshold > T(1e-3))
            most = std::min(most, length * std::max(T(0), (1 / (iou_threshold * (1 - kSlop)) - 1) / 2));
        return most * (1 + kSlop) + kSlop * (length + std::fabs(centre));
    }

    void add_row(const Columns<T>& boxes, int64_t begin, int64_t end) {
        if (begin == end) return;
        const auto box_at = [&](int64_t slot) { return boxes.box(items_[slot].value); };
        const Box<T> first = box_at(begin), last = box_at(end - 1);
        Row row{begin, end, centre(first.y1, first.y2), centre(last.y1, last.y2), 0, 0};
        for (int64_t slot = begin; slot < end; ++slot) {
            const Box<T> box = box_at(slot);
            items_[slot].key = ordered_bits(centre(box.x1, box.x2));
        }
        radix_sort(&items_[begin], &spare_[begin], end - begin);
        for (int64_t slot = begin; slot < end; ++slot) {
            const Box<T> box = box_at(slot);
            slot_[items_[slot].value] = static_cast<uint32_t>(slot);
            sorted_.set(slot, box, boxes.area[items_[slot].value]);
            centre_x_[slot] = centre(box.x1, box.x2);
            row.widest = std::max(row.widest, box.x2 - box.x1);
            row.tallest = std::max(row.tallest, box.y2 - box.y1);
        }
        rows_.push_back(row);
    }

    std::vector<uint32_t> slot_;  // [n] where a box stands in the columns below; kNone: it overlaps nothing
    Columns<T> sorted_;
    std::vector<T> centre_x_;
    std::vector<Row> rows_;
    std::vector<Keyed<decltype(ordered_bits(T()))>> items_, spare_;
};

}  // namespace yolonas::cpu
