// Low-rank parts of served rows, those of all adapters and of several products at once: low = x·Aᵀ, then y += low·Bᵀ.
//
// A block has up to 8 rows of one adapter, and sums of a row are made the same way whatever stands beside it. What the blocks do comes
// with the launch's own arguments: nothing is uploaded.
#include "device.cuh"

constexpr int LOW_ROWS = 8, LOW_RANKS = 4, MOST_LOWS = 64;

// Rows first.. of x and y that one adapter has. a: (rank, c); b: (out, rank); y: (n, out).
struct Low {
    const void *a, *b;
    void *y;
    int first, rows, rank, out;
};
struct Lows {
    Low of[MOST_LOWS];
};

// Which of them a block belongs to; `first` becomes the block's first row among its rows.
__device__ inline const Low &low_of(const Lows &lows, int block, int &first) {
    int at = 0;
    for (; block * LOW_ROWS >= lows.of[at].rows; at++) block -= (lows.of[at].rows + LOW_ROWS - 1) / LOW_ROWS;
    first = block * LOW_ROWS;
    return lows.of[at];
}

// low: (row blocks · 8, most), f32. A block has 4 rows of A, its threads share the columns. `vectors`: rows lie on multiples of 4 numbers.
template <class T> __device__ void lora_down(const T *x, int c, int most, int vectors, float *low, const Lows &lows) {
    SHARED(bytes);
    float *parts = reinterpret_cast<float *>(bytes); // (warps, LOW_RANKS, LOW_ROWS)
    int first;
    const Low &of = low_of(lows, blockIdx.x, first);
    const int start = blockIdx.y * LOW_RANKS, rows = min(LOW_ROWS, of.rows - first), ranks = min(LOW_RANKS, of.rank - start);
    if (ranks <= 0) return;
    const T *a = static_cast<const T *>(of.a) + static_cast<int64_t>(start) * c;
    const T *from = x + static_cast<int64_t>(of.first + first) * c;
    float sums[LOW_RANKS][LOW_ROWS] = {};
    const int whole = vectors ? c : 0;
    for (int column = 4 * threadIdx.x; column < whole; column += 4 * blockDim.x) {
        float weights[LOW_RANKS][4] = {};
#pragma unroll
        for (int rank = 0; rank < LOW_RANKS; rank++)
            if (rank < ranks) read<4>(a + static_cast<int64_t>(rank) * c + column, weights[rank]);
#pragma unroll
        for (int row = 0; row < LOW_ROWS; row++) {
            if (row >= rows) continue;
            float values[4];
            read<4>(from + static_cast<int64_t>(row) * c + column, values);
#pragma unroll
            for (int rank = 0; rank < LOW_RANKS; rank++)
#pragma unroll
                for (int at = 0; at < 4; at++) sums[rank][row] += weights[rank][at] * values[at];
        }
    }
    for (int column = whole + threadIdx.x; column < c; column += blockDim.x)
#pragma unroll
        for (int rank = 0; rank < LOW_RANKS; rank++) {
            if (rank >= ranks) continue;
            const float weight = to_float(a[static_cast<int64_t>(rank) * c + column]);
#pragma unroll
            for (int row = 0; row < LOW_ROWS; row++)
                if (row < rows) sums[rank][row] += weight * to_float(from[static_cast<int64_t>(row) * c + column]);
        }
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int rank = 0; rank < LOW_RANKS; rank++)
#pragma unroll
        for (int row = 0; row < LOW_ROWS; row++) {
            if (rank >= ranks || row >= rows) continue;
            const float sum = sum_of(sums[rank][row], 32);
            if (threadIdx.x % 32 == 0) parts[(warp * LOW_RANKS + rank) * LOW_ROWS + row] = sum;
        }
    __syncthreads();
    const int rank = threadIdx.x / LOW_ROWS, row = threadIdx.x % LOW_ROWS;
    if (rank >= ranks || row >= rows) return;
    float total = 0;
    for (int of_warp = 0; of_warp < static_cast<int>(blockDim.x) / 32; of_warp++)
        total += parts[(of_warp * LOW_RANKS + rank) * LOW_ROWS + row];
    low[static_cast<int64_t>(blockIdx.x * LOW_ROWS + row) * most + start + rank] = total;
}

// One thread an output of a block's rows.
template <class T> __device__ void lora_up(const float *low, int most, int vectors, const Lows &lows) {
    SHARED(bytes);
    float *held = reinterpret_cast<float *>(bytes); // (rank, LOW_ROWS)
    int first;
    const Low &of = low_of(lows, blockIdx.x, first);
    if (static_cast<int>(blockIdx.y * blockDim.x) >= of.out) return;
    const int rows = min(LOW_ROWS, of.rows - first), rank = of.rank;
    for (int at = threadIdx.x; at < rank * LOW_ROWS; at += blockDim.x) {
        const int row = at % LOW_ROWS;
        held[at] = row < rows ? low[static_cast<int64_t>(blockIdx.x * LOW_ROWS + row) * most + at / LOW_ROWS] : 0.0f;
    }
    __syncthreads();
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= of.out) return;
    const T *b = static_cast<const T *>(of.b) + static_cast<int64_t>(column) * rank;
    float sums[LOW_ROWS] = {};
    auto add = [&](float weight, int at) {
        float values[LOW_ROWS];
        read<LOW_ROWS>(held + at * LOW_ROWS, values);
#pragma unroll
        for (int row = 0; row < LOW_ROWS; row++) sums[row] += weight * values[row];
    };
    const int whole = vectors && rank % 4 == 0 ? rank : 0;
    for (int at = 0; at < whole; at += 4) {
        float weights[4];
        read<4>(b + at, weights);
#pragma unroll
        for (int next = 0; next < 4; next++) add(weights[next], at + next);
    }
    for (int at = whole; at < rank; at++) add(to_float(b[at]), at);
    T *y = static_cast<T *>(of.y) + static_cast<int64_t>(of.first + first) * of.out + column;
#pragma unroll
    for (int row = 0; row < LOW_ROWS; row++)
        if (row < rows) {
            T *to = y + static_cast<int64_t>(row) * of.out;
            *to = from_float<T>(to_float(*to) + sums[row]);
        }
}

#define LORA(T) \
    extern "C" __global__ void lora_down_##T(const T *x, int c, int most, int vectors, float *low, const __grid_constant__ Lows lows) { \
        begin(); \
        lora_down<T>(x, c, most, vectors, low, lows); \
    } \
    extern "C" __global__ void lora_up_##T(const float *low, int most, int vectors, const __grid_constant__ Lows lows) { \
        begin(); \
        lora_up<T>(low, most, vectors, lows); \
    }
LORA(float)
LORA(bf16)
