//! Products of matrices of any size, which cuBLAS makes.

use candle_core::Result;

use super::launch::{Kind, Queue};

/// Where a matrix lies, by rows that begin `pitch` numbers apart; `turned` means its transpose.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(any(feature = "cuda", test)), allow(dead_code))] // only a GPU reads them
pub(super) struct Place {
    pub(super) at: u64,
    pub(super) kind: Kind,
    pub(super) pitch: usize,
    pub(super) turned: bool,
}

/// A product as cuBLAS has it, by columns: `c = alpha·op(a)·op(b) + beta·c` of (m, n), with sums over k in f32.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(any(feature = "cuda", test)), allow(dead_code))] // only a GPU reads them
pub(super) struct Gemm {
    pub(super) size: [usize; 3],
    pub(super) a: Place,
    pub(super) b: Place,
    pub(super) c: Place,
    pub(super) alpha: f32,
    pub(super) beta: f32,
}

/// `y = scale·left·right`, added to what is there where it is `onto` that. left: (m, k), right: (k, n), of one kind; y: (m, n), not turned.
///
/// # Safety
/// As [`Queue::launch`].
pub(super) unsafe fn multiply(
    queue: &impl Queue,
    (m, n, k): (usize, usize, usize),
    [left, right, y]: [Place; 3],
    scale: f32,
    onto: bool,
) -> Result<()> {
    // What lies by rows is, by columns, its transpose: yᵀ = rightᵀ·leftᵀ.
    let gemm = Gemm { size: [n, m, k], a: right, b: left, c: y, alpha: scale, beta: f32::from(u8::from(onto)) };
    // SAFETY: the caller's.
    unsafe { queue.multiply(gemm) }
}
