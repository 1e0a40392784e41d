//! Training tokens per second and peak memory of a whole run: 16 pairs cut from a text, two epochs, batch 4, rank 16.
//!
//! `cargo bench --bench bench -- train-run [MODEL] [DTYPE] [ACTIVATION_MEMORY] [TEXT]` prints one JSON line. Tokens are counted as TRL counts
//! them (the prompt once for each answer), and the time includes the reference pass and the checkpoint, as a user waits for both.

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device};
use rdpo::error::{Error, Result};
use rdpo::model::{Decoder, LoadOptions};
use rdpo::text::{Message, RenderOptions, Tokenizer};
use rdpo::train::{
    EvalMetrics, Hooks, LoraOptions, LossKind, LossOptions, StepMetrics, TokenPair, TrainJob, TrainingOptions, train,
};
use rdpo::weights::{AdapterFile, Checkpoint};

const PAIRS: usize = 16;
const EPOCHS: usize = 2;

/// Prints every step to stderr.
struct Printer;

impl Hooks for Printer {
    fn pace(&mut self) -> Result<()> {
        Ok(())
    }

    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        eprintln!(
            "step {}/{}: loss {:.4}, margin {:.4}, {:.2} s",
            metrics.step, metrics.total_steps, metrics.loss, metrics.rewards_margins, metrics.seconds
        );
        Ok(())
    }

    fn on_eval(&mut self, _metrics: &EvalMetrics) -> Result<()> {
        Ok(())
    }

    fn on_checkpoint(&mut self, _step: usize, _adapter: &AdapterFile) -> Result<()> {
        Ok(())
    }
}

/// Runs the measurement with the arguments after `train-run`.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let argument = |index: usize, default: &str| arguments.get(index).cloned().unwrap_or_else(|| default.into());
    let dtype = super::dtype(&argument(1, "f32"))?;
    let text = std::fs::read_to_string(argument(3, "/usr/share/common-licenses/GPL-3"))?;
    let (model, pairs) = load(Path::new(&argument(0, "models/smollm2-135m-instruct")), dtype, &text)?;
    let loaded = peak_megabytes();
    let folder = tempfile::tempdir()?;
    let job = TrainJob {
        model: &model,
        lora: LoraOptions::default().config(None),
        init: None,
        pairs: &pairs,
        eval_pairs: &[],
        loss: LossOptions { kind: LossKind::Dpo, ..LossOptions::default() },
        options: TrainingOptions {
            epochs: EPOCHS as f64,
            batch_size: 4,
            learning_rate: 1e-4,
            warmup_ratio: 0.0,
            max_length: 512,
            activation_memory: argument(2, &TrainingOptions::default().activation_memory),
            ..TrainingOptions::default()
        },
        seed: 0,
        folder: folder.path().to_path_buf(),
    };
    let start = Instant::now();
    let outcome = train(&job, &mut Printer)?;
    let seconds = start.elapsed().as_secs_f64();
    let last = outcome.last.ok_or_else(|| Error::internal("the run made no step."))?;
    let line = serde_json::json!({
        "dtype": argument(1, "f32"), "seconds": seconds, "tokens": last.num_tokens, "tokens_saved": last.tokens_saved,
        "tokens_per_s": last.num_tokens as f64 / seconds, "pairs_per_s": (PAIRS * EPOCHS) as f64 / seconds,
        "peak_mb_loaded": loaded, "peak_mb": peak_megabytes(),
    });
    println!("{line}");
    Ok(())
}

/// A checkpoint, and pairs of its tokens.
pub(crate) fn load(path: &Path, dtype: DType, text: &str) -> Result<(Decoder, Vec<TokenPair>)> {
    let checkpoint = Checkpoint::open(path)?;
    let pairs = pairs(&super::tokenizer(&checkpoint)?, text)?;
    Ok((Decoder::load(&checkpoint, &LoadOptions { device: Device::Cpu, dtype })?, pairs))
}

/// 60 words as the prompt and two times 100 as the answers, each cut from another place.
fn pairs(tokenizer: &Tokenizer, text: &str) -> Result<Vec<TokenPair>> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let piece = |start: usize, len: usize| {
        let start = start % (words.len() - len);
        words[start..start + len].join(" ")
    };
    let closed = RenderOptions { add_generation_prompt: false, ..RenderOptions::default() };
    (0..PAIRS)
        .map(|index| {
            let user = Message::new("user", piece(index * 40, 60));
            let prompt = tokenizer.encode_chat(std::slice::from_ref(&user), &RenderOptions::default())?;
            let answer = |text: String| -> Result<Vec<u32>> {
                let whole = tokenizer.encode_chat(&[user.clone(), Message::new("assistant", text)], &closed)?;
                Ok(whole[prompt.len()..].to_vec())
            };
            let (chosen, rejected) = (answer(piece(1000 + index * 90, 100))?, answer(piece(3000 + index * 90, 100))?);
            Ok(TokenPair { prompt, chosen, rejected, score_chosen: 1.0, score_rejected: 0.0 })
        })
        .collect()
}

/// Peak resident memory of the process, MB.
fn peak_megabytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}
