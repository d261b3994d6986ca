// What a fuzz target is made of: draws that are the same on every platform, memory that ends where it says, logits in
// any layout, comparison by bits. A target draws a case from `Random`, calls an op on it, compares the result with its
// own slow, obvious version, and calls `fail` on a difference; main.cpp lists the targets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "geometry.h"
#include "ops.h"

namespace fuzz {

using namespace yolonas;

// The standard fixes the engine but not its distributions, so these are our own.
class Random {
   public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    uint64_t bits() { return engine_(); }
    int64_t integer(int64_t low, int64_t high) {  // both included
        return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
    }
    float uniform(float low, float high) { return low + (high - low) * (static_cast<float>(bits() >> 40) * 0x1p-24f); }
    bool chance(float probability) { return uniform(0.0f, 1.0f) < probability; }
    template <typename T>
    T pick(std::initializer_list<T> values) {
        return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
    }

   private:
    std::mt19937_64 engine_;
};

// Prints the sentence and ends the process with status 1.
[[noreturn]] void fail(const std::string& what);

// All NaNs are one: their sign and payload differ between processors.
inline uint64_t comparable(float x) { return x != x ? ~0ull : bit_cast<uint32_t>(x); }
inline uint64_t comparable(int64_t x) { return static_cast<uint64_t>(x); }

template <typename T>
void expect_same(const T* actual, const T* expected, int64_t n, const char* what) {
    for (int64_t i = 0; i < n; ++i)
        if (comparable(actual[i]) != comparable(expected[i]))
            fail(std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(actual[i]) + ", not " +
                 std::to_string(expected[i]));
}

// Adds results to the digest that the program prints: equal digests on two platforms are equal bits.
void digest(uint64_t bits);

template <typename T>
void digest(const std::vector<T>& results) {
    for (T result : results) digest(comparable(result));
}

// Memory of exactly `count` elements, which a sanitizer guards on both sides. With `shift` it starts that many elements
// behind malloc's alignment, so that vector loads meet every alignment that an element may have.
template <typename T>
class Exact {
   public:
    explicit Exact(int64_t count, int64_t shift = 0)
        : bytes_(new unsigned char[static_cast<size_t>(count + shift) * sizeof(T)]), count_(count), shift_(shift) {
        std::memset(bytes_.get(), 0x5a, static_cast<size_t>(count + shift) * sizeof(T));
    }
    T* data() { return reinterpret_cast<T*>(bytes_.get()) + shift_; }
    T* begin() { return data(); }
    T* end() { return data() + count_; }
    T& operator[](int64_t i) { return data()[i]; }

   private:
    std::unique_ptr<unsigned char[]> bytes_;
    int64_t count_, shift_;
};

template <typename T>
inline constexpr ScalarType scalar_type = ScalarType::Float32;
template <>
inline constexpr ScalarType scalar_type<Half> = ScalarType::Float16;
template <>
inline constexpr ScalarType scalar_type<BFloat16> = ScalarType::BFloat16;

// How a map's values are drawn.
struct Values {
    float low, high;  // most of them
    bool ties;        // multiples of 1/4 only
    float special;    // the share of NaN, infinities, zeros, huge values and random bits
};

template <typename T>
T to_scalar(float x);
template <>
inline float to_scalar<float>(float x) {
    return x;
}
template <>
inline BFloat16 to_scalar<BFloat16>(float x) {
    return {static_cast<uint16_t>(bit_cast<uint32_t>(x) >> 16)};
}
template <>
inline Half to_scalar<Half>(float x) {  // cut off, not rounded; what lies outside the normal numbers becomes 0 or inf
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, exponent = bits >> 23 & 0xffu;
    if (exponent == 0xff || exponent > 142) return {static_cast<uint16_t>(sign | (x != x ? 0x7e00u : 0x7c00u))};
    return {static_cast<uint16_t>(sign | (exponent < 113 ? 0u : ((bits & 0x7fffffffu) - (112u << 23)) >> 13))};
}

template <typename T>
T draw_logit(Random& random, const Values& values) {
    if (values.special > 0.0f && random.chance(values.special)) {
        const float infinity = bit_cast<float>(0x7f800000u);
        const uint64_t bits = random.bits();
        T any;
        std::memcpy(&any, &bits, sizeof(T));
        return random.pick<T>({any, to_scalar<T>(infinity), to_scalar<T>(-infinity), to_scalar<T>(0.0f),
                               to_scalar<T>(-0.0f), to_scalar<T>(3e38f), to_scalar<T>(-3e38f)});
    }
    const float x = random.uniform(values.low, values.high);
    return to_scalar<T>(values.ties ? static_cast<float>(static_cast<int>(x * 4.0f)) / 4.0f : x);
}

// A map [batch, channels, height, width] in a random layout: any order of the dimensions, gaps, broadcast (stride 0)
// and reversed dimensions, any alignment of an element. The memory begins and ends with the map's outermost elements;
// what lies in its gaps are logits like the others, which show in the result if they are taken for the map's.
template <typename T>
class Logits {
   public:
    Logits(Random& random, int64_t batch, int64_t channels, int64_t height, int64_t width, const Values& values)
        : memory_(0) {
        const int64_t sizes[4] = {batch, channels, height, width};
        int order[4] = {3, 2, 1, 0};  // innermost first: NCHW
        const int layout = static_cast<int>(random.integer(0, 9));
        if (layout >= 4) {  // channels_last
            order[0] = 1, order[1] = 3, order[2] = 2;
        }
        if (layout >= 7)
            for (int i = 3; i > 0; --i) std::swap(order[i], order[random.integer(0, i)]);
        const float odd = random.pick({0.0f, 0.0f, 0.2f});
        int64_t strides[4], extent = 1, first = 0, last = 0;
        for (int d : order) {
            strides[d] = extent;
            if (random.chance(odd)) strides[d] *= random.integer(2, 3);
            if (random.chance(odd)) strides[d] += random.integer(1, 5);
            if (random.chance(odd / 4)) strides[d] = 0;
            if (random.chance(odd / 4)) strides[d] = -strides[d];
            if (sizes[d] <= 1 && random.chance(odd)) strides[d] = random.integer(-9999, 9999);  // as torch has them
            const int64_t reach = strides[d] * std::max<int64_t>(sizes[d] - 1, 0);
            (reach < 0 ? first : last) += reach;
            extent = last - first + 1;
        }
        const bool empty = batch * channels * height * width == 0;
        memory_ = Exact<T>(empty ? 0 : extent, random.pick({0, 0, 1, 2, 3, 5, 7}));
        for (T& logit : memory_) logit = draw_logit<T>(random, values);
        const T* origin = memory_.data() - (empty ? 0 : first);
        map = {origin, height, width, strides[0], strides[1], strides[2], strides[3]};
    }

    Map map;

   private:
    Exact<T> memory_;
};

template <typename T>
float logit_at(const Map& map, int64_t image, int64_t channel, int64_t row, int64_t column) {
    return to_float(static_cast<const T*>(map.data)[image * map.stride_batch + channel * map.stride_channel +
                                                    row * map.stride_height + column * map.stride_width]);
}

// The box of an anchor as decode_nms and dfl_decode must give it, from logits read one by one.
template <typename T>
Box<float> box_at(const Map& map, float stride, int64_t bins, int64_t image, int64_t row, int64_t column) {
    float distances[4];
    std::vector<float> logits(bins);
    for (int64_t side = 0; side < 4; ++side) {
        for (int64_t b = 0; b < bins; ++b) logits[b] = logit_at<T>(map, image, side * bins + b, row, column);
        distances[side] = dfl_expectation(logits.data(), 1, bins);
    }
    return distances_to_box(distances[0], distances[1], distances[2], distances[3], column, row, stride);
}

// Runs `check` once, or from two threads at the same time: the ops share nothing between calls.
template <typename Check>
void run_maybe_twice(Random& random, const Check& check) {
    if (!random.chance(0.1f)) return check();
    std::thread other(check);
    check();
    other.join();
}

using Target = void (*)(Random&);

void batched_nms(Random& random);
void decode_nms(Random& random);
void dfl_decode(Random& random);
void dfl_loss(Random& random);

}  // namespace fuzz
