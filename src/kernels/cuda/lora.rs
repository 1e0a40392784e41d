//! Launches of `lora.cu`.

use candle_core::Result;

use super::launch::{Arg, Kind, Launch, Queue, WORDS};

const THREADS: usize = 128;
/// Rows of a block, and rows of A that it has, as `lora.cu` has them.
const ROWS: usize = 8;
const RANKS: usize = 4;
/// Words of a part, and parts of a launch, as `lora.cu` has them.
const PART: usize = 5;
const PARTS: usize = WORDS / PART;
/// Largest rank there is room for in shared memory.
pub const MOST_RANK: usize = 1024;

/// Rows of one product that one adapter has. a: (rank, c); b: (out, rank); y: (n, out), of which the rows begin at `first`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) y: u64,
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) rank: usize,
    pub(super) out: usize,
}

impl Part {
    fn words(&self) -> [u64; PART] {
        let pair = |low: usize, high: usize| {
            let word =
                |value| u64::from(u32::try_from(value).expect("a size of one step fits 32 bits. This is a bug."));
            word(low) | word(high) << 32
        };
        [self.a, self.b, self.y, pair(self.first, self.rows), pair(self.rank, self.out)]
    }
}

/// Row blocks, the largest rank and the most outputs.
fn extents(parts: &[Part]) -> [usize; 3] {
    let most = |of: fn(&Part) -> usize| parts.iter().map(of).max().unwrap_or(0);
    [parts.iter().map(|part| part.rows.div_ceil(ROWS)).sum(), most(|part| part.rank), most(|part| part.out)]
}

/// Numbers between the two products, f32.
pub(super) fn scratch(parts: &[Part]) -> usize {
    parts.chunks(PARTS).map(extents).map(|[blocks, rank, _]| blocks * ROWS * rank).max().unwrap_or(0)
}

/// `y += x·Aᵀ·Bᵀ` in the rows of every part: two launches for as many as 64.
///
/// # Safety
/// As [`Queue::launch`]: x: (n, c) of `kind`; parts of the same numbers, of ranks to [`MOST_RANK`], whose rows x and y have; no row of
/// a y in two; low: [`scratch`] numbers, f32.
pub(super) unsafe fn add(queue: &impl Queue, kind: Kind, c: usize, x: u64, parts: &[Part], low: u64) -> Result<()> {
    let aligned = parts.iter().all(|part| (part.a | part.b | x).is_multiple_of(16)) && c.is_multiple_of(4);
    let vectors = Arg::Int(i32::from(aligned));
    for parts in parts.chunks(PARTS) {
        let [blocks, rank, out] = extents(parts);
        let mut table = Box::new([0; WORDS]);
        parts.iter().zip(table.chunks_exact_mut(PART)).for_each(|(part, words)| words.copy_from_slice(&part.words()));
        let table = Arg::Table(table);
        let (most, low) = (Arg::int(rank), Arg::At(low));
        let args = vec![Arg::At(x), Arg::int(c), most.clone(), vectors.clone(), low.clone(), table.clone()];
        let down = Launch {
            kernel: kind.name("lora_down"),
            grid: [blocks, rank.div_ceil(RANKS), 1],
            threads: THREADS,
            shared: THREADS / 32 * RANKS * ROWS * 4,
            args,
        };
        let up = Launch {
            kernel: kind.name("lora_up"),
            grid: [blocks, out.div_ceil(THREADS), 1],
            threads: THREADS,
            shared: rank * ROWS * 4,
            args: vec![low, most, vectors.clone(), table],
        };
        for launch in [down, up] {
            // SAFETY: the caller's.
            unsafe { queue.launch(launch) }?;
        }
    }
    Ok(())
}
