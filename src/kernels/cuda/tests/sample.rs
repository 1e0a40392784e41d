//! The sampling kernel, for the engine's test of it beside its own sampler.

use super::super::launch::Kind;
use super::super::sample::{self, SamplePlan, SampleRow, Sampled};
use super::{Array, queue};

/// What the kernel makes of logits, (rows, v); none where there is no emulation.
pub(crate) fn sampled(logits: &[f32], v: usize, rows: &[SampleRow]) -> Option<Vec<Sampled>> {
    let queue = queue()?;
    let plan = SamplePlan::new(rows, v).unwrap();
    let (numbers, words) = (Array::of(Kind::F32, logits), Array::of_ids(&plan.words));
    let results = Array::of_ids(&vec![u32::MAX; plan.results]);
    // SAFETY: the arrays have these sizes.
    unsafe { sample::sample(queue, (plan.len(), v), [numbers.at(), words.at(), results.at()]) }.unwrap();
    for array in [&numbers, &words] {
        array.bytes();
    }
    let found: Vec<u32> = results.bytes().chunks(4).map(|of| u32::from_ne_bytes(of.try_into().unwrap())).collect();
    Some(plan.read(&found))
}
