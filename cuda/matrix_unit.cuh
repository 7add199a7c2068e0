// SPDX-License-Identifier: MIT
// Tensor cores: a warp's product of small matrices of 16-bit numbers, sums in float32. sm_80 and above;
// before it nothing happens.
#pragma once
#include "numbers.cuh"

template <class T>
constexpr bool BRAIN = false;
template <>
constexpr bool BRAIN<bfloat16> = true;

// c (16, 8) += a (16, 16) b (16, 8), a and b bfloat16 or float16. Lane 4 g + t has neighbours of the inner
// axis in a word: a[g] and a[g + 8], first and second half, b[g] likewise, c[g, 2 t], c[g, 2 t + 1],
// c[g + 8, 2 t], c[g + 8, 2 t + 1].
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                         unsigned a3, unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
#define MULTIPLY(type)                                                                            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, "          \
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                          \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
    if constexpr (BRAIN<T>)
        MULTIPLY("bf16");
    else
        MULTIPLY("f16");
#undef MULTIPLY
#endif
}

// a of `multiply` from shared memory, lane l with the address of 16 bytes: half l / 16 of row l % 16.
__device__ __forceinline__ void load_matrix(unsigned (&a)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}
