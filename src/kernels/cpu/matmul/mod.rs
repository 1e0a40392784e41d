//! Products with a frozen weight that was packed once, and with plain matrices.
//!
//! Every output number is summed over the inner dimension in order by one chain, so it does not depend on how many rows the call has,
//! nor on how the work was cut up. A weight in bf16 is multiplied by `vdpbf16ps` where the processor has it, which rounds the
//! activations to bf16; elsewhere it is widened and multiplied in f32, so the two differ by bf16's rounding.

#[cfg(target_arch = "x86_64")]
mod pairs;
mod stored;
#[cfg(test)]
mod tests;
mod tile;
mod turn;

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::level::{Level, Out, filled, has_bf16_products, level};
use stored::Stored;
use tile::ROWS;
pub(super) use tile::{PANEL, Tile};
#[cfg(target_arch = "x86_64")]
pub(super) use turn::turn16;

/// Numbers of a block of activations, so that it stays in cache while panels pass by.
const BLOCK: usize = 1 << 17;
/// Rows of W that are turned at once for the gradient.
const TURNED: usize = 1024;
/// Tasks a thread gets: enough to even out, few enough to cost nothing when one row is read.
const TASKS: usize = 4;

/// How the weight's numbers are stored.
#[derive(Clone, Debug)]
pub enum Width {
    /// 4 bytes.
    F32(Vec<f32>),
    /// 2 bytes, exponent of f32.
    Bf16(Vec<bf16>),
    /// 2 bytes, IEEE half.
    F16(Vec<f16>),
}

/// A weight W: (N, K) as panels `(⌈N/32⌉, K, 32)`, in bf16 `(⌈N/32⌉, ⌈K/2⌉, 32, 2)`, zero-padded.
#[derive(Clone, Debug)]
pub struct Packed {
    n: usize,
    k: usize,
    width: Width,
}

/// How a call multiplies.
#[derive(Clone, Copy, Debug)]
struct Mode {
    level: Level,
    /// bf16 weights by `vdpbf16ps`.
    pairs: bool,
}

impl Mode {
    fn best() -> Self {
        Mode { level: level(), pairs: has_bf16_products() }
    }
}

impl Packed {
    /// Packs W: (N, K), row-major.
    pub fn new(weight: &Width, n: usize, k: usize) -> Self {
        let width = match weight {
            Width::F32(weight) => Width::F32(pack(weight, n, k)),
            Width::Bf16(weight) => Width::Bf16(pack(weight, n, k)),
            Width::F16(weight) => Width::F16(pack(weight, n, k)),
        };
        Packed { n, k, width }
    }

    /// Rows of W: output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns of W: input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.width {
            Width::F32(panels) => panels.len() * 4,
            Width::Bf16(panels) => panels.len() * 2,
            Width::F16(panels) => panels.len() * 2,
        }
    }

    /// `x·Wᵀ`. x: (M, K) → (M, N), both row-major.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        // SAFETY: the product without `add` writes every number of the (M, N).
        unsafe { filled(x.len() / self.k * self.n, |y| self.forward_to(x, y, false, Mode::best())) }
    }

    /// `y += x·Wᵀ`, the sums starting from y. x: (M, K), y: (M, N).
    pub fn forward_onto(&self, x: &[f32], y: &mut [f32]) {
        assert_eq!(y.len(), x.len() / self.k * self.n);
        self.forward_to(x, Out(y.as_mut_ptr()), true, Mode::best());
    }

    /// `dy·W`, the gradient of the input. dy: (M, N) → (M, K).
    pub fn backward(&self, dy: &[f32]) -> Vec<f32> {
        // SAFETY: the product writes every number of the (M, K).
        unsafe { filled(dy.len() / self.n * self.k, |dx| self.backward_to(dy, dx, Mode::best())) }
    }

    /// Row `n` of W into `out`: (K).
    pub fn row(&self, n: usize, out: &mut [f32]) {
        match &self.width {
            Width::F32(panels) => self.row_of(panels, n, out),
            Width::Bf16(panels) => self.row_of(panels, n, out),
            Width::F16(panels) => self.row_of(panels, n, out),
        }
    }

    fn row_of<W: Stored>(&self, panels: &[W], n: usize, out: &mut [f32]) {
        let panel = &panels[n / PANEL * panel_len::<W>(self.k)..];
        for (k, value) in out.iter_mut().enumerate() {
            *value = panel[(k / W::STEP * PANEL + n % PANEL) * W::STEP + k % W::STEP].widen();
        }
    }

    /// y: (M, N), all of it written (added to where `add`).
    fn forward_to(&self, x: &[f32], y: Out, add: bool, mode: Mode) {
        #[cfg(target_arch = "x86_64")]
        if let (Width::Bf16(panels), true) = (&self.width, mode.pairs) {
            // SAFETY: `pairs` says that the processor has the instructions.
            let rounded = unsafe { pairs::Pairs::new(x, self.k) };
            let panels = panels.chunks_exact(panel_len::<bf16>(self.k)).map(<[bf16]>::as_ptr).map(Shared).collect();
            return self.forward_panels(
                x.len() / self.k,
                panels,
                |panel: Shared<bf16>, rows, columns, to| {
                    let (x, panel) = (rounded.from(rows.start, 0), panel.0.cast());
                    let (stride, pairs) = (rounded.stride(), rounded.stride());
                    let tile = pairs::PairTile { x, stride, panel, pairs, columns, add };
                    // SAFETY: rows and columns are inside y and no other task has them.
                    unsafe { tile.run(rows.len(), to, self.n) };
                },
                y,
            );
        }
        match &self.width {
            Width::F32(panels) => self.forward_widened(panels, x, y, add, mode.level),
            Width::Bf16(panels) => self.forward_widened(panels, x, y, add, mode.level),
            Width::F16(panels) => self.forward_widened(panels, x, y, add, mode.level),
        }
    }

    fn forward_widened<W: Stored>(&self, panels: &[W], x: &[f32], y: Out, add: bool, level: Level) {
        let panels = panels.chunks_exact(panel_len::<W>(self.k)).map(<[W]>::as_ptr).map(Shared).collect();
        self.forward_panels(
            x.len() / self.k,
            panels,
            |panel: Shared<W>, rows, columns, to| {
                let x = x[rows.start * self.k..].as_ptr();
                let (panel, pitch) = (panel.0, PANEL * W::STEP);
                let tile = Tile { x, stride: self.k, turned: false, panel, pitch, k: self.k, columns, add };
                // SAFETY: rows and columns are inside y and no other task has them.
                unsafe { tile.run(level, rows.len(), to, self.n) };
            },
            y,
        );
    }

    /// Hands `(panel, rows, columns, where they go)` to `multiply`, each once.
    fn forward_panels<W: Stored>(
        &self,
        m: usize,
        panels: Vec<Shared<W>>,
        multiply: impl Fn(Shared<W>, Range<usize>, usize, *mut f32) + Sync,
        y: Out,
    ) {
        let (blocks, block) = row_blocks(m, self.k);
        let together = panels.len().div_ceil(rayon::current_num_threads() * TASKS).max(1);
        let groups = panels.len().div_ceil(together);
        (0..blocks * groups).into_par_iter().with_max_len(1).for_each(|task| {
            let (at, group) = (task % blocks, task / blocks);
            let rows = at * block..m.min((at + 1) * block);
            for (index, panel) in panels.iter().enumerate().skip(group * together).take(together) {
                let columns = PANEL.min(self.n - index * PANEL);
                multiply(*panel, rows.clone(), columns, y.at(rows.start * self.n + index * PANEL));
            }
        });
    }

    /// dx: (M, K), all of it written.
    fn backward_to(&self, dy: &[f32], dx: Out, mode: Mode) {
        #[cfg(target_arch = "x86_64")]
        if let (Width::Bf16(panels), true) = (&self.width, mode.pairs) {
            // SAFETY: `pairs` says that the processor has the instructions.
            let rounded = unsafe { pairs::Pairs::new(dy, self.n) };
            let turn = |panel: &[bf16], k, to: &mut [bf16]| turn::paired(panel, k, to);
            return self.backward_panels(
                panels,
                dy.len() / self.n,
                turn,
                |turned: &[bf16], rows, n, columns, to| {
                    let (x, panel) = (rounded.from(rows.start, n.start / 2), turned.as_ptr().cast());
                    let (stride, pairs, add) = (rounded.stride(), n.len().div_ceil(2), n.start > 0);
                    let tile = pairs::PairTile { x, stride, panel, pairs, columns, add };
                    // SAFETY: rows and columns are inside dx and no other task has them.
                    unsafe { tile.run(rows.len(), to, self.k) };
                },
                dx,
            );
        }
        match &self.width {
            Width::F32(panels) => self.backward_widened(panels, dy, dx, mode.level),
            Width::Bf16(panels) => self.backward_widened(panels, dy, dx, mode.level),
            Width::F16(panels) => self.backward_widened(panels, dy, dx, mode.level),
        }
    }

    fn backward_widened<W: Stored>(&self, panels: &[W], dy: &[f32], dx: Out, level: Level) {
        let turn = |panel: &[W], k, to: &mut [f32]| turn::widened(level, panel, k, to);
        self.backward_panels(
            panels,
            dy.len() / self.n,
            turn,
            |turned: &[f32], rows, n, columns, to| {
                let (x, panel) = (dy[rows.start * self.n + n.start..].as_ptr(), turned.as_ptr());
                let (stride, k, add) = (self.n, n.len(), n.start > 0);
                let tile = Tile { x, stride, turned: false, panel, pitch: PANEL, k, columns, add };
                // SAFETY: rows and columns are inside dx and no other task has them.
                unsafe { tile.run(level, rows.len(), to, self.k) };
            },
            dx,
        );
    }

    /// Panels over K are turned out of those over N, some of N at a time, and handed to `multiply` as `(turned, rows, range of N,
    /// columns, where they go)`, ranges of N in order.
    fn backward_panels<W: Stored, T: Copy + Default>(
        &self,
        panels: &[W],
        m: usize,
        turn: impl Fn(&[W], usize, &mut [T]) + Sync,
        multiply: impl Fn(&[T], Range<usize>, Range<usize>, usize, *mut f32) + Sync,
        dx: Out,
    ) {
        let (n, k) = (self.n, self.k);
        let (blocks, block) = row_blocks(m, TURNED.min(n));
        let count = k.div_ceil(PANEL);
        let together = count.div_ceil((rayon::current_num_threads() * TASKS).div_ceil(blocks)).max(1);
        let groups = count.div_ceil(together);
        let turned = || vec![T::default(); TURNED.min(n.next_multiple_of(PANEL)) * PANEL];
        (0..blocks * groups).into_par_iter().with_max_len(1).for_each_init(turned, |turned, task| {
            let (at, group) = (task % blocks, task / blocks);
            let rows = at * block..m.min((at + 1) * block);
            for start in (0..n).step_by(TURNED) {
                let some = start..n.min(start + TURNED);
                for index in group * together..count.min((group + 1) * together) {
                    let from = panels.chunks_exact(panel_len::<W>(k)).skip(start / PANEL);
                    for (panel, to) in from.zip(turned.chunks_exact_mut(PANEL * PANEL)) {
                        turn(panel, index * PANEL, to);
                    }
                    let columns = PANEL.min(k - index * PANEL);
                    multiply(turned, rows.clone(), some.clone(), columns, dx.at(rows.start * k + index * PANEL));
                }
            }
        });
    }
}

/// A panel that tasks read.
#[derive(Clone, Copy)]
struct Shared<W>(*const W);
// SAFETY: nobody writes a panel while it is read.
unsafe impl<W: Sync> Send for Shared<W> {}
// SAFETY: as above.
unsafe impl<W: Sync> Sync for Shared<W> {}

/// How many blocks of how many rows: even, whole microkernels, about [`BLOCK`] numbers each.
fn row_blocks(m: usize, width: usize) -> (usize, usize) {
    let blocks = m.div_ceil((BLOCK / width).max(8 * ROWS)).max(1);
    let block = m.div_ceil(blocks).next_multiple_of(ROWS).max(ROWS);
    (m.div_ceil(block), block)
}

fn panel_len<W: Stored>(k: usize) -> usize {
    k.next_multiple_of(W::STEP) * PANEL
}

fn pack<W: Stored>(weight: &[W], n: usize, k: usize) -> Vec<W> {
    let mut panels = vec![W::default(); n.div_ceil(PANEL) * panel_len::<W>(k)];
    panels.par_chunks_mut(panel_len::<W>(k)).enumerate().for_each(|(panel, out)| {
        for column in 0..PANEL.min(n - panel * PANEL) {
            let row = &weight[(panel * PANEL + column) * k..][..k];
            for (at, value) in row.iter().enumerate() {
                out[(at / W::STEP * PANEL + column) * W::STEP + at % W::STEP] = *value;
            }
        }
    });
    panels
}

/// A plain matrix as the left side of [`multiply`].
#[derive(Clone, Copy, Debug)]
pub enum Left<'a> {
    /// (M, K), row-major.
    Rows(&'a [f32]),
    /// The transpose of a row-major (K, M).
    Turned(&'a [f32]),
}

/// `out (+)= left·right`. left: (M, K), right: (K, N) row-major, out: (M, N). The sums start from `out` where `add`.
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
    (0..blocks * count).into_par_iter().for_each(|task| {
        let (at, panel) = (task % blocks, task / blocks);
        let rows = at * block..m.min((at + 1) * block);
        let (stride, from) = if turned { (m, rows.start) } else { (k, rows.start * k) };
        let columns = PANEL.min(n - panel * PANEL);
        let mut tile = Tile {
            x: numbers.as_ptr().wrapping_add(from),
            stride,
            turned,
            panel: right.as_ptr().wrapping_add(panel * PANEL),
            pitch: n,
            k,
            columns,
            add,
        };
        // Vectors are read whole: a copy where the last ones would end past the matrix.
        let mut whole = Vec::new();
        if columns < PANEL && columns != 16 {
            whole = vec![0f32; k * PANEL];
            for (to, from) in whole.chunks_exact_mut(PANEL).zip(right.chunks_exact(n)) {
                to[..columns].copy_from_slice(&from[panel * PANEL..]);
            }
            (tile.panel, tile.pitch) = (whole.as_ptr(), PANEL);
        }
        // SAFETY: rows and columns are inside out and no other task has them; `whole` lives until here.
        unsafe { tile.run(level, rows.len(), out.at(rows.start * n + panel * PANEL), n) };
        drop(whole);
    });
}
