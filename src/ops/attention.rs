//! Causal attention over a flat step of several segments, with shared prefixes; forward and backward never store the `(H, N, N)`
//! matrix, unless they are composed.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::{composed, cpu, cuda, tape};
use crate::error::{Error, Result};
use crate::kernels::cpu::{Heads, Rows, attention, attention_backward};
use crate::kernels::cuda::{self as gpu, Plan, Work};

/// One run of tokens: each sees all of `prefix` (an earlier run of the same step) and, causally, its own run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First token of the run, as a row of the flat step.
    pub start: usize,
    /// Tokens in the run.
    pub len: usize,
    /// Rows every token of the run also sees; empty for none.
    pub prefix: Range<usize>,
}

/// Who sees whom in a flat training step, and every token's position (the sliding window counts positions).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CausalMask {
    /// Runs that cover rows `0..N` in order.
    pub segments: Vec<Segment>,
    /// Position of each row, (N).
    pub positions: Vec<u32>,
    /// What a GPU's kernels need of it, uploaded with the first layer: the mask is not changed after that.
    work: cuda::Once<Arc<Work>>,
}

impl CausalMask {
    /// A mask of `segments` and `positions`; both may grow until it is used.
    pub fn new(segments: Vec<Segment>, positions: Vec<u32>) -> Self {
        CausalMask { segments, positions, work: cuda::Once::default() }
    }

    /// Whether positions go up by one along what each row sees, so that a window counts keys.
    fn is_even(&self) -> bool {
        self.segments.iter().filter(|segment| segment.len > 0).all(|segment| {
            let rows: Vec<usize> = segment.prefix.clone().chain(segment.start..segment.start + segment.len).collect();
            rows.windows(2).all(|two| self.positions[two[1]] == self.positions[two[0]] + 1)
        })
    }

    /// For queries like `q`, (N, H, D).
    fn work(&self, q: &Tensor, heads: gpu::Heads) -> candle_core::Result<Arc<Work>> {
        let make = || {
            let segments: Vec<_> =
                self.segments.iter().map(|segment| (segment.start, segment.len, segment.prefix.clone())).collect();
            let tiled = heads.tiled().map(|tiled| tiled && q.dtype() == DType::BF16);
            Ok(Arc::new(Work::new(&Plan::step(&segments, tiled), cuda::device_of(q)?)?))
        };
        self.work.get(make).cloned()
    }

    /// Rows that row `row` sees, in order: a tail of its prefix, then a tail of its own run. Positions grow along both, so the
    /// window cuts at their beginnings.
    fn visible(&self, segment: &Segment, row: usize, window: Option<usize>) -> (Range<usize>, Range<usize>) {
        let position = self.positions[row] as usize;
        let cut = |rows: Range<usize>| match window {
            None => rows,
            Some(window) => {
                let seen = self.positions[rows.clone()].partition_point(|key| position - *key as usize >= window);
                rows.start + seen..rows.end
            }
        };
        (cut(segment.prefix.clone()), cut(segment.start..row + 1))
    }

    /// For each segment, what each of its rows sees of the segment's keys: its prefix, then its own run.
    pub(super) fn seen(&self, window: Option<usize>) -> Vec<Vec<Range<usize>>> {
        let of = |segment: &Segment| {
            let seen = |row: usize| {
                let (prefix, own) = self.visible(segment, row, window);
                let end = segment.prefix.len() + row + 1 - segment.start;
                end - prefix.len() - own.len()..end
            };
            (segment.start..segment.start + segment.len).map(seen).collect()
        };
        self.segments.iter().map(of).collect()
    }

    fn check(&self, rows: usize) -> Result<()> {
        let covered = self.segments.iter().try_fold(0, |at, segment| {
            (segment.start == at && segment.prefix.end <= segment.start.max(segment.prefix.start))
                .then_some(at + segment.len)
        });
        if covered == Some(rows) && self.positions.len() == rows {
            return Ok(());
        }
        Err(Error::internal(format!("an attention mask does not cover its {rows} rows in order")))
    }
}

/// Softmax attention under `mask`. q: (N, H, D); k, v: (N, K, D) with `H % K == 0` → (N, H, D). A key further back than `window`
/// positions (`pos_q − pos_k ≥ window`) is not seen. Differentiable in q, k and v; `products` is the dtype that a CPU rounds all
/// products of the gradients to but those of the weights, if it can: that of [`super::FrozenLinear::low_rank_dtype`] beside it.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &CausalMask,
    scale: f32,
    window: Option<usize>,
    products: DType,
) -> Result<Tensor> {
    let (n, h, d) = q.dims3()?;
    let (_, kv, _) = k.dims3()?;
    mask.check(n)?;
    let heads = Heads { query: h, key: kv, dim: d, scale };
    let gpu_heads = gpu::Heads { query: h, key: kv, dim: d, scale, window };
    let ids = [q.id(), k.id(), v.id()];
    let on_gpu = cuda::takes(q) && k.dtype() == q.dtype() && gpu_heads.fits() && (window.is_none() || mask.is_even());
    if !q.device().is_cpu() && !on_gpu {
        return tape::composed([q, k, v], |inputs| composed::causal(inputs, mask, &mask.seen(window), scale));
    }
    let plain = [q.contiguous()?, k.contiguous()?, v.contiguous()?];
    let inputs = plain.each_ref();
    let work = on_gpu.then(|| mask.work(&plain[0], gpu_heads)).transpose()?;
    let runs = if on_gpu { Vec::new() } else { runs(mask, window) };
    // The output, and of the softmaxes what the way back makes them of.
    let [out, softmax] = tape::dear(|| match &work {
        Some(work) => {
            let (out, lse) = cuda::with_views(inputs, |inputs| gpu::attention(gpu_heads, work, inputs))?;
            Ok([cuda::tensor(out, q.shape(), q)?, cuda::tensor(lse, (n, h), q)?])
        }
        None => {
            let rows: Vec<Rows<'_>> = runs.iter().map(Run::rows).collect();
            let [out, softmax] = cpu::with_floats(inputs, |[q, k, v]| Ok(attention(heads, &rows, q, k, v)))?;
            Ok([cpu::tensor(out, q.shape())?, cpu::tensor(softmax, (n, h, 2))?])
        }
    })?;
    let kept = [&plain[0], &plain[1], &plain[2], &out, &softmax].map(Tensor::clone);
    let parts = parts(mask);
    tape::push(&[q, k, v], &out, &kept.clone().each_ref(), move |dout, gradients| {
        let dout = dout.tensor.contiguous()?;
        let given = [&kept[0], &kept[1], &kept[2], &kept[3], &kept[4], &dout];
        let likes = ids.into_iter().zip(&kept);
        match &work {
            Some(work) => {
                let found = cuda::with_views(given, |[q, k, v, out, lse, dout]| {
                    gpu::attention_backward(gpu_heads, work, [q, k, v], (out, dout), lse)
                })?;
                for ((id, like), found) in likes.zip(found) {
                    gradients.add(id, cuda::tensor(found, like.shape(), like)?)?;
                }
            }
            None => {
                let rows: Vec<Rows<'_>> = runs.iter().map(Run::rows).collect();
                let parts: Vec<&[Rows<'_>]> = parts.iter().map(|part| &rows[part.clone()]).collect();
                let found = cpu::with_floats(given, |[q, k, v, out, softmax, dout]| {
                    Ok(attention_backward(heads, &parts, (q, k, v), ([out, softmax], dout), products == DType::BF16))
                })?;
                for ((id, like), found) in likes.zip(found) {
                    gradients.add(id, cpu::tensor(found, like.shape())?)?;
                }
            }
        }
        Ok(())
    });
    Ok(out)
}

/// A segment's keys in order, and what each of its rows sees of them.
struct Run {
    start: usize,
    slots: Vec<usize>,
    seen: Vec<Range<usize>>,
}

impl Run {
    fn rows(&self) -> Rows<'_> {
        Rows { start: self.start, slots: &self.slots, seen: self.seen.clone() }
    }
}

fn runs(mask: &CausalMask, window: Option<usize>) -> Vec<Run> {
    let of = |(segment, seen): (&Segment, Vec<Range<usize>>)| Run {
        start: segment.start,
        slots: segment.prefix.clone().chain(segment.start..segment.start + segment.len).collect(),
        seen,
    };
    mask.segments.iter().zip(mask.seen(window)).map(of).collect()
}

/// Ranges of segments such that no segment's prefix lies in another range.
fn parts(mask: &CausalMask) -> Vec<Range<usize>> {
    let (mut parts, mut end, mut reach) = (Vec::new(), mask.segments.len(), usize::MAX);
    for (index, segment) in mask.segments.iter().enumerate().rev() {
        reach = reach.min(if segment.prefix.is_empty() { segment.start } else { segment.prefix.start });
        if reach == segment.start {
            parts.push(index..end);
            (end, reach) = (index, usize::MAX);
        }
    }
    parts
}
