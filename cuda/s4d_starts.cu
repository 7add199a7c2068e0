// SPDX-License-Identifier: MIT
// What state each segment of time begins with, from what the ones before make of a zero state (s4d_ends.cu).
//
// Memory contract. a, lengths and grad_last as in s4d_scan.cu and s4d_scan_backward.cu, ends and cut as s4d_ends.cu
// writes them, each read once; starts (rows, segments, H, M), with grad_last (4, rows, segments, H, M), written
// once.
//
// Launch. One thread a state, from segment to segment, in float64; 128 of them a block. Compiled for what the header
// names.
#include "s4d_states.cuh"

struct Arguments {
    Common in;
    const State *ends, *g_last;  // g_last null: forward
    const unsigned char* cut;
    State* starts;  // (rows, segments, H, M); (4, ...) of m, r, and the two that g_last begins
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

template <class S>
struct WideOf {
    using type = double;
};
template <class R>
struct WideOf<Complex<R>> {
    using type = Complex<double>;
};
using Wide = typename WideOf<State>::type;

__device__ __forceinline__ double wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
template <class R>
__device__ __forceinline__ Complex<double> wide(Complex<R> x) {
    return {x.re, x.im};
}

__device__ __forceinline__ void narrow_to(float& y, double x) { y = float(x); }
__device__ __forceinline__ void narrow_to(double& y, double x) { y = x; }
template <class R>
__device__ __forceinline__ void narrow_to(Complex<R>& y, Complex<double> x) {
    y = {R(x.re), R(x.im)};
}

__device__ __forceinline__ double times(double n, double x) { return mul(n, x); }
__device__ __forceinline__ Complex<double> times(double n, Complex<double> x) {
    return {mul(n, x.re), mul(n, x.im)};
}

// What `steps` steps make of a state: a^n, and its derivative n a^(n-1).
struct Passage {
    Wide power, slope;

    __device__ __forceinline__ Passage(Wide a, long long steps) {
        Wide before = Constant<Wide>::one(), square = a;  // before = a^(n-1)
        for (long long n = steps - 1; n > 0; n >>= 1) {
            if (n & 1) before = mul(before, square);
            square = mul(square, square);
        }
        power = mul(before, a);
        slope = times(double(steps), before);
    }
};

extern "C" __global__ void __launch_bounds__(128) s4d_starts(const __grid_constant__ Arguments p) {
    const Size& size = p.in.size;
    const long long numbers = size.channels * size.states, unit = blockIdx.x * 128LL + threadIdx.x;
    if (unit >= size.units) return;
    const long long row = unit / numbers, state = unit - row * numbers;
    const long long end = end_of(p.in, row), all = size.units * size.segments;
    const Wide a = wide(p.in.a[row / size.alike * numbers + state]);
    const Passage whole(a, size.segment);
    const Wide zero = Constant<Wide>::zero();
    const bool adjoint = p.g_last;
    Wide m = zero, r = zero, e = zero, f = zero;
    if (adjoint) e = conj(wide(p.g_last[unit]));
    for (long long i = 0; i < size.segments; ++i) {
        const long long k = adjoint ? size.segments - 1 - i : i;
        const long long at = (row * size.segments + k) * numbers + state;
        narrow_to(p.starts[at], m);
        if (adjoint) {
            narrow_to(p.starts[all + at], r);
            narrow_to(p.starts[2 * all + at], e);
            narrow_to(p.starts[3 * all + at], f);
        }
        const long long count = smaller(end - k * size.segment, size.segment);
        if (count <= 0) continue;
        const Passage part = count == size.segment ? whole : Passage(a, count);
        const bool cut = p.cut[row * size.segments + k];
        const Wide power = cut ? zero : part.power, slope = cut ? zero : part.slope;
        if (adjoint) {
            r = add(wide(p.ends[all + at]), fma(power, r, mul(slope, m)));
            f = fma(power, f, mul(slope, e));
            e = mul(power, e);
        }
        m = fma(power, m, wide(p.ends[at]));
    }
}
