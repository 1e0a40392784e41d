//! Kernels on candle's storages: sizes are checked here, results are new storages.

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape};

use super::few::{MOST_ROWS, Product};
use super::launch::Kind;
use super::lora::{self, MOST_RANK, Part};
use super::product::{self, Place};
use super::sample::SamplePlan;
use super::{few, head, rows, sample, stream};
use crate::kernels::cpu::{Activation, AdamWUpdate, Dropout};

/// Contiguous numbers on a GPU.
#[derive(Clone, Copy)]
pub struct View<'a> {
    storage: &'a CudaStorage,
    start: usize,
    len: usize,
}

impl<'a> View<'a> {
    /// What `layout` shows of `storage`; an error where that is not contiguous.
    pub fn new(storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        match layout.contiguous_offsets() {
            Some((start, end)) => Ok(View { storage, start, len: end - start }),
            None => candle_core::bail!("a GPU kernel needs contiguous input"),
        }
    }

    /// All of a storage of `len` numbers.
    pub(super) fn whole(storage: &'a CudaStorage, len: usize) -> Self {
        View { storage, start: 0, len }
    }

    pub(super) fn device(&self) -> &'a CudaDevice {
        self.storage.device()
    }

    pub(super) fn kind(&self) -> Result<Kind> {
        Kind::of(self.storage.dtype())
    }

    pub(super) fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    /// Numbers.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Its address, if it holds `len` numbers of `dtype`.
    pub(super) fn at(&self, what: &str, len: usize, dtype: DType) -> Result<u64> {
        if self.len != len || self.storage.dtype() != dtype {
            candle_core::bail!("{what}: {} numbers of {:?}, wanted {len} of {dtype:?}", self.len, self.storage.dtype());
        }
        Ok(stream::address(self.storage)? + (self.start * dtype.size_in_bytes()) as u64)
    }
}

/// A new storage and its address.
pub(super) fn new(device: &CudaDevice, len: usize, dtype: DType) -> Result<(CudaStorage, u64)> {
    let storage = stream::fresh(device, &Shape::from(len.max(1)), dtype)?;
    let address = stream::address(&storage)?;
    Ok((storage, address))
}

/// `x / sqrt(mean(x²) + eps) · weight`. x: (…, C); weight: (C), f32 → as x.
pub fn rms_norm(x: View<'_>, weight: View<'_>, eps: f32) -> Result<CudaStorage> {
    let (kind, c, dtype) = (x.kind()?, weight.len(), x.dtype());
    let (y, to) = new(x.device(), x.len(), dtype)?;
    let rows = rows_of(x, c)?;
    let places = [x.at("x", rows * c, dtype)?, weight.at("weight", c, DType::F32)?, to];
    // SAFETY: the lengths were checked; `y` is new.
    unsafe { rows::rms_norm(x.device(), kind, (rows, c), eps, places) }?;
    Ok(y)
}

/// Gradient of [`rms_norm`] in x, on top of what it has `before`. dy, before: as x.
pub fn rms_norm_backward(
    x: View<'_>,
    weight: View<'_>,
    dy: View<'_>,
    before: Option<View<'_>>,
    eps: f32,
) -> Result<CudaStorage> {
    let (kind, c, dtype) = (x.kind()?, weight.len(), x.dtype());
    let (dx, to) = new(x.device(), x.len(), dtype)?;
    let rows = rows_of(x, c)?;
    let len = rows * c;
    let before = before.map_or(Ok(0), |before| before.at("before", len, dtype))?;
    let inputs = [x.at("x", len, dtype)?, weight.at("weight", c, DType::F32)?, dy.at("dy", len, dtype)?];
    let places = [inputs[0], inputs[1], inputs[2], before, to];
    // SAFETY: the lengths were checked; `dx` is new.
    unsafe { rows::rms_norm_backward(x.device(), kind, (rows, c), eps, places) }?;
    Ok(dx)
}

fn rows_of(x: View<'_>, c: usize) -> Result<usize> {
    if c == 0 || !x.len().is_multiple_of(c) {
        candle_core::bail!("{} numbers are no rows of {c}", x.len());
    }
    Ok(x.len() / c)
}

/// Rotates pairs `(i, i + D/2)` of every head; `sign` −1 rotates back. x: (N, H, D); cos, sin: (N, D/2), f32 → as x.
pub fn rope(x: View<'_>, shape: (usize, usize, usize), [cos, sin]: [View<'_>; 2], sign: f32) -> Result<CudaStorage> {
    let (n, h, d) = shape;
    let (kind, dtype, angles) = (x.kind()?, x.dtype(), n * (d / 2));
    if d % 2 != 0 {
        candle_core::bail!("{d} numbers of a head do not pair");
    }
    let (y, to) = new(x.device(), x.len(), dtype)?;
    let tables = [cos.at("cos", angles, DType::F32)?, sin.at("sin", angles, DType::F32)?];
    let places = [x.at("x", n * h * d, dtype)?, tables[0], tables[1], to];
    // SAFETY: the lengths were checked; `y` is new.
    unsafe { rows::rope(x.device(), kind, shape, sign, places) }?;
    Ok(y)
}

/// `a + b`, of one length and dtype.
pub fn sum(a: View<'_>, b: View<'_>) -> Result<CudaStorage> {
    let (y, to) = new(a.device(), a.len(), a.dtype())?;
    let places = [a.at("a", a.len(), a.dtype())?, b.at("b", a.len(), a.dtype())?, to];
    // SAFETY: the lengths were checked; the result is new.
    unsafe { rows::sum(a.device(), a.kind()?, a.len(), places) }?;
    Ok(y)
}

/// `y += x`, in place: nobody else may hold `y`.
pub fn add_onto(y: View<'_>, x: View<'_>) -> Result<()> {
    let to = y.at("y", y.len(), y.dtype())?;
    let places = [to, x.at("x", y.len(), y.dtype())?, to];
    // SAFETY: the lengths were checked, the owner by the caller.
    unsafe { rows::sum(y.device(), y.kind()?, y.len(), places) }
}

/// `act(gate) ⊙ up`.
pub fn gated(activation: Activation, gate: View<'_>, up: View<'_>) -> Result<CudaStorage> {
    let (kind, dtype, len) = (gate.kind()?, gate.dtype(), gate.len());
    let (out, to) = new(gate.device(), len, dtype)?;
    let places = [gate.at("gate", len, dtype)?, up.at("up", len, dtype)?, to];
    // SAFETY: the lengths were checked; `out` is new.
    unsafe { rows::gated(gate.device(), kind, activation, len, places) }?;
    Ok(out)
}

/// Gradients of [`gated`] in gate and up.
pub fn gated_backward(
    activation: Activation,
    gate: View<'_>,
    up: View<'_>,
    dout: View<'_>,
) -> Result<[CudaStorage; 2]> {
    let (kind, dtype, len) = (gate.kind()?, gate.dtype(), gate.len());
    let ((dgate, to_gate), (dup, to_up)) = (new(gate.device(), len, dtype)?, new(gate.device(), len, dtype)?);
    let inputs = [gate.at("gate", len, dtype)?, up.at("up", len, dtype)?, dout.at("dout", len, dtype)?];
    let places = [inputs[0], inputs[1], inputs[2], to_gate, to_up];
    // SAFETY: the lengths were checked; the results are new.
    unsafe { rows::gated_backward(gate.device(), kind, activation, len, places) }?;
    Ok([dgate, dup])
}

/// `mask · x`, the numbers counted from the first that `x` shows.
pub fn dropout(dropout: Dropout, x: View<'_>) -> Result<CudaStorage> {
    let (kind, dtype, len) = (x.kind()?, x.dtype(), x.len());
    let (y, to) = new(x.device(), len, dtype)?;
    // SAFETY: the lengths were checked; `y` is new.
    unsafe { rows::dropout(x.device(), kind, dropout, len, [x.at("x", len, dtype)?, to]) }?;
    Ok(y)
}

/// Writes rows of k and v, (N, width), into the caches at `slots`, N of u32; the caller has seen that each is a row of them.
pub fn kv_write([k, v]: [View<'_>; 2], slots: View<'_>, [k_cache, v_cache]: [View<'_>; 2]) -> Result<()> {
    let (kind, dtype, n) = (k.kind()?, k.dtype(), slots.len());
    let len = k.len();
    if n == 0 {
        return Ok(());
    }
    let (width, cached) = (len / n, k_cache.len());
    let new = [k.at("k", n * width, dtype)?, v.at("v", len, dtype)?, slots.at("slots", n, DType::U32)?];
    let places = [new[0], new[1], new[2], k_cache.at("cache", cached, dtype)?, v_cache.at("cache", cached, dtype)?];
    // SAFETY: the lengths were checked, the slots by the caller; a cache is written by the thread that owns it, on the one stream.
    unsafe { rows::kv_write(k.device(), kind, (n, width), places) }
}

/// One update of AdamW: the parameter and both its moments are changed in place. All of one length, f32.
pub fn adamw(update: AdamWUpdate, gradient: View<'_>, [parameter, first, second]: [View<'_>; 3]) -> Result<()> {
    let count = gradient.len();
    let at = |what, view: View<'_>| view.at(what, count, DType::F32);
    let places = [at("gradient", gradient)?, at("parameter", parameter)?, at("moment", first)?, at("moment", second)?];
    // SAFETY: the lengths were checked; what is changed is the optimizer's, on the one stream.
    unsafe { rows::adamw(gradient.device(), update, count, places) }
}

/// Log-probs of targets, (T), f32, in nats; with `wanted` the logits become `onehot − softmax` in place, and nobody else may hold them.
/// logits: (T, V); targets: T of u32, which the caller has seen to be below V.
pub fn token_logprobs(logits: View<'_>, targets: View<'_>, wanted: bool) -> Result<CudaStorage> {
    let (kind, dtype, rows) = (logits.kind()?, logits.dtype(), targets.len());
    let (logprobs, to) = new(logits.device(), rows, DType::F32)?;
    let v = logits.len() / rows.max(1);
    let places = [logits.at("logits", rows * v, dtype)?, targets.at("targets", rows, DType::U32)?, to];
    // SAFETY: the lengths were checked, the targets and the logits' owner by the caller; the result is new.
    unsafe { head::token_logprobs(logits.device(), kind, (rows, v), wanted, places) }?;
    Ok(logprobs)
}

/// Rows times a number each. x: (T, C); factors: (T), f32 → as x.
pub fn scale_rows(x: View<'_>, factors: View<'_>) -> Result<CudaStorage> {
    let (kind, dtype, rows) = (x.kind()?, x.dtype(), factors.len());
    let (y, to) = new(x.device(), x.len(), dtype)?;
    let c = x.len() / rows.max(1);
    let places = [x.at("x", rows * c, dtype)?, factors.at("factors", rows, DType::F32)?, to];
    // SAFETY: the lengths were checked; the result is new.
    unsafe { head::scale_rows(x.device(), kind, (rows, c), places) }?;
    Ok(y)
}

/// `x·wᵀ + bias` of several weights, in one launch. x: (N, K), N to [`MOST_ROWS`]; w: (out, K), of x's numbers; bias: (out) → (N, out) each.
pub fn few_rows(x: View<'_>, k: usize, of: &[(View<'_>, Option<View<'_>>)]) -> Result<Vec<CudaStorage>> {
    let (kind, dtype, rows) = (x.kind()?, x.dtype(), rows_of(x, k)?);
    let from = x.at("x", rows * k, dtype)?;
    let product = |(w, bias): &(View<'_>, Option<View<'_>>)| {
        let out = rows_of(*w, k)?;
        let (y, to) = new(x.device(), rows * out, dtype)?;
        let bias = bias.map_or(Ok(0), |bias| bias.at("bias", out, dtype))?;
        Ok((y, Product { w: w.at("weight", out * k, dtype)?, bias, y: to, out }))
    };
    let (found, products): (Vec<_>, Vec<_>) = of.iter().map(product).collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let aligned = products.iter().all(|product| (product.w | from).is_multiple_of(8 * dtype.size_in_bytes() as u64));
    if rows > MOST_ROWS || !k.is_multiple_of(8) || !aligned {
        candle_core::bail!("{rows} rows of {k} are not for the kernel of few rows");
    }
    // SAFETY: sizes and places were checked; the results are new.
    unsafe { few::products(x.device(), kind, (rows, k), from, &products) }?;
    Ok(found)
}

/// Rows of a product that one adapter has.
pub struct LowRows<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// (R, C), of a rank to [`MOST_RANK`].
    pub a: View<'a>,
    /// (out, R).
    pub b: View<'a>,
    /// The product, (N, out), written in place: nobody else may hold it.
    pub y: View<'a>,
}

/// `y += x·Aᵀ·Bᵀ` in the rows of every part, of which no two have the same row of a product. x: (N, C).
pub fn add_low_rank(x: View<'_>, c: usize, parts: &[LowRows<'_>]) -> Result<()> {
    let (kind, dtype, n) = (x.kind()?, x.dtype(), rows_of(x, c)?);
    let part = |part: &LowRows<'_>| {
        let rank = rows_of(part.a, c)?;
        if rank == 0 || rank > MOST_RANK || part.rows.end > n {
            candle_core::bail!("rows {:?} of {n}, rank {rank} of at most {MOST_RANK}", part.rows);
        }
        let out = rows_of(part.b, rank)?;
        let (a, b) = (part.a.at("A", rank * c, dtype)?, part.b.at("B", out * rank, dtype)?);
        let (first, rows) = (part.rows.start, part.rows.len());
        Ok(Part { a, b, y: part.y.at("y", n * out, dtype)?, first, rows, rank, out })
    };
    let parts = parts.iter().map(part).collect::<Result<Vec<_>>>()?;
    // Freed on the stream, behind what reads it.
    let (_low, low) = new(x.device(), lora::scratch(&parts), DType::F32)?;
    // SAFETY: the lengths were checked, the products' owner by the caller; the scratch is new.
    unsafe { lora::add(x.device(), kind, c, x.at("x", n * c, dtype)?, &parts, low) }
}

/// Draws tokens: the words that [`SamplePlan::read`] reads. logits: (rows, V), f32, which nobody else may hold, and the plan's words, both
/// changed in place.
pub fn sample_rows(logits: View<'_>, words: View<'_>, plan: &SamplePlan) -> Result<CudaStorage> {
    let (results, to) = new(logits.device(), plan.results, DType::U32)?;
    let v = logits.len() / plan.len().max(1);
    let places =
        [logits.at("logits", plan.len() * v, DType::F32)?, words.at("words", plan.words.len(), DType::U32)?, to];
    // SAFETY: the lengths were checked, the ids when the plan was made, the logits' owner by the caller; the results are new.
    unsafe { sample::sample(logits.device(), (plan.len(), v), places) }?;
    Ok(results)
}

/// A matrix on a GPU: some columns of a view's rows.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    of: View<'a>,
    first: usize,
    width: usize,
    pitch: usize,
    turned: bool,
}

impl<'a> Matrix<'a> {
    /// Rows of `pitch` numbers.
    pub fn new(of: View<'a>, pitch: usize) -> Self {
        Matrix { of, first: 0, width: pitch, pitch, turned: false }
    }

    /// Columns of that.
    pub fn columns(self, of: Range<usize>) -> Self {
        Matrix { first: self.first + of.start, width: of.len(), ..self }
    }

    /// Its transpose.
    pub fn t(self) -> Self {
        Matrix { turned: !self.turned, ..self }
    }

    fn shape(&self) -> (usize, usize) {
        let rows = self.of.len() / self.pitch.max(1);
        if self.turned { (self.width, rows) } else { (rows, self.width) }
    }

    fn place(&self, what: &str) -> Result<Place> {
        let (len, dtype) = (self.of.len(), self.of.dtype());
        if len == 0 || len % self.pitch != 0 || self.first + self.width > self.pitch {
            candle_core::bail!("{what}: {len} numbers are no rows of {}", self.pitch);
        }
        let at = self.of.at(what, len, dtype)? + (self.first * dtype.size_in_bytes()) as u64;
        Ok(Place { at, kind: self.of.kind()?, pitch: self.pitch, turned: self.turned })
    }
}

/// `y = scale·left·right`, added to what is there where it is `onto` that; y is written in place: nobody else may hold it.
/// left: (m, k), right: (k, n), of the same numbers; y: (m, n), of the same or f32.
pub fn multiply(y: Matrix<'_>, left: Matrix<'_>, right: Matrix<'_>, scale: f32, onto: bool) -> Result<()> {
    let ((m, k), (rows, n)) = (left.shape(), right.shape());
    if rows != k || y.shape() != (m, n) || y.turned {
        candle_core::bail!("a product of {m} by {k} and {rows} by {n} does not make {:?}", y.shape());
    }
    let places = [left.place("left")?, right.place("right")?, y.place("y")?];
    if places[0].kind != places[1].kind {
        candle_core::bail!("a product of {:?} and {:?}", places[0].kind, places[1].kind);
    }
    // SAFETY: the shapes were checked, the owner of `y` by the caller.
    unsafe { product::multiply(y.of.device(), (m, n, k), places, scale, onto) }
}
