// NMS with torchvision's contract: greedy, exact, any number of boxes, memory linear in their number.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../ops.h"
#include "greedy.h"
#include "radix_sort.h"

namespace yolonas::cpu {

namespace {

// Where key(0), ..., key(n - 1) stand in ascending order, equal ones in ascending position.
template <typename Key, typename KeyOf>
std::vector<uint32_t> sorted_positions(int64_t n, const KeyOf& key) {
    std::vector<Keyed<Key>> items(n), spare(n);
    for (int64_t i = 0; i < n; ++i) items[i] = {static_cast<Key>(key(i)), static_cast<uint32_t>(i)};
    radix_sort(items.data(), spare.data(), n);
    std::vector<uint32_t> positions(n);
    for (int64_t i = 0; i < n; ++i) positions[i] = items[i].value;
    return positions;
}

// Ranks grouped by label, ascending within a group.
std::vector<uint32_t> group_by_label(const int64_t* labels, const std::vector<uint32_t>& order) {
    const int64_t n = static_cast<int64_t>(order.size());
    const auto [low, high] = std::minmax_element(labels, labels + n);
    const uint64_t lowest = static_cast<uint64_t>(*low), range = static_cast<uint64_t>(*high) - lowest;
    const auto key = [&](int64_t rank) { return static_cast<uint64_t>(labels[order[rank]]) - lowest; };
    return range >> 32 ? sorted_positions<uint64_t>(n, key) : sorted_positions<uint32_t>(n, key);
}

}  // namespace

template <typename T>
int64_t batched_nms(const T* boxes, const T* scores, const int64_t* labels, int64_t n, T iou_threshold, int64_t* keep) {
    if (n == 0) return 0;
    if (n > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("batched_nms: more than 2^31 - 1 boxes");

    // Descending score, NaN first, as torch sorts; ties in ascending index.
    using Key = decltype(ordered_bits(T()));
    const auto order = sorted_positions<Key>(n, [&](int64_t i) { return ~ordered_bits(scores[i]); });

    Suppressor<T> group;
    const auto add = [&](int64_t rank) {
        const T* box = boxes + 4 * static_cast<int64_t>(order[rank]);
        group.add({box[0], box[1], box[2], box[3]});
    };
    int64_t count = 0;
    if (!labels) {
        for (int64_t rank = 0; rank < n; ++rank) add(rank);
        group.run(iou_threshold, [&](int64_t rank) {
            keep[count++] = order[rank];
            return true;
        });
        return count;
    }

    const auto by_label = group_by_label(labels, order);
    std::vector<uint8_t> kept(n, 0);  // by rank
    for (int64_t begin = 0, end = 0; begin < n; begin = end) {
        const int64_t label = labels[order[by_label[begin]]];
        group.clear();
        for (; end < n && labels[order[by_label[end]]] == label; ++end) add(by_label[end]);
        group.run(iou_threshold, [&](int64_t i) {
            kept[by_label[begin + i]] = 1;
            return true;
        });
    }
    for (int64_t rank = 0; rank < n; ++rank)
        if (kept[rank]) keep[count++] = order[rank];
    return count;
}

template int64_t batched_nms<float>(const float*, const float*, const int64_t*, int64_t, float, int64_t*);
template int64_t batched_nms<double>(const double*, const double*, const int64_t*, int64_t, double, int64_t*);

}  // namespace yolonas::cpu
