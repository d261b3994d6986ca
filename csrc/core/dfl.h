// Distributions over distances (DFL): one anchor's box, and the arithmetic of decoding, of the loss and of both
// gradients. Everything computes in float32, and in float64 for float64 logits.
#pragma once

#include <cstdint>

#include "geometry.h"
#include "ops.h"

namespace yolonas {

template <typename T>
struct Computed {
    using Type = float;
};
template <>
struct Computed<double> {
    using Type = double;
};
template <typename T>
using Real = typename Computed<T>::Type;  // what logits of type T compute in

// Calls function with a value of the type, 0.
template <typename Function>
void with_type(ScalarType type, const Function& function) {
    switch (type) {
        case ScalarType::Float32:
            return function(float{});
        case ScalarType::Float16:
            return function(Half{});
        case ScalarType::BFloat16:
            return function(BFloat16{});
        case ScalarType::Float64:
            return function(double{});
    }
}

template <typename T>
YOLONAS_HD Real<T> to_real(T value) {
    return to_float(value);
}
YOLONAS_HD double to_real(double value) { return value; }

// Rounds to nearest, ties to even, as torch does.
template <typename T>
YOLONAS_HD T from_real(Real<T> value) {
    return value;
}
template <>
YOLONAS_HD BFloat16 from_real<BFloat16>(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0u)};
}
template <>
YOLONAS_HD Half from_real<Half>(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
    // Normal numbers: the exponent's bias from 127 to 15; what rounds up to 2^16 becomes infinity by itself.
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Subnormal ones: adding 0.5, whose last bit is worth 2^-24 as theirs is, rounds.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return {static_cast<uint16_t>((magnitude < 0x47800000u ? finite : special) | (bits >> 16 & 0x8000u))};
}

// log(x) for finite x >= 1, within 2 ulp: x = 2^n * m with m in [sqrt(1/2), sqrt(2)) and log(m) = 2 atanh(s), whose
// series is cut at s^11 (relative 2e-9, |s| < 0.172), for float64 at s^23 (6e-19). NaN stays NaN.
YOLONAS_HD float log_of_sum(float x) {
    const uint32_t n = (bit_cast<uint32_t>(x) - 0x3f3504f3u) >> 23;
    const float m = bit_cast<float>(bit_cast<uint32_t>(x) - (n << 23));
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    float p = 1.0f / 9.0f;
    p = p * z + 1.0f / 7.0f;
    p = p * z + 1.0f / 5.0f;
    p = p * z + 1.0f / 3.0f;
    p = p * z + 1.0f;
    const auto exponent = static_cast<float>(static_cast<int32_t>(n));
    return exponent * 0.693359375f + (exponent * -2.12194440e-4f + 2.0f * s * p);
}
YOLONAS_HD double log_of_sum(double x) {
    const uint64_t n = (bit_cast<uint64_t>(x) - 0x3fe6a09e667f3bcdull) >> 52;
    const double m = bit_cast<double>(bit_cast<uint64_t>(x) - (n << 52));
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double p = 1.0 / 21.0;
    for (int k = 19; k >= 1; k -= 2) p = p * z + 1.0 / k;
    const auto exponent = static_cast<double>(static_cast<int64_t>(n));
    return exponent * 6.93145751953125e-1 + (exponent * 1.42860682030941723212e-6 + 2.0 * s * p);
}

// The softmax of `bins` logits is exp(x - largest) / total; its expectation, in bins, weighted / total.
// All three are NaN where a logit is NaN or +inf, or all are -inf.
template <typename R>
struct Softmax {
    R largest, total, weighted;
};

template <typename T>
YOLONAS_HD Softmax<Real<T>> dfl_softmax(const T* logits, int64_t step, int64_t bins) {
    using R = Real<T>;
    const R infinity = bit_cast<float>(0x7f800000u), nan = bit_cast<float>(0x7fc00000u);
    R largest = -infinity, total = 0, weighted = 0;
    bool valid = true;
    for (int64_t b = 0; b < bins; ++b) {
        const R x = to_real(logits[b * step]);
        valid = valid && x < infinity;  // false for NaN too
        largest = x > largest ? x : largest;
    }
    largest = valid && largest != -infinity ? largest : nan;
    for (int64_t b = 0; b < bins; ++b) {
        const R e = exp_nonpositive(to_real(logits[b * step]) - largest);
        total += e;
        weighted += e * static_cast<R>(b);
    }
    return {largest, total, weighted};
}

// Canvas pixels of a box's side 0 to 3 (left, top, right, bottom) at `distance` cells from the centre of cell `cell`:
// the column for left and right, the row for top and bottom.
template <typename R>
YOLONAS_HD R side_to_pixels(int side, R distance, int64_t cell, float stride) {
    const R centre = static_cast<R>(cell) + R(0.5);
    return (side < 2 ? centre - distance : centre + distance) * static_cast<R>(stride);
}

// Of the loss by the distance in bins, from that by the side's canvas pixels.
template <typename R>
YOLONAS_HD R distance_gradient(int side, R gradient, float stride) {
    return (side < 2 ? -gradient : gradient) * static_cast<R>(stride);
}

// The expectation y = sum of b * p_b has dy / dx_b = p_b * (b - y). `e` is exp(x_b - largest), `scale` the gradient of
// y divided by the total.
template <typename R>
YOLONAS_HD R expectation_gradient(R e, R scale, int64_t bin, R expectation) {
    return e * scale * (static_cast<R>(bin) - expectation);
}

// A target distance lies between bins `lower` and `lower` + 1 and gives each a share of probability.
template <typename R>
struct Target {
    int64_t lower;
    R near, far;  // shares of `lower` and `lower` + 1
};

// Clamped to the bins, of which there are 2 or more; NaN gives shares of NaN.
template <typename R>
YOLONAS_HD Target<R> dfl_target(R distance, int64_t bins) {
    const R last = static_cast<R>(bins - 1);
    const R inside = distance > R(0) ? (distance < last ? distance : last) : R(0);
    const int64_t floor = static_cast<int64_t>(inside), lower = floor < bins - 1 ? floor : bins - 2;
    const R far = distance == distance ? inside - static_cast<R>(lower) : distance;
    return {lower, R(1) - far, far};
}

// Cross entropy of softmax(x) with the target: lse(x) - near * x[lower] - far * x[lower + 1], with the largest logit
// taken out of every term. A share of 0 adds nothing, even of a logit of -inf.
template <typename R>
YOLONAS_HD R dfl_cross_entropy(R largest, R total, Target<R> target, R x_lower, R x_upper) {
    const R lower = target.near == R(0) ? R(0) : target.near * (largest - x_lower);
    const R upper = target.far == R(0) ? R(0) : target.far * (largest - x_upper);
    return log_of_sum(total) + (lower + upper);
}

// Of that loss by x_b, times the `gradient` of the loss. `e` is exp(x_b - largest), `scale` gradient / total.
template <typename R>
YOLONAS_HD R cross_entropy_gradient(R e, R scale, R gradient, int64_t bin, Target<R> target) {
    const R result = e * scale;
    if (bin == target.lower) return result - target.near * gradient;
    if (bin == target.lower + 1) return result - target.far * gradient;
    return result;
}

}  // namespace yolonas
