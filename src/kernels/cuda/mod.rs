//! CUDA kernels for f32 and bf16, each the twin of one in [`super::cpu`]; sums are in f32.
//!
//! `*.cu` hold the kernels, the modules beside them their launches. A launch names addresses only, so the tests run the same launches
//! and kernels on a CPU (`emulate/`). What is public here takes candle's storages and checks their sizes.

#[cfg(not(feature = "cuda"))]
mod absent;
mod attend;
mod attention;
mod few;
mod head;
mod launch;
mod lora;
mod plan;
mod product;
mod rows;
mod sample;
#[cfg(feature = "cuda")]
mod stream;
#[cfg(test)]
mod tests;
mod view;

#[cfg(not(feature = "cuda"))]
use absent as stream;

pub use attend::{Work, attention, attention_backward, paged_attention};
pub use attention::Heads;
pub use few::MOST_ROWS;
pub use lora::MOST_RANK;
pub use plan::Plan;
pub use sample::{Edit, Pick, SamplePlan, SampleRow, Sampled};
pub(crate) use stream::fresh;
pub use stream::{Mark, device, mark};
#[cfg(feature = "cuda")]
pub use stream::{idle_bytes, peak_bytes};
#[cfg(test)]
pub(crate) use tests::sampled;
pub use view::{
    LowRows, Matrix, View, adamw, add_low_rank, add_onto, dropout, few_rows, gated, gated_backward, kv_write, multiply,
    rms_norm, rms_norm_backward, rope, sample_rows, scale_rows, sum, token_logprobs,
};
