//! Launches of `attention.cu` and `tiles.cu`.

use candle_core::Result;

use super::launch::{Arg, Kind, Launch, Queue};

/// Threads of an attention block, and of one that has a few rows' whole lists.
const THREADS: usize = 128;
const ROW_THREADS: usize = 256;
/// Keys of a part of a list, at most and at least: short where there are few rows, so that one long sequence still fills a GPU.
const SPANS: [usize; 2] = [256, 64];
/// Blocks that fill a GPU: some for each of a large card's processors.
const BLOCKS: usize = 512;
/// Query heads whose outputs are summed at once, as `attention.cu` has it.
const HEADS: usize = 4;
/// Bytes that a block of threads may keep on every card since Ampere.
const MOST_SHARED: usize = 99 << 10;
/// Bytes of partial sums at most.
const SCRATCH: usize = 128 << 20;

/// Shape of the heads, and how far back they see.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// H.
    pub query: usize,
    /// K.
    pub key: usize,
    /// D.
    pub dim: usize,
    /// Softmax scale.
    pub scale: f32,
    /// Keys a query sees, itself the last; `None` for all.
    pub window: Option<usize>,
}

impl Heads {
    fn group(&self) -> usize {
        self.query / self.key
    }

    /// Numbers that a thread takes of a row at once.
    fn wide(&self) -> usize {
        if self.dim.is_multiple_of(8) { 8 } else { 4 }
    }

    /// Bytes that a block of threads keeps of the rows of a group, and of a part of `span` keys.
    fn shared(&self, span: usize) -> usize {
        4 * (self.group() * (self.dim + span + 2) + ROW_THREADS * HEADS * self.wide())
    }

    fn window(&self) -> Arg {
        Arg::Int(self.window.map_or(0, |window| i32::try_from(window).unwrap_or(i32::MAX)))
    }

    /// Whether there are kernels for it.
    pub fn fits(&self) -> bool {
        let grouped = self.key > 0 && self.query.is_multiple_of(self.key) && self.group() <= 64;
        let whole = self.dim.is_multiple_of(4) && self.dim <= 128 || self.dim.is_multiple_of(8) && self.dim <= 256;
        grouped && whole && self.dim > 0 && self.window != Some(0) && self.shared(SPANS[0]) <= MOST_SHARED
    }

    /// Whether the tensor cores take a forward, and a backward, in bf16.
    pub fn tiled(&self) -> [bool; 2] {
        [matches!(self.dim, 64 | 128 | 256), matches!(self.dim, 64 | 128)]
    }
}

/// Where the lists are: the table and the slots an entry of it stands for.
#[derive(Clone, Copy)]
pub(super) struct Lists {
    pub(super) table: u64,
    pub(super) size: usize,
}

/// Launches of row-by-row attention: how many rows each takes, and in how many parts of how many keys their lists are.
pub(super) struct Split {
    pub(super) span: usize,
    pub(super) parts: usize,
    pub(super) rows: usize,
}

impl Split {
    /// For `rows` queries, the longest of which sees `longest` keys: the longest parts that still make enough blocks.
    pub(super) fn new(heads: Heads, rows: usize, longest: usize) -> Self {
        let seen = heads.window.map_or(longest, |window| window.min(longest));
        let [mut span, least] = SPANS;
        while span > least && rows * heads.key * seen.div_ceil(span) < BLOCKS {
            span /= 2;
        }
        Split::of_span(heads, rows, seen, span)
    }

    /// In parts of `span` keys, for `rows` queries that see at most `seen`.
    pub(super) fn of_span(heads: Heads, rows: usize, seen: usize, span: usize) -> Self {
        let parts = seen.div_ceil(span).max(1);
        if parts == 1 {
            return Split { span, parts, rows };
        }
        let row = heads.query * parts * (heads.dim + 2) * 4;
        Split { span, parts, rows: (SCRATCH / row).clamp(1, rows.max(1)) }
    }

    /// Numbers of partial sums and of their statistics, f32.
    pub(super) fn scratch(&self, heads: Heads) -> [usize; 2] {
        if self.parts == 1 {
            return [0, 0];
        }
        let sums = self.rows * heads.query * self.parts;
        [sums * heads.dim, sums * 2]
    }
}

/// Row by row. `tasks`: where they are and how many.
///
/// # Safety
/// As [`Queue::launch`]: q, out: (N, H, D) of `kind`; k, v: slots of (K, D); tasks and lists of a [`super::Plan`] of theirs; lse: (N, H), f32,
/// or zero; scratch of [`Split::scratch`].
#[allow(clippy::too_many_arguments)] // what, where from and where to
pub(super) unsafe fn rows(
    queue: &impl Queue,
    kind: Kind,
    heads: Heads,
    (tasks, count): (u64, usize),
    lists: Lists,
    [q, k, v, out]: [u64; 4],
    (split, [partial, stats]): (&Split, [u64; 2]),
    lse: u64,
) -> Result<()> {
    let (group, dim) = (heads.group(), heads.dim);
    let wide = heads.wide();
    let lanes = dim.div_ceil(wide).next_power_of_two();
    for first in (0..count).step_by(split.rows.max(1)) {
        let some = split.rows.min(count - first);
        let tasks = Arg::At(tasks + 12 * first as u64);
        let mut args =
            vec![Arg::At(q), Arg::At(k), Arg::At(v), tasks.clone(), Arg::At(lists.table), Arg::int(lists.size)];
        args.extend([Arg::int(group), Arg::int(dim), Arg::int(lanes), Arg::Float(heads.scale), heads.window()]);
        args.extend([Arg::int(split.span), Arg::At(out), Arg::At(partial), Arg::At(stats), Arg::At(lse)]);
        let launch = Launch {
            kernel: kind.name(&format!("attend_rows_{wide}")),
            grid: [some, heads.key, split.parts],
            threads: ROW_THREADS,
            shared: heads.shared(split.span),
            args,
        };
        // SAFETY: the caller's.
        unsafe { queue.launch(launch) }?;
        if split.parts > 1 {
            let mut args = vec![Arg::At(partial), Arg::At(stats), tasks, Arg::int(split.parts), Arg::int(dim)];
            args.extend([heads.window(), Arg::int(split.span), Arg::At(out), Arg::At(lse)]);
            let (kernel, grid) = (kind.name("attend_combine"), [some, heads.query, 1]);
            // SAFETY: the caller's.
            unsafe { queue.launch(Launch { kernel, grid, threads: THREADS, shared: 0, args }) }?;
        }
    }
    Ok(())
}

/// Shared memory of `rows` rows of a tile kernel.
fn tile_bytes(rows: usize, dim: usize) -> usize {
    rows * (dim + 8) * 2
}

/// In tiles, bf16.
///
/// # Safety
/// As [`rows`].
pub(super) unsafe fn tiles(
    queue: &impl Queue,
    heads: Heads,
    (tiles, count): (u64, usize),
    lists: Lists,
    [q, k, v, out]: [u64; 4],
    lse: u64,
) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let keys = if heads.dim == 256 { 32 } else { 64 };
    let mut args = vec![Arg::At(q), Arg::At(k), Arg::At(v), Arg::At(tiles), Arg::At(lists.table), Arg::int(lists.size)];
    args.extend([Arg::int(heads.group()), Arg::Float(heads.scale), heads.window(), Arg::At(out), Arg::At(lse)]);
    let launch = Launch {
        kernel: format!("attend_tiles_{}", heads.dim),
        grid: [count, heads.query, 1],
        threads: THREADS,
        shared: tile_bytes(64 + 2 * keys, heads.dim),
        args,
    };
    // SAFETY: the caller's.
    unsafe { queue.launch(launch) }
}

/// What a backward pass reads: q, k, v, out, dout and lse, and room for Σ out·dout, (N, H), f32.
#[derive(Clone, Copy)]
pub(super) struct Saved {
    pub(super) q: u64,
    pub(super) k: u64,
    pub(super) v: u64,
    pub(super) out: u64,
    pub(super) dout: u64,
    pub(super) lse: u64,
    pub(super) pull: u64,
}

/// The work of a backward pass on the device: queries as tasks or tiles, tiles of keys, views.
#[derive(Clone, Copy)]
pub(super) struct BackWork {
    pub(super) tiled: bool,
    pub(super) queries: (u64, usize),
    pub(super) keys: (u64, usize),
    pub(super) views: u64,
}

/// Gradients in q, k and v of a step of `n` rows.
///
/// # Safety
/// As [`rows`]; `[dq, dk, dv]` as q, k and v; work of a [`super::Plan`] of theirs.
#[allow(clippy::too_many_arguments)] // as above
pub(super) unsafe fn backward(
    queue: &impl Queue,
    kind: Kind,
    heads: Heads,
    n: usize,
    work: BackWork,
    lists: Lists,
    saved: Saved,
    [dq, dk, dv]: [u64; 3],
) -> Result<()> {
    let (group, dim) = (heads.group(), heads.dim);
    let warps = |count: usize| [count.div_ceil(THREADS / 32), 1, 1];
    let args = vec![
        Arg::At(saved.out),
        Arg::At(saved.dout),
        Arg::Long((n * heads.query) as i64),
        Arg::int(dim),
        Arg::At(saved.pull),
    ];
    let pull =
        Launch { kernel: kind.name("attend_pull"), grid: warps(n * heads.query), threads: THREADS, shared: 0, args };
    let given = [saved.q, saved.k, saved.v, saved.dout, saved.lse, saved.pull].map(Arg::At);
    let ends = [Arg::Float(heads.scale), heads.window()];
    let (queries, keys) = (work.queries, work.keys);
    let (mut for_q, mut for_kv) = (given.to_vec(), given.to_vec());
    for_q.extend([Arg::At(queries.0), Arg::At(lists.table), Arg::int(lists.size)]);
    for_kv.extend([Arg::At(keys.0), Arg::At(work.views), Arg::int(group)]);
    let [mut q, mut kv] = [[queries.1, heads.query, 1], [keys.1, heads.key, 1]].map(|grid| Launch {
        kernel: String::new(),
        grid,
        threads: THREADS,
        shared: 0,
        args: Vec::new(),
    });
    if work.tiled {
        // What a tile meets is there twice: this turn's and the next one's.
        let rows = tile_bytes(2 * 64 + 2 * 2 * 32, dim);
        (q.shared, kv.shared) = (rows, rows + 2 * 2 * 32 * 4);
        (q.kernel, kv.kernel) = (format!("attend_dq_tiles_{dim}"), format!("attend_dkv_tiles_{dim}"));
        for_q.push(Arg::int(group));
    } else {
        let count = queries.1 * heads.query;
        q.grid = warps(count);
        (q.kernel, kv.kernel) = (kind.name("attend_dq"), kind.name("attend_dkv"));
        for_q.extend([Arg::Long(count as i64), Arg::int(heads.query), Arg::int(group), Arg::int(dim)]);
        for_kv.push(Arg::int(dim));
    }
    for_q.extend(ends.clone());
    for_kv.extend(ends);
    for_q.push(Arg::At(dq));
    for_kv.extend([Arg::At(dk), Arg::At(dv)]);
    (q.args, kv.args) = (for_q, for_kv);
    for launch in [pull, q, kv] {
        // SAFETY: the caller's.
        unsafe { queue.launch(launch) }?;
    }
    Ok(())
}
