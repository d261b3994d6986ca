// Runs the CUDA kernels' source, emulated, and the CPU code on the same random input: every bit must agree, whatever
// lay in the workspace and in the outputs before. Argument: the seed. Exit status 1 and a sentence on a difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "dfl.h"
#include "geometry.h"
#include "ops.h"

using namespace yolonas;

namespace {

std::mt19937 generator;
int cases = 0;

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool chance(double probability) { return std::bernoulli_distribution(probability)(generator); }
template <typename T>
T pick(std::initializer_list<T> values) {
    return values.begin()[draw(0, static_cast<int64_t>(values.size()) - 1)];
}

[[noreturn]] void fail(const std::string& what) {
    std::printf("%s\n", what.c_str());
    std::exit(1);
}

// Memory full of rubbish, with more of it behind the end, which must stay as it is.
class Rubbish {
   public:
    explicit Rubbish(size_t bytes) : size_(bytes), bytes_(bytes + kGuard + kAlignment) {
        const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
        offset_ = (kAlignment - address % kAlignment) % kAlignment;
        for (auto& byte : bytes_) byte = static_cast<uint8_t>(generator());
        guard_.assign(data() + size_, data() + size_ + kGuard);
    }
    uint8_t* data() { return bytes_.data() + offset_; }
    void check() {
        if (!std::equal(guard_.begin(), guard_.end(), data() + size_)) fail("wrote past the end of the workspace");
    }

   private:
    static constexpr size_t kGuard = 512, kAlignment = 256;
    size_t size_, offset_;
    std::vector<uint8_t> bytes_, guard_;
};

template <typename T>
void compare(const std::vector<T>& cpu, const std::vector<T>& cuda, const std::string& what) {
    for (size_t i = 0; i < cpu.size(); ++i)
        if (std::memcmp(&cpu[i], &cuda[i], sizeof(T)) != 0)
            fail(what + " differs at " + std::to_string(i) + ": cpu " + std::to_string(cpu[i]) + ", cuda " +
                 std::to_string(cuda[i]));
}

void store(float& target, float value) { target = value; }
void store(double& target, float value) { target = value + (value - value == 0.0f ? 1e-9 : 0.0); }
void store(BFloat16& target, float value) { target.bits = static_cast<uint16_t>(bit_cast<uint32_t>(value) >> 16); }
void store(Half& target, float value) {  // truncated to the values that tests need: normal numbers, inf, NaN, 0
    const uint32_t bits = bit_cast<uint32_t>(value), exponent = bits >> 23 & 0xff;
    const uint32_t sign = bits >> 16 & 0x8000;
    if (exponent == 0xff)
        target.bits = static_cast<uint16_t>(sign | 0x7c00 | (bits & 0x7fffff ? 0x200 : 0));
    else if (exponent < 113)
        target.bits = static_cast<uint16_t>(sign | (value == 0.0f ? 0 : draw(0, 0x3ff)));  // zero or a subnormal
    else
        target.bits = static_cast<uint16_t>(sign | (bits - (112u << 23)) >> 13);
}

enum class Layout { Planar, ChannelsLast, Strided };

// A map of logits with the memory behind it.
template <typename T>
struct Logits {
    std::vector<T> memory;
    Map map;

    Logits(int64_t batch, int64_t channels, int64_t height, int64_t width, float mean, float deviation, bool special) {
        const Layout layout = pick({Layout::Planar, Layout::ChannelsLast, Layout::Strided});
        const int64_t shift = pick({0, 0, 1, 3});  // elements by which the map misses its alignment
        const int64_t gap = layout == Layout::Strided ? 3 : pick({0, 0, 5});
        if (layout == Layout::ChannelsLast)
            map = {nullptr, height, width, 0, 1, width * channels, channels};
        else if (layout == Layout::Planar)
            map = {nullptr, height, width, 0, height * width, width, 1};
        else
            map = {nullptr, height, width, 0, 2 * height * (width + gap), 2 * (width + gap), 2};
        map.stride_batch = channels * height * (width + gap) * 2 + gap;
        memory.resize(static_cast<size_t>(batch * map.stride_batch + shift));
        std::normal_distribution<float> normal(mean, deviation);
        const bool ties = chance(0.3);
        for (auto& value : memory) {
            float x = normal(generator);
            if (ties) x = static_cast<float>(static_cast<int>(x * 2)) / 2;
            if (special && chance(0.01))
                x = pick({std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(), 0.0f, -0.0f});
            store(value, x);
        }
        map.data = memory.data() + shift;
    }
    int64_t shift() const { return static_cast<const T*>(map.data) - memory.data(); }
};

template <typename T>
constexpr ScalarType scalar_type = ScalarType::Float32;
template <>
constexpr ScalarType scalar_type<Half> = ScalarType::Float16;
template <>
constexpr ScalarType scalar_type<BFloat16> = ScalarType::BFloat16;
template <>
constexpr ScalarType scalar_type<double> = ScalarType::Float64;

struct Detections {
    std::vector<float> boxes, scores;
    std::vector<int64_t> labels, anchors, counts;
    explicit Detections(int64_t batch, int64_t most)
        : boxes(batch * most * 4, 7.0f),
          scores(batch * most, 7.0f),
          labels(batch * most, 7),
          anchors(batch * most, 7),
          counts(batch, 7) {}
    DetectionsOut out() { return {boxes.data(), scores.data(), labels.data(), anchors.data(), counts.data()}; }
};

// Large: thousands of candidates. Wide: so many anchors that a thread of the selection has several lists of keys.
enum class Size { Small, Large, Wide };

template <typename T>
void check_decode(Size size) {
    const bool large = size == Size::Large, wide = size == Size::Wide;
    const int64_t batch = wide ? 1 : large ? pick({1, 3}) : pick({0, 1, 2, 3}), bins = pick({16, 17, 3, 40});
    const int64_t classes = wide ? 1 : large ? pick({20, 80}) : pick({1, 2, 7, 80});
    const int num_levels = static_cast<int>(wide ? 1 : large ? 2 : draw(1, 4));
    const bool special = chance(0.5);
    std::vector<std::unique_ptr<Logits<T>>> maps;
    std::vector<Level> levels;
    std::vector<Map> box_maps;
    std::vector<float> strides;
    int64_t anchors = 0;
    for (int l = 0; l < num_levels; ++l) {
        const int64_t height = wide ? 500 : large ? draw(14, 24) : pick({0, 1, 2, 5, 9});
        const int64_t width = wide ? 300 : large ? 16 : pick({1, 3, 4, 8});
        maps.push_back(std::make_unique<Logits<T>>(batch, classes, height, width, -2.0f, 2.0f, special));
        maps.push_back(std::make_unique<Logits<T>>(batch, 4 * bins, height, width, 0.0f, 2.0f, special));
        strides.push_back(static_cast<float>(8 << l));
        levels.push_back({maps[2 * l]->map, maps[2 * l + 1]->map, strides[l]});
        box_maps.push_back(maps[2 * l + 1]->map);
        anchors += height * width;
    }

    DecodeNmsOptions options{};
    options.batch = batch;
    options.num_classes = classes;
    options.bins = bins;
    options.score_threshold = large ? pick({0.0f, 0.1f, 0.3f}) : pick({0.0f, 0.01f, 0.25f, 0.5f, 0.9f, 1.0f});
    options.iou_threshold = pick({0.0f, 0.3f, 0.7f, 1.0f});
    options.pre_nms_top_k =
        large ? pick<int64_t>({1000, 2100, 3000, 5000, 9000}) : pick<int64_t>({1, 5, 33, 300, 1 << 30});
    options.max_detections = large ? pick({300, 2000}) : pick({1, 7, 64, 400});
    options.multi_label = !wide && chance(large ? 0.9 : 0.6);
    options.class_agnostic = chance(0.4);

    Detections cpu(batch, options.max_detections), cuda(batch, options.max_detections);
    cpu::decode_nms(levels.data(), num_levels, scalar_type<T>, options, cpu.out(), 1);
    Rubbish workspace(cuda::decode_nms_workspace(levels.data(), num_levels, options));
    cuda::decode_nms(levels.data(), num_levels, scalar_type<T>, options, cuda.out(), workspace.data(), 0, nullptr);
    workspace.check();
    compare(cpu.counts, cuda.counts, "decode_nms: counts");
    compare(cpu.labels, cuda.labels, "decode_nms: labels");
    compare(cpu.anchors, cuda.anchors, "decode_nms: anchors");
    compare(cpu.scores, cuda.scores, "decode_nms: scores");
    compare(cpu.boxes, cuda.boxes, "decode_nms: boxes");

    std::vector<float> cpu_boxes(batch * anchors * 4, 7.0f), cuda_boxes(batch * anchors * 4, 7.0f);
    cpu::dfl_decode(box_maps.data(), strides.data(), num_levels, scalar_type<T>, batch, bins, cpu_boxes.data(), 1);
    cuda::dfl_decode(box_maps.data(), strides.data(), num_levels, scalar_type<T>, batch, bins, cuda_boxes.data(), 0,
                     nullptr);
    for (auto* boxes : {&cpu_boxes, &cuda_boxes})
        for (auto& value : *boxes)
            if (value != value) value = -1.0f;  // which NaN it is, is not promised
    compare(cpu_boxes, cuda_boxes, "dfl_decode: boxes");
    ++cases;
}

template <typename T>
void check_nms(int64_t n) {
    const bool special = chance(0.5), ties = chance(0.5);
    const T nan = std::numeric_limits<T>::quiet_NaN(), infinity = std::numeric_limits<T>::infinity();
    std::uniform_real_distribution<T> uniform(0, 1);
    const T spread = pick<T>({5, 40, 400});
    std::vector<T> boxes(4 * n), scores(n);
    std::vector<int64_t> labels(n);
    for (int64_t i = 0; i < n; ++i) {
        const T x = uniform(generator) * spread, y = uniform(generator) * spread;
        const T sides[] = {x, y, x + uniform(generator) * 20, y + uniform(generator) * 20};
        for (int side = 0; side < 4; ++side) boxes[4 * i + side] = ties ? std::floor(sides[side]) : sides[side];
        scores[i] = uniform(generator) - T(0.2);
        if (ties) scores[i] = std::floor(scores[i] * 8) / 8;
        if (special && chance(0.05)) boxes[4 * i + draw(0, 3)] = pick({nan, infinity, -infinity});
        if (special && chance(0.1)) scores[i] = pick({nan, infinity, -infinity, T(0), T(-0.0), -nan});
        labels[i] =
            draw(0, 9) < 8 ? draw(-2, 2) : pick({std::numeric_limits<int64_t>::min(), INT64_MAX, int64_t{1} << 32});
    }
    const int64_t* labels_or_null = chance(0.5) ? labels.data() : nullptr;
    const T iou_threshold = pick<T>({0, T(0.3), T(0.5), 1});
    std::vector<int64_t> cpu_keep(n, -7), cuda_keep(n, -7), kept(1, -7);
    const std::vector<int64_t> expected{
        cpu::batched_nms(boxes.data(), scores.data(), labels_or_null, n, iou_threshold, cpu_keep.data())};
    Rubbish workspace(cuda::batched_nms_workspace<T>(n));
    cuda::batched_nms(boxes.data(), scores.data(), labels_or_null, n, iou_threshold, cuda_keep.data(), kept.data(),
                      workspace.data(), 0, nullptr);
    workspace.check();
    compare(expected, kept, "batched_nms: kept");
    compare(cpu_keep, cuda_keep, "batched_nms: keep");
    ++cases;
}

template <typename T>
std::vector<Real<T>> without_nan(const std::vector<T>& values) {
    std::vector<Real<T>> result;
    for (const T value : values) {
        const Real<T> x = to_real(value);
        result.push_back(x == x ? x : -12345);  // which NaN it is, is not promised
    }
    return result;
}

template <typename R>
std::vector<R> random_values(int64_t n, R mean, R deviation, bool special) {
    std::normal_distribution<R> normal(mean, deviation);
    std::vector<R> values(n);
    for (auto& value : values) value = chance(0.6) ? 0 : special && chance(0.02) ? R(NAN) : normal(generator);
    return values;
}

// dfl_decode, dfl_loss and the gradients of both.
template <typename T>
void check_dfl() {
    using R = Real<T>;
    const int64_t batch = pick({0, 1, 2, 3}), bins = pick({16, 17, 2});
    const int num_levels = static_cast<int>(draw(1, 3));
    const bool special = chance(0.5);
    std::vector<std::unique_ptr<Logits<T>>> logits, cpu_gradients, cuda_gradients;
    std::vector<Map> maps, cpu_out, cuda_out;
    std::vector<float> strides;
    int64_t anchors = 0;
    for (int l = 0; l < num_levels; ++l) {
        const int64_t height = pick({0, 1, 5, 9}), width = pick({1, 3, 8, 20});
        logits.push_back(std::make_unique<Logits<T>>(batch, 4 * bins, height, width, 0.0f, 2.0f, special));
        cpu_gradients.push_back(std::make_unique<Logits<T>>(batch, 4 * bins, height, width, 0.0f, 2.0f, false));
        cuda_gradients.push_back(std::make_unique<Logits<T>>(*cpu_gradients[l]));
        cuda_gradients[l]->map.data = cuda_gradients[l]->memory.data() + cpu_gradients[l]->shift();
        maps.push_back(logits[l]->map);
        cpu_out.push_back(cpu_gradients[l]->map);
        cuda_out.push_back(cuda_gradients[l]->map);
        strides.push_back(static_cast<float>(8 << l));
        anchors += height * width;
    }
    std::vector<R> cpu(batch * anchors * 4, 7), cuda(batch * anchors * 4, 7);
    const auto by_boxes = random_values<R>(batch * anchors * 4, 0, 1, special);
    constexpr ScalarType type = scalar_type<T>;
    cpu::dfl_decode(maps.data(), strides.data(), num_levels, type, batch, bins, cpu.data(), 1);
    cuda::dfl_decode(maps.data(), strides.data(), num_levels, type, batch, bins, cuda.data(), 0, nullptr);
    compare(without_nan(cpu), without_nan(cuda), "dfl_decode: boxes");
    cpu::dfl_decode_backward(by_boxes.data(), maps.data(), strides.data(), num_levels, type, batch, bins,
                             cpu_out.data(), 2);
    cuda::dfl_decode_backward(by_boxes.data(), maps.data(), strides.data(), num_levels, type, batch, bins,
                              cuda_out.data(), 0, nullptr);
    for (int l = 0; l < num_levels; ++l)  // with what lies between and behind the rows
        compare(without_nan(cpu_gradients[l]->memory), without_nan(cuda_gradients[l]->memory), "dfl_decode_backward");

    const int64_t rows = pick({0, 1, 31, 300, 5000}), step = pick({1, 2, 3});
    Logits<T> memory(1, rows * bins * step, 1, 1, 0.0f, 2.0f, special);
    const bool transposed = chance(0.3);
    const Rows x{memory.memory.data(), rows, bins, transposed ? step : bins * step, transposed ? rows * step : step};
    const auto targets = random_values<R>(rows, R(bins) / 2, R(bins) / 3, special);
    const auto by_loss = random_values<R>(rows, 0, 1, special);
    std::vector<R> cpu_loss(rows, 7), cuda_loss(rows, 7);
    cpu::dfl_loss(x, type, targets.data(), cpu_loss.data(), 2);
    cuda::dfl_loss(x, type, targets.data(), cuda_loss.data(), 0, nullptr);
    compare(without_nan(cpu_loss), without_nan(cuda_loss), "dfl_loss");
    std::vector<T> cpu_rows(rows * bins), cuda_rows(rows * bins);
    cpu::dfl_loss_backward(by_loss.data(), x, type, targets.data(), {cpu_rows.data(), rows, bins, bins, 1}, 1);
    cuda::dfl_loss_backward(by_loss.data(), x, type, targets.data(), {cuda_rows.data(), rows, bins, bins, 1}, 0,
                            nullptr);
    compare(without_nan(cpu_rows), without_nan(cuda_rows), "dfl_loss_backward");
    ++cases;
}

}  // namespace

int main(int, char** arguments) {
    const unsigned seed = static_cast<unsigned>(std::atoi(arguments[1]));
    generator.seed(seed);
    emulation::random.seed(seed);
    for (int i = 0; i < 100; ++i) {
        check_decode<float>(Size::Small);
        check_decode<Half>(Size::Small);
        check_decode<BFloat16>(Size::Small);
    }
    for (int i = 0; i < 6; ++i) {
        check_decode<float>(Size::Large);
        check_decode<Half>(Size::Large);
        check_decode<BFloat16>(Size::Large);
    }
    check_decode<float>(Size::Wide);
    for (const int64_t n : {0, 1, 2, 31, 32, 33, 64, 65, 300, 1000, 1023, 1024, 1025, 2048, 2049, 5000, 14000}) {
        check_nms<float>(n);
        check_nms<double>(n);
    }
    for (int i = 0; i < 40; ++i) {
        check_dfl<float>();
        check_dfl<Half>();
        check_dfl<BFloat16>();
        check_dfl<double>();
    }
    std::printf("%d cases agree\n", cases);
}
