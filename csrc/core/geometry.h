// Arithmetic shared by the CPU and the CUDA kernels: both devices run these very functions, so both give the same bits.
// That holds only without contraction into fused multiply-adds: gcc and clang get -ffp-contract=off, nvcc --fmad=false.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define YOLONAS_HD __host__ __device__ __forceinline__
#else
#define YOLONAS_HD inline
#endif

namespace yolonas {

template <typename To, typename From>
YOLONAS_HD To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

// Storage of the 16-bit types. Every kernel computes in float32; these only convert.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

YOLONAS_HD float to_float(float value) { return value; }

YOLONAS_HD float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

YOLONAS_HD float to_float(Half value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
    // Move the exponent bias from 15 to 127 by an exact multiplication, which makes subnormals right as well;
    // infinity and NaN (exponent all ones) are put back afterwards.
    const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);  // 2^112
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | sign);
}

// Unsigned integers in the order of the floats: -inf < ... < -0 = +0 < ... < +inf < NaN.
YOLONAS_HD uint32_t ordered_bits(float value) {
    if (value != value) return 0xffffffffu;
    const uint32_t bits = bit_cast<uint32_t>(value + 0.0f);  // -0 + 0 = +0: equal floats get equal keys
    return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

YOLONAS_HD uint64_t ordered_bits(double value) {
    if (value != value) return ~uint64_t{0};
    const uint64_t bits = bit_cast<uint64_t>(value + 0.0), sign = uint64_t{1} << 63;
    return (bits & sign) ? ~bits : bits | sign;
}

YOLONAS_HD float from_ordered_bits(uint32_t key) {
    return bit_cast<float>((key & 0x80000000u) ? key & 0x7fffffffu : ~key);
}

// A unique key for each candidate: descending keys are descending logits, then ascending anchor, then ascending class
// (index = anchor * num_classes + class). Sorting such keys gives one result whatever order they were collected in.
YOLONAS_HD uint64_t candidate_key(float logit, uint32_t index) {
    return static_cast<uint64_t>(ordered_bits(logit)) << 32 | static_cast<uint32_t>(~index);
}
YOLONAS_HD uint32_t candidate_index(uint64_t key) { return ~static_cast<uint32_t>(key); }
YOLONAS_HD float candidate_logit(uint64_t key) { return from_ordered_bits(static_cast<uint32_t>(key >> 32)); }

// exp(x) for x <= 0 in float32, within 2 ulp; 0 below -87. Reduction by ln 2 in two parts and a degree-6 Taylor
// polynomial on [-ln2/2, ln2/2] (truncation 1.2e-7 relative); rounding by the magic number 1.5 * 2^23.
YOLONAS_HD float exp_nonpositive(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = clamped * 1.44269504088896341f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t exponent = (bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u;  // 2^n from the low bits of n
    const float result = p * bit_cast<float>(exponent);
    return x < -87.0f ? 0.0f : result;
}

// exp(x) in float64 where that is a normal number, by the same reduction and a polynomial of degree 13, which leaves
// 5e-18.
YOLONAS_HD double exp_normal(double x) {
    const double shifted = x * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
    const double n = shifted - 6755399441055744.0;
    const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    double p = 1.0 / 6227020800.0;  // 1 / 13!
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const uint64_t exponent = (bit_cast<uint64_t>(shifted) << 52) + 0x3ff0000000000000ull;
    return p * bit_cast<double>(exponent);
}

// As exp_nonpositive of float32; 0 below -708.
YOLONAS_HD double exp_nonpositive(double x) {
    const double result = exp_normal(x < -708.0 ? -708.0 : x);
    return x < -708.0 ? 0.0 : result;
}

// sigmoid(x), correctly rounded to float32 but for about one argument in 2^28: evaluated in float64. Only survivors of
// the selection pay for it.
YOLONAS_HD float sigmoid(float logit) {
    const double x = -static_cast<double>(logit);
    if (x > 104.0) return 0.0f;  // below the smallest subnormal float
    if (x < -40.0) return 1.0f;
    return static_cast<float>(1.0 / (1.0 + exp_normal(x)));
}

// The smallest logit whose score exceeds the threshold: `logit >= cutoff` is `sigmoid(logit) > threshold`, without a
// sigmoid. NaN, which no logit reaches, where no score exceeds it.
inline float cutoff_logit(float score_threshold) {
    uint32_t low = ordered_bits(-bit_cast<float>(0x7f800000u)), high = ordered_bits(bit_cast<float>(0x7f800000u));
    if (!(sigmoid(from_ordered_bits(high)) > score_threshold)) return bit_cast<float>(0x7fc00000u);
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (sigmoid(from_ordered_bits(middle)) > score_threshold)
            high = middle;
        else
            low = middle + 1;
    }
    return from_ordered_bits(low);
}

// Expectation of the bin index under softmax of `bins` logits, `step` elements apart, in bins.
// NaN where a logit is NaN or +inf, or all are -inf: such an anchor never becomes a box.
template <typename T>
YOLONAS_HD float dfl_expectation(const T* logits, int64_t step, int64_t bins) {
    const float infinity = bit_cast<float>(0x7f800000u);
    float largest = -infinity;
    bool valid = true;
    for (int64_t b = 0; b < bins; ++b) {
        const float x = to_float(logits[b * step]);
        valid = valid && x < infinity;  // false for NaN too
        largest = x > largest ? x : largest;
    }
    if (!valid || largest == -infinity) return bit_cast<float>(0x7fc00000u);
    float total = 0.0f, weighted = 0.0f;
    for (int64_t b = 0; b < bins; ++b) {
        const float e = exp_nonpositive(to_float(logits[b * step]) - largest);
        total += e;
        weighted += e * static_cast<float>(b);
    }
    return weighted / total;
}

// xyxy, all in one frame.
template <typename T>
struct Box {
    T x1, y1, x2, y2;
};

// Distances (left, top, right, bottom, in strides) around the centre of grid cell (column, row) -> xyxy canvas pixels.
YOLONAS_HD Box<float> distances_to_box(float left, float top, float right, float bottom, int64_t column, int64_t row,
                                       float stride) {
    const float x = static_cast<float>(column) + 0.5f, y = static_cast<float>(row) + 0.5f;
    return {(x - left) * stride, (y - top) * stride, (x + right) * stride, (y + bottom) * stride};
}

YOLONAS_HD bool is_finite(Box<float> box) {
    const float zero = (box.x1 - box.x1) + (box.y1 - box.y1) + (box.x2 - box.x2) + (box.y2 - box.y2);
    return zero == 0.0f;
}

template <typename T>
YOLONAS_HD T area(Box<T> box) {
    return (box.x2 - box.x1) * (box.y2 - box.y1);
}

// By one exact division, as torchvision's. 0 / 0 is NaN, which is above no threshold.
template <typename T>
YOLONAS_HD T iou(Box<T> a, T area_a, Box<T> b, T area_b) {
    const T left = a.x1 > b.x1 ? a.x1 : b.x1, right = a.x2 < b.x2 ? a.x2 : b.x2;
    const T top = a.y1 > b.y1 ? a.y1 : b.y1, bottom = a.y2 < b.y2 ? a.y2 : b.y2;
    const T width = right - left > T(0) ? right - left : T(0), height = bottom - top > T(0) ? bottom - top : T(0);
    const T intersection = width * height;
    return intersection / (area_a + area_b - intersection);
}

template <typename T>
YOLONAS_HD bool overlaps(Box<T> a, T area_a, Box<T> b, T area_b, T threshold) {
    return iou(a, area_a, b, area_b) > threshold;
}

}  // namespace yolonas
