//! Attention on candle's storages.

use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, CudaStorage, DType, Result};

use super::attention::{self, BackWork, Heads, Lists, Saved, Split};
use super::launch::Kind;
use super::plan::Plan;
use super::view::{View, new};

/// A [`Plan`] on a GPU, for every layer of its step.
pub struct Work {
    words: CudaStorage,
    /// Where each part begins in `words`.
    parts: [usize; 6],
    len: usize,
    size: usize,
    rows: usize,
    tiles: usize,
    longest: usize,
    /// Queries, and one more than the last slot that is read.
    queries: usize,
    slots: usize,
    back: Option<(bool, usize, usize)>,
}

impl Work {
    /// Uploads a plan, in one copy.
    pub fn new(plan: &Plan, device: &CudaDevice) -> Result<Self> {
        let none = Vec::new();
        let (queries, keys, views) =
            plan.back.as_ref().map_or((&none, &none, &none), |back| (&back.queries, &back.key_tiles, &back.views));
        let mut words: Vec<u32> = Vec::new();
        let parts = [&plan.table, &plan.rows, &plan.tiles, queries, keys, views].map(|part| {
            let at = words.len();
            words.extend_from_slice(part);
            at
        });
        words.push(0);
        Ok(Work {
            words: device.storage_from_slice(&words)?,
            parts,
            len: words.len(),
            size: plan.size,
            rows: plan.rows.len() / 3,
            tiles: plan.tiles.len() / 4,
            longest: plan.longest,
            queries: plan.queries,
            slots: plan.table.iter().max().map_or(0, |most| (*most as usize + 1) * plan.size),
            back: plan.back.as_ref().map(|back| (back.tiled, back.count(), back.key_tiles.len() / 4)),
        })
    }

    fn at(&self) -> Result<[u64; 6]> {
        let first = View::whole(&self.words, self.len).at("work", self.len, DType::U32)?;
        Ok(self.parts.map(|part| first + 4 * part as u64))
    }

    fn forward(
        &self,
        heads: Heads,
        [q, k, v]: [View<'_>; 3],
        wants_lse: bool,
    ) -> Result<(CudaStorage, Option<CudaStorage>)> {
        let (kind, dtype, device) = (q.kind()?, q.dtype(), q.device());
        let (len, width, keys) = (self.queries * heads.query * heads.dim, heads.key * heads.dim, k.len());
        if !heads.fits() || keys < self.slots * width || kind == Kind::F32 && self.tiles > 0 {
            candle_core::bail!("attention of {heads:?} over {keys} numbers of keys, {} slots", self.slots);
        }
        let (out, to) = new(device, len, dtype)?;
        let lse = wants_lse.then(|| new(device, self.queries * heads.query, DType::F32)).transpose()?;
        let lse_at = lse.as_ref().map_or(0, |(_, at)| *at);
        let places = [q.at("q", len, dtype)?, k.at("k", keys, dtype)?, v.at("v", keys, dtype)?, to];
        let [table, rows, tiles, ..] = self.at()?;
        let lists = Lists { table, size: self.size };
        let split = Split::new(heads, self.rows, self.longest);
        let [partial, stats] = split.scratch(heads);
        let (partial, stats) = (new(device, partial, DType::F32)?, new(device, stats, DType::F32)?);
        // SAFETY: the lengths were checked against the plan's; the results and the scratch are new.
        unsafe {
            let scratch = (&split, [partial.1, stats.1]);
            attention::rows(device, kind, heads, (rows, self.rows), lists, places, scratch, lse_at)?;
            attention::tiles(device, heads, (tiles, self.tiles), lists, places, lse_at)?;
        }
        Ok((out, lse.map(|(lse, _)| lse)))
    }
}

/// Softmax attention over a paged cache. q: (N, H, D); k, v: (slots, K, D) → (N, H, D).
pub fn paged_attention(heads: Heads, work: &Work, qkv: [View<'_>; 3]) -> Result<CudaStorage> {
    Ok(work.forward(heads, qkv, false)?.0)
}

/// Softmax attention over a step. q: (N, H, D); k, v: (N, K, D) → (N, H, D), and the logarithm of each softmax's sum, (N, H), f32.
pub fn attention(heads: Heads, work: &Work, qkv: [View<'_>; 3]) -> Result<(CudaStorage, CudaStorage)> {
    match work.forward(heads, qkv, true)? {
        (out, Some(lse)) => Ok((out, lse)),
        _ => candle_core::bail!("the sums of a softmax were asked for. This is a bug."),
    }
}

/// Gradients of [`attention()`] in q, k and v, from its `out` and `lse`.
pub fn attention_backward(
    heads: Heads,
    work: &Work,
    [q, k, v]: [View<'_>; 3],
    (out, dout): (View<'_>, View<'_>),
    lse: View<'_>,
) -> Result<[CudaStorage; 3]> {
    let Some((tiled, count, key_tiles)) = work.back else { candle_core::bail!("a paged batch has no backward") };
    let (kind, dtype, device, n) = (q.kind()?, q.dtype(), q.device(), work.queries);
    let (len, keys) = (n * heads.query * heads.dim, n * heads.key * heads.dim);
    if !heads.fits() || work.slots > n || tiled && (kind == Kind::F32 || !heads.tiled()[1]) {
        candle_core::bail!("the backward of attention of {heads:?} in {dtype:?}");
    }
    // Freed on the stream, behind what reads it.
    let (_pull, pull_at) = new(device, n * heads.query, DType::F32)?;
    let saved = Saved {
        q: q.at("q", len, dtype)?,
        k: k.at("k", keys, dtype)?,
        v: v.at("v", keys, dtype)?,
        out: out.at("out", len, dtype)?,
        dout: dout.at("dout", len, dtype)?,
        lse: lse.at("lse", n * heads.query, DType::F32)?,
        pull: pull_at,
    };
    let [(dq, dq_at), (dk, dk_at), (dv, dv_at)] =
        [new(device, len, dtype)?, new(device, keys, dtype)?, new(device, keys, dtype)?];
    let [table, _, _, queries, key_parts, views] = work.at()?;
    let back = BackWork { tiled, queries: (queries, count), keys: (key_parts, key_tiles), views };
    let lists = Lists { table, size: 1 };
    // SAFETY: the lengths were checked against the plan's; the results are new.
    unsafe { attention::backward(device, kind, heads, n, back, lists, saved, [dq_at, dk_at, dv_at]) }?;
    Ok([dq, dk, dv])
}
