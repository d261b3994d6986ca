// NMS with torchvision's contract: greedy, exact, any number of boxes, memory linear in their number.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../ops.h"
#include "greedy.h"

namespace yolonas::cpu {

namespace {

// Descending, NaN first, as torch sorts.
template <typename T>
bool before(T a, T b) {
    return a > b || (a != a && b == b);
}

}  // namespace

template <typename T>
int64_t batched_nms(const T* boxes, const T* scores, const int64_t* labels, int64_t n, T iou_threshold, int64_t* keep) {
    std::vector<int64_t> order(n);  // descending score, ties in ascending index
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return before(scores[a], scores[b]); });

    std::vector<int64_t> by_label(n);  // ranks, grouped by label, ascending within a group
    std::iota(by_label.begin(), by_label.end(), int64_t{0});
    if (labels)
        std::stable_sort(by_label.begin(), by_label.end(),
                         [&](int64_t a, int64_t b) { return labels[order[a]] < labels[order[b]]; });

    std::vector<uint8_t> kept(n, 0);  // by rank
    Suppressor<T> group;
    for (int64_t begin = 0, end = 0; begin < n; begin = end) {
        group.clear();
        for (end = begin; end < n; ++end) {
            const int64_t index = order[by_label[end]];
            if (labels && labels[index] != labels[order[by_label[begin]]]) break;
            group.add({boxes[4 * index], boxes[4 * index + 1], boxes[4 * index + 2], boxes[4 * index + 3]});
        }
        group.run(iou_threshold, [&](int64_t i) {
            kept[by_label[begin + i]] = 1;
            return true;
        });
    }

    int64_t count = 0;
    for (int64_t rank = 0; rank < n; ++rank)
        if (kept[rank]) keep[count++] = order[rank];
    return count;
}

template int64_t batched_nms<float>(const float*, const float*, const int64_t*, int64_t, float, int64_t*);
template int64_t batched_nms<double>(const double*, const double*, const int64_t*, int64_t, double, int64_t*);

}  // namespace yolonas::cpu
