// Runs a kernel by name on this CPU with the arguments a driver would be given: built as a library by the tests.

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <ucontext.h>
#include <vector>

#include "../kernels.cu"

dim3 threadIdx, blockIdx, blockDim, gridDim;
static char fault[256];

namespace emulated {
constexpr int STACK = 128 << 10, MOST = 1024, GUARD = 1024;
unsigned char *shared;

enum State { READY, AT_BLOCK, AT_WARP, DONE };
struct Fiber {
    ucontext_t start;
    jmp_buf at;
    State state;
    bool begun;
    int turn;
    Shown shown[2];
    std::vector<Later> later;
};
static Fiber fibers[MOST];
static char *stacks;
static ucontext_t home;
static jmp_buf back;
static int current;
static void (*body)(void *);
static void *argument;

int next_turn() { return fibers[current].turn ^= 1; }
Shown &mine(int turn) { return fibers[current].shown[turn]; }
std::vector<Later> &later() { return fibers[current].later; }
void copy_now(int left) {
    std::vector<Later> &all = later();
    size_t end = all.size();
    for (int groups = 0; end > 0; end--)
        if (!all[end - 1].to && groups++ == left) break;
    for (size_t at = 0; at < end; at++) {
        if (!all[at].to) continue;
        if (all[at].from) memcpy(all[at].to, all[at].from, all[at].bytes);
        else memset(all[at].to, 0, all[at].bytes);
    }
    all.erase(all.begin(), all.begin() + end);
}
const Shown &lane(int turn, int index) { return fibers[current / 32 * 32 + index].shown[turn]; }

static void wait(State state) {
    fibers[current].state = state;
    if (!_setjmp(fibers[current].at)) _longjmp(back, 1);
}
void wait_for_block() { wait(AT_BLOCK); }
void wait_for_warp() { wait(AT_WARP); }

static void begin() {
    body(argument);
    fibers[current].state = DONE;
    _longjmp(back, 1);
}

static void resume(int index) {
    current = index;
    threadIdx = {static_cast<unsigned>(index), 0, 0};
    Fiber &fiber = fibers[index];
    fiber.state = READY;
    if (_setjmp(back)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + static_cast<size_t>(index) * STACK;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = &home;
    makecontext(&fiber.start, begin, 0);
    setcontext(&fiber.start);
}

static bool all(int from, int to, State wanted) {
    bool some = false;
    for (int at = from; at < to; at++) {
        if (fibers[at].state == DONE) continue;
        if (fibers[at].state != wanted) return false;
        some = true;
    }
    return some;
}

// Runs one block to its end; false where its threads wait for each other in vain.
static bool run_block(int threads) {
    for (int at = 0; at < threads; at++) fibers[at].state = READY, fibers[at].begun = false, fibers[at].turn = 0, fibers[at].later.clear();
    bool first = true;
    for (;;) {
        bool moved = false;
        if (first) {
            for (int at = 0; at < threads; at++) resume(at);
            first = false, moved = true;
        } else if (all(0, threads, AT_BLOCK)) {
            for (int at = 0; at < threads; at++) if (fibers[at].state == AT_BLOCK) resume(at);
            moved = true;
        } else {
            for (int warp = 0; warp < threads; warp += 32) {
                int end = warp + 32 < threads ? warp + 32 : threads;
                if (!all(warp, end, AT_WARP)) continue;
                // A lane that has left would make the exchange undefined.
                for (int at = warp; at < end; at++) if (fibers[at].state == DONE) return false;
                for (int at = warp; at < end; at++) resume(at);
                moved = true;
            }
        }
        if (!moved) {
            for (int at = 0; at < threads; at++) if (fibers[at].state != DONE) return false;
            return true;
        }
    }
}

template <class... Arguments> struct Call {
    void (*kernel)(Arguments...);
    void **arguments;
    template <size_t... At> void go(std::index_sequence<At...>) {
        kernel(*static_cast<std::remove_reference_t<Arguments> *>(arguments[At])...);
    }
    static void run(void *self) {
        Call *call = static_cast<Call *>(self);
        call->go(std::index_sequence_for<Arguments...>{});
    }
};

template <class... Arguments> static bool launch(void (*kernel)(Arguments...), int count, void **arguments, int threads, int bytes) {
    if (count != static_cast<int>(sizeof...(Arguments))) {
        snprintf(fault, sizeof fault, "%d arguments for %d", count, static_cast<int>(sizeof...(Arguments)));
        return false;
    }
    if (threads > MOST || threads % 32) {
        snprintf(fault, sizeof fault, "%d threads", threads);
        return false;
    }
    if (!stacks) stacks = static_cast<char *>(malloc(static_cast<size_t>(MOST) * STACK));
    Call<Arguments...> call{kernel, arguments};
    body = Call<Arguments...>::run, argument = &call;
    shared = static_cast<unsigned char *>(aligned_alloc(64, (bytes + GUARD + 63) / 64 * 64));
    bool fine = true;
    for (unsigned z = 0; fine && z < gridDim.z; z++)
        for (unsigned y = 0; fine && y < gridDim.y; y++)
            for (unsigned x = 0; fine && x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                memset(shared, 0xff, bytes + GUARD);
                if (!run_block(threads)) {
                    snprintf(fault, sizeof fault, "block %u %u %u waits for threads that never come", x, y, z);
                    fine = false;
                }
                for (int at = bytes; fine && at < bytes + GUARD; at++)
                    if (shared[at] != 0xff) {
                        snprintf(fault, sizeof fault, "shared memory written %d bytes past its %d", at - bytes, bytes);
                        fine = false;
                    }
            }
    free(shared);
    return fine;
}
}

// Null, or what went wrong.
extern "C" const char *rdpo_launch(const char *name, const unsigned *grid, unsigned threads, unsigned bytes, int count, void **arguments) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
#define KERNEL(kernel) \
    if (!strcmp(name, #kernel)) return emulated::launch(kernel, count, arguments, threads, bytes) ? nullptr : fault;
#include "names.h"
#undef KERNEL
    snprintf(fault, sizeof fault, "no kernel %s", name);
    return fault;
}
