// Fuzzes the CPU ops: fuzz [CASES [SEED]]. Case i is drawn from SEED + i alone, so `fuzz 1 S` repeats the one that
// failed with S; the cases run in a child process, so that its seed is known even when a sanitizer ends it.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <iterator>

#include "fuzz.h"

namespace {

uint64_t digest_state = 0xcbf29ce484222325ull;

constexpr fuzz::Target kTargets[] = {fuzz::batched_nms, fuzz::decode_nms, fuzz::dfl_decode, fuzz::dfl_loss};

}  // namespace

void fuzz::fail(const std::string& what) {
    std::printf("%s\n", what.c_str());
    std::fflush(stdout);
    std::_Exit(1);
}

void fuzz::digest(uint64_t bits) {  // FNV-1a, by words
    digest_state = (digest_state ^ bits) * 0x100000001b3ull;
}

int main(int argc, char** argv) {
    const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1000;
    const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    void* shared = mmap(nullptr, sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    auto* seed = static_cast<volatile uint64_t*>(shared);
    const pid_t child = fork();
    if (child == 0) {
        for (*seed = first; *seed < first + cases; *seed = *seed + 1) {
            fuzz::Random random(*seed);
            kTargets[random.integer(0, std::size(kTargets) - 1)](random);
        }
        std::printf("%" PRIu64 " cases agree, digest %016" PRIx64 "\n", cases, digest_state);
        return 0;
    }
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
        std::printf("failed with seed %" PRIu64 "\n", *seed);
        return 1;
    }
}
