//! What narrower weights cost: memory, perplexity of a text, and divergence from the f32 model.
//!
//! `cargo bench --bench bench -- quality [MODEL] [TEXT]` prints a Markdown row per dtype. The text's first 2048 tokens are read in
//! windows of 512, each from its own start; KL is `Σ p·ln(p/q)` a token, p the f32 model's distribution over the vocabulary.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Device;
use rdpo::error::{Error, Result};
use rdpo::model::{Attend, Decoder, LoadOptions, LoraRows, WeightFormat};
use rdpo::ops::{CausalMask, Segment};
use rdpo::weights::Checkpoint;

const TOKENS: usize = 2048;
const WINDOW: usize = 512;

/// Sums over the predicted tokens.
#[derive(Default)]
struct Sums {
    tokens: usize,
    nats: f64,
    kl: f64,
    same_top: usize,
    seconds: f64,
}

/// Runs the measurement with the arguments after `quality`.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let argument = |index: usize, default: &str| arguments.get(index).cloned().unwrap_or_else(|| default.into());
    let checkpoint = Checkpoint::open(&PathBuf::from(argument(0, "models/smollm2-135m-instruct")))?;
    let text = std::fs::read_to_string(argument(1, "/usr/share/common-licenses/GPL-3"))?;
    let tokenizer = super::tokenizer(&checkpoint)?;
    let mut ids = tokenizer.encode(&text, false)?;
    ids.truncate(TOKENS);
    let load = |name: &str| {
        let weights = name.parse::<WeightFormat>()?;
        Decoder::load(&checkpoint, &LoadOptions { device: Device::Cpu, weights })
    };
    let full = load("f32")?;
    println!("| dtype | weights, MiB | perplexity | KL to f32, nats a token | same likeliest token | tokens/s |");
    println!("|---|---|---|---|---|---|");
    for dtype in ["f32", "f16", "bf16", "auto", "q8_0", "q4_k", "q4_1"] {
        let model = load(dtype)?;
        let mut sums = Sums::default();
        for window in ids.chunks(WINDOW) {
            compare(&full, &model, window, &mut sums)?;
        }
        let tokens = sums.tokens as f64;
        println!(
            "| {} | {:.0} | {:.4} | {:.2e} | {:.2} % | {:.0} |",
            dtype,
            model.bytes() as f64 / f64::from(1 << 20),
            (-sums.nats / tokens).exp(),
            sums.kl / tokens,
            100.0 * sums.same_top as f64 / tokens,
            tokens / sums.seconds,
        );
    }
    Ok(())
}

fn compare(full: &Decoder, model: &Decoder, window: &[u32], sums: &mut Sums) -> Result<()> {
    const ROWS: usize = 64;
    let last = window.len() - 1;
    let wanted = hidden(full, &window[..last])?;
    let started = Instant::now();
    let got = hidden(model, &window[..last])?;
    sums.seconds += started.elapsed().as_secs_f64();
    for start in (0..last).step_by(ROWS) {
        let rows = ROWS.min(last - start);
        let part = |model: &Decoder, hidden: &candle_core::Tensor| -> Result<Vec<Vec<f32>>> {
            Ok(model.logits(&hidden.narrow(0, start, rows)?.contiguous()?)?.to_vec2::<f32>()?)
        };
        for ((p, q), &target) in part(full, &wanted)?.iter().zip(&part(model, &got)?).zip(&window[start + 1..]) {
            let (p, q) = (log_softmax(p), log_softmax(q));
            sums.nats += q[target as usize];
            sums.kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            sums.same_top += usize::from(top(&p)? == top(&q)?);
            sums.tokens += 1;
        }
    }
    Ok(())
}

fn hidden(model: &Decoder, ids: &[u32]) -> Result<candle_core::Tensor> {
    let segments = vec![Segment { start: 0, len: ids.len(), prefix: 0..0 }];
    let mask = CausalMask::new(segments, (0..ids.len() as u32).collect());
    model.forward(ids, &mask.positions, Attend::Causal(&mask), LoraRows::Base)
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - largest - sum.ln()).collect()
}

fn top(logprobs: &[f64]) -> Result<usize> {
    let best = logprobs.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map(|(index, _)| index).ok_or_else(|| Error::internal("no logits"))
}
