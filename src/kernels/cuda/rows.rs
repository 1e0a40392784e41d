//! Launches of `rows.cu`.

use candle_core::Result;

use super::launch::{Arg, Kind, Launch, Queue};
use crate::kernels::cpu::{Activation, AdamWUpdate, Dropout};

/// Threads of a block where each has its own numbers.
const THREADS: usize = 256;
/// Most threads of a block that has a row.
const MOST_THREADS: usize = 512;

/// One thread for each of `count`.
pub(super) fn each(kernel: String, count: usize, args: Vec<Arg>) -> Launch {
    Launch { kernel, grid: [count.div_ceil(THREADS).max(1), 1, 1], threads: THREADS, shared: 0, args }
}

/// One thread for each eight of `count`.
fn eights(kernel: String, count: usize, args: Vec<Arg>) -> Launch {
    each(kernel, count.div_ceil(8), args)
}

/// Whether arrays lie, and their rows of so many numbers end, where eight numbers can be read at once.
pub(super) fn vectors(lengths: &[usize], places: &[u64]) -> Arg {
    let whole = lengths.iter().all(|len| len.is_multiple_of(8)) && places.iter().all(|at| at.is_multiple_of(16));
    Arg::Int(i32::from(whole))
}

/// A block for each row of `c`.
fn by_row(kernel: String, rows: usize, c: usize, args: Vec<Arg>) -> Launch {
    let threads = c.div_ceil(8).next_multiple_of(32).clamp(32, MOST_THREADS);
    Launch { kernel, grid: [rows, 1, 1], threads, shared: threads / 32 * 4, args }
}

fn code(activation: Activation) -> Arg {
    Arg::Int(match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    })
}

/// # Safety
/// As [`Queue::launch`]: x, y: (rows, c) of `kind`; weight: (c), f32.
pub(super) unsafe fn rms_norm(
    queue: &impl Queue,
    kind: Kind,
    (rows, c): (usize, usize),
    eps: f32,
    [x, weight, y]: [u64; 3],
) -> Result<()> {
    let vectors = vectors(&[c], &[x, weight, y]);
    let args = vec![Arg::At(x), Arg::At(weight), Arg::Float(eps), Arg::int(c), vectors, Arg::At(y)];
    // SAFETY: the caller's.
    unsafe { queue.launch(by_row(kind.name("rms_norm"), rows, c, args)) }
}

/// # Safety
/// As [`Queue::launch`]: x, dy, before, dx: (rows, c) of `kind`, where `before` may be zero for none; weight: (c), f32.
pub(super) unsafe fn rms_norm_backward(
    queue: &impl Queue,
    kind: Kind,
    (rows, c): (usize, usize),
    eps: f32,
    [x, weight, dy, before, dx]: [u64; 5],
) -> Result<()> {
    let mut args = vec![Arg::At(x), Arg::At(weight), Arg::At(dy), Arg::At(before), Arg::Float(eps), Arg::int(c)];
    args.extend([vectors(&[c], &[x, weight, dy, before, dx]), Arg::At(dx)]);
    // SAFETY: the caller's.
    unsafe { queue.launch(by_row(kind.name("rms_norm_backward"), rows, c, args)) }
}

/// # Safety
/// As [`Queue::launch`]: x, y: (n, h, d) of `kind`; cos, sin: (n, d/2), f32.
pub(super) unsafe fn rope(
    queue: &impl Queue,
    kind: Kind,
    (n, h, d): (usize, usize, usize),
    sign: f32,
    [x, cos, sin, y]: [u64; 4],
) -> Result<()> {
    let pairs = n * h * (d / 2);
    let mut args = vec![Arg::At(x), Arg::At(cos), Arg::At(sin), Arg::Float(sign), Arg::Long(pairs as i64)];
    args.extend([Arg::int(h), Arg::int(d / 2), vectors(&[d / 2], &[x, cos, sin, y]), Arg::At(y)]);
    // SAFETY: the caller's.
    unsafe { queue.launch(eights(kind.name("rope"), pairs, args)) }
}

/// `y = a + b`; y may be either.
///
/// # Safety
/// As [`Queue::launch`]: `count` numbers of `kind` each.
pub(super) unsafe fn sum(queue: &impl Queue, kind: Kind, count: usize, [a, b, y]: [u64; 3]) -> Result<()> {
    let args = vec![Arg::At(a), Arg::At(b), Arg::Long(count as i64), vectors(&[], &[a, b, y]), Arg::At(y)];
    // SAFETY: the caller's.
    unsafe { queue.launch(eights(kind.name("sum"), count, args)) }
}

/// # Safety
/// As [`Queue::launch`]: `count` numbers of `kind` each.
pub(super) unsafe fn gated(
    queue: &impl Queue,
    kind: Kind,
    activation: Activation,
    count: usize,
    [gate, up, out]: [u64; 3],
) -> Result<()> {
    let vectors = vectors(&[], &[gate, up, out]);
    let args = vec![Arg::At(gate), Arg::At(up), code(activation), Arg::Long(count as i64), vectors, Arg::At(out)];
    // SAFETY: the caller's.
    unsafe { queue.launch(eights(kind.name("gated"), count, args)) }
}

/// # Safety
/// As [`Queue::launch`]: `count` numbers of `kind` each.
pub(super) unsafe fn gated_backward(
    queue: &impl Queue,
    kind: Kind,
    activation: Activation,
    count: usize,
    [gate, up, dout, dgate, dup]: [u64; 5],
) -> Result<()> {
    let mut args = vec![Arg::At(gate), Arg::At(up), Arg::At(dout), code(activation), Arg::Long(count as i64)];
    args.extend([vectors(&[], &[gate, up, dout, dgate, dup]), Arg::At(dgate), Arg::At(dup)]);
    // SAFETY: the caller's.
    unsafe { queue.launch(eights(kind.name("gated_backward"), count, args)) }
}

/// # Safety
/// As [`Queue::launch`]: k, v: (n, width) of `kind`; n slots, u32, each a row of the caches.
pub(super) unsafe fn kv_write(
    queue: &impl Queue,
    kind: Kind,
    (n, width): (usize, usize),
    [k, v, slots, k_cache, v_cache]: [u64; 5],
) -> Result<()> {
    let mut args = vec![Arg::At(k), Arg::At(v), Arg::At(slots), Arg::Long((n * width) as i64), Arg::int(width)];
    args.extend([vectors(&[width], &[k, v, k_cache, v_cache]), Arg::At(k_cache), Arg::At(v_cache)]);
    // SAFETY: the caller's.
    unsafe { queue.launch(eights(kind.name("kv_write"), n * width, args)) }
}

/// # Safety
/// As [`Queue::launch`]: x, y: `count` numbers of `kind` each.
pub(super) unsafe fn dropout(
    queue: &impl Queue,
    kind: Kind,
    dropout: Dropout,
    count: usize,
    [x, y]: [u64; 2],
) -> Result<()> {
    let [state, limit] = [dropout.state, dropout.limit].map(|word| Arg::Long(word as i64));
    let args = vec![Arg::At(x), state, limit, Arg::Float(dropout.keep), Arg::Long(count as i64), Arg::At(y)];
    // SAFETY: the caller's.
    unsafe { queue.launch(each(kind.name("dropout"), count, args)) }
}

/// # Safety
/// As [`Queue::launch`]: `count` numbers of f32 each.
pub(super) unsafe fn adamw(
    queue: &impl Queue,
    update: AdamWUpdate,
    count: usize,
    [gradient, parameter, first, second]: [u64; 4],
) -> Result<()> {
    let AdamWUpdate { scale, first: [keep1, take1], second: [keep2, take2], inverse_root, eps, step_size, left } =
        update;
    let mut args = vec![Arg::At(gradient)];
    args.extend([scale, keep1, take1, keep2, take2, inverse_root, eps, step_size, left].map(Arg::Float));
    args.extend([Arg::Long(count as i64), Arg::At(parameter), Arg::At(first), Arg::At(second)]);
    // SAFETY: the caller's.
    unsafe { queue.launch(each(Kind::F32.name("adamw"), count, args)) }
}
