// decode_nms on the CPU. Per image: one pass over the class logits finds the candidates, the best pre_nms_top_k are
// sorted, the boxes of their anchors alone are decoded, and NMS compares each with those already kept of its class.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../dfl.h"
#include "../geometry.h"
#include "../ops.h"
#include "candidates.h"
#include "columns.h"
#include "dfl_tile.h"
#include "parallel.h"
#include "radix_sort.h"

namespace yolonas::cpu {

namespace {

struct Task {
    const Level* levels;
    int num_levels;
    DecodeNmsOptions options;
    DetectionsOut out;
    float cutoff;
    int64_t anchors;  // of an image
};

// Adds the time since the last end() to a stage; reads no clock without times.
class Stopwatch {
   public:
    explicit Stopwatch(StageTimes* times) : times_(times) {
        if (times_) last_ = Clock::now();
    }
    void end(double StageTimes::* stage) {
        if (!times_) return;
        const Clock::time_point now = Clock::now();
        times_->*stage += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

   private:
    using Clock = std::chrono::steady_clock;
    StageTimes* times_;
    Clock::time_point last_;
};

// Scans part `part` of `parts` of an image's class maps.
template <typename T, typename Keys>
void scan(const Task& task, int64_t image, int64_t part, int64_t parts, Keys& keys) {
    if (task.cutoff != task.cutoff) return;  // no score exceeds the threshold
    int64_t first_anchor = 0;
    for (int l = 0; l < task.num_levels; ++l) {
        const Map& map = task.levels[l].class_logits;
        scan_map<T>(map, task.options.num_classes, image, first_anchor, part, parts, keys);
        first_anchor += map.height * map.width;
    }
}

void sort_descending(std::vector<uint64_t>& keys) {
    const auto n = static_cast<int64_t>(keys.size());
    std::vector<Keyed<uint64_t>> items(keys.size()), spare(keys.size());
    for (int64_t i = 0; i < n; ++i) items[i] = {~keys[i], 0};  // unique, so no value has to break a tie
    radix_sort(items.data(), spare.data(), n);
    for (int64_t i = 0; i < n; ++i) keys[i] = ~items[i].key;
}

bool any_overlaps(const Columns<float>& kept, int64_t begin, int64_t end, Box<float> box, float iou_threshold) {
    constexpr int64_t kBlock = 32;
    const float own_area = area(box);
    for (; begin < end; begin += kBlock) {
        const int64_t stop = std::min(end, begin + kBlock);
        int any = 0;
        for (int64_t i = begin; i < stop; ++i) any |= overlaps(kept.box(i), kept.area[i], box, own_area, iou_threshold);
        if (any) return true;
    }
    return false;
}

// Boxes of `n` anchors of a level whose first one is `first_anchor`.
template <typename T>
void decode_level(const Level& level, int64_t bins, int64_t image, int64_t first_anchor, const uint32_t* anchors,
                  int64_t n, Box<float>* boxes) {
    const Map& map = level.box_logits;
    const T* base = static_cast<const T*>(map.data) + image * map.stride_batch;
    Tile<float> tile(bins);
    for (int64_t begin = 0; begin < n; begin += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, n - begin));
        int64_t rows[kLanes], columns[kLanes], offsets[kLanes];
        float distances[4][kLanes];
        for (int l = 0; l < lanes; ++l) {
            const int64_t cell = anchors[begin + l] - first_anchor;
            rows[l] = cell / map.width;
            columns[l] = cell % map.width;
            offsets[l] = rows[l] * map.stride_height + columns[l] * map.stride_width;
        }
        for (int side = 0; side < 4; ++side) {
            tile.load(base + side * bins * map.stride_channel, offsets, lanes, map.stride_channel);
            tile.softmax();
            for (int l = 0; l < lanes; ++l) distances[side][l] = tile.weighted[l] / tile.total[l];
        }
        for (int l = 0; l < lanes; ++l)
            boxes[begin + l] = distances_to_box(distances[0][l], distances[1][l], distances[2][l], distances[3][l],
                                                columns[l], rows[l], level.stride);
    }
}

// The boxes of the keys' anchors: boxes[slots[anchor]].
struct AnchorBoxes {
    std::vector<uint32_t> slots;
    std::vector<Box<float>> boxes;
};

// Decodes each anchor once, even where several of its classes survive, in the order of memory.
template <typename T>
AnchorBoxes decode(const Task& task, int64_t image, const std::vector<uint64_t>& keys) {
    const auto classes = static_cast<uint32_t>(task.options.num_classes);
    std::vector<uint64_t> marks(static_cast<size_t>(task.anchors + 63) / 64);
    for (const uint64_t key : keys) {
        const uint32_t anchor = candidate_index(key) / classes;
        marks[anchor / 64] |= uint64_t{1} << anchor % 64;
    }
    AnchorBoxes decoded;
    decoded.slots.resize(static_cast<size_t>(task.anchors));
    std::vector<uint32_t> anchors;
    anchors.reserve(keys.size());
    for (size_t word = 0; word < marks.size(); ++word)
        for (uint64_t bits = marks[word]; bits; bits &= bits - 1) {
            const auto anchor = static_cast<uint32_t>(word * 64) + static_cast<uint32_t>(__builtin_ctzll(bits));
            decoded.slots[anchor] = static_cast<uint32_t>(anchors.size());
            anchors.push_back(anchor);
        }

    decoded.boxes.resize(anchors.size());
    size_t begin = 0;
    int64_t first_anchor = 0;
    for (int l = 0; l < task.num_levels; ++l) {
        const Level& level = task.levels[l];
        const int64_t past = first_anchor + level.box_logits.height * level.box_logits.width;
        size_t end = begin;
        while (end < anchors.size() && anchors[end] < past) ++end;
        decode_level<T>(level, task.options.bins, image, first_anchor, anchors.data() + begin,
                        static_cast<int64_t>(end - begin), decoded.boxes.data() + begin);
        begin = end;
        first_anchor = past;
    }
    return decoded;
}

// Greedy NMS in the order of the keys; writes the detections and returns how many.
int64_t suppress(const Task& task, int64_t image, const std::vector<uint64_t>& keys, const AnchorBoxes& decoded) {
    const DecodeNmsOptions& options = task.options;
    const auto classes = static_cast<uint32_t>(options.num_classes);
    // The kept boxes of a class stand together: from `begins`, with room for all of its candidates, to `ends`.
    const auto group_of = [&](uint32_t label) { return options.class_agnostic ? 0 : label; };
    std::vector<uint32_t> begins(options.class_agnostic ? 1 : classes);
    for (const uint64_t key : keys) ++begins[group_of(candidate_index(key) % classes)];
    uint32_t next = 0;
    for (uint32_t& begin : begins) next += std::exchange(begin, next);
    std::vector<uint32_t> ends = begins;
    Columns<float> kept;
    kept.resize(static_cast<int64_t>(keys.size()));

    int64_t count = 0;
    for (size_t i = 0; i < keys.size() && count < options.max_detections; ++i) {
        const uint32_t index = candidate_index(keys[i]), anchor = index / classes, label = index % classes;
        const uint32_t group = group_of(label);
        const Box<float> box = decoded.boxes[decoded.slots[anchor]];
        if (!is_finite(box)) continue;  // NaN logits never become boxes
        if (any_overlaps(kept, begins[group], ends[group], box, options.iou_threshold)) continue;
        kept.set(ends[group]++, box, area(box));
        const int64_t slot = image * options.max_detections + count++;
        float* out = task.out.boxes + 4 * slot;
        out[0] = box.x1;
        out[1] = box.y1;
        out[2] = box.x2;
        out[3] = box.y2;
        task.out.scores[slot] = sigmoid(candidate_logit(keys[i]));
        task.out.labels[slot] = label;
        task.out.anchors[slot] = anchor;
    }
    return count;
}

void pad(const Task& task, int64_t image, int64_t count) {
    const int64_t k = task.options.max_detections, first = image * k + count, last = (image + 1) * k;
    std::fill(task.out.boxes + 4 * first, task.out.boxes + 4 * last, 0.0f);
    std::fill(task.out.scores + first, task.out.scores + last, 0.0f);
    std::fill(task.out.labels + first, task.out.labels + last, -1);
    std::fill(task.out.anchors + first, task.out.anchors + last, -1);
    task.out.counts[image] = count;
}

template <typename T, typename Keys>
void finish(const Task& task, int64_t image, Keys& found, Stopwatch& watch) {
    std::vector<uint64_t>& keys = found.best();
    sort_descending(keys);
    watch.end(&StageTimes::select);
    const AnchorBoxes decoded = decode<T>(task, image, keys);
    watch.end(&StageTimes::decode);
    pad(task, image, suppress(task, image, keys, decoded));
    watch.end(&StageTimes::nms);
}

constexpr int64_t kScanBytes = 4 << 20;  // read in some 80 us; a thread takes 20 to start

// An image for each thread, or several threads to scan one image where there are more threads than images. `none` are
// the keys before a scan.
template <typename T, typename Keys>
void decode_nms_images(const Task& task, int threads, StageTimes* times, const Keys& none) {
    const int64_t batch = task.options.batch;
    const int64_t bytes = task.anchors * task.options.num_classes * static_cast<int64_t>(sizeof(T));
    const int64_t parts = std::clamp<int64_t>(threads / batch, 1, 1 + bytes / kScanBytes);
    if (parts == 1)
        return parallel_for(batch, threads, [&](int64_t image) {
            Stopwatch watch(times);
            Keys keys = none;
            scan<T>(task, image, 0, 1, keys);
            watch.end(&StageTimes::scan);
            finish<T>(task, image, keys, watch);
        });
    std::vector<Keys> keys(static_cast<size_t>(batch * parts), none);
    parallel_for(batch * parts, threads, [&](int64_t i) { scan<T>(task, i / parts, i % parts, parts, keys[i]); });
    parallel_for(batch, threads, [&](int64_t image) {
        Keys& all = keys[image * parts];
        for (int64_t part = 1; part < parts; ++part) all.add_all(keys[image * parts + part]);
        Stopwatch watch(nullptr);
        finish<T>(task, image, all, watch);
    });
}

template <typename T>
void decode_nms_of(const Task& task, int threads, StageTimes* times) {
    const int64_t classes = task.options.num_classes;
    const int64_t limit = std::min(task.options.pre_nms_top_k, task.anchors * classes);
    if (task.options.multi_label)
        decode_nms_images<T>(task, threads, times, BestKeys(task.cutoff, limit));
    else
        decode_nms_images<T>(task, threads, times, BestKeysPerAnchor(task.cutoff, limit, task.anchors, classes));
}

}  // namespace

void decode_nms(const Level* levels, int num_levels, ScalarType type, const DecodeNmsOptions& options,
                const DetectionsOut& out, int threads, StageTimes* times) {
    if (options.batch == 0) return;
    Task task{levels, num_levels, options, out, cutoff_logit(options.score_threshold), 0};
    for (int l = 0; l < num_levels; ++l) task.anchors += levels[l].class_logits.height * levels[l].class_logits.width;
    if (times) threads = 1;
    switch (type) {
        case ScalarType::Float32:
            return decode_nms_of<float>(task, threads, times);
        case ScalarType::Float16:
            return decode_nms_of<Half>(task, threads, times);
        case ScalarType::BFloat16:
            return decode_nms_of<BFloat16>(task, threads, times);
        case ScalarType::Float64:
            throw std::invalid_argument("decode_nms computes in float32");
    }
}

}  // namespace yolonas::cpu
