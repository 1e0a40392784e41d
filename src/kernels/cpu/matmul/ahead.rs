//! Memory that is read soon, sent for a little at a time while something else is computed.
//!
//! What adapters add to a product is short pieces in many places, which the processor does not foresee. Waiting for them costs more than
//! multiplying them; sent for all at once they hold up the loads of the product itself.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

use super::coded::{LINE, Line};

/// Places in memory in the order in which they are sent for.
#[derive(Default)]
pub(super) struct Ahead {
    /// Address and lines of each. Nothing is read by it, so it need not be a reference.
    places: Vec<(usize, usize)>,
}

/// Nothing to send for.
pub(super) static NOTHING: Ahead = Ahead { places: Vec::new() };

impl Ahead {
    pub(super) fn clear(&mut self) {
        self.places.clear();
    }

    pub(super) fn push<W>(&mut self, numbers: &[W]) {
        self.places.push((numbers.as_ptr().addr(), size_of_val(numbers).div_ceil(LINE)));
    }

    /// Adds the part of `all` that is `at` of `parts`.
    pub(super) fn push_part(&mut self, all: &Ahead, at: usize, parts: usize) {
        let lines = all.lines();
        let (mut from, until, mut before) = (lines * at / parts, lines * (at + 1) / parts, 0);
        for (address, lines) in &all.places {
            let end = until.min(before + lines);
            if from < end {
                self.places.push((address + (from - before) * LINE, end - from));
                from = end;
            }
            before += lines;
        }
    }

    fn lines(&self) -> usize {
        self.places.iter().map(|(_, lines)| lines).sum()
    }

    /// Sends for all of it.
    pub(super) fn send(&self) {
        self.in_parts(1)();
    }

    /// Sends for one more of so many equal parts at every call.
    #[inline(always)]
    pub(super) fn in_parts(&self, parts: usize) -> impl FnMut() {
        let some = self.lines().div_ceil(parts.max(1));
        let mut places = self.places.iter();
        let (mut address, mut lines) = (0, 0..0);
        move || {
            let mut left = some;
            while left > 0 {
                if lines.is_empty() {
                    let Some(next) = places.next() else { return };
                    (address, lines) = (next.0, 0..next.1);
                }
                let until = lines.end.min(lines.start + left);
                left -= until - lines.start;
                let from = std::ptr::without_provenance::<Line>(address).wrapping_add(lines.start);
                send_for(from, until - lines.start);
                lines.start = until;
            }
        }
    }
}

/// Has the processor fetch some numbers, where it can be told.
#[inline(always)]
pub(super) fn send_for<W>(from: *const W, numbers: usize) {
    for at in (0..numbers * size_of::<W>()).step_by(LINE) {
        let line = from.cast::<i8>().wrapping_add(at);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which reads nothing.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(line);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_all_of_it_in_order() {
        let numbers = [0u8; 20 * LINE];
        let mut all = Ahead::default();
        for lines in [0..3, 3..4, 4..11, 11..20] {
            all.push(&numbers[lines.start * LINE..lines.end * LINE]);
        }
        for parts in [1, 3, 7, 50] {
            let mut found = Ahead::default();
            (0..parts).for_each(|at| found.push_part(&all, at, parts));
            let lines = |of: &Ahead| -> Vec<usize> {
                of.places
                    .iter()
                    .flat_map(|(address, lines)| (0..*lines).map(move |line| address + line * LINE))
                    .collect()
            };
            assert_eq!(lines(&found), lines(&all));
        }
    }
}
