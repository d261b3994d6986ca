// Exact greedy NMS over sorted boxes, for many segments (images) at once, in memory linear in the boxes. It walks
// through the ranks in chunks: boxes of a chunk are compared with each other and resolved, then the kept ones remove
// what they overlap in all later chunks. Up to 1024 boxes this is two kernels.
#pragma once

#include "../geometry.h"
#include "launch.cuh"

namespace yolonas::cuda {

constexpr int kChunk = 1024;            // ranks that one block resolves, a thread for each
constexpr int kWords = kChunk / kWarp;  // as bits: bit r % 32 of word r / 32 stands for rank r of the chunk

// S segments of up to n boxes in descending order. The kernels of a caller fill boxes, groups, removed.
template <typename T>
struct Ranked {
    int64_t segments, n, limit;  // at most `limit` boxes of a segment are kept: the first ones
    const uint32_t* used;        // [S] ranks in use, where fewer than n; null: all
    Box<T>* boxes;               // [S, n]
    int64_t* groups;             // [S, n] boxes suppress boxes of their own group; null: one group
    uint8_t* removed;            // [S, n] nonzero: not a box, or suppressed by one of an earlier chunk
    uint32_t* better;            // [S, kWords, kChunk] for each rank of a chunk: the earlier ones that overlap it
    uint32_t* kept;              // [S, chunks, kWords]
    uint32_t* kept_before;       // [S, chunks + 1] boxes kept before each chunk; the last is the segment's total

    __host__ __device__ int64_t chunks() const { return ceil_div(n, kChunk); }
    __device__ int64_t count(int64_t segment) const {
        return used && used[segment] < n ? static_cast<int64_t>(used[segment]) : n;
    }
    __device__ int64_t group(int64_t segment, int64_t rank) const { return groups ? groups[segment * n + rank] : 0; }
    __device__ uint32_t* kept_words(int64_t segment, int64_t chunk) const {
        return kept + (segment * chunks() + chunk) * kWords;
    }
    __device__ uint32_t& found(int64_t segment, int64_t chunk) const {
        return kept_before[segment * (chunks() + 1) + chunk];
    }
    __device__ bool done(int64_t segment, int64_t chunk) const { return chunk > 0 && found(segment, chunk) >= limit; }
};

template <typename T>
Ranked<T> take_ranked(Slices& slices, int64_t segments, int64_t n, int64_t limit, const uint32_t* used, bool grouped) {
    Ranked<T> ranked{segments, n, limit, used, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    ranked.boxes = slices.take<Box<T>>(segments * n);
    if (grouped) ranked.groups = slices.take<int64_t>(segments * n);
    ranked.removed = slices.take<uint8_t>(segments * n);
    ranked.better = slices.take<uint32_t>(segments * kWords * kChunk);
    ranked.kept = slices.take<uint32_t>(segments * ranked.chunks() * kWords);
    ranked.kept_before = slices.take<uint32_t>(segments * (ranked.chunks() + 1));
    return ranked;
}

// A rank for each thread, against the 32 ranks of one word. Blocks [S, kWords, kChunk / kCompareThreads].
constexpr int kCompareThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kCompareThreads) compare_in_chunk(Ranked<T> ranked, int64_t chunk, T iou_threshold) {
    __shared__ Box<T> boxes[kWarp];
    __shared__ T areas[kWarp];
    __shared__ int64_t groups[kWarp];
    constexpr int kParts = kChunk / kCompareThreads;
    const int part = static_cast<int>(blockIdx.x % kParts), word = static_cast<int>(blockIdx.x / kParts % kWords);
    const int64_t segment = blockIdx.x / (kParts * kWords), first = chunk * kChunk;
    const int64_t count = ranked.count(segment), start = first + word * kWarp;
    const int column = part * kCompareThreads + static_cast<int>(threadIdx.x);
    const int64_t rank = first + column;
    if (ranked.done(segment, chunk) || start >= count || (part + 1) * kCompareThreads <= word * kWarp) return;

    if (threadIdx.x < kWarp && start + threadIdx.x < count) {
        const Box<T> box = ranked.boxes[segment * ranked.n + start + threadIdx.x];
        boxes[threadIdx.x] = box;
        areas[threadIdx.x] = area(box);
        groups[threadIdx.x] = ranked.group(segment, start + threadIdx.x);
    }
    __syncthreads();
    if (rank >= count || rank <= start) return;
    const Box<T> box = ranked.boxes[segment * ranked.n + rank];
    const T own_area = area(box);
    const int64_t own_group = ranked.group(segment, rank);
    uint32_t bits = 0;
    for (int r = 0; r < kWarp && start + r < rank; ++r)
        if (groups[r] == own_group && overlaps(boxes[r], areas[r], box, own_area, iou_threshold)) bits |= 1u << r;
    ranked.better[(segment * kWords + word) * kChunk + column] = bits;
}

// A block for each segment. Word by word: the warp of the word decides its 32 ranks, then all later ranks look whether
// one of those kept removes them.
template <typename T>
__global__ void __launch_bounds__(kChunk) resolve_chunk(Ranked<T> ranked, int64_t chunk) {
    __shared__ uint32_t kept[kWords];
    const int lane = static_cast<int>(threadIdx.x) % kWarp, own_word = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t segment = blockIdx.x, first = chunk * kChunk, rank = first + threadIdx.x;
    const int64_t count = ranked.count(segment), words = ceil_div(count - first, kWarp);
    const uint32_t* better = ranked.better + segment * kWords * kChunk + threadIdx.x;
    const auto load = [&](int word) {  // written only for words up to the rank's own
        return word <= own_word && rank < count && rank > first + word * kWarp ? better[word * kChunk] : 0u;
    };

    if (lane == 0) kept[own_word] = 0;
    int64_t found = chunk > 0 ? ranked.found(segment, chunk) : 0;
    bool alive = rank < count && !ranked.removed[segment * ranked.n + rank];
    uint32_t next = found < ranked.limit ? load(0) : 0u;
    for (int word = 0; word < kWords && word < words && found < ranked.limit; ++word) {
        const uint32_t suppressors = next;
        next = load(word + 1);  // in flight while this word is decided
        if (word == own_word) {
            // A rank is kept if none of the kept earlier ones overlaps it. Each round settles at least the next rank,
            // so what no longer changes is the greedy result; mostly two or three rounds.
            uint32_t now = __ballot_sync(kFullWarp, alive), last;
            do {
                last = now;
                now = __ballot_sync(kFullWarp, alive && !(suppressors & last));
            } while (now != last);
            const bool within_limit = __popc(now & ((1u << lane) - 1)) < ranked.limit - found;
            now = __ballot_sync(kFullWarp, (now >> lane & 1) && within_limit);
            if (lane == 0) kept[word] = now;
        }
        __syncthreads();
        alive = alive && !(suppressors & kept[word]);
        found += __popc(kept[word]);
    }
    if (lane == 0) ranked.kept_words(segment, chunk)[own_word] = kept[own_word];
    if (threadIdx.x == 0) {
        if (chunk == 0) ranked.found(segment, 0) = 0;
        ranked.found(segment, chunk + 1) = static_cast<uint32_t>(found);
    }
}

// A rank of a later chunk for each thread, against the kept ranks of this chunk. Blocks [S, later ranks /
// kLaterThreads].
constexpr int kLaterThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kLaterThreads) suppress_later(Ranked<T> ranked, int64_t chunk, T iou_threshold) {
    __shared__ Box<T> boxes[kLaterThreads];
    __shared__ T areas[kLaterThreads];
    __shared__ int64_t groups[kLaterThreads];
    const int t = static_cast<int>(threadIdx.x);
    const int64_t first = chunk * kChunk, later = first + kChunk;
    const int64_t blocks = ceil_div(ranked.n - later, kLaterThreads), segment = blockIdx.x / blocks;
    const int64_t start = later + blockIdx.x % blocks * kLaterThreads, rank = start + t;
    const int64_t count = ranked.count(segment), row = segment * ranked.n;
    if (start >= count || ranked.done(segment, chunk + 1)) return;

    bool alive = rank < count && !ranked.removed[row + rank];
    const bool present = alive;
    const Box<T> box = present ? ranked.boxes[row + rank] : Box<T>{};
    const T own_area = area(box);
    const int64_t own_group = present ? ranked.group(segment, rank) : 0;
    for (int batch = 0; batch < kChunk; batch += kLaterThreads) {
        __syncthreads();  // the batch before is read to its end
        const Box<T> loaded = ranked.boxes[row + first + batch + t];
        boxes[t] = loaded;
        areas[t] = area(loaded);
        groups[t] = ranked.group(segment, first + batch + t);
        __syncthreads();
        const uint32_t* kept = ranked.kept_words(segment, chunk) + batch / kWarp;
        for (int word = 0; word < kLaterThreads / kWarp; ++word)
            for (uint32_t bits = kept[word]; alive && bits; bits &= bits - 1) {
                const int r = word * kWarp + __ffs(static_cast<int>(bits)) - 1;
                alive = groups[r] != own_group || !overlaps(boxes[r], areas[r], box, own_area, iou_threshold);
            }
    }
    if (present && !alive) ranked.removed[row + rank] = 1;
}

template <typename T>
void greedy_nms(const Queue& queue, const Ranked<T>& ranked, T iou_threshold) {
    for (int64_t chunk = 0; chunk < ranked.chunks(); ++chunk) {
        const int64_t tiles = kWords * (kChunk / kCompareThreads), later = ranked.n - (chunk + 1) * kChunk;
        queue.launch(compare_in_chunk<T>, ranked.segments * tiles, kCompareThreads, ranked, chunk, iou_threshold);
        queue.launch(resolve_chunk<T>, ranked.segments, kChunk, ranked, chunk);
        if (later > 0)
            queue.launch(suppress_later<T>, ranked.segments * ceil_div(later, kLaterThreads), kLaterThreads, ranked,
                         chunk, iou_threshold);
    }
}

// Where the kept rank of (segment, chunk, thread) goes in the segment's output, or -1 where it was not kept.
template <typename T>
__device__ int64_t kept_slot(const Ranked<T>& ranked, int64_t segment, int64_t chunk) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, own_word = static_cast<int>(threadIdx.x) / kWarp;
    const uint32_t* kept = ranked.kept_words(segment, chunk);
    if (!(kept[own_word] >> lane & 1)) return -1;
    int64_t slot = ranked.found(segment, chunk) + __popc(kept[own_word] & ((1u << lane) - 1));
    for (int word = 0; word < own_word; ++word) slot += __popc(kept[word]);
    return slot;
}

}  // namespace yolonas::cuda
