//! Tokens drawn from logits where these lie: only what was drawn comes back to the host.

use candle_core::Tensor;

use super::cuda;
use crate::error::{Error, Result};
use crate::kernels::cuda::{self as gpu, SamplePlan};
pub use crate::kernels::cuda::{Edit, Pick, SampleRow, Sampled};

/// What each row of logits says. logits: (rows, V), f32, on a GPU and contiguous; they are changed in place, and nobody else may hold
/// them.
pub fn sample(logits: &Tensor, rows: &[SampleRow]) -> Result<Vec<Sampled>> {
    let (count, v) = logits.dims2()?;
    if count != rows.len() || v == 0 {
        return Err(Error::internal(format!("{} requests for logits {:?}. This is a bug.", rows.len(), logits.dims())));
    }
    if count == 0 {
        return Ok(Vec::new());
    }
    let plan = SamplePlan::new(rows, v)?;
    let words = Tensor::new(plan.words.as_slice(), logits.device())?;
    let found = cuda::with_views([logits, &words], |[logits, words]| gpu::sample_rows(logits, words, &plan))?;
    Ok(plan.read(&cuda::tensor(found, plan.results, logits)?.to_vec1()?))
}
