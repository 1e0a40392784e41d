//! The microkernel: `out[r][c] (+)= Σ_k x[r][k] · panel[k][c]`, in chains of fused multiply-adds in order of k, a new one every
//! [`CHAIN`] of them.
//!
//! The chains of a row are the same in every shape of tile, so no result depends on how rows and columns were cut up, nor on K's cuts
//! where those are whole chains.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::ahead::send_for;
use super::stored::Stored;
use crate::kernels::cpu::level::Level;

/// Columns of a packed panel: two AVX-512 registers of f32.
pub(in super::super) const PANEL: usize = 32;
/// Rows the largest microkernel takes: 12 × 2 accumulators of the 32 registers.
pub(in super::super) const ROWS: usize = 12;

/// Products that are summed by one chain. A long chain rounds every product to the size of all before it: a gradient of the head, over
/// 49,152 tokens, loses the many that are small.
pub(super) const CHAIN: usize = 256;

/// What a tile's sums start from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in super::super) enum Sums {
    /// Nothing: what `out` holds is overwritten.
    New,
    /// Nothing, and what `out` holds is added to them.
    OnTop,
    /// What `out` holds: one chain, however many calls it takes.
    GoOn,
}

impl Sums {
    /// Of a product that is added to what `out` holds, or not.
    pub(super) fn new(add: bool) -> Self {
        if add { Sums::OnTop } else { Sums::New }
    }

    /// Of the part of the same product that begins with its `k`-th row of weights.
    pub(super) fn from(self, k: usize) -> Self {
        if k > 0 { Sums::OnTop } else { self }
    }
}

/// Rows of weights that are sent for before they are read: the processor does not foresee pieces of rows that lie far apart.
const AHEAD: usize = 16;

/// Where 32 columns of weights come from.
pub(in super::super) trait Rows: Copy {
    /// The same without the first `k` rows, whole chains.
    fn after(self, k: usize) -> Self;
}

/// Rows as vectors of AVX-512.
#[cfg(target_arch = "x86_64")]
pub(in super::super) trait Weights: Rows {
    /// Gives the first `k` rows in order, each as vectors of 16 columns.
    /// # Safety
    /// There are that many; the processor has AVX-512F.
    unsafe fn each16<const V: usize>(self, k: usize, emit: impl FnMut(usize, [__m512; V]));
}

/// Numbers in memory, element `(k, c)` at `(k / STEP)·pitch + c·STEP + k mod STEP`. Vectors are read whole: 16 columns, and 32 where
/// there are more than 16.
#[derive(Clone, Copy)]
pub(in super::super) struct Plain<W>(pub(in super::super) *const W, pub(in super::super) usize);

impl<W: Stored> Rows for Plain<W> {
    fn after(self, k: usize) -> Self {
        Plain(self.0.wrapping_add(k / W::STEP * self.1), self.1)
    }
}

#[cfg(target_arch = "x86_64")]
impl<W: Stored> Weights for Plain<W> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn each16<const V: usize>(self, k: usize, mut emit: impl FnMut(usize, [__m512; V])) {
        for at in 0..k {
            let from = self.0.wrapping_add(at / W::STEP * self.1);
            if at % W::STEP == 0 {
                send_for(from.wrapping_add(AHEAD * self.1), V * 16 * W::STEP);
            }
            let mut weights = [_mm512_setzero_ps(); V];
            for (v, weights) in weights.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *weights = unsafe { W::load16(from.add(v * 16 * W::STEP), at % W::STEP) };
            }
            emit(at, weights);
        }
    }
}

impl<W: Stored> Plain<W> {
    /// Gives the first `k` rows of the V·8 columns from `first` in order, those of C chains side by side.
    /// # Safety
    /// There are that many; the processor has AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn each8<const V: usize, const C: usize>(
        self,
        first: usize,
        k: usize,
        mut emit: impl FnMut(usize, [[__m256; V]; C]),
    ) {
        for at in (0..k).step_by(W::STEP) {
            let from = |c| self.after(c * CHAIN + at).0.wrapping_add(first * W::STEP);
            (0..C).for_each(|c| send_for(from(c).wrapping_add(AHEAD * self.1), V * 8 * W::STEP));
            for row in 0..W::STEP {
                if W::STEP == 1 || at + row < k {
                    let mut weights = [[_mm256_setzero_ps(); V]; C];
                    for (c, weights) in weights.iter_mut().enumerate() {
                        for (v, weights) in weights.iter_mut().enumerate() {
                            // SAFETY: the caller's promise.
                            *weights = unsafe { W::load8(from(c).add(v * 8 * W::STEP), row) };
                        }
                    }
                    emit(at + row, weights);
                }
            }
        }
    }

    /// Gives the first `k` rows in order, as far as there are columns.
    /// # Safety
    /// There are that many, with `columns` columns.
    #[inline]
    unsafe fn each(self, columns: usize, k: usize, mut emit: impl FnMut(usize, &[f32; PANEL])) {
        let mut row = [0f32; PANEL];
        for at in 0..k {
            for (c, number) in row[..columns].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *number = unsafe { *self.0.add(at / W::STEP * self.1 + c * W::STEP + at % W::STEP) }.widen();
            }
            emit(at, &row);
        }
    }
}

/// The first `columns` numbers of some vectors. Not by `memcpy`, which the compiler would call for all that are whole as well.
/// # Safety
/// They are there; the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn load_some<const V: usize>(from: *const f32, columns: usize, to: &mut [__m256; V]) {
    for (v, to) in to.iter_mut().enumerate() {
        let from = from.wrapping_add(8 * v);
        // SAFETY: the caller's promise.
        *to = unsafe {
            match columns == 8 * V {
                true => _mm256_loadu_ps(from),
                false => _mm256_maskload_ps(from, before(columns, v)),
            }
        };
    }
}

/// # Safety
/// As [`load_some`].
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn store_some<const V: usize>(from: &[__m256; V], to: *mut f32, columns: usize) {
    for (v, from) in from.iter().enumerate() {
        let to = to.wrapping_add(8 * v);
        // SAFETY: the caller's promise.
        unsafe {
            match columns == 8 * V {
                true => _mm256_storeu_ps(to, *from),
                false => _mm256_maskstore_ps(to, before(columns, v), *from),
            }
        }
    }
}

/// Which numbers of the `v`-th vector are among the first `columns`.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn before(columns: usize, v: usize) -> __m256i {
    let left = columns as i32 - 8 * v as i32;
    _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
}

/// One product of some rows with at most 32 columns.
#[derive(Clone, Copy)]
pub(in super::super) struct Tile<W> {
    /// Element `(r, k)` at `r·stride + k`, or at `k·stride + r` when `turned`.
    pub(in super::super) x: *const f32,
    pub(in super::super) stride: usize,
    pub(in super::super) turned: bool,
    pub(in super::super) weights: W,
    pub(in super::super) k: usize,
    /// Columns to store, 1..=32.
    pub(in super::super) columns: usize,
    pub(in super::super) sums: Sums,
}

impl<W: Copy> Tile<W> {
    /// The same tile with these weights.
    pub(super) fn of<V>(&self, weights: V) -> Tile<V> {
        let Tile { x, stride, turned, k, columns, sums, .. } = *self;
        Tile { x, stride, turned, weights, k, columns, sums }
    }

    /// Offset of x's element.
    #[inline(always)]
    fn at(&self, turned: bool, row: usize, k: usize) -> usize {
        if turned { k * self.stride + row } else { row * self.stride + k }
    }

    /// The tile whose first row is this one's `row`-th.
    fn below(&self, row: usize) -> Self {
        Tile { x: self.x.wrapping_add(self.at(self.turned, row, 0)), ..*self }
    }
}

impl<W: Rows> Tile<W> {
    /// The tile's chains, in order, `at_once` of them together as long as that many are whole: those after the first are added to what
    /// it gave. Most tiles of a step with adapters are short and are one.
    #[inline(always)]
    fn chains(&self, at_once: usize, mut some: impl FnMut(&Self, usize)) {
        if self.k <= CHAIN || self.sums == Sums::GoOn {
            return some(self, 1);
        }
        let mut start = 0;
        while start < self.k {
            let left = self.k - start;
            let count = if left >= at_once * CHAIN { at_once } else { 1 };
            let chain = Tile {
                x: self.x.wrapping_add(self.at(self.turned, 0, start)),
                weights: self.weights.after(start),
                k: CHAIN.min(left),
                sums: self.sums.from(start),
                ..*self
            };
            some(&chain, count);
            start += count * CHAIN;
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl<W: Weights> Tile<W> {
    /// # Safety
    /// As [`Tile::run`], with AVX-512F.
    pub(super) unsafe fn avx512_rows<const T: bool>(&self, rows: usize, out: *mut f32, out_stride: usize) {
        let mut row = 0;
        while row < rows {
            let (tile, out) = (self.below(row), out.wrapping_add(row * out_stride));
            // SAFETY: the caller's promise; each arm takes no more rows than are left.
            row += unsafe {
                match rows - row {
                    1 => tile.avx512::<1, T>(out, out_stride),
                    2 => tile.avx512::<2, T>(out, out_stride),
                    3 => tile.avx512::<3, T>(out, out_stride),
                    4 | 5 => tile.avx512::<4, T>(out, out_stride),
                    6 | 7 => tile.avx512::<6, T>(out, out_stride),
                    8..ROWS => tile.avx512::<8, T>(out, out_stride),
                    _ => tile.avx512::<ROWS, T>(out, out_stride),
                }
            };
        }
    }

    /// M rows; gives M.
    /// # Safety
    /// As [`Self::avx512_rows`].
    unsafe fn avx512<const M: usize, const T: bool>(&self, out: *mut f32, out_stride: usize) -> usize {
        // SAFETY: the caller's promise.
        self.chains(1, |chain, _| unsafe {
            if self.columns > 16 {
                chain.avx512_chain::<M, 2, T>(out, out_stride);
            } else {
                chain.avx512_chain::<M, 1, T>(out, out_stride);
            }
        });
        M
    }

    /// One chain of M rows of V·16 columns.
    /// # Safety
    /// As [`Self::avx512_rows`].
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_chain<const M: usize, const V: usize, const T: bool>(&self, out: *mut f32, out_stride: usize) {
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        let masks: [u16; V] =
            std::array::from_fn(
                |v| if self.columns >= (v + 1) * 16 { 0xffff } else { (1 << (self.columns - v * 16)) - 1 },
            );
        // SAFETY: the caller's promise; the mask leaves out what is past `columns`.
        let held = |r: usize, v: usize| unsafe { _mm512_maskz_loadu_ps(masks[v], out.add(r * out_stride + v * 16)) };
        if self.sums == Sums::GoOn {
            for (r, sums) in sums.iter_mut().enumerate() {
                sums.iter_mut().enumerate().for_each(|(v, sum)| *sum = held(r, v));
            }
        }
        // SAFETY: k < self.k and r < M: what the fields say is there.
        unsafe {
            self.weights.each16::<V>(self.k, |k, weights| {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let value = _mm512_set1_ps(*self.x.add(self.at(T, r, k)));
                    for v in 0..V {
                        sums[v] = _mm512_fmadd_ps(value, weights[v], sums[v]);
                    }
                }
            });
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            for v in 0..V {
                if self.sums == Sums::OnTop {
                    sums[v] = _mm512_add_ps(held(r, v), sums[v]);
                }
                // SAFETY: the caller's promise; the mask leaves out what is past `columns`.
                unsafe { _mm512_mask_storeu_ps(out.add(r * out_stride + v * 16), masks[v], sums[v]) };
            }
        }
    }
}

impl<W: Stored> Tile<Plain<W>> {
    /// # Safety
    /// The pointers reach all that the fields say, for `rows` rows; `out` has `rows` rows of `columns`, `out_stride` apart; `level` is
    /// what the processor has.
    pub(in super::super) unsafe fn run(&self, level: Level, rows: usize, out: *mut f32, out_stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match level {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => match self.turned {
                    false => self.avx512_rows::<false>(rows, out, out_stride),
                    true => self.avx512_rows::<true>(rows, out, out_stride),
                },
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => match self.turned {
                    false => self.avx2_rows::<false>(rows, out, out_stride),
                    true => self.avx2_rows::<true>(rows, out, out_stride),
                },
                Level::Portable => self.chains(1, |chain, _| chain.portable(rows, out, out_stride)),
            }
        }
    }

    /// # Safety
    /// As [`Self::run`], with AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn avx2_rows<const T: bool>(&self, rows: usize, out: *mut f32, out_stride: usize) {
        let mut row = 0;
        while row < rows {
            let (tile, to) = (self.below(row), out.wrapping_add(row * out_stride));
            // SAFETY: the caller's promise; each arm takes no more rows than are left.
            row += unsafe {
                match rows - row {
                    1 if self.columns > 16 => tile.avx2::<1, 4, 1, T>(to, out_stride),
                    2 if self.columns > 16 => tile.avx2::<2, 4, 1, T>(to, out_stride),
                    // Products with A: two vectors of one chain would wait for each other's sums.
                    1 => tile.avx2::<1, 2, 2, T>(to, out_stride),
                    2 => tile.avx2::<2, 2, 2, T>(to, out_stride),
                    3 => tile.avx2::<3, 2, 1, T>(to, out_stride),
                    // Fewer than four wait for each other's sums: what is left of six is evened out.
                    4 | 7 | 8 => tile.avx2::<4, 2, 1, T>(to, out_stride),
                    5 | 9 => tile.avx2::<5, 2, 1, T>(to, out_stride),
                    _ => tile.avx2::<6, 2, 1, T>(to, out_stride),
                }
            };
        }
    }

    /// M rows, C chains at once; gives M.
    /// # Safety
    /// As [`Self::avx2_rows`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn avx2<const M: usize, const V: usize, const C: usize, const T: bool>(
        &self,
        out: *mut f32,
        out_stride: usize,
    ) -> usize {
        // SAFETY: the caller's promise.
        self.chains(C, |chains, count| unsafe {
            match count {
                1 => chains.avx2_chains::<M, V, 1, T>(out, out_stride),
                _ => chains.avx2_chains::<M, V, C, T>(out, out_stride),
            }
        });
        M
    }

    /// C chains of M rows side by side, V·8 columns at a time: six rows of 16 columns fill the registers.
    /// # Safety
    /// As [`Self::avx2_rows`], with C chains from x and the weights on.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2_chains<const M: usize, const V: usize, const C: usize, const T: bool>(
        &self,
        out: *mut f32,
        out_stride: usize,
    ) {
        for first in (0..self.columns).step_by(8 * V) {
            let columns = (self.columns - first).min(8 * V);
            let mut sums = [[[_mm256_setzero_ps(); V]; M]; C];
            if self.sums == Sums::GoOn {
                for (r, sums) in sums[0].iter_mut().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe { load_some(out.add(r * out_stride + first), columns, sums) };
                }
            }
            // SAFETY: k < self.k, r < M and c < C: what the fields say is there.
            unsafe {
                self.weights.each8::<V, C>(first, self.k, |k, weights| {
                    for c in 0..C {
                        for (r, sums) in sums[c].iter_mut().enumerate() {
                            let value = _mm256_set1_ps(*self.x.add(self.at(T, r, c * CHAIN + k)));
                            for v in 0..V {
                                sums[v] = _mm256_fmadd_ps(value, weights[c][v], sums[v]);
                            }
                        }
                    }
                });
            }
            for r in 0..M {
                let out = out.wrapping_add(r * out_stride + first);
                let mut total = sums[0][r];
                if self.sums == Sums::OnTop {
                    let mut held = [_mm256_setzero_ps(); V];
                    // SAFETY: the caller's promise.
                    unsafe { load_some(out, columns, &mut held) };
                    (0..V).for_each(|v| total[v] = _mm256_add_ps(held[v], total[v]));
                }
                for sums in &sums[1..] {
                    (0..V).for_each(|v| total[v] = _mm256_add_ps(total[v], sums[r][v]));
                }
                // SAFETY: the caller's promise.
                unsafe { store_some(&total, out, columns) };
            }
        }
    }

    /// One chain without vector instructions of our choosing.
    /// # Safety
    /// As [`Self::run`].
    unsafe fn portable(&self, rows: usize, out: *mut f32, out_stride: usize) {
        for r in 0..rows {
            let mut sums = [0f32; PANEL];
            // SAFETY: the caller's promise.
            let row = unsafe { std::slice::from_raw_parts_mut(out.add(r * out_stride), self.columns) };
            if self.sums == Sums::GoOn {
                sums[..self.columns].copy_from_slice(row);
            }
            // SAFETY: k < self.k and r < rows: what the fields say is there.
            unsafe {
                self.weights.each(self.columns, self.k, |k, weights| {
                    let value = *self.x.add(self.at(self.turned, r, k));
                    for (sum, weight) in sums.iter_mut().zip(weights) {
                        // Not fused: without the instruction that is a call for each number.
                        *sum += value * weight;
                    }
                });
            }
            for (out, sum) in row.iter_mut().zip(sums) {
                *out = if self.sums == Sums::OnTop { *out + sum } else { sum };
            }
        }
    }
}
