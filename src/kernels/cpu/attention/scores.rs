//! One block of rows under one key head: its scores, its softmax, its output.
//!
//! The rows of a block are taken as its M = rows · H/K rows, members of a row's group one after the other.

use super::{Block, Heads};
use crate::kernels::cpu::level::Level;
use crate::kernels::cpu::matmul::{PANEL, Plain, Sums, Tile};
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::matmul::{corner, side};
use crate::kernels::cpu::places::{Out, in_chunks};
use crate::kernels::cpu::rowwise::{scale_row, weigh_row};

/// Buffers of a task.
pub(super) struct Scratch {
    pub(super) products: Products,
    /// (M, wide).
    pub(super) q: Vec<f32>,
    /// (M, pitch): scores, then weights; zero where a row does not see a key.
    pub(super) weights: Vec<f32>,
    /// (M, wide).
    out: Vec<f32>,
}

/// Products of a block's rows with keys and values, and the buffers those take.
pub(super) struct Products {
    pub(super) level: Level,
    pub(super) heads: Heads,
    /// D, or the next multiple of 16: vectors are read whole.
    pub(super) wide: usize,
    /// 32 keys turned: (D, 32).
    turned: Vec<f32>,
    /// Keys or values whose D is no multiple of 16, one after the other: (keys, wide).
    padded: Vec<f32>,
}

/// Keys (or values) as scores take them.
#[derive(Clone, Copy)]
pub(super) enum Keys<'a> {
    /// Slots of (K, D), turned as they come.
    Slots(&'a [f32]),
    /// What [`turned`] made of all keys of the rows.
    Turned(&'a [f32]),
}

impl<'a> Keys<'a> {
    /// What was turned, if anything was.
    pub(super) fn new(slots: &'a [f32], turned: &'a Option<Vec<f32>>) -> Self {
        match turned {
            Some(turned) => Keys::Turned(turned),
            None => Keys::Slots(slots),
        }
    }
}

/// All keys of a list, turned: (K, ⌈S/32⌉, D, 32). keys: slots of (K, D).
pub(super) fn turned(level: Level, heads: Heads, slots: &[usize], keys: &[f32]) -> Vec<f32> {
    let (panels, size) = (slots.len().div_ceil(PANEL), heads.dim * PANEL);
    let [turned] = in_chunks(heads.key * panels * size, size, |at, [to]| {
        let (kv, panel) = (at / size / panels, at / size % panels);
        turn(level, heads, &slots[panel * PANEL..slots.len().min((panel + 1) * PANEL)], kv, keys, to);
    });
    turned
}

/// At most 32 keys of one key head as a panel (D, 32); columns past them hold anything.
fn turn(level: Level, heads: Heads, slots: &[usize], kv: usize, keys: &[f32], to: &mut [f32]) {
    let dim = heads.dim;
    assert!(to.len() >= dim * PANEL && slots.len() <= PANEL);
    let key = |index: usize| &keys[(slots[index.min(slots.len() - 1)] * heads.key + kv) * dim..][..dim];
    #[cfg(target_arch = "x86_64")]
    if let Some(side) = side(level).filter(|side| dim.is_multiple_of(*side)) {
        for first in (0..slots.len()).step_by(side) {
            let keys: [*const f32; 16] = std::array::from_fn(|index| key(first + index).as_ptr());
            for at in (0..dim).step_by(side) {
                let row = |index: usize| (keys[index].wrapping_add(at), 0);
                // SAFETY: at + side ≤ D, so it is inside each key and inside the panel; the level is the processor's.
                unsafe { corner(level, row, to.as_mut_ptr().add(at * PANEL + first), PANEL) };
            }
        }
        return;
    }
    let _ = level;
    for index in 0..slots.len() {
        for (at, value) in key(index).iter().enumerate() {
            to[at * PANEL + index] = *value;
        }
    }
}

/// Values that are taken at once, so that they stay in cache while rows pass by.
const VALUES: usize = 128;

/// Length of a row of weights: its keys, rounded up to 32, and 16 more: an odd number of cache lines, so that rows do not fall on the same
/// places of the cache.
pub(super) fn pitch(block: &Block<'_>) -> usize {
    block.slots.len().next_multiple_of(PANEL) + PANEL / 2
}

/// Runs of consecutive slots: (first index, first slot, length).
pub(super) fn runs(slots: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = at;
        let slot = *slots.get(first)?;
        at += 1;
        while slots.get(at).is_some_and(|next| *next == slot + at - first) {
            at += 1;
        }
        Some((first, slot, at - first))
    })
}

impl Scratch {
    pub(super) fn new(level: Level, heads: Heads) -> Self {
        let products = Products::new(level, heads);
        Scratch { products, q: Vec::new(), weights: Vec::new(), out: Vec::new() }
    }

    /// Writes the block's rows of `out`, (N, H, D), and of `softmax`, (N, H, 2).
    pub(super) fn attend(
        &mut self,
        block: &Block<'_>,
        kv: usize,
        (q, k, v): (&[f32], Keys<'_>, &[f32]),
        [out, softmax]: [Out; 2],
    ) {
        let Scratch { products, q: rows, weights, out: found } = self;
        let (group, pitch, wide) = (products.heads.group(), pitch(block), products.wide);
        products.gather(block, kv, q, rows);
        products.against(block, kv, rows, k, weights);
        found.clear();
        found.resize(rows.len(), 0.0);
        for (m, weights) in weights.chunks_exact_mut(pitch).enumerate() {
            let seen = &block.seen[m / group];
            weights[..seen.start].fill(0.0);
            weights[seen.end..].fill(0.0);
            let [max, sum] = weigh_row(&mut weights[seen.clone()], products.heads.scale);
            let place = softmax.at(products.row(block, kv, m) * 2);
            // SAFETY: the row's place is inside the (N, H, 2), and this task's alone.
            unsafe { place.cast::<[f32; 2]>().write([max, 1.0 / sum]) };
        }
        products.over(block, kv, weights, v, found);
        for (m, row) in found.chunks_exact_mut(wide).enumerate() {
            // SAFETY: it was written above.
            let scale = unsafe { *softmax.at(products.row(block, kv, m) * 2 + 1) };
            scale_row(row, scale);
        }
        products.scatter(block, kv, found, out);
    }
}

impl Products {
    pub(super) fn new(level: Level, heads: Heads) -> Self {
        let (turned, wide) = (vec![0f32; heads.dim * PANEL], heads.dim.next_multiple_of(16));
        Products { level, heads, wide, turned, padded: Vec::new() }
    }

    /// Which row `m` of a block is of the N·H.
    pub(super) fn row(&self, block: &Block<'_>, kv: usize, m: usize) -> usize {
        let group = self.heads.group();
        (block.start + m / group) * self.heads.query + kv * group + m % group
    }

    /// The block's rows of x: (N, H, D) as (M, wide).
    pub(super) fn gather(&self, block: &Block<'_>, kv: usize, x: &[f32], to: &mut Vec<f32>) {
        to.clear();
        to.resize(block.seen.len() * self.heads.group() * self.wide, 0.0);
        for (m, to) in to.chunks_exact_mut(self.wide).enumerate() {
            to[..self.heads.dim].copy_from_slice(&x[self.row(block, kv, m) * self.heads.dim..][..self.heads.dim]);
        }
    }

    /// The reverse of [`Self::gather`].
    pub(super) fn scatter(&self, block: &Block<'_>, kv: usize, from: &[f32], to: Out) {
        for (m, from) in from.chunks_exact(self.wide).enumerate() {
            let to = to.at(self.row(block, kv, m) * self.heads.dim);
            // SAFETY: the row's place is inside the (N, H, D), as it was for `gather`, and this task's alone.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, self.heads.dim) };
        }
    }

    /// Products of rows with the block's keys. rows: (M, wide) → (M, pitch), where what is past the keys is anything.
    pub(super) fn against(&mut self, block: &Block<'_>, kv: usize, rows: &[f32], keys: Keys<'_>, out: &mut Vec<f32>) {
        let (pitch, dim) = (pitch(block), self.heads.dim);
        let m = rows.len() / self.wide;
        out.resize(m * pitch, 0.0);
        for (at, slots) in block.slots.chunks(PANEL).enumerate() {
            let panel = match keys {
                Keys::Turned(turned) => &turned[(kv * block.panels + block.first + at) * dim * PANEL..][..dim * PANEL],
                Keys::Slots(keys) => {
                    turn(self.level, self.heads, slots, kv, keys, &mut self.turned);
                    &self.turned
                }
            };
            let tile = Tile {
                x: rows.as_ptr(),
                stride: self.wide,
                turned: false,
                weights: Plain(panel.as_ptr(), PANEL),
                k: dim,
                columns: PANEL,
                sums: Sums::New,
            };
            // SAFETY: rows are `wide` ≥ D apart, the panel is (D, 32), and 32 columns from at·32 are inside a row of the output.
            unsafe { tile.run(self.level, m, out.as_mut_ptr().add(at * PANEL), pitch) };
        }
    }

    /// `out += weights·values`. weights: (M, pitch), values: slots of (K, D), out: (M, wide).
    pub(super) fn over(&mut self, block: &Block<'_>, kv: usize, weights: &[f32], values: &[f32], out: &mut [f32]) {
        let (pitch, wide) = (pitch(block), self.wide);
        let Heads { key: heads, dim, .. } = self.heads;
        let m = weights.len() / pitch;
        assert_eq!(out.len(), m * wide);
        let pad = wide != dim;
        if pad {
            self.padded.clear();
            self.padded.resize(block.slots.len() * wide, 0.0);
            for (to, slot) in self.padded.chunks_exact_mut(wide).zip(block.slots) {
                to[..dim].copy_from_slice(&values[(slot * heads + kv) * dim..][..dim]);
            }
        }
        for (index, slot, len) in runs(block.slots) {
            let (from, row) = if pad {
                (&self.padded[index * wide..], wide)
            } else {
                (&values[(slot * heads + kv) * dim..], heads * dim)
            };
            assert!(from.len() >= (len - 1) * row + wide);
            let parts = (0..len).step_by(VALUES).map(|at| (at, VALUES.min(len - at)));
            for ((at, len), column) in parts.flat_map(|part| (0..wide).step_by(PANEL).map(move |column| (part, column)))
            {
                let tile = Tile {
                    x: weights.as_ptr().wrapping_add(index + at),
                    stride: pitch,
                    turned: false,
                    weights: Plain(from.as_ptr().wrapping_add(at * row + column), row),
                    k: len,
                    columns: PANEL.min(wide - column),
                    sums: Sums::GoOn,
                };
                // SAFETY: `len` keys from `index` are inside a row of weights; by the assertion the panel's rows are inside the
                // values, in multiples of 16 columns; the columns are inside the output.
                unsafe { tile.run(self.level, m, out.as_mut_ptr().add(column), wide) };
            }
        }
    }
}
