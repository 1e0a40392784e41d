//! The bf16 microkernel: pairs of bf16 numbers multiplied and summed in f32 by `vdpbf16ps`, 32 products an instruction.
//!
//! Activations are rounded to bf16 (nearest even) before the product, so the result differs from the widening tile's by about
//! 2⁻⁹ of each product. The instruction reads subnormal numbers as zero.

use std::arch::x86_64::*;

use half::bf16;

use super::ahead::send_for;
use super::tile::ROWS;
use crate::cores::each;

/// Rows rounded by one task.
const TOGETHER: usize = 16;
/// Chains of a sum of a narrow panel, which take pairs in turn: with a row or two one chain would wait for its own sums.
const NARROW_CHAINS: usize = 4;
/// How many pairs ahead a narrow panel is sent for.
const NARROW_AHEAD: usize = 32;

/// Activations as pairs along K: (M, ⌈K/2⌉), an odd K padded with zero.
pub(in super::super) struct Pairs {
    /// Two bf16 numbers each, the first in the low half.
    numbers: Vec<u32>,
    /// ⌈K/2⌉.
    width: usize,
}

impl Pairs {
    /// Rounds x: (M, K).
    /// # Safety
    /// The processor has AVX-512F, AVX-512BW and AVX-512-BF16.
    pub(in super::super) unsafe fn new(x: &[f32], k: usize) -> Self {
        let width = k.div_ceil(2);
        let mut numbers = Vec::with_capacity(x.len() / k * width);
        let room = numbers.spare_capacity_mut().chunks_mut(TOGETHER * width);
        each(x.chunks(TOGETHER * k).zip(room), |(x, to)| {
            for (x, to) in x.chunks(k).zip(to.chunks_mut(width)) {
                // SAFETY: the caller's promise; the spare room of a row is ⌈K/2⌉ pairs.
                unsafe { round_row(x, to.as_mut_ptr().cast()) };
            }
        });
        // SAFETY: every row was written.
        unsafe { numbers.set_len(x.len() / k * width) };
        Pairs { numbers, width }
    }

    /// From pair `pair` of row `row` on.
    pub(super) fn from(&self, row: usize, pair: usize) -> *const u32 {
        self.numbers[row * self.width + pair..].as_ptr()
    }

    pub(super) fn stride(&self) -> usize {
        self.width
    }

    /// All of them.
    pub(in super::super) fn numbers(&self) -> &[u32] {
        &self.numbers
    }
}

/// Numbers as pairs of one after the other.
/// # Safety
/// `to` has room for ⌈len/2⌉ pairs; the processor has AVX-512F and AVX-512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(in super::super) unsafe fn round_row(x: &[f32], to: *mut u32) {
    let whole = x.len() / 16 * 16;
    for at in (0..whole).step_by(16) {
        // SAFETY: at + 16 ≤ len, so eight pairs have room.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr().add(at)));
            _mm256_storeu_si256(to.add(at / 2).cast(), std::mem::transmute::<__m256bh, __m256i>(rounded));
        }
    }
    for (pair, numbers) in x[whole..].chunks(2).enumerate() {
        let bits = |number: f32| u32::from(bf16::from_f32(number).to_bits());
        let high = numbers.get(1).map_or(0, |number| bits(*number));
        // SAFETY: the caller's promise.
        unsafe { to.add(whole / 2 + pair).write(bits(numbers[0]) | high << 16) };
    }
}

/// Two rows as pairs of a number of each.
/// # Safety
/// The rows are as long, a multiple of 16, and `to` has room for so many pairs; the processor has AVX-512F and AVX-512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(in super::super) unsafe fn interleave(first: &[f32], second: &[f32], to: *mut u32) {
    debug_assert!(first.len() == second.len() && first.len().is_multiple_of(16));
    for at in (0..first.len()).step_by(16) {
        let rounded = |row: &[f32]| {
            // SAFETY: the caller's promise; 16 bf16 numbers whatever their type.
            let half = unsafe {
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(row.as_ptr().add(at))))
            };
            _mm512_cvtepu16_epi32(half)
        };
        let pairs = _mm512_or_si512(rounded(first), _mm512_slli_epi32::<16>(rounded(second)));
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(to.add(at).cast(), pairs) };
    }
}

/// Where 32 columns of pairs come from.
pub(in super::super) trait Weights: Copy {
    /// Gives the first `pairs` pairs in order, each as two vectors of 16 columns.
    /// # Safety
    /// There are that many; the processor has AVX-512F, AVX-512BW and AVX-512-BF16.
    unsafe fn each(self, pairs: usize, emit: impl FnMut(usize, [__m512bh; 2]));
}

/// (pairs, 16·V) pairs as they are, V being 1 or 2; a second vector that is not there is zero.
#[derive(Clone, Copy)]
pub(in super::super) struct Panel<const V: usize>(pub(in super::super) *const bf16);

impl<const V: usize> Weights for Panel<V> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn each(self, pairs: usize, mut emit: impl FnMut(usize, [__m512bh; 2])) {
        for pair in 0..pairs {
            let mut vectors = [_mm512_setzero_si512(); 2];
            for (v, vector) in vectors.iter_mut().enumerate().take(V) {
                // SAFETY: the caller's promise.
                *vector = unsafe { _mm512_loadu_si512(self.0.add((pair * V + v) * 32).cast()) };
            }
            // SAFETY: the vectors are 32 bf16 numbers whatever their type.
            emit(pair, vectors.map(|vector| unsafe { std::mem::transmute::<__m512i, __m512bh>(vector) }));
        }
    }
}

/// `out[r][c] (+)= Σ_p x[r][p] · weights[p][c]` over pairs p, each sum one chain in order of p.
#[derive(Clone, Copy)]
pub(in super::super) struct PairTile<W> {
    /// Pair p of row r at `r·stride + p`, or at `p·stride + r` when `turned`.
    pub(in super::super) x: *const u32,
    pub(in super::super) stride: usize,
    pub(in super::super) turned: bool,
    pub(in super::super) weights: W,
    pub(in super::super) pairs: usize,
    /// Columns to store, 1..=32.
    pub(in super::super) columns: usize,
    /// Whether the sums start from what `out` holds.
    pub(in super::super) add: bool,
}

impl<N> PairTile<N> {
    /// The same tile with these weights.
    pub(super) fn of<W: Weights>(&self, weights: W) -> PairTile<W> {
        let PairTile { x, stride, turned, pairs, columns, add, .. } = *self;
        PairTile { x, stride, turned, weights, pairs, columns, add }
    }
}

impl PairTile<Panel<1>> {
    /// Up to 16 columns, each sum of [`NARROW_CHAINS`].
    /// # Safety
    /// As [`Self::run`]; x is not turned.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn narrow(&self, rows: usize, out: *mut f32, out_stride: usize) {
        let mut row = 0;
        while row < rows {
            let tile = PairTile { x: self.x.wrapping_add(row * self.stride), ..*self };
            let out = out.wrapping_add(row * out_stride);
            // SAFETY: the caller's promise; each arm takes no more rows than are left.
            row += unsafe {
                match rows - row {
                    1 => tile.in_chains::<1>(out, out_stride),
                    2 => tile.in_chains::<2>(out, out_stride),
                    3 | 4 => tile.in_chains::<3>(out, out_stride),
                    _ => tile.in_chains::<5>(out, out_stride),
                }
            };
        }
    }

    /// M rows; gives M.
    /// # Safety
    /// As [`Self::narrow`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn in_chains<const M: usize>(&self, out: *mut f32, out_stride: usize) -> usize {
        let mask = ((1_u32 << self.columns) - 1) as u16;
        let mut sums = [[_mm512_setzero_ps(); NARROW_CHAINS]; M];
        // SAFETY: pair < self.pairs and r < M: what the fields say is there; the mask leaves out what is past `columns`.
        unsafe {
            if self.add {
                for (r, sums) in sums.iter_mut().enumerate() {
                    sums[0] = _mm512_maskz_loadu_ps(mask, out.wrapping_add(r * out_stride));
                }
            }
            let mut step = |pair: usize, chain: usize| {
                let bits = |vector| std::mem::transmute::<__m512i, __m512bh>(vector);
                let weights = bits(_mm512_loadu_si512(self.weights.0.add(pair * 32).cast()));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let value = bits(_mm512_set1_epi32(*self.x.add(r * self.stride + pair) as i32));
                    sums[chain] = _mm512_dpbf16_ps(sums[chain], value, weights);
                }
            };
            let whole = self.pairs / NARROW_CHAINS * NARROW_CHAINS;
            for first in (0..whole).step_by(NARROW_CHAINS) {
                send_for(self.weights.0.wrapping_add((first + NARROW_AHEAD) * 32), NARROW_CHAINS * 32);
                (0..NARROW_CHAINS).for_each(|chain| step(first + chain, chain));
            }
            (whole..self.pairs).for_each(|pair| step(pair, 0));
            for (r, [first, second, third, fourth]) in sums.into_iter().enumerate() {
                let sum = _mm512_add_ps(_mm512_add_ps(first, second), _mm512_add_ps(third, fourth));
                _mm512_mask_storeu_ps(out.wrapping_add(r * out_stride), mask, sum);
            }
        }
        M
    }
}

impl<W: Weights> PairTile<W> {
    /// # Safety
    /// The pointers reach all that the fields say, for `rows` rows; `out` has `rows` rows of `columns`, `out_stride` apart; the
    /// processor has AVX-512F, AVX-512BW and AVX-512-BF16.
    pub(in super::super) unsafe fn run(&self, rows: usize, out: *mut f32, out_stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self.columns, self.turned) {
                (..=16, false) => self.rows::<1, false>(rows, out, out_stride),
                (..=16, true) => self.rows::<1, true>(rows, out, out_stride),
                (_, false) => self.rows::<2, false>(rows, out, out_stride),
                (_, true) => self.rows::<2, true>(rows, out, out_stride),
            }
        }
    }

    /// V·16 columns.
    /// # Safety
    /// As [`Self::run`].
    unsafe fn rows<const V: usize, const T: bool>(&self, rows: usize, out: *mut f32, out_stride: usize) {
        let mut row = 0;
        while row < rows {
            let tile = PairTile { x: self.x.wrapping_add(if T { row } else { row * self.stride }), ..*self };
            let out = out.wrapping_add(row * out_stride);
            // SAFETY: the caller's promise; each arm takes no more rows than are left.
            row += unsafe {
                match rows - row {
                    1 => tile.some::<1, V, T>(out, out_stride),
                    2 => tile.some::<2, V, T>(out, out_stride),
                    3 => tile.some::<3, V, T>(out, out_stride),
                    4 | 5 => tile.some::<4, V, T>(out, out_stride),
                    6 | 7 => tile.some::<6, V, T>(out, out_stride),
                    8..ROWS => tile.some::<8, V, T>(out, out_stride),
                    _ => tile.some::<ROWS, V, T>(out, out_stride),
                }
            };
        }
    }

    /// M rows of V·16 columns; gives M.
    /// # Safety
    /// As [`Self::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn some<const M: usize, const V: usize, const T: bool>(&self, out: *mut f32, out_stride: usize) -> usize {
        let mask = |columns: usize| if columns >= 16 { 0xffff_u16 } else { (1 << columns) - 1 };
        let masks = [mask(self.columns), mask(self.columns.saturating_sub(16))];
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        if self.add {
            for (r, sums) in sums.iter_mut().enumerate() {
                for v in 0..V {
                    let from = out.wrapping_add(r * out_stride + v * 16);
                    // SAFETY: the caller's promise; the mask leaves out what is past `columns`.
                    sums[v] = unsafe { _mm512_maskz_loadu_ps(masks[v], from) };
                }
            }
        }
        // SAFETY: pair < self.pairs and r < M: what the fields say is there.
        unsafe {
            self.weights.each(self.pairs, |pair, weights| {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let at = if T { pair * self.stride + r } else { r * self.stride + pair };
                    let value = _mm512_set1_epi32(*self.x.add(at) as i32);
                    let value = std::mem::transmute::<__m512i, __m512bh>(value);
                    for v in 0..V {
                        sums[v] = _mm512_dpbf16_ps(sums[v], value, weights[v]);
                    }
                }
            });
        }
        for (r, sums) in sums.iter().enumerate() {
            for v in 0..V {
                let to = out.wrapping_add(r * out_stride + v * 16);
                // SAFETY: the caller's promise; the mask leaves out what is past `columns`.
                unsafe { _mm512_mask_storeu_ps(to, masks[v], sums[v]) };
            }
        }
        M
    }
}
