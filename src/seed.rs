//! Seeds out of numbers, by SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").

/// What its state grows by: the golden ratio's fraction.
pub const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Its finalizer: every bit of `state` moves all of the result.
#[inline(always)]
pub const fn mixed(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_splitmix64() {
        // What it gives first when it begins at 0.
        assert_eq!(mixed(STEP), 0xe220_a839_7b1d_cdaf);
    }
}
