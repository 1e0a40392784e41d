//! CPU kernels, chosen at run time by what the processor has (AVX-512, AVX2 with FMA, or portable code).
