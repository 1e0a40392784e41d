//! Attention of blocks of rows over any keys, forward and backward, as small products by the microkernel of [`super::matmul`].
//!
//! A score is one chain over D (a new one every 256), an output one chain over the row's keys in order, a gradient of a key one chain
//! over the rows of a slice in order. So a row's result does not depend on what else is in its block or step, nor on where its keys lie.

mod backward;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod scores;
#[cfg(test)]
mod tests;

use std::ops::Range;

use super::level::{Level, level};
use super::matmul::PANEL;
use super::places::filled;
use crate::cores::each_with;
pub use backward::attention_backward;
use scores::{Keys, Scratch, turned};

/// Rows of a block at most.
const ROWS: usize = 32;
/// Scores of a block at most in the forward, unless one row has more.
const SCORES: usize = 1 << 17;

/// Shape of the heads.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// H.
    pub query: usize,
    /// K.
    pub key: usize,
    /// D.
    pub dim: usize,
    /// Softmax scale, above zero.
    pub scale: f32,
}

impl Heads {
    /// H/K: query heads that share a key head.
    fn group(&self) -> usize {
        self.query / self.key
    }
}

/// Consecutive rows of a step whose keys are one list, and what each sees of it.
#[derive(Clone, Debug)]
pub struct Rows<'a> {
    /// Row of the first.
    pub start: usize,
    /// The slot, of (K, D) in the key and value arrays, of every key in the list.
    pub slots: &'a [usize],
    /// What each row sees: a range of the list. Neither end ever moves back from one row to the next.
    pub seen: Vec<Range<usize>>,
}

/// A part of [`Rows`] small enough for its scores to stay in cache, cut to the keys that it sees, in whole panels.
struct Block<'a> {
    start: usize,
    /// Which [`Rows`] it is of, its first panel of theirs, and how many they have.
    rows: usize,
    first: usize,
    panels: usize,
    slots: &'a [usize],
    seen: Vec<Range<usize>>,
}

/// The blocks of the `index`-th rows, with at most `most` scores where they have more than one row.
fn blocks<'a>(heads: Heads, index: usize, rows: &Rows<'a>, most: usize) -> Vec<Block<'a>> {
    let mut blocks = Vec::new();
    let mut at = 0;
    while at < rows.seen.len() {
        let first = rows.seen[at].start / PANEL * PANEL;
        let mut len = 1;
        while len < ROWS && at + len < rows.seen.len() {
            let keys = (rows.seen[at + len].end - first).next_multiple_of(PANEL);
            if (len + 1) * heads.group() * keys > most {
                break;
            }
            len += 1;
        }
        let some = &rows.seen[at..at + len];
        blocks.push(Block {
            start: rows.start + at,
            rows: index,
            first: first / PANEL,
            panels: rows.slots.len().div_ceil(PANEL),
            slots: &rows.slots[first..some[len - 1].end],
            seen: some.iter().map(|seen| seen.start - first..seen.end - first).collect(),
        });
        at += len;
    }
    blocks
}

impl<'a> Block<'a> {
    /// The same rows and the `len` keys at most from the `at`-th on, a multiple of a panel.
    fn piece(&self, at: usize, len: usize) -> Block<'a> {
        let slots = &self.slots[at..self.slots.len().min(at + len)];
        let inside = |key: usize| key.clamp(at, at + slots.len()) - at;
        let seen = self.seen.iter().map(|seen| inside(seen.start)..inside(seen.end)).collect();
        Block { first: self.first + at / PANEL, slots, seen, ..*self }
    }
}

/// The keys (or values) of rows that make more than one block are turned once, for all of them: for each rows (K, panels, D, 32), or
/// nothing.
fn turned_once(level: Level, heads: Heads, rows: &[Rows<'_>], keys: &[f32]) -> Vec<Option<Vec<f32>>> {
    rows.iter().map(|rows| (rows.seen.len() > ROWS).then(|| turned(level, heads, rows.slots, keys))).collect()
}

/// Softmax attention. q: (N, H, D); k, v: slots of (K, D); `rows` cover all N in order → (N, H, D), and what the softmaxes were made
/// of for the way back, (N, H, 2): the largest product `q·k` of each and one over the sum of its `exp(scale·(q·k − largest))`.
pub fn attention(heads: Heads, rows: &[Rows<'_>], q: &[f32], k: &[f32], v: &[f32]) -> [Vec<f32>; 2] {
    attention_at(level(), heads, rows, q, k, v)
}

fn attention_at(level: Level, heads: Heads, rows: &[Rows<'_>], q: &[f32], k: &[f32], v: &[f32]) -> [Vec<f32>; 2] {
    let blocks = rows.iter().enumerate().flat_map(|(index, rows)| blocks(heads, index, rows, SCORES));
    let blocks: Vec<Block<'_>> = blocks.collect();
    let covered: usize = blocks.iter().map(|block| block.seen.len()).sum();
    let ends = blocks.iter().map(|block| block.start + block.seen.len());
    let in_order = std::iter::once(0).chain(ends).zip(&blocks).all(|(end, block)| end == block.start);
    assert!(in_order, "rows out of order");
    assert_eq!(covered * heads.query * heads.dim, q.len(), "rows that no block has");
    let slots = k.len().min(v.len()) / (heads.key * heads.dim);
    assert!(rows.iter().flat_map(|rows| rows.slots).all(|slot| *slot < slots), "a slot past the keys");
    let of_rows = turned_once(level, heads, rows, k);
    // Head after head, as the blocks of one read the same keys, and the last first, as they read most.
    let tasks = (0..blocks.len() * heads.key).rev();
    let fill = |out, softmax| {
        each_with(
            tasks,
            || Scratch::new(level, heads),
            |scratch, task| {
                let (block, kv) = (&blocks[task % blocks.len()], task / blocks.len());
                scratch.attend(block, kv, (q, Keys::new(k, &of_rows[block.rows]), v), [out, softmax]);
            },
        );
    };
    let mut softmax = Vec::new();
    // SAFETY: every row of every head is in one task, which writes all of it.
    let out = unsafe { filled(q.len(), |out| softmax = filled(q.len() / heads.dim * 2, |softmax| fill(out, softmax))) };
    [out, softmax]
}
