//! Low-rank parts of a product, worked out beside it: whoever comes to a block of rows first multiplies it with A, once it has done its
//! first panel of the weight, while others go on with theirs.

use std::hint::spin_loop;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ahead::NOTHING;
use super::{Input, Onto, Packed};

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

/// A part's rows of one block.
pub(super) struct Low<'a> {
    /// Rows of the step.
    pub(super) rows: Range<usize>,
    a: &'a Packed,
    pub(super) b: &'a Packed,
    claimed: AtomicBool,
    found: OnceLock<Input<'static>>,
}

impl<'a> Lows<'a> {
    /// For blocks of `block` of M rows.
    pub(super) fn new(weight: &Packed, parts: &[LowRank<'a>], (m, block): (usize, usize)) -> Self {
        for LowRank { rows, a, b } in parts {
            let fits = (a.k, a.n, b.n) == (weight.k, b.k, weight.n) && rows.end <= m;
            assert!(fits && [a, b].iter().all(|of| of.is_bf16() == weight.is_bf16()), "a part that does not fit");
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

    pub(super) fn of(&self, rows: &Range<usize>) -> &[Low<'a>] {
        self.blocks.get(rows.start / self.block).map_or(&[], Vec::as_slice)
    }
}

impl Low<'_> {
    /// Whether it is left to the caller to multiply with A.
    pub(super) fn claim(&self) -> bool {
        !self.claimed.load(Ordering::Relaxed) && !self.claimed.swap(true, Ordering::Relaxed)
    }

    /// Multiplies with A what was claimed.
    pub(super) fn multiply(&self, input: &Input<'_>) {
        self.found.get_or_init(|| {
            Input::new(self.a.some_rows(input, self.rows.clone()), self.b.k, input.mode, [self.b].into_iter())
        });
    }

    /// Whether it was multiplied with A.
    pub(super) fn is_there(&self) -> bool {
        self.found.get().is_some()
    }

    /// Adds one panel's columns, once whoever claimed it is done.
    /// # Safety
    /// `to` has room for the rows, N apart, and nobody else uses it.
    pub(super) unsafe fn add_to(&self, panel: usize, columns: usize, to: *mut f32) {
        let found = self.found.get().unwrap_or_else(|| self.wait());
        let how = Onto { columns, add: true, ahead: &NOTHING };
        // SAFETY: the caller's promise.
        unsafe { self.b.panel(found, panel, 0..self.rows.len(), to, &how) };
    }

    #[cold]
    fn wait(&self) -> &Input<'static> {
        for _ in 0..LOOKS {
            if let Some(found) = self.found.get() {
                return found;
            }
            spin_loop();
        }
        self.found.wait()
    }
}
