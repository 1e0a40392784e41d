//! Numbers that a panel may hold, and how vectors of them are widened to f32.

use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A number that a panel may hold. In a panel `STEP` rows are interleaved: `(⌈K/STEP⌉, columns, STEP)`.
pub(in super::super) trait Stored: Copy + Default + Send + Sync {
    /// Rows of K that lie together.
    const STEP: usize;
    fn widen(self) -> f32;
    /// Row `row` of the 16 interleaved columns at `from`.
    /// # Safety
    /// `from` has 16·STEP elements, row < STEP; the processor has AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(from: *const Self, row: usize) -> __m512;
    /// Row `row` of the 8 interleaved columns at `from`.
    /// # Safety
    /// `from` has 8·STEP elements, row < STEP; the processor has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(from: *const Self, row: usize) -> __m256;
}

impl Stored for f32 {
    const STEP: usize = 1;
    fn widen(self) -> f32 {
        self
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self, _row: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(from: *const Self, _row: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Stored for bf16 {
    const STEP: usize = 2;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self, row: usize) -> __m512 {
        // SAFETY: the caller's promise.
        let pairs = unsafe { _mm512_loadu_si512(from.cast()) };
        _mm512_castsi512_ps(match row {
            0 => _mm512_slli_epi32(pairs, 16),
            _ => _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32)),
        })
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(from: *const Self, row: usize) -> __m256 {
        // SAFETY: the caller's promise.
        let pairs = unsafe { _mm256_loadu_si256(from.cast()) };
        _mm256_castsi256_ps(match row {
            0 => _mm256_slli_epi32(pairs, 16),
            _ => _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32)),
        })
    }
}

impl Stored for f16 {
    const STEP: usize = 1;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self, _row: usize) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(from: *const Self, _row: usize) -> __m256 {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }
}
