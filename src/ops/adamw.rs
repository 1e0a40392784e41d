//! The optimizer's update (arXiv 1711.05101), in one pass over memory.

use candle_core::Tensor;

use super::{cpu, cuda};
use crate::cores::each;
use crate::error::Result;
pub use crate::kernels::cpu::AdamWUpdate;
use crate::kernels::cpu::adamw_row;
use crate::kernels::cuda::{self as gpu, View};

/// Numbers a task changes at once.
const CHUNK: usize = 4096;

/// One update of a parameter and of its first and second moment, all changed in place, by a gradient. All contiguous, f32, of one shape;
/// no two of them may share their numbers.
pub fn adamw(update: AdamWUpdate, gradient: &Tensor, parameter: &Tensor, moments: &[Tensor; 2]) -> Result<()> {
    let [first, second] = moments;
    let gradient = gradient.contiguous()?;
    if !parameter.device().is_cpu() {
        let change = |[gradient, changed @ ..]: [View<'_>; 4]| gpu::adamw(update, gradient, changed);
        return Ok(cuda::with_views([&gradient, parameter, first, second], change)?);
    }
    cpu::with_floats([&gradient], |[gradient]| {
        cpu::with_floats_mut(parameter, |parameter| {
            cpu::with_floats_mut(first, |first| {
                cpu::with_floats_mut(second, |second| {
                    let moments = first.chunks_mut(CHUNK).zip(second.chunks_mut(CHUNK));
                    let all = gradient.chunks(CHUNK).zip(parameter.chunks_mut(CHUNK)).zip(moments);
                    each(all, |((gradient, parameter), (first, second))| {
                        adamw_row(update, gradient, parameter, first, second);
                    });
                    Ok(())
                })
            })
        })
    })?;
    Ok(())
}
