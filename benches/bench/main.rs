//! Benchmarks: criterion groups without a sub-command, else one of the whole-run measurements.

mod engine;
mod kernels;
mod quality;
mod rates;
mod share;
mod steps;
mod train;

use std::time::Duration;

use candle_core::Device;
use criterion::Criterion;
use rdpo::error::{Error, Result};
use rdpo::text::{Tokenizer, TokenizerOptions};
use rdpo::weights::Checkpoint;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.split_first() {
        Some((first, rest)) if first == "engine-run" => engine::run(rest),
        Some((first, rest)) if first == "quality" => quality::run(rest),
        Some((first, rest)) if first == "lora-run" => engine::run_adapters(rest),
        Some((first, rest)) if first == "share-run" => share::run(rest),
        Some((first, rest)) if first == "train-run" => train::run(rest),
        _ => {
            kernels::run(&mut criterion().with_measurement(rates::Rates))?;
            let mut criterion = criterion();
            steps::run(&mut criterion)?;
            criterion.final_summary();
            Ok(())
        }
    }
}

/// Short measurements: the minimum is what counts on a shared machine.
fn criterion() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .configure_from_args()
}

/// The tokenizer of a checkpoint.
fn tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    let files = checkpoint.tokenizer()?;
    Tokenizer::new(TokenizerOptions {
        tokenizer_json: files.tokenizer_json,
        chat_template: files.chat_template,
        bos_token: files.bos_token,
        eos_token: files.eos_token,
        pad_token: files.pad_token,
        add_bos_token: files.add_bos_token,
        eos_token_ids: files.eos_token_ids,
    })
}

/// `cpu` or `cuda:N`.
fn device(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
    Ok(rdpo::ops::gpu(
        ordinal.ok_or_else(|| Error::invalid("device", format!("`{name}` is neither `cpu` nor `cuda:N`")))?,
    )?)
}
