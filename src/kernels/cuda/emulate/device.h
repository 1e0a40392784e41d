// CUDA's words on a CPU: the threads of one block are fibers, switched where they wait for each other.
//
// A kernel that would hang on a GPU (threads of a block at different barriers, lanes of a warp at different exchanges) is an error here,
// and so is one that writes past its shared memory. Fresh shared memory is full of NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__

struct dim3 { unsigned x, y, z; };
struct float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct bf16 { uint16_t bits; };
inline float __uint_as_float(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline uint32_t __float_as_uint(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __bfloat162float(bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
inline bf16 __float2bfloat16(float value) {
    uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline Whole __umul64hi(Whole a, Whole b) { return static_cast<Whole>(static_cast<unsigned __int128>(a) * b >> 64); }
inline void atomicAdd(Whole *to, Whole value) { *to += value; }
using std::exp;
using std::isinf;
using std::log;

namespace emulated {
extern unsigned char *shared;
// Shown to the other lanes of the warp, twice so that the next exchange does not overwrite what is still read.
struct Shown { float value; Whole whole; uint32_t a[4], b[2]; const bf16 *row; };
// What a thread has asked to be copied, and, with no place, the ends of its groups.
struct Later { void *to; const void *from; int bytes; };
std::vector<Later> &later();
void copy_now(int left);
Shown &mine(int turn);
const Shown &lane(int turn, int index);
int next_turn();
void wait_for_block();
void wait_for_warp();
}

#define SHARED(name) unsigned char *name = emulated::shared
inline void __syncthreads() { emulated::wait_for_block(); }
inline void __syncwarp() { emulated::wait_for_warp(); }

inline void begin() {}

inline float shuffle_xor(float value, int lanes) {
    int turn = emulated::next_turn();
    emulated::mine(turn).value = value;
    emulated::wait_for_warp();
    return emulated::lane(turn, (threadIdx.x % 32) ^ lanes).value;
}

inline Whole shuffle_xor(Whole value, int lanes) {
    int turn = emulated::next_turn();
    emulated::mine(turn).whole = value;
    emulated::wait_for_warp();
    return emulated::lane(turn, (threadIdx.x % 32) ^ lanes).whole;
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    int turn = emulated::next_turn();
    std::memcpy(emulated::mine(turn).a, a, sizeof a);
    std::memcpy(emulated::mine(turn).b, b, sizeof b);
    emulated::wait_for_warp();
    auto half = [](uint32_t pair, int which) { return __uint_as_float(which ? pair & 0xffff0000u : pair << 16); };
    int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    for (int at = 0; at < 4; at++) {
        int row = group + (at >= 2 ? 8 : 0), column = 2 * pair + at % 2;
        for (int k = 0; k < 16; k++) {
            int holder = k % 8 / 2, upper = k >= 8;
            float left = half(emulated::lane(turn, row % 8 * 4 + holder).a[(row >= 8) + 2 * upper], k % 2);
            float right = half(emulated::lane(turn, column * 4 + holder).b[upper], k % 2);
            d[at] += left * right;
        }
    }
}

inline void load_four(uint32_t (&to)[4], const bf16 *row, bool turned) {
    int turn = emulated::next_turn(), group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    emulated::mine(turn).row = row;
    emulated::wait_for_warp();
    auto number = [&](int matrix, int row, int column) -> uint32_t { return emulated::lane(turn, 8 * matrix + row).row[column].bits; };
    for (int at = 0; at < 4; at++)
        to[at] = turned ? number(at, 2 * pair, group) | number(at, 2 * pair + 1, group) << 16
                        : number(at, group, 2 * pair) | number(at, group, 2 * pair + 1) << 16;
}
inline void load_matrices(uint32_t (&to)[4], const bf16 *row) { load_four(to, row, false); }
inline void load_turned(uint32_t (&to)[4], const bf16 *row) { load_four(to, row, true); }

// As late as may be: what is read before its wait is still what was there.
template <int BYTES> inline void copy_later(void *to, const void *from, bool some) {
    emulated::later().push_back({to, some ? from : nullptr, BYTES});
}
inline void end_group() { emulated::later().push_back({nullptr, nullptr, 0}); }
template <int LEFT> inline void wait_for_groups() { emulated::copy_now(LEFT); }
inline float power_of_two(float exponent) { return std::exp2(exponent); }
