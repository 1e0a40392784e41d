//! The start of a backward pass: a scalar whose gradient in a tensor is one that is given.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Shape, Tensor};

use crate::error::Result;

/// A scalar that is `Σ y ⊙ dy` up to a constant: its gradient in y is `dy`.
pub fn pull(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let dy = dy.detach();
    Ok(y.apply_op1(Pull { dy: dy.reshape(y.shape())?.to_dtype(y.dtype())? })?)
}

struct Pull {
    dy: Tensor,
}

impl CustomOp1 for Pull {
    fn name(&self) -> &'static str {
        "pull"
    }

    fn cpu_fwd(&self, _storage: &CpuStorage, _layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let shape = Shape::from(());
        Ok((storage.device().zeros_impl(&shape, storage.dtype())?, shape))
    }

    fn bwd(&self, _y: &Tensor, _sum: &Tensor, _one: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.dy.clone()))
    }
}
