// SPDX-License-Identifier: MIT
// Loads and stores: packs of neighbouring numbers, asynchronous copies into shared memory, the flags by
// which blocks of one launch hand values to each other, and launches that overlap.
#pragma once

template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
    using type = unsigned short;
};
template <>
struct WordOf<4> {
    using type = unsigned;
};
template <>
struct WordOf<8> {
    using type = uint2;
};
template <>
struct WordOf<16> {
    using type = uint4;
};

// V neighbouring numbers, in one access of sizeof(T) * V = 2, 4, 8 or 16 bytes.
template <class T, int V>
struct Pack {
    using Word = typename WordOf<int(sizeof(T)) * V>::type;
    union {
        Word word;
        T item[V];
    };

    __device__ __forceinline__ Pack() {}

    static __device__ __forceinline__ Pack load(const T* p) {
        Pack x;
        x.word = *reinterpret_cast<const Word*>(p);
        return x;
    }

    __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Word*>(p) = word; }

    // `load` from global memory of what nobody else reads: it pushes nothing out of the L1 cache.
    static __device__ __forceinline__ Pack load_once(const T* p) {
        if constexpr (sizeof(Word) == 16) {
            Pack x;
            uint4& w = *reinterpret_cast<uint4*>(&x.word);
            asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                         : "l"(p));
            return x;
        } else {
            return load(p);
        }
    }

    // `store` to global memory, in one access for certain: the compiler may take that one apart.
    __device__ __forceinline__ void put(T* p) const {
        if constexpr (sizeof(Word) == 16)
            asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word.x),
                         "r"(word.y), "r"(word.z), "r"(word.w)
                         : "memory");
        else if constexpr (sizeof(Word) == 8)
            asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(word.x), "r"(word.y)
                         : "memory");
        else
            store(p);
    }
};

// ------------------------------------------------------------------------------ global to shared

// Copy 2, 4, 8 or 16 bytes; done after `wait`. From sm_80 on the copy runs by itself; two bytes, and
// everything on sm_75, are an ordinary load and store.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    if constexpr (bytes >= 4) {
        const unsigned shared = unsigned(__cvta_generic_to_shared(to));
        if constexpr (bytes == 16)
            asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(shared),
                         "l"(from)
                         : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from),
                         "n"(bytes)
                         : "memory");
        return;
    }
#endif
    using Word = typename WordOf<bytes>::type;
    *static_cast<Word*>(to) = *static_cast<const Word*>(from);
}

// Copy 16 bytes asynchronously, or write zeros; done after `wait`. sm_80 and above.
__device__ __forceinline__ void copy_or_zero(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
    const unsigned shared = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
#endif
}

// Wait for all copies of this thread.
__device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------ between blocks

// A number for another block of the same launch: every 32 bits of it travel in one 64-bit word with a
// tag, so that no fence is needed: who sees the tag sees the number. Words start as zeros; the halves
// of a number lie `apart` words from each other.
template <class T>
__device__ __forceinline__ void tell(unsigned long long* word, int apart, T value, unsigned tag) {
    constexpr int HALVES = sizeof(T) / 4;
    union {
        T number;
        unsigned half[HALVES];
    } x;
    x.number = value;
#pragma unroll
    for (int i = 0; i < HALVES; ++i) {
        const unsigned long long w = (unsigned long long)tag << 32 | x.half[i];
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word + i * apart), "l"(w) : "memory");
    }
}

// Return the tag, or zero if nothing is there yet or the halves are of two numbers.
template <class T>
__device__ __forceinline__ unsigned hear(const unsigned long long* word, int apart, T& value) {
    constexpr int HALVES = sizeof(T) / 4;
    union {
        T number;
        unsigned half[HALVES];
    } x;
    unsigned long long w[HALVES];
#pragma unroll
    for (int i = 0; i < HALVES; ++i)
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(w[i]) : "l"(word + i * apart) : "memory");
    unsigned tag = unsigned(w[0] >> 32);
#pragma unroll
    for (int i = 0; i < HALVES; ++i) {
        x.half[i] = unsigned(w[i]);
        if (unsigned(w[i] >> 32) != tag) tag = 0;
    }
    value = x.number;
    return tag;
}

// ------------------------------------------------------------------------------ between launches

// A kernel whose launcher says `overlaps` begins while the one before it on the stream still runs. All its
// threads call `let_next_begin`, at the top, and `await_previous` before anything is read or written that
// any kernel writes. Launched otherwise, and before sm_90, these do nothing.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Both.
__device__ __forceinline__ void overlap_previous() {
    let_next_begin();
    await_previous();
}
