// What every kernel stands on: the two number types, sums over threads, and one product of the tensor cores.
//
// Compiled by nvcc for a GPU, and by a C++ compiler against emulate/device.h for the tests. Shared memory is dynamic throughout, so that
// the emulation can watch its borders.
#pragma once

typedef unsigned long long Whole; // what atomics take

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <stdint.h>
typedef __nv_bfloat16 bf16;
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ inline float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }
__device__ inline Whole shuffle_xor(Whole value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// d += a·b for a (16, 16) by (16, 8) product of bf16. Lane 4g + t of the warp holds, for rows g and g + 8 of a, columns 2t, 2t + 1 and
// those 8 further; for column g of b, rows 2t, 2t + 1 and those 8 further; of d, columns 2t and 2t + 1 in rows g and g + 8.
// Every lane of the warp must call it.
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The b of multiply_add out of shared memory whose rows, `pitch` apart and 16 bytes aligned, are the rows of b.
__device__ inline void turned_operand(uint32_t (&b)[2], const bf16 *rows, int pitch) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(rows + (threadIdx.x & 15) * pitch));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n" : "=r"(b[0]), "=r"(b[1]) : "r"(at) : "memory");
}
#else
#include "emulate/device.h"
#endif

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bf16 value) { return __bfloat162float(value); }

template <class T> __device__ inline T from_float(float value);
template <> __device__ inline float from_float<float>(float value) { return value; }
template <> __device__ inline bf16 from_float<bf16>(float value) { return __float2bfloat16(value); }

// Two numbers as one operand register, the first in the low half.
__device__ inline uint32_t pack(float low, float high) {
    bf16 pair[2] = {__float2bfloat16(low), __float2bfloat16(high)};
    return *reinterpret_cast<uint32_t *>(pair);
}

// VEC numbers that lie on a multiple of their own size, read at once.
template <int VEC> __device__ inline void read(const float *from, float (&to)[VEC]) {
    for (int at = 0; at < VEC; at += 4) {
        float4 four = *reinterpret_cast<const float4 *>(from + at);
        to[at] = four.x, to[at + 1] = four.y, to[at + 2] = four.z, to[at + 3] = four.w;
    }
}
template <int VEC> __device__ inline void read(const bf16 *from, float (&to)[VEC]) {
    if constexpr (VEC % 8 == 0) {
        for (int at = 0; at < VEC; at += 8) {
            const uint4 eight = *reinterpret_cast<const uint4 *>(from + at);
            const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
            for (int pair = 0; pair < 4; pair++)
                to[at + 2 * pair] = __uint_as_float(pairs[pair] << 16), to[at + 2 * pair + 1] = __uint_as_float(pairs[pair] & 0xffff0000u);
        }
        return;
    }
    for (int at = 0; at < VEC; at += 4) {
        uint2 four = *reinterpret_cast<const uint2 *>(from + at);
        to[at] = __uint_as_float(four.x << 16), to[at + 1] = __uint_as_float(four.x & 0xffff0000u);
        to[at + 2] = __uint_as_float(four.y << 16), to[at + 3] = __uint_as_float(four.y & 0xffff0000u);
    }
}

// Sum and maximum over `lanes` neighbours, a power of two. Every lane of the warp must call it.
__device__ inline float sum_of(float value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value += shuffle_xor(value, step);
    return value;
}
__device__ inline float max_of(float value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value = fmaxf(value, shuffle_xor(value, step));
    return value;
}

// Over all threads of a block of whole warps; `scratch` holds one number a warp. Every thread must call it.
__device__ inline float block_sum(float value, float *scratch) {
    value = sum_of(value, 32);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; warp++) total += scratch[warp];
    return total;
}
__device__ inline float block_max(float value, float *scratch) {
    value = max_of(value, 32);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float largest = scratch[0];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; warp++) largest = fmaxf(largest, scratch[warp]);
    return largest;
}
