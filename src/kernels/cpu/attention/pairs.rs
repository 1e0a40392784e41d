//! The gradients' products by pairs of bf16 numbers, summed in f32: all but `q·k`, which must give the forward's weights again.

use half::bf16;

use super::backward::Pulls;
use super::scores::{pitch, runs, turned};
use super::{Block, Heads, Rows};
use crate::kernels::cpu::level::{Level, has_bf16_products};
use crate::kernels::cpu::matmul::{PANEL, PairTile, Pairs, Panel, interleave, round_row};
use crate::kernels::cpu::places::{Out, in_chunks};

/// Whether there are such products for these heads.
pub(super) fn takes(heads: Heads) -> bool {
    heads.dim.is_multiple_of(PANEL) && has_bf16_products()
}

/// Keys and values of a list of slots, each number two of bf16 in the bits of an f32.
pub(super) struct KeyPairs {
    /// Pairs of consecutive keys: (K, D/32, ⌈S/2⌉, 32).
    keys: Vec<f32>,
    /// Pairs along D, turned: (K, ⌈S/32⌉, D/2, 32).
    values: Vec<f32>,
}

impl KeyPairs {
    /// keys: slots of (K, D), values: slots of (K, D/2) pairs.
    fn new(level: Level, heads: Heads, slots: &[usize], keys: &[f32], values: &[f32]) -> Self {
        let (pairs, columns) = (slots.len().div_ceil(2), heads.dim / PANEL);
        let none = [0f32; PANEL];
        let [turned_keys] = in_chunks(heads.key * columns * pairs * PANEL, (pairs * PANEL).max(1), |at, [to]| {
            let (kv, column) = (at / (pairs * PANEL) / columns, at / (pairs * PANEL) % columns);
            let key = |slot: &usize| &keys[(slot * heads.key + kv) * heads.dim + column * PANEL..][..PANEL];
            for (two, to) in slots.chunks(2).zip(to.chunks_exact_mut(PANEL)) {
                let second = two.get(1).map_or(&none[..], key);
                // SAFETY: the three are 32 long; the processor has the instructions.
                unsafe { interleave(key(&two[0]), second, to.as_mut_ptr().cast()) };
            }
        });
        // A pair is moved as one number.
        let halved = Heads { dim: heads.dim / 2, ..heads };
        KeyPairs { keys: turned_keys, values: turned(level, halved, slots, values) }
    }
}

/// The way back by pairs, for heads that [`takes`] says yes to.
pub(super) struct InPairs {
    heads: Heads,
    /// Pairs along D: (M, D/2).
    dout_rows: Vec<u32>,
    /// Pairs of rows: (D/32, M/2, 32).
    q: Vec<u32>,
    dout: Vec<u32>,
    /// Pairs along the keys: (M, pitch/2).
    dscore_rows: Vec<u32>,
    /// Pairs of rows: (M/2, pitch).
    dscores: Vec<u32>,
    weights: Vec<u32>,
}

impl Pulls for InPairs {
    type Read<'a> = KeyPairs;
    const ROWS: usize = 2;

    fn read(level: Level, heads: Heads, rows: &[Rows<'_>], [k, v]: [&[f32]; 2]) -> Vec<KeyPairs> {
        assert!(takes(heads));
        // SAFETY: the processor has the instructions.
        let rounded = unsafe { Pairs::new(v, heads.dim) };
        // SAFETY: any 32 bits are an f32, and both are as aligned.
        let (_, rounded, _) = unsafe { rounded.numbers().align_to::<f32>() };
        rows.iter().map(|rows| KeyPairs::new(level, heads, rows.slots, k, rounded)).collect()
    }

    fn new(_: Level, heads: Heads) -> Self {
        assert!(takes(heads));
        let [dout_rows, q, dout, dscore_rows, dscores, weights] = Default::default();
        InPairs { heads, dout_rows, q, dout, dscore_rows, dscores, weights }
    }

    fn begin(&mut self, [q, dout]: [&[f32]; 2]) {
        let dim = self.heads.dim;
        for (from, to) in [(q, &mut self.q), (dout, &mut self.dout)] {
            to.resize(from.len() / 2, 0);
            let pairs = from.len() / dim / 2;
            for (index, to) in to.chunks_exact_mut(PANEL).enumerate() {
                let row = |row: usize| &from[row * dim + index / pairs * PANEL..][..PANEL];
                let (first, second) = (row(index % pairs * 2), row(index % pairs * 2 + 1));
                // SAFETY: the three are 32 long; the processor has the instructions, as `new` saw.
                unsafe { interleave(first, second, to.as_mut_ptr()) };
            }
        }
        rounded(dout, &mut self.dout_rows);
    }

    fn against(&mut self, block: &Block<'_>, kv: usize, [_, dout]: [&[f32]; 2], keys: &KeyPairs, out: &mut Vec<f32>) {
        let (pitch, pairs) = (pitch(block), self.heads.dim / 2);
        let rows = dout.len() / self.heads.dim;
        assert_eq!(self.dout_rows.len(), rows * pairs);
        out.resize(rows * pitch, 0.0);
        for at in 0..block.slots.len().div_ceil(PANEL) {
            let panel = &keys.values[(kv * block.panels + block.first + at) * pairs * PANEL..][..pairs * PANEL];
            let tile = PairTile {
                x: self.dout_rows.as_ptr(),
                stride: pairs,
                turned: false,
                weights: Panel::<2>(panel.as_ptr().cast::<bf16>()),
                pairs,
                columns: PANEL,
                add: false,
            };
            // SAFETY: rows are D/2 pairs apart, the panel is (D/2, 32), and 32 columns from at·32 are inside a row of the output.
            unsafe { tile.run(rows, out.as_mut_ptr().add(at * PANEL), pitch) };
        }
    }

    unsafe fn onto(
        &mut self,
        block: &Block<'_>,
        kv: usize,
        _: [&[f32]; 2],
        keys: &KeyPairs,
        [weights, dscores]: [&[f32]; 2],
        dq: &mut [f32],
        [dk, dv]: [Out; 2],
    ) {
        let (pitch, Heads { key: heads, dim, .. }) = (pitch(block), self.heads);
        let rows = dscores.len() / pitch;
        assert!(rows * dim == dq.len() && self.q.len() * 2 == dq.len() && weights.len() == dscores.len());
        rounded(dscores, &mut self.dscore_rows);
        for (from, to) in [(weights, &mut self.weights), (dscores, &mut self.dscores)] {
            to.resize(from.len() / 2, 0);
            for (two, to) in from.chunks_exact(2 * pitch).zip(to.chunks_exact_mut(pitch)) {
                // SAFETY: the three are `pitch` long, a multiple of 16; the processor has the instructions, as `new` saw.
                unsafe { interleave(&two[..pitch], &two[pitch..], to.as_mut_ptr()) };
            }
        }
        let tile = |x: &[u32], (stride, turned): (usize, bool), panel: *const bf16, pairs: usize| PairTile {
            x: x.as_ptr(),
            stride,
            turned,
            weights: Panel::<2>(panel),
            pairs,
            columns: PANEL,
            add: true,
        };
        let (pairs, of_list) = (block.slots.len().div_ceil(2), keys.keys.len() / (heads * dim));
        for column in 0..dim / PANEL {
            let first = (kv * dim / PANEL + column) * of_list + block.first * PANEL / 2;
            let panel = keys.keys[first * PANEL..][..pairs * PANEL].as_ptr().cast();
            let dq = dq[column * PANEL..].as_mut_ptr();
            // SAFETY: a row of dscores has the pairs, so has the panel by its bounds; the columns are inside dq.
            unsafe { tile(&self.dscore_rows, (pitch / 2, false), panel, pairs).run(rows, dq, dim) };
            for (x, of_rows, to) in [(&self.dscores, &self.q, dk), (&self.weights, &self.dout, dv)] {
                let panel = of_rows[column * rows / 2 * PANEL..][..rows / 2 * PANEL].as_ptr().cast();
                for (index, slot, len) in runs(block.slots) {
                    let to = to.at((slot * heads + kv) * dim + column * PANEL);
                    // SAFETY: `len` keys from `index` are inside a row of pairs, and the panel has a row for each; the caller's promise.
                    unsafe { tile(&x[index..], (pitch, true), panel, rows / 2).run(len, to, heads * dim) };
                }
            }
        }
    }
}

/// Numbers as pairs of one after the other, where the processor has the instructions.
fn rounded(numbers: &[f32], to: &mut Vec<u32>) {
    to.resize(numbers.len() / 2, 0);
    // SAFETY: there is room for half as many pairs; `InPairs` is made only where the processor has the instructions.
    unsafe { round_row(numbers, to.as_mut_ptr()) };
}
