//! Gradients of attention: the weights are computed again, a gradient of a key or value is summed over the rows in order.
//!
//! A block's rows take some keys at a time, so that weights and their gradients stay in cache however long a sequence is.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::pairs::{self, InPairs};
use super::scores::{Keys, Products, Scratch, pitch, runs};
use super::{Block, Heads, Rows, blocks, turned_once};
use crate::cores::{each, each_with};
use crate::kernels::cpu::level::{Level, level};
use crate::kernels::cpu::matmul::{PANEL, Plain, Sums, Tile};
use crate::kernels::cpu::places::{Out, filled, in_chunks};
use crate::kernels::cpu::rowwise::{add_row, dot_row, score_gradient_row};

/// Numbers that are added at once.
const CHUNK: usize = 4096;
/// Keys that a block's rows take at once.
const KEYS: usize = 128;
/// Rows of a part that make a slice of their own, and most slices of a part: it is cut into such so that threads share it evenly.
const SLICE: usize = 256;
const MOST_SLICES: usize = 4;

/// Gradients of [`super::attention`] in q, k and v. out, dout, q: (N, H, D); k, v: (N, K, D), the slots being rows of the step;
/// softmax: (N, H, 2), of the forward. `in_bf16` has all products but `q·k` rounded to bf16 on the way in, where the processor
/// multiplies that.
///
/// `parts` are runs of consecutive `rows` that share no key with each other; each slice of a part is a task of its own under each key
/// head. Gradients of keys and values are summed over the rows of a slice in order, then over the slices.
pub fn attention_backward(
    heads: Heads,
    parts: &[&[Rows<'_>]],
    (q, k, v): (&[f32], &[f32], &[f32]),
    ([out, softmax], dout): ([&[f32]; 2], &[f32]),
    in_bf16: bool,
) -> [Vec<f32>; 3] {
    check(heads, parts, q, k);
    assert!(q.len() == out.len() && q.len() == dout.len() && softmax.len() * heads.dim == q.len() * 2);
    #[cfg(target_arch = "x86_64")]
    if in_bf16 && pairs::takes(heads) {
        return by::<InPairs>(level(), heads, parts, (q, k, v), ([out, softmax], dout));
    }
    let _ = in_bf16;
    by::<Plainly>(level(), heads, parts, (q, k, v), ([out, softmax], dout))
}

fn by<P: Pulls>(
    level: Level,
    heads: Heads,
    parts: &[&[Rows<'_>]],
    (q, k, v): (&[f32], &[f32], &[f32]),
    ([out, softmax], dout): ([&[f32]; 2], &[f32]),
) -> [Vec<f32>; 3] {
    // Each part's blocks, and what they read of its keys.
    let mut cut = Vec::with_capacity(parts.len());
    for &rows in parts {
        let blocks: Vec<_> =
            rows.iter().enumerate().flat_map(|(index, rows)| blocks(heads, index, rows, usize::MAX)).collect();
        cut.push((blocks, turned_once(level, heads, rows, k), P::read(level, heads, rows, [k, v])));
    }
    // (part, which of its slices, the slice's blocks)
    let slices: Vec<(usize, usize, Range<usize>)> = cut
        .iter()
        .enumerate()
        .flat_map(|(part, (blocks, ..))| {
            slices(blocks).into_iter().enumerate().map(move |(slice, blocks)| (part, slice, blocks))
        })
        .collect();
    let most = slices.iter().map(|(_, slice, _)| slice + 1).max().unwrap_or(1);
    // dk and dv of every slice, zeroed by being written: a page that is read first is one more interruption of all cores.
    let mut sums: Vec<[Vec<f32>; 2]> = (0..most).map(|_| in_chunks(k.len(), CHUNK, |_, _| ())).collect();
    let places: Vec<[Out; 2]> = sums.iter_mut().map(|of| of.each_mut().map(|sum| Out(sum.as_mut_ptr()))).collect();
    let fill = |dq: Out| {
        each_with(
            0..slices.len() * heads.key,
            || Task::<P>::new(level, heads),
            |task, index| {
                let (part, slice, range) = &slices[index / heads.key];
                let (blocks, turned, read) = &cut[*part];
                let [dk, dv] = places[*slice];
                for block in &blocks[range.clone()] {
                    let given = (q, Keys::new(k, &turned[block.rows]), &read[block.rows]);
                    task.block(block, index % heads.key, given, ([out, softmax], dout), [dq, dk, dv]);
                }
            },
        );
    };
    // SAFETY: every row of every head is in one task, which writes it whole.
    let dq = unsafe { filled(q.len(), fill) };
    let (first, others) = sums.split_first_mut().expect("there is one slice at least. This is a bug.");
    for (of, sum) in first.iter_mut().enumerate() {
        if !others.is_empty() {
            each(sum.chunks_mut(CHUNK).enumerate(), |(index, sum)| {
                for other in others.iter() {
                    add_row(&other[of][index * CHUNK..][..sum.len()], sum);
                }
            });
        }
    }
    let [dk, dv] = std::mem::take(first);
    [dq, dk, dv]
}

/// Slices of a part's blocks, alike in work.
fn slices(blocks: &[Block<'_>]) -> Vec<Range<usize>> {
    let rows: usize = blocks.iter().map(|block| block.seen.len()).sum();
    let count = (rows / SLICE).clamp(1, MOST_SLICES);
    let work = |block: &Block<'_>| block.seen.iter().map(Range::len).sum::<usize>();
    let whole: usize = blocks.iter().map(work).sum();
    let (mut slices, mut start, mut done) = (Vec::new(), 0, 0);
    for (at, block) in blocks.iter().enumerate() {
        done += work(block);
        if done * count >= whole * (slices.len() + 1) || at + 1 == blocks.len() {
            slices.push(start..at + 1);
            start = at + 1;
        }
    }
    slices
}

/// Parts own their rows and keys, and all of them: no row is in two, no key is seen from two.
fn check(heads: Heads, parts: &[&[Rows<'_>]], q: &[f32], k: &[f32]) {
    let n = q.len() / heads.query / heads.dim;
    assert_eq!(k.len(), n * heads.key * heads.dim);
    let mut owner = vec![usize::MAX; n];
    for (part, rows) in parts.iter().enumerate() {
        for rows in *rows {
            for row in (rows.start..rows.start + rows.seen.len()).chain(rows.slots.iter().copied()) {
                assert!(owner[row] == usize::MAX || owner[row] == part, "row {row} is in two parts");
                owner[row] = part;
            }
        }
    }
    let rows: usize = parts.iter().flat_map(|rows| rows.iter()).map(|rows| rows.seen.len()).sum();
    assert!(rows == n && !owner.contains(&usize::MAX), "rows that no part has");
}

/// The products of the way back, but for `q·k`.
pub(super) trait Pulls {
    /// What all blocks of a list of rows read of their keys and values.
    type Read<'a>: Send + Sync;
    /// Rows come in multiples of this, zeros at the end.
    const ROWS: usize;

    /// One for each of `rows`. k, v: slots of (K, D).
    fn read<'a>(level: Level, heads: Heads, rows: &[Rows<'_>], kv: [&'a [f32]; 2]) -> Vec<Self::Read<'a>>;

    /// Buffers of a task.
    fn new(level: Level, heads: Heads) -> Self;

    /// Takes a block's rows up: q and dout, (M, wide).
    fn begin(&mut self, rows: [&[f32]; 2]);

    /// `dout·v` of the rows taken up → (M, pitch), where what is past the keys is anything.
    fn against(&mut self, block: &Block<'_>, kv: usize, rows: [&[f32]; 2], read: &Self::Read<'_>, out: &mut Vec<f32>);

    /// Adds `dscores·k` to dq: (M, wide), `dscoresᵀ·q` to dk and `weightsᵀ·dout` to dv: (N, K, D). weights, dscores: (M, pitch), zero
    /// past the keys.
    ///
    /// # Safety
    /// dk and dv have the block's keys, and nobody else uses them of this head.
    #[allow(clippy::too_many_arguments)] // where, four inputs, three outputs
    unsafe fn onto(
        &mut self,
        block: &Block<'_>,
        kv: usize,
        rows: [&[f32]; 2],
        read: &Self::Read<'_>,
        scores: [&[f32]; 2],
        dq: &mut [f32],
        to: [Out; 2],
    );
}

/// In f32.
struct Plainly(Products);

impl Pulls for Plainly {
    /// Keys and values, and the values turned.
    type Read<'a> = ([&'a [f32]; 2], Option<Vec<f32>>);
    const ROWS: usize = 1;

    fn read<'a>(level: Level, heads: Heads, rows: &[Rows<'_>], kv: [&'a [f32]; 2]) -> Vec<Self::Read<'a>> {
        turned_once(level, heads, rows, kv[1]).into_iter().map(|turned| (kv, turned)).collect()
    }

    fn new(level: Level, heads: Heads) -> Self {
        Plainly(Products::new(level, heads))
    }

    fn begin(&mut self, _: [&[f32]; 2]) {}

    fn against(
        &mut self,
        block: &Block<'_>,
        kv: usize,
        [_, dout]: [&[f32]; 2],
        ([_, v], turned): &Self::Read<'_>,
        out: &mut Vec<f32>,
    ) {
        self.0.against(block, kv, dout, Keys::new(v, turned), out);
    }

    unsafe fn onto(
        &mut self,
        block: &Block<'_>,
        kv: usize,
        [q, dout]: [&[f32]; 2],
        ([k, _], _): &Self::Read<'_>,
        [weights, dscores]: [&[f32]; 2],
        dq: &mut [f32],
        [dk, dv]: [Out; 2],
    ) {
        self.0.over(block, kv, dscores, k, dq);
        let Products { level, heads, wide, .. } = self.0;
        for (weights, rows, to) in [(dscores, q, dk), (weights, dout, dv)] {
            // SAFETY: the caller's promise.
            unsafe { onto_keys(level, heads, wide, block, kv, weights, rows, to) };
        }
    }
}

struct Task<P> {
    scratch: Scratch,
    pulls: P,
    /// (M, wide).
    dout: Vec<f32>,
    out: Vec<f32>,
    dq: Vec<f32>,
    /// Σ_j p_j·(dout·v_j) of every row, the softmax's own pull, (M).
    own: Vec<f32>,
    /// (M, pitch).
    dscores: Vec<f32>,
}

impl<P: Pulls> Task<P> {
    fn new(level: Level, heads: Heads) -> Self {
        let [dout, out, dq, own, dscores] = Default::default();
        Task { scratch: Scratch::new(level, heads), pulls: P::new(level, heads), dout, out, dq, own, dscores }
    }

    fn block(
        &mut self,
        block: &Block<'_>,
        kv: usize,
        (q, k, read): (&[f32], Keys<'_>, &P::Read<'_>),
        ([out, softmax], dout): ([&[f32]; 2], &[f32]),
        [to_dq, dk, dv]: [Out; 3],
    ) {
        let Task {
            scratch: Scratch { products, q: rows, weights, .. },
            pulls,
            dout: drows,
            out: found,
            dq,
            own,
            dscores,
        } = self;
        let (heads, wide) = (products.heads, products.wide);
        for (from, to) in [(q, &mut *rows), (dout, &mut *drows), (out, &mut *found)] {
            products.gather(block, kv, from, to);
        }
        own.clear();
        own.extend(drows.chunks_exact(wide).zip(found.chunks_exact(wide)).map(|(dout, out)| dot_row(dout, out)));
        let len = rows.len().next_multiple_of(P::ROWS * wide);
        [&mut *rows, &mut *drows].into_iter().for_each(|rows| rows.resize(len, 0.0));
        dq.clear();
        dq.resize(len, 0.0);
        let rows = [&rows[..], drows];
        pulls.begin(rows);
        for block in (0..block.slots.len()).step_by(KEYS).map(|at| block.piece(at, KEYS)) {
            let pitch = pitch(&block);
            products.against(&block, kv, rows[0], k, weights);
            pulls.against(&block, kv, rows, read, dscores);
            for (m, (weights, dscores)) in
                weights.chunks_exact_mut(pitch).zip(dscores.chunks_exact_mut(pitch)).enumerate()
            {
                let seen = block.seen.get(m / heads.group()).cloned().unwrap_or_default();
                for row in [&mut *weights, &mut *dscores] {
                    row[..seen.start].fill(0.0);
                    row[seen.end..].fill(0.0);
                }
                if let Some(own) = own.get(m) {
                    let at = products.row(&block, kv, m) * 2;
                    let (weights, dscores) = (&mut weights[seen.clone()], &mut dscores[seen]);
                    score_gradient_row(weights, dscores, [softmax[at], softmax[at + 1]], *own, heads.scale);
                }
            }
            // SAFETY: the keys are of this part, which with this head is this task's alone.
            unsafe { pulls.onto(&block, kv, rows, read, [weights, dscores], dq, [dk, dv]) };
        }
        products.scatter(block, kv, &dq[..own.len() * wide], to_dq);
    }
}

/// `to += weightsᵀ·rows`. weights: (M, pitch), rows: (M, wide), to: (N, K, D).
/// # Safety
/// As [`Pulls::onto`].
#[allow(clippy::too_many_arguments)] // a shape, two inputs and where they go
unsafe fn onto_keys(
    level: Level,
    heads: Heads,
    wide: usize,
    block: &Block<'_>,
    kv: usize,
    weights: &[f32],
    rows: &[f32],
    to: Out,
) {
    let (pitch, row) = (pitch(block), heads.key * heads.dim);
    for (index, slot, len) in runs(block.slots) {
        for column in (0..heads.dim).step_by(PANEL) {
            let tile = Tile {
                x: weights.as_ptr().wrapping_add(index),
                stride: pitch,
                turned: true,
                weights: Plain(rows.as_ptr().wrapping_add(column), wide),
                k: rows.len() / wide,
                columns: PANEL.min(heads.dim - column),
                sums: Sums::GoOn,
            };
            // SAFETY: `len` keys from `index` are inside a row of weights, and rows are read in multiples of 16 columns, at most
            // `wide`; of the keys the caller's promise.
            unsafe { tile.run(level, len, to.at((slot * heads.key + kv) * heads.dim + column), row) };
        }
    }
}
