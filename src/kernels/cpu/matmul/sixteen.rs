//! Quantized weights times activations of 16 bits: whole numbers are multiplied and summed, 32 of a row at a time, and only their sums
//! are scaled.
//!
//! An activation is off by at most 2⁻¹⁶ of the largest of its 32, less than what bf16 rounds away, for a fraction of the work of making
//! a float of every code. Sums of whole numbers are exact, so nothing depends on how many rows or columns are multiplied at once.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
#[cfg(target_arch = "x86_64")]
use std::ops::Range;

use super::coded::{BLOCK, CodePanels};
use super::tile::{PANEL, ROWS};
#[cfg(target_arch = "x86_64")]
use super::tile::{load_some, store_some};
#[cfg(target_arch = "x86_64")]
use super::{UNPACKED, coded::LINE, unpack::eight};
use super::{blocks, pieces};
use crate::cores::each;
use crate::kernels::cpu::level::Level;
use crate::kernels::cpu::rowwise::at_every_level;

/// Largest code of an activation.
const MOST: f32 = 32767.0;
/// Activations of a block that are no larger are taken for zero: the inverse of their scale might not be finite.
const LEAST: f32 = 1e-30;
/// 1.5·2²³: added to a number under 2²² it leaves the nearest whole number in the low bits.
const WHOLE: f32 = 12_582_912.0;
/// Rows that lie together: what the microkernel takes at once.
const SET: usize = 6;
const _: () = assert!(ROWS.is_multiple_of(SET), "a block of rows begins a set");
/// Numbers of a [`Sixteens`]' head.
const HEAD: usize = 4;

/// Activations x: (M, K) as codes with a scale for every 32 of a row, in sets of six rows; the last set may have fewer.
pub(super) struct Sixteens {
    /// For every set (K / 2, rows, 2).
    codes: Vec<i16>,
    /// For every set (K / 32, rows, 4): the scale, and the sum of the first 16 numbers, of the others, and of all.
    heads: Vec<f32>,
    m: usize,
    k: usize,
}

impl Sixteens {
    /// x: (M, K), K a multiple of 32. A number that is not finite makes all products of its row NaN.
    pub(super) fn new(x: &[f32], k: usize) -> Self {
        let m = x.len() / k;
        let mut found = Sixteens { codes: vec![0; m * k], heads: vec![0.0; m * k / BLOCK * HEAD], m, k };
        let to = found.codes.chunks_mut(SET * k).zip(found.heads.chunks_mut(SET * k / BLOCK * HEAD));
        each(x.chunks(SET * k).zip(to), |(x, (codes, heads))| {
            let rows = x.len() / k;
            for (row, x) in x.chunks_exact(k).enumerate() {
                to_codes(x, rows, &mut codes[row * 2..], &mut heads[row * HEAD..]);
            }
        });
        found
    }

    /// Codes and heads from the set on that begins with row `row`, and its rows.
    fn set(&self, row: usize) -> (&[i16], &[f32], usize) {
        assert!(row.is_multiple_of(SET), "a row in the middle of a set");
        let from = row * self.k;
        (&self.codes[from..], &self.heads[from / BLOCK * HEAD..], SET.min(self.m - row))
    }
}

at_every_level! {
    /// One row x: (K) of a set of `rows`.
    fn to_codes(x: &[f32], rows: usize, codes: &mut [i16], heads: &mut [f32]) {
        for (block, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
            let (mut sizes, mut broken) = ([0f32; 8], [0f32; 8]);
            for x in x.as_chunks::<8>().0 {
                for lane in 0..8 {
                    let size = x[lane].abs();
                    sizes[lane] = if size > sizes[lane] { size } else { sizes[lane] };
                    broken[lane] += x[lane] * 0.0;
                }
            }
            let most = sizes.into_iter().fold(0f32, f32::max);
            let (by, scale) = if most > LEAST { (MOST / most, most / MOST) } else { (0.0, 0.0) };
            let scale = scale + broken.into_iter().sum::<f32>();
            let whole = x.map(|x| (x * by + WHOLE).to_bits() as i16);
            for (pair, whole) in whole.as_chunks::<2>().0.iter().enumerate() {
                codes[(block * (BLOCK / 2) + pair) * rows * 2..][..2].copy_from_slice(whole);
            }
            let sum = |whole: &[i16]| scale * whole.iter().map(|code| i32::from(*code)).sum::<i32>() as f32;
            let (first, last) = whole.split_at(BLOCK / 2);
            heads[block * rows * HEAD..][..HEAD].copy_from_slice(&[scale, sum(first), sum(last), sum(&whole)]);
        }
    }
}

/// One product of some rows with blocks of a panel.
#[derive(Clone, Copy)]
pub(super) struct SixteenTile<'a> {
    pub(super) x: &'a Sixteens,
    /// The first row: it begins a set.
    pub(super) row: usize,
    pub(super) panels: &'a CodePanels,
    pub(super) panel: usize,
    /// Columns to store, 1..=32.
    pub(super) columns: usize,
    /// Whether the sums start from what `out` holds.
    pub(super) add: bool,
}

impl SixteenTile<'_> {
    /// `rows` rows. The codes of a panel are taken apart on the way, and first into memory where the rows are more than a set.
    /// # Safety
    /// `out` has `rows` rows of `columns`, `stride` apart; `level` is what the processor has.
    pub(super) unsafe fn run(&self, level: Level, rows: usize, out: *mut f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match level {
                Level::Portable => self.portable(rows, out, stride),
                #[cfg(target_arch = "x86_64")]
                _ if rows > SET => {
                    let mut room = [0; UNPACKED * PANEL];
                    for k in pieces(self.x.k, UNPACKED) {
                        self.panels.unpack_codes(self.panel, blocks(&k), &mut room);
                        let tile = SixteenTile { add: self.add || k.start > 0, ..*self };
                        tile.sets(Unpacked(room.as_ptr(), blocks(&k).start), blocks(&k), rows, out, stride);
                    }
                }
                #[cfg(target_arch = "x86_64")]
                _ => {
                    let all = blocks(&(0..self.x.k));
                    match self.panels.bits {
                        4 => self.sets(self.panels.coded::<4>(self.panel), all, rows, out, stride),
                        _ => self.sets(self.panels.coded::<8>(self.panel), all, rows, out, stride),
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`Self::run`], with AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn sets<C: CodePairs>(&self, codes: C, blocks: Range<usize>, rows: usize, out: *mut f32, stride: usize) {
        for row in (0..rows).step_by(SET) {
            let (tile, out) = (SixteenTile { row: self.row + row, ..*self }, out.wrapping_add(row * stride));
            // SAFETY: the caller's promise; a set has no more rows than are left.
            unsafe {
                match SET.min(self.x.m - tile.row) {
                    1 => tile.set::<1, 4, C>(codes, &blocks, out, stride),
                    2 => tile.set::<2, 4, C>(codes, &blocks, out, stride),
                    3 => tile.set::<3, 4, C>(codes, &blocks, out, stride),
                    4 => tile.set::<4, 2, C>(codes, &blocks, out, stride),
                    5 => tile.set::<5, 2, C>(codes, &blocks, out, stride),
                    _ => tile.set::<SET, 2, C>(codes, &blocks, out, stride),
                }
            }
        }
    }

    /// A set of M rows, V·8 columns at a time.
    /// # Safety
    /// As [`Self::sets`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn set<const M: usize, const V: usize, C: CodePairs>(
        &self,
        codes: C,
        blocks: &Range<usize>,
        out: *mut f32,
        stride: usize,
    ) {
        for first in (0..self.columns).step_by(8 * V) {
            let out = out.wrapping_add(first);
            // SAFETY: the caller's promise.
            unsafe {
                match (self.panels.groups, self.panels.has_offsets) {
                    (1, true) => self.avx2::<M, V, 1, true, C>(codes, blocks, first, out, stride),
                    (1, false) => self.avx2::<M, V, 1, false, C>(codes, blocks, first, out, stride),
                    (_, true) => self.avx2::<M, V, 2, true, C>(codes, blocks, first, out, stride),
                    (_, false) => self.avx2::<M, V, 2, false, C>(codes, blocks, first, out, stride),
                }
            }
        }
    }

    /// M rows of the V·8 columns from `first` on.
    /// # Safety
    /// As [`Self::sets`]; the panels have GROUPS groups in a block, and offsets or not.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2<const M: usize, const V: usize, const GROUPS: usize, const OFFSETS: bool, C: CodePairs>(
        &self,
        codes: C,
        blocks: &Range<usize>,
        first: usize,
        out: *mut f32,
        stride: usize,
    ) {
        let columns = (self.columns - first).min(8 * V);
        let mut totals = [[_mm256_setzero_ps(); V]; M];
        if self.add {
            for (r, totals) in totals.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { load_some(out.add(r * stride), columns, totals) };
            }
        }
        let (x, x_heads, _) = self.x.set(self.row);
        for block in blocks.clone() {
            let of_block = self.panels.block(self.panel, block);
            for group in 0..GROUPS {
                let mut sums = [[_mm256_setzero_si256(); V]; M];
                // SAFETY: the set has M rows of K codes.
                unsafe {
                    let x = x.as_ptr().add((block * BLOCK + group * (BLOCK / GROUPS)) * M);
                    codes.each::<V, GROUPS>(block, group, first, |pair, codes| {
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let x = _mm256_set1_epi32(x.add((pair * M + r) * 2).cast::<i32>().read_unaligned());
                            for v in 0..V {
                                sums[v] = _mm256_add_epi32(sums[v], _mm256_madd_epi16(codes[v], x));
                            }
                        }
                    });
                }
                let heads =
                    of_block[group * (1 + usize::from(OFFSETS))..].as_ptr().cast::<u8>().wrapping_add(first * 2);
                // What all columns share: a head's number, row by row.
                let of_x = |at: usize| -> [__m256; M] {
                    // SAFETY: the set has M heads for every block.
                    std::array::from_fn(|r| unsafe {
                        _mm256_set1_ps(*x_heads.get_unchecked((block * M + r) * HEAD + at))
                    })
                };
                for v in 0..V {
                    // SAFETY: a block has a line of scales for every group, and one of offsets behind it.
                    let scale = unsafe { eight(heads.add(16 * v)) };
                    let x_scales = of_x(0);
                    for r in 0..M {
                        let sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][v]), scale);
                        totals[r][v] = _mm256_fmadd_ps(x_scales[r], sum, totals[r][v]);
                    }
                    if OFFSETS {
                        // SAFETY: as above.
                        let offset = unsafe { eight(heads.add(LINE + 16 * v)) };
                        let x_sums = of_x(if GROUPS == 1 { 3 } else { 1 + group });
                        for r in 0..M {
                            totals[r][v] = _mm256_fmadd_ps(x_sums[r], offset, totals[r][v]);
                        }
                    }
                }
            }
        }
        for (r, totals) in totals.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { store_some(totals, out.add(r * stride), columns) };
        }
    }

    /// The same without vector instructions of our choosing.
    /// # Safety
    /// As [`Self::run`].
    unsafe fn portable(&self, rows: usize, out: *mut f32, stride: usize) {
        let groups = self.panels.groups;
        for row in 0..rows {
            // SAFETY: the caller's promise.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add(row * stride), self.columns) };
            if !self.add {
                out.fill(0.0);
            }
        }
        for block in blocks(&(0..self.x.k)) {
            let codes = self.panels.codes(self.panel, block);
            for row in 0..rows {
                let of_set = (self.row + row) % SET;
                let (x, x_heads, set) = self.x.set(self.row + row - of_set);
                let x_head = &x_heads[(block * set + of_set) * HEAD..][..HEAD];
                // SAFETY: the caller's promise.
                let out = unsafe { std::slice::from_raw_parts_mut(out.add(row * stride), self.columns) };
                for (group, numbers) in pieces(BLOCK, BLOCK / groups).enumerate() {
                    let (scales, offsets) = self.panels.heads_of(self.panel, block, group);
                    let mut sums = [0i32; PANEL];
                    for k in numbers {
                        let x = i32::from(x[((block * BLOCK + k) / 2 * set + of_set) * 2 + k % 2]);
                        sums.iter_mut().zip(&codes[k]).for_each(|(sum, code)| *sum += x * i32::from(*code));
                    }
                    let x_sum = x_head[if groups == 1 { 3 } else { 1 + group }];
                    for (column, out) in out.iter_mut().enumerate() {
                        *out += x_head[0] * (sums[column] as f32 * scales[column]);
                        *out += x_sum * offsets[column];
                    }
                }
            }
        }
    }
}

/// Where the codes of a panel come from, two along K at a time.
#[cfg(target_arch = "x86_64")]
pub(super) trait CodePairs: Copy {
    /// Gives the pairs of a group of a block in order, each as V vectors of 8 columns from column `first` on.
    /// # Safety
    /// The blocks have GROUPS groups; V is 4 and first 0, or V is 2 and first 0 or 16; the processor has AVX2.
    unsafe fn each<const V: usize, const GROUPS: usize>(
        self,
        block: usize,
        group: usize,
        first: usize,
        emit: impl FnMut(usize, [__m256i; V]),
    );
}

/// Codes that were taken apart, (K / 2, 32, 2), and their first block.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Unpacked(*const i16, usize);

#[cfg(target_arch = "x86_64")]
impl CodePairs for Unpacked {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn each<const V: usize, const GROUPS: usize>(
        self,
        block: usize,
        group: usize,
        first: usize,
        mut emit: impl FnMut(usize, [__m256i; V]),
    ) {
        let pairs = BLOCK / 2 / GROUPS;
        let from = self.0.wrapping_add((((block - self.1) * GROUPS + group) * pairs * PANEL + first) * 2);
        for pair in 0..pairs {
            let mut codes = [_mm256_setzero_si256(); V];
            for (v, codes) in codes.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *codes = unsafe { _mm256_loadu_si256(from.add((pair * PANEL + v * 8) * 2).cast()) };
            }
            emit(pair, codes);
        }
    }
}
