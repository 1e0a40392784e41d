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
    pub(super) fn new(level: Level, x: &[f32], k: usize) -> Self {
        let m = x.len() / k;
        let mut found = Sixteens { codes: vec![0; m * k], heads: vec![0.0; m * k / BLOCK * HEAD], m, k };
        let to = found.codes.chunks_mut(SET * k).zip(found.heads.chunks_mut(SET * k / BLOCK * HEAD));
        each(x.chunks(SET * k).zip(to), |(x, (codes, heads))| {
            let rows = x.len() / k;
            for (row, x) in x.chunks_exact(k).enumerate() {
                to_codes(level, x, rows, &mut codes[row * 2..], &mut heads[row * HEAD..]);
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

/// One row x: (K) of a set of `rows`.
fn to_codes(level: Level, x: &[f32], rows: usize, codes: &mut [i16], heads: &mut [f32]) {
    for (block, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
        let mut whole = [0i16; BLOCK];
        let (scale, [first, last]) = match level {
            Level::Portable => to_whole(x, &mut whole),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has AVX2.
            _ => unsafe { to_whole_by_eights(x, &mut whole) },
        };
        let to = codes[block * (BLOCK / 2) * rows * 2..].chunks_mut(rows * 2);
        for (to, whole) in to.zip(whole.as_chunks::<2>().0) {
            to[..2].copy_from_slice(whole);
        }
        let sum = |of: i32| scale * of as f32;
        heads[block * rows * HEAD..][..HEAD].copy_from_slice(&[scale, sum(first), sum(last), sum(first + last)]);
    }
}

/// What a code of activations whose largest is `most` is the whole number of, and its scale.
fn steps(most: f32) -> [f32; 2] {
    if most > LEAST { [MOST / most, most / MOST] } else { [0.0; 2] }
}

/// Codes of a block, their scale, and the sums of the first 16 and of the others.
fn to_whole(x: &[f32; BLOCK], whole: &mut [i16; BLOCK]) -> (f32, [i32; 2]) {
    let (mut most, mut broken) = (0f32, 0f32);
    for x in x {
        most = if x.abs() > most { x.abs() } else { most };
        broken += x * 0.0;
    }
    let [by, scale] = steps(most);
    for (whole, x) in whole.iter_mut().zip(x) {
        *whole = (x * by + WHOLE).to_bits() as i16;
    }
    let sum = |whole: &[i16]| whole.iter().map(|code| i32::from(*code)).sum();
    let (first, last) = whole.split_at(BLOCK / 2);
    (scale + broken, [sum(first), sum(last)])
}

/// [`to_whole`], with the same bits.
/// # Safety
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn to_whole_by_eights(x: &[f32; BLOCK], whole: &mut [i16; BLOCK]) -> (f32, [i32; 2]) {
    let zero = _mm256_setzero_ps();
    let (mut most, mut broken, mut parts) = (zero, zero, [zero; 4]);
    for (part, x) in parts.iter_mut().zip(x.as_chunks::<8>().0) {
        // SAFETY: eight numbers.
        *part = unsafe { _mm256_loadu_ps(x.as_ptr()) };
        most = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0), *part), most);
        broken = _mm256_fmadd_ps(*part, zero, broken);
    }
    let mut halves = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps::<1>(most));
    halves = _mm_max_ps(halves, _mm_movehl_ps(halves, halves));
    let most = _mm_cvtss_f32(_mm_max_ss(halves, _mm_movehdup_ps(halves)));
    // What is not finite times zero is not a number, which all comparisons deny.
    let broken = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(broken, zero)) != 0;
    let [by, scale] = steps(most);
    let scale = if broken { f32::NAN } else { scale };
    let mut sums = [0; 2];
    for half in 0..2 {
        let [low, high] = [parts[2 * half], parts[2 * half + 1]].map(|part| {
            let moved = _mm256_add_ps(_mm256_mul_ps(part, _mm256_set1_ps(by)), _mm256_set1_ps(WHOLE));
            _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(_mm256_castps_si256(moved)))
        });
        let codes = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(low, high));
        // SAFETY: there is room for 16.
        unsafe { _mm256_storeu_si256(whole.as_mut_ptr().add(half * BLOCK / 2).cast(), codes) };
        let sum = _mm256_add_epi32(low, high);
        let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
        let sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
        sums[half] = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<1>(sum)));
    }
    (scale, sums)
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
    /// `rows` rows. The codes of a panel are taken apart on the way, and first into memory where the rows are more than two sets.
    /// # Safety
    /// `out` has `rows` rows of `columns`, `stride` apart; `level` is what the processor has.
    pub(super) unsafe fn run(&self, level: Level, rows: usize, out: *mut f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match level {
                Level::Portable => self.portable(rows, out, stride),
                #[cfg(target_arch = "x86_64")]
                _ if rows > 2 * SET => {
                    let mut room = std::mem::MaybeUninit::<[i16; UNPACKED * PANEL]>::uninit();
                    let room = room.as_mut_ptr().cast::<i16>();
                    for k in pieces(self.x.k, UNPACKED) {
                        self.panels.unpack_codes(self.panel, blocks(&k), room);
                        let tile = SixteenTile { add: self.add || k.start > 0, ..*self };
                        tile.sets(Unpacked(room, blocks(&k).start), blocks(&k), rows, out, stride);
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

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn codes_by_eights_are_those_one_by_one() {
        if !matches!(crate::kernels::cpu::level::level(), Level::Avx2 | Level::Avx512) {
            return;
        }
        for seed in 0..200u32 {
            let mut x: [f32; BLOCK] =
                std::array::from_fn(|at| ((at as u32 * 7919 + seed * 104_729) % 997) as f32 - 498.0);
            match seed % 4 {
                0 => x = x.map(|x| x * 1e-38),
                1 => {
                    x[seed as usize % BLOCK] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30][seed as usize / 4 % 4]
                }
                _ => {}
            }
            let [mut one, mut eight] = [[0; BLOCK]; 2];
            let (scale, sums) = to_whole(&x, &mut one);
            // SAFETY: the level says that there is AVX2.
            let (wide_scale, wide_sums) = unsafe { to_whole_by_eights(&x, &mut eight) };
            assert!(scale == wide_scale || scale.is_nan() && wide_scale.is_nan(), "{scale} {wide_scale}");
            assert!(scale.is_nan() || (one, sums) == (eight, wide_sums), "{x:?}: {one:?} {eight:?}");
        }
    }
}
