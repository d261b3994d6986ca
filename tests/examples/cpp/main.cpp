// Two ops from C++: `decode_nms` on the raw maps of a head, `batched_nms` on boxes. Built against an installed yolonas:
//   cmake -S . -B build && cmake --build build && cmake --install build --prefix PREFIX      # in yolonas
//   cmake -S . -B build -DCMAKE_PREFIX_PATH=PREFIX && cmake --build build && build/detections   # here
#include <yolonas/ops.h>

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr int64_t kClasses = 3, kBins = 17, kSize = 20;  // maps of 20 x 20 cells

// An object's peak in both maps: its class logit, and a distribution over distances for each of its four sides.
void add_object(std::vector<float>& class_logits, std::vector<float>& box_logits, int64_t row, int64_t column,
                int64_t label, float logit, int64_t distance) {
    const int64_t cell = row * kSize + column;
    class_logits[label * kSize * kSize + cell] = logit;
    for (int64_t side = 0; side < 4; ++side) box_logits[(side * kBins + distance) * kSize * kSize + cell] = 20.0f;
}

void decode_raw_maps() {
    std::vector<float> class_logits(kClasses * kSize * kSize, -8.0f), box_logits(4 * kBins * kSize * kSize, 0.0f);
    add_object(class_logits, box_logits, 5, 5, 1, 2.0f, 3);
    add_object(class_logits, box_logits, 5, 6, 1, 1.0f, 3);    // the same object, seen by the next cell: suppressed
    add_object(class_logits, box_logits, 12, 14, 2, 1.5f, 4);  // another one

    const int64_t plane = kSize * kSize;
    const yolonas::Level level{
        {class_logits.data(), kSize, kSize, kClasses * plane, plane, kSize, 1},
        {box_logits.data(), kSize, kSize, 4 * kBins * plane, plane, kSize, 1},
        16.0f,
    };
    yolonas::DecodeNmsOptions options{};
    options.batch = 1;
    options.num_classes = kClasses;
    options.bins = kBins;
    options.score_threshold = 0.25f;
    options.iou_threshold = 0.5f;
    options.pre_nms_top_k = 1000;
    options.max_detections = 10;
    options.multi_label = true;

    std::vector<float> boxes(10 * 4), scores(10);
    std::vector<int64_t> labels(10), anchors(10), counts(1);
    yolonas::cpu::decode_nms(&level, 1, yolonas::ScalarType::Float32, options,
                             {boxes.data(), scores.data(), labels.data(), anchors.data(), counts.data()}, 1);
    for (int64_t i = 0; i < counts[0]; ++i)
        std::printf("class %d  score %.3f  box %.1f %.1f %.1f %.1f\n", static_cast<int>(labels[i]), scores[i],
                    boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]);
#ifdef YOLONAS_WITH_CUDA
    std::printf("on CUDA: %d bytes of workspace\n",
                static_cast<int>(yolonas::cuda::decode_nms_workspace(&level, 1, options)));
#endif
}

void suppress_boxes() {
    const std::vector<float> boxes{0, 0, 10, 10, 1, 1, 10, 10, 1, 1, 10, 10, 50, 50, 60, 60};
    const std::vector<float> scores{0.6f, 0.9f, 0.8f, 0.7f};
    const std::vector<int64_t> labels{0, 0, 1, 0};
    std::vector<int64_t> keep(scores.size());
    const int64_t kept = yolonas::cpu::batched_nms(boxes.data(), scores.data(), labels.data(), 4, 0.5f, keep.data());
    std::printf("kept");
    for (int64_t i = 0; i < kept; ++i) std::printf(" %d", static_cast<int>(keep[i]));
    std::printf("\n");
}

}  // namespace

int main() {
    decode_raw_maps();
    suppress_boxes();
}
