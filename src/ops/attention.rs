//! Causal attention over a flat step of several segments, with shared prefixes; forward and backward never store the `(H, N, N)`
//! matrix, unless they are composed.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Shape, Tensor};

use super::{composed, cpu, cuda};
use crate::error::{Error, Result};
use crate::kernels::cpu::{Heads, Rows, attention, attention_backward};
use crate::kernels::cuda::{self as gpu, Plan, View, Work};

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
/// positions (`pos_q − pos_k ≥ window`) is not seen. Differentiable in q, k and v.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &CausalMask,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    let (n, h, d) = q.dims3()?;
    let (_, kv, _) = k.dims3()?;
    mask.check(n)?;
    let heads = Heads { query: h, key: kv, dim: d, scale };
    if q.device().is_cpu() {
        let op = Causal { mask: mask.clone(), heads, window };
        return Ok(q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)?);
    }
    let gpu_heads = gpu::Heads { query: h, key: kv, dim: d, scale, window };
    if cuda::takes(q) && k.dtype() == q.dtype() && gpu_heads.fits() && (window.is_none() || mask.is_even()) {
        let op = OnGpu { work: mask.work(q, gpu_heads)?, heads: gpu_heads, lse: OnceLock::new() };
        return Ok(q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)?);
    }
    composed::causal([q, k, v], mask, &mask.seen(window), scale)
}

struct Causal {
    mask: CausalMask,
    heads: Heads,
    window: Option<usize>,
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

impl Causal {
    fn runs(&self) -> Vec<Run> {
        let of = |(segment, seen): (&Segment, Vec<Range<usize>>)| Run {
            start: segment.start,
            slots: segment.prefix.clone().chain(segment.start..segment.start + segment.len).collect(),
            seen,
        };
        self.mask.segments.iter().zip(self.mask.seen(self.window)).map(of).collect()
    }

    /// Ranges of segments such that no segment's prefix lies in another range.
    fn parts(&self) -> Vec<Range<usize>> {
        let (mut parts, mut end, mut reach) = (Vec::new(), self.mask.segments.len(), usize::MAX);
        for (index, segment) in self.mask.segments.iter().enumerate().rev() {
            reach = reach.min(if segment.prefix.is_empty() { segment.start } else { segment.prefix.start });
            if reach == segment.start {
                parts.push(index..end);
                (end, reach) = (index, usize::MAX);
            }
        }
        parts
    }
}

impl CustomOp3 for Causal {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (q, k, v) = (cpu::floats(s1, l1)?, cpu::floats(s2, l2)?, cpu::floats(s3, l3)?);
        let runs = self.runs();
        let rows: Vec<Rows<'_>> = runs.iter().map(Run::rows).collect();
        Ok((CpuStorage::F32(attention(self.heads, &rows, q, k, v)), l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dout = dout.contiguous()?;
        let runs = self.runs();
        let rows: Vec<Rows<'_>> = runs.iter().map(Run::rows).collect();
        let parts = self.parts();
        let parts: Vec<&[Rows<'_>]> = parts.iter().map(|part| &rows[part.clone()]).collect();
        let [dq, dk, dv] = cpu::with_floats([q, k, v, out, &dout], |[q, k, v, out, dout]| {
            Ok(attention_backward(self.heads, &parts, (q, k, v), (out, dout)))
        })?;
        Ok((Some(cpu::tensor(dq, q.shape())?), Some(cpu::tensor(dk, k.shape())?), Some(cpu::tensor(dv, v.shape())?)))
    }
}

struct OnGpu {
    work: Arc<Work>,
    heads: gpu::Heads,
    /// What the backward needs of each softmax.
    lse: OnceLock<CudaStorage>,
}

impl CustomOp3 for OnGpu {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(
        &self,
        _s1: &CpuStorage,
        _l1: &Layout,
        _s2: &CpuStorage,
        _l2: &Layout,
        _s3: &CpuStorage,
        _l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("a GPU's attention on the CPU")
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let views = [View::new(s1, l1)?, View::new(s2, l2)?, View::new(s3, l3)?];
        let (out, lse) = gpu::attention(self.heads, &self.work, views)?;
        self.lse.get_or_init(|| lse);
        Ok((out, l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(lse) = self.lse.get() else { candle_core::bail!("a backward before its forward") };
        let dout = dout.contiguous()?;
        let [dq, dk, dv] = cuda::with_views([q, k, v, out, &dout], |[q, k, v, out, dout]| {
            gpu::attention_backward(self.heads, &self.work, [q, k, v], (out, dout), lse)
        })?;
        let tensor = |storage, like: &Tensor| cuda::tensor(storage, like.shape(), like);
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}
