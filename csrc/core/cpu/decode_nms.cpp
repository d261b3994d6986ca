// decode_nms on the CPU. Per image: one pass over the class logits keeps those above the cutoff, selection of the best
// pre_nms_top_k, decoding of the survivors' boxes alone, NMS within each class. Threads take whole images.
#include <algorithm>
#include <limits>
#include <vector>

#include "../dfl.h"
#include "../geometry.h"
#include "../ops.h"
#include "greedy.h"
#include "parallel.h"

namespace yolonas::cpu {

namespace {

struct Task {
    const Level* levels;
    int num_levels;
    DecodeNmsOptions options;
    DetectionsOut out;
    float cutoff;
};

// Calls found(i) for each i with row[i * step] >= cutoff. A block is first asked whether it holds any, a loop that
// vectorises: at most a few in a thousand logits pass.
template <typename T, typename Found>
void scan_row(const T* row, int64_t step, int64_t n, float cutoff, const Found& found) {
    constexpr int64_t kBlock = 64;
    int64_t begin = 0;
    if (step == 1)
        for (; begin + kBlock <= n; begin += kBlock) {
            int any = 0;
            for (int64_t i = begin; i < begin + kBlock; ++i) any |= to_float(row[i]) >= cutoff;
            if (any)
                for (int64_t i = begin; i < begin + kBlock; ++i)
                    if (to_float(row[i]) >= cutoff) found(i);
        }
    for (int64_t i = begin; i < n; ++i)
        if (to_float(row[i * step]) >= cutoff) found(i);
}

// Every (anchor, class) above the cutoff. The innermost loop runs over whichever dimension lies contiguous.
template <typename T>
void collect_multi_label(const Task& task, int64_t image, std::vector<uint64_t>& keys) {
    const int64_t classes = task.options.num_classes;
    int64_t first_anchor = 0;
    for (int l = 0; l < task.num_levels; ++l) {
        const Map& map = task.levels[l].class_logits;
        const T* base = static_cast<const T*>(map.data) + image * map.stride_batch;
        const auto add = [&](const T* logit, int64_t anchor, int64_t c) {
            keys.push_back(candidate_key(to_float(*logit), static_cast<uint32_t>(anchor * classes + c)));
        };
        if (map.stride_channel == 1) {
            for (int64_t y = 0; y < map.height; ++y)
                for (int64_t x = 0; x < map.width; ++x) {
                    const T* row = base + y * map.stride_height + x * map.stride_width;
                    scan_row(row, 1, classes, task.cutoff,
                             [&](int64_t c) { add(row + c, first_anchor + y * map.width + x, c); });
                }
        } else {
            // A dense NCHW plane is one long row; otherwise rows are read one by one, with their stride.
            const bool dense = map.stride_width == 1 && map.stride_height == map.width;
            const int64_t rows = dense ? 1 : map.height, length = dense ? map.height * map.width : map.width;
            for (int64_t c = 0; c < classes; ++c)
                for (int64_t y = 0; y < rows; ++y) {
                    const T* row = base + c * map.stride_channel + y * map.stride_height;
                    scan_row(row, map.stride_width, length, task.cutoff,
                             [&](int64_t x) { add(row + x * map.stride_width, first_anchor + y * map.width + x, c); });
                }
        }
        first_anchor += map.height * map.width;
    }
}

// Each anchor's best class, the lowest on a tie, where it is above the cutoff.
template <typename T>
void collect_single_label(const Task& task, int64_t image, std::vector<uint64_t>& keys) {
    const int64_t classes = task.options.num_classes;
    std::vector<float> best;
    std::vector<int32_t> label;
    int64_t first_anchor = 0;
    for (int l = 0; l < task.num_levels; ++l) {
        const Map& map = task.levels[l].class_logits;
        const T* base = static_cast<const T*>(map.data) + image * map.stride_batch;
        best.resize(map.width);
        label.resize(map.width);
        for (int64_t y = 0; y < map.height; ++y) {
            std::fill(best.begin(), best.end(), -std::numeric_limits<float>::infinity());
            std::fill(label.begin(), label.end(), 0);
            for (int64_t c = 0; c < classes; ++c) {
                const T* row = base + c * map.stride_channel + y * map.stride_height;
                for (int64_t x = 0; x < map.width; ++x) {
                    const float logit = to_float(row[x * map.stride_width]);
                    const bool better = logit > best[x];
                    best[x] = better ? logit : best[x];
                    label[x] = better ? static_cast<int32_t>(c) : label[x];
                }
            }
            for (int64_t x = 0; x < map.width; ++x)
                if (best[x] >= task.cutoff) {
                    const int64_t anchor = first_anchor + y * map.width + x;
                    keys.push_back(candidate_key(best[x], static_cast<uint32_t>(anchor * classes + label[x])));
                }
        }
        first_anchor += map.height * map.width;
    }
}

template <typename T>
Box<float> decode_anchor(const Task& task, int64_t image, int64_t anchor) {
    int l = 0;
    for (;; ++l) {
        const int64_t cells = task.levels[l].box_logits.height * task.levels[l].box_logits.width;
        if (anchor < cells) break;
        anchor -= cells;
    }
    const Map& map = task.levels[l].box_logits;
    return decode_box<T>(map, task.levels[l].stride, task.options.bins, image, anchor / map.width, anchor % map.width);
}

// Keeps the best `count` keys, in descending order.
void select(std::vector<uint64_t>& keys, size_t count) {
    if (keys.size() > count) {
        std::nth_element(keys.begin(), keys.begin() + static_cast<int64_t>(count), keys.end(), std::greater<>());
        keys.resize(count);
    }
    std::sort(keys.begin(), keys.end(), std::greater<>());
}

void pad(const Task& task, int64_t image, int64_t count) {
    const int64_t k = task.options.max_detections, first = image * k + count, last = (image + 1) * k;
    std::fill(task.out.boxes + 4 * first, task.out.boxes + 4 * last, 0.0f);
    std::fill(task.out.scores + first, task.out.scores + last, 0.0f);
    std::fill(task.out.labels + first, task.out.labels + last, -1);
    std::fill(task.out.anchors + first, task.out.anchors + last, -1);
    task.out.counts[image] = count;
}

template <typename T>
void decode_nms_image(const Task& task, int64_t image) {
    const DecodeNmsOptions& options = task.options;
    std::vector<uint64_t> keys;
    if (options.multi_label)
        collect_multi_label<T>(task, image, keys);
    else
        collect_single_label<T>(task, image, keys);
    select(keys, static_cast<size_t>(options.pre_nms_top_k));

    // Decode each surviving anchor once, even where several of its classes survive.
    const int64_t n = static_cast<int64_t>(keys.size());
    std::vector<int64_t> by_anchor(n);
    for (int64_t i = 0; i < n; ++i) by_anchor[i] = i;
    const auto anchor_of = [&](int64_t i) { return candidate_index(keys[i]) / options.num_classes; };
    std::sort(by_anchor.begin(), by_anchor.end(), [&](int64_t a, int64_t b) { return anchor_of(a) < anchor_of(b); });
    std::vector<Box<float>> boxes(n);
    for (int64_t i = 0; i < n; ++i)
        boxes[by_anchor[i]] = i > 0 && anchor_of(by_anchor[i]) == anchor_of(by_anchor[i - 1])
                                  ? boxes[by_anchor[i - 1]]
                                  : decode_anchor<T>(task, image, anchor_of(by_anchor[i]));

    // Group the ranks by class: a counting sort, which keeps the order of the keys within a class.
    const int64_t groups = options.class_agnostic ? 1 : options.num_classes;
    const auto class_of = [&](int64_t i) { return candidate_index(keys[i]) % options.num_classes; };
    const auto group_of = [&](int64_t i) { return options.class_agnostic ? 0 : class_of(i); };
    std::vector<int64_t> start(groups + 1, 0), ranks(n);
    for (int64_t i = 0; i < n; ++i) ++start[group_of(i) + 1];
    for (int64_t g = 0; g < groups; ++g) start[g + 1] += start[g];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < n; ++i) ranks[next[group_of(i)]++] = i;

    std::vector<uint8_t> kept(n, 0);
    Suppressor<float> group;
    std::vector<int64_t> members;
    for (int64_t g = 0; g < groups; ++g) {
        group.clear();
        members.clear();
        for (int64_t r = start[g]; r < start[g + 1]; ++r)
            if (is_finite(boxes[ranks[r]])) {  // NaN logits never become boxes
                group.add(boxes[ranks[r]]);
                members.push_back(ranks[r]);
            }
        int64_t left = options.max_detections;  // no class can fill more than the output
        group.run(options.iou_threshold, [&](int64_t i) {
            kept[members[i]] = 1;
            return --left > 0;
        });
    }

    int64_t count = 0;
    for (int64_t i = 0; i < n && count < options.max_detections; ++i) {
        if (!kept[i]) continue;
        const int64_t slot = image * options.max_detections + count++;
        float* box = task.out.boxes + 4 * slot;
        box[0] = boxes[i].x1;
        box[1] = boxes[i].y1;
        box[2] = boxes[i].x2;
        box[3] = boxes[i].y2;
        task.out.scores[slot] = sigmoid(candidate_logit(keys[i]));
        task.out.labels[slot] = class_of(i);
        task.out.anchors[slot] = anchor_of(i);
    }
    pad(task, image, count);
}

}  // namespace

void decode_nms(const Level* levels, int num_levels, ScalarType type, const DecodeNmsOptions& options,
                const DetectionsOut& out, int threads) {
    const Task task{levels, num_levels, options, out, cutoff_logit(options.score_threshold)};
    parallel_for(options.batch, threads, [&](int64_t image) {
        switch (type) {
            case ScalarType::Float32:
                return decode_nms_image<float>(task, image);
            case ScalarType::Float16:
                return decode_nms_image<Half>(task, image);
            case ScalarType::BFloat16:
                return decode_nms_image<BFloat16>(task, image);
        }
    });
}

}  // namespace yolonas::cpu
