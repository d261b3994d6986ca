// Stable sorting by an unsigned key, in time linear in the number of items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace yolonas::cpu {

// What a sort moves: a key and where it came from.
template <typename Key>
struct Keyed {
    Key key;
    uint32_t value;
};

// Sorts items[0, n) into ascending order; `spare` [n] is room to work in. Values of equal keys must ascend, and still
// do afterwards. Only the bits in which keys differ are looked at, as few times as digits of kMostBits allow.
template <typename Key>
void radix_sort(Keyed<Key>* items, Keyed<Key>* spare, int64_t n) {
    if (n < 64) {  // counters cost more than comparisons
        std::sort(items, items + n, [](const Keyed<Key>& a, const Keyed<Key>& b) {
            return a.key < b.key || (a.key == b.key && a.value < b.value);
        });
        return;
    }
    constexpr unsigned kMostBits = 10, kMostPasses = (8 * sizeof(Key) + kMostBits - 1) / kMostBits;
    Key varying = 0;
    for (int64_t i = 1; i < n; ++i) varying |= items[i].key ^ items[0].key;
    unsigned lowest = 0, bits = 0;
    for (; varying > 0 && (varying & 1) == 0; varying >>= 1) ++lowest;
    for (; varying > 0; varying >>= 1) ++bits;
    if (bits == 0) return;
    const unsigned passes = (bits + kMostBits - 1) / kMostBits, width = (bits + passes - 1) / passes;
    const Key mask = (Key{1} << width) - 1;

    uint32_t next[kMostPasses][1 << kMostBits];
    for (unsigned pass = 0; pass < passes; ++pass) std::fill_n(next[pass], mask + 1, 0u);
    for (int64_t i = 0; i < n; ++i) {
        Key rest = items[i].key >> lowest;
        for (unsigned pass = 0; pass < passes; ++pass, rest >>= width) ++next[pass][rest & mask];
    }
    for (unsigned pass = 0; pass < passes; ++pass) {
        uint32_t start = 0;
        for (Key digit = 0; digit <= mask; ++digit) {
            const uint32_t count = next[pass][digit];
            next[pass][digit] = start;
            start += count;
        }
        const unsigned shift = lowest + pass * width;
        for (int64_t i = 0; i < n; ++i) spare[next[pass][items[i].key >> shift & mask]++] = items[i];
        std::swap(items, spare);
    }
    if (passes % 2) std::copy(items, items + n, spare);
}

}  // namespace yolonas::cpu
