// Candidates of one image: every (anchor, class) whose logit reaches the cutoff, found in one pass over the class maps.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "../geometry.h"
#include "../ops.h"

namespace yolonas::cpu {

// The best `limit` keys of those added. What can no longer be among them raises the cutoff, so memory stays small
// however many logits pass.
class BestKeys {
   public:
    BestKeys(float cutoff, int64_t limit)
        : cutoff_(cutoff), limit_(static_cast<size_t>(limit)), full_(limit_ + std::max(limit_, size_t{4096})) {}

    float cutoff() const { return cutoff_; }

    void add(uint64_t key) {
        keys_.push_back(key);
        if (keys_.size() < full_) return;
        best();
        cutoff_ = candidate_logit(keys_.back());  // an equal logit may still win by its index
    }

    void add_all(const BestKeys& other) { keys_.insert(keys_.end(), other.keys_.begin(), other.keys_.end()); }

    // In no order, but the lowest last where others were dropped.
    std::vector<uint64_t>& best() {
        if (keys_.size() > limit_) {
            const auto last = keys_.begin() + static_cast<ptrdiff_t>(limit_) - 1;
            std::nth_element(keys_.begin(), last, keys_.end(), std::greater<>());
            keys_.resize(limit_);
        }
        return keys_;
    }

   private:
    std::vector<uint64_t> keys_;
    float cutoff_;
    size_t limit_, full_;
};

// The same of each anchor's best key alone: the best class, the lowest on a tie.
class BestKeysPerAnchor {
   public:
    BestKeysPerAnchor(float cutoff, int64_t limit, int64_t anchors, int64_t num_classes)
        : of_anchor_(static_cast<size_t>(anchors)),
          selected_(cutoff, limit),
          num_classes_(static_cast<uint32_t>(num_classes)) {}

    float cutoff() const { return selected_.cutoff(); }

    void add(uint64_t key) {
        uint64_t& best = of_anchor_[candidate_index(key) / num_classes_];
        best = std::max(best, key);
    }

    void add_all(const BestKeysPerAnchor& other) {
        for (const uint64_t key : other.of_anchor_)
            if (key) add(key);
    }

    std::vector<uint64_t>& best() {
        for (const uint64_t key : of_anchor_)
            if (key) selected_.add(key);
        return selected_.best();
    }

   private:
    std::vector<uint64_t> of_anchor_;  // 0: none
    BestKeys selected_;
    uint32_t num_classes_;
};

// Logits as what decides fastest whether any of many reaches a cutoff. 16-bit floats are integers of the same order:
// half the memory, no conversion. Only a hint: a NaN may seem to reach.
template <typename T>
struct Comparable;

template <>
struct Comparable<float> {
    using Value = float;
    typedef float Vector __attribute__((vector_size(16)));
    static constexpr Value kLowest = -std::numeric_limits<float>::infinity();
    static Vector from(Vector logits) { return logits; }
    static Value lowest_reaching(float cutoff) { return cutoff; }
};

template <typename T>
struct Comparable16 {
    using Value = int16_t;
    typedef int16_t Vector __attribute__((vector_size(16)));
    static constexpr Value kLowest = std::numeric_limits<int16_t>::min();
    static Vector from(Vector bits) { return bits ^ ((bits >> 15) & 0x7fff); }
    static Value lowest_reaching(float cutoff) {
        int low = kLowest, high = std::numeric_limits<int16_t>::max();
        while (low < high) {
            const int middle = low + (high - low) / 2;  // rounds down, as high > low
            const float value = to_float(T{static_cast<uint16_t>(middle < 0 ? middle ^ 0x7fff : middle)});
            // Negative NaNs are below -inf in this order, positive ones above +inf.
            if (value == value ? value >= cutoff : middle > 0)
                high = middle;
            else
                low = middle + 1;
        }
        return static_cast<Value>(low);
    }
};
template <>
struct Comparable<Half> : Comparable16<Half> {};
template <>
struct Comparable<BFloat16> : Comparable16<BFloat16> {};

// Whether any of the `kVectors` vectors of logits from `row` on reaches the cutoff.
template <int kVectors, typename T>
bool any_reaches(const T* row, typename Comparable<T>::Value lowest) {
    using Vector = typename Comparable<T>::Vector;
    constexpr int kLanes = sizeof(Vector) / sizeof(T);
    const auto load = [row](int i) {
        Vector logits;
        std::memcpy(&logits, row + i * kLanes, sizeof(Vector));
        return Comparable<T>::from(logits);
    };
    Vector highest = Comparable<T>::kLowest + Vector{};  // no logit, as that may be NaN, which nothing exceeds
    for (int i = 0; i < kVectors; ++i) {
        const Vector logits = load(i);
        highest = logits > highest ? logits : highest;
    }
    const auto reaching = highest >= lowest;
    uint64_t halves[2];
    std::memcpy(halves, &reaching, sizeof(halves));
    return halves[0] | halves[1];
}

// A loop over elements of a map: its steps in memory and in candidate indices (anchor * num_classes + class).
struct Loop {
    int64_t count, stride, index;
};

template <typename T, typename Keys>
void scan_row(const T* row, Loop loop, int64_t index, Keys& keys) {
    const auto look = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float logit = to_float(row[i * loop.stride]);
            if (logit >= keys.cutoff()) keys.add(candidate_key(logit, static_cast<uint32_t>(index + i * loop.index)));
        }
    };
    int64_t begin = 0;
    if (loop.stride == 1) {
        constexpr int64_t kPart = 64 / sizeof(T), kBlock = 4 * kPart;
        float cutoff = keys.cutoff();
        auto lowest = Comparable<T>::lowest_reaching(cutoff);
        for (; begin + kBlock <= loop.count; begin += kBlock) {
            if (!any_reaches<16>(row + begin, lowest)) continue;
            for (int64_t part = begin; part < begin + kBlock; part += kPart)
                if (any_reaches<4>(row + part, lowest)) look(part, part + kPart);
            if (keys.cutoff() != cutoff) {
                cutoff = keys.cutoff();
                lowest = Comparable<T>::lowest_reaching(cutoff);
            }
        }
    }
    look(begin, loop.count);
}

// Adds the candidates of part `part` of `parts` of an image's map. The loop over what lies closest in memory is the
// inner one; loops that together run through memory evenly become one: a plane of NCHW, a whole map of channels_last.
template <typename T, typename Keys>
void scan_map(const Map& map, int64_t num_classes, int64_t image, int64_t first_anchor, int64_t part, int64_t parts,
              Keys& keys) {
    const Loop channels{num_classes, map.stride_channel, 1}, columns{map.width, map.stride_width, num_classes},
        lines{map.height, map.stride_height, map.width * num_classes};
    const bool planes = std::abs(map.stride_width) <= std::abs(map.stride_channel);
    Loop outer = planes ? channels : lines, middle = planes ? lines : columns, inner = planes ? columns : channels;
    const auto merge = [](Loop& around, Loop& within) {
        const bool even = around.stride == within.count * within.stride && around.index == within.count * within.index;
        if (around.count != 1 && !even) return false;
        within.count *= around.count;
        around = {1, 0, 0};
        return true;
    };
    if (merge(middle, inner))
        merge(outer, inner);
    else
        merge(outer, middle);

    const T* base = static_cast<const T*>(map.data) + image * map.stride_batch;
    const int64_t rows = outer.count * middle.count, first_index = first_anchor * num_classes;
    if (rows == 1) {
        const int64_t begin = inner.count * part / parts, end = inner.count * (part + 1) / parts;
        return scan_row(base + begin * inner.stride, {end - begin, inner.stride, inner.index},
                        first_index + begin * inner.index, keys);
    }
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
        const int64_t i = r / middle.count, j = r % middle.count;
        scan_row(base + i * outer.stride + j * middle.stride, inner, first_index + i * outer.index + j * middle.index,
                 keys);
    }
}

}  // namespace yolonas::cpu
