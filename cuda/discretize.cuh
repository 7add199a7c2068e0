// SPDX-License-Identifier: MIT
// One state's decay and gain from its diagonal entry A of the state matrix and the steps of time.
//
//     SCHEME     decay A_bar              gain
//     MAMBA      exp(dd A)                di
//     DIRAC      exp(dd A)                1
//     ZOH        exp(dd A)                di phi1(di A), phi1(y) = (e^y - 1)/y
//     BILINEAR   (1 + dd A/2)/(1 - dd A/2)   di/(1 - di A/2)
//
// dd is the step of the decay, di that of the input; SPLIT says that they may differ. The gain of MAMBA
// and DIRAC is the same for all states of a channel, so it is no part of `Factors`: callers put it into
// the input. Slopes are what the backward pass needs. With EXACT_ANGLES the angle of exp(dd A) keeps
// what its two roundings lose, which counts where the angle is large.
//
// Source: the formulas in `lrnnx_core.discretize`; Gu & Dao 2023 (Mamba), arXiv:2312.00752, section 2.
#pragma once
#include "elementary.cuh"

#define MAMBA 0
#define DIRAC 1
#define ZOH 2
#define BILINEAR 3
#define NONE 4  // A is discrete already: no Pole's business

constexpr bool GAIN = SCHEME == ZOH || SCHEME == BILINEAR;  // a gain of each state's own

template <class State>
struct Factors {
    State decay, gain;
};

template <class State>
struct Slopes {
    State decay;     // d decay / d(dd A)
    State gain_dt;   // d gain / d di
    State gain_A;    // d gain / d A
};

template <class R>
__device__ __forceinline__ R real(R x) {
    return x;
}
template <class R>
__device__ __forceinline__ R real(Complex<R> x) {
    return x.re;
}

__device__ __forceinline__ float scale(float x, float y) { return mul(x, y); }
__device__ __forceinline__ double scale(double x, double y) { return mul(x, y); }
template <class R>
__device__ __forceinline__ Complex<R> scale(Complex<R> x, R y) {
    return {mul(x.re, y), mul(x.im, y)};
}

// x y + z for a real y
__device__ __forceinline__ float scale_add(float x, float y, float z) { return fma(x, y, z); }
__device__ __forceinline__ double scale_add(double x, double y, double z) { return fma(x, y, z); }
template <class R>
__device__ __forceinline__ Complex<R> scale_add(Complex<R> x, R y, Complex<R> z) {
    return {fma(x.re, y, z.re), fma(x.im, y, z.im)};
}

// sum_k x^k (k + 1)/(k + 2)!, the derivative of phi1, for |x| < 1/2
template <class R>
struct Phi1Slope {
    static constexpr int TERMS = sizeof(R) == 4 ? 8 : 15;
    static __device__ __forceinline__ R term(int k) {
        constexpr double C[15] = {1.0 / 2,         1.0 / 3,          1.0 / 8,          1.0 / 30,
                                  1.0 / 144,       1.0 / 840,        1.0 / 5760,       1.0 / 45360,
                                  1.0 / 403200,    1.0 / 3991680,    1.0 / 43545600,   1.0 / 518918400,
                                  1.0 / 6706022400.0, 1.0 / 93405312000.0, 1.0 / 1394852659200.0};
        return R(C[k]);
    }
};
template <class R>
__device__ __forceinline__ R phi1_slope_series(R x) {
    R p = R(0);
#pragma unroll
    for (int k = Phi1Slope<R>::TERMS - 1; k >= 0; --k) p = add(mul(p, x), Phi1Slope<R>::term(k));
    return p;
}
// The remainder of the division by (z - x)(z - conj x), whose coefficients are real, at z = x.
template <class R>
__device__ __forceinline__ Complex<R> phi1_slope_series(Complex<R> x) {
    const R trace = add(x.re, x.re), norm = fma(x.re, x.re, mul(x.im, x.im));
    constexpr int LAST = Phi1Slope<R>::TERMS - 1;
    R high = Phi1Slope<R>::term(LAST), low = fma(trace, high, Phi1Slope<R>::term(LAST - 1));
#pragma unroll
    for (int k = LAST - 2; k > 0; --k) {
        const R next = fma(trace, low, fma(-norm, high, Phi1Slope<R>::term(k)));
        high = low;
        low = next;
    }
    return {fma(low, x.re, fma(-norm, high, Phi1Slope<R>::term(0))), mul(low, x.im)};
}

// ------------------------------------------------------------------------------ real A

template <class R>
struct Pole {
    using State = R;
    R a;    // A; times log2 e where only the exponential of it is taken
    R inv;  // ZOH: 1/A, 0 for A = 0

    __device__ __forceinline__ explicit Pole(R A = R(0)) {
        a = SCHEME == MAMBA || SCHEME == DIRAC ? mul(A, LOG2E<R>) : A;
        inv = A == 0 ? R(0) : R(1) / A;
    }

    // add_times_conj: sum + Re(x conj(A)), but for a factor that `unscale` puts right
    static __device__ __forceinline__ R unscale(R sum) {
        return SCHEME == MAMBA || SCHEME == DIRAC ? mul(sum, R(1) / LOG2E<R>) : sum;
    }

    __device__ __forceinline__ R add_times_conj(R x, R sum) const { return fma(x, a, sum); }

    __device__ __forceinline__ Factors<R> factors(R dd, R di) const {
        Factors<R> f;
        if constexpr (SCHEME == MAMBA || SCHEME == DIRAC) {
            f.decay = power(mul(dd, a));
            f.gain = R(1);
        } else if constexpr (SCHEME == ZOH) {
            const R y = mul(di, a), e = exponential_minus_one(y);
            f.decay = SPLIT ? exponential(mul(dd, a)) : add(e, R(1));
            f.gain = y == 0 ? di : mul(e, inv);
        } else {
            const R x = mul(dd, mul(a, R(0.5))), q = R(1) / add(R(1), -x);
            f.decay = fma(x, q, q);
            f.gain = SPLIT ? di / fma(di, mul(a, R(-0.5)), R(1)) : mul(di, q);
        }
        return f;
    }

    __device__ __forceinline__ Slopes<R> slopes(R dd, R di, const Factors<R>& f) const {
        Slopes<R> s;
        s.decay = f.decay;
        s.gain_dt = s.gain_A = R(0);
        if constexpr (SCHEME == ZOH) {
            const R y = mul(di, a);
            s.gain_dt = SPLIT ? exponential(y) : f.decay;
            const R series = mul(mul(di, di), phi1_slope_series(y));
            const R closed = mul(fma(di, s.gain_dt, -f.gain), inv);
            s.gain_A = fabs(y) < R(0.5) ? series : closed;
        } else if constexpr (SCHEME == BILINEAR) {
            const R p = R(1) / fma(dd, mul(a, R(-0.5)), R(1));
            const R q = SPLIT ? R(1) / fma(di, mul(a, R(-0.5)), R(1)) : p;
            s.decay = mul(p, p);
            s.gain_dt = mul(q, q);
            s.gain_A = mul(mul(R(0.5), mul(di, di)), s.gain_dt);
        }
        return s;
    }
};

// ------------------------------------------------------------------------------ complex A

template <class R>
__device__ __forceinline__ Complex<R> inverse(Complex<R> x) {
    const R n = R(1) / fma(x.re, x.re, mul(x.im, x.im));
    return {mul(x.re, n), -mul(x.im, n)};
}

template <class R>
struct Pole<Complex<R>> {
    using State = Complex<R>;
    State a, inv;
    R turns;  // Im A / (2 pi): half of the angle in units of pi
#ifdef EXACT_ANGLES
    R turns_rest;
#endif

    // A = 0 is taken as a number so small that its exponential is 1 and the gain its step. Under NONE, A
    // is the decay itself, and 0 stays 0.
    __device__ __forceinline__ explicit Pole(State A = Constant<State>::zero()) {
        const bool zero = SCHEME != NONE && A.re == 0 && A.im == 0;
        a = zero ? State{R(sizeof(R) == 4 ? 0x1p-40 : 0x1p-100), R(0)} : A;
        turns = R(double(A.im) * 0.15915494309189533577);
#ifdef EXACT_ANGLES
        turns_rest = R(__fma_rn(double(A.im), 0.15915494309189533577, -double(turns)));
#endif
        inv = inverse(a);
    }

    static __device__ __forceinline__ R unscale(R sum) { return sum; }

    __device__ __forceinline__ R add_times_conj(State x, R sum) const {
        return fma(x.re, a.re, fma(x.im, a.im, sum));
    }

    // Of dt Im A / `parts`, parts 1 or 2.
    __device__ __forceinline__ void sine_cosine(R dt, int parts, R& s, R& c) const {
        const R factor = R(3 - parts), angle = mul(dt, factor * turns);
        sine_cosine_of_turns(angle, s, c);
#ifdef EXACT_ANGLES
        const R lost = fma(dt, factor * turns_rest, fma(dt, factor * turns, -angle));
        const R turn = mul(lost, R(3.14159265358979323846)), sine = s;
        s = fma(turn, c, s);
        c = fma(-turn, sine, c);
#endif
    }

    // The sine of dt Im A, and one less its cosine.
    __device__ __forceinline__ void sine_and_bend(R dt, R& sine, R& bend) const {
#ifdef EXACT_ANGLES
        R s, c;
        sine_cosine(dt, 2, s, c);
        sine = mul(R(2) * s, c);
        bend = mul(R(2) * s, s);
#else
        sine_and_bend_of_turns(mul(dt, turns), sine, bend);
#endif
    }

    // exp(dt A)
    __device__ __forceinline__ State exponential_of(R dt) const {
        R s, c;
        sine_cosine(dt, 1, s, c);
        const R e = exponential(mul(dt, a.re));
        return {mul(e, c), mul(e, s)};
    }

    __device__ __forceinline__ Factors<State> factors(R dd, R di) const {
        Factors<State> f;
        if constexpr (SCHEME == MAMBA || SCHEME == DIRAC) {
            f.decay = exponential_of(dd);
            f.gain = Constant<State>::one();
        } else if constexpr (SCHEME == ZOH) {
            const R e = exponential_minus_one(mul(di, a.re));
            R sine, bend;
            sine_and_bend(di, sine, bend);
            const State less = {fma(e, add(R(1), -bend), -bend), fma(e, sine, sine)};
            f.decay = SPLIT ? exponential_of(dd) : State{add(less.re, R(1)), less.im};
            f.gain = mul(less, inv);
        } else {
            const State x = {mul(dd, mul(a.re, R(0.5))), mul(dd, mul(a.im, R(0.5)))};
            const State q = inverse(State{add(R(1), -x.re), -x.im});
            f.decay = fma(x, q, q);
            f.gain = scale(SPLIT ? half_inverse(di) : q, di);
        }
        return f;
    }

    __device__ __forceinline__ State half_inverse(R dt) const {  // 1/(1 - dt A/2)
        const R half = mul(dt, R(-0.5));
        return inverse(State{fma(half, a.re, R(1)), mul(half, a.im)});
    }

    __device__ __forceinline__ Slopes<State> slopes(R dd, R di, const Factors<State>& f) const {
        Slopes<State> s;
        s.decay = f.decay;
        s.gain_dt = s.gain_A = Constant<State>::zero();
        if constexpr (SCHEME == ZOH) {
            const State y = scale(a, di);
            s.gain_dt = SPLIT ? exponential_of(di) : f.decay;
            const State series = scale(phi1_slope_series(y), mul(di, di));
            const State closed =
                mul(scale_add(s.gain_dt, di, State{-f.gain.re, -f.gain.im}), inv);
            const bool small = fma(y.re, y.re, mul(y.im, y.im)) < R(0.25);
            s.gain_A = small ? series : closed;
        } else if constexpr (SCHEME == BILINEAR) {
            const State p = half_inverse(dd), q = SPLIT ? half_inverse(di) : p;
            s.decay = mul(p, p);
            s.gain_dt = mul(q, q);
            s.gain_A = scale(s.gain_dt, mul(R(0.5), mul(di, di)));
        }
        return s;
    }
};
