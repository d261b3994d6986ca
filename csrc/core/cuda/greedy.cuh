// Exact greedy NMS over sorted boxes, for many segments (images) at once, in memory linear in the boxes. It walks
// through the ranks in chunks: boxes of a chunk are compared with each other and resolved, then the kept ones remove
// what they overlap in all later chunks. The comparisons within chunks need no results, so all of them come first.
// Up to 2048 boxes this is two kernels.
#pragma once

#include "../geometry.h"
#include "launch.cuh"

namespace yolonas::cuda {

constexpr int kChunk = 2048;            // ranks that one block resolves
constexpr int kWords = kChunk / kWarp;  // as bits: bit r % 32 of word r / 32 stands for rank r of the chunk
constexpr int kCompareThreads = 256;

// S segments of up to n boxes in descending order. The kernels of a caller fill boxes, groups, removed.
template <typename T>
struct Ranked {
    int64_t segments, n, limit;  // at most `limit` boxes of a segment are kept: the first ones
    const uint32_t* used;        // [S] ranks in use, where fewer than n; null: all
    Box<T>* boxes;               // [S, n]
    int64_t* groups;             // [S, n] boxes suppress boxes of their own group; null: one group
    uint8_t* removed;            // [S, n] nonzero: not a box, or suppressed by one of an earlier chunk
    uint32_t* better;            // [S, chunks, words, columns] for each rank: the earlier of its chunk that overlap it
    uint32_t* kept;              // [S, kWords] of the chunk resolved last
    uint32_t* found;             // [S] boxes kept so far

    __host__ __device__ int64_t chunks() const { return ceil_div(n, kChunk); }
    // A chunk's ranks, where fewer than kChunk, in words and in the blocks that compare them.
    __host__ __device__ int words() const { return static_cast<int>(ceil_div(n < kChunk ? n : kChunk, kWarp)); }
    __host__ __device__ int parts() const { return static_cast<int>(ceil_div(words(), kCompareThreads / kWarp)); }
    __host__ __device__ int columns() const { return parts() * kCompareThreads; }
    __device__ int64_t count(int64_t segment) const {
        return used && used[segment] < n ? static_cast<int64_t>(used[segment]) : n;
    }
    __device__ int64_t group(int64_t segment, int64_t rank) const { return groups ? groups[segment * n + rank] : 0; }
    __device__ uint32_t* better_of(int64_t segment, int64_t chunk) const {
        return better + (segment * chunks() + chunk) * words() * columns();
    }
};

template <typename T>
Ranked<T> take_ranked(Slices& slices, int64_t segments, int64_t n, int64_t limit, const uint32_t* used, bool grouped) {
    Ranked<T> ranked{segments, n, limit, used, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    ranked.boxes = slices.take<Box<T>>(segments * n);
    if (grouped) ranked.groups = slices.take<int64_t>(segments * n);
    ranked.removed = slices.take<uint8_t>(segments * n);
    ranked.better = slices.take<uint32_t>(segments * ranked.chunks() * ranked.words() * ranked.columns());
    ranked.kept = slices.take<uint32_t>(segments * kWords);
    ranked.found = slices.take<uint32_t>(segments);
    return ranked;
}

// A rank for each thread, against the 32 ranks of one word. Blocks [S, chunks, words, parts].
template <typename T>
__global__ void __launch_bounds__(kCompareThreads) compare_in_chunks(Ranked<T> ranked, T iou_threshold) {
    __shared__ Box<T> boxes[kWarp];
    __shared__ T areas[kWarp];
    __shared__ int64_t groups[kWarp];
    const uint32_t words = ranked.words(), parts = ranked.parts(), chunks = static_cast<uint32_t>(ranked.chunks());
    const int part = static_cast<int>(blockIdx.x % parts), word = static_cast<int>(blockIdx.x / parts % words);
    const int64_t segment = blockIdx.x / (parts * words * chunks), chunk = blockIdx.x / (parts * words) % chunks;
    const int64_t count = ranked.count(segment), first = chunk * kChunk, start = first + word * kWarp;
    const int column = part * kCompareThreads + static_cast<int>(threadIdx.x);
    const int64_t rank = first + column;
    if (start >= count || (part + 1) * kCompareThreads <= word * kWarp) return;

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
    ranked.better_of(segment, chunk)[word * ranked.columns() + column] = bits;
}

// A block for each segment, in turns: a warp decides its ranks, then all later ranks look whether one of those kept
// removes them. A turn is mostly waiting for the warp and at the barrier, so a warp has as many ranks as its registers
// bear. `write(segment, rank, slot)` is called for each kept rank, its slot among the segment's kept; after the last
// chunk `write.finish(segment, kept)` by all threads of the block.
constexpr int kLaneRanks = 4;  // of each thread: rank (warp * kLaneRanks + q) * 32 + lane of the chunk for each q
constexpr int kResolveThreads = kChunk / kLaneRanks;  // at most
template <typename T, typename Write>
__global__ void __launch_bounds__(kResolveThreads) resolve_chunk(Ranked<T> ranked, int64_t chunk, Write write) {
    __shared__ uint32_t kept[kWords];
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t segment = blockIdx.x, first = chunk * kChunk, count = ranked.count(segment);
    const int own = warp * kLaneRanks;  // the first word that this warp decides
    const auto column = [&](int q) { return (own + q) * kWarp + lane; };
    const uint32_t* better = ranked.better_of(segment, chunk);
    const int columns = ranked.columns();
    uint32_t next[kLaneRanks][kLaneRanks];  // [own rank q, word]: those of the turn's ranks that would suppress it
    const auto load = [&](int turn) {
#pragma unroll
        for (int q = 0; q < kLaneRanks; ++q)
#pragma unroll
            for (int w = 0; w < kLaneRanks; ++w) {
                const int word = turn * kLaneRanks + w;
                const bool compared = column(q) > word * kWarp && first + column(q) < count;
                next[q][w] = compared ? better[word * columns + column(q)] : 0u;
            }
    };

    const int64_t found_before = chunk > 0 ? ranked.found[segment] : 0;
    int64_t found = found_before;
    bool alive[kLaneRanks];
#pragma unroll
    for (int q = 0; q < kLaneRanks; ++q)
        alive[q] = first + column(q) < count && !ranked.removed[segment * ranked.n + first + column(q)];
    for (int word = static_cast<int>(threadIdx.x); word < kWords; word += blockDim.x) kept[word] = 0;
    load(0);
    __syncthreads();  // also: all have read `found`
    constexpr int kTurns = kWords / kLaneRanks;
    for (int turn = 0; turn < kTurns && first + turn * kLaneRanks * kWarp < count && found < ranked.limit; ++turn) {
        uint32_t suppressors[kLaneRanks][kLaneRanks];
#pragma unroll
        for (int q = 0; q < kLaneRanks; ++q)
#pragma unroll
            for (int w = 0; w < kLaneRanks; ++w) suppressors[q][w] = next[q][w];
        load(turn + 1);  // in flight while this turn is decided
        if (warp == turn) {
            // A rank is kept if none of the kept earlier ones overlaps it. Each round settles at least the next rank,
            // so what no longer changes is the greedy result; mostly two to four rounds.
            uint32_t now[kLaneRanks], last[kLaneRanks];
#pragma unroll
            for (int q = 0; q < kLaneRanks; ++q) now[q] = __ballot_sync(kFullWarp, alive[q]);
            bool changed;
            do {
                changed = false;
#pragma unroll
                for (int q = 0; q < kLaneRanks; ++q) last[q] = now[q];
#pragma unroll
                for (int q = 0; q < kLaneRanks; ++q) {
                    uint32_t hits = 0;
#pragma unroll
                    for (int w = 0; w <= q; ++w) hits |= suppressors[q][w] & last[w];
                    now[q] = __ballot_sync(kFullWarp, alive[q] && !hits);
                    changed = changed || now[q] != last[q];
                }
            } while (changed);
            int64_t room = ranked.limit - found;
#pragma unroll
            for (int q = 0; q < kLaneRanks; ++q) {
                const bool within_limit = __popc(now[q] & ((1u << lane) - 1)) < room;
                room -= __popc(now[q]);
                now[q] = __ballot_sync(kFullWarp, (now[q] >> lane & 1) && within_limit);
                if (lane == 0) kept[own + q] = now[q];
            }
        }
        __syncthreads();
#pragma unroll
        for (int w = 0; w < kLaneRanks; ++w) {
            const uint32_t word = kept[turn * kLaneRanks + w];
            found += __popc(word);
#pragma unroll
            for (int q = 0; q < kLaneRanks; ++q) alive[q] = alive[q] && !(suppressors[q][w] & word);
        }
    }

    for (int word = static_cast<int>(threadIdx.x); word < kWords; word += blockDim.x)
        ranked.kept[segment * kWords + word] = kept[word];
    if (threadIdx.x == 0) ranked.found[segment] = static_cast<uint32_t>(found);
    int64_t slot = found_before;
    for (int word = 0; word < own; ++word) slot += __popc(kept[word]);
    for (int q = 0; q < kLaneRanks; ++q) {
        const uint32_t word = kept[own + q];
        if (word >> lane & 1) write(segment, first + column(q), slot + __popc(word & ((1u << lane) - 1)));
        slot += __popc(word);
    }
    if (chunk == ranked.chunks() - 1) write.finish(segment, found);
}

// Later ranks against those kept of this chunk, each by kLaterParts threads that share the kept ones.
// Blocks [S, later ranks / kLaterRanks], threads (kLaterRanks, kLaterParts).
constexpr int kLaterRanks = 64, kLaterParts = 4, kLaterThreads = kLaterRanks * kLaterParts;
template <typename T>
__global__ void __launch_bounds__(kLaterThreads) suppress_later(Ranked<T> ranked, int64_t chunk, T iou_threshold) {
    __shared__ Box<T> boxes[kLaterThreads];
    __shared__ T areas[kLaterThreads];
    __shared__ int64_t groups[kLaterThreads];
    __shared__ uint32_t hits[kLaterRanks];
    const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y), t = y * kLaterRanks + x;
    const int64_t first = chunk * kChunk, later = first + kChunk;
    const uint32_t blocks = static_cast<uint32_t>(ceil_div(ranked.n - later, kLaterRanks));
    const int64_t segment = blockIdx.x / blocks, start = later + int64_t{blockIdx.x % blocks} * kLaterRanks;
    const int64_t rank = start + x;
    const int64_t count = ranked.count(segment), row = segment * ranked.n;
    if (start >= count || ranked.found[segment] >= ranked.limit) return;

    if (y == 0) hits[x] = 0;
    const bool present = rank < count && !ranked.removed[row + rank];
    const Box<T> box = present ? ranked.boxes[row + rank] : Box<T>{};
    const T own_area = area(box);
    const int64_t own_group = present ? ranked.group(segment, rank) : 0;
    const uint32_t* kept = ranked.kept + segment * kWords;
    bool alive = present;
    for (int batch = 0; batch < kChunk; batch += kLaterThreads) {
        __syncthreads();  // the batch before is read to its end
        const Box<T> loaded = ranked.boxes[row + first + batch + t];
        boxes[t] = loaded;
        areas[t] = area(loaded);
        groups[t] = ranked.group(segment, first + batch + t);
        __syncthreads();
        for (int word = y; word < kLaterThreads / kWarp; word += kLaterParts)
            for (uint32_t bits = kept[batch / kWarp + word]; alive && bits; bits &= bits - 1) {
                const int r = word * kWarp + __ffs(static_cast<int>(bits)) - 1;
                alive = groups[r] != own_group || !overlaps(boxes[r], areas[r], box, own_area, iou_threshold);
            }
    }
    if (present && !alive) atomicAdd(&hits[x], 1u);
    __syncthreads();
    if (y == 0 && hits[x] > 0) ranked.removed[row + rank] = 1;
}

template <typename T, typename Write>
void greedy_nms(const Queue& queue, const Ranked<T>& ranked, T iou_threshold, const Write& write) {
    const int64_t tiles = int64_t{ranked.words()} * ranked.parts();
    const int resolve_threads = static_cast<int>(ceil_div(ranked.words(), kLaneRanks)) * kWarp;
    queue.launch(compare_in_chunks<T>, ranked.segments * ranked.chunks() * tiles, kCompareThreads, ranked,
                 iou_threshold);
    for (int64_t chunk = 0; chunk < ranked.chunks(); ++chunk) {
        const int64_t later = ranked.n - (chunk + 1) * kChunk;
        queue.launch(resolve_chunk<T, Write>, ranked.segments, resolve_threads, ranked, chunk, write);
        if (later > 0)
            queue.launch(suppress_later<T>, ranked.segments * ceil_div(later, kLaterRanks),
                         dim3(kLaterRanks, kLaterParts), ranked, chunk, iou_threshold);
    }
}

}  // namespace yolonas::cuda
