//! Gradients of attention: the weights are computed again, a gradient of a key or value is summed over the rows in order.

use rayon::prelude::*;

use super::scores::{Scratch, pitch, runs};
use super::{Block, Heads, Rows, blocks};
use crate::cores::spread;
use crate::kernels::cpu::level::{Level, Out, level};
use crate::kernels::cpu::matmul::{PANEL, Plain, Tile};
use crate::kernels::cpu::rowwise::{dot_row, score_gradient_row};

/// Gradients of [`super::attention`] in q, k and v. out, dout, q: (N, H, D); k, v: (N, K, D), the slots being rows of the step.
///
/// `parts` are runs of consecutive `rows` that share no key with each other; each part and key head is a task of its own.
pub fn attention_backward(
    heads: Heads,
    parts: &[&[Rows<'_>]],
    (q, k, v): (&[f32], &[f32], &[f32]),
    (out, dout): (&[f32], &[f32]),
) -> [Vec<f32>; 3] {
    let mut found = [vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; v.len()]];
    let places = found.each_mut().map(|found| Out(found.as_mut_ptr()));
    check(heads, parts, q, k);
    let level = level();
    let cut: Vec<Vec<Block<'_>>> =
        parts.iter().map(|rows| rows.iter().flat_map(|rows| blocks(heads, rows)).collect()).collect();
    let tasks = (0..cut.len() * heads.key).into_par_iter().with_max_len(1);
    let walk = |task: &mut Task, index: usize| {
        for block in &cut[index / heads.key] {
            task.block(block, index % heads.key, (q, k, v), (out, dout), places);
        }
    };
    spread(|| tasks.for_each_init(|| Task::new(level, heads), walk));
    found
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
        (q, k, v): (&[f32], &[f32], &[f32]),
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
        products.over(block, kv, &self.dscores, k, &mut self.dq);
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
                add: true,
            };
            // SAFETY: `len` keys from `index` are inside a row of weights, and rows are read in multiples of 16 columns, at most
            // `wide`; the keys of this part and head are this task's alone.
            unsafe { tile.run(level, len, to.at((slot * heads.key + kv) * heads.dim + column), row) };
        }
    }
}
