#include "dfl.h"
#include "fuzz.h"

namespace fuzz {

namespace {

template <typename T>
void check(Random& random) {
    const int64_t rows = random.integer(0, random.chance(0.1f) ? 9000 : 150), bins = random.pick({2, 3, 8, 16, 17, 33});
    const Values values{-8.0f, 8.0f, random.chance(0.2f), random.pick({0.0f, 0.001f, 0.05f})};
    const Logits<T> map(random, 1, bins, 1, rows, values);
    const Rows logits{map.map.data, rows, bins, map.map.stride_width, map.map.stride_channel};
    Exact<float> targets(rows, random.integer(0, 3)), gradient(rows, random.integer(0, 3));
    for (float& target : targets)
        target = draw_logit<float>(random, {-1.0f, static_cast<float>(bins), values.ties, values.special});
    for (float& g : gradient) g = random.chance(0.5f) ? 0.0f : random.uniform(-2.0f, 2.0f);

    std::vector<float> loss;
    std::vector<T> slopes(static_cast<size_t>(rows * bins), T{});
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<float> x(static_cast<size_t>(bins));
        for (int64_t b = 0; b < bins; ++b) x[b] = logit_at<T>(map.map, 0, b, 0, row);
        const auto softmax = dfl_softmax(x.data(), 1, bins);
        const auto target = dfl_target(targets[row], bins);
        loss.push_back(dfl_cross_entropy(softmax.largest, softmax.total, target, x[target.lower], x[target.lower + 1]));
        if (gradient[row] == 0.0f) continue;
        for (int64_t b = 0; b < bins; ++b) {
            const float share = b == target.lower ? target.near : target.far;
            float slope = exp_nonpositive(x[b] - softmax.largest) * (gradient[row] / softmax.total);
            if (b == target.lower || b == target.lower + 1) slope -= share * gradient[row];
            slopes[row * bins + b] = from_real<T>(slope);
        }
    }

    const int threads = static_cast<int>(random.integer(1, 4));
    const int64_t shift = random.integer(0, 3);
    const bool by_row = random.chance(0.5f);  // of the gradients, in memory
    run_maybe_twice(random, [&] {
        Exact<float> actual(rows, shift);
        cpu::dfl_loss(logits, scalar_type<T>, targets.data(), actual.data(), threads);
        expect_same(actual.data(), loss.data(), rows, "dfl_loss: loss");

        Exact<T> out(rows * bins, shift);
        std::fill(out.begin(), out.end(), T{});
        const int64_t stride_row = by_row ? bins : 1, stride_bin = by_row ? 1 : rows;
        cpu::dfl_loss_backward(gradient.data(), logits, scalar_type<T>, targets.data(),
                               {out.data(), rows, bins, stride_row, stride_bin}, threads);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t b = 0; b < bins; ++b) {
                const float slope = to_float(out[row * stride_row + b * stride_bin]);
                const float expected = to_float(slopes[row * bins + b]);
                expect_same(&slope, &expected, 1, "dfl_loss: gradient");
            }
    });
    digest(loss);
}

}  // namespace

void dfl_loss(Random& random) { random.pick<Target>({check<float>, check<Half>, check<BFloat16>})(random); }

}  // namespace fuzz
