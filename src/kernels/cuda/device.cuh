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

// The first words of every kernel: what earlier launches do is done from here on, and the next launch may get ready, which begins before
// this one ends. Before it a kernel reads nothing that another writes.
__device__ inline void begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

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

// Four matrices of (8, 8) out of shared memory. Lanes 8i .. 8i + 7 name the rows of matrix i, 16 bytes aligned; lane 4g + t gets, of
// each, columns 2t and 2t + 1 of row g, or of the transpose's row g. Every lane of the warp must call it.
__device__ inline void load_matrices(uint32_t (&to)[4], const bf16 *row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ inline void load_turned(uint32_t (&to)[4], const bf16 *row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}

// BYTES (4 or 16, and aligned so) to shared memory, zeros where there are none. They are there once a wait leaves no more groups than came
// after theirs, and for other threads after a barrier behind that.
template <int BYTES> __device__ inline void copy_later(void *to, const void *from, bool some) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const int bytes = some ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void end_group() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int LEFT> __device__ inline void wait_for_groups() { asm volatile("cp.async.wait_group %0;\n" ::"n"(LEFT) : "memory"); }

__device__ inline float power_of_two(float exponent) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(exponent));
    return power;
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
    } else {
        for (int at = 0; at < VEC; at += 4) {
            uint2 four = *reinterpret_cast<const uint2 *>(from + at);
            to[at] = __uint_as_float(four.x << 16), to[at + 1] = __uint_as_float(four.x & 0xffff0000u);
            to[at + 2] = __uint_as_float(four.y << 16), to[at + 3] = __uint_as_float(four.y & 0xffff0000u);
        }
    }
}

// Eight numbers that lie on a multiple of 16 bytes, written at once.
__device__ inline void put(float *to, const float (&from)[8]) {
    for (int at = 0; at < 8; at += 4)
        *reinterpret_cast<float4 *>(to + at) = {from[at], from[at + 1], from[at + 2], from[at + 3]};
}
__device__ inline void put(bf16 *to, const float (&from)[8]) {
    *reinterpret_cast<uint4 *>(to) = {pack(from[0], from[1]), pack(from[2], from[3]), pack(from[4], from[5]), pack(from[6], from[7])};
}

// What a thread has of `count` numbers: eight, or one after the other where they lie on no multiples of 16 bytes or end within.
template <class Eight, class One> __device__ inline void each_of(int64_t count, int vectors, Eight eight, One one) {
    const int64_t first = 8 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
    if (vectors && first + 8 <= count) return eight(first);
    for (int64_t at = first; at < min(first + 8, count); at++) one(at);
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
