// SPDX-License-Identifier: MIT
// Rows divided by their root mean square, times a weight: y = x / sqrt(mean(x^2) + eps) weight.
//
// Memory contract. x (rows, H) is DTYPE with a stride of rows in elements, the weight (H) or null, y
// (rows, H) is DTYPE and compact. x is read twice, the second time from a near cache, and y written once.
//
// Launch. A row has LANES threads, 32 or 256, a block four rows or one; threads hold packs of VECTOR
// numbers. Both depend on H and the dtype alone and fix the order of the sum.
//
// Compiled for DTYPE, REAL, LANES and VECTOR.
#include "step_sums.cuh"

constexpr int TOGETHER = LANES == 32 ? 4 : 1;  // rows of a block
constexpr int THREADS = LANES * TOGETHER;

struct Arguments {
    const T* x;
    Either weight;
    T* y;
    double eps;
    long long rows, width, x_row;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const __grid_constant__ Arguments p) {
    overlap_previous();
    using Numbers = Pack<T, VECTOR>;
    const long long row = (long long)blockIdx.x * TOGETHER + threadIdx.x / LANES;
    if (row >= p.rows) return;
    const int thread = threadIdx.x % LANES;
    const T* x = p.x + row * p.x_row;
    T* y = p.y + row * p.width;
    R sum = R(0);
#pragma unroll 4
    for (long long k = thread * VECTOR; k < p.width; k += LANES * VECTOR) {
        const Numbers numbers = Numbers::load(x + k);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            const R value = wide(numbers.item[v]);
            sum = fma(value, value, sum);
        }
    }
    sum = sum_over_block<LANES / 32>(sum);
    const R factor = R(1) / root(add(sum / R(p.width), R(p.eps)));
#pragma unroll 2
    for (long long k = thread * VECTOR; k < p.width; k += LANES * VECTOR) {
        Numbers numbers = Numbers::load(x + k);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            R value = mul(wide(numbers.item[v]), factor);
            if (p.weight.data) value = mul(value, p.weight[k + v]);
            numbers.item[v] = stored(value);
        }
        numbers.store(y + k);
    }
}
