//! Attention over a paged cache and over a step, row by row and in tiles, and its gradients.

use std::ops::Range;

use super::super::attention::{self, BackWork, Heads, Lists, Saved, Split};
use super::super::launch::Kind;
use super::super::plan::Plan;
use super::{Array, KINDS, assert_near, device, given, queue};
use crate::kernels::cpu;

/// What a number may be off by, as a share of the largest: in bf16 the weights of a softmax are rounded too.
fn tolerance(kind: Kind) -> f32 {
    if kind == Kind::F32 { 1e-5 } else { 8e-3 }
}

struct Forward {
    out: Array,
    lse: Array,
}

/// Runs a plan.
fn forward(plan: &Plan, kind: Kind, heads: Heads, n: usize, qkv: [&Array; 3]) -> Forward {
    run(plan, kind, heads, n, qkv, &Split::new(heads, plan.rows.len() / 3, plan.longest))
}

fn run(plan: &Plan, kind: Kind, heads: Heads, n: usize, [q, k, v]: [&Array; 3], split: &Split) -> Forward {
    let queue = queue().unwrap();
    let (out, lse) = (Array::blank(kind, n * heads.query * heads.dim), Array::blank(Kind::F32, n * heads.query));
    let [table, rows, tiles] = [&plan.table, &plan.rows, &plan.tiles].map(|words| Array::of_ids(words));
    let lists = Lists { table: table.at(), size: plan.size };
    let [partial, stats] = split.scratch(heads).map(|len| Array::blank(Kind::F32, len));
    let places = [q.at(), k.at(), v.at(), out.at()];
    // SAFETY: the arrays have the sizes of the plan.
    unsafe {
        let scratch = (split, [partial.at(), stats.at()]);
        attention::rows(queue, kind, heads, (rows.at(), plan.rows.len() / 3), lists, places, scratch, lse.at())
            .unwrap();
        attention::tiles(queue, heads, (tiles.at(), plan.tiles.len() / 4), lists, places, lse.at()).unwrap();
    }
    partial.bytes();
    stats.bytes();
    Forward { out, lse }
}

fn cpu_heads(heads: Heads) -> cpu::Heads {
    cpu::Heads { query: heads.query, key: heads.key, dim: heads.dim, scale: heads.scale }
}

fn seen(end: usize, window: Option<usize>) -> Range<usize> {
    window.map_or(0, |window| end.saturating_sub(window))..end
}

/// Slots of a block, and rows and keys of a sequence with the number of its first block.
const SIZE: usize = 16;
type Sequence = (usize, usize, usize);

/// Sequences over a cache of `blocks`, beside their twin.
fn check_paged(blocks: usize, sequences: &[Sequence], heads: Heads, kind: Kind, tiled: bool) {
    let Heads { query, key, dim, window, .. } = heads;
    assert!(heads.fits());
    let slots = blocks * SIZE;
    let block = |from: usize, count: usize| (0..count).map(|at| ((from + at * 7) % blocks) as u32).collect();
    let mut n = 0;
    let sequences: Vec<(usize, usize, usize, Vec<u32>)> = sequences
        .iter()
        .map(|(len, context, from)| {
            n += len;
            (n - len, *len, *context, block(*from, context.div_ceil(SIZE)))
        })
        .collect();
    let (q, qs) = given(kind, n * query * dim, 1);
    let ((k, ks), (v, vs)) = (given(kind, slots * key * dim, 2), given(kind, slots * key * dim, 3));
    let plan = Plan::paged(SIZE, sequences.iter().map(|(a, b, c, d)| (*a, *b, *c, d.as_slice())), tiled);
    assert_eq!(plan.tiles.is_empty(), !tiled);
    let found = forward(&plan, kind, heads, n, [&q, &k, &v]);
    let lists: Vec<Vec<usize>> = sequences
        .iter()
        .map(|(_, _, context, blocks)| (0..*context).map(|at| blocks[at / SIZE] as usize * SIZE + at % SIZE).collect())
        .collect();
    let rows: Vec<cpu::Rows<'_>> = sequences
        .iter()
        .zip(&lists)
        .map(|((start, len, context, _), slots)| cpu::Rows {
            start: *start,
            slots,
            seen: (0..*len).map(|row| seen(context - len + row + 1, window)).collect(),
        })
        .collect();
    let [wanted, _] = cpu::attention(cpu_heads(heads), &rows, &qs, &ks, &vs);
    assert_near(&format!("{heads:?} {kind:?} {tiled}"), &found.out, &wanted, tolerance(kind));
}

/// A decode step, a chunk of a prompt, a whole prompt of more than a tile, a decode step whose keys are in several parts.
const SEQUENCES: [Sequence; 5] = [(1, 37, 3), (9, 40, 1), (70, 70, 5), (1, 600, 2), (1, 1, 0)];

#[test]
fn over_a_paged_cache() {
    if queue().is_none() {
        return;
    }
    for (query, key, dim) in [(4, 4, 16), (6, 2, 12), (6, 2, 64), (5, 1, 256), (8, 2, 128)] {
        for (kind, tiled) in [(Kind::F32, false), (Kind::Bf16, false), (Kind::Bf16, true)] {
            for window in [None, Some(33)] {
                let heads = Heads { query, key, dim, scale: 0.2, window };
                if tiled && !heads.tiled()[0] || dim > 64 && kind == Kind::Bf16 && !tiled {
                    continue;
                }
                check_paged(64, &SEQUENCES, heads, kind, tiled);
            }
        }
    }
}

/// Few rows have short parts, many have long ones, and a list that fits one has one.
#[test]
fn parts_are_as_long_as_fills_a_gpu() {
    let of = |rows, longest, window| {
        let heads = Heads { query: 32, key: 8, dim: 128, scale: 0.2, window };
        let Split { span, parts, rows } = Split::new(heads, rows, longest);
        (span, parts, rows)
    };
    assert_eq!(of(1, 300, None), (64, 5, 1));
    assert_eq!(of(1, 4096, None), (64, 64, 1));
    assert_eq!(of(4, 2000, None), (128, 16, 4));
    assert_eq!(of(64, 2000, None), (256, 8, 64));
    assert_eq!(of(64, 200, None), (256, 1, 64));
    assert_eq!(of(1, 4000, Some(100)), (64, 2, 1));
    assert_eq!(of(1, 20, None), (64, 1, 1));
    // No more at once than there is room for partial sums.
    let (_, parts, rows) = of(1000, 128_000, None);
    assert!(parts == 500 && rows * 32 * parts * 130 * 4 <= 128 << 20, "{rows} rows");
}

/// Lists that end in a part, at its border and before the last one, whatever the parts' length.
#[test]
fn parts_of_any_length_are_put_together() {
    if queue().is_none() {
        return;
    }
    let segments: [Segment; 3] = [(0, 1, 0..0), (1, 3, 0..1), (4, 76, 0..1)];
    let n = 80;
    for (kind, window) in [(Kind::F32, None), (Kind::F32, Some(50)), (Kind::Bf16, None)] {
        let heads = Heads { query: 4, key: 2, dim: 16, scale: 0.2, window };
        let [q, k, v] = [(4, 1), (2, 2), (2, 3)].map(|(heads, seed)| given(kind, n * heads * 16, seed).0);
        let plan = Plan::step(&segments, [false, false]);
        let seen = window.unwrap_or(usize::MAX).min(plan.longest);
        let [whole, parts @ ..] = [256, 128, 64, 32].map(|span| {
            let split = Split::of_span(heads, n, seen, span);
            run(&plan, kind, heads, n, [&q, &k, &v], &split)
        });
        for part in &parts {
            // Sums that differ in their last bit may be rounded to neighbours in bf16.
            let most = if kind == Kind::F32 { 2e-6 } else { 1e-3 };
            assert_near("sums", &part.out, &whole.out.numbers(), most);
            assert_near("logarithms", &part.lse, &whole.lse.numbers(), 2e-6);
        }
        // Some rows at a time, as where there is little room.
        let few = Split { rows: 50, ..Split::of_span(heads, n, seen, 32) };
        let found = run(&plan, kind, heads, n, [&q, &k, &v], &few);
        assert!(found.out.bytes() == parts[2].out.bytes() && found.lse.bytes() == parts[2].lse.bytes());
    }
}

/// Llama 3's heads over 2,000 keys, one sequence and many: too slow for the emulation.
#[test]
fn over_a_long_cache_on_a_gpu() {
    if device().is_none() {
        return;
    }
    let heads = Heads { query: 32, key: 8, dim: 128, scale: 0.2, window: None };
    let many: Vec<Sequence> = (0..64).map(|at| (1, 1500 + 16 * at, at)).collect();
    for kind in KINDS {
        check_paged(256, &[(1, 2000, 0)], heads, kind, false);
        check_paged(256, &many, heads, kind, false);
    }
    check_paged(256, &[(1, 2000, 0), (300, 900, 3), (1, 40, 2)], heads, Kind::Bf16, true);
}

/// Segments of a training step: first row, rows, the prefix they also see.
type Segment = (usize, usize, Range<usize>);

/// Prompts that answers share, one longer than a tile; a run of its own; an empty one.
fn segments() -> Vec<Segment> {
    vec![(0, 70, 0..0), (70, 40, 0..70), (110, 3, 0..70), (113, 0, 0..70), (113, 21, 0..0), (134, 10, 113..134)]
}

/// A step forward and back, beside its twin. `first`: how many of the segments with rows no later one's prefix lies in.
fn check_step(segments: &[Segment], first: usize, heads: Heads, kind: Kind, tiled: bool) {
    let queue = queue().unwrap();
    let Heads { query, key, dim, window, .. } = heads;
    let n: usize = segments.iter().map(|(_, len, _)| len).sum();
    let ((q, qs), (dout, _)) = (given(kind, n * query * dim, 1), given(kind, n * query * dim, 4));
    let ((k, ks), (v, vs)) = (given(kind, n * key * dim, 2), given(kind, n * key * dim, 3));
    let plan = Plan::step(segments, [tiled, tiled]);
    let found = forward(&plan, kind, heads, n, [&q, &k, &v]);
    let slots: Vec<Vec<usize>> =
        segments.iter().map(|(start, len, prefix)| prefix.clone().chain(*start..start + len).collect()).collect();
    let rows: Vec<cpu::Rows<'_>> = segments
        .iter()
        .zip(&slots)
        .map(|((start, len, prefix), slots)| cpu::Rows {
            start: *start,
            slots,
            seen: (0..*len).map(|row| seen(prefix.len() + row + 1, window)).collect(),
        })
        .filter(|rows| !rows.seen.is_empty())
        .collect();
    let what = format!("{heads:?} {kind:?} {tiled}");
    let [wanted, softmax] = cpu::attention(cpu_heads(heads), &rows, &qs, &ks, &vs);
    assert_near(&what, &found.out, &wanted, tolerance(kind));
    assert!(found.lse.numbers().iter().all(|value| value.is_finite()), "{what}");

    let back = plan.back.as_ref().unwrap();
    let [table, queries, key_tiles, views] =
        [&plan.table, &back.queries, &back.key_tiles, &back.views].map(|words| Array::of_ids(words));
    assert_eq!((back.tiled, plan.tiles.is_empty()), (tiled, !tiled));
    let pull = Array::blank(Kind::F32, n * query);
    let [dq, dk, dv] = [query, key, key].map(|heads| Array::blank(kind, n * heads * dim));
    let work = BackWork {
        tiled,
        queries: (queries.at(), back.count()),
        keys: (key_tiles.at(), back.key_tiles.len() / 4),
        views: views.at(),
    };
    let saved = Saved {
        q: q.at(),
        k: k.at(),
        v: v.at(),
        out: found.out.at(),
        dout: dout.at(),
        lse: found.lse.at(),
        pull: pull.at(),
    };
    let lists = Lists { table: table.at(), size: 1 };
    let to = [dq.at(), dk.at(), dv.at()];
    // SAFETY: the arrays have the sizes of the plan.
    unsafe { attention::backward(queue, kind, heads, n, work, lists, saved, to) }.unwrap();
    let douts = dout.numbers();
    let (first, second) = rows.split_at(first);
    let (parts, made) = ([first, second], [&wanted[..], &softmax]);
    let wanted = cpu::attention_backward(cpu_heads(heads), &parts, (&qs, &ks, &vs), (made, &douts), false);
    for ((name, got), wanted) in [("dq", &dq), ("dk", &dk), ("dv", &dv)].into_iter().zip(&wanted) {
        assert_near(&format!("{name} of {what}"), got, wanted, 2.0 * tolerance(kind));
    }
}

#[test]
fn over_a_step_and_back() {
    if queue().is_none() {
        return;
    }
    for (query, key, dim) in [(6, 2, 12), (2, 1, 64), (2, 1, 128), (1, 1, 256)] {
        for (kind, tiled) in [(Kind::F32, false), (Kind::Bf16, false), (Kind::Bf16, true)] {
            for window in [None, Some(20)] {
                let heads = Heads { query, key, dim, scale: 0.2, window };
                let rare = dim > 64 && (window.is_none() || (kind == Kind::Bf16) != tiled && dim == 128);
                if tiled && !heads.tiled()[1] || rare {
                    continue;
                }
                check_step(&segments(), 3, heads, kind, tiled);
            }
        }
    }
}

/// Heads of 128 in groups of 4 over several tiles: too slow for the emulation.
#[test]
fn over_a_step_of_several_tiles_and_back_on_a_gpu() {
    if device().is_none() {
        return;
    }
    let segments = [(0, 310, 0..0), (310, 170, 0..310), (480, 90, 0..310), (570, 130, 0..0), (700, 65, 570..700)];
    for (window, kind, tiled) in
        [(None, Kind::Bf16, true), (Some(150), Kind::Bf16, true), (None, Kind::Bf16, false), (None, Kind::F32, false)]
    {
        check_step(&segments, 3, Heads { query: 8, key: 2, dim: 128, scale: 0.2, window }, kind, tiled);
    }
}
