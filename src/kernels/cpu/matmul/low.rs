//! Low-rank parts of a product, worked out beside it: whoever comes to a block of rows first multiplies it with A, while the others
//! begin with the weight itself.

use std::hint::spin_loop;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Input, Packed};

/// How often one who needs another thread's result looks for it before he sleeps: some microseconds.
const LOOKS: usize = 2000;

/// A low-rank part of some rows of a product, `x·Aᵀ·Bᵀ`.
#[derive(Clone, Debug)]
pub struct LowRank<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// (R, K), in bf16 where the weight is bf16 or quantized, else not.
    pub a: &'a Packed,
    /// (N, R), the same.
    pub b: &'a Packed,
}

/// The parts' products with A, block of rows by block.
pub(super) struct Lows<'a> {
    /// Rows of a block.
    block: usize,
    blocks: Vec<Vec<Low<'a>>>,
}

struct Low<'a> {
    /// Rows of the step.
    rows: Range<usize>,
    a: &'a Packed,
    b: &'a Packed,
    claimed: AtomicBool,
    found: OnceLock<Input<'static>>,
}

impl<'a> Lows<'a> {
    /// For blocks of `block` of M rows.
    pub(super) fn new(weight: &Packed, parts: &[LowRank<'a>], (m, block): (usize, usize)) -> Self {
        for LowRank { rows, a, b } in parts {
            let fits = (a.k, a.n, b.n) == (weight.k, b.k, weight.n) && rows.end <= m;
            assert!(fits && [a, b].iter().all(|of| of.is_bf16() == weight.is_bf16()), "a part that does not fit");
            a.send_for(0);
        }
        let of_block = |start: usize| {
            let common = |rows: &Range<usize>| start.max(rows.start)..(start + block).min(rows.end);
            let low = |part: &LowRank<'a>| Low {
                rows: common(&part.rows),
                a: part.a,
                b: part.b,
                claimed: AtomicBool::new(false),
                found: OnceLock::new(),
            };
            parts.iter().filter(|part| !common(&part.rows).is_empty()).map(low).collect()
        };
        let starts = if parts.is_empty() { 0..0 } else { 0..m };
        Lows { block, blocks: starts.step_by(block).map(of_block).collect() }
    }

    fn of(&self, rows: &Range<usize>) -> &[Low<'a>] {
        self.blocks.get(rows.start / self.block).map_or(&[], Vec::as_slice)
    }

    /// Works out what nobody has begun of a block, and sends for what [`Self::add_to`] reads for a panel: pieces too short for the
    /// processor to foresee, whose wait would cost more than their bytes.
    pub(super) fn begin(&self, rows: &Range<usize>, panel: usize, input: &Input<'_>) {
        for low in self.of(rows) {
            low.b.send_for(panel);
            if !low.claimed.load(Ordering::Relaxed) && !low.claimed.swap(true, Ordering::Relaxed) {
                low.found.get_or_init(|| {
                    Input::new(low.a.some_rows(input, low.rows.clone()), low.b.k, input.mode, [low.b].into_iter())
                });
            }
        }
    }

    /// Adds the parts to one panel's columns of a block that was begun.
    /// # Safety
    /// `to` has room for the block's rows, N apart, and nobody else uses it.
    pub(super) unsafe fn add_to(&self, rows: &Range<usize>, panel: usize, columns: usize, to: *mut f32) {
        for low in self.of(rows) {
            let mut looks = 0;
            while low.found.get().is_none() && looks < LOOKS {
                looks += 1;
                spin_loop();
            }
            // SAFETY: the caller's promise.
            unsafe {
                let to = to.add((low.rows.start - rows.start) * low.b.n);
                low.b.panel(low.found.wait(), panel, 0..low.rows.len(), columns, true, to);
            }
        }
    }
}
