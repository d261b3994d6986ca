// Orders segments of unique keys, descending: few keys by counting, for each, those above it, inside the kernel that
// needs the ranks; many by a bitonic network.
#pragma once

#include "launch.cuh"

namespace yolonas::cuda {

constexpr int kSortTile = 2048;  // keys that a block holds in shared memory

// Whether counting takes less time than the network: 2^24 comparisons, shared by all multiprocessors, about as much as
// one launch of it, of which the first counts twice.
inline bool counting_pays(int64_t segments, int64_t n) {
    int64_t launches = 2;
    for (int64_t length = kSortTile, more = 2; length < n; length *= 2) launches += more++;
    return n <= (1 << 16) && segments <= (1 << 24) && segments * n * n <= launches << 24;
}

// So many keys of each segment are ranked in less time than a selection among them takes.
inline int64_t cheap_to_count(int64_t segments) {
    int64_t n = 32;
    while (n < 4096 && segments <= (1 << 24) && segments * 4 * n * n <= (1 << 24)) n *= 2;
    return n;
}

constexpr int kCountKeys = 16, kCountParts = 16;  // threads (keys, parts): each part counts a share of the others

// How many of key_at(0..n-1) are above the own key of threadIdx.x. All threads of the block call it.
template <typename Key, typename KeyAt>
__device__ uint32_t count_above(const Key& own, int64_t n, const KeyAt& key_at) {
    constexpr int kTile = 1024, kStep = 2 * kCountParts;  // two keys in one load of 16 bytes
    alignas(16) __shared__ Key tile[kTile];
    __shared__ uint32_t above[kCountKeys];
    const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y), t = y * kCountKeys + x;
    if (y == 0) above[x] = 0;
    uint32_t count = 0;
    for (int64_t begin = 0; begin < n; begin += kTile) {
        const int steps = static_cast<int>(ceil_div(n - begin < kTile ? n - begin : kTile, kStep));
        __syncthreads();  // the tile before is read to its end
        for (int i = t; i < steps * kStep; i += kCountKeys * kCountParts)
            tile[i] = begin + i < n ? key_at(begin + i) : Key{};  // which is above none
        __syncthreads();
        const Key* pair = tile + 2 * y;
#pragma unroll 4
        for (int step = 0; step < steps; ++step, pair += kStep)
            count += (own < pair[0] ? 1 : 0) + (own < pair[1] ? 1 : 0);
    }
    __syncthreads();
    atomicAdd(&above[x], count);
    __syncthreads();
    return above[x];
}

// Segments are padded to this length, with keys below all others.
inline int64_t sort_length(int64_t n) {
    int64_t length = 2 * kWarp;
    while (length < n) length *= 2;
    return length;
}

template <typename Key>
__device__ void order(Key& a, Key& b, bool descending) {
    if ((a < b) == descending) {
        const Key swapped = a;
        a = b;
        b = swapped;
    }
}

// The first of the pair that thread t orders, for partners `stride` (a power of two) apart.
__device__ inline int64_t pair_of(int64_t t, int64_t stride) { return 2 * t - (t & (stride - 1)); }

// Runs the stages of sizes first..last as far as their partners lie within one tile. keys [segments, length], a tile
// of `tile` keys for each block, tile / 2 threads.
template <typename Key>
__global__ void __launch_bounds__(kSortTile / 2)
    sort_tiles(Key* keys, int64_t length, int tile, int64_t first, int64_t last) {
    __shared__ Key shared[kSortTile];
    const int t = static_cast<int>(threadIdx.x), threads = tile / 2;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile, position = begin & (length - 1);
    shared[t] = keys[begin + t];
    shared[t + threads] = keys[begin + t + threads];
    for (int64_t size = first; size <= last; size *= 2)
        for (int stride = static_cast<int>(size < tile ? size : tile) / 2; stride > 0; stride /= 2) {
            __syncthreads();
            const int i = static_cast<int>(pair_of(t, stride));
            order(shared[i], shared[i + stride], ((position + i) & (length - 1) & size) == 0);
        }
    __syncthreads();
    keys[begin + t] = shared[t];
    keys[begin + t + threads] = shared[t + threads];
}

// One stage whose partners lie in different tiles; one pair for each thread.
template <typename Key>
__global__ void __launch_bounds__(kSortTile / 2)
    sort_across_tiles(Key* keys, int64_t length, int64_t size, int64_t stride) {
    const int64_t i = pair_of(static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, stride);
    order(keys[i], keys[i + stride], (i & (length - 1) & size) == 0);
}

// keys [segments, length], length from sort_length.
template <typename Key>
void sort_descending(const Queue& queue, Key* keys, int64_t segments, int64_t length) {
    const int tile = static_cast<int>(length < kSortTile ? length : kSortTile);
    const int64_t blocks = segments * (length / tile);
    queue.launch(sort_tiles<Key>, blocks, dim3(tile / 2), keys, length, tile, int64_t{2}, int64_t{tile});
    for (int64_t size = 2 * tile; size <= length; size *= 2) {
        for (int64_t stride = size / 2; stride >= tile; stride /= 2)
            queue.launch(sort_across_tiles<Key>, blocks, dim3(tile / 2), keys, length, size, stride);
        queue.launch(sort_tiles<Key>, blocks, dim3(tile / 2), keys, length, tile, size, size);
    }
}

}  // namespace yolonas::cuda
