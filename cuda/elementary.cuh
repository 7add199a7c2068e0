// SPDX-License-Identifier: MIT
// Elementary functions of real numbers, float32 and float64, right to a few units in the last place
// wherever the textbook form loses digits.
#pragma once
#include "numbers.cuh"

// e^x = power(x * LOG2E<R>): a constant factor of x can take the conversion with it.
template <class R>
constexpr R LOG2E = R(1);
template <>
constexpr float LOG2E<float> = 1.44269504f;

__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ double power(double x) { return exp(x); }

// x log2 e in two parts, so that a large x loses nothing; x in [-10^30, 88.7].
__device__ __forceinline__ float exponential_within(float x) {
    const float y = mul(x, LOG2E<float>);
    const float rest = fma(x, 1.92596299e-8f, fma(x, LOG2E<float>, -y));
    const float p = power(y);
    return fma(p, mul(rest, 0.693147182f), p);
}
__device__ __forceinline__ double exponential_within(double x) { return exp(x); }
__device__ __forceinline__ float exponential(float x) {
    return exponential_within(fminf(fmaxf(x, -104.0f), 88.72f));
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }

__device__ __forceinline__ float inverse(float x) {  // x in [2^-126, 2^126], to one ulp
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ double inverse(double x) { return 1 / x; }

template <class R>
__device__ __forceinline__ R sigmoid(R x) {
    return inverse(add(R(1), exponential(-x)));
}

// log(1 + x) for x in [0, 1]: a polynomial fitted to log1p(x)/x at Chebyshev points, 2.2 x 2^-24.
__device__ __forceinline__ float log1p_unit(float x) {
    float p = -0.00317605701f;
    p = fma(p, x, 0.0195425265f);
    p = fma(p, x, -0.0563736111f);
    p = fma(p, x, 0.105436236f);
    p = fma(p, x, -0.152696669f);
    p = fma(p, x, 0.196632743f);
    p = fma(p, x, -0.249516159f);
    p = fma(p, x, 0.333297104f);
    p = fma(p, x, -0.499998927f);
    return fma(mul(p, x), x, x);
}
__device__ __forceinline__ double log1p_unit(double x) { return log1p(x); }

template <class R>
__device__ __forceinline__ R softplus(R x) {
    return add(x < 0 ? R(0) : x, log1p_unit(exponential_within(fmax(-fabs(x), R(-104)))));
}

// e^x - 1 for |x| <= 1/2: a polynomial fitted to (e^x - 1)/x at Chebyshev points, 2 x 2^-24.
__device__ __forceinline__ float exponential_minus_one_near_zero(float x) {
    float p = 0.000199621762f;
    p = fma(p, x, 0.00139977736f);
    p = fma(p, x, 0.00833318196f);
    p = fma(p, x, 0.0416653045f);
    p = fma(p, x, 0.166666672f);
    p = fma(p, x, 0.5f);
    return fma(mul(p, x), x, x);
}
__device__ __forceinline__ double exponential_minus_one_near_zero(double x) { return expm1(x); }

__device__ __forceinline__ float exponential_minus_one(float x) {
    const float large = add(power(mul(x, LOG2E<float>)), -1.0f);
    return fabsf(x) < 0.5f ? exponential_minus_one_near_zero(x) : large;
}
__device__ __forceinline__ double exponential_minus_one(double x) { return expm1(x); }

__device__ __forceinline__ void sine_cosine_of_turns(float x, float& s, float& c) {  // of pi x
    sincospif(x, &s, &c);
}
__device__ __forceinline__ void sine_cosine_of_turns(double x, double& s, double& c) {
    sincospi(x, &s, &c);
}

// sin(2 pi x) and 1 - cos(2 pi x) from half of the angle: nothing cancels, but the signs of its sine and
// cosine do. Polynomials in r^2 <= 1/4 fitted at Chebyshev points.
__device__ __forceinline__ void sine_and_bend_of_turns(float x, float& sine, float& bend) {
    const float r = add(x, -rintf(x)), t = mul(r, r);
    float s = 0.0776576623f;
    s = fma(s, t, -0.598291278f);
    s = fma(s, t, 2.55007744f);
    s = fma(s, t, -5.1677103f);
    s = fma(r, 3.14159274f, mul(fma(s, t, -8.74227766e-8f), r));  // pi in two parts
    float c = -0.0246275142f;
    c = fma(c, t, 0.235074565f);
    c = fma(c, t, -1.33524001f);
    c = fma(c, t, 4.05871153f);
    c = fma(c, t, -4.93480206f);
    c = fma(c, t, 1.0f);
    const float twice = add(s, s);
    sine = mul(twice, c);
    bend = mul(twice, s);
}
__device__ __forceinline__ void sine_and_bend_of_turns(double x, double& sine, double& bend) {
    double s, c;
    sincospi(x, &s, &c);
    sine = mul(2 * s, c);
    bend = mul(2 * s, s);
}
