// SPDX-License-Identifier: MIT
// What the kernels of S4D's scan share: arguments, and the arithmetic of a state with a real input.
//
// Compiled for DTYPE of sequences and STATE (float32 ... complex128), the dtype of a and v.
#pragma once
#include "numbers.cuh"

using T = DTYPE;
using Real = typename StateOf<T>::type;
using State = STATE;
using Number = Constant<State>;

// ------------------------------------------------------------------------------ real times state

// a s + u for a real u
template <class R>
__device__ __forceinline__ R advance(R a, R s, R u) {
    return fma(a, s, u);
}
template <class R>
__device__ __forceinline__ Complex<R> advance(Complex<R> a, Complex<R> s, R u) {
    return {fma(a.re, s.re, fma(-a.im, s.im, u)), fma(a.re, s.im, mul(a.im, s.re))};
}

// Re(v s), and sum + Re(v s)
template <class R>
__device__ __forceinline__ R real_part(R v, R s) {
    return mul(v, s);
}
template <class R>
__device__ __forceinline__ R real_part(Complex<R> v, Complex<R> s) {
    return fma(-v.im, s.im, mul(v.re, s.re));
}
template <class R>
__device__ __forceinline__ R real_part(R v, R s, R sum) {
    return fma(v, s, sum);
}
template <class R>
__device__ __forceinline__ R real_part(Complex<R> v, Complex<R> s, R sum) {
    return fma(-v.im, s.im, fma(v.re, s.re, sum));
}

// sum + u s for a real u
template <class R>
__device__ __forceinline__ R scaled(R u, R s, R sum) {
    return fma(u, s, sum);
}
template <class R>
__device__ __forceinline__ Complex<R> scaled(R u, Complex<R> s, Complex<R> sum) {
    return {fma(u, s.re, sum.re), fma(u, s.im, sum.im)};
}

template <class R>
__device__ __forceinline__ bool is_zero(R x) {
    return x == R(0);
}
template <class R>
__device__ __forceinline__ bool is_zero(Complex<R> x) {
    return x.re == R(0) && x.im == R(0);
}

// ------------------------------------------------------------------------------ arguments

struct Bits {
    const unsigned char* data;  // null: nothing is reset
    long long outer, inner, time;
};

struct Size {
    long long length, channels, states, inner;
    long long alike;              // rows that share a and v
    long long units, groups;      // warps that have work; of a row and segment
    long long segment, segments;  // steps of one, and how many a row has
    long long onward;             // from a step of y and du to the next one of the forward
    long long wide;               // bits: the sequence can be copied 16 bytes at a time
};

struct Common {
    const State *a, *v;
    const long long* lengths;  // null: all steps
    Bits reset;
    Size size;
};

__device__ __forceinline__ long long smaller(long long x, long long y) { return x < y ? x : y; }

// Steps of a row that count.
__device__ __forceinline__ long long end_of(const Common& p, long long row) {
    if (!p.lengths) return p.size.length;
    const long long n = p.lengths[row];
    return n < 0 ? 0 : smaller(n, p.size.length);
}
