//! Attention over the paged key/value cache. Forward only: a tensor that records a graph is an error.

use std::ops::Range;

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Tensor};

use super::{composed, cpu, cuda, tape};
use crate::error::{Error, Result};
use crate::kernels::cpu::{Heads, Rows, attention};
use crate::kernels::cuda::{self as gpu, Plan, Work};

/// One layer's cache. k, v: (blocks, block_size, K, D).
#[derive(Clone, Debug)]
pub struct KvLayer {
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

/// One sequence's part of a flat step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagedSequence {
    /// First row of the sequence in the step.
    pub start: usize,
    /// New tokens of the sequence in this step.
    pub len: usize,
    /// Tokens in the cache once this step is written, the new ones included; row `start + i` sees the first `context - len + i + 1`.
    pub context: usize,
    /// The sequence's blocks, in order.
    pub blocks: Vec<u32>,
}

impl PagedSequence {
    /// Cached tokens that the new token `row` sees, itself the last.
    pub(super) fn seen(&self, row: usize, window: Option<usize>) -> Range<usize> {
        let end = self.context - self.len + row + 1;
        window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// Where a flat step's tokens live in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagedBatch {
    /// Tokens a block holds.
    pub block_size: usize,
    /// Flat cache slot (`block · block_size + offset`) each row is written to, (N).
    pub slots: Vec<u32>,
    /// The sequences, covering rows `0..N` in order.
    pub sequences: Vec<PagedSequence>,
    /// What a GPU's kernels need of it, uploaded with the first layer: the batch is not changed after that.
    uploaded: cuda::Once<Uploaded>,
}

struct Uploaded {
    work: Work,
    /// (N), u32.
    slots: Tensor,
}

impl PagedBatch {
    /// A batch of `slots` and the `sequences` they belong to; both may grow until it is used.
    pub fn new(block_size: usize, slots: Vec<u32>, sequences: Vec<PagedSequence>) -> Self {
        PagedBatch { block_size, slots, sequences, uploaded: cuda::Once::default() }
    }

    /// For queries like `q`, (N, H, D).
    fn uploaded(&self, like: &Tensor, heads: gpu::Heads) -> candle_core::Result<&Uploaded> {
        self.uploaded.get(|| {
            let sequences = self.sequences.iter().map(|one| (one.start, one.len, one.context, one.blocks.as_slice()));
            let plan = Plan::paged(self.block_size, sequences, like.dtype() == DType::BF16 && heads.tiled()[0]);
            let work = Work::new(&plan, cuda::device_of(like)?)?;
            Ok(Uploaded { work, slots: Tensor::new(self.slots.as_slice(), like.device())? })
        })
    }
}

fn refuse_graph(tensors: &[&Tensor]) -> Result<()> {
    if tape::tracked(tensors) {
        return Err(Error::internal("the paged cache is forward only: it would cut the gradient. This is a bug."));
    }
    Ok(())
}

/// Writes k, v: (N, K, D) into the cache in place at `batch.slots`.
pub fn kv_write(cache: &KvLayer, k: &Tensor, v: &Tensor, batch: &PagedBatch) -> Result<()> {
    refuse_graph(&[k, v])?;
    if cuda::takes(k) && k.dtype() == cache.k.dtype() {
        return gpu_write(cache, &k.contiguous()?, &v.contiguous()?, batch);
    }
    for (cache, new) in [(&cache.k, k), (&cache.v, v)] {
        let new = new.contiguous()?;
        if new.device().is_cpu() {
            cache.inplace_op2(&new, &WriteSlots { slots: &batch.slots })?;
            continue;
        }
        let (blocks, size, kv, d) = cache.dims4()?;
        let slots = Tensor::new(batch.slots.as_slice(), new.device())?;
        let index = slots.unsqueeze(1)?.broadcast_as((batch.slots.len(), kv * d))?.contiguous()?;
        // A reshape of a contiguous tensor shares its storage, so this writes the cache itself.
        cache.reshape((blocks * size, kv * d))?.scatter_set(&index, &new.reshape((batch.slots.len(), kv * d))?, 0)?;
    }
    Ok(())
}

fn gpu_write(cache: &KvLayer, k: &Tensor, v: &Tensor, batch: &PagedBatch) -> Result<()> {
    let (blocks, size, kv, dim) = cache.k.dims4()?;
    if batch.slots.iter().any(|slot| *slot as usize >= blocks * size) || batch.slots.len() != k.dim(0)? {
        return Err(Error::internal("the slots of a step are not rows of the cache. This is a bug."));
    }
    let heads = gpu::Heads { query: kv, key: kv, dim, scale: 1.0, window: None };
    let slots = &batch.uploaded(k, heads)?.slots;
    Ok(cuda::with_views([k, v, slots, &cache.k, &cache.v], |[k, v, slots, k_cache, v_cache]| {
        gpu::kv_write([k, v], slots, [k_cache, v_cache])
    })?)
}

struct WriteSlots<'a> {
    slots: &'a [u32],
}

impl InplaceOp2 for WriteSlots<'_> {
    fn name(&self) -> &'static str {
        "kv-write"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        layout: &Layout,
        new: &CpuStorage,
        new_layout: &Layout,
    ) -> candle_core::Result<()> {
        let new = cpu::floats(new, new_layout)?;
        let width = new.len() / self.slots.len().max(1);
        let (CpuStorage::F32(cache), Some((start, end))) = (cache, layout.contiguous_offsets()) else {
            candle_core::bail!("the CPU's cache is contiguous f32")
        };
        let cache = &mut cache[start..end];
        for (slot, new) in self.slots.iter().zip(new.chunks(width)) {
            let at = *slot as usize * width;
            match cache.get_mut(at..at + width) {
                Some(place) => place.copy_from_slice(new),
                None => candle_core::bail!("slot {slot} is outside the cache"),
            }
        }
        Ok(())
    }
}

/// Softmax attention of q: (N, H, D) over the cache → (N, H, D). A key `window` or more positions back is not seen.
pub fn paged_attention(
    q: &Tensor,
    cache: &KvLayer,
    batch: &PagedBatch,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    refuse_graph(&[q])?;
    let (n, h, d) = q.dims3()?;
    let (_, _, kv, _) = cache.k.dims4()?;
    let gpu_heads = gpu::Heads { query: h, key: kv, dim: d, scale, window };
    if cuda::takes(q) && q.dtype() == cache.k.dtype() && gpu_heads.fits() {
        let (q, work) = (q.contiguous()?, &batch.uploaded(q, gpu_heads)?.work);
        let out = cuda::with_views([&q, &cache.k, &cache.v], |views| gpu::paged_attention(gpu_heads, work, views))?;
        return Ok(cuda::tensor(out, (n, h, d), &q)?);
    }
    if !q.device().is_cpu() {
        return composed::paged(q, cache, batch, scale, window);
    }
    let size = batch.block_size;
    let slots_of = |sequence: &PagedSequence| -> Vec<usize> {
        sequence.blocks.iter().flat_map(|block| (0..size).map(move |at| *block as usize * size + at)).collect()
    };
    let slots: Vec<Vec<usize>> = batch.sequences.iter().map(slots_of).collect();
    let rows: Vec<Rows<'_>> = batch
        .sequences
        .iter()
        .zip(&slots)
        .map(|(sequence, slots)| {
            let seen = (0..sequence.len).map(|row| sequence.seen(row, window)).collect();
            Rows { start: sequence.start, slots: &slots[..sequence.context], seen }
        })
        .collect();
    if rows.iter().map(|rows| rows.seen.len()).sum::<usize>() != n {
        return Err(Error::internal(format!("a paged batch does not cover the {n} queries it was given")));
    }
    let heads = Heads { query: h, key: kv, dim: d, scale };
    let q = q.contiguous()?;
    let [out, _] = cpu::with_floats([&q, &cache.k, &cache.v], |[q, k, v]| Ok(attention(heads, &rows, q, k, v)))?;
    Ok(cpu::tensor(out, (n, h, d))?)
}
