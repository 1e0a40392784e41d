//! Inverted dropout whose mask is a function of a seed and a place alone: nobody keeps it.

use super::rowwise::at_every_level;
use crate::seed::{STEP, mixed};

/// Which numbers are dropped, and what the others are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The seed, mixed: what a place adds to.
    pub(crate) state: u64,
    /// A place is dropped whose mixed upper half is below this.
    pub(crate) limit: u64,
    /// Factor of what stays.
    pub(crate) keep: f32,
}

impl Dropout {
    /// With probability `p`, below 1.
    pub fn new(p: f32, seed: u64) -> Self {
        let limit = (f64::from(p) * 2f64.powi(32)) as u64;
        Dropout { state: mixed(seed.wrapping_add(STEP)), limit, keep: 1.0 / (1.0 - p) }
    }

    /// `y = mask · x` of numbers whose first is at `place` of the whole.
    pub fn row(self, place: usize, x: &[f32], y: &mut [f32]) {
        dropout_row(self, place as u64, x, y);
    }
}

at_every_level! {
    fn dropout_row(dropout: Dropout, place: u64, x: &[f32], y: &mut [f32]) {
        let Dropout { state, limit, keep } = dropout;
        for (at, (y, x)) in (place..).zip(y.iter_mut().zip(x)) {
            let dropped = mixed(state.wrapping_add(at.wrapping_mul(STEP))) >> 32 < limit;
            *y = if dropped { 0.0 } else { x * keep };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_a_places_own() {
        let (x, mut whole) = (vec![1.0; 5000], vec![f32::NAN; 5000]);
        let dropout = Dropout::new(0.25, 7);
        dropout.row(0, &x, &mut whole);
        for (place, y) in whole.iter().enumerate() {
            let state = mixed(7u64.wrapping_add(STEP)).wrapping_add((place as u64).wrapping_mul(STEP));
            // A quarter of 2^32.
            let wanted = if mixed(state) >> 32 < 1 << 30 { 0.0 } else { 4.0f32 / 3.0 };
            assert!((y - wanted).abs() < 1e-6, "place {place}");
        }
        let dropped = whole.iter().filter(|y| **y == 0.0).count();
        assert!((1100..1400).contains(&dropped), "{dropped} of 5000");
        let mut parts = vec![f32::NAN; 5000];
        let (left, right) = parts.split_at_mut(1234);
        dropout.row(0, &x[..1234], left);
        dropout.row(1234, &x[1234..], right);
        assert_eq!(parts, whole);
    }
}
