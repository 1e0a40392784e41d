//! Numbers read out of codes by vectors: in f32 by AVX-512 or AVX2, in pairs of bf16 by AVX-512-BF16.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::coded::{BLOCK, CodePanels, LINE, Line};
use super::sixteen::CodePairs;
use super::tile::PANEL;

/// How many lines ahead of the ones that are unpacked the processor is asked for.
const AHEAD: usize = 32;

impl CodePanels {
    /// # Safety
    /// `to` has room for 32 rows of 32; the processor has AVX2, FMA and F16C.
    pub(super) unsafe fn widen_by_pairs(&self, panel: usize, block: usize, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.bits {
                4 => self.widen_pairs(self.coded::<4>(panel), panel, block, to),
                _ => self.widen_pairs(self.coded::<8>(panel), panel, block, to),
            }
        }
    }

    /// # Safety
    /// As [`Self::widen_by_pairs`].
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen_pairs<const BITS: usize>(&self, codes: Coded<BITS>, panel: usize, block: usize, to: *mut f32) {
        let of_group = |group: usize| {
            let heads = &self.block(panel, block)[group * self.heads() / self.groups..];
            // SAFETY: a line is 64 bytes.
            let numbers = |line: &Line| std::array::from_fn(|v| unsafe { eight(line.0.as_ptr().add(16 * v)) });
            let none = [_mm256_setzero_ps(); 4];
            let found: [[__m256; 4]; 2] =
                [numbers(&heads[0]), if self.has_offsets { numbers(&heads[1]) } else { none }];
            found
        };
        let heads = [of_group(0), of_group(self.groups - 1)];
        let put = |pair: usize, codes: [__m256i; 4]| {
            let [scales, offsets] = &heads[pair / (BLOCK / 4)];
            for (v, codes) in codes.into_iter().enumerate() {
                let rows = [_mm256_slli_epi32::<16>(codes), codes].map(|codes| _mm256_srai_epi32::<16>(codes));
                for (row, codes) in rows.into_iter().enumerate() {
                    let numbers = _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), scales[v], offsets[v]);
                    // SAFETY: the row is one of 32.
                    unsafe { _mm256_storeu_ps(to.add((2 * pair + row) * PANEL + 8 * v), numbers) };
                }
            }
        };
        // SAFETY: the caller's promise. The pairs of all groups follow each other.
        unsafe { codes.each::<4, 1>(block, 0, 0, put) };
    }

    /// Blocks of a panel as pairs of whole numbers: (16·blocks, 32, 2).
    /// # Safety
    /// `to` has room for them; the processor has AVX2, FMA and F16C.
    pub(super) unsafe fn unpack_codes(&self, panel: usize, blocks: Range<usize>, to: *mut i16) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.bits {
                4 => unpack_codes(self.coded::<4>(panel), blocks, to),
                _ => unpack_codes(self.coded::<8>(panel), blocks, to),
            }
        }
    }

    /// # Safety
    /// `to` has room for 32 rows of 32; the processor has AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn widen_by_rows(&self, panel: usize, block: usize, to: *mut f32) {
        let put = |row: usize, numbers: [__m512; 2]| {
            for (half, numbers) in numbers.into_iter().enumerate() {
                // SAFETY: the row is one of 32.
                unsafe { _mm512_storeu_ps(to.add(row * PANEL + half * 16), numbers) };
            }
        };
        // SAFETY: the caller's promise.
        unsafe { self.rows(panel, block, put) };
    }

    /// The rows of one block in order, each as two vectors of 16 columns in f32.
    /// # Safety
    /// The processor has AVX-512F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn rows(&self, panel: usize, block: usize, emit: impl FnMut(usize, [__m512; 2])) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.bits {
                4 => self.rows_of_bits::<4>(panel, block, emit),
                _ => self.rows_of_bits::<8>(panel, block, emit),
            }
        }
    }

    /// # Safety
    /// As [`Self::rows`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn rows_of_bits<const BITS: usize>(
        &self,
        panel: usize,
        block: usize,
        mut emit: impl FnMut(usize, [__m512; 2]),
    ) {
        let (per_group, per_line) = (BITS / self.groups, BLOCK / BITS);
        let numbers = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
        let evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
        let odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        // The codes of a row's second eight columns are the next four bits.
        let nibbles = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
        let apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        let (heads, codes) = self.block(panel, block).split_at(self.heads());
        let mut of_group = heads.chunks_exact(1 + usize::from(self.has_offsets));
        let (mut scales, mut offsets) = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 2]);
        for line in 0..BITS {
            if line % per_group == 0 {
                let heads = of_group.next().unwrap_or_default();
                scales = halves(&heads[0]);
                if let Some(line) = heads.get(1) {
                    offsets = halves(line);
                }
            }
            let number = |half: usize, code: __m512| _mm512_fmadd_ps(code, scales[half], offsets[half]);
            let from = [codes[2 * line].0.as_ptr(), codes[2 * line + 1].0.as_ptr()];
            from.into_iter().for_each(|from| _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD * LINE).cast()));
            if BITS == 4 {
                // SAFETY: a line is 64 bytes.
                let words = unsafe { [_mm512_load_si512(from[0].cast()), _mm512_load_si512(from[1].cast())] };
                let [e0, e1] = [_mm512_permutexvar_epi32(evens, words[0]), _mm512_permutexvar_epi32(evens, words[1])];
                let [o0, o1] = [_mm512_permutexvar_epi32(odds, words[0]), _mm512_permutexvar_epi32(odds, words[1])];
                // The low four bits of a word choose the number.
                let code = |words, by| _mm512_permutexvar_ps(_mm512_srlv_epi32(words, by), numbers);
                for row in (0..per_line).step_by(2) {
                    let by = _mm512_add_epi32(nibbles, _mm512_set1_epi32((row * 4) as i32));
                    emit(line * per_line + row, [number(0, code(e0, by)), number(1, code(e1, by))]);
                    emit(line * per_line + row + 1, [number(0, code(o0, by)), number(1, code(o1, by))]);
                }
            } else {
                for row in (0..per_line).step_by(2) {
                    let set = |half: usize, set: usize| {
                        // SAFETY: a line is 64 bytes.
                        unsafe { _mm_shuffle_epi8(_mm_load_si128(from[half].add(16 * (row + set)).cast()), apart) }
                    };
                    let sets = [set(0, 0), set(0, 1), set(1, 0), set(1, 1)];
                    let code = |codes| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
                    let first =
                        |half: usize| number(half, code(_mm_unpacklo_epi64(sets[2 * half], sets[2 * half + 1])));
                    let second =
                        |half: usize| number(half, code(_mm_unpackhi_epi64(sets[2 * half], sets[2 * half + 1])));
                    emit(line * per_line + row, [first(0), first(1)]);
                    emit(line * per_line + row + 1, [second(0), second(1)]);
                }
            }
        }
    }

    /// Blocks of a panel as pairs: (16·blocks, 32, 2).
    /// # Safety
    /// `to` has room for them; the processor has AVX-512F, AVX-512BW and AVX-512-BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn unpack(&self, panel: usize, blocks: Range<usize>, to: *mut bf16) {
        for (at, block) in blocks.enumerate() {
            let to = to.wrapping_add(at * BLOCK * PANEL);
            // SAFETY: the caller's promise.
            unsafe {
                self.walk(panel, block, |pair, weights| {
                    for (half, weights) in weights.into_iter().enumerate() {
                        let weights = std::mem::transmute::<__m512bh, __m512i>(weights);
                        _mm512_storeu_si512(to.add(pair * PANEL * 2 + half * 32).cast(), weights);
                    }
                });
            }
        }
    }

    /// The pairs of one block in order, each as two vectors of 16 columns.
    /// # Safety
    /// The processor has AVX-512F, AVX-512BW and AVX-512-BF16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn walk(&self, panel: usize, block: usize, emit: impl FnMut(usize, [__m512bh; 2])) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.bits {
                4 => self.walk_bits::<4>(panel, block, emit),
                _ => self.walk_bits::<8>(panel, block, emit),
            }
        }
    }

    /// # Safety
    /// As [`Self::walk`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn walk_bits<const BITS: usize>(
        &self,
        panel: usize,
        block: usize,
        mut emit: impl FnMut(usize, [__m512bh; 2]),
    ) {
        let lines = self.block(panel, block);
        let (per_group, pairs) = (BITS / self.groups, 16 / BITS);
        let numbers = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
        let code = |line: &Line, at: usize| {
            // SAFETY: a line is 64 bytes.
            unsafe {
                if BITS == 4 {
                    // The low four bits of a word choose the number.
                    let words = _mm512_load_si512(line.0.as_ptr().cast());
                    _mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_set1_epi32(4 * at as i32)), numbers)
                } else {
                    let bytes = _mm_load_si128(line.0.as_ptr().add(16 * at).cast());
                    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
                }
            }
        };
        let (heads, codes) = lines.split_at(self.heads());
        for group in 0..self.groups {
            let heads = &heads[group * heads.len() / self.groups..];
            let scales = doubled(&heads[0]);
            let offsets = if self.has_offsets { doubled(&heads[1]) } else { [_mm512_setzero_ps(); 4] };
            for step in group * per_group..(group + 1) * per_group {
                let lines = [&codes[2 * step], &codes[2 * step + 1]];
                for pair in 0..pairs {
                    let half = |h: usize| {
                        let of = |part: usize| {
                            let at = 2 * h + part;
                            _mm512_fmadd_ps(code(lines[h], 2 * pair + part), scales[at], offsets[at])
                        };
                        _mm512_cvtne2ps_pbh(of(1), of(0))
                    };
                    emit(step * pairs + pair, [half(0), half(1)]);
                }
            }
        }
    }
}

/// A panel's codes, the first of its lines, and the lines of a block.
#[derive(Clone, Copy)]
pub(super) struct Coded<const BITS: usize>(*const Line, usize);

impl CodePanels {
    /// A panel whose codes have BITS bits.
    pub(super) fn coded<const BITS: usize>(&self, panel: usize) -> Coded<BITS> {
        let block = self.block(panel, 0);
        Coded(block.as_ptr(), block.len())
    }
}

impl<const BITS: usize> CodePairs for Coded<BITS> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn each<const V: usize, const GROUPS: usize>(
        self,
        block: usize,
        group: usize,
        first: usize,
        mut emit: impl FnMut(usize, [__m256i; V]),
    ) {
        let (per_group, pairs) = (BITS / GROUPS, 16 / BITS);
        let lines = self.0.wrapping_add((block + 1) * self.1 - 2 * BITS + 2 * group * per_group + first / 16);
        for step in 0..per_group {
            // The line of 16 columns that a vector's eight are in.
            let line = |v: usize| lines.wrapping_add(2 * step + v / 2).cast::<u8>();
            (0..V).step_by(2).for_each(|v| _mm_prefetch::<_MM_HINT_T0>(line(v).wrapping_add(AHEAD * LINE).cast()));
            if BITS == 4 {
                let mut words = [[_mm256_setzero_si256(); 2]; V];
                for v in (0..V).step_by(2) {
                    // SAFETY: a line is 64 bytes.
                    words[v] = unsafe { words_of_pairs(line(v)) };
                    words[v + 1] = words[v].map(|words| _mm256_srli_epi32::<4>(words));
                }
                for pair in 0..pairs {
                    let code = |v: usize| {
                        let words = words[v][pair / 2];
                        let words = if pair % 2 == 0 { words } else { _mm256_srli_epi32::<8>(words) };
                        _mm256_and_si256(words, _mm256_set1_epi32(0x000f_000f))
                    };
                    emit(step * pairs + pair, std::array::from_fn(code));
                }
            } else {
                for pair in 0..pairs {
                    let code = |v: usize| {
                        // SAFETY: as above.
                        unsafe { _mm256_cvtepi8_epi16(_mm_load_si128(line(v).add(16 * (2 * pair + v % 2)).cast())) }
                    };
                    emit(step * pairs + pair, std::array::from_fn(code));
                }
            }
        }
    }
}

/// A line of codes of 4 bits in two vectors of (8 columns, 2 of K) words of 16 bits: the sets of the first two pairs, and of the others.
/// # Safety
/// There is a line; the processor has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn words_of_pairs(line: *const u8) -> [__m256i; 2] {
    // SAFETY: a line is 64 bytes.
    let (first, last) = unsafe { (_mm256_load_ps(line.cast()), _mm256_load_ps(line.add(32).cast())) };
    let even = _mm256_castps_si256(_mm256_shuffle_ps::<0x88>(first, last));
    let odd = _mm256_castps_si256(_mm256_shuffle_ps::<0xdd>(first, last));
    // By columns: the halves of a vector were shuffled apart.
    let (even, odd) = (_mm256_permute4x64_epi64::<0xd8>(even), _mm256_permute4x64_epi64::<0xd8>(odd));
    [
        _mm256_blend_epi16::<0xaa>(even, _mm256_slli_epi32::<16>(odd)),
        _mm256_blend_epi16::<0xaa>(_mm256_srli_epi32::<16>(even), odd),
    ]
}

/// # Safety
/// As [`CodePanels::unpack_codes`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack_codes<const BITS: usize>(codes: Coded<BITS>, blocks: Range<usize>, to: *mut i16) {
    for (at, block) in blocks.enumerate() {
        let to = to.wrapping_add(at * BLOCK * PANEL);
        // SAFETY: the caller's promise, and `to` has room for 16 pairs of 32. The pairs of all groups follow each other.
        unsafe {
            codes.each::<4, 1>(block, 0, 0, |pair, codes| {
                for (v, codes) in codes.into_iter().enumerate() {
                    _mm256_storeu_si256(to.add((pair * PANEL + v * 8) * 2).cast(), codes);
                }
            });
        }
    }
}

/// 32 numbers as four vectors of eight, each twice.
#[inline]
#[target_feature(enable = "avx512f")]
fn doubled(line: &Line) -> [__m512; 4] {
    let low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    let mut all = [_mm512_setzero_ps(); 4];
    for half in 0..2 {
        // SAFETY: a line is 64 bytes.
        let numbers = _mm512_cvtph_ps(unsafe { _mm256_load_si256(line.0.as_ptr().add(32 * half).cast()) });
        all[2 * half] = _mm512_permutexvar_ps(low, numbers);
        all[2 * half + 1] = _mm512_permutexvar_ps(high, numbers);
    }
    all
}

/// 32 numbers as two vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(line: &Line) -> [__m512; 2] {
    // SAFETY: a line is 64 bytes.
    let half = |byte: usize| _mm512_cvtph_ps(unsafe { _mm256_load_si256(line.0.as_ptr().add(byte).cast()) });
    [half(0), half(32)]
}

/// Eight numbers in half precision.
/// # Safety
/// There are eight; the processor has F16C.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn eight(from: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
}
