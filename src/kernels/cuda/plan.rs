//! Which block of an attention kernel does what: laid out on the host once a step, for all layers and heads.

use std::ops::Range;

/// Rows of a tile, as `tiles.cu` has them.
const TILE: usize = 64;
/// Runs up to this long are computed row by row: a tile would be all but empty.
const SHORT: usize = 8;

/// One run of consecutive queries, each seeing one key more than the one before it.
struct Run {
    start: usize,
    len: usize,
    /// Where its keys begin in the table, in entries of the table.
    list: usize,
    /// Keys that its first row sees.
    end: usize,
}

/// The work of one step. Its runs cover the rows in order.
pub struct Plan {
    /// Slots that a table entry stands for.
    pub(super) size: usize,
    pub(super) table: Vec<u32>,
    /// Queries computed one by one: row, list, end.
    pub(super) rows: Vec<u32>,
    /// Queries computed in tiles: first row, rows, list, end of the first.
    pub(super) tiles: Vec<u32>,
    /// Most keys that one of `rows` sees.
    pub(super) longest: usize,
    /// Queries of both kinds, which are rows 0.. of the step.
    pub(super) queries: usize,
    /// The backward pass, where there is one.
    pub(super) back: Option<Back>,
}

/// The work of a step's backward pass.
pub(super) struct Back {
    /// In tiles, or else row by row.
    pub(super) tiled: bool,
    /// All queries, as [`Plan::tiles`] or as [`Plan::rows`].
    pub(super) queries: Vec<u32>,
    /// Keys: first row, rows, first view, views.
    pub(super) key_tiles: Vec<u32>,
    /// Who sees a tile of keys: first row and rows of a run, the tile's first entry in its list, entries before the run's own rows.
    pub(super) views: Vec<u32>,
}

fn word(value: usize) -> u32 {
    u32::try_from(value).expect("a row or slot of one step fits 32 bits. This is a bug.")
}

impl Back {
    /// Tasks or tiles of [`Back::queries`].
    pub(super) fn count(&self) -> usize {
        self.queries.len() / if self.tiled { 4 } else { 3 }
    }
}

impl Plan {
    fn new(size: usize, table: Vec<u32>, runs: &[Run], tiled: bool) -> Self {
        let mut plan = Plan { size, table, rows: Vec::new(), tiles: Vec::new(), longest: 0, queries: 0, back: None };
        for run in runs {
            assert_eq!(run.start, plan.queries, "runs out of order. This is a bug.");
            plan.queries += run.len;
            if tiled && run.len > SHORT {
                plan.tiles.extend(in_tiles(run));
            } else {
                plan.rows.extend(one_by_one(run));
                plan.longest = plan.longest.max(run.end + run.len - 1);
            }
        }
        plan
    }

    /// Queries over a paged cache. sequences: first row, rows, keys with the new ones, blocks. `tiled`: long runs go to the tensor cores.
    pub fn paged<'a>(
        block_size: usize,
        sequences: impl Iterator<Item = (usize, usize, usize, &'a [u32])>,
        tiled: bool,
    ) -> Self {
        let (mut table, mut runs) = (Vec::new(), Vec::new());
        for (start, len, context, blocks) in sequences.filter(|(_, len, ..)| *len > 0) {
            runs.push(Run { start, len, list: table.len(), end: context - len + 1 });
            table.extend_from_slice(blocks);
        }
        Plan::new(block_size, table, &runs, tiled)
    }

    /// A training step of segments: first row, rows, the prefix they also see. `tiled` says whether the forward's, and the backward's,
    /// runs go to the tensor cores.
    pub fn step(segments: &[(usize, usize, Range<usize>)], tiled: [bool; 2]) -> Self {
        let (mut table, mut runs) = (Vec::new(), Vec::new());
        for (start, len, prefix) in segments.iter().filter(|(_, len, _)| *len > 0) {
            runs.push(Run { start: *start, len: *len, list: table.len(), end: prefix.len() + 1 });
            table.extend(prefix.clone().chain(*start..start + len).map(word));
        }
        let mut plan = Plan::new(1, table, &runs, tiled[0]);
        let queries = match tiled[1] {
            true => runs.iter().flat_map(in_tiles).collect(),
            false => runs.iter().flat_map(one_by_one).collect(),
        };
        let (key_tiles, views) = views(segments);
        plan.back = Some(Back { tiled: tiled[1], queries, key_tiles, views });
        plan
    }
}

fn in_tiles(run: &Run) -> impl Iterator<Item = u32> {
    let of = |at: usize| [run.start + at, TILE.min(run.len - at), run.list, run.end + at].map(word);
    (0..run.len).step_by(TILE).flat_map(of)
}

fn one_by_one(run: &Run) -> impl Iterator<Item = u32> {
    (0..run.len).flat_map(|at| [run.start + at, run.list, run.end + at].map(word))
}

/// Tiles of keys that the same runs see whole, and those runs.
fn views(segments: &[(usize, usize, Range<usize>)]) -> (Vec<u32>, Vec<u32>) {
    let (mut tiles, mut views) = (Vec::new(), Vec::new());
    for (start, len, _) in segments {
        let inside = start..&(start + len);
        let mut cuts: Vec<usize> = segments
            .iter()
            .flat_map(|(_, _, prefix)| [prefix.start, prefix.end])
            .filter(|cut| inside.contains(&cut))
            .collect();
        cuts.extend([*start, start + len]);
        cuts.sort_unstable();
        cuts.dedup();
        for part in cuts.windows(2) {
            for first in (part[0]..part[1]).step_by(TILE) {
                let rows = TILE.min(part[1] - first);
                let before = views.len() / 4;
                for (run, len, prefix) in segments.iter().filter(|(_, len, _)| *len > 0) {
                    let entry = if run == start {
                        prefix.len() + first - run
                    } else if prefix.contains(&first) {
                        first - prefix.start
                    } else {
                        continue;
                    };
                    views.extend([*run, *len, entry, prefix.len()].map(word));
                }
                tiles.extend([first, rows, before, views.len() / 4 - before].map(word));
            }
        }
    }
    (tiles, views)
}
