#include <algorithm>
#include <limits>

#include "fuzz.h"

namespace fuzz {

namespace {

enum class Boxes { Spread, Crowded, Grid, Identical, Any };

template <typename T>
T special(Random& random) {
    const uint64_t bits = random.bits();
    T any;
    std::memcpy(&any, &bits, sizeof(T));
    using Limits = std::numeric_limits<T>;
    return random.pick<T>({any, Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), Limits::max(),
                           Limits::lowest(), Limits::denorm_min(), T(0), -T(0), T(1e20), T(-1e20)});
}

template <typename T>
void draw_box(Random& random, Boxes kind, float share, T* box) {
    const auto uniform = [&](float low, float high) { return static_cast<T>(random.uniform(low, high)); };
    if (kind == Boxes::Identical) {
        box[0] = T(10), box[1] = T(20), box[2] = T(30), box[3] = T(45);
    } else if (kind == Boxes::Grid) {  // small integers: many exact ties of IoU with each other and the threshold
        for (int i = 0; i < 4; ++i) box[i] = static_cast<T>(random.integer(0, 6));
    } else {
        const float canvas = kind == Boxes::Crowded ? 40.0f : 640.0f;
        box[0] = uniform(-10.0f, canvas), box[1] = uniform(-10.0f, canvas);
        box[2] = box[0] + uniform(-2.0f, 60.0f), box[3] = box[1] + uniform(-2.0f, 60.0f);  // a few are inverted
    }
    for (int i = 0; i < 4; ++i)
        if (kind == Boxes::Any || random.chance(share)) box[i] = special<T>(random);
}

int64_t draw_label(Random& random, int kind) {
    switch (kind) {
        case 0:
            return random.integer(0, 79);
        case 1:
            return random.integer(-2, 2);
        case 2:
            return random.pick({std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(), int64_t{0}});
        case 3:
            return static_cast<int64_t>(random.bits());  // all different
        default:
            return 7;
    }
}

// Torch's order: descending, NaN first.
template <typename T>
bool before(T a, T b) {
    return a > b || (a != a && b == b);
}

template <typename T>
void check(Random& random) {
    const int64_t n = random.integer(0, random.chance(0.02f) ? 6000 : random.pick({3, 40, 300, 300, 1500}));
    const Boxes kind = random.pick({Boxes::Spread, Boxes::Crowded, Boxes::Grid, Boxes::Identical, Boxes::Any});
    const float share = random.pick({0.0f, 0.0f, 0.01f, 0.2f});
    const bool ties = random.chance(0.3f), with_labels = random.chance(0.7f);
    const int label_kind = static_cast<int>(random.integer(0, 4));
    Exact<T> boxes(4 * n, random.integer(0, 3)), scores(n, random.integer(0, 3));
    Exact<int64_t> labels(with_labels ? n : 0, random.integer(0, 1));
    for (int64_t i = 0; i < n; ++i) {
        draw_box(random, kind, share, boxes.data() + 4 * i);
        scores[i] = static_cast<T>(ties ? static_cast<float>(random.integer(0, 4)) : random.uniform(0.0f, 1.0f));
        if (random.chance(share)) scores[i] = special<T>(random);
        if (with_labels) labels[i] = draw_label(random, label_kind);
    }
    const T iou_threshold = static_cast<T>(random.pick({0.0f, 0.25f, 0.5f, 0.7f, 1.0f, random.uniform(0.0f, 1.0f)}));

    std::vector<int64_t> order(n), expected;
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return before(scores[a], scores[b]); });
    const auto box = [&](int64_t i) {
        return Box<T>{boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]};
    };
    for (int64_t i : order) {
        const bool suppressed = std::any_of(expected.begin(), expected.end(), [&](int64_t kept) {
            return (!with_labels || labels[kept] == labels[i]) &&
                   overlaps(box(kept), area(box(kept)), box(i), area(box(i)), iou_threshold);
        });
        if (!suppressed) expected.push_back(i);
    }

    run_maybe_twice(random, [&] {
        Exact<int64_t> keep(n);
        const int64_t kept = cpu::batched_nms<T>(boxes.data(), scores.data(), with_labels ? labels.data() : nullptr, n,
                                                 iou_threshold, keep.data());
        const auto count = static_cast<int64_t>(expected.size());
        expect_same(&kept, &count, 1, "batched_nms: count");
        expect_same(keep.data(), expected.data(), kept, "batched_nms: keep");
    });
    digest(expected);
}

}  // namespace

void batched_nms(Random& random) { random.pick<Target>({check<float>, check<double>})(random); }

}  // namespace fuzz
