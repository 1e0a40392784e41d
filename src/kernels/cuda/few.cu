// Products of few rows, as decoding has them: a weight is read once from memory, at the speed of memory, for all rows and for all products
// of one input. (Libraries' products are made for many rows.)
#include "device.cuh"

constexpr int FEW_WARPS = 8, MOST_FEWS = 8;

// y = x·wᵀ + bias. w: (out, k); bias: (out), or none; y: (rows, out).
struct Few {
    const void *w, *bias;
    void *y;
    int64_t out;
};
struct Fews {
    Few of[MOST_FEWS];
};

// A warp has OUTS rows of a weight and its lanes share the columns, AHEAD turns of which are read at once: enough is on its way from memory
// also where a small weight makes few warps. k: a multiple of 8.
template <class T, int ROWS, int OUTS, int AHEAD> __device__ void few_rows(const T *x, int rows, int k, const Fews &fews) {
    int block = blockIdx.x, which = 0;
    for (int blocks; block >= (blocks = (fews.of[which].out + FEW_WARPS * OUTS - 1) / (FEW_WARPS * OUTS)); which++) block -= blocks;
    const Few &few = fews.of[which];
    const int lane = threadIdx.x % 32;
    const int64_t first = static_cast<int64_t>(block * FEW_WARPS + threadIdx.x / 32) * OUTS;
    if (first >= few.out) return;
    const int outs = min(static_cast<int64_t>(OUTS), few.out - first);
    const T *w = static_cast<const T *>(few.w) + first * k;
    float sums[OUTS][ROWS] = {};
    constexpr int TURN = 8 * 32;
    float weights[AHEAD][OUTS][8];
    auto fetch = [&](int start) {
#pragma unroll
        for (int turn = 0; turn < AHEAD; turn++)
#pragma unroll
            for (int out = 0; out < OUTS; out++)
                if (start + turn * TURN < k) read<8>(w + static_cast<int64_t>(min(out, outs - 1)) * k + start + turn * TURN, weights[turn][out]);
    };
    // Weights are whole before anybody has them (FrozenLinear waits): the first are on their way before the input is there.
    fetch(8 * lane);
    begin();
    for (int start = 8 * lane; start < k; start += AHEAD * TURN) {
        if (start >= AHEAD * TURN) fetch(start);
#pragma unroll
        for (int turn = 0; turn < AHEAD; turn++)
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                if (row >= rows || start + turn * TURN >= k) continue;
                float values[8];
                read<8>(x + static_cast<int64_t>(row) * k + start + turn * TURN, values);
#pragma unroll
                for (int out = 0; out < OUTS; out++)
#pragma unroll
                    for (int at = 0; at < 8; at++) sums[out][row] += weights[turn][out][at] * values[at];
            }
    }
    T *y = static_cast<T *>(few.y) + first;
#pragma unroll
    for (int out = 0; out < OUTS; out++)
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (out >= outs || row >= rows) continue;
            const float sum = sum_of(sums[out][row], 32);
            if (lane != 0) continue;
            const float bias = few.bias ? to_float(static_cast<const T *>(few.bias)[first + out]) : 0.0f;
            y[row * few.out + out] = from_float<T>(sum + bias);
        }
}

#define FEW(ROWS, OUTS, AHEAD, T) \
    extern "C" __global__ void __launch_bounds__(32 * FEW_WARPS) \
        few_rows_##ROWS##_##T(const T *x, int rows, int k, const __grid_constant__ Fews fews) { \
        few_rows<T, ROWS, OUTS, AHEAD>(x, rows, k, fews); \
    }
FEW(1, 1, 4, float)
FEW(1, 1, 4, bf16)
FEW(2, 1, 4, float)
FEW(2, 1, 4, bf16)
FEW(4, 2, 2, float)
FEW(4, 2, 2, bf16)
FEW(8, 4, 1, float)
FEW(8, 4, 1, bf16)
