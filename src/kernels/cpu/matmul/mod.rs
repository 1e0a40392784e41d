//! Products with a frozen weight that was packed once, and with plain matrices.
//!
//! Every output number is summed over the inner dimension in order by one chain, so it does not depend on how many rows the call has,
//! nor on how the work was cut up. A weight in bf16 is multiplied by `vdpbf16ps` where the processor has it, which rounds the
//! activations to bf16; elsewhere it is widened and multiplied in f32, so the two differ by bf16's rounding.

mod coded;
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
use coded::CodePanels;
#[cfg(target_arch = "x86_64")]
use coded::CodedPanel;
pub use coded::Codes;
#[cfg(target_arch = "x86_64")]
use pairs::{PairTile, Pairs, Panel};
use stored::Stored;
use tile::ROWS;
pub(super) use tile::{PANEL, Tile};
#[cfg(target_arch = "x86_64")]
pub(super) use turn::turn16;

/// Numbers of a block of activations, so that it stays in cache while panels pass by.
const BLOCK: usize = 1 << 17;
/// Rows of W that are turned at once for the gradient.
const TURNED: usize = 1024;
/// Columns of a quantized weight that are unpacked at once: 16 KiB of bf16.
const UNPACKED: usize = 256;
/// Most rows for which a quantized panel is unpacked on the way into the product, and not first into memory.
const FEW_ROWS: usize = 8;
/// Largest quantized weight that is unpacked whole for a call of many rows: 64 MiB of bf16.
const MOST_WHOLE: usize = 1 << 25;
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
    /// Quantized.
    Codes(Codes),
}

/// A weight's panels.
#[derive(Clone, Debug)]
enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    Codes(CodePanels),
}

/// A weight W: (N, K) as panels `(⌈N/32⌉, K, 32)`, in bf16 `(⌈N/32⌉, ⌈K/2⌉, 32, 2)`, zero-padded; quantized ones
/// as `coded.rs` says, read as bf16.
#[derive(Clone, Debug)]
pub struct Packed {
    n: usize,
    k: usize,
    panels: Panels,
}

/// A low-rank part of some rows of a product.
#[derive(Clone, Debug)]
pub struct LowRank<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// x·Aᵀ: (rows, R).
    pub low: &'a [f32],
    /// B: (N, R).
    pub b: &'a Packed,
}

/// Activations on their way into a product.
enum Input<'a> {
    Plain(&'a [f32], Level),
    #[cfg(target_arch = "x86_64")]
    Rounded(Pairs),
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
        let panels = match weight {
            Width::F32(weight) => Panels::F32(pack(weight, n, k)),
            Width::Bf16(weight) => Panels::Bf16(pack(weight, n, k)),
            Width::F16(weight) => Panels::F16(pack(weight, n, k)),
            Width::Codes(codes) => Panels::Codes(CodePanels::new(codes, n, k)),
        };
        Packed { n, k, panels }
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
        match &self.panels {
            Panels::F32(panels) => panels.len() * 4,
            Panels::Bf16(panels) => panels.len() * 2,
            Panels::F16(panels) => panels.len() * 2,
            Panels::Codes(panels) => panels.bytes(),
        }
    }

    /// `x·Wᵀ`. x: (M, K) → (M, N), both row-major.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        // SAFETY: the product without `add` writes every number of the (M, N).
        unsafe { filled(x.len() / self.k * self.n, |y| self.forward_to(x, y, false, Mode::best())) }
    }

    /// `x·Wᵀ` with `low·Bᵀ` added to some of its rows, each sum going on where W's ended. x: (M, K) → (M, N); no row is in two parts.
    pub fn forward_adapted(&self, x: &[f32], parts: &[LowRank<'_>]) -> Vec<f32> {
        let m = x.len() / self.k;
        for LowRank { rows, low, b } in parts {
            assert!(b.n == self.n && low.len() == rows.len() * b.k && rows.end <= m, "a part that does not fit");
        }
        // SAFETY: the product without `add` writes every number of the (M, N).
        unsafe { filled(m * self.n, |y| self.forward_with(x, y, parts, false, Mode::best())) }
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
        match &self.panels {
            Panels::F32(panels) => self.row_of(panels, n, out),
            Panels::Bf16(panels) => self.row_of(panels, n, out),
            Panels::F16(panels) => self.row_of(panels, n, out),
            Panels::Codes(panels) => panels.row(n, out),
        }
    }

    fn row_of<W: Stored>(&self, panels: &[W], n: usize, out: &mut [f32]) {
        let panel = panel_of(panels, n / PANEL, self.k);
        for (k, value) in out.iter_mut().enumerate() {
            *value = panel[(k / W::STEP * PANEL + n % PANEL) * W::STEP + k % W::STEP].widen();
        }
    }

    /// y: (M, N), all of it written (added to where `add`).
    fn forward_to(&self, x: &[f32], y: Out, add: bool, mode: Mode) {
        self.forward_with(x, y, &[], add, mode);
    }

    fn forward_with(&self, x: &[f32], y: Out, parts: &[LowRank<'_>], add: bool, mode: Mode) {
        let m = x.len() / self.k;
        if let Some(whole) = self.whole(row_blocks(m, self.k).0) {
            return whole.forward_with(x, y, parts, add, mode);
        }
        let input = self.input(x, mode);
        let parts: Vec<_> = parts.iter().map(|part| (&part.rows, part.b.input(part.low, mode), part.b)).collect();
        let multiply = |panel, rows: Range<usize>, columns, to: *mut f32| {
            // SAFETY: rows and columns are inside y and no other task has them.
            unsafe {
                self.panel(&input, panel, rows.clone(), columns, add, to);
                for (of_part, input, b) in &parts {
                    let common = rows.start.max(of_part.start)..rows.end.min(of_part.end);
                    if !common.is_empty() {
                        let to = to.add((common.start - rows.start) * self.n);
                        let rows = common.start - of_part.start..common.end - of_part.start;
                        b.panel(input, panel, rows, columns, true, to);
                    }
                }
            }
        };
        self.forward_panels(m, multiply, y);
    }

    /// Activations as this weight takes them. x: (M, K).
    fn input<'a>(&self, x: &'a [f32], mode: Mode) -> Input<'a> {
        #[cfg(target_arch = "x86_64")]
        if mode.pairs && matches!(self.panels, Panels::Bf16(_) | Panels::Codes(_)) {
            // SAFETY: `pairs` says that the processor has the instructions.
            return Input::Rounded(unsafe { Pairs::new(x, self.k) });
        }
        Input::Plain(x, mode.level)
    }

    /// One panel's columns of some rows of the input.
    /// # Safety
    /// `to` has room for them, rows N apart, and nobody else uses it.
    unsafe fn panel(
        &self,
        input: &Input<'_>,
        panel: usize,
        rows: Range<usize>,
        columns: usize,
        add: bool,
        to: *mut f32,
    ) {
        let len = rows.len();
        // SAFETY: the caller's promise; the tiles say what is there.
        unsafe {
            let (x, level) = match input {
                #[cfg(target_arch = "x86_64")]
                Input::Rounded(x) => return self.panel_of_pairs(x, panel, rows, columns, add, to),
                Input::Plain(x, level) => (x[rows.start * self.k..].as_ptr(), *level),
            };
            match &self.panels {
                Panels::F32(panels) => self.widened(panels, panel, x, columns, add).run(level, len, to, self.n),
                Panels::Bf16(panels) => self.widened(panels, panel, x, columns, add).run(level, len, to, self.n),
                Panels::F16(panels) => self.widened(panels, panel, x, columns, add).run(level, len, to, self.n),
                Panels::Codes(panels) => self.unpacked(panels, panel, |k, unpacked| {
                    let add = add || k.start > 0;
                    let tile = self.widened(unpacked, 0, x.add(k.start), columns, add);
                    Tile { k: k.len(), ..tile }.run(level, len, to, self.n);
                }),
            }
        }
    }

    /// A quantized weight in bf16, for the time of one call, where its panels would be unpacked for several blocks of rows.
    fn whole(&self, blocks: usize) -> Option<Packed> {
        let (n, k) = (self.n, self.k);
        let Panels::Codes(panels) = &self.panels else { return None };
        if blocks < 2 || n * k > MOST_WHOLE {
            return None;
        }
        let mut numbers = vec![bf16::ZERO; n.div_ceil(PANEL) * panel_len::<bf16>(k)];
        let of_panels = numbers.par_chunks_mut(panel_len::<bf16>(k)).enumerate();
        of_panels.for_each(|(panel, to)| panels.unpack(panel, 0..k / coded::BLOCK, to));
        Some(Packed { n, k, panels: Panels::Bf16(numbers) })
    }

    /// # Safety
    /// As [`Self::panel`]; the processor has the instructions.
    #[cfg(target_arch = "x86_64")]
    unsafe fn panel_of_pairs(
        &self,
        x: &Pairs,
        panel: usize,
        rows: Range<usize>,
        columns: usize,
        add: bool,
        to: *mut f32,
    ) {
        let (stride, pairs) = (x.stride(), x.stride());
        let tile = PairTile { x: x.from(rows.start, 0), stride, weights: (), pairs, columns, add };
        // SAFETY: the caller's promise; the fields say what is there.
        unsafe {
            match &self.panels {
                Panels::Codes(panels) if rows.len() <= FEW_ROWS => {
                    tile.of(CodedPanel(panels, panel)).run(rows.len(), to, self.n);
                }
                Panels::Codes(panels) => self.unpacked(panels, panel, |k, unpacked| {
                    let (x, pairs, add) = (tile.x.add(k.start / 2), k.len() / 2, add || k.start > 0);
                    let tile = PairTile { x, pairs, add, ..tile };
                    tile.of(Panel(unpacked.as_ptr())).run(rows.len(), to, self.n);
                }),
                Panels::Bf16(panels) => {
                    let weights = Panel(panels[panel * panel_len::<bf16>(self.k)..].as_ptr());
                    tile.of(weights).run(rows.len(), to, self.n);
                }
                _ => {}
            }
        }
    }

    /// One panel against rows from `x` on.
    fn widened<W: Stored>(&self, panels: &[W], panel: usize, x: *const f32, columns: usize, add: bool) -> Tile<W> {
        let panel = panels[panel * panel_len::<W>(self.k)..].as_ptr();
        Tile { x, stride: self.k, turned: false, panel, pitch: PANEL * W::STEP, k: self.k, columns, add }
    }

    /// A quantized panel, some of its columns at a time, in order.
    fn unpacked(&self, panels: &CodePanels, panel: usize, mut multiply: impl FnMut(Range<usize>, &[bf16])) {
        let mut numbers = [bf16::ZERO; UNPACKED * PANEL];
        for start in (0..self.k).step_by(UNPACKED) {
            let some = start..self.k.min(start + UNPACKED);
            let numbers = &mut numbers[..some.len() * PANEL];
            panels.unpack(panel, some.start / coded::BLOCK..some.end / coded::BLOCK, numbers);
            multiply(some, numbers);
        }
    }

    /// Hands `(panel, rows, columns, where they go)` to `multiply`, each once.
    fn forward_panels(&self, m: usize, multiply: impl Fn(usize, Range<usize>, usize, *mut f32) + Sync, y: Out) {
        let (blocks, block) = row_blocks(m, self.k);
        let count = self.n.div_ceil(PANEL);
        let together = count.div_ceil(rayon::current_num_threads() * TASKS).max(1);
        let groups = count.div_ceil(together);
        (0..blocks * groups).into_par_iter().with_max_len(1).for_each(|task| {
            let (at, group) = (task % blocks, task / blocks);
            let rows = at * block..m.min((at + 1) * block);
            for panel in group * together..count.min((group + 1) * together) {
                let columns = PANEL.min(self.n - panel * PANEL);
                multiply(panel, rows.clone(), columns, y.at(rows.start * self.n + panel * PANEL));
            }
        });
    }

    /// dx: (M, K), all of it written.
    fn backward_to(&self, dy: &[f32], dx: Out, mode: Mode) {
        let m = dy.len() / self.n;
        if let Some(whole) = self.whole(row_blocks(m, TURNED.min(self.n)).0) {
            return whole.backward_to(dy, dx, mode);
        }
        #[cfg(target_arch = "x86_64")]
        if mode.pairs && matches!(self.panels, Panels::Bf16(_) | Panels::Codes(_)) {
            // SAFETY: `pairs` says that the processor has the instructions.
            let rounded = unsafe { Pairs::new(dy, self.n) };
            let turn = |panel, k, to: &mut [bf16]| match &self.panels {
                Panels::Codes(panels) => turn::paired(&panels.square(panel, k), 0, to),
                Panels::Bf16(panels) => turn::paired(panel_of(panels, panel, self.k), k, to),
                _ => {}
            };
            let multiply = |turned: &[bf16], rows: Range<usize>, n: Range<usize>, columns, to| {
                let x = rounded.from(rows.start, n.start / 2);
                let (stride, pairs, add) = (rounded.stride(), n.len().div_ceil(2), n.start > 0);
                let tile = PairTile { x, stride, weights: Panel(turned.as_ptr()), pairs, columns, add };
                // SAFETY: rows and columns are inside dx and no other task has them.
                unsafe { tile.run(rows.len(), to, self.k) };
            };
            return self.backward_panels(m, turn, multiply, dx);
        }
        let turn = |panel, k, to: &mut [f32]| match &self.panels {
            Panels::F32(panels) => turn::widened(mode.level, panel_of(panels, panel, self.k), k, to),
            Panels::Bf16(panels) => turn::widened(mode.level, panel_of(panels, panel, self.k), k, to),
            Panels::F16(panels) => turn::widened(mode.level, panel_of(panels, panel, self.k), k, to),
            Panels::Codes(panels) => turn::widened(mode.level, &panels.square(panel, k), 0, to),
        };
        let multiply = |turned: &[f32], rows: Range<usize>, n: Range<usize>, columns, to| {
            let (x, panel) = (dy[rows.start * self.n + n.start..].as_ptr(), turned.as_ptr());
            let (stride, k, add) = (self.n, n.len(), n.start > 0);
            let tile = Tile { x, stride, turned: false, panel, pitch: PANEL, k, columns, add };
            // SAFETY: as above.
            unsafe { tile.run(mode.level, rows.len(), to, self.k) };
        };
        self.backward_panels(m, turn, multiply, dx);
    }

    /// Panels over K are turned out of those over N, some of N at a time, and handed to `multiply` as `(turned, rows, range of N,
    /// columns, where they go)`, ranges of N in order. `turn` does 32 columns of one panel, from the given one on.
    fn backward_panels<T: Copy + Default>(
        &self,
        m: usize,
        turn: impl Fn(usize, usize, &mut [T]) + Sync,
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
                    let panels = some.start / PANEL..some.end.div_ceil(PANEL);
                    for (panel, to) in panels.zip(turned.chunks_exact_mut(PANEL * PANEL)) {
                        turn(panel, index * PANEL, to);
                    }
                    let columns = PANEL.min(k - index * PANEL);
                    multiply(turned, rows.clone(), some.clone(), columns, dx.at(rows.start * k + index * PANEL));
                }
            }
        });
    }
}

fn panel_of<W: Stored>(panels: &[W], panel: usize, k: usize) -> &[W] {
    &panels[panel * panel_len::<W>(k)..][..panel_len::<W>(k)]
}

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
