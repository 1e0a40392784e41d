//! Launches of `few.cu`.

use candle_core::Result;

use super::launch::{Arg, Kind, Launch, Queue, WORDS};

/// Warps of a block, products of a launch and words of one, as `few.cu` has them.
const WARPS: usize = 8;
const PRODUCTS: usize = 8;
const PRODUCT: usize = 4;
/// Most rows that the kernel is for: with more of them a library's product, on tensor cores, is no slower.
pub const MOST_ROWS: usize = 8;

/// One weight, (out, k), its bias, (out) or zero for none, and what it gives, (rows, out).
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) w: u64,
    pub(super) bias: u64,
    pub(super) y: u64,
    pub(super) out: usize,
}

/// `y = x·wᵀ + bias` of every product: one launch for as many as 8.
///
/// # Safety
/// As [`Queue::launch`]: x: (rows, k) of `kind`, rows to [`MOST_ROWS`], k a multiple of 8; products of the same numbers; x and every w
/// on a multiple of 8 numbers.
pub(super) unsafe fn products(
    queue: &impl Queue,
    kind: Kind,
    (rows, k): (usize, usize),
    x: u64,
    products: &[Product],
) -> Result<()> {
    let (kernel, outs) = match rows {
        0 => return Ok(()),
        1 => ("few_rows_1", 1),
        2 => ("few_rows_2", 1),
        3..=4 => ("few_rows_4", 2),
        _ => ("few_rows_8", 4),
    };
    for products in products.chunks(PRODUCTS) {
        let mut table = Box::new([0; WORDS]);
        for (product, words) in products.iter().zip(table.chunks_exact_mut(PRODUCT)) {
            words.copy_from_slice(&[product.w, product.bias, product.y, product.out as u64]);
        }
        let blocks = products.iter().map(|product| product.out.div_ceil(WARPS * outs)).sum();
        let args = vec![Arg::At(x), Arg::int(rows), Arg::int(k), Arg::Table(table)];
        let launch = Launch { kernel: kind.name(kernel), grid: [blocks, 1, 1], threads: 32 * WARPS, shared: 0, args };
        // SAFETY: the caller's.
        unsafe { queue.launch(launch) }?;
    }
    Ok(())
}
