//! Turning panels over N into panels over K, a block of 32 × 32 at a time, for the gradient of the input.

use half::bf16;

use super::stored::Stored;
use super::tile::PANEL;
use crate::cores::each;
use crate::kernels::cpu::level::Level;

/// [`corner`] of sixteen rows of sixteen numbers.
/// # Safety
/// As [`corner`]; the processor has AVX-512F.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn turn16<W: Stored>(row: impl Fn(usize) -> (*const W, usize), out: *mut f32, out_pitch: usize) {
    use std::arch::x86_64::*;
    let zero = _mm512_setzero_ps();
    let (mut a, mut b) = ([zero; 16], [zero; 16]);
    for (r, a) in a.iter_mut().enumerate() {
        let (from, part) = row(r);
        // SAFETY: the caller's promise.
        *a = unsafe { W::load16(from, part) };
    }
    // Pairs of rows, then fours, within each 128-bit lane.
    for r in (0..16).step_by(2) {
        b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
    }
    for r in (0..16).step_by(4) {
        let d = |x: __m512| _mm512_castps_pd(x);
        a[r] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(b[r]), d(b[r + 2])));
        a[r + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(b[r]), d(b[r + 2])));
        a[r + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(b[r + 1]), d(b[r + 3])));
        a[r + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(b[r + 1]), d(b[r + 3])));
    }
    // a[4g + i], lane l: rows 4g..4g+4 of column 4l + i. Now the lanes: eights, then all.
    for i in 0..4 {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for i in 0..4 {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd);
    }
    for (c, a) in a.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(out.add(c * out_pitch), *a) };
    }
}

/// [`corner`] of eight rows of eight numbers.
/// # Safety
/// As [`corner`]; the processor has AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn turn8<W: Stored>(row: impl Fn(usize) -> (*const W, usize), out: *mut f32, out_pitch: usize) {
    use std::arch::x86_64::*;
    let (mut a, mut b) = ([_mm256_setzero_ps(); 8], [_mm256_setzero_ps(); 8]);
    for (r, a) in a.iter_mut().enumerate() {
        let (from, part) = row(r);
        // SAFETY: the caller's promise.
        *a = unsafe { W::load8(from, part) };
    }
    for r in (0..8).step_by(2) {
        b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
    }
    for r in [0, 4] {
        let d = |x: __m256| _mm256_castps_pd(x);
        a[r] = _mm256_castpd_ps(_mm256_unpacklo_pd(d(b[r]), d(b[r + 2])));
        a[r + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(d(b[r]), d(b[r + 2])));
        a[r + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(d(b[r + 1]), d(b[r + 3])));
        a[r + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(d(b[r + 1]), d(b[r + 3])));
    }
    // a[4g + i], lane l: rows 4g..4g+4 of column 4l + i.
    for i in 0..4 {
        let columns = [_mm256_permute2f128_ps::<0x20>(a[i], a[i + 4]), _mm256_permute2f128_ps::<0x31>(a[i], a[i + 4])];
        for (lane, column) in columns.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { _mm256_storeu_ps(out.add((4 * lane + i) * out_pitch), column) };
        }
    }
}

/// Rows and columns of a [`corner`], where there are vectors for it.
#[cfg(target_arch = "x86_64")]
pub(in super::super) fn side(level: Level) -> Option<usize> {
    match level {
        Level::Avx512 => Some(16),
        Level::Avx2 => Some(8),
        Level::Portable => None,
    }
}

/// A square of numbers, widened and turned: `out[c·out_pitch + r] = row r's c-th number`. `row(r)` is where row r begins, and which of the
/// rows that lie together there it is.
/// # Safety
/// Every row has [`side`] numbers, `out` as many rows of as many, `out_pitch` apart; the processor has the level, which has a side.
#[cfg(target_arch = "x86_64")]
pub(in super::super) unsafe fn corner<W: Stored>(
    level: Level,
    row: impl Fn(usize) -> (*const W, usize),
    out: *mut f32,
    out_pitch: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match level {
            Level::Avx512 => turn16(row, out, out_pitch),
            _ => turn8(row, out, out_pitch),
        }
    }
}

/// The first 32 columns k (past the end they are zeros) of one panel, widened and turned into `to`: (32 rows n, 32 columns k).
pub(super) fn widened<W: Stored>(level: Level, of_block: &[W], to: &mut [f32]) {
    let rows = (of_block.len() / PANEL).min(PANEL);
    #[cfg(target_arch = "x86_64")]
    if let Some(side) = side(level).filter(|_| rows == PANEL) {
        assert!(to.len() >= PANEL * PANEL);
        for (n, k) in (0..PANEL).step_by(side).flat_map(|n| (0..PANEL).step_by(side).map(move |k| (n, k))) {
            let row = |r: usize| {
                let (group, part) = ((k + r) / W::STEP, (k + r) % W::STEP);
                (of_block.as_ptr().wrapping_add((group * PANEL + n) * W::STEP), part)
            };
            // SAFETY: the block has 32 rows of k with 32 columns of n, `to` the same the other way round; the level is the processor's.
            unsafe { corner(level, row, to.as_mut_ptr().add(n * PANEL + k), PANEL) };
        }
        return;
    }
    let _ = level;
    for n in 0..PANEL {
        for k in 0..PANEL {
            let from = (k / W::STEP * PANEL + n) * W::STEP + k % W::STEP;
            to[n * PANEL + k] = of_block.get(from).map_or(0.0, |number| number.widen());
        }
    }
}

/// All squares of a weight, panel after panel of one column of squares after the other: `count` times `panels`; `turn` is given the
/// panel, the column and where the square goes, and writes all of it.
pub(super) fn squares<T: Copy + Default + Send + Sync>(
    panels: usize,
    count: usize,
    turn: impl Fn(usize, usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut squares = Vec::with_capacity(count * panels * PANEL * PANEL);
    let (room, _) = squares.spare_capacity_mut().as_chunks_mut::<{ PANEL * PANEL }>();
    each(room[..count * panels].chunks_mut(panels).enumerate(), |(index, column)| {
        let mut square = [T::default(); PANEL * PANEL];
        for (panel, to) in column.iter_mut().enumerate() {
            turn(panel, index, &mut square);
            to.write_copy_of_slice(&square);
        }
    });
    // SAFETY: the capacity is that, and every square was written.
    unsafe { squares.set_len(count * panels * PANEL * PANEL) };
    squares
}

/// As [`widened`], in pairs: from (16 pairs of k, 32 n) to (16 pairs of n, 32 k).
pub(super) fn paired(of_block: &[bf16], to: &mut [bf16]) {
    #[cfg(target_arch = "x86_64")]
    if of_block.len() >= PANEL * PANEL && to.len() >= PANEL * PANEL && super::has_bf16_products() {
        // SAFETY: both blocks are whole; AVX-512F and AVX-512BW are there.
        unsafe { turn_pairs(of_block.as_ptr().cast(), to.as_mut_ptr().cast()) };
        return;
    }
    for n in 0..PANEL {
        for k in 0..PANEL {
            let from = (k / 2 * PANEL + n) * 2 + k % 2;
            to[(n / 2 * PANEL + k) * 2 + n % 2] = of_block.get(from).copied().unwrap_or_default();
        }
    }
}

/// A square of two by two numbers is 64 bits, (k, k+1) of n, then of n + 1: turned inside by one shuffle of bytes, and the 16 × 16
/// squares turned as four times 8 × 8.
/// # Safety
/// `from` and `to` have 16 rows of 16 squares; the processor has AVX-512F and AVX-512BW.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn turn_pairs(from: *const u64, to: *mut u64) {
    use std::arch::x86_64::*;
    let inner = _mm512_broadcast_i32x4(_mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0));
    let zero = _mm512_setzero_si512();
    for corner in 0..4 {
        let (row, column) = (corner / 2 * 8, corner % 2 * 8);
        let (mut a, mut b) = ([zero; 8], [zero; 8]);
        for (r, a) in a.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *a = unsafe { _mm512_shuffle_epi8(_mm512_loadu_si512(from.add((row + r) * 16 + column).cast()), inner) };
        }
        for r in (0..8).step_by(2) {
            b[r] = _mm512_unpacklo_epi64(a[r], a[r + 1]);
            b[r + 1] = _mm512_unpackhi_epi64(a[r], a[r + 1]);
        }
        // b[2g + i], lane l: rows 2g, 2g+1 of column 2l + i.
        for i in 0..2 {
            a[i] = _mm512_shuffle_i64x2(b[i], b[i + 2], 0x88);
            a[i + 2] = _mm512_shuffle_i64x2(b[i], b[i + 2], 0xdd);
            a[i + 4] = _mm512_shuffle_i64x2(b[i + 4], b[i + 6], 0x88);
            a[i + 6] = _mm512_shuffle_i64x2(b[i + 4], b[i + 6], 0xdd);
        }
        for i in 0..2 {
            b[i] = _mm512_shuffle_i64x2(a[i], a[i + 4], 0x88);
            b[i + 4] = _mm512_shuffle_i64x2(a[i], a[i + 4], 0xdd);
            b[i + 2] = _mm512_shuffle_i64x2(a[i + 2], a[i + 6], 0x88);
            b[i + 6] = _mm512_shuffle_i64x2(a[i + 2], a[i + 6], 0xdd);
        }
        for (c, b) in b.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_si512(to.add((column + c) * 16 + row).cast(), *b) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::level::level;

    #[test]
    fn blocks_are_turned_whole_and_at_the_edge() {
        // 40 rows of k: one whole block, and one of 8.
        let panel: Vec<bf16> = (0..40 * PANEL).map(|at| bf16::from_bits(0x3f80 + at as u16)).collect();
        let of = |n: usize, k: usize| if k < 40 { panel[(k / 2 * PANEL + n) * 2 + k % 2] } else { bf16::ZERO };
        for start in [0, 32] {
            let mut wide = vec![1f32; PANEL * PANEL];
            widened(level(), &panel[start * PANEL..], &mut wide);
            let mut pairs = vec![bf16::ONE; PANEL * PANEL];
            paired(&panel[start * PANEL..], &mut pairs);
            for n in 0..PANEL {
                for k in 0..PANEL {
                    assert_eq!(wide[n * PANEL + k], of(n, start + k).to_f32());
                    assert_eq!(pairs[(n / 2 * PANEL + k) * 2 + n % 2], of(n, start + k));
                }
            }
        }
    }
}
