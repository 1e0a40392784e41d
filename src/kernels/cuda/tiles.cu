// Attention on tensor cores: tiles of 64 queries (or keys) of bf16 against blocks of keys (or queries), 16 rows a warp, sums in f32 in
// registers. Lists and windows are those of attention.cu. What comes next is copied to shared memory while the tensor cores work.
//
// A tile's products come out of multiply_add two neighbouring columns a register: rows g and g + 8 of the warp's 16 for lane 4g + t.
// Two such results side by side are, packed, the first operand of the next product.
#include "attention.cu"

constexpr int TILE = 64, TILE_THREADS = 128;
constexpr float LOG2_E = 1.4426950f, LN_2 = 0.6931472f;

// Pieces of 8 numbers that a thread copies of ROWS rows, and the row that each is of.
template <int D, int ROWS> constexpr int PIECES = ROWS * (D / 8) / TILE_THREADS;
template <int D> __device__ inline int row_of_piece(int step) { return (threadIdx.x + TILE_THREADS * step) / (D / 8); }

// ROWS rows of shared memory, D + 8 numbers apart so that lanes meet no bank twice; `from` gives the row of `all` for a piece, below zero
// for zeros.
template <int D, int ROWS, class From> __device__ inline void fill(bf16 *to, const bf16 *all, From from) {
    const int column = threadIdx.x % (D / 8) * 8;
#pragma unroll
    for (int step = 0; step < PIECES<D, ROWS>; step++) {
        const int64_t row = from(step);
        copy_later<16>(to + row_of_piece<D>(step) * (D + 8) + column, row < 0 ? all : all + row * D + column, row >= 0);
    }
}

// The rows of keys and values behind entries base .. of a list, for the pieces of this thread; below zero from `past` on.
template <int D, int ROWS>
__device__ inline void find(int (&rows)[PIECES<D, ROWS>], const uint32_t *list, int size, int base, int past, int heads, int kv) {
#pragma unroll
    for (int step = 0; step < PIECES<D, ROWS>; step++) {
        const int entry = base + row_of_piece<D>(step);
        rows[step] = entry < past ? static_cast<int>(slot_of(list, size, entry)) * heads + kv : -1;
    }
}

// Rows 16·warp .. of a tile as a first operand, columns `column` ..+16.
template <int D> __device__ inline void row_operand(uint32_t (&a)[4], const bf16 *tile, int column) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
    load_matrices(a, tile + row * (D + 8) + column + lane / 16 * 8);
}

// products (16, N) = the warp's rows of `left` · the N rows of `right`, turned.
template <int D, int N> __device__ inline void against(float (&products)[N / 8][4], const bf16 *left, const bf16 *right) {
    const int lane = threadIdx.x % 32;
    const bf16 *from = right + (lane % 8 + lane / 16 * 8) * (D + 8) + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int at = 0; at < 4; at++) products[n][at] = 0;
#pragma unroll
    for (int column = 0; column < D; column += 16) {
        uint32_t a[4];
        row_operand<D>(a, left, column);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            uint32_t b[4];
            load_matrices(b, from + n * 8 * (D + 8) + column);
            multiply_add(products[n], a, {b[0], b[1]});
            multiply_add(products[n + 1], a, {b[2], b[3]});
        }
    }
}

// sums (16, D) += weights (16, N) · the N rows of `right`.
template <int D, int N> __device__ inline void onto(float (&sums)[D / 8][4], const float (&weights)[N / 8][4], const bf16 *right) {
    const int lane = threadIdx.x % 32;
    const bf16 *from = right + lane % 16 * (D + 8) + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
        const uint32_t a[4] = {
            pack(weights[n][0], weights[n][1]), pack(weights[n][2], weights[n][3]),
            pack(weights[n + 1][0], weights[n + 1][1]), pack(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
        for (int column = 0; column < D; column += 16) {
            uint32_t b[4];
            load_turned(b, from + n * 8 * (D + 8) + column);
            multiply_add(sums[column / 8], a, {b[0], b[1]});
            multiply_add(sums[column / 8 + 1], a, {b[2], b[3]});
        }
    }
}

// The warp's rows of sums to rows of global memory; `to` gives null for a row that is none.
template <int D, class To> __device__ inline void write(const float (&sums)[D / 8][4], const float (&scales)[2], To to) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bf16 *out = to(row + 8 * half);
        if (!out) continue;
#pragma unroll
        for (int column = 0; column < D; column += 8)
            *reinterpret_cast<uint32_t *>(out + column + lane % 4 * 2) =
                pack(sums[column / 8][2 * half] * scales[half], sums[column / 8][2 * half + 1] * scales[half]);
    }
}

// One block a (tile of queries, head), those with the most keys first. tiles: first row, rows, list, end of the first row's keys; each
// row's end is one further.
template <int D, int N>
__device__ void attend_tiles(
    const bf16 *q, const bf16 *k, const bf16 *v, const uint32_t *tiles, const uint32_t *table, int size, int group, float scale,
    int window, bf16 *out, float *lse) {
    SHARED(bytes);
    bf16 *queries = reinterpret_cast<bf16 *>(bytes), *keys = queries + TILE * (D + 8), *values = keys + N * (D + 8);
    const int all = gridDim.y, head = blockIdx.y, heads = all / group, kv = head / group;
    const uint32_t *tile = tiles + 4 * (gridDim.x - 1 - blockIdx.x), *list = table + tile[2];
    const int64_t first_row = tile[0];
    const int rows = tile[1], end = tile[3], past = end + rows - 1;
    int places[PIECES<D, N>];
    auto fetch = [&](bf16 *to, const bf16 *from) {
        fill<D, N>(to, from, [&](int step) { return static_cast<int64_t>(places[step]); });
        end_group();
    };
    int base = first_seen(end, window);
    fill<D, TILE>(queries, q, [&](int step) {
        const int row = row_of_piece<D>(step);
        return row < rows ? (first_row + row) * all + head : -1;
    });
    find<D, N>(places, list, size, base, past, heads, kv);
    fetch(keys, k);
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16 + lane / 4;
    // Scores and their largest are in units of log 2.
    const float unit = scale * LOG2_E;
    float sums[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    for (; base < past; base += N) {
        wait_for_groups<0>();
        __syncthreads();
        fetch(values, v);
        find<D, N>(places, list, size, base + N, past, heads, kv);
        float scores[N / 8][4];
        against<D, N>(scores, queries, keys);
        __syncthreads();
        if (base + N < past) fetch(keys, k);
        else end_group();
        const bool whole = base + N <= end && window <= 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int own = end + mine + 8 * half;
            float largest = most[half];
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int at = 2 * half; at < 2 * half + 2; at++) {
                    const int entry = base + n * 8 + lane % 4 * 2 + at % 2;
                    const bool seen = whole || (entry < own && entry < past && (window <= 0 || entry >= own - window));
                    scores[n][at] = seen ? scores[n][at] * unit : -INFINITY;
                    largest = fmaxf(largest, scores[n][at]);
                }
            largest = max_of(largest, 4);
            // Nothing seen yet: any number instead of minus infinity gives weights of zero.
            const float from = largest == -INFINITY ? 0.0f : largest, shrink = power_of_two(most[half] - from);
            float sum = 0;
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int at = 2 * half; at < 2 * half + 2; at++) {
                    scores[n][at] = power_of_two(scores[n][at] - from);
                    sum += scores[n][at];
                }
            most[half] = largest;
            total[half] = total[half] * shrink + sum;
#pragma unroll
            for (int column = 0; column < D / 8; column++)
                sums[column][2 * half] *= shrink, sums[column][2 * half + 1] *= shrink;
        }
        // The values; the next keys may still be on their way.
        wait_for_groups<1>();
        __syncthreads();
        onto<D, N>(sums, scores, values);
    }
    float scales[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] = sum_of(total[half], 4);
        const int row = mine + 8 * half;
        scales[half] = 1.0f / total[half];
        if (lse && lane % 4 == 0 && row < rows) lse[(first_row + row) * all + head] = most[half] * LN_2 + __logf(total[half]);
    }
    write<D>(sums, scales, [&](int row) { return row < rows ? out + ((first_row + row) * all + head) * D : nullptr; });
}

// Gradient in the queries, one block a (tile of queries, head), tiles as above.
template <int D, int N>
__device__ void attend_dq_tiles(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dout, const float *lse, const float *pull, const uint32_t *tiles,
    const uint32_t *table, int size, int group, float scale, int window, bf16 *dq) {
    SHARED(bytes);
    // Keys and values of this turn and of the next.
    bf16 *queries = reinterpret_cast<bf16 *>(bytes), *pulled = queries + TILE * (D + 8), *turns = pulled + TILE * (D + 8);
    const int all = gridDim.y, head = blockIdx.y, heads = all / group, kv = head / group;
    const uint32_t *tile = tiles + 4 * (gridDim.x - 1 - blockIdx.x), *list = table + tile[2];
    const int64_t first_row = tile[0];
    const int rows = tile[1], end = tile[3], past = end + rows - 1;
    int places[PIECES<D, N>];
    auto fetch = [&](bf16 *to) {
        auto place = [&](int step) { return static_cast<int64_t>(places[step]); };
        fill<D, N>(to, k, place);
        fill<D, N>(to + N * (D + 8), v, place);
        end_group();
    };
    int base = first_seen(end, window);
    auto own_row = [&](int step) {
        const int row = row_of_piece<D>(step);
        return row < rows ? (first_row + row) * all + head : -1;
    };
    fill<D, TILE>(queries, q, own_row);
    fill<D, TILE>(pulled, dout, own_row);
    find<D, N>(places, list, size, base, past, heads, kv);
    fetch(turns);
    find<D, N>(places, list, size, base + N, past, heads, kv);
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16 + lane / 4;
    const float unit = scale * LOG2_E;
    float largest[2], own_pull[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = mine + 8 * half;
        const int64_t place = (first_row + row) * all + head;
        largest[half] = row < rows ? lse[place] * LOG2_E : 0.0f;
        own_pull[half] = row < rows ? pull[place] : 0.0f;
    }
    float sums[D / 8][4] = {};
    for (int turn = 0; base < past; base += N, turn ^= 1) {
        wait_for_groups<0>();
        __syncthreads();
        const bf16 *keys = turns + turn * 2 * N * (D + 8), *values = keys + N * (D + 8);
        if (base + N < past) {
            fetch(turns + (turn ^ 1) * 2 * N * (D + 8));
            find<D, N>(places, list, size, base + 2 * N, past, heads, kv);
        }
        float weights[N / 8][4], slopes[N / 8][4];
        against<D, N>(weights, queries, keys);
        against<D, N>(slopes, pulled, values);
        const bool whole = base + N <= end && window <= 0;
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int at = 0; at < 4; at++) {
                const int half = at / 2, own = end + mine + 8 * half, entry = base + n * 8 + lane % 4 * 2 + at % 2;
                const bool seen = whole || (entry < own && entry < past && (window <= 0 || entry >= own - window));
                const float weight = seen ? power_of_two(weights[n][at] * unit - largest[half]) : 0.0f;
                slopes[n][at] = weight * (slopes[n][at] - own_pull[half]) * scale;
            }
        onto<D, N>(sums, slopes, keys);
    }
    const float scales[2] = {1.0f, 1.0f};
    write<D>(sums, scales, [&](int row) { return row < rows ? dq + ((first_row + row) * all + head) * D : nullptr; });
}

// The blocks of queries that see a tile of keys, one after the other: of every run, of every head of the group.
template <int N> struct Seeing {
    const uint32_t *view, *end;
    int group, rows, window, member, base, run, ahead, first, last;

    // The run's row `at` sees entries up to ahead + at of the tile.
    __device__ void enter() {
        for (; view < end; view += 4) {
            run = view[1], ahead = static_cast<int>(view[3]) - static_cast<int>(view[2]);
            first = max(0, -ahead), last = window > 0 ? min(run, rows - 1 - ahead + window) : run;
            member = 0, base = first;
            if (base < last) return;
        }
    }
    __device__ bool some() const { return view < end; }
    __device__ void next() {
        base += N;
        if (base < last) return;
        base = first;
        if (++member == group) view += 4, enter();
    }
};

// Gradients in the keys and values, one block a (tile of at most 64 rows, key head); tiles and views as attend_dkv has them.
template <int D, int N>
__device__ void attend_dkv_tiles(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dout, const float *lse, const float *pull, const uint32_t *tiles,
    const uint32_t *views, int group, float scale, int window, bf16 *dk, bf16 *dv) {
    SHARED(bytes);
    // Queries, their gradients and two numbers of each, of this turn and of the next.
    constexpr int TURN = 2 * N * (D + 8);
    bf16 *keys = reinterpret_cast<bf16 *>(bytes), *values = keys + TILE * (D + 8), *turns = values + TILE * (D + 8);
    float *numbers = reinterpret_cast<float *>(turns + 2 * TURN);
    const int heads = gridDim.y, kv = blockIdx.y, all = heads * group;
    const uint32_t *tile = tiles + 4 * blockIdx.x;
    const int64_t first_row = tile[0];
    const int rows = tile[1];
    auto fetch = [&](int turn, const Seeing<N> &seeing) {
        const int base = seeing.base, run = seeing.run;
        const int64_t head = (static_cast<int64_t>(seeing.view[0]) + base) * all + kv * group + seeing.member;
        auto place = [&](int at) { return base + at < run ? head + static_cast<int64_t>(at) * all : -1; };
        auto place_of_piece = [&](int step) { return place(row_of_piece<D>(step)); };
        bf16 *to = turns + turn * TURN;
        fill<D, N>(to, q, place_of_piece);
        fill<D, N>(to + N * (D + 8), dout, place_of_piece);
        if (const int at = threadIdx.x; at < 2 * N) {
            const float *from = at < N ? lse : pull;
            const int64_t row = place(at % N);
            copy_later<4>(numbers + turn * 2 * N + at, from + max(row, static_cast<int64_t>(0)), row >= 0);
        }
        end_group();
    };
    Seeing<N> seeing{views + 4 * tile[2], views + 4 * (tile[2] + tile[3]), group, rows, window};
    seeing.enter();
    auto own_row = [&](int step) {
        const int row = row_of_piece<D>(step);
        return row < rows ? (first_row + row) * heads + kv : -1;
    };
    fill<D, TILE>(keys, k, own_row);
    fill<D, TILE>(values, v, own_row);
    if (seeing.some()) fetch(0, seeing);
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16 + lane / 4;
    const float unit = scale * LOG2_E;
    float key_sums[D / 8][4] = {}, value_sums[D / 8][4] = {};
    for (int turn = 0; seeing.some(); turn ^= 1) {
        wait_for_groups<0>();
        __syncthreads();
        const int base = seeing.base, ahead = seeing.ahead;
        seeing.next();
        if (seeing.some()) fetch(turn ^ 1, seeing);
        const bf16 *queries = turns + turn * TURN, *pulled = queries + N * (D + 8);
        const float *largest = numbers + turn * 2 * N, *own_pull = largest + N;
        float weights[N / 8][4], slopes[N / 8][4];
        against<D, N>(weights, keys, queries);
        against<D, N>(slopes, values, pulled);
        // Rows that are none are zeros, and what is made of them is not written.
        const bool whole = TILE - 1 <= ahead + base && window <= 0;
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int at = 0; at < 4; at++) {
                const int entry = mine + 8 * (at / 2), column = n * 8 + lane % 4 * 2 + at % 2, query = base + column;
                const bool seen = whole || (entry <= ahead + query && (window <= 0 || entry > ahead + query - window));
                weights[n][at] = seen ? power_of_two(weights[n][at] * unit - largest[column] * LOG2_E) : 0.0f;
                slopes[n][at] = weights[n][at] * (slopes[n][at] - own_pull[column]) * scale;
            }
        onto<D, N>(value_sums, weights, pulled);
        onto<D, N>(key_sums, slopes, queries);
    }
    const float scales[2] = {1.0f, 1.0f};
    auto to = [&](bf16 *out, int row) { return row < rows ? out + ((first_row + row) * heads + kv) * D : nullptr; };
    write<D>(key_sums, scales, [&](int row) { return to(dk, row); });
    write<D>(value_sums, scales, [&](int row) { return to(dv, row); });
}

#define FORWARD(D, N) \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) attend_tiles_##D( \
        const bf16 *q, const bf16 *k, const bf16 *v, const uint32_t *tiles, const uint32_t *table, int size, int group, float scale, \
        int window, bf16 *out, float *lse) { \
        begin(); \
        attend_tiles<D, N>(q, k, v, tiles, table, size, group, scale, window, out, lse); \
    }
#define BACKWARD(D, N) \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) attend_dq_tiles_##D( \
        const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dout, const float *lse, const float *pull, const uint32_t *tiles, \
        const uint32_t *table, int size, int group, float scale, int window, bf16 *dq) { \
        begin(); \
        attend_dq_tiles<D, N>(q, k, v, dout, lse, pull, tiles, table, size, group, scale, window, dq); \
    } \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) attend_dkv_tiles_##D( \
        const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dout, const float *lse, const float *pull, const uint32_t *tiles, \
        const uint32_t *views, int group, float scale, int window, bf16 *dk, bf16 *dv) { \
        begin(); \
        attend_dkv_tiles<D, N>(q, k, v, dout, lse, pull, tiles, views, group, scale, window, dk, dv); \
    }
// Keys at once as the sizes of registers and shared memory have it: tile_bytes in attention.rs says the same.
FORWARD(64, 64)
FORWARD(128, 64)
FORWARD(256, 32)
BACKWARD(64, 32)
BACKWARD(128, 32)
