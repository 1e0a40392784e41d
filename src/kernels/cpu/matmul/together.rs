//! Products of one input with several weights, shared out between the threads as one piece of work: the input is rounded once, and the
//! threads wait for each other once.

use std::ops::Range;

use super::low::{Low, Lows};
use super::{Ahead, Input, LowRank, MOST_PRODUCTS, Mode, Onto, PANEL, Packed, TASKS, row_blocks};
use crate::cores::each;
use crate::kernels::cpu::places::Out;
use crate::kernels::cpu::rowwise::add_row;

/// A weight, and the low-rank parts that some rows of its product get; no row is in two.
#[derive(Clone, Copy, Debug)]
pub struct Adapted<'a> {
    /// W: (N, K).
    pub weight: &'a Packed,
    /// Added after the bias, each sum going on where the one before ended.
    pub parts: &'a [LowRank<'a>],
}

/// `x·Wᵀ + bias + parts` of every weight, all of them K wide. x: (M, K) → (M, N) each. `soon` are the A's of what is multiplied next: the
/// processor is told to fetch them meanwhile.
pub fn forward_together(x: &[f32], products: &[Adapted<'_>], soon: &[&Packed]) -> Vec<Vec<f32>> {
    forward_in(Mode::best(), x, products, soon)
}

/// One weight as a call multiplies it.
struct Product<'a> {
    /// In bf16 for the time of the call, where that is quicker.
    whole: Option<Packed>,
    weight: &'a Packed,
    lows: Lows<'a>,
    /// Panels of the products before it.
    before: usize,
    /// (M, N).
    y: Out,
}

pub(super) fn forward_in(mode: Mode, x: &[f32], products: &[Adapted<'_>], soon: &[&Packed]) -> Vec<Vec<f32>> {
    let Some(k) = products.first().map(|product| product.weight.k) else { return Vec::new() };
    assert!(products.iter().all(|product| product.weight.k == k), "weights of different widths");
    let m = x.len() / k;
    let (blocks, block) = row_blocks(m, k);
    let takers = products
        .iter()
        .flat_map(|Adapted { weight, parts }| std::iter::once(*weight).chain(parts.iter().map(|part| part.a)));
    let input = Input::new(x, k, mode, takers);
    let mut found: Vec<Vec<f32>> = products.iter().map(|product| Vec::with_capacity(m * product.weight.n)).collect();
    let mut panels = 0;
    let products: Vec<Product<'_>> = products
        .iter()
        .zip(&mut found)
        .map(|(Adapted { weight, parts }, y)| {
            let before = panels;
            panels += weight.panels();
            let lows = Lows::new(weight, parts, (m, block));
            Product { whole: weight.whole(mode, blocks), weight, lows, before, y: Out(y.as_mut_ptr()) }
        })
        .collect();
    let mut soon_in_order = Ahead::default();
    soon.iter().for_each(|a| (0..a.panels()).for_each(|panel| a.push_to(&mut soon_in_order, panel)));
    let soon = Soon { all: soon_in_order, parts: panels };
    let most = MOST_PRODUCTS / (block * k * PANEL).max(1);
    let together = panels.div_ceil(rayon::current_num_threads() * TASKS).min(most).max(1);
    let groups: Vec<(&Product<'_>, Range<usize>)> =
        products.iter().flat_map(|product| product.groups(together).map(move |panels| (product, panels))).collect();
    each(0..blocks * groups.len(), |task| {
        let (at, (product, panels)) = (task % blocks, &groups[task / blocks]);
        // SAFETY: rows and columns are inside y and no other task has them.
        unsafe { product.some(&input, at * block..m.min((at + 1) * block), panels.clone(), &soon) };
    });
    for (y, product) in found.iter_mut().zip(&products) {
        // SAFETY: that many have room, and the tasks wrote all rows of all panels.
        unsafe { y.set_len(m * product.weight.n) };
    }
    found
}

impl Product<'_> {
    /// The weight's panels, some at a time.
    fn groups(&self, together: usize) -> impl Iterator<Item = Range<usize>> {
        let count = self.weight.panels();
        (0..count).step_by(together).map(move |first| first..count.min(first + together))
    }

    /// Some panels' columns of a block of rows.
    /// # Safety
    /// They are inside y, and nobody else uses them.
    unsafe fn some(&self, input: &Input<'_>, rows: Range<usize>, panels: Range<usize>, soon: &Soon) {
        let n = self.weight.n;
        let weight = self.whole.as_ref().unwrap_or(self.weight);
        let lows = self.lows.of(&rows);
        let mut claimed: Vec<&Low<'_>> = lows.iter().filter(|low| low.claim()).collect();
        let mut ahead = Ahead::default();
        let columns = |panel: usize| PANEL.min(n - panel * PANEL);
        let at = |row: usize, panel: usize| self.y.at(row * n + panel * PANEL);
        let mut without_lows = panels.start;
        for panel in panels.clone() {
            ahead.clear();
            lows.iter().for_each(|low| low.b.push_to(&mut ahead, panel));
            if rows.start == 0 {
                ahead.push_part(&soon.all, self.before + panel, soon.parts);
            }
            let how = Onto { columns: columns(panel), add: false, ahead: &ahead };
            // SAFETY: the caller's promise.
            unsafe {
                weight.panel(input, panel, rows.clone(), at(rows.start, panel), &how);
                if let Some(bias) = &self.weight.bias {
                    for row in rows.clone() {
                        let to = std::slice::from_raw_parts_mut(at(row, panel), columns(panel));
                        add_row(&bias[panel * PANEL..][..columns(panel)], to);
                    }
                }
            }
            claimed.drain(..).for_each(|low| low.multiply(input));
            if panel + 1 == panels.end || lows.iter().all(Low::is_there) {
                for panel in without_lows..panel + 1 {
                    // SAFETY: the caller's promise.
                    lows.iter().for_each(|low| unsafe { low.add_to(panel, columns(panel), at(low.rows.start, panel)) });
                }
                without_lows = panel + 1;
            }
        }
    }
}

/// What the next products begin with, sent for while these are computed.
struct Soon {
    all: Ahead,
    /// Panels of these products: each sends for as much.
    parts: usize,
}
