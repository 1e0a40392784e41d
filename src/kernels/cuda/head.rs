//! Launches of `head.cu`.

use candle_core::Result;

use super::launch::{Arg, Kind, Launch, Queue};
use super::rows::{each, vectors};

/// Threads of a row of logits.
const THREADS: usize = 512;

/// Log-probs of targets; with `wanted` the logits become `onehot − softmax`.
///
/// # Safety
/// As [`Queue::launch`]: logits: (rows, v) of `kind`; `rows` targets below v, u32; logprobs: (rows), f32.
pub(super) unsafe fn token_logprobs(
    queue: &impl Queue,
    kind: Kind,
    (rows, v): (usize, usize),
    wanted: bool,
    [logits, targets, logprobs]: [u64; 3],
) -> Result<()> {
    let mut args = vec![Arg::At(logits), Arg::At(targets), Arg::Long(v as i64), Arg::Int(i32::from(wanted))];
    args.extend([vectors(&[v], &[logits]), Arg::At(logprobs)]);
    let (kernel, shared) = (kind.name("token_logprobs"), THREADS / 32 * 4);
    // SAFETY: the caller's.
    unsafe { queue.launch(Launch { kernel, grid: [rows, 1, 1], threads: THREADS, shared, args }) }
}

/// Rows times a number each.
///
/// # Safety
/// As [`Queue::launch`]: x, y: (rows, c) of `kind`; factors: (rows), f32.
pub(super) unsafe fn scale_rows(
    queue: &impl Queue,
    kind: Kind,
    (rows, c): (usize, usize),
    [x, factors, y]: [u64; 3],
) -> Result<()> {
    let args = vec![Arg::At(x), Arg::At(factors), Arg::Long((rows * c) as i64), Arg::int(c), Arg::At(y)];
    // SAFETY: the caller's.
    unsafe { queue.launch(each(kind.name("scale_rows"), rows * c, args)) }
}
