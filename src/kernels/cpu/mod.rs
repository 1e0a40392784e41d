//! CPU kernels, chosen at run time by what the processor has (AVX-512, AVX2 with FMA, or portable code).

mod attention;
mod dropout;
mod level;
mod matmul;
mod places;
mod rowwise;

pub use attention::{Heads, Rows, attention, attention_backward};
pub use dropout::Dropout;
pub use level::{has_bf16_products, keep_candle_on_one_thread};
pub use matmul::{Adapted, Codes, Left, LowRank, Packed, Width, forward_together, multiply};
pub use places::in_chunks;
pub use rowwise::{
    Activation, AdamWUpdate, PIECE, adamw_row, add_row, gated, gated_backward, rms_norm_backward_row, rms_norm_row,
    rope_row, scale_row, softmax_row, sum_row,
};
