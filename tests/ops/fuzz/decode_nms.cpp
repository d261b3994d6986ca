#include <algorithm>
#include <cmath>
#include <limits>

#include "fuzz.h"

namespace fuzz {

namespace {

struct Candidate {
    float logit;
    int64_t anchor, label;
    Box<float> box;
};

// By float32 logit, descending, then anchor, then class.
bool before(const Candidate& a, const Candidate& b) {
    if (a.logit != b.logit) return a.logit > b.logit;
    return a.anchor != b.anchor ? a.anchor < b.anchor : a.label < b.label;
}

template <typename T>
std::vector<Candidate> candidates(const std::vector<Level>& levels, const DecodeNmsOptions& options, int64_t image) {
    std::vector<Candidate> found;
    int64_t anchor = 0;
    for (const Level& level : levels)
        for (int64_t row = 0; row < level.class_logits.height; ++row)
            for (int64_t column = 0; column < level.class_logits.width; ++column, ++anchor) {
                std::vector<Candidate> here;
                for (int64_t c = 0; c < options.num_classes; ++c) {
                    const float logit = logit_at<T>(level.class_logits, image, c, row, column);
                    if (sigmoid(logit) > options.score_threshold) here.push_back({logit, anchor, c, {}});
                }
                std::sort(here.begin(), here.end(), before);
                if (!options.multi_label && here.size() > 1) here.resize(1);
                if (here.empty()) continue;
                const Box<float> box = box_at<T>(level.box_logits, level.stride, options.bins, image, row, column);
                for (Candidate& candidate : here) {
                    candidate.box = box;
                    found.push_back(candidate);
                }
            }
    std::sort(found.begin(), found.end(), before);
    if (static_cast<int64_t>(found.size()) > options.pre_nms_top_k)
        found.resize(static_cast<size_t>(options.pre_nms_top_k));
    return found;
}

std::vector<Candidate> suppress(const std::vector<Candidate>& sorted, const DecodeNmsOptions& options) {
    std::vector<Candidate> kept;
    for (const Candidate& candidate : sorted) {
        if (static_cast<int64_t>(kept.size()) == options.max_detections) break;
        if (!is_finite(candidate.box)) continue;
        const bool suppressed = std::any_of(kept.begin(), kept.end(), [&](const Candidate& better) {
            return (options.class_agnostic || better.label == candidate.label) &&
                   overlaps(better.box, area(better.box), candidate.box, area(candidate.box), options.iou_threshold);
        });
        if (!suppressed) kept.push_back(candidate);
    }
    return kept;
}

template <typename T>
void check(Random& random) {
    // Mostly small; some like a head's; a few beyond 4 MB, for which several threads share an image.
    const bool huge = random.chance(0.004f), large = huge || random.chance(0.03f);
    const int64_t smallest = huge ? 70 : large ? 10 : 0, largest = huge ? 100 : large ? 40 : 8;
    DecodeNmsOptions options{};
    options.batch = huge ? 1 : random.integer(0, 3);
    options.num_classes = huge ? 91 : random.pick({1, 2, 3, 7, 16, 20, 63, 64, 65, 80, 91});
    options.bins = random.pick({1, 2, 3, 8, 15, 16, 17, 18, 33});
    options.iou_threshold = random.pick({0.0f, 0.3f, 0.5f, 0.7f, 1.0f, random.uniform(0.0f, 1.0f)});
    options.pre_nms_top_k = random.pick<int64_t>({1, 2, 10, 100, 1000, std::numeric_limits<int64_t>::max()});
    options.max_detections = random.pick({1, 2, 10, 100, 300, 1000});
    options.multi_label = random.chance(0.6f);
    options.class_agnostic = random.chance(0.3f);

    const float high = random.pick({-2.0f, 0.5f, 6.0f});  // few, some or many candidates
    const float special = random.pick({0.0f, 0.0f, 0.001f, 0.05f});
    const Values class_values{-8.0f, high, random.chance(0.3f), special}, box_values{-6.0f, 6.0f, false, special / 8};
    std::vector<Logits<T>> maps;
    std::vector<Level> levels;
    for (int64_t l = random.integer(1, random.chance(0.1f) && !large ? kMaxLevels : 3); l > 0; --l) {
        const int64_t height = random.integer(smallest, largest);
        const int64_t width = random.integer(smallest, random.chance(0.1f) ? 70 + smallest : largest);
        maps.emplace_back(random, options.batch, options.num_classes, height, width, class_values);
        const Map class_logits = maps.back().map;
        maps.emplace_back(random, options.batch, 4 * options.bins, height, width, box_values);
        levels.push_back(
            {class_logits, maps.back().map, random.pick({8.0f, 16.0f, 32.0f, 32.0f, 1e-3f, 1e18f, 3e38f})});
    }
    options.score_threshold = random.pick({0.0f, 0.01f, 0.25f, 0.5f, 1.0f, random.uniform(0.0f, 1.0f)});
    // A logit just not above the threshold, or just above it.
    if (random.chance(0.3f) && options.batch > 0 && levels[0].class_logits.height * levels[0].class_logits.width > 0) {
        const float score = sigmoid(logit_at<T>(levels[0].class_logits, 0, 0, 0, 0));
        if (score == score) options.score_threshold = random.chance(0.5f) ? score : std::nextafter(score, 0.0f);
    }

    const int64_t rows = options.batch * options.max_detections;
    std::vector<float> boxes(rows * 4, 0.0f), scores(rows, 0.0f);
    std::vector<int64_t> labels(rows, -1), anchors(rows, -1), counts(options.batch);
    for (int64_t image = 0; image < options.batch; ++image) {
        const auto kept = suppress(candidates<T>(levels, options, image), options);
        counts[image] = static_cast<int64_t>(kept.size());
        int64_t row = image * options.max_detections;
        for (const Candidate& candidate : kept) {
            const Box<float>& box = candidate.box;
            std::copy_n(std::vector<float>{box.x1, box.y1, box.x2, box.y2}.data(), 4, boxes.data() + 4 * row);
            scores[row] = sigmoid(candidate.logit);
            labels[row] = candidate.label;
            anchors[row++] = candidate.anchor;
        }
    }

    const int threads = static_cast<int>(random.integer(1, 4));
    const int64_t shift = random.integer(0, 3);
    run_maybe_twice(random, [&] {
        Exact<float> out_boxes(rows * 4, shift), out_scores(rows, shift);
        Exact<int64_t> out_labels(rows), out_anchors(rows), out_counts(options.batch);
        cpu::decode_nms(levels.data(), static_cast<int>(levels.size()), scalar_type<T>, options,
                        {out_boxes.data(), out_scores.data(), out_labels.data(), out_anchors.data(), out_counts.data()},
                        threads);
        expect_same(out_counts.data(), counts.data(), options.batch, "decode_nms: counts");
        expect_same(out_anchors.data(), anchors.data(), rows, "decode_nms: anchors");
        expect_same(out_labels.data(), labels.data(), rows, "decode_nms: labels");
        expect_same(out_scores.data(), scores.data(), rows, "decode_nms: scores");
        expect_same(out_boxes.data(), boxes.data(), rows * 4, "decode_nms: boxes");
    });
    digest(boxes);
    digest(scores);
    digest(labels);
    digest(anchors);
}

}  // namespace

void decode_nms(Random& random) { random.pick<Target>({check<float>, check<Half>, check<BFloat16>})(random); }

}  // namespace fuzz
