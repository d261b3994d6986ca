// Splits [0, count) over threads. Threads are started per call (some 20 us each), so callers ask for them only where
// the work is many times that.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace yolonas::cpu {

template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
    const int workers = static_cast<int>(std::min<int64_t>(count, threads));
    if (workers <= 1) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    std::atomic<int64_t> next{0};
    std::vector<std::exception_ptr> errors(workers);
    const auto work = [&](int worker) {
        try {
            for (int64_t i = next++; i < count; i = next++) body(i);
        } catch (...) {  // std::bad_alloc: must reach the caller, not end the process
            errors[worker] = std::current_exception();
        }
    };
    std::vector<std::thread> pool;
    pool.reserve(workers - 1);
    try {
        for (int worker = 1; worker < workers; ++worker) pool.emplace_back(work, worker);
    } catch (const std::system_error&) {  // the process may start no more threads: those there are do the work
    }
    work(0);
    for (auto& thread : pool) thread.join();
    for (const auto& error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace yolonas::cpu
