// SPDX-License-Identifier: MIT
// Number types: how each dtype of PyTorch is stored, the type it is computed in, and arithmetic.
//
// A kernel is compiled for one dtype, given as -DDTYPE=float32 ... complex128. Arithmetic is spelled
// add(x, y), mul(x, y), fma(x, y, z) = x y + z and conj(x), the same for real and complex numbers;
// every rounding is explicit, so that a compiler's choice to contract changes no bit.
// No CUDA header is included: NVRTC alone compiles everything here.
#pragma once

using float32 = float;
using float64 = double;

struct alignas(2) bfloat16 {
    unsigned short bits;
};

struct alignas(2) float16 {
    unsigned short bits;
};

template <class Real>
struct alignas(2 * sizeof(Real)) Complex {
    Real re, im;
};

using complex64 = Complex<float>;
using complex128 = Complex<double>;

// ------------------------------------------------------------------------------ arithmetic

__device__ __forceinline__ float add(float x, float y) { return __fadd_rn(x, y); }
__device__ __forceinline__ double add(double x, double y) { return __dadd_rn(x, y); }
__device__ __forceinline__ float mul(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double mul(double x, double y) { return __dmul_rn(x, y); }
__device__ __forceinline__ float fma(float x, float y, float z) { return __fmaf_rn(x, y, z); }
__device__ __forceinline__ double fma(double x, double y, double z) { return __fma_rn(x, y, z); }
__device__ __forceinline__ float conj(float x) { return x; }
__device__ __forceinline__ double conj(double x) { return x; }

template <class R>
__device__ __forceinline__ Complex<R> add(Complex<R> x, Complex<R> y) {
    return {add(x.re, y.re), add(x.im, y.im)};
}

template <class R>
__device__ __forceinline__ Complex<R> mul(Complex<R> x, Complex<R> y) {
    return {fma(x.re, y.re, -mul(x.im, y.im)), fma(x.re, y.im, mul(x.im, y.re))};
}

template <class R>
__device__ __forceinline__ Complex<R> fma(Complex<R> x, Complex<R> y, Complex<R> z) {
    return {fma(x.re, y.re, fma(-x.im, y.im, z.re)), fma(x.re, y.im, fma(x.im, y.re, z.im))};
}

template <class R>
__device__ __forceinline__ Complex<R> conj(Complex<R> x) {
    return {x.re, -x.im};
}

template <class T>
struct Constant {
    static __device__ __forceinline__ T zero() { return T(0); }
    static __device__ __forceinline__ T one() { return T(1); }
};
template <class R>
struct Constant<Complex<R>> {
    static __device__ __forceinline__ Complex<R> zero() { return {R(0), R(0)}; }
    static __device__ __forceinline__ Complex<R> one() { return {R(1), R(0)}; }
};

// A product P of many factors. Real ones keep the rounding errors of hi in lo: the same factor time
// after time (a constant coefficient) errs in one direction, by half an ulp a factor otherwise.
template <class S>
struct Product {
    S hi;

    static __device__ __forceinline__ Product one() { return {Constant<S>::one()}; }
    __device__ __forceinline__ void times(S c) { hi = mul(c, hi); }
    __device__ __forceinline__ void times(Product c) { times(c.hi); }
    __device__ __forceinline__ S value() const { return hi; }
    // P x + y
    __device__ __forceinline__ S map(S x, S y) const { return fma(hi, x, y); }
};

template <class R>
struct alignas(2 * sizeof(R)) RealProduct {
    R hi, lo;

    __device__ __forceinline__ void times(R c) {
        const R next = mul(c, hi);
        lo = fma(c, lo, fma(c, hi, -next));
        hi = next;
    }
    __device__ __forceinline__ void times(RealProduct c) {
        const R next = mul(c.hi, hi);
        lo = fma(c.hi, lo, fma(c.lo, hi, fma(c.hi, hi, -next)));
        hi = next;
    }
    // Where hi has overflowed or x is infinite, what lo adds is not a number.
    __device__ __forceinline__ R value() const {
        const R sum = add(hi, lo);
        return sum == sum ? sum : hi;
    }
    __device__ __forceinline__ R map(R x, R y) const {
        const R rough = fma(hi, x, y), fine = fma(lo, x, rough);
        return fine == fine ? fine : rough;
    }
};
template <>
struct Product<float> : RealProduct<float> {
    static __device__ __forceinline__ Product one() { return {{1, 0}}; }
};
template <>
struct Product<double> : RealProduct<double> {
    static __device__ __forceinline__ Product one() { return {{1, 0}}; }
};

#ifdef COMPENSATED  // complex products carry theirs too
template <class R>
struct Product<Complex<R>> {
    using S = Complex<R>;
    S hi, lo;

    static __device__ __forceinline__ Product one() {
        return {Constant<S>::one(), Constant<S>::zero()};
    }
    __device__ __forceinline__ void times(S c) { times(Product{c, Constant<S>::zero()}); }
    __device__ __forceinline__ void times(Product c) {
        S next, error;
        sum_of_products(hi.re, c.hi.re, -hi.im, c.hi.im, next.re, error.re);
        sum_of_products(hi.re, c.hi.im, hi.im, c.hi.re, next.im, error.im);
        lo = fma(c.hi, lo, fma(c.lo, hi, error));
        hi = next;
    }
    __device__ __forceinline__ S value() const {
        const S sum = add(hi, lo);
        return {sum.re == sum.re ? sum.re : hi.re, sum.im == sum.im ? sum.im : hi.im};
    }
    __device__ __forceinline__ S map(S x, S y) const {
        const S rough = fma(hi, x, y), fine = fma(lo, x, rough);
        return {fine.re == fine.re ? fine.re : rough.re, fine.im == fine.im ? fine.im : rough.im};
    }

   private:
    // a b + c d = sum + error
    static __device__ __forceinline__ void sum_of_products(R a, R b, R c, R d, R& sum, R& error) {
        const R p = mul(a, b), q = mul(c, d);
        sum = add(p, q);
        const R back = add(sum, -p);
        const R rest = add(add(p, -add(sum, -back)), add(q, -back));
        error = add(add(fma(a, b, -p), fma(c, d, -q)), rest);
    }
};
#endif

// ------------------------------------------------------------------------------ storage and state

// State is what sums and recurrences run in: the dtype itself, but at least float32.
template <class T>
struct StateOf {
    using type = T;
};
template <>
struct StateOf<bfloat16> {
    using type = float;
};
template <>
struct StateOf<float16> {
    using type = float;
};

template <class T>
__device__ __forceinline__ T widen(T x) {
    return x;
}

__device__ __forceinline__ float widen(bfloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

__device__ __forceinline__ float widen(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <class T, class State>
__device__ __forceinline__ T narrow(State x) {
    return x;
}

// Round to nearest even. sm_80 has an instruction; NaN stays NaN where bits would round it away.
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16, float>(float x) {
#if __CUDA_ARCH__ >= 800
    unsigned short y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return {y};
#else
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
__device__ __forceinline__ float16 narrow<float16, float>(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return {y};
}
