//! Attention of candle's own operations, for numbers and heads that a GPU's kernels do not take.

use std::ops::Range;

use candle_core::{D, DType, Tensor};

use super::{CausalMask, KvLayer, PagedBatch};
use crate::error::Result;

/// Softmax attention of one run of queries. q: (L, H, D); k, v: (S, K, D) with `H % K == 0`; row `i` sees the keys of `seen[i]`, which
/// are at least one → (L, H, D). The largest tensor is the scores, (H, L, S) in f32.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, seen: &[Range<usize>], scale: f32) -> Result<Tensor> {
    let ((len, h, d), (keys, kv, _)) = (q.dims3()?, k.dims3()?);
    let mut hidden = vec![f32::NEG_INFINITY; len * keys];
    for (row, seen) in hidden.chunks_exact_mut(keys).zip(seen) {
        row[seen.clone()].fill(0.0);
    }
    let hidden = Tensor::from_vec(hidden, (len, keys), q.device())?;
    // The queries of a key head stand together: its keys need no copy for each of them.
    let grouped =
        q.reshape((len, kv, h / kv, d))?.permute((1, 2, 0, 3))?.contiguous()?.reshape((kv, h / kv * len, d))?;
    let (k, v) = (k.transpose(0, 1)?.contiguous()?, v.transpose(0, 1)?.contiguous()?); // (K, S, D)
    let scores = (grouped.matmul(&k.t()?)?.to_dtype(DType::F32)? * f64::from(scale))?;
    let scores = scores.reshape((kv, h / kv, len, keys))?.broadcast_add(&hidden)?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
    let out = weights.reshape((kv, h / kv * len, keys))?.matmul(&v)?.reshape((kv, h / kv, len, d))?;
    Ok(out.permute((2, 0, 1, 3))?.contiguous()?.reshape((len, h, d))?)
}

/// [`super::causal_attention`]. `seen` holds, for each segment, the keys that each of its rows sees, counted from the first of its prefix.
pub(super) fn causal(
    [q, k, v]: [&Tensor; 3],
    mask: &CausalMask,
    seen: &[Vec<Range<usize>>],
    scale: f32,
) -> Result<Tensor> {
    let mut outs = Vec::with_capacity(seen.len());
    for (segment, seen) in mask.segments.iter().zip(seen).filter(|(segment, _)| segment.len > 0) {
        let (start, len, prefix) = (segment.start, segment.len, &segment.prefix);
        let keys = |x: &Tensor| -> candle_core::Result<Tensor> {
            let own = x.narrow(0, start, len)?;
            match prefix.is_empty() {
                true => Ok(own),
                false => Tensor::cat(&[x.narrow(0, prefix.start, prefix.len())?, own], 0),
            }
        };
        outs.push(attend(&q.narrow(0, start, len)?, &keys(k)?, &keys(v)?, seen, scale)?);
    }
    Ok(Tensor::cat(&outs, 0)?)
}

/// [`super::paged_attention`]: the blocks of each sequence are copied together first.
pub(super) fn paged(
    q: &Tensor,
    cache: &KvLayer,
    batch: &PagedBatch,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    let (_, _, kv, d) = cache.k.dims4()?;
    let mut outs = Vec::with_capacity(batch.sequences.len());
    for sequence in &batch.sequences {
        let blocks = Tensor::new(sequence.blocks.as_slice(), q.device())?;
        let keys = |cache: &Tensor| -> candle_core::Result<Tensor> {
            cache.index_select(&blocks, 0)?.reshape(((), kv, d))?.narrow(0, 0, sequence.context)
        };
        let seen = (0..sequence.len).map(|row| sequence.seen(row, window)).collect::<Vec<_>>();
        let q = q.narrow(0, sequence.start, sequence.len)?;
        outs.push(attend(&q, &keys(&cache.k)?, &keys(&cache.v)?, &seen, scale)?);
    }
    Ok(Tensor::cat(&outs, 0)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{DType, Device};

    use super::super::{
        PagedSequence, Segment, causal_attention, kv_write, paged_attention, record, record_again, tape,
    };
    use super::*;

    fn numbers(shape: (usize, usize, usize), seed: usize) -> Tensor {
        let of = |index: usize| ((index * 7919 + seed * 104_729) % 997) as f32 / 498.0 - 1.0;
        Tensor::from_vec((0..shape.0 * shape.1 * shape.2).map(of).collect(), shape, &Device::Cpu).unwrap()
    }

    fn gap(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn composed_causal_attention_is_the_kernels_with_its_gradients() {
        let segment = |start, len, prefix| Segment { start, len, prefix };
        let mask = CausalMask::new(
            vec![segment(0, 3, 0..0), segment(3, 4, 0..3), segment(7, 2, 0..3), segment(9, 5, 0..0)],
            vec![0, 1, 2, 3, 4, 5, 6, 3, 4, 0, 1, 2, 3, 4],
        );
        for window in [None, Some(3)] {
            let [q, k, v] = [(14, 6, 8), (14, 2, 8), (14, 2, 8)].map(|shape| numbers(shape, shape.1));
            let kernel = || causal_attention(&q, &k, &v, &mask, 0.3, window, DType::F32);
            let composed = || tape::composed([&q, &k, &v], |of| causal(of, &mask, &mask.seen(window), 0.3));
            let pull = |of: &dyn Fn() -> Result<Tensor>| {
                let (out, tape) = record([&q, &k, &v], of).unwrap();
                let found = tape.backward([(&out, numbers((14, 6, 8), 3))]).unwrap();
                (out, found)
            };
            let ((one, ones), (other, others)) = (pull(&kernel), pull(&composed));
            assert!(gap(&one, &other) < 1e-5);
            for leaf in [&q, &k, &v] {
                assert!(gap(ones.get(leaf).unwrap(), others.get(leaf).unwrap()) < 1e-5);
            }
        }
    }

    /// What attention gave is kept from a tape that is not, and a tape made again takes it as it is.
    #[test]
    fn a_tape_made_again_takes_what_attention_gave() {
        let mask = CausalMask::new(vec![Segment { start: 0, len: 5, prefix: 0..0 }], (0..5).collect());
        let [q, k, v] = [(5, 6, 8), (5, 2, 8), (5, 2, 8)].map(|shape| numbers(shape, shape.1));
        let work = || causal_attention(&q, &k, &v, &mask, 0.3, None, DType::F32);
        let (out, tape) = record([&q], work).unwrap();
        assert_eq!(tape.dear().len(), 1);
        let [found, softmax] = tape.dear()[0].clone();
        assert_eq!(gap(&found, &out), 0.0);
        let other = numbers((5, 6, 8), 9);
        let given = |out: &Tensor| record_again([&q], vec![[out.clone(), softmax.clone()]], work).unwrap();
        assert_eq!(gap(&given(&other).0, &other), 0.0);
        let gradient = |(out, tape): (Tensor, tape::Tape)| {
            tape.backward([(&out, numbers((5, 6, 8), 3))]).unwrap().remove(&q).unwrap()
        };
        let again = gradient(given(&found));
        assert_eq!(gap(&again, &gradient((out, tape))), 0.0);
        assert!(gap(&again, &gradient(given(&other))) > 1e-3);
    }

    #[test]
    fn composed_paged_attention_is_the_kernels() {
        let pool = |seed| numbers((6 * 4, 2, 8), seed).reshape((6, 4, 2, 8)).unwrap();
        let cache = KvLayer { k: pool(1), v: pool(2) };
        let sequence =
            |start, len, context, blocks: &[u32]| PagedSequence { start, len, context, blocks: blocks.to_vec() };
        let slots = vec![4 * 4, 4 * 4 + 1, 3 * 4 + 2];
        let batch = PagedBatch::new(4, slots, vec![sequence(0, 2, 10, &[5, 0, 4]), sequence(2, 1, 3, &[3])]);
        kv_write(&cache, &numbers((3, 2, 8), 4), &numbers((3, 2, 8), 5), &batch).unwrap();
        let q = numbers((3, 6, 8), 6);
        for window in [None, Some(5)] {
            let kernel = paged_attention(&q, &cache, &batch, 0.3, window).unwrap();
            assert!(gap(&kernel, &paged(&q, &cache, &batch, 0.3, window).unwrap()) < 1e-5);
        }
    }
}
