//! Products of two plain matrices, neither packed before.

use super::row_blocks;
use super::tile::{PANEL, Plain, Sums, Tile};
use crate::cores::each;
use crate::kernels::cpu::level::level;
use crate::kernels::cpu::places::Out;

/// A plain matrix as the left side of [`multiply`].
#[derive(Clone, Copy, Debug)]
pub enum Left<'a> {
    /// (M, K), row-major.
    Rows(&'a [f32]),
    /// The transpose of a row-major (K, M).
    Turned(&'a [f32]),
}

/// `out (+)= left·right`. left: (M, K), right: (K, N) row-major, out: (M, N). They are added to what `out` holds where `add`.
pub fn multiply(left: Left<'_>, right: &[f32], (m, k, n): (usize, usize, usize), out: &mut [f32], add: bool) {
    let (numbers, turned) = match left {
        Left::Rows(numbers) => (numbers, false),
        Left::Turned(numbers) => (numbers, true),
    };
    assert!(numbers.len() == m * k && right.len() == k * n && out.len() == m * n);
    if m * n == 0 {
        return;
    }
    let level = level();
    let out = Out(out.as_mut_ptr());
    let (blocks, block) = if turned { (1, m) } else { row_blocks(m, k) };
    let count = n.div_ceil(PANEL);
    let one = |task: usize| {
        let (at, panel) = (task % blocks, task / blocks);
        let rows = at * block..m.min((at + 1) * block);
        let (stride, from) = if turned { (m, rows.start) } else { (k, rows.start * k) };
        let columns = PANEL.min(n - panel * PANEL);
        let mut tile = Tile {
            x: numbers.as_ptr().wrapping_add(from),
            stride,
            turned,
            weights: Plain(right.as_ptr().wrapping_add(panel * PANEL), n),
            k,
            columns,
            sums: Sums::new(add),
        };
        // Vectors are read whole: a copy where the last ones would end past the matrix.
        let mut whole = Vec::new();
        if columns < PANEL && columns != 16 {
            whole = vec![0f32; k * PANEL];
            for (to, from) in whole.chunks_exact_mut(PANEL).zip(right.chunks_exact(n)) {
                to[..columns].copy_from_slice(&from[panel * PANEL..]);
            }
            tile.weights = Plain(whole.as_ptr(), PANEL);
        }
        // SAFETY: rows and columns are inside out and no other task has them; `whole` lives until here.
        unsafe { tile.run(level, rows.len(), out.at(rows.start * n + panel * PANEL), n) };
        drop(whole);
    };
    each(0..blocks * count, one);
}
