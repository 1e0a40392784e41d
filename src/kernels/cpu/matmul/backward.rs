//! The gradient of the input: panels over N turned into panels over K, then multiplied like those of the forward.

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;

use super::ahead::send_for;
use super::coded::BLOCK;
use super::stored::Stored;
use super::tile::{CHAIN, PANEL, Plain, Sums, Tile};
use super::{MOST_PRODUCTS, MOST_WHOLE, Mode, Packed, Panels, TASKS, blocks, row_blocks, turn};
#[cfg(target_arch = "x86_64")]
use super::{PairTile, Pairs, Panel};
use crate::cores::each_with;
use crate::kernels::cpu::level::Level;
use crate::kernels::cpu::places::{Out, filled};

/// Rows of W that are turned at once: whole chains.
const TURNED: usize = 4 * CHAIN;

impl Packed {
    /// `dy·W`, the gradient of the input, and on top of it `dlow·A` where `low` has both. dy: (M, N), dlow: (M, R), A: (R, K) → (M, K).
    pub fn backward(&self, dy: &[f32], low: Option<[&[f32]; 2]>) -> Vec<f32> {
        let fill = |dx| self.backward_in(Mode::best(), dy, low, dx, false);
        // SAFETY: the product writes every number of the (M, K).
        unsafe { filled(dy.len() / self.n * self.k, fill) }
    }

    /// [`Self::backward`] on top of what dx: (M, K) holds.
    pub fn backward_onto(&self, dy: &[f32], low: Option<[&[f32]; 2]>, dx: &mut [f32]) {
        assert_eq!(dx.len(), dy.len() / self.n * self.k, "a gradient that does not fit");
        self.backward_in(Mode::best(), dy, low, Out(dx.as_mut_ptr()), true);
    }

    /// dx: (M, K), all of it written, or what it holds added to where `add`.
    pub(super) fn backward_in(&self, mode: Mode, dy: &[f32], low: Option<[&[f32]; 2]>, dx: Out, add: bool) {
        let m = dy.len() / self.n;
        let low = low.map(|[dlow, a]| LowBack::new(dlow, a, (m, self.k)));
        #[cfg(target_arch = "x86_64")]
        if mode.pairs && self.is_bf16() {
            // SAFETY: `pairs` says that the processor has the instructions.
            let rounded = unsafe { Pairs::new(dy, self.n) };
            let turn = |panel, k, to: &mut [bf16]| match &self.panels {
                Panels::Codes(panels) => {
                    let mut square = [bf16::ZERO; PANEL * PANEL];
                    // SAFETY: as above.
                    unsafe { panels.unpack(panel, blocks(&(k..k + PANEL)), square.as_mut_ptr()) };
                    turn::paired(&square, to);
                }
                Panels::Bf16(panels) => turn::paired(&self.square(panels, panel, k), to),
                _ => {}
            };
            let multiply = |turned: &[bf16], rows: Range<usize>, n: Range<usize>, columns, to| {
                let x = rounded.from(rows.start, n.start / 2);
                let (stride, pairs, add) = (rounded.stride(), n.len().div_ceil(2), add || n.start > 0);
                let weights = Panel::<2>(turned.as_ptr());
                let tile = PairTile { x, stride, turned: false, weights, pairs, columns, add };
                // SAFETY: rows and columns are inside dx and no other task has them.
                unsafe { tile.run(rows.len(), to, self.k) };
            };
            return self.backward_panels((m, mode.level), turn, multiply, low.as_ref(), dx);
        }
        let turn = |panel, k, to: &mut [f32]| match &self.panels {
            Panels::F32(panels) => turn::widened(mode.level, &self.square(panels, panel, k), to),
            Panels::Bf16(panels) => turn::widened(mode.level, &self.square(panels, panel, k), to),
            Panels::F16(panels) => turn::widened(mode.level, &self.square(panels, panel, k), to),
            Panels::Codes(panels) => {
                let mut square = [0f32; PANEL * PANEL];
                panels.widen(mode.level, panel, blocks(&(k..k + PANEL)), &mut square);
                turn::widened(mode.level, &square, to);
            }
        };
        let multiply = |turned: &[f32], rows: Range<usize>, n: Range<usize>, columns, to| {
            let (x, weights) = (dy[rows.start * self.n + n.start..].as_ptr(), Plain(turned.as_ptr(), PANEL));
            let tile = Tile {
                x,
                stride: self.n,
                turned: false,
                weights,
                k: n.len(),
                columns,
                sums: Sums::new(add).from(n.start),
            };
            // SAFETY: as above.
            unsafe { tile.run(mode.level, rows.len(), to, self.k) };
        };
        self.backward_panels((m, mode.level), turn, multiply, low.as_ref(), dx);
    }

    /// Has the processor read 32 columns of a panel ahead.
    fn send_for_square(&self, panel: usize, k: usize) {
        let numbers = k * self.width()..(k + PANEL).min(self.k) * self.width();
        fn all<W>(numbers: &[W]) {
            send_for(numbers.as_ptr(), numbers.len());
        }
        match &self.panels {
            Panels::F32(panels) => all(&self.panel_of(panels, panel)[numbers]),
            Panels::Bf16(panels) => all(&self.panel_of(panels, panel)[numbers]),
            Panels::F16(panels) => all(&self.panel_of(panels, panel)[numbers]),
            Panels::Codes(panels) => all(panels.block(panel, k / BLOCK)),
        }
    }

    /// A panel from column `k` on, 32 wide.
    fn square<'a, W: Stored>(&self, panels: &'a [W], panel: usize, k: usize) -> Cow<'a, [W]> {
        let (panel, width) = (self.panel_of(panels, panel), self.width());
        if width == PANEL {
            return Cow::Borrowed(&panel[k * PANEL..]);
        }
        let mut square = vec![W::default(); (panel.len() / width).saturating_sub(k).min(PANEL) * PANEL];
        for (to, from) in square.chunks_exact_mut(PANEL * W::STEP).zip(panel[k * width..].chunks_exact(width * W::STEP))
        {
            to[..from.len()].copy_from_slice(from);
        }
        Cow::Owned(square)
    }

    /// Panels over K are turned out of those over N and handed to `multiply` as `(turned, rows, range of N, columns, where they go)`,
    /// ranges of N in order; then come the low-rank part's columns. `turn` does 32 columns of one panel, from the given one on. A weight
    /// that is not too large for it is turned once for all rows.
    fn backward_panels<T: Copy + Default + Send + Sync>(
        &self,
        (m, level): (usize, Level),
        turn: impl Fn(usize, usize, &mut [T]) + Sync,
        multiply: impl Fn(&[T], Range<usize>, Range<usize>, usize, *mut f32) + Sync,
        low: Option<&LowBack<'_>>,
        dx: Out,
    ) {
        let (n, k) = (self.n, self.k);
        let (blocks, block) = row_blocks(m, TURNED.min(n));
        let (count, panels) = (k.div_ceil(PANEL), n.div_ceil(PANEL));
        let square = |panel: usize, index: usize, to: &mut [T]| {
            // The next square is a panel further in memory, where the processor does not look for it by itself.
            if panel + 1 < panels {
                self.send_for_square(panel + 1, index * PANEL);
            }
            turn(panel, index * PANEL, to);
        };
        let whole = (blocks > 1 && n * k <= MOST_WHOLE).then(|| turn::squares(panels, count, square));
        let turned = || vec![T::default(); TURNED.min(panels * PANEL) * PANEL];
        let most = MOST_PRODUCTS / (block * n * PANEL).max(1);
        let together = count.div_ceil((rayon::current_num_threads() * TASKS).div_ceil(blocks)).min(most).max(1);
        let groups = count.div_ceil(together);
        let task = |own: &mut Vec<T>, task: usize| {
            let (at, group) = (task % blocks, task / blocks);
            let rows = at * block..m.min((at + 1) * block);
            for start in (0..n).step_by(TURNED) {
                let some = start..n.min(start + TURNED);
                for index in group * together..count.min((group + 1) * together) {
                    let turned = match &whole {
                        Some(whole) => &whole[(index * panels + start / PANEL) * PANEL * PANEL..],
                        None => {
                            let of = start / PANEL..some.end.div_ceil(PANEL);
                            of.zip(own.chunks_exact_mut(PANEL * PANEL))
                                .for_each(|(panel, to)| square(panel, index, to));
                            &own[..]
                        }
                    };
                    let (columns, to) = (PANEL.min(k - index * PANEL), dx.at(rows.start * k + index * PANEL));
                    multiply(turned, rows.clone(), some.clone(), columns, to);
                    if let Some(low) = low
                        && some.end == n
                    {
                        // SAFETY: rows and columns are inside dx and no other task has them.
                        unsafe { low.add_to(level, rows.clone(), index, columns, to) };
                    }
                }
            }
        };
        let own = || if whole.is_some() { Vec::new() } else { turned() };
        each_with(0..blocks * groups, own, task);
    }
}

/// The low-rank part of a gradient of the input, `dlow·A`.
struct LowBack<'a> {
    dlow: &'a [f32],
    rank: usize,
    k: usize,
    /// (R, pitch): vectors are read whole.
    a: Cow<'a, [f32]>,
    pitch: usize,
}

impl<'a> LowBack<'a> {
    /// dlow: (M, R), a: (R, K).
    fn new(dlow: &'a [f32], a: &'a [f32], (m, k): (usize, usize)) -> Self {
        let (rank, pitch) = (a.len() / k, k.next_multiple_of(PANEL / 2));
        assert!(a.len() == rank * k && dlow.len() == m * rank, "a low-rank part that does not fit");
        let mut padded = Cow::Borrowed(a);
        if pitch != k {
            let mut wide = vec![0f32; rank * pitch];
            wide.chunks_exact_mut(pitch).zip(a.chunks_exact(k)).for_each(|(to, a)| to[..k].copy_from_slice(a));
            padded = Cow::Owned(wide);
        }
        LowBack { dlow, rank, k, a: padded, pitch }
    }

    /// Adds some rows' columns of a panel over K.
    /// # Safety
    /// `to` has room for them, rows K apart, and nobody else uses it.
    unsafe fn add_to(&self, level: Level, rows: Range<usize>, panel: usize, columns: usize, to: *mut f32) {
        let tile = Tile {
            x: self.dlow[rows.start * self.rank..].as_ptr(),
            stride: self.rank,
            turned: false,
            weights: Plain(self.a[panel * PANEL..].as_ptr(), self.pitch),
            k: self.rank,
            columns,
            sums: Sums::OnTop,
        };
        // SAFETY: the caller's promise; a row of A ends on a whole vector.
        unsafe { tile.run(level, rows.len(), to, self.k) };
    }
}
