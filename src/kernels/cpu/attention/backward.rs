//! Gradients of attention: the weights are computed again, a gradient of a key or value is summed over the rows in order.

use std::ops::Range;

use super::scores::{Keys, Scratch, pitch, runs};
use super::{Block, Heads, Rows, blocks, turned_once};
use crate::cores::{each, each_with};
use crate::kernels::cpu::level::{Level, level};
use crate::kernels::cpu::matmul::{PANEL, Plain, Sums, Tile};
use crate::kernels::cpu::places::Out;
use crate::kernels::cpu::rowwise::{add_row, dot_row, score_gradient_row};

/// Numbers that are added at once.
const CHUNK: usize = 4096;
/// Rows of a part that make a slice of their own, and most slices of a part: it is cut into such so that threads share it evenly.
const SLICE: usize = 256;
const MOST_SLICES: usize = 4;

/// Gradients of [`super::attention`] in q, k and v. out, dout, q: (N, H, D); k, v: (N, K, D), the slots being rows of the step.
///
/// `parts` are runs of consecutive `rows` that share no key with each other; each slice of a part is a task of its own under each key
/// head. Gradients of keys and values are summed over the rows of a slice in order, then over the slices.
pub fn attention_backward(
    heads: Heads,
    parts: &[&[Rows<'_>]],
    (q, k, v): (&[f32], &[f32], &[f32]),
    (out, dout): (&[f32], &[f32]),
) -> [Vec<f32>; 3] {
    check(heads, parts, q, k);
    let level = level();
    // Each part's blocks, and its keys and values turned.
    let mut cut = Vec::with_capacity(parts.len());
    for &rows in parts {
        let blocks: Vec<_> = rows.iter().enumerate().flat_map(|(index, rows)| blocks(heads, index, rows)).collect();
        cut.push((blocks, [k, v].map(|keys| turned_once(level, heads, rows, keys))));
    }
    // (part, which of its slices, the slice's blocks)
    let slices: Vec<(usize, usize, Range<usize>)> = cut
        .iter()
        .enumerate()
        .flat_map(|(part, (blocks, _))| {
            slices(blocks).into_iter().enumerate().map(move |(slice, blocks)| (part, slice, blocks))
        })
        .collect();
    let most = slices.iter().map(|(_, slice, _)| slice + 1).max().unwrap_or(1);
    let mut dq = vec![0f32; q.len()];
    // dk and dv of every slice.
    let mut sums: Vec<[Vec<f32>; 2]> = (0..most).map(|_| [vec![0f32; k.len()], vec![0f32; v.len()]]).collect();
    let dq_place = Out(dq.as_mut_ptr());
    let places: Vec<[Out; 2]> = sums.iter_mut().map(|of| of.each_mut().map(|sum| Out(sum.as_mut_ptr()))).collect();
    each_with(
        0..slices.len() * heads.key,
        || Task::new(level, heads),
        |task, index| {
            let (part, slice, range) = &slices[index / heads.key];
            let (blocks, turned) = &cut[*part];
            let [dk, dv] = places[*slice];
            for block in &blocks[range.clone()] {
                let [k_of, v_of] = turned.each_ref().map(|turned| &turned[block.rows]);
                let keys = (k, Keys::new(k, k_of), Keys::new(v, v_of));
                task.block(block, index % heads.key, (q, keys), (out, dout), [dq_place, dk, dv]);
            }
        },
    );
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

/// Parts own their rows and keys: no row is in two, no key is seen from two.
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
}

struct Task {
    scratch: Scratch,
    /// (M, wide).
    dout: Vec<f32>,
    out: Vec<f32>,
    dq: Vec<f32>,
    /// (M, pitch).
    dscores: Vec<f32>,
}

impl Task {
    fn new(level: Level, heads: Heads) -> Self {
        let scratch = Scratch::new(level, heads);
        Task { scratch, dout: Vec::new(), out: Vec::new(), dq: Vec::new(), dscores: Vec::new() }
    }

    fn block(
        &mut self,
        block: &Block<'_>,
        kv: usize,
        (q, (plain_k, k, v)): (&[f32], (&[f32], Keys<'_>, Keys<'_>)),
        (out, dout): (&[f32], &[f32]),
        [dq, dk, dv]: [Out; 3],
    ) {
        self.scratch.weigh(block, kv, q, k);
        let Scratch { products, q, weights, scales, .. } = &mut self.scratch;
        let (wide, pitch, group, scale) = (products.wide, pitch(block), products.heads.group(), products.heads.scale);
        products.gather(block, kv, dout, &mut self.dout);
        products.gather(block, kv, out, &mut self.out);
        products.against(block, kv, &self.dout, v, &mut self.dscores);
        let rows = weights.chunks_exact_mut(pitch).zip(self.dscores.chunks_exact_mut(pitch)).zip(scales);
        let pulls = self.dout.chunks_exact(wide).zip(self.out.chunks_exact(wide));
        for (m, (((weights, dscores), sum), (dout, out))) in rows.zip(pulls).enumerate() {
            let seen = block.seen[m / group].clone();
            // Σ_j p_j·(dout·v_j), the softmax's own pull.
            let pull = dot_row(dout, out);
            dscores[..seen.start].fill(0.0);
            dscores[seen.end..].fill(0.0);
            score_gradient_row(&mut weights[seen.clone()], &mut dscores[seen], *sum, pull, scale);
        }
        products.over(block, kv, &self.dscores, plain_k, &mut self.dq);
        products.scatter(block, kv, &self.dq, dq);
        let (level, heads) = (products.level, products.heads);
        onto_keys(level, heads, wide, block, kv, &self.dscores, q, dk);
        onto_keys(level, heads, wide, block, kv, weights, &self.dout, dv);
    }
}

/// `to += weightsᵀ·rows`. weights: (M, pitch), rows: (M, wide), to: (N, K, D).
#[allow(clippy::too_many_arguments)] // a shape, two inputs and where they go
fn onto_keys(
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
            // `wide`; the keys of this part and head are this task's alone.
            unsafe { tile.run(level, len, to.at((slot * heads.key + kv) * heads.dim + column), row) };
        }
    }
}
