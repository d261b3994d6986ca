#include "fuzz.h"

namespace fuzz {

namespace {

template <typename T>
void check(Random& random) {
    const int64_t batch = random.integer(0, 3), bins = random.pick({1, 2, 3, 4, 8, 15, 16, 17, 18, 33});
    const Values values{-8.0f, 8.0f, random.chance(0.2f), random.pick({0.0f, 0.001f, 0.05f})};
    std::vector<Logits<T>> maps;
    std::vector<Map> views;
    std::vector<float> strides;
    int64_t anchors = 0;
    for (int64_t l = random.integer(1, random.chance(0.1f) ? kMaxLevels : 3); l > 0; --l) {
        const int64_t height = random.integer(0, 12), width = random.integer(0, random.chance(0.2f) ? 70 : 12);
        maps.emplace_back(random, batch, 4 * bins, height, width, values);
        views.push_back(maps.back().map);
        strides.push_back(random.pick({8.0f, 16.0f, 32.0f, 1e-3f, 3e38f}));
        anchors += height * width;
    }

    std::vector<float> expected;
    for (int64_t image = 0; image < batch; ++image)
        for (size_t l = 0; l < views.size(); ++l)
            for (int64_t row = 0; row < views[l].height; ++row)
                for (int64_t column = 0; column < views[l].width; ++column) {
                    const Box<float> box = box_at<T>(views[l], strides[l], bins, image, row, column);
                    expected.insert(expected.end(), {box.x1, box.y1, box.x2, box.y2});
                }

    const int threads = static_cast<int>(random.integer(1, 4));
    const int64_t shift = random.integer(0, 3);
    run_maybe_twice(random, [&] {
        Exact<float> boxes(batch * anchors * 4, shift);
        cpu::dfl_decode(views.data(), strides.data(), static_cast<int>(views.size()), scalar_type<T>, batch, bins,
                        boxes.data(), threads);
        expect_same(boxes.data(), expected.data(), batch * anchors * 4, "dfl_decode: boxes");
    });
    digest(expected);
}

}  // namespace

void dfl_decode(Random& random) { random.pick<Target>({check<float>, check<Half>, check<BFloat16>})(random); }

}  // namespace fuzz
